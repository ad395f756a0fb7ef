"""(IA)³, RED, BitFit and LayerNorm tuning."""

from . import Variant

VARIANTS = {
    "IA3": [
        Variant("output", {"feedforward_modules": []}),
        Variant("input", {"feedforward_modules": ["layer"]}),
        Variant("random", {"feedforward_modules": ".*yer", "init_ia3_weights": False}, silent=False),
    ],
    "RED": [Variant("plain"), Variant("random", {"init_weights": False}, silent=False)],
    "BITFIT": [Variant("plain")],
    "LN_TUNING": [Variant("plain")],
}
PEER = {"IA3": ("linear", "conv1d", "conv"), "LN_TUNING": ("norm", "linear", "conv1d", "conv", "embedding")}
