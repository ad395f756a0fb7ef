"""What the table of Hugging Face PEFT's own tests counts, and the package that hands out ours under its name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from benchmarks.peer_shim import cause_of
from benchmarks.peer_tests import compared, table

CODE = """
import os; os.environ["PEER_TESTS"] = "ours"
import benchmarks.peer_shim, peanut, peft, peft.tuners.lora.layer as layer
from peft.import_utils import is_transformers_ge_v5
assert peft.LoraConfig is peanut.LoraConfig and peft.get_peft_model is peanut.get_peft_model and is_transformers_ge_v5
assert not isinstance(peanut.LoraConfig(), layer.NoSuchLayer)
try:
    import peft.no_such_module
except ImportError:
    print("as it should")
"""


def outcome(what: str, cause: str = "") -> dict[str, Any]:
    return {"outcome": what, "cause": cause}


def test_shares_are_of_what_the_peer_passes_by_methods_that_we_have() -> None:
    peer = {f"tests/test_a.py::{name}": outcome("passed") for name in "abcd"}
    peer["tests/test_a.py::e"] = outcome("failed")
    ours = {
        "tests/test_a.py::a": outcome("passed"),
        "tests/test_a.py::b": outcome("failed", "no method LoHa"),
        "tests/test_a.py::c": outcome("failed", "no attribute x"),
        "tests/test_a.py::e": outcome("passed"),
    }
    found = compared(peer, ours)
    assert found["files"] == {"test_a.py": {"peer passes": 4, "we pass": 1, "methods and variants that we have not": 1}}
    assert found["causes"] == {"no attribute x": 1, "not collected": 1}
    text = table(found)
    assert "| test_a.py | 4 | 1 | 1 | 33.3% |" in text
    assert "| all | 4 | 1 | 1 | 33.3% |" in text
    assert "| methods and variants that we have not | 1 |" in text
    assert "| no method LoHa |" not in text
    assert "| no attribute x | 1 |" in text


@pytest.mark.parametrize(
    ("error", "absent", "expected"),
    [
        (TypeError("f() got an unexpected keyword argument 'mixed'"), [], "no argument mixed"),
        (AttributeError("'LoraModel' object has no attribute 'peft_type'"), [], "no attribute peft_type"),
        (ValueError("x"), ["PeftMixedModel"], "no name PeftMixedModel"),
        (AssertionError("Regex pattern did not match.\n more"), [], "other words of an error"),
        (ValueError("x"), ["LoHaModel", "LoHaConfig"], "no method LoHa"),
        (ValueError("'/a/b' has 3 rows, not 4.5"), [], "ValueError: … has N rows, not N"),
    ],
)
def test_causes(error: Exception, absent: list[str], expected: str) -> None:
    assert cause_of(error, absent) == expected


def test_a_package_of_that_name_hands_out_ours() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.stdout == "as it should\n", done.stderr
