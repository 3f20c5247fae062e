"""One source of truth for precision (R-11)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sdlora.config import load_config
from sdlora.dtypes import Precision, has_bf16
from sdlora.errors import ConfigError
from sdlora.training.device import choose_precision, make_accelerator
from tests.checks import raises

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("overrides", "compute", "base"),
    [
        ({}, "fp32", "fp32"),
        ({"base.dtype": "bf16"}, "bf16", "bf16"),
        ({"train.precision": "bf16"}, "bf16", "bf16"),
        ({"train.precision": "bf16", "base.dtype": "fp32"}, "bf16", "fp32"),
    ],
)
def test_what_is_said_is_what_is_computed_in(overrides, compute, base):
    """R-11: a base computes in the dtype it is stored in, or in a lower one by autocast."""
    assert choose_precision(load_config(None, overrides), CPU, {}) == Precision(compute, base)


@pytest.mark.parametrize("base", ["bf16", "fp16"])
def test_more_than_the_base_has_is_refused(base):
    """R-11: train.precision = fp32 conflicts with a base stored in less."""
    config = load_config(None, {"train.precision": "fp32", "base.dtype": base})
    with raises(ConfigError, "train.precision", shows=("fp32", f"base.dtype = {base}")):
        choose_precision(config, CPU, {})


@pytest.mark.parametrize(("major", "compute"), [(7, "fp32"), (8, "bf16")])
def test_emulated_bf16_does_not_count(monkeypatch, major, compute):
    """R-11: a T4 or V100 only emulates bf16, which torch reports as supported but is slower than fp32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert torch.cuda.is_bf16_supported()
    assert has_bf16(CUDA) == (compute == "bf16")
    assert choose_precision(load_config(), CUDA, {}).compute == compute


def test_accelerate_divides_no_gradients(monkeypatch):
    """R-12: the loop divides them; a variable of the environment made them smaller once more."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert make_accelerator(load_config())[0].gradient_accumulation_steps == 1
