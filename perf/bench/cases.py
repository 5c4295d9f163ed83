"""Describe what is measured: the sizes of an RNN, and inputs and gradients to run it with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
# lengths: padded, with the lengths as an argument. cell: padded, a loop of steps of an RNNCell.
LAYOUTS = ("padded", "packed", "jagged", "lengths", "cell")
RAGGED = ("packed", "jagged", "lengths")
LENGTHS = ("equal", "linear", "uniform", "words", "lognormal")
# infer: forward, no gradient to come. fwd: forward, keeping what backward needs. bwd: backward
# alone. fwdbwd: both, as in training.
MODES = ("infer", "fwd", "bwd", "fwdbwd")

# TF32 keeps 10 bits of the fraction.
TF32_EPS = 2.0**-10
# Lengths of words, as frequent as in a list of English words; scaled to T.
WORD_LENGTHS = (2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 10, 12, 15)
LOGNORMAL_SIGMA = 0.75


@dataclass(frozen=True)
class Case:
    """Describe an RNN and its input: T steps, B sequences, I features, H hidden units, the layout.

    Attributes:
        layout: One of ``LAYOUTS``.
        lengths: One of ``LENGTHS``: how the lengths of a ragged batch spread below T.
        dtype: One of ``DTYPES``.
        fp32_mode: "tf32" or "ieee", the products of fp32 for every peer; "none" otherwise.
        device: "cpu", "cuda", "cuda:1", ...
    """

    T: int
    B: int
    I: int  # noqa: E741
    H: int
    layers: int = 1
    directions: int = 1
    nonlinearity: str = "tanh"
    layout: str = "padded"
    lengths: str = "equal"
    dtype: str = "fp32"
    fp32_mode: str = "ieee"
    device: str = "cpu"

    @property
    def case_id(self) -> str:
        """Return the name, without the device: ``T100-B1-I32-H32-L1-D1-tanh-padded-fp32-ieee``."""
        sizes = f"T{self.T}-B{self.B}-I{self.I}-H{self.H}-L{self.layers}-D{self.directions}"
        lengths = self.lengths if self.is_ragged else ""
        fp32_mode = self.fp32_mode if self.dtype == "fp32" else ""
        parts = (sizes, self.nonlinearity, self.layout, lengths, self.dtype, fp32_mode)
        return "-".join(filter(None, parts))

    @property
    def is_ragged(self) -> bool:
        """Return whether the layout tells sequences of different lengths."""
        return self.layout in RAGGED

    @property
    def on_gpu(self) -> bool:
        """Return whether the case runs on a GPU."""
        return torch.device(self.device).type == "cuda"

    @property
    def precision(self) -> str:
        """Return the precision of the case's products: "tf32", or its dtype."""
        return "tf32" if self.dtype == "fp32" and self.fp32_mode == "tf32" else self.dtype

    @property
    def eps(self) -> float:
        """Return the rounding of the case's products."""
        return TF32_EPS if self.precision == "tf32" else torch.finfo(DTYPES[self.dtype]).eps

    def row(self, peer: str, mode: str) -> dict[str, object]:
        """Return the columns that name a cell of this case."""
        return {"case_id": self.case_id, **asdict(self), "peer": peer, "mode": mode}

    def make_module(self, seed: int) -> nn.RNNBase:
        """Return an ``nn.RNN`` on the CPU with torch's own initial weights.

        The weights are uniform in ±1/√H, so that the spectral radius of W_hh is about 0.6: over any
        number of steps, states stay in the range of tanh that trained models use.
        """
        torch.manual_seed(seed)
        sizes = self.I, self.H, self.layers
        return nn.RNN(*sizes, self.nonlinearity, bidirectional=self.directions == 2)

    def ragged_lengths(self, seed: int) -> list[int]:
        """Return the lengths of a ragged batch in descending order; the longest is T."""
        generator = torch.Generator().manual_seed(seed)
        if self.lengths == "linear":
            lengths = torch.linspace(self.T, self.T / 4, self.B)
        elif self.lengths == "uniform":
            lengths = 1 + (self.T * torch.rand(self.B, generator=generator)).floor()
        elif self.lengths == "words":
            shares = torch.tensor(WORD_LENGTHS) / max(WORD_LENGTHS)
            drawn = torch.randint(len(WORD_LENGTHS), (self.B,), generator=generator)
            lengths = self.T * shares[drawn]
        elif self.lengths == "lognormal":
            lengths = torch.exp(LOGNORMAL_SIGMA * torch.randn(self.B, generator=generator))
            lengths *= self.T / lengths.max()
        else:
            lengths = torch.full((self.B,), float(self.T))
        lengths = lengths.round().clamp(1, self.T).int().sort(descending=True).values
        lengths[0] = self.T
        return lengths.tolist()

    def tokens(self, seed: int) -> int:
        """Return N, the number of steps of all sequences together."""
        return sum(self.ragged_lengths(seed)) if self.is_ragged else self.T * self.B


def set_precision(case: Case) -> None:
    """Set the precision of all fp32 products, of every peer, to that of the case."""
    if case.on_gpu and case.dtype == "fp32":
        torch.backends.cudnn.rnn.fp32_precision = case.fp32_mode  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision = case.fp32_mode


