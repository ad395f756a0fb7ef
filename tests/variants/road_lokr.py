"""RoAd and LoKr."""

from . import Variant

VARIANTS = {
    "ROAD": [
        Variant("road_1", {"group_size": 2}),
        Variant("groups of 4", {"group_size": 4}),
        Variant("road_2", {"group_size": 2, "variant": "road_2"}),
        Variant("road_4", {"group_size": 2, "variant": "road_4"}),
        Variant("random", {"group_size": 2, "variant": "road_4", "init_weights": False}, silent=False),
    ],
    "LOKR": [
        Variant("plain", {"r": 1, "alpha": 2}),
        Variant("both of rank r", {"r": 1, "decompose_both": True}),
        Variant("full rank", {"r": 8}),
        Variant("factor", {"r": 1, "decompose_factor": 2}),
        Variant("kernels apart", {"r": 1, "use_effective_conv2d": True}, kinds=("conv",)),
        Variant("lycoris", {"r": 1, "init_weights": "lycoris"}),
        Variant("random", {"r": 1, "init_weights": False}, silent=False),
        Variant("dropout", {"r": 1, "rank_dropout": 0.25, "rank_dropout_scale": True}),
        Variant("patterns", {"r": 4, "rank_pattern": {"lay..": 1}, "alpha_pattern": {"layer": 3}}),
    ],
}
PEER = {"ROAD": ("linear",), "LOKR": ("linear", "conv")}
