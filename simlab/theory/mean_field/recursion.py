"""The recursion: the stream's kernel after every sublayer, from the config and the tokens alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from simlab.config import InitConfig, ModelConfig
from simlab.schemes.init import Gaussian, table
from simlab.schemes.placement import at, placement_of, renorm_after
from simlab.schemes.scheme import vectors
from simlab.theory.laws import Array
from simlab.theory.mean_field.averages import saturation
from simlab.theory.mean_field.band import band
from simlab.theory.mean_field.branch import TINY, Branch, Input
from simlab.theory.mean_field.drawing import Context
from simlab.theory.mean_field.experts import ExpertsKernel
from simlab.theory.mean_field.gates import attention_of
from simlab.theory.mean_field.gradient import (
    Ending,
    loss_error,
    loss_gradient,
    own_probability,
    pull_gradient,
)
from simlab.theory.mean_field.kernels import (
    KernelStep,
    State,
    Terms,
    correlation,
    state_of,
)  # fmt: skip
from simlab.theory.mean_field.limits import unpredictable
from simlab.theory.mean_field.mixing_gradient import RARE, pull_mixed, pull_read, spread_of
from simlab.theory.mean_field.mlp import MLPKernel
from simlab.theory.mean_field.parts import part_maps, refused
from simlab.theory.mean_field.squash import norm_of

# Of the seeds' std over their mean. Beyond, the mean is carried by rare seeds, and the recursion, which
# is linear in the seeds' deviations, is low: by 4 % at this bound, 12 % at twice it (measured).
SPREAD = 0.25
LOSS_ERROR = 0.05  # of the gradient's square: 2.5 % of its rms
OWN_PROBABILITY = 0.1  # of a tied head; beyond, a gradient is off by more than a few percent


@dataclass(frozen=True)
class PredictedRow:
    """A predicted row of a curve: means over seeds and tokens, named as the columns of curve.csv.

    ``band``: the std of mean_square between seeds; NaN if not asked for. Gradients likewise.
    """

    sublayer: int
    block: int | None
    kind: str
    mean_square: float
    norm: float
    mean_vector_norm: float
    token_cosine: float
    branch_mean_square: float
    branch_raw_mean_square: float
    eps_factor: float
    band: float = math.nan
    gradient_rms: float = math.nan
    gradient_norm: float = math.nan
    read_mean_square: float = math.nan


@dataclass(frozen=True, eq=False)
class Passed:
    """A step that was taken: its record, its output, its place, and what its last norm acts on.

    outs: the vectors after it. state: all of them; stream: the one that is reported, of which the
    state's vectors have these shares.
    """

    step: KernelStep
    outs: tuple[Terms, ...]
    state: State
    stream: State
    shares: tuple[float, ...]
    kind: str
    block: int | None
    normalises: str | None


def kurtosis(law: Gaussian) -> float:
    """E z⁴/(E z²)² of a normal cut at ± c: 3 if whole, 2.829 at c = 3."""
    c = law.truncate
    if c is None:
        return 3.0
    density = 2 * c * math.exp(-c * c / 2) / math.sqrt(2 * math.pi) / math.erf(c / math.sqrt(2))
    return (3 - (c * c + 3) * density) / (1 - density) ** 2


@dataclass(frozen=True)
class Prediction:
    """The predicted rows, the embedding's first.

    ends: why they end before the model does. no_gradient: why gradients that were asked for are NaN.
    accuracy: the relative error to expect of a predicted mean square.
    """

    rows: list[PredictedRow]
    ends: str | None = None
    no_gradient: str | None = None
    accuracy: float = 0.0

    def column(self, name: str, length: int) -> Array:
        """A field of the first ``length`` rows (length,), NaN beyond the prediction's end."""
        values = np.full(length, np.nan)
        known = [float(getattr(row, name)) for row in self.rows[:length]]
        values[: len(known)] = known
        return values


@contextmanager
def one_thread() -> Iterator[None]:
    """Products on one thread: OpenBLAS's threads wait busily, 35 times as long where others compute.

    Measured for 64 tokens, on 2 cores that other processes used: 21.3 s of the processor, not 0.6.
    """
    with ThreadpoolController().limit(limits=1, user_api="blas"):
        yield


