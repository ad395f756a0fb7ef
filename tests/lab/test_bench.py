"""The benchmark counts bytes exactly, takes ratios as it says, compares like with like, and writes what it found."""

from __future__ import annotations

import functools
import gc
import json
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peanut
from peanut.errors import PeanutError
from peanut.lab import bench, measure, variants
from peanut.lab.bench_report import summary
from peanut.lab.bench_rows import Row
from peanut.lab.measure import Spread, interleaved, peak_bytes, ratio, repeated, saved_bytes, within_memory

CPU = torch.device("cpu")
TINY = ["--tokens", "8", "--dims", "16", "24", "--rank", "2", "--blocks", "1", "--repeats", "3", "--threads", "1"]


# Bytes kept for the backward


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def test_counting_what_is_kept_keeps_nothing() -> None:
    class Thing:
        pass

    held: list[weakref.ref[Thing]] = []

    class Holds(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.thing, y = Thing(), x.exp()
            held.append(weakref.ref(ctx.thing))
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise AssertionError

    x = torch.randn(3, 4, requires_grad=True)
    assert saved_bytes(lambda: Holds.apply(x).exp(), [], [x]) == 2 * 3 * 4 * 4
    gc.collect()
    assert held[0]() is None


def test_a_trained_linear_layer_keeps_its_input_and_nothing_else() -> None:
    layer, x = nn.Linear(5, 7), torch.randn(3, 5)
    parameters = list(layer.parameters())
    assert saved_bytes(lambda: layer(x), [], parameters) == 3 * 5 * 4
    assert saved_bytes(lambda: layer(x), [layer], parameters) == 0
    assert saved_bytes(lambda: layer(x), [layer], []) == 0  # an input without gradient: the weight is not needed
    x.requires_grad_()
    assert saved_bytes(lambda: layer(x), [layer], []) == 5 * 7 * 4


def test_a_product_keeps_both_factors_and_a_square_keeps_its_own_once() -> None:
    x, y = floats(4, 6), floats(4, 6)
    assert saved_bytes(lambda: x * y, [], []) == 2 * 4 * 6 * 4
    assert saved_bytes(lambda: x * x, [], []) == 4 * 6 * 4
    assert saved_bytes(lambda: x * y, [], [y]) == 4 * 6 * 4


def test_a_view_keeps_all_of_its_storage_once() -> None:
    x = floats(10, 6)
    assert saved_bytes(lambda: x[:1] * x[1:2], [], []) == 10 * 6 * 4


def test_what_an_autograd_function_saves_is_counted() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x.half())
            return x * x

    x = floats(4, 6)
    assert saved_bytes(lambda: Square.apply(x), [], []) == 4 * 6 * 2


def test_activations_between_layers_belong_to_the_layer_that_reads_them() -> None:
    stack = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5)).requires_grad_(False)
    x = floats(3, 5)
    parameters = list(stack.parameters())
    assert saved_bytes(lambda: stack(x), stack, parameters) == 0
    assert saved_bytes(lambda: stack(x), [stack[0], stack[2]], parameters) == 3 * 7 * 4  # the GELU's input


def test_the_memory_of_a_freed_input_is_not_taken_for_that_input() -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2  # keeps nothing

    first, second = Doubled(), Doubled()
    x = floats(300, 300)
    assert saved_bytes(lambda: second(first(x)).exp().exp(), [first, second], []) == 2 * 300 * 300 * 4


def test_peak_is_the_most_that_is_held_at_once() -> None:
    def call() -> Tensor:
        first, second = torch.zeros(2**18), torch.zeros(2**18)
        del first, second
        return torch.zeros(2**18)

    assert peak_bytes(call, CPU) == 2 * 2**20


# Times


def test_a_ratio_is_taken_within_each_round() -> None:
    assert ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == Spread(median=2.0, low=2.0, high=2.5, least=2.0)
    slower_later = ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0])
    assert slower_later == Spread(2.0, 2.0, 2.0, 2.0)
    assert ratio([3.0, 2.0], [1.0, 2.0]).least == 2.0


def test_a_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(median=3.0, low=2.0, high=4.0, least=1.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 7.0)


def test_rounds_interleave_the_probes_in_changing_order() -> None:
    called: list[int] = []

    def probe(index: int) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            assert not gc.isenabled()
            called.append(index)
            return {"calls": float(len(called))}

        return run

    found = interleaved([probe(index) for index in range(5)], range(20))
    assert gc.isenabled()
    rounds = [tuple(called[start : start + 5]) for start in range(0, 100, 5)]
    assert all(sorted(each) == list(range(5)) for each in rounds)
    assert len(set(rounds)) > 10
    for index, quantities in enumerate(found):
        places = [1 + 5 * number + order.index(index) for number, order in enumerate(rounds)]
        assert quantities == {"calls": [float(place) for place in places]}


