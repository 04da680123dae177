"""Tests of upstox_tokens.py, and an imitation of the broker that everything here runs against.

    python test_upstox_tokens.py              all tests, side by side, on loopback only
    python -m unittest -v                     the same, one after the other; takes a Class.test too
    python test_upstox_tokens.py rehearse     the real program and a real browser against it, then gone
    python test_upstox_tokens.py stress       faults, crashes, lock-outs and secrets in full numbers (hours)
    python test_upstox_tokens.py bench        timings beside their floors

`Broker` imitates what the program meets: the API host, the login page with the JSON service behind it, and
the broker's own redirect host. It needs nothing but the standard library; what it should do wrong is chosen
with the switches of `Switches`. The accounts, secrets and tokens below are made up.
"""
from __future__ import annotations

import argparse
import ast
import base64
import collections
import contextlib
import functools
import gzip
import hashlib
import hmac
import http.client
import http.server
import importlib.util
import io
import itertools
import json
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
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import upstox_tokens

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


# ---- shared by all tests of the program


class Case(unittest.TestCase):
    """A folder with an env file and a database, a broker, and ways to run the program there.

    `call` runs it in this process, `process` in one of its own. A secret in the output fails the test, and
    so does a traceback.
    """

    switches: dict[str, Any] = {}  # of the broker, for a whole class
    moment: float | None = None  # the program's clock in `call`; None is the real one

    def setUp(self) -> None:
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        self.broker = stack.enter_context(Broker(**self.switches))
        self.db = self.folder / "vega_trade.db"
        self.prompts: list[str] = []
        stack.callback(os.chdir, os.getcwd())
        stack.callback(os.umask, os.umask(0o022))
        os.chdir(self.folder)
        self.write_env()

    def now(self) -> float:
        return time.time() if self.moment is None else self.moment

    def write_env(self, text: str | bytes | None = None, **changes: str | None) -> Path:
        """The env file in the folder: this text, or a filled one with changes (None leaves a key out)."""
        text = env_text(self.broker, **changes) if text is None else text
        path = self.folder / ".env"
        path.touch(mode=0o600)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def seed_guide(self) -> None:
        seed_guide_states(self.db, self.broker, self.now())

    def seed_valid(self, *names: str, **changes: Any) -> None:
        """Live tokens for these apps (all when none is named), generated just now."""
        rows = [token_row(name, self.broker.issue(name), self.now(), **changes) for name in names or APPS]
        seed(self.db, rows)

    def environ(self, changes: dict[str, str | None]) -> dict[str, str]:
        return {key: value for key, value in (clean_environment() | changes).items() if value is not None}

    def call(self, *argv: str, answers: Iterable[str | BaseException] = (), out: Any = None,
             **env: str | None) -> tuple[int, str, str]:
        """(exit code, stdout, stderr); answers are what is typed at the prompts, then comes Ctrl-D."""
        out, err, typed = out or io.StringIO(), io.StringIO(), iter(answers)

        def ask(prompt: str) -> str:
            self.prompts.append(prompt)
            answer = next(typed, EOFError())
            if isinstance(answer, BaseException):
                raise answer
            return answer

        code = upstox_tokens.main([*map(str, argv)], out=out, err=err, ask=ask, environ=self.environ(env),
                                  now=self.now)
        self.assert_no_secret(out.getvalue() + err.getvalue() + "".join(self.prompts))
        self.assertNotIn("internal error", err.getvalue())
        return code, out.getvalue(), err.getvalue()

    def start(self, *argv: str, program: Path | str = PROGRAM, env: dict[str, str | None] | None = None,
              **options: Any) -> subprocess.Popen[str]:
        """The program as a process of its own, killed when the test ends before it does."""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        options = {"cwd": self.folder, "encoding": "utf-8", "env": self.environ(env or {})} | pipes | options
        process = subprocess.Popen([sys.executable, str(program), *map(str, argv)], **options)
        self.addCleanup(self.end, process)
        return process

    @staticmethod
    def end(process: subprocess.Popen[str]) -> None:
        process.kill()
        with contextlib.suppress(ValueError):  # pipes that communicate() has closed
            process.communicate()

    def process(self, *argv: str, input: str = "", **options: Any) -> tuple[int, str, str]:
        """Run the program as a process of its own: (exit code, stdout, stderr)."""
        return self.finish(self.start(*argv, **options), input)

    def finish(self, process: subprocess.Popen[str], input: str | None = None) -> tuple[int, str, str]:
        out, err = (text or "" for text in process.communicate(input, timeout=30))
        self.assert_no_secret(out + err)
        self.assertNotRegex(err, "Traceback|internal error")
        return process.returncode, out, err

    def until(self, condition: Any, seconds: float = 30) -> None:
        """Wait for a condition of another process or thread."""
        end = time.monotonic() + seconds
        while not condition():
            self.assertLess(time.monotonic(), end, "waited in vain")
            time.sleep(0.01)

    def assert_no_secret(self, text: str) -> None:
        for secret in self.broker.secrets():
            self.assertNotIn(secret, text)

    def assert_refused(self, *words: str, argv: Iterable[str] = ("--status",), lines: int | None = 1,
                       **env: str) -> str:
        """Exit 2 with these words, one line a problem, and nothing touched; the message."""
        before = self.snapshot()
        code, out, err = self.call(*argv, answers=["1"], **env)
        self.assertEqual((code, out, self.broker.hits), (2, "", []), err)
        self.assertEqual(self.snapshot(), before)
        for word in words:
            self.assertIn(word, err)
        if lines:
            self.assertEqual(len(err.splitlines()), lines, err)
        return err

    def rows(self, columns: str = "*", table: str = "upstox_tokens") -> list[dict[str, Any]]:
        with contextlib.closing(sqlite3.connect(self.db)) as database:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute(f"SELECT {columns} FROM {table} ORDER BY rowid")]

    def schema(self, table: str = "upstox_tokens") -> str:
        return self.rows("sql", f"sqlite_master WHERE name = '{table}'")[0]["sql"]

    def sql(self, script: str) -> None:
        """Run statements on the database, made when missing."""
        with contextlib.closing(sqlite3.connect(self.db)) as database, database:
            database.executescript(script)

    def snapshot(self) -> dict[str, tuple[int, str]]:
        """Mode and hash of every file in the folder."""
        return {path.name: (path.stat().st_mode, hashlib.sha256(path.read_bytes()).hexdigest())
                for path in sorted(self.folder.iterdir()) if path.is_file()}

    def logins(self) -> int:
        """Requests that belong to a login, up to the token."""
        routes = ("dialog", "page", "generate", "verify", "pin", "token")
        return sum(self.broker.count(route) for route in routes)


MOMENT = datetime(2025, 11, 25, 4, 30, tzinfo=timezone.utc).timestamp()  # 10:00 Indian time
GUIDE_SUMMARY = """\
Token Status Summary:
----------------------------------
PRIMARY       : VALID
WEBSOCKET1    : VALID
WEBSOCKET2    : INVALID (401)
WEBSOCKET3    : EXPIRED
OPTIONCHAIN1  : VALID
OPTIONCHAIN2  : NOT FOUND

Valid Tokens    : 3
Invalid Tokens  : 3
"""
GUIDE_MENU = """
Choose Action:
1. Generate ALL
2. Generate ONLY invalid
3. Generate selected (comma separated)
4. Abort
"""
ONE_APP = {f"UPSTOX_{key}_{index}": None for key in ("CLIENT_ID", "CLIENT_SECRET", "API_NAME")
           for index in range(1, 6)}
LOGIN_KEYS = ("UPSTOX_MOBILE_NUMBER", "UPSTOX_PIN", "UPSTOX_TOTP")


def label(out: str, name: str = "PRIMARY") -> str:
    """The status shown for one app."""
    return re.search(rf"^{name} *: (.*)$", out, re.MULTILINE)[1]


@contextlib.contextmanager
def time_zone(zone: str) -> Iterator[None]:
    with mock.patch.dict(os.environ, TZ=zone):
        time.tzset()
        yield
    time.tzset()


@contextlib.contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """As a user whom file permissions stop: root steps down and leaves the folder's files to that user."""
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


# ---- the summary


class SummaryTest(Case):
    moment = MOMENT

    def test_guide_example_to_the_letter_and_nothing_written(self) -> None:
        self.seed_guide()
        before = self.snapshot()
        self.assertEqual(self.call("--status"), (1, GUIDE_SUMMARY, ""))
        self.assertEqual(self.snapshot(), before)
        # the expired and the missing one need no profile call
        self.assertCountEqual(self.broker.details("profile"),
                              ["PRIMARY", "WEBSOCKET1", "WEBSOCKET2", "OPTIONCHAIN1"])

    def test_guide_example_as_json(self) -> None:
        self.seed_guide()
        before = self.snapshot()
        code, out, err = self.call("--status", "--json")
        self.assertEqual((code, err, self.snapshot()), (1, "", before))
        report = json.loads(out)
        tokens = {token.pop("apiName"): token for token in report["tokens"]}
        self.assertEqual({key: report[key] for key in ("valid", "invalid", "missing", "unknown")}, {
            "valid": ["PRIMARY", "WEBSOCKET1", "OPTIONCHAIN1"], "invalid": ["WEBSOCKET2", "WEBSOCKET3"],
            "missing": ["OPTIONCHAIN2"], "unknown": []})
        self.assertTrue(report["checkedAt"])
        self.assertEqual(list(tokens), list(APPS))
        stored = {row["api_name"]: row for row in self.rows()}
        row = stored["WEBSOCKET2"]
        self.assertEqual(tokens["WEBSOCKET2"], {
            "status": "INVALID", "reason": "401", "validityAt": row["validity_at"],
            "generatedAt": row["generated_at"], "lastAttempt": None})
        self.assertEqual({name: token["status"] for name, token in tokens.items()}, {
            "PRIMARY": "VALID", "WEBSOCKET1": "VALID", "WEBSOCKET2": "INVALID", "WEBSOCKET3": "EXPIRED",
            "OPTIONCHAIN1": "VALID", "OPTIONCHAIN2": "NOT FOUND"})

    def test_profile_calls_run_side_by_side(self) -> None:
        for names in (list(APPS), list(APPS)[:5]):
            with self.subTest(apps=len(names)):
                self.broker.switches.profile_delay = 0.3
                self.broker.max_profiles_in_flight = 0
                self.db.unlink(missing_ok=True)
                self.seed_valid(*names)
                calls = self.broker.count("profile")
                self.assertEqual(self.call("--status")[0], int(len(names) < 6))
                self.assertEqual(self.broker.count("profile") - calls, len(names))
                self.assertEqual(self.broker.max_profiles_in_flight, len(names))

    def test_only_configured_apps_are_listed(self) -> None:
        self.seed_guide()
        self.write_env(**ONE_APP)
        self.assertEqual(self.call("--status"), (0, "Token Status Summary:\n" + "-" * 34 + "\n"
                         "PRIMARY       : VALID\n\nValid Tokens    : 1\nInvalid Tokens  : 0\n", ""))

    def test_verbose_header_names_the_database(self) -> None:
        self.seed_guide()
        header, *rest = self.call("--status", "-v")[1].splitlines()
        self.assertTrue(header.startswith("Token Status Summary:"))
        self.assertIn(str(self.db), header)
        self.assertEqual(rest, GUIDE_SUMMARY.splitlines()[1:])

    def test_status_creates_no_database(self) -> None:
        tables = {"no file": None, "empty file": "", "other table": "CREATE TABLE orders (id INTEGER)"}
        for what, script in tables.items():
            with self.subTest(what):
                self.db.unlink(missing_ok=True)
                if script is not None:
                    self.db.touch()
                    self.sql(script)
                before = self.snapshot()
                code, out, _ = self.call("--status")
                self.assertEqual((code, out.count(": NOT FOUND\n"), self.snapshot()), (1, 6, before))
                self.assertEqual(self.broker.hits, [])

    def test_write_ahead_log_that_another_program_has_not_merged(self) -> None:
        self.sql("PRAGMA journal_mode = WAL")
        hold_database(self, self.db, "d.execute('PRAGMA schema_version').fetchone()")
        self.seed_guide()
        before = {name: entry for name, entry in self.snapshot().items() if not name.endswith("-shm")}
        self.assertIn("vega_trade.db-wal", before)
        self.assertEqual(self.call("--status"), (1, GUIDE_SUMMARY, ""))
        self.assertEqual(self.snapshot() | before, self.snapshot())
        self.assertEqual(self.db.read_bytes()[18:20], b"\2\2")

    def test_write_ahead_log_database_at_rest(self) -> None:
        self.sql("PRAGMA journal_mode = WAL")
        self.seed_guide()
        before = self.snapshot()
        self.assertEqual(list(before), [".env", "vega_trade.db"])
        self.assertEqual(self.call("--status"), (1, GUIDE_SUMMARY, ""))
        self.assertEqual(self.snapshot() | before, self.snapshot())
        log = self.folder / "vega_trade.db-wal"  # a reader may leave it behind, with nothing in it
        self.assertEqual(log.stat().st_size if log.exists() else 0, 0)

    def test_journal_left_by_a_killed_writer(self) -> None:
        self.seed_guide()
        tokens = self.rows("api_name, access_token")
        script = ("import os, sqlite3; d = sqlite3.connect('vega_trade.db', isolation_level=None)\n"
                  "for s in ('PRAGMA cache_size = 1', 'BEGIN', 'UPDATE upstox_tokens SET access_token = "
                  "hex(zeroblob(9000)), is_active = 0'): d.execute(s)\n"
                  "os.kill(os.getpid(), 9)")
        self.assertEqual(self.process(script, program="-c")[0], -signal.SIGKILL)
        self.assertGreater((self.folder / "vega_trade.db-journal").stat().st_size, 512)
        self.assertEqual(self.call("--status"), (1, GUIDE_SUMMARY, ""))
        self.assertEqual(self.rows("api_name, access_token"), tokens)


# ---- the rules of a status, in their order


class StatusTest(Case):
    moment = MOMENT

    def setUp(self) -> None:
        super().setUp()
        self.write_env(**ONE_APP)

    def status_of(self, *rows: dict[str, Any]) -> str:
        """What --status says of PRIMARY when the table holds rows with these changes, and nothing else."""
        self.db.unlink(missing_ok=True)
        for changes in rows:
            seed(self.db, [token_row("PRIMARY", self.broker.issue("PRIMARY"), MOMENT - 60, **changes)])
        code, out, err = self.call("--status")
        self.assertEqual((code, err), (int(label(out) != "VALID"), ""))
        return label(out)

    def test_row_alone_decides_in_this_order(self) -> None:
        past = {"validity_at": "2025-11-25 03:30:00"}
        rules = [
            ({"access_token": None, "is_active": 0}, "NOT FOUND"),
            ({"access_token": ""}, "NOT FOUND"),
            ({"is_active": 0, "client_id": "other"} | past, "INVALID (inactive)"),
            ({"client_id": "other"} | past, "INVALID (client changed)"),
            ({"validity_at": None}, "EXPIRED (validity unreadable)"),
            (past, "EXPIRED"),
            ({"created_at": int((MOMENT - 86400) * 1000)}, "EXPIRED"),
        ]
        for changes, expected in rules:
            with self.subTest(changes):
                self.assertEqual(self.status_of(changes), expected)
        self.assertEqual(self.broker.hits, [])

    def test_time_ends_at_the_second(self) -> None:
        validity = datetime.fromtimestamp(MOMENT).replace(microsecond=0)
        for seconds, expected in ((1, "VALID"), (0, "EXPIRED"), (-1, "EXPIRED")):
            with self.subTest(seconds):
                text = str(validity + timedelta(seconds=seconds))
                self.assertEqual(self.status_of({"validity_at": text}), expected)

    def test_forms_of_validity_at(self) -> None:
        with time_zone("Asia/Kolkata"):
            readable = ["2025-11-26 03:30:00", " 2025-11-26 03:30:00 ", "2025-11-26T03:30:00",
                        "2025-11-26 03:30:00.000", "2025-11-26T03:30:00.123456", "2025-11-25T22:00:00Z",
                        "2025-11-25T22:00:00.000Z", "2025-11-26 03:30:00+05:30", "2025-11-26 03:30",
                        b"2025-11-26 03:30:00"]
            for value in readable:
                with self.subTest(value):
                    self.assertEqual(self.status_of({"validity_at": value}), "VALID")
            for value in ["2025-11-25 09:59:59", "2025-11-25T04:29:59Z", "2025-11-25"]:
                with self.subTest(value):
                    self.assertEqual(self.status_of({"validity_at": value}), "EXPIRED")

    def test_validity_at_that_nobody_can_read(self) -> None:
        values = [None, "", "soon", "2025-11-26 3:30:00", "2025-13-45 03:30:00", "2025-11-26 03:30:00x",
                  1764108000000, 1764108000, 2461005.5, b"\xff\xfe"]
        for value in values:
            with self.subTest(value):
                self.assertEqual(self.status_of({"validity_at": value}), "EXPIRED (validity unreadable)")

    def test_forms_of_created_at(self) -> None:
        def forms(moment: float) -> list[Any]:
            text = local_text(moment)
            zulu = datetime.fromtimestamp(moment, timezone.utc).replace(tzinfo=None).isoformat()
            india = datetime.fromtimestamp(moment, timezone(timedelta(hours=5.5)))
            return [int(moment * 1000), int(moment), str(int(moment * 1000)), moment + 0.25,
                    moment / 86400 + 2440587.5, text, text.replace(" ", "T"), text + ".123",
                    text + ".123456", text.replace(" ", "T") + ".123", zulu + "Z", str(india),
                    text.encode()]
        for value in forms(MOMENT - 60):
            with self.subTest("today", value=value):
                self.assertEqual(self.status_of({"created_at": value}), "VALID")
        for value in forms(MOMENT - 86400):  # validity_at claims more than the broker gives
            with self.subTest("yesterday", value=value):
                self.assertEqual(self.status_of({"created_at": value}), "EXPIRED")

    def test_created_at_that_nobody_can_read_leaves_it_to_validity_at(self) -> None:
        values = [None, "", "yesterday", b"\xff", 0, -1, 2**63 - 1, 9_000_000_000_000_000, 1e300, 9e6 + 0.5,
                  "9999-12-31 23:59:59"]
        for value in values:
            with self.subTest(value):
                self.assertEqual(self.status_of({"created_at": value}), "VALID")

    def test_nulls_and_text_flags(self) -> None:
        nulls = dict.fromkeys(("client_secret", "expires_in", "is_primary", "redirect_uri", "token_type",
                               "api_index", "generated_at", "updated_at", "client_id"))
        for changes in (nulls, {"is_active": "1", "is_primary": "true"}, {"is_active": True}):
            with self.subTest(changes):
                self.assertEqual(self.status_of(changes), "VALID")

    def test_tokens_that_cannot_be_sent(self) -> None:
        for token in ["two\nlines", "with space", "\udcff", "ключ", b"\xff\xfe"]:
            with self.subTest(token):
                self.db.unlink(missing_ok=True)
                row = token_row("PRIMARY", "", MOMENT - 60, access_token=token)
                if token == "\udcff":
                    row["access_token"] = None
                seed(self.db, [row])
                if token == "\udcff":  # text that is not UTF-8
                    self.sql("UPDATE upstox_tokens SET access_token = CAST(x'80ff41' AS TEXT)")
                code, out, _ = self.call("--status")
                self.assertEqual((code, label(out).split()[0]), (1, "INVALID"))
        self.assertEqual(self.broker.hits, [])

    def test_newest_of_several_rows_counts(self) -> None:
        old = {"created_at": int((MOMENT - 90000) * 1000), "validity_at": "2025-11-24 22:00:00"}
        unread = {"created_at": None, "validity_at": None}
        newer = {"created_at": local_text(MOMENT - 30), "access_token": "refused"}
        self.broker.switches.one_token_per_app = False
        table = [((old, {}), "VALID"), (({}, old), "VALID"), (({}, newer), "INVALID (401)"),
                 ((newer, {}), "INVALID (401)"), ((unread, {}), "VALID"), (({}, unread), "VALID"),
                 (({"access_token": "refused"}, {}), "VALID")]  # same time: the later id
        for rows, expected in table:
            with self.subTest(rows):
                self.assertEqual(self.status_of(*rows), expected)

    def test_rows_of_unknown_names_are_told_in_one_line_and_left_alone(self) -> None:
        self.seed_valid("PRIMARY")
        self.sql("INSERT INTO upstox_tokens (api_name) VALUES ('LEGACY'), ('primary'), ('\x1b[2Jx'), "
                 "(CAST(x'ff41' AS TEXT)), ('LEGACY')")
        before = self.snapshot()
        code, out, err = self.call("--status")
        self.assertEqual((code, label(out), self.snapshot()), (0, "VALID", before))
        lines = [line for line in (out + err).splitlines() if "LEGACY" in line]
        self.assertEqual((len(lines), lines[0].count("LEGACY")), (1, 1))
        self.assertIn("primary", lines[0])
        self.assertNotIn("\x1b", out + err)
        self.assertEqual(json.loads(self.call("--status", "--json")[1])["valid"], ["PRIMARY"])


class ProfileTest(Case):
    def test_answers(self) -> None:
        self.write_env(**ONE_APP)
        self.seed_valid("PRIMARY")
        answers = {"401": "INVALID (401)", "429": "UNKNOWN (429)", "503": "UNKNOWN (503)",
                   "500": "UNKNOWN (500)", "reset": "UNKNOWN (no connection)", "100060": "UNKNOWN (404)"}
        answers |= dict.fromkeys(("html", "empty", "truncated", "redirect", "gzip", "header_flood", "endless",
                                  "success_false"), "UNKNOWN (unexpected answer)")
        before = self.snapshot()
        for answer, expected in answers.items():
            with self.subTest(answer):
                self.broker.switches.profile_answer = answer
                code, out, err = self.call("--status")
                self.assertEqual((code, label(out), err), (1, expected, ""))
                unknown = "Unknown Tokens  : 1\n" * expected.startswith("UNKNOWN")
                invalid = int(expected.startswith("INVALID"))
                self.assertTrue(out.endswith(f"Valid Tokens    : 0\nInvalid Tokens  : {invalid}\n{unknown}"))
        self.assertEqual((self.broker.leaked, self.broker.count("elsewhere")), ([], 0))
        self.assertEqual(self.snapshot(), before)

    def test_nobody_there(self) -> None:
        self.seed_valid("PRIMARY")
        with socket.create_server(("127.0.0.1", 0)) as server:
            free = f"http://127.0.0.1:{server.getsockname()[1]}"
        for base in (free, self.broker.api.replace("http:", "https:")):
            with self.subTest(base):
                out = self.call("--status", UPSTOX_BASE_URL=base)[1]
                self.assertEqual(label(out), "UNKNOWN (no connection)")

    def test_base_url_alone_gets_the_token(self) -> None:
        self.seed_valid("PRIMARY")
        for key in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            with self.subTest(key):
                env = {"no_proxy": None, "NO_PROXY": None, key: self.broker.hop}
                code, out, _ = self.process("--status", env=env)
                self.assertEqual(label(out), "VALID")
        self.assertEqual({path for _, path, _ in self.broker.hits}, {"/v2/user/profile"})

    def test_limits_of_ten_seconds(self) -> None:
        """A broker that never ends its answers, and a database that never gets free: both at once."""
        locked = self.folder / "locked.db"
        seed(locked, [])
        script = "d.execute('BEGIN EXCLUSIVE')"
        holder = hold_database(self, locked, script)
        self.seed_valid("PRIMARY", "WEBSOCKET1")
        self.broker.switches.profile_answer = ["hang", "drip"]
        start = time.monotonic()
        processes = self.start("--status"), self.start("--status", "--db", locked)
        code, out, _ = self.finish(processes[0])
        self.assertEqual((code, label(out), label(out, "WEBSOCKET1")), (1, *["UNKNOWN (timeout)"] * 2))
        code, out, err = self.finish(processes[1])
        self.assertEqual((code, out), (2, ""))
        self.assertRegex(err, rf"\Aerror: .*{re.escape(str(locked))}.*locked.*\n\Z")
        self.assertLess(time.monotonic() - start, 20)
        holder.kill()


def hold_database(case: Case, path: Path, script: str) -> subprocess.Popen[str]:
    """Another program with the database open as `d`, after its script, until the test ends."""
    code = ("import sqlite3, sys; d = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
            f"{script}\nprint('ready', flush=True); sys.stdin.read()")
    process = case.start(code, str(path), program="-c")
    case.assertEqual(process.stdout.readline(), "ready\n")
    return process


# ---- modes and menu, up to where a browser would start


class ModeTest(Case):
    """The dialog refuses every app, so that no run goes further than its pre-flight."""

    switches = {"dialog_answer": "100068"}

    def test_nothing_to_do(self) -> None:
        self.seed_valid()
        before = self.snapshot()
        code, out, err = self.call("--mode", "INVALID_ONLY")
        self.assertEqual((code, out.count(": VALID\n"), self.logins()), (0, 6, 0))
        self.assertEqual(self.broker.details("profile").sort(), list(APPS).sort())
        self.assertEqual(self.broker.count("profile"), 6)
        self.assertEqual(self.snapshot() | before, self.snapshot())

    def test_invalid_only_is_for_exactly_these_three(self) -> None:
        self.seed_guide()
        before = self.rows()
        code, out, err = self.call("--mode", "INVALID_ONLY")
        missed = ["WEBSOCKET2", "WEBSOCKET3", "OPTIONCHAIN2"]
        self.assertEqual((code, sorted(self.broker.details("dialog"))), (1, sorted(missed)))
        self.assertTrue(out.startswith(GUIDE_SUMMARY))
        for place, name in enumerate(missed, 1):
            self.assertRegex(out, rf"(?m)^{name}: .*UDAPI100068.*\.$")
            self.assertRegex(err, rf"(?m)^\[{place}/3\] {name}: ")
        self.assertEqual((self.broker.otp_requests, self.broker.pins), ([], []))
        after = self.rows()
        changed = after[2].pop("updated_at"), after[2].pop("is_active")
        self.assertAlmostEqual(changed[0] / 1000, time.time(), delta=60)
        self.assertEqual(changed[1], 0)
        for key in ("updated_at", "is_active"):
            del before[2][key]
        self.assertEqual(after, before)
        self.assertEqual(label(self.call("--status")[1], "WEBSOCKET2"), "INVALID (inactive)")

    def test_audit_has_one_row_per_attempt(self) -> None:
        self.seed_guide()
        self.call("--mode", "INVALID_ONLY")
        rows = [list(row.values()) for row in self.rows(table="upstox_token_audit")]
        self.assertEqual(len(rows), 3)
        for row, name in zip(rows, ("WEBSOCKET2", "WEBSOCKET3", "OPTIONCHAIN2")):
            self.assertLessEqual({name, "CLI", "SELENIUM"}, set(row))
            self.assertIn("UDAPI100068", str(row))
            self.assertTrue(any(isinstance(v, int) and abs(v / 1000 - time.time()) < 60 for v in row))
        self.assert_no_secret(repr(rows))

    def test_json_is_all_of_stdout(self) -> None:
        self.seed_guide()
        code, out, _ = self.call("--mode", "INVALID_ONLY", "--json")
        report = json.loads(out)
        self.assertEqual((code, report["valid"]), (1, ["PRIMARY", "WEBSOCKET1", "OPTIONCHAIN1"]))
        self.assertIn("UDAPI100068", out)

    def test_unknown_is_left_alone_and_said(self) -> None:
        self.seed_guide()
        self.broker.switches.profile_answer = "429"
        code, out, err = self.call("--mode", "INVALID_ONLY")
        self.assertEqual(code, 1)
        self.assertCountEqual(self.broker.details("dialog"), ["WEBSOCKET3", "OPTIONCHAIN2"])
        self.assertIn("Unknown Tokens  : 4\n", out)
        unknown = ("PRIMARY", "WEBSOCKET1", "WEBSOCKET2", "OPTIONCHAIN1")
        said = [line for line in (out + err).splitlines() if all(name in line for name in unknown)]
        self.assertEqual(len(said), 1, err)
        self.assertNotRegex(said[0], "WEBSOCKET3|OPTIONCHAIN2")
        self.assertEqual([row["is_active"] for row in self.rows()], [1] * 5)

    def test_all_unknown_is_no_success(self) -> None:
        self.seed_valid()
        self.broker.switches.profile_answer = "503"
        self.assertEqual((self.call("--mode", "INVALID_ONLY")[0], self.logins()), (1, 0))

    def test_names_of_partial(self) -> None:
        self.seed_valid()
        for apis, expected in [(" websocket2 ,PRIMARY,Websocket2,", ["PRIMARY", "WEBSOCKET2"]),
                               ("OptionChain1", ["OPTIONCHAIN1"])]:
            with self.subTest(apis):
                self.broker.hits.clear()
                self.call("--mode", "PARTIAL", "--apis", apis)
                self.assertCountEqual(self.broker.details("dialog"), expected)

    def test_all_is_all(self) -> None:
        self.seed_valid()
        self.call("--mode", "all")
        self.assertCountEqual(self.broker.details("dialog"), APPS)

    def test_a_mode_never_asks(self) -> None:
        self.seed_guide()
        for line in ("--mode ALL", "--mode INVALID_ONLY", "--mode PARTIAL --apis PRIMARY"):
            self.call(*line.split())
        self.assertEqual(self.prompts, [])

    def test_clock_that_is_off_sends_no_code(self) -> None:
        self.broker.switches.dialog_answer = None
        self.seed_guide()
        for offset, word in ((120, "behind"), (-120, "ahead")):
            with self.subTest(offset):
                self.broker.switches.clock_offset = offset
                code, out, _ = self.call("--mode", "INVALID_ONLY")
                self.assertEqual((code, self.broker.count("page")), (1, 0))
                self.assertRegex(out, rf"(?m)^WEBSOCKET2: .*1(19|20|21) s {word}")


