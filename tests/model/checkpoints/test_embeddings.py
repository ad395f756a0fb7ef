"""Rows that a base's embeddings have gained go with the adapter, in the peer's form, or are refused; none is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

import peanut
from peanut import (
    LoraConfig,
    PeanutConfig,
    PeanutError,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peanut.model.checkpoints.embeddings import saved_embeddings

from ...support import PEER_WARNINGS, Net, distance, one_thread, randomised, refused, same_bits  # noqa: F401

Build = Callable[..., hf.PreTrainedModel]
Base = Callable[..., Any]
pytestmark = [
    *PEER_WARNINGS,
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True."),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]
IDS = torch.tensor([[1, 102, 7, 103, 1, 2]])
CONFIGS: dict[str, dict[str, Any]] = {
    "other layers": {"target_modules": ["q_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "tokens beside": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 102]},
    "tokens": {"token_indices": [1, 102], "target_modules": ["embed_tokens"]},
    "embedding trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}
LOSES_ONE = {"embedding", "head", "tokens"}
"""Where the peer saves one of the embeddings, and both were resized."""


@pytest.fixture(params=[False, True], ids=["", "tied"])
def base(request: pytest.FixtureRequest, tiny_llama: Build, tmp_path: Path) -> Base:
    """``base(seed, rows)``: a model from files with 101 tokens, resized with new rows of a seed."""
    folder = tmp_path / "base"
    tiny_llama(tie_word_embeddings=request.param).save_pretrained(folder)

    def build(seed: int | None = None, rows: int = 104, **options: Any) -> Any:
        model = hf.LlamaForCausalLM.from_pretrained(folder, **options).eval()
        if seed is not None:
            torch.manual_seed(seed)
            model.resize_token_embeddings(rows, mean_resizing=False)
        return model

    return build


def config_of(library: Any, kind: str) -> Any:
    name = "TrainableTokensConfig" if kind == "tokens" else "LoraConfig"
    return getattr(library, name)(task_type="CAUSAL_LM", **({} if kind == "tokens" else {"r": 2}), **CONFIGS[kind])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS % model.config.vocab_size).logits


def adapted(model: nn.Module, **options: Any) -> PeftModel:
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options)
    return randomised(get_peft_model(model, config)).eval()


def held(folder: Path) -> set[str]:
    """The base's tensors in an adapter's file."""
    keys = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.") for key in keys if key.endswith(("embed_tokens.weight", "head.weight"))
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_new_rows_are_saved_and_read_here_and_by_the_peer(kind: str, base: Base, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = randomised(get_peft_model(base(1), config_of(peanut, kind))).eval()
    expected = logits(model)
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        for low in (False, True):
            other = PeftModel.from_pretrained(base(2), tmp_path / "a", low_cpu_mem_usage=low)
            assert same_bits(logits(other), expected)
        assert distance(logits(peft.PeftModel.from_pretrained(base(2), tmp_path / "a").eval()), expected) < 1e-6
    small = base()
    with refused(small, r"(; call resize_token_embeddings\(104\) on the base first|or resize the embedding first)$"):
        PeftModel.from_pretrained(small, tmp_path / "a")
    model.merge_adapter()  # what is saved is what was there before
    model.save_pretrained(tmp_path / "merged")
    assert distance(logits(PeftModel.from_pretrained(base(2), tmp_path / "merged")), expected) < 1e-6
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "gathered", state_dict=state)
    assert distance(logits(PeftModel.from_pretrained(base(2), tmp_path / "gathered")), expected) < 1e-6


@pytest.mark.parametrize("kind", CONFIGS)
def test_new_rows_in_files_of_the_peer_are_read(kind: str, base: Base, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(base(1), config_of(peft, kind)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.3)
    model.save_pretrained(tmp_path / "a")
    if kind in LOSES_ONE and not base().config.tie_word_embeddings:
        with pytest.warns(UserWarning, match=r"new rows of the other are lost$"):
            PeftModel.from_pretrained(base(2), tmp_path / "a")
    else:
        assert distance(logits(PeftModel.from_pretrained(base(2), tmp_path / "a")), logits(model)) < 1e-5


@pytest.mark.parametrize(
    ("targets", "resized", "save", "expected"),
    [
        (["q_proj"], False, "auto", set()),
        (["q_proj"], True, "auto", {"model.embed_tokens.weight", "lm_head.weight"}),
        (["q_proj"], True, False, set()),
        (["q_proj"], False, True, {"model.embed_tokens.weight", "lm_head.weight"}),
        ("all-linear", False, "auto", set()),
        (None, False, "auto", set()),
    ],
)
def test_what_is_saved(targets: Any, resized: bool, save: Any, expected: set[str], base: Base, tmp_path: Path) -> None:
    model = adapted(base(1 if resized else None), target_modules=targets)
    model.save_pretrained(tmp_path / "a", save_embedding_layers=save)
    assert held(tmp_path / "a") == expected
    state = get_peft_model_state_dict(model, save_embedding_layers=save)
    assert state.keys() == load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    other = randomised(get_peft_model(base(2 if resized else None), copy.deepcopy(model.peft_config["default"])))
    set_peft_model_state_dict(other, state)
    assert same_bits(logits(other.eval()), logits(model)) == (not resized or save is not False)


def test_only_named_targets_are_saved_where_the_vocabulary_is_the_same(base: Base, tmp_path: Path) -> None:
    adapted(base(), target_modules=["lm_head"]).save_pretrained(tmp_path / "a")
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    assert {key for key in keys if "lora" not in key} == {"base_model.model.lm_head.base_layer.weight"}
    for save in ("Auto", 1, None):
        with pytest.raises(PeanutError, match=rf"^save_embedding_layers={save!r}; expected 'auto', True or False; cha"):
            adapted(base()).save_pretrained(tmp_path / "b", save_embedding_layers=save)


def test_a_model_without_embeddings_says_so(tmp_path: Path) -> None:
    model = get_peft_model(Net(nn.Linear(3, 4)), LoraConfig(target_modules=["layer"]))
    with pytest.warns(UserWarning, match="^Net has no embeddings that could be saved$"):
        model.save_pretrained(tmp_path, save_embedding_layers=True)


def test_embeddings_without_storage_cannot_be_saved(base: Base) -> None:
    model = adapted(base())
    model.get_base_model().to("meta")
    with pytest.raises(
        PeanutError, match=r"^'.*weight' is on the meta device, and is to be saved; expected embeddings"
    ):
        saved_embeddings(model.adapters, "default", True)


def test_a_second_adapter_has_the_embeddings_of_the_first_or_is_refused(base: Base, tmp_path: Path) -> None:
    for seed in (1, 2):
        adapted(base(seed)).save_pretrained(tmp_path / str(seed))
    model = PeftModel.from_pretrained(base(3), tmp_path / "1")
    with refused(
        model,
        r"^'.*2' was saved with a '.*weight' other than this base has, with which adapter 'default' works; expected one"
        r" set of embeddings for all adapters of a model; load it on a base of its own$",
    ):
        model.load_adapter(tmp_path / "2", "b")
    model.load_adapter(tmp_path / "1", "b")
    model.delete_adapter("b")
    model.load_adapter(tmp_path / "2", "default")  # alone it may bring its own, as a resumed training does
    assert same_bits(logits(model), logits(PeftModel.from_pretrained(base(3), tmp_path / "2")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_precision_of_the_same_embeddings_is_the_same(dtype: torch.dtype, base: Base, tmp_path: Path) -> None:
    adapted(base(1)).save_pretrained(tmp_path / "a")
    model = PeftModel.from_pretrained(base(2).to(dtype), tmp_path / "a")
    model.load_adapter(tmp_path / "a", "b")
    expected = PeftModel.from_pretrained(base(1).to(dtype), tmp_path / "a")
    assert same_bits(logits(model), logits(expected))
    assert {value.dtype for value in model.get_base_model().parameters() if value.dim() == 2} >= {dtype}


def test_a_load_that_fails_puts_the_embeddings_back(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted(base(1)).save_pretrained(tmp_path / "a")
    written = []
    copy_ = Tensor.copy_

    def failing(weight: Tensor, value: Tensor, *args: Any) -> Tensor:
        result = copy_(weight, value, *args)
        if weight.shape == (104, 32):
            written.append(weight)
            if len(written) == 1:
                raise MemoryError
        return result

    model = base(2)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "copy_", failing)
        with pytest.raises(MemoryError):
            PeftModel.from_pretrained(model, tmp_path / "a")
    assert len(written) == 2  # written, and written back
    assert model.state_dict().keys() >= before.keys()
    assert all(same_bits(value, before[name]) for name, value in model.named_parameters())


def test_two_values_for_one_tied_embedding_are_refused(tiny_llama: Build, tmp_path: Path) -> None:
    for tied in (False, True):
        tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / f"base{tied}")
    untied = hf.LlamaForCausalLM.from_pretrained(tmp_path / "baseFalse")
    adapted(untied).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path / "baseTrue")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    with refused(
        model, r"holds two different embeddings, 'lm_head.weight' and 'model.embed_tokens.weight'; expected equal"
    ):
        PeftModel.from_pretrained(model, tmp_path / "a", check_base=False)


def test_a_peanut_on_a_resized_head_reads_its_new_rows(base: Base, tmp_path: Path) -> None:
    """Its change is computed from the base's weight."""
    model = randomised(get_peft_model(base(1), PeanutConfig(r=2, target_modules=["lm_head"]))).eval()
    model.save_pretrained(tmp_path / "a")
    assert same_bits(logits(PeftModel.from_pretrained(base(2), tmp_path / "a")), logits(model))


