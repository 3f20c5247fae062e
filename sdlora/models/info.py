"""Description of a base by its JSON files and tensor shapes, without loading weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdlora.config import BaseSection, DataSection, ObjectiveSection, Quantize, RunConfig
from sdlora.errors import ConfigError, ModelError, join_names
from sdlora.models.checks import FAMILIES, V_FAMILIES, Family, check_base
from sdlora.models.components import BaseFiles, read_json
from sdlora.models.folder import find_base, find_vae_folder, has_part, no_variant, read_component, read_folder
from sdlora.models.single_file import read_known, read_single_file, read_vae_file

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
    timestep_range: tuple[int, int] = (0, 1000)
    layout_range: tuple[int, int] | None = None
    epochs: int = 80
    max_steps: int = 3000
    trigger_position: str = "start"
    strengths: tuple[float, ...] = (1.0,)
    guidance: float = 7.5


# Eighty times smaller than SD 1.5, its adapters need a higher learning rate. It settles what an image shows
# above timestep 500, and an adapter trained there forgets the things that are not in its set.
BUILTIN_DEFAULTS = BaseDefaults(
    learning_rate=2e-3,
    batch_size=4,
    schedule="cosine",
    timestep_range=(0, 500),
    layout_range=(800, 1000),
    max_steps=400,
    strengths=(0.6, 0.8, 1.0),
    guidance=4.0,
)


@dataclass(frozen=True, eq=False, kw_only=True)
class BaseInfo(BaseFiles):
    """A complete base that can be trained; `base.vae` replaces its VAE.

    Args:
        source: The source as the user spells it.
        name: For people and metadata: `builtin`, the hub id, or the name of the folder or the file.
        quantize: Quantization of the UNet when it is loaded.
        clip_skip: Text encoder layer that is read: 1 is the last, 2 the one before.
        prompt_chunks: Parts of `text_length` tokens in which text is read.
        prompt_weights: Whether brackets in text are weights.
    """

    source: str
    name: str
    quantize: Quantize
    clip_skip: int = 1
    prompt_chunks: int = 1
    prompt_weights: bool = False

    def __eq__(self, other: object) -> bool:
        """By digests, so that memory estimates, which are cached, are made once for a base."""
        return isinstance(other, BaseInfo) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    @property
    def fingerprint(self) -> tuple[str, ...]:
        """What tells bases apart: source, digests of their files, quantization and schedule."""
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
        """Fingerprint of the text encoders, their tokenizers and how they are used."""
        digests = [self.components[name].digest for name in self.traits.text_encoders]
        digests += [tokenizer.digest for tokenizer in self.tokenizers]
        digests.append(str(self.zeroes_empty_prompt))
        reading = (self.clip_skip, self.prompt_chunks, self.prompt_weights)
        digests += [] if reading == (1, 1, False) else [str(reading)]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    @property
    def num_parameters(self) -> int:
        """Parameters of the denoiser."""
        return self.components["unet"].num_parameters

    @property
    def text_length(self) -> int:
        """Tokens of a prompt that tokenizers and positions allow, with the first and the last one."""
        positions = [
            int(self.components[name].config.get("max_position_embeddings", 77))
            for name in self.traits.text_encoders
        ]
        return min(positions + [tokenizer.length for tokenizer in self.tokenizers if tokenizer.length])

    @property
    def token_limit(self) -> int:
        """Tokens of a text that are read, without the first and the last one of each chunk."""
        return self.prompt_chunks * (self.text_length - 2)

    @property
    def num_text_states(self) -> int:
        """L of the text states that the UNet reads."""
        return self.prompt_chunks * self.text_length

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
        """Whether its pipeline has a safety checker, with or without the files."""
        index = self.path / "model_index.json"
        return index.is_file() and has_part(read_json(index), "safety_checker")

    @property
    def is_builtin(self) -> bool:
        return self.source == "builtin"

    @property
    def traits(self) -> Family:
        """The family's row in the table; Stable Diffusion 1 and 2 have one for each prediction type."""
        rows = V_FAMILIES if self.prediction_type == "v_prediction" else FAMILIES
        return rows.get(self.family, FAMILIES[self.family])

    @property
    def prediction_type(self) -> str:
        """The UNet's output: epsilon, v_prediction or sample."""
        return str(self.scheduler_config.get("prediction_type") or "epsilon")

    @property
    def num_train_timesteps(self) -> int:
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
        """Whether the UNet reads the sizes of each image, as SDXL's does."""
        return bool(self.denoiser_config.get("addition_embed_type") == "text_time")

    @property
    def unread_layer(self) -> str | None:
        """The text encoder layer, by its name in LoRA files, that has no effect on images.

        SDXL reads the last layer but one of both text encoders, and pooled states of the second.
        """
        if len(self.traits.text_encoders) == 1 and self.clip_skip == 1:
            return None
        last = int(self.components["text_encoder"].config["num_hidden_layers"]) - 1
        return f"text_encoder.text_model.encoder.layers.{last}."

    @property
    def min_step(self) -> int:
        """An image's sides must be multiples of this many pixels; diffusers' UNets take any latent size."""
        return self.vae_factor

    @property
    def resolution(self) -> int:
        """Side in pixels of the base's training images."""
        size = self.denoiser_config.get("sample_size")
        side = max(size) if isinstance(size, list | tuple) else size
        return int(side) * self.vae_factor if side else self.traits.resolution

    @cached_property
    def known_words(self) -> frozenset[str]:
        """The words that a small base was trained on, from its `words.txt`; empty if it has none."""
        file = self.path / "words.txt"
        return frozenset(file.read_text(encoding="utf-8").split()) if file.is_file() else frozenset()

    @cached_property
    def things(self) -> tuple[str, ...]:
        """What a small base draws, from its `things.txt`, as `a red apple`; empty if it has none."""
        file = self.path / "things.txt"
        return tuple(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else ()

    def describe_unknown_words(self, prompts: Iterable[str], trigger: str | None) -> str | None:
        """A line about words of prompts or captions, but the trigger's, that the base was not trained on."""
        found = dict.fromkeys(word for prompt in prompts for word in WORD.findall(prompt.lower()))
        own = {*WORD.findall((trigger or "").lower())}
        unknown = sorted(word for word in found if word not in self.known_words | own)
        if not self.known_words or not unknown:
            return None
        return (
            f"the base {self.name} was not trained on these words, and cannot draw what they name: "
            f"{join_names(unknown, 8)}; {self.path / 'words.txt'} lists those it knows"
        )

    @property
    def defaults(self) -> BaseDefaults:
        return BUILTIN_DEFAULTS if self.is_builtin else BaseDefaults()


def with_base_defaults(config: RunConfig, info: BaseInfo) -> RunConfig:
    """The configuration with the base's own defaults for the settings that were not given."""
    own = info.defaults
    # whoever chooses timesteps wants them all
    is_chosen = bool({"timesteps", "timestep_range", "layout_range"} & config.objective.model_fields_set)
    return config.with_defaults(
        data={"trigger_position": own.trigger_position},
        train={
            "learning_rate": own.learning_rate,
            "batch_size": own.batch_size,
            "schedule": own.schedule,
        },
        objective={}
        if is_chosen
        else {"timestep_range": own.timestep_range, "layout_range": own.layout_range},
        sample={"strengths": own.strengths, "guidance": own.guidance},
    )


def inspect_base(
    settings: BaseSection, objective: ObjectiveSection | None = None, data: DataSection | None = None
) -> BaseInfo:
    """Finds a base, and checks that it is complete and of a kind that can be trained.

    A hub id is downloaded into the hub's cache first. Only JSON and the headers of weights are read.

    Args:
        settings: The section `base`.
        objective: May force a prediction type, for training and for sampling.
        data: How text is read.

    Raises:
        ModelError: If it is missing, incomplete, truncated, or of another kind.
        ConfigError: If `base.quantize` needs a package that is not installed, or the text encoder does not
            have the layer of `data.clip_skip`.
    """
    # Looked up without importing it, which takes a second.
    if settings.quantize == "nf4" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            "base.quantize = nf4 needs bitsandbytes, which is not installed; "
            "pip install 'sdlora[quant]', or use base.quantize=int8, which needs no package"
        )
    key = f"base.source = {settings.source}"
    forced = objective.prediction_type if objective and objective.force_prediction_type else None
    path = find_base(settings.source, key, settings.revision, settings.variant)
    is_file = path.is_file()
    files = read_single_file(path, key, forced) if is_file else read_folder(path, key, settings.variant)
    if settings.variant and all(part.variant != settings.variant for part in files.components.values()):
        raise no_variant(key, settings.variant)
    if settings.vae:
        files = _replace_vae(files, settings.vae)
    elif "vae" not in files.components:
        raise ModelError(f"{key} has no VAE; set base.vae to one that fits", key="base.vae")
    if forced:
        files = replace(files, scheduler_config={**files.scheduler_config, "prediction_type": forced})
    vae_key = f"base.vae = {settings.vae}" if settings.vae else key
    check_base(files.components, files.scheduler_config, key, vae_key)
    is_local = settings.source != "builtin" and Path(settings.source).expanduser().exists()
    own_name = path.stem if is_file else path.resolve().name
    info = BaseInfo(
        source=settings.source,
        name=own_name if is_local else settings.source,
        quantize=settings.quantize,
        **vars(files),
    )
    return info if data is None else _with_text_settings(info, data)


