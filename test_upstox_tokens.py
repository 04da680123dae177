"""Tests of upstox_tokens.py, and an imitation of the broker that everything here runs against.

    python -m unittest                        all tests, on loopback only
    python test_upstox_tokens.py rehearse     the real program and a real browser against it, then gone

`Broker` imitates what the program meets: the API host, the login page with the JSON service behind it, and
the broker's own redirect host. It needs nothing but the standard library; what it should do wrong is chosen
with the switches of `Switches`. The accounts, secrets and tokens below are made up.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import gzip
import hmac
import importlib.util
import json
import os
import random
import secrets
import shutil
import signal
import socket
import socketserver
import sqlite3
import string
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

PROGRAM = Path(__file__).resolve().with_name("upstox_tokens.py")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER_PATHS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "C:/Program Files/Google/Chrome/Application/chrome.exe",
    "C:/Program Files (x86)/Google/Chrome/Application/chrome.exe",
)

# ---- the made-up account; every value is distinctive, so that it can be searched for in all output

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

DAY = 86400
CUTOFF = 3.5 * 3600 - 5.5 * 3600  # 03:30 Indian time, as seconds of the UTC day

# ---- what the broker says when it says no

API_ERRORS = {  # code: (HTTP status, message)
    "UDAPI10005": (429, "Too Many Request Sent"),
    "UDAPI100016": (401, "Invalid Credentials"),
    "UDAPI100050": (401, "Invalid token used to access API"),
    "UDAPI100057": (401, "Invalid Auth code"),
    "UDAPI100058": (401, "No segments for these users are active. Manual reactivation is recommended from "
                         "Upstox app/web."),
    "UDAPI100060": (404, "Resource not Found."),
    "UDAPI100068": (401, "Check your 'client_id' and 'redirect_uri'; one or both are incorrect."),
    "UDAPI100069": (401, "Check your 'client_id' and 'client_secret'; one or both are incorrect."),
    "UDAPI100073": (401, "Your 'client_id' is inactive."),
    "UDAPI100500": (500, "Something went wrong, please contact us"),
    "UDAPI1123": (400, "Notifier URL is not configured."),
    "UDAPI1124": (400, "Not an individual user."),
    "UDAPI1155": (400, "The app is under review or was rejected."),
    "UDAPI1157": (400, "The app has expired."),
}
# What one wrong OTP or PIN is really answered is not known: these two codes and texts are invented.
WRONG_OTP, WRONG_PIN = "1017071", "1017089"
PAGE_ERRORS = {
    "1017007": "Your session is no longer valid, please start again.",
    "1017016": "You have entered a invalid mobile number please enter the correct mobile number",
    "1017069": "You have exceeded the maximum number of times you can generate an OTP. "
               "Kindly, try again after 10 mins.",
    WRONG_OTP: "The code you entered is incorrect.",
    "1017074": "Multiple accounts are linked to this mobile number.",
    "1017076": "Your session to validate otp has expired, please try again.",
    "1017078": "You have entered an incorrect OTP too many times. Please try again after 10 minutes.",
    "1017079": "Your login session was lost.",
    WRONG_PIN: "The PIN you entered is incorrect.",
    "1017090": "Your account is locked.",
    "1017125": "OTP verification is blocked for this account.",
}
Answer = str | list[str] | None


@dataclass
class Switches:
    """What the imitation does; every one can be given to Broker(...) and changed later at broker.switches.

    An answer is None (behave), one of the words named (every time), or a list of words (used up one by one).
    """

    # how long things take, in seconds
    page_delay: float = 0  # loader of the login page, until its step is mounted
    step_delay: float = 0  # each of: mobile, OTP, PIN
    dialog_delay: float = 0  # the authorize dialog's answer
    redirect_delay: float = 0  # the broker's own redirect to the app's redirect URI
    exchange_delay: float = 0  # code -> token
    profile_delay: float = 0  # each profile call
    clock_offset: float = 0  # the broker's clock (Date header and TOTP windows) runs this much ahead
    toast_ms: int = 3000  # life of a toast, before its fade of 300 ms

    # the account and its apps
    redirect_uri: str = REDIRECT_URI  # as registered with every app
    redirect_uris: dict[str, str] = field(default_factory=dict)  # api name: another one
    only: set[str] | None = None  # dialog, token, profile, v3, pin answers, redirect_state: these apps
    one_token_per_app: bool = True  # a new token ends the app's older one
    totp_enabled: bool = True  # False: an account that only takes codes sent by SMS
    totp_single_use: bool = True  # a code that was accepted once is refused the second time
    otp_limit: int | None = None  # OTP requests allowed before 1017069
    create_pin: bool = False  # no PIN set yet: the PIN step asks to invent one
    user_id: str = USER_ID  # of tokens issued from now on

    # the look of the login page
    page: str = ""  # blank, loader (never ends), hang (page never answers)
    remember: bool = True  # False: every dialog starts at the mobile step, as in a fresh browser
    lead_phone: bool = False  # starts at the OTP step with an OTP request of its own
    stale_identity: bool = False  # the remembered login has run out: the PIN step falls back to the first
    otp_mask: bool = False  # the OTP field shows 123-456
    otp_autosubmit: int | None = None  # the sixth digit submits the form, this many ms later
    otp_button_always_enabled: bool = False  # Continue has no type and works with an empty field
    spinner: int = 0  # ms of an overlay once a field is complete (chromedriver itself waits out about 1000)
    rerender: int = 0  # replace inputs and buttons by new nodes every so many ms (below 100 nobody can type)
    keep_hidden_inputs: bool = False  # the inputs of the other steps are in the page too, hidden
    resend_seconds: int = 120  # until Resend OTP can be pressed
    captcha: str | None = None  # never, auto (passes after captcha_seconds), click (its box must be clicked)
    captcha_seconds: float = 2
    captcha_shadow: bool = False  # the widget sits in a closed shadow root, as the real script puts it

    # what the page's service answers: a code of PAGE_ERRORS (any other number works too), hang, or reset
    mobile_answer: Answer = None  # 1017016, 1017069, 1017074 ...; reset shows "Request aborted [500]"
    otp_answer: Answer = None  # 1017076, 1017078, 1017079, 1017125 ...
    pin_answer: Answer = None  # 1017007, 1017079, 1017090 ..., dormant, something_went_wrong

    # what the API answers: a UDAPI code without the word, 401 429 500 503 html empty truncated hang drip
    # endless gzip header_flood reset, and what is named here
    dialog_answer: Answer = None  # 100068 ..., direct (302 to the redirect URI at once)
    dialog_status: int = 401  # HTTP status of the dialog's refusals
    token_answer: Answer = None  # no_token, wrong_type
    profile_answer: Answer = None  # redirect (to another host, see broker.leaked), success_false
    v3_answer: Answer = None
    error_keys: str = "both"  # errorCode, error_code
    redirect_state: str | None = None  # missing, other

    # approval on the phone
    notifier_url: str = ""  # where deliveries go; empty: UDAPI1123
    notifier_shown: str | None = None  # another notifier_url in the reply
    approve_after: float | dict[str, float] | None = None  # approves by itself after so many seconds
    v3_seconds: float | None = None  # a request's life; default: until 03:30 Indian time


PAGE_SWITCHES = (
    "remember", "lead_phone", "otp_mask", "otp_autosubmit", "otp_button_always_enabled", "spinner",
    "rerender", "keep_hidden_inputs", "toast_ms", "captcha", "captcha_shadow",
)

BLANK_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Login to Upstox</title></head>
<body><noscript>You need to enable JavaScript to run this app.</noscript>
<main id="root"></main><div id="modalRoot"></div></body></html>
"""

