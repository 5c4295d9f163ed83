"""Check and normalise the arguments of a call, and choose what serves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import has_torch_function

from tritonrnn.dispatch import Choice, choose, current_backend
from tritonrnn.memo import is_traced, take
from tritonrnn.nested import jagged_parts
from tritonrnn.ragged import layout_of


@dataclass(frozen=True)
class Call:
    """A checked call of :func:`tritonrnn.functional.rnn`, and what serves it.

    Attributes:
        data: ``[T, B, I]``, ``[B, T, I]`` or ``[N, I]``, by ``layout``.
        hx: ``[L * G, B, H]`` in the caller's order, or None.
        order: the index of each of ``data``'s sequences in the caller's order, or None if the order
            is the same.
        weights: each layer's, in the order of ``torch.nn.RNN``.
        seq_metadata, reset: as :func:`tritonrnn.ragged.layout_of` takes them: copies, which nobody
            changes between the forward and the backward pass.
        layout: "time_major", "batch_major", "packed" or "jagged".
        nonlinearity: "tanh" or "relu".
        bidirectional: whether G is 2.
        dtype: in which it is computed: autocast's, where that applies.
        choice: what serves it.
    """

    data: Tensor
    hx: Tensor | None
    order: Tensor | None
    weights: Sequence[Sequence[Tensor]]
    seq_metadata: Tensor | None
    reset: Tensor | None
    layout: str
    nonlinearity: str
    bidirectional: bool
    dtype: torch.dtype
    choice: Choice

    @property
    def sizes(self) -> dict[str, int]:
        """Return T, B, N, I and H of the dimension key of ``layout.py``."""
        *lead, input_size = self.data.shape
        where = layout_of(self.layout, lead, self.seq_metadata, self.reset)
        H = self.weights[0][1].shape[0]
        return {"T": where.T, "B": where.B, "N": where.N, "I": input_size, "H": H}


def check(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    nonlinearity: str,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    lengths: Tensor | None,
    reset: Tensor | None,
    *,
    may_try: bool = True,
) -> Call:
    """Check the arguments of :func:`tritonrnn.functional.rnn`, which lists its errors.

    Compute nothing, and choose what serves the call: by trials of plans if ``may_try``, where no
    record of one stands.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout should be a number in range [0, 1], got {dropout}")
    layers = _layers(weights, num_layers, bidirectional)
    is_nested = isinstance(input, Tensor) and input.is_nested
    kind = "nested" if is_nested else "packed" if isinstance(input, PackedSequence) else "padded"
    _check_padded_only("lengths", lengths, kind)
    _check_padded_only("reset", reset, kind)
    order = None
    seq_metadata: Tensor | None
    if isinstance(input, PackedSequence):
        data, seq_metadata, order, _ = input
        layout = "packed"
        _check_data(data, layers, dim=2)
        _check_batch_sizes(seq_metadata)
    elif is_nested:
        layout = "jagged"
        data, seq_metadata = jagged_parts(input)
        _check_data(data, layers, dim=2)
        if hx is not None:
            _check_hx_dim(hx, 3, "batched")
    else:
        layout = "batch_major" if batch_first and input.dim() == 3 else "time_major"
        data, hx, reset = _padded(input, hx, layers, layout, lengths, reset)
        seq_metadata = lengths
    seq_metadata, reset = _taken(seq_metadata), _taken(reset)
    T, B, parent_B, is_ragged = _sizes(layout, data, seq_metadata, reset, hx)
    G, H = 2 if bidirectional else 1, layers[0][1].shape[0]
    if hx is not None:
        _check_hx(hx, (num_layers * G, parent_B, H), data)
    _check_weights(layers, data, bidirectional)
    dtype = compute_dtype(data)
    choice = choose(
        data.device,
        dtype,
        T=T,
        B=B,
        I=data.shape[-1],
        G=G,
        H=H,
        L=num_layers,
        nonlinearity=nonlinearity,
        mapped=layout == "packed",
        ragged=is_ragged,
        hx=hx is not None,
        needs_grad=needs_grad(data, hx, weights),
        may_try=may_try and may_be_tried(data),
    )
    if has_torch_function(weights) and _know_torchs_rnn(weights) and not is_ragged:
        reason = "the weights have their own rules for torch's RNN."
        if current_backend() == "triton":
            raise RuntimeError(f"the triton back end can't serve this call: {reason}")
        choice = Choice("torch", "aten", reason)
    return Call(
        data,
        hx,
        order,
        layers,
        seq_metadata,
        reset,
        layout,
        nonlinearity,
        bidirectional,
        dtype,
        choice,
    )


