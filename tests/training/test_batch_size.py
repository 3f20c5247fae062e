"""Out of memory: automatic batch sizes, skipped grids and error messages (R-18)."""

from __future__ import annotations

import os

import pytest
import torch

from sdlora.errors import ConfigError, RunError
from sdlora.runs import RunFolder
from sdlora.sampling import generate
from sdlora.training import prepare as preparation
from sdlora.training.device import as_out_of_memory
from sdlora.training.loop import halving_divisors
from sdlora.training.resume import apply_overrides
from sdlora.training.step import StepRunner
from sdlora.training.train import resume, train
from tests.checks import raises

STEPS = {"train__steps": 2, "train__save_every": 1}


@pytest.fixture
def make(make_images, tiny, sd15_folder):
    """Images of two sizes, and a configuration on the tiny base."""
    images = make_images(sizes=((32, 32),) * 4 + ((64, 32),) * 2)
    return images, lambda **changes: tiny(images, base__source=str(sd15_folder), **STEPS, **changes)


def run_out(*args, **options):
    """Raises the error of the CPU's allocator: no address space is that large."""
    torch.empty(2**48, dtype=torch.uint8)


def limit_memory(monkeypatch, samples):
    """Limits a device to a number of samples; returns the list of the sizes that were tried."""
    tried, losses = [], StepRunner._losses

    def limited(self, step, micro_batch):
        tried.append(len(micro_batch))
        if len(micro_batch) > samples:
            run_out()
        return losses(self, step, micro_batch)

    monkeypatch.setattr(StepRunner, "_losses", limited)
    return tried


def test_a_base_that_does_not_fit(make, monkeypatch, tmp_path):
    """R-18: out of memory before the first step is one line, and the run can be resumed."""
    images, config = make
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "load_base", run_out)
        with raises(RunError, "out-of-memory", shows=str(tmp_path / "run")) as caught:
            train(images, out=tmp_path / "run", config=config(), quiet=True)
    assert caught.value.exit_code == 1
    assert "sdlora resume" in str(caught.value)
    assert resume(tmp_path / "run", quiet=True).adapter.is_file()


@pytest.mark.parametrize(
    ("share", "expected"), [(8, [8, 4, 2, 1]), (12, [12, 6, 3, 1]), (9, [9, 3, 1]), (7, [7, 1]), (1, [1])]
)
def test_halving(share, expected):
    """Every size divides the share, and is at most half of the one before."""
    assert list(halving_divisors(share)) == expected


@pytest.mark.parametrize(("fits", "found", "tries"), [(9, (8, 1), [8]), (3, (2, 4), [8, 4, 2])])
def test_the_largest_batch_that_fits(make, monkeypatch, tmp_path, fits, found, tries, check_same):
    """R-16, R-18: the run with the size that was found equals one with the same size set by hand."""
    images, config = make
    tried = limit_memory(monkeypatch, fits)
    automatic = config(train__batch_size="auto", train__accumulate=8)
    run = train(images, config=automatic, out=tmp_path / "auto", quiet=True)
    assert tried[: len(tries)] == tries
    settings = run.read_config().train
    assert (settings.batch_size, settings.accumulate) == found
    [event] = run.events("batch_size")
    assert (event["batch_size"], event["accumulate"]) == found
    by_hand = config(train__batch_size=found[0], train__accumulate=found[1])
    check_same(train(images, config=by_hand, out=tmp_path / "given", quiet=True), run)


