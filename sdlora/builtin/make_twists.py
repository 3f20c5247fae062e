"""Makes small datasets out of a larger one: its drawings with a twist, for the leaves of an adapter tree."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageFilter, ImageOps

from sdlora.builtin.script import Script

TRAINING = 12
HELDOUT = 12


TWISTS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "inverted": ImageOps.invert,
    # Every dark line is two pixels wider on each side.
    "thick": lambda image: image.filter(ImageFilter.MinFilter(5)),
    # One palette, from dark blue over orange to paper.
    "duotone": lambda image: ImageOps.colorize(ImageOps.grayscale(image), "#14213d", "#fdf6e3", "#fb8b24"),
}


def make_twist(images: Path, name: str, folder: Path) -> None:
    """Writes a few drawings of a dataset and its `heldout`, evenly spread, twisted, with their captions."""
    for part, count in (("", TRAINING), ("heldout", HELDOUT)):
        drawings = sorted((images / part).glob("*.png"))
        (folder / part).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            drawing = drawings[number * len(drawings) // count]
            with Image.open(drawing) as image:
                TWISTS[name](image.convert("RGB")).save(folder / part / drawing.name)
            caption = drawing.with_suffix(".txt").read_text(encoding="utf-8")
            (folder / part / drawing.with_suffix(".txt").name).write_text(caption, encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: writes a folder for each twist."""
    script = Script("make_twists", __doc__)
    script.add_argument("images", type=Path, help="a dataset with a folder heldout, as datasets/openmoji")
    script.add_argument(
        "out", type=Path, help="gets a folder for each twist; the licence stays the dataset's"
    )

    def work(given: Namespace) -> None:
        for name in TWISTS:
            make_twist(given.images, name, given.out / name)
            print(given.out / name)

    return script.run(work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
