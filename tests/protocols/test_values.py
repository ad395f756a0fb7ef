"""Configs hold values of their fields' types, whatever they were given: everything else is one line."""

from __future__ import annotations

import itertools
import json
import math
import types
import typing
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pytest

from peanut import LoraConfig, PeanutError, PeftConfig
from peanut.lab.settings import Settings
from peanut.protocols.names import Names
from peanut.protocols.registry import registered

if TYPE_CHECKING:
    from decimal import Decimal

CLASSES = {name: method.config_class for name, method in registered().items()}
NEEDED: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_len": 2, "adapter_layers": 1},
    "PREFIX_TUNING": {"num_virtual_tokens": 2},
    "PROMPT_TUNING": {"num_virtual_tokens": 2},
    "P_TUNING": {"num_virtual_tokens": 2},
    "C3A": {"block_size": 2},
}
DEEP: dict[str, Any] = {}
for _ in range(20_000):
    DEEP = {"a": DEEP}
HOSTILE: list[Any] = [
    DEEP,
    {"a": object()},
    5e-324,
    "false",
    "",
    "x" * 10_000,
    "a\nb\x1b[2J\u202e\ud800",
    math.nan,
    math.inf,
    1e300,
    -1e300,
    10**400,
    -(10**30),
    2**63,
    0.5,
    7,
    -7,
    0,
    True,
    None,
    [],
    [[]],
    ["x", 3],
    [math.nan],
    {},
    {"q": "x"},
    {"q": [1.5]},
    {3: 4},
    {"(": 2},
    b"x",
    object(),
    1j,
    set,
]


