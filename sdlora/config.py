"""The settings of a run, each with its type, default, description and remedy in one place.

Read from TOML files and `section.key=value` overrides, validated strictly.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from sdlora.errors import MAX_PROBLEMS, ConfigError, shorten
from sdlora.objectives import LOSSES, TIMESTEPS, Entry
from sdlora.presets import find_preset
from sdlora.problems import describe_error, drop_removed, guess_key
from sdlora.reading import MAX_DEPTH, MAX_NAME, UnfitFileError, parse_toml, read_bytes, read_json

PLACEHOLDERS = ("{trigger}", "[trigger]")
"""What the trigger is substituted for; ai-toolkit has the second, and `data.rules = 1` only the first."""
WEIGHT = re.compile(r"\([^()]+:\s*[0-9.]+\s*\)")
"""Words with a weight in brackets."""
MAX_TOML_BYTES = 256 * 2**10
MAX_JSON_BYTES = 16 * 2**20


def _is_encoding(name: str) -> bool:
    """Whether Python knows an encoding of bytes as text, and one that extends ASCII."""
    try:
        return b"ascii".decode(name) == "ascii"
    except (LookupError, ValueError):
        return False


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int | float) else value


def _also(**spellings: str | None) -> BeforeValidator:
    """Accepts other spellings of a value: `_also(centre="center")` reads "centre" as "center"."""
    return BeforeValidator(lambda value: spellings.get(value, value) if isinstance(value, str) else value)


_POSITIONS = {"front": "start", "prefix": "start", "before": "start"}
_POSITIONS |= {"back": "end", "suffix": "end", "after": "end"}
Dtype = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"], _also(no="fp32", float32="fp32", bfloat16="bf16", float16="fp16")
]
FileDtype = Annotated[
    Literal["fp32", "bf16", "fp16"], _also(float32="fp32", bfloat16="bf16", float16="fp16", float="fp32")
]
Quantize = Literal["none", "int8", "nf4"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]
Count = Annotated[int, Field(ge=1)]
NotNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]
Texts = Annotated[list[str], BeforeValidator(_as_list)]
# Module names are shorter than this; matching a pattern of 100,000 characters would take minutes.
Pattern = Annotated[str, Field(max_length=MAX_NAME)]
Patterns = Annotated[list[Pattern], BeforeValidator(_as_list)]
Numbers = Annotated[list[float], BeforeValidator(_as_list)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], BeforeValidator(_as_list)]
Argument = bool | int | float | str | list[bool | int | float | str]


def _setting(default: Any, description: str, remedy: str = "", **rules: Any) -> Any:
    """A setting.

    Args:
        default: None where it depends on the base, the images or other settings.
        description: What `sdlora settings`, the README and editors show.
        remedy: What to use instead; ends the message about a wrong value.
        rules: Bounds, as pydantic's `Field` takes them.
    """
    extra: Any = {"remedy": remedy} if remedy else None
    return Field(default, description=description, json_schema_extra=extra, **rules)


def _off(description: str, usual: str, default: float = 0.0, **rules: Any) -> Any:
    """A number that 0 switches off."""
    return _setting(default, f"{description}; 0: off", f"use {usual}, or 0 to disable it", **rules)


def _every(description: str, without: str, default: str = "a tenth of the steps") -> Any:
    """An interval in steps; by default chosen for a run."""
    text = f"steps between {description}; 0: {without}; default: {default}"
    return _setting(None, text, f"use a number of steps, or 0 for {without}")


class Section(BaseModel):
    """A group of settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _paths_as_text(cls, values: Any) -> Any:
        """Accepts paths and runs from Python."""
        if isinstance(values, Mapping):
            paths = {key: os.fspath(path) for key, path in values.items() if isinstance(path, os.PathLike)}
            return {**values, **paths}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if conflicts := list(self._conflicts()):
            raise ValueError("\n".join(conflicts))
        return self

    def _conflicts(self) -> Iterator[str]:
        """A line for each combination of settings that cannot be meant."""
        yield from ()


class BaseSection(Section):
    """The frozen Stable Diffusion model that adapters are trained on."""

    source: str = _setting(
        "builtin",
        "base model: builtin, a diffusers folder, a .safetensors file, or a Hugging Face id",
        "use builtin, a diffusers folder, a .safetensors file or a Hugging Face id",
        min_length=1,
    )
    revision: str | None = _setting(None, "branch, tag or commit of a Hugging Face id; default: main")
    variant: Literal["fp16", "bf16"] | None = _setting(None, "weight files to use if several: fp16 or bf16")
    dtype: Dtype = _setting("auto", "dtype of the base: auto (as train.precision), fp32, bf16 or fp16")
    vae: str | None = _setting(None, "replacement VAE: a folder or a file; default: the base's own")
    quantize: Quantize = _setting("none", "quantize the frozen denoiser: none, int8 or nf4")


Position = Annotated[Literal["start", "end"], _also(**_POSITIONS)]


