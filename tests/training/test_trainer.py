"""transformers' Trainer with our models: what it saves, loads, groups and reads off the base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch.utils.data import Dataset

import peanut
from peanut import LoraConfig, PeanutConfig, PeanutError, PeftModel, get_peft_model
from peanut.training.trainer import AdapterTrainerMixin, Trainer, whole_checkpoints

Builder = Callable[..., hf.PreTrainedModel]


class Rows(Dataset[dict[str, Any]]):
    """48 sequences of random tokens; the label is whether the first one is large."""

    def __init__(self, language: bool = False) -> None:
        tokens = torch.randint(3, 100, (48, 8), generator=torch.Generator().manual_seed(0))
        self.rows = [{"input_ids": row, "labels": row if language else (row[0] > 50).long()} for row in tokens]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def arguments(folder: Path, **options: Any) -> hf.TrainingArguments:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    return hf.TrainingArguments(str(folder), **defaults | options)


def classifier(tiny_bert: Builder, **config: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(tiny_bert(), PeanutConfig(task_type="SEQ_CLS", r=4, **config))


def trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_it_is_a_public_name() -> None:
    assert peanut.Trainer is Trainer


def test_a_checkpoint_holds_the_adapter_and_the_head_and_never_the_base(tiny_bert: Builder, tmp_path: Path) -> None:
    model = classifier(tiny_bert)
    Trainer(model, arguments(tmp_path), train_dataset=Rows()).train()
    folder = tmp_path / "checkpoint-6"
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainer_state.json",
    }
    again = PeftModel.from_pretrained(tiny_bert(), folder, is_trainable=True)
    saved = trained(again)
    assert any("classifier" in name for name in saved)
    assert saved.keys() == trained(model).keys()
    for name, value in trained(model).items():
        assert torch.equal(saved[name], value)
    size = sum(value.numel() * value.element_size() for value in saved.values())
    assert (folder / "adapter_model.safetensors").stat().st_size < size + 8192


def test_resuming_is_exact(tiny_bert: Builder, tmp_path: Path) -> None:
    dropout = {"dropout": 0.2}
    whole = classifier(tiny_bert, **dropout)
    options = {"lr_scheduler_type": "cosine", "warmup_steps": 1, "gradient_accumulation_steps": 2, "max_steps": 4}
    Trainer(whole, arguments(tmp_path / "a", **options), train_dataset=Rows(), head_learning_rate=3e-2).train()
    resumed = classifier(tiny_bert, **dropout)
    trainer = Trainer(resumed, arguments(tmp_path / "b", **options), train_dataset=Rows(), head_learning_rate=3e-2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    for name, value in trained(whole).items():
        assert torch.equal(trained(resumed)[name], value), name
    start = classifier(tiny_bert, **dropout)
    assert not any(torch.equal(value, trained(whole)[name]) for name, value in trained(start).items())


def test_the_best_checkpoint_comes_back(tiny_bert: Builder, tmp_path: Path) -> None:
    model = classifier(tiny_bert)
    values = iter([0.5, 0.9, 0.1])
    args = arguments(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer = Trainer(
        model, args, train_dataset=Rows(), eval_dataset=Rows(), compute_metrics=lambda _: {"score": next(values)}
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best = trained(PeftModel.from_pretrained(tiny_bert(), tmp_path / "checkpoint-4", is_trainable=True))
    last = trained(PeftModel.from_pretrained(tiny_bert(), tmp_path / "checkpoint-6", is_trainable=True))
    for name, value in trained(model).items():
        assert torch.equal(best[name], value)
        assert not torch.equal(last[name], value)


def test_all_adapters_of_a_model_are_saved_and_come_back(tiny_llama: Builder, tmp_path: Path) -> None:
    def build() -> PeftModel:
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), PeanutConfig(task_type="CAUSAL_LM", r=4))
        model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=2))
        model.set_adapter(["default", "other"])
        return model

    model = build()
    Trainer(model, arguments(tmp_path, max_steps=4), train_dataset=Rows(language=True)).train()
    assert (tmp_path / "checkpoint-4/other/adapter_model.safetensors").is_file()
    resumed = build()
    trainer = Trainer(resumed, arguments(tmp_path / "b", max_steps=4), train_dataset=Rows(language=True))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.active_adapters == ["default", "other"]
    for name, value in trained(model).items():
        assert torch.equal(trained(resumed)[name], value), name


def test_head_adapter_and_biases_have_groups_of_their_own(tiny_bert: Builder, tmp_path: Path) -> None:
    model = classifier(tiny_bert)
    trainer = Trainer(model, arguments(tmp_path, weight_decay=0.1), train_dataset=Rows(), head_learning_rate=0.5)
    groups = trainer.create_optimizer().param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    found = [({names[id(p)].rpartition(".")[2] for p in g["params"]}, g["lr"], g["weight_decay"]) for g in groups]
    assert found == [({"weight"}, 1e-2, 0.1), ({"weight"}, 0.5, 0.1), ({"bias"}, 0.5, 0.0)]
    assert ["classifier" in names[id(g["params"][0])] for g in groups] == [False, True, True]
    assert sum(len(g["params"]) for g in groups) == len(trained(model))


def test_one_learning_rate_if_no_other_is_given(tiny_bert: Builder, tmp_path: Path) -> None:
    trainer = Trainer(classifier(tiny_bert), arguments(tmp_path), train_dataset=Rows())
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == {1e-2}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_transformers_reads_off_a_model_it_reads_off_the_base(
    tiny_llama: Builder, tmp_path: Path, smoothing: float
) -> None:
    plain = hf.Trainer(tiny_llama(), arguments(tmp_path, label_smoothing_factor=smoothing))
    model = get_peft_model(tiny_llama(), PeanutConfig(task_type="CAUSAL_LM", r=4))
    ours = Trainer(model, arguments(tmp_path, label_smoothing_factor=smoothing))
    for trainer in (plain, ours):
        trainer._set_signature_columns_if_needed()
    for name in ("label_names", "can_return_loss", "model_accepts_loss_kwargs", "_loss_shifts_labels"):
        assert getattr(ours, name) == getattr(plain, name), name
    assert set(ours._signature_columns) == set(plain._signature_columns)  # type: ignore[call-overload]
    batch = torch.utils.data.default_collate([Rows(language=True)[i] for i in range(4)])
    count = torch.tensor(28)
    losses = [t.compute_loss(t.model, dict(batch), num_items_in_batch=count) for t in (plain, ours)]
    torch.testing.assert_close(losses[1], losses[0])


def test_a_quantised_base_is_trained_through_its_adapter(tiny_llama: Builder, tmp_path: Path) -> None:
    base = tiny_llama()
    base.is_quantized = True
    base.hf_quantizer = SimpleNamespace(is_trainable=True, is_qat_trainable=False)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="purely quantized"):
        hf.Trainer(base, arguments(tmp_path))
    Trainer(get_peft_model(base, PeanutConfig(task_type="CAUSAL_LM", r=4)), arguments(tmp_path))


def test_gradient_checkpointing_changes_nothing(tiny_llama: Builder, tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llama(), PeanutConfig(task_type="CAUSAL_LM", r=4))
        args = arguments(tmp_path / str(checkpointing), max_steps=2, activation_checkpointing=checkpointing)
        Trainer(model, args, train_dataset=Rows(language=True)).train()
        results.append(trained(model))
    torch.testing.assert_close(results[1], results[0])
    assert results[0]


def test_the_mixin_goes_before_other_trainers(tiny_bert: Builder, tmp_path: Path) -> None:
    class Mixed(AdapterTrainerMixin, hf.Seq2SeqTrainer):
        pass

    args = hf.Seq2SeqTrainingArguments(**arguments(tmp_path, max_steps=2).to_dict())
    Mixed(classifier(tiny_bert), args, train_dataset=Rows()).train()
    assert [folder.name for folder in whole_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert not list(tmp_path.rglob("model.safetensors"))


def test_a_model_without_adapters_is_treated_as_ever(tiny_bert: Builder, tmp_path: Path) -> None:
    model = tiny_bert()
    Trainer(model, arguments(tmp_path, max_steps=2), train_dataset=Rows()).train()
    assert (tmp_path / "checkpoint-2/model.safetensors").is_file()
    other = tiny_bert()
    Trainer(other, arguments(tmp_path / "b", max_steps=2), train_dataset=Rows()).train(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_full_disk_leaves_no_half_checkpoint(
    tiny_bert: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Any] = []
    write = torch.save

    def full(value: Any, path: Any) -> None:
        saved.append(path)
        if len(saved) > 4:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(value, path)

    monkeypatch.setattr(torch, "save", full)
    trainer = Trainer(classifier(tiny_bert), arguments(tmp_path), train_dataset=Rows())
    with pytest.raises(PeanutError, match=r"cannot write the checkpoint .*checkpoint-4.*No space left on device"):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_diverged_adapter_is_not_saved(tiny_bert: Builder, tmp_path: Path) -> None:
    model = classifier(tiny_bert)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=Rows())
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(PeanutError, match="not finite"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
