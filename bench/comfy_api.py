"""What one can ask of a running ComfyUI over HTTP, and how it fails.

Owns the requests and the errors; knows nothing of how the server was started (bench.comfy_server does).
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

Workflow = Mapping[str, Mapping[str, Any]]
# Loopback must never go through a proxy from the environment.
_HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))
POLL_S = 0.05


class ComfyError(Exception):
    """Anything that went wrong with a server; subclasses say what.

    ServerFailed    it died, did not come up, or did not answer in time (the message ends with the log's tail)
    PromptRejected  it refused the workflow (validation)
    PromptFailed    the workflow ran and failed, or was interrupted
    """


class ServerFailed(ComfyError):
    """The server died, did not come up, or did not answer in time."""


class PromptRejected(ComfyError):
    """Validation refused the workflow; `details` is the server's answer."""

    def __init__(self, details: object) -> None:
        super().__init__(f"prompt rejected: {json.dumps(details, indent=1)[:4000]}")
        self.details = details


class PromptFailed(ComfyError):
    """The workflow ran and failed or was interrupted; node, exception and traceback are in the message."""

    def __init__(self, prompt_id: str, entry: Mapping[str, Any]) -> None:
        messages = dict(entry.get("status", {}).get("messages", []))
        error = messages.get("execution_error", {})
        self.prompt_id, self.entry = prompt_id, entry
        self.interrupted = "execution_interrupted" in messages
        self.exception_type: str = error.get("exception_type", "")
        self.exception_message: str = error.get("exception_message", "").strip()
        if self.interrupted:
            super().__init__(f"prompt {prompt_id} was interrupted")
        else:
            where = f"node {error.get('node_id')} ({error.get('node_type')})"
            what = f"{self.exception_type}: {self.exception_message}"
            super().__init__(f"prompt {prompt_id}: {where}: {what}\n{''.join(error.get('traceback', []))}")


class ComfyApi:
    """A client of one ComfyUI; every request is a connection of its own, so threads may share it."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.port, self.host = port, host

    def queue(self, workflow: Workflow, client_id: str | None = None) -> str:
        """Submit a workflow in API format; returns its prompt id. Raises PromptRejected.

        `client_id`: of the websocket that is to hear of it (bench.comfy_events).
        """
        try:
            body = {"prompt": workflow} | ({"client_id": client_id} if client_id else {})
            answer = json.loads(self.request("/prompt", body))
        except urllib.error.HTTPError as exc:
            raise PromptRejected(json.loads(exc.read())) from exc
        if answer.get("node_errors"):  # some outputs are valid, others were dropped: not what was asked for
            raise PromptRejected(answer)
        return str(answer["prompt_id"])

    def wait(self, prompt_id: str, timeout_s: float = 300.0) -> dict[str, Any]:
        """The history entry of a finished prompt. Raises PromptFailed, or ServerFailed at the deadline."""
        deadline = time.monotonic() + timeout_s
        while True:
            entry = json.loads(self.request(f"/history/{prompt_id}")).get(prompt_id)
            if entry is not None:
                if not entry["status"]["completed"]:
                    raise PromptFailed(prompt_id, entry)
                return dict(entry)
            if time.monotonic() > deadline:
                raise self.failure(f"did not finish prompt {prompt_id} in {timeout_s:.0f} s")
            time.sleep(POLL_S)

    def run(self, workflow: Workflow, timeout_s: float = 300.0) -> dict[str, Any]:
        """Queue a workflow and wait for it; returns its history entry."""
        return self.wait(self.queue(workflow), timeout_s)

    def image(self, entry: Mapping[str, Any]) -> bytes:
        """The bytes of the first image that a finished prompt saved."""
        for output in entry["outputs"].values():
            for image in output.get("images", ()):
                return self.request("/view?" + urllib.parse.urlencode(image))
        raise ComfyError(f"the workflow saved no image; its outputs: {entry['outputs']}")

    def render(self, workflow: Workflow, timeout_s: float = 300.0) -> bytes:
        """Run a workflow and return the bytes of its first saved image (a PNG with the workflow in it)."""
        return self.image(self.run(workflow, timeout_s))

    def interrupt(self) -> None:
        """Interrupt the running prompt; its `wait` raises PromptFailed with `interrupted` set."""
        self.request("/interrupt", {})

    def free(self) -> None:
        """Ask for all models to be unloaded and cached results dropped. The answer comes before the deed."""
        self.request("/free", {"unload_models": True, "free_memory": True})

    def system_stats(self) -> dict[str, Any]:
        return dict(json.loads(self.request("/system_stats", timeout_s=5.0)))

    def failure(self, what: str) -> ServerFailed:
        """The error for a server that does not do as asked; overridden by those who know more of it."""
        return ServerFailed(f"ComfyUI on port {self.port} {what}")

    def request(self, path: str, body: object = None, timeout_s: float = 60.0) -> bytes:
        """POST with a body, else GET; returns the body of the answer.

        Raises ServerFailed without an answer, HTTPError for status 400 and ComfyError for any other.
        """
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{self.host}:{self.port}{path}", data, headers)
        try:
            with _HTTP.open(request, timeout=timeout_s) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as exc:
            if exc.code == 400:
                raise
            raise ComfyError(f"{path} answered {exc.code}: {exc.read()[:1000]!r}") from exc
        except OSError as exc:
            raise self.failure(f"did not answer {path}: {exc}") from exc
