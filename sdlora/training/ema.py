"""The moving average of the trained values: what a run gives away where `train.ema_decay` is on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class EMA:
    """An exponential moving average of tensors, of their updated values alone.

    After t updates the value of i updates ago has the weight `decay**i (1 - decay) / (1 - decay**t)`: the
    correction of Adam (Kingma and Ba 2015, 1412.6980, section 3), so that the start, which was not learnt,
    has none, and a short run is averaged over all of it.

    Args:
        tensors: What is averaged, by name.
        decay: Weight of the average against the newest value.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.trained = tensors
        self.values = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the tensors' new values in."""
        self.num_updates += 1
        weight = (1 - self.decay) / (1 - self.decay**self.num_updates)
        torch._foreach_lerp_(list(self.values.values()), list(self.trained.values()), weight)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Gives the tensors their average for a while; afterwards they are what they were, to the bit."""
        with kept(list(self.trained.values())):
            for name, tensor in self.trained.items():
                tensor.data.copy_(self.values[name])
            yield

    def restore(self, values: Mapping[str, Tensor], num_updates: int) -> None:
        """Goes on from a checkpoint."""
        self.num_updates = num_updates
        for name, value in self.values.items():
            value.copy_(values[name])


@contextmanager
def kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Puts tensors back afterwards, to the bit."""
    copies = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.data.copy_(copy)
