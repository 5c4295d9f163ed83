"""Launch a kernel a second time without Triton's look-up, which takes longer than the launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

# The kernels that have been launched, as Triton compiled them, by the kind of launch.
_known: dict[tuple[Any, ...] | None, tuple[Any, Any]] = {}
_MOST_KNOWN = 4096

_ROW_MAP = ["time_base_ptr", "batch_base_ptr", "lengths_ptr"]
_POINTERS = ["a_ptr", "s_ptr", "v_0_ptr", "m_ptr", "aux_ptr", "ends_ptr", *_ROW_MAP]
# Integers that Triton looks at, and those that it only needs to know the width of.
_SPECIALIZED = ["stride_m_group", "stride_m_row", "stride_m_column"]
_UNSPECIALIZED = ["T", "B", "stride_time", "stride_batch"]


def launcher(
    kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], compiled_for: object
) -> Callable[..., None]:
    """Return a function that launches a kernel on the current device and stream.

    The first launch of a kind is Triton's: it looks up what is compiled for the types, the
    alignment and the constants of all arguments, and compiles it where there is nothing. That takes
    the host longer than the launch, each time; so one of the same kind goes to what was found.

    Args:
        kernel: of ``triton.jit``.
        grid: of programs.
        arguments: all of the kernel's, and the compiler's options, by name.
        compiled_for: stands for the kernel, its constants and the options; hashable.

    Returns:
        A function that takes the arguments that have changed since.
    """
    # Triton's interpreter compiles nothing. For AMD, Triton looks at the size of each storage, too.
    is_known = isinstance(kernel, JITFunction) and torch.version.hip is None
    kind = _kind(arguments, compiled_for) if is_known else None
    of, known = _known.get(kind, (None, None))

    def launch_first(**changed: Any) -> None:
        compiled = kernel[grid](**(arguments | changed))
        if kind is not None and isinstance(compiled, CompiledKernel):
            if len(_known) >= _MOST_KNOWN:
                _known.clear()
            _known[kind] = kernel, compiled

    def launch_again(**changed: Any) -> None:
        arguments.update(changed)
        known[grid](*[arguments[name] for name in kernel.arg_names])

    return launch_again if of is kernel else launch_first


def _kind(arguments: dict[str, Any], compiled_for: object) -> tuple[Any, ...] | None:
    """Return what Triton tells launches apart by; None for one that is rare."""
    a, s, v_0, M, aux, ends, *row_map = [arguments[name] for name in _POINTERS]
    pointers = a.data_ptr() | s.data_ptr() | M.data_ptr()
    for one in (v_0, aux, ends, *row_map):
        if one is not None:
            pointers |= one.data_ptr()
    strides = [arguments[name] for name in _SPECIALIZED]
    integers = [arguments[name] for name in _UNSPECIALIZED]
    if pointers % 16 != 0 or max(*strides, *integers) >= 2**31:
        # Unaligned pointers and wide integers have kernels of their own.
        return None
    return (
        compiled_for,
        torch.cuda.current_device(),
        a.dtype,
        None if v_0 is None else v_0.dtype,
        ends is None,
        *[one is None for one in row_map],
        # An integer of 1 is a constant, and Triton knows of a multiple of 16.
        *[(stride == 1, stride % 16 == 0) for stride in strides],
    )
