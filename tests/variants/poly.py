"""Poly with one task: the laws name none."""

from . import Variant

VARIANTS = {
    "POLY": [
        Variant("plain", {"r": 3, "n_skills": 3}),
        Variant("splits", {"r": 3, "n_skills": 2, "n_splits": 2}),
        Variant("random", {"r": 2, "init_weights": False}, silent=False),
    ]
}
PEER: dict[str, tuple[str, ...]] = {}  # it wants task_ids in every call: see tests/methods/test_poly.py
