// Low-latency dispatch: routing is pushed to all peers, rows are staged where peers pull them; every block of the
// receiving side finds the places of its own range of tokens from all routing, without waiting for another block.
#include <algorithm>

#include "cuda/check.h"
#include "cuda/low_latency.cuh"
#include "cuda/low_latency_places.cuh"
#include "cuda/staging.cuh"

namespace ray_deepep {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kPieceVectors = 64;   // 16-byte vectors that a warp moves at a time: two a lane
constexpr int kCastElements = 512;  // that a warp casts at a time

using Params = LowLatencyDispatchParams;

// Expert of a route as it was given; -1 where it is out of range, or named before in its token.
__device__ int given_expert(const Params& p, int64_t route) {
    const int num_topk = p.step.num_topk, k = static_cast<int>(route % num_topk);
    const auto at = [&](int64_t i) -> int64_t {
        return p.wide_idx ? static_cast<const int64_t*>(p.topk_idx)[i] : static_cast<const int32_t*>(p.topk_idx)[i];
    };
    const int64_t expert = at(route);
    if (expert == -1) return -1;
    if (expert < 0 || expert >= p.peers.num_experts) {
        // Never 0, which says that there is none.
        const int32_t shown = static_cast<int32_t>(max(int64_t{-0x7ffffffe}, min(int64_t{0x7ffffffe}, expert)));
        p.peers.host->bad_expert = shown + 1;
        return -1;
    }
    for (int i = 1; i <= k; ++i) {
        if (at(route - i) != expert) continue;
        p.peers.host->repeated_expert = static_cast<int32_t>(expert) + 1;
        return -1;
    }
    return static_cast<int>(expert);
}

__device__ void push_routing(const Params& p, const LowLatencyStart& start) {
    const LowLatencyPeers& peers = p.peers;
    if (blockIdx.x == 0) write_headers(peers, p.step, start, 0);
    const int routes = p.step.num_tokens * p.step.num_topk;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < routes; i += gridDim.x * blockDim.x) {
        const int expert = given_expert(p, i);
        const float weight = p.topk_weights == nullptr ? 1.0f : p.topk_weights[i];
        for (int turn = 1; turn <= peers.num_ranks; ++turn) {
            const int peer = (peers.rank + turn) % peers.num_ranks;
            if ((start.masked & bit_of(peer)) != 0) continue;
            std::byte* mail = mailbox(peers, peer, peers.rank, start.sequence);
            reinterpret_cast<int32_t*>(mail + peers.layout.topk_idx_at)[i] = expert;
            reinterpret_cast<float*>(mail + peers.layout.topk_weights_at)[i] = weight;
        }
    }
}

__device__ void copy_vectors(const uint4* from, uint4* to, int vectors) {
    constexpr int kWidth = kPieceVectors / 32;
    uint4 v[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        const int i = threadIdx.x % 32 + j * 32;
        if (i < vectors) v[j] = __ldcg(&from[i]);
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        const int i = threadIdx.x % 32 + j * 32;
        if (i < vectors) to[i] = v[j];
    }
}

__device__ void stage_cast(const Params& p, uint32_t sequence, int64_t token, int piece) {
    const int64_t hidden = p.peers.hidden, first = int64_t{piece} * kCastElements;
    const int64_t count = min(hidden - first, int64_t{kCastElements});
    const std::byte* from = p.x + (token * hidden + first) * element_size(p.from);
    std::byte* to = area_rows(p.peers, p.peers.rank, sequence) + token * hidden + first;
    float* scales = area_scales(p.peers, p.peers.rank, sequence) + (token * hidden + first) / 128;
    switch (p.from) {
        case DType::kFloat32: return cast_row<float, 2>(from, to, scales, count, p.power_of_two);
        case DType::kBFloat16: return cast_row<__nv_bfloat16, 2>(from, to, scales, count, p.power_of_two);
        default: return cast_row<__half, 2>(from, to, scales, count, p.power_of_two);
    }
}

__device__ void stage_copy(const Params& p, uint32_t sequence, int64_t token, int piece) {
    const int vectors = static_cast<int>(p.row_bytes / 16) - piece * kPieceVectors;
    const int64_t at = token * p.row_bytes + int64_t{piece} * kPieceVectors * 16;
    copy_vectors(reinterpret_cast<const uint4*>(p.x + at),
                 reinterpret_cast<uint4*>(area_rows(p.peers, p.peers.rank, sequence) + at), vectors);
    if (piece > 0 || p.x_scales == nullptr) return;
    const int64_t num_scales = p.peers.hidden / 128;
    float* scales = area_scales(p.peers, p.peers.rank, sequence) + token * num_scales;
    for (int64_t i = threadIdx.x % 32; i < num_scales; i += 32) scales[i] = p.x_scales[token * num_scales + i];
}

