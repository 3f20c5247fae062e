"""The site: every page is built, every link leads somewhere, and the reference is what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sdlora
from tests.checks import HANG_SECONDS

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built strictly: a broken link, or a page without a place in the menu, is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        [*command, "--config-file", str(REPOSITORY / "docs" / "mkdocs.yml")],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site(site):
    """R-42: start page, guides and the generated reference; no page needs another host to be read."""
    settings = (site / "reference/settings/index.html").read_text(encoding="utf-8")
    for name, section in sdlora.RunConfig().model_dump().items():
        for key in section if isinstance(section, dict) else ():
            assert f"<code>{name}.{key}</code>" in settings
    commands = (site / "reference/commands/index.html").read_text(encoding="utf-8")
    python = (site / "reference/python/index.html").read_text(encoding="utf-8")
    assert "sdlora tree flatten" in commands
    for name in sdlora._PUBLIC:
        assert f'.{name}"' in python, name
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link)[^>]+(?:src|href)="(https?://[^"]+)', page.read_text("utf-8")
        )
        assert not loaded, page


def test_commands_in_the_guides_exist():
    """R-42: every command and every setting that a guide names is one."""
    from typer.main import get_command

    from sdlora.cli import app

    commands = set(get_command(app).commands)
    keys = {
        f"{section}.{name}"
        for section, values in sdlora.RunConfig().model_dump().items()
        if isinstance(values, dict)
        for name in values
    }
    sections = "|".join({key.split(".")[0] for key in keys})
    for page in sorted((REPOSITORY / "docs" / "pages").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^|`)sdlora ([a-z-]+)", text, re.MULTILINE))
        assert named <= commands, page.name
        found = set(re.findall(rf"(?:^|[` ])((?:{sections})\.[a-z_]+)(?==|`| =)", text, re.MULTILINE))
        assert found <= keys, page.name
