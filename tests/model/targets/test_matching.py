"""Which layers a config names; what names nothing is told, and the model is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from peanut import IA3Config, LoraConfig, OutOfReachWarning, PeanutConfig, get_peft_model
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.model.targets.architectures import ARCHITECTURES
from peanut.model.targets.matching import HEADS

from ...support import PEER_WARNINGS, one_thread, peer_model, refused  # noqa: F401

pytestmark = PEER_WARNINGS
Build = Callable[..., hf.PreTrainedModel]


def adapted_paths(model: nn.Module, **options: Any) -> list[str]:
    get_peft_model(model, LoraConfig(r=2, **options))
    return [path for path, _ in AdapterSet.of(model).layers()]


ATTENTION = [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkvo"]
MLP = [f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
        {"target_modules": ["model.layers.1.mlp.up_proj"]},
        {"target_modules": r".*\.1\..*(q|up)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": "All-Linear"},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
        {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "q_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_chosen_layers_are_those_the_peer_chooses(options: dict[str, Any], tiny_llama: Build) -> None:
    found = adapted_paths(tiny_llama(), **options)
    theirs = peer_model(tiny_llama(), LoraConfig(r=2, **options)).base_model.targeted_module_names
    assert found
    assert set(found) == set(theirs)
    assert len(found) == len(set(found))


def test_chosen_layers_by_their_paths(tiny_llama: Build) -> None:
    def chosen(**options: Any) -> set[str]:
        return set(adapted_paths(tiny_llama(), **options))

    assert chosen() == {path for path in ATTENTION if path.endswith(("q_proj", "v_proj"))}
    assert chosen(target_modules="all-linear") == {*ATTENTION, *MLP}
    assert chosen(target_modules="all-linear", layers_to_transform=1) == {p for p in ATTENTION + MLP if ".1." in p}
    assert chosen(target_modules=r".*up_proj", layers_to_transform=[0]) == {"model.layers.0.mlp.up_proj"}


def test_layers_come_in_the_order_of_the_model(tiny_llama: Build) -> None:
    model = tiny_llama()
    paths = [path for path, _ in model.named_modules()]
    found = adapted_paths(model, target_modules=["up_proj", "k_proj"])
    assert found == [path for path in paths if path.endswith(("k_proj", "up_proj"))]


@pytest.mark.parametrize("model_class", [hf.BertForSequenceClassification, hf.BertForTokenClassification, hf.BertModel])
def test_all_linear_leaves_the_head_of_the_task_out(model_class: type[hf.PreTrainedModel], tiny_bert: Build) -> None:
    task = {"BertForSequenceClassification": "SEQ_CLS", "BertForTokenClassification": "TOKEN_CLS"}
    found = adapted_paths(tiny_bert(model_class), target_modules="all-linear", task_type=task.get(model_class.__name__))
    assert not any("classifier" in path for path in found)
    assert len(found) == 2 * 6 + (model_class is not hf.BertForTokenClassification)  # and the pooler


@pytest.mark.parametrize("fixture", ["tiny_bert", "tiny_llama", "tiny_gpt2", "tiny_vit"])
def test_every_architecture_at_hand_has_a_default(fixture: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(fixture)()
    found = adapted_paths(model)
    assert {path.rpartition(".")[2] for path in found} <= set(ARCHITECTURES[model.config.model_type].attention)
    assert len(found) in (2, 4)


def test_every_default_of_the_peer_is_ours() -> None:
    """Attention's layers, in the order of its tables, and what (IA)³ scales."""
    from peft.utils import constants

    def listed(names: tuple[str, ...] | str) -> list[str] | str:
        return names if isinstance(names, str) else list(names)

    theirs = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    assert {name: listed(ARCHITECTURES[name].attention) for name in theirs} == theirs
    scaled = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    inputs = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    ours = {name: ARCHITECTURES[name] for name in scaled}
    assert {name: [*each.scaled_outputs, *each.scaled_inputs] for name, each in ours.items()} == scaled
    assert {name: [*each.scaled_inputs] for name, each in ours.items()} == inputs


