"""Which launch serves a recurrence: computed from its shape, its dtype and the device's limits.

No tables of shapes and no trial runs: the same problem on the same device always gets the same
plan, and never one that does not fit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}

# What a step costs the host, in microseconds: estimates, not yet measured. They weigh a launch a
# step from Python against torch's own launches of a step from C++.
TRITON_LAUNCH_US = 8.0
TORCH_STEP_US = 5.0

# The parts of a step on the chain of its latencies (NVIDIA's and others' published figures, not yet
# measured): clocks of shared memory, matrix instruction, epilogue and barrier; a counter handed
# from one multiprocessor to the others through L2; bytes a clock that a multiprocessor reads.
STEP_CLOCKS = 160
HANDOFF_US = 0.16
L2_BYTES_PER_CLOCK = 64
SHARED_BYTES_PER_CLOCK = 128
CLOCKS_PER_US = 1980
THREADS_PER_MULTIPROCESSOR = 2048
REGISTER_BYTES_PER_MULTIPROCESSOR = 256 * 1024
# What torch's step takes at least where it is large: dense products and memory, of an H200.
TFLOPS = {"16-bit": 989, "tf32": 495, "fp32": 67}
MEMORY_BYTES_PER_US = 4.3e6

# Hidden units up to which ptxas (12.8, for sm_90) leaves the descriptors of two blocks' matrix
# instructions where they are used: 1272 take up to 254 registers
# (perf/results/static/sm_90.jsonl); of 1536 it keeps all descriptors, and spills.
MOST_UNITS_IN_TURN = 1280

# Plans that are not chosen, but launched where they are forced, until their tests have passed on a
# GPU (perf/GPU.md). The next best takes their place. (Where only torch's path would, as for the
# cooperative plan, it is dispatch.py that decides.)
UNTRIED = ("registers",)


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
        epilogue: ``tanh``, ``relu``, ``tanh_grad`` or ``relu_grad``.
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
        """Bytes of one number of the state."""
        return ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class DeviceLimits:
    """What a plan must stay within.

    Args:
        arch: ``sm_90``, ``gfx942``, ... or ``interpreter``.
        multiprocessors: programs that can run at the same time, one each.
        shared_bytes: shared memory (LDS) that one block may use.
        warp_size: threads a warp.
    """

    arch: str
    multiprocessors: int
    shared_bytes: int
    warp_size: int = 32

    @property
    def is_interpreter(self) -> bool:
        """Whether kernels run on CPU tensors, where every program takes its turn."""
        return self.arch == "interpreter"

    @property
    def is_amd(self) -> bool:
        """Whether the device is AMD's."""
        return self.arch.startswith("gfx")

    @property
    def has_async_copy(self) -> bool:
        """Whether numbers can be sent for to shared memory, by words of 32 bits: since sm_80."""
        return self.is_interpreter or (
            self.arch.startswith("sm_") and int(self.arch.removeprefix("sm_")) >= 80
        )

    @property
    def has_wgmma(self) -> bool:
        """Whether matrix instructions read their operands from shared memory."""
        return self.arch == "sm_90"

    @property
    def has_tanh(self) -> bool:
        """Whether there is an instruction for it: in NVIDIA's since sm_75."""
        return self.arch.startswith("sm_") and int(self.arch.removeprefix("sm_")) >= 75

    @property
    def has_tf32(self) -> bool:
        """Whether matrix instructions multiply TF32 numbers: of AMD's, on the MI300 only."""
        return not self.is_amd or self.arch == "gfx942"


# The devices that kernels are compiled for where there is no GPU, and their limits as the vendors
# publish them.
DEVICES = {
    "sm_80": DeviceLimits("sm_80", multiprocessors=108, shared_bytes=163 * 1024),
    "sm_90": DeviceLimits("sm_90", multiprocessors=132, shared_bytes=227 * 1024),
    "sm_100": DeviceLimits("sm_100", multiprocessors=148, shared_bytes=227 * 1024),
    "gfx942": DeviceLimits("gfx942", multiprocessors=304, shared_bytes=64 * 1024, warp_size=64),
    "interpreter": DeviceLimits("interpreter", multiprocessors=1, shared_bytes=227 * 1024),
}


