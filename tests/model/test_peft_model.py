"""The surface that scripts written for the peer know: the same names, with the same meaning."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import peanut
from peanut import (
    LoraConfig,
    LoraModel,
    PeanutConfig,
    PeanutError,
    PeanutModel,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peanut.model.layers.layer import AdaptedLayer

from ..support import PEER_WARNINGS, Net, one_thread, peer_model, randomised, refused, same_bits  # noqa: F401

pytestmark = PEER_WARNINGS
Build = Callable[..., hf.PreTrainedModel]
IDS = torch.arange(3, 15).reshape(2, 6)
PEANUT = {"r": 4, "init_weights": False, "target_modules": ["q_proj", "v_proj"]}


def test_every_public_name_is_there_and_documented() -> None:
    import peft

    assert sorted(peanut.__dir__()) == sorted(peanut.__all__)
    for name in peanut.__all__:
        assert name == "__version__" or inspect.getdoc(getattr(peanut, name)), name
    both = set(peanut.__all__) & set(dir(peft))
    assert {"PeftModel", "PeanutModel", "LoraModel", "PeanutConfig", "LoraConfig", "TaskType", "get_peft_model"} <= both
    assert {"inject_adapter_in_model", "get_peft_model_state_dict", "set_peft_model_state_dict"} <= both
    assert sum(name.startswith("AutoPeftModel") for name in both) == 7
    for method in set(dir(peft.PeftModel)) & vars(PeftModel).keys():  # ours take what theirs do, in their order
        ours, theirs = getattr(PeftModel, method), getattr(peft.PeftModel, method)
        if inspect.isfunction(ours) and not method.startswith("_"):
            named = [
                name for name in inspect.signature(theirs).parameters if name in inspect.signature(ours).parameters
            ]
            assert named == [name for name in inspect.signature(ours).parameters if name in named], method
    with pytest.raises(AttributeError, match="'peanut' has no attribute 'PeftMoodel'"):
        peanut.PeftMoodel  # noqa: B018


def test_names_that_scripts_reach_for(tiny_llama: Build) -> None:
    base = tiny_llama()
    model = get_peft_model(base, PeanutConfig(**PEANUT, task_type="CAUSAL_LM"))
    assert isinstance(model, PeftModel)
    assert isinstance(model.base_model, PeanutModel)
    assert model.base_model.model is model.get_base_model() is base
    assert model.peft_config["default"].r == 4
    assert model.peft_type == "PEANUT"
    assert (model.active_adapter, model.active_adapters, model.merged_adapters) == ("default", ["default"], [])
    assert model.active_peft_config is model.peft_config["default"]
    layer = base.model.layers[0].self_attn.q_proj
    assert isinstance(layer, AdaptedLayer)
    assert isinstance(layer.base_layer, nn.Linear)
    assert layer.get_base_layer() is layer.base_layer
    assert (layer.weight, layer.bias) == (layer.base_layer.weight, None)
    assert (layer.in_features, layer.out_features) == (32, 32)
    assert (layer.active_adapters, layer.merged_adapters, layer.merged, layer.disable_adapters) == (
        ["default"],
        [],
        False,
        False,
    )
    assert "default: PEANUT" in repr(layer)
    assert repr(layer).startswith("peanut.Linear(")
    assert model.config is base.config
    assert (model.device, model.dtype) == (base.device, base.dtype)
    assert model.get_input_embeddings() is base.model.embed_tokens
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = model.no_such_name


def test_forward_and_generate_are_the_base_models_with_the_adapter(tiny_llama: Build) -> None:
    base = tiny_llama()
    plain = base.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    model = randomised(get_peft_model(base, PeanutConfig(**PEANUT))).eval()
    out = model(input_ids=IDS, labels=IDS)
    assert same_bits(model(IDS).logits, out.logits)
    out.loss.backward()
    generated = model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 12)
    assert not torch.equal(generated, plain)
    for row in range(6, 12):  # greedy: each token is the likeliest after those before it
        assert torch.equal(generated[:, row], model(generated[:, :row]).logits[:, -1].argmax(-1))
    with model.disable_adapter():
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0), plain)


def test_counts_and_their_line_are_the_peers(tiny_bert: Build, capsys: pytest.CaptureFixture[str]) -> None:
    config = PeanutConfig(r=4, depth=1, task_type="SEQ_CLS")
    model, theirs = get_peft_model(tiny_bert(), config), peer_model(tiny_bert(), config)
    model.print_trainable_parameters()
    theirs.print_trainable_parameters()
    ours, others = capsys.readouterr().out.splitlines()
    assert ours == others
    assert ours.startswith("trainable params: 1,218 || all params: ")
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize(("model_class", "config"), [(PeanutModel, PeanutConfig(**PEANUT)), (LoraModel, LoraConfig())])
def test_model_classes_wrap_by_themselves(model_class: type[Any], config: Any, tiny_llama: Build) -> None:
    wrapped = model_class(tiny_llama(), config, "own")
    assert list(wrapped.adapters.configs) == ["own"]
    assert wrapped.adapters.state.active == ["own"]
    assert wrapped(IDS).logits.shape == (2, 6, 101)
    assert wrapped.config.model_type == "llama"
    several = model_class(tiny_llama(), {"a": config, "b": config})
    assert several.adapters.state.active == ["a", "b"]
    other = LoraConfig() if model_class is PeanutModel else PeanutConfig()
    with pytest.raises(PeanutError, match=rf"given to {model_class.__name__}; expected a config of .*; use get_peft_"):
        model_class(tiny_llama(), other)


def test_injecting_returns_the_model_itself_with_all_but_the_adapter_frozen(tiny_llama: Build) -> None:
    import peft

    base = tiny_llama()
    assert inject_adapter_in_model(PeanutConfig(**PEANUT), base, "a") is base
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj", "v_proj"]), tiny_llama())
    for model in (base, theirs):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained
        assert all("peanut_" in name or "lora_" in name for name in trained)
    state = get_peft_model_state_dict(base, adapter_name="a")
    assert set(state) == {
        f"model.layers.{i}.self_attn.{name}_proj.peanut_{factor}.weight"
        for i in (0, 1)
        for name in "qv"
        for factor in "AB"
    }
    other = PeanutConfig(r=PEANUT["r"], depth=PEANUT.get("depth", 0), target_modules=["k_proj"])
    again = inject_adapter_in_model(other, tiny_llama(), "a", state_dict=state)
    assert get_peft_model_state_dict(again, adapter_name="a").keys() == state.keys()  # the keys tell what is adapted
    set_peft_model_state_dict(again, state, "a")
    assert same_bits(again(IDS).logits, base(IDS).logits)
    assert not same_bits(again(IDS).logits, tiny_llama()(IDS).logits)


def test_state_dicts_of_an_adapter_are_read_and_set(tiny_llama: Build) -> None:
    model = randomised(get_peft_model(tiny_llama(), PeanutConfig(**PEANUT)))
    state = get_peft_model_state_dict(model)
    assert all(key.startswith("base_model.model.model.layers.") for key in state)
    full = {key: 2 * value for key, value in model.state_dict().items()}  # as gathered by a sharded trainer
    doubled = get_peft_model_state_dict(model, full)
    assert doubled.keys() == state.keys()
    assert all(same_bits(doubled[key], 2 * value) for key, value in state.items())
    other = get_peft_model(tiny_llama(), PeanutConfig(**PEANUT))
    set_peft_model_state_dict(other, state)
    assert same_bits(other(IDS).logits, model(IDS).logits)
    assert all(parameter.requires_grad for _, parameter in other.adapters.parameters("default"))


def without(state: dict[str, Tensor], key: str, **more: Tensor) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != key} | more


def test_a_state_dict_that_does_not_fit_is_refused_whole(tiny_llama: Build) -> None:
    model = get_peft_model(tiny_llama(), PeanutConfig(**PEANUT))
    state = {key: value + 1 for key, value in get_peft_model_state_dict(model).items()}
    last = sorted(state)[-1]
    short = last.removeprefix("base_model.model.")
    with refused(model, rf"^'the state dict' lacks {short}; expected the 8 tensors of its config on LlamaForCausal"):
        set_peft_model_state_dict(model, without(state, last))
    with refused(model, r"has unexpected q_prj\.weight; .*\(nearest to the first: "):
        set_peft_model_state_dict(model, without(state, "", **{"q_prj.weight": torch.ones(1)}))
    with refused(model, rf"^'the state dict' lacks {short} and has unexpected extra; "):
        set_peft_model_state_dict(model, without(state, last, extra=torch.ones(1)))
    with refused(model, rf"holds {short} of shape \(3,\); expected \(16, 4\); load it on the base it was trained on"):
        set_peft_model_state_dict(model, state | {last: torch.ones(3)})
    with refused(model, r"^no adapter 'b'; expected one of 'default'; nearest: 'default'$"):
        set_peft_model_state_dict(model, state, "b")
    model.merge_adapter()
    with refused(model, r"^adapter 'default' is merged; expected an unmerged adapter; call unmerge_adapter\(\) first$"):
        set_peft_model_state_dict(model, state)


def test_an_adapter_in_inference_mode_is_not_trained(tiny_llama: Build, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), PeanutConfig(**PEANUT, inference_mode=True))
    assert model.get_nb_trainable_parameters()[0] == 0
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert (loaded.get_nb_trainable_parameters()[0], loaded.training) == (0, False)
    trained = PeftModel.from_pretrained(tiny_llama().train(), tmp_path, is_trainable=True)
    assert trained.get_nb_trainable_parameters()[0] == sum(p.numel() for _, p in trained.adapters.parameters("default"))
    assert trained.training
    loaded.set_adapter("default")
    assert loaded.get_nb_trainable_parameters() == trained.get_nb_trainable_parameters()
    loaded.set_adapter("default", inference_mode=True)
    assert loaded.get_nb_trainable_parameters()[0] == 0


def test_the_base_may_come_in_any_precision_and_the_adapter_stays_float32(tiny_llama: Build) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        wide = get_peft_model(tiny_llama().to(dtype), PeanutConfig(**PEANUT))
        narrow = get_peft_model(tiny_llama().to(dtype), PeanutConfig(**PEANUT), autocast_adapter_dtype=False)
        assert {p.dtype for _, p in wide.adapters.parameters("default")} == {torch.float32}
        assert {p.dtype for _, p in narrow.adapters.parameters("default")} == {dtype}
        assert wide(IDS).logits.dtype == narrow(IDS).logits.dtype == dtype


def test_without_storage_until_loaded(tiny_llama: Build, tmp_path: Path) -> None:
    model = randomised(get_peft_model(tiny_llama(), PeanutConfig(**PEANUT)))
    model.save_pretrained(tmp_path)
    empty = get_peft_model(tiny_llama(), PeanutConfig(**PEANUT), low_cpu_mem_usage=True)
    assert {p.device.type for _, p in empty.adapters.parameters("default")} == {"meta"}
    set_peft_model_state_dict(empty, get_peft_model_state_dict(model))
    assert same_bits(empty(IDS).logits, model(IDS).logits)
    assert {p.requires_grad for _, p in empty.adapters.parameters("default")} == {True}
    empty.load_adapter(tmp_path, "b", low_cpu_mem_usage=True)
    empty.set_adapter("b")
    assert same_bits(empty(IDS).logits, model(IDS).logits)


def test_a_base_without_storage_can_be_planned_on() -> None:
    with torch.device("meta"):
        net = Net(nn.Linear(12, 20))
        model = get_peft_model(net, PeanutConfig(r=4, target_modules=["layer"]))
        assert model(torch.empty(3, 12)).shape == (3, 20)
    assert model.get_nb_trainable_parameters() == (2 * 4 * 20, 2 * 4 * 20 + 20 * 13)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def another_librarys_config() -> object:
    import peft

    return peft.LoraConfig(target_modules=["layer"])


@pytest.mark.parametrize("make", [another_librarys_config, lambda: {"peft_type": "LORA", "target_modules": ["layer"]}])
def test_configs_of_another_library_and_dictionaries_are_told(make: Callable[[], Any]) -> None:
    expected = pytest.raises(PeanutError, match=r"as the config of an adapter; expected a config of this library")
    model = get_peft_model(Net(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["layer"]))
    with expected:
        get_peft_model(Net(nn.Linear(4, 4)), make())
    with expected:
        model.add_adapter("b", make())
    with expected:
        inject_adapter_in_model(make(), Net(nn.Linear(4, 4)))
