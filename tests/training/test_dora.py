"""A run with `lora.kind=dora`, from the plan to the files (R-01, R-03)."""

from __future__ import annotations

import torch

import sdlora
from sdlora.config import load_config
from sdlora.errors import AdapterError, ConfigError, RunStopped
from sdlora.formats.files import inspect_adapter, load_adapter
from sdlora.lora.adapter import draw_adapter
from sdlora.rank.merge import merge
from sdlora.rank.resize import resize
from sdlora.rank.spectrum import spectrum
from tests.checks import raises
from tests.lora_fixtures import create_adapter

RUN = {
    "lora__kind": "dora",
    "lora__targets": ["*.attn2.to_v", "*.resnets.0.conv1"],
    "lora__alpha": 4.0,
    "lora__dropout": 0.1,
    "lora__max_norm": 1.0,
    "train__ema_decay": 0.8,
    "train__lora_plus_ratio": 4.0,
    "export__formats": ["diffusers", "kohya"],
}


def test_a_whole_run(make_images, small, tmp_path, capsys):
    """R-01 R-09 R-36: a DoRA is trained, sampled, exported in both dialects and verified."""
    config = small(make_images(), **RUN, train__sample_every=4, train__learning_rate=1e-2)
    run = sdlora.train(config.images, config=config, out=tmp_path / "run")
    printed = capsys.readouterr().out
    assert "dora, rank 2" in printed
    assert "final.kohya.safetensors in sdlora:" in printed
    stock, kohya = run.final_adapter("diffusers"), run.final_adapter("kohya")
    for file in (stock, kohya):
        assert inspect_adapter(file).kinds == {"dora": inspect_adapter(file).num_modules}
    one, two = load_adapter(stock), load_adapter(kohya)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert (run.samples / "step-000004" / "grid.png").is_file()
    assert sdlora.sample(kohya, prompts=["a circle"], steps=2, out=tmp_path / "grid").is_file()


def test_stopped_equals_straight(make_images, small, make_trainer, tmp_path):
    """R-03: factors, magnitudes, their averages and moments are restored to the bit."""
    config = small(make_images(), **RUN, train__save_every=2)
    trainers = []
    for name, stop in (("straight", None), ("stopped", 2)):
        trainer = make_trainer(config, tmp_path / name)
        trainer.stop_at = stop
        try:
            trainer.train()
        except RunStopped:
            trainer = make_trainer(config, tmp_path / name)
            trainer.train()
        trainers.append(trainer)
    one, two = (trainer.runner.adapter.named_tensors() for trainer in trainers)
    assert any(name.endswith(".magnitude") for name in one)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_half_precision_on_a_base_in_bf16(make_images, small, tmp_path):
    """R-01 R-11: postflight passes where PEFT rounds the norms of the base weights."""
    config = small(
        make_images(),
        **{**RUN, "train__precision": "bf16", "base__dtype": "bf16", "train__learning_rate": 1e-2},
    )
    run = sdlora.train(config.images, config=config, out=tmp_path / "run")
    assert inspect_adapter(run.adapter).kinds.keys() == {"dora"}


def test_what_does_not_go_together(make_images, small, tmp_path):
    """A DoRA is refused as a child and on quantized weights, with the settings' names."""
    images = make_images()
    with raises(ConfigError, "lora.kind", shows="base.quantize"):
        load_config(None, {"lora.kind": "dora", "base.quantize": "int8"}, images=images)
    with raises(ConfigError, "lora.kind", shows="lora.parent"):
        load_config(None, {"lora.kind": "dora", "lora.parent": "x"}, images=images)


def test_exact_operations_refuse_it(unet, make_images, tmp_path):
    """Merging, resizing, spectra and trees refuse adapters that are not additive (R-37)."""
    names = ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    plain = create_adapter(unet, names, 2, 2, seed=0).to()
    dora = draw_adapter(unet, {names[0]: 2}, {names[0]: 1.0}, seed=0, kind="dora").to()
    dora.modules[names[0]].up.fill_(0.1)
    for work in (
        lambda: merge([(plain, 1.0), (dora, 1.0)]),
        lambda: resize(dora, rank=1),
        lambda: spectrum(dora),
    ):
        with raises(AdapterError, "lora.kind"):
            work()
    sdlora.save_adapter(tmp_path / "one.safetensors", dora)
    with raises(AdapterError, "lora.kind"):
        images = make_images()
        sdlora.train(images, parent=tmp_path / "one.safetensors", dry_run=True, quiet=True)
    with raises(AdapterError, "lora.kind", shows="lora.init_from"):
        start = {"lora.init_from": str(tmp_path / "one.safetensors")}
        sdlora.train(images, overrides=start, dry_run=True, quiet=True)
