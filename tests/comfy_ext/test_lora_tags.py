"""LoRA tags: what they ask for, and the text that is left without them."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfy_ext.nodes.lora_entry import LoraEntry
from comfy_ext.nodes.lora_tags import parse

names = st.text(st.characters(blacklist_characters="<>:\n", blacklist_categories=("Cs",)), min_size=1).filter(str.strip)
weights = st.floats(-100, 100).map(lambda weight: round(weight, 3))
words = st.text(st.sampled_from("abcé ,.()1:"), max_size=12)


@pytest.mark.parametrize(
    ("tag", "entry"),
    [
        ("<lora:style:0.8>", LoraEntry("style", 0.8, 0.8)),
        ("<lora:style:0.8:0.3>", LoraEntry("style", 0.8, 0.3)),
        ("<lora:style>", LoraEntry("style", 1.0, 1.0)),
        ("<LoRA:Style:1>", LoraEntry("Style", 1.0, 1.0)),
        ("<lora:sub/dir/style.safetensors:-.5>", LoraEntry("sub/dir/style.safetensors", -0.5, -0.5)),
        ("<lora:sub\\style v1.5:+1e-1>", LoraEntry("sub\\style v1.5", 0.1, 0.1)),
        ("< lora : a style : 0.5 : 0 >", LoraEntry("a style", 0.5, 0.0)),
        ("<lora:0.5:0.5>", LoraEntry("0.5", 0.5, 0.5)),
    ],
)
def test_a_tag_is_a_name_and_two_strengths(tag: str, entry: LoraEntry) -> None:
    parsed = parse(f"a cat {tag}")
    assert parsed.loras == (entry,)
    assert (parsed.text, parsed.complaints) == ("a cat", ())


@pytest.mark.parametrize(
    "tag", ["<lora:x:abc>", "<lora:>", "<lora::1>", "<lora:x:>", "<lora:x:1:2:3>", "<lora:x:1:lbw=IN>", "<lora:x:0,8>"]
)
def test_a_tag_that_cannot_be_read_is_removed_left_out_and_complained_about(tag: str) -> None:
    parsed = parse(f"a cat {tag}, sitting")
    assert (parsed.text, parsed.loras) == ("a cat, sitting", ())
    assert len(parsed.complaints) == 1 and parsed.complaints[0].startswith(tag)


def test_a_tag_that_is_never_closed_is_text_and_complained_about() -> None:
    parsed = parse("a <lora:x:1\ncat <lora:y:1>")
    assert (parsed.text, parsed.loras) == ("a <lora:x:1\ncat", (LoraEntry("y", 1.0, 1.0),))
    assert parsed.complaints == ("'<lora:x:1' has no closing '>' and stays in the text",)


def test_an_infinite_weight_is_read_and_known_as_such() -> None:
    entries = parse("<lora:x:inf> <lora:y:1:nan> <lora:z:1e999>").loras
    assert [entry.name for entry in entries] == ["x", "y", "z"]
    for entry in entries:
        assert not entry.finite
        with pytest.raises(ValueError, match=f"'{entry.name}'.*must be finite"):
            entry.check()
    assert math.isnan(entries[1].clip_strength)


def test_tags_come_in_order_of_appearance_and_repeated_ones_all_come() -> None:
    parsed = parse("<lora:b:1> x <lora:a:1>, <lora:b:0.5>")
    assert [(entry.name, entry.model_strength) for entry in parsed.loras] == [("b", 1.0), ("a", 1.0), ("b", 0.5)]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("<lora:x>", ""),
        ("a cat, <lora:x>", "a cat"),
        ("a cat, <lora:x>, <lora:y>", "a cat"),
        ("a cat <lora:x> <lora:y>\n", "a cat\n"),
        ("a cat, <lora:x>, sitting", "a cat, sitting"),
        ("a cat,<lora:x>,sitting", "a cat,sitting"),
        ("a cat <lora:x>, sitting", "a cat, sitting"),
        ("a cat <lora:x> sitting", "a cat sitting"),
        ("<lora:x>, a cat", "a cat"),
        ("<lora:x> a cat", "a cat"),
        ("a cat,\n<lora:x>,\nsitting", "a cat,\n\nsitting"),
        ("a cat <lora:x>\nsitting", "a cat\nsitting"),
        ("a cat\n<lora:x> sitting", "a cat\nsitting"),
        ("a cat<lora:x> sitting", "a cat sitting"),
        ("a  cat , <lora:x> sitting ", "a  cat , sitting "),
        ("(a cat <lora:x>:1.2)", "(a cat :1.2)"),
    ],
)
def test_the_text_is_left_as_one_would_write_it_without_the_tag(text: str, clean: str) -> None:
    assert parse(text).text == clean


@given(st.text())
def test_text_without_a_tag_comes_back_as_it_is(text: str) -> None:
    if not re.search("lora", text, re.IGNORECASE):
        assert parse(text).text == text
        assert parse(text).loras == parse(text).complaints == ()


@given(st.text(st.sampled_from("<>lora: :a1,\n"), max_size=60))
def test_no_tag_is_left_whatever_the_text_is(text: str) -> None:
    parsed = parse(text)
    again = parse(parsed.text)
    assert (again.text, again.loras) == (parsed.text, ())
    assert all("stays in the text" in complaint for complaint in again.complaints)


@given(names, weights, weights)
def test_what_was_written_is_what_is_read(name: str, model: float, clip: float) -> None:
    assert parse(f"x <lora:{name}:{model}:{clip}> y").loras == (LoraEntry(name.strip(), model, clip),)


@given(st.lists(st.tuples(words, names), min_size=1, max_size=5), words)
def test_between_tags_nothing_is_lost_but_commas_and_blanks(tagged: list[tuple[str, str]], end: str) -> None:
    text = "".join(f"{before}<lora:{name}:1>" for before, name in tagged) + end
    parsed = parse(text)
    assert [entry.name for entry in parsed.loras] == [name.strip() for _, name in tagged]
    kept = "".join(before for before, _ in tagged) + end
    assert re.sub("[ ,]", "", parsed.text) == re.sub("[ ,]", "", kept)
