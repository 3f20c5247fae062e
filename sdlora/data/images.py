"""Reads any image as a viewer shows it, and crops it for the model."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageEnhance, ImageFont, ImageOps, UnidentifiedImageError

from sdlora.data.buckets import Crop
from sdlora.data.records import ImageRecord, Size
from sdlora.errors import ConfigError, DataError, SdloraError
from sdlora.reading import UnfitFileError, read_bytes

IMAGE_SUFFIXES: tuple[str, ...] = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".avif", ".ppm", ".pgm", ".tga"),
)
HEIF_SUFFIXES = (".heic", ".heif", ".hif")
try:  # The extra `formats`; Pillow alone does not read what iPhones write.
    import pillow_heif
except ImportError:
    HAS_HEIF = False
else:
    HAS_HEIF = True
    pillow_heif.register_heif_opener()
    IMAGE_SUFFIXES += HEIF_SUFFIXES
try:
    import pillow_jxl  # noqa: F401  It adds itself to Pillow.
except ImportError:
    HAS_JXL = False
else:
    HAS_JXL = True
    IMAGE_SUFFIXES += (".jxl",)
UNREAD_SUFFIXES = (
    *(() if HAS_HEIF else HEIF_SUFFIXES),
    *(() if HAS_JXL else (".jxl",)),
    *(".svg", ".psd", ".eps"),
    *(".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"),
)
# Formats that Pillow may detect, whatever the suffix: its EPS reader would start another program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "PPM", "TGA", "HEIF", "JXL")
MAX_BYTES = 2**30
LARGE_BYTES = 2**25
LARGE_PIXELS = 2**24
ORIENTATION = 0x0112
# Large images are decoded one at a time: eight panoramas at once would take gigabytes.
_large = threading.RLock()


class UnreadableImageError(DataError):
    """An image that cannot be decoded; `reason` follows the file's name in the message."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}; replace or remove it", key="data.image-unreadable")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[UnreadableImageError], tuple[Path, str]]:
        return type(self), (self.path, self.reason)


def parse_color(background: str) -> tuple[int, int, int]:
    """Red, green and blue of a color name or #rrggbb."""
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError:
        raise ConfigError(
            f"data.background = {background!r} is not a color; use a name such as white, or #rrggbb"
        ) from None


def load_image(path: Path, background: str = "white") -> Image.Image:
    """Reads an image in RGB: first frame, EXIF orientation applied, transparency over a color.

    Raises:
        DataError: If it is empty, truncated or not an image; the message names the file.
        ConfigError: If `background` is not a color.
    """
    color = parse_color(background)
    return _load(path, _read(path), color)


def load_alpha(path: Path) -> Image.Image:
    """The alpha channel of an image, 8-bit grey; white without transparency."""
    with _decoding(path), _open(path, _read(path)) as image:
        image.load()
        image = _transpose(image)
        if not image.has_transparency_data:
            return Image.new("L", image.size, 255)
        return image.convert("RGBA").getchannel("A")


