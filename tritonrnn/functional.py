"""The stateless form: check the input, run the layers, drop out between them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from tritonrnn import ops
from tritonrnn.dispatch import Choice, choose
from tritonrnn.layout import SequenceLayout


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = True,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """Run a multi-layer Elman RNN over whole sequences, ``torch.nn.RNN`` without its module.

        h_t = φ(x_t W_ihᵀ + b_ih + h_{t-1} W_hhᵀ + b_hh)    (Elman 1990; torch.nn.RNN)

    T is the number of steps, B of sequences, I the input size, H the number of hidden units, L of
    layers, and D of directions, 2 if ``bidirectional`` and else 1.

    Args:
        input: ``(T, B, I)``, ``(B, T, I)`` if ``batch_first``, ``(T, I)`` for one unbatched
            sequence, or a ``PackedSequence``. Of the weights' dtype, except under autocast.
        hx: the initial states, ``(L * D, B, H)``, or ``(L * D, H)`` if unbatched; for a
            ``PackedSequence`` in the order that its sequences had before they were sorted. None
            means zero.
        weights: for each layer, and in it for each direction, ``w_ih (H, I)`` (``(H, D * H)``
            above the first layer), ``w_hh (H, H)`` and, for all or for none, ``b_ih (H,)`` and
            ``b_hh (H,)``: the order of ``torch.nn.RNN``'s parameters.
        nonlinearity: φ, "tanh" or "relu".
        num_layers: L.
        bidirectional: whether a second direction walks from the last step to the first.
        batch_first: whether B comes first in ``input`` and ``output``. Never in ``hx`` and
            ``h_n``, and not in an unbatched or packed input.
        dropout: the probability with which an output of a layer, but the last, is zeroed.
        training: whether ``dropout`` is applied.

    Returns:
        ``output``, the last layer's state at every step, shaped as the input with D * H features
        (a ``PackedSequence`` if the input is one), and ``h_n``, every layer's and direction's
        state after its walk, shaped as ``hx``.

    Raises:
        ValueError: the input is neither 2-D nor 3-D, or of another dtype than the weights;
            ``nonlinearity`` or ``dropout`` is out of range; or a weight has the wrong shape.
        IndexError: a ``PackedSequence`` holds no step.
        RuntimeError: the input has no step, or not I features; ``batch_sizes`` don't describe the
            packed rows; ``hx`` has the wrong shape or
            dtype; tensors lie on different devices; or the back end that was asked for (see
            :func:`tritonrnn.backend`) can't serve the call.
    """
    call = check(input, hx, weights, nonlinearity, num_layers, bidirectional, batch_first, dropout)
    data, h_n = _run(call, dropout if training else 0.0)
    if isinstance(input, PackedSequence):
        if input.unsorted_indices is not None:
            h_n = h_n.index_select(1, input.unsorted_indices)
        # Built anew: a compiler knows the constructor, but not _replace.
        _, batch_sizes, sorted_indices, unsorted_indices = input
        return PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices), h_n
    if input.dim() == 2:
        return data.squeeze(1), h_n.squeeze(1)
    return data, h_n


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """Take one step of an Elman RNN, ``torch.nn.RNNCell`` without its module.

        h' = φ(x W_ihᵀ + b_ih + h W_hhᵀ + b_hh)

    Args:
        input: ``(B, I)``, or ``(I,)``.
        hx: ``(B, H)``, or ``(H,)`` if the input is 1-D; zero if None.
        w_ih, w_hh, b_ih, b_hh: ``(H, I)``, ``(H, H)``, and both or neither of ``(H,)``.
        nonlinearity: φ, "tanh" or "relu".

    Returns:
        The next state, shaped as ``hx``.

    Raises:
        ValueError: ``input`` or ``hx`` is neither 1-D nor 2-D.
        RuntimeError: sizes, dtypes or devices disagree, or ``nonlinearity`` is unknown.
    """
    if input.dim() not in (1, 2):
        raise ValueError(f"RNNCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
    if hx is not None and hx.dim() not in (1, 2):
        raise ValueError(f"RNNCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
    if nonlinearity not in ("tanh", "relu"):
        raise RuntimeError(f"Unknown nonlinearity: {nonlinearity}")
    if input.dim() == 1:
        hx = None if hx is None else hx.unsqueeze(0)
        return _step(input.unsqueeze(0), hx, w_ih, w_hh, b_ih, b_hh, nonlinearity).squeeze(0)
    return _step(input, hx, w_ih, w_hh, b_ih, b_hh, nonlinearity)


def _step(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    nonlinearity: str,
) -> Tensor:
    dtype = _compute_dtype(input)
    B, H = len(input), len(w_hh)
    choice = choose(input.device, dtype, T=1, B=B, G=1, H=H, nonlinearity=nonlinearity)
    if choice.backend == "torch":
        # One step has no walk to save: torch's own kernel is the torch path.
        step = torch.rnn_tanh_cell if nonlinearity == "tanh" else torch.rnn_relu_cell
        return step(input, input.new_zeros(B, H) if hx is None else hx, w_ih, w_hh, b_ih, b_hh)
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None]
    hx = None if hx is None else hx.unsqueeze(0)
    output, _ = rnn(input.unsqueeze(0), hx, weights, nonlinearity=nonlinearity)
    assert isinstance(output, Tensor)
    return output.squeeze(0)


@dataclass(frozen=True)
class Call:
    """One checked call of :func:`rnn`, and what serves it.

    Attributes:
        data: ``[T, B, I]``, ``[B, T, I]`` or ``[N, I]``, as ``layout`` says.
        hx: ``[L * D, B, H]`` in the caller's order, or None.
        order: of ``data``'s sequences among the caller's, or None where it is the same.
        weights: each layer's, in the order of ``torch.nn.RNN``.
        extents: a packed input's batch_sizes.
        layout: "time_major", "batch_major" or "packed".
        nonlinearity: "tanh" or "relu".
        bidirectional: whether D is 2.
        dtype: what it is computed in: autocast's, where that applies.
        choice: what serves it.
    """

    data: Tensor
    hx: Tensor | None
    order: Tensor | None
    weights: Sequence[Sequence[Tensor]]
    extents: Tensor | None
    layout: str
    nonlinearity: str
    bidirectional: bool
    dtype: torch.dtype
    choice: Choice

    @property
    def sizes(self) -> dict[str, int]:
        """T, B, N, I and H, as the dimension key of ``layout.py`` has them."""
        *lead, input_size = self.data.shape
        if self.extents is not None:
            T, B, N = len(self.extents), int(self.extents[0]), lead[0]
        else:
            T, B = lead if self.layout == "time_major" else reversed(lead)
            N = T * B
        return {"T": T, "B": B, "N": N, "I": input_size, "H": self.weights[0][1].shape[0]}


def check(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    nonlinearity: str,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
) -> Call:
    """Check the arguments of :func:`rnn` and choose what serves it; compute nothing."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout should be a number in range [0, 1], got {dropout}")
    layers = _layers(weights, num_layers, bidirectional)
    order = None
    if isinstance(input, PackedSequence):
        data, extents, order, _ = input
        layout = "packed"
        _check_data(data, layers, dim=2)
        T, B = _check_batch_sizes(extents, data.shape[0], hx)
    else:
        if input.dim() not in (2, 3):
            raise ValueError(
                f"RNN: Expected input to be 2D or 3D, got {input.dim()}D tensor instead"
            )
        data, extents = input, None
        layout = "batch_major" if batch_first and input.dim() == 3 else "time_major"
        if input.dim() == 2:
            data = input.unsqueeze(1)
            if hx is not None:
                _check_hx_dim(hx, 2, "unbatched")
                hx = hx.unsqueeze(1)
        elif hx is not None:
            _check_hx_dim(hx, 3, "batched")
        _check_data(data, layers, dim=3)
        T, B = data.shape[:2] if layout == "time_major" else (data.shape[1], data.shape[0])
        if T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if hx is not None:
        H = layers[0][1].shape[0]
        _check_hx(hx, (num_layers * (2 if bidirectional else 1), B, H), data)
    _check_weights(layers, data, bidirectional)
    dtype = _compute_dtype(data)
    G, H = 2 if bidirectional else 1, layers[0][1].shape[0]
    choice = choose(data.device, dtype, T=T, B=B, G=G, H=H, nonlinearity=nonlinearity)
    return Call(
        data, hx, order, layers, extents, layout, nonlinearity, bidirectional, dtype, choice
    )


