"""What the command lines of these scripts share: files, options, and an error in one line."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sdlora.errors import SdloraError

HERE = Path(__file__).parent
BASE, CONCEPTS_FILE, JUDGE_FILE = HERE / "base", HERE / "concepts.txt", HERE / "judge.safetensors"
OPTIONS: dict[str, dict[str, Any]] = {
    "--concepts": {"type": Path, "default": CONCEPTS_FILE, "help": "file of concept names"},
    "--datasets": {"type": Path, "default": Path("datasets")},
    "--device": {"default": "cuda" if torch.cuda.is_available() else "cpu"},
    "--icons": {"type": Path, "help": "folder of the vector packages; by default npm fetches them"},
    "--judge": {"type": Path, "default": JUDGE_FILE, "help": "weights of the judge"},
    "--threads": {"type": int, "default": 0, "help": "CPU threads; 0 leaves torch's choice"},
    "--vae": {"type": Path, "default": BASE / "vae", "help": "diffusers folder of the VAE"},
}


class Script(ArgumentParser):
    """The command line of a script, with some of `OPTIONS`."""

    def __init__(self, module: str, about: str | None, *shared: str) -> None:
        super().__init__(prog=f"python -m sdlora.builtin.{module}", description=about)
        for option in shared:
            self.add_argument(option, **OPTIONS[option])

    def run(self, work: Callable[[Namespace], None], arguments: Sequence[str] | None = None) -> int:
        """Parses the arguments and works; returns the exit code, 2 for a mistake of the user."""
        given = self.parse_args(arguments)
        if getattr(given, "threads", 0):
            torch.set_num_threads(given.threads)
        try:
            work(given)
        except SdloraError as error:
            print(error)
            return error.exit_code
        return 0
