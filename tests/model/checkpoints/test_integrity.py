"""Config and tensors are of one save, also beside a writer and after a kill; a flipped bit is found."""

from __future__ import annotations

import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peanut import AdaLoraConfig, LoraConfig, PeanutError, PeftConfig, PeftModel, get_peft_model
from peanut.model.checkpoints import integrity, stored_adapter
from peanut.model.checkpoints.checkpoint import training_state
from peanut.model.checkpoints.integrity import check_sum, checksums, with_sum

from ...support import Net, one_thread, randomised, refused, same_bits  # noqa: F401

X = torch.arange(12.0).reshape(2, 6) / 6
CONFIG, WEIGHTS, TRAINING = "adapter_config.json", "adapter_model.safetensors", "adapter_training.safetensors"
METHODS: dict[str, Callable[[float], PeftConfig]] = {
    "LORA": lambda alpha: LoraConfig(r=2, lora_alpha=alpha, target_modules=["layer"]),
    "ADALORA": lambda alpha: AdaLoraConfig(
        init_r=2, target_r=1, lora_alpha=alpha, total_step=10, target_modules=["layer"]
    ),
}
CARD = "README.md"
FILES = {"LORA": [CONFIG, WEIGHTS], "ADALORA": [CONFIG, WEIGHTS, TRAINING]}


def base() -> Net:
    torch.manual_seed(5)
    return Net(nn.Linear(6, 4))


def model_of(alpha: int, method: str = "LORA") -> PeftModel:
    """Another adapter for every α, of the same shapes."""
    return randomised(get_peft_model(base(), METHODS[method](alpha)), scale=0.1 * alpha).eval()


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


def loaded(folder: Path) -> Tensor:
    return answer(PeftModel.from_pretrained(base(), folder))


class Killed(BaseException):
    """The process ends here: nothing after it runs."""


def save_and_be_killed(model: PeftModel, folder: Path, renames: int, patch: pytest.MonkeyPatch) -> bool:
    """Saves until so many files have got their names, and tells whether that was the end."""
    replace, left = os.replace, [renames]

    def killing(source: Any, target: Any) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        replace(source, target)

    with patch.context() as during:
        during.setattr(os, "replace", killing)
        during.setattr(Path, "unlink", lambda *_, **__: None)
        try:
            model.save_pretrained(folder)
        except Killed:
            return True
        return False


@pytest.mark.parametrize("ids", [True, False], ids=["", "old without ids"])
@pytest.mark.parametrize("method", METHODS)
def test_a_kill_at_any_moment_leaves_the_old_adapter_or_the_new_one(
    method: str, ids: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = model_of(1, method), model_of(64, method)
    for renames in range(len(FILES[method])):
        folder = tmp_path / str(renames)
        old.save_pretrained(folder)
        if not ids:  # as other versions and Hugging Face PEFT write them
            edited(folder, peft_version="0.18.0")
            for name in FILES[method][1:]:
                save_file(load_file(folder / name), folder / name)
        assert save_and_be_killed(new, folder, renames, monkeypatch)
        found = PeftModel.from_pretrained(base(), folder, is_trainable=True)
        expected = new if renames else old
        assert same_bits(answer(found.eval()), answer(expected))
        assert found.peft_config["default"].lora_alpha == expected.peft_config["default"].lora_alpha
        mine, theirs = (training_state(model.adapters, "default") for model in (found, expected))
        assert mine.keys() == theirs.keys()
        assert all(same_bits(value, theirs[key]) for key, value in mine.items())
        assert len(os.listdir(folder)) > len(FILES[method])
        old.save_pretrained(folder)  # and the next save removes what was left
        assert sorted(os.listdir(folder)) == [CARD, *FILES[method]]
        assert same_bits(loaded(folder), answer(old))
    assert len(os.listdir(tmp_path)) == len(FILES[method]) >= 2


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("ids", [True, False], ids=["", "first without ids"])
def test_a_save_between_the_reads_of_config_and_tensors(
    times: int, ids: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, read, count = [model_of(1), model_of(64)], stored_adapter._read, [0]
    models[0].save_pretrained(tmp_path)
    if not ids:
        edited(tmp_path, peft_version="0.18.0")
        save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)

    def beside(*args: Any) -> Any:
        if Path(args[0]).name == WEIGHTS and count[0] < times:
            count[0] += 1
            models[count[0] % 2].save_pretrained(tmp_path)
        return read(*args)

    monkeypatch.setattr(stored_adapter, "_read", beside)
    assert same_bits(loaded(tmp_path), answer(models[times % 2]))
    assert count[0] == times


def test_readers_beside_two_writers(tmp_path: Path) -> None:
    models = [model_of(1), model_of(64)]
    expected = [answer(model) for model in models]
    models[0].save_pretrained(tmp_path)
    ended = threading.Event()

    def save(model: PeftModel) -> None:
        while not ended.is_set():
            model.save_pretrained(tmp_path)

    writers = [threading.Thread(target=save, args=(model,)) for model in models]
    for writer in writers:
        writer.start()
    try:
        found = [stored_adapter.read_adapter(tmp_path) for _ in range(60)]
    finally:
        ended.set()
        for writer in writers:
            writer.join()
    own = {model.peft_config["default"].lora_alpha: model for model in models}
    assert len(found) == 60
    for stored in found:
        state = dict(own[stored.config.lora_alpha].adapters.parameters("default"))
        assert all(torch.equal(value, state[key]) for key, value in stored.state.items())
    assert any(same_bits(loaded(tmp_path), own) for own in expected)
    assert sorted(os.listdir(tmp_path)) == [CARD, CONFIG, WEIGHTS]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_files_of_two_saves_are_refused_by_their_headers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, alpha in (("a", 1), ("b", 64)):
        model_of(alpha).save_pretrained(tmp_path / folder)
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    net = base()
    with (
        monkeypatch.context() as patched,
        refused(
            net, r"^'.*a' holds adapter_config.json of one save and adapter_model.safetensors of another; expected "
        ),
    ):
        patched.delattr(stored_adapter, "read_tensors")  # it would be called for each of many tries
        PeftModel.from_pretrained(net, tmp_path / "a")
    config = PeftConfig.from_pretrained(tmp_path / "a")  # said on purpose, it is done
    assert PeftModel.from_pretrained(base(), tmp_path / "a", config=config).peft_config["default"].r == 2


def test_training_state_of_another_save_is_refused_for_training(tmp_path: Path) -> None:
    for folder, alpha in (("a", 1), ("b", 64)):
        model_of(alpha, "ADALORA").save_pretrained(tmp_path / folder)
    shutil.copy(tmp_path / "b" / TRAINING, tmp_path / "a" / TRAINING)
    net = base()
    with refused(
        net, r"^adapter_training.safetensors in '.*a' is of another save than the adapter beside it; expected"
    ):
        PeftModel.from_pretrained(net, tmp_path / "a", is_trainable=True)
    assert same_bits(loaded(tmp_path / "a"), answer(model_of(1, "ADALORA")))
    model_of(1).save_pretrained(tmp_path / "b")
    assert sorted(os.listdir(tmp_path / "b")) == [CARD, CONFIG, WEIGHTS]  # one that has none removes it
    shutil.copy(tmp_path / "a" / TRAINING, tmp_path / "b" / TRAINING)  # as if it had been killed before that
    assert not stored_adapter.read_adapter(tmp_path / "b").passing


def edited(folder: Path, **fields: Any) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**values, **fields}))


