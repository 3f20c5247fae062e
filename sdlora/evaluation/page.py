"""The report of one run or several: one HTML file that needs no network, and works without JavaScript."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from sdlora.config import RunConfig, load_config
from sdlora.data.doctor import Checkup, check_images, contact_sheet
from sdlora.errors import ConfigError, RunError, SdloraError
from sdlora.evaluation.tiles import describe_ratings, embed, make_cards, read_choice
from sdlora.export.webui import preferred_strength
from sdlora.models.info import inspect_base
from sdlora.report.plots import draw_loss_curves
from sdlora.report.summary import SPLITS, describe_limits, describe_state, losses_of, pipeline_code
from sdlora.runs import RunFolder
from sdlora.writing import write_text

MAX_GRIDS, MAX_CAPTIONS = 12, 500


def write_report(
    runs: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    out: str | Path | None = None,
    checkup: Checkup | None = None,
) -> Path:
    """Writes one HTML file: samples, losses, images, settings, time and memory, and how to use the result.

    What cannot be read any more, such as the image folder, is left out, and the page says so.

    Args:
        runs: A run folder, or several to compare.
        out: The file; by default `RUN/report.html`, and `report.html` for several runs.
        checkup: Of the images of the run, if it is known.

    Raises:
        RunError: If a folder is not a run, or the file cannot be written.
    """
    given = [runs] if isinstance(runs, str | PathLike) else runs
    folders = [run if isinstance(run, RunFolder) else RunFolder.open(run) for run in given]
    if not folders:
        raise ConfigError("a report needs at least one run; pass some", key="report.empty")
    single = folders[0] if len(folders) == 1 else None
    path = Path(out) if out else single.report if single else Path("report.html")
    cards = make_cards(folders)
    values = {
        "name": ", ".join(run.name for run in folders),
        "runs": [_describe_run(run, checkup, has_cards=bool(cards)) for run in folders],
        "cards": cards,
        "start": _start(folders[0]),
        "curve": _curve(folders),
        "losses": _losses(folders),
        "limits": describe_limits(folders) if not single else [],
        "differences": _differences(folders),
    }
    script = files("sdlora.report").joinpath("page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    templates = Environment(loader=PackageLoader("sdlora", "report"), autoescape=True, trim_blocks=True)
    # By its hash: no other script, such as one in a caption, can run.
    page = templates.get_template("page.html").render(values, script=Markup(script), script_digest=digest)
    try:
        return write_text(path, page)
    except OSError as error:
        problem = f"cannot write {path}: {error.strerror}; use another --out, or copy the run elsewhere"
        raise RunError(problem, key="run.not-writable") from None


def _describe_run(run: RunFolder, checkup: Checkup | None, *, has_cards: bool) -> dict[str, Any]:
    config, environment, choice = run.read_config(), run.read_environment(), read_choice(run)
    dataset, sheet, captions = _describe_images(config, checkup)
    warnings = choice.get("warnings")
    return {
        "name": run.name,
        "state": describe_state(run),
        "advice": str(choice.get("reason") or ""),
        "ratings": describe_ratings(run),
        "warnings": list(map(str, warnings)) if isinstance(warnings, list) else [],
        "scores": embed(run.evaluation_curve) if choice and run.evaluation_curve.is_file() else None,
        "grids": [] if has_cards else [(step, embed(file)) for step, file in _grids(run)],
        "dataset": dataset,
        "sheet": sheet,
        "captions": captions,
        "tables": {
            "Settings that differ from the defaults": _changed_settings(config),
            "Time and memory": _costs(run),
        },
        "origins": {"Versions": _flatten(environment), "Files": _digests(run)},
        "usage": _usage(run, config),
    }


def _start(run: RunFolder) -> tuple[int | None, float]:
    """Step and strength that are shown first: the recommended ones, else as for other programs."""
    choice, strengths = read_choice(run), run.read_config().sample.strengths
    step, strength = choice.get("step"), choice.get("strength")
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not strength:
        strength = preferred_strength(strengths)
    return (step if isinstance(step, int) else None), float(strength)


def _curve(runs: Sequence[RunFolder]) -> str | None:
    if len(runs) == 1:
        return embed(runs[0].loss_curve) if runs[0].loss_curve.is_file() else None
    with tempfile.TemporaryDirectory() as folder:
        return embed(draw_loss_curves(Path(folder) / "loss.png", runs))


def _losses(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """The last validation losses by run, with their changes since the start."""
    rows = []
    for run in runs:
        texts = []
        for split in SPLITS:
            losses = losses_of(run, split)
            first, last = (losses[min(losses)], losses[max(losses)]) if losses else (0.0, 0.0)
            change = f" ({last / first - 1:+.0%})" if len(losses) > 1 and first > 0 else ""
            texts.append(f"{last:.4f}{change} at step {max(losses)}" if losses else "not measured")
        rows.append((run.name, texts))
    return rows


def _differences(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    """The settings in which runs differ."""
    flat = [_flatten(run.read_config().model_dump(mode="json")) for run in runs]
    keys = dict.fromkeys(key for own in flat for key in own)
    rows = {key: [own.get(key, "") for own in flat] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def _grids(run: RunFolder) -> list[tuple[int, Path]]:
    """The grids of a run by step, newest first; evenly spaced if there are many."""
    found = sorted(run.samples.glob("step-*/grid.png"), reverse=True)
    count = min(len(found), MAX_GRIDS)
    chosen = [found[number * len(found) // count] for number in range(count)]
    return [(int(file.parent.name.removeprefix("step-")), file) for file in chosen]


def _describe_images(
    config: RunConfig, checkup: Checkup | None
) -> tuple[list[str], str | None, list[tuple[str, str]]]:
    """Lines about the image folder as it is now, its contact sheet, and captions by image."""
    try:
        if checkup is None:
            info = inspect_base(config.base, config.objective, config.data)
            checkup = check_images(config, resolution=info.resolution, min_step=info.min_step)
        sheet = embed(contact_sheet(checkup.index, checkup.buckets, config.data))
    except (SdloraError, OSError) as error:
        return [f"The images cannot be shown: {error}"], None, []
    records = [*checkup.index.records, *checkup.index.heldout]
    captions = [(record.name, record.caption) for record in records[:MAX_CAPTIONS]]
    findings = [f"{finding.severity}: {finding.message}" for finding in checkup.findings]
    lines = [line for line in checkup.summary if not line.startswith(("example", "  "))]
    sizes = ", ".join(f"{count} of {size}" for size, count, _ in checkup.buckets.table())
    return [*lines, f"images by bucket: {sizes}", *findings], sheet, captions


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
    """What the events know of time and memory, by stage where the run measured that."""
    if usage := next(reversed(list(run.events("usage"))), None):
        return _usage_by_stage(usage)
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


def _usage_by_stage(usage: Mapping[str, Any]) -> dict[str, str]:
    """Seconds and peak memory of each stage, beside what was planned."""
    parts = [usage.get(key) for key in ("seconds", "stages", "planned")]
    seconds, peaks, planned = (part if isinstance(part, dict) else {} for part in parts)
    rows = {}
    for stage in dict.fromkeys([*seconds, *peaks]):
        texts = [f"{seconds[stage]:.0f} s"] if isinstance(seconds.get(stage), int | float) else []
        texts += [f"at most {peaks[stage] / 1e6:.0f} MB"] if stage in peaks else []
        texts += [f"planned {planned[stage] / 1e6:.0f} MB"] if stage in planned else []
        rows[stage] = ", ".join(texts)
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
    run = RunFolder(run.path.absolute())  # what is copied from here is pasted anywhere
    trigger = config.data.trigger or ""
    prompt = next(iter(config.sample.prompts), "a house").replace("{trigger}", trigger)
    step, strength = _start(run)
    final, kohya = run.final_adapter("diffusers"), run.final_adapter("kohya")
    if step is not None and run.step_adapter(step).is_file():
        final = run.step_adapter(step)
    family = str(next(run.events("plan"), {}).get("family"))
    usage = {}
    if config.lora.parent and final.is_file():
        # Alone, it would be used without what it was trained on.
        final = Path(f"{run.name}-merged.safetensors")
        take = f"sdlora tree flatten {shlex.quote(str(run.path.parent))} {shlex.quote(run.name)} --out "
        usage["Merge it with its parents first"] = (
            f"{take}{shlex.quote(str(final))}\n"
            f"{take}{shlex.quote(f'{run.name}-merged.kohya.safetensors')} --format kohya  # A1111, ComfyUI"
        )
    if usage or final.is_file():
        usage["diffusers"] = (
            "\n".join(pipeline_code(config.base.source, family)) + "\n"
            f"pipe.load_lora_weights({str(final)!r})\n"
            f"strength = {{'scale': {strength:g}}}\n"
            f"image = pipe({prompt!r}, cross_attention_kwargs=strength).images[0]"
        )
    if kohya.is_file() and not config.lora.parent:
        name = config.export.name or run.name
        for_uis, source, end = (
            run.webui / f"{name}.safetensors",
            shlex.quote(str(final)),
            f"/{name}.safetensors",
        )
        if final != run.final_adapter():
            take = f"sdlora export {source} --format kohya --out "
        elif for_uis.is_file():
            # with its thumbnail and notes
            take, end = f"cp {shlex.quote(str(run.webui))}/{shlex.quote(name)}.* ", "/"
        else:
            take = f"cp {shlex.quote(str(kohya))} "
        usage["A1111 and Forge"] = f"{take}models/Lora{end}\n\n{prompt} <lora:{name}:{strength:g}>"
        usage["ComfyUI"] = (
            f"{take}models/loras{end}\n\n"
            f"Load LoRA: {name}.safetensors, strength_model {strength:g}, strength_clip {strength:g}"
        )
    return usage or {"sdlora": f"sdlora resume {run.path}  # no final file yet"}