class MenuTest(Case):
    switches = {"dialog_answer": "100068"}

    def test_piped_abort(self) -> None:
        self.seed_guide()
        before = self.snapshot()
        for typed in ("4\n", "q\n", "Q\n", " 4 \n", "", "x\n\n5\n0\n12\n1,2\n4\n", "3\n", "nonsense"):
            with self.subTest(typed):
                code, out, err = self.process(input=typed)
                self.assertEqual((code, err), (1, ""))
                self.assertTrue(out.startswith(GUIDE_SUMMARY + GUIDE_MENU), out)
                self.assertTrue(out.endswith("Aborted, nothing changed.\n"), out)
        self.assertEqual((self.snapshot(), self.logins()), (before, 0))

    def test_abort_with_all_valid(self) -> None:
        self.seed_valid()
        self.assertEqual(self.call(answers=["4"])[0], 0)

    def test_bad_answers_are_asked_again(self) -> None:
        self.seed_guide()
        code, out, _ = self.call(answers=["", "5", "yes", "-1", "\u0661", "1 2", "4"])
        self.assertEqual((code, len(self.prompts), len(set(self.prompts))), (1, 7, 1))
        self.assertEqual(out.count("Token Status Summary:"), 1)

    def test_choices(self) -> None:
        self.seed_guide()
        three = ["WEBSOCKET2", "WEBSOCKET3", "OPTIONCHAIN2"]
        table = [(["1"], list(APPS)), (["2"], three), ([" 2 "], three), (["3", "websocket2, 4,WEBSOCKET2 ,3"],
                 ["WEBSOCKET2", "WEBSOCKET3"]), (["3", " Primary "], ["PRIMARY"]), (["3", "6,1"],
                 ["PRIMARY", "OPTIONCHAIN2"])]
        for answers, expected in table:
            with self.subTest(answers):
                self.broker.hits.clear()
                code, out, _ = self.call(answers=answers)
                self.assertCountEqual(self.broker.details("dialog"), expected)
                self.assertEqual((code, out.count("Token Status Summary:")), (1, 2))
                for name in expected:
                    self.assertRegex(out, rf"(?m)^{name}: .*UDAPI100068")
        self.assertEqual({row["source"] for row in self.rows(table="upstox_token_audit")}, {"MENU"})

    def test_bad_names_are_asked_again(self) -> None:
        self.seed_guide()
        bad = ["", ",", "0", "7", "FOO", "PRIMARY,FOO", "1.5", "-1", "\u0661", "1 FOO"]
        code, out, _ = self.call(answers=["3", *bad, "2"])
        self.assertEqual((code, len(self.prompts)), (1, 2 + len(bad)))
        self.assertEqual(self.broker.details("dialog"), ["WEBSOCKET1"])

    def test_end_of_input_at_the_names(self) -> None:
        self.seed_guide()
        before = self.snapshot()
        code, out, _ = self.call(answers=["3", "FOO"])
        self.assertEqual((code, self.logins(), self.snapshot()), (1, 0, before))
        self.assertTrue(out.endswith("Aborted, nothing changed.\n"))

    def test_numbers_count_the_configured_apps(self) -> None:
        self.write_env(**ONE_APP)
        self.seed_guide()
        self.call(answers=["3", "2", "WEBSOCKET1", "1"])
        self.assertEqual((len(self.prompts), self.broker.details("dialog")), (4, ["PRIMARY"]))

    def at_terminal(self, keys: str) -> tuple[int, str]:
        """What the program does and shows when these keys are typed at its first prompt."""
        code = ("import os, pty, sys; "
                "sys.exit(os.waitstatus_to_exitcode(pty.spawn([sys.executable, *sys.argv[1:]])))")
        process, shown = self.start(code, str(PROGRAM), program="-c"), ""
        guard = threading.Timer(30, process.kill)
        guard.start()
        self.addCleanup(guard.cancel)
        while "4. Abort\n" not in shown or not shown.endswith(": "):
            letter = process.stdout.read(1)
            self.assertTrue(letter, shown)
            shown += letter
        process.stdin.write(keys)
        process.stdin.flush()
        again = threading.Timer(5, self.type_again, (process, keys))
        again.start()
        self.addCleanup(again.cancel)
        shown += process.stdout.read()
        self.assertNotIn("Traceback", shown)
        self.assert_no_secret(shown)
        return process.wait(), shown

    def type_again(self, process: subprocess.Popen[str], keys: str) -> None:
        """A signal that comes between the prompt and the read is only noticed at the next key."""
        with contextlib.suppress(OSError, ValueError):
            process.stdin.write(keys)
            process.stdin.flush()

    @unittest.skipIf(sys.platform == "win32", "no pseudo terminals")
    def test_at_a_terminal(self) -> None:
        self.seed_guide()
        before = self.snapshot()
        for keys, expected in (("4\n", 1), ("q\n", 1), ("\x04", 1), ("x\n4\n", 1), ("\x03", 130)):
            with self.subTest(keys):
                code, shown = self.at_terminal(keys)
                self.assertEqual(code, expected)
                self.assertTrue(shown.startswith(GUIDE_SUMMARY + GUIDE_MENU), shown)
                self.assertEqual("Aborted, nothing changed.\n" in shown, expected == 1)
        self.assertEqual((self.snapshot(), self.logins()), (before, 0))

    @unittest.skipIf(sys.platform == "win32", "no such signals")
    def test_signals(self) -> None:
        self.seed_valid("PRIMARY")
        self.broker.switches.profile_delay = 60  # the program is stopped while it waits for the broker
        for place, (number, expected) in enumerate([(signal.SIGINT, 130), (signal.SIGTERM, 143)], 1):
            with self.subTest(number):
                process = self.start("--status")
                self.until(lambda: self.broker.count("profile") == place)
                process.send_signal(number)
                self.assertEqual(self.finish(process)[0], expected)

    def test_signal_handlers_are_given_back(self) -> None:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        self.call("--status")
        self.assertEqual((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)), before)


# ---- configuration


class ConfigTest(Case):
    def test_app_rules(self) -> None:
        kinds = ("CLIENT_ID", "CLIENT_SECRET", "API_NAME")
        seventh = {f"UPSTOX_{kind}_6": "x" for kind in kinds}
        gap = {f"UPSTOX_{kind}_1": None for kind in kinds}
        none = ONE_APP | {f"UPSTOX_{kind}_0": None for kind in kinds}
        table: list[tuple[dict[str, str | None], int | None, str]] = [
            ({"UPSTOX_CLIENT_ID_2": None}, 1, "UPSTOX_CLIENT_ID_2"),
            ({"UPSTOX_CLIENT_SECRET_0": None}, 1, "UPSTOX_CLIENT_SECRET_0"),
            ({"UPSTOX_CLIENT_SECRET_0": ""}, 1, "UPSTOX_CLIENT_SECRET_0"),
            ({"UPSTOX_API_NAME_5": None}, 1, "UPSTOX_API_NAME_5"),
            ({"UPSTOX_API_NAME_3": "WEBSOCKET4"}, 1, "UPSTOX_API_NAME_3"),
            ({"UPSTOX_API_NAME_4": "PRIMARY"}, 1, "UPSTOX_API_NAME_4"),
            ({"UPSTOX_CLIENT_ID_4": APPS["PRIMARY"][0]}, 1, "UPSTOX_CLIENT_ID_4"),
            (gap, None, "_1"),
            (none, None, "UPSTOX_CLIENT_ID_0"),
            (seventh, None, "_6"),
        ]
        for changes, lines, key in table:
            with self.subTest(changes):
                self.write_env(**changes)
                self.assert_refused(key, lines=lines)

    def test_value_rules(self) -> None:
        self.seed_valid()
        table = {
            "UPSTOX_MOBILE_NUMBER": ("5812047365", "981204736", "98120473651", "+919812047365", "98120 4736",
                                     "９812047365"),
            "UPSTOX_PIN": ("74921", "7492167", "74921a", "７49216"),
            "UPSTOX_TOTP": ("749216", "not base32 at all 1890", TOTP_SECRET[:16], TOTP_SECRET[:-1] + "!"),
            "UPSTOX_REDIRECT_URI": ("localhost:28020/callback", "ftp://localhost/", "http://", "http://a:x/"),
            "UPSTOX_NOTIFIER_WEBHOOK_URI": ("my.host/hook",),
            "UPSTOX_BASE_URL": ("http://api.upstox.com", "ftp://127.0.0.1", "api.upstox.com",
                                "http://localhost.example.com", "http://127.0.0.1@example.com",
                                "http://127.0.0.1.example.com", "https://api.upstox.com/v2"),
            "UPSTOX_CONFIG_SOURCE": ("FILE",),
            "UPSTOX_SERVE_KEY": ("fifteen-letters",),
            "UPSTOX_ALLOWED_ORIGINS": ("localhost", "http://localhost:5173,*"),
        }
        for key, values in table.items():
            for value in values:
                with self.subTest(key, value=value):
                    self.write_env(**{key: value})
                    # no login is tried when a rule fails to stop it: only looking asks no dialog
                    argv = ["--status"] if key == "UPSTOX_BASE_URL" else ["--mode", "INVALID_ONLY"]
                    err = self.assert_refused(key, argv=argv)
                    if key in (*LOGIN_KEYS, "UPSTOX_SERVE_KEY"):
                        self.assertNotIn(value, err)

    def test_values_that_fit(self) -> None:
        self.seed_valid()
        named = self.broker.api.replace("127.0.0.1", "localhost")
        table = {"UPSTOX_TOTP": (TOTP_SECRET.lower(), "  ".join(re.findall("....", TOTP_SECRET))),
                 "UPSTOX_REDIRECT_URI": ("https://example.com", "http://localhost:28020/cb?x=1"),
                 "UPSTOX_SERVE_KEY": ("sixteen-letters!",), "UPSTOX_CONFIG_SOURCE": ("ENV",),
                 "UPSTOX_BASE_URL": (f"{self.broker.api}/", named),
                 "UPSTOX_ALLOWED_ORIGINS": ("http://localhost:5173, https://app.example.com",)}
        for key, values in table.items():
            for value in values:
                with self.subTest(key, value=value):
                    self.write_env(**{key: value})
                    self.assertEqual(self.call("--mode", "INVALID_ONLY")[::2], (0, ""))

    def test_what_each_command_needs(self) -> None:
        self.seed_valid()
        for key in (*LOGIN_KEYS, "UPSTOX_REDIRECT_URI"):
            with self.subTest(key):
                self.write_env(**{key: None})
                self.assertEqual(self.call("--status")[0], 0)
                before = len(self.broker.hits)
                code, _, err = self.call("--mode", "INVALID_ONLY")
                self.assertEqual((code, err.count(key), len(self.broker.hits)), (2, 1, before))
                code, out, err = self.call(answers=["1"])
                self.assertEqual((code, key in err, self.logins()), (2, True, 0))
        self.write_env(**dict.fromkeys(LOGIN_KEYS))
        self.assertEqual(self.call(answers=["4"])[0], 0)

    def test_all_problems_at_once(self) -> None:
        self.write_env(UPSTOX_PIN="12", UPSTOX_TOTP=None, UPSTOX_REDIRECT_URI="nowhere",
                       UPSTOX_API_NAME_1="OTHER", UPSTOX_CLIENT_SECRET_2=None)
        with self.folder.joinpath(".env").open("a") as file:
            file.write("UPSTOX_SERVE_KEY short\n")
        err = self.assert_refused("UPSTOX_PIN", "UPSTOX_TOTP", "UPSTOX_REDIRECT_URI", "UPSTOX_API_NAME_1",
                                  "UPSTOX_CLIENT_SECRET_2", ", line ", argv=["--mode", "ALL"], lines=6)
        self.assertNotIn("short", err)

    def test_problems_of_the_stored_apps_come_with_the_others(self) -> None:
        self.write_env(UPSTOX_PIN="12", UPSTOX_CONFIG_SOURCE="DB")
        self.assert_refused("UPSTOX_PIN", "upstox_api_configs", argv=["--mode", "ALL"], lines=2)

    def test_forms_of_a_line(self) -> None:
        self.seed_valid("PRIMARY")
        key, value = "UPSTOX_CLIENT_ID_0", APPS["PRIMARY"][0]
        plain = env_text(self.broker, **ONE_APP | {key: None})
        lines = [f"{key}={value}", f"export {key}={value}", f"export   {key}='{value}'", f'{key}="{value}"',
                 f"  {key}={value}  ", f"{key}={value} # x", f"{key}='{value}' # x", f"{key}={value}\t#"]
        for line in lines:
            with self.subTest(line):
                self.write_env(f"# comment\n\n{plain}{line}")
                self.assertEqual(self.call("--status")[0], 0)
        texts = {"CRLF": f"{plain}{lines[0]}\n".replace("\n", "\r\n"), "BOM": f"\ufeff{lines[0]}\n{plain}",
                 "CRLF quoted": f"{lines[3]}\r\n{plain}"}
        for what, text in texts.items():
            with self.subTest(what):
                self.write_env(text)
                self.assertEqual(self.call("--status")[0], 0)

    def test_values_keep_what_is_theirs(self) -> None:
        table = {"a#b=c": "a#b=c", "'a#b'": "a#b", '"a\'b"': "a'b", "'a\"b'": 'a"b', "$HOME": "$HOME",
                 "a\\nb": "a\\nb", "'a\\b'": "a\\b"}
        for text, secret in table.items():
            with self.subTest(text):
                self.write_env(UPSTOX_CLIENT_SECRET_0=text)
                self.assertEqual(self.call("--import-config")[0], 0)
                self.assertEqual(self.rows(table="upstox_api_configs")[0]["client_secret"], secret)

    def test_bad_lines(self) -> None:
        lines = ["UPSTOX_PIN 5566123", "=5566123", 'UPSTOX_PIN="5566123', "UPSTOX_PIN='5566123' x", "export",
                 "1X=5566123", "UPSTOX-PIN=5566123", "UPSTOX_PIN: 5566123", "5566123", "<b>5566123</b>",
                 "UPSTOX PIN=5566123", "UPSTOX_PIN=5566123\0", "$X=5566123", b"UPSTOX_PIN=5566123\xff"]
        for line in lines:
            with self.subTest(line):
                line = line if isinstance(line, bytes) else line.encode()
                path = self.write_env(b"# one\r\n\r\n" + line + b"\n" + env_text(self.broker).encode())
                err = self.assert_refused(str(path), "line 3")
                self.assertNotIn("5566123", err)
        self.write_env("oops 1\n" + env_text(self.broker) + "oops 2\n")
        self.assert_refused("line 1", f"line {env_text(self.broker).count(chr(10)) + 2}", lines=2)

    def test_environment_wins_over_the_file(self) -> None:
        self.seed_valid("PRIMARY")
        self.write_env(**ONE_APP)
        out = self.call("--status", UPSTOX_CLIENT_ID_0="other")[1]
        self.assertEqual(label(out), "INVALID (client changed)")
        self.folder.joinpath(".env").unlink()
        lines = env_text(self.broker, **ONE_APP).splitlines()
        self.assertEqual(self.call("--status", **dict(line.split("=", 1) for line in lines))[0], 0)

    def test_search_order(self) -> None:
        script = self.folder / "beside"
        script.mkdir()
        program = shutil.copy(PROGRAM, script)
        for apps, path in {4: self.folder / "named", 3: self.folder / ".env", 2: script / ".env"}.items():
            path.touch(mode=0o600)
            path.write_text(env_text(self.broker, **{key: None for key in ONE_APP if int(key[-1]) >= apps}))
        for argv, expected in ((["--env-file", "named"], 4), ([], 3)):
            out = self.process("--status", *argv, program=program)[1]
            self.assertEqual(out.count("NOT FOUND"), expected)
        self.folder.joinpath(".env").unlink()
        self.assertEqual(self.process("--status", program=program)[1].count("NOT FOUND"), 2)

    def test_env_file_that_is_not_there(self) -> None:
        for path in (self.folder / "missing", self.folder):
            with self.subTest(path):
                self.assert_refused(str(path), argv=["--status", "--env-file", str(path)])

    @unittest.skipUnless(os.name == "posix", "file modes")
    def test_env_file_that_others_may_read(self) -> None:
        path = self.write_env().rename(self.folder / "my env's file")
        for mode in (0o640, 0o604, 0o644, 0o660, 0o666):
            with self.subTest(oct(mode)):
                path.chmod(mode)
                err = self.assert_refused("--env-file", "environment variables", lines=None,
                                          argv=["--status", "--env-file", str(path)])
                command = re.search(r"chmod 600 .*", err)[0]
                self.assertEqual(shlex.split(command), ["chmod", "600", str(path)])
        for mode in (0o600, 0o400):
            path.chmod(mode)
            self.assertEqual(self.call("--status", "--env-file", str(path))[0], 1)


class StoredConfigTest(Case):
    """UPSTOX_CONFIG_SOURCE=DB and --import-config."""

    moment = MOMENT
    configs_ddl = """CREATE TABLE upstox_api_configs (
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

    def setUp(self) -> None:
        super().setUp()
        self.env_apps = dict.fromkeys([*ONE_APP, *(key[:-1] + "0" for key in ONE_APP)])
        self.write_env(UPSTOX_CONFIG_SOURCE="DB", **self.env_apps)

    def fill(self, script: str = "") -> None:
        """All six apps in the table, then the script."""
        self.db.unlink(missing_ok=True)
        self.sql(self.configs_ddl)
        for index, (name, (client_id, secret)) in enumerate(APPS.items()):
            self.sql("INSERT INTO upstox_api_configs (api_index, api_name, client_id, client_secret) "
                     f"VALUES ({index}, '{name}', '{client_id}', '{secret}')")
        self.sql(script)
        self.seed_valid()

    def test_rows_are_the_apps(self) -> None:
        self.fill()
        self.assertEqual(self.call("--status")[0::2], (0, ""))
        self.assertEqual(self.broker.count("profile"), 6)
        self.assertEqual(self.call("--mode", "INVALID_ONLY")[0], 0)

    def test_only_enabled_rows(self) -> None:
        for value in ("0", "'false'"):
            self.fill(f"UPDATE upstox_api_configs SET is_enabled = {value} WHERE api_name = 'WEBSOCKET2'")
            code, out, _ = self.call("--status")
            self.assertEqual((code, out.count(": VALID"), "WEBSOCKET2" in out), (0, 5, False))

    def test_the_same_rules(self) -> None:
        update = "UPDATE upstox_api_configs SET "
        table = {update + "api_name = 'OTHER' WHERE api_index = 3": "api_name",
                 update + f"client_id = '{APPS['PRIMARY'][0]}' WHERE api_index = 2": "client_id",
                 update + "client_secret = '' WHERE api_index = 1": "client_secret",
                 update + "redirect_uri = 'nowhere' WHERE api_index = 1": "redirect_uri",
                 update + "api_index = 6 WHERE api_index = 5": "6",
                 "DELETE FROM upstox_api_configs WHERE api_index = 2": "2",
                 update + "is_enabled = 0": "enabled",
                 "DELETE FROM upstox_api_configs": "--import-config",
                 "DROP TABLE upstox_api_configs": "--import-config"}
        for script, word in table.items():
            with self.subTest(script):
                self.fill(script)
                err = self.assert_refused("upstox_api_configs", argv=["--mode", "ALL"])
                self.assertIn(word, err.lower())
        self.db.unlink()
        self.assert_refused("upstox_api_configs")

    def test_redirect_uri_falls_back_to_the_setting(self) -> None:
        self.write_env(UPSTOX_CONFIG_SOURCE="DB", UPSTOX_REDIRECT_URI=None, **self.env_apps)
        self.fill()
        self.assert_refused("UPSTOX_REDIRECT_URI", argv=["--mode", "ALL"])
        self.fill("UPDATE upstox_api_configs SET redirect_uri = 'https://example.com/cb'")
        self.assertEqual(self.call("--mode", "INVALID_ONLY")[0], 0)

    def test_import(self) -> None:
        self.write_env()
        for again in (False, True):
            with self.subTest(again=again):
                code, out, err = self.call("--import-config")
                self.assertEqual(code, 0, err)
                self.assertIn(str(self.db), out + err)
                rows = self.rows(table="upstox_api_configs")
                self.assertEqual([(r["api_index"], r["api_name"], r["client_id"], r["client_secret"],
                                   r["redirect_uri"], r["is_primary"], r["is_enabled"]) for r in rows],
                                 [(i, name, *pair, REDIRECT_URI, int(name == "PRIMARY"), 1)
                                  for i, (name, pair) in enumerate(APPS.items())])
                self.assertEqual({r["created_at"] for r in rows}, {int(MOMENT * 1000)})
        self.assertEqual(self.schema("upstox_api_configs"), self.configs_ddl)
        self.assertEqual(stat.S_IMODE(self.db.stat().st_mode), 0o600)
        self.write_env(UPSTOX_CONFIG_SOURCE="DB", **self.env_apps)
        self.assertEqual(self.call("--status")[1].count(": NOT FOUND"), 6)
        self.assertEqual(self.broker.hits, [])

    def test_import_reads_the_environment_whatever_the_source(self) -> None:
        self.write_env(UPSTOX_CONFIG_SOURCE="DB")
        self.assertEqual(self.call("--import-config")[0], 0)
        self.write_env(**self.env_apps)
        self.assert_refused("UPSTOX_CLIENT_ID_0", argv=["--import-config"])


# ---- the database


class DatabaseTest(Case):
    """The dialog refuses every app: a run gets as far as proving that the database takes a token."""

    switches = {"dialog_answer": "100068"}

    def test_created_here_when_there_is_none(self) -> None:
        os.umask(0)
        code, out, err = self.call("--mode", "ALL")
        self.assertEqual((code, stat.S_IMODE(self.db.stat().st_mode)), (1, 0o600))
        self.assertEqual(len([line for line in (out + err).splitlines() if str(self.db) in line]), 1)
        self.assertEqual(self.schema(), TOKENS_DDL)
        self.assertEqual(self.rows(), [])
        for path in self.folder.iterdir():
            self.assertFalse(path.stat().st_mode & 0o077, path)
        self.assertNotIn(str(self.db), "".join(self.call("--mode", "ALL")[1:]))

    def test_named_file_is_created_too(self) -> None:
        named = self.folder / "a b#c%d?.db"
        code, out, err = self.call("--mode", "ALL", "--db", named.name)
        self.assertEqual((code, stat.S_IMODE(named.stat().st_mode), self.db.exists()), (1, 0o600, False))
        self.assertIn(str(named), out + err)

    def test_table_is_added_to_an_existing_file(self) -> None:
        self.sql("CREATE TABLE orders (id INTEGER); INSERT INTO orders VALUES (7)")
        self.db.chmod(0o644)
        self.assertEqual(self.call("--mode", "ALL")[0], 1)
        self.assertEqual(self.schema(), TOKENS_DDL)
        self.assertEqual(self.rows(table="orders"), [{"id": 7}])
        self.assertEqual(stat.S_IMODE(self.db.stat().st_mode), 0o644)

    def test_search_order(self) -> None:
        script = self.folder / "beside"
        script.mkdir()
        program = shutil.copy(PROGRAM, script)
        found = []
        for path in (script / self.db.name, self.db, self.folder / "named.db"):
            seed(path, [])
            argv = ["--db", path.name] if path.name == "named.db" else []
            found.append(self.process("--status", "-v", *argv, program=program)[1].splitlines()[0])
            self.assertIn(str(path), found[-1])
        self.assertEqual(len(set(found)), 3)

    def test_other_column_order_and_types(self) -> None:
        columns = re.findall(r'"(\w+)" \w+', TOKENS_DDL)[1:]
        for kind in ("", "BLOB", "TEXT"):
            with self.subTest(kind):
                self.db.unlink(missing_ok=True)
                middle = ", ".join(f"{column} {kind}" for column in reversed(columns))
                self.sql(f"CREATE TABLE upstox_tokens (tenant DEFAULT 'x' NOT NULL, {middle}, "
                         "id INTEGER PRIMARY KEY AUTOINCREMENT)")
                schema = self.schema()
                self.seed_guide()
                code, out, _ = self.call("--mode", "INVALID_ONLY")
                self.assertTrue(out.startswith(GUIDE_SUMMARY), out)
                self.assertEqual((code, self.schema()), (1, schema))

    def test_journal_mode_stays(self) -> None:
        for mode, byte in (("DELETE", 1), ("WAL", 2)):
            with self.subTest(mode):
                self.db.unlink(missing_ok=True)
                self.sql(f"PRAGMA journal_mode = {mode}")
                self.seed_guide()
                self.assertEqual(self.call("--mode", "ALL")[0], 1)
                self.assertEqual(set(self.db.read_bytes()[18:20]), {byte})

    def test_row_with_a_taken_name_or_token_is_no_obstacle(self) -> None:
        """Every index that the guide's DELETE and INSERT satisfy must pass the proof."""
        for index in ("(api_name)", "(access_token)", "(client_id)", "(api_index)"):
            with self.subTest(index):
                self.db.unlink(missing_ok=True)
                self.seed_guide()
                self.sql(f"CREATE UNIQUE INDEX one ON upstox_tokens {index}")
                self.assertEqual(self.call("--mode", "ALL")[0], 1)

    def test_rows_of_the_same_name_all_go(self) -> None:
        for index in (0, None, 5):
            self.seed_valid("PRIMARY", api_index=index)
        self.seed_valid("WEBSOCKET1", api_index=0, access_token="kept")
        app = upstox_tokens.App(0, "PRIMARY", *APPS["PRIMARY"], REDIRECT_URI)
        with upstox_tokens.transaction(self.db, 1) as database:
            upstox_tokens.upsert_token(database, upstox_tokens.token_row(app, "new", MOMENT, MOMENT + 1))
        self.assertEqual([row["access_token"] for row in self.rows()], ["kept", "new"])


class BadDatabaseTest(Case):
    """What cannot be used: one sentence with path and remedy, exit 2, and no login."""

    def assert_unusable(self, *words: str, argv: Iterable[str] = ("--mode", "ALL"),
                        path: Path | None = None) -> None:
        before = self.snapshot()
        code, out, err = self.call(*argv)
        self.assertEqual((code, out, self.logins()), (2, "", 0), err)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        self.assertEqual(len(errors), 1, err)
        self.assertRegex(errors[0], r"\.( \(.*\))?\Z")
        for word in (str(path or self.db), *words):
            self.assertIn(word, errors[0])
        self.assertEqual(self.snapshot() | before, self.snapshot())

    def test_schemas(self) -> None:
        table = {
            "CREATE VIEW upstox_tokens AS SELECT 1 AS id": "",  # the view lacks columns: any word will do
            TOKENS_DDL.replace("upstox_tokens", "t") + ";CREATE VIEW upstox_tokens AS SELECT * FROM t":
                "view",
            TOKENS_DDL.replace('    "updated_at" bigint,\n', ""): "updated_at",
            TOKENS_DDL.replace('    "validity_at" varchar(255)\n', '    "x"\n'): "validity_at",
            TOKENS_DDL.replace('    "api_name" varchar(255) NOT NULL,\n', ""): "api_name",
            TOKENS_DDL.replace('"purpose" varchar(255)', '"tenant" NOT NULL'): "tenant",
            TOKENS_DDL.replace('"id" integer PRIMARY KEY', '"id" bigint PRIMARY KEY NOT NULL'): "id",
            TOKENS_DDL[:-2] + ", CHECK (length(client_secret) < 3))": "CHECK",
            TOKENS_DDL + "; CREATE TRIGGER stay BEFORE INSERT ON upstox_tokens "
                         "BEGIN SELECT RAISE(FAIL, 'not today'); END": "not today",
            TOKENS_DDL + "; CREATE UNIQUE INDEX one ON upstox_tokens (api_index); "
                         "INSERT INTO upstox_tokens (api_name, api_index) VALUES ('LEGACY', 0)": "api_index",
        }
        for script, word in table.items():
            with self.subTest(script):
                self.db.unlink(missing_ok=True)
                self.sql(script)
                self.assert_unusable(word)

    def test_files_that_are_no_database(self) -> None:
        self.seed_valid()
        whole = self.db.read_bytes()
        table = {"text": (b"created by hand\n" * 99, "--db"), "two bytes": (b"ab", "--db"),
                 "no header": (bytes(4096) + whole[4096:], "--db"),
                 "other pages": (whole[:4096] + b"\xaa" * (len(whole) - 4096), "backup"),
                 "truncated": (whole[:4096], "backup")}
        for what, (content, word) in table.items():
            for argv in (["--mode", "ALL"], ["--status"]):
                with self.subTest(what, argv=argv):
                    self.db.write_bytes(content)
                    self.assert_unusable(word, argv=argv)

    def test_places_that_are_no_file(self) -> None:
        self.folder.joinpath("file").touch()
        self.folder.joinpath("folder").mkdir()
        self.folder.joinpath("dangling").symlink_to(self.folder / "gone" / "x.db")
        for name in ("folder", "gone/x.db", "file/x.db", "dangling"):
            for argv in (["--mode", "ALL"], ["--status"], ["--import-config"]):
                with self.subTest(name, argv=argv):
                    self.assert_unusable(argv=[*argv, "--db", str(self.folder / name)], path=self.folder)
        self.assertFalse(self.folder.joinpath("gone").exists())

    def test_locked_by_a_writer(self) -> None:
        self.seed_guide()
        script = "d.execute('BEGIN IMMEDIATE'); d.execute('DELETE FROM upstox_tokens')"
        holder = hold_database(self, self.db, script)
        with mock.patch.object(upstox_tokens, "PROOF_SECONDS", 0.2):
            self.assert_unusable("locked", "Close")
        self.assertEqual(self.call("--status"), (1, GUIDE_SUMMARY, ""))  # readers are not disturbed
        holder.kill()
        holder.wait()
        self.broker.switches.dialog_answer = "100068"
        self.assertEqual(self.call("--mode", "ALL")[0], 1)

    @unittest.skipUnless(hasattr(os, "seteuid"), "no such permissions")
    def test_permissions(self) -> None:
        self.seed_guide()
        self.call("--status")  # what is imported late is imported now
        for mode, folder_mode in ((0o400, 0o700), (0o600, 0o500)):
            with self.subTest(oct(mode)), unprivileged(self.folder):
                self.db.chmod(mode)
                self.folder.chmod(folder_mode)
                self.assertEqual(self.call("--status"), (1, GUIDE_SUMMARY, ""))
                self.assert_unusable("permission")
                self.folder.chmod(0o700)
        with unprivileged(self.folder):
            self.db.chmod(0)
            code, out, err = self.call("--status")
        self.assertEqual((code, out), (2, ""))
        self.assertRegex(err, rf"\Aerror: .*{re.escape(str(self.db))}.*\n\Z")


# ---- what is written


class RowTest(Case):
    types = {
        "access_token": "text", "api_name": "text", "client_id": "text", "client_secret": "text",
        "created_at": "integer", "expires_in": "integer", "is_primary": "integer", "redirect_uri": "text",
        "token_type": "text", "api_index": "integer", "generated_at": "text", "is_active": "integer",
        "updated_at": "integer", "validity_at": "text"}
    table = [  # zone, generated (Indian time), generated_at, validity_at
        ("Asia/Kolkata", "2025-11-25 02:30:00", "2025-11-25 02:30:00", "2025-11-25 03:30:00"),
        ("Asia/Kolkata", "2025-11-25 03:29:59", "2025-11-25 03:29:59", "2025-11-25 03:30:00"),
        ("Asia/Kolkata", "2025-11-25 03:30:00", "2025-11-25 03:30:00", "2025-11-26 03:30:00"),
        ("Asia/Kolkata", "2025-11-25 20:00:00", "2025-11-25 20:00:00", "2025-11-26 03:30:00"),
        ("Asia/Kolkata", "2025-12-31 23:59:59", "2025-12-31 23:59:59", "2026-01-01 03:30:00"),
        ("UTC", "2025-11-25 02:30:00", "2025-11-24 21:00:00", "2025-11-24 22:00:00"),
        ("UTC", "2025-11-25 03:29:59", "2025-11-24 21:59:59", "2025-11-24 22:00:00"),
        ("UTC", "2025-11-25 03:30:00", "2025-11-24 22:00:00", "2025-11-25 22:00:00"),
        ("UTC", "2025-11-25 20:00:00", "2025-11-25 14:30:00", "2025-11-25 22:00:00"),
        # clocks in New York go back on 2 November 2025 at 06:00 UTC, forward on 9 March 2025 at 07:00 UTC
        ("America/New_York", "2025-11-01 20:00:00", "2025-11-01 10:30:00", "2025-11-01 18:00:00"),
        ("America/New_York", "2025-11-02 03:30:00", "2025-11-01 18:00:00", "2025-11-02 17:00:00"),
        ("America/New_York", "2025-11-02 20:00:00", "2025-11-02 09:30:00", "2025-11-02 17:00:00"),
        ("America/New_York", "2025-03-09 03:29:59", "2025-03-08 16:59:59", "2025-03-08 17:00:00"),
        ("America/New_York", "2025-03-09 03:30:00", "2025-03-08 17:00:00", "2025-03-09 18:00:00"),
        ("America/New_York", "2025-03-09 20:00:00", "2025-03-09 10:30:00", "2025-03-09 18:00:00"),
    ]

    def store(self, name: str, moment: float) -> str:
        """What a run does once it has a token."""
        index = list(APPS).index(name)
        app, token = upstox_tokens.App(index, name, *APPS[name], REDIRECT_URI), self.broker.issue(name)
        row = upstox_tokens.token_row(app, token, moment, upstox_tokens.cutoff_after(moment))
        seed(self.db, [])
        with upstox_tokens.transaction(self.db, 1) as database:
            upstox_tokens.upsert_token(database, row)
        return token

    def test_columns_and_their_types(self) -> None:
        for name in ("PRIMARY", "OPTIONCHAIN1"):
            token = self.store(name, MOMENT + 0.987)
            row = self.rows(table=f"upstox_tokens WHERE api_name = '{name}'")[0]
            del row["id"]
            self.assertEqual({column: value for column, value in row.items() if value is not None}, {
                "access_token": token, "api_name": name, "client_id": APPS[name][0],
                "client_secret": APPS[name][1], "created_at": int(MOMENT * 1000) + 987,
                "expires_in": int(next_cutoff(MOMENT) - MOMENT) - 1, "is_primary": int(name == "PRIMARY"),
                "redirect_uri": REDIRECT_URI, "token_type": "Bearer", "api_index": list(APPS).index(name),
                "generated_at": local_text(MOMENT), "is_active": 1, "updated_at": int(MOMENT * 1000) + 987,
                "validity_at": local_text(next_cutoff(MOMENT))})
            columns = ", ".join(f"typeof({column}) AS {column}" for column in self.types)
            self.assertEqual(self.rows(columns)[0], self.types)

    def test_validity_in_the_zone_of_the_machine(self) -> None:
        self.write_env(**ONE_APP)
        for zone, generated, generated_at, validity_at in self.table:
            with self.subTest(zone, generated=generated), time_zone(zone):
                self.moment = datetime.fromisoformat(generated + "+05:30").timestamp()
                self.store("PRIMARY", self.moment)
                row = self.rows()[0]
                self.assertEqual((row["generated_at"], row["validity_at"]), (generated_at, validity_at))
                end = self.moment + row["expires_in"]
                for self.moment, expected in ((self.moment, "VALID"), (end - 1, "VALID"), (end, "EXPIRED")):
                    self.assertEqual(label(self.call("--status")[1]), expected)


