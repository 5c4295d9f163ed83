"""The recurrence kernel against the oracle: every epilogue, layout, direction, plan and dtype."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from tests.support import oracle
from tests.support.cases import DTYPE_NAMES
from tests.support.recurrence import (
    BOTH_WAYS,
    DEVICE,
    LAYOUTS,
    PLANS_HERE,
    assert_close,
    make_case,
    plan_of,
)
from tritonrnn.kernels import common, launch
from tritonrnn.kernels.common import round_to_tf32, tanh, tanh_approx
from tritonrnn.kernels.plan import LaunchPlan
from tritonrnn.kernels.stepwise import stepwise_kernel
from tritonrnn.layout import SequenceLayout
from tritonrnn.ragged import RaggedLayout

# In the interpreter NumPy warns where IEEE arithmetic is meant to give infinity or NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")


# In the quick subset there is every pair of two of them.
@pytest.mark.parametrize(
    ("layout", "epilogue", "plan"),
    [
        pytest.param(layout, epilogue, plan, marks=[pytest.mark.slow] * ((i + j + k) % 3 > 0))
        for i, layout in enumerate(LAYOUTS)
        for j, epilogue in enumerate(oracle.EPILOGUES)
        for k, plan in enumerate(PLANS_HERE)
    ],
)
def test_recurrence_matches_float64(layout, epilogue, plan):
    case = make_case(LAYOUTS[layout], 37, epilogue)
    assert_close(case, case.run(plan))


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS_HERE)
@pytest.mark.parametrize("epilogue", oracle.EPILOGUES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32"])
def test_recurrence_rounds_no_worse_than_torch(dtype, epilogue, plan):
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
    case = make_case(LAYOUTS["packed"], 38, epilogue, dtypes[dtype], tf32=dtype == "tf32")
    assert_close(case, case.run(plan))


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS_HERE)
@pytest.mark.parametrize("epilogue", ["tanh", "relu_grad"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recurrence_without_v_0_starts_at_zero(layout, epilogue, plan):
    case = make_case(LAYOUTS[layout], 16, epilogue, with_v_0=False)
    assert_close(case, case.run(plan))


@pytest.mark.parametrize("plan", PLANS_HERE)
@pytest.mark.parametrize(
    ("T", "B", "H"),
    [(1, 1, 1), (1, 9, 5), (2, 1, 17), (5, 3, 64), (3, 33, 31), (2, 2, 130), (4, 9, 200)],
)
def test_recurrence_takes_any_size(T, B, H, plan):
    for layout in (SequenceLayout.time_major(T, B), SequenceLayout.batch_major(B, T)):
        case = make_case(layout, H, "tanh", torch.float16, reverse=(True,))
        assert_close(case, case.run(plan))


@pytest.mark.parametrize("plan", PLANS_HERE)
def test_recurrence_walks_each_group_its_own_way(plan):
    case = make_case(
        LAYOUTS["jagged"],
        12,
        "tanh",
        reverse=(True, False, False, True, True),
    )
    assert_close(case, case.run(plan))


@pytest.mark.parametrize("B", [0, 2])
def test_recurrence_of_no_tokens_does_nothing(B):
    case = make_case(RaggedLayout.jagged(torch.zeros(B + 1, dtype=torch.int64), 0), 4, "tanh")
    assert case.run().shape == (0, 8)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS_HERE)
@pytest.mark.parametrize("epilogue", oracle.EPILOGUES)
def test_recurrence_keeps_nan_in_its_sequence(epilogue, plan):
    case = make_case(LAYOUTS["jagged"], 18, epilogue)
    clean = case.run(plan)
    rows = oracle.sequences(case.layout)
    # One sequence is poisoned throughout, another in its last token and its v_0 only.
    case.a[rows[2]] = torch.nan
    case.a[rows[3][-1]] = torch.inf
    case.v_0[:, 3] = torch.nan
    if case.aux is not None:
        case.aux[rows[2]] = torch.nan
        case.aux[rows[3][0]] = torch.nan
    poisoned = case.run(plan)
    others = sorted({row for b, of_b in enumerate(rows) if b not in (2, 3) for row in of_b})
    assert torch.equal(poisoned[others], clean[others])
    assert epilogue == "relu_grad" or poisoned[rows[2]].isnan().all()


@pytest.mark.parametrize("plan", PLANS_HERE)
def test_recurrence_first_step_starts_from_a_true_zero(plan):
    """An infinite weight of one unit reaches no other unit in a sequence's own first step."""
    case = make_case(LAYOUTS["packed"], 18, "tanh", reverse=(True,))
    clean = case.run(plan)
    case.M[:, 0, 1] = torch.inf
    first_steps = [rows[-1] for rows in oracle.sequences(case.layout)]
    assert torch.equal(case.run(plan)[first_steps, 1:], clean[first_steps, 1:])


