"""Measures a run on its held-out pictures: losses, and distances between pictures, base beside style."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from sdlora.config import RunConfig
from sdlora.data.buckets import BucketPlan, plan_buckets
from sdlora.data.images import crop_image, load_record
from sdlora.data.records import ImageRecord, Size
from sdlora.data.scan import scan_dataset
from sdlora.data.tensors import crop_to_time_ids, image_to_tensor
from sdlora.diffusion.schedule import schedule_from_config
from sdlora.errors import RunError
from sdlora.evaluation.heldout import HeldoutItem, HeldoutLoss, heldout_loss
from sdlora.evaluation.pictures import PictureDistance, mean_distance, picture_distances, to_pixels
from sdlora.lora.ancestors import Stack, find_ancestors, stack_of
from sdlora.lora.attach import mounted
from sdlora.lora.files import load_adapter
from sdlora.models.condition import Condition
from sdlora.models.dtypes import DTYPES
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base
from sdlora.models.stable_diffusion import StableDiffusion
from sdlora.runs import RunFolder
from sdlora.sampling.generate import Column, generate_columns
from sdlora.sampling.session import choose_device, make_request
from sdlora.writing import write_json

MAX_IMAGES = 40


@dataclass(frozen=True)
class Evaluation:
    """Base and style on the held-out pictures of a run.

    Args:
        images: How many pictures.
        base_loss: The held-out loss without the adapter.
        style_loss: And with it.
        base_distance: The mean distances between samples of the held-out captions and the held-out
            pictures, without the adapter.
        style_distance: And with it.
        style_wins: For how many pictures the style's sample is nearer in style than the base's.
        untriggered_distance: And with the adapter, but the trigger taken out of the captions; None
            without a trigger.
    """

    images: int
    base_loss: HeldoutLoss
    style_loss: HeldoutLoss
    base_distance: PictureDistance
    style_distance: PictureDistance
    style_wins: int
    untriggered_distance: PictureDistance | None = None

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
            _beside("held-out loss", self.base_loss.loss, self.style_loss.loss)
            + f" on {self.images} pictures",
            _beside("style distance", base.style, style.style)
            + f"; the style is nearer for {self.style_wins} of {self.images}",
            _beside("content distance", base.content, style.content),
            "                  (samples against held-out pictures, in VAE latents: mean and standard "
            "deviation of the channels; every latent pixel)",
        ]
        if self.untriggered_distance is not None:
            share = "" if self.bleed is None else f": {self.bleed:.0%} of the style is there without it"
            lines.append(f"without trigger   style distance {self.untriggered_distance.style:.3f}{share}")
        return lines


def _beside(title: str, base: float, style: float) -> str:
    return f"{title:<17} base {base:.4f}, style {style:.4f} ({style / base - 1:+.1%})"


def evaluate(
    run: str | Path | RunFolder, *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> Evaluation:
    """Evaluates the final adapter of a run, and writes `evaluation.json`.

    Args:
        run: The run folder.
        seed: Of the samples.
        progress: Told (finished, total) sampled pictures.

    Raises:
        RunError: If the run has no held-out pictures.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    config = folder.read_config()
    info = inspect_base(config.base, config.objective)
    index = scan_dataset(config.images, config.data, config.train.seed)
    records = index.heldout[:MAX_IMAGES]
    if not records:
        raise RunError(
            f"run {folder.path} has no held-out pictures; train with data.heldout=0.1 or a folder heldout/"
        )
    adapter = load_adapter(folder.adapter)
    style = (*stack_of(find_ancestors(folder.adapter, adapter)), (adapter, 1.0))
    device = choose_device()
    base = load_base(info, dtype=DTYPES[folder.base_dtype], device=device)
    plan = plan_buckets(
        index.records,
        config.data.resolution or info.resolution,
        config.data,
        heldout=index.heldout,
        min_step=info.min_step,
        seed=config.train.seed,
    )
    drawings = [_as_seen(record, plan, config) for record in records]
    base_loss, style_loss = _losses(base, style, records, drawings, plan)
    trigger = config.data.trigger
    total = len(records) * (3 if trigger else 2)
    captions = [record.caption for record in records]
    samples = _samples(base, style, config, records, captions, plan, seed)
    plain, styled = (picture_distances(base, samples[strength], drawings) for strength in (0.0, 1.0))
    if progress is not None:
        progress(2 * len(records), total)
    untriggered = None
    if trigger:
        bare = [remove_trigger(caption, trigger) for caption in captions]
        without = _samples(base, style, config, records, bare, plan, seed)[1.0]
        untriggered = mean_distance(picture_distances(base, without, drawings))
    result = Evaluation(
        images=len(records),
        base_loss=base_loss,
        style_loss=style_loss,
        base_distance=mean_distance(plain),
        style_distance=mean_distance(styled),
        style_wins=sum(style.style < base.style for base, style in zip(plain, styled, strict=True)),
        untriggered_distance=untriggered,
    )
    values = {**asdict(result), "bleed": result.bleed, "adapter": folder.adapter.name, "seed": seed}
    write_json(folder.evaluation_file, values)
    return result