__device__ int num_pieces(const Params& p, bool cast) {
    const int64_t size = cast ? p.peers.hidden : p.row_bytes / 16, piece = cast ? kCastElements : kPieceVectors;
    return static_cast<int>((size + piece - 1) / piece);
}

// Rows that are read from the area: other ranks' and, where it is asked for, this rank's.
__device__ void stage_rows(const Params& p, uint32_t sequence) {
    const int pieces = num_pieces(p, p.cast), items = p.step.num_tokens * pieces, lane = threadIdx.x % 32;
    for (int item = threadIdx.x / 32 * gridDim.x + blockIdx.x; item < items; item += gridDim.x * kLowLatencyWarps) {
        const int token = item / pieces;
        bool needed = false;
        if (lane < p.step.num_topk) {
            const int64_t route = int64_t{token} * p.step.num_topk + lane;
            const int64_t expert = p.wide_idx ? static_cast<const int64_t*>(p.topk_idx)[route]
                                              : static_cast<const int32_t*>(p.topk_idx)[route];
            needed = expert >= 0 && (p.stage_own || expert / p.peers.num_local_experts != p.peers.rank);
        }
        if (__any_sync(kAllLanes, needed) == 0) continue;
        p.cast ? stage_cast(p, sequence, token, item % pieces) : stage_copy(p, sequence, token, item % pieces);
    }
}

// One warp: a piece of one token's row, read once, to all its places here.
__device__ void pull_piece(const Params& p, uint32_t sequence, int source, int token, int piece, const int* slots) {
    constexpr int kWidth = kPieceVectors / 32;
    const int lane = threadIdx.x % 32;
    const int slot = lane < p.step.num_topk ? slots[lane] : -1;
    unsigned wanted = __ballot_sync(kAllLanes, slot >= 0);
    if (wanted == 0) return;
    const bool in_place = source == p.peers.rank && !p.stage_own;
    const std::byte* rows = in_place ? p.x : area_rows(p.peers, source, sequence);
    const int vectors = static_cast<int>(p.row_bytes / 16) - piece * kPieceVectors;
    const int64_t offset = int64_t{piece} * kPieceVectors * 16;
    const auto* from = reinterpret_cast<const uint4*>(rows + token * p.row_bytes + offset);
    const int num_scales = p.out_scales != nullptr && piece == 0 ? static_cast<int>(p.peers.hidden / 128) : 0;
    const float* scales = num_scales == 0 ? nullptr : (in_place ? p.x_scales : area_scales(p.peers, source, sequence));
    uint4 v[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        if (lane + j * 32 < vectors) v[j] = __ldcg(&from[lane + j * 32]);
    }
    const float scale = lane < num_scales ? __ldcg(&scales[int64_t{token} * num_scales + lane]) : 0.0f;
    for (; wanted != 0; wanted &= wanted - 1) {
        const int64_t to = __shfl_sync(kAllLanes, slot, __ffs(wanted) - 1);
        auto* row = reinterpret_cast<uint4*>(p.out + to * p.row_bytes + offset);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            if (lane + j * 32 < vectors) row[lane + j * 32] = v[j];
        }
        float* out_scales = p.out_scales + to * num_scales;
        if (lane < num_scales) out_scales[lane] = scale;
        for (int i = lane + 32; i < num_scales; i += 32) {
            out_scales[i] = __ldcg(&scales[int64_t{token} * num_scales + i]);
        }
    }
}

__device__ void pull_range(const Params& p, uint32_t sequence, const Places& places, const TokenRange& range) {
    const int pieces = num_pieces(p, false), chunk = max(1, kPlacedRoutes / p.step.num_topk);
    for (int first = range.first; first < range.last; first += chunk) {
        const int last = min(first + chunk, range.last);
        __syncthreads();
        if (threadIdx.x < 32) place_routes(p, sequence, places, first, last);
        __syncthreads();
        const int items = (last - first) * pieces;
        for (int item = threadIdx.x / 32; item < items; item += kLowLatencyWarps) {
            const int i = item / pieces, source = source_of(p.peers, places, first + i);
            const int token = first + i - places.starts[source];
            pull_piece(p, sequence, source, token, item % pieces, places.slots + i * p.step.num_topk);
        }
    }
}

