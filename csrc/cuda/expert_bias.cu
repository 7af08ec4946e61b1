// A warp per row, limited by memory: a row is read and written once, and its bias is in a cache.
#include "cuda/expert_bias.h"

#include <algorithm>

#include "cuda/check.h"
#include "cuda/vec.cuh"

namespace ray_deepep {
namespace {

constexpr int kBiasThreads = 256;
constexpr int kBiasWarps = kBiasThreads / 32;
constexpr int kBiasDepth = 4;  // loads of a lane under way
constexpr int64_t kMaxBlocks = 4096;

// Whole warp: how many experts' rows end at or before this one.
__device__ inline int expert_of(const ExpertBiasParams& p, int64_t row) {
    int expert = 0;
    for (int first = 0; first < p.num_experts; first += 32) {
        const int i = first + static_cast<int>(threadIdx.x % 32);
        expert += __popc(__ballot_sync(0xffffffffu, i < p.num_experts && p.ends[i] <= row));
    }
    return expert;
}

template <typename T>
__device__ inline Vec<T> sum_of(const Vec<T>& a, const Vec<T>& b) {
    constexpr int kCount = Vec<T>::kCount;
    float left[kCount], right[kCount];
    widen_all(a, left);
    widen_all(b, right);
    Vec<T> sum;
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum.items[j] = narrow<T>(__fadd_rn(left[j], right[j]));
    return sum;
}

template <typename T>
__global__ void __launch_bounds__(kBiasThreads) expert_bias_kernel(const __grid_constant__ ExpertBiasParams p) {
    const int vectors = static_cast<int>(p.width / Vec<T>::kCount), lane = threadIdx.x % 32;
    const int64_t row_bytes = p.width * static_cast<int64_t>(sizeof(T)), step = int64_t{gridDim.x} * kBiasWarps;
    for (int64_t n = int64_t{blockIdx.x} * kBiasWarps + threadIdx.x / 32; n < p.num_rows; n += step) {
        const int expert = expert_of(p, n);
        if (expert >= p.num_experts) return;  // nobody's rows come last
        std::byte* row = p.rows + n * row_bytes;
        const std::byte* bias = p.biases + expert * row_bytes;
        for (int first = lane; first < vectors; first += 32 * kBiasDepth) {
            Vec<T> v[kBiasDepth];
#pragma unroll
            for (int d = 0; d < kBiasDepth; ++d) {
                if (first + d * 32 < vectors) v[d] = load_vec<T>(row, first + d * 32);
            }
#pragma unroll
            for (int d = 0; d < kBiasDepth; ++d) {
                const int i = first + d * 32;
                if (i < vectors) store_vec(row, i, sum_of(v[d], load_vec<T>(bias, i)));
            }
        }
    }
}

}  // namespace

void launch_expert_bias(const ExpertBiasParams& params, cudaStream_t stream) {
    if (params.num_rows == 0 || params.num_experts == 0) return;
    const int64_t blocks = std::min((params.num_rows + kBiasWarps - 1) / kBiasWarps, kMaxBlocks);
    with_float_type(params.dtype, [&](auto type) {
        expert_bias_kernel<decltype(type)><<<static_cast<unsigned>(blocks), kBiasThreads, 0, stream>>>(params);
    });
    check_launch("expert_bias_kernel");
}

}  // namespace ray_deepep
