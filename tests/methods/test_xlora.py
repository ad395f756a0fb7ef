"""X-LoRA: the formula, the peer both ways, training, and what its configs refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from peanut import LoraConfig, PeanutError, PeftModel, get_peft_model
from peanut.methods.xlora import XLoraConfig
from peanut.model.adapters.adapter_set import AdapterSet

from ..support import (
    PEER_WARNINGS,
    distance,
    gradients,
    one_thread,  # noqa: F401
    randomised,
    refused,
    same_bits,
    scattered,
)
from .mixing import (
    GATE,
    IDS,
    OPTIONS,
    TARGETS,
    Builder,
    gate,
    logits,
    lora_folders,  # noqa: F401
    mixed,
    peer_gate,
    peers,
)

pytestmark = [*PEER_WARNINGS, pytest.mark.filterwarnings("ignore:`enable_softmax_topk` and `enable_softmax`")]


variants = pytest.mark.parametrize("options", OPTIONS, ids=str)


# The formula


def by_hand(base: nn.Module, model: Any, name: str, options: dict[str, Any]) -> Tensor:
    """Logits from the definition: dense matrices of the experts, gates token by token, in float64."""
    values, config = gate(model, name), XLoraConfig(**options)
    with torch.no_grad(), model.disable_adapter():
        hidden = model(IDS, output_hidden_states=True).hidden_states[-1]
    for number, (weight, bias) in enumerate(zip(list(values.values())[::2], list(values.values())[1::2], strict=True)):
        hidden = (torch.relu(hidden) if number else hidden) @ weight.T + bias
    paths = [path for path, _ in model.adapters.layers()]
    gates = hidden.unflatten(-1, (len(paths), 3)) if config.layerwise_scalings else hidden[:, :, None]
    gates = gates.expand(-1, -1, len(paths), -1)
    if config.enable_softmax:
        gates = (gates / config.softmax_temperature).softmax(-1)
    if config.top_k_lora:
        least = gates.sort(-1, descending=True).values[..., config.top_k_lora - 1, None]
        gates = torch.where(gates >= least, gates, 0)
        if config.enable_softmax_topk:
            powers = torch.where(gates != 0, gates.exp(), 0)
            gates = powers / powers.sum(-1, keepdim=True)
    plain, handles = copy.deepcopy(base), []
    for number, (path, layer) in enumerate(model.adapters.layers()):

        def add(_: Any, args: Any, y: Tensor, number: int = number, layer: Any = layer) -> Tensor:
            for e in range(3):
                y = y + config.global_scaling_weight * gates[:, :, number, e, None] * (args[0] @ layer.delta(str(e)).T)
            return y

        handles.append(plain.get_submodule(path).register_forward_hook(add))
    return logits(plain)


@pytest.mark.parametrize("options", [each for each in OPTIONS if "scaling_pass_value" not in each], ids=str)
def test_equals_the_definition(tiny_llama: Builder, experts: dict[str, str], options: dict[str, Any]) -> None:
    base = tiny_llama().double()
    model = mixed(tiny_llama().double(), experts, **options)
    found = logits(model)
    assert distance(found, by_hand(base, model, "default", options)) < 1e-11
    assert distance(found, logits(base)) > 0.02
    with model.disable_adapter():
        assert same_bits(logits(model), logits(base))


@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2"])
def test_gates_read_what_the_model_calls_its_last_hidden_states(build: str, request: pytest.FixtureRequest) -> None:
    base: Any = request.getfixturevalue(build)()
    targets = TARGETS if build == "tiny_llama" else ["c_attn", "c_fc"]
    for name in ("a", "b"):
        model = get_peft_model(base, LoraConfig(r=2, target_modules=targets), name)
    model = get_peft_model(randomised(base), XLoraConfig(enable_softmax=False, hidden_size=32)).eval()
    values = gate(model)
    logits(model)
    with model.disable_adapter(), torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states[-1]
    expected = hidden @ values[f"{GATE}.0.weight"].T
    found = model.get_base_model().adapted_mixture.latest["default"]
    assert distance(found, expected[:, :, None].expand_as(found)) < 1e-6


# The peer


@variants
def test_peer_computes_the_same(tiny_llama: Builder, experts: dict[str, str], options: dict[str, Any]) -> None:
    own = mixed(tiny_llama(), experts, use_trainable_adapters=True, **options)
    other = peers(tiny_llama(), experts, own, use_trainable_adapters=True, **options)
    assert distance(logits(own), logits(tiny_llama())) > 0.02
    assert distance(logits(own), logits(other)) < 1e-5
    own(IDS, labels=IDS).loss.backward()
    other(input_ids=IDS, labels=IDS).loss.backward()
    grads, theirs = {name: value.grad for name, value in gate(own).items()}, peer_gate(other)
    assert grads.keys() == theirs.keys()
    assert all(distance(grads[name], theirs[name].grad) < 1e-4 for name in grads)
    lora = {name: p.grad for name, p in other.named_parameters() if "lora_A" in name or "lora_B" in name}
    for path, layer in own.adapters.layers():
        for expert in experts:
            for suffix, value in layer.values(expert).items():
                key = f"base_model.lora_model.model.{path}.{suffix.replace('.weight', f'.{expert}.weight')}"
                assert distance(value.grad, lora.pop(key)) < 1e-4, key
    assert not lora


@pytest.mark.parametrize("options", [*OPTIONS[:4], OPTIONS[5]], ids=str)
def test_peer_s_file_is_read(
    tiny_llama: Builder, experts: dict[str, str], options: dict[str, Any], tmp_path: Path
) -> None:
    other = peers(tiny_llama(), experts, **options)
    scattered(peer_gate(other).values())
    other.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert list(model.peft_config) == ["0", "1", "2", "default"]
    assert distance(logits(model), logits(other)) < 1e-5
    given = XLoraConfig(adapters=dict.fromkeys(experts, experts["0"]), hidden_size=32, **options)
    same = PeftModel.from_pretrained(tiny_llama(), tmp_path, config=given)
    assert distance(logits(same), logits(model)) > 1e-3
    assert distance(logits(model), logits(tiny_llama())) > 0.02


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[1], OPTIONS[5]], ids=str)
def test_peer_reads_our_file(
    tiny_llama: Builder, experts: dict[str, str], options: dict[str, Any], tmp_path: Path
) -> None:
    import peft

    model = mixed(tiny_llama(), experts, use_bias=False, **options)
    model.save_pretrained(tmp_path)
    base = tiny_llama()
    base.config.use_cache = False
    other = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert distance(logits(model), logits(other)) < 1e-5


def test_experts_that_the_peer_did_not_write_whole(
    tiny_llama: Builder, experts: dict[str, str], tmp_path: Path
) -> None:
    """It shares the tensors of experts called by numbers out by layer; then only their own folders have them."""
    peers(tiny_llama(), experts, xlora_depth=2, xlora_size=8).save_pretrained(tmp_path)
    config = XLoraConfig(adapters=dict.fromkeys(experts, str(tmp_path / "gone")), xlora_depth=2, xlora_size=8)
    config.save_pretrained(tmp_path)  # as if these folders were no longer there
    base = tiny_llama()
    with refused(base, r"0' has tensors of several experts in it and lacks others, as Hugging Face PEFT writes them; "):
        PeftModel.from_pretrained(base, tmp_path)
    assert not AdapterSet.of(base).configs


# Training


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny_llama: Builder, experts: dict[str, str], reentrant: bool) -> None:
    model = mixed(tiny_llama(), experts, use_trainable_adapters=True, scaling_pass_value=0.3).train()

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        (model(IDS, labels=IDS).loss + model(IDS.flip(1), labels=IDS).loss).backward()
        return {name: grad.clone() for name, grad in gradients(model).items()}

    expected = run()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # as with any adapter on a frozen base
    found = run()
    assert len(found) == 2 + 2 * 2 * 2 * 3
    assert found.keys() == expected.keys()
    assert all(distance(found[name], grad) < 1e-5 for name, grad in expected.items())


@pytest.mark.parametrize("use_bias", [False, True])
def test_trainer_trains_the_gate_alone(
    tiny_llama: Builder, experts: dict[str, str], tmp_path: Path, use_bias: bool
) -> None:
    model = get_peft_model(tiny_llama(), XLoraConfig(adapters=experts, use_bias=use_bias, layerwise_scalings=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = [{"input_ids": IDS[row % 2], "labels": IDS[row % 2]} for row in range(16)]
    arguments = hf.TrainingArguments(
        str(tmp_path),
        max_steps=24,
        learning_rate=0.3,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    trainer = hf.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.05
    moved = {name.rsplit(".", 1)[1] for name, value in model.state_dict().items() if not same_bits(value, before[name])}
    assert moved == ({"weight", "bias"} if use_bias else {"weight"})
    own = GATE.split(".")[0]
    assert all(own in name for name, value in model.state_dict().items() if not same_bits(value, before[name]))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if own in name
    }


def test_bfloat16(tiny_llama: Builder, experts: dict[str, str]) -> None:
    model = mixed(tiny_llama().bfloat16(), experts)
    assert model(IDS).logits.dtype == torch.bfloat16
    assert {value.dtype for value in gate(model).values()} == {torch.float32}
    assert distance(logits(model), logits(mixed(tiny_llama(), experts))) < 0.05
    model(IDS, labels=IDS).loss.backward()
    assert all(value.grad is not None and value.grad.dtype == torch.float32 for value in gate(model).values())


# Configs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"xlora_depth": 0}, r"^xlora_depth=0; expected a whole number from 1 to 10,000"),
        ({"softmax_temperature": 0}, r"^softmax_temperature=0; expected a finite number above 0"),
        ({"enable_softmax_topk": True}, r"^enable_softmax_topk=True without top_k_lora"),
        ({"adapters": {"a": None}, "top_k_lora": 2}, r"^top_k_lora=2 of 1 experts; expected at most 1"),
        ({"adapters": ["a"]}, r"^adapters=\['a'\]; expected a dictionary"),
        ({"layernorm_type": "layer"}, r"^layernorm_type='layer'; expected 'rms'"),
        ({"target_modules": ["q_proj"]}, r"^target_modules=\['q_proj'\] for X-LoRA"),
        ({"xlora_dropout_p": 1.0}, r"^xlora_dropout_p=1.0; expected a probability"),
    ],
)
def test_wrong_configs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        XLoraConfig(**options)
