"""Compares what `sdlora evaluate` recommends with a truth that it never saw: the judge, and other drawings.

The truth of a cell is how probable the judge finds it that a sample shows its prompt, times the way from the
base's own images (0) to drawings of the set that the run never saw (1), by statistics of the judge's first
layers. A row also has the share by a coarser truth, where a sample counts if the prompt's thing is the most
probable one (`counted`): torn things often pass, and of 16 samples one is 6 %.

The best of many cells owes some of its truth to chance. `--again` draws new samples of every cell, for other
prompts, and compares the recommended cell with the best one by those alone. It also tells which cell the same
rule recommends by the new samples (`by_new`), and how near that one is to the best by new and by first ones.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdlora.builtin.judge import Judge, load_judge, open_rgb, probabilities, recognise, to_input
from sdlora.builtin.script import Script
from sdlora.evaluation.choice import top_cell
from sdlora.evaluation.choose import Scoring
from sdlora.evaluation.context import open_context
from sdlora.evaluation.features import load_features
from sdlora.evaluation.scores import TAIL, BootstrapWeights, Score
from sdlora.evaluation.sweep import Row, SampleGallery, Sweep, SweepPoint
from sdlora.runs import RunFolder
from sdlora.writing import write_json

LAYERS = (2, 6)  # after the first convolution, and the second pooling
NUM_DRAWS = 1000

Cell = tuple[int | str, float]


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


def read_truth(
    judge: Judge, run: RunFolder, unseen: Sequence[Image.Image], *, counts: bool = False
) -> dict[Cell, Score]:
    """The truth of each cell of an evaluated run, by the images that `evaluate` drew."""
    images: dict[SweepPoint, list[Image.Image]] = defaultdict(list)
    rows: dict[Row, None] = {}
    for entry in _choice_of(run)["images"]:
        rows[entry["prompt"], entry["seed"]] = None
        place = (entry["step"], entry["strength"]) if entry["strength"] else None
        images[place].append(open_rgb(run.path / entry["file"]))
    trigger = run.read_config().data.trigger
    return measure_truth(judge, images, list(rows), unseen, trigger, counts=counts)


def draw_again(
    judge: Judge, run: RunFolder, unseen: Sequence[Path], cells: Sequence[Cell], num_seeds: int
) -> tuple[dict[Cell, Score], Cell]:
    """The truth of all cells by new samples, for captions of unseen drawings that are no prompts yet.

    And the cell that `evaluate` recommends by these samples.
    """
    trigger, used = run.read_config().data.trigger, {entry["prompt"] for entry in _choice_of(run)["images"]}
    captions = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in unseen]
    prompts = [", ".join(filter(None, (trigger, caption))) for caption in captions]
    steps, strengths = (list(dict.fromkeys(values)) for values in zip(*cells, strict=True))
    sweep = Sweep(steps, strengths, [one for one in prompts if one not in used], range(num_seeds))
    context = open_context(run, needs_heldout=False)
    drawn = SampleGallery(context).draw([None, *sweep.cells], sweep.rows)
    scored = Scoring(context, sweep, load_features(None, context.base.device)).score(drawn)
    best = top_cell(scored)
    truth = measure_truth(judge, drawn, sweep.rows, [open_rgb(file) for file in unseen], trigger)
    return truth, (best.step, best.strength)


def measure_truth(
    judge: Judge,
    images: Mapping[SweepPoint, Sequence[Image.Image]],
    rows: Sequence[Row],
    unseen: Sequence[Image.Image],
    trigger: str | None,
    *,
    counts: bool = False,
) -> dict[Cell, Score]:
    """The truth of each cell, with paired bootstrap draws over prompts and seeds.

    Args:
        judge: The judge.
        images: Of the base (None) and each cell, in the order of the rows.
        rows: Prompts and seeds, prompt by prompt.
        unseen: Drawings of the set that the run never saw.
        trigger: What prompts begin with.
        counts: Whether samples count by the most probable thing.
    """
    concepts = [concept_of(prompt, trigger) for prompt, _ in rows]
    weights = BootstrapWeights.draw(len(set(concepts)), len(rows) // len(set(concepts)), NUM_DRAWS)
    goal = line_statistics(judge, unseen).mean(axis=0)
    start = np.linalg.norm(weights.rows @ line_statistics(judge, images[None]) - goal, axis=1)
    truth = {}
    for cell, own in images.items():
        if cell is None:
            continue
        way = np.linalg.norm(weights.rows @ line_statistics(judge, own) - goal, axis=1)
        if counts:
            found = np.array([names[0] for names in recognise(judge, own, 1)]) == np.array(concepts)
        else:
            found = np.array(probabilities(judge, own, concepts))
        product = np.maximum(0, 1 - way / start) * (weights.rows @ found)
        truth[cell] = Score(float(product[0]), product[1:])
    return truth


def compare_choice(judge: Judge, run: RunFolder, unseen: Sequence[Path], num_seeds: int) -> dict[str, Any]:
    """A row of the table: what was chosen, the best by the truth, and whether the truth tells them apart."""
    drawings, config = [open_rgb(file) for file in unseen], run.read_config()
    truth = read_truth(judge, run, drawings)
    choice = _choice_of(run)
    chosen = choice["step"], choice["strength"]
    row: dict[str, Any] = {
        "run": run.name,
        "images": Path(str(config.images)).name,
        "seed": config.train.seed,
        "learning_rate": config.train.learning_rate,
        "steps": config.train.steps,
        "chosen": list(chosen) if chosen in truth else None,
    }
    row |= compare_with_best(truth, chosen)
    if chosen in truth:
        row["counted"] = compare_with_best(read_truth(judge, run, drawings, counts=True), chosen)
        if num_seeds:
            again, picked = draw_again(judge, run, unseen, list(truth), num_seeds)
            row["again"] = compare_with_best(again, chosen)
            shares = [compare_with_best(one, picked)["share"] for one in (again, truth)]
            row["by_new"] = {"chosen": list(picked), "share": shares[0], "share_of_first": shares[1]}
    return row | {"reason": choice["reason"], "warnings": choice["warnings"]}


def compare_with_best(truth: Mapping[Cell, Score], chosen: Cell) -> dict[str, Any]:
    """The best cell, and the share of its truth that the chosen one has, with its 95 % interval."""
    best = max(truth, key=lambda cell: truth[cell].value)
    result: dict[str, Any] = {
        "best": list(best),
        "best_truth": round(truth[best].value, 3),
        "truth": {f"{step} at {strength:g}": round(one.value, 3) for (step, strength), one in truth.items()},
    }
    if chosen in truth:
        shares = truth[chosen].draws / np.maximum(truth[best].draws, 1e-9)
        low, high = np.percentile(shares, [TAIL, 100 - TAIL])
        result |= {
            "share": round(truth[chosen].value / max(truth[best].value, 1e-9), 3),
            "interval": [round(float(low), 3), round(float(high), 3)],
            "is_worse": (truth[best] - truth[chosen]).interval.low > 0,
        }
    return result


def _choice_of(run: RunFolder) -> dict[str, Any]:
    choice: dict[str, Any] = json.loads(run.evaluation_file.read_text(encoding="utf-8"))["choice"]
    return choice


def main(arguments: Sequence[str] | None = None) -> int:
    script = Script("measure_choice", __doc__, "--judge")
    script.add_argument("runs", type=Path, nargs="+", help="evaluated runs")
    script.add_argument("--unseen", type=Path, required=True, help="folder of drawings that no run saw")
    script.add_argument("--out", type=Path, help="table to add the rows to, such as choice.json")
    script.add_argument("--again", type=int, default=0, metavar="SEEDS", help="new samples of each prompt")

    def work(given: Namespace) -> None:
        judge = load_judge(given.judge)
        unseen = sorted(given.unseen.glob("*.png"))
        known = json.loads(given.out.read_text(encoding="utf-8")) if given.out and given.out.is_file() else []
        rows = {row["run"]: row for row in known}
        for folder in given.runs:
            row = compare_choice(judge, RunFolder.open(folder), unseen, given.again)
            rows[row["run"]] = row
            print(json.dumps(row), flush=True)
            if given.out:
                write_json(given.out, list(rows.values()))

    return script.run(work, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
