"""What transformers' own Trainer makes of our models: the loss, smoothed or not, and the labels are the base's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from peanut import (
    CPTConfig,
    LoraConfig,
    PeanutError,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peanut.training.trainer import Trainer

Builder = Callable[..., hf.PreTrainedModel]
Batch = dict[str, Tensor]

X = torch.randint(3, 90, (4, 8), generator=torch.Generator().manual_seed(0))
PADDED = X.masked_fill(torch.arange(8) > 5, -100)
KINDS: dict[str, tuple[str, type[hf.PreTrainedModel], str, Batch]] = {
    "causal": ("tiny_llama", hf.LlamaForCausalLM, "CAUSAL_LM", {"input_ids": X, "labels": PADDED}),
    "old causal": ("tiny_gpt2", hf.GPT2LMHeadModel, "CAUSAL_LM", {"input_ids": X, "labels": PADDED}),
    "encoder-decoder": (
        "tiny_t5",
        hf.T5ForConditionalGeneration,
        "SEQ_2_SEQ_LM",
        {"input_ids": X, "labels": PADDED, "decoder_input_ids": X},
    ),
    "classes": ("tiny_bert", hf.BertForSequenceClassification, "SEQ_CLS", {"input_ids": X, "labels": X[:, 0] % 2}),
    "tokens": ("tiny_bert", hf.BertForTokenClassification, "TOKEN_CLS", {"input_ids": X, "labels": X % 2}),
    "questions": (
        "tiny_bert",
        hf.BertForQuestionAnswering,
        "QUESTION_ANS",
        {"input_ids": X, "start_positions": X[:, 0] % 8, "end_positions": X[:, 1] % 8},
    ),
}


@pytest.fixture
def tiny_t5() -> Builder:
    sizes = {"vocab_size": 101, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return lambda kind: kind(hf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


def trainer(model: nn.Module, folder: Path, smoothing: float = 0.0, kind: type[hf.Trainer] = hf.Trainer) -> hf.Trainer:
    arguments = hf.Seq2SeqTrainingArguments if kind is hf.Seq2SeqTrainer else hf.TrainingArguments
    options = {"label_smoothing_factor": smoothing, "use_cpu": True, "report_to": "none"}
    return kind(model, arguments(str(folder), **options))  # type: ignore[arg-type]


def losses(of: hf.Trainer, batch: Batch) -> list[Tensor]:
    """The loss of a training step, of the half of a step of two batches, and of an evaluation."""
    assert of.model is not None
    of.model.eval()  # no dropout
    found = [
        of.compute_loss(
            of.model, dict(batch), num_items_in_batch=of._get_num_items_in_batch(batches, torch.device("cpu"))
        )
        for batches in ([batch], [batch, batch])
    ]
    return [*found, of.prediction_step(of.model, dict(batch), prediction_loss_only=True)[0]]  # type: ignore[list-item]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", [hf.Trainer, hf.Seq2SeqTrainer, Trainer])
@pytest.mark.parametrize("name", KINDS)
def test_a_loss_is_the_bases(
    name: str, kind: type[hf.Trainer], smoothing: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    fixture, model_class, task, batch = KINDS[name]
    build: Builder = request.getfixturevalue(fixture)
    torch.manual_seed(0)
    base = build(model_class)
    plain = trainer(base, tmp_path, smoothing)
    expected = losses(plain, batch)
    ours = trainer(get_peft_model(base, LoraConfig(r=2, task_type=task)), tmp_path, smoothing, kind)
    torch.testing.assert_close(losses(ours, batch), expected)
    for what in ("label_names", "can_return_loss", "model_accepts_loss_kwargs", "_loss_shifts_labels"):
        assert getattr(ours, what) == getattr(plain, what), what


def test_a_smoothed_causal_loss_compares_each_logit_with_the_next_token(tiny_llama: Builder, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, init_lora_weights=False)).eval()
    logs = model(X).logits[:, :-1].log_softmax(-1)
    kept = PADDED[:, 1:] != -100
    nll = -logs.gather(-1, X[:, 1:, None])[..., 0][kept].mean()
    expected = 0.9 * nll - 0.1 * logs.mean(-1)[kept].mean()
    found = losses(trainer(model, tmp_path, 0.1), {"input_ids": X, "labels": PADDED})
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[2], expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_compiled_model_has_the_same_loss_in_our_trainer(
    tiny_llama: Builder, tmp_path: Path, smoothing: float
) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, init_lora_weights=False))
    batch = {"input_ids": X, "labels": PADDED}
    expected = losses(trainer(model, tmp_path, smoothing, Trainer), batch)
    compiled: Any = torch.compile(model, disable=True)  # the wrapper alone is what Trainers see
    torch.testing.assert_close(losses(trainer(compiled, tmp_path, smoothing, Trainer), batch), expected)
    model.compile(disable=True)  # in place: transformers' own Trainer sees what it is
    torch.testing.assert_close(losses(trainer(model, tmp_path, smoothing), batch), expected)


@pytest.mark.parametrize("kind", [hf.Trainer, Trainer])
def test_behind_virtual_tokens_every_label_counts(tiny_llama: Builder, tmp_path: Path, kind: type[hf.Trainer]) -> None:
    """The last virtual token predicts the first label, so a batch's loss is the mean over one more label a row."""
    model = get_peft_model(tiny_llama(), PromptTuningConfig(num_virtual_tokens=3)).eval()
    whole, half, seen = losses(trainer(model, tmp_path, 0.0, kind), {"input_ids": X, "labels": PADDED})
    own = model(X, labels=PADDED).loss
    torch.testing.assert_close([whole, half, seen], [own, own / 2, own])
    logs = model(X).logits[:, 2:-1].log_softmax(-1)
    torch.testing.assert_close(own, -logs.gather(-1, X[..., None])[..., 0][PADDED != -100].mean())
    smoothed = losses(trainer(model, tmp_path, 0.1, Trainer), {"input_ids": X, "labels": PADDED})[0]
    torch.testing.assert_close(smoothed, 0.9 * own - 0.1 * logs.mean(-1)[PADDED != -100].mean())


