"""Workflows in the real front end: whether it takes them as they are saved, and what they look like there.

Owns the browser (Chromium through Playwright, which is not among the project's requirements:
``pip install '.[pictures]'``); it reaches nothing but the ComfyUI it is given.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bench.pack.graph import GAP_X, GAP_Y
from bench.workflows import Graph

SCALE, MOST_WIDE = 0.7, 2100  # pixels of the picture for one of the graph's, and in all
QUALITIES = (85, 75, 65, 55, 45)
MOST_NBYTES = 150_000
WAIT_MS = 120_000
SETTLE_MS = 1500
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync")  # fmt: skip
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Graph.CanvasMenu": False,
    "Comfy.VueNodes.Enabled": True,
    "Comfy.Workflow.Persist": False,
}

_READY = "() => window.app?.vueAppReady && window.app.graph"
_FRAME = """([left, top, scale]) => {
    const ds = window.app.canvas.ds
    ds.scale = scale
    ds.offset = [-left, -top]
    window.app.graph.setDirtyCanvas(true, true)
}"""
_PLAIN = "() => { window.app.canvas.background_image = null }"  # dots make large files
_UNKNOWN = "() => window.app.graph.nodes.filter(n => n.has_errors).map(n => n.type)"


class FrontEndError(Exception):
    """The front end does not take a workflow as it is; the message says where the two differ."""


class FrontEnd:
    """One page, and what was loaded into it."""

    def __init__(self, page: Any) -> None:  # noqa: ANN401 - Playwright may be missing
        self._page = page

    def load(self, saved: Mapping[str, Any], expected: Graph) -> None:
        """Raises FrontEndError where it would send something else than ``expected`` to the server."""
        self._page.evaluate("saved => window.app.loadGraphData(saved)", saved)
        self._page.wait_for_timeout(SETTLE_MS)
        unknown = self._page.evaluate(_UNKNOWN)
        if unknown:
            raise FrontEndError(f"nodes with errors: {unknown}")
        sent = self._page.evaluate("async () => (await window.app.graphToPrompt()).output")
        plain = {
            node: {"class_type": one["class_type"], "inputs": _declared(one["inputs"], expected.get(node))}
            for node, one in sent.items()
        }
        for node in sorted({*plain, *expected}, key=int):
            if plain.get(node) != expected.get(node):
                raise FrontEndError(f"node {node} is sent as {plain.get(node)}, expected is {expected.get(node)}")

    def picture(self) -> bytes:
        """A JPEG of the whole graph."""
        nodes = self._page.evaluate("() => window.app.graph.nodes.map(n => [...n.pos, ...n.size])")
        left, top = min(n[0] for n in nodes) - GAP_X / 2, min(n[1] for n in nodes) - GAP_Y
        right, bottom = max(n[0] + n[2] for n in nodes) + GAP_X / 2, max(n[1] + n[3] for n in nodes) + GAP_Y / 2
        scale = min(SCALE, MOST_WIDE / (right - left))
        size = {"width": round((right - left) * scale), "height": round((bottom - top) * scale)}
        self._page.set_viewport_size(size)
        self._page.wait_for_timeout(SETTLE_MS)
        self._page.evaluate(_FRAME, [left, top, scale])
        self._page.wait_for_timeout(SETTLE_MS)
        for quality in QUALITIES:
            shot = bytes(self._page.screenshot(type="jpeg", quality=quality))
            if len(shot) <= MOST_NBYTES:
                return shot
        raise FrontEndError(f"no picture of it has less than {MOST_NBYTES} bytes")


def _declared(inputs: Mapping[str, Any], expected: Mapping[str, Any] | None) -> dict[str, Any]:
    """Without widgets that the front end itself gives a node, to show things in."""
    known = expected["inputs"] if expected is not None else inputs
    return {name: value for name, value in inputs.items() if name in known}


@contextmanager
def front_end(port: int) -> Iterator[FrontEnd]:
    """The front end of the ComfyUI at ``port``, with nothing on the screen but the graph."""
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - only who makes pictures has it

    origin = f"http://127.0.0.1:{port}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=_chromium(), args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1600, "height": 900})
        page.route("**/*", lambda route: route.continue_() if route.request.url.startswith(origin) else route.abort())
        page.request.post(f"{origin}/api/settings", data=json.dumps(SETTINGS))
        page.goto(origin)
        page.wait_for_function(_READY, timeout=WAIT_MS)
        page.wait_for_timeout(2 * SETTLE_MS)
        page.evaluate("() => window.app.extensionManager.command.execute('Workspace.ToggleFocusMode')")
        page.add_style_tag(content="button[aria-label='Show Menu'], .p-toast { display: none !important }")
        page.evaluate(_PLAIN)
        yield FrontEnd(page)
        browser.close()


def _chromium() -> str:
    named = os.environ.get("CHROMIUM")
    found = named or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        raise FileNotFoundError("no Chromium is installed; CHROMIUM names one that is elsewhere")
    return found
