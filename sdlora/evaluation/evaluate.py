"""Measures a run on its held-out images: losses, and distances between images, base beside style."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sdlora.config import RunConfig
from sdlora.data.captions import trigger_pattern
from sdlora.errors import ConfigError
from sdlora.evaluation.context import EvaluationContext, open_context
from sdlora.evaluation.heldout import HeldoutLoss
from sdlora.models.base import Base
from sdlora.models.load import full_base
from sdlora.runs import RunFolder
from sdlora.writing import write_json


@dataclass(frozen=True, slots=True)
class ImageDistance:
    """Two distances between a sample and a drawing, both root mean squares over VAE latents.

    Latents, since they are what the base sees.

    Args:
        style: Between the mean and the standard deviation of each channel, wherever things lie: palette,
            contrast and how much line there is (the statistics of AdaIN, arXiv 1703.06868, equation 8).
        content: Between the latents themselves: strokes that lie elsewhere count as much as no strokes.
    """

    style: float
    content: float


def image_distances(base: Base, samples: Sequence[Tensor], drawings: Sequence[Tensor]) -> list[ImageDistance]:
    """The distances of each pair.

    Args:
        base: Gives the VAE.
        samples: Images (3, H, W) in [-1, 1].
        drawings: The images they should look like, in the same order and sizes.
    """
    pairs = zip(_encode(base, samples), _encode(base, drawings), strict=True)
    return [
        ImageDistance(style=_rms(_statistics(sample) - _statistics(drawing)), content=_rms(sample - drawing))
        for sample, drawing in pairs
    ]


def mean_distance(distances: Sequence[ImageDistance]) -> ImageDistance:
    """The mean over images."""
    count = len(distances)
    return ImageDistance(
        style=sum(distance.style for distance in distances) / count,
        content=sum(distance.content for distance in distances) / count,
    )


def _encode(base: Base, images: Sequence[Tensor]) -> list[Tensor]:
    return [base.encode_images(image[None])[0][0].cpu().double() for image in images]


def _statistics(latents: Tensor) -> Tensor:
    """Mean and standard deviation of each channel of (C, h, w), shape (2 C,)."""
    return torch.cat([latents.mean(dim=(1, 2)), latents.std(dim=(1, 2))])


def _rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


@dataclass(frozen=True)
class Gap:
    """Held-out loss of an adapter on the quantised base it was trained on, and on the full one.

    Args:
        quantize: Quantisation of the base in training.
        trained: Loss on that base.
        used: Loss on the full base.
        images: Number of images.
    """

    quantize: str
    trained: float
    used: float
    images: int

    @property
    def relative(self) -> float:
        """Relative increase of the loss on the full base."""
        return self.used / self.trained - 1

    def __str__(self) -> str:
        return (
            f"loss {self.trained:.4f} on the {self.quantize} base it was trained on, {self.used:.4f} on the "
            f"full base ({self.relative:+.2%}), over {self.images} images"
        )


@dataclass(frozen=True)
class Evaluation:
    """Base and style on the held-out images of a run.

    Args:
        images: How many images.
        base_loss: The held-out loss without the adapter.
        style_loss: And with it.
        base_distance: The mean distances between samples of the held-out captions and the held-out
            images, without the adapter.
        style_distance: And with it.
        style_wins: For how many images the style's sample is nearer in style than the base's.
        untriggered_distance: And with the adapter, but the trigger taken out of the captions; None
            without a trigger.
        gap: The style's loss on the full base beside that on the quantised one, where it was trained; None
            unless asked for.
    """

    images: int
    base_loss: HeldoutLoss
    style_loss: HeldoutLoss
    base_distance: ImageDistance
    style_distance: ImageDistance
    style_wins: int
    untriggered_distance: ImageDistance | None = None
    gap: Gap | None = None

    @property
    def bleed(self) -> float | None:
        """The share of the style's gain that is there without the trigger (R-30)."""
        gain = self.base_distance.style - self.style_distance.style
        if self.untriggered_distance is None or gain <= 0:
            return None
        return (self.base_distance.style - self.untriggered_distance.style) / gain

    def lines(self) -> list[str]:
        """As printed."""
        base, style = self.base_distance, self.style_distance
        lines = [
            _beside("held-out loss", self.base_loss.loss, self.style_loss.loss) + f" on {self.images} images",
            _beside("style distance", base.style, style.style)
            + f"; closer with the LoRA for {self.style_wins} of {self.images}",
            _beside("content distance", base.content, style.content),
            "                  (samples against held-out images, in VAE latents: mean and standard "
            "deviation of the channels; every latent pixel)",
        ]
        if self.untriggered_distance is not None:
            share = "" if self.bleed is None else f": {self.bleed:.0%} of the style is there without it"
            lines.append(f"without trigger   style distance {self.untriggered_distance.style:.3f}{share}")
        return lines + ([f"gap               {self.gap}"] if self.gap else [])


