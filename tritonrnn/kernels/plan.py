"""Which launches fit a problem on a device: pure Python.

No tables of shapes: the same problem on the same device always gets the same plans, and never one
that does not fit. ``cost.py`` ranks them, and ``../autotune`` tries them on the GPU at hand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

from tritonrnn.kernels.devices import Device

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
EPILOGUES = ("tanh", "relu", "tanh_grad", "relu_grad")

# Hidden units up to which ptxas (12.8, for sm_90) leaves the descriptors of two blocks' wgmma where
# they are used: bf16 1272 takes 244 registers (perf/results/static/sm_90.jsonl); of 1536 it keeps
# all descriptors in registers, and spills.
MAX_INTERLEAVED_UNITS = 1280

# Shared memory that the compiler takes for itself, at most: barriers, reductions.
RESERVED_BYTES = 1024


@dataclass(frozen=True)
class Problem:
    """The recurrence of one layer in one pass: G groups of H hidden units, B sequences, T steps.

    Args:
        T: time steps of the longest sequence.
        B: sequences.
        G: groups, i.e. directions.
        H: hidden units a group.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        tf32: whether fp32 products may round their operands to TF32.
        epilogue: one of :data:`EPILOGUES`.
    """

    T: int
    B: int
    G: int
    H: int
    dtype: str
    tf32: bool = False
    epilogue: str = "tanh"

    @property
    def item_bytes(self) -> int:
        """Return the bytes of one element of the state."""
        return ITEM_BYTES[self.dtype]

    @property
    def arithmetic(self) -> str:
        """Return what products are to be accurate to: ``16-bit``, ``tf32`` or ``fp32``."""
        if self.dtype != "fp32":
            return "16-bit"
        return "tf32" if self.tf32 else "fp32"

    @property
    def has_odd_words(self) -> bool:
        """Return whether rows are no whole number of 32-bit words: no async copy takes them."""
        return self.H * self.item_bytes % 4 != 0

    @property
    def has_odd_rows(self) -> bool:
        """Return whether rows are no multiple of 8 bytes: they are accessed in small pieces."""
        return self.H * self.item_bytes % 8 != 0


@dataclass(frozen=True)
class LaunchPlan:
    """Which kernel is launched, and how.

    Args:
        name: ``registers``, ``resident``, ``cooperative`` or ``stepwise``; each has a
            file of its name, with its tile picture.
        block_h: hidden units a program.
        block_b: sequences a program.
        block_k: hidden units of the previous state that one product takes.
        block_read: hidden units of it that a program reads before it multiplies.
        num_warps: warps a program.
        num_stages: iterations of the innermost loop in flight, whose loads the compiler prefetches:
            a resident walk's steps, a stepwise product's tiles; 1 for none.
        precision: of the products: ``tf32``, ``tf32x3`` (three products of TF32 parts, of fp32
            accuracy) or ``ieee`` (as they are).
        epilogue: the problem's, or ``tanh_approx`` for ``tanh`` by the hardware's instruction.
        programs: programs a launch.
        launches: launches a pass.
        interleave: batch blocks that a cooperative program walks at the same time, 1 or 2.
        shared_bytes: an upper bound on the shared memory of a program.
        device: the limits that the plan was made for.
    """

    name: str
    block_h: int
    block_b: int
    block_k: int
    block_read: int
    num_warps: int
    num_stages: int
    precision: str
    epilogue: str
    programs: int
    launches: int
    shared_bytes: int
    device: Device
    interleave: int = 1

    @property
    def num_sums(self) -> int:
        """Return how many sums the products of a step's tiles are added to, in turn.

        Each ``mma.sync`` waits for the one whose sum it adds to: so two, where several tiles are at
        hand. Products of fp32 accuracy begin from zero, so they wait for none.
        """
        waits = not _has_wgmma(self.device, self.block_h) and self.precision != "tf32x3"
        return 2 if waits and self.block_read > self.block_k else 1

    @property
    def waits(self) -> bool:
        """Return whether its programs wait for each other, so that all must run at once."""
        return self.name == "cooperative"

    def __str__(self) -> str:
        return (
            f"{self.name}: tiles of {self.block_h} hidden units x {self.block_b} sequences "
            f"(products of {self.block_k}, {self.precision}), {self.epilogue}, "
            f"{'two blocks interleaved, ' if self.interleave == 2 else ''}{self.num_warps} warps, "
            f"{self.programs} programs on {self.device.multiprocessors} multiprocessors, "
            f"{self.launches} launch{'es' if self.launches > 1 else ''}, "
            f"{self.shared_bytes / 1024:.0f} of {self.device.shared_bytes / 1024:.0f} KiB of "
            f"shared memory ({self.device.arch})"
        )


def resident_plan(problem: Problem, device: Device) -> LaunchPlan | None:
    """Keep W_hh in one multiprocessor. Return None if it does not fit.

    The bound is its shared memory, through which W_hh goes also where the product takes it from
    registers. Where products are ``mma.sync`` alone, the registers plan has fewer barriers.
    """
    if device.has_mma_sync and not device.has_wgmma:
        return None
    block_h = power_of_two(problem.H, at_least=16)
    precision = _precision(problem, device)
    # Products of fp32 accuracy are few columns wide, 16 at least (common.dot_acc).
    block_k = block_h // min(4, block_h // 16) if precision == "tf32x3" else block_h
    is_prefetched = device.has_async_copy and problem.H * problem.item_bytes % 4 == 0
    # Copies three iterations ahead, as one from global memory may take as long as two steps; fewer
    # where shared memory is full.
    depths = (4, 3, 2) if is_prefetched else (1,)
    for block_b, num_stages in product((_resident_block_b(problem, device), 8), depths):
        shared_bytes = _resident_shared_bytes(problem, precision, block_h, block_b, num_stages)
        if shared_bytes <= device.shared_bytes:
            break
    else:
        return None
    return LaunchPlan(
        name="resident",
        block_h=block_h,
        block_b=block_b,
        block_k=block_k,
        block_read=block_h,
        num_warps=_num_warps(problem, block_h, device),
        num_stages=num_stages,
        precision=precision,
        epilogue=_epilogue(problem, device),
        programs=cdiv(problem.B, block_b) * problem.G,
        launches=1,
        shared_bytes=shared_bytes,
        device=device,
    )


def registers_plan(problem: Problem, device: Device) -> LaunchPlan | None:
    """Keep W_hh in one multiprocessor's registers. Return None if it does not fit.

    By ``mma.sync``, or on Hopper by ``wgmma`` where :func:`uses_wgmma`.
    """
    # Of the interpreter neither: it does not know Gluon.
    if not device.has_mma_sync:
        return None
    precision = _precision(problem, device)
    # W_hh may take half of the registers: of fp32 accuracy it counts twice.
    if problem.H > (256 if precision == "ieee" else 128):
        return None
    by_wgmma = uses_wgmma(problem, device)
    # The rows of a wgmma, all of whose columns are one product.
    block_h = power_of_two(problem.H, at_least=64 if by_wgmma else 16)
    num_products = 1
    if not by_wgmma and block_h <= 128:
        # Few products, each of which waits for the one whose sum it adds to: so two sums. And
        # products of fp32 accuracy are narrow (common.dot_acc).
        num_products = min(4 if precision == "tf32x3" else 2, block_h // 16)
    # The narrowest product there is: a step's latency is that of its epilogue, too.
    block_b = 8
    parts = 2 if precision == "tf32x3" else 1
    # Two of the state, four of the drive, and as many of aux.
    in_flight = 8 if problem.epilogue.endswith("_grad") else 4
    tiles = 2 * parts + (0 if problem.has_odd_words else in_flight)
    return LaunchPlan(
        name="registers",
        block_h=block_h,
        block_b=block_b,
        block_k=block_h // num_products,
        block_read=block_h,
        # Four warps to the 64 rows of a wgmma.
        num_warps=block_h // 16 if by_wgmma else min(8, block_h // 16),
        num_stages=1,
        precision=precision,
        epilogue=_epilogue(problem, device),
        programs=cdiv(problem.B, block_b) * problem.G,
        launches=1,
        shared_bytes=tiles * block_h * block_b * problem.item_bytes + RESERVED_BYTES,
        device=device,
    )


def uses_wgmma(problem: Problem, device: Device) -> bool:
    """Return whether the registers plan makes its products by Hopper's ``wgmma``."""
    # Up to 128 units of 16 bits: on an H100 a step of 128 takes 0.25 us, and 0.28 by mma.sync. But
    # one of 256 takes 0.67, and 0.53 by mma.sync; in TF32 one of 128 takes 0.43, and 0.39
    # (perf/results/h100-2026-11-26/kernel_steps.jsonl). Not for what the kernel loads to registers.
    is_small = problem.dtype != "fp32" and problem.H <= 128
    return device.has_wgmma and is_small and not problem.has_odd_words


