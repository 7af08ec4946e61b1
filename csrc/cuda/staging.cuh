// Staging: rows that do not live in the heap are copied there, some warps of each block doing it while the others move
// rows already. Rows may be cast to float8 on the way. Every kReadyRows rows a flag tells all peers.
#pragma once

#include "common/dtype.h"
#include "cuda/operation.cuh"
#ifdef __CUDACC__
#include <cuda_fp8.h>

#include "cuda/vec.cuh"
#endif

namespace ray_deepep {

struct Staging {
    const std::byte* rows = nullptr;  // null: they lie in the heap, only their scales do not
    const float* scales = nullptr;
    int64_t row_bytes = 0;  // of a staged row
    int64_t scale_bytes = 0;
    int64_t hidden = 0;
    int64_t num_rows = 0;
    DType from = DType::kFloat32;  // with cast: dtype of `rows`
    bool cast = false;             // to float8, one scale per 128 elements
    bool power_of_two = false;
    int num_warps = 0;  // of each block, the last ones; 0: nothing to stage
};

#ifdef __CUDACC__

inline constexpr float kFloat8Max = 448.0f;
inline constexpr float kSmallestAmax = 1e-4f;

__device__ inline void copy_row(const std::byte* from, std::byte* to, int64_t bytes) {
    const auto* source = reinterpret_cast<const uint4*>(from);
    auto* target = reinterpret_cast<uint4*>(to);
    const int64_t vectors = bytes / 16;
    int64_t i = threadIdx.x % 32;
    // Eight loads in flight before the first store.
    for (; i + 224 < vectors; i += 256) {
        uint4 v[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = __ldcs(&source[i + j * 32]);
#pragma unroll
        for (int j = 0; j < 8; ++j) target[i + j * 32] = v[j];
    }
    for (; i < vectors; i += 32) target[i] = __ldcs(&source[i]);
}

__device__ inline float float8_scale(float amax, bool power_of_two) {
    const float scale = __fdiv_rn(fmaxf(amax, kSmallestAmax), kFloat8Max);
    if (!power_of_two) return scale;
    const uint32_t bits = __float_as_uint(scale);
    return __uint_as_float((bits & 0x7fffffu) != 0 ? (bits & 0x7f800000u) + 0x800000u : bits);
}

// Quotients of one scale, rounded as a division rounds them: the remainder of the first try corrects it. One reciprocal
// serves all eight of a lane. (Compared with divisions for all mantissas of the scale, near every bound of float8.)
struct Divisor {
    float reciprocal;
    float scale;  // 0 where it is infinite: nothing to correct then, and no NaN from it

    __device__ static Divisor of(float scale) { return {__frcp_rn(scale), isinf(scale) ? 0.0f : scale}; }
    __device__ float divide(float value) const {
        const float quotient = __fmul_rn(value, reciprocal);
        return __fmaf_rn(__fmaf_rn(-quotient, scale, value), reciprocal, quotient);
    }
};

// Eight elements of this lane; 16 lanes hold a block of 128. Whole warp.
template <typename T>
__device__ void cast_eight(const Vec<T>* loaded, bool here, std::byte* to, float* scales, int64_t at,
                           bool power_of_two) {
    float values[8];
    float amax = 0.0f;
#pragma unroll
    for (int v = 0; v < static_cast<int>(8 * sizeof(T) / 16); ++v) widen_all(loaded[v], values + v * Vec<T>::kCount);
#pragma unroll
    for (int j = 0; j < 8; ++j) amax = fmaxf(amax, fabsf(values[j]));
#pragma unroll
    for (int step = 1; step < 16; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, step));
    if (!here) return;
    const float scale = float8_scale(amax, power_of_two);
    const Divisor by = Divisor::of(scale);
    union {
        uint2 bits;
        __nv_fp8x2_storage_t pairs[4];
    } packed;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const float2 pair{by.divide(values[2 * j]), by.divide(values[2 * j + 1])};
        packed.pairs[j] = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
    }
    reinterpret_cast<uint2*>(to)[at / 8] = packed.bits;
    if (threadIdx.x % 16 == 0) scales[at / 128] = scale;
}

// A whole warp; kBatch times 256 elements are loaded before the first is cast.
template <typename T, int kBatch>
__device__ void cast_row(const std::byte* from, std::byte* to, float* scales, int64_t hidden, bool power_of_two) {
    constexpr int kVectors = 8 * sizeof(T) / 16;
    for (int64_t first = threadIdx.x % 32 * 8, base = 0; base < hidden; base += kBatch * 256, first += kBatch * 256) {
        Vec<T> loaded[kBatch][kVectors];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                const int64_t at = first + i * 256;
                loaded[i][v].bits = make_uint4(0, 0, 0, 0);
                if (at < hidden) loaded[i][v].bits = __ldcs(reinterpret_cast<const uint4*>(from) + at * sizeof(T) / 16 + v);
            }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (base + i * 256 >= hidden) break;
            const int64_t at = first + i * 256;
            cast_eight<T>(loaded[i], at < hidden, to, scales, at, power_of_two);
        }
    }
}

__device__ inline void stage_row(const Peers& peers, const Staging& staging, uint32_t sequence, int64_t row) {
    const AreaLayout& area = peers.layout.area;
    auto* to = peers.in_area<std::byte>(peers.rank, sequence, area.rows_at) + row * staging.row_bytes;
    auto* scales = peers.in_area<float>(peers.rank, sequence, area.scales_at) + row * (staging.scale_bytes / 4);
    if (staging.cast) {
        const std::byte* from = staging.rows + row * staging.hidden * element_size(staging.from);
        switch (staging.from) {
            case DType::kFloat32: return cast_row<float, 2>(from, to, scales, staging.hidden, staging.power_of_two);
            case DType::kBFloat16:
                return cast_row<__nv_bfloat16, 4>(from, to, scales, staging.hidden, staging.power_of_two);
            default: return cast_row<__half, 4>(from, to, scales, staging.hidden, staging.power_of_two);
        }
    }
    if (staging.rows != nullptr) copy_row(staging.rows + row * staging.row_bytes, to, staging.row_bytes);
    if (staging.scales == nullptr) return;
    const float* from = staging.scales + row * (staging.scale_bytes / 4);
    for (int64_t i = threadIdx.x % 32; i < staging.scale_bytes / 4; i += 32) scales[i] = from[i];
}

// The last `staging.num_warps` warps of each block. piece_at(i) is the i-th piece to stage (-1: none), for i below
// num_pieces; stage(row), by a warp, puts a row into the area, or leaves out one that no peer reads.
template <typename PieceAt, typename Stage>
__device__ void stage_rows(const Peers& peers, const Staging& staging, uint32_t sequence, int64_t num_pieces,
                           PieceAt piece_at, Stage stage) {
    const int threads = staging.num_warps * 32, thread = threadIdx.x - (blockDim.x - threads);
    for (int64_t i = blockIdx.x; i < num_pieces; i += gridDim.x) {
        const int64_t piece = piece_at(i);
        if (piece < 0) continue;
        const int64_t first = piece * kReadyRows, last = min(first + kReadyRows, staging.num_rows);
        for (int64_t row = first + thread / 32; row < last; row += staging.num_warps) stage(row);
        sync_warps(BlockBarrier::kStaging, threads);
        for (int peer = thread; peer < peers.num_ranks; peer += threads) {
            store_release(peers.ready_flag(peer, peers.rank, piece), sequence);
        }
    }
}

#endif  // __CUDACC__

}  // namespace ray_deepep
