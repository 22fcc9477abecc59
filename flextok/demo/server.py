"""The page on a port of this machine."""

import contextlib
import socket

import uvicorn
from starlette.types import ASGIApp

MAX_CONNECTIONS = 256
FIRST_PORT, LAST_PORT = 7860, 7959


def listen(host: str, port: int | None) -> socket.socket:
    """A socket on that port, by default the first free one from FIRST_PORT. Raises ValueError."""
    ports = range(FIRST_PORT, LAST_PORT + 1) if port is None else [port]
    for candidate in ports:
        try:
            return socket.create_server((host, candidate), backlog=128)
        except (OSError, OverflowError) as error:
            reason = error
    raise ValueError(f"cannot serve on {host}, port {candidate}: {reason}; choose another --port")


def make_server(app: ASGIApp) -> uvicorn.Server:
    config = uvicorn.Config(app, log_level="warning", server_header=False)
    config.timeout_graceful_shutdown, config.limit_concurrency = 1, MAX_CONNECTIONS
    return uvicorn.Server(config)


def serve(app: ASGIApp, host: str = "127.0.0.1", port: int | None = None) -> None:
    """Serve until Ctrl-C."""
    with listen(host, port) as place:
        print(f"open {address(place)} in a browser; Ctrl-C ends it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            make_server(app).run(sockets=[place])


def address(place: socket.socket) -> str:
    host, port = place.getsockname()[:2]
    return f"http://{host}:{port}/"
