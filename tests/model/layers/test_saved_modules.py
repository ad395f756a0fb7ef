"""Heads and other modules that are trained whole beside an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from peanut import LoraConfig, PeanutConfig, PeftModel, get_peft_model
from peanut.model.layers.saved_modules import SavedModule

from ...support import directed, distance, frozen_state, one_thread, randomised, refused, same_bits  # noqa: F401

Build = Callable[..., hf.PreTrainedModel]
IDS = torch.arange(3, 15).reshape(2, 6)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def model(tiny_bert: Build) -> PeftModel:
    """Adapters a and b with a head each, c without; a is active."""
    model = get_peft_model(tiny_bert(), PeanutConfig(r=4, task_type="SEQ_CLS"), "a")
    model.add_adapter("b", LoraConfig(r=4, task_type="SEQ_CLS"))
    model.add_adapter("c", LoraConfig(r=4))
    return randomised(model).eval()


def test_the_copy_of_the_active_adapter_answers(model: PeftModel, tiny_bert: Build) -> None:
    base = model.get_base_model()
    head = base.classifier
    assert isinstance(head, SavedModule)
    outputs = {}
    for name in "abc":
        model.set_adapter(name)
        outputs[name] = logits(model)
        body = base.bert(IDS).pooler_output
        own = head.original_module if name == "c" else head.modules_to_save[name]
        assert same_bits(outputs[name], own(body))
    assert min(distance(outputs[x], outputs[y]) for x, y in ("ab", "bc", "ac")) > 0.05
    assert same_bits(head.original_module.weight, tiny_bert().classifier.weight)
    model.set_adapter(["a", "c"])
    assert same_bits(head(body), head.modules_to_save["a"](body))
    with model.disable_adapter():
        assert same_bits(logits(model), logits(tiny_bert()))


def test_only_the_active_copy_is_trained(model: PeftModel) -> None:
    head = model.get_base_model().classifier
    for name in "abc":
        model.set_adapter(name)
        assert not any(parameter.requires_grad for parameter in head.original_module.parameters())
        for other in "ab":
            assert {p.requires_grad for p in head.modules_to_save[other].parameters()} == {other == name}
    model.set_adapter("a")
    before = frozen_state(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not same_bits(value, before[key])}
    assert {key.replace("base_model.model.classifier.", "") for key in moved if "classifier" in key} == {
        "modules_to_save.a.weight",
        "modules_to_save.a.bias",
    }
    assert all(".a." in key for key in moved if "classifier" not in key)


def test_two_trained_copies_cannot_answer_at_once(model: PeftModel) -> None:
    with refused(
        model,
        r"^adapters 'a' and 'b' each have a trained copy of 'classifier'; expected one such adapter at a time; ",
    ):
        model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"]


def test_each_sample_through_its_own_head(model: PeftModel, tiny_bert: Build) -> None:
    alone = {}
    for name in "abc":
        model.set_adapter(name)
        alone[name] = logits(model)
    alone["__base__"] = logits(tiny_bert())
    for names in (["a", "b"], ["b", "a"], ["c", "__base__"], ["b", "b"]):
        mixed = model(IDS, adapter_names=names).logits
        expected = torch.stack([alone[name][row] for row, name in enumerate(names)])
        assert distance(mixed, expected) < 1e-5


def test_heads_of_other_sizes_in_one_batch_are_refused(model: PeftModel) -> None:
    head = model.get_base_model().classifier
    head.modules_to_save["b"] = nn.Linear(32, 3)
    with refused(
        model,
        r"^the adapters at 'classifier' give shapes \(2,\) and \(3,\); expected the same shape for every sample of a ",
    ):
        model(IDS, adapter_names=["a", "b"])
    assert model(IDS, adapter_names=["b", "b"]).logits.shape == (2, 3)


def test_a_head_looks_like_the_module_that_answers(model: PeftModel) -> None:
    head = model.get_base_model().classifier
    assert (head.in_features, head.out_features) == (32, 2)
    assert head.weight is head.modules_to_save["a"].weight
    model.set_adapter("c")
    assert head.weight is head.original_module.weight
    with pytest.raises(AttributeError, match="no_such"):
        _ = head.no_such


def test_deleting_the_last_adapter_with_a_copy_puts_the_original_back(model: PeftModel, tiny_bert: Build) -> None:
    base = model.get_base_model()
    original = base.classifier.original_module
    model.set_adapter("b")
    model.delete_adapter("a")
    assert isinstance(base.classifier, SavedModule)
    assert not any("modules_to_save.a" in key for key in base.state_dict())
    model.set_adapter([name for name in model.peft_config if name != "b"])
    model.delete_adapter("b")
    assert base.classifier is original
    assert same_bits(original.weight, tiny_bert().classifier.weight)


def test_a_module_within_one_that_is_saved_is_saved_once(tmp_path: Path) -> None:
    config = hf.RobertaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=20
    )

    def base() -> hf.PreTrainedModel:
        torch.manual_seed(0)
        return hf.RobertaForSequenceClassification(config).eval()

    options = LoraConfig(task_type="SEQ_CLS", modules_to_save=["classifier.dense", "classifier"])
    model = randomised(get_peft_model(base(), options)).eval()
    assert [path for path, _ in model.adapters.saved_modules()] == ["classifier"]
    model.save_pretrained(tmp_path)
    assert same_bits(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(model))


def test_a_saved_module_that_holds_one_tensor_twice(tiny_bert: Build, tmp_path: Path) -> None:
    """In BERT's language-model head the bias is a parameter of two modules, which safetensors refuses to write."""
    model = get_peft_model(tiny_bert(hf.BertForMaskedLM), PeanutConfig(r=4, modules_to_save=["cls"]))
    head = model.get_base_model().cls.modules_to_save["default"].predictions
    assert head.bias is head.decoder.bias
    randomised(model).eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_bert(hf.BertForMaskedLM), tmp_path)
    assert same_bits(logits(again), logits(model))


def test_an_embedding_trained_whole(tiny_llama: Build, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, modules_to_save=["embed_tokens", "lm_head"]))
    randomised(model).eval()
    expected = logits(model)
    assert distance(expected, logits(tiny_llama())) > 0.05
    model.save_pretrained(tmp_path)
    assert same_bits(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), expected)
    assert distance(logits(model.merge_and_unload()), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_what_is_trained_on_a_half_precision_base_is_kept_in_float32(
    name: str, dtype: torch.dtype, tiny_llama: Build, tmp_path: Path
) -> None:
    config = LoraConfig(r=4, modules_to_save=[name], target_modules=["q_proj"])
    model = randomised(get_peft_model(tiny_llama().to(dtype), config)).eval()
    exact = randomised(get_peft_model(tiny_llama().to(dtype).float(), config)).eval()
    output = model(IDS).logits
    assert output.dtype == dtype
    assert distance(output, exact(IDS).logits) < 0.1  # what two blocks in half precision make of it
    directed(output).backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 == parameter.grad.dtype for parameter in trained)
    model.save_pretrained(tmp_path)
    assert same_bits(logits(PeftModel.from_pretrained(tiny_llama().to(dtype), tmp_path)), logits(model))
    merged = model.merge_and_unload()
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert distance(logits(merged), output) < 0.1


def test_a_head_in_the_base_s_own_dtype_if_asked(tiny_bert: Build) -> None:
    config = LoraConfig(r=4, task_type="SEQ_CLS")
    model = get_peft_model(tiny_bert().to(torch.bfloat16), config, autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
