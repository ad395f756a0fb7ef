"""FSDP keeps the tensors of the modules that it wraps among their attributes: adapters act there as without it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

from peanut import PeanutError, get_peft_model_state_dict, set_peft_model_state_dict
from peanut.utils import fsdp_auto_wrap_policy

from ...support import FIRST_CASES, Case, change_in_output, directed, distance, gradients, one_thread  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*returned no loss"),
    pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`"),  # one process has nothing to share
    pytest.mark.filterwarnings("ignore:.*FullyShardedDataParallel.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*FSDP.* is deprecated"),
    pytest.mark.filterwarnings("ignore:When using ``NO_SHARD``"),
]


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


SOME = [case for case in FIRST_CASES if case.kind in ("conv", "norm") or case.method in ("LORA", "PEANUT", "OFT")]
LORA = next(case for case in SOME if case.method == "LORA")


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("case", SOME, ids=str)
def test_an_adapted_model_computes_the_same_under_fsdp(case: Case) -> None:
    model, x = case.adapted(dtype=torch.float32), case.input(torch.float32)
    assert change_in_output(model, case.net(torch.float32), x) > 0.01
    y = model(x)
    directed(y).backward()
    wanted = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    found = wrapped(x)
    directed(found).backward()
    assert distance(found, y) < 1e-6
    own = {name.removeprefix("_fsdp_wrapped_module."): grad for name, grad in gradients(wrapped).items()}
    assert wanted
    assert all(distance(own.pop(name), grad) < 1e-5 for name, grad in wanted.items())
    assert not any(grad.any() for grad in own.values())  # of what this forward has no use for


@pytest.mark.usefixtures("group")
def test_adapters_stay_with_the_layers_that_read_them() -> None:
    """Hugging Face PEFT's policy, without ``install``, puts units of their own around them."""
    model = LORA.adapted(dtype=torch.float32)
    own = next(value for name, value in model.named_modules() if name.endswith("lora_A"))
    options: Any = {"use_orig_params": True, "device_id": torch.device("cpu")}
    policy = partial(lambda_auto_wrap_policy, lambda_fn=lambda module: module is own["default"])
    with pytest.raises(PeanutError, match=r"FSDP around the tensors of adapter 'default' alone"):
        FullyShardedDataParallel(model, auto_wrap_policy=policy, **options)
    model = LORA.adapted(dtype=torch.float32)
    x = LORA.input(torch.float32)
    expected = model(x)
    wrapped = FullyShardedDataParallel(model, auto_wrap_policy=fsdp_auto_wrap_policy(model), **options)
    assert distance(wrapped(x), expected) < 1e-6


@pytest.mark.usefixtures("group")
def test_what_is_missing_in_shards_is_allowed_by_the_switch() -> None:
    model = LORA.adapted(dtype=torch.float32)
    state = {key: value + 1 for key, value in get_peft_model_state_dict(model).items()}
    first, *_ = sorted(state)
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    lacking = {key: value for key, value in state.items() if key != first}
    with pytest.raises(PeanutError, match="a state dict that lacks"):
        set_peft_model_state_dict(wrapped, lacking)
    with pytest.raises(PeanutError, match=r"^ignore_mismatched_sizes=True for a model in FSDP"):
        set_peft_model_state_dict(wrapped, state, ignore_mismatched_sizes=True)
    before = get_peft_model_state_dict(wrapped)[first].clone()
    with pytest.warns(UserWarning, match="^the state dict lacks .*: what it lacks stays as it is here$"):
        found = set_peft_model_state_dict(wrapped, lacking, strict=False)
    after = get_peft_model_state_dict(wrapped)
    assert len(found.missing_keys) == 1
    assert torch.equal(after[first], before)
    assert all(torch.equal(after[key], value) for key, value in lacking.items())
