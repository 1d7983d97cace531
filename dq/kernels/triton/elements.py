"""What the kernels share element by element: rounding, minifloats, GELU, dots.

    rne(x) = (x + 1.5 * 2^23) - 1.5 * 2^23        exact for |x| < 2^22, ties to even, no instruction of its own needed

Triton's float to integer cast truncates, and its interpreter (TRITON_INTERPRET=1, how the tests run without a GPU) is
silently wrong in four places that are worked around here, for the interpreter only: bf16 `tl.dot` multiplies bit
patterns, fp32 -> bf16 truncates, fp32 -> e4m3 drops the carry of the mantissa, `tl.dot_scaled` reads e4m3 scales as
powers of two. It has no inline assembly either, and reads the NaN of e4m3 as 480.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
E4M3_MAX = tl.constexpr(448.0)
E2M1_MAX = tl.constexpr(6.0)


@triton.jit
def rne(x):
    """fp32 -> nearest whole number as fp32, ties to even; |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def clip(x, low, high):
    """x limited to [low, high]; NaN becomes `low`."""
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def narrow(x, kind: tl.constexpr):
    """fp32 -> the float type `kind`, nearest, ties to even."""
    if INTERPRETED and kind == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(kind)


@triton.jit
def gelu_tanh(x, FAST: tl.constexpr = False):
    """GELU in its tanh form: 0.5 x (1 + tanh u) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3).

    FAST: tanh by NVIDIA's own instruction, whose relative error is at most 2^-10.987 (PTX ISA, `tanh.approx.f32`).
    That leaves |error| <= 2^-11.98 |x|, an eighth of what rounding x to bf16 does; one slow instruction in place of
    two, and no division.
    """
    u = 0.7978845608028654 * x * (1.0 + 0.044715 * x * x)
    if FAST and not INTERPRETED:
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [u], tl.float32, True, 1)
        half = 0.5 * x
        y = half * t + half
    else:
        y = x * tl.sigmoid(2.0 * u)
    return y


@triton.jit
def snap_e4m3(x):
    """fp32 in [-448, 448] -> the nearest e4m3 number as fp32, ties to even."""
    field = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 121)  # subnormals share the spacing of 2^-6
    per_spacing = ((257 - field) << 23).to(tl.float32, bitcast=True)
    spacing = ((field - 3) << 23).to(tl.float32, bitcast=True)
    return rne(x * per_spacing) * spacing


@triton.jit
def to_e4m3(x):
    """fp32 in [-448, 448] -> e4m3, nearest, ties to even."""
    if INTERPRETED:
        x = snap_e4m3(x)
    return x.to(tl.float8e4nv)


@triton.jit
def e4m3_byte(x):
    """A non-negative e4m3 number as fp32 -> its bit pattern, uint8."""
    field = (x.to(tl.int32, bitcast=True) >> 20) & 0x7FF  # exponent and the three mantissa bits
    normal = field - (120 << 3)
    return tl.where(x < 0.015625, (x * 512.0).to(tl.int32), normal).to(tl.uint8)


@triton.jit
def e4m3_value(byte):
    """e4m3 bit pattern (uint8) -> fp32. NaN patterns give NaN."""
    bits = byte.to(tl.int32)
    magnitude = bits & 127
    normal = ((magnitude + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 127, float("nan"), value)
    return tl.where(bits > 127, -value, value)


@triton.jit
def e2m1_code(x):
    """fp32 -> nearest e2m1 pattern in 0 .. 15 (int32): 0 0.5 1 1.5 2 3 4 6 and a sign, saturating, ties to even."""
    size = tl.minimum(tl.abs(x), E2M1_MAX)
    code = tl.where(size < 2.0, rne(2.0 * size), tl.where(size < 4.0, rne(size) + 2.0, rne(0.5 * size) + 4.0))
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    return code.to(tl.int32) | sign


@triton.jit
def e2m1_value(code):
    """e2m1 pattern in the low four bits (int32) -> fp32."""
    magnitude = (code & 7).to(tl.float32)
    size = tl.where(
        magnitude < 4.0, 0.5 * magnitude, tl.where(magnitude < 6.0, magnitude - 2.0, 2.0 * magnitude - 8.0)
    )
    return tl.where((code & 8) > 0, -size, size)


@triton.jit
def dot16(a, b, acc):
    """acc + a @ b for 16-bit or fp32 operands, summed in fp32; fp32 operands keep all their bits."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def grouped(t, rows, columns, GROUP: tl.constexpr):
    """Tile number t of rows x columns tiles -> (row, column), walked in stripes of GROUP rows, so that L2 helps."""
    stripe = GROUP * columns
    first = t // stripe * GROUP
    height = tl.minimum(rows - first, GROUP)
    return first + t % stripe % height, t % stripe // height