def test_a_default_leaves_out_what_the_model_has_no_more() -> None:
    """Experts that transformers has fused have no ``w2``; the rest of (IA)³'s default is there."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = hf.MixtralForCausalLM(hf.MixtralConfig(vocab_size=20, **sizes, **heads))
    adapted = get_peft_model(model, IA3Config(task_type="CAUSAL_LM"))
    assert [path.rpartition(".")[2] for path, _ in adapted.adapters.layers()] == ["k_proj", "v_proj"]


def test_a_default_may_be_a_regular_expression() -> None:
    """Gemma 4 has layers of these names beside the language model too, and they are not for adapters."""
    model = nn.Module()
    model.config = SimpleNamespace(model_type="gemma4")
    for part in ("language_model", "vision_tower"):
        layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(2, 2) for name in ("q_proj", "k_proj")}) for _ in "ab")
        model.add_module(part, nn.ModuleDict({"layers": layers}))
    assert adapted_paths(model) == [f"language_model.layers.{block}.q_proj" for block in range(2)]


@pytest.mark.parametrize("task", HEADS)
def test_heads_of_a_task_are_trained_as_in_the_peer(task: str) -> None:
    import peft

    classes = {
        "SEQ_CLS": hf.BertForSequenceClassification,
        "TOKEN_CLS": hf.BertForTokenClassification,
        "QUESTION_ANS": hf.BertForQuestionAnswering,
    }

    def base() -> hf.PreTrainedModel:
        return classes[task](
            hf.BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
        )

    model = get_peft_model(base(), LoraConfig(r=2, task_type=task))
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, task_type=task))
    heads = {name for name, _ in theirs.named_modules() if name.endswith("modules_to_save")}
    assert {f"base_model.model.{path}.modules_to_save" for path, _ in model.adapters.saved_modules()} == heads
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"target_modules": ["q_prj"]},
        r"^target_modules names 'q_prj', which no module of LlamaForCausalLM is called; expected .*; nearest: ",
    ),
    ({"target_modules": ["q_proj", "vproj"]}, r"^target_modules names 'vproj', .*; nearest: 'v_proj'"),
    ({"target_modules": ["proj"]}, r"^target_modules names 'proj', "),
    ({"target_modules": r"q_proj"}, r"^target_modules='q_proj' matches no module path .*; expected a regular "),
    ({"target_modules": ["self_attn"]}, r"^target_modules matches 'model\.layers\.0\.self_attn', a LlamaAttention; "),
    ({"target_modules": ["norm"]}, r"a LlamaRMSNorm; expected layers of kind linear, .*; name the layers"),
    ({"target_modules": []}, r"^target_modules=\[\] leaves no layer .*; expected at least one layer; change one"),
    (
        {"target_modules": ["q_proj"], "exclude_modules": ["q_prj"]},
        r"^exclude_modules names 'q_prj', .*nearest: 'q_proj'",
    ),
    (
        {"target_modules": ["q_proj"], "exclude_modules": ".*zz"},
        r"^exclude_modules names '\.\*zz', which no module of LlamaForCausalLM is ",
    ),
    ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"leaves no layer once modules_to_save, "),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 2, 7]},
        r"^layers_to_transform names \[2, 7\], and the targets lie in blocks 0 to 1; expected indices of blocks that ",
    ),
    (
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "h"},
        r"^layers_to_transform names \[0\], and the targets lie in no numbered block under layers_pattern='h'; ",
    ),
    ({"target_modules": ["lm_head"], "layers_to_transform": 0}, r"and the targets lie in no numbered block; "),
    (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_heads"]},
        r"^modules_to_save names 'lm_heads', which no module of LlamaForCausalLM is called; .*; nearest: 'lm_head'",
    ),
    ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, r"leaves no layer once modules_to_save"),
]


@pytest.mark.parametrize("config_class", [PeanutConfig, LoraConfig])
@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_names_nothing_is_refused(
    options: dict[str, Any], message: str, config_class: type[PeanutConfig], tiny_llama: Build
) -> None:
    model = tiny_llama()
    with refused(model, message):
        get_peft_model(model, config_class(**options))
    get_peft_model(model, config_class(target_modules=["q_proj"]))  # and it can still be adapted


def test_a_model_without_default_is_told_what_it_has() -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "second": nn.Linear(2, 2)})
    with refused(
        model,
        r"^no default target_modules of LORA for ModuleDict \(model_type None\); .*name some of first, second, or",
    ):
        get_peft_model(model, LoraConfig())


OTHER_KINDS = [
    lambda: nn.ConvTranspose1d(4, 4, 1),
    lambda: nn.ConvTranspose3d(4, 4, 1),
    lambda: nn.LSTM(4, 4),
    lambda: nn.EmbeddingBag(4, 4),
]


@pytest.mark.parametrize("other", OTHER_KINDS)
def test_a_layer_of_another_kind_is_named(other: Callable[[], nn.Module]) -> None:
    model = nn.ModuleDict({"other": other(), "up": nn.Linear(4, 4)})
    kind = type(model["other"]).__name__
    with refused(model, rf"^target_modules matches 'other', an? {kind}; expected layers of kind linear, .*exclude it$"):
        get_peft_model(model, LoraConfig(target_modules=["other"]))


def test_the_projection_inside_torch_attention_is_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "up": nn.Linear(4, 4)})
    with refused(model, r"^'attention\.out_proj' belongs to an nn\.Mult.*; name 'attention', .* or exclude it$"):
        get_peft_model(model, LoraConfig(target_modules=["out_proj", "up"]))
    with pytest.warns(OutOfReachWarning, match=r"in MultiheadAttention\.in_proj_weight"):
        assert adapted_paths(model, target_modules="all-linear") == ["up"]


class Experts(nn.Module):
    """Numbered lists within numbered blocks, as in mixtures of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"experts": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(2, 2)}) for _ in range(3))})
            for _ in range(2)
        )


