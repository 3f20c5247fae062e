"""Captions without a captioning model: a drawing is named after what the base draws most like it.

N drawings of the base, D numbers of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image, ImageOps

from sdlora.dtypes import has_bf16
from sdlora.errors import ModelError
from sdlora.evaluation.features import INK, DrawingFeatures, Rows, thumbnails, unit_rows
from sdlora.sampling.session import SampleRequest, choose_device, plan_sample
from sdlora.sampling.store import ImageStore

HANDS = (", flat drawing", ", outlined")
SETTINGS = {"seeds": [0], "steps": 6, "guidance": 3.0, "batch_size": 16}
COLOR_WEIGHT = 0.5
MARGIN = 0.075  # of the longer side of what is drawn


class Namer:
    """Names drawings on a plain ground after the likeliest of the things that a base knows.

    They are compared with the base's own drawings, in several styles, by content features and a little by
    color, wherever in the image they are. `sdlora/builtin/README.md` says how often the name is right.

    Args:
        source: A base that lists what it draws in `things.txt`.
        progress: Called with (finished, total) of the base's drawings, which are kept in the cache.

    Raises:
        ModelError: If the base has no such list.
    """

    def __init__(self, source: str, progress: Callable[[int, int], None] | None = None) -> None:
        things = plan_sample(None, SampleRequest(source)).info.things
        if not things:
            problem = f"--model {source}: this base has no things.txt, a list of what it draws"
            raise ModelError(f"{problem}; use builtin, or a captioning model", key="option--model")
        self.names = [thing for _ in HANDS for thing in things]
        prompts = [thing + hand for hand in HANDS for thing in things]
        request = SampleRequest(source, settings={**SETTINGS, "prompts": prompts})
        plan = plan_sample(None, request).checked(request, resumes=True)
        dtype = torch.bfloat16 if has_bf16(choose_device()) else None
        drawn = replace(plan, dtype=dtype).draw(ImageStore(), progress)
        self.rows = _describe([one.image for one in drawn])

    def __call__(self, image: Image.Image) -> str:
        """The name of an RGB image, such as `a red apple`."""
        return self.names[int((self.rows @ _describe([image])[0]).argmax())]


def _describe(images: Sequence[Image.Image]) -> Rows:
    """Rows (N, D), whose product is the likeness of two images: cosine of content, and of colors."""
    centered = [center_ink(image) for image in images]
    parts = [DrawingFeatures().content(centered), thumbnails(centered)]
    return np.hstack([unit_rows(parts[0]), np.sqrt(COLOR_WEIGHT) * unit_rows(parts[1])])


def center_ink(image: Image.Image) -> Image.Image:
    """What is not white, in the middle of a square and as large as fits."""
    image = image.convert("RGB")
    inked = np.asarray(image).min(axis=2) < INK * 255
    rows, columns = np.flatnonzero(inked.any(axis=1)), np.flatnonzero(inked.any(axis=0))
    if len(rows):
        image = image.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    side = max(image.size)
    square = ImageOps.pad(image, (side, side), color="white")
    return ImageOps.expand(square, round(MARGIN * side), "white")
