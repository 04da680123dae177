#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["selenium>=4.27", "pyotp>=2.9"]
# ///
"""Keep the Upstox access tokens of one account (one to six apps) alive in vega_trade.db.

THIS PROGRAM IS TRUSTED WITH YOUR BROKER PIN AND TOTP SECRET. Read it before you use it: it is one file.

It reads   the environment, an env file (see env.sample) and the table upstox_tokens
It writes  upstox_tokens, upstox_token_audit, and DATABASE.upstox-lock beside the database: the lock of a
           run and what protects the account (codes and PINs sent, never their values)
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
import binascii
import contextlib
import hashlib
import hmac
import http.client
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NoReturn, TextIO

__version__ = "1.0.0"
__all__ = ["TokenError", "access_token", "main"]

# ---- Facts: the broker, the guide, the limits ---------------------------------------------------------

API_NAMES = ("PRIMARY", "WEBSOCKET1", "WEBSOCKET2", "WEBSOCKET3", "OPTIONCHAIN1", "OPTIONCHAIN2")
MODES = ("ALL", "INVALID_ONLY", "PARTIAL")
FLOWS = ("SELENIUM", "V3")
DATABASE_NAME = "vega_trade.db"
BASE_URL = "https://api.upstox.com"
SERVE_ADDRESS = "127.0.0.1:28021"
IST = timezone(timedelta(hours=5, minutes=30))  # Indian time has no daylight saving
LOOPBACK = ("127.0.0.1", "localhost", "::1")

OK, NOT_VALID, USAGE, OPERATOR, BUSY = range(5)  # exit codes

PROFILE_SECONDS = 10  # overall deadline of one round of profile calls
EXCHANGE_SECONDS = 30  # the code is spent once it was sent, so patience pays
BODY_LIMIT = 1 << 20
CLOCK_SECONDS = 20  # a clock further off makes TOTP codes the broker refuses
TOTP_WINDOW, TOTP_MARGIN = 30, 5  # seconds; a code with less than the margin left is not sent
READ_SECONDS, PROOF_SECONDS, STORE_SECONDS = 10, 30, 60  # patience with a locked database
PAGE_SECONDS, OUTCOME_SECONDS = 30, 60  # for a page to show a step, for the broker to judge an entry
CAPTCHA_SECONDS = {False: 15, True: 300}  # headless, headed

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

# what the broker's error codes mean, and what to do next (the broker's documentation)
APP_PAGE = "the app's page under Developer Apps of your Upstox account"
BROKER_ERRORS = {
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
    "UDAPI1124": ("this flow is for individual accounts only", "Use --flow SELENIUM."),
    "UDAPI1155": ("the app is under review or was rejected", f"Look at {APP_PAGE}."),
    "UDAPI1157": ("the app has expired", f"Renew it on {APP_PAGE}."),
}

# ---- Errors: every text is a finished sentence for the operator ----------------------------------------


class TokenError(Exception):
    """Something an operator must read; the text names the next step."""

    exit_code = NOT_VALID


class ConfigError(TokenError):
    """The configuration cannot be used; `problems` holds one line each, none with a secret's value."""

    exit_code = USAGE

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class DatabaseError(TokenError):
    """The database cannot be used: nothing was tried."""

    exit_code = USAGE


class BusyError(TokenError):
    """Another run holds the lock of this database."""

    exit_code = BUSY


class LoginFailed(TokenError):
    """One app got no token. `stops_run`: the reason holds for all apps; `hold`: see AccountGuard."""

    def __init__(self, text: str, *, stops_run: bool = False, operator: bool = False, hold: bool = False) -> None:
        super().__init__(text)
        self.stops_run, self.operator, self.hold = stops_run, operator, hold


class CaptchaShown(LoginFailed):
    """The CAPTCHA did not go away by itself or nobody solved it in time."""

    def __init__(self, headed: bool) -> None:
        advice = ("nobody solved the CAPTCHA in time. Run again when an operator is there." if headed else
                  "the login page shows a CAPTCHA, which only a person may solve. Run with --headed on a machine "
                  "with a display, or use --flow V3.")
        super().__init__(advice, stops_run=True, operator=True)


class PageFault(Exception):
    """The browser died or the page did not load: tried once more unless a secret was typed."""


class Stopped(BaseException):
    """Ctrl-C or SIGTERM; not an Exception, so that nothing on the way swallows it."""

    def __init__(self, signum: int) -> None:
        self.exit_code = 128 + signum


# ---- Configuration -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class App:
    """One API app of the account."""

    index: int
    name: str
    client_id: str
    client_secret: str = field(repr=False)
    redirect_uri: str = ""


@dataclass(frozen=True)
class Config:
    """The whole configuration, checked. Secrets stay out of the repr and so out of tracebacks."""

    apps: tuple[App, ...]
    base_url: str = BASE_URL
    mobile: str = field(default="", repr=False)
    pin: str = field(default="", repr=False)
    totp: str = field(default="", repr=False)
    notifier: str = field(default="", repr=False)
    serve_key: str = field(default="", repr=False)
    origins: tuple[str, ...] = ()
    source: str = "ENV"

    def secrets(self) -> set[str]:
        """Every configured text that must never be shown."""
        own = {self.mobile, self.pin, self.totp, self.serve_key} | {app.client_secret for app in self.apps}
        return own - {""}


ENV_LINE = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
QUOTED = re.compile(r"""(?:'([^']*)'|"([^"]*)")\s*(?:#.*)?""")
APP_KEY = re.compile(r"UPSTOX_(CLIENT_ID|CLIENT_SECRET|API_NAME)_([0-9]+)")


def parse_env(text: str, source: str) -> tuple[dict[str, str], list[str]]:
    """The settings of an env file's text, and one problem for each line that is not KEY=value."""
    settings, problems = {}, []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        match = ENV_LINE.fullmatch(line)
        value = env_value(match[2]) if match else None
        if match and value is not None:
            settings[match[1]] = value
        else:
            problems.append(f"{source}, line {number}: expected KEY=value")
    return settings, problems


def env_value(raw: str) -> str | None:
    """The value after KEY=, without its quotes or a trailing comment; None when it is malformed."""
    if raw[:1] in ("'", '"'):
        match = QUOTED.fullmatch(raw)
        value = None if match is None else match[1] or match[2] or ""
    else:
        value = re.sub(r"\s#.*", "", raw).strip()
    return value if value is not None and (value.isprintable() or not value) else None


def read_env_file(path: Path) -> tuple[dict[str, str], list[str]]:
    """Parse an env file; one that others may read is refused (it holds the PIN)."""
    try:
        with path.open("rb") as file:
            if os.name == "posix" and os.fstat(file.fileno()).st_mode & 0o077:
                raise ConfigError([
                    f"{path} may be read by other users. Run: chmod 600 {shlex.quote(str(path))}",
                    "Where chmod has no effect (a Windows drive under WSL), keep the file elsewhere and name it "
                    "with --env-file, or use real environment variables."])
            data = file.read(BODY_LIMIT)
        return parse_env(data.decode(), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}, line {data.count(10, 0, error.start) + 1}: not UTF-8 text"]) from None
    except OSError as error:
        raise ConfigError([f"The env file {path} cannot be read: {error.strerror}."]) from None


def first_existing(name: str, folders: Iterable[Path]) -> Path | None:
    """The file of that name in the first folder that has one."""
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def read_settings(environ: Mapping[str, str], env_file: Path | None) -> tuple[dict[str, str], list[str]]:
    """All UPSTOX_ settings; real environment variables win over the env file."""
    settings, problems = read_env_file(env_file) if env_file else ({}, [])
    merged = {**settings, **environ}
    return {k: v.strip() for k, v in merged.items() if k.startswith("UPSTOX_") and v.strip()}, problems


def web_address(value: str) -> urllib.parse.SplitResult | None:
    """The parts of an http or https URL, or None."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(value)
        clean = value.isascii() and value.isprintable() and " " not in value
        if clean and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    return None


def is_base_url(value: str) -> bool:
    """https, or http on loopback only: the bearer token travels there."""
    parts = web_address(value)
    plain = parts is not None and not (parts.query or parts.fragment or parts.username or parts.path.strip("/"))
    return plain and (parts.scheme == "https" or parts.hostname in LOOPBACK)


def is_origin(value: str) -> bool:
    """scheme://host[:port] and nothing more."""
    parts = web_address(value)
    return parts is not None and value == f"{parts.scheme}://{parts.netloc}" and "@" not in value


def totp_bytes(value: str) -> int:
    """Bytes of a base32 secret, 0 when it is not base32."""
    with contextlib.suppress(binascii.Error, ValueError):
        return len(base64.b32decode(value + "=" * (-len(value) % 8)))
    return 0


PLAIN = re.compile(r"[!-~]{1,255}")
VALUE_RULES: dict[str, tuple[Callable[[str], object], str]] = {
    "UPSTOX_MOBILE_NUMBER": (re.compile(r"[6-9][0-9]{9}").fullmatch, "must be 10 digits beginning 6-9, without +91"),
    "UPSTOX_PIN": (re.compile(r"[0-9]{6}").fullmatch, "must be 6 digits"),
    "UPSTOX_TOTP": (lambda v: totp_bytes(v) >= 14,
                    "must be the base32 secret shown when TOTP was enabled (26 characters or more), not a code"),
    "UPSTOX_REDIRECT_URI": (web_address, "must be the http or https URL registered with the app"),
    "UPSTOX_NOTIFIER_WEBHOOK_URI": (web_address, "must be the http or https URL registered with the app"),
    "UPSTOX_BASE_URL": (is_base_url, "must be an https URL (http only on loopback) without a path"),
    "UPSTOX_CONFIG_SOURCE": (("ENV", "DB").__contains__, "must be ENV or DB"),
    "UPSTOX_SERVE_KEY": (re.compile(r"[!-~]{16,255}").fullmatch, "must have 16 characters or more, without spaces"),
}
LOGIN_KEYS = ("UPSTOX_MOBILE_NUMBER", "UPSTOX_PIN", "UPSTOX_TOTP")


def env_apps(settings: Mapping[str, str]) -> list[tuple[int, dict[str, str]]]:
    """(index, raw fields) of every app named in the settings."""
    found: dict[int, dict[str, str]] = {}
    for key, value in settings.items():
        if match := APP_KEY.fullmatch(key):
            found.setdefault(int(match[2]), {})[match[1].lower()] = value
    return sorted(found.items())


