"""Sampled images: their settings, checked before the first is drawn, and their PNG files."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

from diffusers import schedulers
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdlora.config import SampleSection
from sdlora.data.images import UnreadableImageError, measure_file
from sdlora.errors import ConfigError, shorten
from sdlora.models.base import quiet
from sdlora.models.info import BaseInfo
from sdlora.writing import write_file

FLAGGED = "withheld by the safety checker"
NOT_FINITE = "not finite; try a lower strength or guidance"
BLANKS = ("", FLAGGED, NOT_FINITE)
"""Reasons for a blank image; the empty one means that the image is shown."""

SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DDPMScheduler": "DDPM",
    "PNDMScheduler": "PLMS",
    "LMSDiscreteScheduler": "LMS",
    "EulerDiscreteScheduler": "Euler",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2DiscreteScheduler": "DPM2",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSinglestepScheduler": "DPM++ 2S",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "UniPCMultistepScheduler": "UniPC",
    "LCMScheduler": "LCM",
}
"""A1111's names of diffusers' schedulers; ` Karras` behind one spaces its sigmas as 2206.00364."""
KARRAS = " Karras"


@dataclass(frozen=True, slots=True)
class StartImage:
    """An image that sampling starts from (SDEdit, arXiv 2108.01073), instead of noise alone.

    Args:
        path: The file; scaled and cropped to the size of the samples.
        digest: SHA-256 of the file.
        denoise: Share of the steps that are run: near 0 keeps the image, 1 keeps almost nothing of it.
    """

    path: Path
    digest: str
    denoise: float

    @classmethod
    def open(
        cls, file: str | Path, denoise: float, side: int, step: int
    ) -> tuple[StartImage, tuple[int, int]]:
        """The image, and the size of its samples: its aspect ratio, and about the area of `side` × `side`.

        Width and height are multiples of `step`. Raises a ConfigError if the file or `denoise` is unfit.
        """
        if not 0 < denoise <= 1:
            problem = f"--denoise {denoise:g} must be above 0, which keeps the image, up to 1; use 0.4 to 0.8"
            raise ConfigError(problem, key="option--denoise")
        try:
            digest, size, _ = measure_file(Path(file))
        except UnreadableImageError as error:
            raise ConfigError(f"--image {error.path} {error.reason}", key="option--image") from None
        scale = side / (size.width * size.height) ** 0.5
        fitted = (max(1, round(length * scale / step)) * step for length in (size.width, size.height))
        return cls(Path(file), digest, denoise), (next(fitted), next(fitted))


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """Settings of `generate`; None, or a size of 0, stands for the base's own choice.

    Args:
        guidance: 0 and 1 switch classifier-free guidance off.
        scheduler: Name of a diffusers scheduler class, such as `DDIMScheduler`.
        width: In pixels, like `height`.
        batch_size: Number of images that are denoised at once.
        safety_checker: Whether images that the base's own checker flags are left blank.
        start: An image to start from.
    """

    steps: int = 25
    guidance: float | None = None
    scheduler: str | None = None
    negative_prompt: str = ""
    width: int = 0
    height: int = 0
    batch_size: int = 4
    safety_checker: bool = True
    start: StartImage | None = None

    @classmethod
    def of(cls, sample: SampleSection, size: tuple[int, int]) -> SampleSettings:
        """Settings from a config, at a width and height in pixels."""
        names = ("steps", "guidance", "scheduler", "negative_prompt", "batch_size", "safety_checker")
        return cls(**{name: getattr(sample, name) for name in names}, width=size[0], height=size[1])


@dataclass(frozen=True, slots=True)
class SampledImage:
    """One image of a grid.

    Args:
        strength: Strength of the adapter; 0 for the base.
        blank: One of `BLANKS`.
        settings: Settings from `resolve_settings`.
        adapter: Name of the adapter in a grid that compares several.
    """

    image: Image.Image
    prompt: str
    seed: int
    strength: float
    blank: str = ""
    settings: SampleSettings = SampleSettings()
    adapter: str = ""


def save_images(
    folder: Path, images: Sequence[SampledImage], grid: Image.Image, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Writes `00.png`, `01.png`, … in the order of the grid's cells, and `grid.png`; returns its path.

    Args:
        metadata: Added to the `sdlora` text of each file; names in `base` and `adapter` also to `parameters`.
    """
    metadata = dict(metadata or {})
    digits = max(2, len(str(len(images) - 1)))
    for number, image in enumerate(images):
        write_image(folder / f"{number:0{digits}d}.png", image, metadata)
    return write_png(folder / "grid.png", grid, metadata)


