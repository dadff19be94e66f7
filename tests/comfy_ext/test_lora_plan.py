"""Stack and tags made one list: each file once, and what was asked for otherwise is said."""

from __future__ import annotations

from comfy_ext.nodes.lora_entry import LoraEntry
from comfy_ext.nodes.lora_names import Found, find
from comfy_ext.nodes.lora_plan import Plan, plan

FILES = ["a.safetensors", "b.safetensors", "x/twin.safetensors", "y/twin.safetensors"]


def _find(name: str) -> Found:
    return find(name, FILES)


def _planned(stack: list[tuple[str, float, float]], tags: list[tuple[str, float, float]]) -> Plan:
    return plan([LoraEntry(*entry) for entry in stack], [LoraEntry(*tag) for tag in tags], _find)


def _strengths(made: Plan) -> list[tuple[str, float, float]]:
    return [(file, asked.model_strength, asked.clip_strength) for file, asked in made.loras.items()]


def test_the_stack_comes_first_and_then_the_tags_as_they_appear() -> None:
    made = _planned([("b.safetensors", 1, 1)], [("x/twin", 0.5, 0.5), ("a", 0.2, 0.1)])
    assert _strengths(made) == [
        ("b.safetensors", 1, 1), ("x/twin.safetensors", 0.5, 0.5), ("a.safetensors", 0.2, 0.1)
    ]  # fmt: skip
    assert made.conflicts == made.doubts == made.missing == []


def test_a_tag_wins_over_the_stack_and_a_later_tag_over_an_earlier_one() -> None:
    made = _planned([("a.safetensors", 1, 1)], [("A", 0.5, 0.5), ("a.safetensors", 0.3, 0.4)])
    assert _strengths(made) == [("a.safetensors", 0.3, 0.4)]
    assert made.conflicts == [
        "LoRA 'a.safetensors' is applied once: the tag's strengths (0.5, 0.5) win over the stack's strengths (1, 1)",
        "LoRA 'a.safetensors' is applied once: the tag's strengths (0.3, 0.4) win over the tag's strengths (0.5, 0.5)",
    ]


def test_the_same_twice_is_no_conflict() -> None:
    made = _planned([("a.safetensors", 1, 1), ("a.safetensors", 1, 1)], [("a", 1, 1)])
    assert (_strengths(made), made.conflicts) == ([("a.safetensors", 1, 1)], [])


def test_what_is_not_found_is_named_once_and_the_rest_goes_on() -> None:
    made = _planned([("gone.safetensors", 1, 1)], [("lost", 1, 1), ("a", 1, 1), ("Lost", 0.5, 0.5)])
    assert made.missing == ["gone.safetensors", "lost"]
    assert _strengths(made) == [("a.safetensors", 1, 1)]


def test_a_name_of_two_files_is_doubted_once() -> None:
    made = _planned([], [("twin", 1, 1), ("twin", 1, 1)])
    assert len(made.doubts) == 1 and made.doubts[0].startswith("LoRA 'twin' could be x/twin.safetensors or y/twin")
    assert list(made.loras) == ["x/twin.safetensors"]
