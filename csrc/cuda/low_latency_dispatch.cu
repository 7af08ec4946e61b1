// Low-latency dispatch: routing is pushed to all peers, rows are staged where peers pull them; every block of the
// receiving side finds the places of its own range of tokens from all routing, without waiting for another block.
#include <algorithm>

#include "cuda/check.h"
#include "cuda/float8_cast.cuh"
#include "cuda/low_latency.cuh"
#include "cuda/low_latency_places.cuh"

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
    // A few for each block, by its last warps, which stage rows last: both go on side by side.
    const int first = static_cast<int>((blockDim.x - 1 - threadIdx.x) * gridDim.x + blockIdx.x);
    for (int i = first; i < routes; i += gridDim.x * blockDim.x) {
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

// Whether anybody reads this token's row from the area: other ranks and, where it is asked for, this one. Whole warp.
__device__ bool is_read(const Params& p, int64_t token) {
    const int lane = threadIdx.x % 32;
    bool needed = false;
    if (lane < p.step.num_topk) {
        const int64_t route = token * p.step.num_topk + lane;
        const int64_t expert = p.wide_idx ? static_cast<const int64_t*>(p.topk_idx)[route]
                                          : static_cast<const int32_t*>(p.topk_idx)[route];
        needed = expert >= 0 && (p.stage_own || expert / p.peers.num_local_experts != p.peers.rank);
    }
    return __any_sync(kAllLanes, needed) != 0;
}

// The row is on its way while the routing is looked at.
template <typename T>
__device__ void stage_cast(const Params& p, uint32_t sequence, int64_t token, int piece) {
    const int64_t hidden = p.peers.hidden, first = int64_t{piece} * kCastElements;
    const int64_t blocks = min(hidden - first, int64_t{kCastElements}) / 128;
    CastPiece<T> data;
    data.load(p.x + (token * hidden + first) * sizeof(T), 0, blocks);
    if (!is_read(p, token)) return;
    data.store(area_rows(p.peers, p.peers.rank, sequence) + token * hidden + first,
               area_scales(p.peers, p.peers.rank, sequence) + (token * hidden + first) / 128, 0, blocks,
               p.power_of_two);
}

__device__ void stage_copy(const Params& p, uint32_t sequence, int64_t token, int piece) {
    constexpr int kWidth = kPieceVectors / 32;
    const int lane = threadIdx.x % 32, vectors = static_cast<int>(p.row_bytes / 16) - piece * kPieceVectors;
    const int64_t at = token * p.row_bytes + int64_t{piece} * kPieceVectors * 16, num_scales = p.peers.hidden / 128;
    const auto* from = reinterpret_cast<const uint4*>(p.x + at);
    auto* to = reinterpret_cast<uint4*>(area_rows(p.peers, p.peers.rank, sequence) + at);
    uint4 v[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        if (lane + j * 32 < vectors) v[j] = __ldcg(&from[lane + j * 32]);
    }
    if (!is_read(p, token)) return;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        if (lane + j * 32 < vectors) to[lane + j * 32] = v[j];
    }
    if (piece > 0 || p.x_scales == nullptr) return;
    float* scales = area_scales(p.peers, p.peers.rank, sequence) + token * num_scales;
    for (int64_t i = lane; i < num_scales; i += 32) scales[i] = p.x_scales[token * num_scales + i];
}

__device__ int num_pieces(const Params& p, bool cast) {
    const int64_t size = cast ? p.peers.hidden : p.row_bytes / 16, piece = cast ? kCastElements : kPieceVectors;
    return static_cast<int>((size + piece - 1) / piece);
}

__device__ void stage_rows(const Params& p, uint32_t sequence) {
    const int pieces = num_pieces(p, p.cast), items = p.step.num_tokens * pieces;
    for (int item = threadIdx.x / 32 * gridDim.x + blockIdx.x; item < items; item += gridDim.x * kLowLatencyWarps) {
        const int token = item / pieces, piece = item % pieces;
        if (!p.cast) {
            stage_copy(p, sequence, token, piece);
        } else if (p.from == DType::kFloat32) {
            stage_cast<float>(p, sequence, token, piece);
        } else if (p.from == DType::kBFloat16) {
            stage_cast<__nv_bfloat16>(p, sequence, token, piece);
        } else {
            stage_cast<__half>(p, sequence, token, piece);
        }
    }
}

// Scales of a row, all of them on their way before the first is stored.
struct RowScales {
    static constexpr int kWidth = 4;  // of a lane: rows of 16,384 elements; longer ones load the rest late
    float values[kWidth];
    const float* from;
    int count;

