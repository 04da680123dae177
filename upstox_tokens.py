#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["selenium>=4.27", "pyotp>=2.9"]
# ///
"""Keep the Upstox access tokens of one account (one to six apps) alive in vega_trade.db.

THIS PROGRAM IS TRUSTED WITH YOUR BROKER PIN AND TOTP SECRET. Read it before you use it: it is one file.

It reads   the environment, an env file (see env.sample) and the tables upstox_tokens, upstox_api_configs
It writes  upstox_tokens, upstox_token_audit, and DATABASE.upstox-lock beside the database: the lock of a
           run and the counts that protect the account (of codes and PINs sent, never their values)
It talks   to UPSTOX_BASE_URL and, in a real browser, to the login page that the broker sends it to

    upstox_tokens.py                          summary, then the menu
    upstox_tokens.py --status [--json]        summary only, read-only
    upstox_tokens.py --mode ALL|INVALID_ONLY|PARTIAL [--apis A,B] [--json]
    upstox_tokens.py --serve [HOST:PORT]      HTTP API and dashboard
    upstox_tokens.py --check                  is everything ready for a login?
    upstox_tokens.py --import-config          copy the app configuration into the database

Exit: 0 every token in question is valid, 1 at least one is not, 2 usage, configuration or database error,
3 an operator is needed, 4 another run is busy, 130 or 143 stopped by Ctrl-C or SIGTERM.

From Python: upstox_tokens.access_token("WEBSOCKET1") gives the stored token or raises TokenError.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import copy
import hashlib
import hmac
import http.client
import http.server
import importlib.util
import json
import logging
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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NoReturn, TextIO

__version__ = "1.0.0"
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

PROFILE_SECONDS = 10  # overall deadline of one round of profile calls
EXCHANGE_SECONDS = 30  # the code is spent once it was sent, so patience pays
BODY_LIMIT = 1 << 20
CLOCK_SECONDS = 20  # the codes of a clock further off are refused
TOTP_WINDOW, TOTP_MARGIN = 30, 5  # seconds; a code with less than the margin left is not sent
READ_SECONDS, PROOF_SECONDS, STORE_SECONDS = 10, 30, 60  # patience with a locked database
PAGE_SECONDS, OUTCOME_SECONDS = 30, 60  # for a page to show a step, for the broker to judge an entry
CAPTCHA_SECONDS, CAPTCHA_HEADED_SECONDS = 15, 300

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
    id INTEGER PRIMARY KEY,
    at BIGINT NOT NULL,
    run_id VARCHAR(32) NOT NULL,
    api_name VARCHAR(50) NOT NULL,
    source VARCHAR(20) NOT NULL,
    flow VARCHAR(20) NOT NULL,
    outcome VARCHAR(20) NOT NULL,
    reason VARCHAR(1000)
)"""

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

# ---- Errors: every text is a finished sentence for the operator ----------------------------------


class TokenError(Exception):
    """Something an operator must read; the text names the next step."""

    exit_code = NOT_VALID


class ConfigError(TokenError):
    """The configuration cannot be used: one line for each problem, none with a secret's value."""

    exit_code = USAGE

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))


class DatabaseError(TokenError):
    """The database cannot be used."""

    exit_code = USAGE


class BusyError(TokenError):
    """Another run holds the lock of this database."""

    exit_code = BUSY


@dataclass(eq=False)
class LoginFailed(TokenError):
    """One app got no token: why, and what to do next."""

    text: str
    stops_run: bool = False  # the reason holds for all apps
    operator: bool = False  # a person is needed
    hold: bool = False  # no unattended login from now on (AccountGuard)
    captcha: bool = False
    unanswered: bool = False  # nobody knows what became of the secret that was sent

    def __str__(self) -> str:
        return self.text


class PageFault(Exception):
    """The browser died or the page did not load: tried once more unless a secret was typed."""


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
        text = text.replace(secret, "[hidden]")
    return text


# ---- Configuration -------------------------------------------------------------------------------


@dataclass(eq=False)
class App:
    """One API app of the account."""

    index: int
    name: str
    client_id: str
    client_secret: str = field(repr=False)
    redirect_uri: str


@dataclass(eq=False)
class Config:
    """The whole configuration, checked. Secrets stay out of the repr and so out of tracebacks."""

    apps: tuple[App, ...]
    base_url: str
    mobile: str = field(repr=False)
    pin: str = field(repr=False)
    totp: str = field(repr=False)
    notifier: str = field(repr=False)
    serve_key: str = field(repr=False)
    origins: tuple[str, ...]

    def secrets(self) -> set[str]:
        """Every configured text that must never be shown."""
        own = {self.mobile, self.pin, self.totp, self.serve_key} | {app.client_secret for app in self.apps}
        return own - {""}


ENV_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)")
QUOTED = re.compile(r"""(?:'([^']*)'|"([^"]*)")\s*(?:#.*)?""")
APP_KEY = re.compile(r"UPSTOX_(CLIENT_ID|CLIENT_SECRET|API_NAME)_([0-9]{1,3})")


def parse_env(text: str, source: str) -> tuple[dict[str, str], list[str]]:
    """The settings of an env file's text, and a problem for each line that is not KEY=value."""
    settings, problems = {}, []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = ENV_LINE.fullmatch(line) if line.replace("\t", " ").isprintable() else None
        value = match[2] if match else ""
        if quoted := QUOTED.fullmatch(value):
            value = quoted[1] or quoted[2] or ""
        elif value.startswith(("'", '"')):
            match = None
        else:
            value = re.sub(r"\s#.*", "", value).strip()
        if match:
            settings[match[1]] = value
        else:
            problems.append(f"{source}, line {number}: expected KEY=value")
    return settings, problems


def read_env_file(path: Path) -> tuple[dict[str, str], list[str]]:
    """Parse an env file; one that others may read is refused (it holds the PIN)."""
    try:
        with path.open("rb") as file:
            if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
                raise ConfigError(
                    f"{path} may be read by other users. Run: chmod 600 {shlex.quote(str(path))}",
                    "Where chmod has no effect (a Windows drive under WSL), keep the file elsewhere and "
                    "name it with --env-file, or use real environment variables.")
            data = file.read(BODY_LIMIT)
        return parse_env(data.decode(), str(path))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"The env file {path} cannot be read: {error.strerror}.") from None


def first_existing(name: str) -> Path | None:
    """The file of that name in the current folder, else beside the script."""
    places = (here() / name, Path(__file__).parent / name)
    return next((place for place in places if place.exists()), None)


def here() -> Path:
    """The current folder; where that was deleted, the script's."""
    try:
        return Path.cwd()
    except OSError:
        return Path(__file__).absolute().parent


def web_address(value: str) -> urllib.parse.SplitResult | None:
    """The parts of an http or https URL, None when it is none."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(value)
        if re.fullmatch(r"https?://[!-~]+", value) and parts.hostname and parts.port != 0:
            return parts
    return None


def loopback(host: str | None) -> bool:
    """Whether a host name or address stays on this machine; 127.0.0.1.example.com does not."""
    return bool(re.fullmatch(r"127(\.[0-9]{1,3}){3}|::1|([^.]+\.)*localhost", host or ""))


def is_base_url(value: str) -> bool:
    """https, or http on loopback only: the bearer token travels there."""
    parts = web_address(value)
    bare = parts is not None and not parts.path.strip("/") and not re.search("[?#@]", value)
    return bare and (parts.scheme == "https" or loopback(parts.hostname))


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


PLAIN = re.compile(r"[!-~]{1,255}")
RULES: dict[str, tuple[Callable[[str], object], str]] = {
    "UPSTOX_MOBILE_NUMBER": (re.compile(r"[6-9][0-9]{9}").fullmatch,
                             "must be 10 digits beginning 6-9, without +91"),
    "UPSTOX_PIN": (re.compile(r"[0-9]{6}").fullmatch, "must be 6 digits"),
    "UPSTOX_TOTP": (is_totp_secret, "must be the base32 secret shown when TOTP was switched on, not a code; "
                                    "at least 112 bits (23 characters)"),
    "UPSTOX_REDIRECT_URI": (web_address, "must be the http or https URL registered with the apps"),
    "UPSTOX_NOTIFIER_WEBHOOK_URI": (is_notifier, "must be the http or https URL registered with the apps and "
                                                 "have a path of its own"),
    "UPSTOX_BASE_URL": (is_base_url, "must be an https URL (http on loopback only) without a path"),
    "UPSTOX_CONFIG_SOURCE": (("ENV", "DB").__contains__, "must be ENV or DB"),
    "UPSTOX_SERVE_KEY": (re.compile(r"[!-~]{16,255}").fullmatch,
                         "must have 16 characters or more, without spaces"),
    "UPSTOX_ALLOWED_ORIGINS": (are_origins, "must be origins such as http://localhost:5173, comma separated"),
}
FLOW_KEYS = {"SELENIUM": ("UPSTOX_MOBILE_NUMBER", "UPSTOX_PIN", "UPSTOX_TOTP"),
             "V3": ("UPSTOX_NOTIFIER_WEBHOOK_URI",)}


def env_apps(settings: Mapping[str, str]) -> list[dict[str, Any]]:
    """The raw fields of every app named in the settings, in order of its number."""
    found: dict[int, dict[str, Any]] = {}
    for key, value in settings.items():
        if match := APP_KEY.fullmatch(key):
            found.setdefault(int(match[2]), {"index": int(match[2])})[match[1].lower()] = value
    return [found[index] for index in sorted(found)]


def check_apps(raw: Sequence[Mapping[str, Any]], label: str) -> list[str]:
    """The problems of the apps of either source by the guide's rules (3.2); `label` takes FIELD and INDEX."""
    numbers, problems = [app["index"] for app in raw], []

    def say(index: int, name: str, text: str) -> None:
        problems.append(f"{label.format(field=name.upper(), index=index)}: {text}")

    if not raw:
        say(0, "client_id", "is not set; at least one app is needed")
    if len(raw) > 6 or set(numbers) - set(range(6)):
        say(numbers[-1], "client_id", "at most six apps, numbered 0 to 5")
    else:
        for gap in sorted(set(range(max(numbers, default=0))) - set(numbers)):
            say(gap, "client_id", "is not set; apps are numbered from 0 without a gap")
    enabled = [app for app in raw if app.get("enabled", True)]
    for place, app in enumerate(enabled):
        for name in ("api_name", "client_id", "client_secret"):
            value = app.get(name, "")
            if not value:
                say(app["index"], name, "is not set")
            elif name == "api_name" and value not in API_NAMES:
                say(app["index"], name, "must be one of " + ", ".join(API_NAMES))
            elif not PLAIN.fullmatch(value):
                say(app["index"], name, "must be printable characters without spaces, at most 255")
            elif name != "client_secret" and value in [other.get(name) for other in enabled[:place]]:
                say(app["index"], name, "is used by two apps")
        if app.get("redirect_uri") and not web_address(app["redirect_uri"]):
            say(app["index"], "redirect_uri", "must be the http or https URL registered with the app")
    return problems


def build_config(settings: Mapping[str, str], problems: Sequence[str], needed: Sequence[str],
                 stored: Sequence[Mapping[str, Any]] | None = None) -> Config:
    """Check everything, all problems at once as one ConfigError. `stored`: the apps of source DB."""
    totp = re.sub(r"[\s=]", "", settings.get("UPSTOX_TOTP", "")).upper()
    settings = {**settings, "UPSTOX_TOTP": totp} if totp else settings
    raw = env_apps(settings) if stored is None else stored
    label = "UPSTOX_{field}_{index}" if stored is None else "upstox_api_configs, api_index {index}, {field}"
    redirect = settings.get("UPSTOX_REDIRECT_URI", "")
    enabled = [app for app in raw if app.get("enabled", True)]
    if enabled and all(app.get("redirect_uri") for app in enabled):
        needed = [key for key in needed if key != "UPSTOX_REDIRECT_URI"]
    found = [f"{key}: is not set" for key in needed if key not in settings]
    found += [f"{key}: {text}" for key, (fits, text) in RULES.items()
              if key in settings and not fits(settings[key])]
    if stored is not None and not enabled:
        found.append("upstox_api_configs: no row is enabled. Fill the table with --import-config.")
    else:
        found += check_apps(raw, label)
    if problems or found:
        raise ConfigError(*problems, *found)
    apps = tuple(App(app["index"], app["api_name"], app["client_id"], app["client_secret"],
                     app.get("redirect_uri") or redirect) for app in enabled)
    get = settings.get
    origins = tuple(part.strip().rstrip("/").lower() for part in get("UPSTOX_ALLOWED_ORIGINS", "").split(","))
    return Config(apps, get("UPSTOX_BASE_URL", BASE_URL).rstrip("/"), get("UPSTOX_MOBILE_NUMBER", ""),
                  get("UPSTOX_PIN", ""), totp, get("UPSTOX_NOTIFIER_WEBHOOK_URI", ""),
                  get("UPSTOX_SERVE_KEY", ""), origins)


def require_for_flow(config: Config, flow: str) -> None:
    """A ConfigError when this installation lacks what a login by this flow needs."""
    have = {"UPSTOX_MOBILE_NUMBER": config.mobile, "UPSTOX_PIN": config.pin, "UPSTOX_TOTP": config.totp,
            "UPSTOX_NOTIFIER_WEBHOOK_URI": config.notifier}
    problems = [f"{key}: is not set; flow {flow} needs it" for key in FLOW_KEYS[flow] if not have[key]]
    packages = ("selenium", "pyotp") if flow == "SELENIUM" else ()
    modules = [name for name in packages if not importlib.util.find_spec(name)]
    if modules:
        problems.append(f"{' and '.join(modules)} missing. Run: {shlex.quote(sys.executable)} -m pip install "
                        + " ".join(modules))
    if problems:
        raise ConfigError(*problems)


# ---- Time: when a token dies ---------------------------------------------------------------------


def cutoff_after(moment: float) -> float:
    """The first 03:30 Indian time strictly after `moment` (epoch seconds): the broker's rule."""
    local = datetime.fromtimestamp(moment, IST)
    cutoff = local.replace(hour=3, minute=30, second=0, microsecond=0)
    return (cutoff if local < cutoff else cutoff + timedelta(days=1)).timestamp()


def local_text(moment: float) -> str:
    """`yyyy-MM-dd HH:mm:ss` in the machine's zone: the only form the Java reader parses."""
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M:%S")


