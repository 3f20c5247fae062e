"""How many bytes a computation needs at once, found by doing it without numbers, on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(compute: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """The most bytes that were alive at once of all tensors that a computation makes.

    What autograd keeps for a backward pass is alive, and so is what gradient checkpointing makes again.

    Args:
        compute: Works on tensors of any device; on the meta device it takes no memory and hardly any time.
        known: Tensors that are there already, such as weights, and are not counted.
    """
    with _fused_attention(), _LiveBytes(known) as live:
        compute()
    peak: int = live.peak
    return peak


class _LiveBytes(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return made

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention without its matrix of scores, which the meta device would write out and no other does."""
    ours = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        if query.device.type != "meta":
            return ours(query, key, value, *rest, **options)
        answer: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
        return answer

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = ours
