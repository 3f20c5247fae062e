"""What a base is, told by its JSON files and tensor tables alone, before any weight is loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdlora.config import BaseSection, ObjectiveSection, Quantize, RunConfig
from sdlora.errors import ConfigError, ModelError
from sdlora.models.checks import (
    Family,
    check_inputs,
    check_latents,
    check_part,
    check_prediction,
    check_texts,
    describe_family,
)
from sdlora.models.components import BaseFiles, Component, TokenizerSpec, read_json
from sdlora.models.folder import find_base, find_vae_folder, lacks_variant, read_component, read_folder
from sdlora.models.single_file import read_facts, read_single_file, read_vae_file

WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class BaseDefaults:
    """Settings that suit a base, for those that the user leaves out.

    Args:
        epochs: `train.steps` is this many passes over the images, between 100 and `max_steps`.
    """

    learning_rate: float = 1e-4
    batch_size: int = 1
    schedule: str = "constant"
    epochs: int = 80
    max_steps: int = 3000
    trigger_position: str = "start"
    strengths: tuple[float, ...] = (1.0,)
    guidance: float = 7.5


# Eighty times smaller than SD 1.5, its adapters need a higher learning rate.
BUILTIN_DEFAULTS = BaseDefaults(
    learning_rate=3e-3,
    batch_size=4,
    schedule="cosine",
    max_steps=400,
    strengths=(0.6, 1.0),
    guidance=4.0,
)


@dataclass(frozen=True, eq=False)
class BaseInfo:
    """A base that was found whole.

    Args:
        source: As the user gave it.
        path: The diffusers folder, or the file.
        name: For people and metadata: `builtin`, the hub id, or the folder's or the file's name.
        family: Its name in the table of families.
        components: UNet, VAE and text encoders by diffusers' names; `base.vae` replaces the VAE.
        tokenizers: One for each text encoder.
        zeroes_empty_prompt: Whether its pipeline takes zeros for the text states of an empty prompt.
        notices: What had to be assumed, for people.
        quantize: How the UNet's layers are kept when it is loaded.
    """

    source: str
    path: Path
    name: str
    family: str
    components: Mapping[str, Component]
    tokenizers: tuple[TokenizerSpec, ...]
    zeroes_empty_prompt: bool
    notices: tuple[str, ...]
    quantize: Quantize
    scheduler_config: Mapping[str, Any] = field(repr=False)

    def __eq__(self, other: object) -> bool:
        """By digests, so that memory estimates, which are cached, are made once for a base."""
        return isinstance(other, BaseInfo) and self._fingerprint == other._fingerprint

    def __hash__(self) -> int:
        return hash(self._fingerprint)

    @property
    def _fingerprint(self) -> tuple[str, ...]:
        parts = [f"{name} {part.digest}" for name, part in sorted(self.components.items())]
        settings = sorted(f"{name} {value}" for name, value in self.scheduler_config.items())
        return (self.source, *parts, self.text_digest, self.quantize, *settings)

    @property
    def denoiser_config(self) -> Mapping[str, Any]:
        return self.components["unet"].config

    @property
    def vae_config(self) -> Mapping[str, Any]:
        return self.components["vae"].config

    @property
    def digest(self) -> str:
        """Fingerprint of the denoiser."""
        return self.components["unet"].digest

    @property
    def vae_digest(self) -> str:
        return self.components["vae"].digest

    @property
    def text_digest(self) -> str:
        """Fingerprint of the text encoders with their tokenizers, and of what an empty prompt becomes."""
        digests = [self.components[name].digest for name in self.traits.text_encoders]
        digests += [tokenizer.digest for tokenizer in self.tokenizers]
        return hashlib.sha256(" ".join([*digests, str(self.zeroes_empty_prompt)]).encode()).hexdigest()

    @property
    def num_parameters(self) -> int:
        """Parameters of the denoiser."""
        return self.components["unet"].num_parameters

    @property
    def text_length(self) -> int:
        """Tokens of a prompt, the first and the last one included: what tokenizers and positions allow."""
        positions = [
            int(self.components[name].config.get("max_position_embeddings", 77))
            for name in self.traits.text_encoders
        ]
        return min(positions + [tokenizer.length for tokenizer in self.tokenizers if tokenizer.length])

    @property
    def text_width(self) -> int:
        """D of the text states that the UNet reads."""
        return int(self.denoiser_config.get("cross_attention_dim", 1280))

    @property
    def pooled_width(self) -> int:
        """P of the pooled text states, for SDXL."""
        return int(self.components[self.traits.text_encoders[-1]].config.get("projection_dim", 512))

    @property
    def names_safety_checker(self) -> bool:
        """Whether its pipeline has a safety checker, whether or not the files are there."""
        index = self.path / "model_index.json"
        entry = read_json(index).get("safety_checker") if index.is_file() else None
        return isinstance(entry, list) and bool(entry[0])

    @property
    def is_builtin(self) -> bool:
        """Whether this is the base that comes with sdlora."""
        return self.source == "builtin"

    @property
    def traits(self) -> Family:
        """The family's row in the table."""
        return describe_family(self.family, self.prediction_type)

    @property
    def prediction_type(self) -> str:
        """What the UNet answers: epsilon, v_prediction or sample (R-32)."""
        return str(self.scheduler_config.get("prediction_type") or "epsilon")

    @property
    def num_train_timesteps(self) -> int:
        """Timesteps of the training schedule."""
        return int(self.scheduler_config.get("num_train_timesteps", 1000))

    @property
    def vae_factor(self) -> int:
        """Pixels per latent pixel, along a side."""
        return int(2 ** (len(self.vae_config.get("block_out_channels", (64,))) - 1))

    @property
    def coarsest_px(self) -> int:
        """Pixels per position, along a side, at the denoiser's deepest level."""
        widths = self.denoiser_config.get("block_out_channels", (320, 640, 1280, 1280))
        return int(self.vae_factor * 2 ** (len(widths) - 1))

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return int(self.vae_config.get("latent_channels", 4))

    @property
    def has_time_ids(self) -> bool:
        """Whether the UNet is told the sizes of each image, as SDXL's is (R-31)."""
        return bool(self.denoiser_config.get("addition_embed_type") == "text_time")

    @property
    def unread_layer(self) -> str | None:
        """The layer, as LoRA files name it, of a text encoder whose output nobody reads.

        SDXL takes the last layer but one of both text encoders, and pooled states of the second: the last
        layer of the first has no say.
        """
        if len(self.traits.text_encoders) == 1:
            return None
        last = int(self.components["text_encoder"].config["num_hidden_layers"]) - 1
        return f"text_encoder.text_model.encoder.layers.{last}."

    @property
    def min_step(self) -> int:
        """An image's sides must be multiples of this many pixels; diffusers' UNets take any latent size."""
        return self.vae_factor

    @property
    def resolution(self) -> int:
        """The side in pixels that the base was trained for."""
        size = self.denoiser_config.get("sample_size")
        side = max(size) if isinstance(size, list | tuple) else size
        return int(side) * self.vae_factor if side else self.traits.resolution

    @cached_property
    def known_words(self) -> frozenset[str]:
        """The words that a small base was trained on, from its `words.txt`; empty if it has none."""
        file = self.path / "words.txt"
        return frozenset(file.read_text(encoding="utf-8").split()) if file.is_file() else frozenset()

    def describe_unknown_words(self, prompts: Iterable[str], trigger: str | None) -> str | None:
        """A line about words of the prompts, without the trigger's, that the base was not trained on."""
        found = dict.fromkeys(word for prompt in prompts for word in WORD.findall(prompt.lower()))
        own = {*WORD.findall((trigger or "").lower())}
        unknown = [word for word in found if word not in self.known_words | own]
        if not self.known_words or not unknown:
            return None
        return (
            f"the base {self.name} was not trained on some words of the prompts: {', '.join(unknown)}; "
            f"{self.path / 'words.txt'} lists those it knows"
        )

    @property
    def defaults(self) -> BaseDefaults:
        return BUILTIN_DEFAULTS if self.is_builtin else BaseDefaults()