class SetSection(Section):
    """A set of images with settings of its own: a table of `[[data.sets]]`."""

    folder: Name = _setting(..., "folder inside IMAGES, whose other settings it has, or one elsewhere")
    class_images: bool | None = _setting(
        None,
        "class (regularization) images, which show what the base knows and get no trigger; default: true for "
        "kohya's folder reg, else false",
    )
    weight: Positive = _setting(1.0, "weight of its images in the loss")
    repeats: Count = _setting(1, "times each image is seen in an epoch, times N of its N_name folder")
    default_caption: str = _setting(
        "", "caption of images without one; default of class images: their N_NAME"
    )
    trigger: Name | None = _setting(None, "as data.trigger")
    trigger_position: Position = _setting("start", "as data.trigger_position")
    caption_prefix: str = _setting("", "as data.caption_prefix")
    caption_suffix: str = _setting("", "as data.caption_suffix")
    shuffle_tags: bool = _setting(False, "as data.shuffle_tags")
    tag_dropout: Probability = _setting(0.0, "as data.tag_dropout")
    keep_tags: NotNegativeInt = _setting(0, "as data.keep_tags")

    @property
    def is_class(self) -> bool:
        return Path(self.folder).name == "reg" if self.class_images is None else self.class_images


class DataSection(Section):
    """The image folder, and how images become training samples."""

    trigger: Name | None = _setting(
        None,
        "trigger words; added to captions that lack them, and substituted for {trigger}",
        "use a word or phrase, or omit it",
    )
    trigger_position: Position = _setting("start", "where the trigger is added to a caption: start or end")
    resolution: int | None = _setting(
        None,
        "training resolution in pixels (side of a square with the area of a bucket); default: the base's",
        "use the side of a square in pixels, such as 512",
        ge=16,
        le=8192,
    )
    more_resolutions: list[Annotated[int, Field(ge=16, le=8192)]] = _setting(
        [], "further resolutions, such as [768]: each image is seen at each of them too"
    )
    no_upscale: bool = _setting(
        False, "train images that are smaller than their bucket at their own size, in buckets of their own"
    )
    background: str = _setting("white", "color behind transparency", "use a color name or #rrggbb")
    masks: Literal["none", "files", "alpha", "both"] = _setting(
        "none",
        "masks of what to learn: none, files (a.mask.png or a-masklabel.png beside a.jpg; white counts), "
        "alpha (the images' transparency) or both (files where there are some)",
    )
    crop: Annotated[Literal["center", "random"], _also(centre="center")] = _setting(
        "center", "part to keep of an image that does not fit its bucket: center or random"
    )
    crop_variants: int | None = _setting(
        None,
        "fixed random crops per image, or views with data.color_jitter; default: 4 with either",
        "use 1 to 16",
        ge=1,
        le=64,
    )
    merge_buckets: NotNegativeInt = _setting(
        0,
        "least samples of a bucket in an epoch, such as the global batch; images of smaller buckets move to "
        "the nearest other one if that crops at most 15 % of them; 0: off",
        "use the global batch, or 0",
    )
    color_jitter: NotNegative = _off(
        "largest random change of brightness, contrast and saturation; hues, black and white stay, and so "
        "does the first of the fixed views of each image",
        "0.1 to 0.3",
        le=0.5,
    )
    flip: bool = _setting(False, "mirror samples at random; not for lettering")
    caption_dropout: Probability = _off(
        "probability of the empty prompt instead of a caption (zeros on SDXL)", "0.05", default=0.05
    )
    caption_prefix: str = _setting("", "words before each caption, such as 'drawing of'")
    caption_suffix: str = _setting("", "words behind each caption")
    shuffle_tags: bool = _setting(False, "shuffle the tags of captions, which commas separate")
    tag_dropout: Probability = _off("probability of leaving out each tag; one stays", "about 0.1")
    keep_tags: NotNegativeInt = _setting(
        0, "first tags of a caption that stay in place", "use a number such as 1"
    )
    keep_separator: str = _setting(
        "",
        "separator such as ||| in captions: tags before the first, and behind a second, stay in place",
    )
    wildcards: bool = _setting(
        False, "choose one of {a|b} in captions; default prompts and validation images take the first"
    )
    several_captions: bool = _setting(
        False, "each line of a caption file, or item of a list in metadata, is a caption of its own"
    )
    placeholders: Texts = _setting(
        [], "further placeholders of the trigger in captions, such as [name] or <trigger>"
    )
    caption_variants: int | None = _setting(
        None,
        "fixed variants of each caption with shuffled or left-out tags, or wildcards, each encoded once; "
        "default: 8",
        "use 2 to 32",
        ge=1,
        le=1000,
    )
    clip_skip: int = _setting(
        1,
        "text encoder layer that is read, from the end, as users of SD 1.x count: 1 (the last) or 2 (the one "
        "before, as anime bases need); not for SDXL",
        "use 1 or 2",
        ge=1,
        le=12,
    )
    prompt_chunks: int = _setting(
        1,
        "parts of the text encoder's length (75 tokens) in which captions and prompts are read, as UIs do; "
        "1: what is longer is cut",
        "use 1 to 3",
        ge=1,
        le=8,
    )
    prompt_weights: bool = _setting(
        False,
        "read (word:1.2), (word) and [word] in captions and prompts as weights, as A1111 does with the "
        "emphasis 'No norm'",
    )
    caption_encoding: str | None = _setting(
        None, "encoding of caption files that are not in UTF-8, such as cp932; default: as they seem to be"
    )
    sets: list[SetSection] = _setting(
        [],
        "subfolders or further folders with settings of their own, such as [{folder = 'reg'}]; in a file, a "
        "table [[data.sets]] each, with folder, "
        + ", ".join(name for name in SetSection.model_fields if name != "folder"),
        "use a list of tables such as {folder = 'more', repeats = 2}",
    )
    repeats: Count = _setting(
        1, "times each image outside data.sets is seen in an epoch, times N of its N_name folder"
    )
    heldout: float | str = _setting(
        "auto",
        "validation images, never trained on: a folder, a fraction, or 0 for none; auto: the subfolder "
        "heldout/, else 10 % (at least 2 images) if there are 12 or more",
        "use a folder, a fraction such as 0.1, or 0",
    )
    cache: bool | Literal["auto"] = _setting("auto", "cache latents and text embeddings: auto, true or false")
    allow_missing_captions: bool = _setting(False, "train on images without a caption when others have one")
    on_bad_image: Literal["stop", "skip"] = _setting("stop", "if an image cannot be read: stop or skip")
    follow_links: bool = _setting(False, "follow symlinks that lead out of the image folder")
    rules: Literal[1, 2] = _setting(
        2, "rules for reading a folder: 2, or 1 as in earlier versions, whose runs keep it", "omit it"
    )

    def _conflicts(self) -> Iterator[str]:
        if self.color_jitter and self.crop_variants == 1:
            yield (
                f"data.color_jitter = {self.color_jitter:g} has no effect on the first view of an image; "
                "set a larger data.crop_variants than 1, or remove it"
            )
        if self.crop == "center" and not self.color_jitter and (self.crop_variants or 1) > 1:
            yield (
                f"data.crop_variants = {self.crop_variants} requires data.crop = random "
                "(there is only one center crop); set data.crop=random or remove data.crop_variants"
            )
        idle: dict[str, Any] = {}
        if not self.varies_tags:
            idle = {"keep_tags": self.keep_tags, "keep_separator": self.keep_separator}
        idle |= {} if self.varies_tags or self.wildcards else {"caption_variants": self.caption_variants}
        for name, value in idle.items():
            if value:
                yield (
                    f"data.{name} = {value} has no effect while tags stay as they are; set "
                    "data.shuffle_tags=true or data.tag_dropout=0.1, or remove it"
                )
        if one := next(
            (one for one in self.sets if one.keep_tags and not self.of_set(one).varies_tags), None
        ):
            yield (
                f"data.sets has keep_tags = {one.keep_tags} for {shorten(one.folder)}, which has no effect "
                "while its tags stay as they are; set shuffle_tags or tag_dropout there, or remove it"
            )
        if self.caption_encoding is not None and not _is_encoding(self.caption_encoding):
            yield (
                f"data.caption_encoding = {shorten(self.caption_encoding)} is not an encoding of text; "
                "use one such as cp932 (Japanese), gb18030 (Chinese) or cp1251 (Cyrillic)"
            )
        if not isinstance(self.heldout, str) and not 0 <= self.heldout < 1:
            yield f"data.heldout = {self.heldout:g} must be at least 0 and below 1; use 0.1, 0, or a folder"

    def of_set(self, one: SetSection | None) -> DataSection:
        """The settings of the images of a set; its own ones win, and class images have no trigger."""
        if one is None:
            return self
        given = one.model_dump(exclude_unset=True, include=set(type(self).model_fields))
        return self.model_copy(update={"sets": [], **({"trigger": None} if one.is_class else {}), **given})

    @property
    def triggers(self) -> set[str]:
        """The trigger of each set that has one."""
        return {data.trigger for data in (self, *map(self.of_set, self.sets)) if data.trigger}

    @property
    def varies_tags(self) -> bool:
        return self.shuffle_tags or self.tag_dropout > 0

    def fill_trigger(self, text: str, trigger: str | None = None) -> str:
        """Substitutes a trigger, by default `data.trigger`, for its placeholders."""
        if words := trigger or self.trigger:
            for placeholder in (*PLACEHOLDERS[: self.rules], *filter(None, self.placeholders)):
                text = text.replace(placeholder, words)
        return text

    @property
    def num_crops(self) -> int:
        """Fixed crops per image: one, or four by default if they or their colors are random."""
        return self.crop_variants or (4 if self.crop == "random" or self.color_jitter else 1)