@one_thread()
@np.errstate(over="ignore", invalid="ignore")  # the prediction ends there
def predict(
    model: ModelConfig, init: InitConfig, ids: NDArray[np.int64], with_band: bool = True,
    gradients: bool = False, on_block: Callable[[], None] = lambda: None,
) -> Prediction:  # fmt: skip
    """Predict the curve of a model's random inits on given tokens (B, T).

    with_band: also the std between seeds, by which a curve may end earlier. gradients: also the
    gradient's rms and norm, of a curve that reaches the end. on_block: called after each block, of the
    curve, then of the band, then of the gradient. Raises ValueError where ``unpredictable`` says that
    there is no prediction.
    """
    if reason := unpredictable(model, ids):
        raise ValueError(reason)
    batch, length = ids.shape
    context = Context(model, batch, length, ids)
    flat = ids.reshape(-1)
    laws = table(model, init)
    places = np.tile(np.arange(ids.shape[1]), len(ids)) if model.positions else None
    start, fourth = _start(laws["embedding"], flat, places, model)
    of_roles = {role: law.std for role, law in laws.items()}
    first = _first(context, of_roles, start)
    passed, ends = [], refused(model, of_roles)
    rows = [_row(0, None, "embedding", first.stream, ids, model.width, None)]
    for one in () if ends else _steps(context, init, first.state):
        sublayer = rows[-1].sublayer + (one.kind != "renorm")
        if not all(np.isfinite(part).all() for part in one.state.arrays):
            ends = f"from sublayer {sublayer} on its numbers are beyond the range of floats"
            break
        if relative_std(one.stream) > SPREAD:
            ends = _rare_seeds(sublayer)
            break
        passed.append(one)
        place = sublayer, one.block, one.kind
        rows.append(_row(*place, one.stream, ids, model.width, one.step, one.normalises))
        if one.kind == "mlp":
            on_block()
    values = [dict(vars(row)) for row in rows]
    if with_band:
        steps, done = [(one.step, one.outs) for one in passed], reversed(passed)

        def on_step() -> None:
            if next(done).kind == "attention":
                on_block()

        others = () if places is None else ((places, fourth / model.embedding_scale**4),)
        stds = band(
            steps, start.kernel, flat, fourth, model.width, on_step, others,
            [one.shares for one in (first, *passed)],
            None if first.state is start else (first.step, first.outs),
        )  # fmt: skip
        for value, std in zip(values, stds, strict=True):
            value["band"] = float(std)
        # The adjoint knows what the forward estimate leaves out: the band that attention hands on.
        wide = [value["band"] > SPREAD * value["mean_square"] for value in values]
        if any(wide):
            worst = wide.index(True)
            ends = _rare_seeds(values[worst]["sublayer"])
            del values[worst:]
    no_gradient = "the predicted curve ends early" if gradients and ends else None
    if gradients and ends is None:
        head = laws["embedding" if model.tied else "head"].std
        state, moment = (first, *passed)[-1].state, _moment(model)
        end = KernelStep(state, model.width, model.norm.eps, 1.0, moment)
        parts = part_maps(placement_of(model).finish_parts, context, of_roles, end)
        last = Ending(model, end, parts)
        if model.tied and _tied_head_knows(model, [first, *passed], last, head):
            no_gradient = "the head is tied to an embedding so large that tokens predict themselves"
        elif any(one.step.mixed and spread_of(one.step).max() > RARE for one in passed):
            no_gradient = "a few tokens with rare mixing coefficients carry it"
        elif loss_error(last.normed.kernel, model, head) > LOSS_ERROR:
            no_gradient = "logits differ so much that few tokens share the probability"
            no_gradient += " or the soft-cap bends them" if model.logit_softcap else ""
        else:
            pulled = _gradients(model, passed, last, head, ids, on_block)
            for value, squares in zip(values, pulled, strict=True):
                roots = np.sqrt(np.maximum(squares, 0))
                value["gradient_rms"] = math.sqrt(np.square(roots).mean())
                value["gradient_norm"] = math.sqrt(model.width) * roots.mean()
    rows = [PredictedRow(**value) for value in values]
    return Prediction(rows, ends, no_gradient, accuracy(model.width))


