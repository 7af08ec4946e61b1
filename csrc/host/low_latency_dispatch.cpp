// Low-latency dispatch: token rows to their experts, in fixed shapes.
#include <algorithm>
#include <cstring>

#include "host/host_buffer.h"
#include "host/low_latency.h"
#include "host/rows.h"

namespace ray_deepep {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

DType row_dtype(const LowLatencyDispatchArgs& args) {
    return args.cast == Float8Scale::kNone ? args.dtype : DType::kFloat8E4M3;
}

}  // namespace

std::shared_ptr<LowLatencyCall> LowLatencyBuffer::send_dispatch(const LowLatencyDispatchArgs& args) {
    const auto call = begin(Operation::kLowLatencyDispatch);
    call->staged_own = args.stage_own || args.cast != Float8Scale::kNone;
    const int rank = geometry_.rank;
    const int64_t num_routes = args.num_tokens * args.num_topk;
    LowLatencyHeader& own = header(rank, call->sequence);
    own.dtype = row_dtype(args);
    own.num_topk = args.num_topk;
    own.num_tokens = args.num_tokens;
    auto* topk_idx = at<int32_t>(rank, call->sequence, map_.topk_idx_at);
    auto* topk_weights = at<float>(rank, call->sequence, map_.topk_weights_at);
    const auto* given = pointer<const int64_t>(args.topk_idx);
    for (int64_t i = 0; i < num_routes; ++i) topk_idx[i] = static_cast<int32_t>(given[i]);
    if (args.topk_weights != 0) {
        std::memcpy(topk_weights, pointer<const float>(args.topk_weights), num_routes * 4);
    } else {
        std::fill_n(topk_weights, num_routes, 1.0f);
    }
    stage_rows(args, *call);
    publish(*call);
    return call;
}

// Rows that other ranks read; all rows, where the caller may overwrite its own before they are received.
void LowLatencyBuffer::stage_rows(const LowLatencyDispatchArgs& args, const LowLatencyCall& call) {
    const int64_t hidden = sizes_.hidden, in_bytes = hidden * element_size(args.dtype);
    const int64_t out_bytes = hidden * element_size(row_dtype(args)), num_scales = hidden / kScaleBlock;
    const int rank = geometry_.rank, num_local = geometry_.num_local_experts(), num_topk = args.num_topk;
    const auto* topk_idx = at<const int32_t>(rank, call.sequence, map_.topk_idx_at);
    auto* rows = at<std::byte>(rank, call.sequence, map_.rows_at);
    auto* scales = at<float>(rank, call.sequence, map_.scales_at);
    const auto* x = pointer<const std::byte>(args.x);
    threads_.parallel_rows(args.num_tokens, in_bytes, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const int32_t* routes = topk_idx + t * num_topk;
            const bool needed = std::any_of(routes, routes + num_topk, [&](int32_t expert) {
                return expert >= 0 && (call.staged_own || expert / num_local != rank);
            });
            if (!needed) continue;
            std::byte* row = rows + t * out_bytes;
            if (args.cast != Float8Scale::kNone) {
                quantize_row(reinterpret_cast<uint8_t*>(row), scales + t * num_scales, x + t * in_bytes, hidden,
                             args.dtype, args.cast);
                continue;
            }
            copy_row(row, x + t * in_bytes, in_bytes, false);
            if (args.x_scales != 0) {
                std::memcpy(scales + t * num_scales, pointer<const float>(args.x_scales) + t * num_scales,
                            num_scales * 4);
            }
        }
    });
}

std::shared_ptr<LowLatencyPlan> LowLatencyBuffer::receive_dispatch(const LowLatencyCall& call,
                                                                   const LowLatencyDispatchArgs& args,
                                                                   const LowLatencyDispatchOutputs& out,
                                                                   const LowLatencyWait& wait) {
    auto plan = std::make_shared<LowLatencyPlan>();
    plan->absent = arrive(call, wait);
    plan->sequence = call.sequence;
    plan->num_topk = args.num_topk;
    plan->num_tokens = args.num_tokens;
    const int64_t num_routes = args.num_tokens * args.num_topk;
    const auto* topk_idx = at<const int32_t>(geometry_.rank, call.sequence, map_.topk_idx_at);
    const auto* topk_weights = at<const float>(geometry_.rank, call.sequence, map_.topk_weights_at);
    plan->send_expert.assign(topk_idx, topk_idx + num_routes);
    plan->send_weight.assign(topk_weights, topk_weights + num_routes);
    std::copy(plan->absent.begin(), plan->absent.end(), pointer<uint8_t>(out.absent));
    place_rows(call, out, *plan);
    pull_rows(call, args, out, *plan);
    check_not_left(call, plan->absent, Step::kPulled);
    return plan;
}

