"""Two samples side by side without their names: which is better? The answers stay with the runs."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora.evaluation.tiles import find_images, read_choice
from sdlora.runs import RunFolder
from sdlora.writing import append_lines

UNREADABLE = (OSError, ValueError, KeyError, TypeError, Image.DecompressionBombError)
CHOICES = ("first", "second", "equal")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a grid, with what it shows."""

    file: Path
    prompt: str
    seed: int
    strength: float


def read_samples(run: RunFolder, step: int) -> list[Sample]:
    """The images of a grid, from the metadata in each; those without, or withheld, are left out."""
    found = []
    for file in sorted(run.sample_folder(step).glob("[0-9]*.png")):
        with suppress(*UNREADABLE), Image.open(file, formats=("PNG",)) as image:
            notes = json.loads(image.info["sdlora"])
            if not notes.get("withheld"):
                found.append(Sample(file, str(notes["prompt"]), int(notes["seed"]), float(notes["strength"])))
    return found


def choose_pair(sides: Sequence[tuple[RunFolder, int]]) -> tuple[tuple[RunFolder, int, Sample], ...] | None:
    """Two samples of one prompt and seed, in random order: of two grids, or of two strengths of one."""
    rows: dict[tuple[str, int], list[list[tuple[RunFolder, int, Sample]]]] = defaultdict(lambda: [[], []])
    for number, (run, step) in enumerate(sides):
        for sample in read_samples(run, step):
            if sample.strength:
                rows[sample.prompt, sample.seed][number].append((run, step, sample))
    if len(sides) == 2:
        pairs = [
            (one, two)
            for first, second in rows.values()
            for one in first
            for two in second
            if one[2].strength == two[2].strength
        ]
    else:
        pairs = [(one, two) for first, _ in rows.values() for one in first for two in first if one != two]
    if not pairs:
        return None
    pair = random.choice(pairs)
    return tuple(random.sample(pair, 2))


def choose_tied(run: RunFolder) -> tuple[tuple[RunFolder, int, Sample], ...] | None:
    """Two samples of one prompt and seed, in random order: of the recommended cell and those like it."""
    choice = read_choice(run)
    ties, cells = choice.get("ties"), set[tuple[Any, Any]]()
    for cell in (choice, *(ties if isinstance(ties, list) else ())):
        with suppress(AttributeError, TypeError):  # of a file that somebody has edited
            step = cell.get("step")
            cells.add((run.step_of(run.adapter) if step == "final" else step, cell.get("strength")))
    rows: dict[tuple[str, int], list[tuple[RunFolder, int, Sample]]] = defaultdict(list)
    for one in find_images(run):
        if (one.step, one.strength) in cells:
            sample = Sample(one.file, one.prompt, one.seed, one.strength)
            rows[one.prompt, one.seed].append((run, one.step, sample))
    every = (pair for row in rows.values() for pair in combinations(row, 2))
    pairs = [pair for pair in every if _cell(pair[0]) != _cell(pair[1])]
    return tuple(random.sample(random.choice(pairs), 2)) if pairs else None


def _cell(side: tuple[RunFolder, int, Sample]) -> tuple[int, float]:
    return side[1], side[2].strength


def describe(run: RunFolder, step: int, sample: Sample) -> dict[str, Any]:
    return {"run": run.name, "grid": step, "strength": sample.strength}


def add_rating(sides: Sequence[tuple[RunFolder, int, Sample]], choice: str) -> None:
    """Writes an answer into each run, by the names of the two samples."""
    sample = sides[0][2]
    first, second = (describe(*side) for side in sides)
    row = {"step": sides[0][1], "time": round(time.time(), 3), "prompt": sample.prompt, "seed": sample.seed}
    for run in {side[0].path: side[0] for side in sides}.values():
        append_lines(run.ratings_file, [{**row, "first": first, "second": second, "choice": choice}])
