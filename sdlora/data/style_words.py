"""Words in captions that take the style away from the trigger, and captions that say too little.

What every caption says, a prompt must say too: the style is learned with those words, not with the trigger.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from sdlora.data.captions import trigger_pattern
from sdlora.data.records import ImageRecord, Noticed
from sdlora.errors import shorten

_MEDIA = (
    "watercolou?rs?|gouache|acrylic|(?:oil|digital|ink|acrylic|watercolou?r) painting|painting|sketch|doodle|drawing|"
    "illustration|line ?art|lineart|cartoon|comic|manga|anime|artwork|clip ?art|pixel art|vector art|concept art|"
    "digital art|fan ?art|render(?:ing)?|engraving|etching|woodcut|lithograph|linocut|pastel|charcoal|crayon|"
    "impasto|icon|emoji|sticker|logo"
)
# As a medium: `a watercolor painting of`, `in the style of`, `flat design`; `a pencil` is a thing.
STYLE = re.compile(
    rf"\b(?:(?:{_MEDIA}) of\b|in (?:the |an? )?(?:\w+ )?style of\b|(?:\w+[ -])?style\b|(?:{_MEDIA}) style\b|"
    r"line ?art\b|lineart\b|(?:oil|digital|watercolou?r|acrylic|ink|gouache) (?:painting|drawing|illustration|sketch)\b|"
    r"(?:pixel|vector|clip|concept|digital|fan) art\b|flat (?:design|colou?rs?|vector)\b|(?:black|white) ink\b|"
    r"(?:watercolou?r|gouache|cel[ -]shad(?:ed|ing)|monochrome|grayscale|greyscale|sepia)\b|"
    r"(?:simple|white|black) background\b|(?:pencil|charcoal|crayon|pastel) (?:drawing|sketch)\b)",
    re.IGNORECASE,
)
_STOP = frozenset(
    "a an the of in on at with and or to by for from is are as it its his her their this that two three one "
    "up over under near front side view small large big".split()
)
WORD = re.compile(r"[^\W\d_]{2,}")
FEW, SAME_SHARE, SUBJECT_SHARE, CONSTANT_SHARE = 8, 0.1, 0.4, 0.9


def examine_words(records: Sequence[ImageRecord], trigger: str | None, noticed: Noticed) -> None:
    """Captions that are the same, that name the style, or of which most have a word."""
    pattern = trigger_pattern(trigger) if trigger else None
    texts = {record.name: pattern.sub(" ", record.caption) if pattern else record.caption for record in records}
    texts = {name: " ".join(text.split()).strip(" ,") for name, text in texts.items()}
    texts = {name: text for name, text in texts.items() if text}
    for name, text in texts.items():
        if found := STYLE.search(text):
            noticed["data.caption-style"][name] = repr(found[0].lower())
    if len(texts) < FEW:
        return
    groups: dict[str, list[str]] = defaultdict(list)
    for name, text in texts.items():
        groups[text.lower()].append(name)
    for text, names in groups.items():
        if len(names) >= max(3, SAME_SHARE * len(texts)):
            noticed["data.caption-same"] |= dict.fromkeys(names, shorten(repr(text[:40])))
    styled = {name: STYLE.sub(" ", text).lower() for name, text in texts.items()}
    counts = Counter(word for text in styled.values() for word in set(WORD.findall(text)) - _STOP)
    for word, count in counts.most_common(5):
        share = count / len(texts)
        if share >= SUBJECT_SHARE and len(groups) > 1:
            key = "data.caption-constant" if share >= CONSTANT_SHARE else "data.caption-subject"
            noticed[key][repr(word)] = f"in {count} of {len(texts)}"
