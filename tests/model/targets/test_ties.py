"""Layers that are tied in the base have one adapter where the config asks for it; files are PEFT's, both ways."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor

import peanut
from peanut import AdaLoraConfig, LoraConfig, PeanutError, PeftModel, get_peft_model
from peanut.utils.hotswap import hotswap_adapter

from ...support import (
    PEER_WARNINGS,
    distance,
    gradients,
    peer_loaded,
    peer_model,
    randomised,
    refused,
    same_bits,
    scattered,
)

pytestmark = PEER_WARNINGS
Build = Callable[..., hf.PreTrainedModel]
IDS = torch.arange(3, 15).reshape(2, 6)
WHAT: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "pattern": {"target_modules": r".*(lm_head|q_proj)"},
    "pissa": {"target_modules": ["embed_tokens"], "init_lora_weights": "pissa"},
    "whole head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "whole embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


def config_of(what: str) -> LoraConfig:
    return LoraConfig(r=4, ensure_weight_tying=True, task_type="CAUSAL_LM", **WHAT[what])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("what", WHAT)
def test_tied_layers_have_one_adapter(what: str, tiny_llama: Build, tmp_path: Path) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    expected = logits(base)
    model = get_peft_model(base, config_of(what)).eval()
    assert distance(logits(model), expected) < 1e-5
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(gradients(model))
    assert set(peanut.get_model_status(model).requires_grad.values()) == {True}
    randomised(model.eval())
    inner, rows = model.get_base_model(), torch.arange(101)
    changed = inner.model.embed_tokens(rows)
    assert distance(changed, tiny_llama(tie_word_embeddings=True).model.embed_tokens(rows)) > 0.05
    assert distance(inner.lm_head(torch.eye(32)).T, changed) < 1e-5

    assert same_bits(logits(copy.deepcopy(model)), logits(model))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path)
    assert distance(logits(again), logits(model)) < (1e-5 if what == "pissa" else 1e-12)
    assert distance(peer_loaded(tiny_llama(tie_word_embeddings=True), tmp_path)(IDS).logits, logits(model)) < 1e-5
    merged = again.merge_and_unload()
    assert distance(logits(merged), logits(model)) < 1e-5
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings


@pytest.mark.parametrize("what", [what for what in WHAT if what != "pissa"])
def test_files_of_the_peer(what: str, tiny_llama: Build, tmp_path: Path) -> None:
    theirs = peer_model(tiny_llama(tie_word_embeddings=True), config_of(what))
    scattered([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path)
    assert distance(logits(model), theirs(IDS).logits) < 1e-5
    inner = model.get_base_model()
    assert distance(inner.lm_head(torch.eye(32)).T, inner.model.embed_tokens(torch.arange(101))) < 1e-5


@pytest.mark.parametrize("trained", [False, True])
def test_a_file_whose_tied_tensors_went_apart_is_read_as_it_is(
    trained: bool, tiny_llama: Build, tmp_path: Path
) -> None:
    theirs = peer_model(tiny_llama(tie_word_embeddings=True), config_of("head")).double().float()  # a move unties there
    scattered([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path / "a")
    with pytest.warns(UserWarning, match=r"holds other tensors of 'lm_head' than of a layer that it is tied to"):
        model = PeftModel.from_pretrained(
            tiny_llama(tie_word_embeddings=True), tmp_path / "a", is_trainable=trained
        ).eval()
    assert distance(logits(model), theirs(IDS).logits) < 1e-5
    names = {name.split("model.")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert ("lm_head.lora_A.default.weight" in names) == trained
    model.save_pretrained(tmp_path / "b")
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in "ab")
    assert "base_model.model.lm_head.lora_A.weight" in before
    assert all(same_bits(after[key], value) for key, value in before.items())


def test_a_live_model_of_the_peer_and_back(tiny_llama: Build) -> None:
    theirs = peer_model(tiny_llama(tie_word_embeddings=True), config_of("head"))
    scattered([p for p in theirs.parameters() if p.requires_grad])
    expected = theirs(IDS).logits.detach()
    model = peanut.from_peft(theirs)
    assert same_bits(logits(model), expected)
    assert model.get_nb_trainable_parameters()[0] == 4 * (101 + 32)
    assert same_bits(logits(peanut.to_peft(model)), expected)


def test_a_plain_state_dict_of_the_peer(tiny_llama: Build) -> None:
    theirs = peer_model(tiny_llama(tie_word_embeddings=True), config_of("head"))
    scattered([p for p in theirs.parameters() if p.requires_grad])
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), config_of("head")).eval()
    assert not any(model.load_state_dict(theirs.state_dict()))
    assert distance(logits(model), theirs(IDS).logits) < 1e-5


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    def tiny_t5(**options: Any) -> Any:
        torch.manual_seed(0)
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": 101}
        return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0, **options)).eval()

    config = LoraConfig(r=4, target_modules=["lm_head"], ensure_weight_tying=True)
    model = randomised(get_peft_model(tiny_t5(tie_word_embeddings=True), config)).eval()
    inner, rows = model.get_base_model(), torch.arange(20)
    found = [part(rows) for part in (inner.shared, inner.encoder.embed_tokens, inner.decoder.embed_tokens)]
    assert all(same_bits(each, found[0]) for each in found)
    assert distance(inner.lm_head(torch.eye(32))[:, :20].T, found[0]) < 1e-5
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_t5(tie_word_embeddings=True), tmp_path)
    with torch.no_grad():
        assert same_bits(again(input_ids=IDS, labels=IDS).logits, model(input_ids=IDS, labels=IDS).logits)


def test_it_is_said_where_nothing_is_tied(tiny_llama: Build) -> None:
    with pytest.warns(UserWarning, match=r"ensure_weight_tying=True, and no two layers of this LlamaForCausalLM are"):
        model = get_peft_model(tiny_llama(tie_word_embeddings=False), config_of("head"))
    assert {place.path for place in model.adapters.places()} == {"lm_head"}
    with pytest.warns(UserWarning, match=r"changes none of the layers that are tied \('model.embed_tokens', 'lm_head'"):
        get_peft_model(
            tiny_llama(tie_word_embeddings=True), LoraConfig(target_modules=["q_proj"], ensure_weight_tying=True)
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LoraConfig(use_dora=True),
            r"with 'lm_head', which is tied to 'model.embed_tokens', and LORA \(lora_magnitude",
        ),
        (LoraConfig(lora_bias=True), r", and LORA \(lora_B.bias\); expected a plain LORA"),
        (AdaLoraConfig(), r", and ADALORA \("),
        (LoraConfig(rank_pattern={"lm_head": 2}), "which are tied, with different entries in rank_pattern or alpha_pa"),
    ],
    ids=["DoRA", "bias", "AdaLoRA", "ranks"],
)
def test_what_has_no_form_on_both_is_refused(config: Any, message: str, tiny_llama: Build) -> None:
    config.ensure_weight_tying, config.target_modules = True, ["lm_head"]
    base = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(PeanutError, match=message):
        get_peft_model(base, config)
    assert type(base.lm_head) is torch.nn.Linear


# Tokens of tied embeddings


@pytest.mark.parametrize("tying", [False, True])
def test_tokens_named_of_both(tying: bool, tiny_llama: Build, tmp_path: Path) -> None:
    same = LoraConfig(
        target_modules=["q_proj"],
        trainable_token_indices={"lm_head": [4, 3], "embed_tokens": [4, 3]},
        ensure_weight_tying=tying,
    )
    model = randomised(get_peft_model(tiny_llama(tie_word_embeddings=True), same)).eval()
    embedding, head = model.get_base_model().model.embed_tokens, model.get_base_model().lm_head
    assert head.token_adapter.trainable_tokens_delta is embedding.token_adapter.trainable_tokens_delta
    assert distance(head(torch.eye(32)).T, embedding(torch.arange(101))) < 1e-5
    apart = copy.deepcopy(same)
    apart.trainable_token_indices = {"lm_head": [1, 2], "embed_tokens": [4, 3]}
    base = tiny_llama(tie_word_embeddings=True)
    if tying:
        with pytest.raises(
            PeanutError, match=r"with different tokens of 'lm_head' and 'model.embed_tokens', which are"
        ):
            get_peft_model(base, apart)
        return
    model = randomised(get_peft_model(base, apart)).eval()
    embedding, head = model.get_base_model().model.embed_tokens, model.get_base_model().lm_head
    assert (head.token_indices["default"], embedding.token_indices["default"]) == ([1, 2], [4, 3])
    table = tiny_llama(tie_word_embeddings=True).lm_head.weight
    assert (head(torch.eye(32)).T - table).abs().amax(1).gt(1e-5).nonzero().flatten().tolist() == [1, 2]
    assert (embedding(torch.arange(101)) - table).abs().amax(1).gt(1e-5).nonzero().flatten().tolist() == [3, 4]
    model.save_pretrained(tmp_path)
    assert same_bits(logits(PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path)), logits(model))
    assert distance(peer_loaded(tiny_llama(tie_word_embeddings=True), tmp_path)(IDS).logits, logits(model)) < 1e-5


def test_tokens_of_what_is_trained_whole_are_refused(tiny_llama: Build) -> None:
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1], modules_to_save=["embed_tokens"])
    with pytest.raises(
        PeanutError, match=r"^'model.embed_tokens' is trained whole \(modules_to_save\) and by TRAINABL"
    ):
        get_peft_model(tiny_llama(), config)


class Own(torch.nn.Module):
    """A model of no library that says what its embedding is."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.out = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.out(self.emb(ids))
        return found

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.emb