def with_base_defaults(config: RunConfig, info: BaseInfo) -> RunConfig:
    """The configuration with the base's own defaults for the settings that were not given."""
    own = info.defaults
    return config.with_defaults(
        data={"trigger_position": own.trigger_position},
        train={
            "learning_rate": own.learning_rate,
            "batch_size": own.batch_size,
            "schedule": own.schedule,
        },
        sample={"strengths": own.strengths, "guidance": own.guidance},
    )


def inspect_base(settings: BaseSection, objective: ObjectiveSection | None = None) -> BaseInfo:
    """Finds a base, and checks that it is whole and of a kind that can be trained.

    A hub id is brought into the hub's cache first; of files only JSON and tensor tables are read.

    Args:
        settings: Which one.
        objective: May force a prediction type: what the UNet then learns and is sampled with.

    Raises:
        ModelError: If it is missing, incomplete, truncated, or of another kind (R-25, R-40, R-44).
        ConfigError: If `base.quantize` needs a package that is not installed.
    """
    _check_quantize(settings.quantize)
    key = f"base.source = {settings.source}"
    forced = objective.prediction_type if objective and objective.force_prediction_type else None
    path = find_base(settings.source, key, settings.revision, settings.variant)
    layout = (
        read_single_file(path, key, forced) if path.is_file() else read_folder(path, key, settings.variant)
    )
    parts = dict(layout.components)
    if settings.variant and all(part.variant != settings.variant for part in parts.values()):
        raise ModelError(f"{key} {lacks_variant(settings.variant)}")
    notices = layout.notices
    if settings.vae:
        parts["vae"] = _find_vae(settings.vae, layout)
        notices += _doubt_vae(settings.vae, layout.components.get("vae"), parts["vae"])
    elif "vae" not in parts:
        raise ModelError(f"{key} holds no VAE; give one that fits with base.vae")
    for part in parts.values():
        check_part(part)
    check_inputs(parts["unet"].config, key)
    check_latents(
        parts["unet"].config, parts["vae"].config, f"base.vae = {settings.vae}" if settings.vae else key
    )
    texts = [part.config for name, part in parts.items() if name.startswith("text_encoder")]
    check_texts(parts["unet"].config, texts, key)
    scheduler = {**layout.scheduler_config, **({"prediction_type": forced} if forced else {})}
    check_prediction(scheduler, key)
    is_local = settings.source != "builtin" and Path(settings.source).expanduser().exists()
    own_name = path.stem if path.is_file() else path.resolve().name
    return BaseInfo(
        source=settings.source,
        path=path,
        name=own_name if is_local else settings.source,
        family=layout.family,
        components=parts,
        tokenizers=layout.tokenizers,
        zeroes_empty_prompt=layout.zeroes_empty_prompt,
        notices=notices,
        quantize=settings.quantize,
        scheduler_config=scheduler,
    )


def _check_quantize(quantize: Quantize) -> None:
    """Looks for the package without importing it, which costs a second."""
    if quantize == "nf4" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "base.quantize = nf4 needs bitsandbytes, which is not installed; "
            "pip install 'sdlora[quant]', or use base.quantize=int8, which needs nothing"
        )


def _find_vae(source: str, layout: BaseFiles) -> Component:
    """A separate VAE: a folder, a base that has one, or a single file."""
    key = f"base.vae = {source}"
    path = find_base(source, key)
    if path.is_file():
        own = layout.components.get("vae")
        return read_vae_file(path, key, own.config if own else read_facts(layout.family)["vae"])
    return read_component(find_vae_folder(path, key), "vae", key)


def _doubt_vae(source: str, own: Component | None, other: Component) -> tuple[str, ...]:
    """A notice if a separate VAE has other latents than the base's own; SD's and SDXL's are of one shape."""
    scales = [part.config.get("scaling_factor", 0.18215) for part in (own, other) if part]
    if len(set(scales)) < 2:
        return ()
    return (
        f"base.vae = {source} has a scaling_factor of {scales[1]:g}, the base's own VAE {scales[0]:g}: "
        "it may be the VAE of another family, whose latents this UNet does not know",
    )
