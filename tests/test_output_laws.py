"""What holds for every method that changes an output, on models of every form."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from peanut import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peanut.methods.adaption_prompt import AdaptionPromptConfig
from peanut.methods.bottleneck import BottleneckConfig
from peanut.methods.direft import DireftConfig
from peanut.methods.loreft import LoreftConfig
from peanut.methods.prompt_tuning import PromptTuningConfig
from peanut.model.layers.hooks import Hooking
from peanut.protocols import METHODS, OutputMethod

from .support import distance, frozen_state, one_thread, randomised, refused, same_bits  # noqa: F401

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bert": (hf.BertForSequenceClassification, hf.BertConfig, {**TEXT, **QUIET}),
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {**TEXT, "num_key_value_heads": 2}),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, {**GPT2, **DRY, "pad_token_id": 0}),
    "t5": (hf.T5ForConditionalGeneration, hf.T5Config, {**T5, "decoder_start_token_id": 0}),
    "vit": (hf.ViTForImageClassification, hf.ViTConfig, {**SIZES, **QUIET, "image_size": 16, "patch_size": 8}),
}
LORA = {"bert": "all-linear", "llama": "all-linear", "gpt2": "all-linear", "t5": "all-linear", "vit": "all-linear"}


def _pfeiffer() -> BottleneckConfig:
    return BottleneckConfig(style="pfeiffer", bottleneck_size=4, act_fn="gelu", init_weights="mam")


@dataclass(frozen=True)
class Variant:
    """A method with a config, and what it promises."""

    make: Callable[[], PeftConfig]
    models: tuple[str, ...]
    silent: bool = True


ALL, TEXTS = tuple(MODELS), ("bert", "llama", "gpt2", "t5")
VARIANTS: dict[str, Variant] = {
    "houlsby": Variant(lambda: BottleneckConfig(bottleneck_size=4, init_weights="mam"), ALL),
    "houlsby-near": Variant(lambda: BottleneckConfig(bottleneck_size=4), ("llama",), silent=False),
    "pfeiffer": Variant(_pfeiffer, ALL),
    "parallel": Variant(lambda: BottleneckConfig(style="parallel", bottleneck_size=4, act_fn="gelu"), ALL),
    "loreft": Variant(lambda: LoreftConfig(r=3, positions=2), TEXTS),
    "loreft-tied": Variant(lambda: LoreftConfig(r=3, positions=2, tied=True, init_weights=False), ("llama",), False),
    "direft": Variant(lambda: DireftConfig(r=3, positions=2), TEXTS),
    "adaption": Variant(lambda: AdaptionPromptConfig(adapter_len=3, adapter_layers=2), ("llama", "gpt2")),
}
CASES = [(variant, model) for variant, each in VARIANTS.items() for model in each.models]
FIRST = [("pfeiffer", "bert"), ("parallel", "gpt2"), ("houlsby", "t5"), ("loreft", "llama"), ("adaption", "llama")]
SOME = [*FIRST, ("houlsby", "vit"), ("pfeiffer", "llama"), ("parallel", "bert"), ("direft", "bert"), ("loreft", "t5")]
"""One of each, and some more, for what is slow."""
GENERATING = [case for case in CASES if case[1] in ("llama", "gpt2", "t5")]

cases = pytest.mark.parametrize(("variant", "model"), CASES)
some_cases = pytest.mark.parametrize(("variant", "model"), SOME)
first_cases = pytest.mark.parametrize(("variant", "model"), FIRST)


def base(name: str, dtype: torch.dtype = torch.float64, **sizes: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class, config_class, usual = MODELS[name]
        return model_class(config_class(**usual | sizes)).eval().to(dtype)


def batch(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator).to(dtype)}
    ids, mask = torch.randint(3, 50, (3, 8), generator=generator), torch.ones(3, 8, dtype=torch.long)
    padded = slice(0, 3) if name in ("llama", "gpt2") else slice(5, 8)
    mask[1, padded] = 0
    ids[1, padded] = 0
    return {"input_ids": ids, "attention_mask": mask} | ({"decoder_input_ids": ids[:, :5]} if name == "t5" else {})


def labels(name: str) -> dict[str, Tensor]:
    if name in ("bert", "vit"):
        return {"labels": torch.tensor([0, 1, 1])}
    given = batch(name)
    ids = given["decoder_input_ids"] if name == "t5" else given["input_ids"]
    answers = ids.clone()
    if name != "t5":
        answers[:, :6] = -100
    return {"labels": answers}


def adapted(variant: str, name: str, *names: str, dtype: torch.dtype = torch.float64) -> PeftModel:
    """Random adapters called ``names``; the first is active."""
    torch.manual_seed(1)
    first, *others = names or ("default",)
    model = get_peft_model(base(name, dtype), VARIANTS[variant].make(), first)
    for other in others:
        model.add_adapter(other, VARIANTS[variant].make())
    return randomised(model, scale=0.2).eval()


def answer(model: Any, name: str, dtype: torch.dtype = torch.float64, **more: Any) -> Tensor:
    """The logits at tokens that are no padding."""
    with torch.no_grad():
        return real(model(**batch(name, dtype), **more).logits, name)


def real(logits: Tensor, name: str) -> Tensor:
    return logits[batch(name)["attention_mask"].bool()] if name in ("llama", "gpt2") else logits


def test_every_output_method_is_here() -> None:
    methods = {name for name, method in METHODS.items() if isinstance(method, OutputMethod)}
    assert methods == {variant.make().method for variant in VARIANTS.values()}


@cases
def test_start_and_disable(variant: str, model: str) -> None:
    plain = answer(base(model), model)
    new = get_peft_model(base(model), VARIANTS[variant].make()).eval()
    if VARIANTS[variant].silent:
        assert torch.equal(answer(new, model), plain)
    randomised(new, scale=0.2)
    assert distance(answer(new, model), plain) > 1e-3
    with new.disable_adapter():
        assert torch.equal(answer(new, model), plain)


@cases
def test_save_and_load(variant: str, model: str, tmp_path: Path) -> None:
    saved = adapted(variant, model)
    saved.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(base(model), tmp_path, **options)  # type: ignore[arg-type]
        assert same_bits(answer(loaded, model), answer(saved, model))
    loaded.save_pretrained(tmp_path / "again")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@cases
def test_gradients(variant: str, model: str) -> None:
    """All that is trained gets one, nothing else does, and training leaves the base alone."""
    trained = adapted(variant, model).train()
    before = frozen_state(trained)
    trained(**batch(model), **labels(model)).loss.backward()
    own = {id(value) for _, value in trained.adapters.parameters("default")}
    for name, value in trained.named_parameters():
        assert (value.grad is not None and bool(value.grad.any())) == (id(value) in own), name
    optimizer = torch.optim.SGD([value for value in trained.parameters() if value.requires_grad], lr=0.1)
    optimizer.step()
    changed = {key for key, value in trained.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all("adapted_output" in key for key in changed)


@pytest.mark.parametrize("reentrant", [None, True, False])
@some_cases
def test_gradient_checkpointing(variant: str, model: str, reentrant: bool | None) -> None:
    found = []
    for checkpointing in (False, True):
        trained = adapted(variant, model).train()
        if checkpointing:
            options = () if reentrant is None else ({"use_reentrant": reentrant},)
            trained.get_base_model().activation_checkpointing_enable(*options)  # type: ignore[operator]
            trained.get_base_model().enable_input_require_grads()  # type: ignore[operator]
        trained(**batch(model), **labels(model)).loss.backward()
        found.append({key: value.grad for key, value in trained.adapters.parameters("default")})
    plain, again = found
    assert plain.keys() == again.keys() > set()
    assert all(distance(again[key], value) < 1e-9 for key, value in plain.items())  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize(("variant", "model"), GENERATING)
def test_generation(variant: str, model: str, options: dict[str, Any]) -> None:
    """With a cache as without, padding or not."""
    made = adapted(variant, model)
    given = {key: value for key, value in batch(model).items() if key != "decoder_input_ids"}
    sizes = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **options}
    sizes |= {"return_dict_in_generate": True, "output_logits": True}
    cached, plain = made.generate(**given, **sizes), base(model).generate(**given, **sizes)
    assert distance(torch.stack(cached.logits), torch.stack(plain.logits)) > 1e-4
    uncached = made.generate(**given, **sizes, use_cache=False)
    if model == "t5" or not VARIANTS[variant].make().method.endswith("REFT"):
        assert torch.equal(cached.sequences, uncached.sequences)
        assert distance(torch.stack(uncached.logits), torch.stack(cached.logits)) < 1e-9
    row = {key: value[1:2, 3:] if model != "t5" else value[1:2, :5] for key, value in given.items()}
    alone = made.generate(**row, **sizes)
    assert torch.equal(alone.sequences[0, -5:], cached.sequences[1, -5:])
    beams = options.get("num_beams", 1)
    of_row = torch.stack(cached.logits)[:, beams : 2 * beams]
    assert distance(torch.stack(alone.logits), of_row) < 1e-9


@pytest.mark.parametrize("variant", ["loreft", "loreft-tied", "direft"])
def test_generation_changes_the_prompt_alone(variant: str) -> None:
    """Token by token the prompt stays the prompt: as a forward over all tokens that marks the answer by labels."""
    made = adapted(variant, "llama")
    ids = batch("llama")["input_ids"][:1]
    written = made.generate(input_ids=ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    marks = written.clone()
    marks[:, : ids.shape[1]] = -100
    with torch.no_grad():
        whole = made(input_ids=written, labels=marks).logits
    whole[..., 2] = -torch.inf  # min_new_tokens forbids the end
    assert torch.equal(whole[0, ids.shape[1] - 1 : -1].argmax(-1), written[0, ids.shape[1] :])


@some_cases
def test_two_together(variant: str, model: str) -> None:
    """Each alone, and both in the order of activation: the second as if put on a model that has the first."""
    made = adapted(variant, model, "one", "two")
    alone = {}
    for name in ("one", "two"):
        made.set_adapter(name)
        alone[name] = answer(made, model)
    orders = []
    for order in (["one", "two"], ["two", "one"]):
        made.set_adapter(order)
        orders.append(answer(made, model))
    assert all(distance(both, one) > 1e-4 for both in orders for one in alone.values())
    if variant not in ("parallel", "adaption"):
        assert distance(orders[0], orders[1]) > 1e-6
    if VARIANTS[variant].silent:
        made.add_adapter("new", VARIANTS[variant].make())
        made.set_adapter(["one", "new"])
        assert distance(answer(made, model), alone["one"]) < 1e-12
    made.delete_adapter("two")
    made.set_adapter("one")
    assert torch.equal(answer(made, model), alone["one"])


@cases
def test_per_sample(variant: str, model: str) -> None:
    made = adapted(variant, model, "one", "two")
    names = ["two", "__base__", "one"]
    mixed = made.eval()(**batch(model), adapter_names=names).logits
    for row, name in enumerate(names):
        if name == "__base__":
            alone = base(model)(**batch(model)).logits
        else:
            made.set_adapter(name)
            alone = made(**batch(model)).logits
        seen = batch(model)["attention_mask"][row].bool() if model in ("llama", "gpt2") else slice(None)
        assert distance(mixed[row][seen], alone[row][seen]) < 1e-10
    made.train()(**batch(model), **labels(model), adapter_names=names).loss.backward()


@pytest.mark.parametrize("first", ["lora", "output"])
@some_cases
def test_with_lora_on_the_same_layers(variant: str, model: str, first: str) -> None:
    """The order in which they come does not matter; merging the LoRA changes nothing; each can leave."""
    lora = LoraConfig(target_modules=LORA[model], r=2)
    made = get_peft_model(base(model), *((lora, "lora") if first == "lora" else (VARIANTS[variant].make(), "output")))
    made.add_adapter(*(("output", VARIANTS[variant].make()) if first == "lora" else ("lora", lora)))
    randomised(made, scale=0.2).eval()
    made.set_adapter(["lora", "output"])
    both = answer(made, model)
    made.set_adapter(["output", "lora"])
    assert torch.equal(answer(made, model), both)
    made.merge_adapter("lora")
    assert distance(answer(made, model), both) < 1e-9
    made.unmerge_adapter()
    assert torch.equal(answer(made, model), both)
    with refused(made, "changes no weight"):
        made.merge_adapter("output")
    made.set_adapter("output")
    alone = answer(made, model)
    assert distance(alone, both) > 1e-4
    made.delete_adapter("lora")
    assert torch.equal(answer(made, model), alone)
    made.add_adapter("lora", lora)
    made.delete_adapter("output")
    made.set_adapter("lora")
    assert torch.equal(answer(made, model), answer(base(model), model))


@first_cases
def test_merging_is_refused(variant: str, model: str) -> None:
    made = adapted(variant, model)
    for call in (made.merge_adapter, made.merge_and_unload):
        with refused(made, "'default'.*changes no weight"):
            call()


@some_cases
def test_copies_and_leaving(variant: str, model: str) -> None:
    made = adapted(variant, model)
    expected = answer(made, model)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert same_bits(answer(copied, model), expected)
        randomised(copied, scale=0.1)
        assert distance(answer(copied, model), expected) > 1e-4
        assert same_bits(answer(made, model), expected)
    left, untouched = made.unload(), base(model)
    assert same_bits(answer(left, model), answer(untouched, model))
    assert [name for name, _ in left.named_modules()] == [name for name, _ in untouched.named_modules()]
    for module in left.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        assert not any(isinstance(getattr(hook, "__self__", None), Hooking) for hook in hooks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@some_cases
def test_dtypes(variant: str, model: str, dtype: torch.dtype) -> None:
    exact = answer(adapted(variant, model), model)
    made = adapted(variant, model, dtype=dtype)
    found = answer(made, model, dtype)
    assert found.dtype == dtype
    assert distance(found, exact) < {torch.float32: 1e-4, torch.bfloat16: 0.12, torch.float16: 0.02}[dtype]
    for _, value in made.adapters.parameters("default"):
        assert value.dtype == torch.float32
    made.train()(**batch(model, dtype), **labels(model)).loss.backward()
    narrow = get_peft_model(base(model, dtype), VARIANTS[variant].make(), autocast_adapter_dtype=False)
    assert all(value.dtype == dtype for _, value in narrow.adapters.parameters("default"))
    assert randomised(narrow, scale=0.2).eval()(**batch(model, dtype)).logits.isfinite().all()


@some_cases
def test_autocast(variant: str, model: str) -> None:
    made = adapted(variant, model, dtype=torch.float32)
    exact = answer(made, model, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = answer(made, model, torch.float32)
        made.train()(**batch(model, torch.float32), **labels(model)).loss.backward()
    assert distance(found, exact) < 0.12
    assert all(value.grad.dtype == torch.float32 for _, value in made.adapters.parameters("default"))


@pytest.mark.parametrize("variant", ["houlsby", "pfeiffer", "loreft", "direft", "adaption"])
def test_with_prompt_tuning(variant: str, tmp_path: Path) -> None:
    """Virtual tokens come first; both save, load and generate together."""
    made = get_peft_model(base("llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "prompt")
    made.add_adapter("output", VARIANTS[variant].make())
    randomised(made, scale=0.3).eval()
    made.set_adapter(["prompt", "output"])
    given = batch("llama")
    both = made(**given).logits
    made.set_adapter("output")
    assert distance(made(**given).logits, both[:, -8:]) > 1e-3
    made.set_adapter(["prompt", "output"])
    sizes = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    written = made.generate(**given, **sizes)
    alone = made.generate(input_ids=given["input_ids"][1:2, 3:], **sizes)
    assert torch.equal(alone[0, -5:], written[1, -5:])
    made.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base("llama"), tmp_path / "prompt", "prompt")
    again.load_adapter(tmp_path / "output", "output")
    again.set_adapter(["prompt", "output"])
    assert same_bits(again(**given).logits, both)


def test_a_forward_that_breaks_off_leaves_nothing() -> None:
    """What a parallel adapter heard does not stay in the model's copies, nor in the next forward."""
    made = adapted("parallel", "llama")
    expected = answer(made, "llama")

    def break_off(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = made.get_base_model().model.layers[0].mlp.register_forward_pre_hook(break_off)  # type: ignore[union-attr]
    with pytest.raises(KeyboardInterrupt):
        made(**batch("llama"))
    handle.remove()
    assert same_bits(answer(copy.deepcopy(made), "llama"), expected)
    assert same_bits(answer(made, "llama"), expected)
