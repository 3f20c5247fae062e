"""Frozen layers that carry a stack of adapter modules.

The modules are not parameters of the layer: moving or casting the network never touches an adapter. The base
weight is never written, so without the stack the base is the same to the bit.
N tokens of all samples, R sum of the ranks of a stack.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdlora.lora.kinds import AdapterModule, Drop, Layer, LowRank, Scale
from sdlora.seeds import name_seed


class StackEntry(NamedTuple):
    module: AdapterModule
    scale: Scale
    drop: Drop | None = None


class Dropout:
    """Dropout of the values between down and up, as a function of sample and module alone.

    Neither the ambient generator nor the number of processes changes it, and gradient checkpointing repeats
    it. It is only on inside `drawn`; values that stay grow by 1 / (1 - share).
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.seeds: tuple[int, ...] = ()

    @contextmanager
    def drawn(self, seeds: Sequence[int]) -> Iterator[None]:
        """Forward and backward passes of a batch: one seed for each of its samples."""
        before, self.seeds = self.seeds, tuple(seeds)
        try:
            yield
        finally:
            self.seeds = before

    def of_module(self, name: str) -> Drop | None:
        """The dropout of a module's values, (B, ...) or (B K, ...) of captions in K parts; None for none."""
        if self.share == 0:
            return None
        key = name_seed(name)

        def drop(values: Tensor) -> Tensor:
            if not self.seeds:
                return values
            parts, rest = divmod(len(values), len(self.seeds))
            assert rest == 0, f"{name} sees {len(values)} values of {len(self.seeds)} samples"
            shape = (parts, *values.shape[1:])
            generators = (torch.Generator(values.device).manual_seed(seed ^ key) for seed in self.seeds)
            noise = [torch.rand(shape, generator=one, device=values.device) for one in generators]
            keep = torch.cat(noise) >= self.share
            return values * keep.to(values.dtype) / (1 - self.share)

        return drop


class Pair(NamedTuple):
    """A low-rank pair with one scale for the whole batch."""

    down: Tensor
    """(r, in), fp32"""
    up: Tensor
    """(out, r), fp32"""
    scale: float


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Sequence[Pair]) -> Tensor:
    """`W x + b + sum of scale * up (down x)`, x (..., in) -> (..., out), in the dtype of x.

    As autograd would compute it, with fewer passes over memory: it keeps x and the product with `down`, adds
    in place, and multiplies all pairs of a stack at once. Only factors and x get gradients (LoRA, arXiv
    2106.09685, equation 3).
    """
    factors = [factor for pair in pairs for factor in (pair.down, pair.up)]
    answer: Tensor = _FusedLinear.apply(x, weight, bias, [pair.scale for pair in pairs], *factors)
    return answer


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scales: list[float], *factors: Tensor
    ) -> Tensor:
        rows = x.flatten(0, -2)
        down = _together([down.to(x.dtype) for down in factors[::2]], 0)
        ups = zip(factors[1::2], scales, strict=True)
        up = _together([(up * scale).to(x.dtype) for up, scale in ups], 1)
        hidden = rows @ down.T  # (N, R)
        y = F.linear(rows, weight, bias).addmm_(hidden, up.T)
        ctx.save_for_backward(rows, hidden, weight, down, up)
        ctx.scales, ctx.shape, ctx.ranks = scales, x.shape, [len(one) for one in factors[::2]]
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        rows, hidden, weight, down, up = ctx.saved_tensors
        gradient = gradient.flatten(0, -2)
        gradient_hidden = gradient @ up  # (N, R)
        gradient_x = None
        if ctx.needs_input_grad[0]:
            gradient_x = (gradient @ weight).addmm_(gradient_hidden, down).view(ctx.shape)
        gradients: list[Tensor | None] = []
        start = 0
        for number, (rank, scale) in enumerate(zip(ctx.ranks, ctx.scales, strict=True)):
            part = slice(start, start + rank)
            start += rank
            if ctx.needs_input_grad[4 + 2 * number]:
                of_down = gradient_hidden[:, part].T @ rows
                of_up = gradient.T @ hidden[:, part]
                gradients += [of_down.float(), of_up.float() * scale]
            else:
                gradients += [None, None]
        return gradient_x, None, None, None, *gradients


def _together(matrices: list[Tensor], dim: int) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim)


