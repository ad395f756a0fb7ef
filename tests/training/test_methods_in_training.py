"""Schedules and penalties under transformers' Trainer, a plain loop and ``peanut train``, with no call by the user."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from peanut import (
    AdaLoraConfig,
    DiffPruningConfig,
    PeanutError,
    PeftConfig,
    PeftModel,
    VariationalLoraConfig,
    get_peft_model,
    inject_adapter_in_model,
    penalty,
    predictive,
)
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.training.run import train
from peanut.training.trainer import Trainer

from .test_trainer import Rows, arguments

Builder = Callable[..., hf.PreTrainedModel]
ADALORA: dict[str, Any] = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "task_type": "SEQ_CLS"}
PENALISED: list[PeftConfig] = [
    AdaLoraConfig(**ADALORA, total_step=6),
    VariationalLoraConfig(vb_r=4, task_type="SEQ_CLS"),
    DiffPruningConfig(task_type="SEQ_CLS"),
]
penalised = pytest.mark.parametrize("config", PENALISED, ids=lambda config: config.method)


def batch() -> dict[str, torch.Tensor]:
    rows = [Rows()[index] for index in range(8)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def ranks(model: PeftModel) -> int:
    """How many triplets AdaLoRA has left."""
    return sum(
        int((layer.values("default")["lora_E"] != 0).sum())
        for _, layer in model.adapters.layers("default")
        if "lora_E" in layer.values("default")
    )


@penalised
def test_the_loss_that_the_model_returns_holds_the_penalty(config: PeftConfig, tiny_bert: Builder) -> None:
    model = get_peft_model(tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), config).train()
    added = penalty(model)
    assert added is not None
    assert added.item() > 0
    torch.manual_seed(1)
    with_penalty = model(**batch()).loss
    torch.manual_seed(1)
    with model.adapters.state.during(penalising=False):
        without = model(**batch()).loss
    assert (with_penalty - without).item() == pytest.approx(added.item(), rel=1e-4)
    model.eval()
    with torch.no_grad():
        plain = tiny_bert()(**batch()).loss
    assert model(**batch()).loss.item() == pytest.approx(plain.item(), rel=1e-5)  # none in evaluation


@penalised
def test_an_injected_model_has_it_too_and_a_tuple_as_well(config: PeftConfig, tiny_bert: Builder) -> None:
    base = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = inject_adapter_in_model(config, base).train()
    added = penalty(model)
    assert added is not None
    torch.manual_seed(1)
    loss = model(**batch(), return_dict=False)[0]
    torch.manual_seed(1)
    with AdapterSet.of(model).state.during(penalising=False):
        assert (loss - model(**batch(), return_dict=False)[0]).item() == pytest.approx(added.item(), rel=1e-4)


def test_a_model_that_returns_no_loss_says_so(tiny_bert: Builder) -> None:
    model = get_peft_model(tiny_bert(), PENALISED[0]).train()
    inputs = batch()
    inputs.pop("labels")
    with pytest.warns(UserWarning, match=r"returned no loss, so the penalty of its adapters is not in it"):
        model(**inputs)


@pytest.mark.parametrize("own", [True, False], ids=["ours", "transformers'"])
def test_adaloras_schedule_under_a_trainer(own: bool, tiny_bert: Builder, tmp_path: Path) -> None:
    config = AdaLoraConfig(**ADALORA, total_step=None if own else 6)  # our Trainer knows how many steps there are
    model = get_peft_model(tiny_bert(), config)
    kind: Any = Trainer if own else hf.Trainer
    kind(model, arguments(tmp_path, save_strategy="no"), train_dataset=Rows()).train()
    layers = sum(1 for _ in model.adapters.layers("default"))
    assert ranks(model) == 2 * layers
    found = model.peft_config["default"]
    assert isinstance(found, AdaLoraConfig)
    assert found.total_step == 6


def test_adaloras_schedule_in_a_plain_loop(tiny_bert: Builder) -> None:
    model = get_peft_model(tiny_bert(), AdaLoraConfig(**ADALORA, total_step=6)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    left = []
    for _ in range(6):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
        left.append(ranks(model))
    layers = sum(1 for _ in model.adapters.layers("default"))
    assert left[0] == 6 * layers  # tinit
    assert left[-1] == 2 * layers
    assert left == sorted(left, reverse=True)
    assert left[2] < left[0]


def test_adalora_without_its_length_is_refused_in_training(tiny_bert: Builder) -> None:
    model = get_peft_model(tiny_bert(), AdaLoraConfig(**ADALORA)).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**batch()).loss.backward()
    with pytest.raises(PeanutError, match="total_step"):
        optimizer.step()


def test_another_optimizer_moves_no_schedule(tiny_bert: Builder) -> None:
    model = get_peft_model(tiny_bert(), AdaLoraConfig(**ADALORA, total_step=6)).train()
    other = torch.nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    _, layer = next(model.adapters.layers("default"))
    assert float(layer.values("default")["steps"]) == 0


@penalised
def test_resumed_training_ends_as_uninterrupted(config: PeftConfig, tiny_bert: Builder, tmp_path: Path) -> None:
    def start() -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(tiny_bert(), config)

    whole = start()
    Trainer(whole, arguments(tmp_path / "whole"), train_dataset=Rows()).train()
    first = Trainer(start(), arguments(tmp_path / "cut"), train_dataset=Rows())
    first.add_callback(_StopAt(4))
    first.train()
    model = start()
    Trainer(model, arguments(tmp_path / "cut"), train_dataset=Rows()).train(
        resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4")
    )
    expected, found = (dict(each.adapters.parameters("default")) for each in (whole, model))
    assert found.keys() == expected.keys() > set()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


class _StopAt(hf.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_the_penalty_is_in_the_loss_with_label_smoothing(tiny_bert: Builder, tmp_path: Path) -> None:
    config = AdaLoraConfig(**ADALORA, total_step=6, orth_reg_weight=1000.0)
    model = get_peft_model(tiny_bert(), config)
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=Rows())
    model.train()
    assert trainer.compute_loss(model, batch()).item() > 500
    model.eval()
    assert trainer.compute_loss(model, batch()).item() < 5


@pytest.mark.parametrize(
    "adapter",
    [
        {"peft_type": "ADALORA", "init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 1},
        {"peft_type": "VARIATIONAL_LORA", "vb_r": 4},
        {"peft_type": "DIFF_PRUNING"},
    ],
    ids=lambda adapter: adapter["peft_type"],
)
def test_peanut_train(adapter: dict[str, Any], run: dict[str, Any]) -> None:
    result = train(run | {"adapter": adapter})
    config = PeftConfig.from_pretrained(result.adapter)
    if isinstance(config, AdaLoraConfig):
        assert config.total_step == result.steps
    assert result.metrics["accuracy"] > 0


# Predictions of a random adapter


def test_predictive_mean_and_deviation(tiny_bert: Builder) -> None:
    model = get_peft_model(tiny_bert(), VariationalLoraConfig(vb_r=4, task_type="SEQ_CLS", init_sigma=0.5)).eval()
    with torch.no_grad():
        for key, value in model.adapters.parameters("default"):
            if "lora_B" in key:
                value.normal_()
    inputs = batch()
    inputs.pop("labels")
    found = predictive(model, samples=32, **inputs)
    torch.manual_seed(5)
    again = predictive(model, samples=4, **inputs)
    torch.manual_seed(5)
    with model.adapters.state.during(sampling=True):
        draws = torch.stack([model(**inputs).logits.softmax(-1) for _ in range(4)])
    assert torch.allclose(again.mean, draws.mean(0), atol=1e-6)
    assert torch.allclose(again.deviation, draws.std(0), atol=1e-6)
    assert torch.allclose(found.mean.sum(-1), torch.ones(8), atol=1e-5)
    assert float(found.deviation.min()) > 0
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)  # evaluation itself is certain


def test_a_certain_adapter_has_no_deviation(tiny_bert: Builder) -> None:
    model = get_peft_model(tiny_bert(), AdaLoraConfig(**ADALORA)).eval()
    inputs = batch()
    inputs.pop("labels")
    found = predictive(model, samples=3, **inputs)
    assert float(found.deviation.max()) < 1e-6
    assert torch.allclose(found.mean, model(**inputs).logits.softmax(-1), atol=1e-6)


def test_an_adapter_loaded_without_initialisation_trains_on(tiny_bert: Builder, tmp_path: Path) -> None:
    first = get_peft_model(tiny_bert(), AdaLoraConfig(**ADALORA, total_step=6))
    first.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_bert(), tmp_path, is_trainable=True, low_cpu_mem_usage=True).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**batch()).loss.backward()
    optimizer.step()
    assert not any(value.is_meta for _, value in model.adapters.parameters("default"))
    _, layer = next(model.adapters.layers("default"))
    assert float(layer.values("default")["steps"]) == 1


def test_a_copied_model_has_its_own_schedule_and_penalty(tiny_bert: Builder) -> None:
    model = get_peft_model(tiny_bert(), AdaLoraConfig(**ADALORA, total_step=6)).train()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        optimizer = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=1e-2)
        other(**batch()).loss.backward()
        optimizer.step()
        _, layer = next(other.adapters.layers("default"))
        assert float(layer.values("default")["steps"]) == 1
    _, layer = next(model.adapters.layers("default"))
    assert float(layer.values("default")["steps"]) == 0


@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
def test_a_base_that_adapters_left_keeps_nothing_of_them(leave: str, tiny_bert: Builder) -> None:
    base = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for _ in range(2):
        model = get_peft_model(base, AdaLoraConfig(**ADALORA, total_step=6)).train()
        added = penalty(model)
        assert added is not None
        torch.manual_seed(1)
        with_penalty = model(**batch()).loss
        torch.manual_seed(1)
        with model.adapters.state.during(penalising=False):
            assert (with_penalty - model(**batch()).loss).item() == pytest.approx(added.item(), rel=1e-4)  # once
        base = getattr(model, leave)()
        assert not base._forward_hooks
