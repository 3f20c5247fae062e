"""A stopped and resumed run equals one that never stopped, to the bit (R-03, R-23)."""

from __future__ import annotations

import math
import os
import shutil
import signal
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from sdlora.errors import AdapterError, ConfigError, ModelError, RunError, RunStopped
from sdlora.training.checkpoint import (
    load_state,
    read_checkpoint,
    read_state,
    save_checkpoint,
    save_state,
    seal_state,
)
from sdlora.training.health import Counters
from sdlora.training.loop import Trainer
from sdlora.training.plan import HEADER_BYTES, STATE_BYTES
from sdlora.training.planning import check_disk, make_plan
from sdlora.training.step import Draw
from sdlora.training.train import resume, train, with_absolute_paths
from tests.checks import raises

STEPS = 20
# Five images of one shape and two of another at batch size 2 are 4 steps an epoch, with short steps.
SIZES = ((64, 64),) * 5 + ((96, 64),) * 2
CONFIG = {
    "train__steps": STEPS,
    "data__caption_dropout": 0.3,
    "data__crop": "random",
    "train__accumulate": 2,
    "train__batch_size": 1,
}


def run_to_end(make_trainer, config, folder, stops=()):
    """Trains with stops in between; returns the last trainer and all results."""
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


EVERYTHING = {
    "data__crop": "random",
    "data__flip": True,
    "data__caption_dropout": 0.3,
    "data__heldout": 0.2,
    "lora__dropout": 0.2,
    "train__accumulate": 2,
    "train__schedule": "cosine",
    "train__ema_decay": 0.8,
    "train__trace": True,
    "train__steps": 9,
    "train__save_every": 3,
    "train__sample_every": 4,
    "train__evaluate_every": 3,
}


@pytest.mark.parametrize("cache", ["auto", pytest.param(False, marks=pytest.mark.slow)])
def test_stopped_equals_straight(make_images, quick, make_trainer, tmp_path, check_same, cache):
    """R-03: stopped by a real signal (R-23) after any step, within an epoch or at its end, and resumed.

    With buckets, caches on and off, accumulation, dropout of captions and of the adapter, a schedule, the
    moving average, held-out losses and samples in between.
    """
    images = make_images(sizes=((64, 64),) * 7 + ((96, 64),) * 3)
    config = quick(images, data__cache=cache, **EVERYTHING)
    straight, results = run_to_end(make_trainer, config, tmp_path / "straight")
    rows = list(straight.run.trace())
    assert straight.plan.order.steps_per_epoch == 4
    assert len({row["noise_seed"] for row in rows}) == len(rows) == straight.counters.images_seen
    assert [Draw(**{key: row[key] for key in row if key != "step"}) for row in rows] == [
        draw for result in results for draw in result.draws
    ]
    stops = range(1, 9) if cache else (2, 5)
    stopped, own_results = run_to_end(make_trainer, config, tmp_path / "stopped", stops)
    assert own_results == results
    check_same(straight.run, stopped.run)


