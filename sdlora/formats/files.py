"""Saving, loading and describing LoRA files."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from sdlora.errors import AdapterError, ConfigError, join_names, one_line, shorten
from sdlora.formats.archives import open_archive
from sdlora.formats.container import read_tensors, write_tensors
from sdlora.formats.hub import fetch_adapter
from sdlora.formats.keys import Dialect, dialect_of
from sdlora.formats.read import guess_family, read_modules, state_to_adapter
from sdlora.formats.write import adapter_to_diffusers, adapter_to_kohya, fold, rank_notes
from sdlora.lora.adapter import Adapter
from sdlora.lora.layers import TEXT_ENCODERS
from sdlora.reading import MAX_HEADER_BYTES, PICKLES, Header, UnfitFileError, read_bytes
from sdlora.runs import RunFolder
from sdlora.writing import write_file

ENDING, KOHYA_ENDING = ".safetensors", ".kohya.safetensors"
PathLike: TypeAlias = str | os.PathLike[str]
AnyAdapter: TypeAlias = Adapter | str | os.PathLike[str]
"""An adapter, a LoRA file of any dialect, a run or a tree node."""
WEIGHTED = re.compile(r"(.+):(-?\d+(?:\.\d*)?|-?\.\d+)", re.DOTALL)
UNKNOWN_ALPHA = "PEFT keeps alpha in adapter_config.json, which is not beside the file"
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
    """The content of a LoRA file, for `sdlora info`.

    Numbers of modules by adapter kind, by rank, by alpha (the rank where the file has none), and by target,
    such as `attn2.to_k`.
    """

    path: Path
    dialect: str
    family: str
    kinds: dict[str, int]
    ranks: dict[int, int]
    alphas: dict[float, int]
    trained_alpha: str | None
    targets: dict[str, int]
    dtypes: tuple[str, ...]
    num_parameters: int
    size_bytes: int
    metadata: dict[str, str]
    alpha_is_unknown: bool = False
    """Whether the file is PEFT's, away from the configuration that holds its alpha; the rank is assumed."""

    @property
    def num_modules(self) -> int:
        return sum(self.ranks.values())

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks)

    def lines(self, *, with_metadata: bool = True) -> list[str]:
        """For people; the metadata comes last, or the most telling of it in one line."""
        kinds = (f"{kind} ({count} modules)" for kind, count in self.kinds.items())
        unknown = f"; assumed: {UNKNOWN_ALPHA}" if self.alpha_is_unknown else ""
        trained = f"; trained with alpha {self.trained_alpha}" if self.trained_alpha else ""
        targets = ", ".join(f"{kind} {count}" for kind, count in self.targets.items())
        about = {
            "file": f"{self.path} ({self.size_bytes / 1e6:.2f} MB, {', '.join(self.dtypes)})",
            "dialect": self.dialect,
            "family": self.family or "unknown",
            "kind": ", ".join(self.kinds if len(self.kinds) == 1 else kinds),
            "rank": ", ".join(f"{rank} ({count} modules)" for rank, count in self.ranks.items()),
            "alpha": ", ".join(f"{alpha:g}" for alpha in self.alphas) + trained + unknown,
            "targets": f"{targets} ({self.num_parameters:,} parameters)",
        }
        lines = [f"{key:<9} {value}" for key, value in about.items()]
        if not with_metadata:
            names = ("modelspec.title", "sdlora.base_name", "sdlora.steps", "modelspec.trigger_phrase")
            known = (
                f"{name.rpartition('.')[2]} {self.metadata[name]}" for name in names if name in self.metadata
            )
            summary = shorten(", ".join(known)) or "nothing about its training"
            lines.append(f"metadata  {summary}; {len(self.metadata)} entries, which -v shows")
            return [one_line(line) for line in lines]
        width = max(map(len, self.metadata), default=0)
        for key, text in sorted(self.metadata.items()):
            lines.append(f"  {key:<{width}}  {shorten(' '.join(text.split()))}")
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
        dialect: The spelling of the keys.
        metadata: About the run; by default the adapter's notes. Rank, alpha and hash are always added.

    Raises:
        AdapterError: If a value is not finite, every `up` is zero, the name does not end in
            .safetensors, or the file cannot be written.
        ConfigError: If the dialect is unknown.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        problem = f"--out {path} must end in .safetensors, which other programs require"
        raise AdapterError(problem, key="option--out")
    if dialect not in get_args(Dialect):
        problem = f"dialect = {dialect!r} must be one of {', '.join(get_args(Dialect))}"
        raise ConfigError(problem, key="dialect")
    _check_values(path, adapter)
    folded = fold(adapter)
    state = adapter_to_kohya(folded) if dialect == "kohya" else adapter_to_diffusers(folded)
    texts = _describe(folded, dialect, adapter.notes if metadata is None else metadata)
    try:
        return write_file(
            path,
            lambda temporary: write_tensors(temporary, state, texts),
            lambda temporary: _verify(temporary, state),
        )
    except OSError as error:
        raise AdapterError(
            f"cannot write LoRA file {path}: {error.strerror or error}; use another path, or free disk space",
            key="write-failed",
        ) from error


