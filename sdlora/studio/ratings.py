"""Two samples side by side without their names: which is better? The answers stay with the runs."""

from __future__ import annotations

import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

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


Side: TypeAlias = tuple[RunFolder, int, Sample]
"""A sample, with its run and the step of its grid."""
Pair: TypeAlias = tuple[Side, Side]


def read_samples(run: RunFolder, step: int) -> list[Sample]:
    """The images of a grid, from the metadata in each; those without, or withheld, are left out."""
    found = []
    for file in sorted(run.sample_folder(step).glob("[0-9]*.png")):
        with suppress(*UNREADABLE), Image.open(file, formats=("PNG",)) as image:
            notes = json.loads(image.info["sdlora"])
            if not notes.get("withheld"):
                found.append(Sample(file, str(notes["prompt"]), int(notes["seed"]), float(notes["strength"])))
    return found


def list_pairs(grids: Sequence[tuple[RunFolder, int]]) -> list[Pair]:
    """Pairs of samples of one prompt and seed: of two grids, or of two strengths of one."""
    rows: dict[tuple[str, int], list[list[Side]]] = defaultdict(lambda: [[], []])
    for number, (run, step) in enumerate(grids):
        for sample in read_samples(run, step):
            if sample.strength:
                rows[sample.prompt, sample.seed][number].append((run, step, sample))
    if len(grids) == 2:
        return [
            (one, two)
            for first, second in rows.values()
            for one in first
            for two in second
            if one[2].strength == two[2].strength
        ]
    return [pair for first, _ in rows.values() for pair in combinations(first, 2)]


def list_tied(run: RunFolder) -> list[Pair]:
    """Pairs of samples of one prompt and seed: of the recommended cell and those like it."""
    choice = read_choice(run)
    ties, cells = choice.get("ties"), set[tuple[Any, Any]]()
    for cell in (choice, *(ties if isinstance(ties, list) else ())):
        with suppress(AttributeError, TypeError):  # of a file that somebody has edited
            step = cell.get("step")
            cells.add((run.step_of(run.adapter) if step == "final" else step, cell.get("strength")))
    rows: dict[tuple[str, int], list[Side]] = defaultdict(list)
    for one in find_images(run):
        if (one.step, one.strength) in cells:
            sample = Sample(one.file, one.prompt, one.seed, one.strength)
            rows[one.prompt, one.seed].append((run, one.step, sample))
    every = (pair for row in rows.values() for pair in combinations(row, 2))
    return [pair for pair in every if _cell(pair[0]) != _cell(pair[1])]


def choose_pair(pairs: Sequence[Pair], answers: Sequence[Mapping[str, Any]]) -> tuple[Pair, int]:
    """One of the pairs that were answered least, in random order, and how many have no answer yet."""
    given = Counter(_name(row["prompt"], row["seed"], row["first"], row["second"]) for row in answers)
    counts = [given[_name(one[2].prompt, one[2].seed, describe(*one), describe(*two))] for one, two in pairs]
    fewest = min(counts)
    least = [pair for pair, count in zip(pairs, counts, strict=True) if count == fewest]
    first, second = random.sample(random.choice(least), 2)
    return (first, second), counts.count(0)


def _name(prompt: str, seed: int, *sides: Mapping[str, Any]) -> tuple[Any, ...]:
    return prompt, seed, frozenset((side["run"], side["grid"], side["strength"]) for side in sides)


def _cell(side: Side) -> tuple[int, float]:
    return side[1], side[2].strength


def describe(run: RunFolder, step: int, sample: Sample) -> dict[str, Any]:
    return {"run": run.name, "grid": step, "strength": sample.strength}


def add_rating(sides: Pair, choice: str) -> None:
    """Writes an answer into each run, by the names of the two samples."""
    sample = sides[0][2]
    first, second = (describe(*side) for side in sides)
    row = {"step": sides[0][1], "time": round(time.time(), 3), "prompt": sample.prompt, "seed": sample.seed}
    for run in {side[0].path: side[0] for side in sides}.values():
        append_lines(run.ratings_file, [{**row, "first": first, "second": second, "choice": choice}])
