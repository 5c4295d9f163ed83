"""Check and normalise the arguments of a call, and choose what serves it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import has_torch_function

from tritonrnn.dispatch import (
    Choice,
    asked_where_steps_decide,
    choose,
    choose_by_steps,
    current_backend,
)
from tritonrnn.layout import check_batch_sizes, check_has_steps
from tritonrnn.memo import is_traced, take
from tritonrnn.nested import jagged_parts
from tritonrnn.ragged import layout_of, longest_of


class Call(NamedTuple):
    """A checked call of :func:`tritonrnn.functional.rnn`, and what serves it.

    Attributes:
        data: ``[T, B, I]``, ``[B, T, I]`` or ``[N, I]``, by ``layout``.
        hx: ``[L * G, B, H]`` in the caller's order, or None.
        order: the index of each of ``data``'s sequences in the caller's order, or None if the order
            is the same.
        weights: each layer's, in the order of ``torch.nn.RNN``.
        seq_metadata, reset: as :func:`tritonrnn.ragged.layout_of` takes them: copies, which nobody
            changes between the forward and the backward pass, unless torch's own kernels serve on
            a CPU, which have read them when the call returns.
        B: how many sequences the caller has, of an eager call on a CPU; else None.
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
    B: int | None
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
    training: bool,
    lengths: Tensor | None,
    reset: Tensor | None,
    *,
    may_try: bool = True,
) -> Call:
    """Check the arguments of :func:`tritonrnn.functional.rnn`, which lists its errors.

    Compute nothing, and choose what serves the call: by trials of plans if ``may_try``, where no
    record of one stands.
    """
    data, shape, seq_metadata, order, layout = _parts(input, batch_first)
    if lengths is not None:
        _check_padded_only("lengths", lengths, layout)
        seq_metadata = lengths
    is_autocast = torch._C._is_any_autocast_enabled()
    # Not of a tracer, in whose shapes there may be tensors.
    is_eager = (
        not torch.compiler.is_compiling()
        and type(data) is Tensor
        and torch._C._get_tracing_state() is None
        and not has_torch_function(weights)
    )
    # Most calls are like one before.
    check_forms = _check_forms_once if is_eager else _check_forms
    check_forms(
        layout,
        (shape, data.dtype, data.device),
        None if hx is None else hx.dim(),
        tuple([(weight.shape, weight.dtype, weight.device) for weight in weights]),
        nonlinearity,
        num_layers,
        bidirectional,
        dropout,
        is_autocast,
    )
    asked = None
    if (
        is_eager
        and reset is None
        and not is_autocast
        and layout != "jagged"
        and (seq_metadata is None or (type(seq_metadata) is Tensor and seq_metadata.is_cpu))
    ):
        asked = asked_where_steps_decide(data)
    each = len(weights) // num_layers
    layers = [weights[i : i + each] for i in range(0, len(weights), each)]
    if reset is not None:
        _check_padded_only("reset", reset, layout)
    if layout == "time_major" and len(shape) == 2:
        if lengths is not None:
            raise ValueError("lengths is of a batch of sequences, but the input is unbatched")
        reset = None if reset is None else _unbatched_reset(reset, data)
        data, hx = data.unsqueeze(1), None if hx is None else hx.unsqueeze(1)
    if lengths is not None:
        _check_lengths(lengths, data.shape[1 if layout == "time_major" else 0])
    if reset is not None:
        _check_reset(reset, data)
    G, H = 2 if bidirectional else 1, weights[1].shape[0]
    dtype = compute_dtype(data) if is_autocast else data.dtype
    if asked is not None:
        T, parent_B = data.shape[:2] if layout != "batch_major" else (data.shape[1], data.shape[0])
        is_ragged = False
        if lengths is not None:
            # Torch's kernels take them packed, but not without a sequence; and masks of dropout
            # would be drawn for other rows than on the in-place path, where a checkpoint may run
            # the call again.
            drops = training and dropout > 0 and num_layers > 1
            is_ragged = T > 1 and (parent_B == 0 or drops)
            T = longest_of(lengths, T)
        elif layout == "packed":
            T = shape[0]
        needs_grad = torch.is_grad_enabled() and _any_requires_grad(data, hx, weights)
        is_mapped = seq_metadata is not None
        choice = choose_by_steps(asked, data.device, dtype, T, G, is_mapped, is_ragged, needs_grad)
        if seq_metadata is not None:
            seq_metadata, parent_B = _read(layout, data, seq_metadata, choice)
        if hx is not None:
            _check_hx(hx, (num_layers * G, parent_B, H), data, is_autocast)
    else:
        seq_metadata = None if seq_metadata is None else _taken(seq_metadata)
        reset = None if reset is None else _taken(reset)
        T, B, parent_B, is_ragged = _sizes(layout, data, seq_metadata, reset, hx)
        # Before any trial.
        if hx is not None:
            _check_hx(hx, (num_layers * G, parent_B, H), data, is_autocast)
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
            mapped=seq_metadata is not None or reset is not None,
            ragged=is_ragged,
            hx=hx is not None,
            needs_grad=_needs_grad(data, hx, weights),
            may_try=may_try and not torch.compiler.is_compiling() and not is_traced(data),
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
        None if asked is None else parent_B,
        layout,
        nonlinearity,
        bidirectional,
        dtype,
        choice,
    )


