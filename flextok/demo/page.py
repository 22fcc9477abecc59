"""The page as an ASGI application: its files, what it shows at the start, and the models' work."""

import asyncio
import json
from collections.abc import AsyncIterator, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from flextok.demo import guard
from flextok.demo.source import Asked
from flextok.demo.studio import Studio
from flextok.demo.upload import Limits
from flextok.schema import from_mapping

FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
LONGEST_ERROR = 500  # characters: an error may repeat the value that caused it


def make_app(
    studio: Studio,
    limits: Limits,
    max_queue: int = 16,
    hosts: Collection[str] = (),
    addresses: bool = False,
) -> guard.Guard:
    """max_queue: requests that may wait while one is worked on; more are turned away. hosts,
    addresses: what to answer to, see Guard."""
    folder = resources.files("flextok.demo")
    texts = {path: folder.joinpath(name).read_text("utf-8") for path, (name, _) in FILES.items()}
    start = studio.describe(limits)

    def file(request: Request) -> Response:
        path = request.url.path
        return Response(texts[path], media_type=FILES[path][1])

    def models(request: Request) -> Response:
        return JSONResponse(start)

    routes = [Route(path, file) for path in FILES]
    routes.append(Route("/models.json", models))
    routes.append(Route("/draw", Draw(studio, limits, max_queue), methods=["POST"]))
    return guard.Guard(Starlette(routes=routes), limits.max_request, hosts, addresses)


class Draw:
    """Answers a request for images, a line of JSON for each step of the work.

    One thread does all of it and takes a step of each request in turn, so that a long one holds up
    nobody. The work ends where its client leaves."""

    def __init__(self, studio: Studio, limits: Limits, max_queue: int):
        self.studio, self.limits, self.most = studio, limits, max_queue + 1
        self.worker = ThreadPoolExecutor(1, "models")
        self.requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.requests >= self.most:
            answer: Response = PlainTextResponse("the server is busy: try again later", 503)
            await answer(scope, receive, send)
            return
        self.requests += 1
        try:
            answer = await self.answer(Request(scope, receive))
            await answer(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self.requests -= 1

    async def answer(self, request: Request) -> Response:
        try:
            body = await asyncio.wait_for(request.body(), guard.PATIENCE)
            asked = from_mapping(Asked, json.loads(body))
            steps = self.studio.draw(asked, self.limits)
            first = await self.step(steps)
        except TimeoutError:
            return PlainTextResponse("the request did not arrive in time", 408)
        except (ValueError, RecursionError) as error:  # a mistake of the client
            reason = str(error)[:LONGEST_ERROR].encode("utf-8", "backslashreplace")
            return PlainTextResponse(reason, 400)
        return StreamingResponse(self.lines(first, steps), media_type="application/x-ndjson")

    async def lines(
        self, message: dict[str, Any] | None, steps: Iterator[dict[str, Any]]
    ) -> AsyncIterator[str]:
        while message is not None:
            yield json.dumps(message) + "\n"
            try:
                message = await self.step(steps)
            except ValueError as error:
                yield json.dumps({"error": str(error)[:LONGEST_ERROR]}) + "\n"
                return

    async def step(self, steps: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        return await asyncio.get_running_loop().run_in_executor(self.worker, next, steps, None)
