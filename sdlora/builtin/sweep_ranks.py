"""Trains one style at many ranks, learning rates and seeds, and keeps what each run learnt."""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdlora.builtin.short_run import train_shortly
from sdlora.report.summary import losses_of
from sdlora.writing import write_json

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SEEDS = (0, 1, 2)
STEPS = 100


def rates_of(rank: int) -> tuple[float, ...]:
    """Learning rates on both sides of the best, which falls with the rank."""
    if rank <= 8:
        return (1e-3, 2e-3, 4e-3, 8e-3)
    return (1e-3, 2e-3, 4e-3) if rank <= 32 else (5e-4, 1e-3, 2e-3, 4e-3)


def measure(images: Path, rank: int, rate: float, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """One run's losses on the held-out images, its CPU time and the size of its file.

    Args:
        folder: Gets the run.
    """
    started = time.process_time()
    run = train_shortly(images, folder, rate=rate, seed=seed, steps=steps, settings={"lora.rank": rank})
    plan = next(run.events("plan"))
    losses = list(losses_of(run, "heldout").values())
    return {
        "rank": rank,
        "learning_rate": rate,
        "seed": seed,
        "steps": steps,
        "before": losses[0],
        "after": losses[-1],
        "cpu_seconds": round(time.process_time() - started, 1),
        "trainable_parameters": plan["trainable_parameters"],
        "file_bytes": run.adapter.stat().st_size,
    }


def sweep(
    images: Path,
    out: Path,
    ranks: Sequence[int],
    rates: Sequence[float] | None,
    seeds: Sequence[int],
    steps: int,
) -> None:
    """Adds what is missing to a table of runs, seed by seed, so that it can be stopped at any time.

    Args:
        out: A JSON list, read and written.
        rates: For every rank; None for those of `rates_of`.
    """
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    known = {(row["seed"], row["rank"], row["learning_rate"], row["steps"]) for row in rows}
    wanted = [(rank, rate) for rank in ranks for rate in rates or rates_of(rank)]
    for seed, (rank, rate) in itertools.product(seeds, wanted):
        if (seed, rank, rate, steps) in known:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(images, rank, rate, seed, steps, Path(folder) / "run"))
        write_json(out, rows)
        print(f"rank {rank}, rate {rate:g}, seed {seed}: {rows[-1]['after']:.4f}", flush=True)


def main() -> None:
    """Reads the arguments and sweeps."""
    parser = argparse.ArgumentParser(prog="python -m sdlora.builtin.sweep_ranks", description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON table; what it holds is not run again")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--rates", type=float, nargs="+", help="default: three or four for each rank")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    sweep(
        arguments.images,
        arguments.out,
        arguments.ranks,
        arguments.rates,
        arguments.seeds,
        arguments.steps,
    )


if __name__ == "__main__":
    main()