def test_blocks_are_the_first_numbers_unless_a_pattern_says_otherwise() -> None:
    assert adapted_paths(Experts(), target_modules=["up"], layers_to_transform=1) == [
        f"layers.1.experts.{i}.up" for i in range(3)
    ]
    found = adapted_paths(Experts(), target_modules=["up"], layers_to_transform=[2], layers_pattern=["experts"])
    assert found == [f"layers.{i}.experts.2.up" for i in range(2)]


def test_a_second_adapter_finds_layers_that_are_adapted_already(tiny_llama: Build) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.add_adapter("b", PeanutConfig(target_modules="all-linear", modules_to_save=["lm_head"]))
    assert [path for path, _ in model.adapters.layers("b")] == [
        path for path, module in tiny_llama().named_modules() if isinstance(module, nn.Linear) and path != "lm_head"
    ]
    assert torch.equal(model(torch.arange(5)[None]).logits, tiny_llama()(torch.arange(5)[None]).logits)


def test_a_layer_inside_a_module_trained_whole_by_another_adapter_is_the_originals() -> None:
    config = hf.RobertaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    base = hf.RobertaForSequenceClassification(config).eval()
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS"), "a")
    model.add_adapter("b", LoraConfig(target_modules=["classifier.dense"], init_lora_weights=False))
    x = torch.arange(2, 6)[None]
    before = model(x).logits
    model.set_adapter("b")
    assert not torch.equal(model(x).logits, before)
    model.set_adapter("a")
    assert torch.equal(model(x).logits, before)
    with pytest.warns(UserWarning, match="'b' is active now"):
        model.delete_adapter("a")
    with refused(base, r"^'classifier' is to be trained whole, and another adapter changes a layer in it; .*leave it"):
        model.add_adapter("c", LoraConfig(task_type="SEQ_CLS"))
    model.delete_adapter("b")
    assert type(base.classifier.dense) is nn.Linear