# ---- from Python


class ModuleTest(Case):
    def test_access_token(self) -> None:
        self.seed_valid("PRIMARY", "WEBSOCKET1")
        tokens = {row["api_name"]: row["access_token"] for row in self.rows()}
        self.assertEqual(upstox_tokens.access_token("PRIMARY"), tokens["PRIMARY"])
        moved = self.db.rename(self.folder / "other.db")
        for db in (moved, str(moved)):
            self.assertEqual(upstox_tokens.access_token("WEBSOCKET1", db=db), tokens["WEBSOCKET1"])
        self.assertEqual(self.broker.hits, [])

    def test_access_token_that_cannot_be_had(self) -> None:
        changes = {"PRIMARY": {"is_active": 0}, "WEBSOCKET1": {"validity_at": local_text(time.time() - 1)},
                   "WEBSOCKET2": {"validity_at": None}, "WEBSOCKET3": {"access_token": None},
                   "OPTIONCHAIN1": {"created_at": int((time.time() - 90000) * 1000)}}
        for name, change in changes.items():
            self.seed_valid(name, **change)
        reasons = {"PRIMARY": "inactive", "WEBSOCKET1": "EXPIRED", "WEBSOCKET2": "validity unreadable",
                   "WEBSOCKET3": "NOT FOUND", "OPTIONCHAIN1": "EXPIRED", "OPTIONCHAIN2": "NOT FOUND",
                   "FOO": "FOO"}
        for name, reason in reasons.items():
            with self.subTest(name), self.assertRaises(upstox_tokens.TokenError) as caught:
                upstox_tokens.access_token(name)
            self.assertIn(name, str(caught.exception))
            self.assertIn(reason, str(caught.exception))
            self.assert_no_secret(str(caught.exception))

    def test_access_token_without_a_database(self) -> None:
        self.folder.joinpath("text").write_text("no database" * 100)
        for path in ("missing.db", "gone/missing.db", ".", "text"):
            with self.subTest(path), self.assertRaises(upstox_tokens.TokenError):
                upstox_tokens.access_token("PRIMARY", db=path)
        self.assertEqual(sorted(self.snapshot()), [".env", "text"])

    def test_import_has_no_side_effects(self) -> None:
        script = ("import os, signal, socket, sys, threading; mask = os.umask(18); sys.stdout.reconfigure()\n"
                  "handlers = [signal.getsignal(n) for n in (2, 15, 13)]\n"
                  "import upstox_tokens\n"
                  "assert handlers == [signal.getsignal(n) for n in (2, 15, 13)]\n"
                  "assert os.umask(mask) == 18 and threading.active_count() == 1\n"
                  "assert socket.getdefaulttimeout() is None\n"
                  "assert not {'selenium', 'pyotp', 'urllib3'} & set(sys.modules)")
        before = self.snapshot()
        env = {"PYTHONPATH": str(PROGRAM.parent), "PYTHONDONTWRITEBYTECODE": "1"}
        self.assertEqual(self.process(script, program="-c", env=env), (0, "", ""))
        self.assertEqual(self.snapshot(), before)

    def test_third_parties_are_imported_for_a_login_only(self) -> None:
        probe = ("import sys, upstox_tokens; code = upstox_tokens.main(sys.argv[1:])\n"
                 "loaded = {'selenium', 'pyotp', 'urllib3'} & set(sys.modules)\n"
                 "sys.exit(f'loaded {loaded}' if loaded else code)")
        env = {"PYTHONPATH": str(PROGRAM.parent)}
        self.seed_valid()
        for argv, expected in ((["--status"], 0), (["--help"], 0), (["--mode", "INVALID_ONLY"], 0), ([], 0),
                               (["--env-file", "missing"], 2), (["--import-config"], 0)):
            with self.subTest(argv):
                code, _, err = self.process(probe, *argv, program="-c", env=env)
                self.assertEqual(code, expected, err)

    def imports(self, path: Path) -> dict[str, bool]:
        """Top-level package: whether it is imported at module level."""
        found: dict[str, bool] = {}
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) else [])
            for name in names:
                package = name.partition(".")[0]
                found[package] = found.get(package, False) or node in tree.body
        return {name: top for name, top in found.items() if name not in sys.stdlib_module_names}

    def test_third_parties_are_selenium_and_pyotp(self) -> None:
        imports = self.imports(PROGRAM)
        imports.pop("urllib3", None)  # comes with selenium, whose faults it raises
        self.assertEqual(imports, {"selenium": False, "pyotp": False})
        own = self.imports(Path(__file__))
        self.assertLessEqual(set(own), {"selenium", "pyotp", "upstox_tokens", "test_upstox_tokens"})
        header = re.search(r"(?ms)^# /// script\n(.*?)^# ///$", PROGRAM.read_text(encoding="utf-8"))[1]
        settings = dict(line.removeprefix("# ").split(" = ", 1) for line in header.splitlines())
        self.assertEqual(json.loads(settings["requires-python"]), ">=3.10")
        self.assertEqual([re.match(r"\w+", name)[0] for name in json.loads(settings["dependencies"])],
                         ["selenium", "pyotp"])


# ---- usage, the lock, and odd surroundings


class UsageTest(Case):
    def test_errors_touch_nothing(self) -> None:
        before = self.snapshot()
        for line in ("--mode PARTIAL", "--apis PRIMARY", "--mode ALL --apis PRIMARY", "--mode SOME", "--mode",
                     "--status --mode ALL", "--status --apis PRIMARY", "--json", "--wait 0", "--wait soon",
                     "--wait nan", "--stat", "--unknown", "extra", "--flow FAX", "--mode PARTIAL --apis FOO",
                     "--mode PARTIAL --apis ,", "--mode PARTIAL --apis=", "--mode PARTIAL --apis PRIMARY,FOO",
                     "--mode PARTIAL --apis 1", "--status --import-config"):
            with self.subTest(line), contextlib.redirect_stderr(io.StringIO()) as stream:
                code, out, err = self.call(*line.split())
                self.assertEqual((code, out), (2, ""))
                self.assertIn("error: ", err + stream.getvalue())
        self.assertEqual((self.broker.hits, self.snapshot()), ([], before))

    def test_unconfigured_name(self) -> None:
        self.write_env(**ONE_APP)
        self.assert_refused("WEBSOCKET1", argv=["--mode", "PARTIAL", "--apis", "PRIMARY,websocket1"])

    def test_version_and_help(self) -> None:
        self.folder.joinpath(".env").write_text("broken")  # neither reads anything
        version = f"upstox_tokens.py {upstox_tokens.__version__}\n"
        self.assertEqual(self.process("--version"), (0, version, ""))
        code, out, err = self.process("--help")
        self.assertEqual((code, err), (0, ""))
        options = """--status --json --mode --apis --serve --check --import-config --flow --wait --headed
            --debug-dir --env-file --db -v -q --version INVALID_ONLY PARTIAL 127.0.0.1:28021"""
        for option in options.split():
            self.assertIn(option, out)


class LockTest(Case):
    def test_one_run_at_a_time_and_none_after_a_kill(self) -> None:
        self.seed_guide()
        self.broker.switches.dialog_delay = 60
        holder = self.start("--mode", "INVALID_ONLY")
        self.until(lambda: self.broker.count("dialog") == 3)
        self.broker.switches.dialog_delay, self.broker.switches.dialog_answer = 0, "100068"
        for argv, answers in ((["--mode", "ALL"], []), ([], ["1"])):
            with self.subTest(argv):
                code, _, err = self.call(*argv, answers=answers)
                self.assertEqual((code, len(err.splitlines())), (4, 1))
                self.assertRegex(err.lower(), "another run is busy")
        self.assertEqual(self.broker.count("dialog"), 3)
        self.assertEqual(self.call("--status")[0], 1)  # looking is free
        link = self.folder / "link.db"
        link.symlink_to(self.db)
        self.assertEqual(self.call("--mode", "ALL", "--db", link)[0], 4)
        self.assertEqual(self.call("--mode", "ALL", "--db", "other.db")[0], 1)
        holder.kill()
        holder.wait()
        self.assertEqual(self.call("--mode", "ALL")[0], 1)

    def test_stopped_before_any_login(self) -> None:
        self.seed_guide()
        before = self.rows("access_token")
        self.broker.switches.dialog_delay = 60
        for place, (number, expected) in enumerate([(signal.SIGINT, 130), (signal.SIGTERM, 143)], 1):
            with self.subTest(number):
                process = self.start("--mode", "PARTIAL", "--apis", "OPTIONCHAIN2")
                self.until(lambda: self.broker.count("dialog") == place)
                process.send_signal(number)
                self.assertEqual(self.finish(process)[0], expected)
        self.assertEqual(self.rows("access_token"), before)


@unittest.skipIf(sys.platform == "win32", "a POSIX shell's doing")
class SurroundingsTest(Case):
    def shell(self, line: str, **env: str | None) -> tuple[int, str, str]:
        """A shell line in which `tool` runs the program."""
        tool = f"tool() {{ {shlex.quote(sys.executable)} {shlex.quote(str(PROGRAM))} \"$@\"; }}\n"
        process = subprocess.Popen(["sh", "-c", tool + line], cwd=self.folder, env=self.environ(env),
                                   encoding="utf-8", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)
        self.addCleanup(self.end, process)
        return self.finish(process, "")

    def test_streams(self) -> None:
        self.seed_guide()
        first = GUIDE_SUMMARY.splitlines(True)[0]
        for line, expected in {
                "tool --status | head -1": (0, first, ""),
                "{ tool --status; echo $? >&2; } | true": (0, "", "error: The result could not be written: BrokenPipeError.\n1\n"),
                "tool --status >&-": (1, "", ""),
                "tool --status 2>&-": (1, GUIDE_SUMMARY, ""),
                "tool --status <&-": (1, GUIDE_SUMMARY, ""),
                "tool --env-file missing >&- 2>&-": (2, "", ""),
                "tool <&-": (1, f"{GUIDE_SUMMARY}{GUIDE_MENU}*Aborted, nothing changed.\n", "")}.items():
            with self.subTest(line):
                code, out, err = self.shell(line)
                self.assertEqual((code, err), (expected[0], expected[2]))
                pattern = re.escape(expected[1]).replace(r"\*", r"[\s\S]*")
                self.assertRegex(out, rf"\A{pattern}\Z")

    def test_full_disk_behind_stdout_is_no_success(self) -> None:
        if not os.path.exists("/dev/full"):
            self.skipTest("no /dev/full")
        self.seed_valid()
        self.assertNotEqual(self.shell("tool --status >/dev/full")[0], 0)

    def test_empty_environment(self) -> None:
        self.seed_guide()
        line = f"env -i {shlex.quote(sys.executable)} {shlex.quote(str(PROGRAM))} --status"
        self.assertEqual(self.shell(line), (1, GUIDE_SUMMARY, ""))

    def test_locale_without_utf8(self) -> None:
        self.seed_guide()
        self.sql("INSERT INTO upstox_tokens (api_name) VALUES ('ALTE-GRÖSSE')")
        folder = self.folder / "größe"
        folder.mkdir()
        self.db.rename(folder / self.db.name)
        code, out, err = self.process("--status", "-v", "--db", folder / self.db.name, encoding="latin-1",
                                      env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
        self.assertEqual((code, out.splitlines()[1:]), (1, GUIDE_SUMMARY.splitlines()[1:]))
        self.assertIn("ALTE-GR", out + err)

    def test_open_umask(self) -> None:
        self.broker.switches.dialog_answer = "100068"
        self.assertEqual(self.shell("umask 000; tool --mode ALL")[0], 1)
        for path in self.folder.iterdir():
            self.assertFalse(path.stat().st_mode & 0o077, path)

    def test_folder_that_is_gone(self) -> None:
        self.seed_guide()
        line = 'env="$PWD/.env" db="$PWD/vega_trade.db"; mkdir x; cd x; rmdir ../x; tool --status '
        self.assertEqual(self.shell(line + '--env-file "$env" --db "$db"')[:2], (1, GUIDE_SUMMARY))
        self.assertEqual(self.shell(line)[0], 2)


# ---- shared by the tests in a real browser


class Done(NamedTuple):
    code: int
    out: str
    err: str


class Desk(Case):
    """A Case of which a test can have several side by side, each with a folder, broker and clock of its own.

    The clock starts at noon in India, at the beginning of a TOTP window. What the program sleeps moves it on,
    for the broker too, so waiting for the next window takes no time. `skew`: the broker's clock is ahead.
    """

    def __init__(self, apps: int = 1, *, skew: float = 0, broker: type[Broker] = Broker,
                 env: dict[str, str] | None = None, **switches: Any) -> None:
        super().__init__()
        self.names, self.skew, self.settings = list(APPS)[:apps], skew, env or {}
        self.broker = broker(**switches)
        self.ahead = next_cutoff(time.time()) + 8.5 * 3600 + 1 - time.time()
        self.err = io.StringIO()

    def __enter__(self) -> Desk:
        self.stack = contextlib.ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        self.stack.enter_context(self.broker)
        self.db, self.prompts = self.folder / "vega_trade.db", []
        self.note_driver_starts()
        self.write_env(**self.settings)
        self.sleep(0)
        return self

    def __exit__(self, *_: object) -> None:
        self.doCleanups()
        self.stack.close()

    def note_driver_starts(self) -> None:
        """A chromedriver first on PATH that leaves a line for each start and becomes the real one."""
        wrapper = self.folder / "bin" / "chromedriver"
        wrapper.parent.mkdir()
        wrapper.write_text(f"""#!/bin/sh\necho >>"{self.folder}/starts"
exec {shutil.which("chromedriver")} "$@"\n""")
        wrapper.chmod(0o700)
        (self.folder / "starts").touch()

    def browsers(self) -> int:
        """Browsers started so far."""
        return (self.folder / "starts").read_text().count("\n")

    def write_env(self, text: str | bytes | None = None, **changes: str | None) -> Path:
        unused = {f"UPSTOX_{key}_{index}": None for index in range(len(self.names), len(APPS))
                  for key in ("CLIENT_ID", "CLIENT_SECRET", "API_NAME")}
        return super().write_env(text, **unused | changes)

    def environ(self, changes: dict[str, str | None]) -> dict[str, str]:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return super().environ({"PATH": path, "DISPLAY": None, "WAYLAND_DISPLAY": None,
                                "TMPDIR": tempfile.gettempdir()} | changes)

    def sleep(self, seconds: float) -> None:
        self.ahead += seconds
        self.broker.switches.clock_offset = self.ahead + self.skew

    def now(self) -> float:
        return time.time() + self.ahead

    def set_skew(self, seconds: float) -> None:
        self.skew = seconds
        self.sleep(0)

    def real_clock(self) -> None:
        """For programs in a process of their own, and what follows them."""
        self.sleep(-self.ahead)

    def seed_old(self) -> dict[str, str]:
        """A token of yesterday for every app; the tokens."""
        tokens = {name: self.broker.issue(name) for name in self.names}
        seed(self.db, [token_row(name, token, self.now() - DAY) for name, token in tokens.items()])
        return tokens

    def tokens(self) -> dict[str, str]:
        return {row["api_name"]: row["access_token"] for row in self.rows()}

    def call(self, *argv: str, answers: Iterable[str] = (), out: Any = None, **env: str | None) -> Done:
        """Run the program in this process; what it says of its progress is in self.err meanwhile."""
        out, self.err, typed = io.StringIO(), io.StringIO(), iter(answers)

        def ask(prompt: str) -> str:
            self.prompts.append(prompt)
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        options = ["--env-file", str(self.folder / ".env"), "--db", str(self.db)]
        code = upstox_tokens.main([*argv, *options], out=out, err=self.err, ask=ask,
                                  environ=self.environ(env), now=self.now, sleep=self.sleep)
        self.check_rules("".join([out.getvalue(), self.err.getvalue(), *self.prompts]))
        return Done(code, out.getvalue(), self.err.getvalue())

    def start(self, *argv: str, **options: Any) -> subprocess.Popen[str]:
        """The program in a process of its own, on the real clock, as the head of a process group."""
        self.real_clock()
        return super().start(*argv, start_new_session=True, **options)

    def finish(self, process: subprocess.Popen[str], input: str | None = None) -> Done:
        try:
            done = Done(*super().finish(process, input))
        finally:
            process.kill()
        self.check_rules(done.out + done.err)
        return done

    def until(self, condition: Any, seconds: float = 60) -> None:
        super().until(condition, seconds)

    def check_rules(self, said: str) -> None:
        """What holds for every run."""
        self.assert_no_secret(said)
        if self.rows("name", "sqlite_master WHERE name = 'upstox_token_audit'"):
            self.assert_no_secret(str(self.rows("run_id, outcome, reason", "upstox_token_audit")))
        self.assertNotIn("Traceback", said)
        self.assertEqual(self.broker.count("logout"), 0)
        self.assertEqual(len(self.broker.codes), len(set(self.broker.codes)), "a TOTP code was sent twice")

    def assert_sent(self, otp_requests: int, codes: int, pins: int) -> None:
        sent = [len(self.broker.otp_requests), len(self.broker.codes), len(self.broker.pins)]
        self.assertEqual(sent, [otp_requests, codes, pins], "OTP requests, TOTP codes, PINs")

    def audit(self) -> list[tuple[str, str]]:
        return [(row["api_name"], row["outcome"]) for row in self.rows(table="upstox_token_audit")]


class BrowserCase(unittest.TestCase):
    """Whatever a test starts must be gone at its end, and the profiles with it."""

    @classmethod
    def setUpClass(cls) -> None:
        if os.name == "nt" or missing_for_browser() or not shutil.which("chromedriver"):
            raise unittest.SkipTest(missing_for_browser() or "chromedriver on PATH is needed")

    def setUp(self) -> None:
        self.stack = stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        stack.callback(os.umask, os.umask(0o022))
        self.temp = Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        stack.enter_context(mock.patch.object(tempfile, "tempdir", str(self.temp)))
        stack.callback(self.assert_clean)
        self.maxDiff = None

    def assert_clean(self) -> None:
        self.assertEqual(list(self.temp.glob("upstox_tokens-*")), [], "profiles left behind")
        end = time.monotonic() + 10  # a crash handler notices by itself that its browser has gone
        while (left := processes(self.temp)) and time.monotonic() < end:
            time.sleep(0.05)
        self.assertEqual(left, {}, "processes left behind")

    def side_by_side(self, *tables: tuple[Callable[[Any], None], Iterable[Any]], workers: int = 3) -> None:
        """work(case) for every case of every table, several at a time; each fails as a subtest of its own."""
        with ThreadPoolExecutor(workers) as pool:
            futures = [(case, pool.submit(work, case)) for work, cases in tables for case in cases]
            for case, future in futures:
                with self.subTest(case=str(case)[:100]):
                    future.result()


def processes(folder: Path) -> dict[int, str]:
    """Processes other than this one that have the folder in their command line or environment."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            texts = [(entry / name).read_bytes() for name in ("cmdline", "environ")]
            if int(entry.name) != os.getpid() and any(bytes(folder) in text for text in texts) and texts[0]:
                found[int(entry.name)] = texts[0].replace(b"\0", b" ").decode(errors="replace")
    return found


@contextlib.contextmanager
def meanwhile(action: Callable[[], Any]) -> Iterator[None]:
    """Run the action in a thread beside the block; its failure is the block's."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(action)
        yield
        future.result()


def summary(**labels: str) -> str:
    """The summary of the guide's 7.1, to the letter."""
    lines = ["Token Status Summary:", "-" * 34, *(f"{name:<14}: {label}" for name, label in labels.items())]
    valid = sum(label == "VALID" for label in labels.values())
    lines += ["", f"Valid Tokens    : {valid}", f"Invalid Tokens  : {len(labels) - valid}", ""]
    return "\n".join(lines)


ALL_VALID = summary(**dict.fromkeys(APPS, "VALID"))
GUIDE = summary(PRIMARY="VALID", WEBSOCKET1="VALID", WEBSOCKET2="INVALID (401)", WEBSOCKET3="EXPIRED",
                OPTIONCHAIN1="VALID", OPTIONCHAIN2="NOT FOUND")
RENEWED = ["WEBSOCKET2", "WEBSOCKET3", "OPTIONCHAIN2"]  # of the guide's states, the three that need a login


class WitnessBroker(Broker):
    """Looks into the database whenever a token is checked."""

    desk: Desk
    seen: list[bool]

    def on_profile(self, request: Request) -> Reply | str:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        name = self.tokens[token].app
        if name in self.logins:
            stored = self.desk.tokens().get(name) == token
            self.seen.append(stored and (name, "GENERATED") in self.desk.audit())
        return super().on_profile(request)


class GuideTest(BrowserCase):
    """The guide's example: three valid tokens, one refused, one expired, one missing."""

    def test_invalid_only(self) -> None:
        with Desk(6, broker=WitnessBroker) as desk:
            desk.broker.desk, desk.broker.seen = desk, []
            desk.seed_guide()
            before = {row["api_name"]: row for row in desk.rows()}
            self.assertEqual(desk.call("--mode", "INVALID_ONLY")[:2], (0, ALL_VALID))
            after = {row["api_name"]: row for row in desk.rows()}
            for name in APPS:
                self.assertEqual(after[name] == before.get(name), name not in RENEWED, name)
            self.assertEqual([desk.broker.logins, desk.browsers()], [RENEWED, 1])
            self.assertEqual(desk.broker.seen, [True] * 3, "persist, audit, then the profile check")
            desk.assert_sent(1, 1, 3)
            self.check_audit(desk)
            self.check_second_run(desk)

    def check_audit(self, desk: Desk) -> None:
        rows = desk.rows(table="upstox_token_audit")
        pins = [(name, outcome) for name in RENEWED for outcome in ("PIN_SENT", "PIN_TAKEN", "GENERATED")]
        code = [(RENEWED[0], "CODE_SENT"), (RENEWED[0], "CODE_TAKEN")]
        self.assertEqual(desk.audit(), code + pins)
        self.assertEqual({(row["source"], row["flow"], row["reason"]) for row in rows},
                         {("CLI", "SELENIUM", None)})
        self.assertEqual(len({row["run_id"] for row in rows}), 1)
        self.assertTrue(all(0 <= desk.now() * 1000 - row["at"] < 60_000 for row in rows))

    def check_second_run(self, desk: Desk) -> None:
        hits, rows = len(desk.broker.hits), desk.rows()
        self.assertEqual(desk.call("--mode", "INVALID_ONLY")[:2], (0, ALL_VALID))
        self.assertEqual([desk.browsers(), desk.rows()], [1, rows])
        self.assertEqual([path for _, path, _ in desk.broker.hits[hits:]], ["/v2/user/profile"] * 6)

    def test_menu(self) -> None:
        with Desk(6) as desk:
            desk.seed_guide()
            done = desk.call(answers=["5", "", "2"])
            self.assertEqual([done.code, desk.broker.logins], [0, RENEWED])
            self.assertTrue(done.out.startswith(GUIDE + "\nChoose Action:\n"), done.out)
            self.assertTrue(done.out.endswith("\n" + ALL_VALID), done.out)
            self.assertEqual({row["source"] for row in desk.rows(table="upstox_token_audit")}, {"MENU"})


class StopTest(BrowserCase):
    """Ctrl-C, SIGTERM and kill -9 in the middle of a run."""

    CASES = [  # signal, sent when (route, requests so far), exit code, tokens generated by then
        (signal.SIGINT, ("token", 2), 130, 2),  # a code was sent for exchange: its token is still stored
        (signal.SIGTERM, ("pin", 2), 143, 1),
        (signal.SIGKILL, ("page", 2), -9, 1)]

    def test_half_way(self) -> None:
        self.side_by_side((self.stop_half_way, self.CASES))

    def stop_half_way(self, case: Any) -> None:
        signum, (route, requests), code, generated = case
        with Desk(6, page_delay=0.5, step_delay=0.5, exchange_delay=0.5) as desk:
            desk.real_clock()
            desk.seed_guide()
            before = desk.tokens()
            program = desk.start("--mode", "INVALID_ONLY")
            desk.until(lambda: desk.broker.count(route) >= requests)
            self.assertEqual(desk.call("--mode", "ALL").code, 4)
            # Ctrl-C in a terminal reaches the whole process group
            (os.killpg if signum == signal.SIGINT else os.kill)(program.pid, signum)
            done = desk.finish(program)
            self.assertEqual(done.code, code, done.err)
            self.check_rest(desk, before, generated)

    def check_rest(self, desk: Desk, before: dict[str, str], generated: int) -> None:
        """What was generated is kept, and the next run does the rest."""
        kept, logins = desk.tokens(), len(desk.broker.logins)
        self.assertEqual(kept, before | {name: kept.get(name) for name in RENEWED[:generated]})
        new = [name for name in RENEWED if kept.get(name) != before.get(name)]
        self.assertEqual(new, RENEWED[:generated])
        desk.broker.switches.page_delay = desk.broker.switches.step_delay = 0
        again = desk.call("--mode", "INVALID_ONLY")
        self.assertEqual(again[:2], (0, ALL_VALID), again.err)
        self.assertEqual(desk.broker.logins[logins:], RENEWED[generated:])


class ChangingBroker(Broker):
    """Shows every app another login page: `looks` holds the switches by api name."""

    looks: dict[str, dict[str, Any]]

    def on_page(self, request: Request) -> Reply | str:
        name, _ = self._dialogs[request.query["client_id"]]
        vars(self.switches).update(self.plain | self.looks[name])
        return super().on_page(request)

    def show(self, looks: Sequence[dict[str, Any]]) -> None:
        self.looks = dict(zip(APPS, looks))
        self.plain = {key: getattr(self.switches, key) for look in looks for key in look}


class VariantTest(BrowserCase):
    """The login page as it may look: all tokens come out VALID, in one browser."""

    # switches of the desk, of the page of each app, what is sent in all
    CASES: list[tuple[dict[str, Any], list[dict[str, Any]], tuple[int, int, int]]] = [
        ({}, [{"page_delay": 20}], (1, 1, 1)),
        ({"remember": False, "skew": 15}, [
            {"otp_mask": True}, {"otp_autosubmit": 0}, {"otp_autosubmit": 150, "otp_mask": True},
            {"otp_button_always_enabled": True}, {"otp_button_always_enabled": True, "otp_autosubmit": 150},
            {"spinner": 1500}], (6, 6, 6)),
        ({"remember": False, "skew": -15}, [
            {"rerender": 120}, {"rerender": 120, "otp_mask": True, "keep_hidden_inputs": True},
            {"keep_hidden_inputs": True}, {"toast_ms": 9000}, {"lead_phone": True},
            {"captcha": "auto", "captcha_seconds": 3, "captcha_shadow": True}], (6, 6, 6)),
        ({"only": {"OPTIONCHAIN2"}, "dialog_answer": "direct"}, [
            {}, {"stale_identity": True}, {"page_delay": 2, "step_delay": 2, "redirect_delay": 3},
            {"rerender": 120}, {"spinner": 1500}, {}], (2, 2, 5)),
    ]

    def test_variants(self) -> None:
        slow, *others = self.CASES
        self.side_by_side((self.log_in, [slow]), (self.stop_at_captcha, [False]), (self.log_in, others),
                          workers=4)

    def stop_at_captcha(self, shadow: bool) -> None:
        """Without a window nobody can solve it: 15 s to pass by itself, then an operator is called."""
        with Desk(2, captcha="never", captcha_shadow=shadow) as desk:
            shown: list[float] = []
            old = desk.seed_old()
            def look() -> None:
                desk.until(lambda: desk.broker.count("page"))
                shown.append(time.monotonic())

            with meanwhile(look):
                done = desk.call("--mode", "ALL", DISPLAY=":0")
            self.assertTrue(14 < time.monotonic() - shown[0] < 20)
            self.assertEqual([done.code, desk.tokens()], [3, old], done.err)
            self.assertRegex(done.out, "(?m)^PRIMARY: .*CAPTCHA.*--headed")
            self.assertRegex(done.out, "(?m)^WEBSOCKET1: .*not tried")
            desk.assert_sent(0, 0, 0)

    def log_in(self, case: tuple[dict[str, Any], list[dict[str, Any]], tuple[int, int, int]]) -> None:
        switches, looks, sent = case
        with Desk(len(looks), broker=ChangingBroker, **switches) as desk:
            desk.broker.show(looks)
            desk.seed_old()
            done = desk.call("--mode", "ALL")
            self.assertEqual(done[:2], (0, summary(**dict.fromkeys(desk.names, "VALID"))), done.err)
            self.assertEqual([sorted(set(desk.broker.logins)), desk.browsers()], [sorted(desk.names), 1])
            desk.assert_sent(*sent)

    def test_totp_windows(self) -> None:
        """A code that lives less than 5 s is not sent, and none is sent by two runs: the next window's is."""
        with Desk(2, step_delay=1, totp_single_use=False) as desk:
            def turn_clock() -> None:
                desk.until(lambda: desk.broker.otp_requests)
                desk.sleep(30 + 25.5 - desk.now() % 30)

            with meanwhile(turn_clock):
                self.assertEqual(desk.call("--mode", "PARTIAL", "--apis", "PRIMARY").code, 0)
            window = int(desk.now()) // 30 * 30
            self.assertEqual(desk.call("--mode", "PARTIAL", "--apis", "WEBSOCKET1").code, 0)
            self.assertEqual(desk.broker.codes, [totp(TOTP_SECRET, window), totp(TOTP_SECRET, window + 30)])
            self.assertLess(desk.now() % 30, 15, "waited for the beginning of a window")

    def test_clock_far_off(self) -> None:
        for skew in (60, -60):
            with self.subTest(skew=skew), Desk(2, skew=skew) as desk:
                old = desk.seed_old()
                done = desk.call("--mode", "ALL")
                self.assertEqual([done.code, desk.tokens(), desk.browsers()], [1, old, 0])
                where = "behind" if skew > 0 else "ahead"
                self.assertRegex(done.out, rf"(?m)^PRIMARY: .*\b(59|60|61) s {where}")
                desk.assert_sent(0, 0, 0)


class RefusalTest(BrowserCase):
    """The page or the broker says no: a sentence of its own, the right exit code, the old row kept."""

    def setUp(self) -> None:
        super().setUp()
        self.stack.enter_context(mock.patch.object(upstox_tokens, "EXCHANGE_SECONDS", 3))

    def test_refusals(self) -> None:
        self.side_by_side((self.stop_run, self.STOPPING), (self.go_on, self.GOING_ON), workers=3)

    def test_faults(self) -> None:
        with mock.patch.multiple(upstox_tokens, PAGE_SECONDS=10, OUTCOME_SECONDS=12):
            self.side_by_side((self.meet_fault, self.FAULTS), workers=4)

    def check(self, desk: Desk, done: Done, code: int, sentences: Sequence[str]) -> None:
        """A line of result for each app that failed, which keeps its old token; '' is an app that did not."""
        said = {match[1]: match[2] for match in re.finditer(r"(?m)^([A-Z]+[0-9]?): (.*)", done.out)}
        self.assertEqual(done.code, code, done.out + done.err)
        for name, sentence in zip(desk.names, sentences):
            self.assertRegex(said.get(name, ""), f"(?i){sentence}" if sentence else "^$", name + done.err)
            self.assertEqual(desk.tokens()[name] == desk.old[name], bool(sentence), name)
            tried = bool(sentence) and "not tried" not in sentence
            self.assertEqual((name, "FAILED") in desk.audit(), tried, name)

    # env, switches, exit code, what is said of PRIMARY (the run stops there), sent, logins are on hold then
    STOPPING = [
        ({}, {"mobile_answer": "1017016"}, 3, "mobile number.*UPSTOX_MOBILE_NUMBER", (1, 0, 0), False),
        ({}, {"mobile_answer": "1017069"}, 1, "limit.*10 minutes", (1, 0, 0), False),
        ({}, {"otp_answer": "1017071", "otp_autosubmit": 150}, 3, "TOTP.*UPSTOX_TOTP", (1, 2, 0), True),
        ({}, {"pin_answer": "1017090"}, 3, "locked.*Unlock", (1, 1, 1), True),
        ({"UPSTOX_PIN": "111222"}, {}, 3, "PIN.*UPSTOX_PIN", (1, 1, 1), True),
        # whatever is answered to a PIN that was never accepted: it is not sent again
        ({}, {"pin_answer": "1017007"}, 3, "session.*PIN", (1, 1, 1), True),
        ({}, {"pin_answer": "1017079"}, 3, "session.*PIN", (1, 1, 1), True),
        ({}, {"pin_answer": "dormant"}, 3, "dormant.*Reactivate", (1, 1, 1), True),
        ({}, {"pin_answer": "something_went_wrong"}, 3, "something went wrong.*PIN", (1, 1, 1), True),
        ({}, {"otp_answer": ["1017999", "1017076"]}, 3, "session", (1, 2, 0), True),
    ]

    def stop_run(self, case: tuple[Any, ...]) -> None:
        env, switches, code, sentence, sent, hold = case
        with Desk(2, env=env, **switches) as desk:
            desk.old = desk.seed_old()
            done = desk.call("--mode", "INVALID_ONLY", "--debug-dir", str(desk.folder / "debug"))
            self.check(desk, done, code, [sentence, "not tried.*PRIMARY"])
            desk.assert_sent(*sent)
            self.check_evidence(desk)
            if hold:
                self.check_hold(desk, sent)

    def check_evidence(self, desk: Desk) -> None:
        files = {path.suffix: path for path in (desk.folder / "debug").iterdir()}
        self.assertEqual(sorted(files), [".png", ".txt"])
        self.assertTrue(files[".png"].read_bytes().startswith(b"\x89PNG"))
        self.assertRegex(files[".txt"].read_text(), "Contact us|Enter your PAN")
        for path in files.values():
            desk.assert_no_secret(path.read_bytes().decode("latin-1"))
            self.assertEqual(path.stat().st_mode & 0o077, 0)

    def check_hold(self, desk: Desk, sent: tuple[int, int, int]) -> None:
        """Unattended runs refuse before they ask for the dialog."""
        before = desk.broker.count("dialog"), desk.browsers()
        for mode in (["ALL"], ["INVALID_ONLY"], ["PARTIAL", "--apis", "WEBSOCKET1"]):
            done = desk.call("--mode", *mode)
            after = desk.broker.count("dialog"), desk.browsers()
            self.assertEqual([done.code, after], [3, before], done.err)
            self.assertRegex(done.out, "(?m)^WEBSOCKET1: .*menu")
        desk.assert_sent(*sent)

    def test_end_of_hold(self) -> None:
        """An operator says yes in the menu, or what was refused is another one in the configuration."""
        with Desk(env={"UPSTOX_PIN": "111222"}) as desk:
            self.assertEqual(desk.call("--mode", "ALL").code, 3)
            self.assertEqual(desk.call(answers=["2", "n"]).code, 3)
            self.assertRegex(desk.prompts[-1], "PIN")
            desk.assert_sent(1, 1, 1)
            self.assertEqual(desk.call(answers=["2", "y"]).code, 3)
            desk.assert_sent(2, 2, 2)
            self.assertEqual(desk.call("--mode", "ALL").code, 3)
            desk.assert_sent(2, 2, 2)
            desk.set_skew(60)  # a login that may be tried fails at this, without a browser
            for change in ({"UPSTOX_MOBILE_NUMBER": "9812047366"}, {"UPSTOX_TOTP": TOTP_SECRET[::-1]}):
                desk.write_env(**{"UPSTOX_PIN": "111222"} | change)
                self.assertEqual(desk.call("--mode", "ALL").code, 1)
            desk.set_skew(0)
            desk.write_env()
            self.assertEqual(desk.call("--mode", "ALL").code, 0)
            desk.assert_sent(3, 3, 3)

    # switches, what is said of each app ('' for one that gets its token), sent
    GOING_ON: list[tuple[dict[str, Any], list[str], tuple[int, int, int]]] = [
        ({"otp_answer": ["1017076"]}, ["session", ""], (2, 2, 1)),
        ({"otp_limit": 1, "remember": False}, ["", "limit.*10 minutes", "not tried"], (2, 1, 1)),
        ({"create_pin": True}, ["new PIN", "new PIN"], (1, 1, 0)),
        ({"redirect_state": ["other", "missing"], "token_answer": ["401", "100069", "100073", "429"]},
         ["state", "state", "UDAPI100057", "secret.*UDAPI100069", "inactive", "too many"], (1, 1, 6)),
        ({"token_answer": ["500", "html", "empty", "truncated", "no_token", "hang"]},
         ["UDAPI100500", "answer", "answer", "answer", "answer", "timeout"], (1, 1, 6)),
        ({"dialog_answer": [""] * 5 + ["100068", "100073", "500", "429"]},
         ["client_id.*redirect_uri.*UDAPI100068", "inactive", "UDAPI100500", "UDAPI10005", ""], (1, 1, 1)),
    ]

    def go_on(self, case: tuple[dict[str, Any], list[str], tuple[int, int, int]]) -> None:
        switches, sentences, sent = case
        with Desk(len(sentences), **switches) as desk:
            desk.old = desk.seed_old()
            done = desk.call("--mode", "INVALID_ONLY")
            self.check(desk, done, 1, sentences)
            desk.assert_sent(*sent)

    # env, switches, exit code, what is said of each app, sent, browsers
    FAULTS: list[tuple[dict[str, str], dict[str, Any], int, list[str], tuple[int, int, int], int]] = [
        ({}, {"page": "blank"}, 1, ["blank|timeout"], (0, 0, 0), 2),
        ({}, {"dialog_answer": ["", "", "", "hang"]}, 0, ["", "", ""], (1, 1, 3), 2),
        # a page that nobody knows stops the run for all
        ({}, {"dialog_answer": ["", "", "", "", "html"]}, 3, ["", "does not know.*Service Unavailable", "not tried"],
         (1, 1, 1), 1),
        # a PIN that may have been wrong is not sent again for the next app
        ({}, {"mobile_answer": ["hang"], "otp_answer": ["reset"], "pin_answer": ["reset"]}, 3,
         ["did not go on", "connection", "connection.*PIN", "not tried"], (3, 2, 1), 1),
        ({"UPSTOX_PIN": "111222"}, {"pin_answer": "hang"}, 3, ["did not go on", "not tried", "not tried"],
         (1, 1, 1), 1),
    ]

    def meet_fault(self, case: tuple[Any, ...]) -> None:
        """Before a secret was typed once more with a fresh browser, after it never."""
        env, switches, code, sentences, sent, browsers = case
        with Desk(len(sentences), env=env, **switches) as desk:
            desk.old = desk.seed_old()
            done = desk.call("--mode", "INVALID_ONLY")
            desk.assert_sent(*sent)
            self.check(desk, done, code, sentences)
            self.assertGreaterEqual(desk.browsers(), browsers, done.err)

    def test_client_id_unknown(self) -> None:
        with Desk(dialog_answer="100068") as desk:
            desk.old = desk.seed_old()
            self.check(desk, desk.call("--mode", "ALL"), 1, ["client_id.*redirect_uri.*UDAPI100068"])
            self.assertEqual(desk.browsers(), 0)

    def test_browser_dies(self) -> None:
        """Before a secret was typed, and while the PIN is under way."""
        with Desk(3, page_delay=1, step_delay=1) as desk:
            def kill_twice() -> None:
                for condition in (lambda: desk.broker.count("page"), lambda: len(desk.broker.pins) == 2):
                    desk.until(condition)
                    os.kill(next(pid for pid, command in processes(self.temp).items()
                                 if "--user-data-dir" in command and "--type=" not in command
                                 and "chromedriver" not in command), signal.SIGKILL)

            desk.old = desk.seed_old()
            with meanwhile(kill_twice):
                done = desk.call("--mode", "ALL")
            self.check(desk, done, 1, ["", "browser.*PIN", "not tried"])
            desk.assert_sent(1, 1, 2)
            self.assertEqual(desk.browsers(), 2)


class Listener(socketserver.ThreadingTCPServer):
    """Somebody else's server on a loopback port, who remembers what reaches it."""

    daemon_threads = True

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        self.got: list[bytes] = []
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), None)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def finish_request(self, request: socket.socket, client_address: Any) -> None:
        self.got.append(request.recv(4096))

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class PrivacyTest(BrowserCase):
    """What nobody else gets to see."""

    def test_redirect_and_proxy(self) -> None:
        """The redirect reaches neither the server on its port nor a proxy, whatever the URI looks like."""
        with Listener() as proxy, Listener() as server, Listener(server.port, "::1") as server6, \
                Desk(6) as desk:
            port = server.port
            uris = [f"http://localhost:{port}/api/v1/auth/upstox/callback", f"https://localhost:{port}/cb",
                    f"http://127.0.0.1:{port}/cb?from=broker&x=%2F", "http://tokens.example.test/cb",
                    "https://Tokens.example.test", f"http://[::1]:{port}"]
            self.configure_by_database(desk, dict(zip(APPS, uris)))
            address = f"http://127.0.0.1:{proxy.port}"
            proxies = {f"{name}_proxy": address for name in ("http", "https", "all", "ftp")}
            proxies |= {name.upper(): address for name in proxies} | {"no_proxy": None, "NO_PROXY": None}
            done = desk.finish(desk.start("--mode", "ALL", env=proxies))
            self.assertEqual(done[:2], (0, ALL_VALID), done.err)
            self.assertEqual([row["redirect_uri"] for row in desk.rows()], uris)
            self.assertEqual([server.got, server6.got], [[], []])
            # the browser's own traffic may use the proxy, what belongs to the login may not
            ours = re.compile(rb"code=|localhost|127\.0|\[::1|example")
            self.assertEqual(list(filter(ours.search, proxy.got)), [])

    def configure_by_database(self, desk: Desk, uris: dict[str, str]) -> None:
        """Only there can every app have a redirect URI of its own."""
        self.assertEqual(desk.call("--import-config").code, 0)
        for name, uri in uris.items():
            desk.sql(f"UPDATE upstox_api_configs SET redirect_uri = '{uri}' WHERE api_name = '{name}'")
        desk.broker.switches.redirect_uris = uris
        desk.write_env(UPSTOX_CONFIG_SOURCE="DB", UPSTOX_REDIRECT_URI=None)

    def test_secrets(self) -> None:
        """By pipe through the menu, talkative; one app gets its token, for the next the PIN is refused."""
        with Desk(3, pin_answer=WRONG_PIN, only={"WEBSOCKET2"}, step_delay=0.3) as desk:
            desk.real_clock()
            desk.seed_old()
            commands: set[str] = set()
            program = desk.start("-v", "--debug-dir", "debug", stdin=subprocess.PIPE)

            def look_at_processes() -> None:
                while program.poll() is None:
                    commands.update(processes(self.temp).values())
                    time.sleep(0.05)

            with meanwhile(look_at_processes):
                done = desk.finish(program, "3\nNIFTY\n 3, primary, 1\n")
            self.assertEqual([done.code, desk.broker.logins], [3, ["PRIMARY"]], done.err)
            self.assertIn("[2/2] WEBSOCKET2: ", done.err)
            self.assertIn(str(desk.db), done.out)
            text = " ".join(commands)
            self.assertRegex(text, "chromedriver.*--user-data-dir|--user-data-dir.*chromedriver")
            desk.assert_no_secret(text)
            for path in (desk.folder / "debug").iterdir():
                desk.assert_no_secret(path.read_bytes().decode("latin-1"))
            self.assertEqual(len(list((desk.folder / "debug").iterdir())), 2)


