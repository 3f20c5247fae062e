"""Images that were drawn before: the base's in the cache, those of adapters in a folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image, UnidentifiedImageError

from sdlora.data.cache import IMAGES, cache_folder, trim_cache
from sdlora.lora.adapter import Adapter
from sdlora.models.base import Base
from sdlora.reading import UnfitFileError, read_bytes
from sdlora.sampling.generate import Cell, make_sample
from sdlora.sampling.images import BLANKS, SampledImage, slug, write_image
from sdlora.tree.lineage import digest_adapter

MAX_BYTES = 2**26
MAX_CACHED = 2**30
KEY_LENGTH = 16


class ImageStore:
    """Keeps images by all that changes them: base, adapters, strengths, prompt, seed, settings and device.

    Args:
        folder: For the images of adapters, which are not kept without it. Those of the base are kept in the
            cache of the user, for every command and every run: up to 1 GiB of those that were used last.
        cache: The cache; None for the user's.
    """

    def __init__(self, folder: Path | None = None, cache: Path | None = None) -> None:
        self.folder, self.cache = folder, (cache or cache_folder()) / IMAGES
        # By key: the rest of a name may differ from call to call.
        self._files = {file.stem[-KEY_LENGTH:]: file for file in folder.glob("*.png")} if folder else {}
        self._digests: dict[int, tuple[Adapter, str]] = {}
        self._is_trimmed = False

    def get(self, base: Base, cell: Cell) -> SampledImage | None:
        """The image of a cell with resolved settings; None if there is none, or it is damaged."""
        if (file := self.file(base, cell)) is None:
            return None
        with suppress(OSError, UnfitFileError, UnidentifiedImageError, ValueError, SyntaxError):
            image = Image.open(io.BytesIO(read_bytes(file, MAX_BYTES)))
            if image.size != (cell.settings.width, cell.settings.height):
                return None
            image.load()
            if file.is_relative_to(self.cache):
                os.utime(file)
            blank = json.loads(image.info["sdlora"]).get("blank", "")
            return make_sample(cell, image.convert("RGB"), blank) if blank in BLANKS else None
        return None

    def put(self, base: Base, cell: Cell, image: SampledImage) -> None:
        """Writes an image; errors while writing the cache are ignored."""
        if file := self.file(base, cell):
            with suppress(*() if cell.column.stack else (OSError,)):
                write_image(file, image, {"base": base.info.name})
                if not cell.column.stack and not self._is_trimmed:
                    self._is_trimmed = True
                    trim_cache(self.cache, MAX_CACHED)

    def file(self, base: Base, cell: Cell) -> Path | None:
        """The file of an image, whether it is there or not; None if it is not kept."""
        if cell.column.stack and self.folder is None:
            return None
        key = self._key(base, cell)
        if self.folder is None or not cell.column.stack:
            return self.cache / key[:2] / f"{key}.png"
        column, short = cell.column, key[:KEY_LENGTH]
        name = slug(f"{cell.prompt[:40]}-{cell.seed}-{column.adapter}-{column.strength:g}")
        return self._files.setdefault(short, self.folder / f"{name}-{short}.png")

    def _key(self, base: Base, cell: Cell) -> str:
        info, settings = base.info, cell.settings
        values: list[Any] = [diffusers.__version__, torch.__version__, describe_processor(base.device)]
        values += [sorted(base.dtypes.items()), base.attention_kernel, info.quantize]
        values += [sorted((name, part.digest) for name, part in info.components.items()), info.text_digest]
        values += [sorted(map(str, info.scheduler_config.items())), base.safety_checker is not None]
        values += [[(self._digest(adapter), strength) for adapter, strength in cell.column.stack]]
        values += [cell.prompt, cell.seed, *(getattr(settings, name) for name in SETTINGS)]
        values += [settings.start.digest, settings.start.denoise] if settings.start else []
        return hashlib.sha256(json.dumps(values).encode("ascii")).hexdigest()

    def _digest(self, adapter: Adapter) -> str:
        # With the adapter itself: the id of one that is gone could be another's.
        if id(adapter) not in self._digests:
            self._digests[id(adapter)] = adapter, digest_adapter(adapter)
        return self._digests[id(adapter)][1]


def describe_processor(device: torch.device) -> str:
    """What computes, since another kind rounds in another way."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


# Not the batch size, by which images differ in rounding alone.
SETTINGS: Sequence[str] = (
    "steps", "guidance", "scheduler", "negative_prompt", "width", "height", "safety_checker",
)  # fmt: skip
