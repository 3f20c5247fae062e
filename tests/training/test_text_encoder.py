"""Text encoders that are trained: on a base with one of them, and on SDXL with two (R-34)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sdlora
from sdlora.config import BaseSection, load_config
from sdlora.errors import ConfigError, RunStopped
from sdlora.formats.files import load_adapter, save_adapter
from sdlora.lora.attach import match_targets
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base
from sdlora.models.weights import empty_components
from sdlora.sampling.session import sample
from sdlora.training.checkpoint import read_checkpoint
from sdlora.training.planning import make_plan
from sdlora.training.train import train
from tests.checks import raises
from tests.lora_fixtures import create_adapter
from tests.stock import load_stock_pipeline

CHANGES = {
    "train__steps": 4,
    "train__learning_rate": 0.01,
    "lora__text_encoder": True,
    "data__caption_dropout": 0.3,
    "data__heldout": 0.4,
}


BASES = [pytest.param("builtin", marks=pytest.mark.slow), "sdxl"]


@pytest.fixture(params=BASES)
def config(request, make_images, small, sdxl_folder):
    source = "builtin" if request.param == "builtin" else str(sdxl_folder)
    return small(make_images(sizes=((64, 64),) * 5), base__source=source, **CHANGES)


@pytest.fixture(scope="module", params=BASES)
def run(request, draw_images, small, sdxl_folder, tmp_path_factory):
    """One whole run on each base; tests only read it."""
    folder = tmp_path_factory.mktemp("text")
    source = "builtin" if request.param == "builtin" else str(sdxl_folder)
    cadence = {"train__save_every": 2, "train__sample_every": 2, "train__evaluate_every": 4}
    images = draw_images(folder / "pictures", ((64, 64),) * 5)
    config = small(images, base__source=source, **CHANGES, **cadence, train__gradient_checkpointing=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDLORA_CACHE", str(folder / "cache"))
        return train(images, config=config, out=folder / "run", quiet=True)


def test_the_whole_path(run, tmp_path):
    """R-01, R-07, R-09, R-10, R-34: both dialects contain every text encoder; samples are of the file."""
    info = inspect_base(run.read_config().base)
    adapter = load_adapter(run.adapter)
    assert adapter.components == ["unet", *info.traits.text_encoders]
    assert all(pair.up.any() for pair in adapter.modules.values())
    assert [event["event"] for event in run.events()][-1] == "done"
    assert adapter.notes["ss_text_encoder_lr"] == "0.005"
    assert adapter.notes["ss_unet_lr"] == "0.01"
    assert "text encoders 0.005" in run.model_card.read_text(encoding="utf-8")
    prefixes = {key.split("_text_model")[0] for key in load_file(run.final_adapter("kohya")) if "_te" in key}
    assert prefixes == ({"lora_te1", "lora_te2"} if info.family == "sdxl" else {"lora_te"})
    other = load_adapter(run.final_adapter("kohya"))
    assert set(other.modules) == set(adapter.modules)
    for name, pair in adapter.modules.items():
        assert torch.equal(other.modules[name].up, pair.up)
    grid = sample(run, step=2, out=tmp_path / "again")
    for name in ("grid.png", "00.png", "01.png"):
        one, two = (np.asarray(Image.open(folder / name)) for folder in (run.sample_folder(2), grid.parent))
        assert np.array_equal(one, two), name
    evaluation = sdlora.evaluate(run)
    assert evaluation.style_loss.loss != evaluation.base_loss.loss
    [last] = [e["loss"] for e in run.events("heldout") if e["step"] == 4 and e["split"] == "heldout"]
    assert evaluation.style_loss.loss == pytest.approx(last, rel=1e-3)


@pytest.mark.slow
def test_files_do_the_same_in_stock_diffusers(run):
    """R-01, R-34: each dialect gives the same image in stock diffusers, prompt encoding included."""
    config = run.read_config()
    info = inspect_base(config.base)
    [prompt], settings = config.sample.prompts, config.sample
    ours = np.asarray(Image.open(run.sample_folder(4) / "01.png"), dtype=np.int32)
    for dialect in ("diffusers", "kohya"):
        pipeline = load_stock_pipeline(info)
        pipeline.load_lora_weights(str(run.final_adapter(dialect)))
        picture = pipeline(
            prompt,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            width=config.data.resolution,
            height=config.data.resolution,
            generator=torch.Generator().manual_seed(settings.seeds[0]),
        ).images[0]
        assert np.abs(np.asarray(picture, dtype=np.int32) - ours).max() <= 2, dialect


def test_stopped_equals_straight(config, make_trainer, snapshot, tmp_path):
    """R-03, R-34: tensors, moments, losses and draws, to the bit."""
    straight = make_trainer(config, tmp_path / "straight")
    straight.train()
    first = make_trainer(config, tmp_path / "stopped")
    first.stop_at = 3
    with pytest.raises(RunStopped):
        first.train()
    second = make_trainer(config, tmp_path / "stopped")
    second.resume()
    second.train()
    assert [*first.results, *second.results] == straight.results
    for name, tensor in snapshot(straight).items():
        assert torch.equal(tensor, snapshot(second)[name]), name
    one, other = (read_checkpoint(t.run.checkpoint(4))[1]["state"] for t in (straight, second))
    assert all(torch.equal(one[key]["exp_avg"], other[key]["exp_avg"]) for key in one)


def test_only_the_adapter_learns(config, make_trainer, snapshot, tmp_path):
    """R-06, R-09, R-34: every encoder's pairs change at their own rate; no bit of the base does."""
    trainer = make_trainer(config.replace(train={"steps": 2}), tmp_path / "run")
    parts = trainer.prepared.base.components
    before = {name: tensor.clone() for part in parts.values() for name, tensor in part.named_parameters()}
    start = snapshot(trainer)
    trainer.train()
    after = {name: tensor for part in parts.values() for name, tensor in part.named_parameters()}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    changed = {name for name, tensor in snapshot(trainer).items() if not torch.equal(tensor, start[name])}
    assert {name.split(".")[0] for name in changed} >= set(trainer.plan.info.traits.text_encoders)
    assert changed == set(start)
    assert {group.name: group.ratio for group in trainer.runner.groups} == {
        "others": 1,
        "text encoders": 0.5,
    }


