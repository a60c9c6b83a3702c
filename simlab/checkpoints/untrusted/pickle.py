"""torch's pickles read as data: nothing is imported, called or built but inert records.

No library does this: ``torch.load(weights_only=True)`` refuses the classes of a distributed
checkpoint's ``.metadata``, and torch's reader of those unpickles whatever is there. This reader knows
some thirty opcodes. A name in a pickle becomes a ``Label`` from an exact list, and an object becomes a
``PickledObject``: its constructor's label and arguments.
"""

from __future__ import annotations

import gc
import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from simlab.config import ConfigError
from simlab.config.fields import brief

# What a malformed pickle makes the reader raise; ConfigError, a ValueError, is told apart.
_MALFORMED = (IndexError, ValueError, struct.error)
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


def _label(module: object, name: object) -> Label:
    known = _LABELS.get((module, name)) if type(module) is type(name) is str else None
    if known is None:
        raise ConfigError(f"it names {brief(f'{module}.{name}')}, which is not allowed")
    return known


def _storage(pid: Any) -> StorageLabel:
    if type(pid) is tuple and len(pid) == 5:
        kind, constructor, key, _, numel = pid
        known = isinstance(constructor, Label) and constructor.name in STORAGES
        if kind == "storage" and known and type(key) is str and _is_size(numel):
            return StorageLabel(STORAGES[constructor.name], key, numel)
    raise ConfigError("a persistent id in it is not a storage")


def _construct(constructor: object, args: object) -> PickledObject | EmptyOrderedDict:
    if type(constructor) is not Label or type(args) is not tuple:
        raise ConfigError("it calls something that is not a name")
    if constructor.name == "OrderedDict":
        if args:
            raise ConfigError("an OrderedDict in it is made with arguments")
        return EmptyOrderedDict()
    return PickledObject(constructor, args)


def _build(target: object, state: object) -> None:
    if type(target) is PickledObject:
        target.state = state
    elif type(target) is not EmptyOrderedDict:
        raise ConfigError("it sets attributes of something that was not made")


