"""CPT against its formula, against the peer, and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from peanut import PeanutError, PeftModel, get_peft_model
from peanut.methods.cpt import CPTConfig
from peanut.model.adapters.adapter_set import AdapterSet
from peanut.protocols import METHODS

from ..prompts import KINDS, answer
from ..support import PEER_WARNINGS, distance, one_thread, peer_model, same_bits  # noqa: F401

pytestmark = PEER_WARNINGS
LLAMA = next(kind for kind in KINDS if str(kind) == "LlamaForCausalLM")
IDS, KINDS_OF = [5, 9, 12, 7, 30, 6, 8, 11], [1, 2, 2, 3, 4, 5, 6, 8]


def config(**options: Any) -> CPTConfig:
    return CPTConfig(**{"cpt_token_ids": IDS, "cpt_tokens_type_mask": KINDS_OF, "task_type": "CAUSAL_LM"} | options)


def new(**options: Any) -> PeftModel:
    torch.manual_seed(7)
    return get_peft_model(LLAMA.base(), config(**options)).eval()


def tensors(model: PeftModel) -> dict[str, Tensor]:
    return {key.removeprefix("/"): value for key, value in AdapterSet.of(model).parameters("default")}


def far(model: PeftModel) -> None:
    """Moves δ well out of its ball."""
    with torch.no_grad():
        tensors(model)["delta_embedding.weight"].copy_(torch.randn(8, 32, generator=torch.Generator().manual_seed(3)))


def test_starts_as_the_context_itself() -> None:
    batch = LLAMA.batch()
    longer = {"input_ids": torch.cat([torch.tensor(IDS).expand(3, -1), batch["input_ids"]], dim=1)}
    assert distance(answer(new(), batch), answer(LLAMA.base(), longer)) < 1e-6


def test_rows_stay_in_their_balls() -> None:
    model = new(opt_projection_epsilon=0.5, opt_projection_format_epsilon=0.25)
    far(model)
    values = tensors(model)
    delta = values["delta_embedding.weight"].detach().double()
    radius = {1: 0.25, 2: 0.5, 3: 0.25, 0: 1e-10}
    expected = torch.stack(
        [
            row * min(1.0, radius[kind % 4] * (1 if kind % 4 == 0 else (32 / 2048) ** 0.5) / float(row.norm()))
            for row, kind in zip(delta, KINDS_OF, strict=True)
        ]
    )
    context = LLAMA.base().get_input_embeddings()(torch.tensor(IDS)).double()
    made = METHODS["CPT"].prepended(model.active_peft_config, values, False)  # type: ignore[attr-defined]
    assert distance(made, context + expected) < 1e-6
    assert same_bits(values["delta_embedding.weight"].double(), delta)  # reading changes nothing
    with torch.no_grad():
        METHODS["CPT"].after_step(model.active_peft_config, [values])
    assert distance(values["delta_embedding.weight"], expected) < 1e-6


def test_answers_in_the_context_do_not_move() -> None:
    model = new()
    model(**LLAMA.batch(labels=True))["loss"].backward()
    gradient = tensors(model)["delta_embedding.weight"].grad
    assert gradient is not None
    still = torch.tensor([kind % 4 == 0 for kind in KINDS_OF])
    assert (gradient[still] == 0).all()
    assert (gradient[~still].abs().amax(1) > 0).all()


def loss_written_out(logits: Tensor, labels: Tensor, types: Tensor, decay: float) -> Tensor:
    """Token by token: the mean over all answers of cross entropy times decay^(answers of the row that follow)."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(len(labels)):
        whole = torch.tensor(IDS + labels[row].tolist())
        kinds = KINDS_OF + [int(value) + 8 if value > 0 else 0 for value in types[row]]
        answers = sorted({kind for kind in kinds[1:] if kind > 0 and kind % 4 == 0})
        for place in range(1, len(kinds)):
            if kinds[place] > 0 and kinds[place] % 4 == 0 and whole[place] != -100:
                later = sum(other > kinds[place] for other in answers)
                step = F.cross_entropy(logits[row, place - 1].double(), whole[place])
                total, count = total + step * decay**later, count + 1
    return total / count


