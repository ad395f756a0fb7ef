"""Adaption prompt against its formula, and against the peer, both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

from peanut import LoraConfig, PeanutError, PeftModel, get_peft_model
from peanut.methods.adaption_prompt import AdaptionPromptConfig
from peanut.methods.bottleneck import BottleneckConfig

from ..support import PEER_WARNINGS, distance, one_thread, peer_loaded, peer_model, randomised, refused, same_bits  # noqa: F401

pytestmark = PEER_WARNINGS

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
HEADS = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, HEADS),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, HEADS),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {"vocab_size": 50, "n_embd": 32, "n_layer": 3, "n_head": 4}),
    "llama with biases": (hf.LlamaForCausalLM, hf.LlamaConfig, {**HEADS, "attention_bias": True}),
    "wide heads": (hf.LlamaForCausalLM, hf.LlamaConfig, {**HEADS, "head_dim": 16}),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, HEADS),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {**HEADS, "head_dim": 8}),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, {**HEADS, "head_dim": 16}),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, {**HEADS, "head_dim": 16, "attn_logit_softcapping": 3.0}),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, {**HEADS, "head_dim": 16}),
    "smollm3": (hf.SmolLM3ForCausalLM, hf.SmolLM3Config, {**HEADS, "no_rope_layers": [1, 0, 1]}),
}
PEER = ["llama", "mistral", "gpt2"]


def made(kind: str, **more: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class, config_class, sizes = MODELS[kind]
        more = {"eos_token_id": 2, "bos_token_id": 1} | more
        model = model_class(config_class(**{**sizes, **more})).eval()
        for name, value in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                nn.init.normal_(value, std=0.3)
        return model


def config(**more: Any) -> AdaptionPromptConfig:
    return AdaptionPromptConfig(**{"adapter_len": 5, "adapter_layers": 2, "task_type": "CAUSAL_LM", **more})


def batch() -> dict[str, Tensor]:
    ids = torch.arange(3, 31).reshape(4, 7)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


# The peer


@pytest.mark.parametrize("kind", PEER)
def test_our_file_in_the_peer(kind: str, tmp_path: Path) -> None:
    ours = randomised(get_peft_model(made(kind), config())).eval()
    ours.save_pretrained(tmp_path)
    with torch.no_grad():
        found, base = ours(**batch()).logits, made(kind)(**batch()).logits
        theirs = peer_loaded(made(kind), tmp_path)(**batch()).logits
    real = batch()["attention_mask"].bool()
    assert distance(found[real], theirs[real]) < 1e-5
    assert distance(found[real], base[real]) > 0.01


@pytest.mark.parametrize("kind", PEER)
def test_the_peers_file_here(kind: str, tmp_path: Path) -> None:
    theirs = peer_model(made(kind), config())
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "adaption_gate" in name:
                value.fill_(0.7)
        theirs.save_pretrained(tmp_path)
        ours = PeftModel.from_pretrained(made(kind), tmp_path)
        real = batch()["attention_mask"].bool()
        assert distance(ours(**batch()).logits[real], theirs(**batch()).logits[real]) < 1e-5
    ours.save_pretrained(tmp_path / "again")
    files = [load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again")]
    assert files[0].keys() == files[1].keys()
    assert all(same_bits(files[0][key], files[1][key]) for key in files[0])
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, tmp_path / "again")]
    assert configs[0] == configs[1] | {"peft_version": "0.21.2"}  # ours has the save's id in it


@pytest.mark.parametrize("kind", PEER)
def test_gradients_are_the_peers(kind: str, tmp_path: Path) -> None:
    ours = randomised(get_peft_model(made(kind), config())).eval()
    ours.save_pretrained(tmp_path)
    theirs = peer_loaded(made(kind), tmp_path, is_trainable=True)
    labels = batch()["input_ids"]
    for model in (ours, theirs):
        model(**batch(), labels=labels).loss.backward()
    own = dict(ours.adapters.parameters("default"))
    compared = 0
    for name, value in theirs.named_parameters():
        if value.grad is not None:
            key = name.removeprefix("base_model.model.")
            assert distance(own[key].grad, value.grad) < 1e-4
            compared += 1
    assert compared == len(own) == 4


# The formula


def rotated(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = q.shape[-1] // 2
    return q * cos + torch.cat([-q[..., half:], q[..., :half]], dim=-1) * sin


def formula(module: Any, values: dict[str, Tensor], path: str, h: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What is added to the output for hidden states h (batch, tokens, hidden), head by head."""
    g, P, size = values[f"{path}.adaption_gate"], values[f"{path}.adaption_prompt"][0], module.head_dim
    fused = hasattr(module, "c_attn")
    if fused:
        q, k, v = module.c_attn(h).split(32, -1)[0], *module.c_attn(P).split(32, -1)[1:]
    else:
        q, k, v = module.q_proj(h), module.k_proj(P), module.v_proj(P)
    answers = []
    for head in range(q.shape[-1] // size):
        group = head // (q.shape[-1] // k.shape[-1])
        own_q, own_k = q[..., head * size : head * size + size], k[:, group * size : group * size + size]
        own_v = v[:, group * size : group * size + size]
        if hasattr(module, "q_norm"):
            own_q, own_k = module.q_norm(own_q), module.k_norm(own_k)
        if not fused and getattr(module, "use_rope", True):
            own_q = rotated(own_q, *arguments["position_embeddings"])
        scores = own_q @ own_k.T * module.scaling
        if getattr(module, "attn_logit_softcapping", None):
            scores = torch.tanh(scores / module.attn_logit_softcapping) * module.attn_logit_softcapping
        answers.append(g * torch.softmax(scores, -1) @ own_v)
    seen = torch.cat(answers, -1)
    return seen if fused else seen @ module.o_proj.weight.T


@pytest.mark.parametrize("kind", MODELS)
def test_formula(kind: str) -> None:
    base = made(kind).double()
    model = randomised(get_peft_model(made(kind).double(), config(adapter_layers=2))).eval()
    values = {key: value.detach() for key, value in model.adapters.parameters("default")}
    paths = sorted({key.rpartition(".")[0] for key in values})
    assert [path.split(".")[2] for path in paths] == ["1", "2"]
    for path in paths:

        def change(
            module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, path: str = path
        ) -> tuple[Tensor, ...]:
            h = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            return (output[0] + formula(module, values, path, h, kwargs), *output[1:])

        base.get_submodule(path).register_forward_hook(change, with_kwargs=True)
    real = batch()["attention_mask"].bool()
    with torch.no_grad():
        found, plain = model(**batch()).logits[real], made(kind).double()(**batch()).logits[real]
        assert distance(found, base(**batch()).logits[real]) < 1e-10
    assert distance(found, plain) > 0.003


@pytest.mark.parametrize("kind", MODELS)
def test_a_zero_gate_changes_nothing(kind: str) -> None:
    """Also where W_o has a bias, and where other adapters are there: each changes what it did without this one."""
    with torch.no_grad():
        model = get_peft_model(made(kind), config()).eval()
        assert torch.equal(model(**batch()).logits, made(kind)(**batch()).logits)
        model.add_adapter("lora", LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        model.add_adapter("bottleneck", BottleneckConfig(bottleneck_size=3))
        randomised(model, ["lora", "bottleneck"], scale=0.1)
        model.set_adapter(["lora", "bottleneck"])
        alone = model(**batch()).logits
        model.set_adapter(["lora", "bottleneck", "default"])
        assert torch.equal(model(**batch()).logits, alone)


def test_acts_through_weight_methods() -> None:
    """Keys and values of the prompt are those of the changed layers, so merging a LoRA changes nothing."""
    model = get_peft_model(made("llama").double(), config()).eval()
    model.add_adapter("lora", LoraConfig(target_modules=["k_proj", "v_proj", "o_proj", "q_proj"]))
    randomised(model, scale=0.2)
    model.set_adapter(["default", "lora"])
    with torch.no_grad():
        whole = model(**batch()).logits
        model.merge_adapter("lora")
        assert distance(model(**batch()).logits, whole) < 1e-12
        model.unmerge_adapter()
        names = ["default", "lora", "__base__", "default"]
        mixed = model(**batch(), adapter_names=names).logits
        real = batch()["attention_mask"].bool()
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(**batch()).logits
            else:
                model.set_adapter(name)
                alone = model(**batch()).logits
            assert distance(mixed[row][real[row]], alone[row][real[row]]) < 1e-12


# What it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_len": 0}, "adapter_len=0"),
        ({"adapter_layers": -1}, "adapter_layers=-1"),
        ({"layers_to_transform": [1]}, "layers_to_transform=.*adapter_layers, which counts blocks from the top"),
    ],
)
def test_bad_configs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        config(**options)


