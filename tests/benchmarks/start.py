"""How soon a command answers: its help, a mistake, and the first step on the built-in base with a full cache.

    python -m tests.benchmarks.start                    # CPU time of fresh processes that take turns

Each is divided by imports that nothing like it can do without.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.bases import argument_parser
from tests.benchmarks.measure import describe_machine, paired_ratio
from tests.benchmarks.trainers import PLAIN, write_images

WATCHED = str(Path(__file__).parent / "watched.py")
RATIOS = {
    "help": "typer, rich",
    "mistake in a setting": "pydantic",
    "mistake in the folder": "pydantic",
    "first step": "torch, diffusers",
}


def cpu_seconds(command: list[str]) -> float:
    """User and system time of a process, whatever its exit code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=False, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_step_seconds(images: Path, folder: Path) -> float:
    """CPU time of a run up to the end of its first step."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    settings = [f"{key}={str(value).lower()}" for key, value in {**PLAIN, "train.steps": 1}.items()]
    run = tempfile.mkdtemp(dir=folder)
    cpu_seconds([WATCHED, str(log), "-m", "sdlora", "train", str(images), "--out", f"{run}/run", *settings])
    return float(log.read_text(encoding="utf-8").split()[1])


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print(describe_machine(1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"OMP_NUM_THREADS": "1", "SDLORA_CACHE": str(folder / "cache")}
        images, empty = write_images(folder / "images", 12, 128), folder / "empty"
        empty.mkdir()
        sdlora = ["-m", "sdlora"]
        cases = {
            # As a help page of any Typer command needs it.
            "typer, rich": lambda: cpu_seconds(["-c", "import typer.rich_utils"]),
            "help": lambda: cpu_seconds([*sdlora, "--help"]),
            "pydantic": lambda: cpu_seconds(["-c", "import typer.rich_utils, pydantic.types"]),
            "mistake in a setting": lambda: cpu_seconds([*sdlora, "train", str(images), "train.stepz=1"]),
            "mistake in the folder": lambda: cpu_seconds([*sdlora, "train", str(empty)]),
            "torch, diffusers": lambda: cpu_seconds(
                ["-c", "import torch; from diffusers import AutoencoderKL, UNet2DConditionModel"]
            ),
            "first step": lambda: first_step_seconds(images, folder),
        }
        first_step_seconds(images, folder)
        times: dict[str, list[float]] = {case: [] for case in cases}
        for number in range(given.rounds):
            for case in list(cases)[:: 1 if number % 2 else -1]:
                times[case].append(cases[case]())
    for case, imports in RATIOS.items():
        print(
            f"{case}: {min(times[case]):.2f} s, {paired_ratio(times, case, imports):.2f} of import {imports}"
        )


if __name__ == "__main__":
    main()
