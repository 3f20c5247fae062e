"""Images of a run's saved steps at several strengths, for the same prompts and seeds; each is drawn once."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeAlias

from PIL import Image

from sdlora.data.captions import without_trigger
from sdlora.errors import ConfigError
from sdlora.evaluation.context import EvaluationContext
from sdlora.formats.files import load_adapter
from sdlora.lora.adapter import Adapter
from sdlora.runs import RunFolder
from sdlora.sampling.generate import Cell, Column, draw
from sdlora.sampling.images import SampleSettings, as_prompt, check_prompts, resolve_settings, slug
from sdlora.sampling.store import KEY_LENGTH, ImageStore

NUM_STEPS, NUM_PROMPTS = 5, 8
SEEDS, STRENGTHS = (0, 1), (0.5, 0.8, 1.0)

Row: TypeAlias = tuple[str, int]
"""A prompt and a seed."""
SweepPoint: TypeAlias = tuple[int | str, float] | None
"""A saved step, or "final", at a strength; None is the base."""


@dataclass(frozen=True)
class Sweep:
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


def plan_sweep(
    run: RunFolder,
    captions: Sequence[str],
    *,
    steps: Sequence[int | str] = (),
    strengths: Sequence[float] = (),
    prompts: Sequence[str] = (),
    seeds: Sequence[int] = (),
) -> Sweep:
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
    check_wanted(run, steps=steps, strengths=strengths)
    config = run.read_config()
    own = [strength for strength in config.sample.strengths if strength]
    chosen = sorted(set(strengths or (own if len(own) > 1 else STRENGTHS)))
    trigger = config.data.trigger
    given = (config.data.fill_trigger(prompt, trigger) for prompt in prompts or config.sample.prompts)
    filled = list(dict.fromkeys(given))
    if not prompts:
        # The trigger alone shows no thing that could be kept.
        texts = map(as_prompt, captions)
        showing = [text for text in texts if not trigger or without_trigger(text, trigger)]
        filled = list(dict.fromkeys([*filled, *_evenly(showing, NUM_PROMPTS)]))[:NUM_PROMPTS]
    check_prompts(filled)
    saved = list(dict.fromkeys(steps)) or _choose_steps(run)
    return Sweep(saved, chosen, filled, list(dict.fromkeys(seeds)) or list(SEEDS))


def check_wanted(
    run: RunFolder,
    *,
    steps: Sequence[int | str] = (),
    strengths: Sequence[float] = (),
    prompts: Sequence[str] = (),
) -> None:
    """Checks what is asked for before anything is drawn; raises as `plan_sweep`."""
    if 0 in strengths:
        problem = "--strengths 0 is the base, which is always drawn; remove it"
        raise ConfigError(problem, key="option--strengths")
    data = run.read_config().data
    if prompts:
        check_prompts([data.fill_trigger(prompt) for prompt in prompts])
    for step in steps:
        run.saved_adapter(step)


def _choose_steps(run: RunFolder) -> list[int | str]:
    has_final = run.adapter.stem.startswith("final")
    last = run.step_of(run.adapter) if has_final else None
    steps: list[int | str] = [step for step in run.saved_steps() if step != last]
    steps += ["final"] if has_final else []
    count = min(NUM_STEPS, len(steps))
    # Evenly spaced, with the last.
    return [steps[-1 - (count - 1 - number) * len(steps) // count] for number in range(count)]


def _evenly(values: Sequence[str], count: int) -> list[str]:
    unique = list(dict.fromkeys(values))
    return [unique[number * len(unique) // count] for number in range(min(count, len(unique)))]


class SampleGallery:
    """Images that a run's adapters draw, kept in the run: one is drawn only if it is not there yet."""

    def __init__(
        self, context: EvaluationContext, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.context, self.progress = context, progress
        size = context.config.data.resolution or context.base.info.resolution
        # A blank image would be measured, too.
        settings = replace(SampleSettings.of(context.config.sample, (size, size)), safety_checker=False)
        self.settings = resolve_settings(context.base.info, settings)
        self.store = ImageStore(context.run.evaluation_images)
        self._adapters: dict[int | str, Adapter] = {}
        # Text states are encoded once for each.
        self._columns: dict[SweepPoint, Column] = {}

    def adapter(self, step: int | str) -> Adapter:
        """The saved adapter of a step."""
        if step not in self._adapters:
            self._adapters[step] = load_adapter(self.context.run.saved_adapter(step))
        return self._adapters[step]

    def draw(self, places: Sequence[SweepPoint], rows: Sequence[Row]) -> dict[SweepPoint, list[Image.Image]]:
        """Images of each place, in the order of the rows."""
        cells = [self._cell(place, row) for place in places for row in rows]
        made = draw(self.context.base, cells, store=self.store, progress=self.progress)
        images = [sample.image for sample in made]
        return {place: images[n * len(rows) : (n + 1) * len(rows)] for n, place in enumerate(places)}

    def file(self, place: SweepPoint, row: Row) -> str:
        """The file of a drawn image, relative to the run: that of the base is a copy of the cache's."""
        file, run = self.store.file(self.context.base, self._cell(place, row)), self.context.run
        assert file is not None
        if place is None:
            name = slug(f"{row[0][:40]}-{row[1]}-base")
            copy = run.evaluation_images / f"{name}-{file.stem[:KEY_LENGTH]}.png"
            if not copy.is_file():
                # The cache may be full; the report shows no base then.
                with suppress(OSError):
                    shutil.copyfile(file, copy)
            file = copy
        return file.relative_to(run.path).as_posix()

    def _cell(self, place: SweepPoint, row: Row) -> Cell:
        if place not in self._columns:
            self._columns[place] = self._column(place)
        return Cell(self._columns[place], *row, self.settings)

    def _column(self, place: SweepPoint) -> Column:
        if place is None:
            return Column()
        step, strength = place
        name = step if isinstance(step, str) else f"step {step}"
        return Column((*self.context.ancestors, (self.adapter(step), strength)), strength, name)