def slug(text: str) -> str:
    """A text as part of a file name."""
    return re.sub(r"[^\w.]+", "-", text).strip("-.")[:80]


def write_image(path: Path, image: SampledImage, metadata: Mapping[str, Any]) -> Path:
    """Writes one image with its settings, as `sdlora` and as A1111's `parameters`."""
    settings, start = asdict(image.settings), image.settings.start
    del settings["start"]
    values = {
        **metadata,
        "prompt": image.prompt,
        "seed": image.seed,
        "strength": image.strength,
        "withheld": image.blank == FLAGGED,
        **({"blank": image.blank} if image.blank else {}),
        **({"adapter": image.adapter} if image.adapter else {}),
        **settings,
        **({"image": start.path.name, "denoise": start.denoise} if start else {}),
    }
    return write_png(path, image.image, values, _parameters_text(image, metadata))


def write_png(path: Path, image: Image.Image, values: Mapping[str, Any], parameters: str = "") -> Path:
    info = PngInfo()
    # Pillow writes Latin-1 as tEXt, which every reader knows, and the rest as iTXt.
    if parameters:
        info.add_text("parameters", parameters)
    if values:
        info.add_text("sdlora", json.dumps(values, ensure_ascii=False, default=str))
    return write_file(path, lambda file: image.save(file, "PNG", pnginfo=info), _verify_png)


def _verify_png(path: Path) -> None:
    with Image.open(path) as image:
        image.verify()


def _parameters_text(image: SampledImage, metadata: Mapping[str, Any]) -> str:
    """The settings in A1111's format, which its "PNG Info" and other viewers read."""
    settings = image.settings
    fields = {
        "Steps": settings.steps,
        "Sampler": sampler_of(settings.scheduler),
        "CFG scale": f"{settings.guidance:g}" if settings.guidance is not None else None,
        "Seed": image.seed,
        "Size": f"{image.image.width}x{image.image.height}",
        "Model": metadata.get("base"),
        "Denoising strength": settings.start and settings.start.denoise,
    }
    lora = image.adapter or metadata.get("adapter")
    tag = f" <lora:{lora}:{image.strength:g}>" if lora and image.strength else ""
    lines = [image.prompt + tag]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items() if value is not None))
    return "\n".join(lines)


def sampler_of(scheduler: str | None) -> str | None:
    """A1111's name of a scheduler, or its own."""
    name = (scheduler or "").removesuffix(KARRAS)
    return SAMPLERS[name] + (scheduler or "").removeprefix(name) if name in SAMPLERS else scheduler