@triton.jit
def pointwise_kernel(x_ptr, tanh_ptr, tf32_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(tanh_ptr + offs, tanh(x), mask=offs < n)
    tl.store(tf32_ptr + offs, round_to_tf32(x), mask=offs < n)


def test_tanh_is_accurate_near_zero_and_safe_far_out():
    size = torch.logspace(-37, 2, 50_001)
    beyond = torch.tensor([0.0, 0.625, 100.0, 1e30, torch.inf])
    x = torch.cat([size, beyond, -size, -beyond, torch.tensor([torch.nan])]).to(DEVICE)
    actual, tf32 = torch.empty_like(x), torch.empty_like(x)
    pointwise_kernel[(triton.cdiv(len(x), 1024),)](x, actual, tf32, len(x), BLOCK=1024)
    # At most 1.6 units in the last place in the interpreter; a GPU's exponential costs another.
    tolerance = 1.6 if DEVICE.type == "cpu" else 3.0
    torch.testing.assert_close(
        actual.double(),
        torch.tanh(x.double()),
        rtol=tolerance * 2**-23,
        atol=0,
        equal_nan=True,
    )
    assert actual.nan_to_num().abs().max() == 1
    assert torch.equal(actual.sign().nan_to_num(), x.sign().nan_to_num())
    torch.testing.assert_close(tf32, oracle.round_to_tf32(x), rtol=0, atol=0, equal_nan=True)


@triton.jit
def tanh_approx_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(y_ptr + offs, tanh_approx(x), mask=offs < n)


@pytest.mark.gpu
def test_tanh_approx_is_as_accurate_as_documented():
    size = torch.cat([torch.logspace(-37, 2, 50_001), torch.tensor([0.0, 1e30, torch.inf])])
    x = torch.cat([size, -size, torch.tensor([torch.nan])]).to(DEVICE)
    y = torch.empty_like(x)
    tanh_approx_kernel[(triton.cdiv(len(x), 1024),)](x, y, len(x), BLOCK=1024)
    expected = torch.tanh(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=2**-11, atol=0, equal_nan=True)


@triton.jit
def tanh_too_large(x):
    return tanh(x) * (1 + 2**-11)


@triton.jit
def tanh_too_small(x):
    return tanh(x) * (1 - 2**-11)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type != "cpu", reason="imitates the hardware")
@pytest.mark.parametrize("imitation", [tanh_too_large, tanh_too_small])
def test_bf16_recurrence_bears_the_error_of_the_hardwares_tanh(imitation, monkeypatch):
    """Also if every tanh were as wrong as it may be, and all in the same direction."""
    case = make_case(SequenceLayout.time_major(50, 4), 64, "tanh", torch.bfloat16)
    monkeypatch.setattr(common, "tanh_approx", imitation)
    plan = plan_of(case, "resident")
    exact, approximate = case.run(plan), case.run(replace(plan, epilogue="tanh_approx"))
    assert not torch.equal(exact, approximate)
    assert_close(case, approximate)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=DTYPE_NAMES.get
)
@pytest.mark.parametrize("epilogue", ["tanh", "relu_grad"])
def test_resident_takes_every_element_from_its_word(epilogue, dtype):
    """With no product added: all elements, exactly."""
    case = make_case(LAYOUTS["jagged"], 38, epilogue, dtype, with_v_0=False)
    case.M = torch.zeros_like(case.M)
    expected = case.a.tanh() if epilogue == "tanh" else case.a.where(case.aux > 0, 0)
    torch.testing.assert_close(case.run("resident"), expected)


@pytest.mark.parametrize("plan", PLANS_HERE)
@pytest.mark.parametrize("epilogue", ["relu", "tanh_grad"])
@pytest.mark.parametrize("H", [20, 21])
def test_recurrence_lets_a_state_overflow_as_torch_does(H, epilogue, plan):
    """To infinity, and not to NaN by way of hidden units that do not exist."""
    case = make_case(SequenceLayout.time_major(9, 3), H, epilogue, torch.float16, with_v_0=False)
    case.a, case.M = case.a.abs(), 9 * case.M.abs()
    if case.aux is not None:
        case.aux.zero_()
    s = case.run(plan)
    assert s.isinf().any()
    assert torch.equal(s.isnan(), case.expected(torch.float16).isnan())


