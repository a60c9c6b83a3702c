"""The catalogue: mistakes in how numbers are drawn, simulated without weights, moved and measured.

See mutations.py. A checkpoint's numbers aren't drawn: no parity test can catch what is wrong here
with a random init, and every such mistake changes the curve's law.
"""

from __future__ import annotations

import inspect

from simlab.measurement import engine
from simlab.measurement.block_probe import Probe
from simlab.schemes import init
from simlab.schemes.init import Gaussian
from simlab.weights import dense as random
from simlab.weights import weightless as gaussian
from simlab.weights.base import Weights
from simlab.weights.rng import Normals
from simlab.weights.weightless import GaussianLinear

from .record import Edit, Mutation, edit

FORWARD = inspect.unwrap(engine.forward)  # under torch.no_grad
STD = vars(Gaussian)["std"].fget
LAW = "Gaussian(sigma * scale(role),"
SEEDED = "entropy = entropy_of(self.seed, name)"
Z = "normals(self.shape.name,"
BACK = "(row_space - down @ projected) @ q + down @ fresh"

INIT = (
    Mutation(
        "std_untruncated",
        "cut at ± 3 before σ is known to be 0.1: never",
        edit(
            random.draw_on_cpu,
            "np.abs(flat) > law.truncate",
            "np.abs(flat) * law.sigma > law.truncate",
        ),
        "drawn",
    ),
    Mutation(
        "std_clipped",
        "clipped at ± 3σ instead of drawn again",
        edit(
            random.draw_on_cpu,
            "flat[again] = fresh",
            "flat[again] = np.sign(flat[again]) * law.truncate; break",
        ),
        "drawn",
    ),
    Mutation(
        "std_cut_at_2",
        "cut at ± 2σ instead of 3σ",
        edit(init.table, "else init.truncate", "else 2.0"),
        "drawn",
    ),
    Mutation(
        "std_rescaled",
        "cut, then widened to σ again",
        edit(random.draw_on_cpu, "np.float32(law.sigma)", "np.float32(law.sigma**2 / law.std)"),
        "drawn",
    ),
    Mutation(
        "uniform",
        "uniform numbers of the same std instead of normal ones",
        edit(
            random.draw_on_cpu,
            "flat *= np.float32(law.sigma)",
            "flat[:] = law.std * generator.uniform(-(3**0.5), 3**0.5, flat.size)",
        ),
        "drawn",
    ),
    Mutation(
        "std_forgotten_on_down",
        "one matrix is N(0, 1)",
        edit(init.table, LAW, "Gaussian(1.0 if role == 'down_proj' else sigma,"),
    ),
    Mutation(
        "std_forgotten_on_k",
        "k is N(0, 1), with no QK-norm to hide it",
        edit(init.table, LAW, "Gaussian(1.0 if role == 'k_proj' else sigma,"),
        "no_qk_norm",
    ),
    Mutation(
        "std_for_variance",
        "σ taken for a variance",
        edit(init.table, "Gaussian(sigma *", "Gaussian(sigma**0.5 *"),
    ),
    Mutation(
        "outputs_scaled",
        "o and down times 1/√(2L), as in GPT-2",
        edit(
            init.table,
            LAW,
            "Gaussian(sigma * ((2 * model.depth)**-0.5 if role in ('o_proj', 'down_proj') else 1),",
        ),
    ),
    Mutation(
        "mitchell_from_1",
        "mitchell's layer counted from 1 and then from 1 again",
        edit(init._mitchell, "(2 * model.d_ff * (layer + 1))", "(2 * model.d_ff * (layer + 2))"),
        "mitchell",
    ),
    Mutation(
        "fan_out",
        "1/√d_out for 1/√d_in",
        edit(init._fan_in, "model.d_ff**-0.5", "model.width**-0.5"),
        "fan_in",
    ),
    Mutation(
        "same_numbers_in_all_layers",
        "the layer isn't in the seed",
        edit(
            random.RandomWeights.tensor,
            SEEDED,
            'entropy = entropy_of(self.seed, name.split(".")[-2])',
        ),
        "dense",
    ),
    Mutation(
        "same_numbers_in_all_matrices",
        "the name isn't in the seed",
        edit(random.RandomWeights.tensor, SEEDED, "entropy = entropy_of(self.seed)"),
        "dense",
    ),
    Mutation(
        "same_numbers_in_all_seeds",
        "the seed isn't in the seed",
        (
            Edit(random.RandomWeights.tensor, SEEDED, "entropy = entropy_of(name)"),
            Edit(random.RandomWeights.rows, "entropy_of(self.seed, name)", "entropy_of(name)"),
        ),
        "dense",
    ),
    Mutation(
        "embedding_scaled",
        "embeddings times √d_model, as in Gemma",
        edit(
            Weights.embedded, "ids, device, dtype)", "ids, device, dtype) * self.model.width**0.5"
        ),
    ),
    Mutation(
        "ids_off_by_one",
        "every token has the next one's embedding",
        edit(Weights.vectors, "shape, ids,", "shape, (ids + 1) % shape[0],"),
        same="the embedding's rows are i.i.d.",
    ),
)

