"""Whole runs on a base of few bits: train, resume, sample, evaluate, and use on the full base."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdlora.config import load_config
from sdlora.errors import ConfigError
from sdlora.sampling.session import sample
from sdlora.training.train import resume, train


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_a_run_on_few_bits(make_images, small, tmp_path, capsys, quantize):
    """R-01, R-03, R-10, R-11, R-48: twice the same bits, stopped or not; what it saw is what is sampled."""
    images = make_images()
    config = small(
        images, base__quantize=quantize, train__steps=4, train__save_every=2, train__sample_every=4
    )
    run = train(images, config=config, out=tmp_path / "straight")
    first = capsys.readouterr().out.splitlines()
    assert first[0].endswith(f"base stored in fp32 with {quantize} layers, adapter fp32")
    [prepared] = run.events("prepared")
    assert prepared["dtypes"]["unet"] == f"float32 with {quantize} layers"
    assert run.read_environment()["base_quantize"] == quantize
    [passed] = run.events("postflight")
    assert passed["files"] == ["final.safetensors", "final.kohya.safetensors"]

    half = train(images, config=config.replace(train={"steps": 2}), out=tmp_path / "halves", quiet=True)
    resume(half.path, {"train.steps": 4}, quiet=True)
    straight, halves = load_file(run.adapter), load_file(half.adapter)
    assert all(torch.equal(straight[name], halves[name]) for name in straight)

    grid = sample(run, step=4, out=tmp_path / "later")
    then, now = (np.asarray(Image.open(path)) for path in (run.sample_folder(4) / "grid.png", grid))
    assert np.array_equal(then, now)


def test_the_base_s_bits_cannot_change(make_images, small, tmp_path):
    """R-48: a run goes on with the base that it began on, in as many bits."""
    config = small(make_images(), base__quantize="int8", train__steps=1)
    run = train(config.images, config=config, out=tmp_path / "run", quiet=True)
    with pytest.raises(ConfigError, match=r"base\.quantize cannot change"):
        resume(run.path, ["base.quantize=none"])
    assert json.loads(run.config_file.read_text())["base"]["quantize"] == "int8"
    assert load_config(None, ["base.quantize=nf4"]).base.quantize == "nf4"