def test_another_width_is_refused(base: Base, tiny_llama: Build, tmp_path: Path) -> None:
    adapted(base(1), target_modules=["q_proj"]).save_pretrained(tmp_path / "a")
    other = tiny_llama(vocab_size=104, hidden_size=64)
    with pytest.raises(
        PeanutError, match=r"of shape \(104, 32\); expected \(104, 64\) as in this base; load it on the"
    ):
        PeftModel.from_pretrained(other, tmp_path / "a")


def test_trained_tokens_alone_need_no_embeddings(base: Base, tmp_path: Path) -> None:
    model = get_peft_model(base(), TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"]))
    model.save_pretrained(tmp_path / "a")
    assert not held(tmp_path / "a")


@pytest.mark.parametrize("kind", ["embedding", "head", "both", "embedding trained whole", "other layers"])
def test_resizing_under_an_adapter_is_right_or_one_line(kind: str, base: Base, tmp_path: Path) -> None:
    model = randomised(get_peft_model(base(), config_of(peanut, kind))).eval()
    for same in ((), (101,), (101, 101)):
        assert len(model.resize_token_embeddings(*same).weight) == 101
    if kind != "other layers":
        message = r"^an adapter changes '.*', which is to be resized; expected embeddings without adapters; resi"
        with refused(model, message):
            model.resize_token_embeddings(104)
        return
    assert len(model.resize_token_embeddings(104, mean_resizing=False).weight) == 104
    model.save_pretrained(tmp_path / "a")
    assert same_bits(logits(PeftModel.from_pretrained(base(2), tmp_path / "a")), logits(model))


@pytest.mark.parametrize("kind", ["embedding", "head"])
def test_the_rows_to_resize_to_are_those_of_the_file(kind: str, base: Base, tmp_path: Path) -> None:
    """Not the rank, which is the first size of an embedding's A."""
    get_peft_model(base(1), config_of(peanut, kind)).save_pretrained(tmp_path / "a", save_embedding_layers=False)
    small = base()
    with refused(small, r"; call resize_token_embeddings\(104\) on the base first$"):
        PeftModel.from_pretrained(small, tmp_path / "a")


@pytest.mark.parametrize("resized", [False, True])
def test_embeddings_that_are_not_saved_are_still_those_of_the_base(resized: bool, base: Base, tmp_path: Path) -> None:
    """But for the rows that were added, which may have been made at random."""
    model = adapted(base(1) if resized else base())
    model.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    again, other = (base(1) if resized else base() for _ in range(2))
    assert same_bits(logits(PeftModel.from_pretrained(again, tmp_path / "a")), logits(model))
    with torch.no_grad():
        other.model.embed_tokens.weight[3, 1] += 1
    with refused(other, r"embed_tokens\.weight'( and 1 more)? differ"):
        PeftModel.from_pretrained(other, tmp_path / "a")


def test_tied_modules_that_are_not_loaded_stay_as_they_are(base: Base, tmp_path: Path) -> None:
    model = adapted(base(), modules_to_save=["embed_tokens", "lm_head"])
    model.save_pretrained(tmp_path / "a")
    with pytest.warns(UserWarning, match="of another shape, which are not loaded: .*embed_tokens"):
        larger = PeftModel.from_pretrained(base(2), tmp_path / "a", ignore_mismatched_sizes=True, check_base=False)
    assert logits(larger).isfinite().all()
    before = logits(model)
    rest = {key: value for key, value in get_peft_model_state_dict(model).items() if "lora" in key}
    with pytest.warns(UserWarning, match="lacks .*embed_tokens"):
        set_peft_model_state_dict(model, rest, strict=False)
    assert same_bits(logits(model), before)
