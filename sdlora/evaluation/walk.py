"""Images of a run's saved steps at several strengths, for the same prompts and seeds; each is drawn once."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdlora.errors import ConfigError
from sdlora.evaluation.context import EvaluationContext
from sdlora.formats.files import load_adapter
from sdlora.lora.adapter import Adapter
from sdlora.runs import RunFolder
from sdlora.sampling.generate import Column, generate
from sdlora.sampling.images import SampledImage, SampleSettings, check_prompts, resolve_settings
from sdlora.tree.lineage import digest_adapter
from sdlora.writing import write_file

NUM_STEPS, NUM_PROMPTS = 5, 8
SEEDS, STRENGTHS = (0, 1), (0.5, 0.8, 1.0)

Row = tuple[str, int]
"""A prompt and a seed."""


@dataclass(frozen=True)
class Walk:
    """What is drawn: every saved step at every strength, for every prompt and seed.

    `steps` are saved steps, or "final".
    """

    steps: Sequence[int | str]
    strengths: Sequence[float]
    prompts: Sequence[str]
    seeds: Sequence[int]

    @property
    def rows(self) -> list[Row]:
        return list(itertools.product(self.prompts, self.seeds))

    @property
    def cells(self) -> list[tuple[int | str, float]]:
        return list(itertools.product(self.steps, self.strengths))


def plan_walk(
    run: RunFolder,
    captions: Sequence[str],
    *,
    steps: Sequence[int | str] = (),
    strengths: Sequence[float] = (),
    prompts: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Walk:
    """What to draw; what is not given is chosen.

    Args:
        run: The run.
        captions: Prompts to add to the run's own, up to `NUM_PROMPTS`.
        steps: Saved steps, or "final"; by default up to `NUM_STEPS`, evenly spaced, with the last.
        strengths: By default those of the run, if it has several; else `STRENGTHS`.
        prompts: By default the run's, and then captions.
        seeds: By default `SEEDS`.

    Raises:
        RunError: If a step was not saved.
        ConfigError: If a strength is 0, which is the base, or a prompt cannot be used.
    """
    config = run.read_config()
    if 0 in strengths:
        problem = "--strengths 0 is the base, which is always drawn; remove it"
        raise ConfigError(problem, key="option--strengths")
    own = [strength for strength in config.sample.strengths if strength]
    chosen = sorted(set(strengths or (own if len(own) > 1 else STRENGTHS)))
    trigger = config.data.trigger
    filled = [config.data.fill_trigger(prompt, trigger) for prompt in prompts or config.sample.prompts]
    if not prompts:
        filled = list(dict.fromkeys([*filled, *_evenly(captions, NUM_PROMPTS)]))[:NUM_PROMPTS]
    check_prompts(filled)
    saved = list(dict.fromkeys(steps)) or _choose_steps(run)
    for step in saved:
        run.saved_adapter(step)
    return Walk(saved, chosen, filled, list(dict.fromkeys(seeds)) or list(SEEDS))


def _choose_steps(run: RunFolder) -> list[int | str]:
    has_final = run.adapter.stem.startswith("final")
    last = run.step_of(run.adapter) if has_final else None
    steps: list[int | str] = [step for step in run.saved_steps() if step != last]
    return _evenly_to_end([*steps, "final"] if has_final else steps, NUM_STEPS)


def _evenly_to_end(values: Sequence[int | str], count: int) -> list[int | str]:
    """At most `count` values, evenly spaced, with the last."""
    count = min(count, len(values))
    return [values[-1 - (count - 1 - number) * len(values) // count] for number in range(count)]


def _evenly(values: Sequence[str], count: int) -> list[str]:
    unique = list(dict.fromkeys(values))
    return [unique[number * len(unique) // count] for number in range(min(count, len(unique)))]


class Gallery:
    """Images that a run's adapters draw, kept in the run: one is drawn only if it is not there yet."""

    def __init__(
        self, context: EvaluationContext, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.context, self.progress = context, progress
        size = context.config.data.resolution or context.base.info.resolution
        # A blank image would be measured, too.
        settings = replace(SampleSettings.of(context.config.sample, (size, size)), safety_checker=False)
        self.settings = resolve_settings(context.base.info, settings)
        self.folder = context.run.evaluation_images
        self.drawn = 0
        self._adapters: dict[int | str, tuple[Adapter, str]] = {}
        self._below = [f"{digest_adapter(one)}*{strength}" for one, strength in context.ancestors]

    def adapter(self, step: int | str) -> tuple[Adapter, str]:
        """The saved adapter of a step, and the digest of its file's tensors."""
        if step not in self._adapters:
            file = self.context.run.saved_adapter(step)
            self._adapters[step] = (load_adapter(file), digest_adapter(load_adapter(file, dtype=None)))
        return self._adapters[step]

    def draw(
        self, cells: Sequence[tuple[int | str, float] | None], rows: Sequence[Row]
    ) -> dict[tuple[int | str, float] | None, list[Image.Image]]:
        """Images of cells, (step, strength) or None for the base, in the order of the rows."""
        files = {cell: [self.file(cell, row) for row in rows] for cell in cells}
        missing = {
            cell: [row for row, file in zip(rows, own, strict=True) if not file.is_file()]
            for cell, own in files.items()
        }
        total, done = sum(map(len, missing.values())), 0
        # Strengths of one step share batches.
        for _, group in itertools.groupby(cells, lambda cell: cell and cell[0]):
            wanted = [cell for cell in group if missing[cell]]
            for prompts, seeds in _products([row for cell in wanted for row in missing[cell]]):
                columns = [self._column(cell) for cell in wanted]
                images = generate(
                    self.context.base,
                    columns,
                    prompts,
                    seeds,
                    self.settings,
                    progress=lambda now, _, done=done: self._show(done + now, total),  # type: ignore[misc]
                )
                for number, sample in enumerate(images):
                    cell = wanted[number % len(wanted)]
                    self._write(self.file(cell, (sample.prompt, sample.seed)), sample, cell)
                done += len(images)
                self.drawn += len(images)
        return {cell: [_read(file) for file in own] for cell, own in files.items()}

    def file(self, cell: tuple[int | str, float] | None, row: Row) -> Path:
        """The file of an image, named after everything that decides what it shows."""
        settings = {**asdict(self.settings), "batch_size": None}
        stack = [*self._below, f"{self.adapter(cell[0])[1]}*{cell[1]:g}"] if cell else []
        values = [self.context.base.info.digest, stack, *row, settings]
        text = json.dumps(values, sort_keys=True, ensure_ascii=True)
        return self.folder / f"{hashlib.sha256(text.encode('ascii')).hexdigest()[:20]}.png"

    def _column(self, cell: tuple[int | str, float] | None) -> Column:
        if cell is None:
            return Column()
        step, strength = cell
        return Column((*self.context.ancestors, (self.adapter(step)[0], strength)), strength, str(step))

    def _show(self, done: int, total: int) -> None:
        if self.progress:
            self.progress(done, total)

    def _write(self, file: Path, sample: SampledImage, cell: tuple[int | str, float] | None) -> None:
        step, strength = cell or (None, 0.0)
        values: Mapping[str, Any] = {
            "prompt": sample.prompt,
            "seed": sample.seed,
            "step": step,
            "strength": strength,
            **asdict(sample.settings),
        }
        info = PngInfo()
        info.add_text("sdlora", json.dumps(values))
        write_file(file, lambda path: sample.image.save(path, "PNG", pnginfo=info))


def _products(rows: Sequence[Row]) -> list[tuple[list[str], list[int]]]:
    """Rows as prompts times seeds: prompts that lack the same seeds are drawn together."""
    by_prompt: dict[str, set[int]] = {}
    for prompt, seed in rows:
        by_prompt.setdefault(prompt, set()).add(seed)
    groups: dict[tuple[int, ...], list[str]] = {}
    for prompt, seeds in by_prompt.items():
        groups.setdefault(tuple(sorted(seeds)), []).append(prompt)
    return [(prompts, list(seeds)) for seeds, prompts in groups.items()]


def _read(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
