"""Patterns mean what they mean to ``re``, and none takes longer than a bound."""

from __future__ import annotations

import re
from time import perf_counter, thread_time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peanut import IA3Config, LoraConfig, PeanutConfig, PeanutError, PeftConfig, get_peft_model
from peanut.model.targets.selection import block_index
from peanut.protocols import patterns
from peanut.protocols.patterns import check_pattern, fullmatch, matching_pattern, pattern_of_none

from ..support import refused

PARTS = [
    *"aqx01._-",
    "q_proj",
    "layers",
    r"\.",
    r"\d",
    r"\w",
    r"\b",
    ".",
    "[a-q]",
    "[^.]",
    "^",
    "$",
    r"\Z",
    "(?i:Q)",
    "é",
]
REGEX = st.recursive(
    st.sampled_from(PARTS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{,2}"])).map(
            lambda each: f"(?:{each[0]}){each[1]}"
        ),
        inner.map(lambda each: f"({each})"),
        inner.map(lambda each: f"(?={each})"),
        inner.map(lambda each: f"(?!{each})"),
    ),
    max_leaves=8,
)
PATHS = st.lists(st.sampled_from(["q_proj", "layers", "0", "11", "a", "Q", "x-1", "é"]), max_size=4).map(".".join)


@settings(deadline=None, max_examples=300)
@given(pattern=REGEX, path=PATHS)
def test_patterns_are_those_of_re(pattern: str, path: str) -> None:
    assert bool(fullmatch(pattern, path)) == bool(re.fullmatch(pattern, path))
    found = matching_pattern({pattern: 1}, path)
    assert (found is not None) == bool(re.match(rf"(.*\.)?({pattern})$", path))


NAMES = st.lists(st.sampled_from(["q_proj", "layers", "0", "a", "x-1", "é", "q", "proj"]), min_size=1, max_size=3)
KEYS = st.one_of(REGEX, NAMES.map(".".join), NAMES.map(r"\.".join))


@settings(deadline=None, max_examples=300)
@given(keys=st.lists(KEYS, max_size=6, unique=True), paths=st.lists(PATHS.filter(bool), max_size=4))
def test_of_many_keys_the_first_that_matches_counts(keys: list[str], paths: list[str]) -> None:
    def all_of(path: str) -> list[str]:
        return [key for key in keys if re.match(rf"(.*\.)?({key})$", path)]

    assert [matching_pattern(keys, path) for path in paths] == [next(iter(all_of(path)), None) for path in paths]
    used = {key for path in paths for key in all_of(path)}
    assert pattern_of_none(keys, paths) == next((key for key in keys if key not in used), None)


def test_many_names_are_looked_up_and_not_tried_one_by_one() -> None:
    paths = [f"layers.{number}.experts.{expert}.up" for number in range(40) for expert in range(100)]
    config = LoraConfig(rank_pattern={path: place + 1 for place, path in enumerate(paths)}, r=8)
    start = thread_time()
    assert [config.for_layer(f"model.{path}").r for path in paths] == list(range(1, 4_001))
    assert pattern_of_none(config.rank_pattern, paths) is None
    assert thread_time() - start < 20  # one by one they take minutes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {f"m{i}": 4 for i in range(100_001)}}, r"^rank_pattern has 100,001 keys, 0 of them "),
        ({"alpha_pattern": {f"m{i}.*x": 4 for i in range(1_001)}}, r"^alpha_pattern has 1,001 keys, 1,001 of them "),
        ({"rank_pattern": {f"m.{'.' * (i // 40)}{'x' * (i % 40)}.": 4 for i in range(1_600)}}, r" or forms of names; "),
        ({"layers_to_transform": 0, "layers_pattern": list(map(str, range(1_001)))}, r"^layers_pattern has 1,001 "),
    ],
)
def test_more_patterns_than_can_be_tried_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    start = perf_counter()
    with pytest.raises(PeanutError, match=message):
        LoraConfig(target_modules=["q"], **options)
    assert perf_counter() - start < 3


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        "*",
        "[",
        "a{99999999999}",
        "a{4294967290}",
        "((a{1000}){1000}){1000}",
        "(" * 3000 + "a" + ")" * 3000,
        "(?:" * 500 + "a" + ")*" * 500,
        r"\p{L}",
        "(?R)",
        "a" * 200_000,
    ],
)
def test_what_is_no_pattern_or_a_huge_one_is_refused_at_once(pattern: str) -> None:
    start = perf_counter()
    with pytest.raises(
        PeanutError, match=r"^target_modules='.*' is no regular expression \(.*\); correct it$"
    ) as error:
        check_pattern("target_modules", pattern)
    assert len(str(error.value)) < 1000
    assert perf_counter() - start < 3


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow patterns have a fifth of a second, and none was slow before."""
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    monkeypatch.setattr(patterns, "_clock", patterns._Clock())


LONG = "a" * 40
ENDLESS = "(a|a|aa)+[b-z]"
FIELDS: list[tuple[type[PeftConfig], dict[str, Any]]] = [
    (LoraConfig, {"target_modules": ENDLESS}),
    (LoraConfig, {"target_modules": [LONG], "exclude_modules": ENDLESS}),
    (LoraConfig, {"target_modules": [LONG], "alpha_pattern": {ENDLESS: 2}}),
    (PeanutConfig, {"target_modules": [LONG], "rank_pattern": {ENDLESS: 2}}),
    (IA3Config, {"target_modules": [LONG], "feedforward_modules": ENDLESS}),
    (LoraConfig, {"target_modules": [LONG], "layers_to_transform": 0, "layers_pattern": ENDLESS}),
    (LoraConfig, {"target_modules": [LONG], "layers_to_transform": 0, "layers_pattern": [ENDLESS]}),
]


@pytest.mark.parametrize(
    ("config_class", "options"), FIELDS, ids=[f"{c.method}-{i}" for i, (c, _) in enumerate(FIELDS)]
)
def test_a_pattern_that_never_ends_is_refused(
    config_class: type[PeftConfig], options: dict[str, Any], impatient: None
) -> None:
    model = nn.ModuleDict({LONG: nn.Linear(4, 4)})
    start = perf_counter()
    with refused(model, r"^'.*' takes more than 0\.2 seconds; expected a regular expression that ends soon; write it "):
        get_peft_model(model, config_class(**options))
    assert perf_counter() - start < 5


def test_the_time_of_many_slow_matches_adds_up(impatient: None) -> None:
    start = perf_counter()
    with pytest.raises(PeanutError, match=rf"^'{re.escape(ENDLESS)}' takes more than 0\.2 seconds"):
        any(fullmatch(ENDLESS, "a" * 11) for _ in range(100_000))
    assert perf_counter() - start < 20
    assert fullmatch("q.*", "q_proj")  # the next call has its time again


def test_alternatives_are_one_pattern() -> None:
    assert [block_index(path, "h|layers") for path in ("x.h.3.q", "layers.12.q", "q.4")] == [3, 12, None]
    assert matching_pattern({r"(q)\1": 1}, "a.qq") == r"(q)\1"


@pytest.mark.parametrize("pattern", ["(?:(?:a{9999}){9999}){0}.*q_proj", "(?:q_proj){e<=3}", "q{s}"])
def test_repetitions_of_nothing_and_inexact_matches_are_refused(pattern: str) -> None:
    with pytest.raises(PeanutError, match=r"too large|braces that are no repetition"):
        check_pattern("x", pattern)
    check_pattern("x", r"q\{2\}[{}]?k{2,3}")
