"""One launch of a plan: its arguments, compiled as the package compiles them, and its verdict.

Everything that depends on the package's kernels and their arguments is in this file.
"""

from __future__ import annotations

import ctypes
import hashlib
import time
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from tests.support import oracle
from tests.support.ptxsim import ptx
from tests.support.ptxsim.instructions import Kernel
from tests.support.ptxsim.machine import Launch
from tests.support.ptxsim.memory import EmulationError, Faults, GlobalMemory
from tests.support.ptxsim.scalar import Array
from tritonrnn.kernels import launch
from tritonrnn.kernels.devices import DEVICES, Device
from tritonrnn.kernels.plan import PLANS, LaunchPlan, Problem
from tritonrnn.layout import SequenceLayout
from tritonrnn.ragged import RaggedLayout

KERNELS = Path(launch.__file__).parent
# dtype of the tensors, and whether fp32 products may be TF32.
ARITHMETIC = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}
CHOICES = {
    "plan": tuple(PLANS),
    # Of the others the emulator knows the instructions, too, as long as no kernel has tcgen05.
    "arch": tuple(arch for arch in DEVICES if arch.startswith("sm_")),
    "arithmetic": tuple(ARITHMETIC),
    "epilogue": tuple(oracle.EPILOGUES),
    "layout": ("time_major", "batch_major", "packed", "ragged", "padded"),
    "inputs": ("normal", "overflow"),
}
# As long as no CTA is lost, none gives up.
GAVE_UP = "a CTA gave up waiting for its group"


