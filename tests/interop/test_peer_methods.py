"""Live models of the peer made ours and given back, every method that both have: outputs, gradients, optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from peanut import PeftConfig, PeftModel, PolyConfig, from_peft, to_peft

from ..methods.mixing import IDS, OPTIONS, TARGETS, logits, lora_folders, peers  # noqa: F401
from ..methods.test_adaption_prompt import batch as prompt_batch
from ..methods.test_adaption_prompt import config as prompt_config
from ..methods.test_adaption_prompt import made as prompt_base
from ..prompts import FORMS, KINDS, Form, Kind, answer, own
from ..support import FIRST_CASES, PEER_WARNINGS, Case, distance, one_thread, peer_has, peer_model, scattered  # noqa: F401
from ..test_parity import WHOLE, build, run  # noqa: F401

Builder = Callable[..., hf.PreTrainedModel]
SAME = 1e-5
pytestmark = [
    *PEER_WARNINGS,
    pytest.mark.filterwarnings("ignore:adapter 'default' started by"),  # PiSSA and OLoRA
    pytest.mark.filterwarnings("ignore:`enable_softmax_topk` and `enable_softmax`"),
]


def trained(model: nn.Module) -> set[int]:
    return {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def changed(theirs: Any, scale: float = 0.1) -> Any:
    """The peer's model with clearly non-zero values in what it trains."""
    scattered([parameter for parameter in theirs.parameters() if parameter.requires_grad], scale=scale)
    return theirs


def pair(theirs: Any) -> tuple[Any, list[torch.optim.Optimizer]]:
    """A copy of a model, and an optimizer of each."""
    twin = copy.deepcopy(theirs)
    found: list[torch.optim.Optimizer] = []
    for model in (theirs, twin):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append(torch.optim.AdamW(parameters, lr=0.01, eps=1e-3))  # eps: rounding is no direction
    return twin, found


def step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[nn.Module], Tensor]) -> None:
    torch.manual_seed(3)  # for the base's own dropout
    loss(model).backward()
    optimizer.step()
    if hasattr(getattr(model, "base_model", None), "update_and_allocate"):
        model.base_model.update_and_allocate(1)
    optimizer.zero_grad()


def values_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize(
    ("kind", "config"), WHOLE, ids=[f"{kind}-{config.method}-{i}" for i, (kind, config) in enumerate(WHOLE)]
)
def test_there_and_back(kind: str, config: PeftConfig, build: Callable[[str], hf.PreTrainedModel]) -> None:  # noqa: F811
    base = build(kind)
    parameters = dict(base.named_parameters())
    theirs = changed(peer_model(base, config))
    moving, places = trained(theirs), {name: parameter.data_ptr() for name, parameter in parameters.items()}
    twin, (optimizer, other) = pair(theirs)
    expected = run(twin, kind).logits

    model = from_peft(theirs)
    assert isinstance(model, PeftModel)
    assert model.get_base_model() is base
    assert trained(model) == moving
    there = {id(parameter): parameter.data_ptr() for parameter in model.parameters()}
    for name, parameter in parameters.items():
        assert there[id(parameter)] == places[name], name
    assert distance(run(model, kind).logits, expected) < SAME
    assert not model.training
    if not getattr(config, "coft", False):  # the peer moves COFT's parameters in the forward, ours what they make
        for one, its in ((model, optimizer), (twin, other)):
            step(one.train(), its, lambda one: run(one, kind).loss)
            one.eval()
        for found, wanted in zip(values_of(optimizer), values_of(other), strict=True):
            assert torch.allclose(found, wanted, atol=SAME), float((found - wanted).abs().max())

    expected = run(model, kind).logits
    back = to_peft(model)
    assert type(back) is type(theirs)
    assert back.get_base_model() is base
    assert trained(back) == moving
    assert {name for name, _ in back.named_parameters()} == {name for name, _ in twin.named_parameters()}
    assert distance(run(back, kind).logits, expected) < SAME
    assert not any(module.training for module in back.modules())


LAYERS = [case for case in FIRST_CASES if peer_has(case)]


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_every_kind_of_layer(case: Case) -> None:
    theirs, x = changed(peer_model(case.net(torch.float32), case.config()), scale=0.4), case.input(torch.float32)
    expected, moving = theirs(x).detach(), trained(theirs)
    model = from_peft(theirs)
    assert distance(model(x), expected) < SAME
    assert trained(model) == moving
    back = to_peft(model)
    assert distance(back(x), expected) < SAME
    assert trained(back) == moving


