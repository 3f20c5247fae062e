"""What becomes of a LoRA that was trained on a base of few bits, on the full base where it is used (R-48)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from sdlora.diffusion.schedule import NoiseSchedule
from sdlora.evaluation.heldout import HeldoutItem, heldout_loss
from sdlora.lora.attach import mounted
from sdlora.models.load import load_unet
from sdlora.models.stable_diffusion import StableDiffusion
from sdlora.tree.lineage import Stack


@dataclass(frozen=True)
class Gap:
    """The held-out loss of one adapter on two bases.

    Args:
        quantize: How the base was kept while it trained.
        trained: The loss on that.
        used: And on the full base.
        images: Over how many images.
    """

    quantize: str
    trained: float
    used: float
    images: int

    @property
    def relative(self) -> float:
        """By how much the loss is larger on the full base."""
        return self.used / self.trained - 1

    def __str__(self) -> str:
        return (
            f"loss {self.trained:.4f} on the {self.quantize} base it was trained on, {self.used:.4f} on the "
            f"full base ({self.relative:+.2%}), over {self.images} images"
        )


@contextmanager
def full_base(base: StableDiffusion) -> Iterator[StableDiffusion]:
    """The base with a UNet that is not quantised, in the same dtype, while its own waits on the CPU."""
    device = base.device
    base.unet.to("cpu")
    try:
        unet = load_unet(base.info.parts["unet"], base.dtype, device)
        yield replace(base, unet=unet, info=replace(base.info, quantize="none"))
    finally:
        base.unet.to(device)


def measure_gap(
    base: StableDiffusion, stack: Stack, items: Sequence[HeldoutItem], schedule: NoiseSchedule
) -> Gap:
    """Measures the loss twice, at the same noise.

    Args:
        base: Of few bits; what is mounted on it stays.
        stack: The adapter, on top of what it stands on.
        items: Held-out images with the adapter's own text states.
        schedule: The base's forward process.
    """

    def measure(of: StableDiffusion) -> float:
        with mounted(of.components, stack):
            return heldout_loss(of.denoise, schedule, items, batch_size=4, device=of.device).loss

    trained = measure(base)
    with full_base(base) as full:
        return Gap(base.info.quantize, trained, measure(full), len(items))
