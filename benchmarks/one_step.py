"""``python -m benchmarks.one_step``: whether this Python, torch and transformers train a step, save and load."""

from __future__ import annotations

import platform
import tempfile
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from peanut import LoraConfig, PeanutConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peanut.protocols import PeftConfig

__all__ = ["main"]

IDS = torch.arange(20).view(2, 10)


def main() -> int:
    """Prints the versions and whether they work; the exit status."""
    configs = LoraConfig(), PeanutConfig(), PrefixTuningConfig(num_virtual_tokens=4)
    works = all(map(_works, configs))
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(versions, "train, save and load" if works else "do NOT train, save and load as they should")
    return 0 if works else 1


def _base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=101, **sizes))


def _works(config: PeftConfig) -> bool:
    """Whether three steps lower the loss, and the saved adapter answers bit for bit the same."""
    model = get_peft_model(_base(), config).train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(_base(), folder).eval()
        same = torch.equal(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
    return same and losses[-1] < losses[0]


if __name__ == "__main__":
    raise SystemExit(main())
