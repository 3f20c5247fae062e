"""Sampled images: their settings, resolved before the first is drawn, and their PNG files."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import schedulers
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdlora.config import SampleSection
from sdlora.errors import ConfigError, shorten
from sdlora.models.base import quiet
from sdlora.models.info import BaseInfo
from sdlora.writing import check_writable, next_free_folder, write_file

FLAGGED = "withheld by the safety checker"
NOT_FINITE = "not finite; try a lower strength or guidance"
BLANKS = ("", FLAGGED, NOT_FINITE)
"""Reasons for a blank image; empty for an image."""

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
"""What A1111 calls diffusers' schedulers."""


@dataclass(frozen=True, slots=True)
class SampleSettings:
    """How images are made; None stands for the base's own choice.

    Args:
        guidance: 0 and 1 switch classifier-free guidance off.
        scheduler: A diffusers scheduler class, such as `DDIMScheduler`.
        width: In pixels, as height.
        batch_size: Images denoised at once.
        safety_checker: Whether images that the base's own checker flags are left blank.
    """

    steps: int = 25
    guidance: float | None = None
    scheduler: str | None = None
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None
    batch_size: int = 4
    safety_checker: bool = True

    @classmethod
    def of(cls, sample: SampleSection, size: tuple[int, int]) -> SampleSettings:
        """The settings of a run, at a width and height in pixels."""
        width, height = size
        names = ("steps", "guidance", "scheduler", "negative_prompt", "batch_size", "safety_checker")
        return cls(**{name: getattr(sample, name) for name in names}, width=width, height=height)


@dataclass(frozen=True, slots=True)
class SampledImage:
    """One image of a grid.

    Args:
        strength: 0 is the base.
        blank: One of `BLANKS`; if it is not empty, `image` shows nothing.
        settings: As resolved against the base.
        adapter: What to call the adapter in a grid that compares several.
    """

    image: Image.Image
    prompt: str
    seed: int
    strength: float
    blank: str = ""
    settings: SampleSettings = SampleSettings()
    adapter: str = ""


def parameters_text(image: SampledImage, metadata: Mapping[str, Any]) -> str:
    """The settings as A1111 writes them, so that its "PNG Info" and other viewers read them."""
    settings = image.settings
    fields = {
        "Steps": settings.steps,
        "Sampler": SAMPLERS.get(settings.scheduler or "", settings.scheduler),
        "CFG scale": f"{settings.guidance:g}" if settings.guidance is not None else None,
        "Seed": image.seed,
        "Size": f"{image.image.width}x{image.image.height}",
        "Model": metadata.get("base"),
    }
    lora = image.adapter or metadata.get("adapter")
    tag = f" <lora:{lora}:{image.strength:g}>" if lora and image.strength else ""
    lines = [image.prompt + tag]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in fields.items() if value is not None))
    return "\n".join(lines)


def choose_folder(out: str | Path | None, name: str) -> Path:
    """The folder for a grid; `samples/NAME`, or the next that is free, if none is given.

    Raises:
        ConfigError: If the one that is given holds a grid.
        RunError: If it cannot be written.
    """
    folder = Path(out) if out is not None else next_free_folder(Path("samples") / name)
    if (folder / "grid.png").exists():
        raise ConfigError(f"--out {folder} already contains a grid; use another folder")
    check_writable(folder)
    return folder


def save_images(
    folder: Path, images: Sequence[SampledImage], grid: Image.Image, metadata: Mapping[str, Any] | None = None
) -> Path:
    """Writes `00.png` and so on, row by row of the grid, and `grid.png`.

    Args:
        metadata: Goes into each file's `sdlora` text; `base` and `adapter` (names) also into `parameters`.

    Returns:
        The path of `grid.png`.
    """
    metadata = dict(metadata or {})
    digits = max(2, len(str(len(images) - 1)))
    for number, image in enumerate(images):
        values = {
            **metadata,
            "prompt": image.prompt,
            "seed": image.seed,
            "strength": image.strength,
            "withheld": image.blank == FLAGGED,
            **({"blank": image.blank} if image.blank else {}),
            **({"adapter": image.adapter} if image.adapter else {}),
            **asdict(image.settings),
        }
        texts = {"parameters": parameters_text(image, metadata), "sdlora": _json(values)}
        _write_png(folder / f"{number:0{digits}d}.png", image.image, texts)
    return _write_png(folder / "grid.png", grid, {"sdlora": _json(metadata)} if metadata else {})


def _write_png(path: Path, image: Image.Image, texts: Mapping[str, str]) -> Path:
    info = PngInfo()
    for key, text in texts.items():
        # Latin-1 goes into tEXt, which every reader knows; the rest needs iTXt.
        info.add_text(key, text)
    return write_file(path, lambda file: image.save(file, "PNG", pnginfo=info), _verify_png)


