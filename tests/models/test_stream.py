"""Weights from files, one tensor at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from sdlora.dtypes import STORED
from sdlora.errors import ModelError
from sdlora.models.components import Component
from sdlora.models.info import BaseInfo
from sdlora.models.load import load_component
from sdlora.models.quantize import Int8, QuantizedLinear, quantize
from sdlora.models.weights import fill, read_tensors
from tests.checks import raises
from tests.stock import load_stock_pipeline


def part_of(*files: Path) -> Component:
    return Component("unet", {}, files, "", 0)


def filled(info: BaseInfo, dtype: torch.dtype, scheme: Any = "none") -> nn.Module:
    return load_component(info.components["unet"], dtype, "cpu", scheme)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_the_library(info: BaseInfo, dtype: torch.dtype) -> None:
    """R-11: bit by bit what diffusers loads, in the dtype that was asked for, frozen."""
    expected = load_stock_pipeline(info, dtype=dtype).unet.state_dict()
    state = filled(info, dtype).state_dict(keep_vars=True)
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert {tensor.dtype for tensor in state.values()} == {dtype}
    assert not any(tensor.requires_grad for tensor in state.values())


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_layers_are_quantised_from_the_file_s_precision(info: BaseInfo, scheme: Any) -> None:
    """R-48: never from a rounded copy; everything else has the dtype of the base."""
    unet = filled(info, torch.bfloat16, scheme)
    expected = filled(info, torch.float32)
    quantize(expected, scheme)
    layers = dict(expected.named_modules())
    for name, layer in unet.named_modules():
        codec = getattr(layer, "codec", None)
        if codec is not None:
            assert torch.equal(layer.weight, layers[name].weight), name
            assert type(codec) is type(layers[name].codec)
            assert layer.bias is None or layer.bias.dtype == torch.bfloat16
    kinds = {p.dtype for p in unet.parameters()}
    assert kinds == {torch.bfloat16, torch.int8} | ({torch.uint8} if scheme == "nf4" else set())
    assert sum(hasattr(layer, "codec") for layer in unet.modules()) > 100


def test_every_dtype_of_the_format_is_read(tmp_path: Path) -> None:
    """R-25: values, shapes, numbers alone and empty tensors, of two files, in the order of the bytes."""
    tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in STORED.items()}
    tensors |= {"number": torch.tensor(3.5), "empty": torch.empty(0, 4)}
    save_file(dict(list(tensors.items())[:7]), tmp_path / "a.safetensors")
    save_file(dict(list(tensors.items())[7:]), tmp_path / "b.safetensors")
    read = dict(read_tensors(part_of(tmp_path / "a.safetensors", tmp_path / "b.safetensors")))
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name].shape == tensor.shape
        if tensor.numel():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name].float(), tensor.float())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(64, 64)
        self.norm = nn.BatchNorm1d(4)


def test_what_does_not_come_is_named() -> None:
    """R-25: missing and misshapen tensors; unknown ones are passed over; counters stay whole numbers."""
    with torch.device("meta"):
        module = Small()
    tensors = Small().state_dict() | {"norm.bias": torch.zeros(5), "other.weight": torch.zeros(2)}
    del tensors["wide.bias"]
    missing = fill(module, tensors.items(), part_of(), dtype=torch.float16, device="cpu", scheme="int8")
    assert sorted(missing) == ["norm.bias", "wide.bias"]
    assert module.norm.num_batches_tracked.dtype == torch.int64
    assert module.norm.running_mean.dtype == torch.float16
    assert isinstance(module.wide, QuantizedLinear)
    assert isinstance(module.wide.codec, Int8)


@pytest.mark.parametrize("order", ["weight first", "bias first"])
def test_the_bias_may_come_before_or_after(order: str) -> None:
    """R-48: a layer that was replaced keeps its bias, whichever came first."""
    tensors = dict(sorted(nn.Linear(64, 64).state_dict().items(), reverse=order == "weight first"))
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(64, 64))
    named = [(f"0.{name}", tensor) for name, tensor in tensors.items()]
    assert fill(module, named, part_of(), dtype=torch.float32, device="cpu", scheme="int8") == []
    assert torch.equal(module[0].bias, tensors["bias"])
    assert not module[0].bias.is_meta


def test_a_weight_is_moved_once() -> None:
    """R-18: what is not quantised crosses to the device in the dtype it is kept in, not in the file's too."""
    moves = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.to:
                moves.append(args[1:])
            return func(*args, **(kwargs or {}))

    with torch.device("meta"):
        module = nn.Linear(64, 64)
    tensors = [("weight", torch.ones(64, 64)), ("bias", torch.ones(64))]
    with Watch():
        fill(module, tensors, part_of(), dtype=torch.bfloat16, device="cpu", scheme="none")
    assert moves == [("cpu", torch.bfloat16)] * 2


def test_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    """R-40: of a file with more than one part, by a prefix or by the new names of its tensors."""
    file = tmp_path / "all.safetensors"
    save_file({"a.x": torch.zeros(2), "a.y": torch.ones(3), "b.x": torch.ones(1)}, file)
    part = Component("unet", {}, (file,), "", 0, prefix="a.")
    assert [name for name, _ in read_tensors(part)] == ["a.x", "a.y"]
    [(name, tensor)] = read_tensors(part, {"a.y": "new.y", "b.x": "other"})
    assert name == "new.y"
    assert torch.equal(tensor, torch.ones(3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(value: float) -> None:
    """R-25: before it is quantised, where it would hide."""
    with torch.device("meta"):
        module = Small()
    tensors = Small().state_dict()
    tensors["wide.weight"][3, 4] = value
    part = part_of(Path("base.safetensors"))
    with raises(ModelError, "base.non-finite", shows=("base.safetensors", "wide.weight")):
        fill(module, tensors.items(), part, dtype=torch.float32, device="cpu", scheme="int8")


MEASURE = """
import json, psutil, sys, torch
from pathlib import Path
from torch import nn
from sdlora.models.components import Component
from sdlora.models.weights import fill, read_tensors
with torch.device("meta"):
    module = nn.Sequential(*[nn.Linear(2048, 4096, bias=False) for _ in range(8)])
before = psutil.Process().memory_info().rss
part = Component("unet", {}, (Path(sys.argv[1]),), "", 0)
fill(module, read_tensors(part), part, dtype=torch.bfloat16, device="cpu", scheme="int8")
status = Path("/proc/self/status").read_text()
peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
print(json.dumps([before, psutil.Process().memory_info().rss, peak]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_there_is_no_second_copy(tmp_path: Path) -> None:
    """R-18: 268 MB of fp32 on the disk become 67 MB in memory, with a few tensors more on the way."""
    file = tmp_path / "big.safetensors"
    save_file({f"{n}.weight": torch.full((4096, 2048), 0.5) for n in range(8)}, file)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(file)], check=True, capture_output=True, text=True
    )
    before, after, peak = json.loads(done.stdout)
    numbers = 4096 * 2048
    # The allocator keeps some of the room of what was let go.
    assert after - before < 8 * numbers + 3 * 4 * numbers
    assert peak - before < 8 * numbers + 5 * 4 * numbers