@pytest.mark.parametrize("decay", [None, 0.5])
@pytest.mark.parametrize("given", [False, True])
def test_loss_is_as_written_out_and_as_the_peers(decay: float | None, given: bool) -> None:
    options: dict[str, Any] = {}
    if decay is not None:
        options = {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": decay}
    batch = LLAMA.batch(labels=True)
    batch["labels"][0, 2:4] = -100
    types = torch.tensor([[1, 2, 3, 4, 4, 5], [1, 2, 4, 4, 0, 0], [4, 4, 4, 8, 8, 8]])
    asked = types if given else torch.full((3, 6), 4)
    model = new(**options)
    far(model)
    more = {"input_type_mask": types.clone()} if given else {}
    output = model(**batch, **more)
    expected = loss_written_out(output["logits"], batch["labels"], asked, 1.0 if decay is None else decay)
    assert distance(output["loss"], expected) < 1e-6
    if given:
        assert torch.equal(more["input_type_mask"], types)
    peer = peer_model(LLAMA.base(), config(**options)).train()
    with torch.no_grad():
        peer.prompt_encoder["default"].delta_embedding.weight.copy_(tensors(model)["delta_embedding.weight"])
    theirs = peer(**{name: value.clone() for name, value in batch.items()}, **{k: types.clone() for k in more})
    assert distance(output["loss"], theirs["loss"]) < 1e-5
    output["loss"].backward()
    theirs["loss"].backward()
    gradient = tensors(model)["delta_embedding.weight"].grad
    assert gradient is not None
    assert distance(gradient, peer.prompt_encoder["default"].delta_embedding.weight.grad) < 1e-4


def test_steps_are_the_peers() -> None:
    model, batch = new().train(), LLAMA.batch(labels=True)
    peer = peer_model(LLAMA.base(), config()).train()
    for adapted in (model, peer):
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            adapted(**{name: value.clone() for name, value in batch.items()})["loss"].backward()
            optimizer.step()
    mine = METHODS["CPT"].prepended(model.active_peft_config, tensors(model), False)  # type: ignore[attr-defined]
    assert distance(mine, peer.get_prompt_embedding_to_save("default")) < 1e-5
    assert distance(mine, LLAMA.base().get_input_embeddings()(torch.tensor(IDS))) > 1e-4


def test_a_context_that_ends_within_an_example() -> None:
    """The types of the batch stay what they are, where the peer's become others and its loss is not a number."""
    model = new(cpt_token_ids=IDS[:3], cpt_tokens_type_mask=[1, 2, 2])
    output = model(**LLAMA.batch(labels=True))
    labels = torch.cat([torch.full((3, 3), -100), LLAMA.batch(labels=True)["labels"]], dim=1)
    expected = F.cross_entropy(output["logits"][:, :-1].double().transpose(1, 2), labels[:, 1:])
    assert distance(output["loss"], expected) < 1e-6


def test_goes_on_from_a_file_around_the_same_context(tmp_path: Path) -> None:
    model = new()
    far(model)
    with torch.no_grad():
        METHODS["CPT"].after_step(model.active_peft_config, [tensors(model)])
    expected = answer(model, LLAMA.batch())
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_training.safetensors").unlink()
    with pytest.warns(UserWarning, match="no adapter_training"):
        again = PeftModel.from_pretrained(LLAMA.base(), tmp_path, is_trainable=True)
    assert distance(answer(again.eval(), LLAMA.batch()), expected) < 1e-6
    values = tensors(again)
    assert set(values) == {"embedding.weight", "prompt_embeddings"}
    with torch.no_grad():
        values["prompt_embeddings"].add_(1.0)
        METHODS["CPT"].after_step(again.active_peft_config, [values])
    away = (values["prompt_embeddings"] - values["embedding.weight"]).norm(dim=1)
    assert float(away.detach().max()) < 0.1 * (32 / 2048) ** 0.5 * 1.001


def test_a_trained_state_dict_fits_an_adapter_that_is_loaded(tmp_path: Path) -> None:
    model = new()
    model.save_pretrained(tmp_path)
    far(model)
    loaded = PeftModel.from_pretrained(LLAMA.base(), tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    loaded.load_state_dict(model.state_dict())
    assert distance(loaded.get_prompt(1), model.get_prompt(1)) == 0
    theirs = peer_model(LLAMA.base(), config())
    loaded.load_state_dict(theirs.state_dict())
    assert distance(loaded.get_prompt(1), theirs.get_prompt(1)) == 0


def test_labels_beside_another_prompt() -> None:
    from peanut.methods.prompt_tuning import PromptTuningConfig

    model = new()
    model.add_adapter("other", PromptTuningConfig(num_virtual_tokens=2))
    model.set_adapter(["other", "default"])
    batch = LLAMA.batch(labels=True)
    assert torch.isfinite(model(**batch)["loss"])
    model.set_adapter(["default", "other"])
    with pytest.raises(PeanutError, match="activate it last"):
        model(**batch)
    model.set_adapter("default")
    with pytest.raises(PeanutError, match="leave the labels out"):
        model(**batch, adapter_names=["default", "__base__", "default"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_type": "SEQ_CLS"}, "CAUSAL_LM"),
        ({"num_virtual_tokens": 3}, "one virtual token for each id"),
        ({"cpt_tokens_type_mask": [1]}, "8, one for each"),
        ({"cpt_mask": [0] * 8}, "cpt_mask has a 0"),
        ({"cpt_tokens_type_mask": [-1] * 8}, "at least 0"),
        ({"opt_weighted_loss_type": "all"}, "'none' or 'decay'"),
        ({"opt_loss_decay_factor": float("nan")}, "finite"),
        ({"opt_projection_epsilon": -1.0}, "at least 0"),
        ({"target_modules": ["q_proj"]}, "changes no layer"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PeanutError, match=message):
        config(**options)


def test_ids_that_the_model_does_not_have() -> None:
    with pytest.raises(PeanutError, match="ids below 50"):
        new(cpt_token_ids=[50] * 8)
