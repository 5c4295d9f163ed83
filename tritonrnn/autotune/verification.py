"""Whether a plan's kernel computes the right numbers on the device at hand.

It is held to the torch path in float64, and to itself, bit by bit.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonrnn.autotune.bench import Bench
from tritonrnn.autotune.records import Kernel
from tritonrnn.kernels import launch
from tritonrnn.kernels.cost import programs_at_once
from tritonrnn.kernels.devices import device_of
from tritonrnn.kernels.plan import Problem, cdiv, plan_named
from tritonrnn.layout import SequenceLayout
from tritonrnn.paths import inplace
from tritonrnn.precision import products_as_in_rnn
from tritonrnn.ragged import RaggedLayout

DTYPES = {name: dtype for dtype, name in launch.DTYPES.items()}
# A kernel is wrong if as many seeds of four fail: one that rounding decides, a unit of relu
# that it moves across 0 for one, is no fault.
SEEDS, FAILURES = 4, 3
# Elements of NaN before and after each tensor.
GUARD = 64
# A recorded error is no larger, infinite and undefined ones included.
MOST = 1e9


@dataclass(frozen=True)
class Sample:
    """Arguments of one recurrence."""

    layout: SequenceLayout
    a: Tensor
    v_0: Tensor | None
    M: Tensor
    aux: Tensor | None


def verify(kernel: Kernel, bench: Bench) -> tuple[bool, str, float]:
    """Run a kernel on small ragged batches, and on one that fills the device.

    Returns:
        Whether it is right; why, in one line; and its largest error, as a share of what is allowed.

    Raises:
        Exception: what compiling and launching the kernel raises.
    """
    worst = 0.0
    for layout_of in (_small_layout, _full_layout):
        failed, error, why = 0, 0.0, ""
        for seed in range(SEEDS):
            layout = layout_of(kernel, bench, seed)
            sample = draw(kernel, layout, bench.device, seed)
            run = _run(kernel, sample)
            if run is None:
                return False, "it writes where no token is", MOST
            first, ends = run
            again = _run(kernel, sample)
            if again is None or not _same_bits(first, again[0]):
                return False, "two runs of it differ", MOST
            share = _error(kernel, sample, first)
            if share <= 1:
                worst = max(worst, share)
                if not _same_bits(ends, layout.final_states(first, _reverse(kernel), None)):
                    return False, "the final states it stores are wrong", MOST
            else:
                failed, error = failed + 1, max(error, share)
                why = (
                    f"{error:.3g} times the error that is allowed, in {failed} of {seed + 1} seeds"
                )
            if failed == FAILURES:
                return False, why, error
            if seed + 1 - failed > SEEDS - FAILURES:
                break
    return True, "as accurate as torch", worst


def precompile(kernel: Kernel, bench: Bench) -> Callable[[], None]:
    """Return a function that compiles a kernel as :func:`verify` launches it, in any thread."""
    layouts = [_small_layout(kernel, bench, 0)]
    if kernel.mapped:
        # Each layout takes other terms of the row map from memory.
        lengths = torch.ones(1, dtype=torch.int64, device="cpu")
        layouts += [_small_layout(kernel, bench, 1), RaggedLayout.padded(1, 1, False, lengths)]

    def compile_all() -> None:
        for layout in layouts:
            sample = draw(kernel, layout, bench.device, 0)
            _launch(kernel, sample, sample.a, sample.a, compile_only=True)

    return compile_all


def error_share(got: Tensor, torchs: Tensor, exact: Tensor, eps: float) -> float:
    """Return the error of a result as a share of what is allowed: right if at most 1.

    Allowed are twice the root-mean-square error and four times the largest error of the torch path
    in the same dtype, each of at least a quarter of a rounding. Root mean squares are steady where
    maxima are luck; the maxima show one wrong element among many.

    Args:
        got: the result.
        torchs: the torch path's, in the same dtype.
        exact: the torch path's, in float64.
        eps: of the dtype.
    """
    error, of_torch = got.double() - exact, torchs.double() - exact
    rounding = eps / 4 * _rms(exact)
    shares = [
        size(error) / (factor * torch.maximum(size(of_torch), rounding))
        for factor, size in ((2, _rms), (4, _largest))
    ]
    share = torch.stack(shares).max().item()
    # A NaN is no share of anything, and 0 of 0 is right.
    return share if share == share else 0.0 if torch.equal(got.double(), exact) else MOST


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def _largest(x: Tensor) -> Tensor:
    return x.abs().max()


def _error(kernel: Kernel, sample: Sample, got: Tensor) -> float:
    live = sample.layout.live_rows(got.device)
    tokens = slice(None) if live is None else live
    exact = torchs_result(kernel, sample, torch.float64)
    torchs = torchs_result(kernel, sample, got.dtype)
    eps = torch.finfo(got.dtype).eps
    return min(MOST, error_share(got[tokens], torchs[tokens], exact[tokens], eps))


def torchs_result(kernel: Kernel, sample: Sample, dtype: torch.dtype) -> Tensor:
    """Return the torch path's result, computed in ``dtype``."""
    a, M, v_0, aux = sample.a.to(dtype, copy=True), sample.M.to(dtype), sample.v_0, sample.aux
    if kernel.tf32 and dtype == torch.float32:
        # torch's products may use TF32, and for some sizes they do not.
        M = _round_to_tf32(M)
    with products_as_in_rnn(a.device, dtype):
        inplace.recurrence(
            a,
            None if v_0 is None else v_0.to(torch.promote_types(dtype, v_0.dtype)),
            M,
            None if aux is None else aux.to(dtype),
            sample.layout,
            epilogue=kernel.epilogue,
            reverse=_reverse(kernel),
        )
    return a