def test_what_does_not_fit(tiny_bert: Any) -> None:
    base = made("llama")
    for name in ("adapter_len", "adapter_layers"):
        with refused(base, f"{name} is not given; expected a whole number of at least 1; set it"):
            get_peft_model(base, config(**{name: None}))
    with refused(base, "adapter_layers=4 for a model with 3 blocks"):
        get_peft_model(base, config(adapter_layers=4))
    with refused(base, "'model.layers.1.mlp', a LlamaMLP, is no attention module"):
        get_peft_model(base, config(target_modules="mlp"))
    bert = tiny_bert()
    with refused(bert, "a BertSelfAttention, is no attention module"):
        get_peft_model(bert, config(task_type="SEQ_CLS"))


@pytest.mark.parametrize("target", [None, "self_attn", ["self_attn"], r"model\.layers\.[01]\.self_attn"])
def test_names_of_attention_modules(target: Any, tmp_path: Path) -> None:
    """One name is a name, as in the peer; files hold it where the config names none."""
    model = get_peft_model(made("llama"), config(target_modules=target))
    pattern = str(target).startswith("model")
    paths = [f"model.layers.{block}.self_attn" for block in ((0, 1) if pattern else (1, 2))]
    assert [place.path for place in model.adapters.places()] == paths
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert written == (target if pattern else "self_attn")
    model.load_adapter(tmp_path, "default")
    model.load_adapter(tmp_path, "again")
    assert [place.path for place in model.adapters.places("again")] == paths
