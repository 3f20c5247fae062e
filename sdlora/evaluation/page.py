"""The report of a run: one HTML file that needs neither the network nor JavaScript."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from PIL import Image

from sdlora.config import RunConfig, load_config
from sdlora.data.doctor import check_images, contact_sheet
from sdlora.errors import RunError, SdloraError
from sdlora.models.info import inspect_base
from sdlora.report.summary import describe_state
from sdlora.runs import RunFolder
from sdlora.writing import write_text

MAX_GRIDS, MAX_CAPTIONS = 12, 500
# Together below 7 MB, 9.3 MB in base64.
MAX_IMAGE_BYTES, MAX_SIDE_PX = 500_000, 2400


def write_report(run: str | Path | RunFolder) -> Path:
    """Writes `report.html` into a run: samples, losses, images, settings, time and memory, and how to use it.

    What cannot be read any more, such as the image folder, is left out, and the page says so.

    Raises:
        RunError: If the folder is not a run, or cannot be written.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    config, environment = folder.read_config(), folder.read_environment()
    dataset, sheet, captions = _describe_images(config)
    values = {
        "name": folder.name,
        "state": describe_state(folder),
        "grids": [(step, _embed(file)) for step, file in _grids(folder)],
        "curve": _embed(folder.loss_curve) if folder.loss_curve.is_file() else None,
        "dataset": dataset,
        "sheet": sheet,
        "captions": captions,
        "tables": {
            "Settings that differ from the defaults": _changed_settings(config),
            "Time and memory": _costs(folder),
            "Versions": _flatten(environment),
            "Files": _digests(folder),
        },
        "usage": _usage(folder, config),
    }
    templates = Environment(loader=PackageLoader("sdlora", "report"), autoescape=True, trim_blocks=True)
    page = templates.get_template("page.html").render(values)
    try:
        return write_text(folder.path / "report.html", page)
    except OSError as error:
        problem = f"cannot write {folder.path / 'report.html'}: {error.strerror}; copy the run elsewhere"
        raise RunError(problem, key="run.not-writable") from None


def _grids(run: RunFolder) -> list[tuple[int, Path]]:
    """The grids of a run by step, newest first; evenly spaced if there are many."""
    found = sorted(run.samples.glob("step-*/grid.png"), reverse=True)
    count = min(len(found), MAX_GRIDS)
    chosen = [found[number * len(found) // count] for number in range(count)]
    return [(int(file.parent.name.removeprefix("step-")), file) for file in chosen]


def _embed(source: Path | Image.Image) -> str | None:
    """An image as a data URI, in WebP of at most `MAX_IMAGE_BYTES`; None if it cannot be read."""
    try:
        image = (Image.open(source) if isinstance(source, Path) else source).convert("RGB")
    except OSError:
        return None
    side = min(max(image.size), MAX_SIDE_PX)
    while True:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(buffer := io.BytesIO(), "WEBP", quality=88, method=3)
        if buffer.tell() <= MAX_IMAGE_BYTES:
            return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        side = side * 4 // 5


def _describe_images(config: RunConfig) -> tuple[list[str], str | None, list[tuple[str, str]]]:
    """Lines about the image folder as it is now, its contact sheet, and captions by image."""
    try:
        info = inspect_base(config.base, config.objective, config.data)
        checkup = check_images(config, resolution=info.resolution, min_step=info.min_step)
        sheet = _embed(contact_sheet(checkup.index, checkup.buckets, config.data))
    except (SdloraError, OSError) as error:
        return [f"The images cannot be shown: {error}"], None, []
    records = [*checkup.index.records, *checkup.index.heldout]
    captions = [(record.name, record.caption) for record in records[:MAX_CAPTIONS]]
    findings = [f"{finding.severity}: {finding.message}" for finding in checkup.findings]
    return [*checkup.summary, *findings], sheet, captions


def _changed_settings(config: RunConfig) -> dict[str, str]:
    defaults = _flatten(load_config().model_dump(mode="json"))
    values = _flatten(config.model_dump(mode="json"))
    return {key: value for key, value in values.items() if value != defaults.get(key)}


def _flatten(values: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Nested values as texts by dotted key."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{above}{key}.")
        else:
            flat[above + key] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def _costs(run: RunFolder) -> dict[str, str]:
    """What the events know of time and memory."""
    events = list(run.events("plan", "prepared", "step", "done"))
    first = {event["event"]: event for event in reversed(events)}
    steps = [event for event in events if event["event"] == "step"]
    rows: dict[str, str] = {}
    if "plan" in first and "prepared" in first:
        rows["loading and encoding"] = f"{first['prepared']['time'] - first['plan']['time']:.0f} s"
    if speeds := [event["steps_per_second"] for event in steps if event.get("steps_per_second")]:
        rows["training"] = f"{sum(1 / speed for speed in speeds):.0f} s for {len(speeds)} steps"
    if steps and "prepared" in first:
        rows["all"] = f"{events[-1]['time'] - events[0]['time']:.0f} s, with samples and validation"
    if used := [event["memory_mb"] for event in steps if event.get("memory_mb")]:
        rows["peak memory while training"] = f"{max(used):.0f} MB"
    for stage, size in first.get("plan", {}).get("memory", {}).get("stages", {}).items():
        rows[f"planned for {stage}"] = f"{size / 1e6:.0f} MB"
    return rows


def _digests(run: RunFolder) -> dict[str, str]:
    """SHA-256 of each final file, and the digests of dataset and base."""
    plan: dict[str, Any] = next(run.events("plan"), {})
    names: list[str] = ["dataset_digest", "base_digest"]
    rows = {name: str(plan[name]) for name in names if name in plan}
    for file in filter(Path.is_file, map(run.final_adapter, ("diffusers", "kohya"))):
        rows[f"SHA-256 of {file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
    return rows


def _usage(run: RunFolder, config: RunConfig) -> dict[str, str]:
    """Code or prompts that use the file, by program."""
    trigger = config.data.trigger or ""
    prompt = next(iter(config.sample.prompts), "a house").replace("{trigger}", trigger)
    strength = max(config.sample.strengths or [1.0])
    final, kohya = run.final_adapter("diffusers"), run.final_adapter("kohya")
    base = "sdlora/builtin/base" if config.base.source == "builtin" else config.base.source
    usage = {}
    if final.is_file():
        usage["diffusers"] = (
            "from diffusers import DiffusionPipeline\n\n"
            f"pipe = DiffusionPipeline.from_pretrained({base!r})\n"
            f"pipe.load_lora_weights({str(final)!r})\n"
            f"image = pipe({prompt!r}, cross_attention_kwargs={{'scale': {strength:g}}}).images[0]"
        )
    if kohya.is_file():
        name = config.export.name or run.name
        usage["A1111 and Forge"] = (
            f"cp {str(kohya)!r} models/Lora/{name}.safetensors\n{prompt} <lora:{name}:{strength:g}>"
        )
        usage["ComfyUI"] = (
            f"cp {str(kohya)!r} models/loras/{name}.safetensors\n"
            f"Load LoRA: {name}.safetensors, strength_model {strength:g}, strength_clip {strength:g}"
        )
    return usage or {"sdlora": f"sdlora resume {run.path}  # no final file yet"}
