"""`sdlora settings`."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

COLUMN = 40


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command()(settings)


def settings(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORD]...", help="Only those with a word in them, such as lora or crop."),
    ] = None,
) -> None:
    """List the settings with default and meaning; a word such as network_dim finds its name here."""
    from sdlora.aliases import ELSEWHERE
    from sdlora.errors import ConfigError

    wanted = [_plain(word.lstrip("-")) for word in words or []]
    lines = [f"{word} in sdlora: {ELSEWHERE[word]}" for word in wanted if word in ELSEWHERE]
    wanted += [ELSEWHERE[word].split(",")[0].split(":")[0] for word in wanted if word in ELSEWHERE]
    lines += _describe(wanted, min(shutil.get_terminal_size().columns, 120))
    if not lines:
        raise ConfigError(f"no setting has {' or '.join(words or [])} in it; `sdlora settings` lists all")
    typer.echo("\n".join(lines))


def _describe(words: Sequence[str], width: int) -> Iterator[str]:
    """The settings by section; the default is written as it would be given."""
    from sdlora.aliases import MEANINGS
    from sdlora.config import RunConfig, Section

    for name, section in RunConfig():
        if not isinstance(section, Section):
            continue
        found = {key: value for key, value in section if _fits(f"{name}.{key}", MEANINGS, words)}
        if found:
            yield f"[{name}] {section.__doc__}"
        for key, value in found.items():
            default = "" if value is None else f"={value if isinstance(value, str) else json.dumps(value)}"
            text = f"  {name}.{key}{default}"
            lead = text.ljust(COLUMN) if len(text) < COLUMN else f"{text}\n{' ' * COLUMN}"
            meaning = textwrap.wrap(
                MEANINGS[f"{name}.{key}"], max(width - COLUMN, 30), break_on_hyphens=False
            )
            yield lead + f"\n{' ' * COLUMN}".join(meaning)


def _fits(key: str, meanings: dict[str, str], words: Sequence[str]) -> bool:
    return not words or any(word in key or word in _plain(meanings[key]) for word in words)


def _plain(text: str) -> str:
    """So that `learning rate` and `Learning-Rate` find learning_rate."""
    return re.sub(r"[ -]", "_", text.lower())
