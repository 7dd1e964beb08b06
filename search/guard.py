"""The guard in front of the dashboard: passwords, foreign sites, and changes where only reading is allowed.

It knows nothing of the pages behind it: no route of theirs, now or in a later version, can be reached around it.
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import re
import secrets
import threading
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from pydantic import SecretStr

log = logging.getLogger(__name__)

TRIES, TRY_SECONDS = 10, 6.0  # wrong passwords from one address: this many at once, then one in so many seconds
ADDRESSES = 10_000  # at most so many addresses are remembered
TRUSTED_COOKIE = "trialyard"  # name of the cookie of a browser that sent the right password before
SAFE_METHODS = ("GET", "HEAD")
HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "SAMEORIGIN"),  # a frame on another site could trick its visitor into a click on "delete"
    ("Referrer-Policy", "same-origin"),
)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at `host`: a loopback address, or ``localhost``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def guarded(app: WSGIApplication, *, local: bool, password: SecretStr | None, read_only: bool) -> WSGIApplication:
    """`app` behind the guard: only allowed requests reach it.

    With a `password`, HTTP Basic asks for it, with any user name. The browser has the dialog, so no login page or
    session can be forged or stolen. After too many wrong passwords an address gets 429 for a while, whatever
    it sends. Browsers that sent the right password before are exempt; their cookie gives no access by itself. `local`
    means that the server listens on this machine alone.
    """
    # Digests have one length, so comparing them does not even reveal the password's length.
    expected = None if password is None else _digest(password.get_secret_value().encode())
    throttle, trusted = LoginThrottle(), secrets.token_urlsafe()

    def guard(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        # The application never sees the password, so it cannot log it.
        given = environ.pop("HTTP_AUTHORIZATION", "")
        environ.setdefault("HTTP_ACCEPT_ENCODING", "")  # the package raises KeyError without it
        if local and not _names_this_machine(environ.get("HTTP_HOST", "")):
            # DNS rebinding: a foreign site whose name resolves to 127.0.0.1 could read and write as its own page.
            return _refused(start, "403 Forbidden", "open the dashboard as localhost or 127.0.0.1")
        address = environ.get("REMOTE_ADDR", "")
        untrusted = expected is not None and not hmac.compare_digest(
            _trusted_cookie(environ.pop("HTTP_COOKIE", "")), trusted
        )
        if untrusted and given and (seconds := throttle.retry_after(address)):
            retry_after = ("Retry-After", str(seconds))
            return _refused(start, "429 Too Many Requests", f"too many wrong passwords: wait {seconds} s", retry_after)
        if expected is not None and not hmac.compare_digest(_digest(_password_in(given)), expected):
            if given:
                log.warning("a wrong password came from %s", address)
                throttle.record_failure(address)
            challenge = ("WWW-Authenticate", 'Basic realm="Trialyard", charset="UTF-8"')
            return _refused(start, "401 Unauthorized", "the password is needed, with any user name", challenge)
        if environ["REQUEST_METHOD"] not in SAFE_METHODS:
            if read_only:
                return _refused(start, "403 Forbidden", "this dashboard is read-only")
            if not _from_own_page(environ):
                return _refused(start, "403 Forbidden", "another site's page may not change anything here")

        def start_with_headers(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            # The package allows every site to read artifacts.
            kept = [header for header in headers if header[0].lower() != "access-control-allow-origin"]
            if environ["PATH_INFO"].startswith("/artifacts/"):
                # A user's file must not run as a page of this server.
                kept.append(("Content-Security-Policy", "sandbox"))
            if untrusted:
                kept.append(("Set-Cookie", f"{TRUSTED_COOKIE}={trusted}; Path=/; HttpOnly; SameSite=Strict"))
            return start(status, [*kept, *HEADERS], *error)

        return app(environ, start_with_headers)

    return guard


class LoginThrottle:
    """Slows down guessing: an address may send TRIES wrong passwords at once, then one every TRY_SECONDS.

    Only wrong passwords count. The counts are in memory: a restart clears them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # requests are answered by several threads
        self._until: dict[str, float] = {}  # when the count is back at zero, by `time.monotonic`

    def retry_after(self, address: str) -> int:
        """Whole seconds until `address` may try again; 0: now."""
        with self._lock:
            seconds = self._until.get(_network(address), 0.0) - time.monotonic()
        return max(0, math.ceil(seconds - (TRIES - 1) * TRY_SECONDS))

    def record_failure(self, address: str) -> None:
        """Counts a wrong password."""
        now, network = time.monotonic(), _network(address)
        with self._lock:
            if len(self._until) >= ADDRESSES:
                self._until = {key: until for key, until in self._until.items() if until > now}
            self._until[network] = max(now, self._until.pop(network, now)) + TRY_SECONDS
            if len(self._until) > ADDRESSES:
                del self._until[next(iter(self._until))]


def _network(address: str) -> str:
    # One IPv6 host usually has a whole /64 network, which is 2**64 addresses.
    try:
        return str(ipaddress.ip_network((address, 64), strict=False)) if ":" in address else address
    except ValueError:
        return address


def _trusted_cookie(cookies: str) -> str:
    match = re.search(rf"(?:^|;) *{TRUSTED_COOKIE}=([\w-]*)", cookies, re.ASCII)
    return match[1] if match else ""


def _digest(password: bytes) -> bytes:
    return hashlib.sha256(password).digest()


def _password_in(header: str) -> bytes:
    scheme, _, coded = header.partition(" ")
    if scheme.lower() != "basic":
        return b""
    try:
        return base64.b64decode(coded.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return b""


def _names_this_machine(host: str) -> bool:
    # The port does not matter: a tunnel may use another one at its far end.
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def _from_own_page(environ: WSGIEnvironment) -> bool:
    """Whether a request that changes something comes from our own page, or from no page at all.

    Every browser sends at least one of these three headers with such a request. A request without them comes from a
    program, which a foreign page cannot control. `Sec-Fetch-Site` goes first, because a proxy that ends TLS changes
    `Host`.
    """
    site = environ.get("HTTP_SEC_FETCH_SITE")
    if site is not None:
        return bool(site == "same-origin")
    for header in ("HTTP_ORIGIN", "HTTP_REFERER"):
        if header in environ:
            try:
                return bool(urlsplit(environ[header]).netloc == environ.get("HTTP_HOST", ""))
            except ValueError:
                return False
    return True


def _refused(start: StartResponse, status: str, reason: str, *headers: tuple[str, str]) -> list[bytes]:
    # The page shows `reason` to its user.
    body = json.dumps({"reason": reason}).encode()
    start(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers, *HEADERS])
    return [body]


# --- the pages --------------------------------------------------------------------------------------------
