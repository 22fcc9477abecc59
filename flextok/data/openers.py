"""Opens a shard for reading from its beginning to its end: a local file, an http(s) address, or
what a command of the user's own writes. No shell is ever started, and no address names a command:
addresses may come from a downloaded index, which is data."""

import http.client
import os
import re
import shlex
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urljoin

SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]+)\s*:")  # two letters or more: C:\ is a drive
# an address from a file, as one word of a command: nothing in it that a shell behind it would read
SAFE = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://[\w./~:=%+@,-]+")
BUSY = (429, 500, 502, 503, 504)  # answers of a server that may give another one later
HANDLERS = (  # none for file:, data: and ftp:
    *(urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler),
    *(urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor),
    urllib.request.HTTPDefaultErrorHandler,
)
WAITS = (1, 3, 9)  # seconds before an address that failed for now is asked again
TIMEOUT = 60  # seconds without a byte
DRAINED = 64  # MB read behind a tar's end, to see how a transfer ends


def is_remote(url: str) -> bool:
    return "://" in url


def is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def parse_fetch(fetch: str | Sequence[str] | None) -> list[str] | None:
    """A command that writes the shard {url} to its standard output, as its words. Raises ValueError
    for one without {url}, or whose program is not there."""
    if fetch is None:
        return None
    words = shlex.split(fetch) if isinstance(fetch, str) else list(fetch)
    if not any("{url}" in word for word in words):
        raise ValueError(f"fetch={fetch!r} must say where the address goes: aws s3 cp {{url}} -")
    if shutil.which(words[0]) is None:
        raise ValueError(f"fetch={fetch!r}: there is no program {words[0]!r}")
    return words


def check_address(url: str, fetch: list[str] | None) -> str:
    """An address that the user named. Raises ValueError for one that nothing here opens."""
    if SCHEME.match(url) and not is_http(url) and (fetch is None or not is_remote(url)):
        raise ValueError(
            f"urls={url!r} is neither a file nor an http(s) address: name the command that reads "
            "it as fetch, for example fetch='aws s3 cp {url} -' for s3:// or "
            "fetch='gsutil cat {url}' for gs://"
        )
    return url


def check_listed(index: str, url: object, fetch: list[str] | None) -> str:
    """A shard's address in the file `index`: http(s) or a path, relative to the index; another
    scheme where the user's fetch reads it. Raises ValueError for anything else."""
    if not isinstance(url, str) or not url or "\0" in url:
        raise ValueError(f"{index} lists {url!r}, which is no address of a shard")
    whole = urljoin(index, url) if is_http(index) else url
    is_safe = SAFE.fullmatch(whole) is not None
    if is_http(whole) and (fetch is None or is_safe):
        return whole
    if not is_http(index):
        path = Path(index).expanduser().parent / url
        if os.path.isfile(path) or (fetch is None and not SCHEME.match(url)):
            return str(path.absolute())
    if fetch is not None and is_safe:
        return whole
    raise ValueError(
        f"{index} lists {url!r}: a shard in an index is an http(s) address or a path; one that a "
        "command (fetch) reads looks like s3://bucket/a.tar, without signs that a shell reads"
    )


def open_shard(url: str, fetch: list[str] | None = None) -> AbstractContextManager[IO[bytes]]:
    """The bytes of a shard. Raises OSError where it cannot be opened, and at the end of the block
    where the transfer broke off."""
    if fetch is not None:
        return from_command([word.replace("{url}", url) for word in fetch])
    if is_http(url):
        return from_web(url)
    if not os.path.isfile(url):
        raise FileNotFoundError(f"{url} is no file")
    return open(url, "rb")


def drain(stream: IO[bytes]) -> None:
    for _ in range(DRAINED):
        if not stream.read(1 << 20):
            break


@contextmanager
def from_command(words: list[str]) -> Iterator[IO[bytes]]:
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
            drain(process.stdout)
        except BaseException:  # left before its end, too
            process.kill()
            raise
    if process.returncode not in (0, -13, 141):  # 13: SIGPIPE, for a reader that had enough
        raise OSError(f"{shlex.join(words)} ended with {process.returncode}")


@contextmanager
def from_web(url: str) -> Iterator[IO[bytes]]:
    with answer(url) as response:
        yield response
        drain(response)
        if response.length:  # what was announced and has not come
            raise OSError(f"{url} broke off {response.length} bytes before its end")


def answer(url: str) -> http.client.HTTPResponse:
    """The answer of an http(s) server, which may redirect to http(s) only."""
    opener = urllib.request.OpenerDirector()
    for kind in HANDLERS:
        opener.add_handler(kind())
    request = urllib.request.Request(url, headers={"User-Agent": "flextok"})
    for wait in (*WAITS, None):
        try:
            response = opener.open(request, timeout=TIMEOUT)
        except OSError as error:
            final = isinstance(error, urllib.error.HTTPError) and error.code not in BUSY
            if wait is None or final:
                raise
        else:
            if not isinstance(response, http.client.HTTPResponse):
                raise OSError(f"{url} redirects to an address that is not http(s)")
            return response
        time.sleep(wait)
    raise AssertionError("the last attempt raises")