class LoraSection(Section):
    """The adapter."""

    kind: Literal["lora", "dora"] = _setting(
        "lora", "adapter kind: lora, or dora (weight-decomposed: also trains the norm of each row)"
    )
    rank: int = _setting(
        16,
        "rank (dimension) of each module; default with a parent: half the parent's, at least 4",
        "use 4 to 32 for a style",
        ge=1,
        le=4096,
    )
    alpha: Positive | None = _setting(
        None, "the update is scaled by alpha / rank; default: the rank", "omit it to use the rank"
    )
    targets: Patterns = _setting(
        ["attention"],
        "layers to adapt: attention, attention+feedforward, all-linear, all, style-only (SDXL's style "
        "block), or module patterns such as *.attn2.to_v",
        "use attention, or module patterns such as *.attn2.to_v",
        min_length=1,
    )
    text_encoder: bool = _setting(False, "also train the text encoder (both on SDXL)")
    rank_pattern: dict[Pattern, Count] = _setting(
        {},
        "ranks by module pattern, such as {convolutions = 4}; the last match wins",
        "use a table such as {convolutions = 4}",
    )
    alpha_pattern: dict[Pattern, Positive] = _setting(
        {}, "alphas by module pattern; the last match wins", "use a table such as {convolutions = 1}"
    )
    rslora: bool = _setting(False, "rank-stabilized scaling: alpha / sqrt(rank) instead of alpha / rank")
    init: Literal["gaussian", "kaiming", "orthogonal"] = _setting(
        "gaussian", "initialization of down (A): gaussian, kaiming or orthogonal; up (B) starts at zero"
    )
    init_from: str | None = _setting(None, "start from the weights of this LoRA (any tool, any rank) or run")
    parent: str | None = _setting(
        None,
        "train on top of this LoRA file, run or tree node, which stays frozen and is required at inference",
        "use a LoRA file, a run or a node, or omit it",
        min_length=1,
    )
    force_parent: bool = _setting(False, "accept a parent whose tensors have changed")
    dropout: Probability = _off("dropout between the down and up matrices", "about 0.1")
    max_norm: NotNegative = _off("maximum norm of each module's update, such as 1", "about 1")

    def _conflicts(self) -> Iterator[str]:
        if self.force_parent and self.parent is None:
            yield "lora.force_parent = true has no effect alone; set lora.parent or remove it"

    @property
    def trained_alpha(self) -> float:
        """Alpha as trained: the rank by default."""
        return float(self.rank) if self.alpha is None else self.alpha


