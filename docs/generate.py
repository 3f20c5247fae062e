"""Pages of the site that are written elsewhere: README, map, changelog; the reference from the code."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

import sdlora
from sdlora.cli import app
from sdlora.config import RunConfig, Section

REPOSITORY = Path(__file__).resolve().parent.parent
# Pages of the repository, by their place in the site.
PAGES = {
    "README.md": "index.md",
    "sdlora/README.md": "map.md",
    "sdlora/builtin/README.md": "builtin.md",
    "CHANGELOG.md": "changelog.md",
    "datasets/openmoji/README.md": "openmoji.md",
    "datasets/fluent-mono/README.md": "fluent-mono.md",
}
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages, and the files of the repository that they link."""
    pages = {
        "reference/settings.md": "\n".join(describe_settings()),
        "reference/commands.md": "\n".join(describe_commands()),
        "reference/python.md": "\n".join(describe_python()),
    }
    linked: set[str] = set()
    for source, place in PAGES.items():
        pages[place] = relink(source, (REPOSITORY / source).read_text(encoding="utf-8"), linked)
    for file in (REPOSITORY / "docs" / "pages").glob("*.md"):
        relink(f"docs/pages/{file.name}", file.read_text(encoding="utf-8"), linked)
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    for name in sorted(linked):
        files.append(File.generated(config, f"repository/{name}", abs_src_path=str(REPOSITORY / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **rest: Any) -> str:
    """Guides link files of the repository as other readers of the source need it."""
    return markdown if page.file.generated_by else relink(f"docs/pages/{page.file.src_uri}", markdown, set())


def relink(source: str, text: str, linked: set[str]) -> str:
    """A page of the repository, with links to pages of the site or to copies of files (`linked`)."""

    def follow(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        if target.startswith("docs/pages/"):
            return f"]({target.removeprefix('docs/pages/')}{match[3] or ''})"
        if target in PAGES:
            return f"]({PAGES[target]}{match[3] or ''})"
        if not (REPOSITORY / target).is_file():
            return match[0]
        linked.add(target)
        return f"](repository/{target}{match[3] or ''})"

    return LINK.sub(follow, text)


def cell(text: str) -> str:
    """A text in a cell of a table: one line, as it is typed."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def describe_settings() -> Iterator[str]:
    """Every setting with its default, by section, as `sdlora settings` prints them."""
    yield "# Settings\n\nOne table for each section of a config file. In a command: `section.key=value`.\n"
    for name, section in RunConfig():
        if not isinstance(section, Section):
            continue
        yield f"## {name}\n\n{section.__doc__}\n"
        yield "| setting | default | description | hint |\n|---|---|---|---|"
        for key, field in type(section).model_fields.items():
            value, extra = getattr(section, key), field.json_schema_extra
            default = "" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"
            hint = extra.get("remedy", "") if isinstance(extra, dict) else ""
            yield f"| `{name}.{key}` | {default} | {cell(field.description or '')} | {cell(str(hint))} |"
        yield ""


def describe_commands() -> Iterator[str]:
    """Every command with its arguments and options, as `--help` prints them."""
    yield "# Commands\n\n`sdlora COMMAND --help` prints the same. Exit codes: 0 done, 1 failed, 2 a mistake"
    yield "in the command or its input (one line with what to type), 130 and 143 stopped by a signal.\n"
    yield from describe_group(typer.main.get_command(app), "sdlora")


def describe_group(group: Any, path: str) -> Iterator[str]:
    for name in group.list_commands(None):
        command = group.commands[name]
        if hasattr(command, "commands"):
            yield from describe_group(command, f"{path} {name}")
            continue
        shown = [param for param in command.params if not param.hidden]
        arguments = [param for param in shown if param.param_type_name == "argument"]
        usage = " ".join(
            [f"{path} {name}", *(str(param.metavar or param.name.upper()) for param in arguments)]
        )
        yield f"## {path} {name}\n\n{command.help}\n\n```\n{usage} [OPTIONS]\n```\n\n| | |\n|---|---|"
        for param in shown:
            is_argument = param.param_type_name == "argument"
            title = str(param.metavar or param.name.upper()) if is_argument else ", ".join(param.opts)
            needed = "" if is_argument or not param.required else " Required."
            yield f"| `{title.replace('|', ' or ')}` | {cell(param.help or '')}{needed} |"
        yield ""


def describe_python() -> Iterator[str]:
    """The public names, from their docstrings."""
    yield "# Python\n\ntorch is imported at the first use of a name that needs it, not by `import sdlora`.\n"
    for name, module in sorted(sdlora._PUBLIC.items(), key=lambda item: item[0].lower()):
        yield f"::: {module}.{name}\n"
