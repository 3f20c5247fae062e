"""A LoRA out of a fine-tuned base, and a base with a LoRA inside."""

from __future__ import annotations

import hashlib
import json
import shutil
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdlora.config import BaseSection
from sdlora.errors import AdapterError, ModelError
from sdlora.export.extract import extract
from sdlora.export.merge_into_base import merge_into_base
from sdlora.export.rewrite import weight_norms
from sdlora.lora.attach import match_targets, mounted
from sdlora.models.folder import BUILTIN
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base
from tests.checks import raises
from tests.lora_fixtures import create_adapter
from tests.stock import load_stock_pipeline


def digests(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@cache
def load(source):
    """A base in fp32; tests leave it as it is."""
    info = inspect_base(BaseSection(source=str(source)))
    return load_base(info, dtype=torch.float32, device="cpu")


def make_adapter(source, targets, text=False, rank=3):
    """One with an effect on each of its modules."""
    base = load(source)
    model = base.components if text else base.denoiser
    adapter = create_adapter(
        model, match_targets(model, targets), rank, rank / 2, seed=0, family=base.info.family
    )
    for number, pair in enumerate(adapter.modules.values()):
        pair.up.data.normal_(std=0.1, generator=torch.Generator().manual_seed(number))
    return adapter.to(), base


ALL = ["attention", "feed_forward", "projections", "convolutions"]


@pytest.mark.parametrize("source", ["builtin", "sdxl"])
def test_a_merged_base_is_the_base_with_the_adapter(source, sdxl_folder, tmp_path):
    """R-38: a stock pipeline on the merged folder is base plus LoRA; the base's files are as they were."""
    folder = BUILTIN if source == "builtin" else sdxl_folder
    before = digests(folder)
    adapter, base = make_adapter(folder, [*ALL, "text_attention", "text_mlp"], text=True)
    place = merge_into_base([(adapter, 0.7)], folder, tmp_path / "merged", dtype=torch.float32)
    assert digests(folder) == before
    merged = load_stock_pipeline(inspect_base(BaseSection(source=str(place))))
    with mounted(base.components, [(adapter, 0.7)]):
        for name, part in base.components.items():
            weights = dict(getattr(merged, name).named_parameters())
            for module, weight in part.named_parameters():
                if ".base." not in module:
                    assert torch.equal(weight, weights[module]), module
        states = base.encode_captions(["a cat"])
        generator = torch.Generator().manual_seed(0)
        noisy = torch.randn(1, base.info.latent_channels, 8, 8, generator=generator)
        if states.pooled is not None:
            states = states.with_time_ids(torch.tensor([[64.0, 64, 0, 0, 64, 64]]))
        expected = base.denoise(noisy, torch.tensor([500]), states)
    own = load_base(inspect_base(BaseSection(source=str(place))), dtype=torch.float32, device="cpu")
    again = own.encode_captions(["a cat"])
    torch.testing.assert_close(again.hidden, states.hidden, rtol=1e-4, atol=1e-5)
    if states.time_ids is not None:
        again = again.with_time_ids(states.time_ids)
    torch.testing.assert_close(own.denoise(noisy, torch.tensor([500]), again), expected, rtol=1e-4, atol=1e-5)
    plain = base.denoise(noisy, torch.tensor([500]), states)
    assert float((plain - expected).abs().max()) > 1e-3


def test_a_merged_base_in_another_precision(tmp_path):
    """All weights, and what the configuration says of them; other files go along, pickles do not."""
    folder = tmp_path / "base"
    shutil.copytree(BUILTIN, folder)
    (folder / "unet" / "old.bin").write_bytes(b"x")
    (folder / "LICENSE").write_text("free")
    adapter, base = make_adapter(folder, ["attention"])
    place = merge_into_base([(adapter, 1.0)], folder, tmp_path / "merged", dtype=torch.float16)
    names = {str(file.relative_to(place)) for file in place.rglob("*") if file.is_file()}
    assert "LICENSE" in names
    assert "unet/old.bin" not in names
    for part in ("unet", "vae", "text_encoder"):
        file = next((place / part).glob("*.safetensors"))
        assert {t.dtype for t in load_file(file).values() if t.is_floating_point()} == {torch.float16}
    name = next(iter(adapter.modules))
    weight = dict(base.denoiser.named_parameters())[f"{name}.weight"].double()
    pair = adapter.modules[name]
    expected = weight + adapter.scale_of(name) * (pair.up.double() @ pair.down.double())
    found = load_file(place / "unet" / "diffusion_pytorch_model.safetensors")[f"{name}.weight"]
    # Rounded once, from float64: within half a unit in the last place.
    torch.testing.assert_close(found.double(), expected, rtol=2**-11 * 1.001, atol=2**-25)


def test_a_sharded_base_with_a_variant(tmp_path):
    """Whatever its files were called, the merged one has plain names."""
    folder = tmp_path / "base"
    shutil.copytree(BUILTIN, folder)
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(whole).items()}
    whole.unlink()
    halves = sorted(tensors)[::2], sorted(tensors)[1::2]
    index = {}
    for number, names in enumerate(halves, 1):
        shard = f"diffusion_pytorch_model.fp16-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / "unet" / shard, {"format": "pt"})
        index |= dict.fromkeys(names, shard)
    table = folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json"
    table.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    adapter, _ = make_adapter(BUILTIN, ["attention"])
    place = merge_into_base([(adapter, 1.0)], folder, tmp_path / "merged")
    assert sorted(file.name for file in (place / "unet").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    merged = load_file(place / "unet" / "diffusion_pytorch_model.safetensors")
    assert set(merged) == set(tensors)
    assert {tensor.dtype for tensor in merged.values()} == {torch.float16}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The built-in base with low-rank changes in its linear layers and a changed bias."""
    adapter, _ = make_adapter(BUILTIN, ["attention", "feed_forward", "projections"], rank=3)
    place = tmp_path_factory.mktemp("bases") / "tuned"
    merge_into_base([(adapter, 1.0)], "builtin", place, dtype=torch.float32)
    file = place / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"] += 0.05
    save_file(tensors, file, {"format": "pt"})
    return place, adapter


def test_a_change_of_low_rank_is_extracted_whole(tuned):
    """The LoRA that was merged comes back; what lies outside of the targets is said."""
    place, adapter = tuned
    found, report = extract(place, "builtin", rank=3)
    assert set(found.modules) == set(adapter.modules)
    assert report.num_modules == len(adapter.modules)
    assert report.error < 1e-3
    assert 0 < report.outside < 0.01
    for name, pair in adapter.modules.items():
        expected = adapter.scale_of(name) * (pair.up.flatten(1) @ pair.down.flatten(1))
        own = found.modules[name]
        assert float((own.up.flatten(1) @ own.down.flatten(1) - expected).abs().max()) < 1e-5, name
    assert found.notes["sdlora.base_name"] == "builtin"
    assert found.family == "sd1"


def test_extraction_to_a_rank_says_what_it_lost(tuned):
    """The error is that of the truncation."""
    place, adapter = tuned
    found, report = extract(place, "builtin", rank=1, targets=["*attn1.to_q"])
    lost = whole = 0.0
    for name in found.modules:
        pair = adapter.modules[name]
        change = adapter.scale_of(name) * (pair.up.double() @ pair.down.double())
        values = torch.linalg.svdvals(change)
        lost, whole = lost + float(values[1:].square().sum()), whole + float(values.square().sum())
    assert report.error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert report.outside > 0.5


def test_a_copy_in_fp16_holds_no_change(tmp_path):
    """Rounding is no fine-tuning."""
    exact = tmp_path / "exact"
    merge_into_base([(make_adapter(BUILTIN, ALL)[0], 1.0)], "builtin", exact, dtype=torch.float32)
    adapter, _ = make_adapter(BUILTIN, ["*attn1.to_q"])
    adapter.modules = {name: pair for name, pair in adapter.modules.items() if name.startswith("mid_block")}
    place = merge_into_base([(adapter, 1.0)], exact, tmp_path / "half", dtype=torch.float16)
    found, report = extract(place, exact, targets=["attention"])
    assert set(found.modules) == set(adapter.modules)
    assert report.num_unchanged > 20
    assert report.outside == 0


def test_text_encoders_are_extracted_when_asked(tmp_path):
    """R-34: off by default."""
    adapter, _ = make_adapter(BUILTIN, ["*attn1.to_q", "text_attention"], text=True)
    place = merge_into_base([(adapter, 1.0)], "builtin", tmp_path / "tuned")
    found, _ = extract(place, "builtin", rank=3, targets=["*attn1.to_q"], text_encoder=True)
    assert set(found.modules) == set(adapter.modules)
    found, _ = extract(place, "builtin", rank=3, targets=["*attn1.to_q"])
    assert not found.changes_text


def test_mistakes(tmp_path, sdxl_folder, tuned):
    """One line, nothing written, nothing changed."""
    adapter, _ = make_adapter(BUILTIN, ["attention"])
    taken = tmp_path / "taken"
    taken.mkdir()
    with raises(ModelError, "option--out", shows="already exists"):
        merge_into_base([(adapter, 1.0)], "builtin", taken)
    with raises(ModelError, "option--out", shows="builtin"):
        merge_into_base([(adapter, 1.0)], "builtin", tmp_path / "merged.safetensors")
    with raises(ModelError, "option--out", shows="inside the base"):
        merge_into_base([(adapter, 1.0)], tuned[0], tuned[0] / "merged")
    with raises(AdapterError, "lora.other-base"):
        merge_into_base([(adapter, 1.0)], sdxl_folder, tmp_path / "merged")
    with raises(ModelError, "base.family"):
        extract(tuned[0], sdxl_folder)
    with raises(AdapterError, "extract.no-change", shows="all-linear"):
        extract("builtin", "builtin")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(("strength", "dtype"), [(float("nan"), torch.float32), (1e8, torch.float16)])
def test_a_base_that_is_not_finite_is_never_written(strength, dtype, tmp_path):
    """R-06: neither a strength of nan nor an overflow; nothing is left of the attempt."""
    adapter, _ = make_adapter(BUILTIN, ["attention"])
    with raises(ModelError, "base.non-finite", shows="--strength"):
        merge_into_base([(adapter, strength)], "builtin", tmp_path / "merged", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_norms_of_the_base():
    """For `resize --score`: read one weight at a time."""
    _, base = make_adapter(BUILTIN, ["*attn1.to_q"])
    names = match_targets(base.denoiser, ["attention", "convolutions"])
    norms = weight_norms("builtin", names)
    weights = dict(base.denoiser.named_parameters())
    assert norms == pytest.approx({name: float(weights[f"{name}.weight"].norm()) for name in names}, rel=1e-5)
