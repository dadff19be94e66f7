from __future__ import annotations

import pytest

from lunashm.cli.output import clean, count, duration, size


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12_345, "12.3 kB"), (352_000_000, "352 MB"),
     (999_600_000, "1.00 GB"), (4_265_000_000, "4.26 GB"), (10**16, "10000 TB")],
)  # fmt: skip
def test_sizes_have_three_digits(nbytes, text):
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.9, "59 s"), (187, "3 min 7 s"), (18_720, "5 h 12 min"), (187_200, "2 d 4 h")],
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


def test_names_from_files_can_neither_colour_nor_move():
    assert clean("[red]a\x1b[31m\rb\n").plain == "[red]a\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}b\n"


def test_one_is_not_plural():
    assert (count(1, "client"), count(2, "client")) == ("1 client", "2 clients")
