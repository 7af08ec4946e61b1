// Staging: rows that do not live in the heap are copied there, some warps of each block doing it while the others move
// rows already. Rows may be cast to float8 on the way. Every kReadyRows rows a flag tells all peers.
#pragma once

#include "common/dtype.h"
#include "cuda/operation.cuh"
#ifdef __CUDACC__
#include "cuda/piece_ring.cuh"
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

// Whole warp, after copy_row() through a ring: what it stored is there.
__device__ inline void settle_stores() {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x % 32 == 0) wait_stores_done();
#endif
    __syncwarp();
}

// The same through a ring, by bulk copies in and out where the chip has them. started() is called when loads are under
// way.
template <typename Ring, typename Started>
__device__ void copy_row(const std::byte* from, std::byte* to, int64_t bytes, Ring& ring, Started started) {
    const int vectors = static_cast<int>(bytes / 16);
#if __CUDA_ARCH__ >= 900
    const auto store = [&](int first, int left) {
        ring.wait();
        if (threadIdx.x % 32 == 0) {
            bulk_store(to + first * int64_t{16}, ring.address(), 16u * min(left, Ring::kVectors));
            commit_stores();
            // The piece before this one, whose place is filled next.
            wait_stores_read_but_one();
        }
        __syncwarp();
    };
    walk_row(ring, from, vectors, started, store, [](int, int) {});
#else
    constexpr int kWidth = Ring::kVectors / 32;
    Vec<float> v[kWidth];
    const auto store = [&](int first, int left) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            const int i = j * 32 + threadIdx.x % 32;
            if (i < left) store_vec(to, first + i, v[j]);
        }
    };
    walk_row(ring, from, vectors, started, [&](int, int) { ring.take(v); }, store);
#endif
}

// A row's way: from the user's tensor to this rank's area.
struct StagedRow {
    const std::byte* from;
    std::byte* to;
    float* scales;
};

__device__ inline StagedRow staged_row(const Peers& peers, const Staging& staging, uint32_t sequence, int64_t row) {
    const AreaLayout& area = peers.layout.area;
    const int64_t bytes = staging.cast ? staging.hidden * element_size(staging.from) : staging.row_bytes;
    return {staging.rows + row * bytes,
            peers.in_area<std::byte>(peers.rank, sequence, area.rows_at) + row * staging.row_bytes,
            peers.in_area<float>(peers.rank, sequence, area.scales_at) + row * (staging.scale_bytes / 4)};
}

// As it is, with the scales it may have.
__device__ inline void stage_copy(const StagedRow& at, const Staging& staging, int64_t row) {
    if (staging.rows != nullptr) copy_row(at.from, at.to, staging.row_bytes);
    if (staging.scales == nullptr) return;
    const float* from = staging.scales + row * (staging.scale_bytes / 4);
    for (int64_t i = threadIdx.x % 32; i < staging.scale_bytes / 4; i += 32) at.scales[i] = from[i];
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

// Each warp of those that stage. piece_at(i) is the i-th piece to stage (-1: none), for i below num_pieces;
// stage(row, finish_last), by a warp, puts a row into the area, or leaves out one that no peer reads. `late`: its
// stores may be under way when it returns, and it calls finish_last(), which waits for those of the row before, when it
// has started.
template <bool late, typename PieceAt, typename Stage>
__device__ void stage_rows(const Peers& peers, const Staging& staging, uint32_t sequence, int64_t num_pieces,
                           StagedRows* shared, PieceAt piece_at, Stage stage) {
    const int lane = threadIdx.x % 32;
    int turn = -1;       // of the row that is not finished; -1: none
    int64_t piece = -1;  // its
    const auto finish = [&] {
        if (turn < 0) return;
        if (late) settle_stores();
        const bool last = finish_staged_row(shared, turn);
        turn = -1;
        if (!last || piece < 0) return;
        for (int peer = lane; peer < peers.num_ranks; peer += 32) {
            store_release(peers.ready_flag(peer, peers.rank, piece), sequence);
        }
    };
    for (;;) {
        const int at = __shfl_sync(0xffffffffu, lane == 0 ? atomicAdd(&shared->next, 1) : 0, 0);
        const int next_turn = at / kReadyRows;
        const int64_t i = blockIdx.x + int64_t{next_turn} * gridDim.x;
        if (i >= num_pieces) break;
        const volatile int* before = &shared->pieces[next_turn % kStagedPieces];
        const bool taken = __any_sync(0xffffffffu, *before < next_turn / kStagedPieces);
        if (taken) finish();  // others may wait for this row
        while (*before < next_turn / kStagedPieces) {
        }
        const int64_t next_piece = piece_at(i), row = next_piece * kReadyRows + at % kReadyRows;
        if (next_piece >= 0 && row < staging.num_rows) stage(row, finish);
        finish();
        turn = next_turn;
        piece = next_piece;
        if (!late) finish();
    }
    finish();
}

#endif  // __CUDACC__

}  // namespace ray_deepep
