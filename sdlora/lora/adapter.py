"""An adapter as plain data: modules by name, with rank, alpha and family. R rank."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdlora.errors import AdapterError
from sdlora.lora.dora import Dora
from sdlora.lora.kinds import AdapterModule, LowRank
from sdlora.lora.layers import DENOISER, LAYERS_PER_BLOCK, Model, carrier_layers, component_of, components
from sdlora.seeds import name_seed

Init = Literal["gaussian", "kaiming", "orthogonal"]


KINDS: dict[str, type[AdapterModule]] = {cls.kind: cls for cls in (LowRank, Dora)}
"""Adapter kinds by the name that `lora.kind` has."""


@dataclass
class Adapter:
    """What a LoRA file holds, and what is trained.

    Files are read with the scale folded into `up`, so that `alpha == rank` and every scale is 1; while
    training, modules may differ in rank, alpha and scale.
    """

    modules: Mapping[str, AdapterModule]
    """By module name; those of text encoders start with `text_encoder.` or `text_encoder_2.`."""
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
        """The components of a base that it changes, by their names in files."""
        return list(dict.fromkeys(map(component_of, self.modules)))

    @property
    def kinds(self) -> dict[str, int]:
        """Kind of module to number of modules."""
        return dict(Counter(module.kind for module in self.modules.values()))

    @property
    def changes_text(self) -> bool:
        """Whether it changes a text encoder, so that text states depend on its strength."""
        return self.components not in ([], [DENOISER])

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
        """All tensors, module by module."""
        return list(self.named_tensors().values())

    def named_tensors(self) -> dict[str, Tensor]:
        """All tensors by module and part, such as `mid_block.attentions.0.proj_in.down`."""
        return {
            f"{name}.{part}": tensor
            for name, module in self.modules.items()
            for part, tensor in module.tensors().items()
        }

    def without(self, start: str | None) -> Adapter:
        """The adapter without the modules whose names start so; itself if there are none."""
        kept = {name: pair for name, pair in self.modules.items() if not (start and name.startswith(start))}
        return self if len(kept) == len(self.modules) else replace(self, modules=kept)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Adapter:
        """A copy that shares nothing with this one and needs no gradient."""
        modules = {
            name: module.map(lambda tensor: tensor.detach().to(device, dtype, copy=True))
            for name, module in self.modules.items()
        }
        return replace(self, modules=modules, notes=dict(self.notes), scales=dict(self.scales))

    def trainable(self, device: torch.device | str | None = None) -> Adapter:
        """A copy in fp32 whose tensors are parameters that an optimizer can change (R-06)."""
        copy = self.to(device, torch.float32)
        return replace(copy, modules={name: one.map(nn.Parameter) for name, one in copy.modules.items()})


def create_adapter(
    model: Model, names: Sequence[str], rank: int, alpha: float, *, seed: int, family: str = ""
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
    adapter = draw_adapter(model, dict.fromkeys(names, rank), scales, seed=seed)
    return for_family(replace(adapter, alpha=float(alpha), scales={}), family, model)


def draw_adapter(
    model: Model,
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    *,
    seed: int,
    init: Init = "gaussian",
    kind: str = "lora",
) -> Adapter:
    """A fresh trainable adapter that does not change the model's output yet.

    The draw of `down` depends on the seed and the module's name alone, so that neither the order of the
    modules nor the ambient generator matters.

    Args:
        model: The network, or components by name; only the layers' sizes and device are read.
        ranks: R by module name.
        scales: The factor on the product, by module name.
        seed: The run's seed.
        init: How `down` is drawn, see `_draw_down`.
        kind: Of `KINDS`.
    """
    layers = carrier_layers(model)
    modules: dict[str, AdapterModule] = {}
    for name, rank in ranks.items():
        generator = torch.Generator().manual_seed(name_seed(f"{seed}/adapter/{name}"))
        drawn = KINDS[kind].draw(
            layers[name], rank, scales[name], partial(_draw_down, init=init, generator=generator)
        )
        device = next(layers[name].parameters()).device
        modules[name] = drawn.to(device).map(nn.Parameter)
    rank = max(ranks.values())
    common = Counter(scales.values()).most_common(1)[0][0]
    adapter = Adapter(modules, rank, common * rank)
    adapter.scales = {name: scale for name, scale in scales.items() if scale != adapter.scale}
    return adapter


def for_family(adapter: Adapter, family: str, model: Model) -> Adapter:
    """An adapter whose files name the family of its base."""
    notes = _layers_per_block(model) if family == "sdxl" else {}
    return replace(adapter, family=family, notes=adapter.notes | notes)


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
    """A note for the names of the kohya format, where a slim denoiser has not the usual number."""
    config: Any = getattr(components(model).get(DENOISER), "config", None)
    layers = getattr(config, "layers_per_block", LAYERS_PER_BLOCK)
    return {} if layers == LAYERS_PER_BLOCK else {"sdlora.layers_per_block": str(layers)}


def low_rank_modules(adapter: Adapter, action: str) -> dict[str, LowRank]:
    """The modules of an adapter whose changes can be added and decomposed.

    Args:
        adapter: Any.
        action: What needs that, such as "resize".

    Raises:
        AdapterError: If a module is of another kind.
    """
    found = {
        name: one for name, one in adapter.modules.items() if isinstance(one, LowRank) and one.is_additive
    }
    if other := next((one.kind for name, one in adapter.modules.items() if name not in found), None):
        raise AdapterError(
            f"{action} takes LoRA modules only: a {other} module depends on the base weight, so it "
            "cannot be added or decomposed; train with lora.kind=lora",
            key="lora.kind",
        )
    return found


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
            f"pass a base of family {adapter.family} with --base",
            key="lora.family",
        )
    known = adapter.notes.get("sdlora.base_digest")
    if known and digest and known != digest:
        return (
            f"{title} was trained on {trained_on}, not on {name}; it is the same family, so it works, but "
            "images may look different"
        )
    return None


@dataclass(frozen=True, slots=True)
class NormReport:
    """The norms of the modules' changes, after they were limited."""

    num_limited: int
    mean: float
    largest: float


@torch.no_grad()
def limit_norms(adapter: Adapter, max_norm: float) -> NormReport:
    """Shrinks the modules whose change has a Frobenius norm above a limit, down to it (as kohya's tools do).

    Args:
        adapter: Changed in place.
        max_norm: The limit for each module.
    """
    before = torch.stack(
        [module.limit_norm(max_norm, adapter.scale_of(name)) for name, module in adapter.modules.items()]
    )
    after = before.clamp(max=max_norm)
    return NormReport(int((before > max_norm).sum()), float(after.mean()), float(after.max()))
