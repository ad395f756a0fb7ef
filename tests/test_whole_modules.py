"""Full and partial fine-tuning: modules trained whole, beside the base that is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf

from peanut import FullConfig, PartialConfig, PeftConfig, PeftModel, get_peft_model

from .support import distance, one_thread, randomised, refused, same_bits  # noqa: F401

Builder = Callable[..., hf.PreTrainedModel]
TEXT = torch.randint(3, 101, (3, 9), generator=torch.Generator().manual_seed(0))


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_full_fine_tuning_trains_every_parameter_once(tiny_llama: Builder) -> None:
    base = tiny_llama(tie_word_embeddings=True)
    count = sum(parameter.numel() for parameter in base.parameters())
    model = get_peft_model(base, FullConfig(task_type="CAUSAL_LM"))
    assert model.get_nb_trainable_parameters() == (count, 2 * count)  # the base is kept
    model.train()
    model(input_ids=TEXT, labels=TEXT).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize(
    "config",
    [
        FullConfig(task_type="CAUSAL_LM"),
        PartialConfig(task_type="CAUSAL_LM", target_modules=["layers.1", "lm_head"]),
        PartialConfig(task_type="CAUSAL_LM", target_modules=["mlp", "self_attn"], layers_to_transform=[0]),
    ],
    ids=["full", "partial", "blocks"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_switched_saved_loaded_and_adopted(config: PeftConfig, tied: bool, tiny_llama: Builder, tmp_path: Path) -> None:
    def base() -> hf.PreTrainedModel:
        return tiny_llama(tie_word_embeddings=tied)

    plain = base()(TEXT).logits
    model = get_peft_model(base(), config).eval()
    assert same_bits(model(TEXT).logits, plain)
    randomised(model, scale=0.05)
    moved = model(TEXT).logits
    assert distance(moved, plain) > 0.02
    with model.disable_adapter():
        assert same_bits(model(TEXT).logits, plain)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    assert same_bits(again(TEXT).logits, moved)
    merged = again.merge_and_unload()
    assert same_bits(merged(TEXT).logits, moved)
    assert type(merged) is hf.LlamaForCausalLM
    if isinstance(config, FullConfig):
        assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


def test_partial_trains_what_is_named_and_nothing_else(tiny_bert: Builder) -> None:
    model = get_peft_model(tiny_bert(), PartialConfig(task_type="SEQ_CLS", target_modules=["encoder.layer.1"]))
    names = trained_names(model)
    assert all("encoder.layer.1." in name or ".classifier." in name for name in names)
    own = sum(p.numel() for p in tiny_bert().bert.encoder.layer[1].parameters())
    head = sum(p.numel() for p in tiny_bert().classifier.parameters())
    assert model.get_nb_trainable_parameters()[0] == own + head


def test_refusals(tiny_bert: Builder) -> None:
    model = tiny_bert()
    with refused(model, r"^PARTIAL without target_modules; expected names of modules to train whole; .*name some of"):
        get_peft_model(model, PartialConfig())
    with refused(model, r"target_modules names 'encodr', which no module"):
        get_peft_model(model, PartialConfig(target_modules=["encodr"]))
    with refused(model, r"^target_modules=\['query'\] for FULL, which changes no layer; leave it out"):
        get_peft_model(model, FullConfig(target_modules=["query"]))
