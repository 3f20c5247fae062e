"""Presets by name: the TOML files of `configs/`, which a wheel has as `sdlora/presets/`."""

from __future__ import annotations

from pathlib import Path

from sdlora.errors import ConfigError, shorten

_PACKAGE = Path(__file__).resolve().parent
_FOLDERS = (_PACKAGE / "presets", _PACKAGE.parent / "configs")


def list_presets() -> dict[str, Path]:
    """The files of all presets, by name."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), _FOLDERS[0])
    return {file.stem: file for file in sorted(folder.glob("*.toml"), key=lambda file: file.stem)}


def find_preset(name: str) -> Path:
    """The file of a preset.

    Args:
        name: Its name, or some of its words if no other preset has them: `sdxl-12gb` is `sdxl-qlora-12gb`.

    Raises:
        ConfigError: If there is none, or several.
    """
    presets, words = list_presets(), set(name.lower().removesuffix(".toml").split("-"))
    found = [name] if name in presets else [one for one in presets if words <= set(one.split("-"))]
    if len(found) == 1:
        return presets[found[0]]
    choices = found or presets
    problem = f"--preset {shorten(name)} is {'not unique' if found else 'not a preset'}"
    raise ConfigError(f"{problem}; use {' or '.join(choices)}", key="option--preset")


def describe_preset(file: Path) -> str:
    """What a preset is for: the first sentence of its file."""
    comment = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment).partition(". ")[0].removesuffix(".")
