"""Compares what `sdlora evaluate` recommends with a truth that it never saw: the judge, and other drawings.

The truth of a cell is the share of its samples that the judge recognizes, times their way from the base's own
images (0) to drawings of the set that the run never saw (1), by statistics of the judge's first layers.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdlora.builtin.judge import Judge, load_judge, open_rgb, recognise, to_input
from sdlora.builtin.script import Script
from sdlora.evaluation.scores import Draws, Weights
from sdlora.runs import RunFolder
from sdlora.writing import write_json

LAYERS = (2, 6)  # after the first convolution, and the second pooling
NUM_DRAWS = 1000

Cell = tuple[Any, float]


@torch.no_grad()
def line_statistics(judge: Judge, images: Sequence[Image.Image]) -> np.ndarray:
    """The Gram matrix of each layer, (N, D): how things are drawn, not where."""
    state, parts = to_input(images).float() / 127.5 - 1, []
    for number, layer in enumerate(judge.layers):
        state = layer(state)
        if number in LAYERS:
            flat = state.flatten(2)
            gram = flat @ flat.transpose(1, 2)
            parts.append((gram / gram.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-9)).flatten(1))
    return torch.cat(parts, dim=1).double().numpy()


def concept_of(prompt: str, trigger: str | None) -> str:
    """`fire-engine` for `WORDS, a fire engine`."""
    bare = prompt.removeprefix(f"{trigger}, ") if trigger else prompt
    return bare.split(" ", 1)[-1].replace(" ", "-")


def measure_truth(judge: Judge, run: RunFolder, unseen: Sequence[Image.Image]) -> dict[Cell, Draws]:
    """The truth of each cell of an evaluated run, with paired bootstrap draws over prompts and seeds."""
    trigger = run.read_config().data.trigger
    images: dict[Cell, list[Image.Image]] = defaultdict(list)
    rows: dict[tuple[str, int], None] = {}
    for entry in json.loads(run.evaluation_file.read_text(encoding="utf-8"))["choice"]["images"]:
        rows[entry["prompt"], entry["seed"]] = None
        images[entry["step"], entry["strength"]].append(open_rgb(run.path / entry["file"]))
    concepts = [concept_of(prompt, trigger) for prompt, _ in rows]
    weights = Weights.draw(len(set(concepts)), len(rows) // len(set(concepts)), NUM_DRAWS)
    goal = line_statistics(judge, unseen).mean(axis=0)
    start = np.linalg.norm(weights.rows @ line_statistics(judge, images.pop((None, 0.0))) - goal, axis=1)
    truth = {}
    for cell, own in images.items():
        way = np.linalg.norm(weights.rows @ line_statistics(judge, own) - goal, axis=1)
        pairs = zip(recognise(judge, own, 1), concepts, strict=True)
        hits = weights.rows @ np.array([float(names[0] == concept) for names, concept in pairs])
        product = np.maximum(0, 1 - way / start) * hits
        truth[cell] = Draws(float(product[0]), product[1:])
    return truth


def compare_choice(judge: Judge, run: RunFolder, unseen: Sequence[Image.Image]) -> dict[str, Any]:
    """A row of the table: what was chosen, the best by the truth, and whether the truth tells them apart."""
    truth, config = measure_truth(judge, run, unseen), run.read_config()
    best = max(truth, key=lambda cell: truth[cell].value)
    choice = json.loads(run.evaluation_file.read_text(encoding="utf-8"))["choice"]
    chosen = choice["step"], choice["strength"]
    row: dict[str, Any] = {
        "run": run.name,
        "images": Path(str(config.images)).name,
        "seed": config.train.seed,
        "learning_rate": config.train.learning_rate,
        "chosen": list(chosen) if chosen in truth else None,
        "best": list(best),
        "best_truth": round(truth[best].value, 3),
    }
    if chosen in truth:
        row["share"] = round(truth[chosen].value / max(truth[best].value, 1e-9), 3)
        row["is_worse"] = (truth[best] - truth[chosen]).interval.low > 0
    row["reason"], row["warnings"] = choice["reason"], choice["warnings"]
    row["truth"] = {f"{step} at {strength:g}": round(one.value, 3) for (step, strength), one in truth.items()}
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    script = Script("measure_choice", __doc__, "--judge")
    script.add_argument("runs", type=Path, nargs="+", help="evaluated runs")
    script.add_argument("--unseen", type=Path, required=True, help="folder of drawings that no run saw")
    script.add_argument("--out", type=Path, help="table to add the rows to, such as choice.json")

    def work(given: Namespace) -> None:
        judge = load_judge(given.judge)
        unseen = [open_rgb(file) for file in sorted(given.unseen.glob("*.png"))]
        known = json.loads(given.out.read_text(encoding="utf-8")) if given.out and given.out.is_file() else []
        rows = {row["run"]: row for row in known}
        for folder in given.runs:
            row = compare_choice(judge, RunFolder.open(folder), unseen)
            rows[row["run"]] = row
            print(json.dumps(row), flush=True)
            if given.out:
                write_json(given.out, list(rows.values()))

    return script.run(work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
