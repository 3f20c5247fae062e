"""The settings of a run: one strict model tree, read from TOML and `section.key=value` overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sdlora.errors import MAX_PROBLEMS, ConfigError, shorten
from sdlora.problems import describe_error, drop_removed, guess_key
from sdlora.reading import MAX_DEPTH, MAX_NAME, UnfitFileError, parse_toml, read_bytes, read_json

MAX_TOML_BYTES = 256 * 2**10
MAX_JSON_BYTES = 16 * 2**20

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Quantize = Literal["none", "int8", "nf4"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int | float) else value


Texts = Annotated[list[str], BeforeValidator(_as_list)]
# Of module names, which are shorter; matching one of a hundred thousand letters takes minutes.
Pattern = Annotated[str, Field(max_length=MAX_NAME)]
Patterns = Annotated[list[Pattern], BeforeValidator(_as_list)]
Numbers = Annotated[list[float], BeforeValidator(_as_list)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], BeforeValidator(_as_list)]
Argument = bool | int | float | str | list[bool | int | float | str]


def _field(default: Any, remedy: str = "", **rules: Any) -> Any:
    """A setting whose error message ends with a remedy."""
    return Field(default, json_schema_extra={"remedy": remedy} if remedy else None, **rules)


class Section(BaseModel):
    """A group of settings; unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_text(cls, values: Any) -> Any:
        """From Python, a path or a run is as good as its text."""
        if not isinstance(values, Mapping):
            return values
        return {
            key: os.fspath(value) if isinstance(value, os.PathLike) else value
            for key, value in values.items()
        }


class BaseSection(Section):
    """The frozen Stable Diffusion that adapters are trained on."""

    source: str = _field(
        "builtin", "give builtin, a diffusers folder, a .safetensors file or a hub id", min_length=1
    )
    revision: str | None = None
    variant: Literal["fp16", "bf16"] | None = _field(None, "use fp16 or bf16, or leave it out")
    dtype: Dtype = _field("auto", "use auto, fp32, bf16 or fp16")
    vae: str | None = None
    quantize: Quantize = _field("none", "use none, int8 or nf4")


class DataSection(Section):
    """The image folder, and how a image becomes a training sample."""

    trigger: str | None = _field(None, "give a word, or leave it out", min_length=1, max_length=1000)
    resolution: int | None = _field(None, "give a side in pixels, such as 512", ge=16, le=8192)
    background: str = "white"
    crop: Literal["centre", "random"] = _field("centre", "use centre or random")
    crop_variants: int | None = _field(None, "use 1 to 16 fixed crops for each image", ge=1, le=64)
    flip: bool = False
    caption_dropout: float = _field(0.05, "use a share such as 0.05", ge=0, lt=1)
    heldout: float | str = _field("auto", "give a folder, a share such as 0.1, or 0")
    cache: bool | Literal["auto"] = _field("auto", "use auto, true or false")
    allow_missing_captions: bool = False
    on_bad_image: Literal["stop", "skip"] = _field("stop", "use stop or skip")
    follow_links: bool = False

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        if self.crop == "centre" and (self.crop_variants or 1) > 1:
            raise ValueError(
                f"data.crop_variants = {self.crop_variants} needs data.crop = random "
                "(a centre crop has one variant); set data.crop=random or leave data.crop_variants out"
            )
        if not isinstance(self.heldout, str) and not 0 <= self.heldout < 1:
            raise ValueError(
                f"data.heldout = {self.heldout:g} must be a share below 1; use 0.1, 0, or a folder"
            )
        return self

    @property
    def num_crops(self) -> int:
        """Fixed crops for each image: one, or four by default when they are random."""
        return self.crop_variants or (1 if self.crop == "centre" else 4)


class LoraSection(Section):
    """The low-rank adapter."""

    rank: int = _field(16, "use 4 to 32 for a style", ge=1, le=4096)
    alpha: float | None = _field(None, "leave it out to use the rank", gt=0)
    targets: Patterns = _field(
        ["attention"], "use attention, or name patterns such as *.attn2.to_v", min_length=1
    )
    text_encoder: bool = False
    rank_pattern: dict[Pattern, Annotated[int, Field(ge=1)]] = _field(
        {}, "give module patterns with ranks, such as {convolutions = 4}"
    )
    alpha_pattern: dict[Pattern, Annotated[float, Field(gt=0)]] = _field(
        {}, "give module patterns with alphas, such as {convolutions = 1}"
    )
    rslora: bool = False
    init: Literal["gaussian", "kaiming", "orthogonal"] = _field(
        "gaussian", "use gaussian, kaiming or orthogonal"
    )
    init_from: str | None = None
    parent: str | None = _field(None, "give a LoRA file, a run or a node, or leave it out", min_length=1)
    force_parent: bool = False
    dropout: float = _field(0.0, "use 0 to switch off, or about 0.1", ge=0, lt=1)
    max_norm: float = _field(0.0, "use 0 to switch off, or about 1", ge=0)

    @model_validator(mode="after")
    def _check(self) -> LoraSection:
        if self.force_parent and self.parent is None:
            raise ValueError("lora.force_parent = true has no effect alone; set lora.parent or leave it out")
        return self

    @property
    def trained_alpha(self) -> float:
        """Alpha as trained: the rank unless given."""
        return float(self.rank) if self.alpha is None else self.alpha


