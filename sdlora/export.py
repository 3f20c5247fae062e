"""An adapter leaves the house: files for other programs, the proof that they load, and the upload."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn

from sdlora.errors import AdapterError
from sdlora.lora.adapter import Adapter, LowRank
from sdlora.lora.attach import mounted
from sdlora.lora.files import load_adapter, save_adapter
from sdlora.lora.formats import Precision, Rounding, round_adapter
from sdlora.lora.names import Dialect
from sdlora.models.info import BaseInfo
from sdlora.models.load import load_stock_pipeline
from sdlora.runs import RunFolder

# Of the change of the output, and of a module's: fp16 rounding is at most 1e-3 of the whole, but a pipeline
# in bf16 rounds the factors to 8 bits.
TOLERANCE = 0.05
_CHECK_NAME = "check_7f3a9c"
_ABOUT_KEYS = re.compile(r"\bkeys?\b|ignored|mismatch", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written."""

    path: Path
    dialect: Dialect
    rounding: Rounding
    size_bytes: int

    @property
    def precision(self) -> Precision:
        """The precision of the file, which may be larger than asked (R-36)."""
        return self.rounding.used

    def __str__(self) -> str:
        rounding = self.rounding
        error = f"relative error {rounding.relative_error:.1e}, newly zero {rounding.newly_zero_share:.2%}"
        if rounding.used != rounding.asked:
            error = f"{rounding.asked} would lose too much, {error}, so it stays {rounding.used}"
        return f"{self.path} ({self.dialect}, {self.precision}, {self.size_bytes / 1e6:.2f} MB; {error})"

    def lines(self) -> list[str]:
        """For people."""
        return [f"wrote     {self}"]


