"""How a run grows: with its images, without a network; with resolution, rank and ancestors, on a small base.

python -m tests.benchmarks.scale images             # up to 10,000 files and 1,000,000 simulated records
python -m tests.benchmarks.scale steps              # the quarter-size base, relative to its default step
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

from sdlora.config import DataSection
from sdlora.data.batches import BatchOrder
from sdlora.data.buckets import plan_buckets
from sdlora.data.cache import TensorCache
from sdlora.data.records import ImageRecord, Size
from sdlora.data.scan import scan_dataset
from sdlora.export.export import export_adapter
from sdlora.formats.files import load_adapter
from sdlora.lora.attach import mount
from tests.benchmarks import measure
from tests.benchmarks.bases import argument_parser, bench_folder, write_base
from tests.benchmarks.trainers import fill_up, keep_cache_in, make_trainer, write_images

COUNTS = (100, 10_000, 1_000_000)
MOST_FILES = 10_000
LATENTS, TEXT = (4, 64, 64), (77, 768)
# The default step, and one thing that changes in each of the others.
STEPS: dict[str, dict[str, Any]] = {
    "256 px, rank 16": {},
    "128 px": {"data.resolution": 128},
    "512 px": {"data.resolution": 512},
    "rank 4": {"lora.rank": 4},
    "rank 128": {"lora.rank": 128},
    "1 ancestor": {"depth": 1},
    "4 ancestors": {"depth": 4},
    "gradient checkpointing": {"train.gradient_checkpointing": "true"},
}


def simulate_records(count: int) -> list[ImageRecord]:
    """Records of images that are not there, in ten shapes."""
    sizes = [Size(512 + 64 * number, 768) for number in range(10)]
    return [
        ImageRecord(
            path=Path(f"images/{number:07d}.jpg"),
            name=f"{number:07d}.jpg",
            digest=hashlib.sha256(str(number).encode()).hexdigest(),
            size=sizes[number % 10],
            caption=f"a painting, number {number}",
            caption_source=".txt",
        )
        for number in range(count)
    ]


def measure_images(count: int, folder: Path) -> dict[str, float]:
    """Costs of `count` images: memory and time of the records and their order; files, where they are few."""
    settings = DataSection(heldout=0)
    before = psutil.Process().memory_info().rss
    records = simulate_records(count)
    started = measure.clock()
    plan = plan_buckets(records, 512, settings)
    seconds = measure.clock() - started
    order = BatchOrder(records, plan, settings, global_batch=1, seed=0)
    row = {"s, buckets": seconds, "s, an epoch's order": measure.timed(lambda: order.step(0))}
    row["MB in memory"] = (psutil.Process().memory_info().rss - before) / 1e6
    if count <= MOST_FILES:
        row |= measure_files(count, folder, settings)
    return row


def measure_files(count: int, folder: Path, settings: DataSection) -> dict[str, float]:
    """Scanning images of 64 px, and the cache of latents and text states at 512 px, read at random."""
    images = folder / "images"
    images.mkdir()
    for number in range(count):
        Image.new("RGB", (64, 64), (number % 256, number // 256, 0)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(f"a painting, number {number}")
    scanned = measure.timed(lambda: scan_dataset(images, settings))
    cache = TensorCache(folder / "cache")
    tensors = {"mean": torch.zeros(LATENTS), "std": torch.zeros(LATENTS)}
    few = min(count, 1000)
    keys = [f"latents/{hashlib.sha256(str(number).encode()).hexdigest()}" for number in range(few)]
    written = measure.timed(lambda: [cache.put(key, tensors) for key in keys])
    fresh = TensorCache(folder / "cache")
    read = measure.timed(lambda: [fresh.get(key) for key in keys])
    scale = 1e3 / few
    return {"s, scan": scanned, "ms, write latents": written * scale, "ms, read latents": read * scale}


def measure_step(base: Path, images: Path, rounds: int = 3, **changes: Any) -> dict[str, float]:
    """Seconds of a step, and resident MB while it runs."""
    depth = changes.pop("depth", 0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(base, images, Path(folder) / "run", **{"data.resolution": 256, **changes})
        if depth:
            fill_up(trainer)
            own = trainer.runner.adapter
            file = Path(folder) / "style.safetensors"
            export_adapter(own, file, precision="fp32", metadata={})
            stack = [(load_adapter(file), 0.5)] * depth
            prepared = trainer.prepared
            mount(prepared.base.components, [*stack, (own, 1.0)], prepared.dropout)
    step: Callable[[], object] = trainer.train_step
    step()
    measure.reset_peak()
    seconds = min(measure.timed(step) for _ in range(rounds))
    numbers = sum(tensor.numel() for tensor in trainer.runner.parameters)
    return {"seconds": seconds, "peak_mb": measure.peak_mb(), "trained": numbers}


def show_steps(base: Path, images: Path) -> None:
    """Each row in a process of its own, relative to the first."""
    print(f"{'':24}{'step':>8}{'peak MB':>9}{'trained M':>11}")
    first = 0.0
    for name in STEPS:
        row = measure.in_a_fresh_process("tests.benchmarks.scale", "steps", "--row", name)
        first = first or row["seconds"]
        relative, trained = row["seconds"] / first, row["trained"] / 1e6
        print(f"{name:24}{relative:>8.2f}{row['peak_mb']:>9.0f}{trained:>11.2f}", flush=True)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("what", choices=("images", "steps"))
    parser.add_argument("--row", choices=STEPS, help="measure one row, and print JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_cache_in(bench_folder() / "cache")
    if given.what == "steps":
        base = write_base("quarter", bench_folder() / "quarter")
        side = STEPS[given.row].get("data.resolution", 256) if given.row else 256
        images = write_images(bench_folder() / f"images-2-{side}", 2, side)
        if given.row:
            print(json.dumps(measure_step(base, images, **STEPS[given.row])))
        else:
            print(measure.describe_machine())
            show_steps(base, images)
        return
    print(measure.describe_machine())
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            row = measure_images(count, Path(folder))
        print(f"{count:>9,}: " + ", ".join(f"{value:.3g} {name}" for name, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
