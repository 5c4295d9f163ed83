"""RNN and RNNCell: torch.nn's modules on this package's recurrence."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.fx import Proxy, Tracer
from torch.nn.utils.rnn import PackedSequence

from tritonrnn import functional


class RNN(nn.RNNBase):
    r"""A multi-layer Elman RNN: a drop-in for :class:`torch.nn.RNN`.

    .. math::
        h_t = \tanh(x_t W_{ih}^T + b_{ih} + h_{t-1}W_{hh}^T + b_{hh})

    Arguments, parameters (their names, order and initial values), inputs, outputs and errors are
    those of :class:`torch.nn.RNN`, and a ``state_dict`` of either loads into the other. See
    :func:`tritonrnn.functional.rnn` for every shape and error.

    Args:
        input_size: I, the features of the input at each step.
        hidden_size: H, the hidden units of each layer and direction.
        num_layers: L, layers, each fed by the one before.
        nonlinearity: "tanh" or "relu".
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        batch_first: whether the batch comes first in input and output (never in the states).
        dropout: the probability with which an output of a layer, but the last, is zeroed in
            training.
        bidirectional: whether a second direction goes from the last step to the first; D is 2 then
            and else 1.
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: an argument is of the wrong type.

    Example::

        rnn = tritonrnn.RNN(10, 20, 2)
        output, h_n = rnn(torch.randn(5, 3, 10), torch.randn(2, 3, 20))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unsupported: Any,
    ) -> None:
        if "proj_size" in unsupported:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
            **unsupported,
        )

    @overload
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run all layers over whole sequences, see :func:`tritonrnn.functional.rnn`.

        Args:
            input: ``(T, B, I)``, ``(B, T, I)`` if ``batch_first``, ``(T, I)``, a
                ``PackedSequence``, or a jagged nested tensor of B sequences ``(length, I)``.
            hx: ``(L * D, B, H)``, or ``(L * D, H)`` if the input is unbatched; zero if None.
            lengths: of a padded batch, the tokens of each sequence, ``(B,)``; all T if None.
            reset: of a padded input, where a sequence starts anew from a state of 0, ``(T, B)``,
                ``(B, T)`` if ``batch_first``, or ``(T,)`` if it is unbatched, bool.

        Returns:
            ``output``, shaped as the input with D * H features, and ``h_n``, shaped as ``hx``.
        """
        if isinstance(input, Proxy) and _is_leaf(self, input.tracer):
            return _call_in_graph(self, input, hx, lengths=lengths, reset=reset)
        return functional.rnn(
            input,
            hx,
            weights_of(self),
            nonlinearity=nonlinearity_of(self),
            num_layers=self.num_layers,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            lengths=lengths,
            reset=reset,
        )

    # RNNBase keeps a second list of the parameters, weak references to them and, on CUDA, one
    # buffer that holds them all. All of that goes stale when weights are swapped, tied or
    # parametrised, and no kernel here needs it: the weights are looked up at every call instead.
    #
    # As in RNNBase, a list that somebody assigns is used in their place, until the weights change.
    # Then, and only then, _flat_weight_refs is not empty.
    #
    # super(RNNBase, self), because conversion.py gives these methods to other subclasses of RNNBase
    # too. It passes over RNNBase, but over no class that is mixed in behind it.

    @property  # type: ignore[override]
    def _flat_weights(self) -> list[Tensor]:  # type: ignore[override]
        return self.__dict__[_ASSIGNED] if self._flat_weight_refs else _FlatWeights(self)

    @_flat_weights.setter  # type: ignore[override]
    def _flat_weights(self, weights: Iterable[Tensor]) -> None:
        self.__dict__[_ASSIGNED] = list(weights)
        known = [getattr(self, name, None) for name in self._flat_weights_names]
        self._flat_weight_refs = [None if w is None else weakref.ref(w) for w in known]

    def __setattr__(self, name: str, value: Any) -> None:
        assigned = self.__dict__.get(_ASSIGNED)
        if assigned is not None and name in self._flat_weights_names:
            assigned[self._flat_weights_names.index(name)] = value
        super(nn.RNNBase, self).__setattr__(name, value)

    def _init_flat_weights(self) -> None:
        self._flat_weight_refs = []
        self.__dict__.pop(_ASSIGNED, None)

    def _update_flat_weights(self) -> None:
        if self._flat_weight_refs:
            nn.RNNBase._update_flat_weights(self)

    def flatten_parameters(self) -> None:
        """Do nothing: no kernel here needs the parameters in one buffer."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super(nn.RNNBase, self).__setstate__(state)
        # The weights of a copy are others than those for which a list was assigned.
        self._init_flat_weights()

    def _replicate_for_data_parallel(self) -> RNN:
        replica = super(nn.RNNBase, self)._replicate_for_data_parallel()
        if self._flat_weight_refs:
            replica.__dict__[_ASSIGNED] = list(self.__dict__[_ASSIGNED])
        return replica


