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
from sdlora.runs import RunFolder

LAYERS = (2, 6)  # after the first convolution, and the second pooling
GOOD = 0.95

Cell = tuple[Any, float]


@torch.no_grad()
def line_statistics(judge: Judge, images: Sequence[Image.Image]) -> np.ndarray:
    """The mean Gram matrix of each layer, over images; how things are drawn, not where."""
    state, parts = to_input(images).float() / 127.5 - 1, []
    for number, layer in enumerate(judge.layers):
        state = layer(state)
        if number in LAYERS:
            flat = state.flatten(2)
            gram = flat @ flat.transpose(1, 2)
            parts.append((gram / gram.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-9)).flatten(1))
    return torch.cat(parts, dim=1).mean(dim=0).numpy()


def concept_of(prompt: str, trigger: str | None) -> str:
    """`fire-engine` for `WORDS, a fire engine`."""
    bare = prompt.removeprefix(f"{trigger}, ") if trigger else prompt
    return bare.split(" ", 1)[-1].replace(" ", "-")


def measure_truth(judge: Judge, run: RunFolder, unseen: Sequence[Image.Image]) -> dict[Cell, float]:
    """The truth of each cell of an evaluated run."""
    trigger = run.read_config().data.trigger
    images: dict[Cell, list[Image.Image]] = defaultdict(list)
    concepts: dict[Cell, list[str]] = defaultdict(list)
    for entry in json.loads(run.evaluation_file.read_text(encoding="utf-8"))["choice"]["images"]:
        cell = (entry["step"], entry["strength"])
        images[cell].append(open_rgb(run.path / entry["file"]))
        concepts[cell].append(concept_of(entry["prompt"], trigger))
    goal, start = line_statistics(judge, unseen), line_statistics(judge, images[None, 0.0])
    truth = {}
    for cell, own in images.items():
        style = 1 - np.linalg.norm(line_statistics(judge, own) - goal) / np.linalg.norm(start - goal)
        pairs = zip(recognise(judge, own, 1), concepts[cell], strict=True)
        hits = [names[0] == concept for names, concept in pairs]
        truth[cell] = max(0.0, float(style)) * sum(hits) / len(hits)
    return truth


def main(arguments: Sequence[str] | None = None) -> int:
    script = Script("measure_choice", __doc__, "--judge")
    script.add_argument("runs", type=Path, nargs="+", help="evaluated runs")
    script.add_argument("--unseen", type=Path, required=True, help="folder of drawings that no run saw")

    def work(given: Namespace) -> None:
        judge = load_judge(given.judge)
        unseen = [open_rgb(file) for file in sorted(given.unseen.glob("*.png"))]
        for folder in given.runs:
            run = RunFolder.open(folder)
            truth = measure_truth(judge, run, unseen)
            best = max(truth, key=truth.__getitem__)
            choice = json.loads(run.evaluation_file.read_text(encoding="utf-8"))["choice"]
            chosen = choice["step"], choice["strength"]
            share = truth[chosen] / truth[best] if chosen in truth and truth[best] else None
            facts: dict[str, Any] = {"chosen": chosen, "best": best, "share": share}
            facts["agrees"] = (share or 0) >= GOOD
            facts["truth"] = {f"{step} at {strength:g}": value for (step, strength), value in truth.items()}
            print(json.dumps({run.name: facts}), flush=True)

    return script.run(work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
