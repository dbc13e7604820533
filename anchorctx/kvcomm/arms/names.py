"""The names of the arms, apart from their code, so that a configuration can name them without torch."""

ARMS = (
    "dense",
    "dense_prefix_cache",
    "naive",
    "rotate",
    "rotate_glue",
    "kvcomm",
    "kvcomm_ungated",
    "mean_offset",
    "anchored",
)
"""Ways to reuse."""
CONTROLS = ("dense_chunked", "zeroed", "random", "other_request")
"""The numerics floor, and what an arm must beat."""
