"""The doctor finds what ruins a style: faults planted by script, and none on the clean sets (R-15, R-35).

Of each check, on what was planted (`test_planted_faults_are_found` holds both above 0.9):

| check | planted | how |
|---|---|---|
| near-copies | 24 | half the size as JPEG, mirrored, cropped to 70-95 % of each side |
| almost black | 5 | at a fifth of the brightness |
| out of focus | 8 | Gaussian blur, or enlarged four times |
| borders | 6 | black bars above and below, a coloured frame |
| marks | 6 | the same letters in a corner of drawings and of textures |
| style words | 8 | as people write them, among captions that name things |
"""

from __future__ import annotations

import io
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from sdlora.config import DataSection
from sdlora.data import looks
from sdlora.data.buckets import plan_buckets
from sdlora.data.findings import examine
from sdlora.data.images import load_image
from sdlora.data.looks import cache_file, examine_looks, measure_records
from sdlora.data.repairs import plan_repairs, strip_style, undo_repairs
from sdlora.data.scan import scan_dataset
from sdlora.errors import DataError
from tests.checks import raises

# With what is left of each.
STYLED = {
    "a watercolor painting of a boat": "a boat",
    "a house, line art": "a house",
    "a dog in the style of an old master": "a dog",
    "a tree, flat colors": "a tree",
    "a cat, inkwash style": "a cat",
    "an oil painting, a hill": "a hill",
    "a photo of a lamp": "a lamp",
    "a cup, simple background": "a cup",
}
THINGS = (
    "a pencil",
    "a photo frame",
    "an artist palette",
    "a paint brush",
    "a picture on a wall",
    "a flat tire",
)


