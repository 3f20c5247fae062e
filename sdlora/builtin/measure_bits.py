"""Trains one style on a base of full, eight and four bits, and keeps what each run cost and learnt (R-48)."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from sdlora.builtin.short_run import train_shortly
from sdlora.evaluation.evaluate import evaluate
from sdlora.report.summary import losses_of
from sdlora.runs import RunFolder
from sdlora.writing import write_json

BASES: dict[str, dict[str, Any]] = {
    "full": {},
    "int8": {"base.quantize": "int8"},
    "nf4": {"base.quantize": "nf4"},
}
SEEDS = (0, 1, 2)


def measure(images: Path, base: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """One run: its UNet's bytes, the seconds of a step, and its loss where it learnt and where it is used."""
    run = train_shortly(images, folder, rate=2e-3, seed=seed, steps=steps, settings=BASES[base])
    rates = [event["steps_per_second"] for event in run.events("step")]
    memory = next(run.events("plan"))["memory"]["unet"]
    return {
        "base": base,
        "seed": seed,
        "steps": steps,
        "unet_bytes": sum(part["stored"] for part in memory.values()),
        "step_seconds": round(1 / statistics.median(rates), 3),
        **trained_and_used(run),
    }


def trained_and_used(run: RunFolder) -> dict[str, float]:
    """The held-out loss on the base it was trained on, and on the full one."""
    if run.read_config().base.quantize != "none":
        gap = evaluate(run, full_base=True).gap
        assert gap is not None
        return {"trained": gap.trained, "used": gap.used}
    last = list(losses_of(run, "heldout").values())[-1]
    return {"trained": last, "used": last}


def main() -> None:
    """Reads the arguments and measures what is missing, seed by seed."""
    parser = argparse.ArgumentParser(prog="python -m sdlora.builtin.measure_bits", description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON table; what it holds is not run again")
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    out: Path = arguments.out
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    known = {(row["seed"], row["base"], row["steps"]) for row in rows}
    for seed, base in itertools.product(SEEDS, BASES):
        if (seed, base, arguments.steps) not in known:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(arguments.images, base, seed, arguments.steps, Path(folder) / "run"))
            write_json(out, rows)
            print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
