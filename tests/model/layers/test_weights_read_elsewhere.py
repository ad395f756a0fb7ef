"""A module that reads the weight of an adapted layer, and does not call the layer, computes what calling it would."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers import T5Config, T5ForConditionalGeneration

from peanut import HRAConfig, LoraConfig, OFTConfig, PeanutConfig, PeanutError, PeftModel, PolyConfig, get_peft_model
from peanut.model.layers.layer import AdaptedLayer
from peanut.model.layers.reading import _TOLD, Reading
from peanut.protocols import METHODS
from peanut.weights import kind_of

from ...support import FIRST_CASES, Case, Net, directed, distance, gradients, one_thread, randomised, refused, same_bits  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* returned no loss"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),  # which torch's encoder makes of padding
]
TIGHT = 1e-12


class ReadingNet(nn.Module):
    """A model that computes what its layer does and never calls it; ``bare`` is such a layer without adapters."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.layer = net.layer
        self.bare = [copy.deepcopy(net.layer)]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.layer.weight, self.layer.bias if hasattr(self.layer, "bias") else None
        (bare,) = self.bare
        own = {"weight": weight} | ({} if getattr(bare, "bias", None) is None else {"bias": bias})
        y: Tensor = torch.func.functional_call(bare, own, (x,))
        if bias is None or "bias" in own:
            return y
        kind = kind_of(bare)
        assert kind is not None
        return kind.on_output(bare, y, lambda each: each + bias)


def both(case: Case, *names: str) -> tuple[PeftModel, PeftModel]:
    """The same adapters in a model that calls its layer, and in one that reads its weight."""
    made = []
    for net in (case.net(), ReadingNet(case.net())):
        torch.manual_seed(3)
        first, *others = names or ("default",)
        model = get_peft_model(net, case.config(), first)
        for name in others:
            model.add_adapter(name, case.config())
        if others:
            model.set_adapter(list(names))
        made.append(randomised(model).eval())
    return made[0], made[1]


def drops(model: PeftModel) -> bool:
    return any(layer.change("default").dropout > 0 for _, layer in model.adapters.layers())


@pytest.mark.parametrize("case", FIRST_CASES, ids=str)
def test_a_weight_that_is_read_is_the_one_that_calling_computes_with(case: Case) -> None:
    calling, reading = both(case)
    x = case.input()
    for training in (False, True):
        calling.train(training), reading.train(training)
        if training and drops(reading) and case.kind != "embedding":
            with pytest.warns(UserWarning, match=r"reads the weight of 'layer' in training.*dropout.*is not applied"):
                y = reading(x)
            reading.eval()
            assert distance(y, reading(x)) < TIGHT
            continue
        found: list[tuple[Tensor, dict[str, Tensor]]] = []
        for model in (calling, reading):
            torch.manual_seed(5)  # some methods draw in training
            model.zero_grad()
            y = model(x)
            directed(y).backward()
            found.append((y, gradients(model)))
        (wanted, slopes), (y, own) = found
        assert distance(y, wanted) < TIGHT
        assert own.keys() == slopes.keys()
        assert max(distance(own[key], slopes[key]) for key in own) < 1e-9


def encoder() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2).double()


@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["linear2"], ["norm1"]], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_torchs_fast_path_for_encoders_computes_with_the_adapters(targets: list[str], grad: bool) -> None:
    base, x, x_padded = encoder().eval(), torch.randn(3, 5, 16).double(), torch.zeros(3, 5, dtype=torch.bool)
    x_padded[0, 3:] = True
    method = "LN_TUNING" if "norm1" in targets else "PEANUT"
    config = METHODS[method].config_class(target_modules=targets)
    model = randomised(get_peft_model(encoder(), config)).train()
    slow = no_dropout(model)(x)  # in training torch calls every layer
    with torch.set_grad_enabled(grad):
        fast = model.eval()(x)
        assert distance(fast, slow) < TIGHT
        assert distance(fast, base(x)) > 1e-3
        padded = model(x, src_key_padding_mask=x_padded)
        model.merge_adapter()
        assert distance(model(x), fast) < TIGHT
        assert distance(model(x, src_key_padding_mask=x_padded)[~x_padded], padded[~x_padded]) < TIGHT


def no_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return model


def linear_net(reads: bool = True) -> Any:
    torch.manual_seed(1)
    net = Net(nn.Linear(12, 20)).double()
    return ReadingNet(net) if reads else net


X = torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_several_adapters_merged_ones_and_none_are_read_as_they_are_called() -> None:
    models = []
    for reads in (False, True):
        model = get_peft_model(linear_net(reads), OFTConfig(oft_block_size=4, target_modules=["layer"]), "a")
        model.add_adapter("b", PeanutConfig(r=4, target_modules=["layer"]))
        model.add_adapter("c", HRAConfig(r=4, target_modules=["layer"]))
        models.append(randomised(model).eval())
    calling, reading = models
    assert distance(calling(X), linear_net()(X)) > 0.1
    for active in (["a"], ["b", "c"], ["a", "b", "c"]):
        calling.set_adapter(active), reading.set_adapter(active)
        assert distance(reading(X), calling(X)) < TIGHT
    for merged in (["a"], ["a", "c"], ["a", "b", "c"]):
        calling.merge_adapter(merged), reading.merge_adapter(merged)
        assert distance(reading(X), calling(X)) < TIGHT
        with reading.disable_adapter():
            assert same_bits(reading(X), linear_net()(X))
    reading.unmerge_adapter()
    with reading.disable_adapter():
        assert same_bits(reading(X), linear_net()(X))
    with reading.inference(), torch.no_grad():
        assert distance(reading(X), calling(X)) < TIGHT
    assert same_bits(reading.unload()(X), linear_net()(X))


def adapted(net: nn.Module | None = None) -> PeftModel:
    net = net or linear_net()
    torch.manual_seed(3)
    return randomised(get_peft_model(net, LoraConfig(r=4, target_modules=["layer"]))).eval()


def layer_of(model: PeftModel) -> AdaptedLayer:
    return next(layer for _, layer in model.adapters.layers())


def test_where_no_adapter_has_to_be_added_the_weight_is_the_layers_own() -> None:
    seen: list[Any] = []
    model = adapted()
    model.get_base_model().register_forward_pre_hook(lambda module, args: seen.append(module.layer.weight))
    model(X)
    with model.disable_adapter():
        model(X)
    model.merge_adapter()
    model(X)
    own = layer_of(model).base_layer.weight
    assert type(seen[0]) is Reading
    assert isinstance(seen[0], nn.Parameter)
    assert seen[1] is own
    assert seen[2] is own
    assert layer_of(model).weight is own  # outside of a forward


def test_asking_for_a_dtype_makes_no_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    whole = AdaptedLayer._weight
    monkeypatch.setattr(AdaptedLayer, "_weight", lambda self, *args: made.append(self.path) or whole(self, *args))
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    model = get_peft_model(t5, LoraConfig(r=2, target_modules=["wo"], lora_dropout=0.5)).train()
    ids = torch.arange(6).view(1, -1)
    assert model(input_ids=ids, labels=ids).loss.isfinite()
    assert made == []
    adapted()(X)
    assert made == ["layer"]


@pytest.mark.parametrize("name", sorted(name for name in _TOLD if hasattr(Tensor, name)))
def test_what_is_told_of_a_weight_without_values_is_true(name: str) -> None:
    def values() -> Tensor:
        raise AssertionError("W' was made")

    weight = nn.Parameter(torch.randn(3, 2), requires_grad=False)
    wanted, found = (getattr(each, name) for each in (weight, Reading(weight, values, "layer")))
    assert (found() if callable(found) else found) == (wanted() if callable(wanted) else wanted)


def test_another_dtype_and_whether_it_has_a_gradient_are_those_of_what_the_adapters_make() -> None:
    weight = nn.Parameter(torch.randn(3, 2), requires_grad=False)
    changed = (weight * 2).requires_grad_()
    reading = Reading(weight, lambda: changed, "layer")
    assert same_bits(reading.type(torch.float64).detach(), changed.detach().double())
    assert reading.requires_grad


READS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda weight: weight.norm(),
    "penalty": lambda weight: weight.pow(2).sum(),
    "data": lambda weight: weight.data.abs().mean(),
}


@pytest.mark.parametrize("way", READS)
@pytest.mark.parametrize("before", [False, True])
def test_a_weight_is_logged_where_it_is_called_with_dropout(way: str, before: bool) -> None:
    model = get_peft_model(linear_net(reads=False), LoraConfig(r=4, target_modules=["layer"], lora_dropout=0.5))
    layer, seen = layer_of(randomised(model).train()), []
    torch.manual_seed(5)
    wanted = model(X)
    register: Any = layer.register_forward_pre_hook if before else layer.register_forward_hook
    register(lambda layer, *_: seen.append(READS[way](layer.weight)))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.manual_seed(5)
        assert same_bits(model(X), wanted)
        model(X)
    assert [str(each.message).partition(";")[0] for each in told] == [
        "a module or hook reads the weight of 'layer' in training"
    ]
    changed = layer.base_layer.weight + layer.delta("default")
    assert distance(seen[0], READS[way](changed)) < TIGHT
    assert distance(seen[1], seen[0]) < TIGHT


