"""Options of several commands, and the parsers of their values."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from sdlora.errors import ConfigError, DataError, shorten
from sdlora.writing import fold

if TYPE_CHECKING:
    from sdlora.config import BaseSection, DataSection, FileDtype, ObjectiveSection, RunConfig
    from sdlora.formats.keys import Dialect as DialectName
    from sdlora.models.info import BaseInfo

Source = Annotated[
    Path, typer.Argument(metavar="RUN|LORA", help="A run folder, or a LoRA file in any dialect.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run folder.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[section.key=value]...", help="Settings, such as lora.rank=8; see `sdlora settings`."
    ),
]
Config = Annotated[Path | None, typer.Option(help="A TOML file with settings, or a run to take them from.")]
Preset = Annotated[
    str | None, typer.Option(help="A preset to start from, such as sd15; see `sdlora settings --presets`.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Out = Annotated[Path, typer.Option(help="Output file.")]
ImagesOut = Annotated[
    Path | None,
    typer.Option(help="Output folder for grid.png and the single images.", show_default="samples/NAME"),
]
Dialect = Annotated[str, typer.Option(help="diffusers, or kohya (for A1111, Forge, ComfyUI).")]
Precision = Annotated[str, typer.Option(help="fp16, bf16 or fp32.")]
Force = Annotated[bool, typer.Option("--force", help="Accept a changed parent; ignore a missing one.")]
StepStrengths = Annotated[
    str | None, typer.Option(metavar="NODE=NUMBER,...", help="Strengths that replace those of training.")
]
Prompt = Annotated[list[str] | None, typer.Option(help="A prompt; repeatable.")]
Prompts = Annotated[Path | None, typer.Option(help="A text file with one prompt per line.")]
Seeds = Annotated[str | None, typer.Option(help="Seeds, such as 0,1.", show_default="the run's, or 0,1")]
Strengths = Annotated[
    str | None,
    typer.Option(help="LoRA strengths, one column each: 0.5,1.", show_default="the run's, or 1"),
]
SavedSteps = Annotated[
    list[str] | None,
    typer.Option("--step", help="Saved steps of a run, beside each other: 50,100,final; repeatable."),
]
Steps = Annotated[int | None, typer.Option(help="Sampling steps.", show_default="the run's, or 25")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale (CFG).", show_default="the run's")]
Features = Annotated[
    str | None,
    typer.Option(
        help="A folder or Hub id of CLIP or DINOv2, or a file of CSD, to score by.",
        show_default="none, which suits the built-in base alone",
    ),
]
Size = Annotated[str | None, typer.Option(help="Image size in pixels, as WIDTHxHEIGHT.")]

StartImage = Annotated[
    Path | None, typer.Option("--image", help="An image to start from (img2img).", show_default="noise")
]
Denoise = Annotated[
    float | None,
    typer.Option(help="With --image: 0.3 stays near it, 0.8 goes far from it.", show_default="0.6"),
]

# What to do with files that are given as image folders.
FILES = {
    ".toml": "write `sdlora train IMAGES --config {}`",
    ".safetensors": "write `sdlora train IMAGES --base {0}` if it is a base, or `sdlora info {0}`",
}
SOURCES = "Runs, LoRA files, zips of them or tree nodes, side by side; a sum of LoRAs: A:0.6+B:0.4."
MAX_PROMPTS_BYTES = 2**20
Number = TypeVar("Number", int, float)


def base_option(default: str) -> Any:
    """The option `--base`."""
    text = "builtin, a diffusers folder, a .safetensors file or a Hugging Face id."
    return typer.Option(help=text, show_default=default)


def say(text: str, *, err: bool = False) -> None:
    """Prints lines, on a terminal within its width."""
    if (sys.stderr if err else sys.stdout).isatty():
        text = fold(text, shutil.get_terminal_size().columns)
    typer.echo(text, err=err)


def print_json(value: Any) -> None:
    """Prints plain values; paths, and other objects, as texts."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def parse_numbers(text: str | None, kind: type[Number], option: str) -> list[Number] | None:
    """Parses `0.5,1` to [0.5, 1.0]."""
    if text is None:
        return None
    try:
        return [_finite(kind(part)) for part in text.split(",")]
    except ValueError:
        problem = f"{option} {shorten(text)} must be numbers separated by commas, such as 0,1"
        raise ConfigError(problem, key=f"option{option}") from None


