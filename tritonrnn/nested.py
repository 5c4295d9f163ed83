"""Jagged nested tensors: their rows and offsets, and back again."""

from __future__ import annotations

import torch
from torch import Tensor


def jagged_parts(input: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens ``[N, F]`` of a nested tensor of B sequences, and offsets ``[B + 1]``.

    Raises:
        ValueError: the tensor is not of layout ``torch.jagged``, not 3-D, ragged in another
            dimension than its second, or has holes between its sequences.
    """
    if input.layout != torch.jagged:
        raise ValueError(
            f"RNN: Expected a nested input to be of layout torch.jagged, got {input.layout}"
        )
    if input.dim() != 3 or input._ragged_idx != 1:  # type: ignore[attr-defined]
        raise ValueError(
            "RNN: Expected a nested input to hold sequences of shape (length, features), ragged in "
            f"dimension 1, got {input.dim()} dimensions, ragged in "
            f"{input._ragged_idx}"  # type: ignore[attr-defined]
        )
    if input.lengths() is not None:  # type: ignore[attr-defined]
        raise ValueError("RNN: Expected a nested input with no holes; input.contiguous() has none")
    return input.values(), input.offsets()  # type: ignore[attr-defined]


def like_jagged(input: Tensor, tokens: Tensor) -> Tensor:
    """Return the tokens ``[N, F]`` as a nested tensor like ``input``: the two can be added."""
    return torch.nested.nested_tensor_from_jagged(
        tokens,
        offsets=input.offsets(),  # type: ignore[attr-defined]
        min_seqlen=input._maybe_min_seqlen,  # type: ignore[attr-defined]
        max_seqlen=input._maybe_max_seqlen,  # type: ignore[attr-defined]
    )
