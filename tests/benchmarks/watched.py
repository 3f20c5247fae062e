"""Runs a program as `python` would, and notes when each step of its optimizer ended.

    python tests/benchmarks/watched.py LOG -m sdlora train ...
    python tests/benchmarks/watched.py LOG script.py ...

Each line of LOG is the wall time and the CPU time of the process, in seconds. No source is changed.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
import time
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


def declare_operators() -> object:
    """Lets a torchvision that was built for another torch be imported; declarations end with the result.

    For want of these operators its import fails, although scripts that only resize images never call them.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def main() -> None:
    _, log, target, *arguments = sys.argv
    _declared = declare_operators() if importlib.util.find_spec("torchvision") else None
    with Path(log).open("a", encoding="utf-8", buffering=1) as lines:

        def note(*_: object) -> None:
            lines.write(f"{time.time()} {time.process_time()}\n")

        register_optimizer_step_post_hook(note)
        if target == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [target, *arguments]
            sys.path.insert(0, str(Path(target).parent))
            runpy.run_path(target, run_name="__main__")


if __name__ == "__main__":
    main()
