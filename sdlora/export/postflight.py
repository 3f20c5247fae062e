"""Proof that a LoRA file works elsewhere: diffusers loads it, and it does what was trained (R-01)."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.config import load_config
from sdlora.errors import AdapterError, first_line, join_names
from sdlora.formats.container import read_lora_header
from sdlora.formats.files import load_adapter, resolve_adapter
from sdlora.formats.keys import dialect_of
from sdlora.formats.read import state_to_adapter
from sdlora.formats.write import fold
from sdlora.lora.adapter import Adapter, check_base
from sdlora.lora.attach import mounted, unwrapped
from sdlora.lora.kinds import AdapterModule
from sdlora.lora.layers import DENOISER, Model, components, named_modules, replace_modules
from sdlora.models.base import without_bars
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.load import load_component, load_denoiser, load_stock_pipeline
from sdlora.models.quantize import CONV_SETTINGS
from sdlora.models.stable_diffusion import pipeline_of, wrap_denoiser
from sdlora.sampling.generate import preserve_state
from sdlora.sampling.session import base_of, choose_device

# Share of a module's change that may differ: rounding to fp16 loses at most 1e-3 of it, to bf16 8e-3.
MODULE_TOLERANCE = 0.05
# Share of the change of the output that may differ.
OUTPUT_TOLERANCE = 0.1
# A weak adapter is compared at a strength that changes the output by this multiple of the dtype's precision,
# or by half: rounding moves an output in bf16 by a hundredth, which would hide an error of a small change.
VISIBLE_CHANGE, MAX_CHANGE, MAX_TRIES = 1024, 0.5, 8
PEFT_ATTRIBUTES = {"peft_config", "_hf_peft_config_loaded"}
_CHECK_NAME = "check_7f3a9c"
_ABOUT_KEYS = re.compile(r"\bkeys?\b|ignored|mismatch", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PostflightReport:
    """How a file behaves in a stock diffusers pipeline.

    Args:
        path: The file.
        num_modules: Modules that it adapts.
        difference: Root mean square of the output's difference from the trained model's.
        effect: Root mean square of the trained output's difference from the base's.
        strength: Strength of the adapter in both.
        reader: What has read the file.
    """

    path: Path
    num_modules: int
    difference: float
    effect: float
    strength: float = 1.0
    reader: str = "diffusers"

    def __str__(self) -> str:
        at = "" if self.strength == 1 else f" at strength {self.strength:.3g}"
        return (
            f"{self.path.name} in {self.reader}: {self.num_modules} modules, output {self.effect:.2g} from "
            f"the base's{at}, {self.difference:.1g} from the trained model's"
        )


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Outputs of each part with and without the trained adapter, and the strength for each."""

    base: dict[str, Tensor]
    trained: dict[str, Tensor]
    strengths: dict[str, float]


def postflight(
    paths: Sequence[str | Path], adapter: Adapter, model: Model, info: BaseInfo
) -> list[PostflightReport]:
    """Loads each exported file into the base in memory and compares it with the trained adapter (R-01).

    diffusers' own loader and PEFT read the files, around the very networks that were trained on, a quantised
    one too, so no second base is loaded. Afterwards the base gives the same output to the bit, and what was
    mounted on it is mounted again.

    Args:
        paths: The files.
        adapter: The adapter as trained, before folding and rounding.
        model: The base's denoiser, or components.
        info: The base.

    Raises:
        AdapterError: With exit code 1, if a file does not load, adapts other modules, changes a part's output
            in another way than the trained adapter does, or cannot be taken off; names the modules.
    """
    parts = {name: part for name, part in components(model).items() if name in adapter.components}
    with preserve_state(*components(model).values()), unwrapped(model), _plain_types(model):
        outputs = _measure(parts, adapter, info)
        reports = []
        for path in map(Path, paths):
            with _restored(components(model)):
                pipeline = pipeline_of(info, scheduler=None, **components(model))
                try:
                    reports.append(_check(pipeline, path, adapter, parts, outputs, info))
                finally:
                    pipeline.unload_lora_weights()
            after = {name: _run(name, part, info) for name, part in parts.items()}
            if changed := [name for name in parts if not torch.equal(after[name], outputs.base[name])]:
                raise _failure(
                    path, [f"after unloading, the output of {', '.join(changed)} is not the same as before"]
                )
    return reports


def verify(
    path: str | Path, adapter: Adapter, info: BaseInfo, *, dtype: torch.dtype, device: torch.device | str
) -> PostflightReport:
    """As `postflight`, in a fresh pipeline that diffusers loads; our own reading of the base comes before it.

    Args:
        path: The file.
        adapter: What it should do.
        info: The base; the full one is used, whatever `base.quantize` says.
        dtype: Of the denoiser; text encoders are fp32.
        device: Where both run, one after the other.
    """
    info = replace(info, quantize="none")
    parts: dict[str, Any] = {
        name: load_denoiser(info.components[name], dtype, device)
        if name == DENOISER
        else load_component(info.components[name], torch.float32).to(device).eval()
        for name in adapter.components
    }
    outputs = _measure(parts, adapter, info)
    parts.clear()
    pipeline = load_stock_pipeline(info, dtype=dtype, only=[DENOISER, *adapter.components])
    fresh = {name: getattr(pipeline, name).to(device).eval() for name in adapter.components}
    return _check(pipeline, Path(path), adapter, fresh, outputs, info)


