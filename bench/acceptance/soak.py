"""T7: a picture of 50 steps and 100 prompts with changing LoRAs: memory of host, clients and device stays as it is.

Memory is looked at after every 10 steps of the picture, and after every 10 prompts of each client. What counts as flat,
and why: bench.acceptance.memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.acceptance import graphs
from bench.acceptance.findings import Findings
from bench.acceptance.memory import Held, claim_flat, held, in_words
from bench.acceptance.models import LORAS, stack
from bench.acceptance.stage import Stage
from bench.acceptance.together import STACKS
from bench.comfy_events import Events

EVERY = 10
WARM_UP = 2  # rounds of all stacks
LOOKS = 5  # at least


def run(stage: Stage, found: Findings) -> None:
    clients = stage.servers("shared", stage.scale.clients)
    for number in range(len(STACKS) * (1 if stage.scale.short else WARM_UP)):
        for client in clients:
            client.render(graphs.luna(stage.picture(STACKS[number % len(STACKS)], seed=1000 + number)))
    meter = stage.follow(clients)
    meter.settled()
    leases = stage.status().leases

    def look() -> Held:
        return held(meter, stage.host, clients)

    steps = _steps(stage, look)
    wanted = stage.scale.long_steps // EVERY
    found.holds(f"memory was looked at every {EVERY} steps", len(steps) == wanted, f"{len(steps)} times")
    claim_flat(found, f"{stage.scale.long_steps} steps", steps, EVERY)
    prompts, every = _prompts(stage, look)
    claim_flat(found, f"{stage.scale.prompts} prompts", prompts, every)
    found.holds("no lease more than before", stage.status().leases == leases, f"{leases}, {stage.status().leases}")
    found.line = (
        f"{stage.scale.long_steps} steps: {in_words(steps)}; {stage.scale.prompts} prompts of {len(clients)} clients "
        f"with {len(STACKS)} stacks: {in_words(prompts)}"
    )


def _steps(stage: Stage, look: Callable[[], Held]) -> list[Held]:
    """One picture of many steps; the other clients rest."""
    looks: list[Held] = []

    def hear(kind: str, data: dict[str, Any]) -> None:
        """ComfyUI leaves out what comes too soon after the last one: the first that is heard after a tenth counts."""
        if kind == "progress" and data["value"] >= EVERY * (len(looks) + 1):
            looks.append(look())

    loras = stack(*((name, 0.5) for name in LORAS))
    picture = stage.picture(loras, seed=7, steps=stage.scale.long_steps)
    with Events(stage.shared, hear) as events:
        events.run(graphs.luna(picture))
    return looks


def _prompts(stage: Stage, look: Callable[[], Held]) -> tuple[list[Held], int]:
    """Every client draws one after the other, another stack each time; also how many of each are between two looks."""
    clients, looks = stage.servers("shared", stage.scale.clients), [look()]
    every = min(EVERY, stage.scale.prompts // LOOKS)
    for number in range(1, stage.scale.prompts + 1):
        for client in clients:
            client.render(graphs.luna(stage.picture(STACKS[number % len(STACKS)], seed=2000 + number)))
        if number % every == 0:
            looks.append(look())
    return looks, every
