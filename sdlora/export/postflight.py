"""Proof that a LoRA file works in diffusers, and has the trained effect there."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any, NamedTuple

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
from sdlora.models.base import quiet
from sdlora.models.info import BaseInfo, inspect_base
from sdlora.models.load import load_component, load_fresh_pipeline
from sdlora.models.quantize import CONV_SETTINGS
from sdlora.models.stable_diffusion import pipeline_of, wrap_denoiser
from sdlora.sampling.generate import preserve_state
from sdlora.sampling.session import base_of, choose_device

# Tolerated share of a module's change: rounding to fp16 loses at most 1e-3 of it, to bf16 8e-3.
MODULE_TOLERANCE = 0.05
# Tolerated share of the output's change.
OUTPUT_TOLERANCE = 0.1
# A weak adapter is compared at a strength that changes the output by this multiple of the dtype's precision,
# or by half: rounding moves an output in bf16 by a hundredth, which would hide an error of a small change.
VISIBLE_CHANGE, MAX_CHANGE, MAX_TRIES = 1024, 0.5, 8
LARGE_STEP = 1000.0
PEFT_ATTRIBUTES = {"peft_config", "_hf_peft_config_loaded"}
_CHECK_NAME = "check_7f3a9c"
_ABOUT_KEYS = re.compile(r"\bkeys?\b|ignored|mismatch", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class PostflightReport:
    """The effect of a file in a stock diffusers pipeline.

    `effect` is the root mean square of the trained output's difference from the base's, `difference` that of
    the file's output from the trained one, both at `strength`.
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


class _Outputs(NamedTuple):
    """Outputs of a part without and with the trained adapter, at a strength."""

    base: Tensor
    trained: Tensor
    strength: float


def postflight(
    paths: Sequence[str | Path], adapter: Adapter, model: Model, info: BaseInfo
) -> list[PostflightReport]:
    """Loads each exported file into the base in memory and compares it with the adapter as trained.

    diffusers' own loader and PEFT read the files, around the very networks that were trained on, also
    quantized ones, so no second base is loaded. Afterwards the base's output is the same to the bit, and the
    previous adapters are mounted again. Raises an AdapterError with exit code 1 if a file does not load,
    adapts other modules, changes a part's output differently than the trained adapter, or cannot be unloaded.
    """
    parts = {name: part for name, part in components(model).items() if name in adapter.components}
    with preserve_state(*components(model).values()), unwrapped(model), _restored(components(model)):
        _hide_quantized_convolutions(model)
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
            if changed := [name for name in parts if not torch.equal(after[name], outputs[name].base)]:
                raise _failure(path, f"unloading does not restore the output of {', '.join(changed)}")
    return reports


def verify_export(
    source: str | Path, file: str | Path | None = None, base: str | None = None
) -> PostflightReport:
    """Proves in a fresh pipeline, in fp32, that a file has the effect of its source.

    As `postflight`, but diffusers loads the base too, after sdlora has; it is never quantized. The file is by
    default the source itself (a run folder or a LoRA file), the base the run's, or the one named in the
    source.
    """
    found = resolve_adapter(source)
    path, adapter, device = Path(file or found.file), load_adapter(found.file), choose_device()
    if found.run and base is None:
        settings = found.run.read_config().base
    else:
        settings = load_config(None, {"base.source": base or base_of(found.file, adapter.notes)}).base
    info = replace(inspect_base(settings), quantize="none")
    check_base(adapter, family=info.family, name=info.name, source=str(found.file))
    parts: dict[str, Any] = {
        name: load_component(info.components[name], torch.float32, device) for name in adapter.components
    }
    outputs = _measure(parts, adapter, info)
    parts.clear()
    texts = [name for name in adapter.components if name != DENOISER]
    pipeline = load_fresh_pipeline(info, texts, torch.float32)
    fresh = {name: getattr(pipeline, name).to(device).eval() for name in adapter.components}
    return _check(pipeline, path, adapter, fresh, outputs, info)


def _measure(parts: Mapping[str, Any], adapter: Adapter, info: BaseInfo) -> dict[str, _Outputs]:
    """Runs each part without the adapter and with it, at a strength that rounding does not hide."""
    outputs = {}
    for name, part in parts.items():
        base, strength = _run(name, part, info), 1.0
        eps = torch.finfo(next(part.parameters()).dtype).eps
        visible = min(MAX_CHANGE, VISIBLE_CHANGE * eps) * _size(base)
        # The effect of a strength that is far too small is mostly rounding, hence the repetition.
        for _ in range(MAX_TRIES):
            with mounted(parts, [(adapter, strength)]):
                outputs[name] = _Outputs(base, _run(name, part, info), strength)
            effect = _size(outputs[name].trained - base)
            if effect >= 0.8 * visible:
                break
            # Rounding may hide a weak one altogether.
            strength *= visible / effect if effect else LARGE_STEP
    return outputs


