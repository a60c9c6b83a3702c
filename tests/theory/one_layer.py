"""One sublayer's random inits, drawn many times: what theory's kernels of it are held against."""

import numpy as np
import torch

WIDTH, TOKENS = 128, 6


def tokens():
    """Tokens of mean square 1 and many correlations, two of them equal (N, d)."""
    normals = np.random.default_rng(1).standard_normal((TOKENS, WIDTH))
    x = normals + np.array([2.0, 2.0, 0.7, 0.0, -0.7, 0.0])[:, None] * normals[5]
    x[1] = x[0]
    return x / np.sqrt((x**2).mean(1, keepdims=True))


def drawn(sublayer, stds, draws, x, g):
    """Gram matrices over d (draws, N, N) of a sublayer's outputs at x, and of its gradients from g.

    stds: of its matrices, by role.
    """
    torch.manual_seed(0)
    outputs, gradients = [], []
    given = torch.tensor(x, dtype=torch.float32)[None].requires_grad_()
    up = torch.tensor(g, dtype=torch.float32)[None]
    for _ in range(draws):
        for name, parameter in sublayer.named_parameters():
            torch.nn.init.normal_(parameter, std=stds[name.split(".")[-2]])
        out = sublayer(given)
        (back,) = torch.autograd.grad(out, given, up)
        for vector, grams in ((out, outputs), (back, gradients)):
            v = vector[0].detach().double().numpy()
            grams.append(v @ v.T / WIDTH)
    return np.array(outputs), np.array(gradients)


def off(grams, predicted):
    """The largest deviation of a predicted mean, in standard errors."""
    error = grams.std(0, ddof=1) / np.sqrt(len(grams))
    return np.abs((grams.mean(0) - predicted) / error).max()
