// Low-latency combine: each rank stages what it sends home (a token's sum over its experts, or a row per route), the
// source pulls it and adds up, in float32 and a fixed order. The sums are those of host/low_latency_combine.cpp.
#include <algorithm>

#include "cuda/check.h"
#include "cuda/low_latency.cuh"
#include "cuda/vec.cuh"

namespace ray_deepep {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWidth = 2;                   // 16-byte vectors of a lane
constexpr int kPieceVectors = 32 * kWidth;  // that a warp adds up at a time
constexpr int kBatch = 4;                   // rows whose loads are in flight together

using Params = LowLatencyCombineParams;

template <typename T>
using Piece = Vec<T>[kWidth];

// Where a piece is in its row, and how much of it there is.
struct PieceRange {
    int first, vectors;
    __device__ PieceRange(int piece, int row_vectors) : first(piece * kPieceVectors), vectors(row_vectors - first) {}
};

template <typename T>
__device__ void load_piece(const std::byte* row, const PieceRange& range, Piece<T>& v) {
    const auto* from = reinterpret_cast<const uint4*>(row) + range.first;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        const int i = threadIdx.x % 32 + j * 32;
        if (i < range.vectors) v[j].bits = __ldcg(&from[i]);
    }
}

template <typename T>
__device__ void store_piece(std::byte* row, const PieceRange& range, const Piece<T>& v) {
    auto* to = reinterpret_cast<uint4*>(row) + range.first;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
        const int i = threadIdx.x % 32 + j * 32;
        if (i < range.vectors) to[i] = v[j].bits;
    }
}

// A warp's sum of one piece, from 0 on, as the CPU core and the reference add up.
template <typename T>
struct Sum {
    float values[kWidth][Vec<T>::kCount];
    __device__ Sum() {
#pragma unroll
        for (auto& vector : values) {
#pragma unroll
            for (float& value : vector) value = 0.0f;
        }
    }
    __device__ void add(const Piece<T>& v, float weight, bool weighted) {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            float terms[Vec<T>::kCount];
            widen_all(v[j], terms);
#pragma unroll
            for (int i = 0; i < Vec<T>::kCount; ++i) {
                const float term = weighted ? __fmul_rn(weight, terms[i]) : terms[i];
                values[j][i] = __fadd_rn(values[j][i], term);
            }
        }
    }
    __device__ void store(std::byte* row, const PieceRange& range) const {
        Piece<T> v;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
#pragma unroll
            for (int i = 0; i < Vec<T>::kCount; ++i) v[j].items[i] = narrow<T>(values[j][i]);
        }
        store_piece<T>(row, range, v);
    }
};

// A warp's list of rows to add: one a lane, in lane order.
struct Rows {
    const std::byte* row = nullptr;  // null: none
    float weight = 1.0f;
};

template <typename T>
__device__ Sum<T> sum_rows(const Rows& rows, bool weighted, const PieceRange& range) {
    Sum<T> sum;
    const auto address = reinterpret_cast<uint64_t>(rows.row);
    unsigned left = __ballot_sync(kAllLanes, rows.row != nullptr);
    while (left != 0) {
        Piece<T> v[kBatch];
        float weights[kBatch];
        int count = 0;
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
            if (left == 0) break;
            const int lane = __ffs(left) - 1;
            left &= left - 1;
            weights[n] = __shfl_sync(kAllLanes, rows.weight, lane);
            load_piece<T>(reinterpret_cast<const std::byte*>(__shfl_sync(kAllLanes, address, lane)), range, v[n]);
            count = n + 1;
        }
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
            if (n < count) sum.add(v[n], weights[n], weighted);
        }
    }
    return sum;
}

// The row of a warp's first piece.
__device__ int first_row(int row_vectors) {
    const int pieces = (row_vectors + kPieceVectors - 1) / kPieceVectors;
    return (static_cast<int>(threadIdx.x / 32 * gridDim.x) + static_cast<int>(blockIdx.x)) / pieces;
}

// Calls body(i, piece) with a warp for every piece of every one of `count` rows.
template <typename Body>
__device__ void each_piece(int count, int row_vectors, Body body) {
    const int pieces = (row_vectors + kPieceVectors - 1) / kPieceVectors;
    const int items = count * pieces;
    for (int item = threadIdx.x / 32 * gridDim.x + blockIdx.x; item < items; item += gridDim.x * kLowLatencyWarps) {
        body(item / pieces, PieceRange(item % pieces, row_vectors));
    }
}

// Of a token that came: the row of this lane's route here, and its weight.
struct TokenSlot {
    int slot = -1;
    float weight = 1.0f;
    __device__ TokenSlot(const Params& p, int64_t token) {
        const int lane = threadIdx.x % 32;
        if (lane >= p.step.num_topk) return;
        slot = p.plan.slot[token * p.step.num_topk + lane];
        weight = p.plan.weight[token * p.step.num_topk + lane];
    }
};

