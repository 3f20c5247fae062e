"""Every image loads as a viewer shows it, or is named (R-14)."""

from __future__ import annotations

import pickle
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngImageFile

from sdlora.config import DataSection
from sdlora.data import images as images_module
from sdlora.data.buckets import Crop
from sdlora.data.images import (
    UnreadableImageError,
    crop_image,
    label_font,
    load_image,
    load_record,
    measure_file,
    measure_image,
    parse_color,
    vary_colors,
)
from sdlora.data.records import Size
from sdlora.data.scan import scan_dataset
from sdlora.data.tensors import image_to_tensor
from sdlora.errors import ConfigError, DataError
from tests.checks import HANG_SECONDS, raises

STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def make_corners(width: int = 48, height: int = 32) -> Image.Image:
    """An image with another color in each quarter."""
    image = Image.new("RGB", (width, height))
    for place, color in enumerate(("red", "lime", "blue", "yellow")):
        left, top = place % 2 * width // 2, place // 2 * height // 2
        image.paste(color, (left, top, left + width // 2, top + height // 2))
    return image


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two images of one size."""
    assert one.size == other.size
    return float(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).mean())


def write_png(path: Path, width: int, height: int, depth: int, kind: int, rows: bytes) -> Path:
    """Writes a PNG by hand, for kinds that Pillow does not write."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    """R-14: all eight EXIF orientations load upright, and the measured size is the one shown."""
    shown = make_corners()
    method = STORED[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"{orientation}.{suffix}"
    (shown if method is None else shown.transpose(method)).save(path, exif=exif, quality=95)
    loaded = load_image(path)
    assert difference(loaded, shown) < 12
    assert measure_image(path, path.read_bytes()) == (Size(48, 32), False)


@pytest.mark.parametrize("background", ["white", "black", "#336699"])
def test_hidden_pixels_do_not_show(tmp_path: Path, background: str) -> None:
    """R-14: a transparent RGBA image with colored hidden pixels becomes the background color."""
    image = Image.new("RGBA", (16, 16), (255, 0, 255, 0))
    image.paste((0, 128, 0, 255), (0, 0, 8, 16))
    image.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", background)
    assert loaded.mode == "RGB"
    assert loaded.getpixel((2, 2)) == (0, 128, 0)
    assert loaded.getpixel((12, 12)) == parse_color(background)


def test_half_transparent_is_blended(tmp_path: Path) -> None:
    """R-14: partial alpha mixes with the background."""
    Image.new("RGBA", (4, 4), (255, 0, 0, 128)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", "white").getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_palette_with_transparency(tmp_path: Path, as_bytes: bool) -> None:
    """R-14: P + tRNS, with one transparent index and with an alpha for each index."""
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 255, 0, 0, 255])
    image.paste(1, (0, 0, 4, 8))
    image.save(tmp_path / "a.png", transparency=bytes([0, 255]) if as_bytes else 0)
    loaded = load_image(tmp_path / "a.png", "white")
    assert loaded.getpixel((1, 1)) == (0, 0, 255)
    assert loaded.getpixel((6, 1)) == (255, 255, 255)


def test_grey_with_alpha_and_keyed_color(tmp_path: Path) -> None:
    """R-14: LA, and RGB or L with a transparent color."""
    Image.new("LA", (4, 4), (10, 0)).save(tmp_path / "la.png")
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "rgb.png", transparency=(9, 8, 7))
    Image.new("L", (4, 4), 30).save(tmp_path / "l.png", transparency=30)
    for name in ("la.png", "rgb.png", "l.png"):
        assert load_image(tmp_path / name, "lime").getpixel((0, 0)) == (0, 255, 0), name


def test_cmyk(tmp_path: Path) -> None:
    """R-14: a CMYK JPEG keeps its colors, neither inverted nor dark."""
    make_corners().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert difference(load_image(tmp_path / "a.jpg"), make_corners()) < 8


def test_sixteen_bits(tmp_path: Path) -> None:
    """R-14: 16-bit grey and color keep their range instead of clipping to white."""
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    expected = np.rint(values / 257)
    Image.fromarray(values).save(tmp_path / "grey.png")
    Image.fromarray(values).save(tmp_path / "grey.tif")
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)
    write_png(tmp_path / "color.png", 8, 8, 16, 2, rows)
    for name in ("grey.png", "grey.tif", "color.png"):
        loaded = np.asarray(load_image(tmp_path / name), np.float32)
        assert loaded.shape == (8, 8, 3)
        assert np.abs(loaded - expected[..., None]).max() <= 1, name


def test_other_modes(tmp_path: Path) -> None:
    """R-14: one-bit, float and 32-bit images load too."""
    Image.new("1", (4, 4), 1).save(tmp_path / "bit.png")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((4, 4), 32768, np.int32)).save(tmp_path / "int.tif")
    assert load_image(tmp_path / "bit.png").getpixel((0, 0)) == (255, 255, 255)
    assert load_image(tmp_path / "float.tif").getpixel((0, 0)) == (128, 128, 128)
    assert load_image(tmp_path / "int.tif").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("suffix", ["gif", "webp", "apng", "tif"])
def test_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    """R-14: animations give their first frame and are known to move."""
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50, lossless=True)
    assert load_image(path).getpixel((4, 4)) == (255, 0, 0)
    assert measure_image(path, path.read_bytes()) == (Size(8, 8), True)


def test_color_profile_is_applied(tmp_path: Path) -> None:
    """R-14: a profile that exchanges red and green is honoured, as viewers do; a damaged one is not fatal."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = profile.replace(b"rXYZ", b"tmp_", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"tmp_", b"gXYZ", 1)
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "odd ".encode("utf-16-be"))
    for name, icc in (("plain", profile), ("swapped", swapped), ("damaged", b"nonsense")):
        Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / f"{name}.png", icc_profile=icc)
    assert load_image(tmp_path / "plain.png").getpixel((0, 0)) == (255, 0, 0)
    assert load_image(tmp_path / "damaged.png").getpixel((0, 0)) == (255, 0, 0)
    red, green, _ = load_image(tmp_path / "swapped.png").getpixel((0, 0))
    assert green > 240
    assert red < 15


