"""Several residual streams at a time: measured by block as if they were sequences, or refused."""

import pytest
import torch
from families import tiny
from test_gradients import agree, expected
from torch import nn

from simlab import ConfigError, Layout, Sublayer, probe

AXIS = {"gemma3n_text": 0, "deepseek_v4": 2}  # (n, B, T, D) and (B, T, n, D)
IDS = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(0))


def alone(x, axis):
    """Several streams (B·n, T, D), sequence by sequence, each with its n streams."""
    batch = x.shape[1 if axis == 0 else 0]
    of = {0: lambda b: x[:, b], 1: lambda b: x[b], 2: lambda b: x[b].transpose(0, 1)}
    return torch.cat([of[axis](b) for b in range(batch)])


def by_autograd(model, ids, axis):
    """What the first block gets and each block gives, with the loss's gradients, and the loss."""
    states, blocks = [], model.model.layers

    def keep(x):
        x.retain_grad()
        states.append(x)

    handles = [blocks[0].register_forward_pre_hook(lambda _, args: keep(args[0]))]
    handles += [b.register_forward_hook(lambda _, args, out: keep(out)) for b in blocks]
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    streams, gradients = zip(
        *((alone(x.detach(), axis), alone(x.grad, axis).double()) for x in states), strict=True
    )
    return streams, gradients, loss.item()


def assert_rows(rows, streams):
    assert len(rows) == len(streams)
    for (_, row), x in zip(rows.iterrows(), streams, strict=True):
        x = x.double()
        squares, unit = x.square().mean(-1), x / x.norm(dim=-1, keepdim=True)
        length = x.shape[1]
        cosines = (unit @ unit.mT).sum((1, 2)) - length
        told = {
            "mean_square": squares.mean(),
            "variance": x.var(),
            "max_abs": x.abs().max(),
            "mean_square_first": squares[:, 0].mean(),
            "mean_square_rest": squares[:, 1:].mean(),
            "mean_square_median": squares.flatten().quantile(0.5),
            "mean_vector_norm": x.mean((0, 1)).norm(),
            "token_cosine": (cosines / (length * (length - 1))).mean(),
        }
        for column, truth in told.items():
            assert row[column] == pytest.approx(
                truth.item(), rel=1e-4 if "cosine" in column else 1e-5
            )
        largest = squares.flatten()[int(row["max_token"])]
        assert largest == pytest.approx(squares.max().item(), rel=2e-5)


def assert_gradients(rows, streams, gradients):
    for column, truth in expected(list(streams), list(gradients)).items():
        agree(column, rows[column], truth, tolerance=1e-6)


@pytest.mark.parametrize("family", AXIS)
def test_rows_are_of_all_streams(family):
    model = tiny(family)
    streams, gradients, loss = by_autograd(model, IDS, AXIS[family])
    assert streams[0].shape == (12, 11, 48)
    result = probe(model, {"input_ids": IDS, "use_cache": False}, gradients=True)
    rows = result.rows()
    assert list(rows["kind"]) == ["embedding", *["block"] * 4]
    assert rows["cosine"].isna().all()
    assert rows["branch_mean_square"].isna().all()
    assert_rows(rows, streams)
    assert_gradients(rows, streams, gradients)
    assert result.summary["loss"]["model"]["value"] == pytest.approx(loss, rel=1e-6)
    one = [x[::4] for x in streams]  # a negative control: the first stream alone is something else
    with pytest.raises(AssertionError):
        assert_rows(rows, one)
    turned = [g.view(3, 4, 11, 48).transpose(0, 1).reshape(12, 11, 48) for g in gradients]
    with pytest.raises(AssertionError):  # likewise: gradients of other streams
        assert_gradients(rows, streams, turned)


@pytest.mark.parametrize("family", AXIS)
def test_what_is_said(family, tmp_path):
    model = tiny(family)
    result = probe(model, IDS, random=2)
    said = "model.layers 0-3: block over 4 streams, as if they were sequences"
    assert result.layout == result.rows().attrs["layout"] == said
    assert result.summary["streams"] == 4
    assert list(result.summary["tokens"]) == [12, 11]
    assert result.curves.groupby("curve")["seed"].nunique().to_dict() == {"model": 1, "random": 2}
    page = result.page()
    said = "The model has 4 residual streams, measured after each block"
    assert said in page
    drawn = [text.get_text() for text in result.figure().texts]
    assert any(text.startswith(said) for text in drawn)
    assert "3 × 11 tokens" in page
    assert "12 × 11 tokens" not in page
    assert "streams" not in probe(tiny("llama"), IDS).summary


