"""AdaLoRA, and the two ablations of PEANuT."""

from . import Variant

VARIANTS = {
    "ADALORA": [
        Variant("plain", {"init_r": 4, "target_r": 2, "total_step": 10}),
        Variant("alpha", {"init_r": 4, "target_r": 2, "total_step": 10, "lora_alpha": 0, "orth_reg_weight": 0.0}),
        Variant("random", {"init_r": 3, "target_r": 2, "total_step": 10, "init_lora_weights": False}, silent=False),
        Variant("dropout", {"init_r": 4, "target_r": 2, "total_step": 10, "lora_dropout": 0.25}),
    ],
    "NONLINEAR_LORA": [
        Variant("gelu", {"r": 3, "act_fn": "gelu", "scaling": 0.5}),
        Variant("sine", {"r": 3, "act_fn": "sine"}),
        Variant("random", {"r": 3, "act_fn": "tanh", "init_weights": False}, silent=False),
        Variant("dropout", {"r": 3, "act_fn": "tanh", "dropout": 0.25, "rank_pattern": {"lay..": 2}}),
    ],
    "MULTIPLICATIVE_LORA": [
        Variant("plain", {"r": 3, "scaling": 0.5}),
        Variant("random", {"r": 3, "init_weights": False}, silent=False),
        Variant("dropout", {"r": 3, "dropout": 0.25, "rank_pattern": {"lay..": 2}}),
    ],
}
PEER = {"ADALORA": ("linear", "conv1d", "conv")}
