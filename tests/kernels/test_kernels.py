"""The contract through the kernels: without a GPU in Triton's interpreter, hence few."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.autograd import forward_ad

import tritonrnn
from tests.support.cases import (
    Case,
    assert_cotangents_of_any_memory,
    assert_no_shared_storage,
    assert_zero_gradients,
)
from tritonrnn.kernels import launch

pytestmark = [
    pytest.mark.usefixtures("torch_back_end"),
    # torch's own rules for forward AD are scripted at their first use.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
]

# Natively where there is a GPU.
KernelCase = functools.partial(Case, device="cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_back_end(torch_back_end):
    with tritonrnn.backend("triton"):
        yield


@pytest.mark.usefixtures("triton_back_end")
def test_kernels_share_no_storage_between_gradients():
    assert_no_shared_storage(KernelCase(T=2, D=2, layout="unbatched"))


@pytest.mark.parametrize("layout", ["time-major", "unsorted"])
@pytest.mark.usefixtures("triton_back_end")
def test_kernels_take_cotangents_of_any_memory(layout):
    assert_cotangents_of_any_memory(KernelCase(T=3, H=5, D=2, layout=layout))


@pytest.mark.usefixtures("triton_back_end")
def test_kernels_give_an_empty_batch_zero_gradients():
    assert_zero_gradients(KernelCase(B=0, D=2))


@pytest.mark.usefixtures("triton_back_end")
def test_kernels_of_all_layers_and_passes_share_the_tensors_of_a_layout(monkeypatch):
    given = []

    def arguments(*args, **kwargs):
        made = kernel_arguments(*args, **kwargs)
        terms = [made[f"{name}_ptr"] for name in ("time_base", "batch_base", "lengths")]
        given.append([term.data_ptr() for term in terms])
        return made

    kernel_arguments = launch.kernel_arguments
    monkeypatch.setattr(launch, "kernel_arguments", arguments)
    case = KernelCase(T=3, D=2, L=3, layout="unsorted")
    data, hx = case.tensors(1.0)
    output, h_n = case.module(tritonrnn.RNN)(case.input(data), hx)
    (output.data.sum() + h_n.sum()).backward()
    # A launch a layer, forward and backward.
    assert len(given) == 2 * 3
    assert given == len(given) * given[:1]
    # Triton would compile anew for another alignment.
    assert all(pointer % 16 == 0 for pointer in given[0])


@pytest.mark.usefixtures("triton_back_end")
def test_forced_kernels_refuse_forward_ad_rather_than_drop_a_tangent():
    case = KernelCase(T=3, B=2, H=5)
    module = case.module(tritonrnn.RNN)
    data, hx = (x.detach() for x in case.tensors())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward"):
        module(forward_ad.make_dual(data, torch.ones_like(data)), hx)