def load_record(record: ImageRecord, background: str = "white", target: Size | None = None) -> Image.Image:
    """Reads the image of a record, unchanged since it was scanned.

    With a `target`, a JPEG is decoded at a half, a quarter or an eighth of its size if that is at least twice
    the target. Scaled to it, a smooth image then differs by at most 2 of 255 levels (55 dB; noise, 43 dB).

    Raises:
        DataError: If it is gone or has changed; the message names the file.
    """
    try:
        data = read_bytes(record.path, MAX_BYTES)
    except (OSError, UnfitFileError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        message = f"cannot read {record.path} any more ({reason}); restore it and resume, or start a new run"
        raise DataError(message, key="data.image-gone") from None
    if hashlib.sha256(data).hexdigest() != record.digest:
        message = f"{record.path} has changed since it was scanned; restore it and resume, or start a new run"
        raise DataError(message, key="data.image-changed")
    return _load(record.path, data, parse_color(background), target)


def measure_file(path: Path) -> tuple[str, Size, bool]:
    """Digest, size as shown, and whether a file is animated; raises UnreadableImageError."""
    is_large = False
    with suppress(OSError):  # The read below reports it.
        is_large = path.stat().st_size > LARGE_BYTES
    with _one_at_a_time(is_large):
        data = _read(path)
        return (hashlib.sha256(data).hexdigest(), *measure_image(path, data))


def measure_image(path: Path, data: bytes) -> tuple[Size, bool]:
    """Decodes a whole file; returns its size as shown, and whether it is animated."""
    with _decoding(path), _open(path, data) as image, _one_at_a_time(math.prod(image.size) > LARGE_PIXELS):
        is_animated = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
        if image.format == "JPEG":
            # A reduced decode still reads the whole stream, at a third of the cost.
            width, height = image.size
            image.draft(None, (max(1, width // 8), max(1, height // 8)))
            image.load()
            return Size(height, width) if _is_turned(image) else Size(width, height), False
        image.load()
        return Size(*_transpose(image).size), is_animated


def crop_image(
    image: Image.Image, crop: Crop, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Scales an image to cover its bucket, crops it, and mirrors it if the crop is flipped."""
    resized = (crop.resized.width, crop.resized.height)
    if image.size != resized:
        image = image.resize(resized, resampling, reducing_gap=3.0)
    image = image.crop((crop.left, crop.top, crop.left + crop.size.width, crop.top + crop.size.height))
    return ImageOps.mirror(image) if crop.flipped else image


def vary_colors(image: Image.Image, crop: Crop) -> Image.Image:
    """A crop in RGB with its brightness, contrast and saturation; hues, black and white stay."""
    if crop.colors is None:
        return image
    brightness, contrast, saturation = crop.colors
    curve = np.linspace(0.0, 1.0, 256) ** (1 / brightness)
    curve += (contrast - 1) * (curve**2 * (3 - 2 * curve) - curve)
    table: list[int] = np.rint(255 * curve).astype(int).tolist()
    return ImageEnhance.Color(image.point(3 * table)).enhance(saturation)


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, MAX_BYTES)
    except OSError as error:
        raise UnreadableImageError(path, f"cannot be read ({error.strerror})") from None
    except UnfitFileError as error:
        raise UnreadableImageError(path, str(error)) from None


def _load(path: Path, data: bytes, color: tuple[int, int, int], target: Size | None = None) -> Image.Image:
    with _decoding(path), _open(path, data) as image:
        if target and image.format == "JPEG":
            least = (2 * target.width, 2 * target.height)
            image.draft(None, least[::-1] if _is_turned(image) else least)
        image.load()
        return _flatten(_transpose(image), color)


def _open(path: Path, data: bytes) -> Image.Image:
    if not data:
        raise UnreadableImageError(path, "is empty (0 bytes)")
    Image.init()
    try:
        # An older Pillow cannot read AVIF.
        return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        raise UnreadableImageError(path, f"is not an image (it starts with {data[:12]!r})") from None


def _one_at_a_time(is_large: bool) -> AbstractContextManager[object]:
    return _large if is_large else nullcontext()


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turns any decoder's exception into one error that names the file; silences Pillow's warnings."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\..*")
            yield
    except SdloraError:
        raise
    except Image.DecompressionBombError:
        raise UnreadableImageError(path, "has too many pixels (over 178 million); scale it down") from None
    except MemoryError:
        raise UnreadableImageError(path, "needs more memory than there is; scale it down") from None
    except Exception as error:  # Decoders raise many types of exceptions for damaged files.
        cut = isinstance(error, EOFError) or "truncated" in str(error)
        reason = "is truncated" if cut else "cannot be decoded"
        raise UnreadableImageError(path, f"{reason} ({str(error) or type(error).__name__})") from None


def _is_turned(image: Image.Image) -> bool:
    return image.getexif().get(ORIENTATION) in (5, 6, 7, 8)


def _transpose(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # A damaged EXIF block does not make an image unusable.
        return ImageOps.exif_transpose(image)
    return image


def _flatten(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Converts any mode to RGB."""
    if image.mode.startswith("I") or image.mode == "F":
        return _reduce_depth(image).convert("RGB")
    has_alpha, profile = image.has_transparency_data, image.info.get("icc_profile")
    if has_alpha or image.mode not in ("RGB", "CMYK"):
        image = image.convert("RGBA" if has_alpha else "RGB")
    if profile:
        image = _convert_to_srgb(image, profile)
    if not has_alpha:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, (*color, 255))
    return Image.alpha_composite(ground, image).convert("RGB")


def _reduce_depth(image: Image.Image) -> Image.Image:
    """Scales 16-bit, 32-bit and float greyscale to 8 bits; Pillow's own conversion would clip to white."""
    values = np.asarray(image)
    if image.mode == "F":
        top = 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
    else:
        top = 65535.0 if values.max(initial=0) <= 65535 else float(2**31 - 1)
    reduced = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), 64):  # In strips: a large image in float64 would take gigabytes.
        strip = values[start : start + 64].astype(np.float64)
        reduced[start : start + 64] = np.clip(np.rint(strip * (255.0 / top)), 0, 255)
    return Image.fromarray(reduced)


def _convert_to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Applies a color profile (CMYK, wide gamut) as viewers do."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != ("CMYK" if image.mode == "CMYK" else "RGB"):
            return image
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    return converted if converted is not None else image


def label_font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A font for labels: DejaVu Sans, which matplotlib brings; Pillow's own has no letter beyond ASCII."""
    found = importlib.util.find_spec("matplotlib")
    if found and found.origin:
        with suppress(OSError):
            return ImageFont.truetype(Path(found.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", size)
    return ImageFont.load_default(size)
