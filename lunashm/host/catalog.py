"""What is loaded. Pure bookkeeping: no threads, no sockets; segments are opaque.

    (file) --load--> READY --unload, or a changed file--> DRAINING --last lease ends--> freed

A generation is one content digest in one set of dtypes. Same path with new bytes is a new generation (I3).
All ready generations of one digest know the same files.
"""

from __future__ import annotations

import enum
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from lunashm.errors import ModelNotFound
from lunashm.manifest import DtypeRule, Manifest, RuleBook, Source
from lunashm.memory import Segment
from lunashm.protocol import ModelInfo

_REMEMBERED_RULES = 64


class State(enum.Enum):
    READY = "ready"
    DRAINING = "draining"


@dataclass
class Generation:
    """``sources``: every file, as stat saw it, that is known to hold these bytes."""

    manifest: Manifest
    segments: tuple[Segment, ...]
    load_s: float
    rung: str
    sources: set[Source]
    state: State = State.READY
    _satisfies: dict[tuple[DtypeRule, ...], bool] = field(default_factory=dict)

    @property
    def id(self) -> int:
        return self.manifest.generation

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def memory_nbytes(self) -> int:
        return sum(segment.nbytes for segment in self.segments)

    @cached_property
    def dtypes(self) -> dict[str, int]:
        """Bytes of each dtype."""
        table: Counter[str] = Counter()
        for spec in self.manifest.tensors:
            table[spec.dtype] += spec.nbytes
        return dict(table)

    def is_of(self, path: str) -> bool:
        return any(source.path == path for source in self.sources)

    def satisfies(self, rules: tuple[DtypeRule, ...]) -> bool:
        """Whether a client that wants ``rules`` can use this generation as it is."""
        known = self._satisfies.get(rules)
        if known is None:
            if len(self._satisfies) >= _REMEMBERED_RULES:
                self._satisfies.clear()
            known = self._satisfies[rules] = RuleBook(rules).satisfied_by(self.manifest.tensors)
        return known


class Catalog:
    """All generations whose memory the host still owns."""

    def __init__(self) -> None:
        self._generations: dict[int, Generation] = {}
        self._ids = itertools.count(1)

    def next_id(self) -> int:
        return next(self._ids)

    def add(self, generation: Generation) -> None:
        """It also serves every file that is known to hold the same bytes."""
        same = [g.sources for g in self._ready() if g.digest == generation.digest]
        generation.sources = generation.sources.union(*same)
        self._generations[generation.id] = generation

    def remove(self, generation_id: int) -> Generation:
        return self._generations.pop(generation_id)

    def get(self, generation_id: int) -> Generation:
        return self._generations[generation_id]

    @property
    def all(self) -> list[Generation]:
        return list(self._generations.values())

    def _ready(self) -> list[Generation]:
        return [g for g in self.all if g.state is State.READY]

    # -- which bytes are where -------------------------------------------------------------------------------------

    def current(self, source: Source, rules: tuple[DtypeRule, ...]) -> Generation | None:
        """A ready generation of exactly this file that serves these dtypes."""
        return self._first(lambda g: source in g.sources and g.satisfies(rules))

    def same_bytes(self, digest: str, rules: tuple[DtypeRule, ...]) -> Generation | None:
        return self._first(lambda g: g.digest == digest and g.satisfies(rules))

    def suspects(self, source: Source) -> frozenset[str]:
        """Digests that this file may turn out to have: those of its size, but for one it is known to have."""
        known = {g.digest for g in self._ready() if source in g.sources}
        return frozenset(g.digest for g in self._ready() if g.manifest.source.size == source.size) - known

    def learn(self, source: Source, digest: str) -> list[Generation]:
        """The file holds these bytes now, and no others. Returns the generations whose last file that was."""
        for generation in self._ready():
            if generation.digest == digest:
                generation.sources = {s for s in generation.sources if s.path != source.path} | {source}
        return self._disown(source.path, lambda g: g.digest != digest)

    def resized(self, source: Source) -> list[Generation]:
        """A file of another size holds other bytes for certain, whatever they are. Returns as :meth:`learn` does."""
        return self._disown(source.path, lambda g: g.manifest.source.size != source.size)

    def _disown(self, path: str, changed: Callable[[Generation], bool]) -> list[Generation]:
        orphans = []
        for generation in self._ready():
            if generation.is_of(path) and changed(generation):
                generation.sources = {s for s in generation.sources if s.path != path}
                if not generation.sources:
                    orphans.append(generation)
        return orphans

    def _first(self, predicate: Callable[[Generation], bool]) -> Generation | None:
        return next((g for g in self._ready() if predicate(g)), None)

    # -- names -----------------------------------------------------------------------------------------------------

    def names(self) -> dict[int, str]:
        """A distinct name for each generation: file name, with its folder where two files share one, and ``@id`` for
        all but one of the same file: the first that is still lent."""
        files = {(g.manifest.name, g.manifest.source.path) for g in self.all}
        shared = Counter(name for name, _ in files)
        names: dict[int, str] = {}
        taken: set[str] = set()
        for generation in sorted(self.all, key=_prominence, reverse=True):
            manifest = generation.manifest
            name = manifest.name
            if shared[name] > 1:
                name = "/".join(manifest.source.path.split("/")[-2:])
            if name in taken:
                name = f"{name}@{generation.id}"
            taken.add(name)
            names[generation.id] = name
        return names

    def find(self, name: str) -> Generation:
        """By name, path, or digest prefix (4 characters at least). Raises ModelNotFound, listing what there is."""
        names = self.names()
        exact = [g for g in self.all if name == names[g.id] or g.is_of(name)]
        loose = [g for g in self.all if g.manifest.name == name or (len(name) >= 4 and g.digest.startswith(name))]
        matches = sorted(exact, key=_prominence)[-1:] or loose
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ModelNotFound(f"{name!r} could be any of {', '.join(names[g.id] for g in matches)}; say which")
        raise ModelNotFound(f"no model {name!r} is loaded; loaded: {', '.join(names.values()) or 'none'}")

    def describe(self, generation: Generation, clients: int) -> ModelInfo:
        """``clients``: how many distinct processes hold it."""
        manifest = generation.manifest
        nbytes = sum(generation.dtypes.values())
        return ModelInfo(
            name=self.names()[generation.id],
            path=manifest.source.path,
            digest=generation.digest,
            generation=generation.id,
            state=generation.state.value,
            rung=generation.rung,
            dtypes=generation.dtypes,
            tensors=len(manifest.tensors),
            nbytes=nbytes,
            memory_nbytes=generation.memory_nbytes,
            loaded_nbytes=nbytes,
            clients=clients,
            saved=max(clients - 1, 0) * nbytes,
            until="unload" if generation.state is State.READY else "last detach",
            load_s=generation.load_s,
            rules=manifest.rules,
        )


def _prominence(generation: Generation) -> tuple[bool, int]:
    """Which of several a plain name means: what is lent before what drains, then the one that had it first."""
    return generation.state is State.READY, -generation.id
