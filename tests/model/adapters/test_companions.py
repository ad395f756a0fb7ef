"""What a method brings along: biases of other layers, rows of an embedding, and a head tied to that embedding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

from peanut import (
    AdaLoraConfig,
    BOFTConfig,
    C3AConfig,
    FourierFTConfig,
    HRAConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    RandLoraConfig,
    TrainableTokensConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from peanut.model.layers.changed import BIAS

from ...support import (  # noqa: F401
    PEER_WARNINGS,
    change_in_output,
    distance,
    frozen_state,
    gradients,
    one_thread,
    peer_loaded,
    peer_model,
    randomised,
    same_bits,
    scattered,
)

pytestmark = [*PEER_WARNINGS, pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")]  # the peer's
Build = Callable[..., hf.PreTrainedModel]
IDS = torch.arange(3, 15).reshape(2, 6)
TOKENS = [4, 3, 9]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def biases(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.endswith("bias")}


# Biases


ALL = LoraConfig(r=4, target_modules=["query", "value"], bias="all")


def keys_of_biases(base: hf.PreTrainedModel, config: PeftConfig) -> set[str]:
    """Where files keep the biases of all layers: those of adapted layers under ``base_layer``."""
    adapted = tuple(f"{name}.bias" for name in config.target_modules or ())
    return {
        f"base_model.model.{name.removesuffix('bias')}{BIAS if name.endswith(adapted) else 'bias'}"
        for name in biases(base)
    }


def test_all_biases_are_trained_and_nothing_else_of_the_base(tiny_bert: Build, tmp_path: Path) -> None:
    base = tiny_bert()
    expected = logits(base)
    model = get_peft_model(base, ALL).eval()
    assert same_bits(logits(model), expected)
    assert len(biases(tiny_bert())) == 19
    size = sum(p.numel() for name, p in tiny_bert().named_parameters() if name.endswith("bias"))
    assert model.get_nb_trainable_parameters()[0] == size + 2 * 2 * 2 * 4 * 32
    randomised(model, scale=0.1)
    assert distance(logits(model), expected) > 0.05
    model.save_pretrained(tmp_path)
    found = tensors(tmp_path)
    assert {key for key in found if "lora" not in key} == keys_of_biases(tiny_bert(), ALL)
    state = tiny_bert().state_dict()
    for key, value in found.items():
        if key.endswith("bias"):
            plain = key.removeprefix("base_model.model.").replace("base_layer.", "")
            assert not torch.equal(value, state[plain])
    with model.disable_adapter():
        assert same_bits(logits(model), expected)
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    assert same_bits(logits(again), logits(model))
    merged = model.merge_and_unload()
    assert distance(logits(merged), logits(again)) < 1e-5
    assert merged.state_dict().keys() == state.keys()


def test_all_biases_beside_a_head_that_is_trained_whole(tiny_bert: Build, tmp_path: Path) -> None:
    config = LoraConfig(r=4, task_type="SEQ_CLS", bias="all")
    model = randomised(get_peft_model(tiny_bert(), config), scale=0.1).eval()
    model.save_pretrained(tmp_path / "ours")
    assert distance(peer_loaded(tiny_bert(), tmp_path / "ours")(IDS).logits, logits(model)) < 1e-5
    theirs = peer_model(tiny_bert(), config)
    scattered([p for p in theirs.parameters() if p.requires_grad], scale=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    # The peer writes the head's bias three times.
    more = {f"base_model.model.classifier.{name}.bias" for name in ("modules_to_save", "original_module")}
    assert tensors(tmp_path / "theirs").keys() - tensors(tmp_path / "ours").keys() == more
    assert not tensors(tmp_path / "ours").keys() - tensors(tmp_path / "theirs").keys()
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path / "theirs")
    assert distance(logits(again), theirs(IDS).logits) < 1e-5


def test_model_without_any_bias_has_none_to_train(tiny_llama: Build) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, bias="all"))
    assert model.get_nb_trainable_parameters()[0] == 2 * 4 * (32 + 32 + 32 + 16)


BIASED: list[tuple[PeftConfig, bool]] = [
    (LoraConfig(r=4, bias="lora_only"), True),
    (AdaLoraConfig(bias="lora_only", total_step=10), True),
    (OFTConfig(oft_block_size=8, bias="oft_only"), True),
    (BOFTConfig(boft_block_size=8, bias="boft_only"), True),
    (HRAConfig(r=4, bias="hra_only"), True),
    (VeraConfig(r=6, bias="vera_only"), True),
    (RandLoraConfig(r=5, bias="randlora_only"), True),
    (VBLoRAConfig(r=3, num_vectors=6, vector_length=8, bias="vblora_only"), True),
    (FourierFTConfig(n_frequency=60, bias="fourier_only"), True),
    (C3AConfig(block_size=8, bias="c3a_only"), True),
    (MissConfig(r=4, bias="MiSS_only"), True),
]


@pytest.mark.parametrize("every", [False, True], ids=["own", "all"])
@pytest.mark.parametrize(("config", "_"), BIASED, ids=[config.method for config, _ in BIASED])
def test_biases_alone_and_all(config: PeftConfig, _: bool, every: bool, tiny_bert: Build, tmp_path: Path) -> None:
    values = config.to_dict() | {"target_modules": ["query", "output.dense"]} | ({"bias": "all"} if every else {})
    config = PeftConfig.from_dict({name: value for name, value in values.items() if value is not None})
    base, model = tiny_bert(), get_peft_model(tiny_bert(), config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and p.shape == (32,)}
    assert trained
    scattered([p for key, p in model.adapters.parameters("default") if key.endswith("bias")], scale=0.5)
    model.eval().save_pretrained(tmp_path)
    found = {key for key in tensors(tmp_path) if key.endswith("bias")}
    wanted = keys_of_biases(base, config)
    assert found == (wanted if every else {key for key in wanted if "base_layer" in key})
    assert len(wanted) == 19
    assert change_in_output(nn_of(model), nn_of(base), IDS) > 0.01
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    assert same_bits(logits(again), logits(model))
    assert distance(peer_loaded(tiny_bert(), tmp_path)(IDS).logits, logits(model)) < 1e-5
    model.merge_adapter()
    assert distance(logits(model), logits(again)) < 1e-5
    model.unmerge_adapter()
    assert same_bits(logits(model), logits(again))


def nn_of(model: Any) -> Any:
    return lambda ids: model(ids).logits


# Rows of an embedding beside a method


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("named", [False, True], ids=["", "named"])
def test_tokens_are_trained_beside_lora(named: bool, tied: bool, tiny_llama: Build, tmp_path: Path) -> None:
    tokens: Any = {"embed_tokens": TOKENS} if named else TOKENS
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=tokens, task_type="CAUSAL_LM")
    expected = logits(tiny_llama(tie_word_embeddings=tied))
    model = get_peft_model(tiny_llama(tie_word_embeddings=tied), config).eval()
    assert distance(logits(model), expected) < 1e-6
    assert model.get_nb_trainable_parameters()[0] == 3 * 32 + 2 * 2 * 4 * 32
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(gradients(model))
    randomised(model.eval())
    assert distance(logits(model), expected) > 0.05
    model.save_pretrained(tmp_path / "ours")
    theirs = peer_model(tiny_llama(tie_word_embeddings=tied), config)
    held, there = (each.get_input_embeddings().token_adapter for each in (model, theirs))
    assert held.trainable_tokens_delta["default"].shape == there.trainable_tokens_delta["default"].shape
    assert held.trainable_tokens_delta.default.requires_grad
    assert held.token_indices == there.token_indices
    scattered([p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path / "theirs")
    ours, peers = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == peers.keys()
    assert "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta" in ours
    loaded = peer_loaded(tiny_llama(tie_word_embeddings=tied), tmp_path / "ours")
    assert distance(loaded(IDS).logits, logits(model)) < 1e-5
    again = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=tied), tmp_path / "theirs")
    assert distance(logits(again), theirs(IDS).logits) < 1e-5
    merged = model.merge_and_unload()
    assert distance(logits(merged), loaded(IDS).logits) < 1e-5
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


def test_tokens_beside_adalora(tiny_llama: Build, tmp_path: Path) -> None:
    config = AdaLoraConfig(total_step=5, target_modules=["q_proj"], trainable_token_indices=TOKENS)
    model = randomised(get_peft_model(tiny_llama(), config)).eval()
    rows = model.get_base_model().model.embed_tokens(torch.arange(101)) - tiny_llama().model.embed_tokens.weight
    assert rows.abs().amax(1).nonzero().flatten().tolist() == sorted(TOKENS)
    model.save_pretrained(tmp_path)
    assert same_bits(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


# A tied head


def tied_model(tiny_llama: Build) -> tuple[hf.PreTrainedModel, PeftModel]:
    base = tiny_llama(tie_word_embeddings=True)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    config = TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=TOKENS)
    return base, get_peft_model(base, config)


def changed(base: hf.PreTrainedModel, delta: Tensor) -> hf.PreTrainedModel:
    """``base`` with the rows of TOKENS replaced."""
    with torch.no_grad():
        base.model.embed_tokens.weight[TOKENS] = delta.to(base.dtype)
    return base


def test_tied_head_is_trained_with_the_embedding(tiny_llama: Build) -> None:
    _, model = tied_model(tiny_llama)
    assert model.get_nb_trainable_parameters()[0] == 3 * 32
    model.double().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=3.0)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # The same with the whole embedding trained but for its other rows.
    plain = tiny_llama(tie_word_embeddings=True).double().train().requires_grad_(False)
    weight = plain.model.embed_tokens.weight.requires_grad_()
    assert plain.lm_head.weight is weight
    for _ in range(3):
        (grad,) = torch.autograd.grad(plain(input_ids=IDS, labels=IDS).loss, weight)
        with torch.no_grad():
            weight[TOKENS] -= 3.0 * grad[TOKENS]
    delta = model.get_base_model().model.embed_tokens.adapters["default"].values_by_suffix()["trainable_tokens_delta"]
    assert distance(delta, weight[TOKENS]) < 1e-12
    assert distance(logits(model.eval()), logits(plain.eval())) < 1e-12
    assert distance(weight[TOKENS], tiny_llama().model.embed_tokens.weight[TOKENS]) > 0.05


def test_tied_head_saved_loaded_and_merged(tiny_llama: Build, tmp_path: Path) -> None:
    base, model = tied_model(tiny_llama)
    before = frozen_state(tiny_llama(tie_word_embeddings=True))
    randomised(model).eval()
    delta = model.get_base_model().model.embed_tokens.adapters["default"].values_by_suffix()["trainable_tokens_delta"]
    expected = logits(changed(tiny_llama(tie_word_embeddings=True), delta))
    assert distance(expected, logits(tiny_llama(tie_word_embeddings=True))) > 0.05
    assert distance(logits(model), expected) < 1e-5
    model.save_pretrained(tmp_path / "ours")
    loaded = peer_loaded(tiny_llama(tie_word_embeddings=True), tmp_path / "ours")
    assert distance(loaded(IDS).logits, expected) < 1e-5
    loaded.save_pretrained(tmp_path / "theirs")
    assert tensors(tmp_path / "theirs").keys() == tensors(tmp_path / "ours").keys()
    for folder in ("ours", "theirs"):
        again = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path / folder)
        assert same_bits(logits(again), logits(model))
    model.merge_adapter()
    assert distance(logits(model), expected) < 1e-5
    model.unmerge_adapter()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert all(same_bits(value, before[key]) for key, value in model.unload().state_dict().items())
    merged = again.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    assert distance(logits(merged), expected) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    once_more = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert once_more.lm_head.weight is once_more.model.embed_tokens.weight
    assert same_bits(logits(once_more), logits(merged))
