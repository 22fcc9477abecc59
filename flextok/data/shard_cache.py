"""Copies of shards on a local disk, for those that cannot be read at random where they lie: what is
elsewhere, or is compressed. A copy is a plain tar of the shard's whole samples."""

import contextlib
import hashlib
import io
import logging
import os
import shutil
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock

from flextok.data.shards import SHARD_ERRORS, TOO_MANY, is_plain, state_of, stream_samples
from flextok.files import writing

RETRY = 600  # seconds until a shard that was damaged on its way is fetched once more
log = logging.getLogger(__name__)


class ShardCache:
    """A folder that any number of processes share. Each shard is fetched by one of them, beside its
    name and then renamed, and the copies that were opened longest ago make room for new ones."""

    def __init__(self, folder: str | None, gigabytes: float, fetch: list[str] | None) -> None:
        """folder: by default one in the user's cache. gigabytes: that the copies may take."""
        if not gigabytes > 0:
            raise ValueError(f"cache_gb={gigabytes} must be more than 0")
        user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.folder = Path(folder or f"{user}/flextok/shards").expanduser()
        self.limit, self.fetch = gigabytes * 1e9, fetch

    def holds(self, shard: str) -> bool:
        """Whether a shard is read from a copy: what lies on a local disk in the clear is not."""
        return self.fetch is not None or not is_plain(shard)

    def get(self, shard: str, count: int, wait: bool = True) -> Path:
        """The copy of the first `count` samples of a shard, or of those before it is damaged.
        Raises WriteError where it cannot be written and, without `wait`, Timeout while another
        process fetches the shard."""
        facts = repr((shard, count, self.fetch, state_of(shard)))
        name = hashlib.blake2b(facts.encode("utf-8", "replace"), digest_size=16).hexdigest()
        whole, cut = self.folder / f"{name}.tar", self.folder / f"{name}.cut"
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f"{name[:2]}.lock", timeout=-1 if wait else 0).acquire()
        with lock:
            is_tried = cut.exists() and time.time() - cut.stat().st_mtime < RETRY
            if not whole.exists() and not is_tried:
                self._make_room()
                part = self.folder / f"{name}.part"
                with writing(part):
                    damage = self._copy(shard, count, part)
                    os.replace(part, cut if damage else whole)
                if damage:
                    log.warning("%s is damaged: %s", shard, damage)
            if whole.exists():
                os.utime(whole)
                return whole
            return cut

    def prefetch(self, shards: Iterable[tuple[str, int]]) -> None:
        """Fetch those that no other process is fetching."""
        for shard, count in shards:
            if not self.holds(shard):
                continue
            with contextlib.suppress(OSError):  # Timeout, too; who needs the shard gets the error
                self.get(shard, count, wait=False)

    def _copy(self, shard: str, count: int, path: Path) -> str:
        """Write the copy. Returns what ended it before its end, if anything did."""
        samples = stream_samples(shard, self.fetch)
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
            for number in range(count):
                try:
                    key, members = next(samples)
                except StopIteration:
                    return f"it ends after {number} of {count} samples"
                except SHARD_ERRORS as error:
                    return str(error) or type(error).__name__
                for extension, content in members.items():
                    header = tarfile.TarInfo(f"{key}.{extension}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
                if tar.offset > self.limit:
                    return f"it is larger than cache_gb={self.limit / 1e9:g}"
        with contextlib.suppress(*SHARD_ERRORS):  # of what nobody asked for
            if next(samples, None) is not None:
                log.warning(TOO_MANY, shard, count)
        return ""

    def _make_room(self) -> None:
        copies = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # removed by another process
                facts = path.stat()
                at_work = path.suffix == ".part" and time.time() - facts.st_mtime < RETRY
                if path.suffix != ".lock" and not at_work:
                    copies.append((facts.st_mtime, facts.st_size, path))
        total = sum(size for _, size, _ in copies)
        limit = min(self.limit, 0.9 * (total + shutil.disk_usage(self.folder).free))
        for _, size, path in sorted(copies):
            if total <= limit:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size