def load_adapter(path: PathLike, dtype: torch.dtype | None = torch.float32) -> Adapter:
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
        adapter = state_to_adapter(state, _metadata(path, header, state), dtype)
    except AdapterError as error:
        raise AdapterError(f"{path} {error}", key=error.keys[0]) from None
    if broken := _non_finite(adapter):
        raise AdapterError(
            f"{path} has non-finite values in {len(broken)} modules, such as {broken[0]}; the training "
            "run that made it failed, so use an earlier file",
            key="lora.non-finite",
        )
    return adapter


def open_adapter(source: AnyAdapter) -> Adapter:
    """An adapter as it is, or that of a LoRA file, run or tree node; raises as `load_adapter` does."""
    return source if isinstance(source, Adapter) else load_adapter(source, dtype=None)


def inspect_adapter(path: PathLike) -> AdapterInfo:
    """Describes a LoRA file as its loader would see it; raises an AdapterError as `load_adapter` does."""
    path = resolve_adapter(path).file
    state, header = read_tensors(path)
    metadata = _metadata(path, header, state)
    try:
        dialect = dialect_of(state)
        modules, alphas = read_modules(state, metadata)
        family = guess_family(modules, metadata, state)
    except AdapterError as error:
        raise AdapterError(f"{path} {error}", key=error.keys[0]) from None
    tensors = [tensor for module in modules.values() for tensor in module.tensors().values()]
    seen_alphas = (float(alphas[name] or module.rank) for name, module in modules.items())
    return AdapterInfo(
        path=path,
        dialect=dialect,
        family=family,
        kinds=dict(Counter(module.kind for module in modules.values())),
        ranks=dict(sorted(Counter(module.rank for module in modules.values()).items())),
        alphas=dict(sorted(Counter(seen_alphas).items())),
        trained_alpha=metadata.get("sdlora.trained_alpha"),
        targets=dict(sorted(Counter(map(_target, modules)).items())),
        dtypes=tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})),
        num_parameters=sum(tensor.numel() for tensor in tensors),
        size_bytes=header.num_bytes,
        metadata=header.metadata,
        alpha_is_unknown=dialect == "peft" and not any(alphas.values()),
    )


class AdapterSource(NamedTuple):
    """A LoRA file, and the run that it was found in if the user named that."""

    file: Path
    run: RunFolder | None = None


def resolve_adapter(source: PathLike, step: int | str | None = None) -> AdapterSource:
    """Finds the LoRA file of a path or Hub id.

    That is a file; a run folder, with its final adapter or that of a step ("final": never that of a step); a
    zip archive of either; a folder that PEFT or diffusers wrote; a file without its ending, which is how a
    tree names its nodes; or, where none of these exists, `owner/name` or `owner/name/file.safetensors` on the
    Hugging Face Hub.
    Raises an AdapterError without a LoRA file, a RunError if a run has not saved it, and a ConfigError for a
    step of something else.
    """
    path = Path(open_archive(source))
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
    if step is None and not path.exists() and (fetched := fetch_adapter(os.fspath(source))):
        return AdapterSource(fetched)
    problem = _describe_folder(path) if path.is_dir() else "does not exist"
    remedy = "use a LoRA file, a run folder or a tree node"
    if " " in path.name:
        remedy += f', or write --prompt "{shorten(path.name)}" if it is a prompt'
    elif (weight := re.fullmatch(r"(.+):([0-9.]+)", path.name)) and path.with_name(weight[1]).exists():
        remedy = f"write {path.with_name(weight[1])}, and {weight[2]} in --strengths or --weights"
    raise AdapterError(f"{path} {problem}; {remedy}", key="lora.missing")


def split_sum(source: PathLike) -> list[tuple[PathLike, float]]:
    """Splits `a.safetensors:0.6+b.safetensors:0.4` into parts; what exists under the whole name is one."""
    text = os.fspath(source)
    if not re.search("[+:]", text):
        return [(source, 1.0)]
    try:
        resolve_adapter(text)
    except AdapterError as error:
        parts: list[tuple[PathLike, float]] = []
        for piece in map(str.strip, text.split("+")):
            match = WEIGHTED.fullmatch(piece)
            path, factor = (match[1], float(match[2])) if match else (piece, 1.0)
            if not path:
                problem = f"{shorten(text)} is not a sum of LoRAs; write A:0.6+B:0.4, with runs or files"
                raise ConfigError(problem, key="lora.sum") from error
            parts.append((path, factor))
        return parts
    return [(source, 1.0)]


