"""MMAs: which thread holds which element, what a descriptor points at, the products.

Fragment layouts and the descriptor are those of the PTX ISA (9.7.14.5 and 9.7.15.5). In the
comments below g is a lane's group (lane / 4) and t its place in the group (lane % 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from tests.support.ptxsim.ptx import Unsupported
from tests.support.ptxsim.scalar import Array, columns, from_bf16, toward_zero

SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}


def values(words: Array, kind: str) -> Array:
    """Return the float64 values of 16-bit words, or of TF32 ones, whose last 13 bits are unused."""
    if kind == "bf16":
        return from_bf16(words).astype(np.float64)
    if kind == "f16":
        return words.view(np.float16).astype(np.float64)
    if kind == "tf32":
        return (words & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    raise Unsupported(f"matrix of {kind}")


def product(a: Array, b: Array, c: Array, truncates: bool) -> Array:
    """Return ``a b + c`` in fp32: exact but for one rounding, or truncated as tensor cores do."""
    exact = np.matmul(a, b) + c
    return toward_zero(exact) if truncates else exact.astype(np.float32)


def left_fragment(registers: Sequence[Array], kind: str) -> Array:
    """Return ``[warps, 16, K]`` of the four registers of each thread."""
    words = columns(registers)
    if kind == "tf32":
        # a0 (g, t), a1 (g + 8, t), a2 (g, t + 4), a3 (g + 8, t + 4)
        parts = values(words, kind).reshape(-1, 8, 4, 2, 2)
        return parts.transpose(0, 4, 1, 3, 2).reshape(-1, 16, 8)
    # a0, a1 (g, 2t + i); a2, a3 (g + 8, 2t + i); a4 to a7 the same, eight columns further
    parts = values(words.view(np.uint16), kind).reshape(-1, 8, 4, 2, 2, 2)
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)


def right_fragment(registers: Sequence[Array], kind: str) -> Array:
    """Return ``[warps, K, 8]`` of the two registers of each thread."""
    words = columns(registers)
    if kind == "tf32":
        # b0 (t, g), b1 (t + 4, g)
        parts = values(words, kind).reshape(-1, 8, 4, 2)
        return parts.transpose(0, 3, 2, 1).reshape(-1, 8, 8)
    # b0, b1 (2t + i, g); b2, b3 eight rows further
    parts = values(words.view(np.uint16), kind).reshape(-1, 8, 4, 2, 2)
    return parts.transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)


def accumulator(registers: Sequence[Array]) -> Array:
    """Return fp32 ``[warps, 16, N]`` of the N / 2 registers of each thread."""
    # c0, c1 (g, 2t + i); c2, c3 (g + 8, 2t + i); c4 to c7 the same, eight columns further
    words = columns(registers).view(np.float32)
    parts = words.reshape(-1, 8, 4, len(registers) // 4, 2, 2)
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 2 * len(registers))


def accumulator_registers(c: Array) -> list[Array]:
    """Return the registers of an :func:`accumulator`."""
    count = c.shape[2] // 2
    parts = c.reshape(-1, 2, 8, count // 4, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    words = np.ascontiguousarray(parts).reshape(-1, count).view(np.uint32)
    return list(np.ascontiguousarray(words.T))


def load_matrix(words: Array, transposed: bool) -> list[Array]:
    """Return the registers of ``ldmatrix`` from 16-bit words, ``[warps, n, 8, 8]``."""
    pairs = np.ascontiguousarray(words.swapaxes(2, 3) if transposed else words).view(np.uint32)
    return [np.ascontiguousarray(pairs[:, i]).reshape(-1) for i in range(pairs.shape[1])]


def store_matrix(registers: Sequence[Array], transposed: bool) -> Array:
    """Return 16-bit words, ``[warps, n, 8, 8]``, of the registers of ``stmatrix``."""
    pairs = np.stack([register.reshape(-1, 8, 4) for register in registers], 1)
    words = np.ascontiguousarray(pairs).view(np.uint16)
    return np.ascontiguousarray(words.swapaxes(2, 3)) if transposed else words


@lru_cache(maxsize=4096)
def operand_offsets(descriptor: int, mn: int, k: int, size: int, k_major: bool) -> Array:
    """Return the shared memory address of every element, ``[mn, k]``, of a ``wgmma`` operand.

    Args:
        descriptor: 64 bits that hold where the operand begins, its strides and its swizzle.
        mn: rows of the left operand, or columns of the right one.
        k: length of the sums.
        size: bytes an element.
        k_major: whether elements along k are adjacent in memory.

    Raises:
        Unsupported: the descriptor has a base offset, or the operand is wider than its swizzle.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    swizzle = SWIZZLES[descriptor >> 62 & 3]
    if descriptor >> 49 & 7:
        raise Unsupported("matrix descriptor with a base offset")
    i, j = np.arange(mn)[:, None], np.arange(k)[None, :]
    row = swizzle or 16
    if k_major:
        # Eight rows of `row` bytes along k, then the next eight, `stride` bytes further.
        offsets = i % 8 * row + i // 8 * stride
        if not swizzle:
            offsets = offsets + j * size // 16 * leading + j * size % 16
        elif start % row + k * size > row:
            raise Unsupported("matrix operand wider than its swizzle")
        else:
            offsets = offsets + j * size
    else:
        across, along = (leading, stride) if swizzle else (stride, leading)
        offsets = i * size % row + i * size // row * across + j % 8 * row + j // 8 * along
    address: Array = start + offsets
    # Of 128 bytes: bits 4 to 6 are exchanged by bits 7 to 9 of the address itself.
    address = address ^ (address >> 3 & max(0, swizzle - 16))
    address.setflags(write=False)
    return address
