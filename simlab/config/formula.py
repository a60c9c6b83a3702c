"""A residual step as a user writes it, ``N(2*x + F(N(x)))``: read by a parser, never run as Python.

Words: x the stream, x0 the embedding, F the sublayer, N a norm, L the depth in blocks, l the block
from 1. A vector can be scaled by a number and added to a vector; so a formula is a sum of parts, each a
number times x, x0, N(a sum) or F(a sum). Numbers are made of numbers, L and l by + - * / and sqrt.
F stands once: of a matrix that acts twice, neither theory nor the weightless engine knows the law.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NoReturn

from simlab.config.errors import ConfigError
from simlab.config.names import nearest

MOST_CHARACTERS = 200  # which bounds nesting, too
LARGEST_FACTOR = 1e6
_ALLOWED = "allowed: x, x0, F(…), N(…), numbers, L, l, sqrt(number), + - * / and parentheses"
_ROOTS = "; L squared is L*L, and its fourth root sqrt(sqrt(L))"
_SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_FUNCTIONS, _NUMBERS, _VECTORS = ("F", "N", "sqrt"), ("L", "l"), ("x", "x0")
_CALLED = {
    "norm": "N", "rmsnorm": "N", "layernorm": "N", "ln": "N", "depth": "L", "block": "l", "layer": "l",
    "mlp": "F", "attn": "F", "attention": "F", "sublayer": "F", "embedding": "x0",
}  # fmt: skip

# A number: itself, "L" or "l", or an operation and its one or two numbers.
Number = float | str | tuple[str, "Number"] | tuple[str, "Number", "Number"]


@dataclass(frozen=True)
class Summand:
    """A summand: ``factor`` times x, x0, N(inner) or F(inner), as ``of`` says.

    norm: the name of N's module. The part with F is the last of its sum.
    """

    factor: Number
    of: str
    inner: tuple[Summand, ...] = ()
    norm: str = ""

    def has(self, of: str) -> bool:
        """True if x, x0, F or N stands anywhere in it."""
        return any(part.of == of for part in every((self,)))


Sum = tuple[Summand, ...]


def every(parts: Sum) -> Iterator[Summand]:
    """All parts of a sum and of the sums inside it, in the order in which a step computes them."""
    for part in parts:
        yield from every(part.inner)
        yield part


@dataclass(frozen=True)
class Formula:
    """A formula that has been read.

    parts: the whole sum. joined: the sum, it or one inside it, at which the part with F is added to
    the others. norms, normalises: as in ``Scheme``.
    """

    parts: Sum
    joined: Sum
    norms: tuple[str, ...]
    normalises: str | None

    def factors(self, depth: int, block: int) -> tuple[float, ...]:
        """Every part's number, in the order of ``every``. block: from 1."""
        return tuple(value_of(part.factor, depth, block) for part in every(self.parts))

    @property
    def starts(self) -> bool:
        """True if x0 stands in it."""
        return any(part.has("x0") for part in self.parts)


def value_of(number: Number, depth: int, block: int) -> float:
    """A number with L = depth and l = block, from 1; NaN for a division by 0 and the root of −1."""
    if isinstance(number, float):
        return number
    if isinstance(number, str):
        return float(depth if number == "L" else block)
    left = value_of(number[1], depth, block)
    if len(number) == 2:
        return math.sqrt(left) if left >= 0 else math.nan
    right = value_of(number[2], depth, block)
    if number[0] == "/":
        return left / right if right else math.nan
    if number[0] == "*":
        return left * right
    return left + right if number[0] == "+" else left - right


@cache
def formula_of(text: str) -> Formula:
    """Read a formula. Raises ConfigError: where it goes wrong, and what is allowed."""
    if not text.strip():
        raise ConfigError(f"empty; {_ALLOWED}, as in x + F(N(x))")
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{len(text)} characters; allowed: at most {MOST_CHARACTERS}")
    parts = _Reader(re.sub(r"\s", " ", text)).read()
    joined = _joined(parts)
    parts, joined, norms = _named(parts, joined)
    return Formula(parts, joined, norms, _normalises(parts, joined))


def refuse_factors(text: str, depth: int) -> None:
    """Raises ConfigError where, in any block, a factor isn't a number of reasonable size."""
    for part in every(formula_of(text).parts):
        with_block = _has_block(part.factor)
        for block in range(1, depth + 1 if with_block else 2):
            value = value_of(part.factor, depth, block)
            if not abs(value) <= LARGEST_FACTOR:
                where = f"with L={depth}" + f" and l={block}" * with_block
                what = f"{part.of}(…)" if part.inner else part.of
                undefined = "not a number, as 1/0 and sqrt(-1) aren't"
                found = undefined if math.isnan(value) else f"{value:g}"
                limits = f"allowed: -{LARGEST_FACTOR:g} to {LARGEST_FACTOR:g}"
                raise ConfigError(f"{where} the factor of {what} is {found}; {limits}")


