"""Which layers of a network carry adapters, of which rank, and putting adapters on and taking them off."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from torch import nn

from sdlora.config import LoraSection
from sdlora.errors import MAX_PROBLEMS, AdapterError, ConfigError, join_names, shorten
from sdlora.lora.adapter import KINDS, Adapter
from sdlora.lora.kinds import AdapterModule, Layer, Scale, features_of
from sdlora.lora.layers import (
    DENOISER,
    Dropout,
    LoraLayer,
    Model,
    StackEntry,
    carrier_layers,
    carriers,
    component_of,
    components,
    lora_layers,
    named_modules,
    replace_modules,
    unwrap,
)

_ATTENTION = ("*attn[12].to_[qkv]", "*attn[12].to_out.0")
_FEED_FORWARD = ("*ff.net.0.proj", "*ff.net.2")
_PROJECTIONS = ("*attentions.*.proj_in", "*attentions.*.proj_out")
_CONVOLUTIONS = (
    "*resnets.*.conv[12]",
    "*resnets.*.conv_shortcut",
    "*downsamplers.*.conv",
    "*upsamplers.*.conv",
)
TARGETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention+feedforward": (*_ATTENTION, *_FEED_FORWARD),
    "all-linear": (*_ATTENTION, *_FEED_FORWARD, *_PROJECTIONS),
    "all": (*_ATTENTION, *_FEED_FORWARD, *_PROJECTIONS, *_CONVOLUTIONS, "*resnets.*.time_emb_proj"),
    "style-only": tuple(f"up_blocks.0.attentions.1.{pattern}" for pattern in _ATTENTION),
    "feed_forward": _FEED_FORWARD,
    "projections": _PROJECTIONS,
    "convolutions": _CONVOLUTIONS,
    "text_attention": ("text_encoder*.self_attn.[qkv]_proj", "text_encoder*.self_attn.out_proj"),
    "text_mlp": ("text_encoder*.mlp.fc[12]",),
}
"""Named targets, with their patterns on module names.

kohya's tools adapt `all-linear` by default, and `all` with `conv_dim`. `style-only` is the block of SDXL that
carries style (B-LoRA, arXiv 2403.14572).
"""


def match_targets(model: Model, targets: Sequence[str]) -> list[str]:
    """The names of the modules that match names from `TARGETS`, or patterns, in the order of the network.

    Raises a ConfigError with one line for each target that matches nothing. The model may be on the meta
    device.
    """
    layers = list(carrier_layers(model))
    shown = shorten(repr(list(targets)))
    problems: list[str] = []
    chosen: set[str] = set()
    for target in targets:
        if found := match_names(layers, target):
            chosen.update(found)
        else:
            explained = _explain(model, layers, target)
            problems.append(f"lora.targets = {shown}: {shorten(repr(target))} {explained}")
        if len(problems) > MAX_PROBLEMS:
            break
    if problems:
        raise ConfigError(*problems)
    return [name for name in layers if name in chosen]


def match_names(names: Iterable[str], target: str) -> list[str]:
    """The names that match a target of `TARGETS`, or a pattern."""
    patterns = TARGETS.get(target, (target,))
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def match_modules(model: Model, targets: Sequence[str]) -> list[str]:
    """As `match_targets`, with modules in every component.

    If no target is in a text encoder, its attention is added, and its MLPs if the denoiser's feed-forward
    layers are targets.
    """
    names = match_targets(model, targets)
    if len(components(model)) == 1 or any(component_of(name) != DENOISER for name in names):
        return names
    wide = any(match_names(names, "feed_forward"))
    return names + match_targets(model, ["text_attention", *(["text_mlp"] if wide else [])])


def _explain(model: Model, layers: Sequence[str], target: str) -> str:
    """Why a target matches nothing, and what was probably meant."""
    if target == "style-only":
        return "needs SDXL's style block, up_blocks.0.attentions.1; use attention"
    others = [name for name, _ in named_modules(model) if name and fnmatch.fnmatchcase(name, target)]
    reason = f"matches only {others[0]}, no Linear or Conv2d" if others else "matches no Linear or Conv2d"
    if target.startswith("text_") and "text_encoder" not in components(model):
        return f"{reason}; it is for text encoders; set lora.text_encoder=true, or remove it"
    if presets := difflib.get_close_matches(target, list(TARGETS), 1, 0.6):
        return f"{reason}; did you mean {presets[0]}?"
    if any(fnmatch.fnmatchcase(name, f"*.{target}") for name in layers):
        return f"{reason}; did you mean '*.{target}'?"
    if nearest := difflib.get_close_matches(target.strip("*."), layers, 2, 0.3):
        return f"{reason}; the nearest modules are {', '.join(nearest)}"
    return f"{reason}; use {', '.join(TARGETS)} or a pattern such as *.attn2.to_v"


def count_parameters(model: Model, ranks: Mapping[str, int], kind: str = "lora") -> int:
    """Elements that an adapter with these ranks has, by module; works on the meta device."""
    return sum(map(prod, tensor_shapes(model, ranks, kind).values()))


def tensor_shapes(model: Model, ranks: Mapping[str, int], kind: str = "lora") -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of such an adapter, by `MODULE.PART`."""
    layers = carrier_layers(model)
    return {
        f"{name}.{part}": shape
        for name, rank in ranks.items()
        for part, shape in KINDS[kind].shapes(layers[name], rank).items()
    }


