"""Predictions averaged over samples of a random adapter, with their standard deviation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.adapter_set import AdapterSet

__all__ = ["Prediction", "predictive"]


@dataclass(frozen=True)
class Prediction:
    """The predictive distribution, estimated from draws.

    Args:
        mean: mean of the probabilities, (…, classes).
        deviation: their standard deviation over the draws, same shape.
    """

    mean: Tensor
    deviation: Tensor


@torch.no_grad()
def predictive(model: nn.Module, samples: int = 16, **inputs: Any) -> Prediction:
    """What a model with a random adapter (variational LoRA, say) predicts: E[softmax(logits)] and its deviation.

    Args:
        model: a model that returns logits; it stays in the mode that it is in, so call ``eval()`` first.
    """
    state = AdapterSet.of(model).state
    total = squares = torch.zeros(())
    with state.during(sampling=True):
        for _ in range(samples):
            chances = model(**inputs).logits.double().softmax(-1)
            total, squares = total + chances.cpu(), squares + chances.cpu().square()
    mean = total / samples
    spread = (squares / samples - mean.square()).clamp_min(0) * (samples / max(samples - 1, 1))
    return Prediction(mean.float(), spread.sqrt().float())
