"""An adapter's files: the peer's format, whole or not there, and nothing loaded that does not fit."""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peanut import LoraConfig, PeanutConfig, PeanutError, PeftConfig, PeftModel, VeraConfig, get_peft_model
from peanut.model.checkpoints.stored_adapter import read_adapter

from ...support import distance, look_of, one_thread, randomised, refused, same_bits  # noqa: F401

Build = Callable[..., hf.PreTrainedModel]
IDS = torch.arange(3, 15).reshape(2, 6)
CARD = "README.md"
FILES = ["adapter_config.json", "adapter_model.safetensors"]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapted(base: nn.Module, **options: Any) -> PeftModel:
    config = PeanutConfig(**{"r": 4, "depth": 1, "target_modules": ["q_proj", "v_proj"]} | options)
    return randomised(get_peft_model(base, config)).eval()


@pytest.fixture
def saved(tiny_llama: Build, tmp_path: Path) -> Path:
    adapted(tiny_llama()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is written


def test_a_folder_holds_the_adapter_and_the_head_and_never_the_base(tiny_bert: Build, tmp_path: Path) -> None:
    model = adapted(tiny_bert(), task_type="SEQ_CLS", target_modules=["query"])
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [CARD, *FILES]
    tensors = load_file(tmp_path / FILES[1])
    layer = "base_model.model.bert.encoder.layer.{}.attention.self.query.peanut_{}.weight"
    parts = ["A", "B", "encoders.0", "decoders.0"]
    heads = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert tensors.keys() == {layer.format(i, part) for i in (0, 1) for part in parts} | heads
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    config = json.loads((tmp_path / FILES[0]).read_text())
    assert list(config) == sorted(config)
    assert (config["peft_type"], config["task_type"], config["r"]) == ("PEANUT", "SEQ_CLS", 4)
    assert (config["inference_mode"], config["modules_to_save"]) == (True, ["classifier", "score"])
    with safe_open(tmp_path / FILES[1], "pt") as file:
        own = {"base_values", "config", "save", "sum"}
        assert file.metadata().keys() == {"format", *(f"peanut_{key}" for key in own)}
    assert model.peft_config["default"].inference_mode is False  # what is written changes nothing in the model


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_targets_that_were_left_open_are_written_out(targets: str | None, tiny_llama: Build, tmp_path: Path) -> None:
    model = adapted(tiny_llama(), target_modules=targets)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / FILES[0]).read_text())["target_modules"]
    assert written == sorted(path for path, _ in model.adapters.layers())
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert same_bits(logits(again), logits(model))


def test_several_adapters_go_into_folders_of_their_names(tiny_llama: Build, tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    model.add_adapter("b", LoraConfig(target_modules=["o_proj"]))
    model.save_pretrained(tmp_path / "all")
    assert sorted(os.listdir(tmp_path / "all")) == [CARD, *FILES, "b"]
    assert sorted(os.listdir(tmp_path / "all/b")) == [CARD, *FILES]
    model.save_pretrained(tmp_path / "one", selected_adapters=["b"])
    assert os.listdir(tmp_path / "one") == ["b"]
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "all")
    again.load_adapter(tmp_path / "all", "b", subfolder="b")
    for name in ("default", "b"):
        model.set_adapter(name)
        again.set_adapter(name)
        assert same_bits(logits(again), logits(model))


def test_merging_does_not_show_in_the_files(tiny_llama: Build, tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    before, merged = (read_adapter(tmp_path / name) for name in ("before", "merged"))
    assert (before.config, before.base) == (merged.config, merged.base)
    assert all(same_bits(value, before.state[key]) for key, value in merged.state.items())
    assert distance(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "merged")), logits(model)) < 1e-5


