"""Replace torch's modules inside a model by tritonrnn's."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from torch import nn

from tritonrnn.modules import RNN, RNNCell

Model = TypeVar("Model", bound=nn.Module)

_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {nn.RNN: RNN, nn.RNNCell: RNNCell}


def convert(model: Model) -> Model:
    """Replace every ``nn.RNN`` and ``nn.RNNCell`` inside a model.

    Parameters, buffers and hooks stay the same objects, so that an optimizer built before still
    works. Training mode, devices and dtypes stay as they are. A module used in several places is
    replaced by one module. A subclass with a ``forward`` of its own is left alone; any other keeps
    its class as a base.

    Args:
        model: any module. It is changed in place, unless it is itself replaced.

    Returns:
        The model, or for a bare ``nn.RNN`` or ``nn.RNNCell`` its replacement.
    """
    replaced: dict[nn.Module, nn.Module] = {}

    def replacement(module: nn.Module) -> nn.Module:
        if module not in replaced:
            target = _target(module)
            replaced[module] = module if target is None else _move(module, target)
        return replaced[module]

    # Children first: a replacement takes over the children that a module has at that time.
    for module in reversed(list(model.modules())):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = replacement(child)
    return replacement(model)  # type: ignore[return-value]


def _target(module: nn.Module) -> type[nn.Module] | None:
    """Return the class that replaces a module's, or None to leave the module alone."""
    cls = type(module)
    if cls in _REPLACEMENTS:
        return _REPLACEMENTS[cls]
    for original, ours in _REPLACEMENTS.items():
        if isinstance(module, original) and cls.forward is original.forward:
            if isinstance(module, ours):
                return None
            if nn.utils.parametrize.is_parametrized(module) and cls.__bases__ == (original,):
                return _reparametrized(cls, ours)
            return _adopted(cls, ours)  # type: ignore[arg-type]
    return None


def _move(module: nn.Module, target: type[nn.Module]) -> nn.Module:
    """Return a module of another class that holds everything that this one holds."""
    moved = target.__new__(target)
    moved.__dict__.update(module.__dict__)
    # The containers of what can be assigned are copied: an assignment to one module must not reach
    # the other. Those of the hooks are shared: a handle removes its hook through them.
    for name in ("_parameters", "_buffers", "_modules"):
        moved.__dict__[name] = dict(module.__dict__[name])
    if isinstance(module, nn.RNN):
        moved.__dict__.pop("_flat_weights", None)
        moved.__dict__["_flat_weight_refs"] = []
    return moved


def _reparametrized(cls: type[nn.Module], ours: type[nn.Module]) -> type[nn.Module]:
    """Return a class like one that ``torch.nn.utils.parametrize`` made, but derived from ours."""
    members = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (ours,), members)


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
    return nn.Module.__new__(_adopted(cls, ours))  # type: ignore[arg-type]
