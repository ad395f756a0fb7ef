"""PiSSA, MiLoRA and OLoRA against their formulas (arXiv 2404.02948, 2406.09044, 2406.01775), and against the peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peanut import LoraConfig, PeanutError, PeftModel, get_peft_model
from peanut.methods.olora import orthonormal_factors
from peanut.methods.pissa import minor_triplets, principal_triplets
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.protocols import METHODS
from peanut.weights import FrozenLayer, kind_of

from ..support import (  # noqa: F401
    PEER_WARNINGS,
    Net,
    directed,
    distance,
    one_thread,
    peer_loaded,
    peer_model,
    randomised,
    same_bits,
    scattered,
)

pytestmark = PEER_WARNINGS
LORA = METHODS["LORA"]
LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "conv1d": lambda: Conv1D(5, 6),
    "conv": lambda: nn.Conv2d(3, 5, (3, 2)),
    "embedding": lambda: nn.Embedding(9, 5),
}
STARTS = ["pissa", "pissa_niter_8", "milora", "olora"]
every_kind = pytest.mark.parametrize("kind", LAYERS)
every_start = pytest.mark.parametrize("start", STARTS)


def frozen(module: nn.Module) -> FrozenLayer:
    kind = kind_of(module)
    assert kind is not None
    return FrozenLayer(module.requires_grad_(False), kind)


def spread(out: int = 8, inputs: int = 12) -> Tensor:
    """A weight whose singular values are far from each other: 8, 4, 2, 1, …"""
    U, _, Vh = torch.linalg.svd(torch.randn(out, inputs, dtype=torch.float64), full_matrices=False)
    return U @ torch.diag(8 * 0.5 ** torch.arange(min(out, inputs), dtype=torch.float64)) @ Vh


def part(W: Tensor, start: str) -> Tensor:
    """The part of W that two triplets, or columns, are, written out on its own."""
    if start == "olora":
        Q, R = torch.linalg.qr(W)
        return Q[:, :2] @ R[:2]
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    chosen = slice(-2, None) if start == "milora" else slice(0, 2)
    return U[:, chosen] @ torch.diag(S[chosen]) @ Vh[chosen]


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)], ids=str)
def test_factors_are_the_published_ones(shape: tuple[int, int]) -> None:
    W = spread(*shape)
    for A, B, start, s in (
        (*principal_triplets(W, 2, 0.5), "pissa", 0.5),
        (*principal_triplets(W, 2, 0.5, iterations=16), "pissa", 0.5),
        (*minor_triplets(W, 2, 0.5), "milora", 0.5),
        (*orthonormal_factors(W, 2), "olora", 1.0),
    ):
        assert (A.shape, B.shape) == ((2, shape[1]), (shape[0], 2))
        assert distance(s * B @ A, part(W, start)) < 1e-9
        square = B.T @ B
        if start == "olora":
            assert distance(square, torch.eye(2, dtype=torch.float64)) < 1e-12
        else:
            # The singular values are shared evenly between the factors.
            S = torch.linalg.svdvals(W)
            assert distance(square, torch.diag(S[-2:] if start == "milora" else S[:2]) / s) < 1e-9
            assert distance(A @ A.T, square) < 1e-9


def test_iterations_approach_the_triplets_and_repeat() -> None:
    W = torch.randn(40, 60)
    exact = part(W.double(), "pissa")
    errors = [distance(torch.mm(*principal_triplets(W, 2, 1.0, n)[::-1]), exact) for n in (0, 2, 16, 64)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-3
    assert all(same_bits(*pair) for pair in zip(*(principal_triplets(W, 2, 1.0, 2) for _ in "ab"), strict=True))


@every_kind
@every_start
def test_change_is_what_the_trained_factors_are_more_than_their_start(kind: str, start: str) -> None:
    layer = frozen(LAYERS[kind]().double())
    nn.init.normal_(layer.weight)
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=start)
    values = LORA.start(config, layer, torch.Generator())
    assert not LORA.change(config, values, layer).delta.dense().any()  # exactly nothing
    assert LORA.rebuilt(config) == {"start_A", "start_B"}
    a, b = (name for name in values if not name.startswith("start"))
    scattered([values[a], values[b]])
    W = layer.matrix()
    trained = 1.5 * values[b].flatten(1) @ values[a].flatten(1)
    found = LORA.change(config, values, layer).delta.dense()
    taken = 1.5 * part(W, start) if start == "olora" else part(W, start)
    assert distance(W + found, W - taken + trained) < (0.1 if "niter" in start else 1e-12)
    assert distance(W + found, W + trained) > 0.1


@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_peer_does_the_same_with_the_same_factors(start: str, dora: bool) -> None:
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=start, use_dora=dora, target_modules=["layer"])
    base = nn.Linear(6, 5)
    layer, x = frozen(base), torch.randn(4, 6)
    copied = nn.Linear(6, 5)
    copied.load_state_dict(base.state_dict())
    theirs = peer_model(Net(copied), config).base_model.model.layer
    assert distance(theirs.base_layer.weight, base.weight) > 0.1  # it takes the part out of the weight
    assert distance(theirs(x), base(x)) < 1e-5
    own = {name.replace(".default", ""): value for name, value in theirs.named_parameters() if value.requires_grad}
    scattered(own.values())
    if dora:
        own["lora_magnitude_vector"] = own.pop("lora_magnitude_vector.weight")
    started = LORA.start(config, layer, torch.Generator())
    delta = LORA.change(config, {**started, **own}, layer).delta
    y = base(x) + delta.apply(x)
    assert distance(y, base(x)) > 0.05
    assert distance(y, theirs(x)) < 1e-5
    found, exact = (torch.autograd.grad(directed(one), list(own.values())) for one in (y, theirs(x)))
    assert all(distance(one, other) < 1e-5 for one, other in zip(found, exact, strict=True))


@every_kind
@every_start
@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_files_hold_a_plain_lora_of_twice_the_rank(kind: str, start: str, rslora: bool) -> None:
    layer = frozen(LAYERS[kind]().double())
    patterns = {"rank_pattern": {"odd": 1}, "alpha_pattern": {"odd": 5}}
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=start, use_rslora=rslora, **patterns)
    layers = {}
    for path in ("even", "odd"):
        layers[path] = LORA.start(config.for_layer(path), layer, torch.Generator())
        scattered([value for name, value in layers[path].items() if not name.startswith("start")])
    stored, kept = LORA.stored(config, layers)
    assert (stored.r, stored.init_lora_weights, stored.rank_pattern) == (4, True, {"odd": 2})
    for path, values in layers.items():
        own, plain = config.for_layer(path), stored.for_layer(path)
        assert own.scaling == pytest.approx(plain.scaling, rel=1e-15)
        assert kept[path].keys() == values.keys() - {"start_A", "start_B"}
        exact = LORA.change(own, values, layer).delta
        assert distance(LORA.change(plain, kept[path], layer).delta.dense(), exact.dense()) < 1e-14
    assert config.init_lora_weights == start  # the live config is as it was
    back = LORA.restored(config, kept)
    for path, values in back.items():
        assert values.keys() == kept[path].keys()
        assert all(distance(value, layers[path][name]) < 1e-14 for name, value in values.items())
    unconverted = {
        path: {name: value for name, value in values.items() if name in kept[path]} for path, values in layers.items()
    }
    back = LORA.restored(config, unconverted)
    assert all(back[path][name] is value for path, values in unconverted.items() for name, value in values.items())


@every_start
def test_the_peer_loads_our_file_over_the_untouched_base(start: str, tmp_path: Path) -> None:
    base, x = nn.Linear(6, 5), torch.randn(4, 6)

    def net() -> Net:
        layer = nn.Linear(6, 5)
        layer.load_state_dict(base.state_dict())
        return Net(layer)

    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=start, use_rslora=True, target_modules=["layer"])
    model = get_peft_model(net(), config).eval()
    assert same_bits(model(x), base(x))
    scattered([value for value in model.parameters() if value.requires_grad])
    model.save_pretrained(tmp_path)
    assert distance(model(x), base(x)) > 0.05
    assert distance(peer_loaded(net(), tmp_path)(x), model(x)) < 1e-5
    assert same_bits(PeftModel.from_pretrained(net(), tmp_path)(x), model(x))
    again = get_peft_model(net(), config).eval()
    again.load_adapter(tmp_path, "default", is_trainable=True)
    assert distance(again(x), model(x)) < 1e-5


def test_what_the_peer_saved_unconverted_is_over_a_reduced_base(tmp_path: Path) -> None:
    base, x = nn.Linear(6, 5), torch.randn(4, 6)
    copied = nn.Linear(6, 5)
    copied.load_state_dict(base.state_dict())
    config = LoraConfig(r=2, lora_alpha=3, init_lora_weights="pissa", target_modules=["layer"])
    theirs = peer_model(Net(copied), config)
    scattered([value for value in theirs.parameters() if value.requires_grad])
    theirs.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        fresh = nn.Linear(6, 5)
        fresh.load_state_dict(base.state_dict())
        model = PeftModel.from_pretrained(Net(fresh), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert distance(theirs(x), base(x)) > 0.05
        assert distance(model(x), theirs(x)) < 1e-5


def test_start_and_trained_tensors_are_apart() -> None:
    model = get_peft_model(Net(nn.Linear(6, 5)), LoraConfig(r=2, init_lora_weights="olora", target_modules=["layer"]))
    _, layer = next(AdapterSet.of(model).layers("default"))
    values = layer.values("default")
    before = values["start_A"].clone()
    scattered([value for value in model.parameters() if value.requires_grad])
    assert same_bits(layer.values("default")["start_A"], before)
    assert not values["start_A"].requires_grad
    assert distance(values["lora_A.weight"], before) > 0.05


@pytest.mark.parametrize("options", [{"r": 6}, {"r": 2, "rank_pattern": {"layer": 7}}], ids=["r", "rank_pattern"])
def test_more_triplets_than_there_are_is_refused(options: dict[str, Any]) -> None:
    net, r = Net(nn.Linear(6, 5)), max(6, options.get("rank_pattern", {}).get("layer", 0))
    message = rf"^r={r} with init_lora_weights='pissa' for 'layer', whose weight is 5 × 6; expected at most 5; "
    with pytest.raises(PeanutError, match=message):
        get_peft_model(net, LoraConfig(init_lora_weights="pissa", target_modules=["layer"], **options))
    with pytest.raises(PeanutError, match=r"^lora_alpha=-1\.?0? with init_lora_weights='olora' for 'layer'; "):
        get_peft_model(net, LoraConfig(r=2, lora_alpha=-1, init_lora_weights="olora", target_modules=["layer"]))


@pytest.mark.parametrize(
    "init", ["pisa", "pissa_niter_", "pissa_niter_x", "eva", "corda", "loftq", "PISSA", "pissa_niter_99999", 3]
)
def test_unknown_starts_are_refused(init: Any) -> None:
    with pytest.raises(PeanutError, match=r"^init_lora_weights=.*; expected True, False, 'gaussian', 'pissa', "):
        LoraConfig(init_lora_weights=init)


ASKED = {
    "megatron_config": {"a": 1},
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "random"},
    "velora_config": {"scale": 1.0},
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "monteclora_config": {"num_samples": 8},
    "layer_replication": [(0, 2)],
    "runtime_config": {"ephemeral_gpu_offload": True},
    "target_parameters": ["layer.weight"],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
}


@pytest.mark.parametrize("name", ASKED)
def test_what_only_the_peer_does_is_refused(name: str) -> None:
    with pytest.raises(PeanutError, match=rf"^{name}=.*; expected that it is not set; remove {name}: ") as error:
        LoraConfig(**{name: ASKED[name]})
    assert "\n" not in str(error.value)


def test_fields_are_those_of_the_peer_with_its_defaults() -> None:
    import peft

    theirs = peft.LoraConfig().to_dict()
    ours = LoraConfig().to_dict()
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name] and str(theirs[name]) != "PeftType.LORA"} == set()


def test_trainable_tokens_are_whole_numbers() -> None:
    assert LoraConfig(trainable_token_indices={"embed_tokens": [3, 7]}).trainable_token_indices
    for wrong in ([1, -2], {"embed_tokens": [0.5]}):
        with pytest.raises(PeanutError, match=r"^trainable_token_indices.*\[[01]\]=(-2|0\.5); expected a whole number"):
            LoraConfig(trainable_token_indices=wrong)
    with pytest.raises(
        PeanutError, match=r"^trainable_token_indices=3; expected a list of whole numbers or a dictionary"
    ):
        LoraConfig(trainable_token_indices=3)


class Words(PreTrainedModel):
    """Two embeddings and a layer, with the input embedding where transformers' models say it is."""

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.words, self.places, self.layer = nn.Embedding(9, 6), nn.Embedding(5, 6), nn.Linear(6, 5)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.words(ids) + self.places(torch.arange(ids.shape[1])))