def write_bad_files(folder: Path) -> dict[str, str]:
    """Files that are not images, and what distinguishes their errors."""
    noise = Image.effect_noise((200, 200), 80).convert("RGB")
    for name in ("cut.jpg", "cut.png", "cut.webp"):
        noise.save(folder / name)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 2 // 3])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("hello there", encoding="utf-8")
    write_png(folder / "bomb.png", 20000, 20000, 8, 2, b"")
    # Pillow would give this to Ghostscript, another program.
    (folder / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with (folder / "huge.png").open("wb") as file:
        file.truncate(2**32 - 10**5)
    return {
        "cut.jpg": "truncated",
        "cut.png": "",
        "cut.webp": "",
        "empty.png": "0 bytes",
        "text.png": "hello there",
        "bomb.png": "178 million",
        "script.png": "%!PS-Adobe-3",
        "huge.png": "4,294.9 MB",
    }


def test_bad_files_are_named(tmp_path: Path) -> None:
    """R-14: truncated, empty, text and oversized files raise one line with the file's name."""
    for name, reason in write_bad_files(tmp_path).items():
        path = tmp_path / name
        with raises(DataError, "data.image-unreadable", shows=str(path)) as loading:
            load_image(path)
        with raises(UnreadableImageError, "data.image-unreadable", shows=str(path)) as measuring:
            measure_file(path)
        for caught in (loading, measuring):
            assert reason in str(caught.value)
            assert "\n" not in str(caught.value)
        assert str(pickle.loads(pickle.dumps(measuring.value))) == str(measuring.value)
    for read in (load_image, measure_file):
        with raises(DataError, "data.image-unreadable", shows=("gone.png", "No such file")):
            read(tmp_path / "gone.png")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_wide_panorama(tmp_path: Path, suffix: str) -> None:
    """R-14: a panorama of 40,000 pixels loads whole, and its crop has the bucket's size."""
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (40000, 100), "red").save(path)
    assert measure_file(path)[1:] == (Size(40000, 100), False)
    loaded = load_image(path)
    assert loaded.size == (40000, 100)
    crop = Crop(Size(51200, 128), 5000, 0, Size(128, 128))
    assert crop_image(loaded, crop).getpixel((64, 64)) == pytest.approx((255, 0, 0), abs=2)


