"""From "these tensors, in these dtypes" to the shortest list of prefix rules. Knows no ComfyUI and no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lunashm.manifest import CONVERTIBLE, DtypeRule


def rules_for(stored: Mapping[str, str], wanted: Mapping[str, str]) -> tuple[DtypeRule, ...]:
    """Rules that give every tensor of ``wanted`` its dtype and speak of no other tensor that could be converted.

    ``stored``: dtype of every tensor in the file. Tensors nobody wants stay free, so that a client which needs only a
    part of a model can use whatever the host has already.
    """
    return tuple(sorted(_cover("", sorted(stored), stored, wanted)))


def _cover(prefix: str, names: list[str], stored: Mapping[str, str], wanted: Mapping[str, str]) -> Iterable[DtypeRule]:
    convertible = [name for name in names if stored[name] in CONVERTIBLE]
    dtypes = {wanted.get(name) for name in convertible}
    if not dtypes or dtypes == {None}:
        return
    if len(dtypes) == 1:
        yield DtypeRule(prefix, dtypes.pop() or "")
        return
    branches: dict[str, list[str]] = {}
    for name in convertible:
        head, dot, _ = name[len(prefix) :].partition(".")
        branches.setdefault(prefix + head + dot, []).append(name)
    for branch, below in branches.items():
        if branch == prefix:  # a name that is a prefix of its siblings
            dtype = wanted.get(below[0])
            if dtype is not None:
                yield DtypeRule(branch, dtype)
        else:
            yield from _cover(branch, below, stored, wanted)