@dataclass(frozen=True)
class LaunchPlan:
    """Which kernel is launched, and how.

    Args:
        name: ``registers``, ``resident``, ``cooperative`` or ``stepwise``; see ``registers.py``
            and ``recurrence.py`` for the tile pictures.
        block_h: hidden units a program.
        block_b: sequences a program.
        block_k: hidden units of the previous state that one product takes.
        block_read: hidden units of it that a program reads before it multiplies.
        num_warps: warps a program.
        num_stages: turns of the innermost loop that are under way, whose loads the compiler sends
            ahead: a resident walk's steps, a stepwise product's tiles; 1 for none.
        precision: of the products: ``tf32``, ``tf32x3`` (three products of TF32 parts, of fp32
            accuracy) or ``ieee`` (as they are).
        epilogue: the problem's, or ``tanh_approx`` for ``tanh`` by the hardware's instruction.
        programs: programs a launch.
        launches: launches a pass.
        turns: batch blocks that a cooperative program walks at the same time, by turns in each
            step; 1 or 2.
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
    device: DeviceLimits
    turns: int = 1

    def __str__(self) -> str:
        return (
            f"{self.name}: tiles of {self.block_h} hidden units x {self.block_b} sequences "
            f"(products of {self.block_k}, {self.precision}), {self.epilogue}, "
            f"{'two blocks in turn, ' if self.turns == 2 else ''}{self.num_warps} warps, "
            f"{self.programs} programs on {self.device.multiprocessors} multiprocessors, "
            f"{self.launches} launch{'es' if self.launches > 1 else ''}, "
            f"{self.shared_bytes / 1024:.0f} of {self.device.shared_bytes / 1024:.0f} KiB of "
            f"shared memory ({self.device.arch})"
        )


@dataclass(frozen=True)
class Declined:
    """No launch is expected to be faster than torch's own path, for the reason given."""

    reason: str


@functools.lru_cache(maxsize=1024)
def choose_plan(problem: Problem, device: DeviceLimits) -> LaunchPlan | Declined:
    """The plan that the limits call for, or why torch's own path is the better one."""
    if device.is_interpreter:
        # Which is for tests, not for speed.
        return resident_plan(problem, device) or stepwise_plan(problem, device)
    stepwise_us, torch_us = stepwise_step_us(problem), torch_step_us(problem)
    times = []
    # In this order, not by time: the programs of the first wait for nobody.
    for plan_of in (independent_plan, cooperative_plan):
        plan = plan_of(problem, device)
        if plan is not None:
            plan_us = step_us(problem, plan)
            if plan_us <= min(stepwise_us, torch_us):
                return plan
            times.append(f"{plan.name} {plan_us:.3g} us")
    if stepwise_us < torch_us:
        return stepwise_plan(problem, device)
    kib = _power_of_two(problem.H, at_least=16) ** 2 * problem.item_bytes / 1024
    too_large = (
        f"W_hh of {problem.H} x {problem.H} {problem.dtype} (a tile of {kib:.0f} KiB) does not fit "
        f"one multiprocessor of {device.arch} ({device.shared_bytes / 1024:.0f} KiB); "
    )
    prefix = "" if times else too_large
    times.append(f"a Triton launch a step {stepwise_us:.3g} us")
    return Declined(
        f"{prefix}by the limits, a step takes {', '.join(times)}, and {torch_us:.3g} us on torch's "
        "own path"
    )


def plan_without_torch(problem: Problem, device: DeviceLimits) -> LaunchPlan:
    """What to launch where torch's own path would be faster, but is not wanted or can't serve."""
    plan = independent_plan(problem, device)
    if plan is not None and step_us(problem, plan) <= stepwise_step_us(problem):
        return plan
    return stepwise_plan(problem, device)


def independent_plan(problem: Problem, device: DeviceLimits) -> LaunchPlan | None:
    """W_hh in one multiprocessor, where it takes the least time there, or None if it does not fit.

    Its programs wait for nobody.
    """
    plans = [
        plan
        for name in ("registers", "resident")
        if name not in UNTRIED and (plan := PLANS[name](problem, device)) is not None
    ]
    return min(plans, key=lambda plan: step_us(problem, plan), default=None)


