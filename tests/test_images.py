"""One way reads every picture: the right colours, bounded memory, and an error that names it."""

import contextlib
import io
import math
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageCms, ImageDraw

from flextok.cli.sample import read_lines
from flextok.data.augmentation import Augmentation
from flextok.data.datasets import ImageFolder
from flextok.data.pictures import list_pictures, read_text
from flextok.data.transforms import (
    ImageTransform,
    random_affine,
    random_crop,
    random_hue,
)
from flextok.images import (
    FORMATS,
    MAX_SIDE,
    CorruptPicture,
    center_crop,
    covering_size,
    image_tensor,
    load_picture,
    srgb_transform,
    to_tensor,
    to_uint8,
)
from flextok.schema import ConfigError

WHITE = (255, 255, 255)
NOISE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def saved(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    pixels: np.ndarray, bits: int, *chunks: bytes, size: tuple[int, int] | None = None
) -> bytes:
    """A PNG, grey or RGB by the pixels' shape, of so many bits a channel."""
    height, width = pixels.shape[:2]
    rows = pixels.astype(">u2" if bits == 16 else np.uint8).reshape(height, -1)
    if bits < 8:
        per_byte = 8 // bits
        places = np.arange(per_byte)[::-1] * bits
        rows = (rows.reshape(height, -1, per_byte) << places).sum(-1).astype(np.uint8)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    color = 2 if pixels.ndim == 3 else 0
    header = struct.pack(">IIBBBBB", *(size or (width, height)), bits, color, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(NOISE), "JPEG", quality=95, exif=exif)


def half_clear(mode: str) -> Image.Image:
    """Noise whose upper half is transparent."""
    alpha = Image.new("L", (60, 40), 255)
    alpha.paste(0, (0, 0, 60, 20))
    image = Image.fromarray(NOISE).convert("L" if mode == "LA" else "RGB")
    image.putalpha(alpha)
    return image


def in_palette() -> Image.Image:
    return Image.fromarray(NOISE).quantize(8)


GREY16 = np.linspace(0, 65535, 2400).astype(np.uint16).reshape(40, 60)
PICTURES = {
    "turned.jpg": turned,
    "alpha.png": lambda: saved(half_clear("RGBA")),
    "alpha.webp": lambda: saved(half_clear("RGBA"), "WEBP", lossless=True),
    "grey_alpha.png": lambda: saved(half_clear("LA")),
    "grey16.png": lambda: png(GREY16, 16),
    "grey16_clear.png": lambda: png(GREY16, 16, chunk(b"tRNS", struct.pack(">H", 0))),
    "grey16.tif": lambda: saved(Image.fromarray(GREY16), "TIFF"),
    "palette.png": lambda: saved(in_palette(), transparency=0),
    "palette.gif": lambda: saved(in_palette(), "GIF", transparency=0),
    "cmyk.jpg": lambda: saved(Image.fromarray(NOISE).convert("CMYK"), "JPEG"),
    "cmyk.tif": lambda: saved(Image.fromarray(NOISE).convert("CMYK"), "TIFF"),
    "one_bit.png": lambda: saved(Image.fromarray(NOISE).convert("1")),
    "profile.png": lambda: saved(Image.fromarray(NOISE), icc_profile=adobe_rgb()),
    "lab.tif": lambda: saved(lab(), "TIFF"),
}


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    transform = ImageCms.buildTransform(*profiles, "RGB", "LAB")
    return transform.apply(Image.new("RGB", (60, 40), (20, 120, 220)))


@pytest.mark.parametrize("name", PICTURES)
def test_python_reads_a_picture_as_the_commands_do(tmp_path, name):
    """ImageTransform(n)(Image.open(path)) once ignored turns and profiles, painted the transparent
    parts black and 16-bit grey white: other indices than the command's."""
    path = tmp_path / name
    path.write_bytes(PICTURES[name]())
    transform = ImageTransform(32)
    expected = transform(ImageFolder(tmp_path)[0]["image"])
    with Image.open(path) as image:
        loaded = image.copy() if name == "alpha.png" else image
        for source in (
            image,
            loaded,
            path,
            str(path),
            path.read_bytes(),
            io.BytesIO(path.read_bytes()),
        ):
            assert torch.equal(transform(source), expected)
        assert torch.equal(to_tensor(image), to_tensor(load_picture(path)))
    with open(path, "rb") as file:
        assert torch.equal(transform(file, torch.Generator()), expected)
    again = load_picture(load_picture(path))
    assert again.tobytes() == load_picture(path).tobytes()


