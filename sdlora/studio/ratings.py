"""Two samples side by side without their names: which is better? The answers stay with the runs."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sdlora.reading import UnfitFileError, read_bytes
from sdlora.runs import RunFolder
from sdlora.writing import append_lines

MAX_BYTES = 2**24
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


def describe(run: RunFolder, step: int, sample: Sample) -> dict[str, Any]:
    return {"run": run.name, "grid": step, "strength": sample.strength}


def add_rating(sides: Sequence[tuple[RunFolder, int, Sample]], choice: str) -> None:
    """Writes an answer into each run, by the names of the two samples."""
    sample = sides[0][2]
    first, second = (describe(*side) for side in sides)
    row = {"step": sides[0][1], "time": round(time.time(), 3), "prompt": sample.prompt, "seed": sample.seed}
    for run in {side[0].path: side[0] for side in sides}.values():
        append_lines(run.ratings_file, [{**row, "first": first, "second": second, "choice": choice}])


def count_wins(run: RunFolder) -> list[dict[str, Any]]:
    """How often each sample column was preferred, of how many answers."""
    wins: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    with suppress(OSError, UnfitFileError):
        for line in read_bytes(run.ratings_file, MAX_BYTES).splitlines():
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                row = json.loads(line)
                score = {"first": 1.0, "second": 0.0, "equal": 0.5}[row["choice"]]
                for side, won in ((row["first"], score), (row["second"], 1 - score)):
                    wins[side["run"], side["grid"], side["strength"]].append(won)
    return [
        {"run": name, "grid": step, "strength": strength, "wins": sum(won), "answers": len(won)}
        for (name, step, strength), won in sorted(wins.items())
    ]
