"""Methods whose layers share random matrices or a bank of vectors, and variational LoRA."""

from . import Variant

DENSE = ("linear", "conv1d")

VARIANTS = {
    "VERA": [
        Variant("plain", {"r": 5, "d_initial": 0.5}),
        Variant("from the seed", {"r": 3, "projection_prng_key": 7, "save_projection": False}),
        Variant("more than full rank", {"r": 16}),
        Variant("random", {"r": 5, "init_weights": False}, silent=False),
        Variant("vera_only", {"r": 5, "bias": "vera_only"}),
        Variant("dropout", {"r": 5, "vera_dropout": 0.25}),
    ],
    "RANDLORA": [
        Variant("plain", {"r": 3, "randlora_alpha": 2}),
        Variant("from the seed", {"r": 4, "randlora_alpha": 2, "projection_prng_key": 7, "save_projection": False}),
        Variant("sparse", {"r": 5, "randlora_alpha": 2, "sparse": True}),
        Variant("very sparse", {"r": 5, "randlora_alpha": 2, "very_sparse": True}),
        Variant("one basis", {"r": 16, "randlora_alpha": 4}),
        Variant("random", {"r": 3, "randlora_alpha": 2, "init_weights": False}, silent=False),
        Variant("dropout", {"r": 3, "randlora_alpha": 2, "randlora_dropout": 0.25}),
    ],
    "VBLORA": [
        Variant(
            "plain",
            {"r": 3, "num_vectors": 6, "init_vector_bank_bound": 1, "vector_length": 4},
            silent=False,
            kinds=DENSE,
        ),
        Variant(
            "kernels",
            {"r": 3, "num_vectors": 6, "init_vector_bank_bound": 1, "vector_length": 1},
            silent=False,
            kinds=("conv",),
        ),
        Variant(
            "all", {"r": 3, "num_vectors": 6, "init_vector_bank_bound": 1, "vector_length": 2, "topk": 6}, silent=False
        ),
        Variant(
            "dropout",
            {"r": 3, "num_vectors": 6, "init_vector_bank_bound": 1, "vector_length": 4, "vblora_dropout": 0.25},
            silent=False,
            kinds=DENSE,
        ),
    ],
    "VARIATIONAL_LORA": [
        Variant("plain", {"vb_r": 3}),
        Variant("data", {"vb_r": 3, "vb_pi": 1, "vb_beta": 0.5, "num_data": 100, "use_rslora": True}),
        Variant("no penalty", {"vb_r": 3, "vb_beta": 0}),
        Variant("dropout", {"vb_r": 3, "lora_dropout": 0.25}),
        Variant("patterns", {"vb_r": 3, "rank_pattern": {"layer": 2}, "alpha_pattern": {"l.*r": 5}}),
    ],
}
PEER = {"VERA": DENSE, "RANDLORA": DENSE, "VBLORA": DENSE}
