"""LoRA files that anybody may have made are refused in one line before they cost anything (R-25, R-44)."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdlora.errors import AdapterError, unfit_letters
from sdlora.formats.files import inspect_adapter, load_adapter, save_adapter
from sdlora.lora.kinds import LowRank
from tests.checks import raises


@pytest.mark.parametrize(
    ("tensors", "key", "shows"),
    [
        ({"lora_A": ("F4", [4, 4], 8)}, "lora.dtype", "F4"),
        ({"lora_A": ("C64", [4, 4], 128)}, "lora.dtype", "C64"),
        ({"lora_A": ("BOOL", [4, 4], 16)}, "lora.dtype", "BOOL"),
        ({"lora_A": ("F32", [0, 4], 0), "lora_B": ("F32", [4, 0], 0)}, "lora.shapes", "(0, 4)"),
        ({"lora_A": ("F32", [2**60, 0], 0), "lora_B": ("F32", [0, 2**60], 0)}, "lora.shapes", "empty"),
        ({"lora_A": ("F32", [4], 16), "lora_B": ("F32", [4], 16)}, "lora.shapes", "down (4,)"),
        ({"lora_A": ("F32", [], 4), "lora_B": ("F32", [], 4)}, "lora.shapes", "down ()"),
        ({"lora_A": ("F32", [2, 3], 24), "lora_B": ("F32", [3, 4], 48)}, "lora.shapes", "up (3, 4)"),
        (
            {"lora_A": ("F32", [2, 3, 1, 1], 24), "lora_B": ("F32", [3, 2, 2, 1], 48)},
            "lora.shapes",
            "(3, 2, 2, 1)",
        ),
    ],
)
def test_tensors_that_no_lora_holds(tmp_path, tensors, key, shows):
    """R-25: other dtypes, empty and shapeless tensors are refused in one line before they cost anything."""
    header, end = {}, 0
    for part, (dtype, shape, size) in tensors.items():
        header[f"unet.conv_in.{part}.weight"] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [end, end + size],
        }
        end += size
    raw = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(end))
    for read in (load_adapter, inspect_adapter):
        with raises(AdapterError, key, shows=("x.safetensors ", shows)) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_file_larger_than_any_lora(tmp_path):
    """R-25: a sparse terabyte is refused by its header, not mapped and copied."""
    shape, size = [2**38], 2**40
    raw = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    with (tmp_path / "x.safetensors").open("wb") as handle:
        handle.write(len(raw).to_bytes(8, "little") + raw)
        handle.truncate(8 + len(raw) + size)
    with raises(AdapterError, "file.too-large", shows=("x.safetensors", "1099.5 GB")):
        load_adapter(tmp_path / "x.safetensors")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are a matter of POSIX")
def test_a_pipe_is_not_waited_for(tmp_path):
    """R-25: a pipe or a device under a LoRA's name is refused at once."""
    os.mkfifo(tmp_path / "x.safetensors")
    with raises(AdapterError, "file.irregular"):
        load_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "C:\\x", "..", "~/x"])
def test_names_are_never_paths(tmp_path, name):
    """R-25: a module's name with path parts is a name; nothing is read or written there."""
    key = f"unet.mid_block.attentions.0.{name}"
    state = {f"{key}.lora_A.weight": torch.ones(2, 4), f"{key}.lora_B.weight": torch.ones(4, 2)}
    save_file(state, tmp_path / "x.safetensors")
    adapter = load_adapter(tmp_path / "x.safetensors")
    assert len(adapter.modules) == 1
    inside = tmp_path / "out"
    inside.mkdir()
    save_adapter(inside / "y.safetensors", adapter)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["out", "x.safetensors", "y.safetensors"]


def write_lora(path, metadata, **more):
    """A small LoRA file of one pair, with any metadata."""
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}
    save_file(state | {f"{name}.{part}": tensor for part, tensor in more.items()}, path, metadata)
    return path


