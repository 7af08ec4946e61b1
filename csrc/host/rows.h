// Loops over the elements of one row. Accumulation is float32, multiply then add, never fused: the same bits on every
// processor, and the bits that torch gives.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace ray_deepep {

// dst = src. Streamed: written past the cache, for output that is larger than it; every writer then calls
// finish_streaming() before anyone is told.
void copy_row(void* dst, const void* src, int64_t bytes, bool streamed);
// dst = 0
void clear_row(void* dst, int64_t bytes, bool streamed);
void finish_streaming();
// dst = round(weight * src)
void scale_row(void* dst, const void* src, int64_t hidden, DType dtype, float weight);
// acc = 0 + src, which is src but for the sign of zeros: as a sum that starts at 0
void set_row(float* acc, const void* src, int64_t hidden, DType dtype);
// acc = 0 + weight * src
void set_scaled_row(float* acc, const void* src, int64_t hidden, DType dtype, float weight);
// acc += src
void add_row(float* acc, const void* src, int64_t hidden, DType dtype);
// acc += weight * src
void add_scaled_row(float* acc, const void* src, int64_t hidden, DType dtype, float weight);
// dst = round(acc)
void store_row(void* dst, const float* acc, int64_t hidden, DType dtype, bool streamed);

}  // namespace ray_deepep
