"""What a path is that was given as a base: a wrong kind is named for what it is (R-40)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sdlora.errors import ModelError
from sdlora.models.weights import PICKLES, read_header, read_json

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
CLASSES = {
    "AutoencoderKL": "a VAE alone",
    "UNet2DConditionModel": "a UNet alone",
    "ControlNetModel": "a ControlNet",
    "CLIPTextModel": "a text encoder alone",
    "CLIPTextModelWithProjection": "a text encoder alone",
}


def refuse_file(path: Path, key: str) -> ModelError:
    """The error for a file given where a diffusers folder is needed.

    Args:
        path: An existing file.
        key: The setting with its value, such as `base.source = model.ckpt`.
    """
    suffix = path.suffix.lower()
    with path.open("rb") as handle:
        start = handle.read(8)
    if suffix in PICKLES or start[:2] in (b"PK", b"\x80\x02"):
        return ModelError(
            f"{key} is a pickle, which can run any code when it is read; "
            "convert it to a diffusers folder of .safetensors files"
        )
    if suffix == ".safetensors":
        return ModelError(f"{key} {_describe_tensors(read_header(path))}")
    if suffix in PICTURES:
        return ModelError(f"{key} is a picture; give builtin, a diffusers folder or a hub id")
    what = f"a {suffix} file" if suffix else "a file"
    return ModelError(f"{key} is {what}, not a model; give builtin, a diffusers folder or a hub id")


def _describe_tensors(names: Iterable[str]) -> str:
    """What a safetensors file is, and what to do, by the names of its tensors."""
    names = list(names)

    def has(*parts: str) -> bool:
        return any(part in name for name in names for part in parts)

    if has("lora_", ".lora.", "hada_", "lokr_"):
        return "is a LoRA file, not a base; give the base it was made for, and the LoRA to `sdlora sample`"
    if has("model.diffusion_model."):
        kind = (
            "SDXL"
            if has("conditioner.embedders.1.")
            else "SD 1.x"
            if has("transformer.text_model")
            else "SD 2.x"
        )
        return (
            f"is a single-file {kind} checkpoint, not supported yet; convert it and give its diffusers folder"
        )
    if has("control_model.", "controlnet_"):
        return "is a ControlNet, not a base; give builtin, a diffusers folder or a hub id"
    if has("down_blocks.") and has("time_embedding."):
        return "is a UNet alone; give the folder that holds model_index.json"
    if has("decoder.conv_in", "decoder.up"):
        return "is a VAE alone; give a base, and this as base.vae"
    if has("text_model.", "token_embedding"):
        return "is a text encoder alone; give the folder that holds model_index.json"
    first = ", ".join(names[:3])
    return f"is no base (its tensors are {first} ...); give builtin, a diffusers folder or a hub id"


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
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return ModelError(
        f"{key} is not a diffusers folder: no model_index.json (it holds {shown or 'nothing'}); {remedy}"
    )