def test_saved_and_sampled_when_asked(make_images, quick, make_trainer, tmp_path, monkeypatch):
    """R-03, R-23: after the step, without a trace in the weights; a run that is then killed resumes there."""
    keys = {**CONFIG, "train__steps": 4, "train__save_every": 4, "train__sample_every": 4}
    config = quick(make_images(sizes=SIZES), **keys)
    straight, _ = run_to_end(make_trainer, config, tmp_path / "straight")

    def record(trainer, result, seconds):
        if result.step == 3:
            raise KeyboardInterrupt
        for request in {1: ("save",), 2: ("sample",)}.get(result.step, ()):
            trainer.run.ask(request)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "record", record)
        killed = make_trainer(config, tmp_path / "asked")
        with pytest.raises(KeyboardInterrupt):
            killed.train()
    run = killed.run
    assert run.checkpoint_steps() == [1]
    assert run.saved_steps() == [1, 2]
    assert [file.parent.name for file in run.samples.rglob("grid.png")] == ["step-000002"]
    resumed = make_trainer(config, run.path)
    resumed.resume()
    assert resumed.step == 1
    resumed.train()
    ends = [read_checkpoint(one.run.checkpoint(4))[0] for one in (straight, resumed)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_signal_postpones_the_validation_loss(make_images, quick, make_trainer, tmp_path):
    """R-03, R-23: a scheduler's grace period is for the checkpoint; the resumed run measures it first."""
    keys = {"train__steps": 4, "train__evaluate_every": 2, "data__heldout": 0.3}
    config = quick(make_images(sizes=SIZES), **keys)
    stopped, _ = run_to_end(make_trainer, config, tmp_path / "stopped", [2])
    losses = [(event["step"], event["split"]) for event in stopped.run.events("heldout")]
    assert sorted(losses) == sorted(
        {(step, split) for step in (0, 2, 4) for split in stopped.prepared.splits}
    )


def test_a_resumed_run_has_not_done_what_came_before(make_images, quick, make_trainer, tmp_path):
    """R-16: its speed is that of its own work, or the next plans would promise too much."""
    keys = {"train__steps": 4, "train__save_every": 3, "train__sample_every": 1}
    trainer = make_trainer(quick(make_images(), **keys), tmp_path / "run")
    save_state(trainer.run, trainer.plan, trainer.runner, Counters(step=3))
    trainer.resume(3)
    with trainer.prepared.watch.stage("sampling"):
        pass
    speed = trainer.pace.speed(trainer.plan.work_left(3))
    assert speed is None or "sampling" not in speed.rates


@pytest.mark.slow
def test_stopped_often_equals_straight(make_images, small, make_trainer, tmp_path, check_same):
    """R-03: all modules, 20 steps, stopped after each of them."""
    images = make_images(sizes=SIZES)
    config = small(images, **{**CONFIG, **EVERYTHING, "data__heldout": 0, "train__steps": STEPS})
    straight, _ = run_to_end(make_trainer, config, tmp_path / "straight")
    stopped, _ = run_to_end(make_trainer, config, tmp_path / "stopped", range(1, STEPS))
    check_same(straight.run, stopped.run)


def test_each_epoch_sees_each_image_once(make_images, small, make_trainer, tmp_path):
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
    """R-03, R-23: a checkpoint that a crash cut short is skipped, and so are leftovers of a write."""
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


def test_a_damaged_state_pushes_no_good_one_out(make_images, quick, make_trainer, tmp_path, monkeypatch):
    """R-24: resuming from before a damaged checkpoint deletes it, so that only readable ones are kept."""
    config = quick(make_images(), train__save_every=2, train__keep_checkpoints=2)
    trainer = make_trainer(config, tmp_path / "run")
    trainer.train()
    edit_settings(trainer.run, train={"keep_checkpoints": 1})
    (trainer.run.checkpoint(4) / "state.json").unlink()
    record = Trainer.record

    def stop(own, result, seconds):
        record(own, result, seconds)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "record", stop)
    with raises(RunStopped, "stopped", shows=("step 3 of 4", "sdlora resume")):
        resume(trainer.run.path, quiet=True)
    assert trainer.run.checkpoint_steps() == [3]
    read_checkpoint(trainer.run.checkpoint(3))


def test_no_state_starts_again(make_images, quick, make_trainer, tmp_path, monkeypatch, check_same, capsys):
    """R-03: a run killed before its first checkpoint starts again at step 0, says so, and loses nothing."""
    config = quick(images := make_images(), train__steps=3, train__save_every=3)
    straight = train(images, config=config, out=tmp_path / "straight", quiet=True)
    killed = make_trainer(config, tmp_path / "killed")
    record = Trainer.record

    def kill(own, result, seconds):
        record(own, result, seconds)
        if result.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "record", kill)
        with pytest.raises(KeyboardInterrupt):
            killed.train()
    assert [event["step"] for event in killed.run.events("step")] == [1, 2]
    assert killed.run.checkpoint_steps() == []
    capsys.readouterr()
    resume(killed.run.path)
    assert "step 0" in capsys.readouterr().out
    assert [event["step"] for event in killed.run.events("step")] == [1, 2, 3]
    check_same(straight, killed.run)
    killed.resume()
    assert killed.step == 3, "the checkpoint that is there now"


def change_caption(images):
    (images / "03.txt").write_text("another caption", encoding="utf-8")


def drop_picture(images):
    (images / "03.png").unlink()
    (images / "03.txt").unlink()