def _table(setting: str, entries: Mapping[str, Entry], what: str) -> dict[str, Any]:
    """The setting that names an entry of a table, and the parameters of all its entries."""
    names = tuple(entries)
    choices = ", ".join(f"{name} ({entry.description})" for name, entry in entries.items())
    fields: dict[str, Any] = {setting: (Literal[names], _setting(names[0], f"{what}: {choices}"))}
    for name in dict.fromkeys(name for entry in entries.values() for name in entry.parameters):
        owners = {key: entry.parameters[name] for key, entry in entries.items() if name in entry.parameters}
        parameter = next(iter(owners.values()))
        kind: Any = Literal[parameter.choices] if parameter.choices else float
        if len({owner.default for owner in owners.values()}) == 1:
            default, text = parameter.default, f"{parameter.description} (for {', '.join(owners)})"
        else:
            kind, default = kind | None, None
            defaults = ", ".join(f"{owner.default:g} ({key})" for key, owner in owners.items())
            text = f"{parameter.description}; default: {defaults}"
        fields[name] = (kind, _setting(default, text, "", **parameter.bounds))
    return fields


if TYPE_CHECKING:

    class _Tables(Section):
        loss: str = ""
        timesteps: str = ""

else:
    _Tables = create_model(
        "_Tables",
        __base__=Section,
        **_table("loss", LOSSES, "loss function"),
        **_table("timesteps", TIMESTEPS, "timestep distribution"),
    )


