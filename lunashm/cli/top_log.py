"""The file that ``top --csv`` appends to. README has the columns; they keep their names and their order."""

from __future__ import annotations

import csv
import io
import os
import stat
from pathlib import Path

from lunashm.cli.output import clean
from lunashm.errors import SettingsError
from lunashm.usage.account import HostUse, ProcessUse

COLUMNS = (
    "time", "row", "endpoint", "device", "state", "pid", "kind", "label", "models",
    "shared_nbytes", "private_nbytes", "pss_nbytes", "nvml_nbytes", "peak_nbytes",
    "clients", "weights_nbytes", "total_nbytes", "unshared_nbytes",
    "device_used_nbytes", "device_total_nbytes", "device_delta_nbytes", "device_beyond_nbytes",
)  # fmt: skip
"""A ``host`` row for each host, with its totals; then a ``client`` row for each of its clients. Unknown: empty."""

_HEADER = ",".join(COLUMNS) + "\n"


class Log:
    """Raises SettingsError for a file with other columns, and OSError where it cannot be written."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._write(_start(self._file, path))
        except BaseException:
            self.close()
            raise

    def append(self, at: str, hosts: tuple[HostUse, ...]) -> None:
        """One look, in one write: it is in the file when this returns."""
        text = io.StringIO()
        rows = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        for host in hosts:
            rows.writerow({"time": at, **_host(host)})
            client: dict[str, object] = {"time": at, "row": "client", "endpoint": host.endpoint}
            client |= {"device": host.host.device} if host.host else {}
            rows.writerows(client | _process(use) for use in host.processes[1:])
        self._write(text.getvalue())

    def close(self) -> None:
        os.close(self._file)

    def _write(self, text: str) -> None:
        left = memoryview(text.encode())
        while left:
            left = left[os.write(self._file, left) :]


def _start(file: int, path: Path) -> str:
    """What has to come first: the header in a new file, a line break after a line that was not finished."""
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
        return _HEADER
    header = _HEADER.encode()
    if os.pread(file, len(header), 0) != header:
        raise SettingsError(f"{path} is there and has other columns than this log; name a new file, or remove it")
    return "" if os.pread(file, 1, found.st_size - 1) == b"\n" else "\n"


def _host(host: HostUse) -> dict[str, object]:
    row: dict[str, object] = {"row": "host", "endpoint": host.endpoint, "state": host.state}
    if host.host is not None:
        row["device"] = host.host.device
    if host.processes:
        row |= _process(host.processes[0]) | {"clients": host.clients, "weights_nbytes": host.weights_nbytes}
    if host.ram is not None:
        row |= {"total_nbytes": host.ram.total_nbytes, "unshared_nbytes": host.ram.unshared_nbytes}
    if host.device is not None:
        use = host.device
        row |= {"device_used_nbytes": use.used_nbytes, "device_total_nbytes": use.total_nbytes}
        row |= {"device_delta_nbytes": use.delta_nbytes, "device_beyond_nbytes": use.beyond_nbytes}
    return row


def _process(use: ProcessUse) -> dict[str, object]:
    return {
        "pid": use.process.pid, "kind": clean(use.kind).plain, "label": clean(use.label).plain,
        "models": "; ".join(clean(name).plain for name in use.models), "shared_nbytes": use.shared_nbytes,
        "private_nbytes": use.private_nbytes, "pss_nbytes": use.pss_nbytes, "nvml_nbytes": use.nvml_nbytes,
        "peak_nbytes": use.peak_nbytes,
    }  # fmt: skip
