"""What the tests of sampling share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sdlora.lora.adapter import Adapter
from sdlora.models.base import Base
from sdlora.sampling import generate as sampling
from sdlora.sampling.images import SampledImage


def generate(
    base: Base,
    adapter: Adapter | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    strengths: Sequence[float],
    *settings: Any,
    **options: Any,
) -> list[SampledImage]:
    """Draws the base, and an adapter at some strengths."""
    return sampling.generate(
        base, sampling.make_columns(adapter, strengths), prompts, seeds, *settings, **options
    )
