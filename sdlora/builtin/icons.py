"""Gets the vector packages and renders their drawings as images on a colored ground."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdlora.errors import DataError

IMAGE_PX = 128
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
class IconSet:
    """A vector package that draws the concepts in one style, and the terms under which it is used."""

    package: str
    version: str
    title: str
    author: str
    licence: str

    @property
    def archive(self) -> str:
        """The file name that `npm pack` gives the package."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


GOOGLE, MICROSOFT = "Google Inc.", "Microsoft Corporation"
ICON_SETS: dict[str, IconSet] = {
    "noto": IconSet("@iconify-json/noto", "1.2.9", "Noto Emoji", GOOGLE, "Apache-2.0"),
    "noto-v1": IconSet("@iconify-json/noto-v1", "1.2.5", "Noto Emoji v1", GOOGLE, "Apache-2.0"),
    "fluent-flat": IconSet("@iconify-json/fluent-emoji-flat", "1.2.6", "Fluent Emoji Flat", MICROSOFT, "MIT"),
    "fluent": IconSet("@iconify-json/fluent-emoji", "1.2.7", "Fluent Emoji", MICROSOFT, "MIT"),
    "emojione": IconSet("@iconify-json/emojione", "1.2.3", "Emoji One v2", "Emoji One", "CC-BY-4.0"),
    "emojione-v1": IconSet("@iconify-json/emojione-v1", "1.2.3", "Emoji One v1", "Emoji One", "CC-BY-SA-4.0"),
    "emojione-mono": IconSet(
        "@iconify-json/emojione-monotone", "1.2.1", "Emoji One Monotone", "Emoji One", "CC-BY-4.0"
    ),
    "streamline": IconSet(
        "@iconify-json/streamline-emojis", "1.2.4", "Streamline Emojis", "Streamline", "CC-BY-4.0"
    ),
    "openmoji": IconSet(
        "@iconify-json/openmoji", "1.2.29", "OpenMoji", "OpenMoji contributors", "CC-BY-SA-4.0"
    ),
    "fluent-mono": IconSet(
        "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "Fluent Emoji High Contrast", MICROSOFT, "MIT"
    ),
    "twemoji": IconSet("@iconify-json/twemoji", "1.2.5", "Twemoji", "Twitter and contributors", "CC-BY-4.0"),
    "fxemoji": IconSet("@iconify-json/fxemoji", "1.2.2", "FxEmoji", "Mozilla", "Apache-2.0"),
}
BASE_SETS = tuple(ICON_SETS)[:8]
"""What the base learns. It never sees the others: styles are learned from them, and checked on them."""
STYLE_SETS = ("openmoji", "fluent-mono")
_JOINED = (
    "american-football artist-palette baby-bottle baby-chick beer-mug birthday-cake broken-heart "
    "cherry-blossom chocolate-bar closed-book crescent-moon crystal-ball deciduous-tree fire-engine "
    "french-fries honey-pot hot-beverage ice-cream lady-beetle light-bulb maple-leaf paw-prints "
    "red-apple soccer-ball soft-ice-cream top-hat tropical-fish video-game wine-glass"
)
# Where a set calls a concept by another name.
# fmt: off
OTHER_NAMES: dict[str, dict[str, str]] = {
    "streamline": {
        "backpack": "school-backpack", "bear": "bear-face", "fox": "fox-face-1",
        "frog": "frog-face", "lion": "lion-face", "panda": "panda-face", "robot": "robot-face-1",
        "unicorn": "unicorn-face", "wolf": "wolf-face", "whale": "spouting-whale",
        "house": "house-with-garden",
    },
    "fxemoji": {
        **{name: name.replace("-", "") for name in _JOINED.split()},
        "cat-face": "cat", "cow-face": "cow", "dog-face": "dog", "ear-of-corn": "earofmaize",
        "eggplant": "aubergine", "evergreen-tree": "evergreen", "fallen-leaf": "fallingleaf",
        "gem-stone": "gem", "high-heeled-shoe": "heels", "horse-face": "horse",
        "hot-pepper": "chilipepper", "locked": "lock", "locomotive": "steamlocomotive",
        "monkey-face": "monkey", "mouse-face": "mouse", "pig-face": "pig", "pizza": "sliceofpizza",
        "rabbit-face": "bunny", "racing-car": "racecar", "scissors": "blackscissors",
        "snow-capped-mountain": "snowmountains", "telephone": "blacktelephone",
        "tiger-face": "tiger", "wrapped-gift": "present",
    },
}
# fmt: on


class Icons:
    """The drawings of one icon set, by name."""

    def __init__(self, contents: dict[str, Any], other_names: dict[str, str] | None = None) -> None:
        drawings: dict[str, dict[str, Any]] = contents["icons"]
        # an alias with a transformation is another drawing, and left out
        aliases = {
            name: alias["parent"] for name, alias in contents.get("aliases", {}).items() if len(alias) == 1
        }
        numbered = {name.removesuffix("-1"): name for name in drawings if name.endswith("-1")}
        names = {**numbered, **aliases, **(other_names or {})}
        renamed = {name: drawings[other] for name, other in names.items() if other in drawings}
        self.drawings = {**renamed, **drawings}
        self.default_width: int = contents.get("width", 16)
        self.default_height: int = contents.get("height", 16)

    def __contains__(self, name: str) -> bool:
        return name in self.drawings

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
        """The drawing as RGBA with a transparent ground, `size_px` square; raises a DataError without one."""
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
    size: tuple[int, int] = (IMAGE_PX, IMAGE_PX),
    shift: tuple[int, int] = (0, 0),
) -> Image.Image:
    """Puts a drawing in the middle of a ground of `size` (width, height), or `shift` pixels away from it."""
    image = Image.new("RGBA", size, (*GROUNDS[ground], 255))
    left, top = ((size[axis] - drawing.size[axis]) // 2 + shift[axis] for axis in (0, 1))
    image.alpha_composite(drawing, (max(0, left), max(0, top)), (max(0, -left), max(0, -top)))
    return image.convert("RGB")


def drawing_px(image_px: int) -> int:
    """Edge of a drawing on an image whose shorter edge is `image_px`."""
    return round(DRAWING_SHARE * image_px)


def to_array(image: Image.Image) -> np.ndarray:
    """RGB image -> float32 of shape (3, H, W) in [-1, 1]."""
    return np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1


def load_icons(icon_set: str, folder: Path) -> Icons:
    """Reads an icon set from a folder of archives of `npm pack`, or of unpacked `ICON_SET.json`."""
    plain, archive = folder / f"{icon_set}.json", folder / ICON_SETS[icon_set].archive
    if plain.is_file():
        return Icons(json.loads(plain.read_text(encoding="utf-8")), OTHER_NAMES.get(icon_set))
    if not archive.is_file():
        raise DataError(
            f"{folder} holds neither {archive.name} nor {plain.name}; leave out --icons to fetch it"
        )
    with tarfile.open(archive) as packed:
        member = packed.extractfile("package/icons.json")
        if member is None:
            raise DataError(
                f"{archive} is not an icon package; fetch it with npm pack {ICON_SETS[icon_set].package}"
            )
        return Icons(json.load(member), OTHER_NAMES.get(icon_set))


def fetch_icons(icon_sets: Sequence[str], folder: Path) -> Path:
    """Fetches the packages that `folder` lacks with `npm pack`; raises a DataError if that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    for icon_set in icon_sets:
        package = ICON_SETS[icon_set]
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
