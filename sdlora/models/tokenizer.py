"""Captions as the base's tokenizer sees them; needs no weights and no torch."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import CLIPTokenizer

from sdlora.models.info import BaseInfo

WORD_END = "</w>"


@dataclass(frozen=True, slots=True)
class TokenCount:
    """A caption in tokens.

    Args:
        used: Number of its tokens, without the first and the last one of every prompt.
        limit: Number of tokens that the base reads.
        pieces: The tokens that are read, as text.
        lost: The words that are cut off, with a word cut in its middle; empty if all fit.
    """

    used: int
    limit: int
    pieces: tuple[str, ...]
    lost: str


def load_tokenizer(info: BaseInfo, number: int = 0) -> CLIPTokenizer:
    """A tokenizer of a base; SDXL's second has the same words and another padding."""
    spec = info.tokenizers[number]
    length = {"model_max_length": spec.length} if spec.length else {}
    return CLIPTokenizer.from_pretrained(spec.folder, local_files_only=True, **spec.settings, **length)


def count_tokens(tokenizer: CLIPTokenizer, text_length: int, caption: str) -> TokenCount:
    """Counts, splits and cuts a caption as the text encoder does (R-28), for a `BaseInfo.text_length`."""
    ids = tokenizer(caption, add_special_tokens=False, truncation=False, verbose=False).input_ids
    pieces = tokenizer.convert_ids_to_tokens(ids)
    limit = text_length - 2
    cut = min(limit, len(ids))
    while len(ids) > limit and cut > 0 and not pieces[cut - 1].endswith(WORD_END):
        cut -= 1
    return TokenCount(
        used=len(ids),
        limit=limit,
        pieces=tuple(piece.removesuffix(WORD_END) for piece in pieces[:limit]),
        lost=tokenizer.decode(ids[cut:]).strip() if len(ids) > limit else "",
    )
