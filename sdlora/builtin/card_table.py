"""Prints what presets need on some cards, as `sdlora train --dry-run --device CARD` plans it: `make cards`.

SD 1.5 and SDXL by the shapes of their networks; no weights are needed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from sdlora.config import load_config
from sdlora.data.records import Size
from sdlora.dtypes import Precision
from sdlora.lora.attach import match_modules
from sdlora.memory.cards import find_card
from sdlora.memory.estimate import DeviceInfo, Memory, MemoryInputs, as_size, device_of_card, plan_memory
from sdlora.memory.work import Work, as_time, flop_of, speed_of_card
from sdlora.models.components import Component
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.weights import empty_components, empty_model

STEPS = 1000
# With the preset for SDXL that suits the card.
CARDS = {
    "RTX 4060 8GB": "sdxl-qlora-8gb",
    "RTX 3060 12GB": "sdxl-qlora-12gb",
    "RTX 4070 12GB": "sdxl-qlora-12gb",
    "RTX 3090 24GB": "sdxl-24gb",
    "RTX 4090 24GB": "sdxl-24gb",
    "A100 40GB": "sdxl-24gb",
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"in_channels": 4, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "in_channels": 4,
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
# Parameters of the text encoders.
TEXTS = {"sd1": {"text_encoder": 123_060_480}}
TEXTS["sdxl"] = {**TEXTS["sd1"], "text_encoder_2": 694_659_840}


@cache
def describe_base(family: str, quantize: str = "none") -> BaseInfo:
    """SD 1.5 or SDXL by its shapes, without files."""
    configs = {"unet": UNETS[family], "vae": {**VAE, "force_upcast": family == "sdxl"}}
    parts = {
        name: Component(name, config, (), "", sum(p.numel() for p in empty_model(name, config).parameters()))
        for name, config in configs.items()
    }
    positions = {"max_position_embeddings": 77, "projection_dim": 1280}
    parts |= {name: Component(name, positions, (), "", count) for name, count in TEXTS[family].items()}
    known = inspect_base(load_config(None, {"base.quantize": quantize}).base)
    return replace(known, source=family, family=family, components=parts, tokenizers=(), scheduler_config={})


def plan_preset(preset: str, device_info: DeviceInfo) -> tuple[MemoryInputs, Memory]:
    """The inputs and the estimate of a preset, with samples."""
    config = load_config(None, {"train.sample_every": 100}, preset=preset)
    info = describe_base("sdxl" if preset.startswith("sdxl") else "sd1", config.base.quantize)
    parts = empty_components(info, text=False)
    ranks = dict.fromkeys(match_modules(parts, config.lora.targets), config.lora.rank)
    inputs = MemoryInputs(config, info, parts, ranks, 0, Size(info.resolution, info.resolution))
    return inputs, plan_memory(inputs, device_info)


def describe_preset(preset: str, card_name: str) -> str:
    """Memory, and the time of training without grids, of a preset on a card."""
    card = find_card(card_name)
    device_info, speed = device_of_card(card, Precision("bf16", "bf16")), speed_of_card(card)
    inputs, memory = plan_preset(preset, device_info)
    assert speed
    config = inputs.config.replace(train={"gradient_checkpointing": memory.checkpointing})
    batch = config.train.micro_batch
    flop = flop_of(replace(inputs, config=config), device_info.precision).learn * STEPS * batch
    seconds = speed.seconds({"training": Work(flop, 3 * STEPS)})["training"]
    fits = as_size(memory.needs) if memory.fits else f"{as_size(memory.needs)}, does not fit"
    return f"{fits}, {as_time(seconds)}"


def lines() -> list[str]:
    """The table in Markdown."""
    rows = [f"| {STEPS} steps | SD 1.5 at 512 px, preset `sd15` | SDXL at 1024 px |", "|---|---|---|"]
    for card, large in CARDS.items():
        small = describe_preset("sd15", card)
        rows.append(f"| {card} | {small} | `{large}`: {describe_preset(large, card)} |")
    return rows


if __name__ == "__main__":
    print(*lines(), sep="\n")
