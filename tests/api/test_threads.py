"""Calls from several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.support.cases import Case, assert_same_results, pair, plain, run

pytestmark = pytest.mark.usefixtures("torch_back_end")


@pytest.mark.parametrize("layout", ["time-major", "packed"])
def test_number_of_threads_is_left_as_it_was(layout):
    case = Case(layout=layout, H=8)
    _, ours = pair(case)
    data, hx = case.tensors()
    torch.set_num_threads(2)
    try:
        output, h_n = ours(case.input(data), hx)
        assert torch.get_num_threads() == 2
        (plain(output).sum() + h_n.sum()).backward()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_calls_from_several_threads_agree():
    case = Case(T=40, H=16, D=2, dtype=torch.float64)
    _, ours = pair(case)
    data, hx = case.tensors()
    expected = run(case, ours, data, hx)

    def again(_):
        return run(case, ours, data, hx)

    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(again, range(12)):
            assert_same_results(got, expected)
    assert torch.get_num_threads() == 1
