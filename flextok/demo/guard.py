"""What reaches the server at all: a few routes, small requests, this host's own pages.

Gradio refuses malformed messages, unknown choices and numbers out of range by itself. It does not
look at host names, origins and the sizes of requests, and it serves much that this page never uses
(uploads to disk, files by path, a proxy): a list of what is needed closes the rest.
"""

import ipaddress
import re
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROUTES = re.compile(
    r"/|/config|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt|/(assets|static|svelte)/.+"
    r"|/gradio_api/(queue/(join|data)|heartbeat/\w+|info|app_id|startup-events|theme\.css|cancel"
    r"|reset)/?"
)
# the browser too refuses to ask anybody else
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'self'; "
    "base-uri 'self'; form-action 'self'"
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")
IN_FLIGHT = 8  # requests of the largest size that may be in memory together


class Guard:
    """ASGI middleware around a Gradio application.

    It refuses hosts other than this machine's (403: another name may be a stranger's page that
    points at this address), requests of other pages (403), routes that the page does not need
    (404) and requests of more than `max_request` bytes (413), and puts a content security policy
    on every answer. hosts: names to answer to beside the loopback ones; None = any address in
    digits too, which no foreign name can stand for."""

    def __init__(self, app: ASGIApp, max_request: int, hosts: Collection[str] | None = ()):
        self.app, self.max_request, self.hosts = app, max_request, hosts
        self.in_flight = 0  # bytes of the requests that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page opens no socket
            await send({"type": "websocket.close"})
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message = {**message, "headers": [*message["headers"], policy]}
            await send(message)

        headers = Headers(scope=scope)
        length = int(headers.get("content-length", 0))  # the server holds bodies to it
        if refusal := self.refusal(scope["path"], headers, length):
            status, reason = refusal
            answer = PlainTextResponse(reason, status, {"connection": "close"})
            await answer(scope, receive, send)
            return
        self.in_flight += length
        try:
            await self.app(scope, receive, with_policy)
        finally:
            self.in_flight -= length

    def refusal(self, path: str, headers: Headers, length: int) -> tuple[int, str] | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.answers_to(host):
            return 403, "this page is served to this machine's own names only"
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "this request comes from another page"
        if not ROUTES.fullmatch(path):
            return 404, "there is nothing here"
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
            name = urlsplit(f"//{host}").hostname or ""
            if name in (*LOOPBACK, *(self.hosts or ())):
                return True
            return self.hosts is None and bool(ipaddress.ip_address(name))
        except ValueError:
            return False