SCRIPT = r"""<script>
"use strict";
const CFG = /*CFG*/null;
const INPUTS = ["mobileNum", "otpNum", "pinCode"], BUTTONS = ["getOtp", "continueBtn", "pinContinueBtn"];
const LOST = [1017079, 1017084, 1017095, 1017105], BLOCKED = [1017078, 1017125];
const LOCKED = "Due to too many incorrect PIN attempts, your account has been locked. " +
  "Unlock your account by verifying your details.";
const query = new URLSearchParams(location.search);
const root = document.getElementById("root");
const $ = id => document.getElementById(id);
const state = {step: -1, mobile: "", otp: "", pin: "", busy: false, blocked: false, locked: false,
  captcha: false, alert: "", info: "", subtitle: "", totp: true, otpToken: "", resend: 0};

// class names are short, meaningless and other ones at every load, as with every build of the real page
const css = {};
function styles(rules) {
  const names = new Set();
  while (names.size < Object.keys(rules).length)
    names.add("_abcdefgh"[names.size] + Math.random().toString(36).replace(/[\d.]/g, "").slice(0, 1));
  for (const name in rules) css[name] = [...names][Object.keys(rules).indexOf(name)];
  const sheet = document.head.appendChild(document.createElement("style"));
  sheet.textContent = Object.keys(rules).map(name => `.${css[name]}{${rules[name]}}`).join("\n");
}
styles({
  columns: "display:flex;gap:64px;max-width:960px;margin:48px auto;font:16px sans-serif",
  field: "display:block;margin:8px 0;padding:12px",
  button: "min-width:240px;height:44px",
  toasts: "position:fixed;bottom:16px;left:50%;transform:translateX(-50%);max-width:328px;font:14px Arial",
  toast: "margin-top:8px;padding:12px;background:#222;color:#fff;transition:opacity .3s,transform .3s",
  cover: "position:fixed;inset:0;background:#fff8;z-index:9",
  spin: "display:inline-block;width:16px;height:16px;border:2px solid;border-radius:50%",
});

// ---- what a browser remembers between two logins
const cookie = name => (document.cookie.match(`(?:^|; )${name}=([^;]*)`) || [])[1];
function remember(profile, mobile) {
  const flags = {HAS_SECRET_PIN: true, AUTH_IDENTITY_SET: true, PROFILE_ID: profile.profileId,
    MOBILE_NUMBER: mobile, USER_PROFILE: JSON.stringify(profile)};
  for (const name in flags) localStorage.setItem(name, flags[name]);
  document.cookie = `profile_id=${profile.profileId};path=/;max-age=86400`;
  document.cookie = "user_type=CUSTOMER;path=/;max-age=86400";
}
function forget() {
  localStorage.clear();
  for (const name of ["profile_id", "user_type", "auth_identity_token", "auth_identity_token_expiry"])
    document.cookie = `${name}=;path=/;max-age=0`;
}

// ---- the steps
const field = (id, attributes) => `<input id="${id}" class="${css.field}" ${attributes}>`;
const button = (id, attributes) => `<button id="${id}" class="${css.button}" ${attributes}></button>`;
const pinForm = (heading, label, extra) => () => `<h2 data-text="${heading}"></h2>
  <form id="secret-pin-form"><label for="pinCode">${label}</label>
    ${field("pinCode", 'type="password" inputmode="numeric" maxlength="6" required autofocus')}
    <div data-text="alert"></div>${button("pinContinueBtn", 'type="submit"')}</form>${extra}`;
const STEPS = [
  () => `<h2>Let’s get started</h2><h3>Login with mobile number</h3>
    <p>We'll send you a one-time password (OTP) to verify your mobile number.</p>
    <form id="mobile-number-form"><label>Enter mobile number</label><span>+91</span>
      ${field("mobileNum", 'type="text" maxlength="10" autofocus')}<span data-text="mobileHint"></span>
      ${CFG.captcha && !state.captcha ? '<div class="cf-turnstile"></div>' : ""}
      ${button("getOtp", 'type="submit"')}</form>`,
  () => `<svg width="24" height="24"></svg><h3>Verify your number</h3><p data-text="subtitle"></p>
    <form id="otp-form"><label>${state.totp ? "Enter OTP or TOTP" : "Enter OTP"}</label>
      ${field("otpNum", 'type="text" autocomplete="one-time-code"')}
      <span data-qa="info-message" data-text="info"></span><div data-text="alert"></div>
      ${button("continueBtn", CFG.otp_button_always_enabled ? "" : 'type="submit"')}</form>
    <a id="resend" data-text="resendText"></a>${state.totp ? "" : " <a>Try TOTP?</a>"}`,
  pinForm("hello", "Enter 6-digit PIN", `<p>Welcome back</p><a>Forgot PIN?</a>
    <footer><span data-text="signedIn"></span> <a>Switch account?</a></footer>`),
  pinForm("verifyPin", "Verify your 6-digit PIN", ""),
];
const CREATE_PIN = pinForm("createPin", "Create a new 6-digit PIN", "");
const QR = `<aside><h3>Login with QR code</h3><canvas width="128" height="128"></canvas></aside>`;
const TEXTS = {
  subtitle: () => state.subtitle, info: () => state.info, alert: () => state.alert,
  hello: () => `Hi ${profile().firstName || "there!"}`,
  createPin: () => "Create a new 6-digit PIN", verifyPin: () => "Verify your 6-digit PIN",
  signedIn: () => `Signed in as ${localStorage.getItem("MOBILE_NUMBER")}.`,
  mobileHint: () => !state.mobile || /^[6789]\d{9}$/.test(state.mobile) ? "" : state.mobile.length < 10 ?
    "Enter a 10-digit mobile number." : "Make sure your mobile number was entered correctly.",
  resendText: () => state.resend <= 0 ? "Resend OTP" :
    `Resend OTP (${Math.floor(state.resend / 60)}:${String(state.resend % 60).padStart(2, "0")}s)`,
};
const profile = () => JSON.parse(localStorage.getItem("USER_PROFILE") || "{}");
const hasPin = () => localStorage.getItem("HAS_SECRET_PIN") === "true";
const template = step => (step === 2 && !hasPin() ? CREATE_PIN : STEPS[step])();

function show(step) {
  Object.assign(state, {step, busy: false, alert: "", info: ""});
  const hidden = CFG.keep_hidden_inputs ? [0, 1, 2].filter(other => other !== Math.min(step, 2)) : [];
  root.innerHTML = `<div class="${css.columns}"><section>${template(step)}
    ${hidden.map(other => `<div style="display:none">${template(other)}</div>`).join("")}</section>${QR}</div>
    <p>Need help? <a href="https://upstox.com/contact-us/">Contact us</a></p>
    <footer>SEBI INZ000000000</footer>`;
  refresh();
  if (step === 0) turnstile();
  $(INPUTS[Math.min(step, 2)]).focus();
  // the check runs after the step was painted, so a stale login shows the PIN field for a moment
  if (step === 2 && !(Number(cookie("auth_identity_token_expiry")) > Date.now())) setTimeout(reset, 30);
}
function reset() {
  forget();
  Object.assign(state, {mobile: "", otp: "", pin: "", blocked: false, locked: false});
  show(0);
}
function route(path, heading) {
  history.pushState({}, "", path);
  root.innerHTML = `<h2>${heading}</h2><form><label for="pan">Enter your PAN</label><input id="pan"></form>`;
}

// values live in the state and are painted into the fields, as a controlled input of React does
const masked = digits => CFG.otp_mask ? digits.replace(/^(\d{3})(?=\d)/, "$1-") : digits;
function refresh() {
  const off = state.busy;
  paint("mobileNum", state.mobile, off);
  paint("otpNum", masked(state.otp), off || state.blocked);
  paint("pinCode", state.pin, off || state.locked);
  press("getOtp", "Get OTP", !/^[6789]\d{9}$/.test(state.mobile) || (CFG.captcha && !state.captcha));
  press("continueBtn", "Continue", state.blocked || !(CFG.otp_button_always_enabled || state.otp));
  press("pinContinueBtn", state.locked ? "Unlock account" : "Continue", !state.locked && !state.pin);
  for (const node of document.querySelectorAll("[data-text]")) {
    const text = TEXTS[node.dataset.text]();
    if (node.textContent !== text) node.textContent = text;
  }
}
function paint(id, value, off) {
  const node = $(id);
  if (!node) return;
  if (node.value !== value) node.value = value;
  node.disabled = off;
}
function press(id, text, off) {
  const node = $(id), html = state.busy ? `<i class="${css.spin}"></i>` : text;
  if (!node) return;
  if (node.innerHTML !== html) node.innerHTML = html;
  node.disabled = Boolean(off);
}
function renewNodes() {
  for (const old of [...INPUTS, ...BUTTONS].map($)) {
    if (!old || old.matches(":active")) continue;
    const focused = document.activeElement === old, node = old.cloneNode(true);
    old.replaceWith(node);
    if (focused) node.focus();
    if (focused && "value" in node && node.tagName === "INPUT")
      node.setSelectionRange(node.value.length, node.value.length);
  }
  refresh();
}

function toast(text) {
  const node = $("modalRoot").nextElementSibling.appendChild(document.createElement("div"));
  node.className = css.toast;
  node.textContent = text;
  const end = () => {
    if (node.matches(":hover")) return setTimeout(end, 200);
    node.style.opacity = 0;
    node.style.transform = "translateY(16px)";
    setTimeout(() => node.remove(), 300);
  };
  setTimeout(end, CFG.toast_ms);
}
function cover(milliseconds) {
  const node = document.body.appendChild(document.createElement("div"));
  node.className = css.cover;
  setTimeout(() => node.remove(), milliseconds);
}

// ---- the calls behind the steps
async function call(path, data) {
  state.busy = true;
  refresh();
  const who = profile(), hex = Math.random().toString(16).padEnd(12, "0").slice(2, 12);
  const headers = {"Content-Type": "application/json", "X-Request-ID": "WPRO-" + hex,
    "X-Device-Details": "platform=WEB|osName=Linux|osVersion=|appVersion=4.0.0|modelName=|manufacturer=",
    "X-Profile-Id": who.profileId || "", "X-User-Id": who.userId || ""};
  try {
    const options = {method: "POST", credentials: "include", headers, body: JSON.stringify({data})};
    return await (await fetch(path, options)).json();
  } catch (error) {
    return {success: false, error: {code: 500, message: "Request aborted"}};
  } finally {
    state.busy = false;
    refresh();
  }
}
function failed({code, message}) {
  if (LOST.includes(code)) return reset();
  if (code === 1017074) message += " Tap here, to know more.";
  toast(`${message} [${code}]`);
}
async function requestOtp(again) {
  const mobile = state.mobile || localStorage.getItem("MOBILE_NUMBER") || CFG.mobile;
  const {success, data, error} = await call("/login/open/v6/auth/1fa/otp/generate",
    {mobileNumber: mobile, userId: query.get("user_id")});
  if (!success) return failed(error);
  Object.assign(state, {mobile, otp: "", otpToken: data.validateOTPToken, resend: data.nextRequestInterval,
    subtitle: data.message, totp: data.isTotpEnabled});
  toast(again ? "OTP has been resent to your Phone!" : "OTP has been sent to your Phone!");
  if (again) refresh(); else show(1);
}
async function verifyOtp() {
  if (state.otp.length !== 6) {
    state.info = "It should be a 6-digit OTP.";
    return refresh();
  }
  const {success, data, error} = await call("/login/open/v4/auth/1fa/otp-totp/verify",
    {otp: state.otp, validateOtpToken: state.otpToken});
  state.otp = "";
  if (success) {
    remember(data.userProfile, state.mobile);
    localStorage.setItem("HAS_SECRET_PIN", data.isSecretPinSet);
    toast("Your OTP has been successfully verified.");
    return show(2);
  }
  if (BLOCKED.includes(error.code)) {
    Object.assign(state, {blocked: true, alert: error.message});
    if (error.code === 1017078) state.resend = 600;
  } else failed(error);
  refresh();
}
async function sendPin() {
  if (state.locked) return route("/unlock-account", "Unlock account");
  if (!hasPin() && state.step === 2) return state.pin = "", show(3);
  if (!hasPin()) return call("/login/open/v3/secret-pin", {pin: btoa(state.pin)});
  const client = {client_id: query.get("client_id"), redirect_uri: query.get("redirect_uri")};
  const {success, data, error} = await call("/login/open/v3/auth/2fa?" + new URLSearchParams(client),
    {twoFAMethod: "SECRET_PIN", inputText: btoa(state.pin)});
  if (success) return approve(client, data);
  if (error.code === 1017090) {
    Object.assign(state, {locked: true, alert: LOCKED});
    return refresh();
  }
  failed(error);
  if (error.code === 1017007) reset();
}
async function approve(client, data) {
  if (["DORMANT", "INACTIVE"].includes(data.customerStatus))
    return route("/reactivate-account", "Reactivate your account");
  let target = data.redirectUri;
  if (data.isExternalClientOAuthApp) {
    const oauth = {...client, requestId: data.requestId, response_type: "code"};
    const path = "/login/v2/oauth/authorize?" + new URLSearchParams(oauth);
    const answer = await call(path, {userOAuthApproval: true});
    target = answer.success && answer.data.redirectUri;
  }
  if (!target) return toast("Something went wrong");
  state.busy = true;
  refresh();
  location.replace(target);
}

// ---- events; they are caught at the document, so that replaced nodes need no handlers of their own
const SUBMIT = {"mobile-number-form": () => requestOtp(false), "otp-form": verifyOtp,
  "secret-pin-form": sendPin};
document.addEventListener("submit", event => {
  event.preventDefault();
  if (!state.busy && SUBMIT[event.target.id]) SUBMIT[event.target.id]();
});
document.addEventListener("input", ({target}) => {
  const digits = target.value.replace(/\D/g, ""), pure = digits === target.value;
  if (target.id === "mobileNum" && pure && digits.length <= 10) state.mobile = digits;
  if (target.id === "otpNum") state.otp = CFG.otp_mask ? digits.slice(0, 6) : digits;
  if (target.id === "pinCode" && pure) state.pin = digits;
  state.info = "";
  refresh();
  if (digits.length !== (target.id === "mobileNum" ? 10 : 6)) return;
  if (CFG.spinner) cover(CFG.spinner);
  const submit = () => state.step === 1 && !state.busy && state.otp.length === 6 && verifyOtp();
  if (target.id === "otpNum" && CFG.otp_autosubmit !== null) setTimeout(submit, CFG.otp_autosubmit);
});
document.addEventListener("click", ({target}) => {
  if (target.id === "resend" && state.resend <= 0 && !state.busy && !state.blocked) requestOtp(true);
});
addEventListener("message", ({data}) => {
  if (data !== "turnstile passed") return;
  state.captcha = true;
  refresh();
});
function turnstile() {
  const box = document.querySelector(".cf-turnstile");
  if (!box) return;
  const inner = box.appendChild(document.createElement("div"));
  const frame = document.createElement("iframe");
  frame.src = "/challenges.cloudflare.com/turnstile?sitekey=0x4AAAAAAA";
  frame.title = "Widget containing a Cloudflare security challenge";
  Object.assign(frame, {width: 300, height: 65});
  (CFG.captcha_shadow ? inner.attachShadow({mode: "closed"}) : inner).append(frame);
}
async function start() {
  root.innerHTML = `<div class="${css.cover}"><i class="${css.spin}"></i></div>`;
  document.body.appendChild(document.createElement("div")).className = css.toasts;
  $("modalRoot").after(document.querySelector("." + css.toasts));
  await fetch("/config.json").catch(() => null);
  if (!CFG.remember) forget();
  setInterval(() => state.step === 1 && state.resend > 0 && (state.resend -= 1, refresh()), 1000);
  if (CFG.rerender) setInterval(() => state.step >= 0 && renewNodes(), CFG.rerender);
  if (localStorage.getItem("AUTH_IDENTITY_SET") && cookie("user_type") === "CUSTOMER") return show(2);
  show(0);
  if (CFG.lead_phone) requestOtp(false);
}
start();
</script></body>"""