# No name that a subclass could have for something else.
_ASSIGNED = "_flat_weights, assigned"


class _FlatWeights(list[Tensor]):
    """The weights of a module. To assign an item is to assign the list, with it, to the module."""

    def __init__(self, module: RNN) -> None:
        super().__init__(getattr(module, name) for name in module._flat_weights_names)
        self._module = module

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)
        self._module._flat_weights = self


# Not methods: a subclass may have a name of its own for anything but torch's.


def weights_of(module: RNN) -> list[Tensor]:
    """Return the weights that a call uses, in torch's order."""
    if module._flat_weight_refs:
        module._update_flat_weights()
    if module._flat_weight_refs:
        return module.__dict__[_ASSIGNED]
    return _weights(module, module._flat_weights_names)


def _weights(module: nn.Module, names: Sequence[str]) -> list[Any]:
    """Return the attributes of a module that are weights, or None."""
    # A module looks up an attribute that is a parameter last, and in Python.
    parameters = module._parameters
    return [parameters[n] if n in parameters else getattr(module, n) for n in names]


def nonlinearity_of(module: RNN) -> str:
    """Return "tanh" or "relu" by ``mode``, which is what decides in torch."""
    if module.mode not in _NONLINEARITIES:
        raise AssertionError(f"mode must be RNN_TANH or RNN_RELU, got {module.mode}")
    return _NONLINEARITIES[module.mode]


_NONLINEARITIES = {"RNN_TANH": "tanh", "RNN_RELU": "relu"}


class RNNCell(nn.RNNCell):
    r"""One step of an Elman RNN: a drop-in for :class:`torch.nn.RNNCell`.

    .. math::
        h' = \tanh(x W_{ih}^T + b_{ih} + h W_{hh}^T + b_{hh})

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the hidden units.
        bias: whether there are ``bias_ih`` and ``bias_hh``.
        nonlinearity: "tanh" or "relu".
        device, dtype: of the parameters.

    Example::

        cell = tritonrnn.RNNCell(10, 20)
        hx = cell(torch.randn(3, 10), torch.randn(3, 20))
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Take one step, see :func:`tritonrnn.functional.rnn_cell`.

        Args:
            input: ``(B, I)``, or ``(I,)``.
            hx: ``(B, H)``, or ``(H,)``; zero if None.

        Returns:
            The next state, ``(B, H)`` or ``(H,)``.
        """
        if isinstance(input, Proxy) and _is_leaf(self, input.tracer):
            return _call_in_graph(self, input, hx)
        weights = _weights(self, ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        return functional.rnn_cell(input, hx, *weights, nonlinearity=self.nonlinearity)


# torch.fx doesn't trace into torch.nn's modules, which it knows by where they are defined: a call
# is one node. It traces into any other module, so ours record that node themselves.


def _is_leaf(module: torch.nn.Module, tracer: Any) -> bool:
    """Return whether a call of the module can be one node of the graph that is traced.

    If not, the call of its function becomes one, see :func:`tritonrnn.functional.rnn`: where the
    module is all that is traced, or has hooks. They have been traced, and the node would run them
    once more.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks
    return isinstance(tracer, Tracer) and module is not tracer.root and not hooks


def _call_in_graph(module: torch.nn.Module, input: Proxy, hx: Any, **optional: Any) -> Any:
    """Record a call of the module in the graph that ``torch.fx`` is tracing."""
    args = (input,) if hx is None else (input, hx)
    given = {name: value for name, value in optional.items() if value is not None}
    path = input.tracer.path_of_module(module)  # type: ignore[attr-defined]
    return input.tracer.create_proxy("call_module", path, args, given)
