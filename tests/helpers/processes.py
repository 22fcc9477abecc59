"""Commands of flextok in processes of their own, to be killed or to work together, without paying
for the imports each time: a fork server has done them."""

import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["flextok.training.run", "flextok.data.tokens", "flextok.cli"])


def _run(
    arguments: list[str], variables: dict[str, str], log: str, before: Callable | None
) -> None:
    os.environ.update(variables)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from flextok.cli import main

    if before is not None:
        before()
    sys.argv = ["flextok", *arguments]
    sys.exit(main(arguments))


def start(arguments, log: Path, before: Callable | None = None, **variables: object):
    """Start `flextok <arguments>`, its output appended to `log`, after a call of `before` in the
    new process. Returns the process."""
    texts = {name: str(value) for name, value in variables.items()}
    texts.setdefault("OMP_NUM_THREADS", "1")
    command = [str(a) for a in arguments]
    process = CONTEXT.Process(target=_run, args=(command, texts, str(log), before))
    process.start()
    return process


def start_ranks(count: int, arguments, log: Path, before: Callable | None = None):
    """Start `count` processes as torchrun would. Returns them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(
            arguments,
            log.with_suffix(f".{rank}.log"),
            before,
            RANK=rank,
            LOCAL_RANK=rank,
            WORLD_SIZE=count,
            LOCAL_WORLD_SIZE=count,
            GROUP_RANK=0,
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            TORCHELASTIC_RUN_ID="test",
        )
        for rank in range(count)
    ]


CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.truncate")


def die_before(change: int, folder: Path) -> None:
    """Kill this process before its change number `change`, from 1 on, of the files in `folder`. 0:
    write how many there were to <folder>.changes."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event == "open":
            _, mode, flags = arguments
            if (
                not any(c in mode for c in "wax+")
                if mode
                else not flags & (os.O_WRONLY | os.O_RDWR)
            ):
                return
        elif event not in CHANGES:
            return
        if not str(arguments[0]).startswith(f"{folder}/"):
            return
        count += 1
        if count == change:
            os.kill(os.getpid(), signal.SIGKILL)
        if not change:
            descriptor = os.open(f"{folder}.changes", os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, str(count).encode())
            os.close(descriptor)

    sys.addaudithook(hook)


def finish(*processes, timeout: float = 180) -> list[int | None]:
    """Wait for processes, at most `timeout` seconds. Returns their exit codes, None = killed."""
    for process in processes:
        process.join(timeout)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


@contextmanager
def served(app) -> Iterator[str]:
    """Serve the page in a thread while the context lasts: its address."""
    from flextok.demo.server import address, listen, make_server

    server = make_server(app)
    with listen("127.0.0.1", 0) as place:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]}, daemon=True)
        thread.start()
        try:
            yield address(place)
        finally:
            server.should_exit = True
            thread.join()
