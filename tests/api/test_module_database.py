"""Entries of torch's module database for RNN and RNNCell, run on tritonrnn's modules.

Follows torch's ``test/test_modules.py``: forward against the entry's reference, gradients, memory
formats, factory arguments, errors.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import tritonrnn
from tests.support.cases import DTYPE_NAMES

# torch's own tests need the package expecttest.
common_modules = pytest.importorskip("torch.testing._internal.common_modules")

pytestmark = pytest.mark.usefixtures("torch_back_end")

# Importing the database freezes the flags of torch.backends for the whole process.
torch.backends.__allow_nonbracketed_mutation_flag = True

OURS = {nn.RNN: tritonrnn.RNN, nn.RNNCell: tritonrnn.RNNCell}
ENTRIES = {
    info.module_cls.__name__: info for info in common_modules.module_db if info.module_cls in OURS
}


def samples(name: str, dtype=torch.float64, training: bool = True, requires_grad: bool = False):
    """Return the samples of an entry; for RNN the packed ones as well."""
    info = ENTRIES[name]
    options = {"with_packed_sequence": True} if name == "RNN" else {}
    return info.module_inputs_func(
        info,
        device="cpu",
        dtype=dtype,
        requires_grad=requires_grad,
        training=training,
        **options,
    )


def build(name: str, sample, dtype=torch.float64, training: bool = True):
    """Return torch's module and ours with the same weights."""
    torch.manual_seed(0)
    arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
    theirs = ENTRIES[name].module_cls(*arguments, **options, dtype=dtype).train(training)
    ours = OURS[type(theirs)](*arguments, **options, dtype=dtype).train(training)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def plain(results) -> list[torch.Tensor]:
    """Return the tensors in what a module returned."""
    results = results if isinstance(results, tuple) else (results,)
    return [y.data if isinstance(y, PackedSequence) else y for y in results]


def leaves(sample) -> list[torch.Tensor]:
    return plain(tuple(x for x in sample.forward_input.args if x is not None))


@pytest.fixture(params=ENTRIES)
def name(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["train", "eval"])
def training(request):
    return request.param


def test_entries_are_there():
    assert set(ENTRIES) == {"RNN", "RNNCell"}
    packed = [s for s in samples("RNN") if isinstance(s.forward_input.args[0], PackedSequence)]
    assert len(packed) >= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=DTYPE_NAMES.get)
def test_forward_agrees_with_torch_and_the_reference(name, dtype, training):
    for sample in samples(name, dtype, training):
        theirs, ours = build(name, sample, dtype, training)
        arguments, options = sample.forward_input.args, sample.forward_input.kwargs
        got = ours(*arguments, **options)
        torch.testing.assert_close(plain(got), plain(theirs(*arguments, **options)))
        if sample.reference_fn is not None and not isinstance(arguments[0], PackedSequence):
            with common_modules.freeze_rng_state():
                reference = sample.reference_fn(ours, *arguments, **options)
            torch.testing.assert_close(plain(got), plain(reference))


def test_gradients_agree_with_torch(name, training):
    for sample in samples(name, training=training, requires_grad=True):
        gradients = []
        for module in build(name, sample, training=training):
            loss = sum(y.pow(3).sum() for y in plain(module(*sample.forward_input.args)))
            wanted = [*leaves(sample), *module.parameters()]
            gradients.append(torch.autograd.grad(loss, wanted))
        torch.testing.assert_close(*gradients)


def test_non_contiguous_input_and_gradient_agree(name):
    def scattered(x):
        return torch.repeat_interleave(x.detach(), 2, dim=-1)[..., ::2].requires_grad_()

    for sample in samples(name, requires_grad=True):
        if isinstance(sample.forward_input.args[0], PackedSequence):
            continue
        theirs, ours = build(name, sample)
        results = []
        for module, change in ((theirs, lambda x: x), (ours, scattered)):
            given = [change(x) for x in sample.forward_input.args]
            ys = plain(module(*given))
            cotangents = [scattered(torch.ones_like(y)).detach() for y in ys]
            wanted = [*given, *module.parameters()]
            results.append([*ys, *torch.autograd.grad(ys, wanted, cotangents)])
        torch.testing.assert_close(*results)


def test_factory_arguments_are_followed(name):
    for sample in samples(name)[:4]:
        arguments, options = sample.constructor_input.args, sample.constructor_input.kwargs
        module = OURS[ENTRIES[name].module_cls](
            *arguments, **options, device="meta", dtype=torch.bfloat16
        )
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=DTYPE_NAMES.get)
def test_errors_are_those_of_the_entry(name, dtype):
    info = ENTRIES[name]
    errors = info.module_error_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=True
    )
    assert errors
    for error in errors:
        constructor = error.module_error_input.constructor_input
        forward = error.module_error_input.forward_input

        def construct(constructor=constructor):
            given = {"dtype": dtype, **constructor.kwargs}
            return OURS[info.module_cls](*constructor.args, **given)

        if error.error_on is common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                construct()
        else:
            module = construct()
            with pytest.raises(error.error_type, match=error.error_regex):
                module(*forward.args, **forward.kwargs)
