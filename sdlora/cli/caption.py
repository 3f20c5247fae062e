"""`sdlora caption`."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdlora.cli import app, options

if TYPE_CHECKING:
    from PIL.Image import Image

BUILTIN = "builtin"
SHOWN, EVERY_SECONDS = 5, 10.0


@app.command()
def caption(
    images: Annotated[Path, typer.Argument(metavar="IMAGES", help="A folder of images.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder or hub id: BLIP, Florence-2 or Qwen2.5-VL. Default: BLIP, from the hub. "
            "builtin: without a model, the thing that the built-in base draws most like the image."
        ),
    ] = None,
    skeleton: Annotated[
        bool, typer.Option("--skeleton", help="Make empty .txt files to fill in, without a model.")
    ] = False,
    tags: Annotated[
        Path | None,
        typer.Option(help="Write tags, by a WD tagger: its folder, or model.onnx with selected_tags.csv."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Least score of a tag, with --tags.")
    ] = 0.35,
    characters: Annotated[
        bool, typer.Option("--characters", help="Name known characters too, with --tags.")
    ] = False,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask; by default for the content, without the style.")
    ] = None,
    trigger: Annotated[
        str | None, typer.Option(help="Words to begin with; `sdlora train --trigger` adds them anyway.")
    ] = None,
) -> None:
    """Write captions for images that have none; those that exist stay. Can be stopped and continued."""
    from sdlora.config import load_config
    from sdlora.data.captioning import find_uncaptioned, write_captions, write_skeletons
    from sdlora.errors import ConfigError

    if tags and (model or prompt or skeleton):
        problem = "--tags cannot be used with --model, --prompt or --skeleton; use one of them"
        raise ConfigError(problem, key="option--tags")
    if model == BUILTIN and prompt:
        problem = "--prompt asks a captioning model; leave it out with --model builtin"
        raise ConfigError(problem, key="option--prompt")
    settings = load_config(None, {}, arguments={"data.trigger": trigger}).data
    missing, total = find_uncaptioned(images, settings)
    options.say(f"{total - len(missing)} of {total} images have a caption")
    if skeleton:
        if missing:
            options.say(f"empty caption files made: {write_skeletons(images, missing)}; fill them in")
        return
    if not missing:
        return
    describe = _load_tagger(tags, threshold, characters) if tags else _load_captioner(model, prompt)
    started = shown = time.monotonic()
    written = 0
    for number, (name, text) in enumerate(write_captions(images, missing, describe, settings), 1):
        written += bool(text)
        now = time.monotonic()
        if number <= SHOWN or now - shown > EVERY_SECONDS or number == len(missing):
            shown = now
            left = timedelta(seconds=round((now - started) / number * (len(missing) - number)))
            options.say(f"{number}/{len(missing)}  ETA {left}  {name}: {text or '(none)'}")
    options.say(f"captions written: {written}; read them, and say what images show, not their style")


def _load_tagger(source: Path, threshold: float, has_characters: bool) -> Callable[[Image], str]:
    from sdlora.models.tagger import Tagger

    return Tagger(source, threshold, has_characters=has_characters)


def _load_captioner(model: str | None, prompt: str | None) -> Callable[[Image], str]:
    if model == BUILTIN:
        return _load_namer()
    from sdlora.models.captioner import DEFAULT, Captioner
    from sdlora.sampling.session import choose_device

    return Captioner(model or DEFAULT, prompt, choose_device())


def _load_namer() -> Callable[[Image], str]:
    from sdlora.evaluation.naming import Namer
    from sdlora.report.terminal import Terminal

    with Terminal().progress("drawing what the base knows", 1) as meter:
        return Namer(BUILTIN, meter.show)
