"""Run a kernel: the threads of a CTA in lockstep, the CTAs of a grid one by one or interleaved."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from tests.support.ptxsim.instructions import WARP, Kernel, Mask, Product, Step
from tests.support.ptxsim.memory import (
    Access,
    EmulationError,
    Faults,
    GlobalMemory,
    SharedMemory,
    View,
)
from tests.support.ptxsim.ptx import Unsupported
from tests.support.ptxsim.scalar import UNSIGNED, Array

# Spins of every CTA without a change in memory after which they are deadlocked.
MOST_IDLE_SPINS = 20
T = TypeVar("T")
# An async copy: where to, what, and how to read that again.
Copy = tuple[Access, Array, Callable[[], Array]]


class Groups(Generic[T]):
    """What is in flight: not yet committed, and by committed groups."""

    def __init__(self) -> None:
        self.open: list[T] = []
        self._committed: list[list[T]] = []

    def __iter__(self) -> Iterator[T]:
        return itertools.chain(*self._committed, self.open)

    def commit(self) -> None:
        """Make what is open a group."""
        self._committed.append(self.open)
        self.open = []

    def wait(self, in_flight: int) -> Iterator[T]:
        """Let all but the last groups end, and yield what ends."""
        while len(self._committed) > in_flight:
            yield from self._committed.pop(0)


class CTA:
    """A thread block that runs.

    Args:
        launch: what it belongs to.
        index: of the CTA in the grid, x fastest.
        place: its coordinates.
    """

    def __init__(self, launch: Launch, index: int, place: tuple[int, int, int]):
        self.launch, self.index, self.kernel = launch, index, launch.kernel
        self.threads = WARP * launch.num_warps
        self.arguments = launch.arguments
        self.shared = SharedMemory(launch.shared_bytes, self.kernel.grain)
        self.memory = View(launch.memory, launch.interleaved)
        # None for what was never written.
        self.registers: list[Any] = [None] * (len(self.kernel.slots) + len(self.kernel.constants))
        self._every = np.arange(self.threads)
        special: dict[str | int, Any] = {"%tid.x": self._every, "%ntid.x": self.threads}
        for axis, here, size in zip("xyz", place, launch.grid, strict=True):
            special |= {f"%ctaid.{axis}": here, f"%nctaid.{axis}": size}
        for (value, width), slot in self.kernel.constants.items():
            if isinstance(value, str) and value not in special:
                raise Unsupported(value)
            elements = np.atleast_1d(np.asarray(special.get(value, value)))
            self.registers[slot] = elements.astype(UNSIGNED[width])
        # One more than the barriers passed; those of warps counted, too; that of the last fence.
        self.epoch = self.warp_epoch = 1
        self.fence_epoch = 0
        # Vector clocks: up to which epoch every other CTA's accesses come before this CTA's, and
        # before those of one thread.
        self.known: Array = np.zeros(launch.num_ctas, np.int64)
        self.acquired: Array = np.zeros((self.threads, launch.num_ctas), np.int64)
        self.copies: Groups[Copy] = Groups()
        self.products: Groups[Product] = Groups()
        # Registers of products in flight, and operands of products written since the last
        # wgmma.fence; None before the first one.
        self._in_flight: frozenset[int] = frozenset()
        self._unfenced: set[int] | None = None
        # Why another CTA may run now.
        self.pause: str | None = None
        self.count = 0

    # Registers.

    def active(self, mask: Mask) -> Array:
        """Return the threads of a mask."""
        return self._every if mask is None else np.flatnonzero(self._of_all(mask))

    def _of_all(self, elements: Array) -> Array:
        return elements if len(elements) == self.threads else elements.repeat(self.threads)

    def full(self, slot: int) -> Array:
        """Return a register with an element for each thread."""
        return self._of_all(self.registers[slot])

    def put(self, slot: int, value: Array, mask: Mask) -> None:
        """Write a register, from elements for all threads, for those of a mask.

        Raises:
            Unsupported: the register has another width.
        """
        kind = self.kernel.types[slot]
        if value.dtype != kind:
            raise Unsupported(f"{value.dtype} to a register of {np.dtype(kind)}")
        if mask is not None:
            old = self.registers[slot]
            value = np.where(mask, value, ~kind(0) if old is None else old)
        self.registers[slot] = value

    def put_active(self, slot: int, value: Array, threads: Array, mask: Mask) -> None:
        """Write a register, from elements for the threads of a mask alone."""
        full = np.zeros(self.threads, value.dtype)
        full[threads] = value
        self.put(slot, full, mask)

    # Barriers, and what is in flight.

    def barrier(self) -> None:
        """Execute ``bar.sync``."""
        self.epoch += 1
        self.warp_epoch += 1
        self.known = np.maximum(self.known, self.acquired.max(0))
        self.pause = "barrier"

    def warp_barrier(self) -> None:
        """Execute ``bar.warp.sync``."""
        self.warp_epoch += 1

    def proxy_fence(self) -> None:
        """Execute ``fence.proxy.async``."""
        self.shared.fence(self)
        self.fence_epoch = self.epoch

    def wait_for_copies(self, in_flight: int) -> None:
        """Execute ``cp.async.wait_group``: let at most so many groups stay in flight."""
        for access, data, read in self.copies.wait(in_flight):
            changed = (read() != data).any()
            access.fault("cp.async: its source changed before it was waited for", changed)
            self.shared.end_copy(access, data)

    def wgmma_fence(self) -> None:
        """Execute ``wgmma.fence``."""
        self._unfenced = set()

    def begin_product(self, product: Product) -> None:
        """Begin ``wgmma.mma_async``, and check that it may use its registers."""
        faults, instruction = self.launch.faults, product.instruction
        if self._unfenced is None or product.registers & self._unfenced:
            faults.add("wgmma: register written and no wgmma.fence after it", instruction)
        for other in self.products:
            # One product may add to the sums of another one of its shape.
            allowed = product.accumulators & other.accumulators
            if other.instruction.op[4] != instruction.op[4]:
                allowed = frozenset()
            if product.registers & other.registers - allowed:
                faults.add("wgmma: uses registers of a product in flight", instruction)
        self.products.open.append(product)
        self._in_flight |= product.registers

    def wait_for_products(self, in_flight: int) -> None:
        """Execute ``wgmma.wait_group``: let at most so many groups stay in flight."""
        for product in self.products.wait(in_flight):
            for granules in product.granules:
                self.shared.end_product(self, granules)
        self._in_flight = frozenset().union(*(product.registers for product in self.products))

    # Control.

    def _guard(self, slot: int, negated: bool, mask: Mask) -> Mask | bool:
        """Return the threads whose predicate holds: None for all, False for none."""
        p = self.registers[slot]
        if p is None:
            raise EmulationError("a predicate was never written")
        p = ~p if negated else p
        if mask is not None:
            p = p & mask
        if p.all():
            return None
        return p if p.any() else False

    def _execute(self, step: Step, mask: Mask) -> None:
        ins = step.instruction
        if mask is not None and step.together != 1:
            together = self._of_all(mask).reshape(-1, step.together or self.threads)
            if (together.any(1) != together.all(1)).any():
                raise EmulationError(f"threads execute it that must not alone: {ins}")
        in_flight = self._in_flight and self._in_flight & step.registers
        if in_flight and ins.op[:2] != ("wgmma", "mma_async"):
            self.launch.faults.add("wgmma: register of a product in flight", ins)
        self.kernel.executed.add(ins.line)
        try:
            step.run(self, mask)
        except (TypeError, AttributeError, ValueError) as error:
            if any(self.registers[slot] is None for slot in step.registers):
                raise EmulationError(f"reads what was never written: {ins}") from error
            raise
        if step.overwrites and self._unfenced is not None:
            self._unfenced |= step.overwrites

    def run(self) -> Iterator[str]:
        """Execute the program; yield where another CTA may run."""
        program = self.kernel.program.blocks
        mask: Mask = None
        here = 0
        # Where threads have diverged: the block where they reconverge, all of them, and where the
        # others wait that have not gone on yet.
        diverged: list[tuple[int, Mask, tuple[int, Mask] | None]] = []
        while here < len(program):
            while diverged and here == diverged[-1][0]:
                meet, together, others = diverged.pop()
                if others is None:
                    mask = together
                else:
                    here, mask = others
                    diverged.append((meet, together, None))
            block = program[here]
            self.count += len(block.instructions) + 1
            for step in self.kernel.blocks[here]:
                active: Mask | bool = self._guard(*step.guard, mask) if step.guard else mask
                if isinstance(active, bool):
                    continue
                self._execute(step, active)
                if self.pause is not None:
                    yield self.pause
                    self.pause = None
            branch = block.branch
            if branch is None:
                here += 1
                continue
            if branch.op[0] != "bra":
                if branch.op[0] == "trap" or mask is not None:
                    raise EmulationError(f"a trap, or an exit of some threads alone: {branch}")
                break
            taken: Mask | bool = mask
            if branch.guard is not None:
                name, negated = branch.guard
                taken = self._guard(self.kernel.slots[name], negated, mask)
            if isinstance(taken, bool):
                here += 1
            elif taken is None or (mask is not None and np.array_equal(taken & mask, mask)):
                here = block.target
            else:
                rest = (np.ones(self.threads, bool) if mask is None else mask) & ~taken
                diverged.append((block.reconverges, mask, (here + 1, rest)))
                mask, here = self._of_all(taken), block.target
        for what, groups in (("products", self.products), ("async copies", self.copies)):
            if any(groups):
                self.launch.faults.add(f"ends with {what} in flight")
        self.memory.flush()


@dataclass
class Launch:
    """A grid of CTAs over arrays in global memory.

    Args:
        kernel: what they run.
        grid: CTAs in x, y and z.
        num_warps: warps a CTA.
        shared_bytes: shared memory a CTA.
        arguments: of the kernel, arrays as addresses in ``memory``.
        memory: the arrays.
        faults: where faults are recorded.
        seed: of the schedule.
        interleaved: whether all CTAs run at the same time, and not one after the other.
        lost: the index of a CTA that never runs.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    num_warps: int
    shared_bytes: int
    arguments: Sequence[int]
    memory: GlobalMemory
    faults: Faults
    seed: int = 0
    interleaved: bool = False
    lost: int = -1
    # Instructions executed.
    count: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    @property
    def num_ctas(self) -> int:
        """Return how many CTAs the grid has."""
        x, y, z = self.grid
        return x * y * z

    def run(self) -> None:
        """Run all CTAs, in an order that the seed decides.

        Raises:
            EmulationError: a fault after which nothing else has a meaning.
            Unsupported: the emulator does not know an instruction.
        """
        places = itertools.product(*(range(n) for n in reversed(self.grid)))
        ctas = [CTA(self, i, (x, y, z)) for i, (z, y, x) in enumerate(places) if i != self.lost]
        with np.errstate(all="ignore"):
            if self.interleaved:
                self._interleave(ctas)
            else:
                for i in self.random.permutation(len(ctas)):
                    for _ in ctas[i].run():
                        pass
        self.count = sum(cta.count for cta in ctas)

    def _interleave(self, ctas: list[CTA]) -> None:
        """Run each for some random time, which ends early where it spins in vain."""
        random = self.random
        running = {cta: cta.run() for cta in ctas}
        idle = dict.fromkeys(ctas, 0)
        changes = self.memory.changes
        while running:
            cta = list(running)[random.integers(len(running))]
            for _ in range(random.integers(1, 30)):
                why = next(running[cta], "end")
                if why == "end":
                    del running[cta], idle[cta]
                    break
                if random.random() < 0.02:
                    # A store may become visible at any time.
                    cta.memory.flush()
                if self.memory.changes != changes:
                    changes, idle = self.memory.changes, dict.fromkeys(running, 0)
                if why == "spin":
                    idle[cta] += 1
                    if random.random() < 0.5:
                        break
            if running and min(idle.values()) > MOST_IDLE_SPINS:
                raise EmulationError("deadlock: all CTAs spin")
