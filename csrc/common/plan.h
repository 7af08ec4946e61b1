// Plan arithmetic: from the published routing of all ranks, who needs which row and where it lands. Pure functions of
// their inputs, so every rank computes the same answer alone; no counts are exchanged.
#pragma once

#include <cstdint>
#include <vector>

namespace ray_deepep {

enum class LayoutKind : int32_t { kTokenMajor = 0, kExpertMajor = 1, kPadded = 2 };

// How combine adds up a token's rows, always in float32: at the source by k; over the local experts first; or at the
// source by ascending expert.
enum class Reduce : int32_t { kExact = 0, kFast = 1, kExpertOrder = 2 };

const char* to_string(LayoutKind kind);
const char* to_string(Reduce reduce);

struct Layout {
    LayoutKind kind = LayoutKind::kTokenMajor;
    int64_t alignment = 1;  // expert-major: group starts are multiples of it
    int64_t capacity = 0;   // padded: slots per (source rank, local expert)
};

// A rank's tokens may come in several *parts*, the same number on all ranks: those that landed from each node. Rows are
// ordered by part, then rank, then token, so they come as if every (part, rank) were a source rank of its own.
struct Geometry {
    int rank = 0;
    int num_ranks = 1;
    int num_experts = 1;
    int num_parts = 1;
    int num_local_experts() const { return num_experts / num_ranks; }
    int num_sources() const { return num_parts * num_ranks; }
    int source(int part, int of_rank) const { return part * num_ranks + of_rank; }
    int rank_of(int source) const { return source % num_ranks; }
    int part_of(int source) const { return source / num_ranks; }
};

// Routing that one rank published. Arrays are [num_tokens, num_topk], -1 = no expert.
struct Routing {
    int64_t num_tokens = 0;
    const int32_t* topk_idx = nullptr;
    const int32_t* locations = nullptr;       // padded layout only
    const int64_t* part_begin = nullptr;      // [num_parts + 1] first token of each part
    const int64_t* num_per_rank = nullptr;    // [num_parts, num_ranks] token rows this rank sends to each
    const int64_t* num_per_expert = nullptr;  // [num_parts, num_experts] routes this rank sends to each
};

// Everything a rank needs to pull its rows, and to pull expert outputs back.
struct Plan {
    Geometry geometry;
    Layout layout;
    int num_topk = 0;
    int64_t num_tokens = 0;           // own tokens
    std::vector<int64_t> part_begin;  // [num_parts + 1], of own tokens

    // Receive side. Row i of the token-major order came from token recv_token[i] of the source, see Geometry, whose
    // range [recv_base[s], recv_base[s + 1]) holds i; its routes are route_*[route_begin[i] .. route_begin[i + 1]).
    std::vector<int64_t> recv_base;
    std::vector<int32_t> recv_token;
    std::vector<int64_t> route_begin;
    std::vector<int32_t> route_slot;  // row of the output in its layout; token-major: i itself
    std::vector<int8_t> route_k;
    std::vector<int32_t> route_expert;   // local expert
    std::vector<int64_t> expert_count;   // [L]
    std::vector<int64_t> expert_offset;  // [L + 1], expert-major
    int64_t num_rows = 0;                // rows of the output in its layout

    // Send side, [num_tokens, num_topk]; -1 where there is no route.
    std::vector<int32_t> send_expert;  // global expert
    std::vector<int32_t> send_row;     // row in the destination's token-major order
    std::vector<int32_t> send_slot;    // row in the destination's output

    int64_t num_recv_tokens() const { return static_cast<int64_t>(recv_token.size()); }
    int destination(int64_t route) const { return send_expert[route] / geometry.num_local_experts(); }
    // The source that an own token stands for.
    int source_of(int64_t token) const {
        int part = 0;
        while (token >= part_begin[part + 1]) ++part;
        return geometry.source(part, geometry.rank);
    }
};

// Count the rows and routes that a rank sends in tokens [begin, end), those of one part: what it publishes beside its
// routing.
void count_routing(const Geometry& geometry, const int32_t* topk_idx, int64_t begin, int64_t end, int num_topk,
                   int64_t* num_per_rank, int64_t* num_per_expert);

Plan make_plan(const Geometry& geometry, const Layout& layout, int num_topk, const std::vector<Routing>& routing);

}  // namespace ray_deepep