def test_checkpointing_changes_no_gradient(config, make_trainer, snapshot, tmp_path):
    """R-09: recomputed activations have the same dropout, in text encoders too."""
    changed = config.replace(lora={"dropout": 0.3}, train={"steps": 2})
    plain = make_trainer(changed, tmp_path / "plain")
    saving = make_trainer(changed.replace(train={"gradient_checkpointing": True}), tmp_path / "saving")
    for trainer in (plain, saving):
        trainer.train()
    for part in saving.prepared.base.text_encoders:
        assert any(getattr(module, "gradient_checkpointing", False) for module in part.modules())
    for name, tensor in snapshot(plain).items():
        torch.testing.assert_close(snapshot(saving)[name], tensor, rtol=1e-4, atol=1e-6)


def test_latents_are_cached_and_text_is_not(config, make_trainer, tmp_path, monkeypatch):
    """R-20, R-34: the VAE leaves the device; the text encoders stay and encode the captions of every step."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("SDLORA_CACHE", str(cache))
    trainer = make_trainer(config.replace(train={"steps": 2}), tmp_path / "run")
    assert (cache / "latents").is_dir()
    assert not (cache / "text").exists()
    assert trainer.prepared.prompt_states == {}
    encoder, seen = trainer.prepared.base.text_encoders[-1], []
    encoder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    trainer.train()
    assert seen == [len(trainer.plan.order.step(step)) for step in range(2)]


def test_asking_for_the_cache_is_an_error(make_images):
    """R-34: one line that names both settings."""
    with raises(ConfigError, "data.cache", shows="lora.text_encoder = true") as caught:
        load_config(None, ["data.cache=true", "lora.text_encoder=true"])
    assert len(caught.value.problems) == 1
    assert load_config(None, ["data.cache=false", "lora.text_encoder=true"]).lora.text_encoder


def test_off_by_default(make_images, small):
    """R-34: text encoders are not targets by default; naming one is an error with the missing setting."""
    plan = make_plan(small(make_images()))
    assert not [name for name in plan.targets if name.startswith("text_encoder")]
    with raises(ConfigError, "lora.targets", shows=("'text_attention'", "lora.text_encoder=true")):
        make_plan(small(make_images("more"), lora__targets=["attention", "text_attention"]))


@pytest.mark.parametrize(
    ("targets", "kinds"),
    [
        (["attention"], {"q_proj", "k_proj", "v_proj", "out_proj"}),
        (["all-linear"], {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
        (["attention", "text_mlp"], {"fc1", "fc2"}),
    ],
)
def test_targets(make_images, small, sdxl_folder, targets, kinds):
    """R-34: as in the UNet unless named; the layer that SDXL does not read is excluded."""
    config = small(
        make_images(), base__source=str(sdxl_folder), lora__text_encoder=True, lora__targets=targets
    )
    plan = make_plan(config)
    names = [name for name in plan.targets if name.startswith("text_encoder")]
    assert {name.split(".")[-1] for name in names} == kinds
    layers = {(name.split(".")[0], name.split(".")[4]) for name in names}
    assert layers == {
        *(("text_encoder", str(number)) for number in range(2)),
        *(("text_encoder_2", str(number)) for number in range(3)),
    }
    empty = empty_components(plan.info, text=True)
    assert {p.device.type for part in empty.values() for p in part.parameters()} == {"meta"}


def test_starting_from_a_file_of_another_trainer(make_images, small, sdxl_folder, make_trainer, tmp_path):
    """Other trainers adapt SDXL's unread layer too; that part of their files is ignored."""
    base = load_base(inspect_base(BaseSection(source=str(sdxl_folder))), dtype=torch.float32, device="cpu")
    names = match_targets(base.components, ["attention", "text_attention"])
    other = create_adapter(base.components, names, 2, 2.0, seed=5, family="sdxl").to()
    for number, pair in enumerate(other.modules.values()):
        pair.up.fill_(0.01 + 0.001 * number)
    file = save_adapter(tmp_path / "other.safetensors", other, dialect="kohya")
    settings = {"base__source": str(sdxl_folder), "lora__init_from": str(file)}
    trainer = make_trainer(small(make_images(), **settings, lora__text_encoder=True), tmp_path / "run")
    started, unread = trainer.runner.adapter.modules, trainer.plan.info.unread_layer
    assert set(names) - set(started) == {name for name in names if name.startswith(unread)} != set()
    assert all(torch.equal(pair.up, other.modules[name].up) for name, pair in started.items())
    with raises(ConfigError, "lora.targets", shows="lora.text_encoder=true"):
        make_plan(small(make_images("more"), **settings))


@pytest.mark.slow
def test_a_bf16_base(make_images, small, sdxl_folder, tmp_path):
    """R-11, R-34: the encoders are fp32 beside a bf16 UNet; both files pass postflight."""
    config = small(make_images(), base__source=str(sdxl_folder), **CHANGES, train__precision="bf16")
    run = train(config.images, config=config, out=tmp_path / "run", quiet=True)
    assert [event["event"] for event in run.events()][-1] == "done"
    [prepared] = run.events("prepared")
    assert prepared["dtypes"]["unet"] == "bfloat16"
    assert prepared["dtypes"]["text_encoder"] == prepared["dtypes"]["text_encoder_2"] == "float32"