def _round_to_tf32(x: Tensor) -> Tensor:
    """Round to 10 fraction bits of 23."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & -(1 << 13)).view(torch.float32)


def _run(kernel: Kernel, sample: Sample) -> tuple[Tensor, Tensor] | None:
    """Return the kernel's result, and what its walks end with.

    None if it wrote outside of all rows, anything but 0 to rows of no token, or to the gradient of
    the output.
    """
    # As in a layer, which overwrites the drive, but not the gradient of the output.
    a = _among_nan(sample.a)
    s = _among_nan(torch.full_like(a, torch.nan)) if _is_gradient(kernel) else a
    with launch.trial():
        ends = _launch(kernel, sample, a, s)
    assert ends is not None
    whole = s.as_strided((s.numel() + 2 * GUARD,), (1,), 0)
    is_kept = whole[:GUARD].isnan().all() & whole[-GUARD:].isnan().all()
    live = sample.layout.live_rows(s.device)
    if live is not None:
        is_kept = is_kept & (s[~live] == 0).all()
    if s is not a and not _same_bits(a, sample.a):
        return None
    return (s, ends) if bool(is_kept) else None


def _launch(
    kernel: Kernel, sample: Sample, a: Tensor, s: Tensor, *, compile_only: bool = False
) -> Tensor | None:
    return launch.recurrence(
        a,
        sample.v_0,
        sample.M,
        sample.aux,
        sample.layout,
        epilogue=kernel.epilogue,
        reverse=_reverse(kernel),
        tf32=kernel.tf32,
        plan=kernel.plan,
        s=s,
        compile_only=compile_only,
    )


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.nan_to_num(nan=torch.inf), second.nan_to_num(nan=torch.inf))


def _is_gradient(kernel: Kernel) -> bool:
    return kernel.epilogue.endswith("_grad")


def _reverse(kernel: Kernel) -> tuple[bool, ...]:
    """Return the directions of a layer's groups, in the pass of the epilogue."""
    return tuple(_is_gradient(kernel) != (group % 2 == 1) for group in range(kernel.G))


def draw(kernel: Kernel, layout: SequenceLayout, device: torch.device, seed: int) -> Sample:
    """Return inputs for which tanh saturates in places and relu is off in others, among NaN."""
    generator = torch.Generator(device).manual_seed(seed)
    G, H, dtype = kernel.G, kernel.H, DTYPES[kernel.dtype]

    def normal(*shape: int, scale: float, dtype: torch.dtype = dtype) -> Tensor:
        drawn = scale * torch.randn(*shape, generator=generator, device=device)
        return _among_nan(drawn.to(dtype))

    a = normal(layout.N, G * H, scale=2.0)
    M = normal(G, H, H, scale=H**-0.5)
    # The gradient of h_n is handed in as it is.
    v_0_dtype = dtype if _is_gradient(kernel) else torch.float32
    v_0 = normal(G, layout.B, H, scale=2.0, dtype=v_0_dtype) if kernel.v_0 else None
    aux = None
    if _is_gradient(kernel):
        activation = torch.tanh if kernel.epilogue == "tanh_grad" else torch.relu
        aux = _among_nan(activation(normal(layout.N, G * H, scale=2.0)))
        # As the backward pass hands it in.
        M = M.mT
    live = layout.live_rows(a.device)
    if live is not None:
        a[~live] = torch.nan
        if aux is not None:
            aux[~live] = torch.nan
    return Sample(layout, a, v_0, M, aux)


def _among_nan(tensor: Tensor) -> Tensor:
    whole = tensor.new_full((tensor.numel() + 2 * GUARD,), torch.nan)
    inner = whole[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def _small_layout(kernel: Kernel, bench: Bench, seed: int) -> SequenceLayout:
    T, B = bench.steps, bench.sequences
    if not kernel.mapped:
        return _padded(T, B, seed)
    # None, one and many tokens, in no order.
    chance = random.Random(seed)
    lengths = [0, 1, T, *(chance.randint(0, T) for _ in range(B - 3))]
    if seed % 2 == 1:
        sizes = [sum(length > t for length in lengths) for t in range(T)]
        return SequenceLayout.packed(sizes, sum(sizes))
    chance.shuffle(lengths)
    offsets = torch.tensor([0, *lengths], device="cpu").cumsum(0)
    return RaggedLayout.jagged(offsets, int(offsets[-1]))


def _full_layout(kernel: Kernel, bench: Bench, seed: int) -> SequenceLayout:
    """Return a batch of as many programs as the device runs at once, some sequences more."""
    T = bench.steps
    problem = Problem(T, 1, kernel.G, kernel.H, kernel.dtype, kernel.tf32, kernel.epilogue)
    plan = plan_named(kernel.plan, problem, device_of(bench.device))
    programs_a_block = kernel.G * cdiv(kernel.H, plan.block_h)
    blocks = cdiv(programs_at_once(problem, plan), programs_a_block)
    B = blocks * plan.interleave * plan.block_b + 3
    if not kernel.mapped:
        return _padded(T, B, seed)
    chance = random.Random(seed)
    lengths = torch.tensor([chance.randint(0, T) for _ in range(B)], device="cpu")
    return RaggedLayout.padded(T, B, seed % 2 == 1, lengths)


def _padded(T: int, B: int, seed: int) -> SequenceLayout:
    if seed % 2 == 1:
        return SequenceLayout.batch_major(B, T)
    return SequenceLayout.time_major(T, B)
