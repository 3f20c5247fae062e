"""What the README promises on its first screen: train, sample, load."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import sdlora
from sdlora.cli import main

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
# The stock pipeline adds peft's product to the projection in another order of operations than ours.
TOLERANCE = 3


@pytest.fixture
def demo(tmp_path, monkeypatch, shared_cache):
    """`make demo`, at few steps."""
    monkeypatch.chdir(tmp_path)
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    command = re.search(r"\$\(BIN\)/sdlora (train .*)", makefile)
    assert command
    arguments = [
        str(REPOSITORY / part) if part.startswith(("datasets/", "configs/")) else part
        for part in command.group(1).split()
    ]
    few = [
        "train.steps=3",
        "train.sample_every=3",
        "train.evaluate_every=3",
        "sample.prompts=['a fox', 'a cat']",
        "sample.steps=5",
    ]
    monkeypatch.setattr(sys, "argv", ["sdlora", *arguments, *few])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    return sdlora.RunFolder(tmp_path / "runs" / "openmoji")


def test_train_sample_load(demo, tmp_path, capfd):
    """R-27, R-37: the three lines load the file without a word about keys, and give our picture."""
    grid = sdlora.sample(
        demo, prompts=["a fox"], seeds=[0], strengths=[1], steps=5, guidance=4.0, out=tmp_path / "grid"
    )
    assert grid.is_file()
    ours = np.asarray(Image.open(grid.parent / "01.png").convert("RGB"), dtype=np.int32)
    base = np.asarray(Image.open(grid.parent / "00.png").convert("RGB"), dtype=np.int32)

    [block] = re.findall(r"```python\n(pipe = .*?)```", README, re.DOTALL)
    block = block.replace("runs/openmoji", str(demo.path)).replace(
        "sdlora/builtin", str(REPOSITORY / "sdlora/builtin")
    )
    block = block.replace(
        "num_inference_steps=25", "num_inference_steps=5, generator=torch.Generator().manual_seed(0)"
    )
    names = {"StableDiffusionPipeline": StableDiffusionPipeline, "torch": torch}
    capfd.readouterr()
    exec(block, names)
    printed = capfd.readouterr().err
    assert "unexpected" not in printed
    assert "missing" not in printed
    stock = np.asarray(names["image"], dtype=np.int32)
    assert np.abs(stock - ours).max() <= TOLERANCE
    assert np.abs(stock - base).max() > TOLERANCE


def test_links_and_figures_exist():
    """A README's links lead somewhere."""
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert len(targets) > 8
    for target in targets:
        assert (REPOSITORY / target).exists(), target


def test_the_table_of_settings():
    """Its rows are what config.py says: key, default, description; paste what this prints to update it."""
    table = README[README.index("| setting | default | description |") :].split("\n\n")[0]
    rows = table.splitlines()[2:]
    expected = []
    for key in (row.split("`")[1] for row in rows):
        section, name = key.split(".")
        settings = getattr(sdlora.RunConfig(), section)
        value, description = getattr(settings, name), type(settings).model_fields[name].description
        default = f"`{value if isinstance(value, str) else json.dumps(value)}`" if value is not None else ""
        expected.append(f"| `{key}` | {default} | {description} |")
    assert rows == expected, "\n".join(expected)


def test_every_setting_named_is_one():
    """What the README calls a setting is one."""
    keys = {
        f"{section}.{name}"
        for section, values in sdlora.RunConfig().model_dump().items()
        if isinstance(values, dict)
        for name in values
    }
    sections = "|".join({key.split(".")[0] for key in keys})
    named = set(re.findall(rf"`((?:{sections})\.[a-z_]+)", README))
    assert len(named) > 20
    assert named <= keys
