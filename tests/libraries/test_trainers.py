"""transformers' own Trainer and Seq2SeqTrainer, with Hugging Face PEFT installed beside this library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor

import peanut
from peanut import LoraConfig, PeanutConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig

from ..support import distance, one_thread, randomised  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and of what it imports

Builder = Callable[..., hf.PreTrainedModel]
Fit = Callable[..., hf.Trainer]

CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "LORA": lambda: LoraConfig(r=4, task_type="CAUSAL_LM"),
    "PEANUT": lambda: PeanutConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
    "PROMPT_TUNING": lambda: PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": lambda: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}
every_config = pytest.mark.parametrize("name", CONFIGS)
weight_methods = pytest.mark.parametrize("name", ["LORA", "PEANUT"])


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight rows of six tokens, each its own label."""

    ids = torch.randint(3, 101, (8, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        row = self.ids[number]
        return {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    """``fit(model, max_steps=4)``: a Trainer of transformers, ready to train."""

    def build(model: Any, kind: str = "", folder: str = "run", **options: Any) -> hf.Trainer:
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / folder),
            "report_to": [],
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "use_cpu": True,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "disable_tqdm": True,
        }
        arguments = getattr(hf, f"{kind}TrainingArguments")(**settings | options)
        trainer: hf.Trainer = getattr(hf, f"{kind}Trainer")(
            model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows()
        )
        return trainer

    return build


def losses(trainer: hf.Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def adapted(base: hf.PreTrainedModel, config: PeftConfig) -> PeftModel:
    torch.manual_seed(1)
    return peanut.get_peft_model(base, config)


def assert_only_adapters(folder: Path) -> None:
    found = [*folder.rglob("*.safetensors"), *folder.rglob("*model*.bin")]
    assert {path.name for path in found} == {"adapter_model.safetensors"}
    assert (folder / "adapter_config.json").is_file()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(Rows.ids).logits
    return found


@every_config
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_checkpoint_holds_the_adapter_alone(name: str, tied: bool, tiny_llama: Builder, fit: Fit) -> None:
    model = adapted(tiny_llama(tie_word_embeddings=tied), CONFIGS[name]())
    trainer = fit(model)
    trainer.train()
    folder = Path(str(trainer.args.output_dir)) / "checkpoint-2"
    assert_only_adapters(folder)
    again = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=tied), folder)
    assert torch.equal(logits(again), logits(model))
    assert distance(logits(model)[:, -6:], logits(tiny_llama(tie_word_embeddings=tied))) > 1e-4  # behind the prompt


@every_config
def test_resumed_training_is_as_if_never_interrupted(name: str, tiny_llama: Builder, fit: Fit) -> None:
    whole = fit(adapted(tiny_llama(), CONFIGS[name]()), folder="whole", max_steps=4)
    whole.train()
    first = fit(adapted(tiny_llama(), CONFIGS[name]()))
    first.train()
    resumed = fit(adapted(tiny_llama(), CONFIGS[name]()), max_steps=4)
    resumed.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-2")
    assert len(losses(whole)) == 4
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)


@weight_methods
def test_labels_are_shifted_and_smoothed_as_for_the_peer(name: str, tiny_llama: Builder, fit: Fit) -> None:
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, task_type="CAUSAL_LM"))
    expected = fit(theirs, label_smoothing_factor=0.1).evaluate()["eval_loss"]
    model = adapted(tiny_llama(), CONFIGS[name]())
    assert fit(model, label_smoothing_factor=0.1).evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert fit(model).evaluate()["eval_loss"] != pytest.approx(expected, rel=1e-4)


@weight_methods
def test_the_best_model_is_loaded_at_the_end(name: str, tiny_llama: Builder, fit: Fit) -> None:
    """Called the best here is the highest loss, so that it is not the last one."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3, "greater_is_better": True}
    trainer = fit(adapted(tiny_llama(), CONFIGS[name]()), load_best_model_at_end=True, **options)
    trainer.train()
    found = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(found) == 3
    assert max(found) > found[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(found), rel=1e-7)


@weight_methods
def test_t5_generates_in_evaluation(name: str, fit: Fit) -> None:
    config = hf.T5Config(
        vocab_size=101, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    kind = LoraConfig if name == "LORA" else PeanutConfig
    model = adapted(
        hf.T5ForConditionalGeneration(config), kind(r=4, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    )
    trainer = fit(model, "Seq2Seq", predict_with_generate=True, generation_max_length=20, label_smoothing_factor=0.1)

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:  # as DataCollatorForSeq2Seq does
        batch: dict[str, Tensor] = hf.default_data_collator(rows)
        return batch | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}

    trainer.data_collator = collate
    trainer.train()
    assert len(losses(trainer)) == 2
    predicted = trainer.predict(Rows())  # type: ignore[arg-type]
    generated = model.eval().generate(input_ids=Rows.ids, attention_mask=torch.ones_like(Rows.ids), max_length=20)
    assert (predicted.predictions[:, : generated.shape[1]] == generated.numpy()).all()  # behind it is padding
    assert predicted.label_ids is not None
    assert (predicted.label_ids[:, :6] == Rows.ids.numpy()).all()
    assert_only_adapters(Path(str(trainer.args.output_dir)) / "checkpoint-2")


@weight_methods
def test_a_four_bit_base_trains(name: str, tiny_llama: Builder, fit: Fit, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantised = hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantised)
    with pytest.raises(ValueError, match="purely quantized"):
        fit(base)
    model = adapted(peanut.prepare_model_for_kbit_training(base), CONFIGS[name]())
    trainer = fit(model, max_steps=4, save_steps=4)
    trainer.train()
    assert len(losses(trainer)) == 4
    assert_only_adapters(Path(str(trainer.args.output_dir)) / "checkpoint-4")


@weight_methods
def test_a_compiled_model_trains_to_the_same_losses(name: str, tiny_llama: Builder, fit: Fit) -> None:
    plain = fit(adapted(tiny_llama(), CONFIGS[name]()), folder="plain")
    plain.train()
    torch.compiler.reset()
    options = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer = fit(adapted(tiny_llama(), CONFIGS[name]()), **options)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-5)
    assert_only_adapters(Path(str(trainer.args.output_dir)) / "checkpoint-2")


def test_several_adapters_are_saved_and_resumed(tiny_llama: Builder, fit: Fit) -> None:
    def start(steps: int) -> hf.Trainer:
        model = adapted(tiny_llama(), CONFIGS["LORA"]())
        model.add_adapter("other", CONFIGS["PEANUT"]())
        model.set_adapter("other")
        return fit(model, max_steps=steps)

    first = start(2)
    first.train()
    folder = Path(str(first.args.output_dir)) / "checkpoint-2"
    assert_only_adapters(folder)
    assert (folder / "other" / "adapter_model.safetensors").is_file()
    resumed = start(3)
    resumed.train(resume_from_checkpoint=str(folder))
    assert len(losses(resumed)) == 3
    assert losses(resumed)[:2] == losses(first)
    assert resumed.model.active_adapter == "other"
    trained = {each for each, value in resumed.model.named_parameters() if value.requires_grad}
    assert trained
    assert all(".other." in each for each in trained)
