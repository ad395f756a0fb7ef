"""An adapter knows the base it was trained on, in any precision, and refuses another."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from peanut import LoraConfig, PeanutConfig, PeanutError, PeftModel, get_peft_model
from peanut.model.checkpoints.digests import digest_of
from peanut.model.checkpoints.fingerprint import fingerprint
from peanut.protocols import METHODS

from ...support import LAYERS, Net, one_thread, randomised, refused, same_bits  # noqa: F401

Build = Callable[..., hf.PreTrainedModel]
IDS = torch.arange(3, 15).reshape(2, 6)
EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}


def adapted(base: Any, **options: Any) -> PeftModel:
    return randomised(get_peft_model(base, PeanutConfig(**{"target_modules": ["q_proj"], "r": 4} | options))).eval()


def assert_loads(base: Any, folder: Path, expected: PeftModel) -> None:
    """The adapter in the folder is loaded on ``base``, with the numbers that it has in ``expected``."""
    loaded, saved = (
        dict(model.adapters.parameters("default")) for model in (PeftModel.from_pretrained(base, folder), expected)
    )
    assert loaded.keys() == saved.keys() > set()
    assert all(torch.equal(value.float(), saved[key].float()) for key, value in loaded.items())


def values(model: PeftModel) -> dict[str, list[float]]:
    return json.loads(fingerprint(model.adapters, "default"))["values"]


def test_it_holds_values_of_every_parameter_of_the_base(tiny_llama: Build) -> None:
    base = tiny_llama()
    weights = {name: weight.detach().flatten() for name, weight in base.named_parameters()}
    found = values(adapted(base, target_modules="all-linear"))
    assert found.keys() == weights.keys() > {"lm_head.weight"}
    for path, (size, rows, *own) in found.items():
        assert size == weights[path].numel()
        assert (rows, len(own)) == ((101, 12) if path in EMBEDDINGS else (0, 4))
        assert own[0] == pytest.approx(weights[path][(size - 1) % 3].item(), rel=1e-4)
        assert own[3] == own[-1] == pytest.approx(weights[path][-1].item(), rel=1e-4)


@pytest.mark.parametrize("kind", METHODS["LORA"].kinds)
def test_every_kind_of_layer_has_one_and_a_merge_does_not_change_it(kind: str) -> None:
    model = randomised(get_peft_model(Net(next(iter(LAYERS[kind].values()))()), LoraConfig(target_modules=["layer"])))
    before = fingerprint(model.adapters, "default")
    model.merge_adapter()
    assert fingerprint(model.adapters, "default") == before
    assert len(values(model)["layer.weight"]) == 6


def test_the_base_in_other_precisions_is_the_base(tiny_llama: Build, tmp_path: Path) -> None:
    for name, dtype in (("wide", torch.float32), ("half", torch.bfloat16)):
        model = adapted(tiny_llama().to(dtype))
        model.save_pretrained(tmp_path / name)
        for other in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert_loads(tiny_llama().to(other), tmp_path / name, model)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "meta"])
def test_another_base_is_refused_and_both_are_named(low_cpu_mem_usage: bool, tiny_llama: Build, tmp_path: Path) -> None:
    trained_on = tiny_llama()
    trained_on.config._name_or_path = "the/first"
    model = adapted(trained_on)
    model.save_pretrained(tmp_path)
    other = tiny_llama()
    other.config._name_or_path = "the/second"
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight.mul_(1.05)
    message = (
        r"^the adapter was trained on 'the/first' \(weights [0-9a-f]{8}\) and this base is 'the/second' "
        r"\(weights [0-9a-f]{8}\): 'model.layers.1.self_attn.q_proj.weight' differs; "
        r"expected the base that it was trained on; load that one, or pass check_base=False$"
    )
    with refused(other, message):
        PeftModel.from_pretrained(other, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded = PeftModel.from_pretrained(other, tmp_path, check_base=False, low_cpu_mem_usage=low_cpu_mem_usage)
    with refused(loaded, message):
        loaded.load_adapter(tmp_path, "b", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.load_adapter(tmp_path, "b", check_base=False)
    loaded.set_adapter("b")
    assert not same_bits(loaded(IDS).logits, model(IDS).logits)


def every_weight() -> list[str]:
    config = hf.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1)
    with torch.device("meta"):
        return [name for name, _ in hf.LlamaForCausalLM(config).named_parameters()]


@pytest.mark.parametrize("name", every_weight())
def test_a_change_of_any_weight_of_the_base_is_found(name: str, tiny_llama: Build, tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path)
    base = tiny_llama()
    with torch.no_grad():
        base.get_parameter(name).mul_(1.05)
    with refused(base, rf"'{name}' differs; expected the base that it was trained on; "):
        PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (7,), (64,), (3, 1), (5, 6), (4, 8), (2, 3, 5), ()])
def test_a_change_of_any_one_entry_is_found(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    value = torch.randn(shape).to(dtype)
    before, places = digest_of(value), range(value.numel())
    assert digest_of(value.clone()) == digest_of(torch.stack([value, value])[1]) == before
    assert digest_of(value.to(torch.float64).to(dtype)) == before
    for place in places:
        other = value.clone()
        other.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]).view(-1)[place] ^= 1
        assert digest_of(other) != before
    assert len(places) > 0
    if len(shape) > 0 and shape[0] > 1:
        assert digest_of(value.roll(1, 0)) != before


def test_one_entry_of_a_weight_that_no_sample_is_taken_of(tiny_llama: Build, tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        base = tiny_llama()
        with torch.no_grad():
            base.get_parameter(name).view(-1)[1] += 1
        with refused(base, rf"'{name}' differs; expected the base that it was trained on; "):
            PeftModel.from_pretrained(base, tmp_path)
    assert_loads(tiny_llama(), tmp_path, model)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_base_that_was_rounded_is_the_base_and_a_change_in_it_is_one(
    half: torch.dtype, tiny_llama: Build, tmp_path: Path
) -> None:
    """As it is read in half precision and computes in float32, then or now."""
    model, rounded = adapted(tiny_llama()), adapted(tiny_llama().to(half).float())
    model.save_pretrained(tmp_path / "wide")
    rounded.save_pretrained(tmp_path / "rounded")
    for base in (tiny_llama(), tiny_llama().to(half).float(), tiny_llama().to(half), tiny_llama().double()):
        for folder, expected in (("wide", model), ("rounded", rounded)):
            assert_loads(copy.deepcopy(base), tmp_path / folder, expected)
    for base in (tiny_llama(), tiny_llama().to(half).float(), tiny_llama().double()):
        with torch.no_grad():
            base.lm_head.weight[7, 3] += 1
        with refused(base, r"'lm_head.weight' differs"):
            PeftModel.from_pretrained(base, tmp_path / "rounded")


def test_statistics_that_followed_the_training_are_a_warning_unless_they_are_saved(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))

    x = torch.randn(4, 2, 3, 3)
    for folder, modules, mode in (("moved", None, True), ("kept", None, False), ("saved", ["1"], True)):
        model = randomised(get_peft_model(base(), LoraConfig(target_modules=["0"], modules_to_save=modules)))
        model.train(mode)(x)
        model.eval().save_pretrained(tmp_path / folder)
        if folder == "moved":
            with pytest.warns(UserWarning, match=r"^'1.running_mean' is another than when the adapter was saved, as "):
                PeftModel.from_pretrained(base(), tmp_path / folder)
        else:
            assert same_bits(PeftModel.from_pretrained(base(), tmp_path / folder)(x), model(x))


def test_new_rows_of_an_embedding_are_found_and_rows_of_this_base_alone_are_not(
    tiny_llama: Build, tmp_path: Path
) -> None:
    def resized(seed: int, rows: int = 104) -> Any:
        base = tiny_llama()
        torch.manual_seed(seed)
        base.resize_token_embeddings(rows, mean_resizing=False)
        return base

    model = adapted(resized(1))
    model.save_pretrained(tmp_path / "resized", save_embedding_layers=False)
    assert_loads(resized(1), tmp_path / "resized", model)
    hint = "save the adapter with save_embedding_layers=True, or pass"
    for other in (resized(2), tiny_llama()):
        with refused(other, rf"'lm_head.weight' and 1 more differ; .*; load that one, {hint}"):
            PeftModel.from_pretrained(other, tmp_path / "resized")
    tiny_llama().save_pretrained(tmp_path / "base")
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(base)
    model.save_pretrained(tmp_path / "plain")
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(104, mean_resizing=False)
    assert_loads(base, tmp_path / "plain", model)  # as scripts pad a vocabulary after training


def test_a_base_with_rows_that_were_not_added_since_is_a_warning(tiny_llama: Build, tmp_path: Path) -> None:
    base = tiny_llama()
    base.resize_token_embeddings(70)
    adapted(base).save_pretrained(tmp_path)
    message = (
        "^'lm_head.weight' has 101 rows here and had 70 when the adapter was trained, so it answers over other tokens; "
    )
    with pytest.warns(UserWarning, match=message):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    base = tiny_llama()
    base.resize_token_embeddings(70)
    assert PeftModel.from_pretrained(base, tmp_path)(IDS).logits.shape[-1] == 70


def test_a_base_with_rows_that_were_taken_away_before_training_is_refused(tiny_llama: Build, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70)
    model = adapted(base)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    base = hf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with refused(base, r"has 101 rows here and had 70 when .* shrunk; expected 70; call resize_token_embeddings\(70\)"):
        PeftModel.from_pretrained(base, tmp_path / "a")
    base.resize_token_embeddings(70)
    assert_loads(base, tmp_path / "a", model)


def test_a_head_that_is_trained_whole_may_differ_and_one_that_is_not_may_not(tiny_bert: Build, tmp_path: Path) -> None:
    models = {}
    for folder, task in (("head", "SEQ_CLS"), ("none", None)):
        models[folder] = adapted(tiny_bert(), target_modules=["query"], task_type=task)
        models[folder].save_pretrained(tmp_path / folder)
    base = tiny_bert()
    torch.nn.init.normal_(base.classifier.weight)
    with refused(base, "'classifier.weight' differs"):
        PeftModel.from_pretrained(base, tmp_path / "none")
    loaded = PeftModel.from_pretrained(base, tmp_path / "head")
    assert same_bits(loaded(IDS).logits, models["head"](IDS).logits)


def test_what_the_base_has_no_file_for_is_a_warning_inside_it_and_refused_on_top(
    tiny_bert: Build, tmp_path: Path
) -> None:
    tiny_bert(hf.BertForMaskedLM).save_pretrained(tmp_path / "base")  # it has no pooler
    torch.manual_seed(1)
    model = adapted(hf.BertModel.from_pretrained(tmp_path / "base"), target_modules=["query"])
    model.save_pretrained(tmp_path / "inside")
    torch.manual_seed(2)
    with pytest.warns(UserWarning, match=r"^'pooler.dense.weight' was made at random, as the base's files lack it"):
        PeftModel.from_pretrained(hf.BertModel.from_pretrained(tmp_path / "base"), tmp_path / "inside")
    pooled = adapted(hf.BertModel.from_pretrained(tmp_path / "base"), target_modules=["pooler.dense"])
    pooled.save_pretrained(tmp_path / "adapted")
    base = hf.BertModel.from_pretrained(tmp_path / "base")
    with refused(base, "'pooler.dense.weight' differs"):  # the adapter uses it
        PeftModel.from_pretrained(base, tmp_path / "adapted")
    base = hf.BertModel.from_pretrained(tmp_path / "base")
    base.encoder.layer[0].output.dense.weight = nn.Parameter(torch.randn(32, 64))  # no part of it is without a file
    with refused(base, r"'encoder.layer.0.output.dense.weight'"):
        PeftModel.from_pretrained(base, tmp_path / "inside")
    classifier = hf.BertForSequenceClassification.from_pretrained
    adapted(classifier(tmp_path / "base"), target_modules=["query"]).save_pretrained(tmp_path / "top")
    with pytest.raises(PeanutError, match=r"'classifier.weight' differs"):
        PeftModel.from_pretrained(classifier(tmp_path / "base"), tmp_path / "top")


@pytest.mark.filterwarnings("ignore:adapter_config.json in .* was saved by this library and")
@pytest.mark.parametrize("factor", [1, 2])
def test_the_samples_of_older_files_are_still_compared(factor: float, tiny_llama: Build, tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    old = {}
    for name, layer in model.adapters.layers("default"):
        flat = layer.frozen.weight.detach().flatten()
        old[name] = [flat[round(place * (len(flat) - 1) / 15)].item() for place in range(16)]
    save_file(load_file(path), path, metadata={"peanut_base": json.dumps(old)})
    base = tiny_llama()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.mul_(factor)
        base.lm_head.weight.mul_(2)  # which they do not see
    if factor == 1:
        assert_loads(base, tmp_path, model)
    else:
        with refused(base, r"'model.layers.0.self_attn.q_proj' differs"):
            PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.filterwarnings("ignore:adapter_config.json in .* was saved by this library and")
def test_files_without_one_load_on_any_base(tiny_llama: Build, tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path), path)  # as the peer writes it
    base = tiny_llama()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.mul_(2)
    assert_loads(base, tmp_path, model)


def test_a_base_without_storage_has_none() -> None:
    with torch.device("meta"):
        model = get_peft_model(Net(torch.nn.Linear(3, 4)), PeanutConfig(target_modules=["layer"]))
    assert fingerprint(model.adapters, "default") is None


def test_an_embedding_that_lookups_shorten_is_the_same_base_after_them(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(16, 8, max_norm=1.0), nn.Linear(8, 8))

    ids = torch.arange(16)
    model = get_peft_model(base(), LoraConfig(r=2, target_modules=["1"], init_lora_weights=False))
    expected = model(ids)
    model.save_pretrained(tmp_path)
    assert same_bits(PeftModel.from_pretrained(base(), tmp_path)(ids), expected)
