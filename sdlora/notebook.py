"""What objects show in a notebook: their lines and images, in one self-contained block."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from sdlora.errors import one_line

MAX_BYTES = 4_000_000


def show_html(title: str, lines: Iterable[str], images: Iterable[Path] = ()) -> str:
    """HTML without scripts and network; texts are escaped; PNGs that are large or unreadable are left out."""
    text = html.escape("\n".join(map(one_line, lines)))
    shown = [f"<b>{html.escape(one_line(title))}</b>"]
    if text:
        shown.append(f'<pre style="margin:4px 0">{text}</pre>')
    for path in images:
        with suppress(OSError):
            if path.stat().st_size > MAX_BYTES:
                continue
            shown.append(f'<img style="max-width:100%" alt="{html.escape(path.name)}" src="{_embed(path)}">')
    return f"<div>{''.join(shown)}</div>"


def _embed(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
