// Dispatch: token rows to the ranks of their experts.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "host/float8.h"
#include "host/host_buffer.h"
#include "host/rows.h"

namespace ray_deepep {
namespace {

int64_t row_bytes(int64_t hidden, DType dtype) { return hidden * element_size(dtype); }
int64_t scale_bytes(int64_t hidden) { return hidden / kScaleBlock * 4; }

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace

std::shared_ptr<HostPlan> HostBuffer::begin_dispatch(const DispatchArgs& args) {
    check_parts(args);
    check_locations(args);
    OpHeader& own = open_operation(Operation::kDispatch);
    try {
        publish_routing(args, own);
        stage_rows(args, own, at<int32_t>(geometry_.rank, own.topk_idx_at));
    } catch (...) {
        --sequence_;
        throw;
    }
    publish(own);

    std::vector<Routing> routing(geometry_.num_ranks);
    for (int rank = 0; rank < geometry_.num_ranks; ++rank) {
        const OpHeader& from = header(rank);
        routing[rank] = Routing{from.num_tokens,
                                at<int32_t>(rank, from.topk_idx_at),
                                from.locations_at != 0 ? at<int32_t>(rank, from.locations_at) : nullptr,
                                at<int64_t>(rank, from.part_begin_at),
                                at<int64_t>(rank, from.num_per_rank_at),
                                at<int64_t>(rank, from.num_per_expert_at)};
    }
    auto result = std::make_shared<HostPlan>();
    result->sequence = sequence_;
    result->plan = make_plan(geometry_, args.layout, args.num_topk, routing);
    const Plan& plan = result->plan;
    count_sent(own, *result);
    const auto* own_weights = pointer<const float>(args.topk_weights);
    result->send_weight.assign(own_weights, own_weights + args.num_tokens * args.num_topk);
    result->route_weight.resize(plan.route_slot.size());
    for (int source = 0; source < geometry_.num_sources(); ++source) {
        const int rank = geometry_.rank_of(source);
        const auto* weights = at<const float>(rank, header(rank).topk_weights_at);
        for (int64_t i = plan.recv_base[source]; i < plan.recv_base[source + 1]; ++i) {
            for (int64_t r = plan.route_begin[i]; r < plan.route_begin[i + 1]; ++r) {
                result->route_weight[r] = weights[int64_t{plan.recv_token[i]} * args.num_topk + plan.route_k[r]];
            }
        }
    }
    return result;
}

void HostBuffer::count_sent(const OpHeader& own, HostPlan& plan) const {
    const auto* tokens = at<int64_t>(geometry_.rank, own.num_per_rank_at);
    const auto* routes = at<int64_t>(geometry_.rank, own.num_per_expert_at);
    plan.send_tokens.assign(geometry_.num_ranks, 0);
    plan.send_routes.assign(geometry_.num_ranks, 0);
    const int num_local = geometry_.num_local_experts();
    for (int part = 0; part < geometry_.num_parts; ++part) {
        for (int rank = 0; rank < geometry_.num_ranks; ++rank) {
            plan.send_tokens[rank] += tokens[part * geometry_.num_ranks + rank];
        }
        for (int expert = 0; expert < geometry_.num_experts; ++expert) {
            plan.send_routes[expert / num_local] += routes[part * geometry_.num_experts + expert];
        }
    }
}

void HostBuffer::begin_cached_dispatch(const DispatchArgs& args, const HostPlan& plan) {
    OpHeader& own = open_operation(Operation::kDispatch);
    try {
        own.plan_sequence = plan.sequence;
        own.layout_kind = plan.plan.layout.kind;
        own.num_topk = plan.plan.num_topk;
        stage_rows(args, own, plan.plan.send_expert.data());
    } catch (...) {
        --sequence_;
        throw;
    }
    publish(own);
}

void HostBuffer::publish_routing(const DispatchArgs& args, OpHeader& own) {
    const int rank = geometry_.rank, num_parts = geometry_.num_parts;
    const int64_t num_routes = args.num_tokens * args.num_topk;
    own.num_topk = args.num_topk;
    own.layout_kind = args.layout.kind;
    own.alignment = args.layout.alignment;
    own.capacity = args.layout.capacity;
    own.part_begin_at = reserve((num_parts + 1) * 8);
    own.num_per_rank_at = reserve(int64_t{num_parts} * geometry_.num_ranks * 8);
    own.num_per_expert_at = reserve(int64_t{num_parts} * geometry_.num_experts * 8);
    own.topk_idx_at = reserve(num_routes * 4);
    own.topk_weights_at = reserve(num_routes * 4);
    auto* topk_idx = at<int32_t>(rank, own.topk_idx_at);
    const auto* given = pointer<const int64_t>(args.topk_idx);
    for (int64_t i = 0; i < num_routes; ++i) topk_idx[i] = static_cast<int32_t>(given[i]);
    std::memcpy(at<float>(rank, own.topk_weights_at), pointer<const float>(args.topk_weights), num_routes * 4);
    if (args.layout.kind == LayoutKind::kPadded) {
        own.locations_at = reserve(num_routes * 4);
        std::memcpy(at<int32_t>(rank, own.locations_at), pointer<const int32_t>(args.locations), num_routes * 4);
    }
    auto* part_begin = at<int64_t>(rank, own.part_begin_at);
    part_begin[0] = 0;
    for (int part = 0; part < num_parts; ++part) {
        part_begin[part + 1] = part_begin[part] + (args.part_tokens.empty() ? args.num_tokens : args.part_tokens[part]);
        count_routing(geometry_, topk_idx, part_begin[part], part_begin[part + 1], args.num_topk,
                      at<int64_t>(rank, own.num_per_rank_at) + int64_t{part} * geometry_.num_ranks,
                      at<int64_t>(rank, own.num_per_expert_at) + int64_t{part} * geometry_.num_experts);
    }
}

void HostBuffer::check_parts(const DispatchArgs& args) const {
    int64_t sum = 0;
    for (const int64_t tokens : args.part_tokens) sum += tokens;
    const bool one = args.part_tokens.empty() && geometry_.num_parts == 1;
    if (one || (static_cast<int>(args.part_tokens.size()) == geometry_.num_parts && sum == args.num_tokens)) return;
    throw ArgumentError("part_tokens", std::to_string(args.part_tokens.size()) + " parts of " + std::to_string(sum),
                        "must be " + std::to_string(geometry_.num_parts) + " parts of the " +
                            std::to_string(args.num_tokens) + " tokens");
}

// Two routes in one slot would race; found before anything is published. Each part has slots of its own.
void HostBuffer::check_locations(const DispatchArgs& args) const {
    if (args.layout.kind != LayoutKind::kPadded) return;
    const int64_t slots = geometry_.num_experts * args.layout.capacity;
    std::vector<bool> taken(static_cast<size_t>(geometry_.num_parts) * slots, false);
    const auto* topk_idx = pointer<const int64_t>(args.topk_idx);
    const auto* locations = pointer<const int32_t>(args.locations);
    int64_t part = 0, part_end = args.part_tokens.empty() ? args.num_tokens : args.part_tokens[0];
    for (int64_t i = 0; i < args.num_tokens * args.num_topk; ++i) {
        while (i / args.num_topk >= part_end) part_end += args.part_tokens[++part];
        if (topk_idx[i] < 0) continue;
        const int64_t slot = part * slots + topk_idx[i] * args.layout.capacity + locations[i];
        if (taken[slot]) {
            throw ArgumentError("locations",
                                std::to_string(locations[i]) + " twice for expert " + std::to_string(topk_idx[i]),
                                "must differ between the routes of one expert");
        }
        taken[slot] = true;
    }
}

// Copy the rows that other ranks will read into the heap; own rows are pulled from where they are.
void HostBuffer::stage_rows(const DispatchArgs& args, OpHeader& own, const int32_t* send_expert) {
    const int64_t bytes = row_bytes(sizes_.hidden, args.dtype), scales = scale_bytes(sizes_.hidden);
    own.dtype = args.dtype;
    own.num_tokens = args.num_tokens;
    own.scale_by_weights = args.scale_by_weights;
    own.max_recv_tokens = args.max_recv_tokens;
    const int64_t in_heap = symm_offset(args.x);
    own.in_place = in_heap != 0;
    own.rows_at = in_heap != 0 ? in_heap : reserve(args.num_tokens * bytes);
    if (args.x_scales != 0) own.scales_at = reserve(args.num_tokens * scales);
    if (in_heap != 0 && args.x_scales == 0) return;
    auto* rows = at<std::byte>(geometry_.rank, own.rows_at);
    const auto* x = pointer<const std::byte>(args.x);
    const int num_topk = own.num_topk, num_local = geometry_.num_local_experts(), rank = geometry_.rank;
    const bool streamed = args.num_tokens * bytes >= kStreamedBytes;
    threads_.parallel_rows(args.num_tokens, bytes, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            bool remote = false;
            for (int k = 0; k < num_topk; ++k) {
                const int expert = send_expert[t * num_topk + k];
                remote = remote || (expert >= 0 && expert / num_local != rank);
            }
            if (!remote) continue;
            if (in_heap == 0) copy_row(rows + t * bytes, x + t * bytes, bytes, streamed);
            if (args.x_scales != 0) {
                std::memcpy(at<std::byte>(rank, own.scales_at) + t * scales,
                            pointer<const std::byte>(args.x_scales) + t * scales, scales);
            }
        }
        finish_streaming();
    });
}

