"""Poly: each sample's change is that of its task, alone and beside others, in training, generation and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from peanut import LoraConfig, PeanutError, PeftModel, get_peft_model
from peanut.export import to_lora
from peanut.methods.poly import Poly, PolyConfig
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.model.layers.layer import AdaptedLayer

from ..support import PEER_WARNINGS, distance, gradients, one_thread, randomised, refused, same_bits  # noqa: F401

pytestmark = [*PEER_WARNINGS, pytest.mark.filterwarnings("ignore:Overriding a previously")]
Builder = Callable[..., hf.PreTrainedModel]
IDS = torch.randint(3, 101, (4, 7), generator=torch.Generator().manual_seed(0))
TASKS = torch.tensor([2, 0, 1, 2])
TIGHT = 1e-11  # the gates' sum has 1e-12 added to it, as in the peer
TARGETS = ["q_proj", "v_proj", "down_proj"]


def config(**options: Any) -> PolyConfig:
    return PolyConfig(
        **{"r": 3, "n_tasks": 3, "n_skills": 2, "n_splits": 2, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        | options
    )


def adapted(base: nn.Module, **options: Any) -> PeftModel:
    return randomised(get_peft_model(base, config(**options)))


def delta(values: dict[str, Tensor], task: int, r: int) -> Tensor:
    """ΔW (out, in) of a task, written out entry by entry from the definition, in float64."""
    A, B, logits = (
        values[name].detach().double() for name in ("poly_lora_A", "poly_lora_B", "poly_router.module_logits")
    )
    splits, skills = A.shape[:2]
    downs, ups = [], []
    for split in range(splits):
        sigma = [1 / (1 + torch.exp(-logits[task, split * skills + skill])) for skill in range(skills)]
        gates = [each / sum(sigma) for each in sigma]
        downs.append(sum(gate * A[split, skill] for skill, gate in enumerate(gates)))  # (in / splits, r)
        ups.append(sum(gate * B[split, skill] for skill, gate in enumerate(gates)))  # (r, out / splits)
    return (torch.cat(downs) @ torch.cat(ups, dim=1)).T / r


def merged_by_hand(build: Builder, model: PeftModel, task: int, **kwargs: Any) -> hf.PreTrainedModel:
    """A plain model into whose weights the change of one task is written."""
    plain = build(**kwargs).to(model.dtype)
    with torch.no_grad():
        for path, layer in model.adapters.layers("default"):
            weight: Any = plain.get_submodule(path).weight
            weight += delta(layer.values("default"), task, layer.method_of("default")[1].r).to(weight.dtype)
    return plain


# The definition


@pytest.mark.parametrize(("splits", "skills"), [(1, 3), (2, 2), (4, 1)])
def test_each_sample_gets_the_change_of_its_task(splits: int, skills: int) -> None:
    net = nn.Sequential(nn.Linear(12, 20)).double()
    plain = [parameter.clone() for parameter in net.parameters()]
    model = adapted(net, target_modules=["0"], n_splits=splits, n_skills=skills).eval()
    layer = next(layer for _, layer in model.adapters.layers())
    for shape in ((4, 5, 12), (4, 12), (8, 2, 12)):  # the last: two rows a sample, as beams have
        x = torch.randn(shape, dtype=torch.float64)
        each = x.reshape(4, -1, 12)
        expected = torch.stack(
            [
                rows @ (plain[0] + delta(layer.values("default"), int(task), 3)).T + plain[1]
                for rows, task in zip(each, TASKS, strict=True)
            ]
        ).reshape(*shape[:-1], 20)
        with AdapterSet.of(model).state.during(tasks=TASKS):
            assert distance(layer(x), expected) < TIGHT
        assert distance(expected, x @ plain[0].T + plain[1]) > 0.05


def test_gradients_are_those_of_the_definition(tiny_llama: Builder) -> None:
    model = adapted(tiny_llama().double()).eval()
    layer: AdaptedLayer = next(layer for _, layer in model.adapters.layers())
    values = layer.values("default")
    A, B, logits = (values[name] for name in ("poly_lora_A", "poly_lora_B", "poly_router.module_logits"))
    x, direction = torch.randn(4, 5, 32, dtype=torch.float64), torch.randn(4, 5, 32, dtype=torch.float64)
    with model.adapters.state.during(tasks=TASKS):
        found = torch.autograd.grad((layer(x) * direction).sum(), [A, B, logits])
    gates = torch.sigmoid(logits[TASKS].view(4, 2, 2))
    gates = gates / gates.sum(-1, keepdim=True)
    y = torch.zeros(4, 5, 32, dtype=torch.float64)
    for sample in range(4):
        hidden = sum(
            x[sample, :, 16 * q : 16 * q + 16] @ (gates[sample, q, s] * A[q, s]) for q in range(2) for s in range(2)
        )
        ups = [sum(gates[sample, q, s] * B[q, s] for s in range(2)) for q in range(2)]
        y[sample] = torch.cat([hidden @ up for up in ups], dim=-1) / 3
    expected = torch.autograd.grad((y * direction).sum(), [A, B, logits])
    assert all(distance(one, other) < TIGHT for one, other in zip(found, expected, strict=True))


def test_training_draws_gates_for_each_sample(tiny_llama: Builder) -> None:
    model = adapted(tiny_llama())
    layer = next(layer for _, layer in model.train().adapters.layers())
    x = torch.randn(1, 5, 32).expand(3000, -1, -1)
    tasks = torch.ones(3000, dtype=torch.long)
    method, own = layer.method_of("default")
    values = {key: value.detach() for key, value in layer.values("default").items()}
    with model.adapters.state.during(tasks=tasks), torch.no_grad():
        drawn = layer(x)
        assert drawn.std(0).max() > 0.05  # no two samples have the same
        assert not same_bits(layer(x), drawn)
    # σ((logits + logistic noise) / 1): its median is σ(logits), and it is below q with probability σ(logit(q) − logits)
    draws = method.routed(
        own, values | {"poly_lora_A": torch.eye(2).view(1, 2, 2, 1).expand(2, -1, -1, -1)}, tasks, True
    )
    gates = draws["down"].reshape(3000, 2, 2)
    assert distance(gates.sum(-1), torch.ones(3000, 2)) < 1e-5
    wide = torch.rand(200_000, 4).clamp(1e-7, 1 - 1e-7)
    sigma = torch.sigmoid(values["poly_router.module_logits"][1] + wide.logit()).view(-1, 2, 2)
    expected = sigma / sigma.sum(-1, keepdim=True)
    for level in (0.25, 0.5, 0.75):
        assert (gates.quantile(level, 0) - expected[:100_000].quantile(level, 0)).abs().max() < 0.04


# In a model


@pytest.mark.parametrize("as_list", [False, True])
def test_model_answers_each_sample_by_its_task(tiny_llama: Builder, as_list: bool) -> None:
    model = adapted(tiny_llama().double()).eval()
    found = model(IDS, task_ids=TASKS.tolist() if as_list else TASKS).logits
    for row, task in enumerate(TASKS.tolist()):
        expected = merged_by_hand(tiny_llama, model, task)(IDS[row : row + 1]).logits
        assert distance(found[row : row + 1], expected) < TIGHT
    assert distance(found[2:], tiny_llama().double()(IDS).logits[2:]) > 0.02


def test_works_on_gpt2_and_t5(tiny_gpt2: Builder) -> None:
    model = adapted(tiny_gpt2(), target_modules=["c_attn"]).eval()
    with torch.no_grad():
        assert distance(model(IDS, task_ids=[0] * 4).logits, model(IDS, task_ids=[1] * 4).logits) > 0.01
    settings = hf.T5Config(
        vocab_size=101, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    t5 = adapted(hf.T5ForConditionalGeneration(settings).eval(), target_modules=["q", "v"]).eval()
    options: Any = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    together = t5.generate(input_ids=IDS, task_ids=TASKS, **options)
    for row in range(4):
        alone = t5.generate(input_ids=IDS[row : row + 1], task_ids=TASKS[row : row + 1], **options)[0]
        assert together[row, : len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generation_by_task(tiny_llama: Builder, options: dict[str, Any]) -> None:
    model = adapted(tiny_llama()).eval()
    count = options.get("num_return_sequences", 1)
    common: Any = options | {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(IDS)
    found = model.generate(input_ids=IDS, attention_mask=mask, task_ids=TASKS, **common).reshape(4, count, -1)
    for row, task in enumerate(TASKS.tolist()):
        plain: Any = merged_by_hand(tiny_llama, model, task)
        expected = plain.generate(input_ids=IDS[row : row + 1], attention_mask=mask[:1], **common)
        assert found[row].tolist() == expected.tolist()
    assert len({tuple(row[0, 7:].tolist()) for row in found}) > 1


def test_per_sample_adapters_with_tasks(tiny_llama: Builder) -> None:
    model = adapted(tiny_llama().double()).eval()
    model.add_adapter("lora", LoraConfig(r=2, target_modules=TARGETS))
    model.add_adapter("other", config(n_tasks=5))
    randomised(model, ["lora", "other"]).eval()
    names, tasks = ["other", "default", "__base__", "lora"], [4, 1, 4, 4]
    mixed = model(IDS, adapter_names=names, task_ids=tasks).logits
    for row, name in enumerate(names):
        with model.disable_adapter():
            expected = model(IDS[row : row + 1]).logits
        if name != "__base__":
            model.set_adapter(name)
            expected = model(IDS[row : row + 1], task_ids=tasks[row : row + 1]).logits
        assert distance(mixed[row : row + 1], expected) < TIGHT
    with pytest.raises(PeanutError, match=r"^task 4 in task_ids; expected numbers from 0 to 2 \(n_tasks=3\); correct"):
        model(IDS, adapter_names=names, task_ids=[4, 4, 4, 4])


def test_two_polys_and_a_lora_together(tiny_llama: Builder) -> None:
    model = adapted(tiny_llama().double()).eval()
    model.add_adapter("lora", LoraConfig(r=2, target_modules=TARGETS))
    model.add_adapter("other", config(n_splits=1))
    randomised(model, ["lora", "other"]).eval()
    layer = next(layer for _, layer in model.adapters.layers())
    x = torch.randn(4, 5, 32, dtype=torch.float64)
    plain = layer.base_layer(x)
    with model.adapters.state.during(tasks=TASKS):
        alone = {}
        for name in ("default", "lora", "other"):
            model.set_adapter(name)
            alone[name] = layer(x) - plain
        model.set_adapter(["default", "lora", "other"])
        assert distance(layer(x) - plain, sum(alone.values())) < TIGHT
        model.merge_adapter("lora")
        assert distance(layer(x) - plain, sum(alone.values())) < TIGHT
    assert layer.merged_adapters == ["lora"]


def test_within_inference_a_task_is_mixed_once(tiny_llama: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(tiny_llama().double()).eval()
    count, calls, routed = sum(1 for _ in model.adapters.layers()), [0], Poly.routed

    def counted(*args: Any) -> Any:
        calls[0] += 1
        return routed(*args)

    def mixings(tasks: list[int], ids: Tensor = IDS) -> int:
        expected = model(ids, task_ids=tasks).logits  # with gradients: mixed anew
        calls[0] = 0
        with torch.no_grad():
            assert distance(model(ids, task_ids=tasks).logits, expected) < TIGHT
        return calls[0]

    monkeypatch.setattr(Poly, "routed", counted)
    assert mixings([2, 2, 2, 2]) == mixings([2, 2, 2, 2]) == count
    with model.inference():
        assert mixings([2, 2, 2, 2]) == count
        assert mixings([2, 2, 2, 2]) == 0
        assert mixings([2, 2], IDS[:2]) == 0
        assert mixings([1, 1], IDS[:2]) == count
        assert mixings([2, 0], IDS[:2]) == mixings([2, 0], IDS[:2]) == count  # of each row nothing is kept
        assert mixings([1, 1, 1, 1]) == 0
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert mixings([1, 1, 1, 1]) == count


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_sees_the_same_tasks_and_draws(tiny_llama: Builder, reentrant: bool) -> None:
    model = adapted(tiny_llama()).train()

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        losses = [model(IDS, labels=IDS, task_ids=TASKS).loss, model(IDS, labels=IDS, task_ids=[1, 1, 0, 0]).loss]
        sum(losses).backward()  # type: ignore[union-attr]
        return {name: grad.clone() for name, grad in gradients(model).items()}

    expected = run()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    found = run()
    assert found.keys() == expected.keys()
    assert all(distance(found[name], grad) < 1e-5 for name, grad in expected.items())


def test_bfloat16(tiny_llama: Builder) -> None:
    model = adapted(tiny_llama().bfloat16()).eval()
    exact = adapted(tiny_llama().double()).eval()
    exact.load_state_dict(model.state_dict())
    found = model(IDS, task_ids=TASKS).logits
    assert found.dtype == torch.bfloat16
    assert distance(found, exact(IDS, task_ids=TASKS).logits) < 0.05


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_with_tasks(tiny_llama: Builder) -> None:
    torch._dynamo.reset()
    model = adapted(tiny_llama()).eval()
    layer = next(layer for _, layer in model.adapters.layers())
    x = torch.randn(4, 5, 32)
    with model.adapters.state.during(tasks=TASKS):
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert distance(compiled(x), layer(x)) < 1e-5


# One task: a weight like others


def test_one_task_needs_no_name_and_merges(tiny_llama: Builder, tmp_path: Path) -> None:
    model = adapted(tiny_llama().double(), n_tasks=1).eval()
    expected = merged_by_hand(tiny_llama, model, 0)(IDS).logits
    assert distance(model(IDS).logits, expected) < TIGHT
    assert distance(model(IDS, task_ids=[0] * 4).logits, expected) < TIGHT
    to_lora(model).save(tmp_path)
    assert distance(PeftModel.from_pretrained(tiny_llama().double(), tmp_path)(IDS).logits, expected) < 1e-6
    model.merge_adapter()
    assert distance(model(IDS).logits, expected) < TIGHT


def test_several_tasks_have_no_one_weight(tiny_llama: Builder) -> None:
    model = adapted(tiny_llama()).eval()
    message = r"^a Poly adapter for 3 tasks, and no task is named; expected task_ids, one for each sample; call the mod"
    with refused(model, message):
        model(IDS)
    with refused(model, message):
        model.merge_adapter()
    with refused(model, message):
        model.generate(input_ids=IDS, max_new_tokens=2)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([0, 1, 3, 0], r"^task 3 in task_ids; expected numbers from 0 to 2 \(n_tasks=3\)"),
        ([0, -1, 2, 0], r"^task -1 in task_ids; expected numbers from 0 to 2"),
        ([0.0, 1.0, 1.0, 2.0], r"^task_ids of torch.float32; expected whole numbers"),
        ([True, False, True, True], r"^task_ids of torch.bool; expected whole numbers"),
        ([0, 1, 2], r"^task_ids has 3 tasks and a layer sees a batch of 4; expected one task for each sample; give"),
        ([0, 1], r"^task_ids has 2 tasks and a layer sees a batch of 4; expected one task for each sample; give"),
        ([], r"^task_ids has 0 tasks"),
    ],
)
def test_wrong_tasks(tiny_llama: Builder, tasks: list[Any], message: str) -> None:
    model = adapted(tiny_llama()).eval()
    with refused(model, message):
        model(IDS, task_ids=tasks)
    with refused(model, message):
        model.generate(input_ids=IDS, task_ids=torch.tensor(tasks), max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_skills": 0}, r"^n_skills=0; expected a whole number of at least 1"),
        ({"n_tasks": 1.5}, r"^n_tasks=1.5; expected a whole number"),
        ({"poly_type": "poli"}, r"^poly_type='poli'; expected 'poly'"),
    ],
)
def test_wrong_configs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        PolyConfig(**options)


def test_splits_that_do_not_divide(tiny_llama: Builder) -> None:
    base = tiny_llama()
    with refused(
        base, r"^n_splits=5 for 'model.layers.0.self_attn.q_proj', which has 32 inputs; expected a number that"
    ):
        get_peft_model(base, config(n_splits=5))


# The peer, files


def theirs(base: nn.Module, **options: Any) -> Any:
    import peft

    values = {name: value for name, value in config(**options).to_dict().items() if name not in PolyConfig.only_here}
    return peft.get_peft_model(base, peft.get_peft_config(values))


@pytest.mark.parametrize("options", [{}, {"n_splits": 1, "n_skills": 4}, {"n_tasks": 1}], ids=str)
def test_files_of_either_library(tiny_llama: Builder, tmp_path: Path, options: dict[str, Any]) -> None:
    import peft

    tasks = torch.zeros(4, dtype=torch.long) if options.get("n_tasks") == 1 else TASKS
    model = adapted(tiny_llama(), **options).eval()
    model.save_pretrained(tmp_path / "ours")
    other = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours").eval()
    assert distance(model(IDS, task_ids=tasks).logits, tiny_llama()(IDS).logits) > 0.02
    assert distance(model(IDS, task_ids=tasks).logits, other(IDS, task_ids=tasks).logits) < 1e-5
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape)) if parameter.shape[0] <= 3 else None
    other.save_pretrained(tmp_path / "theirs")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "theirs")
    assert distance(again(IDS, task_ids=tasks).logits, other(IDS, task_ids=tasks).logits) < 1e-5
    assert distance(again(IDS, task_ids=tasks).logits, model(IDS, task_ids=tasks).logits) > 1e-3


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_peer_computes_the_same(tiny_llama: Builder, tmp_path: Path, train: bool) -> None:
    """In training as well: the same seed draws the same gates, layer by layer."""
    model = adapted(tiny_llama())
    model.save_pretrained(tmp_path)
    import peft

    other = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    own, their = [], []
    for each, found in ((model, own), (other, their)):
        each.train(train)
        torch.manual_seed(7)
        loss = each(input_ids=IDS, labels=IDS, task_ids=TASKS).loss
        loss.backward()
        grads = {name.replace("adapters.", "").replace("default.", ""): grad for name, grad in gradients(each).items()}
        grads = {name.replace(".default", ""): grad for name, grad in grads.items()}
        found += [loss.detach(), *(grads[name] for name in sorted(grads))]
    assert len(own) == len(their) == 1 + 3 * 6
    for one, other_one in zip(own, their, strict=True):
        assert one.shape == other_one.shape
        assert distance(one, other_one) < 1e-4
    with torch.no_grad():
        plain = model.eval()(input_ids=IDS, labels=IDS, task_ids=TASKS).loss
    assert (abs(plain - own[0]) > 1e-4) == train


def test_start_has_the_spread_of_the_peer(tiny_llama: Builder) -> None:
    own = get_peft_model(tiny_llama(), config(r=16, n_skills=8, init_weights=False))
    other = theirs(tiny_llama(), r=16, n_skills=8, init_weights=False)
    spreads: dict[str, list[float]] = {}
    for model in (own, other):
        for name, value in model.named_parameters():
            if value.requires_grad:
                key = name.split("layers.")[1].replace(".default", "").replace("adapters.", "")
                spreads.setdefault(key, []).append(float(value.detach().abs().max()))
    assert len(spreads) == 18
    for key, found in spreads.items():
        assert len(found) == 2, key
        assert found[0] == pytest.approx(found[1], rel=0.15), key


def test_saved_with_weight_methods_and_loaded_whole(tiny_llama: Builder, tmp_path: Path) -> None:
    model = adapted(tiny_llama()).eval()
    model.add_adapter("lora", LoraConfig(r=2, target_modules=TARGETS))
    randomised(model, ["lora"]).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    again.load_adapter(tmp_path / "lora", "lora")
    for names in ("default", "lora", ["default", "lora"]):
        model.set_adapter(names)
        again.set_adapter(names)
        assert same_bits(again(IDS, task_ids=TASKS).logits, model(IDS, task_ids=TASKS).logits)
    with model.disable_adapter():
        assert same_bits(model(IDS, task_ids=TASKS).logits, tiny_llama()(IDS).logits)


def test_trainer_passes_the_tasks(tiny_llama: Builder, tmp_path: Path) -> None:
    model = get_peft_model(tiny_llama(), config(r=4))
    rows = [{"input_ids": IDS[row % 4], "labels": IDS[row % 4], "task_ids": int(TASKS[row % 4])} for row in range(32)]
    arguments = hf.TrainingArguments(
        str(tmp_path),
        max_steps=30,
        learning_rate=5e-2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = hf.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
