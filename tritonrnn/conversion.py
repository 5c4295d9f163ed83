"""Put tritonrnn's modules in the place of torch's inside a model."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from torch import nn

from tritonrnn.modules import RNN, RNNCell

Model = TypeVar("Model", bound=nn.Module)

_REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {nn.RNN: RNN, nn.RNNCell: RNNCell}


def convert(model: Model) -> Model:
    """Replace every ``nn.RNN`` and ``nn.RNNCell`` inside a model.

    Parameters, buffers and hooks are not copied: they are the same objects, so an optimizer built
    before still works. Training mode, devices and dtypes stay as they are. A module used in
    several places is replaced by one module. A subclass that has a ``forward`` of its own is left
    alone; one that has not keeps its class as a base.

    Args:
        model: any module. It is changed in place, unless it is itself to be replaced.

    Returns:
        The model, or for a bare ``nn.RNN`` or ``nn.RNNCell`` its replacement.
    """
    replaced: dict[nn.Module, nn.Module] = {}

    def replacement(module: nn.Module) -> nn.Module:
        if module not in replaced:
            target = _target(module)
            replaced[module] = module if target is None else _move(module, target)
        return replaced[module]

    # From the inside out: what is replaced hands on the children that it has then.
    for module in reversed(list(model.modules())):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = replacement(child)
    return replacement(model)  # type: ignore[return-value]


def _target(module: nn.Module) -> type[nn.Module] | None:
    """The class to replace a module's by, or None to leave it alone."""
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
    """A module of another class with everything that this one has."""
    moved = target.__new__(target)
    moved.__dict__.update(module.__dict__)
    # The containers of what can be assigned are its own, so that assigning to one of the two does
    # not reach the other. Those of the hooks are shared: a handle finds its hook through them.
    for name in ("_parameters", "_buffers", "_modules"):
        moved.__dict__[name] = dict(module.__dict__[name])
    if isinstance(module, nn.RNN):
        moved.__dict__.pop("_flat_weights", None)
        moved.__dict__["_flat_weight_refs"] = []
    return moved


def _reparametrized(cls: type[nn.Module], ours: type[nn.Module]) -> type[nn.Module]:
    """A class that ``torch.nn.utils.parametrize`` made of torch's, made of ours instead."""
    members = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (ours,), members)


@functools.cache
def _adopted(cls: type[nn.Module], ours: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a user's subclass that runs as ours does."""
    members: dict[str, Any] = {
        name: member
        for name, member in ours.__dict__.items()
        if name not in ("__init__", "__doc__", "__dict__", "__weakref__", "__module__")
    }
    members["__module__"] = cls.__module__
    # Its class is made, not imported: pickling and copying make it again.
    members["__reduce_ex__"] = lambda self, _: (_new_adopted, (cls, ours), self.__getstate__())
    return type(cls.__name__, (cls,), members)


def _new_adopted(cls: type[nn.Module], ours: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(_adopted(cls, ours))  # type: ignore[arg-type]
