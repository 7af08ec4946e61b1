// Sums of rows by one warp, in float32 and in a fixed order. All loads of a window are in flight before the first is
// added: few rows, many vectors of each; many rows, one vector.
#pragma once

#include <type_traits>

#include "cuda/vec.cuh"

namespace ray_deepep {

// Lane i holds the i-th row to add.
struct RowList {
    const std::byte* row;
    float weight;
    int k;
    int count;
};

struct RowSum {
    std::byte* out;
    const std::byte* bias;  // null: none
    std::byte* routes;      // rows as they came, at routes + k * route_stride; null: not kept
    int64_t route_stride;
    int vectors;
    bool weighted;
};

// Lane i finds the lane among the first `num_lanes` that is taken and has position i.
__device__ inline int lane_at_position(bool taken, int position, int num_lanes) {
    const int lane = threadIdx.x % 32, mine = taken ? position : -1;
    int found = lane;
    for (int other = 0; other < num_lanes; ++other) {
        if (__shfl_sync(0xffffffffu, mine, other) == lane) found = other;
    }
    return found;
}

template <typename T>
__device__ void finish_vector(const RowSum& to, int i, Accumulator<T>& sum) {
    if (i >= to.vectors) return;
    if (to.bias != nullptr) sum.add(load_vec<T>(to.bias, i));
    store_vec(to.out, i, sum.value());
}

template <typename T>
__device__ void add_vector(const RowSum& to, int i, const Vec<T>& v, float weight, int k, Accumulator<T>& sum) {
    if (to.weighted) {
        sum.add_scaled(v, weight);
    } else {
        sum.add(v);
    }
    if (to.routes != nullptr && i < to.vectors) store_vec(to.routes + k * to.route_stride, i, v);
}

// At most kRows rows. What the lanes hold is passed round at use: registers are for loads in flight.
template <typename T, int kRows, int kWidth>
__device__ void sum_few_rows(const RowSum& to, const RowList& list) {
    const unsigned all = 0xffffffffu;
#pragma unroll 1
    for (int base = threadIdx.x % 32; base < (to.vectors + 31) / 32 * 32; base += 32 * kWidth) {
        Vec<T> v[kRows][kWidth];
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
            const auto row =
                reinterpret_cast<const std::byte*>(__shfl_sync(all, reinterpret_cast<uint64_t>(list.row), n));
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                const int i = base + j * 32;
                if (n < list.count && i < to.vectors) v[n][j] = load_vec<T>(row, i);
            }
        }
        Accumulator<T> sums[kWidth];
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
            const float weight = __shfl_sync(all, list.weight, n);
            const int k = __shfl_sync(all, list.k, n);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                if (n < list.count) add_vector(to, base + j * 32, v[n][j], weight, k, sums[j]);
            }
        }
#pragma unroll
        for (int j = 0; j < kWidth; ++j) finish_vector(to, base + j * 32, sums[j]);
    }
}

template <typename T>
__device__ void sum_many_rows(const RowSum& to, const RowList& list) {
    constexpr int kGroup = 8;
    const unsigned all = 0xffffffffu;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < (to.vectors + 31) / 32 * 32; i += 32) {
        Accumulator<T> sum;
#pragma unroll 1
        for (int first = 0; first < list.count; first += kGroup) {
            Vec<T> v[kGroup];
#pragma unroll
            for (int n = 0; n < kGroup; ++n) {
                const auto row = __shfl_sync(all, reinterpret_cast<uint64_t>(list.row), (first + n) & 31);
                if (first + n < list.count && i < to.vectors) {
                    v[n] = load_vec<T>(reinterpret_cast<const std::byte*>(row), i);
                }
            }
#pragma unroll
            for (int n = 0; n < kGroup; ++n) {
                const float weight = __shfl_sync(all, list.weight, (first + n) & 31);
                const int k = __shfl_sync(all, list.k, (first + n) & 31);
                if (first + n < list.count) add_vector(to, i, v[n], weight, k, sum);
            }
        }
        finish_vector(to, i, sum);
    }
}

// One warp. kMostRows is the most that any list of the launch holds, 0: more than eight. A kernel is made for each, as
// side by side the variants would take each other's registers.
// kMaxWidth bounds the vectors of a row in flight, as registers allow.
template <typename T, int kMostRows, int kMaxWidth>
__device__ void sum_rows(const RowSum& to, const RowList& list) {
    if constexpr (kMostRows == 0) {
        sum_many_rows<T>(to, list);
    } else {
        constexpr int kWidth = 8 / kMostRows;
        sum_few_rows < T, kMostRows, kWidth<kMaxWidth ? kWidth : kMaxWidth>(to, list);
    }
}

// Call launch(std::integral_constant<int, kMostRows>) for lists of at most `rows` rows.
template <typename Launch>
void with_most_rows(int rows, Launch launch) {
    if (rows <= 2) return launch(std::integral_constant<int, 2>{});
    if (rows <= 4) return launch(std::integral_constant<int, 4>{});
    if (rows <= 8) return launch(std::integral_constant<int, 8>{});
    launch(std::integral_constant<int, 0>{});
}

}  // namespace ray_deepep
