"""What a client process does in the suite: ``python -m bench.gpu.client PROGRAM OPTIONS``, OPTIONS as JSON.

What a GPU does to a program (errors, an end) is what the steps ask, so nothing in the programs decides what is right.
"""

from __future__ import annotations

import json
import sys

from bench.gpu import client_memory, client_torch, saying, torch_gpu

PROGRAMS = {
    each.__name__: each
    for each in (
        *(client_memory.death, client_memory.write, client_memory.look, client_memory.hold, client_memory.fill),
        *(client_torch.first_attach, client_torch.attach_again, client_torch.allocator, client_torch.load_with),
    )
}


def main(program: str, options: str) -> None:
    found = json.loads(options)
    saying.listen()
    torch_gpu.use(found["device"], found["dry"])
    PROGRAMS[program](found)


if __name__ == "__main__":
    main(*sys.argv[1:])
