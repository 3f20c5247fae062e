"""Saving, loading and describing LoRA files."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from sdlora.errors import AdapterError, ConfigError, one_line, shorten
from sdlora.formats.container import read_tensors, write_tensors
from sdlora.formats.keys import Dialect, dialect_of
from sdlora.formats.read import guess_family, kind_of, module_alphas, split_state, state_to_adapter
from sdlora.formats.write import (
    adapter_to_diffusers,
    adapter_to_kohya,
    fold,
    mixed_rank_metadata,
    padded_ranks,
)
from sdlora.lora.adapter import Adapter
from sdlora.lora.layers import TEXT_ENCODERS
from sdlora.reading import MAX_HEADER_BYTES, Header, UnfitFileError, read_bytes
from sdlora.runs import RunFolder
from sdlora.writing import write_file

ENDING, KOHYA_ENDING = ".safetensors", ".kohya.safetensors"
FOLDER_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")

# Keys that describe the tensors as written; they never survive from one file to the next.
# fmt: off
_STRUCTURAL = frozenset({
    "format", "lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256",
    "ss_network_dim", "ss_network_alpha", "ss_network_module", "ss_network_args", "sdlora.ranks",
})
# fmt: on
_ORIGINAL_SDXL = "https://github.com/Stability-AI/generative-models"


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """What a LoRA file holds, for `sdlora info`."""

    path: Path
    dialect: str
    family: str
    kinds: dict[str, int]
    """Adapter kind to number of modules."""
    ranks: dict[int, int]
    """Rank to number of modules."""
    alphas: dict[float, int]
    """Alpha as a loader sees it (the rank where the file says nothing) to number of modules."""
    trained_alpha: str | None
    targets: dict[str, int]
    """Kind of module, such as `attn2.to_k`, to number of modules."""
    text_encoder_modules: int
    dtypes: tuple[str, ...]
    num_parameters: int
    size_bytes: int
    metadata: dict[str, str]

    @property
    def num_modules(self) -> int:
        """Modules in all."""
        return sum(self.ranks.values())

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks)

    def lines(self) -> list[str]:
        """For people; what the run says of itself comes last."""
        ranks = ", ".join(f"{rank} ({count} modules)" for rank, count in self.ranks.items())
        alphas = ", ".join(f"{alpha:g}" for alpha in self.alphas)
        trained = f"; trained with alpha {self.trained_alpha}" if self.trained_alpha else ""
        targets = ", ".join(f"{kind} {count}" for kind, count in self.targets.items())
        about = {
            "file": f"{self.path} ({self.size_bytes / 1e6:.2f} MB, {', '.join(self.dtypes)})",
            "dialect": self.dialect,
            "family": self.family or "unknown",
            "kind": ", ".join(
                kind if len(self.kinds) == 1 else f"{kind} ({count} modules)"
                for kind, count in self.kinds.items()
            ),
            "rank": ranks,
            "alpha": alphas + trained,
            "targets": f"{targets} ({self.num_parameters:,} parameters)",
        }
        lines = [f"{key:<9} {value}" for key, value in about.items()]
        width = max((len(key) for key in self.metadata), default=0)
        lines += [
            f"  {key:<{width}}  {shorten(' '.join(text.split()))}"
            for key, text in sorted(self.metadata.items())
        ]
        return [one_line(line) for line in lines]


def save_adapter(
    path: str | Path,
    adapter: Adapter,
    *,
    dialect: Dialect = "diffusers",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes an adapter, scale folded, in its own dtype; the same content gives the same bytes.

    Args:
        path: The file; it is complete or not there.
        adapter: Round it first (`formats.round_adapter`) for a smaller file.
        dialect: Whose spelling.
        metadata: What the file says about the run; the adapter's notes if not given. What describes the
            tensors (rank, alpha, hash) is written in any case.

    Raises:
        AdapterError: If a value is not finite, every `up` is zero (R-06), the name does not end in
            .safetensors, or the place cannot be written.
        ConfigError: If the dialect is unknown.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise AdapterError(f"--out {path} must end in .safetensors, which other programs require")
    if dialect not in get_args(Dialect):
        raise ConfigError(f"dialect = {dialect!r} must be one of {', '.join(get_args(Dialect))}")
    _check_values(path, adapter)
    folded = fold(adapter)
    state = adapter_to_kohya(folded) if dialect == "kohya" else adapter_to_diffusers(folded)
    texts = {**_describe(folded, dialect, adapter.notes if metadata is None else metadata)}
    try:
        return write_file(
            path,
            lambda temporary: write_tensors(temporary, state, texts),
            lambda temporary: _verify(temporary, state),
        )
    except OSError as error:
        raise AdapterError(
            f"cannot write LoRA file {path}: {error.strerror or error}; use another path, or free disk space"
        ) from error


def load_adapter(path: str | Path, dtype: torch.dtype | None = torch.float32) -> Adapter:
    """Reads a LoRA file of any dialect, scale folded.

    Args:
        path: The file, or anything else that `resolve_adapter` takes.
        dtype: fp32, or None for the file's own, which leaves a large file on the disk until it is used.

    Raises:
        AdapterError: If it is missing, incomplete, not finite, or something other than a LoRA.
    """
    path = resolve_adapter(path).file
    state, header = read_tensors(path)
    try:
        adapter = state_to_adapter(state, _metadata(path, header), dtype)
    except AdapterError as error:
        raise AdapterError(f"{path} {error}") from None
    broken = _non_finite(adapter)
    if broken:
        raise AdapterError(
            f"{path} has non-finite values in {len(broken)} modules, such as {broken[0]}; the training "
            "run that made it failed, so use an earlier file"
        )
    return adapter


def inspect_adapter(path: str | Path) -> AdapterInfo:
    """Describes a LoRA file as its loader would see it.

    Raises:
        AdapterError: If it is missing, incomplete, or something other than a LoRA.
    """
    path = resolve_adapter(path).file
    state, header = read_tensors(path)
    metadata = _metadata(path, header)
    try:
        dialect = dialect_of(state)
        parts = split_state(state, metadata)
        alphas = module_alphas(parts, metadata)
        family = guess_family(parts, metadata, state)
    except AdapterError as error:
        raise AdapterError(f"{path} {error}") from None
    ranks = {name: int(found["down"].shape[0]) for name, found in parts.items()}
    factors = [tensor for found in parts.values() for part, tensor in found.items() if part != "alpha"]
    return AdapterInfo(
        path=path,
        dialect=dialect,
        family=family,
        kinds=dict(Counter(kind.kind for found in parts.values() if (kind := kind_of(found)))),
        ranks=dict(sorted(Counter(ranks.values()).items())),
        alphas=dict(sorted(Counter(float(alphas[name] or rank) for name, rank in ranks.items()).items())),
        trained_alpha=metadata.get("sdlora.trained_alpha"),
        targets=dict(sorted(Counter(_kind(name) for name in parts).items())),
        text_encoder_modules=sum(name.startswith(TEXT_ENCODERS) for name in parts),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in factors})),
        num_parameters=sum(tensor.numel() for tensor in factors),
        size_bytes=header.num_bytes,
        metadata=header.metadata,
    )


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """A LoRA file, and the run that it was found in if the user named that."""

    file: Path
    run: RunFolder | None = None


def resolve_adapter(source: str | Path | RunFolder, step: int | None = None) -> AdapterSource:
    """Finds the LoRA file that a path stands for.

    Args:
        source: A LoRA file; a run folder; a folder that PEFT or diffusers wrote; or a file without its
            ending, which is how a tree names its nodes.
        step: Step at which a run saved the adapter; its final one if not given.

    Raises:
        AdapterError: If no LoRA file is found.
        RunError: If the run has not saved that adapter.
        ConfigError: If `step` is given with something other than a run.
    """
    path = Path(source)
    candidates = [path, *(Path(f"{path}{ending}") for ending in (ENDING, KOHYA_ENDING))]
    if path.is_dir():
        candidates = [path / name for name in FOLDER_FILES]
    # Whether it is a regular file is checked where it is read: a pipe is named as such.
    file = next((file for file in candidates if file.exists() and not file.is_dir()), None)
    if file is not None:
        if step is not None:
            raise ConfigError(f"--step {step} requires a run folder; {source} is a file", key="option--step")
        return AdapterSource(file)
    run = RunFolder(path)
    if run.exists:
        return AdapterSource(run.adapter if step is None else run.saved_adapter(step), run)
    if (path / "model_index.json").is_file():
        raise AdapterError(f"{path} is a base model, not a LoRA; pass it with --base", key="lora.is-a-base")
    problem = "contains no LoRA file and is not a run folder" if path.is_dir() else "does not exist"
    raise AdapterError(f"{path} {problem}; use a LoRA file, a run folder or a tree node", key="lora.missing")


def _metadata(path: Path, header: Header) -> dict[str, str]:
    """The file's metadata; PEFT keeps alpha in a file beside."""
    metadata = dict(header.metadata)
    config = path.with_name("adapter_config.json")
    if (
        "lora_adapter_metadata" not in metadata
        and path.name == "adapter_model.safetensors"
        and config.is_file()
    ):
        try:
            metadata["lora_adapter_metadata"] = read_bytes(config, MAX_HEADER_BYTES).decode("utf-8")
        except UnfitFileError as error:
            raise AdapterError(f"{config} {error}; download or copy it again") from None
        except (OSError, UnicodeDecodeError) as error:
            raise AdapterError(f"cannot read {config} ({error}); download or copy it again") from None
    return metadata


