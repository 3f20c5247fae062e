"""Whole runs on a quantized base: train, resume, sample, evaluate, and use on the full base."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdlora.config import load_config
from sdlora.errors import ConfigError
from sdlora.evaluation.evaluate import evaluate
from sdlora.runs import RunFolder
from sdlora.sampling.session import sample
from sdlora.training.train import resume, train
from tests.checks import raises


def loss_on_the_full_base(run, copy):
    """As if the run had used the full base from the start."""
    shutil.copytree(run.path, copy)
    RunFolder(copy).write_config(run.read_config().replace(base={"quantize": "none"}))
    return evaluate(copy).style_loss.loss


@pytest.mark.slow
def test_a_run_on_four_bits(make_images, small, tmp_path, capsys):
    """R-01, R-03, R-10, R-11, R-48: equal to the bit, stopped or not, and sampled as trained."""
    images = make_images()
    config = small(
        images,
        base__quantize="nf4",
        data__heldout=0.25,
        train__steps=4,
        train__save_every=2,
        train__sample_every=4,
    )
    run = train(images, config=config, out=tmp_path / "straight")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("base stored in fp32 with nf4 layers, adapter fp32")
    [prepared] = run.events("prepared")
    assert prepared["dtypes"]["unet"] == "float32 with nf4 layers"
    assert run.read_environment()["base_quantize"] == "nf4"
    [passed] = run.events("postflight")
    assert passed["files"] == ["final.safetensors", "final.kohya.safetensors"]
    assert not list(run.events("gap"))
    evaluation = evaluate(run, full_base=True)
    gap = evaluation.gap
    assert gap is not None
    assert (gap.quantize, gap.images, gap.trained) == ("nf4", 1, evaluation.style_loss.loss)
    assert gap.used != gap.trained
    assert f"{gap.used / gap.trained - 1:+.2%}" in str(gap)
    assert gap.used == loss_on_the_full_base(run, tmp_path / "full")
    assert json.loads(run.evaluation_file.read_text())["gap"]["quantize"] == "nf4"
    assert evaluation.lines()[-1].startswith("gap ")

    half = train(images, config=config.replace(train={"steps": 2}), out=tmp_path / "halves", quiet=True)
    resume(half.path, {"train.steps": 4}, quiet=True)
    straight, halves = load_file(run.adapter), load_file(half.adapter)
    assert all(torch.equal(straight[name], halves[name]) for name in straight)

    grid = sample(run, step=4, out=tmp_path / "later")
    then, now = (np.asarray(Image.open(path)) for path in (run.sample_folder(4) / "grid.png", grid))
    assert np.array_equal(then, now)


def test_the_base_s_bits_cannot_change(make_images, small, tmp_path):
    """R-48: a run continues with the base that it started on, equally quantized."""
    config = small(make_images(), base__quantize="int8", train__steps=1)
    run = train(config.images, config=config, out=tmp_path / "run", quiet=True)
    assert not list(run.events("gap"))
    shutil.copytree(run.path, tmp_path / "full")
    RunFolder(tmp_path / "full").write_config(run.read_config().replace(base={"quantize": "none"}))
    with raises(ConfigError, "option--full-base"):
        evaluate(tmp_path / "full", full_base=True)
    with raises(ConfigError, "base.quantize"):
        resume(run.path, ["base.quantize=none"])
    assert json.loads(run.config_file.read_text())["base"]["quantize"] == "int8"
    assert load_config(None, ["base.quantize=nf4"]).base.quantize == "nf4"
