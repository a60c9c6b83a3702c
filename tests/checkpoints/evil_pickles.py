"""Pickles that run, import, allocate or take for ever, where a reader lets them."""

import struct


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def evil(marker):
    """Names to pickles. Those that start with ``runs`` make the file ``marker`` by pickle.loads."""
    touch = f"open({str(marker)!r}, 'w').close()"
    call = text(touch) + b"\x85R."
    inside = f"(S{f'touch {marker}'!r}\n"
    ordered = b"ccollections\nOrderedDict\n"
    size = b"ctorch\nSize\n"
    nested = b")q\0" + b"".join(b"h\0h\0\x86q\0" for _ in range(200))
    doubled = b"]q\0" + b"".join(b"]q\1(h\0h\0eq\0" for _ in range(200))
    index = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)\x81"
    two = b"\x80\x02"
    return {
        "runs exec": two + b"cbuiltins\nexec\n" + call,
        "runs stack_global": b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93" + call,
        "runs inst": inside.encode() + b"ios\nsystem\n.",
        "runs obj": b"(cos\nsystem\n" + f"S{f'touch {marker}'!r}\no.".encode(),
        "runs nested": two + b"}" + text("x") + b"cbuiltins\nexec\n" + text(touch) + b"\x85Rs.",
        "runs getattr": two + b"cbuiltins\ngetattr\n" + b"cbuiltins\n__import__\n" + text("builtins")
        + b"\x85R" + text("exec") + b"\x86R" + call,
        "runs newobj": two + b"cbuiltins\nmap\ncbuiltins\nexec\n" + text(touch) + b"\x85\x86\x81"
        + b"q\0cbuiltins\nlist\nh\0\x85R.",
        "eval": two + b"cbuiltins\neval\n" + text("1/0") + b"\x85R.",
        "torch load": two + b"ctorch\nload\n" + text("/dev/zero") + b"\x85R.",
        "torch hub": two + b"ctorch.hub\nload\n" + text("x") + b"\x85R.",
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x0cSize.__new__\x93)R.",
        "attribute": b"\x80\x04\x8c\x0ctorch._utils\x8c\x02os\x93)R.",
        "no global called": two + b"K\1)R.",
        "string called": two + text("exec") + b")R.",
        "arguments no tuple": two + ordered + b"]R.",
        "ordered with arguments": two + ordered + b"]\x85R.",
        "ordered from itself": two + ordered + b")Rq\0" + ordered + b"h\0\x85R.",
        "build on a list": two + b"]}b.",
        "build on a name": two + ordered + b"}b.",
        "setstate": two + size + b")R}" + text("__class__") + ordered + b"sb.",
        "extension": two + b"\x82\x01.",
        "persistent text": b"Pabc\n.",
        "persistent number": two + b"K\1Q.",
        "persistent nested": two + nested + b"Q.",
        "newobj_ex": b"\x80\x04" + ordered + b")}\x92.",
        "key of doubled tuples": two + nested + b"}h\0K\1s.",
        "key of a list": two + b"}]K\1s.",
        "doubled tuples": two + nested + b".",
        "doubled lists": two + doubled + b".",
        "doubled shape": two + nested + size + b"h\0\x85R.",
        "shape of many": two + size + b"(" + b"K\1" * 100_000 + b"t\x85R.",
        "many with long arguments": two + b"(" + b"N" * 500_000 + b"tq\0"
        + (size + b"h\0R") * 2000 + b".",
        "index of itself": two + b"}" + index + b"q\0h\0s.",
        "far memo": two + b"K\1r\xff\xff\xff\x7f.",
        "far memo get": two + b"j\xff\xff\xff\x7f.",
        "binbytes8": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".",
        "bytearray8": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        "unicode8": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".",
        "unicode": two + b"X\xff\xff\xff\x7fabc.",
        "long4": two + b"\x8b\xff\xff\xff\x7f.",
        "long1": two + b"\x8a\xff" + b"\x7f" * 255 + b".",
        "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
        "frame max": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
        "digits": b"I" + b"9" * 1_000_000 + b"\n.",
        "deep tuples": two + b")" + b"\x85" * 100_000 + b".",
        "deep lists": two + b"]" * 50_000 + b"a" * 49_999 + b".",
        "marks": two + b"(" * 100_000 + b".",
        "lists": two + b"]" * 100_000 + b".",
        "memoize": b"\x80\x04" + b")\x94" * 100_000 + b".",
        "protocol": b"\x80\x7fN.",
        "nothing": b"",
        "stop": b".",
        "dup": two + b"K\1" + b"2" * 100_000 + b".",
        "not utf-8": two + b"X\2\0\0\0\xff\xff.",
        "name not utf-8": two + b"c\xff\n\xfe\n.",
        "endless name": two + b"c" + b"a" * 1_000_000,
        "control codes": two + b"cbuiltins\x1b[31m\nexec\n)R.",
        "none": two + b"N.",
        "number": two + b"K\1.",
        "empty": two + b"}.",
    }  # fmt: skip
