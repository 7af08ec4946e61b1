// Pull with bulk copies (sm_90 and newer): one lane per warp drives loads of rows into shared memory and stores from
// there to every place a row has here; three stages, so that two loads are under way while one is stored.
#include "cuda/bulk_copy.cuh"
#include "cuda/check.h"
#include "cuda/float8_cast.cuh"
#include "cuda/pull.cuh"

namespace ray_deepep {
namespace {

constexpr int kStages = 3;
constexpr int kMaxPiece = 14336;  // bytes of one stage: a row of 7,168 two-byte elements
constexpr int kMaxWarps = 8;      // that pull; rows of kMaxPiece leave room for five
constexpr int kStagingWarps = 16;
constexpr int kSharedBytes = 219 << 10;  // of 227 KiB; the kernel has 7 KiB of its own, and may grow

// Casts take rows through a ring for each staging warp, behind the stages of those that pull.
__host__ __device__ int64_t cast_ring_bytes(const Staging& staging) {
    if (staging.num_rows == 0 || !staging.cast) return 0;
    return staging.from == DType::kFloat32 ? CastRing<float>::kBytes : CastRing<__nv_bfloat16>::kBytes;
}

int64_t piece_bytes(const PullParams& p) { return p.row_bytes < kMaxPiece ? p.row_bytes : kMaxPiece; }

// Scales travel behind their row where their size allows a bulk copy, else by plain loads.
__host__ __device__ int64_t bulk_scale_bytes(const PullParams& p) {
    return p.out_scales != nullptr && p.scale_bytes % 16 == 0 ? p.scale_bytes : 0;
}

__host__ __device__ int64_t stage_bytes(const PullParams& p, int64_t piece) {
    return (piece + bulk_scale_bytes(p) + 127) / 128 * 128;
}

}  // namespace

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

namespace {

constexpr int kMaxTopk = 32;

// What one stage of a warp holds.
struct Held {
    int row;
    int offset;
    int bytes;
    const std::byte* scales;
    int slots[kMaxTopk];
};

struct WarpShared {
    uint64_t barriers[kStages];
    Held held[kStages];
};

// A warp's walk over its pieces of rows: a batch of 32 is looked up at once, a lane per piece.
struct Walk {
    const PullParams& p;
    const Sources& sources;
    PullOrder order;
    uint32_t sequence;
    std::byte* stages;
    WarpShared* shared;
    int piece, pieces, stage_size;
    int next, step, end;                   // items of the batches to come
    int next_row = -1, next_token = 0;     // of the batch to come, looked up early
    int row = -1, source = 0, offset = 0;  // this lane's item
    int token = 0;
    unsigned left = 0, ready = 0;  // items of the batch still to load; those known to be there
    int next_slot = -1;
    bool any_staged = false;
    bool failed = false;

    __device__ Walk(const PullParams& p, const Sources& sources, uint32_t sequence, std::byte* stages,
                    WarpShared* shared, int warp)
        : p(p), sources(sources), order(p, sources), sequence(sequence), stages(stages), shared(shared) {
        piece = static_cast<int>(min(p.row_bytes, int64_t{kMaxPiece}));
        pieces = static_cast<int>((p.row_bytes + piece - 1) / piece);
        stage_size = static_cast<int>(stage_bytes(p, piece));
        next = warp;
        step = gridDim.x * p.num_warps;
        end = order.size() * pieces;
        for (int rank = threadIdx.x % 32; rank < p.peers.num_ranks; rank += 32) any_staged |= sources.staged[rank];
        any_staged = __any_sync(0xffffffffu, any_staged);
        look_up();
    }

    __device__ bool look_ready() const {
        return row < 0 || !sources.staged[source] || rows_ready(p.peers, source, token, sequence);
    }

    __device__ void prefetch_slots() {
        const int of = __shfl_sync(0xffffffffu, row, __ffs(left) - 1), lane = threadIdx.x % 32;
        if (p.plan.layout != LayoutKind::kTokenMajor && lane < p.plan.num_topk) {
            next_slot = p.plan.recv_slot[int64_t{of} * p.plan.num_topk + lane];
        }
    }

    __device__ void look_up() {
        const int item = next + threadIdx.x % 32 * step;
        next_row = item < end ? order.row_of(item / pieces) : -1;
        next_token = next_row >= 0 ? p.plan.recv_token[next_row] : 0;
    }

    __device__ bool next_batch() {
        while (left == 0 && next < end) {
            const int item = next + threadIdx.x % 32 * step;
            row = next_row;
            token = next_token;
            source = order.rank_of(item / pieces);
            offset = item % pieces * piece;
            next += 32 * step;
            look_up();
            left = __ballot_sync(0xffffffffu, row >= 0);
            ready = __ballot_sync(0xffffffffu, look_ready());
            if (any_staged) fence_bulk_copies();
            if (left != 0) prefetch_slots();
        }
        return left != 0;
    }