    __device__ RowScales(const float* scales, int count) : from(scales), count(count) {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) values[j] = lane + j * 32 < count ? __ldcg(&from[lane + j * 32]) : 0.0f;
    }
    __device__ void store(float* to) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            if (lane + j * 32 < count) to[lane + j * 32] = values[j];
        }
        for (int i = lane + kWidth * 32; i < count; i += 32) to[i] = __ldcg(&from[i]);
    }
};

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
    uint4 v[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        if (lane + j * 32 < vectors) v[j] = __ldcg(&from[lane + j * 32]);
    }
    const int num_scales = p.out_scales != nullptr && piece == 0 ? static_cast<int>(p.peers.hidden / 128) : 0;
    const float* all = in_place ? p.x_scales : area_scales(p.peers, source, sequence);
    const RowScales scales(all + int64_t{token} * num_scales, num_scales);
    for (; wanted != 0; wanted &= wanted - 1) {
        const int64_t to = __shfl_sync(kAllLanes, slot, __ffs(wanted) - 1);
        auto* row = reinterpret_cast<uint4*>(p.out + to * p.row_bytes + offset);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            if (lane + j * 32 < vectors) row[lane + j * 32] = v[j];
        }
        scales.store(p.out_scales + to * num_scales);
    }
}

// Tokens whose routes a block places at a time.
__device__ int tokens_at_a_time(const Params& p) { return max(1, kPlacedRoutes / p.step.num_topk); }

// The first warp's routes of the range, before they can be placed.
__device__ PlacedRoute load_first_routes(const Params& p, uint32_t sequence, const Places& places,
                                         const TokenRange& range) {
    if (threadIdx.x >= 32) return PlacedRoute{};
    const int tokens = min(tokens_at_a_time(p), range.last - range.first);
    return load_route(p, sequence, places, range.first, 0, tokens * p.step.num_topk);
}

__device__ void pull_range(const Params& p, uint32_t sequence, const Places& places, const TokenRange& range,
                           PlacedRoute route) {
    const int pieces = num_pieces(p, false), chunk = tokens_at_a_time(p);
    for (int first = range.first; first < range.last; first += chunk) {
        const int last = min(first + chunk, range.last);
        __syncthreads();
        if (threadIdx.x < 32) {
            if (first > range.first)
                route = load_route(p, sequence, places, first, 0, (last - first) * p.step.num_topk);
            place_routes(p, sequence, places, first, last, route);
        }
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

// This rank's own routing, of which combine needs a copy: the thread's first route, loaded early.
struct OwnRoute {
    int expert = -1;
    float weight = 0.0f;
    __device__ OwnRoute(const Params& p, uint32_t sequence, int route) {
        if (route >= p.step.num_tokens * p.step.num_topk) return;
        const std::byte* mail = mailbox(p.peers, p.peers.rank, p.peers.rank, sequence);
        expert = __ldcg(reinterpret_cast<const int32_t*>(mail + p.peers.layout.topk_idx_at) + route);
        weight = __ldcg(reinterpret_cast<const float*>(mail + p.peers.layout.topk_weights_at) + route);
    }
};

__device__ int first_own_route() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// What combine needs to know; `own` is of the thread's first route.
__device__ void keep_plan(const Params& p, uint32_t sequence, uint64_t absent, const Places& places, OwnRoute own) {
    const LowLatencyPeers& peers = p.peers;
    const int routes = p.step.num_tokens * p.step.num_topk, step = gridDim.x * blockDim.x;
    for (int i = first_own_route(); i < routes; i += step) {
        p.plan.send_expert[i] = own.expert;
        p.plan.send_weight[i] = own.weight;
        own = OwnRoute(p, sequence, i + step);
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

// Loads go out as soon as their addresses are known: a trip to memory costs more than all that is done with what comes.
__device__ void receive(const Params& p, const LowLatencyStart& start, int* shared) {
    const uint32_t sequence = start.sequence;
    const Places places(shared, p.peers);
    clear_places(p, places);
    const Arrivals arrivals = await_arrivals(p.peers, p.step, start, full_signature(p.step, 0));
    if (arrivals.ok) {
        EarlyRoutes early, next;
        load_early(p, sequence, 0, early);
        if (p.peers.num_ranks > 1) load_early(p, sequence, 1, next);
        const OwnRoute own(p, sequence, first_own_route());
        find_starts(p, sequence, arrivals.absent, places);
        const TokenRange range(places.starts[p.peers.num_ranks]);
        const PlacedRoute first = load_first_routes(p, sequence, places, range);
        count_routes(p, sequence, places, range, early, next);
        if (p.alignment != 0) {
            if (threadIdx.x < 32) find_offsets(p, places);
            __syncthreads();
        }
        pull_range(p, sequence, places, range, first);
        const bool chosen = blockIdx.x == gridDim.x - 1;
        if (chosen) write_counts(p, places);
        write_absent(p.peers, p.step, arrivals.absent, chosen);
        keep_plan(p, sequence, arrivals.absent, places, own);
        clear_padding(p, places);
    }
    finish_receive(p.peers, p.step, start, arrivals);
}

__global__ void __launch_bounds__(kLowLatencyThreads, 2) low_latency_dispatch_kernel(const __grid_constant__ Params p) {
    extern __shared__ int shared[];
    const LowLatencyStart start = start_low_latency(p.peers, p.step);
    if (p.step.sends) {
        if (!start.failed) {
            push_routing(p, start);
            stage_rows(p, start.sequence);
        }
        finish_send(p.peers, start, full_signature(p.step, 0));
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
