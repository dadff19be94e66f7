"""T6: no host (a), a host that refuses (b), a LoRA that is not there (c): what is said, and what is loaded.

Ends and restarts the stage's own host, which servers find again without a restart; so it is the last test that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.acceptance import graphs
from bench.acceptance.findings import Findings
from bench.acceptance.luna_log import LunaLog
from bench.acceptance.memory import settled
from bench.acceptance.models import stack
from bench.acceptance.pixels import distance, levels, within_rounding
from bench.acceptance.stage import Stage
from bench.comfy_server import PromptFailed
from bench.process_memory import resident
from bench.workflows import again
from lunashm.memory import ram

NOTHING = "<= 0.05"
"""Of the model: what a refused load may leave in the client. A copy would be 1."""
MISSING = "nonexistent"
SPARE_NBYTES = 192 << 20
"""Less than all RAM, for the kernel to map it; more than is ever free of it."""
MORE_NBYTES = 2 << 30


def run(stage: Stage, found: Findings) -> None:
    said = _lora_not_found(stage, found)
    roots = stage.host.roots
    try:
        reasons = _refused(stage, found)
        where = _no_host(stage, found)
    finally:
        _restart(stage, roots)
    found.holds("the host's return is found without a restart", _shares(stage))
    found.line = (
        f"(a) force_daemon without a host: an error that names {where}, nothing loaded; (b) {reasons} refused: loaded "
        f"locally, one warning with the reason each; (c) '{MISSING}' skipped with a warning, {said}"
    )


def _no_host(stage: Stage, found: Findings) -> str:
    """(a)"""
    server, endpoint = stage.shared, stage.host.endpoint.url
    server.free()
    stage.host.stop()
    own, nbytes = _own(stage), stage.models.path(stage.models.name).stat().st_size
    before, log = settled(own), LunaLog(server)
    message = ""
    try:
        server.render(graphs.luna(stage.picture(), mode="force_daemon"))
    except PromptFailed as exc:
        message = exc.exception_message
    found.holds("(a) force_daemon without a host fails", bool(message))
    found.holds("(a) the error says so", "daemon_mode is 'force_daemon'" in message, message)
    found.holds("(a) it names the endpoint that it expected", endpoint in message, endpoint)
    found.holds("(a) it says what to do", "lunashm serve" in message)
    found.figure("(a) memory that it left, of the file", (settled(own) - before) / nbytes, "ratio", NOTHING)
    found.holds("(a) nothing was loaded", not log.shared() and not log.local() and not log.attached(), log.lines[-3:])
    log = LunaLog(server)
    same = (stage.draw(server, graphs.luna(stage.picture(seed=2))) == stage.stocks(stage.picture(seed=2))).all()
    found.holds("(a) auto without a host draws stock's picture, to the bit", same)
    _one_warning(found, log, "(a) auto", stage.models.name, "no lunashm host")
    server.free()
    return endpoint.removeprefix("ipc://").rpartition("/")[2]


def _refused(stage: Stage, found: Findings) -> str:
    """(b): the kinds of refusal, in words."""
    no_room = "no room" if stage.on_cpu else "does not fit"
    cases: Sequence[tuple[str, Callable[[], str], str]] = (
        ("a file of another kind", stage.models.pickle, "is no safetensors file"),
        ("a path outside the roots", stage.models.outside, "is outside the host's roots"),
        ("a model without room", lambda: stage.models.oversized(_too_much(stage)), no_room),
    )
    for words, make, reason in cases:
        name = make()
        log, picture = LunaLog(stage.shared), stage.picture(name=name, seed=3)
        ours = stage.draw(stage.shared, graphs.luna(picture))
        theirs = stage.stocks(stage.picture(seed=3))
        same = (ours == theirs).all()
        found.holds(f"(b) {words}: the picture is stock's, to the bit", same, f"{levels(ours, theirs)} of 255")
        _one_warning(found, log, f"(b) {words}", name, reason)
        asked = again(graphs.luna(picture), 1)
        log = LunaLog(stage.shared)
        stage.shared.render(asked)
        found.holds(f"(b) {words}: nothing is said again at the next prompt", not log.warned_of(name))
    return ", ".join(words for words, _, _ in cases)


def _too_much(stage: Stage) -> int:
    """Bytes that the host has no room for, and that a process may map."""
    most = ram.total() - SPARE_NBYTES
    return most if stage.on_cpu else min(stage.status().free_nbytes + MORE_NBYTES, most)


def _one_warning(found: Findings, log: LunaLog, way: str, name: str, reason: str) -> None:
    """The extension's one line, and the Router's for each part that it could not share."""
    said = log.warned_of(name)
    found.holds(f"{way}: one warning with the reason", len(said) == 1 and reason in said[0], said)
    local = log.local()
    whole = {line.what for line in local} == {"MODEL", "CLIP", "VAE"} and len(local) == 3
    why = all(line.warned and reason in line.reason for line in local)
    found.holds(f"{way}: the Router says ⚠ and why, part by part", whole and why, [line.reason for line in local])


def _lora_not_found(stage: Stage, found: Findings) -> str:
    """(c)"""
    picture = stage.picture(stack(("style", 0.8)), seed=4)
    log = LunaLog(stage.shared)
    ours = stage.draw(stage.shared, graphs.luna(picture, missing=MISSING))
    found.holds("(c) one warning names it", log.missing() == [MISSING], log.missing())
    found.holds("(c) the rest of the stack is applied", [line.name for line in log.applied()] == [picture.loras[0][0]])
    theirs, bare = stage.stocks(picture), stage.stocks(stage.picture(seed=4))
    close = within_rounding(ours, theirs, stage.on_cpu)
    found.holds("(c) the picture is stock's with the rest alone", close, f"{levels(ours, theirs)} of 255")
    found.holds("(c) and the rest is seen in it", distance(ours, bare) >= 1)
    return f"the rest applied ({levels(ours, theirs)} of 255 from stock)"


def _shares(stage: Stage) -> bool:
    stage.shared.free()
    log = LunaLog(stage.shared)
    stage.shared.render(graphs.luna(stage.picture(seed=5)))
    return len(log.shared()) == 3


def _restart(stage: Stage, roots: Sequence[str]) -> None:
    stage.host.stop()
    stage.host.roots = list(roots)
    stage.host.start()


def _own(stage: Stage) -> Callable[[], int]:
    """The client's own memory; on a GPU the device's."""
    return (lambda: resident(stage.shared.pid).anonymous) if stage.on_cpu else stage.meter.read
