"""Merging adapters into one: their weighted sum, exact or truncated, TIES and DARE.

R rank. TIES and DARE work on single weights: they form the dense change of one module at a time, and return
the nearest pair of a rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sdlora.errors import AdapterError, ConfigError
from sdlora.formats.files import AnyAdapter, open_adapter
from sdlora.lora.adapter import Adapter, low_rank_modules
from sdlora.lora.kinds import LowRank
from sdlora.rank.resize import describe_error
from sdlora.rank.spectrum import decompose, decompose_dense
from sdlora.seeds import name_seed

Method = Literal["concatenate", "svd", "ties", "dare"]
METHODS: tuple[Method, ...] = get_args(Method)
DENSITY = 0.5

# The metadata that also holds for a sum.
_KEPT_NOTES = (
    "sdlora.parent", "sdlora.lineage", "sdlora.family", "sdlora.base_name", "sdlora.base_digest",
    "sdlora.prediction_type", "sdlora.resolution",
    "ss_base_model_version", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_v2",
    "ss_resolution",
    "modelspec.sai_model_spec", "modelspec.architecture", "modelspec.implementation", "modelspec.resolution",
    "modelspec.prediction_type",
)  # fmt: skip


class MergeReport(NamedTuple):
    """The error of a merge at a limited rank.

    `error` is the norm of the difference over the norm of the whole change; `worst` is the module with the
    largest relative error, and that error.
    """

    error: float
    worst: tuple[str, float]

    def lines(self) -> list[str]:
        return [describe_error(*self)]


def merge(
    adapters: Sequence[AnyAdapter | tuple[AnyAdapter, float]],
    method: Method = "concatenate",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> tuple[Adapter, MergeReport | None]:
    """Merges adapters of one family, module by module; they may have different modules.

    Args:
        adapters: Adapters, LoRA files, runs or tree nodes; each alone, or with its weight: (adapter, weight).
        method: `concatenate` is the exact weighted sum, whose rank is the sum of the ranks; `svd` truncates
            it. `ties` keeps the largest elements of each change, elects a sign for each element, and
            averages those that agree (TIES-Merging, arXiv 2306.01708). `dare` drops elements at random and
            rescales the others, so that the expected sum is the same (arXiv 2311.03099).
        rank: Rank of the result, by default the largest of the ranks; not for `concatenate`.
        density: The share of elements that `ties` and `dare` keep, by default 0.5.
        seed: Seed of `dare`, by default 0; a draw also depends on the adapter's position and the module.

    Returns:
        An adapter with alpha == rank, in fp32; and the error if its rank is limited.

    Raises:
        ConfigError: If the settings contradict each other.
        AdapterError: If the adapters do not fit each other, or modules are not low-rank pairs.
    """
    weighted = [one if isinstance(one, tuple) else (one, 1.0) for one in adapters]
    opened = [(open_adapter(source), weight) for source, weight in weighted]
    _check(opened, method, rank=rank, density=density, seed=seed)
    density = DENSITY if density is None else density
    rank = rank or max(adapter.rank for adapter, _ in opened)
    own = [low_rank_modules(adapter, "merge") for adapter, _ in opened]
    modules: dict[str, _Joined] = {}
    for name in dict.fromkeys(name for pairs in own for name in pairs):
        parts = {
            number: _weighted(own[number][name], weight * adapter.scale_of(name))
            for number, (adapter, weight) in enumerate(opened)
            if name in own[number]
        }
        shapes = {(pair.down.shape[1:], pair.up.shape[0]) for pair in parts.values()}
        if len(shapes) > 1:
            raise AdapterError(
                f"the sizes of {name} differ: these LoRAs are of different bases; merge those of one base",
                key="merge.sizes",
            )
        keys = {number: f"{seed or 0}/dare/{number}/{name}" for number in parts}
        modules[name] = _join(method, parts, rank, density, keys)
    first = opened[0][0]
    family = next((adapter.family for adapter, _ in opened if adapter.family), "")
    notes = {key: first.notes[key] for key in _KEPT_NOTES if key in first.notes}
    report = None if method == "concatenate" else _report(modules)
    notes["sdlora.merged"] = json.dumps(_describe(opened, method, density, report), ensure_ascii=False)
    pairs = {name: joined.pair for name, joined in modules.items()}
    total = max(pair.rank for pair in pairs.values())
    return Adapter(pairs, total, float(total), family, first.parent, notes), report


def _check(adapters: Sequence[tuple[Adapter, float]], method: Method, **given: float | None) -> None:
    """Checks the settings, each of which must have an effect, and the adapters."""
    if not adapters:
        raise ConfigError("no LoRA to merge; pass LoRA files or runs", key="merge.no-files")
    if method not in METHODS:
        raise ConfigError(f"method = {method!r} must be one of {', '.join(METHODS)}", key="merge.method")
    uses = {"rank": ("svd", "ties", "dare"), "density": ("ties", "dare"), "seed": ("dare",)}
    for name, value in given.items():
        if value is not None and method not in uses[name]:
            raise ConfigError(
                f"{name} = {value:g} has no effect with method = {method}; remove it, or use method = "
                f"{' or '.join(uses[name])}",
                key="merge.no-effect",
            )
    rank, density = given["rank"], given["density"]
    if rank is not None and rank < 1:
        message = f"rank = {rank:g} must be at least 1; the default is the largest of the LoRAs"
        raise ConfigError(message, key="merge.rank")
    if density is not None and not 0 < density <= 1:
        message = f"density = {density:g} must be above 0 and at most 1, such as {DENSITY}"
        raise ConfigError(message, key="merge.density")
    families = sorted({adapter.family for adapter, _ in adapters if adapter.family})
    if len(families) > 1:
        message = f"the LoRAs are for {' and '.join(families)}; use LoRAs of one family"
        raise AdapterError(message, key="merge.families")
    if len({adapter.parent for adapter, _ in adapters}) > 1:
        message = "the LoRAs have different parents; flatten each with `sdlora tree flatten` first"
        raise AdapterError(message, key="merge.parents")


def _describe(
    adapters: Sequence[tuple[Adapter, float]], method: Method, density: float, report: MergeReport | None
) -> dict[str, object]:
    keys = {"name": "ss_output_name", "hash": "sshs_model_hash"}
    parts = [
        {part: adapter.notes.get(key, "") for part, key in keys.items()} | {"weight": weight}
        for adapter, weight in adapters
    ]
    extra = {"density": density} if method in ("ties", "dare") else {}
    lost = {"error": float(f"{report.error:.2e}")} if report else {}
    return {"method": method, **extra, **lost, "parts": parts}


def _report(modules: Mapping[str, _Joined]) -> MergeReport:
    errors = {name: joined.lost / joined.norm if joined.norm else 0.0 for name, joined in modules.items()}
    worst = max(errors, key=lambda name: errors[name])
    lost = math.hypot(*(joined.lost for joined in modules.values()))
    norm = math.hypot(*(joined.norm for joined in modules.values()))
    return MergeReport(lost / norm if norm else 0.0, (worst, errors[worst]))


def _weighted(pair: LowRank, weight: float) -> LowRank:
    """The pair with a weight inside `up`, in fp32."""
    return LowRank(pair.down.detach().float(), (pair.up.detach().double() * weight).float())


class _Joined(NamedTuple):
    """One module of the result."""

    pair: LowRank
    # Norms of the whole change and of the difference to it, where the rank is limited.
    norm: float = 0.0
    lost: float = 0.0


def _join(
    method: Method, parts: Mapping[int, LowRank], rank: int, density: float, keys: Mapping[int, str]
) -> _Joined:
    """Merges the pairs of one module, by the positions of their adapters."""
    pairs = list(parts.values())
    if method == "concatenate":
        return _Joined(concatenate(pairs))
    if method == "svd":
        whole = decompose(concatenate(pairs))
        return _Joined(whole.truncate(rank), float(whole.values.norm()), float(whole.values[rank:].norm()))
    if method == "ties":
        change = elect_signs([trim(delta(pair), density) for pair in pairs])
    else:
        kept = [drop(delta(pair), density, keys[number]) for number, pair in parts.items()]
        change = torch.stack(kept).sum(0)
    pair = decompose_dense(change, rank, tuple(pairs[0].down.shape[1:])).truncate(rank)
    return _Joined(pair, float(change.norm()), float((change - delta(pair)).norm()))


def concatenate(pairs: Sequence[LowRank]) -> LowRank:
    """The exact sum of products; its rank is the sum of the ranks."""
    return LowRank(torch.cat([pair.down for pair in pairs]), torch.cat([pair.up for pair in pairs], dim=1))


def delta(pair: LowRank) -> Tensor:
    """The dense change of one module: (out, in), or (out, in * kh * kw)."""
    return pair.up.flatten(1) @ pair.down.flatten(1)


def trim(change: Tensor, density: float) -> Tensor:
    """Keeps a share of the elements, the largest in magnitude (TIES-Merging, step 1)."""
    kept = max(1, round(density * change.numel()))
    threshold = change.abs().flatten().kthvalue(change.numel() - kept + 1).values
    return torch.where(change.abs() >= threshold, change, 0)


def elect_signs(changes: Sequence[Tensor]) -> Tensor:
    """Averages the elements that have the sign of their sum (TIES-Merging, steps 2 and 3)."""
    stacked = torch.stack(list(changes))
    agrees = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def drop(change: Tensor, density: float, key: str) -> Tensor:
    """Keeps each element with probability `density`, and divides it by that (DARE)."""
    generator = torch.Generator().manual_seed(name_seed(key))
    kept = torch.rand(change.shape, generator=generator).to(change.device) < density
    return change * kept / density
