"""Who may use the page: the host header, the token, and the origin of what changes something are checked.

A page on the internet that a browser has open can send requests to this one, too. It cannot read the answers,
but it could start or stop a run; and with a name that it resolves to this machine, it could read.
"""

from __future__ import annotations

import hmac
import ipaddress
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES = 2**23
COOKIE = "sdlora-token"
SAFE_METHODS = ("GET", "HEAD")
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, seen from itself alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Refuses requests before any page sees them.

    Args:
        app: What answers the others.
        token: Asked for in `?token=` once, then kept in a cookie; None where only this machine can connect.
    """

    def __init__(self, app: ASGIApp, token: str | None = None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        answer = self._refuse(scope["method"], headers) or self._ask_token(scope, headers)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await (answer or self.app)(scope, receive, send_guarded)

    def _refuse(self, method: str, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if self.token is None and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return PlainTextResponse("this page answers to localhost only", 421)
        if method in SAFE_METHODS:
            return None
        # Every browser sends at least one of them with a POST.
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        is_own = origin is not None and urlsplit(origin).netloc == host
        if site != "same-origin" if site is not None else not is_own:
            return PlainTextResponse("a request from another site was refused", 403)
        length = headers.get("content-length", "")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return PlainTextResponse("the request is too large", 413)
        return None

    def _ask_token(self, scope: Scope, headers: Headers) -> Response | None:
        if self.token is None:
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        if given := dict(query).get("token"):
            if self._is_token(given):
                rest = urlencode([pair for pair in query if pair[0] != "token"])
                answer = RedirectResponse(f"{scope['path']}?{rest}".rstrip("?"), 303)
                answer.set_cookie(COOKIE, given, httponly=True, samesite="strict")
                return answer
        else:
            cookies: SimpleCookie = SimpleCookie()
            try:
                cookies.load(headers.get("cookie", ""))
            except CookieError:
                cookies.clear()
            if COOKIE in cookies and self._is_token(cookies[COOKIE].value):
                return None
        return PlainTextResponse("open the address that `sdlora studio` printed; it has the token", 401)

    def _is_token(self, given: str) -> bool:
        assert self.token is not None
        return hmac.compare_digest(given.encode(), self.token.encode())
