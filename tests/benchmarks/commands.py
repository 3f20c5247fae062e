"""Whole commands, one after the other: sdlora, the diffusers text_to_image LoRA script and sd-scripts.

    DIFFUSERS_SCRIPT=.../train_text_to_image_lora.py SD_SCRIPTS=.../sd-scripts \\
        python -m tests.benchmarks.commands             # SD 1.5, 512 px, 12 images, 6 steps

The same images, captions, rank and number of steps, in bf16. `README.md` says where the work differs.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.benchmarks.bases import argument_parser, bench_folder, write_base
from tests.benchmarks.measure import describe_machine
from tests.benchmarks.trainers import PLAIN, RANK, write_images

SIDES_PX = {"sd15": 512, "quarter": 256}
WATCHED = str(Path(__file__).parent / "watched.py")


@dataclass(frozen=True)
class Task:
    """What every program is asked for."""

    base: Path
    images: Path
    side_px: int
    steps: int
    threads: int
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """Seconds (CPU with one thread, else wall) and MB of one command."""

    to_first_step: float
    step: float
    whole: float
    peak_mb: float


def sdlora_command(task: Task, out: Path) -> list[str]:
    given = {**PLAIN, "data.resolution": task.side_px, "train.steps": task.steps}
    settings = [f"{key}={str(value).lower()}" for key, value in given.items()]
    place = [str(task.images), "--base", str(task.base), "--out", str(out)]
    return [sys.executable, WATCHED, "LOG", "-m", "sdlora", "train", *place, *settings, *task.overrides]


def diffusers_command(task: Task, out: Path) -> list[str]:
    python = os.environ.get("DIFFUSERS_PYTHON", sys.executable)
    script = os.environ["DIFFUSERS_SCRIPT"]
    options = {
        "pretrained_model_name_or_path": task.base,
        "train_data_dir": task.images,
        "output_dir": out,
        "resolution": task.side_px,
        "rank": RANK,
        "train_batch_size": 1,
        "max_train_steps": task.steps,
        "mixed_precision": "bf16",
        "learning_rate": 1e-4,
        "seed": 0,
    }
    return [python, WATCHED, "LOG", script, *(f"--{name}={value}" for name, value in options.items())]


def kohya_command(task: Task, out: Path) -> list[str]:
    """sd-scripts reads captions from text files; the UNet alone is trained."""
    python = os.environ.get("SD_SCRIPTS_PYTHON", sys.executable)
    checkout = Path(os.environ["SD_SCRIPTS"])
    out.mkdir()
    (out / "data.toml").write_text(
        f'[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = {task.side_px}\nbatch_size = 1\n'
        f'[[datasets.subsets]]\nimage_dir = "{with_text_files(task.images)}"\nnum_repeats = 1\n'
    )
    # It looks for CLIP's tokenizer under the name that the hub gives it.
    tokenizer = out / "tokenizers" / "openai_clip-vit-large-patch14"
    shutil.copytree(task.base / "tokenizer", tokenizer)
    options = {
        "pretrained_model_name_or_path": task.base,
        "dataset_config": out / "data.toml",
        "tokenizer_cache_dir": tokenizer.parent,
        "output_dir": out,
        "network_module": "networks.lora",
        "network_dim": RANK,
        "network_alpha": RANK,
        "max_train_steps": task.steps,
        "mixed_precision": "bf16",
        "learning_rate": 1e-4,
        "seed": 0,
        "max_data_loader_n_workers": 0,
    }
    switches = ["--cache_latents", "--network_train_unet_only", "--sdpa"]
    named = [f"--{name}={value}" for name, value in options.items()]
    return [python, WATCHED, "LOG", str(checkout / "train_network.py"), *named, *switches]


def with_text_files(images: Path) -> Path:
    """The same images in another folder, with a text file beside each, as sd-scripts wants them."""
    folder = images.with_name(f"{images.name}-text")
    folder.mkdir(exist_ok=True)
    for line in (images / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        shutil.copyfile(images / entry["file_name"], folder / entry["file_name"])
        (folder / entry["file_name"]).with_suffix(".txt").write_text(entry["text"], encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Program:
    """A trainer: its command, the variable that names its checkout, and the bases that it can load."""

    command: Callable[[Task, Path], list[str]]
    variable: str = ""
    bases: tuple[str, ...] = tuple(SIDES_PX)

    def left_out(self, base: str) -> str:
        """Why it cannot run; empty if it can."""
        if base not in self.bases:
            return f"it loads only {' and '.join(self.bases)}"
        return f"{self.variable} is not set" if self.variable and self.variable not in os.environ else ""


# sd-scripts has the widths of SD 1.5 in its source.
PROGRAMS = {
    "sdlora": Program(sdlora_command),
    "diffusers": Program(diffusers_command, "DIFFUSERS_SCRIPT"),
    "sd-scripts": Program(kohya_command, "SD_SCRIPTS", ("sd15",)),
}
FULL = "sdlora, full cache"


def run(command: Callable[[Task, Path], list[str]], task: Task, cache: Path) -> Measured:
    """Runs one command with a cache of ours that is empty or full, and reads its times and its peak."""
    with tempfile.TemporaryDirectory() as place:
        log, out = Path(place) / "log", Path(place) / "run"
        words = [str(log) if word == "LOG" else word for word in command(task, out)]
        environment = {
            **os.environ,
            "SDLORA_CACHE": str(cache),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(Path(place) / "datasets"),
            "OMP_NUM_THREADS": str(task.threads),
            "PYTHONPATH": str(Path.cwd()),
        }
        started = time.time()
        with (Path(place) / "output").open("w") as output:
            process = subprocess.Popen(words, env=environment, stdout=output, stderr=output)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            text = (Path(place) / "output").read_text(errors="replace")
            raise SystemExit(f"{' '.join(words)}\nfailed:\n{text[-3000:]}")
        lines = [tuple(map(float, line.split())) for line in log.read_text().splitlines()]
        whole = usage.ru_utime + usage.ru_stime if task.threads == 1 else time.time() - started
    ends = [cpu if task.threads == 1 else wall - started for wall, cpu in lines]
    steps = [after - before for before, after in pairwise(ends)]
    # What a first step costs beyond the others belongs to the start.
    step = statistics.median(steps)
    return Measured(ends[0], step, whole, usage.ru_maxrss / 1024)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--base", default="sd15", choices=SIDES_PX)
    parser.add_argument("--side", type=int, help="of the images, in px; default: the base's own")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=PROGRAMS, action="append", help="leave out the others")
    parser.add_argument(
        "overrides", nargs="*", help="settings of ours, such as train.gradient_checkpointing=true"
    )
    given = parser.parse_args()
    folder, side = bench_folder(), given.side or SIDES_PX[given.base]
    base = write_base(given.base, folder / given.base)
    images = write_images(folder / f"images-{given.images}-{side}", given.images, side)
    task = Task(base, images, side, given.steps, given.threads, tuple(given.overrides))
    print(describe_machine(given.threads))
    print(f"{given.base}, {side} px, {given.images} images, {given.steps} steps, batch 1, rank {RANK}, bf16")
    print(f"\n{'':22}{'first step':>11}{'step':>8}{'whole':>8}{'peak MB':>9}")
    rows: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, program in PROGRAMS.items():
            if given.only and name not in given.only:
                continue
            if reason := program.left_out(given.base):
                print(f"{name:22}left out: {reason}")
            else:
                rows[name] = show(name, run(program.command, task, Path(cache)))
                if name == "sdlora":
                    rows[FULL] = show(FULL, run(program.command, task, Path(cache)))
    for ours in {"sdlora", FULL} & rows.keys():
        for name in rows.keys() - {"sdlora", FULL}:
            print_ratios(f"{ours} / {name}", rows[ours], rows[name])


def show(name: str, row: Measured) -> Measured:
    print(
        f"{name:22}{row.to_first_step:>11.1f}{row.step:>8.2f}{row.whole:>8.1f}{row.peak_mb:>9.0f}", flush=True
    )
    return row


def print_ratios(name: str, one: Measured, other: Measured) -> None:
    first, step = one.to_first_step / other.to_first_step, one.step / other.step
    print(f"{name}: first step {first:.2f}, step {step:.2f}, peak {one.peak_mb / other.peak_mb:.2f}")


if __name__ == "__main__":
    main()