class ObjectiveSection(Section):
    """The denoising loss."""

    loss: Literal["mse", "huber", "pseudo_huber", "smooth_l1"] = _field("mse", "use mse or pseudo_huber")
    huber_delta: float = _field(0.1, "use about 0.1", ge=1e-3, le=1e3)
    huber_schedule: Literal["constant", "exponential", "snr"] = _field("snr", "use snr")
    min_snr_gamma: float = _field(0.0, "use 0 to switch off, or about 5", ge=0)
    debiased: bool = False
    noise_offset: float = _field(0.0, "use 0 to switch off, or up to 0.1", ge=0, le=1)
    pyramid_noise: int = _field(0, "use 0 to switch off, or 6 levels", ge=0, le=10)
    pyramid_discount: float = _field(0.3, "use about 0.3", gt=0, le=1)
    input_perturbation: float = _field(0.0, "use 0 to switch off, or about 0.1", ge=0, le=1)
    timesteps: Literal["uniform", "logit_normal", "style_friendly"] = _field("uniform", "use uniform")
    timestep_mean: float | None = _field(None, "leave it out for the usual one")
    timestep_std: float | None = _field(None, "leave it out for the usual one", gt=0)
    timestep_range: tuple[int, int] = (0, 1000)
    prediction_type: PredictionType | None = None
    force_prediction_type: bool = False

    @model_validator(mode="after")
    def _check(self) -> ObjectiveSection:
        low, high = self.timestep_range
        if not 0 <= low < high:
            raise ValueError(
                f"objective.timestep_range = [{low}, {high}] must be a first and a larger last "
                "timestep; use [0, 1000] for all"
            )
        if self.force_prediction_type and self.prediction_type is None:
            raise ValueError(
                "objective.force_prediction_type = true needs objective.prediction_type; "
                "say which one to force, or leave both out"
            )
        if self.min_snr_gamma and self.debiased:
            raise ValueError(
                f"objective.min_snr_gamma = {self.min_snr_gamma:g} and objective.debiased = true both weigh "
                "the timesteps; keep one of them"
            )
        if self.noise_offset and self.pyramid_noise:
            raise ValueError(
                f"objective.noise_offset = {self.noise_offset:g} and objective.pyramid_noise = "
                f"{self.pyramid_noise} both strengthen low frequencies; keep one of them"
            )
        self._check_idle("pyramid_discount", self.pyramid_noise > 0, "objective.pyramid_noise=6")
        for name in ("huber_delta", "huber_schedule"):
            self._check_idle(name, self.loss != "mse", "objective.loss=pseudo_huber")
        for name in ("timestep_mean", "timestep_std"):
            self._check_idle(name, self.timesteps != "uniform", "objective.timesteps=style_friendly")
        return self

    def _check_idle(self, name: str, is_used: bool, remedy: str) -> None:
        """Refuses a setting that another one leaves without effect."""
        value = getattr(self, name)
        if not is_used and value != type(self).model_fields[name].default:
            raise ValueError(f"objective.{name} = {value} has no effect alone; set {remedy} or leave it out")

    @property
    def timestep_normal(self) -> tuple[float, float]:
        """Mean and standard deviation of the normal that timesteps are drawn by."""
        mean, std = (-6.0, 2.0) if self.timesteps == "style_friendly" else (0.0, 1.0)
        return (
            mean if self.timestep_mean is None else self.timestep_mean,
            std if self.timestep_std is None else self.timestep_std,
        )


