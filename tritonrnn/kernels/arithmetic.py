"""Numbers of the recurrence kernel: roundings, products of parts, epilogues."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Give tanh of an fp32 tile: odd, exact in the limit at 0, 1 far out, NaN for NaN."""
    # Below 5/8 the exponential form cancels; an odd minimax polynomial (Cephes tanhf) does not.
    square = x * x
    near = -5.70498872745e-3 * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    # exp(2 |x|), to base 2, may overflow to inf, and 1 - 2 / inf is the right answer.
    magnitude = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * magnitude) + 1.0)
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    far = (far.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(magnitude < 0.625, near, far)


@triton.jit
def tanh_of_hardware(x):
    """Give tanh of an fp32 tile that is to be rounded to bf16, by one instruction of NVIDIA's.

    Its relative error is at most 2⁻¹¹ (PTX ISA, ``tanh.approx.f32``; others measured 1.11e-5,
    https://stackoverflow.com/q/41251698), an eighth to a quarter of what rounding to bf16 may add.
    Were it 2⁻¹¹ throughout, 10 % of the outputs of z ~ N(0, 4) would be the next bf16 number, and
    the error of a bf16 recurrence against float64 7 % larger; of 1.11e-5, 0.2 % would. It
    replaces some twenty instructions a number, half of a resident step's.
    """
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def round_to_tf32(x):
    """Round an fp32 tile to TF32's 10 fraction bits, ties away from zero, as ``cvt.rna.tf32``.

    ``tl.dot`` truncates what it is given, which doubles the error and biases it.
    """
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    # The carry out of a NaN's fraction would turn it into a number.
    return tl.where(x == x, rounded, x)


@triton.jit
def narrow(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round an fp32 tile to dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # Triton's interpreter truncates instead, which is exact for a number of 8 bits.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def keep_place(x, INTERPRETED: tl.constexpr):
    """Give x, 32 bits a register, as an instruction that the compiler leaves where it stands.

    Triton moves the store of a loaded number to shared memory up to its load, between the loads;
    and LLVM packs two 16-bit numbers that were loaded one by one wherever they are used.
    """
    if INTERPRETED:
        return x
    PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=PACK
    )


@triton.jit
def operands(x, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """Turn stored numbers into what ``tl.dot`` is to see of them: a large and a small part.

    Only products of fp32 accuracy have use for the small part. There the two are TF32 numbers
    whose sum keeps 22 bits of x. (A state that relu lets overflow to infinity gives NaN in the
    next step, where infinities of one sign might have been left: infinity times a small part.)
    """
    if INTERPRETED:
        # Triton's interpreter would multiply the bit patterns of bf16 numbers.
        x = x.to(tl.float32)
    large = x
    small = x
    if PRECISION != "ieee":
        large = round_to_tf32(x)
    if PRECISION == "tf32x3":
        # Infinity less infinity is not the 0 that is meant.
        small = tl.where(x == large, 0.0, round_to_tf32(x - large))
    return large, small


@triton.jit
def multiply_add(m, m_small, s, s_small, z, PRECISION: tl.constexpr):
    """Give ``m s + z`` of parts that :func:`operands` made.

    A matrix instruction truncates its sum (Fasi et al., Numerical behavior of NVIDIA tensor cores,
    2021), by up to a unit in the last place of what it has added up, and a product is many of them.
    For fp32 accuracy, products begin with the smallest, from zero, and are few columns wide; z, and
    one product after the other, is added as fp32 numbers are.
    """
    if PRECISION == "tf32x3":
        product = tl.dot(m_small, s, input_precision="tf32")
        product = tl.dot(m, s_small, product, input_precision="tf32")
        return z + tl.dot(m, s, product, input_precision="tf32")
    else:
        return tl.dot(m, s, z, input_precision=PRECISION)


@triton.jit
def apply_epilogue(z, aux, EPILOGUE: tl.constexpr):
    """E(z, aux), in fp32, of what :func:`prepare_aux` made of aux."""
    if EPILOGUE == "tanh":
        return tanh(z)
    elif EPILOGUE == "tanh_approx":
        return tanh_of_hardware(z)
    elif EPILOGUE == "relu":
        # Not a maximum, which would lose a NaN.
        return tl.where(z < 0, 0.0, z)
    elif EPILOGUE == "tanh_grad":
        return z * aux
    else:
        tl.static_assert(EPILOGUE == "relu_grad")
        # Chosen, not multiplied: torch gives 0 where the unit is off, whatever z is.
        return tl.where(aux > 0, z, 0.0)


@triton.jit
def prepare_aux(aux, EPILOGUE: tl.constexpr):
    """What of the epilogue can be computed before z is known."""
    aux = aux.to(tl.float32)
    if EPILOGUE == "tanh_grad":
        aux = 1.0 - aux * aux
    return aux
