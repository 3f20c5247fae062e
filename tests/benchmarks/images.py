"""Memory of reading, planning and preparing a folder of many images, on the built-in base at 64 px.

python -m tests.benchmarks.images 1000 10000      # each in a fresh process, and once more with a full cache
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdlora.config import load_config
from sdlora.report.terminal import Terminal
from sdlora.training.device import make_accelerator
from sdlora.training.planning import make_plan
from sdlora.training.prepare import prepare
from tests.benchmarks import measure

SIDE_PX = 96
SETTINGS = {"data.resolution": 64, "train.steps": 10, "train.batch_size": 4, "data.heldout": 0.05}


def write_images(folder: Path, count: int) -> None:
    """Images in which no two are alike, with captions of their own."""
    draws = np.random.default_rng(0)
    for number in range(count):
        small = Image.fromarray(draws.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        small.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC).save(folder / f"{number:06d}.png")
        (folder / f"{number:06d}.txt").write_text(f"a red cat and {number} green trees", encoding="utf-8")


def measure_preparation(images: Path) -> dict[str, Any]:
    """Resident MB of this process at its peak, once libraries and a base are loaded, and after each stage."""
    config = load_config(None, SETTINGS, images=images)
    accelerator, precision = make_accelerator(config)
    started, rows = measure.clock(), {"libraries": measure.peak_mb()}
    plan = make_plan(config)
    rows["plan"] = measure.peak_mb()
    prepare(plan, accelerator, precision, Terminal(quiet=True))
    rows["prepared"] = measure.peak_mb()
    return {**rows, "seconds": measure.clock() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("counts", nargs="*", type=int, default=[1000, 10_000])
    parser.add_argument("--folder", type=Path, help="measure this folder, and print JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.folder:
        print(json.dumps(measure_preparation(given.folder)))
        return
    print(measure.describe_machine())
    for count in given.counts:
        with tempfile.TemporaryDirectory() as place:
            os.environ["SDLORA_CACHE"] = f"{place}/cache"
            folder = Path(place) / "images"
            folder.mkdir()
            write_images(folder, count)
            for cache in ("empty", "full"):
                row = measure.in_a_fresh_process("tests.benchmarks.images", "--folder", folder)
                figures = ", ".join(f"{name} {value:.0f}" for name, value in row.items())
                print(f"{count:>7,} images, cache {cache}: {figures}", flush=True)


if __name__ == "__main__":
    main()
