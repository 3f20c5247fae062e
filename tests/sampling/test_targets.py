"""The images that a grid's prompts are captions of."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sdlora.config import load_config
from sdlora.data.scan import read_captions, scan_dataset
from sdlora.sampling.targets import find_run_targets, find_targets


def write_image(path: Path, color: str, caption: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), color).save(path)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for number, color in enumerate(("red", "green", "blue")):
        write_image(folder / f"{number}.png", color, f"a {color} square")
    write_image(folder / "heldout" / "0.png", "black", "a red square")
    return folder


def test_captions_are_those_of_a_scan(images: Path, tmp_path: Path) -> None:
    """The short way to captions finds what a scan finds, held-out images first, in any place."""
    elsewhere = tmp_path / "elsewhere"
    write_image(elsewhere / "9.png", "white", "a white square")
    for heldout in ("auto", str(elsewhere), "0"):
        overrides = {"data.trigger": "sks", "data.heldout": 0 if heldout == "0" else heldout}
        settings = load_config(None, overrides).data
        index = scan_dataset(images, settings)
        expected = {(record.path, record.caption) for record in (*index.records, *index.heldout)}
        captions = read_captions(images, settings)
        assert {pair for pair in captions if heldout == "auto" or "heldout" not in str(pair)} == expected
        count = len(index.heldout)
        assert [path for path, _ in captions[:count]] == [record.path for record in index.heldout]


def test_targets_of_prompts(images: Path) -> None:
    """The held-out image of a caption comes first; without one, examples of the folder stand in."""
    captions = read_captions(images, load_config().data)
    targets = find_targets(captions, ["a red square", "a blue square"])
    assert [image.getpixel((0, 0)) for image in targets.images.values()] == [(0, 0, 0), (0, 0, 255)]
    assert not targets.examples
    targets = find_targets(captions, ["a red square", "a house"])
    assert list(targets.images) == ["a red square"]
    assert len(targets.examples) == 4


def test_targets_of_a_run(images: Path) -> None:
    """R-47: without the image folder, or where a file is broken, the grid has no targets and still comes."""
    config = load_config(None, {"data.trigger": "sks"}, images=images)
    found = find_run_targets(config, ["sks, a red square"])
    assert found
    assert list(found.images) == ["sks, a red square"]
    (images / "heldout" / "0.png").write_bytes(b"broken")
    found = find_run_targets(config, ["sks, a red square"])
    assert found
    assert not found.images
    assert find_run_targets(config.model_copy(update={"images": "gone"}), ["x"]) is None