def remove_trigger(caption: str, trigger: str) -> str:
    """The caption without its trigger, and without the comma that went with it."""
    bare = re.sub(rf"\b{re.escape(trigger)}\b", "", caption, flags=re.IGNORECASE)
    return re.sub(r"\s*,(?:\s*,)*\s*", ", ", bare).strip(" ,") or "a picture"


def _as_seen(record: ImageRecord, plan: BucketPlan, config: RunConfig) -> Tensor:
    image = load_record(record, config.data.background)
    return image_to_tensor(crop_image(image, plan.crops[record.name][0]))


def _losses(
    base: StableDiffusion,
    style: Stack,
    records: Sequence[ImageRecord],
    drawings: Sequence[Tensor],
    plan: BucketPlan,
) -> tuple[HeldoutLoss, HeldoutLoss]:
    schedule = schedule_from_config(base.info.scheduler_config)
    latents = [base.encode_images(drawing[None])[0][0].cpu() for drawing in drawings]

    def measure() -> HeldoutLoss:
        items = [
            HeldoutItem(record.digest, mean, _condition(base, record, plan))
            for record, mean in zip(records, latents, strict=True)
        ]
        return heldout_loss(base.denoise, schedule, items, batch_size=8, device=base.device)

    plain = measure()
    with mounted(base.components, style):
        return plain, measure()


def _condition(base: StableDiffusion, record: ImageRecord, plan: BucketPlan) -> Condition:
    condition = base.encode_captions([record.caption])[0].to("cpu")
    if not base.info.has_time_ids:
        return condition
    return condition.with_time_ids(crop_to_time_ids(record.size, plan.crops[record.name][0]))


def _samples(
    base: StableDiffusion,
    style: Stack,
    config: RunConfig,
    records: Sequence[ImageRecord],
    captions: Sequence[str],
    plan: BucketPlan,
    seed: int,
) -> dict[float, list[Tensor]]:
    """Samples of the captions, each in the size of its picture, for strengths 0 and 1."""
    groups: dict[Size, list[int]] = defaultdict(list)
    for number, record in enumerate(records):
        groups[plan.bucket_of(record.name)].append(number)
    found: dict[tuple[float, int], Tensor] = {}
    for size, numbers in groups.items():
        request = make_request(config.sample, base.info, (size.width, size.height))
        prompts = [captions[number] for number in numbers]
        # Measured, not shown: a blank in place of a picture would be measured too.
        settings = replace(request.settings, safety_checker=False)
        pictures = generate_columns(base, [Column(), Column(style, 1.0)], prompts, [seed], settings)
        by_strength = {strength: [p for p in pictures if p.strength == strength] for strength in (0.0, 1.0)}
        for strength, made in by_strength.items():
            found |= {(strength, n): to_pixels(p.image) for n, p in zip(numbers, made, strict=True)}
    return {strength: [found[strength, n] for n in range(len(records))] for strength in (0.0, 1.0)}