// Where each route lands: grouped by expert, then by source rank, then token. Fills the counts of the output.
void LowLatencyBuffer::place_rows(const LowLatencyCall& call, const LowLatencyDispatchOutputs& out,
                                  LowLatencyPlan& plan) const {
    const int num_local = geometry_.num_local_experts(), num_ranks = geometry_.num_ranks;
    const int first = geometry_.rank * num_local, num_topk = plan.num_topk;
    const bool compact = out.alignment > 0;
    std::vector<int64_t> arrived(static_cast<size_t>(num_local) * num_ranks, 0);
    const auto each_route = [&](auto&& body) {
        for (int source = 0; source < num_ranks; ++source) {
            if (plan.absent[source] != 0) continue;
            const int64_t num_routes = header(source, call.sequence).num_tokens * num_topk;
            const auto* experts = at<const int32_t>(source, call.sequence, map_.topk_idx_at);
            for (int64_t route = 0; route < num_routes; ++route) {
                const int local = experts[route] - first;
                if (experts[route] >= 0 && local >= 0 && local < num_local) body(source, route, local);
            }
        }
    };
    each_route([&](int source, int64_t, int local) { ++arrived[local * num_ranks + source]; });

    auto *counts = pointer<int32_t>(out.counts), *offsets = pointer<int32_t>(out.expert_offsets);
    auto *begins = pointer<int32_t>(out.range_begin), *lengths = pointer<int32_t>(out.range_count);
    std::vector<int64_t> next(num_local);  // row of each expert's next route
    int64_t offset = 0;
    for (int e = 0; e < num_local; ++e) {
        next[e] = offset;
        const int64_t block = compact ? out.num_rows - std::min(offset, out.num_rows) : sizes_.max_tokens * num_ranks;
        offsets[e] = static_cast<int32_t>(std::min(offset, out.num_rows));
        int64_t count = 0;
        for (int source = 0; source < num_ranks; ++source) {
            const int64_t begin = std::min(count, block);
            count += arrived[e * num_ranks + source];
            begins[e * num_ranks + source] = static_cast<int32_t>(begin);
            lengths[e * num_ranks + source] = static_cast<int32_t>(std::min(count, block) - begin);
        }
        counts[e] = static_cast<int32_t>(std::min(count, block));
        pointer<int64_t>(out.num_tokens_per_expert)[e] += count;
        offset += compact ? round_up(count, out.alignment) : block;
    }
    offsets[num_local] = static_cast<int32_t>(std::min(offset, out.num_rows));
    *pointer<int32_t>(out.needed) = static_cast<int32_t>(offset);

    int64_t last = -1;
    each_route([&](int source, int64_t route, int local) {
        const int64_t token = source * sizes_.max_tokens + route / num_topk;
        if (token != last) {
            plan.recv_token.push_back(token);
            plan.route_begin.push_back(static_cast<int64_t>(plan.route_slot.size()));
            last = token;
        }
        const int64_t slot = next[local]++;
        plan.route_slot.push_back(slot < out.num_rows ? slot : -1);
        plan.route_k.push_back(static_cast<int8_t>(route % num_topk));
        plan.route_weight.push_back(at<const float>(source, call.sequence, map_.topk_weights_at)[route]);
    });
    plan.route_begin.push_back(static_cast<int64_t>(plan.route_slot.size()));
}

void LowLatencyBuffer::pull_rows(const LowLatencyCall& call, const LowLatencyDispatchArgs& args,
                                 const LowLatencyDispatchOutputs& out, const LowLatencyPlan& plan) {
    const int64_t bytes = sizes_.hidden * element_size(row_dtype(args));
    const int64_t scale_bytes = sizes_.hidden / kScaleBlock * 4;
    auto *x = pointer<std::byte>(out.x), *scales = pointer<std::byte>(out.x_scales);
    const auto num_rows = static_cast<int64_t>(plan.route_slot.size());
    const bool streamed = num_rows * bytes >= kStreamedBytes;
    threads_.parallel_rows(static_cast<int64_t>(plan.recv_token.size()), bytes, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const auto source = static_cast<int>(plan.recv_token[i] / sizes_.max_tokens);
            const int64_t token = plan.recv_token[i] % sizes_.max_tokens;
            const bool in_place = source == geometry_.rank && !call.staged_own;
            const auto* row =
                in_place ? pointer<const std::byte>(args.x) : at<const std::byte>(source, call.sequence, map_.rows_at);
            const auto* row_scales = in_place ? pointer<const std::byte>(args.x_scales)
                                              : at<const std::byte>(source, call.sequence, map_.scales_at);
            for (int64_t r = plan.route_begin[i]; r < plan.route_begin[i + 1]; ++r) {
                const int64_t slot = plan.route_slot[r];
                if (slot < 0) continue;
                copy_row(x + slot * bytes, row + token * bytes, bytes, streamed);
                if (scales != nullptr) {
                    std::memcpy(scales + slot * scale_bytes, row_scales + token * scale_bytes, scale_bytes);
                }
            }
        }
        finish_streaming();
    });
    if (out.alignment == 0) return;
    const auto *offsets = pointer<const int32_t>(out.expert_offsets), *counts = pointer<const int32_t>(out.counts);
    for (int e = 0; e < geometry_.num_local_experts(); ++e) {
        const int64_t end = int64_t{offsets[e]} + counts[e], padding = offsets[e + 1] - end;
        std::memset(x + end * bytes, 0, padding * bytes);
        if (scales != nullptr) std::memset(scales + end * scale_bytes, 0, padding * scale_bytes);
    }
}

}  // namespace ray_deepep