def export_adapter(
    adapter: Adapter,
    path: str | Path,
    *,
    dialect: Dialect = "diffusers",
    precision: Precision = "fp16",
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Writes an adapter for other programs: scale folded, rounded where that loses nothing (R-02, R-36).

    Args:
        adapter: As trained, or as read from any file.
        path: The `.safetensors` file.
        dialect: `diffusers`, or `kohya` for A1111, Forge, ComfyUI and kohya's tools.
        precision: As asked; a file that would lose too much stays fp32.
        metadata: From `run_metadata`. Not given, the adapter's notes go on (a file that is converted
            keeps what it says, the run's own dates included).

    Raises:
        AdapterError: If the adapter is not finite or changes nothing (R-06), or the place is not writable.
    """
    if Path(path).suffix != ".safetensors":
        raise AdapterError(f"--out {path} must end in .safetensors; other programs go by that")
    rounded, rounding = round_adapter(adapter, precision)
    file = save_adapter(path, rounded, dialect=dialect, metadata=metadata)
    return ExportReport(file, dialect, rounding, file.stat().st_size)


def export(
    source: str | Path,
    out: str | Path,
    *,
    dialect: Dialect = "diffusers",
    precision: Precision = "fp16",
) -> ExportReport:
    """Writes a run's adapter, or a LoRA file of any dialect, as another file; its metadata goes along.

    Args:
        source: A run folder or a LoRA file.
        out: The `.safetensors` file to write.

    Raises:
        AdapterError: If the source is no LoRA, or the file cannot be written.
        RunError: If the run has saved no adapter yet.
    """
    return export_adapter(load_adapter(find_adapter(source)), out, dialect=dialect, precision=precision)


def find_adapter(source: str | Path) -> Path:
    """The LoRA file of a run, or the file itself."""
    run = RunFolder(source)
    return run.adapter if run.config_file.is_file() else run.path


@dataclass(frozen=True, slots=True)
class PostflightReport:
    """How a file behaves in a fresh stock pipeline."""

    path: Path
    num_modules: int
    difference: float
    """Largest absolute difference of the UNet's output from the trained model's."""
    effect: float
    """Largest absolute difference of the UNet's output from the base's."""

    def __str__(self) -> str:
        return (
            f"{self.path.name} in a fresh diffusers pipeline: {self.num_modules} modules, output "
            f"{self.effect:.2g} from the base's, {self.difference:.1g} from the trained model's"
        )


def postflight(
    paths: Sequence[str | Path], adapter: Adapter, unet: nn.Module, info: BaseInfo
) -> list[PostflightReport]:
    """Loads each exported file into a fresh stock pipeline and compares it with the trained adapter (R-01).

    Only one more UNet is in memory, loaded once for all files.

    Args:
        paths: The files.
        adapter: The adapter as trained, before folding and rounding.
        unet: The base's UNet in memory; what is mounted on it is put aside meanwhile.
        info: Where the fresh one is loaded from.

    Raises:
        AdapterError: With exit code 1, if a file does not load, adapts other modules, or changes the UNet
            in another way than the trained adapter does; names the modules.
    """
    weight = next(unet.parameters())
    with mounted(unet, []):
        base = _run(unet)
    with mounted(unet, [(adapter, 1.0)]):
        trained = _run(unet)
    pipeline = load_stock_pipeline(info, dtype=weight.dtype, unet_only=True)
    pipeline.unet.to(weight.device)
    reports = []
    for path in map(Path, paths):
        problems = _load(pipeline, path) + _compare_modules(adapter, pipeline.unet)
        stock = _run(pipeline.unet)
        problems += _compare_outputs(base, trained, stock, weight.dtype)
        if problems:
            error = AdapterError(
                f"{path} does not do in a fresh pipeline what was trained: {'; '.join(problems)}"
            )
            error.exit_code = 1
            raise error
        difference, effect = _distance(stock, trained), _distance(stock, base)
        reports.append(PostflightReport(path, len(adapter.modules), difference, effect))
        pipeline.unload_lora_weights()
    return reports


def _run(unet: Any) -> Tensor:
    """The output (1, C, H, W) for a fixed input, in fp32, without gradients and in eval mode."""
    weight = next(unet.parameters())
    config = unet.config
    size = config.sample_size or 64
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, config.in_channels, height, width, generator=generator)
    hidden = torch.randn(1, 8, config.cross_attention_dim, generator=generator)
    added = _added_conditions(config, generator)
    timestep = torch.tensor([500], device=weight.device)
    was_training = unet.training
    unet.eval()
    try:
        with torch.no_grad():
            answer = unet(
                latents.to(weight),
                timestep,
                encoder_hidden_states=hidden.to(weight),
                added_cond_kwargs=added and {name: values.to(weight) for name, values in added.items()},
            ).sample
    finally:
        unet.train(was_training)
    output: Tensor = answer.float().cpu()
    return output


def _added_conditions(config: Any, generator: torch.Generator) -> dict[str, Tensor] | None:
    """Pooled text (1, P) and time ids (1, 6) for a UNet that is told sizes, else None."""
    if config.addition_embed_type != "text_time":
        return None
    width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    sizes = torch.tensor([[512.0, 512.0, 0.0, 0.0, 512.0, 512.0]])
    return {"text_embeds": torch.randn(1, width, generator=generator), "time_ids": sizes}


def _load(pipeline: Any, path: Path) -> list[str]:
    """Loads a file as a user does; what the libraries complain about are the problems."""
    with _heard() as complaints:
        try:
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=_CHECK_NAME)
        except Exception as error:
            return [f"it does not load ({_first_line(error)})"]
    # A LoRA for the UNet alone always brings the line about the text encoder.
    expected = re.compile(r"No LoRA keys associated to .*prefix='text_encoder(_2)?'")
    return [line for line in complaints if _ABOUT_KEYS.search(line) and not expected.match(line)]


class _Listener(logging.Handler):
    """Keeps the first line of each message."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(_first_line(record.getMessage()))


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collects the warnings of diffusers and PEFT in place of printing them."""
    listener, logger = _Listener(), logging.getLogger("diffusers")
    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [listener], False
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield listener.lines
        kinds = (RuntimeWarning, UserWarning)
        listener.lines += [_first_line(item.message) for item in caught if issubclass(item.category, kinds)]
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def _compare_modules(adapter: Adapter, unet: nn.Module) -> list[str]:
    """Whether the fresh UNet has the trained modules, each with the trained change."""
    loaded = _loaded_pairs(unet)
    problems = []
    if missing := sorted(set(adapter.modules) - set(loaded)):
        problems.append(f"{len(missing)} trained modules are missing ({_some(missing)})")
    if unexpected := sorted(set(loaded) - set(adapter.modules)):
        problems.append(f"{len(unexpected)} modules were not trained ({_some(unexpected)})")
    exact = {
        name: LowRank(pair.down, pair.up.detach().double() * adapter.scale_of(name))
        for name, pair in adapter.modules.items()
    }
    norms = {name: pair.norm_squared() for name, pair in exact.items()}
    typical = sum(norms.values()) / len(norms)
    # `not <=`, so that an error that is no number counts; a tiny module is measured by the typical one.
    wrong = [
        name
        for name, pair in loaded.items()
        if name in exact
        and not exact[name].minus(pair).norm_squared() <= TOLERANCE**2 * max(norms[name], typical)
    ]
    if wrong:
        problems.append(f"{len(wrong)} modules change in another way than trained ({_some(wrong)})")
    return problems


def _loaded_pairs(unet: nn.Module) -> dict[str, LowRank]:
    """What PEFT's layers hold, by module, scale folded."""
    pairs: dict[str, LowRank] = {}
    for name, module in unet.named_modules():
        layer: Any = module
        if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) and _CHECK_NAME in layer.lora_A:
            down, up = layer.lora_A[_CHECK_NAME].weight, layer.lora_B[_CHECK_NAME].weight
            pairs[name] = LowRank(down, up.detach().double() * layer.scaling[_CHECK_NAME])
    return pairs


