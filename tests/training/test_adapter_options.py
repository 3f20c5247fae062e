"""Settings of `[lora]` besides rank and targets, in small runs."""

from __future__ import annotations

import json

import pytest
import torch

from sdlora.errors import AdapterError, RunStopped, SdloraError
from sdlora.formats.files import inspect_adapter, load_adapter, save_adapter
from sdlora.training.plan import describe_plan
from sdlora.training.planning import make_plan
from sdlora.training.train import train
from tests.checks import raises

OPTIONS = {
    "lora__targets": ["all"],
    "lora__rank": 4,
    "lora__alpha": 2,
    "lora__alpha_pattern": {"mid_block.*": 1},
    "lora__rslora": True,
    "lora__init": "orthogonal",
    "lora__dropout": 0.2,
    "lora__max_norm": 0.01,
    "train__learning_rate": 0.02,
}


@pytest.mark.parametrize(
    "base",
    [
        pytest.param(None, marks=pytest.mark.slow),
        pytest.param("sd15_folder", marks=pytest.mark.slow),
        pytest.param("sd21_folder", marks=pytest.mark.slow),
        "sdxl_folder",
    ],
)
def test_everything_at_once(request, make_images, small, tmp_path, base):
    """R-01 R-02 R-33: a run with every option follows its plan; its files load in stock diffusers."""
    source = str(request.getfixturevalue(base)) if base else "builtin"
    ranks = {"convolutions": 1, "*.attn2.*": 3}
    if text := base == "sdxl_folder":
        ranks |= {"text_attention": 2, "text_encoder_2.*.layers.0.*": 1}
    options = {**OPTIONS, "lora__text_encoder": text, "lora__rank_pattern": ranks}
    config = small(make_images(), base__source=source, train__steps=3, **options)
    run = train(config.images, config=config, out=tmp_path / "run", quiet=True)
    [plan] = run.events("plan")
    [line] = [line for line in describe_plan(make_plan(config)) if line.startswith("adapter")]
    assert "rank 4 (" in line
    assert "alpha 1 to 2, scale 0.5 to 2 (alpha / sqrt(rank))" in line
    info = inspect_adapter(run.adapter)
    assert info.num_parameters == plan["trainable_parameters"]
    assert info.num_modules == plan["modules"]
    assert set(info.ranks) == {1, 3, 4, *([2] if text else [])}
    assert json.loads(info.metadata["sdlora.rank_pattern"]) == ranks
    assert any(target.startswith("text encoder") for target in info.targets) == text
    assert info.metadata["sdlora.rslora"] == "true"
    assert info.metadata["ss_network_dropout"] == "0.2"
    assert info.metadata["ss_scale_weight_norms"] == "0.01"
    steps = list(run.events("step"))
    limit = 0.01 * (1 + 1e-5)  # the mean of equal norms may round to more than the largest
    assert all(0 < event["norm_mean"] <= limit and event["norm_max"] <= limit for event in steps)
    assert steps[-1]["norms_limited"] > 0
    kohya = inspect_adapter(run.final_adapter("kohya"))
    assert kohya.num_parameters == make_plan(config).num_padded > info.num_parameters
    assert set(kohya.ranks) == {4}
    assert kohya.alphas == {4.0: kohya.num_modules}


@pytest.mark.parametrize("text_encoder", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dropout_resumes_exactly(make_images, small, make_trainer, snapshot, tmp_path, text_encoder):
    """R-03 R-04: dropout depends on seed, step and sample alone, so a stopped run continues exactly."""
    images = make_images()
    options = {"lora__dropout": 0.2, "lora__max_norm": 0.01, "lora__text_encoder": text_encoder}
    if text_encoder:
        options["data__prompt_chunks"] = 2
    straight = make_trainer(small(images, **options), tmp_path / "straight")
    straight.train()
    first = make_trainer(small(images, train__save_every=2, **options), tmp_path / "stopped")
    first.stop_at = 2
    with raises(RunStopped, "stopped", shows="step 2"):
        first.train()
    second = make_trainer(small(images, train__save_every=2, **options), tmp_path / "stopped")
    second.resume()
    second.train()
    one, two = snapshot(straight), snapshot(second)
    assert all(torch.equal(one[name], two[name]) for name in one)
    plain = make_trainer(small(images, **{**options, "lora__dropout": 0.0}), tmp_path / "plain")
    plain.train()
    assert not all(torch.equal(one[name], tensor) for name, tensor in snapshot(plain).items())


def test_starting_from_another_rank(make_images, small, make_trainer, tmp_path):
    """lora.init_from takes a run, or a file of any dialect and rank; a conflict is found before loading."""
    images = make_images()
    first = make_trainer(small(images, data__heldout=0.25, lora__alpha=8), tmp_path / "first")
    for pair in first.runner.adapter.modules.values():
        pair.up.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    file = save_adapter(tmp_path / "start.safetensors", first.runner.adapter, dialect="kohya")
    save_adapter(first.run.final_adapter(), first.runner.adapter)
    for source in (file, first.run.path):
        assert make_plan(small(images, lora__init_from=str(source))).config.lora.init_from == str(source)
    larger = small(images, data__heldout=0.25, lora__init_from=str(file), lora__rank=5, lora__alpha=3)
    second = make_trainer(larger, tmp_path / "second")
    assert second.evaluate("train").loss == pytest.approx(first.evaluate("train").loss, rel=1e-4)
    for changes, key, shown in (
        ({"lora__targets": ["*.attn2.*"]}, "lora.targets", "40 of its 80 modules"),
        ({"lora__init_from": "nowhere.safetensors"}, "lora.missing", "nowhere.safetensors"),
    ):
        with raises(SdloraError, key, shows=shown):
            make_plan(small(images, **{"lora__init_from": str(file), **changes}))
    adapter = load_adapter(file)
    adapter.family = "sdxl"
    adapter.notes["sdlora.family"] = "sdxl"
    other = save_adapter(tmp_path / "other.safetensors", adapter)
    with raises(AdapterError, "lora.family", shows=("other.safetensors", "sdxl", "builtin", "sd1")):
        make_plan(small(images, lora__init_from=str(other)))
