"""DoRA (arXiv 2402.09353): a low-rank pair that turns the rows of a weight, and a magnitude for each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sdlora.errors import AdapterError
from sdlora.lora.kinds import Drop, Layer, LowRank, Scale, as_float64, features_of


@dataclass(slots=True)
class Dora(LowRank):
    """The weight becomes `magnitude * V / |V|` with `V = weight + scale * up @ down` (equation 5).

    The norm is that of each row of V (one output), and a constant to the gradient (section 4.3). As in PEFT,
    the strength is a factor on the pair alone: at strength 0 the rows still have the trained magnitudes, and
    the modules below in a stack are scaled too. LyCORIS files may have magnitudes of columns (one input
    each), which scale the input and nothing below.
    """

    kind = "dora"
    is_additive = False
    file_parts: ClassVar[Sequence[set[str]]] = ({"down", "up", "magnitude"}, {"down", "up", "dora_scale"})
    exact_parts = frozenset({"magnitude"})
    dialect_notes: ClassVar = {
        "kohya": "dora_scale is the DoRA of LyCORIS; diffusers ignores it, so use the diffusers file there; "
        "ComfyUI and Forge divide by the norm of the base weight, which comes close"
    }
    network_module = "lycoris.kohya"
    network_args: ClassVar = {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}
    peft_settings: ClassVar = {"use_dora": True}

    magnitude: Tensor
    """(out,) for rows; (1, in) for columns."""

    @classmethod
    def shapes(cls, layer: Layer, rank: int) -> dict[str, tuple[int, ...]]:
        return {**LowRank.shapes(layer, rank), "magnitude": (features_of(layer)[1],)}

    @classmethod
    def draw(cls, layer: Layer, rank: int, draw_down: Callable[[Sequence[int]], Tensor]) -> Self:
        pair = LowRank.draw(layer, rank, draw_down)
        return cls(pair.down, pair.up, _base_weight(layer).flatten(1).norm(dim=1).cpu())

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor]) -> Self | None:
        down, up = tensors["down"], tensors["up"]
        pair = LowRank.from_file({"down": down, "up": up})
        if pair is None:
            return None
        part = "magnitude" if "magnitude" in tensors else "dora_scale"
        magnitude, (inputs, outputs), ones = tensors[part], pair.features, (1,) * (up.ndim - 2)
        rows = [(outputs,), (1, outputs, *ones)] if part == "magnitude" else [(outputs, 1, *ones)]
        if tuple(magnitude.shape) in rows:
            return cls(down, up, magnitude.flatten())
        is_of_columns = part == "dora_scale" and tuple(magnitude.shape) == (1, inputs, *ones)
        return cls(down, up, magnitude.reshape(1, -1)) if is_of_columns else None

    def to_file(self, dialect: str) -> dict[str, Tensor]:
        magnitude, ones = self.magnitude, (1,) * (self.up.ndim - 2)
        if dialect == "kohya":
            shape = (1, -1, *ones) if self.is_of_columns else (-1, 1, *ones)
            magnitude = magnitude.reshape(shape)
        elif self.is_of_columns:
            raise AdapterError(
                "the DoRA has magnitudes of inputs, as of older LyCORIS, which PEFT and diffusers do not "
                "support; use --format kohya",
                key="export.formats",
            )
        elif ones:
            magnitude = magnitude.reshape(1, -1, *ones)
        return {"down": self.down, "up": self.up, "magnitude": magnitude}

    def fits_layer(self, layer: Layer) -> bool:
        inputs, outputs = features_of(layer)
        expected = (1, inputs) if self.is_of_columns else (outputs,)
        return LowRank(self.down, self.up).fits_layer(layer) and tuple(self.magnitude.shape) == expected

    @property
    def is_of_columns(self) -> bool:
        """Whether each magnitude is that of an input."""
        return self.magnitude.ndim == 2

    def apply(self, x: Tensor, y: Tensor, layer: Layer, scale: Scale, drop: Drop | None) -> Tensor:
        factor = self._factor(_base_weight(layer), scale)
        if isinstance(layer, nn.Conv2d):
            factor = factor.reshape(len(factor), -1, 1, 1)
        elif x.ndim > 2:
            factor = factor.reshape(len(factor), *[1] * (x.ndim - 2), -1)
        if len(factor) > 1:
            factor = factor.repeat(len(x) // len(factor), *[1] * (factor.ndim - 1))
        bias: Tensor | float = 0.0 if layer.bias is None else layer.bias
        if isinstance(bias, Tensor) and isinstance(layer, nn.Conv2d):
            bias = bias.reshape(-1, 1, 1)
        if self.is_of_columns:
            changed: Tensor = layer((x * (factor - 1)).to(x)) - bias
            return y + changed + self.product((x * factor).to(x), layer, scale, drop)
        answer: Tensor = y + (factor - 1) * (y - bias) + factor * self.product(x, layer, scale, drop)
        return answer.to(y)

    def _factor(self, weight: Tensor, scale: Scale) -> Tensor:
        """(1 or B, out or in) magnitudes over norms, in the dtype of a weight."""
        scales = scale.tolist() if isinstance(scale, Tensor) else [scale]
        with torch.no_grad():
            up, down = (factor.to(weight).flatten(1) for factor in (self.up, self.down))
            delta = (up @ down).reshape(weight.shape)
            changed = [weight + one * delta for one in scales]
            rows = [one.transpose(0, 1) if self.is_of_columns else one for one in changed]
            norms = torch.stack([one.flatten(1).norm(dim=1) for one in rows])
        tiny = torch.finfo(weight.dtype).tiny
        factor: Tensor = self.magnitude.to(weight).reshape(1, -1) / norms.clamp(min=tiny)
        return factor

    def delta_weight(self, weight: Tensor, scale: float, total: Tensor) -> Tensor:
        factor = self._factor(weight, scale)[0]
        ones = [1] * (weight.ndim - 2)
        factor = factor.reshape(1, -1, *ones) if self.is_of_columns else factor.reshape(-1, 1, *ones)
        product = (scale * as_float64(self.up) @ as_float64(self.down)).reshape(weight.shape).to(weight)
        below = weight if self.is_of_columns else total
        return (factor - 1) * below + factor * product

    def distance_squared(self, other: Any) -> float:
        """The sum of that of the pairs and that of the magnitudes."""
        if self.magnitude.shape != other.magnitude.shape:
            return float("inf")
        difference = as_float64(self.magnitude[None]) - as_float64(other.magnitude[None])
        return LowRank.distance_squared(self, other) + float(difference.square().sum())


def _base_weight(layer: Layer) -> Tensor:
    """A layer's frozen weight in fp32; raises an AdapterError if it is packed."""
    if not layer.weight.is_floating_point():
        problem = "a DoRA needs the norms of the base weights, which are quantized; set base.quantize=none"
        raise AdapterError(problem, key="base.quantize")
    return layer.weight.detach().float()
