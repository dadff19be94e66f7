from __future__ import annotations

import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from blake3 import blake3

from lunashm.errors import LoadCancelled, ModelNotFound, OutOfSharedMemory, SourceChanged
from lunashm.host import checkpoint, loader
from lunashm.host.loader import LoadedSegment, plan
from lunashm.host.pace import RAM_BLOCK_NBYTES
from lunashm.manifest import ALIGNMENT, CONVERTIBLE, ITEMSIZE, DtypeRule, Manifest, check_rules
from lunashm.views import DTYPES, state_dict
from tests import checkpoints
from tests.fakes import HeapRung

EVERY_DTYPE = {f"{dtype}.{rank}": (dtype, (3, 5, 7)[:rank]) for dtype in ITEMSIZE for rank in range(3)}
LARGE = {"a": ("F16", (3, RAM_BLOCK_NBYTES // 4)), "b": ("U8", (1,)), "c": ("F32", (RAM_BLOCK_NBYTES // 2 + 1,))}

MANY_PIECES = {f"t{n}": ("U8", (RAM_BLOCK_NBYTES,)) for n in range(20)}
"""More than the ring holds: the reader cannot have ended when the first piece is digested."""


@pytest.fixture
def rung() -> HeapRung:
    return HeapRung(1 << 26)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.safetensors"


def silent(done: int, total: int) -> None:
    pass


def load(
    path: Path, rung: HeapRung, rules: tuple[DtypeRule, ...] = ()
) -> tuple[LoadedSegment, dict[str, torch.Tensor]]:
    found = checkpoint.read(path)
    layout = plan(found, rules)
    loaded = loader.load(found, layout, rung, silent)
    manifest = Manifest("m", loaded.digest, 1, found.source, rules, layout.specs, (layout.nbytes,), {})
    return loaded, state_dict(manifest, [rung.open(loaded.segment.export())])


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# -- what arrives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", [EVERY_DTYPE, LARGE, {"empty": ("F32", (0, 4))}], ids=["dtypes", "pieces", "empty"])
def test_every_tensor_arrives_bit_by_bit(path: Path, rung: HeapRung, tensors: checkpoints.Tensors) -> None:
    written = checkpoints.write(path, tensors)
    _, served = load(path, rung)
    assert {name: bits(tensor) for name, tensor in served.items()} == written
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in served.items()} == {
        name: (DTYPES[dtype], shape) for name, (dtype, shape) in tensors.items()
    }


@pytest.mark.parametrize("tensors", [checkpoints.SMALL, LARGE], ids=["small", "pieces"])
def test_digest_is_blake3_of_the_whole_file(path: Path, rung: HeapRung, tensors: checkpoints.Tensors) -> None:
    checkpoints.write(path, tensors, metadata={"format": "pt"})
    expected = blake3(path.read_bytes()).hexdigest()
    assert load(path, rung)[0].digest == expected
    assert load(path, rung, check_rules([DtypeRule("", "F16")]))[0].digest == expected  # of the file, not the variant
    assert loader.digest(checkpoint.read(path), silent) == expected


def test_tensors_are_packed_in_file_order_at_aligned_offsets(path: Path) -> None:
    checkpoints.write(path, EVERY_DTYPE)
    layout = plan(checkpoint.read(path), ())
    position = 0
    for spec in layout.specs:
        assert spec.offset % ALIGNMENT == 0
        assert position <= spec.offset < position + ALIGNMENT
        position = spec.offset + spec.nbytes
    assert position <= layout.nbytes < position + ALIGNMENT


@pytest.mark.parametrize("target", sorted(CONVERTIBLE))
def test_variant_is_what_torchs_own_conversion_gives(path: Path, rung: HeapRung, target: str) -> None:
    tensors = {f"{source}": (source, (RAM_BLOCK_NBYTES // 8 + 3, 3)) for source in sorted(CONVERTIBLE)}
    tensors["ids"] = ("I64", (4,))
    checkpoints.write(path, tensors)
    _, stored = load(path, rung)
    _, served = load(path, rung, check_rules([DtypeRule("", target)]))
    for name, (source, _) in tensors.items():
        wanted = stored[name].to(DTYPES[target]) if source in CONVERTIBLE else stored[name]
        assert served[name].dtype == wanted.dtype
        assert bits(served[name]) == bits(wanted)


def test_each_prefix_gets_its_own_dtype(path: Path, rung: HeapRung) -> None:
    checkpoints.write(path, {"unet.w": ("F16", (4,)), "vae.w": ("F16", (4,)), "vae.norm.w": ("F16", (4,))})
    _, served = load(path, rung, check_rules([DtypeRule("vae.", "F32"), DtypeRule("vae.norm.", "BF16")]))
    wanted = {"unet.w": torch.float16, "vae.w": torch.float32, "vae.norm.w": torch.bfloat16}
    assert {name: tensor.dtype for name, tensor in served.items()} == wanted


def test_progress_counts_every_byte_of_the_file(path: Path, rung: HeapRung) -> None:
    checkpoints.write(path, LARGE)
    found, seen = checkpoint.read(path), []
    loader.load(found, plan(found, ()), rung, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (found.source.size, found.source.size)
    assert all(later[0] - earlier[0] <= RAM_BLOCK_NBYTES for earlier, later in pairwise(seen))


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def nothing_is_left(rung: HeapRung, threads_before: int, descriptors_before: int) -> bool:
    return (rung.segments, threading.active_count(), len(os.listdir("/proc/self/fd"))) == (
        {}, threads_before, descriptors_before
    )  # fmt: skip


def test_load_can_be_stopped_at_any_piece(path: Path, rung: HeapRung) -> None:
    checkpoints.write(path, LARGE)
    found = checkpoint.read(path)
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))

    def stop(done: int, total: int) -> None:
        raise LoadCancelled(f"at {done}")

    with pytest.raises(LoadCancelled):
        loader.load(found, plan(found, ()), rung, stop)
    assert nothing_is_left(rung, *before)


def test_file_that_does_not_fit_is_refused_before_it_is_read(path: Path) -> None:
    checkpoints.write(path, LARGE)
    found, rung = checkpoint.read(path), HeapRung(1 << 20)
    path.unlink()
    with pytest.raises(OutOfSharedMemory):
        loader.load(found, plan(found, ()), rung, silent)


def test_room_that_runs_out_midway_leaves_nothing(
    path: Path, rung: HeapRung, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.write(path, LARGE)
    found = checkpoint.read(path)
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    allocate = rung.allocate

    def allocate_full_one(nbytes: int) -> object:
        segment = allocate(nbytes)
        write = segment.write

        def write_half(offset: int, data: memoryview) -> None:
            if offset > nbytes // 2:
                raise OutOfSharedMemory("no space left on device")
            write(offset, data)

        segment.write = write_half  # type: ignore[method-assign]
        return segment

    monkeypatch.setattr(rung, "allocate", allocate_full_one)
    with pytest.raises(OutOfSharedMemory):
        loader.load(found, plan(found, ()), rung, silent)
    assert nothing_is_left(rung, *before)


def test_file_that_was_replaced_after_its_header_was_read_is_refused(path: Path, rung: HeapRung) -> None:
    checkpoints.write(path)
    found = checkpoint.read(path)
    checkpoints.write(path.with_suffix(".new"), seed=1)
    path.with_suffix(".new").replace(path)
    with pytest.raises(SourceChanged, match="changed while it was being loaded"):
        loader.load(found, plan(found, ()), rung, silent)
    assert rung.segments == {}


def test_file_that_is_written_while_it_is_loaded_is_refused(path: Path, rung: HeapRung) -> None:
    checkpoints.write(path, MANY_PIECES)
    found = checkpoint.read(path)

    def touch_it(done: int, total: int) -> None:
        if done < total:
            checkpoints.touch(path)

    with pytest.raises(SourceChanged):
        loader.load(found, plan(found, ()), rung, touch_it)
    assert rung.segments == {}


def test_file_that_is_cut_while_it_is_loaded_is_refused(path: Path, rung: HeapRung) -> None:
    checkpoints.write(path, MANY_PIECES)
    found = checkpoint.read(path)
    with pytest.raises(SourceChanged, match="cut"):
        loader.load(found, plan(found, ()), rung, lambda done, total: os.truncate(path, RAM_BLOCK_NBYTES))


def test_file_that_vanished_is_not_found(path: Path, rung: HeapRung) -> None:
    checkpoints.write(path)
    found = checkpoint.read(path)
    path.unlink()
    with pytest.raises(ModelNotFound):
        loader.load(found, plan(found, ()), rung, silent)
    assert rung.segments == {}


def test_disk_that_fails_is_an_error_of_ours(path: Path, rung: HeapRung, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.write(path)
    found = checkpoint.read(path)

    def fail(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ModelNotFound, match="Input/output error"):
        loader.load(found, plan(found, ()), rung, silent)
    assert rung.segments == {}


# -- what it costs -----------------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
import torch  # itself some hundred MB; a host imports it when it converts for the first time
from lunashm.host import checkpoint, loader
from lunashm.manifest import DtypeRule
from lunashm.memory.posix import PosixRung

def private_kib(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

found = checkpoint.read(Path(sys.argv[1]))
for rules in ((), (DtypeRule("", "F16"),)):
    layout = loader.plan(found, rules)
    rung = PosixRung()
    before, peak = private_kib("RssAnon:"), 0
    def look(done, total):
        global peak
        if done % (8 << 20) < 1 << 20:
            peak = max(peak, private_kib("RssAnon:"))
    loaded = loader.load(found, layout, rung, look)
    loaded.segment.free()
    print((peak - before) * 1024)
"""


def test_loading_never_holds_a_second_copy_in_private_memory(path: Path) -> None:
    nbytes = 48 << 20  # fits a container's /dev/shm of 64 MB
    tensors = {f"t{number}": ("F32", (nbytes // 16,)) for number in range(4)}
    with path.open("wb") as file:
        file.write(checkpoints.header_of(tensors))
        file.truncate(file.tell() + nbytes)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PEAK, str(path)]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    as_stored, converted = map(int, run.stdout.split())
    assert as_stored < nbytes // 2  # the ring of pieces, and some of the allocator's own
    assert converted < nbytes // 2