def _verify_png(path: Path) -> None:
    with Image.open(path) as image:
        image.verify()


def _json(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False, default=str)


SCHEDULERS = sorted(
    {member.name for member in KarrasDiffusionSchedulers} - {"EDMEulerScheduler"}
    | {"LCMScheduler", "TCDScheduler", "SASolverScheduler"}
)
"""Schedulers of diffusers that can step Stable Diffusion; EDM's is for networks preconditioned its way."""


def make_scheduler(info: BaseInfo, name: str | None = None) -> Any:
    """A fresh scheduler with the base's betas and prediction type.

    Args:
        name: A diffusers class, with or without its ending `Scheduler`; the base's own if left out.

    Raises:
        ConfigError: If there is none of that name, or it needs a package that is not installed.
    """
    wanted = name or str(info.scheduler_config.get("_class_name", "DDIMScheduler"))
    full = {entry.lower().removesuffix("scheduler"): entry for entry in SCHEDULERS}
    entry = full.get(wanted.lower().removesuffix("scheduler"))
    if entry is None:
        guess = difflib.get_close_matches(wanted, SCHEDULERS, 1, 0.4)
        remedy = f"did you mean {guess[0]}?" if guess else "use DDIMScheduler or EulerDiscreteScheduler"
        if name is None:
            raise ConfigError(
                f"the base {info.name} names the scheduler {shorten(wanted)}, which sdlora does not "
                "support; set sample.scheduler, such as DDIMScheduler"
            )
        raise ConfigError(f"sample.scheduler = {wanted!r} is not a scheduler for this base; {remedy}")
    try:
        with quiet():
            return getattr(schedulers, entry).from_config(dict(info.scheduler_config))
    except ImportError as error:
        package = re.search(r"requires the (\S+) library", str(error))
        raise ConfigError(
            f"sample.scheduler = {wanted!r} needs {package.group(1) if package else 'a package'}, "
            "which is not installed; install it, or use DDIMScheduler"
        ) from None


PLACEHOLDER = re.compile(r"\{[^{}]*\}")


def check_prompts(prompts: Sequence[str]) -> None:
    """Refuses what cannot be a prompt.

    Raises:
        ConfigError: With one line for each prompt that is empty or has a placeholder left in it (R-30).
    """
    problems = [] if prompts else ["sample.prompts is empty; set at least one prompt"]
    for prompt in prompts:
        left = PLACEHOLDER.search(prompt)
        if not prompt.strip():
            problems.append("sample.prompts has an empty prompt; describe what the image should show")
        elif left and left.group() == "{trigger}":
            problems.append(
                f"prompt {prompt!r} has {{trigger}} in it but no trigger is set; set data.trigger"
            )
        elif left:
            problems.append(f"prompt {prompt!r} contains the placeholder {left.group()}; replace it")
    if problems:
        raise ConfigError(*problems)


def resolve_settings(info: BaseInfo, settings: SampleSettings) -> SampleSettings:
    """Fills in the base's own choices and checks the rest against it.

    Raises:
        ConfigError: With one line for each setting that does not fit.
    """
    scheduler = make_scheduler(info, settings.scheduler)
    name = type(scheduler).__name__
    sides = {
        side: info.resolution if asked is None else asked
        for side, asked in (("width", settings.width), ("height", settings.height))
    }
    problems = [
        f"the images' {side} = {pixels} must be a multiple of {info.min_step} pixels; "
        f"use {max(1, round(pixels / info.min_step)) * info.min_step}"
        for side, pixels in sides.items()
        if pixels < info.min_step or pixels % info.min_step
    ]
    if not 1 <= settings.steps <= info.num_train_timesteps:
        problems.append(
            f"sample.steps = {settings.steps} must be 1 to {info.num_train_timesteps} (the base's timesteps)"
        )
    elif not _can_step(scheduler, settings.steps):
        problems.append(f"sample.steps = {settings.steps} is too few for {name}; use 20 to 50")
    if problems:
        raise ConfigError(*problems)
    guidance = info.guidance if settings.guidance is None else settings.guidance
    width, height = sides["width"], sides["height"]
    return replace(settings, guidance=guidance, scheduler=name, width=width, height=height)


def _can_step(scheduler: Any, steps: int) -> bool:
    """Whether a scheduler has timesteps for so few; PNDM, the one of SD 1.5, wants four."""
    try:
        with quiet():
            scheduler.set_timesteps(steps)
    except (ValueError, IndexError):
        return False
    return True
