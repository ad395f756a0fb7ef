"""Whole runs, from a config to an adapter: every task, interruption, and inputs that are wrong."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from peanut import LoraConfig, PeanutError, PeftModel, get_peft_model
from peanut.training.config import load_config
from peanut.training.evaluation import evaluate
from peanut.training.generation import Generator, end_tokens
from peanut.training.model import load_trained
from peanut.training.run import plan, train
from peanut.training.tasks import CausalLM

Config = dict[str, Any]


def changed(config: Config, **sections: Any) -> Config:
    """A copy of a config with keys of its sections replaced."""
    new = copy.deepcopy(config)
    for name, value in sections.items():
        new[name] = new[name] | value if isinstance(value, dict) else value
    return new


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# From beginning to end


def test_a_classifier_from_config_to_adapter(run: Config) -> None:
    output = Path(run["output"])
    result = train(run, quiet=True)
    assert result.status == "trained"
    assert (result.steps, result.dropped_rows) == (8, 0)
    assert {
        "run.yaml",
        "metrics.json",
        "log.jsonl",
        "curve.png",
        "adapter/task.json",
        "adapter/tokenizer.json",
    } <= tree(output)
    assert (output / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert load_config(output / "run.yaml") == load_config(run)
    losses = [entry["loss"] for entry in lines(output / "log.jsonl") if "loss" in entry]
    assert len(losses) == 8
    assert [entry["step"] for entry in lines(output / "log.jsonl") if "eval_loss" in entry] == [4, 8]

    # The kept checkpoint is the best one, and its metrics are those of the adapter that lies there.
    best = max(lines(output / "log.jsonl"), key=lambda entry: entry.get("eval_accuracy", 0.0))
    assert result.metrics["accuracy"] == best["eval_accuracy"]
    assert evaluate(output, quiet=True, batch_size=8) == pytest.approx(result.metrics, abs=1e-6)
    trained = load_trained(output)
    assert trained.task.labels == ["0", "1"]
    assert trained.model.get_base_model().config.id2label == {0: "0", 1: "1"}  # type: ignore[union-attr]
    parameters = adapter_of(result.adapter)
    assert sum(value.numel() for value in parameters.values()) == result.trained_parameters
    for name, value in adapter_of(output / f"checkpoint-{result.step}").items():
        assert torch.equal(parameters[name], value)

    # Asked again, it does nothing; with another config it refuses; told so, it begins anew.
    before = tree(output)
    assert train(run, quiet=True).status == "finished"
    with pytest.raises(PeanutError) as caught:
        train(changed(run, training={"epochs": 1}, adapter={"r": 8}), quiet=True)
    assert str(caught.value) == (
        f"'{output}' holds a run with another adapter.r, training.epochs; expected the same config, to continue it; "
        "choose another output, or pass --overwrite to begin anew"
    )
    assert tree(output) == before
    again = train(changed(run, training={"epochs": 1}), overwrite=True, quiet=True)
    assert (again.status, again.steps) == ("trained", 4)
    assert not (output / "checkpoint-8").exists()


def test_the_same_config_gives_the_same_adapter_and_another_seed_another(run: Config, tmp_path: Path) -> None:
    short = changed(run, training={"steps": 2})
    first, second, other = (
        adapter_of(train(changed(config, output=str(tmp_path / str(index))), quiet=True).adapter)
        for index, config in enumerate([short, short, changed(short, training={"seed": 1})])
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_a_run_learns(run: Config) -> None:
    """On a training set of 32 reviews the loss falls to less than half."""
    options = {"epochs": 12, "learning_rate": 5e-3, "eval_every": 48}
    longer = changed(run, training=options, data={"eval_fraction": 0})
    result = train(longer, quiet=True)
    losses = [entry["loss"] for entry in lines(result.output / "log.jsonl") if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4]) / 2
    assert result.metrics == {}
    assert result.step == result.steps == 48


def test_killed_and_run_again_it_ends_bit_for_bit_as_without(run: Config, tmp_path: Path) -> None:
    options = {"eval_every": 2, "gradient_accumulation": 2, "schedule": "cosine", "patience": 3, "batch_size": 4}
    config = changed(run, training=options, adapter={"dropout": 0.1})
    whole = train(config, quiet=True)
    cut = changed(config, output=str(tmp_path / "cut"))
    child = [sys.executable, str(Path(__file__).with_name("interrupted.py")), json.dumps(cut), "5"]
    assert subprocess.run(child, check=False, capture_output=True, timeout=200).returncode == -9
    left = tree(tmp_path / "cut")
    assert "run.yaml" in left
    assert "metrics.json" not in left
    assert max(line["step"] for line in lines(tmp_path / "cut/log.jsonl")) == 5
    # Whatever a kill in the middle of a save leaves is no checkpoint.
    (tmp_path / "cut/checkpoint-5").mkdir()
    (tmp_path / "cut/checkpoint-5/adapter_model.safetensors").write_bytes(b"half")
    with pytest.warns(
        UserWarning, match=r"checkpoint-5' lacks trainer_state.json and is removed: training goes on from"
    ):
        resumed = train(cut, quiet=True)
    assert resumed.status == "resumed"
    assert resumed.metrics == whole.metrics
    assert resumed.step == whole.step
    for folder in ("adapter", "checkpoint-8"):
        a, b = adapter_of(whole.output / folder), adapter_of(resumed.output / folder)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    keep = ("step", "loss", "eval_loss", "eval_accuracy", "grad_norm", "learning_rate")
    history = [
        [{key: line.get(key) for key in keep} for line in lines(r.output / "log.jsonl")] for r in (whole, resumed)
    ]
    assert history[0] == history[1]
    assert not (tmp_path / "cut/checkpoint-5").exists()


def test_killed_after_the_last_step_it_only_finishes(run: Config) -> None:
    config = changed(run, training={"epochs": 1})
    first = train(config, quiet=True)
    (first.output / "metrics.json").unlink()
    again = train(config, quiet=True)
    assert again.status == "resumed"
    assert again.metrics == first.metrics
    a, b = adapter_of(first.output / "checkpoint-4"), adapter_of(again.adapter)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "sections", [{"training": {"precision": "bfloat16"}}, {"model": {"dtype": "bfloat16"}}], ids=str
)
def test_half_precision_trains_the_adapter_in_float32(run: Config, sections: dict[str, Any]) -> None:
    full, half = run, changed(run, **sections)
    full["output"] += "-full"
    results = [train(changed(config, training={"steps": 2}), quiet=True) for config in (full, half)]
    first, second = (adapter_of(result.adapter) for result in results)
    assert {value.dtype for name, value in second.items() if "peanut_" in name} == {torch.float32}
    assert results[1].metrics["loss"] == pytest.approx(results[0].metrics["loss"], rel=0.02)
    assert not any(torch.equal(first[name], second[name]) for name in first if "peanut_B" in name)


# The other tasks


def test_a_regression_on_pairs(run: Config, tmp_path: Path) -> None:
    rows = [{"a": f"number {i}", "b": "word " * i, "score": i / 4} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"train": str(tmp_path / "pairs.jsonl"), "text": "a", "text_pair": "b", "label": "score"}
    result = train(changed(run, task="text-regression", data=data, training={"epochs": 1}), quiet=True)
    assert set(result.metrics) == {"loss", "mse", "pearson", "spearman"}
    assert result.metrics["mse"] == pytest.approx(result.metrics["loss"], rel=1e-4)
    assert load_trained(result.adapter).model.get_base_model().config.num_labels == 1  # type: ignore[union-attr]


def test_a_language_model_on_plain_text(tiny_llm: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(" ".join(f"This is sentence number {i} of a plain book." for i in range(90)))
    config: Config = {
        "model": {"path": str(tiny_llm)},
        "task": "causal-lm",
        "data": {"train": str(tmp_path / "book.txt"), "max_length": 32},
        "adapter": {"r": 4, "target_modules": "all-linear"},
        "training": {"batch_size": 8, "epochs": 1, "learning_rate": 1e-2},
        "output": str(tmp_path / "run"),
    }
    result = train(config, quiet=True)
    assert set(result.metrics) == {"loss", "perplexity", "token_accuracy"}
    trained = load_trained(result.adapter)
    ids = trained.processor("This is sentence number 7 of a plain book.", return_tensors="pt")
    with torch.no_grad():
        loss = trained.model(**ids, labels=ids["input_ids"]).loss
        with trained.model.disable_adapter():
            before = trained.model(**ids, labels=ids["input_ids"]).loss
    assert loss < before


def test_instructions_are_learned_and_answered(
    tiny_llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("yes", "no", "up", "down")] * 6
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config: Config = {
        "model": {"path": str(tiny_llm)},
        "task": "instruction",
        "data": {"train": str(tmp_path / "rows.json"), "max_length": 64},
        "adapter": {"peft_type": "LORA", "r": 4},
        "training": {"batch_size": 8, "steps": 2},
        "output": str(tmp_path / "run"),
    }
    result = train(config, quiet=True)
    assert result.metrics["perplexity"] > 1
    answers = [Generator(result.output, merge=merge).stream("Say yes.", max_new_tokens=4) for merge in (True, False)]
    assert answers[0] == answers[1]
    assert capsys.readouterr().out.strip().startswith(answers[0].strip()[:1])
    sampled = [
        Generator(result.output, seed=seed).stream("Say", max_new_tokens=4, temperature=2.0) for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_answers_end_where_the_template_ends_them(
    tiny_llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base model's own end token is often not the one that its chat template puts after an answer."""
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_llm)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|endoftext|>\n{% endfor %}"
    shutil.copytree(tiny_llm, tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "Say yes.", "completion": "yes"}] * 4))
    result = train(
        {
            "model": {"path": str(tmp_path / "base")},
            "task": "instruction",
            "data": {"train": str(tmp_path / "rows.json"), "max_length": 32, "eval_fraction": 0},
            "adapter": {"peft_type": "LORA", "r": 4},
            "training": {"batch_size": 4, "steps": 1},
            "output": str(tmp_path / "run"),
        },
        quiet=True,
    )
    generator = Generator(result.output)
    assert generator.tokenizer.eos_token_id == generator.model.generation_config.eos_token_id == 2
    generate, given = generator.model.generate, []

    def watched(**options: Any) -> Any:
        given.append(options["eos_token_id"])
        return generate(**options)

    monkeypatch.setattr(generator.model, "generate", watched)
    generator.stream("Say yes.", max_new_tokens=1)
    assert given == [[0, 2]]
    assert end_tokens(generator.model, CausalLM(generator.task.data), generator.tokenizer) == [2]
    generator.model.generation_config.eos_token_id = [2, 5]
    assert end_tokens(generator.model, generator.task, generator.tokenizer) == [0, 2, 5]


