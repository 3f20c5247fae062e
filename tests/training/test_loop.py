"""A real run at small size: what it trains, writes, shows and survives."""

from __future__ import annotations

import json
import math
import random
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sdlora
from sdlora.data.cache import cache_folder
from sdlora.data.images import load_image
from sdlora.data.tensors import image_to_tensor
from sdlora.errors import ConfigError, TrainingDiverged
from sdlora.evaluation.heldout import HeldoutLoss
from sdlora.formats.files import load_adapter
from sdlora.lora.layers import lora_layers
from sdlora.training.finish import report_failure
from sdlora.training.logger import start_trackers
from sdlora.training.optimizer import learning_rate
from sdlora.training.plan import describe_plan
from sdlora.training.train import train
from tests.checks import raises


@pytest.fixture
def no_network(monkeypatch):
    """R-39: with local paths nothing opens a socket."""

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def run(make_images, small, tmp_path, no_network):
    """One whole run with everything switched on."""
    config = small(
        make_images(sizes=((64, 64),) * 5 + ((96, 64),) * 3),
        train__steps=6,
        train__save_every=3,
        train__sample_every=3,
        train__evaluate_every=3,
        data__heldout=0.25,
        # Large steps, so that the rounding of the file is visible in the pixels.
        train__learning_rate=0.03,
        export__precision="bf16",
    )
    return train(config.images, config=config, out=tmp_path / "run", quiet=True)


def test_a_whole_run(run, capsys):
    """R-08, R-11, R-16, R-27, R-39, R-45, R-46: the folder contains what was planned, and nothing else."""
    files = sorted(str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file())
    states = [
        f"checkpoints/step-00000{n}/{name}"
        for n in (3, 6)
        for name in ("adapter.safetensors", "optimizer.safetensors", "state.json")
    ]
    pictures = [f"samples/step-00000{n}/{name}" for n in (3, 6) for name in ("00.png", "01.png", "grid.png")]
    assert files == sorted(
        [
            "adapters/README.md",
            "adapters/final.kohya.safetensors",
            "adapters/final.safetensors",
            "adapters/grid.png",
            "adapters/step-000003.safetensors",
            "adapters/step-000006.safetensors",
            "config.json",
            "environment.json",
            "train.log",
            "events.jsonl",
            "loss.png",
            "report.html",
            *states,
            *pictures,
            *(f"webui/{run.name}{ending}" for ending in (".json", ".png", ".safetensors")),
        ]
    )
    [plan] = run.events("plan")
    steps = list(run.events("step"))
    assert [event["step"] for event in steps] == list(range(1, plan["steps"] + 1))
    assert steps[-1]["images_seen"] == plan["images_seen"]
    assert [e["step"] for e in run.events("saved")] == plan["save_steps"] == [3, 6]
    assert [e["step"] for e in run.events("samples")] == plan["sample_steps"] == [3, 6]
    assert sorted({e["step"] for e in run.events("heldout")}) == plan["evaluate_steps"] == [0, 3, 6]
    assert {e["split"] for e in run.events("heldout")} == {"train", "heldout"}
    for key in (
        "loss",
        "loss_ema",
        "learning_rate",
        "grad_norm",
        "images_seen",
        "steps_per_second",
        "memory_mb",
    ):
        assert all(math.isfinite(event[key]) for event in steps), key
    assert [event["event"] for event in run.events()][-1] == "done"
    settings = run.read_config().train
    assert [e["learning_rate"] for e in steps] == [learning_rate(n, settings, 6) for n in range(6)]
    [prepared] = run.events("prepared")
    assert prepared["attention"] == "SDPA"
    assert prepared["dtypes"] == dict.fromkeys(("unet", "vae", "text_encoder", "adapter"), "float32")
    environment = run.read_environment()
    assert environment["compute_dtype"] == environment["base_dtype"] == environment["adapter_dtype"] == "fp32"
    with Image.open(run.loss_curve) as curve:
        assert min(curve.size) > 200
    # memory and time of each stage, beside the plan; the speed is kept for the next one.
    [usage] = run.events("usage")
    assert usage["stages"].keys() - {"loading"} == plan["memory"]["stages"].keys() == usage["planned"].keys()
    assert usage["peak"] == max(usage["stages"].values())
    assert {"encoding", "training", "validation", "sampling", "whole"} < usage["seconds"].keys()
    [speed] = json.loads((cache_folder() / "speed.json").read_text(encoding="utf-8")).values()
    assert speed["rates"].keys() == {"encoding", "training", "validation", "sampling"}
    assert not plan["seconds"]
    text = run.log_file.read_text(encoding="utf-8")
    assert [len(re.findall(f"^{line} ", text, re.MULTILINE)) for line in ("memory", "time", "time left")] == [
        2,
        3,
        1,
    ]


