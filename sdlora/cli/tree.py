"""`sdlora tree show`, `verify`, `flatten` and `sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdlora.cli import app, options
from sdlora.cli.sample import draw_grid
from sdlora.errors import shorten

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of LoRA files, or of runs.")]
verbs = typer.Typer(no_args_is_help=True)
app.add_typer(verbs, name="tree", help="Stacked LoRAs: trained on top of each other.")


@verbs.command()
def show(folder: Folder) -> None:
    """Draw the tree of parents and children, with rank, images, size and held-out loss."""
    from rich.console import Console
    from rich.text import Text
    from rich.tree import Tree

    from sdlora.tree.tree import AdapterTree

    tree = AdapterTree.from_folder(folder)
    names = {node.notes.get("sdlora.base_name") for node in tree.nodes.values()}
    bases = sorted(shorten(name) for name in names if name is not None)
    drawing = Tree(Text(", ".join(bases) or "base", style="bold"))
    left = [(drawing, node) for node in tree.children(None)]
    while left:
        place, node = left.pop(0)
        images = f", {node.images} images" if node.images else ""
        loss = "" if node.heldout_loss is None else f", held-out loss {node.heldout_loss:.4f}"
        size = f"{node.size_bytes / 1e6:.2f} MB"
        label = Text(f"{node.name}  (rank {node.rank}{images}, {size}{loss})")
        if error := tree.errors.get(node.name):
            label.append(f"\n{error}", style="red")
        branch = place.add(label)
        left += [(branch, child) for child in tree.children(node.name)]
    # Rich cuts lines at the width of the console, but errors must be readable in full.
    Console(highlight=False, width=10_000).print(drawing)
    for line in tree.problems:
        options.say(f"warning: {line}")


@verbs.command()
def verify(folder: Folder) -> None:
    """Check every tensor and every parent; exit code 1 if something is wrong."""
    from sdlora.tree.tree import AdapterTree

    tree = AdapterTree.from_folder(folder)
    if lines := tree.verify():
        options.say("\n".join(lines))
        raise typer.Exit(1)
    options.say(f"{len(tree.nodes)} nodes, all with the parents that they were trained on")


@verbs.command()
def sample(
    folder: Folder,
    nodes: Annotated[
        list[str] | None, typer.Argument(metavar="[NODE]...", help="The nodes to compare; default: all.")
    ] = None,
    prompt: options.Prompt = None,
    prompts: options.Prompts = None,
    base: Annotated[str | None, options.base_option("the one named in the files")] = None,
    strengths: options.StepStrengths = None,
    seeds: options.Seeds = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    size: options.Size = None,
    out: options.ImagesOut = None,
    force: options.Force = False,
) -> None:
    """Draw a grid: one row per prompt and seed, one column for the base and for each node."""
    settings = options.sample_settings(prompt, prompts, seeds, steps=steps, guidance=guidance)
    changes, pixels = options.parse_strengths(strengths), options.parse_size(size)
    from sdlora.report.terminal import Terminal
    from sdlora.sampling.session import SampleRequest, plan_tree
    from sdlora.tree.tree import AdapterTree

    terminal = Terminal()
    tree = AdapterTree.from_folder(folder)
    request = SampleRequest(base, None, out, pixels, force, terminal.warn, settings)
    draw_grid(plan_tree(tree, nodes or (), request, changes), terminal)


@verbs.command()
def flatten(
    folder: Folder,
    node: Annotated[
        str, typer.Argument(metavar="NODE", help="The node: its path in FOLDER, without the extension.")
    ],
    out: options.Out,
    rank: Annotated[int | None, typer.Option(help="Rank (approximate).", show_default="exact")] = None,
    strengths: options.StepStrengths = None,
    format: options.Dialect = "diffusers",
    precision: options.Precision = "fp16",
    force: options.Force = False,
) -> None:
    """Merge a node and its ancestors into one ordinary LoRA."""
    dialect, dtype = options.export_settings(format, precision)
    changes = options.parse_strengths(strengths)
    from sdlora.export.export import check_out, export_adapter
    from sdlora.tree.tree import AdapterTree

    tree = AdapterTree.from_folder(folder)
    check_out(out, (step.file for step in tree.nodes.values()))
    flat, cost = tree.flatten(node, strengths=changes, rank=rank, force=force)
    for error in tree.path_errors(node):
        options.say(f"warning: {error}")
    report = export_adapter(flat, out, dialect=dialect, precision=dtype)
    path = f"path      {flat.notes['sdlora.flattened']}"
    options.say("\n".join([path, *(cost.lines() if cost else ()), *report.lines()]))