@pytest.mark.parametrize("plan", PLANS_HERE)
def test_recurrence_is_deterministic(plan):
    case = make_case(LAYOUTS["packed"], 33, "tanh", torch.bfloat16)
    assert torch.equal(case.run(plan), case.run(plan))


@pytest.mark.slow
def test_recurrence_agrees_between_tile_sizes():
    case = make_case(LAYOUTS["jagged"], 33, "tanh")
    for plan, tiles in [
        ("resident", {"block_b": 32}),
        ("stepwise", {"block_h": 16, "block_k": 16, "block_b": 8}),
        ("stepwise", {"block_h": 64, "block_k": 32, "block_b": 16}),
    ]:
        forced = plan_of(case, plan)
        assert_close(case, case.run(LaunchPlan(**{**vars(forced), **tiles})))


@pytest.mark.slow
@pytest.mark.parametrize("epilogue", oracle.EPILOGUES)
def test_forced_plans_agree(epilogue):
    """To rounding: they add the same products in another order."""
    case = make_case(LAYOUTS["packed"], 20, epilogue)
    expected = case.run("stepwise")
    for name in PLANS_HERE:
        plan, actual = plan_of(case, name), case.a.clone()
        with launch.forced_plan(name):
            case.walk(actual, "resident")
        assert torch.equal(actual, case.run(plan))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("plan", "H"),
    [
        pytest.param("registers", 64, marks=pytest.mark.gpu),
        ("resident", 64),
        ("resident", 63),
        ("stepwise", 64),
    ],
)
def test_recurrence_reaches_rows_beyond_32_bits(plan, H):
    N = 2**31 // H + 8
    layout = SequenceLayout(T=3, B=2, N=N, batch_sizes=(2, 2, 2))
    rows = [0, N // 2, N - 2]
    # As if step t were that far down: what batch_sizes of 2³¹ rows would say.
    vars(layout)["time_base"] = torch.tensor(rows)
    # Untouched pages of this 4 GiB tensor are never backed by memory on a CPU.
    a = torch.empty(N, H, dtype=torch.float16, device=DEVICE)
    case = make_case(SequenceLayout.packed([2, 2, 2], 6), H, "tanh", torch.float16, reverse=(True,))
    for step, row in enumerate(rows):
        a[row : row + 2] = case.a[2 * step : 2 * step + 2]
    launch.recurrence(
        a,
        case.v_0,
        case.M,
        None,
        layout,
        epilogue="tanh",
        reverse=(True,),
        tf32=False,
        plan=plan_of(case, plan),
    )
    assert torch.equal(torch.cat([a[row : row + 2] for row in rows]), case.run(plan))


@pytest.mark.parametrize("plan", PLANS_HERE)
@pytest.mark.parametrize("epilogue", ["tanh", "tanh_grad"])
def test_recurrence_takes_tensors_that_begin_between_vectors(epilogue, plan):
    case = make_case(LAYOUTS["packed"], 20, epilogue, torch.float16)
    expected = case.run(plan)

    def shifted(x: Tensor) -> Tensor:
        return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)

    if case.aux is not None:
        case.aux = shifted(case.aux)
    a, s = shifted(case.a), torch.empty_like(case.a)
    assert a.data_ptr() % 16 != 0
    case.walk(a, plan_of(case, plan), s)
    assert torch.equal(s, expected)
    case.walk(case.a, plan_of(case, plan), a)
    assert torch.equal(a, expected)
    a.copy_(case.a)
    case.walk(a, plan_of(case, plan))
    assert torch.equal(a, expected)


@pytest.mark.parametrize("plan", PLANS_HERE)
def test_recurrence_reads_views_that_negate_memory(plan):
    case = make_case(LAYOUTS["packed"], 20, "tanh")
    expected = case.run(plan)
    case.M, case.v_0 = torch._neg_view(-case.M), torch._neg_view(-case.v_0)
    assert torch.equal(case.run(plan), expected)


