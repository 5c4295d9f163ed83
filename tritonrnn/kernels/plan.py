"""Which launch serves a recurrence: computed from its shape, its dtype and the device's limits.

No tables of shapes and no trial runs: the same problem on the same device always gets the same
plan, and never one that does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass

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
# What torch's step takes at least where it is large: dense products and memory, of an H200.
TFLOPS = {"16-bit": 989, "tf32": 495, "fp32": 67}
MEMORY_BYTES_PER_US = 4.3e6

# Warps a block: more lose their registers to their number.
MAX_WARPS = 16
# Sequences a program: more spill on sm_80 or sm_90, as ``perf static`` shows.
MAX_BLOCK_B = {"16-bit": 32, "tf32": 16, "fp32": 16}
# Of a sequence's state, read at once in the cooperative plan: more takes more registers than there
# are, as ``perf static`` shows.
READ_BYTES = 1024
# Hidden units a group, by arithmetic and sequences a program, up to which the cooperative plan
# keeps its weights and does not spill on sm_90, as ``perf static`` shows.
MAX_COOPERATIVE_H = {
    ("16-bit", 16): 1024,
    ("16-bit", 32): 512,
    ("tf32", 16): 512,
}


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
    def has_wgmma(self) -> bool:
        """Whether matrix instructions read their operands from shared memory."""
        return self.arch == "sm_90"


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
    """How the recurrence kernel is launched.

    Args:
        name: ``resident``, ``cooperative`` or ``stepwise``; see ``recurrence.py`` for the tile
            pictures.
        block_h: hidden units a program.
        block_b: sequences a program.
        block_k: hidden units of the previous state that one product takes.
        num_warps: warps a program.
        num_stages: tiles that the stepwise product keeps in flight.
        precision: of the products: ``tf32``, ``tf32x3`` (three products of TF32 parts, of fp32
            accuracy) or ``ieee`` (as they are).
        programs: programs a launch.
        launches: launches a pass.
        shared_bytes: an upper bound on the shared memory of a program.
        device: the limits that the plan was made for.
    """

    name: str
    block_h: int
    block_b: int
    block_k: int
    num_warps: int
    num_stages: int
    precision: str
    programs: int
    launches: int
    shared_bytes: int
    device: DeviceLimits

    def __str__(self) -> str:
        return (
            f"{self.name}: tiles of {self.block_h} hidden units x {self.block_b} sequences "
            f"(products of {self.block_k}, {self.precision}), {self.num_warps} warps, "
            f"{self.programs} programs on {self.device.multiprocessors} multiprocessors, "
            f"{self.launches} launch{'es' if self.launches > 1 else ''}, "
            f"{self.shared_bytes / 1024:.0f} of {self.device.shared_bytes / 1024:.0f} KiB of "
            f"shared memory ({self.device.arch})"
        )


@dataclass(frozen=True)
class Declined:
    """No launch is expected to be faster than torch's own path, for the reason given."""

    reason: str


def choose_plan(problem: Problem, device: DeviceLimits) -> LaunchPlan | Declined:
    """The plan that the limits call for, or why torch's own path is the better one."""
    resident = resident_plan(problem, device)
    if resident is not None:
        return resident
    cooperative = cooperative_plan(problem, device)
    if cooperative is not None and not device.is_interpreter:
        other_us = min(TRITON_LAUNCH_US, torch_step_us(problem))
        if cooperative_step_us(problem, cooperative) < other_us:
            return cooperative
    if device.is_interpreter or TRITON_LAUNCH_US <= TORCH_STEP_US:
        return stepwise_plan(problem, device)
    kib = problem.H * problem.H * problem.item_bytes / 1024
    return Declined(
        f"W_hh of {problem.H} x {problem.H} {problem.dtype} ({kib:.0f} KiB) does not fit one "
        f"multiprocessor of {device.arch} ({device.shared_bytes / 1024:.0f} KiB), and a Triton "
        f"launch a step (about {TRITON_LAUNCH_US:g} us) costs more than torch's own "
        f"(about {TORCH_STEP_US:g} us)"
    )


def resident_plan(problem: Problem, device: DeviceLimits) -> LaunchPlan | None:
    """W_hh in one multiprocessor for the whole walk, or None where it does not fit."""
    block_h = _power_of_two(problem.H, at_least=16)
    precision = _precision(problem)
    num_warps = _num_warps(block_h, device)
    # As few sequences a program as keep every program on a multiprocessor of its own, for the
    # epilogue is a good part of a step and costs what the tile is large; but as many as let Triton
    # choose wgmma, where there is one.
    smallest = 16 if device.has_wgmma and problem.item_bytes == 2 and block_h >= 64 else 8
    largest = MAX_BLOCK_B[_arithmetic(problem)]
    if num_warps == MAX_WARPS:
        # Half the registers a thread: the backward pass of a packed batch spills at 32.
        largest = min(largest, 16)
    block_b = smallest
    while block_b < largest and _cdiv(problem.B, block_b) * problem.G > device.multiprocessors:
        block_b *= 2
    while True:
        shared_bytes = _resident_shared_bytes(problem, block_h, block_b)
        if shared_bytes <= device.shared_bytes:
            break
        if block_b == smallest:
            return None
        block_b //= 2
    return LaunchPlan(
        name="resident",
        block_h=block_h,
        block_b=block_b,
        block_k=block_h,
        num_warps=num_warps,
        num_stages=1,
        precision=precision,
        programs=_cdiv(problem.B, block_b) * problem.G,
        launches=1,
        shared_bytes=shared_bytes,
        device=device,
    )