def check_apps(raw: list[tuple[int, dict[str, str]]], label: str, problems: list[str]) -> tuple[App, ...]:
    """Apply the guide's rules (3.2) to the apps of either source; `label` formats FIELD and INDEX."""
    apps: list[App] = []
    for index, fields in raw:
        def say(name: str, text: str) -> None:
            problems.append(f"{label.format(field=name.upper(), index=index)}: {text}")
        values = [fields.get(name, "") for name in ("api_name", "client_id", "client_secret")]
        for name, value in zip(("api_name", "client_id", "client_secret"), values):
            if not value:
                say(name, "is not set")
            elif name == "api_name" and value not in API_NAMES:
                say(name, "must be one of " + ", ".join(API_NAMES))
            elif not PLAIN.fullmatch(value):
                say(name, "must be printable characters without spaces, at most 255")
            elif name != "client_secret" and value in [getattr(app, name.replace("api_", "")) for app in apps]:
                say(name, "is used by two apps")
        apps.append(App(index, *values, fields.get("redirect_uri", "")))
    return tuple(apps)


def check_numbers(numbers: list[int], label: str) -> list[str]:
    """One to six apps, numbered from 0 without a gap (the guide 3.2)."""
    if not numbers:
        return [f"{label.format(field='CLIENT_ID', index=0)}: is not set; at least one app is needed"]
    if max(numbers) > 5 or len(numbers) > 6:
        return [f"{label.format(field='CLIENT_ID', index=max(numbers))}: at most six apps, numbered 0 to 5"]
    gaps = sorted(set(range(max(numbers))) - set(numbers))
    return [f"{label.format(field='CLIENT_ID', index=gap)}: is not set; apps are numbered from 0 without a gap"
            for gap in gaps]


def check_values(settings: Mapping[str, str], needed: Iterable[str]) -> list[str]:
    """One problem for each needed key that is missing and each present value that breaks its rule."""
    problems = [f"{key}: is not set" for key in needed if key not in settings]
    problems += [f"{key}: {text}" for key, (fits, text) in VALUE_RULES.items()
                 if key in settings and not fits(settings[key])]
    problems += ["UPSTOX_ALLOWED_ORIGINS: must be web origins (https://host:port), comma separated"
                 for origin in origin_list(settings) if not is_origin(origin)][:1]
    return problems


def origin_list(settings: Mapping[str, str]) -> tuple[str, ...]:
    """The configured web origins, without trailing slashes."""
    raw = settings.get("UPSTOX_ALLOWED_ORIGINS", "").split(",")
    return tuple(origin.strip().rstrip("/").lower() for origin in raw if origin.strip())


def build_config(settings: dict[str, str], problems: list[str], *, needed: Sequence[str] = (),
                 stored_apps: Callable[[], list[tuple[int, dict[str, str]]]] | None = None) -> Config:
    """Check everything and report all problems at once as a ConfigError.

    `stored_apps` reads the app configuration from the database; used when UPSTOX_CONFIG_SOURCE is DB.
    """
    if "UPSTOX_TOTP" in settings:
        settings = {**settings, "UPSTOX_TOTP": re.sub(r"[\s=]", "", settings["UPSTOX_TOTP"]).upper()}
    from_db = settings.get("UPSTOX_CONFIG_SOURCE") == "DB" and stored_apps is not None
    label = "upstox_api_configs, api_index {index}, {field}" if from_db else "UPSTOX_{field}_{index}"
    raw = stored_apps() if from_db else env_apps(settings)
    redirect = settings.get("UPSTOX_REDIRECT_URI", "")
    enabled = [(i, {**f, "redirect_uri": f.get("redirect_uri") or redirect}) for i, f in raw if not f.get("off")]
    if from_db and enabled and all(f["redirect_uri"] for _, f in enabled):
        needed = [key for key in needed if key != "UPSTOX_REDIRECT_URI"]
    problems = problems + check_values(settings, needed) + check_numbers([i for i, _ in raw], label)
    apps = check_apps(enabled, label, problems)
    problems += [f"{label.format(field='REDIRECT_URI', index=app.index)}: must be an http or https URL"
                 for app in apps if from_db and app.redirect_uri and not web_address(app.redirect_uri)]
    if raw and not enabled:
        problems.append("upstox_api_configs: no row is enabled")
    if problems:
        raise ConfigError(problems)
    get = settings.get
    return Config(apps, get("UPSTOX_BASE_URL", BASE_URL).rstrip("/"), get("UPSTOX_MOBILE_NUMBER", ""),
                  get("UPSTOX_PIN", ""), get("UPSTOX_TOTP", ""), get("UPSTOX_NOTIFIER_WEBHOOK_URI", ""),
                  get("UPSTOX_SERVE_KEY", ""), origin_list(settings), "DB" if from_db else "ENV")


def require_for_flow(config: Config, flow: str) -> None:
    """A ConfigError when the configuration lacks what a login by this flow needs."""
    have = {"UPSTOX_MOBILE_NUMBER": config.mobile, "UPSTOX_PIN": config.pin, "UPSTOX_TOTP": config.totp,
            "UPSTOX_NOTIFIER_WEBHOOK_URI": config.notifier}
    missing = [key for key in flow_keys(flow) if not have[key]]
    if missing:
        raise ConfigError([f"{key}: is not set; flow {flow} needs it" for key in missing])


def flow_keys(flow: str) -> tuple[str, ...]:
    """The settings that only a login needs."""
    return LOGIN_KEYS if flow == "SELENIUM" else ("UPSTOX_NOTIFIER_WEBHOOK_URI",)


# ---- Time: when a token dies -----------------------------------------------------------------------------


def cutoff_after(moment: float) -> float:
    """The first 03:30 Indian time strictly after `moment` (epoch seconds): the broker's rule."""
    local = datetime.fromtimestamp(moment, IST)
    cutoff = local.replace(hour=3, minute=30, second=0, microsecond=0)
    return (cutoff if local < cutoff else cutoff + timedelta(days=1)).timestamp()


def local_text(moment: float) -> str:
    """`yyyy-MM-dd HH:mm:ss` in the machine's zone: the only form the Java reader parses."""
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M:%S")


def parse_text_time(value: object) -> float | None:
    """Epoch seconds of a date text (local time unless it names an offset), None when unreadable."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        return None
    text = re.sub(r"\.([0-9]+)", lambda m: "." + m[1][:6].ljust(6, "0"), value.strip().replace("Z", "+00:00"))
    if not re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        return None  # newer Pythons would read other forms, older ones not
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def parse_created(value: object) -> float | None:
    """Epoch seconds of a created_at in any form that SQLite writers leave (facts/measured.md 1)."""
    if isinstance(value, (str, bytes)) and re.fullmatch(rb"[0-9]{1,16}", to_bytes(value).strip()):
        value = int(value)
    if isinstance(value, (str, bytes)):
        return parse_text_time(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e16:
        return None
    if isinstance(value, float) and value < 1e7:
        return (value - 2440587.5) * 86400  # a Julian day
    return value / 1000 if value >= 1e11 else float(value)


def to_bytes(value: str | bytes) -> bytes:
    """Text as bytes, whatever is in it."""
    return value.encode("utf-8", "replace") if isinstance(value, str) else value


# ---- Database: the source of truth, shared with a Java back end -------------------------------------------


@dataclass(frozen=True)
class Token:
    """A stored row, as far as this program reads it."""

    api_name: str
    access_token: str = field(repr=False)
    client_id: str | None
    created: float | None
    validity_at: Any
    generated_at: Any
    is_active: Any
    row_id: int = 0


DB_REMEDIES = (
    ("locked", "is locked by another program. Close what holds it, or try again in a minute."),
    ("not a database", "is not a SQLite database. Name the right file with --db."),
    ("malformed", "is damaged. Restore it from a backup, or rescue it with the sqlite3 command .recover."),
    ("readonly", "cannot be written. Give this user write permission on the file and on its folder."),
    ("unable to open", "cannot be opened. Check that its folder exists and that this user may read and write there."),
    ("is full", "cannot grow: the disk is full. Free some space."),
    ("is a view", "has a view named upstox_tokens. A table is needed; rename the view or use another file."),
    ("no column named", "lacks a column of the guide's table upstox_tokens. Add it, or use another file."),
    ("no such column", "lacks a column of the guide's table upstox_tokens. Add it, or use another file."),
    ("NOT NULL", "demands a value that the guide's INSERT does not give. Give that column a default."),
    ("UNIQUE", "has a row in the way of a unique index. Remove that row."),
)


def database_error(path: Path, error: Exception) -> DatabaseError:
    """One sentence with the path, what SQLite said, and the remedy."""
    text = str(error)
    remedy = next((words for key, words in DB_REMEDIES if key in text), "cannot be used.")
    return DatabaseError(f"The database {path} {remedy} (SQLite: {text})")


def connect(path: Path, mode: str, seconds: float) -> sqlite3.Connection:
    """Open an existing database; `mode` is ro or rw, `seconds` the patience with locks."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    connection = sqlite3.connect(uri, uri=True, timeout=seconds, isolation_level=None)
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    return connection


@contextlib.contextmanager
def transaction(path: Path, seconds: float) -> Iterator[sqlite3.Connection]:
    """BEGIN IMMEDIATE, then commit, or roll back on any exception. Keep it to milliseconds: readers wait."""
    with contextlib.closing(connect(path, "rw", seconds)) as connection, connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection


def select(path: Path, query: str, seconds: float = READ_SECONDS) -> list[tuple]:
    """Rows of a query without writing anything; none when the file or the table is missing."""
    if not path.exists():
        return []
    try:
        for mode in ("ro", "rw"):
            try:
                with contextlib.closing(connect(path, mode, seconds)) as connection:
                    return connection.execute(query).fetchall()
            except sqlite3.OperationalError as error:
                # a journal left by a killed writer must be rolled back before anyone can read
                if mode == "rw" or "readonly" not in str(error) and "unable to open" not in str(error):
                    raise
        return []
    except sqlite3.Error as error:
        if "no such table" in str(error):
            return []
        raise database_error(path, error) from None