@pytest.mark.parametrize("family", AXIS)
def test_batches_of_a_curve(family):
    model = tiny(family)
    whole = probe(model, {"input_ids": IDS, "use_cache": False}).rows()
    with torch.no_grad(), probe(model) as probed:
        for ids in (IDS[:1], IDS[1:]):
            model(input_ids=ids, use_cache=False)
    rows = probed.rows()
    for column in ("mean_square", "variance", "max_abs", "max_token", "token_cosine"):
        assert rows[column].tolist() == pytest.approx(whole[column].tolist(), rel=1e-5)


@pytest.mark.parametrize("family", AXIS)
@pytest.mark.parametrize("shape", [(4, 11), (3, 4), (5, 5), (4, 4), (1, 4), (1, 1)])
def test_which_axis(family, shape):
    """As many sequences or tokens as streams, or as each other: the embedding tells them apart."""
    model = tiny(family)
    ids = torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(1))
    streams, _, _ = by_autograd(model, ids, AXIS[family])
    if shape == (1, 1):
        with pytest.raises(ConfigError, match="can't tell its streams from sequences and tokens"):
            probe(model, ids)
        return
    rows = probe(model, {"input_ids": ids, "use_cache": False}).rows()
    assert_rows(rows, streams)


class Mixing(nn.Module):
    """A block that mixes streams along an axis."""

    def __init__(self, axis, count, width):
        super().__init__()
        self.axis, self.mix = axis, nn.Linear(count, count)
        self.mlp = nn.Linear(width, width)

    def forward(self, x):
        return self.mix(x.movedim(self.axis, -1)).movedim(-1, self.axis) + self.mlp(x)


class Streams(nn.Module):
    """Somebody's model: n streams along an axis, all of the embedding, or none."""

    def __init__(self, axis, count=4, width=8, own=True, turned=False, between=lambda x: x):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(60, width)
        self.start = nn.ModuleList(nn.Linear(width, width) for _ in range(count))
        self.layers = nn.ModuleList(Mixing(axis, count, width) for _ in range(3))
        self.axis, self.own, self.turned, self.between = axis, own, turned, between

    def forward(self, ids):
        x = self.embed(ids)
        parts = [start(x) for start in self.start]
        x = torch.stack([x, *parts[1:]] if self.own else parts, self.axis)
        if self.turned:
            x = x.transpose(*[i for i in range(3) if i != self.axis])
        for layer in self.layers:
            x = self.between(layer(x))
        return x.mean(self.axis)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_any_axis(axis):
    model, states = Streams(axis), []
    handles = [model.layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))]
    handles += [b.register_forward_hook(lambda _, a, out: states.append(out)) for b in model.layers]
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    assert_rows(probe(model, IDS).rows(), [alone(x, axis) for x in states])
    assert len(states) == 4


REFUSED = {  # which model, of which token ids
    "as many streams as sequences": (Streams(0, own=False), (4, 11), "can't tell its streams from"),
    "as many tokens as streams": (Streams(2, own=False), (3, 4), "can't tell its streams from"),
    "as many tokens as sequences": (Streams(1, own=False), (5, 5), "can't tell its streams from"),
    "tokens first": (Streams(0, turned=True), (3, 11), "must be (batch, length, width), a token"),
    "tokens first, as many": (Streams(0, turned=True), (5, 5), "must be (batch, length, width), a"),
    "changed between blocks": (Streams(0, between=lambda x: 2 * x), (3, 11), "changes the stream"),
    "mixed between blocks": (
        Streams(0, between=lambda x: x.flip(0)),
        (3, 11),
        "changes the stream",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_cant_be_told(how):
    model, shape, line = REFUSED[how]
    ids = torch.arange(shape[0] * shape[1]).view(shape) % 60
    with pytest.raises(ConfigError) as error:
        probe(model, ids)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_other_streams_within_a_curve():
    model = Streams(0)
    with torch.no_grad(), probe(model):
        model(IDS)
        model.start = model.start[:2]
        with pytest.raises(ConfigError, match="a batch of 2 streams after one of 4"):
            model(IDS)


def test_layouts_are_of_one_stream():
    layout = Layout("layers", (Sublayer("mlp", raw="mlp"),))
    with pytest.raises(ConfigError, match="must be one stream"):
        probe(Streams(0), IDS, layout=layout)
    blocks = nn.Sequential(nn.Sequential(*Streams(0).layers))
    with pytest.raises(ConfigError, match="without token ids it must be"):
        probe(blocks, torch.zeros(4, 3, 11, 8))