def test_images(digits: Path, vit: Path, tmp_path: Path) -> None:
    config: Config = {
        "model": {"path": str(vit)},
        "task": "image-classification",
        "data": {"train": str(digits), "eval_fraction": 0.25},
        "adapter": {"r": 4},
        "training": {
            "batch_size": 8,
            "epochs": 12,
            "learning_rate": 5e-3,
            "head_learning_rate": 2e-2,
            "eval_every": 10,
        },
        "output": str(tmp_path / "run"),
    }
    result = train(config, quiet=True)
    assert set(result.metrics) == {"loss", "accuracy", "f1"}
    assert result.metrics["accuracy"] > 0.5  # by chance: 0.25
    assert any(".classifier." in key for key in adapter_of(result.adapter))
    assert evaluate(result.output, str(digits), quiet=True)["accuracy"] > 0.5


def test_a_decoder_classifies_with_padding(tiny_llm: Path, run: Config) -> None:
    result = train(changed(run, model={"path": str(tiny_llm)}, training={"epochs": 1}), quiet=True)
    assert any(".score." in key for key in adapter_of(result.adapter))
    assert evaluate(result.output, quiet=True, batch_size=3)["accuracy"] == pytest.approx(result.metrics["accuracy"])


def test_a_missing_pooler_is_trained(run: Config, minilm: Path, tmp_path: Path) -> None:
    hf.AutoModelForMaskedLM.from_pretrained(minilm).save_pretrained(tmp_path / "base")  # saves no pooler
    hf.AutoTokenizer.from_pretrained(minilm).save_pretrained(tmp_path / "base")
    result = train(changed(run, model={"path": str(tmp_path / "base")}, training={"steps": 1}), quiet=True)
    assert any(".pooler.dense." in key for key in adapter_of(result.adapter))
    assert evaluate(result.output, quiet=True)["accuracy"] == pytest.approx(result.metrics["accuracy"])