def _run(call: Call, dropout: float) -> tuple[Tensor, Tensor]:
    data, hx, layers = call.data, call.hx, call.weights
    if hx is not None and call.order is not None:
        hx = hx.index_select(1, call.order)
    if torch._C._is_any_autocast_enabled():
        data = data.to(call.dtype)
        hx = None if hx is None else hx.to(call.dtype)
        layers = [[weight.to(call.dtype) for weight in layer] for layer in layers]
    if call.choice.plan == "native":
        return _native(call, data, hx, layers, dropout)
    D = 2 if call.bidirectional else 1
    finals = []
    for index, weights in enumerate(layers):
        h_0 = None if hx is None else hx[index * D : (index + 1) * D]
        data, h_n = (ops.elman_recorded if call.choice.plan == "recorded" else ops.elman)(
            data, h_0, weights, call.extents, call.layout, call.nonlinearity,
            call.bidirectional, call.choice.backend,
        )  # fmt: skip
        if dropout > 0 and index + 1 < len(layers):
            data = _dropout(data, dropout, call.layout)
        finals.append(h_n)
    return data, finals[0] if len(finals) == 1 else torch.cat(finals)


def _native(
    call: Call, data: Tensor, hx: Tensor | None, layers: Sequence[Sequence[Tensor]], dropout: float
) -> tuple[Tensor, Tensor]:
    """The whole stack in torch's own kernels."""
    run = torch.rnn_tanh if call.nonlinearity == "tanh" else torch.rnn_relu
    weights = [weight for layer in layers for weight in layer]
    G = 2 if call.bidirectional else 1
    if hx is None:
        hx = data.new_zeros(len(layers) * G, call.sizes["B"], layers[0][1].shape[0])
    has_biases = len(layers[0]) == 4 * G
    # cuDNN can't differentiate what ran in evaluation mode, which differs by the dropout only.
    settings = (has_biases, len(layers), dropout, dropout > 0 or torch.is_grad_enabled())
    with _wherever_weights_lie(data):
        if call.extents is not None:
            return run(data, call.extents, hx, weights, *settings, call.bidirectional)
        batch_first = call.layout == "batch_major"
        return run(data, hx, weights, *settings, call.bidirectional, batch_first)