@pytest.mark.parametrize(
    ("value", "key", "shows"),
    [
        ("{oops", "lora.metadata", "not JSON"),
        ("[" * 100_000, "lora.metadata", "nested too deeply"),
        ("[1]", "lora.metadata", "not a JSON object"),
        ('{"unet.lora_alpha": "many"}', "lora.alpha", "'many'"),
        ('{"unet.lora_alpha": 1e999}', "lora.alpha", "inf"),
        ('{"unet.lora_alpha": %s}' % ("9" * 400), "lora.alpha", "999"),
        ('{"unet.lora_alpha": true}', "lora.alpha", "True"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}', "lora.metadata", "alpha_pattern"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+$": 1}}', "lora.metadata", "(a+)+$"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"[": 1}}', "lora.metadata", "regular expression, ["),
    ],
)
def test_metadata_that_hurts(tmp_path, value, key, shows):
    """R-25: what a file says of itself is checked, and its regular expressions are never run."""
    path = write_lora(tmp_path / "x.safetensors", {"lora_adapter_metadata": value})
    for read in (load_adapter, inspect_adapter):
        with raises(AdapterError, key, shows=("x.safetensors", shows)) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("pattern", "alpha"),
    [
        ("to_q", 8.0),
        ("attn1.to_q", 8.0),
        (r"attn1\.to_q$", 8.0),
        ("^down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 8.0),
        ("^attn1.to_q", 1.0),
        ("o_q", 1.0),
        ("to_k", 1.0),
    ],
)
def test_alpha_patterns_are_names(tmp_path, pattern, alpha):
    """R-02: a name, or the end of one, chooses an alpha as PEFT would."""
    config = {"unet.lora_alpha": 1, "unet.alpha_pattern": {pattern: 8}}
    path = write_lora(tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    assert inspect_adapter(path).alphas == {alpha: 1}


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.tensor(float("nan")), torch.tensor(float("inf"))])
def test_alphas_that_are_no_number(tmp_path, alpha):
    """R-25: an alpha of several values, or none that can be counted with."""
    path = write_lora(tmp_path / "x.safetensors", {}, alpha=alpha)
    for read in (load_adapter, inspect_adapter):
        with raises(AdapterError, "lora.alpha"):
            read(path)


@pytest.mark.parametrize("value", ["{oops", "[1]", '{"x": 3}'])
def test_padded_ranks_that_are_none(tmp_path, mixed_adapter, value):
    """R-25: a damaged note on padding is refused, a false one changes nothing."""
    path = save_adapter(tmp_path / "x.safetensors", mixed_adapter, dialect="kohya")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), tmp_path / "y.safetensors", {**metadata, "sdlora.ranks": value})
    if value.startswith('{"'):
        assert load_adapter(tmp_path / "y.safetensors").rank == 6
    else:
        with raises(AdapterError, "lora.metadata", shows="sdlora.ranks"):
            load_adapter(tmp_path / "y.safetensors")


def test_what_a_file_says_steers_no_terminal(tmp_path):
    """`sdlora info` prints a line for each key, whatever it holds."""
    path = write_lora(tmp_path / "x.safetensors", {"a\x1b[2J": "b\x1b]0;c\x07", "d\ne": "f\u2028g\r"})
    lines = inspect_adapter(path).lines()
    assert not any(unfit_letters(line) for line in lines)
    assert any(r"a\x1b[2J" in line and r"b\x1b]0;c\x07" in line for line in lines)


def test_a_peft_configuration_that_cannot_be_read(tmp_path):
    """R-25: the file beside PEFT's weights is bounded and text, or one line says that it is not."""
    write_lora(tmp_path / "adapter_model.safetensors", {})
    config = tmp_path / "adapter_config.json"
    config.write_bytes(b"\xff\xfe")
    with raises(AdapterError, "file.unreadable", shows="adapter_config.json"):
        load_adapter(tmp_path)
    with config.open("wb") as file:
        file.truncate(10**9)
    with raises(AdapterError, "file.too-large", shows="adapter_config.json"):
        load_adapter(tmp_path)


def test_a_rank_that_would_fill_the_disk(tmp_path, make_adapter, unet):
    """R-02: one module of an absurd rank is not padded into all others."""
    adapter = make_adapter(unet)
    adapter.modules[next(iter(adapter.modules))] = LowRank(torch.ones(10**7, 1), torch.ones(1, 10**7))
    with raises(AdapterError, "export.formats", shows="--format diffusers"):
        save_adapter(tmp_path / "x.safetensors", adapter, dialect="kohya")


def test_layers_that_differ_are_no_obstacle(tmp_path):
    """R-07: a diffusers file of a UNet whose blocks differ loads; only the kohya names cannot say it."""
    notes = {"sdlora.layers_per_block": "[1, 2]", "sdlora.family": "sdxl"}
    adapter = load_adapter(write_lora(tmp_path / "x.safetensors", notes))
    with raises(AdapterError, "lora.layers-per-block", shows="[1, 2]"):
        save_adapter(tmp_path / "y.safetensors", adapter, dialect="kohya")
    assert load_adapter(save_adapter(tmp_path / "y.safetensors", adapter)).family == "sdxl"