def test_stepwise_reads_weights_beyond_32_bits():
    """As the backward pass reads W_hh from 46,341 hidden units on: column after column."""
    H, stride = 128, 2**25
    case = make_case(SequenceLayout.time_major(2, 1), H, "tanh", torch.float16, reverse=(False,))
    # Untouched pages of these 8 GiB are never backed by memory on a CPU.
    storage = torch.empty(H * stride, dtype=torch.float16, device=DEVICE)
    M = storage.as_strided((1, H, H), (0, 1, stride))
    M.copy_(case.M)
    expected = case.run("stepwise")
    case.M = M
    assert torch.equal(case.run("stepwise"), expected)


def test_recurrence_walks_past_step_65536():
    T, H = 70_000, 8
    case = make_case(SequenceLayout.time_major(T, 1), H, "tanh", reverse=(False,))
    plan = plan_of(case, "stepwise")
    problem = launch.problem_of(case.a, case.layout, G=1, epilogue="tanh", tf32=False)
    arguments = launch.kernel_arguments(
        case.a, case.a, case.v_0, case.M, None, None, case.layout, problem, (False,), plan
    )
    last = T - 3
    tail = SequenceLayout.time_major(3, 1)
    v_0 = (case.a[last - 1 : last] @ case.M[0].T)[None]
    expected = oracle.recurrence(
        case.a[last:], v_0, case.M, None, tail, epilogue="tanh", reverse=(False,)
    )
    for step in range(last, T):
        stepwise_kernel[launch.grid(problem, plan)](step=step, **arguments)
    torch.testing.assert_close(case.a[last:].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", PLANS_HERE)
def test_recurrence_walks_70000_steps(plan):
    case = make_case(SequenceLayout.time_major(70_000, 1), 16, "tanh", reverse=(True,))
    assert_close(case, case.run(plan))


def test_oracle_matches_torch():
    T, B, H = 7, 5, 6
    lengths = [7, 4, 4, 2, 1]
    generator = torch.Generator().manual_seed(0)
    rnn = torch.nn.RNN(3, H, bidirectional=True, dtype=torch.float64)
    x = torch.randn(T, B, 3, generator=generator, dtype=torch.float64)
    h_0 = torch.randn(2, B, H, generator=generator, dtype=torch.float64)
    packed = pack_padded_sequence(x, lengths)
    with torch.no_grad():
        expected = rnn(packed, h_0)[0].data
        weight_ih = torch.cat([rnn.weight_ih_l0, rnn.weight_ih_l0_reverse])
        bias = torch.cat([rnn.bias_ih_l0, rnn.bias_ih_l0_reverse])
        bias = bias + torch.cat([rnn.bias_hh_l0, rnn.bias_hh_l0_reverse])
        M = torch.stack([rnn.weight_hh_l0, rnn.weight_hh_l0_reverse])
        layout = SequenceLayout.packed(packed.batch_sizes.tolist(), sum(lengths))
        actual = oracle.recurrence(
            packed.data @ weight_ih.T + bias,
            h_0 @ M.mT,
            M,
            None,
            layout,
            epilogue="tanh",
            reverse=BOTH_WAYS,
        )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_oracle_of_a_gradient_epilogue_is_the_gradient(layout, nonlinearity):
    """The backward walk, as the kernels are held to it, is the derivative of the forward walk."""
    case = make_case(LAYOUTS[layout], 9, nonlinearity)
    layout = case.layout
    leaves = [x.double().requires_grad_() for x in (case.a, case.v_0)]
    s = oracle.recurrence(
        leaves[0], leaves[1], case.M, None, layout, epilogue=nonlinearity, reverse=BOTH_WAYS
    )
    rows = [of_b for of_b in oracle.sequences(layout) if of_b]
    generator = torch.Generator().manual_seed(1)
    d_s = torch.randn(s.shape, generator=generator, dtype=torch.float64).to(DEVICE)
    d_h_n = torch.randn(2, layout.B, 9, generator=generator, dtype=torch.float64).to(DEVICE)
    loss = (s * d_s).sum()
    last = [[of_b[-1] for of_b in rows], [of_b[0] for of_b in rows]]
    not_empty = [b for b, of_b in enumerate(oracle.sequences(layout)) if of_b]
    for g, last_rows in enumerate(last):
        loss = loss + (s[last_rows, g * 9 : (g + 1) * 9] * d_h_n[g, not_empty]).sum()
    expected = torch.autograd.grad(loss, leaves[0])[0]

    actual = oracle.recurrence(
        d_s,
        d_h_n,
        case.M.transpose(1, 2),
        s.detach(),
        layout,
        epilogue=f"{nonlinearity}_grad",
        reverse=(True, False),
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