// One piece of what goes home for a token that came, at (source, token), or (source, token, turn of the route among
// those of this rank).
template <typename T>
__device__ void stage_piece(const Params& p, std::byte* staged, int64_t token, const PieceRange& range,
                            const TokenSlot& of) {
    const int64_t row_bytes = p.peers.hidden * sizeof(T);
    unsigned here = __ballot_sync(kAllLanes, of.slot != -1);
    if (here == 0) return;
    if (!p.exact) {
        Rows rows;
        rows.row = of.slot >= 0 ? p.rows + of.slot * row_bytes : nullptr;
        rows.weight = of.weight;
        sum_rows<T>(rows, true, range).store(staged + token * row_bytes, range);
        return;
    }
    for (int turn = 0; here != 0; ++turn, here &= here - 1) {
        const int from = __shfl_sync(kAllLanes, of.slot, __ffs(here) - 1);
        Piece<T> v;
#pragma unroll
        for (auto& vector : v) vector.bits = make_uint4(0, 0, 0, 0);
        if (from >= 0) load_piece<T>(p.rows + from * row_bytes, range, v);
        store_piece<T>(staged + (token * p.max_routes_here + turn) * row_bytes, range, v);
    }
}

// token_of(i): the i-th of `count` tokens to stage. Those that did not come have no routes.
template <typename T, typename TokenOf>
__device__ void stage_tokens(const Params& p, uint32_t sequence, int count, TokenOf token_of) {
    const int row_vectors = static_cast<int>(p.peers.hidden * sizeof(T) / 16);
    const int pieces = (row_vectors + kPieceVectors - 1) / kPieceVectors, items = count * pieces;
    const int step = gridDim.x * kLowLatencyWarps;
    std::byte* staged = area_rows(p.peers, p.peers.rank, sequence);
    int item = threadIdx.x / 32 * gridDim.x + blockIdx.x;
    if (item >= items) return;
    TokenSlot next(p, token_of(item / pieces));
    for (; item < items; item += step) {
        const TokenSlot of = next;
        if (item + step < items) next = TokenSlot(p, token_of((item + step) / pieces));
        stage_piece<T>(p, staged, token_of(item / pieces), PieceRange(item % pieces, row_vectors), of);
    }
}

// Where its routes' rows are, each source is told.
__device__ uint32_t* places_for(const LowLatencyPeers& peers, int reader, int source, uint32_t sequence) {
    return reinterpret_cast<uint32_t*>(mailbox(peers, reader, source, sequence) + peers.layout.topk_idx_at);
}

__device__ void push_places(const Params& p, const LowLatencyStart& start) {
    const int routes = static_cast<int>(p.peers.max_tokens) * p.step.num_topk;
    const auto row_units = static_cast<uint32_t>(p.peers.hidden * element_size(p.dtype) / 16);
    for (int i = threadIdx.x * gridDim.x + blockIdx.x; i < p.peers.num_ranks * routes; i += gridDim.x * blockDim.x) {
        const int slot = p.plan.slot[i], source = i / routes;
        if (slot == -1 || (start.masked & bit_of(source)) != 0) continue;
        places_for(p.peers, source, p.peers.rank, start.sequence)[i % routes] =
            slot < 0 ? kNoRow : p.rows_at + static_cast<uint32_t>(slot) * row_units;
    }
}

// A launch that sends and receives adds up its own tokens' rows while peers' are on their way. Each piece of them is
// read by the warp that wrote it.
__device__ bool stages_own_late(const Params& p) { return p.step.sends && p.step.receives && !p.exact; }

template <typename T>
__device__ void stage_home(const Params& p, uint32_t sequence) {
    const int max_tokens = static_cast<int>(p.peers.max_tokens), own = p.peers.rank * max_tokens;
    const int left_out = stages_own_late(p) ? max_tokens : 0;
    stage_tokens<T>(p, sequence, p.peers.num_ranks * max_tokens - left_out,
                    [&](int i) { return i < own ? i : i + left_out; });
}

template <typename T>
__device__ void stage_own(const Params& p, uint32_t sequence) {
    const int own = p.peers.rank * static_cast<int>(p.peers.max_tokens);
    stage_tokens<T>(p, sequence, p.step.num_tokens, [&](int i) { return own + i; });
}

// A token of this rank, and this lane's route of it.
struct TokenRoute {
    int token = -1;
    int expert = -1;
    float weight = 1.0f;
};