@pytest.mark.parametrize("tokens", [[3, 7], {"words": [3, 7], "places": [1]}], ids=["list", "dictionary"])
@pytest.mark.parametrize("start", [True, "pissa"])
def test_tokens_are_trained_beside_and_read_by_the_peer(tokens: Any, start: Any, tmp_path: Path) -> None:
    ids = torch.tensor([[3, 1, 7], [0, 8, 3]])
    config = LoraConfig(r=2, target_modules=["layer"], trainable_token_indices=tokens, init_lora_weights=start)
    model = get_peft_model(Words(), config).eval()
    assert distance(model(ids), Words()(ids)) == 0
    scattered([value for value in model.parameters() if value.requires_grad])
    moved = model.get_base_model().words(torch.arange(9)) != Words().words.weight
    assert moved.any(1).nonzero().flatten().tolist() == [3, 7]
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(Words(), tmp_path)
    assert same_bits(again(ids), model(ids))
    theirs = peer_loaded(Words(), tmp_path)
    assert distance(theirs(ids), model(ids)) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    assert distance(PeftModel.from_pretrained(Words(), tmp_path / "theirs")(ids), model(ids)) < 1e-5


@pytest.mark.parametrize("start", ["eva", "orthogonal"])
def test_starts_that_only_the_peer_makes_are_read(start: str, tmp_path: Path) -> None:
    model = randomised(get_peft_model(Net(nn.Linear(12, 8)), LoraConfig(r=4, target_modules=["layer"]))).eval()
    x = torch.randn(3, 12)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"init_lora_weights": true', f'"init_lora_weights": "{start}"'))
    expected = model(x)
    with pytest.warns(UserWarning, match="is not as it was saved"):
        again = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.equal(again(x), expected)
    with pytest.raises(PeanutError, match=f"init_lora_weights='{start}'"):
        LoraConfig(init_lora_weights=start)


def test_a_start_may_be_0_or_1_as_flags_may() -> None:
    starts = [LoraConfig(init_lora_weights=given).init_lora_weights for given in (0, 1)]  # type: ignore[arg-type]
    assert starts == [False, True]
    assert all(type(start) is bool for start in starts)
