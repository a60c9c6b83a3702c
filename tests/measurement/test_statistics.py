"""Each statistic of a step against its definition, written out on the side."""

import numpy as np
import pytest
import torch
from conftest import PARITY, write_olmo

from simlab.checkpoints.checkpoint import Checkpoint
from simlab.measurement.block_probe import Reducer
from simlab.measurement.engine import measure_curves
from simlab.measurement.statistics import REDUCE, STATISTICS, Step, attention_statistics, dot

CPU = torch.device("cpu")
SINGLE = 1e-6  # some ten roundings of float32, in which these two are computed


def stream(b=3, t=7, d=40, seed=0):
    """Tokens of different size and direction, some entries huge."""
    x = torch.randn(b, t, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * torch.logspace(-1, 1, t, dtype=torch.float64)[:, None] + 0.3
    x[0, 2, 5] = 500.0
    return x.float().double()  # as the probe widens it


def value(name, step):
    reducer = Reducer({name: STATISTICS[name]})
    reducer.add(step)
    return reducer.result().item()


def test_spread_over_tokens():
    x = stream()
    v = x.pow(2).mean(-1).numpy()
    expected = {
        "mean_square": v.mean(),
        "mean_square_median": np.median(v),
        "mean_square_p05": np.percentile(v, 5),
        "mean_square_p95": np.percentile(v, 95),
        "mean_square_first": v[:, 0].mean(),
        "mean_square_rest": v[:, 1:].mean(),
        "mean_square_max": v.max(),
        "max_token": v.argmax(),
    }
    for name, truth in expected.items():
        assert value(name, Step(after=x)) == pytest.approx(truth, rel=1e-12), name
    assert np.isnan(value("mean_square_rest", Step(after=x[:, :1])))


def test_alike_tokens_are_a_tie():
    """Of tokens that differ by rounding the first is named; a larger one further back is not missed."""
    x = torch.ones(3, 4, 8, dtype=torch.float64)
    x[1:, 0] = 50 * torch.tensor([1, 1 + 1e-7], dtype=torch.float64)[:, None]
    assert value("max_token", Step(after=x)) == 4
    x[2, 3] = 50.1
    assert value("max_token", Step(after=x)) == 11


@pytest.mark.parametrize("d", [39, 40])
def test_the_median_entry(d):
    """Over all tokens and entries by hand; of an even number of entries the upper middle one."""
    x = stream(d=d)
    per_token = np.sort(x.abs().numpy(), axis=-1)[..., d // 2]
    assert value("median_abs", Step(after=x)) == np.median(per_token)


def test_kurtosis():
    x = stream()
    by_hand = x.pow(4).mean(-1) / x.pow(2).mean(-1).pow(2)
    assert value("kurtosis", Step(after=x)) == pytest.approx(by_hand.mean().item(), rel=SINGLE)
    spike = torch.zeros(1, 3, 40, dtype=torch.float64)
    spike[..., 7] = -2.0
    assert value("kurtosis", Step(after=spike)) == pytest.approx(40)


def test_cosine_between_tokens():
    x = stream()
    pairs = torch.cosine_similarity(x[:, :, None], x[:, None], dim=-1)
    off = ~torch.eye(x.shape[1], dtype=torch.bool)
    by_hand = pairs[:, off].mean()
    assert value("token_cosine", Step(after=x)) == pytest.approx(by_hand.item(), rel=SINGLE)
    same = x[:, :1].expand(-1, 5, -1)
    assert value("token_cosine", Step(after=same)) == pytest.approx(1)
    assert np.isnan(value("token_cosine", Step(after=x[:, :1])))


def test_gains():
    g = torch.tensor([1.0, -3.0, 0.5, 0.0], dtype=torch.float64)
    step = Step(after=stream()[..., :4], gain=g)
    assert value("gain_mean_square", step) == pytest.approx(10.25 / 4)
    assert value("gain_max_abs", step) == 3.0


def test_statistics_do_not_depend_on_batches():
    """What is reduced is the whole batch, however many sequences pass at a time."""
    x = stream(b=5)
    for name, statistic in STATISTICS.items():
        together, apart = Reducer({name: statistic}), Reducer({name: statistic})
        together.add(Step(after=x))
        for part in x.split(2):
            apart.add(Step(after=part))
        np.testing.assert_allclose(apart.result(), together.result(), rtol=SINGLE, err_msg=name)
    assert {s.reduce for s in STATISTICS.values()} <= REDUCE.keys() | {"vector"}


def eager(tmp_path, **changes):
    """transformers' own attention weights, asked for as such."""
    reference = write_olmo(tmp_path / "m", **changes)
    reference.set_attn_implementation("eager")
    ids = torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return ids, reference(ids, output_attentions=True).attentions


@pytest.mark.parametrize("window", [None, 5])
def test_attention_statistics_match_transformers(tmp_path, window):
    """Entropy and the weight on position 0, at every layer, grouped heads, with a window too."""
    kinds = ["sliding_attention", "full_attention", *["sliding_attention"] * 3]
    changes = {"kind": "Olmo3", "sliding_window": window, "layer_types": kinds} if window else {}
    ids, weights = eager(tmp_path, **changes)
    rows = measure_curves(Checkpoint(str(tmp_path / "m")), ids, CPU, torch.float32)[0].rows
    measured = [dict(zip(STATISTICS, row.values.tolist(), strict=True)) for row in rows]
    assert all(np.isnan(row["attention_entropy"]) for row in measured[0::2])  # embedding and MLPs
    for row, a in zip(measured[1::2], weights, strict=True):
        a = a.double()
        entropy = -(a * a.clamp_min(1e-300).log()).sum(-1)
        assert row["attention_entropy"] == pytest.approx(entropy.mean().item(), **tolerance())
        assert row["attention_first"] == pytest.approx(a[:, :, 1:, 0].mean().item(), **tolerance())


def tolerance():
    """PARITY, as pytest.approx spells it."""
    return {"rel": PARITY["rtol"], "abs": PARITY["atol"]}


def test_the_largest_logit(monkeypatch):
    """Against QKᵀ/√C by hand, and some heads at a time."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 6, 9, 8, generator=generator) for _ in range(2))
    logits = torch.einsum("bhtc,bhsc->bhts", q, k) / 8**0.5
    seen = torch.ones(9, 9).tril().bool()
    expected = logits.masked_fill(~seen, -torch.inf).amax((1, 3))
    whole = attention_statistics(q, k, None)
    torch.testing.assert_close(whole["max_logit"], expected)
    monkeypatch.setattr("simlab.measurement.statistics.HEADS_AT_ONCE", 2 * 2 * 81)
    for name, values in attention_statistics(q, k, None).items():
        torch.testing.assert_close(values, whole[name])
    assert torch.equal(whole["first"][:, 0], torch.ones(2))
    alike = attention_statistics(torch.zeros_like(q), k, None)
    torch.testing.assert_close(alike["entropy"][0], torch.arange(1, 10).float().log())


def test_dot_does_not_warn_of_overflow():
    """The curve does; NumPy's warning would stand between a run's lines."""
    x = torch.tensor([[torch.inf, 1.0], [3e38, 3e38], [1.0, 2.0]])
    y = torch.tensor([[0.0, 1.0], [3e38, 3e38], [3.0, 4.0]])
    expected = torch.tensor([torch.nan, torch.inf, 11.0])
    torch.testing.assert_close(dot(x, y), expected, equal_nan=True)
