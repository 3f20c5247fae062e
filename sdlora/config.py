"""The settings of a run: one strict model tree, read from TOML and `section.key=value` overrides."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sdlora.errors import ConfigError

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
PredictionType = Literal["epsilon", "v_prediction", "sample"]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | int | float) else value


Texts = Annotated[list[str], BeforeValidator(_as_list)]
Numbers = Annotated[list[float], BeforeValidator(_as_list)]
Integers = Annotated[list[int], BeforeValidator(_as_list)]


def _field(default: Any, remedy: str = "", **rules: Any) -> Any:
    """A setting whose error message ends with a remedy."""
    return Field(default, json_schema_extra={"remedy": remedy} if remedy else None, **rules)


class Section(BaseModel):
    """A group of settings; unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseSection(Section):
    """The frozen Stable Diffusion that adapters are trained on."""

    source: str = _field("builtin", "give builtin, a diffusers folder or a hub id", min_length=1)
    revision: str | None = None
    dtype: Dtype = _field("auto", "use auto, fp32, bf16 or fp16")
    vae: str | None = None


class DataSection(Section):
    """The image folder, and how a picture becomes a training sample."""

    trigger: str | None = _field(None, "give a word, or leave it out", min_length=1)
    resolution: int | None = _field(None, "give a side in pixels, such as 512", ge=16)
    background: str = "white"
    crop: Literal["centre", "random"] = _field("centre", "use centre or random")
    crop_variants: int | None = _field(None, "use 1 to 16 fixed crops for each image", ge=1, le=64)
    flip: bool = False
    caption_dropout: float = _field(0.05, "use a share such as 0.05", ge=0, lt=1)
    heldout: float | str = _field("auto", "give a folder, a share such as 0.1, or 0")
    cache: bool | Literal["auto"] = _field("auto", "use auto, true or false")
    allow_missing_captions: bool = False
    on_bad_image: Literal["stop", "skip"] = _field("stop", "use stop or skip")

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

    rank: int = _field(16, "use 4 to 32 for a style", ge=1)
    alpha: float | None = _field(None, "leave it out to use the rank", gt=0)
    targets: Texts = _field(
        ["attention"], "use attention, or name patterns such as *.attn2.to_v", min_length=1
    )
    init_from: str | None = None

    @property
    def trained_alpha(self) -> float:
        """Alpha as trained: the rank unless given."""
        return float(self.rank) if self.alpha is None else self.alpha


class ObjectiveSection(Section):
    """The denoising loss."""

    loss: Literal["mse", "huber", "pseudo_huber", "smooth_l1"] = _field("mse", "use mse or pseudo_huber")
    huber_delta: float = _field(0.1, "use about 0.1", gt=0)
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

    steps: int | None = _field(None, "give the number of optimizer steps, such as 400", ge=1)
    batch_size: int | None = _field(None, "use 1 to 8", ge=1)
    accumulate: int = _field(1, "use 1 to switch accumulation off", ge=1)
    learning_rate: float = _field(1e-4, "use 1e-5 to 1e-3 on SD 1.5", gt=0)
    schedule: Literal["constant", "linear", "cosine"] = _field("constant", "use constant, linear or cosine")
    warmup: float = _field(0.05, "use a share of the steps such as 0.05, or a number of steps", ge=0)
    optimizer: str = _field("adamw", "use adamw or an import path such as bitsandbytes.optim.AdamW8bit")
    optimizer_args: dict[str, Any] = Field(default_factory=dict)
    precision: Dtype = _field("auto", "use auto, fp32, bf16 or fp16")
    seed: int = _field(0, "give a whole number", ge=0)
    grad_clip: float = _field(1.0, "use 1, or 0 to switch clipping off", ge=0)
    gradient_checkpointing: bool = False
    max_skipped_steps: int = _field(10, "give how many bad steps in a row are too many", ge=1)
    save_every: int | None = _field(None, "give a number of steps, or 0 for the end only", ge=0)
    keep_checkpoints: int = _field(2, "keep at least 1", ge=1)
    sample_every: int | None = _field(None, "give a number of steps, or 0 for none", ge=0)
    evaluate_every: int | None = _field(None, "give a number of steps, or 0 for none", ge=0)
    trackers: Texts = Field(default_factory=list)


class SampleSection(Section):
    """Pictures made during and after training."""

    prompts: Texts = Field(default_factory=list)
    negative_prompt: str = ""
    seeds: Integers = _field([0, 1], "give at least one seed", min_length=1)
    strengths: Numbers = _field([1.0], "give at least one strength", min_length=1)
    steps: int = _field(25, "use 20 to 50", ge=1)
    guidance: float | None = _field(None, "use 1 to 12", ge=0)
    scheduler: str | None = _field(None, "give a diffusers scheduler such as DDIMScheduler")
    batch_size: int = _field(4, "use 1 to 8", ge=1)

    @model_validator(mode="after")
    def _check(self) -> SampleSection:
        if any(not prompt.strip() for prompt in self.prompts):
            raise ValueError("sample.prompts holds an empty prompt; write what the picture should show")
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
        return self

    def replace(self, **sections: Mapping[str, Any]) -> RunConfig:
        """A copy with some keys of some sections changed, checked again."""
        values = self.model_dump()
        for name, changes in sections.items():
            values[name] = {**values[name], **changes}
        return validate_config(values)


