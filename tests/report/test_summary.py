"""How a run went, from its events alone (R-12)."""

from __future__ import annotations

from typing import Any

import pytest

from sdlora.config import load_config
from sdlora.report.summary import (
    describe_losses,
    describe_state,
    describe_step,
    doubt_losses,
    pipeline_code,
)
from sdlora.runs import RunFolder
from sdlora.writing import write_text


@pytest.fixture
def make_run(tmp_path):
    """A run of 30 steps with losses of held-out images at 0, 10, 20 and so on."""

    def make(*losses: float, split: str = "heldout") -> RunFolder:
        config = load_config(None, {"train.steps": 30, "train.learning_rate": 1e-3})
        run = RunFolder.create(tmp_path / "run", config, {})
        for number, loss in enumerate(losses):
            run.append("step", 10 * number + 1)
            run.append("heldout", 10 * number, split=split, loss=loss, images=8)
            write_text(run.step_adapter(10 * number), "x") if number else None
        return run

    return make


def test_losses_on_the_way(make_run):
    """A line for each measurement, with the change since the first."""
    run = make_run(0.5)
    assert describe_step(run, 0, {"heldout": 0.5}) == "step 0    validation loss: held-out images 0.5000"
    told = describe_step(run, 10, {"train": 0.2, "heldout": 0.4})
    assert told == "step 10   validation loss: training images 0.2000, held-out images 0.4000 (-20%)"
    assert describe_losses(run) == []
    run.append("heldout", 10, split="heldout", loss=0.4)
    assert describe_losses(run) == ["loss      held-out images: 0.5000 at step 0, 0.4000 at step 10 (-20%)"]


def test_seven_images_say_nothing(make_run):
    """R-12: a loss on a few held-out images may rise by chance; that on the training images counts then."""
    run = make_run(0.5, 0.3, 0.4)
    assert doubt_losses(run) is not None
    run.append("heldout", 30, split="heldout", loss=0.5, images=7)
    assert doubt_losses(run) is None
    for step, loss in ((0, 0.5), (30, 0.6)):
        run.append("heldout", step, split="train", loss=loss, images=7)
    assert "training images did not fall" in (doubt_losses(run) or "")


@pytest.mark.parametrize("split", ["heldout", "train"])
def test_a_loss_that_rose_again(make_run, split):
    """Overfitting is said, with what to change and the saved step that is best by this measure."""
    run = make_run(0.5, 0.3, 0.31, 0.4, split=split)
    run.step_adapter(10).unlink()
    doubt = doubt_losses(run)
    assert doubt is not None
    for value in ("step 10: 0.3000", "step 30: 0.4000", "train.steps", "train.learning_rate (0.001)"):
        assert value in doubt
    assert f"step 20 (0.3100): {run.step_adapter(20)}" in doubt
    assert f"`sdlora sample {run.path} --step 20`" in doubt
    run.step_adapter(20).unlink()
    alone = doubt_losses(run)
    assert alone is not None
    assert alone.endswith("a lower train.learning_rate (0.001)")


def test_a_loss_that_did_not_fall(make_run):
    """A run that has learnt nothing says which settings to try."""
    doubt = doubt_losses(make_run(0.5, 0.51, 0.4999))
    assert doubt is not None
    for value in ("step 0: 0.5000", "step 20: 0.4999", "train.learning_rate (0.001)", "train.steps (30)"):
        assert value in doubt


@pytest.mark.parametrize("losses", [(), (0.5,), (0.5, 0.4, 0.3), (0.5, 0.3, 0.302)])
def test_a_loss_that_fell(make_run, losses):
    """All is well, or not measured: nothing to say."""
    assert doubt_losses(make_run(*losses)) is None


def test_where_a_run_stands(make_run):
    """How far, what failed, how it goes on; finished is finished."""
    run = make_run(0.5, 0.3, 0.4)
    run.append("warning", 3, message="first")
    run.append("warning", 4, message="a\x1b[2Jb")
    run.append("failed", 21, message="out of memory")
    write_text(run.checkpoint(20) / "state.json", "{}")
    first, failed, warnings, losses, note = describe_state(run)
    assert first == f"run       {run.path}, step 21 of 30; `sdlora resume {run.path}` continues at step 20"
    assert failed == "failed    out of memory"
    assert warnings == "warnings  2; last: a\\x1b[2Jb"
    assert losses.startswith("loss      held-out images")
    assert note.startswith("note      the loss on held-out images rose again")
    run.append("done", 30)
    assert describe_state(run)[0] == f"run       {run.path}, finished at step 30"


def test_a_layout_that_is_kept_is_no_overfitting(tmp_path):
    """With objective.layout_range, the loss at high noise is the base's; the bands that are trained count."""
    keys = {"objective.timestep_range": [0, 500], "objective.layout_range": [800, 1000], "train.steps": 20}
    run = RunFolder.create(tmp_path / "run", load_config(None, keys), {})
    losses = [(0.5, 0.5, 0.7), (0.3, 0.3, 0.5), (0.2, 0.2, 0.69)]
    for number, (low, middle, high) in enumerate(losses):
        bands = {"0-199": low, "200-399": middle, "400-599": high, "800-999": high}
        loss = sum(bands.values()) / 4
        run.append("heldout", 10 * number, split="heldout", loss=loss, by_band=bands, images=8)
    assert doubt_losses(run) is None
    run.append("heldout", 20, split="heldout", loss=0.1, by_band={"0-199": 0.6, "800-999": 0.1}, images=8)
    assert "rose again" in (doubt_losses(run) or "")


def test_code_that_loads_the_builtin_base():
    """R-38: it runs anywhere, not in a checkout alone."""
    names: dict[str, Any] = {}
    exec("\n".join(pipeline_code("builtin", "sd1")), names)
    assert type(names["pipe"]).__name__ == "StableDiffusionPipeline"


@pytest.mark.parametrize(
    ("source", "family", "line"),
    [
        ("/models/base", "sdxl", 'pipe = DiffusionPipeline.from_pretrained("/models/base")'),
        ("x.safetensors", "sdxl", 'pipe = StableDiffusionXLPipeline.from_single_file("x.safetensors")'),
        ("x.safetensors", "sd2", 'pipe = StableDiffusionPipeline.from_single_file("x.safetensors")'),
    ],
)
def test_code_suits_the_kind_of_base(source, family, line):
    """R-38: a single file has a loader and a class of its own."""
    assert pipeline_code(source, family)[-1] == line
