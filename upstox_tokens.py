#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["selenium>=4.27", "pyotp>=2.9"]
# ///
"""Keep the Upstox access tokens of one account (one to six apps) alive in vega_trade.db.

THIS PROGRAM IS TRUSTED WITH YOUR BROKER PIN AND TOTP SECRET. Read it before you use it: it is one file.

    upstox_tokens.py                          summary, then the menu
    upstox_tokens.py --status [--json]        summary only, read-only
    upstox_tokens.py --mode ALL|INVALID_ONLY|PARTIAL [--apis A,B] [--json]
    upstox_tokens.py --serve [HOST:PORT]      HTTP API and dashboard
    upstox_tokens.py --check                  is everything ready for a login?
    upstox_tokens.py --import-config          copy the app configuration into the database

Exit: 0 every token in question is valid, 1 at least one is not, 2 usage, configuration or database error,
3 an operator is needed, 4 another run is busy, 130 or 143 stopped by Ctrl-C or SIGTERM.
From Python: upstox_tokens.access_token("WEBSOCKET1") gives the stored token or raises TokenError.

The map: where the guide's parts are
    2 database, 3 configuration      find_database, create_database; load_config, stored_apps, import_apps
    4.1 upsert (delete + insert)     upsert_token, token_row; deactivate_tokens
    5.1 time check, 5.2 profile      is_time_valid, cutoff_after; ask_profiles, judge_profile
    6 classification                 classify_tokens, judge_stored
    7.1 summary and menu, 7.2 REST   summary_lines, prompt_menu; ROUTES, status_json, job_json
    8 Selenium login, persist        log_in, next_move; exchange_and_store; generate_by_phone (flow V3)
    9 dashboard, 10 safety           PAGE; current_hold, Login.note_sent, is_brokers

A run, in order: generate, prepare, generate_chosen, generate_by_browser, and for each app generate_one:
log_in, exchange_and_store, verify_new.
"The guide", "contract" and "facts/..." in the comments name documents of the project.

Where your secrets go
    PIN             Login -> Browser.type -> chromedriver on 127.0.0.1 -> the broker's page only (next_move,
                    is_brokers; pages of this machine when UPSTOX_BASE_URL is here). Noted as sent before its
                    last digit (Login.note_sent -> Run.note): as an HMAC under the TOTP secret (credentials_of),
                    never its value. Config.secrets, so that no text can hold it
    TOTP secret     Login.make_code (the code goes the PIN's way), credentials_of (as the HMAC's key)
    mobile number   the way of the PIN, but not noted; part of the same HMAC
    client secret   exchange_code, request_approval, to UPSTOX_BASE_URL only (send); the database (token_row,
                    import_apps), where the Java back end wants it
    access token    exchange_and_store or take_delivery -> upsert_token; ask_profiles, to UPSTOX_BASE_URL only;
                    access_token() returns it to Python programs
    serve key       Handler.check_key; the dashboard keeps it in its browser tab

Hosts: UPSTOX_BASE_URL; in the browser upstox.com and what its pages load; chromedriver on 127.0.0.1; what
Selenium Manager downloads from when there is no chromedriver on PATH. The redirect URI's host is never asked.

It reads the environment, an env file (see env.sample) and the tables upstox_tokens, upstox_api_configs and
upstox_token_audit. It writes upstox_tokens and upstox_token_audit, which is also its memory of codes and PINs
sent, of approvals asked for and of the account; upstox_api_configs on demand; the database when it is missing;
DATABASE.upstox-lock, an empty file to lock; a browser profile that is deleted; the pictures of --debug-dir.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import hashlib
import hmac
import http.client
import http.server
import importlib.util
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, TextIO

__version__ = "2.0.0"
__all__ = ["TokenError", "access_token", "main"]

# ---- Facts: the guide, the broker, the limits ----------------------------------------------------

API_NAMES = ("PRIMARY", "WEBSOCKET1", "WEBSOCKET2", "WEBSOCKET3", "OPTIONCHAIN1", "OPTIONCHAIN2")
MODES = ("ALL", "INVALID_ONLY", "PARTIAL")
FLOWS = ("SELENIUM", "V3")
NEEDS_LOGIN = ("INVALID", "EXPIRED", "NOT FOUND")
DATABASE_NAME = "vega_trade.db"
BASE_URL = "https://api.upstox.com"
SERVE_ADDRESS = "127.0.0.1:28021"
IST = timezone(timedelta(hours=5, minutes=30))  # Indian time has no daylight saving

OK, NOT_VALID, USAGE, OPERATOR, BUSY = range(5)  # exit codes
# how far the failure of one login reaches: this app only, the rest of the run, until a person acts (exit 3),
# or a hold: no unattended login any more
THIS_APP, THIS_RUN, A_PERSON, A_HOLD = range(4)

PROFILE_SECONDS = 10  # overall deadline of one round of calls side by side
EXCHANGE_SECONDS = 30  # the code is spent once it was sent, so patience pays
BODY_LIMIT = 1 << 20
CLOCK_SECONDS = 20  # the codes of a clock further off are refused
TOTP_WINDOW, TOTP_MARGIN = 30, 5  # seconds; a code with less than the margin left is not sent
READ_SECONDS, PROOF_SECONDS, STORE_SECONDS = 10, 30, 60  # patience with a locked database
PAGE_SECONDS, OUTCOME_SECONDS = 30, 60  # for a page to show a step, for the broker to judge an entry
CAPTCHA_SECONDS, CAPTCHA_HEADED_SECONDS = 15, 300
KEYS_SECONDS = 5  # for a field to show what was typed
WORDS_SECONDS = 4  # for the request to end whose answer unknown words of the page may be, or announce
SETTLE_SECONDS = 0.25  # of the page's own time, for it to send a code or PIN by itself before the first press
DRIVER_SECONDS = 60  # for chromedriver to start, and to answer a command
SHARED_SECONDS = 5  # a check younger than this answers the HTTP API again
PROOFS_AT_ONCE = 8  # deliveries being proven side by side; the others wait their turn

TOKENS_DDL = """CREATE TABLE IF NOT EXISTS "upstox_tokens" (
    "id" integer PRIMARY KEY,
    "access_token" varchar(2000),
    "api_name" varchar(255) NOT NULL,
    "client_id" varchar(255),
    "client_secret" varchar(255),
    "created_at" timestamp,
    "expires_in" bigint,
    "is_primary" boolean,
    "last_refreshed" timestamp,
    "redirect_uri" varchar(255),
    "refresh_token" varchar(2000),
    "token_type" varchar(255),
    "api_index" integer,
    "generated_at" varchar(255),
    "is_active" integer,
    "purpose" varchar(255),
    "updated_at" bigint,
    "user_id" integer,
    "validity_at" varchar(255)
)"""
CONFIGS_DDL = """CREATE TABLE IF NOT EXISTS upstox_api_configs (
    api_index INTEGER PRIMARY KEY,
    api_name VARCHAR(50) UNIQUE NOT NULL,
    client_id VARCHAR(255) NOT NULL,
    client_secret VARCHAR(255) NOT NULL,
    redirect_uri VARCHAR(255),
    is_primary BOOLEAN DEFAULT 0,
    is_enabled BOOLEAN DEFAULT 1,
    created_at BIGINT,
    updated_at BIGINT
)"""
AUDIT_DDL = """CREATE TABLE IF NOT EXISTS upstox_token_audit (
    id INTEGER PRIMARY KEY, at BIGINT NOT NULL, run_id VARCHAR(32) NOT NULL,
    api_name VARCHAR(50) NOT NULL, source VARCHAR(20) NOT NULL, flow VARCHAR(20) NOT NULL,
    outcome VARCHAR(20) NOT NULL, reason VARCHAR(1000)
)"""
# what the program itself must remember: whose codes and PINs, a code's window or an approval's deadline
# (epoch ms), whose token; in columns of their own, which an older table gets when first needed
AUDIT_MEMORY = {"credentials": "VARCHAR(64)", "number": "BIGINT", "user_id": "VARCHAR(40)"}

APP_PAGE = "the app's page under Developer Apps of your Upstox account"
BROKER_ERRORS = {  # what the API's error codes mean, and what to do next (facts/upstox-api.md 3 and 6)
    "UDAPI100057": ("the authorization code was not accepted", "Run again."),
    "UDAPI100058": ("no segment of this account is active", "Reactivate the account in the Upstox app."),
    "UDAPI100068": ("client_id or redirect_uri is not what the broker has registered",
                    f"Compare both with {APP_PAGE}; the app may have been deleted."),
    "UDAPI100069": ("client_id or client_secret is wrong", f"Copy the secret again from {APP_PAGE}."),
    "UDAPI100016": ("the app's credentials are not valid", f"Compare client_id and secret with {APP_PAGE}."),
    "UDAPI100073": ("the client_id is inactive", f"Activate it on {APP_PAGE}."),
    "UDAPI10005": ("the broker counts too many requests", "Wait a few minutes, then run again."),
    "UDAPI100500": ("the broker has trouble of its own", "Look at status.upstox.com, then run again."),
    "UDAPI1123": ("the app has no notifier URL", f"Enter the Notifier Webhook Endpoint on {APP_PAGE}."),
    "UDAPI1124": ("flow V3 is for individual accounts only", "Use --flow SELENIUM."),
    "UDAPI1155": ("the app is under review or was rejected", f"Look at {APP_PAGE}."),
    "UDAPI1157": ("the app has expired", f"Renew it on {APP_PAGE}."),
}

# the login page's only stable names (facts/login-page.md): step -> (field, button); the last step first,
# since a page may keep the earlier ones
STEPS = {"pin": ("pinCode", "pinContinueBtn"), "otp": ("otpNum", "continueBtn"),
         "mobile": ("mobileNum", "getOtp")}
CAPTCHA = 'iframe[src*="challenges.cloudflare.com"], .cf-turnstile, [name="cf-turnstile-response"]'

LOCKED = ("the account is locked after too many wrong PINs. Unlock it in the Upstox app (PAN and OTP), then "
          "start the menu.", A_HOLD)
OTP_BLOCKED = ("the broker blocked OTP entry for a while. Wait 10 minutes, then run again.", THIS_RUN)
PAGE_FAILED = "the login page or the browser failed ({})."
SESSION_LOST = ("the broker ended the login session. Run again.", THIS_APP)
PAGE_CODES = {  # the page's error codes: what they mean and what to do, how far that reaches (facts 2)
    "1017016": ("the broker does not know the mobile number. Correct UPSTOX_MOBILE_NUMBER.", A_PERSON),
    "1017074": ("several accounts are linked to the mobile number. Ask the broker to separate them, or use "
                "--flow V3.", A_PERSON),
    "1017069": ("the broker's limit of OTP requests is reached. Wait 10 minutes, then run again.", THIS_RUN),
    "1017076": ("the broker's OTP session expired. Run again.", THIS_APP),
    "1017072": ("the broker calls the login page's version outdated. Run again later.", THIS_APP),
    "1017078": OTP_BLOCKED, "1017125": OTP_BLOCKED, "1017090": LOCKED,
    "500": ("the login page lost its connection to the broker. Run again.", THIS_APP),
    **dict.fromkeys(("1017007", "1017079", "1017084", "1017095", "1017105"), SESSION_LOST)}
PAGE_TEXTS = {  # headings and paths that carry no code
    r"your account has been locked|^/unlock-account": LOCKED,
    r"^create a new (6-digit )?pin": (
        "the page asks to create a new PIN, which this program never does. Set the PIN in the Upstox app, "
        "then run again.", THIS_APP),
    r"^reactivate your account|^/reactivate-account": (
        "the account is dormant. Reactivate it in the Upstox app, then run again.", THIS_APP)}
# nobody outside knows how the broker words a wrong PIN or code: these words are taken for a refusal
REFUSAL = re.compile(r"incorrect|invalid|(?<!went )\bwrong\b|n[o'’]t (match|correct|valid)|mismatch|"
                     r"attempts? (left|remaining)", re.I)
CAPTCHA_SHOWN = ("the login page shows a CAPTCHA, which only a person may solve. Run with --headed on a "
                 "machine with a display, or use --flow V3.")
NOBODY_SOLVED = "nobody solved the CAPTCHA in time. Run again when an operator is there."

# ---- Errors: every text is a finished sentence for the operator ----------------------------------

class TokenError(Exception):
    """Something an operator must read; the text names the next step."""

    def __init__(self, text: str, exit_code: int = NOT_VALID) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class DatabaseError(TokenError):
    """The database cannot be used."""

    def __init__(self, text: str) -> None:
        super().__init__(text, USAGE)


class LoginFailed(TokenError):
    """One app got no token: why, what to do next, and how far that reaches (THIS_APP … A_HOLD)."""

    def __init__(self, text: str, reach: int = THIS_APP) -> None:
        super().__init__(text)
        self.reach = reach


class PageFault(Exception):
    """The browser died or the page did not load: tried once more unless something was typed."""


class Stopped(BaseException):
    """Ctrl-C or SIGTERM; not an Exception, so that nothing on the way swallows it."""

    def __init__(self, signum: int) -> None:
        self.exit_code = 128 + signum


def printable(value: object, limit: int) -> str:
    """Foreign text made fit for one line of a terminal or a log."""
    return "".join(c if c.isprintable() else " " for c in str(value))[:limit].strip()


def redact(text: str, hidden: Iterable[str]) -> str:
    """Replace every known secret: the last line of defence behind never putting one into a text."""
    for secret in sorted(hidden, key=len, reverse=True):
        # a page may group digits: 749-216, 98120 47365
        pattern = r"[\s./-]*".join(secret) if secret.isdigit() else re.escape(secret)
        text = re.sub(pattern, "[hidden]", text)
    return text


# ---- What comes from outside ---------------------------------------------------------------------

def in_main_thread() -> bool:
    """Whether signals come to this thread."""
    return threading.current_thread() is threading.main_thread()


class Context:
    """Options, environment, clock, terminal and signals of one call of the program; made once, in main.

    `now` and `sleep` are the wall clock of tokens and TOTP codes in seconds. Results go to `out`, progress to
    `err`; with -q the result is `kept`, and shown only when the exit code is not 0.
    """

    def __init__(self, args: argparse.Namespace, environ: Mapping[str, str], now: Callable[[], float],
                 sleep: Callable[[float], None], out: TextIO, err: TextIO, ask: Callable[[str], str],
                 browser: Callable[..., Browser]) -> None:
        self.args, self.environ, self.now, self.sleep = args, environ, now, sleep
        self.out, self.err, self.ask, self.browser = out, err, ask, browser
        self.path = Path()  # of the database, once main has found it
        self.kept: list[str] | None = [] if args.quiet and args.command != "menu" else None
        self.counting = ""  # the countdown that stands on the terminal
        self.signal, self.holding = 0, False
        self.stopping = threading.Event()  # set when a server ends: a run finishes its current app

    def say(self, *lines: str) -> None:
        """Lines of the result; TokenError when nobody takes them."""
        if self.kept is not None:
            self.kept += lines
            return
        try:
            print(*lines, sep="\n", file=self.out, flush=True)
        except (OSError, ValueError) as error:  # `| head`, a full disk, a closed stream
            raise TokenError(f"The result could not be written: {type(error).__name__}.") from None

    def log(self, text: str) -> None:
        """A line of progress or an error; a reader that went away must not stop a run."""
        newline = "\n" if self.counting and self.err.isatty() else ""
        self.counting = ""
        with contextlib.suppress(OSError, ValueError):
            self.err.write(f"{newline}{text}\n")
            self.err.flush()

    def inform(self, text: str, left: float | None = None) -> None:
        """A line of progress that -q leaves out; a wait of `left` more seconds counts down on a terminal."""
        if self.args.quiet:
            return
        if left is None:
            self.log(text)
        elif self.err.isatty():
            with contextlib.suppress(OSError, ValueError):
                print(f"\r\033[K{text} in {left:.0f} s", end="", file=self.err, flush=True)
            self.counting = text
        elif self.counting != text:
            self.log(f"{text} in {left:.0f} s")
            self.counting = text

    def answer(self, prompt: str) -> str:
        """What the operator answers; q at the end of the input."""
        try:
            return self.ask(prompt).strip()
        except EOFError:
            self.say("")
            return "q"

    def confirm(self, question: str) -> bool:
        """A yes or no question; nothing but yes is yes."""
        return self.answer(f"{question} [y/N] ").lower() in ("y", "yes")

    def stop(self, signum: int, _frame: object) -> None:
        """The first Ctrl-C or SIGTERM ends the program, inside finish_first when that is done; later ones must
        not disturb the cleaning."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.signal = signum
        if not self.holding:
            raise Stopped(signum)

    @contextlib.contextmanager
    def signals_handled(self) -> Iterator[None]:
        """Handle Ctrl-C and SIGTERM for a while; a signal that the caller ignores stays ignored."""
        signals = (signal.SIGINT, signal.SIGTERM) if in_main_thread() else ()
        before = {signum: signal.getsignal(signum) for signum in signals}
        try:
            for signum, handler in before.items():
                if handler is not signal.SIG_IGN:
                    signal.signal(signum, self.stop)
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextlib.contextmanager
    def finish_first(self) -> Iterator[None]:
        """What must not be lost, a token or a hold, is stored before a signal may end the program."""
        self.holding = here = in_main_thread()
        try:
            yield
        finally:
            self.holding = False
            if here and self.signal:
                raise Stopped(self.signal)


def run_within(seconds: float, late: Any, call: Callable[[Any], Any], items: Sequence[Any]) -> list:
    """call(item) for each item, side by side; `late` for those not back after `seconds` overall.

    urllib's own timeout is per socket operation and never ends a dripping answer; a daemon thread that is
    still reading then does not keep the program alive.
    """
    results, bugs = [late] * len(items), []

    def work(place: int, item: Any) -> None:
        try:
            results[place] = call(item)
        except Exception as error:  # a bug: raised where somebody sees it
            bugs.append(error)

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in enumerate(items)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    if bugs:
        raise bugs[0]
    return list(results)


# ---- Configuration -------------------------------------------------------------------------------

class App(NamedTuple):
    """One API app of the account."""

    index: int
    name: str
    client_id: str
    client_secret: str
    redirect_uri: str

    def __repr__(self) -> str:
        return f"App({self.name})"  # a secret must not reach a traceback


class Config(NamedTuple):
    """The whole configuration, checked."""

    apps: tuple[App, ...]
    base_url: str
    mobile: str
    pin: str
    totp: str
    notifier: str
    serve_key: str
    origins: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Config({len(self.apps)} apps)"

    @property
    def names(self) -> list[str]:
        return [app.name for app in self.apps]

    def secrets(self) -> set[str]:
        """Every configured text that must never be shown."""
        own = {self.mobile, self.pin, self.totp, self.serve_key, *(app.client_secret for app in self.apps)}
        return own - {""}


# KEY='value', KEY="value" or KEY=value, and then perhaps a comment
ENV_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)="
                      r"""(?:(?:'([^']*)'|"([^"]*)")\s*(?:#.*)?|(?!['"])(.*?)(?:\s#.*)?)""")
APP_KEY = re.compile(r"UPSTOX_(?:CLIENT_ID|CLIENT_SECRET|API_NAME)_([0-9]{1,3})")
PLAIN = re.compile(r"[!-~]{1,255}")
APP_FIELDS = ("API_NAME", "CLIENT_ID", "CLIENT_SECRET")


def parse_env(text: str, source: str) -> tuple[dict[str, str], list[str]]:
    """The settings of an env file's text, and a problem for each line that is not KEY=value."""
    settings, problems = {}, []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = ENV_LINE.fullmatch(line)
        if match and line.replace("\t", " ").isprintable():
            settings[match[1]] = match[2] or match[3] or (match[4] or "").strip()
        else:
            problems.append(f"{source}, line {number}: expected KEY=value")
    return settings, problems