def test_samples_equal_the_verb(run, tmp_path):
    """R-10: the grid made at step k equals, pixel for pixel, what `sample` makes from step k's file."""
    for step in (3, 6):
        grid = sdlora.sample(run, step=step, out=tmp_path / f"again-{step}")
        for name in ("grid.png", "00.png", "01.png"):
            one = np.asarray(Image.open(run.sample_folder(step) / name))
            assert np.array_equal(one, np.asarray(Image.open(grid.parent / name))), name
    base, style = (np.asarray(Image.open(grid.parent / name)) for name in ("00.png", "01.png"))
    assert not np.array_equal(base, style)


def test_files_say_what_they_are(run):
    """R-42: the same run writes the same bytes; dates are the run's own."""
    saved, final = load_adapter(run.step_adapter(6)), load_adapter(run.adapter)
    for name, pair in final.modules.items():
        assert torch.equal(pair.up, saved.modules[name].up)
    assert final.notes["sdlora.base_name"] == "builtin"
    assert final.notes["ss_steps"] == "6"
    text = json.dumps(final.notes)
    assert str(run.path.parent) not in text
    assert "a circle number" not in text


def test_sampling_does_not_disturb(make_images, small, make_trainer, snapshot, tmp_path):
    """R-04, R-10: samples and evaluations in between change no bit of a run."""
    images = make_images()
    plain = make_trainer(small(images), tmp_path / "plain")
    plain.train()
    torch.manual_seed(123), random.seed(5), np.random.seed(6)
    busy = make_trainer(
        small(images, train__sample_every=1, train__evaluate_every=1, train__save_every=1), tmp_path / "busy"
    )
    busy.train()
    assert [r.loss for r in plain.results] == [r.loss for r in busy.results]
    for name, tensor in snapshot(plain).items():
        assert torch.equal(tensor, snapshot(busy)[name]), name


def test_the_base_is_drawn_once(make_images, small, make_trainer, monkeypatch, tmp_path):
    """R-10, R-20: the grids of a run share the column of the base, and so do runs and `sample`."""
    config = small(
        make_images(), train__sample_every=1, train__steps=3, sample__prompts=["a circle", "a box"]
    )
    trainer = make_trainer(config, tmp_path / "run")
    base, drawn = trainer.prepared.base, []
    decode = base.decode_latents
    monkeypatch.setattr(base, "decode_latents", lambda latents: drawn.append(len(latents)) or decode(latents))
    trainer.train()
    assert drawn == [2, 2, 2, 2]
    pixels = {
        (step, name): np.asarray(Image.open(trainer.run.sample_folder(step) / name))
        for step in (1, 3)
        for name in ("00.png", "01.png", "02.png", "03.png")
    }
    assert all(np.array_equal(pixels[1, name], pixels[3, name]) for name in ("00.png", "02.png"))
    assert not any(np.array_equal(pixels[1, name], pixels[3, name]) for name in ("01.png", "03.png"))
    drawn.clear()
    other = make_trainer(config.replace(train={"learning_rate": 0.01, "steps": 1}), tmp_path / "other")
    monkeypatch.setattr(other.prepared.base, "decode_latents", base.decode_latents)
    other.train()
    assert drawn == [2], "the base is in the cache"
    assert np.array_equal(pixels[1, "00.png"], np.asarray(Image.open(other.run.sample_folder(1) / "00.png")))