def cooperative_plan(problem: Problem, device: DeviceLimits) -> LaunchPlan | None:
    """The rows of W_hh spread over a gang of programs, or None where that does not fit."""
    if not (device.has_wgmma or device.is_interpreter):
        return None
    # Of 64 rows, which wgmma wants, the fewest bytes are read from shared memory in a step. In the
    # interpreter, where programs take turns, a gang is one program.
    block_h = _power_of_two(problem.H, at_least=64) if device.is_interpreter else 64
    candidates = (_cooperative_plan(problem, device, block_h, block_b) for block_b in (16, 32))
    plans = [plan for plan in candidates if plan is not None]
    return min(plans, key=lambda plan: cooperative_step_us(problem, plan), default=None)


def _cooperative_plan(
    problem: Problem, device: DeviceLimits, block_h: int, block_b: int
) -> LaunchPlan | None:
    largest = MAX_COOPERATIVE_H.get((_arithmetic(problem), block_b), 0)
    if problem.H > largest and not device.is_interpreter:
        return None
    block_k = 128
    columns = _cdiv(problem.H, block_k) * block_k
    shared_bytes = (
        block_h * columns * problem.item_bytes
        # The state that is read at once.
        + block_b * max(READ_BYTES, block_k * problem.item_bytes)
        # fp32 tiles on their way between the layouts of memory and of the product.
        + 2 * block_h * block_b * 4
        + 1024
    )
    gang = _cdiv(problem.H, block_h)
    # All programs at the same time, one a multiprocessor.
    at_once = device.multiprocessors // (gang * problem.G) if not device.is_interpreter else 1
    lanes = min(at_once, _cdiv(problem.B, block_b))
    if lanes == 0 or shared_bytes > device.shared_bytes:
        return None
    return LaunchPlan(
        name="cooperative",
        block_h=block_h,
        block_b=block_b,
        block_k=block_k,
        num_warps=_num_warps(block_h, device),
        num_stages=1,
        precision=_precision(problem),
        programs=lanes * gang * problem.G,
        launches=1,
        shared_bytes=shared_bytes,
        device=device,
    )


def cooperative_step_us(problem: Problem, plan: LaunchPlan) -> float:
    """What the limits let a step of a cooperative plan take, all batch blocks of a gang in it."""
    clocks = (
        STEP_CLOCKS
        + problem.item_bytes * problem.H * plan.block_b / L2_BYTES_PER_CLOCK
        + problem.item_bytes * problem.H * plan.block_h / SHARED_BYTES_PER_CLOCK
    )
    lanes = plan.programs // (_cdiv(problem.H, plan.block_h) * problem.G)
    turns = _cdiv(_cdiv(problem.B, plan.block_b), lanes)
    return turns * (HANDOFF_US + clocks / CLOCKS_PER_US)


def torch_step_us(problem: Problem) -> float:
    """What the limits let a step of torch's path take: launches, products or memory."""
    states = problem.G * problem.B * problem.H
    product = 2 * states * problem.H / (TFLOPS[_arithmetic(problem)] * 1e6)
    # The drive is read and the state written; what the next step reads is in the cache.
    memory = 2 * states * problem.item_bytes / MEMORY_BYTES_PER_US
    return max(TORCH_STEP_US, product, memory)


def stepwise_plan(problem: Problem, device: DeviceLimits) -> LaunchPlan:
    """A launch a step: every problem has this plan."""
    precision = _precision(problem)
    block_h = min(64, _power_of_two(problem.H, at_least=16))
    block_b = min(MAX_BLOCK_B[_arithmetic(problem)], _power_of_two(problem.B, at_least=8))
    # Three products a tile take more registers than one.
    block_k = min(32 if _arithmetic(problem) == "fp32" else 64, block_h)
    num_stages = 3
    tiles = num_stages * block_k * (block_h + block_b) * problem.item_bytes
    return LaunchPlan(
        name="stepwise",
        block_h=block_h,
        block_b=block_b,
        block_k=block_k,
        num_warps=_num_warps(block_h, device),
        num_stages=num_stages,
        precision=precision,
        programs=_cdiv(problem.B, block_b) * _cdiv(problem.H, block_h) * problem.G,
        launches=problem.T,
        shared_bytes=tiles + 1024,
        device=device,
    )


def _resident_shared_bytes(problem: Problem, block_h: int, block_b: int) -> int:
    parts = 2 if _arithmetic(problem) == "fp32" else 1
    weights = block_h * block_h * problem.item_bytes * parts
    state = block_h * block_b * problem.item_bytes * parts
    # fp32 tiles on their way between the layouts of memory and of the product.
    exchange = 2 * block_h * block_b * 4
    return weights + state + exchange + 1024


def _arithmetic(problem: Problem) -> str:
    """What the products are to be accurate to."""
    if problem.dtype != "fp32":
        return "16-bit"
    return "tf32" if problem.tf32 else "fp32"


def _precision(problem: Problem) -> str:
    # Without matrix instructions, fp32 products spill and take twice the instructions.
    return {"16-bit": "ieee", "tf32": "tf32", "fp32": "tf32x3"}[_arithmetic(problem)]


def _num_warps(block_h: int, device: DeviceLimits) -> int:
    # A warp group of 128 threads to 64 rows of wgmma, a warp to 16 rows of the others.
    return max(1, min(MAX_WARPS, 2 * block_h // device.warp_size))


def _power_of_two(n: int, at_least: int) -> int:
    return max(at_least, 1 << (n - 1).bit_length())


def _cdiv(n: int, block: int) -> int:
    return -(-n // block)
