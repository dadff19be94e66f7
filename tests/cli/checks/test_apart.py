"""Checks in another process, which may do anything."""

from __future__ import annotations

import sys

from lunashm.cli.checks import apart
from lunashm.cli.checks.check import State, Wanted
from tests.waiting import until

_SETUP = """
import os, signal, sys, time
from lunashm.cli.checks.apart import answer
from lunashm.cli.checks.check import Check, State, Task
def fine(): return Check("fine", State.OK, "all is well")
channel = open(int(sys.argv[1]), "wb", buffering=0)
"""


def follow(code):
    return list(apart.follow("noun", [sys.executable, "-c", _SETUP + code]))


def test_checks_come_back_as_they_were_made_and_say_how_long_they_took():
    (first, second) = follow("answer([Task('fine', fine), Task('fine', fine)], channel)")
    assert (first.name, first.state, first.detail) == ("fine", State.OK, "all is well")
    assert second.seconds >= 0


def test_a_process_that_is_ended_by_a_signal_is_a_failed_check_with_its_last_words():
    last = "def crash():\n print('corrupted heap', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGSEGV)\n"
    (first, second) = follow(f"{last}answer([Task('fine', fine), Task('torch', crash)], channel)")
    assert first.state is State.OK
    assert (second.name, second.state) == ("torch", State.FAIL)
    assert "ended with signal 11: corrupted heap" in second.detail
    assert "please report it" in second.fix


def test_a_process_that_hangs_is_a_failed_check_and_is_ended_with_all_it_started(tmp_path):
    pids = tmp_path / "pids"
    hang = (
        "import subprocess\n"
        "def hang():\n"
        " child = subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
        f" open({str(pids)!r}, 'w').write(str(child.pid))\n"
        " signal.pause()\n"
    )
    (check,) = follow(f"{hang}answer([Task('driver', hang, 2.0)], channel)")
    assert (check.name, check.state, check.detail) == ("driver", State.FAIL, "no answer within 2 s")
    stat = f"/proc/{pids.read_text()}/stat"

    def gone():
        try:
            with open(stat) as file:
                return file.read().rpartition(") ")[2].startswith("Z")
        except OSError:
            return True

    until(gone, "what the process had started is gone")


def test_a_process_that_does_not_start_is_a_failed_check():
    (check,) = apart.run("no_such_noun", Wanted())
    assert (check.name, check.state) == ("no_such_noun", State.FAIL)
    assert "ModuleNotFoundError" in check.detail


def test_half_a_line_is_no_check():
    (check,) = follow("""channel.write(b'{"begun":"x","limit_s":5}\\n{"check":{"na'); channel.close()""")
    assert (check.name, check.state) == ("x", State.FAIL)
    assert "status 0" in check.detail