def test_all_processes_take_what_fits_each(make, monkeypatch, tmp_path, fork_processes):
    """R-17, R-18: all use the smallest size found; a grid that one of them cannot make is skipped by all."""
    images, config = make
    changes = {"train__batch_size": "auto", "train__accumulate": 4, "train__sample_every": 1}
    run = RunFolder(tmp_path / "run")

    def start():
        is_first = os.environ["RANK"] == "0"
        limit_memory(monkeypatch, 4 if is_first else 2)
        if not is_first:
            monkeypatch.setattr(generate, "_denoise", run_out)
        train(images, config=config(sample__batch_size=1, **changes), out=run.path)

    children = fork_processes(2, start)
    assert [child.wait() for child in children] == [0, 0], [child.printed for child in children]
    settings = run.read_config().train
    assert (settings.batch_size, settings.accumulate) == (2, 2)
    assert list(run.events("samples")) == []
    warnings = [event for event in run.events("warning") if "out of memory" in event["message"]]
    assert [event["step"] for event in warnings] == [1, 2]
    assert not run.samples.exists()


def test_a_grid_that_does_not_fit_is_left_out(make, monkeypatch, tmp_path):
    """R-18: a grid that does not fit is a warning, and the run continues without it."""
    images, config = make
    monkeypatch.setattr(generate, "_denoise", run_out)
    run = train(images, config=config(train__sample_every=2), out=tmp_path / "run", quiet=True)
    [warning] = [event for event in run.events("warning") if "memory" in event["message"]]
    assert warning["step"] == 2
    assert run.checkpoint_steps() == [1, 2]


@pytest.mark.parametrize(
    ("text", "is_memory"),
    [
        ("MPS backend out of memory (MPS allocated: 9 GB)", True),
        ("CUDA out of memory. Tried to allocate 2 GB", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_who_runs_out_and_how_it_says_so(text, is_memory):
    """R-18: each allocator has its own error; other errors are unchanged."""
    with pytest.raises(RuntimeError, match=text[:12]) as caught, as_out_of_memory():
        raise RuntimeError(text)
    assert isinstance(caught.value, torch.OutOfMemoryError) == is_memory
    with pytest.raises(torch.OutOfMemoryError, match="can't allocate memory"), as_out_of_memory():
        run_out()


def test_auto_needs_something_to_divide(make, tmp_path):
    """R-35: a conflict names both settings."""
    images, config = make
    with raises(ConfigError, "train.batch_size", shows="train.accumulate"):
        train(images, config=config(train__batch_size="auto"), out=tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("overrides", "processes", "expected"),
    [
        (["train.batch_size=auto"], 1, ("auto", 8)),
        (["train.batch_size=auto"], 2, ("auto", 4)),
        (["train.batch_size=auto"], 8, (1, 1)),
        (["train.batch_size=auto", "train.accumulate=8"], 1, ("auto", 8)),
    ],
)
def test_auto_in_a_resumed_run(make, overrides, processes, expected):
    """R-16: the global batch is kept."""
    settings = make[1](train__batch_size=4, train__accumulate=2)
    found = apply_overrides(settings, overrides, global_batch=8, num_processes=processes).train
    assert (found.batch_size, found.accumulate) == expected


def test_a_step_that_does_not_fit(make, monkeypatch, tmp_path):
    """R-18: one line names settings that need less memory; exit 1."""
    images, config = make
    losses, calls = StepRunner._losses, []

    def run_out_in_the_end(self, step, micro_batch):
        calls.append(step)
        if step == 1:
            run_out()
        return losses(self, step, micro_batch)

    monkeypatch.setattr(StepRunner, "_losses", run_out_in_the_end)
    settings = config(train__batch_size=4, train__gradient_checkpointing=False)
    with pytest.raises(RunError) as caught:
        train(images, config=settings, out=tmp_path / "run", quiet=True)
    run = RunFolder(tmp_path / "run")
    assert caught.value.exit_code == 1
    line = str(caught.value)
    assert caught.value.keys == ("out-of-memory",)
    for part in (
        "step 2",
        "4 images",
        "train.gradient_checkpointing",
        f"`sdlora resume {run.path}`",
        "step 1",
    ):
        assert part in line
    assert "\n" not in line
    [failed] = run.events("failed")
    assert failed["message"] == line
    monkeypatch.undo()
    resume(run.path, ["train.batch_size=2", "train.accumulate=2"], quiet=True)
    assert [event["step"] for event in run.events("step")] == [1, 2]