@pytest.mark.parametrize("wrapped", ["", "module.", "_fsdp_wrapped_module.", "_orig_mod."])
def test_values_may_come_from_a_gathered_state_dict(wrapped: str, tiny_bert: Build, tmp_path: Path) -> None:
    model = adapted(tiny_bert(), task_type="SEQ_CLS", target_modules=["query"])
    gathered = {f"{wrapped}{key}": value * 2 for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    state, own = read_adapter(tmp_path).state, dict(model.adapters.parameters("default"))
    assert state.keys() == own.keys()
    assert all(same_bits(value, 2 * own[key].detach()) for key, value in state.items())


def test_a_halved_base_is_still_the_base(saved: Path, tiny_llama: Build) -> None:
    expected = logits(PeftModel.from_pretrained(tiny_llama(), saved))
    for dtype in (torch.bfloat16, torch.float16):
        model = PeftModel.from_pretrained(tiny_llama().to(dtype), saved)
        assert {p.dtype for _, p in model.adapters.parameters("default")} == {torch.float32}
        assert distance(logits(model), expected) < 0.1


def test_loading_into_a_name_that_is_there_brings_the_values_and_their_config(saved: Path, tiny_llama: Build) -> None:
    expected = logits(PeftModel.from_pretrained(tiny_llama(), saved))
    model = adapted(tiny_llama(), scaling=3.0, act_fn="gelu")
    assert distance(logits(model), expected) > 0.01
    model.load_adapter(saved, "default")
    assert same_bits(logits(model), expected)
    assert (model.peft_config["default"].scaling, model.peft_config["default"].act_fn) == (1.0, "relu")
    assert model.get_nb_trainable_parameters()[0] > 0  # it is trained on, as before
    model.merge_adapter()
    with refused(model, r"^adapter 'default' is merged; expected an unmerged adapter; call unmerge_adapter\(\) first$"):
        model.load_adapter(saved, "default")


def test_a_hub_id_is_fetched_file_by_file(saved: Path, tiny_llama: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, name: str, **options: Any) -> str:
        asked.append((repository, name, options))
        return str(saved / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = PeftModel.from_pretrained(tiny_llama(), "owner/name", subfolder="a", revision="r", token="t")
    assert asked == [("owner/name", name, {"subfolder": "a", "revision": "r", "token": "t"}) for name in FILES]
    assert same_bits(logits(model), logits(PeftModel.from_pretrained(tiny_llama(), saved)))


# What is refused


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / FILES[1]
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "peanut_sum"}
    save_file(change(load_file(path)), path, metadata=metadata)


def truncated(folder: Path) -> None:
    path = folder / FILES[1]
    path.write_bytes(path.read_bytes()[:-10])


def cut_in_its_header(folder: Path) -> None:
    path = folder / FILES[1]
    path.write_bytes(path.read_bytes()[:40])


def emptied(folder: Path) -> None:
    (folder / FILES[1]).write_bytes(b"")


def with_huge_header(folder: Path) -> None:
    (folder / FILES[1]).write_bytes(struct.pack("<Q", 2**60) + b"{}")


def pickled(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"nonsense")
    (folder / FILES[1]).unlink()


def not_finite(folder: Path) -> None:
    rewritten(folder, lambda tensors: {key: value * torch.nan for key, value in tensors.items()})


def lacking(folder: Path) -> None:
    rewritten(folder, lambda tensors: dict(sorted(tensors.items())[:-1]))


def with_more(folder: Path) -> None:
    rewritten(folder, lambda tensors: tensors | {"base_model.model.extra": torch.ones(1)})


def of_another_rank(folder: Path) -> None:
    config = json.loads((folder / FILES[0]).read_text())
    (folder / FILES[0]).write_text(json.dumps(config | {"r": 5}))


def without_config(folder: Path) -> None:
    (folder / FILES[0]).unlink()


def with_half_a_config(folder: Path) -> None:
    text = (folder / FILES[0]).read_text()
    (folder / FILES[0]).write_text(text[: len(text) // 2])


BROKEN = [
    (
        truncated,
        r"^cannot read '.*adapter_model\.safetensors': .*; expected a whole safetensors file; copy or save the ad",
    ),
    (cut_in_its_header, r"^cannot read '.*; expected a whole safetensors file"),
    (emptied, r"^cannot read '.*; expected a whole safetensors file"),
    (with_huge_header, r"^cannot read '.*; expected a whole safetensors file"),
    (pickled, r"^cannot read '.*adapter_model\.bin': .*; expected a pickle of tensors and nothing else"),
    (
        not_finite,
        r"^'.*' holds values that are not finite in 'base_model\..*peanut_A\.weight'; expected finite values; save",
    ),
    (
        lacking,
        r"^'.*adapter' lacks model\.layers\.1\.self_attn\.v_proj\.peanut_encoders\.0\.weight; expected the 16 tensors ",
    ),
    (
        with_more,
        r"^'.*adapter' has unexpected extra; expected the 16 tensors of its config on LlamaForCausalLM; check the base",
    ),
    (
        of_another_rank,
        r"^'.*' holds model\..*peanut_A\.weight of shape \(4, 32\); expected \(5, 32\); load it on the base",
    ),
    (
        without_config,
        r"^no 'adapter_config\.json' in '.*' \(it holds README\.md, adapter_model\.safetensors\); expected the",
    ),
    (with_half_a_config, r"^cannot read '.*adapter_config\.json': .*; expected a whole JSON file; save it again$"),
]


@pytest.mark.filterwarnings("ignore:adapter_config.json in .* (is not as it was saved|was saved by this)")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "meta"])
@pytest.mark.parametrize(("broken", "message"), BROKEN, ids=[broken.__name__ for broken, _ in BROKEN])
def test_broken_files_change_no_model(
    broken: Callable[[Path], None], message: str, low_cpu_mem_usage: bool, saved: Path, tiny_llama: Build
) -> None:
    good = saved.parent / "good"
    good.mkdir()
    for name, content in contents(saved).items():
        (good / name).write_bytes(content)
    broken(saved)
    base, fresh = tiny_llama(), tiny_llama()
    with refused(base, message):
        PeftModel.from_pretrained(base, saved, low_cpu_mem_usage=low_cpu_mem_usage)
    model = adapted(fresh)
    with refused(model, message):
        model.load_adapter(saved, "new", low_cpu_mem_usage=low_cpu_mem_usage)
    assert list(model.peft_config) == ["default"]
    if broken is not of_another_rank:
        with refused(model, message):
            model.load_adapter(saved, "default")
    loaded = PeftModel.from_pretrained(base, good)  # and the good file still loads into the same base
    assert same_bits(logits(loaded), logits(PeftModel.from_pretrained(tiny_llama(), good)))


def test_a_base_without_storage_cannot_take_a_head(tiny_bert: Build, tmp_path: Path) -> None:
    adapted(tiny_bert(), task_type="SEQ_CLS", target_modules=["query"]).save_pretrained(tmp_path)
    with torch.device("meta"):
        base = tiny_bert()
    with pytest.raises(
        PeanutError, match=r"^'classifier\.weight' has no storage .*; expected a base model with its weights"
    ):
        PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)


