from __future__ import annotations

import threading

from lunashm.cli.checks.check import Check, State, Task, overdue, result, run
from lunashm.errors import SettingsError


def fine():
    return Check("fine", State.OK, "")


def test_a_check_that_fails_unforeseen_is_a_failed_check_to_be_reported():
    def broken():
        raise ZeroDivisionError("boo")

    (check, after) = run(iter([Task("x", broken), Task("fine", fine)]))
    assert (check.name, check.state, check.detail) == ("x", State.FAIL, "boo")
    assert check.fix == "please report it: x: ZeroDivisionError"
    assert after.state is State.OK


def test_an_error_of_ours_says_itself_what_to_do():
    def refused():
        raise SettingsError("this is wrong; do that")

    assert (result(Task("x", refused)).detail, result(Task("x", refused)).fix) == ("this is wrong; do that", "")


def test_a_check_that_hangs_fails_in_time_and_the_next_one_is_made():
    never = threading.Event()

    def hang():
        never.wait()
        return fine()

    try:
        checks = list(run(iter([Task("stuck", hang, 0.02), Task("fine", fine)])))
    finally:
        never.set()
    assert checks[0] == overdue("stuck", 0.02)
    assert checks[0].state is State.FAIL
    assert checks[1].state is State.OK


def test_a_noun_that_cannot_even_name_its_checks_is_a_failed_check():
    def tasks():
        yield Task("fine", fine)
        raise OSError("no such thing")

    assert [(check.state, check.detail) for check in run(tasks())][1] == (State.FAIL, "no such thing")
