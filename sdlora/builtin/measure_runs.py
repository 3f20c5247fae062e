"""Trains one style in many settings, and keeps what each run cost and learned: `make ranks`, `make bits`."""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from sdlora.builtin.script import Script
from sdlora.evaluation.evaluate import evaluate
from sdlora.report.summary import losses_of
from sdlora.runs import RunFolder
from sdlora.training.train import train
from sdlora.writing import write_json

Row: TypeAlias = dict[str, Any]

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SEEDS = (0, 1, 2)
BASES = {"full": "none", "int8": "int8", "nf4": "nf4"}


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
    script.add_argument("what", choices=("ranks", "bits"))
    script.add_argument("images", type=Path)
    script.add_argument("--out", type=Path, required=True, help="JSON table; what it holds is not run again")
    script.add_argument("--steps", type=int, default=100)

    def work(given: Namespace) -> None:
        rows: Iterable[Row]
        if given.what == "ranks":
            rates = [(rank, rate) for rank in RANKS for rate in rates_of(rank)]
            rows = (
                {"rank": rank, "learning_rate": rate, "seed": seed, "steps": given.steps}
                for seed, (rank, rate) in itertools.product(SEEDS, rates)
            )
            complete(given.out, rows, given.images, measure_rank)
        else:
            pairs = itertools.product(SEEDS, BASES)
            rows = ({"base": base, "seed": seed, "steps": given.steps} for seed, base in pairs)
            complete(given.out, rows, given.images, measure_bits)

    return script.run(work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