def _set_items(target: object, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise ConfigError("it sets items of something that is not a dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Nothing else: the hash of nested tuples can take for ever.
        if type(key) not in (str, int, PickledObject):
            raise ConfigError(f"a dictionary's key in it is a {type(key).__name__}")
        target[key] = value


def _extend(target: object, items: list[Any]) -> None:
    if type(target) is not list:
        raise ConfigError("it appends to something that is not a list")
    target += items


def _cut(stack: list[Any], marks: list[int]) -> list[Any]:
    """Take off the stack what is above its last mark."""
    start = marks.pop()
    items = stack[start:]
    del stack[start:]
    return items


def _remember(memo: list[Any], index: int, value: object) -> None:
    if index > len(memo):  # a list that a number makes longer could be of any size
        raise ConfigError("its memo has a gap")
    memo[index : index + 1] = [value]


@dataclass(frozen=True)
class Budget:
    """The most that a pickle may take, which bounds time and memory.

    steps: its opcodes, 0.4 µs each on a slow core. objects: units of about 70 bytes: a tuple, an object
    or a number takes one, a list two, a string three (its letters are in the file), a dictionary four.
    """

    steps: int
    objects: int


_BLOCK = 1 << 16  # steps between two looks at what the pickle has taken
_OPEN = 1 << 20  # values on the stack, and marks; pickle's writers put 2000 there and then use them


def _run(data: bytes, budget: Budget) -> Any:
    """The value that a pickle describes.

    pickle's stack machine in one loop, since pure-Python ``pickle._Unpickler`` takes thrice the time
    and memory, and the C one allocates whatever a length field claims. Where bytes are missing at the
    end, slices are short, and the next opcode is an IndexError.
    """
    stack: list[Any] = []
    memo: list[Any] = []
    marks: list[int] = []
    push, pop, memoize, number = stack.append, stack.pop, memo.append, int.from_bytes
    at, room = 0, budget.objects

    for done in range(0, budget.steps, _BLOCK):
        if room < 0 or len(stack) > _OPEN or len(marks) > _OPEN:
            raise ConfigError("it holds too much")
        for _ in range(min(_BLOCK, budget.steps - done)):
            opcode = data[at]
            at += 1
            match opcode:  # the frequent ones first
                case 0x94:  # MEMOIZE
                    memoize(stack[-1])
                case 0x6A:  # LONG_BINGET
                    push(memo[number(data[at : at + 4], "little")])
                    at += 4
                case 0x68:  # BINGET
                    push(memo[data[at]])
                    at += 1
                case 0x4D:  # BININT2
                    push(data[at] | data[at + 1] << 8)
                    at += 2
                    room -= 1
                case 0x28:  # MARK
                    marks.append(len(stack))
                case 0x29:  # EMPTY_TUPLE
                    push(())
                case 0x81 | 0x52:  # NEWOBJ, REDUCE
                    args = pop()
                    stack[-1] = _construct(stack[-1], args)
                    room -= 1
                case 0x62:  # BUILD
                    state = pop()
                    _build(stack[-1], state)
                case 0x86:  # TUPLE2
                    last = pop()
                    stack[-1] = (stack[-1], last)
                    room -= 1
                case 0x75:  # SETITEMS
                    items = _cut(stack, marks)
                    _set_items(stack[-1], items)
                case 0x7D:  # EMPTY_DICT
                    push({})
                    room -= 4
                case 0x85:  # TUPLE1
                    stack[-1] = (stack[-1],)
                    room -= 1
                case 0x4E:  # NONE
                    push(None)
                case 0x4B:  # BININT1
                    push(data[at])
                    at += 1
                case 0x8C:  # SHORT_BINUNICODE
                    start, at = at + 1, at + 1 + data[at]
                    push(data[start:at].decode("utf-8", "surrogatepass"))
                    room -= 3
                case 0x58:  # BINUNICODE
                    start, at = at + 4, at + 4 + number(data[at : at + 4], "little")
                    push(data[start:at].decode("utf-8", "surrogatepass"))
                    room -= 3
                case 0x4A:  # BININT
                    push(number(data[at : at + 4], "little", signed=True))
                    at += 4
                    room -= 1
                case 0x8A:  # LONG1
                    start, at = at + 1, at + 1 + data[at]
                    push(number(data[start:at], "little", signed=True))
                    room -= 2
                case 0x88 | 0x89:  # NEWTRUE, NEWFALSE
                    push(opcode == 0x88)
                case 0x71:  # BINPUT
                    _remember(memo, data[at], stack[-1])
                    at += 1
                case 0x72:  # LONG_BINPUT
                    _remember(memo, number(data[at : at + 4], "little"), stack[-1])
                    at += 4
                case 0x74:  # TUPLE
                    push(tuple(_cut(stack, marks)))
                    room -= 1
                case 0x87:  # TUPLE3
                    three = tuple(stack[-3:])
                    del stack[-2:]
                    stack[-1] = three
                    room -= 1
                case 0x5D:  # EMPTY_LIST
                    push([])
                    room -= 2
                case 0x61:  # APPEND
                    last = pop()
                    _extend(stack[-1], [last])
                case 0x65:  # APPENDS
                    items = _cut(stack, marks)
                    _extend(stack[-1], items)
                case 0x73:  # SETITEM
                    last, key = pop(), pop()
                    _set_items(stack[-1], [key, last])
                case 0x47:  # BINFLOAT
                    push(struct.unpack(">d", data[at : at + 8])[0])
                    at += 8
                    room -= 1
                case 0x63:  # GLOBAL
                    first = data.index(b"\n", at)
                    start, at = at, data.index(b"\n", first + 1) + 1
                    push(_label(data[start:first].decode(), data[first + 1 : at - 1].decode()))
                case 0x93:  # STACK_GLOBAL
                    last = pop()
                    stack[-1] = _label(stack[-1], last)
                case 0x51:  # BINPERSID
                    stack[-1] = _storage(stack[-1])
                    room -= 1
                case 0x80:  # PROTO
                    if data[at] > pickle.HIGHEST_PROTOCOL:
                        raise ConfigError(f"its protocol is {data[at]}")
                    at += 1
                case 0x95:  # FRAME: how many bytes to read ahead
                    at += 8
                case 0x2E:  # STOP
                    return pop()
                case _:
                    raise ConfigError("an opcode in it is not allowed")
    raise ConfigError("it takes too many steps")


@contextmanager
def without_collections() -> Iterator[None]:
    """For millions of objects that stay: the collector would look at all of them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def load(data: bytes, path: Path, budget: Budget) -> Any:
    """Read a pickle as dictionaries, lists, tuples, strings, numbers and ``PickledObject``s.

    Raises ConfigError for a pickle that is malformed, takes more than the budget, or has a name that
    isn't allowed.
    """
    try:
        with without_collections():
            return _run(data, budget)
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
