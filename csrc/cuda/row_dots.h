// Dot products of rows: gradients of gates. Not communication; any stream, any number of multiprocessors.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace ray_deepep {

// out[g, n] = sum over h of a[n, h] * b[g, n, h], and then, with weights, a[n] *= weights[n]. Rows are multiples of 16
// bytes, and begin at such addresses.
struct RowDotsParams {
    std::byte* a = nullptr;          // [N, H]
    const std::byte* b = nullptr;    // [G, N, H]
    const float* weights = nullptr;  // [N]; null: rows stay as they are
    float* out = nullptr;            // [G, N]
    int64_t num_rows = 0;            // N
    int64_t num_groups = 0;          // G
    int64_t hidden = 0;              // H
    DType dtype = DType::kFloat32;
};

void launch_row_dots(const RowDotsParams& params, cudaStream_t stream);

}  // namespace ray_deepep
