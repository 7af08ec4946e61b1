// A block per row, limited by memory: it reads the row of `a` with up to kTile rows of `b`, several vectors of each
// thread on their way at once. The order of a sum follows from H and the dtype, so results do not depend on N or G.
#include "cuda/row_dots.h"

#include "cuda/check.h"
#include "cuda/vec.cuh"

namespace ray_deepep {
namespace {

constexpr int kDotThreads = 128;
constexpr int kDotWarps = kDotThreads / 32;

// The products of one vector, added up in pairs.
template <typename T>
__device__ inline float dot(const Vec<T>& a, const Vec<T>& b) {
    constexpr int kCount = Vec<T>::kCount;
    float left[kCount], right[kCount];
    widen_all(a, left);
    widen_all(b, right);
#pragma unroll
    for (int j = 0; j < kCount; ++j) left[j] = __fmul_rn(left[j], right[j]);
#pragma unroll
    for (int step = 1; step < kCount; step *= 2) {
#pragma unroll
        for (int j = 0; j < kCount; j += 2 * step) left[j] = __fadd_rn(left[j], left[j + step]);
    }
    return left[0];
}

// Rounded once, as torch rounds a product of such a row and a float32 number.
template <typename T>
__device__ inline Vec<T> scaled(const Vec<T>& v, float weight) {
    float values[Vec<T>::kCount];
    widen_all(v, values);
    Vec<T> result;
#pragma unroll
    for (int j = 0; j < Vec<T>::kCount; ++j) result.items[j] = narrow<T>(__fmul_rn(values[j], weight));
    return result;
}

// This thread's part of the dots of one row of `a` with kTile rows of `b`. Each thread scales the vectors that it has
// read itself.
template <typename T, int kTile>
__device__ inline void add_row(std::byte* a_row, const std::byte* const* b_rows, int vectors, bool scale, float weight,
                               float* sums) {
    constexpr int kDepth = kTile < 4 ? 4 / kTile : 1;
    for (int first = threadIdx.x; first < vectors; first += kDepth * kDotThreads) {
        Vec<T> a[kDepth], b[kDepth][kTile];
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
            const int i = first + d * kDotThreads;
            if (i >= vectors) break;
            a[d] = load_vec<T>(a_row, i);
#pragma unroll
            for (int j = 0; j < kTile; ++j) b[d][j] = load_vec<T>(b_rows[j], i);
        }
#pragma unroll
        for (int d = 0; d < kDepth; ++d) {
            const int i = first + d * kDotThreads;
            if (i >= vectors) break;
#pragma unroll
            for (int j = 0; j < kTile; ++j) sums[j] = __fadd_rn(sums[j], dot(a[d], b[d][j]));
            if (scale) store_vec(a_row, i, scaled(a[d], weight));
        }
    }
}

// The sums of all threads, in warps first; thread j returns the j-th.
template <int kTile>
__device__ inline float add_threads(const float* sums) {
    __shared__ float warp_sums[kDotWarps][kTile];
    __syncthreads();  // those of the tile before have been read
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
        float sum = sums[j];
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffffu, sum, step));
        if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32][j] = sum;
    }
    __syncthreads();
    float total = 0.0f;
    if (threadIdx.x < kTile) {
        for (int warp = 0; warp < kDotWarps; ++warp) total = __fadd_rn(total, warp_sums[warp][threadIdx.x]);
    }
    return total;
}

template <typename T, int kTile>
__global__ void __launch_bounds__(kDotThreads) row_dots_kernel(const __grid_constant__ RowDotsParams params) {
    const int64_t n = blockIdx.x, row_bytes = params.hidden * static_cast<int64_t>(sizeof(T));
    const int vectors = static_cast<int>(params.hidden / Vec<T>::kCount);
    const float weight = params.weights != nullptr ? params.weights[n] : 1.0f;
    for (int64_t g = 0; g < params.num_groups; g += kTile) {
        const bool scale = params.weights != nullptr && g + kTile >= params.num_groups;
        const std::byte* b_rows[kTile];
        float sums[kTile] = {};
#pragma unroll
        for (int j = 0; j < kTile; ++j) {
            // Beyond the last group its row again, which is in the cache.
            const int64_t group = min(g + j, params.num_groups - 1);
            b_rows[j] = params.b + (group * params.num_rows + n) * row_bytes;
        }
        add_row<T, kTile>(params.a + n * row_bytes, b_rows, vectors, scale, weight, sums);
        const float total = add_threads<kTile>(sums);
        const int64_t group = g + threadIdx.x;
        if (threadIdx.x < kTile && group < params.num_groups) params.out[group * params.num_rows + n] = total;
    }
}

template <typename T>
void launch_tiles(const RowDotsParams& params, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>(params.num_rows);
    if (params.num_groups == 1) {
        row_dots_kernel<T, 1><<<blocks, kDotThreads, 0, stream>>>(params);
    } else if (params.num_groups == 2) {
        row_dots_kernel<T, 2><<<blocks, kDotThreads, 0, stream>>>(params);
    } else {
        row_dots_kernel<T, 4><<<blocks, kDotThreads, 0, stream>>>(params);
    }
}

}  // namespace

void launch_row_dots(const RowDotsParams& params, cudaStream_t stream) {
    if (params.num_rows == 0 || params.num_groups == 0) return;
    with_float_type(params.dtype, [&](auto type) { launch_tiles<decltype(type)>(params, stream); });
    check_launch("row_dots_kernel");
}

}  // namespace ray_deepep