def read_env_file(path: Path) -> tuple[dict[str, str], list[str]]:
    """Parse an env file; one that others may read is refused (it holds the PIN)."""
    try:
        with path.open("rb") as file:
            if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
                raise TokenError(
                    f"{path} may be read by other users. Run: chmod 600 {shlex.quote(str(path))}\n"
                    "Where chmod has no effect (a Windows drive under WSL), keep the file elsewhere and "
                    "name it with --env-file, or use real environment variables.", USAGE)
            data = file.read(BODY_LIMIT)
        return parse_env(data.decode(), str(path))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TokenError(f"{path}, line {line}: not UTF-8 text", USAGE) from None
    except OSError as error:
        raise TokenError(f"The env file {path} cannot be read: {error.strerror}.", USAGE) from None


def places_of(name: str) -> list[Path]:
    """Where a file of that name is looked for: the current folder, then beside the script."""
    try:
        here = Path.cwd()
    except OSError:  # it was deleted
        here = Path(__file__).absolute().parent
    return list(dict.fromkeys([here / name, Path(__file__).absolute().parent / name]))


def web_address(value: str) -> urllib.parse.SplitResult | None:
    """The parts of an http or https URL, None when it is none."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(value)
        if re.fullmatch(r"https?://[!-~]+", value) and parts.hostname and parts.port != 0:
            return parts
    return None


def on_this_machine(host: str) -> bool:
    """Whether a host is exactly 127.0.0.0/8, localhost or [::1]; x.localhost is not."""
    octet = "(25[0-5]|2[0-4][0-9]|1?[0-9]?[0-9])"
    return bool(re.fullmatch(rf"127(\.{octet}){{3}}|::1|localhost", host))


def is_local(url: str) -> bool:
    """Whether an address is on this machine."""
    parts = web_address(url)
    return parts is not None and on_this_machine(parts.hostname)


def is_brokers(url: str) -> bool:
    """Whether an address is the broker's own: https on upstox.com or a name under it."""
    parts = web_address(url)
    return (parts is not None and parts.scheme == "https"
            and bool(re.fullmatch(r"([a-z0-9-]+\.)*upstox\.com", parts.hostname)))


def is_redirect(value: str) -> bool:
    """An URL that a browser leaves as it is: it is by its spelling that the code is kept in the browser."""
    parts = web_address(value)
    host = parts and parts.hostname or ""
    if not host or "#" in value or re.search(":.*[.]", host) or re.search(
            r"/(\.|%2e){1,2}(/|$)|\\", parts.path, re.I):
        return False
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.suppress(OSError):  # it is a name
        return socket.inet_ntop(family, socket.inet_pton(family, host)) == host
    return bool(re.fullmatch(r"([a-z0-9_-]+\.)*(?!([0-9]+|0x[0-9a-f]*)$)[a-z0-9_-]+", host))


def is_base_url(value: str) -> bool:
    """Tokens and client secrets are sent there: the broker or this machine, no path."""
    return bool(re.fullmatch("https?://[^/?#@]+/*", value)) and (is_brokers(value) or is_local(value))


def are_origins(value: str) -> bool:
    """Comma separated scheme://host[:port]."""
    return all(re.fullmatch(r"https?://[^/?#@*\s]+/?", part.strip()) and web_address(part.strip())
               for part in value.split(",") if part.strip())


def is_notifier(value: str) -> bool:
    """An URL with a path that is not one of our own."""
    parts = web_address(value)
    return parts is not None and not re.fullmatch("/?|/healthz|/auth/upstox/tokens/.*", parts.path)


def is_totp_secret(value: str) -> bool:
    """base32 of 112 bits or more, which pyotp demands."""
    with contextlib.suppress(ValueError):
        return len(base64.b32decode(value + "=" * (-len(value) % 8))) >= 14
    return False


REDIRECT_RULE = "must be the http or https URL registered with the apps, spelled as a browser shows it"
RULES: dict[str, tuple[Callable[[str], object], str]] = {
    "UPSTOX_MOBILE_NUMBER": (re.compile(r"[6-9][0-9]{9}").fullmatch,
                             "must be 10 digits beginning 6-9, without +91"),
    "UPSTOX_PIN": (re.compile(r"[0-9]{6}").fullmatch, "must be 6 digits"),
    "UPSTOX_TOTP": (is_totp_secret, "must be the base32 secret shown when TOTP was switched on, not a code; "
                                    "at least 112 bits (23 characters)"),
    "UPSTOX_REDIRECT_URI": (is_redirect, REDIRECT_RULE),
    "UPSTOX_NOTIFIER_WEBHOOK_URI": (is_notifier, "must be the http or https URL registered with the apps and "
                                                 "have a path of its own"),
    "UPSTOX_BASE_URL": (is_base_url, "must be https on upstox.com or a name under it, or http(s) on this "
                                     "machine, without a path: tokens and client secrets are sent there"),
    "UPSTOX_CONFIG_SOURCE": (("ENV", "DB").__contains__, "must be ENV or DB"),
    "UPSTOX_SERVE_KEY": (re.compile(r"[!-~]{16,255}").fullmatch,
                         "must have 16 characters or more, without spaces"),
    "UPSTOX_ALLOWED_ORIGINS": (are_origins, "must be origins such as http://localhost:5173, comma separated"),
}
NEEDED = {  # what each use of the configuration needs besides the apps
    "status": (), "menu": ("UPSTOX_REDIRECT_URI",),
    "SELENIUM": ("UPSTOX_REDIRECT_URI", "UPSTOX_MOBILE_NUMBER", "UPSTOX_PIN", "UPSTOX_TOTP"),
    "V3": ("UPSTOX_REDIRECT_URI", "UPSTOX_NOTIFIER_WEBHOOK_URI")}


def env_apps(settings: Mapping[str, str]) -> list[App]:
    """Every app that the settings number, in order; what is missing is an empty text."""
    numbers = sorted({int(match[1]) for match in map(APP_KEY.fullmatch, settings) if match})
    return [App(number, *(settings.get(f"UPSTOX_{field}_{number}", "") for field in APP_FIELDS), "")
            for number in numbers]


def check_numbers(numbers: Sequence[int], label: str) -> list[str]:
    """The problems of the apps' numbers (the guide 3.2): one to six, contiguous from 0."""
    inside = set(numbers) & set(range(6))
    strange = sorted(set(numbers) - inside, key=str)
    return [*(f"{label.format('CLIENT_ID', number)}: at most six apps, numbered 0 to 5"
              for number in strange),
            *(f"{label.format('CLIENT_ID', gap)}: is not set; apps are numbered from 0 without a gap"
              for gap in range(max(inside, default=0)) if gap not in inside)]


def check_apps(apps: Sequence[App], label: str) -> list[str]:
    """The problems of the apps of either source (the guide 3.2); `label` takes a field and a number."""
    problems: list[str] = []
    used: set[str] = set()
    for app in apps:
        for field, value in zip(APP_FIELDS, (app.name, app.client_id, app.client_secret)):
            problem = ""
            if not value:
                problem = "is not set"
            elif field == "API_NAME" and value not in API_NAMES:
                problem = "must be one of " + ", ".join(API_NAMES)
            elif not PLAIN.fullmatch(value):
                problem = "must be printable characters without spaces, at most 255"
            elif field != "CLIENT_SECRET" and value in used:
                problem = "is used by two apps"
            if problem:
                problems.append(f"{label.format(field, app.index)}: {problem}")
        used |= {app.name, app.client_id}
        if app.redirect_uri and not is_redirect(app.redirect_uri):
            problems.append(f"{label.format('REDIRECT_URI', app.index)}: {REDIRECT_RULE}")
    return problems


def check_settings(settings: Mapping[str, str], apps: Sequence[App], use: str) -> list[str]:
    """What is missing for a use of the configuration, and what does not fit its rule."""
    own_redirects = apps and all(app.redirect_uri for app in apps)
    needed = [key for key in NEEDED[use] if key != "UPSTOX_REDIRECT_URI" or not own_redirects]
    reason = f"; flow {use} needs it" if use in FLOWS else ""
    problems = [f"{key}: is not set{reason}" for key in needed if key not in settings]
    problems += [f"{key}: {text}" for key, (fits, text) in RULES.items()
                 if key in settings and not fits(settings[key])]
    packages = ("selenium", "pyotp") if use == "SELENIUM" else ()
    if missing := [name for name in packages if not importlib.util.find_spec(name)]:
        problems.append(f"{' and '.join(missing)} missing. Run: {shlex.quote(sys.executable)} -m pip install "
                        + " ".join(missing))
    return problems


def read_settings(ctx: Context) -> tuple[dict[str, str], list[str]]:
    """The UPSTOX_ settings, the environment's over the env file's, and the problems of the file."""
    places = places_of(".env")
    file = ctx.args.env_file or next(filter(os.path.isfile, places), None)  # .env may be a venv's folder
    from_file, problems = read_env_file(file) if file else ({}, [])
    merged = {**from_file, **ctx.environ}.items()
    settings = {key: value.strip() for key, value in merged if key.startswith("UPSTOX_") and value.strip()}
    if not settings and not problems:
        files = " and ".join(map(str, [file] if file else places))
        problems = [f"No UPSTOX_ setting was found, neither in the environment nor in {files}. "
                    "Copy env.sample to .env and fill it in; it explains the keys."]
    if totp := re.sub(r"[\s=]", "", settings.get("UPSTOX_TOTP", "")).upper():
        settings["UPSTOX_TOTP"] = totp
    return settings, problems


def load_config(ctx: Context, use: str) -> Config:
    """Read and check the configuration for a use (a key of NEEDED); all problems as one TokenError."""
    settings, problems = read_settings(ctx)
    if settings.get("UPSTOX_CONFIG_SOURCE") == "DB" and not ctx.args.import_config:
        apps, numbers = stored_apps(ctx.path)
        label = "upstox_api_configs, api_index {1}, {0}"
        no_app = "upstox_api_configs: no row is enabled. Fill the table with --import-config."
    else:
        apps = env_apps(settings)
        numbers, label = [app.index for app in apps], "UPSTOX_{0}_{1}"
        no_app = "UPSTOX_CLIENT_ID_0: is not set; at least one app is needed"
    problems += check_settings(settings, apps, use)
    problems += check_numbers(numbers, label) + check_apps(apps, label) if apps else [no_app]
    if problems:
        raise TokenError("\n".join(problems), USAGE)
    get = settings.get
    redirect = get("UPSTOX_REDIRECT_URI", "")
    origins = tuple(filter(None, map(str.strip, get("UPSTOX_ALLOWED_ORIGINS", "").split(","))))
    return Config(tuple(app._replace(redirect_uri=app.redirect_uri or redirect) for app in apps),
                  get("UPSTOX_BASE_URL", BASE_URL).rstrip("/"), get("UPSTOX_MOBILE_NUMBER", ""),
                  get("UPSTOX_PIN", ""), get("UPSTOX_TOTP", ""), get("UPSTOX_NOTIFIER_WEBHOOK_URI", ""),
                  get("UPSTOX_SERVE_KEY", ""), origins)


# ---- Time: when a token dies ---------------------------------------------------------------------

def cutoff_after(moment: float) -> float:
    """The first 03:30 Indian time strictly after `moment` (epoch seconds): the broker's rule."""
    local = datetime.fromtimestamp(moment, IST)
    cutoff = local.replace(hour=3, minute=30, second=0, microsecond=0)
    return (cutoff if local < cutoff else cutoff + timedelta(days=1)).timestamp()


def local_text(moment: float) -> str:
    """`yyyy-MM-dd HH:mm:ss` in the machine's zone: the only form the Java reader parses."""
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M:%S")


def text_of(value: object) -> str:
    """A column's value as text; a BLOB is decoded, NULL is empty."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else str(value)


def parse_time(value: object) -> float | None:
    """Epoch seconds of a date text (local time unless it names an offset), None when it is none."""
    text = text_of(value).strip()
    if not re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        return None
    text = re.sub(r"\.([0-9]+)", lambda m: "." + m[1][:6].ljust(6, "0"), text.replace("Z", "+00:00"))
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def parse_created(value: object) -> float | None:
    """Epoch seconds of a created_at in any form that writers of SQLite leave (facts/measured.md 1)."""
    try:
        moment = float(value)
        if isinstance(value, float) and moment < 1e7:
            moment = (moment - 2440587.5) * 86400  # days of the Julian calendar
        elif moment >= 1e11:
            moment /= 1000
    except (ValueError, TypeError):
        moment = parse_time(value)
    return moment if moment is not None and 0 < moment < 1e10 else None  # beyond: no date that anyone meant


# ---- Database: the source of truth, shared with a Java back end ----------------------------------

DB_REMEDIES = (
    ("locked", "is locked by another program. Close what holds it, or try again in a minute."),
    ("not a database", "is not a SQLite database. Name the right file with --db."),
    ("malformed", "is damaged. Restore it from a backup, or rescue it with sqlite3's .recover."),
    ("readonly", "cannot be written. Give this user write permission on the file and on its folder."),
    ("unable to open", "cannot be opened. Check that its folder exists and that this user may write there."),
    ("is full", "cannot grow: the disk is full. Free some space."),
    (" a view", "has a view where a table is needed. Rename the view or use another file."),
    ("no (column named|such column)", "lacks a column that is needed. Add it, or use another file."),
    ("NOT NULL", "demands a value that this program does not give. Give that column a default."),
    ("UNIQUE", "has a row in the way of a unique index. Remove that row."),
)


class Token(NamedTuple):
    """A stored row, as far as this program reads it; times are epoch seconds, None when unreadable."""

    api_name: str
    access_token: str
    client_id: str
    created: float | None = None
    valid_until: float | None = None
    validity_at: str | None = None
    generated_at: str | None = None
    is_active: bool = True

    def __repr__(self) -> str:
        return f"Token({self.api_name})"


def database_error(path: Path, error: Exception) -> DatabaseError:
    """One sentence with the path, the remedy, and what SQLite said."""
    remedy = next((words for key, words in DB_REMEDIES if re.search(key, str(error))), "cannot be used.")
    return DatabaseError(f"The database {path} {remedy} (SQLite: {printable(error, 200)})")


def connect(path: Path, mode: str, seconds: float) -> sqlite3.Connection:
    """Open an existing database; `mode` is ro or rw, `seconds` the patience with locks."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=seconds, isolation_level=None)
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    return connection


@contextlib.contextmanager
def transaction(path: Path, seconds: float | None = None) -> Iterator[sqlite3.Connection]:
    """BEGIN IMMEDIATE; commits, or rolls back on any exception. Keep it to milliseconds: others wait."""
    try:
        with contextlib.closing(connect(path, "rw", seconds or READ_SECONDS)) as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
    except sqlite3.Error as error:
        raise database_error(path, error) from None


def select(path: Path, query: str, values: Sequence[Any] = (), mode: str = "ro") -> list[tuple]:
    """Rows of a query, changing none; nothing when the file or the table is missing, or when an older audit
    table lacks a column of the program's memory."""
    try:
        if not path.exists():
            return []
        with contextlib.closing(connect(path, mode, READ_SECONDS)) as connection:
            return connection.execute(query, values).fetchall()
    except sqlite3.Error as error:
        if re.search(f"no such (table|column: ({'|'.join(AUDIT_MEMORY)}))", str(error)):
            return []
        # what a killed writer left must be rolled back before anyone can read: that takes rw
        if mode == "ro" and re.search("readonly|unable to open", str(error)):
            return select(path, query, values, "rw")
        raise database_error(path, error) from None


def find_database(db: str | os.PathLike | None) -> Path:
    """--db, else an existing vega_trade.db here or beside the script, else one to be created here."""
    places, problem = [Path(db)] if db else places_of(DATABASE_NAME), ""
    path = places[0]
    try:
        path = next((place for place in places if place.exists()), path)
        if path.exists() and not path.is_file():
            problem = "it is not a file"
        elif not path.resolve().parent.is_dir():
            problem = "its folder does not exist"
    except (OSError, RuntimeError) as error:  # Python below 3.13 gives the latter for a link to itself
        problem = getattr(error, "strerror", "it is a link to itself")
    if problem:
        raise DatabaseError(f"The database {path} cannot be used: {problem}. Name a file with --db.")
    return path


def create_database(ctx: Context) -> None:
    """Make the file (mode 0600, told in a line) and the guide's table where they are missing."""
    path = ctx.path
    try:
        if not path.exists():
            path.touch(0o600)
            ctx.inform(f"created the database {path.resolve()}")
    except OSError as error:
        raise DatabaseError(f"The database {path} cannot be created: {error.strerror}. With --db name a "
                            "file in a folder that exists and that this user may write.") from None
    with transaction(path, PROOF_SECONDS) as connection:
        connection.execute(TOKENS_DDL)


def read_tokens(path: Path) -> dict[str, Token]:
    """The newest row of each api_name, in any form that other programs leave."""
    rows = select(path, "SELECT api_name, access_token, client_id, created_at, validity_at, generated_at, "
                        "is_active FROM upstox_tokens ORDER BY id")
    tokens = []
    for name, token, client_id, created, validity, generated, active in rows:
        shown = [None if value is None else printable(text_of(value), 40) for value in (validity, generated)]
        is_active = text_of(active).strip().lower() not in ("0", "0.0", "false")
        tokens.append(Token(text_of(name), text_of(token), text_of(client_id), parse_created(created),
                            parse_time(validity), *shown, is_active))
    tokens.sort(key=lambda token: token.created or 0)  # of two just as old the later id stays last
    return {token.api_name: token for token in tokens}


def token_row(app: App, access_token: str, now: float, valid_until: float) -> dict[str, Any]:
    """The columns of the guide's INSERT (4.1); a plain Java reader parses exactly these forms."""
    moment = int(now * 1000)
    return {"access_token": access_token, "api_name": app.name, "client_id": app.client_id,
            "client_secret": app.client_secret, "created_at": moment, "expires_in": int(valid_until - now),
            "is_primary": int(app.name == "PRIMARY"), "redirect_uri": app.redirect_uri,
            "token_type": "Bearer", "api_index": app.index, "generated_at": local_text(now),
            "is_active": 1, "updated_at": moment, "validity_at": local_text(valid_until)}


def insert(connection: sqlite3.Connection, table: str, row: Mapping[str, Any]) -> None:
    """INSERT of the row's columns."""
    connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES (:{', :'.join(row)})", row)


def upsert_token(connection: sqlite3.Connection, row: Mapping[str, Any]) -> None:
    """Replace the row of one api_name: DELETE, then INSERT (the guide 4.1)."""
    connection.execute("DELETE FROM upstox_tokens WHERE api_name = :api_name", row)
    insert(connection, "upstox_tokens", row)


def prove_writable(path: Path, apps: Iterable[App], now: float) -> None:
    """The real DELETE and INSERT for each app, and an event, rolled back: no login for a database that refuses
    a token, or what must be noted first."""
    event = {"at": int(now * 1000), "run_id": secrets.token_hex(8), "api_name": "PRIMARY", "source": "CLI",
             "flow": "SELENIUM", "outcome": "FAILED"}
    with transaction(path, PROOF_SECONDS) as connection:
        for app in apps:
            upsert_token(connection, token_row(app, app.name.ljust(2000, "x"), now, now + 1))
        add_event(connection, event)
        connection.rollback()


def deactivate_tokens(path: Path, tokens: Iterable[Token], now: float) -> None:
    """Mark tokens that the broker answered 401 for; a row replaced meanwhile is left alone."""
    with transaction(path, PROOF_SECONDS) as connection:
        connection.executemany("UPDATE upstox_tokens SET is_active = 0, updated_at = ? "
                               "WHERE api_name = ? AND access_token = ?",
                               [(int(now * 1000), token.api_name, token.access_token) for token in tokens])