@unittest.skipUnless(shutil.which("Xvfb"), "Xvfb is needed")
class HeadedTest(BrowserCase):
    """A CAPTCHA in front of an operator, in a visible browser on a display of the test's own."""

    def setUp(self) -> None:
        super().setUp()
        read, write = os.pipe()
        command = ["Xvfb", "-displayfd", str(write), "-screen", "0", "1280x960x24", "-nolisten", "tcp"]
        server = subprocess.Popen(command, pass_fds=[write], stderr=subprocess.DEVNULL)
        self.stack.callback(server.wait)
        self.stack.callback(server.terminate)
        os.close(write)
        with open(read) as answer:
            self.display = f":{answer.readline().strip()}"
        for name, value in {"CAPTCHA_SECONDS": 1, "CAPTCHA_HEADED_SECONDS": 40}.items():
            self.stack.enter_context(mock.patch.object(upstox_tokens, name, value))

    def operator(self, desk: Desk) -> None:
        """Sees the request on the terminal, and solves the CAPTCHA later than a headless run waits."""
        desk.until(lambda: re.search("solve the CAPTCHA", desk.err.getvalue()))
        desk.broker.pause(2)
        self.assertEqual(desk.broker.count("generate"), 0)
        desk.broker.solve_captcha()

    def test_operator_solves(self) -> None:
        with Desk(2, captcha="never") as desk:
            with meanwhile(lambda: self.operator(desk)):
                done = desk.call("--mode", "ALL", "--headed", DISPLAY=self.display)
            self.assertEqual([done.code, desk.browsers()], [0, 1], done.err)
            desk.assert_sent(1, 1, 2)

    def test_menu_reopens_visibly(self) -> None:
        """Not without a display, and not against the operator's will."""
        with Desk(2, captcha="never") as desk:
            self.assertEqual(desk.call(answers=["2", "y"]).code, 3)
            self.assertEqual([len(desk.prompts), desk.browsers()], [1, 1])
            with meanwhile(lambda: self.operator(desk)):
                done = desk.call(answers=["2", "y"], DISPLAY=self.display)
            self.assertEqual([done.code, desk.browsers()], [0, 3], done.err)
            desk.assert_sent(1, 1, 2)

    def test_nobody_solves(self) -> None:
        with mock.patch.object(upstox_tokens, "CAPTCHA_HEADED_SECONDS", 1), Desk(2, captcha="click") as desk:
            done = desk.call("--mode", "ALL", "--headed", DISPLAY=self.display)
            self.assertEqual(done.code, 3)
            self.assertRegex(done.out, "(?m)^PRIMARY: .*CAPTCHA")
            desk.assert_sent(0, 0, 0)


# ---- shared by the tests of the server

TOKENS = "/auth/upstox/tokens/"
STATUS, GENERATE, LATEST = TOKENS + "status", TOKENS + "generate", TOKENS + "jobs/latest"
KEY = "k3y-0f-the-server-2611"
ORIGIN = "https://desk.example.com"
HOOK = "/hook/Zr5tqB81x"
LIVE = ("RUNNING", "WAITING_FOR_OPERATOR")
TWO = ["WEBSOCKET2", "OPTIONCHAIN2"]
# the program with some of its limits shortened: the first argument names them
SHORTENED = """import json, sys, upstox_tokens
for name, value in json.loads(sys.argv.pop(1)).items():
    getattr(upstox_tokens, name)
    setattr(upstox_tokens, name, value)
sys.exit(upstox_tokens.main())"""


class Got(NamedTuple):
    """An HTTP answer."""

    code: int
    headers: http.client.HTTPMessage
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as place:
        return place.getsockname()[1]


def crowd(count: int, work: Callable[[int], Any]) -> list[Any]:
    """work(0), work(1) ... all at the same time."""
    start = threading.Barrier(count)

    def one(number: int) -> Any:
        start.wait(30)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


class ServeCase(Case):
    """A Case with a server in a process of its own; at the end it must still answer, and stop cleanly."""

    server: subprocess.Popen[str] | None = None
    address = ("127.0.0.1", 0)

    def tearDown(self) -> None:
        if self.server and self.server.poll() is None:
            self.assertEqual(self.ask(path="/healthz").json, {"status": "ok"})
            self.stop()

    def serve(self, *argv: str, at: str = "127.0.0.1:0", limits: dict[str, float] | None = None,
              **env: str | None) -> None:
        self.log = self.folder / "stderr.txt"
        program = {"program": "-c"} if limits else {}
        start = [SHORTENED, json.dumps(limits)] if limits else []
        env = {"PYTHONPATH": str(PROGRAM.parent)} | env if limits else env
        with self.log.open("w") as log:
            self.server = self.start(*start, "--serve", at, *argv, env=env, stderr=log, **program)
        self.until(lambda: self.log.read_text().endswith("\n") or self.server.poll() is not None, 60)
        found = re.match(r"Serving on http://(\S+):([0-9]+)/", self.log.read_text())
        self.server = self.server if found else None
        self.assertTrue(found, self.log.read_text())
        self.address = (found[1].strip("[]"), int(found[2]))

    def stop(self, number: int = signal.SIGTERM, expected: int = 143) -> str:
        """End the server; what it wrote to stderr."""
        self.server.send_signal(number)
        self.assertEqual(self.server.wait(40), expected)
        return self.written()

    def written(self) -> str:
        said = self.log.read_text()
        self.assertNotRegex(said, "Traceback|internal error")
        self.assert_no_secret(said)
        return said

    def assert_no_secret(self, text: str) -> None:
        super().assert_no_secret(text)
        self.assertNotIn(KEY, text)

    def check(self, got: Got) -> Got:
        """What holds for every answer."""
        self.assert_no_secret(f"{got.headers}{got.text}")
        self.assertNotIn("Traceback", got.text)
        if got.code >= 400:
            self.assertEqual((list(got.json), got.headers["Content-Type"]), (["error"], "application/json"))
            self.assertRegex(got.json["error"], r"\w")
        return got

    def ask(self, method: str = "GET", path: str = STATUS, body: Any = None, **headers: str | bytes) -> Got:
        """One request; a body that is not bytes is sent as JSON."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None and not isinstance(body, bytes):
            body, named = json.dumps(body).encode(), {"Content-Type": "application/json"} | named
        with contextlib.closing(http.client.HTTPConnection(*self.address, timeout=60)) as connection:
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            body = answer.read()
            if method != "HEAD" and answer.status != 204:
                self.assertEqual(answer.headers["Content-Length"], str(len(body)))
        return self.check(Got(answer.status, answer.headers, body.decode()))

    def post(self, body: Any, **headers: str) -> Got:
        return self.ask("POST", GENERATE, body, **headers)

    def raw(self, *parts: bytes, end: bool = True) -> Got | None:
        """Send these bytes; the answer, None when there was none. `end` says that no more will come."""
        with socket.create_connection(self.address, 60) as connection:
            with contextlib.suppress(OSError):  # answered before all was said
                for part in parts:
                    connection.sendall(part)
                if end:
                    connection.shutdown(socket.SHUT_WR)
            answer = http.client.HTTPResponse(connection)
            try:
                answer.begin()
            except (http.client.BadStatusLine, OSError):
                return None
            return self.check(Got(answer.status, answer.headers, answer.read().decode()))

    def job(self, name: str = "latest") -> dict[str, Any]:
        return self.ask(path=f"{TOKENS}jobs/{name}").json

    def ended(self, name: str = "latest", seconds: float = 90) -> dict[str, Any]:
        """The job, once it has ended."""
        self.until(lambda: self.job(name)["state"] not in LIVE, seconds)
        return self.job(name)

    def tokens(self) -> dict[str, str]:
        return {row["api_name"]: row["access_token"] for row in self.rows("api_name, access_token")}

    def audit(self) -> list[tuple[str, str, str, str]]:
        rows = self.rows(table="upstox_token_audit")
        self.assert_no_secret(str(rows))
        return [(row["api_name"], row["source"], row["flow"], row["outcome"]) for row in rows]


# ---- the table of the API


class ApiTest(ServeCase):
    def test_status(self) -> None:
        self.seed_guide()
        self.serve()
        before = self.snapshot()
        got = self.ask()
        self.assertEqual((got.code, got.headers["Content-Type"]), (200, "application/json"))
        self.assertIn("no-store", got.headers["Cache-Control"])
        report = got.json
        self.assertEqual(list(report), ["valid", "invalid", "missing", "unknown", "checkedAt", "hold", "tokens"])
        self.assertEqual(report["valid"], ["PRIMARY", "WEBSOCKET1", "OPTIONCHAIN1"])
        self.assertEqual(report["invalid"], ["WEBSOCKET2", "WEBSOCKET3"])  # the second one is EXPIRED
        self.assertEqual((report["missing"], report["unknown"]), (["OPTIONCHAIN2"], []))
        self.assertTrue(report["checkedAt"])
        stored = {row["api_name"]: (row["validity_at"], row["generated_at"]) for row in self.rows()}
        words = {name: ("VALID", "") for name in APPS} | {
            "WEBSOCKET2": ("INVALID", "401"), "WEBSOCKET3": ("EXPIRED", ""), "OPTIONCHAIN2": ("NOT FOUND",
            "")}
        self.assertEqual(report["tokens"], [
            dict(zip(("apiName", "status", "reason", "validityAt", "generatedAt"),
                     (name, *words[name], *stored.get(name, (None, None))))) for name in APPS])
        self.assertEqual(self.snapshot(), before)

    def test_status_of_what_the_broker_does_not_tell(self) -> None:
        self.seed_guide()
        self.broker.switches.profile_answer, self.broker.switches.only = "503", {"PRIMARY"}
        self.serve()
        report = self.ask().json
        self.assertEqual((report["unknown"], report["valid"]), (["PRIMARY"], ["WEBSOCKET1", "OPTIONCHAIN1"]))
        self.assertEqual((report["tokens"][0]["status"], report["tokens"][0]["reason"]), ("UNKNOWN", "503"))

    def test_status_is_shared(self) -> None:
        self.seed_valid()
        self.broker.switches.profile_delay = 0.3
        self.serve()
        answers = crowd(50, lambda _: self.ask())
        self.assertEqual({(got.code, got.text) for got in answers}, {(200, answers[0].text)})
        self.assertEqual(self.broker.count("profile"), 6)
        self.ask()
        self.assertEqual(self.broker.count("profile"), 6)  # younger than 5 s

    def test_status_is_not_shared_for_long(self) -> None:
        self.assertEqual(upstox_tokens.SHARED_SECONDS, 5)
        self.seed_valid()
        self.serve(limits={"SHARED_SECONDS": 0.05})
        self.until(lambda: self.ask().code == 200 and self.broker.count("profile") >= 18)

    def test_status_with_a_database_that_cannot_be_read(self) -> None:
        self.db.write_bytes(b"no database" * 100)
        self.serve()
        got = self.ask()
        self.assertGreaterEqual(got.code, 500)
        self.assertIn(str(self.db), got.json["error"])
        self.assertGreaterEqual(self.post({"mode": "ALL"}).code, 500)
        self.db.unlink()
        self.assertEqual(len(self.ask().json["missing"]), 6)

    def test_page_and_health(self) -> None:
        self.seed_valid()
        self.serve()
        self.assertEqual(self.ask(path="/healthz").json, {"status": "ok"})
        pages = [self.ask(path="/") for _ in range(2)]
        nonces = set()
        for page in pages:
            headers, policy = page.headers, dict(part.strip().partition(" ")[::2] for part in
                                                 page.headers["Content-Security-Policy"].split(";"))
            self.assertEqual((page.code, headers["Content-Type"]), (200, "text/html; charset=utf-8"))
            self.assertEqual((headers["X-Content-Type-Options"], headers["Referrer-Policy"]),
                             ("nosniff", "no-referrer"))
            self.assertEqual((policy["default-src"], policy["frame-ancestors"], policy["connect-src"]),
                             ("'none'", "'none'", "'self'"))
            nonce = re.fullmatch(r"'nonce-([\w-]{16,})'", policy["script-src"])[1]
            self.assertEqual(policy["style-src"], f"'nonce-{nonce}'")
            self.assertEqual(re.findall("<(?:script|style)[^>]*>", page.text),
                             [f'<style nonce="{nonce}">', f'<script nonce="{nonce}">'])
            outside = r"""(?:src|href|action)=["']?(?:https?:)?//|url\(|@import|\son\w+="""
            self.assertNotRegex(page.text, outside)
            nonces.add(nonce)
        self.assertEqual(len(nonces), 2)
        head = self.ask("HEAD", "/")
        self.assertEqual((head.code, head.text), (200, ""))

    def test_generate_and_jobs(self) -> None:
        """The broker knows none of the apps, so no browser is needed."""
        self.seed_guide()
        self.broker.switches.dialog_answer = "100068"
        before = self.tokens()
        self.serve()
        self.assertEqual(self.ask(path=LATEST).code, 404)
        bodies = {"ALL": ({"mode": "ALL"}, list(APPS)),
                  "INVALID_ONLY": ({"mode": "INVALID_ONLY", "flow": "SELENIUM"}, ["WEBSOCKET2", "WEBSOCKET3",
                                                                                  "OPTIONCHAIN2"]),
                  "PARTIAL": ({"mode": "PARTIAL", "apiNames": ["OPTIONCHAIN2", "PRIMARY", "PRIMARY"]},
                              ["PRIMARY", "OPTIONCHAIN2"])}
        ids = set()
        for what, (body, names) in bodies.items():
            with self.subTest(what):
                got = self.post(body, Content_Type="application/json; charset=utf-8")
                self.assertEqual((got.code, list(got.json)), (202, ["jobId", "state", "apiNames"]))
                self.assertEqual((got.json["state"], got.json["apiNames"]), ("RUNNING", names))
                self.assertEqual(got.headers["Location"], f"{TOKENS}jobs/{got.json['jobId']}")
                job = self.ended(got.json["jobId"])
                self.assertEqual(list(job), ["jobId", "state", "message", "results"])
                self.assertEqual((job["jobId"], job["state"]), (got.json["jobId"], "FAILED"))
                self.assertEqual([list(result) for result in job["results"]],
                                 [["apiName", "state", "message"]] * len(names))
                self.assertEqual([(result["apiName"], result["state"]) for result in job["results"]],
                                 [(name, "FAILED") for name in names])
                for result in job["results"]:
                    self.assertIn("UDAPI100068", result["message"])
                self.assertTrue(job["message"])
                self.assertEqual(self.job(), job)
                ids.add(job["jobId"])
        self.assertEqual([self.job(name)["jobId"] for name in ids], list(ids))
        self.assertEqual(self.tokens(), before)
        self.assertEqual(set(self.audit()), {(name, "REST", "SELENIUM", "FAILED") for name in APPS})

    def test_nothing_to_generate(self) -> None:
        self.seed_valid()
        self.serve()
        got = self.post({"mode": "INVALID_ONLY"})
        self.assertEqual((got.code, got.json["apiNames"]), (202, []))
        self.assertEqual((self.ended()["state"], self.broker.count("dialog")), ("DONE", 0))

    def test_unknown_is_left_alone_and_said_so(self) -> None:
        self.seed_valid(*list(APPS)[:5])
        self.broker.switches.profile_answer, self.broker.switches.only = "503", {"PRIMARY", "OPTIONCHAIN2"}
        self.broker.switches.dialog_answer = "100068"
        self.serve()
        self.assertEqual(self.post({"mode": "INVALID_ONLY"}).json["apiNames"], ["OPTIONCHAIN2"])
        self.assertIn("PRIMARY", self.ended()["message"])

    def test_one_run_at_a_time(self) -> None:
        self.seed_guide()
        self.broker.switches.dialog_delay = 60
        self.serve()
        self.assertEqual(self.post({"mode": "PARTIAL", "apiNames": TWO}).code, 202)
        self.until(lambda: self.broker.count("dialog") == 2)
        answers = [self.post({"mode": "ALL"}), *crowd(5, lambda _: self.post({"mode": "INVALID_ONLY"}))]
        self.assertEqual([got.code for got in answers], [409] * 6)
        self.assertEqual(self.call("--mode", "ALL")[0], 4)
        self.assertEqual([result["apiName"] for result in self.job()["results"]], TWO)
        self.assertEqual(len(self.ask().json["valid"]), 3)  # looking is free
        self.assertEqual(self.broker.count("dialog"), 2)
        self.server.kill()
        self.server.wait()

    def test_command_line_run_holds_the_lock(self) -> None:
        self.seed_guide()
        self.serve()
        self.broker.switches.dialog_delay = 60
        holder = self.start("--mode", "PARTIAL", "--apis", "PRIMARY")
        self.until(lambda: self.broker.count("dialog") == 1)
        self.assertEqual([self.post({"mode": mode}).code for mode in ("ALL", "INVALID_ONLY")], [409, 409])
        self.assertEqual(self.ask(path=LATEST).code, 404)
        holder.kill()
        holder.wait()
        self.broker.switches.dialog_delay, self.broker.switches.dialog_answer = 0, "100068"
        self.assertEqual(self.post({"mode": "ALL"}).code, 202)
        self.ended()

    def test_bad_requests(self) -> None:
        self.broker.switches.dialog_answer = "100068"  # what is taken by mistake shall not start a browser
        self.serve()
        nested = b'{"mode": ' + b"[" * 30000 + b"]" * 30000 + b"}"
        bodies = [b"", b"{", b"mode=ALL", b"\xff\xfe\xff", b"NaN", b'{"mode": "ALL"} x', nested, b"[" * 60000,
                  [], ["ALL"], "ALL", 7, None, True, {}]
        bodies += [{"mode": mode} for mode in (None, "SOME", ["ALL"], {"ALL": 1}, 1, "PARTIAL")]
        bodies += [{"mode": "ALL", "flow": flow} for flow in ("FAX", 3, ["V3"], None)]
        bodies += [{"mode": "PARTIAL", "apiNames": names} for names in (
            [], "PRIMARY", {"PRIMARY": 1}, [1], [["PRIMARY"]], ["PRIMARY", None], ["FOO"], ["PRIMARY", "FOO"],
            ["\ud800"], ["1"], ["PRIMARY", ""], ["PRIMARY,WEBSOCKET1"])]
        for body in bodies:
            with self.subTest(str(body)[:60]):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.assertEqual(self.post(data, Content_Type="application/json").code, 400)
        self.assertEqual((self.ask(path=LATEST).code, self.broker.hits), (404, []))

    def test_unconfigured_name_and_flow(self) -> None:
        self.write_env(**ONE_APP, **dict.fromkeys(LOGIN_KEYS))
        self.serve()
        got = self.post({"mode": "PARTIAL", "apiNames": ["WEBSOCKET1"]})
        self.assertEqual(got.code, 400)
        for flow, keys in (("SELENIUM", LOGIN_KEYS), ("V3", ["UPSTOX_NOTIFIER_WEBHOOK_URI"])):
            with self.subTest(flow):
                got = self.post({"mode": "ALL", "flow": flow})
                self.assertTrue(400 <= got.code < 500, got)
                for key in keys:
                    self.assertIn(key, got.json["error"])
        self.assertEqual((self.ask(path=LATEST).code, self.broker.hits), (404, []))

    def test_not_found(self) -> None:
        self.serve()
        tails = ("", "statusx", "status/", "STATUS", "jobs", "jobs/", "jobs/0123456789abcdef",
                 "jobs/../status",
                 "jobs/latest/x")
        for path in (*(TOKENS + tail for tail in tails), "/x", "/auth", "/index.html", "/.env",
                     "/vega_trade.db",
                     "/favicon.ico", "/healthz/", HOOK):
            with self.subTest(path):
                self.assertEqual(self.ask(path=path).code, 404)
        self.assertEqual(self.ask(path=STATUS + "?x=/../y").code, 200)

    def test_method_not_allowed(self) -> None:
        self.serve()
        gets = ("/", "/healthz", STATUS, LATEST)
        for method, path in [*itertools.product(("POST", "PUT", "DELETE", "PATCH", "TRACE", "OPTIONS"), gets),
                             *itertools.product(("GET", "HEAD", "PUT", "DELETE"), [GENERATE])]:
            with self.subTest(f"{method} {path}"), contextlib.closing(
                    http.client.HTTPConnection(*self.address, timeout=60)) as connection:
                connection.request(method, path)
                answer = connection.getresponse()
                self.assertEqual(answer.status, 405)
                self.assertIn("GET" if path in gets else "POST", answer.headers["Allow"].split(", "))
                self.assertNotIn(method.replace("OPTIONS", "-"), answer.headers["Allow"].split(", "))

    def test_size_and_type_of_the_body(self) -> None:
        self.serve()
        filler = len(json.dumps({"mode": "SOME", "x": ""}))
        for size, code in ((65536, 400), (65537, 413), (200000, 413)):
            with self.subTest(size):
                self.assertEqual(self.post({"mode": "SOME", "x": "y" * (size - filler)}).code, code)
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "",
                     "json", "text/plain; application/json", "application/jsonx"):
            with self.subTest(kind):
                self.assertEqual(self.post(b'{"mode": "ALL"}', Content_Type=kind).code, 415)
        self.assertEqual(self.ask("POST", GENERATE, b'{"mode": "ALL"}').code, 415)
        self.assertEqual(self.broker.hits, [])


