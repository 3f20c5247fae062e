"""An adapter as plain data: modules by name, with rank, alpha and family. R rank."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sdlora.errors import AdapterError
from sdlora.lora.dora import Dora
from sdlora.lora.kinds import AdapterModule, LowRank
from sdlora.lora.layers import DENOISER, LAYERS_PER_BLOCK, Model, carrier_layers, component_of, components
from sdlora.notebook import show_html
from sdlora.seeds import name_seed

Init = Literal["gaussian", "kaiming", "orthogonal"]
KINDS: dict[str, type[AdapterModule]] = {cls.kind: cls for cls in (LowRank, Dora)}
"""Adapter kinds by their names in `lora.kind`."""


@dataclass
class Adapter:
    """The content of a LoRA file, or the modules in training.

    Files are read with the scale folded into `up`, so that `alpha == rank` and every scale is 1; in training,
    modules may differ in rank, alpha and scale.
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
        sizes = f"{len(self.modules)} modules, rank {self.rank}, alpha {self.alpha:g}"
        return f"Adapter({sizes}, family {self.family!r})"

    def _repr_html_(self) -> str:
        notes = (f"{key} {value}" for key, value in sorted(self.notes.items()) if len(value) < 80)
        return show_html(repr(self), [f"{self.num_parameters:,} parameters", *notes])

    @property
    def components(self) -> list[str]:
        """The components of a base that it changes, by their names in files."""
        return list(dict.fromkeys(map(component_of, self.modules)))

    @property
    def changes_text(self) -> bool:
        """Whether it changes a text encoder, so that text states depend on its strength."""
        return self.components not in ([], [DENOISER])

    @property
    def trained_on(self) -> str:
        """The name of its base, if the file has it."""
        return self.notes.get("sdlora.base_name") or self.notes.get("ss_sd_model_name") or ""

    @property
    def scale(self) -> float:
        """alpha / rank: the factor of `up @ down`."""
        return self.alpha / self.rank

    def scale_of(self, name: str) -> float:
        return self.scales.get(name, self.scale)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its tensors; fp32 if they differ."""
        dtypes = {tensor.dtype for tensor in self.parameters()}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.parameters())

    def parameters(self) -> list[Tensor]:
        """What is trained, in the order of `named_tensors`."""
        return list(self.named_tensors().values())

    def named_tensors(self) -> dict[str, Tensor]:
        """All tensors by module and part, such as `mid_block.attentions.0.proj_in.down`."""
        return {
            f"{name}.{part}": tensor
            for name, module in self.modules.items()
            for part, tensor in module.tensors().items()
        }

    def without(self, start: str | None) -> Adapter:
        """The adapter without the modules whose names start with this."""
        kept = {name: one for name, one in self.modules.items() if not (start and name.startswith(start))}
        return replace(self, modules=kept)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Adapter:
        """A copy that shares nothing with this one and needs no gradient."""
        modules = {
            name: module.map(lambda tensor: tensor.detach().to(device, dtype, copy=True))
            for name, module in self.modules.items()
        }
        return replace(self, modules=modules, notes=dict(self.notes), scales=dict(self.scales))


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

    The draw of `down` depends on the seed and the module's name alone, not on the order of the modules or the
    ambient generator. The factor of each module is its scale; only the layers' sizes and device are read.
    """
    layers = carrier_layers(model)
    modules: dict[str, AdapterModule] = {}
    for name, rank in ranks.items():
        generator = torch.Generator().manual_seed(name_seed(f"{seed}/adapter/{name}"))
        drawn = KINDS[kind].draw(layers[name], rank, partial(_draw_down, init=init, generator=generator))
        modules[name] = drawn.to(next(layers[name].parameters()).device).map(nn.Parameter)
    rank = max(ranks.values())
    common = Counter(scales.values()).most_common(1)[0][0]
    adapter = Adapter(modules, rank, common * rank)
    adapter.scales = {name: scale for name, scale in scales.items() if scale != adapter.scale}
    return adapter


def for_family(adapter: Adapter, family: str, model: Model) -> Adapter:
    """An adapter whose files name the family of its base, and what kohya's names need of a slim SDXL."""
    config: Any = getattr(components(model).get(DENOISER), "config", None)
    layers = getattr(config, "layers_per_block", LAYERS_PER_BLOCK)
    is_slim = family == "sdxl" and layers != LAYERS_PER_BLOCK
    notes = {"sdlora.layers_per_block": str(layers)} if is_slim else {}
    return replace(adapter, family=family, notes=adapter.notes | notes)


def _draw_down(shape: Sequence[int], init: Init, generator: torch.Generator) -> Tensor:
    """A down matrix of shape (R, in) or (R, in, kh, kw), fp32.

    `gaussian` has standard deviation 1 / R: the first AdamW steps move every element of `up` by the learning
    rate, so that the change of the output, a sum over R terms, does not grow with the rank.
    `orthogonal` has orthogonal rows of the same size (for R above the number of inputs, columns). `kaiming`
    is uniform in +-1 / sqrt(inputs) for every rank, as in the LoRA paper's code and PEFT's default.
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


def low_rank_modules(adapter: Adapter, action: str) -> dict[str, LowRank]:
    """The modules of an adapter whose changes can be added and decomposed; an AdapterError for other kinds.

    The action, such as "resize", begins the message.
    """
    found = {name: m for name, m in adapter.modules.items() if isinstance(m, LowRank) and m.is_additive}
    if other := next((one.kind for name, one in adapter.modules.items() if name not in found), None):
        raise AdapterError(
            f"{action} supports LoRA modules only: a {other} module depends on the base weight, so it "
            "cannot be added or decomposed; train with lora.kind=lora",
            key="lora.kind",
        )
    return found


def check_base(adapter: Adapter, *, family: str, name: str, digest: str = "", source: str = "") -> str | None:
    """Compares an adapter's base with the base in use; `source` names the adapter in messages.

    Returns a warning if it is another base of the same family, by the digest of its weights. Raises an
    AdapterError if it is another family.
    """
    title, trained_on = source or "the LoRA", adapter.trained_on or "another base"
    if adapter.family and family and adapter.family != family:
        raise AdapterError(
            f"{title} is for family {adapter.family} (trained on {trained_on}), but base {name} is {family}; "
            f"pass a base of family {adapter.family} with --base",
            key="lora.family",
        )
    known = adapter.notes.get("sdlora.base_digest")
    if not known or not digest or known == digest:
        return None
    return (
        f"{title} was trained on {trained_on}, not on {name}; it is the same family, so it works, but "
        "images may look different"
    )


class NormReport(NamedTuple):
    """The norms of the modules' changes, after they were limited."""

    num_limited: int
    mean: float
    largest: float


@torch.no_grad()
def limit_norms(adapter: Adapter, max_norm: float) -> NormReport:
    """Shrinks modules whose change has a larger Frobenius norm, in place, as kohya's tools do."""
    before = torch.stack(
        [module.limit_norm(max_norm, adapter.scale_of(name)) for name, module in adapter.modules.items()]
    )
    after = before.clamp(max=max_norm)
    return NormReport(int((before > max_norm).sum()), float(after.mean()), float(after.max()))
