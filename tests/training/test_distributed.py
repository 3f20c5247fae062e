"""Several processes train as one run (R-08, R-16, R-17), and end together.

The processes here are forks of the test process that use gloo; `test_launchers.py` starts them with
launchers.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import distributed as dist

from sdlora.cli import main
from sdlora.errors import ConfigError, DataError, ProcessLost
from sdlora.models.stable_diffusion import StableDiffusion
from sdlora.runs import RunFolder
from sdlora.sampling import generate
from sdlora.training.checkpoint import read_checkpoint
from sdlora.training.device import make_accelerator
from sdlora.training.distributed import ENGINES, distributed_errors
from sdlora.training.loop import Trainer
from sdlora.training.planning import make_plan
from sdlora.training.resume import apply_overrides, check_same_plan
from sdlora.training.step import StepRunner
from sdlora.training.train import resume, train
from tests.checks import HANG_SECONDS, raises

SIZES = ((64, 64),) * 5 + ((96, 64),) * 3
EVERYTHING = {
    "data__heldout": 0.25,
    "data__caption_dropout": 0.3,
    "train__save_every": 3,
    "train__sample_every": 3,
    "train__evaluate_every": 3,
    "train__steps": 6,
}


def files_of(run):
    """All files but the checkpoints: which of them are kept depends on where a run stopped."""
    files = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    return {file for file in files if not file.startswith("checkpoints/")}


def events_of(run, name, *keys):
    return [tuple(event[key] for key in keys) for event in run.events(name)]


def tensors_of(run, step):
    return read_checkpoint(run.checkpoint(step))[0]


def pixels_of(file):
    return np.asarray(Image.open(file)).tobytes()


def end_well(children):
    codes = [child.wait() for child in children]
    assert codes == [0] * len(children), [child.printed for child in children]


@pytest.fixture
def images(make_images):
    return make_images(sizes=SIZES)


def test_two_processes_are_one(images, quick, tmp_path, fork_processes, monkeypatch):
    """R-03, R-08, R-16, R-17: equal to the bit, also when stopped and resumed; files and images too.

    A sum of two gradients is the same in either order, so here nothing needs a tolerance.
    """
    config = quick(images, train__accumulate=2, **EVERYTHING)
    alone = train(images, config=config, out=tmp_path / "alone", quiet=True)

    config, run = quick(images, **EVERYTHING), RunFolder(tmp_path / "together")
    # Two processes draw the base anew; resumed, they find its images in the cache.
    monkeypatch.setenv("SDLORA_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "record", stopping_at(4, Trainer.record))
        stopped = fork_processes(2, lambda: train(images, config=config, out=run.path))
        assert [child.wait() for child in stopped] == [1, 1]
    assert all("RunStopped: stopped at step 4 of 6" in child.printed for child in stopped)
    with monkeypatch.context() as patch:
        watched = watch(patch)
        resumed = fork_processes(2, lambda: (resume(run.path), watched.write(tmp_path)))
        end_well(resumed)

    left_by_stop = {"adapters/step-000004.safetensors"}
    assert files_of(run) - left_by_stop == files_of(alone)
    assert run.checkpoint_steps() == [4, 6]
    for name, keys in {
        "step": ("step", "loss", "learning_rate", "grad_norm", "images_seen"),
        "heldout": ("step", "split", "loss"),
        "samples": ("step", "path"),
    }.items():
        assert events_of(alone, name, *keys) == events_of(run, name, *keys)
    for picture in sorted(alone.samples.rglob("0*.png")):
        same = run.samples / picture.relative_to(alone.samples)
        assert pixels_of(picture) == pixels_of(same), picture
    for name, tensor in tensors_of(alone, 6).items():
        assert torch.equal(tensors_of(run, 6)[name], tensor), name

    [plan] = run.events("plan")
    assert plan["exchange_bytes"] == 4 * (plan["trainable_parameters"] + 1)
    for process in range(2):
        seen = json.loads((tmp_path / f"watched-{process}.json").read_text())
        assert seen["bytes"] == [plan["exchange_bytes"]] * 2, "once for each of the steps 5 and 6"
        assert len(seen["sampled"]) == 1 - process, "of step 6, the base's image is cached"
    assert "resuming from step 4" in resumed[0].printed
    assert resumed[1].printed == ""


def asking_at(step, record):
    """Asks, as the page does, to save and to sample, in the middle of a run."""

    def ask(trainer, result, seconds):
        record(trainer, result, seconds)
        if result.step == step and trainer.accelerator.is_main_process:
            trainer.run.ask("save")
            trainer.run.ask("sample")

    return ask


def stopping_at(step, record):
    """Sends a signal to one of the processes in the middle of a run."""

    def stop(trainer, result, seconds):
        record(trainer, result, seconds)
        if result.step == step and not trainer.accelerator.is_main_process:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


class Watched:
    """Records the bytes that a process exchanges in each step, and the batches that it samples."""

    def __init__(self):
        self.bytes, self.sampled = [], []
        self.in_step = False

    def write(self, folder):
        seen = {"bytes": self.bytes, "sampled": self.sampled}
        (folder / f"watched-{os.environ['RANK']}.json").write_text(json.dumps(seen))


def watch(patch):
    """Patches this process so that it records them."""
    watched = Watched()
    reduce, denoise, accumulate = dist.all_reduce, generate._denoise, StepRunner.compute_gradients

    def count_bytes(tensor, *args, **kwargs):
        if watched.in_step:
            watched.bytes[-1] += tensor.nbytes
        reduce(tensor, *args, **kwargs)

    def step(*args, **kwargs):
        watched.in_step = True
        watched.bytes.append(0)
        gradient = accumulate(*args, **kwargs)
        watched.in_step = False
        return gradient

    def note(base, pipeline, batch, *rest):
        watched.sampled.append(len(batch))
        return denoise(base, pipeline, batch, *rest)

    patch.setattr(dist, "all_reduce", count_bytes)
    patch.setattr(StepRunner, "compute_gradients", step)
    patch.setattr(generate, "_denoise", note)
    return watched


@pytest.mark.slow
def test_the_number_of_processes_may_change(images, quick, tmp_path, fork_processes):
    """R-08, R-17: four, then two, then one process continue a run with the same global batch and result.

    The order of the sums differs, so tensors are equal to 1e-6 where they moved by 1e-3. With AdamW they
    would be equal to a hundredth of their change, since it turns tiny gradients into whole steps.
    """
    keys = {"train__optimizer": "torch.optim.SGD", "train__learning_rate": 0.1, "train__steps": 6}
    alone = train(
        images, config=quick(images, train__batch_size=4, **keys), out=tmp_path / "alone", quiet=True
    )
    run = RunFolder(tmp_path / "changing")
    config = quick(images, **{**keys, "train__steps": 2})
    end_well(fork_processes(4, lambda: train(images, config=config, out=run.path)))
    end_well(fork_processes(2, lambda: resume(run.path, ["train.steps=4"])))
    assert (run.read_config().train.batch_size, run.read_config().train.accumulate) == (1, 2)
    resume(run.path, ["train.steps=6", "train.batch_size=2"], quiet=True)
    assert (run.read_config().train.batch_size, run.read_config().train.accumulate) == (2, 2)
    assert events_of(alone, "step", "step", "learning_rate", "images_seen") == events_of(
        run, "step", "step", "learning_rate", "images_seen"
    )
    for name, tensor in tensors_of(alone, 6).items():
        torch.testing.assert_close(tensors_of(run, 6)[name], tensor, rtol=0, atol=1e-6)
    assert (
        max(tensor.abs().max() for name, tensor in tensors_of(run, 6).items() if name.endswith("up")) > 1e-3
    )


@pytest.mark.parametrize(
    ("overrides", "processes", "key", "shows"),
    [
        ([], 3, "global-batch", "1, 2, 4, 8"),
        (["train.batch_size=3"], 2, "train.batch_size", "4 samples"),
        (["train.batch_size=4", "train.accumulate=2"], 2, "train.batch_size", "train.accumulate = 2"),
        (["train.accumulate=3"], 2, "train.accumulate", "4 samples"),
        (["lora.rank=4"], 1, "lora.rank", "train.steps"),
    ],
)
def test_what_cannot_be_divided(images, quick, overrides, processes, key, shows):
    """R-16, R-17: the error is one line that names possible numbers."""
    config = quick(images, train__batch_size=4, train__accumulate=2)
    with raises(ConfigError, key, shows=shows) as caught:
        apply_overrides(config, overrides, global_batch=8, num_processes=processes)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize(
    ("overrides", "processes", "expected"),
    [
        ([], 1, (4, 2)),
        ([], 2, (4, 1)),
        ([], 8, (1, 1)),
        (["train.accumulate=8"], 1, (1, 8)),
        (["train.batch_size=2"], 2, (2, 2)),
    ],
)
def test_how_it_is_divided(images, quick, overrides, processes, expected):
    """R-16: the batch size does not grow unless it is set."""
    config = quick(images, train__batch_size=4, train__accumulate=2)
    train = apply_overrides(config, overrides, global_batch=8, num_processes=processes).train
    assert (train.batch_size, train.accumulate) == expected


def launch(children):
    """Waits as a launcher does: the first process that ends also ends the others. Returns the exit codes."""
    codes, end = {}, time.monotonic() + HANG_SECONDS
    while len(codes) < len(children):
        assert time.monotonic() < end, [child.printed for child in children]
        for number, child in enumerate(children):
            code = None if number in codes else child.poll()
            if code is not None:
                codes[number] = code
                for other in children:
                    if other.poll() is None:
                        os.kill(other.pid, signal.SIGTERM)
        time.sleep(0.01)
    return [codes[number] for number in sorted(codes)]


@pytest.mark.parametrize("is_shared", [True, False], ids=["one cache", "a cache each"])
def test_encoding_is_dealt(images, quick, tmp_path, fork_processes, monkeypatch, is_shared):
    """R-17: each process encodes its share once; without a shared cache, also the missing entries."""
    config = quick(images, train__steps=1, train__save_every=0)
    counts, encode = {}, {}
    for name in ("encode_images", "encode_captions"):
        counts[name], encode[name] = [], getattr(StableDiffusion, name)

    def count(name):
        def counted(self, given):
            counts[name].append(1)
            return encode[name](self, given)

        return counted

    def start():
        process = os.environ["RANK"]
        place = tmp_path / ("cache" if is_shared else f"cache-{process}")
        os.environ["SDLORA_CACHE"] = str(place)
        train(images, config=config, out=tmp_path / "run", quiet=True)
        seen = {name: len(calls) for name, calls in counts.items()}
        (tmp_path / f"encoded-{process}.json").write_text(json.dumps(seen), encoding="utf-8")

    for name in counts:
        monkeypatch.setattr(StableDiffusion, name, count(name))
    end_well(fork_processes(2, start))
    seen = [json.loads((tmp_path / f"encoded-{n}.json").read_text(encoding="utf-8")) for n in range(2)]
    # Eight images with one crop each; their captions, the empty one, and a prompt.
    expected = Counter(encode_images=8, encode_captions=10)
    if is_shared:
        assert Counter(seen[0]) + Counter(seen[1]) == expected
        assert all(abs(sum(own.values()) - 9) <= 1 for own in seen)
    else:
        assert all(Counter(own) == expected for own in seen)


def failing_at(step, error, train_step):
    """Makes the second process fail in the middle of a run; without an error to raise it is killed."""

    def fail(trainer):
        if trainer.step == step and not trainer.accelerator.is_main_process:
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise error
        return train_step(trainer)

    return fail


@pytest.mark.parametrize(
    ("error", "codes", "line"),
    [
        (
            DataError("02.png is gone"),
            [2, 2],
            r"process 1 .*: 02.png is gone; `sdlora resume .*step 3",
        ),
        (None, [1, -9], r"another process .*; `sdlora resume .*step 3"),
    ],
    ids=["fails", "is killed"],
)
def test_a_process_that_ends_ends_all(
    images, quick, tmp_path, fork_processes, monkeypatch, command_line, error, codes, line
):
    """R-23: all end before train.timeout_seconds, with its reason if known; the run can be resumed."""
    run = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", failing_at(4, error, Trainer.train_step))
        patch.setattr(sys, "argv", command_line(images, run, quick(images, **EVERYTHING)))
        children = fork_processes(2, main)
        assert launch(children) == codes
    assert re.search(line, children[0].printed.splitlines()[-1]), children[0].printed
    assert children[1].printed == ""
    assert events_of(run, "failed", "step") == [(4,)]
    assert run.checkpoint_steps() == [3]
    resume(run.path, quiet=True)
    assert [step for (step,) in events_of(run, "step", "step")] == [1, 2, 3, 4, 5, 6]


def test_a_stop_is_reported_once(images, quick, tmp_path, fork_processes, monkeypatch, command_line):
    """R-23: one process prints the saved step; the others end soon and print nothing.

    What a page asks for before reaches all of them, too.
    """
    run = RunFolder(tmp_path / "run")
    config = quick(images, **{**EVERYTHING, "train__save_every": 2})
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "record", asking_at(1, stopping_at(3, Trainer.record)))
        patch.setattr(sys, "argv", command_line(images, run, config))
        children = fork_processes(2, main)
        assert [child.wait() for child in children] == [143, 143]
    last = children[0].printed.splitlines()[-1]
    assert last.startswith("sdlora: ")
    assert all(part in last for part in ("step 3 of 6", f"`sdlora resume {run.path}`"))
    assert run.saved_steps() == [1, 2, 3]
    assert (run.sample_folder(1) / "grid.png").is_file()
    assert children[1].printed == ""


def test_a_mistake_is_reported_once(images, quick, tmp_path, fork_processes, monkeypatch, command_line):
    """R-35: the first process prints the mistake before training; all exit with 2 and write nothing."""
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", [*command_line(images, run, quick(images)), "data.resolution=100"])
    children = fork_processes(2, main)
    assert launch(children) == [2, 2]
    assert "sdlora: data.resolution = 100 must be a multiple of 8" in children[0].printed
    assert children[1].printed == ""
    assert not run.path.exists()


def test_processes_that_see_other_files(make_images, quick, tmp_path, fork_processes):
    """R-17: hosts with different copies of the images are refused before a weight is loaded."""
    folders = [make_images("here"), make_images("there")]
    (folders[1] / "00.txt").write_text("another caption", encoding="utf-8")

    def start():
        own = folders[int(os.environ["RANK"])]
        train(own, config=quick(own), out=tmp_path / "run", quiet=True)

    children = fork_processes(2, start)
    assert [child.wait() for child in children] == [1, 1]
    for child in children:
        assert "the images or captions of process 1 differ from those of process 0" in child.printed
    assert not (tmp_path / "run").exists()


def test_processes_that_see_another_vae(images, quick, fork_processes):
    """R-17: the VAE is a part of the base, and compared as the UNet is."""

    def start():
        config = quick(images)
        accelerator, _ = make_accelerator(config)
        plan = make_plan(config, accelerator.num_processes)
        if accelerator.process_index == 1:
            vae = replace(plan.info.components["vae"], digest="another")
            plan = replace(plan, info=replace(plan.info, components={**plan.info.components, "vae": vae}))
        check_same_plan(accelerator, plan)

    children = fork_processes(2, start)
    assert [child.wait() for child in children] == [1, 1]
    for child in children:
        assert "the base's VAE of process 1 differ from those of process 0" in child.printed


@pytest.mark.parametrize("variable", sorted(ENGINES))
def test_engines_that_are_not_used(images, quick, tmp_path, monkeypatch, variable):
    """R-11: options of `accelerate launch` in the environment take effect or are refused."""
    monkeypatch.setenv(variable, "true")
    with raises(ConfigError, "launcher-engine", shows=variable):
        train(images, config=quick(images), out=tmp_path / "run", quiet=True)


def test_processes_that_never_come(images, quick, tmp_path, fork):
    """R-23: a process whose peers were not started ends with one line after train.timeout_seconds."""
    config = quick(images, train__timeout_seconds=1)
    alone = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    child = fork(lambda: train(images, config=config, out=tmp_path / "run", quiet=True), **alone)
    assert child.wait() == 1
    assert "another process ended or does not answer" in child.printed


def test_an_exchange_that_fails_without_a_word():
    """R-17: some backends raise an error without text; that is a lost process too."""
    with raises(ProcessLost, "process-lost", shows="RuntimeError"), distributed_errors():
        raise RuntimeError("")
