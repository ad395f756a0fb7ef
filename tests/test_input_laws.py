"""The laws of every method that changes the input, on every architecture."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.lora import LoraConfig
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.model.layers.hooks import Hooking
from peanut.model.targets.shape import virtual_id
from peanut.protocols import METHODS, InputMethod

from .prompts import FORMS, KINDS, PAD, VOCABULARY, Form, Kind, adapted, answer, in_folder, moved, own
from .support import distance, frozen_state, gradients, one_thread, same_bits  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")

CHOSEN = {"BertForSequenceClassification", "LlamaForCausalLM", "T5ForConditionalGeneration"}
CASES = [
    (kind, form)
    for form in FORMS
    for kind in KINDS
    if form.fits(kind) and (str(kind) in CHOSEN or str(form) in ("PROMPT_TUNING", "PREFIX_TUNING"))
]
FEW = [
    (kind, form)
    for kind, form in CASES
    if str(kind) in CHOSEN and str(form) in ("PROMPT_TUNING", "PREFIX_TUNING", "CPT")
]
GENERATING = [case for case in CASES if case[0].generates]
PROMPT, PREFIX = FORMS[0], next(form for form in FORMS if form.method == "PREFIX_TUNING")


def kind_of(name: str) -> Kind:
    return next(kind for kind in KINDS if str(kind) == name)


BERT, LLAMA, T5 = (kind_of(name) for name in sorted(CHOSEN))


def cases(chosen: list[tuple[Kind, Form]]) -> Any:
    return pytest.mark.parametrize(("kind", "form"), chosen, ids=[f"{kind}-{form}" for kind, form in chosen])


def padded(batch: dict[str, Tensor], lengths: list[int], side: str) -> dict[str, Tensor]:
    """A batch whose rows keep their first tokens only, padded, with its mask."""
    count = batch["input_ids"].shape[1]
    made = {name: value.clone() for name, value in batch.items()}
    mask = torch.zeros(len(lengths), count, dtype=torch.long)
    for row, length in enumerate(lengths):
        places = slice(0, length) if side == "right" else slice(count - length, count)
        made["input_ids"][row] = PAD
        made["input_ids"][row, places] = batch["input_ids"][row, :length]
        mask[row, places] = 1
    return {**made, "attention_mask": mask}


def row_of(batch: dict[str, Tensor], row: int, length: int | None = None) -> dict[str, Tensor]:
    return {name: value[row : row + 1, : length if name == "input_ids" else None] for name, value in batch.items()}


def test_every_input_method_is_here() -> None:
    assert {form.method for form in FORMS} == {
        name for name, method in METHODS.items() if isinstance(method, InputMethod)
    }


@cases(CASES)
def test_disabled_model_is_its_base(kind: Kind, form: Form) -> None:
    batch, base = kind.batch(), kind.base()
    model = adapted(kind, form)
    expected = answer(base, batch)
    changed = answer(model, batch)
    assert own(changed, kind, expected.shape[1]).shape == expected.shape
    assert distance(own(changed, kind, expected.shape[1]), expected) > 1e-4
    with model.disable_adapter():
        assert same_bits(answer(model, batch), expected)
    assert same_bits(answer(model, batch), changed)
    assert same_bits(answer(model, batch, adapter_names=["__base__"] * 3), expected)


@cases(CASES)
def test_unloaded_model_is_its_base(kind: Kind, form: Form) -> None:
    base = kind.base()
    before, modules = frozen_state(base), [name for name, _ in base.named_modules()]
    model = adapted(Fixed(kind, base), form)
    answer(model, kind.batch())
    found = model.unload()
    assert found is base
    assert [name for name, _ in base.named_modules()] == modules
    assert all(same_bits(value, before[key]) for key, value in base.state_dict().items())
    for module in base.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        assert not any(isinstance(getattr(each, "__self__", None), Hooking) for each in hooks)
    assert same_bits(answer(base, kind.batch()), answer(kind.base(), kind.batch()))


class Fixed(Kind):
    """A kind whose base is one model."""

    def __init__(self, kind: Kind, model: nn.Module) -> None:
        super().__init__(kind.family, kind.head)
        self.__dict__["model"] = model

    def base(self, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
        return self.__dict__["model"]


@cases(CASES)
@pytest.mark.parametrize("low", [False, True])
def test_saved_and_loaded_bit_for_bit(kind: Kind, form: Form, low: bool, tmp_path: Path) -> None:
    model, batch = adapted(kind, form), kind.batch()
    expected = answer(model, batch)
    assert same_bits(answer(in_folder(model, tmp_path, kind, low_cpu_mem_usage=low), batch), expected)
    trained = PeftModel.from_pretrained(kind.base(), tmp_path, is_trainable=True, low_cpu_mem_usage=low).eval()
    assert same_bits(answer(trained, batch), expected)
    before = [(key, value.detach()) for key, value in AdapterSet.of(model).parameters("default")]
    after = [(key, value.detach()) for key, value in AdapterSet.of(trained).parameters("default")]
    assert [key for key, _ in after] == [key for key, _ in before]
    assert all(same_bits(a, b) for (_, a), (_, b) in zip(before, after, strict=True))


@cases(CASES)
def test_what_is_trained_gets_a_gradient(kind: Kind, form: Form) -> None:
    model = adapted(kind, form)
    model(**kind.batch(labels=True))["loss"].backward()
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    found = gradients(model)
    assert set(found) == trained
    flat = {name for name in found if "qa_outputs" in name and name.endswith("bias")}  # the same at every token
    assert all(float(value.abs().max()) > 0 for name, value in found.items() if name not in flat)


PADDED = [(kind, form, "right") for kind, form in CASES]
# Elsewhere padding on the left moves the tokens of the base itself.
PADDED += [(kind, form, "left") for kind, form in CASES if kind.counts_tokens or kind is T5]


@pytest.mark.parametrize(("kind", "form", "side"), PADDED, ids=str)
def test_padded_rows_are_as_alone(kind: Kind, form: Form, side: str) -> None:
    model, batch, lengths = adapted(kind, form), kind.batch(), [6, 4, 2]
    whole = padded(batch, lengths, side)
    found = answer(model, whole)
    for row, length in enumerate(lengths):
        alone = answer(model, row_of(batch, row, length))
        here = found[row : row + 1]
        if kind.task in ("CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS"):
            here = own(here, kind, 6)[:, whole["attention_mask"][row].bool()]
            alone = own(alone, kind, length)
        assert distance(here, alone) < 2e-5


@cases(FEW)
def test_embeddings_in_place_of_ids(kind: Kind, form: Form) -> None:
    model, batch = adapted(kind, form), kind.batch()
    expected = answer(model, batch)
    embeds = model.get_base_model().get_input_embeddings()(batch["input_ids"]).detach()
    given = {name: value for name, value in batch.items() if name != "input_ids"}
    assert distance(answer(model, {**given, "inputs_embeds": embeds}), expected) < 1e-6


@cases([case for case in CASES if str(case[0]) in CHOSEN])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradient_checkpointing_changes_nothing(kind: Kind, form: Form, reentrant: bool | None) -> None:
    model, batch = adapted(kind, form).train(), kind.batch(labels=True)
    loss = model(**batch)["loss"]
    loss.backward()
    expected = {name: value.clone() for name, value in gradients(model).items()}
    model.zero_grad()
    base = model.get_base_model()
    if reentrant is None:
        base.gradient_checkpointing_enable()
    else:
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        base.enable_input_require_grads()
    again = model(**batch)["loss"]
    again.backward()
    assert distance(again, loss) < 1e-6
    found = gradients(model)
    assert set(found) == set(expected)
    assert all(distance(found[name], value) < 1e-5 for name, value in expected.items())


@cases(FEW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, "autocast"])
def test_dtypes(kind: Kind, form: Form, dtype: Any) -> None:
    batch = kind.batch(labels=True)
    expected = answer(adapted(kind, form), batch)
    model = adapted(kind, form, torch.float32 if dtype == "autocast" else dtype)
    if dtype == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found, loss = answer(model, batch), model(**batch)["loss"]
    else:
        found, loss = answer(model, batch), model(**batch)["loss"]
        assert found.dtype == dtype
    loss.backward()
    assert distance(found, expected) < (1e-5 if dtype == torch.float64 else 0.1)
    trained = [value for value in model.parameters() if value.requires_grad]
    assert trained
    assert all(value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for value in trained)
    assert all(torch.isfinite(value.grad).all() for value in trained if value.grad is not None)


@cases([case for case in CASES if case[1] in (PROMPT, PREFIX) and case[0] in (BERT, LLAMA, T5)])
def test_two_together_stand_one_after_the_other(kind: Kind, form: Form) -> None:
    model = get_peft_model(kind.base(), form.config(kind, 2, task_type=None), "a")
    model.add_adapter("b", form.config(kind, 3, task_type=None))
    moved(model)
    model.set_adapter(["a", "b"])
    both = get_peft_model(kind.base(), form.config(kind, 5, task_type=None)).eval()
    parts = [dict(AdapterSet.of(model).parameters(name))["/prompt_embeddings"] for name in ("a", "b")]
    if kind is T5 and form is PROMPT:  # the encoder's rows, then the decoder's, which nothing reads
        parts = [parts[0][:2], parts[1][:3], parts[0][2:], parts[1][3:]]
    with torch.no_grad():
        dict(AdapterSet.of(both).parameters("default"))["/prompt_embeddings"].copy_(torch.cat(parts))
    batch = kind.batch()
    assert distance(answer(model, batch), answer(both, batch)) < 1e-6


@cases([case for case in CASES if str(case[1]) in ("PROMPT_TUNING", "PREFIX_TUNING")])
def test_an_adapter_for_each_sample(kind: Kind, form: Form) -> None:
    model = get_peft_model(kind.base(), form.config(kind, 2), "short")
    model.add_adapter("long", form.config(kind, 5))
    moved(model)
    batch = kind.batch()
    names = ["long", "__base__", "short"]
    found = answer(model, batch, adapter_names=names)
    for row, name in enumerate(names):
        alone = row_of(batch, row)
        if name == "__base__":
            expected = answer(kind.base(), alone)
        else:
            model.set_adapter(name)
            expected = answer(model, alone)
        count = 6 if kind.task == "CAUSAL_LM" else expected.shape[1]
        assert distance(own(found[row : row + 1], kind, count), own(expected, kind, count)) < 2e-5


@cases(FEW)
def test_beside_a_lora(kind: Kind, form: Form, tmp_path: Path) -> None:
    batch = kind.batch()
    model = get_peft_model(kind.base(), form.config(kind), "prompt")
    model.add_adapter("lora", LoraConfig(r=2, init_lora_weights=False))
    moved(model, 0.1)
    alone: dict[str, Tensor] = {}
    for name in ("prompt", "lora"):
        model.set_adapter(name)
        alone[name] = answer(model, batch)
    model.set_adapter(["prompt", "lora"])
    both = answer(model, batch)
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        assert same_bits(answer(model, batch), answer(kind.base(), batch))
    with pytest.raises(PeanutError, match="changes no weight"):
        model.merge_adapter()
    model.merge_adapter(["lora"])
    assert distance(answer(model, batch), both) < 1e-5
    model.unmerge_adapter()
    assert same_bits(answer(model, batch), both)
    # one after the other, in either order, the LoRA merged for good
    merged = PeftModel.from_pretrained(kind.base(), tmp_path / "lora").merge_and_unload()
    on_merged = PeftModel.from_pretrained(merged, tmp_path / "prompt", check_base=False)
    assert distance(answer(on_merged, batch), both) < 1e-5
    again = PeftModel.from_pretrained(kind.base(), tmp_path / "lora", "lora")
    again.load_adapter(tmp_path / "prompt", "prompt")
    assert same_bits(answer(again, batch), alone["lora"])
    again.set_adapter(["prompt", "lora"])
    assert same_bits(answer(again, batch), both)
    again.delete_adapter("lora")
    assert same_bits(answer(again, batch), alone["prompt"])


@cases(CASES)
def test_copied_and_pickled(kind: Kind, form: Form) -> None:
    model, batch = adapted(kind, form), kind.batch()
    expected = answer(model, batch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(answer(other, batch), expected)
        moved(other)  # what hangs on the copy is the copy's
        assert not same_bits(answer(other, batch), expected)
        assert same_bits(answer(model, batch), expected)


@cases(GENERATING)
@pytest.mark.parametrize(("beams", "side"), [(1, "left"), (3, None), (3, "left")])
def test_generation_with_a_cache(kind: Kind, form: Form, beams: int, side: str | None) -> None:
    model, batch = adapted(kind, form), {"input_ids": kind.batch()["input_ids"]}
    if side:
        batch = padded(batch, [6, 4, 2], side)
    else:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    cached = model.generate(**batch, **options)
    without = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(cached.sequences, without.sequences)
    for found, expected in zip(cached.scores, without.scores, strict=True):
        assert torch.allclose(found, expected, atol=1e-4)
    if beams == 1:  # what forward says, token by token
        ids = batch["input_ids"]
        for step in range(5):
            if kind.task == "CAUSAL_LM":
                mask = torch.cat([batch["attention_mask"], ids.new_ones(3, step)], dim=1)
                logits = answer(model, {"input_ids": cached.sequences[:, : 6 + step], "attention_mask": mask})[:, -1]
            else:
                logits = answer(model, {**batch, "decoder_input_ids": cached.sequences[:, : 1 + step]})[:, -1]
            kept = torch.isfinite(cached.scores[step])
            assert torch.allclose(cached.scores[step][kept], logits[kept], atol=1e-4)
    if side and (kind is not T5 or form.method == "PREFIX_TUNING"):  # a padded row as the row alone
        alone = model.generate(kind.batch()["input_ids"][2:, :2], **options)
        assert torch.equal(cached.sequences[2:, -5:], alone.sequences[:, -5:])


@cases([case for case in GENERATING if case[1] in (PROMPT, PREFIX) and case[0] in (LLAMA, T5)])
def test_generation_with_an_adapter_for_each_sample(kind: Kind, form: Form) -> None:
    model = get_peft_model(kind.base(), form.config(kind, 2), "short")
    model.add_adapter("long", form.config(kind, 5))
    moved(model)
    ids = kind.batch()["input_ids"]
    names = ["long", "__base__", "short"]
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for beams in (1, 3):
        found = model.generate(ids, num_beams=beams, adapter_names=names, **options)
        for row, name in enumerate(names):
            expected = model.generate(ids[row : row + 1], num_beams=beams, adapter_names=[name], **options)
            assert torch.equal(found[row], expected[0])


def test_virtual_tokens_have_an_id_that_means_nothing() -> None:
    for kind in KINDS:
        base = kind.base()
        assert 0 <= virtual_id(base) < VOCABULARY
        assert virtual_id(base) not in (PAD, base.config.eos_token_id)
