// Low-latency combine: expert outputs back to their tokens, weighted and added up in float32 in a fixed order.
#include <algorithm>
#include <cstring>
#include <vector>

#include "host/host_buffer.h"
#include "host/low_latency.h"
#include "host/rows.h"

namespace ray_deepep {
namespace {

constexpr int64_t kRowGrain = 8;

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Ranks that hold experts of one token, ascending; `routes` is its row of LowLatencyPlan::send_expert.
void ranks_of(const int32_t* routes, int num_topk, int num_local, std::vector<int>* ranks) {
    ranks->clear();
    for (int k = 0; k < num_topk; ++k) {
        if (routes[k] >= 0) ranks->push_back(routes[k] / num_local);
    }
    std::sort(ranks->begin(), ranks->end());
    ranks->erase(std::unique(ranks->begin(), ranks->end()), ranks->end());
}

}  // namespace

std::shared_ptr<LowLatencyCall> LowLatencyBuffer::send_combine(const LowLatencyCombineArgs& args,
                                                               const LowLatencyPlan& plan) {
    const auto call = begin(Operation::kLowLatencyCombine);
    LowLatencyHeader& own = header(geometry_.rank, call->sequence);
    own.dtype = args.dtype;
    own.num_topk = plan.num_topk;
    own.num_tokens = plan.num_tokens;
    own.reduce = args.reduce;
    own.plan_sequence = plan.sequence;
    auto* staged = at<std::byte>(geometry_.rank, call->sequence, map_.rows_at);
    args.reduce == Reduce::kFast ? stage_sums(args, plan, staged) : stage_routes(args, plan, staged);
    publish(*call);
    return call;
}

// One row per (source rank, token): its experts of this rank, in k order.
void LowLatencyBuffer::stage_sums(const LowLatencyCombineArgs& args, const LowLatencyPlan& plan, std::byte* staged) {
    const int64_t bytes = sizes_.hidden * element_size(args.dtype);
    const auto* rows = pointer<const std::byte>(args.rows);
    threads_.parallel_for(static_cast<int64_t>(plan.recv_token.size()), kRowGrain, [&](int64_t begin, int64_t end) {
        RowSum sum(sizes_.hidden, args.dtype, false);
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t r = plan.route_begin[i]; r < plan.route_begin[i + 1]; ++r) {
                if (plan.route_slot[r] >= 0) sum.add_scaled(rows + plan.route_slot[r] * bytes, plan.route_weight[r]);
            }
            sum.take(staged + plan.recv_token[i] * bytes);
        }
    });
}

// One row per route, at (source rank, token, k).
void LowLatencyBuffer::stage_routes(const LowLatencyCombineArgs& args, const LowLatencyPlan& plan, std::byte* staged) {
    const int64_t bytes = sizes_.hidden * element_size(args.dtype);
    const auto* rows = pointer<const std::byte>(args.rows);
    threads_.parallel_for(static_cast<int64_t>(plan.recv_token.size()), kRowGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t r = plan.route_begin[i]; r < plan.route_begin[i + 1]; ++r) {
                std::byte* to = staged + (plan.recv_token[i] * plan.num_topk + plan.route_k[r]) * bytes;
                // No room was left for this route, so its expert had no row: it counts as zeros.
                if (plan.route_slot[r] < 0) {
                    std::memset(to, 0, bytes);
                } else {
                    copy_row(to, rows + plan.route_slot[r] * bytes, bytes, false);
                }
            }
        }
    });
}

void LowLatencyBuffer::receive_combine(const LowLatencyCall& call, const LowLatencyCombineArgs& args,
                                       const LowLatencyPlan& plan, const LowLatencyCombineOutputs& out,
                                       const LowLatencyWait& wait) {
    std::vector<uint8_t> absent = arrive(call, wait);
    // A rank whose rows this rank left out at dispatch has sent nothing that belongs to this plan.
    for (int rank = 0; rank < geometry_.num_ranks; ++rank) absent[rank] |= plan.absent[rank];
    std::copy(absent.begin(), absent.end(), pointer<uint8_t>(out.absent));
    const int num_topk = plan.num_topk, num_local = geometry_.num_local_experts();
    const int64_t bytes = sizes_.hidden * element_size(args.dtype), first_token = geometry_.rank * sizes_.max_tokens;
    const auto* weights = args.topk_weights != 0 ? pointer<const float>(args.topk_weights) : plan.send_weight.data();
    std::vector<const std::byte*> staged(geometry_.num_ranks);
    for (int rank = 0; rank < geometry_.num_ranks; ++rank) {
        staged[rank] = at<const std::byte>(rank, call.sequence, map_.rows_at);
    }
    threads_.parallel_for(plan.num_tokens, kRowGrain, [&](int64_t begin, int64_t end) {
        RowSum sum(sizes_.hidden, args.dtype, false);
        std::vector<int> ranks;
        for (int64_t t = begin; t < end; ++t) {
            const int32_t* routes = &plan.send_expert[t * num_topk];
            if (args.reduce == Reduce::kFast) {
                ranks_of(routes, num_topk, num_local, &ranks);
                for (const int rank : ranks) {
                    if (absent[rank] == 0) sum.add(staged[rank] + (first_token + t) * bytes);
                }
            } else {
                for (int k = 0; k < num_topk; ++k) {
                    if (routes[k] < 0 || absent[routes[k] / num_local] != 0) continue;
                    const int64_t row = (first_token + t) * num_topk + k;
                    sum.add_scaled(staged[routes[k] / num_local] + row * bytes, weights[t * num_topk + k]);
                }
            }
            sum.take(pointer<std::byte>(out.x) + t * bytes);
        }
    });
    check_not_left(call, absent, Step::kPulled);
}

}  // namespace ray_deepep