def cooperative_plan(problem: Problem, device: Device) -> LaunchPlan | None:
    """Spread the rows of W_hh over a CTA group of programs. Return None if they do not fit."""
    if device.is_interpreter:
        # It runs one program after the other: so a CTA group is one program.
        return _cooperative_plan(problem, device, power_of_two(problem.H, at_least=64))
    if not device.has_mma_sync:
        return None
    # With 64 rows, which wgmma wants, a step reads the fewest bytes from shared memory. For
    # mma.sync 32 will do where there is no room for 64. For fp32 accuracy, where W_hh counts twice,
    # also 16; and not wgmma, as products are many and narrow (common.dot_acc), and each wgmma is
    # waited for by itself.
    rows = [64, 32]
    if _precision(problem, device) == "tf32x3":
        rows = [32, 16] if device.has_wgmma else [64, 32, 16]
    plans = (
        _cooperative_plan(problem, device, block_h)
        for block_h in rows
        if block_h <= _most_rows(device)
    )
    fitting = [plan for plan in plans if plan is not None]
    # The first one that reads the state in four parts, or fewer; else the one of the fewest.
    return max(fitting, key=lambda plan: min(4 * plan.block_read, problem.H), default=None)


def _cooperative_plan(problem: Problem, device: Device, block_h: int) -> LaunchPlan | None:
    precision = _precision(problem, device)
    # Of 16 rows two warps make the same product, but each reads and splits half of the state.
    num_warps = max(2, _num_warps(problem, block_h, device))
    by_wgmma = _has_wgmma(device, block_h) or device.is_interpreter
    if by_wgmma:
        # 16 sequences make the most of the weights that a step reads, and are the fewest for which
        # Triton chooses wgmma.
        block_b = 16
        # Each tile of the state is a product of its own, which is waited for: so tiles are wide.
        # Not wider than 256, where nothing more is gained, and not so wide that much of one is
        # padding. Of odd rows each small piece is in registers with an address of its own.
        block_k = 256 if problem.dtype != "fp32" and problem.H % 256 == 0 else 128
        block_k = 64 if problem.has_odd_rows else block_k
        at_once_bytes = device.shared_bytes
        most_interleaved = MAX_INTERLEAVED_UNITS if problem.dtype != "fp32" else 0
    else:
        # Both operands go through registers: so tiles are small, and what is read at once is 256
        # bytes a thread; more for TF32, whose products take the fewest registers beside it.
        block_b = 16 if problem.dtype != "fp32" else 8
        block_k = 128 if problem.dtype != "fp32" and block_h == 64 else 64
        block_k = block_h if problem.has_odd_rows else block_k
        at_once_bytes = 32 * num_warps * (512 if precision == "tf32" else 256)
        if precision == "ieee" and block_b * problem.H * problem.item_bytes > 2 * at_once_bytes:
            # A state of several reads: each on its way beside the product of the one before, whose
            # operands take registers, too (sm_80, bf16 H 1280, fp16 H 1728).
            at_once_bytes = at_once_bytes * 3 // 4
        most_bytes = {64: 2048, 32: 1536}[block_h] if precision != "tf32x3" else 0
        most_interleaved = most_bytes // problem.item_bytes
        if device.is_blackwell and problem.epilogue.endswith("_grad"):
            # For Blackwell ptxas (12.9, 13.1) takes more registers: with aux's tiles besides, it
            # spills in the time loop from 392 units on (sm_100, bf16), and before it from 264 on.
            most_interleaved = min(most_interleaved, 256)
    if precision == "tf32x3":
        # Wider products lose accuracy (common.dot_acc), and 16 columns are the fewest. Of many
        # hidden units torch's own error is larger, and Triton takes half a minute over 64 tiles.
        block_k = 16 if problem.H <= 512 else 32
    if problem.has_odd_rows and by_wgmma:
        # Their elements are loaded one by one, to a register each: 32 a thread.
        at_once_bytes = 32 * num_warps * 32 * problem.item_bytes
    elif problem.has_odd_rows and problem.dtype != "fp32":
        at_once_bytes = block_b * block_k * problem.item_bytes
    tiles = cdiv(problem.H, block_k)
    tile_bytes = block_k * problem.item_bytes * (2 if precision == "tf32x3" else 1)
    weight_bytes = block_h * tiles * tile_bytes
    # All of the state that there is room for beside the weights is read at once, for each read
    # takes a round trip to L2.
    spare_bytes = max(0, device.shared_bytes - weight_bytes - RESERVED_BYTES)
    at_once = min(
        tiles,
        spare_bytes // (block_b * tile_bytes),
        at_once_bytes // (block_b * block_k * problem.item_bytes),
    )
    # Two fp32 tiles, of a and aux, on their way between the layouts of memory and of the product.
    exchange_bytes = 2 * block_h * block_b * 4
    shared_bytes = (
        weight_bytes + max(at_once * block_b * tile_bytes, exchange_bytes) + RESERVED_BYTES
    )
    cta_group_size = cdiv(problem.H, block_h)
    # All programs run at the same time, one a multiprocessor.
    num_cta_groups = 1
    if not device.is_interpreter:
        num_cta_groups = device.multiprocessors // (cta_group_size * problem.G)
    if at_once == 0 or num_cta_groups == 0 or shared_bytes > device.shared_bytes:
        return None
    num_cta_groups = min(num_cta_groups, max(1, cdiv(problem.B, block_b)))
    # Two blocks want the registers of two, of which odd rows leave too few.
    spacious = problem.H * problem.item_bytes % 16 == 0 and problem.H <= most_interleaved
    return LaunchPlan(
        name="cooperative",
        block_h=block_h,
        block_b=block_b,
        block_k=block_k,
        block_read=at_once * block_k,
        num_warps=num_warps,
        num_stages=1,
        precision=precision,
        epilogue=_epilogue(problem, device),
        programs=num_cta_groups * cta_group_size * problem.G,
        launches=1,
        shared_bytes=shared_bytes,
        device=device,
        interleave=2 if spacious else 1,
    )


