"""What ``registers.py`` takes of Gluon: Hopper's shared memory and its products.

Triton's interpreter does not know Gluon. There, an imitation runs one program as if by one thread,
and shows each reader of shared memory only what the hardware owes it: threads what was written
before the last barrier, products what a proxy fence came behind as well. What is owed to nobody is
NaN, and so is a product whose operand was overwritten before it was waited for.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.experimental.gluon.language import (
    BlockedLayout,
    DotOperandLayout,
    NVMMADistributedLayout,
    NVMMASharedLayout,
    SliceLayout,
)

__all__ = [
    "BlockedLayout",
    "DotOperandLayout",
    "NVMMADistributedLayout",
    "NVMMASharedLayout",
    "SliceLayout",
    "allocate_shared_memory",
    "arange",
    "barrier",
    "fence_async_shared",
    "full",
    "jit",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

if not triton.knobs.runtime.interpret:
    from triton.experimental.gluon import jit
    from triton.experimental.gluon.language import allocate_shared_memory, arange, full
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    # Gluon's own name for it changes from Triton 3.6 to 3.7.
    from triton.language import debug_barrier as barrier
else:
    from triton import jit

    # Of the program that a thread runs.
    _program = threading.local()

    class SharedMemory:
        """A tile in shared memory."""

        def __init__(self, dtype: Any, shape: Sequence[int]):
            nothing = tl.full(shape, float("nan"), tl.float32).to(dtype)
            self.written = self.of_threads = self.fenced = self.of_products = nothing
            if not hasattr(_program, "tiles"):
                _program.tiles = weakref.WeakSet()
            _program.tiles.add(self)

        def store(self, value: Any) -> None:
            """Write the tile; for others to see behind the next barrier."""
            assert value.dtype == self.written.dtype
            self.written = value

        def load(self, layout: Any) -> Any:
            """Read the tile."""
            return self.of_threads

    class Product(NamedTuple):
        """A product under way: of m and what a tile is, added to z, which may be one itself."""

        m: Any
        state: SharedMemory
        read: Any
        z: Any

    def arange(start: int, end: int, layout: Any) -> Any:
        """Give a range."""
        return tl.arange(start, end)

    def full(shape: Sequence[int], value: float, dtype: Any, layout: Any) -> Any:
        """Give a tile of one number."""
        return tl.full(shape, value, tl.float32).to(dtype)

    def allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: Any) -> SharedMemory:
        """Give a tile in shared memory, of what was there before."""
        return SharedMemory(dtype, shape)

    def fence_async_shared() -> None:
        """Let products see what was written, once the barrier lies behind."""
        for tile in _program.tiles:
            tile.fenced = tile.written

    def barrier() -> None:
        """Let all threads see what was written."""
        for tile in _program.tiles:
            tile.of_threads = tile.written
            tile.of_products = tile.fenced

    def warpgroup_mma(m: Any, state: SharedMemory, z: Any, is_async: bool) -> Product:
        """Begin ``m state + z``."""
        return Product(m, state, state.of_products, z)

    def warpgroup_mma_wait(num_outstanding: int, deps: Sequence[Product]) -> Any:
        """Give the product when it is made, or as it is while as many may be under way."""
        (product,) = deps
        return product if num_outstanding else _made(product)

    def _made(product: Any) -> Any:
        if not isinstance(product, Product):
            return product
        z = _made(product.z)
        if product.state.written is not product.read:
            return tl.full(z.shape, float("nan"), tl.float32)
        # The interpreter would multiply the bit patterns of bf16 numbers.
        return tl.dot(product.m.to(tl.float32), product.read.to(tl.float32), z)