def add_event(connection: sqlite3.Connection, event: Mapping[str, Any]) -> None:
    """One row of the audit table, which is made, or given its younger columns, when first needed."""
    connection.execute(AUDIT_DDL)
    columns = {row[1] for row in connection.execute("PRAGMA table_info(upstox_token_audit)")}
    for name in AUDIT_MEMORY.keys() - columns:
        connection.execute(f"ALTER TABLE upstox_token_audit ADD COLUMN {name} {AUDIT_MEMORY[name]}")
    insert(connection, "upstox_token_audit", event)


def read_events(path: Path, columns: str, where: str, *values: Any) -> list[tuple]:
    """Rows of the audit table in their order."""
    return select(path, f"SELECT {columns} FROM upstox_token_audit WHERE {where} ORDER BY id", values)


def last_attempts(path: Path) -> dict[str, dict[str, Any]]:
    """How the newest run for each app ended, whoever ran it: a cron run of the night, too."""
    newest = ("id IN (SELECT max(id) FROM upstox_token_audit WHERE outcome IN ('GENERATED', 'FAILED') "
              "GROUP BY api_name)")
    return {name: {"at": local_text(at / 1000), "source": source, "outcome": outcome, "reason": reason}
            for name, at, source, outcome, reason
            in read_events(path, "api_name, at, source, outcome, reason", newest)}


def amend_request(path: Path, run_id: str, name: str, deadline: int) -> None:
    """Note until when (epoch ms) an app's approval may come; 0 when the broker refused the request."""
    with transaction(path) as connection:
        connection.execute("UPDATE upstox_token_audit SET number = ? WHERE run_id = ? AND api_name = ? "
                           "AND outcome = 'REQUESTED'", (deadline, run_id, name))


def why_unexpected(connection: sqlite3.Connection, name: str, token: str, now: float) -> str:
    """Why a delivery for this app is not expected; empty while a request of ours is outstanding."""
    if connection.execute("SELECT 1 FROM upstox_tokens WHERE api_name = ? AND access_token = ?",
                          (name, token)).fetchone():
        return "it is stored already"
    newest = ("SELECT coalesce(max(id), 0) FROM upstox_token_audit WHERE api_name = :name AND flow = 'V3' "
              "AND outcome = 'GENERATED'")
    [deadline] = connection.execute(
        "SELECT max(number) FROM upstox_token_audit WHERE api_name = :name AND flow = 'V3' AND "
        f"outcome = 'REQUESTED' AND id > ({newest})", {"name": name}).fetchone()
    if not deadline:
        return "nothing was asked for"
    return "" if now * 1000 < deadline else "the time to approve it is over"


def import_apps(path: Path, apps: Iterable[App], now: float) -> None:
    """Copy the app configuration into upstox_api_configs; rows in the way are replaced, others kept."""
    moment = int(now * 1000)
    with transaction(path, PROOF_SECONDS) as connection:
        connection.execute(CONFIGS_DDL)
        for app in apps:
            row = {"api_index": app.index, "api_name": app.name, "client_id": app.client_id,
                   "client_secret": app.client_secret, "redirect_uri": app.redirect_uri,
                   "is_primary": int(app.name == "PRIMARY"), "is_enabled": 1,
                   "created_at": moment, "updated_at": moment}
            connection.execute("DELETE FROM upstox_api_configs WHERE api_index = :api_index "
                               "OR api_name = :api_name", row)
            insert(connection, "upstox_api_configs", row)


def stored_apps(path: Path) -> tuple[list[App], list[int]]:
    """The enabled apps of upstox_api_configs; the numbers taken, from 0 to 5 also by apps that are off."""
    rows = select(path, "SELECT lower(is_enabled) IN ('1', 'true') AS counts, api_index, api_name, "
                        "client_id, client_secret, redirect_uri FROM upstox_api_configs "
                        "WHERE counts OR api_index BETWEEN 0 AND 5 ORDER BY api_index")
    apps = [App(index, *map(text_of, fields)) for counts, index, *fields in rows if counts]
    return apps, [index for _, index, *_ in rows]


# ---- The broker's HTTP API -----------------------------------------------------------------------

def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body, {} when it is anything else."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


class Answer(NamedTuple):
    """An HTTP answer, or in `error` why there is none: timeout, no connection, unexpected answer."""

    code: int = 0
    body: bytes = b""
    date: str = ""
    error: str = ""

    def json(self) -> dict[str, Any]:
        return json_object(self.body)

    def data(self) -> dict[str, Any]:
        """What the broker's envelope holds, {} when that is no object."""
        data = self.json().get("data")
        return data if isinstance(data, dict) else {}


NO_ANSWER = Answer(error="timeout")


def error_code(answer: Answer) -> tuple[str, str]:
    """(code, message) of the broker's error envelope; it sends two spellings of the key."""
    errors = answer.json().get("errors")
    first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
    code = first.get("errorCode") or first.get("error_code") or ""
    return printable(code, 40), printable(first.get("message") or "", 200)


def explain(answer: Answer) -> str:
    """What a failed call means and what to do next, as two sentences."""
    code, message = error_code(answer)
    if code in BROKER_ERRORS:
        meaning, remedy = BROKER_ERRORS[code]
        return f"{meaning} ({code}). {remedy}"
    if code:
        return f"the broker refused with {code}: {message.rstrip('.')}. Its documentation explains the code."
    if answer.code == 429:
        return "the broker counts too many requests (HTTP 429). Wait a few minutes, then run again."
    if answer.error == "no connection":
        return ("the broker cannot be reached (no connection). Check this machine's network, its proxy "
                "settings and UPSTOX_BASE_URL, then run again.")
    problem = answer.error or (f"HTTP {answer.code}" if answer.code != 200 else "unexpected answer")
    return f"the broker gave no usable answer ({problem}). Look at status.upstox.com, then run again."


@functools.cache
def opener_for(base_url: str) -> urllib.request.OpenerDirector:
    """A bare opener: no redirects (they would carry the bearer token), no files, every status returned."""
    opener = urllib.request.OpenerDirector()
    opener.add_handler(urllib.request.HTTPHandler())
    if base_url.startswith("https:"):
        opener.add_handler(urllib.request.HTTPSHandler(context=ssl.create_default_context()))
    if is_brokers(base_url):  # on this machine no proxy: it could read the bearer token
        opener.add_handler(urllib.request.ProxyHandler())
    return opener


def read_answer(response: http.client.HTTPResponse, end: float) -> Answer:
    """The whole answer, unless it is longer than BODY_LIMIT, later than `end` (monotonic), or cut off."""
    body = b""
    while chunk := response.read1(65536):
        body += chunk
        if len(body) > BODY_LIMIT:
            return Answer(error="unexpected answer")
        if time.monotonic() > end:
            return NO_ANSWER
    if len(body) != int(response.headers.get("Content-Length") or len(body)):
        return Answer(error="unexpected answer")
    return Answer(response.status, body, response.headers.get("Date", ""))


def send(config: Config, path: str, seconds: float, data: bytes | None = None,
         headers: Mapping[str, str] = {}) -> Answer:
    """One request to UPSTOX_BASE_URL; GET, or POST when there is data. The deadline covers the body too."""
    end = time.monotonic() + seconds
    common = {"Accept": "application/json", "User-Agent": f"upstox_tokens/{__version__}"}
    request = urllib.request.Request(config.base_url + path, data, {**common, **headers})
    try:
        with opener_for(config.base_url).open(request, timeout=seconds) as response:
            return read_answer(response, end)
    except OSError as error:
        slow = isinstance(getattr(error, "reason", error), TimeoutError)  # a URLError wraps it
        return NO_ANSWER if slow else Answer(error="no connection")
    except (http.client.HTTPException, ValueError):
        return Answer(error="unexpected answer")


def ask_profiles(config: Config, tokens: Sequence[Token]) -> list[Answer]:
    """GET /v2/user/profile for each token, side by side: the only proof that a token is alive."""
    def ask(token: Token) -> Answer:
        return send(config, "/v2/user/profile", PROFILE_SECONDS,
                    headers={"Authorization": f"Bearer {token.access_token}"})
    return run_within(PROFILE_SECONDS, NO_ANSWER, ask, tokens)


def dialog_path(app: App, state: str) -> str:
    return "/v2/login/authorization/dialog?" + urllib.parse.urlencode(
        {"response_type": "code", "client_id": app.client_id, "redirect_uri": app.redirect_uri,
         "state": state})


def exchange_code(config: Config, app: App, code: str) -> Answer:
    """POST the authorization code; it is spent whatever the answer is (the broker's rule)."""
    form = {"code": code, "client_id": app.client_id, "client_secret": app.client_secret,
            "redirect_uri": app.redirect_uri, "grant_type": "authorization_code"}
    return send(config, "/v2/login/authorization/token", EXCHANGE_SECONDS,
                urllib.parse.urlencode(form).encode())


def request_approval(config: Config, app: App) -> Answer:
    """Flow V3: ask for a token that the user approves on the phone."""
    path = f"/v3/login/auth/token/request/{urllib.parse.quote(app.client_id, safe='')}"
    body = json.dumps({"client_secret": app.client_secret}).encode()
    return send(config, path, PROFILE_SECONDS, body, {"Content-Type": "application/json"})


def ask_dialogs(ctx: Context, config: Config, apps: Sequence[App]) -> list[tuple[Answer, float]]:
    """Ask for each app's dialog without following it (it costs no OTP); the answers, and when they came."""
    def ask(app: App) -> tuple[Answer, float]:
        return send(config, dialog_path(app, "preflight"), PROFILE_SECONDS), ctx.now()
    return run_within(PROFILE_SECONDS, (NO_ANSWER, ctx.now()), ask, apps)


def clock_offset(answers: Iterable[tuple[Answer, float]]) -> float | None:
    """Seconds that this machine's clock is ahead of the broker's Date header; None when it gave none."""
    offsets = []
    for answer, at in answers:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            offsets.append(at - parsedate_to_datetime(answer.date).timestamp())
    return min(offsets, key=abs, default=None)


def clock_problem(offset: float) -> str:
    """A sentence when this machine's clock is too far off for TOTP codes."""
    if abs(offset) <= CLOCK_SECONDS:
        return ""
    place = "ahead of" if offset > 0 else "behind"
    return (f"this machine's clock is {abs(offset):.0f} s {place} the broker's, so its TOTP codes would be "
            "refused. Set the clock (timedatectl set-ntp true), then run again.")


# ---- Status of a token: time, then the broker's profile answer -----------------------------------

PLAIN_TOKEN = re.compile(r"[!-~]{1,8000}")


class Status(NamedTuple):
    """What is known of one app's token. `word` is VALID, INVALID, EXPIRED, NOT FOUND or UNKNOWN."""

    word: str
    reason: str = ""
    token: Token | None = None

    @property
    def label(self) -> str:
        """The status as the summary shows it."""
        return f"{self.word} ({self.reason})" if self.reason else self.word


def is_time_valid(token: Token, now: float) -> bool:
    """Layer 1 of the guide's 5: before validity_at, which must be readable, and before the first 03:30 IST
    after created_at, if that is readable."""
    young = token.created is None or now < cutoff_after(token.created)
    return young and token.valid_until is not None and now < token.valid_until


def judge_stored(token: Token | None, client_id: str, now: float) -> tuple[str, str] | None:
    """(word, reason) from the row alone, None when only the broker can tell (contract 4, steps 1-3)."""
    if token is None or not token.access_token.strip():
        return "NOT FOUND", ""
    if not token.is_active:
        return "INVALID", "inactive"
    if token.client_id and token.client_id != client_id:
        return "INVALID", "client changed"
    if not PLAIN_TOKEN.fullmatch(token.access_token):
        return "INVALID", "malformed token"  # it could not even be sent in a header
    if not is_time_valid(token, now):
        return "EXPIRED", "validity unreadable" if token.valid_until is None else ""
    return None


def judge_profile(answer: Answer) -> tuple[str, str]:
    """(word, reason) from the broker's answer to the profile call (layer 2; contract 4, step 4)."""
    if answer.error:
        return "UNKNOWN", answer.error
    if answer.code == 401:
        return "INVALID", "401"
    if answer.code == 200 and answer.json().get("status") == "success":
        return "VALID", ""
    return "UNKNOWN", str(answer.code) if answer.code >= 400 else "unexpected answer"


def classify_tokens(config: Config, rows: Mapping[str, Token], now: float) -> dict[str, Status]:
    """The status of every configured app (the guide 6)."""
    verdicts = {app.name: judge_stored(rows.get(app.name), app.client_id, now) for app in config.apps}
    asked = [rows[name] for name, verdict in verdicts.items() if verdict is None]
    answers = ask_profiles(config, asked)
    verdicts |= {token.api_name: judge_profile(answer) for token, answer in zip(asked, answers)}
    return {name: Status(*verdict, rows.get(name)) for name, verdict in verdicts.items()}


def access_token(api_name: str, db: str | os.PathLike | None = None) -> str:
    """The stored access token of one app, for Python programs.

    Raises TokenError with the reason when there is none, it is inactive, or its time is over (layer 1 of the
    guide's section 5); the broker is not asked.
    """
    path, name = find_database(db), api_name.upper()
    token = read_tokens(path).get(name)
    if verdict := judge_stored(token, token.client_id if token else "", time.time()):
        raise TokenError(f"{name} is {Status(*verdict).label} in {path}. "
                         "Run upstox_tokens.py --mode INVALID_ONLY.")
    return token.access_token


# ---- One run at a time, and what protects the account --------------------------------------------

def lock_file(path: Path) -> Path:
    return Path(f"{path.resolve()}.upstox-lock")


def lock_database(path: Path) -> int:
    """Become the one generating run of this database; the open lock file. The lock ends with its process."""
    file, handle = lock_file(path), -1
    try:
        handle = os.open(file, os.O_CREAT | os.O_RDWR, 0o600)
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except OSError as error:
        if handle >= 0:
            os.close(handle)
        if handle >= 0 and isinstance(error, (BlockingIOError, PermissionError)):
            raise TokenError("Another run is busy generating tokens for this database. Try again when it has "
                             "ended.", BUSY) from None
        raise DatabaseError(f"The lock file {file} cannot be used: {error.strerror}. Give this user write "
                            "permission on it and on its folder, on a disk of this machine.") from None


def unlock_database(handle: int) -> None:
    """Give the lock back; the file stays, since removing it would race with the next run."""
    if os.name != "nt":  # a child just being forked may hold the file open
        import fcntl
        fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def credentials_of(config: Config) -> str:
    """Whose codes and PINs the audit rows count; the PIN cannot be found from it without the TOTP secret."""
    who = f"{config.mobile}:{config.pin}".encode()
    return hmac.new(config.totp.encode(), who, hashlib.sha256).hexdigest() if config.totp else ""


def current_hold(path: Path, config: Config, attended: bool = False,
                 unwritten: Iterable[Mapping[str, Any]] = ()) -> str:
    """Why no login may be tried without an operator's word, or an empty text (contract 7).

    The audit rows of these credentials tell, and nothing else. Only what follows clears a secret that was
    sent: the next step for a code, arrival for the PIN, or that its field never held the whole value
    (NOT_SENT). An operator's HOLD_LIFTED clears all; then the PIN has to prove itself again.
    """
    codes, pins, proven, hold = 0, 0, False, ""  # codes and PINs: sent and not taken
    events = read_events(path, "outcome, reason", "credentials = ?", credentials_of(config))
    for outcome, reason in [*events, *((event["outcome"], event["reason"]) for event in unwritten)]:
        if outcome == "HOLD_LIFTED":
            codes, pins, proven, hold = 0, 0, False, ""
        elif outcome == "HOLD":
            hold = text_of(reason) or "an earlier login was refused"
        elif outcome == "PIN_TAKEN":
            pins, proven = 0, True
        elif outcome == "CODE_TAKEN":
            codes = 0
        codes += {"CODE_SENT": 1, "CODE_NOT_SENT": -1}.get(outcome, 0)
        pins += {"PIN_SENT": 1, "PIN_NOT_SENT": -1}.get(outcome, 0)
    if not hold and codes >= 2:
        hold = "the broker did not take the last two TOTP codes that were sent"
    # five wrong PINs lock the account, and nobody knows how the broker words one: so each counts that did not
    # lead to a login, whatever was answered. One that was accepted before has one more try, or a lost session
    # would cost the morning; an operator who is there is asked at once
    if not hold and pins >= (2 if proven and not attended else 1):
        hold = "the last PIN that was sent did not lead to a login"
    return hold