class ObjectiveSection(_Tables):
    """The training objective: loss, timesteps and noise."""

    min_snr_gamma: NotNegative = _off("min-SNR loss weighting (2303.09556), usually 5", "about 5")
    debiased: bool = _setting(False, "debiased estimation: weight the loss by 1 / sqrt(SNR)")
    noise_offset: Fraction = _off("offset noise for darker and brighter images, up to 0.1", "up to 0.1")
    pyramid_noise: int = _off(
        "levels of pyramid (multi-resolution) noise, such as 6", "6 levels", default=0, ge=0, le=10
    )
    pyramid_discount: float = _setting(
        0.3, "weight of each pyramid level relative to the one before", "use about 0.3", gt=0, le=1
    )
    input_perturbation: Fraction = _off(
        "extra noise on the denoiser's input only (ip_noise_gamma), such as 0.1", "about 0.1"
    )
    unmasked_weight: float = _setting(
        0.05, "weight in the loss outside a mask, relative to the inside", "use about 0.05", gt=0, le=1
    )
    unmasked_prior: NotNegative = _off(
        "outside a mask, weight of keeping to the base's own prediction, a pass more", "about 1"
    )
    prior_weight: NotNegative = _off(
        "weight of prior prediction: captions without the trigger keep the base's own prediction; the "
        "trigger must be words that the base reads, and each step takes about 2.5 times as long",
        "about 1",
    )
    timestep_range: tuple[int, int] = _setting(
        (0, 1000),
        "timesteps to train: the first, and one past the last; the built-in base has its own default",
        "use [0, 1000] for all",
    )
    layout_range: Annotated[tuple[int, int] | None, _also(none=None)] = _setting(
        None,
        "timesteps of high noise, where the layout is decided, at which to keep the base's own prediction, "
        "such as [800, 1000]; none: at all; the built-in base has its own default",
        "use [800, 1000], or none",
    )
    layout_weight: Positive = _setting(
        0.01, "weight of layout_range in the loss; a larger one keeps more of the base", "use about 0.01"
    )
    prediction_type: PredictionType | None = _setting(
        None, "prediction type: epsilon, v_prediction or sample; default: the base's"
    )
    force_prediction_type: bool = _setting(False, "use prediction_type even if the base has another")

    def _conflicts(self) -> Iterator[str]:
        low, high = self.timestep_range
        if not 0 <= low < high:
            yield (
                f"objective.timestep_range = [{low}, {high}] must be a first timestep and a larger end; "
                "use [0, 1000] for all"
            )
        has_layout = self.layout_range is not None
        yield from self._idle("layout_weight", has_layout, "objective.layout_range=[800,1000]")
        if self.layout_range and not high <= self.layout_range[0] < self.layout_range[1]:
            first, end = self.layout_range
            yield (
                f"objective.layout_range = [{first}, {end}] must begin at or above the end of "
                f"objective.timestep_range = [{low}, {high}], and end above its beginning; use [0, 500] and "
                "[800, 1000]"
            )
        if self.force_prediction_type and self.prediction_type is None:
            yield "objective.force_prediction_type = true requires objective.prediction_type; set it"
        if self.min_snr_gamma and self.debiased:
            yield (
                f"objective.min_snr_gamma = {self.min_snr_gamma:g} and objective.debiased = true both weight "
                "the loss by timestep; keep one of them"
            )
        if self.noise_offset and self.pyramid_noise:
            yield (
                f"objective.noise_offset = {self.noise_offset:g} and objective.pyramid_noise = "
                f"{self.pyramid_noise} both amplify low frequencies; keep one of them"
            )
        yield from self._idle("pyramid_discount", self.pyramid_noise > 0, "objective.pyramid_noise=6")
        for setting, entries in (("loss", LOSSES), ("timesteps", TIMESTEPS)):
            used = entries[getattr(self, setting)].parameters.keys()
            # The first of several that have it is named.
            rows = [(name, owner) for owner, entry in entries.items() for name in entry.parameters]
            for name, owner in dict(reversed(rows)).items():
                yield from self._idle(name, name in used, f"objective.{setting}={owner}")

    def _idle(self, name: str, is_used: bool, remedy: str) -> Iterator[str]:
        """A line for a setting that has no effect because of another."""
        value = getattr(self, name)
        if not is_used and value != type(self).model_fields[name].default:
            yield f"objective.{name} = {value} has no effect alone; set {remedy} or remove it"

    def parameters(self, entry: Entry) -> dict[str, Any]:
        """The parameters of a loss or timestep distribution: as given, else its own defaults."""
        given = {name: getattr(self, name) for name in entry.parameters}
        defaults = {name: parameter.default for name, parameter in entry.parameters.items()}
        return {**defaults, **{name: value for name, value in given.items() if value is not None}}


