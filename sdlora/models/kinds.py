"""What a path is that was given as a base: a wrong kind is named for what it is (R-40)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sdlora.errors import ModelError, join_names
from sdlora.models.weights import read_json
from sdlora.reading import PICKLES

SOURCES = "builtin, a diffusers folder, a .safetensors file of a whole base, or a hub id"
GIVE_BASE = "give an SD 1.x, SD 2.x or SDXL base"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CLASSES = {
    "AutoencoderKL": "a VAE alone",
    "UNet2DConditionModel": "a UNet alone",
    "ControlNetModel": "a ControlNet",
    "CLIPTextModel": "a text encoder alone",
    "CLIPTextModelWithProjection": "a text encoder alone",
}


def refuse_file(path: Path, key: str) -> None:
    """Names a file that holds no tensors, or may hold more than tensors.

    Args:
        path: An existing file.
        key: The setting with its value, such as `base.source = model.ckpt`.

    Raises:
        ModelError: Unless it is a safetensors file.
    """
    suffix = path.suffix.lower()
    with path.open("rb") as handle:
        start = handle.read(8)
    if suffix in PICKLES or start[:2] in (b"PK", b"\x80\x02"):
        raise ModelError(
            f"{key} is a pickle, which can run any code when it is read; "
            "get it as .safetensors, or convert it with a tool that you trust"
        )
    if suffix in PICTURES:
        raise ModelError(f"{key} is a picture; give {SOURCES}")
    if suffix != ".safetensors":
        what = f"a {suffix} file" if suffix else "a file"
        raise ModelError(f"{key} is {what}, not a model; give {SOURCES}")


def describe_tensors(names: Iterable[str]) -> str:
    """What a safetensors file is that is no base, and what to do, by the names of its tensors."""
    names = list(names)

    def has(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    if has("lora_", ".lora.", "hada_", "lokr_"):
        return "is a LoRA file, not a base; give the base it was made for, and the LoRA to `sdlora sample`"
    if has("control_model.", "controlnet_"):
        return f"is a ControlNet, not a base; give {SOURCES}"
    if has("model.diffusion_model."):
        return f"is a UNet with its text encoders or a whole base, and no VAE alone; {GIVE_BASE}"
    if has("double_blocks.", "joint_blocks.", "transformer_blocks.0.attn.add_q_proj"):
        return f"is a transformer of another architecture than Stable Diffusion's UNet; {GIVE_BASE}"
    if has("down_blocks.", "input_blocks.") and has("time_embedding.", "time_embed."):
        return (
            "is a UNet alone; give the whole base: a folder with model_index.json, or one file with all parts"
        )
    if has("decoder.conv_in", "decoder.up"):
        return "is a VAE alone; give a base, and this as base.vae"
    if has("text_model.", "token_embedding"):
        return "is a text encoder alone; give the whole base"
    first = ", ".join(names[:3])
    return f"is no base (its tensors are {first} ...); give {SOURCES}"


def refuse_folder(folder: Path, key: str) -> ModelError:
    """The error for a folder without `model_index.json`.

    Args:
        folder: An existing folder.
        key: The setting with its value.
    """
    names = sorted(file.name + "/" * file.is_dir() for file in folder.iterdir())
    if "events.jsonl" in names or "adapters/" in names:
        return ModelError(f"{key} is a run of sdlora, not a base; give the base that the run was trained on")
    if "adapter_config.json" in names or "pytorch_lora_weights.safetensors" in names:
        return ModelError(f"{key} is a LoRA folder, not a base; give the base it was made for")
    remedy = "give the folder that holds model_index.json"
    if (folder.parent / "model_index.json").is_file():
        remedy = f"give {folder.parent}"
    inner = [name for name in names if (folder / name / "model_index.json").is_file()]
    if inner:
        remedy = f"did you mean {folder / inner[0]}?"
    if "config.json" in names:
        config = read_json(folder / "config.json")
        kind = str(config.get("_class_name") or (config.get("architectures") or [""])[0])
        if kind:
            extra = ", and this as base.vae" if kind == "AutoencoderKL" else ""
            return ModelError(f"{key} is {CLASSES.get(kind, f'a {kind}')}, not a base; {remedy}{extra}")
    return ModelError(
        f"{key} is not a diffusers folder: no model_index.json "
        f"(it holds {join_names(names, 6) or 'nothing'}); {remedy}"
    )