class LoraLayer(nn.Module):
    """A frozen layer with a stack. Its state is the layer's: the network is saved and loaded as its base."""

    def __init__(self, base: Layer) -> None:
        super().__init__()
        self.base = base
        self.stack: tuple[StackEntry, ...] = ()
        self.is_fused = False

    @property
    def weight(self) -> Tensor:
        """The base's; diffusers reads a layer's dtype and device from it."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}base.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_fused and (pairs := self._pairs(x)):
            return fused_linear(x, self.base.weight, self.base.bias, pairs)
        y: Tensor = self.base(x)
        for entry in self.stack:
            y = entry.module.apply(x, y, self.base, entry.scale, entry.drop)
        return y

    def _pairs(self, x: Tensor) -> list[Pair]:
        """The stack as pairs; empty if a scale is of samples, or the layer not a plain Linear like x."""
        pairs = [
            Pair(entry.module.down, entry.module.up, entry.scale)
            for entry in self.stack
            if type(entry.module) is LowRank and not isinstance(entry.scale, Tensor) and entry.drop is None
        ]
        is_plain = type(self.base) is nn.Linear and x.dtype == self.base.weight.dtype
        return pairs if is_plain and len(pairs) == len(self.stack) else []


def can_carry(layer: nn.Module) -> bool:
    """Whether a layer is a Linear, or a plain Conv2d with one group."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return isinstance(layer, nn.Linear)


# The component that is trained on, by its name in files.
DENOISER = "unet"
TEXT_ENCODERS = ("text_encoder.", "text_encoder_2.")
LAYERS_PER_BLOCK = 2

Model: TypeAlias = nn.Module | Mapping[str, nn.Module]
"""A denoiser, or components such as `{"unet": …, "text_encoder": …, "text_encoder_2": …}`."""


def components(model: Model) -> dict[str, nn.Module]:
    """The components by name; a module alone is the denoiser."""
    return {DENOISER: model} if isinstance(model, nn.Module) else dict(model)


def named_modules(model: Model) -> Iterator[tuple[str, nn.Module]]:
    """Every module by the name that adapters use, without the insides of wrapped layers."""
    for component, network in components(model).items():
        # torch's own walk is nested generators, several times slower, and a switch of adapters is one walk.
        left: list[tuple[str, nn.Module]] = [("", network)]
        seen: set[nn.Module] = set()
        while left:
            path, module = left.pop()
            if module in seen:
                continue
            seen.add(module)
            yield module_name(component, path), module
            if not isinstance(module, LoraLayer):
                start = f"{path}." if path else ""
                left += [(start + name, child) for name, child in module.named_children()][::-1]


def carriers(model: Model) -> dict[str, nn.Module]:
    """The layers that are wrapped or can be, by name."""
    return {name: m for name, m in named_modules(model) if isinstance(m, LoraLayer) or can_carry(m)}


def carrier_layers(model: Model) -> dict[str, Layer]:
    """The same layers as the base has them."""
    return {name: unwrap(module) for name, module in carriers(model).items()}


def unwrap(module: nn.Module) -> Layer:
    layer = module.base if isinstance(module, LoraLayer) else module
    assert isinstance(layer, nn.Linear | nn.Conv2d), type(layer)
    return layer


def lora_layers(model: Model) -> dict[str, LoraLayer]:
    return {name: m for name, m in named_modules(model) if isinstance(m, LoraLayer)}


def replace_modules(model: Model, modules: Mapping[str, nn.Module]) -> None:
    """Replaces modules by name."""
    for component, network in components(model).items():
        for path, _ in list(network.named_modules()):
            if replacement := modules.get(module_name(component, path)):
                parent, _, child = path.rpartition(".")
                setattr(network.get_submodule(parent), child, replacement)


def module_name(component: str, path: str) -> str:
    """The name that adapters use: the path in the denoiser, else with the component before it."""
    return path if component == DENOISER else with_text_model(f"{component}.{path}")


def component_of(module: str) -> str:
    """The component of a module: `unet`, `text_encoder` or `text_encoder_2`."""
    return next((prefix[:-1] for prefix in TEXT_ENCODERS if module.startswith(prefix)), DENOISER)


def with_text_model(name: str) -> str:
    """A text encoder's module with the level `text_model`, which newer transformers omit and files have."""
    for component in TEXT_ENCODERS:
        if name.startswith(f"{component}encoder."):
            return f"{component}text_model.{name.removeprefix(component)}"
    return name
