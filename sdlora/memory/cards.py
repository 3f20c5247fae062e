"""GPUs that a run can be planned for without having one: their memory, and their published speed.

Sources of the speed: NVIDIA's architecture papers (GA102, AD102 and Blackwell for GeForce; GA100, GH100) and
data sheets (T4, V100, L4, L40S).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sdlora.errors import ConfigError, shorten

# Memory in GB, the usual size first, and dense TFLOPS of tensor cores in bf16 with sums in fp32.
CARDS: dict[str, tuple[tuple[int, ...], float]] = {
    "RTX 3060": ((12, 8), 25.5),
    "RTX 3060 Ti": ((8,), 32.4),
    "RTX 3070": ((8,), 40.6),
    "RTX 3080": ((10, 12), 59.5),
    "RTX 3090": ((24,), 71.0),
    "RTX 4060": ((8,), 30.2),
    "RTX 4060 Ti": ((8, 16), 44.1),
    "RTX 4070": ((12,), 58.3),
    "RTX 4070 Ti": ((12,), 80.2),
    "RTX 4070 Ti Super": ((16,), 88.2),
    "RTX 4080": ((16,), 97.5),
    "RTX 4090": ((24,), 165.2),
    "RTX 5070": ((12,), 61.7),
    "RTX 5070 Ti": ((16,), 87.9),
    "RTX 5080": ((16,), 112.6),
    "RTX 5090": ((32,), 209.5),
    "L4": ((24,), 121.0),
    "L40S": ((48,), 362.0),
    "A100": ((40, 80), 312.0),
    "H100": ((80,), 989.0),
}
# Cards without bf16, which train in fp32 unless fp16 is asked for; their TFLOPS are of fp32.
OLDER_CARDS: dict[str, tuple[tuple[int, ...], float]] = {
    "GTX 1080 Ti": ((11,), 11.3),
    "RTX 2060": ((6, 12), 6.5),
    "RTX 2080 Ti": ((11,), 13.4),
    "T4": ((16,), 8.1),
    "V100": ((16, 32), 15.7),
}
NOISE = re.compile(
    "nvidia|geforce|quadro|tesla|generation|[rg]tx|gpu|cuda|pcie|sxm[0-9]?|hbm[0-9]e?|[^a-z0-9]"
)


@dataclass(frozen=True)
class Card:
    """A GPU: its name with its memory, that memory in bytes, and its published FLOP/s, if known."""

    name: str
    num_bytes: int
    has_bf16: bool = True
    flops: float | None = None


def check_device(text: str, *, dry_run: bool) -> None:
    """Raises a ConfigError if a `--device` is not known, or is asked to train."""
    find_card(text)
    if not dry_run:
        problem = f"--device {text} plans for that GPU and uses none; add --dry-run"
        raise ConfigError(f"{problem}, or remove --device to train here", key="option--device.dry-run")


def find_card(text: str) -> Card:
    """The card of a `--device`, such as `RTX 3060 12GB`; `cuda:12GB` is any with that much memory.

    Raises a ConfigError if neither a card nor a size is recognised.
    """
    size = re.search(r"(\d{1,3}) ?gi?b\b", text.lower())
    memory = int(size[1]) if size else 0
    short = NOISE.sub("", text.lower().replace(size[0], " ") if size else text.lower())
    if not short and memory:
        return Card(f"GPU with {memory} GB", memory * 10**9)
    for name, (sizes, tflops) in (CARDS | OLDER_CARDS).items():
        if short == NOISE.sub("", name.lower()):
            num_gb = memory or sizes[0]
            return Card(f"{name} {num_gb}GB", num_gb * 10**9, name in CARDS, tflops * 1e12)
    raise ConfigError(
        f"--device {shorten(text)} is not a known card; use a name such as RTX 3060 12GB, RTX 4090 or "
        "A100 40GB, or the memory alone, such as cuda:12GB",
        key="option--device",
    )
