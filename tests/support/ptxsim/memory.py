"""Shared and global memory, and what orders the accesses to them.

Memory is counted in granules of two bytes, the smallest element that the kernels have; shared
memory in granules of one byte where a kernel stores bytes there. Time inside a CTA is its epoch:
one more than the number of ``bar.sync`` that it has passed. An access is recorded as a stamp,
``epoch << 10 | thread``. Of two accesses of one CTA, one comes before the other if a barrier is
between them or if they are of the same warp. Accesses of two CTAs are ordered by a release and an
acquire: ``CTA.known`` is a vector clock, the epoch of every other CTA that has been acquired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from tests.support.ptxsim.ptx import Instruction
from tests.support.ptxsim.scalar import Array

if TYPE_CHECKING:
    from tests.support.ptxsim.machine import CTA

# The stamp of what has never been accessed: epochs begin at 1.
NEVER = 0
THREAD_BITS = 10
# In a stamp, in place of a thread: several warps. No CTA has as many threads.
MANY = (1 << THREAD_BITS) - 1


class EmulationError(Exception):
    """A fault after which the rest of the launch has no meaning."""


class Faults:
    """What was found: each kind once for an instruction, and how often.

    Args:
        stop: whether the first one ends the launch.
    """

    def __init__(self, stop: bool = False) -> None:
        self.stop = stop
        self.count: Counter[tuple[str, str]] = Counter()
        self.detail: dict[tuple[str, str], str] = {}

    def add(self, kind: str, instruction: Instruction | None = None, detail: str = "") -> None:
        """Record a fault, of the launch as a whole where there is no instruction."""
        key = kind, "end" if instruction is None else str(instruction)
        self.count[key] += 1
        self.detail.setdefault(key, detail)
        if self.stop:
            raise EmulationError(kind)

    def lines(self) -> list[str]:
        """Return a line of text for each."""
        return [
            f"{kind} (x{n}) at {where} {self.detail[kind, where]}".strip()
            for (kind, where), n in self.count.items()
        ]


class Access:
    """An instruction's access to memory.

    Args:
        cta: whose threads they are.
        instruction: that they execute.
        threads: that execute it, ``[threads]``.
        granules: that each of them reads or writes, ``[threads, n]``.

    Attributes:
        now: the least stamp of this epoch.
        stamp: of each thread, ``[threads, 1]``.
    """

    def __init__(self, cta: CTA, instruction: Instruction, threads: Array, granules: Array):
        self.cta, self.instruction = cta, instruction
        self.threads, self.granules = threads, granules
        self.now = cta.epoch << THREAD_BITS
        self.stamp: Array = (self.now + threads)[:, None]

    def fault(self, kind: str, where: Array | np.bool_) -> None:
        """Record a fault of the granules where it is, if it is anywhere."""
        if where.any():
            first = tuple(np.argwhere(np.broadcast_to(where, self.granules.shape))[0])
            cta, granule = self.cta, self.granules[first]
            detail = f"[CTA {cta.index}, epoch {cta.epoch}, granule {granule}]"
            cta.launch.faults.add(kind, self.instruction, detail)


def _differ(stamps: Array, others: Array) -> Array:
    """Return where two stamps are of different epochs or warps."""
    return (stamps ^ others) >> 5 != 0


class Region:
    """An array in memory, and who has accessed each of its granules when.

    Args:
        name: of the memory or of the kernel's argument.
        base: its address.
        data: its granules.
        writable: whether the kernel may write it; if not, its accesses are not recorded.
        private: whether only one CTA accesses it.
    """

    def __init__(
        self, name: str, base: int, data: Array, writable: bool = True, private: bool = False
    ):
        self.name, self.base, self.data, self.writable = name, base, data, writable
        # Zeros, for an array may be larger than memory, and most of it never touched.
        self.written: Array = np.zeros(len(data), np.int32)
        self.writer: Array | None = None if private else np.zeros(len(data), np.int16)
        # By the index of the CTA.
        self.read: dict[int, Array] = {}

    def granules(self, address: Array, size: int, instruction: Instruction) -> Array:
        """Return the granules of accesses of ``size`` bytes, one row a thread.

        Raises:
            EmulationError: one is outside of the array or misaligned.
        """
        grain, length = self.data.itemsize, self.data.nbytes
        offsets = address.astype(np.int64) - self.base
        if len(offsets) and (offsets.min() < 0 or offsets.max() + size > length):
            outside = offsets[(offsets < 0) | (offsets + size > length)]
            where = f"byte {outside[0]} of {self.name}, which has {length}"
            raise EmulationError(f"{where}: {instruction}")
        if (address & address.dtype.type(size - 1)).any():
            raise EmulationError(f"misaligned by {size} bytes in {self.name}: {instruction}")
        return (offsets // grain)[:, None] + np.arange(size // grain)

    def read_by(self, cta: CTA) -> Array:
        """Return the stamps of a CTA's last reads."""
        if cta.index not in self.read:
            self.read[cta.index] = np.zeros(len(self.data), np.int32)
        return self.read[cta.index]

    def _unordered_writes(self, access: Access) -> Array:
        """Return where the last write does not come before an access."""
        of = access.cta.index if self.writer is None else self.writer[access.granules]
        return _unordered(access, self.written[access.granules], of)

    def add_read(self, access: Access) -> None:
        """Record a read, and report what it is not ordered after."""
        racy = self._unordered_writes(access)
        access.fault(f"{self.name}: read not ordered after a write", racy)
        read, granules, stamp = self.read_by(access.cta), access.granules, access.stamp
        before = read[granules]
        read[granules] = stamp
        several = _differ(read[granules], stamp)
        recent = before >= access.now
        if recent.any():
            several |= recent & _differ(before, stamp)
        if several.any():
            read[granules[several]] = access.now | MANY

    def add_write(self, access: Access, changed: Callable[[], Array | bool]) -> None:
        """Record a write, and report what it is not ordered after.

        Args:
            access: what is written.
            changed: where the value is another one; two writes of one value need no order.
        """
        for reader, read in self.read.items():
            racy = _unordered(access, read[access.granules], reader)
            access.fault(f"{self.name}: write not ordered after a read", racy)
        racy = self._unordered_writes(access)
        if racy.any():
            access.fault(f"{self.name}: write not ordered after a write", racy & changed())
        self.written[access.granules] = access.stamp
        if self.writer is not None:
            self.writer[access.granules] = access.cta.index