# Evaluation elsewhere


def test_an_adapter_is_evaluated_on_other_rows_and_another_copy_of_its_base(
    run: Config, reviews: Path, tmp_path: Path
) -> None:
    result = train(changed(run, training={"steps": 1}), quiet=True)
    rows = tmp_path / "rows.csv"
    rows.write_text(reviews.read_text().replace("text,label", "review,stars", 1))
    columns = {"text": "review", "label": "stars"}
    moved = result.adapter.rename(tmp_path / "moved")
    metrics = evaluate(moved, str(rows), base_model=run["model"]["path"], limit=10, columns=columns, quiet=True)
    assert set(metrics) == {"loss", "accuracy", "f1", "matthews"}
    with pytest.raises(PeanutError, match="is no run's folder; expected the rows to evaluate on; give --data"):
        evaluate(moved, quiet=True)
    rows.write_text("text,label\nfine,7\n")
    with pytest.raises(PeanutError, match="which training has not seen"):
        evaluate(moved, str(rows), quiet=True)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # the peer uses names that transformers retires
def test_an_adapter_of_the_peer_is_evaluated(minilm: Path, reviews: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = hf.AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2)
    peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=4)).save_pretrained(tmp_path)
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\nfine,LABEL_0\nbad,LABEL_1\n")
    assert set(evaluate(tmp_path, str(rows), quiet=True)) == {"loss", "accuracy", "f1", "matthews"}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("CAUSAL_LM", None),
        ("SEQ_CLS", "holds no classifier"),
        ("TOKEN_CLS", "has no task.json and its config the task TOKEN_CLS"),
    ],
)
def test_an_adapter_from_elsewhere_is_known_by_its_config(
    tiny_llm: Path, tmp_path: Path, task: str, message: str | None
) -> None:
    base = hf.AutoModelForCausalLM.from_pretrained(tiny_llm)
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "task_type": task}))
    if message is None:
        assert isinstance(load_trained(tmp_path).task, CausalLM)
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
        message = "names no base model"
    with pytest.raises(PeanutError, match=message):
        load_trained(tmp_path)


