"""Stable Diffusion bases with random weights, as diffusers folders: real shapes, and so real speed.

    python -m tests.benchmarks.bases sd15 FOLDER        # 859 M + 123 M + 84 M numbers, 2.0 GB
    python -m tests.benchmarks.bases quarter FOLDER     # SD 1.5 at half its widths, 0.5 GB
    python -m tests.benchmarks.bases sdxl FOLDER        # SDXL's layout at a fifth of its widths, 0.3 GB

The weights are those of seed 0 and are written one tensor at a time. The tokenizer is CLIP's own. Nothing
needs the network.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdlora.models.single_file import CONFIGS, read_known
from sdlora.models.weights import MODELS, empty_model

WEIGHT_FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
LENGTH = 77  # tokens


def _unet(widths: tuple[int, ...], **changes: Any) -> dict[str, Any]:
    return {
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
        "block_out_channels": widths,
        **changes,
    }


def _vae(width: int) -> dict[str, Any]:
    return {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": (width, 2 * width, 4 * width, 4 * width),
        "layers_per_block": 2,
    }


def _text(width: int, layers: int, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": LENGTH,
        "projection_dim": width,
        **changes,
    }


# Family, and what differs from its published settings.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": (
        "sd1",
        {
            "unet": _unet((320, 640, 1280, 1280), attention_head_dim=8, cross_attention_dim=768),
            "vae": _vae(128),
            "text_encoder": _text(768, 12),
        },
    ),
    "quarter": (
        "sd1",
        {
            "unet": _unet(
                (160, 320, 640, 640), attention_head_dim=4, cross_attention_dim=384, sample_size=32
            ),
            "vae": {**_vae(64), "sample_size": 256},
            "text_encoder": _text(384, 6),
        },
    ),
    "sdxl": (
        "sdxl",
        {
            "unet": {
                "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2],
                "up_block_types": [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
                "block_out_channels": (64, 128, 256),
                "transformer_layers_per_block": (1, 2, 10),
                "attention_head_dim": (1, 2, 4),
                "use_linear_projection": True,
                "cross_attention_dim": 128 + 256,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 64,
                "projection_class_embeddings_input_dim": 6 * 64 + 256,
            },
            "vae": _vae(32),
            "text_encoder": _text(128, 3),
            "text_encoder_2": _text(256, 3),
        },
    ),
}


def write_base(name: str, folder: Path) -> Path:
    """Writes one of `BASES` as a diffusers folder in bf16; an existing folder is kept."""
    if (folder / "model_index.json").is_file():
        return folder
    family, own = BASES[name]
    known = read_known(family)
    generator = torch.Generator().manual_seed(0)
    index: dict[str, Any] = {}
    for part, changes in own.items():
        model = empty_model(part, {**known[part], **changes})
        (folder / part).mkdir(parents=True, exist_ok=True)
        model.save_config(folder / part) if hasattr(model, "save_config") else model.config.save_pretrained(
            folder / part
        )
        file = folder / part / f"{WEIGHT_FILES.get(part, 'model')}.safetensors"
        write_weights(_published_names(part, model.state_dict()), file, generator)
        index[part] = ["diffusers" if part in WEIGHT_FILES else "transformers", MODELS[part].__name__]
    for number, settings in enumerate(known["tokenizers"]):
        part = "tokenizer" if number == 0 else "tokenizer_2"
        _write_tokenizer(folder / part, settings)
        index[part] = ["transformers", "CLIPTokenizer"]
    scheduler = known["scheduler"]
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    if family == "sd1":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    pipeline = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    # Last, since a folder without it is not a base yet.
    _write_json(folder / "model_index.json", {"_class_name": pipeline, **index})
    return folder


def _published_names(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published text encoders have `text_model.` before all names but the projection's."""
    if not part.startswith("text_encoder"):
        return dict(tensors)
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
        for name, tensor in tensors.items()
        if "position_ids" not in name
    }


def write_weights(tensors: Mapping[str, Tensor], file: Path, generator: torch.Generator) -> None:
    """Writes random bf16 weights for tensors on the meta device, one at a time, as safetensors.

    Matrices and kernels keep the size of their inputs: their variance is 1 / inputs. Biases are 0, norms 1.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            values = torch.full(tensor.shape, float(name.endswith("weight")), dtype=torch.bfloat16)
            if values.dim() > 1:
                values.normal_(0, values[0].numel() ** -0.5, generator=generator)
            handle.write(values.view(torch.uint8).numpy().data)


def _write_tokenizer(folder: Path, settings: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("vocab.json", "merges.txt"):
        shutil.copyfile(CONFIGS / "clip" / file, folder / file)
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, **marks, **settings},
    )
    _write_json(folder / "special_tokens_map.json", {**marks, **settings})


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the docstring of a module as it is."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=raw)


def bench_folder() -> Path:
    """Where the benchmarks keep bases, images and caches: BENCH_FOLDER, else a folder for temporary files."""
    return Path(os.environ.get("BENCH_FOLDER", "/tmp/sdlora-bench"))


if __name__ == "__main__":
    parser = argument_parser(__doc__)
    parser.add_argument("name", choices=BASES)
    parser.add_argument("folder", type=Path, nargs="?")
    given = parser.parse_args()
    print(write_base(given.name, given.folder or bench_folder() / given.name))
