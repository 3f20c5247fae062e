"""A real UNet at tiny size, and adapters on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open

from sdlora.formats.files import save_adapter
from sdlora.lora.adapter import Adapter, draw_adapter, for_family
from sdlora.lora.attach import match_targets
from sdlora.lora.kinds import LowRank
from sdlora.lora.layers import Model, named_modules
from sdlora.tree.lineage import Ancestor, digest_adapter, read_lineage

# Every test process loads this file, and many need no network: diffusers is imported where one is made.
if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

TINY: Mapping[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}

SD1: Mapping[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (16, 16, 32, 32),
    "layers_per_block": 2,
    "cross_attention_dim": 16,
}
# Published layouts, block by block, at small widths.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "sd1": SD1,
    "sd2": {**SD1, "use_linear_projection": True},
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 16, 32),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 2),
        "cross_attention_dim": 32,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 16,
    },
}


def create_adapter(
    model: Model, names: Sequence[str], rank: int, alpha: float, *, seed: int, family: str = ""
) -> Adapter:
    """A fresh trainable adapter of one rank and alpha."""
    scales = dict.fromkeys(names, alpha / rank)
    adapter = draw_adapter(model, dict.fromkeys(names, rank), scales, seed=seed)
    return for_family(replace(adapter, alpha=float(alpha), scales={}), family, model)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture(scope="session")
def make_unet() -> Callable[..., UNet2DConditionModel]:
    """A tiny UNet, always with the same weights, frozen."""
    from diffusers import UNet2DConditionModel

    def make(**changes: Any) -> UNet2DConditionModel:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = UNet2DConditionModel(**{**TINY, **changes})
        return unet.eval().requires_grad_(False)

    return make


@pytest.fixture
def unet(make_unet: Callable[..., UNet2DConditionModel]) -> UNet2DConditionModel:
    return make_unet()


@pytest.fixture(scope="session")
def make_texts() -> Callable[[], list[torch.nn.Module]]:
    """Two frozen text encoders, of the classes without and with the level `text_model`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def make() -> list[torch.nn.Module]:
        config = CLIPTextConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=16,
            max_position_embeddings=8,
            bos_token_id=1,
            eos_token_id=2,
        )
        with torch.random.fork_rng():
            torch.manual_seed(1)
            texts = CLIPTextModel(config), CLIPTextModelWithProjection(config)
        return [text.eval().requires_grad_(False) for text in texts]

    return make


@pytest.fixture
def components(
    unet: UNet2DConditionModel, make_texts: Callable[[], list[torch.nn.Module]]
) -> dict[str, torch.nn.Module]:
    """A UNet and two text encoders."""
    return dict(zip(("unet", "text_encoder", "text_encoder_2"), (unet, *make_texts()), strict=True))


@pytest.fixture(scope="session")
def make_family(
    make_unet: Callable[..., UNet2DConditionModel], make_texts: Callable[[], list[torch.nn.Module]]
) -> Callable[..., dict[str, torch.nn.Module]]:
    """The components of a family, small."""

    def make(family: str, **changes: Any) -> dict[str, torch.nn.Module]:
        first, second = make_texts()
        parts = {"unet": make_unet(**{**FAMILIES[family], **changes}), "text_encoder": first}
        return {**parts, "text_encoder_2": second} if family == "sdxl" else parts

    return make


@pytest.fixture(scope="session")
def sd15(full_size: dict[str, dict[str, Any]]) -> UNet2DConditionModel:
    """The architecture of Stable Diffusion 1.5, without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**full_size["sd1"])


@pytest.fixture(scope="session")
def sdxl(full_size: dict[str, dict[str, Any]]) -> UNet2DConditionModel:
    """The architecture of SDXL, without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**full_size["sdxl"])


@pytest.fixture
def run() -> Callable[..., torch.Tensor]:
    """The output of a UNet for a fixed input."""

    def run(unet: UNet2DConditionModel) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(2, 4, 8, 8, generator=generator).to(unet.dtype)
        hidden = torch.randn(2, 5, 24, generator=generator).to(unet.dtype)
        return unet(latents, torch.tensor([300, 700]), encoder_hidden_states=hidden).sample

    return run


