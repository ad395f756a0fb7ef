"""The reference values: their models load here, and each adapter moves the output."""

from __future__ import annotations

import pytest
import torch

from ..support import distance, one_thread  # noqa: F401
from .reading import NAMES, load


def test_there_are_references_of_both_packages() -> None:
    assert {name.split("_")[0] for name in NAMES} == {"adapters", "pyreft"}


@pytest.mark.parametrize("name", NAMES)
def test_base_model(name: str) -> None:
    """Our transformers computes what theirs did, so a difference later is the adapter's."""
    reference = load(name)
    with torch.no_grad():
        output = reference.base_model()(**reference.call())
    plain = reference.compared(output.logits if "logits" in output else output.last_hidden_state)
    assert distance(plain, reference.compared(reference.outputs["plain"])) < 1e-6
    assert distance(reference.compared(reference.outputs["adapted"]), plain) > 0.1
