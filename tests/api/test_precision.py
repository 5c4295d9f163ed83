"""The process's switches for fp32 products are left as they were found."""

import threading

import pytest
import torch

from tritonrnn.precision import products_as_in_rnn, rounds_to_tf32

# Switches are set and read without a GPU as well.
CUDA = torch.device("cuda")


def set_for_everything(precision: str) -> None:
    """``torch.backends.fp32_precision``, which torch's module database freezes when imported."""
    torch._C._set_fp32_precision_setter("generic", "all", precision)


@pytest.fixture(autouse=True)
def _switches_put_back():
    yield
    set_for_everything("none")
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize("asked", ["tf32", "ieee"])
def test_products_follow_the_switch_for_rnns(asked):
    torch.backends.cudnn.rnn.fp32_precision = asked
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    with products_as_in_rnn(CUDA, torch.float32):
        assert torch.backends.cuda.matmul.fp32_precision == asked
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert rounds_to_tf32(CUDA, torch.float32) == (asked == "tf32")
    assert not rounds_to_tf32(CUDA, torch.bfloat16)
    assert not rounds_to_tf32(torch.device("cpu"), torch.float32)


def test_switch_that_is_inherited_still_is_afterwards():
    set_for_everything("tf32")
    with products_as_in_rnn(CUDA, torch.float32):
        pass
    set_for_everything("ieee")
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_overlapping_calls_of_two_threads_leave_the_switch_alone():
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    inside, outside = threading.Event(), threading.Event()

    def second() -> None:
        with products_as_in_rnn(CUDA, torch.float32):
            inside.set()
            outside.wait(10)

    thread = threading.Thread(target=second)
    with products_as_in_rnn(CUDA, torch.float32):
        thread.start()
        assert inside.wait(10)
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    outside.set()
    thread.join()
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