def conforms(hint: Any, value: Any) -> bool:
    """Whether a value is what an annotation says: written from the annotations' meaning, not from the check."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return conforms(args[0], value) and all(bound.holds(value) for bound in args[1:])
    if origin in (typing.Union, types.UnionType):
        return any(conforms(each, value) for each in args)
    if origin is typing.Literal:
        return any(type(each) is type(value) and each == value for each in args)
    if origin is list:
        return isinstance(value, list) and all(conforms(args[0], each) for each in value)
    if origin is tuple:
        return isinstance(value, tuple) and all(map(conforms, args, value))
    if origin is dict:
        return isinstance(value, dict) and all(conforms(args[0], k) and conforms(args[1], v) for k, v in value.items())
    if hint is Any:
        return True
    if hint is float:
        return type(value) in (int, float) and abs(value) <= float(np.finfo(np.float32).max)
    if hint is int:
        return type(value) is int and abs(value) <= 2**63
    if hint is bool:
        return type(value) is bool
    return callable(value) if origin is not None else isinstance(value, hint)


def fault(config_class: type[PeftConfig], key: str, value: Any) -> str | None:
    """What is wrong with a config that is given a value, or with the error that refuses it."""
    try:
        config = config_class(**{**NEEDED.get(config_class.method, {}), key: value})
    except PeanutError as error:
        return None if str(error).isprintable() and len(str(error)) < 2600 else str(error)
    held, default = getattr(config, key), next(each.default for each in fields(config_class) if each.name == key)
    if held is not default and not conforms(typing.get_type_hints(config_class, include_extras=True)[key], held):
        return f"{key}={held!r}"
    again = config_class.from_dict(json.loads(json.dumps(config.to_dict())))
    functions = {each: getattr(config, each) for each in ("mask_fn",) if hasattr(config, each)}
    return None if replace(again, **functions) == config else f"{key}={held!r} is read back as {getattr(again, key)!r}"


@pytest.mark.filterwarnings("ignore:encoder_num_layers and encoder_dropout are for the LSTM")
@pytest.mark.parametrize("name", CLASSES)
def test_a_field_holds_its_type_or_the_config_is_refused_in_one_line(name: str) -> None:
    config_class = CLASSES[name]
    tried = itertools.product(fields(config_class), HOSTILE)
    assert [wrong for each, value in tried if (wrong := fault(config_class, each.name, value))] == []


class Tasks(str, Enum):
    CLASSES = "SEQ_CLS"


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ({"target_modules": ("v", "q")}, ["q", "v"]),
        ({"target_modules": {"v", "q"}}, ["q", "v"]),
        ({"target_modules": {"v": 1}.keys()}, ["v"]),
        ({"target_modules": ".*q"}, ".*q"),
        ({"layers_to_transform": range(2)}, [0, 1]),
        ({"layers_to_transform": np.array([1, 0])}, [1, 0]),
        ({"layers_to_transform": 3}, 3),
        ({"r": np.int64(4)}, 4),
        ({"r": np.uint8(4)}, 4),
        ({"lora_alpha": np.float32(0.5)}, 0.5),
        ({"lora_alpha": np.int32(4)}, 4.0),
        ({"lora_alpha": 16}, 16),
        ({"use_rslora": 1}, True),
        ({"use_rslora": np.bool_(False)}, False),
        ({"init_lora_weights": False}, False),
        ({"init_lora_weights": "gaussian"}, "gaussian"),
        ({"rank_pattern": None}, {}),
        ({"alpha_pattern": {"q": 2}}, {"q": 2}),
        ({"base_model_name_or_path": Path("a") / "b"}, "a/b"),
        ({"task_type": Tasks.CLASSES}, "SEQ_CLS"),
        ({"trainable_token_indices": {"words": (1, 2)}}, {"words": [1, 2]}),
    ],
)
def test_values_are_taken_in_every_form_that_means_the_same(given: dict[str, Any], held: Any) -> None:
    (key,) = given
    found = getattr(LoraConfig(**given), key)
    assert found == held
    assert type(found) in (type(held), Names) or isinstance(found, Enum)
    json.dumps(found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_rslora": "false"}, r"^use_rslora='false'; expected True or False; change use_rslora$"),
        ({"use_rslora": math.nan}, r"^use_rslora=nan; expected True or False"),
        ({"lora_alpha": 1e300}, r"^lora_alpha=1e\+300; expected a finite number"),
        ({"lora_alpha": 10**400}, r"^lora_alpha=a whole number of 1329 bits; expected a finite number"),
        ({"r": 2**63}, r"^r=9223372036854775808; expected a whole number of at least 1"),
        ({"target_modules": {"q": 1}}, r"^target_modules={'q': 1}; expected a list of names or a string"),
        ({"rank_pattern": {3: 1}}, r"^rank_pattern key=3; expected a string"),
        ({"rank_pattern": {"q": True}}, r"^rank_pattern\['q'\]=True; expected a whole number of at least 1"),
        ({"bias": "nnone"}, r"^bias='nnone'; expected 'none', 'all' or 'lora_only'; change bias$"),
    ],
)
def test_an_error_names_the_value_and_its_place(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        LoraConfig(**given)


@dataclass(kw_only=True)
class TheirConfig(PeftConfig):
    """A config of someone else's: with a name that only type checkers see, and a default that is not of its type."""

    method = "LORA"

    exact: Decimal | None = None
    late: int = None  # type: ignore[assignment]
    pairs: list[tuple[int, str]] = field(default_factory=list)
    size: Annotated[int, "no bound"] = 3


def test_a_strangers_config_is_checked_as_ours() -> None:
    config = TheirConfig(exact=1.5, pairs=[[1, "a"]], size=np.int16(2))  # type: ignore[arg-type,list-item]
    assert (config.exact, config.late, config.pairs, config.size) == (1.5, None, [(1, "a")], 2)
    for wrong in ({"late": "1"}, {"pairs": [(1, 2)]}, {"pairs": [(1,)]}, {"size": 2.0}):
        with pytest.raises(PeanutError, match=rf"^{next(iter(wrong))}.*; expected"):
            TheirConfig(**wrong)  # type: ignore[arg-type]


def test_what_is_measured_is_checked_the_same_way() -> None:
    with pytest.raises(PeanutError, match=r"^--rank=1\.5; expected a whole number of at least 1; change --rank$"):
        Settings(rank=1.5)  # type: ignore[arg-type]