def _kind(module: str) -> str:
    """`attn2.to_k` for `...transformer_blocks.0.attn2.to_k`: the last names, without counters of blocks."""
    tail = re.split(r"(?:down_blocks|up_blocks|transformer_blocks|attentions|resnets|layers)\.\d+\.", module)[
        -1
    ]
    return f"text encoder {tail}" if module.startswith(TEXT_ENCODERS) else tail


def _describe(folded: Adapter, dialect: Dialect, metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file: the run's words, and what is true of the tensors as written."""
    texts = {key: str(value) for key, value in metadata.items() if key not in _STRUCTURAL}
    rank = str(folded.rank)
    trained = folded.notes.get("sdlora.trained_alpha", f"{folded.alpha:g}")
    texts.setdefault("sdlora.trained_alpha", trained)
    # Of a file that mixes kinds: the one that a reader must know of.
    kind = max((type(module) for module in folded.modules.values()), key=lambda one: len(one.network_args))
    texts |= {
        "format": "pt",
        "ss_network_module": kind.network_module,
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
    }
    kernels = any(tuple(tensor.shape[2:]) not in ((), (1, 1)) for tensor in folded.parameters())
    arguments = {"conv_dim": rank, "conv_alpha": rank} if kernels else {}
    texts["ss_network_args"] = json.dumps({**kind.network_args, **arguments})
    if "modelspec.sai_model_spec" in texts:
        # Whose names the file has.
        original = dialect == "kohya" and folded.family == "sdxl"
        texts["modelspec.implementation"] = _ORIGINAL_SDXL if original else "diffusers"
    if folded.family:
        texts.setdefault("sdlora.family", folded.family)
    if "sdlora.layers_per_block" in folded.notes:
        texts.setdefault("sdlora.layers_per_block", folded.notes["sdlora.layers_per_block"])
    if folded.parent:
        texts.setdefault("sdlora.parent", folded.parent)
    if dialect == "kohya" and (ranks := padded_ranks(folded)):
        texts["sdlora.ranks"] = ranks
    if dialect == "diffusers" and (mixed := mixed_rank_metadata(folded)):
        texts["lora_adapter_metadata"] = mixed
    return texts


def _non_finite(adapter: Adapter) -> list[str]:
    """Modules with a value that is not finite."""
    return [name for name, module in adapter.modules.items() if not module.is_finite]


def _check_values(path: Path, adapter: Adapter) -> None:
    """Refuses what can only be the result of a failed training (R-06)."""
    problem = ""
    if broken := _non_finite(adapter):
        problem = (
            f"values are not finite in {len(broken)} of {len(adapter.modules)} modules, such as {broken[0]}"
        )
    elif not any(bool(module.starting_at_zero.any()) for module in adapter.modules.values()):
        problem = "all up matrices are zero, so it would have no effect; train it first, or use other weights"
    if problem:
        error = AdapterError(f"LoRA file {path} was not written: {problem}")
        error.exit_code = 1
        raise error


def _verify(path: Path, state: Mapping[str, Tensor]) -> None:
    """Reads a file back and compares it to the bit."""
    written, _ = read_tensors(path)
    if set(written) != set(state) or any(not torch.equal(written[key], state[key].cpu()) for key in state):
        error = AdapterError(f"LoRA file {path} differs from what was written; check the disk")
        error.exit_code = 1
        raise error