def load_config(
    file: str | Path | None = None,
    overrides: Iterable[str] | Mapping[str, Any] = (),
    *,
    images: str | Path = "",
) -> RunConfig:
    """Reads a TOML file, then overrides, and checks the whole.

    Args:
        file: A TOML file that says what differs from the defaults.
        overrides: `section.key=value` texts (the value is TOML, else taken as text) or a mapping
            from `section.key` to a value. Later ones win.
        images: The image folder.

    Raises:
        ConfigError: With one line for every mistake found.
    """
    values = read_toml(Path(file)) if file is not None else {}
    problems: list[str] = []
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(parse_override, overrides)
    for key, value in pairs:
        section, _, name = key.partition(".")
        if not name:
            problems.append(f"{key}: give settings as section.key=value, such as lora.rank=8")
        elif not isinstance(values.setdefault(section, {}), dict):
            problems.append(f"{section} is a section; give it as a table")
        else:
            _set_nested(values[section], name, value)
    values["images"] = str(images)
    return validate_config(values, problems)


def _set_nested(table: dict[str, Any], name: str, value: Any) -> None:
    first, _, rest = name.partition(".")
    if rest:
        table[first] = dict(table.get(first) or {})
        _set_nested(table[first], rest, value)
    else:
        table[first] = value


def parse_override(text: str) -> tuple[str, Any]:
    """`lora.rank=8` becomes ("lora.rank", 8); what is not TOML is text."""
    key, separator, raw = text.partition("=")
    if not separator:
        raise ConfigError(f"{text!r} is not a setting; write section.key=value, such as lora.rank=8")
    try:
        return key.strip(), tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), raw.strip()


def read_toml(file: Path) -> dict[str, Any]:
    """Reads a config file.

    Raises:
        ConfigError: If it is missing or is not TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"config file {file} does not exist; presets are in configs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config file {file} is not TOML: {error}") from None


def read_config(file: Path) -> RunConfig:
    """Reads the resolved `config.json` of a run."""
    return validate_config(json.loads(file.read_text(encoding="utf-8")))


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
        for line in dict.fromkeys(_describe(dict(item)) for item in error.errors()):
            key = line.split(" ", 1)[0]
            if not any(other.startswith(f"{key} ") for other in lines):
                lines.append(line)
        raise ConfigError(*lines) from None
    if lines:
        raise ConfigError(*lines)
    return config


def _describe(item: dict[str, Any]) -> str:
    """One line for one pydantic error: key, value seen, what is wrong, what to do."""
    path = [str(part) for part in item["loc"]]
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    key = ".".join(path[:2])
    if item["type"] == "extra_forbidden":
        return f"{'.'.join(path)} is not a setting; {_nearest(path)}"
    if item["type"] in ("model_type", "model_attributes_type"):
        return f"{key} = {item['input']!r} must be a section; write [{key}] and its keys below"
    section = RunConfig.model_fields.get(path[0])
    model = section.annotation if section else None
    extra: dict[str, Any] = {}
    if (
        isinstance(model, type)
        and issubclass(model, Section)
        and len(path) > 1
        and path[1] in model.model_fields
    ):
        raw = model.model_fields[path[1]].json_schema_extra
        extra = raw if isinstance(raw, dict) else {}
    remedy = f"; {extra['remedy']}" if extra.get("remedy") else ""
    return f"{key} = {item['input']!r} {_reason(item)}{remedy}"


def _reason(item: dict[str, Any]) -> str:
    context = item.get("ctx", {})
    reasons = {
        "greater_than_equal": "must be at least {ge:g}",
        "greater_than": "must be above {gt:g}",
        "less_than_equal": "must be at most {le:g}",
        "less_than": "must be below {lt:g}",
        "literal_error": "must be one of {expected}",
        "too_short": "must not be empty",
        "string_too_short": "must not be empty",
        "int_parsing": "must be a whole number",
        "int_type": "must be a whole number",
        "int_from_float": "must be a whole number",
        "float_parsing": "must be a number",
        "float_type": "must be a number",
        "bool_parsing": "must be true or false",
        "bool_type": "must be true or false",
        "string_type": "must be text",
        "list_type": "must be a list",
    }
    text = reasons.get(item["type"])
    return text.format(**context) if text else f"is not valid ({item['msg'].lower()})"


def _nearest(path: list[str]) -> str:
    """Names the setting that was probably meant."""
    if len(path) == 1:
        names = [name for name in RunConfig.model_fields if name != "images"]
        guess = difflib.get_close_matches(path[0], names, 1, 0.5)
        return f"did you mean the section [{guess[0]}]?" if guess else f"the sections are {', '.join(names)}"
    keys = {
        f"{section}.{name}"
        for section, info in RunConfig.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
        for name in info.annotation.model_fields
    }
    same = [key for key in keys if key.split(".")[1] == path[1]]
    own = sorted(key for key in keys if key.startswith(f"{path[0]}."))
    guess = same or difflib.get_close_matches(".".join(path), own, 1, 0.5)
    guess = guess or difflib.get_close_matches(".".join(path), sorted(keys), 1, 0.5)
    return (
        f"did you mean {guess[0]}?" if guess else f"[{path[0]}] has {', '.join(k.split('.')[1] for k in own)}"
    )
