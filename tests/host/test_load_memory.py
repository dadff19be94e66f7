"""What a load takes of RAM beside the segment, watched at every block in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lunashm.memory import ram
from lunashm.memory.posix import shm_free
from tests import checkpoints

NBYTES = 600_000_000
BOUND = 150_000_000

PEAK = """
import json
import sys
from pathlib import Path
from lunashm.host import checkpoint, loader
from lunashm.host.pace import Pace
from lunashm.memory.posix import PosixRung

def private_nbytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:")) * 1024

found = checkpoint.read(Path(sys.argv[1]))
pace = Pace.on(sys.argv[2], int(sys.argv[3]))
before = peak = private_nbytes()
def look(done, total):
    global peak
    peak = max(peak, private_nbytes())
loaded = loader.load(found, loader.plan(found, ()), PosixRung(), look, pace)
loaded.segment.free()
print(json.dumps([peak, peak - before, pace.buffers * pace.block_nbytes]))
"""


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if min(shm_free(), ram.available()) < NBYTES + (100 << 20):
        pytest.skip(f"needs {NBYTES / 1e6:.0f} MB of free shared memory")
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    tensors = {f"t{number}": ("F32", (NBYTES // 60,)) for number in range(15)}
    with path.open("wb") as file:
        file.write(checkpoints.header_of(tensors))
        file.truncate(file.tell() + NBYTES)  # zeros that take no disk
    return path


@pytest.mark.parametrize(("device", "cores"), [("cpu", 2), ("cpu", 64), ("GPU-1", 2), ("GPU-1", 64)])
def test_ram_beside_the_segment_is_bounded_by_the_ring(large_file: Path, device: str, cores: int) -> None:
    """As a GPU's buffers would be, too: here they are filled for memory in RAM."""
    command = [sys.executable, "-c", PEAK, str(large_file), device, str(cores)]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    peak, grown, ring = map(int, run.stdout.strip("[]\n").split(","))
    assert grown <= ring + (16 << 20)  # threads' stacks, the allocator's own
    assert peak < BOUND