class TrainSection(Section):
    """The training loop."""

    steps: int | None = _setting(
        None,
        "optimizer steps; default: 80 x images / global batch, from 100 to 3000 (400 on the built-in base)",
        "use a number of optimizer steps, such as 400",
        ge=1,
        le=1_000_000,
    )
    epochs: Positive | None = _setting(
        None, "passes over all images, instead of train.steps", "use a number such as 10"
    )
    batch_size: Count | Literal["auto"] | None = _setting(
        None,
        "micro-batch size per process; auto: the largest divisor of accumulate that fits; default: 1, or 4 "
        "on the built-in base",
        "use 1 to 8, or auto together with train.accumulate",
    )
    accumulate: Count = _setting(
        1, "gradient accumulation; global batch = batch_size x accumulate x processes", "use 1 to disable it"
    )
    learning_rate: Positive = _setting(
        1e-4, "peak learning rate; the built-in base has its own default", "use 1e-5 to 1e-3 on SD 1.5"
    )
    learning_rates: dict[Pattern, Positive] = _setting(
        {}, "learning rates by module pattern, such as {'*.attn2.*' = 5e-5}", "use a table of numbers"
    )
    text_encoder_learning_rate: Positive | None = _setting(
        None, "learning rate of the text encoders; default: half of train.learning_rate", "omit it for that"
    )
    lora_plus_ratio: Positive = _setting(
        1.0, "LoRA+: learning rate of up (B) over that of down (A); 1: off", "use 2 to 16, or 1 to disable it"
    )
    schedule: Annotated[
        Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"],
        _also(constant_with_warmup="constant"),
    ] = _setting(
        "constant",
        "learning-rate schedule after warm-up: constant, linear, cosine, cosine_with_restarts or polynomial",
    )
    schedule_cycles: Count = _setting(1, "cycles of cosine_with_restarts; 1: as cosine", "use 2 to 5")
    schedule_power: Positive = _setting(
        1.0, "exponent of polynomial; 1: as linear", "use 2 to fall more slowly at the end"
    )
    warmup: NotNegative = _setting(
        0.05,
        "warm-up: a fraction of the steps if below 1, else a number of steps",
        "use 0.05, or a number of steps",
    )
    optimizer: str = _setting(
        "adamw",
        "adamw, or the import path of an optimizer class such as bitsandbytes.optim.AdamW8bit",
        "use adamw or an import path such as bitsandbytes.optim.AdamW8bit",
    )
    optimizer_args: dict[str, Argument] = _setting(
        {}, "its arguments, such as {weight_decay = 0.01}", "use numbers, strings, booleans, or lists of them"
    )
    precision: Dtype = _setting(
        "auto", "compute precision: auto (bf16 on GPUs that support it, else fp32), fp32, bf16 or fp16"
    )
    seed: int = _setting(0, "random seed", "use an integer such as 0", ge=0, lt=2**32)
    ema_decay: Probability = _off(
        "EMA of the adapter's weights, which is then sampled and saved", "0.99 to 0.9999"
    )
    grad_clip: NotNegative = _off("maximum gradient norm", "1", default=1.0)
    gradient_checkpointing: bool | Literal["auto"] = _setting(
        "auto", "recompute activations to save memory, a third slower: auto (only if needed), true or false"
    )
    compile: bool = _setting(
        False, "compile transformer blocks with torch.compile; takes a minute or more at the start"
    )
    max_skipped_steps: Count = _setting(
        10, "stop after this many consecutive non-finite steps", "use a number of steps such as 10"
    )
    save_every: NotNegativeInt | None = _every("saves of adapter and checkpoint", "only at the end")
    keep_checkpoints: Count = _setting(2, "checkpoints to keep; adapters are all kept", "keep at least 1")
    sample_every: NotNegativeInt | None = _every(
        "sample grids", "none", "so that sampling takes at most a fifth of the time"
    )
    evaluate_every: NotNegativeInt | None = _every("validation (held-out) losses", "none")
    trackers: Texts = _setting([], "Accelerate trackers, such as tensorboard or wandb, besides events.jsonl")
    trace: bool = _setting(False, "log every sample of every step to trace.jsonl")
    timeout_seconds: Positive = _setting(
        600.0, "how long a process waits for the others", "use seconds such as 600"
    )

    def _conflicts(self) -> Iterator[str]:
        if self.steps is not None and self.epochs is not None:
            yield (
                f"train.epochs = {self.epochs:g} and train.steps = {self.steps} both say how long to train; "
                "keep one of them"
            )
        for key, schedule in (("cycles", "cosine_with_restarts"), ("power", "polynomial")):
            value = getattr(self, f"schedule_{key}")
            if value != 1 and self.schedule != schedule:
                yield (
                    f"train.schedule_{key} = {value:g} has no effect while train.schedule = {self.schedule}; "
                    f"set train.schedule={schedule} or remove it"
                )

    @property
    def micro_batch(self) -> int:
        """Samples in one forward and backward pass; 1 until the size that `auto` finds is known."""
        return self.batch_size if isinstance(self.batch_size, int) else 1

    @property
    def text_encoder_rate(self) -> float:
        """Learning rate of the text encoders: half of `learning_rate` by default."""
        return self.text_encoder_learning_rate or self.learning_rate / 2


class SampleSection(Section):
    """Images made during and after training."""

    prompts: Texts = _setting(
        [], "prompts; default: up to 8 training and validation (held-out) captions, as the time allows"
    )
    negative_prompt: str = _setting("", "negative prompt")
    seeds: Seeds = _setting(
        [0, 1],
        "random seeds, one row of the grid each; a run whose time allows one only takes the first by default",
        "use one or more integers such as 0",
        min_length=1,
    )
    strengths: Numbers = _setting(
        [1.0],
        "LoRA strengths, one column of the grid each, beside the base; the built-in base has its own default",
        "use a number",
        min_length=1,
    )
    steps: Count = _setting(25, "sampling steps", "use 20 to 50")
    guidance: NotNegative | None = _setting(
        None, "guidance scale (CFG); default: the base's usual one", "use 1 to 12"
    )
    scheduler: str | None = _setting(
        None,
        "diffusers scheduler; default: the base's own",
        "use a diffusers scheduler such as DDIMScheduler",
    )
    safety_checker: bool = _setting(
        True,
        "let the base's own safety checker, if it has one, withhold images",
        "use false to show all images",
    )
    batch_size: Count = _setting(4, "images per batch", "use 1 to 8")

    def _conflicts(self) -> Iterator[str]:
        if any(not prompt.strip() for prompt in self.prompts):
            yield "sample.prompts has an empty prompt; describe what the image should show"
        if file := next((prompt for prompt in self.prompts if re.fullmatch(r"\S+\.txt", prompt)), None):
            yield (
                f"sample.prompts has the file name {shorten(file)}; list the prompts themselves "
                "(`sdlora sample RUN --prompts FILE` reads a file)"
            )


