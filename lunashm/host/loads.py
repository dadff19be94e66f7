"""Requests that want a model: answered from the catalog, or parked with a load job until it ends.

One job per file and set of dtypes, whoever asks how often. One thread; ``submit`` has the work done in another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec

from lunashm import protocol as p
from lunashm.errors import LoadCancelled, LoadTimeout, LunashmError, ModelNotReady
from lunashm.host import checkpoint, loader
from lunashm.host.arena import Arena
from lunashm.host.catalog import Catalog, Generation
from lunashm.host.leases import Clock
from lunashm.host.loading import Job, Outcome, Waiter
from lunashm.host.reports import Reports
from lunashm.manifest import DtypeRule, Manifest, Source, check_rules

log = logging.getLogger(__name__)

PROGRESS_EVERY_S = 0.2


class Loads:
    """``reply`` answers a waiter, ``refuse`` makes (and counts) the reply to one who gets nothing; ``admitted`` hears
    of each generation that a load became."""

    def __init__(
        self,
        *,
        roots: tuple[str, ...],
        catalog: Catalog,
        arena: Arena,
        reports: Reports,
        submit: Callable[[Job], None],
        reply: Callable[[Waiter, p.Message], None],
        refuse: Callable[[LunashmError], p.ErrorReply],
        admitted: Callable[[Generation], None],
        publish: Callable[[p.Event], None],
        clock: Clock,
    ) -> None:
        self.jobs: list[Job] = []
        self._roots = roots
        self._catalog = catalog
        self._arena = arena
        self._reports = reports
        self._submit = submit
        self._reply = reply
        self._refuse = refuse
        self._admitted = admitted
        self._publish = publish
        self._clock = clock
        self._next_progress = 0.0

    def want(self, waiter: Waiter, was_loaded: bool = True) -> p.Message | None:
        """The model a request names, now if it is loaded, else later: then the waiter is parked with a job (None).

        Raises what makes the request impossible, or ModelNotReady for one who does not want to wait.
        """
        request = waiter.request
        rules = check_rules(request.rules)
        path = checkpoint.resolve(request.path, self._roots)
        source = checkpoint.identify(path)
        generation = self._catalog.current(source, rules)
        if generation is not None:
            return self._grant(request, generation, source, was_loaded)
        job = next((j for j in self.jobs if j.would_satisfy(source, rules)), None)
        if job is None:
            job = self._start(checkpoint.display_name(request.path, path), source, rules)
        if request.wait_s <= 0:
            raise ModelNotReady(f"{job.name} is still being loaded by the host; wait for it, or retry in a moment")
        job.waiters.append(waiter)
        return None

    def _grant(
        self, request: p.Attach | p.Load, generation: Generation, source: Source, was_loaded: bool
    ) -> p.Loaded | p.Attached:
        """``source``: the file as the client asked for it; the generation may have been loaded from another."""
        if isinstance(request, p.Load):
            return p.Loaded(self._reports.model(generation), was_loaded)
        lease, handles, ticket = self._arena.grant(request.client, generation)
        return p.Attached(lease.id, msgspec.structs.replace(generation.manifest, source=source), handles, ticket)

    def _start(self, name: str, source: Source, rules: tuple[DtypeRule, ...]) -> Job:
        """Begin to load. A file that cannot be served is refused here, before anyone waits for it."""
        specs = loader.plan(checkpoint.read(Path(source.path)), rules).specs
        self._retire(self._catalog.resized(source), source)
        job = Job(name, source, rules, specs, self._catalog.suspects(source), self._clock())
        self.jobs.append(job)
        log.info("loading %s: %.2f GB", source.path, source.size / 1e9)
        self._submit(job)
        return job

    # -- a job's end -----------------------------------------------------------------------------------------------

    def finish(self, job: Job, result: Outcome | BaseException) -> None:
        """Everyone who waited is answered, or waits for another job if this one does not suit them."""
        self.jobs.remove(job)
        waiters = job.take_waiters()
        error = self._settle(job, result)
        if error is None:
            for waiter in waiters:
                self._retry(waiter)
            return
        refusal = self._refuse(error)
        self._publish(p.LoadFailed(job.source.path, error.code, error.message))
        for waiter in waiters:
            self._reply(waiter, refusal)

    def _settle(self, job: Job, result: Outcome | BaseException) -> LunashmError | None:
        """Make of a result what it is worth; returns why it is worth nothing."""
        try:
            if isinstance(result, BaseException):
                raise result
            if job.cancelled.is_set():
                result.discard()
                raise _unloaded(job)
            self._admit(job, result)
        except LunashmError as exc:
            log.warning("loading %s failed: %s", job.source.path, exc)
            return exc
        except BaseException as exc:
            log.exception("loading %s failed", job.source.path)
            if isinstance(result, Outcome) and not self._owns(result):
                result.discard()
            return LunashmError(f"loading {job.source.path} failed: {exc!r}; the host's log has the traceback")
        return None

    def _owns(self, outcome: Outcome) -> bool:
        return any(outcome.loaded and outcome.loaded.segment in g.segments for g in self._catalog.all)

    def _retry(self, waiter: Waiter) -> None:
        try:
            answer = self.want(waiter, was_loaded=False)
        except LunashmError as exc:
            answer = self._refuse(exc)
        except Exception as exc:
            log.exception("%s failed", type(waiter.request).__name__)
            answer = self._refuse(LunashmError(f"the host failed on {waiter.request.path}: {exc!r}"))
        if answer is not None:
            self._reply(waiter, answer)

    def _admit(self, job: Job, outcome: Outcome) -> None:
        """Make a finished load a generation, or fold it into one with the same bytes and dtypes.

        Where there is neither (same bytes, but wanted in other dtypes) the waiters' retry starts the real load.
        """
        source = outcome.checkpoint.source
        self._retire(self._catalog.learn(source, outcome.digest), source)
        twin = self._catalog.same_bytes(outcome.digest, job.rules)
        if twin is not None:
            outcome.discard()
            log.info("%s holds the bytes of generation %d; sharing it", source.path, twin.id)
        elif outcome.loaded is not None:
            generation = self._generation(job, outcome, outcome.loaded)
            self._arena.add(generation)
            self._admitted(generation)

    def _generation(self, job: Job, outcome: Outcome, loaded: loader.LoadedSegment) -> Generation:
        source = outcome.checkpoint.source
        manifest = Manifest(
            name=job.name,
            digest=outcome.digest,
            generation=self._catalog.next_id(),
            source=source,
            rules=job.rules,
            tensors=outcome.layout.specs,
            segments=(outcome.layout.nbytes,),
            metadata=outcome.checkpoint.metadata,
        )
        rung = loaded.segment.export().rung
        log.info(
            "generation %d ready: %s, %d tensors, %.2f GB (%d bytes) of %s memory in %.1f s (%.2f GB/s), blake3 %s",
            manifest.generation, manifest.name, len(manifest.tensors), manifest.nbytes / 1e9, manifest.nbytes, rung,
            outcome.elapsed_s, source.size / 1e9 / max(outcome.elapsed_s, 1e-9), outcome.digest[:12],
        )  # fmt: skip
        return Generation(manifest, (loaded.segment,), outcome.elapsed_s, rung, {source})

    def _retire(self, generations: list[Generation], source: Source) -> None:
        """I3: what is left of a file that holds other bytes now is never lent again."""
        for generation in generations:
            log.info("generation %d of %s is superseded: the file changed", generation.id, source.path)
            self._arena.drain(generation)

    # -- a wait's other ends ---------------------------------------------------------------------------------------

    def cancel(self, name: str) -> Job | None:
        """Stop loading what is called so; returns one of the jobs, or None if there was none."""
        jobs = [job for job in self.jobs if job.is_called(name) and not job.cancelled.is_set()]
        for job in jobs:
            self._stop(job, _unloaded(job))
        return jobs[0] if jobs else None

    def drop_client(self, client_id: str, why: LunashmError) -> None:
        """Its process may still be there (it was only silent): its requests hear of it."""
        for job in self.jobs:
            gone = [waiter for waiter in job.waiters if waiter.client == client_id]
            job.waiters = [waiter for waiter in job.waiters if waiter.client != client_id]
            for waiter in gone:
                self._reply(waiter, p.ErrorReply(why.code, why.message))

    def close(self, why: LunashmError) -> None:
        for job in self.jobs:
            self._stop(job, why)

    def _stop(self, job: Job, why: LunashmError) -> None:
        """The job's thread notices at its next piece; whoever waits need not."""
        job.cancelled.set()
        for waiter in job.take_waiters():
            self._reply(waiter, p.ErrorReply(why.code, why.message))

    def tick(self) -> None:
        """Let time pass: parked requests reach their deadline, progress is told."""
        now = self._clock()
        for job in self.jobs:
            late = [waiter for waiter in job.waiters if waiter.deadline <= now]
            job.waiters = [waiter for waiter in job.waiters if waiter.deadline > now]
            for waiter in late:
                text = f"not loaded within {waiter.request.wait_s:g} s ({job.done} of {job.source.size} bytes)"
                error = LoadTimeout(f"{job.name} was {text}; it goes on loading, retry or wait longer")
                self._reply(waiter, self._refuse(error))
        if now >= self._next_progress:
            self._next_progress = now + PROGRESS_EVERY_S
            for job in self.jobs:
                self._publish(p.LoadProgress(job.source.path, job.name, job.done, job.source.size, now - job.started))


def _unloaded(job: Job) -> LoadCancelled:
    return LoadCancelled(f"{job.name} was unloaded while it was loading; load it again if you want it")