def read_tokens(path: Path) -> list[Token]:
    """Every row of upstox_tokens, in any form that other programs leave."""
    rows = select(path, "SELECT api_name, access_token, client_id, created_at, validity_at, generated_at, "
                        "is_active, id FROM upstox_tokens")
    return [Token(str(name), text_or_empty(token), client, parse_created(created), validity, generated, active,
                  number if isinstance(number, int) else 0)
            for name, token, client, created, validity, generated, active, number in rows]


def text_or_empty(value: object) -> str:
    """A stored token as text."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value or "")


def newest(rows: Iterable[Token]) -> dict[str, Token]:
    """The newest row of each api_name: several of one name are tolerated."""
    ordered = sorted(rows, key=lambda row: (row.created or 0, row.row_id))
    return {row.api_name: row for row in ordered}


def create_database(path: Path) -> bool:
    """Make the file (mode 0600) and the guide's table where missing; True when the file is new."""
    new = not path.exists()
    try:
        if new:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        if not select(path, "SELECT 1 FROM sqlite_master WHERE name = 'upstox_tokens'"):
            with transaction(path, PROOF_SECONDS) as connection:
                connection.execute(TOKENS_DDL)
        return new
    except OSError as error:
        raise DatabaseError(f"The database {path} cannot be created: {error.strerror}. "
                            "Name a file in a folder you may write with --db.") from None
    except sqlite3.Error as error:
        raise database_error(path, error) from None


def token_row(app: App, access_token: str, now: float, valid_until: float) -> dict[str, Any]:
    """The columns of the guide's INSERT (4.1); a plain Java reader parses exactly these forms."""
    return {
        "access_token": access_token, "api_name": app.name, "client_id": app.client_id,
        "client_secret": app.client_secret, "created_at": int(now * 1000), "expires_in": int(valid_until - now),
        "is_primary": int(app.name == "PRIMARY"), "redirect_uri": app.redirect_uri, "token_type": "Bearer",
        "api_index": app.index, "generated_at": local_text(now), "is_active": 1,
        "updated_at": int(now * 1000), "validity_at": local_text(valid_until)}


def upsert(connection: sqlite3.Connection, row: Mapping[str, Any]) -> None:
    """Replace the row of one api_name (the guide 4.1)."""
    connection.execute("DELETE FROM upstox_tokens WHERE api_name = :api_name", row)
    connection.execute(f"INSERT INTO upstox_tokens ({', '.join(row)}) VALUES (:{', :'.join(row)})", row)


