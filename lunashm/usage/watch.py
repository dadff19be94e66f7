"""One watching of hosts: asks /proc and NVML, and remembers peaks. Knows no sockets and shows nothing."""

from __future__ import annotations

from dataclasses import replace

from lunashm import protocol as p
from lunashm.memory import CPU
from lunashm.process import namespace
from lunashm.usage import Unseen, account
from lunashm.usage.account import HostUse, ProcessUse
from lunashm.usage.history import History, Start
from lunashm.usage.meter import Meter
from lunashm.usage.nvml import Nvml


class Watch:
    """Ends with :meth:`close`."""

    def __init__(self) -> None:
        self._history = History()
        self._meters: dict[str, Meter] = {}
        self._nvml = Nvml()

    def begin(self, at: str) -> None:
        """Later figures are compared with where every GPU stands now, those that no host uses yet included."""
        uuids = self._nvml.uuids()
        for uuid in () if isinstance(uuids, Unseen) else uuids:
            memory = self._nvml.memory(uuid)
            if not isinstance(memory, Unseen):
                self._history.start(uuid, memory.used, at)

    def use(self, status: p.Status, clients: tuple[p.ClientStatus, ...], at: str) -> HostUse:
        """What one host's processes and device use. ``at``: now, ISO 8601."""
        device = status.host.device
        if device == CPU:
            meter = self._meters.setdefault(status.host.host_id, Meter())
            processes = {account.host_process(status.host), *map(account.client_process, clients)}
            found = account.on_cpu(status, clients, meter.read(list(processes)))
        else:
            memory = self._nvml.memory(device)
            start = Start(at, 0) if isinstance(memory, Unseen) else self._history.start(device, memory.used, at)
            found = account.on_gpu(status, clients, memory, namespace(), start)
        return self._with_peaks(found, status.host.host_id)

    def close(self) -> None:
        self._nvml.close()

    def _with_peaks(self, use: HostUse, host_id: str) -> HostUse:
        def peak(one: ProcessUse) -> ProcessUse:
            now = one.pss_nbytes if one.nvml_nbytes is None else one.nvml_nbytes
            return replace(one, peak_nbytes=self._history.peak((host_id, one.process), now))

        totals = use.ram and replace(use.ram, peak_nbytes=self._history.peak(host_id, use.ram.total_nbytes))
        return replace(use, processes=tuple(map(peak, use.processes)), ram=totals)