def _check(
    pipeline: Any,
    path: Path,
    adapter: Adapter,
    parts: Mapping[str, Any],
    outputs: Mapping[str, _Outputs],
    info: BaseInfo,
) -> PostflightReport:
    """Loads one file into a pipeline and compares its modules and outputs with the trained ones."""
    dialect = dialect_of(read_lora_header(path).shapes)
    reader, problems, results = "diffusers", [], {}
    if any(dialect in module.dialect_notes for module in adapter.modules.values()):
        reader, read = "sdlora", load_adapter(path)
        loaded = read.modules
        for name, part in parts.items():
            with mounted(parts, [(read, outputs[name].strength)]):
                results[name] = _run(name, part, info)
    else:
        problems = _load(pipeline, path, list(parts))
        loaded = _loaded_modules(parts)
        for name, part in parts.items():
            _set_strength(part, outputs[name].strength)
            results[name] = _run(name, part, info)
    problems += _compare_modules(adapter, loaded)
    reports = []
    for name, (base, trained, strength) in outputs.items():
        difference, effect = _size(results[name] - trained), _size(trained - base)
        reports.append(PostflightReport(path, len(adapter.modules), difference, effect, strength, reader))
        title = "denoiser" if name == DENOISER else name
        if torch.equal(results[name], base):
            problems.append(f"the output of the {title} is the base's")
        # `not <=`, so that NaN counts as an error.
        elif not difference <= OUTPUT_TOLERANCE * effect:
            change = f"{difference:.2g} off where the LoRA changes it by {effect:.2g}"
            problems.append(f"the {title}'s output is {change}")
    if problems:
        raise _failure(path, "; ".join(problems))
    return reports[0]


def _failure(path: Path, reasons: str) -> AdapterError:
    problem = f"{path} does not reproduce the trained model in diffusers: {reasons}"
    return AdapterError(problem, key="export.proof", exit_code=1)


def _hide_quantized_convolutions(model: Model) -> None:
    """Replaces them by plain ones with their output: PEFT makes its own layers of the type that it wraps."""
    plain: dict[str, nn.Module] = {}
    for name, layer in named_modules(model):
        if isinstance(layer, nn.Conv2d) and type(layer) is not nn.Conv2d:
            sizes: Any = {name: getattr(layer, name) for name in CONV_SETTINGS}
            own: Any = nn.Conv2d(**sizes, bias=False, device="meta")
            own.weight, own.bias, own.forward = layer.weight, layer.bias, layer.forward
            plain[name] = own
    replace_modules(model, plain)


@contextmanager
def _restored(parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Restores the modules of networks, and removes the attributes that diffusers and PEFT add."""
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
        if strength != 1 and isinstance(getattr(layer, "lora_A", None), nn.ModuleDict):
            layer.set_scale(_CHECK_NAME, strength)


@torch.no_grad()
def _run(name: str, part: Any, info: BaseInfo) -> Tensor:
    """The output of a part (a text encoder: its states) for a fixed input, fp32, on the CPU."""
    if name == DENOISER:
        base = wrap_denoiser(info, part)
        return base.denoise(*base.example_inputs()).cpu()
    config = part.config
    tokens = torch.linspace(1, config.vocab_size - 1, config.max_position_embeddings).long()
    tokens[-1] = config.eos_token_id
    states: Tensor = part(tokens[None].to(part.device))[0]
    return states.float().cpu()


def _load(pipeline: Any, path: Path, parts: Sequence[str]) -> list[str]:
    """Loads a file as a user does; returns the complaints of the libraries."""
    with _captured() as complaints, quiet(warnings=True):
        try:
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=_CHECK_NAME)
        except Exception as error:
            return [f"it does not load ({first_line(error)})"]
    # Always logged about a part that a LoRA does not change.
    expected = re.compile(r"No LoRA keys associated to .*prefix='(\w+)'")
    heard = [(line, expected.match(line)) for line in complaints if _ABOUT_KEYS.search(line)]
    return [line for line, match in heard if not match or match[1] in parts]


@contextmanager
def _captured() -> Iterator[list[str]]:
    """Collects the first lines of diffusers' and PEFT's warnings instead of printing them."""
    lines: list[str] = []
    records, logger = BufferingHandler(capacity=10_000), logging.getLogger("diffusers")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [records], False
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield lines
        lines += [first_line(record.getMessage()) for record in records.buffer]
        kinds = (RuntimeWarning, UserWarning)
        lines += [first_line(item.message) for item in caught if issubclass(item.category, kinds)]
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def _compare_modules(adapter: Adapter, loaded: Mapping[str, AdapterModule]) -> list[str]:
    """Problems if a file does not have the trained modules, each with the trained change."""
    problems = []
    if missing := sorted(set(adapter.modules) - set(loaded)):
        problems.append(f"{len(missing)} trained modules are missing ({join_names(missing)})")
    if unexpected := sorted(set(loaded) - set(adapter.modules)):
        problems.append(f"{len(unexpected)} modules were not trained ({join_names(unexpected)})")
    trained = fold(adapter).modules
    norms = {name: module.norm_squared() for name, module in trained.items()}
    typical = sum(norms.values()) / len(norms)
    # `not <=`, so that NaN counts as an error; a tiny module is measured by the typical norm.
    wrong = [
        name
        for name, module in loaded.items()
        if (own := trained.get(name))
        and not (
            module.kind == own.kind
            and own.distance_squared(module) <= MODULE_TOLERANCE**2 * max(norms[name], typical)
        )
    ]
    if wrong:
        problems.append(f"{len(wrong)} modules change differently than trained ({join_names(wrong)})")
    return problems


def _loaded_modules(parts: Mapping[str, nn.Module]) -> Mapping[str, AdapterModule]:
    """The modules of PEFT's layers, scale folded."""
    state: dict[str, Tensor] = {}
    for name, module in named_modules(parts):
        layer: Any = module
        if _CHECK_NAME not in getattr(layer, "scaling", ()):
            continue
        for attribute, holder in layer.named_children():
            if attribute.startswith("lora_") and _CHECK_NAME in holder:
                for key, value in holder[_CHECK_NAME].named_parameters():
                    state[f"{name}.{attribute}.{key}"] = value.detach()
        state[f"{name}.alpha"] = torch.tensor(float(layer.scaling[_CHECK_NAME] * layer.r[_CHECK_NAME]))
    return state_to_adapter(state).modules if state else {}


def _size(values: Tensor) -> float:
    """Root mean square."""
    return float(values.double().square().mean().sqrt())
