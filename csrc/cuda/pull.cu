// Pull: each row is read once from its source and written to every place it has here. Two kernels: bulk copies through
// shared memory (sm_90 and newer), and plain vectors (older chips, and rows that are scaled on the way).
#include "common/fault.h"
#include "cuda/bulk_copy.cuh"
#include "cuda/check.h"
#include "cuda/params.h"
#include "cuda/sources.cuh"
#include "cuda/vec.cuh"

namespace ray_deepep {
namespace {

constexpr int kVectorThreads = 512;
constexpr int kBulkWarps = 5;  // five warps of three stages fill a multiprocessor's shared memory
constexpr int kStages = 3;
constexpr int kMaxPiece = 14336;  // bytes of one stage: a row of 7,168 two-byte elements

// What both kernels do first; false if the operation cannot go on.
__device__ bool begin(const PullParams& p, Sources* sources, int* num_rows) {
    const uint32_t sequence = load_volatile(&p.peers.control->sequence);
    if (p.wait) {
        if (!wait_for_peers(p.peers, sequence, p.signature, static_cast<uint32_t>(Operation::kDispatch))) return false;
    } else if (load_volatile(&p.peers.control->failed) != 0) {
        return false;
    }
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async;" ::: "memory");
#endif
    find_sources(p.peers, sequence, p.own_rows, p.own_scales, sources);
    *num_rows = static_cast<int>(min(int64_t{p.plan.counts[0]}, p.plan.max_recv_tokens));
    return true;
}

// Scales of fp8 rows, and zeros where no route landed.
__device__ void pull_rest(const PullParams& p, const Sources& sources, int num_rows, int warp, int num_warps) {
    const int lane = threadIdx.x % 32, num_topk = p.plan.num_topk;
    const bool token_major = p.plan.layout == LayoutKind::kTokenMajor;
    const int64_t floats = p.scale_bytes / 4;
    for (int row = warp; p.out_scales != nullptr && row < num_rows; row += num_warps) {
        const auto* from =
            reinterpret_cast<const float*>(sources.scales[p.plan.recv_source[row]]) + p.plan.recv_token[row] * floats;
        for (int64_t i = lane; i < floats; i += 32) {
            const float scale = from[i];
            if (token_major) p.out_scales[row * floats + i] = scale;
            for (int k = 0; !token_major && k < num_topk; ++k) {
                const int slot = p.plan.recv_slot[int64_t{row} * num_topk + k];
                if (slot >= 0) p.out_scales[slot * floats + i] = scale;
            }
        }
    }
    if (token_major) return;
    const int slots = static_cast<int>(min(int64_t{p.plan.counts[1]}, p.plan.max_rows));
    for (int slot = warp; slot < slots; slot += num_warps) {
        if (p.plan.slot_row[slot] >= 0) continue;
        auto* out = reinterpret_cast<uint4*>(p.out + slot * p.row_bytes);
        for (int64_t i = lane; i < p.row_bytes / 16; i += 32) out[i] = make_uint4(0, 0, 0, 0);
        for (int64_t i = lane; p.out_scales != nullptr && i < floats; i += 32) p.out_scales[slot * floats + i] = 0.0f;
    }
}

template <typename T>
__device__ void pull_row(const PullParams& p, const std::byte* from, int row) {
    const int lane = threadIdx.x % 32, num_topk = p.plan.num_topk;
    const bool token_major = p.plan.layout == LayoutKind::kTokenMajor;
    const int64_t first_route = int64_t{row} * num_topk;
    for (int64_t i = lane; i < p.row_bytes / 16; i += 32) {
        const Vec<T> v = load_vec<T>(from, i);
        if (token_major) {
            store_vec(p.out + row * p.row_bytes, i, v);
            continue;
        }
        for (int k = 0; k < num_topk; ++k) {
            const int slot = p.plan.recv_slot[first_route + k];
            if (slot < 0) continue;
            Vec<T> placed = v;
            if (p.scale_by_weights) {
                const float weight = p.plan.recv_weight[first_route + k];
#pragma unroll
                for (int j = 0; j < Vec<T>::kCount; ++j) {
                    placed.items[j] = narrow<T>(__fmul_rn(weight, widen(v.items[j])));
                }
            }
            store_vec(p.out + slot * p.row_bytes, i, placed);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kVectorThreads) pull_vector_kernel(const __grid_constant__ PullParams p) {
    __shared__ Sources sources;
    int num_rows = 0;
    if (!begin(p, &sources, &num_rows)) return;
    const int warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, num_warps = gridDim.x * blockDim.x / 32;
    for (int row = warp; row < num_rows; row += num_warps) {
        pull_row<T>(p, sources.rows[p.plan.recv_source[row]] + p.plan.recv_token[row] * p.row_bytes, row);
    }
    pull_rest(p, sources, num_rows, warp, num_warps);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

constexpr int kMaxTopk = 32;

// One warp's pipeline: loads run two items ahead of the stores.
struct BulkPipe {
    std::byte* stages;   // [kStages, piece]
    uint64_t* barriers;  // [kStages]
    int32_t* slots;      // [kStages, kMaxTopk] places of the row in each stage
    int piece;           // bytes of a full piece
    int pieces;          // of a row
};

__device__ void load_piece(const PullParams& p, const Sources& sources, const BulkPipe& pipe, int item, int stage) {
    const int lane = threadIdx.x % 32, row = item / pipe.pieces, offset = item % pipe.pieces * pipe.piece;
    if (p.plan.layout != LayoutKind::kTokenMajor && lane < p.plan.num_topk) {
        pipe.slots[stage * kMaxTopk + lane] = p.plan.recv_slot[int64_t{row} * p.plan.num_topk + lane];
    }
    if (lane != 0) return;
    const std::byte* from = sources.rows[p.plan.recv_source[row]] + p.plan.recv_token[row] * p.row_bytes + offset;
    const uint32_t bytes = static_cast<uint32_t>(min(int64_t{pipe.piece}, p.row_bytes - offset));
    bulk_load(pipe.stages + stage * pipe.piece, from, bytes, &pipe.barriers[stage]);
}

__device__ void store_piece(const PullParams& p, const BulkPipe& pipe, int item, int stage) {
    const int row = item / pipe.pieces, offset = item % pipe.pieces * pipe.piece;
    const uint32_t bytes = static_cast<uint32_t>(min(int64_t{pipe.piece}, p.row_bytes - offset));
    const std::byte* from = pipe.stages + stage * pipe.piece;
    if (p.plan.layout == LayoutKind::kTokenMajor) {
        bulk_store(p.out + row * p.row_bytes + offset, from, bytes);
    } else {
        for (int k = 0; k < p.plan.num_topk; ++k) {
            const int slot = pipe.slots[stage * kMaxTopk + k];
            if (slot >= 0) bulk_store(p.out + slot * p.row_bytes + offset, from, bytes);
        }
    }
    commit_stores();
}

__global__ void __launch_bounds__(kBulkWarps * 32, 1) pull_bulk_kernel(const __grid_constant__ PullParams p) {
    extern __shared__ __align__(128) std::byte shared[];
    __shared__ Sources sources;
    __shared__ uint64_t barriers[kBulkWarps][kStages];
    __shared__ int32_t slots[kBulkWarps][kStages * kMaxTopk];
    int num_rows = 0;
    if (!begin(p, &sources, &num_rows)) return;
    const int lane = threadIdx.x % 32, local = threadIdx.x / 32;
    const int warp = blockIdx.x * kBulkWarps + local, num_warps = gridDim.x * kBulkWarps;
    const int piece = static_cast<int>(min(p.row_bytes, int64_t{kMaxPiece}));
    const BulkPipe pipe{shared + local * kStages * piece, barriers[local], slots[local], piece,
                        static_cast<int>((p.row_bytes + piece - 1) / piece)};
    if (lane == 0) {
        for (int stage = 0; stage < kStages; ++stage) init_barrier(&pipe.barriers[stage]);
        fence_barrier_init();
    }
    __syncwarp();
    const int items = num_rows * pipe.pieces;
    for (int n = 0; n < kStages - 1 && warp + n * num_warps < items; ++n) {
        load_piece(p, sources, pipe, warp + n * num_warps, n);
    }
    for (int n = 0, item = warp; item < items; ++n, item += num_warps) {
        const int stage = n % kStages;
        if (lane == 0) wait_barrier(&pipe.barriers[stage], n / kStages & 1);
        __syncwarp();
        if (lane == 0) {
            store_piece(p, pipe, item, stage);
            // The stage that the next load takes held the item before this one.
            wait_stores_read_but_one();
        }
        __syncwarp();
        const int next = item + (kStages - 1) * num_warps;
        if (next < items) load_piece(p, sources, pipe, next, (n + kStages - 1) % kStages);
    }
    if (lane == 0) wait_stores_done();
    pull_rest(p, sources, num_rows, warp, num_warps);
}

#else

__global__ void pull_bulk_kernel(const __grid_constant__ PullParams p) {}

#endif

bool has_bulk_copy() {
    int device = 0, major = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    return major >= 9;
}

}  // namespace

void launch_pull(const PullParams& params, cudaStream_t stream) {
    if (!params.scale_by_weights && has_bulk_copy()) {
        const int64_t piece = params.row_bytes < kMaxPiece ? params.row_bytes : kMaxPiece;
        const int bytes = static_cast<int>(kBulkWarps * kStages * piece);
        check_cuda(cudaFuncSetAttribute(pull_bulk_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                   "shared memory of pull_bulk_kernel");
        pull_bulk_kernel<<<params.num_sms, kBulkWarps * 32, bytes, stream>>>(params);
    } else if (params.scale_by_weights) {
        with_float_type(params.dtype, [&](auto type) {
            pull_vector_kernel<decltype(type)><<<params.num_sms, kVectorThreads, 0, stream>>>(params);
        });
    } else {
        // Copies need no arithmetic: any type of the right width.
        pull_vector_kernel<float><<<params.num_sms, kVectorThreads, 0, stream>>>(params);
    }
    check_launch("pull kernel");
}

}  // namespace ray_deepep
