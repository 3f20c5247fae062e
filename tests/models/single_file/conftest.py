"""Tiny random bases of the three families, as diffusers folders and, tensor by tensor, as single files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdlora.models.single_file import CONFIGS
from tests.models.single_file.original import single_file

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class TinyBase:
    """One set of weights in both forms, with what each family's files say of themselves."""

    pipeline: Any
    folder: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    file: Path


def _text_config(width: int, act: str, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=1,
        hidden_act=act,
        projection_dim=projection,
        initializer_factor=3.0,
    )


def _pipeline(family: str) -> Any:
    unet: dict[str, Any] = {
        "sample_size": {"sd1": 64, "sd2": 96, "sdxl": 128}[family],
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
    }
    if family == "sdxl":
        unet |= {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "cross_attention_dim": 32 + 64,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 48,
        }
    else:
        unet |= {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
    if family == "sd1":
        unet |= {"attention_head_dim": 8}
    else:
        unet |= {"attention_head_dim": (1, 1), "use_linear_projection": True}
    scale = 0.13025 if family == "sdxl" else 0.18215
    vae = AutoencoderKL(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        sample_size={"sd1": 512, "sd2": 768, "sdxl": 1024}[family],
        scaling_factor=scale,
    )
    text = CLIPTextModel(_text_config(32, "gelu" if family == "sd2" else "quick_gelu", 32))
    words = CLIPTokenizer.from_pretrained(
        CONFIGS / "clip", model_max_length=77, **({"pad_token": "!"} if family == "sd2" else {})
    )
    parts = {"vae": vae, "text_encoder": text, "tokenizer": words, "unet": UNet2DConditionModel(**unet)}
    if family == "sdxl":
        second = CLIPTokenizer.from_pretrained(CONFIGS / "clip", model_max_length=77, pad_token="!")
        return StableDiffusionXLPipeline(
            **parts,
            text_encoder_2=CLIPTextModelWithProjection(_text_config(64, "gelu", 48)),
            tokenizer_2=second,
            scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
            add_watermarker=False,
        )
    v = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    scheduler = (
        DDIMScheduler(**BETAS, **v, prediction_type="v_prediction")
        if family == "sd2"
        else PNDMScheduler(**BETAS, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1)
    )
    return StableDiffusionPipeline(
        **parts,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyBase]:
    """`sd1`, `sd2` (predicting v) and `sdxl`: the real classes, a few MB each; never to be changed."""
    root = tmp_path_factory.mktemp("tiny-bases")
    bases = {}
    for family in ("sd1", "sd2", "sdxl"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipeline = _pipeline(family)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(root / family)
        metadata = {"modelspec.prediction_type": "v"} if family == "sd2" else {}
        tensors, file = single_file(pipeline), root / f"tiny-{family}.safetensors"
        save_file(tensors, file, metadata)
        bases[family] = TinyBase(pipeline, root / family, tensors, metadata, file)
    return bases


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes tensors as a file: `save(tensors, "name.safetensors", key="metadata")`."""

    def write(tensors: Mapping[str, Tensor], name: str = "given.safetensors", **metadata: str) -> Path:
        file = tmp_path / name
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata or None)
        return file

    return write
