"""Makes small datasets out of a larger one: its drawings with a twist, for the leaves of an adapter tree."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps

TRAINING = 12
HELDOUT = 12


def invert(image: Image.Image) -> Image.Image:
    """The negative."""
    return ImageOps.invert(image)


def thicken(image: Image.Image) -> Image.Image:
    """Every dark line two pixels wider on each side."""
    return image.filter(ImageFilter.MinFilter(5))


def tint(image: Image.Image) -> Image.Image:
    """One palette: from dark blue over orange to paper."""
    return ImageOps.colorize(ImageOps.grayscale(image), "#14213d", "#fdf6e3", mid="#fb8b24")


TWISTS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "inverted": invert,
    "thick": thicken,
    "duotone": tint,
}


def make_twist(images: Path, name: str, folder: Path) -> None:
    """Writes a few drawings of a dataset, evenly spread, twisted, each with its caption.

    Args:
        images: A dataset with a folder `heldout`.
        name: A key of `TWISTS`.
        folder: Receives the images, and a folder `heldout`.
    """
    for part, count in (("", TRAINING), ("heldout", HELDOUT)):
        drawings = sorted((images / part).glob("*.png"))
        (folder / part).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            drawing = drawings[number * len(drawings) // count]
            with Image.open(drawing) as image:
                TWISTS[name](image.convert("RGB")).save(folder / part / drawing.name)
            caption = drawing.with_suffix(".txt").read_text(encoding="utf-8")
            (folder / part / drawing.with_suffix(".txt").name).write_text(caption, encoding="utf-8")


def main() -> None:
    """Reads the arguments and writes a folder for each twist."""
    parser = argparse.ArgumentParser(prog="python -m sdlora.builtin.make_twists", description=__doc__)
    parser.add_argument(
        "images", type=Path, help="a dataset with a folder heldout, such as datasets/openmoji"
    )
    parser.add_argument(
        "out", type=Path, help="gets a folder for each twist; the licence stays the dataset's"
    )
    arguments = parser.parse_args()
    for name in TWISTS:
        make_twist(arguments.images, name, arguments.out / name)
        print(arguments.out / name)


if __name__ == "__main__":
    main()
