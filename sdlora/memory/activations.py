"""Peak memory of a run's networks beside their weights, and their arithmetic, on the meta device.

B batch, C channels, H W image size, h w latent size, L tokens.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from sdlora.data.cache import COSTS, add_note, read_notes
from sdlora.data.records import Size
from sdlora.lora.adapter import KINDS, Adapter
from sdlora.lora.attach import mount
from sdlora.lora.kinds import AdapterModule
from sdlora.lora.layers import carrier_layers
from sdlora.models.base import Base
from sdlora.models.info import BaseInfo
from sdlora.models.weights import empty_base, empty_model

META = torch.device("meta")
# Torch counts attention on GPUs only. Its backward pass needs twice the products of the forward pass.
_ATTEND = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION: dict[Any, Callable[..., int]] = {
    _ATTEND: lambda query, key, value, *rest, **more: sdpa_flop_count(query.shape, key.shape, value.shape),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, query, key, value, *rest, **more: (
            2 * sdpa_flop_count(query.shape, key.shape, value.shape)
        )
    ),
}


class Cost(NamedTuple):
    """The peak size in bytes of the tensors that a computation makes, and its arithmetic in FLOP.

    Products, convolutions and attention are counted, as torch's own counter does.
    """

    num_bytes: int
    flop: int


def measure_cost(compute: Callable[[], object], known: Iterable[Tensor] = ()) -> Cost:
    """Measures a computation; on the meta device that needs no memory and hardly any time.

    Tensors that autograd keeps for a backward pass count, and so do those that gradient checkpointing makes
    again; `known` tensors, such as weights, do not.
    """
    with _fused_attention(), _Followed(known) as followed:
        compute()
    return Cost(followed.peak, followed.flop)


class _Followed(TorchDispatchMode):
    """Follows every storage from the operation that makes it to its end, and counts the arithmetic."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.flop = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        known: Mapping[Any, Any] = CPU_ATTENTION if func._overloadpacket in CPU_ATTENTION else flop_registry
        if count := known.get(func._overloadpacket):
            self.flop += count(*args, **(kwargs or {}), out_val=made)
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return made

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention without its matrix of scores, which only the meta device would store.

    A TorchFunctionMode would not do: torch leaves it in a backward pass, where checkpointing attends again.
    """
    attention = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        if query.device != META:
            return attention(query, key, value, *rest, **options)
        answer: Tensor = _ATTEND(query, key, value)[0]
        return answer

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention


@dataclass(frozen=True)
class DenoiserPass:
    """A denoiser's forward pass with an adapter and, if it `learns`, its backward pass.

    `ranks` are those of the adapter's modules, by name, and `dtype` that of arithmetic and activations.
    """

    info: BaseInfo
    ranks: tuple[tuple[str, int], ...]
    latents: Size
    dtype: torch.dtype
    batch_size: int
    learns: bool
    checkpointing: bool = False
    kind: str = "lora"


@lru_cache(maxsize=64)
def denoiser_cost(task: DenoiserPass) -> Cost:
    """Cost of a pass without weights, with gradients of the adapter."""
    own = {name: value for name, value in vars(task).items() if name != "info"}
    return _remembered(task.info, own, lambda: [_measure_denoiser(task)])[0]


def _measure_denoiser(task: DenoiserPass) -> Cost:
    base = _build(task.info, task.dtype, task.checkpointing)
    adapter = _empty_adapter(base.denoiser, task.kind, dict(task.ranks), learns=task.learns)
    mount(base.denoiser, [(adapter, 1.0)] if adapter else [])
    inputs = base.example_inputs((task.latents.height, task.latents.width), task.batch_size)

    def compute() -> None:
        with torch.set_grad_enabled(task.learns):
            prediction = base.denoise(*inputs)
            if task.learns:
                prediction.square().mean().backward()

    return measure_cost(compute, [*_weights(base.denoiser), *(adapter.parameters() if adapter else [])])


@lru_cache(maxsize=3)
def _build(info: BaseInfo, dtype: torch.dtype, checkpointing: bool) -> Base:
    base = empty_base(info, dtype)
    if checkpointing:
        base.enable_gradient_checkpointing(text=False)
    return base


@lru_cache(maxsize=64)
def vae_costs(info: BaseInfo, size: Size, dtype: torch.dtype) -> tuple[Cost, Cost]:
    """Cost of encoding, and of decoding, one image of a size in pixels with a VAE of a dtype."""
    encode, decode = _remembered(info, {"vae": size, "dtype": dtype}, lambda: _measure_vae(info, size, dtype))
    return encode, decode


def _measure_vae(info: BaseInfo, size: Size, dtype: torch.dtype) -> list[Cost]:
    vae = empty_model("vae", info.vae_config)
    nn.Module.to(vae, dtype)
    latents = (1, info.latent_channels, size.height // info.vae_factor, size.width // info.vae_factor)
    pixels = torch.empty(1, 3, size.height, size.width, dtype=dtype, device=META)
    noise = torch.empty(latents, dtype=dtype, device=META)
    weights = _weights(vae)
    with torch.no_grad():
        return [
            measure_cost(lambda: vae.encode(pixels), weights),
            measure_cost(lambda: vae.decode(noise), weights),
        ]


def _remembered(info: BaseInfo, task: Mapping[str, object], measure: Callable[[], list[Cost]]) -> list[Cost]:
    """Costs from the cache if these versions have measured them before: measuring takes seconds."""
    try:
        versions = [version(name) for name in ("sdlora", "torch", "diffusers")]
    except PackageNotFoundError:  # a checkout that is not installed: nothing tells its versions apart
        return measure()
    parts = repr((versions, info.fingerprint, info.num_text_states, task))
    key = hashlib.sha256(parts.encode()).hexdigest()
    with suppress(KeyError, TypeError, ValueError):
        return [Cost(int(num_bytes), int(flop)) for num_bytes, flop in read_notes(COSTS)[key]]
    costs = measure()
    add_note(COSTS, key, costs)
    return costs


def text_peak(
    encoders: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    tokens: int,
    captions: int,
    kind: str = "lora",
) -> int:
    """Peak bytes of a forward and backward pass of trained text encoders in fp32, with gradients.

    The encoders are on the meta device; the adapter with these ranks stays mounted on them.
    """
    adapter = _empty_adapter(encoders, kind, ranks, learns=True)
    if adapter is None:
        return 0
    mount(encoders, [(adapter, 1.0)])
    ids = torch.zeros(captions, tokens, dtype=torch.long, device=META)

    def compute() -> None:
        answers: list[Any] = [encoder(ids)[0] for encoder in encoders.values()]
        torch.cat([answer.flatten() for answer in answers]).square().mean().backward()

    return measure_cost(compute, [*_weights(*encoders.values()), *adapter.parameters()]).num_bytes


def _weights(*networks: nn.Module) -> list[Tensor]:
    return [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]


def _empty_adapter(model: Any, kind: str, ranks: Mapping[str, int], *, learns: bool) -> Adapter | None:
    layers, modules = carrier_layers(model), dict[str, AdapterModule]()
    for name, rank in ranks.items():
        shapes = KINDS[kind].shapes(layers[name], rank).items()
        tensors = {part: torch.empty(shape, device=META, requires_grad=learns) for part, shape in shapes}
        modules[name] = KINDS[kind](**tensors)
    return Adapter(modules, max(ranks.values()), 1.0) if modules else None