class TrainSection(Section):
    """The loop."""

    steps: int | None = _field(None, "give the number of optimizer steps, such as 400", ge=1, le=1_000_000)
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = _field(
        None, "use 1 to 8, or auto with train.accumulate"
    )
    accumulate: int = _field(1, "use 1 to switch accumulation off", ge=1)
    learning_rate: float = _field(1e-4, "use 1e-5 to 1e-3 on SD 1.5", gt=0)
    learning_rates: dict[Pattern, Annotated[float, Field(gt=0)]] = _field(
        {}, "give patterns of module names and their rates, such as {'*.attn2.*' = 5e-5}"
    )
    text_encoder_learning_rate: float | None = _field(
        None, "leave it out for half of train.learning_rate", gt=0
    )
    lora_plus_ratio: float = _field(1.0, "use 1 to switch off, or 2 to 16", gt=0)
    schedule: Literal["constant", "linear", "cosine"] = _field("constant", "use constant, linear or cosine")
    warmup: float = _field(0.05, "use a share of the steps such as 0.05, or a number of steps", ge=0)
    optimizer: str = _field("adamw", "use adamw or an import path such as bitsandbytes.optim.AdamW8bit")
    optimizer_args: dict[str, Argument] = _field({}, "give numbers, texts, true, false, or lists of them")
    precision: Dtype = _field("auto", "use auto, fp32, bf16 or fp16")
    seed: int = _field(0, "give a whole number, such as 0", ge=0, lt=2**32)
    ema_decay: float = _field(0.0, "use 0 to switch off, or 0.99 to 0.9999", ge=0, lt=1)
    grad_clip: float = _field(1.0, "use 1, or 0 to switch clipping off", ge=0)
    gradient_checkpointing: bool | Literal["auto"] = _field("auto", "use auto, true or false")
    max_skipped_steps: int = _field(10, "give how many bad steps in a row are too many", ge=1)
    save_every: int | None = _field(None, "give a number of steps, or 0 for the end only", ge=0)
    keep_checkpoints: int = _field(2, "keep at least 1", ge=1)
    sample_every: int | None = _field(None, "give a number of steps, or 0 for none", ge=0)
    evaluate_every: int | None = _field(None, "give a number of steps, or 0 for none", ge=0)
    trackers: Texts = Field(default_factory=list)
    trace: bool = False
    timeout_seconds: float = _field(600.0, "give how long a process waits for the others, such as 600", gt=0)

    @property
    def micro_batch(self) -> int:
        """Samples in one forward and backward pass; what `auto` finds is not known yet."""
        return self.batch_size if isinstance(self.batch_size, int) else 1

    @property
    def text_encoder_rate(self) -> float:
        """The learning rate of text encoders: half of the UNet's unless given."""
        return self.text_encoder_learning_rate or self.learning_rate / 2


class SampleSection(Section):
    """Images made during and after training."""

    prompts: Texts = Field(default_factory=list)
    negative_prompt: str = ""
    seeds: Seeds = _field([0, 1], "give one or more whole numbers, such as 0", min_length=1)
    strengths: Numbers = _field([1.0], "give at least one strength", min_length=1)
    steps: int = _field(25, "use 20 to 50", ge=1)
    guidance: float | None = _field(None, "use 1 to 12", ge=0)
    scheduler: str | None = _field(None, "give a diffusers scheduler such as DDIMScheduler")
    safety_checker: bool = _field(True, "use false to show images that the base's own checker withholds")
    batch_size: int = _field(4, "use 1 to 8", ge=1)

    @model_validator(mode="after")
    def _check(self) -> SampleSection:
        if any(not prompt.strip() for prompt in self.prompts):
            raise ValueError("sample.prompts holds an empty prompt; write what the image should show")
        if file := next((prompt for prompt in self.prompts if re.fullmatch(r"\S+\.txt", prompt)), None):
            raise ValueError(
                f"sample.prompts has {shorten(file)}, the name of a file; write the prompts themselves "
                "(`sdlora sample RUN --prompts FILE` reads a file)"
            )
        return self


class ExportSection(Section):
    """The files for other programs."""

    formats: Annotated[list[Literal["diffusers", "kohya"]], BeforeValidator(_as_list)] = _field(
        ["diffusers", "kohya"], "use diffusers, kohya or both", min_length=1
    )
    precision: Literal["fp32", "bf16", "fp16"] = _field("fp16", "use fp16, bf16 or fp32")
    include_captions: bool = False