def totp_wait(now: float, sent: Iterable[int]) -> float:
    """Seconds until a code may be sent that was never sent (`sent`: windows) and has time left."""
    window = int((now + TOTP_MARGIN) // TOTP_WINDOW)  # a margin from now it must not have ended
    while window in sent:  # the later ones were noted by a clock that has been set back since
        window += 1
    return max(0.0, window * TOTP_WINDOW - now)


# ---- The browser: a Chromium of our own, what it sees and types; no decision ---------------------

# one look: the address, the visible fields and buttons of the steps, what else is there, the text. The page
# is asked to count how often a field was submitted (a script's submit() only navigates), or disabled as one is
# that a script sends; when it has settled: a chain of timers, a busy page's turns between; and whether a request
# of its scripts has ended that began after the look before the field's last change
LOOK = """
const [ids, captcha, pause] = arguments, root = document.documentElement, key = Symbol.for('upstox_tokens');
const visible = e => e && e.getClientRects().length && getComputedStyle(e).visibility !== 'hidden';
if (!root[key]) {  // a page may write itself anew, which ends the listening, too
  const all = root[key] = Object.fromEntries(ids.map(id => [id, {submits: 0}]));
  const count = elements => { for (const {id} of elements) if (ids.includes(id)) all[id].submits += 1; };
  addEventListener('submit', ({target}) => count(target.elements), true);
  window.navigation?.addEventListener('navigate', e => e.formData && count(document.querySelectorAll('input')));
  new MutationObserver(seen => count(seen.map(({target}) => target).filter(e => e.disabled || e.readOnly)))
    .observe(root, {subtree: true, attributeFilter: ['disabled', 'readonly']});
  new PerformanceObserver(seen => seen.getEntries().forEach(({initiatorType, startTime}) => {
    if (/fetch|xml/.test(initiatorType)) all.began = Math.max(all.began || 0, startTime);
  })).observe({type: 'resource', buffered: true});
}
const settle = (kept, turns) => {
  kept.settled = !turns;
  if (turns) kept.timer = setTimeout(settle, pause / 5, kept, turns - 1);
};
const items = {};
for (const id of ids) {
  const e = document.getElementById(id), kept = root[key][id];
  if (!visible(e)) continue;
  const value = (e.value || '').replace(/[^0-9]/g, '');
  if (kept.digits !== value.length) {
    clearTimeout(kept.timer);
    Object.assign(kept, {digits: value.length, since: kept.seen});
    settle(kept, 5);
  }
  kept.seen = performance.now();
  const requested = root[key].began > (kept.since ?? 0);
  items[id] = {...kept, requested, element: e, enabled: !e.matches(':disabled') && !e.readOnly, value};
}
const name = e => e.id || `${e.tagName.toLowerCase()} '${(e.innerText || e.name || '').trim().slice(0, 30)}'`;
const shown = [...document.querySelectorAll('input, select, textarea, button')].filter(visible);
const gone = e => e && (getComputedStyle(e).display === 'none' || gone(e.parentElement));
const solved = document.querySelector('[name="cf-turnstile-response"]')?.value;
return {items, broken: !location.protocol.startsWith('http'),
  captcha: !solved && [...document.querySelectorAll(captcha)].some(  // hidden, only if there is no step
    e => !Object.keys(items).length || !gone(e.type === 'hidden' ? e.parentElement : e)),
  shown: shown.slice(0, 12).map(name), text: (document.body ? document.body.innerText : '').slice(0, 20000)};
"""
# compare and click in one script, so that neither re-rendering nor a submit comes between; a button that
# something covers (a spinner) has to wait, as it would for a person
PRESS = """
const [field, e, digits, submits] = arguments, held = field.value.replace(/[^0-9]/g, '').length;
const submitted = document.documentElement[Symbol.for('upstox_tokens')]?.[field.id]?.submits !== submits;
const off = field.matches(':disabled, :read-only') || e.matches(':disabled') || !e.getClientRects().length;
if (submitted || held !== digits || off) return false;
e.scrollIntoView({block: 'center'});
const {x, y, width, height} = e.getBoundingClientRect();
if (!e.contains(document.elementFromPoint(x + width / 2, y + height / 2))) return false;
e.click();
return true;
"""
# for the picture of --debug-dir; nothing secret is handed to the page, so every digit goes
BLANK = """
for (const e of document.querySelectorAll('input, textarea')) {
  e.value = '';
  e.style.setProperty('-webkit-text-security', 'disc');  // should the page paint it again
}
const walk = document.createTreeWalker(document.documentElement, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const node = walk.currentNode;
  if (!node.parentNode.matches('style, script')) node.data = node.data.replace(/\\p{N}/gu, '*');
}
"""
# a small process that holds the driver in a process group of its own, and ends it with all its browsers when
# our end of the pipe closes: at the end of a run, and just as well when this program was killed
KEEPER = """
import contextlib, os, shutil, signal, subprocess, sys, time
os.mkdir(sys.argv[1], 0o700)
driver = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, start_new_session=True)
os.close(1)  # it is the driver's alone, so that its end is seen
sys.stdin.buffer.read()
with contextlib.suppress(OSError):
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(driver.pid)], capture_output=True)
    else:
        os.killpg(driver.pid, signal.SIGKILL)
driver.wait()
for _ in range(50):
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    if not os.path.exists(sys.argv[1]):
        break
    time.sleep(0.1)
"""
INSTALL_BROWSER = "Install Chromium and its driver (apt install chromium chromium-driver), then run --check."


class View(NamedTuple):
    """One look at the page: address, visible fields and buttons of the steps, names of all, text."""

    url: str = ""
    items: Mapping[str, Mapping[str, Any]] = {}
    captcha: bool = False
    shown: Sequence[str] = ()
    text: str = ""
    broken: bool = False  # Chromium shows an error page of its own

    @property
    def step(self) -> str:
        """The last step shown, or an empty text; without its button it is none, for nobody could go on."""
        step = next((step for step in STEPS if self.field(step)), "")
        return step if step and STEPS[step][1] in self.items else ""

    @property
    def blank(self) -> bool:
        return not (self.text.strip() or self.shown)

    @property
    def host(self) -> str:
        """The page's host, as a message names it."""
        return printable(urllib.parse.urlsplit(self.url).netloc.rpartition("@")[2], 100)

    def field(self, step: str) -> Mapping[str, Any]:
        """What was seen of a step's field, {} when it is not there."""
        return self.items.get(STEPS[step][0], {})


def same_place(url: str, other: str) -> bool:
    """Whether two URLs agree in scheme, host, port and path."""
    def place(text: str) -> tuple:
        parts = urllib.parse.urlsplit(text)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        return parts.scheme, parts.hostname, port, urllib.parse.unquote(parts.path) or "/"
    with contextlib.suppress(ValueError):
        return place(url) == place(other)
    return False


def resolver_rules(redirect_uris: Iterable[str]) -> str:
    """Make the redirect's host unknown to the browser: the code stays in its address bar, unsent."""
    rules = set()
    for parts in map(urllib.parse.urlsplit, redirect_uris):
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        ports = [parts.port] if parts.port else [80, 443]  # an http address may be tried as https first
        rules |= {f"MAP {host}:{port} ~NOTFOUND" for port in ports}
    return ",".join(sorted(rules))


@contextlib.contextmanager
def browser_faults() -> Iterator[Any]:
    """Around calls of Selenium: an element gone or taking no keys ends the block, all else is a PageFault.

    It gives Selenium's exceptions. Their texts may quote what was typed, so they go no further.
    """
    from selenium.common import exceptions as problems
    from selenium.webdriver.remote.remote_connection import urllib3
    try:
        yield problems
    except (problems.InvalidElementStateException, problems.StaleElementReferenceException):
        pass
    except problems.WebDriverException as error:
        reason = re.search(r"net::\w+|timeout|crashed|disconnected", str(error.msg))
        raise PageFault(reason[0] if reason else type(error).__name__) from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise PageFault(type(error).__name__) from None


def find_driver(environ: Mapping[str, str]) -> tuple[str, str]:
    """Paths of driver and browser: the chromedriver on PATH, else what Selenium Manager finds or fetches."""
    if path := shutil.which("chromedriver", path=environ.get("PATH")):
        return path, ""
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver import ChromeOptions, ChromeService
    from selenium.webdriver.common.driver_finder import DriverFinder
    kept = {key: os.environ.pop(key) for key in list(os.environ) if key.startswith("UPSTOX_")}
    os.environ["SE_AVOID_STATS"] = "true"
    try:
        finder = DriverFinder(ChromeService(), ChromeOptions())
        return finder.get_driver_path(), finder.get_browser_path()
    except WebDriverException:
        raise LoginFailed(f"there is no chromedriver, and none could be fetched. {INSTALL_BROWSER}",
                          THIS_RUN) from None
    finally:
        os.environ.update(kept)  # its helper program was not to see our secrets


def silence_selenium() -> None:
    """Its debug log, and that of urllib3, would quote every key typed."""
    import logging
    os.environ.pop("SE_DEBUG", None)
    for name in ("selenium", "selenium.webdriver.remote.remote_connection", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)


def driver_address(output: Any) -> str:
    """The address that a starting chromedriver announces, empty when it ends instead."""
    for line in output:
        if match := re.search(rb"started successfully on port (\d+)", line):
            return f"http://127.0.0.1:{int(match[1])}"
    return ""


class Browser:
    """One Chromium for a whole run, started when first needed and gone, profile and all, when closed."""

    clock = staticmethod(time.monotonic)  # what the page's patience is measured by
    rest = staticmethod(time.sleep)

    def __init__(self, redirect_uris: Iterable[str], headed: bool, environ: Mapping[str, str]) -> None:
        self.redirect_uris, self.headed, self.environ = tuple(redirect_uris), headed, environ
        self.keeper: subprocess.Popen | None = None
        self.driver: Any = None

    def start(self) -> None:
        """Start driver and browser, or LoginFailed with what is missing."""
        silence_selenium()
        driver_path, browser_path = find_driver(self.environ)
        try:
            profile = self.spawn(driver_path)
        except OSError as error:
            raise LoginFailed(f"the browser could not be started ({error.strerror}). {INSTALL_BROWSER}",
                              THIS_RUN) from None
        from selenium import webdriver  # while the driver starts
        from selenium.webdriver.common.proxy import Proxy, ProxyType
        from selenium.webdriver.remote.client_config import ClientConfig
        [address] = run_within(DRIVER_SECONDS, "", driver_address, [self.keeper.stdout])
        if not address:  # its random port may be taken on one of its two addresses
            raise PageFault("chromedriver did not start")
        # straight to the driver: a proxy would read every key typed
        config = ClientConfig(address, timeout=DRIVER_SECONDS, proxy=Proxy({"proxyType": ProxyType.DIRECT}))
        with browser_faults() as problems:
            try:
                self.driver = webdriver.Remote(address, options=self.options(profile, browser_path),
                                               client_config=config)
            except problems.WebDriverException as error:
                said = printable(str(error.msg).partition("\n")[0], 200)
                raise LoginFailed(f"the browser did not start ({said}). {INSTALL_BROWSER}",
                                  THIS_RUN) from None
            self.driver.set_page_load_timeout(PAGE_SECONDS)

    def spawn(self, driver_path: str) -> str:
        """Start the keeper with a driver; the path of the profile folder, which it makes and deletes."""
        folder = tempfile.gettempdir()
        if os.name == "posix" and len(folder) > 50:
            folder = "/tmp"  # Chromium puts a socket there, whose path must stay short
        profile = os.path.join(folder, f"upstox_tokens-{secrets.token_hex(8)}")
        self.keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", KEEPER, profile, driver_path, "--port=0"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0), env=self.child_environ(profile))
        return profile

    def options(self, profile: str, browser_path: str) -> Any:
        """Chromium's switches. None hides that the browser is automated."""
        from selenium.webdriver import ChromeOptions
        options = ChromeOptions()
        options.page_load_strategy, options.binary_location = "eager", browser_path
        # with a profile folder of its own Chromium would begin with its start page, from the network
        options.add_experimental_option("prefs", {"session.restore_on_startup": 4,
                                                  "session.startup_urls": ["about:blank"]})
        switches = [f"--user-data-dir={profile}", "--window-size=1280,900", "--no-first-run",
                    "--disable-sync", "--disable-background-networking", "--disable-component-update",
                    "--disable-dev-shm-usage",
                    f"--host-resolver-rules={resolver_rules(self.redirect_uris)}"]
        if not self.headed:
            switches.append("--headless=new")
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            switches.append("--no-sandbox")  # Chromium's sandbox does not run as root
        for switch in switches:
            options.add_argument(switch)
        return options

    def child_environ(self, profile: str) -> dict[str, str]:
        """The environment of driver and browser: no secret of ours, no proxy for the redirect's host."""
        environ = {key: value for key, value in self.environ.items()
                   if not key.startswith(("UPSTOX_", "SE_"))}
        hosts = [urllib.parse.urlsplit(uri).hostname for uri in self.redirect_uris]
        for key in ("no_proxy", "NO_PROXY"):
            environ[key] = ",".join(filter(None, [environ.get(key), *hosts]))
        if sys.platform == "linux":  # what Chromium leaves in the temporary folder goes with the profile
            # a crash handler that starts late makes its own folder anew, but not the one around it
            environ |= {"TMPDIR": profile, "BREAKPAD_DUMP_LOCATION": os.path.join(profile, "crashes")}
        return environ

    def open(self, url: str) -> None:
        """Load a page. Ending at the unreachable redirect URI is arrival, not a fault."""
        if self.driver is None:
            self.start()
        with browser_faults() as problems:
            try:
                self.driver.get(url)
            except problems.WebDriverException as error:
                arrived = any(same_place(self.driver.current_url, uri) for uri in self.redirect_uris)
                if "ERR_NAME_NOT_RESOLVED" not in str(error.msg) or not arrived:
                    raise

    def look(self) -> View:
        """What the page shows now; only its address while it is between two documents."""
        ids = [name for pair in STEPS.values() for name in pair]
        with browser_faults() as problems:
            try:
                seen, said = self.driver.execute_script(LOOK, ids, CAPTCHA, SETTLE_SECONDS * 1000), ""
                # the driver's word for the address: a page may bend what a script hands over
                url = self.driver.current_url
                if isinstance(seen, dict) and not seen.get("broken"):
                    return View(url, seen.get("items") or {}, bool(seen.get("captcha")),
                                seen.get("shown") or [], str(seen.get("text") or ""))
            except problems.WebDriverException as error:
                said = getattr(error, "alert_text", "")  # of a dialog that the driver has dismissed
                lost = re.search("session|crash|disconnected|not reachable|no such window", str(error.msg))
                if lost and not said:
                    raise
            # an error page does not know its own address
            return View(self.driver.current_url, text=said or "", broken=True)

    def type(self, view: View, step: str, keys: str) -> bool:
        """Type into the very field that was looked at; False when it is gone or cannot be typed into."""
        with browser_faults():
            view.field(step)["element"].send_keys(keys)
            return True
        return False

    def clear(self, view: View, step: str) -> bool:
        """Empty the field that was looked at, as a person would."""
        from selenium.webdriver.common.keys import Keys
        chord = Keys.COMMAND if sys.platform == "darwin" else Keys.CONTROL
        return self.type(view, step, chord + "a" + Keys.NULL + Keys.BACKSPACE)

    def press(self, view: View, step: str, digits: int) -> bool:
        """Press the step's button if its field holds so many digits, unsubmitted, and nothing covers it."""
        field, button = (view.items[name]["element"] for name in STEPS[step])
        with browser_faults():
            return bool(self.driver.execute_script(PRESS, field, button, digits, view.field(step)["submits"]))
        return False

    def evidence(self, stem: Path, hidden: Iterable[str]) -> None:
        """Store a screenshot and the page's text, every digit blanked; the page may paint them again."""
        with browser_faults():
            for _ in range(10):
                self.driver.execute_script(BLANK)
                picture, text = self.driver.get_screenshot_as_png(), self.look().text
                if not re.search(r"\d{4}", text):
                    Path(f"{stem}.png").write_bytes(picture)
                    Path(f"{stem}.txt").write_text(re.sub(r"\d", "*", redact(text, hidden)), encoding="utf-8")
                    return
            raise PageFault("it keeps painting its digits again")

    def close(self) -> None:
        """End driver and browser and delete the profile; safe to call at any time."""
        keeper, self.keeper, self.driver = self.keeper, None, None
        if keeper:
            keeper.stdin.close()
            keeper.wait()
            keeper.stdout.close()


# ---- The login page: what it shows, and what to do about it --------------------------------------

ENTRY = {"mobile": "mobile number", "otp": "TOTP code", "pin": "PIN"}
EVENTS = {"otp": "CODE", "pin": "PIN"}  # what the audit rows call them

# verb and detail: arrived (url), refused (what to raise), wait, captcha, and with the step code, clear, type,
# finish, press, taken
Move = tuple[str, Any]

# patterns, compiled when a login needs them: a message with the page's code in brackets; what changes on a page
# in good order (the resend countdown, a success, the greeting once the name is known)
TOAST = r"(.*)\[([0-9]{7}|[0-9]{3})\]"
HARMLESS = r"(?i)resen[dt]|successfully|^\s*hi\b"


def news(view: View, before: str | None) -> list[str]:
    """The lines that the page did not show `before` the last entry. What is harmless, and a line of which only
    the numbers have changed, is no news, unless it refuses something."""
    if before is None:
        return []
    known = set(before.splitlines())
    counters = {re.sub("[0-9]+", "", line) for line in known}

    def is_new(line: str) -> bool:
        if REFUSAL.search(line) or re.search(TOAST, line):
            return line not in known
        return not re.search(HARMLESS, line) and re.sub("[0-9]+", "", line) not in counters

    return [printable(line, 1000) for line in view.text.splitlines() if line.strip() and is_new(line)]


def toast(lines: Sequence[str]) -> tuple[str, str]:
    """(message, code) of the newest line with a code in brackets, as the page's error toasts have it."""
    found = [match for line in lines if (match := re.search(TOAST, line))]
    return (found[-1][1].strip(), found[-1][2]) if found else ("", "")


def known_page(view: View) -> tuple[str, int] | None:
    """What a page's heading or path means, where the facts know it: (text, reach)."""
    path = urllib.parse.urlsplit(view.url).path
    return next((row for pattern, row in PAGE_TEXTS.items()
                 if re.search(pattern, view.text, re.I | re.M) or re.search(pattern, path)), None)


def known_complaint(view: View, lines: Sequence[str]) -> tuple[str, int] | None:
    """What the page says, where the facts know it: (text, reach). `lines`: what is new on it."""
    if row := known_page(view):
        return row
    if not view.step and (dialog := re.search(r"UDAPI\d+", view.text)):
        unknown = "the authorize dialog answered with an error", "Run again."
        meaning, remedy = BROKER_ERRORS.get(dialog[0], unknown)
        return f"{meaning} ({dialog[0]}). {remedy}", THIS_APP
    for line in lines:
        blocked = re.search("too many|exceeded|blocked|try again (after|in)", line, re.I)
        if blocked and not view.field("otp").get("enabled", True):
            return OTP_BLOCKED
        if re.match("something went wrong", line, re.I):
            return "the login page says that something went wrong. Run again.", THIS_APP
    return PAGE_CODES.get(toast(lines)[1])


def pin_failure(known: str, reach: int, said: str) -> LoginFailed:
    """A PIN that did not lead to a login ends the run, whatever was answered; refused in words: a hold."""
    if reach == A_HOLD:
        return LoginFailed(known, reach)
    words = said.lower()  # of the code they may come late
    if REFUSAL.search(said) and ("pin" in words or not known and "otp" not in words):
        return LoginFailed(f"the broker refused the PIN ({said}). Correct UPSTOX_PIN: five wrong PINs lock "
                           "the account.", A_HOLD)
    known = known.removesuffix(" Run again.") or f"after the PIN the login page said: {said}."
    return LoginFailed(f"{known} The PIN had been sent, and whether it was right is not known: look at the "
                       "account in the Upstox app.", max(reach, THIS_RUN))


def no_progress(step: str, text: str, reach: int = THIS_APP) -> LoginFailed:
    """The page or the browser did not go on; `step`: whose entry had been sent, or an empty text."""
    if step == "pin":
        return pin_failure(text, THIS_RUN, "")
    return LoginFailed(f"{text} Run again; if it stays so, look at it with --headed.", reach)


def judge_complaint(view: View, login: Login, waited: float) -> Move | None:
    """What the page says against going on: raised, or a move; None when nothing can be read."""
    said = " ".join(toast(login.news)).strip()
    if login.sent and REFUSAL.search(login.said) and not REFUSAL.search(said):
        said = login.said  # nobody knows how the broker words a refusal, nor whether it has a code
    row = known_complaint(view, login.news)
    if login.sent == "pin" and (row or said):
        raise pin_failure(*(row or ("", THIS_RUN)), said)
    if row:
        raise LoginFailed(*row)
    if not said:
        return None
    if login.sent == "otp":
        return "refused", LoginFailed(f"the broker refused the TOTP code ({said}). Check UPSTOX_TOTP and "
                                      "this machine's clock, then start the menu.", A_HOLD)
    if login.sent == "mobile":
        raise LoginFailed(f"the broker did not accept the mobile number ({said}). Check "
                          "UPSTOX_MOBILE_NUMBER.", A_PERSON)
    if view.step and waited < PAGE_SECONDS / 3:  # it can go on, and a toast passes
        return "wait", ""
    raise LoginFailed(f"the login page says: {said}. Run again.")


def unknown_page(view: View, lead: str = "") -> LoginFailed:
    """The page is not one of the facts: a person has to look, and sees in one line what changed."""
    line = next((line.strip() for line in view.text.splitlines() if line.strip()), "")
    shown = ", ".join(printable(name, 50) for name in view.shown) or "none"
    return LoginFailed("the login page shows something this program does not know, so nothing more is typed "
                       f'(host {view.host}; first line: "{printable(line, 120)}"; visible fields and '
                       f"buttons: {shown}). {lead}Look at it with --headed or --debug-dir; --flow V3 works "
                       "meanwhile.", A_PERSON)


def enter(view: View, login: Login, waited: float) -> Move:
    """What to type into the step shown. Each digit is typed once: a page may take it without showing it.

    The last digit is a move of its own, since it is noted first.
    """
    step, field = view.step, view.field(view.step)
    if step in login.done:
        raise LoginFailed(*SESSION_LOST)
    if waited > PAGE_SECONDS:
        raise unknown_page(view, f"Its field stayed disabled or filled ({step}). ")
    if not field["enabled"] or (login.old and login.old in view.text and waited < PAGE_SECONDS / 3):
        return "wait", ""
    if view.captcha and not login.texts:
        return "captcha", ""  # --check types nothing, so the button cannot tell whether it is in the way
    if step not in login.texts:
        return "code", step
    if step != login.typed:
        return ("clear" if field["value"] else "type"), step
    if field["value"] == login.texts[step][:-1]:
        return "finish", step
    if waited > KEYS_SECONDS:
        raise unknown_page(view, f"It does not keep what is typed ({step}). ")
    return "wait", ""


def press_or_wait(view: View, login: Login, waited: float) -> Move | None:
    """The entry stands in its field: press, or wait for the button; None when the page took it by itself."""
    step, text = login.sent, login.texts[login.sent]
    field, button = (view.items[name] for name in STEPS[step])
    if field["value"] != text or not field["enabled"] or field["submits"] > login.submits:
        return None
    if step == "pin" and login.said and (field["requested"] or waited < WORDS_SECONDS):
        return None  # an answer, perhaps, so the page has sent it by itself
    if waited > PAGE_SECONDS:
        raise no_progress(step, f"the page's button could not be pressed after the {ENTRY[step]} was typed.")
    if not button["enabled"]:
        return ("captcha" if view.captcha else "wait"), ""
    watched = field["settled"] or step in login.run.by_hand
    return ("press" if watched else "wait"), step


def await_judgement(view: View, login: Login, waited: float) -> Move:
    """After an entry was sent: press its button once, then see what the broker makes of it."""
    step = login.sent
    if step == "pin" and view.step not in ("", "pin"):
        raise pin_failure(*SESSION_LOST, "")
    if view.step == step and not login.pressed and (move := press_or_wait(view, login, waited)):
        return move
    if step == "pin" and waited >= PAGE_SECONDS and not view.field(step) and not view.blank:
        raise unknown_page(view, "The PIN had been sent, and whether it was right is not known. ")
    if waited < OUTCOME_SECONDS:
        return "wait", ""
    words = f'it said: "{login.said}"' if login.said else "it said nothing"
    text = (f"within {OUTCOME_SECONDS} s after the {ENTRY[step]} was sent the login page did not go on "
            f"({words}).")
    # what is said of the mobile number holds for all apps, and each would ask for an OTP
    raise no_progress(step, text, THIS_RUN if step == "mobile" and login.said else THIS_APP)


def step_is_over(view: View, login: Login, waited: float) -> bool:
    """Whether the step whose entry was sent is over: then the broker took the entry.

    The next step, whatever is said beside it, or a known page proves it; a page that nobody knows only when
    patience with it ends, since it may be a word of the broker while it judges.
    """
    if view.blank or view.step in ("", "mobile") and toast(login.news)[1]:
        return False
    if view.step not in ("", login.sent):
        return True
    return not view.field(login.sent) and bool(known_page(view) or waited >= PAGE_SECONDS)


def next_move(view: View, login: Login, waited: float) -> Move:
    """What to do about what the page shows: the whole decision of a login. It only reads `login`.

    `waited`: seconds since the last progress. What ends the login is raised. The redirect comes first, then a
    foreign host, then what the page says; an entry that was sent is never typed again.
    """
    if same_place(view.url, login.app.redirect_uri):
        return "arrived", view.url
    if view.url.startswith("http") and not login.is_own(view.url):
        place = f"{urllib.parse.urlsplit(view.url).scheme}://{view.host}"
        raise LoginFailed(f"the login led to a page on {place}, which is not the broker's own, so nothing was "
                          "typed there. Check UPSTOX_BASE_URL and this machine's network before you run "
                          "again.", A_PERSON)
    if login.sent in ("mobile", "otp") and step_is_over(view, login, waited):
        if view.step == "mobile":
            raise LoginFailed(*SESSION_LOST)
        return "taken", login.sent
    if complaint := judge_complaint(view, login, waited):
        return complaint
    if not view.step and view.captcha:
        return "captcha", ""
    if login.sent:
        return await_judgement(view, login, waited)
    if view.step:
        return enter(view, login, waited)
    if waited < PAGE_SECONDS:
        return "wait", ""
    if not view.blank:
        raise unknown_page(view)
    if login.touched:
        raise LoginFailed(f"the login page went blank for {PAGE_SECONDS} s. Run again.")
    raise PageFault("the page did not load" if view.broken else "the page stayed blank")


# ---- A generating run: what every way of starting one shares -------------------------------------

class Run:
    """One generating run: what it was asked for, how each app fares, how it ended.

    The command line, the menu, --check and the HTTP API make it; both flows work on it. `progress` holds, for
    each app it generates for, (PENDING, RUNNING, DONE, FAILED or SKIPPED; the last words about it).
    """

    def __init__(self, ctx: Context, config: Config, source: str, mode: str, named: Sequence[str], *,
                 flow: str = "", headed: bool = False, lifted: str = "") -> None:
        self.ctx, self.config, self.path = ctx, config, ctx.path
        self.source, self.mode, self.named, self.flow = source, mode, list(named), flow or ctx.args.flow
        self.headed = headed or ctx.args.headed
        self.lifted = lifted  # the hold that the operator goes ahead from
        self.run_id, self.hidden = secrets.token_hex(8), config.secrets()
        self.lock: int | None = None
        self.statuses: dict[str, Status] = {}
        self.apps: list[App] = []
        self.progress: dict[str, tuple[str, str]] = {}
        self.waiting = ""  # what a person has to do now
        self.by_hand = {"mobile"}  # steps not watched, or seen not to submit by themselves
        self.operator = self.captcha = self.ended = False
        self.problem = ""  # what ended the run itself
        self.unwritten: list[Mapping[str, Any]] = []  # what must be remembered and could not be noted yet

    def show(self, name: str, text: str, left: float | None = None) -> None:
        """A line as `[2/6] WEBSOCKET1: PIN sent`, or a wait of `left` more seconds; REST asks for jobs."""
        if name in self.progress:
            text = f"[{list(self.progress).index(name) + 1}/{len(self.progress)}] {name}: {text}"
        if self.source != "REST":
            self.ctx.inform(text, left)

    def tell(self, name: str, text: str) -> None:
        """One step of one app."""
        text = redact(text, self.hidden)
        if self.progress.get(name, ("",))[0] in ("PENDING", "RUNNING"):
            self.progress[name] = ("RUNNING", text)
        self.show(name, text)

    def settle(self, name: str, state: str, message: str) -> None:
        """How one app ended; a success was audited when its token was stored."""
        message = redact(message, self.hidden)
        self.progress[name] = (state, message)
        if state == "FAILED":
            self.note(name, "FAILED", message)
        self.show(name, message)

    def note(self, name: str, outcome: str, reason: str = "", *, must: bool = False, **memory: Any) -> None:
        """One event into the audit table, with what must be remembered.

        `must`: what follows depends on it, so DatabaseError is raised. Else a database that cannot take it now
        stops nothing; what must be remembered is then written with the next event.
        """
        if outcome.startswith(("CODE_", "PIN_", "HOLD")):
            memory["credentials"] = credentials_of(self.config)
        event = {"at": int(self.ctx.now() * 1000), "run_id": self.run_id, "api_name": name,
                 "source": self.source, "flow": self.flow, "outcome": outcome,
                 "reason": redact(reason, self.hidden)[:1000] or None, **memory}
        try:
            patience = STORE_SECONDS if outcome in ("HOLD", "GENERATED") else None
            with transaction(self.path, patience) as connection:
                for each in [*self.unwritten, event]:
                    add_event(connection, each)
            self.unwritten.clear()
        except DatabaseError as error:
            if must:
                raise
            if memory:
                self.unwritten.append(event)
            self.tell(name, f"the audit row was not written: {error}")

    def hold(self) -> str:
        """Why this run may not log in, or an empty text."""
        return current_hold(self.path, self.config, self.source == "MENU", self.unwritten)

    @property
    def exit_code(self) -> int:
        """The command line's exit code (contract 5); a failed renewal is not OK while the old token lives."""
        wanted = self.named if self.mode == "PARTIAL" else self.statuses
        valid = all(self.statuses[name].word == "VALID" for name in wanted)
        done = all(state == "DONE" for state, _ in self.progress.values())
        if self.operator:
            return OPERATOR
        return OK if valid and done and not self.problem else NOT_VALID

    def failures(self) -> list[str]:
        """One line per app that got no token: why, and what to do next."""
        words = {"FAILED": "failed", "SKIPPED": "not tried"}
        return [f"{name}: {words[state]}: {message}"
                for name, (state, message) in self.progress.items() if state in words]

    def left_alone(self) -> str:
        """A line that names what INVALID_ONLY leaves alone, since nobody knows whether it is valid."""
        unknown = [name for name, status in self.statuses.items() if status.word == "UNKNOWN"]
        if self.mode != "INVALID_ONLY" or not unknown:
            return ""
        return f"Not generated, since the broker gave no verdict about it: {', '.join(unknown)}."


# ---- Selenium login: one app's way through the page ----------------------------------------------

def authorization_code(url: str, state: str) -> str:
    """The code in the redirect's address, if the state is the one this login sent."""
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)
    if query.get("state") != [state]:
        raise LoginFailed("the redirect came back with another state than this login sent, so its code was "
                          "not used. Run again; if it stays so, someone interferes with the connection.")
    if not query.get("code"):
        raise LoginFailed("the redirect came back without an authorization code. Run again.")
    return query["code"][0]


