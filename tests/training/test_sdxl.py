"""A tiny SDXL: trained, stopped, resumed, sampled, evaluated, exported, loaded elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import sdlora
from sdlora.data.images import load_image
from sdlora.errors import AdapterError, RunStopped, TrainingDiverged
from sdlora.formats.files import load_adapter
from sdlora.lora.adapter import check_base
from sdlora.models.info import inspect_base
from sdlora.sampling.session import sample
from sdlora.training.train import train
from tests.checks import raises
from tests.stock import load_stock_pipeline

SIZES = ((80, 64),) * 2 + ((300, 200),) * 2 + ((64, 96),) * 2
CHANGES = {
    "train__steps": 4,
    "train__learning_rate": 0.02,
    "data__caption_dropout": 0.3,
    "data__crop": "random",
    "data__flip": True,
    "data__heldout": 0.3,
}


@pytest.fixture
def config(make_images, small, sdxl_folder):
    return small(make_images(sizes=SIZES), base__source=str(sdxl_folder), **CHANGES)


@pytest.fixture(scope="module")
def run(draw_images, small, sdxl_folder, tmp_path_factory):
    """One whole run; tests only read it."""
    folder = tmp_path_factory.mktemp("sdxl")
    cadence = {"train__save_every": 2, "train__sample_every": 2, "train__evaluate_every": 4}
    images = draw_images(folder / "pictures", SIZES)
    config = small(images, base__source=str(sdxl_folder), **CHANGES, **cadence)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDLORA_CACHE", str(folder / "cache"))
        return train(images, config=config, out=folder / "run", quiet=True)


def test_the_whole_path(run, tmp_path):
    """R-01, R-10, R-12, R-37, R-41, R-42: each file loads in stock diffusers, and names SDXL."""
    events = [event["event"] for event in run.events()]
    assert events[-1] == "done"
    assert {e["split"] for e in run.events("heldout")} == {"train", "heldout"}
    for dialect in ("diffusers", "kohya"):
        with safe_open(run.final_adapter(dialect), "pt") as file:
            metadata = file.metadata()
        assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
        assert metadata["ss_v2"] == "False"
        assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
        assert load_adapter(run.final_adapter(dialect)).family == "sdxl"
    with safe_open(run.final_adapter("kohya"), "pt") as file:
        blocks = {"_".join(key.split("_")[:3]) for key in file.keys()}  # noqa: SIM118
    assert blocks == {"lora_unet_input", "lora_unet_middle", "lora_unet_output"}
    grid = sample(run, step=2, out=tmp_path / "again")
    for name in ("grid.png", "00.png", "01.png"):
        one, other = (np.asarray(Image.open(f / name)) for f in (run.sample_folder(2), grid.parent))
        assert np.array_equal(one, other), name
    base, style = (np.asarray(Image.open(grid.parent / name)) for name in ("00.png", "01.png"))
    assert not np.array_equal(base, style)
    evaluation = sdlora.evaluate(run)
    assert evaluation.images == 2
    assert evaluation.style_loss.loss != evaluation.base_loss.loss


def test_files_do_the_same_in_stock_diffusers(run):
    """R-01: each dialect gives the same image in stock diffusers as here."""
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


def test_another_family_is_refused(run):
    """R-41: in both directions."""
    adapter = load_adapter(run.adapter)
    with raises(AdapterError, "lora.family", shows=("sdxl", "builtin", "sd1")):
        check_base(adapter, family="sd1", name="builtin")
    with raises(AdapterError, "lora.family", shows="sdxl"):
        sample(run.adapter, base="builtin", prompts=["a cat"])


def test_every_sample_gets_its_sizes(config, make_trainer, tmp_path):
    """R-31: the image's own size, its crop's corner after mirroring, and its bucket, sample by sample."""
    trainer = make_trainer(config, tmp_path / "run")
    seen = []
    trainer.prepared.base.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    trainer.train()
    given = [row.tolist() for added in seen for row in added["time_ids"]]
    samples = [sample for step in range(4) for sample in trainer.plan.order.step(step)]
    assert len(given) == len(samples)
    mirrored = 0
    for sizes, sample_ in zip(given, samples, strict=True):
        width, height = load_image(sample_.record.path).size
        crop = sample_.crop
        left = crop.resized.width - crop.left - crop.size.width if crop.flipped else crop.left
        assert sizes == [height, width, crop.top, left, crop.size.height, crop.size.width]
        mirrored += crop.flipped and left != crop.left
    assert mirrored
    assert all(added["text_embeds"].shape[1] == 20 for added in seen)
    dropped = [not sample_.caption for sample_ in samples]
    zeros = [not row.any() for added in seen for row in added["text_embeds"]]
    assert zeros == dropped
    assert 0 < sum(dropped) < len(dropped)


def test_stopped_equals_straight(config, make_trainer, snapshot, tmp_path):
    """R-03: tensors and losses, to the bit, from a cache that the first part has filled."""
    straight = make_trainer(config, tmp_path / "straight")
    straight.train()
    first = make_trainer(config, tmp_path / "stopped")
    first.stop_at = 2
    with pytest.raises(RunStopped):
        first.train()
    second = make_trainer(config, tmp_path / "stopped")
    second.resume()
    second.train()
    assert [*first.results, *second.results] == straight.results
    for name, tensor in snapshot(straight).items():
        assert torch.equal(tensor, snapshot(second)[name]), name


@pytest.mark.slow
def test_cached_equals_uncached(config, make_trainer, snapshot, tmp_path):
    """R-20: pooled states, and zeros for the empty caption, are read from the cache as written."""
    cached = make_trainer(config, tmp_path / "cached")
    uncached = make_trainer(config.replace(data={"cache": False}), tmp_path / "uncached")
    for trainer in (cached, uncached):
        trainer.train()
    assert uncached.results == cached.results
    for name, tensor in snapshot(cached).items():
        assert torch.equal(tensor, snapshot(uncached)[name]), name


def test_every_module_is_proven_at_the_first_caption(config, make_trainer, tmp_path):
    """R-09: zeros for a dropped caption give cross-attention no gradient; the check waits for a caption."""
    dropped = config.replace(data={"caption_dropout": 0.6}, train={"batch_size": 1, "seed": 2})
    trainer = make_trainer(dropped, tmp_path / "run")
    first = trainer.health.first_update_step
    assert first == next(n for n in range(4) if trainer.plan.order.step(n)[0].caption) > 0
    cross = {name: pair for name, pair in trainer.runner.adapter.modules.items() if ".attn2." in name}
    for _ in range(first):
        trainer.train_step()
    assert not any(pair.up.any() for pair in cross.values())
    trainer.train_step()
    assert all(pair.up.any() for pair in cross.values())
    frozen = make_trainer(dropped, tmp_path / "frozen")
    frozen.runner.adapter.modules["mid_block.attentions.0.transformer_blocks.0.attn2.to_v"].up.requires_grad_(
        False
    )
    for _ in range(first):
        frozen.train_step()
    with raises(TrainingDiverged, "dead-modules", shows=("1 modules", "attn2.to_v")):
        frozen.train_step()