def _has_block(number: Number) -> bool:
    return number == "l" or (isinstance(number, tuple) and any(map(_has_block, number[1:])))


class _Reader:
    """Reads one text. An expression is a number, or a vector as a list of parts."""

    def __init__(self, text: str) -> None:
        self.text = text

    def fail(self, where: ast.AST | int, why: str) -> NoReturn:
        """where: an expression of the text; or a character's index."""
        at = where if isinstance(where, int) else getattr(where, "col_offset", 0)
        raise ConfigError(f"at character {at + 1} ({self.text[at : at + 12].rstrip()}): {why}")

    def read(self) -> Sum:
        """The whole text's sum. Raises ConfigError."""
        if odd := re.search(r"[^A-Za-z0-9_. +*/()-]", self.text):
            said = {
                "=": "; write only what stands after the =",
                "^": _ROOTS,
                "−": "; minus is -", "×": "; times is *", "·": "; times is *",
            }  # fmt: skip
            self.fail(odd.start(), f"no such sign; {_ALLOWED}{said.get(odd[0], '')}")
        for found in re.finditer(r"(?<![\w.])\.?\d(?:[eE][+-]|[\w.])*", self.text):
            if not re.fullmatch(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", found[0]):
                self.fail(found.start(), "not a number; a product is 2*x")
        text = self.text.lstrip()
        before = len(self.text) - len(text)
        try:
            tree = ast.parse(text, mode="eval").body
        # Python's parser raises MemoryError or RecursionError of deep nesting, ValueError of NUL bytes.
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            offset = getattr(error, "offset", None) or len(text)  # 0: at its end
            why = "has no partner" if text[offset - 1] in "()" else "not a formula from here on"
            self.fail(before + min(offset, len(text)) - 1, f"{why}; {_ALLOWED}")
        for node in ast.walk(tree):
            if hasattr(node, "col_offset"):
                node.col_offset += before
        vector = self.expression(tree)
        if not isinstance(vector, list):
            self.fail(before, "a number; a step gives a vector, as x + F(N(x)) does")
        return _merged(vector)

    def expression(self, node: ast.expr) -> Number | list[Summand]:
        """A number or a vector. Raises ConfigError."""
        if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
            return self.operation(node, _SIGNS[type(node.op)])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            self.fail(node, f"no powers{_ROOTS}; {_ALLOWED}")
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
            of = self.expression(node.operand)
            return of if isinstance(node.op, ast.UAdd) else _times(-1.0, of)
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.Name):
            if node.id in _FUNCTIONS:
                self.fail(node, f"{node.id} needs something in parentheses, as {node.id}(x)")
            self.known(node, node.id, (*_VECTORS, *_NUMBERS))
            return node.id if node.id in _NUMBERS else [Summand(1.0, node.id)]
        if isinstance(node, ast.Constant) and type(value := node.value) in (int, float):
            return float(value)  # type: ignore[arg-type]  # bool is an int, too
        self.fail(node, f"not of a formula; {_ALLOWED}")

    def known(self, node: ast.AST, name: str, names: tuple[str, ...]) -> None:
        """Refuse a name that isn't one of ``names``."""
        if name not in names:
            meant = _CALLED.get(name.lower().replace("_", ""))
            near = f"; did you mean {meant}?" if meant in names else nearest(name, names)
            self.fail(node, f"no such name; {_ALLOWED}{near}")

    def call(self, node: ast.Call) -> Number | list[Summand]:
        """F(vector), N(vector) or sqrt(number)."""
        if not isinstance(node.func, ast.Name):
            self.fail(node, "not a function; a product is 2*(x + x0)")
        name = node.func.id
        if name in (*_VECTORS, *_NUMBERS):
            self.fail(node, f"{name} isn't a function; a product is 2*x")
        self.known(node, name, _FUNCTIONS)
        if len(node.args) != 1 or node.keywords:
            self.fail(node, f"{name} takes one thing, as {name}(x)")
        of = self.expression(node.args[0])
        if name == "sqrt":
            if isinstance(of, list):
                self.fail(node, "sqrt takes a number, not a vector")
            return _folded(("sqrt", of))
        if not isinstance(of, list):
            self.fail(node, f"{name} takes a vector, as {name}(x), not a number")
        return [Summand(1.0, name, _merged(of))]

    def operation(self, node: ast.BinOp, sign: str) -> Number | list[Summand]:
        """A sum, a difference, a product or a quotient."""
        left, right = self.expression(node.left), self.expression(node.right)
        if sign in "+-":
            if isinstance(left, list) and isinstance(right, list):
                return left + (right if sign == "+" else _times(-1.0, right))
            if isinstance(left, list) or isinstance(right, list):
                self.fail(node, f"a number and a vector, which {sign} can't join; a product is 2*x")
            return _folded((sign, left, right))
        if isinstance(right, list):
            if sign == "/":
                self.fail(node, "divides by a vector; allowed: by a number")
            if isinstance(left, list):
                self.fail(node, "multiplies two vectors; allowed: a number and a vector")
            return _times(left, right)
        if sign == "/" and not isinstance(left, list):
            return _folded(("/", left, right))
        return _times(_folded(("/", 1.0, right)) if sign == "/" else right, left)