class ExportSection(Section):
    """LoRA files for other programs."""

    formats: Annotated[list[Literal["diffusers", "kohya"]], BeforeValidator(_as_list)] = _setting(
        ["diffusers", "kohya"],
        "dialects of the final files: diffusers; kohya (for A1111, Forge, ComfyUI)",
        "use diffusers, kohya or both",
        min_length=1,
    )
    precision: FileDtype = _setting("fp16", "precision of the final files: fp32, bf16 or fp16")
    name: (
        Annotated[
            str, Field(min_length=1, max_length=100, pattern=r"^[^.\s/\\:*?\"<>|][^/\\:*?\"<>|\x00-\x1f]*$")
        ]
        | None
    ) = _setting(
        None, "name of the files in webui/, and in prompts of UIs; default: the run's", "use a file name"
    )
    include_captions: bool = _setting(
        False, "write the words of all captions into the files' metadata, for tools that show tags"
    )


class RunConfig(Section):
    """All settings of a run."""

    images: str = _setting("", "image folder; IMAGES on the command line")
    base: BaseSection = BaseSection()
    data: DataSection = DataSection()
    lora: LoraSection = LoraSection()
    objective: ObjectiveSection = ObjectiveSection()
    train: TrainSection = TrainSection()
    sample: SampleSection = SampleSection()
    export: ExportSection = ExportSection()

    def _conflicts(self) -> Iterator[str]:
        marks = PLACEHOLDERS[: self.data.rules]
        prompt = next((text for text in self.sample.prompts if any(mark in text for mark in marks)), None)
        if prompt is not None and self.data.trigger is None:
            yield (
                f"sample.prompts has a placeholder for the trigger in {prompt!r} but there is no "
                "data.trigger; remove the placeholder, or train with a trigger (--trigger)"
            )
        if self.lora.kind == "dora" and self.base.quantize != "none":
            yield (
                f"lora.kind = dora does not go with base.quantize = {self.base.quantize}: PEFT needs the "
                "norms of the base weights, which are packed; set base.quantize=none or lora.kind=lora"
            )
        if self.lora.kind == "dora" and self.lora.parent is not None:
            yield (
                "lora.kind = dora does not go with lora.parent: a DoRA scales what lies below it, so the "
                "two do not add up; set lora.kind=lora or remove lora.parent"
            )
        if self.lora.text_encoder and self.data.cache is True:
            yield (
                "data.cache = true conflicts with lora.text_encoder = true: text embeddings change while "
                "their encoder trains; set data.cache=auto (latents stay cached) or lora.text_encoder=false"
            )
        if self.lora.text_encoder and self.data.clip_skip > 2:
            yield (
                f"data.clip_skip = {self.data.clip_skip} does not go with lora.text_encoder = true: several "
                "layers would not learn; set data.clip_skip=2 or lora.text_encoder=false"
            )
        objective = self.objective
        for name in ("unmasked_weight", "unmasked_prior"):
            value = getattr(objective, name)
            if self.data.masks == "none" and value != type(objective).model_fields[name].default:
                yield (
                    f"objective.{name} = {value:g} has no effect without masks; set data.masks=files, or "
                    "remove it"
                )
        if objective.prior_weight and not self.data.triggers:
            yield (
                f"objective.prior_weight = {objective.prior_weight:g} keeps captions without the trigger as "
                "the base has them, but data.trigger is not set; set it"
            )
        rate = self.train.text_encoder_learning_rate
        if rate is not None and not self.lora.text_encoder:
            yield (
                f"train.text_encoder_learning_rate = {rate:g} has no effect while lora.text_encoder = false; "
                "set lora.text_encoder=true or remove it"
            )

    def given(self) -> dict[str, Any]:
        """The settings that were given; defaults, which may depend on other settings, are left out."""
        return self.model_dump(exclude_unset=True)

    def with_defaults(self, **sections: Mapping[str, Any]) -> RunConfig:
        """A copy with other defaults: values for the settings that were not given."""
        free: dict[str, dict[str, Any]] = {}
        for section, values in sections.items():
            given = getattr(self, section).model_fields_set
            free[section] = {name: value for name, value in values.items() if name not in given}
        return self.replace(**free)

    def replace(self, **sections: Mapping[str, Any]) -> RunConfig:
        """A copy with some settings changed, validated again."""
        values = self.given()
        for name, changes in sections.items():
            values[name] = {**values.get(name, {}), **changes}
        return validate_config(values)


