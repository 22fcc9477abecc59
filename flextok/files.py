"""Files that are written whole or not at all, and one line about what could not be written."""

import errno
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

if sys.platform == "win32":
    import msvcrt

    def lock(file: IO[bytes]) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def lock(file: IO[bytes]) -> None:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by forked workers


log = logging.getLogger(__name__)
LOCK = ".lock"  # stays, empty; what counts is who has locked it
BUSY = "another process is at work in {folder}: wait until it ends, or name another folder"
LEFTOVER_AGE = 3600  # seconds
_held: dict[Path, int] = {}  # this process's folders, and the thread that has each
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota, a limit on a file's size


class WriteError(OSError):
    """What could not be written, why, and what to do, in one line."""


def atomic_write(path: Path, write: Callable[[Path], Any]) -> None:
    """Call write(temporary path), then rename: readers see the old file or the new one, whole, and
    it outlasts a power cut. Its mode is the umask's. Raises WriteError. What a killed process left
    aside is cleared by clear_leftovers."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with writing(path):
        try:
            temporary.touch()
            mode = temporary.stat().st_mode
            write(temporary)
            if temporary.stat().st_mode != mode:  # safetensors makes files that others cannot read
                temporary.chmod(mode)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file as atomic_write does, in UTF-8."""
    atomic_write(path, lambda place: place.write_text(text, encoding="utf-8"))


def check_writable(path: str | Path, name: str, folder: bool = False) -> None:
    """Raise ValueError where nothing can be written at a path: it is a folder, or, asked for a
    folder, a file; or what it would lie in is no folder, or may not be written. name: of the path,
    in the error."""
    place = Path(path)
    if folder and place.exists() and not place.is_dir():
        raise ValueError(f"{name} {path} is a file: name a folder")
    if not folder and place.is_dir():
        raise ValueError(f"{name} {path} is a folder: name a file")
    above = (place, *place.absolute().parents) if folder else place.absolute().parents
    nearest = next(p for p in above if os.path.lexists(p))
    if not nearest.is_dir():
        raise ValueError(f"{name} {path} cannot be written: {nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{name} {path} cannot be written: you may not write in {nearest}")


def read_mapping(path: Path, **types: type) -> dict[str, Any]:
    """The mapping in a JSON file. Raises ValueError when it is damaged, or
    lacks one of the keys in `types`, or has it of another type."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds a {type(found).__name__}, not a mapping)")
    for key, kind in types.items():
        value = found.get(key)
        right = isinstance(value, (int, float) if kind is float else kind)
        if not right or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{path} is damaged ({key}={value!r} must be of type {kind.__name__})")
    return found


Differences = dict[str, tuple[Any, Any]]  # dotted key -> what is there, what is asked for


def differences(there: Any, now: Any, key: str = "") -> Differences:
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        found: Differences = {}
        for name in {**there, **now}:
            found |= differences(there.get(name), now.get(name), f"{key}.{name}".lstrip("."))
        return found
    if isinstance(there, list) and isinstance(now, list) and len(there) == len(now):
        same = not any(map(differences, there, now))
    else:
        same = there == now or same_file(there, now)
    return {} if same else {key: (there, now)}


def same_file(there: Any, now: Any) -> bool:
    """Whether two texts name one file or folder, such as a relative and an absolute path."""
    both = isinstance(there, str) and isinstance(now, str)
    return both and os.path.exists(there) and os.path.exists(now) and os.path.samefile(there, now)


@contextmanager
def only_one(folder: Path, leave: bool = True) -> Iterator[None]:
    """Makes the folder this process's own for as long as it lives: a second one gets ValueError,
    and so does another thread; the same thread may enter again. A file system without locks gets a
    warning. leave: whether the lock's file stays."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    if key in _held:  # the system lets a process lock its own file twice
        if _held[key] != threading.get_ident():
            raise ValueError(BUSY.format(folder=folder))
        yield
        return
    with writing(folder / LOCK):
        file = open(folder / LOCK, "ab")  # noqa: SIM115
    with file:
        try:
            lock(file)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                raise ValueError(BUSY.format(folder=folder)) from None
            log.warning("%s: no locks here (%s): do not start a second run there", folder, error)
        if not is_at(file, folder / LOCK):  # the one that had it has removed the file
            raise ValueError(BUSY.format(folder=folder))
        _held[key] = threading.get_ident()
        try:
            yield
        finally:
            if not leave:
                with suppress(OSError):  # Windows removes no open file
                    (folder / LOCK).unlink()
            _held.pop(key, None)


def is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is the one that lies there."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def writing(path: Path, only_full: bool = False) -> Iterator[None]:
    """Makes errors of the operating system WriteErrors that name `path`. only_full: leave those
    alone that reading gives, too."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        number = error_number(error)
        if number is None or (only_full and number not in (*FULL, errno.EROFS)):
            raise
        reason = f"could not write {path}: {os.strerror(number)}"
        if number not in FULL:
            raise WriteError(f"{reason}; name another folder, or see to its permissions") from error
        place = next(p for p in (path, *path.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free / 1e6
        raise WriteError(
            f"{reason} ({free:.1f} MB are free on that disk). Make room, then start the same "
            "command again: it continues from what is already written"
        ) from error


def error_number(error: Exception) -> int | None:
    """The operating system's number of an error; safetensors' have it in their text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk. Windows does without."""
    if os.name == "nt":  # opens no folder, and syncs nothing that is open for reading only
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_leftovers(path: Path) -> None:
    """Remove what killed processes left of writing `path`. Younger files may be another process's,
    which writes the same."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        with suppress(FileNotFoundError):  # whole by now, or removed by another process
            if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE:
                leftover.unlink()
