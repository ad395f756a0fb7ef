"""PEANuT and LoRA."""

from . import Variant

VARIANTS = {
    "PEANUT": [
        Variant("depth 0", {"r": 3, "scaling": 0.5}),
        Variant("depth 1", {"r": 3, "depth": 1, "act_fn": "gelu"}),
        Variant("depth 2", {"r": 3, "depth": 2, "act_fn": "silu"}),
        Variant("side in", {"r": 3, "depth": 1, "side": "in", "act_fn": "tanh"}, peer=False),
        Variant("sine", {"r": 3, "side": "in", "act_fn": "sine"}, peer=False),
        Variant("side auto", {"r": 3, "side": "auto", "act_fn": "gelu"}, peer=False),
        Variant("random", {"r": 3, "init_weights": False}, silent=False),
        Variant("dropout", {"r": 3, "dropout": 0.25, "act_fn": "tanh"}, peer=False),
        Variant("rank pattern", {"r": 3, "rank_pattern": {"lay..": 2}}, peer=False),
    ],
    "LORA": [
        Variant("plain", {"r": 3, "lora_alpha": 6}),
        Variant("rslora", {"r": 4, "use_rslora": True}),
        Variant("lora_bias", {"r": 3, "lora_bias": True}, kinds=("linear", "conv1d", "conv")),
        Variant("lora_bias", {"r": 3, "lora_bias": True}, peer=False, kinds=("embedding",)),
        Variant("lora_only", {"r": 3, "bias": "lora_only"}),
        Variant("gaussian", {"r": 3, "init_lora_weights": "gaussian"}),
        Variant("random", {"r": 3, "init_lora_weights": False}, silent=False),
        Variant("dropout", {"r": 3, "lora_dropout": 0.25}),
        Variant("patterns", {"r": 3, "rank_pattern": {"layer": 2}, "alpha_pattern": {"l.*r": 5}}),
        Variant("dora", {"r": 3, "use_dora": True}),
        Variant("dora, dropout", {"r": 3, "use_dora": True, "lora_dropout": 0.25}),
        # The peer starts these on linear layers alone, and OLoRA on no Conv1D.
        Variant("pissa", {"r": 3, "lora_alpha": 6, "init_lora_weights": "pissa"}, kinds=("linear", "conv1d")),
        Variant("pissa", {"r": 3, "init_lora_weights": "pissa"}, peer=False, kinds=("conv", "embedding")),
        Variant("pissa by iterations", {"r": 3, "init_lora_weights": "pissa_niter_4"}, peer=False),
        Variant(
            "pissa, patterns",
            {"r": 3, "init_lora_weights": "pissa", "rank_pattern": {"layer": 2}, "alpha_pattern": {"layer": 5}},
            kinds=("linear",),
        ),
        Variant("olora", {"r": 3, "init_lora_weights": "olora"}, kinds=("linear",)),
        Variant("olora", {"r": 3, "init_lora_weights": "olora"}, peer=False, kinds=("conv1d", "conv", "embedding")),
        Variant("milora", {"r": 3, "use_rslora": True, "init_lora_weights": "milora"}, peer=False),
        Variant("dora from pissa", {"r": 3, "use_dora": True, "init_lora_weights": "pissa"}, kinds=("linear",)),
    ],
}
PEER = {"PEANUT": ("linear",), "LORA": ("linear", "conv1d", "conv", "embedding")}