def verify_export(
    source: str | Path, file: str | Path | None = None, base: str | None = None
) -> PostflightReport:
    """Proves in a fresh pipeline, in fp32, that a file does what its source does.

    Args:
        source: A run folder or a LoRA file.
        file: The file; by default the source itself.
        base: The base; by default the run's, or the one named in the source.
    """
    found = resolve_adapter(source)
    adapter = load_adapter(found.file)
    if found.run and base is None:
        settings = found.run.read_config().base
    else:
        settings = load_config(None, {"base.source": base or base_of(found.file, adapter.notes)}).base
    info = inspect_base(settings)
    check_base(adapter, family=info.family, name=info.name, source=str(found.file))
    return verify(file or found.file, adapter, info, dtype=torch.float32, device=choose_device())


def _measure(parts: Mapping[str, Any], adapter: Adapter, info: BaseInfo) -> _Outputs:
    """Runs each part without the adapter and with it, at a strength that rounding does not hide."""
    base, trained, strengths = {}, {}, dict.fromkeys(parts, 1.0)
    for name, part in parts.items():
        base[name] = _run(name, part, info)
        eps = torch.finfo(next(part.parameters()).dtype).eps
        visible = min(MAX_CHANGE, VISIBLE_CHANGE * eps) * _size(base[name])
        # The effect of a strength that is far too small is mostly rounding, hence the repetition.
        for _ in range(MAX_TRIES):
            with mounted(parts, [(adapter, strengths[name])]):
                trained[name] = _run(name, part, info)
            effect = _size(trained[name] - base[name])
            if not 0 < effect < 0.8 * visible:
                break
            strengths[name] *= visible / effect
    return _Outputs(base, trained, strengths)


def _check(
    pipeline: Any, path: Path, adapter: Adapter, parts: Mapping[str, Any], outputs: _Outputs, info: BaseInfo
) -> PostflightReport:
    """Loads one file into a pipeline and compares its modules and outputs with the trained ones."""
    reader = "diffusers"
    dialect = dialect_of(read_lora_header(path).shapes)
    if any(dialect in module.dialect_notes for module in adapter.modules.values()):
        reader, read = "sdlora", load_adapter(path)
        problems, loaded, answers = [], read.modules, {}
        for name, part in parts.items():
            with mounted(parts, [(read, outputs.strengths[name])]):
                answers[name] = _run(name, part, info)
    else:
        problems = _load(pipeline, path, list(parts))
        loaded = _loaded_modules(parts)
        for name, part in parts.items():
            if (strength := outputs.strengths[name]) != 1:
                _set_strength(part, strength)
        answers = {name: _run(name, part, info) for name, part in parts.items()}
    problems += _compare_modules(adapter, loaded)
    differences, effects = {}, {}
    for name in parts:
        stock, base, trained = answers[name], outputs.base[name], outputs.trained[name]
        differences[name], effects[name] = _size(stock - trained), _size(trained - base)
        title = "denoiser" if name == DENOISER else name
        if torch.equal(stock, base):
            problems.append(f"the output of the {title} is the base's")
        # `not <=`, so that an error that is not a number counts.
        elif not differences[name] <= OUTPUT_TOLERANCE * effects[name]:
            problems.append(
                f"the {title}'s output is {differences[name]:.2g} off where the LoRA changes it by "
                f"{effects[name]:.2g}"
            )
    if problems:
        raise _failure(path, problems)
    first = next(iter(parts))
    return PostflightReport(
        path, len(adapter.modules), differences[first], effects[first], outputs.strengths[first], reader
    )


def _failure(path: Path, problems: Sequence[str]) -> AdapterError:
    reasons = "; ".join(problems)
    error = AdapterError(
        f"{path} does not reproduce the trained model in diffusers: {reasons}", key="export.proof"
    )
    error.exit_code = 1
    return error


@contextmanager
def _plain_types(model: Model) -> Iterator[None]:
    """Hides quantised convolutions behind plain ones: PEFT makes its own layers of the type that it wraps."""
    convolutions = {name: m for name, m in named_modules(model) if isinstance(m, nn.Conv2d)}
    quantized = {name: m for name, m in convolutions.items() if type(m) is not nn.Conv2d}
    replace_modules(model, {name: _plain_type(layer) for name, layer in quantized.items()})
    try:
        yield
    finally:
        replace_modules(model, quantized)


