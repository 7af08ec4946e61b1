// Loops over the elements of one row. Accumulation is float32, multiply then add, never fused: the same bits on every
// processor, and the bits that torch gives.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

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
// dst = src, of any type in float32
void widen_row(float* dst, const void* src, int64_t count, DType dtype);
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

// One token's sum, in a row of float32 that stays in the first-level cache.
class RowSum {
  public:
    RowSum(int64_t hidden, DType dtype, bool streamed)
        : hidden_(hidden), dtype_(dtype), streamed_(streamed), sum_(hidden) {}
    void add(const void* row) {
        empty_ ? set_row(sum_.data(), row, hidden_, dtype_) : add_row(sum_.data(), row, hidden_, dtype_);
        empty_ = false;
    }
    void add_scaled(const void* row, float weight) {
        empty_ ? set_scaled_row(sum_.data(), row, hidden_, dtype_, weight)
               : add_scaled_row(sum_.data(), row, hidden_, dtype_, weight);
        empty_ = false;
    }
    // Write the sum, rounded, and start the next.
    void take(void* out) {
        if (empty_) std::fill(sum_.begin(), sum_.end(), 0.0f);
        store_row(out, sum_.data(), hidden_, dtype_, streamed_);
        empty_ = true;
    }

  private:
    int64_t hidden_;
    DType dtype_;
    bool streamed_;
    std::vector<float> sum_;
    bool empty_ = true;
};

}  // namespace ray_deepep
