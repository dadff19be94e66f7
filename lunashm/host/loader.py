"""From file to frozen segment: one pass, no second copy. Knows no clients.

A reader thread moves 1 MiB pieces, small enough to stay in a core's cache, from the file through a ring of buffers
into the segment, converting where a rule asks for it; the caller's thread digests the same pieces meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from blake3 import blake3

from lunashm.errors import SourceChanged
from lunashm.host.checkpoint import Checkpoint, open_read, source_of, unreadable
from lunashm.manifest import ITEMSIZE, DtypeRule, RuleBook, TensorSpec, aligned, nbytes_of
from lunashm.memory import Rung, Segment

PIECE_NBYTES = 1 << 20
_RING = 8

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all, from the loading thread; raises LoadCancelled to stop the load."""


@dataclass(frozen=True)
class Layout:
    """Where each tensor goes and as what, in file order."""

    specs: tuple[TensorSpec, ...]
    nbytes: int


@dataclass(frozen=True)
class LoadedSegment:
    segment: Segment
    digest: str


@dataclass(frozen=True)
class _Piece:
    """A stretch of the file; ``spec`` is the tensor it belongs to, or None for the header."""

    start: int
    nbytes: int
    spec: TensorSpec | None = None
    stored: str = ""
    tensor_start: int = 0


def plan(checkpoint: Checkpoint, rules: tuple[DtypeRule, ...]) -> Layout:
    """Pack all tensors into one segment, each at a multiple of 256 bytes. Raises UnsupportedFormat."""
    book = RuleBook(rules)
    specs, offset = [], 0
    for tensor in checkpoint.tensors:
        dtype = book.resolve(tensor.name, tensor.dtype)
        nbytes = nbytes_of(dtype, tensor.shape)
        specs.append(TensorSpec(tensor.name, tensor.dtype, dtype, tensor.shape, 0, offset, nbytes))
        offset = aligned(offset + nbytes)
    return Layout(tuple(specs), max(offset, 1))


def load(checkpoint: Checkpoint, layout: Layout, rung: Rung, progress: Progress) -> LoadedSegment:
    """Read the file once into a new, frozen segment; nothing is left behind on failure.

    Raises OutOfSharedMemory, ModelNotFound, SourceChanged, or what ``progress`` raises.
    """
    segment = rung.allocate(layout.nbytes)
    try:
        digest = _stream(checkpoint, _pieces(checkpoint, layout), segment, progress)
        segment.freeze()
    except BaseException:
        segment.free()
        raise
    return LoadedSegment(segment, digest)


def digest(checkpoint: Checkpoint, progress: Progress) -> str:
    """BLAKE3 of the whole file, as ``b3sum`` prints it. Raises like :func:`load`."""
    size = checkpoint.source.size
    pieces = (_Piece(start, min(PIECE_NBYTES, size - start)) for start in range(0, size, PIECE_NBYTES))
    return _stream(checkpoint, pieces, None, progress)


def _pieces(checkpoint: Checkpoint, layout: Layout) -> Iterator[_Piece]:
    yield from _cut(_Piece(0, checkpoint.data_start), PIECE_NBYTES)
    for tensor, spec in zip(checkpoint.tensors, layout.specs, strict=True):
        whole = _Piece(tensor.start, tensor.end - tensor.start, spec, tensor.dtype, tensor.start)
        yield from _cut(whole, PIECE_NBYTES)


def _cut(whole: _Piece, size: int) -> Iterator[_Piece]:
    for done in range(0, whole.nbytes, size):
        nbytes = min(size, whole.nbytes - done)
        yield _Piece(whole.start + done, nbytes, whole.spec, whole.stored, whole.tensor_start)


def _stream(checkpoint: Checkpoint, pieces: Iterator[_Piece], segment: Segment | None, progress: Progress) -> str:
    """Move every piece and return the digest of the file. The reader thread has ended when this returns."""
    free: queue.Queue[memoryview | None] = queue.Queue()
    full: queue.Queue[tuple[memoryview, int] | BaseException | None] = queue.Queue()
    for _ in range(_RING):
        free.put(memoryview(bytearray(PIECE_NBYTES)))
    hasher = blake3()
    done = 0
    with contextlib.ExitStack() as stack:
        fd = open_read(checkpoint.source.path)
        stack.callback(os.close, fd)
        work = (fd, checkpoint, pieces, segment, free, full)
        reader = threading.Thread(target=_read, args=work, name="lunashm-reader")
        reader.start()
        stack.callback(reader.join)
        stack.callback(free.put, None)  # wakes a reader that still waits for a buffer
        while (item := full.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            buffer, nbytes = item
            hasher.update(buffer[:nbytes])
            free.put(buffer)
            done += nbytes
            progress(done, checkpoint.source.size)
    return hasher.hexdigest()


def _read(
    fd: int,
    checkpoint: Checkpoint,
    pieces: Iterator[_Piece],
    segment: Segment | None,
    free: queue.Queue[memoryview | None],
    full: queue.Queue[tuple[memoryview, int] | BaseException | None],
) -> None:
    try:
        _refuse_change(fd, checkpoint)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for piece in pieces:
            buffer = free.get()
            if buffer is None:
                return
            data = buffer[: piece.nbytes]
            _fill(fd, data, piece.start, checkpoint)
            if segment is not None and piece.spec is not None:
                _place(segment, piece, piece.spec, data)
            full.put((buffer, piece.nbytes))
        _refuse_change(fd, checkpoint)
        full.put(None)
    except OSError as exc:
        full.put(unreadable(checkpoint.source.path, exc))
    except BaseException as exc:  # noqa: BLE001 - re-raised by _stream in the loading thread
        full.put(exc)


def _fill(fd: int, data: memoryview, start: int, checkpoint: Checkpoint) -> None:
    while data:
        count = os.preadv(fd, [data], start)
        if count == 0:
            raise SourceChanged(f"{checkpoint.source.path} was cut at byte {start} while it was loaded; load it again")
        data, start = data[count:], start + count


def _place(segment: Segment, piece: _Piece, spec: TensorSpec, data: memoryview) -> None:
    element = (piece.start - piece.tensor_start) // ITEMSIZE[piece.stored]
    offset = spec.offset + element * ITEMSIZE[spec.dtype]
    if piece.stored != spec.dtype:
        from lunashm.views import convert  # noqa: PLC0415 - torch is 0.3 GB; a host that converts nothing needs none of it

        data = convert(data, piece.stored, spec.dtype)
    segment.write(offset, data)


def _refuse_change(fd: int, checkpoint: Checkpoint) -> None:
    source = checkpoint.source
    if source_of(source.path, os.fstat(fd)) != source:
        raise SourceChanged(f"{source.path} changed while it was being loaded; load it again when it is complete")