    // Start the next load into `stage`; false if there is none, or the operation has failed.
    __device__ bool load(int stage) {
        if (failed || !next_batch()) return false;
        const int lane = threadIdx.x % 32, turn = __ffs(left) - 1;
        if ((ready >> turn & 1) == 0) {
            ready = __ballot_sync(0xffffffffu, look_ready());
            bool ok = true;
            if ((ready >> turn & 1) == 0 && lane == turn) {
                ok = wait_rows_ready(p.peers, p.publication, source, token, sequence);
            }
            failed = __any_sync(0xffffffffu, !ok);
            if (failed) return false;
            fence_bulk_copies();
        }
        Held& held = shared->held[stage];
        if (lane < p.plan.num_topk) held.slots[lane] = next_slot;
        __syncwarp();
        if (lane == turn) {
            const int bytes = static_cast<int>(min(int64_t{piece}, p.row_bytes - offset));
            const int with_scales = offset == 0 ? static_cast<int>(bulk_scale_bytes(p)) : 0;
            held.row = row;
            held.offset = offset;
            held.bytes = bytes;
            held.scales = sources.scales[source] + token * p.scale_bytes;
            const uint32_t barrier = shared_address(&shared->barriers[stage]);
            const uint32_t to = shared_address(stages + stage * stage_size);
            expect_bytes(barrier, bytes + with_scales);
            bulk_load(to, sources.rows[source] + token * p.row_bytes + offset, bytes, barrier);
            if (with_scales > 0) bulk_load(to + piece, held.scales, with_scales, barrier);
        }
        __syncwarp();
        left &= left - 1;
        if (left != 0) prefetch_slots();
        return true;
    }