TURNSTILE_PAGE = """<!doctype html><html lang="en"><body style="font:14px sans-serif">
<label><input type="checkbox" id="box"> Verify you are human</label>
<script>
const pass = () => parent.postMessage("turnstile passed", "*");
document.getElementById("box").onclick = () => { if ("/*MODE*/" === "click") pass(); };
setInterval(async () => { if (await (await fetch("turnstile/state")).json()) pass(); }, 200);
</script></body></html>
"""

# ---- the imitation

V3_PATH = "/v3/login/auth/token/request"
HOP_PATH = "/login/authorization/redirect"
TURNSTILE_PATH = "/challenges.cloudflare.com/turnstile"
ROUTES = {  # (host, method, path): name; Broker.on_<name> answers
    ("api", "GET", "/v2/login/authorization/dialog"): "dialog",
    ("api", "POST", "/v2/login/authorization/token"): "token",
    ("api", "GET", "/v2/user/profile"): "profile",
    ("api", "DELETE", "/v2/logout"): "logout",
    ("api", "POST", V3_PATH): "v3",
    ("hop", "GET", HOP_PATH): "hop",
    ("hop", "GET", "/elsewhere"): "elsewhere",
    ("login", "GET", "/"): "page",
    ("login", "GET", "/config.json"): "config",
    ("login", "GET", TURNSTILE_PATH): "turnstile",
    ("login", "GET", TURNSTILE_PATH + "/state"): "turnstile_state",
    ("login", "POST", "/login/open/v6/auth/1fa/otp/generate"): "generate",
    ("login", "POST", "/login/open/v4/auth/1fa/otp-totp/verify"): "verify",
    ("login", "POST", "/login/open/v3/auth/2fa"): "pin",
    ("login", "POST", "/login/open/v3/secret-pin"): "new_pin",
    ("login", "POST", "/login/v2/oauth/authorize"): "authorize",
}
HTML = "<!doctype html><html><body><h1>Service Unavailable</h1></body></html>"
BAD_BYTES = {"hang", "drip", "endless", "gzip", "header_flood", "reset", "truncated"}  # Handler.fault_<name>


