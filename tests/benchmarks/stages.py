"""Stages of a run beside what a plain program does: encoding images, a grid, training in two processes.

python -m tests.benchmarks.stages encode            # 24 images through the VAE, and into the cache
python -m tests.benchmarks.stages grid              # two prompts, with and without an adapter
python -m tests.benchmarks.stages processes         # wall time: the machine must be idle
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from sdlora.data.tensors import image_to_tensor
from sdlora.export.export import export_adapter
from sdlora.models.base import quiet
from sdlora.models.load import DTYPE, load_base
from sdlora.report.terminal import Terminal
from sdlora.sampling.generate import generate, make_columns
from sdlora.sampling.images import SampleSettings
from sdlora.training.device import make_accelerator
from sdlora.training.encodings import Encodings
from sdlora.training.planning import make_plan
from tests.benchmarks import measure
from tests.benchmarks.bases import argument_parser, bench_folder, write_base
from tests.benchmarks.trainers import PLAIN, fill_up, keep_cache_in, make_trainer, plain_config, write_images

SIDES_PX = {"sd15": 512, "quarter": 256}
PROMPTS = ("a boat on a lake", "a red house")


@torch.no_grad()
def measure_encoding(base: Path, images: Path, side_px: int, rounds: int) -> dict[str, Any]:
    """Times our encoding, with reading and the cache, and a loop of `vae.encode` in bf16 and NCHW."""
    config = plain_config(base, images, **{"data.resolution": side_px})
    accelerator, precision = make_accelerator(config)
    plan = make_plan(config)
    ours = load_base(plan.info, dtype=precision.base_dtype, device=accelerator.device, lazy=True)
    with quiet():
        vae = AutoencoderKL.from_pretrained(base / "vae", local_files_only=True, **{DTYPE: torch.bfloat16})
    views = [(record, plan.buckets.crops[record.name][0]) for record in plan.index.records]
    parts = [views[number::rounds] for number in range(rounds)]
    left = {"ours": list(parts), "plain": list(parts)}

    def encode_ours() -> None:
        Encodings(ours, plan).prepare(left["ours"].pop(), accelerator, Terminal(quiet=True))

    def encode_plainly() -> None:
        for record, _ in left["plain"].pop():
            with Image.open(record.path) as image:
                pixels = image_to_tensor(image.convert("RGB"))[None].to(torch.bfloat16)
            vae.encode(pixels).latent_dist.sample()

    ours.encode_images(torch.zeros(1, 3, 64, 64))  # it is loaded where it is needed
    with tempfile.TemporaryDirectory() as folder:
        keep_cache_in(Path(folder))
        times = measure.interleave({"ours": encode_ours, "plain": encode_plainly}, rounds)
    return {
        "seconds per image": {name: sum(own) / len(views) for name, own in times.items()},
        "ratio": measure.paired_ratio(times, "ours", "plain"),
        "images": len(views),
        "vae": str(ours.vae.dtype),
    }


def measure_grid(base: Path, images: Path, side_px: int, rounds: int, steps: int) -> dict[str, Any]:
    """Times a grid of two prompts, with and without an adapter, and a call of the pipeline for each image."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(base, images, Path(folder) / "run", **{"data.resolution": side_px})
        fill_up(trainer)
        adapter = trainer.runner.adapter
        export_adapter(adapter, Path(folder) / "style.safetensors", precision="bf16", metadata={})
        ours = trainer.prepared.base
        with quiet():
            pipeline = StableDiffusionPipeline.from_pretrained(
                base, local_files_only=True, **{DTYPE: torch.bfloat16}
            )
            pipeline.load_lora_weights(folder, weight_name="style.safetensors", adapter_name="style")
    pipeline.set_progress_bar_config(disable=True)
    settings = SampleSettings(steps=steps, guidance=7.5, width=side_px, height=side_px)

    def draw_ours() -> None:
        generate(ours, make_columns(adapter, [1.0]), PROMPTS, [0], settings)

    def draw_naively() -> None:
        for strength in (0.0, 1.0):
            pipeline.set_adapters("style", strength)
            for prompt in PROMPTS:
                pipeline(
                    prompt,
                    num_inference_steps=steps,
                    guidance_scale=7.5,
                    width=side_px,
                    height=side_px,
                    generator=torch.Generator().manual_seed(0),
                )

    cases = {"ours": draw_ours, "naive": draw_naively}
    measure.interleave(cases, 1)
    times = measure.interleave(cases, rounds)
    seconds = {name: statistics.median(own) / 4 for name, own in times.items()}
    return {"seconds per image": seconds, "ratio": measure.paired_ratio(times, "ours", "naive")}


def measure_processes(base: Path, images: Path, side_px: int, rounds: int) -> dict[str, Any]:
    """Images per second of one process and of two, one thread each, in wall time from the run's events."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        for count in (1, 2) if number % 2 == 0 else (2, 1):
            rates[count].append(_images_per_second(base, images, side_px, count))
    medians = {count: statistics.median(own) for count, own in rates.items()}
    return {"images per second": medians, "ratio": measure.paired_ratio(rates, 2, 1)}


def _images_per_second(base: Path, images: Path, side_px: int, count: int, steps: int = 6) -> float:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    given = {**PLAIN, "data.resolution": side_px, "train.steps": steps, "export.formats": "diffusers"}
    settings = [f"{key}={value}".replace("False", "false") for key, value in given.items()]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [*launcher, "-m", "sdlora", "train", str(images), "--base", str(base), "--out", str(run)]
        subprocess.run(
            [*command, *settings],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        events = map(json.loads, (run / "events.jsonl").read_text(encoding="utf-8").splitlines())
        times = [event["time"] for event in events if event["event"] == "step"]
    return count / statistics.median(after - before for before, after in pairwise(times))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("stage", choices=("encode", "grid", "processes"))
    parser.add_argument("--base", default="sd15", choices=SIDES_PX)
    parser.add_argument("--side", type=int, help="of the images, in px; default: the base's own")
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of each image of the grid")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    folder, side = bench_folder(), given.side or SIDES_PX[given.base]
    base = write_base(given.base, folder / given.base)
    count = given.images if given.stage == "encode" else 2
    images = write_images(folder / f"images-{count}-{side}", count, side)
    keep_cache_in(folder / "cache")
    print(measure.describe_machine())
    stages = {
        "encode": measure_encoding,
        "grid": partial(measure_grid, steps=given.steps),
        "processes": measure_processes,
    }
    for name, value in stages[given.stage](base, images, side, given.rounds).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
