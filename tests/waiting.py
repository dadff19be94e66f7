"""The one way a test waits: for a condition, until a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import pytest

_T = TypeVar("_T")

DEADLINE_S = 20.0
"""For what takes milliseconds on an idle machine; only a broken program reaches it."""

_LOOK_S = 0.005


def until(condition: Callable[[], _T], what: str, deadline_s: float = DEADLINE_S) -> _T:
    """The first true value of ``condition``; fails the test, saying ``what`` did not come true."""
    end = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            pytest.fail(f"{what}: not within {deadline_s:g} s")
        time.sleep(_LOOK_S)
