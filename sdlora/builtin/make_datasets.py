"""Makes the two example datasets: concepts that the base knows, in icon sets that it has never seen."""

from __future__ import annotations

import random
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sdlora.builtin.captions import name_thing, read_concepts
from sdlora.builtin.icons import ICON_SETS, STYLE_SETS, Icons, compose, drawing_px, fetch_icons, load_icons
from sdlora.builtin.script import Script
from sdlora.errors import DataError
from sdlora.writing import write_text

SHIPPED = Path(__file__).parents[2] / "datasets"
SQUARE = (160, 160)
OBLONG = ((192, 128), (128, 192), (176, 128), (128, 176))
OBLONG_EVERY = 11
COLORS = 64  # of the palette: flat drawings lose nothing the eye sees


@dataclass(frozen=True)
class Dataset:
    """One example dataset: its icon set, how many images, and where the drawings are from."""

    icon_set: str
    training: int
    heldout: int
    seed: int
    source: str


DATASETS: dict[str, Dataset] = {
    "openmoji": Dataset("openmoji", 150, 40, 1, "https://openmoji.org"),
    "fluent-mono": Dataset("fluent-mono", 100, 40, 2, "https://github.com/microsoft/fluentui-emoji"),
}


def split_concepts(dataset: Dataset, concepts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The concepts for training and those held out, sorted; raises a DataError if there are too few."""
    wanted = dataset.training + dataset.heldout
    if len(concepts) < wanted:
        raise DataError(
            f"{dataset.icon_set} needs {wanted} concepts and the base knows {len(concepts)}; name more"
        )
    chosen = random.Random(dataset.seed).sample(sorted(concepts), wanted)
    return sorted(chosen[: dataset.training]), sorted(chosen[dataset.training :])


def size_of(index: int) -> tuple[int, int]:
    """Width and height of the image at `index`: most are square, every eleventh is not."""
    turn, rest = divmod(index, OBLONG_EVERY)
    return OBLONG[turn % len(OBLONG)] if rest == OBLONG_EVERY - 1 else SQUARE


def draw(icons: Icons, concept: str, size: tuple[int, int]) -> Image.Image:
    """One image of a concept, centred on white."""
    return compose(icons.render(concept, drawing_px(min(size))), "white", size)


def save_images(
    icons: Icons, concepts: Sequence[str], sizes: Sequence[tuple[int, int]], folder: Path
) -> None:
    """Writes NAME.png and NAME.txt for each concept."""
    folder.mkdir(parents=True, exist_ok=True)
    for concept, size in zip(concepts, sizes, strict=True):
        flat = draw(icons, concept, size).quantize(COLORS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        flat.save(folder / f"{concept}.png", optimize=True)
        write_text(folder / f"{concept}.txt", f"{name_thing(concept)}\n")


def attribution(dataset: Dataset) -> str:
    """What the folder says about where its images come from."""
    icon_set = ICON_SETS[dataset.icon_set]
    return f"""# {icon_set.title}: {dataset.training} captioned images, {dataset.heldout} held out

Drawings: {icon_set.title} by {icon_set.author}, <{dataset.source}>, taken from the npm package
`{icon_set.package}` {icon_set.version}. Licence: {icon_set.licence}, see `LICENSE`.

Changes: a selection; rendered to pixels on white, {SQUARE[0]} x {SQUARE[1]}, some on a wider or taller
ground; colors reduced to a palette of {COLORS}. The captions are the drawings' names.

`heldout/` shows concepts that the images outside it do not. It is never trained on, and says whether
a style was learned or the images were.

Made by `python -m sdlora.builtin.make_datasets`.
"""


def make_dataset(name: str, out: Path, icons_folder: Path) -> Path:
    """Makes one dataset in `out / name`, replacing what is there."""
    dataset, folder = DATASETS[name], out / name
    icons = load_icons(dataset.icon_set, icons_folder)
    training, heldout = split_concepts(dataset, [concept for concept in read_concepts() if concept in icons])
    licence = (SHIPPED / name / "LICENSE").read_text(encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    save_images(icons, training, [size_of(index) for index in range(len(training))], folder)
    save_images(icons, heldout, [SQUARE] * len(heldout), folder / "heldout")
    write_text(folder / "LICENSE", licence)
    write_text(folder / "README.md", attribution(dataset))
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    script = Script("make_datasets", __doc__, "--icons")
    script.add_argument("--out", type=Path, default=Path("datasets"), help="gets a folder for each")

    def work(given: Namespace) -> None:
        icons = given.icons or fetch_icons(STYLE_SETS, given.out / ".icons")
        for name in DATASETS:
            print(f"{make_dataset(name, given.out, icons)} is written")

    return script.run(work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