def test_a_folder_that_is_not_there_is_told(tiny_llama: Build, tmp_path: Path) -> None:
    base = tiny_llama()
    with refused(base, r"^no folder '.*nowhere'; expected an adapter's folder or a hub id owner/name; check the path$"):
        PeftModel.from_pretrained(base, tmp_path / "nowhere")
    with refused(
        base, r"^no folder 'some/where', and the hub gives no 'adapter_config\.json' of that name: .*; check the name$"
    ):
        PeftModel.from_pretrained(base, "some/where")


def test_values_that_are_not_finite_are_not_saved(saved: Path, tiny_llama: Build) -> None:
    before = contents(saved)
    model = adapted(tiny_llama())
    with torch.no_grad():
        dict(model.adapters.parameters("default"))["model.layers.0.self_attn.q_proj.peanut_B.weight"][0, 0] = torch.inf
    with refused(
        model,
        r"^adapter 'default' holds values that are not finite in 'model\.layers\.0\..*q_proj\.peanut_B\.weight'"
        r"; expected finite values; it is not saved; lower the learning rate or find the bad batch$",
    ):
        model.save_pretrained(saved)
    assert contents(saved) == before


def test_a_folder_that_cannot_be_written_is_told(saved: Path, tiny_llama: Build, tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/adapter"):
        with refused(model, r"^cannot write into folder '.*': .*; free some space or choose another folder$"):
            model.save_pretrained(place)
    assert (tmp_path / "file").read_text() == "in the way"


FULL_DISK = """
import resource, signal, sys
import transformers as hf
from peanut import PeanutConfig, PeanutError, get_peft_model
config = hf.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=50)
model = get_peft_model(hf.LlamaForCausalLM(config), PeanutConfig(r=256))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (100, 20_000):  # in the middle of the config, in the middle of the weights
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for folder in sys.argv[1:]:
        try:
            model.save_pretrained(folder)
        except PeanutError as error:
            print(error)
"""


def test_a_full_disk_leaves_what_was_there(saved: Path, tmp_path: Path) -> None:
    before, new = contents(saved), tmp_path / "new"
    command = [sys.executable, "-c", FULL_DISK, str(saved), str(new)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 4
    for line, folder in zip(lines, [saved, new] * 2, strict=True):
        assert line.startswith(
            f"cannot write README.md, adapter_config.json, adapter_model.safetensors into '{folder}': "
        )
        assert line.endswith("; free some space or choose another folder")
    assert contents(saved) == before
    assert contents(new) == {}


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj"], trainable_token_indices=[3, 5]),
        VeraConfig(r=4, target_modules=["q_proj", "up_proj"]),
    ],
    ids=["PiSSA and tokens", "VeRA"],
)
def test_a_copy_of_a_model_saves_what_the_model_does(config: PeftConfig, tiny_llama: Build, tmp_path: Path) -> None:
    model = randomised(get_peft_model(tiny_llama(), config), scale=0.1).eval()
    expected = model(IDS).logits
    for name, other in (("copy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        assert same_bits(other(IDS).logits, expected)
        other.save_pretrained(tmp_path / name)
        assert distance(PeftModel.from_pretrained(tiny_llama(), tmp_path / name)(IDS).logits, expected) < 1e-6


def test_values_near_the_largest_load_although_their_norm_is_not_finite(tiny_llama: Build, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for _, value in model.adapters.parameters("default"):
            value.fill_(2.0**127)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    found = [value for _, value in again.adapters.parameters("default")]
    assert len(found) == 4
    assert all(bool((value == 2.0**127).all()) for value in found)
