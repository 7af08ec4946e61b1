// Sums of rows by one warp, in float32 and in a fixed order.
#pragma once

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

// Each thread copies what it will add itself, some steps ahead, so that loads go on while sums are made. A step is
// eight vectors a thread: kWidth of each of kRows rows.
inline constexpr int kSumDepth = 3;
inline constexpr int kSumVectors = 8;

inline constexpr int sum_shared_bytes(int threads) { return kSumDepth * kSumVectors * 16 * threads; }

__device__ inline void copy_async(uint4* shared, const std::byte* global) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
        "l"(global)
        : "memory");
}

// One warp. kMany: lists may be longer than kRows, and are added kRows at a time.
template <typename T, int kRows, bool kGroup, bool kMany>
struct SumPipe {
    static constexpr int kWidth = kSumVectors / kRows;
    static constexpr unsigned kAllLanes = 0xffffffffu;
    const RowSum& to;
    const RowList& list;
    uint4* room;  // of the block, [kSumDepth, kSumVectors, threads]
    int groups, steps;
    const std::byte* rows[kRows];
    float weights[kRows];

    __device__ SumPipe(const RowSum& to, const RowList& list, uint4* room) : to(to), list(list), room(room) {
        groups = kMany ? max(1, (list.count + kRows - 1) / kRows) : 1;
        steps = (to.vectors + 32 * kWidth - 1) / (32 * kWidth) * groups;
        if (!kMany) pass_round(0);
    }
    // What the lanes hold about rows [first, first + kRows).
    __device__ void pass_round(int first) {
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
            const int from = (first + n) & 31;
            rows[n] =
                reinterpret_cast<const std::byte*>(__shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(list.row), from));
            weights[n] = __shfl_sync(kAllLanes, list.weight, from);
        }
    }
    __device__ uint4* slot(int stage, int n, int j) const {
        return room + (stage * kSumVectors + n * kWidth + j) * blockDim.x + threadIdx.x;
    }
    __device__ int vector_of(int step, int j) const {
        return step / groups * 32 * kWidth + j * 32 + static_cast<int>(threadIdx.x % 32);
    }
    __device__ void fetch(int step, int stage) {
        if (step < steps) {
            const int first = kMany ? step % groups * kRows : 0;
            if (kMany) pass_round(first);
#pragma unroll
            for (int n = 0; n < kRows; ++n) {
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    const int i = vector_of(step, j);
                    if (first + n < list.count && i < to.vectors) {
                        copy_async(slot(stage, n, j), rows[n] + int64_t{i} * 16);
                    }
                }
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    __device__ void add(int step, int stage, Sum<T, kGroup>* sums) {
        const int first = kMany ? step % groups * kRows : 0;
        if (kMany) pass_round(first);
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
            const int k = to.routes != nullptr ? __shfl_sync(kAllLanes, list.k, (first + n) & 31) : 0;
            if (first + n >= list.count) continue;
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                Vec<T> v;
                v.bits = *slot(stage, n, j);
                sums[j].add(to, list, first + n, v, weights[n]);
                const int i = vector_of(step, j);
                if (to.routes != nullptr && i < to.vectors) store_vec(to.routes + k * to.route_stride, i, v);
            }
        }
    }
    __device__ void run() {
        Sum<T, kGroup> sums[kWidth];
        int stage = 0, ahead = kSumDepth - 1;
#pragma unroll
        for (int step = 0; step < kSumDepth - 1; ++step) fetch(step, step);
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            fetch(step + kSumDepth - 1, ahead);
            asm volatile("cp.async.wait_group %0;" ::"n"(kSumDepth - 1) : "memory");
            add(step, stage, sums);
            if (!kMany || step % groups == groups - 1) {
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    sums[j].finish(to, vector_of(step, j));
                    sums[j] = Sum<T, kGroup>();
                }
            }
            stage = stage + 1 == kSumDepth ? 0 : stage + 1;
            ahead = ahead + 1 == kSumDepth ? 0 : ahead + 1;
        }
    }
};

// One warp. `room` is the block's, of sum_shared_bytes().
template <typename T, bool kGroup>
__device__ void sum_rows(const RowSum& to, const RowList& list, uint4* room) {
    if (list.count <= 2) {
        SumPipe<T, 2, kGroup, false>(to, list, room).run();
    } else if (list.count <= 4) {
        SumPipe<T, 4, kGroup, false>(to, list, room).run();
    } else if (list.count <= 8) {
        SumPipe<T, 8, kGroup, false>(to, list, room).run();
    } else {
        SumPipe<T, 8, kGroup, true>(to, list, room).run();
    }
}

}  // namespace ray_deepep
