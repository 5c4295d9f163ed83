"""Plans are computed from shape, dtype and limits: they fit, and every problem has one."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritonrnn.kernels import plan as planning
from tritonrnn.kernels.cost import (
    HANDOFF_US,
    Declined,
    best_triton_plan,
    choose_plan,
    step_us,
)
from tritonrnn.kernels.devices import DEVICES, device_of
from tritonrnn.kernels.plan import (
    PLANS,
    LaunchPlan,
    Problem,
    cooperative_plan,
    rank_plans,
    registers_plan,
    resident_plan,
    stepwise_plan,
)

SM_90 = DEVICES["sm_90"]

problems = st.builds(
    Problem,
    T=st.integers(0, 10**6),
    B=st.integers(0, 10**6),
    G=st.integers(1, 8),
    H=st.integers(1, 4096),
    dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
    tf32=st.booleans(),
    epilogue=st.sampled_from(["tanh", "relu", "tanh_grad", "relu_grad"]),
)
devices = st.sampled_from(list(DEVICES.values()))


def is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


@given(problems, devices)
def test_plans_fit_the_device(problem, device):
    for plan_of in (registers_plan, resident_plan, stepwise_plan):
        plan = plan_of(problem, device)
        if plan is None:
            continue
        assert plan.shared_bytes <= device.shared_bytes
        assert all(map(is_power_of_two, (plan.block_h, plan.block_b, plan.block_k)))
        assert plan.num_warps * device.warp_size <= 1024
        # Every hidden unit of every sequence belongs to a program.
        blocks_b = -(-problem.B // plan.block_b)
        blocks_h = -(-problem.H // plan.block_h)
        assert plan.programs == blocks_b * blocks_h * problem.G
        if plan.name != "stepwise":
            assert blocks_h == 1
            # Products of fp32 accuracy are narrow: four of them at most make a whole one. Others
            # are one, or two for the sake of two sums.
            products = plan.block_h // plan.block_k
            most = {"resident": 1, "registers": 2}[plan.name]
            assert products <= (4 if plan.precision == "tf32x3" else most)
        if plan.name == "registers":
            parts = 2 if plan.precision == "tf32x3" else 1
            assert 2 * parts * problem.item_bytes * plan.block_h**2 <= device.register_bytes


@given(problems, devices)
def test_cooperative_plans_are_co_resident(problem, device):
    plan = cooperative_plan(problem, device)
    if plan is not None:
        cta_group_size = -(-problem.H // plan.block_h)
        assert plan.shared_bytes <= device.shared_bytes
        assert plan.programs % (cta_group_size * problem.G) == 0
        assert is_power_of_two(plan.block_h)
        assert is_power_of_two(plan.block_k)
        assert plan.block_read % plan.block_k == 0
        assert plan.num_warps * device.warp_size <= 1024
        assert plan.interleave in ((1,) if plan.precision == "tf32x3" else (1, 2))
        assert device.is_interpreter or 0 < plan.programs <= device.multiprocessors


def test_cooperative_cta_group_takes_several_blocks_in_one_launch():
    plan = choose_plan(Problem(T=512, B=256, G=2, H=1024, dtype="bf16"), SM_90)
    assert (plan.name, plan.programs, plan.launches) == ("cooperative", 128, 1)
    assert plan.interleave == 2
    assert "tanh_approx, two blocks interleaved, 4 warps, 128 programs" in str(plan)


@pytest.mark.parametrize(
    ("H", "dtype", "interleave"),
    [(512, "bf16", 2), (1272, "fp16", 2), (1536, "bf16", 1), (1023, "fp16", 1), (768, "fp32", 1)],
)
def test_cooperative_interleaves_where_registers_allow(H, dtype, interleave):
    problem = Problem(T=9, B=64, G=1, H=H, dtype=dtype, tf32=True)
    assert cooperative_plan(problem, SM_90).interleave == interleave


def test_cooperative_interleaved_blocks_hide_a_handoff():
    def us(B: int) -> float:
        problem = Problem(T=512, B=B, G=2, H=1024, dtype="bf16")
        return step_us(problem, cooperative_plan(problem, SM_90))

    # Four CTA groups of sixteen sequences; then each interleaves a second block, then has a third.
    assert us(128) == pytest.approx(2 * us(64) - 2 * HANDOFF_US)
    assert us(192) == pytest.approx(us(128) + us(64))


@pytest.mark.parametrize(("H", "largest", "too_large"), [(1024, 256, 512), (512, 1024, 2048)])
def test_choose_plan_leaves_to_torch_what_torch_does_faster(H, largest, too_large):
    """A launch that has to take a batch in many waves loses to torch's large products."""
    few, many = (Problem(512, B, 2, H, "bf16") for B in (largest, too_large))
    plan = choose_plan(few, SM_90)
    assert isinstance(plan, LaunchPlan)
    assert plan.launches == 1
    declined = choose_plan(many, SM_90)
    assert isinstance(declined, Declined)
    assert best_triton_plan(many, SM_90).name == "stepwise"
    assert re.search(rf"{plan.name} [\d.]+ us.* [\d.]+ us on torch's own path", declined.reason)


