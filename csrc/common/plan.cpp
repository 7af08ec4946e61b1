#include "common/plan.h"

#include <algorithm>

namespace ray_deepep {
namespace {

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// First row of each local expert of `rank` and the end.
std::vector<int64_t> expert_offsets(const Geometry& geometry, const Layout& layout, int rank,
                                    const std::vector<Routing>& routing) {
    const int num_local = geometry.num_local_experts();
    std::vector<int64_t> offsets(num_local + 1, 0);
    for (int e = 0; e < num_local; ++e) {
        int64_t count = 0;
        for (const Routing& from : routing) {
            for (int p = 0; p < geometry.num_parts; ++p) {
                count += from.num_per_expert[p * geometry.num_experts + rank * num_local + e];
            }
        }
        offsets[e + 1] = offsets[e] + round_up(count, layout.alignment);
    }
    return offsets;
}

// Where the routes of one source start inside each of a destination's outputs.
struct Cursor {
    std::vector<int64_t> row;   // [num_ranks]
    std::vector<int64_t> slot;  // [num_experts]

    // Go on behind the routes of one part of a rank.
    void skip(const Geometry& geometry, const Routing& from, int part) {
        const int64_t* rows = from.num_per_rank + int64_t{part} * geometry.num_ranks;
        const int64_t* routes = from.num_per_expert + int64_t{part} * geometry.num_experts;
        for (int dest = 0; dest < geometry.num_ranks; ++dest) row[dest] += rows[dest];
        for (int e = 0; e < geometry.num_experts; ++e) slot[e] += routes[e];
    }
};

int64_t padded_slot(const Geometry& geometry, const Layout& layout, int source, int expert, int32_t location) {
    const int num_local = geometry.num_local_experts();
    return (static_cast<int64_t>(source) * num_local + expert % num_local) * layout.capacity + location;
}

void plan_send_part(Plan& plan, const Routing& own, int part, Cursor cursor) {
    const Geometry& geometry = plan.geometry;
    const int num_topk = plan.num_topk, num_local = geometry.num_local_experts();
    std::vector<int64_t> last_token(geometry.num_ranks, -1);
    for (int64_t t = own.part_begin[part]; t < own.part_begin[part + 1]; ++t) {
        for (int k = 0; k < num_topk; ++k) {
            const int64_t route = t * num_topk + k;
            const int expert = plan.send_expert[route];
            if (expert < 0) continue;
            const int dest = expert / num_local;
            if (last_token[dest] != t) {
                last_token[dest] = t;
                ++cursor.row[dest];
            }
            const int64_t row = cursor.row[dest] - 1;
            int64_t slot = row;
            if (plan.layout.kind == LayoutKind::kExpertMajor) slot = cursor.slot[expert]++;
            if (plan.layout.kind == LayoutKind::kPadded) {
                const int source = geometry.source(part, geometry.rank);
                slot = padded_slot(geometry, plan.layout, source, expert, own.locations[route]);
            }
            plan.send_row[route] = static_cast<int32_t>(row);
            plan.send_slot[route] = static_cast<int32_t>(slot);
        }
    }
}

// `cursor` stands before the first source.
void plan_send(Plan& plan, const std::vector<Routing>& routing, Cursor cursor) {
    const Geometry& geometry = plan.geometry;
    const Routing& own = routing[geometry.rank];
    const size_t num_routes = static_cast<size_t>(plan.num_tokens) * plan.num_topk;
    plan.send_expert.assign(own.topk_idx, own.topk_idx + num_routes);
    plan.send_row.assign(num_routes, -1);
    plan.send_slot.assign(num_routes, -1);
    for (int source = 0; source < geometry.num_sources(); ++source) {
        const int part = geometry.part_of(source), rank = geometry.rank_of(source);
        if (rank == geometry.rank) plan_send_part(plan, own, part, cursor);
        cursor.skip(geometry, routing[rank], part);
    }
}

void plan_receive(Plan& plan, const std::vector<Routing>& routing, std::vector<int64_t> slot_cursor) {
    const Geometry& geometry = plan.geometry;
    const int num_topk = plan.num_topk, num_local = geometry.num_local_experts();
    const int first = geometry.rank * num_local;
    int64_t tokens = 0, routes = 0;
    for (const Routing& from : routing) {
        for (int p = 0; p < geometry.num_parts; ++p)
            tokens += from.num_per_rank[p * geometry.num_ranks + geometry.rank];
    }
    for (const int64_t count : plan.expert_count) routes += count;
    plan.recv_base.assign(1, 0);
    plan.recv_token.reserve(tokens);
    plan.route_begin.reserve(tokens + 1);
    plan.route_begin.assign(1, 0);
    plan.route_slot.reserve(routes);
    plan.route_k.reserve(routes);
    plan.route_expert.reserve(routes);
    for (int source = 0; source < geometry.num_sources(); ++source) {
        const Routing& from = routing[geometry.rank_of(source)];
        const int64_t* part_begin = from.part_begin + geometry.part_of(source);
        for (int64_t t = part_begin[0]; t < part_begin[1]; ++t) {
            const int64_t routes_before = static_cast<int64_t>(plan.route_slot.size());
            for (int k = 0; k < num_topk; ++k) {
                const int64_t route = t * num_topk + k;
                const int local = from.topk_idx[route] - first;
                if (from.topk_idx[route] < 0 || local < 0 || local >= num_local) continue;
                int64_t slot = plan.num_recv_tokens();
                if (plan.layout.kind == LayoutKind::kExpertMajor) slot = slot_cursor[local]++;
                if (plan.layout.kind == LayoutKind::kPadded) {
                    slot = padded_slot(geometry, plan.layout, source, first + local, from.locations[route]);
                }
                plan.route_slot.push_back(static_cast<int32_t>(slot));
                plan.route_k.push_back(static_cast<int8_t>(k));
                plan.route_expert.push_back(local);
            }
            const int64_t routes_after = static_cast<int64_t>(plan.route_slot.size());
            if (routes_after == routes_before) continue;
            plan.recv_token.push_back(static_cast<int32_t>(t));
            plan.route_begin.push_back(routes_after);
        }
        plan.recv_base.push_back(plan.num_recv_tokens());
    }
}

}  // namespace

const char* to_string(LayoutKind kind) {
    switch (kind) {
        case LayoutKind::kTokenMajor: return "TokenMajor";
        case LayoutKind::kExpertMajor: return "ExpertMajor";
        case LayoutKind::kPadded: return "Padded";
    }
    return "unknown";
}

const char* to_string(Reduce reduce) {
    switch (reduce) {
        case Reduce::kExact: return "exact";
        case Reduce::kFast: return "fast";
        case Reduce::kExpertOrder: return "expert_order";
    }
    return "unknown";
}

void count_routing(const Geometry& geometry, const int32_t* topk_idx, int64_t begin, int64_t end, int num_topk,
                   int64_t* num_per_rank, int64_t* num_per_expert) {
    const int num_local = geometry.num_local_experts();
    std::fill_n(num_per_rank, geometry.num_ranks, 0);
    std::fill_n(num_per_expert, geometry.num_experts, 0);
    std::vector<int64_t> last_token(geometry.num_ranks, -1);
    for (int64_t t = begin; t < end; ++t) {
        for (int k = 0; k < num_topk; ++k) {
            const int expert = topk_idx[t * num_topk + k];
            if (expert < 0) continue;
            ++num_per_expert[expert];
            if (last_token[expert / num_local] == t) continue;
            last_token[expert / num_local] = t;
            ++num_per_rank[expert / num_local];
        }
    }
}

Plan make_plan(const Geometry& geometry, const Layout& layout, int num_topk, const std::vector<Routing>& routing) {
    Plan plan;
    plan.geometry = geometry;
    plan.layout = layout;
    plan.num_topk = num_topk;
    const Routing& own = routing[geometry.rank];
    plan.num_tokens = own.num_tokens;
    plan.part_begin.assign(own.part_begin, own.part_begin + geometry.num_parts + 1);
    const int num_local = geometry.num_local_experts(), first = geometry.rank * num_local;

    plan.expert_count.assign(num_local, 0);
    for (int source = 0; source < geometry.num_sources(); ++source) {
        const int64_t* routes =
            routing[geometry.rank_of(source)].num_per_expert + int64_t{geometry.part_of(source)} * geometry.num_experts;
        for (int e = 0; e < num_local; ++e) plan.expert_count[e] += routes[first + e];
    }
    Cursor cursor{std::vector<int64_t>(geometry.num_ranks, 0), std::vector<int64_t>(geometry.num_experts, 0)};
    for (int dest = 0; dest < geometry.num_ranks; ++dest) {
        std::vector<int64_t> offsets = expert_offsets(geometry, layout, dest, routing);
        std::copy_n(offsets.begin(), num_local, cursor.slot.begin() + dest * num_local);
        if (dest == geometry.rank) plan.expert_offset = std::move(offsets);
    }
    std::vector<int64_t> own_slots(cursor.slot.begin() + first, cursor.slot.begin() + first + num_local);
    plan_send(plan, routing, std::move(cursor));
    plan_receive(plan, routing, std::move(own_slots));
    switch (layout.kind) {
        case LayoutKind::kTokenMajor: plan.num_rows = plan.num_recv_tokens(); break;
        case LayoutKind::kExpertMajor: plan.num_rows = plan.expert_offset.back(); break;
        case LayoutKind::kPadded:
            plan.num_rows = int64_t{1} * geometry.num_sources() * num_local * layout.capacity;
            break;
    }
    return plan;
}

}  // namespace ray_deepep
