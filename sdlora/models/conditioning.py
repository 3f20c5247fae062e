"""What a UNet is told beside noisy latents and timesteps.

B batch, L tokens, D width of the hidden states, P of the pooled ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Condition:
    """Text states, and for SDXL the sizes that its UNet is told (2307.01952, section 2.2).

    Args:
        hidden: (B, L, D), or (L, D) for one caption.
        pooled: (B, P) of SDXL's second text encoder, else None.
        time_ids: (B, 6) for SDXL, else None: original height and width, top and left of the crop, target
            height and width, in pixels.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: int) -> Condition:
        """One caption of a batch."""
        return Condition(
            self.hidden[index],
            None if self.pooled is None else self.pooled[index],
            None if self.time_ids is None else self.time_ids[index],
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
        """The same on a device; the time ids are pixels, and stay exact whatever the dtype."""
        return Condition(
            self.hidden.to(device, dtype),
            None if self.pooled is None else self.pooled.to(device, dtype),
            None if self.time_ids is None else self.time_ids.to(device),
        )

    def with_time_ids(self, time_ids: Tensor) -> Condition:
        """The same text, with sizes."""
        return replace(self, time_ids=time_ids)

    @staticmethod
    def stack(conditions: Sequence[Condition]) -> Condition:
        """A batch of single captions."""
        pooled = [one.pooled for one in conditions if one.pooled is not None]
        time_ids = [one.time_ids for one in conditions if one.time_ids is not None]
        return Condition(
            torch.stack([one.hidden for one in conditions]),
            torch.stack(pooled) if pooled else None,
            torch.stack(time_ids) if time_ids else None,
        )
