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

// Pieces of rows on their way into shared memory, a ring of them for each warp, so that loads go on while sums are
// made. Each lane copies what it will add itself, so that lanes need not wait for each other: bulk copies would be
// fewer instructions only for longer pieces, and must not overwrite what another lane's load may still read.
inline constexpr int kRingDepth = 6;
inline constexpr int kPieceWidth = 4;  // vectors of a piece that each lane adds
inline constexpr int kPieceVectors = 32 * kPieceWidth;
inline constexpr int kPieceBytes = 16 * kPieceVectors;

inline constexpr int sum_shared_bytes(int threads) { return kRingDepth * kPieceWidth * 16 * threads; }

template <typename T>
__device__ inline Vec<T> load_shared(uint32_t address) {
    Vec<T> v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.bits.x), "=r"(v.bits.y), "=r"(v.bits.z), "=r"(v.bits.w)
                 : "r"(address)
                 : "memory");
    return v;
}

__device__ inline void copy_async(uint32_t to, const std::byte* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

struct PieceRing {
    uint32_t lane_room;  // this lane's first vector of piece 0, an address in shared memory
    uint32_t slot = 0;   // in bytes; of the next piece to take, where then the piece kRingDepth later goes

    __device__ explicit PieceRing(const uint4* of_block)
        : lane_room(static_cast<uint32_t>(__cvta_generic_to_shared(of_block)) +
                    threadIdx.x / 32 * kRingDepth * kPieceBytes + threadIdx.x % 32 * 16) {}

    // This lane's part of `vectors` vectors at `from`, its first one.
    __device__ void put(const std::byte* from, int vectors) const {
        const uint32_t to = lane_room + slot;
        if (vectors >= kPieceVectors) {
#pragma unroll
            for (int j = 0; j < kPieceWidth; ++j) copy_async(to + j * 512, from + j * 512);
            return;
        }
        for (int j = 0; j * 32 + static_cast<int>(threadIdx.x % 32) < vectors; ++j) {
            copy_async(to + j * 512, from + j * 512);
        }
    }
    // After each put(), and where one would be if there is nothing left to put.
    __device__ void advance() {
        asm volatile("cp.async.commit_group;" ::: "memory");
        slot = slot + kPieceBytes == kRingDepth * kPieceBytes ? 0 : slot + kPieceBytes;
    }
    template <typename T>
    __device__ void take(Vec<T>* into) const {
        asm volatile("cp.async.wait_group %0;" ::"n"(kRingDepth - 1) : "memory");
#pragma unroll
        for (int j = 0; j < kPieceWidth; ++j) into[j] = load_shared<T>(lane_room + slot + j * 512);
    }
};

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

// One warp: piece by piece, the sum over all rows of the list.
template <typename T, bool kGroup>
__device__ void sum_rows(const RowSum& to, const RowList& list, PieceRing& ring) {
    constexpr unsigned kAllLanes = 0xffffffffu;
    const auto own_row = reinterpret_cast<uint64_t>(list.row);
    int keep = to.routes != nullptr ? 1 : 0;
    asm volatile("" : "+r"(keep));  // or it is worked out again for every piece
    int put_first = 0, put_n = 0;
    const auto put_next = [&] {
        if (put_first < to.vectors) {
            const auto row = reinterpret_cast<const std::byte*>(__shfl_sync(kAllLanes, own_row, put_n));
            ring.put(row + (put_first + static_cast<int>(threadIdx.x % 32)) * int64_t{16}, to.vectors - put_first);
            const bool last = ++put_n == list.count;
            put_n = last ? 0 : put_n;
            put_first += last ? kPieceVectors : 0;
        }
        ring.advance();
    };
    if (list.count == 0) put_first = to.vectors;
    for (int i = 0; i < kRingDepth; ++i) put_next();
    for (int first = 0; first < to.vectors; first += kPieceVectors) {
        PieceSum<T, kGroup> sum;
#pragma unroll 1
        for (int n = 0; n < list.count; ++n) {
            Vec<T> v[kPieceWidth];
            ring.take(v);
            sum.add(to, list, n, v, __shfl_sync(kAllLanes, list.weight, n));
            if (keep != 0) keep_piece(to, __shfl_sync(kAllLanes, list.k, n), first, v);
            put_next();
        }
        sum.finish(to, first);
    }
}

}  // namespace ray_deepep
