"""OFT, BOFT and HRA."""

from . import Variant

VARIANTS = {
    "OFT": [
        Variant("three blocks", {"r": 3}),
        Variant("blocks of 4", {"oft_block_size": 4}),
        Variant("as the peer", {"oft_block_size": 4, "use_cayley_neumann": True}),
        Variant("shared", {"oft_block_size": 2, "block_share": True}),
        Variant("held", {"oft_block_size": 4, "coft": True, "eps": 0.5}),
        Variant("dropout", {"oft_block_size": 4, "module_dropout": 0.25}, peer=False),
        Variant("oft_only", {"oft_block_size": 4, "bias": "oft_only"}),
        Variant("random", {"oft_block_size": 4, "init_weights": False}, silent=False),
    ],
    "BOFT": [
        Variant("three blocks", {"boft_block_size": 0, "boft_block_num": 3}),
        Variant("blocks of 2", {"boft_block_size": 2}),
        Variant("butterfly", {"boft_block_size": 2, "boft_n_butterfly_factor": 2}, peer=False),
        Variant("dropout", {"boft_block_size": 4, "boft_dropout": 0.25}, peer=False),
        Variant("boft_only", {"boft_block_size": 4, "bias": "boft_only"}),
        Variant("random", {"boft_block_size": 4, "init_weights": False}, silent=False),
    ],
    "HRA": [
        Variant("pairs", {"r": 4}),
        Variant("odd", {"r": 3}, silent=False, peer=False),
        Variant("orthogonal", {"r": 4, "apply_GS": True}, silent=False),
        Variant("hra_only", {"r": 2, "bias": "hra_only"}),
        Variant("random", {"r": 4, "init_weights": False}, silent=False),
        Variant("rank pattern", {"r": 3, "rank_pattern": {"lay..": 2}}, peer=False),
    ],
}
PEER = {"OFT": ("linear",), "BOFT": ("linear",), "HRA": ("linear",)}
