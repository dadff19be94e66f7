"""How much is rendered, of what. Data alone.

The full form is for a figure that one would quote, the short one is part of ``make test``: everything runs, in as few
renders, on as few servers and with as small a model as will do. On a CPU most tests draw with SD1.5 of one level, so
that hundreds of renders and eight servers with copies of their own fit; T1, which loads, takes the whole SD1.5.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """``arch``: of all tests but T1, which loads ``large``. ``side`` in pixels, ``steps`` of every picture.

    counts      T2: numbers of servers
    servers     T5: at once, of each kind; ``renders`` each
    long_steps  T7: of one picture; ``prompts`` after it by each of ``clients``
    columns     T8: of each layer whose values are looked at; None for all
    """

    name: str
    arch: str
    large: str
    side: int
    steps: int
    counts: tuple[int, ...]
    servers: int
    renders: int
    long_steps: int
    clients: int
    prompts: int
    columns: int | None

    @property
    def short(self) -> bool:
        return self.name == "short"


_FULL = {"counts": (1, 2, 4, 8), "servers": 4, "renders": 25, "long_steps": 50, "clients": 2, "prompts": 100}
_TOY, _SD15, _SDXL = "sd15-tiny", "sd15", "sdxl"

SHORT = Scale(
    "short", _TOY, _TOY, side=64, steps=2, counts=(1, 2), servers=2, renders=3, long_steps=50, clients=2, prompts=10,
    columns=48,
)  # fmt: skip
FULL = Scale("full", _TOY, _SD15, side=64, steps=2, columns=None, **_FULL)
FULL_ON_GPU = Scale("full", _SDXL, _SDXL, side=1024, steps=4, columns=None, **_FULL)


def scale_of(device: str, short: bool) -> Scale:
    if short:
        return SHORT
    return FULL if device == "cpu" else FULL_ON_GPU
