"""The weightless engine's normals: moments, tails, independence, and the generator's contract."""

import math

import numpy as np
import torch
from conftest import STANDARD_ERRORS

from simlab.weights.rng import NORMALS_PIECE, draw_normals

COUNT = 60 * NORMALS_PIECE  # 3.9 million


def sample(entropy=3):
    out = torch.empty(COUNT)
    for i, part in enumerate(out.split(NORMALS_PIECE)):
        draw_normals(part[None], [entropy], i)
    return out.double()


def test_moments():
    """Mean, variance, skewness, kurtosis and the sixth moment, to five standard errors."""
    z = sample()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        error = math.sqrt(variance / COUNT)
        assert abs(z.pow(power).mean().item() - mean) < STANDARD_ERRORS * error, power


def test_tails_on_both_sides():
    z = sample()
    for edge in (0.01, 0.5, 1, 2, 3, 4, 4.5):
        expected = COUNT * math.erfc(edge / math.sqrt(2)) / 2
        for beyond in ((z > edge).sum().item(), (z < -edge).sum().item()):
            assert abs(beyond - expected) < STANDARD_ERRORS * math.sqrt(expected), edge
    assert z.isfinite().all()
    assert z.abs().max() < math.sqrt(64 * math.log(2))


def test_the_distribution_function():
    """Kolmogorov and Smirnov: √n·sup|F_n − Φ| passes 2.23 in 1 of 10,000 runs. A 1 % σ is caught."""
    z = np.sort(sample().numpy())
    phi = 0.5 * (1 + torch.erf(torch.from_numpy(z) / math.sqrt(2)).numpy())
    rank = np.arange(1, COUNT + 1) / COUNT
    assert math.sqrt(COUNT) * np.abs(rank - phi).max() < 2.23
    wide = 0.5 * (1 + torch.erf(torch.from_numpy(1.01 * z) / math.sqrt(2)).numpy())
    assert math.sqrt(COUNT) * np.abs(rank - wide).max() > 2.23


def test_pairs_of_normals_are_independent():
    """The cosine's and the sine's z: products, products of squares; neighbours; other pieces."""
    z = sample().view(-1, NORMALS_PIECE)
    first, second = z[:, : NORMALS_PIECE // 2].flatten(), z[:, NORMALS_PIECE // 2 :].flatten()
    assert abs((first * second).mean()) < STANDARD_ERRORS / math.sqrt(len(first))
    squares = (first.square() - 1) * (second.square() - 1)
    assert abs(squares.mean()) < STANDARD_ERRORS * 2 / math.sqrt(len(first))
    flat = z.flatten()
    assert abs((flat[1:] * flat[:-1]).mean()) < STANDARD_ERRORS / math.sqrt(COUNT)
    assert abs((z[0] * z[1]).mean()) < STANDARD_ERRORS / math.sqrt(NORMALS_PIECE)
    assert abs(
        (sample(3)[:NORMALS_PIECE] * sample(4)[:NORMALS_PIECE]).mean()
    ) < STANDARD_ERRORS / math.sqrt(NORMALS_PIECE)


def test_lengths_and_repeats():
    """Any length up to a piece; the same (entropy, piece), the same numbers, from the first on."""
    whole = torch.empty(NORMALS_PIECE)
    draw_normals(whole[None], [9], 4)
    for count in (1, 2, 1001, NORMALS_PIECE // 2, NORMALS_PIECE // 2 + 1, NORMALS_PIECE):
        part = torch.full((count,), torch.nan)
        draw_normals(part[None], [9], 4)
        assert torch.equal(part, whole[:count])
    assert len(whole.unique()) > 0.99 * NORMALS_PIECE


def test_several_at_once():
    """Rows are what their seeds give alone, also in a part of a larger tensor."""
    for count in (1001, NORMALS_PIECE // 2 + 8, NORMALS_PIECE):
        out = torch.full((3, NORMALS_PIECE + 8), torch.nan)
        draw_normals(out[:, 8 : 8 + count], [9, 2, 5], 4)
        for row, entropy in zip(out[:, 8 : 8 + count], (9, 2, 5), strict=True):
            alone = torch.empty(1, count)
            draw_normals(alone, [entropy], 4)
            assert torch.equal(row, alone[0])
        assert out[:, :8].isnan().all()
        assert out[:, 8 + count :].isnan().all()
