"""What docs/comfyui.md and the nodes' help pages quote is what the code says, and every line that it logs is explained.

The code is read, not run. Its texts are cut where something is put into them, and so are the quoted messages, at names
and figures. Each two words that follow each other in a message have to do so in a piece of the code's texts, or be the
end of one and the beginning of another.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "comfyui.md"
PAGES = [GUIDE, *sorted((ROOT / "comfy_ext" / "web" / "docs").glob("*.md"))]
PUT_IN = re.compile(r"%[-+0-9.]*[sdrfg]")
SAMPLE = re.compile(
    r"\S+\.(?:safetensors|toml|comfy_quant|weight|alpha)|ipc://\S+|\[\d[\d, ]*\]|'[^']*'|lora_unet\w+|[\d.]*\d"
    r"|<lora:style:much>|No module named|NVIDIA A \(GPU-1b2c\)|AutoencoderKL|BaseModel|SDXLTokenizer"
    r"|PATH_TO_COMFYUI|SDXL|\bmps\b"
)
COMMANDS = ("lunashm ", "python ", "comfy ", "cd ", "git ")
OLD = "[DaemonModel]"
"""A message of the Luna daemon, quoted beside ours."""


@dataclass
class Vocabulary:
    """Of all texts in the code: words, which of them follow each other, and which begin and end a piece."""

    pairs: set[tuple[str, str]] = field(default_factory=set)
    firsts: set[str] = field(default_factory=set)
    lasts: set[str] = field(default_factory=set)

    def learn(self, piece: str) -> None:
        found = words(piece)
        if found:
            self.pairs |= set(pairwise(found))
            self.firsts.add(found[0])
            self.lasts.add(found[-1])

    def unknown(self, message: str) -> list[tuple[str, str]]:
        """The first pairs of words that the code does not have."""
        pairs = [pair for piece in SAMPLE.split(message) for pair in pairwise(words(piece))]
        return [(a, b) for a, b in pairs if (a, b) not in self.pairs and not (a in self.lasts and b in self.firsts)]


def words(text: str) -> list[str]:
    return re.findall(r"[A-Za-z]+", text)


def pieces(node: ast.expr) -> list[str]:
    """Of a string in the source, cut at % and {}; empty for what is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return PUT_IN.split(node.value)
    if isinstance(node, ast.JoinedStr):
        return [piece for value in node.values for piece in (pieces(value) or [""])]
    return []


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    """Docstrings are left out: they say nothing to users."""
    found = Vocabulary()
    for folder in ("comfy_ext", "lunashm"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            module = ast.parse(path.read_text())
            documents = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
            for node in ast.walk(module):
                if isinstance(node, ast.expr) and id(node) not in documents:
                    for piece in pieces(node):
                        found.learn(piece)
    return found


def logged() -> Iterator[tuple[str, re.Pattern[str]]]:
    """What every call that logs in the extension is given, and what it looks like filled in."""
    for path in sorted((ROOT / "comfy_ext").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called, receiver = node.func.attr, ast.unparse(node.func.value)
                first = 1 if called == "log" else 0
                if receiver in ("log", "_log") and len(node.args) > first:
                    cut = pieces(node.args[first])
                    yield "...".join(cut), re.compile(".+?".join(map(re.escape, cut)))


def quoted(page: Path) -> list[str]:
    """Messages in a page: code that is longer than a name and no command."""
    text = page.read_text()
    spans = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^    (\[.+)$", text, re.MULTILINE)
    long = [span for span in spans if span.startswith("[") or (" " in span and len(words(span)) >= 4)]
    return [span for span in long if not span.startswith((*COMMANDS, OLD, "[project", "[tool"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_message_that_is_quoted_is_in_the_code(page: Path, vocabulary: Vocabulary) -> None:
    assert {message: vocabulary.unknown(message) for message in quoted(page) if vocabulary.unknown(message)} == {}


def test_every_line_that_is_logged_is_explained() -> None:
    lines = [message for message in quoted(GUIDE) if message.startswith("[")]
    assert [text for text, pattern in logged() if not any(map(pattern.fullmatch, lines))] == []


def test_a_message_that_the_code_does_not_have_is_noticed(vocabulary: Vocabulary) -> None:
    assert not vocabulary.unknown("no lunashm host at ipc:///x; start one with: lunashm serve")
    assert vocabulary.unknown("there is no lunashm host here, please start a host")
    assert len(list(logged())) > 20
    assert sum(len(quoted(page)) for page in PAGES) > 60


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", GUIDE.read_text()):
        assert (GUIDE.parent / target.replace("%20", " ")).exists(), target