class Kernel(torch.autograd.Function):
    """What a fused kernel is to autograd: its own backward, for the tensors that it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


class KernelNet(ReadingNet):
    def forward(self, x: Tensor) -> Tensor:
        return Kernel.apply(x, self.layer.weight) + self.layer.bias  # type: ignore[no-any-return]


def test_a_kernel_that_would_lose_the_gradient_is_refused_and_right_without_one() -> None:
    model, calling = adapted(KernelNet(linear_net(reads=False))), adapted(linear_net(reads=False))
    with pytest.raises(PeanutError, match=r"is read in a torch.autograd.Function.*no gradient"):
        model(X)
    with torch.no_grad():
        assert distance(model(X), calling(X)) < TIGHT
    model.merge_adapter()
    assert distance(model(X), calling(X)) < TIGHT


WRITES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda weight: weight.mul_(2),
    "through data": lambda weight: weight.data.mul_(2),
    "at an index": lambda weight: weight.__setitem__(0, 1.0),
    "new data": lambda weight: setattr(weight, "data", weight.data * 2),
    "with an operator": lambda weight: operator.imul(weight, 2),
    "a row": lambda weight: weight[0].zero_(),
    "a part of a part": lambda weight: weight.T.split(2)[1][0].__setitem__(0, 1.0),
    "a view of the data": lambda weight: weight.data.view(-1).fill_(1.0),
    "in the dtype that it has": lambda weight: weight.double().mul_(2),
    "as an output": lambda weight: torch.mul(weight, 2, out=weight.data),
    "several at once": lambda weight: torch._foreach_mul_([weight.data], 2),
    "by a function": lambda weight: F.relu(weight.detach(), inplace=True),
    "by an initialisation": lambda weight: nn.init.ones_(weight[1:]),
    "by one that is given it by name": nn.init.normal_,
}


@pytest.mark.parametrize("way", WRITES)
def test_a_weight_with_adapters_is_not_written_to_in_a_forward(way: str) -> None:
    model = adapted()

    def write(module: Any, args: Any) -> None:
        with torch.no_grad():
            WRITES[way](module.layer.weight)

    handle = model.get_base_model().register_forward_pre_hook(write)
    before, own = layer_of(model).weight.clone(), layer_of(model).weight
    with pytest.raises(PeanutError, match=r"'layer', which adapters change, is written in a forward"):
        model(X)
    assert same_bits(own, before)
    with model.disable_adapter():
        model(X)
    handle.remove()
    assert not same_bits(own, before)


class KeepingNet(ReadingNet):
    """Reads the weight once, and computes with what it has kept."""

    kept: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.kept or (self.layer.weight,)
        return F.linear(x, self.kept[0], self.layer.bias)


def test_a_weight_that_is_kept_is_that_of_the_call_that_uses_it() -> None:
    calling, keeping = adapted(linear_net(reads=False)), adapted(KeepingNet(linear_net(reads=False)))
    for model in (calling, keeping):
        torch.manual_seed(4)
        model.add_adapter("other", PeanutConfig(r=4, target_modules=["layer"]))
        randomised(model, ["other"])
    assert distance(keeping(X), calling(X)) < TIGHT
    for names in (["other"], ["default", "other"]):
        calling.set_adapter(names), keeping.set_adapter(names)
        assert distance(keeping(X), calling(X)) < TIGHT
    with keeping.disable_adapter():
        assert same_bits(keeping(X), linear_net(reads=False)(X))
    keeping.merge_adapter()
    assert distance(keeping(X), calling(X)) < TIGHT


def test_a_weight_that_is_read_is_made_no_parameter_of_another_module() -> None:
    class Caching(ReadingNet):
        def forward(self, x: Tensor) -> Tensor:
            self.cached = self.layer.weight
            return F.linear(x, self.cached)

    model = adapted(Caching(linear_net(reads=False)))
    names = list(model.state_dict())
    with pytest.raises(PeanutError, match=r"'layer', which adapters change, is made a parameter of a module"):
        model(X)
    assert list(model.state_dict()) == names


def test_parts_of_a_weight_that_is_read_have_gradients_in_a_kernel() -> None:
    class Part(ReadingNet):
        def forward(self, x: Tensor) -> Tensor:
            return Kernel.apply(x, self.layer.weight.view(20, 12)) + self.layer.bias

    models = adapted(linear_net(reads=False)), adapted(Part(linear_net(reads=False)))
    wanted, found = (directed(model(X)).backward() or gradients(model) for model in models)
    assert len(wanted) == 2
    assert max(distance(found[key], wanted[key]) for key in wanted) < 1e-9


def test_what_differs_within_a_batch_cannot_be_read() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["layer"]))
    with pytest.raises(PeanutError, match=r"reads the weight of 'layer'.*differ between the samples"):
        model(X, adapter_names=["default", "other", "__base__", "default"])
    assert same_bits(model(X, adapter_names=["__base__"] * 4), linear_net()(X))
    called = adapted(linear_net(reads=False))
    called.add_adapter("other", LoraConfig(r=4, target_modules=["layer"]))
    layer_of(called).register_forward_hook(lambda layer, args, y: print(layer.weight.norm()))
    with pytest.raises(PeanutError, match=r"a module or hook reads the weight of 'layer'.*; read base_layer\.weight"):
        called(X, adapter_names=["default", "other"] * 2)
    poly = get_peft_model(linear_net(), PolyConfig(r=2, n_tasks=2, target_modules=["layer"])).eval()
    with pytest.raises(PeanutError, match=r"reads the weight of 'layer'.*differ between the samples"):
        poly(X, task_ids=torch.tensor([0, 1, 0, 1]))


def test_a_forward_in_a_backward_and_a_part_of_the_model_read_the_same() -> None:
    calling, reading = adapted(linear_net(reads=False)), adapted()
    wanted = gradients_of(calling, calling.get_base_model())
    for part in (reading, reading.get_base_model()):
        found = gradients_of(reading, part)
        assert max(distance(found[key], wanted[key]) for key in wanted) < 1e-9


class Part(nn.Module):
    """Checkpoints a function of its own that reads a weight."""

    def __init__(self, net: Net, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = net.layer, reentrant

    def part(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(x), self.layer.weight, self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_function_that_is_checkpointed_reads_the_same_in_the_backward(reentrant: bool) -> None:
    calling, reading = adapted(linear_net(reads=False)), adapted(Part(linear_net(reads=False), reentrant))
    directed(calling(torch.tanh(X))).backward()
    wanted = gradients(calling)
    directed(reading(X.clone().requires_grad_())).backward()
    found = gradients(reading)
    assert len(found) == 2
    assert max(distance(found[key], wanted[key]) for key in wanted) < 1e-9


def test_forward_itself_reads_the_same() -> None:
    model = adapted()
    assert same_bits(model.get_base_model().forward(X), model(X))


def gradients_of(model: PeftModel, part: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    directed(torch.utils.checkpoint.checkpoint(part, X.clone().requires_grad_(), use_reentrant=False)).backward()
    found = gradients(model)
    assert len(found) == 2
    return found


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_reads_the_same() -> None:
    model = adapted()
    wanted = model(X)
    assert distance(torch.compile(model, backend="aot_eager", fullgraph=True)(X), wanted) < TIGHT


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_graph_that_reads_without_dropout_says_so() -> None:
    model = get_peft_model(linear_net(), LoraConfig(r=4, target_modules=["layer"], lora_dropout=0.5)).train()
    with pytest.warns(UserWarning, match=r"reads the weight of 'layer' in training.*is not applied"):
        torch.compile(model, backend="eager", fullgraph=True)(X)


def test_a_weight_is_set_where_it_is() -> None:
    model, given = adapted(linear_net(reads=False)), nn.Parameter(torch.randn(20, 12, dtype=torch.float64))
    layer = layer_of(model)
    layer.weight = given
    assert layer.base_layer.weight is given
    assert "weight" not in layer._parameters
    with model.disable_adapter():
        assert same_bits(model(X), F.linear(X, given, layer.bias))


REPLACED: dict[str, Callable[[nn.Module], Any]] = {
    "functional_call": lambda layer: torch.func.functional_call(layer, {"weight": torch.zeros(20, 12).double()}, (X,)),
    "a key": lambda layer: layer._parameters["weight"],
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*(weight|spectral)_norm.* is deprecated")
@pytest.mark.parametrize("way", REPLACED)
def test_what_wants_a_parameter_of_the_adapted_layer_itself_is_told_where_it_is(way: str) -> None:
    model = adapted(linear_net(reads=False))
    layer = layer_of(model)
    with refused(model, r"expected (one in the place of )?base_layer\.weight"):
        REPLACED[way](layer)
    own = {"base_layer.weight": torch.zeros(20, 12).double()}
    wanted = X @ layer.delta("default").T + layer.base_layer.bias
    assert distance(torch.func.functional_call(layer, own, (X,)), wanted) < TIGHT
