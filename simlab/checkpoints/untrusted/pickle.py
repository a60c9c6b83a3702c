"""torch's pickles read as data: nothing is imported, called or built but inert records.

Own code, where the project otherwise prefers a library: ``torch.load(weights_only=True)`` reads the
tensors themselves and knows none of a distributed checkpoint's classes, and torch's reader of those
unpickles whatever is there. Here some thirty opcodes are known, every name in a pickle becomes a label
from an exact list, and what a class would have been called with is kept beside the label.
Python's own pure unpickler does the stack machine; the C one
allocates whatever a length field claims.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from simlab.checkpoints.formats.fields import brief
from simlab.config import ConfigError

# What a malformed pickle makes the unpickler raise; ConfigError, a ValueError, is told apart.
MALFORMED = (
    pickle.UnpicklingError, EOFError, IndexError, KeyError, TypeError, AttributeError, ValueError,
    OverflowError, struct.error,
)  # fmt: skip
MOST_DIMENSIONS = 16

STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()}
DTYPES["float8_e4m3fn"], DTYPES["float8_e5m2"] = torch.float8_e4m3fn, torch.float8_e5m2
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = frozenset(
    {("torch", name) for name in (*STORAGES, *DTYPES, "Size")}
    | {(_METADATA, name) for name in (
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata",
        "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )}
    | {
        ("collections", "OrderedDict"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
    }
)  # fmt: skip


@dataclass(frozen=True, eq=False, slots=True)
class Name:
    """A class or function that a pickle names: a label, nothing that could be called."""

    module: str
    name: str

    def is_(self, *names: str) -> bool:
        """Whether it is one of these, by its last part."""
        return self.name in names


@dataclass(eq=False, slots=True)
class Made:
    """What a pickle would have had made: the maker's label, its arguments, the state set after.

    Compared and hashed by identity. The arguments are kept, not copied or looked at: memo references
    let a small file describe a structure that has no end of copies.
    """

    maker: Name
    args: tuple[Any, ...]
    state: Any = None

    def fields(self) -> dict[Any, Any]:
        """The state where it is a dictionary, which a dataclass's is; else an empty one."""
        return self.state if type(self.state) is dict else {}


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """A tensor's memory: which record of the archive it is and how many entries it claims."""

    dtype: torch.dtype
    key: str
    numel: int


class Ordered(dict[Any, Any]):
    """An OrderedDict that was made empty; attributes set on it are dropped."""


NAMES = {(module, name): Name(module, name) for module, name in ALLOWED}


def _whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


class _Reader(pickle._Unpickler):
    """The pure-Python unpickler with the opcodes that torch's pickles need, and no others."""

    dispatch: ClassVar[dict[int, Callable[..., None]]]
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, data: bytes, budget: int) -> None:
        super().__init__(io.BytesIO(data))
        self.left = (
            budget  # opcodes that may still come, so that time and memory stay within bounds
        )

    def find_class(self, module: str, name: str) -> Any:
        known = NAMES.get((module, name))
        if known is None:
            raise ConfigError(f"it names {brief(f'{module}.{name}')}, which is not allowed")
        return known

    def persistent_load(self, pid: Any) -> Storage:
        if type(pid) is tuple and len(pid) == 5:
            kind, maker, key, _, numel = pid
            known = isinstance(maker, Name) and maker.name in STORAGES
            if kind == "storage" and known and type(key) is str and _whole(numel):
                return Storage(STORAGES[maker.name], key, numel)
        raise ConfigError("a persistent id in it is not a storage")

    def make(self, maker: object, args: object) -> Made | Ordered:
        if not isinstance(maker, Name) or type(args) is not tuple:
            raise ConfigError("it calls something that is not a name")
        if maker.is_("OrderedDict"):
            if args:
                raise ConfigError("an OrderedDict in it is made with arguments")
            return Ordered()
        return Made(maker, args)

    def do_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], args)

    def do_build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Made):
            made.state = state
        elif not isinstance(made, Ordered):
            raise ConfigError("it sets attributes of something that was not made")

    def set_items(self, target: object, items: list[Any]) -> None:
        if not isinstance(target, dict):
            raise ConfigError("it sets items of something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, Made):  # the hash of nested tuples can take for ever
                raise ConfigError(f"a dictionary's key in it is a {type(key).__name__}")
            target[key] = value

    def do_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items(self.stack[-1], [key, value])

    def do_setitems(self) -> None:
        items = self.pop_mark()
        self.set_items(self.stack[-1], items)


def _counted(load: Callable[[Any], None]) -> Callable[[_Reader], None]:
    def counting(reader: _Reader) -> None:
        reader.left -= 1
        if reader.left < 0:
            raise ConfigError("it takes too many steps")
        load(reader)

    return counting


def _forbidden(reader: _Reader) -> None:
    raise ConfigError("an opcode in it is not allowed")


_ALLOWED = (
    "PROTO FRAME STOP NONE NEWTRUE NEWFALSE BININT1 BINGET LONG_BINGET APPEND APPENDS MARK BININT "
    "BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE GLOBAL STACK_GLOBAL BINPERSID EMPTY_TUPLE "
    "EMPTY_LIST EMPTY_DICT TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT LONG_BINPUT MEMOIZE"
)


def _opcodes() -> dict[int, Callable[..., None]]:
    theirs = pickle._Unpickler.dispatch
    code = {name: getattr(pickle, name)[0] for name in _ALLOWED.split()}
    table: dict[int, Callable[..., None]] = dict.fromkeys(range(256), _forbidden)
    table |= {code[name]: _counted(theirs[code[name]]) for name in _ALLOWED.split()}
    own = {
        pickle.REDUCE: _Reader.do_reduce,
        pickle.NEWOBJ: _Reader.do_reduce,
        pickle.BUILD: _Reader.do_build,
        pickle.SETITEM: _Reader.do_setitem,
        pickle.SETITEMS: _Reader.do_setitems,
    }
    return table | {name[0]: _counted(do) for name, do in own.items()}


_Reader.dispatch = _opcodes()


def load(data: bytes, path: Path, budget: int) -> Any:
    """What a pickle describes, as dictionaries, lists, tuples, strings, numbers and ``Made``.

    budget: how many opcodes it may have. Raises ConfigError, one line, for whatever is malformed or
    names what is not allowed.
    """
    try:
        return _Reader(data, budget).load()
    except ConfigError as error:
        raise ConfigError(f"{path}: not a pickle that simlab reads: {error}") from None
    except MALFORMED as error:
        kind = type(error).__name__
        raise ConfigError(f"{path}: not a readable pickle ({kind})") from error


def dimensions(value: Any, what: str) -> tuple[int, ...]:
    """A shape: a tuple or a torch.Size of at most 16 sizes. Raises ConfigError, without a path."""
    if isinstance(value, Made) and value.maker.is_("Size") and len(value.args) == 1:
        value = value.args[0]
    if (
        type(value) not in (tuple, list)
        or len(value) > MOST_DIMENSIONS
        or not all(map(_whole, value))
    ):
        raise ConfigError(f"{what}: a shape in it is not one")
    return tuple(value)


def contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether entries lie row after row; the stride of a dimension of one entry doesn't matter."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= max(size, 1)
    return True
