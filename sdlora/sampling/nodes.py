"""A grid of a tree of adapters: the base, and a column for each node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdlora.config import load_config
from sdlora.errors import ConfigError
from sdlora.lora.adapter import check_base
from sdlora.lora.tree import AdapterTree
from sdlora.models.info import inspect_base
from sdlora.models.load import load_base
from sdlora.sampling.checks import check_prompts, resolve_settings
from sdlora.sampling.generate import Column
from sdlora.sampling.pictures import choose_folder
from sdlora.sampling.request import choose_device, choose_dtype, make_request, sample_to_folder
from sdlora.sampling.session import base_of, noted_resolution


def sample_tree(
    tree: AdapterTree,
    names: Sequence[str] = (),
    *,
    strengths: Mapping[str, float] | None = None,
    base: str | None = None,
    out: str | Path | None = None,
    size: tuple[int, int] | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
    **changes: Any,
) -> Path:
    """Makes a grid that compares nodes, each on top of its ancestors; the base is loaded once.

    Args:
        tree: The tree.
        names: Nodes to show; all if not given.
        strengths: By node name, where another than the one of the training is wanted.
        base: The base; the one that the first node names if not given.
        out: The folder for the pictures; `samples/NAME` after the tree's folder if not given.
        size: Width and height in pixels; those of the training if not given.
        force: Takes wrong parents for right ones, and goes without missing ones.
        progress: Told (finished, total) pictures.
        warn: Told what deserves attention, such as another base of the same family.
        changes: Keys of the section `sample`: prompts, seeds, steps, guidance …

    Returns:
        The path of the grid.

    Raises:
        SdloraError: If a node stands on a wrong parent, or something asked for does not fit.
    """
    names = list(names or tree.nodes)
    nodes = [tree.node(name) for name in names]
    if not changes.get("prompts"):
        raise ConfigError("there is no prompt; give --prompt TEXT")
    columns = [Column()]
    for name, path in zip(names, tree.strengths(names, strengths, force=force), strict=True):
        stack = tuple((tree.load(step), strength) for step, strength in path.items())
        columns.append(Column(stack, path[name], name))
    for forced in dict.fromkeys(line for name in names for line in tree.refusals(name)):
        if warn:
            warn(forced)
    folder = choose_folder(out, tree.folder.resolve().name)
    first = nodes[0]
    config = load_config(None, {"base.source": base or base_of(first.file, first.notes)})
    info = inspect_base(config.base)
    for node in nodes:
        adapter = tree.load(node.name)
        line = check_base(
            adapter, family=info.family, name=info.name, digest=info.digest, source=str(node.file)
        )
        if line and warn:
            warn(line)
    trigger = next((t for node in nodes if (t := node.notes.get("modelspec.trigger_phrase"))), None)
    for prompt in changes["prompts"]:
        if trigger is None and "{trigger}" in prompt:
            raise ConfigError(
                f"prompt {prompt!r} has {{trigger}} in it but no file of the tree says its trigger; "
                "write the words"
            )
    changes["prompts"] = [prompt.replace("{trigger}", trigger or "") for prompt in changes["prompts"]]
    side = noted_resolution(first.notes) or info.resolution
    request = make_request(config.replace(sample=changes).sample, info, size or (side, side))
    check_prompts(request.prompts)
    resolve_settings(info, request.settings)
    device = choose_device()
    loaded = load_base(info, dtype=choose_dtype(device), device=device)
    return sample_to_folder(loaded, columns, request, folder, title=tree.folder.name, progress=progress)
