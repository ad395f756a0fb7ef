"""The layer wrapper: what it keeps and lets go, beside hooks, in training and in compiled models."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from peanut import LoraConfig, PeanutConfig, PeanutError, PeftModel, get_peft_model
from peanut.methods.peanut import Peanut

from ...support import Net, directed, distance, frozen_state, one_thread, randomised, same_bits  # noqa: F401

Build = Callable[..., hf.PreTrainedModel]
IDS = torch.arange(3, 31).reshape(4, 7)


def adapted(base: nn.Module, **options: Any) -> PeftModel:
    options = {"r": 4, "depth": 1, "target_modules": ["q_proj", "up_proj"]} | options
    return randomised(get_peft_model(base, PeanutConfig(**options))).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often PEANuT's factors were computed since the last call."""
    count = Counter()
    change = Peanut.change

    def counted(*args: Any) -> Any:
        count["change"] += 1
        return change(*args)

    monkeypatch.setattr(Peanut, "change", counted)
    return lambda: count.pop("change", 0)


# What is kept


def test_factors_are_kept_where_the_caller_says_so_and_in_evaluation_alone(
    tiny_llama: Build, computed: Callable[[], int]
) -> None:
    model = adapted(tiny_llama())
    for _ in range(2):
        logits(model)
        assert computed() == 4  # nothing outlives the call
    model.generate(IDS, max_new_tokens=5, pad_token_id=0)
    assert computed() == 4  # for five tokens
    with model.inference():
        for expected in (4, 0):
            logits(model)
            assert computed() == expected
        model.generate(IDS, max_new_tokens=5, pad_token_id=0)
        assert computed() == 0
        model(IDS)
        assert computed() == 4  # gradients may be wanted
        with torch.no_grad():
            model.train()(IDS)
            assert computed() == 4
            model.eval()(IDS)
            assert computed() == 0
    logits(model)
    assert computed() == 4


def test_threads_that_enter_the_same_context_share_what_is_kept_and_others_keep_nothing(
    tiny_llama: Build, computed: Callable[[], int]
) -> None:
    model = adapted(tiny_llama())
    kept, expected = model.inference(), logits(model)
    computed()

    def answer(entered: bool) -> Tensor:
        with kept if entered else nullcontext():
            return logits(model)

    with kept, ThreadPoolExecutor(1) as pool:
        assert same_bits(logits(model), expected)
        assert computed() == 4
        for entered, counted in ((True, 0), (False, 4), (True, 0)):
            assert same_bits(pool.submit(answer, entered).result(), expected)
            assert computed() == counted


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_leave_behind_what_is_kept(copied: Callable[[Any], Any], tiny_llama: Build) -> None:
    model = adapted(tiny_llama())
    model.train()(IDS)
    expected = logits(model.eval())
    with model.inference():
        logits(model)
        again = copied(model)
        assert same_bits(logits(again), expected)
        randomised(again)
        assert distance(logits(again), expected) > 1e-3
        assert same_bits(logits(model), expected)


@contextmanager
def changed_by_hand(model: PeftModel, folder: Path) -> Iterator[None]:
    yield
    with torch.no_grad():
        for _, parameter in model.adapters.parameters("default"):
            parameter.mul_(1.5)


@contextmanager
def changed_by_an_optimizer(model: PeftModel, folder: Path) -> Iterator[None]:
    yield
    model(IDS, labels=IDS).loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


@contextmanager
def changed_by_loading_an_adapter(model: PeftModel, folder: Path) -> Iterator[None]:
    model.save_pretrained(folder)
    randomised(model)
    yield
    model.load_adapter(folder, "default")


@contextmanager
def changed_by_a_state_dict(model: PeftModel, folder: Path) -> Iterator[None]:
    state = frozen_state(model)
    randomised(model)
    yield
    model.load_state_dict(state)


@contextmanager
def changed_in_the_base(model: PeftModel, folder: Path) -> Iterator[None]:
    yield
    with torch.no_grad():
        for _, layer in model.adapters.layers():
            layer.base_layer.weight.mul_(1.5)


@pytest.mark.parametrize(
    "changed",
    [
        changed_by_hand,
        changed_by_an_optimizer,
        changed_by_loading_an_adapter,
        changed_by_a_state_dict,
        changed_in_the_base,
    ],
)
def test_whatever_changes_is_seen(changed: Any, tiny_llama: Build, tmp_path: Path) -> None:
    model = adapted(tiny_llama())
    with changed(model, tmp_path):
        before = logits(model)
    after = logits(model)
    assert distance(after, before) > 1e-3
    with model.inference():
        assert same_bits(logits(model), after)