@dataclass
class Request:
    """One request as the imitation's own code sees it."""

    host: str
    method: str
    path: str
    query: dict[str, str]
    headers: Any
    body: bytes
    route: str = "unknown"

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}").get("data") or {}

    @property
    def form(self) -> dict[str, str]:
        is_form = self.headers.get_content_type() == "application/x-www-form-urlencoded"
        return dict(parse_qsl(self.body.decode())) if is_form else {}

    @property
    def cookies(self) -> dict[str, str]:
        pairs = (item.strip().partition("=") for item in self.headers.get("Cookie", "").split(";"))
        return {name: value for name, _, value in pairs}


@dataclass
class Reply:
    """An answer that is well-formed HTTP; anything else is a word of BAD_BYTES."""

    status: int = 200
    body: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Token:
    app: str
    user_id: str
    live: bool = True


def json_reply(data: Any, status: int = 200, headers: list[tuple[str, str]] | None = None) -> Reply:
    return Reply(status, json.dumps(data), [("Content-Type", "application/json"), *(headers or [])])


def html_reply(text: str, status: int = 200, headers: list[tuple[str, str]] | None = None) -> Reply:
    return Reply(status, text, [("Content-Type", "text/html; charset=utf-8"), *(headers or [])])


def page_success(data: dict[str, Any], headers: list[tuple[str, str]] | None = None) -> Reply:
    return json_reply({"success": True, "data": data}, headers=headers)


def page_failure(code: str) -> Reply:
    """The login service answers HTTP 200 even when it refuses."""
    error = {"code": int(code), "message": PAGE_ERRORS.get(code, "The request was refused.")}
    return json_reply({"success": False, "requestId": "WPRO-0000000000", "error": error})


