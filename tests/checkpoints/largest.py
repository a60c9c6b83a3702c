"""Small files of a checkpoint at the most that a reader lets in: the worst of each kind that we know.

Found by measuring what opens containers, numbers, strings, keys and names cost per byte and per opcode.
"""

import pickle

from evil_pickles import text
from strangers import rezip

from simlab.checkpoints.untrusted import dcp, files, torch_zip, yaml


def filled(unit, size, start=b"", end=b""):
    """As many units between two ends as a size has room for. unit: bytes, or a function of a number."""
    if isinstance(unit, bytes):
        return start + unit * ((size - len(start) - len(end)) // len(unit)) + end
    longest = len(unit(size))
    return start + b"".join(map(unit, range((size - len(start) - len(end)) // longest))) + end


def jsons(inside):
    """JSON of the most bytes, within an object's key ``inside``."""
    start, most = b'{"' + inside + b'":', files.JSON_LIMIT
    return {
        "lists": filled(b"[],", most, start + b"[", b"0]}"),
        "dictionaries": filled(b'{"":0},', most, start + b"[", b"0]}"),
        "numbers": filled(b"1e9,", most, start + b"[", b"0]}"),
        "long numbers": filled(b"9" * 4300 + b",", most, start + b"[", b"0]}"),
        "names": filled(lambda i: b'"%d":"a",' % i, most, start + b"{", b'"":""}}'),
        "keys": filled(lambda i: b'"%d":0,' % i, most, b"{", start[1:] + b"0}"),
        "depth": filled(b"[", most, start),
        "a long string": filled(b"a", most, start + '"\U0001f600'.encode(), b'"}'),
    }


def header(data):
    return len(data).to_bytes(8, "little") + data


def headers():
    """Headers of safetensors files, of tensors without entries."""
    about = b'{"dtype":"F32","shape":[0%s],"data_offsets":[0,0]},'
    end = b'"a":' + about[:-1] % b"" + b"}"
    most = files.JSON_LIMIT
    return {
        "tensors": filled(lambda i: b'"t%d":' % i + about % b"", most, b"{", end),
        "dimensions": filled(lambda i: b'"t%d":' % i + about % (b",9" * 15), most, b"{", end),
        "names": filled(lambda i: b'"%0199d":' % i + about % b"", most, b"{", end),
    }


def pickled(budget, most):
    """Pickles that take all of a budget's steps or objects; one at a time, they are large."""
    four, label = b"\x80\x04]", b"ctorch\nSize\n\x94"

    def repeated(unit, steps, objects, most=most):
        """A unit of so many steps and objects, ten thousand in a list."""
        count = int(min(budget.steps / steps, budget.objects / max(objects, 1), most / len(unit)))
        return (b"(" + unit * 10_000 + b"e") * (count // 10_000 - 2) or unit * (count - 99)

    start = b"\x80\x04"
    count = min(budget.steps, most) - 9
    yield "objects", start + label + b"]" + repeated(b"h\0)\x81N\x86", 5, 2) + b"."
    yield "objects in objects", start + label + b"]" + repeated(b"h\0N\x85R", 4, 2) + b"."
    yield "dictionaries", four + repeated(b"}K\1K\1s", 4, 4) + b"."
    keys = b"h\0)\x81N"
    yield "keys", start + label + b"}" + repeated(keys, 4, 1).replace(b"e", b"u") + b"."
    yield "lists", four + repeated(b"]K\1a", 3, 2) + b"."
    yield "tuples", four + repeated(b"N\x85", 2, 1) + b"."
    yield "depth", start + b")" + b"\x85" * min(budget.objects - 2, count) + b"."
    yield "numbers", four + repeated(b"J\xff\xff\xff\x7f", 1, 1) + b"."
    yield "strings", four + repeated(b"\x8c\x0d\xf0\x9f\x98\x80abcdefghi", 1, 3) + b"."
    yield "a long string", start + text("\U0001f600" + "a" * (most - 20)) + b"."
    yield "memo", start + b"N" + b"\x94" * count + b"."
    yield "the stack", start + b"(" + b"N" * count + b"t."
    yield "marks", start + b"(" * count + b"t."
    yield "steps", four + repeated(b"N", 1, 0) + b"."


def metadata(chunks):
    """A .metadata as torch writes it, of so many chunks of one tensor, which are in no file."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    name, size = "model.blocks.0.feed_forward.w1.weight", torch.Size
    parts = [ChunkStorageMetadata(size([i, 0]), size([1, 7])) for i in range(chunks)]
    whole = TensorStorageMetadata(TensorProperties(torch.float32), size([chunks, 7]), parts)
    places = {
        # A string of its own, as of a name that came from another rank.
        MetadataIndex(name[:1] + name[1:], [i, 0]): _StorageInfo(
            f"__{i % 64}_0.distcp", 2000 * i, 1999
        )
        for i in range(chunks)
    }
    return pickle.dumps(Metadata({name: whole}, None, places))


def yamls():
    """YAML of the most bytes, or of the most characters that are looked at."""
    most, read = files.YAML_LIMIT, yaml.SECTION_WITHIN
    return {
        "keys": filled(b"a: b\n", most),
        "a list": filled(b"1,", most, b"model: [", b"]"),
        "a long scalar": filled(b"a ", most, b"model: "),
        "depth": filled(b"[", most, b"model: "),
        "keys of mappings": filled(b"{a: ", read, b"model: "),
        "depth in blocks": filled(b"- ", read, b"model:\n "),
        "escapes": filled(b"\\x41", read, b'model: "', b'"'),
        "blank lines": filled(b" \n", most, b"model:"),
        "comments": filled(b"#\n", most, b"model:"),
    }


def largest(top):
    """(layout, file, what it is full of, bytes) of each. top: where a checkpoint of each layout is."""
    whole = (top / "legacy_pt" / "model.pt").read_bytes()
    shard = next((top / "sharded").glob("model-*.safetensors")).name.encode()
    index = b'{"weight_map":{'
    in_one = filled(lambda i: b'"%d":"%s",' % (i, shard), files.JSON_LIMIT, index, b'"":"a"}}')
    model, there = "model.safetensors", "model.safetensors.index.json"
    for what, data in jsons(b"x").items():
        yield "hugging_face", "config.json", what, data
        yield "hugging_face", model, what, header(data)
    for what, data in jsons(b"weight_map").items():
        yield "sharded", there, what, data
    yield "sharded", there, "tensors in one shard", in_one
    for what, data in headers().items():
        yield "hugging_face", model, what, header(data)
    for what, data in yamls().items():
        yield "legacy_safetensors", "config.yaml", what, data
    most = dcp.METADATA_LIMIT  # map keeps none of these in memory while it is tried
    yield from map(
        ("olmo_core", "model_and_optim/.metadata").__add__, pickled(dcp.METADATA_BUDGET, most)
    )
    for share in (0.98, 1.1):  # of the most steps
        chunks = int(dcp.METADATA_BUDGET.steps * share / 70)
        yield "olmo_core", "model_and_optim/.metadata", f"{chunks} chunks", metadata(chunks)
    for what, data in pickled(torch_zip.PICKLE_BUDGET, torch_zip.PICKLE_LIMIT):
        put = rezip(whole, lambda r, d=data: ((n, d if n[-4:] == ".pkl" else c) for n, c in r))
        yield "legacy_pt", "model.pt", what, put
    count = torch_zip.DIRECTORY_LIMIT // 60
    records = rezip(whole, lambda r: [*r, *((f"x/{i}", b"") for i in range(count))])
    yield "legacy_pt", "model.pt", "records", records
    for layout, name, limit in (
        ("hugging_face", "config.json", files.JSON_LIMIT),
        ("sharded", there, files.JSON_LIMIT),
        ("legacy_safetensors", "config.yaml", files.YAML_LIMIT),
        ("olmo_core", "model_and_optim/.metadata", dcp.METADATA_LIMIT),
    ):
        yield layout, name, "longer than allowed", b"[" * (limit + 1)
    yield "hugging_face", model, "longer than allowed", header(b"[" * (files.JSON_LIMIT + 1))
