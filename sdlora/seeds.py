"""Every derived random stream: seeds come from what they are for, never from what was drawn before.

| drawn | seed |
|---|---|
| latent, timestep, noise; the adapter's dropout | `derive_seed("sample" or "dropout", seed, step, sample)` |
| noise of the held-out loss | `derive_seed("heldout", image digest, timestep)` |
| noise for the check of the prediction type | `derive_seed("prediction", image digest)` |
| order of an epoch; crop and caption of a sample | `keyed_random(seed, purpose, epoch or sample)` |
| crops and caption variants of an image | `keyed_random(seed, "crop" or "caption", image digest, …)` |
| initial values of a module; its dropout; its mask in DARE | `name_seed(name)` |

Changing one of them changes every run that is repeated or resumed.
"""

from __future__ import annotations

import hashlib
import random


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a purpose and counters."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def name_seed(name: str) -> int:
    """A 63-bit seed from the name of a module."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def keyed_random(*parts: int | str) -> random.Random:
    """Python's generator for a purpose and counters."""
    return random.Random(":".join(map(str, parts)))
