// Loops over the elements of one row. Accumulation is float32, multiply then add, never fused: the same bits on every
// processor, and the bits that torch gives.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace ray_deepep {

// dst = round(weight * src)
void scale_row(void* dst, const void* src, int64_t hidden, DType dtype, float weight);
// acc += src
void add_row(float* acc, const void* src, int64_t hidden, DType dtype);
// acc += weight * src
void add_scaled_row(float* acc, const void* src, int64_t hidden, DType dtype, float weight);
// dst = round(acc)
void store_row(void* dst, const float* acc, int64_t hidden, DType dtype);

}  // namespace ray_deepep
