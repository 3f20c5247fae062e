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

    The norm is that of each row of V, of one output, and a constant to the gradient (section 4.3). As in
    PEFT, the strength is a factor on the pair alone, so at strength 0 the rows still have the trained
    magnitudes, and what lies below in a stack is scaled too. Files of LyCORIS may hold magnitudes of
    columns, of one input each; then nothing below is scaled, but the input.
    """

    kind = "dora"
    is_additive = False
    exact_parts = frozenset({"magnitude"})
    dialect_notes: ClassVar = {
        "kohya": "dora_scale is LyCORIS' form of a DoRA; diffusers drops it, so its own file is the one for "
        "diffusers, and ComfyUI and Forge divide by the norm of the base weight, which comes close"
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
    def draw(
        cls, layer: Layer, rank: int, scale: float, draw_down: Callable[[Sequence[int]], Tensor]
    ) -> Self:
        pair = LowRank.draw(layer, rank, scale, draw_down)
        return cls(pair.down, pair.up, _base_weight(layer).flatten(1).norm(dim=1).cpu())

    @classmethod
    def file_parts(cls) -> list[set[str]]:
        return [{"down", "up", "magnitude"}, {"down", "up", "dora_scale"}]

    @classmethod
    def fits(cls, tensors: Mapping[str, Tensor]) -> bool:
        if not LowRank.fits(tensors):
            return False
        inputs, outputs = tensors["down"].shape[1], tensors["up"].shape[0]
        ones = (1,) * (tensors["up"].ndim - 2)
        if "magnitude" in tensors:
            return tuple(tensors["magnitude"].shape) in ((outputs,), (1, outputs, *ones))
        return tuple(tensors["dora_scale"].shape) in ((outputs, 1, *ones), (1, inputs, *ones))

    @classmethod
    def from_file(cls, tensors: Mapping[str, Tensor]) -> Self:
        down, up = tensors["down"], tensors["up"]
        if "magnitude" in tensors:
            return cls(down, up, tensors["magnitude"].flatten())
        magnitude = tensors["dora_scale"]
        is_of_rows = magnitude.shape[0] == up.shape[0]
        return cls(down, up, magnitude.flatten() if is_of_rows else magnitude.reshape(1, -1))

    def to_file(self, dialect: str) -> dict[str, Tensor]:
        magnitude, ones = self.magnitude, (1,) * (self.up.ndim - 2)
        if dialect == "kohya":
            shape = (1, -1, *ones) if self.is_of_columns else (-1, 1, *ones)
            magnitude = magnitude.reshape(shape)
        elif self.is_of_columns:
            raise AdapterError(
                "the DoRA has magnitudes of inputs, as older LyCORIS makes them, for which PEFT and "
                "diffusers have no form; use --format kohya",
                key="export.formats",
            )
        elif ones:
            magnitude = magnitude.reshape(1, -1, *ones)
        return {"down": self.down, "up": self.up, "magnitude": magnitude}

    def fits_layer(self, layer: Layer) -> bool:
        inputs, outputs = features_of(layer)
        expected = (1, inputs) if self.is_of_columns else (outputs,)
        pair = LowRank(self.down, self.up)
        return pair.fits_layer(layer) and tuple(self.magnitude.shape) == expected

    @property
    def is_of_columns(self) -> bool:
        """Whether a magnitude is that of an input."""
        return self.magnitude.ndim == 2

    def apply(self, x: Tensor, y: Tensor, layer: Layer, scale: Scale, drop: Drop | None) -> Tensor:
        factor = self._factor(_base_weight(layer), scale)
        if isinstance(layer, nn.Conv2d):
            factor = factor.reshape(len(factor), -1, 1, 1)
        elif x.ndim > 2:
            factor = factor.reshape(len(factor), *[1] * (x.ndim - 2), -1)
        if len(factor) > 1:
            factor = factor.repeat(len(x) // len(factor), *[1] * (factor.ndim - 1))
        bias = layer.bias
        if bias is not None and isinstance(layer, nn.Conv2d):
            bias = bias.reshape(-1, 1, 1)
        if self.is_of_columns:
            changed: Tensor = layer((x * (factor - 1)).to(x))
            product = self.product((x * factor).to(x), layer, scale, drop)
            return y + (changed if bias is None else changed - bias) + product
        below = y if bias is None else y - bias
        answer: Tensor = y + (factor - 1) * below + factor * self.product(x, layer, scale, drop)
        return answer.to(y)

    def _factor(self, weight: Tensor, scale: Scale) -> Tensor:
        """(1 or B, out or in) magnitudes over norms, in the dtype of a weight."""
        scales = scale.tolist() if isinstance(scale, Tensor) else [scale]
        with torch.no_grad():
            up, down = (factor.to(weight).flatten(1) for factor in (self.up, self.down))
            delta = (up @ down).reshape(weight.shape)
            norms = torch.stack([self._norm(weight + one * delta) for one in scales])
        factor: Tensor = self.magnitude.to(weight).reshape(1, -1) / norms.clamp(
            min=torch.finfo(weight.dtype).tiny
        )
        return factor

    def _norm(self, weight: Tensor) -> Tensor:
        """Norms of rows or columns."""
        norm: Tensor = (weight.transpose(0, 1) if self.is_of_columns else weight).flatten(1).norm(dim=1)
        return norm

    def delta_weight(self, weight: Tensor, scale: float, total: Tensor) -> Tensor:
        factor = self._factor(weight, scale)[0]
        ones = [1] * (weight.ndim - 2)
        factor = factor.reshape(1, -1, *ones) if self.is_of_columns else factor.reshape(-1, 1, *ones)
        product = (scale * as_float64(self.up) @ as_float64(self.down)).reshape(weight.shape).to(weight)
        below = weight if self.is_of_columns else total
        return (factor - 1) * below + factor * product

    def distance_squared(self, other: Any) -> float:
        """That of the pairs, and of the magnitudes, which a file keeps as they are."""
        if self.magnitude.shape != other.magnitude.shape:
            return float("inf")
        difference = as_float64(self.magnitude[None]) - as_float64(other.magnitude[None])
        return LowRank.distance_squared(self, other) + float(difference.square().sum())


def _base_weight(layer: Layer) -> Tensor:
    """A layer's frozen weight in fp32.

    Raises:
        AdapterError: If it is packed.
    """
    if not layer.weight.is_floating_point():
        raise AdapterError(
            "a DoRA needs the norms of the base weights, which are packed here; set base.quantize=none",
            key="base.quantize",
        )
    return layer.weight.detach().float()
