"""Loading: dtypes, freezing, silence, and no network."""

from __future__ import annotations

import copy
import json
import logging
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from sdlora.config import BaseSection
from sdlora.data.images import load_image
from sdlora.data.tensors import image_to_tensor
from sdlora.dtypes import DTYPES
from sdlora.errors import ModelError
from sdlora.models import load
from sdlora.models.base import quiet
from sdlora.models.folder import BUILTIN
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.load import InPlaceBlock, compute_in_place, load_base, load_component, load_fresh_pipeline
from sdlora.models.stable_diffusion import StableDiffusion
from sdlora.models.weights import empty_components, empty_denoiser
from tests.checks import raises
from tests.stock import load_stock_pipeline

OPENMOJI = Path(__file__).parents[2] / "datasets" / "openmoji"
CopyBase = Callable[..., Path]


@pytest.mark.parametrize("name", DTYPES)
def test_unet_is_stored_as_asked_and_everything_is_frozen(info: BaseInfo, name: str) -> None:
    """R-11, R-22: the VAE is bf16 beside a bf16 UNet, else fp32 as text encoders are; eval, no gradients."""
    base = load_base(info, dtype=DTYPES[name], device="cpu")
    assert {p.dtype for p in base.denoiser.parameters()} == {DTYPES[name]}
    vae = "bfloat16" if name == "bf16" else "float32"
    assert {p.dtype for p in base.text_encoders[0].parameters()} == {torch.float32}
    assert base.dtypes == {
        "unet": str(DTYPES[name]).removeprefix("torch."),
        "vae": vae,
        "text_encoder": "float32",
    }
    for part in (base.denoiser, base.vae, *base.text_encoders):
        assert not any(parameter.requires_grad for parameter in part.parameters())
        assert not any(module.training for module in part.modules())


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_quantized_layers_are_named(quantize: Any) -> None:
    """R-11, R-48: `base.quantize` applies to the UNet; the dtype of the rest stays."""
    base = load_base(inspect_base(BaseSection(quantize=quantize)), dtype=torch.bfloat16, device="cpu")
    assert base.dtypes["unet"] == f"bfloat16 with {quantize} layers"
    assert base.dtypes["vae"] == "bfloat16"
    assert next(base.denoiser.parameters()).dtype == base.dtype == torch.bfloat16
    answer = base.denoise(
        torch.randn(1, base.info.latent_channels, 16, 16), torch.tensor([500]), base.encode_captions(["a"])
    )
    assert torch.isfinite(answer).all()
    assert not any(module.training for module in base.denoiser.modules())


def test_a_vae_in_bf16_is_as_good(info: BaseInfo) -> None:
    """R-22: bf16, also for a VAE that asks for upcasting, as the built-in one does.

    Measured on twelve drawings of OpenMoji: means differ from those of fp32 by 0.6 % at most, half of the
    posterior's own deviation (1.2 % of the mean), deviations by 0.9 %, and decoded images by 0.35 levels of
    255 on average, 4 at most (55 dB).
    """
    assert info.vae_config["force_upcast"]
    full, small = (load_base(info, dtype=DTYPES[name], device="cpu") for name in ("fp32", "bf16"))
    for layer in (small.vae.encoder.conv_in, small.denoiser.conv_in):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    files = [OPENMOJI / f"{name}.png" for name in ("accordion", "airplane", "alien")]
    pixels = torch.stack([image_to_tensor(load_image(file).resize((128, 128))) for file in files])
    mean, std = full.encode_images(pixels)
    small_mean, small_std = small.encode_images(pixels)
    assert (small_mean - mean).norm() < 0.01 * mean.norm()
    assert (small_std - std).norm() < 0.02 * std.norm()
    difference = (small.decode_latents(mean) - full.decode_latents(mean)).abs() * 127.5
    assert difference.mean() < 1.0
    assert difference.max() < 8.0