// Zeros behind each aligned group.
__device__ void clear_padding(const Params& p, const Places& places) {
    for (int local = blockIdx.x; p.alignment > 1 && local < p.peers.num_local_experts; local += gridDim.x) {
        const int64_t begin = min(int64_t{places.offsets[local] + routes_to(p.peers, places, local)}, p.num_rows);
        const int64_t end = min(int64_t{places.offsets[local + 1]}, p.num_rows);
        auto* rows = reinterpret_cast<uint4*>(p.out + begin * p.row_bytes);
        for (int64_t i = threadIdx.x; i < (end - begin) * p.row_bytes / 16; i += blockDim.x) {
            rows[i] = make_uint4(0, 0, 0, 0);
        }
        const int64_t num_scales = p.out_scales == nullptr ? 0 : p.peers.hidden / 128;
        for (int64_t i = threadIdx.x; i < (end - begin) * num_scales; i += blockDim.x) {
            p.out_scales[begin * num_scales + i] = 0.0f;
        }
    }
}

// What combine needs of this rank's own routing.
__device__ void keep_plan(const Params& p, uint32_t sequence, uint64_t absent, const Places& places) {
    const LowLatencyPeers& peers = p.peers;
    const std::byte* mail = mailbox(peers, peers.rank, peers.rank, sequence);
    const int routes = p.step.num_tokens * p.step.num_topk;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < routes; i += gridDim.x * blockDim.x) {
        p.plan.send_expert[i] = __ldcg(reinterpret_cast<const int32_t*>(mail + peers.layout.topk_idx_at) + i);
        p.plan.send_weight[i] = __ldcg(reinterpret_cast<const float*>(mail + peers.layout.topk_weights_at) + i);
    }
    const int room = static_cast<int>(peers.max_tokens) * p.step.num_topk;
    for (int rank = blockIdx.x; rank < peers.num_ranks; rank += gridDim.x) {
        const int came = (places.starts[rank + 1] - places.starts[rank]) * p.step.num_topk;
        for (int i = came + threadIdx.x; i < room; i += blockDim.x) p.plan.slot[rank * room + i] = -1;
    }
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    p.plan.sequence[0] = sequence;
    p.plan.sequence[1] = static_cast<uint32_t>(absent);
    p.plan.sequence[2] = static_cast<uint32_t>(absent >> 32);
}

__device__ void receive(const Params& p, const LowLatencyStart& start, int* shared) {
    const uint32_t sequence = start.sequence;
    const Places places(shared, p.peers);
    clear_places(p, places);
    const Arrivals arrivals = await_arrivals(p.peers, p.step, start, full_signature(p.step, 0));
    if (arrivals.ok) {
        EarlyRoutes early;
        load_early(p, sequence, 0, early);
        find_starts(p, sequence, arrivals.absent, places);
        const TokenRange range(places.starts[p.peers.num_ranks]);
        count_routes(p, sequence, places, range, early);
        if (p.alignment != 0) {
            if (threadIdx.x < 32) find_offsets(p, places);
            __syncthreads();
        }
        pull_range(p, sequence, places, range);
        const bool chosen = blockIdx.x == gridDim.x - 1;
        if (chosen) write_counts(p, places);
        write_absent(p.peers, p.step, arrivals.absent, chosen);
        keep_plan(p, sequence, arrivals.absent, places);
        clear_padding(p, places);
    }
    finish_receive(p.peers, p.step, sequence, arrivals);
}

__global__ void __launch_bounds__(kLowLatencyThreads) low_latency_dispatch_kernel(const __grid_constant__ Params p) {
    extern __shared__ int shared[];
    const LowLatencyStart start = start_low_latency(p.peers, p.step);
    if (p.step.sends) {
        if (!start.failed) {
            push_routing(p, start);
            stage_rows(p, start.sequence);
        }
        finish_send(p.peers, start);
    }
    if (p.step.receives) receive(p, start, shared);
}

}  // namespace

void launch_low_latency_dispatch(const LowLatencyDispatchParams& params, cudaStream_t stream) {
    const size_t bytes = params.step.receives ? places_ints(params.peers, params.step.num_topk) * sizeof(int) : 0;
    low_latency_dispatch_kernel<<<params.step.num_sms, kLowLatencyThreads, bytes, stream>>>(params);
    check_launch("low_latency_dispatch_kernel");
}

}  // namespace ray_deepep