def test_a_short_call_is_timed_over_many(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = 0.0, 0

    def call() -> None:
        nonlocal clock, calls
        clock, calls = clock + 0.25, calls + 1

    monkeypatch.setattr(measure, "now", lambda device: clock)
    probe = repeated(call, CPU, seconds=4.0)
    calls = 0
    assert probe() == 0.25
    assert calls >= 16


# What is compared


@pytest.fixture
def built() -> list[variants.Variant]:
    configs = variants.configs_of(["peanut", "LORA"], rank=4, depths=[0, 2])
    return variants.variants_of(
        configs, lambda: variants.frozen_stack(16, 24, 2, CPU, torch.float32), torch.randn(1, 8, 16)
    )


def test_both_sides_hold_the_same_parameters_and_compute_the_same(built: list[variants.Variant]) -> None:
    names = [("", "frozen")]
    names += [(name, by) for name in ("PEANUT depth 0", "PEANUT depth 2", "LORA") for by in ("peanut", "peft")]
    assert [(each.method, each.by) for each in built] == names
    x, frozen = torch.randn(1, 8, 16), built[0]
    for ours, theirs in zip(built[1::2], built[2::2], strict=True):
        assert ours.trained_parameters == theirs.trained_parameters > 0
        assert theirs.difference is not None
        assert theirs.difference < 1e-6
        torch.testing.assert_close(ours.model(x), theirs.model(x))
        assert not torch.allclose(ours.model(x), frozen.model(x), rtol=1e-3)


def test_a_step_trains_the_adapter_and_reaches_the_input(built: list[variants.Variant]) -> None:
    x, grad = floats(1, 8, 16), torch.randn(1, 8, 16)
    reached: list[Tensor] = []
    x.register_post_accumulate_grad_hook(lambda leaf: reached.append(leaf.grad))  # type: ignore[arg-type]
    for variant in built:
        before = {name: value.clone() for name, value in variant.model.named_parameters()}
        seconds = variant.step(x, grad)
        assert x.grad is None
        assert seconds["step"] >= seconds["forward"] + seconds["backward"] > 0
        for name, value in variant.model.named_parameters():
            assert torch.equal(value, before[name]) != value.requires_grad, name
            assert value.grad is None
    assert len(reached) == len(built)
    torch.testing.assert_close(reached[1], reached[2])


def test_what_does_not_compute_the_same_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = variants.get_peft_model_state_dict
    monkeypatch.setattr(
        variants, "get_peft_model_state_dict", lambda model: {key: 2 * value for key, value in wrapped(model).items()}
    )
    with pytest.raises(PeanutError, match=r"LORA: the output differs from that of peft .* expected at most 1.0e-05"):
        variants.variants_of(
            variants.configs_of(["lora"], 2, []),
            lambda: variants.frozen_stack(8, 12, 1, CPU, torch.float32),
            torch.randn(1, 4, 8),
        )


def test_peanut_keeps_a_twentieth_of_what_the_peer_keeps() -> None:
    x = floats(1, 2048, 768)
    configs = variants.configs_of(["peanut", "lora"], rank=16, depths=[0])
    built = variants.variants_of(configs, lambda: variants.frozen_stack(768, 3072, 1, CPU, torch.float32), x)
    frozen, peanut, their_peanut, lora, their_lora = (variant.saved_bytes(x) for variant in built)
    assert frozen == 0
    assert peanut <= 0.05 * their_peanut
    assert their_peanut >= 2 * 768 * 3072 * 4  # ΔW written out, in both layers
    assert lora <= their_lora == 2 * 2048 * 16 * 4  # x A, of every token


# The command


def run(output: Path, *more: str) -> dict[str, Any]:
    assert bench.main([*TINY, "--output", str(output), *more]) == 0
    [file] = output.glob("*.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_command_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    found = run(tmp_path, "--methods", "peanut", "lora", "--depth", "0", "1")
    assert torch.get_num_threads() == threads
    assert set(found) == {"hardware", "settings", "summary", "variants", "versions", "wait_policy"}
    assert found["versions"] == {"peanut": peanut.__version__, "torch": torch.__version__, "peft": "0.21.2"}
    assert found["settings"] == {
        "stack": "layers", "methods": ["LORA", "PEANUT"], "tokens": 8, "rank": 2, "depth": [0, 1], "dims": [16, 24],
        "blocks": 1, "dtype": "float32", "device": "cpu", "repeats": 3, "threads": 1,
    }  # fmt: skip
    rows = {(row["method"], row["by"]): row for row in found["variants"]}
    assert next(iter(rows)) == ("", "frozen")
    assert len(rows) == 7
    frozen, ours, theirs = rows["", "frozen"], rows["PEANUT depth 1", "peanut"], rows["PEANUT depth 1", "peft"]
    for row in rows.values():
        assert set(row) == {
            "method", "by", "trained_parameters", "saved_bytes", "peak_bytes", "evaluation_bytes", "file_bytes",
            "difference", "note", "seconds", "ratios",
        }  # fmt: skip
        lived = {"inject", "save", "load"} if row["method"] else set()
        assert set(row["seconds"]) == {"forward", "backward", "step", "token"} | lived
        for spread in row["seconds"].values():
            assert 0 < spread["least"] <= spread["low"] <= spread["median"] <= spread["high"]
    assert frozen["ratios"] == {}
    assert frozen["trained_parameters"] == 0
    assert ours["trained_parameters"] == theirs["trained_parameters"] == 2 * 2 * (16 + 24) + 2 * (2 * 2 * 2)
    assert set(ours["ratios"]) == {"frozen", "peer", "peer_lora"}
    assert set(theirs["ratios"]) == {"frozen", "peer_lora"}
    assert ours["ratios"]["peer"]["saved_bytes"] == ours["saved_bytes"] / theirs["saved_bytes"]
    assert ours["ratios"]["frozen"]["saved_bytes"] is None
    for reference, row in {"frozen": frozen, "peer": theirs, "peer_lora": rows["LORA", "peft"]}.items():
        for quantity, spread in ours["ratios"][reference].items():
            if quantity in row["seconds"]:
                least = ours["seconds"][quantity]["least"] / row["seconds"][quantity]["least"]
                assert spread["least"] == pytest.approx(least)
    assert frozen["file_bytes"] is None
    assert ours["file_bytes"] > 4 * ours["trained_parameters"] < theirs["file_bytes"]
    assert ours["evaluation_bytes"] >= frozen["evaluation_bytes"] >= 8 * 24 * 4
    assert found["summary"]["compared"] == 3
    assert set(found["summary"]["speed_up"]) == set(ours["seconds"])
    [plot] = tmp_path.glob("*.png")
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert plot.stem == next(tmp_path.glob("*.json")).stem
    assert plot.stem.startswith(f"bench-{peanut.__version__}-")
    assert plot.stem.endswith("-1t-methods-lora-peanut-tokens-8-rank-2-depth-0-1-dims-16-24-blocks-1-repeats-3")
    told = capsys.readouterr().out
    assert "PEANUT depth 1 peft" in told
    assert str(plot) in told


def test_without_the_peer_its_columns_are_absent_and_this_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    found = run(tmp_path, "--methods", "lora")
    assert found["versions"]["peft"] is None
    assert [(row["method"], row["by"]) for row in found["variants"]] == [("", "frozen"), ("LORA", "peanut")]
    assert set(found["variants"][1]["ratios"]) == {"frozen"}
    told = capsys.readouterr().out
    assert "Hugging Face PEFT is not installed" in told
    assert "÷ peft" not in told


def test_half_precision_is_measured_too(tmp_path: Path) -> None:
    found = run(tmp_path, "--methods", "peanut", "--depth", "0", "--dtype", "bfloat16")
    assert [row["method"] for row in found["variants"]] == ["", *2 * ["LORA"], *2 * ["PEANUT depth 0"]]
    assert next(tmp_path.glob("*.json")).stem.endswith("-dtype-bfloat16-repeats-3")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--methods", "lora", "peanuts"], "--methods names the method 'peanuts'; expected one of "),
        (["--methods", "linear_probing"], "LINEAR_PROBING does not change linear layers by themselves"),
        (["--methods", "loreft"], "LOREFT does not change linear layers by themselves"),
        (["--rank", "0"], "--rank=0; expected a whole number of at least 1"),
        (["--depth", "0", "-1"], "--depth=-1; expected a whole number of at least 0"),
        (["--dims", "0", "3"], "--dims=0; expected a whole number of at least 1"),
        (["--device", "toaster"], "--device toaster: "),
        (["--stack", "minilm"], "--dims with --stack minilm; expected its own sizes; leave --dims out"),
        (["--stack", "llama-3.2-3b", "--methods", "bitfit"], "BITFIT cannot run on blocks of the shape of Llama"),
    ],
)
def test_a_wrong_option_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    output = tmp_path / "results"
    assert bench.main([*TINY, "--output", str(output), *args]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {message}")
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert not output.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_stack_for_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--stack", "llama-3.2-3b", "--output", str(tmp_path / "results")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: --device cuda: ")
    assert told.endswith("; expected a GPU for --stack llama-3.2-3b; try --device cpu\n")