def test_values_of_the_one_way():
    upper = {name: np.asarray(load_picture(PICTURES[name]()))[0, 0] for name in PICTURES}
    for name in ("alpha.png", "alpha.webp", "grey_alpha.png", "grey16_clear.png"):
        assert tuple(upper[name]) == WHITE
    assert load_picture(turned()).size == (40, 60)
    grey = np.asarray(load_picture(PICTURES["grey16.png"]()))[..., 0]
    assert np.array_equal(grey, np.rint(GREY16 / 257).astype(np.uint8))
    assert np.array_equal(np.asarray(load_picture(PICTURES["grey16.tif"]()))[..., 0], grey)
    assert np.abs(np.subtract(upper["lab.tif"], (20, 120, 220), dtype=int)).max() <= 6


@pytest.mark.parametrize(("bits", "key"), [(1, 1), (2, 2), (4, 7), (8, 77), (16, 300)])
def test_the_transparent_value_of_a_grey_png_turns_white(bits, key):
    """Pillow scales pixels to 8 bits but not the transparent value; of 16 bits it was ignored."""
    most = 2**bits - 1
    pixels = np.array([[key, 0 if key else 1] * 8, [most - key, key] * 8])
    data = png(pixels, bits, chunk(b"tRNS", struct.pack(">H", key)))
    expected = np.where(pixels == key, 255, np.rint(pixels * 255 / most))
    for source in (data, Image.open(io.BytesIO(data))):
        assert np.array_equal(np.asarray(load_picture(source))[..., 0], expected)


@pytest.mark.parametrize(("bits", "key"), [(8, (9, 99, 200)), (16, (300, 40_000, 65_535))])
def test_the_transparent_colour_of_a_png_turns_white(bits, key):
    pixels = np.array([[key, (0, 0, 0)], [(0, 0, 0), key]])
    data = png(pixels, bits, chunk(b"tRNS", struct.pack(">HHH", *key)))
    picture = load_picture(data)
    assert picture.getpixel((0, 0)) == picture.getpixel((1, 1)) == WHITE
    assert picture.getpixel((1, 0)) == (0, 0, 0)
    opened = Image.open(io.BytesIO(data))
    opened.load()
    assert load_picture(opened).tobytes() == picture.tobytes()


# --- colour profiles ----------------------------------------------------------------------------


def profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A version 2 ICC profile of a display."""
    body, table = b"", struct.pack(">I", len(tags))
    for name, data in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    size = 132 + 12 * len(tags) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"\0" * 4, 0x02100000, b"mntr", space, b"XYZ ")
    header += b"\0" * 12 + b"acsp" + b"\0" * 28 + xyz(0.9642, 1, 0.8249)[8:]
    return header.ljust(128, b"\0") + table + body


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(v * 65536) for v in values))


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


ADOBE = np.array(  # RGB -> XYZ (D50), Adobe RGB (1998), annex B
    [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
TO_SRGB = np.array(  # XYZ (D50) -> linear sRGB
    [[3.13386, -1.61687, -0.49062], [-0.97877, 1.91614, 0.03345], [0.07195, -0.22899, 1.40524]]
)
WHITE_POINT = {b"wtpt": xyz(0.9642, 1, 0.8249)}


def adobe_rgb() -> bytes:
    primaries = {b"rgb"[i : i + 1] + b"XYZ": xyz(*ADOBE[:, i]) for i in range(3)}
    curves = {letter + b"TRC": gamma(563 / 256) for letter in (b"r", b"g", b"b")}
    return profile(b"RGB ", {**WHITE_POINT, **primaries, **curves})


def adobe_to_srgb(color: tuple[int, int, int]) -> np.ndarray:
    linear = (TO_SRGB @ ADOBE @ (np.array(color) / 255) ** (563 / 256)).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("color", [(180, 90, 60), (128, 128, 128), (60, 140, 100)])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colours_are_converted_to_srgb(color, form):
    options = {"lossless": True} if form == "WEBP" else {"quality": 100, "subsampling": 0}
    options = {} if form in ("PNG", "TIFF") else options
    image = Image.new("RGB", (16, 16), color)
    data = saved(image, form, icc_profile=adobe_rgb(), **options)
    found = load_picture(data).getpixel((8, 8))
    assert np.abs(np.array(found) - adobe_to_srgb(color)).max() <= 2
    image.putalpha(128)
    if form != "JPEG":  # on white, after the conversion
        half = load_picture(saved(image, form, icc_profile=adobe_rgb(), **options))
        on_white = (adobe_to_srgb(color) + 255) / 2
        assert np.abs(np.array(half.getpixel((8, 8))) - on_white).max() <= 2


def test_a_grey_profile_is_converted():
    dark = profile(b"GRAY", {**WHITE_POINT, b"kTRC": gamma(1.0)})
    grey = Image.new("L", (4, 4), 55)  # linear light
    value = 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055)
    grey_alpha = grey.copy()
    grey_alpha.putalpha(255)
    for image in (grey, grey_alpha):
        found = load_picture(saved(image, icc_profile=dark)).getpixel((0, 0))
        assert np.abs(np.array(found) - value).max() <= 2


def test_profiles_of_srgb_change_nothing():
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = saved(Image.fromarray(NOISE), icc_profile=own)
    assert load_picture(data).tobytes() == NOISE.tobytes()


def test_a_profile_that_cannot_be_used_is_ignored(caplog):
    srgb_transform.cache_clear()
    for bad in (b"nonsense", adobe_rgb()[:200], adobe_rgb() + bytes(5 * 2**20)):
        image = Image.fromarray(NOISE)
        image.info["icc_profile"] = bad
        assert load_picture(image).tobytes() == NOISE.tobytes()
        assert "ignored a colour profile" in caplog.records[-1].message
    other = saved(Image.fromarray(NOISE).convert("L"), icc_profile=profile(b"CMYK", WHITE_POINT))
    assert (
        load_picture(other).convert("L").tobytes() == Image.fromarray(NOISE).convert("L").tobytes()
    )


# --- crops --------------------------------------------------------------------------------------


def crop_of_the_whole(
    image: Image.Image, height: int, width: int, left: int, top: int
) -> np.ndarray:
    """As it was: resize all, then crop."""
    target = covering_size(image, height, width)
    resized = image if target == image.size else image.resize(target, Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + width, top + height)), int)


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (12, 20)])
@pytest.mark.parametrize(
    "shape", [(40, 60), (97, 31), (16, 16), (33, 16), (400, 21), (7, 300), (1, 90)]
)
def test_crops_are_those_of_the_whole_resized_picture(shape, size):
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    width, height = covering_size(image, *size)
    spare = (width - size[1], height - size[0])
    assert min(spare) == 0
    ordinary = width <= 4 * size[1] and height <= 4 * size[0]
    found = np.asarray(center_crop(image, *size), int)
    expected = crop_of_the_whole(image, *size, spare[0] // 2, spare[1] // 2)
    assert np.abs(found - expected).max() <= (0 if ordinary else 1)
    for seed in range(8):
        draws = torch.Generator().manual_seed(seed)
        left = int(torch.randint(spare[0] + 1, (), generator=draws))
        top = int(torch.randint(spare[1] + 1, (), generator=draws))
        crop = random_crop(image, *size, torch.Generator().manual_seed(seed))
        expected = crop_of_the_whole(image, *size, left, top)
        assert np.abs(np.asarray(crop, int) - expected).max() <= (0 if ordinary else 1)


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 1_000_000), (2, MAX_SIDE)])
def test_memory_does_not_depend_on_the_aspect_ratio(monkeypatch, size):
    """A picture of 321 bytes, 1 x 60,000 pixels, was resized to 256 x 15,360,000."""
    resize, areas = Image.Image.resize, []

    def spied(self, target, *args, **options):
        areas.append(math.prod(target))
        assert areas[-1] <= 4 * 256**2
        return resize(self, target, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", spied)
    data = saved(Image.new("RGB", size, (10, 200, 30)))
    for crop in ("center", "random"):
        shift = 0.1 if crop == "center" else 0.0
        transform = ImageTransform(256, Augmentation(flip=True, crop=crop, shift=shift))
        tensor = transform(data, torch.Generator().manual_seed(3))
        assert tuple(to_uint8(tensor)[128, 128]) == (10, 200, 30)
    assert len(areas) == 2


# --- augmentation -------------------------------------------------------------------------------

WHEEL = Image.new("RGB", (65, 65), "white")  # a circle of two colours about the centre
ImageDraw.Draw(WHEEL).pieslice((12, 12, 52, 52), -90, 90, (200, 30, 40))
ImageDraw.Draw(WHEEL).pieslice((12, 12, 52, 52), 90, 270, (40, 60, 220))


def varied(image: Image.Image, seed: int = 0, **options) -> np.ndarray:
    """The image as training sees it, uint8."""
    transform = ImageTransform(image.width, Augmentation(**options))
    return to_uint8(transform(image, torch.Generator().manual_seed(seed)))


def coloured(pixels: np.ndarray) -> np.ndarray:
    return pixels.min(-1) < 200


def test_no_rotation_no_scaling_and_no_turn_of_the_hues_change_nothing():
    rng = torch.Generator()
    assert np.array_equal(random_affine(WHEEL, rng, 0, 0), WHEEL)
    assert np.abs(np.subtract(random_hue(WHEEL, rng, 0), np.asarray(WHEEL, int))).max() <= 3
    grey = Image.fromarray(np.repeat(NOISE[..., :1], 3, axis=2))
    assert np.array_equal(random_hue(grey, rng, 0.5), grey), "greys have no hue"


@pytest.mark.parametrize(
    "options", [{"rotate": 180}, {"scale": 0.5}, {"hue": 0.5}, {"rotate": 30, "scale": 0.2}]
)
def test_white_corners_stay_white_and_a_seed_decides_all(options):
    seen = [varied(WHEEL, seed, **options) for seed in range(8)]
    for pixels in seen:
        assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    assert np.array_equal(varied(WHEEL, 3, **options), seen[3])
    assert len({pixels.tobytes() for pixels in seen}) == 8
    still = ImageTransform(65, Augmentation(**options))
    assert np.array_equal(to_uint8(still(WHEEL)), WHEEL), "evaluation does not augment"


def test_a_rotation_turns_about_the_centre_up_to_its_angle():
    circle = coloured(np.asarray(WHEEL))
    for seed in range(6):
        turned = varied(WHEEL, seed, rotate=180)
        assert (coloured(turned) != circle).mean() < 0.02, "a circle turns into itself"
    red = [(varied(WHEEL, seed, rotate=20)[..., 0] > 150).astype(float) for seed in range(40)]
    share = [half[20:46, 34:].mean() for half in red]
    assert min(share) > 0.7, "by 20 degrees at most"
    assert max(share) - min(share) > 0.02


def test_scaling_changes_the_size_within_its_bounds_both_ways():
    area = coloured(np.asarray(WHEEL)).sum()
    sides = [math.sqrt(coloured(varied(WHEEL, seed, scale=0.2)).sum() / area) for seed in range(40)]
    assert 0.78 < min(sides) < 0.88
    assert 1.12 < max(sides) < 1.22


def test_hues_turn_and_lightness_and_saturation_stay():
    before = np.asarray(WHEEL.convert("HSV"), int)
    for seed in range(4):
        after = np.asarray(Image.fromarray(varied(WHEEL, seed, hue=0.1)).convert("HSV"), int)
        assert np.abs(after - before)[..., 1:].max() <= 4
        turn = (after - before)[coloured(np.asarray(WHEEL)), 0]
        turn = (turn + 128) % 256 - 128
        assert np.abs(turn).max() <= 0.1 * 255 + 3
        assert np.ptp(turn) <= 6, "all by the same angle"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rotate": -5}, "rotate=-5.0 must be at least 0"),
        ({"scale": -0.1}, "scale=-0.1 must be at least 0"),
        ({"hue": 0.6}, "hue=0.6 must be at least 0 and at most 0.5"),
        ({"shift": 0.5}, "shift=0.5 must be at least 0 and below 0.5"),
        ({"crop": "left"}, "crop='left' must be one of"),
    ],
)
def test_augmentation_out_of_range_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        ImageTransform(16, Augmentation(**options))


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [(178_000_000, 1), (1, 10_000_000), (13_000, 13_000), (60_000, 60_000)]
)
@pytest.mark.parametrize("bits", [8, 16])
def test_pictures_too_large_are_named_before_they_are_decoded(monkeypatch, size, bits):
    """A file of 339 KB took 5.3 GB."""
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    data = png(np.zeros((1, 1)), bits, size=size)
    if (size, bits) == ((13_000, 13_000), 8):
        data = png(np.zeros((1, 1, 3)), bits, size=size)
    with pytest.raises(CorruptPicture, match=r"^big: .*(at most|more than|bomb)"):
        load_picture(data, "big")


def test_files_too_large_are_not_opened(tmp_path):
    path = tmp_path / "big.webp"
    path.write_bytes(saved(Image.fromarray(NOISE), "WEBP"))
    os.truncate(path, 8 * 2**30)  # a hole
    with pytest.raises(CorruptPicture, match=r"big\.webp: .*8589934592 bytes"):
        load_picture(path)


@pytest.mark.parametrize("form", ["EPS", "PDF", "TGA", "DDS", "ICO", "BLP", "SPIDER"])
def test_formats_that_are_not_listed_are_not_opened_whatever_their_name(
    tmp_path, monkeypatch, form
):
    """PostScript named photo.jpg started Ghostscript."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("started"))
    assert form not in FORMATS
    image = Image.fromarray(NOISE)
    image = image.convert({"BLP": "P", "SPIDER": "F"}.get(form, "RGB"))
    (tmp_path / "photo.jpg").write_bytes(saved(image, form))
    with pytest.raises(CorruptPicture, match=r"photo\.jpg: "):
        load_picture(tmp_path / "photo.jpg")
    if form != "PDF":
        opened = Image.open(tmp_path / "photo.jpg")  # its header only
        with pytest.raises(CorruptPicture, match=rf"photo\.jpg: format {form} is not read"):
            ImageTransform(16)(opened)