def test_casting_a_model_lets_go_of_the_old_dtype(tiny_llama: Build) -> None:
    model = adapted(tiny_llama())
    expected = logits(model)
    assert logits(model.double()).dtype == torch.float64
    assert distance(logits(model), expected) < 1e-5
    assert logits(model.float()).dtype == torch.float32
    assert logits(model.bfloat16()).dtype == torch.bfloat16


# Beside hooks


def test_hooks_on_the_base_layer_run_and_change_the_output() -> None:
    net = Net(nn.Linear(12, 20))
    model = randomised(get_peft_model(net, PeanutConfig(r=4, target_modules=["layer"]))).eval()
    x, base = torch.randn(3, 12), net.layer.base_layer
    fused, change = model(x), model(x) - base(x)
    seen: list[Tensor] = []
    handle = base.register_forward_hook(lambda module, args, out: seen.append(out) or 2 * out)
    assert distance(model(x), base(x) + change) < 1e-6
    assert seen
    handle.remove()
    assert same_bits(model(x), fused)
    net.layer.register_forward_hook(lambda module, args, out: -out)
    assert same_bits(model(x), -fused)


# In training


@pytest.mark.parametrize("config", [PeanutConfig(r=4, depth=1), LoraConfig(r=4)], ids=["PEANUT", "LORA"])
def test_accumulated_gradients_are_those_of_the_whole_batch(config: Any, tiny_llama: Build) -> None:
    model = randomised(get_peft_model(tiny_llama().double(), config)).train()
    logits = model(IDS).logits
    direction = torch.randn_like(logits)
    logits.backward(direction)
    whole = {key: p.grad.clone() for key, p in model.adapters.parameters("default")}
    model.zero_grad()
    for half, part in zip(IDS.split(2), direction.split(2), strict=True):
        model(half).logits.backward(part)
    assert whole
    assert all(distance(p.grad, whole[key]) < 1e-10 for key, p in model.adapters.parameters("default"))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("config", [PeanutConfig(r=4, depth=1), LoraConfig(r=4)], ids=["PEANUT", "LORA"])
