"""The arithmetic of a run, stage by stage, and the time that it takes at a measured or a published speed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from sdlora.data.cache import SPEEDS, add_note, read_notes
from sdlora.dtypes import Precision
from sdlora.memory.activations import denoiser_cost, vae_costs
from sdlora.memory.cards import Card
from sdlora.memory.estimate import MemoryInputs, passes_of
from sdlora.memory.monitor import StageMonitor

# Share of a card's published speed that is reached, seconds of a pass for its launches, and of a run for all
# else. Two measurements on an A100 agree with the first two: SD 1.5 at 512 px, 31 steps a second
# (fal-ai/stable-diffusion-benchmarks), and SDXL at 1024 px, 30 steps in 3.3 s (diffusers, "Accelerate
# inference"), both with guidance and SDPA.
SHARE, LAUNCH_SECONDS, REST_SECONDS = 0.4, 0.02, 30.0


class Work(NamedTuple):
    """The arithmetic of a stage in FLOP, and the passes through a network that it is divided into."""

    flop: float
    passes: float


class ImageFlop(NamedTuple):
    """Arithmetic of one image: encoded, trained on, denoised once, and decoded."""

    encode: float
    learn: float
    denoise: float
    decode: float


def flop_of(inputs: MemoryInputs, precision: Precision) -> ImageFlop:
    """The arithmetic of an image of the largest size."""
    checkpointing = inputs.config.train.gradient_checkpointing is True
    learning, sampling = passes_of(inputs, precision, checkpointing=checkpointing)
    encode, decode = vae_costs(inputs.info, inputs.size, precision.vae_dtype)
    learn, denoise = denoiser_cost(learning), denoiser_cost(replace(sampling, batch_size=1))
    return ImageFlop(encode.flop, learn.flop / learning.batch_size, denoise.flop, decode.flop)


@dataclass(frozen=True)
class Speed:
    """How fast a device trains with a base.

    Args:
        rates: FLOP per second, by stage; a stage that is missing has the mean of the others.
        rest: Seconds for all else in a run: loading, export, postflight.
        launch: Seconds of each pass beside its arithmetic; measured rates contain them.
        source: Where the numbers are from, for the plan.
    """

    rates: Mapping[str, float]
    rest: float
    source: str
    launch: float = 0.0

    def seconds(self, work: Mapping[str, Work]) -> dict[str, float]:
        """Seconds of each stage."""
        mean = sum(self.rates.values()) / len(self.rates)
        return {
            stage: flop / self.rates.get(stage, mean) + passes * self.launch
            for stage, (flop, passes) in work.items()
        }


class SpeedMeter:
    """The speed of a run that is under way: what each stage has computed, and how long that took."""

    def __init__(self, known: Speed | None, watch: StageMonitor, work: Mapping[str, Work]) -> None:
        self._known, self._watch = known, watch
        # Of a stage: work left and seconds taken when it was first looked at.
        self._began = {stage: (left.flop, 0.0) for stage, left in work.items()}

    def warm_up(self, left: Mapping[str, Work]) -> None:
        """Leaves out the first step, which compiles kernels and fills caches."""
        self._began["training"] = (left["training"].flop, self._watch.seconds("training"))

    def speed(self, left: Mapping[str, Work]) -> Speed | None:
        """Rates so far, over those that were known before; None if there are none yet."""
        rates = dict(self._known.rates) if self._known and not self._known.launch else {}
        for stage, (flop, since) in self._began.items():
            done, seconds = flop - left[stage].flop, self._watch.seconds(stage) - since
            if done > 0 and seconds > 0:
                rates[stage] = done / seconds
        rest = self._known.rest if self._known else 0.0
        return Speed(rates, rest, "measured") if rates else None

    def keep(self, key: str, left: Mapping[str, Work]) -> None:
        """Keeps the speed of a finished run for the plans to come."""
        if key and (speed := self.speed(left)):
            spent = sum(self._watch.seconds(stage) for stage in self._began)
            write_speed(key, replace(speed, rest=max(0.0, self._watch.total_seconds - spent)))


def speed_of_card(card: Card) -> Speed | None:
    """An estimate from the published speed; None for a card without a name."""
    if card.flops is None:
        return None
    source = f"a rough estimate from the published speed of the {card.name.rpartition(' ')[0]}"
    return Speed({"training": SHARE * card.flops}, REST_SECONDS, source, LAUNCH_SECONDS)


def read_speed(key: str) -> Speed | None:
    """The speed last measured under a key that names device and base; None if there is none."""
    with suppress(AttributeError, KeyError, TypeError, ValueError):
        known = read_notes(SPEEDS)[key]
        rates = {str(stage): float(rate) for stage, rate in known["rates"].items()}
        rest = float(known["rest"])
        if rates and all(0 < rate < math.inf for rate in rates.values()) and 0 <= rest < math.inf:
            return Speed(rates, rest, "at the speed last measured here")
    return None


def write_speed(key: str, speed: Speed) -> None:
    """Keeps a measured speed for the plans to come; errors while writing the cache are ignored."""
    rates = {stage: float(f"{rate:.3g}") for stage, rate in speed.rates.items()}
    add_note(SPEEDS, key, {"rates": rates, "rest": round(speed.rest, 1)})


def as_time(seconds: float) -> str:
    """`45 s`, `12 min`, `1 h 20 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def describe_times(seconds: Mapping[str, float]) -> str:
    """Seconds by stage in words; validation is part of training."""
    shown = {
        "encoding": seconds.get("encoding", 0.0),
        "training": seconds.get("training", 0.0) + seconds.get("validation", 0.0),
        "sampling": seconds.get("sampling", 0.0),
        "all else": seconds.get("rest", 0.0),
    }
    return ", ".join(f"{stage} {as_time(size)}" for stage, size in shown.items() if size >= 0.5)