def mount(model: Model, adapters: Sequence[tuple[Adapter, Scale]], dropout: Dropout | None = None) -> None:
    """Puts adapters on a network, and removes those mounted before; nothing changes if one does not fit.

    Args:
        model: The network, or components by name; layers are wrapped where needed.
        adapters: (adapter, strength) in the order of the stack; a strength may be (B,), one for each sample.
        dropout: For the modules that are trained.

    Raises:
        AdapterError: If an adapter has modules or shapes that this network does not have.
    """
    places = carriers(model)
    layers = {name: unwrap(module) for name, module in places.items()}
    stacks: dict[str, list[StackEntry]] = {}
    for adapter, strength in adapters:
        check_fit(adapter, layers)
        for name, module in adapter.modules.items():
            scale = strength * adapter.scale_of(name)
            if module.starting_at_zero.requires_grad:
                entry = StackEntry(module, scale, dropout.of_module(name) if dropout else None)
            else:
                entry = StackEntry(for_layer(module, layers[name]).to(layers[name].weight.device), scale)
            stacks.setdefault(name, []).append(entry)
    if new := {name: LoraLayer(layers[name]) for name in stacks if places[name] is layers[name]}:
        replace_modules(model, new)
    for name, layer in (places | new).items():
        if isinstance(layer, LoraLayer):
            layer.stack = tuple(stacks.get(name, ()))


def for_layer(module: AdapterModule, layer: Layer) -> AdapterModule:
    """A module with the kernel of a layer: other programs write 1x1 convolutions for linear projections."""
    return module.with_kernel(isinstance(layer, nn.Conv2d))


def detach(model: Model) -> None:
    """Puts the original modules back."""
    replace_modules(model, {name: layer.base for name, layer in lora_layers(model).items()})


@contextmanager
def unwrapped(model: Model) -> Iterator[None]:
    """Puts the original modules back for a while; afterwards the same wrapped layers are there again."""
    wrapped = lora_layers(model)
    detach(model)
    try:
        yield
    finally:
        replace_modules(model, wrapped)


@contextmanager
def unmounted(layers: Mapping[str, LoraLayer], adapter: Adapter) -> Iterator[None]:
    """Takes one adapter off its layers for a while; what else is mounted stays."""
    before = {name: layers[name].stack for name in adapter.modules}
    try:
        for name, module in adapter.modules.items():
            layers[name].stack = tuple(entry for entry in before[name] if entry.module is not module)
        yield
    finally:
        for name, stack in before.items():
            layers[name].stack = stack


@contextmanager
def mounted(model: Model, adapters: Sequence[tuple[Adapter, Scale]]) -> Iterator[None]:
    """Mounts adapters for a while; afterwards wrapped layers and stacks are as they were.

    Meanwhile all layers are fused, whatever training chose: a run samples as any other program.
    """
    before = {name: (layer.stack, layer.is_fused) for name, layer in lora_layers(model).items()}
    try:
        mount(model, adapters)
        for layer in lora_layers(model).values():
            layer.is_fused = True
        yield
    finally:
        layers = lora_layers(model)
        for name, (stack, is_fused) in before.items():
            layers[name].stack, layers[name].is_fused = stack, is_fused
        replace_modules(model, {name: layer.base for name, layer in layers.items() if name not in before})


