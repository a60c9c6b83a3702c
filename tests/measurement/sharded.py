"""Models over several processes (gloo, on the CPU): each rank's rows are those of the plain model."""

from datetime import timedelta

import pandas as pd
import torch
import torch.distributed as dist
from probed import IDS, theirs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from simlab import probe


def fsdp_1(model, norms=False):
    """Blocks are units, or also each of their norms, without the original parameters then."""
    layer = model.model.layers[0]
    units = {type(layer)} | ({type(layer.post_attention_layernorm)} if norms else set())
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy(units),
        use_orig_params=not norms,
        device_id=torch.device("cpu"),
    )


def fsdp_2(model):
    """Blocks are units, and their last norms."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer.post_feedforward_layernorm, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPPERS = {
    "DDP": nn.parallel.DistributedDataParallel,
    "FSDP 1": fsdp_1,
    "FSDP 1, norms": lambda model: fsdp_1(model, norms=True),
    "FSDP 2": fsdp_2,
}


def assert_rows_of_the_plain_model(rank, world, store):
    """One process of several: each has its own batch. Also where one rank alone is probed."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world),
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=5),  # on a busy machine a process may start a minute late
    )
    try:
        ids = IDS.roll(rank, -1)
        expected = probe(theirs("Olmo2"), ids).rows()
        for name, wrapped in WRAPPERS.items():
            rows = probe(wrapped(theirs("Olmo2")), ids).rows()
            pd.testing.assert_frame_equal(rows, expected, obj=f"{name}, rank {rank} of {world}")
        model = fsdp_2(theirs("Olmo2"))
        if rank == 0:
            pd.testing.assert_frame_equal(probe(model, ids).rows(), expected)
        else:
            with torch.no_grad():
                model(ids)
    finally:
        dist.destroy_process_group()