def _unordered(access: Access, stamps: Array, ctas: Array | int) -> Array:
    """Return which accesses, by CTAs of these indices, do not come before this one."""
    cta = access.cta
    # Most are of earlier epochs.
    racy: Array = stamps >= access.now
    if racy.any():
        racy &= _differ(stamps, access.stamp)
    mine = ctas == cta.index
    if mine is True:
        return racy
    racy &= mine
    others = np.logical_not(mine) & (stamps != NEVER)
    if others.any():
        clock = np.maximum(cta.known, cta.acquired[access.threads])
        known = clock[np.arange(len(access.threads))[:, None], ctas]
        racy |= others & (stamps >> THREAD_BITS >= known)
    return racy


class SharedMemory(Region):
    """The shared memory of a CTA.

    Args:
        size: in bytes.
        grain: bytes a granule.
    """

    BASE = 1024

    def __init__(self, size: int, grain: int = 2):
        count, kind = -(-size // grain), {1: np.uint8, 2: np.uint16}[grain]
        # All bits set: NaN.
        data = np.full(count, np.iinfo(kind).max, kind)
        super().__init__("shared", self.BASE, data, private=True)
        # ``CTA.warp_epoch`` at the write.
        self.warp_written: Array = np.zeros(count, np.int32)
        # The epoch in which the writer executed a proxy fence after its write.
        self.fenced: Array = np.zeros(count, np.int32)
        # Async copies to a granule and MMAs that read it, in flight.
        self.copies: Array = np.zeros(count, np.int16)
        self.products: Array = np.zeros(count, np.int16)
        self._unfenced: list[Array] = []

    def load(self, access: Access) -> Array:
        """Read granules."""
        granules, written = access.granules, self.written[access.granules]
        self.add_read(access)
        near = written >= access.now
        if near.any():
            near &= (written != access.stamp) & ~_differ(written, access.stamp)
            near &= self.warp_written[granules] == access.cta.warp_epoch
            access.fault("shared: read of another lane's write, no bar.warp.sync", near)
        access.fault("shared: read of an async copy in flight", self.copies[granules])
        access.fault("shared: read of what was never written", written == NEVER)
        return self.data[granules]

    def store(self, access: Access, values: Array) -> None:
        """Write granules."""
        values = values.view(self.data.dtype)
        self._add_write(access, lambda: self.data[access.granules] != values)
        self.data[access.granules] = values
        differ = self.data[access.granules] != values
        access.fault("shared: two lanes write different values", differ)

    def _add_write(self, access: Access, changed: Callable[[], Array | bool]) -> None:
        granules = access.granules
        self.add_write(access, changed)
        access.fault("shared: write over an async copy in flight", self.copies[granules])
        access.fault("shared: write over what wgmma is reading", self.products[granules])
        self.warp_written[granules] = access.cta.warp_epoch
        self.fenced[granules] = NEVER
        self._unfenced.append(granules.ravel())

    def begin_copy(self, access: Access) -> None:
        """Let async copies begin: until they end, neither old nor new data is there."""
        self._add_write(access, lambda: True)
        # Copies are aligned, and all of one size.
        first = np.sort(access.granules[:, 0])
        access.fault("shared: two lanes copy to one place", (first[1:] == first[:-1]).any())
        self.data[access.granules] = np.iinfo(self.data.dtype).max
        self.copies[access.granules] += 1

    def end_copy(self, begun: Access, values: Array) -> None:
        """Let async copies end, for which their own threads have waited."""
        access = Access(begun.cta, begun.instruction, begun.threads, begun.granules)
        self.copies[access.granules] -= 1
        self._add_write(access, lambda: False)
        self.data[access.granules] = values.view(self.data.dtype)

    def fence(self, cta: CTA) -> None:
        """Let all threads of the CTA execute a proxy fence."""
        for granules in self._unfenced:
            self.fenced[granules] = cta.epoch
        self._unfenced.clear()

    def begin_product(self, access: Access) -> Array:
        """Let an MMA begin to read granules, through the async proxy.

        It sees a write after which the writer executed a proxy fence and then a barrier came, or
        after which a barrier came and then all threads executed a proxy fence.

        Raises:
            EmulationError: they are outside of shared memory.
        """
        cta, granules = access.cta, access.granules
        if granules.min() < 0 or granules.max() >= len(self.data):
            raise EmulationError(f"wgmma outside of shared memory: {access.instruction}")
        epoch, fenced = self.written[granules] >> THREAD_BITS, self.fenced[granules]
        by_writer = (fenced != NEVER) & (fenced < cta.epoch)
        unordered = ~(by_writer | (epoch < cta.fence_epoch))
        access.fault("wgmma: read not ordered after a write", unordered & (epoch == cta.epoch))
        access.fault("wgmma: read of a write without a fence", unordered & (epoch < cta.epoch))
        access.fault("wgmma: read of what was never written", epoch == NEVER)
        access.fault("wgmma: read of an async copy in flight", self.copies[granules])
        # Once for each granule, however many threads read it; so in the end, too.
        self.products[granules] += 1
        return self.data[granules]

    def end_product(self, cta: CTA, granules: Array) -> None:
        """Let an MMA end, for which all threads have waited."""
        self.products[granules] -= 1
        self.read_by(cta)[granules] = cta.epoch << THREAD_BITS | MANY


class GlobalMemory:
    """The arrays of a launch. How a CTA sees them is in :class:`View`."""

    SPACING = 40

    def __init__(self) -> None:
        self.regions: list[Region] = []
        # By address: the vector clock that an acquire there returns.
        self.clocks: dict[int, Array] = {}
        # How many changes there were that a spinning CTA may wait for.
        self.changes = 0

    def add(self, name: str, data: Array, residue: int, writable: bool) -> int:
        """Map an array and return its address, which is ``residue`` modulo 256."""
        base = (len(self.regions) + 1 << self.SPACING) + residue
        self.regions.append(Region(name, base, data, writable))
        return base

    def find(self, address: Array, size: int, instruction: Instruction) -> tuple[Region, Array]:
        """Return the array that addresses are in, and the granules of accesses of ``size`` bytes.

        Raises:
            EmulationError: one is outside of every array, or misaligned.
        """
        number = int(address[0]) >> self.SPACING
        if not 1 <= number <= len(self.regions):
            raise EmulationError(f"address {int(address[0]):#x} of no array: {instruction}")
        region = self.regions[number - 1]
        return region, region.granules(address, size, instruction)


class View:
    """Global memory as one CTA sees it.

    Args:
        memory: what it is a view of.
        relaxed: whether stores become visible to other CTAs only at a release or the CTA's end, and
            plain loads may return a line as it was when it was first loaded, until an acquire.
    """

    def __init__(self, memory: GlobalMemory, relaxed: bool):
        self.memory, self.relaxed = memory, relaxed
        # By array, with a mask: what this CTA has stored, and what its L1 cache holds.
        self._stored: dict[str, tuple[Array, Array]] = {}
        self._cached: dict[str, tuple[Array, Array]] = {}
        # By address: what spinning threads have read last, with its vector clock.
        self._spun: dict[int, tuple[int, Array]] = {}

    @staticmethod
    def _entry(entries: dict[str, tuple[Array, Array]], region: Region) -> tuple[Array, Array]:
        if region.name not in entries:
            entries[region.name] = np.zeros(len(region.data), bool), np.empty_like(region.data)
        return entries[region.name]

    def load(
        self,
        cta: CTA,
        instruction: Instruction,
        threads: Array,
        address: Array,
        size: int,
        through_l1: bool = True,
    ) -> Array:
        """Read ``size`` bytes for each thread."""
        region, granules = self.memory.find(address, size, instruction)
        values = region.data[granules]
        if not region.writable:
            return values
        region.add_read(Access(cta, instruction, threads, granules))
        if not self.relaxed:
            return values
        if through_l1:
            cached, line = self._entry(self._cached, region)
            # Lines of 128 bytes.
            near = (np.unique(granules >> 6)[:, None] << 6) + np.arange(64)
            near = near[near < len(cached)]
            fresh = near[~cached[near]]
            line[fresh], cached[fresh] = region.data[fresh], True
            values = line[granules]
        stored, own = self._entry(self._stored, region)
        return np.where(stored[granules], own[granules], values)

    def store(
        self, cta: CTA, instruction: Instruction, threads: Array, address: Array, values: Array
    ) -> None:
        """Write the granules of each thread.

        Raises:
            EmulationError: the array is not to be written.
        """
        region, granules = self.memory.find(address, 2 * values.shape[1], instruction)
        if not region.writable:
            raise EmulationError(f"store to {region.name}: {instruction}")
        stored, own = self._entry(self._stored, region)

        def changed() -> Array:
            before = np.where(stored[granules], own[granules], region.data[granules])
            return before != values

        access = Access(cta, instruction, threads, granules)
        region.add_write(access, changed)
        target = own if self.relaxed else region.data
        stored[granules] = self.relaxed
        target[granules] = values
        access.fault("global: two lanes store different values", target[granules] != values)

    def spin(
        self, cta: CTA, instruction: Instruction, threads: Array, at: Array, acquires: bool
    ) -> Array:
        """Read a word in memory itself, for each thread, and see what was released there.

        Now and then a warp still reads what the CTA has read there before, so that warps diverge.
        """
        address = int(at[0])
        if (at != address).any():
            raise EmulationError(f"spins at several addresses: {instruction}")
        clock = self.memory.clocks.get(address, np.zeros_like(cta.known))
        latest = int(self.word(address, instruction)[0]), clock
        late = cta.launch.random.random(cta.threads // 32)[threads // 32] < 0.25
        values = np.zeros(len(threads), np.uint32)
        for some, (value, clock) in ((late, self._spun.get(address, latest)), (~late, latest)):
            values[some] = value
            if acquires:
                cta.acquired[threads[some]] = np.maximum(cta.acquired[threads[some]], clock)
        if acquires:
            self._cached.clear()
        self._spun[address] = latest
        return values

    def release(self, cta: CTA, address: int) -> None:
        """Release what comes before the CTA's last barrier, and what it has acquired by then."""
        self.flush()
        clock = cta.known.copy()
        clock[cta.index] = cta.epoch
        before = self.memory.clocks.get(address, 0)
        self.memory.clocks[address] = np.maximum(before, clock)

    def flush(self) -> None:
        """Let all other CTAs see what was stored."""
        for region in self.memory.regions:
            if self.relaxed and region.name in self._stored:
                stored, own = self._stored[region.name]
                region.data[stored] = own[stored]
                if region.name in self._cached:
                    # What it has stored a CTA itself sees at once.
                    self._cached[region.name][1][stored] = own[stored]
                stored[:] = False

    def word(self, address: int, instruction: Instruction) -> Array:
        """Return the 32-bit word in memory itself on which an atomic or strong load operates."""
        region, granules = self.memory.find(np.array([address], np.uint64), 4, instruction)
        first = int(granules[0, 0])
        return region.data[first : first + 2].view(np.uint32)