class AccessTest(ServeCase):
    def test_host(self) -> None:
        self.seed_valid()
        self.serve()
        port = self.address[1]
        for host in ("127.0.0.1", "localhost", "LocalHost", "[::1]", "desk.localhost", "127.0.0.2"):
            for path in ("/", "/healthz", STATUS):
                with self.subTest(host, path=path):
                    self.assertEqual(self.ask(path=path, Host=f"{host}:{port}").code, 200)
        for host in ("desk.example.com", "desk.example.com:80", f"desk.example.com:{port}", "[::2]", "[",
                     "a b", "",
                     "localhost.example.com", "evil-localhost", "xlocalhost", "169.254.169.254", "10.0.0.1",
                     "127.0.0.1.example.com", f"127.0.0.1.example.com:{port}", "127.example.com",
                     "127.0.0.1.nip.io", "::1.example.com", f"example.com/@127.0.0.1:{port}"):
            for method, path in (("GET", "/"), ("GET", STATUS), ("GET", "/healthz"), ("POST", GENERATE)):
                with self.subTest(host, path=path):
                    self.assertEqual(self.ask(method, path, Host=host).code, 403)
        self.assertEqual(self.raw(b"GET / HTTP/1.0\r\n\r\n").code, 403)
        self.assertEqual(self.broker.count("dialog"), 0)

    def test_origin(self) -> None:
        self.seed_valid()
        self.write_env(UPSTOX_ALLOWED_ORIGINS=f"http://localhost:5173, {ORIGIN}/")
        self.serve()
        host = "{}:{}".format(*self.address)
        own, port = f"http://{host}", self.address[1]
        strange = ("null", "", "*", "https://example.com", "http://desk.example.com", ORIGIN + ":444",
                   ORIGIN + ".example.org", "https://" + host, "http://localhost:5174",
                   f"http://localhost:{port}",
                   "http://127.0.0.1")
        for origin in (own, ORIGIN, "http://localhost:5173", *strange):
            code = 403 if origin in strange else 200
            for path in (STATUS, "/healthz", "/"):
                with self.subTest(origin, path=path):
                    got = self.ask(path=path, Origin=origin)
                    listed = code == 200 and origin != own
                    self.assertEqual((got.code, got.headers["Access-Control-Allow-Origin"]),
                                     (code, origin if listed else None))
                    self.assertEqual("Origin" in (got.headers["Vary"] or ""), listed)
            with self.subTest(origin, path=GENERATE):
                self.assertEqual(self.post({"mode": "SOME"}, Origin=origin).code, 400 if code == 200 else 403)
        self.assertIsNone(self.ask().headers["Access-Control-Allow-Origin"])
        self.assertEqual(self.ask(path=LATEST, Origin=ORIGIN).headers["Access-Control-Allow-Origin"], ORIGIN)
        self.assertIn("Location", self.ask(Origin=ORIGIN).headers["Access-Control-Expose-Headers"])

    def test_preflight(self) -> None:
        self.write_env(UPSTOX_ALLOWED_ORIGINS=ORIGIN, UPSTOX_SERVE_KEY=KEY)
        self.serve()
        for path, method in ((STATUS, "GET"), (GENERATE, "POST"), (LATEST, "GET")):
            with self.subTest(path):
                ask = {"Access_Control_Request_Method": method,
                       "Access_Control_Request_Headers": "authorization,content-type"}
                got = self.ask("OPTIONS", path, Origin=ORIGIN, **ask)  # a browser sends no key with it
                self.assertIn(got.code, (200, 204))
                self.assertEqual(got.headers["Access-Control-Allow-Origin"], ORIGIN)
                self.assertIn(method, got.headers["Access-Control-Allow-Methods"])
                allowed = got.headers["Access-Control-Allow-Headers"].lower()
                self.assertTrue({"authorization", "content-type"} <= set(re.split(", *", allowed)))
                refused = self.ask("OPTIONS", path, Origin="https://example.com", **ask)
                self.assertEqual((refused.code, refused.headers["Access-Control-Allow-Origin"]), (403, None))
        refused = self.ask(Origin=ORIGIN)  # the page must be able to read why
        self.assertEqual((refused.code, refused.headers["Access-Control-Allow-Origin"]), (401, ORIGIN))

    def test_key(self) -> None:
        self.seed_valid()
        self.write_env(UPSTOX_SERVE_KEY=KEY)
        self.serve()
        for given in (None, "", "Bearer", "Bearer ", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}",
                      f"Basic {KEY}",
                      f"Bearer {KEY.upper()}", f"Bearer {KEY} {KEY}", "Bearer k\xe9y",
                      b"Bearer \xd0\xba\xd0\xff",
                      "Bearer " + "x" * 60000):
            headers = {} if given is None else {"Authorization": given}
            for method, path in (("GET", STATUS), ("POST", GENERATE), ("GET", LATEST)):
                with self.subTest(str(given)[:40], path=path):
                    got = self.ask(method, path, {"mode": "ALL"} if method == "POST" else None, **headers)
                    self.assertEqual(got.code, 401)
                    self.assertRegex(got.headers["WWW-Authenticate"], "^Bearer")
        self.assertEqual(self.broker.hits, [])
        self.assertEqual([self.ask(path=path).code for path in ("/", "/healthz")], [200, 200])
        for method, path in (("GET", TOKENS + "x"), ("GET", "/auth/x"), ("DELETE", STATUS)):
            with self.subTest(f"{method} {path}"):
                self.assertEqual(self.ask(method, path).code, 401)
        right = {"Authorization": f"Bearer {KEY}"}
        self.assertEqual((self.ask(**right).code, self.post({"mode": "SOME"}, **right).code,
                          self.ask(path=LATEST, **right).code), (200, 400, 404))

    def test_beyond_loopback(self) -> None:
        self.seed_valid()
        for address in ("0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.com:0"):
            with self.subTest(address):
                code, out, err = self.process("--serve", address)
                self.assertEqual((code, out, len(err.splitlines())), (2, "", 1), err)
                self.assertIn("UPSTOX_SERVE_KEY", err)
        self.serve(at="0.0.0.0:0", UPSTOX_SERVE_KEY=KEY)
        self.address = ("127.0.0.1", self.address[1])
        self.assertEqual(self.ask().code, 401)
        self.assertEqual(self.ask(Authorization=f"Bearer {KEY}").code, 200)
        self.assertEqual(self.ask(Host="desk.example.com", Authorization=f"Bearer {KEY}").code, 403)


# ---- hostile requests


class HostileTest(ServeCase):
    def head(self, method: str, path: str, *headers: str) -> bytes:
        lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{self.address[1]}", *headers, "", ""]
        return "\r\n".join(lines).encode("latin-1")

    def test_length_of_the_body(self) -> None:
        self.serve()
        body, kind = b'{"mode": "SOME"}', "Content-Type: application/json"
        chunked = b"10\r\n" + body + b"\r\n0\r\n\r\n"
        table = [(f"Content-Length: {number}", [f"Content-Length: {number}"], body, (400,)) for number in (
            -1, "ten", "0x10", "+16", "\xb2", "1_6", "16, 3", 60000)]
        table += [("none", [], body, (400, 411)), ("huge", ["Content-Length: 99999999999999999"], body,
                  (413,)),
                  ("beyond numbers", ["Content-Length: " + "9" * 400], body, (400, 413)),
                  ("two", ["Content-Length: 16", "Content-Length: 3"], body, (400,)),
                  ("chunked", ["Transfer-Encoding: chunked"], chunked, (400, 411, 501)),
                  ("both", ["Transfer-Encoding: chunked", "Content-Length: 16"], chunked, (400, 411, 501)),
                  ("10 MB", ["Content-Length: 10485760"], b"x" * 10485760, (413,)),
                  ("true", ["Content-Length: 16"], body, (400,))]
        for what, headers, sent, codes in table:
            with self.subTest(what):
                began = time.monotonic()
                self.assertIn(self.raw(self.head("POST", GENERATE, kind, *headers), sent).code, codes)
                self.assertLess(time.monotonic() - began, 8)
        self.assertEqual(self.ask(path=LATEST).code, 404)

    def test_paths(self) -> None:
        self.serve()
        host = "{}:{}".format(*self.address)
        for path in ("//", "//healthz", "/.//healthz", "/x/../healthz", "/../../etc/passwd",
                     "/%2e%2e/healthz",
                     "/%00", "/healthz%00", "/healthz\0", "/%68ealthz", "/healthz;x", "/healthz#x",
                     "\\healthz",
                     "healthz", "*", "/\xe9", "/" + "x" * 60000, "/healthz/..", f"http://{host}/healthz",
                     "http://example.com/", f"//{host}/healthz"):
            with self.subTest(path[:60]):
                self.assertIn(self.raw(self.head("GET", path)).code, (400, 403, 404))
        self.assertEqual(self.raw(self.head("GET", "/healthz?" + "x" * 60000)).code, 200)

    def test_request_lines_and_headers(self) -> None:
        self.serve()
        host = f"Host: 127.0.0.1:{self.address[1]}\r\n\r\n".encode()
        flood = [f"X-{number}: {'x' * 500}" for number in range(5000)]
        lines = {b"BREW / HTTP/1.1": (405, 501), b"get / HTTP/1.1": (405, 501),
                 b"__init__ / HTTP/1.1": (405, 501),
                 b"CONNECT example.com:443 HTTP/1.1": (400, 403, 404, 405),
                 b"GET\t/healthz\tHTTP/1.1": (200, 400),
                 b"GET  /healthz  HTTP/1.1": (200, 400, 404), b"GET / HTTP/9.9": (400, 505),
                 b"GET / FTP/1.0": (400,), b"GET / x HTTP/1.1": (400,), b"GET": (400,), b"POST /": (400,),
                 b"\0\xff\x16\x03\x01": (400,), b"GET /" + b"x" * 100000 + b" HTTP/1.1": (400, 414)}
        table = {line + b"\r\n" + host: codes for line, codes in lines.items()}
        table |= {self.head("GET", "/", *flood): (400, 431),
                  self.head("GET", "/", "X: " + "x" * 100000): (400, 431),
                  self.head("GET", "/healthz", "no colon"): (200, 400),
                  self.head("GET", "/healthz", "Expect: 100-continue"): (200,)}
        for sent, codes in table.items():
            with self.subTest(sent[:50]):
                got = self.raw(sent)
                self.assertTrue(got, "no answer")
                self.assertIn(got.code, codes)
                if got.code == 405:
                    self.assertTrue(got.headers["Allow"])
        for sent in (b"", b"\r\n", b"GET /healthz\r\n\r\n", b"GET / HTTP/1.1\r\n", b"\xff" * 100):
            with self.subTest(sent), socket.create_connection(self.address, 60) as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

    def test_idle_connections(self) -> None:
        self.seed_valid()
        self.serve()
        with contextlib.ExitStack() as stack:
            for number in range(200):
                connection = stack.enter_context(socket.create_connection(self.address, 30))
                connection.sendall((b"", b"G", self.head("GET", "/")[:-1])[number % 3])
            for path in (STATUS, "/healthz", "/"):
                began = time.monotonic()
                self.assertEqual(self.ask(path=path).code, 200)
                self.assertLess(time.monotonic() - began, 2)
            self.stop()  # nor do they keep it from ending

    def test_reader_of_a_byte_a_second(self) -> None:
        self.seed_valid()
        self.serve()
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                connection = stack.enter_context(socket.socket())
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                connection.connect(self.address)
                connection.sendall(self.head("GET", "/"))
                connection.recv(1)
            began = time.monotonic()
            self.assertEqual(self.ask().code, 200)
            self.assertLess(time.monotonic() - began, 2)


# ---- the process


