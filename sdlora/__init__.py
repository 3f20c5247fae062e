"""sdlora trains style LoRAs for Stable Diffusion from an image folder."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdlora.config import RunConfig, load_config
    from sdlora.errors import SdloraError
    from sdlora.evaluation.advise import advise_rank
    from sdlora.evaluation.evaluate import evaluate
    from sdlora.export.export import export_adapter
    from sdlora.export.extract import extract
    from sdlora.export.merge_into_base import merge_into_base
    from sdlora.formats.files import inspect_adapter, load_adapter, save_adapter
    from sdlora.lora.adapter import Adapter
    from sdlora.rank.merge import merge
    from sdlora.rank.resize import resize
    from sdlora.rank.spectrum import spectrum
    from sdlora.runs import RunFolder
    from sdlora.sampling.session import sample
    from sdlora.training.train import resume, train
    from sdlora.tree.tree import AdapterTree

__version__ = version("sdlora")

# Imported at first use: torch and diffusers take seconds, and `sdlora --help` needs neither.
_PUBLIC = {
    "Adapter": "sdlora.lora.adapter",
    "AdapterTree": "sdlora.tree.tree",
    "RunConfig": "sdlora.config",
    "RunFolder": "sdlora.runs",
    "SdloraError": "sdlora.errors",
    "advise_rank": "sdlora.evaluation.advise",
    "evaluate": "sdlora.evaluation.evaluate",
    "export_adapter": "sdlora.export.export",
    "extract": "sdlora.export.extract",
    "inspect_adapter": "sdlora.formats.files",
    "load_adapter": "sdlora.formats.files",
    "load_config": "sdlora.config",
    "merge": "sdlora.rank.merge",
    "merge_into_base": "sdlora.export.merge_into_base",
    "resize": "sdlora.rank.resize",
    "resume": "sdlora.training.train",
    "sample": "sdlora.sampling.session",
    "save_adapter": "sdlora.formats.files",
    "spectrum": "sdlora.rank.spectrum",
    "train": "sdlora.training.train",
}

__all__ = [
    "Adapter",
    "AdapterTree",
    "RunConfig",
    "RunFolder",
    "SdloraError",
    "__version__",
    "advise_rank",
    "evaluate",
    "export_adapter",
    "extract",
    "inspect_adapter",
    "load_adapter",
    "load_config",
    "merge",
    "merge_into_base",
    "resize",
    "resume",
    "sample",
    "save_adapter",
    "spectrum",
    "train",
]


def __dir__() -> list[str]:
    """The public names, for tab completion: until their first use, nothing else has them."""
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sdlora' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
