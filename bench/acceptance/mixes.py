"""T4: shared or local MODEL with shared or local CLIP: each half of a LoRA goes where that one's weights are.

One LoRA that has both halves, with a strength of its own for each, on all four combinations: with both, with the
model's half alone and with the text encoder's half alone. Each picture is stock's, so no half went anywhere else, or
missed; the two halves alone make different pictures, so stock's is not met by chance.
"""

from __future__ import annotations

import itertools

from bench.acceptance import graphs
from bench.acceptance.findings import Findings
from bench.acceptance.luna_log import LunaLog
from bench.acceptance.models import stack
from bench.acceptance.pixels import distance, levels, within_rounding
from bench.acceptance.stage import Stage
from bench.workflows import again

MODES = {"shared": "force_daemon", "local": "force_local"}
HALVES = {"both halves": (0.8, 0.6), "the model's half": (0.8, 0.0), "the text encoder's half": (0.0, 0.6)}
APART = 1.0
"""Levels of 255 (RMS) that pictures with different halves differ by at least."""


def run(stage: Stage, found: Findings) -> None:
    server, furthest = stage.shared, 0
    pictures = {half: stage.picture(stack(("style", *strengths))) for half, strengths in HALVES.items()}
    theirs = {half: stage.stocks(picture) for half, picture in pictures.items()}
    for one, other in itertools.combinations(theirs, 2):
        apart = distance(theirs[one], theirs[other])
        found.holds(f"{one} and {other} make different pictures", apart >= APART, f"{apart:.1f} of 255 RMS")
    server.render(graphs.luna(stage.picture()))
    with stage.checksum(stage.models.name) as checksum:
        before, plain = checksum(), stage.stocks(stage.picture())
        for model, clip in itertools.product(MODES, MODES):
            way = f"{model} MODEL, {clip} CLIP"
            for half, picture in pictures.items():
                log = LunaLog(server)
                graph = graphs.luna(picture, mode=MODES[model], clip_mode=MODES[clip])
                ours = stage.draw(server, graph)
                said = [(line.places, (line.model_strength, line.clip_strength)) for line in log.applied()]
                found.holds(f"{way}: the log says where {half} went", said == [((model, clip), HALVES[half])], said)
                off = levels(ours, theirs[half])
                furthest = max(furthest, off)
                close = within_rounding(ours, theirs[half], stage.on_cpu)
                found.holds(f"{way}: {half} as in stock", close, f"{off} of 255")
            bare = graphs.luna(stage.picture(), mode=MODES[model], clip_mode=MODES[clip])
            same = (stage.draw(server, again(bare, 1)) == plain).all()
            found.holds(f"{way}: without LoRA it draws stock's picture again, to the bit", same)
        found.holds("the shared bytes' checksum is unchanged", checksum() == before, before[:16])
    found.line = (
        f"4 mixes x {len(HALVES)} ways to use a LoRA with both halves: each half where its weights are, {furthest} of "
        "255 from stock at most; shared bytes unchanged"
    )
