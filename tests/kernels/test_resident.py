"""The resident walk: how its numbers come, and what the compiler makes of a step."""

import re

import pytest
import torch

from tests.support import compiled, oracle
from tests.support.recurrence import LAYOUTS, assert_close, make_case, plan_of
from tritonrnn.kernels import launch
from tritonrnn.layout import SequenceLayout

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


@pytest.mark.parametrize("T", range(1, 7))
@pytest.mark.parametrize("H", [20, 21], ids=["words", "loads"])
def test_resident_walks_any_number_of_steps(H, T):
    """More and fewer than there are stages. (What the pipeliner makes of them a GPU alone runs.)"""
    for layout in (SequenceLayout.time_major(T, 9), SequenceLayout.batch_major(T, 9)):
        case = make_case(layout, H, "tanh_grad", torch.bfloat16)
        assert (plan_of(case, "resident").num_stages > 1) == (H == 20)
        assert_close(case, case.run("resident"))


@pytest.mark.parametrize("epilogue", oracle.EPILOGUES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_resident_loads_odd_rows(layout, epilogue):
    case = make_case(LAYOUTS[layout], 37, epilogue, torch.float16)
    assert plan_of(case, "resident").num_stages == 1
    assert_close(case, case.run("resident"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("epilogue", ["tanh", "relu_grad"])
def test_resident_takes_every_number_from_its_word(epilogue, dtype):
    """Numbers of one step each, which nothing is added to: all of them, exactly."""
    case = make_case(LAYOUTS["jagged"], 38, epilogue, dtype, with_v_0=False)
    case.M = torch.zeros_like(case.M)
    expected = case.a.tanh() if epilogue == "tanh" else case.a.where(case.aux > 0, 0)
    torch.testing.assert_close(case.run("resident"), expected)


@pytest.mark.parametrize("epilogue", ["relu", "tanh_grad"])
@pytest.mark.parametrize("H", [20, 21], ids=["words", "loads"])
def test_resident_lets_a_state_overflow_as_torch_does(H, epilogue):
    """To infinity, and not to NaN by way of hidden units that are not there."""
    case = make_case(SequenceLayout.time_major(9, 3), H, epilogue, torch.float16, with_v_0=False)
    case.a, case.M = case.a.abs(), 9 * case.M.abs()
    if case.aux is not None:
        case.aux.zero_()
    s = case.run("resident")
    assert s.isinf().any()
    assert torch.equal(s.isnan(), case.expected(torch.float16).isnan())


def test_an_output_that_begins_between_words_is_copied(monkeypatch):
    case = make_case(LAYOUTS["packed"], 20, "tanh_grad", torch.float16)
    expected = case.run("resident")
    given = []

    def arguments(*args, **kwargs):
        made = kernel_arguments(*args, **kwargs)
        given.append(made["aux_ptr"].data_ptr() % 16)
        return made

    kernel_arguments = launch.kernel_arguments
    monkeypatch.setattr(launch, "kernel_arguments", arguments)
    storage = case.aux.new_empty(case.aux.numel() + 1)
    case.aux = storage[1:].view(case.aux.shape).copy_(case.aux)
    assert torch.equal(case.run("resident"), expected)
    assert given == [0]


# Of most registers and of fewest, with one product a state and with several.
SPREADS = [
    "'sm_90', dtypes=['bf16'], sizes=[64], epilogues=['tanh'], batches=[('padded', 1, False)]",
    "'sm_90', dtypes=['fp16'], sizes=[128], epilogues=['relu'], batches=[('padded', 1, True)]",
    "'sm_90', dtypes=['bf16'], sizes=[256], epilogues=['tanh_grad'], batches=[('packed', 2, True)]",
    "'sm_90', dtypes=['bf16'], sizes=[100], epilogues=['tanh'], batches=[('packed', 1, False)]",
    "'sm_90', dtypes=['tf32'], sizes=[128], epilogues=['tanh_grad'], batches=[('packed', 2, True)]",
    "'sm_90', dtypes=['fp32'], sizes=[128], epilogues=['tanh'], batches=[('padded', 1, False)]",
    "'sm_80', dtypes=['bf16'], sizes=[256], epilogues=['tanh_grad'], batches=[('packed', 2, True)]",
]


@pytest.fixture(scope="module", params=SPREADS)
def kernel(request) -> dict:
    (made,) = compiled.kernels([f"{request.param}, plans=['resident']"])
    return made


def test_resident_step_has_two_barriers_and_waits_for_no_load(kernel):
    """In the SASS of the time loop.

    From a product to the next one: a wait for what was sent for steps before, a barrier, the
    epilogue, the state's way to shared memory, for the product and for the store to global memory,
    and a barrier. No number is loaded to a register but the row of packed batches, which a later
    turn uses. Copies of all the steps that are sent for remain under way.
    """
    assert kernel["spilled"] == 0
    assert kernel["shared"] <= kernel["planned"]
    events = compiled.events(kernel["loop"])
    copies = 2 if kernel["has_aux"] else 1
    assert events.count("LDGSTS") >= copies
    rows = [name for name in events if name.startswith("LDG.")]
    assert rows == (["LDG.E.64"] if kernel["layout"] == "packed" else [])
    assert not rows or not used_before_the_product_is_made("LDG.E.64", kernel["loop"])
    chain = [
        name
        for name in events
        if name in ("BAR", "STS", "STSM", "FENCE") or name.startswith("DEPBAR")
    ]
    wait = f"DEPBAR.LE SB0, {copies * (kernel['stages'] - 2):#x}"
    fence = ["FENCE"] if "HGMMA" in events else []
    stores = [name for name in chain if name.startswith("STS")]
    if kernel["precision"] == "tf32x3":
        # The store beside the product; the state in two parts, one after the other.
        expected = [*2 * ["BAR"], wait, *4 * ["BAR"]]
        assert [name for name in chain if name not in stores] == expected
        # Each of the four tiles' products begins from zero.
        from_zero = [line for line in kernel["loop"] if re.search(r"HMMA.*, RZ\b", line)]
        assert len(from_zero) == 4
    else:
        # Once for the product and once for the store.
        assert len(stores) >= 2
        assert chain == [wait, "BAR", *stores, "BAR", *fence]


def used_before_the_product_is_made(load: str, loop: list[str]) -> bool:
    """Whether what is loaded is used in the same turn, before the last matrix instruction."""
    start, register = next(
        (i, match[1])
        for i, line in enumerate(loop)
        if (match := re.search(rf"{re.escape(load)} (R\d+),", line))
    )
    end = max(i for i, line in enumerate(loop) if re.search("HGMMA|HMMA", line))
    return any(re.search(rf"\b{register}\b", line) for line in loop[start + 1 : end])
