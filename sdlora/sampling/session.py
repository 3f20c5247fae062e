"""Grids of a run, a LoRA file, nodes of a tree or the base: everything is checked first, then drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sdlora.config import RunConfig, load_config
from sdlora.dtypes import DTYPES, has_bf16
from sdlora.errors import ConfigError
from sdlora.formats.files import load_adapter, resolve_adapter
from sdlora.lora.adapter import Adapter, check_base
from sdlora.lora.attach import check_fit
from sdlora.lora.layers import carrier_layers
from sdlora.models.info import BaseInfo, inspect_base, with_base_defaults
from sdlora.models.load import load_base
from sdlora.models.safety import missing_checker
from sdlora.models.tokenizer import describe_cut_prompts
from sdlora.models.weights import empty_components
from sdlora.runs import RunFolder
from sdlora.sampling.generate import Column, generate, make_columns
from sdlora.sampling.grid import save_grid
from sdlora.sampling.images import SampleSettings, check_prompts, resolve_settings
from sdlora.sampling.targets import Targets, find_run_targets
from sdlora.tree.lineage import find_ancestors, path_to_stack
from sdlora.tree.tree import AdapterTree
from sdlora.writing import check_writable, next_free_folder

TRIGGER = "modelspec.trigger_phrase"


@dataclass(frozen=True)
class SamplePlan:
    """A grid to draw; `checked` fills in the last three fields.

    `adapters` are all that are mounted in a column, each with its file; `trigger` replaces `{trigger}` in
    prompts; `name` is that of the output folder, `adapter` that in the metadata of the images. Without a
    dtype, the base gets the one that suits the device.
    """

    config: RunConfig
    info: BaseInfo
    columns: Sequence[Column]
    adapters: Sequence[tuple[Path, Adapter]]
    name: str
    title: str
    trigger: str | None = None
    adapter: str | None = None
    dtype: torch.dtype | None = None
    out: str | Path | None = None
    settings: SampleSettings | None = None
    targets: Targets | None = None

    def checked(
        self, size: tuple[int, int] | None, out: str | Path | None, warn: Callable[[str], None] | None
    ) -> SamplePlan:
        """Checks everything that can be checked before weights are loaded, and resolves the settings."""
        choose_folder(out, self.name)
        config, info = self.config, self.info
        if not config.sample.prompts:
            raise ConfigError("sample.prompts is empty; pass --prompt TEXT, or a run folder with prompts")
        notes = [
            check_base(adapter, family=info.family, name=info.name, digest=info.digest, source=str(file))
            for file, adapter in self.adapters
        ]
        if config.sample.safety_checker and info.names_safety_checker:
            notes.append(missing_checker(info))
        prompts = [config.data.fill_trigger(prompt, self.trigger) for prompt in config.sample.prompts]
        check_prompts(prompts)
        targets = find_run_targets(config, prompts) if config.images else None
        for note in notes:
            if note and warn:
                warn(note)
        side = config.data.resolution or info.resolution
        settings = resolve_settings(info, SampleSettings.of(config.sample, size or (side, side)))
        if self.adapters:
            text = any(adapter.changes_text for _, adapter in self.adapters)
            layers = carrier_layers(empty_components(info, text=text))
            for file, adapter in self.adapters:
                check_fit(adapter.without(info.unread_layer), layers, str(file))
        config = config.model_copy(update={"sample": config.sample.model_copy(update={"prompts": prompts})})
        return replace(self, config=config, out=out, settings=settings, targets=targets)

    def notes(self) -> list[str]:
        """Lines about words that the base does not know or read, and target images that are left out."""
        sample = self.config.sample
        unknown = self.info.describe_unknown_words(sample.prompts, self.trigger)
        cut = describe_cut_prompts(self.info, [*sample.prompts, sample.negative_prompt])
        lines = [line for line in (unknown, cut) if line]
        if self.adapters and self.targets is None:
            folder = self.config.images
            reason = f"cannot read {folder}" if folder else "only a run knows its image folder"
            lines.append(f"no target images beside the samples: {reason}")
        return lines

    def make(self, progress: Callable[[int, int], None] | None = None) -> Path:
        """Loads the base, draws the grid and returns its path; `progress` gets (finished, total) images."""
        assert self.settings is not None
        folder, device = choose_folder(self.out, self.name), choose_device()
        is_fast = device.type != "cpu" and has_bf16(device)
        dtype = self.dtype or (torch.bfloat16 if is_fast else torch.float32)
        base = load_base(self.info, dtype=dtype, device=device)
        # As a run has them.
        base.use_cpu_kernels()
        sample = self.config.sample
        images = generate(base, self.columns, sample.prompts, sample.seeds, self.settings, progress=progress)
        base_name, title = base.info.name, self.title
        return save_grid(
            folder, images, base=base_name, adapter=self.adapter, title=title, targets=self.targets
        )


def choose_folder(out: str | Path | None, name: str) -> Path:
    """The folder of a grid, by default `samples/NAME`; raises if it contains a grid, or is not writable."""
    folder = Path(out) if out is not None else next_free_folder(Path("samples") / name)
    if (folder / "grid.png").exists():
        problem = f"--out {folder} already contains a grid; use another folder"
        raise ConfigError(problem, key="option--out.grid")
    check_writable(folder)
    return folder


def choose_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def sample(
    source: str | Path | RunFolder | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Path:
    """Draws a grid of a run, a LoRA file, or the base alone; a child is drawn on top of its ancestors.

    Args:
        source: A run folder or a LoRA file; None for the base.
        progress: Called with (finished, total) images.
        options: Arguments of `plan_sample` (base, step, out, size, force, warn) and keys of the section
            `sample`, such as prompts, seeds, strengths, steps, guidance.

    Returns:
        Path of the grid.

    Raises:
        SdloraError: If something does not exist or does not fit.
    """
    return plan_sample(source, **options).make(progress)


def plan_sample(
    source: str | Path | RunFolder | None = None,
    *,
    base: str | Path | None = None,
    step: int | str | Sequence[int | str] | None = None,
    out: str | Path | None = None,
    size: tuple[int, int] | None = None,
    force: bool = False,
    warn: Callable[[str], None] | None = None,
    **changes: Any,
) -> SamplePlan:
    """Checks everything that `sample` needs, without loading the base.

    Args:
        source: A run folder or a LoRA file; None for the base.
        base: The base; by default the run's, or the one that the file names.
        step: Step of the saved adapter, or "final"; several are drawn beside each other. By default the
            final one, or the newest of an unfinished run.
        out: Output folder; by default `samples/NAME`.
        size: Width and height in pixels; by default those of the training.
        force: Accepts changed ancestors of a child, and ignores missing ones.
        warn: Called with a line if the adapter may not fit, such as to another base of the same family.
        changes: Keys of the section `sample`.

    Raises:
        SdloraError: If something does not exist or does not fit.
    """
    steps: Sequence[int | str | None] = [step] if isinstance(step, int | str) else step or (None,)
    if source is None and step is not None and steps[0] is not None:
        raise ConfigError(f"--step {steps[0]} requires a run; pass its folder", key="option--step")
    plans = [_plan_source(source, base, one, changes) for one in steps]
    if plans[0].adapters:
        plans = [_with_ancestors(plan, force, warn) for plan in plans]
    plan = plans[0]
    if len(plans) > 1:
        plan = _beside(plans, list(map(_name_step, steps)))
    return plan.checked(size, out, warn)


def _beside(plans: Sequence[SamplePlan], names: Sequence[str]) -> SamplePlan:
    """One grid of several saved adapters of a run; the base, and a parent, are drawn once."""
    columns: list[Column] = []
    for plan, name in zip(plans, names, strict=True):
        adapter = plan.adapters[-1][1]
        for column in plan.columns:
            if column.stack and column.stack[-1][0] is adapter:
                columns.append(replace(column, adapter=name))
            elif plan is plans[0]:
                columns.append(column)
    adapters = [entry for plan in plans for entry in plan.adapters]
    return replace(plans[0], columns=columns, adapters=adapters, title=f"{plans[0].name}, {', '.join(names)}")


def _with_ancestors(plan: SamplePlan, force: bool, warn: Callable[[str], None] | None) -> SamplePlan:
    """The plan of one adapter, on top of its ancestors."""
    ((file, adapter),) = plan.adapters
    path = find_ancestors(file, adapter, force=force, warn=warn) if adapter.parent else []
    names = (path[-1].ancestor.name, plan.name) if path else ("", "")
    stack = path_to_stack(path) if path else ()
    columns = make_columns(adapter, plan.config.sample.strengths, stack, names)
    below = [(entry.file, entry.adapter) for entry in path]
    return replace(plan, columns=columns, adapters=[*below, (file, adapter)])


def _name_step(step: int | str | None) -> str:
    return f"step {step}" if isinstance(step, int) else str(step)


def _plan_source(
    source: str | Path | RunFolder | None,
    base: str | Path | None,
    step: int | str | None,
    changes: dict[str, Any],
) -> SamplePlan:
    """The plan for an adapter without its ancestors, or for the base alone."""
    chosen = {} if base is None else {"source": base, "revision": None, "variant": None}
    if source is None:
        config, info = _inspect(load_config().replace(base=chosen, sample=changes))
        return SamplePlan(config, info, [Column()], [], "base", "base")
    found = resolve_adapter(source, step)
    file, adapter = found.file, load_adapter(found.file)
    if found.run:
        config = found.run.read_config().replace(base=chosen, sample=changes)
        name, dtype = found.run.name, DTYPES[found.run.base_dtype]
        title = name if step is None else f"{name}, {_name_step(step)}"
    else:
        config = _file_config(file, adapter.notes, base, changes)
        name, title, dtype = file.stem, file.name, None
    config, info = _inspect(config)
    trigger = config.data.trigger or adapter.notes.get(TRIGGER)
    return SamplePlan(config, info, [], [(file, adapter)], name, title, trigger, name, dtype)


def _inspect(config: RunConfig) -> tuple[RunConfig, BaseInfo]:
    info = inspect_base(config.base, config.objective)
    return with_base_defaults(config, info), info


def plan_tree(
    tree: AdapterTree,
    names: Sequence[str] = (),
    *,
    strengths: Mapping[str, float] | None = None,
    base: str | None = None,
    out: str | Path | None = None,
    size: tuple[int, int] | None = None,
    force: bool = False,
    warn: Callable[[str], None] | None = None,
    **changes: Any,
) -> SamplePlan:
    """Checks a grid that compares nodes of a tree (by default all), each on top of its ancestors.

    `strengths`, by node name, replace those of the training. `base` is by default the one that the first node
    names. The rest is as for `plan_sample`.
    """
    names = list(names or tree.nodes)
    nodes = [tree.node(name) for name in names]
    columns = [Column()]
    for name, path in zip(names, tree.strengths(names, strengths, force=force), strict=True):
        columns.append(Column(tree.load_stack(path), path[name], name))
    for error in dict.fromkeys(str(error) for name in names for error in tree.path_errors(name)):
        if warn:
            warn(error)
    config, info = _inspect(_file_config(nodes[0].file, nodes[0].notes, base, changes))
    adapters = [(node.file, tree.load(node.name)) for node in nodes]
    trigger = next((node.notes[TRIGGER] for node in nodes if TRIGGER in node.notes), None)
    name, title = tree.folder.resolve().name, tree.folder.name
    return SamplePlan(config, info, columns, adapters, name, title, trigger).checked(size, out, warn)


def _file_config(
    file: Path, notes: Mapping[str, str], base: str | Path | None, changes: Mapping[str, Any]
) -> RunConfig:
    """Settings for a LoRA file: its base and the resolution of its training, from the metadata."""
    side = notes.get("sdlora.resolution", "")
    data = {"resolution": int(side)} if re.fullmatch("[0-9]{2,4}", side) else {}
    source = base_of(file, notes) if base is None else base
    return load_config().replace(base={"source": source}, sample=changes, data=data)


def base_of(file: Path, notes: Mapping[str, str]) -> str:
    """The base that a file's metadata names; raises a ConfigError if the name is not enough to find it."""
    name = notes.get("sdlora.base_name")
    if name == "builtin" or (name and name.count("/") == 1):
        return name
    known = f"was trained on {name}" if name else "does not name its base"
    raise ConfigError(f"--base is missing: {file} {known}; pass --base", key="option--base")
