"""What reaches the server at all: a few routes, small requests, this host's own pages.

Gradio serves much that this page never uses (uploads to disk, files by path, a proxy): a list of
what is needed closes the rest, and whatever a later version adds.
"""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

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

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]


class TooLarge(Exception):
    """A request that grew beyond the limit while it was read."""


class Guard:
    """ASGI middleware: 404 for routes that the page does not need, 413 for requests of more than
    `max_request` bytes, and a content security policy on every answer."""

    def __init__(self, app: Any, max_request: int):
        self.app, self.max_request = app, max_request

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":  # the page opens no socket
            await send({"type": "websocket.close"})
        elif not ROUTES.fullmatch(scope["path"]):
            await refuse(send, 404, "there is nothing here")
        elif announced(scope) > self.max_request:
            await refuse(send, 413, "this request is too large")
        else:
            await self.serve(scope, receive, send)

    async def serve(self, scope: Message, receive: Receive, send: Send) -> None:
        taken, started = 0, False

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_request:
                raise TooLarge
            return message

        async def with_policy(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, limited, with_policy)
        except TooLarge:
            if not started:
                await refuse(send, 413, "this request is too large")


def announced(scope: Message) -> int:
    """The request's length as its header says; 0 where it does not, or not in digits."""
    length = dict(scope["headers"]).get(b"content-length", b"")
    return int(length) if length.isdigit() else 0


async def refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})