def resident_plan(problem: Problem, device: DeviceLimits) -> LaunchPlan | None:
    """W_hh in one multiprocessor's shared memory for the whole walk, or None if it does not fit."""
    block_h = _power_of_two(problem.H, at_least=16)
    precision = _precision(problem, device)
    # Products of fp32 accuracy are few columns wide, 16 at least (arithmetic.multiply_add).
    block_k = block_h // min(4, block_h // 16) if precision == "tf32x3" else block_h
    in_words = device.has_async_copy and problem.H * problem.item_bytes % 4 == 0
    # Three steps ahead, for a number's way from memory may take as long as two steps; fewer where
    # shared memory is full.
    depths = (4, 3, 2) if in_words else (1,)
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
        programs=_cdiv(problem.B, block_b) * problem.G,
        launches=1,
        shared_bytes=shared_bytes,
        device=device,
    )


def registers_plan(problem: Problem, device: DeviceLimits) -> LaunchPlan | None:
    """W_hh in one multiprocessor's registers for the whole walk, or None if it does not fit."""
    if not (device.has_wgmma or device.is_interpreter):
        return None
    block_h = _power_of_two(problem.H, at_least=64)
    precision = _precision(problem, device)
    # Products of fp32 accuracy begin from zero, and are narrow (arithmetic.multiply_add); here all
    # of M is one product. Numbers come to shared memory by themselves, four bytes at least. And
    # beyond these sizes the registers of 2 block_h threads are too few beside W_hh, with which
    # they grow.
    most = {"ieee": 128 if _is_narrow(problem) else 256, "tf32": 128, "tf32x3": 0}[precision]
    if problem.H * problem.item_bytes % 4 != 0 or block_h > most:
        return None
    # The narrowest product there is: a step's latency is that of its epilogue, too.
    block_b = 8
    # Two of the state; four of what is added to its product, and as many of what the epilogue
    # takes.
    tiles = 10 if problem.epilogue.endswith("_grad") else 6
    return LaunchPlan(
        name="registers",
        block_h=block_h,
        block_b=block_b,
        block_k=block_h,
        block_read=block_h,
        # Four warps to the 64 rows of a product.
        num_warps=block_h // 16,
        num_stages=1,
        precision=precision,
        epilogue=_epilogue(problem, device),
        programs=_cdiv(problem.B, block_b) * problem.G,
        launches=1,
        shared_bytes=tiles * block_h * block_b * problem.item_bytes + 1024,
        device=device,
    )


