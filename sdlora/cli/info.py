"""`sdlora info`."""

from __future__ import annotations

import typer

from sdlora.cli import app, options


@app.command()
def info(file: options.Source) -> None:
    """Describe a LoRA file (family, rank, alpha, targets, metadata) or the state of a run."""
    from contextlib import suppress

    from sdlora.errors import AdapterError
    from sdlora.formats.files import inspect_adapter
    from sdlora.report.summary import describe_state
    from sdlora.runs import RunFolder
    from sdlora.tree.lineage import read_lineage

    if (run := RunFolder(file)).exists:
        typer.echo("\n".join(describe_state(run)))
    found = inspect_adapter(file)
    typer.echo("\n".join(found.lines()))
    with suppress(AdapterError):
        if above := read_lineage(found.metadata):
            typer.echo(f"parents   {' > '.join(map(str, above))}")
