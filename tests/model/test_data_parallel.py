"""torch.nn.DataParallel copies a model without its adapters' ways to their tensors, so it is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import transformers as hf

from peanut import LoraConfig, PeftConfig, get_peft_model
from peanut.methods.bottleneck import BottleneckConfig
from peanut.methods.prompt_tuning import PromptTuningConfig

from ..support import one_thread, refused  # noqa: F401

Builder = Callable[..., hf.PreTrainedModel]


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=2), BottleneckConfig(bottleneck_size=2), PromptTuningConfig(num_virtual_tokens=2)],
    ids=["weight", "output", "input"],
)
def test_a_replica_is_refused(tiny_llama: Builder, config: PeftConfig) -> None:
    model = get_peft_model(tiny_llama(), config)
    with refused(model, r"DataParallel.*torchrun"):
        for module in model.modules():  # as torch.nn.parallel.replicate does, which needs a GPU
            module._replicate_for_data_parallel()
    for module in model.unload().modules():
        module._replicate_for_data_parallel()
