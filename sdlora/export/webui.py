"""The files of a run for A1111, Forge and ComfyUI: a LoRA under its own name, a thumbnail and notes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from sdlora.runs import RunFolder
from sdlora.writing import write_file, write_json

VERSIONS = {"sdxl": "SDXL", "sd_v2": "SD2", "sd_v1": "SD1"}


def write_webui_files(
    run: RunFolder,
    kohya_version: str,
    strengths: Sequence[float],
    trigger: str | None,
    *,
    about: str = "",
    name: str | None = None,
) -> Path:
    """Writes `webui/NAME.safetensors`, `NAME.png` and `NAME.json`, ready for `models/Lora`.

    The adapter is a hard link to the run's kohya file where the disk has them, else a copy.

    `kohya_version` is `ss_base_model_version` of the base; `strengths` are those of the run's samples, the
    preferred one is also the thumbnail's; `about` are notes for its users. NAME is by default the run's.
    Returns the adapter's path.
    """
    place = run.webui / f"{name or run.name}.safetensors"
    place.unlink(missing_ok=True)  # a rename between two links to one file does nothing
    write_file(place, lambda file: _link(run.final_adapter("kohya"), file))
    strength = preferred_strength(strengths)
    # 00.png, or 000.png, is the base; the strengths follow.
    number = 1 + [one for one in dict.fromkeys(strengths) if one].index(strength) if any(strengths) else 0
    samples = (file for file in run.samples.glob("step-*/*.png") if file.stem.isdecimal())
    thumbnails = sorted(file for file in samples if int(file.stem) == number)
    if thumbnails:
        write_file(place.with_suffix(".png"), lambda file: shutil.copyfile(thumbnails[-1], file))
    version = next((name for start, name in VERSIONS.items() if kohya_version.startswith(start)), "Unknown")
    notes = {
        "description": "",
        "sd version": version,
        "activation text": trigger or "",
        "preferred weight": strength,
        "notes": about,
    }
    write_json(place.with_suffix(".json"), notes)
    return place


def preferred_strength(strengths: Sequence[float]) -> float:
    """The middle one of the strengths that are shown, of two the lower; 1 if all are 0."""
    shown = sorted({one for one in strengths if one})
    return shown[(len(shown) - 1) // 2] if shown else 1.0


def webui_prompt(name: str, strength: float, trigger: str | None) -> str:
    """What invokes a LoRA in these programs, ready to paste."""
    return " ".join(filter(None, (f"<lora:{name}:{strength:g}>", trigger)))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
