"""A process that keeps a base loaded and draws what it is asked for: one JSON line in, one out.

{"prompt": "a fox", "seed": 0, "adapters": [["runs/openmoji", 200, 0.8]]}
{"images": ["PNG in base64: the base", "PNG in base64: with the adapters"]}
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from typing import Any

import torch

from sdlora.dtypes import has_bf16
from sdlora.errors import ConfigError, SdloraError
from sdlora.formats.files import load_adapter, resolve_adapter
from sdlora.lora.adapter import Adapter
from sdlora.models.base import Base
from sdlora.models.info import inspect_base, with_base_defaults
from sdlora.models.load import load_base
from sdlora.runs import RunFolder
from sdlora.sampling.generate import Column, generate
from sdlora.sampling.images import SampleSettings
from sdlora.sampling.session import choose_device
from sdlora.sampling.store import ImageStore
from sdlora.tree.lineage import PathEntry, find_ancestors, path_to_stack


class Painter:
    """Draws with the base of the runs that are asked for; another base replaces it."""

    def __init__(self) -> None:
        self._base: Base | None = None
        self._digest = ""

    def paint(self, request: dict[str, Any]) -> list[str]:
        """The base's image and, if there are adapters, that with them all; as PNG in base64."""
        wanted = [(RunFolder(path), step, float(strength)) for path, step, strength in request["adapters"]]
        if not wanted:
            raise ConfigError("choose a run", key="playground.no-run")
        config = wanted[0][0].read_config()
        info = inspect_base(config.base, config.objective, config.data)
        config = with_base_defaults(config, info)
        parents, own = dict[str, PathEntry](), list[tuple[Adapter, float]]()
        for run, step, strength in wanted:
            found = inspect_base(run.read_config().base)
            if found.digest != info.digest:
                problem = f"{run.name} was trained on {found.name}, and {wanted[0][0].name} on {info.name}"
                raise ConfigError(f"{problem}; choose runs of one base", key="playground.bases")
            file = resolve_adapter(run, step).file
            adapter = load_adapter(file)
            if adapter.parent:
                # A parent that two of them share is mounted once.
                parents |= {entry.ancestor.digest: entry for entry in find_ancestors(file, adapter)}
            own.append((adapter, strength))
        stack = (*path_to_stack(list(parents.values())), *own)
        digest = f"{info.digest} {info.text_digest}"
        if self._base is None or self._digest != digest:
            self._base, device = None, choose_device()
            dtype = torch.bfloat16 if device.type != "cpu" and has_bf16(device) else torch.float32
            self._base, self._digest = load_base(info, dtype=dtype, device=device), digest
            self._base.use_cpu_kernels()
        side = config.data.resolution or info.resolution
        settings = SampleSettings.of(config.sample, (side, side))
        prompt = config.data.fill_trigger(request["prompt"])
        columns = [Column(), Column(stack, wanted[-1][2])]
        seeds = [int(request["seed"])]
        samples = generate(self._base, columns, [prompt], seeds, settings, store=ImageStore())
        images = []
        for sample in samples:
            sample.image.save(buffer := io.BytesIO(), "PNG")
            images.append(base64.b64encode(buffer.getvalue()).decode())
        return images


def main() -> None:
    """Answers lines until there are no more; libraries that print do not disturb the answers."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    painter = Painter()
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"images": painter.paint(json.loads(line))}
        except (SdloraError, OSError, torch.OutOfMemoryError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
