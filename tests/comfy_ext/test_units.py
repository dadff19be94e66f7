from __future__ import annotations

import pytest

from comfy_ext.units import progress


@pytest.mark.parametrize(
    ("done", "total", "elapsed_s", "text"),
    [
        (1_720_000_000, 4_000_000_000, 1.0, "43% of 4.00 GB at 1.72 GB/s"),
        (0, 4_000_000_000, 2.0, "0% of 4.00 GB at 0.00 GB/s"),
        (0, 4_000_000_000, 0.0, "0% of 4.00 GB"),
        (0, 0, 0.5, "0% of 0.0 MB at 0.00 GB/s"),
    ],
)
def test_progress_says_how_far_of_how_much_and_how_fast(done: int, total: int, elapsed_s: float, text: str) -> None:
    assert progress(done, total, elapsed_s) == text