def check_fit(adapter: Adapter, layers: Mapping[str, Layer], source: str = "the LoRA") -> None:
    """Checks that an adapter can be mounted on layers from `carrier_layers`, which may be on the meta device.

    Raises an AdapterError if it is for another network, or for more components than these; `source` names the
    adapter in messages.
    """
    remedy = "use a base of the family it was trained on"
    remedy += f" (it was trained on {adapter.trained_on})" if adapter.trained_on else ""
    if missing := [name for name in adapter.modules if name not in layers]:
        if any(f"{name}.base_layer" in layers for name in missing):
            problem = "the pipeline has LoRAs loaded by diffusers; first call pipe.unload_lora_weights()"
            raise AdapterError(problem, key="lora.loaded-by-diffusers")
        parts = list(dict.fromkeys(map(component_of, layers)))
        if absent := [component_of(name) for name in missing if component_of(name) not in parts]:
            raise AdapterError(
                f"{source} changes {absent.count(absent[0])} modules of {absent[0]}, but only the "
                f"{' and '.join(parts)} can be used here; load it with diffusers, or train one without "
                "text encoders",
                key="lora.components",
            )
        count = f"{len(missing)} of its {len(adapter.modules)} modules"
        raise AdapterError(
            f"{source} does not fit this base: {count} do not exist there, such as {join_names(missing, 3)}; "
            f"{remedy}",
            key="lora.other-base",
        )
    for name, module in adapter.modules.items():
        if not for_layer(module, layers[name]).fits_layer(layers[name]):
            own, theirs = module.features, features_of(layers[name])
            raise AdapterError(
                f"{source} does not fit this base: {name} maps {own[0]} to {own[1]} features in the LoRA, "
                f"but {theirs[0]} to {theirs[1]} in the base; {remedy}",
                key="lora.other-base",
            )


Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Layout:
    """Ranks and alphas by module, in the order of the network, and the adapter kind.

    With `rslora`, scales are `alpha / sqrt(rank)` (rank-stabilised LoRA, arXiv 2312.03732, equation 4) in
    place of `alpha / rank`.
    """

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    rslora: bool = False
    kind: str = "lora"

    def scales(self) -> dict[str, float]:
        return {
            name: self.alphas[name] / (math.sqrt(rank) if self.rslora else rank)
            for name, rank in self.ranks.items()
        }

    def describe(self) -> str:
        """For the plan: `rank 16, alpha 16, scale 1`."""
        scales = list(self.scales().values())
        same = all(self.alphas[name] == rank for name, rank in self.ranks.items())
        alpha = "= rank" if same and len(set(self.ranks.values())) > 1 else _span(list(self.alphas.values()))
        how = " (alpha / sqrt(rank))" if self.rslora else ""
        kind = "" if self.kind == "lora" else f"{self.kind}, "
        return f"{kind}rank {_counts(list(self.ranks.values()))}, alpha {alpha}, scale {_span(scales)}{how}"


def plan_layout(lora: LoraSection, names: Sequence[str]) -> Layout:
    """The layout of the target modules.

    A module's rank is that of the last match in `lora.rank_pattern`, else `lora.rank`; its alpha that of the
    last match in `lora.alpha_pattern`, else `lora.alpha`, else its rank. Raises a ConfigError with one line
    for each pattern that matches no target module.
    """
    problems: list[str] = []
    ranks = dict.fromkeys(names, lora.rank) | _by_pattern("rank_pattern", lora.rank_pattern, names, problems)
    alphas = {name: float(rank if lora.alpha is None else lora.alpha) for name, rank in ranks.items()}
    alphas |= _by_pattern("alpha_pattern", lora.alpha_pattern, names, problems)
    if problems:
        raise ConfigError(*problems)
    return Layout(ranks, alphas, lora.rslora, lora.kind)


def _by_pattern(
    key: str, patterns: Mapping[str, Number], names: Sequence[str], problems: list[str]
) -> dict[str, Number]:
    """The number of each module that a pattern matches; a pattern without a match is added to `problems`."""
    numbers: dict[str, Number] = {}
    for pattern, number in patterns.items():
        found = match_names(names, pattern)
        numbers |= dict.fromkeys(found, number)
        if not found:
            problems.append(
                f"lora.{key}: {pattern!r} matches none of the {len(names)} modules of lora.targets, such as "
                f"{names[0]}; use a target such as convolutions or a pattern such as *.attn2.*"
            )
    return numbers


def _counts(ranks: Sequence[int]) -> str:
    """`16`, or `32 (8 modules), 4 (120)`."""
    counts = Counter(ranks).most_common()
    if len(counts) == 1:
        return str(counts[0][0])
    first, *others = [f"{rank} ({count})" for rank, count in counts]
    return ", ".join([first.replace(")", " modules)"), *others])


def _span(numbers: Sequence[float]) -> str:
    """`1`, or `0.5 to 2`."""
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
