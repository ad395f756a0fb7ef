"""The input methods beside the peer's: files in both directions, outputs, losses, gradients, generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peanut import PeftModel
from peanut.model.adapters.adapter_set import AdapterSet

from .prompts import FORMS, KINDS, Form, Kind, adapted, answer, answer_of, own
from .support import CACHE, PEER_WARNINGS, distance, one_thread, peer_loaded, peer_model, same_bits  # noqa: F401

pytestmark = [*PEER_WARNINGS, pytest.mark.filterwarnings("ignore:Position ids are not supported")]
PEER_IS_BEHIND = CACHE == "cache"
"""transformers 5.24 renamed the cache; the peer's generation, and its prefixes of classifiers, know the old name."""
CASES = [
    (kind, form)
    for form in FORMS
    for kind in KINDS
    if form.fits(kind)
    and not (PEER_IS_BEHIND and form.method == "PREFIX_TUNING" and kind.task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"))
]
SEVERAL = [
    (kind, form)
    for kind, form in CASES
    if str(form) in ("PROMPT_TUNING", "PREFIX_TUNING", "CPT")
    or str(kind) in ("BertForSequenceClassification", "LlamaForCausalLM", "T5ForConditionalGeneration")
]


def cases(chosen: list[tuple[Kind, Form]]) -> Any:
    return pytest.mark.parametrize(("kind", "form"), chosen, ids=[f"{kind}-{form}" for kind, form in chosen])


def given(kind: Kind) -> dict[str, Any]:
    """What the peer cannot read off DistilBERT itself."""
    sizes = {"token_dim": 32, "num_attention_heads": 4, "num_layers": 2}
    return sizes if kind.family == "DistilBert" else {}


def theirs(model: Any, batch: dict[str, Tensor], kind: Kind, count: int) -> Tensor:
    """The peer's answers to the user's tokens, which it leaves behind those to its own."""
    found = answer(model, batch)
    return found[:, -count:] if kind.task in ("CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS") else found


def masked(kind: Kind, **options: Any) -> dict[str, Any]:
    batch = kind.batch(**options)
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


@cases(CASES)
def test_our_file_in_the_peer(kind: Kind, form: Form, tmp_path: Path) -> None:
    model, batch = adapted(kind, form, **given(kind)), masked(kind)
    model.save_pretrained(tmp_path)
    expected = own(answer(model, batch), kind, 6)
    peer = peer_loaded(kind.base(), tmp_path)
    assert distance(theirs(peer, batch, kind, 6), expected) < 1e-5


@cases(SEVERAL)
def test_the_peers_file_here(kind: Kind, form: Form, tmp_path: Path) -> None:
    torch.manual_seed(5)
    peer, batch = peer_model(kind.base(), form.config(kind, **given(kind))), masked(kind)
    peer.save_pretrained(tmp_path)
    expected = theirs(peer, batch, kind, 6)
    model = PeftModel.from_pretrained(kind.base(), tmp_path)
    assert distance(own(answer(model, batch), kind, 6), expected) < 1e-5
    model.save_pretrained(tmp_path / "again")
    before = load_file(tmp_path / "adapter_model.safetensors")
    after = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert set(after) == set(before)
    assert all(same_bits(after[key], value) for key, value in before.items())
    if not dict(form.options).get("prefix_projection") and form.method != "P_TUNING":
        with pytest.warns(UserWarning, match="no adapter_training") if form.method == "CPT" else _nothing():
            trained = PeftModel.from_pretrained(kind.base(), tmp_path, is_trainable=True).eval()
    else:
        with pytest.warns(UserWarning, match="no adapter_training"):
            trained = PeftModel.from_pretrained(kind.base(), tmp_path, is_trainable=True).eval()
    assert distance(own(answer(trained, batch), kind, 6), expected) < 1e-5
    trained(**kind.batch(labels=True))["loss"].backward()
    assert all(value.grad is not None for value in trained.parameters() if value.requires_grad)


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


@torch.no_grad()
def twin(model: PeftModel, kind: Kind, form: Form) -> Any:
    """The peer's model for training, with our values."""
    peer = peer_model(kind.base(), form.config(kind, **given(kind)))
    encoder: nn.Module = peer.prompt_encoder["default"]
    there = dict(encoder.named_parameters())
    for key, value in AdapterSet.of(model).parameters("default"):
        if key.startswith("/"):
            name = key.removeprefix("/").replace("prompt_embeddings", "embedding.weight")
            there.pop(name).copy_(value)
        else:
            head, _, rest = key.partition(".")
            dict(peer.base_model.named_parameters())[f"{head}.modules_to_save.default.{rest}"].copy_(value)
    assert not there
    return peer


@cases(SEVERAL)
def test_losses_and_gradients(kind: Kind, form: Form) -> None:
    model, batch = adapted(kind, form, **given(kind)).train(), masked(kind, labels=True)
    peer = twin(model, kind, form).train()
    if kind.task in ("TOKEN_CLS",) and form.method != "PREFIX_TUNING":
        peer_batch = {**batch, "labels": torch.cat([torch.full((3, 3), -100), batch["labels"]], dim=1)}
    elif kind.task == "QUESTION_ANS" and form.method != "PREFIX_TUNING":
        peer_batch = batch | {name: batch[name] + 3 for name in ("start_positions", "end_positions")}
    else:
        peer_batch = dict(batch)
    ours, its = model(**batch), peer(**peer_batch)
    assert distance(ours["loss"], its["loss"]) < 1e-5
    ours["loss"].backward()
    its["loss"].backward()
    encoder = dict(peer.prompt_encoder["default"].named_parameters())
    compared = 0
    for key, value in AdapterSet.of(model).parameters("default"):
        if key.startswith("/") and value.requires_grad:
            name = key.removeprefix("/").replace("prompt_embeddings", "embedding.weight")
            if float(value.grad.abs().max()) > 1e-7:  # type: ignore[union-attr]
                assert distance(value.grad, encoder[name].grad) < 1e-4  # type: ignore[arg-type]
                compared += 1
    assert compared


@cases([case for case in SEVERAL if case[0].generates])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.skipif(PEER_IS_BEHIND, reason="the peer loses its virtual tokens, or repeats them, with this transformers")
def test_generation(kind: Kind, form: Form, beams: int, tmp_path: Path) -> None:
    model = adapted(kind, form, **given(kind))
    model.save_pretrained(tmp_path)
    peer = peer_loaded(kind.base(), tmp_path)
    batch = {name: value for name, value in masked(kind).items() if name != "decoder_input_ids"}
    options: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    found, expected = model.generate(**batch, **options), peer.generate(**batch, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found.scores, expected.scores, strict=True))


def test_answer_of_reads_spans() -> None:
    spans = {"start_logits": torch.zeros(2, 3), "end_logits": torch.ones(2, 3)}
    assert answer_of(spans).shape == (2, 3, 2)
