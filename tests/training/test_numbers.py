"""Non-finite numbers in the middle of a run (R-06, R-09, R-19)."""

from __future__ import annotations

import math

import pytest
import torch

from sdlora.errors import TrainingDiverged
from sdlora.report.summary import describe_state
from sdlora.runs import RunFolder
from sdlora.training import step as runner
from sdlora.training.finish import report_failure
from sdlora.training.train import train
from tests.checks import raises

SMALL_RUN = {"train__steps": 4, "train__save_every": 2, "train__sample_every": 0, "train__evaluate_every": 0}


@pytest.fixture
def make(make_images, tiny, make_trainer, tmp_path, sd15_folder):
    """A trainer on the tiny base."""

    def make(**changes):
        images = make_images(sizes=((32, 32),) * 4)
        config = tiny(images, **{"base__source": str(sd15_folder), **SMALL_RUN, **changes})
        return make_trainer(config, tmp_path / "run")

    return make


def spoil_loss(trainer, value):
    denoise = trainer.runner.denoise
    trainer.runner.denoise = lambda noisy, *rest: denoise(noisy, *rest) * value


def spoil_latent(trainer, value):
    posterior = trainer.prepared.encodings.posterior

    def spoilt(*view):
        mean, std = posterior(*view)
        mean = mean.clone()
        mean[0, 0, 0] = value
        return mean, std

    trainer.prepared.encodings.posterior = spoilt


def spoil_gradient(trainer, value):
    def spoil(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[0] = value
        return gradient

    trainer.runner.parameters[-1].register_hook(spoil)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("spoil", [spoil_loss, spoil_latent, spoil_gradient])
def test_one_bad_step_is_skipped(make, spoil, value):
    """R-06: the step is skipped, counted, and reported with its images; the adapter is unchanged."""
    trainer = make(train__batch_size=2, train__max_skipped_steps=2)
    trainer.record(trainer.train_step(), 1.0)
    before = [parameter.detach().clone() for parameter in trainer.runner.parameters]
    spoil(trainer, value)
    samples = trainer.plan.order.step(1)
    result = trainer.train_step()
    trainer.record(result, 1.0)
    assert not result.updated
    assert trainer.counters.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.runner.parameters, strict=True))
    [warning] = trainer.run.events("warning")
    assert warning["message"].startswith("step 2 skipped: loss ")
    assert warning["images"] == [sample.record.name for sample in samples]
    with raises(TrainingDiverged, "non-finite-steps", shows=("2 steps", "step 3", "images ")):
        trainer.train_step()
    assert trainer.run.saved_steps() == []


def test_a_skipped_first_step_proves_nothing(make):
    """R-09: in fp16 the first steps overflow; the first update is still checked."""
    trainer = make()
    name, pair = next(iter(trainer.runner.adapter.modules.items()))
    pair.down.data.zero_()
    spoiling = trainer.runner.parameters[-1].register_hook(lambda gradient: gradient * math.inf)
    assert not trainer.train_step().updated
    spoiling.remove()
    with raises(TrainingDiverged, "dead-modules", shows=("1 modules", name)):
        trainer.train_step()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_bad_parameter_stops_at_once(make, value):
    """R-06: the error names the module, the step, the images, the rate and the last good checkpoint."""
    trainer = make()
    name, pair = list(trainer.runner.adapter.modules.items())[3]
    step = trainer.runner.optimizer.step

    def spoilt(*args):
        step(*args)
        if trainer.step == 2:
            pair.up.data[0, 0] = value

    trainer.runner.optimizer.step = spoilt
    [image] = [sample.record.name for sample in trainer.plan.order.step(2)]
    parts = (name, "step 3", "learning rate 0.001", image, str(trainer.run.checkpoint(2)))
    with raises(TrainingDiverged, "non-finite-parameters", shows=parts):
        trainer.train()
    assert trainer.run.saved_steps() == trainer.run.checkpoint_steps() == [2]


def test_a_state_among_bad_steps_is_not_called_good(make):
    """R-06: a checkpoint among the skipped steps is not a good one."""
    trainer = make(train__steps=8, train__max_skipped_steps=3)
    denoise = trainer.runner.denoise
    trainer.runner.denoise = lambda *given: denoise(*given) * (math.nan if trainer.step >= 3 else 1)
    with raises(TrainingDiverged, "non-finite-steps", shows=str(trainer.run.checkpoint(2))):
        trainer.train()
    assert trainer.run.checkpoint_steps() == [2, 4]


def test_a_run_that_fails_leaves_its_curve(make_images, tiny, sd15_folder, tmp_path):
    """R-06: the loss curve is drawn up to there, and `sdlora info` shows the error."""
    images = make_images(sizes=((32, 32),) * 4)
    broken = {"train__learning_rate": 1e30, "train__max_skipped_steps": 1, "train__evaluate_every": 0}
    config = tiny(images, base__source=str(sd15_folder), train__sample_every=0, **broken)
    with pytest.raises(TrainingDiverged):
        train(images, config=config, out=tmp_path / "run", quiet=True)
    run = RunFolder(tmp_path / "run")
    assert run.loss_curve.is_file()
    assert describe_state(run)[1].startswith("failed    ")


def test_a_loss_of_zero_stops(make, monkeypatch):
    """R-06: nothing is learned from a loss of 0; the run stops after five such steps."""
    trainer = make(train__steps=9, train__save_every=0)
    trainer.record(trainer.train_step(), 1.0)
    up = trainer.runner.parameters[-1]
    monkeypatch.setattr(runner, "denoising_loss", lambda *rest: 0 * up.sum() + torch.zeros(1))
    with raises(TrainingDiverged, "zero-loss", shows=("5 steps", "step 6")):
        trainer.train()


def test_a_mistake_of_a_program_is_an_event(make):
    """R-45: `sdlora info` says later why the run ended; the error itself is not hidden."""
    trainer = make(train__optimizer="torch.optim.SparseAdam")
    with pytest.raises(RuntimeError), report_failure(trainer):
        trainer.train()
    [failed] = trainer.run.events("failed")
    assert failed["message"].startswith("RuntimeError: ")


@pytest.mark.slow
def test_memory_stays_flat(make):
    """R-19: at step 500 within 2 % of step 50, samples, saves and held-out losses included."""
    trainer = make(train__steps=500, train__save_every=25, train__sample_every=100, train__evaluate_every=50)
    trainer.train()
    memory = {event["step"]: event["memory_mb"] for event in trainer.run.events("step")}
    assert memory[500] <= 1.02 * memory[50]
