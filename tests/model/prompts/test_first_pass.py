"""The first pass of a mixture: generation with its two caches, beside other adapters, gates that are looked at."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from peanut import LoraConfig, PeanutConfig, PeanutError, PeftModel, get_peft_model
from peanut.methods.prompt_tuning import PromptTuningConfig
from peanut.methods.xlora import XLoraConfig
from peanut.model.xlora_model import XLoraModel

from ...compiling import assert_compiles
from ...methods.mixing import (
    COMMON,
    GATE,
    IDS,
    OPTIONS,
    TARGETS,
    Builder,
    gate,
    logits,
    lora_folders,  # noqa: F401
    mixed,
    peers,
)
from ...support import (
    CACHE,
    PEER_WARNINGS,
    distance,
    gradients,
    one_thread,  # noqa: F401
    randomised,
    refused,
    same_bits,
)

pytestmark = [*PEER_WARNINGS, pytest.mark.filterwarnings("ignore:`enable_softmax_topk` and `enable_softmax`")]


# Generation


@pytest.mark.parametrize(
    ("options", "how"),
    [
        (OPTIONS[0], {}),
        (OPTIONS[1], {"num_beams": 3}),
        (OPTIONS[6], {"num_beams": 3, "num_return_sequences": 2}),
        (OPTIONS[0], {"do_sample": True, "top_k": 5}),
        (OPTIONS[6], {"do_sample": True, "top_k": 5, "num_return_sequences": 2}),
    ],
    ids=str,
)
def test_generation_with_caches_without_and_the_peer_s(
    tiny_llama: Builder, experts: dict[str, str], options: dict[str, Any], how: dict[str, Any]
) -> None:
    own = mixed(tiny_llama(), experts, **options)
    other = peers(tiny_llama(), experts, own, **options)
    found = []
    for model, more in ((own, {}), (own, {"use_cache": False}), (other, {})):
        torch.manual_seed(5)
        found.append(model.generate(input_ids=IDS, **{"do_sample": False} | COMMON | how | more))
    assert found[0].tolist() == found[1].tolist() == found[2].tolist()
    with own.disable_adapter():
        assert own.generate(input_ids=IDS, **COMMON, do_sample=False).tolist() != found[0].tolist()


@pytest.mark.parametrize("options", [{}, {"scaling_pass_value": 0.4, "layerwise_scalings": True}], ids=str)
def test_a_cache_of_one_s_own(tiny_llama: Builder, experts: dict[str, str], options: dict[str, Any]) -> None:
    model = mixed(tiny_llama().double(), experts, **options)
    whole = logits(model)
    cache = DynamicCache(config=model.config)
    parts = [logits(model, IDS[:, :4], **{CACHE: cache}), logits(model, IDS[:, 4:], **{CACHE: cache})]
    assert distance(torch.cat(parts, dim=1), whole) < 1e-11
    cache.crop(-4)
    assert distance(logits(model, IDS[:, 3:], **{CACHE: cache}), whole[:, 3:]) < 1e-11
    with model.disable_adapter():
        logits(model, IDS[:, :1], **{CACHE: cache})
    with refused(
        model, r"^a cache of 8 tokens, not all of which the mixture has seen; expected a cache from the first"
    ):
        logits(model, IDS[:, :1], **{CACHE: cache})
    given = model(IDS)[CACHE]  # begun by the model itself
    assert (
        distance(logits(model, IDS[:, :1], **{CACHE: given}), logits(model, torch.cat([IDS, IDS[:, :1]], 1))[:, -1:])
        < 1e-11
    )


def test_caches_do_not_outlive_their_use(tiny_llama: Builder, experts: dict[str, str]) -> None:
    model = mixed(tiny_llama(), experts)
    cache = DynamicCache(config=model.config)
    logits(model, **{CACHE: cache})
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None
    finally:
        gc.enable()


def test_head_among_the_layers_of_an_expert(tiny_llama: Builder) -> None:
    """Generation asks the head for the last token only."""
    base = tiny_llama(tie_word_embeddings=False)
    get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head", "v_proj"]), "a")
    model = get_peft_model(randomised(base), XLoraConfig(enable_softmax=False)).eval()
    randomised(model, ["default"])
    whole = logits(model)
    assert distance(logits(model, logits_to_keep=2), whole[:, -2:]) < 1e-6
    assert distance(logits(model, logits_to_keep=torch.tensor([1, 4])), whole[:, [1, 4]]) < 1e-6
    greedy: Any = {**COMMON, "do_sample": False}
    found = model.generate(input_ids=IDS, **greedy)
    assert found.tolist() == model.generate(input_ids=IDS, **greedy, use_cache=False).tolist()


def test_static_cache_is_refused(tiny_llama: Builder, experts: dict[str, str]) -> None:
    model = mixed(tiny_llama(), experts)
    with pytest.raises(
        PeanutError,
        match=r"^a StaticCache, whose size is fixed, beside virtual tokens or a mixture; ",
    ):
        model.generate(input_ids=IDS, max_new_tokens=3, cache_implementation="static")


# Beside others


def test_experts_of_several_methods(tiny_llama: Builder) -> None:
    """PEANuT and LoRA, trained here, on layers that are not the same."""
    base = tiny_llama().double()
    get_peft_model(base, PeanutConfig(r=2, depth=1, target_modules=["q_proj", "v_proj"]), "nut")
    get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS), "lora")
    model = get_peft_model(randomised(base), XLoraConfig(enable_softmax=False)).eval()
    randomised(model, ["default"])
    assert model.peft_config["default"].adapters == {"lora": None, "nut": None}
    holder = model.get_base_model().adapted_mixture
    found = logits(model)
    gates = holder.latest["default"]
    assert gates.shape == (2, 7, 6, 2)
    plain = tiny_llama().double()
    for path, layer in model.adapters.layers():

        def add(_: Any, args: Any, y: Tensor, layer: Any = layer) -> Tensor:
            for number, name in enumerate(("lora", "nut")):
                if name in layer.adapters:
                    y = y + gates[:, :, 0, number, None] * (args[0] @ layer.delta(name).T)
            return y

        plain.get_submodule(path).register_forward_hook(add)
    assert distance(found, logits(plain)) < 1e-11
    assert distance(found, logits(tiny_llama().double())) > 0.02


def test_switching_and_per_sample_names(tiny_llama: Builder, experts: dict[str, str]) -> None:
    ids = torch.cat([IDS, IDS.flip(1)])
    model = mixed(tiny_llama().double(), experts)
    model.add_adapter("second", XLoraConfig(adapters={"0": None, "2": None}, scaling_pass_value=0.3))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    randomised(model, ["second", "other"]).eval()
    alone = {}
    for name in ("default", "0", "second", "other"):
        model.set_adapter(name)
        alone[name] = logits(model, ids)
    with model.disable_adapter():
        alone["__base__"] = logits(model, ids)
    single = PeftModel.from_pretrained(tiny_llama().double(), experts["0"])
    assert distance(alone["0"], logits(single, ids)) < 1e-12
    for names in (["default", "0", "__base__", "second"], ["second", "default", "other", "default"]):
        found = logits(model, ids, adapter_names=names)
        for row, name in enumerate(names):
            assert distance(found[row], alone[name][row]) < 1e-11
            assert all(distance(alone[name][row], each[row]) > 0.01 for key, each in alone.items() if key != name)
    model.set_adapter(["default", "second"])
    greedy: Any = {**COMMON, "do_sample": False}
    both = model.generate(input_ids=IDS, **greedy)
    assert both.tolist() == model.generate(input_ids=IDS, **greedy, use_cache=False).tolist()
    model.set_adapter("default")
    assert same_bits(logits(model, ids), alone["default"])


def test_beside_a_weight_method_and_a_prompt(tiny_llama: Builder, experts: dict[str, str]) -> None:
    model = mixed(tiny_llama(), experts)
    model.add_adapter("prompt", PromptTuningConfig(num_virtual_tokens=3))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    randomised(model, ["other"]).eval()
    model.set_adapter(["default", "prompt", "other"])
    assert model.get_base_model().adapted_mixture.latest.get("default") is None
    logits(model)
    latest = model.get_base_model().adapted_mixture.latest["default"]
    assert latest.shape[1] == 3 + 7
    model.set_adapter(["prompt"])
    front = model.get_base_model().adapted_input.values("prompt")["prompt_embeddings"].detach()
    plain: Any = tiny_llama()
    embeds = torch.cat([front.expand(2, -1, -1), plain.get_input_embeddings()(IDS)], dim=1)
    hidden = plain.model(inputs_embeds=embeds).last_hidden_state
    values = gate(model)
    expected = (hidden @ values[f"{GATE}.0.weight"].T + values[f"{GATE}.0.bias"]).softmax(-1)
    assert distance(latest, expected[:, :, None].expand_as(latest)) < 1e-5
    model.set_adapter(["default", "prompt", "other"])
    greedy: Any = {**COMMON, "do_sample": False}
    found = model.generate(input_ids=IDS, **greedy)
    assert found.tolist() == model.generate(input_ids=IDS, **greedy, use_cache=False).tolist()
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert set(gradients(model)) == {name for name, p in model.named_parameters() if p.requires_grad}


# Looking at the gates


def test_gates_can_be_looked_at_and_settings_changed(tiny_llama: Builder, experts: dict[str, str]) -> None:
    base = mixed(tiny_llama(), experts, top_k_lora=1).get_base_model()
    model: Any = XLoraModel(base, {})
    assert model.get_latest_scalings() is None
    assert model.expert_names() == ["0", "1", "2"]
    assert model.gated_layers() == [
        f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")
    ]
    logits(model)
    latest = model.get_latest_scalings()
    assert latest.shape == (2, 7, 4, 3)
    assert distance(latest.sum(-1), torch.ones(2, 7, 4)) < 1e-6
    model.enable_scalings_logging()
    for count in (7, 3, 7):
        logits(model, IDS[:, :count])
    model.disable_scalings_logging()
    logits(model)
    assert [gates.shape[1] for gates in model.get_scalings_log()] == [7, 3, 7]
    buckets = model.get_bucketed_scalings_log()
    assert {count: positions for count, (positions, _) in buckets.items()} == {7: [0, 2], 3: [1]}
    assert same_bits(buckets[7][1][1], latest)
    model.clear_scalings_log()
    assert model.get_scalings_log() == []
    for change, options in (
        (lambda: model.set_topk_lora(None), {}),
        (lambda: model.set_global_scaling_weight(0.5), {"global_scaling_weight": 0.5}),
        (lambda: model.set_scaling_pass_value(None), {"global_scaling_weight": 0.5, "scaling_pass_value": 1 / 3}),
    ):
        before = logits(model)
        change()
        assert distance(logits(model), before) > 1e-4
        assert same_bits(logits(model), logits(mixed(tiny_llama(), experts, **options)))
    assert model.get_global_scaling_weight() == 0.5
    with pytest.raises(PeanutError, match=r"^top_k_lora=4 of 3 experts"):
        model.set_topk_lora(4)
    with pytest.raises(PeanutError, match=r"^no mixtures in the model; expected one; add one"):
        XLoraModel(tiny_llama(), {}).get_latest_scalings()


@pytest.mark.filterwarnings("ignore")
def test_compiles_in_one_graph(tiny_llama: Builder) -> None:
    torch.manual_seed(1)
    made = get_peft_model(tiny_llama(num_hidden_layers=1).double(), LoraConfig(r=2, task_type="CAUSAL_LM"), "a")
    made.add_adapter("b", LoraConfig(r=3, task_type="CAUSAL_LM"))
    made.add_adapter("mix", XLoraConfig(adapters={"a": None, "b": None}, task_type="CAUSAL_LM", use_bias=True))
    made.set_adapter("mix")
    assert_compiles(randomised(made, scale=0.2), {"input_ids": IDS, "labels": IDS}, lambda output: output["logits"])