def cooperative_plan(problem: Problem, device: DeviceLimits) -> LaunchPlan | None:
    """The rows of W_hh spread over a gang of programs, or None where that does not fit."""
    if not (device.has_wgmma or device.is_interpreter):
        return None
    # Of 64 rows, which wgmma wants, the fewest bytes are read from shared memory in a step. In the
    # interpreter, where programs take turns, a gang is one program.
    block_h = _power_of_two(problem.H, at_least=64) if device.is_interpreter else 64
    precision = _precision(problem, device)
    # 16 sequences make the most of the weights that a step reads and, for wgmma, are the fewest.
    block_b = 16
    # Each tile of the state is a product of its own that is waited for: the fewer the better, but
    # 512 are no faster to issue than 256, and what H is no multiple of is padded.
    block_k = 256 if problem.dtype != "fp32" and problem.H % 256 == 0 else 128
    if _is_narrow(problem):
        # Every number in a register with an address of its own.
        block_k = 64
    if precision == "tf32x3":
        # Wider products lose accuracy (arithmetic.multiply_add).
        block_k = 32
    tiles = _cdiv(problem.H, block_k)
    tile_bytes = block_k * problem.item_bytes * (2 if precision == "tf32x3" else 1)
    weight_bytes = block_h * tiles * tile_bytes
    # All of the state that there is room for beside the weights is read at once, for each read
    # takes a round trip to L2.
    spare_bytes = max(0, device.shared_bytes - weight_bytes - 1024)
    at_once = min(1 if _is_narrow(problem) else tiles, spare_bytes // (block_b * tile_bytes))
    # fp32 tiles on their way between the layouts of memory and of the product.
    exchange_bytes = 2 * block_h * block_b * 4
    shared_bytes = weight_bytes + max(at_once * block_b * tile_bytes, exchange_bytes) + 1024
    gang = _cdiv(problem.H, block_h)
    # All programs at the same time, one a multiprocessor.
    lanes = device.multiprocessors // (gang * problem.G) if not device.is_interpreter else 1
    if at_once == 0 or lanes == 0 or shared_bytes > device.shared_bytes:
        return None
    lanes = min(lanes, max(1, _cdiv(problem.B, block_b)))
    # Two blocks want the registers of two, which large numbers and odd rows leave too few of.
    spacious = problem.dtype != "fp32" and problem.H * problem.item_bytes % 16 == 0
    turns = 2 if spacious and problem.H <= MOST_UNITS_IN_TURN else 1
    return LaunchPlan(
        name="cooperative",
        block_h=block_h,
        block_b=block_b,
        block_k=block_k,
        block_read=at_once * block_k,
        num_warps=_num_warps(problem, block_h, device),
        num_stages=1,
        precision=precision,
        epilogue=_epilogue(problem, device),
        programs=lanes * gang * problem.G,
        launches=1,
        shared_bytes=shared_bytes,
        device=device,
        turns=turns,
    )


def step_us(problem: Problem, plan: LaunchPlan) -> float:
    """What the limits let a step of one launch take, all batch blocks in it."""
    walk_us = _gangs_step_us if plan.name == "cooperative" else _waves_step_us
    return max(walk_us(problem, plan), _memory_us(problem))


def _waves_step_us(problem: Problem, plan: LaunchPlan) -> float:
    """What all programs take that find room only once others have walked all their steps."""
    together = min(
        plan.device.shared_bytes // plan.shared_bytes,
        THREADS_PER_MULTIPROCESSOR // (plan.device.warp_size * plan.num_warps),
    )
    if plan.name == "registers":
        # About a third of a program's registers hold weights.
        weight_bytes = problem.item_bytes * plan.block_h**2
        together = min(together, max(1, REGISTER_BYTES_PER_MULTIPROCESSOR // (3 * weight_bytes)))
    blocks = _cdiv(problem.B, plan.block_b)
    waves = _cdiv(blocks * problem.G, plan.device.multiprocessors * together)
    return waves * (STEP_CLOCKS + _product_clocks(problem, plan)) / CLOCKS_PER_US


def _gangs_step_us(problem: Problem, plan: LaunchPlan) -> float:
    """What all batch blocks of a gang take, some of them by turns."""
    state = problem.item_bytes * problem.H * plan.block_b / L2_BYTES_PER_CLOCK
    busy_us = (STEP_CLOCKS + _product_clocks(problem, plan) + state) / CLOCKS_PER_US
    lanes = plan.programs // (_cdiv(problem.H, plan.block_h) * problem.G)
    pairs, alone = divmod(_cdiv(_cdiv(problem.B, plan.block_b), lanes), plan.turns)
    # Of two blocks by turns, one is handed over while the gang is busy with the other.
    pair_us = max(plan.turns * busy_us, HANDOFF_US + busy_us)
    return pairs * pair_us + alone * (HANDOFF_US + busy_us)


def _product_clocks(problem: Problem, plan: LaunchPlan) -> float:
    """What a program's weights cost a step: to be read or, from registers, to be multiplied."""
    products = 3 if plan.precision == "tf32x3" else 1
    weights = products * plan.block_h * _cdiv(problem.H, plan.block_k) * plan.block_k
    if plan.name != "registers":
        return problem.item_bytes * weights / SHARED_BYTES_PER_CLOCK
    tflops = TFLOPS["tf32" if problem.dtype == "fp32" else "16-bit"] / plan.device.multiprocessors
    return CLOCKS_PER_US * 2 * weights * plan.block_b / (tflops * 1e6)


def stepwise_step_us(problem: Problem) -> float:
    """What the limits let a step take that is a Triton launch: the launch, product or memory."""
    return max(TRITON_LAUNCH_US, _dense_step_us(problem))


def torch_step_us(problem: Problem) -> float:
    """What the limits let a step of torch's path take: its launches, product or memory."""
    return max(TORCH_STEP_US, _dense_step_us(problem))


def _dense_step_us(problem: Problem) -> float:
    flops = 2 * problem.G * problem.B * problem.H**2
    return max(flops / (TFLOPS[_arithmetic(problem)] * 1e6), _memory_us(problem))


def _memory_us(problem: Problem) -> float:
    # The drive is read and the state written; what the next step reads is in the cache.
    moved_bytes = 2 * problem.G * problem.B * problem.H * problem.item_bytes
    return moved_bytes / MEMORY_BYTES_PER_US


def stepwise_plan(problem: Problem, device: DeviceLimits) -> LaunchPlan:
    """A launch a step: every problem has this plan."""
    precision = _precision(problem, device)
    block_h = min(64, _power_of_two(problem.H, at_least=16))
    block_b = 16
    # Tiles of M and of the state go through registers on their way to the product: 128 bytes of a
    # row, and half as many where each tile is two in its parts, or its numbers come one by one.
    k_bytes = 64 if precision == "tf32x3" or _is_narrow(problem) else 128
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
        programs=_cdiv(problem.B, block_b) * _cdiv(problem.H, block_h) * problem.G,
        launches=problem.T,
        shared_bytes=tiles + 1024,
        device=device,
    )


# What makes the plan of a name for a problem, or None where it does not fit.
PLANS: dict[str, Callable[[Problem, DeviceLimits], LaunchPlan | None]] = {
    "registers": registers_plan,
    "resident": resident_plan,
    "cooperative": cooperative_plan,
    "stepwise": stepwise_plan,
}


def _resident_block_b(problem: Problem, device: DeviceLimits) -> int:
    # Never a function of B, which would compile a kernel for every few batch sizes. The epilogue is
    # a good part of a step and costs what the tile is large, so eight sequences, the fewest that a
    # matrix instruction takes; but as many as AMD's take of 16 bits, and as let Triton choose
    # wgmma, whose narrowest tile it takes to be 16 wide.
    wide = device.has_wgmma or device.is_amd or device.is_interpreter
    return 16 if wide and problem.dtype != "fp32" else 8


def _resident_shared_bytes(
    problem: Problem, precision: str, block_h: int, block_b: int, num_stages: int
) -> int:
    parts = 2 if precision == "tf32x3" else 1
    weights = block_h * block_h * problem.item_bytes * parts
    tile = block_h * block_b * problem.item_bytes
    # What is added to the product and what the epilogue takes, of the steps that are under way.
    under_way = (num_stages - 1) * (2 if problem.epilogue.endswith("_grad") else 1)
    # An fp32 tile on its way between the layouts of memory and of the product.
    exchange = block_h * block_b * 4
    return weights + (parts + under_way) * tile + exchange + 1024


def _arithmetic(problem: Problem) -> str:
    """What the products are to be accurate to."""
    if problem.dtype != "fp32":
        return "16-bit"
    return "tf32" if problem.tf32 else "fp32"


def _precision(problem: Problem, device: DeviceLimits) -> str:
    if not device.has_tf32:
        return "ieee"
    # Without matrix instructions, fp32 products spill and take twice the instructions.
    return {"16-bit": "ieee", "tf32": "tf32", "fp32": "tf32x3"}[_arithmetic(problem)]


def _epilogue(problem: Problem, device: DeviceLimits) -> str:
    # Its error is lost in what rounding to bf16 adds, not so in fp16.
    approximate = problem.epilogue == "tanh" and problem.dtype == "bf16" and device.has_tanh
    return "tanh_approx" if approximate else problem.epilogue


def _num_warps(problem: Problem, block_h: int, device: DeviceLimits) -> int:
    # A warp group of 128 threads to 64 rows of wgmma, a warp to 16 rows of the others. As many as a
    # block may have leave each thread 128 registers: enough only where the product takes its
    # operands from shared memory, and what goes there comes in vectors.
    most = 16 if device.has_wgmma and not _is_narrow(problem) else 8
    # AMD's hold the operands in registers throughout, and two parts of W_hh fill those of 512.
    threads_a_row = 8 if device.is_amd and _precision(problem, device) == "tf32x3" else 2
    return max(1, min(most, threads_a_row * block_h // device.warp_size))


def _is_narrow(problem: Problem) -> bool:
    """Whether rows are so odd that numbers are fetched one by one, each from its own address."""
    return problem.H * problem.item_bytes % 8 != 0


def _power_of_two(n: int, at_least: int) -> int:
    return max(at_least, 1 << (n - 1).bit_length())


def _cdiv(n: int, block: int) -> int:
    return -(-n // block)
