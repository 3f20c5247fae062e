"""Sampling as people ask for it: a run, a LoRA file or a base; checked whole, then made."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sdlora.config import RunConfig, SampleSection, load_config
from sdlora.errors import ConfigError
from sdlora.formats.files import load_adapter, resolve_adapter
from sdlora.lora.adapter import Adapter, check_base
from sdlora.lora.attach import check_fit
from sdlora.models.dtypes import DTYPES
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.load import load_base
from sdlora.models.meta import empty_components
from sdlora.models.safety import missing_checker
from sdlora.runs import RunFolder
from sdlora.sampling.generate import Column, make_columns
from sdlora.sampling.images import choose_folder
from sdlora.sampling.request import (
    SampleRequest,
    choose_device,
    choose_dtype,
    make_request,
    sample_to_folder,
)
from sdlora.sampling.schedulers import check_prompts, resolve_settings
from sdlora.tree.lineage import PathEntry, find_ancestors, path_to_stack
from sdlora.tree.tree import AdapterTree


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
        out: The folder for the images; `samples/NAME` if not given.
        size: Width and height in pixels; those of the training if not given.
        force: Takes wrong ancestors of a child for right ones, and goes without missing ones.
        progress: Told (finished, total) images.
        warn: Told what deserves attention, such as another base of the same family.
        changes: Keys of the section `sample`: prompts, seeds, strengths, steps, guidance …

    Returns:
        The path of the grid.

    Raises:
        SdloraError: If something asked for is not there or does not fit.
    """
    plan = plan_sample(source, base=base, step=step, out=out, size=size, force=force, warn=warn, **changes)
    return plan.make(progress)


def plan_sample(
    source: str | Path | RunFolder | None = None,
    *,
    base: str | Path | None = None,
    step: int | None = None,
    out: str | Path | None = None,
    size: tuple[int, int] | None = None,
    force: bool = False,
    warn: Callable[[str], None] | None = None,
    **changes: Any,
) -> SamplePlan:
    """Checks all that `sample` was asked for, which it takes as `sample` does; loads no base.

    Raises:
        SdloraError: If something asked for is not there or does not fit.
    """
    subject = _find_subject(source, base, step)
    ancestors: list[PathEntry] = []
    if subject.file and subject.adapter and subject.adapter.parent:
        ancestors = find_ancestors(subject.file, subject.adapter, force=force, warn=warn)
    config = subject.config.replace(sample=changes) if changes else subject.config
    if not config.sample.prompts:
        raise ConfigError("there is no prompt; give --prompt TEXT, or a run folder that has its own")
    choose_folder(out, subject.name)
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
    return SamplePlan(subject, ancestors, info, request, out)


@dataclass(frozen=True)
class SamplePlan:
    """A grid that can be made: all that was asked for is there and fits.

    Args:
        subject: What is shown.
        ancestors: What it stands on.
        info: The base.
        request: Prompts, seeds, strengths, and how.
        out: The folder, if one was given.
    """

    subject: _Subject
    ancestors: list[PathEntry]
    info: BaseInfo
    request: SampleRequest
    out: str | Path | None

    def make(self, progress: Callable[[int, int], None] | None = None) -> Path:
        """Loads the base, makes the images, and gives the grid's path.

        Args:
            progress: Told (finished, total) images.
        """
        subject, device = self.subject, choose_device()
        base = load_base(self.info, dtype=subject.dtype or choose_dtype(device), device=device)
        names = (self.ancestors[-1].ancestor.name if self.ancestors else "", subject.name)
        return sample_to_folder(
            base,
            make_columns(
                subject.adapter,
                self.request.strengths,
                path_to_stack(self.ancestors) if self.ancestors else (),
                names,
            ),
            self.request,
            choose_folder(self.out, subject.name),
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


def _check_fits(subject: _Subject, ancestors: list[PathEntry], info: BaseInfo) -> None:
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
    found = None if source is None else resolve_adapter(source, step)
    if found and found.run:
        run, file = found.run, found.file
        config = run.read_config()
        dtype = DTYPES[run.base_dtype]
        title = run.name if step is None else f"{run.name}, step {step}"
        subject = _Subject(run.name, title, config, file, load_adapter(file), dtype)
    elif found:
        file = found.file
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


def sample_tree(
    tree: AdapterTree,
    names: Sequence[str] = (),
    *,
    strengths: Mapping[str, float] | None = None,
    base: str | None = None,
    out: str | Path | None = None,
    size: tuple[int, int] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
    **changes: Any,
) -> Path:
    """Makes a grid that compares nodes, each on top of its ancestors; the base is loaded once.

    Args:
        tree: The tree.
        names: Nodes to show; all if not given.
        strengths: By node name, where another than the one of the training is wanted.
        base: The base; the one that the first node names if not given.
        out: The folder for the images; `samples/NAME` after the tree's folder if not given.
        size: Width and height in pixels; those of the training if not given.
        force: Takes wrong parents for right ones, and goes without missing ones.
        progress: Told (finished, total) images.
        warn: Told what deserves attention, such as another base of the same family.
        changes: Keys of the section `sample`: prompts, seeds, steps, guidance …

    Returns:
        The path of the grid.

    Raises:
        SdloraError: If a node stands on a wrong parent, or something asked for does not fit.
    """
    names = list(names or tree.nodes)
    nodes = [tree.node(name) for name in names]
    if not changes.get("prompts"):
        raise ConfigError("there is no prompt; give --prompt TEXT")
    columns = [Column()]
    for name, path in zip(names, tree.strengths(names, strengths, force=force), strict=True):
        columns.append(Column(tree.load_stack(path), path[name], name))
    for forced in dict.fromkeys(str(error) for name in names for error in tree.path_errors(name)):
        if warn:
            warn(forced)
    folder = choose_folder(out, tree.folder.resolve().name)
    first = nodes[0]
    config = load_config(None, {"base.source": base or base_of(first.file, first.notes)})
    info = inspect_base(config.base)
    for node in nodes:
        adapter = tree.load(node.name)
        line = check_base(
            adapter, family=info.family, name=info.name, digest=info.digest, source=str(node.file)
        )
        if line and warn:
            warn(line)
    trigger = next((t for node in nodes if (t := node.notes.get("modelspec.trigger_phrase"))), None)
    for prompt in changes["prompts"]:
        if trigger is None and "{trigger}" in prompt:
            raise ConfigError(
                f"prompt {prompt!r} has {{trigger}} in it but no file of the tree says its trigger; "
                "write the words"
            )
    changes["prompts"] = [prompt.replace("{trigger}", trigger or "") for prompt in changes["prompts"]]
    side = noted_resolution(first.notes) or info.resolution
    request = make_request(config.replace(sample=changes).sample, info, size or (side, side))
    check_prompts(request.prompts)
    resolve_settings(info, request.settings)
    device = choose_device()
    loaded = load_base(info, dtype=choose_dtype(device), device=device)
    return sample_to_folder(loaded, columns, request, folder, title=tree.folder.name, progress=progress)
