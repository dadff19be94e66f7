"""T3: two LoRAs (0.8, 0.9) as a stack, by tags and by Luna LoRA Stack: seen, said, and gone without a trace."""

from __future__ import annotations

import json

from bench.acceptance import graphs
from bench.acceptance.findings import Findings
from bench.acceptance.luna_log import LunaLog
from bench.acceptance.models import stack
from bench.acceptance.pixels import Pixels, distance, levels, within_rounding
from bench.acceptance.stage import Stage
from bench.workflows import Lora, again

FIRST, SECOND = stack(("character", 0.8))[0], stack(("style", 0.9))[0]
SEEN = 1.0
"""Levels of 255 (RMS) that a LoRA's effect is at least; rounding is far below."""


def run(stage: Stage, found: Findings) -> None:
    server, plain_graph = stage.shared, graphs.luna(stage.picture())
    plain = stage.draw(server, plain_graph)
    with stage.checksum(stage.models.name) as checksum:
        before = checksum()
        log = LunaLog(server)
        both = stage.draw(server, graphs.luna(stage.picture((FIRST, SECOND))))
        _lines(found, log, (FIRST, SECOND))
        reverse = graphs.luna(stage.picture((SECOND, FIRST)))
        log = LunaLog(server)
        entry = server.run(reverse)
        _lines(found, log, (SECOND, FIRST))
        _metadata(found, entry["outputs"]["metadata"]["text"][0])
        stacked = stage.draw(server, graphs.luna(stage.picture((FIRST, SECOND)), stacked=True))
        alone = {lora[0]: stage.draw(server, graphs.luna(stage.picture([lora]))) for lora in (FIRST, SECOND)}
        again_plain = stage.draw(server, again(plain_graph, 1))
        found.holds("the shared bytes' checksum is unchanged", checksum() == before, before[:16])
    found.holds("a stack node and tags draw the same, to the bit", (stacked == both).all())
    found.holds("without LoRAs it draws what it drew before, to the bit", (again_plain == plain).all())
    effect = _effects(stage, found, plain, both, alone)
    theirs = stage.stocks(stage.picture((FIRST, SECOND)))
    found.holds("the picture is stock's within rounding", within_rounding(both, theirs, stage.on_cpu))
    found.line = (
        f"{FIRST[0]} (0.8) and {SECOND[0]} (0.9): both take effect ({effect}), {levels(both, theirs)} of 255 from "
        f"stock at most; log has order and size; shared bytes unchanged ({before[:8]})"
    )


def _lines(found: Findings, log: LunaLog, loras: tuple[Lora, ...]) -> None:
    said = [(line.name, line.model_strength, line.clip_strength, line.size) for line in log.applied()]
    wanted = [(*lora, size) for size, lora in enumerate(loras, 1)]
    found.holds("the log names them in order, with the stack's size", said == wanted, said)
    places = {line.places for line in log.applied()}
    found.holds("both halves go to shared models", places == {("shared", "shared")}, places)


def _metadata(found: Findings, text: str) -> None:
    said = [(lora["file"], lora["model_strength"], lora["clip_strength"]) for lora in json.loads(text)["loras"]]
    found.holds("the metadata has them in order", said == [SECOND, FIRST], said)


def _effects(stage: Stage, found: Findings, plain: Pixels, both: Pixels, alone: dict[str, Pixels]) -> str:
    """What each adds to the other's picture, not only to the plain one: else one could have replaced the other."""
    words = []
    for name, picture in alone.items():
        (other,) = (theirs for theirs in alone if theirs != name)
        by_itself = found.figure(f"effect of {name}", distance(picture, plain), "of 255, RMS", f">= {SEEN:g}")
        found.figure(f"effect of {name} on top of {other}", distance(both, alone[other]), "of 255, RMS", f">= {SEEN:g}")
        words.append(f"{by_itself:.0f}")
    return " and ".join(words) + " of 255 RMS"
