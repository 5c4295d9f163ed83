"""A device on which trials run: what identifies it, and its clock."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

import tritonrnn.kernels
from tritonrnn.autotune.store import source_digest
from tritonrnn.kernels.devices import device_of


class Bench:
    """A GPU, by CUDA's events. A test derives a device of its own, with a clock that it sets.

    Attributes:
        steps, sequences: of the batches by which kernels are verified: more steps than a program
            has in flight, and more sequences than a program walks.
    """

    steps = 9
    sequences = 20

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def identity(self) -> dict[str, str | int]:
        """Return what records depend on: what differs in any of it shares none."""
        limits = device_of(self.device)
        return {
            "name": self._name(),
            "multiprocessors": limits.multiprocessors,
            "shared_bytes": limits.shared_bytes,
            "driver": self._driver(),
            "torch": torch.__version__,
            # What a plan is timed against. MIOpen's version on AMD.
            "cudnn": torch.backends.cudnn.version() or 0,
            "triton": triton.__version__,
            "source": source_digest(Path(tritonrnn.kernels.__path__[0])),
        }

    def _name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def _driver(self) -> str:
        nvidia = Path("/proc/driver/nvidia/version")
        if nvidia.exists():
            return nvidia.read_text().splitlines()[0]
        return str(torch.version.hip or torch.version.cuda)

    def may_try(self) -> bool:
        """Return whether this thread may run a trial now: not while its stream is captured.

        Of another thread's capture only :func:`is_of_capture` tells.
        """
        return not torch.cuda.is_current_stream_capturing()

    def synchronize(self) -> None:
        """Wait for the device. Raises what has gone wrong on it."""
        torch.cuda.synchronize(self.device)

    def elapsed_us(self, name: str, run: Callable[[], object], repeats: int) -> float:
        """Return the microseconds that ``run`` takes, the mean of several calls.

        Args:
            name: of the path or plan that it runs.
            run: launches the work, and waits for nothing.
            repeats: how often to call it.
        """
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / repeats

    @contextmanager
    def session(self) -> Iterator[None]:
        """Run what is inside as if the caller had set nothing, and keep no memory of it."""
        with torch.cuda.device(self.device):
            reserved = torch.cuda.memory_reserved(self.device)
            try:
                with neutral(self.device):
                    yield
            finally:
                # A fault that has left the device unusable is raised already.
                with suppress(RuntimeError):
                    if torch.cuda.memory_reserved(self.device) > reserved:
                        torch.cuda.empty_cache()


def is_of_capture(error: BaseException) -> bool:
    """Return whether CUDA refused a call because a stream is captured.

    A capture of mode "global" forbids all threads to wait for the device, until it ends.
    """
    # As in the texts of all errors cudaErrorStreamCapture*.
    return (
        isinstance(error, RuntimeError) and re.search(r"\bcaptur(e|ing)\b", str(error)) is not None
    )


def is_traced() -> bool:
    """Return whether a tracer sees each operator of this thread, and not what it computes."""
    modes = torch._C._TorchDispatchModeKey
    return torch._C._get_tracing_state() is not None or any(
        torch._C._get_dispatch_mode(mode) is not None
        for mode in (modes.FAKE, modes.PROXY, modes.FUNCTIONAL)
    )


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def neutral(device: torch.device) -> Iterator[None]:
    """Switch off, in this thread, every mode that a caller may have set.

    Deterministic flags stay as they are. They belong to the process, and what a trial runs does not
    depend on them.
    """
    with ExitStack() as modes:
        # A warning, which the caller may have made an error, says nothing of a plan.
        modes.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        # Modes of dispatch first: they would see the others being switched.
        modes.enter_context(_disable_current_modes())
        # Among the modes of this kind is torch's default device.
        modes.enter_context(torch._C.DisableTorchFunction())
        # It brings autograd back, too, which an operator has left out.
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            # The hooks set last are called, and no others.
            modes.enter_context(saved_tensors_hooks(_unchanged, _unchanged))
        for kind in {device.type, "cpu"}:
            modes.enter_context(torch.autocast(kind, enabled=False))
        yield
