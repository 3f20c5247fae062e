"""Grids of a run, a LoRA file, nodes of a tree or the base: everything is checked first, then drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from sdlora.config import RunConfig, load_config
from sdlora.data.captions import trigger_pattern
from sdlora.data.folders import is_image
from sdlora.data.images import IMAGE_SUFFIXES, load_image
from sdlora.dtypes import DTYPES, has_bf16
from sdlora.errors import ConfigError
from sdlora.lora.adapter import Adapter, check_base
from sdlora.lora.attach import check_fit
from sdlora.lora.layers import carrier_layers
from sdlora.models.info import BaseInfo, inspect_base, with_base_defaults
from sdlora.models.load import load_base
from sdlora.models.safety import missing_checker
from sdlora.models.tokenizer import describe_bracketed_prompts, describe_cut_prompts
from sdlora.models.weights import empty_components
from sdlora.sampling.generate import Cell, Column, Store, draw
from sdlora.sampling.grid import make_grid
from sdlora.sampling.images import (
    SampledImage,
    SampleSettings,
    StartImage,
    check_prompts,
    resolve_settings,
    save_images,
)
from sdlora.sampling.sources import (
    TRIGGER,
    Source,
    Step,
    Subject,
    describe_subjects,
    find_subjects,
    make_columns_of,
)
from sdlora.sampling.store import ImageStore
from sdlora.sampling.targets import Targets, find_run_targets
from sdlora.tree.tree import AdapterTree
from sdlora.writing import check_writable, next_free_folder

DENOISE = 0.6
MAX_TRIGGER = 1000


@dataclass(frozen=True)
class SampleRequest:
    """What is asked for, beside the sources.

    Args:
        base: The base; by default the run's, or the one that the file names.
        step: Step of the saved adapter, or "final"; several are drawn beside each other. By default the
            final one, or the newest of an unfinished run.
        out: Output folder; by default `samples/NAME`.
        size: Width and height in pixels; by default those of the training.
        force: Accepts changed ancestors of a child, and ignores missing ones.
        warn: Called with a line if an adapter may not fit, such as to another base of the same family.
        settings: Keys of the section `sample`; None stands for the run's, or the base's.
        axes: Several values of guidance, scheduler or steps, which multiply the columns.
        image: An image to start from, and the share of the steps that are then run.
    """

    base: str | Path | None = None
    step: Step | Sequence[Step] = None
    out: str | Path | None = None
    size: tuple[int, int] | None = None
    force: bool = False
    warn: Callable[[str], None] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    image: tuple[str | Path, float] | None = None

    @property
    def steps(self) -> Sequence[Step]:
        return [self.step] if self.step is None or isinstance(self.step, int | str) else self.step or [None]

    @property
    def given(self) -> dict[str, Any]:
        return {name: value for name, value in self.settings.items() if value is not None}


@dataclass(frozen=True)
class SamplePlan:
    """A grid to draw; `checked` fills in `config` and what follows `subjects`.

    `adapters` are all that are mounted in a column, each with its file; `trigger` replaces `{trigger}` in
    prompts of columns without their own; `name` is that of the output folder, `adapter` that in the metadata
    of the images. Without a dtype, the base gets the one that suits the device.
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
    subjects: Sequence[Subject] = ()
    out: str | Path | None = None
    prompts: Sequence[str] = ()
    settings: Sequence[SampleSettings] = ()
    targets: Targets | None = None

    def checked(self, request: SampleRequest, *, resumes: bool = False) -> SamplePlan:
        """Checks everything that can be checked before weights are loaded, and resolves the settings.

        With `resumes`, the output folder may have a grid.
        """
        config, info, warn = self.config, self.info, request.warn
        if not resumes:
            choose_folder(request.out, self.name, config.images)
        if not config.sample.prompts:
            raise ConfigError("sample.prompts is empty; pass --prompt TEXT, or a run folder with prompts")
        notes = [
            check_base(adapter, family=info.family, name=info.name, digest=info.digest, source=str(file))
            for file, adapter in self.adapters
        ]
        if config.sample.safety_checker and info.names_safety_checker:
            notes.append(missing_checker(info))
        prompts = self._prompts()
        filled = [config.data.fill_trigger(prompt, self.trigger) for prompt in prompts]
        check_prompts(filled)
        side, start, size = config.data.resolution or info.resolution, None, None
        targets = find_run_targets(config, filled) if config.images else None
        if request.image:
            start, size = StartImage.open(*request.image, side, info.min_step)
            shown = load_image(start.path)
            targets = Targets(dict.fromkeys(filled, shown), (), "image")
        for note in dict.fromkeys(notes):
            if note and warn:
                warn(note)
        plain = SampleSettings.of(config.sample, request.size or size or (side, side))
        plain = replace(plain, start=start)
        points = [dict(zip(request.axes, values, strict=True)) for values in product(*request.axes.values())]
        settings = [resolve_settings(info, replace(plain, **point)) for point in points]
        if self.adapters:
            text = any(adapter.changes_text for _, adapter in self.adapters)
            layers = carrier_layers(empty_components(info, text=text))
            for file, adapter in self.adapters:
                check_fit(adapter.without(info.unread_layer), layers, str(file))
        config = config.model_copy(update={"sample": config.sample.model_copy(update={"prompts": filled})})
        return replace(
            self, config=config, out=request.out, prompts=prompts, settings=settings, targets=targets
        )

    def _prompts(self) -> list[str]:
        """The prompts; where adapters differ in their triggers, it becomes `{trigger}` again."""
        prompts = list(self.config.sample.prompts)
        triggers = {column.trigger for column in self.columns if column.trigger}
        if len(triggers) < 2 or not self.trigger:
            return prompts
        pattern = trigger_pattern(self.trigger)
        return [pattern.sub("{trigger}", prompt) for prompt in prompts]

    def notes(self) -> list[str]:
        """Lines about words that the base does not know or read, and target images that are left out."""
        sample = self.config.sample
        unknown = self.info.describe_unknown_words(sample.prompts, self.trigger)
        texts = [*sample.prompts, sample.negative_prompt]
        cut, bracketed = describe_cut_prompts(self.info, texts), describe_bracketed_prompts(self.info, texts)
        lines = [line for line in (unknown, cut, bracketed) if line]
        if self.subjects and self.targets is None:
            folder = self.config.images
            reason = f"cannot read {folder}" if folder else "only a run knows its image folder"
            lines.append(f"no target images beside the samples: {reason}")
        return lines

    def draw(
        self, store: Store | None = None, progress: Callable[[int, int], None] | None = None
    ) -> list[SampledImage]:
        """Loads the base and draws the images of all rows, columns and settings, in this order."""
        device = choose_device()
        is_fast = device.type != "cpu" and has_bf16(device)
        dtype = self.dtype or (torch.bfloat16 if is_fast else torch.float32)
        base = load_base(self.info, dtype=dtype, device=device)
        # As a run has them.
        base.use_cpu_kernels()
        fill, seeds = self.config.data.fill_trigger, self.config.sample.seeds
        cells = [
            Cell(column, fill(prompt, column.trigger or self.trigger), seed, settings)
            for prompt, seed in product(self.prompts, seeds)
            for settings, column in product(self.settings, self.columns)
        ]
        return draw(base, cells, store=store, progress=progress)

    def in_rows(self, images: Sequence[SampledImage]) -> list[SampledImage]:
        """The images for a grid: those of one row have one prompt, whatever their triggers."""
        triggers = {column.trigger or self.trigger for column in self.columns}
        labels = self.prompts if len(triggers) > 1 else self.config.sample.prompts
        width = len(images) // len(labels)
        return [replace(image, prompt=labels[place // width]) for place, image in enumerate(images)]

    def make(self, progress: Callable[[int, int], None] | None = None) -> Path:
        """Draws the grid and returns its path; `progress` gets (finished, total) images."""
        folder = choose_folder(self.out, self.name, self.config.images)
        images = self.draw(ImageStore(), progress)
        grid = make_grid(self.in_rows(images), title=self.title, targets=self.targets)
        return save_images(folder, images, grid, {"base": self.info.name, "adapter": self.adapter})


def choose_folder(out: str | Path | None, name: str, images: str = "") -> Path:
    """The folder of a grid, by default `samples/NAME`.

    Raises an error if it contains images, lies in the image folder `images`, or is not writable.
    """
    folder = Path(out) if out is not None else next_free_folder(Path("samples") / name)
    if folder.suffix.lower() in IMAGE_SUFFIXES and not folder.is_dir():
        problem = f"--out {folder} is the name of an image; use a folder, which gets grid.png and each image"
        raise ConfigError(problem, key="option--out.image")
    entries = folder.iterdir() if folder.is_dir() else ()
    there = [path.name for path in entries if is_image(path.name) and not path.name.startswith(".")]
    if there:
        what = "a grid" if "grid.png" in there else f"images, such as {min(there)}"
        raise ConfigError(
            f"--out {folder} already contains {what}; use another folder", key="option--out.grid"
        )
    if images and folder.resolve().is_relative_to(Path(images).resolve()):
        problem = f"--out {folder} is in the image folder {images}; use another folder"
        raise ConfigError(problem, key="option--out.images")
    check_writable(folder)
    return folder


def choose_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def sample(
    sources: Source | Sequence[Source] | None = None,
    *,
    base: str | Path | None = None,
    step: Step | Sequence[Step] = None,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    strengths: Sequence[float] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    negative_prompt: str | None = None,
    safety_checker: bool | None = None,
    batch_size: int | None = None,
    size: tuple[int, int] | None = None,
    image: str | Path | None = None,
    denoise: float = DENOISE,
    out: str | Path | None = None,
    force: bool = False,
    warn: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draws a grid of runs, LoRA files or the base alone; a child is drawn on top of its ancestors.

    Args:
        sources: A `Source`, or several side by side; None for the base.
        base: The base; by default the first run's, or the one that the file names.
        step: A saved step of a run, "final", or several; by default the final one, or the newest.
        prompts: By default the run's, as everything that follows; `{trigger}` is replaced.
        seeds: One row for each prompt and seed.
        strengths: One column each, beside the base.
        steps: Sampling steps.
        guidance: Guidance scale.
        scheduler: A diffusers scheduler, such as `DDIMScheduler`.
        negative_prompt: The negative prompt.
        safety_checker: Whether to use the base's own, if it has one.
        batch_size: Images at once.
        size: Width and height in pixels; by default those of the training.
        image: An image file to start from (img2img), in whose aspect ratio the samples are then drawn.
        denoise: Share of the steps that are run on it: near 0 keeps it. diffusers calls it strength.
        out: Output folder; by default `samples/NAME`.
        force: Accepts changed ancestors of a child, and ignores missing ones.
        warn: Called with a line if an adapter may not fit, such as to another base of the same family.
        progress: Called with (finished, total) images.

    Returns:
        Path of the grid.

    Raises:
        SdloraError: If something does not exist or does not fit.
    """
    settings = {
        "prompts": prompts, "seeds": seeds, "strengths": strengths, "steps": steps, "guidance": guidance,
        "scheduler": scheduler, "negative_prompt": negative_prompt, "safety_checker": safety_checker,
        "batch_size": batch_size,
    }  # fmt: skip
    start = (image, denoise) if image else None
    request = SampleRequest(base, step, out, size, force, warn, settings, image=start)
    return plan_sample(sources, request).checked(request).make(progress)


def plan_sample(sources: Source | Sequence[Source] | None, request: SampleRequest) -> SamplePlan:
    """The plan of a grid, unchecked; raises a SdloraError for sources that cannot be read."""
    base, settings, steps = request.base, request.given, request.steps
    chosen = {} if base is None else {"source": base, "revision": None, "variant": None}
    if sources is None or (isinstance(sources, Sequence) and not sources):
        if steps != [None]:
            raise ConfigError(f"--step {steps[0]} requires a run; pass its folder", key="option--step")
        config, info = _inspect(load_config().replace(base=chosen, sample=settings))
        return SamplePlan(config, info, [Column()], [], "base", "base")
    subjects = find_subjects(sources, steps, force=request.force, warn=request.warn)
    parts = [part for subject in subjects for part in subject.parts]
    first = next((part for part in parts if part.run), parts[0])
    if first.run:
        config = first.run.read_config().replace(base=chosen, sample=settings)
        dtype = DTYPES[first.run.base_dtype]
    else:
        config, dtype = _file_config(first.file, first.adapter.notes, base, settings), None
    config, info = _inspect(config)
    columns = make_columns_of(subjects, config.sample.strengths, own="strengths" not in settings)
    adapters = [(entry.file, entry.adapter) for part in parts for entry in part.ancestors]
    adapters += [(part.file, part.adapter) for part in parts]
    title, name, adapter = describe_subjects(subjects)
    trigger = config.data.trigger or first.trigger
    return SamplePlan(config, info, columns, adapters, name, title, trigger, adapter, dtype, subjects)


def _inspect(config: RunConfig) -> tuple[RunConfig, BaseInfo]:
    info = inspect_base(config.base, config.objective, config.data)
    return with_base_defaults(config, info), info


def plan_tree(
    tree: AdapterTree,
    names: Sequence[str],
    request: SampleRequest,
    strengths: Mapping[str, float] | None = None,
) -> SamplePlan:
    """Checks a grid that compares nodes of a tree (by default all), each on top of its ancestors.

    `strengths`, by node name, replace those of the training. The base is by default the one that the first
    node names.
    """
    names = list(names or tree.nodes)
    nodes = [tree.node(name) for name in names]
    columns = [Column()]
    for name, path in zip(names, tree.strengths(names, strengths, force=request.force), strict=True):
        columns.append(Column(tree.load_stack(path), path[name], name))
    for error in dict.fromkeys(str(error) for name in names for error in tree.path_errors(name)):
        if request.warn:
            request.warn(error)
    settings = _file_config(nodes[0].file, nodes[0].notes, request.base, request.given)
    config, info = _inspect(settings)
    adapters = [(node.file, tree.load(node.name)) for node in nodes]
    trigger = next((node.notes[TRIGGER] for node in nodes if TRIGGER in node.notes), None)
    name, title = tree.folder.resolve().name, tree.folder.name
    return SamplePlan(config, info, columns, adapters, name, title, trigger).checked(request)


def _file_config(
    file: Path, notes: Mapping[str, str], base: str | Path | None, changes: Mapping[str, Any]
) -> RunConfig:
    """Settings for a LoRA file: its base, resolution and reading of text in training, from the metadata."""
    keys = {
        "resolution": "sdlora.resolution",
        "clip_skip": "ss_clip_skip",
        "prompt_chunks": "sdlora.prompt_chunks",
    }
    found = {name: notes.get(key, "") for name, key in keys.items()}
    data: dict[str, Any] = {
        name: int(text) for name, text in found.items() if re.fullmatch("[1-9][0-9]{0,3}", text)
    }
    trigger = notes.get(TRIGGER, "").strip()
    # What no run could have had is a stranger's text.
    data["trigger"] = trigger if 0 < len(trigger) <= MAX_TRIGGER else None
    data["prompt_weights"] = notes.get("sdlora.prompt_weights") == "true"
    source = base_of(file, notes) if base is None else base
    return load_config().replace(base={"source": source}, sample=changes, data=data)


def base_of(file: Path, notes: Mapping[str, str]) -> str:
    """The base that a file's metadata names; raises a ConfigError if the name is not enough to find it."""
    name = notes.get("sdlora.base_name")
    if name == "builtin" or (name and name.count("/") == 1):
        return name
    known = f"was trained on {name}" if name else "does not name its base"
    raise ConfigError(f"--base is missing: {file} {known}; pass --base", key="option--base")