void HostBuffer::pull_dispatch(const DispatchArgs& args, HostPlan& plan, const DispatchOutputs& out) {
    pull_rows(args, plan, out);
    fill_unused(plan.plan, args, out);
    pull_routing(plan, out);
    finish();
}

void HostBuffer::pull_rows(const DispatchArgs& args, const HostPlan& host_plan, const DispatchOutputs& out) {
    const Plan& plan = host_plan.plan;
    const int64_t hidden = sizes_.hidden, bytes = row_bytes(hidden, args.dtype), scales = scale_bytes(hidden);
    auto* out_x = pointer<std::byte>(out.x);
    auto* out_scales = pointer<std::byte>(out.x_scales);
    const bool token_major = plan.layout.kind == LayoutKind::kTokenMajor;
    const bool streamed = plan.num_rows * bytes >= kStreamedBytes;
    for (int source = 0; source < geometry_.num_sources(); ++source) {
        const int rank = geometry_.rank_of(source);
        const bool own = rank == geometry_.rank;
        const OpHeader& from = header(rank);
        const auto* x = own ? pointer<const std::byte>(args.x) : at<const std::byte>(rank, from.rows_at);
        const auto* x_scales =
            own ? pointer<const std::byte>(args.x_scales) : at<const std::byte>(rank, from.scales_at);
        const auto copy = [&](int64_t slot, int64_t token) {
            copy_row(out_x + slot * bytes, x + token * bytes, bytes, streamed);
            if (out_scales != nullptr) std::memcpy(out_scales + slot * scales, x_scales + token * scales, scales);
        };
        const int64_t first = plan.recv_base[source];
        traffic_.add_received(rank,
                              (plan.recv_base[source + 1] - first) * (bytes + (out_scales != nullptr ? scales : 0)));
        threads_.parallel_rows(plan.recv_base[source + 1] - first, bytes, [&](int64_t begin, int64_t end) {
            for (int64_t i = first + begin; i < first + end; ++i) {
                if (token_major) {
                    copy(i, plan.recv_token[i]);
                    continue;
                }
                for (int64_t r = plan.route_begin[i]; r < plan.route_begin[i + 1]; ++r) {
                    const int64_t slot = plan.route_slot[r], token = plan.recv_token[i];
                    if (args.scale_by_weights) {
                        scale_row(out_x + slot * bytes, x + token * bytes, hidden, args.dtype,
                                  host_plan.route_weight[r]);
                    } else {
                        copy(slot, token);
                    }
                }
            }
            finish_streaming();
        });
    }
}