def parse_steps(texts: list[str] | None) -> list[int | str]:
    """Parses `50,100`, `final` and `best`, of one option or several, to [50, 100, "final", "best"]."""
    parts = [part.strip() for text in texts or () for part in text.split(",")]
    for part in parts:
        if part not in ("final", "best") and not (part.isdecimal() and len(part) < 10):
            problem = f"--step {shorten(part)} must be a saved step, final or best, such as 50,100,final"
            raise ConfigError(f"{problem}; --steps sets the sampling steps", key="option--step")
    return [int(part) if part.isdecimal() else part for part in dict.fromkeys(parts)]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parses `768x512` to (768, 512)."""
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and len(text) < 12) or 0 in (int(width), int(height)):
        raise ConfigError(f"--size {shorten(text)} must be WIDTHxHEIGHT, such as 768x512", key="option--size")
    return int(width), int(height)


def parse_start(image: Path | None, denoise: float | None) -> tuple[Path, float] | None:
    """`--image` with `--denoise`; None without an image."""
    if image is None and denoise is not None:
        raise ConfigError(f"--denoise {denoise:g} requires --image FILE; add it", key="option--denoise")
    if image is None:
        return None
    if not image.is_file():
        raise ConfigError(f"--image {image} is not a file; name an image", key="option--image")
    from sdlora.sampling.session import DENOISE

    return image, DENOISE if denoise is None else denoise


def parse_strengths(text: str | None) -> dict[str, float]:
    """Parses `ink=0.5,ink/portraits=1` to {"ink": 0.5, "ink/portraits": 1.0}."""
    try:
        pairs = (part.rpartition("=") for part in (text or "").split(",") if part)
        return {name.strip(): _finite(float(number)) for name, _, number in pairs}
    except ValueError:
        problem = f"--strengths {shorten(text or '')} must be NODE=NUMBER, such as ink=0.5,ink/portraits=1"
        raise ConfigError(problem, key="option--strengths") from None


def export_settings(dialect: str, precision: str) -> tuple[DialectName, FileDtype]:
    """Validates `--format` and `--precision` before torch is imported."""
    from sdlora.config import load_config

    export = load_config(None, {"export.formats": [dialect], "export.precision": precision}).export
    return export.formats[0], export.precision


def sample_settings(
    prompt: list[str] | None, prompts: Path | None, seeds: str | None, **others: Any
) -> dict[str, Any]:
    """Settings of the section `sample`, without None, validated before torch is imported."""
    from sdlora.config import load_config

    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])] or None
    given = {"prompts": texts, "seeds": parse_numbers(seeds, int, "--seeds"), **others}
    changes = {name: value for name, value in given.items() if value is not None}
    # Prompts are validated later, once the trigger of the run or file is known.
    load_config(None, {f"sample.{name}": value for name, value in changes.items() if name != "prompts"})
    return changes


def read_prompts(file: Path) -> list[str]:
    """Reads one prompt per line; skips empty lines and lines that start with #."""
    from sdlora.reading import UnfitFileError, read_bytes

    try:
        lines = read_bytes(file, MAX_PROMPTS_BYTES).decode("utf-8-sig").splitlines()
    except UnfitFileError as error:
        raise ConfigError(f"--prompts {file} {error}; use a text file", key="option--prompts") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {file} cannot be read: {error}", key="option--prompts") from None
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        problem = f"--prompts {file} contains no prompt; write one per line"
        raise ConfigError(problem, key="option--prompts.empty")
    if found := next(filter(None, (re.search(r"\s--[a-z]{1,3}\s", prompt) for prompt in prompts)), None):
        raise ConfigError(
            f"--prompts {file} has sd-scripts' option {found[0].strip()} after a prompt; remove it, and use "
            "--negative-prompt, --size, --seeds, --steps and --guidance, which apply to all prompts",
            key="option--prompts.options",
        )
    return prompts


def check_base(
    settings: BaseSection, objective: ObjectiveSection | None = None, data: DataSection | None = None
) -> BaseInfo | None:
    """Inspects a local base before torch is imported, which takes seconds; None for a base on the hub."""
    from sdlora.models.folder import is_on_hub
    from sdlora.models.info import inspect_base

    if not any(is_on_hub(source) for source in (settings.source, settings.vae) if source):
        return inspect_base(settings, objective, data)
    return None


def check_folder(settings: RunConfig, base: BaseInfo | None) -> None:
    """Raises the errors of an image folder before torch is imported, all but those about tokens."""
    from sdlora.data.doctor import check_images
    from sdlora.data.records import raise_errors
    from sdlora.models.info import with_base_defaults
    from sdlora.runs import RunFolder

    images = Path(settings.images)
    if (run := RunFolder(images)).exists and run.environment_file.is_file():
        problem = f"{images} is a run, not an image folder; write `sdlora resume {images}` to continue it"
        raise DataError(problem, key="data.is-a-run")
    if (images / "model_index.json").is_file():
        problem = f"{images} is a base, not an image folder; write `sdlora train IMAGES --base {images}`"
        raise DataError(problem, key="data.is-a-base")
    if images.is_file() and (remedy := FILES.get(images.suffix.lower())):
        raise DataError(f"{images} is not an image folder; {remedy.format(images)}", key="data.not-a-folder")
    # The size of a base on the hub matters for warnings only.
    resolution, step = (base.resolution, base.min_step) if base else (512, 8)
    settings = with_base_defaults(settings, base) if base else settings
    raise_errors(check_images(settings, resolution=resolution, min_step=step).findings)


def check_png(path: Path | None, option: str) -> None:
    """Refuses to write an image over a file of another type."""
    if path is not None and path.suffix.lower() != ".png":
        raise ConfigError(f"{option} {shorten(str(path))} must end in .png", key=f"option{option}")


def find_adapters(*sources: str | Path) -> list[Path]:
    """The LoRA files of runs, files or nodes; prints which adapter of an unfinished run is used."""
    from sdlora.formats.files import resolve_adapter

    found = [resolve_adapter(source) for source in sources]
    for one in found:
        if one.run and one.file.stem.startswith("step-"):
            say(f"note: {one.run.path} is not finished; using its newest adapter, {one.file.name}")
    return [one.file for one in found]


def check_sources(sources: list[str], *, base: str | None, has_steps: bool) -> None:
    """Checks `--base` and that every LoRA of a grid exists, before the libraries for images are imported."""
    from sdlora.config import load_config

    if base is not None:
        check_base(load_config(None, {"base.source": base}).base)
    if sources and not has_steps:
        from sdlora.formats.files import split_sum

        find_adapters(*(Path(part) for source in sources for part, _ in split_sum(source)))


def _finite(number: Number) -> Number:
    """Returns a finite number; raises a ValueError for others."""
    if not -math.inf < number < math.inf:
        raise ValueError
    return number
