"""What objects show in a notebook: their lines, and images scaled down, in one self-contained block."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from PIL import Image

from sdlora.errors import one_line

MAX_SIDE_PX = 900


def show_html(title: str, lines: Iterable[str], images: Iterable[Path] = ()) -> str:
    """HTML without scripts and network; texts are escaped, images that cannot be read are left out."""
    text = html.escape("\n".join(map(one_line, lines)))
    shown = [f"<b>{html.escape(one_line(title))}</b>"]
    if text:
        shown.append(f'<pre style="margin:4px 0">{text}</pre>')
    for path in images:
        with suppress(OSError):
            shown.append(f'<img style="max-width:100%" alt="{html.escape(path.name)}" src="{_embed(path)}">')
    return f"<div>{''.join(shown)}</div>"


def _embed(path: Path) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
    small.save(buffer := io.BytesIO(), "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
