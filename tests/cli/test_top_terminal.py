"""``top`` on real terminals: keys, sizes, signals, and what it leaves."""

from __future__ import annotations

import re
import signal

from tests.waiting import until

from .conftest import SERVE, Program


def test_ctrl_c_ends_with_0_and_the_last_table_stays(painter, lent, terminal):
    top = terminal(lent.runtime)
    until(lambda: f"{painter.process.pid}" in top.read(), "the client is shown")
    code, left = top.end()
    assert code == 0
    assert left.startswith(f"cpu: posix, host pid {lent.process.pid}")
    assert "painter" in left
    assert "Traceback" not in top.output
    assert max(map(len, left.splitlines())) <= 60


def test_being_terminated_gives_the_screen_back(painter, lent, terminal):
    top = terminal(lent.runtime, "--interval", "100")
    until(lambda: f"{painter.process.pid}" in top.read(), "the client is shown")
    code, left = top.end(signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert "painter" in left


def test_a_resized_window_is_drawn_anew_at_once(painter, lent, terminal):
    top = terminal(lent.runtime, "--interval", "100")
    until(lambda: f"{painter.process.pid}" in top.read(), "the client is shown")
    assert "LABEL" not in top.read(), "a narrow screen"
    top.resize(100)
    until(lambda: "LABEL" in top.read(), "it is drawn as wide as the window is now")
    assert top.end()[0] == 0


def test_no_colour_is_used_where_none_is_wanted(painter, lent, terminal):
    top = terminal(lent.runtime, NO_COLOR="1")
    until(lambda: f"{painter.process.pid}" in top.read(), "the client is shown")
    top.end()
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", top.output)


def test_a_terminal_without_a_host_is_told_so_and_waits(terminal, runtime, tmp_path):
    top = terminal(runtime, "--interval", "0.1")
    until(lambda: "lunashm serve" in top.read(), "it says how to start one")
    host = Program([*SERVE, "--root", str(tmp_path)], runtime).start()
    until(lambda: f"host pid {host.process.pid}" in top.read().replace("\x1b[0m", ""), "it sees the host that starts")
    host.end()
    until(lambda: "is gone" in top.read(), "and that it went")
    code, left = top.end()
    assert code == 0
    assert "is gone" in left