def test_only_the_adapter_learns(make_images, small, make_trainer, tmp_path):
    """R-06, R-09: down and up are fp32 and change; no bit of the base does."""
    trainer = make_trainer(small(make_images()), tmp_path / "run")
    unet = trainer.prepared.base.denoiser
    before = {name: parameter.clone() for name, parameter in unet.named_parameters()}
    start = {name: tensor.clone() for name, tensor in trainer.runner.adapter.named_tensors().items()}
    trainer.train()
    assert len(before) > 100
    assert all(torch.equal(parameter, before[name]) for name, parameter in unet.named_parameters())
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    for name, tensor in trainer.runner.adapter.named_tensors().items():
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, start[name]), name


def test_seeds(make_images, small, make_trainer, snapshot, tmp_path):
    """R-43: the same seed gives the same run to the bit; another seed another."""
    images = make_images()
    one, same, other = (
        make_trainer(small(images, train__steps=2, train__seed=seed), tmp_path / name)
        for name, seed in (("one", 0), ("same", 0), ("other", 1))
    )
    for trainer in (one, same, other):
        trainer.train()
    first, second, third = (snapshot(trainer) for trainer in (one, same, other))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert not any(
        torch.equal(tensor, third[name]) for name, tensor in first.items() if name.endswith(".down")
    )


def test_cached_equals_uncached(make_images, small, make_trainer, snapshot, tmp_path):
    """R-20: the cache changes nothing, and a second run with it encodes nothing."""
    images = make_images()
    cached = make_trainer(small(images), tmp_path / "cached")
    fresh = make_trainer(small(images, data__cache=False), tmp_path / "fresh")
    assert cached.prepared.encodings.cache is not None
    assert fresh.prepared.encodings.cache is None
    for trainer in (cached, fresh):
        trainer.train()
    for name, tensor in snapshot(cached).items():
        torch.testing.assert_close(tensor, snapshot(fresh)[name], rtol=0, atol=1e-7)

    encodings, record = cached.prepared.encodings, cached.plan.index.records[0]
    pixels = image_to_tensor(load_image(record.path))[None]
    for kept, encoded in zip(
        encodings.posterior(record, cached.plan.buckets.crops[record.name][0]),
        fresh.prepared.base.encode_images(pixels),
        strict=True,
    ):
        assert torch.equal(kept, encoded[0])
        assert kept.min() < kept.max()

    again = make_trainer(small(images), tmp_path / "again")
    # Any use of the encoders would fail now.
    again.prepared.base.load = None
    again.train()
    assert [r.loss for r in again.results] == [r.loss for r in cached.results]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("base_dtype", ["auto", "fp32"])
def test_precisions(make_images, small, make_trainer, tmp_path, precision, base_dtype):
    """R-11: each trains for three steps, with fp32 adapters; fp16 is tested on a GPU."""
    config = small(make_images(), train__steps=3, train__precision=precision, base__dtype=base_dtype)
    trainer = make_trainer(config, tmp_path / "run")
    trainer.train()
    assert all(math.isfinite(result.loss) and result.updated for result in trainer.results)
    stored = next(trainer.prepared.base.denoiser.parameters()).dtype
    assert stored == (torch.bfloat16 if (precision, base_dtype) == ("bf16", "auto") else torch.float32)
    assert all(tensor.dtype == torch.float32 for tensor in trainer.runner.parameters)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_precisions_on_a_gpu(make_images, small, make_trainer, tmp_path, precision):
    """R-11: each runs three steps on CUDA."""
    trainer = make_trainer(small(make_images(), train__steps=3, train__precision=precision), tmp_path / "run")
    trainer.train()
    assert trainer.accelerator.device.type == "cuda"
    assert any(result.updated for result in trainer.results)
    assert all(
        tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in trainer.runner.parameters
    )


def test_gradient_checkpointing_changes_nothing(make_images, small, make_trainer, snapshot, tmp_path):
    """R-09: the same gradients with and without."""
    images = make_images()
    plain = make_trainer(small(images, train__steps=2), tmp_path / "plain")
    saving = make_trainer(
        small(images, train__steps=2, train__gradient_checkpointing=True), tmp_path / "saving"
    )
    for trainer in (plain, saving):
        trainer.train()
    assert [r.grad_norm for r in plain.results] == pytest.approx(
        [r.grad_norm for r in saving.results], rel=1e-5
    )
    for name, tensor in snapshot(plain).items():
        torch.testing.assert_close(tensor, snapshot(saving)[name], rtol=1e-4, atol=1e-6)


