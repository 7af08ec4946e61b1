// Rows cast to float8: e4m3 elements with one float32 scale per block of 128. The definition, to the bit, is
// ray_deepep/float8.py.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace ray_deepep {

inline constexpr int64_t kScaleBlock = 128;

enum class Float8Scale : int32_t { kNone = 0, kFloat32 = 1, kPowerOfTwo = 2 };

// dst[hidden], scales[hidden / 128] from a row of float32, bfloat16 or float16; hidden is a multiple of 128.
void quantize_row(uint8_t* dst, float* scales, const void* src, int64_t hidden, DType dtype, Float8Scale scale);

}  // namespace ray_deepep
