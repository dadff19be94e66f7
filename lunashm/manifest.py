"""What a model is made of: tensor specs, dtypes, where each lies. Knows no torch, no sockets, no memory.

A :class:`Manifest` is immutable and complete: with it and one mapping per segment a client rebuilds the whole
state dict. Dtype names are safetensors' own (``F32``, ``BF16``, ``F8_E4M3`` ...).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import msgspec

from lunashm.errors import InvalidCheckpoint, UnsupportedFormat

ALIGNMENT = 256
"""Bytes. What CUDA's allocator guarantees and vectorised CPU kernels like."""

ITEMSIZE: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes per element of every dtype lunashm can serve."""

CONVERTIBLE = frozenset({"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"})
"""Dtypes a variant may convert from and to. Integers, booleans and scales (F8_E8M0) never change."""


class DtypeRule(msgspec.Struct, frozen=True, array_like=True, order=True, forbid_unknown_fields=True):
    """Tensors whose name starts with ``prefix`` are wanted as ``dtype``; ``""`` means as stored in the file.

    The longest prefix wins. A tensor that no rule speaks of may come in any dtype: the client does not use it.
    """

    prefix: str
    dtype: str


PRIVATE = -1
"""``TensorSpec.segment`` of a tensor that lies in no segment: a client's own copy, never sent by a host."""

MAX_RANK = 64
"""Dimensions a tensor may have: torch's own limit."""

MAX_EXTENT = 1 << 62
"""Bound on every size and offset, and on the bytes a tensor would have without its empty dimensions: strides fit."""


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor: ``offset`` is in bytes from the start of segment number ``segment``; row-major, no strides.

    ``stored`` is its dtype in the file, ``dtype`` the one it is served in.
    """

    name: str
    stored: str
    dtype: str
    shape: tuple[int, ...]
    segment: int
    offset: int
    nbytes: int


class Source(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Which file a model came from, as stat saw it. Two equal sources are the same bytes, as far as stat can say."""

    path: str
    size: int
    mtime_ns: int
    inode: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything a client has to know about one generation of one model.

    ``digest`` is BLAKE3 over the whole source file (what ``b3sum`` prints), ``segments`` the byte size of each
    segment, ``rules`` the dtype conversions that were applied, ``metadata`` the file's own ``__metadata__``.
    ``source`` is the file as the reader of this manifest asked for it: several files may hold the same bytes.
    A private copy has no digest, generation 0 and no segments.
    """

    name: str
    digest: str
    generation: int
    source: Source
    rules: tuple[DtypeRule, ...]
    tensors: tuple[TensorSpec, ...]
    segments: tuple[int, ...]
    metadata: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, padding not counted."""
        return sum(spec.nbytes for spec in self.tensors)


def check_rules(rules: Iterable[DtypeRule]) -> tuple[DtypeRule, ...]:
    """Sorted, duplicate-free rules. Raises UnsupportedFormat for a dtype no tensor can be converted to."""
    unique: dict[str, str] = {}
    for rule in rules:
        if rule.dtype and rule.dtype not in CONVERTIBLE:
            raise UnsupportedFormat(
                f"cannot convert {rule.prefix or 'all tensors'!r} to {rule.dtype!r}; "
                f"choose one of {', '.join(sorted(CONVERTIBLE))}"
            )
        if unique.setdefault(rule.prefix, rule.dtype) != rule.dtype:
            raise UnsupportedFormat(f"two dtypes for prefix {rule.prefix!r}: {unique[rule.prefix]} and {rule.dtype}")
    return tuple(DtypeRule(prefix, dtype) for prefix, dtype in sorted(unique.items()))


class RuleBook:
    """Answers "as what is this tensor wanted?" for a set of rules, longest prefix first."""

    def __init__(self, rules: Iterable[DtypeRule]) -> None:
        self._by_length: dict[int, dict[str, str]] = {}
        for rule in rules:
            self._by_length.setdefault(len(rule.prefix), {})[rule.prefix] = rule.dtype
        self._lengths = sorted(self._by_length, reverse=True)

    def wanted(self, name: str) -> str | None:
        """The dtype some rule asks for (``""``: as stored), or None where no rule speaks of ``name``."""
        for length in self._lengths:
            dtype = self._by_length[length].get(name[:length])
            if dtype is not None:
                return dtype
        return None

    def resolve(self, name: str, stored: str) -> str:
        """The dtype a tensor stored as ``stored`` is served in."""
        if stored not in CONVERTIBLE:
            return stored
        return self.wanted(name) or stored

    def satisfied_by(self, tensors: Iterable[TensorSpec]) -> bool:
        """Whether a client with these rules can use these tensors."""
        return all(
            self.wanted(spec.name) is None or self.resolve(spec.name, spec.stored) == spec.dtype for spec in tensors
        )


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a dense tensor.

    Raises UnsupportedFormat for an unknown dtype, InvalidCheckpoint for a shape that no tensor can have.
    """
    itemsize = ITEMSIZE.get(dtype)
    if itemsize is None:
        raise UnsupportedFormat(f"dtype {dtype!r} is not one lunashm can serve ({', '.join(ITEMSIZE)})")
    if len(shape) > MAX_RANK:
        raise InvalidCheckpoint(f"a tensor of {len(shape)} dimensions; at most {MAX_RANK} are possible")
    if any(extent < 0 for extent in shape) or itemsize * prod(extent for extent in shape if extent) > MAX_EXTENT:
        raise InvalidCheckpoint(f"no tensor can have the shape {list(shape)}")
    return itemsize * prod(shape)


def aligned(offset: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def validate(manifest: Manifest) -> None:
    """I4: refuse a manifest whose tensors do not fit their segments. Raises InvalidCheckpoint or UnsupportedFormat."""
    seen: set[str] = set()
    for spec in manifest.tensors:
        if spec.name in seen:
            raise InvalidCheckpoint(f"manifest of {manifest.name!r} names tensor {spec.name!r} twice")
        seen.add(spec.name)
        if nbytes_of(spec.dtype, spec.shape) != spec.nbytes:
            raise InvalidCheckpoint(
                f"manifest of {manifest.name!r}: {spec.name!r} is {spec.dtype} {list(spec.shape)} "
                f"but claims {spec.nbytes} bytes"
            )
        if not 0 <= spec.segment < len(manifest.segments):
            raise InvalidCheckpoint(f"manifest of {manifest.name!r}: {spec.name!r} lies in no known segment")
        if spec.offset % ALIGNMENT or not 0 <= spec.offset <= manifest.segments[spec.segment] - spec.nbytes:
            raise InvalidCheckpoint(f"manifest of {manifest.name!r}: {spec.name!r} lies outside its segment")
