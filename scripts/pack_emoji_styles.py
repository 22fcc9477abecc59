"""Pack Fluent emoji's other two styles, colour and flat, for the emoji of the 3D shard.

Input: the npm packages @iconify-json/fluent-emoji and @iconify-json/fluent-emoji-flat (downloaded
with npm, or given with --colour and --flat), which hold Microsoft's vector icons by name, and the
3D shard that scripts/pack_emoji.py wrote. The icons are rendered by resvg (pip install resvg-py).
Output: flextok/emoji/assets/emoji-styles-64.tar, laid out as the 3D shard is, first the colour
style and then the flat one, each in the order of the 3D shard, with one more field in the JSON,
`style`. Running it twice writes the same bytes (with the same versions of resvg, Pillow and
libwebp).

An icon is packed if its code points, without skin tones, are an emoji of the 3D shard. It takes
that emoji's name, group, subgroup and split: a held-out emoji is held out in every style and in
every skin tone. The licence's exclusions of the 3D shard (flags of countries, families,
technologists) hold here as well, because what is not in that shard is not packed.

    python scripts/pack_emoji_styles.py
    python scripts/pack_emoji_styles.py --skin-tones
    python scripts/pack_emoji_styles.py --colour fluent-emoji.tgz --flat fluent-emoji-flat.tgz
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pack_emoji import SKIN_TONE, encode, match_key, pack, shrink
from PIL import Image

from flextok.emoji.datasets import EmojiRecord, read_shard

PACKAGES = {
    "colour": "@iconify-json/fluent-emoji@1.2.7",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
}
CODE_POINTS = "flat"  # the package whose chars.json gives the icons' code points, for both
ASSETS = Path(__file__).resolve().parents[1] / "flextok" / "emoji" / "assets"
RENDERED_SIZE = 256  # pixels a side before shrinking, as the 3D pictures have
COLOUR_STEP = 4  # colours are rounded to steps of it, as in the 3D shard
TONES = {
    "1f3fb": "light skin tone",
    "1f3fc": "medium-light skin tone",
    "1f3fd": "medium skin tone",
    "1f3fe": "medium-dark skin tone",
    "1f3ff": "dark skin tone",
}


class Icon(NamedTuple):
    """One icon to render, with the fields of its JSON file."""

    svg: str
    fields: dict[str, str]

    @property
    def stem(self) -> str:
        """Its files' name in the tar, without the ending."""
        return f"{self.fields['style']}-{self.fields['codepoints']}"


def download_package(package: str, folder: Path) -> Path:
    """Fetch an npm package's archive into `folder`, which must be empty."""
    subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True)
    return next(folder.glob("*.tgz"))


def read_json(package: Path, name: str) -> dict[str, Any]:
    """A JSON file of a package, which is a .tgz or an unpacked folder."""
    if package.is_dir():
        return json.loads((package / name).read_text(encoding="utf-8"))
    with tarfile.open(package) as tar:
        handle = tar.extractfile(f"package/{name}")
        assert handle is not None, f"{package} has no {name}"
        return json.load(handle)


def svg_of(icons: dict[str, Any], name: str) -> str:
    """The icon as a whole SVG file. An alias is its parent, mirrored where it says so."""
    alias = icons.get("aliases", {}).get(name, {})
    body = icons["icons"][alias.get("parent", name)]["body"]
    side = icons["width"]
    if alias.get("hFlip"):
        body = f'<g transform="translate({side} 0) scale(-1 1)">{body}</g>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">{body}</svg>'


def icon_names(chars: dict[str, str], icons: dict[str, Any]) -> dict[str, str]:
    """Code points (as match_key spells them) -> icon name, for icons and their aliases."""
    names = {match_key(codepoints): name for codepoints, name in chars.items()}
    known = {name: codepoints for codepoints, name in names.items()}
    for alias, entry in icons.get("aliases", {}).items():
        # the icons' only aliases: a hand that points right is the mirrored one that points left
        if alias.startswith("backhand-index-pointing-right"):
            left = known[entry["parent"]]
            names.setdefault(left.replace("1f448", "1f449"), alias)
    return names


def select(
    names: dict[str, str], style: str, icons: dict[str, Any], skin_tones: bool
) -> list[Icon]:
    """The icons of one style that belong to an emoji of the 3D shard, in its order."""
    found = []
    bases = {match_key(record.key): record for record in read_shard()}
    for codepoints, name in names.items():
        tones = SKIN_TONE.findall(codepoints)
        if tones and not skin_tones:
            continue
        base = bases.get("-".join(p for p in codepoints.split("-") if p not in TONES))
        if base is not None:
            found.append(Icon(svg_of(icons, name), fields_of(base, codepoints, tones, style)))
    return sorted(found, key=lambda icon: icon.fields["codepoints"])


def fields_of(base: EmojiRecord, codepoints: str, tones: list[str], style: str) -> dict[str, str]:
    tone = ", ".join(TONES[tone] for tone in dict.fromkeys(tones))
    return {
        "codepoints": codepoints if tones else base.key,
        "name": f"{base.name}: {tone}" if tones else base.name,
        "group": base.group,
        "subgroup": base.subgroup,
        "split": base.split,
        "style": style,
    }


def render(svg: str) -> bytes:
    """The WebP bytes of an icon, 64 px, with alpha."""
    import resvg_py  # needed at packing time only, so no dependency of the package

    side = RENDERED_SIZE
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if picture.size != (side, side) or picture.getchannel("A").getextrema()[1] == 0:
        raise ValueError(f"an icon was rendered empty or as {picture.size}: {svg[:200]}")
    return encode(shrink(to_png(picture)), COLOUR_STEP)


def to_png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for style, package in PACKAGES.items():
        parser.add_argument(f"--{style}", type=Path, help=f"archive or folder of {package}")
    parser.add_argument("--skin-tones", action="store_true", help="pack them as well")
    parser.add_argument("--processes", type=int, help="default: one a processor")
    parser.add_argument("--output", type=Path, default=ASSETS / "emoji-styles-64.tar")
    args = parser.parse_args()

    icons: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for style, package in PACKAGES.items():
            place = Path(folder, style)
            place.mkdir()
            archive = getattr(args, style) or download_package(package, place)
            icons[style] = read_json(archive, "icons.json")
            if style == CODE_POINTS:
                names = icon_names(read_json(archive, "chars.json"), icons[style])
    chosen = [
        icon for style in PACKAGES for icon in select(names, style, icons[style], args.skin_tones)
    ]
    found = {icon.fields["codepoints"] for icon in chosen}
    for record in read_shard():
        if record.key not in found:
            print(f"no vector icon for {record.key}, {record.name}", file=sys.stderr)

    members: list[tuple[str, bytes]] = []
    sizes: Counter[str] = Counter()
    with ProcessPoolExecutor(args.processes) as pool:
        rendered = pool.map(render, [icon.svg for icon in chosen], chunksize=16)
        for icon, data in zip(chosen, rendered, strict=True):
            members.append((f"{icon.stem}.webp", data))
            content = json.dumps(icon.fields, ensure_ascii=False).encode()
            members.append((f"{icon.stem}.json", content))
            sizes[icon.fields["style"]] += len(data)
    shard = pack(members)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(shard)
    print(f"{args.output.name}: {len(shard):,} bytes, {len(chosen)} pictures")
    for (style, split), count in sorted(
        Counter((icon.fields["style"], icon.fields["split"]) for icon in chosen).items()
    ):
        print(f"  {style}, {split}: {count}; all of the style {sizes[style]:,} bytes of WebP")


if __name__ == "__main__":
    main()
