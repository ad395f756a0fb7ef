"""What the library does around a forward: labels, positions, outputs, errors, and training by Trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import Trainer as PlainTrainer
from transformers import TrainingArguments

import peanut
from peanut import PeanutError, PeftModel, get_peft_model
from peanut.model.adapters.adapter_set import AdapterSet

from .prompts import FORMS, KINDS, LABELS, Form, Kind, adapted, answer, moved, own
from .support import CACHE, distance, one_thread, refused, same_bits  # noqa: F401


def kind_of(name: str) -> Kind:
    return next(kind for kind in KINDS if str(kind) == name)


def form_of(name: str) -> Form:
    return next(form for form in FORMS if str(form) == name)


BERT, LLAMA, T5 = map(kind_of, ("BertForSequenceClassification", "LlamaForCausalLM", "T5ForConditionalGeneration"))
PROMPT, PREFIX, CPT = map(form_of, ("PROMPT_TUNING", "PREFIX_TUNING", "CPT"))
BOTH = pytest.mark.parametrize("form", [PROMPT, PREFIX], ids=str)


@BOTH
def test_loss_of_a_language_model_is_over_the_users_tokens(form: Form) -> None:
    model, batch = adapted(LLAMA, form), LLAMA.batch(labels=True)
    batch["labels"][0, :3] = -100
    with torch.no_grad():
        output = model(**batch)
    logits = own(output["logits"], LLAMA, 6)[:, :-1]
    expected = F.cross_entropy(logits.double().transpose(1, 2), batch["labels"][:, 1:])
    if form is PROMPT:  # the last virtual token answers with the first token of the user
        first = F.cross_entropy(output["logits"][:, 2].double(), batch["labels"][:, 0], reduction="none")
        counts = (batch["labels"][:, 1:] != -100).sum()
        kept = batch["labels"][:, 0] != -100
        expected = (expected * counts + first[kept].sum()) / (counts + kept.sum())
    assert distance(output["loss"], expected) < 1e-6


@BOTH
def test_token_classification(form: Form) -> None:
    kind = kind_of("BertForTokenClassification")
    model, batch = adapted(kind, form), kind.batch(labels=True)
    batch["labels"][1, 2:] = -100
    with torch.no_grad():
        output = model(**batch)
        pairs = model(**batch, return_dict=False)
    assert output["logits"].shape == (3, 6, LABELS)
    assert distance(output["loss"], F.cross_entropy(output["logits"].double().transpose(1, 2), batch["labels"])) < 1e-6
    assert same_bits(pairs[1], output["logits"])


@BOTH
def test_question_answering(form: Form) -> None:
    kind = kind_of("BertForQuestionAnswering")
    model, batch = adapted(kind, form), kind.batch(labels=True)
    with torch.no_grad():
        output = model(**batch)
    assert output["start_logits"].shape == output["end_logits"].shape == (3, 6)
    alone = answer(model, {"input_ids": batch["input_ids"]})
    assert same_bits(alone[..., 0], output["start_logits"])
    if form is PREFIX:
        losses = [F.cross_entropy(output[f"{end}_logits"], batch[f"{end}_positions"]) for end in ("start", "end")]
        assert distance(output["loss"], sum(losses) / 2) < 1e-6
    else:  # the softmax is over the virtual tokens too: as the base has it for tokens in their place
        rows = model.get_base_model().get_input_embeddings().weight[[7, 8, 9]].detach()
        dict(AdapterSet.of(model).parameters("default"))["/prompt_embeddings"].data.copy_(rows)
        longer = {"input_ids": torch.cat([torch.tensor([7, 8, 9]).expand(3, -1), batch["input_ids"]], dim=1)}
        longer |= {f"{end}_positions": batch[f"{end}_positions"] + 3 for end in ("start", "end")}
        head = model.get_base_model().qa_outputs.modules_to_save["default"]
        base = kind.base()
        base.qa_outputs.load_state_dict(head.state_dict())
        with torch.no_grad():
            assert distance(model(**batch)["loss"], base(**longer)["loss"]) < 1e-6


@pytest.mark.parametrize("kind", [LLAMA, BERT, T5, kind_of("GPT2LMHeadModel")], ids=str)
def test_virtual_tokens_that_are_real_ones(kind: Kind) -> None:
    """Prompt embeddings that are those of tokens change the answer as these tokens do."""
    model = get_peft_model(kind.base(), PROMPT.config(kind, task_type=None)).eval()
    ids = torch.tensor([7, 8, 9])
    rows = model.get_base_model().get_input_embeddings().weight[ids].detach()
    with torch.no_grad():
        dict(AdapterSet.of(model).parameters("default"))["/prompt_embeddings"][:3].copy_(rows)
    batch = kind.batch()
    longer = {**batch, "input_ids": torch.cat([ids.expand(3, -1), batch["input_ids"]], dim=1)}
    assert distance(answer(model, batch), answer(kind.base(), longer)) < 1e-6


@BOTH
def test_position_ids_that_are_given(form: Form) -> None:
    model, batch = adapted(LLAMA, form), LLAMA.batch()
    places = torch.arange(6).expand(3, -1)
    assert distance(answer(model, {**batch, "position_ids": places}), answer(model, batch)) < 1e-6
    assert distance(answer(model, {**batch, "position_ids": places + torch.arange(6)}), answer(model, batch)) > 1e-3


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
@BOTH
def test_positions_and_types_of_an_encoder(form: Form, name: str) -> None:
    kind = kind_of(name)
    model, batch = adapted(kind, form), kind.batch()
    first = 2 if name.startswith("Roberta") else 0
    given = {**batch, "position_ids": (first + torch.arange(6)).expand(3, -1)}
    assert distance(answer(model, given), answer(model, batch)) < 1e-6
    types = torch.zeros(3, 6, dtype=torch.long)
    assert distance(answer(model, {**batch, "token_type_ids": types}), answer(model, batch)) < 1e-6
    if name.startswith("Bert"):
        assert distance(answer(model, {**batch, "token_type_ids": types + 1}), answer(model, batch)) > 1e-4


def test_heads_have_the_peers_keys(tmp_path: Path) -> None:
    adapted(BERT, PROMPT).save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert keys == {"prompt_embeddings", "base_model.classifier.weight", "base_model.classifier.bias"}


# Errors


@BOTH
@pytest.mark.parametrize("name", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_too_long_a_text_is_refused(name: str, form: Form) -> None:
    kind = kind_of(name)
    model = adapted(kind, form)
    answer(model, kind.batch(1, 61))
    with pytest.raises(PeanutError, match="3 virtual tokens and 62 tokens; expected at most 64"):
        answer(model, kind.batch(1, 62))
    answer(model, kind.batch(1, 5))  # nothing is left of it


@BOTH
def test_a_cache_of_fixed_size_is_refused(form: Form) -> None:
    model = adapted(LLAMA, form)
    with pytest.raises(PeanutError, match="leave cache_implementation open"):
        model.generate(LLAMA.batch()["input_ids"], max_new_tokens=3, cache_implementation="static")
    assert model.generate(LLAMA.batch()["input_ids"], max_new_tokens=3).shape[1] > 6


@pytest.mark.parametrize("name", ["MPNetForSequenceClassification", "DistilBertForSequenceClassification"])
def test_a_prefix_where_nothing_reads_it_is_refused(name: str) -> None:
    base = kind_of(name).base()
    with refused(base, "never given keys and values.*use prompt tuning or P-tuning"):
        get_peft_model(base, PREFIX.config(kind_of(name)))


@BOTH
def test_a_model_of_images_is_refused(form: Form) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    base = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))
    with refused(base, "has no embeddings of tokens.*changes weights or outputs"):
        get_peft_model(base, form.config(LLAMA, task_type=None))


@BOTH
def test_a_plain_module_is_refused(form: Form) -> None:
    base = torch.nn.Linear(3, 3)
    with refused(base, "nothing tells where it reads tokens.*weights or outputs$"):
        get_peft_model(base, form.config(LLAMA, task_type=None))
    around = torch.nn.ModuleDict({"inner": LLAMA.base()})
    with refused(around, "a ModuleDict, of which nothing tells where it reads tokens.*or adapt its part 'inner'"):
        get_peft_model(around, form.config(LLAMA, task_type=None))


def test_a_cache_begun_without_the_adapter_is_refused() -> None:
    model, ids = adapted(LLAMA, PROMPT), LLAMA.batch()["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        cache = model(ids)[CACHE]
    mask = torch.ones(3, 7, dtype=torch.long)
    with pytest.raises(PeanutError, match="begin the cache with the adapter active"):
        model(ids[:, :1], attention_mask=mask, **{CACHE: cache})


def test_a_broken_run_leaves_nothing_behind() -> None:
    model, batch = adapted(LLAMA, PROMPT), LLAMA.batch()
    expected = answer(LLAMA.base(), batch)
    stopped = model.get_base_model().get_input_embeddings().register_forward_pre_hook(_stop)
    with pytest.raises(RuntimeError, match="stopped"):
        answer(model, batch)
    stopped.remove()
    with model.disable_adapter():
        assert same_bits(answer(model, batch), expected)


def _stop(*_: Any) -> None:
    raise RuntimeError("stopped")


# Training


class Rows(Dataset[dict[str, Tensor]]):
    """The rows of a batch."""

    def __init__(self, kind: Kind, rows: int = 8) -> None:
        self.batch = kind.batch(rows, labels=True)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: value[row] for name, value in self.batch.items()}


def trained(kind: Kind, form: Form, folder: Path, trainer: Any, steps: int, resume: bool = False) -> PeftModel:
    torch.manual_seed(3)
    model = moved(get_peft_model(kind.base(), form.config(kind)))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    made = trainer(model=model, args=arguments, train_dataset=Rows(kind))
    if steps < 4:
        made.add_callback(_StopAt(steps))
    made.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert losses
    assert min(losses) < losses[0] or steps < 4
    return model.eval()


class _StopAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


TRAINED = [(BERT, PROMPT), (LLAMA, PREFIX), (LLAMA, form_of("P_TUNING-LSTM")), (LLAMA, CPT)]


@pytest.mark.parametrize(
    ("kind", "form", "trainer"),
    [
        *((kind, form, trainer) for kind, form in TRAINED for trainer in (PlainTrainer, peanut.Trainer)),
        (T5, form_of("P_TUNING-MLP"), peanut.Trainer),  # transformers' own saves no wrapped model with tied weights
    ],
    ids=lambda value: value.__module__.split(".")[0] if isinstance(value, type) else str(value),
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_trainers_and_going_on(kind: Kind, form: Form, trainer: Any, tmp_path: Path) -> None:
    whole = trained(kind, form, tmp_path / "whole", trainer, 4)
    trained(kind, form, tmp_path / "parts", trainer, 2)
    again = trained(kind, form, tmp_path / "parts", trainer, 4, resume=True)
    assert distance(answer(again, kind.batch()), answer(whole, kind.batch())) < 1e-6
