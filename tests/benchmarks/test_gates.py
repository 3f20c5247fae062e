"""The gates of the benchmarks at a quarter of SD 1.5's size, as ratios (R-19, R-20, R-46)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdlora.models.weights import empty_model
from tests.benchmarks import measure
from tests.benchmarks.bases import BASES, write_base, write_weights
from tests.benchmarks.step import gradient_difference, measure_step
from tests.benchmarks.trainers import write_images

# Other tests run beside this one and change a step by a third within a minute (the same code gave 0.85 to
# 1.15), so the gate catches only a step that is clearly slower. README.md has the ratios of an idle machine.
ROUNDS, TRIES = 5, 3
MOST = 1.15


@pytest.fixture(scope="module")
def quarter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base("quarter", tmp_path_factory.mktemp("bases") / "quarter")


def test_bases_have_the_sizes_of_real_ones():
    """R-46: the base to measure on has the numbers of SD 1.5; the small one has a quarter of them."""
    count = {
        name: sum(one.numel() for one in empty_model("unet", BASES[name][1]["unet"]).parameters())
        for name in ("sd15", "quarter")
    }
    assert count["sd15"] == 859_520_964
    assert count["sd15"] / 4.05 < count["quarter"] < count["sd15"] / 3.95


def test_streamed_weights_are_a_safetensors_file(tmp_path):
    """The same seed gives the same file, and safetensors itself reads it."""
    tensors = {"a.weight": torch.empty(8, 4, device="meta"), "a.bias": torch.empty(8, device="meta")}
    for name in ("one", "two"):
        write_weights(tensors, tmp_path / name, torch.Generator().manual_seed(0))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    found = load_file(tmp_path / "one")
    assert found["a.weight"].shape == (8, 4)
    assert found["a.weight"].dtype == torch.bfloat16
    assert not found["a.bias"].any()


def test_ratios_are_of_the_same_round():
    """A machine that slows down between rounds does not change a ratio."""
    assert measure.paired_ratio({"a": [1.0, 20.0, 3.0], "b": [2.0, 40.0, 6.0]}, "a", "b") == 0.5
    order = []
    measure.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b", "b", "a"]


def test_a_gradient_differs_from_another():
    one = {"x.up": torch.tensor([3.0, 4.0])}
    assert gradient_difference(one, one) == 0
    assert gradient_difference({"x.up": torch.tensor([3.0, 4.5])}, one) == pytest.approx(0.1)


def test_attention_counts_on_a_cpu():
    """Torch's counter leaves it out: two products forward, four backward."""
    query, key, value = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    assert measure.count_flops(lambda: attend(query, key, value).sum().backward()) == 6 * 2 * 2 * 16 * 16 * 8


@pytest.mark.slow
def test_a_step_is_not_slower_than_a_peft_loop(quarter, tmp_path):
    """R-46: the same modules and gradients as PEFT's layers, in no more time."""
    images = write_images(tmp_path / "images", 2, 256)
    for _ in range(TRIES):
        found = measure_step(quarter, images, 256, ROUNDS)
        print({name: value for name, value in found.items() if name != "times"})
        assert found["modules"] == {"ours": 128, "peft": 128}
        # Two ways to round in bf16 differ by 3.5e-3 at the full size.
        assert found["gradient_difference"] < 5e-3
        if found["ratio"] <= MOST:
            break
    assert found["ratio"] <= MOST
