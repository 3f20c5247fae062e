"""Sampling as people ask for it: prompts × strengths × seeds into a folder with a grid."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sdlora.config import RunConfig, SampleSection, load_config
from sdlora.errors import ConfigError
from sdlora.lora.adapter import Adapter, check_base
from sdlora.lora.ancestors import Step, find_ancestors, stack_of
from sdlora.lora.attach import check_fit
from sdlora.lora.files import load_adapter, lora_file
from sdlora.models.condition import Condition
from sdlora.models.dtypes import DTYPES, has_bf16
from sdlora.models.empty import empty_components
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.load import load_base
from sdlora.models.safety import missing_checker
from sdlora.models.stable_diffusion import StableDiffusion
from sdlora.runs import RunFolder
from sdlora.sampling.checks import check_prompts, resolve_settings
from sdlora.sampling.generate import Column, generate_columns, make_columns
from sdlora.sampling.grid import make_grid
from sdlora.sampling.pictures import Picture, SampleSettings, choose_folder, save_pictures


@dataclass(frozen=True)
class SampleRequest:
    """What to sample.

    Args:
        prompts: With placeholders already replaced.
        seeds: One picture for each prompt and seed.
        strengths: Columns beside the base.
        settings: How.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    strengths: tuple[float, ...]
    settings: SampleSettings


def make_request(sample: SampleSection, info: BaseInfo, size: tuple[int, int]) -> SampleRequest:
    """What the settings ask for; the guidance is the base's own unless they say one.

    Args:
        sample: The settings.
        info: The base.
        size: Width and height in pixels.
    """
    return SampleRequest(
        tuple(sample.prompts),
        tuple(sample.seeds),
        tuple(sample.strengths),
        SampleSettings(
            steps=sample.steps,
            guidance=info.guidance if sample.guidance is None else sample.guidance,
            scheduler=sample.scheduler,
            negative_prompt=sample.negative_prompt,
            width=size[0],
            height=size[1],
            batch_size=sample.batch_size,
            safety_checker=sample.safety_checker,
        ),
    )


def request_of_run(config: RunConfig, info: BaseInfo) -> SampleRequest:
    """What a run's resolved configuration asks for, at its training resolution."""
    side = config.data.resolution or info.resolution
    return make_request(config.sample, info, (side, side))


def sample(
    source: str | Path | RunFolder | None = None,
    *,
    base: str | Path | None = None,
    step: int | None = None,
    out: str | Path | None = None,
    size: tuple[int, int] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
    **changes: Any,
) -> Path:
    """Makes a grid of a run, a LoRA file, or the base alone; a child is shown on top of its ancestors.

    Args:
        source: A run folder or a LoRA file; None shows the base.
        base: The base; that of the run, or the one the file names, if not given.
        step: The adapter that a run saved at this step; the final one if not given.
        out: The folder for the pictures; `samples/NAME` if not given.
        size: Width and height in pixels; those of the training if not given.
        force: Takes wrong ancestors of a child for right ones, and goes without missing ones.
        progress: Told (finished, total) pictures.
        warn: Told what deserves attention, such as another base of the same family.
        changes: Keys of the section `sample`: prompts, seeds, strengths, steps, guidance …

    Returns:
        The path of the grid.

    Raises:
        SdloraError: If something asked for is not there or does not fit.
    """
    subject = _find_subject(source, base, step)
    ancestors: list[Step] = []
    if subject.adapter is not None and subject.file is not None:
        ancestors = find_ancestors(subject.file, subject.adapter, force=force, warn=warn)
    config = subject.config.replace(sample=changes) if changes else subject.config
    if not config.sample.prompts:
        raise ConfigError("there is no prompt; give --prompt TEXT, or a run folder that has its own")
    folder = choose_folder(out, subject.name)
    info = inspect_base(config.base, config.objective)
    if subject.adapter is not None:
        line = check_base(
            subject.adapter, family=info.family, name=info.name, digest=info.digest, source=str(subject.file)
        )
        if line and warn:
            warn(line)
    unchecked = missing_checker(info) if config.sample.safety_checker else None
    if unchecked and warn:
        warn(unchecked)
    side = config.data.resolution or info.resolution
    request = make_request(_place_trigger(config, subject.adapter), info, size or (side, side))
    check_prompts(request.prompts)
    resolve_settings(info, request.settings)
    _check_fits(subject, ancestors, info)
    device = choose_device()
    loaded = load_base(info, dtype=subject.dtype or choose_dtype(device), device=device)
    return sample_to_folder(
        loaded,
        make_columns(
            subject.adapter,
            request.strengths,
            stack_of(ancestors),
            (ancestors[-1].ancestor.name if ancestors else "", subject.name),
        ),
        request,
        folder,
        name=subject.name if subject.adapter is not None else None,
        title=subject.title,
        progress=progress,
    )


@dataclass(frozen=True)
class _Subject:
    """What `sample` shows: an adapter or none, with the settings that come with it."""

    name: str
    title: str
    config: RunConfig
    file: Path | None = None
    adapter: Adapter | None = None
    dtype: torch.dtype | None = None


