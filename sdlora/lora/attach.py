"""Which layers of a network carry adapters, and putting adapters on and taking them off."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

from sdlora.errors import MAX_PROBLEMS, AdapterError, ConfigError, join_names, shorten
from sdlora.lora.adapter import KINDS, Adapter
from sdlora.lora.kinds import Layer, Scale, features_of
from sdlora.lora.layers import (
    DENOISER,
    TEXT_ENCODERS,
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
"""Named targets: each stands for patterns on module names.

`all-linear` is what kohya's tools adapt by default, `all` what they adapt with `conv_dim`. `style-only` is
the block of SDXL that carries style (B-LoRA, arXiv 2403.14572).
"""


def match_targets(model: Model, targets: Sequence[str]) -> list[str]:
    """The names of the target modules, in the order of the network.

    Args:
        model: The network, or components by name; it may lie on the meta device.
        targets: Names from `TARGETS`, or patterns such as `*.attn2.to_v`.

    Raises:
        ConfigError: With one line for each pattern that matches nothing.
    """
    layers = list(carrier_layers(model))
    shown = shorten(repr(list(targets)))
    problems: list[str] = []
    chosen: set[str] = set()
    for target in targets:
        found = match_names(layers, target)
        if not found:
            reason, remedy = _explain(model, layers, target)
            problems.append(f"lora.targets = {shown}: {shorten(repr(target))} {reason}; {remedy}")
        chosen.update(found)
        if len(problems) > MAX_PROBLEMS:
            break
    if problems:
        raise ConfigError(*problems)
    return [name for name in layers if name in chosen]


def match_names(names: Iterable[str], target: str) -> list[str]:
    """The names that a target of `TARGETS`, or a pattern, matches."""
    patterns = TARGETS.get(target, (target,))
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def match_modules(model: Model, targets: Sequence[str]) -> list[str]:
    """As `match_targets`, but every component has modules: text encoders the layers that the denoiser has.

    Args:
        model: Components by name.
        targets: If none of them is in a text encoder, its attention joins, and its MLPs where the denoiser's
            feed-forward layers are targets.
    """
    names = match_targets(model, targets)
    if len(components(model)) == 1 or any(component_of(name) != DENOISER for name in names):
        return names
    wide = any(match_names(names, "feed_forward"))
    return names + match_targets(model, ["text_attention", *(["text_mlp"] if wide else [])])


def _explain(model: Model, layers: Sequence[str], target: str) -> tuple[str, str]:
    """Why a target matches nothing, and what was probably meant."""
    others = [name for name, _ in named_modules(model) if name and fnmatch.fnmatchcase(name, target)]
    reason = f"matches only {others[0]}, no Linear or Conv2d" if others else "matches no Linear or Conv2d"
    if target.startswith("text_") and "text_encoder" not in components(model):
        return reason, "it is for text encoders; set lora.text_encoder=true, or remove it"
    if target == "style-only":
        return "needs SDXL's style block, up_blocks.0.attentions.1", "use attention"
    presets = difflib.get_close_matches(target, list(TARGETS), 1, 0.6)
    endings = [name for name in layers if fnmatch.fnmatchcase(name, f"*.{target}")]
    nearest = difflib.get_close_matches(target.strip("*."), layers, 2, 0.3)
    if presets:
        return reason, f"did you mean {presets[0]}?"
    if endings:
        return reason, f"did you mean '*.{target}'?"
    if nearest:
        return reason, f"the nearest modules are {', '.join(nearest)}"
    return reason, f"use {', '.join(TARGETS)} or a pattern such as *.attn2.to_v"


def count_parameters(model: Model, ranks: Mapping[str, int], kind: str = "lora") -> int:
    """Elements that an adapter with these ranks has, by module; works on the meta device."""
    layers = carrier_layers(model)
    shapes = (KINDS[kind].shapes(layers[name], rank) for name, rank in ranks.items())
    return sum(prod(shape) for own in shapes for shape in own.values())


def attach(model: Model, names: Sequence[str]) -> None:
    """Wraps the named layers, those that are not yet; the output does not change.

    Raises:
        AdapterError: If a name is not a Linear or Conv2d of the model.
    """
    layers = carrier_layers(model)
    if missing := [name for name in names if name not in layers]:
        raise AdapterError(
            f"{len(missing)} of {len(names)} modules are not in this base ({join_names(missing, 3)}); "
            "the LoRA and the base are of different families"
        )
    wrapped = lora_layers(model)
    replace_modules(model, {name: LoraLayer(layers[name]) for name in names if name not in wrapped})


def mount(model: Model, adapters: Sequence[tuple[Adapter, Scale]], dropout: Dropout | None = None) -> None:
    """Puts adapters on a network in place of all those mounted before; nothing changes if one does not fit.

    Args:
        model: The network, or components by name; layers that are not wrapped yet are.
        adapters: (adapter, strength) in the order of the stack; a strength may be (B,), one for each sample.
            None at all leaves the base.
        dropout: For the modules that are trained.

    Raises:
        AdapterError: If an adapter names modules, or has shapes, that this network does not have.
    """
    places, parts = carriers(model), list(components(model))
    layers = {name: unwrap(module) for name, module in places.items()}
    stacks: dict[str, list[StackEntry]] = {}
    for adapter, strength in adapters:
        _check_fit(adapter, layers, parts)
        for name, module in adapter.modules.items():
            scale = strength * adapter.scale_of(name)
            if module.starting_at_zero.requires_grad:
                entry = StackEntry(module, scale, dropout.of_module(name) if dropout else None)
            else:
                weight: Any = layers[name].weight
                entry = StackEntry(module.to(weight.device), scale)
            stacks.setdefault(name, []).append(entry)
    new = {name: LoraLayer(layers[name]) for name in stacks if places[name] is layers[name]}
    if new:
        replace_modules(model, new)
    for name, layer in (places | new).items():
        if isinstance(layer, LoraLayer):
            layer.stack = tuple(stacks.get(name, ()))


def detach(model: Model) -> None:
    """Puts the original modules back."""
    replace_modules(model, {name: layer.base for name, layer in lora_layers(model).items()})


@contextmanager
def unwrapped(model: Model) -> Iterator[None]:
    """Puts the base's own modules back for a while; afterwards the same wrapped layers are there again."""
    wrapped = lora_layers(model)
    detach(model)
    try:
        yield
    finally:
        replace_modules(model, dict(wrapped))


