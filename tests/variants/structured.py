"""Methods whose update has a structure of its own: spectra, circulant and repeated blocks, few entries, few rows."""

from . import Variant

MATRICES = ("linear", "conv1d")

VARIANTS = {
    "FOURIERFT": [
        Variant("plain", {"n_frequency": 20, "scaling": 200.0, "init_weights": True}),
        Variant("random", {"n_frequency": 30, "scaling": 100.0}, silent=False),
        Variant("seeded", {"n_frequency": 40, "scaling": 200.0, "random_loc_seed": 5, "init_weights": True}),
        Variant("every entry", {"n_frequency": 240, "init_weights": True}, kinds=MATRICES),
        Variant("fourier_only", {"n_frequency": 20, "bias": "fourier_only", "init_weights": True}, kinds=MATRICES),
        Variant("pattern", {"n_frequency": 999, "n_frequency_pattern": {"layer": 25}, "init_weights": True}),
    ],
    "C3A": [
        Variant("pairs", {"block_size": 2, "init_weights": True}, kinds=MATRICES),
        Variant("kernels", {"block_size": 1, "init_weights": "gaussian"}, silent=False, kinds=("conv", "embedding")),
        Variant("pairs of a kernel", {"block_size": 2, "init_weights": "gaussian"}, silent=False, kinds=("conv",)),
        Variant("fours", {"block_size": 4, "init_weights": "gaussian"}, silent=False, kinds=MATRICES),
        Variant("random", {"block_size": 4, "init_weights": "kaiming_uniform"}, silent=False, kinds=MATRICES),
        Variant("c3a_only", {"block_size": 4, "bias": "c3a_only", "init_weights": True}, kinds=MATRICES),
        Variant("pattern", {"block_size_pattern": {"layer": 2}, "init_weights": True}, kinds=MATRICES),
    ],
    "MISS": [
        Variant("plain", {"r": 4}),
        Variant("cut short", {"r": 5}),
        Variant("random", {"r": 3, "init_weights": False}, silent=False),
        Variant("mini", {"r": 4, "mini_r": 2, "init_weights": "mini"}),
        Variant("bat", {"r": 4, "init_weights": "bat"}, kinds=MATRICES),
        Variant("bat kernels", {"r": 2, "init_weights": "bat"}, kinds=("conv",)),
        Variant("dropout", {"r": 4, "miss_dropout": 0.25}),
        Variant("MiSS_only", {"r": 4, "bias": "MiSS_only"}, kinds=MATRICES),
    ],
    "BONE": [
        Variant("plain", {"r": 4}, peer=False),
        Variant("random", {"r": 4, "init_weights": False}, silent=False, peer=False),
        Variant("bat", {"r": 4, "init_weights": "bat"}, peer=False, kinds=MATRICES),
        Variant("bone_only", {"r": 4, "bias": "bone_only"}, peer=False, kinds=MATRICES),
    ],
    "SHIRA": [
        Variant("plain", {"r": 1}),
        Variant("seeded", {"r": 2, "random_seed": 5}),
        Variant("random", {"r": 1, "init_weights": False}, silent=False),
    ],
    "DIFF_PRUNING": [
        Variant("plain", {"init_log_alpha": 0.5}, peer=False),
    ],
    "TRAINABLE_TOKENS": [
        Variant("plain", {"token_indices": [1, 0, 6, 2]}),
        Variant("random", {"token_indices": [0, 1, 2, 5], "init_weights": False}, silent=False),
    ],
}
PEER: dict[str, tuple[str, ...]] = {
    "FOURIERFT": MATRICES,
    "C3A": ("linear",),
    "MISS": ("linear",),
    "SHIRA": ("linear",),
    "TRAINABLE_TOKENS": ("embedding",),
}