def test_checkpointed_blocks_give_the_same_gradients(config: Any, reentrant: bool, tiny_llama: Build) -> None:
    model = randomised(get_peft_model(tiny_llama().double(), config)).train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        found.append({key: p.grad.clone() for key, p in model.adapters.parameters("default")})
    assert found[0].keys() == found[1].keys() > set()
    assert all(grad.abs().max() > 0 for grad in found[0].values())
    assert all(distance(found[1][key], grad) < 1e-12 for key, grad in found[0].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_adapter_learns_on_a_half_precision_base(dtype: torch.dtype, tiny_llama: Build) -> None:
    model = get_peft_model(tiny_llama().to(dtype), PeanutConfig(r=8, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert {p.dtype for _, p in model.adapters.parameters("default")} == {torch.float32}


# Compiled


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo, of its own doing
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # Inductor, of its own doing
@pytest.mark.parametrize(
    ("backend", "switches"),
    [
        ("aot_eager", ["a", "ab", "b", ""]),
        pytest.param("inductor", ["a"], marks=pytest.mark.skipif(not shutil.which("g++"), reason="it compiles C++")),
    ],
)
def test_a_compiled_layer_trains_the_same_and_sees_switches(backend: str, switches: list[str]) -> None:
    torch._dynamo.reset()
    net = Net(nn.Linear(12, 20))
    model = get_peft_model(net, PeanutConfig(r=4, depth=1, act_fn="gelu", target_modules=["layer"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["layer"]))
    randomised(model).eval()
    compiled, x = torch.compile(model, backend=backend, fullgraph=True), torch.randn(3, 12, requires_grad=True)
    assert switches
    for names in switches:
        model.set_adapter(list(names))
        inputs = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
        expected, y = model(x), compiled(x)
        assert distance(y, expected) < 1e-5
        for found, wanted in zip(
            torch.autograd.grad(directed(y), inputs),
            torch.autograd.grad(directed(expected), inputs),
            strict=True,
        ):
            assert distance(found, wanted) < 1e-5


def test_a_layer_that_is_replaced_is_the_one_that_is_read() -> None:
    net = Net(nn.Linear(6, 5)).double()
    model = randomised(get_peft_model(net, PeanutConfig(r=2, target_modules=["layer"])).double()).eval()
    x, other = torch.randn(3, 6, dtype=torch.float64), nn.Linear(6, 5).double()
    layer: Any = model.get_base_model().layer
    before = model(x)
    layer.base_layer = other
    fresh = get_peft_model(Net(copy.deepcopy(other)), PeanutConfig(r=2, target_modules=["layer"])).double().eval()
    fresh.load_state_dict(model.state_dict())
    assert same_bits(model(x), fresh(x))
    assert not same_bits(model(x), before)
    model.merge_adapter()
    assert distance(other(x), fresh(x)) < 1e-12
    layer._modules["base_layer"] = nn.Linear(6, 5).double()
    with pytest.raises(
        PeanutError, match=r"^the layer at 'layer' was replaced by a Linear; expected an unmerged layer"
    ):
        model(x)


def test_a_layer_that_is_replaced_by_something_else_is_an_error() -> None:
    model = get_peft_model(Net(nn.Linear(6, 5)), PeanutConfig(r=2, target_modules=["layer"]))
    model.get_base_model().layer.base_layer = nn.Identity()  # type: ignore[union-attr]
    with pytest.raises(PeanutError, match=r"^the layer at 'layer' was replaced by a Identity; expected"):
        model(torch.randn(3, 6))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("change", ["activate", "merge"])
def test_adapters_that_change_before_the_backward_of_a_checkpoint_are_an_error(
    tiny_llama: Build, reentrant: bool, change: str
) -> None:
    model = adapted(tiny_llama(), r=2).train()
    model.add_adapter("other", PeanutConfig(r=2, target_modules=["q_proj"]))
    base: Any = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    loss = directed(model(IDS).logits)
    model.set_adapter("other") if change == "activate" else model.merge_adapter()
    with pytest.raises(PeanutError, match=r"^other adapters are active or merged in a backward than"):
        loss.backward()


def test_hooks_leave_with_the_adapters() -> None:
    net = Net(nn.Linear(6, 5))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["layer"]))
    assert net._forward_pre_hooks
    model.unload()
    assert not net._forward_pre_hooks
    assert not net._forward_hooks


def test_a_checkpoint_s_backward_is_right_once_the_same_adapters_act_again(tiny_llama: Build) -> None:
    """As a trainer does that asks a second adapter for the reference's answer."""
    grads = []
    for switches in (False, True):
        torch.manual_seed(0)
        model = adapted(tiny_llama().double(), r=2).train()
        model.add_adapter("other", PeanutConfig(r=2, target_modules=["q_proj"]))
        base: Any = model.get_base_model()
        base.activation_checkpointing_enable({"use_reentrant": False})
        loss = directed(model(IDS).logits)
        if switches:
            model.set_adapter("other")
            with torch.no_grad():
                model(IDS)
            model.set_adapter("default")
        loss.backward()
        grads.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert grads[0].keys() == grads[1].keys() > set()
    assert all(distance(grads[1][name], grad) < 1e-12 for name, grad in grads[0].items())


class Odd:
    """What a model may answer with: it holds itself."""

    def __init__(self, y: Tensor, model: nn.Module) -> None:
        self.y, self.model, self.own = y, model, self


def test_answers_may_be_of_any_class_and_hold_themselves() -> None:
    class Answering(Net):
        def forward(self, x: Tensor) -> Any:
            made: dict[str, Any] = {"odd": Odd(self.layer(x), self)}
            made["again"] = [made]
            return made

    model = randomised(get_peft_model(Answering(nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["layer"])))
    y = model(torch.randn(3, 6))["odd"].y
    directed(y).backward()
    assert model.get_base_model().layer.adapters["default"].values_by_suffix()["lora_B.weight"].grad is not None


@pytest.mark.parametrize(("weights", "tokens"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_tokens_of_another_dtype_are_an_error_as_in_the_layer_itself(weights: torch.dtype, tokens: torch.dtype) -> None:
    model = get_peft_model(Net(nn.Linear(6, 5)).to(weights), LoraConfig(r=2, target_modules=["layer"])).eval()
    x = torch.randn(3, 6, dtype=tokens)
    with pytest.raises(RuntimeError, match="dtype"), model.disable_adapter():
        model(x)
    with pytest.raises(RuntimeError, match="dtype"):
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16


def test_hooks_leave_with_the_last_adapter_that_is_deleted() -> None:
    net = Net(nn.Linear(6, 5))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["layer"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["layer"]))
    model.set_adapter("b")
    model.delete_adapter("a")
    assert net._forward_pre_hooks
    model.delete_adapter("b")
    assert not net._forward_pre_hooks
    assert not net._forward_hooks
    assert isinstance(net.layer, nn.Linear)
