"""Objects of ours are taken for Hugging Face PEFT's own, and ``install`` lets its functions take them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator

import peft
import pytest
import torch
import transformers as hf
from peft import get_peft_model as bound_before
from torch import nn

import peanut
from peanut import LoraConfig, PeanutConfig, PeanutError, get_peft_model
from peanut.protocols import METHODS

from ..compiling import assert_compiles
from ..support import PEER_WARNINGS, ids, one_thread  # noqa: F401

pytestmark = PEER_WARNINGS

TASKS = {
    "SEQ_CLS": peft.PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": peft.PeftModelForSeq2SeqLM,
    "CAUSAL_LM": peft.PeftModelForCausalLM,
    "TOKEN_CLS": peft.PeftModelForTokenClassification,
    "QUESTION_ANS": peft.PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": peft.PeftModelForFeatureExtraction,
}


@pytest.fixture
def installed() -> Iterator[None]:
    peanut.install()
    yield
    peanut.uninstall()


# What isinstance says


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_config_is_taken_for_that_of_its_name(name: str) -> None:
    own = METHODS[name].config_class
    theirs = getattr(peft, own.__name__, peft.PeftConfig)
    config = own.__new__(own)
    assert isinstance(config, theirs)
    assert isinstance(config, own)
    assert (type(config), config.__class__.__name__) == (own, own.__name__)
    others = {getattr(peft, each) for each in dir(peft) if each.endswith("Config")}
    assert [other for other in others if isinstance(config, other)].count(theirs) == 1


@pytest.mark.parametrize("task", TASKS)
def test_a_model_is_taken_for_that_of_its_task(task: str) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"], task_type=task))
    assert isinstance(model, TASKS[task])
    assert isinstance(model, peanut.PeftModel)
    assert [kind for kind in TASKS.values() if isinstance(model, kind)] == [TASKS[task]]
    assert not isinstance(model.get_base_model(), peft.PeftModel)
    plain = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    assert isinstance(plain, peft.PeftModel)
    assert not isinstance(plain, tuple(TASKS.values()))


def test_nothing_of_the_other_class_is_inherited() -> None:
    config = LoraConfig(r=3)
    assert type(config).__mro__[-2].__module__.startswith("peanut")
    assert not hasattr(config, "check_kwargs")
    again = [config.__class__(r=3), dataclasses.replace(config), copy.deepcopy(config), copy.copy(config)]
    again += [pickle.loads(pickle.dumps(config, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for each in again:
        assert type(each) is LoraConfig
        assert each == config

    class Derived(config.__class__):  # type: ignore[name-defined, misc]
        pass

    assert Derived.__bases__ == (LoraConfig,)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo, of its own doing
def test_a_model_is_copied_pickled_and_compiled(tiny_llama: Callable[..., hf.PreTrainedModel]) -> None:
    model = get_peft_model(tiny_llama(), PeanutConfig(r=2, init_weights=False, task_type="CAUSAL_LM")).eval()
    x = ids()
    expected = model(x).logits
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model)
        assert torch.equal(again(x).logits, expected)
    assert_compiles(model, {"input_ids": x, "labels": x}, lambda output: output.logits)


def test_whichever_is_imported_first() -> None:
    program = """
import sys
import torch, peanut
config = peanut.LoraConfig(target_modules=["0"], task_type="CAUSAL_LM")
model = peanut.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config)
assert "peft" not in sys.modules
assert (config.__class__, model.__class__) == (type(config), type(model))
import peft
assert isinstance(config, peft.LoraConfig) and isinstance(model, peft.PeftModelForCausalLM)
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=False, timeout=120).returncode == 0


# Functions


def test_without_install_their_functions_are_refused_in_one_line(tiny_llama: Callable[..., hf.PreTrainedModel]) -> None:
    ours = get_peft_model(tiny_llama(), LoraConfig(r=2))
    for call in (
        lambda: bound_before(tiny_llama(), PeanutConfig(r=2)),
        lambda: peft.inject_adapter_in_model(LoraConfig(r=2), tiny_llama()),
        lambda: peft.get_peft_model_state_dict(ours),
        lambda: peft.set_peft_model_state_dict(ours, {}),
    ):
        with pytest.raises(PeanutError, match=r"^peft\..* of this library; expected .*; call peanut.install\(\)"):
            call()


def test_installed_functions_take_ours_and_theirs(
    installed: None, tiny_llama: Callable[..., hf.PreTrainedModel]
) -> None:
    peanut.install()  # a second call changes nothing
    ours = bound_before(tiny_llama(), PeanutConfig(r=2))  # type: ignore[arg-type]
    assert type(ours).__mro__[1] is peanut.PeftModel
    state = peft.get_peft_model_state_dict(ours)
    assert state.keys() == peanut.get_peft_model_state_dict(ours).keys()
    assert len(state) == 8  # A and B of q_proj and v_proj in two blocks
    peft.set_peft_model_state_dict(ours, {key: value + 1 for key, value in state.items()})
    assert torch.equal(peft.get_peft_model_state_dict(ours)[next(iter(state))], next(iter(state.values())))
    base = tiny_llama()
    assert peft.inject_adapter_in_model(LoraConfig(r=2), base) is base  # type: ignore[arg-type]
    assert not any(type(module).__module__.startswith("peft.") for module in base.modules())

    theirs = bound_before(tiny_llama(), peft.LoraConfig(r=2))
    assert type(theirs) is peft.PeftModel
    assert sum(type(module).__module__.startswith("peft.tuners.lora") for module in theirs.modules()) > 1
    assert (
        peft.get_peft_model_state_dict(theirs).keys()
        == peanut.get_peft_model_state_dict(get_peft_model(tiny_llama(), LoraConfig(r=2))).keys()
    )


def test_uninstall_leaves_no_trace() -> None:
    functions = [peft.get_peft_model, peft.inject_adapter_in_model, peft.get_peft_model_state_dict]
    before = [(each.__code__, inspect.signature(each)) for each in functions]
    peanut.install()
    assert [inspect.signature(each) for each in functions] == [signature for _, signature in before]
    assert all(each.__code__ is not code for each, (code, _) in zip(functions, before, strict=True))
    peanut.uninstall()
    peanut.uninstall()
    assert [(each.__code__, inspect.signature(each)) for each in functions] == before
    assert not any("__signature__" in vars(each) for each in functions)