# Plans


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_is_what_happens(run: Config, checkpointing: bool) -> None:
    config = changed(run, training={"gradient_checkpointing": checkpointing})
    made = plan(config)
    assert not Path(run["output"]).exists()
    result = train(changed(config, training={"steps": 1}), quiet=True)
    model = load_trained(result.adapter).model
    assert made.adapter_parameters + made.head_parameters == result.trained_parameters
    assert made.head_parameters == 2 * 384 + 2
    assert made.heads == ["classifier"]
    assert made.modules == [path for path, _ in model.adapters.layers()]
    assert made.all_parameters == sum(p.numel() for p in model.parameters())
    assert (made.train_rows, made.eval_rows, made.steps, made.classes) == (32, 12, 8, ["0", "1"])
    assert made.memory.optimizer == 2 * 4 * result.trained_parameters
    assert made.memory.activations == pytest.approx(saved_bytes(model, 8, 16, checkpointing), rel=0.01)


def saved_bytes(model: PeftModel, rows: int, length: int, checkpointing: bool) -> int:
    """Bytes that autograd really keeps in a forward of a batch, beyond the model's own tensors."""
    model.set_adapter("default")
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.ones(rows, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=tokens, labels=torch.zeros(rows, dtype=torch.long))
    return sum(storage.nbytes() for storage in kept.values())