@dataclass(frozen=True)
class Case:
    """What is launched.

    Args:
        plan: of the package's plans.
        arch: that the kernel is compiled for.
        arithmetic: dtype of the tensors, or ``tf32``: fp32 with TF32 products.
        H: hidden units a group.
        T: time steps of the longest sequence.
        B: sequences.
        G: groups.
        layout: ``ragged`` has sequences one after the other; ``padded`` has rows after the end of
            each sequence, which hold NaN, and are to become 0.
        epilogue: ``tanh``, ``relu``, ``tanh_grad`` or ``relu_grad``.
        v_0: whether v_0 is given.
        seed: of the inputs, of which groups walk backwards, and of the schedule.
        schedule: added to the seed of the schedule alone.
        lengths: of the sequences, for the layouts that have them; else from T to 1, some of them 0
            where the layout allows it.
        inputs: ``overflow`` has states that overflow to infinity.
        poison: run it once more with NaN and infinity in two sequences, which no other may see.
        cta_groups: as many as a cooperative plan has room for in each group; 0 for the device's.
        interleave: in place of the plan's; 0 for the plan's.
        gap: elements between the rows of M, a view into a larger matrix.
        far: put 2³¹ elements between the first and the last time step (packed layouts only).
        lost: the index of a CTA that never runs; -1 for none.
        max_spins: in place of the package's; 0 for that.
        truncates: truncate the sums of MMAs, as tensor cores do.
    """

    plan: str = "resident"
    arch: str = "sm_90"
    arithmetic: str = "bf16"
    H: int = 64
    T: int = 3
    B: int = 5
    G: int = 1
    layout: str = "time_major"
    epilogue: str = "tanh"
    v_0: bool = True
    seed: int = 0
    schedule: int = 0
    lengths: tuple[int, ...] = ()
    inputs: str = "normal"
    poison: bool = False
    cta_groups: int = 0
    interleave: int = 0
    gap: int = 0
    far: bool = False
    lost: int = -1
    max_spins: int = 0
    truncates: bool = False

    def __str__(self) -> str:
        return "-".join(
            [self.plan, self.arch, self.arithmetic]
            + [f"{name}{getattr(self, name)}" for name in "HTBG"]
            + [self.layout, self.epilogue, "v_0" if self.v_0 else "no_v_0"]
            + [
                f"{f.name}{getattr(self, f.name)}".replace("True", "")
                for f in fields(self)[10:]
                if getattr(self, f.name) != f.default
            ]
        )

    @property
    def problem(self) -> Problem:
        """Return the problem that a plan is made for."""
        dtype, tf32 = ARITHMETIC[self.arithmetic]
        name = launch.DTYPES[dtype]
        return Problem(self.rows.T, self.B, self.G, self.H, name, tf32, self.epilogue)

    @property
    def device(self) -> Device:
        """Return the device that the plan is made for."""
        device = DEVICES[self.arch]
        plan = PLANS[self.plan](self.problem, device) if self.cta_groups else None
        if plan is not None:
            ctas = self.cta_groups * self.G * -(-self.H // plan.block_h)
            device = replace(device, multiprocessors=ctas)
        return device

    @property
    def launch_plan(self) -> LaunchPlan | None:
        """Return the plan, or None where it does not fit."""
        plan = PLANS[self.plan](self.problem, self.device)
        return replace(plan, interleave=self.interleave) if plan and self.interleave else plan

    @property
    def reverse(self) -> tuple[bool, ...]:
        """Return which groups walk from the last step to the first."""
        if self.G == 2:
            return False, True
        return tuple((g + self.seed) % 3 == 1 for g in range(self.G))

    @cached_property
    def _lengths(self) -> list[int]:
        if self.lengths:
            return list(self.lengths)
        lengths = torch.linspace(self.T, 1, self.B).long().tolist()
        if self.layout in ("ragged", "padded"):
            lengths = [0 if b % 4 == 3 else n for b, n in enumerate(lengths)]
            lengths = lengths[2:] + lengths[:2]
        return lengths

    @cached_property
    def rows(self) -> SequenceLayout:
        """Return the row map."""
        if self.layout == "time_major":
            return SequenceLayout.time_major(self.T, self.B)
        if self.layout == "batch_major":
            return SequenceLayout.batch_major(self.B, self.T)
        lengths = torch.tensor(self._lengths)
        if self.layout == "ragged":
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            return RaggedLayout.jagged(offsets, int(offsets[-1]))
        if self.layout == "padded":
            return RaggedLayout.padded(self.T, self.B, False, lengths)
        sizes = [int((lengths > t).sum()) for t in range(self.T)]
        rows = SequenceLayout.packed(sizes, sum(sizes))
        if self.far:
            gap = 2**31 // (self.G * self.H) // max(1, self.T - 1)
            far = replace(rows, N=rows.N + gap * (self.T - 1))
            vars(far)["time_base"] = rows.time_base + gap * torch.arange(self.T)
            return far
        return rows


@dataclass
class Result:
    """What an emulation shows.

    Args:
        faults: races and all else that must not be, one line each.
        error: why the launch ended early.
        close: whether the output is as close to float64 as it must be.
        max_error: the largest error of an element.
        allowed: how large it may be.
        digest: of the output.
        instructions: that were executed.
        unexecuted: lines of the PTX that no thread has executed.
        static: instructions of the program.
        compile_s: how long compilation took, to PTX.
        emulate_s: how long the emulation took.
    """

    faults: list[str] = field(default_factory=list)
    error: str = ""
    close: bool = False
    max_error: float = float("nan")
    allowed: float = float("nan")
    digest: str = ""
    instructions: int = 0
    unexecuted: tuple[int, ...] = ()
    static: int = 0
    compile_s: float = 0.0
    emulate_s: float = 0.0

    @property
    def passed(self) -> bool:
        """Return whether the output is right and nothing was found."""
        return self.close and not self.faults and not self.error

    def __str__(self) -> str:
        verdict = "pass" if self.passed else "FAIL"
        lines = [
            f"{verdict}: max error {self.max_error:.2e} of {self.allowed:.2e} allowed, "
            f"{self.instructions} instructions ({len(self.unexecuted)} of {self.static} never), "
            f"compiled in {self.compile_s:.1f} s, emulated in {self.emulate_s:.1f} s",
            *([self.error] if self.error else []),
            *self.faults,
        ]
        return "\n    ".join(lines)


def _place(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an empty tensor 16 bytes after a multiple of 256, no better aligned than promised."""
    count = int(np.prod(shape))
    storage = torch.empty(count * dtype.itemsize + 512, dtype=torch.uint8)
    first = -storage.data_ptr() % 256 + 16
    return storage[first : first + count * dtype.itemsize].view(dtype).view(shape)


def _memory_of(tensor: Tensor) -> Array:
    """Return the memory of a tensor, from its first element to its last, as 16-bit words."""
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    words = ctypes.c_uint16 * ((last + 1) * tensor.itemsize // 2)
    return np.ctypeslib.as_array(words.from_address(tensor.data_ptr()))


@lru_cache(maxsize=1)
def _kernel(text: str, truncates: bool) -> Kernel:
    return Kernel(ptx.parse(text), truncates)


def _stop_at_ptx(backend: Any = None, stages: dict[str, Any] | None = None, *rest: Any) -> Any:
    """Keep Triton from running ptxas: a hook of its compiler."""
    if stages is not None:
        stages["cubin"] = lambda source, metadata: b"none"
    return "PTX only", "PTX only"


class Prepared:
    """A case with its tensors and its compiled kernel.

    Args:
        case: what is launched.

    Raises:
        ValueError: the plan does not fit.
    """

    def __init__(self, case: Case):
        plan = case.launch_plan
        if plan is None:
            raise ValueError(f"the plan does not fit: {case}")
        self.case, self.plan = case, plan
        (dtype, _), G, H = ARITHMETIC[case.arithmetic], case.G, case.H
        # The row map of the oracle, which has nothing between time steps.
        self.dense = replace(case, far=False).rows
        generator = torch.Generator().manual_seed(1000 * case.seed + self.dense.N * H)

        def normal(*shape: int, scale: float, dtype: torch.dtype = dtype) -> Tensor:
            return _place(shape, dtype).copy_(scale * torch.randn(*shape, generator=generator))

        self.drive = normal(self.dense.N, G * H, scale=2.0)
        self.M = normal(G, H, H + case.gap, scale=H**-0.5)[:, :, :H]
        is_gradient = case.epilogue.endswith("_grad")
        v_0_dtype = dtype if is_gradient else torch.float32
        self.v_0 = normal(G, case.B, H, scale=2.0, dtype=v_0_dtype) if case.v_0 else None
        # A layer without hx needs no gradient of it.
        self.ends = _place((G, case.B, H), dtype) if case.v_0 or not is_gradient else None
        self.aux = None
        if is_gradient:
            forward = oracle.EPILOGUES[case.epilogue.removesuffix("_grad")]
            self.aux = normal(self.dense.N, G * H, scale=2.0)
            self.aux.copy_(forward(self.aux.float(), None))
            # The backward pass multiplies by a transposed view.
            self.M = self.M.transpose(1, 2)
        if case.inputs == "overflow":
            self.drive.abs_()
            self.M.abs_().mul_(9)
            if self.aux is not None:
                self.aux.fill_(0 if case.epilogue == "tanh_grad" else 1)
        self.sequences = oracle.sequences(self.dense)
        self.live = sorted(row for rows in self.sequences for row in rows)
        self.dead = sorted(set(range(self.dense.N)) - set(self.live))
        for tensor in (self.drive, self.aux):
            if tensor is not None:
                tensor[self.dead] = torch.nan
        # Pages that nobody touches are never backed by memory. As in a layer, only a forward pass
        # overwrites a.
        self.a = _place((case.rows.N, G * H), dtype)
        self.s = _place((case.rows.N, G * H), dtype) if is_gradient else self.a
        self.place: Any = slice(None)
        if case.far:
            starts = zip(case.rows.time_base.tolist(), self.dense.batch_sizes or (), strict=True)
            self.place = torch.cat([first + torch.arange(n) for first, n in starts])
        self._compile()

    def _compile(self) -> None:
        from perf.compile.static import TargetDriver

        case, plan = self.case, self.plan
        triton.runtime.driver.set_active(TargetDriver(plan.device))
        triton.knobs.runtime.add_stages_inspection_hook = _stop_at_ptx
        tensors = self.a, self.s, self.v_0, self.M, self.aux, self.ends
        spins, launch.MAX_SPINS = launch.MAX_SPINS, case.max_spins or launch.MAX_SPINS
        try:
            arguments = launch.kernel_arguments(
                *tensors, case.rows, case.problem, case.reverse, plan
            )
        finally:
            launch.MAX_SPINS = spins
        if plan.name == "stepwise":
            arguments["step"] = 0
        self.grid = launch.grid(case.problem, plan)
        started = time.perf_counter()
        compiled = launch.kernel_of(plan).warmup(grid=self.grid, **arguments)
        self.compile_s = time.perf_counter() - started
        self.ptx: str = compiled.asm["ptx"]
        self.shared_bytes: int = compiled.metadata.shared
        signature = compiled.src.signature.items()
        self.arguments = {name: arguments[name] for name, kind in signature if kind != "constexpr"}
        self.counters: Tensor | None = arguments.get("counters_ptr")

    def emulate(
        self, text: str | None = None, *, schedule: int | None = None, stop: bool = False
    ) -> Result:
        """Run the kernel and compare its output with the oracle's.

        Args:
            text: PTX to run in place of the kernel's.
            schedule: in place of the case's.
            stop: whether to stop at the first fault.
        """
        self.schedule = self.case.schedule if schedule is None else schedule
        result = Result(compile_s=self.compile_s)
        faults = Faults(stop)
        started = time.perf_counter()
        try:
            output = self._run(text or self.ptx, faults, result)
            self._compare(output, faults, result)
            if self.case.poison:
                self._poison(output, faults)
        except (EmulationError, ptx.Unsupported) as error:
            result.error = f"{type(error).__name__}: {error}"
        result.faults = faults.lines()
        result.emulate_s = time.perf_counter() - started
        return result

    def _run(self, text: str, faults: Faults, result: Result) -> Tensor:
        """Return the rows that the kernel leaves."""
        case = self.case
        self.s[self.place] = torch.nan
        self.a[self.place] = self.drive
        if self.ends is not None:
            self.ends.fill_(torch.nan)
        if self.counters is not None:
            self.counters.fill_(1)
        kernel = _kernel(text, case.truncates)
        kernel.executed.clear()
        for step in range(max(case.rows.T, 1) if self.plan.name == "stepwise" else 1):
            memory = GlobalMemory()
            values: list[Any] = []
            for name, value in (self.arguments | {"step": step}).items():
                if name not in self.arguments:
                    continue
                if isinstance(value, Tensor):
                    writable = any(value is x for x in (self.s, self.ends, self.counters))
                    residue = value.data_ptr() % 256
                    if name == "s_ptr" and value is self.a:
                        value = values[0]
                    else:
                        value = memory.add(name, _memory_of(value), residue, writable)
                values.append(value)
            # Triton's scratch memory, which these kernels have none of.
            values += [0] * (len(kernel.program.parameters) - len(values))
            grid = Launch(
                kernel,
                self.grid,
                self.plan.num_warps,
                self.shared_bytes,
                values,
                memory,
                faults,
                seed=case.seed + self.schedule + step,
                interleaved=self.plan.name == "cooperative",
                lost=case.lost,
            )
            grid.run()
            result.instructions += grid.count
        result.static = len(kernel.lines)
        result.unexecuted = tuple(sorted(kernel.lines - kernel.executed))
        return self.s[self.place].clone()

    def _compare(self, output: Tensor, faults: Faults, result: Result) -> None:
        """Allow twice torch's own distance from float64 in the mean, four times in the maximum."""
        if output[self.dead].any():
            faults.add("padding is not 0")
        if self.ends is not None and not self._has_ends(output):
            faults.add("the end of a walk is wrong")
        if self.counters is not None and int(self.counters[0, 0]) != 1:
            faults.add(GAVE_UP)
        live = output[self.live]
        result.digest = hashlib.sha256(bytes(live.view(torch.uint8).numpy())).hexdigest()
        if self.case.inputs == "overflow":
            result.close = bool(live.isinf().any()) and torch.equal(
                live.isnan(), self._by_torch.isnan()
            )
            return
        error, by_torch = live.double() - self._expected, self._by_torch.double() - self._expected
        eps = torch.finfo(live.dtype).eps
        rounding = eps / 4 * self._expected.square().mean().sqrt()
        rms, allowed_rms = (x.square().mean().sqrt() for x in (error, by_torch))
        result.max_error = float(error.abs().max())
        result.allowed = 4 * float(torch.maximum(by_torch.abs().max(), rounding))
        result.close = result.max_error <= result.allowed and bool(
            rms <= 2 * torch.maximum(allowed_rms, rounding)
        )

    def _has_ends(self, output: Tensor) -> bool:
        """Return whether ``ends`` has the row that each sequence's walk ended with."""
        assert self.ends is not None
        H = self.case.H
        expected = torch.full_like(self.ends, torch.nan if self.aux is None else 0)
        for b, rows in enumerate(self.sequences):
            for g, backwards in enumerate(self.case.reverse if rows else ()):
                expected[g, b] = output[rows[0 if backwards else -1], g * H : (g + 1) * H]
        return torch.equal(self.ends.nan_to_num(7.0), expected.nan_to_num(7.0))

    @cached_property
    def _expected(self) -> Tensor:
        return self._oracle(torch.float64)

    @cached_property
    def _by_torch(self) -> Tensor:
        return self._oracle(self.a.dtype)

    def _oracle(self, dtype: torch.dtype) -> Tensor:
        rounds = self.case.arithmetic == "tf32" and dtype != torch.float64
        return oracle.recurrence(
            self.drive,
            self.v_0,
            self.M,
            self.aux,
            self.dense,
            epilogue=self.case.epilogue,
            reverse=self.case.reverse,
            dtype=dtype,
            **({"operand": oracle.round_to_tf32} if rounds else {}),
        )[self.live]

    def _poison(self, clean: Tensor, faults: Faults) -> None:
        """Put NaN in one sequence and NaN or infinity in another, and see who else notices."""
        inputs = [x for x in (self.drive, self.v_0, self.aux) if x is not None]
        before = [x.clone() for x in inputs]
        # Where only one sequence has a token, nobody is left to notice but the sequence itself.
        first, second = [*(rows for rows in self.sequences if rows), []][:2]
        for rows in (self.drive, self.aux):
            if rows is not None:
                rows[first] = torch.nan
                rows[second[-1:]] = torch.inf
        if self.v_0 is not None and second:
            self.v_0[:, self.sequences.index(second)] = torch.nan
        output = self._run(self.ptx, faults, Result())
        for x, clean_x in zip(inputs, before, strict=True):
            x.copy_(clean_x)
        others = sorted(set(self.live) - {*first, *second})
        if not torch.equal(output[others], clean[others]):
            faults.add("NaN of one sequence reaches another")
        if self.case.epilogue != "relu_grad" and not output[first].isnan().all():
            faults.add("NaN of a sequence is lost")
