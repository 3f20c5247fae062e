"""The proof that a LoRA file works elsewhere: a fresh stock pipeline does with it what was trained (R-01)."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdlora.errors import AdapterError, first_line, join_names
from sdlora.lora.adapter import Adapter, LowRank, as_float64
from sdlora.lora.attach import mounted
from sdlora.lora.modules import Model, components, named_modules
from sdlora.models.info import BaseInfo
from sdlora.models.load import load_stock_pipeline
from sdlora.models.quiet import without_bars

# Of the change of the output, and of a module's: fp16 rounding is at most 1e-3 of the whole, but a pipeline
# in bf16 rounds the factors to 8 bits.
TOLERANCE = 0.05
_CHECK_NAME = "check_7f3a9c"
_ABOUT_KEYS = re.compile(r"\bkeys?\b|ignored|mismatch", re.IGNORECASE)


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
    paths: Sequence[str | Path], adapter: Adapter, model: Model, info: BaseInfo
) -> list[PostflightReport]:
    """Loads each exported file into a fresh stock pipeline and compares it with the trained adapter (R-01).

    One more UNet, and of the text encoders those that the adapter changes, are loaded, once for all files.

    Args:
        paths: The files.
        adapter: The adapter as trained, before folding and rounding.
        model: The base's UNet, or components, in memory; what is mounted there is put aside meanwhile. With
            `base.quantize` it only says where things are: the adapter is mounted on the fresh parts.
        info: Where the fresh ones are loaded from.

    Raises:
        AdapterError: With exit code 1, if a file does not load, adapts other modules, or changes a part's
            output in another way than the trained adapter does; names the modules.
    """
    parts = {name: part for name, part in components(model).items() if name in adapter.components}
    weights = {name: next(part.parameters()) for name, part in components(model).items()}
    places = {name: (weight.device, weight.dtype) for name, weight in weights.items()}
    # A base of few bits answers otherwise than the full one, which is where a LoRA is used.
    outputs = _outputs(parts, adapter) if info.quantize == "none" else None
    with _waiting(components(model).values()):
        pipeline = load_stock_pipeline(info, dtype=places["unet"][1], only=["unet", *parts])
        fresh = {name: getattr(pipeline, name).to(places[name][0]) for name in parts}
        base, trained = outputs or _outputs(fresh, adapter)
        reports = []
        for path in map(Path, paths):
            problems = _load(pipeline, path, list(parts)) + _compare_modules(adapter, fresh)
            stock = {name: _run(name, part) for name, part in fresh.items()}
            for name in parts:
                problems += _compare_outputs(name, base[name], trained[name], stock[name], places[name][1])
            if problems:
                error = AdapterError(
                    f"{path} does not do in a fresh pipeline what was trained: {'; '.join(problems)}"
                )
                error.exit_code = 1
                raise error
            first = next(iter(parts))
            difference, effect = _distance(stock[first], trained[first]), _distance(stock[first], base[first])
            reports.append(PostflightReport(path, len(adapter.modules), difference, effect))
            pipeline.unload_lora_weights()
    return reports


def _outputs(parts: Mapping[str, Any], adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What parts answer without and with the adapter."""
    with mounted(parts, []):
        base = {name: _run(name, part) for name, part in parts.items()}
    with mounted(parts, [(adapter, 1.0)]):
        return base, {name: _run(name, part) for name, part in parts.items()}


@contextmanager
def _waiting(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Parts leave their device for a while: it need not hold two UNets."""
    homes = [(part, next(part.parameters()).device) for part in parts]
    try:
        for part, _ in homes:
            part.to("cpu")
        yield
    finally:
        for part, device in homes:
            part.to(device)


@torch.no_grad()
def _run(name: str, part: Any) -> Tensor:
    """A part's output for a fixed input, in fp32, without gradients and in eval mode."""
    was_training = part.training
    part.eval()
    try:
        answer: Tensor = _run_unet(part) if name == "unet" else _run_text_encoder(part)
    finally:
        part.train(was_training)
    return answer.float().cpu()


def _run_unet(unet: Any) -> Tensor:
    """Noise predicted, (1, C, H, W), at the UNet's own size."""
    weight = next(unet.parameters())
    config = unet.config
    # Enough for every level to see more than one place; an SDXL's own 128 would take a CPU minutes.
    side = 4 * 2 ** (len(config.block_out_channels) - 1)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, config.in_channels, side, side, generator=generator)
    hidden = torch.randn(1, 8, config.cross_attention_dim, generator=generator)
    added = None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.tensor([[512.0, 512.0, 0.0, 0.0, 512.0, 512.0]])
        added = {
            "text_embeds": torch.randn(1, pooled, generator=generator).to(weight),
            "time_ids": sizes.to(weight),
        }
    timestep = torch.tensor([500], device=weight.device)
    answer: Tensor = unet(
        latents.to(weight), timestep, encoder_hidden_states=hidden.to(weight), added_cond_kwargs=added
    ).sample
    return answer