def _start(
    law: Gaussian, ids: NDArray[np.int64], places: NDArray[np.int64] | None, model: ModelConfig
) -> tuple[State, float]:
    """The state of the embeddings of tokens (N,) at places (N,), and (κ − 3)·τ⁴ of their entries.

    τ = s·σ with the embedding's scale s. Of equal tokens K̂_ij is the mean of z⁴: Cov(K̂_ii, K̂_jj) =
    (κ − 1)τ⁴/d. A learned position is another embedding by the same law, added without s: K sums, and
    Cov is 2K²/d + (κ − 3)τ⁴/d of each.
    """
    width, std = model.width, model.embedding_scale * law.std
    same = (ids[:, None] == ids[None, :]).astype(float)
    kernel, square = std**2 * same, (kurtosis(law) - 1) * std**4 * same / width
    fourth = (kurtosis(law) - 3) * std**4
    if places is not None:
        alike = (places[:, None] == places[None, :]).astype(float)
        kernel = kernel + law.std**2 * alike
        square = (2 * kernel**2 + fourth * (same + alike / model.embedding_scale**4)) / width
    ends = np.outer(kernel.diagonal(), kernel.diagonal())
    return State(kernel, square, (ends + kernel**2) / width), fourth


def _rare_seeds(sublayer: int) -> str:
    return (
        f"from sublayer {sublayer} on seeds differ by more than {100 * SPREAD:.0f} % of their mean, "
        "which rare seeds then carry"
    )


def accuracy(width: int) -> float:
    """The relative error to expect of a predicted mean square, at a width (docs/theory.md)."""
    return 0.005 + 0.6 / width


def relative_std(state: State) -> float:
    """The std between seeds of the batch's mean square over its mean, by the forward estimate."""
    mean = max(state.kernel.diagonal().mean(), TINY)
    return math.sqrt(max(state.square.mean(), 0)) / mean


def _first(context: Context, stds: Mapping[str, float], start: State) -> Passed:
    """The step from the embedding to the state before the first block."""
    model = context.model
    step, placement = KernelStep(start, model.width, model.norm.eps, 1.0), placement_of(model)
    parts = part_maps(placement.start_parts, context, stds, step)
    state = placement.start(step.x, step.norm, model, **parts)
    return _passed(model, step, state, "embedding", None, None)


def _moment(model: ModelConfig) -> float:
    return 1 - 1 / model.width if model.norm.centred else 1.0


def _steps(context: Context, init: InitConfig, state: State) -> Iterator[Passed]:
    model, norm, moment = context.model, context.model.norm, _moment(context.model)
    for layer in range(model.depth):
        stds = {role: law.std for role, law in table(model, init, layer).items()}
        mlp = MLPKernel(model, stds)
        sublayers: dict[str, Callable[[Input], Branch]] = {
            "attention": attention_of(context, layer, stds),
            "mlp": ExpertsKernel(mlp) if model.experts else mlp,
        }
        for kind, sublayer in sublayers.items():
            scheme = at(model, layer, kind)
            step = KernelStep(state, model.width, norm.eps, norm.gain, moment)
            maps: dict[str, Any] = dict.fromkeys(scheme.norms, norm_of(step, model, kind))
            maps |= part_maps(scheme.parts, context, stds, step)
            out = scheme.step(step.state, step.feed(sublayer), step.add, **maps)
            passed = _passed(model, step, out, kind, layer, scheme.normalises)
            state = passed.state
            yield passed
        if renorm_after(model, layer):
            step = KernelStep(state, model.width, norm.eps, 1.0, moment)
            passed = _passed(model, step, step.norm(step.x), "renorm", layer, "stream")
            state = passed.state
            yield passed


def _passed(
    model: ModelConfig, step: KernelStep, out: Any, kind: str, block: int | None,
    normalises: str | None,
) -> Passed:  # fmt: skip
    outs, copies = vectors(out), 1
    weights = _write_weights(model, len(outs), block)
    if all(one.terms == outs[0].terms for one in outs) and (weights == weights[0]).all():
        outs, copies = outs[:1], len(outs)
    # As an embedding is, where nothing changes.
    same = len(outs) == 1 and outs[0].terms == step.x.terms
    state = step.start if same else state_of(*outs)
    if copies != state.copies or step.apart is not None:
        state = replace(state, copies=copies, apart=step.apart)
    after = KernelStep(state, step.width, step.eps, 1.0)
    watched = placement_of(model).watch(after.state)
    shares = after.shares(watched)
    alone = [one for one, share in zip(state.vectors, shares, strict=True) if share == 1]
    stream = alone[0] if sum(map(abs, shares)) == len(alone) == 1 else state_of(watched)
    terms = tuple(one.terms for one in outs)
    return Passed(step, terms, state, stream, shares, kind, block, normalises)