    __device__ void store(int stage) const {
        const Held& held = shared->held[stage];
        const std::byte* from = stages + stage * stage_size;
        const bool token_major = p.plan.layout == LayoutKind::kTokenMajor;
        const int with_scales = held.offset == 0 ? static_cast<int>(bulk_scale_bytes(p)) : 0;
        const int places = token_major ? 1 : p.plan.num_topk;
        for (int k = 0; threadIdx.x % 32 == 0 && k < places; ++k) {
            const int64_t slot = token_major ? held.row : held.slots[k];
            if (slot < 0) continue;
            bulk_store(p.out + slot * p.row_bytes + held.offset, from, held.bytes);
            if (with_scales == 0) continue;
            bulk_store(reinterpret_cast<std::byte*>(p.out_scales) + slot * p.scale_bytes, from + piece, with_scales);
        }
        if (p.out_scales == nullptr || with_scales > 0 || held.offset > 0) return;
        for (int k = 0; k < places; ++k) {
            const int64_t slot = token_major ? held.row : held.slots[k];
            if (slot < 0) continue;
            for (int64_t i = threadIdx.x % 32; i < p.scale_bytes / 4; i += 32) {
                p.out_scales[slot * p.scale_bytes / 4 + i] = reinterpret_cast<const float*>(held.scales)[i];
            }
        }
    }
};

// One lane waits for its stores, the warp goes on together.
__device__ void pull_rows(Walk& walk) {
    const int lane = threadIdx.x % 32;
    int loaded = 0, stored = 0;
    while (loaded < kStages - 1 && walk.load(loaded)) ++loaded;
    for (; stored < loaded; ++stored) {
        const int stage = stored % kStages;
        wait_barrier(shared_address(&walk.shared->barriers[stage]), stored / kStages & 1);
        walk.store(stage);
        if (lane == 0) {
            commit_stores();
            // The stage that the next load takes held the item before this one.
            wait_stores_read_but_one();
        }
        __syncwarp();
        if (walk.load(loaded % kStages)) ++loaded;
    }
    if (lane == 0) wait_stores_done();
    __syncwarp();
}

// Zeros where no route landed, from a stage full of them.
__device__ void clear_rows(const Walk& walk, int warp) {
    const PullParams& p = walk.p;
    const int lane = threadIdx.x % 32, step = walk.step * 32;
    const int64_t candidates = num_clear_candidates(p.plan);
    if (candidates == 0) return;
    auto* zeros = reinterpret_cast<uint4*>(walk.stages);
    for (int i = lane; i < walk.stage_size / 16; i += 32) zeros[i] = make_uint4(0, 0, 0, 0);
    fence_bulk_copies();
    __syncwarp();
    for (int64_t first = warp * 32; first < candidates; first += step) {
        const int64_t slot = first + lane;
        unsigned empty = __ballot_sync(0xffffffffu, slot < candidates && p.plan.slot_row[slot] < 0);
        for (; empty != 0; empty &= empty - 1) {
            const int64_t at = first + __ffs(empty) - 1;
            for (int64_t offset = 0; lane == 0 && offset < p.row_bytes; offset += walk.piece) {
                const int64_t bytes = min(int64_t{walk.piece}, p.row_bytes - offset);
                bulk_store(p.out + at * p.row_bytes + offset, walk.stages, static_cast<uint32_t>(bytes));
            }
            for (int64_t i = lane; p.out_scales != nullptr && i < p.scale_bytes / 4; i += 32) {
                p.out_scales[at * p.scale_bytes / 4 + i] = 0.0f;
            }
        }
    }
    if (lane == 0) {
        commit_stores();
        wait_stores_done();
    }
}

// Not inlined, for the registers of those that pull.
template <typename T>
__device__ __noinline__ void stage_casts(const PullParams& p, uint32_t sequence, StagedRows* shared,
                                         const std::byte* rings, const uint64_t* barriers) {
    CastRing<T> ring(rings, barriers, threadIdx.x / 32 - p.num_warps);
    __syncwarp();
    stage_dispatch(p, sequence, shared, [&](int64_t row) {
        const StagedRow at = staged_row(p.peers, p.staging, sequence, row);
        cast_row<T>(at.from, at.to, at.scales, p.staging.hidden, p.staging.power_of_two, ring);
    });
}

__device__ void stage_warp(const PullParams& p, uint32_t sequence, StagedRows* staged, const std::byte* rings) {
    __shared__ uint64_t barriers[kStagingWarps * CastRing<__nv_bfloat16>::kDepth];
    if (!p.staging.cast) return stage_copies(p, sequence, staged);
    switch (p.staging.from) {
        case DType::kFloat32: return stage_casts<float>(p, sequence, staged, rings, barriers);
        case DType::kBFloat16: return stage_casts<__nv_bfloat16>(p, sequence, staged, rings, barriers);
        default: return stage_casts<__half>(p, sequence, staged, rings, barriers);
    }
}

__global__ void __launch_bounds__((kMaxWarps + kStagingWarps) * 32, 1)
    pull_bulk_kernel(const __grid_constant__ PullParams p) {
    extern __shared__ __align__(128) std::byte shared[];
    __shared__ Sources sources;
    __shared__ StagedRows staged;
    __shared__ WarpShared warps[kMaxWarps];
    const int local = threadIdx.x / 32, warp = blockIdx.x * p.num_warps + local;
    if (!has_room(p)) return;
    if (local < p.num_warps && threadIdx.x % 32 == 0) {
        for (uint64_t& barrier : warps[local].barriers) init_barrier(shared_address(&barrier));
        fence_barrier_init();
    }
    init_staged_rows(&staged);
    const uint32_t sequence = begin_operation(p.peers, p.publication);
    const int64_t size = kStages * stage_bytes(p, min(p.row_bytes, int64_t{kMaxPiece}));
    if (is_staging_warp(p.staging)) {
        stage_warp(p, sequence, &staged, shared + p.num_warps * size);
    } else {
        if (learn_sources(p, sequence, &sources)) {
            Walk walk(p, sources, sequence, shared + local * size, &warps[local], warp);
            pull_rows(walk);
            if (!walk.failed) clear_rows(walk, warp);
        }
    }
    end_operation(p.peers, p.publication, sequence);
}

}  // namespace

#else

namespace {
__global__ void pull_bulk_kernel(const __grid_constant__ PullParams p) {}
}  // namespace

#endif

void allow_pull_bulk() {
    check_cuda(cudaFuncSetAttribute(pull_bulk_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
               "shared memory of pull_bulk_kernel");
}

void launch_pull_bulk(const PullParams& given, cudaStream_t stream) {
    PullParams params = given;
    const int64_t of_warp = kStages * stage_bytes(params, piece_bytes(params));
    const int64_t rings = kStagingWarps * cast_ring_bytes(params.staging);
    const int64_t room = (kSharedBytes - rings) / of_warp;
    params.num_warps = static_cast<int>(room < kMaxWarps ? room : kMaxWarps);
    if (params.staging.num_rows > 0) params.staging.num_warps = kStagingWarps;
    const int bytes = static_cast<int>(params.num_warps * of_warp + rings);
    pull_bulk_kernel<<<params.num_sms, (params.num_warps + params.staging.num_warps) * 32, bytes, stream>>>(params);
    check_launch("pull_bulk_kernel");
}

}  // namespace ray_deepep
