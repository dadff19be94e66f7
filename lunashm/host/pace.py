"""How much of a file is on its way at once: size of blocks, number of buffers and threads. Moves nothing itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from lunashm.memory import CPU

RAM_BLOCK_NBYTES = 1 << 20
"""Small enough to stay in a core's cache between being read, placed and digested: larger blocks were slower."""

GPU_BLOCK_NBYTES = 8 << 20
"""Large enough that starting a copy to the device costs nothing beside the copy."""

_MOST_READERS = 8
_SPARE_BUFFERS = 4
"""Beside one for each reader: what waits for the digest, and what it is at."""

_LEAST_BUFFERS = 8
_MANY_CORES = 8
"""From here on the digest of one block is shared by several threads: with few cores, the readers need them more."""


@dataclass(frozen=True)
class Pace:
    """At most ``buffers`` x ``block_nbytes`` of RAM are used, whatever the size of the file."""

    block_nbytes: int
    buffers: int
    readers: int
    digesters: int

    @classmethod
    def on(cls, device: str, cores: int | None = None) -> Self:
        """For memory of ``device``, with ``cores`` that this process may use (None: ask the kernel)."""
        if cores is None:
            cores = len(os.sched_getaffinity(0))
        readers = max(1, min(_MOST_READERS, cores // 2))
        return cls(
            block_nbytes=RAM_BLOCK_NBYTES if device == CPU else GPU_BLOCK_NBYTES,
            buffers=max(_LEAST_BUFFERS, readers + _SPARE_BUFFERS),
            readers=readers,
            digesters=readers if cores >= _MANY_CORES else 1,
        )

    def for_file(self, nbytes: int) -> Pace:
        """The same, with no more and no larger buffers than a file of this size fills."""
        block_nbytes = min(self.block_nbytes, nbytes)
        buffers = min(self.buffers, -(-nbytes // block_nbytes))
        return Pace(block_nbytes, buffers, min(self.readers, buffers), self.digesters)