# What is said of it


def row(method: str, by: variants.By, step: list[float], saved: int, file: int = 100) -> Row:
    return Row(method, by, 1, saved, 1000, 1000, file, seconds={"step": step, "forward": step})


def test_the_summary_is_a_geometric_mean_and_names_what_is_worse() -> None:
    rows = [
        row("", "frozen", [1.0, 1.0, 1.0], 0),
        row("A", "peanut", [1.0, 1.0, 1.0], 5),
        row("A", "peft", [8.0, 8.0, 8.0], 10),
        row("B", "peanut", [2.0, 2.2, 2.4], 40, file=101),
        row("B", "peft", [1.0, 1.0, 1.0], 10),
        row("C", "peanut", [1.0, 1.2, 1.2], 0),
        row("C", "peft", [1.1, 1.1, 1.1], 10),
        row("D", "peanut", [9.0, 9.0, 9.0], 90),  # the peer has none
    ]
    found = summary(rows)
    assert found is not None
    assert found["compared"] == 3
    assert found["speed_up"]["step"] == pytest.approx((8 / 2.2 * 1.1 / 1.2) ** (1 / 3))
    assert found["bytes"]["saved_bytes"] == pytest.approx((2 / 4) ** (1 / 2))  # C keeps nothing
    worse = {(each["method"], each["quantity"]): each for each in found["worse"]}
    assert set(worse) == {("B", "step"), ("C", "step"), ("B", "saved_bytes"), ("B", "file_bytes")}
    assert (worse["B", "step"]["clear"], worse["C", "step"]["clear"]) == (True, False)
    assert worse["B", "saved_bytes"]["ratio"]["median"] == 4
    assert summary(rows[:2]) is None


