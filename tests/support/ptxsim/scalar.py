"""Instructions of one thread: what each computes from its operands, for all threads of a CTA.

A register is an array of unsigned integers (of bool for a predicate) with an element for each
thread, or with a single one that all threads share. A function of this module takes such arrays and
returns one, of any dtype of the result's width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.support.ptxsim.ptx import Unsupported

Array = np.ndarray[Any, Any]
Function = Callable[..., Array]

INTEGERS = {f"{kind}{width}" for kind in "sub" for width in (16, 32, 64)}
BITS = {kind: int(kind[1:]) for kind in INTEGERS | {"b8", "u8", "s8", "f16", "f32", "f64"}}
BITS |= {"bf16": 16, "f16x2": 32, "bf16x2": 32, "f32x2": 64, "pred": 1}
UNSIGNED: dict[int, Any] = {
    1: np.bool_,
    8: np.uint8,
    16: np.uint16,
    32: np.uint32,
    64: np.uint64,
}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
HALVES = ("f16", "bf16")


def typed(x: Array, kind: str) -> Array:
    """Return a register's elements as values of a PTX type."""
    if kind == "f32":
        return x.view(np.float32)
    return x.view(SIGNED[BITS[kind]]) if kind[0] == "s" else x


def of_values(function: Function, kind: str) -> Function:
    """Return a function of registers that takes their elements as values of a PTX type."""
    if kind != "f32" and kind[0] != "s":
        return function
    dtype = np.float32 if kind == "f32" else SIGNED[BITS[kind]]
    return lambda *xs: function(*[x.view(dtype) for x in xs])


def columns(registers: Sequence[Array]) -> Array:
    """Return registers side by side, ``[threads, n]``."""
    return np.ascontiguousarray(np.array(registers).T)