def test_accumulation_equals_a_larger_batch(make_images, small, make_trainer, tmp_path):
    """R-16: the micro-batches of a step do not change its result."""
    images = make_images(sizes=((64, 64),) * 7)
    large = make_trainer(small(images, train__batch_size=4), tmp_path / "large")
    small_ones = make_trainer(small(images, train__batch_size=1, train__accumulate=4), tmp_path / "small")
    for trainer in (large, small_ones):
        trainer.train()
    assert [r.loss for r in large.results] == pytest.approx([r.loss for r in small_ones.results], rel=1e-5)
    assert [r.grad_norm for r in large.results] == pytest.approx(
        [r.grad_norm for r in small_ones.results], rel=1e-4
    )


def test_clipping_clips(make_images, small, make_trainer, tmp_path):
    """The optimizer gets a gradient of at most train.grad_clip; 0 switches clipping off."""
    images = make_images()
    for limit, expected in ((1e-4, 1e-4), (0.0, None)):
        trainer = make_trainer(small(images, train__grad_clip=limit), tmp_path / str(limit))
        samples = trainer.plan.order.step(0)
        trainer.runner.compute_gradients(0, samples)
        before = float(trainer.runner.clip_gradients())
        norm = float(
            torch.stack([p.grad.norm() for p in trainer.runner.parameters if p.grad is not None]).norm()
        )
        assert norm == pytest.approx(expected or before, rel=1e-3)
        assert before > 1e-3


def test_numbers_that_are_not_finite_stop_the_run(make_images, small, make_trainer, tmp_path):
    """R-06: a run whose base outputs NaN skips, counts, and stops with an error; no file is written."""
    trainer = make_trainer(small(make_images(), train__max_skipped_steps=3, train__steps=9), tmp_path / "run")
    layer = next(iter(lora_layers(trainer.prepared.base.denoiser).values()))
    layer.base.weight.data.fill_(math.nan)
    before = [tensor.clone() for tensor in trainer.runner.parameters]
    with raises(TrainingDiverged, "non-finite-steps", shows=("step 3", "loss nan")):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.runner.parameters, strict=True))
    assert len(list(trainer.run.events("warning"))) == 2
    assert trainer.run.saved_steps() == []


def test_a_dead_module_stops_the_run(make_images, small, make_trainer, tmp_path):
    """R-09: a module that cannot receive a gradient is named after the first step."""
    trainer = make_trainer(small(make_images()), tmp_path / "run")
    name, pair = next(iter(trainer.runner.adapter.modules.items()))
    pair.down.data.zero_()
    with raises(TrainingDiverged, "dead-modules", shows=("1 modules", name)):
        trainer.train()


def test_a_single_token_is_no_reason_to_stop(make_images, small, make_trainer, tmp_path):
    """R-09: at 32 px the deepest self-attention sees one token; its queries and keys are excused."""
    trainer = make_trainer(small(make_images(), data__resolution=32, train__steps=1), tmp_path / "run")
    trainer.train()
    assert trainer.step == 1


def test_heldout_loss_is_a_function_of_the_weights(make_images, small, make_trainer, tmp_path):
    """R-12: the same weights give the same loss, independent of draws in between; other weights another."""
    config = small(make_images(sizes=((64, 64),) * 8), data__heldout=0.25)
    trainer = make_trainer(config, tmp_path / "run")
    first = trainer.evaluate("heldout")
    torch.rand(3)
    assert trainer.evaluate("heldout") == first
    trainer.train()
    assert trainer.evaluate("heldout") != first
    assert first.num_images == 2
    assert len(first.by_band) == 5


def test_overfitting_is_said_while_it_happens(make_images, small, make_trainer, tmp_path, monkeypatch):
    """R-12: once, after two losses in a row above the least one; not with few held-out images."""
    losses = {0: 0.5, 1: 0.3, 2: 0.31, 3: 0.32, 4: 0.33, 5: 0.2}
    config = small(make_images(), train__steps=5, train__evaluate_every=1, data__heldout=0.25)
    for images, steps in ((8, [3]), (7, [])):
        trainer = make_trainer(config, tmp_path / str(images))

        def evaluate(split, trainer=trainer, images=images):
            return HeldoutLoss(losses[trainer.step], {}, images)

        monkeypatch.setattr(trainer, "evaluate", evaluate)
        trainer.train()
        found = [one for one in trainer.run.events("warning") if "held-out images rises" in one["message"]]
        assert [event["step"] for event in found] == steps