def texture(seed: int) -> Image.Image:
    """Shapes on a rough ground, as in a photograph."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(40, 216, (6, 6, 3), dtype=np.uint8)).resize((192, 160), 3)
    rough = np.asarray(coarse, np.float32) + draw.normal(0, 18, (160, 192, 3))
    image = Image.fromarray(np.clip(rough, 0, 255).astype(np.uint8))
    for _ in range(12):
        points = [tuple(draw.integers(0, 192, 2).tolist()) for _ in range(3)]
        ImageDraw.Draw(image).polygon(points, fill=tuple(draw.integers(0, 256, 3).tolist()))
    return image


def crop_part(image: Image.Image, draw: random.Random) -> Image.Image:
    """A window of 70 to 95 % of each side."""
    width, height = (round(side * draw.uniform(0.7, 0.95)) for side in image.size)
    left, top = draw.randint(0, image.width - width), draw.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def as_jpeg(image: Image.Image) -> Image.Image:
    data = io.BytesIO()
    image.resize((image.width // 2, image.height // 2)).save(data, "JPEG", quality=75)
    return Image.open(data).convert("RGB")


def darken(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(0.2)


def blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(3.5))


def enlarge(image: Image.Image) -> Image.Image:
    return image.resize((30, 30)).resize((160, 160), Image.Resampling.BICUBIC)


def frame(image: Image.Image) -> Image.Image:
    return ImageOps.expand(image, 12, "teal")


def letterbox(image: Image.Image) -> Image.Image:
    return ImageOps.expand(image, (0, image.height // 8), "black")


def mark(image: Image.Image) -> Image.Image:
    """Letters at the lower right, in proportion to the image."""
    image = image.resize((192, 192))
    font = ImageFont.load_default(15)
    canvas = ImageDraw.Draw(image)
    for offset, colour in ((1, (60, 60, 60)), (0, (235, 235, 235))):
        canvas.text((122 + offset, 172 + offset), "(c) Ink 24", colour, font)
    return image


Plan = dict[str, set[str]]
Fault = tuple[str, int, Callable[[Image.Image], Image.Image]]


@pytest.fixture(scope="module")
def planted(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """Drawings and textures, with faults, and which images have which."""
    root, draw = tmp_path_factory.mktemp("planted") / "images", random.Random(0)
    root.mkdir()
    drawings = [load_image(file) for file in sorted((repository / "datasets/openmoji").glob("*.png"))[:62]]
    images = [*drawings, *map(texture, range(20))]
    faults: list[Fault] = [
        *(("data.near-copies", 3 * number, as_jpeg) for number in range(8)),
        *(("data.near-copies", 3 * number + 1, ImageOps.mirror) for number in range(8)),
        *(("data.near-copies", 3 * number + 2, lambda image: crop_part(image, draw)) for number in range(8)),
    ]
    alone: list[Fault] = [
        *(("data.image-dark", number, darken) for number in range(62, 67)),
        *(("data.image-soft", number, blur) for number in (30, 31, 32, 33, 67, 68)),
        *(("data.image-soft", number, enlarge) for number in (34, 35)),
        *(("data.image-bordered", number, letterbox) for number in (69, 70, 71)),
        *(("data.image-bordered", number, frame) for number in (72, 73, 74)),
        *(("data.image-marked", number, mark) for number in (40, 41, 42, 75, 76, 77)),
    ]
    plan: Plan = {key: set() for key, _, _ in (*faults, *alone)}
    for key, number, change in alone:
        images[number] = change(images[number])
        plan[key].add(f"{number:03d}.png")
    for key, number, change in faults:
        plan[key].add(f"{len(images):03d}.png")
        images.append(change(images[number]))
    plan["data.caption-style"] = set()
    for number, image in enumerate(images):
        name = f"{number:03d}.png"
        image.save(root / name)
        text = THINGS[number] if number < len(THINGS) else f"thing number {chr(97 + number % 26)}{number}"
        if 10 <= number < 10 + len(STYLED):
            text = list(STYLED)[number - 10]
            plan["data.caption-style"].add(name)
        (root / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    return root, plan


def look_at(root: Path, cache: Path | None = None, **settings: object) -> dict[str, set[str]]:
    """What the doctor finds, by key."""
    section = DataSection(**{"heldout": 0, **settings})
    index = scan_dataset(root, section)
    examine_looks(index, measure_records([*index.records, *index.heldout], "white", cache))
    findings = examine(index, plan_buckets(index.records, 128, section, heldout=index.heldout), section, None)
    return {finding.key: set(finding.names) for finding in findings}


def test_planted_faults_are_found(planted: tuple[Path, Plan], tmp_path: Path, monkeypatch) -> None:
    """R-15: of each check, nine tenths of what was planted, and of what is found; then it is cached."""
    root, plan = planted
    cache = cache_file(tmp_path, root, "white")
    found = look_at(root, cache)
    for key, expected in plan.items():
        shown = found.get(key, set())
        recall, precision = len(shown & expected) / len(expected), len(shown & expected) / max(1, len(shown))
        assert min(recall, precision) >= 0.9, (key, sorted(expected - shown), sorted(shown - expected))
    monkeypatch.setattr(looks, "measure", None)
    assert look_at(root, cache) == found, "a second check measures nothing"
    cache.write_bytes(cache.read_bytes()[:-500])
    monkeypatch.undo()
    assert look_at(root, cache) == found, "a damaged cache is made anew"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openmoji", "fluent-mono"])
def test_clean_sets_have_no_findings(repository: Path, name: str) -> None:
    """R-15: nothing on the two sets that come with the project."""
    found = look_at(repository / "datasets" / name, heldout="auto")
    assert not {
        key for key in found if key.startswith(("data.image-", "data.near", "data.caption-", "data.trig"))
    }


@pytest.mark.parametrize(
    ("key", "captions"),
    [
        ("data.caption-same", ["a cat"] * 4 + [f"a {letter * 3}" for letter in "bcdefgh"]),
        ("data.caption-constant", [f"a hat on a {letter * 3}" for letter in "bcdefghijk"]),
        ("data.caption-subject", [f"a cat with {letter * 3}" for letter in "bcdef"] + ["x", "yy", "zz"]),
        (None, [f"a {letter * 3} on the {letter * 2}" for letter in "bcdefghijk"]),
    ],
)
def test_captions_that_say_little(tmp_path: Path, write_image, key: str | None, captions: list[str]) -> None:
    """R-30: the same captions, a word in nearly all of them, and a subject in many."""
    for number, caption in enumerate(captions):
        write_image(f"{number:02d}.png", caption=caption)
    section = DataSection(heldout=0, trigger="inkwash")
    index = scan_dataset(tmp_path, section)
    found = {one.key for one in examine(index, plan_buckets(index.records, 64, section), section, None)}
    assert {one for one in found if one.startswith("data.caption")} == ({key} if key else set())


def test_repairs_are_shown_done_and_undone(planted: tuple[Path, Plan], tmp_path: Path) -> None:
    """R-15: copies go aside with their captions, style words go, and undo brings all back to the byte."""
    root = tmp_path / "images"
    root.mkdir()
    for name in ("000", "010", "012", "082"):
        for suffix in (".png", ".txt"):
            shutil.copy(planted[0] / f"{name}{suffix}", root / f"{name}{suffix}")
    shutil.copy(root / "000.png", root / "copy.png")
    before = {file.name: file.read_bytes() for file in root.iterdir()}
    section = DataSection(heldout=0, allow_missing_captions=True)
    index = scan_dataset(root, section)
    examine_looks(index, measure_records(index.records, "white", None))
    repairs = plan_repairs(index, examine(index, plan_buckets(index.records, 64, section), section, None))
    assert {file.name: file.read_bytes() for file in root.iterdir()} == before, "planning changes nothing"
    assert len(repairs.lines()) == 5
    aside = repairs.apply()
    assert aside.parent == tmp_path
    assert {file.name for file in aside.iterdir()} == {"082.png", "082.txt", "copy.png", "undo.json"}
    assert (root / "010.txt").read_text(encoding="utf-8") == "a boat"
    assert undo_repairs(root) == 5
    assert {file.name: file.read_bytes() for file in root.iterdir()} == before
    with raises(DataError, "data.undo"):
        undo_repairs(root)


def test_style_words_go_and_things_stay() -> None:
    for text, left in STYLED.items():
        assert strip_style(text) == left
    for thing in THINGS:
        assert strip_style(thing) == thing
