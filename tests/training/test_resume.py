"""Stopping and going on equals never having stopped, to the bit (R-03, R-23)."""

from __future__ import annotations

import math
import signal

import pytest
import torch

from sdlora.errors import RunError, RunStopped
from sdlora.training.checkpoint import read_checkpoint
from sdlora.training.train import resume

STEPS = 20
# Five pictures of one shape and two of another at batch 2 are 4 steps an epoch, with short steps.
SIZES = ((64, 64),) * 5 + ((96, 64),) * 2
CONFIG = {
    "train__steps": STEPS,
    "data__caption_dropout": 0.3,
    "data__crop": "random",
    "train__accumulate": 2,
    "train__batch_size": 1,
}


def run_to_end(make_trainer, config, folder, stops=()):
    """Trains in one sitting more than there are stops; returns the last trainer and all results."""
    results = []
    for stop_at in (*stops, None):
        trainer = make_trainer(config, folder)
        if results:
            trainer.resume()
            trainer.run.cut_events(trainer.step)
        trainer.stop_at = stop_at
        if stop_at is None:
            trainer.train()
        else:
            with pytest.raises(RunStopped) as stopped:
                trainer.train()
            assert stopped.value.exit_code == 128 + signal.SIGTERM
            assert trainer.step == stop_at
        results += trainer.results
    return trainer, results


@pytest.mark.parametrize("stops", [(7,), (3, 8), (5, 13, 16)], ids=str)
def test_stopped_equals_straight(make_images, small, make_trainer, snapshot, tmp_path, stops):
    """R-03: also stopped twice, at an epoch's border (8, 16) and inside an epoch; by a real signal (R-23)."""
    images = make_images(sizes=SIZES)
    config = small(images, **CONFIG)
    straight, straight_results = run_to_end(make_trainer, config, tmp_path / "straight")
    stopped, stopped_results = run_to_end(make_trainer, config, tmp_path / "stopped", stops)

    assert straight.plan.order.steps_per_epoch == 4
    assert [result.draws for result in straight_results] == [result.draws for result in stopped_results]
    assert [result.loss for result in straight_results] == [result.loss for result in stopped_results]
    assert straight_results == stopped_results
    assert (
        len({draw.noise_seed for result in straight_results for draw in result.draws})
        == straight.counters.images_seen
    )
    for name, tensor in snapshot(straight).items():
        assert torch.equal(tensor, snapshot(stopped)[name]), name
    one, other = (read_checkpoint(t.run.checkpoint(STEPS)) for t in (straight, stopped))
    moments = [(s["exp_avg"], s["exp_avg_sq"]) for s in one[1]["state"].values()]
    assert moments
    for pair, (first, second) in zip(other[1]["state"].values(), moments, strict=True):
        assert torch.equal(pair["exp_avg"], first)
        assert torch.equal(pair["exp_avg_sq"], second)
    assert one[2] == other[2]
    assert losses_of(straight) == losses_of(stopped)


def test_stopped_equals_straight_with_groups(make_images, small, make_trainer, snapshot, tmp_path):
    """R-03, R-08: several learning rates are in the state as well, and go on where they were."""
    rates = {"train__learning_rates": {"mid_block.*": 5e-4}, "train__lora_plus_ratio": 8.0}
    config = small(make_images(), **rates, train__schedule="cosine", train__steps=6)
    straight, straight_results = run_to_end(make_trainer, config, tmp_path / "straight")
    stopped, stopped_results = run_to_end(make_trainer, config, tmp_path / "stopped", (3,))
    assert len(straight.learner.optimizer.param_groups) == 4
    assert straight_results == stopped_results
    for name, tensor in snapshot(straight).items():
        assert torch.equal(tensor, snapshot(stopped)[name]), name


def losses_of(trainer):
    return [(event["step"], event["loss"], event["loss_ema"]) for event in trainer.run.events("step")]