@pytest.mark.parametrize("change", [change_caption, drop_picture])
def test_other_images_are_refused(make_images, quick, make_trainer, tmp_path, change):
    """R-03: a resumed run uses the data that it started with, unless other data is allowed."""
    images = make_images()
    trainer = make_trainer(quick(images, train__steps=2), tmp_path / "run")
    trainer.train()
    change(images)
    with raises(RunError, "checkpoint-changed", shows="--allow-changed dataset"):
        resume(trainer.run.path, ["train.steps=3"], quiet=True)
    run = resume(trainer.run.path, ["train.steps=3"], allow_changed=["dataset"], quiet=True)
    assert [(event["step"], event["field"]) for event in run.events("changed")] == [(2, "dataset")]
    assert [event["step"] for event in run.events("step")] == [1, 2, 3]
    resume(run.path, ["train.steps=4"], quiet=True)


CHECKPOINT_KEYS = {
    "checkpoint-mismatch",
    "checkpoint-foreign",
    "checkpoint-incomplete",
    "lora.targets",
    "train.optimizer",
}


def edit_settings(run, **sections):
    run.write_config(run.read_config().replace(**sections))


def edit_identity(run, step, **fields):
    state = read_state(run.checkpoint(step))
    state["identity"] |= fields
    (run.checkpoint(step) / "state.json").write_text(seal_state(state), encoding="utf-8")


FORGERIES = (
    {"counters": None},
    {"counters": {"step": 2, "nonsense": 1}},
    {"counters": [1, 2]},
    {"optimizer": None},
    {"optimizer": {"__map__": [["state", {"__map__": []}], ["param_groups", []]]}},
    {"optimizer": {"__map__": 3}},
    {"optimizer": {"__tensor__": "nothing"}},
    {"digests": {"../../config.json": "0"}},
    {"digests": []},
)


def test_a_state_of_another_program(make_images, quick, make_trainer, tmp_path):
    """R-44: a checkpoint with a valid digest but other content is a one-line error."""
    trainer = make_trainer(quick(make_images(), train__steps=2), tmp_path / "run")
    trainer.train()
    folder = trainer.run.checkpoint(2)
    sound = read_state(folder)
    for forgery in FORGERIES:
        (folder / "state.json").write_text(seal_state({**sound, **forgery}), encoding="utf-8")
        with pytest.raises(RunError) as caught:
            load_state(trainer.run, 2, trainer.runner)
        assert caught.value.keys[0] in CHECKPOINT_KEYS
        assert "\n" not in str(caught.value)
    other = {name: tensor[:1].clone() for name, tensor in load_file(folder / "adapter.safetensors").items()}
    save_checkpoint(folder, tensors=other, optimizer=trainer.runner.optimizer.state_dict(), state=sound)
    with raises(RunError, "checkpoint-mismatch", shows=("(1, ", "(2, ")):
        load_state(trainer.run, 2, trainer.runner)


def test_an_identity_is_compared_field_by_field(make_images, quick, make_trainer, tmp_path):
    """R-03: a line for each field, with the flag that allows it if possible, before a weight is loaded."""
    trainer = make_trainer(quick(make_images(), train__steps=2), tmp_path / "run")
    trainer.train()
    run = trainer.run
    edit_settings(run, train={"grad_clip": 0.5, "seed": 3}, objective={"noise_offset": 0.1})
    edit_identity(run, 2, sdlora="0.0.1", base="0123")
    with pytest.raises(RunError) as caught:
        resume(run.path, ["train.steps=3"], allow_changed=["objective.noise_offset"], quiet=True)
    start = f"lora.init_from={run.step_adapter(2)}"
    expected = [
        ("base", "0123", trainer.plan.info.digest[:12], start),
        ("sdlora", "0.0.1", version("sdlora"), "--allow-changed sdlora"),
        ("train.seed", "0", "3", start),
        ("train.grad_clip", "1.0", "0.5", "--allow-changed train.grad_clip"),
    ]
    lines = str(caught.value).splitlines()
    assert len(lines) == len(expected)
    for line, values in zip(lines, expected, strict=True):
        assert all(value in line for value in values), line