def test_the_objective_is_the_one_asked_for(make_images, small, make_trainer, tmp_path):
    """R-12, R-32: the objective changes training; the held-out loss stays plain."""
    config = small(
        make_images(sizes=((64, 64),) * 8),
        train__steps=2,
        data__heldout=0.25,
        objective__loss="pseudo_huber",
        objective__debiased=True,
        objective__pyramid_noise=6,
        objective__input_perturbation=0.1,
        objective__timesteps="style_friendly",
    )
    trainer = make_trainer(config, tmp_path / "run")
    plain = make_trainer(small(config.images, data__heldout=0.25), tmp_path / "plain")
    assert trainer.prepared.objective.settings == config.objective
    assert trainer.evaluate("heldout") == plain.evaluate("heldout")
    trainer.train()
    assert [draw.timestep > 500 for result in trainer.results for draw in result.draws] == [True] * 4
    assert all(result.updated for result in trainer.results)
    assert "pseudo_huber (huber_delta 0.1, huber_schedule snr), " in "\n".join(describe_plan(trainer.plan))
    notes = load_adapter(trainer.run.step_adapter(2)).notes
    assert notes["sdlora.timesteps"] == '"style_friendly"'
    assert notes["ss_multires_noise_iterations"] == "6"
    assert "sdlora.huber_delta" not in notes


def test_groups_keep_their_ratio(make_images, small, make_trainer, tmp_path):
    """R-08: every group's rate is a pure function of the step, in the optimizer and in the events."""
    config = small(
        make_images(),
        train__learning_rate=1e-3,
        train__learning_rates={"*.attn2.*": 5e-4},
        train__lora_plus_ratio=4.0,
        train__schedule="cosine",
    )
    trainer = make_trainer(config, tmp_path / "run")
    trainer.train()
    ratios = {"others down": 1, "others up": 4, "*.attn2.* down": 0.5, "*.attn2.* up": 2}
    for number, event in enumerate(trainer.run.events("step")):
        rate = learning_rate(number, config.train, 4)
        assert event["learning_rate"] == rate
        assert event["learning_rates"] == pytest.approx({name: rate * r for name, r in ratios.items()})
    last = [group["lr"] for group in trainer.runner.optimizer.param_groups]
    assert last == pytest.approx(list(event["learning_rates"].values()))
    assert "0.0005 on *.attn2.* (" in "\n".join(describe_plan(trainer.plan))


def test_trackers(make_images, small, tmp_path):
    """R-45: TensorBoard gets the metrics and the grid, in a folder of its own."""
    config = small(
        make_images(), train__trackers="tensorboard", train__sample_every=4, train__evaluate_every=4
    )
    run = train(config.images, config=config, out=tmp_path / "run", quiet=True)
    logs = run.path / "tensorboard"
    written = b"".join(file.read_bytes() for file in logs.rglob("events.out.tfevents*"))
    for tag in (b"loss_ema", b"learning_rate", b"samples"):
        assert tag in written