@pytest.mark.parametrize("version", ["kept", "0.18.0", None])
def test_a_config_may_be_edited(version: str | None, tmp_path: Path) -> None:
    model_of(1).save_pretrained(tmp_path)
    edited(tmp_path, lora_alpha=3, base_model_name_or_path="moved", target_modules=r".*layer")
    if version != "kept":
        edited(tmp_path, peft_version=version)
    changed = r"^adapter_config.json in '.*' is not as it was saved; if you have not changed it, copy or save"
    with pytest.warns(UserWarning, match=changed):
        config = PeftModel.from_pretrained(base(), tmp_path).peft_config["default"]
    assert (config.lora_alpha, config.base_model_name_or_path, config.target_modules) == (3, "moved", ".*layer")
    assert config.peft_version == ("0.18.0" if version == "0.18.0" else "0.21.2")
    config = PeftConfig.from_pretrained(tmp_path)
    config.lora_alpha = 5
    config.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=changed):
        assert PeftModel.from_pretrained(base(), tmp_path).peft_config["default"].lora_alpha == 5


@pytest.mark.parametrize(
    "fields",
    [
        {"base_model_name_or_path": "moved"},
        {"revision": "main", "task_type": "CAUSAL_LM", "inference_mode": False},
        {"peft_version": "0.18.0"},
        {"peft_version": None, "target_modules": ["layer"], "use_rslora": False},
    ],
)
def test_a_config_may_say_otherwise_where_the_adapter_lies(fields: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(1)
    model.save_pretrained(tmp_path)
    edited(tmp_path, **fields)
    assert same_bits(loaded(tmp_path), answer(model))


def test_a_flipped_bit_of_the_config_is_found(tmp_path: Path) -> None:
    model = model_of(8)
    model.save_pretrained(tmp_path)
    path, expected = tmp_path / CONFIG, answer(model)
    whole, found = path.read_bytes(), 0
    bits = range(0, 8 * len(whole), 37)
    for bit in bits:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                other = loaded(tmp_path)
            except PeanutError:
                found += 1
            else:
                found += bool(warned)
                assert warned or same_bits(other, expected), flipped.decode(errors="replace")
    assert found > len(bits) / 3


def test_a_file_that_changes_while_it_is_read_is_read_again_and_a_damaged_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read, reads = model_of(1), stored_adapter.open_tensors, [0]
    model.save_pretrained(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()

    def beside(path: Any) -> Any:
        reads[0] += 1
        if reads[0] < 4:  # another writer is done while this file is open
            Path(path).write_bytes(whole[: -reads[0]])
        elif reads[0] == 4:
            Path(path).write_bytes(whole)
        return read(path)

    monkeypatch.setattr(stored_adapter, "open_tensors", beside)
    assert same_bits(loaded(tmp_path), answer(model))
    assert reads == [4]
    (tmp_path / WEIGHTS).write_bytes(whole[:-1])
    with pytest.raises(PeanutError, match=r"^cannot read '"):
        loaded(tmp_path)
    assert reads == [5]


def test_each_tensor_is_summed_once_when_it_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summed = []
    crc = integrity._crc
    monkeypatch.setattr(integrity, "_crc", lambda value: summed.append(value) or crc(value))
    model = model_of(1, "ADALORA")
    model.save_pretrained(tmp_path)
    files = [load_file(tmp_path / name) for name in (WEIGHTS, TRAINING)]
    assert len(summed) == sum(map(len, files)) > 0


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_always_gives_the_same_files_and_another_others(method: str, tmp_path: Path) -> None:
    for folder, alpha in (("a", 1), ("b", 2)):
        model_of(alpha, method).save_pretrained(tmp_path / folder)
    copied = get_peft_model(base(), PeftConfig.from_pretrained(tmp_path / "a"))
    copied.load_adapter(tmp_path / "a", "default")
    copied.save_pretrained(tmp_path / "again")
    a, again, b = (
        {name: (tmp_path / folder / name).read_bytes() for name in FILES[method]} for folder in ("a", "again", "b")
    )
    assert a == again
    assert not any(a[name] == b[name] for name in a)


def test_the_peer_reads_the_config_without_a_warning(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for number, config in enumerate((LoraConfig(r=2, target_modules=["layer"]), METHODS["ADALORA"](1))):
        get_peft_model(base(), config).save_pretrained(tmp_path / str(number))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read = peft.PeftConfig.from_pretrained(tmp_path / str(number))
        assert read.peft_version.startswith("0.21.2+peanut.")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "meta"])
def test_no_flipped_bit_changes_an_answer(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = model_of(1)
    model.save_pretrained(tmp_path)
    path, expected = tmp_path / WEIGHTS, answer(model)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    found = 0
    bits = [*range(8 * start, 8 * len(whole), 97), *range(8 * whole.index(b"peanut"), 8 * whole.index(b"}}"), 41)]
    for bit in bits:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            other = PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        except PeanutError:
            found += 1
        else:
            assert same_bits(answer(other), expected), bit
    assert found > 0.8 * len(bits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5, 4), (8,), (1,)])
