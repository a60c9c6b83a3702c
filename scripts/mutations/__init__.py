"""The catalogue: plausible mistakes, each a record (record.py) with the setting in which it shows.

Some can change nothing of the random inits' law: their ``same`` says why. With a checkpoint's
weights the model then departs from transformers', which ``mutation_table.parity`` sees.

No mistake at all, though it is an "off by one": RoPE's positions counted from 1, for only differences
of positions enter. ``NO_MISTAKE`` is that edit, which neither a gate nor parity may see.
"""

from .attention import ATTENTION, MLP, NO_MISTAKE
from .norms import NORM, PLACEMENT
from .numbers import ENGINE, INIT, WEIGHTLESS
from .record import Edit, Mutation, applied
from .schemes import SCHEMES

__all__ = ["MUTATIONS", "NO_MISTAKE", "SETTINGS", "Edit", "Mutation", "applied"]

# Small: 32 curves take half a second, which the weightless engine computes in one batch; it runs the
# same model code. Weights so large that eps plays no part, but where it should.
UNSCALED = (
    "device=cpu", "engine=weightless", "depth=3", "width=64", "heads=8", "kv_heads=2", "d_ff=96",
    "vocab_size=97", "inputs.batch=2", "inputs.length=16",
)  # fmt: skip
BASE = (*UNSCALED, "init.std=0.1")
SHORT = ("inputs.batch=16", "inputs.length=4")
ROPE = (
    *BASE,
    "heads=16",
    "kv_heads=16",
    "vocab_size=2",
    "inputs.length=24",
    "model.rope_theta=30",
)
# Of schemes that carry more than a stream: what is wrong shows in two blocks.
SMALL = (*BASE, "depth=2", "width=32", "heads=4", "d_ff=48", "inputs.length=8")
SETTINGS = {
    "plain": BASE,
    "dense": (*BASE, "engine=dense"),
    "ungrouped": (*BASE, "kv_heads=8"),
    "no_qk_norm": (*BASE, "model.qk_norm=none"),
    # Positions count where tokens are alike, and in as many heads as turn quickly.
    "rope": ROPE,
    "rope_whole": (*ROPE, "init.truncate=null"),
    # Entries of order 1 and tokens that differ: what an activation or a dropped weight does.
    "active": (*UNSCALED, "init=fan_in", "depth=2", "width=128", "vocab_size=1009", *SHORT),
    "loud": (*BASE, "init.std=1"),  # squares are beyond float16
    "window": (*BASE, "model.window=3"),
    "quiet": (*BASE, "init.std=0.04"),  # the branches' mean squares are near eps
    "gain": (*BASE, "norm.gain=0.5"),
    "swin": (*BASE, "depth=7", "width=32", "d_ff=32", "norm=swin_renorm"),
    "lns": (*BASE, "norm=lns"),
    # Branches of the stream's size, or its scale wouldn't matter.
    "deepnorm": (*BASE, "norm=deepnorm", "init.std=0.25", "width=128", "d_ff=192", *SHORT),
    "residual_scale": (*BASE, "norm=residual_scale"),
    "peri": (*BASE, "norm=peri"),
    # Many tokens and one block: what the embedding is made of.
    "drawn": (
        *BASE,
        "engine=dense",
        "depth=1",
        "vocab_size=1009",
        "inputs.batch=8",
        "inputs.length=32",
    ),
    "mitchell": (*UNSCALED, "init=mitchell", "norm=pre"),
    "fan_in": (*UNSCALED, "init=fan_in"),
    "weightless": (*BASE, "kv_heads=8", "init.truncate=2"),
    "gradients": (*BASE, "gradients=true"),
    "gated": (
        *SMALL,
        "model.attention_gate=elementwise",
        "model.value_embeddings=alternate",
        "model.value_embedding_scale=20",
    ),
    "hyper_connections": (*SMALL, "norm=hyper_connections", "norm.streams=3", "gradients=true"),
    "mhc": (*SMALL, "norm=mhc", "norm.mix_std=0.3", "norm.streams=2", "init.std=0.05"),
    "deepseek_v4": (*SMALL, "norm=deepseek_v4", "norm.mix_std=0.3", "norm.streams=2", "gradients=true"),
    # So small that eps plays a part: but for it, a norm takes out what sources are divided by.
    "attn_res": (*SMALL, "norm=attn_res", "norm.block_size=3", "init.std=0.003"),
    "gemma3n": (*SMALL, "norm=gemma3n", "norm.laurel_rank=8"),
    "gemma3n_altup": (*SMALL, "norm=gemma3n_altup", "norm.laurel_rank=8", "gradients=true"),
    "siamese_norm": (*SMALL, "norm=siamese_norm", "init.std=0.3", "depth=3", "gradients=true"),
    "custom": (
        *SMALL,
        "norm=custom",
        "norm.update='x + F(N(x))/sqrt(l)'",
        "norm.mlp_update='x + N(F(x))'",
    ),
    "derf": (*SMALL, "norm=derf", "norm.shift=0.3"),
    "ngpt": (*SMALL, "norm=ngpt"),
}  # fmt: skip
MUTATIONS = (*ATTENTION, *MLP, *NORM, *PLACEMENT, *SCHEMES, *INIT, *WEIGHTLESS, *ENGINE)