@pytest.fixture
def make_adapter() -> Callable[..., Adapter]:
    """An adapter that looks trained: `up` is not zero."""

    def make(
        model: Model,
        *,
        rank: int = 4,
        alpha: float = 2.0,
        targets: Sequence[str] = ("attention",),
        seed: int = 0,
        size: float = 0.05,
        family: str = "sd1",
    ) -> Adapter:
        adapter = create_adapter(model, match_targets(model, targets), rank, alpha, seed=seed, family=family)
        generator = torch.Generator().manual_seed(seed + 100)
        for pair in adapter.modules.values():
            pair.up.data.normal_(std=size, generator=generator)
        return adapter

    return make


@pytest.fixture
def mixed_adapter(unet: UNet2DConditionModel, make_adapter: Callable[..., Adapter]) -> Adapter:
    """Modules of three ranks, as a merge or a resize makes."""
    adapter = make_adapter(unet, rank=6, alpha=6).to()
    for number, pair in enumerate(adapter.modules.values()):
        rank = (6, 3, 2)[number % 3]
        pair.down, pair.up = pair.down[:rank].clone(), pair.up[:, :rank].clone()
    return adapter


@pytest.fixture
def make_pipeline() -> Callable[..., Any]:
    """The stock pipeline around a UNet and perhaps text encoders, as its loader of LoRA files needs it."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    def make(unet: UNet2DConditionModel, **texts: torch.nn.Module) -> Any:
        scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
        if "text_encoder_2" in texts:
            return StableDiffusionXLPipeline(
                vae=None, tokenizer=None, tokenizer_2=None, unet=unet, scheduler=scheduler, **texts
            )
        return StableDiffusionPipeline(
            vae=None,
            text_encoder=texts.get("text_encoder"),
            tokenizer=None,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    return make


@pytest.fixture
def lora_file(tmp_path: Path, unet: UNet2DConditionModel, make_adapter: Callable[..., Adapter]) -> Path:
    """A good LoRA file."""
    return save_adapter(tmp_path / "style.safetensors", make_adapter(unet, alpha=4))


@pytest.fixture(scope="session")
def deltas() -> Callable[[Adapter], dict[str, torch.Tensor]]:
    """The change of each module's weight, (out, in), in fp64."""

    def change(adapter: Adapter) -> dict[str, torch.Tensor]:
        return {
            name: adapter.scale_of(name)
            * (pair.up.detach().double().flatten(1) @ pair.down.detach().double().flatten(1))
            for name, pair in adapter.modules.items()
        }

    return change


@pytest.fixture(scope="session")
def peft_deltas() -> Callable[[Model, str], dict[str, torch.Tensor]]:
    """The change that PEFT's layers of an adapter make, (out, in), in fp64."""

    def change(model: Model, name: str) -> dict[str, torch.Tensor]:
        return {
            module_name: module.scaling[name]
            * (
                module.lora_B[name].weight.detach().double().flatten(1)
                @ module.lora_A[name].weight.detach().double().flatten(1)
            )
            for module_name, module in named_modules(model)
            if name in getattr(module, "lora_A", {})
        }

    return change


@pytest.fixture
def uneven(unet: UNet2DConditionModel, make_adapter: Callable[..., Adapter]) -> Adapter:
    """Linear layers and convolutions, rank 6 at scale 1/2; in every second module the values fall off."""
    targets = ["attention", "feed_forward", "projections", "convolutions"]
    adapter = make_adapter(unet, rank=6, alpha=3, targets=targets).to()
    falling = torch.tensor([1, 0.5, 0.2, 0.05, 0.01, 1e-3])
    for pair in list(adapter.modules.values())[1::2]:
        pair.up *= falling.view(6, *[1] * (pair.up.ndim - 2))
    return adapter


@pytest.fixture(scope="session")
def make_pair() -> Callable[..., LowRank]:
    """A pair with the singular values given."""

    def make(values: Sequence[float], *, size: tuple[int, int] = (8, 12), seed: int = 0) -> LowRank:
        generator = torch.Generator().manual_seed(seed)
        shape_left, shape_right = (size[0], len(values)), (size[1], len(values))
        left, _ = torch.linalg.qr(torch.randn(shape_left, generator=generator, dtype=torch.float64))
        right, _ = torch.linalg.qr(torch.randn(shape_right, generator=generator, dtype=torch.float64))
        return LowRank(right.T.float(), (left * torch.tensor(values, dtype=torch.float64)).float())

    return make


def child_lineage(name: str, parent: Adapter, strength: float = 1.0) -> tuple[Ancestor, ...]:
    """The ancestors of a child of an adapter, the root first; the parent is in the dtype of its file."""
    return (*read_lineage(parent.notes), Ancestor(name, digest_adapter(parent), strength))
