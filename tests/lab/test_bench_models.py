"""The benchmark in whole models: each stack reads what it should, and both sides compute the same there."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peanut
from peanut.errors import PeanutError
from peanut.lab import bench, model_variants, variants
from peanut.lab.model_variants import batch_of
from peanut.lab.settings import settings_of

from ..support import save_small_llama

CPU = torch.device("cpu")
FEW = ["--tokens", "8", "--rank", "2", "--repeats", "1", "--threads", "1"]


def run(output: Path, *more: str) -> dict[str, Any]:
    assert bench.main([*FEW, "--output", str(output), *more]) == 0
    [file] = output.glob("*.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_methods_that_need_a_model_are_measured_in_one(tmp_path: Path) -> None:
    found = run(tmp_path, "--stack", "transformer", "--dims", "16", "24", "--blocks", "1")
    methods = {row["method"] for row in found["variants"]}
    names = {"ADAPTION_PROMPT", "CPT", "DIREFT", "LORA", "LOREFT", "POLY", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
    styles = {"BOTTLENECK", "BOTTLENECK_PFEIFFER", "BOTTLENECK_PARALLEL"}
    assert methods == {"", "XLORA", *names, *styles}
    alone = {"DIREFT", "LOREFT", *styles}  # the peer has none of these
    theirs = [row for row in found["variants"] if row["by"] == "peft"]
    assert {row["method"] for row in theirs} == methods - {""} - alone
    assert all(row["difference"] < 1e-5 for row in theirs)
    assert all(row["seconds"]["generate"]["least"] > 0 for row in found["variants"])
    assert "-stack-transformer-" in next(tmp_path.glob("*.json")).stem


def test_a_batch_of_several_rows_has_a_task_for_each(tmp_path: Path) -> None:
    found = run(tmp_path, "--stack", "minilm", "--methods", "poly", "--tokens", "256")
    assert {row["method"] for row in found["variants"]} == {"", "LORA", "POLY"}


def test_a_stack_has_its_own_defaults_and_a_report_names_what_differs() -> None:
    smollm2 = settings_of("smollm2", methods=["lora"], tokens=64)
    assert (smollm2.tokens, smollm2.blocks, smollm2.dims, smollm2.repeats) == (64, 30, (576, 1536), 5)
    assert smollm2.changed == {"stack": "smollm2", "methods": ("LORA",), "tokens": 64}
    assert settings_of("transformer", methods=["bottleneck_parallel"]).methods == ("BOTTLENECK_PARALLEL", "LORA")
    with pytest.raises(PeanutError, match="--tokens 200; expected whole rows of 128"):
        settings_of("minilm", tokens=200)
    assert {"DORA", "MISS_BAT", "LORA", "PEANUT", "C3A"} <= set(settings_of().methods or ())
    assert settings_of(methods=["dora"]).methods == ("DORA", "LORA")
    assert not {"DORA", "PEANUT"} & set(settings_of("transformer").methods or ())
    assert {"DORA", "PREFIX_TUNING", "LN_TUNING"} <= set(settings_of("minilm").methods or ())


@pytest.mark.parametrize(
    ("stack", "method", "message"),
    [
        ("layers", "poly", "POLY does not change linear layers by themselves; .*, or take --stack transformer$"),
        ("layers", "linear_probing", "LINEAR_PROBING does not change linear layers .*, or take --stack minilm$"),
        ("minilm", "cpt", "CPT cannot run on all-MiniLM-L6 .*, or take --stack transformer$"),
        ("minilm", "xlora", "XLORA cannot run on all-MiniLM-L6 .*, or take --stack transformer$"),
        ("transformer", "bitfit", "BITFIT cannot run on a small Llama.*, or take --stack layers$"),
        ("smollm2", "linear_probing", "LINEAR_PROBING cannot run on SmolLM2-135M.*, or take --stack minilm$"),
    ],
)
def test_a_method_is_refused_where_it_cannot_be_measured(stack: str, method: str, message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        settings_of(stack, methods=[method])


def test_twins_share_the_memory_of_weights_and_nothing_else() -> None:
    first = variants.frozen_stack(8, 12, 1, CPU, torch.float32)
    first.register_buffer("count", torch.ones(3))
    second = variants.twin(first)
    x = torch.randn(2, 8)
    assert torch.equal(first(x), second(x))
    assert [each.data_ptr() for each in first.parameters()] == [each.data_ptr() for each in second.parameters()]
    assert first[0] is not second[0]
    peanut.get_peft_model(second, peanut.LoraConfig(target_modules=["0"]))
    assert type(first[0]) is nn.Linear


@pytest.mark.parametrize("stack", ["transformer", "minilm"])
def test_no_variant_trains_the_weights_that_all_share(stack: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"dims": (16, 24), "blocks": 1, "rank": 2} if stack == "transformer" else {}
    chosen = None if stack == "transformer" else ["full", "partial", "ln_tuning", "bitfit", "trainable_tokens"]
    settings = settings_of(stack, tokens=8, methods=chosen, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, x, labels = bench.built(settings, tmp_path)
    frozen = found[0].model
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    assert len(before) > 4
    assert len({variant.method for variant in found}) > 4
    for variant in found:
        variant.step(x, labels)
    for name, value in frozen.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_minilm_reads_reviews_and_learns_their_labels(tmp_path: Path) -> None:
    found = run(tmp_path, "--stack", "minilm", "--methods", "peanut", "prompt_tuning", "--depth", "0")
    rows = {(row["method"], row["by"]): row for row in found["variants"]}
    names = ("LORA", "PEANUT depth 0", "PROMPT_TUNING")
    assert set(rows) == {("", "frozen"), *((name, by) for name in names for by in ("peanut", "peft"))}
    peanut_rows = [rows["PEANUT depth 0", by] for by in ("peanut", "peft")]
    adapted = 6 * (4 * 2 * (384 + 384) + 2 * 2 * (384 + 1536))
    assert [row["trained_parameters"] for row in peanut_rows] == 2 * [adapted + 2 * 384 + 2]
    assert all(set(row["seconds"]) >= {"step", "answer"} for row in rows.values())
    assert all(row["difference"] < 1e-4 for row in rows.values() if row["by"] == "peft")
    assert peanut_rows[0]["saved_bytes"] < 0.1 * peanut_rows[1]["saved_bytes"]


def test_reviews_fill_every_row_and_come_in_both_kinds() -> None:
    ids, labels = batch_of(settings_of("minilm", tokens=512), CPU)
    assert ids.shape == (4, 128)
    assert sorted(labels.tolist()) == [0, 0, 1, 1]
    assert (ids[:, 0] == 101).all()  # [CLS]
    assert (ids[:, -1] == 102).all()  # [SEP]: no row ends in padding
    assert not (ids == 0).any()


def test_a_language_model_writes_with_a_cache(
    tmp_path: Path, smollm2: Path, monkeypatch: pytest.MonkeyPatch, movie_reviews: Path
) -> None:
    small = save_small_llama(tmp_path / "model", smollm2)
    places = {"smollm2": small, "movie-reviews": movie_reviews}
    monkeypatch.setattr(model_variants, "fetch", places.__getitem__)
    found = run(tmp_path / "out", "--stack", "smollm2", "--methods", "dora", "ia3")
    rows = {(row["method"], row["by"]): row for row in found["variants"]}
    assert {method for method, _ in rows} == {"", "LORA", "DORA", "IA3"}
    assert all(row["seconds"]["generate"]["least"] > 0 for row in rows.values())
    assert rows["DORA", "peanut"]["trained_parameters"] > rows["LORA", "peanut"]["trained_parameters"]
    assert rows["DORA", "peft"]["difference"] < 1e-4
    assert (found["settings"]["tokens"], found["settings"]["dtype"]) == (8, "float32")
