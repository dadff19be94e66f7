"""The terminal while ``top`` runs: its other screen, redrawn at once when the window changes, left as it was found."""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live

from lunashm.cli.top_table import Fitted, shown
from lunashm.usage.account import HostUse


class Screen:
    """Shows the last look; when it ends, that stays on the ordinary screen. Main thread only.

    A resized window draws what is there anew: on the ordinary screen lines that were wrapped could not be taken back.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._hosts: tuple[HostUse, ...] | None = None
        self._live = Live(console=console, screen=True, auto_refresh=False, get_renderable=self._content)

    def show(self, hosts: tuple[HostUse, ...]) -> None:
        self._hosts = hosts
        self._live.refresh()

    def wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left_s := end - time.monotonic()) > 0:
            if signal.sigtimedwait({signal.SIGWINCH}, left_s) is not None:
                self._live.refresh()

    def __enter__(self) -> Self:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})
        self._on_term = signal.signal(signal.SIGTERM, _leave)
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()
        signal.signal(signal.SIGTERM, self._on_term)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        if self._hosts is not None:
            self._console.print(shown(self._hosts, self._console.width))

    def _content(self) -> Fitted | Group:
        return Fitted(shown(self._hosts, self._console.width)) if self._hosts is not None else Group()


def _leave(number: int, _frame: FrameType | None) -> None:
    """Ended from outside: the terminal gets its ordinary screen back first."""
    raise SystemExit(128 + number)
