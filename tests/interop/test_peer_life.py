"""Live models of the peer made ours and given back: what is kept beside the outputs, and what is refused."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

import peanut
from peanut import BitFitConfig, LoraConfig, PeanutError, PeftModel, from_peft, get_peft_model, to_peft
from peanut.interop.layers import wrapped_in
from peanut.model.adapters.adapter_set import AdapterSet

from ..support import PEER_WARNINGS, Net, distance, one_thread, refused, same_bits, scattered  # noqa: F401

Builder = Callable[..., hf.PreTrainedModel]
SAME = 1e-5
IDS = torch.randint(3, 101, (3, 9), generator=torch.Generator().manual_seed(0))
pytestmark = [*PEER_WARNINGS, pytest.mark.filterwarnings("ignore:Already found a `peft_config`")]


def lora(**options: Any) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return peft.LoraConfig(**settings | options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def adapted(base: nn.Module, config: Any = None, **options: Any) -> Any:
    return peft.get_peft_model(base, config or lora(), **options).eval()


def several(base: nn.Module) -> Any:
    """Three adapters whose names are parts of paths in the model."""
    model = adapted(base, lora(), adapter_name="0")
    model.add_adapter("layers", lora(r=2, target_modules=["q_proj", "up_proj"]))
    model.add_adapter("b", lora(r=3, target_modules=["down_proj"], lora_alpha=3, use_rslora=True))
    return model


def test_several_adapters(tiny_llama: Builder) -> None:
    theirs, expected = several(tiny_llama()), {}
    for active in (["0"], ["layers"], ["0", "b"]):
        theirs.base_model.set_adapter(active)
        expected[tuple(active)] = logits(theirs)
    model = from_peft(theirs)
    assert list(model.peft_config) == ["0", "layers", "b"]
    assert model.active_adapters == ["0", "b"]
    for name, trained in {"0": True, "layers": False, "b": True}.items():
        assert {value.requires_grad for _, value in model.adapters.parameters(name)} == {trained}
    assert distance(logits(model), expected["0", "b"]) < SAME
    model.merge_adapter()
    assert distance(logits(model), expected["0", "b"]) < SAME
    model.unmerge_adapter()
    model.set_adapter("layers")
    assert distance(logits(model), expected["layers",]) < SAME
    model.set_adapter(["0", "b"])
    back = to_peft(model)
    assert back.base_model.active_adapters == ["0", "b"]
    assert distance(logits(back), expected["0", "b"]) < SAME
    back.set_adapter("layers")
    assert distance(logits(back), expected["layers",]) < SAME


def test_a_model_with_adapters_put_into_it(tiny_llama: Builder) -> None:
    base = tiny_llama()
    base.add_adapter(lora(), "a")  # transformers' own
    base.add_adapter(lora(target_modules=["up_proj"]), "b")
    expected = logits(base)
    assert from_peft(base) is base
    assert not wrapped_in(base)
    assert not base._hf_peft_config_loaded
    assert AdapterSet.of(base).state.active == ["b"]
    assert distance(logits(base), expected) < SAME
    assert to_peft(base) is base
    assert base._hf_peft_config_loaded
    assert base.active_adapters() == ["b"]
    assert distance(logits(base), expected) < SAME
    base.set_adapter("a")
    moved = logits(base)
    assert distance(moved, expected) > 100 * SAME
    assert distance(logits(from_peft(base)), moved) < SAME


def test_methods_mixed_in_one_model(tiny_llama: Builder) -> None:
    theirs = adapted(tiny_llama(), lora(), mixed=True)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, target_modules=["q_proj", "up_proj"], init_lora_weights=False
    )
    theirs.add_adapter("other", config)
    theirs.set_adapter(["default", "other"])
    expected = logits(theirs)
    model = from_peft(theirs)
    assert distance(logits(model), expected) < SAME
    back = to_peft(model)
    assert isinstance(back, peft.PeftMixedModel)
    assert distance(logits(back), expected) < SAME


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("saved", [["lm_head"], ["lm_head", "embed_tokens"]])
@pytest.mark.parametrize("tied", [False, True])
def test_modules_trained_whole(tiny_llama: Builder, saved: list[str], tied: bool) -> None:
    theirs = adapted(tiny_llama(tie_word_embeddings=tied), lora(modules_to_save=saved))
    scattered([p for name, p in theirs.named_parameters() if "modules_to_save" in name], scale=0.1)
    copies = {id(p) for name, p in theirs.named_parameters() if "modules_to_save" in name}
    expected = logits(theirs)
    model = from_peft(theirs)
    assert copies <= {id(p) for p in model.parameters() if p.requires_grad}
    assert distance(logits(model), expected) < SAME
    assert distance(logits(to_peft(model)), expected) < SAME


def test_no_head_is_copied(tiny_llama: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = adapted(tiny_llama(), lora(modules_to_save=["lm_head"]))
    own = theirs.get_base_model().lm_head.modules_to_save["default"]
    expected = logits(theirs)

    def refuse(*_: Any) -> None:
        raise AssertionError("a copy")

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", refuse)
    model = from_peft(theirs)
    assert dict(model.adapters.saved_modules())["lm_head"].modules_to_save["default"] is own
    assert distance(logits(model), expected) < SAME


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("beside_lora", [False, True])
def test_trained_tokens(tiny_llama: Builder, tied: bool, beside_lora: bool) -> None:
    tokens = sorted(set(IDS.flatten().tolist()))[::3]
    config = lora(trainable_token_indices=tokens) if beside_lora else peft.TrainableTokensConfig(token_indices=tokens)
    theirs = adapted(tiny_llama(tie_word_embeddings=tied), config)
    scattered([p for p in theirs.parameters() if p.requires_grad], scale=0.1)
    expected, moving = logits(theirs), {id(p) for p in theirs.parameters() if p.requires_grad}
    model = from_peft(theirs)
    assert {id(p) for p in model.parameters() if p.requires_grad} == moving
    assert distance(logits(model), expected) < SAME
    back = to_peft(model)
    assert {id(p) for p in back.parameters() if p.requires_grad} == moving
    assert distance(logits(back), expected) < SAME


@pytest.mark.parametrize("wide", [True, False])
def test_half_precision(tiny_llama: Builder, wide: bool) -> None:
    theirs = adapted(tiny_llama().to(torch.bfloat16), autocast_adapter_dtype=wide)
    dtypes = {id(p): p.dtype for p in theirs.parameters()}
    expected = logits(theirs)
    model = from_peft(theirs)
    assert all(dtypes[id(parameter)] == parameter.dtype for parameter in model.parameters())
    assert (torch.float32 in dtypes.values()) == wide
    assert distance(logits(model), expected) < 0.02
    assert distance(logits(to_peft(model)), expected) < 0.02


def test_what_is_frozen_and_in_training_stays(tiny_llama: Builder) -> None:
    theirs = adapted(tiny_llama()).train()
    base = theirs.get_base_model()
    base.model.layers[0].eval()
    base.model.norm.weight.requires_grad_(True)
    name, half = next((n, p) for n, p in theirs.named_parameters() if "layers.1" in n and "lora_A" in n)
    half.requires_grad_(False)
    moving = {id(p) for p in theirs.parameters() if p.requires_grad}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model = from_peft(theirs)
    for one in (model, to_peft(model)):
        assert {id(p) for p in one.parameters() if p.requires_grad} == moving, name
        assert one.training
        assert base.model.layers[1].self_attn.q_proj.training
        assert not any(module.training for module in base.model.layers[0].modules())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_hooks_stay(tiny_llama: Builder) -> None:
    base = tiny_llama()
    base.gradient_checkpointing_enable()
    seen: list[str] = []
    base.model.layers[0].register_forward_hook(lambda *_: seen.append("block"))
    theirs = adapted(base)  # checkpointing hangs a hook of its own on the embedding
    handle = base.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append("layer"))
    model = from_peft(theirs)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert model.is_gradient_checkpointing
    assert {"block", "layer"} <= set(seen)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    back = to_peft(model)
    handle.remove()
    seen.clear()
    logits(back.eval())
    assert seen == ["block"]


def test_a_loaded_adapter(tiny_llama: Builder, tmp_path: Path) -> None:
    adapted(tiny_llama(), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)).save_pretrained(
        tmp_path
    )
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    expected = logits(theirs)
    model = from_peft(theirs)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.peft_config["default"].inference_mode
    assert distance(logits(model), expected) < SAME
    assert not any(parameter.requires_grad for parameter in to_peft(model).parameters())


def test_names_that_name_nothing_in_the_config(tiny_llama: Builder) -> None:
    """The peer lets a typo pass; the layers that it found are the ones that ours names."""
    theirs = adapted(tiny_llama(), lora(target_modules=["q_proj", "value_proj"]))
    expected, paths = logits(theirs), sorted(place.path for place in wrapped_in(theirs.get_base_model()))
    model = from_peft(theirs)
    assert model.peft_config["default"].target_modules == paths
    assert distance(logits(model), expected) < SAME


@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True, task_type="CAUSAL_LM"),
        peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        peft.ShiraConfig(r=2, target_modules=["q_proj"], init_weights=False),
        peft.VBLoRAConfig(r=2, num_vectors=6, vector_length=8, target_modules=["q_proj", "v_proj"]),
        peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"], init_lora_weights=False),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_saved_files_are_the_same(config: Any, tiny_llama: Builder, tmp_path: Path) -> None:
    theirs = adapted(tiny_llama(), config)
    theirs.save_pretrained(tmp_path / "theirs")
    from_peft(theirs).save_pretrained(tmp_path / "ours")
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert found.keys() == expected.keys()
    assert all(same_bits(value, expected[key]) for key, value in found.items())


def test_adalora_goes_on_where_it_was(tiny_llama: Builder) -> None:
    config = peft.AdaLoraConfig(init_r=4, target_r=1, total_step=8, target_modules=["q_proj", "v_proj"])
    theirs = adapted(tiny_llama(), config).train()
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.01)
    for number in range(1, 4):
        theirs(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(number)
        optimizer.zero_grad()
    averages = theirs.base_model.rankallocator.exp_avg_ipt
    pattern = theirs.peft_config["default"].rank_pattern
    with pytest.warns(UserWarning, match="starts again from its first"):
        model = from_peft(theirs)
    for path, layer in model.adapters.layers():
        values = layer.values("default")
        assert torch.equal(values["ipt_A"], averages[f"{path}.lora_A.default"])
        assert values["kept"].flatten().bool().tolist() == pattern[f"{path}.lora_E.default"]
    assert not all(all(mask) for mask in pattern.values())


def test_started_in_the_weight(tiny_llama: Builder) -> None:
    theirs = adapted(tiny_llama(), lora(init_lora_weights="pissa"))
    expected = logits(theirs)
    with pytest.warns(UserWarning, match="init_lora_weights='pissa', which took a part"):
        model = from_peft(theirs)
    assert model.peft_config["default"].init_lora_weights is True
    assert distance(logits(model), expected) < SAME


# A script with one line more


def test_the_plain_trainer(tiny_llama: Builder, tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(2, 1)]

    def losses(ours: bool) -> list[float]:
        torch.manual_seed(0)
        model: Any = adapted(tiny_llama(), lora(task_type="CAUSAL_LM"))
        if ours:
            model = from_peft(model)
        arguments = hf.TrainingArguments(
            tmp_path, max_steps=4, logging_steps=1, per_device_train_batch_size=2, learning_rate=0.02, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = hf.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    found, expected = losses(True), losses(False)
    assert len(found) == 4
    assert found == pytest.approx(expected, rel=1e-4)
    assert abs(found[0] - found[-1]) > 1e-3


def test_generation(tiny_llama: Builder) -> None:
    theirs = adapted(tiny_llama(), lora(task_type="CAUSAL_LM"))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)
    model = from_peft(theirs)
    assert torch.equal(model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options), expected)


# Refused, and nothing is changed


def merged(model: Any) -> None:
    model.merge_adapter()


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def irregular(model: Any) -> None:
    model.add_adapter("b", lora())
    model.get_base_model().model.layers[0].self_attn.q_proj.set_adapter("b")


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "merged": (lora(), merged, "call unmerge_adapter"),
    "disabled": (lora(), disabled, "call enable_adapter_layers"),
    "irregular": (lora(), irregular, "other active adapters"),
    "method": (peft.LoHaConfig(r=2, target_modules=["q_proj"]), None, "the method 'LOHA'"),
    "option": (lora(layer_replication=[(0, 2), (1, 2)]), None, "layer_replication"),
    # Found when our layers are half in.
    "late": (lora(rank_pattern={"k_proj": 2}), None, "rank_pattern names 'k_proj'"),
}


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tiny_llama: Builder) -> None:
    config, prepare, message = REFUSED[case]
    model = adapted(tiny_llama(), copy.deepcopy(config))
    if prepare is not None:
        prepare(model)
    calls: list[int] = []
    handle = model.get_base_model().model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    expected = logits(model)
    with refused(model, message):
        from_peft(model)
    assert same_bits(logits(model), expected)
    assert len(calls) == 2
    handle.remove()
    assert same_bits(logits(model), expected)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "config",
    [
        peft.C3AConfig(block_size=4, target_modules=["q_proj"], init_weights="gaussian"),
        peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], init_weights=False),
        peft.MissConfig(r=8, init_weights="bat", target_modules=["q_proj"]),
        lora(use_dora=True),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_adapters_that_the_peer_chains(config: Any, tiny_llama: Builder) -> None:
    theirs = adapted(tiny_llama(), copy.deepcopy(config))
    theirs.add_adapter("b", copy.deepcopy(config))
    theirs.base_model.set_adapter(["default", "b"])
    with refused(theirs, "'default' and 'b' act together on 'model.layers.0.self_attn.q_proj'"):
        from_peft(theirs)
    theirs.set_adapter("b")
    expected = logits(theirs)
    model = from_peft(theirs)
    assert distance(logits(model), expected) < SAME
    model.set_adapter(["default", "b"])
    with refused(model, "act together"):
        to_peft(model)


@pytest.mark.parametrize(
    ("layer", "config"),
    [
        (nn.Conv2d(4, 8, 3), peft.OFTConfig(r=2, oft_block_size=0, target_modules=["layer"])),
        (nn.Conv2d(4, 8, 3, dilation=2), peft.LoraConfig(target_modules=["layer"])),
        (nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), peft.HRAConfig(r=2, target_modules=["layer"])),
        (nn.Linear(4, 8), peft.TrainableTokensConfig(token_indices=[1], target_modules=["layer"])),
    ],
    ids=lambda value: value.peft_type.value if isinstance(value, peft.PeftConfig) else type(value).__name__,
)
def test_layers_of_which_the_peer_makes_something_else(layer: nn.Module, config: Any) -> None:
    theirs = adapted(Net(layer), copy.deepcopy(config))
    with refused(theirs, "computes something else than ours"):
        from_peft(theirs)
    model = ours(Net(copy.deepcopy(theirs.get_base_model().layer.base_layer)), _ours(config))
    with refused(model, "computes something else than ours"):
        to_peft(model)


def _ours(config: Any) -> peanut.PeftConfig:
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return peanut.PeftConfig.from_dict(values)


def test_no_model_of_the_peer(tiny_llama: Builder) -> None:
    with pytest.raises(PeanutError, match="has no adapters of Hugging Face PEFT"):
        from_peft(tiny_llama())
    with pytest.raises(PeanutError, match="has no adapters"):
        to_peft(tiny_llama())


def ours(base: nn.Module, config: Any = None) -> PeftModel:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False) if config is None else config
    return get_peft_model(base, config).eval()


def test_what_the_peer_does_not_have_is_refused(tiny_llama: Builder) -> None:
    cases = [
        (BitFitConfig(), tiny_llama(attention_bias=True), "which Hugging Face PEFT 0.* does not have"),
        (peanut.PeanutConfig(r=2, target_modules=["q_proj"], side="in"), tiny_llama(), "has side='in'"),
        (
            peanut.PeanutConfig(r=2, target_modules=["embed_tokens"]),
            tiny_llama(),
            "refuses an adapter: .*not support",
        ),
    ]
    for config, base, message in cases:
        model = ours(base, config)
        expected = logits(model)
        with refused(model, message):
            to_peft(model)
        assert same_bits(logits(model), expected)
    model = ours(tiny_llama())
    model.merge_adapter()
    with refused(model, "call unmerge_adapter"):
        to_peft(model)


def test_without_the_peer(tiny_llama: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ours(tiny_llama())
    monkeypatch.setitem(sys.modules, "peft", None)
    with refused(model, "pip install peft"):
        to_peft(model)


def test_ours_there_and_back(tiny_llama: Builder) -> None:
    for config in (
        peanut.PeanutConfig(r=2, depth=1, target_modules=["q_proj", "up_proj"], init_weights=False),
        LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
    ):
        model = ours(tiny_llama(), config)
        scattered([p for p in model.parameters() if p.requires_grad], scale=0.1)
        expected = logits(model)
        theirs = to_peft(model)
        assert distance(logits(theirs), expected) < SAME
        assert distance(logits(from_peft(theirs)), expected) < SAME


def test_a_layer_alone() -> None:
    x = torch.randn(4, 12)
    theirs = adapted(Net(nn.Linear(12, 8)), peft.LoraConfig(target_modules=["layer"], init_lora_weights=False))
    expected = theirs(x).detach()
    assert distance(from_peft(theirs)(x), expected) < SAME