SCHEDULERS = sorted(
    {member.name for member in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"}
    | {"LCMScheduler", "TCDScheduler", "SASolverScheduler"}
)
"""diffusers' schedulers for Stable Diffusion; EDM's needs networks that are preconditioned in its own way."""
PLACEHOLDER = re.compile(r"\{[^{}]*\}")


def make_scheduler(info: BaseInfo, name: str | None = None) -> Any:
    """Creates a scheduler with the base's betas and prediction type.

    `name` is a diffusers class, with or without the ending `Scheduler`, or a name of `SAMPLERS`, also with
    ` Karras` behind it; by default the base's own. Raises a ConfigError if it is not known, or a package that
    it needs is not installed.
    """
    wanted = name or str(info.scheduler_config.get("_class_name", "DDIMScheduler"))
    plain = wanted.lower().removesuffix(KARRAS.lower())
    short = next((known for known, title in SAMPLERS.items() if title.lower() == plain), plain).lower()
    short = short.removesuffix("scheduler")
    entry = next((known for known in SCHEDULERS if known.lower().removesuffix("scheduler") == short), None)
    if entry is None and name is None:
        raise ConfigError(
            f"sample.scheduler is not set, and sdlora does not support the scheduler {shorten(wanted)} "
            f"of the base {info.name}; set sample.scheduler, for example to DDIMScheduler",
            key="base.scheduler",
        )
    takes_karras = entry and "use_karras_sigmas" in signature(getattr(schedulers, entry)).parameters
    if entry is None or (plain != wanted.lower() and not takes_karras):
        names = {title.lower(): known for known, title in SAMPLERS.items()} | {one: one for one in SCHEDULERS}
        near = difflib.get_close_matches(plain.replace("_", " "), names, 1, 0.6)
        guess = [names[near[0]]] if near else difflib.get_close_matches(wanted, SCHEDULERS, 1, 0.4)
        remedy = f"did you mean {guess[0]}?" if guess else "use DDIMScheduler or EulerDiscreteScheduler"
        raise ConfigError(f"sample.scheduler = {wanted!r} is not a scheduler for this base; {remedy}")
    try:
        with quiet():
            karras = {"use_karras_sigmas": True} if plain != wanted.lower() else {}
            return getattr(schedulers, entry).from_config({**info.scheduler_config, **karras})
    except ImportError as error:
        package = re.search(r"requires the (\S+) library", str(error))
        raise ConfigError(
            f"sample.scheduler = {wanted!r} needs {package.group(1) if package else 'a package'}, "
            "which is not installed; install it, or use DDIMScheduler",
            key="scheduler-package",
        ) from None


def as_prompt(caption: str) -> str:
    """A caption without its braces, which would be placeholders in a prompt."""
    return PLACEHOLDER.sub(lambda found: found[0].strip("{}"), caption)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raises a ConfigError with one line for each prompt that is empty or has a placeholder left."""
    problems = [] if prompts else ["sample.prompts is empty; set at least one prompt"]
    for prompt in prompts:
        left = PLACEHOLDER.search(prompt)
        if not prompt.strip():
            problems.append("sample.prompts contains an empty prompt; describe what the image should show")
        elif left:
            remedy = "set data.trigger" if left.group() == "{trigger}" else f"replace {left.group()} by words"
            problems.append(f"sample.prompts: a placeholder is left in {prompt!r}; {remedy}")
    if problems:
        raise ConfigError(*problems)


def resolve_settings(info: BaseInfo, settings: SampleSettings) -> SampleSettings:
    """Fills in the base's own choices; raises a ConfigError with a line for each setting that is wrong."""
    scheduler = make_scheduler(info, settings.scheduler)
    is_karras = (settings.scheduler or "").lower().endswith(KARRAS.lower())
    resolved = replace(
        settings,
        guidance=info.defaults.guidance if settings.guidance is None else settings.guidance,
        scheduler=type(scheduler).__name__ + (KARRAS if is_karras else ""),
        width=settings.width or info.resolution,
        height=settings.height or info.resolution,
    )
    wrong_sizes = [
        f"image {side} = {pixels} must be a multiple of {info.min_step} pixels; "
        f"use {max(1, round(pixels / info.min_step)) * info.min_step}"
        for side, pixels in (("width", resolved.width), ("height", resolved.height))
        if pixels < info.min_step or pixels % info.min_step
    ]
    problems, steps, limit = list(wrong_sizes), settings.steps, info.num_train_timesteps
    if not 1 <= steps <= limit:
        problems.append(f"sample.steps = {steps} must be 1 to {limit}, the base's number of timesteps")
    else:
        try:
            with quiet():
                scheduler.set_timesteps(steps)
        except (ValueError, IndexError):
            # PNDM, the scheduler of SD 1.5, needs at least four.
            problems.append(f"sample.steps = {steps} is too few for {resolved.scheduler}; use 20 to 50")
    if settings.start and int(steps * settings.start.denoise) < 1:
        share = settings.start.denoise
        problems.append(f"sample.steps = {steps} leaves no step for --denoise {share:g}; use more")
    if problems:
        raise ConfigError(*problems, key="option--size" if wrong_sizes else "")
    return resolved
