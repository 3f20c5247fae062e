"""sdlora trains style LoRAs for Stable Diffusion from an image folder."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdlora.config import RunConfig as RunConfig
    from sdlora.config import load_config as load_config
    from sdlora.errors import SdloraError as SdloraError
    from sdlora.evaluation.advise import advise_rank as advise_rank
    from sdlora.evaluation.choose import choose as choose
    from sdlora.evaluation.compare import compare as compare
    from sdlora.evaluation.evaluate import evaluate as evaluate
    from sdlora.evaluation.page import write_report as write_report
    from sdlora.export.export import export_adapter as export_adapter
    from sdlora.export.extract import extract as extract
    from sdlora.export.merge_into_base import merge_into_base as merge_into_base
    from sdlora.formats.files import inspect_adapter as inspect_adapter
    from sdlora.formats.files import load_adapter as load_adapter
    from sdlora.formats.files import save_adapter as save_adapter
    from sdlora.lora.adapter import Adapter as Adapter
    from sdlora.rank.merge import merge as merge
    from sdlora.rank.resize import resize as resize
    from sdlora.rank.spectrum import spectrum as spectrum
    from sdlora.runs import RunFolder as RunFolder
    from sdlora.sampling.session import sample as sample
    from sdlora.training.train import plan_run as plan_run
    from sdlora.training.train import resume as resume
    from sdlora.training.train import train as train
    from sdlora.tree.tree import AdapterTree as AdapterTree

# The public names and their modules, imported at first use: torch and diffusers take seconds to import.
_PUBLIC = {
    "Adapter": "sdlora.lora.adapter",
    "AdapterTree": "sdlora.tree.tree",
    "RunConfig": "sdlora.config",
    "RunFolder": "sdlora.runs",
    "SdloraError": "sdlora.errors",
    "advise_rank": "sdlora.evaluation.advise",
    "choose": "sdlora.evaluation.choose",
    "compare": "sdlora.evaluation.compare",
    "evaluate": "sdlora.evaluation.evaluate",
    "export_adapter": "sdlora.export.export",
    "extract": "sdlora.export.extract",
    "inspect_adapter": "sdlora.formats.files",
    "load_adapter": "sdlora.formats.files",
    "load_config": "sdlora.config",
    "merge": "sdlora.rank.merge",
    "merge_into_base": "sdlora.export.merge_into_base",
    "plan_run": "sdlora.training.train",
    "resize": "sdlora.rank.resize",
    "resume": "sdlora.training.train",
    "sample": "sdlora.sampling.session",
    "save_adapter": "sdlora.formats.files",
    "spectrum": "sdlora.rank.spectrum",
    "train": "sdlora.training.train",
    "write_report": "sdlora.evaluation.page",
}

__all__ = sorted([*_PUBLIC, "__version__"])


def __dir__() -> list[str]:
    """The public names, for tab completion."""
    return __all__


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("sdlora")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sdlora' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
