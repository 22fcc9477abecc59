"""Which requests are served at all: small ones, addressed to this machine, from its own page."""

import asyncio
import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# the browser itself refuses what is not listed: other hosts, and scripts written into the page
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
SECURITY = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-cache"),
]
LOOPBACK = ("localhost", "127.0.0.1", "::1")
IN_FLIGHT = 8  # requests of the largest size that may be in memory together
PATIENCE = (
    60.0  # seconds that a client may take to send its request, or to read a part of an answer
)


class Guard:
    """ASGI middleware.

    It refuses hosts other than this machine's (403: another name may be a stranger's page that
    points at this address), requests of other pages (403) and requests of more than `max_request`
    bytes (413), ends those of clients that neither send nor read, and puts a content security
    policy on every answer. hosts: names to answer to beside the loopback ones, in capitals or not.
    addresses: answer to any address in digits too, which no foreign name can stand for."""

    def __init__(
        self,
        app: ASGIApp,
        max_request: int,
        hosts: Collection[str] = (),
        addresses: bool = False,
    ):
        self.app, self.max_request, self.addresses = app, max_request, addresses
        self.hosts = {host.lower() for host in (*LOOPBACK, *hosts)}
        self.in_flight = 0  # bytes of the requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page opens no socket
            await send({"type": "websocket.close"})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *SECURITY]}
            await asyncio.wait_for(send(message), PATIENCE)

        headers = Headers(scope=scope)
        length = int(headers.get("content-length", 0))  # the server holds bodies to it
        if refusal := self.refusal(headers, length):
            status, reason = refusal
            answer = PlainTextResponse(reason, status, {"connection": "close"})
            await answer(scope, receive, guarded)
            return
        self.in_flight += length
        try:
            await self.app(scope, receive, guarded)
        except TimeoutError:
            pass  # the client reads no more
        finally:
            self.in_flight -= length

    def refusal(self, headers: Headers, length: int) -> tuple[int, str] | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.answers_to(host):
            return 403, "this page is served to this machine's own names only"
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return 403, "this request comes from another page"
        if "transfer-encoding" in headers:
            return 411, "this request does not state its length"
        if length > self.max_request:
            return 413, "this request is too large"
        if self.in_flight + length > IN_FLIGHT * self.max_request:
            return 503, "this server is busy: try again"
        return None

    def answers_to(self, host: str) -> bool:
        """host: a request's header, a name or an address, perhaps with a port."""
        try:
            name = urlsplit(f"//{host}").hostname or ""  # in small letters
            return name in self.hosts or (self.addresses and bool(ipaddress.ip_address(name)))
        except ValueError:
            return False
