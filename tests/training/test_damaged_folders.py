"""What a run or an adapter left may have been damaged since: one line says so, and nothing goes on in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
import yaml

from peanut import LoraConfig, PeanutError, get_peft_model
from peanut.training.config import load_config
from peanut.training.model import load_trained, save_task
from peanut.training.run import train
from peanut.training.sections import DataSection
from peanut.training.tasks import CausalLM

METRICS = {"metrics": {"loss": 1.0}, "step": 1, "steps": 1, "trained_parameters": 1, "dropped_rows": 0, "seconds": 1.0}
TASK: dict[str, Any] = {"task": "causal-lm", "labels": [], "data": {"max_length": 16}}


def refused(path: str | Path) -> str:
    with pytest.raises(PeanutError) as caught:
        load_trained(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def adapter(tiny_llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    base = hf.AutoModelForCausalLM.from_pretrained(tiny_llm)
    get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM", base_model_name_or_path=str(tiny_llm))).save_pretrained(
        folder
    )
    task = CausalLM(DataSection(train="", max_length=16))
    save_task(folder, task, task.load_processor(tiny_llm))
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "names no task"),
        ({}, "names no task"),
        (TASK | {"task": []}, "names no task"),
        (TASK | {"task": "chess"}, "names no task"),
        (TASK | {"labels": None}, "has no list of labels"),
        (TASK | {"labels": "ab"}, "has no list of labels"),
        (TASK | {"labels": [1, 2]}, "has no list of labels"),
        (TASK | {"labels": ["a"]}, "has 1 labels for causal-lm"),
        (TASK | {"task": "text-classification"}, "has 0 labels for text-classification"),
        (TASK | {"task": "text-classification", "labels": ["a", "a"]}, "has 2 labels for text-classification"),
        (
            TASK | {"task": "text-classification", "labels": ["a", "b"]},
            "names the task text-classification and adapter_config.json CAUSAL_LM",
        ),
        (TASK | {"data": []}, "does not say how data is read"),
        (TASK | {"data": {"colour": 1}}, "has the key 'data.colour'"),
        (TASK | {"data": {"max_length": "long"}}, "data.max_length is 'long'"),
        (TASK | {"data": {"max_length": 10**30}}, "data.max_length is 1000"),
        (TASK | {"data": {"text": "a\0b"}}, "data.text is 'a\\x00b'"),
    ],
)
def test_a_task_file_is_not_believed(adapter: Path, values: object, message: str) -> None:
    whole = (adapter / "task.json").read_text()
    (adapter / "task.json").write_text(json.dumps(values))
    try:
        assert message in refused(adapter)
    finally:
        (adapter / "task.json").write_text(whole)


@pytest.mark.parametrize("content", ["x", "[]", "[" * 100_000, '{"tokenizer_class": 3}'])
def test_a_damaged_tokenizer_is_one_line(adapter: Path, content: str) -> None:
    path = adapter / "tokenizer_config.json"
    whole = path.read_text()
    path.write_text(content)
    try:
        assert refused(adapter).startswith(f"'{adapter}' has no tokenizer: ")
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": "many"}, {"num_attention_heads": 5}, {"hidden_act": "none such"}, {"hidden_size": 64}, []],
    ids=["type", "sizes that do not fit", "name", "another shape", "a list"],
)
def test_a_damaged_base_is_one_line(adapter: Path, tiny_llm: Path, tmp_path: Path, change: Any) -> None:
    config = json.loads((tiny_llm / "config.json").read_text())
    for file in tiny_llm.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | change if change else change))
    with pytest.raises(PeanutError) as caught:
        load_trained(adapter, str(tmp_path))
    assert str(caught.value).startswith(f"cannot load the model '{tmp_path}': ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (METRICS, "holds a finished run without its adapter"),
        ([], "is damaged"),
        ({"metrics": {}}, "is damaged"),
        (METRICS | {"more": 1}, "is damaged"),
        (METRICS | {"step": "x"}, "is damaged"),
        (METRICS | {"metrics": {"loss": "x"}}, "is damaged"),
    ],
)
def test_a_finished_run_is_not_believed(run: dict[str, Any], content: object, message: str) -> None:
    folder = Path(run["output"])
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(load_config(run).model_dump(mode="json")))
    (folder / "metrics.json").write_text(json.dumps(content))
    with pytest.raises(PeanutError, match=message) as caught:
        train(run, quiet=True)
    assert "\n" not in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert {path.name for path in folder.iterdir()} == {"run.yaml", "metrics.json"}
