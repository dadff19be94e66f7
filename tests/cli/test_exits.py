from __future__ import annotations

import inspect

import pytest

from lunashm import errors
from lunashm.cli import exits
from lunashm.errors import LunashmError

TREE = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, LunashmError)
]  # fmt: skip


@pytest.mark.parametrize("kind", TREE)
def test_every_error_has_an_exit_code_that_is_documented(kind):
    assert exits.CODES[kind] in exits.MEANINGS
    assert exits.CODES[kind] not in (exits.OK, exits.INTERRUPTED)


def test_codes_keep_their_numbers():
    assert [exits.OK, exits.ERROR, exits.USAGE, exits.NO_HOST, exits.NOT_FOUND] == [0, 1, 2, 3, 4]
    assert [exits.REFUSED, exits.NO_MEMORY, exits.SERVING, exits.TIMEOUT] == [5, 6, 7, 8]


def test_an_unknown_subclass_ends_like_its_ancestor():
    class Newer(errors.ModelNotFound):
        pass

    assert exits.code_of(Newer("x")) == exits.NOT_FOUND


def test_help_ends_with_every_code(cli):
    shown = " ".join(cli("--help").out.split())
    for code, meaning in exits.MEANINGS.items():
        assert f"{code} {meaning}" in shown
