#include "host/float8.h"

#include <cstring>

#include "host/multiversion.h"
#include "host/rows.h"

namespace ray_deepep {
namespace {

constexpr float kLargest = 448.0f;
constexpr int32_t kSmallestAmaxBits = 0x38d1b717;  // 1e-4
constexpr int32_t kInfinityBits = 0x7f800000;
constexpr int kMantissaBits = 23;

float float_of(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

// Largest absolute value, as bits: without the sign they are ordered as the numbers are, NaN above all.
RAY_DEEPEP_MULTIVERSION int32_t amax_bits(const float* x) {
    int32_t largest = kSmallestAmaxBits;
    for (int64_t i = 0; i < kScaleBlock; ++i) {
        int32_t bits;
        std::memcpy(&bits, x + i, sizeof(bits));
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

// x / scale, held within +-448, to the nearest e4m3 number, ties to even. A number of exponent e is a multiple of
// 2^(e - 3), below 2^-6 of 2^-9; adding 2^23 times that much rounds it to a multiple and leaves which one in the
// mantissa. Nobody looks at floating-point exceptions: GCC vectorises it only where it may ignore them. Values are the
// same.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("no-trapping-math")
#endif
RAY_DEEPEP_MULTIVERSION void convert(uint8_t* __restrict dst, const float* __restrict x, float scale) {
    constexpr int32_t kLargestBits = 0x43e00000;  // 448
    constexpr int32_t kSmallestExponent = 121;    // 2^-6, biased
    for (int64_t i = 0; i < kScaleBlock; ++i) {
        const float quotient = x[i] / scale;
        int32_t bits;
        std::memcpy(&bits, &quotient, sizeof(bits));
        const int32_t sign = (bits >> 24) & 0x80;
        bits &= 0x7fffffff;
        const int32_t held = bits < kLargestBits ? bits : kLargestBits;
        int32_t exponent = held >> kMantissaBits;
        exponent = exponent > kSmallestExponent ? exponent : kSmallestExponent;
        const int32_t magic = (exponent + 20) << kMantissaBits;
        float magnitude, rounder;
        std::memcpy(&magnitude, &held, sizeof(magnitude));
        std::memcpy(&rounder, &magic, sizeof(rounder));
        const float rounded = magnitude + rounder;
        int32_t multiple;
        std::memcpy(&multiple, &rounded, sizeof(multiple));
        multiple &= (1 << kMantissaBits) - 1;
        const int32_t nan = ((kInfinityBits - bits) >> 31) & 0x7f;
        dst[i] = static_cast<uint8_t>(sign | (((exponent - kSmallestExponent) << 3) + multiple) | nan);
    }
}
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

float scale_of(int32_t amax, Float8Scale scale) {
    const float exact = float_of(amax) / kLargest;
    if (scale != Float8Scale::kPowerOfTwo) return exact;
    int32_t bits;
    std::memcpy(&bits, &exact, sizeof(bits));
    const int32_t has_mantissa = (bits & ((1 << kMantissaBits) - 1)) != 0 ? 1 : 0;
    return float_of(((bits >> kMantissaBits) + has_mantissa) << kMantissaBits);
}

}  // namespace

void quantize_row(uint8_t* dst, float* scales, const void* src, int64_t hidden, DType dtype, Float8Scale scale) {
    float block[kScaleBlock];
    const int64_t block_bytes = kScaleBlock * element_size(dtype);
    for (int64_t i = 0; i < hidden / kScaleBlock; ++i) {
        // Not set_row: that loses the sign of zeros.
        widen_row(block, static_cast<const std::byte*>(src) + i * block_bytes, kScaleBlock, dtype);
        scales[i] = scale_of(amax_bits(block), scale);
        convert(dst + i * kScaleBlock, block, scales[i]);
    }
}

}  // namespace ray_deepep
