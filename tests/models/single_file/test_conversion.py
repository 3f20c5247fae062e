"""Adapters into and out of bases in one file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sdlora.config import BaseSection
from sdlora.errors import AdapterError
from sdlora.export.extract import extract
from sdlora.export.merge_into_base import merge_into_base
from sdlora.lora.adapter import Adapter
from sdlora.lora.attach import match_targets
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base
from sdlora.models.stable_diffusion import StableDiffusion
from tests.lora_fixtures import create_adapter


def load(source: Path) -> StableDiffusion:
    return load_base(inspect_base(BaseSection(source=str(source))), dtype=torch.float32, device="cpu")


def make(base: StableDiffusion, targets: list[str]) -> Adapter:
    names = match_targets(base.components, targets)
    adapter = create_adapter(base.components, names, 2, 2, seed=0, family=base.info.family)
    for number, pair in enumerate(adapter.modules.values()):
        pair.up.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    return adapter.to()


@pytest.mark.parametrize(
    "family", ["sd2", *(pytest.param(other, marks=pytest.mark.slow) for other in ("sd1", "sdxl"))]
)
def test_one_file_in_one_file_out(family: str, tiny_bases: Mapping[str, Any], tmp_path: Path) -> None:
    """R-40: the merged file is the merged folder, weight by weight; and the LoRA comes out of it again."""
    file, folder = tiny_bases[family].file, tiny_bases[family].folder
    before = hashlib.sha256(file.read_bytes()).digest()
    adapter = make(load(folder), ["attention", "convolutions"])
    one = load(merge_into_base([(adapter, 1.0)], file, tmp_path / "merged.safetensors"))
    two = load(merge_into_base([(adapter, 1.0)], folder, tmp_path / "merged"))
    assert hashlib.sha256(file.read_bytes()).digest() == before
    for name, part in one.components.items():
        others = dict(two.components[name].named_parameters())
        for module, weight in part.named_parameters():
            assert torch.equal(weight, others[module]), f"{name}.{module}"
    for original in (file, folder):
        found, report = extract(tmp_path / "merged.safetensors", original, rank=2, targets=["attention"])
        assert report.error < 1e-3
        name = next(name for name in adapter.modules if "attn1.to_q" in name)
        expected = adapter.modules[name].up @ adapter.modules[name].down
        torch.testing.assert_close(
            found.modules[name].up @ found.modules[name].down, expected, rtol=1e-3, atol=1e-5
        )


def test_layers_that_the_file_has_fused(tiny_bases: Mapping[str, Any], tmp_path: Path) -> None:
    """SD 1's text encoder is plain in its file; OpenCLIP's query, key and value are one matrix."""
    adapter = make(load(tiny_bases["sd1"].folder), ["text_attention"])
    place = merge_into_base([(adapter, 1.0)], tiny_bases["sd1"].file, tmp_path / "merged.safetensors")
    name = next(iter(adapter.modules)).removeprefix("text_encoder.").removeprefix("text_model.")
    weights = [dict(load(s).text_encoders[0].named_parameters()) for s in (place, tiny_bases["sd1"].file)]
    key = next(key for key in weights[0] if key.endswith(f"{name}.weight"))
    assert float((weights[0][key] - weights[1][key]).abs().max()) > 1e-3
    adapter = make(load(tiny_bases["sd2"].folder), ["text_attention"])
    with pytest.raises(
        AdapterError, match=r"are fused with others in .*; use the base as a diffusers folder"
    ):
        merge_into_base([(adapter, 1.0)], tiny_bases["sd2"].file, tmp_path / "other.safetensors")