def _run_text_encoder(encoder: Any) -> Tensor:
    """The states (1, L, D) of tokens spread over the vocabulary, or their projection (1, P)."""
    config = encoder.config
    tokens = torch.linspace(1, config.vocab_size - 1, config.max_position_embeddings).long()
    tokens[-1] = config.eos_token_id
    answer: Tensor = encoder(tokens[None].to(encoder.device))[0]
    return answer


def _load(pipeline: Any, path: Path, parts: Sequence[str]) -> list[str]:
    """Loads a file as a user does; what the libraries complain about are the problems."""
    with _heard() as complaints, without_bars():
        try:
            pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=_CHECK_NAME)
        except Exception as error:
            return [f"it does not load ({first_line(error)})"]
    # Always said of a part that a LoRA does not change.
    expected = re.compile(r"No LoRA keys associated to .*prefix='(\w+)'")
    heard = [(line, expected.match(line)) for line in complaints if _ABOUT_KEYS.search(line)]
    return [line for line, match in heard if not match or match[1] in parts]


class _Listener(logging.Handler):
    """Keeps the first line of each message."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(first_line(record.getMessage()))


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
        listener.lines += [first_line(item.message) for item in caught if issubclass(item.category, kinds)]
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def _compare_modules(adapter: Adapter, parts: Mapping[str, nn.Module]) -> list[str]:
    """Whether the fresh parts have the trained modules, each with the trained change."""
    loaded = _loaded_pairs(parts)
    problems = []
    if missing := sorted(set(adapter.modules) - set(loaded)):
        problems.append(f"{len(missing)} trained modules are missing ({join_names(missing)})")
    if unexpected := sorted(set(loaded) - set(adapter.modules)):
        problems.append(f"{len(unexpected)} modules were not trained ({join_names(unexpected)})")
    trained = {
        name: LowRank(pair.down, as_float64(pair.up) * adapter.scale_of(name))
        for name, pair in adapter.modules.items()
    }
    norms = {name: pair.norm_squared() for name, pair in trained.items()}
    typical = sum(norms.values()) / len(norms)
    # `not <=`, so that an error that is no number counts; a tiny module is measured by the typical one.
    wrong = [
        name
        for name, pair in loaded.items()
        if name in trained
        and not trained[name].minus(pair).norm_squared() <= TOLERANCE**2 * max(norms[name], typical)
    ]
    if wrong:
        problems.append(f"{len(wrong)} modules change in another way than trained ({join_names(wrong)})")
    return problems


def _loaded_pairs(parts: Mapping[str, nn.Module]) -> dict[str, LowRank]:
    """What PEFT's layers hold, by module, scale folded."""
    pairs: dict[str, LowRank] = {}
    for name, module in named_modules(parts):
        layer: Any = module
        if isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) and _CHECK_NAME in layer.lora_A:
            down, up = layer.lora_A[_CHECK_NAME].weight, layer.lora_B[_CHECK_NAME].weight
            pairs[name] = LowRank(down, as_float64(up) * layer.scaling[_CHECK_NAME])
    return pairs


def _compare_outputs(
    part: str, base: Tensor, trained: Tensor, stock: Tensor, dtype: torch.dtype
) -> list[str]:
    """Whether the output of a fresh part is the trained one's and not the base's."""
    title = "UNet" if part == "unet" else part
    difference, effect = _distance(stock, trained), _distance(trained, base)
    noise = 16 * torch.finfo(dtype).eps * float(trained.abs().max())
    if not _distance(stock, base) > 0:
        return [f"the {title}'s output is the base's"]
    if not difference <= TOLERANCE * effect + noise:
        return [f"the {title}'s output is {difference:.2g} off where the LoRA changes it by {effect:.2g}"]
    return []


def _distance(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference."""
    return float((one - other).abs().max())