def stepwise_plan(problem: Problem, device: Device) -> LaunchPlan:
    """Launch a kernel a step, which fits every problem."""
    precision = _precision(problem, device)
    block_h = min(_most_rows(device), power_of_two(problem.H, at_least=16))
    block_b = 16
    # Tiles of M and of the state go through registers on their way to the product: 128 bytes of a
    # row, and half as many where a tile is split in two, or its elements are loaded one by one.
    k_bytes = 64 if precision == "tf32x3" or problem.has_odd_rows else 128
    block_k = min(k_bytes // problem.item_bytes, block_h)
    num_stages = 3
    tiles = num_stages * block_k * (block_h + block_b) * problem.item_bytes
    return LaunchPlan(
        name="stepwise",
        block_h=block_h,
        block_b=block_b,
        block_k=block_k,
        block_read=block_k,
        num_warps=_num_warps(problem, block_h, device),
        num_stages=num_stages,
        precision=precision,
        epilogue=_epilogue(problem, device),
        programs=cdiv(problem.B, block_b) * cdiv(problem.H, block_h) * problem.G,
        launches=problem.T,
        shared_bytes=tiles + RESERVED_BYTES,
        device=device,
    )


# The plans by name, each returns None where it does not fit. The preferred one first, by what a
# program waits for in a step: nobody before others, and M in registers before M in shared memory.
# The last one, a launch a step, fits every problem.
PLANS: dict[str, Callable[[Problem, Device], LaunchPlan | None]] = {
    "registers": registers_plan,
    "resident": resident_plan,
    "cooperative": cooperative_plan,
    "stepwise": stepwise_plan,
}


@functools.lru_cache(maxsize=1024)
def plan_named(name: str, problem: Problem, device: Device) -> LaunchPlan:
    """Return a plan by its name.

    Raises:
        RuntimeError: it does not fit the problem on this device, or no plan has this name.
    """
    plan = PLANS[name](problem, device) if name in PLANS else None
    if plan is None:
        raise RuntimeError(f"the plan {name} does not fit {problem} on {device.arch}")
    return plan


def max_registers(problem: Problem, plan: LaunchPlan) -> int | None:
    """Return the registers that ptxas is told it may give a thread; None to let it choose.

    Not told, it spills a few, also in the time loop, so that one more program may run at the same
    time on a multiprocessor; a walk rather wants the shortest step.
    """
    device = plan.device
    if not device.has_mma_sync or (device.has_wgmma and plan.name != "stepwise"):
        # Hopper's kernels of a whole walk spill where told (bf16 resident H 201), not else; its
        # stepwise one where not told (bf16 H 32).
        return None
    if plan.name == "cooperative" and plan.interleave == 1:
        # Told, it loads the next tiles beside the product that it makes, even where the registers
        # for that have to be spilled (bf16 H 1032 on sm_86 and sm_120). Not told, it does so for
        # odd rows (bf16 H 1023 and fp16 H 333 on sm_89), but not for Blackwell.
        is_limited = problem.has_odd_rows and problem.dtype != "fp32" and not device.is_blackwell
        return 200 if is_limited else None
    return min(255, device.register_bytes // (4 * device.warp_size * plan.num_warps))


def _has_wgmma(device: Device, block_h: int) -> bool:
    # Its rows, of which Triton makes mma.sync where there are fewer.
    return device.has_wgmma and block_h >= 64


def _most_rows(device: Device) -> int:
    # For 64 rows Triton chooses Blackwell's tcgen05, which nobody here has tried, and which the
    # emulator does not know.
    return 32 if device.has_tcgen05 else 64


def _resident_block_b(problem: Problem, device: Device) -> int:
    # Never a function of B, which would compile a kernel for every few batch sizes. The epilogue is
    # a good part of a step, and its cost grows with the tile: so eight sequences, the fewest that
    # an MMA takes. But 16 where AMD's takes no fewer of 16 bits, and where Triton chooses wgmma for
    # no fewer, though the instruction takes 8.
    wide = device.has_wgmma or device.is_amd or device.is_interpreter
    return 16 if wide and problem.dtype != "fp32" else 8


def _resident_shared_bytes(
    problem: Problem, precision: str, block_h: int, block_b: int, num_stages: int
) -> int:
    parts = 2 if precision == "tf32x3" else 1
    weights = block_h * block_h * problem.item_bytes * parts
    tile = block_h * block_b * problem.item_bytes
    # The drive and aux of the steps in flight.
    in_flight = (num_stages - 1) * (2 if problem.epilogue.endswith("_grad") else 1)
    # An fp32 tile on its way between the layouts of memory and of the product.
    exchange = block_h * block_b * 4
    return weights + (parts + in_flight) * tile + exchange + RESERVED_BYTES


def _precision(problem: Problem, device: Device) -> str:
    if not device.has_tf32:
        return "ieee"
    # Without MMA instructions, fp32 products spill and take twice the instructions.
    return {"16-bit": "ieee", "tf32": "tf32", "fp32": "tf32x3"}[problem.arithmetic]


def _epilogue(problem: Problem, device: Device) -> str:
    # Its error is lost in what rounding to bf16 adds, not so in fp16.
    approximate = problem.epilogue == "tanh" and problem.dtype == "bf16" and device.has_tanh
    return "tanh_approx" if approximate else problem.epilogue


def _num_warps(problem: Problem, block_h: int, device: Device) -> int:
    # A warp group of 128 threads to 64 rows of wgmma, a warp to 16 rows of mma.sync. Of 16 warps
    # each thread has 128 registers: enough only where the product takes its operands from shared
    # memory, and they go there in vectors.
    most = 16 if device.has_wgmma and not problem.has_odd_rows else 8
    # AMD's MMA holds the operands in registers throughout, and two parts of W_hh fill those of 512
    # threads.
    threads_a_row = 8 if device.is_amd and _precision(problem, device) == "tf32x3" else 2
    return max(1, min(most, threads_a_row * block_h // device.warp_size))


def power_of_two(n: int, at_least: int) -> int:
    """Return the next power of two."""
    return max(at_least, 1 << (n - 1).bit_length())


def cdiv(n: int, block: int) -> int:
    """Return how many blocks cover n."""
    return -(-n // block)
