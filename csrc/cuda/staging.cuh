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
        const float corrected = __fmaf_rn(__fmaf_rn(-quotient, scale, value), reciprocal, quotient);
        // A zero keeps its sign.
        return __uint_as_float(__float_as_uint(corrected) | (__float_as_uint(value) & 0x80000000u));
    }
};

// Elements of this lane in four blocks of 128: two groups of eight, sixteen groups a block, so that what a warp loads
// at a time are pieces of 128 bytes.
template <typename T>
struct CastPiece {
    static constexpr int kBlocks = 4;
    static constexpr int kVectors = 8 * sizeof(T) / 16;
    Vec<T> vectors[2][kVectors];

    __device__ static int64_t element(int64_t block, int group) {
        return block * 128 + (threadIdx.x % 8 + group * 8) * 8;
    }
    // Whole warp, as the others; `first` is the first of the blocks.
    __device__ void load(const std::byte* from, int64_t first, int64_t num_blocks) {
        const int64_t block = first + threadIdx.x % 32 / 8;
#pragma unroll
        for (int group = 0; group < 2; ++group) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                const auto* at = reinterpret_cast<const uint4*>(from) + element(block, group) * sizeof(T) / 16 + v;
                vectors[group][v].bits = block < num_blocks ? __ldcs(at) : make_uint4(0, 0, 0, 0);
            }
        }
    }
    __device__ void store(std::byte* to, float* scales, int64_t first, int64_t num_blocks, bool power_of_two) const {
        float values[2][8];
        float amax = 0.0f;
#pragma unroll
        for (int group = 0; group < 2; ++group) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) widen_all(vectors[group][v], values[group] + v * Vec<T>::kCount);
#pragma unroll
            for (int j = 0; j < 8; ++j) amax = fmaxf(amax, fabsf(values[group][j]));
        }
#pragma unroll
        for (int step = 1; step < 8; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, step));
        const int64_t block = first + threadIdx.x % 32 / 8;
        if (block >= num_blocks) return;
        const float scale = float8_scale(amax, power_of_two);
        const Divisor by = Divisor::of(scale);
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            union {
                uint2 bits;
                __nv_fp8x2_storage_t pairs[4];
            } packed;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float2 pair{by.divide(values[group][2 * j]), by.divide(values[group][2 * j + 1])};
                packed.pairs[j] = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
            }
            *reinterpret_cast<uint2*>(to + element(block, group)) = packed.bits;
        }
        if (threadIdx.x % 8 == 0) scales[block] = scale;
    }
};

// A whole warp; the next pieces are on their way while one is cast.
template <typename T>
__device__ void cast_row(const std::byte* from, std::byte* to, float* scales, int64_t hidden, bool power_of_two) {
    constexpr int kBlocks = CastPiece<T>::kBlocks, kInFlight = sizeof(T) == 4 ? 1 : 2;
    const int64_t num_blocks = hidden / 128;
    CastPiece<T> pieces[kInFlight + 1];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) pieces[i].load(from, i * kBlocks, num_blocks);
    for (int64_t first = 0; first < num_blocks; first += (kInFlight + 1) * kBlocks) {
#pragma unroll
        for (int i = 0; i <= kInFlight; ++i) {
            const int64_t at = first + i * kBlocks;
            if (at >= num_blocks) break;
            pieces[(i + kInFlight) % (kInFlight + 1)].load(from, at + kInFlight * kBlocks, num_blocks);
            pieces[i].store(to, scales, at, num_blocks, power_of_two);
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
            case DType::kFloat32: return cast_row<float>(from, to, scales, staging.hidden, staging.power_of_two);
            case DType::kBFloat16:
                return cast_row<__nv_bfloat16>(from, to, scales, staging.hidden, staging.power_of_two);
            default: return cast_row<__half>(from, to, scales, staging.hidden, staging.power_of_two);
        }
    }
    if (staging.rows != nullptr) copy_row(staging.rows + row * staging.row_bytes, to, staging.row_bytes);
    if (staging.scales == nullptr) return;
    const float* from = staging.scales + row * (staging.scale_bytes / 4);
    for (int64_t i = threadIdx.x % 32; i < staging.scale_bytes / 4; i += 32) scales[i] = from[i];
}

// Rows of the pieces that a block stages are handed out to its warps one by one, and the warp that ends a piece tells
// of it, so that warps do not wait for each other: but for one that is so far ahead that its piece's place is still in
// use.
inline constexpr int kStagedPieces = 4;

struct StagedRows {
    int next;                   // row to hand out, counted over the block's pieces
    int rows[kStagedPieces];    // done of the piece that has this place
    int pieces[kStagedPieces];  // that had it before
};

// Whole block, before the first __syncthreads().
__device__ inline void init_staged_rows(StagedRows* shared) {
    if (threadIdx.x == 0) *shared = StagedRows{};
}

// Whole warp, one row of the block's `turn`-th piece done: whether that was the last.
__device__ inline bool finish_staged_row(StagedRows* shared, int turn) {
    const int place = turn % kStagedPieces;
    bool last = false;
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
        __threadfence_block();
        last = atomicAdd(&shared->rows[place], 1) == kReadyRows - 1;
        __threadfence_block();
        if (last) {
            shared->rows[place] = 0;
            __threadfence_block();
            atomicAdd(&shared->pieces[place], 1);
        }
    }
    const bool all_done = __shfl_sync(0xffffffffu, last ? 1 : 0, 0) != 0;
    __syncwarp();  // what lane 0 has seen of the other warps' rows, any lane may tell of
    return all_done;
}

// Each warp of those that stage. piece_at(i) is the i-th piece to stage (-1: none), for i below num_pieces; stage(row),
// by a warp, puts a row into the area, or leaves out one that no peer reads.
template <typename PieceAt, typename Stage>
__device__ void stage_rows(const Peers& peers, const Staging& staging, uint32_t sequence, int64_t num_pieces,
                           StagedRows* shared, PieceAt piece_at, Stage stage) {
    const int lane = threadIdx.x % 32;
    for (;;) {
        const int at = __shfl_sync(0xffffffffu, lane == 0 ? atomicAdd(&shared->next, 1) : 0, 0);
        const int turn = at / kReadyRows;
        const int64_t i = blockIdx.x + int64_t{turn} * gridDim.x;
        if (i >= num_pieces) return;
        const volatile int* before = &shared->pieces[turn % kStagedPieces];
        while (*before < turn / kStagedPieces) {
        }
        const int64_t piece = piece_at(i), row = piece * kReadyRows + at % kReadyRows;
        if (piece >= 0 && row < staging.num_rows) stage(row);
        if (!finish_staged_row(shared, turn) || piece < 0) continue;
        for (int peer = lane; peer < peers.num_ranks; peer += 32) {
            store_release(peers.ready_flag(peer, peers.rank, piece), sequence);
        }
    }
}

#endif  // __CUDACC__

}  // namespace ray_deepep