PROMPTS: dict[str, PeftConfig] = {
    "CPT": CPTConfig(cpt_token_ids=[3, 4, 5]),
    "PROMPT_TUNING": PromptTuningConfig(num_virtual_tokens=3),
    "P_TUNING": PromptEncoderConfig(num_virtual_tokens=3),
    "PREFIX_TUNING": PrefixTuningConfig(num_virtual_tokens=3),
}


@pytest.mark.parametrize("name", ["PROMPT_TUNING", "P_TUNING"])
@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2"])
def test_labels_behind_virtual_tokens_are_smoothed_by_our_trainer_alone(
    build: str, name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, batch = get_peft_model(request.getfixturevalue(build)(), PROMPTS[name]), {"input_ids": X, "labels": PADDED}
    found = losses(trainer(model, tmp_path, 0.1, Trainer), batch)
    logs, rows = model(X).logits[:, 2:-1].log_softmax(-1), PADDED != -100
    nll = -logs.gather(-1, X[..., None])[..., 0][rows].mean()
    torch.testing.assert_close(found[2], 0.9 * nll - 0.1 * logs.mean(-1)[rows].mean())
    with pytest.raises(PeanutError, match=r"^label smoothing in Trainer of 8 labels a row, and 11 logits: "):
        losses(trainer(model, tmp_path, 0.1), batch)


@pytest.mark.parametrize("build", ["tiny_llama", "tiny_gpt2"])
def test_labels_behind_a_prefix_are_smoothed_by_both_trainers(
    build: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model = get_peft_model(request.getfixturevalue(build)(), PROMPTS["PREFIX_TUNING"])
    found, expected = (
        losses(trainer(model, tmp_path, 0.1, kind), {"input_ids": X, "labels": PADDED})
        for kind in (Trainer, hf.Trainer)
    )
    torch.testing.assert_close(found, expected)


def test_a_loss_of_its_own_is_not_smoothed(tiny_llama: Builder, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), PROMPTS["CPT"])
    with pytest.raises(PeanutError, match=r"^label_smoothing_factor=0\.1 for 'default', which has a loss of its own"):
        trainer(model, tmp_path, 0.1, Trainer)
    with pytest.raises(PeanutError, match=r"^label smoothing in Trainer of 8 labels a row, and 11 logits: "):
        losses(trainer(model, tmp_path, 0.1), {"input_ids": X, "labels": PADDED})


@pytest.mark.parametrize("config", list(PROMPTS.values())[1:], ids=list(PROMPTS)[1:])
def test_a_decoder_that_is_given_nothing_says_so_itself(tiny_t5: Builder, config: PeftConfig, tmp_path: Path) -> None:
    base = tiny_t5(hf.T5ForConditionalGeneration)
    batch = {"input_ids": X, "labels": PADDED}  # a Trainer that smooths them takes the labels out
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        losses(trainer(base, tmp_path, 0.1), batch)
    model = get_peft_model(base, config)
    for kind in (hf.Trainer, Trainer):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            losses(trainer(model, tmp_path, 0.1, kind), batch)
    batch["decoder_input_ids"] = X
    assert all(loss.isfinite() for loss in losses(trainer(model, tmp_path, 0.1), batch))


def test_the_name_that_is_printed_is_ours(tiny_llama: Builder) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2))
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert isinstance(model, PeftModel)
    assert repr(model).startswith("PeftModelForCausalLM(\n  (base_model): LoraModel(\n    (model): LlamaForCausalLM(")
    assert repr(nn.Sequential(model)).startswith("Sequential(\n  (0): PeftModelForCausalLM(")
