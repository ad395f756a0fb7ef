"""The walk over a model's modules that loading takes."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf

from peanut import LoraConfig, get_peft_model
from peanut.methods.bottleneck import BottleneckConfig
from peanut.model.layers.adapted import Adapted, walk
from peanut.model.layers.by_adapter import ByAdapter

from ...support import one_thread  # noqa: F401


def test_in_the_order_of_modules_and_past_what_adapters_keep(tiny_llama: Callable[..., hf.PreTrainedModel]) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"]))
    model.add_adapter("output", BottleneckConfig(bottleneck_size=2))
    kept = {
        id(inner)
        for place in model.modules()
        if isinstance(place, Adapted)
        for holder in place.children()
        if isinstance(holder, ByAdapter)
        for inner in holder.modules()
    }
    assert kept
    assert [id(module) for module in walk(model)] == [id(each) for each in model.modules() if id(each) not in kept]
