"""The emulator's instructions against the formulas of the PTX ISA, element by element.

PTX ISA 9.2: 9.7.14.5 for fragments, ldmatrix and stmatrix; 9.7.15.5 for wgmma and its descriptor.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.support.ptxsim import ptx
from tests.support.ptxsim.instructions import Kernel
from tests.support.ptxsim.machine import Launch
from tests.support.ptxsim.memory import Faults, GlobalMemory

# %r2 points into shared memory, 16 bytes further for each thread.
HEAD = """.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u64 .ptr .global .align 1 k_param_1
)
{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<99>;
	.reg .b64 %rd<99>;
	ld.param.b64 %rd1, [k_param_0];
	ld.param.b64 %rd2, [k_param_1];
	mov.u32 %r1, %tid.x;
	shl.b32 %r2, %r1, 4;
	add.s32 %r2, %r2, global_smem;
"""


def execute(body: str, given: np.ndarray, count: int) -> np.ndarray:
    """Return ``[threads, count]`` words that instructions make of ``given``, ``[threads, n]``.

    A thread's words are in %r10, ... before them, and those to return in %r40, ... after them.
    """
    given = np.ascontiguousarray(given, dtype=np.uint32)
    threads, n = given.shape
    out = np.zeros((threads, count), np.uint32)
    lines = [
        f"mad.wide.u32 %rd3, %r1, {4 * n}, %rd1;",
        f"mad.wide.u32 %rd4, %r1, {4 * count}, %rd2;",
    ]
    lines += [f"ld.global.b32 %r{10 + i}, [%rd3+{4 * i}];" for i in range(n)]
    lines += [body, *(f"st.global.b32 [%rd4+{4 * i}], %r{40 + i};" for i in range(count))]
    kernel = Kernel(ptx.parse(HEAD + "\n".join(lines) + "\nret;\n}"))
    memory, faults = GlobalMemory(), Faults(stop=True)
    arguments = [
        memory.add(name, x.reshape(-1).view(np.uint16), 0, True)
        for name, x in (("given", given), ("out", out))
    ]
    Launch(kernel, (1, 1, 1), threads // 32, 65536, arguments, memory, faults).run()
    return out


def drawn(shape: tuple[int, ...], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return values that a kind can hold, and their bits."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    if kind == "tf32":
        bits = x.numpy().view(np.uint32)
        return (bits >> 13 << 13).view(np.float32).astype(np.float64), bits
    x = x.to({"bf16": torch.bfloat16, "f16": torch.float16}[kind])
    return x.double().numpy(), x.view(torch.int16).numpy().view(np.uint16)


def place_in_a(i: int, lane: int, kind: str) -> tuple[int, int]:
    """Return row and column of a lane's element i of the left operand."""
    group, place = lane >> 2, lane % 4
    if kind == "tf32":
        return group + (8 if i in (1, 3) else 0), place + (4 if i >= 2 else 0)
    return group + (0 if i < 2 or 4 <= i < 6 else 8), place * 2 + (i & 1) + (8 if i >= 4 else 0)


def place_in_b(i: int, lane: int, kind: str) -> tuple[int, int]:
    group, place = lane >> 2, lane % 4
    if kind == "tf32":
        return place + 4 * i, group
    return place * 2 + (i & 1) + (8 if i >= 2 else 0), group


def place_in_d(i: int, lane: int) -> tuple[int, int]:
    return (lane >> 2) + (8 if i % 4 >= 2 else 0), i // 4 * 8 + lane % 4 * 2 + (i & 1)


def fragments(
    matrices: np.ndarray,
    place: Callable[[int, int, str], tuple[int, int]],
    registers: int,
    kind: str,
) -> np.ndarray:
    """Return ``[threads, registers]`` words of matrices, one for each warp."""
    per = 1 if kind == "tf32" else 2
    words = np.zeros((32 * len(matrices), registers), np.uint32)
    for thread, i in np.ndindex(len(words), registers * per):
        bits = np.uint32(matrices[thread // 32][place(i, thread % 32, kind)])
        words[thread, i // per] |= bits << np.uint32(16 * (i % per))
    return words


@pytest.mark.parametrize(("kind", "k"), [("bf16", 16), ("f16", 16), ("tf32", 8)])
def test_mma(kind: str, k: int):
    a, a_bits = drawn((1, 16, k), kind)
    b, b_bits = drawn((1, k, 8), kind)
    out = execute(
        f"mov.b32 %r30, 0f3F800000;\nmma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 "
        "{%r40, %r41, %r42, %r43}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, "
        "{%r30, %r30, %r30, %r30};",
        np.hstack([fragments(a_bits, place_in_a, 4, kind), fragments(b_bits, place_in_b, 2, kind)]),
        4,
    ).view(np.float32)
    expected = a[0] @ b[0] + 1
    for lane, i in np.ndindex(32, 4):
        assert abs(out[lane, i] - expected[place_in_d(i, lane)]) < 1e-5


def swizzled(address: int, width: int) -> int:
    """Exchange units of 16 bytes in a row of ``width`` bytes, by the number of its 128 bytes."""
    if not width:
        return address
    units = width // 16
    unit, line = address // 16 % units, address // 128 % units
    return address + 16 * ((unit ^ line) - unit)


def canonical(
    i: int, j: int, size: int, width: int, k_major: bool, strides: tuple[int, int]
) -> int:
    """Return where element j of row i is in CUTLASS's canonical layouts.

    For instance ((8,m),(T,2k)):((8T,SBO),(1,T)) of 128 bytes, where elements along k are adjacent.
    """
    leading, stride = strides
    unit = (width or 16) // size
    if k_major:
        row = i % 8 * (width or 16) + i // 8 * stride
        return row + j % unit * size + j // unit * leading
    across, along = (leading, stride) if width else (stride, leading)
    return i % unit * size + i // unit * across + j % 8 * (width or 16) + j // 8 * along


@pytest.mark.parametrize("width", [0, 32, 64, 128])
@pytest.mark.parametrize(
    ("kind", "k_major"),
    [("bf16", True), ("bf16", False), ("f16", True), ("f16", False), ("tf32", True)],
)
def test_wgmma(kind: str, k_major: bool, width: int):
    """The right operand in shared memory, of every swizzle; the left one in registers."""
    size, n = 4 if kind == "tf32" else 2, 16
    k = 32 // size
    a, a_bits = drawn((4, 16, k), kind)
    b, b_bits = drawn((1, k, n), kind)
    leading, stride = (128, 1024) if width or k_major else (1024, 128)
    if width and not k_major:
        leading, stride = 2048, 1024
    image = np.zeros(4096, np.uint8)
    for i, j in np.ndindex(n, k):
        at = swizzled(canonical(i, j, size, width, k_major, (leading, stride)), width)
        image[at : at + size] = np.frombuffer(b_bits[0, j, i].tobytes(), np.uint8)
    words = image.view(np.uint32).reshape(128, 8)
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[width]
    descriptor = mode << 62 | stride >> 4 << 32 | leading >> 4 << 16 | 1024 >> 4
    stores = "\n".join(f"st.shared.b32 [%r3+{4 * i}], %r{14 + i};" for i in range(8))
    trans = "" if kind == "tf32" else f", {1 - k_major}"
    out = execute(
        f"""shl.b32 %r3, %r1, 5;
add.s32 %r3, %r3, global_smem;
{stores}
fence.proxy.async.shared::cta;
bar.sync 0;
mov.b64 %rd9, {descriptor};
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind}
{{%r40,%r41,%r42,%r43,%r44,%r45,%r46,%r47}}, {{%r10,%r11,%r12,%r13}}, %rd9, 0, 1, 1{trans};
wgmma.commit_group.sync.aligned;
wgmma.wait_group.sync.aligned 0;""",
        np.hstack([fragments(a_bits, place_in_a, 4, kind), words]),
        8,
    ).view(np.float32)
    expected = a @ b
    for thread, i in np.ndindex(128, n // 2):
        element = expected[thread // 32][place_in_d(i, thread % 32)]
        assert abs(out[thread, i] - element) < 1e-4


@pytest.mark.parametrize("suffix", ["", ".trans"])
def test_ldmatrix_and_stmatrix(suffix: str):
    """Thread t points at row t % 8 of matrix t / 8, and has row t / 4, columns 2 (t % 4) + i."""
    words = np.random.default_rng(0).integers(0, 1 << 32, (32, 4), np.uint32)
    four = "{%r10, %r11, %r12, %r13}"
    out = execute(
        f"st.shared.v4.b32 [%r2], {four};\nbar.sync 0;\nldmatrix.sync.aligned.m8n8.x4{suffix}"
        ".shared.b16 {%r40, %r41, %r42, %r43}, [%r2];",
        words,
        4,
    )
    for lane, i in np.ndindex(32, 4):
        matrix = words.view(np.uint16)[8 * i : 8 * i + 8]
        matrix = matrix.T if suffix else matrix
        low, high = map(int, matrix[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2])
        assert out[lane, i] == low | high << 16
    back = execute(
        f"stmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 [%r2], {four};\nbar.sync 0;\n"
        "ld.shared.v4.b32 {%r40, %r41, %r42, %r43}, [%r2];",
        out,
        4,
    )
    assert (back == words).all()


SPECIAL = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x7F800000, 0xFF800000, 0x7FC00000]
WORDS = np.random.default_rng(0).integers(0, 1 << 32, (32, 3), np.uint32)
WORDS[:, 0] = np.repeat(np.array(SPECIAL, np.uint32), 4)
X, Y, Z = WORDS.astype(np.int64).T
SIGNED_X, SIGNED_Y, _ = WORDS.view(np.int32).astype(np.int64).T
NAN = np.isnan(WORDS.view(np.float32))
SELECT = "\nselp.b32 %r40, 1, 0, %p1;"
INTEGERS = {
    "add.s32 %r40, %r10, %r11;": X + Y,
    "mad.lo.s32 %r40, %r10, %r11, %r12;": X * Y + Z,
    "shr.s32 %r40, %r10, 40;": SIGNED_X >> 31,
    "shl.b32 %r40, %r10, 32;": 0 * X,
    "bfe.u32 %r40, %r10, 3, 7;": X >> 3 & 127,
    "bfe.s32 %r40, %r10, 5, 1;": -(X >> 5 & 1),
    "bfe.s32 %r40, %r10, 28, 8;": SIGNED_X >> 28,
    "prmt.b32 %r40, %r10, %r11, 0x5410U;": (X & 0xFFFF) | (Y & 0xFFFF) << 16,
    "prmt.b32 %r40, %r10, %r11, 0x7732U;": (X >> 16) | (Y >> 24 & 255) * 0x01010000,
    "shfl.sync.bfly.b32 %r40, %r11, 4, 31, -1;": Y[np.arange(32) ^ 4],
    "shfl.sync.idx.b32 %r40, %r11, 3, 31, -1;": Y[np.full(32, 3)],
    f"setp.lt.s32 %p1, %r10, %r11;{SELECT}": SIGNED_X < SIGNED_Y,
    f"setp.lt.u32 %p1, %r10, %r11;{SELECT}": X < Y,
    f"setp.num.f32 %p1, %r10, %r11;{SELECT}": ~(NAN[:, 0] | NAN[:, 1]),
}


@pytest.mark.parametrize("body", INTEGERS)
def test_integers(body: str):
    out = execute(body, WORDS, 1)[:, 0]
    assert (out == (INTEGERS[body].astype(np.int64) & 0xFFFFFFFF)).all()


def test_pairs_of_fp32_and_mixed_precision():
    """Blackwell's: two fp32 sums in 64 bits, and an fp32 sum of which one term has 16."""
    given = np.where(NAN.any(1)[:, None], np.uint32(0), WORDS)
    x, y, z = given.view(np.float32).T
    out = execute(
        "mov.b64 %rd5, {%r10, %r11};\nmov.b64 %rd6, {%r12, %r12};\nadd.f32x2 %rd7, %rd5, %rd6;\n"
        "mov.b64 {%r40, %r41}, %rd7;\ncvt.u16.u32 %rs1, %r10;\nadd.rn.f32.f16 %r42, %rs1, %r11;",
        given,
        3,
    ).view(np.float32)
    half = given[:, 0].astype(np.uint16).view(np.float16).astype(np.float32)
    assert np.array_equal(out, np.stack([x + z, y + z, half + y], 1), equal_nan=True)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_half_precision(kind: str):
    """Conversions and comparisons, against torch."""
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    given = np.where(NAN[:, :2].any(1)[:, None], np.uint32(0), WORDS)
    narrow = torch.from_numpy(given).view(torch.float32).to(dtype).view(torch.int16).numpy()
    low, high = narrow[:, 1].view(np.uint16), narrow[:, 0].view(np.uint16)
    out = execute(f"cvt.rn.{kind}x2.f32 %r40, %r10, %r11;", given, 1)[:, 0]
    assert (out == low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)).all()
    halves = torch.from_numpy(given).view(dtype).view(32, 3, 2).float().numpy()
    out = execute(f"cvt.u16.u32 %rs1, %r11;\ncvt.f32.{kind} %r40, %rs1;", given, 1)
    assert np.array_equal(out.view(np.float32)[:, 0], halves[:, 1, 0], equal_nan=True)
    greater = halves[:, 0] > halves[:, 1]
    out = execute(
        f"setp.gt.{kind}x2 %p1|%p2, %r10, %r11;\nselp.b32 %r40, 1, 0, %p1;\n"
        "selp.b32 %r41, 1, 0, %p2;",
        given,
        2,
    )
    assert (out == greater).all()
    out = execute(
        f"mov.b32 {{%rs1, _}}, %r10;\nmov.b32 {{%rs2, _}}, %r11;\nsetp.gt.{kind} %p1, %rs1, %rs2;"
        f"{SELECT}",
        given,
        1,
    )
    assert (out[:, 0] == greater[:, 0]).all()
