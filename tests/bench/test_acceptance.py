"""What the acceptance run makes of what it sees: verdicts, log lines, memory looks, graphs. The run itself:
tests/comfy/test_acceptance.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.acceptance import graphs, record
from bench.acceptance.findings import Findings, attempt
from bench.acceptance.graphs import Picture
from bench.acceptance.luna_log import LunaLog
from bench.acceptance.memory import Held, Peak, claim_flat
from bench.acceptance.models import stack
from bench.acceptance.pixels import levels, within_rounding
from bench.acceptance.registry import BY_NAME, ORDER, TESTS
from bench.acceptance.scale import FULL, SHORT

MB = 1_000_000


def fresh() -> Findings:
    return Findings("T9", "a test of tests")


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_passes_when_all_that_it_claims_holds() -> None:
    found = fresh()
    found.holds("water is wet", True)
    found.figure("wetness", 0.9, "ratio", ">= 0.5")
    found.line = "wet"
    assert found.passed and str(found) == "T9 PASS wet"


def test_fails_by_one_claim_and_names_it() -> None:
    found = fresh()
    found.holds("water is wet", True)
    found.holds("water is dry", False, "it drips")
    assert str(found) == "T9 FAIL not so: water is dry (it drips)"


@pytest.mark.parametrize("value", [0.4, float("nan")])
def test_fails_by_a_figure_that_misses_its_target(value: float) -> None:
    found = fresh()
    found.figure("wetness", value, "ratio", ">= 0.5")
    assert not found.passed and "wetness >= 0.5 ratio" in str(found)


def test_fails_where_nothing_was_claimed() -> None:
    assert str(fresh()) == "T9 FAIL it claimed nothing"


def test_what_throws_has_failed_with_the_reason_and_keeps_what_it_found() -> None:
    found = fresh()

    def run() -> None:
        found.holds("water is wet", True)
        found.line = "wet so far"
        raise OSError("the tap is shut\nand a second line")

    attempt(found, run)
    assert str(found) == "T9 FAIL wet so far; it ended with OSError: the tap is shut"
    assert "and a second line" in found.notes[0] and "Traceback" in found.notes[0]


def test_page_has_a_row_and_a_section_for_each_test(tmp_path: Path) -> None:
    good, bad = Findings("T1", "first"), Findings("T2", "second")
    good.figure("size", 1.0, "GB", "<= 2")
    good.line = "1 GB"
    (tmp_path / "comfyui_version.py").write_text('__version__ = "9.9.9"')
    whole = record.of([bad, good], SHORT, "cpu", tmp_path)
    assert (whole["passed"], whole["versions"]["comfyui"]) == (False, "9.9.9")
    page = record.write(whole, tmp_path).read_text()
    assert "acceptance-short: 1 of 2 passed" in page
    assert page.index("| T1 | pass | 0 | 1 GB |") < page.index("| T2 | **FAIL** | 0 | it claimed nothing |")
    assert "| size | 1 | GB | <= 2 | yes |" in page
    assert len(list(tmp_path.glob("acceptance-short-*.json"))) == 1


# -- which tests -------------------------------------------------------------------------------------------------------


def test_all_eight_run_once() -> None:
    assert [test.name for test in TESTS] == [f"T{number}" for number in range(1, 9)]
    assert sorted(ORDER) == sorted(BY_NAME)


def test_full_form_is_what_the_guide_asks_for() -> None:
    assert FULL.counts == (1, 2, 4, 8) and FULL.servers * FULL.renders == 100
    assert (FULL.long_steps, FULL.prompts, FULL.columns) == (50, 100, None)


# -- log lines ---------------------------------------------------------------------------------------------------------


class Server:
    def __init__(self, text: str) -> None:
        self.text = text

    def log_text(self) -> str:
        return self.text


SAID = """
[INFO] [LunaModelRouter] ✓ MODEL a b.safetensors: 1.72 GB from the host at ipc:///run/x.sock (cuda-vmm, NVIDIA H100), \
0.1 MB private; daemon_mode auto
[WARNING] [LunaModelRouter] ⚠ CLIP a.safetensors: local: no lunashm host at ipc:///x; start one; daemon_mode auto
[INFO] [LunaModelRouter] VAE a.safetensors: local: mode force_local; daemon_mode force_local
[INFO] [LunaConfigGateway] LoRA 'sub/style.safetensors' -> MODEL shared (-0.8), CLIP local (0); stack size 2
[WARNING] [LunaConfigGateway] Warning: LoRA 'nonexistent' not found, skipped
[INFO] [lunashm] attached a.safetensors: 1130 tensors, 4.02 GB shared, 1.2 MB private
[WARNING] [lunashm] b.ckpt is loaded locally, until ComfyUI unloads it: b.ckpt is no safetensors file
"""


def test_log_lines_are_read_as_they_are_written() -> None:
    server = Server("")
    log = LunaLog(server)
    server.text = SAID
    (shared,) = log.shared()
    assert (shared.what, shared.name, shared.nbytes) == ("MODEL", "a b.safetensors", 1.72e9)
    assert (shared.endpoint, shared.rung, shared.device) == ("ipc:///run/x.sock", "cuda-vmm", "NVIDIA H100")
    assert (shared.private_nbytes, shared.mode) == (0.1e6, "auto")
    warned, quiet = log.local()
    assert (warned.warned, warned.what, warned.reason) == (True, "CLIP", "no lunashm host at ipc:///x; start one")
    assert (quiet.warned, quiet.what, quiet.mode) == (False, "VAE", "force_local")
    (applied,) = log.applied()
    assert (applied.name, applied.places, applied.size) == ("sub/style.safetensors", ("shared", "local"), 2)
    assert (applied.model_strength, applied.clip_strength) == (-0.8, 0.0)
    assert log.missing() == ["nonexistent"]
    (attached,) = log.attached()
    assert (attached.name, attached.tensors, attached.nbytes) == ("a.safetensors", 1130, pytest.approx(4.02e9))
    assert len(log.warned_of("b.ckpt")) == 1 and not log.warned_of("a.safetensors")


def test_log_begins_when_it_is_made() -> None:
    assert LunaLog(Server(SAID)).lines == []


# -- memory ------------------------------------------------------------------------------------------------------------


def looks(client: list[float], host: list[float] | None = None) -> list[Held]:
    hosts = host or [10.0] * len(client)
    return [
        Held(int(h * MB), (int(c * MB), 0), int((c + h) * MB), 500 * MB) for c, h in zip(client, hosts, strict=True)
    ]  # fmt: skip


def flat(client: list[float], host: list[float] | None = None) -> bool:
    found = fresh()
    claim_flat(found, "10 prompts", looks(client, host), 10)
    return found.passed


def test_memory_that_stays_is_flat_one_step_of_the_allocator_included() -> None:
    assert flat([700.0, 700.1, 700.2, 728.9, 729.0, 729.1])


def test_a_little_more_at_every_prompt_is_not_flat() -> None:
    assert not flat([700.0, 702.0, 704.0, 706.0, 708.0, 710.0])


def test_a_peak_that_goes_away_again_is_not_flat() -> None:
    assert not flat([700.0, 700.1, 1000.0, 700.2, 700.3, 700.3])


def test_a_host_that_grows_is_not_flat() -> None:
    assert not flat([700.0] * 6, [10.0, 10.0, 30.0, 30.0, 30.0, 30.0])


def test_a_peak_is_seen_and_a_failed_look_is_raised() -> None:
    values = iter([5, 9, 7])
    with Peak(lambda: next(values, 6)) as peak:
        while peak.looks < 5:
            pass
    assert peak.highest == 9

    def gone() -> int:
        if broken.looks:
            raise ProcessLookupError("process 1 is gone")
        return 1

    broken = Peak(gone)
    with pytest.raises(ProcessLookupError), broken:
        broken._thread.join(5)


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_two_levels_are_rounding_in_float32_and_three_are_not() -> None:
    plain = np.full((4, 4, 3), 100, np.uint8)
    assert levels(plain + np.uint8(2), plain) == 2
    assert within_rounding(plain + np.uint8(2), plain, float32=True)
    assert not within_rounding(plain + np.uint8(3), plain, float32=True)
    assert not within_rounding(plain[:2], plain, float32=True)


def test_luna_graph_samples_as_the_stock_one_does() -> None:
    picture = Picture("a.safetensors", 64, 2, seed=3, loras=stack(("style", 0.8), ("line", -1.0, 0.5)))
    ours, theirs = graphs.luna(picture), graphs.stock(picture)
    assert ours["gateway"]["inputs"]["positive"].endswith("light<lora:style:0.8:0.8><lora:line:-1.0:0.5>")
    for name in ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise"):
        assert ours["sampler"]["inputs"][name] == theirs["sampler"]["inputs"][name]
    stacked = graphs.luna(picture, stacked=True)
    assert stacked["gateway"]["inputs"]["lora_stack"] == ["stack0", 0]
    assert stacked["stack0"]["inputs"]["clip_strength_2"] == 0.5


def test_a_long_stack_takes_several_stack_nodes() -> None:
    seven = stack(*((f"l{number}", 1.0) for number in range(7)))
    graph = graphs.luna(Picture("a.safetensors", 64, 2, loras=seven), stacked=True)
    assert graph["gateway"]["inputs"]["lora_stack"] == ["stack1", 0]
    assert graph["stack1"]["inputs"]["lora_stack"] == ["stack0", 0]
    assert graph["stack1"]["inputs"]["lora_2"] == "l6.safetensors"
