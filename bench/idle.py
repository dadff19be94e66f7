"""What an idle host costs with idle clients attached: its share of one core.

Each client is a process of its own with a real lunashm.client.session.Session: registered, holding a lease, mapped,
renewing as any client does. They make no tensors, so they need no torch and are small; the host sees no difference.
CPU time is utime + stime of all threads (/proc/PID/stat), in several windows.

    python -m bench.idle --clients 16 --window 20 --windows 3
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

from bench import checkpoints, workload
from bench.checkpoints import ROOT
from bench.host import HostProcess
from bench.quiet import cpu_s
from bench.report import Figure, Report, add_arguments, emit

CLIENT = """
import sys
from lunashm.client.session import session_for
from lunashm.paths import Endpoint

session = session_for(Endpoint.parse(sys.argv[1]), kind="bench", label="idle client")
held = session.attach(sys.argv[2], (), 60.0)
assert "torch" not in sys.modules
print("attached", flush=True)
sys.stdin.read()
"""
SETTLE_S = 3.0


def start_client(file: Path, host: HostProcess) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, host.endpoint.url, str(file)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(file: Path, clients: int, window_s: float, windows: int) -> dict[str, list[float]]:
    """Shares of a core: the host's, and each client's on average, window by window."""
    found: dict[str, list[float]] = {"host": [], "mean client": []}
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(HostProcess(roots=[file.resolve().parent]))
        processes = [start_client(file, host) for _ in range(clients)]
        for process in processes:
            stack.callback(_end, process)
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != "attached\n":
                raise host.failure(f"has a client that could not attach (exit {process.wait()})")
        time.sleep(SETTLE_S)
        for _ in range(windows):
            began, host_s = time.monotonic(), cpu_s(host.pid)
            clients_s = [cpu_s(process.pid) for process in processes]
            time.sleep(window_s)
            took_s = time.monotonic() - began
            found["host"].append((cpu_s(host.pid) - host_s) / took_s)
            used = sum(cpu_s(process.pid) for process in processes) - sum(clients_s)
            found["mean client"].append(used / took_s / max(clients, 1))
    return found


def _end(process: subprocess.Popen[str]) -> None:
    """Closing its input ends a client; one that does not see that is killed."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.idle", description=about)
    parser.add_argument("--clients", type=int, default=16, help="default: 16")
    parser.add_argument("--window", type=float, default=20.0, metavar="SECONDS", help="default: 20")
    parser.add_argument("--windows", type=int, default=3, help="default: 3")
    parser.add_argument("--comfy", help="ComfyUI checkout (default: $LUNASHM_COMFYUI, else ~/ComfyUI)")
    add_arguments(parser)
    args = parser.parse_args(argv)
    file = workload.made("vae-tiny", "fp16", checkpoints.comfy_root(args.comfy), folder="vae")
    shares = run(file, args.clients, args.window, args.windows)
    figures = [
        Figure(f"idle host with {args.clients} idle clients, mean", fmean(shares["host"]), "cores", "<= 0.01"),
        Figure("one idle client, mean", fmean(shares["mean client"]), "cores"),
    ]
    samples = {f"{name}, cores": values for name, values in shares.items()}
    return 0 if emit(Report.of("idle", figures, samples), args.json, args.save) else 1


if __name__ == "__main__":
    sys.exit(main())
