"""What tests share to check errors: by key, so that sentences are free to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sdlora.errors import SdloraError


@contextmanager
def raises(
    kind: type[SdloraError], *keys: str, shows: tuple[str, ...] | str = ()
) -> Iterator[pytest.ExceptionInfo[SdloraError]]:
    """Expects an error of a kind with these keys.

    Args:
        kind: The class.
        keys: Of the error: a setting such as `lora.rank`, or the mistake's own, such as `data.no-images`.
        shows: Values that the message has to name: a file, a number, a setting to change. No sentences.
    """
    with pytest.raises(kind) as caught:
        yield caught
    missing = set(keys) - set(caught.value.keys)
    assert not missing, f"{missing} not in {caught.value.keys}: {caught.value}"
    for value in (shows,) if isinstance(shows, str) else shows:
        assert value in str(caught.value), f"{value!r} is not shown by: {caught.value}"