def test_a_setting_that_is_allowed_to_change(make_images, quick, make_trainer, tmp_path):
    """`--allow-changed` accepts a setting that affects a step; the run records it."""
    trainer = make_trainer(quick(make_images(), train__steps=2), tmp_path / "run")
    trainer.train()
    # Of steps that will never be as they were.
    shutil.copy(trainer.run.step_adapter(2), trainer.run.step_adapter(7))
    trainer.run.sample_folder(7).mkdir(parents=True)
    change = ["train.learning_rate=0.5", "train.steps=3"]
    with raises(ConfigError, "train.learning_rate", shows="--allow-changed train.learning_rate"):
        resume(trainer.run.path, change, quiet=True)
    with raises(ConfigError, "allow-changed", shows="lora.rank"):
        resume(trainer.run.path, change, allow_changed=["lora.rank"], quiet=True)
    run = resume(trainer.run.path, change, allow_changed=["train.learning_rate"], quiet=True)
    assert [event["learning_rate"] for event in run.events("step")] == [5e-4, 1e-3, 0.5]
    [changed] = run.events("changed")
    assert (changed["before"], changed["now"]) == (1e-3, 0.5)
    assert run.saved_steps() == [2, 3]
    assert not run.sample_folder(7).exists()


def test_retention(make_images, small, make_trainer, tmp_path):
    """R-24: all adapters are kept, and the last n checkpoints."""
    config = small(make_images(), train__steps=5, train__save_every=1, train__keep_checkpoints=2)
    trainer = make_trainer(config, tmp_path / "run")
    trainer.train()
    assert trainer.run.saved_steps() == [1, 2, 3, 4, 5]
    assert trainer.run.checkpoint_steps() == [4, 5]


def test_a_full_disk_costs_the_state_only(make_images, small, make_trainer, tmp_path):
    """R-24: the checkpoint is skipped with a warning, the adapter is saved, and the run continues."""
    trainer = make_trainer(small(make_images(), train__save_every=2), tmp_path / "run")
    trainer.run.checkpoints.write_text("no folder can be made here")
    trainer.train()
    assert trainer.step == 4
    assert trainer.run.saved_steps() == [2, 4]
    warnings = [event["message"] for event in trainer.run.events("warning")]
    assert len(warnings) == 2
    assert "checkpoint of step 2" in warnings[0]


def test_what_a_run_writes_is_known_before(make_images, quick, make_trainer, tmp_path, monkeypatch):
    """R-24: checkpoints with the average count, and for a resumed run only the rest."""
    config = quick(make_images(), train__save_every=1, train__ema_decay=0.5, train__steps=4)
    trainer = make_trainer(config, tmp_path / "run")
    trainer.train()
    plan, folder = trainer.plan, trainer.run.checkpoint(4)
    state, adapter = (
        sum(file.stat().st_size for file in files if file.is_file())
        for files in (folder.rglob("*"), [trainer.run.step_adapter(4)])
    )
    # Headers count, and a file may stay in fp32.
    step, whole = (plan.bytes_after(before) - plan.bytes_after(4) for before in (3, 0))
    assert (
        state + adapter < step < state + 2 * adapter + STATE_BYTES + HEADER_BYTES * 4 * len(plan.layout.ranks)
    )
    assert 3 * state + 4 * adapter < whole <= 4 * step

    def usage(place):
        return SimpleNamespace(free=plan.bytes_after(3))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_disk(plan, trainer.run.path, 3)
    with raises(RunError, "disk-space", shows="train.save_every"):
        check_disk(plan, trainer.run.path, 2)
    with raises(RunError, "disk-space", shows="--out"):
        check_disk(plan, trainer.run.path)


def test_resume_verb(make_images, small, tmp_path, capsys):
    """A finished run prints that and changes nothing; a larger train.steps continues it."""
    config = small(make_images(), train__steps=2)
    run = train(config.images, config=config, out=tmp_path / "run", quiet=True)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    for steps in (2, 1):
        resume(run.path, [f"train.steps={steps}"])
        assert f"{run.path} is already finished at step 2" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before
    resume(run.path, ["train.steps=3"], quiet=True)
    assert run.saved_steps() == [2, 3]
    assert run.read_config().train.steps == 3
    assert [event["step"] for event in run.events("step")] == [1, 2, 3]
    assert all(math.isfinite(event["loss"]) for event in run.events("step"))