def _compare_outputs(base: Tensor, trained: Tensor, stock: Tensor, dtype: torch.dtype) -> list[str]:
    """Whether the fresh UNet's output is the trained one's and not the base's."""
    difference, effect = _distance(stock, trained), _distance(trained, base)
    noise = 16 * torch.finfo(dtype).eps * float(trained.abs().max())
    if not _distance(stock, base) > 0:
        return ["the UNet's output is the base's"]
    if not difference <= TOLERANCE * effect + noise:
        return [f"the UNet's output is {difference:.2g} off where the LoRA changes it by {effect:.2g}"]
    return []


def _distance(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference."""
    return float((one - other).abs().max())


def push_run(source: str | Path, repo_id: str, *, api: Any = None) -> str:
    """Uploads a run's final files, model card and grid, or a single LoRA file.

    Args:
        source: A run folder, or a LoRA file; a README.md beside it goes along.
        repo_id: `owner/name`; made if it does not exist.
        api: A `huggingface_hub.HfApi`, or one like it.

    Returns:
        Where the files are.
    """
    run = RunFolder(source)
    if not run.config_file.is_file():
        file = find_adapter(source)
        load_adapter(file)
        card = file.with_name("README.md")
        return push_to_hub({path.name: path for path in (file, card) if path.is_file()}, repo_id, api=api)
    files = {run.adapter.name: run.adapter}
    for path in (run.final_adapter("kohya"), run.model_card):
        if path.is_file():
            files[path.name] = path
    grids = [*sorted(run.samples.glob("step-*/grid.png")), *run.adapters.glob("grid.png")]
    if grids:
        files["grid.png"] = grids[-1]
    return push_to_hub(files, repo_id, api=api)


def push_to_hub(files: Mapping[str, Path], repo_id: str, *, api: Any = None) -> str:
    """Uploads files to Hugging Face in one commit; the repository is made if it does not exist.

    Args:
        files: Name there to file here.
        repo_id: `owner/name`.
        api: A `huggingface_hub.HfApi`, or one like it.

    Returns:
        Where the files are.

    Raises:
        AdapterError: With exit code 1, if that fails: no network, no token, no right to write.
    """
    api = HfApi() if api is None else api
    try:
        url = str(api.create_repo(repo_id, exist_ok=True))
        with tempfile.TemporaryDirectory() as folder:
            for name, file in files.items():
                shutil.copyfile(file, Path(folder) / name)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Add a style LoRA")
    except Exception as problem:
        error = AdapterError(
            f"upload to {repo_id} failed: {_first_line(problem)}; check the network and the name, and log in "
            "with `hf auth login` (a token that may write)"
        )
        error.exit_code = 1
        raise error from problem
    return url


def _first_line(value: object) -> str:
    lines = str(value).strip().splitlines()
    return lines[0][:300] if lines else type(value).__name__


def _some(names: Sequence[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