def load_config(
    file: str | Path | RunConfig | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    *,
    images: str | Path = "",
    preset: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Reads a TOML file, applies overrides, and validates the result.

    Args:
        file: A TOML file with the settings that differ from the defaults; or a run, its `config.json` or a
            configuration to start from.
        overrides: `section.key=value` strings (values are TOML, else plain text), or a mapping from
            `section.key` to a value, or from a section to such a mapping. Later ones win.
        images: The image folder; default: that of the configuration.
        preset: The name of a preset, such as `sd15`, to start from; the file's settings win.
        arguments: From `section.key` to values that win over all others; None means not given.

    Raises:
        ConfigError: With one line per mistake.
    """
    if isinstance(file, RunConfig):
        values = file.given()
    else:
        values = read_settings(Path(file)) if file is not None else {}
    if preset is not None:
        values = _merge(read_toml(find_preset(preset)), values)
    problems: list[str] = []
    overrides = [overrides] if isinstance(overrides, str) else overrides
    pairs = _flatten(overrides) if isinstance(overrides, Mapping) else map(parse_override, overrides)
    given = {key: value for key, value in (arguments or {}).items() if value is not None}
    for key, value in [*pairs, *given.items()]:
        if problem := _set_nested(values, key, value):
            problems.append(problem)
    if images or not isinstance(file, RunConfig):
        values["images"] = str(images)
    return validate_config(values, problems)


def _flatten(overrides: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """`{"lora": {"rank": 8}}` as `lora.rank` and 8."""
    for key, value in overrides.items():
        if "." not in key and isinstance(value, Mapping):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def _merge(values: dict[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of settings, in which later ones win."""
    for name, section in later.items():
        first = values.get(name)
        if isinstance(first, dict) and isinstance(section, dict):
            section = {**first, **section}
        values[name] = section
    return values


def _set_nested(values: dict[str, Any], key: str, value: Any) -> str:
    """Sets `section.key` in nested tables; returns the problem if that is impossible."""
    *tables, name = key.split(".")
    if not tables and (guess := guess_key(name, RunConfig)):
        return f"{shorten(key)} is not a setting; {guess}"
    if not tables or "" in (*tables, name) or len(tables) > MAX_DEPTH:
        return f"{shorten(key)}: write section.key=value, such as lora.rank=8; `sdlora settings` lists all"
    place = values
    for number, table in enumerate(tables, 1):
        inner = place.setdefault(table, {})
        if not isinstance(inner, dict):
            return f"{'.'.join(tables[:number])} is a section; write it as a table"
        place = inner
    place[name] = value
    return ""


def parse_override(text: str) -> tuple[str, Any]:
    """Parses `lora.rank=8` to ("lora.rank", 8); a value that is not TOML is text."""
    key, separator, raw = text.partition("=")
    if not separator:
        found = re.match(r"[a-z]+\.[a-z_0-9]+", text)
        example = f"{found[0]}=VALUE" if found else "section.key=value, such as lora.rank=8"
        raise ConfigError(f"{shorten(repr(text))} is not a setting; write {example}")
    try:
        return key.strip(), parse_toml(f"value = {raw}")["value"]
    except UnfitFileError:
        return key.strip(), raw.strip()


def read_settings(file: Path) -> dict[str, Any]:
    """The settings of a TOML file, or those of a run without its images."""
    resolved = file / "config.json" if file.is_dir() else file
    if resolved.name != "config.json" or not resolved.is_file():
        return read_toml(file)
    try:
        values = read_config(resolved).given()
    except (OSError, UnfitFileError, ConfigError):
        return read_toml(resolved)  # not one of a run, which this explains
    del values["images"]
    return values


def read_toml(file: Path) -> dict[str, Any]:
    """Reads a config file; raises a ConfigError if it is missing or not TOML."""
    try:
        return drop_removed(parse_toml(read_bytes(file, MAX_TOML_BYTES).decode("utf-8-sig")))
    except FileNotFoundError:
        problem = f"config file {file} does not exist; `sdlora settings --presets` lists presets"
        raise ConfigError(problem, key="config.missing") from None
    except UnfitFileError as error:
        problem = f"config file {file} {error}; `sdlora settings --presets` names examples"
        if file.suffix.lower() in (".json", ".yaml", ".yml"):
            problem += f"; `sdlora settings --from {file}` translates a config of another trainer"
        raise ConfigError(problem, key=error.key) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config file {file}: {error}", key="config.unreadable") from None


def read_config(file: Path) -> RunConfig:
    """Reads the resolved `config.json` of a run.

    Raises:
        OSError: If it cannot be read.
        UnfitFileError: If it is not JSON.
        ConfigError: If it has settings that this version does not know.
    """
    values = drop_removed(read_json(file, MAX_JSON_BYTES))
    if isinstance(values, dict) and isinstance(values.get("data"), dict):
        # The run of an earlier version continues with the images and captions that it began with.
        values["data"].setdefault("rules", 1)
    return validate_config(values)


def validate_config(values: Mapping[str, Any], problems: Iterable[str] = ()) -> RunConfig:
    """Validates a whole configuration; raises a ConfigError with one line per mistake."""
    lines = list(problems)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        # A union reports each of its branches; one line per key is enough.
        mistakes = error.errors()[: 4 * MAX_PROBLEMS]
        for item in mistakes:
            for line in describe_error(dict(item), RunConfig).split("\n"):
                start = line if item["type"] == "value_error" else line.split(" ", 1)[0] + " "
                if not any(other.startswith(start) for other in lines):
                    lines.append(line)
        raise ConfigError(*lines) from None
    if lines:
        raise ConfigError(*lines)
    return config


def json_schema() -> dict[str, Any]:
    """JSON schema of config files, for completion and checks in editors."""
    schema = RunConfig.model_json_schema()
    for section in schema["$defs"].values():
        for name, rules in section["properties"].items():
            rules.pop("remedy", None)
            if "items" in rules:  # lists of one element may be given as the element
                one_of = {key: rules.pop(key) for key in ("type", "items", "minItems") if key in rules}
                section["properties"][name] = {**rules, "anyOf": [one_of, one_of["items"]]}
    return schema
