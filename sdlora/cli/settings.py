"""`sdlora settings`."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sdlora.cli import app, options
from sdlora.cli.mistakes import nearest_setting
from sdlora.errors import ConfigError

COLUMN, PRESET_COLUMN = 40, 20


@app.command()
def settings(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORD]...", help="Show only settings that contain a word, such as crop."),
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print a JSON schema, for editors of config files.")
    ] = False,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Translate a config of kohya, ai-toolkit or OneTrainer to TOML.",
        ),
    ] = None,
    presets: Annotated[bool, typer.Option("--presets", help="List the presets for --preset.")] = False,
    as_json: options.Json = False,
) -> None:
    """List the settings with their defaults; also finds those of other trainers, such as network_dim."""
    from sdlora.aliases import ELSEWHERE
    from sdlora.config import json_schema

    width = min(shutil.get_terminal_size().columns, 120)
    if schema:
        typer.echo(json.dumps(json_schema(), indent=2))
        return
    if source is not None:
        from sdlora.translate.translate import translate

        typer.echo(translate(source), nl=False)
        return
    if presets:
        typer.echo("\n".join(_describe_presets(width)))
        return
    wanted = [_plain(word.lstrip("-")) for word in words or []]
    if (name := "_".join(wanted)) in ELSEWHERE:
        wanted = [name]  # as the page of another trainer spells it
    lines = [f"{word} in sdlora: {ELSEWHERE[word]}" for word in wanted if word in ELSEWHERE]
    wanted += [ELSEWHERE[word].split(",")[0].split(":")[0] for word in wanted if word in ELSEWHERE]
    found = {name: keys for name, keys in _list(wanted).items() if keys}
    if as_json:
        options.print_json(found)
        return
    lines += _describe(found, width)
    if not lines:
        near = list(filter(None, map(nearest_setting, wanted)))
        remedy = f"did you mean {' or '.join(near)}?" if near else "`sdlora settings` lists all"
        problem = f"no setting contains {' or '.join(words or [])}; {remedy}"
        raise ConfigError(problem, key="no-setting")
    typer.echo("\n".join(lines))


def _list(words: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Default and description of the settings that contain one of the words, by section and key."""
    from sdlora.config import RunConfig, Section

    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, section in RunConfig():
        if not isinstance(section, Section):
            continue
        texts = {key: field.description or "" for key, field in type(section).model_fields.items()}
        lines = {key: f"{name}.{key} {_plain(text)}" for key, text in texts.items()}
        found[name] = {
            key: {"default": getattr(section, key), "description": texts[key]}
            for key, line in lines.items()
            if not words or any(word in line for word in words)
        }
    return found


def _describe(found: Mapping[str, Mapping[str, Mapping[str, Any]]], width: int) -> Iterator[str]:
    """Settings by section, with their defaults as they are typed."""
    from sdlora.config import RunConfig

    for name, keys in found.items():
        yield f"[{name}] {getattr(RunConfig(), name).__doc__}"
        for key, about in keys.items():
            value = about["default"]
            default = "" if value is None else f"={value if isinstance(value, str) else json.dumps(value)}"
            yield _beside(f"  {name}.{key}{default}", about["description"], COLUMN, width)


def _describe_presets(width: int) -> Iterator[str]:
    """Presets with their first comment, and where their files are."""
    from sdlora.presets import describe_preset, list_presets

    presets = list_presets()
    for name, file in presets.items():
        yield _beside(f"  {name}", describe_preset(file), PRESET_COLUMN, width)
    for folder in {file.parent for file in presets.values()}:
        yield f"use one with --preset NAME; the files are in {folder}"


def _beside(start: str, text: str, column: int, width: int) -> str:
    """A text wrapped in a column beside its name, or below it if the name is long."""
    lead = start.ljust(column) if len(start) < column else f"{start}\n{' ' * column}"
    wrapped = textwrap.wrap(text, max(width - column, 30), break_on_hyphens=False)
    return lead + f"\n{' ' * column}".join(wrapped)


def _plain(text: str) -> str:
    """Lets `learning rate` and `Learning-Rate` find learning_rate."""
    return re.sub(r"[ -]", "_", text.lower())
