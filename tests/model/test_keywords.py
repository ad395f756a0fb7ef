"""A keyword that is not known is an error that names it, in every public function; Hugging Face PEFT's are known."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

import peanut
from peanut import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeanutError,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from peanut.protocols.registry import registered

Builder = Callable[..., hf.PreTrainedModel]


@pytest.fixture
def adapter(tiny_llama: Builder, tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        tmp_path / "a"
    )
    return tmp_path / "a"


Call = Callable[[Builder, Path, dict[str, Any]], Any]
CALLS: dict[str, tuple[str, Call]] = {
    "get_peft_model": ("mixd", lambda build, _, own: get_peft_model(build(), LoraConfig(), **own)),
    "PeftModel": ("adapter_nam", lambda build, _, own: PeftModel(build(), LoraConfig(), **own)),
    "inject": ("state_dct", lambda build, _, own: inject_adapter_in_model(LoraConfig(), build(), **own)),
    "from_pretrained": ("subfoldr", lambda build, path, own: PeftModel.from_pretrained(build(), path, **own)),
    "load_adapter": (
        "revison",
        lambda build, path, own: get_peft_model(build(), LoraConfig()).load_adapter(path, "b", **own),
    ),
    "add_adapter": (
        "low_cpu_mem",
        lambda build, _, own: get_peft_model(build(), LoraConfig()).add_adapter("b", LoraConfig(), **own),
    ),
    "save_pretrained": (
        "save_embeding_layers",
        lambda build, path, own: get_peft_model(build(), LoraConfig()).save_pretrained(path / "b", **own),
    ),
    "set_adapter": (
        "inference",
        lambda build, _, own: get_peft_model(build(), LoraConfig()).set_adapter("default", **own),
    ),
    "merge_and_unload": (
        "safe",
        lambda build, _, own: get_peft_model(build(), LoraConfig()).merge_and_unload(**own),
    ),
    "PeftConfig.from_pretrained": ("cach_dir", lambda _, path, own: PeftConfig.from_pretrained(path, **own)),
    "AutoPeftModel": ("dtyp", lambda _, path, own: AutoPeftModelForCausalLM.from_pretrained(path, **own)),
    "a config": ("lora_rank", lambda build, path, own: LoraConfig(**own)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_keyword_that_is_not_known_is_named(name: str, tiny_llama: Builder, adapter: Path) -> None:
    keyword, call = CALLS[name]
    with pytest.raises((PeanutError, TypeError), match=rf"'?{keyword}'?") as error:
        call(tiny_llama, adapter, {keyword: True})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "keyword", "near"),
    [
        ("save_pretrained", "save_embeding_layers", "save_embedding_layers"),
        ("from_pretrained", "is_trainabel", "is_trainable"),
        ("load_adapter", "chek_base", "check_base"),
    ],
)
def test_the_nearest_keyword_is_the_functions_own(
    name: str, keyword: str, near: str, tiny_llama: Builder, adapter: Path
) -> None:
    with pytest.raises(
        PeanutError, match=rf"{keyword}'; expected keywords .*{near}.*; leave it out \(nearest: '{near}'"
    ):
        CALLS[name][1](tiny_llama, adapter, {keyword: True})


@pytest.mark.parametrize("name", registered())
def test_a_config_names_the_keyword_that_it_does_not_know(name: str) -> None:
    config_class = registered()[name].config_class
    with pytest.raises(PeanutError, match=rf"^{config_class.__name__} is given 'target_layers'; .*target_modules.*; "):
        config_class(target_layers=["q_proj"])
    parameters = inspect.signature(config_class).parameters
    assert set(parameters) == {each.name for each in dataclasses.fields(config_class)}


HANDING_ON = {"forward", "generate", "predictive", "resize_token_embeddings"}
CHECKING = {"from_pretrained", "load_adapter", "load_peft_weights", "push_to_hub", "save_pretrained"}
"""Functions with ``**``: those that hand it on to the base's, and those that check it (above)."""


def test_no_other_public_function_takes_any_keyword() -> None:
    found = set()
    for name in peanut.__all__:
        public = getattr(peanut, name)
        whole = inspect.isclass(public) and issubclass(public, PeftModel)
        members = inspect.getmembers(public) if whole else [(name, public)]
        for key, each in members:
            function = getattr(each, "__func__", each)
            own = str(getattr(function, "__module__", "")).startswith("peanut.") and not key.startswith("_")
            if (
                own
                and inspect.isfunction(function)
                and any(
                    parameter.kind is parameter.VAR_KEYWORD
                    for parameter in inspect.signature(function).parameters.values()
                )
            ):
                found.add(key)
    assert found == HANDING_ON | CHECKING


HARMLESS: dict[str, dict[str, Any]] = {
    "save_pretrained": {"max_shard_size": "5GB", "push_to_hub": False, "save_function": print, "token": None},
    "from_pretrained": {"torch_device": "cpu", "device_map": {"": "cpu"}, "torch_dtype": "auto", "key_mapping": None},
    "load_adapter": {"torch_device": "cpu", "autocast_adapter_dtype": True, "ephemeral_gpu_offload": False},
    "add_adapter": {"autocast_adapter_dtype": False},
    "get_peft_model": {"mixed": True, "revision": None, "autocast_adapter_dtype": False},
    "AutoPeftModel": {"autocast_adapter_dtype": False, "check_base": True, "dtype": "float32"},
}


@pytest.mark.parametrize("name", HARMLESS)
def test_keywords_of_the_peer_without_effect_are_accepted(name: str, tiny_llama: Builder, adapter: Path) -> None:
    CALLS[name][1](tiny_llama, adapter, HARMLESS[name])
    assert (adapter / "b").exists() == (name == "save_pretrained")


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("save_pretrained", {"push_to_hub": True}),
        ("from_pretrained", {"adapters": {"a": "b"}}),
        ("load_adapter", {"use_auth_token": True}),
    ],
)
def test_what_would_change_the_result_is_refused(
    name: str, asked: dict[str, Any], tiny_llama: Builder, adapter: Path
) -> None:
    with pytest.raises(PeanutError, match=rf"^{name} is given {next(iter(asked))}=.*, which it does not do; expected"):
        CALLS[name][1](tiny_llama, adapter, asked)


def test_a_revision_is_kept_in_the_config(tiny_llama: Builder) -> None:
    assert get_peft_model(tiny_llama(), LoraConfig(), revision="v2").peft_config["default"].revision == "v2"