__device__ TokenRoute route_of(const Params& p, int token) {
    TokenRoute route;
    const int lane = threadIdx.x % 32;
    if (token >= p.step.num_tokens) return route;
    route.token = token;
    if (lane >= p.step.num_topk) return route;
    const int64_t at = int64_t{token} * p.step.num_topk + lane;
    route.expert = p.plan.send_expert[at];
    if (p.exact) route.weight = p.topk_weights != nullptr ? p.topk_weights[at] : p.plan.send_weight[at];
    return route;
}

// The row of each lane for one token of this rank: by k, or one for each rank in turn, ascending.
__device__ Rows rows_of_token(const Params& p, uint32_t sequence, const TokenRoute& route, int64_t row_bytes,
                              uint64_t absent) {
    const LowLatencyPeers& peers = p.peers;
    const int lane = threadIdx.x % 32;
    const int rank = route.expert >= 0 ? route.expert / peers.num_local_experts : -1;
    const int64_t home = peers.rank * peers.max_tokens + route.token;
    Rows rows;
    if (p.exact) {
        const unsigned same = __match_any_sync(kAllLanes, rank);
        if (rank < 0 || (absent & bit_of(rank)) != 0) return rows;
        rows.weight = route.weight;
        if (p.step.in_place) {
            const int64_t at = int64_t{route.token} * p.step.num_topk + lane;
            const uint32_t place = load_volatile(&places_for(peers, peers.rank, rank, sequence)[at]);
            if (place != kNoRow) rows.row = p.symm[rank] + int64_t{place} * 16;
            return rows;
        }
        const int turn = __popc(same & ((1u << lane) - 1));
        rows.row = area_rows(peers, rank, sequence) + (home * p.max_routes_here + turn) * row_bytes;
        return rows;
    }
    uint64_t ranks = rank >= 0 ? bit_of(rank) : 0;
    const uint32_t low = __reduce_or_sync(kAllLanes, static_cast<uint32_t>(ranks));
    const uint32_t high = __reduce_or_sync(kAllLanes, static_cast<uint32_t>(ranks >> 32));
    ranks = (uint64_t{high} << 32 | low) & ~absent;
    for (int turn = 0; turn < lane; ++turn) ranks &= ranks - 1;
    if (ranks == 0) return rows;
    rows.row = area_rows(peers, __ffsll(static_cast<long long>(ranks)) - 1, sequence) + home * row_bytes;
    return rows;
}

template <typename T>
__device__ void receive(const Params& p, const LowLatencyStart& start, uint32_t plan_sequence) {
    const LowLatencyPeers& peers = p.peers;
    const uint64_t left_out = uint64_t{p.plan.sequence[2]} << 32 | uint64_t{p.plan.sequence[1]};
    const int row_vectors = static_cast<int>(peers.hidden * sizeof(T) / 16);
    // Of the first token, before the wait.
    const TokenRoute first = route_of(p, first_row(row_vectors));
    if (stages_own_late(p) && !start.failed) stage_own<T>(p, start.sequence);
    const Arrivals arrivals = await_arrivals(peers, p.step, start, full_signature(p.step, plan_sequence));
    if (arrivals.ok) {
        // A rank whose rows this rank left out at dispatch has sent nothing that belongs to this plan.
        const uint64_t absent = arrivals.absent | left_out;
        const int64_t row_bytes = peers.hidden * sizeof(T);
        each_piece(p.step.num_tokens, row_vectors, [&](int token, const PieceRange& range) {
            const TokenRoute route = token == first.token ? first : route_of(p, token);
            const Rows rows = rows_of_token(p, start.sequence, route, row_bytes, absent);
            sum_rows<T>(rows, p.exact, range).store(p.out + token * row_bytes, range);
        });
        write_absent(peers, p.step, absent, blockIdx.x == gridDim.x - 1);
    }
    finish_receive(peers, p.step, start, arrivals);
}

template <typename T>
__global__ void __launch_bounds__(kLowLatencyThreads) low_latency_combine_kernel(const __grid_constant__ Params p) {
    const LowLatencyStart start = start_low_latency(p.peers, p.step);
    const uint32_t plan_sequence = p.plan.sequence[0];
    if (p.step.sends) {
        if (!start.failed) {
            if (blockIdx.x == 0) write_headers(p.peers, p.step, start, plan_sequence);
            if (p.step.in_place) {
                push_places(p, start);
            } else {
                stage_home<T>(p, start.sequence);
            }
        }
        finish_send(p.peers, start, full_signature(p.step, plan_sequence));
    }
    if (p.step.receives) receive<T>(p, start, plan_sequence);
}

}  // namespace

void launch_low_latency_combine(const LowLatencyCombineParams& params, cudaStream_t stream) {
    with_float_type(params.dtype, [&](auto type) {
        low_latency_combine_kernel<decltype(type)><<<params.step.num_sms, kLowLatencyThreads, 0, stream>>>(params);
    });
    check_launch("low_latency_combine_kernel");
}

}  // namespace ray_deepep