// Zeros where no route landed: tails of aligned groups, empty slots of padded blocks.
void HostBuffer::fill_unused(const Plan& plan, const DispatchArgs& args, const DispatchOutputs& out) {
    if (plan.layout.kind == LayoutKind::kTokenMajor) return;
    const int64_t bytes = row_bytes(sizes_.hidden, args.dtype), scales = scale_bytes(sizes_.hidden);
    const bool streamed = plan.num_rows * bytes >= kStreamedBytes;
    const auto clear = [&](int64_t slot) {
        clear_row(pointer<std::byte>(out.x) + slot * bytes, bytes, streamed);
        if (out.x_scales != 0) std::memset(pointer<std::byte>(out.x_scales) + slot * scales, 0, scales);
    };
    if (plan.layout.kind == LayoutKind::kExpertMajor) {
        for (size_t e = 0; e < plan.expert_count.size(); ++e) {
            for (int64_t slot = plan.expert_offset[e] + plan.expert_count[e]; slot < plan.expert_offset[e + 1];
                 ++slot) {
                clear(slot);
            }
        }
        finish_streaming();
        return;
    }
    std::vector<uint8_t> filled(plan.num_rows, 0);
    for (const int32_t slot : plan.route_slot) filled[slot] = 1;
    threads_.parallel_rows(plan.num_rows, bytes, [&](int64_t begin, int64_t end) {
        for (int64_t slot = begin; slot < end; ++slot) {
            if (filled[slot] == 0) clear(slot);
        }
        finish_streaming();
    });
}

void HostBuffer::pull_routing(const HostPlan& host_plan, const DispatchOutputs& out) {
    const Plan& plan = host_plan.plan;
    const int num_topk = plan.num_topk;
    auto* weights = pointer<float>(out.topk_weights);
    auto* topk_idx = pointer<int64_t>(out.topk_idx);
    const bool token_major = plan.layout.kind == LayoutKind::kTokenMajor;
    if (weights != nullptr) std::fill_n(weights, token_major ? plan.num_rows * num_topk : plan.num_rows, 0.0f);
    if (topk_idx != nullptr) std::fill_n(topk_idx, plan.num_rows * num_topk, int64_t{-1});
    for (int source = 0; source < geometry_.num_sources(); ++source) {
        const int rank = geometry_.rank_of(source);
        const auto* experts = topk_idx != nullptr ? at<const int32_t>(rank, header(rank).topk_idx_at) : nullptr;
        for (int64_t i = plan.recv_base[source]; i < plan.recv_base[source + 1]; ++i) {
            for (int64_t r = plan.route_begin[i]; r < plan.route_begin[i + 1]; ++r) {
                const int k = plan.route_k[r];
                const int64_t where = token_major ? i * num_topk + k : plan.route_slot[r];
                if (weights != nullptr) weights[where] = host_plan.route_weight[r];
                if (topk_idx == nullptr) continue;
                const int64_t expert = experts[int64_t{plan.recv_token[i]} * num_topk + k];
                topk_idx[where] = expert - int64_t{geometry_.rank} * geometry_.num_local_experts();
            }
        }
    }
}

}  // namespace ray_deepep
