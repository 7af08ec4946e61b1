// Casts to float8 e4m3 with one scale per 128 elements, by whole warps, with the bits of a division by the scale.
#pragma once

#include <cuda_fp8.h>

#include "cuda/piece_ring.cuh"

namespace ray_deepep {

inline constexpr float kFloat8Max = 448.0f;
inline constexpr float kSmallestAmax = 1e-4f;

// Quotients of one scale, rounded as a division rounds them: the remainder of the first try corrects it. One reciprocal
// serves all of a lane. A zero keeps its sign. (Compared with divisions for all mantissas of the scale, near every
// bound of float8.)
struct Divisor {
    float reciprocal;
    float scale;  // 0 where it is infinite: nothing to correct then, and no NaN from it

    __device__ static Divisor of(float scale) { return {__frcp_rn(scale), isinf(scale) ? 0.0f : scale}; }
    __device__ float divide(float value) const {
        const float quotient = __fmul_rn(value, reciprocal);
        return __fmaf_rn(__fmaf_rn(quotient, scale, -value), -reciprocal, quotient);
    }
};

__device__ inline float float8_scale(float amax, bool power_of_two) {
    constexpr Divisor kByMax{1.0f / kFloat8Max, kFloat8Max};
    const float scale = isinf(amax) ? amax : kByMax.divide(fmaxf(amax, kSmallestAmax));
    if (!power_of_two) return scale;
    const uint32_t bits = __float_as_uint(scale);
    return __uint_as_float((bits & 0x7fffffu) != 0 ? (bits & 0x7f800000u) + 0x800000u : bits);
}

// Largest magnitude so far, of 16-bit types two at a time; NaN counts for nothing.
__device__ inline float largest(const Vec<float>& v, float so_far) {
#pragma unroll
    for (int j = 0; j < Vec<float>::kCount; ++j) so_far = fmaxf(so_far, fabsf(v.items[j]));
    return so_far;
}
__device__ inline __nv_bfloat162 largest(const Vec<__nv_bfloat16>& v, __nv_bfloat162 so_far) {
#pragma unroll
    for (int j = 0; j < 4; ++j) so_far = __hmax2(so_far, __habs2({v.items[2 * j], v.items[2 * j + 1]}));
    return so_far;
}
__device__ inline __half2 largest(const Vec<__half>& v, __half2 so_far) {
#pragma unroll
    for (int j = 0; j < 4; ++j) so_far = __hmax2(so_far, __habs2({v.items[2 * j], v.items[2 * j + 1]}));
    return so_far;
}
__device__ inline float as_pair(float v) { return v; }
__device__ inline __nv_bfloat162 as_pair(__nv_bfloat16 v) { return {v, v}; }
__device__ inline __half2 as_pair(__half v) { return {v, v}; }
__device__ inline float widest(float v) { return v; }
__device__ inline float widest(__nv_bfloat162 v) { return fmaxf(__low2float(v), __high2float(v)); }
__device__ inline float widest(__half2 v) { return fmaxf(__low2float(v), __high2float(v)); }

// Elements of this lane in four blocks of 128: two groups of eight, sixteen groups a block, so that what a warp loads
// at a time are pieces of 128 bytes.
template <typename T>
struct CastPiece {
    static constexpr int kBlocks = 4;
    static constexpr int kVectors = 8 * sizeof(T) / 16;
    Vec<T> vectors[2][kVectors];

    using Ring = PieceRing<sizeof(T) == 4 ? 3 : 5, kBlocks * 8 * sizeof(T) / 32>;

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
    // From a piece in shared memory.
    __device__ void load(uint32_t piece) {
        const int64_t block = threadIdx.x % 32 / 8;
#pragma unroll
        for (int group = 0; group < 2; ++group) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                const auto at = static_cast<uint32_t>(element(block, group) * sizeof(T)) + v * 16;
                vectors[group][v] = load_shared<T>(piece + at);
            }
        }
    }
    __device__ void store(std::byte* to, float* scales, int64_t first, int64_t num_blocks, bool power_of_two) const {
        auto amax_here = largest(vectors[0][0], as_pair(narrow<T>(0.0f)));
#pragma unroll
        for (int i = 1; i < 2 * kVectors; ++i) amax_here = largest(vectors[i / kVectors][i % kVectors], amax_here);
        float amax = widest(amax_here);
#pragma unroll
        for (int step = 1; step < 8; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, step));
        const int64_t block = first + threadIdx.x % 32 / 8;
        if (block >= num_blocks) return;
        const float scale = float8_scale(amax, power_of_two);
        const Divisor by = Divisor::of(scale);
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            float values[8];
            union {
                uint2 bits;
                __nv_fp8x2_storage_t pairs[4];
            } packed;
#pragma unroll
            for (int v = 0; v < kVectors; ++v) widen_all(vectors[group][v], values + v * Vec<T>::kCount);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float2 pair{by.divide(values[2 * j]), by.divide(values[2 * j + 1])};
                packed.pairs[j] = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
            }
            *reinterpret_cast<uint2*>(to + element(block, group)) = packed.bits;
        }
        if (threadIdx.x % 8 == 0) scales[block] = scale;
    }
};

template <typename T>
using CastRing = typename CastPiece<T>::Ring;

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

// The same through a ring, which has more under way.
template <typename T>
__device__ void cast_row(const std::byte* from, std::byte* to, float* scales, int64_t hidden, bool power_of_two,
                         CastRing<T>& ring) {
    constexpr int kBlockVectors = 8 * sizeof(T);
    CastPiece<T> piece;
    const auto take = [&](int, int) {
        ring.wait();
        piece.load(ring.address());
        __syncwarp();
    };
    walk_row(
        ring, from, static_cast<int>(hidden * sizeof(T) / 16), [] {}, take,
        [&](int first, int) { piece.store(to, scales, first / kBlockVectors, hidden / 128, power_of_two); });
}

}  // namespace ray_deepep