def totp(secret: str, moment: float) -> str:
    """The six digits of RFC 6238 for the 30 s window that holds this moment."""
    digest = hmac.new(base64.b32decode(secret), struct.pack(">Q", int(moment // 30)), "sha1").digest()
    start = digest[-1] & 15
    return f"{(int.from_bytes(digest[start:start + 4], 'big') & 0x7FFFFFFF) % 10**6:06d}"


def next_cutoff(moment: float) -> float:
    """The first 03:30 Indian time strictly after the moment."""
    return ((moment - CUTOFF) // DAY + 1) * DAY + CUTOFF


def new_token(user_id: str) -> str:
    """A token that looks like the broker's: three parts, readable claims, random content."""
    now = int(time.time())
    claims = {"sub": user_id, "jti": secrets.token_hex(24), "iat": now, "exp": int(next_cutoff(now)),
              "iss": "udapi-gateway-service", "isMultiClient": False}
    parts = [json.dumps({"typ": "JWT", "alg": "HS256"}).encode(), json.dumps(claims).encode(), os.urandom(32)]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


class Handler(BaseHTTPRequestHandler):
    """Reads a request, asks the Broker, writes what it says; knows the ways to answer badly."""

    server: Any

    def answer(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Request(self.server.host, self.command, parts.path, dict(parse_qsl(parts.query)),
                          self.headers, body)
        reply = self.server.broker.handle(request)
        if isinstance(reply, Reply):
            self.send(reply)
        else:
            getattr(self, "fault_" + reply)()

    do_GET = do_POST = do_DELETE = answer

    def send(self, reply: Reply) -> None:
        body = reply.body.encode()
        self.head(reply.status, [*reply.headers, ("Content-Length", str(len(body)))])
        self.wfile.write(body)

    def head(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(self.server.broker.now())

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def fault_hang(self) -> None:
        self.server.broker.pause(600)

    def fault_reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def fault_truncated(self) -> None:
        self.head(200, [("Content-Type", "application/json"), ("Content-Length", "900")])
        self.wfile.write(b'{"status":"success","access_tok')

    def fault_drip(self) -> None:
        self.head(200, [("Content-Type", "application/json"), ("Content-Length", "900")])
        while not self.server.broker.pause(1):
            self.wfile.write(b" ")

    def fault_endless(self) -> None:
        self.head(200, [("Content-Type", "application/json")])
        while not self.server.broker.pause(0):
            self.wfile.write(b" " * 65536)

    def fault_gzip(self) -> None:
        body = gzip.compress(b" " * 200_000_000, 1)
        headers = [("Content-Type", "application/json"), ("Content-Encoding", "gzip")]
        self.head(200, [*headers, ("Content-Length", str(len(body)))])
        self.wfile.write(body)

    def fault_header_flood(self) -> None:
        self.head(200, [(f"X-Flood-{number}", "x" * 500) for number in range(5000)])


class Server(ThreadingHTTPServer):
    """One of the broker's hosts, on a free port of 127.0.0.1."""

    request_queue_size = 256

    def __init__(self, broker: Broker, host: str) -> None:
        self.broker, self.host = broker, host
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        # the poll interval bounds how long close() takes
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)

    def server_bind(self) -> None:
        # without HTTPServer's look-up of the host's full name, which may ask a DNS server
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that hung up is everyday life
            super().handle_error(request, client_address)


class Broker:
    """The broker on three loopback ports; use it with `with`, its switches choose what goes wrong."""

    def __init__(self, **switches: Any) -> None:
        self.switches = Switches(**switches)
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self.captcha_solved = threading.Event()
        self.hits: list[tuple[str, str, str]] = []  # (method, path, detail) of every request
        self.counts: collections.Counter[str] = collections.Counter()  # requests by name of ROUTES
        self.logins: list[str] = []  # api names, in the order of their redirects
        self.otp_requests: list[str] = []  # mobile numbers an OTP was asked for
        self.codes: list[str] = []  # every OTP sent, right or wrong
        self.pins: list[str] = []  # every PIN sent, right or wrong
        self.wrong_pins = 0
        self.auth_codes: dict[str, tuple[str, bool]] = {}  # authorization code: (api name, still good)
        self.tokens: dict[str, Token] = {}
        self.requested: dict[str, str] = {}  # v3: api name: request's time, epoch ms
        self.leaked: list[str] = []  # Authorization headers that followed a redirect to another host
        self.profiles_in_flight = self.max_profiles_in_flight = 0
        self._dialogs: dict[str, tuple[str, str | None]] = {}  # internal client id: (api name, state)
        self._otp_tokens: set[str] = set()
        self._identities: set[str] = set()
        self._used_codes: set[str] = set()
        self._servers = {host: Server(self, host) for host in ("api", "hop", "login")}
        self.api, self.hop, self.login = (server.url for server in self._servers.values())

    def __enter__(self) -> Broker:
        for server in self._servers.values():
            server.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    # ---- what tests ask and do

    def now(self) -> float:
        return time.time() + self.switches.clock_offset

    def count(self, route: str) -> int:
        """Requests so far, by a name of ROUTES: dialog, token, profile, logout, v3, hop, generate, pin ..."""
        return self.counts[route]

    def details(self, route: str) -> list[str]:
        """The details (mostly api names) of this route's requests, in order."""
        paths = {(method, path) for (_, method, path), name in ROUTES.items() if name == route}
        return [detail for method, path, detail in self.hits if (method, self._stem(path)) in paths]

    def redirect_uri(self, name: str) -> str:
        return self.switches.redirect_uris.get(name, self.switches.redirect_uri)

    def dialog_url(self, name: str, state: str | None = None) -> str:
        query = {"response_type": "code", "client_id": APPS[name][0], "redirect_uri": self.redirect_uri(name)}
        query |= {"state": state} if state else {}
        return f"{self.api}/v2/login/authorization/dialog?{urlencode(query)}"

    def issue(self, name: str, user_id: str | None = None) -> str:
        """Make a token that the broker takes, as if the app had logged in."""
        token = new_token(user_id or self.switches.user_id)
        with self.lock:
            for older in self.tokens.values():
                if self.switches.one_token_per_app and older.app == name:
                    older.live = False
            self.tokens[token] = Token(name, user_id or self.switches.user_id)
        return token

    def revoke(self, token: str) -> None:
        self.tokens[token].live = False

    def secrets(self) -> set[str]:
        """Everything that must never be seen in any output, as far as it is known by now."""
        fixed = {MOBILE, PIN, TOTP_SECRET, *(secret for _, secret in APPS.values())}
        return fixed | {*self.tokens, *self.auth_codes, *self.codes}

    def solve_captcha(self) -> None:
        """Do what the operator does in front of the browser."""
        self.captcha_solved.set()

    def delivery(self, name: str, **changes: Any) -> dict[str, Any]:
        """The body that reaches the notifier after an approval; issues the token it carries."""
        now = time.time()
        body = {"client_id": APPS[name][0], "user_id": self.switches.user_id, "token_type": "Bearer",
                "issued_at": str(int(now * 1000)), "expires_at": str(int(next_cutoff(now) * 1000)),
                "message_type": "access_token"}
        return body | ({} if "access_token" in changes else {"access_token": self.issue(name)}) | changes

    def deliver(self, body: Any, url: str | None = None) -> int:
        """POST to the notifier; its HTTP status, or 0 when nobody took it. The broker does not try again."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(url or self.switches.notifier_url, data, method="POST",
                                         headers={"Content-Type": "application/json"})
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as refused:
            refused.close()
            return refused.code
        except OSError:
            return 0

    def approve(self, name: str, **changes: Any) -> int:
        """The user taps approve: the token is delivered; the notifier's HTTP status."""
        return self.deliver(self.delivery(name, **changes))

    # ---- shared by the answers below

    def pause(self, seconds: float) -> bool:
        """Wait, but no longer than the imitation lives; True when it is closing."""
        return self.closing.wait(seconds) if seconds > 0 else self.closing.is_set()

    def handle(self, request: Request) -> Reply | str:
        stem = self._stem(request.path)
        route = ROUTES.get((request.host, request.method, stem))
        if route is None:
            if request.path != "/favicon.ico":
                self.hit(request)
            return self.error("UDAPI100060")
        request.route = route
        return getattr(self, "on_" + route)(request)

    @staticmethod
    def _stem(path: str) -> str:
        return V3_PATH if path.startswith(V3_PATH + "/") else path

    def hit(self, request: Request, detail: str = "") -> None:
        with self.lock:
            self.hits.append((request.method, request.path, detail))
            self.counts[request.route] += 1

    def asked_for(self, switch: str, app: str = "") -> str | None:
        """The switch's word for this call, or None to behave; a list is used up word by word."""
        value, only = getattr(self.switches, switch), self.switches.only
        if not value or (app and only is not None and app not in only):
            return None
        with self.lock:
            return value if isinstance(value, str) else value.pop(0) if value else None

    def error(self, code: str, status: int | None = None) -> Reply:
        code_status, message = API_ERRORS[code]
        keys = [key for key in ("errorCode", "error_code") if self.switches.error_keys in ("both", key)]
        entry = dict.fromkeys(keys, code) | {"message": message, "propertyPath": None, "invalidValue": None}
        return json_reply({"status": "error", "errors": [entry]}, status or code_status)

    def misbehave(self, word: str, unauthorized: str, status: int | None = None) -> Reply | str:
        """The API's bad answers that every endpoint can give."""
        if word in BAD_BYTES:
            return word
        if word in ("html", "503"):
            return html_reply(HTML, 503 if word == "503" else 200)
        if word == "empty":
            return Reply(200, "", [("Content-Type", "application/json")])
        known = {"401": unauthorized, "429": "UDAPI10005", "500": "UDAPI100500"}
        return self.error(known.get(word, "UDAPI" + word.removeprefix("UDAPI")), status)

    # ---- api.upstox.com

    def on_dialog(self, request: Request) -> Reply | str:
        query = request.query
        name = next((app for app, (client_id, _) in APPS.items() if client_id == query.get("client_id")), "")
        self.hit(request, name)
        self.pause(self.switches.dialog_delay)
        word = self.asked_for("dialog_answer", name or "?")
        if not name or query.get("redirect_uri") != self.redirect_uri(name):
            return self.error("UDAPI100068", self.switches.dialog_status)
        if word == "direct":
            return self.send_back(name, query.get("state"))
        if word:
            refusal = word.removeprefix("UDAPI").startswith("100")
            return self.misbehave(word, "UDAPI100068", self.switches.dialog_status if refusal else None)
        return self.send_to_login(name, query.get("state"))

    def send_to_login(self, name: str, state: str | None) -> Reply:
        """The page gets an id of the broker's own; it never learns the app's client id or redirect URI."""
        internal = "OAP-" + secrets.token_hex(8)
        with self.lock:
            self._dialogs[internal] = (name, state)
        query = {"client_id": internal, "redirect_uri": self.hop + HOP_PATH, "user_type": "individual",
                 "user_id": secrets.token_hex(6), "platform_id": "UDAPI"}
        return Reply(302, "", [("Location", f"{self.login}/?{urlencode(query)}")])

    def send_back(self, name: str, state: str | None) -> Reply:
        """302 to the app's redirect URI with a fresh code."""
        code = "".join(random.SystemRandom().choices(string.ascii_letters + string.digits, k=6))
        with self.lock:
            self.auth_codes[code] = (name, True)
            self.logins.append(name)
        wanted = self.asked_for("redirect_state", name)
        state = {"missing": None, "other": "another-state"}.get(wanted or "", state)
        uri = self.redirect_uri(name)
        tail = f"code={code}" + (f"&state={quote(state, safe='')}" if state is not None else "")
        return Reply(302, "", [("Location", f"{uri}{'&' if '?' in uri else '?'}{tail}")])

    def on_token(self, request: Request) -> Reply | str:
        form = request.form
        with self.lock:  # the code is spent by any use
            name, good = self.auth_codes.get(form.get("code", ""), ("", False))
            if name:
                self.auth_codes[form["code"]] = (name, False)
        self.hit(request, name)
        self.pause(self.switches.exchange_delay)
        word = self.asked_for("token_answer", name or "?")
        if word in ("no_token", "wrong_type"):
            return json_reply(self.user_data() | ({"access_token": 20251123} if word == "wrong_type" else {}))
        if word:
            return self.misbehave(word, "UDAPI100057")
        refusal = self.exchange_refusal(form, name, good)
        if refusal:
            return self.error(refusal)
        return json_reply(self.user_data() | {"access_token": self.issue(name), "extended_token": None})

    def exchange_refusal(self, form: dict[str, str], name: str, good: bool) -> str | None:
        pair = (form.get("client_id", ""), form.get("client_secret", ""))
        if pair not in APPS.values() or form.get("grant_type") != "authorization_code":
            return "UDAPI100069"
        if not good or APPS[name] != pair:
            return "UDAPI100057"
        return None if form.get("redirect_uri") == self.redirect_uri(name) else "UDAPI100068"

    def user_data(self, user_id: str | None = None) -> dict[str, Any]:
        return {"email": "asha@example.com", "exchanges": ["NSE", "BSE"], "products": ["D", "I"],
                "broker": "UPSTOX", "user_id": user_id or self.switches.user_id, "user_name": "Asha Rao",
                "order_types": ["MARKET", "LIMIT"], "user_type": "individual", "poa": False,
                "is_active": True}

    @contextlib.contextmanager
    def profile_in_flight(self) -> Iterator[None]:
        with self.lock:
            self.profiles_in_flight += 1
            self.max_profiles_in_flight = max(self.max_profiles_in_flight, self.profiles_in_flight)
        yield
        with self.lock:
            self.profiles_in_flight -= 1

    def on_profile(self, request: Request) -> Reply | str:
        token = self.tokens.get(request.headers.get("Authorization", "").removeprefix("Bearer "))
        name = token.app if token else ""
        self.hit(request, name)
        with self.profile_in_flight():
            self.pause(self.switches.profile_delay)
        word = self.asked_for("profile_answer", name or "?")
        if word == "redirect":
            return Reply(302, "", [("Location", self.hop + "/elsewhere")])
        if word == "success_false":
            return json_reply({"status": "error", "data": None})
        if word:
            return self.misbehave(word, "UDAPI100050")
        if not token or not token.live:
            return self.error("UDAPI100050")
        return json_reply({"status": "success", "data": self.user_data(token.user_id)})

    def on_logout(self, request: Request) -> Reply:
        self.hit(request)
        return json_reply({"status": "success", "data": True})

    def on_v3(self, request: Request) -> Reply | str:
        client_id = request.path.removeprefix(V3_PATH + "/")
        name = next((app for app, (known, _) in APPS.items() if known == client_id), "")
        self.hit(request, name)
        word = self.asked_for("v3_answer", name or "?")
        if word:
            return self.misbehave(word, "UDAPI100069")
        if not name or json.loads(request.body or b"{}").get("client_secret") != APPS[name][1]:
            return self.error("UDAPI100069")
        if not self.switches.notifier_url:
            return self.error("UDAPI1123")
        return self.await_approval(name)

    def await_approval(self, name: str) -> Reply:
        now, life = time.time(), self.switches.v3_seconds
        self.requested[name] = str(int(now * 1000))
        after = self.switches.approve_after
        after = after.get(name) if isinstance(after, dict) else after
        if after is not None:
            threading.Thread(target=lambda: self.pause(after) or self.approve(name), daemon=True).start()
        expiry = next_cutoff(now) if life is None else now + life
        shown = self.switches.notifier_shown or self.switches.notifier_url
        data = {"authorization_expiry": str(int(expiry * 1000)), "notifier_url": shown}
        return json_reply({"status": "success", "data": data})

    # ---- api-v2.upstox.com: the redirect behind the login page, and a host that is none of the broker's

    def on_hop(self, request: Request) -> Reply:
        name, state = self._dialogs.get(request.query.get("client_id", ""), ("", None))
        self.hit(request, name)
        self.pause(self.switches.redirect_delay)
        return self.send_back(name, state) if name else self.error("UDAPI100068")

    def on_elsewhere(self, request: Request) -> Reply:
        self.hit(request)
        self.leaked.extend(filter(None, [request.headers.get("Authorization")]))
        return json_reply({"status": "success", "data": self.user_data()})

    # ---- login.upstox.com and the service behind it

    def on_page(self, request: Request) -> Reply | str:
        self.hit(request, self._dialogs.get(request.query.get("client_id", ""), ("", None))[0])
        if self.switches.page == "hang":
            return "hang"
        if self.switches.page == "blank":
            return html_reply(BLANK_PAGE)
        config = {name: getattr(self.switches, name) for name in PAGE_SWITCHES} | {"mobile": MOBILE}
        stale = [("Set-Cookie", "auth_identity_token_expiry=1; Path=/")] * self.switches.stale_identity
        script = SCRIPT.replace("/*CFG*/null", json.dumps(config))
        return html_reply(BLANK_PAGE.replace("</body>", script), headers=stale)

    def on_config(self, request: Request) -> Reply | str:
        if self.switches.page == "loader":
            return "hang"
        self.pause(self.switches.page_delay)
        return json_reply({"qrLogin": True})

    def on_turnstile(self, request: Request) -> Reply:
        return html_reply(TURNSTILE_PAGE.replace("/*MODE*/", self.switches.captcha or ""))

    def on_turnstile_state(self, request: Request) -> Reply:
        if self.switches.captcha == "auto" and not self.pause(self.switches.captcha_seconds):
            return json_reply(True)
        return json_reply(self.captcha_solved.is_set())

    def service_fault(self, switch: str, app: str = "") -> Reply | str | None:
        self.pause(self.switches.step_delay)
        word = self.asked_for(switch, app)
        return page_failure(word) if word and word.isdigit() else word

    def on_generate(self, request: Request) -> Reply | str:
        mobile = str(request.data.get("mobileNumber"))
        self.hit(request, mobile)
        self.otp_requests.append(mobile)
        fault = self.service_fault("mobile_answer")
        if fault:
            return fault
        if mobile != MOBILE:
            return page_failure("1017016")
        if self.switches.otp_limit is not None and len(self.otp_requests) > self.switches.otp_limit:
            return page_failure("1017069")
        token = str(uuid.uuid4())
        self._otp_tokens.add(token)
        message = f"Enter the 6-digit OTP received on {mobile[:2]}****{mobile[-4:]}"
        if self.switches.totp_enabled:
            message += " or the 6-digit TOTP generated by authenticator app"
        return page_success({"message": message, "validateOTPToken": token, "userType": "CUSTOMER",
                             "nextRequestInterval": self.switches.resend_seconds,
                             "isTotpEnabled": self.switches.totp_enabled})

    def accepts_code(self, code: str) -> bool:
        """The current window and its neighbours count; with totp_single_use each code counts once."""
        now = self.now()
        right = self.switches.totp_enabled and code in {totp(TOTP_SECRET, now + d) for d in (-30, 0, 30)}
        with self.lock:
            used = code in self._used_codes
            if right:
                self._used_codes.add(code)
        return right and not (used and self.switches.totp_single_use)

    def on_verify(self, request: Request) -> Reply | str:
        code, token = str(request.data.get("otp")), request.data.get("validateOtpToken")
        self.hit(request, code)
        self.codes.append(code)
        fault = self.service_fault("otp_answer")
        if fault:
            return fault
        if token not in self._otp_tokens:
            return page_failure("1017076")
        if not self.accepts_code(code):
            return page_failure(WRONG_OTP)
        self._otp_tokens.discard(token)
        return self.identify()

    def identify(self) -> Reply:
        """The first factor is proven: profile for the page, identity cookies for the browser."""
        identity = secrets.token_hex(16)
        self._identities.add(identity)
        profile = {"profileId": "4471902", "userId": self.switches.user_id, "firstName": "Asha",
                   "lastName": "Rao", "avatarUrl": None}
        expiry = int((time.time() + DAY) * 1000)
        cookies = [("Set-Cookie", f"auth_identity_token={identity}; Path=/; Max-Age={DAY}"),
                   ("Set-Cookie", f"auth_identity_token_expiry={expiry}; Path=/; Max-Age={DAY}")]
        return page_success({"message": "Verified", "userType": "CUSTOMER", "userProfile": profile,
                             "isSecretPinSet": not self.switches.create_pin}, cookies)

    def on_pin(self, request: Request) -> Reply | str:
        pin = base64.b64decode(request.data.get("inputText", "")).decode()
        name, _ = self._dialogs.get(request.query.get("client_id", ""), ("", None))
        self.hit(request, pin)
        self.pins.append(pin)
        word = self.service_fault("pin_answer", name)
        if word and word not in ("dormant", "something_went_wrong"):
            return word
        if not name or request.cookies.get("auth_identity_token") not in self._identities:
            return page_failure("1017079")
        refusal = self.pin_refusal(pin)
        if refusal:
            return page_failure(refusal)
        return page_success({"redirectUri": None, "userType": "CUSTOMER", "requestId": str(uuid.uuid4()),
                             "customerStatus": "DORMANT" if word == "dormant" else "ACTIVE",
                             "isExternalClientOAuthApp": word is None})

    def pin_refusal(self, pin: str) -> str | None:
        with self.lock:
            self.wrong_pins += pin != PIN and self.wrong_pins < 5
            if self.wrong_pins >= 5:
                return "1017090"
        return None if pin == PIN else WRONG_PIN

    def on_new_pin(self, request: Request) -> Reply:
        self.hit(request)
        return page_failure("1017079")

    def on_authorize(self, request: Request) -> Reply:
        client_id = request.query.get("client_id", "")
        name, _ = self._dialogs.get(client_id, ("", None))
        self.hit(request, name)
        target = f"{self.hop}{HOP_PATH}?{urlencode({'client_id': client_id, 'requestId': uuid.uuid4()})}"
        return page_success({"redirectUri": target, "isApproved": True})


# ---- configuration and database as a user has them


def env_text(broker: Broker, **changes: str | None) -> str:
    """A filled env file for the imitation; a change of None leaves the key out."""
    values: dict[str, str | None] = {
        "UPSTOX_BASE_URL": broker.api, "UPSTOX_MOBILE_NUMBER": MOBILE, "UPSTOX_PIN": PIN,
        "UPSTOX_TOTP": TOTP_SECRET, "UPSTOX_REDIRECT_URI": broker.switches.redirect_uri,
        "UPSTOX_NOTIFIER_WEBHOOK_URI": broker.switches.notifier_url or None,
    }
    for index, (name, (client_id, secret)) in enumerate(APPS.items()):
        values |= {f"UPSTOX_CLIENT_ID_{index}": client_id, f"UPSTOX_CLIENT_SECRET_{index}": secret,
                   f"UPSTOX_API_NAME_{index}": name}
    return "".join(f"{key}={value}\n" for key, value in (values | changes).items() if value is not None)


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


def local_text(moment: float) -> str:
    return datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M:%S")


def token_row(name: str, token: str, generated: float, **changes: Any) -> dict[str, Any]:
    """A row as the program stores it, for a token generated at this moment."""
    expiry = next_cutoff(generated)
    return {
        "access_token": token, "api_name": name, "client_id": APPS[name][0], "client_secret": APPS[name][1],
        "created_at": int(generated * 1000), "expires_in": int(expiry - generated),
        "is_primary": int(name == "PRIMARY"), "redirect_uri": REDIRECT_URI, "token_type": "Bearer",
        "api_index": list(APPS).index(name), "generated_at": local_text(generated), "is_active": 1,
        "updated_at": int(generated * 1000), "validity_at": local_text(expiry),
    } | changes


def seed(db_path: Path, rows: list[dict[str, Any]]) -> None:
    """Create the guide's table where it is missing, and add the rows."""
    with contextlib.closing(sqlite3.connect(db_path)) as database, database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'upstox_tokens'").fetchone():
            database.execute(TOKENS_DDL)
        for row in rows:
            values = ", ".join(f":{column}" for column in row)
            database.execute(f"INSERT INTO upstox_tokens ({', '.join(row)}) VALUES ({values})", row)


def seed_guide_states(db_path: Path, broker: Broker, now: float | None = None) -> None:
    """The states of the guide's example: three valid, one refused by the broker, one expired, one missing."""
    now = time.time() if now is None else now
    last_cutoff = next_cutoff(now) - DAY
    recent, yesterday = max(now - 3600, last_cutoff), last_cutoff - 3600
    rows = [token_row(name, broker.issue(name), recent) for name in ("PRIMARY", "WEBSOCKET1", "WEBSOCKET2")]
    broker.revoke(rows[-1]["access_token"])
    rows.append(token_row("WEBSOCKET3", broker.issue("WEBSOCKET3"), yesterday))
    rows.append(token_row("OPTIONCHAIN1", broker.issue("OPTIONCHAIN1"), recent))
    seed(db_path, rows)


# ---- rehearse: the main job, shown without a broker account


def missing_for_browser() -> str:
    """What a login on this machine lacks, as one sentence with the command; empty when nothing."""
    modules = [name for name in ("selenium", "pyotp") if not importlib.util.find_spec(name)]
    if modules:
        names = " and ".join(modules)
        return f"{names} missing, install with: {sys.executable} -m pip install selenium pyotp"
    if any(map(shutil.which, BROWSERS)) or any(map(os.path.exists, BROWSER_PATHS)):
        return ""
    return "Chromium or Chrome is missing, install with: sudo apt install chromium chromium-driver"


def clean_environment() -> dict[str, str]:
    """The caller's environment without UPSTOX_ settings, and with loopback kept off any proxy."""
    kept = {key: value for key, value in os.environ.items() if not key.upper().startswith("UPSTOX_")}
    return kept | {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}


def run_program(folder: Path, *arguments: str) -> int:
    """Run upstox_tokens.py in the folder and hand its exit code back; it sees the caller's terminal."""
    print(f"$ python {PROGRAM.name} {' '.join(arguments)}", flush=True)

    def stop(number: int, _frame: object) -> None:
        # Ctrl-C in a terminal has reached the program as well: let it close its browser by itself first
        timer = threading.Timer(5 if number == signal.SIGINT else 0, process.terminate)
        timer.daemon = True
        timer.start()

    command = [sys.executable, str(PROGRAM), *arguments]
    process = subprocess.Popen(command, cwd=folder, env=clean_environment())
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
        return code if code >= 0 else 128 - code  # ended by a signal: the number a shell would show
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_rows(db_path: Path) -> None:
    columns = "api_name, substr(access_token, 1, 6) || '...', generated_at, validity_at, is_active"
    with contextlib.closing(sqlite3.connect(db_path)) as database:
        rows = database.execute(f"SELECT {columns} FROM upstox_tokens ORDER BY api_index").fetchall()
    print("\nRows of upstox_tokens now (everything is deleted in a moment):")
    for row in [("api_name", "token", "generated_at", "validity_at", "is_active"), *rows]:
        print("{:<13} {:<10} {:<20} {:<20} {}".format(*row))


def rehearse() -> int:
    """Run the real program against the imitation, in a folder that is gone afterwards."""
    problem = missing_for_browser() or ("" if PROGRAM.exists() else f"{PROGRAM.name} is not beside this file")
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    at_terminal = all(stream and stream.isatty() for stream in (sys.stdin, sys.stdout))
    with tempfile.TemporaryDirectory(prefix="rehearse-") as name, Broker(step_delay=0.15) as broker:
        folder = Path(name)
        fill_folder(folder, broker)
        for arguments in [()] if at_terminal else [("--status",), ("--mode", "INVALID_ONLY")]:
            code = run_program(folder, *arguments)
            if code in (130, 143):
                return code
        print_rows(folder / "vega_trade.db")
    return code


def fill_folder(folder: Path, broker: Broker) -> None:
    """The env file and the database, where the program looks for them by itself."""
    env_file = folder / ".env"
    env_file.touch(mode=0o600)
    env_file.write_text(env_text(broker), encoding="utf-8")
    seed_guide_states(folder / "vega_trade.db", broker)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rehearse"]:
        raise SystemExit(rehearse())
    unittest.main()
