"""Launches past Triton's look-up go to the kernel that Triton would have found."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from tritonrnn.kernels import launch, launcher
from tritonrnn.kernels.common import UNSPECIALIZED
from tritonrnn.kernels.devices import DEVICES
from tritonrnn.kernels.plan import plan_named
from tritonrnn.kernels.stepwise import stepwise_kernel
from tritonrnn.layout import SequenceLayout
from tritonrnn.ragged import RaggedLayout


class Compiled:
    """A kernel that Triton has compiled, which lists its launches."""

    def __init__(self, launched: list[Any], name: str) -> None:
        self.launched, self.name = launched, name

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.launched.append((self.name, grid, arguments))


class Kernel:
    """A kernel of Triton's, which compiles one for each type of ``a_ptr``."""

    arg_names = ("a_ptr", "step", "T")

    def __init__(self) -> None:
        self.launched: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def run(*, a_ptr: Any, step: int, T: int, **options: Any) -> Compiled:
            compiled = Compiled(self.launched, str(a_ptr.dtype))
            self.launched.append(("looked up", grid, (a_ptr, step, T)))
            return compiled

        return run


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(launcher, "JITFunction", Kernel)
    monkeypatch.setattr(launcher, "CompiledKernel", Compiled)
    monkeypatch.setattr(launcher, "_kind", lambda arguments, of: (of, arguments["a_ptr"].dtype))
    monkeypatch.setattr(launcher, "_known", {})
    return Kernel()


def test_second_launch_of_a_kind_goes_past_triton(kernel):
    grid, a, b = (3, 1, 1), torch.zeros(2), torch.zeros(2, dtype=torch.float16)
    for x, T in ((a, 5), (a, 6), (b, 7), (b, 8)):
        launcher.launcher(kernel, grid, {"a_ptr": x, "step": 0, "T": T, "num_warps": 4}, 1)(step=T)
    assert [name for name, *_ in kernel.launched] == [
        "looked up",
        "torch.float32",
        "looked up",
        "torch.float16",
    ]
    assert [where for _, where, _ in kernel.launched] == 4 * [grid]
    assert [arguments[1:] for *_, arguments in kernel.launched] == [(5, 5), (6, 6), (7, 7), (8, 8)]
    assert [arguments[0] is x for (*_, arguments), x in zip(kernel.launched, (a, a, b, b))]
    # Another kernel of the same constants.
    other = Kernel()
    launcher.launcher(other, grid, {"a_ptr": a, "step": 0, "T": 1}, 1)()
    assert [name for name, *_ in other.launched] == ["looked up"]


def arguments_of(chance: random.Random) -> tuple[dict[str, Any], Any]:
    """Draw a launch of any plan."""
    dtype = chance.choice([torch.float32, torch.bfloat16])
    T, B, H, G = (chance.choice(sizes) for sizes in ((1, 16, 7), (1, 16, 5), (16, 21), (1, 2)))
    layout = chance.choice(
        [
            SequenceLayout.time_major(T, B),
            SequenceLayout.batch_major(B, T),
            SequenceLayout.packed([B] * T, B * T),
            RaggedLayout.padded(T, B, False, torch.full((B,), T)),
        ]
    )
    epilogue = chance.choice(["tanh", "tanh_grad"])

    def rows(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)

    M = rows(G, H, H)
    if chance.random() < 0.5:
        M = M.mT
    if chance.random() < 0.2:
        # A view into a larger matrix, whose first element is not aligned.
        width = chance.choice([H + 8, H + 16])
        M = rows(G, H + 1, width)[:, 1:, chance.choice([0, 1, 8]) :][..., :H]
    v_0 = None
    if chance.random() < 0.5:
        v_0 = torch.zeros(G * B * H + 1)[chance.choice([0, 1]) :][: G * B * H].view(G, B, H)
        v_0 = v_0.to(dtype) if epilogue == "tanh_grad" else v_0
    a = rows(layout.N, G * H)
    problem = launch.problem_of(a, layout, G=G, epilogue=epilogue, tf32=True)
    plan = plan_named(chance.choice(["resident", "stepwise"]), problem, DEVICES["interpreter"])
    given = launch.kernel_arguments(
        a,
        a if epilogue == "tanh" else torch.empty_like(a),
        v_0,
        M,
        rows(layout.N, G * H) if epilogue == "tanh_grad" else None,
        chance.choice([None, rows(G, B, H)]),
        layout,
        problem,
        (False, True)[:G],
        plan,
    )
    return given, launch._compiled_for(problem, plan)[1]


def test_launches_of_one_kind_are_one_kernel_to_triton(monkeypatch):
    """By Triton's own look-up, of launches that differ in all that it may look at."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    of_triton = jit.JITFunction(stepwise_kernel.fn, do_not_specialize=[*UNSPECIALIZED, "step"])
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = jit.create_function_from_signature(of_triton.signature, of_triton.params, backend)
    found: dict[Any, Any] = {}
    repeated = refused = 0
    for seed in range(4000):
        given, compiled_for = arguments_of(random.Random(seed))
        kind = launcher._kind(given, compiled_for)
        if kind is None:
            refused += 1
            continue
        _, specialization, options = bind(**given, step=3)
        looked_up = str((specialization, options))
        repeated += kind in found
        assert found.setdefault(kind, looked_up) == looked_up
    assert repeated > 500
    assert len(found) > 100
    # Of pointers that are not aligned.
    assert refused > 100
    assert launcher._kind(given | {"T": 2**31}, compiled_for) is None