class ServerProcessTest(ServeCase):
    def test_ends_cleanly(self) -> None:
        self.seed_valid()
        for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
            with self.subTest(number):
                self.serve()
                self.ask()
                began = time.monotonic()
                self.stop(number, code)
                self.assertLess(time.monotonic() - began, 5)
                with self.assertRaises(ConnectionRefusedError):
                    socket.create_connection(self.address, 5)

    def test_ends_while_a_check_hangs(self) -> None:
        self.seed_valid()
        self.broker.switches.profile_answer = "hang"
        self.serve()
        with socket.create_connection(self.address) as connection:
            connection.sendall(f"GET {STATUS} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            self.until(lambda: self.broker.count("profile") == 6)
            began = time.monotonic()
            self.stop()
            self.assertLess(time.monotonic() - began, 5)

    def test_address_that_cannot_be_used(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            addresses = [f"127.0.0.1:{port}", f"localhost:{port}", "nonsense", "127.0.0.1", "127.0.0.1:",
                         "127.0.0.1:x", "127.0.0.1:65536", "127.0.0.1:-1", "http://127.0.0.1:0",
                         "127.0.0.1:0:0",
                         ""]
            started = [(address, self.start("--serve", address)) for address in addresses]
            for address, process in started:
                with self.subTest(address):
                    try:
                        out, err = process.communicate("", timeout=20)
                    except subprocess.TimeoutExpired:
                        process.kill()
                        self.fail("it serves")
                    self.assertEqual((process.returncode, out, len(err.splitlines())), (2, "", 1), err)
                    self.assertNotIn("Traceback", err)
        self.assertFalse(self.db.exists())

    def test_starts_without_login_and_third_parties(self) -> None:
        self.write_env(**dict.fromkeys(LOGIN_KEYS))
        blocked = self.folder / "blocked"
        for name in ("selenium", "pyotp"):
            (blocked / name).mkdir(parents=True)
            (blocked / name / "__init__.py").write_text("raise SystemExit('imported')")
        self.serve(PYTHONPATH=str(blocked))
        self.assertEqual(len(self.ask().json["missing"]), 6)
        self.assertFalse(self.db.exists())

    def test_six_and_one(self) -> None:
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            self.skipTest("no IPv6 here")
        self.write_env(**ONE_APP)
        self.serve(at="[::1]:0")
        self.assertEqual(self.ask().json["missing"], ["PRIMARY"])

    def test_log_of_requests(self) -> None:
        self.write_env(UPSTOX_SERVE_KEY=KEY)
        self.serve("-v")
        lines = f"GET /x\x7f\x1b[2J?{KEY} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEY}", "", ""
        self.raw("\r\n".join(lines).encode())
        self.ask(Authorization=f"Bearer {KEY}")
        self.until(lambda: STATUS in self.log.read_text())
        said = self.stop()
        self.assertEqual(len(said.splitlines()), 4, said)  # Serving, two requests, stopped
        self.assertNotRegex(said, r"[\x1b\x7f]")

    def test_nobody_reads_the_log(self) -> None:
        self.seed_valid()
        self.broker.switches.notifier_url = f"http://127.0.0.1:{free_port()}{HOOK}"
        self.write_env()
        port = self.broker.switches.notifier_url.split(":")[2].split("/")[0]
        server = self.start("--serve", f"127.0.0.1:{port}")
        self.assertIn("Serving", server.stderr.readline())
        server.stderr.close()
        self.address = ("127.0.0.1", int(port))
        self.assertEqual(self.post({"mode": "PARTIAL", "apiNames": TWO, "flow": "V3"}).code, 202)
        for name in TWO:
            before = self.tokens()[name]
            self.broker.approve(name)
            self.until(lambda: self.tokens()[name] != before)
        self.assertEqual(self.ended()["state"], "DONE")


def left_behind(folder: Path) -> list[str]:
    """Command lines of processes that name the folder, in their arguments or environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            texts = [(entry / name).read_bytes() for name in ("cmdline", "environ")]
            if texts[0] and any(bytes(folder) in text for text in texts):
                found.append(texts[0].replace(b"\0", b" ").decode(errors="replace"))
    return found


@unittest.skipIf(missing_for_browser(), missing_for_browser())
class BrowserJobTest(ServeCase):
    def setUp(self) -> None:
        super().setUp()
        self.temp = self.folder / "tmp"
        self.temp.mkdir()

    def serve(self, *argv: str, **env: Any) -> None:
        super().serve(*argv, TMPDIR=str(self.temp), **env)

    def assert_clean(self) -> None:
        self.assertEqual((left_behind(self.temp), list(self.temp.glob("upstox*"))), ([], []))

    def watch(self, job_id: str) -> list[dict[str, tuple[str, str]]]:
        """Every different picture that the job gives until it ends: api name: (state, message)."""
        seen: list[dict[str, tuple[str, str]]] = []

        def ended() -> bool:
            job = self.job(job_id)
            picture = {result["apiName"]: (result["state"], result["message"]) for result in job["results"]}
            seen.extend([picture] * (picture not in seen))
            return job["state"] not in LIVE

        self.until(ended, 120)
        return seen

    def test_two_tokens_then_sigterm_in_the_next_job(self) -> None:
        self.seed_guide()
        self.broker.switches.step_delay = 0.15
        self.serve(limits={"SHARED_SECONDS": 600})
        self.assertEqual(self.ask().json["missing"], ["OPTIONCHAIN2"])
        job_id = self.post({"mode": "PARTIAL", "apiNames": TWO}).json["jobId"]
        self.until(lambda: self.broker.count("page"), 60)
        self.assertEqual(self.post({"mode": "ALL"}).code, 409)
        self.assertEqual(self.call("--mode", "INVALID_ONLY")[0], 4)
        seen = self.watch(job_id)
        states = [tuple(state for state, _ in picture.values()) for picture in seen]
        for pair in (("RUNNING", "PENDING"), ("DONE", "RUNNING"), ("DONE", "DONE")):
            self.assertIn(pair, states)
        self.assertGreaterEqual(len({message for picture in seen for _, message in picture.values()}), 4)
        self.assertEqual(self.job(job_id)["state"], "DONE")
        self.assertTrue(set(TWO) <= set(self.ask().json["valid"]))  # no check from before the job
        self.assertTrue(all(self.broker.tokens[self.tokens()[name]].live for name in TWO))
        ended = [row for row in self.audit() if row[3] == "GENERATED"]
        self.assertEqual(ended, [(name, "REST", "SELENIUM", "GENERATED") for name in TWO])
        self.finish_current_app()

    def finish_current_app(self) -> None:
        """SIGTERM: the app at hand is finished, the next is not begun."""
        before = self.tokens()
        names = ["PRIMARY", "WEBSOCKET1", "OPTIONCHAIN1"]
        self.broker.switches.redirect_delay = 0.5
        job_id = self.post({"mode": "PARTIAL", "apiNames": names}).json["jobId"]
        self.until(lambda: self.broker.count("hop") == 4, 90)  # the second app of this job
        self.assertEqual(self.job(job_id)["results"][0]["state"], "DONE")
        self.stop()
        changed = [name for name in APPS if self.tokens()[name] != before[name]]
        self.assertEqual(changed, names[:2])
        self.assertTrue(all(self.broker.tokens[self.tokens()[name]].live for name in names[:2]))
        self.assert_clean()

    def test_hold_after_a_refused_pin(self) -> None:
        self.write_env(**ONE_APP, UPSTOX_PIN="111222")
        self.seed_guide()
        self.serve()
        self.post({"mode": "ALL"})
        first = self.ended()
        self.assertEqual((first["state"], first["results"][0]["state"]), ("FAILED", "FAILED"))
        self.assertRegex(first["results"][0]["message"], "PIN")
        logins = self.logins()
        got = self.post({"mode": "ALL"})
        text = json.dumps(self.ended() if got.code == 202 else got.json)
        self.assertRegex(text, "PIN.*until.*configuration changes")
        self.assertEqual(self.job()["state"], "FAILED")
        self.assertEqual(self.call("--mode", "ALL")[0], 3)
        self.assertEqual((self.logins(), self.broker.pins), (logins, ["111222"]))
        self.stop(signal.SIGINT, 130)
        self.assert_clean()


# ---- approval on the phone


class PhoneCase(ServeCase):
    """A notifier at a free port of this machine, and no credentials in the configuration."""

    def setUp(self) -> None:
        super().setUp()
        self.port = free_port()
        self.at = f"127.0.0.1:{self.port}"
        self.hook = f"http://{self.at}{HOOK}"
        self.broker.switches.notifier_url = self.hook
        self.write_env()

    def write_env(self, text: str | bytes | None = None, **changes: str | None) -> Path:
        return super().write_env(text, **dict.fromkeys(LOGIN_KEYS) | changes)

    def run_v3(self, mode: str = "ALL", *argv: str, **env: str | None) -> tuple[int, str, str]:
        """A run that listens by itself, in this process."""
        return self.call("--mode", mode, "--flow", "V3", "--serve", self.at, *argv, **env)

    def serve(self, *argv: str, **options: Any) -> None:
        super().serve(*argv, **{"at": self.at} | options)

    def request(self, *names: str) -> str:
        """A REST job of flow V3 for these apps (default all), once the broker was asked; its id."""
        body = {"mode": "PARTIAL", "apiNames": names} if names else {"mode": "ALL"}
        got = self.post(body | {"flow": "V3"})
        self.assertEqual(got.code, 202, got.text)
        self.until(lambda: all(result["state"] in ("DONE", "FAILED") or "approval" in result["message"]
                               for result in self.job()["results"]))
        return got.json["jobId"]

    def stored(self, name: str, token: str) -> bool:
        return self.tokens().get(name) == token

    def deliver(self, name: str, **changes: Any) -> str:
        """A true delivery; its token, once that is stored."""
        body = self.broker.delivery(name, **changes)
        self.assertEqual(self.broker.deliver(body), 200)
        self.until(lambda: self.stored(name, body["access_token"]))
        return body["access_token"]


class PhoneRunTest(PhoneCase):
    def test_six_in_any_order(self) -> None:
        self.seed_guide()
        before = self.tokens()
        self.broker.switches.approve_after = dict(zip(APPS, (0.5, 0, 0.2, 0.1, 0.4, 0)))
        code, out, err = self.run_v3()
        self.assertEqual(code, 0, err)
        self.assertIn("Valid Tokens    : 6", out)
        self.assertNotIn("warning", err)
        self.assertCountEqual(self.broker.details("v3"), APPS)
        self.assertFalse(set(self.tokens().values()) & set(before.values()))
        for name, token in self.tokens().items():
            self.assertEqual((self.broker.tokens[token].app, self.broker.tokens[token].live), (name, True))
        self.assertEqual(self.logins(), 0)
        self.assertCountEqual([row for row in self.audit() if row[3] == "GENERATED"],
                              [(name, "WEBHOOK", "V3", "GENERATED") for name in APPS])

    def test_columns_of_a_row(self) -> None:
        self.write_env(**ONE_APP)
        self.serve()
        self.request("PRIMARY")
        began, expiry = int(time.time() * 1000), int(time.time()) + 5000
        token = self.deliver("PRIMARY", expires_at=str(expiry * 1000))
        row, = self.rows()
        self.assertTrue(began <= row["created_at"] <= time.time() * 1000)
        self.assertTrue(4900 < row["expires_in"] <= 5000)
        left = {key: row[key] for key in row if key not in ("id", "created_at", "expires_in")}
        self.assertEqual(
            {key: value for key, value in left.items() if value is not None},
            {"access_token": token, "api_name": "PRIMARY", "client_id": APPS["PRIMARY"][0], "is_primary": 1,
             "client_secret": APPS["PRIMARY"][1], "redirect_uri": REDIRECT_URI, "token_type": "Bearer",
             "api_index": 0, "generated_at": local_text(row["created_at"] / 1000), "is_active": 1,
             "updated_at": row["created_at"], "validity_at": local_text(expiry)})

    def test_missing_deliveries(self) -> None:
        self.seed_guide()
        before = self.tokens()
        self.broker.switches.approve_after = dict.fromkeys(TWO, 0.1)
        code, out, err = self.run_v3("ALL", "--wait", "0.03")
        self.assertEqual(code, 1)
        for name in APPS:
            with self.subTest(name):
                self.assertEqual(bool(re.search(rf"^{name}: failed: .*in time", out, re.M)), name not in TWO)
                self.assertEqual(self.tokens()[name] == before.get(name), name not in TWO)

    def test_partial_and_menu(self) -> None:
        self.broker.switches.approve_after = 0
        self.assertEqual(self.run_v3("PARTIAL", "--apis", ",".join(TWO))[0], 0)
        self.assertCountEqual(self.tokens(), TWO)
        self.serve()
        code, out, _ = self.call("--flow", "V3", "--wait", "1", answers=["3", "PRIMARY"])
        self.assertEqual((code, out.count(": VALID\n")), (0, 2 + 3))
        self.assertIn(("PRIMARY", "MENU", "V3", "REQUESTED"), self.audit())

    def test_listening_run_serves_nothing_else(self) -> None:
        self.seed_valid()
        run = self.start("--mode", "ALL", "--flow", "V3", "--serve", self.at)
        self.address = ("127.0.0.1", self.port)
        self.until(lambda: self.broker.count("v3") == 6)
        for method, path in (("GET", "/"), ("GET", STATUS), ("POST", GENERATE), ("POST", HOOK + "/")):
            with self.subTest(path):
                self.assertEqual(self.ask(method, path, {} if method == "POST" else None).code, 404)
        for name in APPS:
            self.broker.approve(name)
        self.assertEqual(self.finish(run, "")[0], 0)

    def test_stopped_while_waiting(self) -> None:
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            with self.subTest(number):
                self.broker.counts.clear()
                run = self.start("--mode", "ALL", "--flow", "V3", "--serve", self.at)
                self.until(lambda: self.broker.count("v3") == 6)
                token = self.deliver("WEBSOCKET3")
                began = time.monotonic()
                run.send_signal(number)
                self.assertEqual(self.finish(run)[0], code)
                self.assertLess(time.monotonic() - began, 5)
                self.assertTrue(self.stored("WEBSOCKET3", token))

    def test_notifier_is_needed(self) -> None:
        self.write_env(UPSTOX_NOTIFIER_WEBHOOK_URI=None)
        self.assert_refused("UPSTOX_NOTIFIER_WEBHOOK_URI", argv=["--mode", "ALL", "--flow", "V3"])

    def test_address_that_cannot_be_used(self) -> None:
        """A run that cannot listen and says so only after the requests would wait in vain."""
        for address in ("nonsense", "127.0.0.1:99999", f"0.0.0.0:{self.port}"):
            with self.subTest(address):
                argv = ["--mode", "ALL", "--flow", "V3", "--wait", "0.01", "--serve", address]
                code, _, err = self.call(*argv)
                self.assertEqual((code, self.broker.count("v3")), (2, 0), err)

    def test_other_notifier(self) -> None:
        self.broker.switches.notifier_shown = "https://other.example.com/hook"
        self.broker.switches.approve_after = 0
        code, _, err = self.run_v3("PARTIAL", "--apis", "PRIMARY")
        self.assertEqual(code, 0)
        self.assertRegex(err, "(?i)warning.*https://other.example.com/hook.*UPSTOX_NOTIFIER_WEBHOOK_URI")

    def test_refusals(self) -> None:
        words = {"UDAPI1123": "Notifier Webhook Endpoint", "UDAPI1124": "individual", "UDAPI1155": "review",
                 "UDAPI1157": "expired", "UDAPI100069": "client_secret", "429": "minutes"}
        words |= dict.fromkeys(("500", "html", "empty", "reset"), "status.upstox.com")
        for answer, word in words.items():
            with self.subTest(answer):
                self.broker.switches.v3_answer = answer
                code, out, _ = self.run_v3("PARTIAL", "--apis", "PRIMARY")
                self.assertEqual(code, 1)
                line = re.search("^PRIMARY: failed: (.*)$", out, re.M)[1]
                self.assertIn(word, line)
                if answer.startswith("UDAPI"):
                    self.assertIn(answer, line)
                self.assertRegex(line, r"\. [A-Z].*\.$")  # what to do next
        self.assertEqual(self.tokens(), {})
        self.assertEqual({row[3] for row in self.audit()} - {"REQUESTED"}, {"FAILED"})

    def test_one_refusal_stops_nobody_else(self) -> None:
        self.broker.switches.v3_answer, self.broker.switches.only = "UDAPI1157", {"PRIMARY"}
        self.broker.switches.approve_after = 0
        code, out, _ = self.run_v3()
        self.assertEqual((code, sorted(self.tokens())), (1, sorted(set(APPS) - {"PRIMARY"})))
        self.assertRegex(out, "PRIMARY: failed: .*UDAPI1157")


class PhoneServerTest(PhoneCase):
    def test_rest_job(self) -> None:
        self.seed_guide()
        self.serve()
        got = self.post({"mode": "INVALID_ONLY", "flow": "V3"})
        names = ["WEBSOCKET2", "WEBSOCKET3", "OPTIONCHAIN2"]
        self.assertEqual((got.code, got.json["apiNames"]), (202, names))
        waiting = re.compile(r"waiting for approval on the phone until \d\d:\d\d$")
        self.until(lambda: all(waiting.search(result["message"]) for result in self.job()["results"]))
        self.assertEqual({result["state"] for result in self.job()["results"]}, {"RUNNING"})
        self.assertEqual((self.post({"mode": "ALL", "flow": "V3"}).code, self.run_v3()[0]), (409, 4))
        self.assertEqual(self.ask().json["missing"], ["OPTIONCHAIN2"])
        for name in reversed(names):
            self.deliver(name)
        job = self.ended()
        self.assertEqual((job["state"], {result["state"] for result in job["results"]}), ("DONE", {"DONE"}))
        self.assertEqual(len(self.ask().json["valid"]), 6)
        self.assertEqual(self.call("--status")[0], 0)
        rows = self.audit()
        self.assertCountEqual([row for row in rows if row[3] == "GENERATED"],
                              [(name, "WEBHOOK", "V3", "GENERATED") for name in names])
        self.assertEqual({row[1] for row in rows}, {"REST", "WEBHOOK"})

    def test_command_line_run_beside_the_server(self) -> None:
        self.seed_guide()
        self.serve()
        self.ask()
        self.broker.switches.approve_after = dict(zip(APPS, (0.4, 0.3, 0.2, 0.1, 0, 0)))
        code, out, err = self.run_v3()
        self.assertEqual((code, len(self.tokens())), (0, 6), err)
        self.assertEqual(len(self.ask().json["valid"]), 6)
        self.assertEqual({row[1] for row in self.audit()}, {"CLI", "WEBHOOK"})

    def test_approved_after_the_run_has_given_up(self) -> None:
        self.serve()
        self.assertEqual(self.run_v3("PARTIAL", "--apis", "PRIMARY", "--wait", "0.005")[0], 1)
        self.deliver("PRIMARY")
        self.assertEqual(self.ask().json["valid"], ["PRIMARY"])

    def test_differing_notifier_is_told(self) -> None:
        self.broker.switches.notifier_shown = "https://other.example.com/hook"
        self.serve("--wait", "0.02")
        self.request("PRIMARY")
        self.assertRegex(json.dumps(self.job()) + self.written(), "other.example.com")

    def test_refusal_is_told(self) -> None:
        self.broker.switches.v3_answer = "UDAPI1124"
        self.serve()
        self.request("PRIMARY", "WEBSOCKET1")
        job = self.ended()
        self.assertEqual(job["state"], "FAILED")
        for result in job["results"]:
            self.assertEqual(result["state"], "FAILED")
            self.assertRegex(result["message"], "individual.*UDAPI1124")

    def test_sigterm_while_a_job_waits(self) -> None:
        self.serve()
        self.request()
        token = self.deliver("OPTIONCHAIN1")
        began = time.monotonic()
        self.stop()
        self.assertLess(time.monotonic() - began, 5)
        self.assertEqual(self.tokens(), {"OPTIONCHAIN1": token})

    @unittest.skipUnless(sys.platform == "linux", "reads /proc")
    def test_waiting_takes_no_processor_time(self) -> None:
        self.serve(limits=None)
        self.request()
        self.broker.deliver(self.broker.delivery("PRIMARY", access_token=new_token(USER_ID)))
        self.until(lambda: self.broker.count("profile"))

        def used() -> float:
            fields = Path(f"/proc/{self.server.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        began, before = time.monotonic(), used()
        self.until(lambda: time.monotonic() - began > 3)
        self.assertLess(used() - before, 0.09 + 0.02)  # 0.3 s in 10 s, and the clock's grain


class StrangerTest(PhoneCase):
    switches = {"one_token_per_app": False}  # every token here stays alive unless a test ends it

    def strangers(self) -> Iterator[tuple[str, Any]]:
        """Bodies that must change nothing though PRIMARY is awaited; nearly all hold a token that works."""
        true, now = self.broker.delivery("PRIMARY"), int(time.time() * 1000)
        yield "unknown client_id", true | {"client_id": "5b0c7d1e-93a4-4f1c-8a57-1f60c2a9d399"}
        yield "nothing outstanding", self.broker.delivery("OPTIONCHAIN1")
        yield "token of nobody", true | {"access_token": new_token(USER_ID)}
        other = self.broker.issue("PRIMARY", "9QXB77")
        yield "another user", true | {"user_id": "9QXB77", "access_token": other}
        yield "another user's name", true | {"user_id": "9QXB77"}
        yield "another user's token", true | {"access_token": other}
        for name in true:
            if name == "issued_at":
                continue  # nothing depends on it
            yield f"no {name}", {key: value for key, value in true.items() if key != name}
            for wrong in (None, 7, True, "", [true[name]], {"x": true[name]}, true[name] + "\nX: y",
            "\ud800"):
                yield f"{name} = {wrong!r}", true | {name: wrong}
        for name in ("expires_at",):
            yield f"{name} in words", true | {name: "2026-11-24T03:30:00"}
        for expiry in (now - 1000, now + 30 * 86400000, 0, -now, now // 1000, 10 ** 30):
            yield f"expires_at {expiry}", true | {"expires_at": str(expiry)}
        yield "message_type", true | {"message_type": "order_update"}
        yield "token_type", true | {"token_type": "Basic"}
        yield "long user_id", true | {"user_id": "x" * 5000}
        for body in ([true], json.dumps(true), 7, b"", b"<html>", b"[" * 60000, b"\xff\xfe\0\1" * 99,
                     json.dumps(true).encode()[:-2]):
            yield str(body)[:20], body

    def post_hook(self, body: Any) -> tuple[int, str]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        began = time.monotonic()
        got = self.ask("POST", HOOK, data, Content_Type="application/json")
        self.assertLess(time.monotonic() - began, 5)
        return got.code, got.text

    def settle(self) -> dict[str, str]:
        """Once two later apps, the last one first, were delivered, what was posted before has been judged."""
        return {name: self.deliver(name) for name in ("WEBSOCKET2", "WEBSOCKET1")}

    def test_strangers(self) -> None:
        self.seed_valid()
        self.serve()
        self.request("PRIMARY", "WEBSOCKET1", "WEBSOCKET2", "WEBSOCKET3")
        self.deliver("WEBSOCKET3")  # so the user of this database is known
        before, answers = self.tokens(), set()
        for what, body in self.strangers():
            with self.subTest(what):
                answers.add(self.post_hook(body))
        before |= self.settle()
        self.assertEqual(self.tokens(), before)
        self.assertEqual(self.job()["results"][0]["state"], "RUNNING")
        body = self.broker.delivery("PRIMARY")
        answers.add(self.post_hook(body))
        self.assertEqual(len(answers), 1, "a stranger can tell the answers apart")
        self.assertEqual(self.ended()["state"], "DONE")
        self.stop()
        self.assertEqual(self.tokens(), before | {"PRIMARY": body["access_token"]})

    def test_after_the_deadline(self) -> None:
        self.seed_valid()
        self.broker.switches.v3_seconds = 1.5
        self.serve()
        self.request("PRIMARY")
        before, body = self.tokens(), self.broker.delivery("PRIMARY")
        self.assertEqual((self.ended()["state"], self.post_hook(body)[0]), ("FAILED", 200))
        self.broker.switches.v3_seconds = None
        self.request("WEBSOCKET1", "WEBSOCKET2")
        delivered = self.settle()
        self.assertEqual(self.tokens(), before | delivered)

    def test_replay(self) -> None:
        self.seed_valid()
        self.serve()
        self.request("PRIMARY")
        old = self.broker.delivery("PRIMARY")
        self.post_hook(old)
        self.until(lambda: self.stored("PRIMARY", old["access_token"]))
        self.ended()
        before = self.rows(table="upstox_tokens WHERE api_name = 'PRIMARY'")
        self.assertEqual(self.post_hook(old)[0], 200)  # with nothing outstanding
        self.request("PRIMARY", "WEBSOCKET1", "WEBSOCKET2")
        self.assertEqual(self.post_hook(old)[0], 200)  # and while the next one is awaited
        self.settle()
        self.assertEqual(self.rows(table="upstox_tokens WHERE api_name = 'PRIMARY'"), before)
        self.assertEqual(self.job()["results"][0]["state"], "RUNNING")
        self.deliver("PRIMARY")
        self.assertEqual(self.ended()["state"], "DONE")

    def test_profile_that_does_not_answer_for_a_while(self) -> None:
        self.seed_valid("PRIMARY")
        self.serve()
        for answer in ("503", "429", "html", "reset"):
            with self.subTest(answer):
                self.request("PRIMARY")
                before = self.tokens()
                asked = self.broker.count("profile")
                self.broker.switches.profile_answer = answer
                body = self.broker.delivery("PRIMARY")
                self.assertEqual(self.post_hook(body)[0], 200)
                self.until(lambda: self.broker.count("profile") >= asked + 3)
                self.assertEqual(self.tokens(), before)
                self.broker.switches.profile_answer = None
                self.until(lambda: self.stored("PRIMARY", body["access_token"]))
                self.assertEqual(self.ended()["state"], "DONE")

    def test_database_that_is_away_for_a_while(self) -> None:
        self.seed_valid("PRIMARY")
        self.serve()
        self.request("PRIMARY")
        body, begun = self.broker.delivery("PRIMARY"), self.log.stat().st_size
        away = self.db.rename(self.folder / "away.db")
        self.assertEqual(self.post_hook(body)[0], 200)
        self.until(lambda: str(self.db) in self.log.read_text()[begun:])  # told, and kept
        away.rename(self.db)
        self.until(lambda: self.stored("PRIMARY", body["access_token"]))

    def test_flood(self) -> None:
        self.seed_valid()
        self.serve()
        self.request("PRIMARY")
        before = self.tokens()
        forged = self.broker.delivery("PRIMARY")

        def flood(number: int) -> set[tuple[int, str]]:
            bodies = (forged | {"access_token": f"forged.{number}.{place}"} for place in range(125))
            return {self.post_hook(body) for body in bodies}

        answers = set().union(*crowd(8, flood))
        self.assertEqual([code for code, _ in answers], [200])
        self.assertEqual(self.tokens(), before)
        token = self.deliver("PRIMARY")
        self.assertEqual(self.ended()["state"], "DONE")
        self.stop()
        self.assertEqual(self.tokens(), before | {"PRIMARY": token})

    def test_true_delivery_between_many_forged_ones(self) -> None:
        self.seed_valid()
        self.serve()
        self.request("PRIMARY")
        true = self.broker.delivery("PRIMARY")
        for number in range(60):
            self.post_hook(true | {"access_token": f"forged.{number}"} if number != 20 else true)
        self.until(lambda: self.stored("PRIMARY", true["access_token"]))

    def test_big_and_odd_requests(self) -> None:
        self.serve()
        head = f"POST {HOOK} HTTP/1.1\r\nHost: hooks.example.com\r\nContent-Type: application/json\r\n"
        for sent, code in (("Content-Length: 10485760\r\n\r\n" + "x" * 10485760, 413), ("\r\n{}", 400),
                           ("Content-Length: 99\r\n\r\n{}", 400)):
            with self.subTest(sent[:30]):
                began = time.monotonic()
                self.assertEqual(self.raw((head + sent).encode()).code, code)
                self.assertLess(time.monotonic() - began, 8)
        got = self.ask(path=HOOK)
        self.assertEqual((got.code, "POST" in got.headers["Allow"]), (405, True))
        self.request("PRIMARY")
        self.deliver("PRIMARY")

    def test_webhook_below_auth_needs_no_key(self) -> None:
        self.broker.switches.notifier_url = f"http://{self.at}/auth/upstox/notify/Zr5tqB81x"
        self.write_env(UPSTOX_SERVE_KEY=KEY)
        self.serve()
        got = self.post({"mode": "ALL", "flow": "V3"}, Authorization=f"Bearer {KEY}")
        self.assertEqual(got.code, 202)
        self.until(lambda: self.broker.count("v3") == 6)
        self.deliver("PRIMARY")

    def test_only_the_webhook_takes_foreign_hosts_and_no_key(self) -> None:
        self.write_env(UPSTOX_SERVE_KEY=KEY)
        self.serve()
        right = {"Authorization": f"Bearer {KEY}"}
        self.assertEqual(self.post({"mode": "ALL", "flow": "V3"}, **right).code, 202)
        self.until(lambda: self.broker.count("v3") == 6)
        public = {"Host": "hooks.example.com", "Origin": "https://api.upstox.com"}
        for path in ("/", "/healthz", STATUS, LATEST, HOOK + "/", HOOK.upper(), HOOK + "/x", "/hook"):
            with self.subTest(path):
                self.assertEqual(self.ask(path=path, **public, **right).code, 403)
        body = self.broker.delivery("PRIMARY")
        for path in (HOOK + "/", HOOK.upper(), "/" + HOOK, HOOK.replace("h", "%68", 1), "/x/.." + HOOK):
            with self.subTest(path):
                self.assertIn(self.ask("POST", path, body).code, (403, 404))
        self.assertEqual(self.ask("POST", HOOK, body, **public).code, 200)
        self.until(lambda: self.stored("PRIMARY", body["access_token"]))


# ---- the dashboard, as a person uses it


class BlankPage(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@unittest.skipIf(missing_for_browser() and not os.environ.get("CI"), "no browser on this machine")
class DashboardTest(PhoneCase):
    """Runs by flow V3, so that the only browser is the one that shows the page."""

    def setUp(self) -> None:
        super().setUp()
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-background-networking"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.page = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.addCleanup(self.page.quit)

    def show(self, width: int) -> None:
        self.page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})
        self.page.get(f"http://{self.at}/")

    def find(self, css: str) -> Any:
        return self.page.find_element("css selector", css)

    def text(self, css: str) -> str:
        return self.page.execute_script("return document.querySelector(arguments[0])?.innerText || ''", css)

    def until_text(self, css: str, pattern: str) -> None:
        self.until(lambda: re.search(pattern, self.text(css), re.S), 30)

    def shown(self, css: str) -> bool:
        return self.find(css).is_displayed()

    def assert_calm(self) -> None:
        """Nothing sticks out sideways, and no policy was violated."""
        wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        self.assertLessEqual(self.page.execute_script(wide), 0)
        log = [entry["message"] for entry in self.page.get_log("browser")]
        self.assertEqual([line for line in log if "Content Security" in line or "Uncaught" in line], [])

    def test_a_morning(self) -> None:
        for width in (1280, 390):
            with self.subTest(width):
                self.sql("DROP TABLE IF EXISTS upstox_tokens")
                self.seed_guide()
                self.serve(limits={"SHARED_SECONDS": 0.0})
                self.show(width)
                self.until_text("#summary", "3 of 6 tokens need generating")
                for name, words in GUIDE_WORDS.items():
                    self.until_text(f"tr[data-api={name}] .status", f"^{re.escape(words)}$")
                self.generate_missing()
                self.force_all_is_asked_first()
                self.server_goes_and_comes()
                self.assert_calm()
                self.stop()

    def generate_missing(self) -> None:
        """Live progress, a reload in the middle, and the sentence at the end."""
        self.find("#flow option[value=V3]").click()
        self.find("#missing").click()
        row = "tr[data-api=WEBSOCKET3]"
        self.until_text(f"{row} .job", "waiting for approval on the phone until [0-9][0-9]:[0-9][0-9]")
        self.assertFalse(self.find("#missing").is_enabled())
        self.page.refresh()
        self.until_text(f"{row} .job", "waiting for approval")
        for name in ("WEBSOCKET2", "WEBSOCKET3", "OPTIONCHAIN2"):
            self.broker.approve(name)
        self.until_text("#summary", "All 6 tokens are valid until 03:30|valid until")
        self.until_text("#notice", "3 of 3 generated")
        self.assertEqual(self.find(row).get_attribute("data-job"), "DONE")

    def force_all_is_asked_first(self) -> None:
        """The dialog names the danger and starts on Cancel; a tick box and its button work by keyboard."""
        from selenium.webdriver.common.keys import Keys
        asked = self.broker.count("v3")
        self.find("#all").click()
        self.assertRegex(self.text("#confirm"), "Every app logs in again.*stop working")
        self.assertEqual(self.page.switch_to.active_element.get_attribute("id"), "confirm-no")
        self.page.switch_to.active_element.send_keys(Keys.ENTER)
        self.until(lambda: not self.shown("#confirm"))
        self.assertEqual(self.broker.count("v3"), asked)
        self.find("tr[data-api=PRIMARY] input[type=checkbox]").send_keys(Keys.SPACE)
        self.until_text("#selected", r"\(1\)")
        self.broker.switches.v3_answer = "UDAPI1155"
        self.find("#flow option[value=V3]").click()
        self.find("#selected").send_keys(Keys.ENTER)
        self.until_text("tr[data-api=PRIMARY] .job", "Failed.*under review.*UDAPI1155")
        self.broker.switches.v3_answer = None

    def server_goes_and_comes(self) -> None:
        self.stop()
        self.find("#refresh").click()
        self.until(lambda: self.shown("#offline"), 30)
        self.serve()
        self.until(lambda: not self.shown("#offline"), 30)
        self.until_text("#summary", "valid until")

    def test_page_of_another_origin(self) -> None:
        """fetch() as a front end does it: preflight, GET and POST from a listed origin, none from another."""
        pages = http.server.ThreadingHTTPServer(("127.0.0.1", 0), BlankPage)
        threading.Thread(target=pages.serve_forever, daemon=True).start()
        self.addCleanup(pages.server_close)
        self.addCleanup(pages.shutdown)
        port = pages.server_address[1]
        self.write_env(UPSTOX_ALLOWED_ORIGINS=f"http://127.0.0.1:{port}", UPSTOX_SERVE_KEY=KEY)
        self.seed_guide()
        self.serve()
        right, wrong = {"Authorization": f"Bearer {KEY}"}, {"Authorization": "Bearer x"}
        body = json.dumps({"mode": "PARTIAL", "apiNames": ["PRIMARY"], "flow": "V3"})
        post = {"method": "POST", "body": body, "headers": right | {"Content-Type": "application/json"}}
        for host, options, path, expected in (
                ("127.0.0.1", {"headers": right}, "status", 200), ("127.0.0.1", {}, "status", 401),
                ("127.0.0.1", {"headers": wrong}, "status", 401), ("127.0.0.1", post, "generate", 202),
                ("localhost", {"headers": right}, "status", "failed"), ("localhost", {}, "status", "failed"),
                ("localhost", post, "generate", "failed")):
            with self.subTest(host=host, path=path, expected=expected):
                self.page.get(f"http://{host}:{port}/")
                self.assertEqual(self.page.execute_async_script(
                    "const [url, options, done] = arguments;"
                    "fetch(url, options).then(answer => done(answer.status)).catch(() => done('failed'))",
                    f"http://{self.at}/auth/upstox/tokens/{path}", options), expected)
        self.assertEqual(self.broker.count("v3"), 1)

    def test_key(self) -> None:
        self.write_env(**ONE_APP, UPSTOX_SERVE_KEY=KEY)
        self.seed_guide()
        self.serve()
        self.show(390)
        for key, shown in (("wrong-key-of-16-characters", True), (KEY, False)):
            self.until(lambda: self.shown("#key"), 30)
            self.find("#key").send_keys(key)
            self.find("#key-save").click()
            self.until_text("#notice" if shown else "#summary", "not accept" if shown else "valid until")
        self.find("#forget").click()
        self.until(lambda: self.shown("#key"), 30)
        self.assert_calm()


GUIDE_WORDS = {"PRIMARY": "VALID", "WEBSOCKET2": "INVALID (401)", "WEBSOCKET3": "EXPIRED",
               "OPTIONCHAIN2": "NOT FOUND"}


# ---- what was tried and what was lost


@dataclass
class Row:
    tried: int = 0
    lost: list[str] = field(default_factory=list)
    note: str = ""


class Table:
    """Counts trials; `part` is 1 for the full numbers, less for a seeded sample."""

    def __init__(self, seed: int = 1, part: float = 1, only: str = "") -> None:
        self.random, self.part, self.only = random.Random(seed), part, only
        self.rows: dict[str, Row] = {}

    def share(self, full: int) -> int:
        return max(1, round(full * self.part))

    def pick(self, cases: Iterable[Any], few: int = 2) -> list[Any]:
        """All cases that were asked for, or a few of them."""
        cases = [case for case in cases if self.only in str(case)]
        return cases if self.part == 1 else self.random.sample(cases, min(len(cases), few))

    def moments(self, full: int) -> list[float]:
        """Random parts of a run's time, spread from its start to its end, in random order."""
        number = self.share(full)
        parts = [(place + self.random.random()) / number for place in range(number)]
        return self.random.sample(parts, number)

    @contextlib.contextmanager
    def trial(self, what: str, case: object = "") -> Iterator[Row]:
        """One trial of the promise `what`; whatever goes wrong inside is a loss, not the end."""
        row = self.rows.setdefault(what, Row())
        row.tried += 1
        try:
            yield row
        except Exception as error:
            row.lost.append(f"{case}: {type(error).__name__}: {' '.join(str(error).split())[:600]}")

    def lines(self) -> list[str]:
        """The table, and below each row what was lost."""
        lines = []
        for what, row in self.rows.items():
            lines.append(f"{what:<78} {row.tried:>6} {len(row.lost):>5}  {row.note}".rstrip())
            lines += [f"    lost: {reason}" for reason in row.lost[:12]]
        return lines

    def lost(self) -> list[str]:
        return [f"{what}: {reason}" for what, row in self.rows.items() for reason in row.lost]


class Watch:
    """Everything the programs said, searched for every secret of its bench."""

    def __init__(self) -> None:
        self.texts = self.size = 0
        self.leaks: list[str] = []

    def search(self, said: Iterable[tuple[str, str]], secrets: Iterable[str]) -> list[str]:
        """Where a secret shows. Short ones count as whole words only: digits of a time are no leak."""
        kept = [re.escape(secret) if len(secret) > 6 else rf"(?<!\w){re.escape(secret)}(?!\w)"
                for secret in secrets]
        pattern, found = re.compile("|".join(kept)), []
        for origin, text in said:
            self.texts, self.size = self.texts + 1, self.size + len(text)
            if match := pattern.search(text):
                before = text[max(0, match.start() - 60):match.start()]
                found.append(f"{origin}: {match[0][:4]}... after {before!r}")
        self.leaks += found
        return found


WATCH = Watch()

# ---- the program under stress

# run by a process of its own, with the bench's clock instead of the machine's
STRESS_SCRIPT = """
import sys, time
sys.path[:0] = {paths!r}
import upstox_tokens as program
{change}
raise SystemExit(program.main(now=lambda: time.time() + {ahead!r}))
"""
PAPER = f"import {Path(__file__).stem} as stress; program.Browser = stress.PaperBrowser"
SECRET_KEYS = ("UPSTOX_PIN", "UPSTOX_TOTP", "UPSTOX_MOBILE_NUMBER", "UPSTOX_SERVE_KEY",
               "UPSTOX_CLIENT_SECRET_0")


class PaperBrowser(upstox_tokens.Browser):
    """Goes from the dialog to the redirect without a login page: for what happens behind it, and fast."""

    def open(self, url: str) -> None:
        page = urllib.parse.urlsplit(self.location(url))
        query = dict(urllib.parse.parse_qsl(page.query))
        if "redirect_uri" not in query:
            raise upstox_tokens.PageFault("no login page")
        self.url = self.location(f"{query['redirect_uri']}?client_id={query['client_id']}")

    def location(self, url: str) -> str:
        parts = urllib.parse.urlsplit(url)
        with contextlib.closing(http.client.HTTPConnection(parts.netloc, timeout=10)) as connection:
            try:
                connection.request("GET", f"{parts.path}?{parts.query}")
                return connection.getresponse().getheader("Location", "")
            except (OSError, http.client.HTTPException) as error:
                raise upstox_tokens.PageFault(type(error).__name__) from None

    def look(self) -> upstox_tokens.View:
        return upstox_tokens.View(self.url)


class StressBroker(Broker):
    """`before` runs ahead of a route's answer; `instead` answers it."""

    before: dict[str, Callable[[], object]] = {}
    instead: dict[str, Callable[[Broker, Request], Reply | str]] = {}

    def handle(self, request: Request) -> Reply | str:
        route = "v3" if request.path.startswith("/v3/") else request.path.rpartition("/")[2]
        self.before.get(route, lambda: None)()
        if route not in self.instead:
            return super().handle(request)
        request.route = route
        self.hit(request)
        return self.instead[route](self, request)


class Bench(Desk):
    """A Desk for programs in processes of their own, whose every word is searched for secrets at the end."""

    def __init__(self, apps: int = 2, *, paper: bool = False, change: str = "", **options: Any) -> None:
        super().__init__(apps, **{"broker": StressBroker} | options)
        self.paper, self.change = paper, change
        self.said: list[tuple[str, str]] = []
        self.hidden = {PIN, base64.b64encode(PIN.encode()).decode(),  # as the login page sends it
                       *(self.settings.get(key, PIN) for key in SECRET_KEYS)}
        self.took = 5.0  # seconds of a whole run
        self.jumps = True  # the clock goes on to another TOTP window for each run, to save the waiting

    def __enter__(self) -> Bench:
        super().__enter__()
        self.temp = self.folder / "t"
        self.temp.mkdir()
        self.lock_file = Path(f"{self.db}.upstox-lock")
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(sqlite3.Error):
            self.said += [("audit", str(row)) for row in self.rows(table="upstox_token_audit")]
        for path in [self.lock_file, *self.folder.glob("debug*/*"), *self.folder.glob("*.log")]:
            if path.is_file():
                self.said.append((path.name, path.read_bytes().decode("latin-1")))
        WATCH.search(self.said, {text for text in self.broker.secrets() | self.hidden if len(text) > 5})
        super().__exit__(*exception)

    def environ(self, changes: dict[str, str | None]) -> dict[str, str]:
        return super().environ({"TMPDIR": str(self.temp)} | changes)

    def check_rules(self, said: str) -> None:
        """Secrets are searched for at the end, when all are known."""
        self.said.append(("output", said))
        self.assertNotIn("Traceback", said)
        self.assertEqual(len(self.broker.codes), len(set(self.broker.codes)), "a TOTP code was sent twice")

    def next_window(self) -> None:
        if self.jumps:
            self.sleep(31 - self.now() % 30)

    def script(self) -> str:
        change = f"{PAPER}\n{self.change}" if self.paper else self.change
        paths = [str(PROGRAM.parent), str(Path(__file__).parent)]
        return STRESS_SCRIPT.format(paths=paths, change=change, ahead=self.ahead)

    def start(self, *argv: str, env: dict[str, str | None] | None = None,
              **options: Any) -> subprocess.Popen[str]:
        """The program at the beginning of a TOTP window that no earlier run has used."""
        self.next_window()
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-c", self.script(), *argv], cwd=self.folder, text=True,
                                env=self.environ(env or {}), start_new_session=True, **pipes | options)

    def finish(self, program: subprocess.Popen[str], typed: str | None = None, seconds: float = 120) -> Done:
        try:
            out, err = (text or "" for text in program.communicate(typed, timeout=seconds))
        finally:
            program.kill()
        self.check_rules(out + err)
        return Done(program.returncode, out, err)

    def until(self, condition: Any, seconds: float = 60) -> None:
        super().until(condition, seconds)

    def process(self, *argv: str, typed: str | None = None, seconds: float = 120, **options: Any) -> Done:
        options |= {"stdin": subprocess.PIPE} if typed is not None else {}
        return self.finish(self.start(*argv, **options), typed, seconds)

    def call(self, *argv: str, **options: Any) -> Done:
        browser = PaperBrowser if self.paper else upstox_tokens.Browser
        self.next_window()
        with mock.patch.object(upstox_tokens, "Browser", browser):
            return super().call(*argv, **options)

    def good_run(self, *argv: str) -> None:
        """A whole run that must succeed."""
        begin = time.monotonic()
        done = self.process(*(argv or ("--mode", "ALL")))
        self.assertEqual(done.code, 0, done.out + done.err)
        self.took = time.monotonic() - begin

    def leftovers(self) -> list[str]:
        """Processes, profiles and whatever else a run left in the temporary folder."""
        return [*processes(self.temp).values(), *map(str, self.temp.rglob("*"))]

    @functools.cached_property
    def config(self) -> upstox_tokens.Config:
        """As the program reads it from the env file."""
        settings, _ = upstox_tokens.parse_env((self.folder / ".env").read_text(), "")
        return upstox_tokens.build_config(settings, [], [])

    def assert_clean(self, seconds: float = 0) -> None:
        end = time.monotonic() + seconds
        while (left := self.leftovers()) and time.monotonic() < end:
            time.sleep(0.1)
        self.assertEqual(left, [], "left behind")

    def assert_whole(self) -> None:
        """One whole row per name in a sound file; on a copy, so that the next run meets whatever was left."""
        with tempfile.TemporaryDirectory() as name:
            for path in self.folder.glob(f"{self.db.name}*"):
                shutil.copy(path, name)
            with contextlib.closing(sqlite3.connect(Path(name, self.db.name))) as database:
                self.assertEqual(database.execute("PRAGMA integrity_check").fetchall(), [("ok",)])
                rows = database.execute("SELECT api_name, access_token, client_secret, validity_at, "
                                        "is_active FROM upstox_tokens ORDER BY api_index").fetchall()
        self.assertEqual([row[0] for row in rows], self.names)
        for name, token, secret, validity, active in rows:
            self.assertEqual((self.broker.tokens[token].app, secret, active), (name, APPS[name][1], 1))
            self.assertIsNotNone(upstox_tokens.parse_time(validity))

    def assert_lock_free(self) -> None:
        if self.lock_file.exists():
            with self.lock_file.open("rb+") as file:
                self.assertTrue(upstox_tokens.lock_exclusively(file.fileno()), "the lock is still held")

    def unproven(self) -> bool:
        """Whether a killed run left a code or PIN without an answer."""
        state = upstox_tokens.json_object(self.lock_file.read_bytes())
        return bool(state.get("pins") or state.get("codes"))


# ---- 1. kill -9, SIGTERM, Ctrl-C


def killed(table: Table) -> None:
    """kill -9 at any moment, and a signal at any moment."""
    jobs = [functools.partial(kill_runs, table, mode, random.Random(mode)) for mode in ("DELETE", "WAL")]
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()
    stop_runs(table)


def kill_runs(table: Table, mode: str, dice: random.Random) -> None:
    """Half of the kills; then as many more just when a token comes back from the broker."""
    for what, paper, full in (("1 kill -9 at any moment of a run", False, 50),
                              ("1 kill -9 while storing", True, 100)):
        with Bench(paper=paper) as bench:
            bench.sql(f"PRAGMA journal_mode = {mode}")
            bench.seed_old()
            bench.good_run()  # a PIN that never was right would put later runs on hold
            for moment in table.moments(full):
                with table.trial(f"{what}, journal {mode}", f"at {moment:.3f} of {bench.took:.1f} s"):
                    kill_once(bench, moment, dice)


def kill_once(bench: Bench, moment: float, dice: random.Random) -> None:
    tokens = bench.broker.count("token")
    program = bench.start("--mode", "ALL")
    if bench.paper:
        tokens += dice.randrange(2)
        bench.until(lambda: bench.broker.count("token") > tokens or program.poll() is not None)
        time.sleep(moment * 0.06)
    else:
        time.sleep(moment * bench.took)
    program.kill()
    program.wait()
    bench.assert_lock_free()
    bench.finish(program)
    bench.assert_whole()
    bench.good_run()
    bench.assert_whole()
    bench.assert_clean(3)


def stop_runs(table: Table) -> None:
    """SIGTERM and Ctrl-C, to the program alone and to its process group."""
    places = [("at any moment", table.moments(20)), ("in the browser's start", table.moments(10)),
              ("in a hanging page", table.moments(10))]
    ways = itertools.cycle(itertools.product((signal.SIGTERM, signal.SIGINT), (os.kill, os.killpg)))
    with Bench() as bench:
        bench.seed_old()
        bench.good_run()
        for where, moments in table.pick(places):
            bench.broker.switches.page = "hang" if "hanging" in where else ""
            for moment, (signum, send) in zip(moments, ways):
                case = f"{signum.name} {send.__name__} at {moment:.3f}"
                with table.trial(f"1 SIGTERM, Ctrl-C {where}", case):
                    stop_once(bench, where, moment, send, signum)
                if bench.unproven():
                    bench.good_run()


def stop_once(bench: Bench, where: str, moment: float, send: Callable[[int, int], None], signum: int) -> None:
    starts, pages = bench.browsers(), bench.broker.count("page")
    program = bench.start("--mode", "ALL")
    if "start" in where:
        bench.until(lambda: bench.browsers() > starts)
        time.sleep(moment * 0.6)
    elif "hanging" in where:
        bench.until(lambda: bench.broker.count("page") > pages)
        time.sleep(moment * 2)
    else:
        time.sleep(0.3 + moment * (bench.took - 0.3))
    send(program.pid, signum)
    begin = time.monotonic()
    done = bench.finish(program, seconds=60)
    took = time.monotonic() - begin
    # not yet or no more handled in the first and last moments of the process; 0: the run was just over
    bench.assertIn(done.code, (128 + signum, -signum, 0), done.err)
    bench.assertLess(took, 5)
    bench.assert_clean(1)  # Chromium's crash handlers see that it is gone, and follow
    bench.assert_whole()
    bench.assert_lock_free()


# ---- 2. the database as others leave it

OTHER = "UPDATE upstox_tokens SET api_name = '{}' WHERE api_name = 'WEBSOCKET1'"
TABLE = "DROP TABLE upstox_tokens; CREATE TABLE upstox_tokens ({});"
COLUMNS = ("id integer PRIMARY KEY, access_token, api_name, client_id, client_secret, created_at, "
           "expires_in, is_primary, last_refreshed, redirect_uri, refresh_token, token_type, api_index, "
           "generated_at, is_active, purpose, updated_at, user_id, validity_at")
WRITTEN = [name for name in re.findall(r"\w+", COLUMNS)[4:] if name not in (
    "last_refreshed", "refresh_token", "purpose", "user_id")]
TIMES = ("NULL", "''", "'x'", "1763889330123", "1763889330", "2461002.5", "1e300", "1e15", "0.5", "-1",
         "x'ff'", "'2025-11-23 09:15'", "'2025-11-23T09:15:30.123456+05:30'", "'1763889330123'",
         "9223372036854775807", "'99999-01-01 00:00:00'", "'0001-01-01 00:00:00+14:00'")
REJECT = "CREATE TRIGGER no BEFORE {} ON upstox_tokens BEGIN SELECT RAISE(ABORT, 'no'); END"


def overwrite(start: int, data: bytes) -> Callable[[Bench], None]:
    """Damage the file."""
    def damage(bench: Bench) -> None:
        with bench.db.open("rb+") as file:
            file.seek(start)
            file.write(data)
    return damage


def place(*parts: str, make: Callable[[Path], object] = lambda path: None) -> Callable[[Bench], None]:
    """Another path for the database."""
    def move(bench: Bench) -> None:
        bench.db = bench.folder.joinpath(*parts)
        make(bench.db)
    return move


DATABASES: dict[str, tuple[str | Callable[[Bench], object], int, str]] = {  # preparation, exit code, words
    "no file": (place("new.db"), 0, "created"),
    "link to nothing": (place("link.db", make=lambda path: path.symlink_to("target.db")), 0, "created"),
    "empty file": (place("empty.db", make=Path.touch), 0, ""),
    "no folder": (place("gone", "x.db"), 2, "folder"),
    "a folder": (place("folder", make=Path.mkdir), 2, "folder"),
    "a file as folder": (place(".env", "x.db"), 2, "folder"),
    "text": (lambda bench: bench.db.write_bytes(b"no database " * 500), 2, "not a SQLite.*--db"),
    "two bytes": (lambda bench: bench.db.write_bytes(b"ab"), 2, "not a SQLite.*--db"),
    "zeroed header": (overwrite(0, bytes(100)), 2, "not a SQLite.*--db"),
    "damaged page": (overwrite(4096, b"\xff" * 4096), 2, "damaged"),
    "damaged schema": (overwrite(100, b"\xff" * 3000), 2, "damaged"),
    "cut short": (lambda bench: os.truncate(bench.db, 2000), 2, "damaged"),
    "a view": ("ALTER TABLE upstox_tokens RENAME TO t; CREATE VIEW upstox_tokens AS SELECT * FROM t", 2,
               "view"),
    "extra NOT NULL column": (TABLE.format(COLUMNS + ", tenant NOT NULL"), 2, "default"),
    "extra NOT NULL column with a default": (TABLE.format(COLUMNS + ", tenant DEFAULT 1 NOT NULL"), 0, ""),
    "id without a value": (TABLE.format(COLUMNS.replace("PRIMARY KEY", "NOT NULL")), 2, "default"),
    "generated column": (TABLE.format(COLUMNS.replace("is_active", "is_active AS (1)")), 2, ""),
    "other types": (TABLE.format(re.sub(r"_at\b", "_at BLOB", COLUMNS)), 0, ""),
    "unique name": ("CREATE UNIQUE INDEX i ON upstox_tokens (api_name)", 0, ""),
    "unique name in any case": ("CREATE UNIQUE INDEX i ON upstox_tokens (api_name COLLATE NOCASE);"
                                + OTHER.format("websocket1"), 2, "unique"),
    "unique index held by another": ("CREATE UNIQUE INDEX i ON upstox_tokens (api_index);"
                                     + OTHER.format("OLD"), 2, "unique"),
    "duplicates": ("INSERT INTO upstox_tokens (api_name) SELECT api_name FROM upstox_tokens", 0, ""),
    "NULLs": (TABLE.format(COLUMNS) + "INSERT INTO upstox_tokens (api_name) VALUES ('PRIMARY'), (NULL)",
              0, ""),
    "unknown name": (OTHER.format("MCX9"), 0, "MCX9"),
    "nearly the same name": (OTHER.format(" primary "), 0, "primary"),
    "CHECK": (TABLE.format(COLUMNS + ", CHECK (length(access_token) < 100)"), 2, ""),
    "trigger on DELETE": (REJECT.format("DELETE"), 2, ""),
    "trigger on INSERT": (REJECT.format("INSERT"), 2, ""),
    "UTF-16": (place("new.db", make=lambda path: sqlite3.connect(path).executescript(
        f"PRAGMA encoding = 'UTF-16'; CREATE TABLE upstox_tokens ({COLUMNS})").connection.close()), 0, ""),
    **{f"no column {name}": (f"ALTER TABLE upstox_tokens DROP COLUMN {name}", 2, "column")
       for name in WRITTEN},
    **{f"created_at {value}": (f"UPDATE upstox_tokens SET validity_at = '2999-01-01 00:00:00', created_at = "
                               f"{value}", 0, "") for value in TIMES},
    **{f"validity_at {value}": (f"UPDATE upstox_tokens SET validity_at = {value}, generated_at = {value}, "
                                f"updated_at = {value}", 0, "") for value in TIMES},
}


def odd_databases(table: Table) -> None:
    """Every case: the token gets in, or one sentence with the path and no login."""
    for name, (prepare, code, words) in table.pick(DATABASES.items(), 5):
        what = "2 an odd database: served, or told before any login"
        with table.trial(what, name), Bench(paper=True) as bench:
            bench.seed_old()
            bench.sql(prepare) if isinstance(prepare, str) else prepare(bench)
            check_database(bench, bench.call("--mode", "ALL"), code, words)
    for what in table.pick(["file", "folder"]):
        with table.trial("2 read-only: told before any login", what), Bench(paper=True) as bench:
            meet_read_only(bench, what)
    locked_databases(table)
    with table.trial("2 disk full: told before any login, or the token is stored once there is space") as row:
        row.note = full_disk(table, row)


def check_database(bench: Bench, done: Done, code: int, words: str) -> None:
    bench.assertEqual(done.code, code, done.out + done.err)
    bench.assertRegex(done.out + done.err, f"(?is){words}")
    if code == 2:
        bench.assertEqual((bench.broker.logins, done.err.count("error: ")), ([], 1), done.err)
        bench.assertIn(str(bench.db), done.err)
        return
    for name in bench.names:
        tokens = [row["access_token"] for row in bench.rows() if row["api_name"] == name]
        bench.assertEqual([bench.broker.tokens[token].app for token in tokens], [name], "exactly one row")


def meet_read_only(bench: Bench, what: str) -> None:
    for path in (bench.folder, bench.folder.parent):
        path.chmod(path.stat().st_mode | 0o055)
    inner = bench.folder / "inner"
    inner.mkdir()
    bench.folder, bench.db = inner, inner / bench.db.name
    bench.write_env()
    bench.seed_old()
    with unprivileged(inner):
        (bench.db if what == "file" else inner).chmod(0o444 if what == "file" else 0o555)
        done = bench.call("--mode", "ALL")
    bench.assertEqual((done.code, bench.broker.logins), (2, []), done.err)
    bench.assertRegex(done.err, f"{re.escape(str(inner))}.*permission")


@contextlib.contextmanager
def held(path: Path, how: str) -> Iterator[sqlite3.Connection]:
    """Another program that reads or writes."""
    begin = {"reader": "BEGIN", "writer": "BEGIN IMMEDIATE", "exclusive": "BEGIN EXCLUSIVE"}[how]
    options: dict[str, Any] = {"isolation_level": None, "check_same_thread": False}
    with contextlib.closing(sqlite3.connect(path, **options)) as connection:
        connection.execute(begin)
        connection.execute("SELECT count(*) FROM upstox_tokens").fetchall()
        yield connection


def let_go(connection: sqlite3.Connection) -> None:
    with contextlib.suppress(sqlite3.ProgrammingError):  # closed: the run did not wait for it
        connection.rollback()


# the patience of a sample
HASTY = ("program.READ_SECONDS = program.PROOF_SECONDS = 1; program.STORE_SECONDS = 2\n"
         "program.transaction.__wrapped__.__defaults__ = (1,)")


def locked_databases(table: Table) -> None:
    """Locked for 3 s, for 60 s, and between login and storing; side by side, since it is waiting mostly."""
    full, change = table.part == 1, "" if table.part == 1 else HASTY
    modes, ways = ("DELETE", "WAL"), ("reader", "writer", "exclusive")
    cases = list(itertools.product([meet_lock], modes, ways, (3, 60) if full else (0.4, 6)))
    cases += itertools.product([lose_database], modes, [*ways, "moved away"], (3 if full else 1, 0))

    def meet(case: tuple[Any, ...]) -> None:
        meeting, mode, how, seconds = case
        after = "back after a while: stored" if seconds else "for good: told"
        what = {meet_lock: f"2 locked for {seconds} s: waited for, or told before any login",
                lose_database: f"2 gone after the login, {after}"}
        with table.trial(what[meeting], f"{how}, journal {mode}"), Bench(paper=True, change=change) as bench:
            bench.sql(f"PRAGMA journal_mode = {mode}")
            bench.seed_old()
            meeting(bench, how, seconds)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(meet, table.pick(cases)))


