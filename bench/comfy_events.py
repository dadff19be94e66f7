"""When a ComfyUI began each node of a prompt, by its own websocket: what polling its history is too coarse for.

Needs aiohttp, which ComfyUI itself needs. Knows no workload; times are this process's monotonic clock when a message
arrived. A node ends where the next begins: ComfyUI says nothing at the end of one.

    with Events(server) as events:
        timed = events.run(graph)
        timed.node_s["sampler"]

Who wants to hear of everything at once, of each sampling step, say, gives a listener; it is called in that thread.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from bench.comfy_api import ComfyApi, ComfyError, Workflow

CONNECT_TIMEOUT_S = 30.0
ENDED = ("execution_success", "execution_error", "execution_interrupted")


@dataclass(frozen=True)
class Timed:
    """One prompt. `node_s`: seconds of every node that ran, by id, in order; `total_s`: from the first node's begin."""

    entry: dict[str, Any]
    node_s: dict[str, float]
    total_s: float


class Events:
    """Context manager: a websocket of one server, heard in a thread of its own."""

    def __init__(self, server: ComfyApi, listener: Callable[[str, dict[str, Any]], None] | None = None) -> None:
        """`listener`: called with the kind and the data of every message."""
        self._listener = listener
        self._aiohttp = importlib.import_module("aiohttp")  # the rest of the GPU suite does without
        self._server, self._client = server, uuid.uuid4().hex
        self._heard: list[tuple[float, str, dict[str, Any]]] = []
        self._news = threading.Condition()
        self._connected, self._failed = threading.Event(), ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._serve, name="comfy-events", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._connected.wait(CONNECT_TIMEOUT_S) or self._failed:
            self.close()
            raise self._server.failure(f"has no websocket: {self._failed or 'no answer in time'}")
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._loop is not None and self._task is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(5.0)

    def run(self, workflow: Workflow, timeout_s: float = 300.0) -> Timed:
        """Queue a workflow and wait for its end. Raises as ComfyApi.run."""
        with self._news:
            self._heard.clear()
        prompt = self._server.queue(workflow, self._client)
        deadline = time.monotonic() + timeout_s
        with self._news:
            self._news.wait_for(lambda: self._failed or self._end(prompt), timeout_s)
            heard = [one for one in self._heard if one[2].get("prompt_id") == prompt]
        entry = self._server.wait(prompt, max(1.0, deadline - time.monotonic()))
        began = [(at_s, str(data["node"])) for at_s, kind, data in heard if kind == "executing" and data.get("node")]
        end_s = next((at_s for at_s, kind, _ in heard if kind in ENDED), None)
        if end_s is None or not began:
            raise ComfyError(f"no times were heard of prompt {prompt}: {self._failed or 'the websocket was silent'}")
        ends = [*(at_s for at_s, _ in began[1:]), end_s]
        node_s = {node: end - at_s for (at_s, node), end in zip(began, ends, strict=True)}
        return Timed(entry, node_s, end_s - began[0][0])

    def _end(self, prompt: str) -> bool:
        return any(kind in ENDED and data.get("prompt_id") == prompt for _, kind, data in self._heard)

    def _serve(self) -> None:
        self._loop = asyncio.new_event_loop()
        try:
            self._task = self._loop.create_task(self._listen())
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        except (self._aiohttp.ClientError, OSError) as exc:
            self._fail(str(exc))
        finally:
            self._loop.close()
            self._fail(self._failed or "the server closed it")
            self._connected.set()

    def _fail(self, why: str) -> None:
        with self._news:
            self._failed = why
            self._news.notify_all()

    async def _listen(self) -> None:
        url = f"ws://{self._server.host}:{self._server.port}/ws?clientId={self._client}"
        async with self._aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            self._connected.set()
            async for message in socket:
                if message.type is self._aiohttp.WSMsgType.TEXT:
                    said = json.loads(message.data)
                    kind, data = said["type"], said.get("data") or {}
                    if self._listener is not None:
                        self._listener(kind, data)
                    with self._news:
                        self._heard.append((time.monotonic(), kind, data))
                        if kind in ENDED:
                            self._news.notify_all()