@dataclass(frozen=True)
class Workload:
    """Hold an input, and the gradients of both results.

    Attributes:
        tokens: The input, or the rows of a packed or jagged one.
        output_grad: Gradient of a loss with respect to the output, or to its rows.
        h_n_grad: Gradient of the loss with respect to ``h_n``.
        batch_sizes: Batch sizes of a ragged input; on the CPU, as torch keeps them.
        offsets: For a jagged input, the row where each sequence begins, and the end of the last.
        lengths: For a padded batch with lengths, these, in no order; on the CPU, where torch packs.
    """

    tokens: Tensor
    output_grad: Tensor
    h_n_grad: Tensor
    batch_sizes: Tensor | None = None
    offsets: Tensor | None = None
    lengths: Tensor | None = None

    @classmethod
    def make(cls, case: Case, *, seed: int) -> Workload:
        """Draw all tensors from the normal distribution, in float32 on the CPU.

        They are random because zeros draw less power and run faster.
        """
        generator = torch.Generator().manual_seed(seed)
        rows: tuple[int, ...] = (case.T, case.B)
        batch_sizes = offsets = lengths = None
        if case.layout == "lengths":
            lengths = torch.tensor(case.ragged_lengths(seed))
            lengths = lengths[torch.randperm(case.B, generator=generator)]
        elif case.is_ragged:
            sizes = torch.tensor(case.ragged_lengths(seed))
            batch_sizes = (sizes > torch.arange(case.T).unsqueeze(1)).sum(1)
            rows = (int(sizes.sum()),)
            if case.layout == "jagged":
                offsets = functional.pad(sizes.cumsum(0), (1, 0))
        return cls(
            torch.randn(*rows, case.I, generator=generator),
            torch.randn(*rows, case.directions * case.H, generator=generator),
            torch.randn(case.layers * case.directions, case.B, case.H, generator=generator),
            batch_sizes,
            offsets,
            lengths,
        )

    def to(self, device: str, dtype: torch.dtype) -> Workload:
        """Return the same values on another device or in another dtype."""
        return replace(
            self,
            tokens=self.tokens.to(device, dtype),
            output_grad=self.output_grad.to(device, dtype),
            h_n_grad=self.h_n_grad.to(device, dtype),
            offsets=None if self.offsets is None else self.offsets.to(device),
        )

    def input_of(self, tokens: Tensor) -> Any:
        """Return these tokens in the form that a module takes: padded, packed or nested."""
        if self.batch_sizes is None:
            return tokens
        if self.offsets is None:
            return PackedSequence(tokens, _as_of_a_new_batch(self.batch_sizes, tokens))
        # Passed on, so that no call has to ask the device.
        shortest = int((self.batch_sizes == self.batch_sizes[0]).sum())
        return torch.nested.nested_tensor_from_jagged(
            tokens, self.offsets, min_seqlen=shortest, max_seqlen=len(self.batch_sizes)
        )

    def run(self, module: nn.RNNBase, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return a module's output, or its rows, and ``h_n`` for these tokens."""
        if self.lengths is not None:
            return module(tokens, lengths=_as_of_a_new_batch(self.lengths, tokens))
        output, h_n = module(self.input_of(tokens))
        if self.offsets is not None:
            return output.values(), h_n
        return output if self.batch_sizes is None else output.data, h_n

    def run_packed(self, module: nn.RNNBase, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the results of :meth:`run` for a module without nested tensors and ``lengths``."""
        if self.lengths is not None:
            lengths = _as_of_a_new_batch(self.lengths, tokens)
            packed = pack_padded_sequence(tokens, lengths, enforce_sorted=False)
            output, h_n = module(packed)
            return pad_packed_sequence(output)[0], h_n
        if self.offsets is None or self.batch_sizes is None:
            return self.run(module, tokens)
        # A packed batch has the first steps of all sequences first. In both layouts the longest
        # sequence comes first.
        starts = self.offsets[:-1]
        order = torch.cat([starts[:n] + t for t, n in enumerate(self.batch_sizes.tolist())])
        output, h_n = module(PackedSequence(tokens[order], self.batch_sizes))
        return output.data[order.argsort()], h_n

    def run_cell(self, cell: nn.RNNCell, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the results of :meth:`run` by a loop of a cell."""
        state, states = None, []
        for step in tokens.unbind():
            state = cell(step, state)
            states.append(state)
        return torch.stack(states), states[-1].unsqueeze(0)


def _as_of_a_new_batch(sizes: Tensor, tokens: Tensor) -> Tensor:
    """Return another tensor, on the CPU: a data loader brings one with each batch.

    What a module remembers of the last one is of no use then. On a GPU a graph is captured, which
    is replayed with the same sizes.
    """
    return sizes.clone() if tokens.is_cpu else sizes


def make_cell(module: nn.RNNBase) -> nn.RNNCell:
    """Return an ``nn.RNNCell`` with the parameters of an ``nn.RNN`` of one layer and direction."""
    phi = str(module.nonlinearity)
    cell = nn.RNNCell(module.input_size, module.hidden_size, nonlinearity=phi)
    for name, parameter in zip(dict(cell.named_parameters()), module.parameters(), strict=True):
        setattr(cell, name, parameter)
    return cell
