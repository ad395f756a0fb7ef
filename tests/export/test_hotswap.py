"""Hot-swapping: what the model computes afterwards, and how often it is compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import peanut
from peanut import (
    FourierFTConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeanutConfig,
    PeanutError,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peanut.utils.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

from ..support import PEER_WARNINGS, distance, randomised, refused

peft = pytest.importorskip("peft")
pytestmark = PEER_WARNINGS
BOTH = {"target_modules": ["0", "2"]}
CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=3, **BOTH),
    "small": LoraConfig(r=2, lora_alpha=8, **BOTH),
    "one": LoraConfig(r=6, lora_alpha=5, target_modules=["0"]),
    "biased": LoraConfig(r=2, lora_bias=True, use_rslora=True, **BOTH),
    "dora": LoraConfig(r=2, use_dora=True, **BOTH),
    "pissa": LoraConfig(r=2, init_lora_weights="pissa", **BOTH),
    "peanut": PeanutConfig(r=3, scaling=2.0, **BOTH),
    "vera": VeraConfig(r=4, **BOTH),
    "oft": OFTConfig(r=2, target_modules=["0"]),
    "whole": LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]),
}
X = torch.linspace(-1, 1, 32).reshape(4, 8)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))


@pytest.fixture(scope="module")
def saved(base: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """For each config a folder and what its adapter computes."""
    found = {}
    for name, config in CONFIGS.items():
        model = randomised(get_peft_model(copy.deepcopy(base), config)).eval()
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        found[name] = folder, model(X).detach()
    return found


@pytest.fixture
def loaded(base: nn.Module, saved: dict[str, tuple[Path, Tensor]]) -> Callable[[str], Any]:
    return lambda name: PeftModel.from_pretrained(copy.deepcopy(base), saved[name][0])


@pytest.fixture(autouse=True)
def graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("lora", ["small", "peanut", "one", "pissa", "biased", "vera", "lora"]),
        ("biased", ["small", "biased"]),
        ("peanut", ["peanut", "lora", "peanut"]),
        ("dora", ["dora"]),
        ("vera", ["vera", "peanut"]),
        ("oft", ["oft"]),
        ("whole", ["whole"]),
    ],
)
def test_the_model_computes_what_the_new_adapter_does(
    first: str,
    then: list[str],
    base: nn.Module,
    loaded: Callable[[str], Any],
    saved: dict[str, tuple[Path, Tensor]],
    tmp_path: Path,
) -> None:
    model = randomised(loaded(first), scale=0.1)
    for name in then:
        folder, expected = saved[name]
        assert distance(model(X), expected) > 1e-3
        hotswap_adapter(model, folder, "default")
        assert distance(model(X), expected) < 1e-6
        assert (list(model.peft_config), model.active_adapters) == (["default"], ["default"])
        randomised(model, scale=0.1)
        hotswap_adapter(model, folder, "default")
    model.save_pretrained(tmp_path)
    assert distance(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(X), expected) < 1e-6


@pytest.mark.parametrize("name", ["lora", "small", "one"])
def test_as_the_peer_does(name: str, base: nn.Module, saved: dict[str, tuple[Path, Tensor]]) -> None:
    def swapped(library: Any, hotswap: Any) -> Tensor:
        model = library.PeftModel.from_pretrained(copy.deepcopy(base), saved["lora"][0])
        hotswap.hotswap_adapter(model, saved[name][0], "default", torch_device="cpu")
        answer: Tensor = model(X)
        return answer

    import peft.utils.hotswap as theirs

    import peanut.utils.hotswap as ours

    assert distance(swapped(peanut, ours), swapped(peft, theirs)) < 1e-6


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo, of its own doing
@pytest.mark.parametrize(
    ("first", "then"),
    [
        *((first, ["small", "peanut", "one", "lora"]) for first in ("lora", "peanut", "vera")),
        ("dora", ["dora"]),
        ("whole", ["whole"]),
    ],
)
def test_a_prepared_model_is_compiled_once(
    first: str, then: list[str], loaded: Callable[[str], Any], saved: dict[str, tuple[Path, Tensor]]
) -> None:
    model = loaded(first)
    prepare_model_for_compiled_hotswap(model, target_rank=8, config=model.peft_config)
    assert distance(model(X), saved[first][1]) < 1e-6
    assert model.peft_config["default"].r == 8
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for name in (first, *then):
            hotswap_adapter(compiled, saved[name][0], "default")
            assert distance(compiled(X), saved[name][1]) < 1e-6
    assert counters["stats"]["unique_graphs"] == 1
    assert not any(value.requires_grad for value in model.parameters())


def test_without_preparing_what_fits_is_not_compiled_again(
    loaded: Callable[[str], Any], saved: dict[str, tuple[Path, Tensor]]
) -> None:
    compiled: Any = torch.compile(loaded("lora"), backend="eager", fullgraph=True)
    with torch.no_grad():
        for name, graphs in (("lora", 1), ("small", 1), ("one", 2)):  # a lower rank, another alpha; a higher rank
            hotswap_adapter(compiled, saved[name][0], "default")
            assert distance(compiled(X), saved[name][1]) < 1e-6
            assert counters["stats"]["unique_graphs"] == graphs


def test_a_scale_stays_while_preparing_and_ends_with_a_swap(
    loaded: Callable[[str], Any], saved: dict[str, tuple[Path, Tensor]]
) -> None:
    model = loaded("lora")
    for layer in model.adapters.places():
        layer.set_scale("default", 0.5)
    expected = model(X)
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    assert distance(model(X), expected) < 1e-6
    hotswap_adapter(model, saved["small"][0], "default")
    assert distance(model(X), saved["small"][1]) < 1e-6


@pytest.mark.parametrize("first", ["lora", "peanut"])
def test_what_is_trained_stays_so(first: str, base: nn.Module, saved: dict[str, tuple[Path, Tensor]]) -> None:
    model = get_peft_model(copy.deepcopy(base), CONFIGS[first])
    factors = [name for name, own in model.named_parameters() if own.requires_grad]
    model.get_parameter(factors[0]).requires_grad_(False)
    hotswap_adapter(model, saved[first][0], "default")
    assert [name for name, own in model.named_parameters() if own.requires_grad] == factors[1:]
    model.requires_grad_(False)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    hotswap_adapter(model, saved["one"][0], "default")
    assert not any(own.requires_grad for own in model.parameters())
    assert all(torch.is_tensor(own) for own in model.parameters())


def test_an_adapter_beside_that_is_merged_stays_so(
    loaded: Callable[[str], Any], saved: dict[str, tuple[Path, Tensor]]
) -> None:
    model = loaded("small")
    model.load_adapter(saved["peanut"][0], "other")
    model.base_model.set_adapter(["default", "other"])
    hotswap_adapter(model, saved["lora"][0], "default")
    expected = model(X)
    model = loaded("small")
    model.load_adapter(saved["peanut"][0], "other")
    model.base_model.set_adapter(["default", "other"])
    model.merge_adapter(["other"])
    hotswap_adapter(model, saved["lora"][0], "default")
    assert model.adapters.state.merged == ["other"]
    assert distance(model(X), expected) < 1e-6
    with pytest.raises(PeanutError, match=r"^adapter 'other' is merged"):
        hotswap_adapter(model, saved["lora"][0], "other")


def test_from_a_state_dict_of_a_model_without_a_wrapper(base: nn.Module, saved: dict[str, tuple[Path, Tensor]]) -> None:
    model = peanut.inject_adapter_in_model(CONFIGS["lora"], copy.deepcopy(base)).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    plain = peanut.utils.load_peft_weights(saved["one"][0])
    state = {key.removeprefix("base_model.model.").replace(".weight", ".default.weight"): plain[key] for key in plain}
    theirs = peft.LoraConfig.from_pretrained(saved["one"][0])
    compiled: Any = torch.compile(model, backend="eager")
    hotswap_adapter_from_state_dict(compiled, state, "default", theirs)
    assert distance(model(X), saved["one"][1]) < 1e-6
    assert model.peft_config["default"].r == 8


def test_what_cannot_be_swapped_is_one_line_and_changes_nothing(
    loaded: Callable[[str], Any], saved: dict[str, tuple[Path, Tensor]], tmp_path: Path
) -> None:
    model = loaded("one")
    model.set_adapter("default")
    keys = {key: value.clone() for key, value in model.state_dict().items()}
    for name, message in (
        ("lora", r"^'2', which one of two adapters to be swapped changes and the other does not"),
        ("whole", r"^'2', which one of two"),
        ("oft", r"^a hot swap of OFT at '0', whose change is no product of thin factors"),
        ("dora", "^a LoRA with use_dora=True and one without"),
    ):
        with pytest.raises(PeanutError, match=message):
            hotswap_adapter(model, saved[name][0], "default")
    with pytest.raises(PeanutError, match=r"^no adapter 'other'"):
        hotswap_adapter(model, saved["one"][0], "other")
    with pytest.raises(PeanutError, match=r"^target_rank=2, and adapter 'default' has rank 6; expected 6 or more"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    with pytest.raises(PeanutError, match=r"^a compiled model; expected one that is not compiled yet"):
        prepare_model_for_compiled_hotswap(torch.compile(model, backend="eager"), target_rank=8)
    assert keys.keys() == model.state_dict().keys()
    assert all(torch.equal(value, keys[key]) for key, value in model.state_dict().items())
    model.merge_adapter()
    with pytest.raises(PeanutError, match=r"'default' is merged"):
        hotswap_adapter(model, saved["one"][0], "default")
    with pytest.raises(PeanutError, match=r"^a hot swap of PREFIX_TUNING, which changes no weight"):
        check_hotswap_configs_compatible(CONFIGS["lora"], PrefixTuningConfig(num_virtual_tokens=2))


def test_supports_lora_conversion(loaded: Callable[[str], Any], base: nn.Module) -> None:
    for name in ("lora", "peanut", "oft"):
        model = loaded(name)
        assert model.supports_lora_conversion()
        assert model.base_model.supports_lora_conversion()
        assert model.get_base_model()[0].supports_lora_conversion()
    normed = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    model = get_peft_model(normed, IA3Config(target_modules=["0"], feedforward_modules=[]))
    assert model.supports_lora_conversion()
    model = get_peft_model(model.unload(), peanut.LNTuningConfig(target_modules=["1"]))
    assert not model.supports_lora_conversion()
    assert not model.base_model.supports_lora_conversion()


def test_what_cannot_be_prepared_is_refused_whole(base: nn.Module) -> None:
    model = get_peft_model(copy.deepcopy(base), PeanutConfig(r=2, target_modules=["0"]))
    model.add_adapter("spectral", FourierFTConfig(n_frequency=3, target_modules=["0"]))
    with refused(model, "FOURIERFT at '0', whose change is no product of thin factors"):
        prepare_model_for_compiled_hotswap(model, target_rank=4)
    assert [config.method for config in model.peft_config.values()] == ["PEANUT", "FOURIERFT"]


def test_prompts_are_not_prepared(tiny_llama: Callable[..., Any]) -> None:
    model = get_peft_model(tiny_llama(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(PeanutError, match=r"^a hot swap of PROMPT_TUNING, which changes no weight"):
        prepare_model_for_compiled_hotswap(model)
    assert model.peft_config["default"].method == "PROMPT_TUNING"
