"""The doctor finds what ruins a style: faults planted by script, and none on the clean sets (R-15, R-35)."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from sdlora.config import DataSection
from sdlora.data import image_checks
from sdlora.data.buckets import plan_buckets
from sdlora.data.findings import examine
from sdlora.data.image_checks import cache_file, examine_images, find_marks, measure, measure_records
from sdlora.data.images import load_image
from sdlora.data.repairs import plan_repairs, strip_style, undo_repairs
from sdlora.data.scan import scan_dataset
from sdlora.errors import DataError
from tests.checks import raises
from tests.data.planted import STYLED, THINGS, Plan, all_sources, builtin_tokens, count_checks, look_at, plant


@pytest.fixture(scope="module")
def planted(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """Drawings with faults, and which images have which."""
    root = tmp_path_factory.mktemp("planted") / "images"
    drawings = [load_image(file) for file in sorted((repository / "datasets/openmoji").glob("*.png"))[:36]]
    return root, plant(drawings, root, 4)


def test_planted_faults_are_found(planted: tuple[Path, Plan], tmp_path: Path, monkeypatch) -> None:
    """R-15: of each check, three in four of those planted at least, and no other; then it is cached."""
    root, plan = planted
    cache = cache_file(tmp_path, root, "white")
    found = look_at(root, cache)
    for key, expected in plan.items():
        shown = found.get(key, set())
        is_found = len(shown & expected) >= 0.75 * len(expected) and not shown - expected
        assert is_found, (key, sorted(expected - shown), sorted(shown - expected))
    monkeypatch.setattr(image_checks, "measure", None)
    assert look_at(root, cache) == found, "a second check measures nothing"
    cache.write_bytes(cache.read_bytes()[:-500])
    monkeypatch.undo()
    assert look_at(root, cache) == found, "a damaged cache is made anew"


@pytest.mark.slow
def test_each_check_finds_what_was_planted(repository: Path, tmp_path: Path) -> None:
    """R-15: precision and recall of at least 0.9, on drawings and photographs (the table of doctor.md)."""
    for key, count in count_checks(all_sources(repository), tmp_path, 10, builtin_tokens()).items():
        assert min(count.recall, count.precision) >= 0.9, (key, count)
        assert count.planted >= 9, key


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
    styled = min(planted[1]["data.caption-style"])
    shutil.copy(planted[0] / styled, root / "010.png")
    (root / "010.txt").write_text("a watercolor painting of a boat", encoding="utf-8")
    shutil.copy(planted[0] / "000.png", root / "000.png")
    shutil.copy(root / "000.png", root / "copy.png")
    ImageOps.mirror(Image.open(root / "000.png")).save(root / "082.png")
    (root / "082.txt").write_text("a house", encoding="utf-8")
    before = {file.name: file.read_bytes() for file in root.iterdir()}
    section = DataSection(heldout=0, allow_missing_captions=True)
    index = scan_dataset(root, section)
    examine_images(index, measure_records(index.records, "white", None))
    repairs = plan_repairs(index, examine(index, plan_buckets(index.records, 64, section), section, None))
    assert {file.name: file.read_bytes() for file in root.iterdir()} == before, "planning changes nothing"
    assert len(repairs.lines()) == 4
    aside = repairs.apply()
    assert aside.parent == tmp_path
    assert {file.name for file in aside.iterdir()} == {"082.png", "082.txt", "copy.png", "undo.json"}
    assert (root / "010.txt").read_text(encoding="utf-8") == "a boat"
    assert undo_repairs(root) == 4
    assert {file.name: file.read_bytes() for file in root.iterdir()} == before
    with raises(DataError, "data.undo"):
        undo_repairs(root)


def test_a_held_out_copy_goes_aside(planted: tuple[Path, Plan], tmp_path: Path) -> None:
    """R-15: it would be in the validation loss."""
    root = tmp_path / "images"
    (root / "heldout").mkdir(parents=True)
    for name in ("000.png", "heldout/copy.png"):
        shutil.copy(planted[0] / "000.png", root / name)
        (root / name).with_suffix(".txt").write_text("a house", encoding="utf-8")
    section = DataSection()
    index = scan_dataset(root, section)
    assert len(index.heldout) == 1
    repairs = plan_repairs(index, examine(index, plan_buckets(index.records, 64, section), section, None))
    aside = repairs.apply()
    assert not (root / "heldout" / "copy.png").exists()
    assert (aside / "heldout" / "copy.png").is_file()


def test_a_patterned_ground_is_no_mark() -> None:
    """R-15: dots all over each image are its style; the same dots in one corner are a mark."""
    rows, columns = np.indices((256, 256))
    dots = np.where((rows % 12 < 5) & (columns % 12 < 5), 60, 230).astype(np.uint8)
    images = []
    for number in range(12):
        random = np.random.default_rng(number)
        plain = random.integers(120, 220, (8, 8)).astype(np.uint8).repeat(32, 0).repeat(32, 1)
        marked = plain.copy()
        marked[-48:, -96:] = dots[-48:, -96:]
        ground = dots.copy()
        ground[64:192, 64:192] = plain[64:192, 64:192]
        images.append((marked, ground))
    for number, expected in ((0, 12), (1, 0)):
        shown = [Image.fromarray(pair[number]).convert("RGB") for pair in images]
        corners = np.stack([measure(image)[1] for image in shown])
        assert len(find_marks(corners)) == expected


def test_style_words_go_and_things_stay() -> None:
    for text, left in STYLED.items():
        assert strip_style(text) == left
    assert strip_style("a watercolor of a cat\na cat on a mat\nwatercolor") == "a cat\na cat on a mat"
    for thing in THINGS:
        assert strip_style(thing) == thing
