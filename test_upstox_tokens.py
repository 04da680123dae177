"""Tests of upstox_tokens.py, and an imitation of the broker that everything here runs against.

    python test_upstox_tokens.py              all tests, side by side, on loopback only (<2 minutes)
    python -m unittest -v                     the same, one after the other; takes a Class.test too
    python test_upstox_tokens.py rehearse     the real program and a real browser, then gone
    python test_upstox_tokens.py stress       everything in full numbers, rows marked slow included
    python test_upstox_tokens.py bench        timings beside their floors

Four parts: the imitation broker (`Broker`, its `Switches`, its login page), one harness (`World`,
`Case`, `BrowserCase`), tables of cases, one subject after the other, and the three commands.
Account, secrets and tokens are made up.

What is known of the broker -> the switch that shows it ("always": without one)

    dialog: 302 to the login page with an internal id, the page never sees the app -> always
    dialog: JSON UDAPI100068 for a wrong pair, its status unknown -> dialog_answer
    errors carry errorCode, error_code or both -> always both; one of them in a Reply of a test
    state comes back as it was sent; the code has six characters -> always, redirect_state
    the redirect follows after up to 20 s; nothing listens at its address -> hop_delay
    exchange: code used once, flat body, no expiry in it; codes of every refusal -> token_answer
    profile: 401 for a dead token, 429 and 503 at times; six tokens side by side -> profile_answer
    tokens end at the next 03:30 Indian time, or by a newer one of the app -> one_token_per_app
    v3: texts of epoch ms, delivery without proof -> approve_after, v3_seconds
    v3: no notifier URL, or another than ours -> notifier_url, notifier_shown, v3_answer
    page: ids of fields and buttons, steps without a change of address, new class names -> always
    page: loader until its first step; blank page for robots -> config_delay, page
    page: values of controlled fields, nodes replaced while one types -> rerender, spinner
    mobile: Get OTP disabled until ten digits; hints; unknown number 1017016 -> always
    mobile: OTP limit 1017069, several accounts 1017074 -> mobile_answer
    Turnstile beside Get OTP or as a whole page -> captcha, captcha_form
    OTP: 123-456 or 123456, button with or without type -> otp_mask, otp_button_always_enabled
    OTP: may be submitted by its sixth digit -> otp_autosubmit
    OTP: a refused code leaves an empty field and a toast of 3 s -> always, toast_ms
    OTP: codes of three windows count, a second use is refused -> always
    OTP: 1017078 and 1017125 disable the field; session lost 1017079 ... -> otp_answer
    OTP: resend after 120 s; QR panel beside the first three steps -> resend_seconds, always
    PIN: asked at every login, remembered browsers start there -> remember, stale_identity
    PIN: how a refusal is worded is unknown; unknown, missing and empty words -> pin_answer
    PIN: the fifth wrong one locks, 1017090; the field stays, the button says unlock -> always
    PIN: none set yet, dormant account -> create_pin, pin_answer
    PIN: "Hi there!" becomes the name once it is known -> late_name
    a browser that knows the phone starts with an OTP request of its own -> lead_phone
    connection lost: "Request aborted [500]" -> ..._answer: reset

Nobody has seen these; a changed page, or a stranger in between, would look like it: rename,
page="terms", the answers terms, consent, silent and foreign, leave_on_input, clears, loses,
pin_autosubmit, jam, hops, by_script, unguarded, counter, late_words, keep_hidden_inputs, rewritten,
hooks, down, and the API's hang, drip, endless and gzip.

Known facts without a switch: the old login hosts and forms, Android and iOS pages, the QR login
itself, accounts of several people, extended and analytics tokens, sandbox, logout, static IP rules,
rate limits that add up, refused default agents of HTTP libraries, the silent refresh of 4000001,
"Switch account?", "Forgot PIN?", the forms behind unlock and reactivate, and how long a code lives.
"""
from __future__ import annotations

import ast
import base64
import collections
import contextlib
import copy
import errno
import functools
import gzip
import hashlib
import hmac
import http.client
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import statistics
import string
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from urllib.parse import parse_qsl, urlencode, urlsplit
from zoneinfo import ZoneInfo

import upstox_tokens

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started with nohup, or with & in a script
    signal.signal(signal.SIGINT, signal.default_int_handler)

PROGRAM = Path(__file__).resolve().with_name("upstox_tokens.py")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
            "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
            "C:/Program Files/Google/Chrome/Application/chrome.exe",
            "C:/Program Files (x86)/Google/Chrome/Application/chrome.exe")

# ---- the made-up account; every value is distinctive, so that all output can be searched for it

APPS = {  # api name: (client id, client secret)
    "PRIMARY": ("5b0c7d1e-93a4-4f1c-8a57-1f60c2a9d301", "q7zprim4xk"),
    "WEBSOCKET1": ("8e42f9a6-07bd-4d3e-b1c8-2a71d3bae402", "w1hsock8vd"),
    "WEBSOCKET2": ("c19d35b7-4e60-4a92-9d04-3b82e4cbf503", "w2jsock5mn"),
    "WEBSOCKET3": ("f7a80e24-b65d-4c17-a3e9-4c93f5dc0604", "w3ksock9rt"),
    "OPTIONCHAIN1": ("2d6b94c8-518f-4b70-8fe2-5da406ed1705", "o1lchain6y"),
    "OPTIONCHAIN2": ("94e1a7f3-c20a-4e85-b6d1-6eb517fe2806", "o2mchain3u"),
}
MOBILE = "9812047365"
PIN = "749216"
TOTP_SECRET = "KVQXE5DPOBZWK43UNFWXA3DFMRSXG5DB"
USER_ID = "7ZKA41"
REDIRECT_URI = "http://localhost:28020/api/v1/auth/upstox/callback"
KEY = "k3y-0f-the-server-2611"  # of the HTTP API

DAY = 86400
CUTOFF = 3.5 * 3600 - 5.5 * 3600  # 03:30 Indian time, as seconds of the UTC day


def next_cutoff(moment: float) -> float:
    """The first 03:30 Indian time strictly after the moment."""
    return ((moment - CUTOFF) // DAY + 1) * DAY + CUTOFF


NOON = next_cutoff(time.time()) + 8.5 * 3600  # in India, at the beginning of a TOTP window
SLOW = "TEST_SLOW" in os.environ  # stress sets it: rows marked slow run too

TOKENS = "/auth/upstox/tokens/"
STATUS, GENERATE, LATEST = TOKENS + "status", TOKENS + "generate", TOKENS + "jobs/latest"


# ---- what the broker says when it says no

API_STATUS = {"10005": 429, "100060": 404, "100500": 500,
              **dict.fromkeys(("1123", "1124", "1155", "1157"), 400)}  # of UDAPI codes; others 401
# What one wrong OTP or PIN is really answered is not known: these two codes and texts are invented.
WRONG_OTP, WRONG_PIN = "1017071", "1017089"
PAGE_ERRORS = {
    "1017007": "Your session is invalid, please start again.",
    "1017016": "You have entered a invalid mobile number please enter the correct mobile number",
    "1017069": "You have exceeded the maximum number of times you can generate an OTP. "
               "Kindly, try again after 10 mins.",
    WRONG_OTP: "The code you entered is incorrect.",
    "1017074": "Multiple accounts are linked to this mobile number.",
    "1017076": "Your session to validate otp has expired, please try again.",
    "1017078": "You have entered an incorrect OTP too many times. Please try again after 10 "
               "minutes.",
    "1017079": "Your login session was lost.",
    WRONG_PIN: "The PIN you entered is incorrect.",
    "1017090": "Your account is locked.",
    "1017125": "OTP verification is blocked for this account.",
    "1017999": "Something went wrong",
}
DEVANAGARI = "आपका पिन सही नहीं है कृपया पुनः प्रयास करें " * 5  # a toast, 219 characters
Answer = Any  # None, a word, a list of words, or a Reply


@dataclass
class Switches:
    """What the imitation does; all can be given to Broker(...), and changed at broker.switches.

    An Answer is None (behave), a word (every time), or a list of words (used up one by one, ""
    behaves). `by_app` gives single apps other values of the switches about an app, its login or
    its calls: by_app={"WEBSOCKET2": {"pin_answer": "1017090"}}.
    """

    by_app: dict[str, dict[str, Any]] = field(default_factory=dict)

    # how long things take, in seconds
    config_delay: float = 0  # loader of the login page, until its step is mounted
    step_delay: float = 0  # each of: mobile, OTP, PIN
    dialog_delay: float = 0  # the authorize dialog's answer
    hop_delay: float = 0  # the broker's own redirect to the app's redirect URI
    token_delay: float = 0  # code -> token
    profile_delay: float = 0  # each profile call
    # the broker's clock (Date header, TOTP windows) is this much ahead; None: no date in the header
    clock_offset: float | None = 0
    toast_ms: int = 3000  # life of a toast, before its fade of 300 ms
    resend_seconds: int = 120  # until Resend OTP can be pressed
    down: bool = False  # every connection is dropped

    # the account and its apps
    redirect_uri: str = REDIRECT_URI  # as registered with the app
    one_token_per_app: bool = True  # a new token ends the app's older one
    create_pin: bool = False  # no PIN set yet: the PIN step asks to invent one

    # the look of the login page
    page: str = ""  # blank, loader (never ends), hang (no answer), terms (before the first step),
    #                 unlock (the account is locked)
    remember: bool = True  # False: every dialog starts at the first step, as in a fresh browser
    lead_phone: bool = False  # starts at the OTP step with an OTP request of its own
    stale_identity: bool = False  # the remembered login has run out: the PIN step falls back
    otp_mask: bool = False  # the OTP field shows 123-456
    otp_button_always_enabled: bool = False  # Continue has no type and works with an empty field
    keep_hidden_inputs: bool = False  # what belongs to the other steps is in the page too, hidden
    rename: dict[str, str] = field(default_factory=dict)  # id of a field or button: its new id
    rewritten: bool = False  # the page writes its whole document anew, a little after it came
    captcha: float | str = ""  # seconds until it passes by itself, or never (somebody solves it)
    captcha_form: str = "frame"  # frame (iframe in the open), div (closed shadow root in
    #                .cf-turnstile), explicit (the same beside the response input), page (whole),
    #                both (a whole page, and then beside the response input)

    # what the login page does while something is typed
    otp_autosubmit: int | None = None  # the sixth digit submits the form, this many ms later
    pin_autosubmit: int | None = None
    jam: int = 0  # ms of hard work of the page's scripts, soon after a field is complete
    hops: int = 1  # timers, one after the other, until a field submits by itself
    by_script: bool | str = False  # its forms are never submitted: a script sends what they hold;
    #                                form: they are besides, by a script, which fires no event
    unguarded: bool = False  # the page would send again what it is sending already
    counter: int | None = None  # a line that counts, every so many ms, stands beside the PIN
    clears: str = ""  # id of a field that empties itself once it is complete
    loses: str = ""  # id of a field that keeps three digits only
    late_name: int | None = None  # ms after the PIN's last digit until the heading knows the name
    late_words: str = ""  # a line that comes just after the PIN's last digit, and stays
    spinner: int = 0  # ms of an overlay once a field is complete (chromedriver waits about 1000)
    rerender: int = 0  # new nodes every so many ms (below 100 nobody can type)
    leave_on_input: str = ""  # id of a field: typing there moves the page to the foreign host
    hooks: bool = False  # its scripts watch the language's own functions and report (route heard)

    # what the page's service answers. Digits: a code, of PAGE_ERRORS or any other. A text with a
    # space: a toast of these words, "words [code]" too. Else: silent (no reaction), hang, reset
    # (connection lost: "Request aborted [500]"), foreign (goes on at the foreign host), terms and
    # consent (a page with a button comes in between)
    mobile_answer: Answer = None
    otp_answer: Answer = None
    pin_answer: Answer = None  # also dormant, something_went_wrong (the approval fails)

    # what the API answers: a Reply, the digits of a UDAPI code, 401 429 500 503 html
    # hang drip endless gzip reset, and what is named here
    dialog_answer: Answer = None  # direct (302 to the redirect URI at once), foreign (302 there)
    token_answer: Answer = None
    profile_answer: Answer = None
    v3_answer: Answer = None
    redirect_state: Answer = None  # of the redirect to the app: missing, other; no_code

    # approval on the phone
    notifier_url: str = ""  # where deliveries go; empty: UDAPI1123
    notifier_shown: str | None = None  # another notifier_url in the reply
    approve_after: float | None = None  # approves by itself after so many seconds
    v3_seconds: float | None = None  # a request's life; default: until 03:30 Indian time


BLANK_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Login to Upstox</title></head>
<body><noscript>You need to enable JavaScript to run this app.</noscript>
<main id="root"></main><div id="modalRoot"></div></body></html>
"""

REWRITTEN = """<!doctype html><p>One moment please</p><script>setTimeout(() => {{
  document.open(); document.write({}); document.close(); }}, 300)</script>"""

SCRIPT = r"""<script>
"use strict";
const CFG = /*CFG*/null;
const FIELDS = ["mobileNum", "otpNum", "pinCode"];
const LOST = [1017079, 1017084, 1017095, 1017105], BLOCKED = [1017078, 1017125];
const LOCKED = "Due to too many incorrect PIN attempts, your account has been locked. " +
  "Unlock your account by verifying your details.";
const query = new URLSearchParams(location.search), root = document.getElementById("root");
const idOf = name => CFG.rename[name] || name;
const $ = name => document.getElementById(idOf(name));
const FRESH = {mobileNum: "", otpNum: "", pinCode: "", blocked: false, locked: false};
const state = {...FRESH, step: -1, busy: false, alert: "", info: "",
  captcha: !CFG.captcha || CFG.captcha_form === "page", subtitle: "", otpToken: "", resend: 0};

// class names are short, meaningless and other ones at every load, as with every build
const look = style => `class="_${Math.random().toString(36).slice(2, 5)}" style="${style}"`;
const COVER = "position:fixed;inset:0;background:#fff8;z-index:9";

// ---- what a browser remembers between two logins
const cookie = name => (document.cookie.match(`(?:^|; )${name}=([^;]*)`) || [])[1];
const profile = () => JSON.parse(localStorage.getItem("USER_PROFILE") || "{}");
const hasPin = () => CFG.foreign || localStorage.getItem("HAS_SECRET_PIN") === "true";
function forget() {
  localStorage.clear();
  for (const name of ["user_type", "auth_identity_token", "auth_identity_token_expiry"])
    document.cookie = `${name}=;path=/;max-age=0`;
}

// ---- the steps
// neither caret nor focus is to be seen: two pictures of the same page are the same
const field = (name, more) => `<input id="${idOf(name)}" ${more} ${look("display:block;" +
  "margin:8px 0;padding:12px;caret-color:transparent;border:1px solid;outline:none")}>`;
const TYPE = `type="${CFG.by_script ? "button" : "submit"}"`;
const button = (name, more = TYPE) => `<button id="${idOf(name)}" ${more}
  ${look("min-width:240px;height:44px;border:1px solid;outline:none")}></button>`;
const NEW_PIN = "Create a new 6-digit PIN";
const STEPS = [
  () => `<h2>Let’s get started</h2><h3>Login with mobile number</h3>
    <p>We'll send you a one-time password (OTP) to verify your mobile number.</p>
    <form id="mobile-number-form"><label>Enter mobile number</label><span>+91</span>
      ${field("mobileNum", 'type="text" maxlength="10" autofocus')}
      <span data-text="hint"></span><div data-captcha></div>${button("getOtp")}</form>`,
  () => `<svg width="24" height="24"></svg><h3>Verify your number</h3><p>${state.subtitle}</p>
    <form id="otp-form"><label>Enter OTP or TOTP</label>
      ${field("otpNum", 'type="text" autocomplete="one-time-code"')}
      <span data-qa="info-message" data-text="info"></span><div data-text="alert"></div>
      ${button("continueBtn", CFG.otp_button_always_enabled ? "" : undefined)}</form>
    <a id="resend" data-text="resend"></a>`,
  () => `<h2>${hasPin() ? `Hi ${CFG.late_name === null && profile().firstName || "there!"}` :
      NEW_PIN}</h2>
    <form id="secret-pin-form">
      <label for="${idOf("pinCode")}">${hasPin() ? "Enter 6-digit PIN" : NEW_PIN}</label>
      ${field("pinCode", 'type="password" inputmode="numeric" maxlength="6" required autofocus')}
      <div data-text="alert"></div>${button("pinContinueBtn")}</form>
    ${hasPin() ? `<p>Welcome back</p><a>Forgot PIN?</a><footer>Signed in as
      ${localStorage.getItem("MOBILE_NUMBER")}. <a>Switch account?</a></footer>` : ""}`,
];
const TEXTS = {
  info: () => state.info, alert: () => state.alert,
  hint: () => !state.mobileNum || /^[6789]\d{9}$/.test(state.mobileNum) ? "" :
    state.mobileNum.length < 10 ? "Enter a 10-digit mobile number." :
    "Make sure your mobile number was entered correctly.",
  resend: () => state.resend <= 0 ? "Resend OTP" : "Resend OTP (" +
    `${Math.floor(state.resend / 60)}:${String(state.resend % 60).padStart(2, "0")}s)`,
};
function show(step) {
  Object.assign(state, {step, busy: false, alert: "", info: ""});
  const others = [0, 1, 2].filter(other => CFG.keep_hidden_inputs && other !== step);
  root.innerHTML = `<div ${look("display:flex;gap:64px;margin:48px")}><section>${STEPS[step]()}
    ${others.map((other, i) => `<div style="${["display:none", "visibility:hidden"][i]}">
      ${STEPS[other]()}${i ? "" : '<div class="cf-turnstile"></div>'}</div>`).join("")}</section>
    <aside><h3>Login with QR code</h3><canvas width="128" height="128"></canvas></aside></div>
    <p>Need help? <a href="https://upstox.com/contact-us/">Contact us</a></p>
    <footer>SEBI INZ000000000</footer>`;
  refresh();
  if (step === 0 && !state.captcha) turnstile(root.querySelector("[data-captcha]"));
  $(FIELDS[step]).focus();
  // the check runs after the step was painted: a stale login shows the PIN field for a moment
  const lives = CFG.foreign || Number(cookie("auth_identity_token_expiry")) > Date.now();
  if (step === 2 && !lives) setTimeout(reset, 30);
  if (step === 2 && CFG.counter) count(add(root, "", 0, "This page ends in 999 s"), 999);
}
function count(line, left) {
  setInterval(() => line.textContent = `This page ends in ${left -= 1} s`, CFG.counter);
}
function reset() {
  forget();
  Object.assign(state, FRESH);
  show(0);
}
function route(path, heading) {
  history.pushState({}, "", path);
  root.innerHTML = `<h2>${heading}</h2>
    <form><label for="pan">Enter your PAN</label><input id="pan"></form>`;
}
// a page that nobody has described: it goes on when its button is pressed
function interlude(word) {
  root.innerHTML = {
    terms: `<h2>We have updated our terms</h2><p>Please read and accept them to go on.</p>
      <button id="acceptTerms">I agree</button>`,
    consent: `<h2>Allow access to your account?</h2>
      <p>An app wants to read your orders and funds.</p>
      <button id="allowAccess">Allow access</button>`,
  }[word];
  return new Promise(done => root.querySelector("button").addEventListener("click", done));
}

// values live in the state and are painted into the fields, as a controlled input of React does
const masked = digits => CFG.otp_mask ? digits.replace(/^(\d{3})(?=\d)/, "$1-") : digits;
function refresh() {
  const {blocked, locked} = state, label = text => state.busy ? "" : text;
  paint("mobileNum", "value", state.mobileNum, state.busy);
  paint("otpNum", "value", masked(state.otpNum), state.busy || blocked);
  paint("pinCode", "value", state.pinCode, state.busy || locked);
  paint("getOtp", "textContent", label("Get OTP"),
    !/^[6789]\d{9}$/.test(state.mobileNum) || !state.captcha);
  paint("continueBtn", "textContent", label("Continue"),
    blocked || !(CFG.otp_button_always_enabled || state.otpNum));
  paint("pinContinueBtn", "textContent", label(locked ? "Unlock account" : "Continue"),
    !locked && !state.pinCode);
  for (const node of document.querySelectorAll("[data-text]")) {
    const text = TEXTS[node.dataset.text]();
    if (node.textContent !== text) node.textContent = text;
  }
}
function paint(name, property, value, off) {
  const node = $(name);
  if (!node) return;
  if (node[property] !== value) node[property] = value;
  node.disabled = off;
}
function renewNodes() {
  for (const old of root.querySelectorAll("form > input, form > button")) {
    if (old.matches(":active")) continue;
    const focused = document.activeElement === old, node = old.cloneNode(true);
    old.replaceWith(node);
    if (!focused) continue;
    node.focus();
    if (node.select) node.setSelectionRange(node.value.length, node.value.length);
  }
  refresh();
}
function add(place, style, milliseconds, text = "") {
  const node = place.appendChild(document.createElement("div"));
  node.style.cssText = style;
  node.textContent = text;
  if (milliseconds) setTimeout(() => node.remove(), milliseconds);
  return node;
}
const toasts = add(document.body, "position:fixed;bottom:16px;left:40%;width:328px");
const toast = text => add(toasts, "margin:8px;padding:12px;background:#222;color:#fff",
  CFG.toast_ms + 300, text);

// ---- the calls behind the steps
const busy = on => (state.busy = on && !CFG.unguarded, refresh());
const xhr = (path, {method, headers, body}) => new Promise((done, failed) => {
  const request = new XMLHttpRequest();
  request.onload = () => done({json: () => JSON.parse(request.responseText)});
  request.onerror = failed;
  request.open(method, path);
  for (const name in headers) request.setRequestHeader(name, headers[name]);
  request.send(body);
});
async function call(path, data) {
  busy(true);
  const options = {method: "POST", headers: {"Content-Type": "application/json"},
    body: JSON.stringify({data})};
  const lost = {success: false, error: {code: 500, message: "Request aborted"}};
  const answer = await (CFG.by_script ? xhr : fetch)(path, options)
    .then(got => got.json()).catch(() => lost);
  busy(false);
  if (answer.moveTo) return location.replace(answer.moveTo), new Promise(() => {});
  if (answer.interlude) await interlude(answer.interlude);
  return answer;
}
function failed(error) {
  if (!error) return;
  if (LOST.includes(error.code)) return reset();
  const hint = error.code === 1017074 ? " Tap here, to know more." : "";
  toast(error.message + hint + (error.code ? ` [${error.code}]` : ""));
}
async function requestOtp(again) {
  const mobileNum = state.mobileNum || localStorage.getItem("MOBILE_NUMBER") || CFG.mobile;
  const {success, data, error} = await call("/login/open/v6/auth/1fa/otp/generate",
    {mobileNumber: mobileNum, userId: query.get("user_id")});
  if (!success) return failed(error);
  Object.assign(state, {mobileNum, otpNum: "", otpToken: data.validateOTPToken,
    resend: data.nextRequestInterval, subtitle: data.message});
  toast(`OTP has been ${again ? "resent" : "sent"} to your Phone!`);
  if (again) refresh(); else show(1);
}
async function verifyOtp() {
  if (state.otpNum.length !== 6) return state.info = "It should be a 6-digit OTP.", refresh();
  const {success, data, error} = await call("/login/open/v4/auth/1fa/otp-totp/verify",
    {otp: state.otpNum, validateOtpToken: state.otpToken});
  state.otpNum = "";
  if (success) {
    const flags = {HAS_SECRET_PIN: data.isSecretPinSet, AUTH_IDENTITY_SET: true,
      MOBILE_NUMBER: state.mobileNum, USER_PROFILE: JSON.stringify(data.userProfile)};
    for (const name in flags) localStorage.setItem(name, flags[name]);
    document.cookie = "user_type=CUSTOMER;path=/;max-age=86400";
    toast("Your OTP has been successfully verified.");
    return show(2);
  }
  if (BLOCKED.includes(error?.code)) {
    Object.assign(state, {blocked: true, alert: error.message});
    if (error.code === 1017078) state.resend = 600;
  } else failed(error);
  refresh();
}
async function sendPin() {
  if (state.locked) return route("/unlock-account", "Unlock account");
  const client = {client_id: query.get("client_id"), redirect_uri: query.get("redirect_uri")};
  const {success, data, error} = await call(
    "/login/open/v3/auth/2fa?" + new URLSearchParams(client),
    {twoFAMethod: "SECRET_PIN", inputText: btoa(state.pinCode)});
  if (success) return approve(client, data);
  if (error?.code === 1017090)
    return Object.assign(state, {locked: true, alert: LOCKED}), refresh();
  failed(error);
  if (error?.code === 1017007) reset();
}
async function approve(client, data) {
  if (data.customerStatus === "DORMANT")
    return route("/reactivate-account", "Reactivate your account");
  const oauth = {...client, requestId: data.requestId, response_type: "code"};
  const answer = data.isExternalClientOAuthApp && await call(
    "/login/v2/oauth/authorize?" + new URLSearchParams(oauth), {userOAuthApproval: true});
  if (!answer || !answer.success) return toast("Something went wrong");
  busy(true);
  location.replace(answer.data.redirectUri);
}

// ---- events; they are caught at the document, so that new nodes need no handlers of their own
const SUBMIT = {"mobile-number-form": () => requestOtp(false), "otp-form": verifyOtp,
  "secret-pin-form": sendPin};
document.addEventListener("submit", event => {
  event.preventDefault();
  if (!state.busy && SUBMIT[event.target.id]) SUBMIT[event.target.id]();
});
function submit(form) {
  if (CFG.by_script === "form") Object.assign(form, {method: "post", action: "/heard"}).submit();
  if (!CFG.by_script) form.requestSubmit(); else if (!state.busy) SUBMIT[form.id]();
}
document.addEventListener("input", ({target}) => {
  const name = FIELDS.find(name => idOf(name) === target.id);
  const digits = target.value.replace(/\D/g, ""), pure = digits === target.value;
  if (CFG.foreign) navigator.sendBeacon("/typed", target.value);
  if (CFG.leave_on_input === name) return location.replace(CFG.away + FIELDS.indexOf(name));
  if (name === "otpNum") state.otpNum = CFG.otp_mask ? digits.slice(0, 6) : digits;
  else if (pure && digits.length <= 10) state[name] = digits;
  if (CFG.loses === name) state[name] = digits.slice(0, 3);
  state.info = "";
  refresh();
  if (digits.length === (name === "mobileNum" ? 10 : 6)) complete(name);
});
function hop(hops, wait, done) {
  setTimeout(() => hops > 1 ? hop(hops - 1, wait, done) : done(), wait);
}
function complete(name) {
  const {step} = state, wait = {otpNum: CFG.otp_autosubmit, pinCode: CFG.pin_autosubmit}[name];
  const clear = () => {
    if (CFG.clears === name) state[name] = "", refresh();
  };
  if (CFG.spinner) add(document.body, COVER, CFG.spinner);
  if (CFG.jam) setTimeout(() => {
    const end = performance.now() + CFG.jam;
    while (performance.now() < end) continue;
  }, 30);
  if (CFG.late_name !== null && name === "pinCode") setTimeout(() => {
    document.querySelector("h2").textContent = `Hi ${profile().firstName}`;
  }, CFG.late_name);
  if (CFG.late_words && name === "pinCode") setTimeout(add, 50, root, "", 0, CFG.late_words);
  if (wait == null) return clear();
  hop(CFG.hops, wait / CFG.hops, () => {
    if (state.busy || state.step !== step) return;
    if (state[name].length === 6) submit($(name).form);
    clear();
  });
}
document.addEventListener("click", ({target}) => {
  if (target.type === "button" && !target.disabled) submit(target.form);
  if (target.id === "resend" && state.resend <= 0 && !state.busy && !state.blocked)
    requestOtp(true);
});

// ---- Turnstile
addEventListener("message", ({data}) => {
  if (data !== "turnstile passed") return;
  state.captcha = true;
  document.cookie = "cf_clearance=1;path=/;max-age=1800";
  for (const input of document.getElementsByName("cf-turnstile-response")) input.value = "0.Xy";
  if (CFG.challenge) location.reload(); else refresh();
});
function turnstile(place) {
  const form = CFG.captcha_form, frame = document.createElement("iframe");
  Object.assign(frame, {src: "/challenges.cloudflare.com/turnstile" + location.search,
    title: "Widget containing a Cloudflare security challenge", width: 300, height: 65});
  if (form === "frame") return place.append(frame);
  if (form === "div") place.className = "cf-turnstile";
  else place.insertAdjacentHTML("beforeend",
    '<input type="hidden" name="cf-turnstile-response" id="cf-chl-widget-q3x7b_response">');
  add(place).attachShadow({mode: "closed"}).append(frame);
}
function challenge() {
  document.title = "Just a moment...";
  root.innerHTML = `<h1>login.upstox.com</h1><p>Verify you are human by completing the action
    below.</p><div data-captcha></div><p>login.upstox.com needs to review the security of your
    connection before proceeding.</p><footer>Ray ID: 8c1f0a2b3c4d5e6f</footer>`;
  turnstile(root.querySelector("[data-captcha]"));
}

// ---- a page that watches what is handed to the language's own functions
function watch() {
  const seen = new Set(), {apply} = Reflect, {isArray} = Array, {join} = Array.prototype;
  const tell = value => {
    const text = isArray(value) ? apply(join, value, [" "]) : value;
    if (typeof text !== "string" || seen.has(text)) return;
    seen.add(text);
    fetch("/heard", {method: "POST", body: text});
  };
  const owners = [[String.prototype, "replace replaceAll split includes indexOf match startsWith"],
    [RegExp.prototype, "exec test"], [JSON, "stringify parse"],
    [Array.prototype, "map forEach join includes indexOf filter some every reduce"]];
  for (const [owner, names] of owners) for (const name of names.split(" ")) {
    const original = owner[name];
    owner[name] = function (...given) {
      for (const value of [this, ...given]) tell(value);
      return apply(original, this, given);
    };
  }
}
async function start() {
  if (CFG.hooks) watch();
  if (CFG.challenge) return challenge();
  add(root, COVER);
  await fetch("/config.json").catch(() => null);
  if (!CFG.remember) forget();
  if (CFG.page === "terms") await interlude("terms");
  if (CFG.page === "unlock") return route("/unlock-account", "Unlock account");
  setInterval(() => state.step === 1 && state.resend > 0 && (state.resend -= 1, refresh()), 1000);
  if (CFG.rerender) setInterval(() => state.step >= 0 && renewNodes(), CFG.rerender);
  if (CFG.foreign) return show(Number(query.get("step")));
  if (localStorage.getItem("AUTH_IDENTITY_SET") && cookie("user_type") === "CUSTOMER")
    return show(2);
  show(0);
  if (CFG.lead_phone) requestOtp(false);
}
start();
</script></body>"""

TURNSTILE_PAGE = """<!doctype html><html lang="en"><body style="font:14px sans-serif">
<label><input type="checkbox" id="box"> Verify you are human</label>
<script>
const pass = () => parent.postMessage("turnstile passed", "*");
document.getElementById("box").onclick = pass;
fetch("turnstile/passed").then(pass);
</script></body></html>
"""

# ---- the imitation

V3_PATH = "/v3/login/auth/token/request"
HOP_PATH = "/login/authorization/redirect"
TURNSTILE_PATH = "/challenges.cloudflare.com/turnstile"
# (host, method, path): name. Broker.on_<name> answers; what it does instead, and when, say the
# switches <name>_answer and <name>_delay
ROUTES = {
    ("api", "GET", "/v2/login/authorization/dialog"): "dialog",
    ("api", "POST", "/v2/login/authorization/token"): "token",
    ("api", "GET", "/v2/user/profile"): "profile",
    ("api", "POST", V3_PATH): "v3",
    ("hop", "GET", HOP_PATH): "hop",
    ("login", "GET", "/"): "page",
    ("login", "GET", "/config.json"): "config",
    ("login", "POST", "/heard"): "heard",
    ("login", "GET", TURNSTILE_PATH): "turnstile",
    ("login", "GET", TURNSTILE_PATH + "/passed"): "turnstile_passed",
    ("login", "POST", "/login/open/v6/auth/1fa/otp/generate"): "mobile",
    ("login", "POST", "/login/open/v4/auth/1fa/otp-totp/verify"): "otp",
    ("login", "POST", "/login/open/v3/auth/2fa"): "pin",
    ("login", "POST", "/login/v2/oauth/authorize"): "authorize",
}


@dataclass
class Request:
    """One request as the imitation's own code sees it, and as tests find it in broker.requests."""

    host: str
    method: str
    path: str
    query: dict[str, str]
    headers: Any
    body: bytes
    route: str = ""  # these three are found by Broker.handle
    app: str = ""  # the api name that it is about
    word: Any = ""  # what the route's switch says of its answer

    @property
    def data(self) -> dict[str, Any]:
        """What the login page's calls carry."""
        return json.loads(self.body)["data"]

    @property
    def form(self) -> dict[str, str]:
        is_form = self.headers.get_content_type() == "application/x-www-form-urlencoded"
        return dict(parse_qsl(self.body.decode())) if is_form else {}

    @property
    def cookies(self) -> list[str]:
        return self.headers.get("Cookie", "").split("; ")


@dataclass
class Reply:  # an answer that is well-formed HTTP; anything else is a word: Handler.fault_<word>
    status: int = 200
    body: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Token:
    app: str
    user_id: str
    live: bool = True


Pairs = Sequence[tuple[str, str]]
JSON_TYPE = ("Content-Type", "application/json")
HTML_TYPE = ("Content-Type", "text/html; charset=utf-8")


def json_reply(data: Any, status: int = 200, headers: Pairs = ()) -> Reply:
    return Reply(status, json.dumps(data), [JSON_TYPE, *headers])


def html_reply(text: str, status: int = 200, headers: Pairs = ()) -> Reply:
    return Reply(status, text, [HTML_TYPE, *headers])


def page_success(data: dict[str, Any], word: str = "", headers: Pairs = ()) -> Reply:
    shown = word if word in ("terms", "consent") else ""
    return json_reply({"success": True, "data": data, "interlude": shown}, headers=headers)


def page_failure(code: str | None, message: str | None = None) -> Reply:
    """The login service answers HTTP 200 even when it refuses."""
    if message is None:
        message = PAGE_ERRORS.get(code, "The request was refused.")
    error = {"code": int(code) if code else None, "message": message}
    return json_reply({"success": False, "requestId": "WPRO-0000000000", "error": error})


def totp(secret: str, moment: float) -> str:
    """The six digits of RFC 6238 for the 30 s window that holds this moment."""
    window = struct.pack(">Q", int(moment // 30))
    digest = hmac.new(base64.b32decode(secret), window, "sha1").digest()
    start = digest[-1] & 15
    return f"{(int.from_bytes(digest[start:start + 4], 'big') & 0x7FFFFFFF) % 10**6:06d}"


def new_token() -> str:
    """A token of the broker's length and alphabet; there is nothing in it to be read."""
    return ".".join(secrets.token_urlsafe(size) for size in (27, 150, 32))


def user_data(user_id: str) -> dict[str, Any]:
    return {"user_id": user_id, "user_name": "Asha Rao", "broker": "UPSTOX", "is_active": True}


class Handler(BaseHTTPRequestHandler):
    """Reads a request, asks the Broker, writes what it says; knows the ways to answer badly."""

    server: Any
    date: str | None = None  # an answer's own

    def answer(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.server.host, self.command, parts.path, dict(parse_qsl(parts.query)),
                          self.headers, body)
        reply = self.server.broker.handle(request)
        if isinstance(reply, Reply):
            body, headers = reply.body.encode("utf-8", "surrogateescape"), reply.headers
            if "Content-Length" not in dict(headers):
                headers = [*headers, ("Content-Length", str(len(body)))]
            self.send(body, headers, reply.status)
        else:
            getattr(self, "fault_" + reply)()

    do_GET = do_POST = do_DELETE = answer

    def send(self, body: bytes, headers: Pairs = (), status: int = 200) -> None:
        self.date = dict(headers).get("Date")
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def date_time_string(self, timestamp: float | None = None) -> str:
        if self.date is not None:
            return self.date
        known = self.server.broker.switches.clock_offset is not None
        return super().date_time_string(self.server.broker.now()) if known else ""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def fault_hang(self) -> None:
        self.server.broker.pause(600)

    def fault_reset(self) -> None:
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()

    def fault_drip(self) -> None:
        self.send(b" ", [JSON_TYPE, ("Content-Length", "900")])
        while not self.server.broker.pause(1):
            self.wfile.write(b" ")

    def fault_endless(self) -> None:
        self.send(b" ", [JSON_TYPE])
        while not self.server.broker.pause(0):
            self.wfile.write(b" " * 65536)

    def fault_gzip(self) -> None:
        self.send(gzip.compress(b" " * 200_000_000, 1), [JSON_TYPE, ("Content-Encoding", "gzip")])


class Server(ThreadingHTTPServer):
    """One of the broker's hosts, on a free port of 127.0.0.1."""

    request_queue_size = 256

    def __init__(self, broker: Broker, host: str) -> None:
        self.broker, self.host = broker, host
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def server_bind(self) -> None:
        # without HTTPServer's look-up of the host's full name, which may ask a DNS server
        socketserver.TCPServer.server_bind(self)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return not self.broker.switches.down

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that hung up is everyday life
            super().handle_error(request, client_address)


class Broker:
    """The broker on loopback ports; use it with `with`, its switches choose what goes wrong."""

    def __init__(self, **switches: Any) -> None:
        self.switches = Switches(**switches)
        self.clock: Callable[[], float] = time.time  # World hands in its own
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.captcha_solved = threading.Event()  # set by the operator in front of the browser
        self.requests: list[Request] = []
        self.logins: list[str] = []  # api names, in the order of their redirects
        self.auth_codes: set[str] = set()
        self.codes_taken = 0  # how many codes there were when one was right last
        self.tokens: dict[str, Token] = {}
        self.acts: dict[str, Callable[[Request], object]] = {}  # done before a route answers
        # client id, internal id of a dialog, authorization code or token: its app
        self.about = {client_id: name for name, (client_id, _) in APPS.items()}
        self._states: dict[str, str | None] = {}  # by internal id
        self._given: set[str] = set()  # tokens of OTP requests, and what a cookie identifies with
        self._servers = [Server(self, host) for host in ("api", "hop", "login", "foreign")]
        self.api, self.hop, self.login, self.foreign = (server.url for server in self._servers)
        # a name that Chromium takes for this machine by itself, but none of the broker's
        self.foreign = self.foreign.replace("127.0.0.1", "login.upst0x.localhost")

    def __enter__(self) -> Broker:
        for server in self._servers:  # the poll interval bounds how long shutdown takes
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.captcha_solved.set()
        with ThreadPoolExecutor(len(self._servers)) as pool:
            pool.map(Server.shutdown, self._servers)
        for server in self._servers:
            server.server_close()

    # ---- what tests ask and do

    def now(self) -> float:
        return self.clock() + (self.switches.clock_offset or 0)

    def asked(self, route: str) -> list[Request]:
        """Requests so far, by a name of ROUTES; "foreign" is all that reached the foreign host."""
        return [request for request in self.requests if request.route == route]

    def count(self, route: str) -> int:
        return len(self.asked(route))

    def details(self, route: str) -> list[str]:
        """The api names that this route's requests were about, in order."""
        return [request.app for request in self.asked(route)]

    @property
    def codes(self) -> list[str]:
        """Every OTP sent, right or wrong."""
        return [request.data["otp"] for request in self.asked("otp")]

    @property
    def pins(self) -> list[str]:
        """Every PIN sent, right or wrong."""
        return [base64.b64decode(request.data["inputText"]).decode()
                for request in self.asked("pin")]

    def switch(self, name: str, app: str = "") -> Any:
        """A switch's value, for this app; None of one that does not exist."""
        return self.switches.by_app.get(app, {}).get(name, getattr(self.switches, name, None))

    def issue(self, name: str, user_id: str = USER_ID) -> str:
        """Make a token that the broker takes, as if the app had logged in."""
        token = new_token()
        with self.lock:
            for older in self.tokens.values():
                if self.switches.one_token_per_app and older.app == name:
                    older.live = False
            self.tokens[token], self.about[token] = Token(name, user_id), name
        return token

    def secrets(self) -> set[str]:
        """Everything that must never be seen in any output, as far as it is known by now."""
        fixed = {MOBILE, PIN, TOTP_SECRET, *(secret for _, secret in APPS.values())}
        with self.lock:
            return fixed | {*self.tokens, *self.auth_codes, *self.codes}

    def delivery(self, name: str, **changes: Any) -> dict[str, Any]:
        """The body that reaches the notifier after an approval; issues the token it carries."""
        now = self.now()
        body = {"client_id": APPS[name][0], "user_id": USER_ID, "token_type": "Bearer",
                "issued_at": str(int(now * 1000)), "message_type": "access_token",
                "expires_at": str(int(next_cutoff(now) * 1000))}
        if "access_token" not in changes:
            body["access_token"] = self.issue(name)
        return body | changes

    def approve(self, name: str) -> None:
        """The user taps approve: the token is delivered, whether somebody takes it or not."""
        place = urlsplit(self.switches.notifier_url)
        line = http.client.HTTPConnection(place.hostname, place.port, timeout=10)
        with contextlib.closing(line), contextlib.suppress(OSError, http.client.HTTPException):
            line.request("POST", place.path, json.dumps(self.delivery(name)), dict([JSON_TYPE]))
            line.getresponse()

    # ---- shared by the answers below

    def pause(self, seconds: float) -> bool:
        """Wait, but no longer than the imitation lives; True when it is closing."""
        return self.closing.wait(seconds) if seconds > 0 else self.closing.is_set()

    def handle(self, request: Request) -> Reply | str:
        """What holds for every route: whose request it is, how long it takes, and the switches."""
        stem = V3_PATH if request.path.startswith(V3_PATH + "/") else request.path
        route = ROUTES.get((request.host, request.method, stem), "unknown")
        request.route = route = "foreign" if request.host == "foreign" else route
        request.app = self.app_of(request)
        self.requests.append(request)
        self.acts.get(route, lambda _: None)(request)
        delay = "step_delay" if route in ("mobile", "otp", "pin") else f"{route}_delay"
        self.pause(self.switch(delay, request.app) or 0)
        request.word = self.next_word(f"{route}_answer", request.app)
        return self.odd_answer(request) or getattr(self, f"on_{route}")(request)

    def app_of(self, request: Request) -> str:
        page = dict(parse_qsl(urlsplit(request.headers.get("Referer", "")).query))
        bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
        ids = (request.query.get("client_id"), page.get("client_id"), request.form.get("code"),
               request.path.rpartition("/")[2], bearer)
        return next((self.about[each] for each in ids if each in self.about), "")

    def next_word(self, switch: str, app: str) -> Any:
        """What the switch says of this call, "" to behave; a list is used up word by word."""
        with self.lock:
            value = self.switch(switch, app)
            return value.pop(0) if value and isinstance(value, list) else value or ""

    def odd_answer(self, request: Request) -> Reply | str | None:
        """What a word means for any route of its host; None for one that the route itself knows."""
        word = request.word
        if isinstance(word, Reply) or hasattr(Handler, f"fault_{word}"):
            return word
        if request.host == "api":
            if word in ("html", "503"):
                return html_reply("<h1>Service Unavailable</h1>", 503 if word == "503" else 200)
            code = {"401": "100050", "429": "10005", "500": "100500"}.get(word, word)
            return self.error(code) if code.isdigit() else None
        if word == "silent":
            return json_reply({"success": False, "error": None})
        if word == "foreign":
            step = 1 if request.route == "mobile" else 2
            return json_reply({"success": True, "moveTo": f"{self.foreign}/?step={step}"})
        if " " in word:
            text, code = re.fullmatch(r"(.*?)(?: \[(\d+)\])?", word.strip(), re.S).groups()
            return page_failure(code, text)
        return page_failure(word) if word.isdigit() else None

    def error(self, code: str) -> Reply:
        """The API's refusal with a UDAPI code."""
        entry = {"errorCode": f"UDAPI{code}", "error_code": f"UDAPI{code}",
                 "message": "Resource not Found.", "propertyPath": None}
        return json_reply({"status": "error", "errors": [entry]}, API_STATUS.get(code, 401))

    def on_unknown(self, request: Request) -> Reply:
        return self.error("100060")

    # ---- api.upstox.com

    def on_dialog(self, request: Request) -> Reply:
        query, name, state = request.query, request.app, request.query.get("state")
        sent = query.get("redirect_uri"), query.get("response_type")
        if not name or sent != (self.switch("redirect_uri", name), "code"):
            return self.error("100068")
        if request.word == "direct":
            return self.send_back(name, state)
        if request.word == "foreign":
            return Reply(302, "", [("Location", f"{self.foreign}/?step=0")])
        # the page gets an id of the broker's own, never the app's client id or redirect URI
        internal = "OAP-" + secrets.token_hex(8)
        self.about[internal], self._states[internal] = name, state
        query = {"client_id": internal, "redirect_uri": self.hop + HOP_PATH,
                 "user_type": "individual", "user_id": secrets.token_hex(6), "platform_id": "UDAPI"}
        return Reply(302, "", [("Location", f"{self.login}/?{urlencode(query)}")])

    def send_back(self, name: str, state: str | None) -> Reply:
        """302 to the app's redirect URI with a fresh code."""
        code = "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(6))
        self.about[code] = name
        self.auth_codes.add(code)
        self.logins.append(name)
        word = self.next_word("redirect_state", name)
        query = {"code": code, "state": "another-state" if word == "other" else state}
        left_out = {"missing": "state", "no_code": "code"}.get(word)
        tail = urlencode({key: value for key, value in query.items() if key != left_out and value})
        uri = self.switch("redirect_uri", name)
        return Reply(302, "", [("Location", f"{uri}{'&' if '?' in uri else '?'}{tail}")])

    def on_token(self, request: Request) -> Reply:
        form, name, code = request.form, request.app, request.form.get("code", "")
        used = [each.form.get("code") for each in self.asked("token")].count(code)
        pair = (form.get("client_id", ""), form.get("client_secret", ""))
        if pair not in APPS.values() or form.get("grant_type") != "authorization_code":
            return self.error("100069")
        if code not in self.auth_codes or used > 1 or APPS[name] != pair:
            return self.error("100057")
        if form.get("redirect_uri") != self.switch("redirect_uri", name):
            return self.error("100068")
        token = {"access_token": self.issue(name), "extended_token": None}
        return json_reply(user_data(USER_ID) | token)

    def on_profile(self, request: Request) -> Reply:
        token = self.tokens.get(request.headers.get("Authorization", "").removeprefix("Bearer "))
        if not token or not token.live:
            return self.error("100050")
        return json_reply({"status": "success", "data": user_data(token.user_id)})

    def on_v3(self, request: Request) -> Reply:
        name = request.app
        if not name or json.loads(request.body).get("client_secret") != APPS[name][1]:
            return self.error("100069")
        if not self.switches.notifier_url:
            return self.error("1123")
        now, life = self.now(), self.switch("v3_seconds", name)
        after = self.switch("approve_after", name)
        if after is not None:
            threading.Thread(target=lambda: self.pause(after) or self.approve(name),
                             daemon=True).start()
        expiry = next_cutoff(now) if life is None else now + life
        shown = self.switch("notifier_shown", name)
        if shown is None:
            shown = self.switches.notifier_url
        data = {"authorization_expiry": str(int(expiry * 1000)), "notifier_url": shown}
        return json_reply({"status": "success", "data": data})

    # ---- api-v2.upstox.com: the redirect behind the login page; and a host of others

    def on_hop(self, request: Request) -> Reply:
        state = self._states.get(request.query.get("client_id", ""))
        return self.send_back(request.app, state) if request.app else self.error("100068")

    def on_foreign(self, request: Request) -> Reply:
        """A page that looks like the broker's and tells here what is typed; nothing comes of it."""
        if request.path == "/":
            plain = {"page": "", "captcha": "", "rename": {}, "leave_on_input": ""}
            return self.page_reply("", foreign=True, **plain)
        return json_reply({})

    # ---- login.upstox.com and the service behind it

    def on_page(self, request: Request) -> Reply | str:
        name = request.app
        if (page := self.switch("page", name)) in ("hang", "blank"):
            return html_reply(BLANK_PAGE) if page == "blank" else "hang"
        whole = self.switch("captcha_form", name) in ("page", "both")
        if self.switch("captcha", name) and whole and "cf_clearance=1" not in request.cookies:
            return self.page_reply(name, 403, challenge=True)
        return self.page_reply(name)

    def page_reply(self, name: str, status: int = 200, **changes: Any) -> Reply:
        # the page is told all switches but the answers, which its service gives
        config = {switch: self.switch(switch, name) for switch in vars(self.switches)
                  if switch != "by_app" and not switch.endswith("_answer")}
        config |= {"mobile": MOBILE, "away": f"{self.foreign}/?step="} | changes
        script = SCRIPT.replace("/*CFG*/null", json.dumps(config))
        run_out = ("Set-Cookie", "auth_identity_token_expiry=1; Path=/")
        headers = [run_out] if self.switch("stale_identity", name) else []
        page = BLANK_PAGE.replace("</body>", script)
        if self.switch("rewritten", name):
            page = REWRITTEN.format(json.dumps(page).replace("</", r"<\/"))
        return html_reply(page, status, headers)

    def on_config(self, request: Request) -> Reply | str:
        loader = self.switch("page", request.app) == "loader"
        return "hang" if loader else json_reply({"qrLogin": True})

    def on_heard(self, request: Request) -> Reply:
        return Reply(204)

    def on_turnstile(self, request: Request) -> Reply:
        return html_reply(TURNSTILE_PAGE)

    def on_turnstile_passed(self, request: Request) -> Reply:
        """Answers once it is passed without a click on its box."""
        seconds = self.switch("captcha", request.app)
        self.captcha_solved.wait(None if seconds == "never" else seconds)
        return json_reply({})

    def on_mobile(self, request: Request) -> Reply:
        mobile = str(request.data.get("mobileNumber"))
        if mobile != MOBILE:
            return page_failure("1017016")
        token = secrets.token_hex(16)
        self._given.add(token)
        message = (f"Enter the 6-digit OTP received on {mobile[:2]}****{mobile[-4:]}"
                   " or the 6-digit TOTP generated by authenticator app")
        data = {"message": message, "validateOTPToken": token, "isTotpEnabled": True,
                "nextRequestInterval": self.switches.resend_seconds}
        return page_success(data, request.word)

    def on_otp(self, request: Request) -> Reply:
        code, token = request.data["otp"], request.data.get("validateOtpToken")
        if token not in self._given:
            return page_failure("1017076")
        right = {totp(TOTP_SECRET, self.now() + shift) for shift in (-30, 0, 30)}
        if code not in right or self.codes.count(code) > 1:
            return page_failure(WRONG_OTP)
        self.codes_taken = len(self.codes)
        self._given.discard(token)
        identity = f"auth_identity_token={secrets.token_hex(16)}"
        self._given.add(identity)
        expiry = int((time.time() + DAY) * 1000)  # the browser has the real clock
        cookies = [("Set-Cookie", f"{pair}; Path=/; Max-Age={DAY}")
                   for pair in (identity, f"auth_identity_token_expiry={expiry}")]
        data = {"userProfile": {"userId": USER_ID, "firstName": "Asha"},
                "isSecretPinSet": not self.switches.create_pin}
        return page_success(data, request.word, cookies)

    def on_pin(self, request: Request) -> Reply:
        if not request.app or self._given.isdisjoint(request.cookies):
            return page_failure("1017079")
        if sum(sent != PIN for sent in self.pins) >= 5:
            return page_failure("1017090")
        if self.pins[-1] != PIN:
            return page_failure(WRONG_PIN)
        data = {"requestId": secrets.token_hex(16),
                "customerStatus": "DORMANT" if request.word == "dormant" else "ACTIVE",
                "isExternalClientOAuthApp": request.word != "something_went_wrong"}
        return page_success(data, request.word)

    def on_authorize(self, request: Request) -> Reply:
        query = urlencode({name: request.query[name] for name in ("client_id", "requestId")})
        return page_success({"redirectUri": f"{self.hop}{HOP_PATH}?{query}", "isApproved": True})


# ---- the harness: a folder, a broker, a clock, and every way to run the program there

TOKENS_DDL = """CREATE TABLE "upstox_tokens" (
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
# the program with some of its constants changed: the first argument names them
WITH_LIMITS = """import json, sys, upstox_tokens
for name, value in json.loads(sys.argv.pop(1)).items():
    getattr(upstox_tokens, name)
    setattr(upstox_tokens, name, value)
sys.exit(upstox_tokens.main())"""
LIVE = ("RUNNING", "WAITING_FOR_OPERATOR")  # states of a job that has not ended


class Done(NamedTuple):  # how a run ended
    code: int
    out: str
    err: str


class Got(NamedTuple):  # an HTTP answer
    code: int
    headers: http.client.HTTPMessage
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def local_text(moment: float) -> str:
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M:%S")


def token_row(name: str, token: str, generated: float, **changes: Any) -> dict[str, Any]:
    """A row as the program stores it, for a token generated at this moment."""
    expiry = next_cutoff(generated)
    return {
        "access_token": token, "api_name": name, "client_id": APPS[name][0],
        "client_secret": APPS[name][1], "created_at": int(generated * 1000),
        "expires_in": int(expiry - generated), "is_primary": int(name == "PRIMARY"),
        "redirect_uri": REDIRECT_URI, "token_type": "Bearer", "api_index": list(APPS).index(name),
        "generated_at": local_text(generated), "is_active": 1, "updated_at": int(generated * 1000),
        "validity_at": local_text(expiry), } | changes


def summary(**labels: str) -> str:
    """The summary of the guide's 7.1, to the letter."""
    unknown = sum(label.startswith("UNKNOWN") for label in labels.values())
    valid = sum(label == "VALID" for label in labels.values())
    return "".join((
        "Token Status Summary:\n", "-" * 34, "\n",
        *(f"{name:<14}: {label}\n" for name, label in labels.items()),
        f"\nValid Tokens    : {valid}\nInvalid Tokens  : {len(labels) - valid - unknown}\n",
        f"Unknown Tokens  : {unknown}\n" if unknown else ""))


ALL_VALID = summary(**dict.fromkeys(APPS, "VALID"))
GUIDE = summary(PRIMARY="VALID", WEBSOCKET1="VALID", WEBSOCKET2="INVALID (401)",
                WEBSOCKET3="EXPIRED", OPTIONCHAIN1="VALID", OPTIONCHAIN2="NOT FOUND")
RENEWED = ["WEBSOCKET2", "WEBSOCKET3", "OPTIONCHAIN2"]  # of the guide's states, those to generate
DIRECT = {"dialog_answer": "direct"}  # no login page: for what lies behind it


class World(contextlib.ExitStack):
    """A folder with an env file, a broker, a clock, and every way to run the program there.

    The clock is the real one, or stands at `moment` and is moved on by what the program sleeps,
    for the broker too. All that a run says is searched for secrets and for tracebacks.
    """

    open_browser: Callable[..., Any] = upstox_tokens.Browser

    def __init__(self, apps: int = 6, moment: float | None = None,
                 env: Mapping[str, str | None] | None = None, broker: type[Broker] = Broker,
                 **switches: Any) -> None:
        super().__init__()
        self.names = list(APPS)[:apps]
        self.settings = dict(env or {})
        self.broker = broker(**switches)
        self.moment = moment
        self.prompts: list[str] = []
        self.hidden = {KEY, PIN[:-1], base64.b64encode(PIN.encode()).decode()}
        self.err = io.StringIO()  # what the run in this process has said so far

    def __enter__(self) -> World:
        folder = self.enter_context(tempfile.TemporaryDirectory(prefix="world-"))
        self.enter_context(self.broker)
        self.folder = Path(folder).resolve()
        self.db, self.log = self.folder / "vega_trade.db", self.folder / "server.log"
        self.broker.clock = self.now
        self.write_env()
        self.note_driver_starts()
        return self

    # ---- the clock

    def now(self) -> float:
        return time.time() if self.moment is None else self.moment

    def sleep(self, seconds: float) -> None:
        """What the program is given to sleep with; tests turn the clock with it."""
        if self.moment is None:
            time.sleep(seconds)
        else:
            self.moment += seconds

    @staticmethod
    def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
        """Wait for a condition of another process or thread; what it gave."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > end:
                raise AssertionError(f"waited {seconds} s in vain")
            time.sleep(0.01)
        return found

    # ---- what is there before a run

    def write_env(self, text: str | bytes | None = None, **changes: str | None) -> Path:
        """The env file: this text, or a filled one with changes (None leaves a key out)."""
        values: dict[str, str | None] = {
            "UPSTOX_BASE_URL": self.broker.api, "UPSTOX_MOBILE_NUMBER": MOBILE, "UPSTOX_PIN": PIN,
            "UPSTOX_TOTP": TOTP_SECRET, "UPSTOX_REDIRECT_URI": self.broker.switches.redirect_uri,
            "UPSTOX_NOTIFIER_WEBHOOK_URI": self.broker.switches.notifier_url or None}
        for index, name in enumerate(self.names):
            client_id, secret = APPS[name]
            values |= {f"UPSTOX_CLIENT_ID_{index}": client_id,
                       f"UPSTOX_CLIENT_SECRET_{index}": secret, f"UPSTOX_API_NAME_{index}": name}
        values |= self.settings | changes
        secret_keys = ("UPSTOX_PIN", "UPSTOX_TOTP", "UPSTOX_MOBILE_NUMBER", "UPSTOX_SERVE_KEY")
        self.hidden |= {value for key in secret_keys if (value := values.get(key))}
        if text is None:
            text = "".join(f"{key}={value}\n" for key, value in values.items() if value is not None)
        path = self.folder / ".env"
        path.touch(mode=0o600)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def exported(self) -> dict[str, str]:
        """What the env file says, for the environment."""
        lines = (self.folder / ".env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def seed(self, *rows: Mapping[str, Any]) -> None:
        """Create the guide's table where it is missing, and add the rows."""
        with self.connection() as database:
            database.execute(TOKENS_DDL.replace("TABLE", "TABLE IF NOT EXISTS"))
            for row in rows:
                database.execute(f"INSERT INTO upstox_tokens ({', '.join(row)}) "
                                 f"VALUES ({', '.join('?' * len(row))})", [*row.values()])

    def seed_valid(self, *names: str, age: float = 0, **changes: Any) -> None:
        """Live tokens for these apps (all when none is named), generated just now, or long ago."""
        self.seed(*(token_row(name, self.broker.issue(name), self.now() - age, **changes)
                    for name in names or self.names))

    def seed_old(self) -> dict[str, str]:
        """A token of yesterday for every app; the tokens."""
        self.seed_valid(age=DAY)
        return self.tokens()

    def seed_guide(self) -> None:
        """The guide's example: three valid, one refused, one expired, one missing (GUIDE)."""
        recent = max(self.now() - 3600, next_cutoff(self.now()) - DAY)
        for name in [*APPS][:-1]:
            made = recent - DAY if name == "WEBSOCKET3" else recent
            self.seed(token_row(name, self.broker.issue(name), made))
        self.broker.tokens[self.tokens()["WEBSOCKET2"]].live = False

    def lock(self, *_: Any, kind: str = "IMMEDIATE") -> None:
        """Another program writes to the database, until unlock()."""
        self.holder = sqlite3.connect(self.db, isolation_level=None, check_same_thread=False)
        self.callback(self.holder.close)
        self.holder.execute(f"BEGIN {kind}")

    def unlock(self) -> None:
        self.holder.rollback()

    # ---- what is there after a run

    @contextlib.contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.db)) as database, database:
            database.row_factory = sqlite3.Row
            yield database

    def sql(self, script: str) -> None:
        """Run statements on the database, made when missing."""
        with self.connection() as database:
            database.executescript(script)

    def rows(self, columns: str = "*", table: str = "upstox_tokens") -> list[dict[str, Any]]:
        with self.connection() as database:
            return [dict(row) for row in database.execute(f"SELECT {columns} FROM {table}")]

    def tokens(self) -> dict[str, str]:
        return {row["api_name"]: row["access_token"] for row in self.rows()}

    def audit_rows(self) -> list[dict[str, Any]]:
        """The audit table, oldest first; nothing when there is none."""
        exists = self.db.exists() and self.rows(
            "name", "sqlite_master WHERE name = 'upstox_token_audit'")
        return self.rows(table="upstox_token_audit ORDER BY id") if exists else []

    def audit(self, *outcomes: str) -> list[tuple[str, str]]:
        """(api name, outcome) of the audit rows with these outcomes, or of all."""
        return [(row["api_name"], row["outcome"]) for row in self.audit_rows()
                if not outcomes or row["outcome"] in outcomes]

    def sent(self) -> tuple[int, int, int]:
        """OTP requests, TOTP codes and PINs that reached the broker."""
        return tuple(map(self.broker.count, ("mobile", "otp", "pin")))

    def snapshot(self) -> dict[str, tuple[int, str]]:
        """Mode and hash of every file in the folder."""
        return {path.name: (path.stat().st_mode, hashlib.sha256(path.read_bytes()).hexdigest())
                for path in sorted(self.folder.iterdir()) if path.is_file()}

    def note_driver_starts(self) -> None:
        """A chromedriver first on PATH that is the real one and notes each start that succeeds."""
        wrapper, real = self.folder / "bin" / "chromedriver", shutil.which("chromedriver")
        wrapper.parent.mkdir()
        if real:
            starts = f'"{wrapper.parent}/starts"'
            wrapper.write_text(f'#!/bin/sh\necho >>{starts}\n"{real}" "$@" || sed -i 1d {starts}\n')
            wrapper.chmod(0o700)

    def browsers(self) -> int:
        """Browsers started so far."""
        starts = self.folder / "bin" / "starts"
        return starts.read_text().count("\n") if starts.exists() else 0

    def check_said(self, *texts: str) -> None:
        """What holds for all that a run says or leaves behind."""
        said = "\n".join(texts)
        with contextlib.suppress(sqlite3.Error):  # a database may be broken or locked on purpose
            said += "".join(f"\n{row[column]}" for row in self.audit_rows()
                            for column in row if column not in ("id", "at", "number"))
        for secret in self.hidden | self.broker.secrets():
            bounded = f"(?<![0-9a-fA-F]){secret}(?![0-9a-fA-F])" if secret.isdigit() else ""
            if re.search(bounded, said) if bounded else secret in said:
                raise AssertionError(f"the secret {secret} was told:\n{said}")
        if re.search("Traceback|internal error", said):
            raise AssertionError(said)

    # ---- in this process

    def environ(self, changes: Mapping[str, str | None]) -> dict[str, str]:
        """The environment of a run: no UPSTOX_ setting, no display, loopback kept off any proxy."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("UPSTOX_")}
        kept |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
                 "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
                 "TMPDIR": tempfile.gettempdir(), "DISPLAY": None, "WAYLAND_DISPLAY": None,
                 **changes}
        return {key: value for key, value in kept.items() if value is not None}

    def call(self, *argv: Any, answers: Iterable[str] = (), **env: str | None) -> Done:
        """The program in this process; `answers` are typed at its prompts, then comes Ctrl-D."""
        out, self.err, typed = io.StringIO(), io.StringIO(), iter(answers)
        self.prompts = []

        def ask(prompt: str) -> str:
            self.prompts.append(prompt)
            for answer in typed:
                return answer
            raise EOFError

        options = [] if "--env-file" in argv else ["--env-file", self.folder / ".env"]
        options += [] if "--db" in argv else ["--db", self.db]
        code = upstox_tokens.main([*map(str, [*argv, *options])], out=out, err=self.err, ask=ask,
                                  environ=self.environ(env), now=self.now, sleep=self.sleep,
                                  browser=self.open_browser)
        done = Done(code, out.getvalue(), self.err.getvalue())
        self.check_said(done.out, done.err, *self.prompts)
        return done

    def once_told(self, words: str, action: Callable[[], Any]) -> Any:
        """Beside the block: the action, as soon as the run in it says this."""
        return meanwhile(lambda: (self.until(lambda: words in self.err.getvalue()), action()))

    # ---- in a process of its own, which has the real clock

    def start(self, *argv: Any, program: Path | str = PROGRAM,
              limits: Mapping[str, float] | None = None,
              env: Mapping[str, str | None] | None = None,
              **options: Any) -> subprocess.Popen[str]:
        """Head of a process group, in the folder; killed with the world. `limits`: constants."""
        self.moment = None
        environ = self.environ(env or {})
        command = [sys.executable, program]
        if limits:
            command[1:] = ["-c", WITH_LIMITS, json.dumps(limits)]
            environ = {"PYTHONPATH": str(PROGRAM.parent)} | environ
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        options = pipes | {"cwd": self.folder, "encoding": "utf-8", "env": environ,
                           "start_new_session": True} | options
        process = subprocess.Popen([*map(str, [*command, *argv])], **options)
        self.callback(self.end, process)
        return process

    @staticmethod
    def end(process: subprocess.Popen[str]) -> None:
        process.kill()
        with contextlib.suppress(ValueError):  # pipes that communicate() has closed
            process.communicate()

    def finish(self, process: subprocess.Popen[str]) -> Done:
        """Type nothing more, and wait for the end."""
        try:
            out, err = (text or "" for text in process.communicate(timeout=120))
        except subprocess.TimeoutExpired:
            raise AssertionError("it does not end") from None
        self.check_said(out, err)
        return Done(process.returncode, out, err)

    def process(self, *argv: Any, **options: Any) -> Done:
        return self.finish(self.start(*argv, **options))

    # ---- behind HTTP, in a process of its own

    def serve(self, place: str = "127.0.0.1:0", *argv: Any, **options: Any) -> None:
        """Start the server, on a free port unless a place is named."""
        with self.log.open("w") as log:
            self.server = self.start("--serve", place, *argv, stderr=log, **options)
        self.until(lambda: self.log.read_text().endswith("\n") or self.server.poll() is not None)
        said = self.log.read_text()
        if not (found := re.match(r"Serving on http://([\w.-]+|\[\S+\]):([0-9]+)/", said)):
            raise AssertionError(said)
        self.address = (found[1].strip("[]"), int(found[2]))

    def ask(self, method: str = "GET", path: str = STATUS, body: Any = None,
            headers: Mapping[str, str] | None = None) -> Got:
        """One request and its answer, checked; a body that is not bytes is sent as JSON."""
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = {"Content-Type": "application/json"} | headers
        with contextlib.closing(http.client.HTTPConnection(*self.address, timeout=60)) as line:
            line.request(method, path, body, headers)
            answer = line.getresponse()
            return self.check_got(Got(answer.status, answer.headers, answer.read().decode()))

    def check_got(self, got: Got) -> Got:
        """What holds for every HTTP answer."""
        self.check_said(str(got.headers), got.text)
        if got.code >= 400 and got.text:  # HEAD has no text
            kind = got.headers["Content-Type"]
            if kind != "application/json" or list(got.json) != ["error"] or not got.json["error"]:
                raise AssertionError(f"not an error in JSON: {got}")
        return got

    def post(self, body: Any, **headers: str) -> Got:
        return self.ask("POST", GENERATE, body, headers)

    def job(self, job: str = "latest") -> dict[str, Any]:
        return self.ask("GET", f"{TOKENS}jobs/{job}").json

    def ended(self, job: str = "latest") -> dict[str, Any]:
        """The job, once it has ended."""
        self.until(lambda: self.job(job)["state"] not in LIVE, 90)
        return self.job(job)

    def stop(self, signum: int = signal.SIGTERM) -> str:
        """End the server; what it wrote to stderr."""
        self.server.send_signal(signum)
        code = self.server.wait(40)
        said = self.log.read_text()
        self.check_said(said)
        if code != 128 + signum:
            raise AssertionError(f"the server ended with {code}:\n{said}")
        return said


class SharedBrowser(upstox_tokens.Browser):
    """Its Chromium goes on to the next run, without its cookies."""

    idle: list[tuple[Any, Any]] = []
    lent: list[SharedBrowser] = []

    def start(self) -> None:
        self.lent.append(self)
        try:
            self.keeper, self.driver = self.idle.pop()
        except IndexError:
            return super().start()
        bin_folder = self.environ["PATH"].partition(os.pathsep)[0]
        with Path(bin_folder, "starts").open("a") as starts:  # as note_driver_starts does
            starts.write("\n")
        return None

    def close(self) -> None:
        if self in self.lent:
            self.lent.remove(self)
        try:
            self.driver.command_executor.add_command(
                "cdp", "POST", "/session/$sessionId/goog/cdp/execute")
            self.driver.execute("cdp", {"cmd": "Network.clearBrowserCookies", "params": {}})
            self.driver.get("about:blank")
        except Exception:  # none was started, or it died
            return super().close()
        self.idle.append((self.keeper, self.driver))
        self.keeper = self.driver = None
        return None

    @classmethod
    def end(cls) -> None:
        """End them; each run must have closed its own."""
        while cls.idle:
            browser = upstox_tokens.Browser((), False, {})
            browser.keeper, browser.driver = cls.idle.pop()
            browser.close()
        left, cls.lent = cls.lent, []
        if left:
            raise AssertionError("a run did not close its browser")


class slow(NamedTuple):
    """A row that only stress runs."""

    row: Any


class Case(unittest.TestCase):
    """A test that opens worlds and runs tables."""

    maxDiff = None
    seconds: dict[str, float] = {}  # what each test of this process took

    def run(self, result: Any = None) -> Any:
        began = time.monotonic()
        try:
            return super().run(result)
        finally:
            self.seconds[self.id()] = time.monotonic() - began

    def setUp(self) -> None:
        self.addCleanup(os.umask, os.umask(0o022))

    def enter(self, context: Any) -> Any:
        """What this context gives until the end of the test: enterContext of Python 3.11."""
        given = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)
        return given

    def world(self, *args: Any, **options: Any) -> World:
        return self.enter(World(*args, **options))

    def table(self, work: Callable[[Any], object], rows: Iterable[Any], workers: int = 1) -> None:
        """work(row) for each row, as a subtest of its own, several side by side with workers."""
        rows = [row.row if isinstance(row, slow) else row for row in rows
                if SLOW or not isinstance(row, slow)]
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(work, row) for row in rows] if workers > 1 else []
            for place, row in enumerate(rows):
                with self.subTest(row=str(row)[:100]):
                    futures[place].result() if futures else work(row)


class BrowserCase(Case):
    """Tests with a real browser: whatever they start must be gone in the end, and all profiles.

    The runs of this process share their Chromium, one after the other.
    """

    temp: Path

    @classmethod
    def setUpClass(cls) -> None:
        if problem := missing_for_browser():
            if "CI" in os.environ:
                raise AssertionError(problem)
            raise unittest.SkipTest(problem)
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="browsers-"))
        cls.temp = Path(folder).resolve()
        stack.enter_context(mock.patch.object(tempfile, "tempdir", str(cls.temp)))
        stack.enter_context(mock.patch.object(World, "open_browser", SharedBrowser))
        stack.callback(cls.check_clean)
        stack.callback(SharedBrowser.end)

    @classmethod
    def check_clean(cls) -> None:
        if left := [path for path in cls.temp.iterdir() if not path.name.startswith("world-")]:
            raise AssertionError(f"profiles left behind: {left}")
        end = time.monotonic() + 10  # a crash handler notices by itself that its browser has gone
        while alive := processes(cls.temp):
            if time.monotonic() > end:
                raise AssertionError(f"processes left behind: {alive}")
            time.sleep(0.05)


def missing_for_browser() -> str:
    """What a login on this machine lacks, as one sentence with the command; empty when nothing."""
    if not all(map(importlib.util.find_spec, ("selenium", "pyotp"))):
        return f"Packages missing. Run: {sys.executable} -m pip install selenium pyotp"
    if any(map(shutil.which, BROWSERS)) and shutil.which("chromedriver"):
        return ""
    return "Chromium is missing, install with: sudo apt install chromium chromium-driver"


def processes(folder: Path) -> dict[int, str]:
    """Processes other than this one that name the folder in command line or environment."""
    found = {}
    for entry in set(Path("/proc").glob("[0-9]*")) - {Path(f"/proc/{os.getpid()}")}:
        with contextlib.suppress(OSError):
            command, environ = ((entry / name).read_bytes() for name in ("cmdline", "environ"))
            if command and bytes(folder) in command + environ:
                found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
    return found


@contextlib.contextmanager
def meanwhile(action: Callable[[], Any]) -> Iterator[None]:
    """Run the action in a thread beside the block; its failure is the block's."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(action)
        yield
        future.result()


def crowd(count: int, work: Callable[[int], Any]) -> list[Any]:
    """work(0), work(1) ... all at the same time."""
    start = threading.Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda number: (start.wait(30), work(number))[1], range(count)))


@contextlib.contextmanager
def display() -> Iterator[str]:
    """A screen that nobody looks at."""
    command = ["Xvfb", "-displayfd", "1", "-screen", "0", "1280x1024x24"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, encoding="utf-8", **pipes) as screen:
        try:
            yield f":{screen.stdout.readline().strip()}"
        finally:
            screen.terminate()


class Listener(socketserver.ThreadingTCPServer):
    """Somebody else's server, who keeps what reaches it first and hangs up; TLS with a context."""

    daemon_threads = True

    def __init__(self, host: str = "127.0.0.1", port: int = 0,
                 context: ssl.SSLContext | None = None) -> None:
        self.got: list[bytes] = []
        self.context = context
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), None)
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def finish_request(self, request: socket.socket, client_address: Any) -> None:
        with contextlib.suppress(OSError):
            if self.context:
                request = self.context.wrap_socket(request, server_side=True)
            self.got.extend(filter(None, [request.recv(65536)]))

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def free_port() -> int:
    """One that the system gives to nobody by itself, so that it stays free until it is used."""
    while True:
        place = ("127.0.0.1", random.randrange(20000, 28000))
        with contextlib.suppress(OSError), socket.create_server(place):
            return place[1]


@contextlib.contextmanager
def time_zone(zone: str) -> Iterator[None]:
    """Another time zone of the machine, in this process and what it starts."""
    with mock.patch.dict(os.environ, TZ=zone):
        time.tzset()
        yield
    time.tzset()


@contextlib.contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """As a user whom file permissions stop: root steps down and leaves the files to that user."""
    if os.geteuid():
        yield
        return
    for path in (folder, *folder.iterdir()):
        os.chown(path, 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# ==== Tokens: what the rows say, what the broker says =============================================

MOMENT = datetime(2025, 11, 25, 4, 30, tzinfo=timezone.utc).timestamp()  # 10:00 Indian time
NOTIFIER = "http://127.0.0.1:9/notify"  # needed for flow V3; nothing is delivered there


def label(out: str, name: str = "PRIMARY") -> str:
    """What a summary, or --check, shows for one name."""
    return re.search(rf"^{name} *: (.*)$", out, re.MULTILINE)[1]


def forms(moment: float) -> list[Any]:
    """A moment in every form that writers of SQLite leave in created_at (facts/measured.md 1)."""
    text = local_text(moment)
    zulu = datetime.fromtimestamp(moment, timezone.utc).replace(tzinfo=None).isoformat()
    india = datetime.fromtimestamp(moment, timezone(timedelta(hours=5.5)))
    return [int(moment * 1000), int(moment), str(int(moment * 1000)), moment + 0.25,
            moment / 86400 + 2440587.5, text, text.replace(" ", "T") + ".123", text + ".123456",
            zulu + "Z", str(india), text.encode()]


def status_rows() -> list[tuple[str, list[dict[str, Any]]]]:
    """What the summary says of PRIMARY, when the table has rows of it with these changes."""
    past, earlier = {"validity_at": "2025-11-25 09:59:59"}, {"created_at": local_text(MOMENT - 30)}
    refused, undated = {"access_token": "refused"}, {"created_at": None, "validity_at": None}
    nulls = dict.fromkeys(("client_secret", "expires_in", "is_primary", "redirect_uri", "client_id",
                           "token_type", "api_index", "generated_at", "updated_at"))
    cutoff = int(next_cutoff(MOMENT) - DAY) * 1000

    def each(expected: str, column: str, *values: Any, **more: Any) -> list[Any]:
        return [(expected, [{column: value} | more]) for value in values]

    return [
        ("NOT FOUND", []), ("NOT FOUND", [{"access_token": None, "is_active": 0}]),
        ("NOT FOUND", [{"access_token": ""}]),
        *each("INVALID (inactive)", "is_active", 0, "0", "false", "FALSE", client_id="x", **past),
        ("INVALID (client changed)", [{"client_id": "other", "access_token": "with space"} | past]),
        *each("INVALID (malformed token)", "access_token", "two\nlines", "with space", "ключ",
              b"\xff\xfe", validity_at=None),
        *each("VALID", "is_active", 1, "1", "true", True, is_primary="true"), ("VALID", [nulls]),
        # over at the second of validity_at, and at the first 03:30 IST after created_at
        *each("VALID", "validity_at", local_text(MOMENT + 1)),
        *each("EXPIRED", "validity_at", local_text(MOMENT), "2025-11-25T04:29:59Z", "2025-11-25"),
        *each("VALID", "created_at", cutoff, *forms(MOMENT - 60)),
        *each("EXPIRED", "created_at", cutoff - 1, *forms(MOMENT - DAY)),
        *each("VALID", "created_at",  # nobody can read these: validity_at decides alone
              None, "", "yesterday", b"\xff", 0, -1, 2**63 - 1, 9_000_000_000_000_000, 1e300,
              9e6 + 0.5, "9999-12-31 23:59:59"),
        *each("VALID", "validity_at", " 2025-11-26 03:30:00 ", "2025-11-26T03:30:00.123456",
              "2025-11-25T04:30:01.000Z", "2025-11-26 03:30:00+05:30", "2025-11-26 03:30",
              b"2025-11-26 03:30:00"),
        *each("EXPIRED (validity unreadable)", "validity_at", None, "", "soon", b"\xff\xfe",
              "2025-11-26 3:30:00", "2025-13-45 03:30:00", "2025-11-26 03:30:00x", 1764108000000,
              1764108000, 20251126, 2461005.5),
        # the newest of several rows counts: by created_at, then by id
        ("VALID", [{}, earlier | past]), ("VALID", [earlier | past, {}]),
        ("INVALID (401)", [earlier, refused]), ("INVALID (401)", [refused, earlier]),
        ("VALID", [undated, {}]), ("VALID", [{}, undated]), ("VALID", [refused, {}])]


CUTOFFS = [  # zone, generated (Indian time), the same in the zone, and the end of the token there
    ("Asia/Kolkata", "2025-11-25 03:29:59", "2025-11-25 03:29:59", "2025-11-25 03:30:00"),
    ("Asia/Kolkata", "2025-11-25 03:30:00", "2025-11-25 03:30:00", "2025-11-26 03:30:00"),
    ("Australia/Sydney", "2025-11-25 20:00:00", "2025-11-26 01:30:00", "2025-11-26 09:00:00"),
    # clocks go back on 2 November 2025 at 06:00 UTC, forward on 9 March 2025 at 07:00 UTC
    ("America/New_York", "2025-11-02 03:30:00", "2025-11-01 18:00:00", "2025-11-02 17:00:00"),
    ("America/New_York", "2025-03-09 03:30:00", "2025-03-08 17:00:00", "2025-03-09 18:00:00")]


class TokenTest(Case):
    def test_rows(self) -> None:
        """The row decides in the contract's order; what it leaves open, one profile call does."""
        def work(row: tuple[str, list[dict[str, Any]]]) -> None:
            expected, rows = row
            world.db.unlink(missing_ok=True)
            for changes in rows:
                world.seed_valid("PRIMARY", **changes)
            asked = world.broker.count("profile")
            done = world.call("--status")
            self.assertEqual(done, (int(expected != "VALID"), summary(PRIMARY=expected), ""))
            self.assertEqual(world.broker.count("profile") - asked,
                             expected in ("VALID", "INVALID (401)"))

        with time_zone("Asia/Kolkata"):
            world = self.world(apps=1, moment=MOMENT, one_token_per_app=False)
            self.table(work, status_rows())
            world.moment = next_cutoff(MOMENT)
            work(("EXPIRED", [{"created_at": int(MOMENT)}]))

    def test_cutoffs(self) -> None:
        for zone, generated, *expected in CUTOFFS:
            moment = datetime.fromisoformat(generated + "+05:30").timestamp()
            with self.subTest(zone + generated), time_zone(zone):
                end = upstox_tokens.cutoff_after(moment)
                self.assertEqual([*map(upstox_tokens.local_text, (moment, end))], expected)
                self.assertEqual(upstox_tokens.parse_time(expected[1]), end)

    def test_summary(self) -> None:
        """To the letter, whatever the database is, and nothing is written."""
        none, wal = summary(**dict.fromkeys(APPS, "NOT FOUND")), "PRAGMA journal_mode = WAL"
        strangers = ("INSERT INTO upstox_tokens (api_name) VALUES ('LEGACY'), ('primary'), "
                     "('\x1b[2Jx'), (CAST(x'ff41' AS TEXT)), ('LEGACY')")
        told = "Rows of unknown names are left untouched: [2Jx, LEGACY, primary, \ufffdA\n"

        def work(row: tuple[str | None, str | None, str, str, str]) -> None:
            first, then, line, out, err = row  # done to the database before and after the seed
            world = self.world()
            if first is not None:
                world.sql(first)
            if then is not None:
                world.seed_guide()
            if then:
                reader = sqlite3.connect(world.db)  # keeps a write-ahead log from being merged
                self.addCleanup(reader.close)
                reader.execute("SELECT * FROM upstox_tokens").fetchone()
                world.sql(then)
            before = {name: file for name, file in world.snapshot().items() if name[-4:] != "-shm"}
            self.assertEqual("vega_trade.db-wal" in before, bool(first and then))
            self.assertEqual(world.call(*line.split()), (1, out.format(db=world.db), err))
            self.assertEqual({name: world.snapshot().get(name) for name in before}, before)
            self.assertEqual(world.db.exists(), first is not None)

        self.table(work, [
            (None, None, "--status", none, ""), ("", "", "--status", GUIDE, ""),
            ("CREATE TABLE orders (id)", None, "--status", none, ""),
            (wal, "", "--status", GUIDE, ""),
            (wal, "UPDATE upstox_tokens SET is_primary = 1", "--status", GUIDE, ""),
            ("", "", "--status -v", GUIDE.replace("Summary:", "Summary: {db}"), ""),
            ("", strangers, "--status", GUIDE, told), ("", strangers, "--status -q", GUIDE, "")])

    def test_journal_of_a_killed_writer(self) -> None:
        """What a killed writer had begun is rolled back and not seen."""
        world = self.world()
        world.seed_guide()
        tokens = world.tokens()
        script = ("import os, sqlite3; d = sqlite3.connect('vega_trade.db', isolation_level=None)\n"
                  "for s in ('PRAGMA cache_size = 1', 'BEGIN', 'UPDATE upstox_tokens SET "
                  "is_active = 0, access_token = hex(zeroblob(9000))'): d.execute(s)\n"
                  "os.kill(os.getpid(), 9)")
        subprocess.run([sys.executable, "-c", script], cwd=world.folder)
        self.assertGreater(world.folder.joinpath("vega_trade.db-journal").stat().st_size, 512)
        self.assertEqual(world.call("--status"), (1, GUIDE, ""))
        self.assertEqual(world.tokens(), tokens)


PROOF = '{"status":"success","data":{}}'
ODD_BODIES = ["", "{}", "[]", "7", "null", '"success"', "[" * 100_000, '{"a":' * 50_000,
              "9" * 50_000, '{"status": NaN}', r'{"access_token":"\udfff"}',
              r'{"status":"\u0000\u001b[31m"}',
              '{"status":["success"],"access_token":["x"],"data":[1],"errors":[[1]]}',
              '{"status":{},"access_token":{"a":1},"data":"x","errors":{"errorCode":1}}',
              '{"status":1,"access_token":123456,"data":5,"errors":7}',
              '{"errors":[{"errorCode":null,"message":{"b":2}}]}']
CUT_SHORT = Reply(200, '{"status":"success","access_tok', [("Content-Length", "900")])
NONSENSE: list[Reply | str] = [  # what no broker should answer
    *(Reply(200, body) for body in ODD_BODIES), Reply(200, PROOF, [("Content-Length", "99")]),
    Reply(200, "{}", [("Content-Length", "five")]), Reply(200, "{}", [("Date", "x" * 500)] * 100),
    Reply(200, "", [("X-Flood", "x" * 500)] * 5000), CUT_SHORT, "html", "endless", "gzip"]
MY_APPS = "the app's page under Developer Apps of your Upstox account"
UNREACHABLE = ("the broker cannot be reached (no connection). Check this machine's network, its "
               "proxy settings and UPSTOX_BASE_URL, then run again.")
UNUSABLE = "the broker gave no usable answer ({}). Look at status.upstox.com, then run again."
UNREGISTERED = ("client_id or redirect_uri is not what the broker has registered (UDAPI100068). "
                f"Compare both with {MY_APPS}; the app may have been deleted.")
TOLD: list[tuple[Reply | str, str]] = [  # the broker's answer, and what the operator is told
    ("100068", UNREGISTERED),
    ("100069", "client_id or client_secret is wrong (UDAPI100069). Copy the secret again from "
               f"{MY_APPS}."),
    ("100016", "the app's credentials are not valid (UDAPI100016). Compare client_id and secret "
               f"with {MY_APPS}."),
    ("100073", f"the client_id is inactive (UDAPI100073). Activate it on {MY_APPS}."),
    ("100057", "the authorization code was not accepted (UDAPI100057). Run again."),
    ("100058", "no segment of this account is active (UDAPI100058). Reactivate the account in the "
               "Upstox app."),
    ("100060", "the broker refused with UDAPI100060: Resource not Found. Its documentation "
               "explains the code."),
    (json_reply({"errors": [{"errorCode": "UDAPI7\n", "message": "a\x1b[31m."}]}, 400),
     "the broker refused with UDAPI7: a [31m. Its documentation explains the code."),
    ("500", "the broker has trouble of its own (UDAPI100500). Look at status.upstox.com, then run "
            "again."),
    *((answer, f"the broker counts too many requests ({code}). Wait a few minutes, then run again.")
      for answer, code in (("429", "UDAPI10005"), (Reply(429), "HTTP 429"))),
    ("503", UNUSABLE.format("HTTP 503")), (Reply(400, "{}"), UNUSABLE.format("HTTP 400")),
    ("reset", UNREACHABLE),
    *((Reply(200, body), UNUSABLE.format("unexpected answer")) for body in ODD_BODIES)]


class AnswerTest(Case):
    """Whatever the broker answers: in time, told in a word or a sentence, no token elsewhere."""

    def test_profile(self) -> None:
        world = self.world(apps=1)
        world.seed_valid("PRIMARY")
        elsewhere = [("Location", world.broker.hop + "/elsewhere")]
        rows: list[tuple[str, Reply | str]] = [
            ("VALID", Reply(200, PROOF)), ("INVALID (401)", "401"),
            ("INVALID (401)", Reply(401, PROOF)), ("UNKNOWN (403)", Reply(403, PROOF)),
            ("UNKNOWN (400)", Reply(400)), ("UNKNOWN (404)", "100060"), ("UNKNOWN (429)", "429"),
            ("UNKNOWN (500)", "500"), ("UNKNOWN (503)", "503"),
            ("UNKNOWN (no connection)", "reset"),
            ("UNKNOWN (timeout)", "hang"), ("UNKNOWN (timeout)", "drip"),
            *(("UNKNOWN (unexpected answer)", answer) for answer in (
                *NONSENSE, Reply(201, PROOF), json_reply({"status": "error", "data": None}),
                Reply(206, PROOF),
                *(Reply(code, PROOF, elsewhere) for code in (301, 302, 303, 307, 308))))]
        before = world.snapshot()

        def work(row: tuple[str, Reply | str]) -> None:
            expected, answer = row
            world.broker.switches.profile_answer = answer
            seconds = 1 if answer in ("hang", "drip") else 10  # for one that never ends
            with mock.patch.multiple(upstox_tokens, PROFILE_SECONDS=seconds):
                done = world.call("--status")
            self.assertEqual(done, (int(expected != "VALID"), summary(PRIMARY=expected), ""))
        self.table(work, rows)
        self.assertEqual(world.broker.count("unknown"), 0)
        named = {(request.headers["User-Agent"], request.headers["Accept"])
                 for request in world.broker.requests}
        self.assertEqual((world.snapshot(), named), (
            before, {(f"upstox_tokens/{upstox_tokens.__version__}", "application/json")}))

    def test_words(self) -> None:
        """The sentences, as --check tells them of its pre-flight."""
        world = self.world(apps=1, notifier_url=NOTIFIER)

        def work(row: tuple[Reply | str, str]) -> None:
            world.broker.switches.dialog_answer, expected = row
            done = world.call("--check", "--flow", "V3")
            self.assertEqual((done.code, label(done.out)), (1, expected))
        self.table(work, TOLD)

    def test_what_a_page_says(self) -> None:
        """(path, text, whether the OTP can be typed) -> what is made of it (facts 2)."""
        app, run, person, hold = range(4)  # how far it reaches
        stopped = ("the broker blocked OTP entry for a while. Wait 10 minutes, then run again.",
                   run)
        locked = ("the account is locked after too many wrong PINs. Unlock it in the Upstox app "
                  "(PAN and OTP), then start the menu.", hold)
        new_pin = ("the page asks to create a new PIN, which this program never does. Set the PIN "
                   "in the Upstox app, then run again.", app)
        dormant = ("the account is dormant. Reactivate it in the Upstox app, then run again.", app)
        codes = {
            "1017016": ("the broker does not know the mobile number. Correct UPSTOX_MOBILE_NUMBER.",
                        person),
            "1017074": ("several accounts are linked to the mobile number. Ask the broker to "
                        "separate them, or use --flow V3.", person),
            "1017069": ("the broker's limit of OTP requests is reached. Wait 10 minutes, then run "
                        "again.", run),
            "1017076": ("the broker's OTP session expired. Run again.", app),
            "1017072": ("the broker calls the login page's version outdated. Run again later.",
                        app),
            "1017078": stopped, "1017125": stopped, "1017090": locked,
            "500": ("the login page lost its connection to the broker. Run again.", app),
            **dict.fromkeys(("1017007", "1017079", "1017084", "1017095", "1017105"),
                            ("the broker ended the login session. Run again.", app))}
        blocked = ("Too many tries", "Limit exceeded", "You are BLOCKED", "Try again after a while",
                   "Please try again in 2 minutes")
        rows = [
            *(("/", f"Sorry. [{code}]", True, told) for code, told in codes.items()),
            *(("/", text, True, None) for text in ("[12345]", "[1017016", "[1017999]", *blocked)),
            *(("/", text, False, stopped) for text in blocked), ("/", "Enter OTP", False, None),
            ("/", "Your account has been locked. Unlock it", True, locked),
            ("/unlock-account", "x", True, locked), ("/x/unlock-account", "x", True, None),
            ("/", "Hi\nCreate a new PIN", True, new_pin),
            ("/", "Create a new 6-digit PIN", True, new_pin),
            ("/", "Do not create a new PIN", True, None),
            ("/", "Something went wrong!", True,
             ("the login page says that something went wrong. Run again.", app)),
            ("/", "Reactivate your account", True, dormant),
            ("/reactivate-account", "x", True, dormant),
            ("/", "error UDAPI100068", None, (UNREGISTERED, app)),
            ("/", "UDAPI7", None,
             ("the authorize dialog answered with an error (UDAPI7). Run again.", app)),
            ("/", "error UDAPI100068", True, None)]

        def work(row: tuple[str, str, bool | None, tuple[str, int] | None]) -> None:
            path, text, enabled, expected = row
            items = {} if enabled is None else {"otpNum": {"enabled": enabled}, "continueBtn": {}}
            view = upstox_tokens.View("https://login.upstox.com" + path, items, text=text)
            told = upstox_tokens.known_complaint(view, text.splitlines())
            self.assertEqual(told, expected)
        self.table(work, rows)

    def test_what_is_made_of_an_answer(self) -> None:
        """(what was sent, visible fields and buttons, new lines) -> the move, or the reach."""
        otp, pin = ("otpNum", "continueBtn"), ("pinCode", "pinContinueBtn")
        both, hold = ("mobileNum", "getOtp"), upstox_tokens.A_HOLD
        rows = [
            *(("pin", pin, text, hold) for text in (
                "The PIN you entered is incorrect.\nPlease check it and try again",
                "Incorrect PIN\nRequest aborted [500]", "Incorrect PIN\nSomething went wrong",
                "It doesn't match", "It doesn’t match", "That is not correct", "PIN not valid",
                "x" * 250 + " [1017090]")),
            ("otp", otp, "The code is incorrect.\nPlease check it", "refused"),
            # the next step proves it, whatever is said beside it; a step goes with its field
            ("otp", pin, "Cannot load your profile [1017555]", "taken"),
            ("otp", pin, "Request aborted [500]", "taken"),
            ("mobile", otp, "Cannot load your profile [1017555]", "taken"),
            ("otp", (*both, "otpNum"), "", "wait"), ("pin", (*both, "pinCode"), "", "wait"),
            ("", pin, "Cannot load your profile [1017555]", "wait"),
            ("", pin, "Locked [1017090]", hold),
            # a step that comes again: the session is lost, neither number nor code is typed anew
            ("", both, "", upstox_tokens.THIS_APP), ("pin", both, "", upstox_tokens.THIS_RUN)]

        def work(row: tuple[str, Sequence[str], str, Any]) -> None:
            sent, shown, text, expected = row
            items = {name: {"enabled": True, "value": "", "submits": 0} for name in shown}
            view = upstox_tokens.View("http://127.0.0.1/", items, text="Hi\n" + text)
            run = mock.Mock(config=mock.Mock(base_url="http://127.0.0.1"))
            login = upstox_tokens.Login(run, mock.Mock(redirect_uri=REDIRECT_URI), mock.Mock(
                look=lambda: view, clock=lambda: 0, rest=mock.Mock(side_effect=StopIteration)))
            login.sent, login.before, login.pressed, login.done = sent, "Hi", True, ["mobile"]
            login.texts["otp"] = "123456"
            try:
                became: Any = login.decide()[1]
            except StopIteration:
                became = "wait"
            except upstox_tokens.LoginFailed as failure:
                became = failure.reach
            self.assertEqual(became, expected)
        self.table(work, rows)

    def test_what_is_news(self) -> None:
        """What the page shows that it did not before: countdowns and good words are none."""
        before = "Enter OTP\nResend OTP (1:59s)\nWrong PIN, 3 attempts left\nPage 1"
        for line, new in {"Resend OTP": 0, "OTP has been resent": 0, "Successfully verified": 0,
                          "Hi Asha": 0, " Hi": 0, "History": 1, "Page 2": 0, "Enter OTP": 0,
                          "  ": 0, "Enter PIN": 1, "Wrong PIN, 3 attempts left": 0,
                          "Please be patient": 1,
                          "Wrong PIN, 2 attempts left": 1, "Resend failed [1017069]": 1}.items():
            view = upstox_tokens.View(text=f"{before}\n{line}")
            self.assertEqual(upstox_tokens.news(view, before), [line] * new, line)
            self.assertEqual(upstox_tokens.news(view, None), [])
        refusals = ("Incorrect OTP", "invalid pin", "Wrong code", "PIN does not match",
                    "A mismatch", "1 attempt left", "2 attempts remaining")
        for words in (*refusals, "Something went wrong", "Enter PIN", "wrongly", "Attempt 1"):
            self.assertEqual(bool(upstox_tokens.REFUSAL.search(words)), words in refusals, words)

    def test_redact(self) -> None:
        """The longest secret first, digits in groups too."""
        text = upstox_tokens.redact("ab749216cd, 749-216, 74 92 16, x749216", {PIN, f"ab{PIN}cd"})
        self.assertEqual(text, "[hidden], [hidden], [hidden], x[hidden]")
        self.assertEqual(upstox_tokens.redact("a+b(c. aab(cc", {"a+b(c."}), "[hidden] aab(cc")

    def test_no_request_outlives_its_deadline(self) -> None:
        """An answer that drips for ever is not read for ever, unseen, in a thread of its own."""
        world = self.world(apps=1, profile_answer="drip")
        world.seed_valid()
        threads = threading.active_count()
        with mock.patch.multiple(upstox_tokens, PROFILE_SECONDS=2):  # a drop comes each second
            world.call("--status")
            world.until(lambda: threading.active_count() <= threads, 20)

    def test_network(self) -> None:
        """UPSTOX_BASE_URL alone gets the bearer token: no proxy does, no unproven certificate."""
        world = self.world(apps=1)
        world.seed_valid("PRIMARY")
        api, unknown = world.broker.api, "UNKNOWN (no connection)"

        def work(row: tuple[str, str, str, str]) -> None:
            expected, base, proxy, first = row
            listener.got.clear()
            names = ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy")
            done = world.process("--status", env=dict.fromkeys(names, proxy or None) | {
                "UPSTOX_BASE_URL": base, "no_proxy": None, "NO_PROXY": None})
            self.assertEqual(done, (int(expected != "VALID"), summary(PRIMARY=expected), ""))
            self.assertEqual([data[:len(first)].decode() for data in listener.got],
                             [first] if first else [])

        with Listener() as listener:
            proxy = f"http://127.0.0.1:{listener.port}"
            self.table(work, [
                ("VALID", f"{api}/", proxy, ""),
                (unknown, f"http://127.0.0.1:{free_port()}", proxy, ""),
                (unknown, f"https://localhost:{free_port()}", proxy, ""),
                (unknown, api.replace("http:", "https:"), "", ""),
                (unknown, "", proxy, "CONNECT api.upstox.com:443 "),
                # a proxy for https is asked for a tunnel and sees no token
                (unknown, "https://nobody.upstox.com", proxy, "CONNECT nobody.upstox.com:443 ")])

    @unittest.skipUnless(shutil.which("openssl"), "openssl is needed")
    def test_certificate_of_nobody(self) -> None:
        world = self.world(apps=1)
        world.seed_valid("PRIMARY")
        command = ("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "
                   "/CN=localhost -addext subjectAltName=DNS:localhost -keyout key -out cert")
        subprocess.run(command.split(), cwd=world.folder, check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(world.folder / "cert", world.folder / "key")
        with Listener(context=context) as listener:
            done = world.call("--status", UPSTOX_BASE_URL=f"https://localhost:{listener.port}")
        self.assertEqual((done.out, listener.got), (summary(PRIMARY="UNKNOWN (no connection)"), []))


# ==== Modes and menu, up to where a browser would start ===========================================

REFUSED = {"dialog_answer": "100068"}  # of every app: no run goes further than its pre-flight
MENU = """
Choose Action:
1. Generate ALL
2. Generate ONLY invalid
3. Generate selected (comma separated)
4. Abort
"""
ABORTED = "Aborted, nothing changed.\n"
ALL_UNKNOWN = summary(**dict.fromkeys(APPS, "UNKNOWN (503)"))
ASKED = ("PRIMARY", "WEBSOCKET1", "WEBSOCKET2", "OPTIONCHAIN1")  # those that the broker judges
HALF_UNKNOWN = summary(**dict.fromkeys(APPS, "UNKNOWN (429)") | {
    "WEBSOCKET3": "EXPIRED", "OPTIONCHAIN2": "NOT FOUND"})
NO_VERDICT = "Not generated, since the broker gave no verdict about it: {}.\n"
OFF = ("this machine's clock is {} the broker's, so its TOTP codes would be refused. Set the clock "
       "(timedatectl set-ntp true), then run again.")


class Ran(NamedTuple):
    """A run against REFUSED: what it says (… for any text), and which apps it asked about."""

    line: str
    code: int
    out: str
    err: str = ""
    asked: Sequence[str] = ()
    answers: Sequence[str] = ()
    seed: Callable[[World], object] = World.seed_guide
    switches: Mapping[str, Any] = REFUSED


def ran(line: str, *names: str, answers: Sequence[str] = (), before: str = "", out: str = GUIDE,
        **more: Any) -> Ran:
    """A run in which these apps fail, each with its progress line and its line at the end."""
    end = "".join(f"{name}: failed: {UNREGISTERED}\n" for name in names)
    steps = "".join(f"[{place}/{len(names)}] {name}: {UNREGISTERED}\n"
                    for place, name in enumerate(names, 1))
    err = "" if "-q" in line else steps
    return Ran(line, 1, f"{GUIDE}{MENU}…\n{out}\n{end}" if answers else f"{out}\n{end}",
               before + err, names, answers, **more)


RUNS = [
    ran("--mode INVALID_ONLY", *RENEWED), ran("--mode all", *APPS),
    ran("--mode partial --apis ,websocket2, PRIMARY,Websocket2 ,", "PRIMARY", "WEBSOCKET2"),
    ran("--mode PARTIAL --apis websocket2 primary", "PRIMARY", "WEBSOCKET2"),
    ran("--mode INVALID_ONLY -q", *RENEWED),
    ran("--mode INVALID_ONLY", "WEBSOCKET3", "OPTIONCHAIN2", out=HALF_UNKNOWN,
        before=NO_VERDICT.format(", ".join(ASKED)), switches=REFUSED | {"profile_answer": "429"}),
    *(Ran(f"--mode INVALID_ONLY{quiet}", 1, ALL_UNKNOWN, NO_VERDICT.format(", ".join(APPS)),
          seed=World.seed_valid, switches={"profile_answer": "503"}) for quiet in ("", " -q")),
    Ran("--mode INVALID_ONLY", 0, ALL_VALID, seed=World.seed_valid),
    # the menu
    ran("", *APPS, answers=["1"]), ran("", *RENEWED, answers=[" 2 "]),
    ran("", "WEBSOCKET2", "WEBSOCKET3", answers=["3", "websocket2, 4,WEBSOCKET2 ,3"]),
    ran("", "PRIMARY", "WEBSOCKET2", "WEBSOCKET3", answers=["3", "websocket2 4  primary"]),
    ran("", "PRIMARY", "WEBSOCKET1", answers=["3", "2 1"]),
    ran("", *RENEWED, answers=["", "5", "yes", "-1", "\u0661", "1 2", "12", "2"]),
    ran("", "WEBSOCKET1", answers=[
        "3", "", ",", "0", "7", "FOO", "PRIMARY,FOO", "1.5", "-1", "\u0661", "2"]),
    *(Ran("", 1, f"{GUIDE}{MENU}…{ABORTED}", answers=answers)
      for answers in (["Q"], [" 4 "], [], ["3"], ["3", "FOO"], ["3", "Q", "1"])),
    Ran("", 0, f"{ALL_VALID}{MENU}{ABORTED}", answers=["4"], seed=World.seed_valid),
    # numbers count the configured apps
    Ran("", 1, "…1. PRIMARY\n2 is not one of PRIMARY.\nWEBSOCKET1 is not one of PRIMARY.\n…",
        f"[1/1] PRIMARY: {UNREGISTERED}\n", ["PRIMARY"], ["3", "2", "WEBSOCKET1", "1"],
        switches=REFUSED | {"apps": 1}),
    # no code is sent from a clock that is more than 20 s off
    *(Ran("--mode PARTIAL --apis PRIMARY", 1, f"{GUIDE}\nPRIMARY: not tried: {OFF.format(words)}\n",
          f"[1/1] PRIMARY: {OFF.format(words)}\n", ["PRIMARY"], switches={"clock_offset": offset})
      for offset, words in ((22, "22 s behind"), (-22, "22 s ahead of"), (44, "44 s behind")))]


class RunTest(Case):
    def test_runs(self) -> None:
        def work(row: Ran) -> None:
            with World(moment=NOON, **row.switches) as world:
                row.seed(world)
                tokens = world.tokens()
                argv = row.line.split(None, 3 if "--apis" in row.line else -1)
                done = world.call(*argv, answers=row.answers)
                self.assertRegex(done.out, rf"\A{re.escape(row.out)}\Z".replace("…", "(?s:.*)"))
                self.assertEqual((done.code, done.err), (row.code, row.err))
                self.assertCountEqual(world.broker.details("dialog"), row.asked)
                self.assertEqual((*world.sent(), world.browsers()), (0, 0, 0, 0))
                self.assertEqual(world.tokens(), tokens)
        self.table(work, RUNS, workers=4)

    def test_what_a_run_leaves(self) -> None:
        """A refused token is inactive, each attempt has its row, and nothing else has changed."""
        world = self.world(moment=NOON, **REFUSED)
        world.seed_guide()
        rows = {row["api_name"]: row for row in world.rows()}
        report = json.loads(world.call("--mode", "INVALID_ONLY", "--json").out)
        self.assertEqual((report["valid"], report["exitCode"], report["results"]), (
            ["PRIMARY", "WEBSOCKET1", "OPTIONCHAIN1"], 1,
            [{"apiName": name, "state": "FAILED", "message": UNREGISTERED} for name in RENEWED]))
        rows["WEBSOCKET2"] |= {"is_active": 0, "updated_at": int(NOON * 1000)}
        self.assertEqual({row["api_name"]: row for row in world.rows()}, rows)
        audit = world.audit_rows()
        self.assertEqual(len({row.pop("run_id") for row in audit}), 1)
        self.assertEqual(audit, [
            {"id": place, "at": int(NOON * 1000), "api_name": name, "source": "CLI",
             "flow": "SELENIUM", "outcome": "FAILED", "reason": UNREGISTERED, "credentials": None,
             "number": None, "user_id": None} for place, name in enumerate(RENEWED, 1)])
        self.assertEqual(label(world.call("--status").out, "WEBSOCKET2"), "INVALID (inactive)")
        world.call(answers=["3", "1"])
        self.assertEqual(world.audit_rows()[-1]["source"], "MENU")

    def test_a_row_replaced_meanwhile_stays_active(self) -> None:
        """Another program stores a new token while the broker judges the old one."""
        world = self.world(**REFUSED)
        world.broker.acts["profile"] = lambda _: world.sql(
            "UPDATE upstox_tokens SET access_token = 'new', updated_at = 7")
        world.seed_guide()
        self.assertEqual(world.call("--mode", "INVALID_ONLY").out[:len(GUIDE)], GUIDE)
        self.assertEqual({(row["is_active"], row["updated_at"]) for row in world.rows()}, {(1, 7)})

    def test_statuses_are_read_again_under_the_lock(self) -> None:
        """Another run stored the missing tokens while the operator was reading the summary."""
        def answers() -> Iterator[str]:
            world.seed_valid()
            yield "2"

        world = self.world(moment=NOON, **REFUSED)
        done = world.call(answers=answers())
        self.assertEqual((done.code, world.broker.count("dialog")), (0, 0))
        self.assertTrue(done.out.endswith(ALL_VALID), done.out)

    def test_quiet_when_all_is_well(self) -> None:
        """Nothing at all, whatever there would be to tell."""
        world = self.world(notifier_url=NOTIFIER)
        world.seed_valid()
        world.sql("INSERT INTO upstox_tokens (api_name) VALUES ('LEGACY')")
        self.assertEqual(world.call("--mode", "INVALID_ONLY"), (
            0, ALL_VALID, "Rows of unknown names are left untouched: LEGACY\n"))
        self.assertEqual(world.call("--check", "--flow", "V3", "-q"), (0, "", ""))
        remember(world, "PIN_SENT")  # a hold
        for argv in (["--status"], ["--mode", "INVALID_ONLY"], ["--import-config"]):
            with self.subTest(argv):
                self.assertEqual(world.call(*argv, "-q"), (0, "", ""))
        self.assertTrue(world.call("-q", answers=["q"]).out.startswith(ALL_VALID))  # to be answered
        for flow, answers in (("SELENIUM", ["2"]), ("V3", ["3", "1"])):
            world.call("--flow", flow, "--wait", "0.001", answers=answers)
            self.assertEqual(len(world.prompts), len(answers), world.prompts)

    @unittest.skipIf(sys.platform == "win32", "no such signals")
    def test_signals(self) -> None:
        """Stopped while it waits for the broker, six calls side by side: a look, and a run, whose
        lock is free then. What the caller ignores (nohup) does not stop it.
        """
        def work(row: tuple[tuple[str, str], Sequence[int]]) -> None:
            (route, line), signums = row  # the last one ends it, those before are ignored
            with World(**{f"{route}_delay": 60}) as world:
                world.seed_valid()
                tokens, process = world.tokens(), world.start(*line.split(), preexec_fn=lambda: [
                    signal.signal(signum, signal.SIG_IGN) for signum in signums[:-1]])
                world.until(lambda: world.broker.count(route) == 6, 9)
                for signum in signums:
                    process.send_signal(signum)
                self.assertEqual(world.finish(process), (
                    128 + signums[-1], "", "Stopped. Tokens generated so far are kept.\n"))
                world.broker.switches = Switches(**REFUSED)
                self.assertEqual((world.call("--mode", "ALL").code, world.tokens()), (1, tokens))

        self.table(work, itertools.product(
            (("profile", "--status"), ("dialog", "--mode ALL")),
            ([signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGTERM])), workers=2)


# ==== Configuration ===============================================================================

NAMES = "must be one of PRIMARY, WEBSOCKET1, WEBSOCKET2, WEBSOCKET3, OPTIONCHAIN1, OPTIONCHAIN2"
PLAIN = "must be printable characters without spaces, at most 255"
UNSET = "is not set"
SPELLED = "must be the http or https URL registered with the apps, spelled as a browser shows it"
VALUES: dict[str, tuple[str, list[str], list[str]]] = {  # key: what is said, of these, not of those
    "UPSTOX_MOBILE_NUMBER": (
        "must be 10 digits beginning 6-9, without +91",
        ["5812047365", "981204736", "98120473651", "+919812047365", "\uff19812047365"], []),
    "UPSTOX_PIN": ("must be 6 digits", ["74921", "7492167", "74921a", "7492\u0661\u0662"], []),
    "UPSTOX_TOTP": (
        "must be the base32 secret shown when TOTP was switched on, not a code; at least 112 bits "
        "(23 characters)",
        ["749216", "not base32 at all 1890", TOTP_SECRET[:16], TOTP_SECRET[:-1] + "!"],
        [TOTP_SECRET.lower(), "  ".join(re.findall("....", TOTP_SECRET))]),
    "UPSTOX_REDIRECT_URI": (
        SPELLED,
        ["localhost:28020/callback", "ftp://localhost/", "http://", "http://:80/", "http://a:x/",
         "http://a:0/", *(f"http://{place}" for place in (
             "127.1/cb", "127.0.0.01/", "2130706433/", "localhost.0x7f/", "[0::1]/", "%6cocalhost/",
             "[::ffff:127.0.0.1]/", "localhost./", "a/b/../c", "a/b/.", "a/%2E%2e/c",
             "a\\b", "a/b#c", "a/b#"))],
        ["https://example.com", "http://localhost:28020/cb?x=1", "http://[::1]:9/x",
         "http://127.0.0.1", "http://3dprinter:8080/", "http://b.1a/",
         "https://A-b_c.Example.com:8443/.well-known/x.y/..z?a=../b"]),
    "UPSTOX_NOTIFIER_WEBHOOK_URI": (
        "must be the http or https URL registered with the apps and have a path of its own",
        ["my.host/hook", "https://my.host", "https://my.host/", "https://my.host/healthz",
         "https://my.host" + STATUS], ["https://my.host/hook"]),
    "UPSTOX_BASE_URL": (
        "must be https on upstox.com or a name under it, or http(s) on this machine, without a "
        "path: tokens and client secrets are sent there",
        ["https://api.upstox.com.evil.example", "https://notupstox.com", "http://api.upstox.com",
         "http://login.upst0x.localhost", "https://upstox.com:x", "https://upstox.com@evil.example",
         "https://evil.example?.upstox.com", "https://evil.example\\.upstox.com", "api.upstox.com",
         "https://api.upstox.com/v2", "https://api.upstox.com?x=1", "http://127.0.0.1.example.com",
         "http://127.0.0.1@example.com", "http://128.0.0.1", "http://127.0.0.256", "http://[::2]",
         "ftp://127.0.0.1", "http://localhost.example.com"],
        ["https://upstox.com", "https://API.Upstox.com/", "http://[::1]:9", "https://127.9.9.9",
         "http://localhost:8080/"]),
    "UPSTOX_CONFIG_SOURCE": ("must be ENV or DB", ["FILE", "db"], ["ENV", "DB"]),
    "UPSTOX_SERVE_KEY": ("must have 16 characters or more, without spaces",
                         ["fifteen-letters", "sixteen letters!"], ["sixteen-letters!", ""]),
    "UPSTOX_ALLOWED_ORIGINS": (
        "must be origins such as http://localhost:5173, comma separated",
        ["localhost", "http://localhost:5173,*", "https://example.com/x", "http://a:x"],
        ["http://localhost:5173, https://app.example.com/", "https://app.example.com:443"]),
    "UPSTOX_API_NAME_5": (NAMES, ["WEBSOCKET4", "optionchain2"], []),
    "UPSTOX_CLIENT_ID_5": (PLAIN, ["two words", "\u00e9", "x" * 256], ["x" * 255]),
    "UPSTOX_CLIENT_SECRET_5": (PLAIN, ["two words"], ["a#b=c$HOME\\n"]),
}
LINES: dict[str, str | None] = {  # a line of an env file, and the value; None: no KEY=value
    **dict.fromkeys(("K=a", "export K=a", "export   K='a'", 'K="a"', "  K=a  ", "K=a # x",
                     "K='a' # x", "K=a\t#"), "a"),
    "K=a#b=c": "a#b=c", "K='a#b'": "a#b", "K=\"a'b\"": "a'b", "K='a\"b'": 'a"b', "K=$HOME": "$HOME",
    "K=a\\nb": "a\\nb", "K='a\\b'": "a\\b", "K=\u00fc": "\u00fc",
    **dict.fromkeys(('K=""', "K=''", "K=", 'K="" # none'), ""),
    **dict.fromkeys(("K a", "=a", 'K="a', "K='a' x", "export", "1X=a", "K-K=a", "K: a", "a",
                     "<b>a</b>", "K K=a", "K=a\0", "$K=a", 'K="a"b"'))}


def keys_of(index: int, value: str | None = None) -> dict[str, str | None]:
    """The three settings of one app."""
    return {f"UPSTOX_{kind}_{index}": value for kind in ("CLIENT_ID", "CLIENT_SECRET", "API_NAME")}


NO_APPS: dict[str, str | None] = {key: None for index in range(6) for key in keys_of(index)}
APP_RULES: list[tuple[dict[str, str | None], list[str]]] = [  # changes of six apps; what is said
    ({"UPSTOX_CLIENT_ID_2": None}, [f"UPSTOX_CLIENT_ID_2: {UNSET}"]),
    ({"UPSTOX_CLIENT_SECRET_0": '""'}, [f"UPSTOX_CLIENT_SECRET_0: {UNSET}"]),
    ({"UPSTOX_API_NAME_5": ""}, [f"UPSTOX_API_NAME_5: {UNSET}"]),
    ({"UPSTOX_API_NAME_4": "PRIMARY"}, ["UPSTOX_API_NAME_4: is used by two apps"]),
    ({"UPSTOX_CLIENT_ID_4": APPS["PRIMARY"][0]}, ["UPSTOX_CLIENT_ID_4: is used by two apps"]),
    (keys_of(1), ["UPSTOX_CLIENT_ID_1: is not set; apps are numbered from 0 without a gap"]),
    (keys_of(6, "x"), ["UPSTOX_CLIENT_ID_6: at most six apps, numbered 0 to 5",
                       f"UPSTOX_API_NAME_6: {NAMES}"]),
    (keys_of(1) | dict.fromkeys(("UPSTOX_CLIENT_SECRET_6", "UPSTOX_CLIENT_SECRET_7"), "x"), [
        *(f"UPSTOX_CLIENT_ID_{index}: at most six apps, numbered 0 to 5" for index in (6, 7)),
        "UPSTOX_CLIENT_ID_1: is not set; apps are numbered from 0 without a gap",
        *(f"UPSTOX_{kind}_{index}: {UNSET}" for index in (6, 7)
          for kind in ("API_NAME", "CLIENT_ID"))]),
    (NO_APPS, ["UPSTOX_CLIENT_ID_0: is not set; at least one app is needed"])]


class ConfigTest(Case):
    """All problems are told at once, one line each, with exit 2 and nothing touched.

    --import-config checks every value and asks nobody: a rule that is broken fails at once here,
    instead of running into a login.
    """

    def refuse(self, world: World, *lines: str, argv: Iterable[Any] = ("--import-config",)) -> None:
        before, asked = world.snapshot(), len(world.broker.requests)
        said = "".join(f"error: {line}\n" for line in lines)
        self.assertEqual(world.call(*argv, answers=["1"]), (2, "", said))
        self.assertEqual((world.snapshot(), len(world.broker.requests)), (before, asked))

    def test_values(self) -> None:
        world = self.world()

        def work(row: tuple[dict[str, str | None], list[str]]) -> None:
            changes, lines = row
            world.write_env(**changes)
            world.db.unlink(missing_ok=True)
            if lines:
                return self.refuse(world, *lines)
            self.assertEqual((world.call("--import-config").code, world.db.exists()), (0, True))
        self.table(work, APP_RULES + [({key: value}, [f"{key}: {problem}"] * (value in wrong))
                                      for key, (problem, wrong, right) in VALUES.items()
                                      for value in wrong + right])

    def test_what_each_command_needs(self) -> None:
        """A key that is missing stops exactly the commands that need it."""
        def work(row: tuple[str, str]) -> None:
            flow, key = row
            world = self.world(env={"UPSTOX_NOTIFIER_WEBHOOK_URI": NOTIFIER, key: None})
            world.seed_valid()
            for argv in (["--mode", "INVALID_ONLY"], ["--check"]):
                self.refuse(world, f"{key}: is not set; flow {flow} needs it",
                            argv=[*argv, "--flow", flow])
            self.assertEqual(world.call("--status").code, 0)
            menu = world.call("--flow", flow, answers=["4"])
            self.assertEqual((menu.code, menu.err), (2, f"error: {key}: is not set\n")
                             if "REDIRECT" in key else (0, ""))
            done = world.call("--flow", flow, answers=["1"])
            self.assertEqual((done.code, done.err.count(key)), (2, 1))
            self.assertEqual(world.broker.count("dialog"), 0)

        self.table(work, [("V3", "UPSTOX_NOTIFIER_WEBHOOK_URI"), ("V3", "UPSTOX_REDIRECT_URI"), *(
            ("SELENIUM", f"UPSTOX_{key}")
            for key in ("MOBILE_NUMBER", "PIN", "TOTP", "REDIRECT_URI"))])

    def test_all_problems_at_once(self) -> None:
        world = self.world(env={
            "UPSTOX_PIN": "12", "UPSTOX_TOTP": None, "UPSTOX_REDIRECT_URI": "nowhere",
            "UPSTOX_API_NAME_1": "OTHER", "UPSTOX_CLIENT_SECRET_2": None})
        path = world.folder / ".env"
        path.write_text(f"UPSTOX_PIN 5566123\n{path.read_text()}UPSTOX_SERVE_KEY short")
        last = path.read_text().count("\n") + 1
        self.refuse(world, *(f"{path}, line {line}: expected KEY=value" for line in (1, last)),
                    "UPSTOX_TOTP: is not set; flow SELENIUM needs it",
                    f"UPSTOX_PIN: {VALUES['UPSTOX_PIN'][0]}",
                    f"UPSTOX_REDIRECT_URI: {VALUES['UPSTOX_REDIRECT_URI'][0]}",
                    f"UPSTOX_API_NAME_1: {NAMES}", f"UPSTOX_CLIENT_SECRET_2: {UNSET}",
                    argv=["--mode", "ALL"])

    def test_lines_of_an_env_file(self) -> None:
        for line, value in LINES.items():
            bad = ({}, ["f, line 2: expected KEY=value"])
            for text in (f"# one\r\n{line}\r\n\r\n  # x", f"\ufeff\n{line}"):
                with self.subTest(text):
                    self.assertEqual(upstox_tokens.parse_env(text, "f"),
                                     bad if value is None else ({"K": value}, []))

    def test_which_files(self) -> None:
        """Env file and database: the named one, else the one here, else beside the script; else a
        new database here. The environment wins over every env file.
        """
        world = self.world()
        own, beside = world.folder / ".env", world.folder / "bin"
        program, text, settings = shutil.copy(PROGRAM, beside), own.read_text(), world.exported()
        for path, count in ((world.folder / "named", 4), (own, 3), (beside / ".env", 2)):
            path.touch(mode=0o600)
            path.write_text(re.sub(rf"(?m)^\w+_[{count}-9]=.*\n", "", text))

        def used(*argv: str, **env: str) -> tuple[int, str]:
            """How many apps the env file has, and the database."""
            done = world.process("--status", "-v", *argv, program=program, env=env)
            header = done.out.partition("\n")[0].removeprefix("Token Status Summary: ")
            return done.out.count(": NOT FOUND\n"), header

        self.assertEqual(used(), (3, str(world.db)))
        sqlite3.connect(beside / world.db.name).close()
        self.assertEqual(used("--env-file", "named"), (4, str(beside / world.db.name)))
        sqlite3.connect(world.db).close()
        self.assertEqual(used("--db", "named.db"), (3, str(world.folder / "named.db")))
        self.assertEqual(used(UPSTOX_API_NAME_0="FOO"), (0, ""))
        own.unlink()
        own.mkdir()  # a folder of that name, as virtual environments have it, is no env file
        self.assertEqual(used(), (2, str(world.db)))
        beside.joinpath(".env").unlink()
        self.assertEqual(used(**settings), (6, str(world.db)))
        self.assertEqual(world.process("--status", program=program), (2, "", (
            f"error: No UPSTOX_ setting was found, neither in the environment nor in {own} and "
            f"{beside / '.env'}. Copy env.sample to .env and fill it in; it explains the keys.\n"
            "error: UPSTOX_CLIENT_ID_0: is not set; at least one app is needed\n")))
        (world.folder / "named").write_text("# nothing yet\n")
        self.assertIn(f"environment nor in {world.folder / 'named'}. Copy",
                      world.call("--status", "--env-file", world.folder / "named").err)

    def test_folder_that_may_not_be_searched(self) -> None:
        """As for `sudo -u` in the home of root: there is no env file, others may hold settings."""
        world, out, err, before = self.world(), io.StringIO(), io.StringIO(), os.getcwd()
        settings, closed = world.exported(), world.folder / "closed"
        closed.mkdir()
        self.addCleanup(os.chdir, before)
        os.chdir(closed)
        closed.chmod(0)
        with unprivileged(world.folder):
            code = upstox_tokens.main(["--status", "--db", str(world.db)], out=out, err=err,
                                      environ=world.environ(settings))
            unnamed = upstox_tokens.main(["--status"], out=out, err=err,
                                         environ=world.environ(settings))
        none = summary(**dict.fromkeys(APPS, "NOT FOUND"))
        self.assertEqual((code, unnamed, out.getvalue(), err.getvalue()), (1, 2, none, (
            f"error: The database {closed / 'vega_trade.db'} cannot be used: Permission denied. "
            "Name a file with --db.\n")))

    def test_env_file_that_cannot_be_used(self) -> None:
        world = self.world()
        path = world.write_env(b"# one\n\nUPSTOX_PIN=5566123\xff\n")
        self.refuse(world, f"{path}, line 3: not UTF-8 text")
        world.write_env()
        for path, reason in ((world.folder / "missing", "No such file or directory"),
                             (world.folder, "Is a directory")):
            self.refuse(world, f"The env file {path} cannot be read: {reason}.",
                        argv=["--status", "--env-file", path])
        path = world.write_env("oops\n")
        self.refuse(world, f"{path}, line 1: expected KEY=value", "UPSTOX_REDIRECT_URI: is not set",
                    "UPSTOX_CLIENT_ID_0: is not set; at least one app is needed")
        world.write_env()
        path = world.folder.joinpath(".env").rename(world.folder / "my env's file")
        for mode in (0o640, 0o604):
            path.chmod(mode)
            self.refuse(
                world,
                f"{path} may be read by other users. Run: chmod 600 {shlex.quote(str(path))}",
                "Where chmod has no effect (a Windows drive under WSL), keep the file elsewhere "
                "and name it with --env-file, or use real environment variables.",
                argv=["--status", "--env-file", path])
        for mode in (0o600, 0o400):
            path.chmod(mode)
            self.assertEqual(world.call("--status", "--env-file", path).code, 1)


CONFIGS_DDL = """CREATE TABLE upstox_api_configs (
    api_index INTEGER PRIMARY KEY, api_name VARCHAR(50) UNIQUE NOT NULL,
    client_id VARCHAR(255) NOT NULL, client_secret VARCHAR(255) NOT NULL,
    redirect_uri VARCHAR(255), is_primary BOOLEAN DEFAULT 0, is_enabled BOOLEAN DEFAULT 1,
    created_at BIGINT, updated_at BIGINT )"""
UPDATE = "UPDATE upstox_api_configs SET "
NONE_ENABLED = "upstox_api_configs: no row is enabled. Fill the table with --import-config."
NO_REDIRECT = {"UPSTOX_REDIRECT_URI": None}
BUT_ONE = summary(**{name: "VALID" for name in APPS if name != "WEBSOCKET2"})


def stored(script: str, index: int, key: str, problem: str) -> tuple[str, str]:
    """What is wrong after a script with one row, and what is said."""
    said = f"upstox_api_configs, api_index {index}, {key}: {problem}"
    return script if ";" in script else f"{UPDATE}{script} WHERE api_index = {index}", said


INSERT = ("INSERT INTO upstox_api_configs "
          "(api_index, api_name, client_id, client_secret, is_enabled) ")
STORED_RULES: list[Any] = [  # script; what is said, or the summary; settings
    ("", ALL_VALID), *((f"{UPDATE}is_enabled = {value} WHERE api_index = 2", BUT_ONE)
                       for value in ("0", "'false'", "NULL")),
    stored("api_name = 'OTHER'", 3, "API_NAME", NAMES),
    stored(f"client_id = '{APPS['PRIMARY'][0]}'", 2, "CLIENT_ID", "is used by two apps"),
    stored("client_secret = ''", 1, "CLIENT_SECRET", UNSET),
    stored("redirect_uri = 'nowhere'", 1, "REDIRECT_URI",
           SPELLED),
    stored(UPDATE + "api_index = 6 WHERE api_index = 5;", 6, "CLIENT_ID",
           "at most six apps, numbered 0 to 5"),
    stored(UPDATE + "api_index = -1 WHERE api_index = 5;", -1, "CLIENT_ID",
           "at most six apps, numbered 0 to 5"),
    stored("DELETE FROM upstox_api_configs WHERE api_index = 2;", 2, "CLIENT_ID",
           "is not set; apps are numbered from 0 without a gap"),
    (INSERT + "VALUES (7, 'OTHER', '', '', 0)", ALL_VALID),
    (UPDATE + "is_enabled = 'true'", ALL_VALID), (UPDATE + "is_enabled = 0", NONE_ENABLED),
    ("DELETE FROM upstox_api_configs", NONE_ENABLED),
    ("DROP TABLE upstox_api_configs", f"UPSTOX_PIN: must be 6 digits\nerror: {NONE_ENABLED}",
     {"UPSTOX_PIN": "12"}),
    # a NULL redirect URI falls back to the setting, which is needed for nothing else
    ("", "UPSTOX_REDIRECT_URI: is not set; flow SELENIUM needs it", NO_REDIRECT),
    (UPDATE + "redirect_uri = 'https://a.example/cb'", ALL_VALID, NO_REDIRECT),
    (UPDATE + "redirect_uri = 'https://a.example/cb'",
     "UPSTOX_PIN: is not set; flow SELENIUM needs it", NO_REDIRECT | {"UPSTOX_PIN": None})]


class StoredConfigTest(Case):
    """UPSTOX_CONFIG_SOURCE=DB and --import-config."""

    def test_rules(self) -> None:
        """Six apps in the table and none in the environment, then the script."""
        values = ", ".join(f"({index}, '{name}', '{client_id}', '{secret}', 1)"
                           for index, (name, (client_id, secret)) in enumerate(APPS.items()))

        def work(row: tuple[Any, ...]) -> None:
            script, said, *settings = row
            env = NO_APPS | {"UPSTOX_CONFIG_SOURCE": "DB"} | dict(*settings)
            with World(env=env) as world:
                world.sql(f"{CONFIGS_DDL}; {INSERT} VALUES {values}; {script}")
                world.seed_valid()
                self.assertEqual(world.call("--mode", "INVALID_ONLY"), (0, said, "")
                                 if said.endswith("\n") else (2, "", f"error: {said}\n"))
        self.table(work, STORED_RULES, workers=4)

    def test_import(self) -> None:
        """Twice the same: the environment's apps, whatever the source; a new file is 0600."""
        world = self.world(moment=NOON, env={"UPSTOX_CONFIG_SOURCE": "DB",
                                             "UPSTOX_CLIENT_SECRET_5": "'a#\"b'"})
        world.names.reverse()
        world.write_env()
        copied = (f"Copied {', '.join(world.names)} into upstox_api_configs of {world.db}. Set "
                  "UPSTOX_CONFIG_SOURCE=DB to use them.\n")
        for told in (f"created the database {world.db}\n", ""):
            if not told:
                world.sql(UPDATE + "api_index = 9 WHERE api_index = 5")
            self.assertEqual(world.call("--import-config"), (0, copied, told))
            self.assertEqual(world.rows(table="upstox_api_configs"), [
                {"api_index": index, "api_name": name, "client_id": client_id,
                 "client_secret": secret if index < 5 else 'a#"b', "redirect_uri": REDIRECT_URI,
                 "is_primary": int(name == "PRIMARY"), "is_enabled": 1,
                 "created_at": int(NOON * 1000), "updated_at": int(NOON * 1000)}
                for index, (name, (client_id, secret)) in enumerate(reversed(APPS.items()))])
        schema = world.rows("sql", "sqlite_master WHERE name = 'upstox_api_configs'")[0]["sql"]
        self.assertEqual((schema.split(), stat.S_IMODE(world.db.stat().st_mode)),
                         (CONFIGS_DDL.split(), 0o600))
        world.write_env(UPSTOX_CONFIG_SOURCE="DB", **NO_APPS)
        self.assertEqual(world.call("--status").out.count(": NOT FOUND\n"), 6)
        self.assertEqual((world.call("--import-config").code, world.broker.requests), (2, []))
        world.write_env(UPSTOX_CONFIG_SOURCE="DB", UPSTOX_NOTIFIER_WEBHOOK_URI=NOTIFIER,
                        UPSTOX_REDIRECT_URI="http://localhost/other", **NO_APPS)
        done = world.call("--check", "--flow", "V3")  # the table's own redirect URIs count
        self.assertEqual((done.code, [label(done.out, name) for name in APPS]), (0, ["ok"] * 6))


# ==== The database as others leave it =============================================================

LOCKED = "is locked by another program. Close what holds it, or try again in a minute."
NO_DATABASE = "is not a SQLite database. Name the right file with --db."
DAMAGED = "is damaged. Restore it from a backup, or rescue it with sqlite3's .recover."
NO_COLUMN = "lacks a column that is needed. Add it, or use another file."
NO_DEFAULT = "demands a value that this program does not give. Give that column a default."
IN_THE_WAY = "has a row in the way of a unique index. Remove that row."
VIEW = "has a view where a table is needed. Rename the view or use another file."
FULL = "cannot grow: the disk is full. Free some space."
OTHERWISE = "cannot be used."
COLUMNS = ", ".join(re.findall(r'"(\w+)" \w+', TOKENS_DDL)[1:])
KEYED = "DROP TABLE upstox_tokens; CREATE TABLE upstox_tokens (id integer PRIMARY KEY, {}); "
OTHER_NAME = "UPDATE upstox_tokens SET api_name = '{}' WHERE api_name = 'WEBSOCKET1'; "
UNIQUE = "CREATE UNIQUE INDEX i ON upstox_tokens ({})"
REJECT = "CREATE TRIGGER no BEFORE INSERT ON upstox_tokens BEGIN SELECT RAISE(ABORT, 'no'); END"
UNNOTED = ("CREATE TRIGGER no BEFORE INSERT ON upstox_token_audit WHEN NEW.outcome = '{}' "
           "BEGIN SELECT RAISE(ABORT, 'no more rows'); END")
UNWRITTEN = ("last_refreshed", "refresh_token", "purpose", "user_id")


def overwritten(start: int, data: bytes) -> Callable[[World], object]:
    """Damage the file."""
    def damage(world: World) -> None:
        content = world.db.read_bytes()
        world.db.write_bytes(content[:start] + data + content[start + len(data):])
    return damage


# a name for the table: the preparation, and why it is refused, if it is
DATABASES: dict[str, tuple[str | Callable[[World], object], str]] = {
    "other types": (KEYED.format(COLUMNS.replace("_at", "_at BLOB")), ""),
    "other order, and a column more": (KEYED.format(
        f"tenant DEFAULT 1 NOT NULL, {', '.join(reversed(COLUMNS.split(', ')))}"), ""),
    "NULLs": (KEYED.format(COLUMNS) + "INSERT INTO upstox_tokens (api_name) VALUES (NULL)", ""),
    **{f"unique {column}": (UNIQUE.format(column), "")
       for column in ("api_name", "access_token", "client_id", "api_index")},
    "unique name in any case": (
        OTHER_NAME.format("websocket1") + UNIQUE.format("api_name COLLATE NOCASE"), IN_THE_WAY),
    "unique, held by another": (OTHER_NAME.format("OLD") + UNIQUE.format("api_index"), IN_THE_WAY),
    "text": (lambda world: world.db.write_bytes(b"no database " * 500), NO_DATABASE),
    "damaged page": (overwritten(4096, b"\xff" * 4096), DAMAGED),
    "damaged schema": (overwritten(100, b"\xff" * 3000), DAMAGED),
    "a view": ("ALTER TABLE upstox_tokens RENAME TO t; "
               "CREATE VIEW upstox_tokens AS SELECT * FROM t", VIEW),
    "a NOT NULL column more": (KEYED.format(COLUMNS + ", review NOT NULL"), NO_DEFAULT),
    "an audit table that wants more": (
        "CREATE TABLE upstox_token_audit (at, run_id, api_name, source, flow, outcome, reason, "
        "tenant NOT NULL)", NO_DEFAULT),
    "CHECK": (KEYED.format(COLUMNS + ", CHECK (length(access_token) < 100)"), OTHERWISE),
    "trigger": (REJECT, OTHERWISE),
    "full": (REJECT.replace("'no'", "'database or disk is full'"), FULL),
    **{f"no {column}": (f"ALTER TABLE upstox_tokens DROP COLUMN {column}", NO_COLUMN)
       for column in COLUMNS.split(", ") if column not in UNWRITTEN}}


class DatabaseTest(Case):
    """A database takes a token, or one sentence says why not, before any login (exit 2)."""

    def refuse(self, world: World, why: str, *argv: Any) -> None:
        before, asked = world.snapshot(), world.broker.count("dialog")
        done = world.call(*(argv or ("--mode", "ALL")))
        self.assertRegex(done.err, r"\A(Rows of unknown names .*\n)?error: The database "
                         rf"{re.escape(f'{world.db} {why}')}( \(SQLite: .+\))?\n\Z")
        self.assertEqual((done.code, done.out, world.broker.count("dialog")), (2, "", asked))
        self.assertEqual(world.snapshot() | before, world.snapshot())

    def test_databases(self) -> None:
        def work(name: str) -> None:
            prepare, why = DATABASES[name]
            with World(**REFUSED) as world:
                world.seed_old()
                world.sql(prepare) if isinstance(prepare, str) else prepare(world)
                if why in (NO_DATABASE, DAMAGED):
                    self.refuse(world, why, "--status")
                if why:
                    return self.refuse(world, why)
                schema, rows = world.rows("sql", "sqlite_master"), world.rows()
                self.assertEqual(world.call("--mode", "ALL").code, 1)
                self.assertEqual((world.broker.count("dialog"), world.rows()), (6, rows))
                self.assertEqual(world.rows("sql", "sqlite_master")[:len(schema)], schema)
        self.table(work, DATABASES, workers=4)

    def test_created(self) -> None:
        """Where there is none: 0600 whatever the umask, with the guide's table; told once."""
        os.umask(0)
        step = f"[1/1] PRIMARY: {UNREGISTERED}\n"
        for name in ("a b#c%d?.db", "link.db"):
            world = self.world(apps=1, **REFUSED)
            world.db = world.folder / name
            if name == "link.db":
                world.db.symlink_to("target.db")
            told = f"created the database {world.db.resolve()}\n"
            self.assertEqual(world.call("--mode", "ALL").err, told + step)
            self.assertEqual(world.call("--mode", "ALL").err, step)
            schema = world.rows("sql", "sqlite_master WHERE name = 'upstox_tokens'")
            self.assertEqual((schema, world.rows()), ([{"sql": TOKENS_DDL}], []))
            for path in filter(Path.is_file, world.folder.iterdir()):
                self.assertFalse(path.stat().st_mode & 0o077, path)

    def test_others_are_left_alone(self) -> None:
        """The table is added to a file of others; its mode, tables and journal mode stay."""
        for mode, byte in (("DELETE", 1), ("WAL", 2)):
            world = self.world(**REFUSED)
            world.sql(f"PRAGMA journal_mode = {mode}; CREATE TABLE orders (id INTEGER); "
                      "INSERT INTO orders VALUES (7)")
            world.db.chmod(0o644)
            self.assertEqual(world.call("--mode", "ALL").code, 1)
            self.assertEqual(world.rows(table="orders"), [{"id": 7}])
            self.assertEqual(set(world.db.read_bytes()[18:20]), {byte})
            self.assertEqual(stat.S_IMODE(world.db.stat().st_mode), 0o644)

    def test_places(self) -> None:
        world = self.world()
        world.folder.joinpath("file").touch()
        world.folder.joinpath("dangling").symlink_to(world.folder / "gone" / "x.db")
        world.folder.joinpath("loop").symlink_to("loop")

        def work(row: tuple[tuple[str, str], str]) -> None:
            (place, why), line = row
            world.db = world.folder / place
            self.refuse(world, f"cannot be used: {why}. Name a file with --db.", *line.split())
            self.assertFalse(world.folder.joinpath("gone").exists())
        no_file, no_folder = "it is not a file", "its folder does not exist"
        places = [("bin", no_file), ("/dev/null", no_file), ("gone/x.db", no_folder),
                  ("file/x.db", no_folder), ("dangling", no_folder)]
        if sys.version_info < (3, 13):  # later ones find out when they write
            places.append(("loop", "it is a link to itself"))
        self.table(work, itertools.product(
            places, ("--mode ALL", "--status", "--import-config", "--check")))

    def test_locked(self) -> None:
        """Waited for, then told; a writer does not disturb those who only look."""
        def work(row: tuple[str, str, list[str], bool]) -> None:
            mode, begin, argv, given_back = row
            free = argv == ["--status"] and (mode == "WAL" or begin == "IMMEDIATE")
            with World(moment=NOON, **REFUSED) as world:
                world.sql(f"PRAGMA journal_mode = {mode}")
                world.seed_guide()
                world.lock(kind=begin)
                timer = threading.Timer(0.3, world.unlock)
                if given_back:
                    timer.start()
                if given_back or free:
                    self.assertEqual(world.call(*argv).out[:len(GUIDE)], GUIDE)
                else:
                    self.refuse(world, LOCKED, *argv)
                if given_back:
                    timer.join()

        with mock.patch.multiple(upstox_tokens, PROOF_SECONDS=1, READ_SECONDS=1):
            self.table(work, itertools.product(
                ("DELETE", "WAL"), ("IMMEDIATE", "EXCLUSIVE"), (["--mode", "ALL"], ["--status"]),
                (True, False)), workers=16)

    @unittest.skipUnless(hasattr(os, "seteuid"), "no such permissions")
    def test_permissions(self) -> None:
        """Looking needs no write permission; generating says what is missing."""
        for mode, folder_mode, said in (
                (0o400, 0o700, "The database {} cannot be written. Give this user write "),
                (0o600, 0o500, "The lock file {}.upstox-lock cannot be used: Permission denied. ")):
            with World(moment=NOON) as world:
                world.seed_guide()
                world.call("--status")  # what is imported late is imported now
                with unprivileged(world.folder):
                    world.db.chmod(mode)
                    world.folder.chmod(folder_mode)
                    self.assertEqual(world.call("--status"), (1, GUIDE, ""))
                    done = world.call("--mode", "ALL")
                    new = world.call("--import-config", "--db", world.folder / "new.db")
                    world.folder.chmod(0o700)
                    world.db.chmod(0)
                    closed = world.call("--status").err
            self.assertEqual((done.code, done.out, world.broker.count("dialog")), (2, "", 0))
            self.assertIn(f"error: {said.format(world.db)}", done.err)
            self.assertEqual((new.code, "new.db cannot be created: Permission denied." in new.err),
                             (2, True) if folder_mode == 0o500 else (0, False))
            self.assertIn(f"error: The database {world.db} cannot be opened. Check that ", closed)


# ==== What is remembered of the account, and the lock =============================================

AUDIT_DDL = """CREATE TABLE IF NOT EXISTS upstox_token_audit (
    id INTEGER PRIMARY KEY, at BIGINT NOT NULL, run_id VARCHAR(32) NOT NULL,
    api_name VARCHAR(50) NOT NULL, source VARCHAR(20) NOT NULL, flow VARCHAR(20) NOT NULL,
    outcome VARCHAR(20) NOT NULL, reason VARCHAR(1000){})"""
YOUNGER = ", credentials VARCHAR(64), number BIGINT, user_id VARCHAR(40)"  # than the first shape
UNTIL = ("No unattended login until PIN, TOTP secret or mobile number in the configuration "
         "changes, or an operator goes ahead from the menu.")
NOTED = "the broker refused the PIN (1017089)"


def credentials(pin: str = PIN) -> str:
    """Whose memory a row is; nobody finds the PIN in it without the TOTP secret."""
    return hmac.new(TOTP_SECRET.encode(), f"{MOBILE}:{pin}".encode(), "sha256").hexdigest()


def remember(world: World, events: str, who: str | None = None, reason: str | None = NOTED) -> None:
    """Rows that earlier runs left in the audit table: these outcomes, in this order."""
    world.sql(AUDIT_DDL.format(YOUNGER))
    with world.connection() as database:
        database.executemany(
            "INSERT INTO upstox_token_audit (at, run_id, api_name, source, flow, outcome, reason, "
            "credentials, number) VALUES (?, 'r', 'PRIMARY', 'CLI', 'SELENIUM', ?, ?, ?, ?)",
            [(int(world.now() - 3600 + place) * 1000, outcome, reason, who or credentials(), place)
             for place, outcome in enumerate(events.split())])


PIN_HOLD = "the last PIN that was sent did not lead to a login"
CODE_HOLD = "the broker did not take the last two TOTP codes that were sent"
PROVEN = "PIN_SENT PIN_TAKEN"
HOLDS = {  # what happened: the hold, if there is one
    "CODE_SENT CODE_SENT": CODE_HOLD, "CODE_SENT CODE_TAKEN CODE_SENT": "",
    "CODE_SENT CODE_TAKEN CODE_SENT CODE_SENT": CODE_HOLD, "CODE_SENT CODE_NOT_SENT CODE_SENT": "",
    "CODE_SENT CODE_NOT_SENT CODE_SENT CODE_SENT": CODE_HOLD,
    "PIN_SENT CODE_SENT CODE_TAKEN FAILED GENERATED REQUESTED REFUSED": PIN_HOLD,
    "PIN_SENT PIN_NOT_SENT": "", "PIN_SENT PIN_NOT_SENT PIN_SENT": PIN_HOLD,
    f"{PROVEN} PIN_SENT": "", f"{PROVEN} PIN_SENT PIN_SENT": PIN_HOLD,
    f"{PROVEN} HOLD FAILED GENERATED {PROVEN} CODE_SENT CODE_SENT PIN_SENT PIN_SENT": NOTED,
    "HOLD HOLD_LIFTED CODE_SENT": "",
    "PIN_SENT HOLD_LIFTED": "", "CODE_SENT CODE_SENT HOLD_LIFTED": "",
    f"{PROVEN} HOLD HOLD_LIFTED PIN_SENT": PIN_HOLD}  # it has to prove itself again


class HoldTest(Case):
    """What was sent and not taken holds unattended logins; what is let through ends at REFUSED."""

    def test_holds(self) -> None:
        def work(row: tuple[str, str]) -> None:
            events, hold = row
            with World(apps=2, moment=NOON, **REFUSED) as world:
                world.seed_valid()
                remember(world, events)
                before, told = world.snapshot(), f"Logins are on hold: {hold}.\n" if hold else ""
                done = world.call("--status", "--json")
                self.assertEqual((done.code, done.err, json.loads(done.out)["hold"]),
                                 (0, told, hold or None))
                self.assertEqual(world.snapshot(), before)
                self.assertEqual(world.call("--mode", "INVALID_ONLY").err, told)
                done = world.call("--mode", "PARTIAL", "--apis", "PRIMARY,WEBSOCKET1")
                if hold:
                    end = "".join(f"{name}: not tried: {hold}. {UNTIL}\n" for name in world.names)
                    self.assertEqual(done.out.split("\n\n")[-1], end)
                asked = world.broker.count("dialog")
                self.assertEqual((done.code, asked), (3, 0) if hold else (1, 2))
                self.assertEqual((*world.sent(), world.browsers()), (0, 0, 0, 0))
        self.table(work, HOLDS.items(), workers=4)

    def test_whose_memory_it_is(self) -> None:
        """Another PIN, secret or number is another account's memory, and wipes nobody's.

        What is remembered is read from the outcome, never out of words meant for people.
        """
        world = self.world(apps=1, moment=NOON, **REFUSED)
        world.seed_old()
        remember(world, "HOLD", reason=None)
        remember(world, "CODE_SENT CODE_SENT", credentials(pin="749217"))
        for changes, code in (
                ({}, 3), ({"UPSTOX_PIN": "749217"}, 3), ({"UPSTOX_PIN": "749218"}, 1),
                ({"UPSTOX_MOBILE_NUMBER": "9812047366"}, 1),
                ({"UPSTOX_TOTP": TOTP_SECRET[::-1]}, 1),
                ({"UPSTOX_TOTP": TOTP_SECRET.lower() + "  ="}, 3), ({}, 3)):
            with self.subTest(changes):
                self.assertEqual(world.call("--mode", "ALL", **changes).code, code)

    def test_operator_goes_ahead(self) -> None:
        """From the menu only, after being told why; nothing but yes is yes."""
        told = f"Logins are on hold: {NOTED}."
        for answers, code in (([], 3), ([""], 3), (["yep"], 3), ([" YES "], 1)):
            world = self.world(apps=1, moment=NOON, **REFUSED)
            world.seed_valid(access_token="refused")
            remember(world, f"{PROVEN} HOLD")
            done = world.call(answers=["1", *answers])
            self.assertEqual(world.prompts[1:], [
                f"{told} Is it mended, and may the login go ahead? [y/N] "])
            self.assertEqual((done.code, ABORTED in done.out), (code, False), done.out)
            self.assertIn(f"{told}\n", done.err)
            self.assertEqual((len(world.audit("HOLD_LIFTED")), world.broker.count("dialog")),
                             (code == 1, code == 1))
            self.assertEqual(world.call("--mode", "ALL").code, code)
        world = self.world(apps=1, moment=NOON, **REFUSED)
        remember(world, "HOLD")
        world.sql(UNNOTED.format("HOLD_LIFTED"))
        done = world.call(answers=["1", "y"])  # which cannot be noted
        self.assertEqual((done.code, world.broker.count("dialog")), (2, 0), done.out)

    def test_another_hold_meanwhile(self) -> None:
        """The operator goes ahead only from the one that he was told."""
        def answers() -> Iterator[str]:
            yield "1"
            remember(world, event, reason="another")
            yield "y"

        world = self.world(apps=1, moment=NOON, **REFUSED)
        remember(world, "HOLD")
        for event, code in (("HOLD", 3), ("HOLD_LIFTED", 1)):
            self.assertEqual(world.call(answers=answers()).code, code)
            self.assertEqual(len(world.audit("HOLD_LIFTED")), event == "HOLD_LIFTED")

    def test_flow_v3_goes_on(self) -> None:
        """A hold is about PINs and codes; it is told all the same."""
        world = self.world(apps=1, moment=NOON, notifier_url=NOTIFIER, v3_answer="1155")
        remember(world, "HOLD")
        done = world.call("--mode", "ALL", "--flow", "V3", "--serve", "127.0.0.1:0")
        self.assertEqual((done.code, world.broker.count("v3")), (1, 1))
        self.assertIn(f"Logins are on hold: {NOTED}.\n", done.err)

    def test_database_that_is_lost_meanwhile(self) -> None:
        """What the run did is told all the same."""
        world = self.world(apps=1, moment=NOON)
        world.seed_valid()
        world.broker.acts["profile"] = lambda _: world.db.write_bytes(b"no database" * 99)
        self.assertEqual(world.call("--mode", "INVALID_ONLY"), (0, summary(PRIMARY="VALID"), ""))
        world = self.world(apps=1, moment=NOON, **REFUSED)
        world.seed_old()
        world.broker.acts["dialog"] = lambda _: world.db.write_bytes(b"no database" * 99)
        done = world.call("--mode", "ALL", "--json")
        self.assertEqual((done.code, json.loads(done.out)), (1, {"exitCode": 1, "results": [
            {"apiName": "PRIMARY", "state": "FAILED", "message": UNREGISTERED}]}))

    def test_last_attempt(self) -> None:
        """The newest ending of each app, whoever ran it; an older table is read and extended."""
        world = self.world(apps=3, moment=NOON, **REFUSED)
        at, columns = int(NOON * 1000), "(at, run_id, flow, api_name, source, outcome, reason)"
        world.sql(f"""{AUDIT_DDL.format("")}; INSERT INTO upstox_token_audit {columns} VALUES
            ({at - 9000}, 'r', 'SELENIUM', 'PRIMARY', 'CLI', 'GENERATED', NULL),
            ({at}, 'r', 'SELENIUM', 'PRIMARY', 'MENU', 'FAILED', 'no luck.'),
            ({at - 9000}, 'r', 'SELENIUM', 'WEBSOCKET1', 'CLI', 'FAILED', 'x'),
            ({at}, 'r', 'V3', 'WEBSOCKET1', 'WEBHOOK', 'GENERATED', NULL),
            ({at + 9000}, 'r', 'SELENIUM', 'PRIMARY', 'REST', 'PIN_SENT', NULL)""")
        before, audit = world.snapshot(), world.audit_rows()
        report = json.loads(world.call("--status", "--json").out)
        self.assertEqual((report["hold"], world.snapshot()), (None, before))
        expected = [("MENU", "FAILED", "no luck."), ("WEBHOOK", "GENERATED", None)]
        self.assertEqual([token["lastAttempt"] for token in report["tokens"]], [
            *(dict(zip(("at", "source", "outcome", "reason"), (local_text(NOON), *ending)))
              for ending in expected), None])
        self.assertEqual(world.call("--mode", "ALL").code, 1)
        younger = dict.fromkeys(("credentials", "number", "user_id"))
        self.assertEqual(world.audit_rows()[:5], [row | younger for row in audit])
        self.assertEqual([name for name, _ in world.audit()[5:]], world.names)

    def test_lock(self) -> None:
        """One generating run per database file, by whatever path; gone when its process dies."""
        world = self.world(dialog_delay=60)
        world.seed_guide()
        holder = world.start("--mode", "INVALID_ONLY")
        world.until(lambda: world.broker.count("dialog") == 3)
        world.broker.switches = Switches(**REFUSED)
        link, other = world.folder / "link.db", world.folder / "other.db"
        link.symlink_to(world.db)
        busy = ("error: Another run is busy generating tokens for this database. Try again when "
                "it has ended.\n")
        for argv in (["--mode", "ALL"], ["--mode", "ALL", "--db", link]):
            self.assertEqual(world.call(*argv), (4, "", busy))
        done = world.call(answers=["1"])
        self.assertEqual((done.code, done.err, world.broker.count("dialog")), (4, busy, 3))
        self.assertEqual(world.call("--status").code, 1)  # looking is free
        self.assertEqual(world.call("--mode", "ALL", "--db", other).code, 1)
        holder.kill()
        holder.wait()
        self.assertEqual(world.call("--mode", "ALL").code, 1)
        opened = {os.path.realpath(path) for path in Path("/proc/self/fd").glob("*")}
        self.assertNotIn(f"{world.db}.upstox-lock", opened)
        handle = upstox_tokens.lock_database(world.db)
        self.addCleanup(os.close, os.dup(handle))  # as a child that is just being forked has it
        upstox_tokens.unlock_database(handle)
        self.assertEqual(world.call("--mode", "ALL").code, 1)

    @unittest.skipIf(sys.platform == "win32", "fcntl is POSIX")
    def test_lock_that_cannot_be_had(self) -> None:
        """Not every error of a lock means that another run has it."""
        world = self.world(apps=1)
        with mock.patch("fcntl.flock", side_effect=OSError(errno.ENOLCK, "No locks available")):
            self.assertEqual(world.call("--mode", "ALL"), (
                2, "", f"error: The lock file {world.db}.upstox-lock cannot be used: No locks "
                       "available. Give this user write permission on it and on its folder, on a "
                       "disk of this machine.\n"))


# ==== Readiness, usage, surroundings ==============================================================


TIMELESS = "unknown, since the broker told no time; compare it by hand"


class ReadinessTest(Case):
    """--check as far as no browser is needed; it writes nothing and spends nothing."""

    flow = "V3"

    def check(self, world: World, **problems: str) -> None:
        """These lines tell a problem, all others are ok; a name of two words has an underscore."""
        looked_at = ("browser", "login page") if self.flow == "SELENIUM" else ()
        names = ("configuration", "env file", "database", *looked_at, "broker", "clock", "hold",
                 *world.names)
        lines = [f"{name:<14}: {problems.get(name.replace(' ', '_'), 'ok')}\n" for name in names]
        before = world.snapshot()
        done = world.call("--check", "--flow", self.flow)
        progress = done.err if self.flow == "SELENIUM" else ""
        self.assertEqual(done, (int(bool(problems)), "".join(lines), progress))
        self.assertEqual((world.snapshot(), world.sent()), (before, (0, 0, 0)))

    def test_lines(self) -> None:
        ready = functools.partial(self.world, 2, NOON, notifier_url=NOTIFIER)
        for offset in (20, -20):
            world = ready(clock_offset=offset)
            self.check(world)
            self.assertFalse(world.db.exists())
        self.check(ready(clock_offset=None), clock=TIMELESS)
        world.sql("CREATE TABLE orders (id)")
        self.check(world)
        world.seed_guide()
        self.check(world)
        self.check(ready(clock_offset=21), clock=OFF.format("21 s behind"))
        world = ready(by_app={"WEBSOCKET1": {"dialog_answer": "100068"}})
        self.check(world, WEBSOCKET1=UNREGISTERED)
        world.write_env(UPSTOX_REDIRECT_URI="http://localhost/other")
        self.check(world, PRIMARY=UNREGISTERED, WEBSOCKET1=UNREGISTERED)
        silent, (answer, words) = UNREACHABLE, V3_ERRORS[-1]
        self.check(ready(by_app={"PRIMARY": {"dialog_answer": answer},
                                 "WEBSOCKET1": {"dialog_answer": "reset"}}),
                   PRIMARY=words, WEBSOCKET1=silent)
        world.write_env(UPSTOX_BASE_URL=f"http://127.0.0.1:{free_port()}")
        self.check(world, broker=silent, PRIMARY=silent, WEBSOCKET1=silent, clock=TIMELESS)
        world = ready()
        world.db.write_text("no database " * 99)
        self.check(world, hold="unknown, since the database cannot be read", database=(
            f"The database {world.db} is not a SQLite database. Name the right file with --db. "
            "(SQLite: file is not a database)"))
        world = ready()
        world.seed_valid()
        lock = world.folder / "vega_trade.db.upstox-lock"
        lock.mkdir()
        self.check(world, database=f"The lock file {lock} cannot be used. Give this user write "
                                   "permission on it.")
        world = ready()
        with mock.patch("os.access", return_value=False):
            self.check(world, database=f"{world.folder} cannot be written. Name a file with --db.")
        world.seed_valid()
        remember(world, "HOLD")
        self.check(world, hold=f"logins are on hold: {NOTED}. Mend it, then go ahead from the menu")
        world.sql("DROP TABLE upstox_token_audit; " + "; ".join(
            (OTHER_NAME.format("OLD"), UNIQUE.format("api_index"))))
        self.check(world, database=f"The database {world.db} {IN_THE_WAY} (SQLite: UNIQUE "
                                   "constraint failed: upstox_tokens.api_index)")


ONE_COMMAND = "choose one of --status, --mode, --serve, --check and --import-config"
TOGETHER = "--mode PARTIAL and --apis go together"
USAGE = {  # what is typed: the end of what is said
    "--mode PARTIAL": TOGETHER, "--apis PRIMARY": TOGETHER, "--mode ALL --apis PRIMARY": TOGETHER,
    "--status --apis PRIMARY": TOGETHER, "--status --mode ALL": ONE_COMMAND,
    "--status --import-config": ONE_COMMAND, "--check --serve": ONE_COMMAND,
    "--serve --mode ALL": ONE_COMMAND, "--mode": "argument --mode: expected one argument",
    "--mode SOME": "argument --mode: invalid choice: 'SOME' .*",
    "--flow FAX": "argument --flow: invalid choice: 'FAX' .*",
    "--json": "--json goes with --status or --mode", "extra": "unrecognized arguments: extra",
    "--headed": r"--headed needs a display \(DISPLAY is not set\)",
    "--stat": "unrecognized arguments: --stat",
    **{f"--wait {value}": "argument --wait: expected minutes, more than 0 and at most 1440"
       for value in ("0", "-1", "soon", "nan", "inf", "1441")},
    **{f"--mode PARTIAL --apis {value}": f"--apis: {name} is not one of PRIMARY, WEBSOCKET1"
       for value, name in (("FOO", "FOO"), ("PRIMARY,websocket2", "WEBSOCKET2"), ("1", "1"))},
    **dict.fromkeys(("--mode PARTIAL --apis ,", "--mode PARTIAL --apis="),
                    "--apis: name at least one API"),
    # a run that could not be reached would wait in vain
    "--mode ALL --flow V3 --serve nonsense": "--serve: nonsense is not HOST:PORT",
    "--mode ALL --flow V3 --serve 0.0.0.0:1":
        "UPSTOX_SERVE_KEY: is not set; serving beyond loopback needs it"}


class UsageTest(Case):
    def test_errors(self) -> None:
        """Exit 2 with a sentence, and nothing was asked or changed."""
        world = self.world(apps=2, notifier_url=NOTIFIER)
        before = world.snapshot()

        def work(row: tuple[str, str]) -> None:
            with contextlib.redirect_stderr(io.StringIO()) as stream:
                done = world.call(*row[0].split())
            self.assertEqual((done.code, done.out), (2, ""))
            self.assertRegex(done.err + stream.getvalue(), rf"error: {row[1]}\n\Z")
        self.table(work, USAGE.items())
        done = world.call(*"--status --wait 1440 --headed".split(), WAYLAND_DISPLAY="wayland-0")
        self.assertEqual((done.code, done.err), (1, ""))
        self.assertEqual((world.broker.requests, world.snapshot()), ([], before))

    def test_version_and_help(self) -> None:
        world = self.world()
        world.write_env("broken")  # neither reads anything
        version = f"upstox_tokens.py {upstox_tokens.__version__}\n"
        self.assertEqual(world.process("--version"), (0, version, ""))
        done = world.process("--help")
        self.assertEqual((done.code, done.err), (0, ""))
        options = """--status --json --mode --apis --serve --check --import-config --flow --wait
            --headed --debug-dir --env-file --db -v -q --version INVALID_ONLY 127.0.0.1:28021"""
        self.assertEqual([option for option in options.split() if option not in done.out], [])

    def test_limits(self) -> None:
        """The contract's numbers, which tests make shorter."""
        limits = {"PAGE_SECONDS": 30, "OUTCOME_SECONDS": 60, "CAPTCHA_SECONDS": 15,
                  "CAPTCHA_HEADED_SECONDS": 300, "PROFILE_SECONDS": 10, "EXCHANGE_SECONDS": 30,
                  "READ_SECONDS": 10, "PROOF_SECONDS": 30, "STORE_SECONDS": 60}
        self.assertEqual({name: getattr(upstox_tokens, name) for name in limits}, limits)
        self.assertEqual(upstox_tokens.build_parser().parse_args([]).wait, 15)
        self.assertEqual(upstox_tokens.Handler.timeout, 10)


@unittest.skipIf(sys.platform == "win32", "a POSIX shell's doing")
class SurroundingsTest(Case):
    def shell(self, world: World, line: str) -> tuple[int, str, str]:
        """A shell line in which `tool` runs the program."""
        tool = f"tool() {{ {shlex.join([sys.executable, str(PROGRAM)])} \"$@\"; }}\n"
        done = subprocess.run(["sh", "-c", tool + line], cwd=world.folder, env=world.environ({}),
                              encoding="utf-8", input="", capture_output=True, timeout=60)
        world.check_said(done.stdout, done.stderr)
        return done.returncode, done.stdout, done.stderr

    def test_streams(self) -> None:
        """Closed, full or cut off: no traceback, and a result that nobody got is no success."""
        lost = "error: The result could not be written: BrokenPipeError.\n"
        bare = f"env -i {shlex.join([sys.executable, str(PROGRAM)])} --status"
        locale = ("cp vega_trade.db größe.db; export LC_ALL=C PYTHONUTF8=0 "
                  "PYTHONCOERCECLOCALE=0; tool --status -v --db größe.db")
        gone = ('env="$PWD/.env" db="$PWD/vega_trade.db"; mkdir x; cd x; rmdir ../x; '
                'tool --status --env-file "$env" --db "$db"')
        world = self.world()
        world.seed_guide()
        self.table(lambda row: self.assertEqual(self.shell(world, row[0]), row[1:]), [
            ("tool --status | head -1", 0, GUIDE.splitlines(True)[0], ""),
            ("tool --status <&-", 1, GUIDE, ""), ("tool --status 2>&-", 1, GUIDE, ""),
            ("tool --status >&-", 1, "", ""), ("tool --env-file missing >&- 2>&-", 2, "", ""),
            ("tool <&-", 1, f"{GUIDE}{MENU}\n{ABORTED}", ""), (bare, 1, GUIDE, ""),
            ("echo 4 | tool", 1, f"{GUIDE}{MENU}Choice: {ABORTED}", ""), (gone, 1, GUIDE, ""),
            ("tool >&-", 1, "", ""), ("tool 2>&-", 1, f"{GUIDE}{MENU}\n{ABORTED}", ""),
            (r"export PYTHONIOENCODING=utf-8:strict; printf '\377\n4\n' | tool", 1,
             f"{GUIDE}{MENU}Choice: Please answer 1, 2, 3 or 4.\nChoice: {ABORTED}", ""),
            (locale, 1, GUIDE.replace(
                "Summary:", f"Summary: {world.folder}/gr\\udcc3\\udcb6\\udcc3\\udc9fe.db"), ""),
            ("{ sleep 0.2; tool --status; echo $? >&2; } | true", 0, "", lost + "1\n")])
        if os.path.exists("/dev/full"):
            world = self.world()
            world.seed_valid()
            self.assertNotEqual(self.shell(world, "tool --status >/dev/full")[0], 0)

    def test_bug(self) -> None:
        """Told by its place, not by its words, which may hold anything; in a thread, too."""
        world = self.world()
        world.seed_valid()
        for owner, name in ((world, "now"), (urllib.request.OpenerDirector, "open")):
            out, err = io.StringIO(), io.StringIO()
            with (mock.patch.object(owner, name, side_effect=KeyError(PIN)),
                  contextlib.redirect_stderr(io.StringIO()) as stream):
                code = upstox_tokens.main(
                    ["--status", "--env-file", str(world.folder / ".env"), "--db", str(world.db)],
                    out=out, err=err, environ=world.environ({}), now=world.now)
            self.assertEqual((code, out.getvalue(), stream.getvalue()), (1, "", ""))
            told = re.fullmatch(r"error: internal error, KeyError at line (\d+)\. Please report "
                                r"it\.\n", err.getvalue())
            self.assertIn(f".{name}(", PROGRAM.read_text().splitlines()[int(told[1]) - 1])


# ==== From Python, and the files themselves =======================================================


class ModuleTest(Case):
    def test_access_token(self) -> None:
        """The stored token while layer 1 holds, else the module's exception with the reason."""
        world = self.world()
        world.seed_valid("PRIMARY")
        for name, db in (("PRIMARY", world.db), ("primary", str(world.db))):
            self.assertEqual(upstox_tokens.access_token(name, db=db), world.tokens()["PRIMARY"])
        world.check_said(repr(upstox_tokens.read_tokens(world.db)))
        for name, changes, reason in (
                ("FOO", {}, "NOT FOUND"), ("WEBSOCKET1", {"is_active": 0}, "INVALID (inactive)"),
                ("WEBSOCKET2", {"validity_at": local_text(time.time() - 1)}, "EXPIRED"),
                ("WEBSOCKET3", {"validity_at": None}, "EXPIRED (validity unreadable)"),
                ("OPTIONCHAIN1", {"access_token": "two words"}, "INVALID (malformed token)")):
            if changes:
                world.seed_valid(name, **changes)
            with self.subTest(name), self.assertRaises(upstox_tokens.TokenError) as caught:
                upstox_tokens.access_token(name, db=world.db)
            self.assertEqual(str(caught.exception), f"{name} is {reason} in {world.db}. "
                                                    "Run upstox_tokens.py --mode INVALID_ONLY.")
        world.folder.joinpath("text").write_text("no database" * 100)
        before = world.snapshot()
        for place in ("missing.db", "gone/missing.db", ".", "text"):
            with self.subTest(place), self.assertRaises(upstox_tokens.TokenError):
                upstox_tokens.access_token("PRIMARY", db=world.folder / place)
        self.assertEqual((world.snapshot(), world.broker.requests), (before, []))

    def test_import(self) -> None:
        """No side effects; third parties are for logins only. Where they are missing, these tell
        the command that installs them, and all else works.
        """
        script = """import os, signal, socket, sys, threading
mask, handlers = os.umask(18), [signal.getsignal(number) for number in (2, 15, 13)]
import upstox_tokens
assert os.umask(mask) == 18 and threading.active_count() == 1 and not socket.getdefaulttimeout()
codes = [upstox_tokens.main(line.split()) for line in sys.argv[1:]]
assert handlers == [signal.getsignal(number) for number in (2, 15, 13)]
assert not {'selenium', 'pyotp', 'urllib3'} & set(sys.modules)
sys.exit(f'{codes}')"""
        world = self.world(notifier_url=NOTIFIER)
        site = world.folder / "site"
        site.mkdir()
        site.joinpath("sitecustomize.py").write_text(
            "import sys; sys.path[:] = [place for place in sys.path if '-packages' not in place]")
        env, before = {"PYTHONPATH": str(PROGRAM.parent)}, world.snapshot()
        bare = {"PYTHONPATH": f"{site}{os.pathsep}{PROGRAM.parent}"}
        self.assertEqual(world.process(script, program="-c", env=env), (1, "", "[]\n"))
        self.assertEqual(world.snapshot(), before)
        world.seed_valid()
        lines = ("--status", "--help", "", "--import-config", "--check --flow V3",
                 "--mode INVALID_ONLY")
        done = world.process(script, *lines, program="-c", env=env)
        self.assertEqual(done.err, "[0, 0, 0, 0, 0, 0]\n")
        done = world.process(script, *lines, "--check", program="-c", env=bare)
        self.assertEqual(done.err, 2 * (
            f"error: selenium and pyotp missing. Run: {shlex.quote(sys.executable)} -m pip install "
            "selenium pyotp\n") + "[0, 0, 0, 0, 0, 2, 2]\n")
        world.serve(env=bare)
        self.assertEqual(len(world.ask().json["valid"]), 6)

    def test_packages(self) -> None:
        """Two packages, which the file names itself; imported inside functions."""
        def imported(path: Path) -> set[tuple[str, bool]]:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = {(getattr(node, "module", alias.name).partition(".")[0], node in tree.body)
                     for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
                     for alias in node.names}
            return {pair for pair in names if pair[0] not in sys.stdlib_module_names}

        packages = {("selenium", False), ("pyotp", False)}
        self.assertEqual(imported(PROGRAM), packages)
        self.assertLessEqual(imported(Path(__file__)), packages | {("upstox_tokens", True)})
        text = PROGRAM.read_text(encoding="utf-8")
        header = re.search(r"(?ms)^# /// script\n(.*?)^# ///$", text)[1]
        settings = dict(line.removeprefix("# ").split(" = ", 1) for line in header.splitlines())
        self.assertEqual(json.loads(settings["requires-python"]), ">=3.10")
        names = [re.match(r"\w+", name)[0] for name in json.loads(settings["dependencies"])]
        self.assertEqual(names, ["selenium", "pyotp"])

    def test_budget(self) -> None:
        """One file that a person can read, without a function that fills more than a screen."""
        text = PROGRAM.read_text(encoding="utf-8")
        lengths = {node.name: node.end_lineno - node.lineno + 1
                   for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)}
        self.assertLessEqual(len(text.splitlines()), 3471)
        self.assertLessEqual(max(map(len, text.splitlines())), 120)
        self.assertEqual({name: lines for name, lines in lengths.items() if lines > 45}, {})

    def test_env_sample_names_every_key(self) -> None:
        sample = PROGRAM.with_name("env.sample").read_text(encoding="utf-8")
        keys = re.findall(r"^#?(UPSTOX_\w+)=", sample, re.MULTILINE)
        known = {key for key in VALUES if not key.endswith("_5")} | set(NO_APPS)
        self.assertEqual((set(keys), len(keys)), (known, len(known)))
        program = PROGRAM.read_text(encoding="utf-8")
        named = set(re.findall(r"\bUPSTOX_[A-Z]+(?:_[A-Z]+)*\b", program))
        stems = {"UPSTOX_CLIENT_ID", "UPSTOX_CLIENT_SECRET", "UPSTOX_API_NAME"}
        self.assertLessEqual(named - known, stems)


@unittest.skipUnless(sys.platform == "linux", "GNU date is needed")
class ScheduleTest(Case):
    """The crontab lines of the README, run as cron runs them, in machine zones around the world."""

    def test_readme(self) -> None:
        """At 03:35 and 08:35 Indian time from Monday to Friday, once each, and never else.

        A whole week in stress, else its telling hours; New York's clocks go back in this week.
        """
        zones = ("UTC", "Asia/Kolkata", "Asia/Kathmandu", "America/New_York", "Australia/Sydney")
        ist, monday = timezone(timedelta(hours=5.5)), datetime(2025, 10, 27, tzinfo=timezone.utc)
        text = PROGRAM.with_name("README.md").read_text(encoding="utf-8")
        lines = re.findall(r"(?m)^ +([\d,]+) \* \* \* \* +(.*upstox_tokens\.py .*)$", text)
        starts = [(zone, moment, command) for minutes, command in lines for zone in zones
                  for fives in range(7 * 24 * 12)
                  for moment in [monday + timedelta(minutes=5 * fives)]
                  if str(moment.astimezone(ZoneInfo(zone)).minute) in minutes.split(",")
                  if SLOW or moment.astimezone(ist).hour in (3, 8) or moment.hour == 3]
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as pool:
            Path(folder, ".venv", "bin").mkdir(parents=True)
            for name, script in ((".venv/bin/python", 'echo "$@"'), ("date", (
                    f'exec {shutil.which("date")} -d "$MOMENT UTC" "$@"'))):
                Path(folder, name).write_text(f"#!/bin/sh\n{script}\n")
                Path(folder, name).chmod(0o700)

            def run(start: tuple[str, datetime, str]) -> str:
                zone, moment, command = start
                line = command.replace("\\%", "%").replace("/srv/vega", folder)
                done = subprocess.run(
                    ["sh", "-c", line], encoding="utf-8", capture_output=True, env={
                        "PATH": f"{folder}:{os.environ['PATH']}", "TZ": zone,
                        "MOMENT": f"{moment:%Y-%m-%d %H:%M:01}"})
                self.assertEqual((done.returncode, done.stderr), (0, ""), line)
                return done.stdout

            said = list(pool.map(run, starts))
        ran = collections.Counter((zone, f"{moment.astimezone(ist):%u %H:%M}")
                                  for (zone, moment, _), text in zip(starts, said) if text)
        self.assertEqual(ran, {(zone, f"{day} {clock}"): 1 for zone in zones
                               for day in range(1, 6) for clock in ("03:35", "08:35")})
        self.assertEqual(set(said) - {""}, {"upstox_tokens.py --mode INVALID_ONLY -q\n"})


# ---- logging in, with a real browser


class LoginCase(BrowserCase):
    """Logins whose patience is shortened."""

    def setUp(self) -> None:
        super().setUp()
        # a toast has gone by then, and a page's patience ends before the broker's
        self.enter(mock.patch.multiple(
            upstox_tokens, PAGE_SECONDS=5, OUTCOME_SECONDS=6, KEYS_SECONDS=1, CAPTCHA_SECONDS=1,
            CAPTCHA_HEADED_SECONDS=40, EXCHANGE_SECONDS=2, STORE_SECONDS=1))

    def check(self, world: World, done: Done, code: int, sentences: Sequence[str],
              sent: tuple[int, int, int]) -> None:
        """Exit code, what is said of each app ("" of one that got its token), what was sent."""
        said = {match[1]: match[2] for match in re.finditer(r"(?m)^([A-Z]+\d?): (.*)", done.out)}
        self.assertEqual((done.code, world.sent()), (code, sent), done.out + done.err)
        generated, failed = world.audit("GENERATED"), world.audit("FAILED")
        stop = f"not tried: the run stopped at {world.names[len(sentences) - 1]}"
        for name, sentence in itertools.zip_longest(world.names, sentences, fillvalue=stop):
            self.assertRegex(said.get(name, ""), f"(?i){sentence}" if sentence else "^$", done.err)
            self.assertEqual((name, "GENERATED") in generated, not sentence, name)
            tried = bool(sentence) and not sentence.startswith("not tried")
            self.assertEqual(failed.count((name, "FAILED")), tried, name)

    def check_nothing_tried(self, world: World) -> None:
        """Under a hold: exit 3 with the way out, before the dialog is asked for, no browser."""
        before = world.sent(), world.browsers(), world.broker.count("dialog")
        done = world.call("--mode", "INVALID_ONLY")
        after = world.sent(), world.browsers(), world.broker.count("dialog")
        self.assertEqual((done.code, after), (3, before), done.out + done.err)
        self.assertRegex(done.out, r"(?m)^[A-Z0-9]+: not tried: .*goes ahead from the menu")
        self.assertIn("Logins are on hold: ", world.call("--status").err)

    def meet(self, row: Login) -> None:
        """A row of LOGINS or PINS."""
        apps = len(row.said) + 2 * (row.code == 3)
        with World(apps, moment=NOON, **copy.deepcopy(row.switches)) as world:
            old = world.seed_old()
            remember(world, row.before)
            world.broker.acts["page"] = lambda _: world.sql(row.trigger)
            done = world.call("--mode", "INVALID_ONLY", DISPLAY=":0")
            self.check(world, done, row.code, row.said, row.sent)
            stolen = [request.body for request in world.broker.asked("foreign") if request.body]
            self.assertEqual((world.browsers(), stolen), (row.browsers, []), done.err)
            self.assertEqual(len(set(world.broker.codes)), row.sent[1], "a code was sent twice")
            got = [name for name, sentence in zip(world.names, row.said) if not sentence]
            self.assertEqual([name for name in old if world.tokens()[name] != old[name]], got)
            events = [outcome for name, outcome in world.audit() if name == "PRIMARY"]
            self.assertEqual(events, row.events.split() or events)
            if row.held:
                self.check_nothing_tried(world)
            else:
                self.assertEqual(world.call("--status").err, "", "a hold")
            if row.said[0].startswith("failed: "):
                self.check_stranger(world, row, done)

    def check_stranger(self, world: World, row: Login, done: Done) -> None:
        self.assertNotRegex(done.out, "blank|TOTP")
        taken = row.sent[1] and row.switches != {"otp_answer": "foreign"}  # which proves nothing
        self.assertEqual(world.audit("CODE_TAKEN", "HOLD", "PIN_SENT"),
                         [("PRIMARY", "CODE_TAKEN")] * taken)
        if row.switches in CHECKED:
            before = world.snapshot()
            done = world.call("--check", DISPLAY=":0")
            self.assertRegex(done.out, f"(?m)^login page +: {row.said[0].replace('failed: ', '')}")
            self.assertEqual((done.code, world.sent(), world.snapshot()), (1, (0, 0, 0), before))


class GuideTest(LoginCase):
    """The guide's example: three valid tokens, one refused, one expired, one missing."""

    def test_menu(self) -> None:
        """With every library's log at its loudest: no secret in it."""
        def look(request: Request) -> None:
            """Into the database, whenever a new token is checked."""
            token = request.headers.get("Authorization", "").removeprefix("Bearer ")
            name = broker.tokens[token].app
            if name in broker.logins:
                seen.append((world.tokens().get(name) == token, world.audit()[-1]))

        world, seen, heard = self.world(moment=NOON), [], io.StringIO()
        broker = world.broker
        broker.acts["profile"] = look
        world.seed_guide()
        before = {row["api_name"]: row for row in world.rows()}
        self.listen(heard)
        done = world.call(answers=["5", "", "2"])
        world.check_said(heard.getvalue())
        self.assertEqual(done.code, 0, done.err)
        self.assertTrue(done.out.startswith(GUIDE + "\nChoose Action:\n"), done.out)
        self.assertTrue(done.out.endswith("\n" + ALL_VALID), done.out)
        after = {row["api_name"]: row for row in world.rows()}
        self.assertEqual((broker.logins, world.browsers(), world.sent()), (RENEWED, 1, (1, 1, 3)))
        self.assertEqual(seen, [(True, (name, "GENERATED")) for name in RENEWED],
                         "persist, audit, then the profile check")
        for name in RENEWED:
            token, number = after[name]["access_token"], after[name]["id"]
            before[name] = dict.fromkeys(UNWRITTEN) | token_row(
                name, token, world.now(), id=number)
        self.assertEqual(after, before)
        self.check_audit(world)
        self.check_requests(broker)

    def listen(self, heard: io.StringIO) -> None:
        handler = logging.StreamHandler(heard)
        for logger in map(logging.getLogger, ("", "selenium", "urllib3")):
            self.addCleanup(logger.setLevel, logger.level)
            logger.setLevel(logging.DEBUG)
        logging.getLogger().addHandler(handler)
        self.addCleanup(logging.getLogger().removeHandler, handler)

    def check_audit(self, world: World) -> None:
        rows, first = world.audit_rows(), RENEWED[0]
        self.assertEqual(world.audit(), [(first, "CODE_SENT"), (first, "CODE_TAKEN"), *(
            itertools.product(RENEWED, ("PIN_SENT", "PIN_TAKEN", "GENERATED")))])
        self.assertEqual({(row["source"], row["flow"], row["reason"]) for row in rows},
                         {("MENU", "SELENIUM", None)})
        self.assertEqual(len({row["run_id"] for row in rows}), 1)
        self.assertEqual({row["at"] for row in rows}, {int(world.now() * 1000)})
        self.assertEqual({row["credentials"] for row in rows}, {None, credentials()})

    def check_requests(self, broker: Broker) -> None:
        """A state for each login, a code used once, program and browser under their own names."""
        asked = [request for request in broker.requests if request.host == "api"]
        agents = [request.headers["User-Agent"] for request in asked]
        dialogs = [request for request, agent in zip(asked, agents) if "HeadlessChrome" in agent]
        self.assertEqual(len({request.query["state"] for request in dialogs}), len(RENEWED))
        self.assertTrue(all(len(request.query["state"]) > 15 for request in dialogs))
        self.assertEqual({agent for agent in agents if "HeadlessChrome" not in agent},
                         {f"upstox_tokens/{upstox_tokens.__version__}"})
        self.assertEqual(broker.details("token"), RENEWED)


class VariantTest(BrowserCase):
    """The login page as it may look: all tokens come out VALID, in one browser."""

    # switches, the looks of each app's page, what is sent in all
    ROWS: list[Any] = [
        ({"remember": False, "clock_offset": 19}, [
            {"otp_autosubmit": 150, "otp_mask": True}, {"spinner": 1500}, {"lead_phone": True},
            {"otp_button_always_enabled": True, "otp_autosubmit": 0}, {"toast_ms": 9000},
            {"rerender": 120, "otp_mask": True, "keep_hidden_inputs": True}], (6, 6, 6)),
        ({"clock_offset": -19, "config_delay": 0.5}, [
            {"late_words": "Markets open at 09:15"}, {"stale_identity": True},
            {"hop_delay": 1, "pin_autosubmit": 150}, {"step_delay": 2, "spinner": 1500},
            {"dialog_answer": "direct"}], (2, 2, 4)),
        ({"unguarded": True, "step_delay": 0.6, "otp_autosubmit": 150, "pin_autosubmit": 150,
          "hops": 5, "jam": 500, "rewritten": True}, [{}], (1, 1, 1)),
        ({"unguarded": True, "step_delay": 0.6, "by_script": True}, [{}], (1, 1, 1)),
        ({"unguarded": True, "step_delay": 0.6, "by_script": "form", "otp_autosubmit": 0,
          "pin_autosubmit": 0}, [{}], (1, 1, 1)),
        ({}, [{"late_name": 150}, {"late_name": 0}, {"counter": 50}], (1, 1, 3)),
        ({"captcha": 0.3, "remember": False}, [
            {"captcha_form": "page"}, {"captcha_form": "explicit"}, {"captcha_form": "frame"}],
         (3, 3, 3)),
        slow(({"remember": False, "clock_offset": 15}, [
            {"otp_mask": True}, {"otp_autosubmit": 0}, {"otp_autosubmit": 150},
            {"otp_button_always_enabled": True}, {"rerender": 120}, {"keep_hidden_inputs": True},
            ], (6, 6, 6))),
        slow(({"captcha": 2, "captcha_form": "div"}, [{}], (1, 1, 1))),
        slow(({"config_delay": 20}, [{}], (1, 1, 1))),
        slow(({"hop_delay": 20}, [{}], (1, 1, 1))),
    ]

    def test_variants(self) -> None:
        self.table(self.log_in, self.ROWS, workers=3)

    def test_page_that_sends_by_itself(self) -> None:
        """By a script that nobody can see, and would send it again: it is given time to go on."""
        with mock.patch.multiple(upstox_tokens, SETTLE_SECONDS=5):
            self.log_in(({"remember": False, "by_script": True, "unguarded": True,
                          "step_delay": 0.1}, [
                {"otp_autosubmit": 0, "pin_autosubmit": 100},
                {"otp_autosubmit": 100, "pin_autosubmit": 0}], (2, 2, 2)))

    def test_two_captchas(self) -> None:
        """Each is told of, and has a time of its own."""
        world = self.world(1, moment=NOON, captcha=0.5, captcha_form="both")
        done = world.call("--mode", "ALL")
        told = done.err.count("waiting whether it passes by itself")
        self.assertEqual((done.code, told, world.sent()), (0, 2, (1, 1, 1)), done.err)

    def log_in(self, row: Any) -> None:
        switches, looks, sent = row
        with World(len(looks), moment=NOON, by_app=dict(zip(APPS, looks)), **switches) as world:
            done = world.call("--mode", "ALL")
            valid = summary(**dict.fromkeys(world.names, "VALID"))
            self.assertEqual((done.code, done.out, world.sent()), (0, valid, sent), done.err)
            self.assertEqual(world.browsers(), 1)


class Login(NamedTuple):
    """A run of some apps with these switches, and what comes of it; code 3 ends it for all."""

    switches: Mapping[str, Any]
    code: int
    said: Sequence[str]  # of each app; "" of one that gets its token
    sent: tuple[int, int, int]
    browsers: int = 1
    held: bool = False  # whether no unattended run may try again
    events: str = ""  # of the first app, where they matter
    before: str = ""  # what is remembered of earlier runs
    trigger: str = ""  # what the database does not take any more, once the page has come


def codes(answers: list[str], said: Sequence[str], sent: tuple[int, int, int]) -> Login:
    """A run whose TOTP codes are answered so, until none may be sent any more."""
    return Login({"otp_answer": answers}, 3, said, sent, held=True)


def stranger(switches: Mapping[str, Any], words: str, sent: tuple[int, int, int]) -> Login:
    """A run that meets somebody else's page, or one that nobody knows."""
    return Login(switches, 3, [f"failed: .*{words}"], sent)


def unknown(words: str) -> str:
    return rf"does not know.*nothing more is typed.*host 127.0.0.1:\d+.*{words}"


FOREIGN = r"page on \S*login.upst0x.localhost:\d+, which is not the broker's own"
TERMS = unknown('"We have updated our terms".*: acceptTerms')
CHALLENGE = "CAPTCHA, which only a person may solve.*--headed.*--flow V3"
LOGINS: list[Any] = [
    # what holds for all apps stops the run
    Login({"mobile_answer": ["", "1017069"], "remember": False}, 1,
          ["", "limit.*10 minutes", "not tried.*WEBSOCKET1"], (2, 1, 1)),
    Login({"otp_answer": "1017125"}, 1, ["blocked.*10 minutes", "not tried"], (1, 1, 0)),
    Login({"mobile_answer": f"{MOBILE} is barred [1017555]"}, 3, ["barred.*MOBILE_NUMBER"],
          (1, 0, 0)),
    Login({"mobile_answer": DEVANAGARI}, 1, ["did not go on", "not tried"], (1, 0, 0)),
    Login({"page": "unlock"}, 3, ["account is locked.*Unlock it"], (0, 0, 0), held=True),
    # what holds for one app does not
    Login({"by_app": {name: {"dialog_answer": answer} for name, answer in
                      zip(APPS, ("100068", "100073", "500", "429"))},
           "token_answer": ["", json_reply(user_data(USER_ID) | {"access_token": "two words"})]}, 1,
          ["client_id.*redirect_uri.*UDAPI100068", "inactive", "UDAPI100500", "UDAPI10005", "",
           "answer"], (1, 1, 2)),
    Login({"dialog_answer": json_reply({"errors": [{"errorCode": "UDAPI100068"}]}, 200)}, 1,
          ["client_id.*UDAPI100068"] * 2, (0, 0, 0), 0),
    Login({"redirect_state": ["other", "missing", "no_code"],
           "token_answer": [
               "100069", json_reply(user_data(USER_ID) | {"access_token": 20251123}), "hang"]}, 1,
          ["another state", "another state", "authorization code", "secret.*UDAPI100069", "answer",
           "timeout"], (1, 1, 6)),
    slow(Login({"token_answer": [
        "500", "html", CUT_SHORT, json_reply(user_data(USER_ID)), "100057", "100073"]}, 1,
               ["UDAPI100500", "answer", "answer", "answer", "UDAPI100057", "inactive"],
               (1, 1, 6))),
    # before a secret was typed once more with a fresh browser, after it never
    slow(Login({"page": "blank"}, 1, ["blank"], (0, 0, 0), 2)),
    slow(Login({"page": "hang"}, 1, ["timeout"], (0, 0, 0), 2)),
    slow(Login({"page": "loader"}, 1, ["blank"], (0, 0, 0), 2)),
    slow(Login({"mobile_answer": ["hang"]}, 1, ["did not go on", ""], (2, 1, 1))),
    slow(Login({"mobile_answer": ["reset"]}, 1, ["lost its connection", ""], (2, 1, 1))),
    # a code that led to another page was taken, whatever that page wants; no PIN is invented
    Login({"create_pin": True}, 1, ["failed: .*create a new PIN"], (1, 1, 0)),
    # what cannot be noted is not sent; a token that cannot be stored costs one login
    *(Login({"otp_autosubmit": 0, "pin_autosubmit": 0}, 1, [words, "not tried.*PRIMARY"], sent,
            trigger=trigger)
      for trigger, words, sent in (
          (UNNOTED.format("CODE_SENT"), "cannot be noted", (1, 0, 0)),
          (UNNOTED.format("PIN_SENT"), "cannot be noted", (1, 1, 0)),
          (REJECT, "could not be stored", (1, 1, 1)))),
    # two codes that were not taken are enough
    Login({"otp_answer": [WRONG_OTP]}, 0, ["", ""], (1, 2, 2), events="CODE_SENT CODE_REFUSED "
          "CODE_SENT CODE_TAKEN PIN_SENT PIN_TAKEN GENERATED"),
    # the refusal of a code that stays in sight hides nothing that comes after it
    Login({"otp_answer": [WRONG_OTP], "toast_ms": 90000, "create_pin": True}, 1,
          ["failed: .*create a new PIN"], (1, 2, 0)),
    Login({"otp_answer": [WRONG_OTP], "toast_ms": 90000, "pin_answer": "1017090"}, 3,
          ["account is locked"], (1, 2, 1), held=True),
    codes(["Invalid OTP. Please resend OTP and try again [1017070]"] * 2, ["TOTP.*UPSTOX_TOTP"],
          (1, 2, 0)),
    slow(codes(["Incorrect code", "Invalid OTP [1017555]"], ["TOTP.*UPSTOX_TOTP"], (1, 2, 0))),
    codes(["1017079"] * 9, ["session.* Run again[.]", "session.* Logins are on hold now; go"],
          (2, 2, 0)),
    slow(codes(["silent"] * 9, ["said nothing"] * 2, (2, 2, 0))),
    slow(codes(["reset"] * 9, ["connection"] * 2, (2, 2, 0))),
    slow(codes([DEVANAGARI] * 9, [DEVANAGARI[:20]] * 2, (2, 2, 0))),
    # nothing is typed into a page of somebody else, or one that nobody knows
    slow(stranger({"dialog_answer": ["", "", "", "html"]}, unknown('"Service Unavailable'),
                  (0, 0, 0))),
    stranger({"dialog_answer": "foreign"}, FOREIGN, (0, 0, 0)),
    stranger({"otp_answer": "foreign"}, FOREIGN, (1, 1, 0)),
    slow(stranger({"leave_on_input": "mobileNum"}, FOREIGN, (0, 0, 0))),
    slow(stranger({"leave_on_input": "otpNum"}, FOREIGN, (1, 0, 0))),
    stranger({"leave_on_input": "pinCode"}, FOREIGN, (1, 1, 0)),
    stranger({"loses": "pinCode"}, r"It does not keep what is typed \(pin\)", (1, 1, 0)),
    slow(stranger({"page": "terms"}, TERMS, (0, 0, 0))),
    slow(stranger({"mobile_answer": "terms"}, TERMS, (1, 0, 0))),
    stranger({"otp_answer": "terms"}, TERMS, (1, 1, 0)),
    *(stranger({"rename": {old: new}}, unknown(f'"Let’s get started".*: {shown}'), (0, 0, 0))
      for old, new, shown in (("mobileNum", "phone", "phone, getOtp"),
                              ("getOtp", "go", "mobileNum, go"))),
    *(slow(stranger({"rename": {old: new}}, unknown(f'"{title}.*: {shown}'), sent))
      for old, new, title, shown, sent in (
          ("otpNum", "code", "Verify your number", "code, continueBtn", (1, 0, 0)),
          ("continueBtn", "go", "Verify your number", "otpNum, go", (1, 0, 0)),
          ("pinCode", "secret", "Hi Asha", "secret, pinContinueBtn", (1, 1, 0)),
          ("pinContinueBtn", "go", "Hi Asha", "pinCode, go", (1, 1, 0)))),
    *(stranger({"captcha": "never", "captcha_form": form}, CHALLENGE, (0, 0, 0))
      for form in ("div", "frame", "explicit", "page"))]
# what --check meets too, before anything is spent
CHECKED = ({"dialog_answer": "foreign"}, {"rename": {"mobileNum": "phone"}},
           {"captcha": "never", "captcha_form": "explicit"})


def pin(switches: Mapping[str, Any], words: str, arriving: int = 1, **more: Any) -> Login:
    """A run whose PIN leads nowhere: one is sent, no other app is tried, and nothing after it."""
    return Login(switches, 3, [words], (1, 1, arriving), **{"held": True, **more})


KNOWN = {"before": PROVEN}
LOST = r"session\. The PIN had been sent"
PINS: list[Any] = [
    # a PIN that was never accepted holds all unattended runs, whatever is answered
    pin({"pin_autosubmit": 0, "by_script": True, "pin_answer": "silent", "counter": 400,
         "late_name": 900}, "PIN.* said nothing"),
    pin({"clears": "pinCode", "pin_autosubmit": 0, "pin_answer": "silent"}, "PIN"),
    pin({"pin_autosubmit": 0, "by_script": True, "unguarded": True, "toast_ms": 60_000,
         "step_delay": 1, "late_words": "Verifying", "pin_answer": DEVANAGARI},
        f'PIN.*"{DEVANAGARI[:30]}'),
    pin({"pin_answer": "Resend your request [1017600]"}, r"Resend.*\. The PIN had"),
    pin({"pin_answer": "The OTP or TOTP is incorrect [1017070]"},  # of the code
        r"after the PIN the login page said: The OTP.*\. The PIN had"),
    slow(pin({"pin_autosubmit": 150, "jam": 500, "pin_answer": "1017999"}, "something went wrong")),
    slow(pin({"pin_answer": "1017079"}, LOST)),
    slow(pin({"pin_answer": " "}, "PIN.* said nothing")),  # a toast without words
    slow(pin({"pin_answer": DEVANAGARI}, f'PIN.*"{DEVANAGARI[:30]}')),
    slow(pin({"pin_answer": "reset"}, "connection.*PIN had been sent")),
    slow(pin({"pin_answer": "hang"}, "PIN.* said nothing")),
    slow(pin({"pin_answer": "Please be patient"}, 'PIN.*"Please be patient"')),
    slow(pin({"pin_answer": DEVANAGARI + "[1017601]"}, f"{DEVANAGARI[:30]}.*PIN had been")),
    slow(pin({"clears": "pinCode"}, "PIN", 0)),
    slow(pin({"pin_answer": "something_went_wrong"}, "something went wrong.*PIN had been")),
    slow(pin({"pin_answer": "dormant"}, "dormant.*PIN had been sent")),
    # one that was accepted before does so only when it is refused in words, or the account locked
    pin({"pin_answer": f"Invalid PIN {PIN}. Try again"}, "refused the PIN .*UPSTOX_PIN",
        **KNOWN),
    pin({"pin_answer": "Incorrect PIN. Use Forgot PIN to resend an OTP [1017073]"},
        "refused the PIN .*UPSTOX_PIN", **KNOWN),
    pin({"pin_answer": "1017090"}, "locked.*Unlock", **KNOWN),
    slow(pin({"pin_autosubmit": 0, "pin_answer": WRONG_PIN}, "refused the PIN", **KNOWN)),
    pin({"pin_answer": "consent"}, 'not know.*"Allow access to your account', held=False,
        **KNOWN),
    slow(pin({"pin_answer": "foreign"}, "login.upst0x.localhost", held=False, **KNOWN)),
    slow(pin({"pin_answer": "terms"}, "not know.*We have updated", held=False, **KNOWN)),
    Login({"pin_answer": "1017007"}, 1, [LOST, "not tried"], (1, 1, 1), **KNOWN)]


class FailureTest(LoginCase):
    """Page or broker say no: a sentence of its own, the right exit code, the old row kept."""

    def test_logins(self) -> None:
        self.table(self.meet, LOGINS, workers=4)

    def test_token_that_the_broker_does_not_take(self) -> None:
        """It is stored all the same, found dead, and marked so for its readers."""
        world = self.world(1, moment=NOON, profile_answer="401", **DIRECT)
        done = world.call("--mode", "ALL")
        self.assertEqual(done.code, 1, done.err)
        self.assertTrue(done.out.startswith(summary(PRIMARY="INVALID (401)")), done.out)
        self.assertRegex(done.out, r"(?m)^PRIMARY: failed: .*does not take it \(401\)\. Run again")
        row, = world.rows()
        self.assertEqual((row["access_token"], row["is_active"]), (*world.broker.tokens, 0))

    def test_browser_dies(self) -> None:
        """Before a secret was typed: once more. While the PIN is under way: never."""
        world = self.world(3, moment=NOON, config_delay=60,
                           by_app={"WEBSOCKET1": {"pin_answer": "hang"}})
        world.open_browser = upstox_tokens.Browser
        SharedBrowser.end()  # so that only this one is there

        def kill_twice() -> None:
            for condition in (lambda: world.broker.count("config"), lambda: world.sent()[2] == 2):
                world.until(condition)
                world.broker.switches.config_delay = 0
                os.kill(next(pid for pid, command in processes(self.temp).items()
                             if "--user-data-dir" in command and "--type=" not in command
                             and "chromedriver" not in command), signal.SIGKILL)

        with meanwhile(kill_twice):
            done = world.call("--mode", "ALL")
        self.check(world, done, 1, ["", "browser.*PIN"], (1, 1, 2))
        self.assertEqual(world.browsers(), 2)


class PinTest(LoginCase):
    """Whatever is answered to the PIN: one in a run, none any more once it may be wrong."""

    def test_answers(self) -> None:
        self.table(self.meet, PINS, workers=4)

    def test_menu(self) -> None:
        """One PIN a run there too, and never one more unasked, though it was accepted before."""
        world = self.world(3, moment=NOON, pin_answer="1017999")
        remember(world, PROVEN)
        for answers, pins in ((["2"], 1), (["2", "perhaps"], 1), (["2", "y"], 2)):
            # a window is for CAPTCHAs only; a folder for pictures cannot be made there
            done = world.call("--debug-dir", world.db, answers=answers, DISPLAY=":0")
            self.assertEqual((done.code, world.sent()[2]), (3, pins), done.out)
            self.assertRegex(world.prompts[-1], "on hold: .*PIN" if answers[1:] else "^Choice")
            self.assertNotIn("Aborted", done.out)
        self.assertEqual(world.call(answers=["2"]).code, 3)  # asked, and Ctrl-D
        self.assertEqual((len(world.prompts), world.sent()[2]), (2, 2))
        self.check_nothing_tried(world)

    def test_database_locked_while_judged(self) -> None:
        """What became of the PIN is noted as soon as the database takes it again."""
        for answer, code in ((WRONG_PIN, 3), ("", 1)):
            world = self.world(1, moment=NOON, pin_answer=answer, token_answer="100057")
            remember(world, PROVEN if answer else "")
            world.broker.acts["pin"] = world.lock
            with (world.once_told("the audit row was not written", world.unlock),
                  mock.patch.multiple(upstox_tokens, READ_SECONDS=0.2)):
                done = world.call("--mode", "ALL")
            self.assertEqual((done.code, world.sent()[2]), (code, 1), done.err)
            if answer:
                self.check_nothing_tried(world)
            else:
                self.assertEqual(world.audit()[-2:], [
                    ("PRIMARY", "PIN_TAKEN"), ("PRIMARY", "FAILED")])
                self.assertNotIn("on hold", done.out + world.call("--status").err)

    def test_stopped_while_a_picture_is_taken(self) -> None:
        """Of a PIN that was refused in words: it is on hold all the same."""
        class Stopping(SharedBrowser):
            def evidence(self, *_: object) -> None:
                signal.raise_signal(signal.SIGTERM)

        world = self.world(2, moment=NOON, pin_answer=WRONG_PIN)
        remember(world, PROVEN)
        world.open_browser = Stopping
        done = world.call("--mode", "ALL", "--debug-dir", world.folder / "pictures")
        self.assertEqual((done.code, world.audit("HOLD", "FAILED")), (
            143, [("PRIMARY", "HOLD"), ("PRIMARY", "FAILED")]))

    def test_dialog(self) -> None:
        """Its words are the page's, even those that sound like a browser's end."""
        from selenium.common.exceptions import UnexpectedAlertPresentException
        said = "Incorrect PIN. Your session is closed."
        browser = upstox_tokens.Browser((), False, {})
        fault = UnexpectedAlertPresentException(f"unexpected alert open: {said}", alert_text=said)
        browser.driver = mock.Mock(current_url="https://login.upstox.com/",
                                   execute_script=mock.Mock(side_effect=fault))
        self.assertEqual(browser.look().text, said)

    def test_page_that_submits_before_the_press(self) -> None:
        """By itself, just after it was looked at."""
        class Slow(SharedBrowser):
            def press(self, view: upstox_tokens.View, step: str, digits: int) -> bool:
                world.until(lambda: step != "pin" or "[1017999]" in self.look().text)
                return super().press(view, step, digits)

        world = self.world(3, moment=NOON, pin_autosubmit=800, pin_answer="1017999")
        world.open_browser = Slow
        done = world.call("--mode", "ALL")
        self.check(world, done, 3, ["something went wrong.*PIN had been sent"], (1, 1, 1))


PAGE_FAILED = ("the login page or the browser failed ({}). Run again; if it stays so, look at it "
               "with --headed.")


class CheckTest(LoginCase):
    """--check with a browser: reads only, spends nothing."""

    flow, ready = "SELENIUM", ReadinessTest.check
    ROWS: list[Any] = [  # switches, the lines that are not ok
        ({"keep_hidden_inputs": True}, {}),
        ({"captcha": 0.3, "captcha_form": "explicit"}, {}),
        ({"down": True}, {
            "login_page": PAGE_FAILED.format("the page did not load"), "clock": TIMELESS,
            **dict.fromkeys(("broker", "PRIMARY", "WEBSOCKET1"), UNREACHABLE)}),
        slow(({"page": "blank"}, {"login_page": PAGE_FAILED.format("the page stayed blank")})),
    ]

    def test_lines(self) -> None:
        def work(row: Any) -> None:
            switches, problems = row
            with World(2, NOON, **switches) as world:
                world.seed_valid()
                self.ready(world, **problems)
        self.table(work, self.ROWS)

    def test_no_driver(self) -> None:
        world = self.world(2, NOON)
        world.open_browser = upstox_tokens.Browser
        (world.folder / "bin" / "chromedriver").write_text("#!/bin/sh\nexit 1\n")
        self.ready(world, browser=(
            "the browser failed (chromedriver did not start). Install Chromium and its driver (apt "
            "install chromium chromium-driver), then run --check."),
                   login_page="not opened, for want of a browser")

    def test_selenium_manager(self) -> None:
        """Where there is no chromedriver it is asked for one: without statistics or settings."""
        world = self.world(1)
        manager, seen = world.folder / "manager", world.folder / "seen"
        manager.write_text(f'#!/bin/sh\n/usr/bin/env >"{seen}"\nexit 1\n')
        manager.chmod(0o700)
        env = world.exported() | {"PATH": "", "SE_MANAGER_PATH": str(manager)}
        self.assertRegex(world.process("--check", env=env).out, r"no chromedriver, and none could")
        self.assertIn("SE_AVOID_STATS=true\n", seen.read_text())
        self.assertNotIn("UPSTOX_", seen.read_text())


class StopTest(LoginCase):
    """Ctrl-C, SIGTERM and kill -9 in the middle of a run."""

    # signal, sent when (route, requests so far) what hangs then, exit code, tokens by then
    HALF_WAY: list[Any] = [
        (signal.SIGTERM, ("pin", 2), "pin_answer", 143, 1),
        (signal.SIGKILL, ("pin", 1), "pin_answer", -9, 0),
        slow((signal.SIGINT, ("mobile", 1), "mobile_answer", 130, 0)),
        slow((signal.SIGKILL, ("token", 2), "token_answer", -9, 1)),
        slow((signal.SIGKILL, ("config", 2), "page", -9, 1)),
    ]

    def test_half_way(self) -> None:
        self.table(self.stop_half_way, self.HALF_WAY, workers=3)

    def stop_half_way(self, row: Any) -> None:
        signum, (route, requests), switch, code, generated = row
        hangs = {switch: "loader" if switch == "page" else "hang"}
        with World(by_app={RENEWED[generated]: hangs}) as world:
            world.seed_guide()
            before = world.tokens()
            program = world.start("--mode", "INVALID_ONLY", "-v",
                                  env=world.exported() | {"SE_DEBUG": "1"})
            world.until(lambda: world.broker.count(route) >= requests)
            self.check_children(world)
            # Ctrl-C in a terminal reaches the whole process group
            send = os.killpg if signum == signal.SIGINT else os.kill
            send(program.pid, signum)
            if signum != signal.SIGKILL:  # nor does an impatient operator disturb the cleaning
                stopped = (RENEWED[generated], "FAILED")
                world.until(lambda: stopped in world.audit("FAILED"))
                children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text()
                for again in (signal.SIGINT, signal.SIGTERM):
                    send(program.pid, again)
                program.wait()
                left = [pid for pid in children.split() if Path("/proc", pid).exists()]
                self.assertEqual(left, [], "the program ended before its browser")
            done = world.finish(program)
            self.assertEqual(done.code, code, done.err)
            kept = world.tokens()
            new = [name for name in RENEWED if kept.get(name) != before.get(name)]
            self.assertEqual(new, RENEWED[:generated])
            self.assertEqual({name: kept[name] for name in before if name not in new},
                             {name: before[name] for name in before if name not in new})
            if requests == 1 and route == "pin":  # the PIN that was being judged counts as sent
                world.until(lambda: not processes(world.folder))
                self.check_nothing_tried(world)
            else:
                self.go_on(world, generated)

    def check_children(self, world: World) -> None:
        """Settings that come by the environment stay in the program; nothing hides the driver."""
        seen: dict[str, str] = {}  # command line: environment
        for pid, command in processes(self.temp).items():
            with contextlib.suppress(OSError):
                if "--mode" not in command:  # nor a child that is being born
                    seen[command] = Path(f"/proc/{pid}/environ").read_bytes().decode()
        commands = "\n".join(seen)
        self.assertRegex(commands, r"(?s)--user-data-dir.*--enable-automation|"
                                   r"--enable-automation.*--user-data-dir")
        self.assertNotRegex(commands, "AutomationControlled|--user-agent|--disable-web-security")
        self.assertEqual("--no-sandbox" in commands, os.geteuid() == 0)
        # or a crash handler that starts late would make the profile's folder anew
        self.assertRegex(commands, r"--database=\S+/upstox_tokens-[0-9a-f]+/\w")
        self.assertNotIn("UPSTOX_", "\n".join(seen.values()))
        world.check_said(commands, *seen.values())

    def go_on(self, world: World, generated: int) -> None:
        """The next run does the rest."""
        world.moment = time.time()  # so that the next window comes at once
        world.broker.switches.by_app = {}
        logins = len(world.broker.logins)
        again = world.call("--mode", "INVALID_ONLY")
        self.assertEqual(again[:2], (0, ALL_VALID), again.err)
        self.assertEqual(world.broker.logins[logins:], RENEWED[generated:])

    # signals, seconds after the code reached the broker, how long the exchange takes, and whether
    # another program writes to the database then
    EXCHANGES: list[Any] = [
        ([signal.SIGINT] * 3, 0, 1.5, True),
        slow(([signal.SIGTERM, signal.SIGINT], 0.7, 1.5, False)),
        *(slow(([signum], tenth / 10, 8, False)) for tenth in range(82)
          for signum in (signal.SIGINT, signal.SIGTERM)),
    ]

    def test_token_in_flight(self) -> None:
        self.table(self.stop_exchange, self.EXCHANGES, workers=4)

    def stop_exchange(self, row: Any) -> None:
        """A token that the broker gives is stored, and no other login begins."""
        signals, seconds, token_delay, locked = row
        with World(2, token_delay=token_delay, **DIRECT) as world:
            if locked:
                world.broker.acts["token"] = world.lock
            program = world.start("--mode", "ALL")
            world.until(lambda: world.broker.count("token"))
            world.broker.pause(seconds)
            for signum in signals:
                os.killpg(program.pid, signum)
                world.broker.pause(0.1)
            if locked:
                world.until(lambda: world.broker.tokens)
                program.terminate()
                world.broker.pause(0.5)
                self.assertIsNone(program.poll(), "the token is dropped")
                world.unlock()
            done = world.finish(program)
            self.assertEqual(done.code, 128 + signals[0], done.err)
            self.assertEqual(world.tokens(), {"PRIMARY": next(iter(world.broker.tokens))})
            self.assertEqual(world.audit("GENERATED", "FAILED")[0], ("PRIMARY", "GENERATED"))

    def test_database_refuses_for_a_while(self) -> None:
        world = self.world(1, **DIRECT)
        old = world.seed_old()
        world.broker.acts["token"] = lambda _: world.sql(REJECT)
        told = "cannot be stored yet, trying again"
        with (mock.patch.multiple(upstox_tokens, STORE_SECONDS=30),
              world.once_told(told, lambda: world.sql("DROP TRIGGER no"))):
            done = world.call("--mode", "ALL")
        self.assertEqual((done.code, world.sent()), (0, (0, 0, 0)), done.err)
        self.assertEqual(world.tokens(), {"PRIMARY": next(reversed(world.broker.tokens))})
        self.assertNotEqual(world.tokens(), old)


class MemoryTest(LoginCase):
    """What was sent is remembered with the database."""

    def test_windows(self) -> None:
        """A code with less than 5 s left waits for the next window; none is sent twice, whoever
        sent it, though the clock was set back by an hour in between.
        """
        world = self.world(1, moment=NOON)
        remember(world, "CODE_SENT CODE_TAKEN CODE_SENT CODE_TAKEN")
        for row, window in ((1, NOON + 30), (3, NOON - 3600)):
            world.sql(f"UPDATE upstox_token_audit SET number = {window // 30} WHERE id = {row}")
        # the clock when a run starts, the window of its code, the clock when it was sent
        for start, window, sent in ((25.5, 60, 60), (-3545.5, -3570, -3545.5)):
            world.moment = NOON + start
            self.assertEqual(world.call("--mode", "ALL", "-q"), (0, "", ""))
            self.assertEqual(world.broker.codes[-1], totp(TOTP_SECRET, NOON + window))
            self.assertEqual(world.moment, NOON + sent)

    def test_overslept(self) -> None:
        """A machine that sleeps longer than it should wakes up near the end of the next window; a
        code whose time runs out while it is being noted is not sent.
        """
        world = self.world(1, moment=NOON + 25.5)
        world.now = world.broker.clock = lambda: (
            world.moment + 26 * bool(world.audit("CODE_SENT")))

        def oversleep(seconds: float) -> None:
            world.moment = max(world.moment + seconds, NOON + 58.5)

        class Patient(SharedBrowser):
            """The page's patience would be over by then."""

            clock = staticmethod(
                lambda: time.monotonic() + 60 * bool(world.audit("CODE_NOT_SENT")))

        world.sleep, world.open_browser = oversleep, Patient
        done = world.call("--mode", "ALL")
        self.assertEqual((done.code, world.broker.codes), (0, [totp(TOTP_SECRET, NOON + 90)]))
        self.assertEqual([outcome for _, outcome in world.audit()][:4],
                         ["CODE_SENT", "CODE_NOT_SENT", "CODE_SENT", "CODE_TAKEN"])
        waits = re.findall(r"PRIMARY: next TOTP code in (\d+) s\n", done.err)
        self.assertEqual(waits, ["4"], "once, where no terminal is")

    def test_code_that_another_run_sent_meanwhile(self) -> None:
        """While ours was being typed, by a machine with the same database: ours is not sent."""
        class Slow(SharedBrowser):
            def type(self, view: upstox_tokens.View, step: str, keys: str) -> bool:
                if len(keys) == 5 and step == "otp" and not world.audit():
                    remember(world, "CODE_SENT CODE_TAKEN")
                    world.sql(f"UPDATE upstox_token_audit SET number = {NOON // 30}")
                return super().type(view, step, keys)

        world = self.world(1, moment=NOON)
        world.open_browser = Slow
        self.assertEqual(world.call("--mode", "ALL").code, 0)
        self.assertEqual(world.broker.codes, [totp(TOTP_SECRET, NOON + 30)])

    def test_key_that_may_have_gone(self) -> None:
        """The field went with its last digit: that counts as sent, but arrival proves nothing."""
        class Doubtful(SharedBrowser):
            def type(self, view: upstox_tokens.View, step: str, keys: str) -> bool:
                return super().type(view, step, keys) and (step != "pin" or len(keys) > 1)

        world = self.world(3, moment=NOON, pin_answer=["", "1017999"])
        world.open_browser = Doubtful
        done = world.call("--mode", "ALL")
        self.check(world, done, 3, ["", "something went wrong.*PIN had been sent"], (1, 1, 2))
        self.assertNotIn(("PRIMARY", "PIN_TAKEN"), world.audit())
        self.check_nothing_tried(world)


class PrivacyTest(LoginCase):
    """What nobody else gets to see."""

    def test_redirect_and_proxy(self) -> None:
        """The redirect reaches neither a server at its address nor a proxy."""
        world = self.world()
        proxy, given, given6 = Listener(), Listener(), None
        given6 = Listener("::1", given.port)
        # addresses of their own, since the default ports of 127.0.0.1 may be somebody's
        plain, tls = (f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.7" for _ in range(2))
        listeners = [proxy, given, given6]
        with contextlib.suppress(PermissionError):  # only then these two show less
            listeners += [Listener(plain, 80), Listener(plain, 443), Listener(tls, 443)]
        for listener in listeners:
            self.enter(listener)
        uris = ["http://vega.trader.example/api/v1/auth/upstox/callback",
                f"https://localhost:{given.port}/cb",
                f"http://127.0.0.1:{given.port}/cb?from=x&y=%2F", f"http://{plain}/cb",
                f"https://{tls}", f"http://[::1]:{given.port}"]
        # only in the database can every app have a redirect URI of its own
        self.assertEqual(world.call("--import-config").code, 0)
        for name, uri in zip(APPS, uris):
            world.sql(f"{UPDATE} redirect_uri = '{uri}' WHERE api_name = '{name}'")
            world.broker.switches.by_app[name] = {"redirect_uri": uri}
        world.write_env(UPSTOX_CONFIG_SOURCE="DB", UPSTOX_REDIRECT_URI=None)
        address = f"http://127.0.0.1:{proxy.port}"
        proxies = {f"{name}_proxy": address for name in ("http", "https", "all", "ftp")}
        proxies |= {name.upper(): address for name in proxies}
        done = world.process("--mode", "ALL", env=proxies | {"no_proxy": None, "NO_PROXY": None})
        self.assertEqual(done[:2], (0, ALL_VALID), done.err)
        self.assertEqual([row["redirect_uri"] for row in world.rows()], uris)
        self.assertEqual([listener.got for listener in listeners[1:]], [[]] * len(listeners[1:]))
        # the browser's own traffic may use the proxy, what belongs to the login may not
        ours = re.compile(rb"code=|trader|localhost|127\.|\[::1")
        self.assertEqual(list(filter(ours.search, proxy.got)), [])

    def test_evidence(self) -> None:
        """The picture of a failed login is the same, whichever number or code was typed; the page's
        scripts, which watch all that is handed to them, are told nothing that was not typed.
        """
        rows = [("mobile_answer", "1017016"), slow(("otp_answer", "hang"))]
        self.table(self.compare_evidence, rows)

    def compare_evidence(self, row: Any) -> None:
        switch, answer = row
        world = self.world(1, moment=NOON, hooks=True, resend_seconds=0, toast_ms=60_000)
        setattr(world.broker.switches, switch, answer)
        pictures = []
        for folder, mobile in (("first", "6000000001"), ("second", "9876598765")):
            world.write_env(UPSTOX_MOBILE_NUMBER=mobile if switch == "mobile_answer" else MOBILE)
            world.call("--mode", "ALL", "--debug-dir", world.folder / folder)
            pictures.append(self.evidence(world, world.folder / folder))
        self.assertEqual(*pictures)
        typed = world.broker.codes or [
            request.data["mobileNumber"] for request in world.broker.asked("mobile")]
        self.assertEqual(len(set(typed)), 2)
        told = "\n".join(request.body.decode() for request in world.broker.asked("heard"))
        self.assertIn(typed[0], told, "the page watches")
        for secret in world.broker.secrets() - {MOBILE, *typed}:
            self.assertNotIn(secret, told)

    def evidence(self, world: World, folder: Path) -> bytes:
        """The picture; its path is told, nobody else may read it, and the text has no digit."""
        files = {path.suffix: path for path in folder.iterdir()}
        self.assertEqual(sorted(files), [".png", ".txt"])
        self.assertIn(str(files[".png"]), world.err.getvalue())
        self.assertEqual({path.stat().st_mode & 0o077 for path in files.values()}, {0})
        text = files[".txt"].read_text()
        self.assertIn("Contact us", text)
        self.assertNotRegex(text, r"\d")
        return files[".png"].read_bytes()


@unittest.skipUnless(shutil.which("Xvfb"), "Xvfb is missing, install with: sudo apt install xvfb")
class HeadedTest(LoginCase):
    """A CAPTCHA in front of an operator, in a visible browser on a display of the test's own."""

    def setUp(self) -> None:
        super().setUp()
        self.enter(mock.patch.object(World, "open_browser", upstox_tokens.Browser))
        self.display = self.enter(display())

    def operator(self, world: World) -> None:
        """Reads the request, and solves the CAPTCHA later than a headless run waits."""
        world.until(lambda: "solve the CAPTCHA" in world.err.getvalue(), 60)
        asked = world.broker.count("mobile")
        world.broker.pause(1.5)
        self.assertEqual(world.broker.count("mobile"), asked)
        world.broker.captcha_solved.set()

    def test_menu_reopens_visibly(self) -> None:
        """Whatever the CAPTCHA looks like."""
        self.table(self.reopen, ["page", slow("frame"), slow("div"), slow("explicit")], workers=2)

    def reopen(self, form: str) -> None:
        """Not without a display, nor against the operator's will, and only for what is left; the
        exit code stays the run's.
        """
        with World(3, moment=NOON, remember=False, captcha="never", captcha_form=form, by_app={
                "PRIMARY": {"captcha": None}, "WEBSOCKET1": {"profile_answer": "503"}}) as world:
            world.seed_valid("WEBSOCKET1")
            # display, answers, prompts, exit code, browsers in all
            for screen, answers, prompts, browsers in ((None, ["2", "y"], 1, 1),
                                                       (self.display, ["2"], 2, 2)):
                done = world.call(answers=answers, DISPLAY=screen)
                self.assertEqual((done.code, len(world.prompts), world.browsers()),
                                 (3, prompts, browsers), done.out)
                self.assertNotIn("Aborted", done.out)
            world.sql("DELETE FROM upstox_tokens WHERE api_name = 'PRIMARY'")
            with meanwhile(lambda: self.operator(world)):
                done = world.call(answers=["2", "y"], DISPLAY=self.display)
            self.assertTrue(done.out.endswith(summary(
                PRIMARY="VALID", WEBSOCKET1="UNKNOWN (503)", WEBSOCKET2="VALID")), done.out)
            self.assertEqual((done.code, world.browsers(), world.sent()), (1, 4, (3, 3, 3)))
            self.assertEqual(world.broker.logins, ["PRIMARY", "PRIMARY", "WEBSOCKET2"])

    def test_nobody_solves(self) -> None:
        with mock.patch.multiple(upstox_tokens, CAPTCHA_HEADED_SECONDS=1):
            world = self.world(2, moment=NOON, captcha="never", captcha_form="page")
            done = world.call("--mode", "ALL", "--headed", DISPLAY=self.display)
            self.check(world, done, 3, ["nobody solved the CAPTCHA in time"], (0, 0, 0))


# ==== The HTTP API: requests, access, hostile requests, the status, jobs ==========================

HOOK, ORIGIN, VITE = "/hook/Zr5tqB81x", "https://desk.example.com", "http://localhost:5173"
RIGHT, JSON = {"Authorization": f"Bearer {KEY}"}, {"Content-Type": "application/json"}
TWO = ["WEBSOCKET2", "OPTIONCHAIN2"]
NO_LOGIN = dict.fromkeys(("UPSTOX_MOBILE_NUMBER", "UPSTOX_PIN", "UPSTOX_TOTP"))
SOON, LATE = {"SHARED_SECONDS": 0.3}, {"SHARED_SECONDS": 600}  # until a check is made anew


class Asked(NamedTuple):
    """A request and its answer: code, the whole sentence of an error, headers (None: not there)."""

    line: str
    code: int
    error: str = ""
    send: Mapping[str, Any] = {}
    body: Any = None
    shows: Mapping[str, str | None] = {}


def gets(code: int, error: str, *paths: str, **more: Any) -> list[Asked]:
    return [Asked(f"GET {path}", code, error, **more) for path in paths]


def posts(code: int, error: str, *bodies: Any, send: Mapping[str, Any] = JSON) -> list[Asked]:
    return [Asked(f"POST {GENERATE}", code, error, send, body) for body in bodies]


def other_methods(methods: str, path: str, allowed: str) -> list[Asked]:
    error, shows = f"use {allowed.split(',')[0]}", {"Allow": allowed}
    return [Asked(f"{method} {path}", 405, error, shows=shows) for method in methods.split()]


BUSY = "Another run is busy generating tokens for this database. Try again when it has ended."
MODE_IS = "mode must be one of ALL, INVALID_ONLY, PARTIAL"
NAMES_ARE = "apiNames must be a list of API names"
NAMES_FOR = "apiNames are needed for mode PARTIAL, and only there"
NO_JSON, NOT_SENT = "the body is not JSON", "send application/json"
NO_LENGTH, TOO_SHORT = "a Content-Length is needed", "the body is shorter than announced"
TOO_LARGE = "the body is larger than 64 KiB"
KEY_NO, HOST_NO = "the key is missing or wrong", "this Host is not served here"
ORIGIN_NO = "this Origin is not allowed; see UPSTOX_ALLOWED_ORIGINS"

REQUESTS = [  # to a server without a key, whose configuration has no credentials and no notifier
    *gets(200, "", "/healthz", STATUS, STATUS + "?x=/../y", "/healthz?" + "x" * 60000, "/"),
    Asked("HEAD /", 200), Asked(f"HEAD {STATUS}", 200),
    *gets(404, "not found", "/x", "/auth", "/index.html", "/vega_trade.db", "/healthz/", HOOK, *(
        TOKENS + tail for tail in ("", "statusx", "status/", "STATUS", "jobs/", "jobs/latest/x"))),
    *gets(404, "no such job", TOKENS + "jobs/0123456789abcdef", LATEST),
    *other_methods("POST PUT DELETE PATCH TRACE OPTIONS", STATUS, "GET, HEAD, OPTIONS"),
    *other_methods("GET PUT DELETE PATCH", GENERATE, "POST, OPTIONS"),
    *posts(400, NO_JSON, b"", b"{", b"mode=ALL", b"\xff\xfe\xff", b'{"mode": "ALL"} x',
           b"[" * 60000, b'{"mode": ' + b"[" * 30000 + b"]" * 30000 + b"}"),
    *posts(400, MODE_IS, b"NaN", b"null", [], ["ALL"], "ALL", 7, True, {},
           *({"mode": mode} for mode in (None, "SOME", "all", ["ALL"], {"ALL": 1}, 1))),
    *posts(400, "flow must be one of SELENIUM, V3",
           *({"mode": "ALL", "flow": flow} for flow in ("FAX", "v3", 3, ["V3"], None))),
    *posts(400, NAMES_ARE, *({"mode": "PARTIAL", "apiNames": names} for names in (
        "PRIMARY", {"PRIMARY": 1}, 7, None, [1], [["PRIMARY"]], ["PRIMARY", None]))),
    *posts(400, NAMES_FOR, {"mode": "PARTIAL"}, {"mode": "PARTIAL", "apiNames": []},
           *({"mode": mode, "apiNames": ["PRIMARY"]} for mode in ("ALL", "INVALID_ONLY"))),
    *(row for said, *names in (["FOO"], ["FOO", "PRIMARY"], ["1"], ["PRIMARY,WEBSOCKET1"], ["x x"])
      for row in posts(400, f"apiNames: {said} is not one of {', '.join(APPS)}",
                       {"mode": "PARTIAL", "apiNames": [*names, said]})),
    *posts(400, "", *({"mode": "PARTIAL", "apiNames": [name]}
                      for name in ("\ud800", "", "\0", APPS["PRIMARY"][1]))),
    *posts(400, " ".join(f"{key}: is not set; flow SELENIUM needs it." for key in NO_LOGIN),
           {"mode": "ALL"}, {"mode": "PARTIAL", "apiNames": ["PRIMARY"], "flow": "SELENIUM"}),
    *posts(400, "UPSTOX_NOTIFIER_WEBHOOK_URI: is not set; flow V3 needs it.",
           {"mode": "ALL", "flow": "V3"}),
    *posts(400, MODE_IS, b"{}".ljust(65536)),
    *posts(413, TOO_LARGE, b"{}".ljust(65537), b"{}".ljust(200000)),
    *(row for kind in ("text/plain", "application/x-www-form-urlencoded", "", "json",
                       "multipart/form-data; boundary=x", "text/plain; application/json",
                       "application/jsonx")
      for row in posts(415, NOT_SENT, b'{"mode": "ALL"}', send={"Content-Type": kind})),
    *posts(415, NOT_SENT, b'{"mode": "ALL"}', send={}),
]

ALLOW = "Access-Control-Allow-Origin"
FOREIGN_HOSTS = (
    "desk.example.com:{port}", "[::2]", "[", "a b", "", "localhost.example.com", "evil-localhost",
    "desk.localhost.example.com", "169.254.169.254", "{own}", "127.0.0.1.example.com:{port}",
    "127.example.com", "::1.example.com", "example.com/@127.0.0.1:{port}")
FOREIGN_ORIGINS = (
    "null", "", "*", "https://example.com", "http://desk.example.com", ORIGIN + ":444",
    ORIGIN + ".example.org", "https://127.0.0.1:{port}", "http://localhost:{port}")


def with_origin(origin: str, listed: bool) -> list[Asked]:
    """Every route with this Origin, allowed as a listed one or as the page's own."""
    shows = {ALLOW: origin, "Vary": "Origin", "Access-Control-Expose-Headers": "Location"}
    more = {"send": {"Origin": origin}, "shows": shows if listed else dict.fromkeys(shows)}
    return [*gets(200, "", STATUS, "/healthz", "/", **more),
            *gets(404, "no such job", LATEST, **more),
            *posts(400, MODE_IS, {}, send=JSON | {"Origin": origin})]


def refused_with(code: int, error: str, header: str, value: Any, **more: Any) -> list[Asked]:
    """The routes of tokens with this header's value."""
    return [*gets(code, error, STATUS, LATEST, send={header: value}, **more),
            *posts(code, error, {"mode": "ALL"}, send=JSON | {header: value})]


OPEN_ACCESS = [  # no key; ORIGIN and VITE are listed
    *(row for host in ("127.0.0.1", "localhost", "LocalHost", "[::1]", "desk.localhost",
                       "127.0.0.2")
      for row in gets(200, "", "/", "/healthz", STATUS, send={"Host": host + ":{port}"})),
    *gets(403, HOST_NO, "/", "/healthz", send={"Host": "desk.example.com"}),
    *gets(403, ORIGIN_NO, "/", "/healthz", send={"Origin": "https://example.com"}),
    *(row for host in FOREIGN_HOSTS for row in refused_with(403, HOST_NO, "Host", host)),
    *(row for origin in FOREIGN_ORIGINS
      for row in refused_with(403, ORIGIN_NO, "Origin", origin, shows={ALLOW: None})),
    *with_origin(ORIGIN, True), *with_origin(VITE, True),
    *with_origin("http://127.0.0.1:{port}", False), *gets(200, "", STATUS, shows={ALLOW: None}),
]
WRONG_KEYS: tuple[str | bytes, ...] = (
    "", "Bearer", "Bearer ", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}",
    "Bearer k\xe9y", f"Bearer {KEY.upper()}", f"Bearer {KEY} {KEY}", b"Bearer \xd0\xba\xd0\xff",
    "Bearer " + "x" * 60000)
BEARER = {"WWW-Authenticate": "Bearer"}
PREFLIGHT = {"Origin": ORIGIN, "Access-Control-Request-Headers": "authorization,content-type"}
KEY_ACCESS = [  # a key is set, ORIGIN is listed
    *gets(200, "", "/", "/healthz"), *gets(200, "", STATUS, send=RIGHT),
    *gets(404, "no such job", LATEST, send=RIGHT), *posts(400, MODE_IS, {}, send=JSON | RIGHT),
    *(row for key in WRONG_KEYS
      for row in refused_with(401, KEY_NO, "Authorization", key, shows=BEARER)),
    *gets(401, KEY_NO, STATUS, TOKENS + "x", "/auth/x", shows=BEARER),
    Asked(f"DELETE {STATUS}", 401, KEY_NO),
    *gets(401, KEY_NO, STATUS, send={"Origin": ORIGIN}, shows={ALLOW: ORIGIN}),  # a page reads why
    *(Asked(f"OPTIONS {path}", 204, "", PREFLIGHT | {"Access-Control-Request-Method": method},
            shows={ALLOW: ORIGIN, "Access-Control-Allow-Methods": method, "Vary": "Origin",
                   "Access-Control-Allow-Private-Network": "true",
                   "Access-Control-Allow-Headers": "Authorization, Content-Type"})
      for path, method in ((STATUS, "GET"), (GENERATE, "POST"), (LATEST, "GET"))),
    *(Asked(f"OPTIONS {path}", 403, ORIGIN_NO, PREFLIGHT | {"Origin": VITE}, shows={ALLOW: None})
      for path in (STATUS, GENERATE)),
]
V6_ACCESS = [*gets(200, "", STATUS, send={"Host": "[::1]:{port}"}),
             *gets(403, HOST_NO, STATUS, send={"Host": "[::2]:{port}"})]
FAR_ACCESS = [  # listening everywhere, with a key
    *gets(200, "", STATUS, send=RIGHT), *gets(401, KEY_NO, STATUS),
    *gets(403, HOST_NO, STATUS, send=RIGHT | {"Host": "10.9.8.7:{port}"})]


def own_address() -> str:
    """This machine's address in its network, without asking anybody; empty when it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as place, contextlib.suppress(OSError):
        place.connect(("192.0.2.254", 9))
        return place.getsockname()[0]
    return ""


def raw(address: tuple[str, int], sent: bytes) -> Got:
    """Send these bytes and no more; an answer of code 0 is none."""
    with socket.create_connection(address, 60) as connection:
        with contextlib.suppress(OSError):  # answered before all was said
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        answer = http.client.HTTPResponse(connection)
        try:
            answer.begin()
        except (http.client.BadStatusLine, OSError):
            return Got(0, http.client.HTTPMessage(), "")
        return Got(answer.status, answer.headers, answer.read().decode())


class WebCase(Case):
    """What the tests behind HTTP share."""

    def place(self, world: World) -> str:
        """Where its server listens, unless a test says otherwise."""
        return "127.0.0.1:0"

    def served(self, *argv: str, seed: Callable[[World], object] = lambda world: None,
               at: str = "", limits: Mapping[str, float] | None = None, **options: Any) -> World:
        """A world with a server; `seed` puts tokens there first."""
        world = self.world(**options)
        seed(world)
        world.serve(at or self.place(world), *argv, limits=limits)
        return world

    def answers(self, world: World, rows: Iterable[Asked]) -> None:
        """Each row's answer is as it says, and no run has begun."""
        port, own = str(world.address[1]), own_address()

        def filled(texts: Mapping[str, Any]) -> dict[str, Any]:
            return {name: text.replace("{port}", port).replace("{own}", own)
                    if isinstance(text, str) else text for name, text in texts.items()}

        def work(row: Asked) -> None:
            got = world.ask(*row.line.split(" ", 1), row.body, filled(row.send))
            self.assertEqual(got.code, row.code, got.text)
            if row.error:
                self.assertEqual(got.json, {"error": row.error})
            for name, value in filled(row.shows).items():
                self.assertEqual(got.headers[name], value, name)

        self.table(work, rows, workers=4)
        self.assertEqual(world.broker.count("dialog") + world.broker.count("v3"), 0)

    def ends_soon(self, world: World, signum: int) -> None:
        """Within 5 s of the signal, and nobody listens there any more."""
        began = time.monotonic()
        world.stop(signum)
        self.assertLess(time.monotonic() - began, 5)
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection(world.address, 5)


class RequestTest(WebCase):
    def test_answers(self) -> None:
        """Who may ask is decided at the start: what the env file says later does not count."""
        keyed = {"UPSTOX_ALLOWED_ORIGINS": ORIGIN, "UPSTOX_SERVE_KEY": KEY}
        for rows, at, env in (
                (REQUESTS, "", NO_LOGIN),
                (OPEN_ACCESS, "",
                 {"UPSTOX_ALLOWED_ORIGINS": f"{VITE}, https://Desk.Example.com:443/,"}),
                (V6_ACCESS, "[::1]:0", {}), (V6_ACCESS, "::1:0", {}), (KEY_ACCESS, "", keyed),
                (FAR_ACCESS, "0.0.0.0:0", keyed)):
            world = self.served(seed=World.seed_valid, at=at, env=env, dialog_answer="100068")
            world.write_env(UPSTOX_SERVE_KEY=KEY[::-1], UPSTOX_ALLOWED_ORIGINS="")
            self.answers(world, rows)
        if own_address():  # the last one, asked at the machine's own address
            world.address = (own_address(), world.address[1])
            self.answers(world, gets(200, "", STATUS, "/", send=RIGHT))


def head(line: str, *headers: str) -> bytes:
    return "\r\n".join([line, "Host: localhost", *headers, "", ""]).encode("latin-1")


def generate(body: bytes, *headers: str) -> bytes:
    return head(f"POST {GENERATE} HTTP/1.1", "Content-Type: application/json", *headers) + body


SOME, CHUNKS = b'{"mode": "SOME"}', b'10\r\n{"mode": "SOME"}\r\n0\r\n\r\n'
HOSTILE: list[tuple[bytes, tuple[int, ...], str]] = [  # what is sent, codes it may have, sentence
    (generate(SOME, "Content-Length: 16"), (400,), MODE_IS),
    *((generate(SOME, f"Content-Length: {length}"), (400,), NO_LENGTH) for length in (
        "-1", "0x10", "+16", "\xb2", "1_6", "16, 3", "")), (generate(SOME), (400,), NO_LENGTH),
    (generate(SOME, "Content-Length: 60000"), (400,), TOO_SHORT),
    (generate(SOME, "Content-Length: 99999999999999999"), (413,), TOO_LARGE),
    (generate(SOME, "Content-Length: " + "9" * 5000), (400,), NO_LENGTH),
    (generate(SOME, "Content-Length: 16", "Content-Length: 3"), (400,), ""),
    (generate(CHUNKS, "Transfer-Encoding: chunked"), (400,), NO_LENGTH),
    (generate(CHUNKS, "Transfer-Encoding: chunked", "Content-Length: 16"), (400,), NO_LENGTH),
    *((head(f"GET {path} HTTP/1.1"), (400, 403, 404), "") for path in (
        "//", "//healthz", "/x/../healthz", "/../../etc/passwd", "/%2e%2e/healthz", "/healthz%00",
        "/healthz\0", "/%68ealthz", "/healthz;x", "\\healthz", "healthz", "*", "/\xe9",
        "/" + "x" * 60000, "/healthz/..", "http://localhost/healthz", "http://example.com/")),
    *((head(f"{method} / HTTP/1.1"), (405,), "unknown method") for method in (
        "BREW", "get", "__init__", "respond")),
    (head("CONNECT example.com:443 HTTP/1.1"), (400, 403, 404, 405), ""),
    (head("POST ?x HTTP/1.1", "Content-Length: 0"), (404,), "not found"),
    (head("GET\t/healthz\tHTTP/1.1"), (200, 400), ""),
    (head("GET  /healthz  HTTP/1.1"), (200, 400, 404), ""),
    (head("GET / HTTP/9.9"), (400, 505), ""),
    *((head(line), (400,), "") for line in ("GET / FTP/1.0", "GET / x HTTP/1.1", "GET", "POST /")),
    (b"\0\xff\x16\x03\x01\r\n\r\n", (400,), ""), (b"GET / HTTP/1.0\r\n\r\n", (403,), HOST_NO),
    (head("GET /" + "x" * 100000 + " HTTP/1.1"), (400, 414), ""),
    (head("GET / HTTP/1.1", *(f"X-{n}: {'x' * 500}" for n in range(5000))), (400, 431), ""),
    (head("GET / HTTP/1.1", "X: " + "x" * 100000), (400, 431), ""),
    (head("GET /healthz HTTP/1.1", "no colon"), (200, 400), ""),
    (head("GET /healthz HTTP/1.1", "Expect: 100-continue"), (200,), ""),
    *((sent, (0, 400, 403), "") for sent in (
        b"", b"\r\n", b"GET /healthz\r\n\r\n", b"GET / HTTP/1.1\r\n", b"\xff" * 100)),
]


class HostileTest(WebCase):
    def test_hostile_requests(self) -> None:
        """Each is answered at once with a sentence, or with nothing; none costs anything."""
        world = self.served()

        def work(row: tuple[bytes, tuple[int, ...], str]) -> None:
            began = time.monotonic()
            got = world.check_got(raw(world.address, row[0]))
            self.assertIn(got.code, row[1], got.text)
            self.assertLess(time.monotonic() - began, 8)
            self.assertEqual("Allow" in got.headers, got.code == 405)
            if got.code >= 400:
                self.assertRegex(got.json["error"], re.escape(row[2]) or r"\w")

        self.table(work, HOSTILE, workers=4)
        with socket.create_connection(world.address, 60) as connection:
            connection.sendall(head("HEAD /healthz HTTP/1.1", "Connection: close"))
            self.assertTrue(connection.makefile("rb").read().endswith(b"\r\n\r\n"), "a body")
        # an answer is not lost on a client that first says all it has to say
        self.assertEqual(world.ask("POST", GENERATE, b"x" * 10485760, JSON).code, 413)
        self.assertEqual((world.ask("GET", LATEST).code, world.broker.requests), (404, []))

    def test_slow_clients_block_nobody(self) -> None:
        """200 that say little or nothing, 20 that read a byte: others are served, the end comes
        while a check hangs.
        """
        world = self.served(seed=World.seed_valid, limits={"SHARED_SECONDS": 0})
        with contextlib.ExitStack() as stack:
            for number in range(200):
                connection = stack.enter_context(socket.create_connection(world.address, 30))
                connection.sendall((b"", b"G", head("GET / HTTP/1.1")[:-1])[number % 3])
            for _ in range(20):
                connection = stack.enter_context(socket.socket())
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                connection.connect(world.address)
                connection.sendall(head("GET / HTTP/1.1"))
                connection.recv(1)
            for path in (STATUS, "/healthz", "/"):
                began = time.monotonic()
                self.assertEqual(world.ask("GET", path).code, 200)
                self.assertLess(time.monotonic() - began, 2)
            world.broker.switches.profile_answer = "hang"
            connection = stack.enter_context(socket.create_connection(world.address))
            connection.sendall(head(f"GET {STATUS} HTTP/1.1"))
            world.until(lambda: world.broker.count("profile") == 12)
            self.ends_soon(world, signal.SIGINT)


class StatusTest(WebCase):
    def test_status(self) -> None:
        """All of the answer, a BLOB as text; the command line says the same; nothing is written."""
        world = self.served(seed=World.seed_guide, limits=SOON)
        stored = {row["api_name"]: row for row in world.rows()}
        stored["PRIMARY"]["generated_at"] = None
        world.sql("UPDATE upstox_tokens SET generated_at = NULL, "
                  "validity_at = CAST(validity_at AS BLOB) WHERE api_name = 'PRIMARY'")
        before, began = world.snapshot(), local_text(time.time())
        got = world.ask()
        self.assertEqual((got.code, got.headers["Content-Type"], got.headers["Cache-Control"]),
                         (200, "application/json", "no-store"))
        words = ("VALID", "VALID", "INVALID", "EXPIRED", "VALID", "NOT FOUND")
        tokens = [{"apiName": name, "status": word, "lastAttempt": None,
                   "reason": "401" if word == "INVALID" else "",
                   "validityAt": stored.get(name, {}).get("validity_at"),
                   "generatedAt": stored.get(name, {}).get("generated_at")}
                  for name, word in zip(APPS, words)]
        self.assertTrue(began <= got.json["checkedAt"] <= local_text(time.time()))
        self.assertEqual([*got.json.items()], [
            ("valid", ["PRIMARY", "WEBSOCKET1", "OPTIONCHAIN1"]),
            ("invalid", ["WEBSOCKET2", "WEBSOCKET3"]), ("missing", ["OPTIONCHAIN2"]),
            ("unknown", []), ("checkedAt", got.json["checkedAt"]), ("hold", None),
            ("tokens", tokens)])
        done = world.call("--status", "--json")
        self.assertEqual((done.code, done.err, json.loads(done.out) | {"checkedAt": ""}),
                         (1, "", got.json | {"checkedAt": ""}))
        self.assertEqual(world.snapshot() | {"server.log": ""}, before | {"server.log": ""})
        world.broker.switches.by_app = {"PRIMARY": {"profile_answer": "503"}}
        later = world.until(lambda: (report := world.ask().json)["unknown"] and report)
        self.assertEqual((later["unknown"], later["valid"]),
                         (["PRIMARY"], ["WEBSOCKET1", "OPTIONCHAIN1"]))
        self.assertEqual([*later["tokens"][0].values()][1:3], ["UNKNOWN", "503"])

    def test_simultaneous_requests_share_one_check(self) -> None:
        """50 at once cost six profile calls, the next none; after 5 s it is checked again."""
        world = self.served(seed=World.seed_valid, profile_delay=0.3)
        answers = crowd(50, lambda _: world.ask())
        self.assertEqual({(got.code, got.text) for got in answers}, {(200, answers[0].text)})
        began = time.monotonic()
        self.assertEqual((world.ask().text, world.broker.count("profile")), (answers[0].text, 6))
        world.until(lambda: world.ask() and world.broker.count("profile") == 12, 8)
        self.assertGreater(time.monotonic() - began, 3)

    def test_database_faults(self) -> None:
        """Failing checks are shared: 20 requests wait for one patience with a locked database."""
        world = self.served(seed=World.seed_valid, limits=LATE | {"READ_SECONDS": 1})

        def assert_told(got: Got, words: str) -> None:
            self.assertEqual(got.code, 503)
            self.assertTrue(got.json["error"].startswith(f"The database {world.db} {words}"))

        world.lock(kind="EXCLUSIVE")
        began, status = time.monotonic(), head(f"GET {STATUS} HTTP/1.1")
        answers = crowd(20, lambda _: raw(world.address, status))
        self.assertLess(time.monotonic() - began, 5)
        world.unlock()
        self.assertEqual({got.text for got in answers}, {answers[0].text})
        assert_told(answers[0], LOCKED)
        world.db.write_bytes(b"no database" * 100)
        assert_told(world.post({"mode": "ALL"}), NO_DATABASE)
        assert_told(world.ask(), NO_DATABASE)
        world.db.unlink()
        self.assertEqual(len(world.ask().json["missing"]), 6)

    def test_configuration_is_read_anew(self) -> None:
        """What is broken and mended while the server runs counts for the next run and check."""
        world = self.served(seed=World.seed_valid, limits=SOON, dialog_answer="100068")
        wrong = world.write_env(UPSTOX_PIN="74921x", UPSTOX_TOTP="!?!?").read_text()
        right = world.write_env().read_text()
        for text, mode, words in (
                (wrong, 0o600, "UPSTOX_PIN: .*UPSTOX_TOTP: "),
                (right + "oops\n", 0o600, r"\.env, line \d+"), (right, 0o644, "chmod 600 "),
                ("", 0o600, "UPSTOX_CLIENT_ID_0")):
            with self.subTest(words):
                world.write_env(text).chmod(mode)
                got = world.post({"mode": "ALL"})
                self.assertEqual(got.code, 400)
                self.assertRegex(got.json["error"], words)

        def becomes(code: int, shows: Callable[[Any], bool]) -> None:
            world.until(lambda: (got := world.ask()).code == code and shows(got.json))

        becomes(503, lambda answer: "UPSTOX_CLIENT_ID_0" in answer["error"])
        world.write_env(UPSTOX_CLIENT_ID_0="0" * 36).chmod(0o600)
        becomes(200, lambda answer: answer["tokens"][0]["reason"] == "client changed")
        world.names = ["PRIMARY"]
        world.write_env()
        self.assertEqual(world.post({"mode": "PARTIAL", "apiNames": ["WEBSOCKET1"]}).json,
                         {"error": "apiNames: WEBSOCKET1 is not one of PRIMARY"})
        becomes(200, lambda answer: (answer["valid"], answer["invalid"]) == (["PRIMARY"], []))
        self.assertEqual(world.ask("GET", LATEST).code, 404)


class JobTest(WebCase):
    def test_jobs(self) -> None:
        """(body, apps); the broker knows none of the apps, so no browser is needed."""
        world = self.served(seed=World.seed_guide, limits=SOON, dialog_answer="100068")
        before, ids = world.tokens(), []
        for body, names in (({"mode": "ALL"}, [*APPS]), ({"mode": "INVALID_ONLY"}, RENEWED),
                            ({"mode": "PARTIAL", "apiNames": ["OPTIONCHAIN2", "PRIMARY", "PRIMARY"],
                              "flow": "SELENIUM"}, ["PRIMARY", "OPTIONCHAIN2"])):
            with self.subTest(**body):
                got = world.post(body, **{"Content-Type": "application/json; charset=utf-8"})
                ids.append(got.json["jobId"])
                self.assertEqual((got.code, [*got.json.items()], got.headers["Location"]), (
                    202, [("jobId", ids[-1]), ("state", "RUNNING"), ("apiNames", names)],
                    f"{TOKENS}jobs/{ids[-1]}"))
                job = world.ended(ids[-1])
                said = f"0 of {len(names)} generated. {names[0]}: failed: {UNREGISTERED}"
                results = [{"apiName": name, "state": "FAILED", "message": UNREGISTERED}
                           for name in names]
                self.assertEqual([*job.items()], [("jobId", ids[-1]), ("state", "FAILED"),
                                                  ("message", said), ("results", results)])
                self.assertEqual(world.job(), job)
        self.assertEqual([world.job(name)["jobId"] for name in ids], ids)
        self.assertEqual(world.tokens(), before)

    def test_nothing_to_generate(self) -> None:
        """(valid apps, profile answer for PRIMARY) -> apps of the job, its end."""
        told = "Not generated, since the broker gave no verdict about it: PRIMARY."
        for valid, answer, names, end in (
                (6, None, [], ("DONE", "Nothing to do.")),
                (6, "503", [], ("FAILED", f"Nothing to do. {told}")),
                (5, "503", ["OPTIONCHAIN2"],
                 ("FAILED", f"0 of 1 generated. {told} OPTIONCHAIN2: failed: "))):
            with self.subTest(valid=valid, answer=answer):
                world = self.served(seed=lambda world: world.seed_valid(*[*APPS][:valid]),
                                    dialog_answer="100068",
                                    by_app={"PRIMARY": {"profile_answer": answer}})
                got = world.post({"mode": "INVALID_ONLY"})
                self.assertEqual((got.code, got.json["apiNames"]), (202, names))
                job = world.ended()
                self.assertEqual((job["state"], job["message"][:len(end[1])]), end)

    def test_one_run_at_a_time(self) -> None:
        """409 for others while a job or a run of the command line is at it; looking is free."""
        world = self.served(seed=World.seed_guide, dialog_delay=60)
        world.sql(REJECT)
        self.assertEqual(world.post({"mode": "ALL"}).code, 503)
        world.sql("DROP TRIGGER no")  # a run that could not begin is in nobody's way
        holder = world.start("--mode", "PARTIAL", "--apis", "PRIMARY")
        world.until(lambda: world.broker.count("dialog") == 1)
        self.assertEqual(world.post({"mode": "ALL"}).json, {"error": BUSY})
        self.assertEqual(world.ask("GET", LATEST).code, 404)
        self.assertIsNone(world.ask().headers["X-Job"])
        holder.kill()
        holder.wait()
        self.assertEqual(world.post({"mode": "PARTIAL", "apiNames": TWO}).code, 202)
        world.until(lambda: world.broker.count("dialog") == 3)
        answers = crowd(6, lambda _: world.post({"mode": "INVALID_ONLY"}))
        self.assertEqual([(got.code, got.json) for got in answers], [(409, {"error": BUSY})] * 6)
        self.assertEqual(world.process("--mode", "ALL").code, 4)
        self.assertEqual([result["apiName"] for result in world.job()["results"]], TWO)
        self.assertEqual(world.ask().headers["X-Job"], world.job()["jobId"])  # for every page
        self.assertEqual((len(world.ask().json["valid"]), world.broker.count("dialog")), (3, 3))
        world.server.kill()

    def test_hold(self) -> None:
        """Told in status and jobs; nothing is tried until the env file is mended."""
        world = self.served(seed=World.seed_old, limits=SOON, apps=1, dialog_answer="100068")
        remember(world, "PIN_SENT HOLD FAILED")  # a cron run of the night
        report = world.ask().json
        self.assertEqual((report["hold"], report["tokens"][0]["lastAttempt"]["source"]),
                         (NOTED, "CLI"))
        world.post({"mode": "ALL"})
        job = world.ended()
        self.assertEqual((job["state"], job["results"][0]["state"]), ("FAILED", "SKIPPED"))
        self.assertIsNone(world.ask().headers["X-Job"])
        self.assertIn(f"{NOTED}. {UNTIL}", job["message"])
        self.assertEqual(world.broker.count("dialog"), 0)
        world.write_env(UPSTOX_PIN="111222")
        world.until(lambda: world.ask().json["hold"] is None)
        world.post({"mode": "ALL"})
        self.assertIn(UNREGISTERED, world.ended()["message"])
        report = world.until(lambda: (found := world.ask().json)["tokens"][0]["lastAttempt"][
            "source"] == "REST" and found)
        self.assertEqual(report["tokens"][0]["lastAttempt"]["reason"], UNREGISTERED)


class ServerTest(WebCase):
    def test_page(self) -> None:
        """Nothing from outside, a new nonce each time, and the flow of the command line."""
        outside = r"""(?:src|href|action)=["']?(?:https?:)?//|url\(|@import|\son\w+="""
        for flow in ("SELENIUM", "V3"):
            world, nonces = self.served("--flow", flow, env=NO_LOGIN), set()
            for page in (world.ask("GET", "/"), world.ask("GET", "/")):
                self.assertEqual([page.headers[name] for name in (
                    "Content-Type", "X-Content-Type-Options", "Referrer-Policy", "Cache-Control")],
                    ["text/html; charset=utf-8", "nosniff", "no-referrer", "no-store"])
                policy = page.headers["Content-Security-Policy"].split("; ")
                nonce = re.search(r"'nonce-([\w-]{16,})'", str(policy))[1]
                self.assertEqual(sorted(policy), [
                    "base-uri 'none'", "connect-src 'self'", "default-src 'none'",
                    "form-action 'none'", "frame-ancestors 'none'", "img-src data:",
                    f"script-src 'nonce-{nonce}'", f"style-src 'nonce-{nonce}'"])
                self.assertEqual(re.findall("<(?:script|style)[^>]*>", page.text),
                                 [f'<style nonce="{nonce}">', f'<script nonce="{nonce}">'])
                self.assertNotRegex(page.text, rf"{outside}|NONCE|\bFLOW\b")
                self.assertEqual(set(re.findall("'(SELENIUM|V3)'", page.text)), {flow})
                nonces.add(nonce)
            self.assertEqual(len(nonces), 2)

    def test_addresses_that_cannot_be_used(self) -> None:
        """(address, the one line) -> exit 2 before anything is done."""
        far = "error: UPSTOX_SERVE_KEY: is not set; serving beyond loopback needs it"
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            rows = [*((address, f"error: --serve: {address} is not HOST:PORT") for address in (
                "nonsense", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536",
                "127.0.0.1:-1", "http://127.0.0.1:0")),
                ("", "error: "), ("127.0.0.1:0:0", "error: "),
                *((address, far) for address in (
                    "0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.com:0")),
                *((f"{host}:{port}", f"error: --serve: cannot listen on {host}:{port}: Address "
                   "already in use. Choose another port") for host in ("127.0.0.1", "localhost")),
                ("ü..localhost:0",
                 "error: --serve: cannot listen on ü..localhost:0: not an address. Choose another")]
            world = self.world()

            def work(row: tuple[str, str]) -> None:
                done = world.process("--serve", row[0])
                self.assertEqual((done.code, done.out, done.err[:len(row[1])]), (2, "", row[1]))
                self.assertEqual(len(done.err.splitlines()), 1)

            self.table(work, rows, workers=3)
        self.assertFalse(world.db.exists())

    def test_bugs(self) -> None:
        """Told by their kind, not by their words; a client that went away is none."""
        world = self.served(apps=1, dialog_answer="100068", profile_delay=0.3,
                            seed=World.seed_valid, limits={"CLOCK_SECONDS": None})
        with socket.create_connection(world.address) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(head(f"GET {STATUS} HTTP/1.1"))
            world.until(lambda: world.broker.count("profile"))
        self.assertEqual(world.ask().code, 200)
        self.assertEqual(world.post({"mode": "ALL"}).code, 202)
        words = "the run was ended by an internal error or a signal"
        world.until(lambda: words in raw(world.address, head(f"GET {LATEST} HTTP/1.1")).text)
        told = world.until(lambda: world.log.read_text().splitlines()[1:])
        self.assertEqual(told, ["internal error: TypeError"])
        world = self.served(limits={"SHARED_SECONDS": None})
        got = raw(world.address, head(f"GET {STATUS} HTTP/1.1"))
        self.assertEqual((got.code, got.json), (500, {"error": "internal error"}))
        self.assertEqual(world.log.read_text().splitlines()[1:], ["internal error: TypeError"])

    def test_log_of_requests(self) -> None:
        """With -v a line a request, without query and control characters; else none."""
        for argv, lines in ((["-v"], 4), ([], 2)):
            world = self.served(*argv, env={"UPSTOX_SERVE_KEY": KEY})
            line = f"GET /x\x7f\x1b[2J{KEY}?later HTTP/1.1"
            raw(world.address, head(line, f"Authorization: Bearer {KEY}"))
            world.ask(headers=RIGHT)
            said = world.stop()
            self.assertEqual(len(said.splitlines()), lines, said)  # Serving, requests, stopped
            self.assertNotRegex(said, r"[\x1b\x7f]|later")
            self.assertEqual(f"127.0.0.1 GET {STATUS} 200" in said, bool(argv))


class BrowserJobTest(BrowserCase, WebCase):
    @unittest.skipUnless(shutil.which("Xvfb"), "Xvfb is not installed")
    def test_two_tokens(self) -> None:
        """Live progress, others kept out, and the next status is not one from before the job.

        --headed: it waits for a person to solve a CAPTCHA, says so, and goes on by itself.
        """
        world = self.world(step_delay=0.15, captcha="never")
        world.seed_guide()
        world.serve("127.0.0.1:0", "--headed", env={"DISPLAY": self.enter(display())}, limits=LATE)
        self.assertEqual(world.ask().json["missing"], ["OPTIONCHAIN2"])
        job = world.post({"mode": "PARTIAL", "apiNames": TWO}).json["jobId"]
        waiting = world.until(lambda: (found := world.job(job))["state"] != "RUNNING" and found, 60)
        self.assertEqual((waiting["state"], waiting["results"][0]["state"]),
                         ("WAITING_FOR_OPERATOR", "RUNNING"))
        self.assertRegex(waiting["message"], "WEBSOCKET2.*CAPTCHA")
        self.assertEqual(world.sent(), (0, 0, 0))
        self.assertEqual(world.post({"mode": "ALL"}).json, {"error": BUSY})
        self.assertEqual(world.ask().json["missing"], ["OPTIONCHAIN2"])
        world.broker.captcha_solved.set()
        world.until(lambda: world.job(job)["state"] == "RUNNING")
        seen: list[Any] = []
        while not seen or seen[-1]["state"] in LIVE:
            seen.append(world.job(job))
            world.broker.pause(0.03)
        states = [[result["state"] for result in look["results"]] for look in seen]
        for pair in (["RUNNING", "PENDING"], ["DONE", "RUNNING"], ["DONE", "DONE"]):
            self.assertIn(pair, states)
        said = {result["message"] for look in seen for result in look["results"]}
        self.assertGreaterEqual(len(said), 4)
        self.assertEqual([*seen[-1].values()][1:], ["DONE", "2 of 2 generated.", [
            {"apiName": name, "state": "DONE", "message": "VALID"} for name in TWO]])
        report = world.ask().json
        self.assertLessEqual({*TWO}, {*report["valid"]})
        self.assertEqual(world.audit("GENERATED", "FAILED"), [(name, "GENERATED") for name in TWO])
        self.assertEqual([*report["tokens"][2]["lastAttempt"].values()][1:],
                         ["REST", "GENERATED", None])

    def test_sigterm_in_a_job(self) -> None:
        """The app at hand is finished, the next is not begun."""
        world = self.served(seed=World.seed_guide, by_app={"WEBSOCKET1": {"hop_delay": 3}})
        before, names = world.tokens(), ["PRIMARY", "WEBSOCKET1", "OPTIONCHAIN1"]
        world.post({"mode": "PARTIAL", "apiNames": names})
        world.until(lambda: world.broker.count("hop") == 2, 90)
        self.assertEqual(world.job()["results"][0]["state"], "DONE")
        world.stop()
        renewed = [name for name, token in before.items() if world.tokens()[name] != token]
        self.assertEqual(renewed, names[:2])
        self.assertTrue(all(world.broker.tokens[world.tokens()[name]].live for name in renewed))


# ---- approval on the phone


class PhoneCase(WebCase):
    """A notifier at a free port of this machine, and no credentials in the configuration."""

    def world(self, *, env: Mapping[str, str | None] = {}, hook: str = HOOK,
              **options: Any) -> World:
        notifier = f"http://127.0.0.1:{free_port()}{hook}"
        return super().world(env={**NO_LOGIN, **env}, notifier_url=notifier, **options)

    def place(self, world: World) -> str:
        """Where deliveries arrive."""
        return urlsplit(world.broker.switches.notifier_url).netloc

    def run_v3(self, world: World, *argv: str) -> Done:
        """A run that listens by itself, in this process."""
        return world.call("--mode", "ALL", "--flow", "V3", "--serve", self.place(world), *argv)

    def request(self, world: World, *names: str, **headers: str) -> None:
        """A job for these apps, until it is told of each that it waits, or that it failed."""
        got = world.post({"mode": "PARTIAL", "apiNames": names, "flow": "V3"}, **headers)
        self.assertEqual(got.code, 202, got.text)
        world.until(lambda: all(
            result["state"] in ("DONE", "FAILED") or "approval" in result["message"] for result in
            world.ask("GET", got.headers["Location"], None, headers).json["results"]))

    def deliver(self, world: World, body: Any, **headers: str) -> None:
        """Post this to the notifier; every answer is quick and alike, whatever becomes of it."""
        path, began = urlsplit(world.broker.switches.notifier_url).path, time.monotonic()
        got = world.ask("POST", path, body, JSON | headers)
        self.assertLess(time.monotonic() - began, 2)
        self.assertEqual((got.code, got.text), (200, '{"status": "ok"}'))

    def stored(self, world: World, body: Mapping[str, Any]) -> None:
        """Wait until this delivery's token is a stored one."""
        world.until(lambda: body["access_token"] in world.tokens().values())

    def approve(self, world: World, name: str, **changes: Any) -> dict[str, Any]:
        """A true delivery, until it is stored."""
        body = world.broker.delivery(name, **changes)
        self.deliver(world, body)
        self.stored(world, body)
        return body

    def refused(self, world: World, body: Any, name: str = "PRIMARY") -> str:
        """Deliver what must not be stored; the one line that the operator reads about it.

        Only lines about refused deliveries count: the one about an earlier delivery that was stored
        may come later than its token can be seen.
        """
        def lines() -> list[str]:
            return re.findall(rf"(?m)^.*\b{name}: a deliver.*\n", world.log.read_text())

        known, before = len(lines()), world.rows()
        self.deliver(world, body)
        said, = world.until(lambda: lines()[known:], 10)
        self.assertEqual(world.rows(), before)
        return said


def approvals(*seconds: float | None) -> dict[str, dict[str, Any]]:
    """When each app is approved, for the broker's by_app."""
    return {name: {"approve_after": after} for name, after in zip(APPS, seconds)}


V3_ERRORS: list[tuple[Any, str]] = [  # the broker's answer to a request -> what the operator reads
    ("1123", "the app has no notifier URL (UDAPI1123). "
                  f"Enter the Notifier Webhook Endpoint on {MY_APPS}."),
    ("1124", "flow V3 is for individual accounts only (UDAPI1124). Use --flow SELENIUM."),
    ("1155", f"the app is under review or was rejected (UDAPI1155). Look at {MY_APPS}."),
    ("1157", f"the app has expired (UDAPI1157). Renew it on {MY_APPS}."),
    *(row for row in TOLD if row[0] in ("100069", "429", "reset")),
    (json_reply({"errors": [{"error_code": "UDAPI1", "message": APPS["PRIMARY"][1]}]}, 400),
     "the broker refused with UDAPI1: [hidden]. Its documentation explains the code.")]


class PhoneRunTest(PhoneCase):
    def test_six_in_any_order(self) -> None:
        """Requests are on disk before they are sent; rows as the guide has them; no login.

        All rows of a name are replaced; is_primary follows the name, api_index the number.
        """
        world, noted = self.world(by_app=approvals(0.5, 0, 0.2, 0.1, 0.4, 0)), []
        world.broker.acts["v3"] = lambda request: noted.append(
            (request.app, "REQUESTED") in world.audit())
        world.names.reverse()
        world.write_env()
        for _ in range(2):
            world.seed_guide()
        began, expiry = time.time(), next_cutoff(time.time())
        done = self.run_v3(world)
        valid = summary(**dict.fromkeys(world.names, "VALID"))
        self.assertEqual((done.code, done.out), (0, valid), done.err)
        self.assertNotIn("arning", done.err)
        self.assertCountEqual(world.broker.details("v3"), APPS)
        self.assertEqual({request.headers["Content-Type"] for request in world.broker.requests
                          if "/token/request/" in request.path}, {"application/json"})
        self.assertEqual(noted, [True] * 6)
        self.assertEqual(world.broker.count("dialog"), 0)
        self.assertCountEqual([row["api_name"] for row in world.rows()], APPS)
        for row in world.rows():
            name, token, created = row["api_name"], row["access_token"], row["created_at"]
            self.assertEqual(world.broker.tokens[token], Token(name, USER_ID, True))
            self.assertTrue(began * 1000 - 1 <= created <= time.time() * 1000)
            self.assertAlmostEqual(row["expires_in"], expiry - created / 1000, delta=2)
            self.assertEqual(row, dict.fromkeys(UNWRITTEN) | token_row(
                name, token, created / 1000, id=row["id"], created_at=created, updated_at=created,
                expires_in=row["expires_in"], api_index=world.names.index(name)))
        self.assertCountEqual(
            [(row["api_name"], row["source"], row["flow"]) for row in world.audit_rows()
             if row["outcome"] == "GENERATED"], [(name, "WEBHOOK", "V3") for name in APPS])
        self.assertEqual(self.run_v3(world, "-q"), (0, "", ""))

    def test_quiet_run_tells_a_refused_delivery(self) -> None:
        """At its end, beside what failed."""
        world = self.world(apps=1)
        place, port = self.place(world).split(":")
        world.address = (place, int(port))
        body = world.broker.delivery("PRIMARY", user_id=OTHER)
        world.broker.acts["v3"] = lambda _: self.deliver(world, body)
        done = self.run_v3(world, "-q", "--wait", "0.02")
        self.assertEqual((done.code, done.err), (1, ""))
        self.assertTrue(done.out.startswith(
            "PRIMARY: a delivery was not stored: its token belongs to another user than it says\n"
            + summary(PRIMARY="NOT FOUND") + "\nPRIMARY: failed: not approved in time"), done.out)

    def test_what_cannot_be_noted_is_not_asked_for(self) -> None:
        world = self.world(apps=1)
        remember(world, "")
        world.sql(UNNOTED.format("REQUESTED"))
        done = self.run_v3(world, "--wait", "0.001")
        self.assertEqual((done.code, world.broker.count("v3")), (1, 0), done.err)
        self.assertRegex(done.out, "PRIMARY: failed: no approval is asked for that cannot be noted "
                                   "first. .*no more rows")

    def test_database_locked_for_a_while(self) -> None:
        """The run does not give up, since the approval may come all the same."""
        world = self.world(apps=1, by_app=approvals(0))
        world.seed()
        world.broker.acts["v3"] = lambda _: world.lock(kind="EXCLUSIVE")
        with (world.once_told("cannot look for tokens now", world.unlock),
              mock.patch.multiple(upstox_tokens, READ_SECONDS=0.2)):
            done = self.run_v3(world, "--json")
        told = json.loads(done.out)
        self.assertEqual((done.code, told["valid"], told["results"]), (0, ["PRIMARY"], [
            {"apiName": "PRIMARY", "state": "DONE", "message": ""}]), done.err)

    def test_errors(self) -> None:
        world = self.world(apps=1)

        def work(row: tuple[Any, str]) -> None:
            world.broker.switches.v3_answer = row[0]
            known = len(world.audit_rows())
            done = self.run_v3(world)
            self.assertEqual(done.code, 1)
            self.assertIn(f"PRIMARY: failed: no approval could be asked for: {row[1]}\n", done.out)
            self.assertEqual([event["outcome"] for event in world.audit_rows()[known:]],
                             ["REQUESTED", "FAILED"])

        self.table(work, V3_ERRORS)
        self.assertEqual(world.rows(), [])

    @unittest.skipIf(sys.platform == "win32", "no pseudo-terminals")
    def test_countdown_on_a_terminal(self) -> None:
        """In place; what comes after it has a line of its own."""
        world, (terminal, end) = self.world(apps=1), os.openpty()
        world.finish(world.start("--mode", "ALL", "--flow", "V3", "--wait", "0.03", "--serve",
                                 self.place(world), stderr=end))
        said = os.read(terminal, 65536).decode()
        self.assertRegex(said, r"\n(\r\x1b\[Kwaiting [^\r\n]+){2,}\r\n\[1/1\] PRIMARY: not appr")

    def test_one_failure_stops_nobody_else(self) -> None:
        """One app has expired, two are approved, others not in time; another notifier is told."""
        other = f"https://other.example.com/{APPS['PRIMARY'][1]}"
        world = self.world(notifier_shown=other, by_app={
            "PRIMARY": {"v3_answer": "1157"}, "OPTIONCHAIN1": {"v3_seconds": 1},
            "WEBSOCKET3": {"notifier_shown": ""}} | {name: {"approve_after": 0.1} for name in TWO})
        world.seed_guide()
        before, end = world.tokens(), time.time() + 1.8
        done = self.run_v3(world, "--wait", "0.03")
        ends = "|".join(local_text(moment)[11:16] for moment in (end, time.time()))
        self.assertRegex(done.err, f"WEBSOCKET1: waiting for approval on the phone until ({ends})")
        self.assertEqual(done.code, 1)
        self.assertIn("Warning: the broker will deliver to https://other.example.com/[hidden], not "
                      "to UPSTOX_NOTIFIER_WEBHOOK_URI. Change one of them", done.err)
        self.assertIn("the broker will deliver to an address it does not name, not", done.err)
        reasons = {"PRIMARY": ".*UDAPI1157.*", "OPTIONCHAIN1": "not approved in time. Run again[.]"}
        later = r"not approved in time\. Approve it on the phone while --serve runs, or run again\."
        for name in APPS:
            failed = re.search(f"^{name}: failed: {reasons.get(name, later)}$", done.out, re.M)
            self.assertEqual((bool(failed), world.tokens()[name] != before.get(name)),
                             (name not in TWO, name in TWO))

    def test_run_in_the_foreground(self) -> None:
        """It answers at the notifier's path only; a signal ends it at once, what came is kept."""
        world = self.world()
        run = world.start("--mode", "ALL", "--flow", "V3", "--serve", self.place(world))
        world.address = ("127.0.0.1", int(self.place(world).rpartition(":")[2]))
        world.until(lambda: world.broker.count("v3") == 6)
        for line in ("GET /", f"GET {STATUS}", f"POST {GENERATE}", f"POST {HOOK}/", "GET /x"):
            self.assertEqual(world.ask(*line.split()).code, 404, line)
        kept, late = self.approve(world, "WEBSOCKET3"), world.broker.delivery("PRIMARY")
        world.broker.switches.profile_delay, asked = 1, world.broker.count("profile")
        self.deliver(world, late)
        world.until(lambda: world.broker.count("profile") > asked)
        began = time.monotonic()
        run.send_signal(signal.SIGINT)
        self.assertEqual(world.finish(run).code, 130)
        self.assertLess(time.monotonic() - began, 5)
        self.assertEqual(world.tokens(), {"WEBSOCKET3": kept["access_token"],
                                          "PRIMARY": late["access_token"]})

    def test_beside_the_server(self) -> None:
        """The server listens then; a late approval arrives there too, after a run has given up."""
        world = self.served(seed=World.seed_guide, limits=LATE,
                            by_app=approvals(0.4, 0.3, 0.2, 0.1, 0, None))
        self.assertEqual(len(world.ask().json["valid"]), 3)
        done = self.run_v3(world, "--wait", "0.05")
        self.assertEqual((done.code, len(world.tokens())), (1, 5), done.err)
        self.assertIn("OPTIONCHAIN2: failed: not approved in time", done.out)
        self.assertIn("This run cannot listen for deliveries; a running --serve must.", done.err)
        world.broker.switches.by_app = {"OPTIONCHAIN2": {"v3_answer": "1155"}}
        world.call("--mode", "PARTIAL", "--apis", "OPTIONCHAIN2", "--flow", "V3")
        self.approve(world, "OPTIONCHAIN2")
        self.assertEqual(len(world.ask().json["valid"]), 6)
        world.broker.switches.by_app = approvals(0)
        done = world.call("--flow", "V3", "--wait", "1", answers=["3", "primary"])
        self.assertEqual(done.code, 0)
        self.assertEqual({(row["source"], row["outcome"]) for row in world.audit_rows()}, {
            ("CLI", "REQUESTED"), ("CLI", "FAILED"), ("MENU", "REQUESTED"),
            ("WEBHOOK", "GENERATED")})


OTHER = "9QXB77"  # another account
NOW, CUT = int(time.time()), int(next_cutoff(time.time()))


def wrong(name: str, *values: Any) -> list[tuple[dict[str, Any], str]]:
    """Deliveries with one wrong value, and words of the operator's line."""
    words = "expiry" if name == "expires_at" else "not the broker.s token message"
    return [({name: value}, words) for value in values]


# changes to a true delivery for PRIMARY, which is awaited -> words of the operator's line
REFUSED_DELIVERIES: list[tuple[dict[str, Any], str]] = [
    *wrong("access_token", None, 7, "", ["x"], "two words", "line\nX: y", "\ud800"),
    *wrong("user_id", None, 7, "", {}, "x" * 5000),
    *wrong("token_type", None, "Basic"), *wrong("message_type", None, "order_update"),
    *wrong("expires_at", None, True, "", "2026-11-24T03:30:00", 0, "0", "-1", 10 ** 30, "9" * 30,
           CUT, str(CUT)),  # seconds
    *(row for form in (str, int) for row in wrong(
        "expires_at", *(form(1000 * (NOW + ahead)) for ahead in (-60, 20 * DAY, 30 * DAY)))),
    ({"access_token": new_token()}, r"says INVALID \(401\)"),  # the broker knows it not
    ({"user_id": OTHER}, "user"),
    ({"client_id": APPS["OPTIONCHAIN1"][0]}, "nothing was asked for"),
]
STRANGE_BODIES = [
    *({"client_id": value} for value in ("5b0c7d1e-93a4-4f1c-8a57-1f60c2a9d399", None, 7, "\ud800",
                                         [APPS["PRIMARY"][0]])),
    b"", b"<html>", b"[" * 60000, b"\xff\xfe\0\1" * 99, b"7", b"null", b"[{}]", b"{}", b'{"a": "']


class DeliveryTest(PhoneCase):
    def test_what_is_not_stored(self) -> None:
        """Nothing changes, one line each for a configured app, and no answer tells a stranger."""
        world = self.served(seed=World.seed_valid, one_token_per_app=False)
        true = world.broker.delivery("PRIMARY")
        self.assertRegex(self.refused(world, true), "was not stored: nothing was asked for$")
        self.request(world, "PRIMARY")
        before = world.tokens()

        def work(row: tuple[dict[str, Any], str]) -> None:
            body = true | row[0]
            name = "PRIMARY" if body["client_id"] == true["client_id"] else "OPTIONCHAIN1"
            self.assertRegex(self.refused(world, body, name), f"was not stored: .*{row[1]}")

        foreign = world.broker.issue("PRIMARY", OTHER)
        self.table(work, [*REFUSED_DELIVERIES, ({"access_token": foreign}, "user"),
                          ({"access_token": foreign, "user_id": OTHER}, "account")])
        for strange in STRANGE_BODIES:
            self.deliver(world, true | strange if isinstance(strange, dict) else strange)
        crowd(8, lambda poster: [self.deliver(
            world, true | {"access_token": f"forged.{poster}.{n}"}) for n in range(20)])
        self.assertEqual(world.tokens(), before)
        self.assertEqual(world.job()["results"][0]["state"], "RUNNING")
        self.deliver(world, true)
        self.stored(world, true)
        self.assertEqual(world.ended()["state"], "DONE")
        world.stop()
        self.assertEqual(world.tokens(), before | {"PRIMARY": true["access_token"]})

    def test_owner(self) -> None:
        """Known from a valid token's profile, later from what was delivered; never guessed."""
        world = self.served(seed=lambda world: world.seed_valid("WEBSOCKET1"),
                            one_token_per_app=False)

        def foreign() -> dict[str, Any]:
            token = world.broker.issue("PRIMARY", OTHER)
            return world.broker.delivery("PRIMARY", user_id=OTHER, access_token=token)

        self.request(world, "PRIMARY")
        world.broker.switches.by_app = {"WEBSOCKET1": {"profile_answer": "503"}}
        # whose token the stored one is cannot be asked just now; it is asked again a second later
        self.assertIn("trying again", self.refused(world, foreign()))
        world.broker.switches.by_app = {}
        world.until(lambda: f"account {OTHER}" in world.log.read_text())
        for _ in ("a stored token", "an earlier delivery"):
            self.assertRegex(self.refused(world, foreign()), f"account.*{OTHER}.*{USER_ID}")
            self.approve(world, "PRIMARY")
            self.assertEqual(world.ended()["state"], "DONE")
            world.sql("DELETE FROM upstox_tokens")
            self.request(world, "PRIMARY")
        world.sql(f"""INSERT INTO upstox_token_audit
            (at, run_id, api_name, source, flow, outcome, user_id) VALUES
            (1, 'r', 'WEBSOCKET2', 'CLI', 'SELENIUM', 'GENERATED', '{OTHER}')""")
        self.deliver(world, body := foreign())
        self.stored(world, body)

    def test_replay_and_deadline(self) -> None:
        """An old delivery again, with and without a request outstanding; a late one.

        The expiry may be text or a number. A request that the broker refused is none.
        """
        def approve(form: type) -> dict[str, Any]:
            expiry = NOW + 5000
            body = self.approve(world, "PRIMARY", expires_at=form(expiry * 1000))
            self.assertEqual(world.ended()["state"], "DONE")
            row, = world.rows()
            self.assertEqual(row["validity_at"], local_text(expiry))
            self.assertTrue(4500 < row["expires_in"] <= 5000)
            return body

        world = self.served(apps=1)
        self.request(world, "PRIMARY")
        old = approve(str)
        self.assertIn("not stored", self.refused(world, old))
        self.request(world, "PRIMARY")
        self.assertIn("stored already", self.refused(world, old))
        self.assertEqual(world.job()["results"][0]["state"], "RUNNING")
        approve(int)
        self.request(world, "PRIMARY")
        approve(float)
        more, asked = world.broker.delivery("PRIMARY"), world.broker.count("profile")
        self.assertIn("nothing was asked for", self.refused(world, more))
        self.assertEqual(world.broker.count("profile"), asked)
        world.broker.switches.v3_answer = "1155"
        self.request(world, "PRIMARY")
        self.assertIn("nothing was asked for", self.refused(world, more))
        world.broker.switches.v3_answer, world.broker.switches.v3_seconds = None, 1
        self.request(world, "PRIMARY")
        self.assertEqual(world.ended()["state"], "FAILED")
        late = world.broker.delivery("PRIMARY")
        self.assertIn("time to approve it is over", self.refused(world, late))

    def test_faults_that_pass(self) -> None:
        """Nothing is stored while the broker or the database is away, the token afterwards."""
        def work(fault: str) -> None:
            limits = dict.fromkeys(("READ_SECONDS", "PROOF_SECONDS", "STORE_SECONDS"), 0.3)
            world = self.served(seed=World.seed_valid, apps=1, limits=limits)
            self.request(world, "PRIMARY")
            before, body = world.tokens(), world.broker.delivery("PRIMARY")
            known, asked = world.log.stat().st_size, world.broker.count("profile")
            began = time.monotonic()
            with self.away(world, fault):
                self.deliver(world, body)
                told = world.until(lambda: world.log.read_text()[known:])
                self.assertIn("PRIMARY: ", told)
                if fault == "503":  # it is patient
                    world.until(lambda: world.broker.count("profile") > asked + 1)
                    self.assertGreater(time.monotonic() - began, 0.9)
            self.assertEqual(world.tokens(), before)
            self.stored(world, body)
            self.assertEqual(world.ended()["state"], "DONE")
            self.assertEqual(world.stop().count("trying again"), 1)

        self.table(work, ("503", "locked", "moved"), workers=3)

    @contextlib.contextmanager
    def away(self, world: World, fault: str) -> Iterator[None]:
        """The database locked or moved, or the broker not able to tell."""
        if fault == "locked":
            world.lock()
            yield
            world.unlock()
        elif fault == "moved":
            moved = world.db.rename(world.folder / "moved.db")
            yield
            moved.rename(world.db)
        else:
            world.broker.switches.profile_answer = "503"
            yield
            world.broker.switches.profile_answer = None

    def test_two_at_the_same_time(self) -> None:
        """One request, two deliveries that are being proven together: one of them is stored."""
        world = self.served(apps=1, one_token_per_app=False, profile_delay=0.5)
        self.request(world, "PRIMARY")
        for _ in range(2):
            self.deliver(world, world.broker.delivery("PRIMARY"))
        told = world.until(lambda: len(found := re.findall(
            "PRIMARY: .*stored.*", world.log.read_text())) == 2 and found)
        self.assertEqual(sorted("not stored" in line for line in told), [False, True], told)
        self.assertEqual(world.audit("GENERATED"), [("PRIMARY", "GENERATED")])
        self.assertEqual(world.ended()["state"], "DONE")

    def test_access(self) -> None:
        """No key, any Host and Origin, at exactly this path, which may lie below /auth."""
        public = {"Host": "hooks.example.com", "Origin": "https://api.upstox.com"}
        for hook in (HOOK, "/auth/upstox/notify/Zr5tqB81x"):
            with self.subTest(hook):
                world = self.served(apps=1, hook=hook, env={"UPSTOX_SERVE_KEY": KEY})
                self.request(world, "PRIMARY", **RIGHT)
                start = f"POST {hook} HTTP/1.1\r\nContent-Length: "
                codes = [raw(world.address, f"{start}{tail}".encode()).code for tail in (
                    "10485760\r\n\r\n" + "x" * 10485760, "\r\n\r\n{}", "99\r\n\r\n{}")]
                self.assertEqual(codes, [413, 400, 400])
                for path in ("/", "/healthz", STATUS, LATEST, hook + "/", hook.upper()):
                    self.assertEqual(world.ask("GET", path, None, RIGHT | public).code, 403, path)
                body = world.broker.delivery("PRIMARY")
                for path in (hook + "/", hook.upper(), "/" + hook, hook.replace("o", "%6f", 1)):
                    self.assertIn(world.ask("POST", path, body, RIGHT).code, (403, 404), path)
                self.assertEqual(world.ask("GET", hook).headers["Allow"].split(", ")[0], "POST")
                self.assertEqual((world.rows(), world.broker.count("profile")), ([], 0))
                self.deliver(world, body, **public)
                self.stored(world, body)


class PhoneServerTest(PhoneCase):
    def test_job(self) -> None:
        """It waits for the operator, says for what and until when; deliveries end it."""
        world = self.served("--flow", "V3", seed=World.seed_guide, limits=LATE)
        got = world.post({"mode": "INVALID_ONLY"})
        self.assertEqual((got.code, got.json["apiNames"]), (202, RENEWED))
        waiting = r"waiting for approval on the phone until \d\d:\d\d$"
        job = world.until(lambda: (found := world.job()) and found["message"] and all(
            re.search(waiting, result["message"]) for result in found["results"]) and found)
        self.assertEqual((job["state"], {result["state"] for result in job["results"]}),
                         ("WAITING_FOR_OPERATOR", {"RUNNING"}))
        self.assertRegex(job["message"], "(?i)approv.*" + ".*".join(RENEWED))
        self.assertEqual(self.run_v3(world).code, 4)
        self.assertEqual(world.ask().json["missing"], ["OPTIONCHAIN2"])
        for name in reversed(RENEWED):
            self.approve(world, name)
        self.assertEqual([*world.ended().values()][1:], ["DONE", "3 of 3 generated.", [
            {"apiName": name, "state": "DONE", "message": "VALID"} for name in RENEWED]])
        report = world.ask().json
        self.assertEqual((len(report["valid"]), world.call("--status").code), (6, 0))
        self.assertEqual([*report["tokens"][5]["lastAttempt"].values()],
                         [report["tokens"][5]["generatedAt"], "WEBHOOK", "GENERATED", None])
        self.assertEqual({(row["source"], row["outcome"]) for row in world.audit_rows()},
                         {("REST", "REQUESTED"), ("WEBHOOK", "GENERATED")})

    def test_back_end_that_switches_a_token_off_meanwhile(self) -> None:
        """A row that changed is no delivery: the app is still awaited when a later one has come."""
        def seed(world: World) -> None:
            world.seed_valid()
            world.write_env(UPSTOX_CLIENT_ID_1="mistyped")

        world = self.served(seed=seed, apps=2)
        world.write_env()  # corrected, which counts at once for deliveries too
        self.request(world, "PRIMARY", "WEBSOCKET1")
        world.sql("UPDATE upstox_tokens SET is_active = 0, access_token = '' WHERE is_primary")
        self.approve(world, "WEBSOCKET1")
        world.until(lambda: world.job()["results"][1]["state"] == "DONE")
        self.assertEqual(world.job()["results"][0]["state"], "RUNNING")
        world.write_env("half a line")  # while it is being edited the last one counts
        self.approve(world, "PRIMARY")
        world.write_env()
        self.assertEqual((world.ended()["state"], len(world.ask().json["valid"])), ("DONE", 2))

    def test_sigterm(self) -> None:
        """While a job waits, and while deliveries are being proven: these are stored first."""
        world = self.served()
        self.request(world, *APPS)
        self.approve(world, "PRIMARY")
        world.broker.switches.by_app = {"PRIMARY": {"profile_delay": 1}}
        asked = world.broker.count("profile")
        with meanwhile(world.ask):  # this check has begun before the token that is seen at once
            world.until(lambda: world.broker.count("profile") > asked)
            self.approve(world, "OPTIONCHAIN1")
            self.assertIn("OPTIONCHAIN1", world.ask().json["valid"])
        world.broker.switches.by_app, world.broker.switches.profile_delay = {}, 1
        bodies = [world.broker.delivery(name) for name in TWO]
        asked, kept = world.broker.count("profile"), world.tokens().values()
        for body in bodies:
            self.deliver(world, body)
        world.until(lambda: world.broker.count("profile") > asked)
        self.ends_soon(world, signal.SIGTERM)
        self.assertEqual({*world.tokens().values()},
                         {*kept, *(body["access_token"] for body in bodies)})


# ---- the dashboard, as a person uses it


class Stage:
    """In the place of the program's server: the page that it sent, and the answers a test wants."""

    switches, now = Switches(), staticmethod(time.time)

    def __init__(self, page: Got) -> None:
        self.page = page
        self.hanging = threading.Event()  # until the next page is loaded
        self.answers: Mapping[str, Any] = {}  # below /auth/upstox/tokens/
        self.asked: list[Request] = []
        self.server = Server(self, "stage")

    def handle(self, request: Request) -> Reply | str:
        if request.path in ("/", "/blank"):
            policy = "Content-Security-Policy"
            return html_reply(self.page.text if request.path == "/" else "",
                              headers=[(policy, self.page.headers[policy])])
        self.asked.append(request)
        path = request.path.removeprefix(TOKENS)
        answer = self.answers.get(path, json_reply({"error": "no such job"}, 404))
        return answer if isinstance(answer, (Reply, str)) else json_reply(answer)

    def pause(self, seconds: float) -> None:
        self.hanging.wait(seconds)

    def heard(self) -> list[Any]:
        """What was asked for since the last time: paths, and what was posted."""
        asked, self.asked = self.asked, []
        return [json.loads(one.body) if one.body else one.path.removeprefix(TOKENS)
                for one in asked]


def shown(name: str, status: str = "VALID", reason: str = "", **more: Any) -> dict[str, Any]:
    """A token as the HTTP API shows it."""
    return {"apiName": name, "status": status, "reason": reason, "lastAttempt": None,
            "validityAt": "2026-11-26 03:30:00", "generatedAt": "2026-11-25 08:15:00"} | more


def attempt(outcome: str, source: str = "CLI", reason: str | None = None,
            at: str = "2026-11-25 08:20:00") -> dict[str, Any]:
    return {"lastAttempt": {"at": at, "source": source, "outcome": outcome, "reason": reason}}


def report(*tokens: Mapping[str, Any], hold: str | None = None) -> dict[str, Any]:
    return {"status": {"checkedAt": "2026-11-25 08:30:00", "hold": hold, "tokens": tokens}}


def job(state: str, message: str = "", **results: str) -> dict[str, Any]:
    """The job that the page follows; each result is a state and perhaps a message."""
    parts = {name: text.partition(" ") for name, text in results.items()}
    return {"jobs/1": {"jobId": "1", "state": state, "message": message, "results": [
        {"apiName": name, "state": word, "message": said}
        for name, (word, _, said) in parts.items()]}}


def found(answers: Mapping[str, Any], job: str = "1") -> dict[str, Any]:
    """The same while this job runs, as a page learns it that has not begun it."""
    return answers | {"status": json_reply(answers["status"], headers=[("X-Job", job)])}


def press(buttons: str, answer: Any) -> dict[str, Any]:
    """These are pressed one after the other, and this is what comes of it."""
    return {"press": buttons, "generate": answer}


def refused(code: int, text: str) -> Reply:
    return json_reply({"error": text}, code)


def asks(mode: str, flow: str = "SELENIUM", **more: Any) -> dict[str, Any]:
    return {"mode": mode, "flow": flow} | more


class Shown(NamedTuple):
    """What the page makes of the server's answers, one after the other, the last one counting."""

    answers: Sequence[Mapping[str, Any]]
    card: str  # colour and headline
    notice: str = ""
    rows: Sequence[str] | None = None  # colour | status | until | colour | what happened last
    on: str = "refresh all"  # the buttons that can be pressed
    waits: int | None = 60  # seconds until it asks again
    focus: str = ""
    heard: Sequence[Any] = ("status",)  # what was asked for after the first answers
    hold: str = ""
    saved: Mapping[str, str] = {}  # what this tab knows from before


BOTH = shown("PRIMARY"), shown("WEBSOCKET1")
GONE = shown("PRIMARY", "NOT FOUND", validityAt=None, generatedAt=None)
GOOD, BAD = report(*BOTH), report(GONE, BOTH[1])
ALL_GOOD, ONE_BAD = ("good All 2 tokens are valid until 26 Nov 03:30.",
                     "bad 1 of 2 tokens needs generating.")
GOES_ON = "The run goes on even when this page is closed."
NO_KEY = {"status": refused(401, "the key is missing or wrong")}
PROXY = Reply(502, "<html>")  # the server itself is gone
CAPTCHA_JOB = "PRIMARY: solve the CAPTCHA in the browser window"
PHONE_JOB = "Approve on the phone: PRIMARY (15 min left)"
OLD = "good | VALID | until 26 Nov 03:30 | none | Generated 25 Nov 08:15"
FOLLOWED = {"job": "jobs/1"}
RUNNING, DONE = job("RUNNING", PRIMARY="RUNNING"), job("DONE", "1 of 1 generated.",
                                                       PRIMARY="DONE VALID")
ACCEPTED = json_reply({"jobId": "1", "state": "RUNNING", "apiNames": ["PRIMARY"]}, 202)
BUSY_NOW = press("#missing", refused(409, "Another run is busy."))
MISSING = asks("INVALID_ONLY")
LONG = "the broker calls the login page's version outdated. Run again later, or use --flow V3."
PLAIN_LONG = LONG.replace("--flow V3", "“Approve on phone”")
SHOWN = (
    Shown([{"status": "hang"}], "none Checking the tokens…", on="refresh", waits=None),
    Shown([GOOD], ALL_GOOD, rows=[OLD, OLD]),
    Shown([report(BOTH[0], BOTH[1] | {"validityAt": "2026-11-25 21:00:00"})],
          "good All 2 tokens are valid until 25 Nov 21:00."),
    Shown([report(BOTH[0])], "good The token is valid until 26 Nov 03:30."),
    Shown([report(GONE, shown("WEBSOCKET1", "INVALID", "401"), shown("WEBSOCKET2", "EXPIRED"),
                  BOTH[1])], "bad 3 of 4 tokens need generating.",
          on="refresh missing all", waits=10, rows=[
              "bad | NOT FOUND |  | none | –",
              "bad | INVALID (401) |  | none | Generated 25 Nov 08:15",
              "bad | EXPIRED |  | none | Generated 25 Nov 08:15", OLD]),
    Shown([report(shown("PRIMARY", "UNKNOWN", "503"), BOTH[1])],
          "none 1 of 2 tokens are valid, 1 unknown.",
          rows=["none | UNKNOWN (503) |  | none | Generated 25 Nov 08:15", OLD]),
    # what happened last, whoever did it
    Shown([report(GONE | attempt("FAILED", reason=LONG),
                  shown("WEBSOCKET1", "EXPIRED", **attempt("FAILED", "REST", LONG)),
                  shown("WEBSOCKET2", **attempt("FAILED", "MENU", "short.")),
                  shown("WEBSOCKET3", **attempt("FAILED", "X", "short.")),
                  shown("OPTIONCHAIN1", **attempt("GENERATED", "WEBHOOK")),
                  shown("OPTIONCHAIN2", **attempt("FAILED", at="2026-11-25 03:35:00")))],
          "bad 2 of 6 tokens need generating.", on="refresh missing all", waits=10, rows=[
              "bad | NOT FOUND |  | bad | Failed 25 Nov 08:20 (cron or command line): "
              + PLAIN_LONG,
              "bad | EXPIRED |  | bad | Failed 25 Nov 08:20 (web page or HTTP): as above.",
              *(f"good | VALID | until 26 Nov 03:30 | bad | Failed 25 Nov 08:20 ({who}): short."
                for who in ("menu", "X")),
              OLD.replace("08:15", "08:20 (approved on the phone)"), OLD]),
    Shown([report(*BOTH, hold=PIN_HOLD)], ALL_GOOD,
          hold=f"Logins are on hold: {PIN_HOLD}. Correct the settings, or go ahead from the menu "
               "on the server. Approval on the phone works all the same."),
    # the server cannot tell, or does not want to
    Shown([GOOD, {"status": refused(503, "The database is locked. Use --flow SELENIUM.")}],
          "bad The server could not check the tokens.",
          "The database is locked. Use “Browser login”.", rows=[OLD, OLD], on="refresh", waits=10),
    Shown([{"status": PROXY}], "bad The server does not answer.", on="refresh", waits=10),
    Shown([GOOD, {"status": PROXY}], "bad The server does not answer.",
          "The table is as of the last check.", rows=[OLD, OLD], on="refresh", waits=10),
    Shown([{"status": PROXY}, GOOD], ALL_GOOD),
    Shown([GOOD, NO_KEY], "none This server asks for its key.",
          "It is UPSTOX_SERVE_KEY of the server. This tab keeps it until it is closed.", rows=[],
          on="refresh key-save", waits=None, focus="key"),
    Shown([NO_KEY], "bad This server asks for its key.", "It did not accept this one.", rows=[],
          on="refresh key-save", waits=None, focus="key", saved={"secret": KEY}),
    # a run, as long as it lasts
    Shown([BAD | job("RUNNING", PRIMARY="RUNNING PIN sent", WEBSOCKET1="PENDING")],
          "busy Generating: 0 of 2 done.", GOES_ON, rows=[
              "bad | NOT FOUND |  | busy | Running: PIN sent",
              "good | VALID | until 26 Nov 03:30 | none | Queued"],
          on="refresh", waits=1, heard=["jobs/1", "status"], saved=FOLLOWED),
    Shown([BAD | RUNNING, job("RUNNING", PRIMARY="DONE VALID", WEBSOCKET1="FAILED no.")],
          "busy Generating: 1 of 2 done.", GOES_ON, rows=[
              "good | VALID |  | good | Generated just now",
              "good | VALID | until 26 Nov 03:30 | bad | Failed: no."],
          on="refresh", waits=1, heard=["jobs/1"], saved=FOLLOWED),
    Shown([GOOD | job("WAITING_FOR_OPERATOR", CAPTCHA_JOB, PRIMARY="RUNNING",
                      WEBSOCKET1="SKIPPED")], "wait Your turn: 0 of 2 done.",
          f"{CAPTCHA_JOB}. The window is on the server’s screen and waits up to 5 minutes. The run "
          "goes on by itself.", on="refresh", waits=1, heard=["jobs/1", "status"], saved=FOLLOWED),
    # also one that was not begun here: the page may be opened when a person is needed
    Shown([found(GOOD), job("WAITING_FOR_OPERATOR", PHONE_JOB, PRIMARY="RUNNING")],
          "wait Your turn: 0 of 1 done.",
          f"{PHONE_JOB}. Open the Upstox app there. The run goes on by itself.",
          on="refresh", waits=1, heard=["jobs/1"]),
    Shown([GOOD, found(GOOD)], ALL_GOOD, waits=1),
    # and how it ended
    Shown([found(BAD), job("RUNNING", PRIMARY="PENDING"), GOOD | DONE],
          ALL_GOOD, "Last run, 25 Nov 08:30: 1 of 1 generated.", rows=[OLD, OLD],
          heard=["jobs/1", "jobs/1", "status"]),
    Shown([GOOD | RUNNING, found(GOOD, "2") | DONE], ALL_GOOD,
          "Last run, 25 Nov 08:30: 1 of 1 generated.", waits=1, heard=["jobs/1", "status"],
          saved=FOLLOWED),
    Shown([GOOD | RUNNING, GOOD | job("FAILED", "0 of 1 generated. PRIMARY: failed: " + LONG,
                                      PRIMARY="FAILED " + LONG)],
          ALL_GOOD, "bad Last run, 25 Nov 08:30: 0 of 1 generated.",
          rows=[f"good | VALID | until 26 Nov 03:30 | bad | Failed: {PLAIN_LONG}", OLD],
          heard=["jobs/1", "status"], saved=FOLLOWED),
    Shown([BAD | RUNNING, BAD | job("FAILED", "0 of 2 generated.", PRIMARY="FAILED no.",
                                    WEBSOCKET1="SKIPPED the run stopped at PRIMARY")],
          ONE_BAD, "bad Last run, 25 Nov 08:30: 0 of 2 generated.",
          rows=["bad | NOT FOUND |  | bad | Failed: no.",
                "good | VALID | until 26 Nov 03:30 | none | Not tried: the run stopped at PRIMARY"],
          on="refresh missing all", waits=10, heard=["jobs/1", "status"], saved=FOLLOWED),
    # somebody else ran meanwhile, or the server began anew: what this page followed is history
    Shown([GOOD | RUNNING, GOOD | job("FAILED", "0 of 1 generated.", PRIMARY="FAILED no."),
           report(BOTH[0] | attempt("GENERATED", "CLI", at="2026-11-25 08:31:00"), BOTH[1])],
          ALL_GOOD, rows=[OLD.replace("08:15", "08:31 (cron or command line)"), OLD],
          heard=["jobs/1", "status", "status"], saved=FOLLOWED),
    Shown([GOOD | RUNNING, GOOD], ALL_GOOD, rows=[OLD, OLD], heard=["jobs/1", "status"],
          saved=FOLLOWED),
    Shown([GOOD | DONE], ALL_GOOD, rows=[OLD, OLD], heard=["jobs/1", "status"],  # of long ago
          saved=FOLLOWED),
    # what the buttons do; everything anew only after a question
    Shown([BAD, RUNNING | press("#all #confirm-no #missing", ACCEPTED)],
          "busy Generating: 0 of 1 done.", GOES_ON, on="refresh", waits=1, focus="summary",
          heard=[MISSING, "jobs/1"]),
    Shown([GOOD, GOOD | DONE | press("#all #confirm-yes", ACCEPTED)], ALL_GOOD,
          "Last run, 25 Nov 08:30: 1 of 1 generated.", focus="summary",
          heard=[asks("ALL"), "jobs/1", "status"]),
    Shown([BAD, GOOD | DONE | press(
        "[value=PRIMARY] [value=WEBSOCKET1] [value=V3] #selected", ACCEPTED)], ALL_GOOD,
          "Last run, 25 Nov 08:30: 1 of 1 generated.", focus="summary", heard=[
              asks("PARTIAL", "V3", apiNames=["PRIMARY", "WEBSOCKET1"]), "jobs/1", "status"]),
    # a refusal is told until the next look, or until something else is tried
    Shown([BAD, GOOD | BUSY_NOW], ALL_GOOD, "bad Another run is busy.", waits=10, focus="summary",
          heard=[MISSING, "status"]),
    Shown([BAD, BAD | BUSY_NOW, BAD], ONE_BAD, on="refresh missing all", waits=10,
          focus="summary", heard=[MISSING, "status", "status"]),
    Shown([BAD, BAD | BUSY_NOW, press("#missing", "hang")], "busy Generating: starting…", GOES_ON,
          on="refresh", waits=10, focus="summary", heard=[MISSING, "status", MISSING]),
    Shown([BAD, BAD | press("#missing", "reset")], ONE_BAD,
          "bad No answer came. If the run has begun, it will show here.",
          on="refresh missing all", waits=10, focus="summary", heard=[MISSING, "status"]))
# the page's timers run when the test says so, and it may be told that nobody looks
TIMERS = """
window.timers = [];
window.looks = window.touched = 0;
window.setTimeout = (work, ms) => timers.push({work, ms});
window.clearTimeout = place => { looks += 1; delete timers[place - 1]; };
Object.defineProperty(document, 'hidden', {get: () => window.away});
"""
WATCH = """
new MutationObserver(seen => { touched += seen.length; })
  .observe(document.body, {subtree: true, childList: true, characterData: true});
"""
LOOKS = """
const $ = css => document.querySelector(css), box = css => $(css).getBoundingClientRect();
const sum = colour => colour.match(/\\d+/g).slice(0, 3).reduce((all, one) => all + Number(one), 0);
return {head: $('thead').checkVisibility(), below: box('td').top >= box('tbody th').bottom,
  smallest: Math.min(...['button', 'select', 'tbody label'].map(css => box(css).height)),
  paper: sum(getComputedStyle(document.body).backgroundColor),
  colours: ['.bad .status', '.job.bad b', 'p.bad', '.good .status'].map(
    css => getComputedStyle($(css)).color),
  heard: !!$('#summary').closest('[aria-live]')};
"""
PAGE_SHOWS = """
const text = e => e.innerText.trim(), $ = css => document.querySelector(css);
const visible = e => e.checkVisibility() && !e.matches(':disabled');
const rows = [...document.querySelectorAll('tbody tr')].filter(visible).map(tr => [tr.className,
  text(tr.querySelector('.status')), text(tr.querySelector('.until')),
  tr.querySelector('.job').className.replace('job ', ''),
  text(tr.querySelector('.job'))].join(' | '));
return {card: `${$('#card').className} ${text($('#summary'))}`, title: document.title,
  hold: text($('#hold')), notice: `${$('#notice').className} ${text($('#notice'))}`.trim(), rows,
  on: [...document.querySelectorAll('button')].filter(visible).map(e => e.id).join(' '),
  waits: timers.filter(Boolean).map(({ms}) => ms / 1000), focus: document.activeElement.id};
"""


class DashboardTest(BrowserCase, PhoneCase):
    """Runs by flow V3, so that the only browser is the one that shows the page."""

    page: Any  # one browser for all; each test has a server of its own, whose origin is another one

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-background-networking"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        cls.page = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        cls.addClassCleanup(cls.page.quit)

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(self.page.get_log, "browser")  # nothing is left for the next test
        self.addCleanup(self.page.get, "about:blank")

    def size(self, width: int) -> None:
        self.page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})

    def find(self, css: str) -> Any:
        return self.page.find_element("css selector", css)

    def reads(self, css: str, pattern: str) -> None:
        """Wait until this part of the page reads so."""
        script, end = "return document.querySelector(arguments[0])?.innerText", time.time() + 20
        while not re.search(pattern, said := self.page.execute_script(script, css) or "", re.S):
            self.assertLess(time.time(), end, f"{css} reads {said!r}, not {pattern!r}")
            time.sleep(0.05)

    def assert_calm(self, told: str = "Security|Uncaught| 404 ") -> None:
        """Nothing sticks out sideways, no policy was violated, no request failed."""
        wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        self.assertLessEqual(self.page.execute_script(wide), 0)
        log = [entry["message"] for entry in self.page.get_log("browser")]
        self.assertEqual([line for line in log if re.search(told, line)], [])

    def stage(self) -> Stage:
        """The page of a real server, with answers of the test's own; its timers stand still."""
        world = self.served()
        stage, real = Stage(world.ask(path="/")), world.ask().json
        world.stop()
        self.assertEqual(real["tokens"][0].keys(), shown("PRIMARY").keys())
        self.assertLessEqual(report()["status"].keys(), real.keys())
        self.addCleanup(stage.server.server_close)
        threading.Thread(target=stage.server.serve_forever, args=(0.02,), daemon=True).start()
        self.addCleanup(stage.server.shutdown)
        tell, script = self.page.execute_cdp_cmd, "Page.{}ScriptToEvaluateOnNewDocument"
        timers = tell(script.format("add"), {"source": TIMERS})
        self.addCleanup(tell, script.format("remove"), timers)
        zone = "Emulation.setTimezoneOverride"  # the page shows the server's time
        tell(zone, {"timezoneId": "Asia/Kolkata"})
        self.addCleanup(tell, zone, {"timezoneId": ""})
        return stage

    def load(self, stage: Stage, answers: Mapping[str, Any], saved: Mapping[str, str] = {}) -> None:
        """The page anew, in a tab that knows this much."""
        stage.hanging.set()
        self.page.execute_script("document.onvisibilitychange = null")  # it leaves without a look
        self.page.get(stage.server.url + "/blank")
        stage.answers, stage.hanging = answers, threading.Event()
        self.page.execute_script(
            "sessionStorage.clear(); Object.assign(sessionStorage, arguments[0])", saved)
        stage.asked.clear()
        self.page.get(stage.server.url)

    def looked(self, times: int) -> None:
        """Wait until it has asked and shown so often."""
        World.until(lambda: self.page.execute_script("return looks") == times)

    def test_what_it_shows(self) -> None:
        stage = self.stage()

        def work(row: Shown) -> None:
            self.size(1280)
            self.load(stage, row.answers[0], row.saved)
            for looks, answers in enumerate(row.answers[1:], 1):
                self.looked(looks)
                if looks == 1:
                    stage.asked.clear()
                stage.answers = answers
                if "press" not in answers:  # the time until the next look is over
                    self.page.execute_script("timers.filter(Boolean).at(-1).work()")
                for button in answers.get("press", "").split():
                    self.find(button).click()
            self.looked(len(row.answers) - ("hang" in row.answers[-1].values()))
            World.until(lambda: len(stage.asked) >= len(row.heard))  # also what gets no answer
            seen = self.page.execute_script(PAGE_SHOWS)
            rows = seen["rows"] if row.rows is None else row.rows
            self.assertEqual(seen | {"heard": stage.heard()}, {
                "card": row.card, "title": row.card.partition(" ")[2] + " Upstox tokens",
                "notice": row.notice, "rows": rows, "on": row.on, "focus": row.focus,
                "waits": [row.waits] if row.waits else [], "hold": row.hold,
                "heard": [*row.heard]})
            self.size(320)
            self.assert_calm("Security|Uncaught")

        self.table(work, SHOWN)

    def test_how_it_looks(self) -> None:
        """On a phone no table, buttons for thumbs; dark for those who like it; read out."""
        stage, looks = self.stage(), {}
        failed = BAD | job("FAILED", "0 of 1 generated.", PRIMARY="FAILED no.")
        self.load(stage, BAD | press("", ACCEPTED) | failed)
        self.looked(1)
        self.find("#missing").click()
        self.looked(2)
        for width, scheme in ((320, "light"), (1280, "dark")):
            self.size(width)
            media = [{"name": "prefers-color-scheme", "value": scheme}]
            self.page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
            looks[scheme] = self.page.execute_script(LOOKS)
            bad, *same, good = looks[scheme]["colours"]
            self.assertEqual((same, bad == good), ([bad, bad], False))
        self.page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        light, dark = looks["light"], looks["dark"]
        self.assertEqual((light["head"], light["below"], dark["head"], dark["below"]),
                         (False, True, True, False))
        self.assertGreaterEqual(light["smallest"], 44)
        self.assertGreater(light["paper"], 600)  # of 765
        self.assertLess(dark["paper"], 200)
        self.assertTrue(light["heard"])

    def test_nobody_looks(self) -> None:
        """Then it asks seldom, and at once when somebody does again; what stays is not repeated."""
        stage = self.stage()
        self.load(stage, BAD)
        self.looked(1)
        self.page.execute_script(WATCH)
        for looks, away in ((2, True), (3, False)):
            self.page.execute_script("window.away = arguments[0]; "
                                     "document.dispatchEvent(new Event('visibilitychange'))", away)
            self.looked(looks)
            self.assertEqual(self.page.execute_script(PAGE_SHOWS)["waits"], [600 if away else 10])
        self.assertEqual(stage.heard(), ["status"] * 3)
        self.assertEqual(self.page.execute_script("return touched"), 0)

    def test_key(self) -> None:
        """It is kept by this tab only."""
        from selenium.webdriver.common.keys import Keys
        stage = self.stage()
        self.load(stage, NO_KEY)
        self.looked(1)
        key = self.page.switch_to.active_element
        self.assertEqual(key.get_attribute("type"), "password")
        key.send_keys("no key", Keys.ENTER)  # not taken
        key.clear()
        stage.answers = GOOD
        key.send_keys(KEY, Keys.ENTER)
        self.reads("#summary", "All 2 tokens are valid")
        self.assertEqual((key.get_attribute("value"), key.is_displayed()), ("", False))
        self.page.refresh()
        self.reads("#summary", "All 2 tokens are valid")
        first, *later = (one.headers["Authorization"] for one in stage.asked)
        self.assertEqual((first, {*later}), (None, {f"Bearer {KEY}"}))
        kept = self.page.execute_script("return document.cookie + JSON.stringify(localStorage)")
        self.assertNotIn(KEY, self.page.page_source + kept)

    def test_a_morning(self) -> None:
        """With the real server, by keyboard: your turn; a reload in the middle; the end."""
        from selenium.webdriver.common.keys import Keys
        world = self.served("--flow", "V3", seed=World.seed_guide, limits=SOON)
        self.size(390)
        self.page.get(f"http://{self.place(world)}/")
        self.reads("#summary", "3 of 6 tokens need generating")
        for name in APPS:
            self.reads(f"[data-api={name}] .status", f"^{re.escape(label(GUIDE, name))}$")
        self.find("#missing").send_keys(Keys.ENTER)
        row = "[data-api=WEBSOCKET3]"
        self.reads(f"{row} .job", r"waiting for approval on the phone until \d\d:\d\d")
        self.reads("#card", "(?i)your turn.*0 of 3.*approve")
        self.page.refresh()
        self.reads(f"{row} .job", "waiting for approval")
        world.broker.approve("WEBSOCKET3")
        self.reads(f"{row} .status", "^VALID$")
        self.reads("#summary", "1 of 3")
        for name in TWO:
            world.broker.approve(name)
        self.reads("#card", r"All 6 tokens are valid until \d+ \w+ \d\d:\d\d.*3 of 3 generated")
        self.reads(f"{row} .job", r"Generated \d+ \w+ \d\d:\d\d \(approved on the phone\)$")
        self.find("#all").send_keys(Keys.ENTER)
        self.reads("#confirm", "Every app logs in again.*stop working")
        self.assertEqual(self.page.switch_to.active_element.get_attribute("id"), "confirm-no")
        self.page.switch_to.active_element.send_keys(Keys.ENTER)
        self.find("[value=PRIMARY]").send_keys(Keys.SPACE)
        self.reads("#selected", r"\(1\)")
        world.broker.switches.v3_answer = "1155"
        self.find("#selected").send_keys(Keys.ENTER)
        self.reads("[data-api=PRIMARY] .job", "Failed.*under review.*UDAPI1155")
        self.reads("#notice", "0 of 1 generated")
        world.stop()
        self.find("#refresh").click()
        self.reads("#summary", "server does not answer")
        world.serve(self.place(world))
        self.find("#refresh").click()
        self.reads("#summary", "valid until")
        self.assert_calm()


# ---- hostile pages, kill -9, fuzz: a little of it in the tests, all of it in stress

FIELDS = {"mobile": ("mobileNum", "getOtp"), "otp": ("otpNum", "continueBtn"),
          "pin": ("pinCode", "pinContinueBtn")}
SAYINGS = (
    *(f"{text} [{code}]" for code, text in PAGE_ERRORS.items()), "Request aborted [500]", "[500]",
    "[1017555]", "Incorrect PIN", "PIN does not match. 3 attempts left", "Your PIN is wrong", "",
    "Something went wrong", "Something new [1017998]", DEVANAGARI, "Welcome back",
    "Create a new 6-digit PIN", "Reactivate your account", "Your account has been locked",
    '{"errors":[{"errorCode":"UDAPI100068"}]}', "UDAPI123", "Too many tries. Try again in 10 min.",
    "OTP has been resent to your Phone!", "Your OTP has been successfully verified.",
    "\u202e\x1b[31m\0 [99999]", f"{PIN} is not ours", f"We do not know {PIN} [1017997]")


class HostileWorld(World):
    """Three apps whose logins meet hostile pages. Its books say what reached a page, and whether it
    might."""

    PERSON = re.compile("not the broker's own|does not know|CAPTCHA|is locked|refused the|on hold|"
                        "several accounts|did not accept the mobile number|No unattended login")

    def __init__(self, seed: int, **switches: Any) -> None:
        super().__init__(3, NOON, **switches)
        self.dice = random.Random(seed)
        self.wrong: list[str] = []
        self.pins = self.codes = 0  # not taken so far
        self.all_pins, self.windows = 0, set()
        self.proven = False

    def run(self, *argv: str) -> None:
        """A run that begins and ends as it must; without arguments an operator's, from the menu."""
        self.attended, self.pin_at = not argv, ""  # the app whose PIN did not lead to an arrival
        done = self.call(*argv, answers=self.operator())
        if done.code != 128 + signal.SIGTERM:  # else the next run goes on
            self.check(done)
        assert not self.wrong, self.wrong

    def operator(self) -> Iterator[str]:
        """Generate all; and mostly, when he is told of a hold: go ahead."""
        yield "1"
        if self.dice.random() < 0.7:
            self.codes, self.pins, self.proven = 0, 0, False
            yield "y"

    def need(self, condition: object, words: str) -> None:
        if not condition:
            self.wrong.append(words)

    def reached(self, name: str, value: str) -> None:
        """The page has this value, which cannot be taken back: was it allowed, and noted?"""
        now = self.now()
        if value == PIN:
            self.need(not self.pin_at, f"{name}: a second PIN in one run")
            self.pin_at, self.pins, self.all_pins = name, self.pins + 1, self.all_pins + 1
            self.need(self.attended or self.pins <= 1 + self.proven, f"{name}: PIN {self.pins}")
        elif value == totp(TOTP_SECRET, now):
            self.need(now % 30 < 25.5, f"{name}: a code with too little time left")
            self.need(now // 30 not in self.windows, f"{name}: a code was sent twice")
            self.windows.add(now // 30)
            self.codes += 1
            self.need(self.codes <= 2, f"{name}: code {self.codes} that is not taken")
        self.need(len(self.audit("PIN_SENT")) >= self.all_pins, f"{name}: a PIN was not noted")
        self.need(len(self.audit("CODE_SENT")) >= len(self.windows), f"{name}: nor a code")

    def arrived(self, name: str) -> None:
        """The redirect takes the PIN that was sent in this login."""
        self.codes = 0
        if self.pin_at == name:
            self.pins, self.pin_at, self.proven = 0, "", True

    def check(self, done: Done) -> None:
        """The end of a run: words and exit code."""
        told = re.findall(r"(?m)^(\w+): (failed|not tried): (.*)", done.out)
        for name, word, message in told:
            self.need(word != "failed" or re.fullmatch(r"[\w\"'].*[.]", message)
                      and message.isprintable(), f"{name}: no sentence: {message!r}")
        skipped = {name for name, word, _ in told if word == "not tried"}
        after = self.names[self.names.index(self.pin_at) + 1:] if self.pin_at else []
        self.need(skipped.issuperset(after), f"went on after a PIN without arrival: {done}")
        person = self.PERSON.search(" ".join(message for *_, message in told))
        right = 0 if not told else 3 if person else 1
        self.need(done.code == right, f"exit {done.code} instead of {right}: {done}")
        self.need(told or "on hold" not in self.call("--status").err, "all is well, but on hold")


class PaperBrowser:
    """Given in place of the real one: its pages are hostile, and take no time."""

    def __init__(self, world: HostileWorld) -> None:
        self.world, self.dice = world, world.dice
        self.clock, self.rest = world.now, world.sleep
        self.headed = self.dice.random() < 0.1

    def close(self) -> None:
        pass

    def work(self) -> None:
        """Every call to a driver takes its time and may fail, or a signal comes meanwhile."""
        self.rest(self.dice.uniform(0.01, 0.2))
        if self.looks < 30 and self.dice.random() < 0.004:
            raise upstox_tokens.PageFault("crashed")
        if self.dice.random() < 0.0003:
            raise upstox_tokens.Stopped(signal.SIGTERM)

    def open(self, url: str) -> None:
        query = dict(parse_qsl(urlsplit(url).query))
        self.name, self.state = self.world.broker.about[query["client_id"]], query["state"]
        self.way = ["mobile", "otp", "pin", "arrive"][self.dice.choice((0, 0, 1, 2, 2, 3)):]
        self.submits: dict[str, int] = collections.Counter()
        self.looks = self.number = 0
        self.go()
        self.work()

    def go(self) -> None:
        """To the next step, or on a detour; anything may be odd about what is shown."""
        def rare(chance: float, *words: Any) -> Any:
            return dice.choice(words) if odd and dice.random() < chance else None

        dice, detour, odd = self.dice, self.dice.random() < 0.1, self.dice.random() < 0.45
        if detour:
            self.step = dice.choice(("", "", "mobile", "otp", "pin", "pin", "error", "fault"))
        else:
            self.step = self.way.pop(0) if self.way[1:] else "arrive"
        ids, missing, disabled = FIELDS.get(self.step, ()), rare(0.12, 0, 1), rare(0.12, 0, 1)
        self.items = {name: place != disabled for place, name in enumerate(ids) if place != missing}
        self.foreign, self.captcha = bool(rare(0.06, True)), bool(rare(0.12, True))
        self.text, self.said = rare(0.3, *SAYINGS) or "Login", ""
        self.whole = {"mobile": MOBILE, "otp": "123456", "pin": PIN}.get(self.step, "")
        self.value = rare(0.3, self.whole[:-1], "12") or ""
        self.shrinks, self.auto = rare(0.12, 0, -1), rare(0.3, True)  # once it holds a whole value
        moves = dice.random() < 0.7 if detour else rare(0.15, True)
        self.ends = self.clock() + dice.choice((0, 0.1, 1, 20, 70)) if moves else math.inf
        if rare(0.3, True):  # a new document
            self.submits.clear()
        self.number += 1
        if missing is not None or self.step in ("", "pin", "arrive"):  # the code is taken
            self.world.codes = 0

    def look(self) -> upstox_tokens.View:
        self.looks += 1
        assert self.looks < 5000, "it looks without end"
        self.work()
        if self.clock() > self.ends:
            self.go()
        self.seen = self.number
        if self.step == "fault":
            raise upstox_tokens.PageFault("net::ERR_FAILED")
        if self.step == "error":  # between two documents
            return upstox_tokens.View("chrome-error://chromewebdata/", broken=True)
        if self.step == "arrive":
            self.world.arrived(self.name)
            state = self.dice.choice((self.state,) * 9 + ("other",))
            return upstox_tokens.View(self.world.broker.send_back(self.name, state).headers[0][1])
        items = {name: {
            "enabled": enabled, "value": self.value, "submits": self.submits[self.step],
            "settled": self.dice.random() < 0.5, "requested": self.dice.random() < 0.5}
            for name, enabled in self.items.items()}
        host = "login.upst0x.localhost" if self.foreign else "127.0.0.1"
        return upstox_tokens.View(f"http://{host}:4/", items, self.captcha, [*items],
                                  f"{self.text}\n{self.said}")

    def gone(self) -> bool:
        """Whether what was looked at has gone meanwhile."""
        self.work()
        self.world.need(not self.foreign, "an act on a foreign page")
        if self.dice.random() < 0.02:
            self.go()
        return self.number != self.seen

    def type(self, _view: upstox_tokens.View, _step: str, keys: str) -> bool:
        if self.gone():
            return False
        for key in keys:
            self.value += key
            if len(self.value) == len(self.whole):
                self.world.reached(self.name, self.value)
                if self.auto:
                    self.submit()
                elif self.shrinks is not None:
                    self.value = self.value[:self.shrinks]
        self.work()
        return True

    def clear(self, *_: object) -> None:
        if not self.gone():
            self.value = ""

    def press(self, _view: upstox_tokens.View, _step: str, digits: int) -> bool:
        if self.gone() or len(self.value) != digits or self.dice.random() < 0.05:
            return False
        self.submit()
        return True

    def submit(self) -> None:
        """The page goes on, or says something, or nothing."""
        self.submits[self.step] += 1
        if self.dice.random() < 0.75:
            self.go()
        else:
            self.said = self.dice.choice(("", self.dice.choice(SAYINGS)))
            self.value = self.dice.choice((self.value, ""))


class HostilePageTest(Case):
    def test_pages(self) -> None:
        """One PIN a run, two codes, nothing typed on foreign hosts, true words, the right exit."""
        def work(seed: int) -> None:
            """A few runs, at full speed."""
            with HostileWorld(seed) as world:
                dice, world.open_browser = world.dice, lambda *_: PaperBrowser(world)
                for _ in range(dice.randrange(1, 5)):
                    world.run(*dice.choice([("--mode", "ALL")] * 3 + [("--mode", "ALL", "-q"), ()]))
                    world.moment += dice.choice((0, 5, 300, 40000, -100))  # also back

        self.table(work, [*range(20), *map(slow, range(20, 4000))])

    def test_whose_page_it_is(self) -> None:
        """Typed into are the broker's pages only; where UPSTOX_BASE_URL is here, this machine's."""
        here = ("http://127.0.0.1:4/", "http://localhost:4/login", "http://[::1]:4/")
        brokers = ("https://login.upstox.com/", "https://upstox.com/in/")
        nobodys = (
            "http://login.upst0x.localhost:4/", "http://[::2]/", "http://127.0.0.1.example.com/",
            "http://localhost@evil.example/", "http://login.upstox.com/", "https://notupstox.com/",
            "https://login.upstox.com@evil.example/", "https://login.upstox.com.evil.example/")
        for base_url, own in (("http://127.0.0.1:4", here), ("https://api.upstox.com", brokers)):
            run = mock.Mock(config=mock.Mock(base_url=base_url))
            login = upstox_tokens.Login(run, mock.Mock(redirect_uri=REDIRECT_URI), None)
            for url in (*here, *brokers, *nobodys):
                view, foreign = upstox_tokens.View(url), contextlib.nullcontext()
                if url not in own:
                    foreign = self.assertRaisesRegex(upstox_tokens.LoginFailed, "not the broker's")
                with self.subTest(url, base_url=base_url), foreign:
                    self.assertEqual(upstox_tokens.next_move(view, login, 0), ("wait", ""))


ANSWERS = [*NONSENSE, "hang", "drip", "reset", "429", "500", "503",
           Reply(302, "", [("Location", "http://127.0.0.1:9/")])]


def peak_memory(process: subprocess.Popen[Any]) -> float:
    """The most MiB that it holds itself, without its children, until it ends."""
    highest = "0"
    while process.poll() is None:
        with contextlib.suppress(OSError):  # a process that is just ending shows nothing more
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = re.search(r"VmHWM:\s*(\d+)", status)
            highest = found[1] if found else highest
        time.sleep(0.002)
    return int(highest) / 1024


@unittest.skipUnless(SLOW, "only in stress")
class StressTest(LoginCase):
    def test_pages(self) -> None:
        """What the tables of logins, PINs and looks have one by one, three at once."""
        rows = [getattr(row, "row", row) for row in (*LOGINS, *PINS, *VariantTest.ROWS)]
        odd = [row[0] for row in rows] + [look for _, looks, _ in rows[-len(VariantTest.ROWS):]
                                          for look in looks]

        def work(seed: int) -> None:
            switches = {}
            for one in random.Random(seed).sample(odd, 3):
                switches |= copy.deepcopy(one)
            self.meet(seed, switches | {"unguarded": False})  # a page's own second PIN is not ours

        self.table(work, range(200), workers=3)

    def meet(self, seed: int, switches: Mapping[str, Any]) -> None:
        with HostileWorld(seed, **switches) as world:
            broker = world.broker

            def otp(request: Request) -> None:
                world.codes = len(broker.codes) - 1 - broker.codes_taken
                world.reached(request.app, broker.codes[-1])

            broker.acts = {
                "otp": otp, "pin": lambda request: world.reached(request.app, broker.pins[-1]),
                "hop": lambda request: world.arrived(request.app)}
            for _ in range(2):
                world.run("--mode", "ALL")
                world.moment += 300
            self.assertEqual([one.body for one in broker.asked("foreign") if one.body], [])

    def test_kill(self) -> None:
        """At any moment of a run, or while it stores: rows whole, the next run works."""
        self.table(self.kill, itertools.product(({}, DIRECT), range(100)), workers=2)

    def kill(self, row: tuple[dict[str, Any], int]) -> None:
        switches, seed = row
        dice = random.Random(seed)
        with World(2, **switches) as world:
            broker = world.broker
            world.sql(f"PRAGMA journal_mode = {dice.choice(('DELETE', 'WAL'))}")
            world.seed_old()
            remember(world, PROVEN)  # else the next run would be on hold
            program, before = world.start("--mode", "ALL"), dice.randrange(2)
            if switches:
                world.until(lambda: broker.count("token") > before)
            broker.pause(dice.random() * (0.06 if switches else 3))
            program.kill()
            world.finish(program)
            self.assert_whole(world)
            world.until(lambda: not processes(world.folder))
            world.moment = time.time()  # so that the next window comes at once
            self.assertEqual(world.call("--mode", "ALL").code, 0)
            self.assert_whole(world)
            self.assertLessEqual(len(broker.pins), 4)
            self.assertLessEqual({*broker.pins}, {PIN})
            self.assertEqual(len(set(broker.codes)), len(broker.codes), "a code was sent twice")

    def assert_whole(self, world: World) -> None:
        """One whole row a name in a sound file; in a copy: the next run meets what was left."""
        place = world.db
        with tempfile.TemporaryDirectory() as folder:
            for path in world.folder.glob(f"{place.name}*"):
                shutil.copy(path, folder)
            world.db = Path(folder, place.name)
            sound = world.rows(table="pragma_integrity_check")
            rows = world.rows(table="upstox_tokens ORDER BY api_index")
        world.db = place
        self.assertEqual(sound, [{"integrity_check": "ok"}])
        self.assertEqual(
            [(row["api_name"], world.broker.tokens[row["access_token"]].app, row["client_secret"],
              row["is_active"]) for row in rows],
            [(name, name, APPS[name][1], 1) for name in world.names])

    def test_fifty_at_once(self) -> None:
        """One run generates, the others say that it is busy."""
        world, others_gone = self.world(2, **DIRECT), threading.Event()
        world.seed_old()
        world.broker.acts["token"] = lambda _: others_gone.wait(120)
        runs = [world.start("--mode", "ALL") for _ in range(50)]
        world.until(lambda: sum(run.poll() is not None for run in runs) == 49, 100)
        others_gone.set()
        self.assertEqual(sorted(world.finish(run).code for run in runs), [0] + [4] * 49)
        self.assertEqual(world.broker.details("token"), world.names)

    def test_runs_of_cron(self) -> None:
        """1 PIN, 2 when it was accepted before, 2 codes: (settings, switches from the second run
        on, codes and PINs sent in all).
        """
        def work(row: tuple[dict[str, str], dict[str, Any], tuple[int, int]]) -> None:
            env, switches, sent = row
            with World(1, moment=NOON, env=env) as world:
                for _ in range(50):
                    code = world.call("--mode", "ALL").code
                    vars(world.broker.switches).update(switches)
                    world.moment += 300
                self.assertEqual((code, *world.sent()[1:]), (3, *sent))

        self.table(work, [({"UPSTOX_PIN": "111222"}, {}, (1, 1)),
                          ({"UPSTOX_TOTP": TOTP_SECRET[::-1]}, {}, (2, 0)),
                          ({}, {"pin_answer": "silent"}, (3, 3)),
                          ({}, {"otp_answer": "silent"}, (3, 1))], workers=4)

    def test_hostile_answers(self) -> None:
        """Over in time, UNKNOWN or a failure, and the memory stays bounded."""
        switches = ("profile_answer", "token_answer", "dialog_answer", "v3_answer")
        self.table(self.answer, itertools.product(switches, ANSWERS), workers=3)

    def answer(self, row: tuple[str, Answer]) -> None:
        switch, answer = row
        argv = {"profile_answer": ["--status"], "v3_answer": [
            "--mode", "ALL", "--flow", "V3", "--wait", "0.02", "--serve", "127.0.0.1:0"]}
        with World(1, **(DIRECT | {switch: answer, "notifier_url": NOTIFIER})) as world:
            world.seed_valid() if switch == "profile_answer" else world.seed_old()
            run = world.start(*argv.get(switch, ["--mode", "ALL"]), limits={
                "PROFILE_SECONDS": 2, "EXCHANGE_SECONDS": 3, "PAGE_SECONDS": 3})
            self.assertLess(peak_memory(run), 64)  # MiB
            done = world.finish(run)
            shown = switch == "dialog_answer" and done.code == 3  # as a page nobody knows
            self.assertTrue(done.code == 1 or shown, done)

    @unittest.skipIf(os.geteuid(), "only root can mount a disk")
    def test_full_disk(self) -> None:
        """Told before any login, or the token is stored once there is space."""
        # when it gets full (before the run, or as a route answers), until when (s); exit code
        self.table(self.fill, [("", 0, 2), ("token", 1, 0), ("token", 0, 1), ("mobile", 0, 1)])

    def fill(self, row: tuple[str, float, int]) -> None:
        route, seconds, code = row
        with World(1, **({} if route == "mobile" else DIRECT)) as world:
            disk = world.folder / "disk"
            disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], check=True)
            world.callback(subprocess.run, ["umount", "-l", disk], check=True)
            world.db = disk / "vega_trade.db"
            old = world.seed_old()

            def fill(_: Any = None) -> None:
                with contextlib.suppress(OSError):
                    (disk / "filler").write_bytes(bytes(300_000))
                if seconds:
                    threading.Timer(seconds, (disk / "filler").unlink).start()

            world.broker.acts[route] = fill
            if not route:
                fill()
            done = world.process("--mode", "ALL", "--db", world.db, limits={"STORE_SECONDS": 4})
            self.assertEqual((done.code, world.tokens() != old, world.sent()[2]),
                             (code, code == 0, 0), done)


SCRAPS = ("", " ", "\n", "\r\n", "\t", "\0", "\ufeff", "'", '"', "#", "=", "export ", "\\", "é",
          "\u202e", "ß" * 50, "0", "1", "-1", "true", "null", "9" * 30, "1e999", "NaN", "[", ",",
          ":", "%", "../", "<b>", "PRIMARY", "websocket1", "ALL", "2025-11-23 03:30:00", "٣", "²",
          "2025-11-23T09:15:30.5Z", "Bearer x", "http://[::1]:x/", "UPSTOX_PIN", "\ud800", "3", "q")


class Dice(random.Random):
    """Random texts, values and JSON, near what is expected and far from it."""

    def text(self, longest: int = 8) -> str:
        letters = (*SCRAPS, chr(self.randrange(1, 0x3000)))
        return "".join(self.choice(letters) for _ in range(self.randrange(longest)))

    def value(self, depth: int = 0) -> Any:
        """What json.dumps takes."""
        few = range(self.randrange(4))
        return self.choice((
            lambda: None, self.text, lambda: self.randrange(-9, 9), lambda: bool(few),
            lambda: self.random() * 10 ** self.randrange(20), lambda: 2 ** 62 + self.randrange(99),
            *(lambda: [self.value(depth + 1) for _ in few],
              lambda: {self.text(3): self.value(depth + 1) for _ in few}) * (depth < 3)))()

    def column(self) -> Any:
        """What SQLite takes."""
        value = self.value(3)
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else b""
        return (data if not self.randrange(3) else data.decode(errors="replace")) if data else value

    def like(self, model: Mapping[str, Any]) -> bytes:
        """JSON of that shape with some of it replaced, cut short now and then."""
        if not self.randrange(6):
            return self.text(12).encode("utf-8", "surrogatepass") + self.randbytes(9)
        shape = {key: value if self.randrange(3) else self.value()
                 for key, value in model.items() if self.randrange(8)}
        text = json.dumps(shape if self.randrange(9) else self.value()).encode()
        return text if self.randrange(6) else text[:self.randrange(len(text) + 1)]


class FuzzTest(Case):
    """What others write: whatever it is, a word or a sentence comes of it."""

    def test_fuzz(self) -> None:
        self.table(self.fuzz, [0, *map(slow, range(1, 200))])

    def fuzz(self, seed: int) -> None:
        """Fifty of each kind."""
        dice = Dice(seed)
        with World(1, env=NO_LOGIN, notifier_url=NOTIFIER) as world:
            world.sql(f"CREATE TABLE upstox_tokens (id INTEGER PRIMARY KEY, {COLUMNS})")
            world.seed_valid()
            world.serve()
            before = world.tokens()
            for _ in range(50):
                self.requests(world, dice)
            self.assertEqual((world.ask("GET", "/healthz").code, world.tokens()), (200, before))
            self.assertTrue(all(map(str.isprintable, world.stop().splitlines())))
            for kind in (self.answers, self.rows, self.settings):
                for _ in range(50):
                    kind(world, dice)
                world.broker.switches.profile_answer = None

    def requests(self, world: World, dice: Dice) -> None:
        """Deliveries, and raw bytes: an answer that is no 5xx, or none."""
        body = dice.like(world.broker.delivery("PRIMARY", access_token="x") | {"mode": "x"})
        self.assertIn(world.ask("POST", "/notify", body, JSON).code, (200, 400))
        starts = (b"GET / HTTP/1.1", b"POST " + GENERATE.encode() + b" HTTP/1.1", dice.like({}),
                  b"POST /notify HTTP/1.0", b"GET " + STATUS.encode() + b" HTTP/1.1")
        heads = (b"Host: localhost", b"Content-Type: application/json", b"Connection: close",
                 b"Content-Length: %d" % len(body), b"Content-Length: " + dice.like({}),
                 dice.like({}))
        lines = [dice.choice(starts), *(dice.choice(heads) for _ in range(5)), b"", body]
        got = raw(world.address, b"\r\n".join(lines))
        self.assertTrue(got.code < 500 or got.code == 505, got)
        world.check_said(str(got.headers), got.text)

    def answers(self, world: World, dice: Dice) -> None:
        """Bodies and dates of the API: the profile's verdict, the words for a refusal."""
        entry = {"errorCode": "UDAPI100057", "error_code": "UDAPI100057", "message": "x"}
        body = dice.like({"status": "success", "data": {"user_id": "x"}, "errors": [entry]})
        code = dice.choice((200, 200, 401, 403, 302, 429, 599))
        date = dice.choice(("", "x", "Thu, 99 Xyz 2025 25:61:61 GMT", "9" * 30))
        switches = world.broker.switches
        switches.profile_answer = switches.dialog_answer = Reply(
            code, body.decode("utf-8", "surrogateescape"), [("Date", date)])
        verdict = label(world.call("--status").out)
        self.assertIn(verdict, (f"UNKNOWN ({code})", "UNKNOWN (unexpected answer)", "VALID",
                                "INVALID (401)"))
        self.assertEqual(verdict == "INVALID (401)", code == 401)
        self.assertTrue(verdict != "VALID" or json.loads(body)["status"] == "success")
        said = label(world.call("--check", "--flow", "V3").out)  # a redirect is what it should be
        self.assertRegex(said, "^ok$" if code == 302 else r"^\w.*[.]$")

    def rows(self, world: World, dice: Dice) -> None:
        """Rows of anything in every column, judged as by every command."""
        fit = token_row("PRIMARY", "x" * 40, time.time())
        world.sql("DELETE FROM upstox_tokens")
        world.seed(*({column: dice.column() if dice.randrange(3) else fit.get(column)
                      for column in COLUMNS.split(", ")} for _ in range(2)))
        [token] = json.loads(world.call("--status", "--json").out)["tokens"]
        self.assertIn(token["status"], ("INVALID", "EXPIRED", "NOT FOUND"))  # nobody issued it
        self.assertIn(token["status"], world.call("--status").out)
        with contextlib.suppress(upstox_tokens.TokenError):
            upstox_tokens.access_token("PRIMARY", db=world.db)

    def settings(self, world: World, dice: Dice) -> None:
        """Each may be broken; what is said of it shows no secret. No token: nothing is asked."""
        world.names = [*APPS]
        known = world.write_env(UPSTOX_PIN=PIN, UPSTOX_TOTP=TOTP_SECRET).read_text().splitlines()
        lines = [line if dice.randrange(6) else line.partition("=")[0] + "=" + dice.text()
                 for line in known if dice.randrange(9)]
        text = dice.choice(("\n", "\r\n", "\n\n# x\n")).join([*lines, dice.text(12)])
        world.write_env(text.encode("utf-8", "surrogatepass"))
        line = dice.choice(("--status", "--mode PARTIAL --apis x",
                            "--mode PARTIAL --apis x --flow V3"))
        done = world.call(*line.split(), "--db", world.folder / "none.db")
        self.assertTrue(done.code == 2 or (line, done.err) == ("--status", ""), done)
        for key, _, value in (line.partition("=") for line in lines):
            if re.search("SECRET|PIN|TOTP", key) and len(value) > 11:
                self.assertNotIn(value, done.err)


# ---- bench: what the program costs above a floor that is measured beside it

PACE = {"step_delay": 0.15, "config_delay": 0.2, "profile_delay": 0.08}
WINDOW = 30  # seconds of a TOTP code, and of each wait whose processor time is measured
BARE_CALL = """
import sys, urllib.request
opener = urllib.request.OpenerDirector()
opener.add_handler(urllib.request.HTTPHandler())
def call(url, data=None, **headers):
    with opener.open(urllib.request.Request(url, data, headers), timeout=30) as answer:
        return answer.read()
"""
# the same logins as straight as they can be written: no check, no choice, one poll every 20 ms
BARE_LOGIN = BARE_CALL + """
import json, os, shutil, time
import pyotp
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait
from urllib.parse import parse_qs, urlencode, urlsplit
api, redirect, mobile, totp, pin, apps = json.loads(sys.argv[1])
options = webdriver.ChromeOptions()
options.add_argument("--headless=new")
options.add_argument(f"--host-resolver-rules=MAP {urlsplit(redirect).netloc} ~NOTFOUND")
if os.geteuid() == 0:
    options.add_argument("--no-sandbox")
driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
wait = WebDriverWait(driver, 30, 0.02)
def step(field, button, text):
    wait.until(lambda _: driver.find_element("id", field)).send_keys(text)
    driver.find_element("id", button).click()
for place, (client, secret) in enumerate(apps):
    form = {"client_id": client, "redirect_uri": redirect, "response_type": "code"}
    driver.get(f"{api}/v2/login/authorization/dialog?{urlencode(form)}")
    if not place:
        step("mobileNum", "getOtp", mobile)
        wait.until(lambda _: driver.find_element("id", "otpNum"))
        sent = time.perf_counter()
        step("otpNum", "continueBtn", pyotp.TOTP(totp).now())
    step("pinCode", "pinContinueBtn", pin)
    wait.until(lambda _: driver.current_url.startswith(redirect))
    code = parse_qs(urlsplit(driver.current_url).query)["code"][0]
    form |= {"code": code, "client_secret": secret, "grant_type": "authorization_code"}
    answer = call(api + "/v2/login/authorization/token", urlencode(form).encode())
    call(api + "/v2/user/profile", Authorization="Bearer " + json.loads(answer)["access_token"])
driver.quit()
print(time.perf_counter() - sent)  # with one app: the steps after a code
"""
Figures = tuple[float, float]  # of one run: seconds, MiB


def imports_of_program() -> str:
    """The import lines of the program, and nothing else of it."""
    nodes = ast.parse(PROGRAM.read_text(encoding="utf-8")).body
    return "\n".join(ast.unparse(node) for node in nodes
                     if isinstance(node, (ast.Import, ast.ImportFrom)))


class BenchWorld(World):
    """As many apps as wanted, all tokens valid, and a broker that takes its time."""

    def __init__(self, apps: int = 6, **switches: Any) -> None:
        super().__init__(apps, **(PACE | switches))

    def __enter__(self) -> BenchWorld:
        super().__enter__()
        self.seed_valid()
        return self

    def measure(self, program: Path | str, *argv: str, code: int = 0) -> Figures:
        """Seconds until it ended, and its peak memory; what it said is in the log."""
        with self.log.open("w") as log:
            begun = time.perf_counter()
            process = self.start(*argv, program=program, stdout=log, stderr=log)
            memory = peak_memory(process)
            took = time.perf_counter() - begun
        if process.returncode != code:  # then the figures mean nothing
            raise RuntimeError(f"exit {process.returncode}: {self.log.read_text()}")
        return took, memory

    def begin(self, *argv: str, words: str, **env: str) -> subprocess.Popen[str]:
        """A run that says these words before it begins to wait."""
        with self.log.open("w") as log:
            run = self.start("--mode", "ALL", *argv, env=env, stdout=log, stderr=log)
        self.until(lambda: words in self.log.read_text())
        return run


def line(*cells: str, met: bool | None = None) -> None:
    """One line of the table, at once: the next takes a while."""
    print("|", " | ".join([*cells, "" if met is None else "yes" if met else "NO"]), "|", flush=True)


def compare(name: str, aim: float, pairs: list[tuple[Figures, Figures]], which: int = 0) -> None:
    """Ratio of the medians, spread of the ratios of each floor and the program run after it."""
    floors, programs = ([run[which] for run in runs] for runs in zip(*pairs))
    floor, program = statistics.median(floors), statistics.median(programs)
    ratio, ratios = program / floor, [b / a for a, b in zip(floors, programs)]
    shown = (f"{value:.1f} MiB" if which else f"{value:.3f} s" for value in (floor, program))
    line(name, *shown, f"{ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f})", f"<= {aim}",
         met=ratio <= aim)


def rows_without_browser(rounds: int) -> None:
    imports, status = imports_of_program(), (PROGRAM, "--status")
    with BenchWorld() as world:
        def pairs(floor: Sequence[Any], program: Sequence[Any],
                  code: int = 0) -> list[tuple[Figures, Figures]]:
            return [(world.measure(*floor), world.measure(*program, code=code))
                    for _ in range(rounds)]

        bare = ("-c", imports)
        call = ("-c", f"{imports}\n{BARE_CALL}\ncall(sys.argv[1], Authorization=sys.argv[2])",
                f"{world.broker.api}/v2/user/profile", f"Bearer {[*world.broker.tokens][0]}")
        six = pairs(call, status)
        compare("`--status`, six tokens", 1.25, six)
        compare("peak memory, `--status`", 1.25, six, 1)
        world.measure("-X", "importtime", *status)
        extra = " ".join(sorted(set(re.findall("selenium|pyotp", world.log.read_text()))))
        line("imported by `--status`: selenium, pyotp", "", extra or "none", "", "none",
             met=not extra)
        compare("`--help`", 1.3, pairs(bare, (PROGRAM, "--help")))
        compare("INVALID_ONLY with nothing to do (floor: `--status`)", 1.1,
                pairs(status, (PROGRAM, "--mode", "INVALID_ONLY")))
        world.write_env("UPSTOX_PIN=12\n")
        compare("a configuration error", 1.3, pairs(bare, status, code=2))


def rows_of_server(rounds: int) -> None:
    """A server of its own for every check, since it shares one for 5 s."""
    def fetch(url: str, **headers: str) -> Figures:
        parts, begun = urlsplit(url), time.perf_counter()
        with contextlib.closing(http.client.HTTPConnection(parts.netloc, timeout=30)) as connection:
            connection.request("GET", parts.path, headers=headers)
            answer = connection.getresponse()
            assert answer.read() and answer.status == 200
        return time.perf_counter() - begun, 0

    def fetch_for_a_second(_: int) -> int:
        end, done = time.monotonic() + 1, 0
        while time.monotonic() < end:
            fetch(url + STATUS)
            done += 1
        return done

    pairs, rates = [], []
    for _ in range(rounds):
        with BenchWorld() as world:
            world.serve()
            url = "http://{}:{}".format(*world.address)
            fetch(url + "/healthz")
            bearer = f"Bearer {[*world.broker.tokens][0]}"
            pairs.append((fetch(world.broker.api + "/v2/user/profile", Authorization=bearer),
                          fetch(url + STATUS)))
            rates.append(sum(crowd(8, fetch_for_a_second)))
    compare("`--serve`, a whole check (floor: one profile call)", 1.25, pairs)
    line("`--serve`, status requests a second, 8 clients", "", f"{statistics.median(rates):.0f}",
         f"({min(rates)}-{max(rates)})", "")


def early_in_window() -> None:
    """Late in a window a run has to wait for the next code, which is no cost of its own."""
    left = WINDOW - time.time() % WINDOW
    time.sleep(left if left < 12 else 0)


def login_pairs(count: int, rounds: int, tails: list[float]) -> list[tuple[Figures, Figures]]:
    """Bare script and program in turn; `tails` gets the bare seconds after the code."""
    pairs = []
    for _ in range(rounds):
        early_in_window()
        with BenchWorld(count) as world:
            values = [world.broker.api, REDIRECT_URI, MOBILE, TOTP_SECRET, PIN,
                      list(APPS.values())[:count]]
            floor = world.measure("-c", BARE_LOGIN, json.dumps(values))
            tails.append(float(world.log.read_text()))
        early_in_window()
        with BenchWorld(count) as world:
            pairs.append((floor, world.measure(PROGRAM, "--mode", "ALL")))
    return pairs


def rows_of_logins(rounds: int) -> None:
    """Complete logins, also where each of three apps needs a code of its own."""
    six, tails = login_pairs(6, rounds, []), []
    compare("ALL, six apps, browser remembered", 1.2, six)
    compare("one app", 1.2, login_pairs(1, rounds, tails))
    extra = "import pyotp\nfrom selenium.webdriver import ChromeOptions, Remote"
    with BenchWorld() as world:
        bare = world.measure("-c", f"{imports_of_program()}\n{extra}\ntime.sleep(0.2)")
    compare("peak memory, six logins", 1.3, [(bare, program) for _, program in six], 1)
    early_in_window()
    with BenchWorld(3, remember=False) as world:
        begun = time.time()
        took, _ = world.measure(PROGRAM, "--mode", "ALL")
    floor = (begun // WINDOW + 2) * WINDOW - begun + statistics.median(tails)
    line("ALL, three apps, nothing remembered", f"{floor:.1f} s", f"{took:.1f} s",
         f"{took - floor:+.1f} s", "<= +3 s", met=took <= floor + 3)


def rows_of_waits() -> None:
    """At once: for a code that was never sent, for an approval, for an operator."""
    def processor(run: subprocess.Popen[str]) -> float:
        fields = Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    with contextlib.ExitStack() as stack:
        def world(**switches: Any) -> BenchWorld:
            return stack.enter_context(BenchWorld(1, **switches))

        late = world()
        remember(late, "CODE_SENT CODE_TAKEN " * 3)
        late.sql(f"UPDATE upstox_token_audit SET number = id / 2 + {int(time.time() // WINDOW)}")
        runs = {"a TOTP window": late.begin(words="next TOTP code"),
                "an approval": world(notifier_url=NOTIFIER).begin(
                    "--flow", "V3", "--serve", "127.0.0.1:0", words="waiting for approval"),
                "a CAPTCHA": world(captcha="never").begin(
                    "--headed", words="solve the CAPTCHA", DISPLAY=stack.enter_context(display()))}
        used = {name: processor(run) for name, run in runs.items()}
        time.sleep(WINDOW)
        for name, run in runs.items():
            seconds = processor(run) - used[name]
            line(f"processor seconds while it waits {WINDOW} s for {name}", "",
                 f"{seconds:.2f} s", "", "< 0.3 s", met=seconds < 0.3)
        for run in runs.values():
            run.terminate()
            run.wait(15)


def bench() -> int:
    """Print the table, in 4 minutes; it needs /proc, and Xvfb."""
    rounds, browser = 5, next(filter(None, map(shutil.which, BROWSERS)))
    version = subprocess.run([browser, "--version"], capture_output=True, text=True).stdout
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, "
          f"{version.split(' built')[0].strip()}; medians of {rounds} (spread of the ratios); "
          f"seconds: {PACE}\n\n| row | floor | program | ratio | aim | met? |\n"
          "|---|---|---|---|---|---|")
    rows_without_browser(3 * rounds)
    rows_of_server(rounds)
    rows_of_logins(rounds)
    rows_of_waits()
    return 0


# ---- the commands


def rehearse() -> int:
    """The real program against the imitation, in a folder that is gone afterwards."""
    at_terminal = all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout))
    with World(step_delay=0.15) as world:
        world.seed_guide()
        for argv in [()] if at_terminal else [("--status",), ("--mode", "INVALID_ONLY")]:
            print(f"$ python {PROGRAM.name} {' '.join(argv)}", flush=True)
            program = world.start(*argv, stdin=None, stdout=None, stderr=None,
                                  start_new_session=False)
            code = None
            while code is None:
                with contextlib.suppress(KeyboardInterrupt):  # it reaches the program as well
                    code = program.wait()
            if code in (130, 143):
                return code
        columns = ("api_name", "substr(access_token, 1, 6) || '...'", "validity_at")
        print("\nRows of upstox_tokens now (everything is deleted in a moment):")
        for row in world.rows(", ".join(columns), "upstox_tokens ORDER BY api_index"):
            print("{:<13} {:<10} {}".format(*row.values()))
    return code


def run_class(name: str) -> int:
    """One test class in this process; the last line is what became of its tests, as JSON."""
    suite = unittest.defaultTestLoader.loadTestsFromName(name, sys.modules["__main__"])
    planned = [test.id() for test in suite]
    result = unittest.TextTestRunner(sys.stdout).run(suite)
    bad = {getattr(test, "test_case", test).id() for test, _ in result.failures + result.errors}
    left_out = {getattr(test, "test_case", test).id() for test, _ in result.skipped}
    not_run = set(planned) - set(Case.seconds)  # the class's own setup failed or was skipped
    failed = bad & set(planned) | (not_run if result.errors else set()) or bad  # its cleanup did
    skipped = (left_out & set(planned) | not_run) - failed
    print(json.dumps({"planned": planned, "failed": sorted(failed), "skipped": sorted(skipped),
                      "reasons": sorted({reason for _, reason in result.skipped}),
                      "seconds": Case.seconds}))
    return int(bool(bad))


LONGEST = ("FailureTest", "PinTest", "StopTest", "DashboardTest")  # begun first: none is the last


def run_all(slow_rows: bool = False) -> int:
    """Every test class in a process of its own, several at once."""
    cases = unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"])
    classes = {type(test) for suite in cases for test in suite}
    if not slow_rows:
        classes.discard(StressTest)
    names = {kind.__name__: kind for kind in sorted(classes, key=lambda kind: (
        kind.__name__ not in LONGEST, kind.__name__))}
    environ = os.environ | ({"TEST_SLOW": "1"} if slow_rows else {})
    seconds, counts, begun = {}, collections.Counter(), time.monotonic()

    def run(name: str) -> str:
        command = [sys.executable, __file__, "run-class", name]
        return subprocess.run(command, env=environ, encoding="utf-8", stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).stdout

    # those without a browser mostly wait: two at a time, beside those that keep it busy
    with ThreadPoolExecutor(2 * (os.cpu_count() or 2)) as busy, ThreadPoolExecutor(2) as idle:
        runs = [(busy if issubclass(kind, BrowserCase) else idle).submit(run, name)
                for name, kind in names.items()]
        for name, said in zip(names, map(Future.result, runs)):
            text, _, last = said.rstrip().rpartition("\n")
            try:
                told = json.loads(last)
            except ValueError:  # the process died
                text, told = said, {"planned": [name], "failed": [name], "skipped": [],
                                    "reasons": [], "seconds": {}}
            bad, skipped = len(told["failed"]), len(told["skipped"])
            took = sum(told["seconds"].values())
            print(f"{name:<28} {len(told['planned']):>3} tests {took:>6.1f} s, "
                  f"{bad} failed, {skipped} skipped", *told["reasons"], flush=True)
            if bad:
                print(text, flush=True)
            seconds |= told["seconds"]
            counts.update(passed=len(told["planned"]) - bad - skipped, failed=bad, skipped=skipped)
    print(f"\nThe slowest of {time.monotonic() - begun:.0f} s:")
    for test, took in sorted(seconds.items(), key=lambda pair: -pair[1])[:10]:
        print(f"{took:>6.1f} s {test.removeprefix('__main__.')}")
    print("{passed} passed, {failed} failed, {skipped} skipped".format_map(counts))
    return int(counts["failed"] > 0)


def main(argv: Sequence[str]) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    commands = {"": run_all, "rehearse": rehearse, "stress": lambda: run_all(slow_rows=True),
                "bench": bench, "run-class": lambda: run_class(argv[1])}
    name = "".join(argv[:1])
    if name not in commands:
        unittest.main()
    if name in ("rehearse", "bench") and (problem := missing_for_browser()):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return commands[name]()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
