"""Plans are computed from shape, dtype and limits: they fit, and every problem has one."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritonrnn.kernels.cost import (
    HANDOFF_US,
    LAUNCH_US,
    programs_at_once,
    rank_plans,
    step_us,
    stepwise_step_us,
)
from tritonrnn.kernels.devices import DEVICES, device_of
from tritonrnn.kernels.plan import (
    PLANS,
    Problem,
    cooperative_plan,
    plan_named,
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
    plan = cooperative_plan(Problem(T=512, B=256, G=2, H=1024, dtype="bf16"), SM_90)
    assert (plan.programs, plan.launches) == (128, 1)
    assert plan.interleave == 2
    assert "tanh_approx, two blocks interleaved, 4 warps, 128 programs" in str(plan)


@pytest.mark.parametrize(
    ("arch", "H", "dtype", "epilogue", "interleave"),
    [
        ("sm_90", 512, "bf16", "tanh_grad", 2),
        ("sm_90", 1272, "fp16", "tanh", 2),
        ("sm_90", 1536, "bf16", "tanh", 1),
        ("sm_90", 1023, "fp16", "tanh", 1),
        ("sm_90", 768, "fp32", "tanh", 1),
        ("sm_86", 600, "bf16", "relu_grad", 2),
        ("sm_120", 600, "bf16", "relu", 2),
        ("sm_120", 600, "bf16", "relu_grad", 1),
        ("sm_100", 256, "bf16", "relu_grad", 2),
    ],
)
def test_cooperative_interleaves_where_registers_allow(arch, H, dtype, epilogue, interleave):
    problem = Problem(T=9, B=64, G=1, H=H, dtype=dtype, tf32=True, epilogue=epilogue)
    assert cooperative_plan(problem, DEVICES[arch]).interleave == interleave


@pytest.mark.parametrize(
    ("arch", "dtype", "tf32", "H", "block_h", "block_b"),
    [
        # By wgmma, of 64 rows and 16 sequences.
        ("sm_90", "bf16", False, 1667, 64, 16),
        ("sm_90", "bf16", False, 1668, 32, 16),
        ("sm_90", "fp32", True, 769, 64, 16),
        ("sm_90", "fp32", True, 1024, 32, 8),
        # By mma.sync, also where wgmma would fit, but be waited for.
        ("sm_90", "fp32", False, 129, 32, 8),
        ("sm_90", "fp32", False, 832, 32, 8),
        ("sm_90", "fp32", False, 1024, 16, 8),
        ("sm_80", "fp32", False, 256, 64, 8),
        ("sm_80", "fp32", False, 512, 32, 8),
        ("sm_80", "fp32", False, 768, 16, 8),
    ],
)
def test_cooperative_programs_have_fewer_rows_where_no_more_fit(
    arch, dtype, tf32, H, block_h, block_b
):
    problem = Problem(T=9, B=16, G=2, H=H, dtype=dtype, tf32=tf32)
    plan = cooperative_plan(problem, DEVICES[arch])
    assert (plan.block_h, plan.block_b) == (block_h, block_b)
    # A sum adds to what one mma.sync after the other makes; wgmma needs no second one.
    by_mma_sync = arch != "sm_90" or block_h < 64
    assert plan.num_sums == (2 if by_mma_sync and plan.precision != "tf32x3" else 1)


def test_cooperative_interleaved_blocks_hide_a_handoff():
    def us(B: int) -> float:
        problem = Problem(T=512, B=B, G=2, H=1024, dtype="bf16")
        return step_us(problem, cooperative_plan(problem, SM_90))

    # Four CTA groups of sixteen sequences; then each interleaves a second block, then has a third.
    assert us(128) == pytest.approx(2 * us(64) - 2 * HANDOFF_US)
    assert us(192) == pytest.approx(us(128) + us(64))


forward_problems = problems.filter(lambda problem: not problem.epilogue.endswith("_grad"))


@given(forward_problems, devices, st.booleans())
def test_rank_plans_is_total(problem, device, training):
    """It has every plan that fits, in training in both passes, each once: stepwise always does."""
    ranking = rank_plans(problem, device, training)
    epilogues = [problem.epilogue, *([f"{problem.epilogue}_grad"] if training else [])]
    fitting = {
        name
        for name, plan_of in PLANS.items()
        if all(plan_of(replace(problem, epilogue=epilogue), device) for epilogue in epilogues)
    }
    assert sorted(plan.name for plan in ranking) == sorted(fitting)
    assert "stepwise" in fitting
    assert ranking == rank_plans(problem, device, training)
    assert all(plan == plan_named(plan.name, problem, device) for plan in ranking)


@given(problems, devices)
def test_rank_plans_prefers_one_launch_while_it_is_faster_than_many(problem, device):
    ranking = rank_plans(problem, device)
    place = [plan.name for plan in ranking].index("stepwise")
    before, after = ranking[:place], ranking[place + 1 :]
    if device.is_interpreter:
        assert not after
        return
    stepwise_us = stepwise_step_us(problem, device)
    assert stepwise_us >= LAUNCH_US
    assert all(step_us(problem, plan) <= stepwise_us for plan in before)
    assert all(step_us(problem, plan) > stepwise_us for plan in after)
    order = list(PLANS)
    for part in (before, after):
        assert [plan.name for plan in part] == sorted((p.name for p in part), key=order.index)


@given(problems, devices)
def test_programs_at_once_fill_the_device(problem, device):
    for plan in rank_plans(problem, device):
        assert programs_at_once(problem, plan) >= device.multiprocessors
        # What waits for each other runs at the same time. The interpreter has one CTA group a
        # group of hidden units, and runs them in turn.
        if plan.waits and not device.is_interpreter:
            assert programs_at_once(problem, plan) >= plan.programs


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


@pytest.mark.parametrize(
    ("dtype", "tf32", "device", "largest"),
    [
        ("bf16", False, "sm_90", 256),
        ("bf16", False, "gfx942", 128),
        ("fp32", True, "sm_90", 128),
        ("fp32", False, "gfx942", 64),
    ],
)
def test_rank_plans_keeps_weights_resident_while_they_fit(dtype, tf32, device, largest):
    def plans(H):
        problem = Problem(T=100, B=16, G=2, H=H, dtype=dtype, tf32=tf32)
        return [plan.name for plan in rank_plans(problem, DEVICES[device])]

    spread = ["cooperative"] if device == "sm_90" else []
    one_launch = ["resident", *spread]
    assert [name for name in plans(largest) if name != "registers"] == [*one_launch, "stepwise"]
    assert plans(largest + 1) == [*spread, "stepwise"]


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
def test_rank_plans_keeps_weights_in_registers_where_they_fit(B, H, dtype, tf32, name):
    problem = Problem(T=512, B=B, G=2, H=H, dtype=dtype, tf32=tf32)
    assert rank_plans(problem, SM_90)[0].name == name
    assert rank_plans(problem, DEVICES["sm_80"])[0].name == name


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
def test_fp32_of_full_accuracy_is_spread_over_twice_as_many_programs(arch):
    """W_hh counts twice: in registers 128, the most of TF32, too, as half of them are enough."""
    problem = Problem(T=9, B=16, G=2, H=128, dtype="fp32")
    assert registers_plan(problem, DEVICES[arch]) is not None
    assert cooperative_plan(replace(problem, H=656), DEVICES[arch]) is not None


def test_amd_keeps_its_plans_and_says_why():
    device = DEVICES["gfx942"]
    problem = Problem(T=9, B=16, G=1, H=64, dtype="bf16")
    names = [name for name, plan_of in PLANS.items() if plan_of(problem, device) is not None]
    assert names == ["resident", "stepwise"]
    assert "mma.sync" in device.missing_plans
    assert not any(DEVICES[arch].missing_plans for arch in NVIDIA)


def test_plan_prints_what_it_launches_and_its_limits():
    text = str(resident_plan(Problem(T=50, B=64, G=2, H=100, dtype="fp32", tf32=True), SM_90))
    assert text == (
        "resident: tiles of 128 hidden units x 8 sequences (products of 128, tf32), tanh, 8 warps, "
        "16 programs on 132 multiprocessors, 1 launch, 85 of 227 KiB of shared memory (sm_90)"
    )
