// Biases of experts' linear layers, added to rows grouped by expert. Not communication; any stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace ray_deepep {

// rows[n] += biases[expert of n]. Rows are multiples of 16 bytes, and begin at such addresses.
struct ExpertBiasParams {
    std::byte* rows = nullptr;          // [S, O]
    const std::byte* biases = nullptr;  // [L, O]
    const int32_t* ends = nullptr;      // [L], ascending: the first row after each expert's
    int64_t num_rows = 0;               // S
    int num_experts = 0;                // L
    int64_t width = 0;                  // O
    DType dtype = DType::kFloat32;
};

void launch_expert_bias(const ExpertBiasParams& params, cudaStream_t stream);

}  // namespace ray_deepep