def _plain_type(layer: nn.Conv2d) -> nn.Conv2d:
    """A `Conv2d` that answers as a layer of a derived type does."""
    sizes: Any = {name: getattr(layer, name) for name in CONV_SETTINGS}
    plain = nn.Conv2d(**sizes, bias=False, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    plain.forward = layer.forward  # type: ignore[method-assign]
    return plain


@contextmanager
def _restored(parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Takes off whatever diffusers and PEFT put on networks: their layers and their attributes."""
    modules = {name: dict(part.named_modules()) for name, part in parts.items()}
    try:
        yield
    finally:
        for name, part in parts.items():
            for path, module in modules[name].items():
                parent, _, child = path.rpartition(".")
                if path and getattr(owner := modules[name][parent], child) is not module:
                    setattr(owner, child, module)
            for attribute in PEFT_ATTRIBUTES & vars(part).keys():
                delattr(part, attribute)


def _set_strength(part: nn.Module, strength: float) -> None:
    for module in part.modules():
        layer: Any = module
        if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):
            layer.set_scale(_CHECK_NAME, strength)


@torch.no_grad()
def _run(name: str, part: Any, info: BaseInfo) -> Tensor:
    """A part's output for a fixed input, fp32, on the CPU."""
    if name == DENOISER:
        base = wrap_denoiser(info, part)
        return base.denoise(*base.example_inputs()).cpu()
    return _run_text_encoder(part).float().cpu()


def _run_text_encoder(encoder: Any) -> Tensor:
    """The states (1, L, D) of tokens spread over the vocabulary, or their projection (1, P)."""
    config = encoder.config
    tokens = torch.linspace(1, config.vocab_size - 1, config.max_position_embeddings).long()
    tokens[-1] = config.eos_token_id
    answer: Tensor = encoder(tokens[None].to(encoder.device))[0]
    return answer


def _load(pipeline: Any, path: Path, parts: Sequence[str]) -> list[str]:
    """Loads a file as a user does; what the libraries complain about are the problems."""
    with _heard() as complaints, without_bars():
        try:
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=_CHECK_NAME)
        except Exception as error:
            return [f"it does not load ({first_line(error)})"]
    # Always said of a part that a LoRA does not change.
    expected = re.compile(r"No LoRA keys associated to .*prefix='(\w+)'")
    heard = [(line, expected.match(line)) for line in complaints if _ABOUT_KEYS.search(line)]
    return [line for line, match in heard if not match or match[1] in parts]


class _Listener(logging.Handler):
    """Keeps the first line of each message."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(first_line(record.getMessage()))


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collects the warnings of diffusers and PEFT in place of printing them."""
    listener, logger = _Listener(), logging.getLogger("diffusers")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [listener], False
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield listener.lines
        kinds = (RuntimeWarning, UserWarning)
        listener.lines += [first_line(item.message) for item in caught if issubclass(item.category, kinds)]
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def _compare_modules(adapter: Adapter, loaded: Mapping[str, AdapterModule]) -> list[str]:
    """Checks that a file has the trained modules, each with the trained change."""
    problems = []
    if missing := sorted(set(adapter.modules) - set(loaded)):
        problems.append(f"{len(missing)} trained modules are missing ({join_names(missing)})")
    if unexpected := sorted(set(loaded) - set(adapter.modules)):
        problems.append(f"{len(unexpected)} modules were not trained ({join_names(unexpected)})")
    trained = fold(adapter).modules
    norms = {name: module.norm_squared() for name, module in trained.items()}
    typical = sum(norms.values()) / len(norms)
    # `not <=`, so that an error that is not a number counts; a tiny module is measured by the typical one.
    wrong = [
        name
        for name, module in loaded.items()
        if name in trained
        and not (
            module.kind == trained[name].kind
            and trained[name].distance_squared(module) <= MODULE_TOLERANCE**2 * max(norms[name], typical)
        )
    ]
    if wrong:
        problems.append(f"{len(wrong)} modules change differently than trained ({join_names(wrong)})")
    return problems


def _loaded_modules(parts: Mapping[str, nn.Module]) -> Mapping[str, AdapterModule]:
    """What PEFT's layers hold, by module, scale folded."""
    state: dict[str, Tensor] = {}
    for name, module in named_modules(parts):
        layer: Any = module
        if _CHECK_NAME not in getattr(layer, "scaling", ()):
            continue
        for attribute, holder in layer.named_children():
            if attribute.startswith("lora_") and _CHECK_NAME in holder:
                state |= {
                    f"{name}.{attribute}.{key}": value.detach()
                    for key, value in holder[_CHECK_NAME].named_parameters()
                }
        state[f"{name}.alpha"] = torch.tensor(float(layer.scaling[_CHECK_NAME] * layer.r[_CHECK_NAME]))
    return state_to_adapter(state).modules if state else {}


def _size(values: Tensor) -> float:
    """Root mean square."""
    return float(values.double().square().mean().sqrt())
