"""Merged for a while or for good: the same answers, nothing lost, and a model that any library loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from peanut import LoraConfig, OFTConfig, PeanutConfig, PeanutError, PeftModel, get_peft_model

from ...support import (
    assert_looks,
    distance,
    frozen_state,
    look_of,
    one_thread,  # noqa: F401
    randomised,
    refused,
    same_bits,
)

Build = Callable[..., hf.PreTrainedModel]
IDS = torch.arange(3, 15).reshape(2, 6)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapted(
    base: nn.Module, *targets: str, name: str = "default", method: Any = PeanutConfig, **options: Any
) -> PeftModel:
    options = {"r": 4, "target_modules": list(targets) or ["q_proj", "up_proj"]} | options
    model = get_peft_model(base, method(**options), name)
    return randomised(model).eval()


@pytest.mark.parametrize("method", [PeanutConfig, LoraConfig])
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_a_merged_model_is_saved_and_loaded_without_this_library(
    kind: str, method: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    build = request.getfixturevalue(f"tiny_{kind}")
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    model = randomised(get_peft_model(build(), method(r=4, task_type=task, target_modules="all-linear"))).eval()
    expected = logits(model)
    assert distance(expected, logits(build())) > 0.05
    merged = model.merge_and_unload()
    assert type(merged) is type(build())
    assert distance(logits(merged), expected) < 1e-5
    assert {name: type(module) for name, module in merged.named_modules()} == look_of(build())[0]
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    assert same_bits(logits(again), logits(merged))


@pytest.mark.parametrize(
    ("kind", "target", "other"),
    [("llama", "lm_head", "embed_tokens"), ("llama", "embed_tokens", "lm_head"), ("gpt2", "wte", "lm_head")],
)
def test_a_tied_weight_is_merged_on_one_side_alone(
    kind: str, target: str, other: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(f"tiny_{kind}")(tie_word_embeddings=True)
    model = adapted(base, target, method=LoraConfig)
    changed = next(layer for _, layer in model.adapters.layers())
    partner = next(module for name, module in base.named_modules() if name.rpartition(".")[2] == other)
    assert changed.weight is partner.weight
    expected, before = logits(model), partner.weight.detach().clone()
    model.merge_adapter()
    assert distance(logits(model), expected) < 1e-5
    assert same_bits(partner.weight.detach(), before)
    model.unmerge_adapter()
    assert changed.weight is partner.weight
    assert same_bits(logits(model), expected)
    merged = model.merge_and_unload()
    assert distance(logits(merged), expected) < 1e-5
    merged.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path).eval()
    assert distance(logits(again), expected) < 1e-5
    assert not again.config.tie_word_embeddings


def test_a_tie_that_no_adapter_touches_stays(tiny_llama: Build, tmp_path: Path) -> None:
    model = adapted(tiny_llama(tie_word_embeddings=True))
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert same_bits(logits(again), logits(merged))


def test_merging_some_of_three_keeps_the_sum(tiny_llama: Build) -> None:
    model = adapted(tiny_llama(), name="a")
    for name, config in (
        ("b", LoraConfig(r=2, target_modules=["q_proj"])),
        ("c", PeanutConfig(target_modules=["o_proj"])),
    ):
        model.add_adapter(name, config)
    randomised(model, "bc").set_adapter(["a", "b", "c"])
    expected, before = logits(model), frozen_state(model)
    for names in (["b"], "c", ["a", "b"]):
        model.merge_adapter(names)
        assert distance(logits(model), expected) < 1e-5
    assert model.merged_adapters == ["b", "c", "a"]
    assert model.get_base_model().model.layers[0].self_attn.o_proj.merged_adapters == ["c"]
    with pytest.warns(UserWarning, match="^adapter 'a' is merged already: it is written again, as it is now$"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert same_bits(logits(model), expected)
    assert all(same_bits(value, before[key]) for key, value in model.state_dict().items())


def test_merging_an_adapter_makes_it_active(tiny_llama: Build) -> None:
    model = adapted(tiny_llama(), name="a")
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"]))
    randomised(model, "b")
    model.merge_adapter(["b"])
    assert model.active_adapters == ["a", "b"]
    both = logits(model)
    model.unmerge_adapter()
    assert distance(logits(model), both) < 1e-5


def test_what_is_merged_cannot_be_switched_off_or_taken_out(tiny_llama: Build) -> None:
    model = adapted(tiny_llama(), name="a")
    model.add_adapter("b", LoraConfig(target_modules=["q_proj"]))
    model.merge_adapter()
    unmerge = r"; expected an unmerged (model|adapter); call unmerge_adapter\(\) first$"
    with refused(model, rf"^adapter 'a' is merged{unmerge}"):
        model.delete_adapter("a")
    with refused(model, rf"^adapter 'a' is merged{unmerge}"):
        model.add_adapter("c", PeanutConfig(target_modules=["q_proj"]))
    with refused(model, rf"^adapter_names given while 'a' is merged{unmerge}"):
        model(IDS, adapter_names=["a", "b"])
    with refused(model, rf"^a state dict for a model in which adapter 'a' is merged{unmerge}"):
        model.load_state_dict(model.state_dict())
    model.set_adapter(["b", "a"])  # both act: nothing is switched off
    assert model.merged_adapters == ["a"]
    with pytest.warns(UserWarning, match=r"adapter 'a' was merged, and is unmerged so that \['b'\] can be active"):
        model.set_adapter("b")
    assert (model.merged_adapters, model.active_adapters) == ([], ["b"])


def test_a_state_dict_taken_while_merged_holds_the_weights_before(tiny_llama: Build) -> None:
    model = adapted(tiny_llama())
    before, expected = frozen_state(model), logits(model)
    model.merge_adapter()
    taken = model.state_dict()
    assert taken.keys() == before.keys()
    assert all(same_bits(value, before[key]) for key, value in taken.items())
    other = adapted(tiny_llama())
    other.load_state_dict(taken)
    assert same_bits(logits(other), expected)


@pytest.mark.parametrize("already", [False, True], ids=["", "after another merge"])
def test_a_merge_that_would_not_be_finite_leaves_nothing_merged(already: bool, tiny_llama: Build) -> None:
    model = adapted(tiny_llama().half(), "q_proj", name="good", method=LoraConfig)
    model.add_adapter("bad", LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]))
    model.set_adapter(["good", "bad"])
    if already:
        model.merge_adapter(["good"])
    expected = logits(model)
    with torch.no_grad():
        for _, parameter in model.adapters.parameters("bad"):
            parameter.fill_(300.0)  # the product is finite in float32 and not in float16
    weights = [layer.base_layer.weight.clone() for _, layer in model.adapters.layers()]
    with refused(
        model, r"the merged weight holds values that are not finite; expected finite values; check the adapter's"
    ):
        model.merge_adapter(["good", "bad"])
    assert model.merged_adapters == (["good"] if already else [])
    assert all(
        same_bits(layer.base_layer.weight, w) for (_, layer), w in zip(model.adapters.layers(), weights, strict=True)
    )
    with pytest.raises(PeanutError, match="not finite"):
        model.merge_and_unload(adapter_names=["bad"])
    assert model.active_adapters == ["good", "bad"]
    model.unmerge_adapter()
    model.delete_adapter("bad")
    assert distance(logits(model), expected) < 0.02


def test_merged_for_good_with_the_head_of_the_adapter_that_was_chosen(tiny_bert: Build) -> None:
    model = get_peft_model(tiny_bert(), PeanutConfig(r=4, task_type="SEQ_CLS"), "a")
    model.add_adapter("b", PeanutConfig(r=4, task_type="SEQ_CLS"))
    randomised(model).eval()
    model.set_adapter("b")
    expected = logits(model)
    model.set_adapter("a")
    with refused(
        model, r"^adapters 'a' and 'b' each have a trained copy of 'classifier'; expected one such adapter at a time"
    ):
        model.merge_adapter(["b"])
    merged = model.merge_and_unload(adapter_names=["b"])
    assert distance(logits(merged), expected) < 1e-5


def test_a_bfloat16_model_stays_in_bfloat16(tiny_llama: Build) -> None:
    model = adapted(tiny_llama().bfloat16())
    expected = logits(model)
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}
    assert distance(logits(merged), expected) < 0.05


def test_a_model_that_is_unloaded_can_be_adapted_and_merged_again(tiny_llama: Build) -> None:
    model = adapted(tiny_llama())
    once = model.merge_and_unload()
    weights = frozen_state(once)
    twice = adapted(once, method=LoraConfig)
    assert_looks(twice.unload(), (*look_of(tiny_llama().requires_grad_(False))[:2], weights))
    again = adapted(once, method=LoraConfig)
    expected = logits(again)
    assert distance(logits(again.merge_and_unload()), expected) < 1e-5


def test_a_merge_that_the_rest_could_not_complete_is_refused(tiny_llama: Build) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]), "adds")
    model.add_adapter("turns", OFTConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("turns too", OFTConfig(r=8, target_modules=["q_proj"]))
    randomised(model, scale=0.1).eval()
    ids = torch.arange(12).reshape(2, 6)
    model.set_adapter(["adds", "turns"])
    together = model(ids).logits
    with refused(model, "adds to the weight would be merged beside an unmerged one that rotates its input"):
        model.merge_adapter(["adds"])
    model.merge_adapter(["turns"])
    assert distance(model(ids).logits, together) < 1e-5
    with pytest.warns(UserWarning, match="adapter 'turns' was merged, and is unmerged so that"):
        model.set_adapter(["turns too", "turns"])
    model.set_adapter("turns")
    model.merge_adapter()
    model.set_adapter(["turns", "turns too"])
    assert model.merged_adapters == ["turns"]
    expected = model(ids).logits
    model.unmerge_adapter()
    assert distance(model(ids).logits, expected) < 1e-5
    model.merge_adapter(["turns", "turns too"])
    assert distance(model(ids).logits, expected) < 1e-5


@pytest.mark.filterwarnings("ignore:'shared' shares its weight with")
@pytest.mark.parametrize("kind", ["T5", "UMT5", "SwitchTransformers"])
@pytest.mark.parametrize(
    ("names", "whole"),
    [
        (["shared"], True),
        *((names, whole) for names in (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]) for whole in (0, 1)),
    ],
)
def test_tied_weights_that_differ_once_merged_are_all_saved(
    names: list[str], whole: bool, kind: str, tmp_path: Path
) -> None:
    """T5 ties four, of which "shared" is never called; its siblings scale their output if the config says tied."""
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    sizes |= {"num_decoder_layers": 1, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    model_class = getattr(hf, f"{kind}ForConditionalGeneration")
    base = model_class(getattr(hf, f"{kind}Config")(**sizes))
    options = {"modules_to_save": names, "target_modules": ["q"]} if whole else {"target_modules": names}
    model = randomised(get_peft_model(base, LoraConfig(r=2, **options))).eval()
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids).logits
        merged = model.merge_and_unload()
        assert distance(merged(input_ids=ids, decoder_input_ids=ids).logits, expected) < 1e-5
        merged.save_pretrained(tmp_path)
        loaded = model_class.from_pretrained(tmp_path).eval()
        assert distance(loaded(input_ids=ids, decoder_input_ids=ids).logits, expected) < 1e-5


@pytest.mark.parametrize("head", [None, nn.Identity()])
def test_a_head_that_was_taken_off_is_no_tie(head: nn.Module | None, tiny_llama: Build) -> None:
    base: Any = tiny_llama(tie_word_embeddings=True)
    del base.lm_head
    if head is not None:
        base.lm_head = head
    model = randomised(get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))).eval()
    ids = torch.arange(12).reshape(2, 6)
    expected = model.get_base_model().model(ids).last_hidden_state
    merged: Any = model.merge_and_unload()
    assert distance(merged.model(ids).last_hidden_state, expected) < 1e-5
    assert merged.config.tie_word_embeddings