def test_loading_prints_nothing() -> None:
    """R-27: importing and loading the built-in base is silent, quantized and as a stock pipeline too."""
    code = (
        "import torch; from sdlora.config import BaseSection; from sdlora.models.load import *;"
        "from sdlora.models.weights import empty_denoiser; from sdlora.models.info import inspect_base;"
        "info = inspect_base(BaseSection()); load_base(info, dtype=torch.float32, device='cpu');"
        "few = inspect_base(BaseSection(quantize='nf4')); load_base(few, dtype=torch.float32, device='cpu');"
        "empty_denoiser(info); load_fresh_pipeline(info, ['text_encoder'], torch.float32)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == ""
    assert done.stderr == ""


def test_silence_ends() -> None:
    """Other code in the process keeps its own log levels and progress bars; errors pass at all times."""
    loggers = [logging.getLogger("diffusers"), logging.getLogger("transformers")]
    levels = [logger.level for logger in loggers]
    bars = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    seen = []

    def fail_quietly() -> None:
        with quiet():
            seen.extend(logger.level for logger in loggers)
            seen.append(transformers_logging.is_progress_bar_enabled())
            raise KeyError

    with pytest.raises(KeyError):
        fail_quietly()
    assert seen == [logging.ERROR, logging.ERROR, False]
    assert [logger.level for logger in loggers] == levels
    after = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    assert after == bars


def test_local_bases_open_no_socket(
    copy_base: CopyBase, sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R-39: neither inspecting nor loading, as our base or as a stock pipeline."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for source in ("builtin", str(copy_base()), str(sdxl_folder)):
        info = inspect_base(BaseSection(source=source))
        base = load_base(info, dtype=torch.float32, device="cpu")
        base.encode_captions(["a cat"])
        load_stock_pipeline(info)


def test_sdxl_parts(sdxl: StableDiffusion, sdxl_stock: Any, sdxl_info: BaseInfo) -> None:
    """R-40: two text encoders and tokenizers; the stock pipeline is SDXL's, with and without its encoders."""
    kinds = [type(part).__name__ for part in (*sdxl.text_encoders, *sdxl.tokenizers, sdxl_stock)]
    assert kinds == [
        *("CLIPTextModel", "CLIPTextModelWithProjection"),
        *("CLIPTokenizer", "CLIPTokenizer"),
        "StableDiffusionXLPipeline",
    ]
    for part in (sdxl.denoiser, sdxl.vae, *sdxl.text_encoders):
        assert not any(parameter.requires_grad for parameter in part.parameters())
    alone = load_fresh_pipeline(sdxl_info, [], torch.float32)
    assert (alone.vae, alone.text_encoder, alone.text_encoder_2, alone.tokenizer_2) == (None,) * 4
    assert sum(p.numel() for p in empty_denoiser(sdxl_info).parameters()) == sdxl_info.num_parameters


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_missing_tensors_are_an_error(copy_base: CopyBase, part: str) -> None:
    """R-25: weights that the configuration asks for and the file lacks are never left at random."""
    folder = copy_base()
    file = next((folder / part).glob("*.safetensors"))
    state = load_file(file)
    gone = sorted(state)[-1]
    del state[gone]
    file.unlink()
    save_file(state, file, {"format": "pt"})
    info = inspect_base(BaseSection(source=str(folder)))
    with raises(ModelError, "base.incomplete", shows=("lacks 1 weights", gone)):
        load_base(info, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("edits", "part"),
    [
        ({"unet__config": {"block_out_channels": [64]}}, "unet"),
        ({"text_encoder__config": {"num_attention_heads": 7}}, "text_encoder"),
    ],
)
def test_a_configuration_of_no_network_is_one_line(copy_base: CopyBase, edits: Any, part: str) -> None:
    """R-25: whatever a library says of it, before any weight is loaded."""
    info = inspect_base(BaseSection(source=str(copy_base("odd", **edits))))
    with raises(ModelError, "base.config", shows=part) as error:
        empty_components(info, text=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "changes"),
    [("text_encoder", {"intermediate_size": 99}), ("text_encoder", {"num_attention_heads": 7})],
)
def test_a_configuration_of_other_weights_is_one_line(
    copy_base: CopyBase, part: str, changes: dict[str, Any]
) -> None:
    """R-25: parts whose two halves are of different bases."""
    info = inspect_base(BaseSection(source=str(copy_base("odd", **{f"{part}__config": changes}))))
    with raises(ModelError, "base.mismatch", shows=str(info.components[part].folder)):
        load_component(info.components[part], torch.float32)


def test_pickles_and_foreign_code_are_out_of_reach() -> None:
    """R-44: safetensors only; the flag that runs a model's own code is nowhere passed."""
    files = [file for file in Path(load.__file__).parent.glob("*.py") if file.name != "captioner.py"]
    sources = [file.read_text(encoding="utf-8") for file in files]
    assert len(sources) > 5
    assert not any("trust_remote_code=" in text or "torch.load" in text for text in sources)
    # A UNet, a safety checker and its extractor from files, a tokenizer, a text encoder from its tensors.
    assert sum(text.count("from_pretrained(") for text in sources) == 5


def test_empty_unet_has_every_module_and_no_weights(info: BaseInfo, base: StableDiffusion) -> None:
    """R-16: a dry run counts parameters before weights are loaded."""
    unet = empty_denoiser(info)
    assert {p.device.type for p in unet.parameters()} == {"meta"}
    assert [name for name, _ in unet.named_modules()] == [name for name, _ in base.denoiser.named_modules()]
    assert sum(p.numel() for p in unet.parameters()) == info.num_parameters


def test_attention_kernel_is_named(info: BaseInfo) -> None:
    """R-46: SDPA by default; another processor is called by its name."""
    base = load_base(info, dtype=torch.float32, device="cpu")
    assert base.attention_kernel == "SDPA"
    base.denoiser.set_attn_processor(AttnProcessor())
    assert base.attention_kernel == "AttnProcessor"


def test_separate_vae_is_the_one_in_use(copy_base: CopyBase) -> None:
    """R-40: base.vae replaces the base's own, in the stock pipeline too."""
    other = copy_base("other", vae__config={"scaling_factor": 0.5})
    info = inspect_base(BaseSection(vae=str(other / "vae")))
    assert load_base(info, dtype=torch.float32, device="cpu").vae.config.scaling_factor == 0.5
    assert load_stock_pipeline(info).vae.config.scaling_factor == 0.5


def test_shipped_base_is_an_ordinary_folder() -> None:
    """R-40: plain names, safetensors and text only, no picture of where it was made."""
    kinds = {file.suffix for file in BUILTIN.rglob("*") if file.is_file()}
    assert kinds <= {".json", ".safetensors", ".txt"}


def devices_of(base: StableDiffusion) -> list[str]:
    return [part.device.type for part in (base.denoiser, base.vae, *base.text_encoders)]


def test_parts_are_loaded_where_they_are_needed(info: BaseInfo, base: StableDiffusion) -> None:
    """R-18, R-20: a base that waits takes no memory; each part is loaded when used, and can be freed."""
    waiting = load_base(info, dtype=torch.float32, device="cpu", lazy=True)
    assert waiting.dtypes == base.dtypes
    assert devices_of(waiting) == ["meta"] * 3
    assert torch.equal(waiting.encode_captions(["a cat"]).hidden, base.encode_captions(["a cat"]).hidden)
    waiting.text_encoders_to("meta")
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    mean, _ = waiting.encode_images(pixels)
    assert torch.equal(mean, base.encode_images(pixels)[0])
    assert devices_of(waiting) == ["meta", "cpu", "meta"]
    waiting.vae.to("meta")
    waiting.load_denoiser()
    inputs = base.example_inputs()
    assert torch.equal(waiting.denoise(*inputs), base.denoise(*inputs))
    assert torch.equal(waiting.decode_latents(mean), base.decode_latents(mean))
    assert devices_of(waiting) == ["cpu", "meta", "meta"]


@pytest.mark.gpu
def test_parts_are_where_they_were_sent(info: BaseInfo) -> None:
    """R-20: the encoders leave the device, the UNet stays; decoding brings the VAE back only meanwhile."""
    base = load_base(info, dtype=torch.bfloat16, device="cuda")
    base.vae.to("cpu")
    base.text_encoders_to("cpu")
    assert (base.device.type, base.vae.device.type) == ("cuda", "cpu")
    assert base.text_encoders[0].device.type == "cpu"
    latents = torch.randn(2, info.latent_channels, 16, 16, device="cuda", dtype=torch.bfloat16)
    assert base.decode_latents(latents).device.type == "cpu"
    assert base.vae.device.type == "cpu"


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_folders_of_one_precision(copy_base: CopyBase, info: BaseInfo, kind: str) -> None:
    """R-40: only variant files, the UNet's in shards; loaded as plain ones, in the stock pipeline too."""
    folder = copy_base()
    for file in list(folder.rglob("*.safetensors")):
        file.rename(file.with_suffix(f".{kind}.safetensors"))
    whole = folder / "unet" / f"diffusion_pytorch_model.{kind}.safetensors"
    state = load_file(whole)
    whole.unlink()
    names, table = sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"diffusion_pytorch_model.{kind}-0000{number}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / "unet" / shard, {"format": "pt"})
        table |= dict.fromkeys(part, shard)
    index = folder / "unet" / f"diffusion_pytorch_model.safetensors.index.{kind}.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    found = inspect_base(BaseSection(source=str(folder)))
    assert {part.variant for part in found.components.values()} == {kind}
    assert found.num_parameters == info.num_parameters
    ours = load_base(found, dtype=torch.float32, device="cpu")
    for one, part in (("unet", ours.denoiser), ("vae", ours.vae), ("text_encoder", ours.text_encoders[0])):
        plain = load_component(info.components[one], torch.float32).state_dict()
        stock = getattr(load_stock_pipeline(found), one).state_dict()
        for name, tensor in part.state_dict().items():
            assert torch.equal(tensor, plain[name])
            assert torch.equal(tensor, stock[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vae_in_place_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    """R-46: encoding and decoding; the input stays as it is."""
    sizes = {"block_out_channels": (32, 64), "layers_per_block": 1}
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    stock = AutoencoderKL(**sizes, **kinds).to(dtype).requires_grad_(False).eval()
    ours = copy.deepcopy(stock)
    compute_in_place(ours)
    assert {type(one) for one in ours.modules() if isinstance(one, ResnetBlock2D)} == {InPlaceBlock}
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    with torch.no_grad():
        latents = stock.encode(x).latent_dist.mean
        assert torch.equal(ours.encode(x).latent_dist.mean, latents)
        assert torch.equal(ours.decode(latents).sample, stock.decode(latents).sample)
    assert torch.equal(x, before)


def test_a_block_with_a_time_embedding_stays_as_it_is(make_unet: Callable[..., Any]) -> None:
    """R-46: the blocks of a UNet are computed by diffusers."""
    unet = make_unet()
    compute_in_place(unet)
    assert not any(isinstance(layer, InPlaceBlock) for layer in unet.modules())