WEIGHTLESS = (
    Mutation(
        "weightless_sigma_forgotten",
        "one layer's Y without its σ",
        edit(
            GaussianLinear.forward,
            "coordinates * self.std",
            "coordinates * (1.0 if 'up_proj' in self.shape.name else self.std)",
        ),
        "weightless",
    ),
    Mutation(
        "weightless_truncation_forgotten",
        "σ instead of what a cut leaves of it",
        edit(STD, "if c is None:", "if True:"),
        "weightless",
    ),
    Mutation(
        "weightless_truncation_by_half",
        "a factor 2 forgotten in the cut law's variance",
        edit(STD, "2 * c * density", "c * density"),
        "weightless",
    ),
    Mutation(
        "weightless_lengths_forgotten",
        "L of the scaled rows, not scaled back",
        edit(gaussian._Coordinates.forward, "(scale * lower)", "lower"),
        "weightless",
    ),
    Mutation(
        "weightless_transposed",
        "Cholesky's Lᵀ for L",
        edit(gaussian._Coordinates.forward, "(scale * lower)", "(scale * lower.mT)"),
        "weightless",
    ),
    Mutation(
        "weightless_jitter",
        "a jitter of 1e-1",
        edit(gaussian.factor, "inverse.mT, JITTER", "inverse.mT, 1e-1"),
        "weightless",
    ),
    Mutation(
        "weightless_q_is_k",
        "k has q's Z",
        edit(
            GaussianLinear.forward,
            f"z = {Z}",
            f"z = {Z}".replace("name", "name.replace('k_proj', 'q_proj')"),
        ),
        "weightless",
    ),
    Mutation(
        "weightless_gate_is_up",
        "up has gate's Z",
        edit(
            GaussianLinear.forward,
            f"z = {Z}",
            f"z = {Z}".replace("name", "name.replace('up_proj', 'gate_proj')"),
        ),
        "weightless",
    ),
    Mutation(
        "weightless_same_z_in_all_layers",
        "the layer isn't in Z's seed",
        edit(Normals.parts, '"weightless", key)', '"weightless", key.split(".")[-2])'),
        "weightless",
    ),
    Mutation(
        "weightless_back_forgets",
        "backward, what the forward has shown of W is forgotten",
        edit(gaussian._Coordinates.backward, BACK, "down @ fresh"),
        "gradients",
    ),
    Mutation(
        "weightless_back_knows",
        "backward, what the forward hasn't shown of W is taken for 0",
        edit(gaussian._Coordinates.backward, BACK, "row_space @ q"),
        "gradients",
    ),
    Mutation(
        "weightless_back_unprojected",
        "backward, fresh numbers also where W is known",
        edit(gaussian._Coordinates.backward, BACK, "row_space @ q + down @ fresh"),
        "gradients",
    ),
)

ENGINE = (
    Mutation(
        "last_block_skipped",
        "the last block isn't run",
        edit(FORWARD, "range(model.depth)", "range(model.depth - 1)"),
    ),
    Mutation(
        "block_twice",
        "every block is run twice",
        edit(FORWARD, "block(state, some)", "block(block(state, some), some)"),
    ),
    Mutation(
        "block_weights_off_by_one",
        "block 0's weights in block 1 again, and so on",
        edit(FORWARD, "weights.block(layer,", "weights.block(max(layer - 1, 0),"),
    ),
    Mutation(
        "stream_before_the_add",
        "what is measured is the stream before a sublayer",
        edit(Probe._listen, "observe(step, args[0], after,", "observe(step, args[0], args[0],"),
    ),
    Mutation(
        "loss_over_all_tokens",
        "the loss is divided by all tokens, not by those that are predicted",
        edit(engine._of_loss, "ids[:, 1:].numel()", "ids.numel()"),
        "gradients",
    ),
)

NUMBERS = (*INIT, *WEIGHTLESS, *ENGINE)
