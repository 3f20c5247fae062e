"""The judge: it learns, is kept in a small file, and sees nothing that is held out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from sdlora.builtin import judge as module
from sdlora.builtin.icons import ICON_SETS, STYLE_SETS, compose, load_icons
from sdlora.builtin.judge import (
    Judge,
    augment,
    ceiling,
    heldout_concepts,
    load_judge,
    recognise,
    render_training,
    save_judge,
    to_input,
    train,
)
from sdlora.errors import DataError, ModelError

CONCEPTS = ["apple", "moon", "owl"]


@pytest.fixture
def datasets(tiny_icons: Path, tmp_path: Path) -> Path:
    """Each style set's dataset holds out its owl."""
    for name in STYLE_SETS:
        folder = tmp_path / name / "heldout"
        folder.mkdir(parents=True)
        compose(load_icons(name, tiny_icons).render("owl", 112)).save(folder / "owl.png")
    return tmp_path


def test_nothing_held_out_is_seen(tiny_icons: Path, datasets: Path) -> None:
    """Every set draws every concept, but for the held-out ones of the datasets."""
    held = heldout_concepts(datasets)
    assert held == {name: {"owl"} for name in STYLE_SETS}
    images, labels = render_training(CONCEPTS, tiny_icons, held, variants=1)
    assert len(images) == len(labels) == 2 * (len(ICON_SETS) * 3 - 2)
    assert (labels == CONCEPTS.index("owl")).sum() == 2 * (len(ICON_SETS) - 2)
    with pytest.raises(DataError, match="heldout"):
        heldout_concepts(tiny_icons)


def test_augmented_images_differ(tiny_icons: Path) -> None:
    """Shape and range stay, the pixels do not; the same generator gives the same."""
    images = to_input(
        [Image.new("RGB", (128, 128), "white"), load_icons("noto", tiny_icons).render("owl", 96)]
    )
    images = images.float() / 127.5 - 1
    one, other = (augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.shape == images.shape
    assert torch.equal(one, other)
    assert one.abs().max() <= 1
    assert not torch.equal(one, images)


def test_it_is_trained_kept_and_asked(
    tiny_icons: Path, datasets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file holds the weights in fp16 and the concepts; the one read from it guesses the same."""
    monkeypatch.setattr(module, "VARIANTS", 0)
    monkeypatch.setattr(module, "BATCH", 8)
    judge = train(CONCEPTS, tiny_icons, datasets, 2, tmp_path / "log.jsonl")
    file = tmp_path / "judge.safetensors"
    save_judge(judge, file)
    assert file.stat().st_size < 2_000_000
    kept = load_judge(file)
    images = [load_icons("noto", tiny_icons).render(name, 96) for name in CONCEPTS]
    assert recognise(kept, images, best=3) == recognise(judge, images, best=3)
    share, missed = ceiling(kept, datasets / "openmoji")
    assert (share, missed) in ((1.0, []), (0.0, ["owl"]))
    assert isinstance(kept, Judge)


def test_a_missing_judge_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"sdlora\.builtin\.judge"):
        load_judge(tmp_path / "judge.safetensors")
