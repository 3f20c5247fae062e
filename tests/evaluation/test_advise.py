"""The rank adviser, on a short real run."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from sdlora.config import load_config
from sdlora.errors import ConfigError, RunError
from sdlora.evaluation.advise import advise_rank, candidate_ranks
from sdlora.evaluation.context import open_context
from sdlora.formats.files import inspect_adapter, load_adapter, save_adapter
from sdlora.rank.resize import resize
from sdlora.training.train import train
from tests.checks import raises


@pytest.fixture(scope="module")
def run(tmp_path_factory, draw_images):
    """Rank 6 on circles, long enough to have learnt something; it stays as it is but for new files."""
    folder = tmp_path_factory.mktemp("advise")
    keys = {
        "data.resolution": 64,
        "data.heldout": 0.5,
        "lora.rank": 6,
        "train.steps": 20,
        "train.batch_size": 2,
        "train.learning_rate": 2e-3,
        "train.warmup": 2,
        "train.schedule": "constant",
        "train.save_every": 0,
        "train.sample_every": 0,
        "train.evaluate_every": 0,
        "sample.steps": 2,
        "sample.prompts": ["a circle"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDLORA_CACHE", str(folder / "cache"))
        images = draw_images(folder / "circles", ((64, 64),) * 16)
        return train(images, config=load_config(None, keys, images=images), out=folder / "run", quiet=True)


@pytest.fixture(scope="module")
def advice(run):
    return advise_rank(run, keep=0.9)


def test_each_rank_is_measured(run, advice):
    """The losses are those of the truncated adapters; the whole one keeps everything."""
    assert [one.rank for one in advice.candidates] == [1, 2, 4, 6]
    context = open_context(run)
    small, report = resize(load_adapter(run.adapter), rank=2)
    second = advice.candidates[1]
    assert second.loss == context.loss(((small, 1.0),)).loss
    assert second.energy == pytest.approx(1 - report.error**2)
    assert second.megabytes == pytest.approx(small.num_parameters * 2 / 1e6)
    assert advice.loss_without == context.loss(()).loss
    last = advice.candidates[-1]
    assert (last.kept, last.energy, last.distance) == (1.0, 1.0, 0.0)
    assert last.loss == context.loss(context.style).loss < advice.loss_without
    energies = [one.energy for one in advice.candidates]
    assert energies == sorted(energies)
    assert all(one.distance >= 0 for one in advice.candidates)


def test_the_smallest_that_keeps_enough(run, advice):
    """It is written in both dialects, loads, and is drawn; the run's own files stay."""
    enough = [one.rank for one in advice.candidates if one.interval.low >= 0.9]
    assert advice.rank == enough[0] < 6
    assert [file.name for file in advice.files] == [
        f"rank-{advice.rank}.safetensors", f"rank-{advice.rank}.kohya.safetensors",
    ]  # fmt: skip
    for file in advice.files:
        assert inspect_adapter(file).rank == advice.rank
        assert load_adapter(file).notes["sdlora.base_name"] == "builtin"
    assert inspect_adapter(run.adapter).rank == 6
    with Image.open(run.rank_curve) as image:
        assert image.width > 2 * image.height
    values = json.loads(run.advice_file.read_text())
    assert values["rank"] == advice.rank
    assert len(values["candidates"]) == 4
    lines = advice.lines()
    best = next(one for one in advice.candidates if one.rank == advice.rank)
    assert f"rank {best.rank} keeps 90% or more of what rank 6 learned" in "\n".join(lines)
    assert f"{best.distance:.0%} of the way" in "\n".join(lines)
    assert str(run.rank_curve) in "\n".join(lines)


def test_when_no_smaller_rank_is_enough(run):
    """Nothing is written, and the advice is to keep the rank."""
    told = []
    advice = advise_rank(run, keep=1.0, ranks=[1], progress=lambda *done: told.append(done))
    total = told[-1][0]
    assert total > 6
    # Two losses, then the images: of the base, then of both ranks together.
    assert told[:2] == [(1, total), (2, total)]
    assert len(told) >= 4
    assert told == sorted((done, total) for done, _ in told)
    assert [one.rank for one in advice.candidates] == [1, 6]
    assert (advice.rank, advice.files) == (6, ())
    assert "keep rank 6: no smaller one surely keeps 100%" in "\n".join(advice.lines())


def test_seven_images_are_too_few_for_advice(run, monkeypatch):
    """R-13: the numbers are there, but no rank is recommended and no file is written."""
    monkeypatch.setattr("sdlora.evaluation.context.MAX_IMAGES", 7)
    before = sorted(run.adapters.iterdir())
    few = advise_rank(run, keep=0.5, ranks=[3])
    assert (few.rank, few.files, few.images) == (None, (), 7)
    assert [one.interval for one in few.candidates] == [None, None]
    assert any(line.startswith("advice    none: 7") for line in few.lines())
    assert sorted(run.adapters.iterdir()) == before


def test_mistakes(run, tmp_path):
    """One line, before anything is loaded."""
    with raises(ConfigError, "option--keep", shows=("1.5", "0.99")):
        advise_rank(run, keep=1.5)
    with raises(ConfigError, "option--ranks", shows="0,4"):
        advise_rank(run, ranks=[0, 4])
    assert candidate_ranks(16) == [1, 2, 4, 8]
    assert candidate_ranks(12, [3, 12, 20, 3]) == [3]
    assert candidate_ranks(1) == []


def test_an_adapter_that_has_learnt_nothing(run, tmp_path):
    """Exit code 2, and the command that shows more."""
    file = run.adapter
    before = file.read_bytes()
    adapter = load_adapter(file)
    for pair in adapter.modules.values():
        pair.up *= -3
    try:
        save_adapter(file, adapter)
        with raises(RunError, "rank.nothing-learned", shows=(str(run.path), "sdlora spectrum")):
            advise_rank(run)
    finally:
        file.write_bytes(before)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_that_is_read_only(tmp_path):
    """Results are written into the run, so it is refused before minutes are spent."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    tmp_path.chmod(0o500)
    with raises(RunError, "run.not-writable", shows=str(tmp_path)):
        open_context(tmp_path)
