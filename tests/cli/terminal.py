"""``lunashm top`` on a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]

ON_ITS_TERMINAL = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from lunashm.cli import main
main()
"""
"""So that Ctrl-C and a resized window reach it as they do anywhere."""
LEFT_SCREEN = "\x1b[?1049l"


class Terminal:
    """``top`` on a terminal of its own."""

    SET_BY_SOME = ("COLUMNS", "LINES", "NO_COLOR")

    def __init__(self, runtime, *flags, columns=60, **variables):
        self._main, side = pty.openpty()
        self.resize(columns)
        environment = {name: value for name, value in os.environ.items() if name not in self.SET_BY_SOME}
        environment |= {"LUNASHM_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_ITS_TERMINAL, "top", *flags], env=environment | variables, cwd=ROOT,
            start_new_session=True, stdin=side, stdout=side, stderr=side,
        )  # fmt: skip
        os.close(side)
        self.output = ""

    def resize(self, columns):
        fcntl.ioctl(self._main, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))

    def read(self):
        """All it has written by now."""
        while select.select([self._main], [], [], 0)[0]:
            try:
                self.output += os.read(self._main, 1 << 16).decode()
            except OSError:  # the other side is closed
                break
        return self.output

    def end(self, number=None):
        """Ctrl-C, or a signal: its exit code, and what it left on the ordinary screen."""
        if number is None:
            os.write(self._main, b"\x03")
        else:
            self.process.send_signal(number)
        until(lambda: self.read() is not None and self.process.poll() is not None, "top ends")
        left = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.read().rpartition(LEFT_SCREEN)[2])
        return self.process.returncode, left.replace("\r\n", "\n")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._main)
