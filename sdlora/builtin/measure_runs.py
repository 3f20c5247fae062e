"""Trains one style in many settings, and keeps what each run cost and learned: `make ranks`, `make bits`."""

from __future__ import annotations

import itertools
import json
import shutil
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from sdlora.builtin.script import Script
from sdlora.config import BaseSection, DataSection
from sdlora.data.scan import scan_dataset
from sdlora.errors import TrainingDiverged
from sdlora.evaluation.choose import choose
from sdlora.evaluation.evaluate import evaluate
from sdlora.models.info import inspect_base
from sdlora.report.summary import losses_of
from sdlora.runs import RunFolder
from sdlora.training.train import train
from sdlora.writing import write_json

Row: TypeAlias = dict[str, Any]

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SEEDS = (0, 1, 2)
BASES = {"full": "none", "int8": "int8", "nf4": "nf4"}
TRIGGER = "inky hand"
# Settings and number of training images (0: all) of a run that goes wrong, and what must be said about it.
SMEARS: dict[str, tuple[Row, int, str]] = {
    "bare trigger": ({"data.trigger": TRIGGER, "train.steps": 200}, 0, "captions are"),
    "rate x10": ({"train.learning_rate": 10.0, "train.steps": 200}, 0, "lower train.learning_rate"),
    "two images": ({"train.steps": 160}, 2, "too few to tell a style"),
    # With the base's own range of timesteps, which leaves the layout alone, nothing is copied.
    "copies": ({"train.steps": 3000, "objective.timestep_range": [0, 1000]}, 12, "copies"),
}


def rates_of(rank: int) -> tuple[float, ...]:
    """Learning rates on both sides of the best, which falls with the rank."""
    if rank <= 8:
        return (1e-3, 2e-3, 4e-3, 8e-3)
    return (1e-3, 2e-3, 4e-3) if rank <= 32 else (5e-4, 1e-3, 2e-3, 4e-3)


def measure_rank(images: Path, row: Row, folder: Path) -> Row:
    """The losses on the held-out images, the CPU time and the size of the file of a run."""
    started = time.process_time()
    run = train_shortly(images, folder, row, {"lora.rank": row["rank"]})
    losses = list(losses_of(run, "heldout").values())
    return {
        "before": losses[0],
        "after": losses[-1],
        "cpu_seconds": round(time.process_time() - started, 1),
        "trainable_parameters": next(run.events("plan"))["trainable_parameters"],
        "file_bytes": run.adapter.stat().st_size,
    }


def measure_bits(images: Path, row: Row, folder: Path) -> Row:
    """The UNet's bytes, the seconds of a step, and the loss on the base that it saw and on the full one."""
    quantize = BASES[row["base"]]
    run = train_shortly(images, folder, row, {"base.quantize": quantize})
    rates = [event["steps_per_second"] for event in run.events("step")]
    memory = next(run.events("plan"))["memory"]["unet"]
    trained = used = list(losses_of(run, "heldout").values())[-1]
    if quantize != "none":
        gap = evaluate(run, full_base=True).gap
        assert gap is not None
        trained, used = gap.trained, gap.used
    return {
        "unet_bytes": sum(part["stored"] for part in memory.values()),
        "step_seconds": round(1 / statistics.median(rates), 3),
        "trained": trained,
        "used": used,
    }


def measure_smear(images: Path, row: Row, folder: Path) -> Row:
    """What is said about a run that goes wrong, and whether the right warning is among it."""
    settings, count, expected = SMEARS[row["case"]]
    index, is_bare = scan_dataset(images, DataSection()), "data.trigger" in settings
    places = {"": index.records[:count]} if count else {"": index.records, "heldout": index.heldout}
    for place, records in places.items():
        chosen = folder.with_name("images") / place
        chosen.mkdir(parents=True)
        for record in records:
            shutil.copy(record.path, chosen)
            caption = TRIGGER if is_bare else record.caption
            (chosen / record.path.name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    words = "{trigger}, " if is_bare else ""
    rate = settings.get("train.learning_rate", 1.0) * inspect_base(BaseSection()).defaults.learning_rate
    overrides = {
        **settings,
        "sample.prompts": [words + record.caption for record in index.heldout[:8]],
        "train.learning_rate": rate,
        "train.seed": row["seed"],
        "train.save_every": settings["train.steps"] // 2,
        "train.sample_every": 0,
    }
    try:
        run = train(folder.with_name("images"), out=folder, overrides=overrides, quiet=True)
        choice = choose(run, strengths=[0.5, 1.0], seeds=[0])
    except TrainingDiverged as error:
        return {"is_right": row["case"] == "rate x10", "stopped": str(error)}
    cells = {cell.name: f"style {cell.style}, content {cell.content}" for cell in choice.cells}
    is_right = any(expected in warning for warning in choice.warnings)
    return {"is_right": is_right, "warnings": choice.warnings, "reason": choice.reason, "cells": cells}


def train_shortly(images: Path, folder: Path, row: Row, settings: Mapping[str, Any]) -> RunFolder:
    """Trains on the built-in base, saves nothing before the end, and measures the loss at both ends."""
    overrides = {
        "objective.timestep_range": [0, 1000],  # all that the held-out loss covers
        **settings,
        "train.learning_rate": row.get("learning_rate", 2e-3),
        "train.seed": row["seed"],
        "train.steps": row["steps"],
        "train.schedule": "cosine",
        "train.save_every": 0,
        "train.sample_every": 0,
        "train.evaluate_every": row["steps"],
    }
    return train(images, out=folder, overrides=overrides, quiet=True)


def complete(
    out: Path, wanted: Iterable[Row], images: Path, measure: Callable[[Path, Row, Path], Row]
) -> None:
    """Adds the rows that a JSON table lacks, one run each; it may be stopped at any time."""
    rows: list[Row] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    for row in wanted:
        if not any(row.items() <= known.items() for known in rows):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(row | measure(images, row, Path(folder) / "run"))
            write_json(out, rows)
            print(json.dumps(rows[-1]), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    script = Script("measure_runs", __doc__)
    script.add_argument("what", choices=("ranks", "bits", "smears"))
    script.add_argument("images", type=Path)
    script.add_argument("--out", type=Path, required=True, help="JSON table; what it holds is not run again")
    script.add_argument("--steps", type=int, default=100, help="of ranks and bits")
    script.add_argument("--cases", nargs="+", choices=SMEARS, default=list(SMEARS), help="of smears")
    script.add_argument("--seeds", nargs="+", type=int, default=SEEDS)

    def work(given: Namespace) -> None:
        rows: Iterable[Row]
        if given.what == "smears":
            pairs = itertools.product(given.seeds, given.cases)
            rows = ({"case": case, "seed": seed} for seed, case in pairs)
            complete(given.out, rows, given.images, measure_smear)
        elif given.what == "ranks":
            rates = [(rank, rate) for rank in RANKS for rate in rates_of(rank)]
            rows = (
                {"rank": rank, "learning_rate": rate, "seed": seed, "steps": given.steps}
                for seed, (rank, rate) in itertools.product(given.seeds, rates)
            )
            complete(given.out, rows, given.images, measure_rank)
        else:
            pairs = itertools.product(given.seeds, BASES)
            rows = ({"base": base, "seed": seed, "steps": given.steps} for seed, base in pairs)
            complete(given.out, rows, given.images, measure_bits)

    return script.run(work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
