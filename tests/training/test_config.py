"""A run's config: what it reads, what it refuses, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peanut import PeanutError
from peanut.training.config import differing_keys, load_config, parse_yaml, to_yaml

MINIMAL: dict[str, Any] = {"model": {"path": "m"}, "task": "causal-lm", "data": {"train": "a.txt"}, "output": "o"}


def test_reads_a_file_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {path: m}\ntask: causal-lm\ndata: {train: a.txt}\noutput: o\n"
        "training: {learning_rate: 3e-4, epochs: 2}\nadapter: {r: 8, scaling: 1e-1}\n"
    )
    config = load_config(file, {"training.epochs": 5, "adapter.depth": 1})
    assert config.training.learning_rate == 3e-4
    assert config.training.epochs == 5
    assert config.adapter.model_dump() == {"peft_type": "PEANUT", "r": 8, "scaling": 0.1, "depth": 1}


def test_flags_alone_say_everything() -> None:
    flags = {"model.path": "m", "task": "causal-lm", "data.train": "a.txt", "output": "o"}
    assert load_config(None, flags) == load_config(MINIMAL)


def test_flags_do_not_change_the_dictionary_that_was_given() -> None:
    given = {**MINIMAL, "training": {"epochs": 1}}
    load_config(given, {"training.epochs": 7})
    assert given["training"] == {"epochs": 1}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    config = load_config(MINIMAL, {"adapter.target_modules": ["q_proj"], "training.eval_every": 50})
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file) == config


def test_differing_keys_are_named_by_their_dotted_names() -> None:
    changed = load_config(MINIMAL, {"training.epochs": 9, "adapter.r": 2, "data.label": "stars"})
    assert differing_keys(load_config(MINIMAL), changed) == ["data.label", "training.epochs", "adapter.r"]


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("3", 3), ("true", True), ("[a, b]", ["a", "b"]), ("x", "x")]
)
def test_values_are_yaml(text: str, value: object) -> None:
    assert parse_yaml(text) == value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"training.epoch": 3},
            "the config has the key 'training.epoch'; expected a known key; nearest: 'training.epochs'",
        ),
        (
            {"learning_rate": 3},
            "the config has the key 'learning_rate'; expected a known key; nearest: 'training.learning_rate'",
        ),
        ({"trainin.epochs": 3}, "the config has the key 'trainin'; expected a known key; nearest: 'training'"),
        ({"training.epochs": "many"}, "training.epochs is 'many'; expected a valid number"),
        ({"training.batch_size": 2.5}, "training.batch_size is 2.5; expected a valid integer"),
        ({"training.batch_size": 0}, "training.batch_size is 0; expected greater than or equal to 1"),
        ({"training.learning_rate": float("nan")}, "training.learning_rate is nan; expected a finite number"),
        ({"training.schedule": "cos"}, "training.schedule is 'cos'; expected 'linear', 'cosine' or 'constant'"),
        (
            {"training.eval_every": "never"},
            "training.eval_every is 'never'; expected a whole number of at least 1, or 'epoch'",
        ),
        ({"training.warmup": 1.5}, "training.warmup is 1.5; expected a part below 1, or a whole number of steps"),
        ({"data.eval_fraction": 1}, "data.eval_fraction is 1; expected less than 1"),
        ({"task": "causal"}, "task is 'causal'; expected one of text-classification"),
        ({"model": "m"}, "model is 'm'; expected a section with keys such as path"),
    ],
)
def test_refuses(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError) as caught:
        load_config(MINIMAL, overrides)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "key"),
    [({}, "model.path"), ({**MINIMAL, "data": {}}, "data.train"), ({**MINIMAL, "output": None}, "output")],
)
def test_names_what_is_missing(values: dict[str, Any], key: str) -> None:
    with pytest.raises(PeanutError, match=key):
        load_config(values)


@pytest.mark.parametrize(
    ("text", "message"),
    [("model: [", "is not YAML"), ("- a\n- b\n", "holds no keys"), ("\xff\xfe", "not UTF-8 text")],
)
def test_refuses_a_file_that_is_no_config(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(PeanutError, match=message) as caught:
        load_config(file)
    assert "run.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PeanutError, match=r"cannot read .*No such file"):
        load_config(tmp_path / "none.yaml")


ALIASES = "z0: &b0 [x, x, x]\n" + "".join(f"z{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 20))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 50_000, "nested too deeply"),
        ("".join("  " * depth + "a:\n" for depth in range(1500)), "nested too deeply"),
        (ALIASES, "more than 100,000 values"),
        ("a: &a [*a]\n", "an alias stands within what it names"),
        ("a: 1\nb: 2\na: 3\n", "the key 'a' stands twice, in line 3"),
        ("a: " + "9" * 6000, "limit"),
        ("a: 2024-13-45\n", "month"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("a:\n\tb: 1\n", "cannot start any token"),
        ("a: 1\0\n", "special characters are not allowed"),
        ("? [1]\n: 2\n", "unhashable key"),
    ],
)
def test_hostile_yaml_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(PeanutError, match=message) as caught:
        parse_yaml(text)
    assert str(caught.value).startswith("not YAML: ")
    assert "\n" not in str(caught.value)


def test_aliases_and_merges_are_read() -> None:
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [*a, *a]\n")["b"] == {"x": 1, "y": 3}


def test_whole_numbers_are_those_of_yaml_1_2() -> None:
    assert parse_yaml("[0, -7, +7, 1_000, 0x1F, 0o17]") == [0, -7, 7, 1000, 31, 15]
    assert parse_yaml("[010, 1:30]") == ["010", "1:30"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("output", "a\0b", r"output is 'a\\x00b'; expected text that a file can hold"),
        ("model.path", "a\ud800", r"model.path is 'a\\ud800'; expected text that a file can hold"),
        ("training.epochs", True, "training.epochs is True; expected a number; change"),
        ("training.seed", False, "training.seed is False; expected a number; change"),
        ("training.eval_every", True, "training.eval_every is True; expected a whole number of at least 1, or 'epoch'"),
        ("data.text", True, "data.text is True; expected a valid string"),
        ("output", "", "output is ''; expected a folder's path; name one"),
        ("output", " ", "output is ' '; expected a folder's path; name one"),
        ("training.batch_size", "1e99", "training.batch_size is '1e99'; expected a valid integer"),
        ("training.batch_size", 1e99, r"training.batch_size is 1e\+99; expected a number of at most 18 digits"),
        ("training.epochs", float("inf"), "training.epochs is inf; expected a finite number"),
        ("training.warmup", float("inf"), "training.warmup is inf; expected a finite number"),
        pytest.param("training.steps", 16**6000, "training.steps is a whole number of 24001 bits", id="huge"),
        ("training.batch_size", 2**63, "training.batch_size is 9223372036854775808; expected a number of at most"),
    ],
)
def test_values_of_another_kind_are_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(PeanutError, match=message) as caught:
        load_config(MINIMAL, {key: value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [{1: 2, **MINIMAL}, {**MINIMAL, "training": {3: 4}}, {**MINIMAL, "adapter": {3: 4}}])
def test_keys_are_text(values: dict[Any, Any]) -> None:
    with pytest.raises(PeanutError, match=r"has the key .*expected keys of text"):
        load_config(values)