def _parts(
    input: Tensor | PackedSequence, batch_first: bool
) -> tuple[Tensor, tuple[int, ...], Tensor | None, Tensor | None, str]:
    """Return the data, its shape by steps, batch_sizes or offsets, the order, and the layout."""
    if isinstance(input, PackedSequence):
        data, batch_sizes, order, _ = input
        _check_form_of_batch_sizes(batch_sizes)
        # Without the number of rows, which differs from call to call.
        return data, batch_sizes.shape + data.shape[1:], batch_sizes, order, "packed"
    if isinstance(input, Tensor) and input.is_nested:
        data, offsets = jagged_parts(input)
        return data, data.shape, offsets, None, "jagged"
    layout = "batch_major" if input.dim() == 3 and batch_first else "time_major"
    return input, input.shape, None, None, layout


# What is checked of a tensor but its values: shape, dtype and device.
Form: TypeAlias = tuple[tuple[int, ...], torch.dtype, torch.device]


def _check_forms(
    layout: str,
    data: Form,
    hx_dim: int | None,
    weights: tuple[Form, ...],
    nonlinearity: str,
    num_layers: int,
    bidirectional: bool,
    dropout: float,
    is_autocast: bool,
) -> None:
    """Check all that depends on no value, of the input and hx as the caller gave them."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout should be a number in range [0, 1], got {dropout}")
    G = 2 if bidirectional else 1
    if num_layers < 1 or len(weights) not in (2 * num_layers * G, 4 * num_layers * G):
        raise ValueError(
            f"Expected {2 * num_layers * G} weights, or {4 * num_layers * G} with biases, for "
            f"{num_layers} layers in {G} directions, got {len(weights)}"
        )
    shape, _, device = data
    if layout in ("packed", "jagged"):
        _check_data(data, weights[0], 2, is_autocast)
    elif len(shape) not in (2, 3):
        raise ValueError(f"RNN: Expected input to be 2D or 3D, got {len(shape)}D tensor instead")
    if hx_dim is not None:
        _check_hx_dim(hx_dim, layout, len(shape))
    if layout not in ("packed", "jagged"):
        _check_data(data, weights[0], len(shape), is_autocast)
        check_has_steps(shape, layout)
    H = weights[1][0][0]
    each = len(weights) // (num_layers * G)
    for index, (weight_shape, weight_dtype, weight_device) in enumerate(weights):
        layer = index // (each * G)
        width = shape[-1] if layer == 0 else G * H
        expected = ((H, width), (H, H), (H,), (H,))[index % each]
        if weight_shape != expected:
            raise ValueError(
                f"Expected a weight of shape {expected} in layer {layer}, got {tuple(weight_shape)}"
            )
        if weight_device != device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor "
                f"at {device} and parameter tensor at {weight_device}"
            )
        if weight_dtype != weights[0][1]:
            raise ValueError(
                f"Expected all weights of one dtype, got {weights[0][1]} and {weight_dtype}"
            )


_check_forms_once = functools.lru_cache(maxsize=1024)(_check_forms)


def _check_data(data: Form, w_ih: Form, dim: int, is_autocast: bool) -> None:
    (shape, dtype, _), (w_shape, w_dtype, _) = data, w_ih
    # Autocast casts floating point of any other dtype.
    if dtype != w_dtype and not (is_autocast and dtype.is_floating_point):
        raise ValueError(
            f"RNN input dtype ({dtype}) does not match weight dtype ({w_dtype}). "
            f"Convert input: input.to({w_dtype}), or convert model: model.to({dtype})"
        )
    if len(shape) != dim:
        raise RuntimeError(f"input must have {dim} dimensions, got {len(shape)}")
    if shape[-1] != w_shape[-1]:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {w_shape[-1]}, got {shape[-1]}"
        )


def _check_hx_dim(dim: int, layout: str, rows_dim: int) -> None:
    expected, kind = (2, "unbatched") if layout != "jagged" and rows_dim == 2 else (3, "batched")
    if layout != "packed" and dim != expected:
        raise RuntimeError(
            f"For {kind} {expected}-D input, hx should also be {expected}-D but got {dim}-D tensor"
        )


def _needs_grad(data: Tensor, hx: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Return whether a gradient of a call may be wanted."""
    if not torch.is_grad_enabled():
        return False
    # A class of tensors with rules of its own may refuse the question.
    return (has_torch_function(weights) and _know_torchs_rnn(weights)) or _any_requires_grad(
        data, hx, weights
    )


