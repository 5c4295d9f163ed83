"""How long a call takes by a plan, and by what would serve it otherwise."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tritonrnn import layer
from tritonrnn.autotune.bench import Bench, is_of_capture
from tritonrnn.autotune.records import UNTIMED, Quartiles, Record, Shapes, one_line
from tritonrnn.autotune.verification import DTYPES
from tritonrnn.kernels import launch
from tritonrnn.layer import Recurrence
from tritonrnn.memo import take
from tritonrnn.paths import aten, inplace
from tritonrnn.precision import products_as_in_rnn
from tritonrnn.ragged import rows_of

# Rounds of one sample of each, as many as fit the time, and at least a few.
ROUNDS, LEAST_ROUNDS, LONGEST_US = 15, 5, 400_000.0
# Of a sample: calls are repeated that are shorter. The GPU waits for the host's part of the first
# of them: by samples of 1 ms the registers plan served at 486 us where cuDNN takes 316 (an H100,
# fp32, perf/results/h100-2026-11-26).
SAMPLE_US = 5000.0


def compare(shapes: Shapes, other: str, bench: Bench) -> Record:
    """Time a plan against another path on the same data, a sample of each in turn.

    Args:
        shapes: what to time, and the plan.
        other: "aten", "in-place" or the name of a plan.
        bench: the device.

    Returns:
        A record of "faster" or "slower", where the quartiles do not overlap, else "tie". A plan is
        faster than a path that fails.

    Raises:
        Exception: what a call by the plan raises.
    """
    stack = Stack.draw(shapes, bench.device)
    paths = {name: stack.runner(name) for name in (shapes.plan, other)}
    samples: dict[str, list[float]] = {name: [] for name in paths}
    repeats = {}
    failure = ""
    for name, run in list(paths.items()):
        try:
            # The first call compiles, and cuDNN makes its plan.
            first_us = min(_sample(bench, name, run, 1) for _ in range(3))
        except Exception as error:
            if name == shapes.plan or is_of_capture(error):
                raise
            failure = one_line(error)
            del paths[name]
        else:
            repeats[name] = max(1, int(SAMPLE_US / max(first_us, 1.0)))
    spent_us = 0.0
    for round in range(ROUNDS):
        if round >= LEAST_ROUNDS and spent_us > LONGEST_US:
            break
        for name in list(paths)[:: -1 if round % 2 else 1]:
            samples[name].append(_sample(bench, name, paths[name], repeats[name]))
            spent_us += samples[name][-1] * repeats[name]
    plan_us = _quartiles(samples[shapes.plan])
    if failure:
        verdict, other_us = "faster", UNTIMED
        why = f"{plan_us[1]:.3g} us, and {other} fails: {failure}"
    else:
        other_us = _quartiles(samples[other])
        verdict = "slower" if plan_us[0] > other_us[2] else "tie"
        if plan_us[2] < other_us[0]:
            verdict = "faster"
        why = f"{plan_us[1]:.3g} us against {other_us[1]:.3g} us of {other}"
    return Record(shapes, verdict, why, 0.0, 0.0, plan_us, other_us, other)


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
        for index in range(L):
            shapes_of_weights = [(H, G * H if index else I), (H, H), (H,), (H,)] * G
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

    def runner(self, path: str) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """Return a function that runs the call: forward, and backward in training.

        It returns the output, and the gradient of the input in training.

        Args:
            path: "aten", "in-place" or the name of a plan.
        """
        if path == "aten":
            return self._run_aten
        recurrence: Recurrence = inplace.recurrence
        if path != "in-place":
            recurrence = functools.partial(launch.recurrence, tf32=self.shapes.tf32, plan=path)
        return lambda: self._run_layers(recurrence)

    def _run_aten(self) -> tuple[Tensor, Tensor | None]:
        settings = self.seq_metadata, self.layout, self.shapes.nonlinearity, self.shapes.G == 2
        if not self.shapes.training:
            return aten.forward(self.input, self.hx, self.layers, *settings)[0], None
        weights = [weight for of_layer in self.layers for weight in of_layer]
        sources = [tensor for tensor in (self.input, self.hx, *weights) if tensor is not None]
        if not aten.has_reserve(self.input):
            with torch.enable_grad():
                for source in sources:
                    source.requires_grad_()
                results = aten.forward(self.input, self.hx, self.layers, *settings)
                cotangents = self.grad_output, self.grad_h_n
                grad, *_ = torch.autograd.grad(results, sources, cotangents)
            return results[0], grad
        # Without a graph, as the package's operators do.
        call = self.input, self.hx, weights, *settings
        L = self.shapes.L
        output, _, *kept = aten.forward_with_reserve(*call, num_layers=L)
        grad, *_ = aten.backward_with_reserve(
            (self.grad_output, self.grad_h_n),
            (output, *kept),
            [True, self.hx is not None, *[True] * len(weights)],
            *call,
            num_layers=L,
        )
        return output, grad

    def _run_layers(self, recurrence: Recurrence) -> tuple[Tensor, Tensor | None]:
        """Do what the package's operators do in an eager call."""
        G, leading = self.shapes.G, self.input.shape[:-1]
        settings = self.shapes.nonlinearity, G == 2, recurrence
        states: Sequence[Tensor | None] = [None] * self.shapes.L
        if self.hx is not None:
            states = self.hx.split(G)
        with products_as_in_rnn(self.input.device, self.input.dtype):
            rows, where = rows_of(self.input, self.layout, self.seq_metadata, None)
            saved = []
            for h_0, weights in zip(states, self.layers):
                output, _ = layer.forward(rows, h_0, weights, where, *settings)
                saved.append((rows, h_0, weights, output))
                rows = output
            if not self.shapes.training:
                return rows.unflatten(0, leading), None
            grad: Tensor | None = self.grad_output.flatten(0, -2)
            for sources, grad_h_n in zip(reversed(saved), reversed(self.grad_h_n.split(G))):
                _, h_0, weights, _ = sources
                assert grad is not None
                needs = [True, h_0 is not None, *[True] * len(weights)]
                dz = torch.empty_like(grad)
                grad, *_ = layer.backward(grad, dz, grad_h_n, *sources, where, *settings, needs)
            assert grad is not None
            return rows.unflatten(0, leading), grad.unflatten(0, leading)