def test_choose_plan_takes_its_rates_from_the_device():
    """On an H100 memory is the limit of either path, on an H200 the walk in waves is."""
    problem = Problem(T=512, B=2**16, G=2, H=256, dtype="bf16")
    h100, h200 = SM_90, replace(SM_90, memory_gb_per_s=4800)
    assert isinstance(choose_plan(problem, h100), LaunchPlan)
    assert isinstance(choose_plan(problem, h200), Declined)
    slow = replace(h200, flop_per_clock=(1024, 512, 256))
    assert isinstance(choose_plan(problem, slow), LaunchPlan)


@given(problems, devices)
def test_rank_plans_ends_with_the_plan_that_fits_everything(problem, device):
    *others, last = rank_plans(problem, device)
    assert last == stepwise_plan(problem, device)
    assert all(plan.launches == 1 for plan in others)


def test_device_at_hand_is_asked(monkeypatch):
    """Limits that torch does not return are the next lower capability's, as published."""
    properties = SimpleNamespace(
        major=8,
        minor=7,
        multi_processor_count=16,
        shared_memory_per_block_optin=163 * 1024,
        max_threads_per_multi_processor=1536,
        regs_per_multiprocessor=65536,
        clock_rate=1_300_000,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    device = device_of.__wrapped__(torch.device("cuda"))
    published = replace(DEVICES["sm_86"], arch="sm_87", multiprocessors=16)
    assert device == replace(published, shared_bytes=163 * 1024, clock_mhz=1300)


def test_best_triton_plan_keeps_one_launch_while_it_is_faster_than_many():
    """Of 6.9 us a step, where torch's own path takes 5 and a launch a step 8."""
    problem = Problem(T=100, B=8192, G=1, H=128, dtype="fp32")
    assert isinstance(choose_plan(problem, SM_90), Declined)
    assert best_triton_plan(problem, SM_90).name == "resident"


@given(problems, devices)
def test_choose_plan_is_a_function_of_its_arguments(problem, device):
    choice = choose_plan(problem, device)
    assert choice == choose_plan(problem, device)
    assert isinstance(choice, LaunchPlan | Declined)
    if device.is_interpreter:
        assert isinstance(choice, LaunchPlan)


@pytest.mark.parametrize(
    ("dtype", "tf32", "device", "largest"),
    [
        ("bf16", False, "sm_90", 256),
        ("bf16", False, "gfx942", 128),
        ("fp32", True, "sm_90", 128),
        ("fp32", False, "gfx942", 64),
    ],
)
def test_choose_plan_keeps_weights_resident_while_they_fit(dtype, tf32, device, largest):
    fits = Problem(T=100, B=16, G=2, H=largest, dtype=dtype, tf32=tf32)
    choice = choose_plan(fits, DEVICES[device])
    assert isinstance(choice, LaunchPlan)
    assert (choice.name, choice.launches) == ("resident", 1)
    too_large = Problem(T=100, B=16, G=2, H=largest + 1, dtype=dtype, tf32=tf32)
    declined = choose_plan(too_large, DEVICES[device])
    if device == "sm_90":
        assert isinstance(declined, LaunchPlan)
        assert (declined.name, declined.launches) == ("cooperative", 1)
        return
    assert isinstance(declined, Declined)
    assert declined.reason.startswith(f"W_hh of {largest + 1} x {largest + 1} {dtype}")


@pytest.fixture
def nothing_is_untried(monkeypatch):
    monkeypatch.setattr(planning, "UNTRIED", {})
    choose_plan.cache_clear()
    yield
    choose_plan.cache_clear()


@pytest.mark.usefixtures("nothing_is_untried")
@pytest.mark.parametrize(
    ("B", "H", "dtype", "tf32", "name"),
    [
        (16, 128, "bf16", False, "registers"),
        (64, 256, "fp16", False, "registers"),
        (16, 128, "fp32", True, "registers"),
        # By mma.sync on Hopper, too.
        (16, 201, "bf16", False, "registers"),
        (16, 102, "bf16", False, "registers"),
        (16, 64, "fp32", False, "registers"),
    ],
)
def test_choose_plan_keeps_weights_in_registers_once_that_is_tried(B, H, dtype, tf32, name):
    problem = Problem(T=512, B=B, G=2, H=H, dtype=dtype, tf32=tf32)
    assert choose_plan(problem, SM_90).name == name
    assert choose_plan(problem, DEVICES["sm_80"]).name == name


@given(problems)
def test_choose_plan_makes_no_plan_that_is_untried(problem):
    choice = choose_plan(problem, SM_90)
    held_back = [name for name, instead in planning.UNTRIED.items() if instead == "next plan"]
    assert isinstance(choice, Declined) or choice.name not in held_back
    assert best_triton_plan(problem, SM_90).name not in planning.UNTRIED


@given(problems, devices, st.integers(0, 10**6), st.integers(0, 10**6))
def test_plans_compile_alike_whatever_the_batch(problem, device, T, B):
    """Only what a launch counts follows T and B: no tile, hence no kernel, does."""
    other = replace(problem, T=T, B=B)
    for plan_of in PLANS.values():
        plan, its = plan_of(problem, device), plan_of(other, device)
        assert (plan is None) == (its is None)
        if plan is not None:
            assert its == replace(plan, programs=its.programs, launches=its.launches)


@pytest.mark.parametrize("arch", ["gfx90a", "gfx1100"])
def test_fp32_products_are_ieee_where_there_is_no_tf32(arch):
    device = replace(DEVICES["gfx942"], arch=arch, multiprocessors=96)
    for tf32 in (False, True):
        problem = Problem(T=9, B=8, G=1, H=64, dtype="fp32", tf32=tf32)
        assert stepwise_plan(problem, device).precision == "ieee"
        mi300 = stepwise_plan(problem, DEVICES["gfx942"]).precision
        assert mi300 == ("tf32" if tf32 else "tf32x3")


def test_only_bf16_takes_the_hardwares_tanh():
    for dtype, epilogue, arch, expected in [
        ("bf16", "tanh", "sm_90", "tanh_approx"),
        ("bf16", "tanh", "sm_80", "tanh_approx"),
        ("bf16", "tanh_grad", "sm_90", "tanh_grad"),
        ("bf16", "relu", "sm_90", "relu"),
        ("fp16", "tanh", "sm_90", "tanh"),
        ("fp32", "tanh", "sm_90", "tanh"),
        ("bf16", "tanh", "gfx942", "tanh"),
        ("bf16", "tanh", "interpreter", "tanh"),
    ]:
        problem = Problem(T=9, B=8, G=1, H=512, dtype=dtype, epilogue=epilogue)
        assert stepwise_plan(problem, DEVICES[arch]).epilogue == expected


def test_plans_heed_a_smaller_device():
    small = replace(DEVICES["sm_86"], multiprocessors=20)
    assert cooperative_plan(Problem(9, 99, 1, 640, "bf16"), small).programs == 20
    assert cooperative_plan(Problem(9, 8, 2, 768, "bf16"), small) is None
    assert registers_plan(Problem(9, 8, 1, 256, "bf16"), small) is not None


NVIDIA = [arch for arch in DEVICES if arch.startswith("sm_")]


@pytest.mark.parametrize("arch", NVIDIA)
@pytest.mark.parametrize(
    ("dtype", "tf32", "in_registers", "spread"),
    [("bf16", False, 256, 1024), ("fp16", False, 256, 1024), ("fp32", True, 128, 512)],
)
@pytest.mark.parametrize("epilogue", ["tanh", "tanh_grad"])
def test_every_gpu_since_ampere_walks_in_one_launch(
    epilogue, dtype, tf32, in_registers, spread, arch
):
    """Both directions of a layer, up to these sizes, also where 99 KB of shared memory are left."""

    def names(H: int) -> list[str]:
        problem = Problem(T=9, B=16, G=2, H=H, dtype=dtype, tf32=tf32, epilogue=epilogue)
        plans = (plan_of(problem, DEVICES[arch]) for plan_of in PLANS.values())
        return [plan.name for plan in plans if plan is not None]

    assert all("registers" in names(H) for H in range(1, in_registers + 1))
    assert all("cooperative" in names(H) for H in range(1, spread + 1))
    assert "registers" not in names(in_registers + 1)
    # What M in registers by mma.sync replaces.
    assert ("resident" in names(64)) == (arch == "sm_90")


@pytest.mark.parametrize("arch", NVIDIA)
def test_fp32_of_full_accuracy_fits_half_as_many_hidden_units(arch):
    """W_hh counts twice: in registers 128, the most of TF32, too, as half of them are enough."""
    problem = Problem(T=9, B=16, G=2, H=128, dtype="fp32")
    assert registers_plan(problem, DEVICES[arch]) is not None
    assert cooperative_plan(replace(problem, H=384), DEVICES[arch]) is not None


def test_amd_keeps_its_plans_and_says_why():
    device = DEVICES["gfx942"]
    problem = Problem(T=9, B=16, G=1, H=64, dtype="bf16")
    names = [name for name, plan_of in PLANS.items() if plan_of(problem, device) is not None]
    assert names == ["resident", "stepwise"]
    assert "mma.sync" in device.missing_plans
    assert not any(DEVICES[arch].missing_plans for arch in NVIDIA)


def test_plan_prints_what_it_launches_and_its_limits():
    text = str(choose_plan(Problem(T=50, B=64, G=2, H=100, dtype="fp32", tf32=True), SM_90))
    assert text == (
        "resident: tiles of 128 hidden units x 8 sequences (products of 128, tf32), tanh, 8 warps, "
        "16 programs on 132 multiprocessors, 1 launch, 85 of 227 KiB of shared memory (sm_90)"
    )