def test_the_vae_of_an_older_run(make_images, tiny, tmp_path):
    """R-03, R-22: a run continues with latents in the dtype that it began with."""
    config = tiny(make_images(), train__steps=1, train__precision="bf16")
    run = train(config.images, config=config, out=tmp_path / "run", quiet=True)
    assert [event["dtypes"]["vae"] for event in run.events("prepared")] == ["bfloat16"]
    text = run.events_file.read_text(encoding="utf-8")
    run.events_file.write_text(text.replace('"vae": "bfloat16"', '"vae": "float32"'), encoding="utf-8")
    resume(run.path, ["train.steps=2"], quiet=True)
    assert [event["dtypes"]["vae"] for event in run.events("prepared")] == ["float32"] * 2


def test_what_may_not_change(make_images, small, tmp_path):
    """`resume` takes steps, cadence, trackers, and batch_size with accumulate."""
    config = small(make_images(), train__steps=1)
    run = train(config.images, config=config, out=tmp_path / "run", quiet=True)
    with raises(ConfigError, "lora.rank"):
        resume(run.path, ["lora.rank=4"])
    with raises(ConfigError, "train.batch_size", shows=("4", "2")):
        resume(run.path, ["train.batch_size=4"])
    resume(run.path, ["train.batch_size=1", "train.accumulate=2", "train.steps=2"], quiet=True)
    assert run.saved_steps() == [1, 2]


def test_going_on_from_another_folder(make_images, quick, tmp_path, monkeypatch):
    """R-03: relative paths of images and held-out images are found again from another folder."""
    make_images("pictures", ((64, 64),) * 4)
    make_images("hands", ((64, 64),) * 2)
    monkeypatch.chdir(tmp_path)
    plan = make_plan(quick("pictures", data__heldout="hands").model_copy(update={"images": "pictures"}))
    kept = with_absolute_paths(plan.config)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = make_plan(kept)
    assert again.index.digest == plan.index.digest
    assert [one.digest for one in again.index.heldout] == [one.digest for one in plan.index.heldout]


def test_a_base_that_was_moved(make_images, quick, sd15_folder, tmp_path, monkeypatch):
    """R-03: the path of the base may change; its content may not."""
    base = shutil.copytree(sd15_folder, tmp_path / "base")
    config = quick(make_images(), base__source=str(base), train__steps=1, export__formats=["diffusers"])
    run = train(config.images, out=tmp_path / "run", config=config, quiet=True).path
    base.rename(tmp_path / "moved")
    longer = {"train.steps": 2}
    with raises(ModelError, shows=("base.source =", str(base))):
        resume(run, longer, quiet=True)
    monkeypatch.chdir(tmp_path)
    moved = resume(run, {**longer, "base.source": "moved"}, quiet=True)
    assert moved.is_finished(2)
    assert moved.read_config().base.source == str(tmp_path / "moved")
    with raises(RunError, "checkpoint-changed", shows="the base "):
        resume(run, {"train.steps": 3, "base.source": "builtin"}, quiet=True)


def test_the_file_that_it_started_from_is_gone(make_images, quick, tmp_path, capsys):
    """R-03: a checkpoint contains the values from lora.init_from; the run still records the file."""
    images = make_images()
    first = train(images, out=tmp_path / "first", config=quick(images, train__steps=1), quiet=True)
    start = first.adapter
    config = quick(images, train__steps=1, lora__init_from=str(start))
    run = train(images, out=tmp_path / "second", config=config, quiet=True)
    start.unlink()
    resume(run.path, {"train.steps": 2})
    assert run.is_finished(2)
    assert "start     " not in capsys.readouterr().out
    assert run.read_config().lora.init_from == str(start)
    shutil.rmtree(run.checkpoints)
    with raises(AdapterError, "lora.missing", shows=("lora.init_from", str(start))):
        resume(run.path, {"train.steps": 3}, quiet=True)


def test_the_file_that_it_started_from_stays_recorded(make_images, quick, tmp_path):
    """R-03: also where a resumed run looks for a batch size, and writes its settings again."""
    images = make_images()
    first = train(images, out=tmp_path / "first", config=quick(images, train__steps=1), quiet=True)
    start = str(first.adapter)
    config = quick(images, train__steps=1, train__accumulate=2, lora__init_from=start)
    run = train(images, out=tmp_path / "second", config=config, quiet=True)
    resume(run.path, {"train.steps": 2, "train.batch_size": "auto"}, quiet=True)
    assert run.read_config().lora.init_from == start
