"""What a page can draw: the columns of curve.csv with their labels and axes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """A quantity by depth. label: with its symbol or unit. group: its heading. log: its axis."""

    label: str
    group: str
    log: bool = False


BY_SUBLAYER = {  # a column of curve.csv, or rms: the root of mean_square
    "mean_square": Quantity("mean square of x", "Size"),
    "rms": Quantity("rms of x: the root of its mean square", "Size"),
    "norm": Quantity("norm ‖x‖, mean over tokens", "Size"),
    "variance": Quantity("variance of x over its entries", "Size"),
    "mean": Quantity("mean of x", "Size"),
    "mean_abs": Quantity("mean |x|", "Size"),
    "median_abs": Quantity("median |x|", "Size"),
    "max_abs": Quantity("largest |x|", "Size", log=True),
    "mean_vector_norm": Quantity("norm of the tokens' mean vector", "Size"),
    "kurtosis": Quantity("kurtosis of x (Gaussian: 3)", "Size", log=True),
    "gradient_rms": Quantity("gradient with respect to x, rms", "Gradients", log=True),
    "gradient_norm": Quantity("gradient norm, mean over tokens", "Gradients", log=True),
    "gradient_mean_vector_norm": Quantity("norm of the mean gradient", "Gradients", log=True),
    "gradient_cosine": Quantity("cosine of x and its gradient", "Gradients"),
    "read_mean_square": Quantity(
        "what a sublayer reads, mean square", "What a sublayer reads and adds"
    ),
    "branch_mean_square": Quantity(
        "what a sublayer adds, mean square", "What a sublayer reads and adds"
    ),
    "branch_raw_mean_square": Quantity(
        "a sublayer's output before its norm, mean square",
        "What a sublayer reads and adds",
        log=True,
    ),
    "cosine": Quantity("cosine of x and what is added", "What a sublayer reads and adds"),
    "delta_branch": Quantity("‖b‖² of what is added", "What a sublayer reads and adds"),
    "delta_cross": Quantity(
        "2⟨x, b⟩ of stream and what is added", "What a sublayer reads and adds"
    ),
    "eps_factor": Quantity(
        "m/(m + eps): what eps leaves of a norm", "What a sublayer reads and adds"
    ),
    "mean_square_median": Quantity("mean square of the median token", "Tokens"),
    "mean_square_p05": Quantity("mean square, 5th percentile of tokens", "Tokens"),
    "mean_square_p95": Quantity("mean square, 95th percentile of tokens", "Tokens"),
    "mean_square_first": Quantity("mean square at position 0", "Tokens"),
    "mean_square_rest": Quantity("mean square at positions 1 and on", "Tokens"),
    "mean_square_max": Quantity("mean square of the largest token", "Tokens", log=True),
    "token_cosine": Quantity("cosine between tokens (1: all alike)", "Tokens"),
    "attention_entropy": Quantity("attention entropy, nats", "Attention and norms"),
    "attention_max_logit": Quantity("largest attention logit", "Attention and norms"),
    "attention_first": Quantity("attention to position 0", "Attention and norms"),
    "gain_mean_square": Quantity("the norm's gain, mean square", "Attention and norms"),
    "gain_max_abs": Quantity("the norm's gain, largest", "Attention and norms"),
}
BY_BLOCK = {  # a column of analysis.exponents.per_block; of gradients with _gradient at the end
    "lambda_pairwise": Quantity("λ from the block before: ln(‖xᵢ‖/‖xᵢ₋₁‖)/n", "Growth exponents λ"),
    "lambda_from_first": Quantity("λ from the first block: ln(‖xᵢ‖/‖x₁‖)/n", "Growth exponents λ"),
    "lambda_paper": Quantity("λ of the mean vector, from the first block", "Growth exponents λ"),
    "lambda_pairwise_gradient": Quantity(
        "gradient's λ from the block before", "Growth exponents λ"
    ),
    "lambda_from_first_gradient": Quantity(
        "gradient's λ from the first block", "Growth exponents λ"
    ),
    "lambda_paper_gradient": Quantity(
        "λ of the mean gradient, from the first block", "Growth exponents λ"
    ),
}
DRAWABLE = BY_SUBLAYER | BY_BLOCK