def _gradients(
    model: ModelConfig, passed: list[Passed], last: Ending, head: float, ids: NDArray[np.int64],
    on_block: Callable[[], None],
) -> list[Array]:  # fmt: skip
    """Every row's mean squares of the gradient (N,), the embedding's first."""
    gradient = loss_gradient(last.normed.kernel, model, head, ids)
    gradient, gone = pull_gradient(last.step, [last.normed.terms], gradient)
    squares = [_of_writes(model, last.step, gradient, model.depth - 1)]
    made_by = [None, *(one.block for one in passed[:-1])]
    streams = None
    if passed[-1].step.mixed is not None:
        streams = pull_read(last.step, gradient, gone)
        gradient = streams.total
        squares = [gradient.diagonal()]
    for one, block in zip(reversed(passed), reversed(made_by), strict=True):
        if streams is not None and one.step.mixed is not None:
            streams = pull_mixed(one.step, streams)
            gradient, gone = streams.total, streams.gone
        else:
            gradient, gone = pull_gradient(one.step, one.outs, gradient, gone)
        squares.append(_of_writes(model, one.step, gradient, block))
        if one.kind == "attention":
            on_block()
    return squares[::-1]


def _of_writes(model: ModelConfig, step: KernelStep, gradient: Array, block: int | None) -> Array:
    """The mean squares (N,) of the gradient with respect to a write, from G (nN, nN) before a step.

    block: of the step before, which wrote.
    """
    weights = _write_weights(model, step.starts * step.start.copies, block)
    if step.starts == 1:  # of copies, G is that of their sum
        return weights[0] ** 2 * gradient.diagonal()
    blocks = gradient.reshape(len(weights), -1, len(weights), len(step.kernels[0]))
    out: Array = np.einsum("a,b,aibi->i", weights, weights, blocks)
    return out


def _write_weights(model: ModelConfig, count: int, block: int | None) -> Array:
    """How much of a write by a block each vector of a state of ``count`` gets (count,)."""
    return placement_of(model).pull(list(np.eye(count)), block)


def _tied_head_knows(model: ModelConfig, passed: list[Passed], last: Ending, head: float) -> bool:
    """True where a tied head gives tokens themselves more than OWN_PROBABILITY."""
    own = [np.full(len(last.out.kernel), model.embedding_scale)]
    for step, outs in [*((one.step, one.outs) for one in passed), (last.step, [last.out.terms])]:
        own = [  # the embedding's share in what each step gives
            np.sum([step.factor(t) * own[t.base] for t in out if t.base < step.starts], axis=0)
            for out in outs
        ]
    return bool(own_probability(last, model, head, own[0]).max() > OWN_PROBABILITY)


def _row(
    sublayer: int, block: int | None, kind: str, state: State, ids: NDArray[np.int64], width: int,
    step: KernelStep | None, normalises: str | None = None,
) -> PredictedRow:  # fmt: skip
    kernel, (batch, length) = state.kernel, ids.shape
    m = np.maximum(kernel.diagonal(), TINY)
    rho = correlation(kernel).reshape(batch, length, batch, length)
    within = np.einsum("bibj->b", rho)
    cosine = ((within - length) / (length * (length - 1))).mean() if length > 1 else math.nan
    spread = 1 - state.square.diagonal() / (8 * m**2)  # E√m̂ of a lognormal m̂
    added, raw, factor = _branch(step, normalises)
    read = None if step is None else step.read
    return PredictedRow(
        sublayer, block, kind,
        mean_square=float(m.mean()),
        norm=float(math.sqrt(width) * (np.sqrt(m) * spread).mean()),
        mean_vector_norm=math.sqrt(max(width * kernel.mean(), 0)) * (1 - 1 / (4 * width)),
        token_cosine=float(cosine),
        branch_mean_square=added, branch_raw_mean_square=raw, eps_factor=factor,
        read_mean_square=math.nan if read is None else float(read.diagonal().mean()),
    )  # fmt: skip


def _branch(step: KernelStep | None, normalises: str | None) -> tuple[float, float, float]:
    """Mean squares of what a step adds, and before its norms; m/(m + eps) of its last norm.

    Where no norm acts on the branch or on the sum, the last is that of a norm that would act on it, as
    the engine measures it.
    """
    if step is None:
        return math.nan, math.nan, math.nan
    if not step.branches:
        return math.nan, math.nan, float(step.norms[-1].saturation.mean())
    assert step.raw is not None
    raw = step.raw.kernel.diagonal()
    if normalises not in ("branch", "stream") or not step.norms:
        factor = saturation(step.moment * raw, step.raw.relative_variance, step.eps)
    else:
        factor = step.norms[-1].saturation
    assert step.added is not None
    return float(step.added.diagonal().mean()), float(raw.mean()), float(factor.mean())
