from __future__ import annotations

import pickle
import re

import pytest

from lunashm import errors
from lunashm.errors import BY_CODE, LunashmError, from_code


def classes() -> list[type[LunashmError]]:
    return [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, LunashmError)]


def test_every_error_has_a_code_of_its_own() -> None:
    assert len({cls.code for cls in classes()}) == len(classes())
    assert all("code" in vars(cls) for cls in classes())


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    assert sorted(drawn) == sorted(cls.__name__ for cls in classes() if cls is not LunashmError)


@pytest.mark.parametrize("cls", classes())
def test_error_comes_back_from_its_code_as_the_same_class(cls: type[LunashmError]) -> None:
    error = from_code(cls.code, "what happened")
    assert type(error) is cls
    assert (str(error), error.message) == ("what happened", "what happened")


def test_unknown_code_keeps_its_text() -> None:
    error = from_code("from_the_future", "something new")
    assert type(error) is LunashmError
    assert str(error) == "something new"


def test_errors_survive_pickling() -> None:
    """multiprocessing pickles what a worker raises."""
    assert pickle.loads(pickle.dumps(errors.HostLost("gone"))).message == "gone"


def test_by_code_knows_every_class() -> None:
    assert set(BY_CODE.values()) == set(classes())