def test_what_scripts_of_the_peer_ask_of_trained_tokens() -> None:
    from peanut.tuners.trainable_tokens.layer import TrainableTokensLayer

    from peanut.utils import TrainableTokensWrapper

    alone = get_peft_model(Own(), peanut.TrainableTokensConfig(token_indices=[1, 3])).get_base_model()
    base = Own()
    beside = get_peft_model(base, LoraConfig(target_modules=["out"], trainable_token_indices=[1, 3])).get_base_model()
    assert isinstance(alone.emb, TrainableTokensLayer)
    assert not isinstance(alone.emb, TrainableTokensWrapper)
    assert isinstance(beside.emb, TrainableTokensWrapper)
    assert not hasattr(beside.out, "token_adapter")
    assert beside.emb.original_module is beside.emb.base_layer
    assert beside.emb.adapter_layer_names == ("token_adapter.trainable_tokens_delta",)
    assert beside.emb.other_param_names == ("token_adapter.trainable_tokens_ids",)
    for layer in (alone.emb, beside.emb.token_adapter):
        rows = layer.base_layer.weight[[1, 3]]
        assert same_bits(layer.trainable_tokens_delta["default"], rows)
        assert same_bits(layer.trainable_tokens_original.default, rows)
        assert (list(layer.trainable_tokens_original), layer.token_indices["default"]) == (["default"], [1, 3])


def test_scales_and_swaps_of_tied_layers(tiny_llama: Build, tmp_path: Path) -> None:
    settings: Any = {"r": 2, "target_modules": ["embed_tokens", "lm_head"], "init_lora_weights": False}
    build = partial(tiny_llama, tie_word_embeddings=True)
    model = get_peft_model(build(), LoraConfig(ensure_weight_tying=True, **settings)).eval()
    get_peft_model(build(), LoraConfig(**settings)).save_pretrained(tmp_path)
    with refused(model, r"swapped into 'default', which ties them; expected one with ensure_weight_tying=True"):
        hotswap_adapter(model, tmp_path, "default")
    head: Any = model.get_base_model().lm_head
    head.set_scale("default", 2.0)
    expected = logits(model)
    assert distance(logits(model.merge_and_unload()), expected) < 1e-5