def test_values_of_any_size_are_summed(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape).to(dtype)
    metadata = with_sum({"format": "pt"}, checksums({"a": value}))
    check_sum(metadata, {"a": torch.stack([value, value])[1]}, "the file")
    others = [value[None], value.double() * 2, -value, -value.roll(1)]
    for other in ({"b": value}, *({"a": other} for other in others)):
        with pytest.raises(PeanutError, match=r"^'the file' does not hold what was written: its checksum differs; "):
            check_sum(metadata, other, "the file")


def test_files_without_an_id_or_a_checksum_load(tmp_path: Path) -> None:
    model = model_of(1)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({key: value * 2 for key, value in tensors.items()}, tmp_path / WEIGHTS)
    with pytest.warns(UserWarning, match="was saved by this library and adapter_model.safetensors by another; "):
        assert not same_bits(loaded(tmp_path), answer(model))
    edited(tmp_path, peft_version="0.18.0")
    assert not same_bits(loaded(tmp_path), answer(model))


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_a_kill_while_another_method_takes_the_place_leaves_one_of_them_whole(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_of(1).save_pretrained(tmp_path)
    old, new = loaded(tmp_path), model_of(2, "ADALORA")
    save_and_be_killed(new, tmp_path, renames, monkeypatch)
    read = stored_adapter.read_adapter(tmp_path)
    whole = str(read.config.peft_type) == "ADALORA"
    assert whole == (renames > 0)
    assert read.fits
    assert bool(read.passing) == whole
    assert same_bits(loaded(tmp_path), answer(new) if whole else old)


def test_a_config_that_was_read_has_no_label_to_leak(tmp_path: Path) -> None:
    model_of(1).save_pretrained(tmp_path / "a")
    config = PeftConfig.from_pretrained(tmp_path / "a")
    assert "peanut" not in str(config.peft_version)
    model = randomised(get_peft_model(base(), config)).eval()
    model.save_pretrained(tmp_path / "b")
    model.peft_config["default"].save_pretrained(tmp_path / "b")
    assert same_bits(loaded(tmp_path / "b"), answer(model))


def test_tensors_in_one_byte_are_summed_as_they_are_written(tmp_path: Path) -> None:
    model = model_of(1)
    for _, value in model.adapters.parameters("default"):
        value.data = value.data.to(torch.float8_e4m3fn)
    model.save_pretrained(tmp_path)
    read = stored_adapter.read_adapter(tmp_path)
    assert {value.dtype for value in read.state.values()} == {torch.float32}