def _describe_folder(folder: Path) -> str:
    """What a folder without an adapter's file has in its place; raises an AdapterError about a pickle."""
    others = [folder.glob(f"*{ENDING}"), *(folder.glob(f"*/{name}") for name in FOLDER_FILES)]
    if found := sorted(str(file.relative_to(folder)) for files in others for file in files):
        return f"is not a run folder, but contains LoRA files ({join_names(found, 3)})"
    if pickle := next((file for file in sorted(folder.iterdir()) if file.suffix in PICKLES), None):
        problem = f"{pickle} is a pickle, which can run code; use a .safetensors file"
        raise AdapterError(problem, key="file.pickle")
    return "contains no LoRA file and is not a run folder"


def _metadata(path: Path, header: Header, keys: Iterable[str]) -> dict[str, str]:
    """The file's metadata, with PEFT's configuration, which may be in a file of its own."""
    metadata = dict(header.metadata)
    config = path.with_name("adapter_config.json")
    is_of_peft = path.name == FOLDER_FILES[1] or any(key.startswith("base_model.") for key in keys)
    if "lora_adapter_metadata" in metadata or not is_of_peft or not config.is_file():
        return metadata
    try:
        metadata["lora_adapter_metadata"] = read_bytes(config, MAX_HEADER_BYTES).decode("utf-8")
    except UnfitFileError as error:
        raise AdapterError(f"{config} {error}; download or copy it again", key=error.key) from None
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot read {config} ({error}); download or copy it again"
        raise AdapterError(problem, key="file.unreadable") from None
    return metadata


def _target(module: str) -> str:
    """`attn2.to_k` for `...transformer_blocks.0.attn2.to_k`: the last names, without counters of blocks."""
    blocks = r"(?:down_blocks|up_blocks|transformer_blocks|attentions|resnets|layers)\.\d+\."
    tail = re.split(blocks, module)[-1]
    return f"text encoder {tail}" if module.startswith(TEXT_ENCODERS) else tail


def _describe(folded: Adapter, dialect: Dialect, metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of a file: about the run, and about the tensors as written."""
    rank = str(folded.rank)
    # Of a file that mixes kinds: the one that a reader must know of.
    kind = max((type(module) for module in folded.modules.values()), key=lambda one: len(one.network_args))
    kernels = any(tuple(tensor.shape[2:]) not in ((), (1, 1)) for tensor in folded.parameters())
    arguments = {"conv_dim": rank, "conv_alpha": rank} if kernels else {}
    texts = {key: str(value) for key, value in metadata.items() if key not in _STRUCTURAL} | {
        "format": "pt",
        "ss_network_module": kind.network_module,
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
        "ss_network_args": json.dumps({**kind.network_args, **arguments}),
        **rank_notes(folded, dialect),
    }
    if "modelspec.sai_model_spec" in texts:
        # Whose names the file has.
        original = dialect == "kohya" and folded.family == "sdxl"
        texts["modelspec.implementation"] = _ORIGINAL_SDXL if original else "diffusers"
    own = {
        "sdlora.trained_alpha": folded.notes.get("sdlora.trained_alpha", f"{folded.alpha:g}"),
        "sdlora.family": folded.family,
        "sdlora.layers_per_block": folded.notes.get("sdlora.layers_per_block"),
        "sdlora.parent": folded.parent,
    }
    return {key: text for key, text in own.items() if text} | texts


def _non_finite(adapter: Adapter) -> list[str]:
    return [name for name, module in adapter.modules.items() if not module.is_finite]


def _check_values(path: Path, adapter: Adapter) -> None:
    """Refuses values that only a failed training can have."""
    problem = ""
    if broken := _non_finite(adapter):
        share = f"{len(broken)} of {len(adapter.modules)} modules"
        problem = f"values are not finite in {share}, such as {broken[0]}; use an earlier file"
    elif not any(bool(module.starting_at_zero.any()) for module in adapter.modules.values()):
        problem = "all up matrices are zero, so it would have no effect; train it first, or use other weights"
    if problem:
        key = "lora.non-finite" if broken else "lora.no-effect"
        raise AdapterError(f"LoRA file {path} was not written: {problem}", key=key, exit_code=1)


def _verify(path: Path, state: Mapping[str, Tensor]) -> None:
    written, _ = read_tensors(path)
    same = (torch.equal(written[key], tensor.cpu()) for key, tensor in state.items())
    if written.keys() != state.keys() or not all(same):
        problem = f"LoRA file {path} differs from what was written; check the disk"
        raise AdapterError(problem, key="write-failed", exit_code=1)
