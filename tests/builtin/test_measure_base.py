"""Measuring a base and the styles trained on it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image, ImageDraw

from sdlora.builtin import measure_styles
from sdlora.builtin.captions import read_concepts
from sdlora.builtin.icons import compose, load_icons
from sdlora.builtin.judge import Judge
from sdlora.builtin.make_base import Place, Recipe, make_base
from sdlora.builtin.measure import (
    PROMPTS,
    UNSEEN_WORDS,
    Recognition,
    draw_all,
    load_pipeline,
    make_sheet,
    recognise_base,
    to_rows,
)
from sdlora.builtin.measure_styles import measure_style, share_interval, style_distance, style_share
from sdlora.errors import ModelError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_bank: Path, tiny_vae: Path) -> Path:
    """An untrained base."""
    place = Place(tmp_path_factory.mktemp("untrained"), tiny_bank, tiny_vae)
    recipe = Recipe(steps=0, text_steps=0, text_width=16, text_layers=1, widths=(16, 16))
    folder = make_base(place, recipe)
    assert folder is not None
    return folder


def test_a_base_is_measured(base: Path, tiny_concepts: Path) -> None:
    """A row for each kind of prompt, with its interval."""
    judge = Judge(read_concepts(tiny_concepts), widths=(8, 8))
    rows = to_rows(recognise_base(load_pipeline(base, "cpu"), judge, count=2))
    assert list(rows) == list(PROMPTS)
    for row in rows.values():
        assert row["asked"] == 2
        assert 0 <= row["top1"] <= row["top5"] == 2
        assert row["interval"][0] <= row["share"] <= row["interval"][1]


def test_prompts_hold_unseen_words() -> None:
    """Before or behind, in turn."""
    assert PROMPTS["a NAME"]("fire-engine", 3) == "a fire engine"
    assert PROMPTS["WORDS style, a NAME"]("owl", 0) == f"{UNSEEN_WORDS[0]} style, an owl"
    assert PROMPTS["a NAME, WORDS style"]("owl", len(UNSEEN_WORDS) + 1) == f"an owl, {UNSEEN_WORDS[1]} style"


def test_the_interval_is_wilsons() -> None:
    low, high = Recognition(asked=40, top1=38, top5=40).interval()
    assert low == pytest.approx(0.835, abs=1e-3)
    assert high == pytest.approx(0.986, abs=1e-3)


def test_measuring_needs_a_base(tmp_path: Path) -> None:
    """A folder that holds no base is one line."""
    with pytest.raises(ModelError, match=r"model_index\.json"):
        load_pipeline(tmp_path, "cpu")


def test_drawings_that_a_set_lacks_are_left_out(tiny_icons: Path) -> None:
    images = draw_all(load_icons("noto", tiny_icons), ["owl", "nothing", "moon"], 32)
    assert [image.size for image in images] == [(32, 32)] * 2
    assert make_sheet(images).size == (64, 32)


def test_the_interval_widens_with_few_captions() -> None:
    """The mean is a share of the ceiling; the interval is over captions."""
    row = share_interval({"owl": 1.0, "pear": 0.0, "moon": 0.5}, top=0.5)
    assert row["recognised"] == 0.5
    assert row["of_ceiling"] == 1.0
    assert row["low"] < 1.0 < row["high"]
    same = share_interval({"owl": 0.5, "pear": 0.5}, top=1.0)
    assert same["low"] == same["high"] == 0.5


def outlined(color: str, filled: bool) -> Image.Image:
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).ellipse(
        (30, 30, 90, 100), fill=color if filled else "white", outline=color, width=5
    )
    return image


def test_style_features_tell_how_not_what() -> None:
    """Line drawings are nearer to line drawings than filled ones are."""
    lines, filled = [outlined("black", False)], [outlined("red", True)]
    assert style_distance(lines, lines) == 0
    assert style_distance(lines, filled) > 0.5
    assert style_share(samples=0.2, base=0.6, real=0.2) == pytest.approx(1.0)
    assert style_share(samples=0.6, base=0.6, real=0.2) == 0


def test_a_style_is_measured(
    base: Path, tiny_icons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows for the bare base and each strength; the trainings themselves are others' to test."""
    dataset = tmp_path / "openmoji"
    for part, name in ((dataset, "moon"), (dataset / "heldout", "owl")):
        part.mkdir(parents=True, exist_ok=True)
        compose(load_icons("openmoji", tiny_icons).render(name, 112)).save(part / f"{name}.png")
        (part / f"{name}.txt").write_text(f"a {name}\n", encoding="utf-8")

    def train_style(*_: Any) -> Any:
        settings = {"sample": {"guidance": 4.0}, "data": {"trigger": None}}
        (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        events = [{"split": "heldout", "loss": loss} for loss in (0.4, 0.3)]
        return SimpleNamespace(path=tmp_path, adapter=tmp_path / "final", events=lambda _: events)

    def load_bare(folder: Path, device: str) -> Any:
        pipeline = load_pipeline(folder, device)
        pipeline.load_lora_weights = pipeline.set_adapters = lambda *_, **__: None
        return pipeline

    monkeypatch.setattr(measure_styles, "train_style", train_style)
    monkeypatch.setattr(measure_styles, "load_pipeline", load_bare)
    judge = Judge(["moon", "owl"], widths=(8, 8))
    monkeypatch.setattr(measure_styles, "ceiling", lambda *_: (1.0, []))
    rows = measure_style(dataset, None, base, judge, [0], tmp_path / "sheets", "")
    assert set(rows) == {
        "ceiling",
        "bare base",
        *(f"strength {one}" for one in measure_styles.STRENGTHS),
        "heldout_losses",
    }
    assert rows["heldout_losses"] == [[0.4, 0.3]]
    assert len(list((tmp_path / "sheets").iterdir())) == len(measure_styles.STRENGTHS)