def meet_lock(bench: Bench, how: str, seconds: float) -> None:
    with held(bench.db, how) as connection:
        program = bench.start("--mode", "ALL")
        timer = threading.Timer(seconds, let_go, [connection])
        timer.start()
        done = bench.finish(program, seconds=200)
        timer.join()
    if done.code == 0:
        bench.assert_whole()
    else:
        bench.assertEqual((done.code, bench.broker.logins), (2, []), done.out + done.err)
        bench.assertRegex(done.err, f"{re.escape(str(bench.db))} is locked.*Close what holds it")


def lose_database(bench: Bench, how: str, seconds: float) -> None:
    """From the moment that a token is asked for; for good when there are no seconds."""
    old = bench.tokens()
    with contextlib.ExitStack() as stack:
        away = bench.db.with_name("away")

        def lose() -> None:
            bench.broker.before = {}
            if how == "moved away":
                bench.db.rename(away)
                back = functools.partial(away.rename, bench.db)
            else:
                back = functools.partial(let_go, stack.enter_context(held(bench.db, how)))
            if seconds:
                threading.Timer(seconds, back).start()

        bench.broker.before = {"token": lose}
        done = bench.process("--mode", "PARTIAL", "--apis", "PRIMARY", seconds=300)
        if away.exists():
            away.rename(bench.db)
    fresh = bench.tokens()["PRIMARY"] != old["PRIMARY"]
    if seconds or how == "reader" and bench.db.read_bytes()[18] == 2:
        bench.assertEqual((done.code, fresh), (0, True), done.out + done.err)
    else:
        bench.assertEqual((done.code, fresh), (1, False), done.out + done.err)
        bench.assertRegex(done.out, f"(?m)^PRIMARY: failed: .*could not be stored.*{bench.db}")
        bench.assertTrue(bench.change or "trying again" in done.err, done.err)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[], None]]:
    """A disk of 300 KiB mounted there; yields what fills it."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder]
    subprocess.run(command, check=True, capture_output=True)
    try:
        def fill() -> None:
            with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        yield fill
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def full_disk(table: Table, row: Row) -> str:
    """Full before the run, full from the login on for a while or for good, full when the code is typed."""
    change = "" if table.part == 1 else HASTY
    row.tried -= 1
    for case in table.pick(["before", "a while", "for good", "when typing"], 1):
        with Bench(paper=case != "when typing", change=change) as bench, contextlib.ExitStack() as stack:
            try:
                fill = stack.enter_context(small_disk(bench.folder / "disk"))
            except (OSError, subprocess.CalledProcessError) as error:
                return f"skipped: no disk can be mounted here ({error})"
            with table.trial(next(reversed(table.rows)), case):
                meet_full_disk(bench, case, fill)
    return ""


def meet_full_disk(bench: Bench, case: str, fill: Callable[[], None]) -> None:
    bench.db = bench.folder / "disk" / "vega_trade.db"
    bench.seed_old()
    old, free = bench.tokens(), (bench.folder / "disk" / "filler").unlink

    def fill_now() -> None:
        bench.broker.before = {}
        fill()
        if case == "a while":
            threading.Timer(0.7, free).start()

    if case == "before":
        fill()
    bench.broker.before = {"token": fill_now} if case in ("a while", "for good") else {
        "generate": fill_now} if case == "when typing" else {}
    done = bench.process("--mode", "PARTIAL", "--apis", "PRIMARY", "--db", str(bench.db), seconds=300)
    fresh = bench.tokens()["PRIMARY"] != old["PRIMARY"]
    code, logins = {"before": (2, 0), "a while": (0, 1), "for good": (1, 1), "when typing": (1, 0)}[case]
    got = (done.code, len(bench.broker.logins), fresh)
    bench.assertEqual(got, (code, logins, code == 0), done.out + done.err)
    bench.assertRegex(done.out + done.err, "is full|No space|^Token" if code else "VALID")
    bench.assertEqual(len(bench.broker.pins), 0)


# ---- 3. two runs at once


def at_once(table: Table) -> None:
    """cron, menu and REST started together: one generates, the others are told, no API is logged in twice."""
    for paper in (True, False) if table.part == 1 else (True,):
        rounds = table.share(50 if paper else 3)
        with Bench(paper=paper, exchange_delay=1.5 if paper else 0) as bench, serving(bench) as url:
            bench.seed_old()
            bench.jumps = False  # or the server would be in another time than the next run
            for number in range(rounds):
                with table.trial("3 cron, menu and REST at once" + ("" if paper else ", in a browser"),
                                 number) as row:
                    told = meet_at_once(bench, url, number)
                    row.note = f"told busy: {told + int(row.note.rpartition(' ')[2] or 0)}"


@contextlib.contextmanager
def serving(bench: Bench, **env: str) -> Iterator[str]:
    """The HTTP API in a process of its own; its address."""
    program = bench.start("--serve", "127.0.0.1:0", "-v", env=env)
    line = program.stderr.readline()
    try:
        yield re.search(r"http://\S+(?=/)", line)[0]
    finally:
        program.terminate()
        bench.assertEqual(bench.finish(program, seconds=90).code, 143)


def request(bench: Bench, url: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
    """(status, body) of the HTTP API's answer, kept for the search for secrets."""
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | headers
    with contextlib.closing(http.client.HTTPConnection(url.partition("//")[2], timeout=60)) as connection:
        connection.request("GET" if data is None else "POST", path, data, headers)
        answer = connection.getresponse()
        text = answer.read().decode("utf-8", "replace")
    bench.said.append((f"HTTP {path[:40]}", f"{answer.headers}\n{text}"))
    return answer.status, text


def meet_at_once(bench: Bench, url: str, number: int) -> int:
    """One round; how many were told that another run is busy."""
    bench.sql(f"UPDATE upstox_tokens SET validity_at = '{local_text(time.time() - DAY)}'")
    logins, job = len(bench.broker.logins), ("/auth/upstox/tokens/generate", {"mode": "INVALID_ONLY"})
    starts = [lambda: bench.process("--mode", "INVALID_ONLY"), lambda: bench.process(typed="2\n"),
              lambda: request(bench, url, *job)]
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(start) for start in starts[number % 3:] + starts[:number % 3]]
        answers = [future.result() for future in futures]
    codes = sorted(answer[0] for answer in answers)
    bench.until(lambda: '"RUNNING"' not in request(bench, url, "/auth/upstox/tokens/jobs/latest")[1], 60)
    bench.assertEqual(sorted(bench.broker.logins[logins:]), sorted(bench.names), codes)
    # a run that came after the other one's end finds all valid
    bench.assertLessEqual(set(codes), {0, 4, 202, 409}, answers)
    bench.assert_whole()
    return sum(code in (4, 409) for code in codes)


# ---- 4. account protection

WRONG_SECRET = TOTP_SECRET[::-1].replace("0", "A")
WRONG = "111222"


ACCOUNTS: list[tuple[str, dict[str, str], dict[str, Any], tuple[int, int]]] = [  # most codes and PINs sent
    ("4 wrong PIN, 50 cron runs: one PIN", {"UPSTOX_PIN": WRONG}, {}, (2, 1)),
    ("4 wrong TOTP secret, 50 cron runs: two codes", {"UPSTOX_TOTP": WRONG_SECRET}, {}, (2, 0)),
    ("4 killed after the PIN, 50 cron runs: one PIN", {"UPSTOX_PIN": WRONG}, {"pin_answer": "hang"}, (2, 1)),
    ("4 killed after a code, 50 cron runs: two codes", {}, {"otp_answer": "hang"}, (2, 0)),
]


def account(table: Table) -> None:
    """The broker counts PINs and codes; runs start from anew each time, as cron's do."""
    for what, env, switches, most in table.pick(ACCOUNTS, 1):
        with Bench(env=env, **switches) as bench:
            runs_in_a_row(table, what, bench, most, table.share(50))
            with table.trial("4 a changed value clears the hold", what):
                bench.write_env()
                bench.settings = {}
                bench.broker.switches.pin_answer = bench.broker.switches.otp_answer = None
                changed = bool(env)
                bench.assertEqual(bench.call("--mode", "ALL").code, 0 if changed else 3)
            with table.trial("4 the operator in the menu clears the hold", what):
                clear_by_menu(bench)


def runs_in_a_row(table: Table, what: str, bench: Bench, most: tuple[int, int], number: int) -> None:
    bench.seed_old()
    hanging = bench.broker.switches.pin_answer or bench.broker.switches.otp_answer
    for _ in range(2 if bench.broker.switches.otp_answer else 1 if hanging else 0):
        program = bench.start("--mode", "ALL")
        sent = len(bench.broker.pins + bench.broker.codes)
        target = sent + (2 if bench.broker.switches.pin_answer else 1)
        bench.until(lambda: len(bench.broker.pins + bench.broker.codes) >= target, 60)
        program.kill()
        bench.finish(program)
    for place in range(number):
        with table.trial(what, f"run {place}"):
            run = bench.call if (place + 1) % 10 else bench.process
            done = run("--mode", "INVALID_ONLY")
            sent = (len(bench.broker.codes), len(bench.broker.pins))
            bench.assertTrue(sent[0] <= most[0] and sent[1] <= most[1], f"codes, PINs sent: {sent}")
            bench.assertEqual(done.code, 3, done.out + done.err)
            bench.assertIn("not tried" if place or hanging else "refused", done.out)


def hold_logins(bench: Bench, reason: str) -> None:
    """What a run does that was refused."""
    vars(bench).pop("config", None)
    guard = upstox_tokens.AccountGuard(bench.db, bench.config)
    guard.acquire()
    guard.save(hold=reason, pins=1)
    guard.release()


def clear_by_menu(bench: Bench) -> None:
    """Hold it again; an operator who says no changes nothing, one who says yes goes ahead."""
    hold_logins(bench, "the broker refused the PIN")
    sent = len(bench.broker.pins)
    for answer, code in (("n", 3), ("y", 0)):
        done = bench.call(answers=["1", answer])
        bench.assertEqual(done.code, code, done.out + done.err)
        bench.assertEqual(len(bench.broker.pins) > sent, code == 0)
    bench.assertEqual(bench.call("--mode", "ALL").code, 0)


# ---- 5. secrets

LEAK = "program.Login.say = lambda self, text: print(text, self.run.config.pin, file=sys.stderr)"
SELENIUM_LOG = ("import logging; logging.basicConfig(filename='selenium.log', level=logging.DEBUG); "
                "logging.getLogger('selenium').setLevel(logging.DEBUG)")
# name, switches, settings, change of the program
FAILURES: list[tuple[str, dict[str, Any], dict[str, str], str]] = [
    ("success", {}, {}, ""),
    *[(f"{switch} {word}", {switch: word}, {}, "") for switch, words in {
        "mobile_answer": ("1017016", "1017069", "1017074", "reset"),
        "otp_answer": ("1017078", "1017076", "reset"),
        "pin_answer": ("1017007", "1017090", "dormant", "something_went_wrong", "reset"),
        "token_answer": ("401", "100069", "html", "no_token", "wrong_type", "truncated"),
        "profile_answer": ("401", "503", "html", "redirect"), "redirect_state": ("missing", "other"),
        "dialog_answer": ("100068", "100500", "html")}.items() for word in words],
    ("wrong PIN", {}, {"UPSTOX_PIN": WRONG}, ""),
    ("wrong TOTP secret", {}, {"UPSTOX_TOTP": WRONG_SECRET}, ""),
    ("captcha", {"captcha": "never"}, {}, ""), ("masked", {"otp_mask": True, "rerender": 150}, {}, ""),
    ("an error of our own after the PIN", {}, {}, "program.authorization_code = lambda url, state: 1 / 0"),
    ("an error of our own while storing", {}, {}, "program.cutoff_after = lambda now: now / 0"),
    ("Selenium's log at its most talkative", {}, {}, SELENIUM_LOG),
    ("SE_DEBUG in the environment", {}, {"SE_DEBUG": "1"}, ""),
]


def search_secrets(table: Table) -> None:
    """Success and failures with -v and --debug-dir; all that is said and all command lines are searched."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(functools.partial(search_run, table), table.pick(FAILURES)))
    with table.trial("5 the search goes red when the program leaks", "PIN"):
        watch = Watch()
        with mock.patch(f"{__name__}.WATCH", watch), Bench(1, change=LEAK) as bench:
            bench.seed_old()
            bench.process("--mode", "ALL", "-v")
        assert watch.leaks, "a PIN printed on purpose was not found"


def search_run(table: Table, failure: tuple[str, dict[str, Any], dict[str, str], str]) -> None:
    name, switches, settings, change = failure
    wrong = {key: value for key, value in settings.items() if key.startswith("UPSTOX_")}
    with table.trial("5 no secret in anything said, debug files, audit, command lines", name):
        leaks, bench = len(WATCH.leaks), Bench(1, env=wrong, change=change, **switches)
        with bench, command_lines(bench):
            bench.seed_old()
            done = bench.process("--mode", "ALL", "-v", "--debug-dir", "debug", env=settings)
            bench.said.append(("status", str(bench.call("--status", "--json", "-v"))))
        found = [leak for leak in WATCH.leaks[leaks:]]
        assert not found, found
        assert done.code in (0, 1, 3), done


@contextlib.contextmanager
def command_lines(bench: Bench) -> Iterator[None]:
    """Note the command lines of the program and all its children, again and again."""
    ended, seen = threading.Event(), set()

    def watch() -> None:
        while not ended.wait(0.1):
            seen.update(processes(bench.temp).values())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        bench.said += [("command line", line) for line in seen]


def served_secrets(table: Table) -> None:
    """HTTP answers, with a key, for right and wrong requests."""
    key = "serve-key-0123456789abcdef"
    with Bench(paper=True, env={"UPSTOX_SERVE_KEY": key}) as bench, serving(bench) as url:
        bench.seed_old()
        bench.jumps = False
        status, generate = "/auth/upstox/tokens/status", "/auth/upstox/tokens/generate"
        for path, body, headers, code in (
                (status, None, {}, 401), (status, None, {"Authorization": "Bearer " + PIN}, 401),
                (status, None, {"Authorization": f"Bearer {key}"}, 200), ("/", None, {}, 200),
                (generate, {"mode": PIN}, {"Authorization": f"Bearer {key}"}, 400),
                (generate, {"mode": "PARTIAL", "apiNames": [PIN]}, {"Authorization": f"Bearer {key}"}, 400),
                (f"/{PIN}?{key}", None, {}, 404), ("/auth/upstox/tokens/jobs/749216", None, {}, 401)):
            with table.trial("5 no secret in any HTTP answer", path):
                got, text = request(bench, url, path, body, **headers)
                bench.assertEqual(got, code, text)
                found = WATCH.search([(path, text)], {key, *bench.broker.secrets()} - {PIN})
                bench.assertEqual(found, [])
        bench.said.clear()  # what was asked for comes back in the answers: the PIN of these requests


# ---- 6. hostile broker

HOSTILE_WORDS = "hang drip endless gzip header_flood reset truncated html empty 429 500 503".split()
BODIES = {  # JSON of the wrong types, and what is none
    "array": "[]", "number": "7", "null": "null", "text": '"success"', "deep": "[" * 100_000,
    "deep object": '{"a":' * 50_000, "long number": "9" * 50_000, "NaN": '{"status": NaN}',
    "lists": '{"status":["success"],"access_token":["x"],"data":[1],"errors":[[1]]}',
    "objects": '{"status":{},"access_token":{"a":1},"data":"x","errors":{"errorCode":1}}',
    "odd errors": '{"errors":[{"errorCode":{"a":[1]},"message":{"b":2}}]}',
    "numbers": '{"status":1,"access_token":123456,"data":5,"errors":7}',
    "escapes": r'{"status":"\u0000","access_token":"a\nb","errors":[{"errorCode":"\u001b[31m"}]}',
    "long token": json.dumps({"access_token": "x" * 100_000}), "surrogate": r'{"access_token":"\udfff"}',
}
# ru_maxrss would start with what this process had when it forked
MEASURE = "import atexit, shutil; atexit.register(shutil.copy, '/proc/self/status', 'memory')"
SHORT = "program.PROFILE_SECONDS, program.EXCHANGE_SECONDS = 2, 3"


def hostile_answers() -> dict[str, Callable[[Broker, Request], Reply | str]]:
    """Every bad answer, by a name for the table."""
    def redirect(status: int) -> Callable[[Broker, Request], Reply]:
        return lambda broker, request: Reply(status, "", [("Location", broker.hop + "/elsewhere")])

    answers: dict[str, Callable[[Broker, Request], Reply | str]] = {
        word: lambda broker, request, word=word: broker.misbehave(word, "UDAPI100050")
        for word in HOSTILE_WORDS}
    answers |= {f"redirect {status}": redirect(status) for status in (301, 302, 303, 307, 308)}
    answers |= {f"JSON {name}": lambda broker, request, body=body: Reply(200, body, [
        ("Content-Type", "application/json")]) for name, body in BODIES.items()}
    answers |= {f"error {name}": lambda broker, request, body=body: Reply(400, body, [
        ("Content-Type", "application/json")]) for name, body in BODIES.items()}
    answers["wrong type"] = lambda broker, request: Reply(200, "{}", [("Content-Type", "image/png")])
    answers["two lengths"] = lambda broker, request: Reply(200, "{}", [("Content-Length", "5")])
    answers["odd length"] = lambda broker, request: Reply(200, "{}", [("Content-Length", "five")])
    answers["100 lines of date"] = lambda broker, request: Reply(200, "{}", [("Date", "x" * 500)] * 100)
    return answers


def hostile(table: Table) -> None:
    """Profile, token, dialog and v3 answered badly: over in time, UNKNOWN or a failure, memory bounded."""
    cases = [(route, name) for route in ("profile", "token", "dialog", "v3") for name in hostile_answers()]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(functools.partial(meet_hostile, table), table.pick(cases)))
    for case in table.pick([wrong_certificate, proxy_for_loopback, proxy_for_https]):
        with table.trial("6 hostile network: no bearer token gets out", case.__name__):
            case()


def meet_hostile(table: Table, case: tuple[str, str]) -> None:
    route, name = case
    change = MEASURE if table.part == 1 else f"{MEASURE}\n{SHORT}"
    argv = {"profile": ["--status"], "v3": ["--mode", "ALL", "--flow", "V3", "--wait", "0.05", "--serve",
                                            "127.0.0.1:0"]}.get(route, ["--mode", "ALL"])
    env = {"UPSTOX_NOTIFIER_WEBHOOK_URI": "http://127.0.0.1:9/notify"} if route == "v3" else {}
    what = f"6 hostile {route} answer: in time, failed or UNKNOWN, under 150 MB"
    with table.trial(what, name) as row, Bench(1, paper=True, change=change, env=env) as bench:
        bench.seed_valid("PRIMARY") if route == "profile" else bench.seed_old()
        bench.broker.instead = {route: hostile_answers()[name]}
        begin = time.monotonic()
        done = bench.process(*argv, seconds=150)
        took, memory = time.monotonic() - begin, memory_used(bench.folder / "memory")
        bench.assertEqual((done.code, bench.broker.leaked), (1, []), done.out + done.err)
        bench.assertNotIn("internal error", done.out + done.err)
        if route == "profile":
            bench.assertRegex(done.out, r"PRIMARY +: UNKNOWN \([\w ]+\)\n")
        bench.assertLess(took, 60)
        bench.assertLess(memory, 150)
        worst = [int(number) for number in re.findall(r"\d+", row.note)] or [0, 0]
        row.note = f"at most {max(worst[0], round(took))} s, {max(worst[1], memory)} MB"


def memory_used(status: Path) -> int:
    """The most that the process had, in MB."""
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) // 1024


@contextlib.contextmanager
def recording(context: ssl.SSLContext | None = None) -> Iterator[tuple[int, list[bytes]]]:
    """A port whose every byte is kept; with a certificate when there is a context."""
    got: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        def take() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with contextlib.suppress(OSError), client:
                    client.settimeout(2)
                    client = context.wrap_socket(client, server_side=True) if context else client
                    while data := client.recv(65536):
                        got.append(data)
        threading.Thread(target=take, daemon=True).start()
        yield server.getsockname()[1], got
        server.shutdown(socket.SHUT_RDWR)


def status_unknown(url: str, **env: str) -> None:
    """--status against another base URL ends with UNKNOWN."""
    with Bench(1, env={"UPSTOX_BASE_URL": url}) as bench:
        bench.seed_valid("PRIMARY")
        done = bench.process("--status", env=env)
        bench.assertEqual(done.code, 1, done)
        bench.assertRegex(done.out, r"PRIMARY +: UNKNOWN \((no connection|timeout|unexpected answer)\)")


def wrong_certificate() -> None:
    """Self-signed: refused before anything is sent."""
    if not shutil.which("openssl"):
        raise unittest.SkipTest("openssl is needed")
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
                        "/CN=localhost", "-keyout", "key.pem", "-out", "cert.pem"], cwd=name, check=True,
                       capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(f"{name}/cert.pem", f"{name}/key.pem")
        with recording(context) as (port, got):
            status_unknown(f"https://localhost:{port}")
            assert not got, "the bearer token was sent to an unknown certificate"


def proxy_for_loopback() -> None:
    """http on loopback never goes through a proxy of the environment."""
    with recording() as (port, got), Bench(1) as bench:
        names = ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY")
        proxy = dict.fromkeys(names, f"http://127.0.0.1:{port}")
        bench.seed_valid("PRIMARY")
        done = bench.process("--status", env={**proxy, "no_proxy": None, "NO_PROXY": None})
        bench.assertEqual((done.code, got), (0, []), done)


def proxy_for_https() -> None:
    """https asks a proxy for a tunnel, and shows it no token."""
    with recording() as (port, got):
        proxy = {"https_proxy": f"http://127.0.0.1:{port}", "no_proxy": "", "NO_PROXY": ""}
        status_unknown("https://api.invalid", **proxy)
        assert got and got[0].startswith(b"CONNECT api.invalid:443"), got
        assert not any(b"Bearer" in data for data in got), "the proxy saw the bearer token"


# ---- 7. fuzz

SCRAPS = ("", " ", "\n", "\r\n", "\t", "\0", "\ufeff", "'", '"', "#", "=", "export ", "\\", "é", "\u202e",
          "\ud800", "ß" * 50, "0", "1", "-1", "true", "null", "9" * 30, "1e999", "NaN", "[", "]", "{", "}",
          ",", ":", "%", "../", "<b>", "PRIMARY", "websocket1", "ALL", "PARTIAL", "2025-11-23 03:30:00",
          "2025-11-23T09:15:30.5Z", "Bearer x")


class Dice:
    """Seeded random texts, values, JSON and bytes, near what is expected and far from it."""

    def __init__(self, seed: object) -> None:
        self.random = random.Random(str(seed))
        self.choice, self.below = self.random.choice, self.random.randrange

    def text(self, more: Sequence[str] = (), longest: int = 8) -> str:
        scraps = [*SCRAPS, *more, chr(self.below(1, 0x3000))]
        return "".join(self.choice(scraps) for _ in range(self.below(longest)))

    def data(self, more: Sequence[str] = ()) -> bytes:
        text = self.text(more, 12).encode("utf-8", "surrogatepass")
        cut = text[:self.below(len(text) + 1)] + self.random.randbytes(self.below(9))
        return text if self.below(4) else cut

    def value(self, depth: int = 0) -> Any:
        """What json.dumps or SQLite takes."""
        kinds: list[Callable[[], Any]] = [
            lambda: None, lambda: self.text(), lambda: self.below(-9, 9), lambda: self.choice((True, False)),
            lambda: self.random.random() * 10 ** self.below(20), lambda: 2 ** 62 + self.below(99),
            lambda: self.choice(SCRAPS)]
        if depth < 3:
            kinds += [lambda: [self.value(depth + 1) for _ in range(self.below(4))],
                      lambda: {self.text(longest=3): self.value(depth + 1) for _ in range(self.below(4))}]
        return self.choice(kinds)()

    def column(self) -> Any:
        """What a column may hold."""
        value = self.value(3)
        if isinstance(value, str) and not self.below(3):
            return value.encode("utf-8", "surrogatepass")
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value

    def like(self, model: dict[str, Any]) -> bytes:
        """JSON of that shape with some of it replaced, cut short now and then."""
        if not self.below(5):
            return self.data(['"', *model])
        shape = {key: value if self.below(3) else self.value()
                 for key, value in model.items() if self.below(8)}
        text = json.dumps(self.value() if not self.below(9) else shape).encode()
        return text if self.below(6) else text[:self.below(len(text) + 1)]


def fuzz(table: Table) -> None:
    """Seeded inputs to everything that reads what others wrote."""
    with Bench(paper=True) as bench:
        bench.seed_old()
        for name, feed in FUZZ.items():
            feed_all(table, f"7 fuzz: {name}", functools.partial(feed, bench), table.share(10_000))
    fuzz_http(table)


def feed_all(table: Table, what: str, feed: Callable[[Dice], object], number: int) -> None:
    for place in range(number):
        with table.trial(what, f"input {place}"):
            begin = time.process_time()
            try:
                feed(Dice(f"{what}{place}"))
            except (upstox_tokens.TokenError, upstox_tokens.HttpError) as error:
                assert str(error).strip(), "an error without words"
            assert time.process_time() - begin < 5, "took too long"


def feed_env_file(bench: Bench, dice: Dice) -> None:
    """Every line may be broken; no message shows what a secret's key holds."""
    good = (bench.folder / ".env").read_text().splitlines()
    lines = [line if dice.below(6) else line.partition("=")[0] + "=" + dice.text(good) for line in good]
    lines = dice.random.sample(lines, dice.below(1, len(lines) + 1))
    text = dice.choice(("\n", "\r\n", "\n\n# x\n")).join(lines)
    settings, problems = upstox_tokens.parse_env(text + dice.text(), "file")
    settings = {key: value.strip() for key, value in settings.items() if value.strip()}
    try:
        upstox_tokens.build_config(settings, problems, ["UPSTOX_PIN"])
    except upstox_tokens.ConfigError as error:
        values = {key: settings.get(key, "") for key in SECRET_KEYS}
        shown = [key for key, value in values.items() if len(value) > 11 and value in str(error)]
        assert not shown, f"{shown} shown"


