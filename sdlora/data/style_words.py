"""Words in captions that take the style away from the trigger, and captions that say too little.

What every caption says, a prompt must say too: the style is learned with those words, not with the trigger.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from sdlora.data.captions import without_trigger
from sdlora.data.records import ImageRecord, Noticed
from sdlora.errors import shorten

_KINDS = r"(?:oil|digital|ink|acrylic|watercolou?r|gouache|pencil|charcoal|crayon|pastel|pen|line|chalk)"
_WORKS = r"(?:painting|drawing|sketch|illustration|doodle|cartoon|comic|engraving|etching|woodcut|linocut)"
_MEDIA = (
    rf"(?:{_KINDS} )?{_WORKS}|(?:line|pixel|vector|clip|concept|digital|fan) ?art|artwork|rendering|render|"
    r"photograph|photo|emoji|icon|sticker|watercolou?r|anime|manga"
)
# As a medium: `a watercolor painting of`, `in the style of`, `flat design`. A pencil is a thing.
STYLE = re.compile(
    rf"\b(?:(?:an? )?(?:{_MEDIA}) of\b|{_KINDS} {_WORKS}\b|"
    r"(?:line|pixel|vector|clip|concept|digital|fan) ?art\b|flat (?:design|colou?rs?|vector)\b|"
    r"in (?:the |an? )?(?:[\w-]+ )?style(?: of [\w ]+)?\b|(?:[\w-]+ )?style\b|"
    r"(?:watercolou?r|gouache|impasto|cel[ -]shad(?:ed|ing)|monochrome|gr[ae]yscale|sepia)\b|"
    r"(?:simple|plain|white|black) background\b)",
    re.IGNORECASE,
)
# Whole tags, as Danbooru has them: `watercolor (medium)`, `1990s (style)`.
STYLE_TAG = re.compile(
    r".*\((?:medium|style)\)|traditional media|(?:no )?lineart|sketch|comic|\dkoma|3d|(?:photo)?realistic|"
    r"(?:spot|partial|muted|pale) colou?r|limited palette|.*(?:artstyle|colou?ring)",
    re.IGNORECASE,
)
_STOP = frozenset(
    re.findall(
        r"\w+",
        "the an of in on at with and or to by for from is are as it its his her their this that two three "
        "one up over under near front side view small large big",
    )
)
WORD = re.compile(r"[^\W\d_]{2,}")
FEW, SAME_SHARE, SUBJECT_SHARE, CONSTANT_SHARE = 8, 0.1, 0.4, 0.9


def examine_words(records: Sequence[ImageRecord], noticed: Noticed) -> None:
    """Captions that are the same, that name the style, or of which most have a word."""
    # Class images show no style, and may well have one caption.
    written = [one for one in records if one.caption_source != "trigger" and not one.is_class]
    texts = {
        one.name: without_trigger(one.caption, one.trigger) if one.trigger else " ".join(one.caption.split())
        for one in written
    }
    texts = {name: text.strip(" ,") for name, text in texts.items()}
    texts = {name: text for name, text in texts.items() if text}
    for name, text in texts.items():
        tags = map(STYLE_TAG.fullmatch, text.split(", ")) if "," in text else ()
        if found := STYLE.search(text) or next(filter(None, tags), None):
            noticed["data.caption-style"][name] = repr(found[0].lower())
    if len(texts) < FEW:
        return
    groups: dict[str, list[str]] = defaultdict(list)
    for name, text in texts.items():
        groups[text.lower()].append(name)
    same: set[str] = set()
    for text, names in groups.items():
        if len(names) >= max(3, SAME_SHARE * len(texts)):
            same |= set(WORD.findall(text))
            noticed["data.caption-same"] |= dict.fromkeys(names, shorten(repr(text[:40])))
    styled = {name: STYLE.sub(" ", text).lower() for name, text in texts.items()}
    counts = Counter(word for text in styled.values() for word in set(WORD.findall(text)) - _STOP)
    for word, count in sorted(counts.items(), key=lambda row: (-row[1], row[0]))[:5]:
        share = count / len(texts)
        if share >= SUBJECT_SHARE and word not in same:
            key = "data.caption-constant" if share >= CONSTANT_SHARE else "data.caption-subject"
            noticed[key][repr(word)] = f"in {count} of {len(texts)}"
