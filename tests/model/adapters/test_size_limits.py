"""Sizes are believed once the file's own tensors say so: a config cannot take a machine's memory or time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import typing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from peanut import (
    AdaLoraConfig,
    LoraConfig,
    PeanutConfig,
    PeanutError,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    RandLoraConfig,
    ShiraConfig,
    VeraConfig,
    XLoraConfig,
    get_peft_model,
)
from peanut.model.adapters import size_limits
from peanut.model.adapters.size_limits import limited_by_file
from peanut.protocols import InputMethod, PeftConfig
from peanut.protocols.registry import registered

from ...support import one_thread  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:adapter_config.json in .* is not as it was saved")
Builder = Callable[..., hf.PreTrainedModel]
OWN: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "BITFIT": {"target_modules": None},
    "BOTTLENECK": {"target_modules": None},
    "C3A": {"block_size": 4},
    "CPT": {"cpt_token_ids": [1, 2, 3]},
    "FOURIERFT": {"n_frequency": 10},
    "FULL": {"target_modules": None},
    "LINEAR_PROBING": {"target_modules": None, "modules_to_save": ["lm_head"]},
    "LN_TUNING": {"target_modules": ["norm"]},
    "MISS": {"r": 4},
    "P_TUNING": {"encoder_reparameterization_type": "LSTM"},
    "SHIRA": {"r": 2},
    "ROAD": {"group_size": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    "VBLORA": {"vector_length": 4, "num_vectors": 8},
}
METHODS = [name for name in registered() if name not in ("BITFIT", "XLORA")]


def config_of(name: str) -> PeftConfig:
    method = registered()[name]
    if isinstance(method, InputMethod):
        usual = {"task_type": "CAUSAL_LM", **({} if name == "CPT" else {"num_virtual_tokens": 4})}
    else:
        usual = {} if name == "ADAPTION_PROMPT" else {"target_modules": ["q_proj"]}
    config: PeftConfig = method.config_class(**{**usual, **OWN.get(name, {})})
    return config


def is_size(hint: Any) -> bool:
    return hint is int or any(map(is_size, typing.get_args(hint)))


@pytest.mark.filterwarnings("ignore:r=1000000000 is not used by AdaLoRA")
@pytest.mark.parametrize("name", METHODS)
def test_no_number_of_a_config_costs_more_than_its_file(name: str, tiny_llama: Builder, tmp_path: Path) -> None:
    model = tiny_llama()
    get_peft_model(model, config_of(name)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    hints = typing.get_type_hints(registered()[name].config_class, include_extras=True)
    sizes = [each.name for each in dataclasses.fields(registered()[name].config_class) if is_size(hints[each.name])]
    assert sizes or name in ("FULL", "LINEAR_PROBING")
    for size, trained in itertools.product(sizes, (False, True)):
        given = {"q_proj": 10**9} if size.endswith("_pattern") else 10**9
        path.write_text(json.dumps({**values, size: given}))
        start = perf_counter()
        with suppress(PeanutError):
            PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=trained)
        assert perf_counter() - start < 10, size


@pytest.mark.filterwarnings("ignore:.*P_TUNING is trained on without")
@pytest.mark.parametrize(
    "config",
    [
        PeanutConfig(r=2, depth=9_000, target_modules=["q_proj"]),
        VeraConfig(r=10**8, target_modules=["q_proj"], save_projection=False),
        RandLoraConfig(r=10**8, target_modules=["q_proj"], save_projection=False),
        AdaLoraConfig(init_r=10**8, total_step=10, target_modules=["q_proj"]),
    ],
    ids=lambda config: config.method,
)
def test_a_config_that_asks_for_more_than_its_file_is_told_so(
    config: PeftConfig, tiny_llama: Builder, tmp_path: Path
) -> None:
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(str(config))
    with pytest.raises(
        PeanutError,
        match=r"the config of '.*' asks for .*; expected sizes that the file's 4 tensors have; lower its sizes",
    ):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)


@pytest.mark.parametrize("number", [10**9, 10**15, 2**62])
@pytest.mark.parametrize("config_class", [LoraConfig, PeanutConfig, VeraConfig])
def test_a_new_adapter_that_no_memory_holds_is_refused(
    config_class: type[LoraConfig], number: int, tiny_llama: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(size_limits.os, "sysconf", lambda name: 2**16)
    with pytest.raises(
        PeanutError, match=r"adapter 'default' asks for a tensor of [\d,]+ numbers; expected what this "
    ):
        get_peft_model(tiny_llama(), config_class(r=number, target_modules=["q_proj"]))


def test_what_is_made_on_the_way_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """SHiRA draws its places from a permutation of all entries of a layer, of which it keeps few."""
    monkeypatch.setattr(size_limits.os, "sysconf", lambda name: 2**8)  # 16,384 numbers
    layers = {str(number): nn.Linear(64, 64) for number in range(20)}
    config = ShiraConfig(r=1, target_modules=list(layers))
    assert len(list(get_peft_model(nn.ModuleDict(layers), config).adapters.layers())) == 20
    for wide, r in ({"0": nn.Linear(200, 200)}, 1), ({name: nn.Linear(64, 64) for name in layers}, 16):
        with pytest.raises(PeanutError, match="adapter 'default' asks for a tensor of "):
            get_peft_model(nn.ModuleDict(wide), ShiraConfig(r=r, target_modules=list(wide)))


def test_the_text_that_a_long_prompt_starts_from(tiny_llama: Builder, smollm2: Path) -> None:
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a", "tokenizer_name_or_path": str(smollm2)}
    config = PromptTuningConfig(num_virtual_tokens=10**10, **text)
    with limited_by_file("a file", {}), pytest.raises(PeanutError, match="asks for a tensor of 10,000,000,000 numbers"):
        get_peft_model(tiny_llama(), config)


@pytest.mark.parametrize(
    ("config_class", "options"),
    [
        (PeanutConfig, {"depth": 10**9}),
        (XLoraConfig, {"xlora_depth": 10**9}),
        (PromptEncoderConfig, {"num_virtual_tokens": 1, "encoder_num_layers": 10**9}),
    ],
)
def test_layers_without_end_are_refused(config_class: type[PeftConfig], options: dict[str, Any]) -> None:
    with pytest.raises(PeanutError, match=r"=1000000000; expected a whole number from [01] to 10,000; change "):
        config_class(**options)


def test_an_expert_of_a_mixture_may_ask_for_no_more(tiny_llama: Builder, tmp_path: Path) -> None:
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 10**8}))
    with pytest.raises(PeanutError, match=r"the config of '.*' asks for a tensor of 3,200,000,000 numbers"):
        get_peft_model(tiny_llama(), XLoraConfig(adapters={"a": tmp_path}, hidden_size=32))


def test_what_is_in_no_file_is_still_made(tiny_llama: Builder, tmp_path: Path) -> None:
    config = VeraConfig(r=512, target_modules=["q_proj"], save_projection=False)
    model = get_peft_model(tiny_llama(), config).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path)(ids).logits, model(ids).logits)