def parse_time(value: object) -> float | None:
    """Epoch seconds of a date text (local time unless it names an offset), None when it is none."""
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if not isinstance(text, str) or not re.match(r"\s*[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        return None
    text = re.sub(r"\.([0-9]+)", lambda m: "." + m[1][:6].ljust(6, "0"), text.strip().replace("Z", "+00:00"))
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def parse_created(value: object) -> float | None:
    """Epoch seconds of a created_at in any form that writers of SQLite leave (facts/measured.md 1)."""
    try:
        number = float(value)
        julian = isinstance(value, float) and number < 1e7
        moment = (number - 2440587.5) * 86400 if julian else number / 1000 if number >= 1e11 else number
    except (ValueError, TypeError):
        moment = parse_time(value)
    return moment if moment is not None and 0 < moment < 1e10 else None  # beyond: no date that anyone meant


# ---- The broker's HTTP API -----------------------------------------------------------------------


@dataclass(eq=False)
class Answer:
    """An HTTP answer, or in `error` why there is none: timeout, no connection, unexpected answer."""

    code: int = 0
    body: bytes = field(default=b"", repr=False)
    date: str = ""
    error: str = ""


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body, {} when it is anything else."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def error_code(answer: Answer) -> tuple[str, str]:
    """(code, message) of the broker's error envelope; it sends two spellings of the key."""
    errors = json_object(answer.body).get("errors")
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
    problem = answer.error or (f"HTTP {answer.code}" if answer.code != 200 else "unexpected answer")
    return f"the broker gave no usable answer ({problem}). Look at status.upstox.com, then run again."


def side_by_side(calls: Sequence[Callable[[], Any]], seconds: float, late: Any, grace: float = 0) -> list:
    """Results of the calls, each in a thread of its own; `late` for those not back after `seconds` overall.

    urllib's own timeout is per socket operation and never ends a dripping answer; a daemon thread that is
    still reading then does not keep the program alive. A signal goes on after `grace` seconds for the calls.
    """
    results, ended = [late] * len(calls), [threading.Event() for _ in calls]
    bugs: list[Exception] = []

    def work(place: int) -> None:
        try:
            results[place] = calls[place]()
        except Exception as error:
            bugs.append(error)
        finally:
            ended[place].set()

    def wait(limit: float) -> None:  # by event: an interrupted join makes a thread count as ended (3.11)
        end = time.monotonic() + limit
        for event in ended:
            event.wait(max(0.0, end - time.monotonic()))

    try:
        for place in range(len(calls)):
            threading.Thread(target=work, args=(place,), daemon=True).start()
        wait(seconds)
    except BaseException:
        wait(grace)
        raise
    if bugs:
        raise bugs[0]
    return list(results)


class Broker:
    """The calls of the broker's API that this program makes; none follows a redirect or raises."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.opener = urllib.request.OpenerDirector()  # bare: no redirects, no files, every status returned
        self.opener.add_handler(urllib.request.HTTPHandler())
        if base_url.startswith("https:"):  # on loopback no proxy: it would read the bearer token
            self.opener.add_handler(urllib.request.ProxyHandler())
            self.opener.add_handler(urllib.request.HTTPSHandler(context=ssl.create_default_context()))

    def send(self, path: str, seconds: float = PROFILE_SECONDS, *, data: bytes | None = None,
             **headers: str) -> Answer:
        """One request; GET, or POST when there is data. The deadline covers the body too."""
        end = time.monotonic() + seconds
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.base_url + path, data, {"Accept": "application/json", **named})
        try:
            with self.opener.open(request, timeout=seconds) as response:
                body = b""
                while chunk := response.read1(65536):
                    body += chunk
                    if len(body) > BODY_LIMIT or time.monotonic() > end:
                        return Answer(error="timeout" if len(body) <= BODY_LIMIT else "unexpected answer")
                if len(body) != int(response.headers.get("Content-Length") or len(body)):
                    return Answer(error="unexpected answer")
                return Answer(response.status, body, response.headers.get("Date", ""))
        except TimeoutError:
            return Answer(error="timeout")
        except OSError as error:
            slow = isinstance(getattr(error, "reason", None), TimeoutError)
            return Answer(error="timeout" if slow else "no connection")
        except (http.client.HTTPException, ValueError):
            return Answer(error="unexpected answer")

    def profile(self, token: str) -> Answer:
        """GET /v2/user/profile: the only proof that a token is alive."""
        return self.send("/v2/user/profile", Authorization=f"Bearer {token}")

    def dialog_path(self, app: App, state: str) -> str:
        """Path and query of the authorize dialog."""
        return "/v2/login/authorization/dialog?" + urllib.parse.urlencode({
            "response_type": "code", "client_id": app.client_id, "redirect_uri": app.redirect_uri,
            "state": state})

    def preflight(self, app: App) -> Answer:
        """Ask for the authorize dialog without following it: costs no OTP, tells a wrong pair."""
        return self.send(self.dialog_path(app, "preflight"))

    def exchange(self, app: App, code: str) -> Answer:
        """POST the authorization code; it is spent whatever the answer is."""
        form = {"code": code, "client_id": app.client_id, "client_secret": app.client_secret,
                "redirect_uri": app.redirect_uri, "grant_type": "authorization_code"}
        return self.send("/v2/login/authorization/token", EXCHANGE_SECONDS,
                         data=urllib.parse.urlencode(form).encode())

    def request_token(self, app: App) -> Answer:
        """Flow V3: ask for a token that the user approves on the phone."""
        path = f"/v3/login/auth/token/request/{urllib.parse.quote(app.client_id, safe='')}"
        return self.send(path, data=json.dumps({"client_secret": app.client_secret}).encode(),
                         Content_Type="application/json")


# ---- Database: the source of truth, shared with a Java back end ----------------------------------

DB_REMEDIES = (
    ("locked", "is locked by another program. Close what holds it, or try again in a minute."),
    ("not a database", "is not a SQLite database. Name the right file with --db."),
    ("malformed", "is damaged. Restore it from a backup, or rescue it with sqlite3's .recover."),
    ("readonly", "cannot be written. Give this user write permission on the file and on its folder."),
    ("unable to open", "cannot be opened. Check that its folder exists and that this user may write there."),
    ("is full", "cannot grow: the disk is full. Free some space."),
    ("is a view", "has a view named upstox_tokens. A table is needed: rename the view or use another file."),
    ("no column named", "lacks a column of the guide's table upstox_tokens. Add it, or use another file."),
    ("no such column", "lacks a column of the guide's table upstox_tokens. Add it, or use another file."),
    ("NOT NULL", "demands a value that the guide's INSERT does not give. Give that column a default."),
    ("UNIQUE", "has a row in the way of a unique index. Remove that row."),
)


@dataclass
class Token:
    """A stored row, as far as this program reads it."""

    api_name: str
    access_token: str = field(repr=False)
    client_id: str | None
    created: float | None
    validity_at: Any
    generated_at: Any
    is_active: Any = 1


def database_error(path: Path, error: Exception) -> DatabaseError:
    """One sentence with the path, the remedy, and what SQLite said."""
    remedy = next((words for key, words in DB_REMEDIES if key in str(error)), "cannot be used.")
    return DatabaseError(f"The database {path} {remedy} (SQLite: {printable(error, 200)})")


def connect(path: Path, mode: str, seconds: float) -> sqlite3.Connection:
    """Open an existing database; `mode` is ro or rw, `seconds` the patience with locks."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=seconds, isolation_level=None)
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    return connection


@contextlib.contextmanager
def transaction(path: Path, seconds: float = READ_SECONDS) -> Iterator[sqlite3.Connection]:
    """BEGIN IMMEDIATE; commits, or rolls back on any exception. Keep it to milliseconds: others wait."""
    try:
        with contextlib.closing(connect(path, "rw", seconds)) as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
    except sqlite3.Error as error:
        raise database_error(path, error) from None


def select(path: Path, query: str) -> list[tuple]:
    """Rows of a query without writing anything; none when the file or the table is missing."""
    for mode in ("ro", "rw") if path.exists() else ():
        try:
            with contextlib.closing(connect(path, mode, READ_SECONDS)) as connection:
                return connection.execute(query).fetchall()
        except sqlite3.Error as error:
            if "no such table" in str(error):
                break
            # what a killed writer left must be rolled back before anyone can read: that takes rw
            if mode == "rw" or not re.search("readonly|unable to open", str(error)):
                raise database_error(path, error) from None
    return []


def read_tokens(path: Path) -> dict[str, Token]:
    """The newest row of each api_name, in any form that other programs leave."""
    rows = select(path, "SELECT api_name, access_token, client_id, created_at, validity_at, generated_at, "
                        "is_active FROM upstox_tokens ORDER BY id")
    tokens: dict[str, Token] = {}
    for name, token, client_id, created, *rest in rows:
        text = token.decode("utf-8", "replace") if isinstance(token, bytes) else str(token or "")
        row = Token(str(name), text, client_id, parse_created(created), *rest)
        older = tokens.get(row.api_name)
        if older is None or (row.created or 0) >= (older.created or 0):
            tokens[row.api_name] = row
    return tokens


def create_database(path: Path) -> bool:
    """Make the file (mode 0600) and the guide's table where missing; True when the file is new."""
    new = not path.exists()
    try:
        if new:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise DatabaseError(f"The database {path} cannot be created: {error.strerror}. With --db name a "
                            "file in a folder that exists and that this user may write.") from None
    if not select(path, "SELECT 1 FROM sqlite_master WHERE name = 'upstox_tokens'"):
        with transaction(path, PROOF_SECONDS) as connection:
            connection.execute(TOKENS_DDL)
    return new


def token_row(app: App, access_token: str, now: float, valid_until: float) -> dict[str, Any]:
    """The columns of the guide's INSERT (4.1); a plain Java reader parses exactly these forms."""
    return {"access_token": access_token, "api_name": app.name, "client_id": app.client_id,
            "client_secret": app.client_secret, "created_at": int(now * 1000),
            "expires_in": int(valid_until - now), "is_primary": int(app.name == "PRIMARY"),
            "redirect_uri": app.redirect_uri, "token_type": "Bearer", "api_index": app.index,
            "generated_at": local_text(now), "is_active": 1, "updated_at": int(now * 1000),
            "validity_at": local_text(valid_until)}


def upsert(connection: sqlite3.Connection, row: Mapping[str, Any]) -> None:
    """Replace the row of one api_name (the guide 4.1)."""
    connection.execute("DELETE FROM upstox_tokens WHERE api_name = :api_name", row)
    connection.execute(f"INSERT INTO upstox_tokens ({', '.join(row)}) VALUES (:{', :'.join(row)})", row)


def prove_writable(path: Path, apps: Iterable[App], now: float) -> None:
    """The real DELETE and INSERT for each app, rolled back: no login for a database that refuses tokens."""
    with transaction(path, PROOF_SECONDS) as connection:
        for app in apps:
            upsert(connection, token_row(app, app.name.ljust(2000, "x"), now, now + 1))
        connection.rollback()


def deactivate(path: Path, tokens: Iterable[Token], now: float) -> None:
    """Mark tokens that the broker answered 401 for; a row replaced meanwhile is left alone."""
    with transaction(path, PROOF_SECONDS) as connection:
        connection.executemany("UPDATE upstox_tokens SET is_active = 0, updated_at = ? "
                               "WHERE api_name = ? AND access_token = ?",
                               [(int(now * 1000), token.api_name, token.access_token) for token in tokens])


def add_audit(connection: sqlite3.Connection, *row: Any) -> None:
    """at (epoch ms), run_id, api_name, source, flow, outcome, reason; the table is made when first needed."""
    connection.execute(AUDIT_DDL)
    connection.execute("INSERT INTO upstox_token_audit (at, run_id, api_name, source, flow, outcome, reason) "
                       "VALUES (?, ?, ?, ?, ?, ?, ?)", row)


def import_apps(path: Path, apps: Iterable[App], now: float) -> None:
    """Copy the app configuration into upstox_api_configs; rows in the way are replaced, others kept."""
    with transaction(path, PROOF_SECONDS) as connection:
        connection.execute(CONFIGS_DDL)
        for app in apps:
            connection.execute("DELETE FROM upstox_api_configs WHERE api_index = ? OR api_name = ?",
                               (app.index, app.name))
            connection.execute(
                "INSERT INTO upstox_api_configs (api_index, api_name, client_id, client_secret, "
                "redirect_uri, is_primary, is_enabled, created_at, updated_at) "
                "VALUES (?, ?, ?, ?, ?, ?, 1, ?, ?)",
                (app.index, app.name, app.client_id, app.client_secret, app.redirect_uri or None,
                 int(app.name == "PRIMARY"), int(now * 1000), int(now * 1000)))


def stored_apps(path: Path) -> list[dict[str, Any]]:
    """The raw fields of the rows of upstox_api_configs."""
    rows = select(path, "SELECT api_index, api_name, client_id, client_secret, redirect_uri, is_enabled "
                        "FROM upstox_api_configs ORDER BY api_index")
    names = ("api_name", "client_id", "client_secret", "redirect_uri")
    return [{"index": index if isinstance(index, int) else -1,
             "enabled": str(enabled).lower() in ("1", "true"),
             **{name: str(value or "") for name, value in zip(names, values)}}
            for index, *values, enabled in rows]


def find_database(db: str | os.PathLike | None) -> Path:
    """--db, else an existing vega_trade.db here or beside the script, else one to be created here."""
    path = Path(db) if db else first_existing(DATABASE_NAME) or here() / DATABASE_NAME
    if path.is_dir() or not path.exists() and (path.is_symlink() or not path.absolute().parent.is_dir()):
        what = "it is a folder" if path.is_dir() else "its folder does not exist"
        raise DatabaseError(f"The database {path} cannot be used: {what}. Name a file with --db.")
    return path


# ---- Status of a token: time, then the broker's profile answer -----------------------------------

PLAIN_TOKEN = re.compile(r"[!-~]{1,8000}")


@dataclass(eq=False)
class Status:
    """What is known of one app's token. `word` is VALID, INVALID, EXPIRED, NOT FOUND or UNKNOWN."""

    api_name: str
    word: str
    reason: str = ""
    token: Token | None = None

    @property
    def label(self) -> str:
        """The status as the summary shows it."""
        return f"{self.word} ({self.reason})" if self.reason else self.word


def judge_stored(token: Token | None, client_id: str | None, now: float) -> tuple[str, str] | None:
    """(word, reason) from the row alone, None when only the broker can tell (contract 4, steps 1-3)."""
    if token is None or not token.access_token.strip():
        return "NOT FOUND", ""
    if str(token.is_active).lower() in ("0", "false"):
        return "INVALID", "inactive"
    if token.client_id and token.client_id != client_id:
        return "INVALID", "client changed"
    if not PLAIN_TOKEN.fullmatch(token.access_token):
        return "INVALID", "malformed token"  # it could not even be sent in a header
    valid_until = parse_time(token.validity_at)
    if valid_until is None:
        return "EXPIRED", "validity unreadable"
    if now >= valid_until or token.created is not None and now >= cutoff_after(token.created):
        return "EXPIRED", ""
    return None


def judge_profile(answer: Answer) -> tuple[str, str]:
    """(word, reason) from the broker's answer to the profile call (contract 4, step 4)."""
    if answer.error:
        return "UNKNOWN", answer.error
    if answer.code == 401:
        return "INVALID", "401"
    if answer.code == 200 and json_object(answer.body).get("status") == "success":
        return "VALID", ""
    return "UNKNOWN", str(answer.code) if answer.code >= 400 else "unexpected answer"


def check_tokens(config: Config, rows: Mapping[str, Token], broker: Broker, now: float) -> list[Status]:
    """The status of every configured app; the profile calls run side by side."""
    verdicts = {app.name: judge_stored(rows.get(app.name), app.client_id, now) for app in config.apps}
    asked = [name for name, verdict in verdicts.items() if verdict is None]
    answers = side_by_side([lambda name=name: broker.profile(rows[name].access_token) for name in asked],
                           PROFILE_SECONDS, Answer(error="timeout"))
    verdicts |= {name: judge_profile(answer) for name, answer in zip(asked, answers)}
    return [Status(name, *verdict, rows.get(name)) for name, verdict in verdicts.items()]


def access_token(api_name: str, db: str | os.PathLike | None = None) -> str:
    """The stored access token of one app, for Python programs.

    Raises TokenError with the reason when there is none, it is inactive, or its time is over (layer 1 of the
    guide's section 5); the broker is not asked.
    """
    path, name = find_database(db), api_name.upper()
    token = read_tokens(path).get(name)
    if verdict := judge_stored(token, token and token.client_id, time.time()):
        raise TokenError(f"{name} is {Status(name, *verdict).label} in {path}. "
                         "Run upstox_tokens.py --mode INVALID_ONLY.")
    return token.access_token


# ---- One run at a time, and what protects the account --------------------------------------------


def lock_exclusively(handle: int) -> bool:
    """Lock an open file; False when another process has it. The lock ends with its process."""
    try:
        import fcntl
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: a byte far behind the text, since locked bytes cannot be read
        import msvcrt
        try:
            os.lseek(handle, 1 << 30, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
    except OSError:
        return False
    return True


class AccountGuard:
    """The run lock of one database and, in the same file, the memory that keeps the account safe.

    The broker locks an account after five wrong PINs. So each code and PIN is counted here before it is sent,
    and the count is cleared when the broker took it; that outlives a killed process. The file holds no
    secret: `fingerprint`, an HMAC of mobile number and PIN under the TOTP secret, changes with any of them.
    """

    CODES = 2  # a refused TOTP code is followed by one more, from the next window

    def __init__(self, database: Path, config: Config) -> None:
        self.path = Path(f"{database.resolve()}.upstox-lock")
        self.handle: int | None = None
        self.state: dict[str, Any] = {}
        who = f"{config.mobile}:{config.pin}".encode()
        self.fingerprint = hmac.new(config.totp.encode(), who, hashlib.sha256).hexdigest()

    def acquire(self) -> None:
        """Become the one generating run of this database, or raise BusyError."""
        try:
            self.handle = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise DatabaseError(f"The lock file {self.path} cannot be opened: {error.strerror}. Give this "
                                "user write permission on it and on its folder.") from None
        if not lock_exclusively(self.handle):
            self.release()
            raise BusyError("Another run is busy generating tokens for this database. "
                            "Try again when it has ended.")
        self.load()

    def release(self) -> None:
        """Give the lock back; the file stays, since removing it would race with the next run."""
        if self.handle is not None:
            with contextlib.suppress(ImportError):  # a child just being forked may hold the file open
                import fcntl
                fcntl.flock(self.handle, fcntl.LOCK_UN)
            os.close(self.handle)
            self.handle = None

    def load(self) -> None:
        """Read the memory; another PIN, TOTP secret or mobile number in the configuration clears it."""
        state: dict[str, Any] = {}
        with contextlib.suppress(OSError):
            state = json_object(self.path.read_bytes())
        same = state.get("fingerprint") == self.fingerprint
        self.state = {**(state if same else {}), "window": state.get("window"),
                      "fingerprint": self.fingerprint}

    def save(self, **changes: Any) -> None:
        """Write through to the disk, in one write, before what is noted happens."""
        self.state.update(changes)
        try:
            os.lseek(self.handle, 0, os.SEEK_SET)
            os.write(self.handle, json.dumps(self.state).encode().ljust(1024))  # covers any longer text
            os.fsync(self.handle)
        except OSError as error:
            raise LoginFailed(f"{self.path} cannot be written: {error.strerror}. Nothing is sent that cannot "
                              "be noted first.", stops_run=True) from None

    def ease(self, **changes: Any) -> None:
        """Save what only loosens the counts, or explains them: a failure leaves them strict."""
        with contextlib.suppress(LoginFailed):
            self.save(**changes)

    def count(self, key: str) -> int:
        """A number: codes or pins sent since the broker last took one, or the window of the last code."""
        value = self.state.get(key)
        return value if isinstance(value, int) else 0

    def hold(self) -> str:
        """Why an unattended run must not log in, or an empty text."""
        if self.state.get("hold"):
            return printable(self.state["hold"], 300)
        if self.count("pins") > bool(self.state.get("proven")):  # one that was right before has one more try
            return "the broker did not answer to the last PIN that was sent"
        if self.count("codes") >= self.CODES:
            return "the broker did not take the last two TOTP codes that were sent"
        return ""


def totp_wait(now: float, last_window: int) -> float:
    """Seconds until a code may be sent that was never sent before and has time left."""
    window, left = int(now // TOTP_WINDOW), TOTP_WINDOW - now % TOTP_WINDOW
    used = min(last_window, window)  # a later one was noted by a clock that has been set back since
    return 0.0 if window > used and left >= TOTP_MARGIN else (window + 1) * TOTP_WINDOW - now


# ---- The browser ---------------------------------------------------------------------------------

# the login page's only stable names (facts/login-page.md): step -> (field id, button id)
STEPS = {"pin": ("pinCode", "pinContinueBtn"), "otp": ("otpNum", "continueBtn"),
         "mobile": ("mobileNum", "getOtp")}
CAPTCHA = 'iframe[src*="challenges.cloudflare.com"], .cf-turnstile'
LOOK = """
const [ids, captcha] = arguments, items = {};
for (const id of ids) {
  const e = document.getElementById(id);
  if (!e || !e.getClientRects().length || getComputedStyle(e).visibility === 'hidden') continue;
  items[id] = {enabled: !e.disabled, value: (e.value || '').replace(/[^0-9]/g, '')};
}
return {url: location.href, items, path: location.pathname, captcha: !!document.querySelector(captcha),
        text: (document.body ? document.body.innerText : '').slice(0, 20000)};
"""
# one step inside the page, so that no re-rendering comes between finding and clicking; a button that
# something covers (a spinner) has to wait, as it would for a person
PRESS = """
const e = document.getElementById(arguments[0]);
if (!e || e.disabled || !e.getClientRects().length) return false;
e.scrollIntoView({block: 'center'});
const r = e.getBoundingClientRect();
if (!e.contains(document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2))) return false;
e.click();
return true;
"""
BLANK = """
for (const e of document.querySelectorAll('input')) e.value = '';
const walk = document.createTreeWalker(document.documentElement, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) for (const secret of arguments[0])
  walk.currentNode.data = walk.currentNode.data.replaceAll(secret, '***');
"""
# a small process that holds the driver in a process group of its own, and ends it with all its browsers when
# our end of the pipe closes: at the end of a run, and just as well when this program was killed
KEEPER = """
import os, shutil, signal, subprocess, sys, time
os.mkdir(sys.argv[1], 0o700)
driver = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, start_new_session=True)
sys.stdin.buffer.read()
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


@dataclass(eq=False)
class View:
    """One look at the page: address, visible fields and buttons, text."""

    url: str = ""
    items: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    path: str = ""
    text: str = field(default="", repr=False)
    captcha: bool = False

    @property
    def step(self) -> str:
        """The step shown, or an empty text."""
        return next((step for step, (name, _) in STEPS.items() if name in self.items), "")

    def value(self, step: str) -> str | None:
        """Digits in the step's field, None when it is not shown."""
        return self.items.get(STEPS[step][0], {}).get("value")

    def ready(self, step: str) -> bool:
        """Whether the step's button can be pressed."""
        return bool(self.items.get(STEPS[step][1], {}).get("enabled"))

    def toast(self) -> tuple[str, str]:
        """(message, code) of an error toast; it lives 3 s and ends in [code]."""
        match = re.search(r"^(.*)\[([0-9]{3,7})\]\s*$", self.text, re.MULTILINE)
        return (printable(match[1], 200), match[2]) if match else ("", "")


def same_place(url: str, other: str) -> bool:
    """Whether two URLs agree in scheme, host, port and path."""
    def place(text: str) -> tuple:
        parts = urllib.parse.urlsplit(text)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
        return parts.scheme, parts.hostname, port, urllib.parse.unquote(parts.path) or "/"
    try:
        return place(url) == place(other)
    except ValueError:
        return False


def resolver_rules(redirect_uris: Iterable[str]) -> str:
    """Make the redirect's host unknown to the browser: the code stays in its address bar, unsent."""
    rules = set()
    for parts in map(urllib.parse.urlsplit, redirect_uris):
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        # without a port an http address may be tried as https first
        rules |= {f"MAP {host}:{port} ~NOTFOUND" for port in ([parts.port] if parts.port else [80, 443])}
    return ",".join(sorted(rules))


@contextlib.contextmanager
def browser_faults() -> Iterator[None]:
    """Turn what Selenium and its HTTP client raise into PageFault: their texts may quote what was typed."""
    import urllib3.exceptions
    from selenium.common.exceptions import WebDriverException
    try:
        yield
    except WebDriverException as error:
        reason = re.search(r"net::\w+|timeout|crashed|disconnected", str(error.msg))
        raise PageFault(reason[0] if reason else type(error).__name__) from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise PageFault(type(error).__name__) from None


class Browser:
    """One Chromium for a whole run, started when first needed and gone, profile and all, when closed."""

    def __init__(self, redirect_uris: Iterable[str], headed: bool, environ: Mapping[str, str]) -> None:
        self.redirect_uris, self.headed, self.environ = tuple(redirect_uris), headed, environ
        self.keeper: subprocess.Popen | None = None
        self.driver: Any = None

    def start(self) -> None:
        """Start driver and browser, or LoginFailed with what is missing."""
        driver_path, browser_path = find_driver(self.environ)
        profile = self.spawn(driver_path)
        os.environ.pop("SE_DEBUG", None)
        from selenium import webdriver  # takes a while to import: time for the driver to start
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.common.proxy import Proxy, ProxyType
        from selenium.webdriver.remote.client_config import ClientConfig
        for name in ("selenium", "urllib3"):
            logging.getLogger(name).setLevel(logging.WARNING)  # their debug log quotes every key typed
        options = webdriver.ChromeOptions()
        options.page_load_strategy = "eager"
        options.binary_location = browser_path
        # with a profile folder of its own Chromium would begin with its start page, from the network
        options.add_experimental_option("prefs", {"session.restore_on_startup": 4,
                                                  "session.startup_urls": ["about:blank"]})
        address = self.address()
        if not address:  # its random port may be taken on one of its two addresses: once more
            self.close()
            profile = self.spawn(driver_path)
            address = self.address()
        if not address:
            raise PageFault("chromedriver did not start")
        for argument in self.arguments(profile):
            options.add_argument(argument)
        # straight to the driver: a proxy would read every key typed
        config = ClientConfig(address, timeout=OUTCOME_SECONDS, proxy=Proxy({"proxyType": ProxyType.DIRECT}))
        with browser_faults():
            try:
                self.driver = webdriver.Remote(address, options=options, client_config=config)
            except WebDriverException as error:
                said = printable(str(error.msg).partition("\n")[0], 200)
                raise LoginFailed(f"the browser did not start ({said}). {INSTALL_BROWSER}",
                                  stops_run=True) from None
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

    def address(self) -> str:
        """Where the driver listens, empty when it ended instead."""
        return side_by_side([lambda: driver_address(self.keeper.stdout)], PAGE_SECONDS, "")[0]

    def arguments(self, profile: str) -> list[str]:
        """Chromium's switches. None hides that the browser is automated."""
        arguments = [f"--user-data-dir={profile}", "--window-size=1280,900", "--no-first-run",
                     "--disable-sync", "--disable-background-networking", "--disable-component-update",
                     "--disable-dev-shm-usage"]
        if rules := resolver_rules(self.redirect_uris):
            arguments.append(f"--host-resolver-rules={rules}")
        if not self.headed:
            arguments.append("--headless=new")
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            arguments.append("--no-sandbox")  # Chromium's sandbox does not run as root
        return arguments

    def child_environ(self, profile: str) -> dict[str, str]:
        """The environment of driver and browser: no secret of ours, no proxy for the redirect's host."""
        environ = {key: value for key, value in self.environ.items()
                   if not key.startswith(("UPSTOX_", "SE_"))}
        hosts = [urllib.parse.urlsplit(uri).hostname or "" for uri in self.redirect_uris]
        for key in ("no_proxy", "NO_PROXY"):
            environ[key] = ",".join(filter(None, [environ.get(key), *hosts]))
        # what Chromium leaves in the temporary folder goes with the profile
        own = {"TMPDIR": profile, "BREAKPAD_DUMP_LOCATION": profile} if sys.platform == "linux" else {}
        return environ | own

    def open(self, url: str) -> None:
        """Load a page. Ending at the unreachable redirect URI is arrival, not a fault."""
        if self.driver is None:
            self.start()
        from selenium.common.exceptions import WebDriverException
        with browser_faults():
            try:
                self.driver.get(url)
            except WebDriverException as error:
                if "ERR_NAME_NOT_RESOLVED" not in str(error.msg) or not self.arrived(self.driver.current_url):
                    raise

    def arrived(self, url: str) -> bool:
        """Whether an address is that of a redirect URI."""
        return any(same_place(url, uri) for uri in self.redirect_uris)

    def look(self) -> View:
        """What the page shows now; only its address while it is between two documents."""
        from selenium.common.exceptions import WebDriverException
        ids = [name for pair in STEPS.values() for name in pair]
        with browser_faults():
            try:
                view = View(**self.driver.execute_script(LOOK, ids, CAPTCHA))
                if view.url.startswith("http"):
                    return view
            except WebDriverException as error:
                if re.search("session|crash|disconnected|not reachable|no such window", str(error.msg)):
                    raise
            return View(self.driver.current_url)  # an error page does not know the address it stands for

    def wait(self, until: Callable[[View], object], seconds: float) -> View | None:
        """Look until the condition holds, less and less often; None when it does not in time."""
        start = time.monotonic()
        while not until(view := self.look()):
            spent = time.monotonic() - start
            if spent > seconds:
                return None
            time.sleep(min(0.02 + spent / 20, 0.5))
        return view

    def type(self, step: str, text: str) -> None:
        """Type over what the step's field holds. A field that has just vanished or changed is no error."""
        from selenium.common import exceptions as problems
        from selenium.webdriver.common.keys import Keys
        select_all = (Keys.COMMAND if sys.platform == "darwin" else Keys.CONTROL) + "a" + Keys.NULL
        with browser_faults(), contextlib.suppress(
                problems.ElementNotInteractableException, problems.InvalidElementStateException,
                problems.NoSuchElementException, problems.StaleElementReferenceException):
            self.driver.find_element("id", STEPS[step][0]).send_keys(select_all + text)

    def press(self, step: str) -> bool:
        """Press the step's button if it is there, enabled and not covered."""
        with browser_faults():
            return bool(self.driver.execute_script(PRESS, STEPS[step][1]))

    def evidence(self, stem: Path, hidden: Iterable[str]) -> None:
        """Store a screenshot and the page's text, with typed values and secrets blanked."""
        with browser_faults():
            self.driver.execute_script(BLANK, sorted(hidden))
            Path(f"{stem}.png").write_bytes(self.driver.get_screenshot_as_png())
            Path(f"{stem}.txt").write_text(redact(self.look().text, hidden), encoding="utf-8")

    def close(self) -> None:
        """End driver and browser and delete the profile; safe to call at any time."""
        keeper, self.keeper, self.driver = self.keeper, None, None
        if keeper:
            keeper.stdin.close()
            keeper.wait()
            keeper.stdout.close()


def find_driver(environ: Mapping[str, str]) -> tuple[str, str]:
    """Paths of driver and browser: the chromedriver on PATH, else what Selenium Manager finds or fetches."""
    if path := shutil.which("chromedriver", path=environ.get("PATH")):
        return path, ""
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.driver_finder import DriverFinder
    os.environ["SE_AVOID_STATS"] = "true"
    try:
        finder = DriverFinder(Service(), Options())
        return finder.get_driver_path(), finder.get_browser_path()
    except WebDriverException:
        raise LoginFailed(f"there is no chromedriver, and none could be fetched. {INSTALL_BROWSER}",
                          stops_run=True) from None


def driver_address(output: Any) -> str:
    """The address that a starting chromedriver announces, empty when it ends instead."""
    for line in output:
        if match := re.search(rb"started successfully on port (\d+)", line):
            return f"http://127.0.0.1:{int(match[1])}"
    return ""


# ---- The login page, step by step ----------------------------------------------------------------

LOCKED = LoginFailed("the account is locked after too many wrong PINs. Unlock it in the Upstox app (PAN and "
                     "OTP), then start the menu.", stops_run=True, operator=True, hold=True)
OTP_BLOCKED = LoginFailed("the broker blocked OTP entry for a while. Wait 10 minutes, then run again.",
                          stops_run=True)
SESSION_LOST = LoginFailed("the broker ended the login session. Run again.")
CONNECTION_LOST = LoginFailed("the login page lost its connection to the broker. Run again.", unanswered=True)
PAGE_CODES = {  # what the page's error codes mean (facts/upstox-api.md 2)
    "1017016": LoginFailed("the broker does not know the mobile number. Correct UPSTOX_MOBILE_NUMBER.",
                           stops_run=True, operator=True),
    "1017074": LoginFailed("several accounts are linked to the mobile number. Ask the broker to separate "
                           "them, or use --flow V3.", stops_run=True, operator=True),
    "1017069": LoginFailed("the broker's limit of OTP requests is reached. Wait 10 minutes, then run again.",
                           stops_run=True),
    "1017076": LoginFailed("the broker's OTP session expired. Run again."),
    "1017072": LoginFailed("the broker calls the login page's version outdated. Run again later."),
    "1017078": OTP_BLOCKED, "1017125": OTP_BLOCKED, "1017090": LOCKED, "500": CONNECTION_LOST,
    **dict.fromkeys(("1017007", "1017079", "1017084", "1017095", "1017105"), SESSION_LOST)}
PAGE_TEXTS = {  # alerts and pages that carry no code: pattern in the text or the path
    r"account has been locked|^/unlock-account": LOCKED,
    r"create a new (6-digit )?pin": LoginFailed(
        "the page asks to create a new PIN, which this program never does. Set the PIN in the Upstox app, "
        "then run again."),
    r"reactivate your account|^/reactivate-account": LoginFailed(
        "the account is dormant. Reactivate it in the Upstox app, then run again."),
    r"^something went wrong": LoginFailed("the login page says that something went wrong. Run again.")}
REFUSED = {  # any other code right after an entry
    "mobile": ("the broker did not accept the mobile number ({}). Check UPSTOX_MOBILE_NUMBER.", False),
    "otp": ("the broker refused the TOTP code ({}). Check UPSTOX_TOTP and this machine's clock, then start "
            "the menu.", True),
    "pin": ("the broker refused the PIN ({}). Correct UPSTOX_PIN: five wrong PINs lock the account.", True)}


def page_complaint(view: View, step: str) -> LoginFailed | None:
    """What the page says against going on after an entry in `step`, None when it says nothing."""
    for pattern, failure in PAGE_TEXTS.items():
        if re.search(pattern, view.text, re.I | re.M) or re.search(pattern, view.path):
            return failure
    if dialog := re.search(r"UDAPI\d+", view.text):
        unknown = ("the authorize dialog answered with an error", "Run again.")
        meaning, remedy = BROKER_ERRORS.get(dialog[0], unknown)
        return LoginFailed(f"{meaning} ({dialog[0]}). {remedy}")
    disabled = step == "otp" and not view.items.get("otpNum", {"enabled": True})["enabled"]
    if disabled and re.search(r"too many|exceeded|blocked|try again (after|in)", view.text, re.I):
        return OTP_BLOCKED
    message, code = view.toast()
    if code in PAGE_CODES or not code:
        return PAGE_CODES.get(code)
    text, hold = REFUSED.get(step, REFUSED["mobile"])
    return LoginFailed(text.format(f"{message} {code}".strip()), stops_run=True, operator=True, hold=hold)


def authorization_code(url: str, state: str) -> str:
    """The code in the redirect's address, if the state is the one this login sent."""
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)
    if query.get("state") != [state]:
        raise LoginFailed("the redirect came back with another state than this login sent, so its code was "
                          "not used. Run again; if it stays so, someone interferes with the connection.")
    if not query.get("code"):
        raise LoginFailed("the redirect came back without an authorization code. Run again.")
    return query["code"][0]


class Login:
    """One app's way through the login page. Looks at what is shown and acts on it, in whatever order."""

    def __init__(self, run: Run, app: App, guard: AccountGuard, browser: Browser) -> None:
        self.run, self.app, self.guard, self.browser = run, app, guard, browser
        self.typed = False  # once a secret was typed there is no second try
        self.under_way = False  # seeing the first step again then means a lost session

    def say(self, text: str) -> None:
        """One progress line."""
        self.run.reporter.step(self.app.name, text)

    def authorize(self) -> str:
        """Go through the page until the redirect; the authorization code."""
        state = secrets.token_urlsafe(16)
        self.say("opening the login page")
        self.browser.open(self.run.broker.base_url + self.run.broker.dialog_path(self.app, state))
        view = self.next_step("", PAGE_SECONDS)
        while view.step:
            view = {"mobile": self.enter_mobile, "otp": self.enter_totp, "pin": self.enter_pin}[view.step]()
        return authorization_code(view.url, state)

    def next_step(self, step: str, seconds: float) -> View:
        """Wait until the page shows another step than this one, or arrives; its complaint is raised."""
        def moved(view: View) -> object:
            return self.browser.arrived(view.url) or view.step not in ("", step) or page_complaint(view, step)
        view = self.browser.wait(moved, seconds)
        if view is None and not self.typed:
            raise PageFault("the page stayed blank")
        if view is None:
            raise LoginFailed(f"the login page did not go on within {seconds} s. Run again; if it stays so, "
                              "look at it with --headed.", unanswered=True)
        if complaint := page_complaint(view, step):
            raise copy.copy(complaint)
        if view.step == "mobile" and self.under_way:
            raise copy.copy(SESSION_LOST)
        return view

    def fill(self, step: str, text: str) -> None:
        """Type until the field holds the text; a page that re-renders may lose keys on the way."""
        self.typed = True
        for _ in range(20):
            self.browser.type(step, text)
            if self.browser.wait(lambda v: v.value(step) in (text, None) or page_complaint(v, step), 1.0):
                return
        raise LoginFailed(f"the login page did not take what was typed ({step}). Run again.")

    def press(self, step: str, text: str) -> tuple[bool, View | None]:
        """(whether the step's button was pressed, the last look), once it can be, while the text stays."""
        pressed = False

        def done(view: View) -> object:
            nonlocal pressed
            captcha = view.captcha and not view.ready(step)
            if view.value(step) != text or page_complaint(view, step) or captcha:
                return True
            pressed = view.ready(step) and self.browser.press(step)
            return pressed

        view = self.browser.wait(done, PAGE_SECONDS)
        return pressed, view

    def enter(self, step: str, text: str) -> bool:
        """Type and press, again where the page lost what was typed; False when it moved on by itself."""
        for _ in range(5):
            self.fill(step, text)
            pressed, view = self.press(step, text)
            if pressed:
                return True
            if view is None:
                raise LoginFailed(f"the page's button stayed disabled ({step}). Run again; if it stays so, "
                                  "look at it with --headed.", unanswered=True)
            if view.value(step) is None or page_complaint(view, step):
                return False
            if view.captcha and not view.ready(step):
                self.wait_for_captcha()
        raise LoginFailed(f"the login page did not keep what was typed ({step}). Run again.")

    def enter_mobile(self) -> View:
        """Mobile number, then Get OTP, which a CAPTCHA may keep disabled."""
        self.under_way |= self.enter("mobile", self.run.config.mobile)
        self.say("asked for the OTP step")
        return self.next_step("mobile", OUTCOME_SECONDS)

    def wait_for_captcha(self) -> None:
        """A CAPTCHA belongs to the operator; without a window it can only pass by itself."""
        if self.browser.headed:
            self.run.reporter.operator(self.app.name, "solve the CAPTCHA in the browser window")
        else:
            self.say("the page shows a CAPTCHA; waiting whether it passes by itself")
        seconds = CAPTCHA_HEADED_SECONDS if self.browser.headed else CAPTCHA_SECONDS
        passed = self.browser.wait(lambda v: v.ready("mobile") or v.step != "mobile", seconds)
        self.run.reporter.operator(self.app.name, "")
        if not passed:
            text = "nobody solved the CAPTCHA in time. Run again when an operator is there."
            if not self.browser.headed:
                text = ("the login page shows a CAPTCHA, which only a person may solve. Run with --headed on "
                        "a machine with a display, or use --flow V3.")
            raise LoginFailed(text, stops_run=True, operator=True, captcha=True)

    def enter_totp(self) -> View:
        """A code that was never sent before; if it is refused, one more from the next window."""
        while True:
            self.check_hold()
            self.enter("otp", self.fresh_code())
            self.say("TOTP code sent")
            try:
                view = self.next_step("otp", OUTCOME_SECONDS)
            except LoginFailed as refusal:
                self.count_off("codes", refusal)
                if not refusal.hold or self.guard.count("codes") >= self.guard.CODES:
                    raise
                self.say("the broker refused the TOTP code; trying once more with the next one")
                self.browser.wait(lambda v: not v.toast()[1], 10)  # or it would be taken for the next answer
                continue
            self.guard.ease(codes=0)
            return view

    def check_hold(self) -> None:
        """What an earlier app of this run left unanswered must not be sent again."""
        if hold := self.guard.hold():
            raise LoginFailed(f"{hold}. Find out why, then start the menu.", stops_run=True, operator=True)

    def count_off(self, key: str, failure: LoginFailed) -> None:
        """An answer that is no refusal of the secret (a lost session, say) takes back its count."""
        if not failure.hold and not failure.unanswered:
            self.guard.ease(**{key: self.guard.count(key) - 1})

    def fresh_code(self) -> str:
        """Wait for a window whose code was never sent, note it as sent, and give the code."""
        import pyotp
        self.run.pause(totp_wait(self.run.now(), self.guard.count("window")), self.app.name, "next TOTP code")
        now = self.run.now()
        code = pyotp.TOTP(self.run.config.totp).at(int(now))
        self.run.hidden.add(code)
        self.guard.save(window=int(now // TOTP_WINDOW), codes=self.guard.count("codes") + 1)
        return code

    def enter_pin(self) -> View:
        """The PIN, once. It is noted before it is typed, so that even a killed run is remembered."""
        self.check_hold()
        self.guard.save(pins=self.guard.count("pins") + 1)
        self.under_way |= self.enter("pin", self.run.config.pin)
        self.say("PIN sent" if self.under_way else "the page left the PIN step by itself")
        try:
            view = self.next_step("pin", OUTCOME_SECONDS)
        except LoginFailed as failure:
            self.count_off("pins", failure)
            raise
        if view.step:  # a stale session went back to the first step by itself, before the PIN went out
            self.guard.ease(pins=self.guard.count("pins") - 1)
        else:
            self.guard.ease(pins=0, proven=True)
        return view


# ---- A generating run ----------------------------------------------------------------------------


class Reporter:
    """Where a run tells its progress; this one tells nobody."""

    def step(self, api_name: str, text: str) -> None:
        """One step of one app."""

    def countdown(self, api_name: str, text: str, left: float) -> None:
        """A wait goes on; `left` seconds remain."""

    def operator(self, api_name: str, text: str) -> None:
        """The run waits for a person; an empty text ends that."""

    def result(self, api_name: str, outcome: Outcome) -> None:
        """One app is through."""


@dataclass(eq=False)
class Outcome:
    """How one app fared: DONE, FAILED (tried), SKIPPED (not tried)."""

    state: str
    message: str
    status: Status | None = None


@dataclass
class Run:
    """Everything one run needs; clock and sleep are passed in so that tests need no patching."""

    config: Config
    path: Path
    broker: Broker
    reporter: Reporter
    source: str  # CLI, MENU or REST
    flow: str = "SELENIUM"
    headed: bool = False
    debug_dir: Path | None = None
    wait_seconds: float = 900
    go_ahead: Callable[[str], bool] | None = None  # asks the operator about a hold; None when unattended
    stopping: Callable[[], bool] = lambda: False
    listener: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext  # for flow V3
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    hidden: set[str] = field(default_factory=set, repr=False)  # secrets seen so far
    run_id: str = field(default_factory=lambda: secrets.token_hex(8))
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    operator: bool = False  # a person is needed
    captcha: bool = False

    def pause(self, seconds: float, api_name: str, text: str) -> None:
        """Sleep in short steps, telling how long it still takes."""
        end = self.now() + seconds
        while (left := end - self.now()) > 0:
            self.reporter.countdown(api_name, text, left)
            self.sleep(min(left, 1.0))

    def audit(self, api_name: str, outcome: str, reason: str = "") -> None:
        """One row per attempt."""
        row = (int(self.now() * 1000), self.run_id, api_name, self.source, self.flow, outcome, reason or None)
        self.write_audit(api_name, lambda connection: add_audit(connection, *row))

    def write_audit(self, api_name: str, write: Callable[[sqlite3.Connection], object]) -> None:
        """A database that cannot take the audit now does not stop the run."""
        try:
            with transaction(self.path) as connection:
                write(connection)
        except DatabaseError as error:
            self.reporter.step(api_name, f"the audit row was not written: {error}")

    def settle(self, app: App, outcome: Outcome) -> None:
        """Note one app's outcome; a success was audited when its token was stored."""
        outcome = Outcome(outcome.state, redact(outcome.message, self.hidden), outcome.status)
        self.outcomes[app.name] = outcome
        if outcome.state == "FAILED":
            self.audit(app.name, "FAILED", outcome.message)
        self.reporter.result(app.name, outcome)


@dataclass(eq=False)
class Result:
    """How a run ended: every configured app's status, and the outcomes of those it generated for."""

    statuses: list[Status]
    outcomes: dict[str, Outcome]
    wanted: list[str]
    operator: bool = False
    captcha: bool = False

    @property
    def exit_code(self) -> int:
        """The command line's exit code (contract 5); a failed renewal is not OK while the old token lives."""
        failed = any(outcome.state != "DONE" for outcome in self.outcomes.values())
        valid = {status.api_name for status in self.statuses if status.word == "VALID"}
        return OPERATOR if self.operator else NOT_VALID if failed or set(self.wanted) - valid else OK

    def failures(self) -> list[str]:
        """One line per app that got no token: why, and what to do next."""
        return [f"{name}: {'failed' if outcome.state == 'FAILED' else 'not tried'}: {outcome.message}"
                for name, outcome in self.outcomes.items() if outcome.state != "DONE"]


def choose(mode: str, named: Sequence[str], statuses: Sequence[Status]) -> list[str]:
    """The apps a mode generates for. UNKNOWN is neither valid nor invalid: INVALID_ONLY leaves it alone."""
    return [status.api_name for status in statuses
            if mode == "ALL" or mode == "PARTIAL" and status.api_name in named
            or mode == "INVALID_ONLY" and status.word in NEEDS_LOGIN]


class Session:
    """One generating run: begin() takes the lock and decides, finish() generates and gives the lock back."""

    def __init__(self, run: Run, mode: str, named: Sequence[str] = ()) -> None:
        self.run, self.mode, self.named = run, mode, list(named)
        self.guard = AccountGuard(run.path, run.config)
        self.statuses: list[Status] = []
        self.chosen: list[App] = []

    def begin(self) -> None:
        """Lock, read the statuses again, prove that the database can take the tokens; raises TokenError."""
        run = self.run
        self.guard.acquire()
        try:
            self.statuses = check_tokens(run.config, read_tokens(run.path), run.broker, run.now())
            names = choose(self.mode, self.named, self.statuses)
            self.chosen = [app for app in run.config.apps if app.name in names]
            if self.chosen:
                if create_database(run.path):
                    run.reporter.step("", f"created the database {run.path.resolve()}")
                prove_writable(run.path, self.chosen, run.now())
                refused = [status.token for status in self.statuses if status.reason == "401"]
                deactivate(run.path, refused, run.now())
        except BaseException:
            self.guard.release()
            raise

    def left_alone(self) -> list[str]:
        """A line that names what INVALID_ONLY leaves alone, since nobody knows whether it is valid."""
        unknown = [status.api_name for status in self.statuses if status.word == "UNKNOWN"]
        say = self.mode == "INVALID_ONLY" and unknown
        line = f"Not generated, since the broker could not be asked about it: {', '.join(unknown)}."
        return [line] if say else []

    def finish(self) -> Result:
        """Generate for the chosen apps, whatever happens to single ones."""
        run = self.run
        try:
            if self.chosen and run.flow == "V3":
                generate_by_phone(run, self.chosen)
            elif self.chosen:
                generate_by_browser(run, self.chosen, self.guard)
        finally:
            self.guard.release()
        fresh = {name: outcome.status for name, outcome in run.outcomes.items() if outcome.status}
        wanted = self.named if self.mode == "PARTIAL" else [app.name for app in run.config.apps]
        return Result([fresh.get(status.api_name, status) for status in self.statuses], run.outcomes, wanted,
                      run.operator, run.captcha)


def generate_by_browser(run: Run, apps: Sequence[App], guard: AccountGuard) -> None:
    """Flow SELENIUM: one browser, one app after the other; what holds for all apps stops the run."""
    blocker, refused = hold_reason(run, guard), {}
    run.operator = bool(blocker)
    if not blocker:
        blocker, refused = preflight(run, apps)
    with contextlib.closing(Browser([app.redirect_uri for app in apps], run.headed, run.environ)) as browser:
        for app in apps:
            if blocker or run.stopping():
                run.settle(app, Outcome("SKIPPED", blocker or "the program was stopped"))
                continue
            try:
                if app.name in refused:
                    raise LoginFailed(refused[app.name])
                run.settle(app, Outcome("DONE", "", generate_one(run, app, guard, browser)))
            except LoginFailed as failure:
                run.operator |= failure.operator
                run.captcha |= failure.captcha
                if failure.hold:
                    guard.ease(hold=f"{redact(failure.text, run.hidden)} ({local_text(run.now())})")
                if failure.stops_run:
                    blocker = f"the run stopped at {app.name}"
                run.settle(app, Outcome("FAILED", failure.text))


def hold_reason(run: Run, guard: AccountGuard) -> str:
    """Why no login may be tried now, or an empty text; an operator may lift it."""
    hold = guard.hold()
    if hold and run.go_ahead and run.go_ahead(hold):
        guard.ease(hold="", pins=0, codes=0)
        return ""
    return hold and (f"{hold.rstrip('.')}. No unattended login until PIN, TOTP secret or mobile number in "
                     "the configuration changes, or an operator goes ahead from the menu.")


def preflight(run: Run, apps: Sequence[App]) -> tuple[str, dict[str, str]]:
    """(what forbids every login, what is wrong with single apps), asked of the broker without any login."""
    answers = ask_dialogs(run.broker, apps, run.now)
    refused = {app.name: explain(answer) for app, (answer, _) in zip(apps, answers)
               if error_code(answer)[0] == "UDAPI100068"}
    return clock_problem(answers), refused


def ask_dialogs(broker: Broker, apps: Sequence[App], now: Callable[[], float]) -> list[tuple[Answer, float]]:
    """Each app's pre-flight answer, and when it came."""
    def ask(app: App) -> tuple[Answer, float]:
        return broker.preflight(app), now()
    late = (Answer(error="timeout"), now())
    return side_by_side([lambda app=app: ask(app) for app in apps], PROFILE_SECONDS, late)


def clock_problem(answers: Iterable[tuple[Answer, float]]) -> str:
    """A sentence when this machine's clock is too far from the broker's Date header for TOTP codes."""
    offsets = []
    for answer, at in answers:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            offsets.append(at - parsedate_to_datetime(answer.date).timestamp())
    offset = min(offsets, key=abs, default=0)
    if abs(offset) <= CLOCK_SECONDS:
        return ""
    place = "ahead of" if offset > 0 else "behind"
    return (f"this machine's clock is {abs(offset):.0f} s {place} the broker's, so its TOTP codes would be "
            "refused. Set the clock (timedatectl set-ntp true), then run again.")


def generate_one(run: Run, app: App, guard: AccountGuard, browser: Browser) -> Status:
    """Log in, exchange, store, audit, verify: in this order. The new token's status."""
    code = log_in(run, app, guard, browser)
    run.hidden.add(code)
    late = LoginFailed("the token exchange did not end in time. Run again.")
    seconds = EXCHANGE_SECONDS + STORE_SECONDS + 30
    stored = side_by_side([lambda: exchange_and_store(run, app, code)], seconds, late, grace=3)[0]
    if isinstance(stored, LoginFailed):
        raise stored
    run.reporter.step(app.name, "token stored")
    return verify(run, stored)


def log_in(run: Run, app: App, guard: AccountGuard, browser: Browser) -> str:
    """The authorization code; a fault before any secret was typed is tried once more with a fresh browser."""
    for attempt in (1, 2):
        login = Login(run, app, guard, browser)
        try:
            return login.authorize()
        except LoginFailed:
            keep_evidence(run, app, browser)
            raise
        except PageFault as fault:
            keep_evidence(run, app, browser)
            browser.close()
            if login.typed or attempt == 2:
                raise LoginFailed(f"the login page or the browser failed ({fault}). Run again; if it stays "
                                  "so, look at the page with --headed.") from None
            login.say(f"{fault}; trying once more with a fresh browser")
    raise AssertionError("unreachable")


def keep_evidence(run: Run, app: App, browser: Browser) -> None:
    """With --debug-dir: what the page looked like when a login failed."""
    if run.debug_dir and browser.driver:
        with contextlib.suppress(PageFault, OSError):
            run.debug_dir.mkdir(parents=True, exist_ok=True)
            browser.evidence(run.debug_dir / f"{app.name}-{datetime.now():%Y%m%d-%H%M%S}", run.hidden)


def exchange_and_store(run: Run, app: App, code: str) -> Token | LoginFailed:
    """Runs in a thread of its own, which no signal interrupts: a token that exists is stored."""
    answer = run.broker.exchange(app, code)
    token = json_object(answer.body).get("access_token") if answer.code == 200 else None
    if not isinstance(token, str) or not PLAIN_TOKEN.fullmatch(token):
        return LoginFailed(f"no token for the authorization code: {explain(answer)}")
    run.hidden.add(token)
    now = run.now()
    row = token_row(app, token, now, cutoff_after(now))
    try:
        store(run, row)
    except DatabaseError as error:
        return LoginFailed(f"the broker gave a token, but it could not be stored. {error}")
    run.audit(app.name, "GENERATED")
    return Token(app.name, token, app.client_id, now, row["validity_at"], row["generated_at"])


def store(run: Run, row: Mapping[str, Any]) -> None:
    """Write a token, patiently: it cost a login."""
    end = time.monotonic() + STORE_SECONDS
    while True:
        try:
            with transaction(run.path, 5) as connection:
                return upsert(connection, row)
        except DatabaseError as error:
            if time.monotonic() > end:
                raise
            run.reporter.step(row["api_name"], f"the token cannot be stored yet, trying again. {error}")
            run.sleep(1.0)


def verify(run: Run, token: Token) -> Status:
    """The new token's proof; one that the broker refuses is deactivated."""
    ask = [lambda: run.broker.profile(token.access_token)]
    answer = side_by_side(ask, PROFILE_SECONDS, Answer(error="timeout"))[0]
    status = Status(token.api_name, *judge_profile(answer), token)
    run.reporter.step(token.api_name, status.label)
    if status.reason == "401":
        with contextlib.suppress(DatabaseError):
            deactivate(run.path, [token], run.now())
    return status


# ---- Flow V3: approval on the phone --------------------------------------------------------------


@dataclass
class Delivery:
    """What the broker POSTs to the notifier URL after an approval, checked for its form only."""

    app: App
    user_id: str
    access_token: str = field(repr=False)
    valid_until: float


def parse_delivery(body: bytes, config: Config, now: float) -> Delivery | None:
    """The delivery in a webhook body, None when it is none for a configured app (facts/upstox-api.md 6)."""
    data = json_object(body)
    names = ("client_id", "user_id", "access_token", "token_type", "expires_at", "issued_at", "message_type")
    values = [data.get(name) for name in names]
    if not all(isinstance(value, str) and PLAIN_TOKEN.fullmatch(value) for value in values):
        return None
    client_id, user_id, token, token_type, expires_at, issued_at, message_type = values
    app = next((app for app in config.apps if app.client_id == client_id), None)
    times = re.fullmatch(r"[0-9]{13}", expires_at) and re.fullmatch(r"[0-9]{13}", issued_at)
    kind = (token_type, message_type)
    if not (app and times and kind == ("Bearer", "access_token") and len(user_id) <= 40):
        return None
    valid_until = int(expires_at) / 1000
    return Delivery(app, user_id, token, valid_until) if now < valid_until < now + 2 * 86400 else None


def approvable_until(connection: sqlite3.Connection, api_name: str) -> float:
    """Until when (epoch seconds) a request of ours for this app may be approved; 0 when there is none."""
    row = connection.execute(
        "SELECT outcome, reason FROM upstox_token_audit WHERE api_name = ? AND flow = 'V3' AND outcome IN "
        "('REQUESTED', 'REFUSED', 'GENERATED') ORDER BY id DESC LIMIT 1", (api_name,)).fetchone()
    asked = row is not None and row[0] == "REQUESTED"
    return parse_time(str(row[1]).removeprefix("until ")) or 0.0 if asked else 0.0


def account_owner(connection: sqlite3.Connection) -> str:
    """The broker's user id of this database's earlier deliveries, empty before the first."""
    row = connection.execute("SELECT reason FROM upstox_token_audit WHERE source = 'WEBHOOK' AND "
                             "outcome = 'GENERATED' ORDER BY id LIMIT 1").fetchone()
    return str(row[0]).removeprefix("user ") if row else ""


class Webhook:
    """Takes deliveries in at once, and proves and stores them in a thread of its own, the newest first.

    Anyone may post here, so nothing is believed: the app must have a request outstanding, and the token must
    give a profile of the same user. What cannot be proven now is kept and tried again until the request ends.
    """

    KEPT, PAUSE, RETRY = 256, 0.1, 5.0  # deliveries kept per app; seconds between proofs, and to another try

    def __init__(self, config: Config, path: Path, broker: Broker, now: Callable[[], float],
                 told: Callable[[str], None]) -> None:
        self.config, self.path, self.broker, self.now, self.told = config, path, broker, now, told
        self.queues: dict[str, deque[Delivery]] = {app.name: deque(maxlen=self.KEPT) for app in config.apps}
        self.arrived, self.ended, self.lock = threading.Event(), False, threading.Lock()
        threading.Thread(target=self.work, daemon=True).start()

    def receive(self, body: bytes) -> None:
        """Keep what may be a delivery; the sender learns nothing about it."""
        delivery = parse_delivery(body, self.config, self.now())
        with self.lock:
            if delivery and delivery not in self.queues[delivery.app.name]:
                self.queues[delivery.app.name].append(delivery)
                self.arrived.set()

    def work(self) -> None:
        """Prove and store until the program ends."""
        while not self.ended:
            self.arrived.wait(self.RETRY if any(self.queues.values()) else None)
            self.arrived.clear()
            for queue in self.queues.values():
                for _ in range(len(queue)):
                    with self.lock:
                        delivery = queue.pop()
                    if not self.settled(delivery):
                        with self.lock:
                            queue.appendleft(delivery)
                    time.sleep(self.PAUSE)

    def settled(self, delivery: Delivery) -> bool:
        """Store the delivery or drop it; False when that cannot be told now."""
        name = delivery.app.name
        try:
            if not self.expected(delivery):
                return True
            answer = self.broker.profile(delivery.access_token)
            word, _ = judge_profile(answer)
            user = json_object(answer.body).get("data")
            if word != "VALID" or not isinstance(user, dict) or user.get("user_id") != delivery.user_id:
                return word != "UNKNOWN"
            stored = self.expected(delivery, store=True)
        except DatabaseError as error:
            self.told(f"{name}: a delivered token cannot be stored yet, trying again. {error}")
            return False
        except Exception as error:  # a bug must not end the thread that all later deliveries need
            self.told(f"{name}: a delivery was dropped, internal error {type(error).__name__}")
            return True
        if stored:
            self.told(f"{name}: approved on the phone, token stored")
        return True

    def expected(self, delivery: Delivery, store: bool = False) -> bool:
        """Whether a request is outstanding for the app and the user is this database's; stores on demand."""
        now, name = self.now(), delivery.app.name
        with transaction(self.path) as connection:
            connection.execute(AUDIT_DDL)
            known = connection.execute("SELECT 1 FROM upstox_tokens WHERE api_name = ? AND access_token = ?",
                                       (name, delivery.access_token)).fetchone()  # delivered before: a replay
            fits = (not known and now < approvable_until(connection, name)
                    and account_owner(connection) in ("", delivery.user_id))
            if fits and store:
                upsert(connection, token_row(delivery.app, delivery.access_token, now, delivery.valid_until))
                add_audit(connection, int(now * 1000), secrets.token_hex(8), name, "WEBHOOK", "V3",
                          "GENERATED", f"user {delivery.user_id}")
            return fits


def until_text(end: float) -> str:
    """How a request's deadline stands in the audit table."""
    return f"until {datetime.fromtimestamp(end, IST).isoformat(timespec='seconds')}"


def generate_by_phone(run: Run, apps: Sequence[App]) -> None:
    """Flow V3: ask the broker for all apps, then wait until the webhook has stored what was approved."""
    before = read_tokens(run.path)
    with run.listener():
        for app in apps:  # noted first: a delivery may come before the broker's answer does
            run.audit(app.name, "REQUESTED", until_text(cutoff_after(run.now())))
        calls = [lambda app=app: run.broker.request_token(app) for app in apps]
        answers = side_by_side(calls, PROFILE_SECONDS, Answer(error="timeout"))
        ends: dict[App, float] = {}
        for app, answer in zip(apps, answers):
            try:
                ends[app] = approval_end(run, app, answer)
                amend_request(run, app, "REQUESTED", until_text(ends[app]))
            except LoginFailed as failure:
                amend_request(run, app, "REFUSED", failure.text)
                run.settle(app, Outcome("FAILED", failure.text))
        await_deliveries(run, before, ends)
    for app in ends:
        run.settle(app, Outcome("SKIPPED", "the program was stopped"))


def approval_end(run: Run, app: App, answer: Answer) -> float:
    """Until when the broker lets the request be approved; warns when it would deliver elsewhere."""
    data = json_object(answer.body).get("data")
    expiry = data.get("authorization_expiry") if isinstance(data, dict) else None
    if answer.code != 200 or not isinstance(expiry, str) or not re.fullmatch("[0-9]{13}", expiry):
        raise LoginFailed(f"no approval could be asked for: {explain(answer)}")
    end = int(expiry) / 1000
    until = local_text(min(end, run.now() + run.wait_seconds))[11:16]
    text = f"waiting for approval on the phone until {until}"
    if data.get("notifier_url") != run.config.notifier:
        text += (f". Warning: the broker will deliver to {printable(data.get('notifier_url'), 200)}, not to "
                 f"UPSTOX_NOTIFIER_WEBHOOK_URI. Change one of them, here or on {APP_PAGE}")
    run.reporter.step(app.name, text)
    return end


def amend_request(run: Run, app: App, outcome: str, reason: str) -> None:
    """What the broker said to a request that was noted before it was sent."""
    run.write_audit(app.name, lambda connection: connection.execute(
        "UPDATE upstox_token_audit SET outcome = ?, reason = ? WHERE run_id = ? AND api_name = ? "
        "AND outcome = 'REQUESTED'", (outcome, reason, run.run_id, app.name)))


def await_deliveries(run: Run, before: Mapping[str, Token], ends: dict[App, float]) -> None:
    """Watch the database, whoever receives, until every app is settled or its time is over."""
    give_up = run.now() + run.wait_seconds
    while ends and not run.stopping():
        rows = read_tokens(run.path)
        for app in list(ends):
            if rows.get(app.name) not in (None, before.get(app.name)):
                del ends[app]
                run.settle(app, Outcome("DONE", "", verify(run, rows[app.name])))
            elif run.now() >= min(ends[app], give_up):
                del ends[app]
                run.settle(app, Outcome("FAILED", "not approved in time. Approve it on the phone while "
                                        "--serve runs, or run again."))
        if ends:
            left = max(0.0, min(*ends.values(), give_up) - run.now())
            run.reporter.countdown("", f"waiting for approval on the phone ({len(ends)} left)", left)
            run.sleep(min(1.0, left))


# ---- Telling the operator, and asking ------------------------------------------------------------


def write(stream: TextIO, text: str) -> bool:
    """Write at once; a reader that went away (`| head`) or a full disk must not stop a run."""
    try:
        stream.write(text)
        stream.flush()
        return True
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # or the interpreter complains again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return False


class Console(Reporter):
    """Results to `out`, progress to `err`; on a terminal a wait counts down in place."""

    def __init__(self, out: TextIO, err: TextIO, ask: Callable[[str], str]) -> None:
        self.out, self.err, self.ask = out, err, ask
        self.quiet = self.counting = self.lost = False
        self.hidden: set[str] = set()
        self.places: dict[str, str] = {}

    def begin(self, names: Sequence[str]) -> None:
        """The apps of a run, in order, for the [2/6] of the progress lines."""
        self.places = {name: f"[{place}/{len(names)}] {name}: " for place, name in enumerate(names, 1)}

    def say(self, *lines: str) -> None:
        """Lines of the result."""
        self.lost |= not write(self.out, "".join(f"{line}\n" for line in lines))

    def log(self, text: str) -> None:
        """A line of progress or an error."""
        write(self.err, ("\n" if self.counting else "") + redact(text, self.hidden) + "\n")
        self.counting = False

    def step(self, api_name: str, text: str) -> None:
        if not self.quiet:
            self.log(self.places.get(api_name, "") + text)

    def countdown(self, api_name: str, text: str, left: float) -> None:
        line = f"{self.places.get(api_name, '')}{text} in {left:.0f} s"
        if not self.quiet and self.err.isatty():
            write(self.err, f"\r\033[K{line}")
            self.counting = True
        elif not self.quiet and self.last_count != (api_name, text):
            self.log(line)
        self.last_count = (api_name, text)

    last_count = ("", "")

    def operator(self, api_name: str, text: str) -> None:
        if text:
            self.step(api_name, text)

    def result(self, api_name: str, outcome: Outcome) -> None:
        if outcome.state != "DONE":
            self.step(api_name, outcome.message)

    def confirm(self, question: str) -> bool:
        """A yes or no question; nothing but yes is yes."""
        return self.ask(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def summary_lines(statuses: Sequence[Status], path: Path | None = None) -> list[str]:
    """The summary of the guide's 7.1."""
    valid, unknown = (sum(status.word == word for status in statuses) for word in ("VALID", "UNKNOWN"))
    lines = ["Token Status Summary:" + (f" {path.resolve()}" if path else ""), "-" * 34,
             *(f"{status.api_name:<14}: {status.label}" for status in statuses), "",
             f"Valid Tokens    : {valid}", f"Invalid Tokens  : {len(statuses) - valid - unknown}"]
    return lines + [f"Unknown Tokens  : {unknown}"] * bool(unknown)


def status_json(statuses: Sequence[Status], now: float) -> dict[str, Any]:
    """The summary for programs (the guide 7.2); EXPIRED counts as invalid."""
    def names(*words: str) -> list[str]:
        return [status.api_name for status in statuses if status.word in words]

    def stored(status: Status, name: str) -> str | None:
        value = getattr(status.token, name, None)
        return None if value is None else printable(value, 40)

    return {"valid": names("VALID"), "invalid": names("INVALID", "EXPIRED"), "missing": names("NOT FOUND"),
            "unknown": names("UNKNOWN"), "checkedAt": local_text(now),
            "tokens": [{"apiName": status.api_name, "status": status.word, "reason": status.reason,
                        "validityAt": stored(status, "validity_at"),
                        "generatedAt": stored(status, "generated_at")} for status in statuses]}


def parse_names(text: str, configured: Sequence[str], *, numbers: bool = False) -> list[str]:
    """API names from a comma separated text, any case, doubles once; ValueError names the first bad one."""
    names: list[str] = []
    for part in filter(None, (piece.strip().upper() for piece in text.split(","))):
        if numbers and re.fullmatch("[1-9]", part) and int(part) <= len(configured):
            part = configured[int(part) - 1]
        if part not in configured:
            raise ValueError(f"{printable(part, 40)} is not one of {', '.join(configured)}")
        names += [part] * (part not in names)
    if not names:
        raise ValueError("name at least one API")
    return names


def ask_action(console: Console, configured: Sequence[str]) -> tuple[str, list[str]] | None:
    """The operator's choice as (mode, names), None to abort (the guide 7.1). A bad answer is asked again."""
    console.say("", "Choose Action:", "1. Generate ALL", "2. Generate ONLY invalid",
                "3. Generate selected (comma separated)", "4. Abort")
    while (answer := console.ask("Choice: ").strip().lower()) not in ("1", "2", "3"):
        if answer in ("4", "q"):
            return None
        console.say("Please answer 1, 2, 3 or 4.")
    if answer != "3":
        return MODES[int(answer) - 1], []
    console.say("  ".join(f"{number}. {name}" for number, name in enumerate(configured, 1)))
    while (answer := console.ask("APIs (names or numbers): ")).strip().lower() != "q":
        try:
            return "PARTIAL", parse_names(answer, configured, numbers=True)
        except ValueError as error:
            console.say(f"{error}.")
    return None


def has_display(environ: Mapping[str, str]) -> bool:
    """Whether a visible browser can be opened."""
    return sys.platform != "linux" or bool(environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"))


# ---- Commands ------------------------------------------------------------------------------------


class Command:
    """One call of the program: options, configuration, console; a method for each verb."""

    def __init__(self, args: argparse.Namespace, config: Config, console: Console, environ: Mapping[str, str],
                 now: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self.args, self.config, self.console, self.environ = args, config, console, environ
        self.now, self.sleep, self.path = now, sleep, find_database(args.db)
        self.names = [app.name for app in config.apps]
        self.broker = Broker(config.base_url)
        if args.serve is not None:
            serve_address(args.serve, config)
        console.hidden |= config.secrets()

    def new_run(self, source: str, reporter: Reporter, **changes: Any) -> Run:
        """A generating run with this command's options."""
        args = self.args
        options = {"flow": args.flow, "headed": args.headed, "debug_dir": args.debug_dir, "now": self.now,
                   "wait_seconds": args.wait * 60, "sleep": self.sleep, "environ": self.environ,
                   "hidden": self.console.hidden}
        return Run(self.config, self.path, self.broker, reporter, source, **{**options, **changes})

    def name_strangers(self, rows: Iterable[str]) -> None:
        """One line for rows that are none of ours."""
        foreign = sorted(set(rows) - set(API_NAMES))
        if foreign and not self.args.quiet:
            self.console.log("Rows of unknown names are left untouched: "
                             + ", ".join(printable(name, 40) for name in foreign))

    def check_tokens(self) -> list[Status]:
        """Every app's status now."""
        rows = read_tokens(self.path)
        self.name_strangers(rows)
        return check_tokens(self.config, rows, self.broker, self.now())

    def say_summary(self, statuses: Sequence[Status]) -> None:
        """Print the summary."""
        self.console.say(*summary_lines(statuses, self.path if self.args.verbose else None))

    def generate(self, source: str, mode: str, named: Sequence[str], **changes: Any) -> Result:
        """One run, told on the console."""
        require_for_flow(self.config, self.args.flow)
        session = Session(self.new_run(source, self.console, listener=self.receiving, **changes), mode, named)
        session.begin()
        self.console.begin([app.name for app in session.chosen])
        for line in session.left_alone():
            self.console.log(line)
        return session.finish()

    def say_result(self, result: Result) -> None:
        """The summary at the end of a run, and what to do about the apps that failed."""
        self.say_summary(result.statuses)
        if lines := result.failures():
            self.console.say("", *lines)

    def status(self) -> int:
        """--status: look, write nothing."""
        statuses = self.check_tokens()
        if self.args.json:
            self.console.say(json.dumps(status_json(statuses, self.now()), indent=2))
        else:
            self.say_summary(statuses)
        return OK if all(status.word == "VALID" for status in statuses) else NOT_VALID

    def mode(self) -> int:
        """--mode: generate without asking."""
        try:
            named = parse_names(self.args.apis, self.names) if self.args.mode == "PARTIAL" else []
        except ValueError as error:
            raise ConfigError(f"--apis: {error}") from None
        self.name_strangers(read_tokens(self.path))
        result = self.generate("CLI", self.args.mode, named)
        if self.args.json:
            outcomes = [{"apiName": name, "state": outcome.state, "message": outcome.message}
                        for name, outcome in result.outcomes.items()]
            self.console.say(json.dumps({**status_json(result.statuses, self.now()), "results": outcomes,
                                         "exitCode": result.exit_code}, indent=2))
        else:
            self.say_result(result)
        return result.exit_code

    def menu(self) -> int:
        """The summary, the operator's choice, the run; offers a visible browser when a CAPTCHA came up."""
        console, statuses = self.console, self.check_tokens()
        self.say_summary(statuses)
        try:
            choice = ask_action(console, self.names)
            if choice:
                result = self.generate("MENU", *choice, go_ahead=lambda hold: console.confirm(
                    f"Logins are on hold: {hold}. Is it mended, and may the login go ahead?"))
                console.say("")
                self.say_result(result)
                if result.captcha and not self.args.headed and has_display(self.environ) and console.confirm(
                        "Open a visible browser window and go on there?"):
                    left = [name for name, outcome in result.outcomes.items() if outcome.state != "DONE"]
                    result = self.generate("MENU", "PARTIAL", left, headed=True)
                    self.say_result(result)
                return result.exit_code
        except EOFError:
            console.say("")
        console.say("Aborted, nothing changed.")
        return OK if all(status.word == "VALID" for status in statuses) else NOT_VALID

    def import_config(self) -> int:
        """--import-config: the apps of the environment into upstox_api_configs."""
        if create_database(self.path):
            self.console.log(f"created the database {self.path.resolve()}")
        import_apps(self.path, self.config.apps, self.now())
        self.console.say(f"Copied {', '.join(self.names)} into upstox_api_configs of {self.path.resolve()}. "
                         "Set UPSTOX_CONFIG_SOURCE=DB to use them.")
        return OK

    def check(self) -> int:
        """--check: is everything ready for a login? Reads only, spends no OTP."""
        answers = ask_dialogs(self.broker, self.config.apps, self.now)
        guard = AccountGuard(self.path, self.config)
        guard.load()
        hold = guard.hold() and f"logins are on hold: {guard.hold()}. Mend it, then go ahead from the menu"
        silent = all(answer.error for answer, _ in answers)
        checks = {"configuration": "", "env file": "", "database": self.database_problem(),
                  "browser": self.browser_problem(), "broker": explain(answers[0][0]) if silent else "",
                  "clock": "unknown, since the broker did not answer" if silent else clock_problem(answers),
                  "hold": hold}
        checks |= {app.name: "" if 300 <= answer.code < 400 else explain(answer)
                   for app, (answer, _) in zip(self.config.apps, answers)}
        for name, problem in checks.items():
            self.console.say(f"{name:<14}: {problem or 'ok'}")
        return NOT_VALID if any(checks.values()) else OK

    def database_problem(self) -> str:
        """Whether the database takes a token, without leaving one there."""
        try:
            if self.path.exists():
                if select(self.path, "SELECT 1 FROM sqlite_master WHERE name = 'upstox_tokens'"):
                    prove_writable(self.path, self.config.apps, self.now())
                return ""
        except DatabaseError as error:
            return str(error)
        folder = self.path.absolute().parent
        return "" if os.access(folder, os.W_OK) else f"{folder} cannot be written. Name a file with --db."

    def browser_problem(self) -> str:
        """Whether a browser starts and opens a blank page; flow V3 needs none."""
        if self.args.flow == "V3":
            return ""
        with contextlib.closing(Browser([], self.args.headed, self.environ)) as browser:
            try:
                browser.open("about:blank")
                return ""
            except (LoginFailed, PageFault) as error:
                return str(error)
            except ImportError:
                return f"selenium is missing. Run: {sys.executable} -m pip install selenium pyotp"

    def serve(self) -> int:
        """--serve: until Ctrl-C or SIGTERM."""
        with contextlib.closing(Service(self)) as service, Server(self.args.serve, service) as server:
            self.console.log(f"Serving on {server.url} (Ctrl-C ends)")
            server.serve_forever()
        return OK

    @contextlib.contextmanager
    def receiving(self) -> Iterator[None]:
        """Listen for deliveries while a flow V3 run waits, unless something already does."""
        with contextlib.closing(Service(self)) as service, contextlib.ExitStack() as stack:
            try:
                server = Server(self.args.serve or SERVE_ADDRESS, service, webhook_only=True)
                stack.enter_context(server)
            except AddressTaken as error:
                self.console.log(f"This run cannot listen for deliveries; a running --serve must. {error}")
            else:
                threading.Thread(target=server.serve_forever, daemon=True).start()
                stack.callback(server.shutdown)
            yield


# ---- HTTP API and dashboard ----------------------------------------------------------------------


class Job(Reporter):
    """A generating run as the HTTP API shows it."""

    def __init__(self, names: Sequence[str]) -> None:
        self.job_id, self.state, self.message = secrets.token_hex(8), "RUNNING", ""
        self.results = {name: ("PENDING", "") for name in names}

    def step(self, api_name: str, text: str) -> None:
        if api_name in self.results:
            self.results[api_name] = ("RUNNING", text)

    def countdown(self, api_name: str, text: str, left: float) -> None:
        self.step(api_name, f"{text} in {left:.0f} s")

    def operator(self, api_name: str, text: str) -> None:
        self.state = "WAITING_FOR_OPERATOR" if text else "RUNNING"
        self.message = f"{api_name}: {text}" if text else ""

    def result(self, api_name: str, outcome: Outcome) -> None:
        self.results[api_name] = (outcome.state, outcome.message or outcome.status.label)

    def as_json(self) -> dict[str, Any]:
        """The answer to a question about this job."""
        return {"jobId": self.job_id, "state": self.state, "message": self.message,
                "results": [{"apiName": name, "state": state, "message": message}
                            for name, (state, message) in list(self.results.items())]}


class HttpError(Exception):
    """An answer other than success."""

    def __init__(self, code: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.code, self.headers = code, {name.replace("_", "-"): value for name, value in headers.items()}


class Service:
    """What the HTTP API can do: the functions of the command line, shared between requests."""

    SHARED_SECONDS, JOBS_KEPT = 5.0, 20

    def __init__(self, command: Command) -> None:
        self.command, self.config = command, command.config
        self.jobs: dict[str, Job] = {}
        self.thread: threading.Thread | None = None
        self.stopping, self.changes = False, 0
        self.checking = threading.Lock()
        self.checked: tuple[float, int, dict[str, Any]] = (0.0, -1, {})  # when, after how many changes, what
        self.webhook = Webhook(self.config, command.path, command.broker, command.now, self.told)

    def told(self, text: str) -> None:
        """A delivery changed the database: the next status must show it."""
        self.changes += 1
        self.command.console.log(text)

    def status(self) -> dict[str, Any]:
        """One check for all who ask at the same time; one younger than 5 s is used again."""
        with self.checking:
            command, changes = self.command, self.changes
            if changes != self.checked[1] or time.monotonic() - self.checked[0] > self.SHARED_SECONDS:
                rows = read_tokens(command.path)
                statuses = check_tokens(self.config, rows, command.broker, command.now())
                self.checked = (time.monotonic(), changes, status_json(statuses, command.now()))
            return self.checked[2]

    def generate(self, body: Any) -> Job:
        """Start a run in a thread of its own; raises when another is busy or the request makes no sense."""
        mode, names, flow = self.read_request(body)
        require_for_flow(self.config, flow)
        run = self.command.new_run("REST", Reporter(), flow=flow, stopping=lambda: self.stopping)
        session = Session(run, mode, names)
        session.begin()
        job = run.reporter = Job([app.name for app in session.chosen])
        self.jobs = dict([*self.jobs.items(), (job.job_id, job)][-self.JOBS_KEPT:])
        self.thread = threading.Thread(target=self.finish, args=(session, job))
        self.thread.start()
        return job

    def read_request(self, body: Any) -> tuple[str, list[str], str]:
        """(mode, names, flow) of a generate request, or HttpError 400."""
        body = body if isinstance(body, dict) else {}
        mode, names = body.get("mode"), body.get("apiNames", [])
        flow = body.get("flow", self.command.args.flow)
        if mode not in MODES:
            raise HttpError(400, f"mode must be one of {', '.join(MODES)}")
        if flow not in FLOWS:
            raise HttpError(400, f"flow must be one of {', '.join(FLOWS)}")
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise HttpError(400, "apiNames must be a list of API names")
        if bool(names) != (mode == "PARTIAL"):
            raise HttpError(400, "apiNames are needed for mode PARTIAL, and only there")
        if unknown := [name for name in names if name not in self.command.names]:
            known = ", ".join(self.command.names)
            raise HttpError(400, f"apiNames: {printable(unknown[0], 40)} is not one of {known}")
        return mode, names, flow

    def finish(self, session: Session, job: Job) -> None:
        """The run itself; whatever happens, the job ends."""
        state, message = "FAILED", "internal error"
        try:
            result = session.finish()
            state = "DONE" if result.exit_code == OK else "FAILED"
            done = sum(outcome.state == "DONE" for outcome in result.outcomes.values())
            counted = f"{done} of {len(result.outcomes)} generated." if result.outcomes else "Nothing to do."
            message = " ".join([counted, *session.left_alone(), *result.failures()[:1]])
        except TokenError as error:
            message = str(error)
        finally:
            self.changes += 1
            job.message, job.state = message, state

    def close(self) -> None:
        """Let a running job finish its current app."""
        self.stopping = self.webhook.ended = True
        self.webhook.arrived.set()
        if self.thread:
            self.thread.join()


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Upstox tokens</title> <link rel="icon" href="data:,">
<style nonce="NONCE">
:root { color-scheme: light dark; --page: #f4f6f8; --card: #fff; --text: #1b2430; --soft: #576372;
  --line: #dde3e9; --good: #1a7f4b; --bad: #b3261e; --act: #2457c5; --hue: var(--soft); }
@media (prefers-color-scheme: dark) { :root { --page: #11151b; --card: #191f27; --text: #e6eaf0;
  --soft: #9eaab8; --line: #2b343f; --good: #4cc38a; --bad: #ff8f85; --act: #86b0ff; } }
.good { --hue: var(--good); } .bad { --hue: var(--bad); } .busy { --hue: var(--act); } .wait { --hue: #c80; }
* { box-sizing: border-box; } [hidden] { display: none !important; } html { overflow-y: scroll; }
body { max-width: 1080px; margin: 0 auto; padding: 24px 24px 72px; background: var(--page);
  color: var(--text); font: 16px/1.4 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1, h2, p { margin: 0; font-size: 1.15rem; overflow-wrap: anywhere; } p { font-size: inherit; }
header, footer, form, label, #summary, #notice, #actions { display: flex; align-items: center; gap: 12px; }
#summary, #operator, table, dialog, button, select, input { background: var(--card); border-radius: 8px; }
dialog, button, select, input { border: 1px solid #7d8894; color: inherit; }
button, select, input { min-height: 44px; padding: 0 16px; font: inherit; line-height: 1.15; }
button { font-weight: 600; cursor: pointer; } .danger { border-color: var(--bad); color: var(--bad); }
.main { background: var(--act); border-color: var(--act); color: var(--card); }
button:disabled, select:disabled { background: none; border-color: var(--line); color: var(--soft); }
:focus-visible { outline: 3px solid var(--act); outline-offset: 2px; }
.soft, thead, .job { color: var(--soft); font-size: .9rem; }
main { min-height: 660px; } #checked { flex: 1; text-align: right; }
#summary { margin: 16px 0 8px; padding: 12px 20px; min-height: 68px; border-left: 6px solid var(--hue);
  font-size: 1.35rem; font-weight: 600; }
#stage { display: grid; min-height: 124px; margin-bottom: 16px; } form { max-width: 540px; }
#normal { display: grid; align-content: space-between; } #all { margin-left: auto; }
#notice { min-height: 64px; padding: 8px 0 8px 26px; color: var(--hue); }
#key { flex: 1; min-width: 0; } #operator { padding: 14px 20px; border: 3px solid #c80; }
table { width: 100%; table-layout: fixed; border-collapse: collapse; }
th, td { height: 56px; padding: 6px 12px 6px 0; text-align: left; overflow-wrap: anywhere; }
th:first-child { width: 220px; padding-left: 20px; } .status { width: 290px; } .until { width: 175px; }
tr + tr { border-top: 1px solid var(--line); } th label { min-height: 40px; cursor: pointer; }
th input { flex: none; width: 20px; min-height: 20px; margin: 0; accent-color: var(--act); }
td.status { color: var(--hue); font-size: .87rem; font-weight: 600; } td.status::before { content: "● "; }
tr:not(.good) .until { color: var(--soft); } .until:empty::before { content: "–"; }
.live [data-job=DONE] .status { filter: grayscale(1); } .live [data-job=DONE] b { color: var(--good); }
[data-job=RUNNING] b { color: var(--act); } .bad[data-job=FAILED] .job { color: var(--bad); }
footer { min-height: 60px; justify-content: space-between; }
#offline { position: fixed; inset: auto 0 0; padding: 14px; text-align: center;
  background: var(--text); color: var(--page); }
dialog { max-width: min(460px, 100% - 32px); padding: 24px; } dialog p { margin: 12px 0 24px; }
dialog button { margin-right: 12px; } dialog::backdrop { background: rgb(0 0 0 / .5); }
@media (max-width: 980px) {
  body { padding: 12px 12px 72px; } main { min-height: 840px; }
  #summary { margin: 12px 0 4px; padding: 10px 12px; font-size: 1.05rem; }
  #stage { min-height: 172px; } #notice { padding-left: 18px; }
  #actions { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; } #all { margin: 0; }
  header { gap: 6px; } button, select { padding: 0 6px; } #actions > * { font-size: .85rem; }
  thead { display: none; } table, tbody { display: block; }
  tbody tr { display: grid; grid-template-columns: max-content 1fr; align-content: center;
    align-items: center; min-height: 92px; padding: 4px 12px 6px; }
  tbody th, td { width: auto !important; height: auto; padding: 0 !important; } .status { text-align: right; }
  .until, .job { grid-column: 1 / 3; margin-left: 32px; } .until:not(:empty)::before { content: "until "; }
  .live tr:not([data-job=""]) .until { display: none; }
}
</style>
</head>
<body>
<header>
  <h1>Upstox tokens</h1> <span id="checked" class="soft"></span> <button id="refresh">Check again</button>
</header>
<main id="main">
  <p id="summary" aria-live="polite"></p>
  <div id="stage">
    <div id="normal">
      <p id="notice" role="status"></p>
      <div id="actions">
        <button id="missing" class="main"></button> <button id="selected"></button>
        <select id="flow" aria-label="Way to log in">
          <option value="SELENIUM">Browser login</option> <option value="V3">Approve on phone</option>
        </select>
        <button id="all" class="danger">Force regenerate all</button>
      </div>
      <form id="keyform">
        <label for="key">Key</label>
        <input id="key" type="password" required pattern="[!-~]+" title="A key has no spaces.">
        <button id="key-save" class="main">Save</button>
      </form>
    </div>
    <section id="operator" aria-labelledby="turn">
      <h2 id="turn">Your turn</h2> <p id="task"></p>
      <p class="soft">The run goes on by itself as soon as that is done.</p>
    </section>
  </div>
  <table id="tokens">
    <thead><tr><th scope="col">API</th><th scope="col" class="status">Status</th>
      <th scope="col" class="until">Valid until</th><th scope="col">Last run</th></tr></thead>
    <tbody id="body"></tbody>
  </table>
  <template id="row"><tr>
    <th scope="row"><label><input type="checkbox"> <span></span></label></th>
    <td class="status"></td><td class="until"></td><td class="job"><b></b><span></span></td>
  </tr></template>
</main>
<footer class="soft">All times are the server's. <button id="forget">Forget key</button></footer>
<p id="offline" role="alert">The server does not answer. Trying again…</p>
<dialog id="confirm" aria-labelledby="danger" aria-describedby="dangers">
  <h2 id="danger">Regenerate every token, valid or not?</h2>
  <p id="dangers">Every app logs in again, each at the cost of a one-time code or of an approval on the phone.
    Programs that use the present tokens stop working until they read the new ones.</p>
  <button id="confirm-no" autofocus>Cancel</button>
  <button id="confirm-yes" class="danger">Regenerate all</button>
</dialog>
<script nonce="NONCE">
'use strict';
const $ = id => document.getElementById(id), ticked = () => [...$('body').querySelectorAll(':checked')];
const live = run => Boolean(run) && (run.state === 'RUNNING' || run.state === 'WAITING_FOR_OPERATOR');
const tone = token => ({VALID: 'good', UNKNOWN: 'none'}[token.status] || 'bad');  // bad: needs generating
const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const keep = typed => { key = typed; sessionStorage.setItem('key', key); };
let report = null, job = null, note = '', locked = false, starting = false;  // what the page shows
let key = sessionStorage.getItem('key') || '', fails = 0, turn = 0, timer = 0;

async function call(path, body) {
  const headers = {'Content-Type': 'application/json', ...key && {Authorization: 'Bearer ' + key}};
  const answer = await fetch('auth/upstox/tokens/' + path, {headers, method: body ? 'POST' : 'GET',
    body: JSON.stringify(body), cache: 'no-store', redirect: 'error', signal: AbortSignal.timeout(20000)});
  const data = await answer.json();  // fails when a proxy answers because the server itself is gone
  if (!answer.ok) throw Object.assign(new Error(data.error), {status: answer.status});
  return data;
}

async function tick() {  // asks, shows, comes again; a newer tick makes an older one void
  const mine = ++turn;
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const run = await call('jobs/latest').catch(error => error.status === 404 ? null : Promise.reject(error));
    const fresh = live(run) && report || await call('status');
    if (mine !== turn) return;
    note = live(job) && !run ? 'The server no longer knows the run; was it restarted?' : '';
    [job, report, locked, fails] = [run, fresh, false, 0];
  } catch (error) {
    if (mine !== turn) return;
    if (error.status === 401) return lock();
    if (error.status) note = error.message;
    fails = error.status ? 0 : fails + 1;
  }
  render();
  timer = setTimeout(tick, 1000 * (fails ? Math.min(15, 2 ** fails) : live(job) ? 1 : 60));
}

function lock() {
  note = key && 'The server did not accept the key.';
  keep('');
  [report, job, locked, fails] = [null, null, true, 0];
  render();
  $('key').focus();
}

async function generate(mode, apiNames) {
  clearTimeout(timer);
  [starting, note, turn] = [true, '', turn + 1];
  render();
  try {
    const run = await call('generate', {mode, apiNames, flow: $('flow').value});
    job = {...run, results: run.apiNames.map(apiName => ({apiName, state: 'PENDING'}))};
    ticked().forEach(box => { box.checked = false; });
  } catch (error) {
    note = error.status ? error.message : 'No answer came. If the run has begun, it will show here.';
  }
  starting = false;
  render();
  timer = setTimeout(tick, note ? 9000 : 0);
}

function headline() {  // the sentence on top and its colour
  if (locked) return ['none', 'This server asks for its key.'];
  if (live(job)) {
    const text = `: ${job.results.filter(one => one.state === 'DONE').length} of ${job.results.length} done.`;
    return job.state === 'RUNNING' ? ['busy', 'Generating' + text] : ['wait', 'Waiting for you' + text];
  }
  if (!report) return ['none', 'Checking the tokens…'];
  const n = report.tokens.length, of = kind => report.tokens.filter(token => tone(token) === kind).length;
  const bad = of('bad'), none = of('none'), rest = none ? ` For ${none} the broker could not be asked.` : '';
  if (bad) return ['bad', `${bad} of ${n} tokens need${bad > 1 ? '' : 's'} generating.` + rest];
  if (rest) return ['none', `${of('good')} of ${n} tokens valid.` + rest];
  const until = report.tokens.map(token => token.validityAt).sort()[0].slice(11, 16);
  return ['good', (n > 1 ? `All ${n} tokens are` : 'The token is') + ` valid until ${until}.`];
}

function newRow({apiName}) {
  const tr = $('row').content.firstElementChild.cloneNode(true);
  tr.dataset.api = tr.querySelector('input').value = tr.querySelector('span').textContent = apiName;
  return tr;
}

function renderRow(tr, token) {
  const {state, message} = job && job.results.find(one => one.apiName === token.apiName) || {state: ''};
  tr.className = tone(token);
  [tr.dataset.status, tr.dataset.job] = [token.status, state];
  put(tr.querySelector('.status'), token.status + (token.reason ? ` (${token.reason})` : ''));
  put(tr.querySelector('.until'), (token.validityAt || '').slice(0, 16));
  put(tr.querySelector('b'), state.charAt(0) + state.slice(1).toLowerCase());
  put(tr.querySelector('b + span'), message ? ': ' + message : '');
}

function render() {
  const all = report ? report.tokens : [], shown = [...$('body').rows].map(tr => tr.dataset.api);
  if (all.map(token => token.apiName).join() !== shown.join()) $('body').replaceChildren(...all.map(newRow));
  all.forEach((token, i) => renderRow($('body').rows[i], token));
  const [mood, sentence] = headline(), running = live(job), waiting = running && job.state !== 'RUNNING';
  const busy = !report || running || starting || fails > 0;
  const need = all.filter(token => tone(token) === 'bad').length, picked = ticked().length;
  const line = note || (locked ? 'It is UPSTOX_SERVE_KEY of the server. This tab keeps it until it is closed.'
    : starting ? 'Starting…' : running ? job.message || 'The run goes on even when this page is closed.'
    : job ? 'Last run: ' + job.message : '');
  const texts = {summary: sentence, notice: line, task: waiting ? job.message : '',
    checked: report ? 'Checked ' + report.checkedAt.slice(11) : '',
    missing: `Generate missing (${need})`, selected: `Generate selected (${picked})`};
  const disabled = {missing: busy || !need, selected: busy || !picked, all: busy, flow: busy};
  const hidden = {normal: waiting, operator: !waiting, keyform: !locked, actions: locked, tokens: locked,
    forget: !key, offline: !fails};
  const classes = {summary: mood, main: running ? 'live' : '',
    notice: note || (need && job && job.state === 'FAILED') ? 'bad' : ''};
  for (const [id, text] of Object.entries(texts)) put($(id), text);
  for (const [id, off] of Object.entries(disabled)) $(id).disabled = off;
  for (const [id, off] of Object.entries(hidden)) $(id).hidden = off;
  for (const [id, name] of Object.entries(classes)) $(id).className = name;
}

$('body').onchange = render;
$('missing').onclick = () => generate('INVALID_ONLY');
$('selected').onclick = () => generate('PARTIAL', ticked().map(box => box.value));
$('all').onclick = () => $('confirm').showModal();
$('confirm-no').onclick = () => $('confirm').close();
$('confirm-yes').onclick = () => { $('confirm').close(); generate('ALL'); };
$('refresh').onclick = () => { put($('checked'), 'Checking…'); tick(); };
$('forget').onclick = () => { keep(''); tick(); };
$('keyform').onsubmit = () => { keep($('key').value); $('keyform').reset(); tick(); return false; };
document.addEventListener('visibilitychange', tick);
render();
tick();
</script>
</body>
</html>
"""


class AddressTaken(ConfigError):
    """Nothing can listen there."""


def serve_address(text: str, config: Config) -> tuple[str, int]:
    """(host, port) of HOST:PORT; beyond loopback only with a key."""
    match = re.fullmatch(r"\[?([^\[\]/\s]+?)\]?:([0-9]{1,5})", text)
    if not match or int(match[2]) > 65535:
        raise ConfigError(f"--serve: {printable(text, 60)} is not HOST:PORT")
    if not loopback(match[1].lower()) and not config.serve_key:
        raise ConfigError("UPSTOX_SERVE_KEY: is not set; serving beyond loopback needs it")
    return match[1].lower(), int(match[2])


class Server(http.server.ThreadingHTTPServer):
    """A thread per connection, with a limit on how many and for how long."""

    request_queue_size = 128
    allow_reuse_port = False
    MOST, SECONDS = 500, 60.0

    def __init__(self, address: str, service: Service, webhook_only: bool = False) -> None:
        self.service, self.webhook_only = service, webhook_only
        self.host, port = serve_address(address, service.config)
        self.since: dict[Any, float] = {}
        self.address_family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            super().__init__((self.host, port), Handler)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "not an address"
            raise AddressTaken(f"--serve: cannot listen on {address}: {reason}. "
                               "Choose another port, or end what uses it.") from None
        self.url = f"http://{address.rpartition(':')[0]}:{self.server_address[1]}/"

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's would ask the DNS for our name

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.since[request] = time.monotonic()
        return len(self.since) <= self.MOST

    def service_actions(self) -> None:
        """Cut off whoever is still sending after a minute."""
        for request, since in list(self.since.items()):
            if time.monotonic() - since > self.SECONDS:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        self.since.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is everyday life, and no traceback is for the log."""


class Handler(http.server.BaseHTTPRequestHandler):
    """Checks who asks, finds the route, answers JSON; no SQL and no login code here."""

    server: Server
    server_version, sys_version, default_request_version = "upstox_tokens", "", "HTTP/1.0"
    timeout = 10  # seconds of silence
    ROUTES = (("GET", r"/", "page"), ("GET", r"/healthz", "health"),
              ("GET", r"/auth/upstox/tokens/status", "status"),
              ("POST", r"/auth/upstox/tokens/generate", "generate"),
              ("GET", r"/auth/upstox/tokens/jobs/([0-9a-z]{1,40})", "job"))

    def respond(self) -> None:
        """One request, whatever the method."""
        self.cors: dict[str, str] = {}
        try:
            self.dispatch(self.requestline.split()[1].partition("?")[0])
        except HttpError as error:
            self.answer(error.code, {"error": str(error)}, error.headers)
        except TokenError as error:
            code = {BusyError: 409, ConfigError: 400}.get(type(error), 503)
            self.answer(code, {"error": str(error)})
        except OSError:
            self.close_connection = True  # the client is gone
        except Exception as error:  # a bug: tell where, not what, since its text may hold anything
            self.server.service.command.console.log(f"internal error: {type(error).__name__}")
            self.answer(500, {"error": "internal error"})

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = respond

    def dispatch(self, path: str) -> None:
        """Webhook first: the broker sends neither our key nor a host name of ours."""
        service = self.server.service
        notifier = urllib.parse.urlsplit(service.config.notifier).path
        if notifier and path == notifier:
            self.need_method("POST")
            service.webhook.receive(self.read_body())
            return self.answer(200, {"status": "ok"})
        self.check_host()
        self.check_origin()
        found = next(((method, name, match) for method, pattern, name in self.ROUTES
                      if (match := re.fullmatch(pattern, path)) and not self.server.webhook_only), None)
        preflight = self.command == "OPTIONS" and self.cors  # browsers send it without the key
        if path.startswith("/auth/") and not preflight:
            self.check_key(service.config.serve_key)
        if not found:
            raise HttpError(404, "not found")
        method, name, match = found
        if preflight:
            return self.answer(204, None, {
                "Access-Control-Allow-Methods": method, "Access-Control-Max-Age": "600",
                "Access-Control-Allow-Headers": "Authorization, Content-Type",
                "Access-Control-Allow-Private-Network": "true"})
        self.need_method(method)
        getattr(self, f"send_{name}")(service, *match.groups())

    def need_method(self, method: str) -> None:
        """405 for any other."""
        if self.command != method and (self.command, method) != ("HEAD", "GET"):
            raise HttpError(405, f"use {method}", Allow=f"{method}{', HEAD' * (method == 'GET')}, OPTIONS")

    def check_host(self) -> None:
        """DNS rebinding: a page of another site could reach us only by a name that is not ours."""
        host = ""
        with contextlib.suppress(ValueError):
            host = urllib.parse.urlsplit("//" + self.headers.get("Host", "")).hostname or ""
        if not loopback(host) and host not in (self.server.host, self.connection.getsockname()[0]):
            raise HttpError(403, "this Host is not served here")

    def check_origin(self) -> None:
        """A browser's page must be our own or listed in UPSTOX_ALLOWED_ORIGINS."""
        origin = self.headers.get("Origin")
        if origin is None or origin.lower() == f"http://{self.headers.get('Host', '').lower()}":
            return
        if origin.lower() not in filter(None, self.server.service.config.origins):
            raise HttpError(403, "this Origin is not allowed; see UPSTOX_ALLOWED_ORIGINS")
        self.cors = {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": "Location",
                     "Vary": "Origin"}

    def check_key(self, key: str) -> None:
        """The bearer key, where one is set."""
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        if key and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise HttpError(401, "the key is missing or wrong", WWW_Authenticate="Bearer")

    def read_body(self) -> bytes:
        """The whole body: 64 KiB at most, of the announced length, within the time limit."""
        announced = self.headers.get("Content-Length", "")
        if self.headers.get("Transfer-Encoding") or not re.fullmatch("[0-9]{1,18}", announced):
            raise HttpError(400, "a Content-Length is needed")
        length, body, end = int(announced), b"", time.monotonic() + self.timeout
        if length > 65536:
            raise HttpError(413, "the body is larger than 64 KiB")
        while len(body) < length and time.monotonic() < end:
            if not (part := self.rfile.read1(length - len(body))):
                break
            body += part
        if len(body) < length:
            raise HttpError(400, "the body is shorter than announced")
        return body

    def send_page(self, service: Service) -> None:
        """The dashboard."""
        nonce = secrets.token_urlsafe(16)
        policy = (f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src "
                  "'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
        self.answer(200, PAGE.replace("NONCE", nonce), {"Content-Security-Policy": policy})

    def send_health(self, service: Service) -> None:
        """Whether the server answers."""
        self.answer(200, {"status": "ok"})

    def send_status(self, service: Service) -> None:
        """Every token's status."""
        self.answer(200, service.status())

    def send_generate(self, service: Service) -> None:
        """Start a job."""
        if self.headers.get_content_type() != "application/json":
            raise HttpError(415, "send application/json")
        try:
            body = json.loads(self.read_body())
        except (ValueError, RecursionError):
            raise HttpError(400, "the body is not JSON") from None
        job = service.generate(body)
        self.answer(202, {"jobId": job.job_id, "state": "RUNNING", "apiNames": list(job.results)},
                    {"Location": f"/auth/upstox/tokens/jobs/{job.job_id}"})

    def send_job(self, service: Service, job_id: str) -> None:
        """One job, or the latest."""
        job = next(reversed(service.jobs.values()), None) if job_id == "latest" else service.jobs.get(job_id)
        if job is None:
            raise HttpError(404, "no such job")
        self.answer(200, job.as_json())

    def answer(self, code: int, payload: Any, headers: Mapping[str, str] | None = None) -> None:
        """Headers and body; a dictionary becomes JSON, a text is HTML."""
        html = isinstance(payload, str)
        body = payload.encode() if html else b"" if payload is None else json.dumps(payload).encode()
        self.send_response(code)
        for name, value in {"Content-Type": "text/html; charset=utf-8" if html else "application/json",
                            "Content-Length": str(len(body)), "Cache-Control": "no-store",
                            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                            **self.cors, **(headers or {})}.items():
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
        known = {501: (405, "unknown method", {"Allow": "GET, HEAD, POST, OPTIONS"})}
        code, text, headers = known.get(code, (code, printable(message or "bad request", 100), {}))
        self.answer(code, {"error": text}, headers)

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """With -v one line a request; without its query, which could hold anything."""
        command = self.server.service.command
        if command.args.verbose:
            target = getattr(self, "path", "?").partition("?")[0]
            line = f"{self.client_address[0]} {self.command} {target} {int(code)}"
            command.console.log(printable(line, 200))

    def log_message(self, format: str, *args: Any) -> None:
        """What else http.server would log: nothing that an operator needs."""


# ---- The command line ----------------------------------------------------------------------------


def wait_minutes(text: str) -> float:
    """Minutes for --wait: more than 0, at most a day."""
    value = float(text)
    if not 0 < value <= 1440:
        raise ValueError
    return value


def build_parser() -> argparse.ArgumentParser:
    """All options."""
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
    add("-q", "--quiet", action="store_true", help="no progress lines")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def parse_arguments(argv: Sequence[str] | None, environ: Mapping[str, str]) -> argparse.Namespace:
    """Options that fit together, or exit 2 with one sentence."""
    parser = build_parser()
    args = parser.parse_args(argv)
    verbs = [args.status, bool(args.mode), args.serve is not None, args.check, args.import_config]
    listening = args.mode and args.serve and args.flow == "V3"  # then --serve is where the run itself listens
    if sum(verbs) > 1 + bool(listening):
        parser.error("choose one of --status, --mode, --serve, --check and --import-config")
    if (args.mode == "PARTIAL") != (args.apis is not None):
        parser.error("--mode PARTIAL and --apis go together")
    if args.json and not (args.status or args.mode):
        parser.error("--json goes with --status or --mode")
    if args.headed and not has_display(environ):
        parser.error("--headed needs a display (DISPLAY is not set)")
    return args


def load_config(args: argparse.Namespace, environ: Mapping[str, str]) -> Config:
    """Environment over env file, checked for what this command needs."""
    env_file = args.env_file or first_existing(".env")
    from_file, problems = read_env_file(env_file) if env_file else ({}, [])
    merged = {**from_file, **environ}.items()
    settings = {key: value.strip() for key, value in merged if key.startswith("UPSTOX_") and value.strip()}
    needed = [] if args.status else ["UPSTOX_REDIRECT_URI"]
    needed += FLOW_KEYS[args.flow] if args.mode or args.check else []
    from_db = settings.get("UPSTOX_CONFIG_SOURCE") == "DB" and not args.import_config
    return build_config(settings, problems, needed, stored_apps(find_database(args.db)) if from_db else None)


def stop_on(signum: int, _frame: object) -> NoReturn:
    """Turn the first Ctrl-C or SIGTERM into Stopped; later ones must not disturb the cleaning."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped(signum)


@contextlib.contextmanager
def signals_handled() -> Iterator[None]:
    """Handle Ctrl-C and SIGTERM for a while; a signal that the caller ignores stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        for signum, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(signum, stop_on)
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def open_stream(stream: TextIO | None) -> TextIO:
    """A stream that takes any text; one that was closed before the start leads nowhere."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    with contextlib.suppress(AttributeError):
        stream.reconfigure(errors="backslashreplace")
    return stream


def ask_on_terminal(prompt: str) -> str:
    """input(), with EOFError where nobody can be asked."""
    if sys.stdin is None or sys.stdout is None:
        raise EOFError
    with contextlib.suppress(OSError):  # can only be done before the first read
        open_stream(sys.stdin)
    return input(prompt)


def main(argv: Sequence[str] | None = None, *, out: TextIO | None = None, err: TextIO | None = None,
         ask: Callable[[str], str] = ask_on_terminal, environ: Mapping[str, str] | None = None,
         now: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep) -> int:
    """Run one command; the exit code of contract 5. The keywords replace the process's own for tests."""
    environ = os.environ if environ is None else environ
    console = Console(out or open_stream(sys.stdout), err or open_stream(sys.stderr), ask)
    try:
        with signals_handled():
            args = parse_arguments(argv, environ)
            os.umask(0o077)  # whatever is created may hold tokens
            console.quiet = args.quiet
            command = Command(args, load_config(args, environ), console, environ, now, sleep)
            verb = next((verb for verb in ("status", "mode", "serve", "check", "import_config")
                         if getattr(args, verb) not in (None, False)), "menu")
            code = getattr(command, verb)()
            return code or (NOT_VALID if console.lost else OK)  # a result that nobody got is no success
    except TokenError as error:
        for line in str(error).splitlines():
            console.log(f"error: {line}")
        return error.exit_code
    except Stopped as stop:
        console.log("Stopped. Tokens generated so far are kept.")
        return stop.exit_code
    except SystemExit as stop:  # argparse has said what is wrong
        return stop.code if isinstance(stop.code, int) else USAGE
    except Exception as error:  # a bug: its text may hold anything, so only where it is
        cause: BaseException | None = error
        while cause := cause.__cause__ or cause.__context__:
            if isinstance(cause, Stopped):  # before Python 3.12 a class being made wraps what interrupts it
                return cause.exit_code
        place = error.__traceback__ and list(traceback.walk_tb(error.__traceback__))[-1][1]
        console.log(f"error: internal error, {type(error).__name__} at line {place}. Please report it.")
        return NOT_VALID


if __name__ == "__main__":
    raise SystemExit(main())