@pytest.mark.parametrize("error", [MemoryError, RecursionError, NotImplementedError, KeyError("x")])
def test_whatever_a_decoder_raises_is_an_unreadable_picture(monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(CorruptPicture, match=r"^here: \S"):
        load_picture(png(GREY16, 16), "here")


def test_text_bombs_in_a_png_are_unreadable():
    bomb = zlib.compress(bytes(2**26), 9)
    for data in (
        chunk(b"zTXt", b"a\0\0" + bomb),
        chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
        chunk(b"iCCP", b"a\0\0" + bomb),
    ):
        with contextlib.suppress(CorruptPicture):  # Pillow leaves the text out, or refuses the file
            assert load_picture(png(GREY16, 16, data)).size == (60, 40)


SEEDLINGS = {
    **{form: {} for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF")},
    **{form: {} for form in ("JPEG2000", "QOI", "DDS", "TGA", "ICO", "PCX", "SGI")},
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_pictures_of_every_format_raise_nothing_but_corrupt_picture():
    rng = np.random.default_rng(0)
    Image.init()
    for form in (form for form in SEEDLINGS if form in Image.SAVE and form in Image.OPEN):
        original = saved(Image.fromarray(NOISE), form, icc_profile=adobe_rgb())
        for _ in range(20):
            damaged = bytearray(original[: rng.integers(20, len(original) + 1)])
            for position in rng.integers(0, min(len(damaged), 600), 4):
                damaged[position] = rng.integers(256)
            with contextlib.suppress(CorruptPicture):
                assert load_picture(bytes(damaged)).mode == "RGB"


# --- folders and texts --------------------------------------------------------------------------


def test_formats_of_a_folder_are_read_or_named(tmp_path, caplog):
    """.avif and others were left out without a word."""
    Image.init()
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    readable = [".avif", ".jp2", ".jfif", ".qoi"]
    readable = [ending for ending in readable if Image.EXTENSION.get(ending) in Image.SAVE]
    for ending in readable:
        Image.fromarray(NOISE).save(tmp_path / f"a{ending}")
    assert len(ImageFolder(tmp_path)) == 1 + len(readable)
    assert not caplog.records
    for ending in {*Image.EXTENSION, ".heic", ".svg"}:
        (tmp_path / f"b{ending}").touch()
    listed = {path.suffix for path in list_pictures(tmp_path)}
    (record,) = caplog.records
    assert str(tmp_path) in record.message
    assert len(listed) > 20
    unlisted = {*Image.EXTENSION, ".heic", ".svg"} - listed
    assert f"{len(unlisted)} pictures of other formats" in record.message


def test_only_regular_files_are_opened(tmp_path, caplog):
    """A named pipe in a folder made training wait for ever."""
    (tmp_path / "cat").mkdir()
    Image.fromarray(NOISE).save(tmp_path / "cat/a.png")
    os.mkfifo(tmp_path / "cat/pipe.png")
    os.mkfifo(tmp_path / "cat/a.txt")
    (tmp_path / "cat/zero.png").symlink_to("/dev/zero")
    (tmp_path / "cat/gone.png").symlink_to("nowhere.png")
    dataset = ImageFolder(tmp_path)
    assert [dataset[i]["key"] for i in range(len(dataset))] == ["cat/a.png"]
    assert "3 no regular files" in caplog.text
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(CorruptPicture, match=rf"{name}: it is not a regular file"):
            load_picture(tmp_path / "cat" / name)


def test_links_in_a_circle_end_and_each_picture_is_listed_once(tmp_path, caplog):
    names = ("a", "b", "c")
    for name in names:
        (tmp_path / "root" / name).mkdir(parents=True)
        Image.fromarray(NOISE).save(tmp_path / "root" / name / "x.png")
    (tmp_path / "outside/in").mkdir(parents=True)
    Image.fromarray(NOISE).save(tmp_path / "outside/in/y.png")
    for one in names:
        for other in names:
            (tmp_path / "root" / one / f"to_{other}").symlink_to(f"../{other}")
        (tmp_path / "root" / one / "up").symlink_to("../..")
    (tmp_path / "root/d").symlink_to("../outside")
    (tmp_path / "outside/in/back").symlink_to("..")
    (tmp_path / "root/itself").symlink_to("itself")
    dataset = ImageFolder(tmp_path / "root")
    assert [path.as_posix() for path in dataset.paths] == [
        "a/x.png",
        "b/x.png",
        "c/x.png",
        "d/in/y.png",
    ]
    assert "13 links to folders that are listed already" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_lose_their_byte_order_mark_and_carriage_returns(tmp_path, encoding, caplog):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes("un cœur rouge\r\nau clair\r\n".encode(encoding))
    assert ImageFolder(tmp_path)[0]["caption"] == "un cœur rouge\nau clair"
    assert not caplog.records
    assert read_text("\ufeff\ufeffa".encode(), "here") == "a"


def test_a_text_of_gigabytes_is_no_caption(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "a.png")
    (tmp_path / "a.txt").touch()
    os.truncate(tmp_path / "a.txt", 8 * 2**30)
    with pytest.raises(CorruptPicture, match=r"a\.txt: a text has at most"):
        ImageFolder(tmp_path)[0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_prompts_lose_their_byte_order_mark(tmp_path, encoding):
    (tmp_path / "prompts.txt").write_bytes("a red heart\r\n\r\n  \r\na bomb\r\n".encode(encoding))
    assert read_lines(tmp_path / "prompts.txt") == ["a red heart", "a bomb"]


def test_grey_of_32_bits_is_refused_and_of_16_read(tmp_path):
    """200 of a file of 32 bits was taken for 200 of 65,535: black."""
    Image.fromarray(np.full((4, 4), 200, np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(CorruptPicture, match="grey of 32 bits has no agreed range"):
        load_picture(tmp_path / "deep.tif")
    for name in ("a.tif", "a.png", "a.ppm"):
        Image.fromarray(np.full((4, 4), 200 * 257, np.uint16)).save(tmp_path / name)
        assert load_picture(tmp_path / name).getpixel((0, 0)) == (200, 200, 200)


def grey_tiff(bits, white_is_zero, value):
    """A file of 8 x 8 equal grey values."""
    twelve = value & 4095
    packed = bytes([twelve >> 4, (twelve & 15) << 4 | twelve >> 8, twelve & 255]) * 32
    data = packed if bits == 12 else value.to_bytes(bits // 8, "little") * 64
    tags = [(256, 8), (257, 8), (258, bits), (259, 1), (262, 0 if white_is_zero else 1)]
    tags += [(273, 8), (277, 1), (278, 8), (279, len(data))]
    directory = b"".join(struct.pack("<HHII", tag, 3, 1, number) for tag, number in tags)
    header = b"II*\0" + struct.pack("<I", 8 + len(data)) + data
    return header + struct.pack("<H", len(tags)) + directory + bytes(4)


@pytest.mark.parametrize(
    ("bits", "white_is_zero", "value", "expected"),
    [
        *((12, False, 4095, 255), (12, False, 2048, 128), (12, False, 0, 0)),
        *((16, False, 65535, 255), (16, True, 0, 255), (16, True, 65535, 0), (16, True, 257, 254)),
        *((8, False, 200, 200), (8, True, 55, 200)),
    ],
)
def test_grey_values_of_a_tiff_are_in_the_range_that_it_states(
    bits, white_is_zero, value, expected
):
    """Those of 12 bits were nearly black, and of 16 bits white was black where it is zero."""
    picture = load_picture(grey_tiff(bits, white_is_zero, value))
    assert picture.getpixel((3, 3)) == (expected,) * 3


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((0, 5, 3), np.uint8),
        torch.zeros(3, 4, 0, dtype=torch.uint8),
        torch.zeros(3, 0, 4),
        Image.new("RGB", (0, 5)),
    ],
)
def test_a_picture_without_pixels_is_named(picture):
    with pytest.raises(CorruptPicture, match="it has no pixels"):
        image_tensor(picture, 16, 16)
