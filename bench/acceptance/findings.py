"""What a test claims, what it saw, and the one line that is said of it. Measures nothing.

A test passes when it claimed something and every claim holds. One that throws has failed with the reason; what it had
found until then stays.

    found.holds("the shared bytes are unchanged", after == before)
    found.figure("each extra server", 0.05, "GB", "<= 0.25")     # a claim, too, where it has a target
    found.line = "2 servers: ..."
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.report import Figure

PASS, FAIL = "PASS", "FAIL"
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Claim:
    """``seen``: what speaks for or against it, in words."""

    what: str
    holds: bool
    seen: str = ""

    def __str__(self) -> str:
        return f"{self.what} ({self.seen})" if self.seen else self.what


@dataclass
class Findings:
    """Of one test. ``line``: its figures in words; set it as soon as there are any."""

    test: str
    title: str
    line: str = ""
    claims: list[Claim] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    samples: dict[str, Sequence[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    def holds(self, what: str, truth: bool, seen: object = "") -> bool:
        self.claims.append(Claim(what, bool(truth), str(seen)))
        return bool(truth)

    def figure(self, name: str, value: float, unit: str, target: str | None = None) -> float:
        """``target``: ``<= 0.25``; it is claimed, and a value that is not a number does not meet it."""
        made = Figure(f"{self.test}: {name}", value, unit, target)
        self.figures.append(made)
        if target is not None:
            self.holds(f"{name} {target} {unit}", bool(made.met), f"{value:.4g} {unit}")
        return value

    def series(self, values: Mapping[str, Sequence[float]]) -> None:
        self.samples.update({f"{self.test}: {name}": list(numbers) for name, numbers in values.items()})

    @property
    def broken(self) -> list[Claim]:
        return [claim for claim in self.claims if not claim.holds]

    @property
    def passed(self) -> bool:
        return not self.error and bool(self.claims) and not self.broken

    def __str__(self) -> str:
        """``T5 PASS 4 servers x 25 renders: ...``."""
        words = [part for part in (self.line, self._reason) if part]
        return f"{self.test} {PASS if self.passed else FAIL} {'; '.join(words)}"

    @property
    def _reason(self) -> str:
        if self.error:
            return f"it ended with {_cut(self.error.strip().splitlines()[0])}"
        if self.broken:
            return "not so: " + "; ".join(_cut(str(claim)) for claim in self.broken)
        return "" if self.claims else "it claimed nothing"

    def as_dict(self) -> dict[str, Any]:
        return {
            "test": self.test, "title": self.title, "status": PASS if self.passed else FAIL, "line": str(self),
            "seconds": round(self.seconds, 1), "error": self.error, "notes": self.notes,
            "claims": [{"what": claim.what, "holds": claim.holds, "seen": claim.seen} for claim in self.claims],
        }  # fmt: skip


def attempt(found: Findings, run: Callable[[], None]) -> None:
    """Whatever it throws is the test's failure, and no other's."""
    try:
        run()
    except Exception as exc:  # noqa: BLE001 - the other tests go on
        found.error = "".join(traceback.format_exception_only(exc)).strip()
        found.notes.append("".join(traceback.format_exception(exc)))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 4] + " ..."