def feed_token_answer(bench: Bench, dice: Dice) -> None:
    """A token answer, and the envelope of an error."""
    entry = {"errorCode": "UDAPI100057", "error_code": "UDAPI100057", "message": "x"}
    body = dice.like({"access_token": "x", "errors": [entry], "status": "error"})
    answer = upstox_tokens.Answer(dice.choice((200, 200, 400, 401, 429, 500, 302)), body, dice.text())
    upstox_tokens.error_code(answer)
    assert upstox_tokens.explain(answer)
    upstox_tokens.clock_problem([(answer, time.time())])
    run = fuzz_run(bench, answer)
    got = upstox_tokens.exchange_and_store(run, run.config.apps[0], "code")
    assert isinstance(got, (upstox_tokens.Token, upstox_tokens.LoginFailed)), got


def fuzz_run(bench: Bench, answer: upstox_tokens.Answer) -> upstox_tokens.Run:
    """A run whose broker always answers the same; nothing is stored."""
    broker = mock.Mock(spec=upstox_tokens.Broker, **{"exchange.return_value": answer})
    run = upstox_tokens.Run(bench.config, bench.db, broker, upstox_tokens.Reporter(), "CLI")
    run.audit = lambda *_: None
    return run


def feed_profile(bench: Bench, dice: Dice) -> None:
    body = dice.like({"status": "success", "data": {"user_id": "x"}})
    code, error = dice.choice((200, 200, 401, 403, 302, 599)), dice.choice(("", "", "timeout"))
    answer = upstox_tokens.Answer(code, body, error=error)
    word, reason = upstox_tokens.judge_profile(answer)
    assert word in ("VALID", "INVALID", "UNKNOWN") and (word == "VALID") == (not reason)
    assert word != "VALID" or json.loads(body)["status"] == "success"


def feed_row(bench: Bench, dice: Dice) -> None:
    """A row of anything in every column, judged as by every command."""
    path = bench.folder / "fuzz.db"
    if not path.exists():
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            database.execute(f"CREATE TABLE upstox_tokens ({COLUMNS})")
    names = COLUMNS.split(", ")[1:]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous = OFF")
        database.execute("DELETE FROM upstox_tokens")
        rows = [[dice.column() if dice.below(3) else fit for fit in fitting_row(names)] for _ in range(2)]
        marks = ",".join("?" * len(names))
        database.executemany(f"INSERT INTO upstox_tokens ({','.join(names)}) VALUES ({marks})", rows)
    tokens = upstox_tokens.read_tokens(path)
    statuses = []
    for name, token in tokens.items():
        verdict = upstox_tokens.judge_stored(token, APPS["PRIMARY"][0], time.time())
        assert verdict is None or verdict[0] in upstox_tokens.NEEDS_LOGIN
        statuses.append(upstox_tokens.Status(name, *(verdict or ("VALID", "")), token))
    json.dumps(upstox_tokens.status_json(statuses, time.time()))
    "\n".join(upstox_tokens.summary_lines(statuses)).encode("utf-8", "backslashreplace")
    with contextlib.suppress(upstox_tokens.TokenError):
        upstox_tokens.access_token("PRIMARY", db=path)


def fitting_row(names: Sequence[str]) -> list[Any]:
    row = token_row("PRIMARY", "x" * 40, time.time())
    return [row.get(name) for name in names]


def feed_config_row(bench: Bench, dice: Dice) -> None:
    """Rows of upstox_api_configs, in a table that others have made."""
    path = bench.folder / "configs.db"
    names = ("api_index", "api_name", "client_id", "client_secret", "redirect_uri", "is_enabled")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA synchronous = OFF")
        database.execute(f"CREATE TABLE IF NOT EXISTS upstox_api_configs ({','.join(names)})")
        database.execute("DELETE FROM upstox_api_configs")
        for index, (name, pair) in enumerate(list(APPS.items())[:dice.below(8)]):
            fit = (index, name, *pair, None, 1)
            database.execute("INSERT INTO upstox_api_configs VALUES (?, ?, ?, ?, ?, ?)",
                             [value if dice.below(5) else dice.column() for value in fit])
    upstox_tokens.build_config({}, [], [], upstox_tokens.stored_apps(path))


def feed_menu(bench: Bench, dice: Dice) -> None:
    """Answers, then Ctrl-D."""
    answers = iter([dice.text(["1", "2", "3", "4", "q", ", ", "٣", "²"], 4) for _ in range(dice.below(6))])

    def ask(prompt: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    console = upstox_tokens.Console(io.StringIO(), io.StringIO(), ask)
    with contextlib.suppress(EOFError):
        choice = upstox_tokens.ask_action(console, list(APPS))
        assert choice is None or choice[0] in upstox_tokens.MODES and set(choice[1]) <= set(APPS)


def feed_rest(bench: Bench, dice: Dice) -> None:
    service = upstox_tokens.Service.__new__(upstox_tokens.Service)
    service.command = mock.Mock(names=list(APPS), args=mock.Mock(flow="SELENIUM"))
    mode = dice.choice((*upstox_tokens.MODES, "x"))
    body = dice.like({"mode": mode, "apiNames": ["PRIMARY"], "flow": "SELENIUM"})
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return
    mode, names, flow = service.read_request(data)
    assert mode in upstox_tokens.MODES and set(names) <= set(APPS) and flow in upstox_tokens.FLOWS


def feed_webhook(bench: Bench, dice: Dice) -> None:
    model = {name: str(value) for name, value in bench.broker.delivery("PRIMARY", access_token="x").items()}
    delivery = upstox_tokens.parse_delivery(dice.like(model), bench.config, time.time())
    assert delivery is None or delivery.access_token and time.time() < delivery.valid_until


def feed_page(bench: Bench, dice: Dice) -> None:
    """What a login page may show, and where it may lead."""
    texts = ("[1017016]", "[500]", "Something went wrong", "UDAPI100068", "too many", "account is locked")
    items = {"otpNum": {"enabled": False, "value": ""}}
    view = upstox_tokens.View(dice.text(), items, dice.text(), dice.text(texts))
    failure = upstox_tokens.page_complaint(view, dice.choice(("mobile", "otp", "pin", "")))
    assert failure is None or str(failure).isprintable()
    upstox_tokens.same_place(dice.text(["http://[::1]:x/", "http://a:99999/"]), "http://localhost/")
    upstox_tokens.authorization_code(f"http://localhost/?{dice.text(['state=s', '&', 'code=c', ';'])}", "s")


def feed_lock_file(bench: Bench, dice: Dice) -> None:
    """What a lock file may hold after a crash of the machine, or by other hands."""
    guard = upstox_tokens.AccountGuard(bench.folder / "guard.db", bench.config)
    model = {"fingerprint": guard.fingerprint, "window": 5, "pins": 1, "codes": 1, "hold": "", "proven": True}
    guard.path.write_bytes(dice.like(model) + dice.data() * (not dice.below(3)))
    guard.load()
    assert isinstance(guard.hold(), str)
    assert 0 <= upstox_tokens.totp_wait(time.time(), guard.count("window")) <= 60


FUZZ: dict[str, Callable[[Bench, Dice], object]] = {
    "env files": feed_env_file, "token answers and error envelopes": feed_token_answer,
    "profile bodies": feed_profile, "database rows": feed_row, "rows of the configuration": feed_config_row,
    "menu input": feed_menu, "REST bodies": feed_rest, "webhook bodies": feed_webhook,
    "login pages": feed_page, "lock files": feed_lock_file}


def fuzz_http(table: Table) -> None:
    """Bodies and raw bytes to a server: always an answer below 500, never a traceback, and it lives on."""
    notifier = {"UPSTOX_NOTIFIER_WEBHOOK_URI": "http://127.0.0.1:9/notify/x"}
    with Bench(paper=True, env=notifier) as bench:
        bench.seed_valid(*bench.names)
        bench.jumps = False
        with serving(bench) as url:
            for place in range(table.share(400)):
                with table.trial("7 fuzz: over HTTP", place):
                    send_fuzz(bench, url, Dice(f"http{place}"))
            with table.trial("7 fuzz: over HTTP", "alive"):
                bench.assertEqual(request(bench, url, "/healthz")[0], 200)


def send_fuzz(bench: Bench, url: str, dice: Dice) -> None:
    kind = dice.below(3)
    if kind < 2:
        model = {"mode": "INVALID_ONLY"} if kind else bench.broker.delivery("PRIMARY", access_token="x")
        path = "/auth/upstox/tokens/generate" if kind else "/notify/x"
        status, text = request(bench, url, path, dice.like(model))
        bench.assertIn(status, (200, 202, 400, 409, 415))
        json.loads(text)
        return
    host, port = url.partition("//")[2].split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        starts = (b"GET / HTTP/1.1", b"POST /auth/upstox/tokens/generate HTTP/1.0", dice.data())
        heads = (b"Host: localhost", b"Content-Length: " + dice.data(), dice.data())
        lines = [dice.choice(starts), *(dice.choice(heads) for _ in range(4))]
        client.sendall(b"\r\n".join(lines) + b"\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    bench.assertNotIn(b"Traceback", answer)
    bench.assertNotRegex(answer, rb"\AHTTP/1.. 5(?!05)")


# ---- 8. readiness


def break_lock(bench: Bench) -> None:
    hold_logins(bench, "the broker refused the PIN")


def break_driver(bench: Bench) -> None:
    (bench.folder / "bin" / "chromedriver").write_text("#!/bin/sh\nexit 1\n")


def switch(**changes: Any) -> Callable[[Bench], None]:
    return lambda bench: vars(bench.broker.switches).update(changes)


def skew(seconds: float) -> Callable[[Bench], None]:
    """The broker's clock runs ahead."""
    return lambda bench: setattr(bench.broker.switches, "clock_offset", bench.ahead + seconds)


# line of --check, how it is made to fail, exit codes, what is said
CHECKS: list[tuple[str, Callable[[Bench], object], tuple[int, ...], str]] = [
    ("everything", lambda bench: None, (0,), ""),
    ("configuration", lambda bench: bench.write_env(UPSTOX_PIN="12"), (1, 2), "UPSTOX_PIN"),
    ("env file", lambda bench: (bench.folder / ".env").chmod(0o644), (1, 2), "chmod 600"),
    ("database", lambda bench: bench.db.write_bytes(b"no database" * 99), (1, 2), "not a SQLite"),
    ("database", lambda bench: bench.sql(TABLE.format(COLUMNS + ", tenant NOT NULL")), (1, 2), "default"),
    ("database", place("gone", "x.db"), (1, 2), "gone"),
    ("browser", break_driver, (1,), "chromedriver did not start.*apt install"),
    ("broker", lambda bench: bench.write_env(UPSTOX_BASE_URL="http://127.0.0.1:9"), (1,), "no connection"),
    ("clock", skew(-60), (1,), "(59|60|61) s ahead"),
    ("clock", skew(60), (1,), "(59|60|61) s behind"),
    ("hold", break_lock, (1,), "refused the PIN.*menu"),
    ("WEBSOCKET1", switch(only={"WEBSOCKET1"}, dialog_answer="100068"), (1,), "redirect_uri.*UDAPI100068"),
    ("PRIMARY", switch(only={"PRIMARY"}, dialog_answer="500"), (1,), "UDAPI100500"),
]


def readiness(table: Table) -> None:
    """Each line of --check failing, the others passing; no OTP is spent and nothing changes."""
    for line, breaks, codes, words in table.pick(CHECKS):
        with table.trial("8 --check: each line failing and the others passing", line), Bench() as bench:
            bench.seed_old()
            bench.next_window()
            bench.jumps = False
            breaks(bench)
            (bench.folder / "starts").write_text("")
            before = bench.snapshot()
            done = bench.call("--check")
            (bench.folder / "starts").write_text("")
            bench.assertIn(done.code, codes, done.out + done.err)
            bench.assertEqual((bench.snapshot(), bench.broker.otp_requests), (before, []))
            check_lines(bench, done, line, words)


def check_lines(bench: Bench, done: Done, line: str, words: str) -> None:
    said = dict(re.findall(r"(?m)^(\w[\w ]*?) *: (.*)$", done.out))
    bad = {name for name, text in said.items() if text != "ok"}
    if line in ("configuration", "env file") and done.code == 2:
        bench.assertRegex(done.err, words)
        return
    bench.assertLessEqual({"configuration", "env file", "database", "browser", "broker", "clock", "hold",
                           *bench.names}, set(said))
    follow = {"clock", *bench.names} if line == "broker" else {"hold"} if line == "database" else set()
    bench.assertEqual(bad - follow, set() if line == "everything" else {line}, done.out)
    bench.assertRegex(said.get(line, ""), words or "^$")


# ---- 9. cron's conditions

SURROUNDINGS = {  # a shell line in which $RUN is a whole run; what it must write to stdout
    "empty environment": ("env -i $RUN", "VALID"),
    "HOME unset": ("unset HOME; $RUN", "VALID"),
    "no terminal": ("setsid -w $RUN", "VALID"),
    "closed stdin": ("$RUN <&-", "VALID"),
    "closed stdout": ("$RUN >&-", ""),
    "closed stderr": ("$RUN 2>&-", "VALID"),
    "all closed": ("$RUN <&- >&- 2>&-", ""),
    "LC_ALL=C": ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 $RUN", "VALID"),
    "latin-1": ("LC_ALL=de_DE.ISO-8859-1 PYTHONUTF8=0 PYTHONIOENCODING=latin-1 $RUN", "VALID"),
    "umask 000": ("umask 000; $RUN --debug-dir debug", "VALID"),
    "umask 777": ("umask 777; $RUN", "VALID"),
    "long TMPDIR": (f"TMPDIR=$TMPDIR/{'x' * 60}; mkdir $TMPDIR; $RUN && rmdir $TMPDIR", "VALID"),
    "HOME not writable": ("HOME=/proc/self/nowhere $RUN", "VALID"),
}


def cron(table: Table) -> None:
    """A whole run in a real browser each time, in a folder whose name is not ASCII."""
    for name, (line, words) in table.pick(SURROUNDINGS.items()):
        with table.trial("9 cron's conditions: a whole run", name), Bench(1) as bench:
            run_like_cron(bench, line, words)


def run_like_cron(bench: Bench, line: str, words: str) -> None:
    home = bench.folder
    bench.folder = home / "größe ☂"
    bench.folder.mkdir()
    bench.db = bench.folder / bench.db.name
    bench.write_env()
    bench.next_window()
    (home / "run.py").write_text(bench.script())
    run = f"{shlex.quote(sys.executable)} {shlex.quote(str(home / 'run.py'))} --mode ALL"
    process = subprocess.Popen(["sh", "-c", f"set -f; RUN={shlex.quote(run)}; {line}"], cwd=bench.folder,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=bench.environ({}), encoding="utf-8", errors="replace")
    done = bench.finish(process, seconds=120)
    bench.assertEqual(done.code, 0, done.out + done.err)
    bench.assertRegex(done.out, words or r"\A\Z")
    bench.assertEqual([row["api_name"] for row in bench.rows()], bench.names)
    for path in bench.folder.rglob("*"):
        bench.assertFalse(path.stat().st_mode & 0o077, f"{path.name} is open to others")
    bench.assert_clean(1)


# ---- the command and the sample

ITEMS: dict[str, Sequence[Callable[[Table], None]]] = {
    "kill": [killed], "database": [odd_databases], "two": [at_once], "account": [account],
    "secrets": [search_secrets, served_secrets], "hostile": [hostile], "fuzz": [fuzz], "check": [readiness],
    "cron": [cron]}
SAMPLE = 0.02


def stress(argv: Sequence[str] | None = None) -> int:
    """Run the items and print the table."""
    parser = argparse.ArgumentParser(prog="stress", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("items", nargs="*", choices=[[], *ITEMS], help="all when none is named")
    parser.add_argument("--sample", action="store_true", help="a small seeded sample of each item")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", metavar="TEXT", help="of the named cases, those with this text")
    args = parser.parse_args(argv)
    lost = 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(f"{'promise':<78} {'tried':>6} {'lost':>5}", flush=True)
    for name in args.items or ITEMS:
        table = Table(args.seed, SAMPLE if args.sample else 1, args.only)
        try:
            run_item(table, name)
        finally:  # what was found until somebody stops it
            print("\n".join(table.lines()), flush=True)
        lost += len(table.lost())
    said = f"5 no secret in all that was said ({WATCH.size} characters)"
    print(f"{said:<78} {WATCH.texts:>6} {len(WATCH.leaks):>5}")
    print("\n".join(f"    lost: {leak}" for leak in WATCH.leaks))
    return int(lost + len(WATCH.leaks) > 0)


def run_item(table: Table, name: str) -> None:
    """One item in a temporary folder of its own, in which nothing may be left."""
    if threading.current_thread() is threading.main_thread():  # in the background of a shell it is ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="s") as folder, mock.patch.object(tempfile, "tempdir", folder):
        for work in ITEMS[name]:
            work(table)
        with table.trial(f"{name}: no process is left"):
            end = time.monotonic() + 3  # Chromium's crash handlers follow it
            while (left := processes(Path(folder))) and time.monotonic() < end:
                time.sleep(0.1)
            assert not left, left


# ---- bench: what the program costs above a floor that is measured beside it

PACE = {"step_delay": 0.15, "page_delay": 0.2, "profile_delay": 0.08}
WINDOW = 30  # seconds of a TOTP code, and of each wait whose processor time is measured
RUN = (sys.executable, str(PROGRAM))
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
Figures = tuple[float, ...]  # of one run: seconds, MiB


def imports_of_program() -> str:
    """The import lines of the program, and nothing else of it."""
    nodes = ast.parse(PROGRAM.read_text(encoding="utf-8")).body
    return "\n".join(ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom)))


@contextlib.contextmanager
def scene(count: int = 6, **switches: Any) -> Iterator[tuple[Path, Broker]]:
    """A fresh broker, and a folder with so many apps, whose tokens are all valid."""
    unused = {f"UPSTOX_{key}_{index}": None for index in range(count, 6)
              for key in ("CLIENT_ID", "CLIENT_SECRET", "API_NAME")}
    with tempfile.TemporaryDirectory(prefix="bench-") as name, Broker(**PACE, **switches) as broker:
        folder = Path(name)
        (folder / ".env").touch(mode=0o600)
        (folder / ".env").write_text(env_text(broker, **unused), encoding="utf-8")
        seed(folder / "vega_trade.db", [token_row(app, broker.issue(app), time.time())
                                        for app in list(APPS)[:count]])
        yield folder, broker


@contextlib.contextmanager
def started(folder: Path, *command: str, **environ: str) -> Iterator[subprocess.Popen]:
    """A process that writes to the folder's log; afterwards it is gone, with what it started."""
    (folder / "log").unlink(missing_ok=True)  # an earlier process may still write to its own
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=clean_environment() | environ, stdout=log,
                                   stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], Any], folder: Path, pause: float = 0.02) -> Any:
    end = time.monotonic() + 180
    while not (found := condition()):
        if time.monotonic() > end:
            raise RuntimeError((folder / "log").read_text("utf-8", "replace"))
        time.sleep(pause)
    return found


def logged(folder: Path, pattern: str) -> str:
    """Wait until the process writes this."""
    return wait_for(lambda: re.search(pattern, (folder / "log").read_text()), folder)[0]


def measure(folder: Path, *command: str, code: int = 0) -> Figures:
    """Seconds until the process ended, and the most MiB that it held itself, without its children."""
    highest, begun = "0", time.perf_counter()
    with started(folder, *command) as process:
        def ended() -> bool:
            nonlocal highest
            with contextlib.suppress(OSError):  # a process that is just ending shows nothing more
                found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{process.pid}/status").read_text())
                highest = found[1] if found else highest
            return process.poll() is not None
        wait_for(ended, folder, 0.002)
        took = time.perf_counter() - begun
    if process.returncode != code:  # then the figures mean nothing
        raise RuntimeError(f"exit {process.returncode}: " + (folder / "log").read_text("utf-8", "replace"))
    return took, int(highest) / 1024


def processor(process: subprocess.Popen) -> float:
    """Seconds of processor time so far, without the children's."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def get(url: str, **headers: str) -> float:
    """Seconds of one request."""
    parts, begun = urlsplit(url), time.perf_counter()
    with contextlib.closing(http.client.HTTPConnection(parts.netloc, timeout=30)) as connection:
        connection.request("GET", parts.path, headers=headers)
        answer = connection.getresponse()
        answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{parts.path}: HTTP {answer.status}")
    return time.perf_counter() - begun


def row(*cells: str, met: bool | None = None) -> None:
    """One line of the table, at once: the next takes a while."""
    print("|", " | ".join([*cells, "" if met is None else "yes" if met else "NO"]), "|", flush=True)


def compare(name: str, aim: float, pairs: list[tuple[Figures, Figures]], which: int = 0) -> None:
    """Ratio of the medians, spread of the ratios of each floor and the program run after it."""
    floors, programs = ([run[which] for run in runs] for runs in zip(*pairs))
    floor, program = statistics.median(floors), statistics.median(programs)
    ratio, ratios = program / floor, [b / a for a, b in zip(floors, programs)]
    row(name, *(f"{value:.1f} MiB" if which else f"{value:.3f} s" for value in (floor, program)),
        f"{ratio:.2f} ({min(ratios):.2f}-{max(ratios):.2f})", f"<= {aim}", met=ratio <= aim)


def rows_without_browser(rounds: int) -> None:
    bare, status, again = (sys.executable, "-c", imports_of_program()), (*RUN, "--status"), range(rounds)
    with scene() as (folder, broker):
        script = f"{bare[2]}\n{BARE_CALL}\ncall(sys.argv[1], Authorization=sys.argv[2])"
        call = (*bare[:2], script, f"{broker.api}/v2/user/profile", f"Bearer {[*broker.tokens][0]}")
        pairs = [(measure(folder, *call), measure(folder, *status)) for _ in again]
        compare("`--status`, six tokens", 1.25, pairs)
        together = broker.max_profiles_in_flight
        row("profile calls in flight together", "", str(together), "", "6", met=together == 6)
        measure(folder, sys.executable, "-X", "importtime", *status[1:])
        extra = " ".join(sorted(set(re.findall("selenium|pyotp", (folder / "log").read_text()))))
        row("imported by `--status`: selenium, pyotp", "", extra or "none", "", "none", met=not extra)
        compare("`--help`", 1.2, [(measure(folder, *bare), measure(folder, *RUN, "--help")) for _ in again])
        compare("INVALID_ONLY with nothing to do (floor: `--status`)", 1.1, [
            (measure(folder, *status), measure(folder, *RUN, "--mode", "INVALID_ONLY")) for _ in again])
        (folder / ".env").write_text("UPSTOX_PIN=12\n", encoding="utf-8")
        compare("a configuration error", 1.2, [
            (measure(folder, *bare), measure(folder, *status, code=2)) for _ in again])
    compare("peak memory, status", 1.3, pairs, 1)


def rows_of_server(rounds: int) -> None:
    """A server of its own for every check, since it shares one for 5 s."""
    pairs, rates = [], []
    for _ in range(rounds):
        with scene() as (folder, broker), started(folder, *RUN, "--serve", "127.0.0.1:0"):
            url = logged(folder, r"http://\S+")
            get(url + "healthz")
            trip = get(broker.api + "/v2/user/profile", Authorization=f"Bearer {[*broker.tokens][0]}")
            pairs.append(((trip,), (get(url + "auth/upstox/tokens/status"),)))
            rates.append(requests_a_second(url + "auth/upstox/tokens/status"))
    compare("`--serve`, a whole check (floor: one profile call)", 1.25, pairs)
    spread = f"({min(rates)}-{max(rates)})"
    row("`--serve`, status requests a second, 8 clients", "", f"{statistics.median(rates):.0f}", spread, "")


def requests_a_second(url: str) -> int:
    done, end = [0] * 8, time.monotonic() + 1

    def work(place: int) -> None:
        while time.monotonic() < end:
            get(url)
            done[place] += 1

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for act in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            act(thread)
    return sum(done)


def early_in_window() -> None:
    """Late in a window a run has to wait for the next code, which is no cost of its own."""
    left = WINDOW - time.time() % WINDOW
    time.sleep(left if left < 12 else 0)


def login_pairs(count: int, rounds: int, tails: list[float]) -> list[tuple[Figures, Figures]]:
    """Bare script and program in turn; `tails` gets the bare seconds after the code."""
    pairs = []
    for _ in range(rounds):
        early_in_window()
        with scene(count) as (folder, broker):
            values = [broker.api, REDIRECT_URI, MOBILE, TOTP_SECRET, PIN, list(APPS.values())[:count]]
            floor = measure(folder, sys.executable, "-c", BARE_LOGIN, json.dumps(values))
            tails.append(float((folder / "log").read_text()))
        early_in_window()
        with scene(count) as (folder, _):
            pairs.append((floor, measure(folder, *RUN, "--mode", "ALL")))
    return pairs


def rows_of_logins(rounds: int) -> float:
    """Complete logins; the seconds that the bare steps after a code take."""
    six, tails = login_pairs(6, rounds, []), []
    compare("ALL, six apps, browser remembered", 1.2, six)
    compare("one app", 1.2, login_pairs(1, rounds, tails))
    extra = "import pyotp\nfrom selenium.webdriver import ChromeOptions, Remote\ntime.sleep(0.2)"
    with scene() as (folder, _):
        bare = measure(folder, sys.executable, "-c", f"{imports_of_program()}\n{extra}")
    compare("peak memory, six logins", 1.3, [(bare, program) for _, program in six], 1)
    return statistics.median(tails)


def row_of_wait(name: str, used: float, waited: float = WINDOW) -> None:
    used *= WINDOW / waited
    row(f"processor seconds while it waits {WINDOW} s for {name}", "", f"{used:.2f} s", "", "< 0.3 s",
        met=used < 0.3)


def rows_of_windows(tail: float) -> None:
    """Three apps that each need a code of their own; the third one's wait is watched."""
    early_in_window()
    with scene(3, remember=False) as (folder, broker), started(folder, *RUN, "--mode", "ALL") as process:
        begun = time.time()
        wait_for(lambda: broker.count("generate") == 3, folder)
        time.sleep(1)  # then it has seen the page and waits
        waited, used = WINDOW - 1 - time.time() % WINDOW, processor(process)
        time.sleep(waited)
        used = processor(process) - used
        wait_for(lambda: process.poll() is not None, folder)
        took = time.time() - begun
    floor = (begun // WINDOW + 2) * WINDOW - begun + tail
    row("ALL, three apps, nothing remembered", f"{floor:.1f} s", f"{took:.1f} s", f"{took - floor:+.1f} s",
        "<= +3 s", met=process.returncode == 0 and took <= floor + 3)
    row_of_wait("a TOTP window", used, waited)


def rows_of_waits() -> None:
    """An approval that never comes and a CAPTCHA that nobody solves, at once; a signal ends both."""
    with contextlib.ExitStack() as stack:
        enter, runs = stack.enter_context, {}
        folder, _ = enter(scene(1, notifier_url="http://127.0.0.1:9/told"))
        runs["an approval"] = enter(started(folder, *RUN, "--mode", "ALL", "--flow", "V3",
                                            "--serve", "127.0.0.1:0"))
        logged(folder, "waiting for approval")
        if shutil.which("Xvfb"):
            folder, _ = enter(scene(1, captcha="never"))
            enter(started(folder, "Xvfb", "-displayfd", "1"))
            display = ":" + logged(folder, r"(?m)^\d+$")
            runs["a CAPTCHA"] = enter(started(folder, *RUN, "--mode", "ALL", "--headed", DISPLAY=display))
            logged(folder, "solve the CAPTCHA")
        used = {name: processor(run) for name, run in runs.items()}
        time.sleep(WINDOW)
        for name, run in runs.items():
            row_of_wait(name, processor(run) - used[name])


def bench(quick: bool) -> int:
    """Print the table: 5 minutes, 1 with --quick (2 rounds, without the waits for a window and a person)."""
    if problem := missing_for_browser() or "bench reads /proc of Linux" * (sys.platform != "linux"):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    rounds = 2 if quick else 5
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    version = subprocess.run([browser, "--version"], capture_output=True, text=True).stdout.split(" built")[0]
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, {version.strip()}; medians of "
          f"{rounds} (spread of the ratios); seconds: {PACE}\n")
    print("| row | floor | program | ratio | aim | met? |\n|---|---|---|---|---|---|")
    rows_without_browser(rounds)
    rows_of_server(rounds)
    tail = rows_of_logins(rounds)
    if not quick:
        rows_of_windows(tail)
        rows_of_waits()
    return 0


def run_all() -> int:
    """Every test class in a process of its own, as many at once as there are cores; the slow ones first."""
    slow = ["RefusalTest", "StressTest", "VariantTest", "StopTest", "PrivacyTest"]
    cases = unittest.defaultTestLoader.loadTestsFromName("__main__")
    names = sorted({type(test).__name__ for suite in cases for test in suite}, key=lambda n: n not in slow)
    passed = failed = skipped = 0

    def run_class(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "unittest", f"{Path(__file__).stem}.{name}"]
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)

    with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        for name, done in zip(names, pool.map(run_class, names)):
            ran = int((re.search(r"^Ran (\d+) test", done.stderr, re.M) or [0, 0])[1])
            bad = sum(map(int, re.findall(r"(?:failures|errors)=(\d+)", done.stderr)))
            bad = bad or int(done.returncode != 0)
            skips = sum(map(int, re.findall(r"skipped=(\d+)", done.stderr)))
            passed, failed, skipped = passed + ran - bad - skips, failed + bad, skipped + skips
            print(f"{name:<28} {ran:>3} tests, {bad} failed, {skips} skipped", flush=True)
            if bad or skips:
                print(done.stderr, flush=True)
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    tools = {"rehearse": rehearse, "stress": lambda: stress(sys.argv[2:]),
             "bench": lambda: bench("--quick" in sys.argv)}
    if len(sys.argv) == 1:
        raise SystemExit(run_all())
    if sys.argv[1] in tools:
        raise SystemExit(tools[sys.argv[1]]())
    unittest.main()