def _check_fits(subject: _Subject, ancestors: Sequence[Step], info: BaseInfo) -> None:
    """Whether all that is shown can be mounted, before any weight is loaded."""
    adapters = [(step.file, step.adapter) for step in ancestors]
    adapters += [(subject.file, subject.adapter)] if subject.file and subject.adapter else []
    if not adapters:
        return
    parts = empty_components(info, text=any(adapter.changes_text for _, adapter in adapters))
    for file, adapter in adapters:
        check_fit(adapter.without(info.unread_layer), parts, str(file))


def _find_subject(
    source: str | Path | RunFolder | None, base: str | Path | None, step: int | None
) -> _Subject:
    if isinstance(source, RunFolder) or (source is not None and lora_file(source).is_dir()):
        run = source if isinstance(source, RunFolder) else RunFolder.open(source)
        config = run.read_config()
        file = run.adapter if step is None else run.saved_adapter(step)
        dtype = DTYPES[run.base_dtype]
        title = run.name if step is None else f"{run.name}, step {step}"
        subject = _Subject(run.name, title, config, file, load_adapter(file), dtype)
    elif source is not None:
        if step is not None:
            raise ConfigError(f"--step {step} needs a run folder; {source} is a file")
        file = Path(source)
        adapter = load_adapter(file)
        config = load_config()
        if base is None:
            config = config.replace(base={"source": base_of(file, adapter.notes)})
        config = config.replace(data={"resolution": noted_resolution(adapter.notes)})
        subject = _Subject(file.stem, file.name, config, file, adapter)
    else:
        subject = _Subject("base", "base", load_config())
    if base is None:
        return subject
    changed = subject.config.replace(base={"source": base, "revision": None, "variant": None})
    return replace(subject, config=changed)


def base_of(file: Path, notes: Mapping[str, str]) -> str:
    """The base that a file names, if it is one that can be found by its name.

    Raises:
        ConfigError: If it names none, or a folder of the machine that it was trained on.
    """
    name = notes.get("sdlora.base_name")
    if name == "builtin" or (name and name.count("/") == 1):
        return name
    trained_on = f" ({file} was trained on {name})" if name else f" ({file} does not name one)"
    raise ConfigError(f"a LoRA file needs its base{trained_on}; give --base")


def noted_resolution(notes: Mapping[str, str]) -> int | None:
    """The side in pixels that a file was trained at, if it says one."""
    side = notes.get("sdlora.resolution", "")
    return int(side) if re.fullmatch("[0-9]{2,4}", side) else None


def _place_trigger(config: RunConfig, adapter: Adapter | None) -> SampleSection:
    """Replaces `{trigger}` by that of the run, or the one that the file names."""
    trigger = config.data.trigger or (adapter.notes.get("modelspec.trigger_phrase") if adapter else None)
    if not trigger:
        return config.sample
    prompts = [prompt.replace("{trigger}", trigger) for prompt in config.sample.prompts]
    return config.sample.model_copy(update={"prompts": prompts})


def choose_device() -> torch.device:
    """The accelerator that torch finds, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def choose_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU that has it, else fp32."""
    return torch.bfloat16 if has_bf16(device) else torch.float32


def sample_to_folder(
    base: StableDiffusion,
    columns: Sequence[Column],
    request: SampleRequest,
    folder: Path,
    *,
    name: str | None = None,
    title: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Makes the pictures and their grid.

    Args:
        base: The base, with or without adapters mounted; they stay as they are.
        columns: What to show.
        request: What to sample; its strengths are those of the columns.
        folder: Gets `grid.png` and the single pictures.
        name: What the adapter is called in the pictures' metadata.
        title: Written above the grid.
        progress: Told (finished, total) pictures.

    Returns:
        The grid's path.
    """
    pictures = make_pictures(base, columns, request, progress=progress)
    return write_pictures(folder, pictures, base=base.info.name, adapter=name, title=title)


def write_pictures(
    folder: Path, pictures: Sequence[Picture], *, base: str, adapter: str | None, title: str
) -> Path:
    """Writes the single pictures and their grid; gives the grid's path."""
    metadata = {"base": base, "adapter": adapter}
    return save_pictures(folder, pictures, make_grid(pictures, title=title), metadata)


def make_pictures(
    base: StableDiffusion,
    columns: Sequence[Column],
    request: SampleRequest,
    *,
    text: Mapping[str, Condition] | None = None,
    progress: Callable[[int, int], None] | None = None,
    share: tuple[int, int] = (0, 1),
) -> list[Picture]:
    """Makes what is asked for, or a share of it; see `generate_columns`."""
    total = len(request.prompts) * len(request.seeds) * len(columns)
    return generate_columns(
        base,
        columns,
        request.prompts,
        request.seeds,
        request.settings,
        text=text,
        progress=None if progress is None else lambda done: progress(done, total),
        share=share,
    )
