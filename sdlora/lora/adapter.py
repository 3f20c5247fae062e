"""A low-rank adapter as plain data: named (down, up) pairs with rank, alpha and family.

R rank; `in` and `out` are the features or channels of the adapted layer, kh and kw its kernel.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdlora.errors import AdapterError
from sdlora.lora.layers import pair_shapes
from sdlora.lora.modules import LAYERS_PER_BLOCK, Model, carrier_layers, component_of, components
from sdlora.seeds import name_seed

Init = Literal["gaussian", "kaiming", "orthogonal"]


@dataclass(slots=True)
class LowRank:
    """The two factors of one module's change: `up @ down`, times the adapter's scale."""

    down: Tensor
    """(R, in), or (R, in, kh, kw) for a convolution."""
    up: Tensor
    """(out, R), or (out, R, 1, 1) for a convolution."""

    @property
    def rank(self) -> int:
        """R of this module."""
        return int(self.down.shape[0])

    def norm_squared(self) -> float:
        """The squared Frobenius norm of `up @ down`, without forming the product."""
        down, up = as_float64(self.down), as_float64(self.up)
        return max(float(((up.T @ up) * (down @ down.T)).sum()), 0.0)

    def minus(self, other: LowRank) -> LowRank:
        """A pair whose product is the difference of the two products; exactly zero for equal pairs."""
        down, up, other_down, other_up = map(as_float64, (self.down, self.up, other.down, other.up))
        rank = max(self.rank, other.rank)
        down, other_down = pad(down, 0, rank), pad(other_down, 0, rank)
        up, other_up = pad(up, 1, rank), pad(other_up, 1, rank)
        return LowRank(torch.cat([down, down - other_down]), torch.cat([up - other_up, other_up], dim=1))


@dataclass
class Adapter:
    """What a LoRA file holds, and what is trained.

    Files are read with the scale folded into `up`, so that `alpha == rank` and every scale is 1; while
    training, modules may differ in rank, alpha and scale.
    """

    modules: dict[str, LowRank]
    """By module name in the UNet; those of text encoders start with `text_encoder.` or `text_encoder_2.`."""
    rank: int
    """The rank of all modules, or the largest where they differ."""
    alpha: float
    family: str = ""
    parent: str | None = None
    notes: dict[str, str] = field(default_factory=dict)
    """The metadata of the file."""
    scales: dict[str, float] = field(default_factory=dict)
    """The factor of modules where it is not `scale`."""

    def __repr__(self) -> str:
        """Without the tensors: a notebook prints what stands last in a cell."""
        return (
            f"Adapter({len(self.modules)} modules, rank {self.rank}, alpha {self.alpha:g}, "
            f"family {self.family!r})"
        )

    @property
    def components(self) -> list[str]:
        """The parts of a base that it changes: `unet`, `text_encoder`, `text_encoder_2`."""
        return list(dict.fromkeys(map(component_of, self.modules)))

    @property
    def changes_text(self) -> bool:
        """Whether it changes a text encoder, so that text states depend on its strength."""
        return self.components not in ([], ["unet"])

    @property
    def scale(self) -> float:
        """The factor on the products of most modules: alpha / rank."""
        return self.alpha / self.rank

    def scale_of(self, name: str) -> float:
        """The factor on the product of a module."""
        return self.scales.get(name, self.scale)

    @property
    def dtype(self) -> torch.dtype:
        """The widest dtype of its tensors."""
        dtypes = {tensor.dtype for tensor in self.parameters()}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    @property
    def num_parameters(self) -> int:
        """Elements in all pairs."""
        return sum(tensor.numel() for tensor in self.parameters())

    def parameters(self) -> list[Tensor]:
        """All tensors, module by module, down before up."""
        return [tensor for pair in self.modules.values() for tensor in (pair.down, pair.up)]

    def without(self, start: str | None) -> Adapter:
        """The adapter without the modules whose names start so; itself if there are none."""
        kept = {name: pair for name, pair in self.modules.items() if not (start and name.startswith(start))}
        return self if len(kept) == len(self.modules) else replace(self, modules=kept)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Adapter:
        """A copy that shares nothing with this one and needs no gradient."""
        modules = {
            name: LowRank(
                pair.down.detach().to(device, dtype, copy=True), pair.up.detach().to(device, dtype, copy=True)
            )
            for name, pair in self.modules.items()
        }
        return replace(self, modules=modules, notes=dict(self.notes), scales=dict(self.scales))

    def trainable(self, device: torch.device | str | None = None) -> Adapter:
        """A copy in fp32 whose tensors are parameters that an optimizer can change (R-06)."""
        copy = self.to(device, torch.float32)
        copy.modules = {
            name: LowRank(nn.Parameter(pair.down), nn.Parameter(pair.up))
            for name, pair in copy.modules.items()
        }
        return copy


def create_adapter(
    model: Model,
    names: Sequence[str],
    rank: int,
    alpha: float,
    *,
    seed: int,
    family: str = "",
) -> Adapter:
    """A fresh trainable adapter of one rank and alpha; see `draw_adapter`.

    Args:
        model: The network, or components by name.
        names: Module names, from `match_targets`.
        rank: R of all modules.
        alpha: The scale is `alpha / rank`.
        seed: The run's seed.
        family: The base's family, kept in the file.
    """
    scales = dict.fromkeys(names, alpha / rank)
    adapter = draw_adapter(model, dict.fromkeys(names, rank), scales, seed=seed, family=family)
    return replace(adapter, alpha=float(alpha), scales={})


def draw_adapter(
    model: Model,
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    *,
    seed: int,
    init: Init = "gaussian",
    family: str = "",
) -> Adapter:
    """A fresh trainable adapter that does not change the model's output yet, since `up` is zero.

    The draw of `down` depends on the seed and the module's name alone, so that neither the order of the
    modules nor the ambient generator matters.

    Args:
        model: The network, or components by name; only the layers' sizes and device are read.
        ranks: R by module name.
        scales: The factor on the product, by module name.
        seed: The run's seed.
        init: How `down` is drawn, see `_draw_down`.
        family: The base's family, kept in the file.
    """
    layers = carrier_layers(model)
    modules: dict[str, LowRank] = {}
    for name, rank in ranks.items():
        down_shape, up_shape = pair_shapes(layers[name], rank)
        generator = torch.Generator().manual_seed(name_seed(f"{seed}/adapter/{name}"))
        down = _draw_down(down_shape, init, generator)
        device = next(layers[name].parameters()).device
        modules[name] = LowRank(
            nn.Parameter(down.to(device)), nn.Parameter(torch.zeros(up_shape, device=device))
        )
    rank = max(ranks.values())
    common = Counter(scales.values()).most_common(1)[0][0]
    adapter = Adapter(modules, rank, common * rank, family)
    adapter.scales = {name: scale for name, scale in scales.items() if scale != adapter.scale}
    if family == "sdxl":
        adapter.notes |= _layers_per_block(model)
    return adapter


def _draw_down(shape: Sequence[int], init: Init, generator: torch.Generator) -> Tensor:
    """A down matrix of shape (R, in) or (R, in, kh, kw), fp32.

    `gaussian` has standard deviation 1 / R: the first AdamW steps move every element of `up` by the learning
    rate whatever its size, so that the change of the output, a sum over R terms, does not grow with the rank
    (R-33). `orthogonal` has rows of the same size that are orthogonal to each other (for R above the number
    of inputs, orthogonal columns). `kaiming` is uniform in +-1 / sqrt(inputs) for every rank, as in the LoRA
    paper's code and PEFT's default.
    """
    rank, inputs = shape[0], math.prod(shape[1:])
    if init == "kaiming":
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(inputs)
    drawn = torch.randn(shape, generator=generator)
    if init == "orthogonal":
        flat = drawn.flatten(1)
        basis: Tensor = torch.linalg.qr(flat).Q if rank > inputs else torch.linalg.qr(flat.T).Q.T
        drawn = (basis * math.sqrt(max(rank, inputs))).reshape(shape)
    return drawn / rank


def _layers_per_block(model: Model) -> dict[str, str]:
    """A note for the names of the kohya format, where a slim UNet has not the usual number."""
    config: Any = getattr(components(model).get("unet"), "config", None)
    layers = getattr(config, "layers_per_block", LAYERS_PER_BLOCK)
    return {} if layers == LAYERS_PER_BLOCK else {"sdlora.layers_per_block": str(layers)}


def check_base(adapter: Adapter, *, family: str, name: str, digest: str = "", source: str = "") -> str | None:
    """Compares the base that an adapter was trained on with the one it shall be used on (R-41).

    Args:
        adapter: As read from a file.
        family: The family of the base in use.
        name: What the base in use is called.
        digest: The hash of its weights, where known.
        source: What to call the adapter in messages, such as its file.

    Returns:
        A line to warn with if it is another base of the same family, else None.

    Raises:
        AdapterError: If it is another family.
    """
    title = source or "the LoRA"
    trained_on = (
        adapter.notes.get("sdlora.base_name") or adapter.notes.get("ss_sd_model_name") or "another base"
    )
    if adapter.family and family and adapter.family != family:
        raise AdapterError(
            f"{title} is for family {adapter.family} (trained on {trained_on}), but base {name} is {family}; "
            f"give a base of family {adapter.family} with --base"
        )
    known = adapter.notes.get("sdlora.base_digest")
    if known and digest and known != digest:
        return (
            f"{title} was trained on {trained_on}, not on {name}; "
            "the same family, so it works, but the look may differ"
        )
    return None


def as_float64(factor: Tensor) -> Tensor:
    """A factor as a matrix in float64, on the CPU: MPS has none."""
    return factor.detach().cpu().double().flatten(1)


def pad(factor: Tensor, dim: int, size: int) -> Tensor:
    """Appends zeros along a dimension up to a size."""
    shape = list(factor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim) if shape[dim] > 0 else factor


@dataclass(frozen=True, slots=True)
class NormReport:
    """The norms of the changes `scale * up @ down`, after they were limited."""

    num_limited: int
    mean: float
    largest: float


@torch.no_grad()
def limit_norms(adapter: Adapter, max_norm: float) -> NormReport:
    """Shrinks the modules whose change has a Frobenius norm above a limit, down to it (as kohya's tools do).

    Both factors of such a module are multiplied by the root of `max_norm / norm`.

    Args:
        adapter: Changed in place.
        max_norm: The limit for each module.
    """
    norms = []
    for name, pair in adapter.modules.items():
        down, up = pair.down.flatten(1), pair.up.flatten(1)
        # The norm of the product from the two Gram matrices, (R, R), without forming it.
        squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
        norm = squared.sqrt() * abs(adapter.scale_of(name))
        factor = (max_norm / norm.clamp(min=max_norm)).sqrt()
        pair.down.mul_(factor)
        pair.up.mul_(factor)
        norms.append(norm)
    before = torch.stack(norms)
    after = before.clamp(max=max_norm)
    return NormReport(int((before > max_norm).sum()), float(after.mean()), float(after.max()))
