"""Who uses what of one host: its own words about models and clients, beside what its processes and device really use.

Pure: figures are arguments. On the CPU the sum of PSS counts every page once. On a GPU only the whole device's figure
can be trusted with that; what NVML says of single processes is passed on, and never added up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lunashm import protocol as p
from lunashm.memory import CPU
from lunashm.usage import ProcessId, Unseen
from lunashm.usage.history import Start
from lunashm.usage.nvml import GpuMemory
from lunashm.usage.ram import Ram


@dataclass(frozen=True)
class ProcessUse:
    """The host, or one client. Bytes; None for what is not known, and ``unseen`` says why.

    ``shared``: on the CPU the shared memory it maps, resident; on a GPU the models it holds, by the host's books.
    ``private`` and ``pss``: CPU only. ``nvml``: GPU only. ``peak``: the highest ``pss`` or ``nvml`` so far.
    """

    process: ProcessId
    kind: str
    label: str
    models: tuple[str, ...]
    shared_nbytes: int | None = None
    private_nbytes: int | None = None
    pss_nbytes: int | None = None
    nvml_nbytes: int | None = None
    peak_nbytes: int | None = None
    unseen: str = ""


@dataclass(frozen=True)
class RamUse:
    """``total``: PSS of the host and of the ``clients`` that can be seen, and ``unmapped``: weights that none of these
    maps. ``unshared``: what these clients would use with a copy each of the models they hold, and no host.
    """

    total_nbytes: int
    unmapped_nbytes: int
    unshared_nbytes: int
    clients: int
    peak_nbytes: int | None = None


@dataclass(frozen=True)
class DeviceUse:
    """Of the whole device, whoever uses it. ``delta``: since ``since``, ISO 8601; ``beyond``: the shared weights."""

    used_nbytes: int
    total_nbytes: int
    since: str
    delta_nbytes: int
    beyond_nbytes: int


@dataclass(frozen=True)
class HostUse:
    """``state``: ``up``, or the code of the error that ``trouble`` tells of; figures are then of the last answer.

    ``weights``: memory that the models take, each once. ``processes``: the host, then its clients.
    """

    endpoint: str
    state: str
    trouble: str = ""
    host: p.HostInfo | None = None
    uptime_s: float = 0.0
    models: tuple[p.ModelInfo, ...] = ()
    processes: tuple[ProcessUse, ...] = ()
    clients: int = 0
    weights_nbytes: int = 0
    saved_nbytes: int = 0
    ram: RamUse | None = None
    device: DeviceUse | None = None
    unseen: str = ""

    @property
    def gpu(self) -> bool:
        return self.host is not None and self.host.device != CPU


def host_process(host: p.HostInfo) -> ProcessId:
    return ProcessId(host.pid, host.pid_namespace)


def client_process(client: p.ClientStatus) -> ProcessId:
    return ProcessId(client.info.pid, client.info.pid_namespace, client.info.start_ticks)


def on_cpu(
    status: p.Status, clients: tuple[p.ClientStatus, ...], memory: Mapping[ProcessId, Ram | Unseen]
) -> HostUse:
    """``memory``: of the host and of every client."""

    def fill(use: ProcessUse) -> ProcessUse:
        found = memory[use.process]
        if isinstance(found, Unseen):
            return replace(use, unseen=found.reason)
        return replace(use, shared_nbytes=found.shared, private_nbytes=found.private, pss_nbytes=found.pss)

    book = _book(status, clients)
    seen = {who: ram for who, ram in memory.items() if not isinstance(ram, Unseen)}
    once = {(who.pid, who.pid_namespace): ram for who, ram in seen.items()}  # the host may be its own client
    unmapped = max(0, book.weights_nbytes - sum(ram.pss_shared for ram in once.values()))
    own = {client_process(client) for client in clients} & seen.keys()
    beside = sum(seen[who].pss - seen[who].pss_shared for who in own)
    ram = RamUse(
        total_nbytes=sum(ram.pss for ram in once.values()) + unmapped,
        unmapped_nbytes=unmapped,
        unshared_nbytes=beside + sum(_held(status, clients, who) for who in own),
        clients=len(own),
    )
    return replace(book, processes=tuple(map(fill, book.processes)), ram=ram)


def on_gpu(
    status: p.Status, clients: tuple[p.ClientStatus, ...], memory: GpuMemory | Unseen, pid_namespace: int, start: Start
) -> HostUse:
    """``pid_namespace``: the one whose pids NVML is taken to name. ``start`` is of no use where memory is unseen."""
    book = _book(status, clients)
    host, *others = (_by_nvml(use, memory, pid_namespace) for use in book.processes)
    processes = (host, *(replace(use, shared_nbytes=_held(status, clients, use.process)) for use in others))
    if isinstance(memory, Unseen):
        return replace(book, processes=processes, unseen=memory.reason)
    delta, beyond = memory.used - start.used, memory.used - book.weights_nbytes
    device = DeviceUse(memory.used, memory.total, start.at, delta, beyond)
    return replace(book, processes=processes, device=device)


def _by_nvml(use: ProcessUse, memory: GpuMemory | Unseen, pid_namespace: int) -> ProcessUse:
    if isinstance(memory, Unseen):
        return use  # said once, for the device
    if isinstance(memory.processes, Unseen):
        return replace(use, unseen=memory.processes.reason)
    if use.process.pid_namespace != pid_namespace:
        return replace(use, unseen="in another PID namespace")
    if use.process.pid not in memory.processes:
        return replace(use, unseen="not among the processes that NVML names (in a container it may know other pids)")
    nbytes = memory.processes[use.process.pid]
    if nbytes is None:
        return replace(use, unseen="NVML has no figure for it")
    return replace(use, nvml_nbytes=nbytes)


def _book(status: p.Status, clients: tuple[p.ClientStatus, ...]) -> HostUse:
    """What the host itself says."""
    host = status.host
    processes = [ProcessUse(host_process(host), "host", "", ())]
    for client in clients:
        held = tuple(dict.fromkeys(lease.model for lease in client.leases))
        processes.append(ProcessUse(client_process(client), client.info.kind, client.info.label, held))
    return HostUse(
        endpoint=host.endpoint, state="up", host=host, uptime_s=status.uptime_s, models=status.models,
        processes=tuple(processes), clients=len(clients), saved_nbytes=status.saved_nbytes,
        weights_nbytes=sum(_taken(model, on_gpu=host.device != CPU) for model in status.models),
    )  # fmt: skip


def _taken(model: p.ModelInfo, on_gpu: bool) -> int:
    """Memory a model takes. While it loads only the file's size is known; a GPU gives it all at once, RAM by page."""
    if model.state != "loading":
        return model.memory_nbytes
    return model.nbytes if on_gpu and model.loaded_nbytes else model.loaded_nbytes


def _held(status: p.Status, clients: tuple[p.ClientStatus, ...], who: ProcessId) -> int:
    """Bytes of the models that one process holds, each once however many leases it has."""
    sizes = {model.generation: model.nbytes for model in status.models if model.state != "loading"}
    mine = [client for client in clients if client_process(client) == who]
    return sum(sizes.get(generation, 0) for generation in {one.generation for c in mine for one in c.leases})
