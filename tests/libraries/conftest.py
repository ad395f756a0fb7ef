"""What tests with other libraries share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import peanut


@pytest.fixture(scope="module")
def installed() -> Iterator[None]:
    peanut.install()
    yield
    peanut.uninstall()
