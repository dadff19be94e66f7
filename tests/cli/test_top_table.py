from __future__ import annotations

import io

import pytest
from rich.console import Console

from lunashm import protocol as p
from lunashm.cli.top_table import Fitted, shown
from lunashm.usage import ProcessId
from lunashm.usage.account import DeviceUse, HostUse, ProcessUse, RamUse

GB = 10**9


def info(device):
    return p.HostInfo("id", 41, 7, device, f"{device} name", "posix", "", "ipc:///x.sock", "1", (), 0.0)


def model(name, state="ready"):
    return p.ModelInfo(
        name=name, path="/m", digest="", generation=1, state=state, rung="posix", dtypes={}, tensors=1, nbytes=4 * GB,
        memory_nbytes=4 * GB, loaded_nbytes=GB, clients=2, saved=4 * GB, until="unload", load_s=0.5, rules=(),
    )  # fmt: skip


def process(pid, unseen="", **figures):
    label = "painter [red]\x1b[31m with a name"
    return ProcessUse(ProcessId(pid, 7), "comfyui", label, ("sd15-pruned-ema.safetensors",), unseen=unseen, **figures)


CPU = HostUse(
    endpoint="ipc:///x.sock", state="up", host=info("cpu"), uptime_s=187.0, clients=3,
    models=(model("sd15-pruned-ema.safetensors"), model("a-large-one.safetensors", "loading")),
    processes=(
        ProcessUse(ProcessId(41, 7), "host", "", (), pss_nbytes=30_000_000, peak_nbytes=31_000_000),
        process(4_194_303, shared_nbytes=4 * GB, private_nbytes=270_000_000, pss_nbytes=2 * GB, peak_nbytes=3 * GB),
        process(43, "in another PID namespace"), process(44, "in another PID namespace"),
    ),
    ram=RamUse(5 * GB, GB, 9 * GB, 1, 6 * GB),
)  # fmt: skip
GPU = HostUse(
    endpoint="ipc:///g.sock", state="up", host=info("GPU-a"), clients=1, weights_nbytes=4 * GB,
    processes=(process(41), process(42, shared_nbytes=4 * GB, nvml_nbytes=GB, peak_nbytes=GB)),
    device=DeviceUse(20 * GB, 80 * GB, "2026-11-23T10:00:00+00:00", 17 * GB, 16 * GB),
)  # fmt: skip


def text(hosts, width=200, height=None):
    console = Console(width=width, height=height, file=io.StringIO(), force_terminal=False)
    content = shown(hosts, width)
    console.print(content if height is None else Fitted(content))
    return console.file.getvalue()


def test_a_host_on_the_cpu_with_its_models_and_processes():
    lines = text((CPU,)).splitlines()
    assert lines[0] == "cpu name: posix, host pid 41, up 3 min 7 s"
    assert lines[1] == (
        "5.00 GB in use (PSS of the host and 1 client, and 1.00 GB of weights that these do not map); "
        "9.00 GB if nothing were shared; peak 6.00 GB"
    )
    assert lines[3].split() == ["MODEL", "SIZE", "CLIENTS", "SAVED", "UNTIL"]
    assert lines[4].split() == ["sd15-pruned-ema.safetensors", "4.00", "GB", "2", "4.00", "GB", "unload"]
    assert lines[5].endswith("loading 25% at 2.00 GB/s")
    assert lines[7].split() == ["PID", "KIND", "LABEL", "MODELS", "SHARED", "PRIVATE", "PSS", "PEAK"]
    assert lines[9].split()[-8:] == ["4.00", "GB", "270", "MB", "2.00", "GB", "3.00", "GB"]
    assert lines[10].split()[-4:] == ["-", "-", "-", "-"]
    assert lines[-1] == "- pid 43, 44: in another PID namespace"


def test_a_gpu_is_headed_by_what_the_whole_device_gained():
    lines = text((GPU,)).splitlines()
    assert "+17.0 GB since" in lines[1]
    assert "16.0 GB beyond the shared weights (4.00 GB): the device has 20.0 GB of 80.0 GB in use" in lines[1]
    assert lines[3].split() == ["PID", "KIND", "LABEL", "MODELS", "SHARED", "NVML", "PEAK"]


@pytest.mark.parametrize("width", [60, 79, 80, 100])
def test_numbers_are_whole_on_any_screen(width):
    lines = text((CPU, GPU), width).splitlines()
    assert max(map(len, lines)) <= width
    (row,) = [line for line in lines if line.startswith("4194303")]
    assert "4.00 GB" in row
    assert "270 MB" in row
    assert row.split()[-2:] == ["3.00", "GB"]
    assert any("25% at 2.00 GB/s" in line for line in lines)
    assert any("…" in line for line in lines), "names give way"


def test_names_can_neither_colour_nor_move():
    assert "\x1b" not in text((CPU,))
    assert "painter [red]\N{REPLACEMENT CHARACTER}[31m" in text((CPU,))


def test_what_does_not_fit_is_counted():
    whole = text((CPU,), 100).splitlines()
    short = text((CPU,), 100, height=6).splitlines()
    assert [line.rstrip() for line in short[:5]] == [line.rstrip() for line in whole[:5]]
    assert short[5].startswith(f"... {len(whole) - 5} more lines")
    assert len(short) == 6


def test_trouble_and_no_host_at_all_are_said():
    gone = HostUse("ipc:///x.sock", "host_lost", "the host (pid 41) is gone; start it", host=info("cpu"))
    assert text((gone,)).splitlines() == ["cpu name: posix, host pid 41", "the host (pid 41) is gone; start it"]
    assert text(()).startswith("no lunashm host is running; start one with: lunashm serve")
    blind = HostUse("ipc:///x.sock", "up", host=info("GPU-a"), unseen="NVML: lost")
    assert "the GPU's memory is not shown: NVML: lost" in text((blind,))