def test_a_peer_that_refuses_or_lacks_memory_or_files_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, step = variants.peer_of, variants.Variant.step

    def peer_of(name: str, *rest: Any) -> Any:
        if name == "VERA":
            raise PeanutError("VERA: the peer refuses")
        return original(name, *rest)

    def greedy(self: variants.Variant, x: Tensor, grad: Tensor) -> dict[str, float]:
        if (self.method, self.by) == ("IA3", "peft"):
            torch.empty(2**60)
        return step(self, x, grad)

    def never(self: Any, *rest: Any, **more: Any) -> None:
        raise KeyError("no file")

    monkeypatch.setattr(variants, "peer_of", peer_of)
    monkeypatch.setattr(variants.Variant, "step", greedy)
    monkeypatch.setattr("peft.PeftModel.save_pretrained", never)
    found = run(tmp_path, "--methods", "vera", "ia3")
    notes = {(row["method"], row["by"]): row["note"] for row in found["variants"]}
    assert notes == {
        ("", "frozen"): "",
        ("IA3", "peanut"): "peft 0.21.2 wants more memory than is free",
        ("LORA", "peanut"): "",
        ("LORA", "peft"): "it cannot be saved and loaded: 'no file'",
        ("VERA", "peanut"): "VERA: the peer refuses",
    }
    told = capsys.readouterr().out
    assert "IA3 peanut: peft 0.21.2 wants more memory than is free" in told


def test_a_slow_variant_sits_out_and_its_rounds_still_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PATIENCE", 0.05)
    rows = [row("A", "peanut", [], 0), row("B", "peanut", [], 0)]
    calls = [0, 0]

    def probe(index: int) -> dict[str, float]:
        calls[index] += 1
        if index == 1:
            time.sleep(0.06)
        return {"token": float(calls[index] + index)}

    bench._rounds(rows, "token", [functools.partial(probe, index) for index in range(2)], 4)
    assert rows[0].seconds["token"] == [1.0, 2.0, 3.0, 4.0]
    assert rows[1].seconds["token"] == [2.0]
    assert rows[1].note == "token in 1 of 4 rounds, being slow"
    assert rows[0].note == ""
    assert ratio(rows[1].seconds["token"], rows[0].seconds["token"]).median == 2.0


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="only Linux is limited")
def test_memory_that_is_not_there_is_refused_and_the_limit_taken_back() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with within_memory(share=0.001), pytest.raises(RuntimeError, match="allocate memory"):
        torch.ones(2**32)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_a_folder_that_cannot_be_written_is_told_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(settings: bench.Settings) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(bench, "measure", never)
    (tmp_path / "results").write_text("a file in the way")
    assert bench.main([*TINY, "--output", str(tmp_path / "results")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot write into folder")
