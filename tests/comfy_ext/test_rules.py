"""The extension's dtype rules: exact for what is wanted, silent about the rest."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from comfy_ext.rules import rules_for
from lunashm.manifest import CONVERTIBLE, DtypeRule, RuleBook, check_rules

names = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join)
stored_dtypes = st.dictionaries(names, st.sampled_from(["F16", "F32", "I64"]), min_size=1, max_size=20)


@given(st.data(), stored_dtypes)
def test_every_wanted_tensor_gets_its_dtype(data: st.DataObject, stored: dict[str, str]) -> None:
    wanted = data.draw(st.dictionaries(st.sampled_from(sorted(stored)), st.sampled_from(["F16", "F32", "BF16"])))
    book = RuleBook(check_rules(rules_for(stored, wanted)))
    for name, dtype in wanted.items():
        expected = dtype if stored[name] in CONVERTIBLE else stored[name]
        assert book.resolve(name, stored[name]) == expected


def test_a_model_that_is_used_whole_needs_one_rule() -> None:
    stored = {f"blocks.{i}.weight": "F16" for i in range(50)}
    assert rules_for(stored, dict.fromkeys(stored, "F32")) == (DtypeRule("", "F32"),)


def test_an_unused_copy_in_the_file_is_not_spoken_of() -> None:
    used = {f"model.diffusion_model.{i}.weight": "F16" for i in range(4)}
    unused = {f"model_ema.{i}": "F16" for i in range(4)}
    rules = rules_for(used | unused, dict.fromkeys(used, "F32"))
    assert rules == (DtypeRule("model.", "F32"),)
    assert RuleBook(rules).wanted("model_ema.0") is None


def test_parts_in_different_dtypes_get_a_rule_each() -> None:
    stored = {"unet.a": "F16", "unet.b": "F16", "te.a": "F32", "te.ids": "I64"}
    rules = rules_for(stored, {"unet.a": "F32", "unet.b": "F32", "te.a": "F16"})
    assert rules == (DtypeRule("te.", "F16"), DtypeRule("unet.", "F32"))


def test_nothing_wanted_is_no_rule() -> None:
    assert rules_for({"a": "F16"}, {}) == ()
