"""`sdlora settings`."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from sdlora.cli import app
from sdlora.errors import ConfigError

COLUMN = 40


@app.command()
def settings(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORD]...", help="Show only settings that contain a word, such as crop."),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print a JSON schema, for editors of config files.")
    ] = False,
) -> None:
    """List the settings with their defaults; also finds those of other trainers, such as network_dim."""
    from sdlora.aliases import ELSEWHERE
    from sdlora.config import json_schema

    if schema:
        typer.echo(json.dumps(json_schema(), indent=2))
        return
    wanted = [_plain(word.lstrip("-")) for word in words or []]
    lines = [f"{word} in sdlora: {ELSEWHERE[word]}" for word in wanted if word in ELSEWHERE]
    wanted += [ELSEWHERE[word].split(",")[0].split(":")[0] for word in wanted if word in ELSEWHERE]
    lines += _describe(wanted, min(shutil.get_terminal_size().columns, 120))
    if not lines:
        problem = f"no setting contains {' or '.join(words or [])}; `sdlora settings` lists all"
        raise ConfigError(problem, key="no-setting")
    typer.echo("\n".join(lines))


def _describe(words: Sequence[str], width: int) -> Iterator[str]:
    """Settings by section, with their defaults as they are typed."""
    from sdlora.config import RunConfig, Section

    for name, section in RunConfig():
        if not isinstance(section, Section):
            continue
        texts = {key: field.description or "" for key, field in type(section).model_fields.items()}
        lines = {key: f"{name}.{key} {_plain(text)}" for key, text in texts.items()}
        found = [key for key, line in lines.items() if not words or any(word in line for word in words)]
        if found:
            yield f"[{name}] {section.__doc__}"
        for key in found:
            value = getattr(section, key)
            default = "" if value is None else f"={value if isinstance(value, str) else json.dumps(value)}"
            start = f"  {name}.{key}{default}"
            lead = start.ljust(COLUMN) if len(start) < COLUMN else f"{start}\n{' ' * COLUMN}"
            wrapped = textwrap.wrap(texts[key], max(width - COLUMN, 30), break_on_hyphens=False)
            yield lead + f"\n{' ' * COLUMN}".join(wrapped)


def _plain(text: str) -> str:
    """Lets `learning rate` and `Learning-Rate` find learning_rate."""
    return re.sub(r"[ -]", "_", text.lower())