def test_a_plan_needs_no_weights(run: Config, minilm: Path, tmp_path: Path) -> None:
    for file in minilm.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert plan(changed(run, model={"path": str(tmp_path)})).memory == plan(run).memory
    with pytest.raises(PeanutError, match="cannot load the model"):
        train(changed(run, model={"path": str(tmp_path)}), quiet=True)


def test_plans_of_text_and_images(tiny_llm: Path, digits: Path, vit: Path, tmp_path: Path) -> None:
    for name, count in (("train.txt", 500), ("eval.txt", 60)):
        (tmp_path / name).write_text("word " * count)
    data = {"train": str(tmp_path / "train.txt"), "eval": str(tmp_path / "eval.txt"), "max_length": 50, "limit": 8}
    training = {"batch_size": 4, "epochs": 1.5}
    text = plan(
        {"model": {"path": str(tiny_llm)}, "task": "causal-lm", "data": data, "training": training, "output": "o"}
    )
    assert (text.train_rows, text.eval_rows, text.steps) == (8, 2, 3)  # pieces, not files
    assert text.head_parameters == 0
    # The logits, in float32, are a large part of it.
    assert text.memory.activations > 4 * 4 * 50 * 49152
    data = {"train": str(digits)}
    image = plan({"model": {"path": str(vit)}, "task": "image-classification", "data": data, "output": "o"})
    assert image.classes == [f"digit-{digit}" for digit in range(4)]
    assert image.heads == ["classifier"]
    assert image.memory.activations > 16 * 5 * 32 * 4  # at least one hidden state: 5 patches of width 32


def test_a_length_that_nobody_gave_is_the_models(run: Config, minilm: Path, tmp_path: Path) -> None:
    small = shutil.copytree(minilm, tmp_path / "small")
    settings = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 40}))
    del run["data"]["max_length"]
    assert plan(run).config.data.max_length == 256
    run["model"] = {"path": str(small)}
    assert plan(run).config.data.max_length == 40
    run["data"]["max_length"] = 41
    with pytest.raises(PeanutError, match=r"data\.max_length is 41; expected at most the model's 40"):
        plan(run)


# Wrong inputs: one line, and nothing written


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"data": {"label": "lable"}},
            "has no column 'lable' (it has 'text', 'label'); expected the column that data.label names",
        ),
        ({"data": {"train": "none.csv"}}, "no file 'none.csv'"),
        ({"data": {"eval": "none.csv"}}, "no file 'none.csv'"),
        ({"data": {"max_length": 1000}}, "data.max_length is 1000; expected at most the model's 512"),
        ({"adapter": {"target_modules": ["qury"]}}, "target_modules names 'qury'"),
        ({"adapter": {"rank": 4}}, "the section adapter sets rank=4"),
        ({"adapter": {"r": 0}}, "r=0; expected a whole number of at least 1"),
        ({"adapter": {"peft_type": "PEANUTS"}}, "the section adapter names the method 'PEANUTS'"),
        (
            {"training": {"metric_for_best": "acuracy"}},
            "training.metric_for_best is 'acuracy'; expected one of accuracy, f1",
        ),
        ({"model": {"path": "no/model-here"}}, "'no/model-here' has no tokenizer"),
        ({"task": "causal-lm"}, "the model is a bert, which is no left-to-right decoder"),
        ({"task": "image-classification"}, "'{model}' has no image processor"),
    ],
)
def test_refuses(run: Config, sections: dict[str, Any], message: str) -> None:
    for attempt in (lambda config: train(config, quiet=True), plan):
        with pytest.raises(PeanutError) as caught:
            attempt(changed(run, **sections))
        assert message.format(model=run["model"]["path"]) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not tree(Path(run["output"]))


