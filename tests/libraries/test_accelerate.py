"""Two processes train under DDP, FSDP1 and FSDP2, and save and load as accelerate does; see ``sharded.py``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

METHODS = ("LORA", "PEANUT")
every_method = pytest.mark.parametrize("method", METHODS)
sharded_modes = pytest.mark.parametrize("mode", ["FSDP1", "FSDP2"])
Seen = list[dict[tuple[str, str], dict[str, Any]]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each of the two processes saw, by method and mode."""
    folder, script = tmp_path_factory.mktemp("sharded"), Path(__file__).with_name("sharded.py")
    cases = [f"{method} {mode}" for method in METHODS for mode in ("one", "DDP", "FSDP1", "FSDP2")]
    command, environment = [sys.executable, str(script), str(folder), *cases], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, timeout=300, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    return [torch.load(folder / f"seen{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("mode", ["DDP", "FSDP1", "FSDP2"])
@every_method
def test_two_processes_train_as_one(method: str, mode: str, seen: Seen) -> None:
    expected = seen[0][method, "one"]["losses"]
    assert expected[2] < expected[0]
    assert seen[0][method, mode]["losses"] == pytest.approx(expected, abs=2e-6)
    assert seen[1][method, mode]["losses"] == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("mode", ["DDP", "FSDP1", "FSDP2"])
@every_method
def test_a_gathered_state_dict_is_saved_by_one_process(method: str, mode: str, seen: Seen) -> None:
    """Its file loads on a fresh base, which is never refused, and gives the loss of the model that was trained."""
    found = seen[0][method, mode]
    assert found["loaded"] == pytest.approx(found["own"], abs=2e-6)


@sharded_modes
@every_method
def test_accelerate_saves_and_loads_what_is_sharded(method: str, mode: str, seen: Seen) -> None:
    kinds = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
    expected = {(kind, only): "same" for kind in kinds for only in (False, True)}
    assert [own[method, mode]["states"] for own in seen] == [expected, expected]


@sharded_modes
@every_method
def test_a_file_of_the_adapter_alone_holds_whole_tensors(method: str, mode: str, seen: Seen) -> None:
    held, shapes = seen[0][method, mode]["held"], seen[0][method, mode]["shapes"]
    assert shapes
    assert sorted(held.values()) == sorted(shapes.values())


@sharded_modes
@every_method
def test_one_process_alone_is_told_that_it_holds_parts(method: str, mode: str, seen: Seen) -> None:
    assert "PeanutError: " in seen[0][method, mode]["alone"]
    assert "in each process" in seen[0][method, mode]["alone"]
    assert "pass state_dict=, the full one" in seen[0][method, mode]["alone"]
    assert seen[0][method, mode]["written"] == []


@every_method
def test_one_process_of_replicas_saves_alone(method: str, seen: Seen) -> None:
    assert seen[0][method, "DDP"]["alone"] == "None"
    assert seen[0][method, "DDP"]["written"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@every_method
def test_whole_tensors_are_loaded_into_sharded_parameters(method: str, seen: Seen) -> None:
    assert [own[method, "FSDP2"]["whole"] for own in seen] == ["same", "same"]