FIRST = [
    (next(kind for kind in KINDS if form.fits(kind) and str(kind) == name), form)
    for form in FORMS
    for name in ("BertForTokenClassification", "LlamaForCausalLM", "T5ForConditionalGeneration")
    if any(form.fits(kind) and str(kind) == name for kind in KINDS)
]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(("kind", "form"), FIRST, ids=[f"{kind}-{form}" for kind, form in FIRST])
def test_prompts(kind: Kind, form: Form, inference: bool) -> None:
    torch.manual_seed(5)
    theirs, batch = peer_model(kind.base(), form.config(kind, inference_mode=inference)), kind.batch()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    behind = kind.task in ("CAUSAL_LM", "TOKEN_CLS")  # the peer answers for virtual tokens too
    moving = trained(theirs)
    expected = answer(theirs, batch)[:, -6:] if behind else answer(theirs, batch)
    model = from_peft(theirs)
    assert distance(own(answer(model, batch), kind, 6), expected) < SAME
    assert trained(model) == moving
    back = to_peft(model)
    assert distance(answer(back, batch)[:, -6:] if behind else answer(back, batch), expected) < SAME
    assert trained(back) == moving


def test_a_prompt_goes_on_training() -> None:
    kind, form = FIRST[[str(form) for _, form in FIRST].index("P_TUNING-MLP") + 1]
    batch = kind.batch(labels=True)
    theirs = peer_model(kind.base(), form.config(kind))
    twin, (optimizer, other) = pair(theirs)
    for one, its in ((from_peft(theirs), optimizer), (twin, other)):
        step(one.train(), its, lambda one: one(**batch).loss)
    assert len(values_of(optimizer)) > 0
    assert all(torch.allclose(a, b, atol=SAME) for a, b in zip(values_of(optimizer), values_of(other), strict=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adaption_prompts_one_of_them_silent(kind: str) -> None:
    theirs = peer_model(prompt_base(kind), prompt_config())
    import peft

    other = prompt_config(adapter_len=3).to_dict()
    theirs.add_adapter("other", peft.get_peft_config(other))
    silent = [
        p for layers in theirs.base_model._cached_adapters.values() for m in layers for p in m._parameters.values()
    ]
    scattered([p for p in [*theirs.parameters(), *silent] if p is not None and p.requires_grad])
    expected = {}
    for name in ("default", "other"):
        theirs.set_adapter(name)
        expected[name] = theirs(**prompt_batch()).logits.detach()
    assert distance(expected["default"], expected["other"]) > 1000 * SAME
    model = from_peft(theirs)
    assert model.active_adapters == ["other"]
    for name in ("other", "default"):
        model.set_adapter(name)
        assert distance(model(**prompt_batch()).logits, expected[name]) < SAME
    model.delete_adapter("other")
    assert distance(to_peft(model)(**prompt_batch()).logits, expected["default"]) < SAME


@pytest.mark.parametrize("options", [*OPTIONS[:4], OPTIONS[5]], ids=str)
def test_xlora(tiny_llama: Builder, experts: dict[str, str], options: dict[str, Any]) -> None:
    theirs = peers(tiny_llama(), experts, **options)
    scattered([p for name, p in theirs.named_parameters() if "xlora_classifier" in name], 9)
    expected, moving = logits(theirs), trained(theirs)
    model = from_peft(theirs)
    assert model.active_adapters == ["default"]
    assert distance(logits(model), expected) < SAME
    assert trained(model) == moving
    back = to_peft(model)
    assert distance(logits(back), expected) < SAME
    assert trained(back) == moving
    assert distance(logits(from_peft(back)), expected) < SAME


@pytest.mark.parametrize("tasks", [1, 2])
def test_poly(tiny_llama: Builder, tasks: int) -> None:
    config = PolyConfig(
        task_type="CAUSAL_LM", r=4, n_tasks=tasks, n_skills=3, n_splits=2, target_modules=TARGETS, init_weights=False
    )
    theirs = changed(peer_model(tiny_llama(), config), scale=0.4)
    ids = torch.arange(len(IDS)) % tasks
    expected, moving = theirs(IDS, task_ids=ids).logits.detach(), trained(theirs)
    model = from_peft(theirs)
    assert distance(model(IDS, task_ids=ids).logits, expected) < SAME
    assert trained(model) == moving
    assert distance(to_peft(model)(IDS, task_ids=ids).logits, expected) < SAME
