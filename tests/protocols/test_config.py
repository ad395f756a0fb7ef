"""Configs: checked when made, the same in the file and back, and the peer's in names and defaults."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peanut import LoraConfig, PeanutConfig, PeanutError, PeftConfig, PeftType, TaskType, get_peft_config
from peanut.protocols.config import FORMAT_VERSION, default_of, matching_pattern
from peanut.protocols.registry import registered
from peanut.protocols.values import takes_none

BOTH = pytest.mark.parametrize("config_class", [PeanutConfig, LoraConfig])

WRONG: list[tuple[type[PeftConfig], dict[str, Any], str]] = [
    *[
        (config_class, {"r": r}, rf"^r={r!r}; expected a whole number of at least 1; change r$")
        for config_class in (PeanutConfig, LoraConfig)
        for r in (0, -3, 1.5, "8", True, None)
    ],
    (PeanutConfig, {"depth": -1}, r"^depth=-1; expected a whole number from 0 to 10,000; change depth$"),
    (PeanutConfig, {"depth": 0.5}, r"^depth=0\.5; expected a whole number"),
    (
        PeanutConfig,
        {"scaling": float("nan")},
        r"^scaling=nan; expected a finite number from -1,000,000 to 1,000,000; change scaling$",
    ),
    (PeanutConfig, {"scaling": float("inf")}, r"^scaling=inf; expected a finite number"),
    (PeanutConfig, {"scaling": "1"}, r"^scaling='1'; expected a finite number"),
    (
        PeanutConfig,
        {"act_fn": "rleu"},
        r"^act_fn='rleu'; expected a key of transformers' ACT2FN or 'sine'; nearest: 'relu'",
    ),
    (PeanutConfig, {"side": "left"}, r"^side='left'; expected 'out', 'in' or 'auto'; change side$"),
    (
        PeanutConfig,
        {"dropout": 1.0},
        r"^dropout=1\.0; expected a probability of at least 0 and below 1; change dropout$",
    ),
    (PeanutConfig, {"rank_pattern": {"q": 0}}, r"^rank_pattern\['q'\]=0; expected a whole number of at least 1"),
    (PeanutConfig, {"rank_pattern": {"q(": 2}}, r"^rank_pattern='q\(' is no regular expression \(.*\); correct it$"),
    (
        LoraConfig,
        {"lora_alpha": float("nan")},
        r"^lora_alpha=nan; expected a finite number from -1,000,000 to 1,000,000; change lora_alpha$",
    ),
    (LoraConfig, {"lora_dropout": -0.1}, r"^lora_dropout=-0\.1; expected a probability"),
    (LoraConfig, {"alpha_pattern": {"q": "x"}}, r"^alpha_pattern\['q'\]='x'; expected a finite number"),
    (LoraConfig, {"alpha_pattern": {"[": 1}}, r"^alpha_pattern='\[' is no regular expression"),
    (LoraConfig, {"bias": "some"}, r"^bias='some'; expected 'none', 'all' or 'lora_only'; change bias$"),
    (LoraConfig, {"init_lora_weights": "eva"}, r"^init_lora_weights='eva'; expected True, False, 'gaussian', 'pissa'"),
    (
        LoraConfig,
        {"peft_type": "PEANUT"},
        r"^peft_type='PEANUT' in a LoraConfig; expected 'LORA'; use that method's own",
    ),
    (LoraConfig, {"task_type": "SEQ_CL"}, r"^task_type='SEQ_CL'; expected one of SEQ_CLS, .*; nearest: 'SEQ_CLS'$"),
    (LoraConfig, {"target_modules": [1, "q"]}, r"^target_modules\[0\]=1; expected a string; change target_modules$"),
    (
        LoraConfig,
        {"target_modules": [""]},
        r"^target_modules=\[''\]; expected a list of names; remove what is not a name$",
    ),
    (LoraConfig, {"target_modules": 5}, r"^target_modules=5; expected a list of names"),
    (LoraConfig, {"target_modules": "q("}, r"^target_modules='q\(' is no regular expression \(.*\); correct it$"),
    (LoraConfig, {"exclude_modules": "*"}, r"^exclude_modules='\*' is no regular expression"),
    (LoraConfig, {"modules_to_save": "head"}, r"^modules_to_save='head'; expected a list of names; write \['head'\]$"),
    (
        LoraConfig,
        {"layers_to_transform": [0, -1]},
        r"^layers_to_transform\[1\]=-1; expected a whole number of at least 0",
    ),
    (
        LoraConfig,
        {"layers_to_transform": True},
        r"^layers_to_transform=True; expected a list of whole numbers or a whole number",
    ),
    (LoraConfig, {"layers_pattern": "h"}, r"^layers_pattern='h' without layers_to_transform; expected both or neither"),
]


@pytest.mark.parametrize(("config_class", "values", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_values_fail_when_the_config_is_made(
    config_class: type[PeftConfig], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(PeanutError, match=message) as error:
        config_class(**values)
    assert "\n" not in str(error.value)


@BOTH
def test_fields_and_defaults_are_those_of_the_peer(config_class: type[PeftConfig]) -> None:
    import peft

    ours, theirs = config_class(), getattr(peft, config_class.__name__)()
    own = {field.name for field in dataclasses.fields(config_class)} - config_class.only_here
    names = {field.name for field in dataclasses.fields(theirs)}
    assert own <= names
    if config_class is PeanutConfig:
        assert own == names
    for name in own - {"peft_version"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert peft.__version__ == FORMAT_VERSION


@BOTH
def test_the_file_is_sorted_stable_and_read_back(config_class: type[PeftConfig], tmp_path: Path) -> None:
    config = config_class(
        task_type="CAUSAL_LM", target_modules=["v_proj", "q_proj", "v_proj"], layers_to_transform=[1, 0], r=3
    )
    assert config.target_modules == ["q_proj", "v_proj"]
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    text = path.read_text()
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert text == f"{config}\n"
    again = PeftConfig.from_pretrained(tmp_path)
    assert again == config
    assert type(again) is config_class
    assert config_class.from_pretrained(tmp_path) == config
    told = {"proxies": None, "resume_download": True, "_commit_hash": None, "user_agent": "x", "local_files_only": True}
    assert config_class.from_pretrained(tmp_path, **told) == config
    assert get_peft_config(json.loads(text)) == config
    again.save_pretrained(tmp_path)
    assert path.read_text() == text


def test_fields_that_the_peer_lacks_are_written_only_where_they_are_used() -> None:
    assert not PeanutConfig.only_here & PeanutConfig().to_dict().keys()
    values = PeanutConfig(side="in", dropout=0.1, rank_pattern={"q": 2}).to_dict()
    assert {name: values[name] for name in PeanutConfig.only_here} == {
        "side": "in",
        "dropout": 0.1,
        "rank_pattern": {"q": 2},
    }


@BOTH
def test_the_peer_reads_our_file_and_we_read_its(config_class: type[PeftConfig], tmp_path: Path) -> None:
    import peft

    config_class(target_modules=["q_proj"], r=5).save_pretrained(tmp_path)
    theirs = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == config_class.__name__
    assert (theirs.r, theirs.target_modules) == (5, {"q_proj"})
    theirs.save_pretrained(tmp_path)
    ours = PeftConfig.from_pretrained(tmp_path)
    assert (type(ours), ours.target_modules, ours.to_dict()["r"]) == (config_class, ["q_proj"], 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "PEANUTS"}, r"names the method 'PEANUTS'; expected one of .*PEANUT.*; nearest: 'PEANUT'$"),
        ({}, r"names the method None; expected one of"),
        ({"peft_type": "LORA", "use_nora": True}, r"sets use_nora=True; expected the fields of LoraConfig; remove it"),
        ({"peft_type": "LORA", "use_nora": True, "peft_version": "0.21.2"}, r"sets use_nora=True; "),
        ({"peft_type": "PEANUT", "dept": 1}, r"sets dept=1; expected the fields of PeanutConfig; .*nearest: 'depth'"),
        ({"peft_type": "LORA", "r": "8"}, r"^'.*adapter_config.json': r='8'; expected a whole number"),
    ],
)
def test_files_that_ask_for_what_is_not_there_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(PeanutError, match=message) as error:
        PeftConfig.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config_class", [each.config_class for each in registered().values()], ids=lambda c: c.method)
def test_null_in_a_file_is_what_a_field_is_without_it(config_class: type[PeftConfig]) -> None:
    fields = {each.name: default_of(each) for each in dataclasses.fields(config_class)}
    needed = {"adapter_len": 3, "adapter_layers": 1, "num_virtual_tokens": 3, "cpt_token_ids": [1, 2, 3]}
    values = {"peft_type": config_class.method} | {name: value for name, value in needed.items() if name in fields}
    unset = [name for name in fields.keys() - values.keys() - takes_none(config_class) if fields[name] is not None]
    assert "inference_mode" in unset
    for name in unset:
        assert PeftConfig.from_dict(values | {name: None}) == PeftConfig.from_dict(values), name


def test_a_flag_that_is_none_is_not_set() -> None:
    assert LoraConfig(use_rslora=None, fan_in_fan_out=None) == LoraConfig()  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1e38, -1e38, 2e6])
@pytest.mark.parametrize(
    ("config_class", "name"),
    [
        (each.config_class, name)
        for each in registered().values()
        for name in ("lora_alpha", "alpha", "scaling", "randlora_alpha", "d_initial", "alpha_pattern")
        if name in {field.name for field in dataclasses.fields(each.config_class)}
    ],
)
def test_what_is_no_scale_is_refused(config_class: type[PeftConfig], name: str, value: float) -> None:
    given = {"q": value} if name == "alpha_pattern" else value
    with pytest.raises(PeanutError, match=rf"^{name}.*; expected a finite number from -1,000,000 to 1,000,000; "):
        config_class(**{name: given})


def test_a_scale_that_no_file_could_hold_is_refused_before_training() -> None:
    with pytest.raises(PeanutError, match=r"^lora_alpha=1600000\.0; expected a finite number from"):
        LoraConfig(init_lora_weights="pissa", lora_alpha=8e5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"peft_type": "LO', r"cannot read '.*adapter_config\.json': .*; expected a whole JSON file"),
        ("[]", "holds list; "),
    ],
)
def test_broken_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(PeanutError, match=message):
        PeftConfig.from_pretrained(tmp_path)


def test_missing_files_and_folders_are_told(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(
        PeanutError, match=r"^no 'adapter_config\.json' in '.*' \(it holds adapter_model\.bin\); expected"
    ):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(PeanutError, match=r"^no folder '/no/where/at/all'; expected an adapter's folder or a hub id"):
        PeftConfig.from_pretrained("/no/where/at/all")
    with pytest.raises(
        PeanutError, match=r"^no folder 'no/where', and the hub gives no 'adapter_config\.json'.*check the"
    ):
        PeftConfig.from_pretrained("no/where")


def test_enums_are_known_by_value_and_name() -> None:
    config = LoraConfig(task_type="SEQ_CLS", peft_type="LORA")
    assert config.task_type is TaskType.SEQ_CLS
    assert config.peft_type is PeftType.LORA
    assert config == LoraConfig(task_type=TaskType.SEQ_CLS)
    assert not config.is_prompt_learning


NAMES = st.sampled_from(["q", "q_proj", "layers", "0", "1", "mlp", "v"])
KEYS = st.sampled_from(["q", "q_proj", r".*proj", r"layers\.0\..*", r"(q|v)", "mlp.q", "1", r"^q$", r"layers.\d.q"])


@settings(deadline=None, max_examples=25)
@given(path=st.lists(NAMES, min_size=1, max_size=5).map(".".join), keys=st.lists(KEYS, unique=True, max_size=4))
def test_patterns_match_as_in_the_peer(path: str, keys: list[str]) -> None:
    from peft.utils.other import get_pattern_key

    found = matching_pattern(dict.fromkeys(keys, 2), path)
    assert (path if found is None else found) == get_pattern_key(keys, path)


def test_patterns_give_a_layer_its_rank_and_scale() -> None:
    lora = LoraConfig(r=8, lora_alpha=16, rank_pattern={"q_proj": 2, ".*mlp.*": 4}, alpha_pattern={"mlp.up": 3})
    at = {path: lora.for_layer(path) for path in ("layers.0.q_proj", "layers.0.mlp.up", "layers.0.k_proj")}
    assert [(config.r, config.lora_alpha, config.scaling) for config in at.values()] == [
        (2, 16, 8),
        (4, 3, 0.75),
        (8, 16, 2),
    ]
    assert LoraConfig(r=4, lora_alpha=8, use_rslora=True).scaling == 4
    peanut = PeanutConfig(r=8, rank_pattern={"q_proj": 2})
    assert (peanut.for_layer("a.q_proj").r, peanut.for_layer("a.q_proj2").r) == (2, 8)


@pytest.mark.parametrize("version", ["0.22.0", "0.21.3.dev0", "1.0"])
def test_unknown_fields_of_a_later_version_are_told_in_one_line_and_ignored(version: str) -> None:
    values = {"peft_type": "LORA", "r": 4, "peft_version": version, "use_nora": True, "nora": {"a": 1}, "off": False}
    told = rf"^the config was written by Hugging Face PEFT '{version}', and .* ignored: use_nora=True, nora={{'a': 1}}$"
    with pytest.warns(UserWarning, match=told):
        config = get_peft_config(values)
    assert isinstance(config, LoraConfig)
    assert config.r == 4


def test_a_known_field_of_a_later_version_that_asks_for_what_is_not_here_is_refused() -> None:
    with pytest.raises(PeanutError, match="use_qalora=True"):
        get_peft_config({"peft_type": "LORA", "peft_version": "0.22.0", "use_qalora": True})


def test_a_runtime_config_that_asks_for_nothing_is_taken() -> None:
    off = LoraConfig(runtime_config={"ephemeral_gpu_offload": False})
    assert off.to_dict() == LoraConfig().to_dict()
    with pytest.raises(PeanutError, match="runtime_config"):
        LoraConfig(runtime_config={"ephemeral_gpu_offload": True})


def test_a_config_is_made_from_a_name_and_read_as_a_dictionary(tmp_path: Path) -> None:
    config = PeftConfig.from_peft_type(peft_type=PeftType.LORA, r=4)
    assert isinstance(config, LoraConfig)
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_json_file(tmp_path / "adapter_config.json") == config.to_dict()
