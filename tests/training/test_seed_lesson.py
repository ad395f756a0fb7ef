"""The training functions of a lesson on parameter-efficient fine-tuning: they run as written, but for the imports.

``Trainer`` comes from here too: transformers 5 no longer takes the lesson's ``tokenizer``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from peanut import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, TaskType, Trainer, get_peft_model

SIZES = {"lora": 2 * 16 * (64 + 48 + 48 + 64), "prefix": 20 * 2 * 2 * 16, "prompt": 20 * 32}


def setup_peft_training(model_name: str, method: str = "lora", output_dir: str = "./output") -> Any:
    """Setup various PEFT methods"""

    model = AutoModelForCausalLM.from_pretrained(model_name, torch_dtype=torch.float16, device_map="auto")

    tokenizer = AutoTokenizer.from_pretrained(model_name)

    # PEFT configuration
    if method == "lora":
        peft_config = LoraConfig(
            r=16,
            lora_alpha=32,
            target_modules=["q_proj", "v_proj", "k_proj", "o_proj"],
            lora_dropout=0.05,
            bias="none",
            task_type=TaskType.CAUSAL_LM,
        )
    elif method == "prefix":
        peft_config = PrefixTuningConfig(num_virtual_tokens=20, task_type=TaskType.CAUSAL_LM)
    elif method == "prompt":
        peft_config = PromptTuningConfig(
            num_virtual_tokens=20,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="Classify the sentiment of this text: ",
            tokenizer_name_or_path=model_name,
            task_type=TaskType.CAUSAL_LM,
        )

    model = get_peft_model(model, peft_config)
    model.print_trainable_parameters()

    return model, tokenizer


def train_with_peft(model: Any, tokenizer: Any, train_dataset: Any) -> None:
    """Train PEFT model"""

    training_args = TrainingArguments(
        output_dir="./peft-output",
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=2e-4,
        warmup_steps=100,
        logging_steps=10,
        save_strategy="epoch",
        fp16=True,
    )

    trainer = Trainer(model=model, args=training_args, train_dataset=train_dataset, tokenizer=tokenizer)

    trainer.train()

    # Save adapter (original model not needed)
    model.save_pretrained("./peft-adapter")


@pytest.mark.filterwarnings("ignore:.pin_memory.:UserWarning")  # transformers pins memory, accelerator or not
@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_the_lesson_trains(
    method: str,
    tiny_llm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)

    model, tokenizer = setup_peft_training(str(tiny_llm), method)

    assert f"trainable params: {SIZES[method]:,d} " in capsys.readouterr().out
    texts = ["A fine film, with a slow start and a good end." for _ in range(16)]
    rows = tokenizer(texts)
    dataset = Dataset.from_dict({**rows, "labels": rows["input_ids"]})
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    train_with_peft(model, tokenizer, dataset)
    after = dict(model.named_parameters())
    assert any(not torch.equal(value, after[name]) for name, value in before.items())

    base = hf.AutoModelForCausalLM.from_pretrained(tiny_llm, dtype=torch.float16)
    again = PeftModel.from_pretrained(base, tmp_path / "peft-adapter")
    ids = torch.tensor(rows["input_ids"][:1])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
