// Sums of rows by one warp, in float32 and in a fixed order.
#pragma once

#include "cuda/piece_ring.cuh"
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

inline constexpr int kPieceWidth = 4;  // vectors of a piece that each lane adds
inline constexpr int kPieceVectors = 32 * kPieceWidth;

using SumRing = PieceRing<6, kPieceWidth>;

inline constexpr int sum_shared_bytes(int threads) { return threads / 32 * SumRing::kBytes; }

// Sums of one piece of a token's rows.
template <typename T, bool kGroup>
struct PieceSum {
    Accumulator<T> all[kPieceWidth];
    Accumulator<T> group[kGroup ? kPieceWidth : 1];

    // The n-th row of the list.
    __device__ void add(const RowSum& to, const RowList& list, int n, const Vec<T>* v, float weight) {
        if (!kGroup || n < list.group_begin || n >= list.group_end) {
            return add_to(all, v, weight, to.weighted && !kGroup);
        }
        add_to(group, v, weight, to.weighted);
        if (n + 1 < list.group_end) return;
#pragma unroll
        for (int j = 0; j < kPieceWidth; ++j) all[j].add(group[j % (kGroup ? kPieceWidth : 1)].value());
    }
    __device__ static void add_to(Accumulator<T>* sums, const Vec<T>* v, float weight, bool weighted) {
        if (weighted) {
#pragma unroll
            for (int j = 0; j < kPieceWidth; ++j) sums[j].add_scaled(v[j], weight);
        } else {
#pragma unroll
            for (int j = 0; j < kPieceWidth; ++j) sums[j].add(v[j]);
        }
    }
    __device__ void finish(const RowSum& to, int first) {
#pragma unroll
        for (int j = 0; j < kPieceWidth; ++j) {
            const int i = first + j * 32 + threadIdx.x % 32;
            if (i >= to.vectors) return;
            if (to.bias != nullptr) all[j].add(load_vec<T>(to.bias, i));
            store_vec(to.out, i, all[j].value());
        }
    }
};

template <typename T>
__device__ void keep_piece(const RowSum& to, int k, int first, const Vec<T>* v) {
    std::byte* row = to.routes + k * to.route_stride;
#pragma unroll
    for (int j = 0; j < kPieceWidth; ++j) {
        const int i = first + j * 32 + threadIdx.x % 32;
        if (i < to.vectors) store_vec(row, i, v[j]);
    }
}

// One warp: piece by piece, the sum over all rows of the list. Between sums the ring is empty.
template <typename T, bool kGroup>
__device__ void sum_rows(const RowSum& to, const RowList& list, SumRing& ring) {
    constexpr unsigned kAllLanes = 0xffffffffu;
    const auto own_row = reinterpret_cast<uint64_t>(list.row);
    int keep = to.routes != nullptr ? 1 : 0;
    asm volatile("" : "+r"(keep));  // or it is worked out again for every piece
    int put_first = 0, put_n = 0;
    const auto put_next = [&](uint32_t slot) {
        if (put_first < to.vectors) {
            const auto row = reinterpret_cast<const std::byte*>(__shfl_sync(kAllLanes, own_row, put_n));
            ring.put(slot, row + put_first * int64_t{16}, to.vectors - put_first);
            const bool last = ++put_n == list.count;
            put_n = last ? 0 : put_n;
            put_first += last ? kPieceVectors : 0;
        }
        ring.commit();
    };
    if (list.count == 0) put_first = to.vectors;
    uint32_t filled = ring.slot;
    for (int i = 0; i < SumRing::kDepth - 1; ++i, filled = ring.after(filled)) put_next(filled);
    for (int first = 0; first < to.vectors; first += kPieceVectors) {
        PieceSum<T, kGroup> sum;
#pragma unroll 1
        for (int n = 0; n < list.count; ++n) {
            Vec<T> v[kPieceWidth];
            ring.take(v);
            put_next(ring.spare);
            ring.advance();
            sum.add(to, list, n, v, __shfl_sync(kAllLanes, list.weight, n));
            if (keep != 0) keep_piece(to, __shfl_sync(kAllLanes, list.k, n), first, v);
        }
        sum.finish(to, first);
    }
}

}  // namespace ray_deepep
