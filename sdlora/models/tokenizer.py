"""Text as the base's tokenizer sees it: token ids in chunks, words that brackets weigh, and what is cut off.

B batch, K chunks, L tokens of a chunk. No weights of the base are needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import CLIPTokenizer

from sdlora.config import WEIGHT
from sdlora.errors import join_names, shorten
from sdlora.models.info import BaseInfo

# Of (word) and, divided, of [word].
STEP = 1.1
PIECE = re.compile(r"\\[()\[\]\\]|\(|\[|:\s*([+-]?[0-9]*\.?[0-9]+)\s*\)|\)|\]|[^\\()\[\]:]+|.", re.DOTALL)


def parse_weights(text: str) -> list[tuple[str, float]]:
    r"""Splits a text at its brackets into words and their weights, as A1111 does.

    `(word)` weighs 1.1, `((word))` 1.21, `[word]` 1 / 1.1, `(word:1.3)` 1.3; `\(` is a bracket. One that is
    not closed counts to the end.
    """
    parts: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []

    def scale(start: int, factor: float) -> None:
        parts[start:] = [(words, weight * factor) for words, weight in parts[start:]]

    for match in PIECE.finditer(text):
        piece, number = match[0], match[1]
        if piece in ("(", "["):
            opened.append((piece, len(parts)))
        elif number is not None and opened and opened[-1][0] == "(":
            scale(opened.pop()[1], float(number))
        elif piece in (")", "]") and opened and opened[-1][0] == {")": "(", "]": "["}[piece]:
            scale(opened.pop()[1], STEP if piece == ")" else 1 / STEP)
        else:
            is_escaped = len(piece) == 2 and piece[0] == "\\"
            parts.append((piece[1:] if is_escaped else piece, 1.0))
    for bracket, start in reversed(opened):
        scale(start, STEP if bracket == "(" else 1 / STEP)
    return parts


def without_weights(text: str) -> str:
    """The words that are read, without brackets and weights."""
    return "".join(words for words, _ in parse_weights(text))


def tokenize_chunks(
    tokenizer: CLIPTokenizer, captions: Sequence[str], length: int, chunks: int, *, weighted: bool
) -> tuple[list[list[int]], list[list[int]], list[list[float]]]:
    """Token ids, their attention mask, and their weights: B * K lists of L numbers.

    Each chunk has a first and a last token of its own, and is padded; A1111 and ComfyUI read long text so.
    """
    rows: list[list[int]] = []
    masks: list[list[int]] = []
    weights: list[list[float]] = []
    size = length - 2
    for caption in captions:
        ids: list[int] = []
        factors: list[float] = []
        for words, weight in parse_weights(caption) if weighted else [(caption, 1.0)]:
            found = tokenizer(words, add_special_tokens=False, truncation=False, verbose=False).input_ids
            ids += found
            factors += [weight] * len(found)
        for start in range(0, size * chunks, size):
            part = [tokenizer.bos_token_id, *ids[start : start + size], tokenizer.eos_token_id]
            rest = length - len(part)
            rows.append(part + [tokenizer.pad_token_id] * rest)
            masks.append([1] * len(part) + [0] * rest)
            weights.append([1.0, *factors[start : start + size], *[1.0] * (rest + 1)])
    return rows, masks, weights


WORD_END = "</w>"


@dataclass(frozen=True, slots=True)
class TokenCount:
    """A caption in tokens.

    Args:
        used: Number of its tokens, without the first and the last one of every prompt.
        limit: Number of tokens that the base reads.
        pieces: The tokens that are read, as text; those of one letter together.
        lost: The words that are cut off, with a word cut in its middle; empty if all fit.
        is_known: Whether it is a word that a small base was trained on.
    """

    used: int
    limit: int
    pieces: tuple[str, ...]
    lost: str
    is_known: bool


def load_tokenizer(info: BaseInfo, number: int = 0) -> CLIPTokenizer:
    """A tokenizer of a base; SDXL's second has the same words and another padding."""
    spec = info.tokenizers[number]
    length = {"model_max_length": spec.length} if spec.length else {}
    return CLIPTokenizer.from_pretrained(spec.folder, local_files_only=True, **spec.settings, **length)


def count_tokens(tokenizer: CLIPTokenizer, info: BaseInfo, caption: str) -> TokenCount:
    """Counts, splits and cuts a caption as the text encoder does."""
    limit = info.token_limit
    caption = without_weights(caption) if info.prompt_weights else caption
    ids = tokenizer(caption, add_special_tokens=False, truncation=False, verbose=False).input_ids
    pieces = tokenizer.convert_ids_to_tokens(ids)
    shown: list[str] = []
    start = 0
    for end in range(1, min(limit, len(ids)) + 1):
        # A letter beyond ASCII may need several tokens.
        is_plain = start == end - 1 and pieces[start].isascii()
        text = pieces[start].removesuffix(WORD_END) if is_plain else tokenizer.decode(ids[start:end])
        if "\ufffd" not in text:
            shown.append(text.strip())
            start = end
    cut = min(limit, len(ids))
    while len(ids) > limit and cut > 0 and not pieces[cut - 1].endswith(WORD_END):
        cut -= 1
    return TokenCount(
        used=len(ids),
        limit=limit,
        pieces=tuple(shown),
        lost=tokenizer.decode(ids[cut:]).strip() if len(ids) > limit else "",
        is_known=caption.lower() in info.known_words,
    )


def describe_cut_prompts(info: BaseInfo, prompts: Iterable[str]) -> str | None:
    """A line about the words of prompts that the base does not read; None if it reads all."""
    tokenizer, lines = load_tokenizer(info), []
    for prompt in dict.fromkeys(prompts):
        if (count := count_tokens(tokenizer, info, prompt)).lost:
            lines.append(f"{shorten(count.lost)!r} ({count.used} tokens, of which {count.limit} are read)")
    return (
        f"the base {info.name} does not read the end of some prompts: {join_names(lines)}" if lines else None
    )


def describe_bracketed_prompts(info: BaseInfo, prompts: Iterable[str]) -> str | None:
    """A line about weights in prompts that are taken as text; None if there are none, or they are read."""
    found = [match[0] for prompt in prompts for match in WEIGHT.finditer(prompt)]
    if info.prompt_weights or not found:
        return None
    names = join_names(map(shorten, dict.fromkeys(found)))
    return f"weights in prompts are taken as text: {names}; data.prompt_weights=true reads them"