def test_refuses_a_checkpoint_that_lacks_more_than_a_head(run: Config, minilm: Path, tmp_path: Path) -> None:
    for file in minilm.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    left = {name: value for name, value in weights.items() if "layer.3." not in name}
    save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PeanutError, match=r"lacks bert\.encoder\.layer\.3\..*expected the weights of BertForSequence"):
        train(changed(run, model={"path": str(tmp_path)}), quiet=True)
    assert not tree(Path(run["output"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; expected at least one row"),
        ("text,label\n", "has no rows; expected at least one row"),
        ("text,label\na,0\n", "every row of '{path}' has the label '0'"),
        ("text,label\na,0\nb,\n", "row 2 of '{path}' has no 'label'"),
    ],
)
def test_refuses_training_rows(run: Config, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(PeanutError) as caught:
        train(changed(run, data={"train": str(path)}), quiet=True)
    assert message.format(path=path) in str(caught.value)
    assert not tree(Path(run["output"]))


def test_refuses_a_label_that_training_has_not_seen(run: Config, tmp_path: Path) -> None:
    path = tmp_path / "eval.csv"
    path.write_text("text,label\nfine,1\nodd,2\n")
    with pytest.raises(PeanutError) as caught:
        train(changed(run, data={"eval": str(path)}), quiet=True)
    assert str(caught.value).startswith(
        f"row 2 of '{path}' has the label '2', which training has not seen; expected one of '0', '1'"
    )
    assert not tree(Path(run["output"]))


def test_refuses_a_single_row_that_is_to_be_split(run: Config, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 0.5}')
    with pytest.raises(PeanutError, match=r"has one row, and data.eval_fraction is 0.1"):
        train(changed(run, task="text-regression", data={"train": str(path)}), quiet=True)


@pytest.mark.parametrize("output", ["{file}", "{file}/run", "/proc/run"])
def test_an_output_that_cannot_be_written_is_refused_before_the_data_is_read(
    run: Config, tmp_path: Path, output: str
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(PeanutError, match="cannot write into folder"):
        train(changed(run, output=output.format(file=file), data={"train": "none.csv"}), quiet=True)
    assert file.read_text() == "mine"


def test_checkpoints_of_others_are_not_touched(run: Config) -> None:
    folder = Path(run["output"]) / "checkpoint-3"
    folder.mkdir(parents=True)
    (folder / "mine").write_text("mine")
    with pytest.raises(PeanutError, match=r"holds checkpoints and no run.yaml"):
        train(run, quiet=True)
    assert (folder / "mine").read_text() == "mine"


def test_a_mistake_costs_no_earlier_run(run: Config) -> None:
    train(changed(run, training={"steps": 1}), quiet=True)
    before = tree(Path(run["output"]))
    with pytest.raises(PeanutError, match="has no column 'lable'"):
        train(changed(run, data={"label": "lable"}), overwrite=True, quiet=True)
    assert tree(Path(run["output"])) == before


FULL_DISK = """
import json, resource, sys
import torch
from peanut import PeanutError
from peanut.training.run import train
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
try:
    train(json.loads(sys.argv[1]), quiet=True)
except PeanutError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files as only POSIX can")
@pytest.mark.parametrize(
    ("r", "limit"), [(4, 100_000), (4, 500_000), (16, 900_000)], ids=["adapter", "tokenizer", "optimizer"]
)
def test_a_full_disk_in_the_middle_of_a_save(run: Config, r: int, limit: int) -> None:
    """Files may grow to so many bytes: less than the adapter, the tokenizer, or the optimiser's state has."""
    config = changed(run, training={"steps": 2}, adapter={"r": r})
    child = [sys.executable, "-c", FULL_DISK, json.dumps(config), str(limit)]
    done = subprocess.run(child, check=False, capture_output=True, text=True, timeout=200)
    assert done.stdout.startswith("cannot write "), done.stderr
    assert done.stdout.count("\n") == 1
    assert tree(Path(run["output"])) == {"run.yaml", "log.jsonl"}