class RunConfig(Section):
    """Everything that decides a run."""

    images: str = ""
    base: BaseSection = BaseSection()
    data: DataSection = DataSection()
    lora: LoraSection = LoraSection()
    objective: ObjectiveSection = ObjectiveSection()
    train: TrainSection = TrainSection()
    sample: SampleSection = SampleSection()
    export: ExportSection = ExportSection()

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.data.trigger is None:
            for prompt in self.sample.prompts:
                if "{trigger}" in prompt:
                    raise ValueError(
                        f"sample.prompts has {{trigger}} in {prompt!r} but data.trigger is not set; "
                        "set data.trigger or take the placeholder out"
                    )
        if self.lora.text_encoder and self.data.cache is True:
            raise ValueError(
                "data.cache = true and lora.text_encoder = true cannot be together: text states change while "
                "their encoder learns; set data.cache=auto (latents stay cached) or lora.text_encoder=false"
            )
        rate = self.train.text_encoder_learning_rate
        if rate is not None and not self.lora.text_encoder:
            raise ValueError(
                f"train.text_encoder_learning_rate = {rate:g} has no effect while lora.text_encoder = false; "
                "set lora.text_encoder=true or leave it out"
            )
        return self

    def given(self) -> dict[str, Any]:
        """What is set; what was left out stays so, for defaults that depend on other settings."""
        return self.model_dump(exclude_unset=True)

    def replace(self, **sections: Mapping[str, Any]) -> RunConfig:
        """A copy with some keys of some sections changed, checked again."""
        values = self.given()
        for name, changes in sections.items():
            values[name] = {**values.get(name, {}), **changes}
        return validate_config(values)


def load_config(
    file: str | Path | RunConfig | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    *,
    images: str | Path = "",
) -> RunConfig:
    """Reads a TOML file, then overrides, and checks the whole.

    Args:
        file: A TOML file that says what differs from the defaults, or a configuration to start from.
        overrides: `section.key=value` texts (the value is TOML, else taken as text) or a mapping
            from `section.key` to a value. Later ones win.
        images: The image folder; that of the configuration if not given.

    Raises:
        ConfigError: With one line for every mistake found.
    """
    if isinstance(file, RunConfig):
        values = file.given()
    else:
        values = read_toml(Path(file)) if file is not None else {}
    problems: list[str] = []
    overrides = [overrides] if isinstance(overrides, str) else overrides
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(parse_override, overrides)
    for key, value in pairs:
        problem = _set_nested(values, key, value)
        if problem:
            problems.append(problem)
    if images or not isinstance(file, RunConfig):
        values["images"] = str(images)
    return validate_config(values, problems)


def _set_nested(values: dict[str, Any], key: str, value: Any) -> str:
    """Puts a value where its key says; gives the problem if it cannot be put there."""
    *tables, name = key.split(".")
    if not tables and (guess := guess_key(name, RunConfig)):
        return f"{shorten(key)} is not a setting; {guess}"
    if not tables or "" in (*tables, name) or len(tables) > MAX_DEPTH:
        return (
            f"{shorten(key)}: give settings as section.key=value, such as lora.rank=8; "
            "`sdlora settings` lists all"
        )
    place = values
    for number, table in enumerate(tables, 1):
        inner = place.setdefault(table, {})
        if not isinstance(inner, dict):
            return f"{'.'.join(tables[:number])} is a section; give it as a table"
        place = inner
    place[name] = value
    return ""


def parse_override(text: str) -> tuple[str, Any]:
    """`lora.rank=8` becomes ("lora.rank", 8); what is not TOML is text."""
    key, separator, raw = text.partition("=")
    if not separator:
        raise ConfigError(
            f"{shorten(repr(text))} is not a setting; write section.key=value, such as lora.rank=8"
        )
    try:
        return key.strip(), parse_toml(f"value = {raw}")["value"]
    except UnfitFileError:
        return key.strip(), raw.strip()


def read_toml(file: Path) -> dict[str, Any]:
    """Reads a config file.

    Raises:
        ConfigError: If it is missing or is not TOML.
    """
    try:
        return drop_removed(parse_toml(read_bytes(file, MAX_TOML_BYTES).decode("utf-8-sig")))
    except FileNotFoundError:
        raise ConfigError(f"config file {file} does not exist; presets are in configs/") from None
    except UnfitFileError as error:
        raise ConfigError(f"config file {file} {error}; presets are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file} cannot be read: {error}") from None


def read_config(file: Path) -> RunConfig:
    """Reads the resolved `config.json` of a run.

    Raises:
        OSError: If it cannot be read.
        UnfitFileError: If it is not JSON.
        ConfigError: If it holds other settings than this version has.
    """
    return validate_config(drop_removed(read_json(file, MAX_JSON_BYTES)))


def validate_config(values: Mapping[str, Any], problems: Iterable[str] = ()) -> RunConfig:
    """Checks values against the model tree; all mistakes at once.

    Raises:
        ConfigError: With one line for every mistake.
    """
    lines = list(problems)
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        # A union reports each of its branches; one line for each key is enough.
        mistakes = error.errors()[: 4 * MAX_PROBLEMS]
        for line in dict.fromkeys(describe_error(dict(item), RunConfig) for item in mistakes):
            key = line.split(" ", 1)[0]
            if not any(other.startswith(f"{key} ") for other in lines):
                lines.append(line)
        raise ConfigError(*lines) from None
    if lines:
        raise ConfigError(*lines)
    return config