def keep_evidence(run: Run, app: App, browser: Browser) -> None:
    """With --debug-dir: what the page looked like when a login failed; the full path is told."""
    if run.ctx.args.debug_dir and browser.driver:
        stem = run.ctx.args.debug_dir.absolute() / f"{app.name}-{datetime.now():%Y%m%d-%H%M%S}"
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
            browser.evidence(stem, run.hidden)
            run.tell(app.name, f"picture and text of the page: {stem}.png and .txt")
        except (PageFault, OSError) as error:
            run.tell(app.name, f"no picture of the page could be stored ({type(error).__name__})")


class Login:
    """One app's way through the login page: looks, lets next_move decide, acts once, and looks again."""

    def __init__(self, run: Run, app: App, browser: Browser) -> None:
        self.run, self.app, self.browser, config = run, app, browser, run.config
        # whose pages may be typed into; in a rehearsal only those of this machine
        self.is_own = is_local if is_local(config.base_url) else is_brokers
        self.texts = {"mobile": config.mobile, "pin": config.pin}  # a TOTP code is made when asked for
        self.typed = ""  # the step whose first digits were typed
        self.touched = False  # something was typed: no second try with a fresh browser
        self.done: list[str] = []  # steps that were taken
        self.sent = ""  # the step whose whole text was typed and which is being judged
        self.whole = False  # its last digit was typed for certain
        self.pressed, self.submits = False, 0  # its button; how often its field was submitted before
        self.before: str | None = None  # the page's text before that
        self.news: list[str] = []  # what it shows now that it did not show then
        self.said = ""  # what the page says of it: a line that refuses, else the newest
        self.old = ""  # the refusal of a code, which the page may still show
        self.moved = 0.0  # when there was progress; the page's patience is counted from here
        self.captcha_since: float | None = None
        self.window = 0  # of the TOTP code under way

    def authorize(self) -> str:
        """Go through the page until the redirect; the authorization code."""
        state = secrets.token_urlsafe(16)
        self.open(state)
        view, verb, detail = self.decide()
        while verb != "arrived":
            self.act(view, verb, detail)
            view, verb, detail = self.decide()
        if self.sent in EVENTS:  # arrival proves nothing of a PIN whose last digit may never have gone out
            self.run.note(self.app.name, f"{EVENTS[self.sent]}_{'TAKEN' if self.whole else 'NOT_SENT'}")
        return authorization_code(detail, state)

    def open(self, state: str) -> None:
        self.say("opening the login page")
        self.browser.open(self.run.config.base_url + dialog_path(self.app, state))
        self.wait_anew()

    def decide(self) -> tuple[View, str, Any]:
        """Look, less and less often, until there is something to do; the look and the move."""
        rest = 0.02
        while True:
            view = self.browser.look()
            self.news = news(view, self.before)
            if self.sent and self.news:  # a toast lives for 3 s only
                self.said = next(filter(REFUSAL.search, self.news), self.news[-1])
            self.run.waiting = ""
            verb, detail = next_move(view, self, self.browser.clock() - self.moved)
            if verb == "captcha":
                self.mind_captcha()
            elif verb != "wait":
                return view, verb, detail
            self.browser.rest(rest)
            rest = min(rest * 1.2, 0.5)

    def mind_captcha(self) -> None:
        """A CAPTCHA belongs to the operator; without a window it can only pass by itself."""
        patience, task = CAPTCHA_SECONDS, "the page shows a CAPTCHA; waiting whether it passes by itself"
        failure = CAPTCHA_SHOWN
        if self.browser.headed:
            patience, task = CAPTCHA_HEADED_SECONDS, "solve the CAPTCHA in the browser window"
            failure, self.run.waiting = NOBODY_SOLVED, f"{self.app.name}: {task}"
        self.moved = self.browser.clock()
        if self.captcha_since is None:
            self.captcha_since = self.moved
            self.say(task)
        if self.moved - self.captcha_since > patience:
            self.run.captcha = True
            raise LoginFailed(failure, A_PERSON)

    def act(self, view: View, verb: str, detail: Any) -> None:
        """Do what next_move decided."""
        if verb == "refused":
            self.try_next_code(view, detail)
        elif verb == "code":
            self.make_code()
        elif verb == "clear":
            self.browser.clear(view, detail)
            self.browser.rest(0.1)
        elif verb == "type":
            self.touched = True
            if self.browser.type(view, detail, self.texts[detail][:-1]):
                self.typed = detail
                self.wait_anew()
        elif verb == "finish":
            self.finish_entry(view, detail)
        elif verb == "press":
            self.pressed = self.browser.press(view, detail, len(self.texts[detail]))
            if self.pressed:
                self.run.by_hand.add(detail)
                self.wait_anew()
            else:
                self.browser.rest(0.1)
        elif verb == "taken":
            self.done.append(detail)
            self.sent = ""
            if view.step:  # else the patience with a page that nobody knows goes on
                self.wait_anew()
            if detail == "otp":
                self.run.note(self.app.name, "CODE_TAKEN")
                self.say("the broker took the TOTP code")

    def wait_anew(self) -> None:
        self.moved, self.captcha_since = self.browser.clock(), None

    def say(self, text: str) -> None:
        self.run.tell(self.app.name, text)

    def code_wait(self) -> float:
        """Seconds until a TOTP code may be sent: one whose window was never noted, whoever sent it."""
        now = self.run.ctx.now()
        noted = read_events(self.run.path, "number", "outcome = 'CODE_SENT' AND number >= ?",
                            int(now // TOTP_WINDOW))
        return totp_wait(now, {row[0] for row in noted})

    def expired(self) -> bool:
        """Whether the TOTP code under way is none of this moment, or has too little time left."""
        left = (self.window + 1) * TOTP_WINDOW - self.run.ctx.now()
        return not TOTP_MARGIN <= left <= TOTP_WINDOW

    def make_code(self) -> None:
        """Wait for a window whose code was never sent, and make its TOTP code."""
        import pyotp
        wait, ctx = self.code_wait(), self.run.ctx
        end = ctx.now() + wait
        while (left := end - ctx.now()) > 0:
            self.run.show(self.app.name, "next TOTP code", left)
            ctx.sleep(min(left, 1.0))
        self.window = int(ctx.now() // TOTP_WINDOW)
        self.texts["otp"] = pyotp.TOTP(self.run.config.totp).at(self.window * TOTP_WINDOW)
        self.run.hidden.add(self.texts["otp"])
        self.wait_anew()

    def finish_entry(self, view: View, step: str) -> None:
        """Type the last digit, which makes the entry whole: a code or PIN is on disk as sent by then."""
        if step in EVENTS and not self.note_sent(step):
            self.drop_code()
            return
        self.sent, self.pressed, self.submits = step, False, view.field(step)["submits"]
        self.before, self.said = view.text, ""
        self.whole = self.browser.type(view, step, self.texts[step][-1])
        if self.whole:
            self.wait_anew()
            self.say(f"{ENTRY[step]} {'sent' if step in EVENTS else 'typed'}")
            return
        # the field went before the digit; only one that is there again, and short, proves that nothing was sent
        seen = self.browser.look().field(step)
        if step == "mobile" or seen.get("value") == self.texts[step][:-1]:
            self.sent = ""
            if step in EVENTS:
                self.run.note(self.app.name, f"{EVENTS[step]}_NOT_SENT")

    def note_sent(self, step: str) -> bool:
        """Put a code or PIN on disk as sent, or it is not sent; False when a code's time is over."""
        if hold := self.run.hold():
            raise LoginFailed(f"{hold}. Find out why, then start the menu.", A_PERSON)
        number = self.window if step == "otp" else None
        if number and (self.expired() or self.code_wait()):
            return False
        try:
            self.run.note(self.app.name, f"{EVENTS[step]}_SENT", must=True, number=number)
        except DatabaseError as error:
            raise LoginFailed(f"nothing is sent that cannot be noted first. {error}", THIS_RUN) from None
        if number and self.expired():  # the database took its time
            self.run.note(self.app.name, "CODE_NOT_SENT")
            return False
        return True

    def try_next_code(self, view: View, refusal: LoginFailed) -> None:
        """After a refused code one more from the next window; two codes not taken: none any more."""
        self.run.note(self.app.name, "CODE_REFUSED", str(refusal))
        if self.run.hold():
            raise refusal
        self.say("the broker refused the TOTP code; trying once more with the next one")
        code = toast(self.news)[1]
        self.old = f"[{code}]" if code else self.said
        self.before, self.sent = view.text, ""  # what was dealt with is no news any more
        self.drop_code()

    def drop_code(self) -> None:
        """Another TOTP code has to be made and typed."""
        del self.texts["otp"]
        self.typed = ""
        self.wait_anew()


def log_in(run: Run, app: App, browser: Browser, again: bool = True) -> str:
    """Selenium login (the guide 8): the authorization code of one app.

    A fault before anything was typed is tried once more with a fresh browser, after it never.
    """
    login = Login(run, app, browser)
    try:
        return login.authorize()
    except LoginFailed:
        keep_evidence(run, app, browser)
        raise
    except PageFault as fault:
        keep_evidence(run, app, browser)
        browser.close()
        if login.touched or not again:
            raise no_progress(login.sent, PAGE_FAILED.format(fault)) from None
        run.tell(app.name, f"{fault}; trying once more with a fresh browser")
    return log_in(run, app, browser, again=False)


def store_patiently(run: Run, row: Mapping[str, Any]) -> None:
    """Write a token; it cost a login, so a database that cannot take it now is asked again for a while."""
    end = time.monotonic() + STORE_SECONDS
    while True:
        try:
            with transaction(run.path, 5) as connection:
                return upsert_token(connection, row)
        except DatabaseError as error:
            if time.monotonic() > end:
                raise LoginFailed(f"the broker gave a token, but it could not be stored. {error}",
                                  THIS_RUN) from None
            run.tell(row["api_name"], f"the token cannot be stored yet, trying again. {error}")
            run.ctx.sleep(1.0)


def exchange_and_store(run: Run, app: App, code: str) -> Token:
    """Exchange the code, store the token, audit: no signal comes between, for what exists is stored."""
    with run.ctx.finish_first():
        exchange = functools.partial(exchange_code, run.config, app)
        [answer] = run_within(EXCHANGE_SECONDS, NO_ANSWER, exchange, [code])
        token, user = (answer.json().get(name) for name in ("access_token", "user_id"))
        if answer.code != 200 or not isinstance(token, str) or not PLAIN_TOKEN.fullmatch(token):
            raise LoginFailed(f"no token for the authorization code: {explain(answer)}")
        run.hidden.add(token)
        now = run.ctx.now()
        valid_until = cutoff_after(now)
        row = token_row(app, token, now, valid_until)
        store_patiently(run, row)
        owner = printable(user, 40) if isinstance(user, str) else None
        run.note(app.name, "GENERATED", user_id=owner)
        run.settle(app.name, "DONE", "token stored")
        return Token(app.name, token, app.client_id, now, valid_until,
                     row["validity_at"], row["generated_at"])


def verify_new(run: Run, token: Token) -> None:
    """The new token's proof; one that the broker refuses is deactivated."""
    [answer] = ask_profiles(run.config, [token])
    run.statuses[token.api_name] = status = Status(*judge_profile(answer), token)
    if status.reason != "401":
        return run.settle(token.api_name, "DONE", status.label)
    with contextlib.suppress(DatabaseError):
        deactivate_tokens(run.path, [token], run.ctx.now())
    return run.settle(token.api_name, "FAILED",
                      "the broker gave a token and does not take it (401). Run again.")


# ---- Flow V3: approval on the phone --------------------------------------------------------------

def epoch_seconds(value: object) -> float | None:
    """Seconds of the broker's epoch milliseconds, which come as text or number; None when neither."""
    return float(value) / 1000 if re.fullmatch(r"[0-9]{13}(\.0)?", str(value)) else None


def tell_request(run: Run, app: App, end: float, notifier: object) -> None:
    """Until when the request may be approved; a warning when the broker would deliver elsewhere."""
    until = local_text(min(end, run.ctx.now() + run.ctx.args.wait * 60))[11:16]
    text = f"waiting for approval on the phone until {until}"
    if notifier != run.config.notifier:
        place = printable(notifier or "an address it does not name", 200)
        text += (f". Warning: the broker will deliver to {place}, not to UPSTOX_NOTIFIER_WEBHOOK_URI. Change "
                 f"one of them, here or on {APP_PAGE}")
    run.tell(app.name, text)


def note_deadline(run: Run, app: App, until: float) -> None:
    """Put on disk until when an approval may come; a database that cannot take it now stops nothing."""
    try:
        amend_request(run.path, run.run_id, app.name, int(until * 1000))
    except DatabaseError as error:
        run.tell(app.name, f"the audit row was not written: {error}")


def await_deliveries(run: Run, before: Mapping[str, str], ends: dict[App, float]) -> None:
    """Watch the database, whoever receives, until every app is settled or its time is over."""
    ctx = run.ctx
    give_up = ctx.now() + ctx.args.wait * 60
    while ends and not ctx.stopping.is_set():
        rows: Mapping[str, Token] = {}
        try:
            rows = read_tokens(run.path)
        except DatabaseError as error:  # the approval may come all the same
            run.tell("", f"cannot look for tokens now, trying again. {error}")
        for app, end in list(ends.items()):
            token = rows.get(app.name)
            if token and token.access_token not in ("", before.get(app.name)):
                del ends[app]
                verify_new(run, token)
            elif ctx.now() >= min(end, give_up):
                del ends[app]
                remedy = ("Run again." if ctx.now() >= end else
                          "Approve it on the phone while --serve runs, or run again.")
                run.settle(app.name, "FAILED", f"not approved in time. {remedy}")
        if ends:
            left = max(0.0, min(*ends.values(), give_up) - ctx.now())
            names = ", ".join(app.name for app in ends)
            run.waiting = f"Approve on the phone: {names} ({left / 60:.0f} min left)"
            run.show("", f"waiting for approval on the phone ({len(ends)} left)", left)
            ctx.sleep(min(1.0, left))
    run.waiting = ""


def generate_by_phone(run: Run) -> None:
    """Ask the broker for all apps, then wait until the webhook has stored what was approved."""
    before = {name: token.access_token for name, token in read_tokens(run.path).items()}
    apps: list[App] = []
    ends: dict[App, float] = {}
    for app in run.apps:  # noted before it is sent: a delivery may come before the answer does
        try:
            run.note(app.name, "REQUESTED", must=True, number=int(cutoff_after(run.ctx.now()) * 1000))
            apps.append(app)
        except DatabaseError as error:
            run.settle(app.name, "FAILED", f"no approval is asked for that cannot be noted first. {error}")
    ask = functools.partial(request_approval, run.config)
    for app, answer in zip(apps, run_within(PROFILE_SECONDS, NO_ANSWER, ask, apps)):
        data = answer.data()
        end = epoch_seconds(data.get("authorization_expiry"))
        if answer.code == 200 and end is not None:
            ends[app] = end
            tell_request(run, app, end, data.get("notifier_url"))
            note_deadline(run, app, end)
        else:
            if error_code(answer)[0]:  # an answer that was lost may be followed by an approval all the same
                note_deadline(run, app, 0)
            run.settle(app.name, "FAILED", f"no approval could be asked for: {explain(answer)}")
    await_deliveries(run, before, ends)
    for app in ends:
        run.settle(app.name, "SKIPPED", "the program was stopped")


Delivery = tuple[str, str, float]  # user id, access token, valid until (epoch seconds)


def parse_delivery(body: bytes, config: Config, now: float) -> tuple[App | None, Delivery | str]:
    """The app that a webhook body names, and what it delivers (facts/upstox-api.md 6) or why that is none."""
    data = json_object(body)
    app = next((app for app in config.apps if app.client_id == data.get("client_id")), None)
    user, token, expiry = data.get("user_id"), data.get("access_token"), epoch_seconds(data.get("expires_at"))
    kind = data.get("token_type"), data.get("message_type")
    texts = isinstance(user, str) and isinstance(token, str) and kind == ("Bearer", "access_token")
    if not texts or not PLAIN.fullmatch(user) or len(user) > 40 or not PLAIN_TOKEN.fullmatch(token):
        return app, "it is not the broker's token message"
    if expiry is None or not now < expiry < now + 2 * 86400:
        return app, "its expiry cannot be right"
    return app, (user, token, expiry)


def account_owner(config: Config, path: Path, now: float) -> str:
    """The user id of this database's tokens: of the last one generated, else from the profile of one that is
    alive; empty when there is none. TokenError: the broker cannot tell now."""
    if known := read_events(path, "user_id", "outcome = 'GENERATED' AND user_id IS NOT NULL"):
        return known[-1][0]
    rows = read_tokens(path)
    alive = [rows[app.name] for app in config.apps
             if judge_stored(rows.get(app.name), app.client_id, now) is None]
    answers = ask_profiles(config, alive)
    words = [judge_profile(answer)[0] for answer in answers]
    for word, answer in zip(words, answers):
        if word == "VALID" and (user := answer.data()):
            return text_of(user.get("user_id"))
    if "UNKNOWN" in words:
        raise TokenError("the broker cannot tell now whose the tokens so far are")
    return ""


def take_delivery(ctx: Context, config: Config, app: App, delivery: Delivery) -> str:
    """Prove a delivery, then store it; why it was not stored, or an empty text. TokenError: not now.

    Anyone may post it, so nothing is believed: a request of ours must be outstanding, and the broker's
    profile answer must name the delivery's user, who must be the one of this database's tokens.
    """
    path, (user, token, valid_until) = ctx.path, delivery
    # where nothing was ever asked for, nobody's post costs a write lock; a database that is away may come back
    if path.exists() and not read_events(path, "number", "api_name = ? AND outcome = 'REQUESTED'", app.name):
        return "nothing was asked for"
    with transaction(path) as connection:
        if problem := why_unexpected(connection, app.name, token, ctx.now()):
            return problem
    [answer] = ask_profiles(config, [Token(app.name, token, app.client_id)])
    word, reason = judge_profile(answer)
    problem = f"the broker says {word} ({reason}) of its token"
    if word == "UNKNOWN":
        raise TokenError(problem)
    if word != "VALID":
        return problem
    if answer.data().get("user_id") != user:
        return "its token belongs to another user than it says"
    owner = account_owner(config, path, ctx.now())
    if owner not in ("", user):
        return (f"it is for the account {user}, the tokens so far are for {printable(owner, 40)}. "
                "If that is meant, log in once with --flow SELENIUM")
    now = ctx.now()
    with transaction(path, STORE_SECONDS) as connection:
        if problem := why_unexpected(connection, app.name, token, now):
            return problem
        upsert_token(connection, token_row(app, token, now, valid_until))
        add_event(connection, {"at": int(now * 1000), "run_id": secrets.token_hex(8), "api_name": app.name,
                               "source": "WEBHOOK", "flow": "V3", "outcome": "GENERATED", "user_id": user})
    return ""


# ---- Generating: choose, prove, then app by app --------------------------------------------------

def choose(mode: str, named: Sequence[str], statuses: Mapping[str, Status]) -> list[str]:
    """The apps a mode generates for. UNKNOWN is neither valid nor invalid: INVALID_ONLY leaves it alone."""
    return [name for name, status in statuses.items()
            if mode == "ALL" or name in named or mode == "INVALID_ONLY" and status.word in NEEDS_LOGIN]


def prepare(run: Run) -> None:
    """Take the lock, read the statuses under it, choose the apps; or TokenError.

    If there are any: prove that the database takes their tokens and events, and mark the tokens that got a 401.
    """
    run.lock = lock_database(run.path)
    try:
        now = run.ctx.now()
        run.statuses = classify_tokens(run.config, read_tokens(run.path), now)
        names = choose(run.mode, run.named, run.statuses)
        run.apps = [app for app in run.config.apps if app.name in names]
        run.progress = {name: ("PENDING", "") for name in names}
        if run.apps:
            create_database(run.ctx)
            prove_writable(run.path, run.apps, now)
            refused = [status.token for status in run.statuses.values() if status.reason == "401"]
            deactivate_tokens(run.path, refused, now)
    except BaseException:
        unlock_database(run.lock)
        raise


def lift_hold(run: Run) -> str:
    """Note that an operator goes ahead from the hold that he was told; any other hold is the reason, in words,
    why no login may be tried."""
    hold = run.hold()
    if hold and hold != run.lifted:
        return (f"{hold.rstrip('.')}. No unattended login until PIN, TOTP secret or mobile number in the "
                "configuration changes, or an operator goes ahead from the menu.")
    if hold:
        run.note(run.apps[0].name, "HOLD_LIFTED", hold, must=True)
    return ""


def end_of_login(run: Run, app: App, failure: TokenError, reach: int) -> str:
    """Note and tell why an app got no token; what forbids the next app, or an empty text."""
    if reach == A_HOLD:
        run.note(app.name, "HOLD", f"{str(failure).rstrip('.')} ({local_text(run.ctx.now())})")
    text = str(failure)
    try:
        if held := bool(run.hold()):
            text = text.removesuffix(" Run again.") + " Logins are on hold now; go ahead from the menu."
    except DatabaseError:
        held, reach = False, max(reach, THIS_RUN)
    run.settle(app.name, "FAILED", text)
    run.operator |= held or reach >= A_PERSON
    return f"the run stopped at {app.name}" if held or reach >= THIS_RUN else ""


def generate_one(run: Run, app: App, browser: Browser) -> str:
    """Log in, exchange, store, audit, verify: in this order. What forbids the next app, or an empty text."""
    try:
        code = log_in(run, app, browser)
        run.hidden.add(code)
        verify_new(run, exchange_and_store(run, app, code))
        return ""
    except LoginFailed as failure:
        with run.ctx.finish_first():
            return end_of_login(run, app, failure, failure.reach)
    except DatabaseError as error:  # nothing can be looked up or noted, so nothing more is sent
        return end_of_login(run, app, error, THIS_RUN)
    except Stopped as stop:
        failure = stop.__context__
        if isinstance(failure, LoginFailed):  # while the signal had to wait, or its picture was taken
            end_of_login(run, app, failure, failure.reach)
        elif run.progress[app.name][0] != "DONE":
            run.settle(app.name, "FAILED", "the program was stopped in the middle of this login")
        raise


def generate_by_browser(run: Run) -> None:
    """Flow SELENIUM: one browser, one app after the other; what holds for all apps stops the run."""
    blocker, refused = lift_hold(run), {}
    run.operator = bool(blocker)
    if not blocker:
        answers = ask_dialogs(run.ctx, run.config, run.apps)
        blocker = clock_problem(clock_offset(answers) or 0)
        refused = {app.name: explain(answer) for app, (answer, _) in zip(run.apps, answers)
                   if error_code(answer)[0] == "UDAPI100068"}
    uris = [app.redirect_uri for app in run.apps]
    with contextlib.closing(run.ctx.browser(uris, run.headed, run.ctx.environ)) as browser:
        for app in run.apps:
            if blocker or run.ctx.stopping.is_set():
                run.settle(app.name, "SKIPPED", blocker or "the program was stopped")
            elif app.name in refused:
                run.settle(app.name, "FAILED", refused[app.name])
            else:
                blocker = generate_one(run, app, browser)


def generate_chosen(run: Run) -> None:
    """Generate for the chosen apps, whatever happens to single ones, and give the lock back."""
    try:
        if run.apps and run.flow == "V3":
            generate_by_phone(run)
        elif run.apps:
            generate_by_browser(run)
    except BaseException as error:
        told = isinstance(error, TokenError)
        run.problem = str(error) if told else "the run was ended by an internal error or a signal"
        raise
    finally:
        unlock_database(run.lock)
        run.ended = True


# ---- The operator: summary and menu --------------------------------------------------------------

def summary_lines(statuses: Mapping[str, Status], path: Path | None = None) -> list[str]:
    """The summary of the guide's 7.1."""
    words = [status.word for status in statuses.values()]
    valid, unknown = words.count("VALID"), words.count("UNKNOWN")
    lines = ["Token Status Summary:" + (f" {path.resolve()}" if path else ""), "-" * 34,
             *(f"{name:<14}: {status.label}" for name, status in statuses.items()), "",
             f"Valid Tokens    : {valid}", f"Invalid Tokens  : {len(words) - valid - unknown}"]
    return [*lines, f"Unknown Tokens  : {unknown}"] if unknown else lines


def status_json(ctx: Context, config: Config, statuses: Mapping[str, Status]) -> dict[str, Any]:
    """The summary for programs (the guide 7.2); EXPIRED counts as invalid."""
    attempts = last_attempts(ctx.path)

    def names(*words: str) -> list[str]:
        return [name for name, status in statuses.items() if status.word in words]

    return {"valid": names("VALID"), "invalid": names("INVALID", "EXPIRED"), "missing": names("NOT FOUND"),
            "unknown": names("UNKNOWN"), "checkedAt": local_text(ctx.now()),
            "hold": current_hold(ctx.path, config) or None,
            "tokens": [{"apiName": name, "status": status.word, "reason": status.reason,
                        "validityAt": status.token and status.token.validity_at,
                        "generatedAt": status.token and status.token.generated_at,
                        "lastAttempt": attempts.get(name)} for name, status in statuses.items()]}


def parse_names(text: str, configured: Sequence[str], *, numbers: bool = False) -> list[str]:
    """API names from a text, any case, doubles once; ValueError names the first bad one."""
    known = {name: name for name in configured}
    if numbers:
        known |= {str(number): name for number, name in enumerate(configured, 1)}
    parts = re.findall(r"[^,\s]+", text.upper())
    if unknown := [part for part in parts if part not in known]:
        raise ValueError(f"{printable(unknown[0], 40)} is not one of {', '.join(configured)}")
    if not parts:
        raise ValueError("name at least one API")
    return list(dict.fromkeys(known[part] for part in parts))


def prompt_menu(ctx: Context, configured: Sequence[str]) -> tuple[str, list[str]] | None:
    """The operator's choice as (mode, names), None to abort (the guide 7.1). A bad answer is asked again."""
    ctx.say("", "Choose Action:", "1. Generate ALL", "2. Generate ONLY invalid",
            "3. Generate selected (comma separated)", "4. Abort")
    while (answer := ctx.answer("Choice: ").lower()) not in ("1", "2", "3"):
        if answer in ("4", "q"):
            return None
        ctx.say("Please answer 1, 2, 3 or 4.")
    if answer != "3":
        return MODES[int(answer) - 1], []
    ctx.say("  ".join(f"{number}. {name}" for number, name in enumerate(configured, 1)))
    while (answer := ctx.answer("APIs (names or numbers): ")).lower() != "q":
        try:
            return "PARTIAL", parse_names(answer, configured, numbers=True)
        except ValueError as error:
            ctx.say(f"{error}.")
    return None


def has_display(environ: Mapping[str, str]) -> bool:
    return sys.platform != "linux" or bool(environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"))


# ---- The dashboard: one page, no outside resource ------------------------------------------------

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Upstox tokens</title> <link rel="icon" href="data:,">
<style nonce="NONCE">
:root { color-scheme: light dark; --page: #f4f6f8; --card: #fff; --text: #1b2430; --soft: #576372;
  --line: #7d889440; --good: #1a7f4b; --bad: #b3261e; --act: #2457c5; --turn: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --page: #11151b; --card: #191f27; --text: #e6eaf0;
  --soft: #9eaab8; --good: #4cc38a; --bad: #ff8f85; --act: #86b0ff; --turn: #f2b84b; } }
.none { --hue: var(--soft); } .good { --hue: var(--good); } .bad { --hue: var(--bad); }
.busy { --hue: var(--act); } .wait { --hue: var(--turn); }
* { box-sizing: border-box; } [hidden] { display: none !important; }
body { max-width: 1080px; margin: 0 auto; padding: 16px; background: var(--page); color: var(--text);
  font: 16px/1.4 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, p { margin: 0; font-size: 1.1rem; } p { font-size: 1rem; }
#summary { font-size: 1.25rem; font-weight: 600; } #notice { min-height: 1.4em; }
#summary, .status, .job b, p.bad { color: var(--hue); } .job b { font-weight: inherit; }
.soft, thead, .until, .job { color: var(--soft); font-size: .9rem; }
header, fieldset, form, label { display: flex; align-items: center; gap: 10px; }
fieldset, form { flex-wrap: wrap; margin: 12px 0 0; border: 0; padding: 0; }
#refresh, #all { margin-left: auto; } #key { width: 100%; max-width: 400px; }
#card, table, dialog, button, select, input { border-radius: 8px; background: var(--card); color: inherit; }
#card { margin: 16px 0; border-left: 6px solid var(--hue); padding: 14px 16px; }
#card.wait { background: color-mix(in srgb, var(--turn) 12%, var(--card)); }
button, select, input { min-height: 44px; border: 1px solid #7d8894; padding: 0 14px; font: inherit; }
.main { background: var(--act); color: var(--card); } .danger { border-color: var(--bad); color: var(--bad); }
:disabled { border-color: var(--line); background: none; color: var(--soft); opacity: 1; }
:focus-visible { outline: 3px solid var(--act); outline-offset: 2px; }
table { width: 100%; table-layout: fixed; border-collapse: collapse; text-align: left; }
th, td { width: 200px; height: 56px; padding: 6px 12px; } th + th { width: 250px; } th + .job { width: auto; }
tr + tr { border-top: 1px solid var(--line); } .status::before { content: "● "; }
label { min-height: 44px; } button { white-space: nowrap; } th input { width: 20px; min-height: 20px; }
dialog { width: 460px; border: 1px solid #7d8894; padding: 16px; } dialog p { margin: 12px 0 24px; }
@media (max-width: 640px) {
  fieldset > * { flex: auto; } thead { display: none; } tr { padding: 4px 0 12px; }
  table, tbody, tr, th, td { display: block; width: auto; height: auto; }
  th, td { padding: 0 12px; } td { padding-left: 46px; }
}
</style>
</head>
<body>
<header>
  <div><h1>Upstox tokens</h1> <p id="checked" class="soft"></p></div> <button id="refresh">Check again</button>
</header>
<main>
  <section id="card">
    <div aria-live="polite">
      <p id="summary" tabindex="-1"></p> <p id="hold" class="bad"></p> <p id="notice"></p>
    </div>
    <fieldset id="actions" aria-label="Generate tokens">
      <button id="missing" class="main">Generate missing</button> <button id="selected"></button>
      <select id="flow" aria-label="Way to log in"><option value="SELENIUM">Browser login</option>
        <option value="V3">Approve on phone</option></select>
      <button id="all" class="danger">Force regenerate all</button>
    </fieldset>
    <form id="keyform">
      <label for="key">Key</label> <input id="key" type="password" required autocomplete="off"
        pattern="[!-~]+" title="A key has no spaces."> <button id="key-save" class="main">Save</button>
    </form>
  </section>
  <table id="tokens">
    <thead><tr><th scope="col">API</th> <th scope="col">Status</th>
      <th scope="col" class="job">Last attempt</th></tr></thead>
    <tbody id="body"></tbody>
  </table>
  <template id="row"><tr>
    <th scope="row"><label><input type="checkbox"> <span></span></label></th>
    <td><b class="status"></b> <span class="until"></span></td> <td class="job"><b></b><span></span></td>
  </tr></template>
</main>
<dialog id="confirm" aria-labelledby="danger" aria-describedby="dangers">
  <h2 id="danger">Regenerate every token, valid or not?</h2>
  <p id="dangers">Every app logs in again, each at the cost of a one-time code or of an approval on the phone.
    Programs that use the present tokens stop working until they read the new ones.</p>
  <button id="confirm-no">Cancel</button> <button id="confirm-yes" class="danger">Regenerate all</button>
</dialog>
<script nonce="NONCE">
'use strict';
const WAYS = {CLI: 'cron or command line', MENU: 'menu', REST: 'web page or HTTP',
  WEBHOOK: 'approved on the phone'};
const STEPS = {PENDING: ['none', 'Queued'], RUNNING: ['busy', 'Running'], SKIPPED: ['none', 'Not tried'],
  FAILED: ['bad', 'Failed']};
const saved = sessionStorage;  // of this tab, also after a reload: the key, the job that is followed
let report = {tokens: []}, job = null, note = '', trouble = null, timer = 0;

const $ = id => document.getElementById(id);
const ticked = () => [...$('body').querySelectorAll(':checked')];
const live = run => ['RUNNING', 'WAITING_FOR_OPERATOR'].includes(run?.state);
const locked = () => trouble?.status === 401;
const tone = status => status === 'VALID' ? 'good' : status.startsWith('UNKNOWN') ? 'none' : 'bad';
const count = mood => report.tokens.filter(token => tone(token.status) === mood).length;
// the server's words, with this page's names for the ways to log in
const plain = words => words.replaceAll('--flow SELENIUM', '“Browser login”')
  .replaceAll('--flow V3', '“Approve on phone”');
// touches only what changes, so that nothing is announced twice
const say = (node, text) => { if (node.textContent !== text) node.textContent = text; };

async function call(path, body) {
  const headers = {'Content-Type': 'application/json'};
  if (saved.secret) headers.Authorization = 'Bearer ' + saved.secret;
  const answer = await fetch('auth/upstox/tokens/' + path, {headers, method: body ? 'POST' : 'GET',
    body: JSON.stringify(body), signal: AbortSignal.timeout(20000)});
  const data = await answer.json();  // fails when a proxy answers because the server itself is gone
  const running = answer.headers.get('X-Job');
  if (running) saved.job = 'jobs/' + running;
  if (answer.status === 404) return null;  // a job from before the server's restart
  if (!answer.ok) throw Object.assign(new Error(data.error), {status: answer.status});
  return data;
}

async function look() {  // asks, shows, comes again
  const followed = saved.job;
  try {
    const run = followed && await call(followed);
    const fresh = live(run) && report.checkedAt ? report : await call('status');
    if (live(run) || followed && live(job)) job = run && {...run, seen: fresh.checkedAt};
    else if (fresh.tokens.some(one => one.lastAttempt?.at > job?.seen)) job = null;  // another ran since
    if (saved.job === followed && !live(run)) saved.job = '';
    [report, trouble] = [fresh, null];
  } catch (error) {
    trouble = error;
  }
  render();
  clearTimeout(timer);
  if (locked()) return $('key').focus();
  const seconds = saved.job ? 1 : document.hidden ? 600 : note || trouble || count('bad') ? 10 : 60;
  timer = setTimeout(() => { note = ''; look(); }, 1000 * seconds);
}

async function generate(mode, apiNames) {
  [note, job] = ['', {state: 'RUNNING', results: []}];  // about to start
  render();
  try {
    const run = await call('generate', {mode, apiNames, flow: $('flow').value});
    saved.job = 'jobs/' + run.jobId;
    ticked().forEach(box => { box.checked = false; });
  } catch (error) {
    note = error.status ? error.message : 'No answer came. If the run has begun, it will show here.';
    job = null;
  }
  look();
}

function when(text) {  // '2026-11-26 03:30:00' reads '26 Nov 03:30'
  const day = new Date(String(text).slice(0, 16).replace(' ', 'T') + 'Z');
  const form = {day: 'numeric', month: 'short', hour: '2-digit', minute: '2-digit', timeZone: 'UTC'};
  return isNaN(day) ? text : day.toLocaleString('en-GB', form).replace(',', '');
}

function headline() {  // colour, sentence on top, line below it
  if (locked() && saved.secret) return ['bad', 'This server asks for its key.', 'It did not accept this one.'];
  if (locked()) return ['none', 'This server asks for its key.',
    'It is UPSTOX_SERVE_KEY of the server. This tab keeps it until it is closed.'];
  if (trouble?.status) return ['bad', 'The server could not check the tokens.', trouble.message];
  const known = report.checkedAt ? 'The table is as of the last check.' : '';
  if (trouble) return ['bad', 'The server does not answer.', known];
  if (live(job)) return progress();
  if (!report.checkedAt) return ['none', 'Checking the tokens…', ''];
  const all = report.tokens.length, bad = count('bad'), unknown = count('none');
  const counted = job && job.message.split(/ [^ ]+: (?:failed|not tried): /)[0];  // the table says why
  const line = job ? `Last run, ${when(job.seen)}: ${counted}` : '';
  if (bad) return ['bad', `${bad} of ${all} tokens need${bad > 1 ? '' : 's'} generating.`, line];
  if (unknown) return ['none', `${all - unknown} of ${all} tokens are valid, ${unknown} unknown.`, line];
  const until = report.tokens.map(token => token.validityAt).sort()[0];
  const every = all > 1 ? `All ${all} tokens are` : 'The token is';
  return ['good', `${every} valid until ${when(until)}.`, line];
}

function progress() {
  const done = job.results.filter(one => one.state === 'DONE').length;
  const sum = job.results.length ? `${done} of ${job.results.length} done.` : 'starting…';
  if (job.state === 'RUNNING')
    return ['busy', 'Generating: ' + sum, 'The run goes on even when this page is closed.'];
  const how = /approv/i.test(job.message) ? 'Open the Upstox app there.'
    : 'The window is on the server’s screen and waits up to 5 minutes.';
  return ['wait', 'Your turn: ' + sum, `${job.message}. ${how} The run goes on by itself.`];
}

function story(token, result) {  // what happened last: colour, when and by whom, why
  const last = token.lastAttempt;
  if (result && result.state !== 'DONE') return [...STEPS[result.state], result.message];
  if (result && live(job)) return ['good', 'Generated just now'];
  if (!last || last.at < token.generatedAt)
    return ['none', token.generatedAt ? 'Generated ' + when(token.generatedAt) : '–'];
  const way = ` ${when(last.at)} (${WAYS[last.source] || last.source})`;
  return last.outcome === 'FAILED' ? ['bad', 'Failed' + way, last.reason || ''] : ['none', 'Generated' + way];
}

function newRow({apiName}) {
  const tr = $('row').content.firstElementChild.cloneNode(true);
  tr.dataset.api = tr.querySelector('input').value = tr.querySelector('span').textContent = apiName;
  return tr;
}

function renderRow(tr, token, told) {
  const result = job?.results.find(one => one.apiName === token.apiName);
  const made = live(job) && result?.state === 'DONE';  // its message is the new status
  const label = made ? result.message : token.status + (token.reason ? ` (${token.reason})` : '');
  const until = label === 'VALID' && !made ? 'until ' + when(token.validityAt) : '';
  const [mood, last, why = ''] = story(token, result);
  tr.className = tone(label);
  tr.querySelector('.job').className = 'job ' + mood;
  say(tr.querySelector('.status'), label);
  say(tr.querySelector('.until'), until);
  say(tr.querySelector('.job b'), last);
  say(tr.querySelector('.job span'), told.has(why) ? ': as above.' : why && ': ' + plain(why));
  if (why.length > 60) told.add(why);  // a long reason is told only once
}

function render() {
  const {tokens} = report, rows = $('body').rows, held = document.activeElement, told = new Set();
  if ([...rows].map(tr => tr.dataset.api).join() !== tokens.map(token => token.apiName).join())
    $('body').replaceChildren(...tokens.map(newRow));
  tokens.forEach((token, i) => renderRow(rows[i], token, told));
  const [mood, sentence, line] = headline();
  document.title = sentence + ' Upstox tokens';
  $('card').className = mood;
  say($('summary'), sentence);
  say($('hold'), report.hold ? `Logins are on hold: ${report.hold}. Correct the settings, or go ahead from `
    + 'the menu on the server. Approval on the phone works all the same.' : '');
  say($('notice'), plain(note || line));
  $('notice').className = note || job?.state === 'FAILED' ? 'bad' : '';
  say($('checked'), report.checkedAt ? `Checked ${report.checkedAt.slice(11)}, server’s time` : '');
  say($('selected'), `Generate selected (${ticked().length})`);
  $('missing').disabled = !count('bad');
  $('selected').disabled = !ticked().length;
  $('actions').disabled = !report.checkedAt || live(job) || trouble;
  $('actions').hidden = $('tokens').hidden = locked();
  $('keyform').hidden = !locked();
  const lost = !held.isConnected || held.matches(':disabled') || held.closest('[hidden]');
  if (lost) $('summary').focus();  // never to the body
}

$('body').onchange = render;
$('missing').onclick = () => generate('INVALID_ONLY');
$('selected').onclick = () => generate('PARTIAL', ticked().map(box => box.value));
$('all').onclick = () => $('confirm').showModal();
$('confirm-no').onclick = () => $('confirm').close();
$('confirm-yes').onclick = () => { $('confirm').close(); generate('ALL'); };
$('refresh').onclick = () => { say($('checked'), 'Checking…'); look(); };
$('keyform').onsubmit = () => { saved.secret = $('key').value; $('keyform').reset(); look(); return false; };
document.onvisibilitychange = () => look();
$('flow').value = 'FLOW';
render();
look();
</script>
</body>
</html>
"""


# ---- HTTP API: requests, routes, the server ------------------------------------------------------

# status, payload (bytes, or what becomes JSON), headers
Reply = tuple[int, Any, Mapping[str, str]]


class HttpError(Exception):
    """An answer other than success."""

    def __init__(self, code: int, text: str, headers: Mapping[str, str] = {}) -> None:
        super().__init__(text)
        self.code, self.headers = code, headers


def job_json(run: Run) -> dict[str, Any]:
    """A generating run as the HTTP API shows it."""
    state, message = "WAITING_FOR_OPERATOR" if run.waiting else "RUNNING", run.waiting
    if run.ended:
        state = "DONE" if run.exit_code == OK else "FAILED"
        done = [word for word, _ in run.progress.values()].count("DONE")
        counted = f"{done} of {len(run.progress)} generated." if run.progress else "Nothing to do."
        message = run.problem or " ".join(filter(None, [counted, run.left_alone(), *run.failures()[:1]]))
    return {"jobId": run.run_id, "state": state, "message": message,
            "results": [{"apiName": name, "state": word, "message": text}
                        for name, (word, text) in list(run.progress.items())]}


def read_request(body: Any, config: Config, flow: str) -> tuple[str, list[str], str]:
    """(mode, names, flow) of a generate request, or HttpError 400."""
    body = body if isinstance(body, dict) else {}
    mode, names, flow = body.get("mode"), body.get("apiNames", []), body.get("flow", flow)
    if mode not in MODES:
        raise HttpError(400, f"mode must be one of {', '.join(MODES)}")
    if flow not in FLOWS:
        raise HttpError(400, f"flow must be one of {', '.join(FLOWS)}")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise HttpError(400, "apiNames must be a list of API names")
    if bool(names) != (mode == "PARTIAL"):
        raise HttpError(400, "apiNames are needed for mode PARTIAL, and only there")
    if unknown := [name for name in names if name not in config.names]:
        name = printable(redact(unknown[0], config.secrets()), 40)
        raise HttpError(400, f"apiNames: {name} is not one of {', '.join(config.names)}")
    return mode, names, flow


def get_page(server: Server, request: Handler) -> Reply:
    nonce = secrets.token_urlsafe(16)
    policy = (f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src "
              "'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
    page = PAGE.replace("FLOW", server.ctx.args.flow).replace("NONCE", nonce)
    return 200, page.encode(), {"Content-Type": "text/html; charset=utf-8",
                                "Content-Security-Policy": policy}


def one_line(error: TokenError) -> str:
    """The problems of an error, a line each, as one."""
    return " ".join(f"{line.rstrip('.')}." for line in str(error).splitlines())


def get_status(server: Server, request: Handler) -> Reply:
    """Every token's status: one check for all who ask at the same time, used again while it is fresh."""
    arrived = time.monotonic()
    with server.checking:
        at, known, reply = server.checked
        now_known = server.stored, [run.run_id for run in server.jobs.values() if run.ended]
        fresh = time.monotonic() - at < SHARED_SECONDS and known == now_known and reply[0] == 200
        if not fresh and (at < arrived or known != now_known):
            try:
                config = load_config(server.ctx, "status")
                statuses = classify_tokens(config, read_tokens(server.ctx.path), server.ctx.now())
                reply = 200, status_json(server.ctx, config, statuses), {}
            except TokenError as error:  # shared with those who wait meanwhile, or each would wait for a lock
                reply = 503, {"error": one_line(error)}, {}
            server.checked = time.monotonic(), now_known, reply
    running = [run.run_id for run in server.jobs.values() if not run.ended]
    return (*reply[:2], {"X-Job": running[-1]} if running else {})  # for a page that has not begun it


def post_generate(server: Server, request: Handler) -> Reply:
    """Start a run in a thread of its own; 409 when another is busy, 400 when the request makes no sense."""
    if request.headers.get_content_type() != "application/json":
        raise HttpError(415, "send application/json")
    try:
        body = json.loads(request.read_body())
    except (ValueError, RecursionError):
        raise HttpError(400, "the body is not JSON") from None
    ctx = server.ctx
    mode, names, flow = read_request(body, load_config(ctx, "menu"), ctx.args.flow)
    config = load_config(ctx, flow)  # with what the chosen flow needs
    run = Run(ctx, config, "REST", mode, names, flow=flow)
    prepare(run)
    server.jobs = dict([*server.jobs.items(), (run.run_id, run)][-20:])
    server.start_work(generate_chosen, run)
    return (202, {"jobId": run.run_id, "state": "RUNNING", "apiNames": list(run.progress)},
            {"Location": f"/auth/upstox/tokens/jobs/{run.run_id}"})


def post_delivery(server: Server, request: Handler) -> Reply:
    """At the notifier's path: answered at once and alike whatever it is; looked at besides."""
    server.start_work(server.deliver, request.read_body())
    return 200, {"status": "ok"}, {}


def get_job(server: Server, request: Handler, job_id: str) -> Reply:
    latest = next(reversed(server.jobs.values()), None)
    run = latest if job_id == "latest" else server.jobs.get(job_id)
    if run is None:
        raise HttpError(404, "no such job")
    return 200, job_json(run), {}


ROUTES: tuple[tuple[str, str, Callable[..., Reply]], ...] = (
    ("GET", r"/", get_page),
    ("GET", r"/healthz", lambda server, request: (200, {"status": "ok"}, {})),
    ("GET", r"/auth/upstox/tokens/status", get_status),
    ("POST", r"/auth/upstox/tokens/generate", post_generate),
    ("GET", r"/auth/upstox/tokens/jobs/([0-9a-z]{1,40})", get_job))


def is_loopback_name(host: str) -> bool:
    """Whether a name or address leads to this machine wherever it is asked (RFC 6761: x.localhost does)."""
    return on_this_machine(host) or host.endswith(".localhost")


def serve_address(text: str, config: Config) -> tuple[str, int]:
    """(host, port) of HOST:PORT; beyond loopback only with a key."""
    match = re.fullmatch(r"\[?([^\[\]/\s]+?)\]?:([0-9]{1,5})", text)
    if not match or int(match[2]) > 65535:
        raise TokenError(f"--serve: {printable(text, 60)} is not HOST:PORT", USAGE)
    if not is_loopback_name(match[1].lower()) and not config.serve_key:
        raise TokenError("UPSTOX_SERVE_KEY: is not set; serving beyond loopback needs it", USAGE)
    return match[1].lower(), int(match[2])


class Server(socketserver.ThreadingTCPServer):
    """What requests share: the context, the last check, the jobs. A thread per connection, 500 at most."""

    request_queue_size = 128
    allow_reuse_address = daemon_threads = True
    WORK = "work"  # name of the threads that its end waits for: jobs and deliveries

    def __init__(self, ctx: Context, config: Config, address: str, webhook_only: bool = False) -> None:
        self.ctx, self.webhook_only = ctx, webhook_only
        self.initial = self.config = config  # key and origins are the start's, deliveries want the latest
        self.jobs: dict[str, Run] = {}
        self.stored = 0  # deliveries so far
        self.checking, self.proving = threading.Lock(), threading.Semaphore(PROOFS_AT_ONCE)
        self.checked: tuple[float, Any, Any] = (0.0, None, None)  # when, what was known, the reply
        self.host, port = serve_address(address, config)
        self.address_family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            super().__init__((self.host, port), Handler)
        except (OSError, TypeError) as error:  # a name that cannot be encoded
            reason = getattr(error, "strerror", None) or "not an address"
            raise TokenError(f"--serve: cannot listen on {address}: {reason}. "
                             "Choose another port, or end what uses it.", USAGE) from None

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return threading.active_count() <= 500  # the silent are cut off by Handler.timeout

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is everyday life, and no traceback is for the log."""

    def tell(self, text: str, failed: bool = False) -> None:
        """A line for the operator; within a run with -q only of what failed, at its end."""
        say = self.ctx.inform if self.webhook_only else self.ctx.log
        if failed and self.webhook_only and self.ctx.kept is not None:
            say = self.ctx.say
        say(redact(text, self.initial.secrets()))  # a client may send one as its path

    def start_work(self, work: Callable[[Any], None], item: Any) -> None:
        """Begin a job or a delivery, in a thread that the end of the server waits for."""
        def run() -> None:
            try:
                with contextlib.suppress(TokenError):  # it stands in the run
                    work(item)
            except Exception as error:  # a bug: its text may hold anything
                self.tell(f"internal error: {type(error).__name__}")

        threading.Thread(target=run, name=self.WORK).start()

    def deliver(self, body: bytes) -> None:
        """Prove and store what was delivered, in a few tries over minutes; tell the operator in one line."""
        config = self.config  # read anew when the request came in
        app, delivery = parse_delivery(body, config, self.ctx.now())
        if app is None:
            return None  # a stranger's
        refused = f"{app.name}: a delivery was not stored: "
        if isinstance(delivery, str):
            return self.tell(refused + delivery, failed=True)
        for pause in (0, 1, 2, 4, 8, 15, 30, 60, 120, 240):
            if pause and self.ctx.stopping.wait(pause):
                break
            try:
                with self.proving:
                    problem = take_delivery(self.ctx, config, app, delivery)
                self.stored += not problem
                break
            except TokenError as error:  # the database or the broker, for the moment
                problem = str(error)
                if not pause:
                    self.tell(f"{refused}{problem.rstrip('.')}; trying again")
        if problem:
            return self.tell(refused + problem, failed=True)
        return self.tell(f"{app.name}: approved on the phone, token stored")

    def __exit__(self, *failure: object) -> None:
        """Let a running job finish its current app, and settle every delivery that was answered with 200."""
        self.ctx.stopping.set()
        for thread in threading.enumerate():
            if thread.name == self.WORK:
                thread.join()
        super().__exit__(*failure)

    def latest_config(self) -> Config:
        """The configuration for deliveries, read anew; the last good one while the file is being edited."""
        with contextlib.suppress(TokenError):
            self.config = load_config(self.ctx, "status")
        return self.config


class Handler(http.server.BaseHTTPRequestHandler):
    """Checks who asks, finds the route, answers JSON; no SQL and no login code here."""

    server: Server
    server_version, sys_version, default_request_version = "upstox_tokens", "", "HTTP/1.0"
    timeout = 10  # seconds of silence

    def respond(self) -> None:
        self.cors: dict[str, str] = {}
        try:
            self.answer(*self.dispatch(self.requestline.split()[1].partition("?")[0]))
        except HttpError as error:
            self.answer(error.code, {"error": str(error)}, error.headers)
        except TokenError as error:
            codes = {BUSY: 409, USAGE: 503 if isinstance(error, DatabaseError) else 400}
            self.answer(codes.get(error.exit_code, 503), {"error": one_line(error)}, {})
        except OSError:
            self.close_connection = True  # the client is gone
        except Exception as error:  # a bug: tell where, not what, since its text may hold anything
            self.server.tell(f"internal error: {type(error).__name__}")
            self.answer(500, {"error": "internal error"}, {})

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = respond

    def dispatch(self, path: str) -> Reply:
        """The webhook before all checks: the broker sends neither our key nor a host name of ours."""
        server = self.server
        found = next(((method, route, match.groups()) for method, pattern, route in ROUTES
                      if (match := re.fullmatch(pattern, path)) and not server.webhook_only), None)
        if path and not found and path == urllib.parse.urlsplit(server.latest_config().notifier).path:
            self.need_method("POST")
            return post_delivery(server, self)
        self.check_host()
        self.check_origin()
        preflight = self.command == "OPTIONS" and self.cors  # browsers send it without the key
        if path.startswith("/auth/") and not preflight:
            self.check_key()
        if not found:
            raise HttpError(404, "not found")
        method, route, groups = found
        if preflight:
            return 204, b"", {"Access-Control-Allow-Methods": method, "Access-Control-Max-Age": "600",
                              "Access-Control-Allow-Headers": "Authorization, Content-Type",
                              "Access-Control-Allow-Private-Network": "true"}
        self.need_method(method)
        return route(server, self, *groups)

    def need_method(self, method: str) -> None:
        if self.command != method and (self.command, method) != ("HEAD", "GET"):
            allowed = "GET, HEAD, OPTIONS" if method == "GET" else f"{method}, OPTIONS"
            raise HttpError(405, f"use {method}", {"Allow": allowed})

    def check_host(self) -> None:
        """DNS rebinding: a page of another site could reach us only by a name that is not ours."""
        host = ""
        with contextlib.suppress(ValueError):
            host = urllib.parse.urlsplit("//" + self.headers.get("Host", "")).hostname or ""
        if not is_loopback_name(host) and host not in (self.server.host, self.connection.getsockname()[0]):
            raise HttpError(403, "this Host is not served here")

    def check_origin(self) -> None:
        """A browser's page must be our own or listed in UPSTOX_ALLOWED_ORIGINS."""
        origin = self.headers.get("Origin")
        if origin is None or same_place(origin, f"http://{self.headers.get('Host', '')}"):
            return
        if not any(same_place(origin, allowed) for allowed in self.server.initial.origins):
            raise HttpError(403, "this Origin is not allowed; see UPSTOX_ALLOWED_ORIGINS")
        self.cors = {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": "Location",
                     "Vary": "Origin"}

    def check_key(self) -> None:
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        key = self.server.initial.serve_key
        if key and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise HttpError(401, "the key is missing or wrong", {"WWW-Authenticate": "Bearer"})

    def read_body(self) -> bytes:
        """The whole body: 64 KiB at most, of the announced length."""
        announced = self.headers.get("Content-Length", "")
        if self.headers.get("Transfer-Encoding") or not re.fullmatch("[0-9]{1,18}", announced):
            raise HttpError(400, "a Content-Length is needed")
        if int(announced) > 65536:
            raise HttpError(413, "the body is larger than 64 KiB")
        body = self.rfile.read(int(announced))
        if len(body) < int(announced):
            raise HttpError(400, "the body is shorter than announced")
        return body

    def answer(self, code: int, payload: Any, headers: Mapping[str, str]) -> None:
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(code)
        common = {"Content-Type": "application/json", "Content-Length": str(len(body)),
                  "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
                  "Referrer-Policy": "no-referrer"}
        for name, value in {**common, **self.cors, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)
        if code >= 400:
            self.linger()

    def linger(self) -> None:
        """Take what a refused client still sends, for a while: a reset would eat our answer."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            end = time.monotonic() + 5
            while time.monotonic() < end and self.connection.recv(65536):
                pass

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses (bad request lines, header floods, unknown methods), as JSON."""
        self.cors, self.command = {}, self.command or ""
        if code == 501:
            return self.answer(405, {"error": "unknown method"}, {"Allow": "GET, HEAD, POST, OPTIONS"})
        return self.answer(code, {"error": printable(message or "bad request", 100)}, {})

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """With -v one line a request; without its query, which could hold anything."""
        if self.server.ctx.args.verbose:
            target = getattr(self, "path", "?").partition("?")[0]
            self.server.tell(printable(f"{self.client_address[0]} {self.command} {target} {int(code)}", 200))

    def log_message(self, format: str, *args: Any) -> None:
        """What else http.server would log: nothing that an operator needs."""


def command_serve(ctx: Context, config: Config) -> int:
    """--serve: until Ctrl-C or SIGTERM."""
    with Server(ctx, config, ctx.args.serve) as server:
        host = f"[{server.host}]" if ":" in server.host else server.host
        ctx.inform(f"Serving on http://{host}:{server.server_address[1]}/ (Ctrl-C ends)")
        server.serve_forever()
    return OK


def listen(ctx: Context, config: Config, until: contextlib.ExitStack) -> None:
    """Receive deliveries until the end of a flow V3 run, unless something already does at the address."""
    address = ctx.args.serve or SERVE_ADDRESS
    try:
        server = until.enter_context(Server(ctx, config, address, webhook_only=True))
    except TokenError as error:
        ctx.inform(f"This run cannot listen for deliveries; a running --serve must. {error}")
        return
    threading.Thread(target=server.serve_forever, daemon=True).start()
    until.callback(server.shutdown)


# ---- Commands ------------------------------------------------------------------------------------

def tell_strangers(ctx: Context, rows: Iterable[str]) -> None:
    """One line for rows that are none of ours."""
    if foreign := sorted(set(rows) - set(API_NAMES)):
        ctx.inform("Rows of unknown names are left untouched: "
                   + ", ".join(printable(name, 40) for name in foreign))


def tell_hold(ctx: Context, config: Config) -> None:
    if hold := current_hold(ctx.path, config):
        ctx.inform(f"Logins are on hold: {hold.rstrip('.')}.")


def look_at_tokens(ctx: Context, config: Config) -> dict[str, Status]:
    """Every app's status now."""
    rows = read_tokens(ctx.path)
    tell_strangers(ctx, rows)
    tell_hold(ctx, config)
    return classify_tokens(config, rows, ctx.now())


def say_summary(ctx: Context, statuses: Mapping[str, Status]) -> None:
    ctx.say(*summary_lines(statuses, ctx.path if ctx.args.verbose else None))


def say_result(ctx: Context, run: Run) -> None:
    """The summary at the end of a run, and what to do about the apps that failed."""
    say_summary(ctx, run.statuses)
    if lines := run.failures():
        ctx.say("", *lines)


def all_valid(statuses: Mapping[str, Status]) -> int:
    """The exit code of a mere look."""
    return OK if all(status.word == "VALID" for status in statuses.values()) else NOT_VALID


def generate(run: Run) -> Run:
    """One whole run of the command line or the menu."""
    if run.ctx.args.serve:
        serve_address(run.ctx.args.serve, run.config)
    prepare(run)
    if line := run.left_alone():
        run.ctx.log(line)
    with contextlib.ExitStack() as end:
        if run.flow == "V3" and run.apps:
            listen(run.ctx, run.config, end)
        generate_chosen(run)
    return run


def command_status(ctx: Context, config: Config) -> int:
    """--status: look, write nothing."""
    statuses = look_at_tokens(ctx, config)
    if ctx.args.json:
        ctx.say(json.dumps(status_json(ctx, config, statuses), indent=2))
    else:
        say_summary(ctx, statuses)
    return all_valid(statuses)


def command_mode(ctx: Context, config: Config) -> int:
    """--mode: generate without asking."""
    try:
        named = parse_names(ctx.args.apis, config.names) if ctx.args.mode == "PARTIAL" else []
    except ValueError as error:
        raise TokenError(f"--apis: {error}", USAGE) from None
    tell_strangers(ctx, read_tokens(ctx.path))
    run = generate(Run(ctx, config, "CLI", ctx.args.mode, named))
    if not run.apps or run.flow == "V3":  # else it has been the reason
        with contextlib.suppress(DatabaseError):
            tell_hold(ctx, config)
    if ctx.args.json:
        report = {}
        with contextlib.suppress(DatabaseError):  # lost meanwhile; what was done is told all the same
            report = status_json(ctx, config, run.statuses)
        results = [{"apiName": name, "state": state, "message": "" if state == "DONE" else message}
                   for name, (state, message) in run.progress.items()]
        ctx.say(json.dumps({**report, "results": results, "exitCode": run.exit_code}, indent=2))
    else:
        say_result(ctx, run)
    return run.exit_code


def command_menu(ctx: Context, config: Config) -> int:
    """No option: the summary, the operator's choice, the run; offers a visible browser for a CAPTCHA."""
    statuses = look_at_tokens(ctx, config)
    say_summary(ctx, statuses)
    if (choice := prompt_menu(ctx, config.names)) is None:
        ctx.say("Aborted, nothing changed.")
        return all_valid(statuses)
    hold = ""
    if ctx.args.flow == "SELENIUM" and choose(*choice, statuses):
        hold = current_hold(ctx.path, config, attended=True)
    question = f"Logins are on hold: {hold}. Is it mended, and may the login go ahead?"
    lifted = hold if hold and ctx.confirm(question) else ""
    config = load_config(ctx, ctx.args.flow)  # anew, for what was mended meanwhile
    run = generate(Run(ctx, config, "MENU", *choice, lifted=lifted))
    ctx.say("")
    say_result(ctx, run)
    if run.captcha and not run.headed and has_display(ctx.environ) and ctx.confirm(
            "Open a visible browser window and go on there?"):
        left = [name for name, (state, _) in run.progress.items() if state != "DONE"]
        again = generate(Run(ctx, config, "MENU", "PARTIAL", left, headed=True))
        again.mode, again.named = run.mode, run.named  # the exit code answers the operator's first question
        run = again
        say_result(ctx, run)
    return run.exit_code


def command_import_config(ctx: Context, config: Config) -> int:
    """--import-config: the apps of the environment into upstox_api_configs."""
    create_database(ctx)
    import_apps(ctx.path, config.apps, ctx.now())
    ctx.say(f"Copied {', '.join(config.names)} into upstox_api_configs of {ctx.path.resolve()}. "
            "Set UPSTOX_CONFIG_SOURCE=DB to use them.")
    return OK


def database_problem(ctx: Context, config: Config) -> str:
    """Whether the database takes tokens and events, without leaving one there, and can be locked."""
    path = ctx.path
    if not path.exists():
        folder = path.absolute().parent
        return "" if os.access(folder, os.W_OK) else f"{folder} cannot be written. Name a file with --db."
    try:
        table = select(path, "SELECT 1 FROM sqlite_master WHERE name = 'upstox_tokens'")
        prove_writable(path, config.apps if table else (), ctx.now())
    except DatabaseError as error:
        return str(error)
    lock = lock_file(path)  # which root may have made
    usable = not lock.exists() or lock.is_file() and os.access(lock, os.R_OK | os.W_OK)
    return "" if usable else f"The lock file {lock} cannot be used. Give this user write permission on it."


def hold_problem(ctx: Context, config: Config) -> str:
    """The hold of contract 7, and what to do about it."""
    try:
        hold = current_hold(ctx.path, config)
    except DatabaseError:  # which has a line of its own
        return "unknown, since the database cannot be read"
    return f"logins are on hold: {hold}. Mend it, then go ahead from the menu" if hold else ""


def browser_problems(ctx: Context, config: Config) -> tuple[str, str]:
    """Whether a browser starts and opens a page; whether the login page, opened for the first app, is the
    broker's own and shows a step that this program knows."""
    app = config.apps[0]
    run = Run(ctx, config, "CLI", "PARTIAL", [app.name])
    with contextlib.closing(ctx.browser([app.redirect_uri], run.headed, ctx.environ)) as browser:
        try:
            browser.open("about:blank")
        except (LoginFailed, PageFault) as error:
            known = isinstance(error, LoginFailed)
            problem = str(error) if known else f"the browser failed ({error}). {INSTALL_BROWSER}"
            return problem, "not opened, for want of a browser"
        login = Login(run, app, browser)
        login.texts = {}  # nothing to type
        try:
            login.open(secrets.token_urlsafe(16))
            login.decide()
        except LoginFailed as failure:
            return "", str(failure)
        except PageFault as fault:
            return "", str(no_progress("", PAGE_FAILED.format(fault)))
    return "", ""


def command_check(ctx: Context, config: Config) -> int:
    """--check: is everything ready for a login? Leaves nothing in the database, spends no OTP."""
    answers = ask_dialogs(ctx, config, config.apps)
    silent = all(answer.error for answer, _ in answers)
    offset = clock_offset(answers)
    checks = {"configuration": "", "env file": "", "database": database_problem(ctx, config)}
    if ctx.args.flow == "SELENIUM":
        checks["browser"], checks["login page"] = browser_problems(ctx, config)
    checks |= {"broker": explain(answers[0][0]) if silent else "",
               "clock": ("unknown, since the broker told no time; compare it by hand" if offset is None
                         else clock_problem(offset)), "hold": hold_problem(ctx, config)}
    checks |= {app.name: "" if 300 <= answer.code < 400 else explain(answer)
               for app, (answer, _) in zip(config.apps, answers)}
    lines = (f"{name:<14}: {problem or 'ok'}" for name, problem in checks.items())
    ctx.say(*(redact(line, config.secrets()) for line in lines))
    return NOT_VALID if any(checks.values()) else OK


# ---- The command line ----------------------------------------------------------------------------

# name: what does it, and its use of the configuration (a key of NEEDED); None: a login in the chosen flow
COMMANDS: dict[str, tuple[Callable[[Context, Config], int], str | None]] = {
    "status": (command_status, "status"), "mode": (command_mode, None), "serve": (command_serve, "menu"),
    "check": (command_check, None), "import_config": (command_import_config, "menu"),
    "menu": (command_menu, "menu")}


def wait_minutes(text: str) -> float:
    """Minutes for --wait: more than 0, at most a day."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= 1440:
            return float(text)
    raise argparse.ArgumentTypeError("expected minutes, more than 0 and at most 1440")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="upstox_tokens.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Keep the Upstox access tokens of one account alive in vega_trade.db.\n"
                    "Without an option: the summary, then the menu.",
        epilog="exit: 0 all valid, 1 some not, 2 usage or configuration, 3 operator needed, 4 busy\n"
               "cron: upstox_tokens.py --mode INVALID_ONLY -q")
    add = parser.add_argument
    add("--status", action="store_true", help="show the summary and change nothing")
    add("--mode", type=str.upper, choices=MODES, help="generate without asking")
    add("--apis", metavar="A,B", help="the API names for --mode PARTIAL")
    add("--serve", nargs="?", const=SERVE_ADDRESS, metavar="HOST:PORT",
        help=f"HTTP API and dashboard (default {SERVE_ADDRESS}); with --mode and V3: where that run listens")
    add("--check", action="store_true", help="is everything ready for a login? Spends no OTP")
    add("--import-config", action="store_true", help="copy the apps of the environment into the database")
    add("--json", action="store_true", help="result as JSON (with --status or --mode)")
    add("--flow", type=str.upper, choices=FLOWS, default="SELENIUM", help="browser (default) or phone")
    add("--wait", type=wait_minutes, default=15, metavar="MINUTES", help="how long V3 waits (default 15)")
    add("--headed", action="store_true", help="show the browser window")
    add("--debug-dir", type=Path, metavar="DIR", help="store screenshot and text of a failed login's page")
    add("--env-file", type=Path, metavar="PATH", help="settings (default .env here, else beside the script)")
    add("--db", metavar="PATH", help=f"database (default {DATABASE_NAME} here, else beside the script)")
    add("-v", "--verbose", action="store_true", help="also show the database's path and each request served")
    add("-q", "--quiet", action="store_true", help="silent when all is well (for cron)")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def parse_arguments(argv: Sequence[str] | None, environ: Mapping[str, str]) -> argparse.Namespace:
    """Options that fit together and the name of their command, or exit 2 with one sentence."""
    parser = build_parser()
    args = parser.parse_args(argv)
    named = [name for name in COMMANDS if getattr(args, name, None) not in (None, False)]
    if args.mode and args.serve and args.flow == "V3":
        named.remove("serve")  # it says where the run itself listens
    if len(named) > 1:
        parser.error("choose one of --status, --mode, --serve, --check and --import-config")
    if (args.mode == "PARTIAL") != (args.apis is not None):
        parser.error("--mode PARTIAL and --apis go together")
    if args.json and not (args.status or args.mode):
        parser.error("--json goes with --status or --mode")
    if args.headed and not has_display(environ):
        parser.error("--headed needs a display (DISPLAY is not set)")
    args.command = named[0] if named else "menu"
    return args


def open_stream(stream: TextIO | None) -> TextIO:
    """A stream that takes any text; one that was closed before the start leads nowhere."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    with contextlib.suppress(AttributeError):
        stream.reconfigure(errors="backslashreplace")
    return stream


def ask_on_terminal(prompt: str) -> str:
    """input(), with EOFError where nobody can be asked."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        raise EOFError
    with contextlib.suppress(OSError, AttributeError):  # can only be done before the first read
        sys.stdin.reconfigure(errors="backslashreplace")
    return input(prompt)


def main(argv: Sequence[str] | None = None, *, out: TextIO | None = None, err: TextIO | None = None,
         ask: Callable[[str], str] = ask_on_terminal, environ: Mapping[str, str] | None = None,
         now: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep,
         browser: Callable[..., Browser] = Browser) -> int:
    """Run one command; the exit code of contract 5. The keywords replace the process's own for tests."""
    environ = dict(os.environ if environ is None else environ)
    try:
        args = parse_arguments(argv, environ)
    except SystemExit as stop:  # argparse has said what is wrong
        return stop.code
    out, err = out or open_stream(sys.stdout), err or open_stream(sys.stderr)
    ctx = Context(args, environ, now, sleep, out, err, ask, browser)
    os.umask(0o077)  # whatever is created may hold tokens
    try:
        with ctx.signals_handled():
            ctx.path = find_database(args.db)
            command, use = COMMANDS[args.command]
            code = command(ctx, load_config(ctx, use or args.flow))
            lines, ctx.kept = ctx.kept, None
            if lines and code != OK:
                ctx.say(*lines)
            return code
    except TokenError as error:
        for line in str(error).splitlines():
            ctx.log(f"error: {line}")
        return error.exit_code
    except Stopped as stop:
        ctx.log("Stopped. Tokens generated so far are kept.")
        return stop.exit_code
    except Exception as error:  # a bug: its text may hold anything, so only where it is
        frames = traceback.walk_tb(error.__traceback__)
        place = [line for frame, line in frames if frame.f_globals is globals()][-1]
        ctx.log(f"error: internal error, {type(error).__name__} at line {place}. Please report it.")
        return NOT_VALID


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # tidying up memory that ends anyway would take 10 ms more