def test_large_images_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R-14: of many threads one at a time decodes a large image, so that memory does not multiply."""
    monkeypatch.setattr(images_module, "LARGE_PIXELS", 100)
    Image.new("RGB", (20, 20)).save(tmp_path / "large.png")
    Image.new("RGB", (5, 5)).save(tmp_path / "small.png")
    busy, most = [], []
    met = threading.Event()
    deadline = time.monotonic() + HANG_SECONDS
    load = Image.Image.load

    def watched(image: Image.Image) -> object:
        busy.append(image.size)
        most.append(list(busy))
        if image.size == (5, 5):
            while busy.count((5, 5)) < 2 and not met.is_set() and time.monotonic() < deadline:
                time.sleep(0.001)
            met.set()  # two decode at once
        else:
            time.sleep(0.02)  # long enough to meet others, were they let in
        busy.remove(image.size)
        return load(image)

    monkeypatch.setattr(PngImageFile, "load", watched)
    with ThreadPoolExecutor(4) as pool:
        for name in ("large.png", "small.png"):
            assert len(list(pool.map(measure_file, [tmp_path / name] * 4))) == 4
    assert max(together.count((20, 20)) for together in most) == 1
    assert max(together.count((5, 5)) for together in most) > 1


def test_images_that_went_or_changed(tmp_path: Path, write_image) -> None:
    """A file that vanished or changed after it was scanned is one line that names it."""
    path = write_image("a.png", caption="x")
    (record,) = scan_dataset(tmp_path, DataSection()).records
    assert load_record(record).tobytes() == load_image(path).tobytes()
    write_image("a.png", look="other")
    with raises(DataError, "data.image-changed", shows=str(path)):
        load_record(record)
    path.unlink()
    with raises(DataError, "data.image-gone", shows=(str(path), "No such file")) as caught:
        load_record(record)
    assert "\n" not in str(caught.value)
    path.mkdir()
    with raises(DataError, "data.image-gone", shows="is a folder"):
        load_record(record)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller(tmp_path: Path, write_image, orientation: int) -> None:
    """R-20: no smaller than twice the target, turned or not, and the crop is the same within 3 levels."""
    (tmp_path / "a").mkdir()
    image = make_corners().resize((976, 656), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a" / "big.jpg", quality=95, exif=exif)
    [record] = scan_dataset(tmp_path / "a", DataSection(allow_missing_captions=True, heldout=0)).records
    wide = orientation == 1
    target = Size(96, 64) if wide else Size(64, 96)
    small, whole = load_record(record, target=target), load_record(record)
    assert whole.size == (record.size.width, record.size.height)
    assert small.size == ((244, 164) if wide else (164, 244))
    crop = Crop(target, 0, 0, target)
    one, other = (np.asarray(crop_image(shown, crop)).astype(int) for shown in (small, whole))
    assert abs(one - other).max() <= 3
    assert load_record(record, target=Size(600, 600)).size == whole.size


def test_unknown_background(tmp_path: Path) -> None:
    """R-35: a color that is none is named with its key."""
    with raises(ConfigError, "data.background", shows="whit"):
        load_image(tmp_path / "a.png", "whit")


def test_crop_and_flip() -> None:
    """R-15: the crop takes the window it names, and mirrors afterwards."""
    image = make_corners(64, 32)
    crop = Crop(Size(64, 32), 32, 0, Size(32, 32))
    assert crop_image(image, crop).getpixel((2, 2)) == (0, 255, 0)
    assert crop_image(image, crop).size == (32, 32)
    wide = Crop(Size(64, 32), 24, 0, Size(32, 32))
    mirrored = Crop(Size(64, 32), 24, 0, Size(32, 32), flipped=True)
    assert crop_image(image, wide).getpixel((0, 0)) == (255, 0, 0)
    assert crop_image(image, mirrored).getpixel((31, 0)) == (255, 0, 0)
    assert crop_image(image, Crop(Size(32, 16), 0, 0, Size(16, 16))).size == (16, 16)


def test_tensor_range() -> None:
    """R-20: pixels reach the VAE as float32 (3, H, W) in [-1, 1]."""
    image = Image.new("RGB", (6, 4), (0, 255, 51))
    tensor = image_to_tensor(image)
    assert tensor.shape == (3, 4, 6)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert torch.allclose(tensor[:, 0, 0], torch.tensor([-1.0, 1.0, -0.6]))


def test_images_of_a_phone(tmp_path: Path) -> None:
    """R-14: HEIC is loaded as its own decoder shows it, where the extra `formats` is installed."""
    pillow_heif = pytest.importorskip("pillow_heif")
    image = make_corners().resize((96, 64))
    image.save(tmp_path / "a.heic", quality=95)
    loaded = load_image(tmp_path / "a.heic")
    assert measure_file(tmp_path / "a.heic")[1] == Size(96, 64)
    shown = pillow_heif.open_heif(tmp_path / "a.heic").to_pillow().convert("RGB")
    assert difference(loaded, shown) < 1
    assert difference(loaded, image) < 12


def test_jpeg_xl(tmp_path: Path) -> None:
    """R-14: what pillow-jxl-plugin reads is an image; without it, one line says so."""
    pytest.importorskip("pillow_jxl")
    make_corners().save(tmp_path / "a.jxl", lossless=True)
    assert difference(load_image(tmp_path / "a.jxl"), make_corners()) == 0
    (tmp_path / "b.jxl").write_bytes((tmp_path / "a.jxl").read_bytes()[:20])
    index = scan_dataset(tmp_path, DataSection(trigger="x", heldout=0))
    assert [record.name for record in index.records] == ["a.jxl"]
    assert "b.jxl" in index.noticed["data.image-unreadable"]


def test_colors_keep_black_white_and_hue() -> None:
    """R-15: paper stays white and ink black; other colors change, but a red stays a red."""
    image = Image.new("RGB", (4, 1))
    image.putdata([(0, 0, 0), (255, 255, 255), (200, 60, 60), (128, 128, 128)])
    whole = Size(4, 1)
    plain = Crop(whole, 0, 0, whole)
    assert vary_colors(image, plain) is image
    for colors in ((1.3, 1.0, 1.0), (0.7, 1.3, 0.7), (1.0, 0.5, 1.5)):
        varied = vary_colors(image, replace(plain, colors=colors))
        changed = [varied.getpixel((column, 0)) for column in range(3)]
        assert changed[:2] == [(0, 0, 0), (255, 255, 255)]
        red, green, blue = changed[2]
        assert red > green == blue
        assert changed[2] != (200, 60, 60)
    assert vary_colors(image, replace(plain, colors=(1.2, 1.0, 1.0))).getpixel((3, 0))[0] > 128


def test_labels_have_letters_beyond_ascii() -> None:
    """R-13: names, captions and prompts of a person are read in grids and sheets, not boxes."""
    font = label_font(20)
    missing = bytes(font.getmask("\uffff"))
    assert all(bytes(font.getmask(letter)) != missing for letter in "aößéłжΩ")
