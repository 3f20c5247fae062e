"""Makes the two example datasets: concepts that the base knows, in icon sets that it has never seen."""

from __future__ import annotations

import random
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sdlora.builtin.captions import concept_to_words, read_concepts
from sdlora.builtin.icons import ICON_SETS, STYLE_SETS, Icons, compose, drawing_px, fetch_icons, load_icons
from sdlora.builtin.script import Script
from sdlora.errors import DataError

SQUARE = (160, 160)
OBLONG = ((192, 128), (128, 192), (176, 128), (128, 176))
OBLONG_EVERY = 11
COLOURS = 64  # of the palette: flat drawings lose nothing the eye sees


@dataclass(frozen=True)
class Dataset:
    """One example dataset: how many images, and what its licence asks to be said."""

    icon_set: str
    training: int
    heldout: int
    seed: int
    source: str
    notice: str


CC_BY_SA = """\
OpenMoji: the open-source emoji and icon project. Copyright OpenMoji contributors.

The images in this folder are adapted from OpenMoji and are licensed, as OpenMoji is, under the
Creative Commons Attribution-ShareAlike 4.0 International License (CC BY-SA 4.0).

You are free to share and adapt them for any purpose, even commercially, as long as you give
appropriate credit, link to the licence, say what you changed, and distribute what you make of them
under the same licence.

The full text of the licence: https://creativecommons.org/licenses/by-sa/4.0/legalcode

The images come without any warranty.
"""

MIT = """\
MIT License

Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

DATASETS: dict[str, Dataset] = {
    "openmoji": Dataset("openmoji", 150, 40, 1, "https://openmoji.org", CC_BY_SA),
    "fluent-mono": Dataset("fluent-mono", 100, 40, 2, "https://github.com/microsoft/fluentui-emoji", MIT),
}


def split_concepts(dataset: Dataset, concepts: Sequence[str]) -> tuple[list[str], list[str]]:
    """The concepts of the training part and of the held-out part, both sorted.

    Raises:
        DataError: There are too few concepts for both.
    """
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
        flat = draw(icons, concept, size).quantize(
            COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        )
        flat.save(folder / f"{concept}.png", optimize=True)
        name = concept_to_words(concept)
        article = "an" if name[0] in "aeiou" and not name.startswith("uni") else "a"
        (folder / f"{concept}.txt").write_text(f"{article} {name}\n", encoding="utf-8")


def attribution(dataset: Dataset) -> str:
    """What the folder says about where its images come from."""
    icon_set = ICON_SETS[dataset.icon_set]
    return f"""# {icon_set.title}: {dataset.training} captioned images, {dataset.heldout} held out

Drawings: {icon_set.title} by {icon_set.author}, <{dataset.source}>, taken from the npm package
`{icon_set.package}` {icon_set.version}. Licence: {icon_set.licence}, see `LICENSE`.

Changes: a selection; rendered to pixels on white, {SQUARE[0]} x {SQUARE[1]}, some on a wider or taller
ground; colours reduced to a palette of {COLOURS}. The captions are the drawings' names.

`heldout/` shows concepts that the images outside it do not. It is never trained on, and says whether
a style was learned or the images were.

Made by `python -m sdlora.builtin.make_datasets`.
"""


def make_dataset(name: str, out: Path, icons_folder: Path) -> Path:
    """Makes one dataset in `out / name`, replacing what is there."""
    dataset, folder = DATASETS[name], out / name
    icons = load_icons(dataset.icon_set, icons_folder)
    training, heldout = split_concepts(dataset, [concept for concept in read_concepts() if concept in icons])
    shutil.rmtree(folder, ignore_errors=True)
    save_images(icons, training, [size_of(index) for index in range(len(training))], folder)
    save_images(icons, heldout, [SQUARE] * len(heldout), folder / "heldout")
    (folder / "LICENSE").write_text(dataset.notice, encoding="utf-8")
    (folder / "README.md").write_text(attribution(dataset), encoding="utf-8")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    script = Script("make_datasets", __doc__, "--icons")
    script.add_argument("--out", type=Path, default=Path("datasets"), help="gets a folder for each")

    def work(given: Namespace) -> None:
        icons = given.icons or fetch_icons(STYLE_SETS, given.out / ".icons")
        for name in DATASETS:
            print(f"{make_dataset(name, given.out, icons)} is written")

    return script.run(work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
