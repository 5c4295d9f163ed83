"""Try compilation, export and scripting."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from perf.features.attempt import NotTriedError, Side, feature
from perf.features.problem import Problem, assert_right, check, exactly


@feature("`torch.compile(fullgraph=True)`, lengths and batches that vary")
def _compiled(side: Side) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    for layout in ("time-major", "packed"):
        torch.compiler.reset()
        # Not inductor, which takes a minute; the tests of torch.compile try it.
        counter = CompileCounterWithBackend("aot_eager")

        def run(module: Any, input: Any, hx: Any, counter: Any = counter) -> Any:
            return torch.compile(module, backend=counter, fullgraph=True, dynamic=True)(input, hx)

        for T in (4, 6, 7):
            check(side, Problem(layout=layout, T=T), run)
        if counter.frame_count > 2:
            raise RuntimeError(f"compiled {counter.frame_count} times for three lengths")
    torch.compiler.reset()


class _Packed(nn.Module):
    """Take the tensors of a PackedSequence."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, data: Tensor, batch_sizes: Tensor) -> tuple[Tensor, Tensor]:
        output, h_n = self.rnn(PackedSequence(data, batch_sizes))
        return output.data, h_n


def _packed_tensors(device: str, seed: int, *lengths: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    packed = pack_sequence([torch.randn(T, 3, generator=generator) for T in lengths])
    return packed.data.to(device), packed.batch_sizes


def _check_program(side: Side, program: Callable[..., Any], arguments: Sequence[Tensor]) -> None:
    problem = Problem()
    got = program(*arguments)
    _, wide = exactly(problem)
    data = arguments[0].detach().cpu().double()
    if len(arguments) == 2:
        truth = _Packed(wide)(data, arguments[1])
    else:
        truth = wide(data)
    assert_right(list(got), list(truth), problem.dtype)


@feature("`torch.export`, any number of steps and sequences")
def _exported(side: Side) -> None:
    from torch.export import Dim

    module = Problem().module(side.rnn_class, side.device)
    x, other = (torch.randn(T, B, 3, device=side.device) for T, B in ((4, 3), (6, 2)))
    dims = ({0: Dim("T", min=2), 1: Dim("B", min=2)},)
    program = torch.export.export(module, (x,), dynamic_shapes=dims)
    _check_program(side, program.module(), (other,))


@feature("`torch.export` of a packed input")
def _exported_packed(side: Side) -> None:
    from torch.export import Dim

    model = _Packed(Problem().module(side.rnn_class, side.device))
    dims = ({0: Dim("N", min=2)}, {0: Dim("T", min=2)})
    arguments = _packed_tensors(side.device, 1, 4, 3, 1)
    program = torch.export.export(model, arguments, dynamic_shapes=dims)
    _check_program(side, program.module(), _packed_tensors(side.device, 2, 5, 2))


@feature("ONNX export, any number of steps and sequences")
def _onnx(side: Side) -> str | None:
    for package in ("onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise NotTriedError(f"needs {package}")

    import onnxruntime

    table = None
    if side.is_ours:
        table = importlib.import_module("tritonrnn.onnx").translation_table()
    module = Problem().module(side.rnn_class)
    x, other = (torch.randn(T, B, 3) for T, B in ((4, 3), (6, 2)))
    program = torch.onnx.export(
        module,
        (x,),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: "T", 1: "B"},),
        custom_translation_table=table,
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})]

    _check_program(side, run, (other,))
    # Not "yes, on torch": the exported program runs in ONNX Runtime.
    return "yes"


@feature("`torch.library.opcheck` of its operators")
def _opcheck(side: Side) -> str | None:
    if not side.is_ours:
        return "has none of its own"
    problem = Problem()
    data, hx = problem.tensors(side.device)
    weights = [p.detach() for p in problem.module(side.rnn_class, side.device).parameters()]
    for weight in weights:
        weight.requires_grad_()
    torch.library.opcheck(
        torch.ops.tritonrnn.elman.with_reserve,
        (data, hx, weights, None, None, "time_major", "tanh", False, "torch", True),
    )
    return None


class _Scripted(nn.Module):
    """Call an RNN: when scripted alone, torch.nn.RNN has no ``forward``."""

    def __init__(self, rnn: nn.Module) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, input: Tensor, hx: Tensor) -> tuple[Tensor, Tensor]:
        return self.rnn(input, hx)


@feature("`torch.jit.script`")
def _scripted(side: Side) -> None:
    def run(module: Any, input: Any, hx: Any) -> Any:
        return torch.jit.script(_Scripted(module))(input, hx)

    check(side, Problem(), run)