def _beside(title: str, base: float, style: float) -> str:
    return f"{title:<17} base {base:.4f}, style {style:.4f} ({style / base - 1:+.1%})"


def evaluate(
    run: str | Path | RunFolder,
    *,
    seed: int = 0,
    full_base: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluates the final adapter of a run, and writes `evaluation.json`.

    Args:
        run: The run folder.
        seed: Seed of the samples.
        full_base: Measures the loss on the full base too, after training on a quantised one (R-48).
        progress: Called with (finished, total) sampled images.

    Raises:
        RunError: If the run has no held-out images.
        ConfigError: If `full_base` is set and the run's base is not quantised.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    if full_base:
        check_quantized(folder.path, folder.read_config())
    context = open_context(folder)
    base_loss, style_loss = context.loss(()), context.loss(context.style)
    trigger = context.config.data.trigger
    captions = [record.caption for record in context.records]
    count, total = len(captions), len(captions) * (3 if trigger else 2)
    show = progress or (lambda finished, total: None)
    samples = context.samples([(), context.style], captions, seed, lambda done: show(done, total))
    plain, styled = (image_distances(context.base, made, context.drawings) for made in samples)
    untriggered = None
    if trigger:
        bare = [remove_trigger(caption, trigger) for caption in captions]
        (without,) = context.samples([context.style], bare, seed, lambda done: show(2 * count + done, total))
        untriggered = mean_distance(image_distances(context.base, without, context.drawings))
    result = Evaluation(
        images=count,
        base_loss=base_loss,
        style_loss=style_loss,
        base_distance=mean_distance(plain),
        style_distance=mean_distance(styled),
        style_wins=sum(style.style < base.style for base, style in zip(plain, styled, strict=True)),
        untriggered_distance=untriggered,
        gap=_measure_gap(context, style_loss) if full_base else None,
    )
    values = {**asdict(result), "bleed": result.bleed, "adapter": context.run.adapter.name, "seed": seed}
    write_json(context.run.evaluation_file, values)
    return result


def check_quantized(run: Path, config: RunConfig) -> None:
    """Refuses `--full-base` for a run that has no other base.

    Raises:
        ConfigError: If its base is not quantised.
    """
    if config.base.quantize == "none":
        raise ConfigError(
            f"--full-base: run {run} was already trained on the full base; remove the option",
            key="--full-base",
        )


def _measure_gap(context: EvaluationContext, trained: HeldoutLoss) -> Gap:
    with full_base(context.base) as full:
        used = replace(context, base=full).loss(context.style)
    return Gap(context.base.info.quantize, trained.loss, used.loss, trained.num_images)


def remove_trigger(caption: str, trigger: str) -> str:
    """The caption without its trigger, and without the comma that went with it."""
    bare = trigger_pattern(trigger).sub("", caption)
    return re.sub(r"\s*,(?:\s*,)*\s*", ", ", bare).strip(" ,") or "a picture"