def from_bf16(x: Array) -> Array:
    """Widen bf16 to fp32."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_half(x: Array, kind: str) -> Array:
    """Widen ``f16`` or ``bf16`` to fp32."""
    return from_bf16(x) if kind == "bf16" else x.view(np.float16).astype(np.float32)


def to_half(x: Array, kind: str) -> Array:
    """Round fp32 to ``f16`` or ``bf16``, to nearest even; NaN becomes the canonical one."""
    if kind == "bf16":
        word = x.view(np.uint32)
        odd = (word >> np.uint32(16)) & np.uint32(1)
        rounded = ((word + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    else:
        rounded = x.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def toward_zero(x: Array) -> Array:
    """Truncate float64 to fp32."""
    nearest = x.astype(np.float32)
    larger = np.abs(nearest.astype(np.float64)) > np.abs(x)
    return np.where(larger, np.nextafter(nearest, np.float32(0)), nearest)


def _fma(a: Array, b: Array, c: Array) -> Array:
    # Rounded once, but for the rare tie that float64 makes.
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)


def _flush(x: Array) -> Array:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


COMPARE: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
# Of NaN all of these are false, as those of NumPy.
ORDERED = {how: COMPARE[how] for how in ("eq", "lt", "le", "gt", "ge")} | {
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b))
}


def _compare(how: str, kind: str) -> Function:
    if kind in HALVES:
        compare = _compare(how, "f32")
        return lambda *xs: compare(*(from_half(x, kind).view(np.uint32) for x in xs))
    functions = COMPARE if kind in INTEGERS else ORDERED if kind == "f32" else {}
    if how not in functions:
        raise Unsupported(f"setp.{how}.{kind}")
    return of_values(functions[how], kind)


def _compare_halves(how: str, kind: str, shift: int) -> Function:
    """Return the function of the lower or the upper halves of ``setp.gt.f16x2 p|q, a, b``."""
    compare = _compare(how, kind.removesuffix("x2"))
    return lambda *xs: compare(*((x >> np.uint32(shift)).astype(np.uint16) for x in xs))


def _shift(root: str, kind: str) -> Function:
    width = BITS[kind]

    def shift(a: Array, count: Array) -> Array:
        a = typed(a, kind)
        # Beyond the width nothing is left, or of a signed number its sign.
        by = np.minimum(count, width - 1).astype(a.dtype)
        out = a << by if root == "shl" else a >> by
        if root == "shl" or kind[0] != "s":
            out = np.where(count < width, out, a.dtype.type(0))
        return out

    return shift


def _bfe(kind: str) -> Function:
    if kind not in ("u32", "s32"):
        raise Unsupported(f"bfe.{kind}")

    def extract(a: Array, start: Array, count: Array) -> Array:
        first, length = (start & 255).astype(np.int64), (count & 255).astype(np.int64)
        wide = typed(a, kind).astype(np.int64)
        # Past the end of a signed number there is its sign, of an unsigned one 0.
        field = wide >> np.minimum(first, 63)
        mask = (np.int64(1) << np.minimum(length, 32)) - 1
        out = field & mask
        if kind == "s32":
            sign = (wide >> np.minimum(first + np.maximum(length, 1) - 1, 31)) & 1
            out = np.where((sign == 1) & (length > 0), out | ~mask, out)
        return out.astype(np.uint64).astype(np.uint32)

    return extract


def _select(a: Array, b: Array, p: Array) -> Array:
    return np.where(p, a, b)


def _prmt(a: Array, b: Array, selector: Array) -> Array:
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out: Array = np.zeros(1, np.uint32)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        shift = (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8)
        byte = (source >> shift).astype(np.uint8)
        sign = np.where(byte & 0x80, np.uint8(255), np.uint8(0))
        out = out | np.where(nibble & 8, sign, byte).astype(np.uint32) << np.uint32(8 * i)
    return out


def _convert(to: str, source: str, rounding: list[str]) -> Function:
    rounds = rounding == ["rn"]
    if to in ("bf16x2", "f16x2") and source == "f32" and rounds:
        half = to[:-2]
        return lambda high, low: (
            to_half(low.view(np.float32), half).astype(np.uint32)
            | to_half(high.view(np.float32), half).astype(np.uint32) << np.uint32(16)
        )
    if to in HALVES and source == "f32" and rounds:
        return lambda x: to_half(x.view(np.float32), to)
    if to == "f32" and source in HALVES and not rounding:
        return lambda x: from_half(x, source)
    if {to, source} <= INTEGERS | {"u8", "s8"} and not rounding:
        width, kinds = BITS[source], SIGNED if source[0] == "s" else UNSIGNED
        # Sign or zero extension, or the lower bits.
        return lambda x: x.astype(UNSIGNED[width]).view(kinds[width]).astype(kinds[BITS[to]])
    raise Unsupported(f"cvt.{'.'.join(rounding)}.{to}.{source}")


FLOATS: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fma": _fma,
    "neg": np.negative,
    "abs": np.abs,
    "tanh": np.tanh,
    "ex2": lambda a: np.exp2(a.astype(np.float64)).astype(np.float32),
}
OF_INTEGERS: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "neg": lambda a: ~a + a.dtype.type(1),
    "min": np.minimum,
    "max": np.maximum,
}
LOGIC: dict[str, Function] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}
# Operands of one type each; all other instructions have two.
OPERANDS = {"not": 1, "neg": 1, "abs": 1, "tanh": 1, "ex2": 1, "mad": 3, "fma": 3}


def _arithmetic(op: tuple[str, ...]) -> Function:
    root, kind, modifiers = op[0], op[-1], set(op[1:-1])
    if kind == "f32" and root in FLOATS and modifiers <= {"rn", "ftz", "approx", "full"}:
        function = FLOATS[root]
        if "ftz" not in modifiers:
            return of_values(function, kind)
        return of_values(lambda *xs: _flush(function(*[_flush(x) for x in xs])), kind)
    if kind == "f32x2":
        return _in_pairs(op)
    if kind not in INTEGERS or root not in OF_INTEGERS:
        raise Unsupported(".".join(op))
    function = OF_INTEGERS[root]
    if "wide" in modifiers:
        wide = (SIGNED if kind[0] == "s" else UNSIGNED)[2 * BITS[kind]]

        def product(a: Array, b: Array, *c: Array) -> Array:
            out = typed(a, kind).astype(wide) * typed(b, kind).astype(wide)
            return out.view(c[0].dtype) + c[0] if c else out

        return product
    if modifiers != ({"lo"} if root in ("mul", "mad") else set()):
        raise Unsupported(".".join(op))
    return of_values(function, kind)


def _of_halves(op: tuple[str, ...]) -> Function:
    """Return the function of ``add.f32.f16 d, a, c``, whose last operand alone is fp32."""
    function = _arithmetic(op[:-1])

    def mixed(*xs: Array) -> Array:
        return function(*(from_half(x, op[-1]).view(np.uint32) for x in xs[:-1]), xs[-1])

    return mixed


def _in_pairs(op: tuple[str, ...]) -> Function:
    """Return the function of ``add.f32x2``, on the lower and upper halves of 64 bits."""
    function = _arithmetic((*op[:-1], "f32"))

    def pairs(*xs: Array) -> Array:
        halves = (
            function(*((x >> np.uint64(shift)).astype(np.uint32) for x in xs)) for shift in (0, 32)
        )
        low, high = (half.view(np.uint32).astype(np.uint64) for half in halves)
        return low | high << np.uint64(32)

    return pairs


def scalar(op: tuple[str, ...]) -> tuple[tuple[Function, ...], str, tuple[str, ...]]:
    """Return functions of an instruction, the type of its results, and those of its operands.

    There is a function for each result.

    Raises:
        Unsupported: the emulator does not know the instruction.
    """
    root, kind = op[0], op[-1]
    kinds = (kind,) * OPERANDS.get(root, 2)
    if root == "setp" and len(op) == 3:
        if kind.endswith("x2"):
            halves = tuple(_compare_halves(op[1], kind, shift) for shift in (0, 16))
            return halves, "pred", kinds
        return (_compare(op[1], kind),), "pred", kinds
    if root == "cvt":
        function = _convert(op[-2], kind, list(op[1:-2]))
        return (function,), op[-2], (kind,) * (2 if op[-2].endswith("x2") else 1)
    if root in FLOATS and kind in HALVES and op[-2] == "f32":
        return (_of_halves(op),), "f32", (*kinds[:-1], "f32")
    if root in FLOATS or root in OF_INTEGERS:
        function = _arithmetic(op)
        if "wide" not in op:
            return (function,), kind, kinds
        double = f"{kind[0]}{2 * BITS[kind]}"
        return (function,), double, kinds[:2] + (double,) * (len(kinds) - 2)
    if len(op) != 2 or kind not in INTEGERS | {"pred", "f32"}:
        raise Unsupported(".".join(op))
    if root == "selp":
        return (_select,), kind, (kind, kind, "pred")
    if kind != "f32" and root in LOGIC:
        return (LOGIC[root],), kind, kinds
    if kind in INTEGERS and root in ("shl", "shr"):
        return (_shift(root, kind),), kind, (kind, "u32")
    if kind in INTEGERS and root == "bfe":
        return (_bfe(kind),), kind, (kind, "u32", "u32")
    if kind == "b32" and root == "prmt":
        return (_prmt,), kind, (kind, kind, "u32")
    raise Unsupported(".".join(op))
