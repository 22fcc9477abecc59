"""What reaches the server at all: a few routes, small requests, this host's own pages.

Gradio serves much that this page never uses (uploads to disk, files by path, a proxy): a list of
what is needed closes the rest, and whatever a later version adds. The values that a page sends are
text, numbers and nothing else, so no client can name a file of this machine in place of a value.
"""

import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

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

JOIN, DATA = "/gradio_api/queue/join", "/gradio_api/queue/data"
SESSION = re.compile(r"\w{1,64}")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
IN_FLIGHT = 8  # requests of the largest size whose bytes may be in memory together

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


class Refused(Exception):
    """An answer in place of what was asked for."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class Guard:
    """ASGI middleware around a Gradio application.

    It refuses hosts other than this machine's (403: another name may be a stranger's page that
    points at this address), requests of other pages (403), routes that the page does not need
    (404), requests of more than `max_request` bytes (413) and messages that the page would not send
    (400), and puts a content security policy on every answer.

    functions: the numbers of the page's functions. hosts: names to answer to beside the loopback
    ones; None = any address in digits too, which no foreign name can stand for."""

    def __init__(
        self,
        app: Any,
        max_request: int,
        functions: Collection[int] = (),
        hosts: Collection[str] | None = (),
    ):
        self.app, self.max_request, self.functions, self.hosts = app, max_request, functions, hosts
        self.in_flight = 0  # bytes of the messages that are being read

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page opens no socket
            await send({"type": "websocket.close"})
            return
        started = False

        async def with_policy(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            self.check(scope)
            await self.serve(scope, receive, with_policy)
        except Refused as refusal:
            if not started:
                await refuse(send, refusal.status, refusal.reason)

    def check(self, scope: Message) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if not self.answers_to(host):
            raise Refused(403, "this page is served to this machine's own names only")
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc != host:
            raise Refused(403, "this request comes from another page")
        if not ROUTES.fullmatch(scope["path"]):
            raise Refused(404, "there is nothing here")
        length = headers.get(b"content-length", "")
        if length.isdigit() and int(length) > self.max_request:
            raise Refused(413, "this request is too large")
        query = scope.get("query_string", b"")
        scope["query_string"] = b""  # of what a query can ask Gradio for the page needs one thing
        if scope["path"].rstrip("/") == DATA:
            sessions = parse_qs(query.decode("latin-1")).get("session_hash", [])
            if len(sessions) != 1 or not SESSION.fullmatch(sessions[0]):
                raise Refused(400, "there is no such session")
            scope["query_string"] = f"session_hash={sessions[0]}".encode()

    def answers_to(self, host: str) -> bool:
        """host: a request's header, a name or an address, perhaps with a port."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in (*LOOPBACK, *(self.hosts or ())):
            return True
        return self.hosts is None and is_address(name)

    async def serve(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["path"].rstrip("/") != JOIN:
            taken = 0

            async def limited() -> Message:
                nonlocal taken
                message = await receive()
                taken += len(message.get("body", b""))
                if taken > self.max_request:
                    raise Refused(413, "this request is too large")
                return message

            await self.app(scope, limited, send)
            return
        body = self.message(await self.read(receive))
        replaced = {b"content-type": b"application/json", b"content-length": b"%d" % len(body)}
        headers = [(k, v) for k, v in scope["headers"] if k not in replaced]
        headers += replaced.items()
        parts = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replayed() -> Message:
            return next(parts, None) or await receive()

        await self.app({**scope, "headers": headers}, replayed, send)

    async def read(self, receive: Receive) -> bytes:
        """The whole body of a request."""
        body = b""
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "this request broke off")
                more = message.get("body", b"")
                self.in_flight += len(more)
                body += more
                if len(body) > self.max_request:
                    raise Refused(413, "this request is too large")
                if self.in_flight > IN_FLIGHT * self.max_request:
                    raise Refused(503, "this server is busy: try again")
                if not message.get("more_body"):
                    return body
        finally:
            self.in_flight -= len(body)

    def message(self, body: bytes) -> bytes:
        """A click as the page sends it and nothing beside it: a function's number, its values and
        the session. Raises Refused for any other message."""
        try:
            asked = json.loads(body)
            function, values = asked["fn_index"], asked["data"]
            session, trigger = asked["session_hash"], asked.get("trigger_id")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise Refused(400, "this is no message of the page") from None
        if type(function) is not int or function not in self.functions:
            raise Refused(400, "the page has no such function")
        if not isinstance(session, str) or not SESSION.fullmatch(session):
            raise Refused(400, "there is no such session")
        if not isinstance(values, list) or not all(
            value is None or isinstance(value, str | int | float) for value in values
        ):
            raise Refused(400, "the page sends texts and numbers only")
        kept = {"fn_index": function, "data": values, "session_hash": session}
        kept["trigger_id"] = trigger if type(trigger) is int else None
        return json.dumps({**kept, "event_data": None}).encode()


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})
