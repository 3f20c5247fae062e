"""Gets the vector packages and renders their drawings as pictures on a coloured ground."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdlora.errors import DataError

PICTURE_PX = 128
DRAWING_SHARE = 0.875  # of the shorter edge: the margin is then one cell of the 16 x 16 latents
INK = "#111111"

GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "red": (214, 64, 58),
    "orange": (240, 150, 60),
    "yellow": (248, 215, 90),
    "green": (96, 170, 95),
    "teal": (70, 165, 165),
    "blue": (75, 120, 205),
    "purple": (140, 95, 190),
    "pink": (240, 160, 190),
    "brown": (140, 100, 75),
    "gray": (150, 150, 155),
    "black": (28, 28, 32),
}


@dataclass(frozen=True)
class Hand:
    """One way of drawing the concepts: a vector package, and under which terms it is used."""

    package: str
    version: str
    title: str
    author: str
    licence: str

    @property
    def archive(self) -> str:
        """The file name that `npm pack` gives the package."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


HANDS: dict[str, Hand] = {
    "noto": Hand("@iconify-json/noto", "1.2.9", "Noto Emoji", "Google Inc.", "Apache-2.0"),
    "fluent-flat": Hand(
        "@iconify-json/fluent-emoji-flat", "1.2.6", "Fluent Emoji Flat", "Microsoft Corporation", "MIT"
    ),
    "openmoji": Hand("@iconify-json/openmoji", "1.2.29", "OpenMoji", "OpenMoji contributors", "CC-BY-SA-4.0"),
    "fluent-mono": Hand(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "Fluent Emoji High Contrast",
        "Microsoft Corporation",
        "MIT",
    ),
}
BASE_HANDS = ("noto", "fluent-flat")  # what the base learns
STYLE_HANDS = ("openmoji", "fluent-mono")  # what a style is learnt from; the base never sees them


class Icons:
    """The drawings of one hand, by name."""

    def __init__(self, contents: dict[str, Any]) -> None:
        self.drawings: dict[str, dict[str, Any]] = contents["icons"]
        self.default_width: int = contents.get("width", 16)
        self.default_height: int = contents.get("height", 16)

    def __contains__(self, name: str) -> bool:
        return name in self.drawings

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self.drawings)

    def to_svg(self, name: str, size_px: int) -> str:
        """The drawing as a standalone, square SVG document."""
        drawing = self.drawings[name]
        left, top = drawing.get("left", 0), drawing.get("top", 0)
        width = drawing.get("width", self.default_width)
        height = drawing.get("height", self.default_height)
        body = drawing["body"].replace("currentColor", INK)
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{size_px}" height="{size_px}">{body}</svg>'
        )

    def render(self, name: str, size_px: int) -> Image.Image:
        """The drawing as RGBA with a transparent ground, `size_px` square.

        Raises:
            DataError: The hand has no such drawing, or resvg_py is not installed.
        """
        if name not in self:
            raise DataError(f"no drawing is named {name!r}; check the spelling or the package's version")
        try:
            from resvg_py import svg_to_bytes
        except ImportError:
            raise DataError("rendering drawings needs resvg_py: pip install 'sdlora[builtin]'") from None
        encoded = svg_to_bytes(svg_string=self.to_svg(name, size_px), width=size_px, height=size_px)
        return Image.open(io.BytesIO(bytes(encoded))).convert("RGBA")


def compose(
    drawing: Image.Image,
    ground: str = "white",
    size: tuple[int, int] = (PICTURE_PX, PICTURE_PX),
) -> Image.Image:
    """Puts a drawing in the middle of a ground of `size` (width, height)."""
    picture = Image.new("RGBA", size, (*GROUNDS[ground], 255))
    picture.alpha_composite(drawing, ((size[0] - drawing.width) // 2, (size[1] - drawing.height) // 2))
    return picture.convert("RGB")


def drawing_px(picture_px: int) -> int:
    """Edge of a drawing on a picture whose shorter edge is `picture_px`."""
    return round(DRAWING_SHARE * picture_px)


def to_array(picture: Image.Image) -> np.ndarray:
    """RGB picture -> float32 of shape (3, H, W) in [-1, 1]."""
    return np.asarray(picture.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def load_icons(hand: str, folder: Path) -> Icons:
    """Reads one hand from a folder of vector packages.

    Args:
        hand: A key of `HANDS`.
        folder: Holds the archives that `npm pack` writes, or the unpacked `HAND.json`.

    Raises:
        DataError: The folder holds neither.
    """
    plain, archive = folder / f"{hand}.json", folder / HANDS[hand].archive
    if plain.is_file():
        return Icons(json.loads(plain.read_text(encoding="utf-8")))
    if not archive.is_file():
        raise DataError(
            f"{folder} holds neither {archive.name} nor {plain.name}; leave out --icons to fetch it"
        )
    with tarfile.open(archive) as packed:
        member = packed.extractfile("package/icons.json")
        if member is None:
            raise DataError(f"{archive} is no icon package; fetch it again: npm pack {HANDS[hand].package}")
        return Icons(json.load(member))


def fetch_icons(hands: tuple[str, ...], folder: Path) -> Path:
    """Fetches the packages of `hands` that `folder` lacks, with `npm pack`.

    Raises:
        DataError: npm is missing or cannot reach its registry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for hand in hands:
        package = HANDS[hand]
        if (folder / package.archive).is_file():
            continue
        if shutil.which("npm") is None:
            raise DataError(f"fetching {package.package} needs npm; install it or pass --icons FOLDER")
        command = ["npm", "pack", f"{package.package}@{package.version}", "--silent"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DataError(f"npm pack {package.package} failed ({reason}); pass --icons FOLDER")
    return folder