@contextmanager
def _wherever_weights_lie(data: Tensor) -> Iterator[None]:
    """Silence cuDNN, which copies weights that do not lie in one buffer of its own and warns.

    Where they lie is their owner's to say.
    """
    if not data.is_cuda:
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single")
        yield


def _dropout(data: Tensor, p: float, layout: str) -> Tensor:
    if layout != "batch_major" or data.device.type != "cpu" or p == 1:
        return torch.nn.functional.dropout(data, p)
    # torch draws its mask step by step, whatever the input's layout: so does this, for the same
    # seed to drop the same units.
    B, T, features = data.shape
    noise = data.new_empty(T, B, features).bernoulli_(1 - p).div_(1 - p)
    return data * noise.transpose(0, 1)


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
    D, H = 2 if bidirectional else 1, layers[0][1].shape[0]
    each = len(layers[0]) // D
    for index, layer in enumerate(layers):
        width = data.shape[-1] if index == 0 else D * H
        expected = [(H, width), (H, H), (H,), (H,)][:each] * D
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
    # Autocast, which casts floating point only, makes up for the rest.
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


def _check_batch_sizes(batch_sizes: Tensor, num_rows: int, hx: Tensor | None) -> tuple[int, int]:
    """T and B of what is packed, once it makes sense."""
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1:
        raise RuntimeError(
            "Expected batch_sizes of a PackedSequence to be 1-D and of dtype torch.int64, got "
            f"{batch_sizes.dim()}-D and {batch_sizes.dtype}"
        )
    if torch.compiler.is_compiling():
        # A tracer sees no numbers: the operator checks them, and those of hx, when it runs.
        return batch_sizes.shape[0], 0 if hx is None else hx.shape[-2]
    layout = SequenceLayout.of_packed(batch_sizes, num_rows)
    return layout.T, layout.B


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


def _compute_dtype(data: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on and the input is no double, else the input's own."""
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
