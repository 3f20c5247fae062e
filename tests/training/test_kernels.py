"""The kernels of a run are chosen at its start, recorded, and used again when it is resumed."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from sdlora.errors import RunError
from sdlora.lora.layers import lora_layers
from sdlora.models import attention
from sdlora.sampling.session import sample
from sdlora.training import prepare
from sdlora.training.checkpoint import read_state, seal_state
from sdlora.training.prepare import BLOCKED_ATTENTION, COMPILED, CPU_KERNELS, FUSED_LORA
from sdlora.training.train import resume, train
from tests.checks import raises

BF16 = {"train.precision": "bf16", "train.steps": 4, "train.save_every": 2}


@pytest.fixture(autouse=True)
def without_amx(monkeypatch):
    """As on a CPU without a unit for products, whatever this one has."""
    monkeypatch.setattr(prepare, "has_fast_products", lambda: False)


@pytest.fixture
def config(quick, make_images):
    images = make_images(sizes=((64, 64),) * 3)
    changes = {name.replace(".", "__"): value for name, value in BF16.items()}
    return quick(images, lora__targets=["attention"], **changes)


def start(config, folder, **changes):
    return train(config.images, config=config, out=folder, overrides=changes, quiet=True)


def forget_kernels(run, step, kernels=None):
    """Rewrites a checkpoint as of a version without kernels, or with other ones."""
    state = read_state(run.checkpoint(step))
    if kernels is None:
        del state["identity"]["kernels"]
    else:
        state["identity"]["kernels"] = kernels
    (run.checkpoint(step) / "state.json").write_text(seal_state(state))


def test_a_resumed_run_takes_the_same_kernels(config, tmp_path, check_same):
    """R-03 R-46: they are in the events and the checkpoint, and a resumed run equals a straight one."""
    straight = start(config, tmp_path / "straight")
    [prepared] = straight.events("prepared")
    assert prepared["kernels"] == [CPU_KERNELS, FUSED_LORA]
    assert read_state(straight.checkpoint(2))["identity"]["kernels"] == [CPU_KERNELS, FUSED_LORA]
    stopped = start(config, tmp_path / "stopped", **{"train.steps": 2})
    resume(stopped, ["train.steps=4"], quiet=True)
    check_same(stopped, straight)


def test_blocked_attention_is_for_fast_products(config, tmp_path, monkeypatch, check_same):
    """R-03 R-46: chosen where products are fast, and taken again on a CPU where they are not."""
    monkeypatch.setattr(prepare, "has_fast_products", lambda: True)
    monkeypatch.setattr(attention, "LEAST_TOKENS", 16)  # the base has few
    called, attend = [], attention.attend_in_blocks
    monkeypatch.setattr(attention, "attend_in_blocks", lambda *given: called.append(1) or attend(*given))
    straight = start(config, tmp_path / "straight")
    stopped = start(config, tmp_path / "stopped", **{"train.steps": 2})
    monkeypatch.setattr(prepare, "has_fast_products", lambda: False)
    resume(stopped, ["train.steps=4"], quiet=True)
    for run in (straight, stopped):
        assert list(run.events("prepared"))[-1]["kernels"] == [CPU_KERNELS, BLOCKED_ATTENTION, FUSED_LORA]
    assert called
    check_same(stopped, straight)


def test_where_nothing_compiles_a_run_goes_on(config, tmp_path, monkeypatch, capsys):
    """R-16 R-46: one line says so, and the run is that of stock blocks; one that compiled is not resumed."""

    def fail(*_, **__):
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(torch, "compile", fail)
    run = train(config.images, config=config, out=tmp_path / "run", overrides={"train.compile": True})
    shown = capsys.readouterr()
    [line] = [one for one in (shown.out + shown.err).splitlines() if "train.compile" in one]
    assert "no compiler" in line
    [prepared] = run.events("prepared")
    assert COMPILED not in prepared["kernels"]
    forget_kernels(run, 4, [*prepared["kernels"], COMPILED])
    with raises(RunError, "kernels", shows=COMPILED):
        resume(run, ["train.steps=6"], quiet=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_compute_the_same(config, tmp_path):
    """R-46: losses as without, within what the order of sums leaves of fp32, and resumed the same way."""
    fp32 = {"train.precision": "fp32", "train.learning_rate": 1e-2}
    plain = start(config, tmp_path / "plain", **fp32)
    compiled = start(config, tmp_path / "compiled", **fp32, **{"train.compile": True, "train.steps": 2})
    resume(compiled, ["train.steps=4"], quiet=True)
    assert [event["kernels"] for event in compiled.events("prepared")] == [[FUSED_LORA, COMPILED]] * 2
    losses = [[event["loss"] for event in run.events("step")] for run in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_an_older_run_continues_without_kernels(config, tmp_path):
    """R-03: a checkpoint without a record of them was computed with the stock ones."""
    run = start(config, tmp_path / "run", **{"train.steps": 2})
    forget_kernels(run, 2)
    resume(run, ["train.steps=4"], quiet=True)
    assert [event["kernels"] for event in run.events("prepared")][-1] == []


def test_a_run_samples_as_any_other_program(config, tmp_path):
    """R-10: `sample` takes the kernels of a run, for the same pixels."""
    run = start(config, tmp_path / "run", **{"train.sample_every": 2, "train.learning_rate": 0.03})
    for step in (2, 4):
        again = sample(run, step=step, out=tmp_path / f"again-{step}").parent
        for name in ("00.png", "01.png"):
            one, other = (
                np.asarray(Image.open(folder / name)) for folder in (run.sample_folder(step), again)
            )
            assert np.array_equal(one, other), name


def test_missing_kernels_end_a_resume(config, tmp_path):
    """R-03 R-46: on a device that cannot compute as before, exit 2 with the kernels and the remedy."""
    run = start(config, tmp_path / "run", **{"train.steps": 2})
    forget_kernels(run, 2, [FUSED_LORA, "some_gpu_kernel"])
    with raises(RunError, "kernels", shows="some_gpu_kernel") as caught:
        resume(run, ["train.steps=4"], quiet=True)
    assert caught.value.exit_code == 2
    resume(run, ["train.steps=4"], allow_changed=["compute"], quiet=True)
    assert list(run.events("prepared"))[-1]["kernels"] == [CPU_KERNELS, FUSED_LORA]


def test_compiled_blocks_may_be_switched_off(config, tmp_path):
    """R-03: `--allow-changed train.compile` is heard."""
    run = start(config, tmp_path / "run", **{"train.steps": 2, "train.compile": False})
    state = read_state(run.checkpoint(2))
    state["identity"] |= {"train.compile": True, "kernels": [CPU_KERNELS, FUSED_LORA, COMPILED]}
    (run.checkpoint(2) / "state.json").write_text(seal_state(state))
    resume(run, ["train.steps=4", "train.compile=false"], allow_changed=["train.compile"], quiet=True)
    assert list(run.events("prepared"))[-1]["kernels"] == [CPU_KERNELS, FUSED_LORA]


@pytest.mark.parametrize(
    ("changes", "kernels"),
    [({"base__dtype": "fp32"}, []), ({"train__precision": "fp32"}, [FUSED_LORA])],
    ids=["autocast", "fp32"],
)
def test_kernels_suit_the_precision(config, make_trainer, tmp_path, changes, kernels):
    """R-46: none under autocast; a CPU's only in bf16."""
    for name, value in changes.items():
        section, key = name.split("__")
        config = config.replace(**{section: {key: value}})
    trainer = make_trainer(config, tmp_path / "run")
    assert list(trainer.prepared.kernels) == kernels
    fused = {layer.is_fused for layer in lora_layers(trainer.prepared.base.components).values()}
    assert fused == {FUSED_LORA in kernels}
