"""What a base is, told by its JSON files and tensor tables alone, before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdlora.config import BaseSection
from sdlora.errors import ModelError
from sdlora.models.families import FAMILIES, Family, describe_family, family_of
from sdlora.models.hub import find_folder
from sdlora.models.kinds import refuse_folder
from sdlora.models.weights import count_parameters, digest_weights, find_weights, read_header, read_json

UNET, TEXT = "diffusion_pytorch_model", "model"
PREDICTIONS = ("epsilon", "v_prediction", "sample")
NUM_TIME_IDS = 6
GIVE_BASE = "give an SD 1.x, SD 2.x or SDXL base"


@dataclass(frozen=True, eq=False)
class BaseInfo:
    """A base that was found whole.

    Args:
        source: As the user gave it.
        folder: The diffusers folder.
        vae_folder: The VAE in use: the base's own, or that of `base.vae`.
        name: For people and metadata: `builtin`, the hub id, or the folder's name.
        digest: Fingerprint of the UNet (see `digest_weights`); likewise of the VAE and of the text
            encoders with their tokenizers.
        text_length: Tokens of a prompt, the first and the last one included.
        zeroes_empty_prompt: Whether its pipeline takes zeros for the text states of an empty prompt.
        num_parameters: Of the UNet.
    """

    source: str
    folder: Path
    vae_folder: Path
    name: str
    family: str
    digest: str
    vae_digest: str
    text_digest: str
    text_length: int
    zeroes_empty_prompt: bool
    num_parameters: int
    scheduler_config: Mapping[str, Any] = field(repr=False)
    unet_config: Mapping[str, Any] = field(repr=False)
    vae_config: Mapping[str, Any] = field(repr=False)

    @property
    def is_builtin(self) -> bool:
        """Whether this is the base that comes with sdlora."""
        return self.source == "builtin"

    @property
    def traits(self) -> Family:
        """The family's row in the table."""
        return describe_family(self.family, self.prediction_type)

    @property
    def prediction_type(self) -> str:
        """What the UNet answers: epsilon, v_prediction or sample (R-32)."""
        return str(self.scheduler_config.get("prediction_type") or "epsilon")

    @property
    def num_train_timesteps(self) -> int:
        """Timesteps of the training schedule."""
        return int(self.scheduler_config.get("num_train_timesteps", 1000))

    @property
    def vae_factor(self) -> int:
        """Pixels per latent pixel, along a side."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def latent_channels(self) -> int:
        """C of the latents."""
        return int(self.vae_config["latent_channels"])

    @property
    def has_time_ids(self) -> bool:
        """Whether the UNet is told the sizes of each picture, as SDXL's is (R-31)."""
        return bool(self.unet_config.get("addition_embed_type") == "text_time")

    @property
    def min_step(self) -> int:
        """A picture's sides must be multiples of this many pixels; diffusers' UNets take any latent size."""
        return self.vae_factor

    @property
    def resolution(self) -> int:
        """The side in pixels that the base was trained for."""
        size = self.unet_config.get("sample_size")
        side = max(size) if isinstance(size, list | tuple) else size
        return int(side) * self.vae_factor if side else self.traits.resolution

    @property
    def guidance(self) -> float:
        """The guidance scale that suits the base."""
        return 3.0 if self.is_builtin else 7.5


def inspect_base(settings: BaseSection) -> BaseInfo:
    """Finds a base, and checks that it is whole and of a kind that can be trained.

    A hub id is brought into the hub's cache first; of files only JSON and tensor tables are read.

    Raises:
        ModelError: If it is missing, incomplete, truncated, or of another kind (R-25, R-40, R-44).
    """
    key = f"base.source = {settings.source}"
    folder = find_folder(settings.source, key, settings.revision)
    index, family = _check_kind(folder, key)
    encoders, tokenizers = FAMILIES[family].text_encoders, FAMILIES[family].tokenizers
    _check_parts(folder, encoders, tokenizers, key)
    vae_folder = _find_vae(settings.vae) if settings.vae else folder / "vae"
    unet, vae, scheduler, *texts = (
        read_json(file)
        for file in (
            folder / "unet" / "config.json",
            vae_folder / "config.json",
            folder / "scheduler" / "scheduler_config.json",
            *(folder / encoder / "config.json" for encoder in encoders),
        )
    )
    _check_latents(unet, vae, f"base.vae = {settings.vae}" if settings.vae else key)
    _check_texts(unet, texts, key)
    _check_prediction(scheduler, key)
    unet_files = find_weights(folder / "unet", UNET, key)
    vae_files = find_weights(vae_folder, UNET, key)
    text_files = [file for encoder in encoders for file in find_weights(folder / encoder, TEXT, key)]
    for file in (*vae_files, *text_files):
        read_header(file)
    words = [file for name in tokenizers for file in _word_files(folder / name)]
    zeroes = family == "sdxl" and bool(index.get("force_zeros_for_empty_prompt", True))
    local = settings.source != "builtin" and Path(settings.source).expanduser().is_dir()
    return BaseInfo(
        source=settings.source,
        folder=folder,
        vae_folder=vae_folder,
        name=folder.resolve().name if local else settings.source,
        family=family,
        digest=digest_weights(unet_files, unet),
        vae_digest=digest_weights(vae_files, vae),
        text_digest=digest_weights(
            [*text_files, *words], *texts, *([{"force_zeros_for_empty_prompt": True}] if zeroes else [])
        ),
        text_length=min(
            _text_length(folder / name, text) for name, text in zip(tokenizers, texts, strict=True)
        ),
        zeroes_empty_prompt=zeroes,
        num_parameters=count_parameters(unet_files),
        scheduler_config=scheduler,
        unet_config=unet,
        vae_config=vae,
    )


