"""Files that anybody may have written or damaged: they load, or one line says what is wrong with them."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peanut import (
    LoraConfig,
    PeanutError,
    PeftModel,
    ShiraConfig,
    VBLoRAConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peanut.files import read_json

pytestmark = pytest.mark.filterwarnings("ignore:adapter_config.json in .* was saved by this library and")
A = "base_model.model.0.lora_A.weight"
FILES = ("adapter_config.json", "adapter_model.safetensors")


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    get_peft_model(net(), LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    return tmp_path


def refused(folder: Path, message: str = "") -> None:
    with pytest.raises(PeanutError, match=message) as error:
        PeftModel.from_pretrained(net(), folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2600


def changed(folder: Path, **tensors: Tensor) -> None:
    path = folder / FILES[1]
    save_file(
        {**load_file(path), **{f"base_model.model.0.{name}.weight": value for name, value in tensors.items()}}, path
    )


def test_a_damaged_header_is_one_line_or_harmless(folder: Path) -> None:
    path, draw = folder / FILES[1], random.Random(0)
    whole = path.read_bytes()
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    outcomes = set[str]()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 1, 4])):
            damaged[draw.randrange(length)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            PeftModel.from_pretrained(net(), folder)
        except PeanutError as error:
            outcomes.add(str(error))
    assert len(outcomes) > 10
    assert not any("\n" in line or len(line) > 2600 for line in outcomes)
    for part in (b"", b"\0" * 8, whole[:8], whole[:-1], whole + b"x", b"\xff" * 100):
        path.write_bytes(part)
        refused(
            folder, "^cannot read '.*adapter_model.safetensors': .*; expected a whole safetensors file; copy or save "
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [-2, 8]}, "^cannot read"),
        ({"shape": [10**30, 8]}, "^cannot read"),
        ({"data_offsets": [0, 128]}, "^cannot read"),
        ({"data_offsets": [64, 0]}, "^cannot read"),
        ({"dtype": "X9"}, "^cannot read"),
        ({"dtype": "I32"}, r"does not hold what was written: its checksum differs"),
    ],
)
def test_a_header_that_says_something_else(change: dict[str, Any], message: str, folder: Path) -> None:
    path = folder / FILES[1]
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    header[A] |= change
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    refused(folder, message)


@pytest.mark.parametrize("recorded", ["[[" * 5000, '{"0": ["a"]}', '{"0": 3}', "[]", "{", '{"0": [1], "0": [1]}'])
def test_a_damaged_fingerprint(recorded: str, folder: Path) -> None:
    save_file(load_file(folder / FILES[1]), folder / FILES[1], {"peanut_base": recorded})
    refused(folder, "fingerprint|cannot read")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_what_are_no_floats_are_no_weights(dtype: torch.dtype, folder: Path) -> None:
    state = get_peft_model_state_dict(model := PeftModel.from_pretrained(net(), folder))
    before = {key: value.clone() for key, value in state.items()}
    wrong = {**before, A: before[A].to(dtype)}
    message = r"holds 0\.lora_A\.weight as .*; expected floats \(torch\.float32\); save the adapter again"
    with pytest.raises(PeanutError, match=message):
        set_peft_model_state_dict(model, wrong)
    assert all(torch.equal(value, before[key]) for key, value in get_peft_model_state_dict(model).items())
    changed(folder, lora_A=before[A].to(dtype))
    refused(folder, message)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_floats_of_any_precision_are_read(dtype: torch.dtype, folder: Path) -> None:
    value = load_file(folder / FILES[1])[A].to(dtype)
    changed(folder, lora_A=value)
    model = PeftModel.from_pretrained(net(), folder)
    assert torch.equal(get_peft_model_state_dict(model)[A], value.float())


def test_whole_numbers_are_read_where_they_belong(tmp_path: Path) -> None:
    get_peft_model(net(), ShiraConfig(r=1, target_modules=["0"], random_seed=1)).save_pretrained(tmp_path)
    state = load_file(tmp_path / FILES[1])
    (key,) = [key for key, value in state.items() if not value.is_floating_point()]
    for form in (torch.int16, torch.int64, torch.float32):  # the last as files from Windows have them
        save_file({**state, key: state[key].to(form)}, tmp_path / FILES[1])
        model = PeftModel.from_pretrained(net(), tmp_path)
        assert torch.equal(get_peft_model_state_dict(model)[key], state[key])
    for wrong, message in (
        (state[key].bool(), "as booleans"),
        (state[key] + 8, "outside of"),
        (-state[key] - 1, "outside"),
    ):
        save_file({**state, key: wrong}, tmp_path / FILES[1])
        refused(tmp_path, message)


def test_vectors_that_are_not_there_are_refused(tmp_path: Path) -> None:
    config = VBLoRAConfig(target_modules=["0"], vector_length=4, num_vectors=8, save_only_topk_weights=True)
    get_peft_model(net(), config).save_pretrained(tmp_path)
    PeftModel.from_pretrained(net(), tmp_path)
    state = load_file(tmp_path / FILES[1])
    places = [key for key in state if key.endswith("_topk_indices")]
    weights = [key for key in state if key.endswith("_topk_weights")]
    for key, wrong in (
        (places[0], state[places[0]] + 8),
        (places[0], state[places[0]].float()),
        (weights[0], -state[weights[0]]),
    ):
        save_file({**state, key: wrong}, tmp_path / FILES[1])
        refused(tmp_path, r"^the file's vblora_logits_. ?.*expected (whole numbers below num_vectors=8|shares)")


@pytest.mark.parametrize(
    ("dtype", "base", "value", "message"),
    [
        (torch.float64, torch.float32, 1e300, r"not finite in torch\.float32"),
        (torch.float32, torch.float16, 1e30, r"not finite in torch\.float16"),
        (torch.float32, torch.float32, float("nan"), r"values that are not finite in"),
        (torch.float8_e5m2, torch.float32, float("inf"), r"values that are not finite in"),
    ],
)
def test_what_is_infinite_where_it_is_used_is_refused(
    dtype: torch.dtype, base: torch.dtype, value: float, message: str, folder: Path
) -> None:
    weight = load_file(folder / FILES[1])[A].to(dtype)
    weight[0, 0] = value
    changed(folder, lora_A=weight)
    with pytest.raises(PeanutError, match=message):
        PeftModel.from_pretrained(net(base), folder, autocast_adapter_dtype=False, check_base=False)
    model = get_peft_model(net(base), LoraConfig(r=2, target_modules=["0"]), autocast_adapter_dtype=False)
    with pytest.raises(PeanutError, match=message):
        set_peft_model_state_dict(model, {**get_peft_model_state_dict(model), A: weight})


@pytest.mark.parametrize(
    "value", [torch.zeros(2, 8, device="meta"), torch.zeros(2, 8).to_sparse(), [[0.0] * 8] * 2, None]
)
def test_a_state_dict_holds_tensors_with_values(value: Any) -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(
        PeanutError, match=r"^the state dict holds .* in 'base_model\.model\.0\.lora_A\.weight'; expected a tensor"
    ):
        set_peft_model_state_dict(model, {**get_peft_model_state_dict(model), A: value})


def test_thousands_of_tensors_too_many_are_told(folder: Path) -> None:
    changed(folder, **{f"x{index}": torch.zeros(1) for index in range(5_000)})
    refused(folder, "has unexpected 0.x0.weight, .* and 4997 more")


def test_a_name_without_end_is_refused(folder: Path) -> None:
    changed(folder, **{"a." * 50_000: torch.zeros(1)})
    refused(folder, "holds a tensor called '.*'; expected at most 1000 characters")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_not_waited_for(name: str, make: Callable[[Path], object], folder: Path) -> None:
    (folder / name).unlink()
    make(folder / name)
    refused(folder, f"^no '{name}' in '.*'")


CONFIGS = {
    "deep list": ("[" * 100_000, "cannot read .*recursion"),
    "deep object": ('{"a":' * 100_000, "cannot read .*recursion"),
    "deep value": (
        '{"peft_type": "LORA", "r": ' + "[" * 900 + "]" * 900 + "}",
        r"json': r=\[\[.*; expected a whole number",
    ),
    "long number": ('{"peft_type": "LORA", "r": 1' + "0" * 5000 + "}", "cannot read .*digits"),
    "twice": ('{"peft_type": "LORA", "r": 2, "r": 3}', "cannot read .*'r' is there twice; expected a whole JSON file"),
    "not a number": ('{"peft_type": "LORA", "r": NaN}', "json': r=nan; expected a whole number"),
    "infinity": ('{"peft_type": "LORA", "lora_alpha": Infinity}', "json': lora_alpha=inf; expected a finite number"),
    "list": ("[]", "holds list; expected a JSON object"),
    "null byte": ('{"peft_type": "LORA"}\0', "cannot read"),
    "junk": (
        json.dumps({"peft_type": "LORA", **{f"k{index}": 1 for index in range(50_000)}}),
        "sets k0=1; expected the fields of LoraConfig",
    ),
    "long name": (json.dumps({"peft_type": "LORA", "x" * 10**6: 1}), "sets xxx"),
    "long value": (json.dumps({"peft_type": "LORA", "bias": "x" * 10**6}), "json': bias='xxx.*'; expected 'none'"),
    "list for a method": ('{"peft_type": ["LORA"]}', "names the method"),
    "no method": ("{}", "names the method None"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_damaged_config_is_one_line(kind: str, folder: Path) -> None:
    text, message = CONFIGS[kind]
    (folder / FILES[0]).write_text(text)
    refused(folder, message)


def test_encodings_of_a_config(folder: Path) -> None:
    path = folder / FILES[0]
    text = path.read_text()
    path.write_text(f"\ufeff{text}", encoding="utf-8")  # as some editors write it
    assert read_json(path) == json.loads(text)
    path.write_bytes(text.encode("utf-16"))
    refused(folder, "cannot read .*utf-8")


def test_a_shard_of_a_tensor_is_not_saved_and_the_gathered_one_is(tmp_path: Path) -> None:
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    full = {key: value.clone() for key, value in model.state_dict().items()}
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model.get_base_model(), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(PeanutError, match=r"^adapter 'default' has a part of '.*' in each process, as a DTens"):
            model.save_pretrained(tmp_path)
        assert not list(tmp_path.iterdir())
        model.save_pretrained(tmp_path, state_dict=full)
    finally:
        distributed.destroy_process_group()
    found = get_peft_model_state_dict(PeftModel.from_pretrained(net(), tmp_path))
    assert torch.equal(found[A], next(value for key, value in full.items() if "lora_A" in key))