def _folded(number: Number) -> Number:
    """An operation, or its value where it has neither L nor l."""
    known = isinstance(number, tuple) and all(isinstance(each, float) for each in number[1:])
    return value_of(number, 1, 1) if known else number


def _times(factor: Number, of: Number | list[Summand]) -> Any:
    """A number or a vector, times a number."""
    if isinstance(of, list):
        return [replace(part, factor=_times(factor, part.factor)) for part in of]
    return of if factor == 1.0 else factor if of == 1.0 else _folded(("*", factor, of))


def _merged(vector: list[Summand]) -> Sum:
    """A sum in which x and x0 stand once, and the part with F last."""
    parts: list[Summand] = []
    for part in vector:
        at = next((i for i, p in enumerate(parts) if p.of == part.of and not part.inner), None)
        if at is None:
            parts.append(part)
        else:
            parts[at] = replace(part, factor=_folded(("+", parts[at].factor, part.factor)))
    return tuple(sorted(parts, key=lambda part: part.has("F")))


def _joined(parts: Sum) -> Sum:
    """The sum at which F's part is added: the innermost that has x beside it, else the innermost.

    Raises ConfigError where F stands never or twice, or where nothing is added to it.
    """
    count = sum(part.of == "F" for part in every(parts))
    if count != 1:
        raise ConfigError(f"has F {count} times; allowed: once, as in x + F(N(x))")
    around, inside = [], parts
    while inside[-1].has("F"):  # from the outermost in
        if len(inside) > 1:
            around.append(inside)
        if inside[-1].of == "F":
            break
        inside = inside[-1].inner
    with_x = [each for each in around if any(part.has("x") for part in each[:-1])]
    if not around:
        raise ConfigError("adds F's output to nothing; allowed: a residual step, as x + F(N(x))")
    return (with_x or around)[-1]


def _named(parts: Sum, joined: Sum) -> tuple[Sum, Sum, tuple[str, ...]]:
    """The sums with a module's name for each N, and the names in the order in which they act.

    ``norm_in`` is the one whose output F gets, alone; ``norm_out`` the outermost around F; any other
    ``norm_1``, ``norm_2``, …
    """
    names: list[str] = []
    found: list[Sum] = []

    def of_sum(parts: Sum, outermost: bool, of_sublayer: bool) -> Sum:
        named = []
        for part in parts:
            around, last = outermost and part.has("F"), len(parts) == 1
            name = "norm_in" if of_sublayer and last else "norm_out" if around else ""
            inner = of_sum(part.inner, False, part.of == "F")
            if part.of == "N":
                others = sum(each not in ("norm_in", "norm_out") for each in names)
                name = name or f"norm_{others + 1}"
                names.append(name)
            named.append(replace(part, inner=inner, norm=name if part.of == "N" else ""))
        out = tuple(named)
        if parts == joined:
            found.append(out)
        return out

    whole = of_sum(parts, True, False)
    return whole, found[-1], tuple(names)


def _normalises(parts: Sum, joined: Sum) -> str | None:
    """``stream`` of N(… + F(…)), ``skip`` of N(x) + F(…), ``branch`` of x + N(F(…)), else None."""
    *skip, branch = parts
    if not skip and branch.of == "N" and branch.factor == 1.0 and branch.inner == joined:
        return "stream"
    if any(part.of == "N" for part in skip):
        return "skip"
    stream, added = ([(part.of, part.factor) for part in some] for some in (skip, [branch]))
    inside = [(part.of, part.factor) for part in branch.inner]
    plain = stream == [("x", 1.0)] and added == [("N", 1.0)] and inside == [("F", 1.0)]
    return "branch" if plain else None