def needs_grad(data: Tensor, hx: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Return whether a gradient of a call may be wanted."""
    if not torch.is_grad_enabled():
        return False
    # A class of tensors with rules of its own may refuse the question.
    return (
        (has_torch_function(weights) and _know_torchs_rnn(weights))
        or any(weight.requires_grad for weight in weights)
        or data.requires_grad
        or (hx is not None and hx.requires_grad)
    )


def may_be_tried(data: Tensor) -> bool:
    """Return whether a call with this input computes something, so that plans may be tried."""
    return not torch.compiler.is_compiling() and not is_traced(data)


def _know_torchs_rnn(weights: Sequence[Tensor]) -> bool:
    """Return whether a weight is of a class that has rules of its own for torch's functions.

    ``torch.nn.utils._expanded_weights``, for gradients of each sample, has one for torch's RNN and
    refuses what it has no rule for.
    """
    rules = [type(weight).__torch_function__ for weight in weights]
    disabled, inherited = (
        torch._C._disabled_torch_function_impl,
        Tensor.__dict__["__torch_function__"],
    )
    return any(getattr(r, "__func__", r) not in (disabled, inherited.__func__) for r in rules)


def _taken(tensor: Tensor | None) -> Tensor | None:
    """Return a copy, see :func:`tritonrnn.memo.take`."""
    if tensor is None or not torch.compiler.is_compiling():
        return None if tensor is None else take(tensor)
    # Not in an exported program: what it has of this package are the layers. Not is_exporting(),
    # which torch 2.11 takes for true whatever it compiles.
    if torch.compiler._is_exporting_flag:
        return tensor
    return torch.ops.tritonrnn.take(tensor)


def _check_padded_only(name: str, given: Tensor | None, kind: str) -> None:
    """Check that ``lengths`` or ``reset`` comes with a padded input, and is not mapped over."""
    if given is not None and kind != "padded":
        raise ValueError(f"{name} is of a padded batch, but the input is {kind}")
    if isinstance(given, Tensor) and torch._C._functorch.is_batchedtensor(given):
        raise RuntimeError(
            f"{name} can't be what torch.func.vmap maps over: the walk depends on its values. "
            "Map over the input, and put what differs into its batch"
        )


def _padded(
    input: Tensor,
    hx: Tensor | None,
    layers: Sequence[Sequence[Tensor]],
    layout: str,
    lengths: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return a padded input, its hx and its reset after checks, an unbatched one as a batch."""
    if input.dim() not in (2, 3):
        raise ValueError(f"RNN: Expected input to be 2D or 3D, got {input.dim()}D tensor instead")
    data = input
    if input.dim() == 2:
        data = input.unsqueeze(1)
        if lengths is not None:
            raise ValueError("lengths is of a batch of sequences, but the input is unbatched")
        reset = None if reset is None else _unbatched_reset(reset, input)
        if hx is not None:
            _check_hx_dim(hx, 2, "unbatched")
            hx = hx.unsqueeze(1)
    elif hx is not None:
        _check_hx_dim(hx, 3, "batched")
    _check_data(data, layers, dim=3)
    T, B = data.shape[:2] if layout == "time_major" else (data.shape[1], data.shape[0])
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if lengths is not None:
        _check_lengths(lengths, B)
    if reset is not None:
        _check_reset(reset, data)
    return data, hx, reset


def _layers(
    weights: Sequence[Tensor], num_layers: int, bidirectional: bool
) -> list[Sequence[Tensor]]:
    groups = num_layers * (2 if bidirectional else 1)
    if num_layers < 1 or (len(weights) != 2 * groups and len(weights) != 4 * groups):
        raise ValueError(
            f"Expected {2 * groups} weights, or {4 * groups} with biases, for {num_layers} layers "
            f"in {2 if bidirectional else 1} directions, got {len(weights)}"
        )
    each = len(weights) // num_layers
    return [weights[i : i + each] for i in range(0, len(weights), each)]


def _check_weights(layers: Sequence[Sequence[Tensor]], data: Tensor, bidirectional: bool) -> None:
    G, H = 2 if bidirectional else 1, layers[0][1].shape[0]
    each = len(layers[0]) // G
    for index, layer in enumerate(layers):
        width = data.shape[-1] if index == 0 else G * H
        expected = [(H, width), (H, H), (H,), (H,)][:each] * G
        for weight, shape in zip(layer, expected):
            if weight.shape != shape:
                raise ValueError(
                    f"Expected a weight of shape {shape} in layer {index}, "
                    f"got {tuple(weight.shape)}"
                )
            if weight.device != data.device:
                raise RuntimeError(
                    "Input and parameter tensors are not at the same device, found input tensor "
                    f"at {data.device} and parameter tensor at {weight.device}"
                )
            if weight.dtype != layers[0][0].dtype:
                raise ValueError(
                    "Expected all weights of one dtype, "
                    f"got {layers[0][0].dtype} and {weight.dtype}"
                )


def _check_data(data: Tensor, layers: Sequence[Sequence[Tensor]], dim: int) -> None:
    w_ih = layers[0][0]
    # Autocast casts floating point of any other dtype.
    castable = torch._C._is_any_autocast_enabled() and data.is_floating_point()
    if data.dtype != w_ih.dtype and not castable:
        raise ValueError(
            f"RNN input dtype ({data.dtype}) does not match weight dtype ({w_ih.dtype}). "
            f"Convert input: input.to({w_ih.dtype}), or convert model: model.to({data.dtype})"
        )
    if data.dim() != dim:
        raise RuntimeError(f"input must have {dim} dimensions, got {data.dim()}")
    if data.shape[-1] != w_ih.shape[-1]:
        raise RuntimeError(
            "input.size(-1) must be equal to input_size. "
            f"Expected {w_ih.shape[-1]}, got {data.shape[-1]}"
        )


def _check_batch_sizes(batch_sizes: Tensor) -> None:
    if batch_sizes.dtype.is_floating_point and torch.compiler.is_compiling():
        raise RuntimeError(
            "torch can't trace pack_padded_sequence. Call the RNN on the padded batch instead, "
            "with lengths=, or pack outside of the model that is exported"
        )
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1:
        raise RuntimeError(
            "Expected batch_sizes of a PackedSequence to be 1-D and of dtype torch.int64, got "
            f"{batch_sizes.dim()}-D and {batch_sizes.dtype}"
        )


def _check_lengths(lengths: Tensor, B: int) -> None:
    if not isinstance(lengths, Tensor) or lengths.dtype not in _INTEGERS:
        what = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__qualname__
        raise TypeError(f"Expected lengths to be a tensor of integers, got {what}")
    if lengths.shape != (B,):
        raise ValueError(f"Expected lengths of shape ({B},), got {tuple(lengths.shape)}")


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _check_reset(reset: Tensor, data: Tensor) -> None:
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        what = reset.dtype if isinstance(reset, Tensor) else type(reset).__qualname__
        raise TypeError(f"Expected reset to be a tensor of torch.bool, got {what}")
    if reset.shape != data.shape[:2]:
        raise ValueError(
            f"Expected reset of shape {tuple(data.shape[:2])}, got {tuple(reset.shape)}"
        )


def _unbatched_reset(reset: Tensor, input: Tensor) -> Tensor:
    if isinstance(reset, Tensor) and reset.shape != input.shape[:1]:
        raise ValueError(f"Expected reset of shape ({len(input)},), got {tuple(reset.shape)}")
    return reset.unsqueeze(1) if isinstance(reset, Tensor) else reset


def _sizes(
    layout: str, data: Tensor, seq_metadata: Tensor | None, reset: Tensor | None, hx: Tensor | None
) -> tuple[int, int, int, bool]:
    """Return T, B, the caller's B before resets split sequences, and whether it is ragged.

    A tracer sees no values. Where sizes depend on values, it gets sizes that mean nothing, and the
    operator checks the real ones, and hx against them, when it runs.
    """
    is_padded = layout in ("time_major", "batch_major")
    given = [tensor for tensor in (seq_metadata, reset) if tensor is not None]
    is_compiling = torch.compiler.is_compiling() or any(isinstance(x, FakeTensor) for x in given)
    if is_padded and (is_compiling or not given):
        T, B = data.shape[:2] if layout == "time_major" else (data.shape[1], data.shape[0])
        return T, B, B, False
    if is_compiling:
        return 0, 0, 0 if hx is None else hx.shape[-2], False
    where = layout_of(layout, data.shape[:-1], seq_metadata, reset)
    return where.T, where.B, where.parent.B, where.is_ragged


def _check_hx_dim(hx: Tensor, dim: int, kind: str) -> None:
    if hx.dim() != dim:
        raise RuntimeError(
            f"For {kind} {dim}-D input, hx should also be {dim}-D but got {hx.dim()}-D tensor"
        )


def _check_hx(hx: Tensor, expected: tuple[int, int, int], data: Tensor) -> None:
    if hx.shape != expected:
        raise RuntimeError(f"Expected hidden size {expected}, got {list(hx.shape)}")
    if hx.device != data.device:
        raise RuntimeError(
            "Input and hidden tensors are not at the same device, found input tensor "
            f"at {data.device} and hidden tensor at {hx.device}"
        )
    if hx.dtype != data.dtype and not torch._C._is_any_autocast_enabled():
        raise RuntimeError(
            "Input and hidden tensors are not the same dtype, found input tensor with "
            f"{data.dtype} and hidden tensor with {hx.dtype}"
        )


def compute_dtype(data: Tensor) -> torch.dtype:
    """Return autocast's dtype where it is on and applies to the input, else the input's own."""
    device = data.device.type
    if (
        torch._C._is_any_autocast_enabled()
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
        and data.is_floating_point()
        and data.dtype != torch.float64
    ):
        return torch.get_autocast_dtype(device)
    return data.dtype
