"""`sdlora tree show`, `verify`, `flatten` and `sample`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.tree import Tree

    from sdlora.tree.nodes import Node
    from sdlora.tree.tree import AdapterTree

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of LoRA files, or of runs.")]
Force = Annotated[
    bool, typer.Option("--force", help="Take a changed parent for the right one; go without a missing one.")
]
StepStrengths = Annotated[
    str | None, typer.Option(metavar="NODE=NUMBER,...", help="Other strengths than those of the training.")
]


_WIDEST = 10_000


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    verbs = typer.Typer(no_args_is_help=True)
    verbs.command()(show)
    verbs.command()(verify)
    verbs.command()(sample)
    verbs.command()(flatten)
    app.add_typer(verbs, name="tree", help="LoRAs that were trained on top of each other.")


def show(folder: Folder) -> None:
    """Draw the tree: which LoRA stands on which, with rank, images, size and held-out loss."""
    from rich.console import Console

    from sdlora.tree.tree import AdapterTree

    tree = AdapterTree.from_folder(folder)
    # A tree cuts what is wider than the console; what it refuses, and why, must be read whole.
    Console(highlight=False, width=_WIDEST).print(_draw(tree))
    for line in tree.problems:
        typer.echo(f"warning: {line}")


def _draw(tree: AdapterTree) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    from sdlora.errors import shorten

    bases = {
        shorten(node.notes["sdlora.base_name"])
        for node in tree.nodes.values()
        if "sdlora.base_name" in node.notes
    }
    drawing = Tree(Text(", ".join(sorted(bases)) or "base", style="bold"))
    left = [(drawing, node) for node in tree.children(None)]
    while left:
        place, node = left.pop(0)
        label = Text(_describe(node))
        if reason := tree.refused.get(node.name):
            label.append(f"\n{reason}", style="red")
        branch = place.add(label)
        left += [(branch, child) for child in tree.children(node.name)]
    return drawing


def _describe(node: Node) -> str:
    facts = [f"rank {node.rank}", f"{node.size_bytes / 1e6:.2f} MB"]
    if node.images:
        facts.insert(1, f"{node.images} images")
    if node.heldout_loss is not None:
        facts.append(f"held-out loss {node.heldout_loss:.4f}")
    return f"{node.name}  ({', '.join(facts)})"


def verify(folder: Folder) -> None:
    """Read every tensor and check every parent; exit code 1 if something is wrong."""
    from sdlora.tree.tree import AdapterTree

    tree = AdapterTree.from_folder(folder)
    lines = tree.verify()
    for line in lines:
        typer.echo(line)
    if lines:
        raise typer.Exit(1)
    typer.echo(f"{len(tree.nodes)} nodes, each on the parent that it was trained on")


def sample(
    folder: Folder,
    nodes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NODE]...", help="The nodes to compare.", show_default="all"),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with a prompt on each line.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base.", show_default="the one that the files name")
    ] = None,
    strengths: StepStrengths = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, such as 0,1.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder for grid.png and the single images.")] = None,
    force: Force = False,
) -> None:
    """Make a grid: prompts and seeds down, the base and the nodes across."""
    from sdlora.cli.values import parse_size, parse_strengths, sample_settings

    settings = sample_settings(prompt, prompts, seeds, steps=steps, guidance=guidance)
    changes, pixels = parse_strengths(strengths), parse_size(size)
    from sdlora.report.terminal import Terminal
    from sdlora.sampling.session import sample_tree
    from sdlora.tree.tree import AdapterTree

    report = Terminal()
    with report.progress("sampling", 1) as meter:
        grid = sample_tree(
            AdapterTree.from_folder(folder),
            nodes or (),
            strengths=changes,
            base=base,
            out=out,
            size=pixels,
            force=force,
            progress=meter.show,
            warn=report.warn,
            **settings,
        )
    typer.echo(f"grid      {grid}")


def flatten(
    folder: Folder,
    node: Annotated[
        str, typer.Argument(metavar="NODE", help="The node: its path in the folder, less the ending.")
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    rank: Annotated[int | None, typer.Option(help="The nearest of this rank.", show_default="exact")] = None,
    strengths: StepStrengths = None,
    format: Annotated[str, typer.Option(help="diffusers, or kohya for A1111, Forge, ComfyUI.")] = "diffusers",
    precision: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
    force: Force = False,
) -> None:
    """Write one ordinary LoRA that does what a node does on top of its ancestors."""
    from sdlora.cli.values import parse_strengths
    from sdlora.config import load_config

    settings = load_config(None, {"export.formats": [format], "export.precision": precision}).export
    changes = parse_strengths(strengths)
    from sdlora.export.export import check_out, export_adapter
    from sdlora.tree.tree import AdapterTree

    tree = AdapterTree.from_folder(folder)
    check_out(out, (step.file for step in tree.nodes.values()))
    flat, cost = tree.flatten(node, strengths=changes, rank=rank, force=force)
    for line in tree.refusals(node):
        typer.echo(f"warning: {line}")
    report = export_adapter(flat, out, dialect=settings.formats[0], precision=settings.precision)
    typer.echo(f"path      {flat.notes['sdlora.flattened']}")
    for line in (*(cost.lines() if cost else ()), *report.lines()):
        typer.echo(line)
