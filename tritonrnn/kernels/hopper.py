"""What ``registers.py`` takes of Gluon: Hopper's shared memory and its products.

Triton's interpreter does not know Gluon. There, an imitation runs one program as if by one thread,
and shows each reader of shared memory only what the hardware owes it: threads what was written
before the last barrier, products what a proxy fence came behind as well. What is owed to nobody is
NaN, and so is what is written over a tile that others may still be reading: since it was read there
has been no barrier, or the product that reads it has not been waited for.
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
    "async_copy_global_to_shared",
    "barrier",
    "commit_group",
    "fence_async_shared",
    "full",
    "jit",
    "wait_group",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]

if not triton.knobs.runtime.interpret:
    from triton.experimental.gluon import jit
    from triton.experimental.gluon.language import allocate_shared_memory, arange, full
    from triton.experimental.gluon.language.nvidia.ampere.async_copy import (
        async_copy_global_to_shared,
        commit_group,
        wait_group,
    )
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

    # Gluon's own name for it changes from Triton 3.6 to 3.7.
    from triton.language import debug_barrier as barrier
else:
    from triton import jit

    class _Program(threading.local):
        """What a thread's program has in shared memory, and what it has sent for by groups."""

        def __init__(self) -> None:
            self.tiles: weakref.WeakSet[SharedMemory] = weakref.WeakSet()
            self.sent: list[list[tuple[SharedMemory, Any]]] = [[]]

    class SharedMemory:
        """A tile in shared memory."""

        def __init__(self, dtype: Any, shape: Sequence[int]):
            self.nothing = tl.full(shape, float("nan"), tl.float32).to(dtype)
            self.written = self.of_threads = self.fenced = self.of_products = self.nothing
            # Since the last barrier.
            self.is_read = False
            _program.tiles.add(self)

        def store(self, value: Any) -> None:
            """Write the tile; for others to see behind the next barrier."""
            assert value.dtype == self.written.dtype
            self.written = self.nothing if self.is_read else value
            self.of_threads = self.nothing

        def load(self, layout: Any) -> Any:
            """Read the tile."""
            self.is_read = True
            return self.of_threads

    class Product(NamedTuple):
        """A product under way: of m and what a tile is, added to z, which may be one itself."""

        m: Any
        state: SharedMemory
        read: Any
        z: Any

    _program = _Program()

    def arange(start: int, end: int, layout: Any) -> Any:
        """Give a range."""
        return tl.arange(start, end)

    def full(shape: Sequence[int], value: float, dtype: Any, layout: Any) -> Any:
        """Give a tile of one number."""
        return tl.full(shape, value, tl.float32).to(dtype)

    def allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: Any) -> SharedMemory:
        """Give a tile in shared memory, of what was there before."""
        return SharedMemory(dtype, shape)

    def async_copy_global_to_shared(tile: SharedMemory, pointers: Any, mask: Any) -> None:
        """Send for a tile, which is neither the old nor the new one until it is waited for."""
        value = tile.nothing if tile.is_read else tl.load(pointers, mask=mask, other=0.0)
        tile.of_threads = tile.nothing
        _program.sent[-1].append((tile, value))

    def commit_group() -> None:
        """End a group of what was sent for."""
        _program.sent.append([])

    def wait_group(num_outstanding: int) -> None:
        """Wait for all groups but the last ones."""
        while len(_program.sent) - 1 > num_outstanding:
            for tile, value in _program.sent.pop(0):
                tile.written = value

    def fence_async_shared() -> None:
        """Let products see what was written, once the barrier lies behind."""
        for tile in _program.tiles:
            tile.fenced = tile.written

    def barrier() -> None:
        """Let all threads see what was written."""
        sent = {id(tile) for group in _program.sent for tile, _ in group}
        for tile in _program.tiles:
            if id(tile) not in sent:
                tile.of_threads = tile.written
            tile.of_products = tile.fenced
            tile.is_read = False

    def warpgroup_mma(m: Any, state: SharedMemory, z: Any, is_async: bool) -> Product:
        """Begin ``m state + z``."""
        return Product(m, state, state.of_products, z)

    def warpgroup_mma_wait(num_outstanding: int, deps: Sequence[Product]) -> Any:
        """Give the product made, or as it is if as many are under way as may be; it is not told."""
        (product,) = deps
        return product if num_outstanding else _made(product)

    def _made(product: Any) -> Any:
        if not isinstance(product, Product):
            return product
        z = _made(product.z)
        product.state.is_read = True
        if product.state.written is not product.read:
            return tl.full(z.shape, float("nan"), tl.float32)
        # The interpreter would multiply the bit patterns of bf16 numbers.
        return tl.dot(product.m.to(tl.float32), product.read.to(tl.float32), z)
