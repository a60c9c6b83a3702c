"""torch's pickles read as data: nothing is imported, called or built but inert records.

No library does this: ``torch.load(weights_only=True)`` refuses the classes of a distributed
checkpoint's ``.metadata``, and torch's reader of those unpickles whatever is there. This reader knows
some thirty opcodes. A name in a pickle becomes a ``Label`` from an exact list, and an object becomes a
``PickledObject``: its constructor's label and arguments. Python's own pure unpickler runs the stack
machine; the C one allocates whatever a length field claims.
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

from simlab.config import ConfigError
from simlab.config.fields import brief

# What a malformed pickle makes the unpickler raise; ConfigError, a ValueError, is told apart.
_MALFORMED = (
    pickle.UnpicklingError, EOFError, IndexError, KeyError, TypeError, AttributeError, ValueError,
    OverflowError, struct.error,
)  # fmt: skip
MAX_DIMENSIONS = 16

STORAGES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
DTYPE_BY_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in STORAGES.values()}
DTYPE_BY_NAME |= {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = frozenset(
    {("torch", name) for name in (*STORAGES, *DTYPE_BY_NAME, "Size")}
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
class Label:
    """The name of a class or function in a pickle. It can't be called."""

    module: str
    name: str

    def is_(self, *names: str) -> bool:
        """True if its last part is one of these."""
        return self.name in names


@dataclass(eq=False, slots=True)
class PickledObject:
    """An object that a pickle describes, not built: its constructor, arguments and state.

    Compared and hashed by identity. The arguments aren't copied or traversed: memo references let a
    small file describe a structure of unlimited size.
    """

    constructor: Label
    args: tuple[Any, ...]
    state: Any = None

    def fields(self) -> dict[Any, Any]:
        """The state if it is a dictionary, as a dataclass's is; else an empty one."""
        return self.state if type(self.state) is dict else {}


@dataclass(frozen=True, eq=False, slots=True)
class StorageLabel:
    """A tensor's storage: the archive's record that holds it, and the entries that it claims."""

    dtype: torch.dtype
    key: str
    numel: int


class EmptyOrderedDict(dict[Any, Any]):
    """An OrderedDict, empty at first; attributes that a pickle sets on it are dropped."""


_LABELS = {(module, name): Label(module, name) for module, name in ALLOWED}


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


class _Reader(pickle._Unpickler):
    """The pure-Python unpickler, with only the opcodes that torch's pickles need."""

    dispatch: ClassVar[dict[int, Callable[..., None]]]
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, data: bytes, budget: int) -> None:
        super().__init__(io.BytesIO(data))
        self.left = budget  # opcodes that may still come: bounds time and memory

    def find_class(self, module: str, name: str) -> Any:
        known = _LABELS.get((module, name))
        if known is None:
            raise ConfigError(f"it names {brief(f'{module}.{name}')}, which is not allowed")
        return known

    def persistent_load(self, pid: Any) -> StorageLabel:
        if type(pid) is tuple and len(pid) == 5:
            kind, constructor, key, _, numel = pid
            known = isinstance(constructor, Label) and constructor.name in STORAGES
            if kind == "storage" and known and type(key) is str and _is_size(numel):
                return StorageLabel(STORAGES[constructor.name], key, numel)
        raise ConfigError("a persistent id in it is not a storage")

    def construct(self, constructor: object, args: object) -> PickledObject | EmptyOrderedDict:
        if not isinstance(constructor, Label) or type(args) is not tuple:
            raise ConfigError("it calls something that is not a name")
        if constructor.is_("OrderedDict"):
            if args:
                raise ConfigError("an OrderedDict in it is made with arguments")
            return EmptyOrderedDict()
        return PickledObject(constructor, args)

    def do_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.construct(self.stack[-1], args)

    def do_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, PickledObject):
            target.state = state
        elif not isinstance(target, EmptyOrderedDict):
            raise ConfigError("it sets attributes of something that was not made")

    def set_items(self, target: object, items: list[Any]) -> None:
        if not isinstance(target, dict):
            raise ConfigError("it sets items of something that is not a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nothing else: the hash of nested tuples can take for ever.
            if type(key) not in (str, int, PickledObject):
                raise ConfigError(f"a dictionary's key in it is a {type(key).__name__}")
            target[key] = value

    def do_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items(self.stack[-1], [key, value])

    def do_setitems(self) -> None:
        items = self.pop_mark()
        self.set_items(self.stack[-1], items)


def _within_budget(load: Callable[[Any], None]) -> Callable[[_Reader], None]:
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
    table |= {code[name]: _within_budget(theirs[code[name]]) for name in _ALLOWED.split()}
    own = {
        pickle.REDUCE: _Reader.do_reduce,
        pickle.NEWOBJ: _Reader.do_reduce,
        pickle.BUILD: _Reader.do_build,
        pickle.SETITEM: _Reader.do_setitem,
        pickle.SETITEMS: _Reader.do_setitems,
    }
    return table | {name[0]: _within_budget(do) for name, do in own.items()}


_Reader.dispatch = _opcodes()


def load(data: bytes, path: Path, budget: int) -> Any:
    """Read a pickle as dictionaries, lists, tuples, strings, numbers and ``PickledObject``s.

    budget: the most opcodes that it may have. Raises ConfigError for a pickle that is malformed, too
    long, or has a name that isn't allowed.
    """
    try:
        return _Reader(data, budget).load()
    except ConfigError as error:
        raise ConfigError(f"{path}: not a pickle that simlab reads: {error}") from None
    except _MALFORMED as error:
        kind = type(error).__name__
        raise ConfigError(f"{path}: not a readable pickle ({kind})") from error


def arguments_of(value: object, constructor: str) -> tuple[Any, ...]:
    """The arguments of a pickled object of this class or function; none for any other value."""
    known = isinstance(value, PickledObject) and value.constructor.is_(constructor)
    return value.args if isinstance(value, PickledObject) and known else ()


def check_dtype(dtype: torch.dtype, what: str) -> None:
    """Refuse a dtype that isn't one of FLOAT_DTYPES. Raises ConfigError."""
    if dtype not in FLOAT_DTYPES:
        allowed, has = (", ".join(str(d)[6:] for d in of) for of in (FLOAT_DTYPES, [dtype]))
        raise ConfigError(f"{what} is {has}; allowed: {allowed}")


def dimensions(value: Any, what: str) -> tuple[int, ...]:
    """A shape: a tuple or a torch.Size of at most 16 sizes. Raises ConfigError, without a path."""
    args = arguments_of(value, "Size")
    value = args[0] if len(args) == 1 else value
    if (
        type(value) not in (tuple, list)
        or len(value) > MAX_DIMENSIONS
        or not all(map(_is_size, value))
    ):
        raise ConfigError(f"{what}: a shape in it is not one")
    return tuple(value)


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """True if entries are in row-major order; a dimension of size 1 may have any stride."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= max(size, 1)
    return True
