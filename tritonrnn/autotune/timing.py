"""How long a call takes by a plan, and by what would serve it otherwise."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonrnn.autotune.bench import Bench
from tritonrnn.autotune.records import Shapes
from tritonrnn.autotune.verification import DTYPES
from tritonrnn.kernels import launch
from tritonrnn.kernels.plan import PLANS
from tritonrnn.memo import take
from tritonrnn.paths import aten

# Rounds of one sample of each, as many as fit the time, and at least a few.
ROUNDS, LEAST_ROUNDS, LONGEST_US = 15, 5, 400_000.0
# Of a sample: calls are repeated that are shorter.
SAMPLE_US = 1000.0
# Steps that are timed: a step costs what it costs.
MOST_STEPS = 128

Quartiles = tuple[float, float, float]


def compare(shapes: Shapes, other: str, bench: Bench) -> tuple[str, Quartiles, Quartiles]:
    """Time a plan against another path on the same data, a sample of each in turn.

    Args:
        shapes: what to time, and the plan.
        other: "aten", "in-place" or the name of a plan.
        bench: the device.

    Returns:
        "faster" or "slower", where the quartiles do not overlap, else "tie"; and the quartiles of
        the time of a call by the plan and by the other path, in microseconds.
    """
    stack = Stack.draw(shapes, bench.device)
    paths = {name: stack.runner(name) for name in (shapes.plan, other)}
    samples: dict[str, list[float]] = {name: [] for name in paths}
    repeats = {}
    for name, run in paths.items():
        # The first call compiles, and cuDNN makes its plan.
        first_us = min(_sample(bench, name, run, 1) for _ in range(3))
        repeats[name] = max(1, int(SAMPLE_US / max(first_us, 1.0)))
    spent_us = 0.0
    for round in range(ROUNDS):
        if round >= LEAST_ROUNDS and spent_us > LONGEST_US:
            break
        for name in list(paths)[:: -1 if round % 2 else 1]:
            samples[name].append(_sample(bench, name, paths[name], repeats[name]))
            spent_us += samples[name][-1] * repeats[name]
    plan_us, other_us = (_quartiles(samples[name]) for name in (shapes.plan, other))
    if plan_us[2] < other_us[0]:
        return "faster", plan_us, other_us
    return "slower" if plan_us[0] > other_us[2] else "tie", plan_us, other_us


def _sample(bench: Bench, name: str, run: Callable[[], object], repeats: int) -> float:
    with launch.trial():
        return bench.elapsed_us(name, run, repeats)


def _quartiles(samples: Sequence[float]) -> Quartiles:
    first, second, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, second, third


@dataclass
class Stack:
    """A call of a class of shapes: its data, and the ways to run it."""

    shapes: Shapes
    input: Tensor
    hx: Tensor | None
    layers: list[list[Tensor]]
    seq_metadata: Tensor | None
    layout: str
    grad_output: Tensor
    grad_h_n: Tensor

    @classmethod
    def draw(cls, shapes: Shapes, device: torch.device) -> Stack:
        """Draw the data. Sequences of a packed or ragged batch are of all lengths, 1 to T."""
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[shapes.dtype]
        T, B, I, G, H, L = (getattr(shapes, name) for name in "TBIGHL")  # noqa: E741

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, device=device, dtype=dtype)
            return drawn.mul_(scale)

        lead: tuple[int, ...] = (T, B)
        seq_metadata, layout = None, "time_major"
        if shapes.mapped:
            lengths = torch.linspace(T, 1, B, device="cpu").round().to(torch.int64)
            seq_metadata = take(lengths)
            if not shapes.ragged:
                steps = torch.arange(T, device="cpu")
                seq_metadata = take((lengths > steps[:, None]).sum(1))
                lead, layout = (int(lengths.sum()),), "packed"
        layers = []
        for layer in range(L):
            shapes_of_weights = [(H, G * H if layer else I), (H, H), (H,), (H,)] * G
            layers.append([normal(*shape, scale=0.5 * H**-0.5) for shape in shapes_of_weights])
        return cls(
            shapes,
            normal(*lead, I),
            normal(L * G, B, H) if shapes.hx else None,
            layers,
            seq_metadata,
            layout,
            normal(*lead, G * H),
            normal(L * G, B, H),
        )

    def runner(self, path: str) -> Callable[[], object]:
        """Return a function that runs the call: forward, and backward in training.

        Args:
            path: "aten", "in-place" or the name of a plan.
        """
        if path == "aten":
            return self._train_on_aten if self.shapes.training else self._run_aten
        backend = f"triton:{path}" if path in PLANS else "torch"
        return lambda: self._run_operators(backend)

    def _run_aten(self) -> tuple[Tensor, Tensor]:
        settings = self.layout, self.shapes.nonlinearity, self.shapes.G == 2
        return aten.forward(self.input, self.hx, self.layers, self.seq_metadata, *settings)

    def _train_on_aten(self) -> None:
        sources = [self.input, *(weight for layer in self.layers for weight in layer)]
        if self.hx is not None:
            sources.append(self.hx)
        with torch.enable_grad():
            for source in sources:
                source.requires_grad_()
            results = self._run_aten()
            torch.autograd.grad(results, sources, (self.grad_output, self.grad_h_n))

    def _run_operators(self, backend: str) -> None:
        # The package's operators, by the names under which its upper layers register them.
        operators = torch.ops.tritonrnn
        G = self.shapes.G
        settings = self.seq_metadata, None, self.layout, self.shapes.nonlinearity, G == 2, backend
        data, saved = self.input, []
        for index, weights in enumerate(self.layers):
            h_0 = None if self.hx is None else self.hx[index * G : (index + 1) * G]
            output, _ = operators.elman(data, h_0, weights, *settings)
            saved.append((data, h_0, weights, output))
            data = output
        if not self.shapes.training:
            return
        grad = self.grad_output
        for index, sources in reversed(list(enumerate(saved))):
            _, h_0, weights, _ = sources
            needs = [True, h_0 is not None, *[True] * len(weights)]
            grad_h_n = self.grad_h_n[index * G : (index + 1) * G]
            grad, *_ = operators.elman_backward(grad, grad_h_n, *sources, *settings, needs)