def prove_writable(path: Path, apps: Iterable[App], now: float) -> None:
    """The real DELETE and INSERT for each app, rolled back: no login for a database that refuses the token."""
    try:
        with contextlib.closing(connect(path, "rw", PROOF_SECONDS)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            for app in apps:
                upsert(connection, token_row(app, "x" * 2000, now, now + 1))
            connection.rollback()
    except sqlite3.Error as error:
        raise database_error(path, error) from None


def deactivate(path: Path, tokens: Iterable[Token], now: float) -> None:
    """Mark tokens that the broker answered 401 for; a row replaced meanwhile is left alone."""
    try:
        with transaction(path, PROOF_SECONDS) as connection:
            for token in tokens:
                connection.execute("UPDATE upstox_tokens SET is_active = 0, updated_at = ? "
                                   "WHERE api_name = ? AND access_token = ?",
                                   (int(now * 1000), token.api_name, token.access_token))
    except sqlite3.Error as error:
        raise database_error(path, error) from None


def add_audit(connection: sqlite3.Connection, row: Sequence[Any]) -> None:
    """(at ms, run id, api_name, source, flow, outcome, reason); the table is made when first needed."""
    connection.execute(AUDIT_DDL)
    connection.execute("INSERT INTO upstox_token_audit (at, run_id, api_name, source, flow, outcome, reason) "
                       "VALUES (?, ?, ?, ?, ?, ?, ?)", row)


def import_apps(path: Path, apps: Iterable[App], now: float) -> None:
    """Copy the app configuration into upstox_api_configs; rows in the way are replaced, others kept."""
    stamp = int(now * 1000)
    try:
        with transaction(path, PROOF_SECONDS) as connection:
            connection.execute(CONFIGS_DDL)
            for app in apps:
                connection.execute("DELETE FROM upstox_api_configs WHERE api_index = ? OR api_name = ?",
                                   (app.index, app.name))
                connection.execute(
                    "INSERT INTO upstox_api_configs (api_index, api_name, client_id, client_secret, redirect_uri, "
                    "is_primary, is_enabled, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?, 1, ?, ?)",
                    (app.index, app.name, app.client_id, app.client_secret, app.redirect_uri or None,
                     int(app.name == "PRIMARY"), stamp, stamp))
    except sqlite3.Error as error:
        raise database_error(path, error) from None


def read_stored_apps(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The rows of upstox_api_configs; disabled ones carry the field `off`."""
    rows = select(path, "SELECT api_index, api_name, client_id, client_secret, redirect_uri, is_enabled "
                        "FROM upstox_api_configs ORDER BY api_index")
    if not rows:
        raise ConfigError([f"upstox_api_configs: no rows in {path}. Fill it with --import-config."])
    names = ("api_name", "client_id", "client_secret", "redirect_uri")
    return [(int(index), {**{name: str(value or "") for name, value in zip(names, values)},
                          "off": "" if enabled in (1, "1", "true", "TRUE") else "off"})
            for index, *values, enabled in rows]


def find_database(db: str | os.PathLike | None, script: str = __file__) -> Path:
    """--db, else an existing vega_trade.db here or beside the script, else one to be created here."""
    here = Path.cwd()
    return Path(db) if db else first_existing(DATABASE_NAME, (here, Path(script).parent)) or here / DATABASE_NAME


# ---- The broker's HTTP API ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, or in `error` why there is none: timeout, no connection, unexpected answer."""

    code: int = 0
    body: bytes = field(default=b"", repr=False)
    date: str = ""
    error: str = ""


def side_by_side(calls: Sequence[Callable[[], Any]], seconds: float, late: Any, grace: float = 0) -> list[Any]:
    """Results of the calls, each in a thread of its own; `late` for those not back after `seconds` overall.

    urllib's own timeout is per socket operation and never ends a dripping answer; a daemon thread that is
    still reading then does not keep the program alive. A signal is passed on, after `grace` seconds for the calls.
    """
    results = [late] * len(calls)

    def work(place: int) -> None:
        results[place] = calls[place]()

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    try:
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
    except BaseException:
        for thread in threads:
            thread.join(grace)
        raise
    return list(results)


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body, {} when it is anything else."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def error_code(answer: Answer) -> tuple[str, str]:
    """(code, message) of the broker's error envelope; both spellings of the key are sent (facts 3)."""
    errors = json_object(answer.body).get("errors")
    first = errors[0] if isinstance(errors, list) and errors and isinstance(errors[0], dict) else {}
    code = first.get("errorCode") or first.get("error_code") or ""
    return printable(code, 40), printable(first.get("message") or "", 200)


def printable(value: object, limit: int) -> str:
    """Foreign text made fit for one line of a terminal or a log."""
    return "".join(c if c.isprintable() else " " for c in str(value))[:limit].strip()


def explain(answer: Answer) -> str:
    """What a failed broker call means and what to do next, as two sentences."""
    code, message = error_code(answer)
    if code in BROKER_ERRORS:
        meaning, remedy = BROKER_ERRORS[code]
        return f"{meaning} ({code}). {remedy}"
    if code:
        return f"the broker refused with {code}: {message.rstrip('.')}. Look the code up in its documentation."
    if answer.code == 429:
        return "the broker counts too many requests (HTTP 429). Wait a few minutes, then run again."
    problem = answer.error or (f"HTTP {answer.code}" if answer.code != 200 else "unexpected answer")
    return f"the broker gave no usable answer ({problem}). Look at status.upstox.com, then run again."


class Broker:
    """The calls of the broker's API that this program makes; none follows a redirect or raises."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.opener = urllib.request.OpenerDirector()  # bare: no redirects, files or cookies, any status returned
        if base_url.startswith("https:"):
            self.opener.add_handler(urllib.request.ProxyHandler())
            self.opener.add_handler(urllib.request.HTTPSHandler(context=ssl.create_default_context()))
            self.opener.add_handler(urllib.request.HTTPHandler())  # how an https request reaches its proxy
        else:  # loopback; a proxy would read the bearer token
            self.opener.add_handler(urllib.request.HTTPHandler())

    def send(self, path: str, seconds: float, *, headers: Mapping[str, str] | None = None,
             data: bytes | None = None) -> Answer:
        """One request; GET, or POST when there is data. The deadline covers the body too."""
        end = time.monotonic() + seconds
        request = urllib.request.Request(self.base_url + path, data, {"Accept": "application/json", **(headers or {})})
        try:
            with self.opener.open(request, timeout=seconds) as response:
                body = b""
                while chunk := response.read1(65536):
                    body += chunk
                    if len(body) > BODY_LIMIT or time.monotonic() > end:
                        return Answer(error="unexpected answer" if len(body) > BODY_LIMIT else "timeout")
                whole = int(response.headers.get("Content-Length") or len(body)) == len(body)
                date = response.headers.get("Date", "")
                return Answer(response.status, body, date) if whole else Answer(error="unexpected answer")
        except TimeoutError:
            return Answer(error="timeout")
        except OSError as error:
            slow = isinstance(getattr(error, "reason", None), TimeoutError)
            return Answer(error="timeout" if slow else "no connection")
        except (http.client.HTTPException, ValueError):
            return Answer(error="unexpected answer")

    def profile(self, token: str) -> Answer:
        """GET /v2/user/profile: the only proof that a token is alive."""
        return self.send("/v2/user/profile", PROFILE_SECONDS, headers={"Authorization": f"Bearer {token}"})

    def dialog_path(self, app: App, state: str) -> str:
        """Path and query of the authorize dialog."""
        return "/v2/login/authorization/dialog?" + urllib.parse.urlencode({
            "response_type": "code", "client_id": app.client_id, "redirect_uri": app.redirect_uri, "state": state})

    def preflight(self, app: App) -> Answer:
        """Ask for the authorize dialog without following it: costs no OTP, tells a wrong pair."""
        return self.send(self.dialog_path(app, "preflight"), PROFILE_SECONDS)

    def exchange(self, app: App, code: str) -> Answer:
        """POST the authorization code; it is spent whatever the answer is."""
        form = {"code": code, "client_id": app.client_id, "client_secret": app.client_secret,
                "redirect_uri": app.redirect_uri, "grant_type": "authorization_code"}
        return self.send("/v2/login/authorization/token", EXCHANGE_SECONDS, data=urllib.parse.urlencode(form).encode())


def clock_offset(answer: Answer, at: float) -> float | None:
    """Seconds that this machine's clock was ahead of the answer's Date header, None without one."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return at - parsedate_to_datetime(answer.date).timestamp()
    return None


# ---- Status of a token: time, then the broker's profile answer --------------------------------------------


@dataclass(frozen=True)
class Status:
    """What is known of one app's token. `word` is VALID, INVALID, EXPIRED, NOT FOUND or UNKNOWN."""

    api_name: str
    word: str
    reason: str = ""
    token: Token | None = field(default=None, repr=False)

    @property
    def label(self) -> str:
        """The status as the summary shows it."""
        return f"{self.word} ({self.reason})" if self.reason else self.word


NEEDS_LOGIN = ("INVALID", "EXPIRED", "NOT FOUND")


def judge_stored(token: Token | None, client_id: str | None, now: float) -> tuple[str, str] | None:
    """(word, reason) from the row alone, None when only the broker can tell (contract 4, steps 1-3)."""
    if token is None or not token.access_token.strip():
        return "NOT FOUND", ""
    if str(token.is_active) in ("0", "false"):
        return "INVALID", "inactive"
    if token.client_id and token.client_id != client_id:
        return "INVALID", "client changed"
    if not PLAIN_TOKEN.fullmatch(token.access_token):
        return "INVALID", "malformed token"  # could not even be sent in a header
    valid_until = parse_text_time(token.validity_at)
    if valid_until is None:
        return "EXPIRED", "validity unreadable"
    if now >= valid_until or token.created is not None and now >= cutoff_after(token.created):
        return "EXPIRED", ""
    return None


PLAIN_TOKEN = re.compile(r"[!-~]{1,8000}")


def judge_profile(answer: Answer) -> tuple[str, str]:
    """(word, reason) from the broker's answer to the profile call (contract 4, step 4)."""
    if answer.error:
        return "UNKNOWN", answer.error
    if answer.code == 401:
        return "INVALID", "401"
    if answer.code == 200 and json_object(answer.body).get("status") == "success":
        return "VALID", ""
    return "UNKNOWN", str(answer.code) if answer.code >= 400 else "unexpected answer"


def check_tokens(config: Config, path: Path, broker: Broker, now: float) -> list[Status]:
    """The status of every configured app; the profile calls run side by side."""
    rows = newest(read_tokens(path))
    verdicts = {app.name: judge_stored(rows.get(app.name), app.client_id, now) for app in config.apps}
    asked = [name for name, verdict in verdicts.items() if verdict is None]
    calls = [lambda name=name: broker.profile(rows[name].access_token) for name in asked]
    answers = side_by_side(calls, PROFILE_SECONDS, Answer(error="timeout"))
    verdicts.update((name, judge_profile(answer)) for name, answer in zip(asked, answers))
    return [Status(name, *verdict, rows.get(name)) for name, verdict in verdicts.items()]


def unknown_names(path: Path) -> list[str]:
    """Names in the table that are none of the fixed API names."""
    return sorted({token.api_name for token in read_tokens(path)} - set(API_NAMES))


def access_token(api_name: str, db: str | os.PathLike | None = None) -> str:
    """The stored access token of one app, for Python programs.

    Raises TokenError with the reason when there is none, it is inactive, or its time is over (layer 1 of the
    guide, section 5); the broker is not asked.
    """
    path = find_database(db)
    token = newest(read_tokens(path)).get(api_name.upper())
    status = judge_stored(token, token.client_id if token else None, time.time())
    if status:
        raise TokenError(f"{api_name.upper()} is {Status(api_name, *status).label} in {path}. "
                         "Run upstox_tokens.py --mode INVALID_ONLY.")
    return token.access_token


# ---- One run at a time, and what protects the account ---------------------------------------------------


def lock_exclusively(handle: int) -> bool:
    """Take the lock on an open file, False when another process has it; the system drops it at process end."""
    try:
        import fcntl
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: lock a byte far behind the text, since locked bytes cannot be read
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
    """The run lock of one database and, in the same file, the memory that keeps the account from being locked.

    The broker locks an account after five wrong PINs. So every code and PIN is counted here before it is
    sent, and counted off when the broker took it; the counts outlive a killed process. The file holds no secret:
    `fingerprint` is an HMAC of mobile number and PIN under the TOTP secret, and changes with any of the three.
    """

    CODES = 2  # a refused TOTP is tried once more with the next window's code

    def __init__(self, database: Path, config: Config) -> None:
        self.path = Path(f"{database.resolve()}.upstox-lock")
        self.handle: int | None = None
        self.state: dict[str, Any] = {}
        parts = f"{config.mobile}:{config.pin}".encode()
        self.fingerprint = hmac.new(config.totp.encode(), parts, hashlib.sha256).hexdigest()

    def acquire(self) -> None:
        """Become the one generating run of this database, or raise BusyError."""
        try:
            self.handle = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise DatabaseError(f"The lock file {self.path} cannot be opened: {error.strerror}. "
                                "Give this user write permission on it and on its folder.") from None
        if not lock_exclusively(self.handle):
            self.release()
            raise BusyError("Another run is busy generating tokens for this database. Try again when it has ended.")
        self.load()

    def release(self) -> None:
        """Give the lock back; the file stays, since removing it would race with the next run."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def load(self) -> None:
        """Read the memory; a change of PIN, TOTP secret or mobile number in the configuration clears it."""
        try:
            state = json_object(self.path.read_bytes())
        except OSError:
            state = {}
        window = state.get("window")
        self.state = state if state.get("fingerprint") == self.fingerprint else {"fingerprint": self.fingerprint}
        self.state["window"] = window if isinstance(window, int) else 0

    def save(self, **changes: Any) -> None:
        """Write the memory through to the disk, in one write, before what it announces happens."""
        self.state.update(changes)
        data = json.dumps(self.state).encode()
        os.lseek(self.handle, 0, os.SEEK_SET)
        os.write(self.handle, data.ljust(1024))  # longer than any earlier text, so nothing is left behind it
        os.fsync(self.handle)

    def count(self, key: str) -> int:
        """How often a secret was sent since the broker last took one."""
        value = self.state.get(key)
        return value if isinstance(value, int) else 0

    def hold(self) -> str:
        """Why an unattended run must not log in, or an empty text."""
        if self.state.get("hold"):
            return printable(self.state["hold"], 300)
        if self.count("pins") > bool(self.state.get("proven")):
            return "an earlier run ended before the broker answered to the PIN"
        if self.count("codes") >= self.CODES:
            return "an earlier run ended before the broker answered to the TOTP code"
        return ""

    def clear(self) -> None:
        """An operator goes ahead."""
        self.save(hold="", pins=0, codes=0)


def totp_wait(now: float, last_window: int) -> float:
    """Seconds until a code may be sent that was never sent before and has time left."""
    window, left = int(now // TOTP_WINDOW), TOTP_WINDOW - now % TOTP_WINDOW
    used = min(last_window, window)  # a later one was noted by a clock that has been set back since
    return 0.0 if window > used and left >= TOTP_MARGIN else (window + 1) * TOTP_WINDOW - now


# ---- The browser ------------------------------------------------------------------------------------------

# the login page's only stable names (facts/login-page.md): step -> (field id, button id)
STEPS = {"pin": ("pinCode", "pinContinueBtn"), "otp": ("otpNum", "continueBtn"), "mobile": ("mobileNum", "getOtp")}
CAPTCHA = 'iframe[src*="challenges.cloudflare.com"], .cf-turnstile'

LOOK = """
const [ids, captcha] = arguments, items = {};
for (const id of ids) {
  const e = document.getElementById(id);
  if (!e || !e.getClientRects().length || getComputedStyle(e).visibility === 'hidden') continue;
  items[id] = {enabled: !e.disabled, value: (e.value || '').replace(/[^0-9]/g, '')};
}
return {items, path: location.pathname, captcha: !!document.querySelector(captcha),
        text: (document.body ? document.body.innerText : '').slice(0, 20000)};
"""
# a press is one step inside the page, so that no re-rendering comes between finding and clicking; what lies
# over the button (a spinner) makes it wait, as it would a person
PRESS = """
const e = document.getElementById(arguments[0]);
if (!e || e.disabled || !e.getClientRects().length) return false;
e.scrollIntoView({block: 'center'});
const r = e.getBoundingClientRect(), top = document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2);
if (!e.contains(top)) return false;
e.click();
return true;
"""
BLANK = """
for (const e of document.querySelectorAll('input')) e.value = '';
const walk = document.createTreeWalker(document.documentElement, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) for (const secret of arguments[0])
  if (walk.currentNode.data.includes(secret)) walk.currentNode.data = walk.currentNode.data.replaceAll(secret, '***');
"""
# holds the driver in a process group of its own, and ends it with all its browsers when our end of the pipe
# closes: at the end of a run, and just as well when this program was killed
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


@dataclass(frozen=True)
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
        item = self.items.get(STEPS[step][0])
        return item["value"] if item else None

    def ready(self, step: str) -> bool:
        """Whether the step's button can be pressed."""
        return bool(self.items.get(STEPS[step][1], {}).get("enabled"))

    def toast(self) -> tuple[str, str] | None:
        """(message, code) of an error toast; it lives 3 s and ends in [code]."""
        match = re.search(r"^(.*)\[([0-9]{3,7})\]\s*$", self.text, re.MULTILINE)
        return (printable(match[1], 200), match[2]) if match else None


def browser_arguments(profile: str, redirect_uris: Iterable[str], headed: bool) -> list[str]:
    """Chromium's switches. None hides that the browser is automated."""
    arguments = [f"--user-data-dir={profile}", "--window-size=1280,900", "--disable-dev-shm-usage",
                 "--no-first-run", "--disable-sync", "--disable-background-networking",
                 "--disable-component-update", f"--host-resolver-rules={resolver_rules(redirect_uris)}"]
    if not headed:
        arguments.append("--headless=new")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium's sandbox does not run as root
    return arguments


def resolver_rules(redirect_uris: Iterable[str]) -> str:
    """Make the redirect's host unknown to the browser: the code stays in the address bar, nobody receives it."""
    rules = set()
    for parts in map(urllib.parse.urlsplit, redirect_uris):
        ports = [parts.port] if parts.port else [443, 80] if parts.scheme == "http" else [443]
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        rules.update(f"MAP {host}:{port} ~NOTFOUND" for port in ports)
    return ",".join(sorted(rules))


class Browser:
    """One Chromium for a whole run, started when first needed and gone, profile and all, when closed."""

    def __init__(self, redirect_uris: Iterable[str], headed: bool, environ: Mapping[str, str]) -> None:
        self.redirect_uris, self.headed, self.environ = tuple(redirect_uris), headed, environ
        self.keeper: subprocess.Popen | None = None
        self.driver: Any = None

    def start(self) -> None:
        """Start driver and browser; PageFault when they do not come up."""
        from selenium import webdriver
        from selenium.common.exceptions import WebDriverException
        from selenium.webdriver.common.proxy import Proxy, ProxyType
        from selenium.webdriver.remote.client_config import ClientConfig
        options = webdriver.ChromeOptions()
        driver_path = find_driver(options, self.environ)
        profile = os.path.join(tempfile.gettempdir(), f"upstox_tokens-{secrets.token_hex(8)}")
        for argument in browser_arguments(profile, self.redirect_uris, self.headed):
            options.add_argument(argument)
        options.page_load_strategy = "eager"
        self.keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", KEEPER, profile, driver_path, "--port=0"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            start_new_session=True, env=self.child_environ(profile))
        # straight to the driver on loopback: a proxy would read every key typed
        address = side_by_side([lambda: driver_address(self.keeper.stdout)], PAGE_SECONDS, "")[0]
        if not address:
            raise LoginFailed(f"chromedriver did not start. {INSTALL_BROWSER}", stops_run=True)
        config = ClientConfig(address, timeout=OUTCOME_SECONDS, proxy=Proxy({"proxyType": ProxyType.DIRECT}))
        with browser_faults():
            try:
                self.driver = webdriver.Remote(config.remote_server_addr, options=options, client_config=config)
            except WebDriverException as error:
                raise LoginFailed(f"the browser did not start ({printable(error.msg, 200)}). "
                                  f"{INSTALL_BROWSER}", stops_run=True) from None
            self.driver.set_page_load_timeout(PAGE_SECONDS)

    def child_environ(self, profile: str) -> dict[str, str]:
        """The environment of driver and browser: no secret of ours, no proxy for the redirect's host."""
        environ = {k: v for k, v in self.environ.items() if not k.startswith(("UPSTOX_", "SE_"))}
        hosts = [urllib.parse.urlsplit(uri).hostname or "" for uri in self.redirect_uris]
        for key in ("no_proxy", "NO_PROXY"):
            environ[key] = ",".join(filter(None, [environ.get(key), *hosts]))
        if sys.platform == "linux":
            environ["TMPDIR"] = profile  # what Chromium leaves behind goes with the profile
        return environ

    def open(self, url: str) -> None:
        """Load a page. A redirect that ends at the unreachable redirect URI is arrival, not a fault."""
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
        """Whether an address is a redirect URI's: same scheme, host, port and path."""
        return any(same_place(url, uri) for uri in self.redirect_uris)

    def look(self) -> View:
        """What the page shows now; an empty view while it is between two documents."""
        from selenium.common.exceptions import WebDriverException
        ids = [name for pair in STEPS.values() for name in pair]
        with browser_faults():
            url = self.driver.current_url
            if self.arrived(url):
                return View(url)
            try:
                return View(url, **self.driver.execute_script(LOOK, ids, CAPTCHA))
            except WebDriverException as error:
                if re.search("session|crash|disconnected|not reachable|no such window", str(error.msg)):
                    raise
                return View(url)

    def wait(self, until: Callable[[View], object], seconds: float) -> View | None:
        """Look until the condition holds; None when it does not in time. Looks get rarer the longer it takes."""
        start = time.monotonic()
        while True:
            view = self.look()
            spent = time.monotonic() - start
            if until(view):
                return view
            if spent > seconds:
                return None
            time.sleep(min(0.02 + spent / 20, 0.5))

    def type(self, step: str, text: str) -> None:
        """Type over whatever the step's field holds. A field that just vanished or changed is no error."""
        from selenium.common.exceptions import (ElementNotInteractableException, InvalidElementStateException,
                                                NoSuchElementException, StaleElementReferenceException)
        from selenium.webdriver.common.keys import Keys
        select_all = (Keys.COMMAND if sys.platform == "darwin" else Keys.CONTROL) + "a" + Keys.NULL
        with browser_faults(), contextlib.suppress(ElementNotInteractableException, InvalidElementStateException,
                                                   NoSuchElementException, StaleElementReferenceException):
            self.driver.find_element("id", STEPS[step][0]).send_keys(select_all + text)

    def press(self, step: str) -> bool:
        """Press the step's button if it is there, enabled and not covered."""
        with browser_faults():
            return bool(self.driver.execute_script(PRESS, STEPS[step][1]))

    def evidence(self, folder: Path, name: str, secrets_known: Iterable[str]) -> None:
        """Store a screenshot and the page's text with typed values and secrets blanked."""
        with browser_faults():
            self.driver.execute_script(BLANK, sorted(secrets_known))
            text = redact(self.look().text, secrets_known)
            (folder / f"{name}.png").write_bytes(self.driver.get_screenshot_as_png())
            (folder / f"{name}.txt").write_text(text, encoding="utf-8")

    def close(self) -> None:
        """End driver and browser and delete the profile; safe to call at any time."""
        keeper, self.keeper, self.driver = self.keeper, None, None
        if keeper:
            keeper.stdin.close()
            keeper.wait()
            keeper.stdout.close()


INSTALL_BROWSER = ("Install a browser and its driver (Debian: apt install chromium chromium-driver) "
                   "and run --check.")


@contextlib.contextmanager
def browser_faults() -> Iterator[None]:
    """Turn whatever Selenium or its HTTP client raise into a PageFault: their texts may quote what was typed."""
    import urllib3.exceptions
    from selenium.common.exceptions import WebDriverException
    try:
        yield
    except WebDriverException as error:
        reason = re.search(r"net::\w+|timeout|crash|disconnected", str(error.msg))
        raise PageFault(reason[0] if reason else type(error).__name__) from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise PageFault(type(error).__name__) from None


def find_driver(options: Any, environ: Mapping[str, str]) -> str:
    """The chromedriver on PATH, else what Selenium Manager finds or fetches."""
    if path := shutil.which("chromedriver", path=environ.get("PATH")):
        return path
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.driver_finder import DriverFinder
    os.environ["SE_AVOID_STATS"] = "true"
    try:
        finder = DriverFinder(Service(), options)
        path, options.binary_location = finder.get_driver_path(), finder.get_browser_path()
        return path
    except WebDriverException:
        raise LoginFailed(f"there is no chromedriver, and none could be fetched. {INSTALL_BROWSER}",
                          stops_run=True) from None


def driver_address(output: Any) -> str:
    """The address that a starting chromedriver announces, empty when it ends instead."""
    for line in output:
        if match := re.search(rb"started successfully on port (\d+)", line):
            return f"http://127.0.0.1:{int(match[1])}"
    return ""


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


def redact(text: str, secrets_known: Iterable[str]) -> str:
    """Replace every known secret in a text: the last line of defence behind not putting it there."""
    for secret in sorted(secrets_known, key=len, reverse=True):
        text = text.replace(secret, "[hidden]")
    return text


# ---- The login page, step by step --------------------------------------------------------------------------

# what the page's error codes mean (facts/login-page.md): text, stops the run, needs an operator, holds
PAGE_CODES = {
    "1017016": ("the broker does not know the mobile number. Correct UPSTOX_MOBILE_NUMBER.", True, True, False),
    "1017074": ("several accounts are linked to the mobile number. Ask the broker to separate them, or use "
                "--flow V3.", True, True, False),
    "1017069": ("the broker's limit of OTP requests is reached. Wait 10 minutes, then run again.", True, False, False),
    "1017078": ("the broker blocked OTP entry. Wait 10 minutes, then run again.", True, False, False),
    "1017125": ("the broker blocked OTP entry. Wait 10 minutes, then run again.", True, False, False),
    "1017076": ("the broker's OTP session expired. Run again.", False, False, False),
    "1017090": ("the account is locked after too many wrong PINs. Unlock it in the Upstox app (PAN and OTP), then "
                "start the menu.", True, True, True),
    "1017072": ("the broker calls this login page's version outdated. Run again later.", False, False, False),
    "500": ("the login page lost its connection to the broker. Run again.", False, False, False),
}
PAGE_CODES |= dict.fromkeys(("1017007", "1017079", "1017084", "1017095", "1017105"),
                            ("the broker ended the login session. Run again.", False, False, False))
# alerts that carry no code: pattern in the page's text or path -> text or code, and the flags as above
PAGE_TEXTS = (
    (r"account has been locked|^/unlock-account", PAGE_CODES["1017090"]),
    (r"create a new (6-digit )?pin", ("the page asks to create a new PIN, which this program never does. Set the PIN "
                                      "in the Upstox app, then run again.", False, False, False)),
    (r"reactivate your account|^/reactivate-account", ("the account is dormant. Reactivate it in the Upstox app, "
                                                       "then run again.", False, False, False)),
    (r"^something went wrong", ("the login page says that something went wrong. Run again.", False, False, False)),
)
REFUSED = {
    "mobile": ("the broker did not accept the mobile number{}. Check UPSTOX_MOBILE_NUMBER.", True, True, False),
    "otp": ("the broker refused the TOTP code{}. Check UPSTOX_TOTP and this machine's clock, then start the menu.",
            True, True, True),
    "pin": ("the broker refused the PIN{}. Correct UPSTOX_PIN (five wrong PINs lock the account).", True, True, True),
}


def login_failure(words: tuple[str, bool, bool, bool], said: str = "") -> LoginFailed:
    """The exception for one row of the tables above."""
    text, stops_run, operator, hold = words
    return LoginFailed(text.format(f" ({said})" if said else ""), stops_run=stops_run, operator=operator, hold=hold)


def page_complaint(view: View, step: str) -> LoginFailed | None:
    """What the page says against going on after an entry in `step`, None when it says nothing."""
    for pattern, words in PAGE_TEXTS:
        if re.search(pattern, view.text, re.I | re.M) or re.search(pattern, view.path):
            return login_failure(words)
    if dialog := re.search(r"UDAPI\d+", view.text):
        meaning, remedy = BROKER_ERRORS.get(dialog[0], ("the authorize dialog answered with an error", "Run again."))
        return LoginFailed(f"{meaning} ({dialog[0]}). {remedy}")
    blocked = step == "otp" and not view.items.get("otpNum", {"enabled": True})["enabled"]
    if blocked and re.search(r"too many|exceeded|blocked|try again (after|in)", view.text, re.I):
        return login_failure(PAGE_CODES["1017078"])
    if toast := view.toast():
        message, code = toast
        return login_failure(PAGE_CODES.get(code) or REFUSED.get(step, PAGE_CODES["500"]), f"{message} {code}".strip())
    return None


def authorization_code(url: str, state: str) -> str:
    """The code in the redirect's address, if the state is the one this login sent."""
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)
    if query.get("state") != [state]:
        raise LoginFailed("the redirect came back with another state than this login sent, so its code was not used. "
                          "Run again; if it stays so, someone interferes with the connection.")
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
        view = self.next_step("")
        while view.step:
            view = {"mobile": self.enter_mobile, "otp": self.enter_totp, "pin": self.enter_pin}[view.step](view)
        return authorization_code(view.url, state)

    def next_step(self, step: str, seconds: float = PAGE_SECONDS) -> View:
        """Wait until the page shows another step than this one, or arrives; what it says against it is raised."""
        def moved(view: View) -> object:
            return self.browser.arrived(view.url) or view.step not in ("", step) or page_complaint(view, step)
        view = self.browser.wait(moved, seconds)
        if view is None and self.typed:
            raise LoginFailed(f"the login page did not go on within {seconds} s. Run again; if it stays so, look at "
                              "it with --headed.")
        if view is None:
            raise PageFault("the page stayed blank")
        if complaint := page_complaint(view, step):
            raise complaint
        if view.step == "mobile" and self.under_way:
            raise login_failure(PAGE_CODES["1017079"])
        return view

    def fill(self, step: str, text: str) -> None:
        """Type until the field holds the text; a page that re-renders may lose keys on the way."""
        self.typed = True
        for _ in range(20):
            self.browser.type(step, text)
            view = self.browser.wait(lambda v: v.value(step) in (text, None) or page_complaint(v, step), 1.0)
            if view:
                return
        raise LoginFailed(f"the login page did not take what was typed ({step}). Run again.")

    def submit(self, step: str, seconds: float) -> None:
        """Press the step's button once it can be pressed; a page that moved on by itself needs no press."""
        def gone(view: View) -> object:
            return view.value(step) in (None, "") or page_complaint(view, step)
        self.browser.wait(lambda v: gone(v) or v.ready(step) and self.browser.press(step), seconds)

    def enter_mobile(self, view: View) -> View:
        """Mobile number, then Get OTP, which a CAPTCHA may keep disabled."""
        self.fill("mobile", self.run.config.mobile)
        view = self.browser.wait(lambda v: v.ready("mobile") or v.captcha, PAGE_SECONDS)
        if not view:
            raise LoginFailed("the Get OTP button stayed disabled. Run again; if it stays so, look at it with --headed.")
        if not view.ready("mobile"):
            self.wait_for_captcha()
        self.under_way = True
        self.submit("mobile", PAGE_SECONDS)
        self.say("asked for the OTP step")
        return self.next_step("mobile", OUTCOME_SECONDS)

    def wait_for_captcha(self) -> None:
        """A CAPTCHA belongs to the operator; headless it can only pass by itself."""
        headed = self.browser.headed
        self.run.reporter.operator(self.app.name, "solve the CAPTCHA in the browser window" if headed
                                   else "the page shows a CAPTCHA; waiting whether it passes by itself")
        passed = self.browser.wait(lambda v: v.ready("mobile") or v.step != "mobile", CAPTCHA_SECONDS[headed])
        self.run.reporter.operator(self.app.name, "")
        if not passed:
            raise CaptchaShown(headed)

    def enter_totp(self, view: View) -> View:
        """A code that was never sent before; if it is refused, one more from the next window."""
        while True:
            if self.guard.count("codes") >= self.guard.CODES:
                raise login_failure(REFUSED["otp"])
            self.fill("otp", self.fresh_code())
            self.submit("otp", PAGE_SECONDS)
            self.say("TOTP code sent")
            try:
                view = self.next_step("otp", OUTCOME_SECONDS)
            except LoginFailed as refusal:
                if not refusal.hold or self.guard.count("codes") >= self.guard.CODES:
                    raise
                self.say("the broker refused the TOTP code; trying once more with the next one")
                self.browser.wait(lambda v: not v.toast(), 10)  # or it would be taken for the next answer
                continue
            self.guard.save(codes=0)
            return view

    def fresh_code(self) -> str:
        """Wait for a window whose code was never sent, note it as sent, and give the code."""
        import pyotp
        self.run.pause(totp_wait(self.run.now(), self.guard.count("window")), self.app.name, "next TOTP code")
        now = self.run.now()
        code = pyotp.TOTP(self.run.config.totp).at(int(now))
        self.run.secrets.add(code)
        self.guard.save(window=int(now // TOTP_WINDOW), codes=self.guard.count("codes") + 1)
        return code

    def enter_pin(self, view: View) -> View:
        """The PIN, once. It is noted before it is typed, so that even a killed run is remembered."""
        if self.browser.look().value("pin") is None:
            return self.next_step("pin")  # a stale session went back to the first step by itself
        self.under_way = True
        self.guard.save(pins=self.guard.count("pins") + 1)
        self.fill("pin", self.run.config.pin)
        self.submit("pin", PAGE_SECONDS)
        self.say("PIN sent")
        view = self.next_step("pin", OUTCOME_SECONDS)
        self.guard.save(pins=0, proven=True)
        return view


# ---- A generating run --------------------------------------------------------------------------------------


class Reporter:
    """Where a run tells its progress; this one tells nobody."""

    def step(self, api_name: str, text: str) -> None:
        """One finished or beginning step of one app."""

    def countdown(self, api_name: str, text: str, left: float) -> None:
        """A wait goes on; `left` seconds remain."""

    def operator(self, api_name: str, text: str) -> None:
        """The run waits for a person; an empty text ends that."""

    def result(self, api_name: str, outcome: Outcome) -> None:
        """One app is through."""


@dataclass(frozen=True)
class Outcome:
    """How one app fared: DONE, FAILED (tried), SKIPPED (not tried)."""

    state: str
    message: str = ""
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
    now: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    run_id: str = field(default_factory=lambda: secrets.token_hex(8))
    secrets: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        self.secrets |= self.config.secrets()

    def pause(self, seconds: float, api_name: str, text: str) -> None:
        """Sleep in short steps, telling how long it still takes."""
        end = self.now() + seconds
        while (left := end - self.now()) > 0:
            self.reporter.countdown(api_name, text, left)
            self.sleep(min(left, 1.0))

    def audit(self, api_name: str, outcome: str, reason: str = "") -> None:
        """One row per attempt; a database that cannot take it now does not stop the run."""
        row = (int(self.now() * 1000), self.run_id, api_name, self.source, self.flow, outcome,
               redact(reason, self.secrets) or None)
        try:
            with transaction(self.path, READ_SECONDS) as connection:
                add_audit(connection, row)
        except sqlite3.Error as error:
            self.reporter.step(api_name, f"the audit row was not written ({error})")


@dataclass
class Result:
    """How a run ended: every configured app's status, and the outcome of those it was about."""

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


def choose(mode: str, named: Sequence[str], statuses: Sequence[Status]) -> list[str]:
    """The apps a mode generates for. UNKNOWN is neither valid nor invalid: INVALID_ONLY leaves it alone."""
    if mode == "PARTIAL":
        return [status.api_name for status in statuses if status.api_name in named]
    return [status.api_name for status in statuses if mode == "ALL" or status.word in NEEDS_LOGIN]


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
        if run.path.is_dir() or not run.path.parent.is_dir():
            raise DatabaseError(f"The database {run.path} cannot be used: "
                                f"{'it is a folder' if run.path.is_dir() else 'its folder does not exist'}. "
                                "Name a file with --db.")
        self.guard.acquire()
        try:
            self.statuses = check_tokens(run.config, run.path, run.broker, run.now())
            names = choose(self.mode, self.named, self.statuses)
            self.chosen = [app for app in run.config.apps if app.name in names]
            if self.chosen:
                if create_database(run.path):
                    run.reporter.step("", f"created the database {run.path.resolve()}")
                prove_writable(run.path, self.chosen, run.now())
                deactivate(run.path, [s.token for s in self.statuses if s.reason == "401"], run.now())
        except BaseException:
            self.guard.release()
            raise

    def finish(self) -> Result:
        """Generate for the chosen apps, whatever happens to single ones."""
        wanted = self.named if self.mode == "PARTIAL" else [app.name for app in self.run.config.apps]
        result = Result(self.statuses, {}, wanted)
        try:
            if self.chosen:
                generate_by_browser(self.run, self.chosen, self.guard, result)
        finally:
            self.guard.release()
        fresh = {name: outcome.status for name, outcome in result.outcomes.items() if outcome.status}
        result.statuses = [fresh.get(status.api_name, status) for status in self.statuses]
        return result


def record(run: Run, result: Result, app: App, outcome: Outcome) -> None:
    """Note one app's outcome where it is told and kept; successes were audited when they were stored."""
    outcome = Outcome(outcome.state, redact(outcome.message, run.secrets), outcome.status)
    result.outcomes[app.name] = outcome
    if outcome.state == "FAILED":
        run.audit(app.name, "FAILED", outcome.message)
    run.reporter.result(app.name, outcome)


def generate_by_browser(run: Run, apps: Sequence[App], guard: AccountGuard, result: Result) -> None:
    """Flow SELENIUM: one browser, one app after the other; what holds for all apps stops the run."""
    blocker, refused = hold_reason(run, guard), {}
    result.operator = bool(blocker)
    if not blocker:
        blocker, refused = preflight(run, apps)
    with contextlib.closing(Browser([app.redirect_uri for app in apps], run.headed, run.environ)) as browser:
        for app in apps:
            if blocker or run.stopping():
                record(run, result, app, Outcome("SKIPPED", f"not tried: {blocker or 'the program was stopped'}"))
                continue
            try:
                if app.name in refused:
                    raise LoginFailed(refused[app.name])
                outcome = Outcome("DONE", "", generate_one(run, app, guard, browser))
            except LoginFailed as failure:
                outcome = Outcome("FAILED", str(failure))
                result.operator |= failure.operator
                result.captcha |= isinstance(failure, CaptchaShown)
                if failure.hold:
                    guard.save(hold=f"{failure} ({local_text(run.now())})")
                if failure.stops_run:
                    blocker = f"the run stopped at {app.name}"
            record(run, result, app, outcome)


def hold_reason(run: Run, guard: AccountGuard) -> str:
    """Why no login may be tried now, or an empty text; an operator may lift it."""
    hold = guard.hold()
    if hold and run.go_ahead and run.go_ahead(hold):
        guard.clear()
        return ""
    return hold and (f"{hold.rstrip('.')}. No unattended login until PIN, TOTP secret or mobile number in the "
                     "configuration changes, or an operator goes ahead from the menu.")


def preflight(run: Run, apps: Sequence[App]) -> tuple[str, dict[str, str]]:
    """(what forbids every login, what is wrong with single apps), asked of the broker without any login."""
    def ask(app: App) -> tuple[Answer, float]:
        return run.broker.preflight(app), run.now()
    late = (Answer(error="timeout"), run.now())
    answers = side_by_side([lambda app=app: ask(app) for app in apps], PROFILE_SECONDS, late)
    refused = {app.name: explain(answer) for app, (answer, _) in zip(apps, answers)
               if error_code(answer)[0] == "UDAPI100068"}
    return clock_problem(answers), refused


def clock_problem(answers: Iterable[tuple[Answer, float]]) -> str:
    """A sentence when this machine's clock is too far from the broker's Date header for TOTP codes."""
    offsets = [offset for answer, at in answers if (offset := clock_offset(answer, at)) is not None]
    offset = min(offsets, key=abs, default=0)
    if abs(offset) <= CLOCK_SECONDS:
        return ""
    return (f"this machine's clock is {abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} the broker's, "
            "so its TOTP codes would be refused. Set the clock (timedatectl set-ntp true), then run again.")


def generate_one(run: Run, app: App, guard: AccountGuard, browser: Browser) -> Status:
    """Log in, exchange, store, audit, verify: in this order. The new token's status."""
    code = log_in(run, app, guard, browser)
    run.secrets.add(code)
    stored = side_by_side([lambda: exchange_and_store(run, app, code)], EXCHANGE_SECONDS + STORE_SECONDS + 10,
                          LoginFailed("the token exchange did not end in time. Run again."), grace=3)[0]
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
                raise LoginFailed(f"the login page or the browser failed ({fault}). Run again; if it stays so, look "
                                  "at the page with --headed.") from None
            login.say(f"{fault}; trying once more with a fresh browser")
    raise AssertionError


def keep_evidence(run: Run, app: App, browser: Browser) -> None:
    """With --debug-dir: what the page looked like when a login failed."""
    if run.debug_dir and browser.driver:
        with contextlib.suppress(PageFault, OSError):
            run.debug_dir.mkdir(parents=True, exist_ok=True)
            browser.evidence(run.debug_dir, f"{app.name}-{datetime.now():%Y%m%d-%H%M%S}", run.secrets)


def exchange_and_store(run: Run, app: App, code: str) -> Token | LoginFailed:
    """Runs in a thread of its own, which no signal interrupts: a token that exists is stored."""
    answer = run.broker.exchange(app, code)
    token = json_object(answer.body).get("access_token") if answer.code == 200 else None
    if not isinstance(token, str) or not PLAIN_TOKEN.fullmatch(token):
        return LoginFailed(f"no token for the authorization code: {explain(answer)}")
    run.secrets.add(token)
    now = run.now()
    row = token_row(app, token, now, cutoff_after(now))
    try:
        store(run, row)
    except DatabaseError as error:
        return LoginFailed(f"the broker gave a token, but it could not be stored: {error}")
    run.audit(app.name, "GENERATED")
    return Token(app.name, token, app.client_id, now, row["validity_at"], row["generated_at"], 1)


def store(run: Run, row: Mapping[str, Any]) -> None:
    """Write a token, patiently: it cost a login."""
    end = time.monotonic() + STORE_SECONDS
    while True:
        try:
            with transaction(run.path, 5) as connection:
                return upsert(connection, row)
        except sqlite3.Error as error:
            if time.monotonic() > end:
                raise database_error(run.path, error) from None
            run.reporter.step(row["api_name"], f"the token cannot be stored yet ({error}); trying again")
            run.sleep(1.0)


def verify(run: Run, token: Token) -> Status:
    """The new token's proof; one that the broker refuses is deactivated."""
    answer = side_by_side([lambda: run.broker.profile(token.access_token)], PROFILE_SECONDS, Answer(error="timeout"))[0]
    status = Status(token.api_name, *judge_profile(answer), token)
    if status.reason == "401":
        deactivate(run.path, [token], run.now())
    run.reporter.step(token.api_name, status.label)
    return status


# ---- Telling the operator ------------------------------------------------------------------------------------


class Console(Reporter):
    """Results to `out`, progress to `err`; with a terminal a wait counts down in place."""

    def __init__(self, out: TextIO, err: TextIO, *, quiet: bool = False, ask: Callable[[str], str] = input) -> None:
        self.out, self.err, self.quiet, self.ask = out, err, quiet, ask
        self.secrets: set[str] = set()
        self.places: dict[str, str] = {}
        self.waiting = False

    def begin(self, names: Sequence[str]) -> None:
        """The apps of a run, in order, for the [2/6] of the progress lines."""
        self.places = {name: f"[{place}/{len(names)}] {name}: " for place, name in enumerate(names, 1)}

    def say(self, text: str = "") -> None:
        """A line of the result."""
        print(text, file=self.out)

    def log(self, text: str) -> None:
        """A line of progress or an error."""
        if self.waiting:
            print(file=self.err)
        self.waiting = False
        print(redact(text, self.secrets), file=self.err, flush=True)

    def step(self, api_name: str, text: str) -> None:
        if not self.quiet:
            self.log(self.places.get(api_name, f"{api_name}: " if api_name else "") + text)

    def countdown(self, api_name: str, text: str, left: float) -> None:
        if self.quiet:
            return
        if not self.err.isatty():
            if not self.waiting:
                print(f"{self.places.get(api_name, '')}{text} in {left:.0f} s", file=self.err, end="", flush=True)
        else:
            print(f"\r\033[K{self.places.get(api_name, '')}{text} in {left:.0f} s", file=self.err, end="", flush=True)
        self.waiting = True

    def operator(self, api_name: str, text: str) -> None:
        if text:
            self.step(api_name, text)

    def result(self, api_name: str, outcome: Outcome) -> None:
        if outcome.state != "DONE":
            self.step(api_name, outcome.message)


def summary_lines(statuses: Sequence[Status], path: Path | None = None) -> list[str]:
    """The summary of the guide's 7.1."""
    counts = {word: sum(status.word == word for status in statuses) for word in ("VALID", "UNKNOWN")}
    lines = ["Token Status Summary:" + (f" {path.resolve()}" if path else ""), "-" * 34]
    lines += [f"{status.api_name:<14}: {status.label}" for status in statuses]
    lines += ["", f"Valid Tokens    : {counts['VALID']}",
              f"Invalid Tokens  : {len(statuses) - counts['VALID'] - counts['UNKNOWN']}"]
    return lines + ([f"Unknown Tokens  : {counts['UNKNOWN']}"] if counts["UNKNOWN"] else [])


def status_json(statuses: Sequence[Status], now: float) -> dict[str, Any]:
    """The summary for programs (the guide 7.2); EXPIRED counts as invalid."""
    def names(*words: str) -> list[str]:
        return [status.api_name for status in statuses if status.word in words]
    return {"valid": names("VALID"), "invalid": names("INVALID", "EXPIRED"), "missing": names("NOT FOUND"),
            "unknown": names("UNKNOWN"), "checkedAt": local_text(now),
            "tokens": [{"apiName": status.api_name, "status": status.word, "reason": status.reason,
                        "validityAt": shown(status.token and status.token.validity_at),
                        "generatedAt": shown(status.token and status.token.generated_at)} for status in statuses]}


def shown(value: object) -> str | None:
    """A stored date as text for a reader."""
    return None if value is None else printable(value, 40)


def failure_lines(result: Result) -> list[str]:
    """One line per app that got no token: why, and what to do next."""
    return [f"{name}: {'' if outcome.state == 'SKIPPED' else 'failed: '}{outcome.message}"
            for name, outcome in result.outcomes.items() if outcome.state != "DONE"]


# ---- The menu --------------------------------------------------------------------------------------------------

MENU = ("", "Choose Action:", "1. Generate ALL", "2. Generate ONLY invalid", "3. Generate selected (comma separated)",
        "4. Abort")


def parse_names(text: str, configured: Sequence[str], *, numbers: bool = False) -> list[str]:
    """API names from a comma separated text, in any case, doubles once; ValueError names the first bad one."""
    names: list[str] = []
    for part in filter(None, (piece.strip().upper() for piece in text.split(","))):
        if numbers and part.isascii() and part.isdigit() and 1 <= int(part) <= len(configured):
            part = configured[int(part) - 1]
        if part not in configured:
            raise ValueError(f"{printable(part, 40)} is not one of {', '.join(configured)}")
        names += [part] * (part not in names)
    if not names:
        raise ValueError("name at least one API")
    return names


def ask_action(console: Console, configured: Sequence[str]) -> tuple[str, list[str]] | None:
    """The operator's choice as (mode, names); None to abort. A bad answer is asked again."""
    for line in MENU:
        console.say(line)
    while True:
        answer = console.ask("Choice: ").strip().lower()
        if answer in ("1", "2"):
            return MODES[int(answer) - 1], []
        if answer == "3":
            return "PARTIAL", ask_names(console, configured)
        if answer in ("4", "q"):
            return None
        console.say("Please answer 1, 2, 3 or 4.")


def ask_names(console: Console, configured: Sequence[str]) -> list[str]:
    """Names or list numbers, asked until they fit."""
    console.say("  ".join(f"{number}. {name}" for number, name in enumerate(configured, 1)))
    while True:
        try:
            return parse_names(console.ask("APIs (names or numbers): "), configured, numbers=True)
        except ValueError as error:
            console.say(f"{error}.")


def confirm(console: Console, question: str) -> bool:
    """A yes or no question; nothing but yes is yes."""
    return console.ask(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def has_display(environ: Mapping[str, str]) -> bool:
    """Whether a visible browser can be opened."""
    return sys.platform != "linux" or bool(environ.get("DISPLAY") or environ.get("WAYLAND_DISPLAY"))


# ---- The command line ------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """All options; the epilog has one working command per use."""
    parser = argparse.ArgumentParser(
        prog="upstox_tokens.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Keep the Upstox access tokens of one account alive in vega_trade.db.",
        epilog="exit: 0 all valid, 1 some not, 2 usage or configuration, 3 operator needed, 4 busy\n"
               "cron: upstox_tokens.py --mode INVALID_ONLY -q")
    add = parser.add_argument
    add("--status", action="store_true", help="show the summary and change nothing")
    add("--mode", type=str.upper, choices=MODES, help="generate without asking")
    add("--apis", metavar="A,B", help="the API names for --mode PARTIAL")
    add("--serve", nargs="?", const=SERVE_ADDRESS, metavar="HOST:PORT",
        help=f"HTTP API and dashboard (default {SERVE_ADDRESS})")
    add("--check", action="store_true", help="is everything ready for a login? Spends no OTP")
    add("--import-config", action="store_true", help="copy the apps of the environment into the database")
    add("--json", action="store_true", help="result as JSON (with --status or --mode)")
    add("--flow", type=str.upper, choices=FLOWS, default="SELENIUM", help="browser login, or approval on the phone")
    add("--wait", type=wait_minutes, default=15, metavar="MINUTES", help="how long flow V3 waits (default 15)")
    add("--headed", action="store_true", help="show the browser window")
    add("--debug-dir", type=Path, metavar="DIR", help="store a screenshot and the page's text of a failed login")
    add("--env-file", type=Path, metavar="PATH", help="settings (default .env here, else beside the script)")
    add("--db", metavar="PATH", help=f"database (default {DATABASE_NAME} here, else beside the script)")
    add("-v", "--verbose", action="store_true", help="also show the database's path")
    add("-q", "--quiet", action="store_true", help="no progress lines")
    add("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def wait_minutes(text: str) -> float:
    """Minutes for --wait: more than 0, at most a day."""
    value = float(text)
    if not 0 < value <= 1440:
        raise ValueError
    return value


def parse_arguments(argv: Sequence[str] | None, environ: Mapping[str, str]) -> argparse.Namespace:
    """Options that fit together, or exit 2 with one sentence."""
    parser = build_parser()
    args = parser.parse_args(argv)
    verbs = [bool(args.status), bool(args.mode), bool(args.serve), args.check, args.import_config]
    if sum(verbs) > 1 and not (args.mode and args.serve and args.flow == "V3" and sum(verbs) == 2):
        parser.error("choose one of --status, --mode, --serve, --check and --import-config")
    if (args.mode == "PARTIAL") != (args.apis is not None):
        parser.error("--mode PARTIAL and --apis go together")
    if args.json and not (args.status or args.mode):
        parser.error("--json goes with --status or --mode")
    if args.headed and not has_display(environ):
        parser.error("--headed needs a display; none is set (DISPLAY)")
    return args


def load_config(args: argparse.Namespace, environ: Mapping[str, str]) -> Config:
    """Settings from environment and env file, checked for what this command needs."""
    env_file = args.env_file or first_existing(".env", (Path.cwd(), Path(__file__).parent))
    settings, problems = read_settings(environ, env_file)
    if args.import_config:
        settings["UPSTOX_CONFIG_SOURCE"] = "ENV"
    needed = () if args.status else ("UPSTOX_REDIRECT_URI",)
    needed += flow_keys(args.flow) if args.mode or args.check else ()
    path = find_database(args.db)
    return build_config(settings, problems, needed=needed, stored_apps=lambda: read_stored_apps(path))


@dataclass
class Command:
    """One call of the program: its options, configuration and console."""

    args: argparse.Namespace
    config: Config
    path: Path
    console: Console
    environ: Mapping[str, str]
    now: Callable[[], float]
    sleep: Callable[[float], None]

    def __post_init__(self) -> None:
        self.broker = Broker(self.config.base_url)
        self.console.secrets |= self.config.secrets()

    def run(self, source: str, reporter: Reporter, **changes: Any) -> Run:
        """A generating run with this command's options."""
        args = self.args
        options = {"flow": args.flow, "headed": args.headed, "debug_dir": args.debug_dir,
                   "wait_seconds": args.wait * 60, "now": self.now, "sleep": self.sleep, "environ": self.environ}
        return Run(self.config, self.path, self.broker, reporter, source, **{**options, **changes})

    def check(self) -> list[Status]:
        """Every app's status now."""
        if (foreign := unknown_names(self.path)) and not self.args.quiet:
            self.console.log("rows of unknown names are left alone: " + ", ".join(printable(n, 40) for n in foreign))
        return check_tokens(self.config, self.path, self.broker, self.now())

    def summary(self, statuses: Sequence[Status]) -> None:
        """Print the summary."""
        for line in summary_lines(statuses, self.path if self.args.verbose else None):
            self.console.say(line)


def command_status(command: Command) -> int:
    """--status: look, write nothing."""
    statuses = command.check()
    if command.args.json:
        command.console.say(json.dumps(status_json(statuses, command.now()), indent=2))
    else:
        command.summary(statuses)
    return OK if all(status.word == "VALID" for status in statuses) else NOT_VALID


def command_mode(command: Command) -> int:
    """--mode: generate without asking."""
    names = [app.name for app in command.config.apps]
    try:
        named = parse_names(command.args.apis, names) if command.args.mode == "PARTIAL" else []
    except ValueError as error:
        raise ConfigError([f"--apis: {error}"]) from None
    result = generate(command, "CLI", command.args.mode, named)
    if command.args.json:
        outcomes = [{"apiName": name, "state": outcome.state, "message": outcome.message}
                    for name, outcome in result.outcomes.items()]
        report = {**status_json(result.statuses, command.now()), "results": outcomes, "exitCode": result.exit_code}
        command.console.say(json.dumps(report, indent=2))
    else:
        report_result(command, result)
    return result.exit_code


def generate(command: Command, source: str, mode: str, named: Sequence[str], **changes: Any) -> Result:
    """One run, told on the console."""
    require_for_flow(command.config, command.args.flow)
    run = command.run(source, command.console, **changes)
    run.secrets = command.console.secrets
    session = Session(run, mode, named)
    session.begin()
    command.console.begin([app.name for app in session.chosen])
    left_alone = [status.api_name for status in session.statuses if status.word == "UNKNOWN"]
    if mode == "INVALID_ONLY" and left_alone:
        command.console.log(f"left alone, since the broker could not tell whether they are valid: {', '.join(left_alone)}")
    return session.finish()


def report_result(command: Command, result: Result) -> None:
    """The summary at the end of a run, and what to do about the apps that failed."""
    command.summary(result.statuses)
    if lines := failure_lines(result):
        command.console.say()
        for line in lines:
            command.console.say(line)


def command_menu(command: Command) -> int:
    """The summary, the operator's choice, the run; offers a visible browser when a CAPTCHA came up."""
    console = command.console
    statuses = command.check()
    command.summary(statuses)
    try:
        choice = ask_action(console, [app.name for app in command.config.apps])
        if choice:
            result = generate(command, "MENU", *choice, go_ahead=lambda hold: confirm(
                console, f"Logins are on hold: {hold}. Is it mended, and may the login go ahead?"))
            console.say()
            report_result(command, result)
            if result.captcha and not command.args.headed and has_display(command.environ) and confirm(
                    console, "Open a visible browser window and go on there?"):
                left = [name for name, outcome in result.outcomes.items() if outcome.state != "DONE"]
                result = generate(command, "MENU", "PARTIAL", left, headed=True)
                console.say()
                report_result(command, result)
            return result.exit_code
    except EOFError:
        console.say()
    console.say("Aborted, nothing changed.")
    return OK if all(status.word == "VALID" for status in statuses) else NOT_VALID


def command_import_config(command: Command) -> int:
    """--import-config: the apps of the environment into upstox_api_configs."""
    create_database(command.path)
    import_apps(command.path, command.config.apps, command.now())
    names = ", ".join(app.name for app in command.config.apps)
    command.console.say(f"Copied {names} into upstox_api_configs of {command.path.resolve()}. "
                        "Set UPSTOX_CONFIG_SOURCE=DB to use them.")
    return OK


def dispatch(args: argparse.Namespace, command: Command) -> int:
    """The function for the chosen verb."""
    if args.status:
        return command_status(command)
    if args.import_config:
        return command_import_config(command)
    return command_mode(command) if args.mode else command_menu(command)


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


def main(argv: Sequence[str] | None = None, *, out: TextIO | None = None, err: TextIO | None = None,
         ask: Callable[[str], str] = input, environ: Mapping[str, str] | None = None,
         now: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep) -> int:
    """Run one command; the exit code of contract section 5. The keywords replace the process's own for tests."""
    environ = os.environ if environ is None else environ
    console = Console(out or open_stream(sys.stdout), err or open_stream(sys.stderr), ask=ask)
    try:
        with signals_handled():
            args = parse_arguments(argv, environ)
            console.quiet = args.quiet
            os.umask(0o077)  # whatever is created holds tokens
            command = Command(args, load_config(args, environ), find_database(args.db), console, environ, now, sleep)
            return dispatch(args, command)
    except TokenError as error:
        for line in str(error).splitlines():
            console.log(f"error: {line}")
        return error.exit_code
    except Stopped as stop:
        console.log("Stopped. Tokens generated so far are kept.")
        return stop.exit_code
    except SystemExit as stop:  # argparse has said what is wrong
        return stop.code if isinstance(stop.code, int) else USAGE
    finally:
        flush(console)


def open_stream(stream: TextIO | None) -> TextIO:
    """A stream that takes any text; one that was closed before the start goes nowhere."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    with contextlib.suppress(AttributeError):
        stream.reconfigure(errors="backslashreplace")
    return stream


def flush(console: Console) -> None:
    """Write out what is left; a reader that went away (`| head`) is no error."""
    for stream in (console.out, console.err):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    raise SystemExit(main())