def test_each_epoch_sees_each_picture_once(make_images, small, make_trainer, tmp_path):
    """R-15, R-16: in the real run, not only in the plan."""
    config = small(make_images(sizes=SIZES), **CONFIG)
    trainer, results = run_to_end(make_trainer, config, tmp_path / "run")
    per_epoch = trainer.plan.order.steps_per_epoch
    for epoch in range(STEPS // per_epoch):
        steps = results[epoch * per_epoch : (epoch + 1) * per_epoch]
        names = sorted(draw.image for result in steps for draw in result.draws)
        assert names == sorted(record.name for record in trainer.plan.index.records)
    assert trainer.counters.images_seen == trainer.plan.images_seen


def test_the_newest_complete_state_is_taken(make_images, small, make_trainer, tmp_path):
    """R-03, R-23: a state that a crash cut short is passed over; a rest of a write is no state."""
    config = small(make_images(), train__steps=4, train__save_every=2, train__keep_checkpoints=3)
    trainer = make_trainer(config, tmp_path / "run")
    trainer.train()
    assert trainer.run.checkpoint_steps() == [2, 4]
    file = trainer.run.checkpoint(4) / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    (trainer.run.checkpoints / ".step-000009.123.tmp").mkdir()
    again = make_trainer(config, tmp_path / "run")
    again.resume()
    assert again.step == 2


def test_no_state_starts_again(make_images, small, make_trainer, tmp_path):
    """DESIGN 2: a run killed before its first checkpoint starts at step 0."""
    trainer = make_trainer(small(make_images()), tmp_path / "run")
    trainer.resume()
    assert trainer.step == 0


@pytest.mark.parametrize(
    ("change", "what"), [("picture", "the pictures or captions"), ("caption", "the pictures or captions")]
)
def test_other_pictures_are_refused(make_images, small, make_trainer, tmp_path, change, what):
    """R-03: a resumed run has the data that it began with, or says so."""
    images = make_images()
    config = small(images)
    make_trainer(config, tmp_path / "run").train()
    if change == "picture":
        (images / "03.png").unlink()
        (images / "03.txt").unlink()
    else:
        (images / "03.txt").write_text("another caption", encoding="utf-8")
    with pytest.raises(RunError, match=f"{what} changed since"):
        make_trainer(config, tmp_path / "run").resume()


def test_retention(make_images, small, make_trainer, tmp_path):
    """R-24: all adapters stay, of the states the last n."""
    config = small(make_images(), train__steps=5, train__save_every=1, train__keep_checkpoints=2)
    trainer = make_trainer(config, tmp_path / "run")
    trainer.train()
    assert trainer.run.saved_steps() == [1, 2, 3, 4, 5]
    assert trainer.run.checkpoint_steps() == [4, 5]


def test_a_full_disk_costs_the_state_only(make_images, small, make_trainer, tmp_path):
    """R-24: the state is skipped, the adapter saved, the run goes on, and a warning tells."""
    trainer = make_trainer(small(make_images(), train__save_every=2), tmp_path / "run")
    trainer.run.checkpoints.write_text("no folder can be made here")
    trainer.train()
    assert trainer.step == 4
    assert trainer.run.saved_steps() == [2, 4]
    warnings = [event["message"] for event in trainer.run.events("warning")]
    assert len(warnings) == 2
    assert "could not be saved" in warnings[0]


def test_resume_verb(make_images, small, tmp_path, capsys):
    """A finished run says so and changes nothing; a larger train.steps goes on."""
    from sdlora.training.train import train

    config = small(make_images(), train__steps=2)
    run = train(config.images, config=config, out=tmp_path / "run", quiet=True)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    resume(run.path)
    assert "is finished at step 2" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    resume(run.path, ["train.steps=3"], quiet=True)
    assert run.saved_steps() == [2, 3]
    assert run.read_config().train.steps == 3
    assert [event["step"] for event in run.events("step")] == [1, 2, 3]
    assert all(math.isfinite(event["loss"]) for event in run.events("step"))


def test_what_may_not_change(make_images, small, tmp_path):
    """`resume` takes steps, cadence, trackers, and batch_size with accumulate."""
    from sdlora.errors import ConfigError
    from sdlora.training.train import train

    config = small(make_images(), train__steps=1)
    run = train(config.images, config=config, out=tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match=r"lora\.rank cannot change in a resumed run; only"):
        resume(run.path, ["lora.rank=4"])
    with pytest.raises(ConfigError, match=r"train\.batch_size = 4 does not fit the run's 2 samples a step"):
        resume(run.path, ["train.batch_size=4"])
    resume(run.path, ["train.batch_size=1", "train.accumulate=2", "train.steps=2"], quiet=True)
    assert run.saved_steps() == [1, 2]