def _any_requires_grad(data: Tensor, hx: Tensor | None, weights: Sequence[Tensor]) -> bool:
    # No generator: most calls ask.
    for weight in weights:
        if weight.requires_grad:
            return True
    return data.requires_grad or (hx is not None and hx.requires_grad)


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


def _taken(tensor: Tensor) -> Tensor:
    """Return a copy, see :func:`tritonrnn.memo.take`."""
    if not torch.compiler.is_compiling():
        return take(tensor)
    # Not in an exported program: what it has of this package are the layers. Not is_exporting(),
    # which torch 2.11 takes for true whatever it compiles.
    if torch.compiler._is_exporting_flag:
        return tensor
    return torch.ops.tritonrnn.take(tensor)


def _check_padded_only(name: str, given: Tensor, layout: str) -> None:
    """Check that ``lengths`` or ``reset`` comes with a padded input, and is not mapped over."""
    if layout in ("packed", "jagged"):
        kind = "nested" if layout == "jagged" else layout
        raise ValueError(f"{name} is of a padded batch, but the input is {kind}")
    if isinstance(given, Tensor) and torch._C._functorch.is_batchedtensor(given):
        raise RuntimeError(
            f"{name} can't be what torch.func.vmap maps over: the walk depends on its values. "
            "Map over the input, and put what differs into its batch"
        )


def _check_form_of_batch_sizes(batch_sizes: Tensor) -> None:
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


def _read(layout: str, data: Tensor, seq_metadata: Tensor, choice: Choice) -> tuple[Tensor, int]:
    """Check the values of sizes that are on the CPU. Return what to keep of them, and B."""
    if choice.plan != "aten":
        seq_metadata = take(seq_metadata)
        return seq_metadata, layout_of(layout, data.shape[:-1], seq_metadata, None).B
    # No copy: torch's own kernels have read the values when the call returns.
    if layout != "packed":
        return seq_metadata, seq_metadata.shape[0]
    batch_sizes = seq_metadata.tolist()
    check_batch_sizes(batch_sizes, data.shape[0])
    return seq_metadata, batch_sizes[0]


def _sizes(
    layout: str, data: Tensor, seq_metadata: Tensor | None, reset: Tensor | None, hx: Tensor | None
) -> tuple[int, int, int, bool]:
    """Return T, B, the caller's B before resets split sequences, and whether it is ragged.

    A tracer sees no values. Where sizes depend on values, it gets sizes that mean nothing, and the
    operator checks the real ones, and hx against them, when it runs.
    """
    is_padded = layout in ("time_major", "batch_major")
    is_hidden = torch.compiler.is_compiling() or isinstance(seq_metadata, FakeTensor)
    if is_padded:
        T, B = data.shape[:2] if layout == "time_major" else (data.shape[1], data.shape[0])
        is_known = seq_metadata is None and reset is None
        if is_known or torch.compiler.is_compiling():
            return T, B, B, False
        if is_hidden or isinstance(reset, FakeTensor):
            return T, B, B, T != 1
        if T == 1:
            # Where a sequence has no token, or starts anew, is a matter of its hx.
            layout_of(layout, data.shape[:2], seq_metadata, None)
            return T, B, B, False
    if is_hidden:
        return 0, 0, 0 if hx is None else hx.shape[-2], layout == "jagged"
    where = layout_of(layout, data.shape[:-1], seq_metadata, reset)
    return where.T, where.B, where.parent.B, where.is_ragged


def _check_hx(hx: Tensor, expected: tuple[int, int, int], data: Tensor, is_autocast: bool) -> None:
    if hx.shape != expected:
        raise RuntimeError(f"Expected hidden size {expected}, got {list(hx.shape)}")
    if hx.device != data.device:
        raise RuntimeError(
            "Input and hidden tensors are not at the same device, found input tensor "
            f"at {data.device} and hidden tensor at {hx.device}"
        )
    if hx.dtype != data.dtype and not is_autocast:
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
