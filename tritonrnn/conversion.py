"""Make tritonrnn's modules of torch's inside a model."""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import nn

from tritonrnn.modules import RNN, RNNCell

Model = TypeVar("Model", bound=nn.Module)

_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {nn.RNN: RNN, nn.RNNCell: RNNCell}

# Methods of torch's classes that ours keep and call as torch does: a subclass may override them.
_KEPT = {
    "__annotate_func__",
    "__getstate__",
    "__init__",
    "_apply",
    "all_weights",
    "extra_repr",
    "reset_parameters",
}


def convert(model: Model) -> Model:
    """Make every ``nn.RNN`` and ``nn.RNNCell`` inside a model one of this package's.

    The modules stay the same objects, and only their class changes. So parameters, buffers, hooks,
    training mode and whatever else refers to a module stay as they are, and an optimizer built
    before still works. A subclass that overrides ``forward``, or another method that calls of
    ``torch.nn`` use and calls of this package do not, is left alone, and so is a module with such a
    method of its own. Any other subclass keeps its class as a base.

    Args:
        model: any module, also a bare ``nn.RNN`` or ``nn.RNNCell``. It is changed in place.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected model to be a torch.nn.Module, got {type(model).__qualname__}")
    for module in model.modules():
        target = _target(module)
        if target is not None:
            assigned = _assigned_weights(module) if isinstance(module, nn.RNN) else None
            object.__setattr__(module, "__class__", target)
            if isinstance(module, nn.RNNBase):
                module.__dict__.pop("_flat_weights", None)
                module._init_flat_weights()
            if assigned is not None:
                module._flat_weights = assigned  # type: ignore[assignment]
    return model


def _target(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that a module's becomes, or None to leave the module alone."""
    cls = type(module)
    is_parametrized = nn.utils.parametrize.is_parametrized(module)
    # torch has derived the class of a module with parametrisations for that module alone.
    own = cls.__bases__[0] if is_parametrized else cls
    for original, ours in _REPLACEMENTS.items():
        if issubclass(own, original) and not issubclass(own, ours):
            if not _runs_as(original, own, module):
                return None
            target = ours if own is original else _adopted(own, ours)  # type: ignore[arg-type]
            return _reparametrized(cls, target) if is_parametrized else target
    return None


def _runs_as(original: type[nn.Module], cls: type[nn.Module], module: nn.Module) -> bool:
    """Return whether a module of a subclass runs as torch's own does."""
    if isinstance(module, nn.RNN) and module.mode not in ("RNN_TANH", "RNN_RELU"):
        return False
    bases = [base for base in original.__mro__ if base.__module__ == original.__module__]
    names = {"__reduce__", "__reduce_ex__"}
    for base in bases:
        names |= {name for name, member in vars(base).items() if isinstance(member, _METHODS)}
    names -= _KEPT
    return module.__dict__.keys().isdisjoint(names) and all(
        getattr(cls, name) is getattr(original, name) for name in names
    )


_METHODS = (FunctionType, property)


def _assigned_weights(module: nn.RNN) -> list[Any] | None:
    """Return torch's list of the weights if somebody has assigned another, which a call uses."""
    if nn.utils.parametrize.is_parametrized(module) or module._weights_have_changed():
        return None
    known = [getattr(module, name, None) for name in module._flat_weights_names]
    flat = module._flat_weights
    return None if all(a is b for a, b in zip(flat, known)) else flat


def _reparametrized(cls: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """Return a class like one of ``torch.nn.utils.parametrize``, but derived from ``base``."""
    members = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (base,), members)


@functools.cache
def _adopted(cls: type[nn.Module], ours: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of a user's subclass with the methods of ours."""
    members: dict[str, Any] = {
        name: member
        for name, member in ours.__dict__.items()
        if name not in ("__init__", "__doc__", "__dict__", "__weakref__", "__module__")
    }
    members["__module__"] = cls.__module__
    # The class can't be imported: unpickling and copying make it anew.
    members["__reduce_ex__"] = lambda self, _: (_new_adopted, (cls, ours), self.__getstate__())
    return type(cls.__name__, (cls,), members)


# Pickles of converted models name this function, so its name and arguments stay.
def _new_adopted(cls: type[nn.Module], ours: type[nn.Module]) -> nn.Module:
    # Files that nobody vouches for may call it, see below.
    if not any(ours is new and issubclass(cls, old) for old, new in _REPLACEMENTS.items()):
        raise TypeError(f"Expected a subclass of torch.nn.RNN or torch.nn.RNNCell, got {cls}")
    adopted = _adopted(cls, ours)  # type: ignore[arg-type]
    # Whoever allows the class allows this one. No file contains the name.
    name = f"{cls.__module__}.{cls.__qualname__} by {__name__}"
    torch.serialization.add_safe_globals([(adopted, name)])
    return adopted.__new__(adopted)


# So that torch.load(weights_only=True) takes a whole model where it takes one with torch's RNN.
torch.serialization.add_safe_globals([RNN, RNNCell, _new_adopted])
