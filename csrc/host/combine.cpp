// Combine: expert outputs back to their tokens, added up in a fixed order.
#include <array>
#include <cstring>
#include <vector>

#include "host/host_buffer.h"
#include "host/rows.h"

namespace ray_deepep {
namespace {

constexpr int kMaxTopk = 32;

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Rows that hold one sum per (token, rank) rather than one row per route.
bool per_rank(const Plan& plan, Reduce reduce) {
    return plan.layout.kind == LayoutKind::kTokenMajor || reduce == Reduce::kFast;
}

// The k's of one token in the order in which their rows are added. `routes` is the token's row of Plan::send_expert.
// Per-rank sums take the first route of each rank, by rank; the others each route, by k or by expert.
int order_routes(const int32_t* routes, int num_topk, int num_local, bool by_rank, bool by_expert,
                 std::array<int, kMaxTopk>& order) {
    int count = 0;
    for (int k = 0; k < num_topk; ++k) {
        if (routes[k] < 0) continue;
        bool repeated = false;
        for (int i = 0; by_rank && i < count; ++i) {
            repeated = repeated || routes[order[i]] / num_local == routes[k] / num_local;
        }
        if (!repeated) order[count++] = k;
    }
    if (!by_rank && !by_expert) return count;
    // Insertion: stable, and tokens have few routes.
    const auto key = [&](int k) { return by_rank ? routes[k] / num_local : routes[k]; };
    for (int i = 1; i < count; ++i) {
        const int k = order[i];
        int j = i;
        for (; j > 0 && key(order[j - 1]) > key(k); --j) order[j] = order[j - 1];
        order[j] = k;
    }
    return count;
}

}  // namespace

void HostBuffer::combine(const CombineArgs& args, const HostPlan& plan, const CombineOutputs& out) {
    OpHeader& own = open_operation(args.has_rows ? Operation::kCombine : Operation::kCombineWeights);
    try {
        own.dtype = args.dtype;
        own.num_topk = plan.plan.num_topk;
        own.layout_kind = plan.plan.layout.kind;
        own.reduce = static_cast<int32_t>(args.reduce);
        own.weighted = args.weighted;
        own.has_row_weights = args.has_row_weights;
        own.plan_sequence = plan.sequence;
        stage_outputs(args, plan, own);
    } catch (...) {
        --sequence_;
        throw;
    }
    publish(own);
    if (args.has_rows) args.routes_only ? pull_routes(args, plan, out) : pull_outputs(args, plan, out);
    if (args.has_row_weights) pull_row_weights(plan.plan, out);
    finish();
}

OutputRows HostBuffer::output_rows(const CombineArgs& args, const Plan& plan) const {
    const int64_t bytes = sizes_.hidden * element_size(args.dtype);
    if (args.expert_rows.empty()) return OutputRows(pointer<const std::byte>(args.rows), bytes);
    return OutputRows(args.expert_rows, plan, bytes);
}

void HostBuffer::stage_outputs(const CombineArgs& args, const HostPlan& host_plan, OpHeader& own) {
    const Plan& plan = host_plan.plan;
    const int64_t bytes = sizes_.hidden * element_size(args.dtype);
    const bool token_major = plan.layout.kind == LayoutKind::kTokenMajor;
    if (own.has_row_weights != 0) {
        const int64_t count = token_major ? plan.num_rows * plan.num_topk : plan.num_rows;
        own.row_weights_at = reserve(count * 4);
        std::memcpy(at<float>(geometry_.rank, own.row_weights_at), pointer<const float>(args.row_weights), count * 4);
    }
    if (own.operation == Operation::kCombineWeights) return;
    const bool reduced = args.reduce == Reduce::kFast && !token_major;
    const int64_t in_heap = reduced ? 0 : symm_offset(args.rows);
    if (in_heap != 0) {
        own.in_place = 1;
        own.rows_at = in_heap;
        return;
    }
    own.rows_at = reserve((reduced ? plan.num_recv_tokens() : plan.num_rows) * bytes);
    auto* staged = at<std::byte>(geometry_.rank, own.rows_at);
    if (reduced) return reduce_local(args, host_plan, staged);
    // Rows of this rank's own tokens stay where they are; only what others will read is staged.
    int64_t own_count = 0;
    for (int part = 0; part < geometry_.num_parts; ++part) {
        const int source = geometry_.source(part, geometry_.rank);
        own_count += plan.recv_base[source + 1] - plan.recv_base[source];
    }
    const OutputRows outputs = output_rows(args, plan);
    const bool streamed = (plan.num_recv_tokens() - own_count) * bytes >= kStreamedBytes;
    for (int source = 0; source < geometry_.num_sources(); ++source) {
        if (geometry_.rank_of(source) == geometry_.rank) continue;
        const int64_t first = plan.recv_base[source];
        threads_.parallel_rows(plan.recv_base[source + 1] - first, bytes, [&](int64_t begin, int64_t end) {
            // Token-major rows stand for all local routes of a token.
            const int64_t last = token_major ? first + end : plan.route_begin[first + end];
            for (int64_t r = token_major ? first + begin : plan.route_begin[first + begin]; r < last; ++r) {
                const int64_t slot = token_major ? r : plan.route_slot[r];
                copy_row(staged + slot * bytes, outputs.row(source, token_major ? 0 : plan.route_expert[r], slot),
                         bytes, streamed);
            }
            finish_streaming();
        });
    }
}

// Fast mode: add up a token's local experts here, so that one row per (token, rank) travels.
void HostBuffer::reduce_local(const CombineArgs& args, const HostPlan& host_plan, std::byte* staged) {
    const Plan& plan = host_plan.plan;
    const int64_t hidden = sizes_.hidden, bytes = hidden * element_size(args.dtype);
    const OutputRows outputs = output_rows(args, plan);
    const bool streamed = plan.num_recv_tokens() * bytes >= kStreamedBytes;
    for (int source = 0; source < geometry_.num_sources(); ++source) {
        const int64_t first = plan.recv_base[source];
        threads_.parallel_rows(plan.recv_base[source + 1] - first, bytes, [&](int64_t begin, int64_t end) {
            RowSum sum(hidden, args.dtype, streamed);
            for (int64_t i = first + begin; i < first + end; ++i) {
                for (int64_t r = plan.route_begin[i]; r < plan.route_begin[i + 1]; ++r) {
                    const std::byte* row = outputs.row(source, plan.route_expert[r], plan.route_slot[r]);
                    args.weighted ? sum.add_scaled(row, host_plan.route_weight[r]) : sum.add(row);
                }
                sum.take(staged + i * bytes);
            }
            finish_streaming();
        });
    }
}

void HostBuffer::pull_outputs(const CombineArgs& args, const HostPlan& host_plan, const CombineOutputs& out) {
    const Plan& plan = host_plan.plan;
    const int num_topk = plan.num_topk, num_local = geometry_.num_local_experts();
    const int64_t hidden = sizes_.hidden, bytes = hidden * element_size(args.dtype);
    const bool by_rank = per_rank(plan, args.reduce);
    const bool by_expert = args.reduce == Reduce::kExpertOrder;
    const bool scaled = args.weighted && !by_rank;
    const bool own_staged = args.reduce == Reduce::kFast && plan.layout.kind != LayoutKind::kTokenMajor;
    std::vector<const std::byte*> sources(geometry_.num_ranks);
    for (int rank = 0; rank < geometry_.num_ranks; ++rank)
        sources[rank] = at<const std::byte>(rank, header(rank).rows_at);
    const OutputRows own_rows = own_staged ? OutputRows(sources[geometry_.rank], bytes) : output_rows(args, plan);
    const int first_expert = geometry_.rank * num_local;
    for (int rank = 0; rank < geometry_.num_ranks; ++rank) {
        traffic_.add_received(rank, (by_rank ? host_plan.send_tokens : host_plan.send_routes)[rank] * bytes);
    }
    auto* routes = pointer<std::byte>(out.routes);

    const bool streamed = plan.num_tokens * bytes >= kStreamedBytes;
    threads_.parallel_rows(plan.num_tokens, bytes, [&](int64_t begin, int64_t end) {
        RowSum sum(hidden, args.dtype, streamed);
        std::array<int, kMaxTopk> order;
        for (int64_t t = begin; t < end; ++t) {
            const int64_t first = t * num_topk;
            const int own_source = plan.source_of(t);
            const int count = order_routes(&plan.send_expert[first], num_topk, num_local, by_rank, by_expert, order);
            for (int i = 0; i < count; ++i) {
                const int64_t route = first + order[i];
                const int64_t row = by_rank ? plan.send_row[route] : plan.send_slot[route];
                const int dest = plan.destination(route);
                const std::byte* src = dest == geometry_.rank
                                           ? own_rows.row(own_source, plan.send_expert[route] - first_expert, row)
                                           : sources[dest] + row * bytes;
                scaled ? sum.add_scaled(src, host_plan.send_weight[route]) : sum.add(src);
                if (routes != nullptr)
                    copy_row(routes + (order[i] * plan.num_tokens + t) * bytes, src, bytes, streamed);
            }
            if (args.bias != 0) sum.add(pointer<const std::byte>(args.bias) + t * bytes);
            sum.take(pointer<std::byte>(out.x) + t * bytes);
            for (int k = 0; routes != nullptr && k < num_topk; ++k) {
                if (plan.send_expert[first + k] < 0) std::memset(routes + (k * plan.num_tokens + t) * bytes, 0, bytes);
            }
        }
        finish_streaming();
    });
}

// The routes' rows as they are, without gaps, for a caller that adds them up elsewhere.
void HostBuffer::pull_routes(const CombineArgs& args, const HostPlan& host_plan, const CombineOutputs& out) {
    const Plan& plan = host_plan.plan;
    const int64_t num_topk = plan.num_topk, bytes = sizes_.hidden * element_size(args.dtype);
    std::vector<int64_t> first(plan.num_tokens + 1, 0);
    for (int64_t t = 0; t < plan.num_tokens; ++t) {
        first[t + 1] = first[t];
        for (int64_t k = 0; k < num_topk; ++k) first[t + 1] += plan.send_expert[t * num_topk + k] >= 0;
    }
    const OutputRows own_rows = output_rows(args, plan);
    const int first_expert = geometry_.rank * geometry_.num_local_experts();
    auto* routes = pointer<std::byte>(out.routes);
    const bool streamed = first.back() * bytes >= kStreamedBytes;
    threads_.parallel_rows(plan.num_tokens, bytes, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            std::byte* next = routes + first[t] * bytes;
            for (int64_t route = t * num_topk; route < (t + 1) * num_topk; ++route) {
                if (plan.send_expert[route] < 0) continue;
                const int dest = plan.destination(route);
                const int64_t slot = plan.send_slot[route];
                const std::byte* row =
                    dest == geometry_.rank
                        ? own_rows.row(plan.source_of(t), plan.send_expert[route] - first_expert, slot)
                        : at<const std::byte>(dest, header(dest).rows_at) + slot * bytes;
                copy_row(next, row, bytes, streamed);
                next += bytes;
            }
        }
        finish_streaming();
    });
}

void HostBuffer::pull_row_weights(const Plan& plan, const CombineOutputs& out) {
    const bool token_major = plan.layout.kind == LayoutKind::kTokenMajor;
    auto* home = pointer<float>(out.topk_weights);
    for (int64_t route = 0; route < plan.num_tokens * plan.num_topk; ++route) {
        home[route] = 0.0f;
        if (plan.send_expert[route] < 0) continue;
        const int dest = plan.destination(route);
        const auto* weights = at<const float>(dest, header(dest).row_weights_at);
        home[route] = token_major ? weights[int64_t{plan.send_row[route]} * plan.num_topk + route % plan.num_topk]
                                  : weights[plan.send_slot[route]];
    }
}

}  // namespace ray_deepep