# As seen with mlflow 3.17, comet_ml 3.58 and dvclive 3.49, which are not installed here.
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("wandb", (1, 5, 9, 3)),
        ("clearml", (5, 9, 3)),
        ("trackio", (5, 9, 3)),
        ("mlflow", (5, 9, 3)),
        ("comet_ml", (5, 9, 3)),
        ("dvclive", (5, 9, 3)),
        ("unknown", None),
    ],
)
def test_grids_go_to_every_tracker(make_images, small, make_trainer, tmp_path, monkeypatch, name, shape):
    """R-45: as each library takes them, one that takes none is left out; a failure is a warning."""
    logger = make_trainer(small(make_images()), tmp_path / "run").logger
    grid, got = tmp_path / "grid.png", []
    Image.new("RGB", (9, 5), "red").save(grid)

    def log(values, *, step):
        got.append((step, np.shape(values["samples"])))

    def log_named(pixels, *, step, **names):
        assert set(names.values()) == {"samples"}
        log({"samples": pixels}, step=step)

    def log_file(file, pixels):
        log({"samples": pixels}, step=int(Path(file).stem.removeprefix("step-")))

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(Image=lambda pixels: pixels))
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(log_image=log_named))
    methods = {
        "wandb": {"log_images": log},
        "clearml": {"log_images": log},
        "trackio": {"log": log},
        "comet_ml": {"tracker": SimpleNamespace(log_image=log_named)},
        "dvclive": {"tracker": SimpleNamespace(log_image=log_file)},
    }
    broken = SimpleNamespace(name="wandb", log_images=lambda *_, **__: 1 / 0)
    tracker = SimpleNamespace(name=name, **methods.get(name, {}))
    monkeypatch.setattr(logger.accelerator, "trackers", [broken, tracker])
    logger.track_grid(3, grid)
    assert got == ([(3, shape)] if shape else [])
    assert [event["step"] for event in logger.run.events("warning")] == [3]


def test_a_report_that_cannot_be_written(make_images, small, tmp_path, monkeypatch):
    """R-45: it is one warning of a run that is finished."""

    def fail(*_, **__):
        raise ValueError("no\nfont")

    monkeypatch.setattr("sdlora.training.finish.write_report", fail)
    config = small(make_images(), train__sample_every=0, train__evaluate_every=0, train__steps=1)
    run = train(config.images, config=config, out=tmp_path / "run", quiet=True)
    assert run.is_finished(1)
    assert len([event for event in run.events("warning") if "sdlora report" in event["message"]]) == 1


def test_a_failing_tracker_cannot_stop_the_run(make_images, small, make_trainer, tmp_path):
    """R-45: a failing tracker is a warning."""
    trainer = make_trainer(small(make_images(), train__trackers="tensorboard"), tmp_path / "run")
    start_trackers(trainer.accelerator, trainer.run.path, trainer.plan.config)
    trainer.accelerator.trackers[0].writer.close()
    trainer.accelerator.trackers[0].writer = None
    trainer.train()
    assert trainer.step == 4
    warned = [event for event in trainer.run.events("warning") if "tensorboard" in event["message"]]
    assert len(warned) == 1, "once, not at every step"
    with report_failure(trainer):  # its end fails, too
        pass


def test_a_tracker_that_cannot_be_started(make_images, small, make_trainer, tmp_path, monkeypatch):
    """R-45: one line with the setting."""
    trainer = make_trainer(small(make_images(), train__trackers="tensorboard"), tmp_path / "run")
    monkeypatch.setattr(trainer.accelerator, "init_trackers", lambda *_, **__: {}["WANDB_API_KEY"])
    with raises(ConfigError, "train.trackers", shows="WANDB_API_KEY"):
        start_trackers(trainer.accelerator, trainer.run.path, trainer.plan.config)


def test_starting_from_a_file(make_images, small, make_trainer, tmp_path):
    """lora.init_from has an effect: the first loss is that of the file's adapter."""
    images = make_images()
    first = make_trainer(small(images, data__heldout=0.25, lora__alpha=8), tmp_path / "first")
    first.train()
    file = first.run.saved_adapter(4)
    second = make_trainer(small(images, data__heldout=0.25, lora__init_from=str(file)), tmp_path / "second")
    for split in ("train", "heldout"):
        assert second.evaluate(split).loss == pytest.approx(first.evaluate(split).loss, rel=1e-3)


@pytest.mark.parametrize("cache", ["auto", True])
def test_a_cache_that_cannot_be_written(make_images, small, make_trainer, tmp_path, monkeypatch, cache):
    """R-20, R-35: `auto` warns and continues in memory; an explicit `true` is an error."""
    place = tmp_path / "file"
    place.write_text("no folder")
    monkeypatch.setenv("SDLORA_CACHE", str(place))
    config = small(make_images(), data__cache=cache, train__steps=1)
    if cache == "auto":
        make_trainer(config, tmp_path / "run").train()
    else:
        with raises(sdlora.SdloraError, "data.cache", shows=str(place)):
            make_trainer(config, tmp_path / "run")