def _check_kind(folder: Path, key: str) -> tuple[dict[str, Any], str]:
    """The folder's index, and the family's name.

    Raises:
        ModelError: If it is no base, or one that cannot be trained.
    """
    if not (folder / "model_index.json").is_file():
        raise refuse_folder(folder, key)
    index = read_json(folder / "model_index.json")
    kind = str(index.get("_class_name"))
    if not kind.startswith("StableDiffusion") or "unet" not in index:
        raise ModelError(f"{key} is a {kind}, which sdlora does not train; {GIVE_BASE}")
    lacks_first = _has(index, "text_encoder_2") and not _has(index, "text_encoder")
    if lacks_first or index.get("requires_aesthetics_score"):
        raise ModelError(
            f"{key} is an SDXL refiner, which reworks the pictures of a base; "
            "give the SDXL base, and the LoRA works beside any refiner"
        )
    config = folder / "unet" / "config.json"
    unet = read_json(config) if config.is_file() else {}
    if unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise ModelError(f"{key} has a {unet['_class_name']} for its UNet; {GIVE_BASE}")
    return index, "sdxl" if _has(index, "text_encoder_2") or "XL" in kind else family_of(unet)


def _has(index: Mapping[str, Any], part: str) -> bool:
    """Whether a pipeline has a part; diffusers writes [null, null] for one that was left out."""
    entry = index.get(part)
    return isinstance(entry, list) and bool(entry[0])


def _check_parts(folder: Path, encoders: Sequence[str], tokenizers: Sequence[str], key: str) -> None:
    """Names every part that an interrupted copy left out."""
    needed = [f"{part}/config.json" for part in ("unet", "vae", *encoders)]
    needed.append("scheduler/scheduler_config.json")
    for name in tokenizers:
        if not (folder / name / "tokenizer.json").is_file():
            needed += [f"{name}/vocab.json", f"{name}/merges.txt"]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{key} is incomplete: {folder} lacks {', '.join(missing)}; download or copy it again"
        )


def _check_latents(unet: Mapping[str, Any], vae: Mapping[str, Any], key: str) -> None:
    """Refuses a UNet and a VAE that cannot work together."""
    channels, latent = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latent and unet.get("out_channels", 4) == latent:
        raise ModelError(
            f"{key} is an inpainting or depth base (UNet {channels} channels, VAE {latent}); "
            "give the text-to-image base of the family"
        )
    if channels != latent:
        raise ModelError(
            f"{key}: the UNet takes {channels} latent channels, the VAE makes {latent}; give a VAE that fits"
        )


def _check_texts(unet: Mapping[str, Any], texts: Sequence[Mapping[str, Any]], key: str) -> None:
    """Refuses a UNet and text encoders that cannot work together."""
    width, given = unet.get("cross_attention_dim", 1280), sum(text.get("hidden_size", 0) for text in texts)
    if given != width:
        raise ModelError(
            f"{key}: the UNet reads text of width {width}, "
            f"the text encoder{'s' * (len(texts) > 1)} give {given}; the parts are of different bases"
        )
    if unet.get("addition_embed_type") == "text_time":
        wanted = unet.get("projection_class_embeddings_input_dim")
        sizes, pooled = (
            NUM_TIME_IDS * unet.get("addition_time_embed_dim", 256),
            texts[-1].get("projection_dim", 512),
        )
        if wanted != sizes + pooled:
            raise ModelError(
                f"{key}: the UNet reads pooled text and sizes of width {wanted}, here they have "
                f"{pooled} and {sizes}; the parts are of different bases"
            )


def _check_prediction(scheduler: Mapping[str, Any], key: str) -> None:
    name = str(scheduler.get("_class_name"))
    if name.startswith("EDM"):
        raise ModelError(
            f"{key} was trained the EDM way ({name}), which sdlora does not train; "
            "give a base with an ordinary scheduler"
        )
    kind = scheduler.get("prediction_type") or "epsilon"
    if kind not in PREDICTIONS:
        raise ModelError(
            f"{key}: prediction_type = {kind!r} in its scheduler_config.json is not known; "
            f"it must be one of {', '.join(PREDICTIONS)}"
        )


def _word_files(folder: Path) -> list[Path]:
    """A tokenizer's files."""
    return [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".txt")]


def _find_vae(source: str) -> Path:
    """The folder of a separate VAE: its own, or the `vae` part of a base."""
    key = f"base.vae = {source}"
    folder = find_folder(source, key)
    if (folder / "vae" / "config.json").is_file():
        return folder / "vae"
    config = folder / "config.json"
    if config.is_file() and read_json(config).get("_class_name") == "AutoencoderKL":
        return folder
    raise ModelError(
        f"{key} is no VAE; give the folder of an AutoencoderKL (config.json and weights), or a base"
    )


def _text_length(tokenizer: Path, text: Mapping[str, Any]) -> int:
    """Tokens that both a tokenizer and its text encoder's positions allow."""
    file = tokenizer / "tokenizer_config.json"
    asked = read_json(file).get("model_max_length") if file.is_file() else None
    positions = int(text.get("max_position_embeddings", 77))
    return min(int(asked), positions) if asked else positions