@contextmanager
def mounted(model: Model, adapters: Sequence[tuple[Adapter, Scale]]) -> Iterator[None]:
    """Mounts adapters for a while; afterwards wrapped layers and stacks are as they were."""
    before = {name: layer.stack for name, layer in lora_layers(model).items()}
    try:
        mount(model, adapters)
        yield
    finally:
        layers = lora_layers(model)
        for name, stack in before.items():
            layers[name].stack = stack
        replace_modules(model, {name: layer.base for name, layer in layers.items() if name not in before})


def check_fit(adapter: Adapter, model: Model, source: str = "the LoRA") -> None:
    """Whether an adapter can be mounted.

    Args:
        adapter: The adapter.
        model: The network, or components by name; it may lie on the meta device.
        source: What to call the adapter.

    Raises:
        AdapterError: If it is for another network, or for more components than these.
    """
    _check_fit(adapter, carrier_layers(model), list(components(model)), source)


def _check_fit(
    adapter: Adapter, layers: Mapping[str, Layer], parts: Sequence[str], source: str = "the LoRA"
) -> None:
    trained_on = adapter.notes.get("sdlora.base_name") or adapter.notes.get("ss_sd_model_name")
    origin = f" (it was trained on {trained_on})" if trained_on else ""
    for component in (prefix.removesuffix(".") for prefix in TEXT_ENCODERS):
        texts = [name for name in adapter.modules if name.startswith(f"{component}.")]
        if texts and component not in parts:
            raise AdapterError(
                f"{source} changes {len(texts)} modules of {component}, but only the "
                f"{' and '.join(parts)} can be used here; load it with diffusers, or train one without "
                "text encoders"
            )
    missing = [name for name in adapter.modules if name not in layers]
    if any(f"{name}.base_layer" in layers for name in missing):
        raise AdapterError(
            "the pipeline has LoRAs loaded by diffusers; unload them with pipe.unload_lora_weights() first"
        )
    if missing:
        raise AdapterError(
            f"{source} does not fit this base: {len(missing)} of its {len(adapter.modules)} modules do "
            f"not exist there, such as {join_names(missing, 3)}; use a base of the family it was trained "
            f"on{origin}"
        )
    for name, module in adapter.modules.items():
        if not module.fits_layer(layers[name]):
            (inputs, outputs), (there, then) = module.features, features_of(layers[name])
            raise AdapterError(
                f"{source} does not fit this base: {name} maps {inputs} to {outputs} features in the "
                f"LoRA, but {there} to {then} in the base; use a base of the family it was trained on{origin}"
            )
