// Sums of rows by one warp, in float32 and in a fixed order. All loads of a window are in flight before the first is
// added: few rows, many vectors of each; many rows, one vector.
#pragma once

#include <type_traits>

#include "cuda/vec.cuh"

namespace ray_deepep {

// Lane i holds the i-th row to add. Rows [group_begin, group_end) are added up and rounded before they are added to the
// others: they are the local experts of one rank.
struct RowList {
    const std::byte* row;
    float weight;
    int k;
    int count;
    int group_begin = 0;
    int group_end = 0;
};

struct RowSum {
    std::byte* out;
    const std::byte* bias;  // null: none
    std::byte* routes;      // rows as they came, at routes + k * route_stride; null: not kept
    int64_t route_stride;
    int vectors;
    bool weighted;  // with a group: its rows only
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

// One vector's sum.
template <typename T, bool kGroup>
struct Sum {
    Accumulator<T> all;
    Accumulator<T> group;

    // The n-th row of the list.
    __device__ void add(const RowSum& to, const RowList& list, int n, const Vec<T>& v, float weight) {
        const bool in_group = kGroup && n >= list.group_begin && n < list.group_end;
        if (!in_group) {
            add_to(all, v, weight, to.weighted && !kGroup);
            return;
        }
        add_to(group, v, weight, to.weighted);
        if (n + 1 == list.group_end) all.add(group.value());
    }
    __device__ static void add_to(Accumulator<T>& sum, const Vec<T>& v, float weight, bool weighted) {
        if (weighted) {
            sum.add_scaled(v, weight);
        } else {
            sum.add(v);
        }
    }
    __device__ void finish(const RowSum& to, int i) {
        if (i >= to.vectors) return;
        if (to.bias != nullptr) all.add(load_vec<T>(to.bias, i));
        store_vec(to.out, i, all.value());
    }
};

// At most kRows rows.
template <typename T, int kRows, int kWidth, bool kGroup>
__device__ void sum_few_rows(const RowSum& to, const RowList& list) {
    const unsigned all = 0xffffffffu;
    const std::byte* rows[kRows];
    float weights[kRows];
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
        rows[n] = reinterpret_cast<const std::byte*>(__shfl_sync(all, reinterpret_cast<uint64_t>(list.row), n));
        weights[n] = __shfl_sync(all, list.weight, n);
    }
#pragma unroll 1
    for (int base = threadIdx.x % 32; base < (to.vectors + 31) / 32 * 32; base += 32 * kWidth) {
        Vec<T> v[kRows][kWidth];
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                const int i = base + j * 32;
                if (n < list.count && i < to.vectors) v[n][j] = load_vec<T>(rows[n], i);
            }
        }
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            Sum<T, kGroup> sum;
#pragma unroll
            for (int n = 0; n < kRows; ++n) {
                if (n < list.count) sum.add(to, list, n, v[n][j], weights[n]);
            }
            sum.finish(to, base + j * 32);
        }
        if (to.routes == nullptr) continue;
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
            const int k = __shfl_sync(all, list.k, n);
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                const int i = base + j * 32;
                if (n < list.count && i < to.vectors) store_vec(to.routes + k * to.route_stride, i, v[n][j]);
            }
        }
    }
}

template <typename T, bool kGroup>
__device__ void sum_many_rows(const RowSum& to, const RowList& list) {
    constexpr int kInFlight = 8;
    const unsigned all = 0xffffffffu;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < (to.vectors + 31) / 32 * 32; i += 32) {
        Sum<T, kGroup> sum;
#pragma unroll 1
        for (int first = 0; first < list.count; first += kInFlight) {
            Vec<T> v[kInFlight];
#pragma unroll
            for (int n = 0; n < kInFlight; ++n) {
                const auto row = __shfl_sync(all, reinterpret_cast<uint64_t>(list.row), (first + n) & 31);
                if (first + n < list.count && i < to.vectors) {
                    v[n] = load_vec<T>(reinterpret_cast<const std::byte*>(row), i);
                }
            }
#pragma unroll
            for (int n = 0; n < kInFlight; ++n) {
                const float weight = __shfl_sync(all, list.weight, (first + n) & 31);
                const int k = __shfl_sync(all, list.k, (first + n) & 31);
                if (first + n >= list.count) continue;
                sum.add(to, list, first + n, v[n], weight);
                if (to.routes != nullptr && i < to.vectors) store_vec(to.routes + k * to.route_stride, i, v[n]);
            }
        }
        sum.finish(to, i);
    }
}

// One warp. kMostRows is the most that any list of the launch holds, 0: more than eight. A kernel is made for each, as
// side by side the variants would take each other's registers.
template <typename T, int kMostRows, bool kGroup>
__device__ void sum_rows(const RowSum& to, const RowList& list) {
    if constexpr (kMostRows == 0) {
        sum_many_rows<T, kGroup>(to, list);
    } else {
        sum_few_rows<T, kMostRows, kMostRows <= 2 ? 4 : 8 / kMostRows, kGroup>(to, list);
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