def _with_text_settings(info: BaseInfo, data: DataSection) -> BaseInfo:
    """The base with the settings of how text is read, which are checked."""
    if data.clip_skip > 1:
        if len(info.traits.text_encoders) > 1:
            raise ConfigError(
                f"data.clip_skip = {data.clip_skip} does not go with the base {info.name}: SDXL always reads "
                "the layer before the last; remove it"
            )
        layers = int(info.components["text_encoder"].config.get("num_hidden_layers", 12))
        if data.clip_skip > layers:
            raise ConfigError(
                f"data.clip_skip = {data.clip_skip} is more than the {layers} layers of the base "
                f"{info.name}'s text encoder; use 1 or 2"
            )
    return replace(
        info,
        clip_skip=data.clip_skip,
        prompt_chunks=data.prompt_chunks,
        prompt_weights=data.prompt_weights,
    )


def _replace_vae(files: BaseFiles, source: str) -> BaseFiles:
    """The base with the VAE of a folder, of another base or of a single file.

    A notice warns of other latents than the base's own; SD's and SDXL's have the same shape.
    """
    key, own = f"base.vae = {source}", files.components.get("vae")
    path = find_base(source, key)
    if path.is_file():
        vae = read_vae_file(path, key, own.config if own else read_known(files.family)["vae"])
    else:
        vae = read_component(find_vae_folder(path, key), "vae", key)
    scale, own_scale = (part.config.get("scaling_factor", 0.18215) for part in (vae, own or vae))
    notices = files.notices
    if scale != own_scale:
        notices += (
            f"{key} has a scaling_factor of {scale:g}, the base's own VAE {own_scale:g}: "
            "it may be the VAE of another family, whose latents this UNet cannot read",
        )
    return replace(files, components={**files.components, "vae": vae}, notices=notices)
