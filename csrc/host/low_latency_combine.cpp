// Low-latency combine: expert outputs back to their tokens, weighted and added up in float32 in a fixed order.
#include <algorithm>
#include <cstring>
#include <vector>

#include "host/host_buffer.h"
#include "host/low_latency.h"
#include "host/rows.h"

namespace ray_deepep {
namespace {

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

// The row of each route, at (source rank, token, k).
void show_slots(const LowLatencyPlan& plan, int64_t* slots) {
    for (size_t i = 0; i < plan.recv_token.size(); ++i) {
        for (int64_t r = plan.route_begin[i]; r < plan.route_begin[i + 1]; ++r) {
            slots[plan.recv_token[i] * plan.num_topk + plan.route_k[r]] = plan.route_slot[r];
        }
    }
}

}  // namespace

int64_t LowLatencyBuffer::offset_of_rows(const LowLatencyCombineArgs& args) const {
    const auto begin = reinterpret_cast<uintptr_t>(symm_.data);
    if (args.rows < begin || args.rows >= begin + symm_.bytes) {
        throw ArgumentError("rows", "elsewhere", "must lie in the heap, with zero_copy");
    }
    return static_cast<int64_t>(args.rows - begin);
}

// Null: there was no room for the route. `route`: (source rank, token, k), which `rank` has an expert for.
const std::byte* LowLatencyBuffer::route_row(int rank, uint32_t sequence, int64_t route, int64_t row_bytes) const {
    const LowLatencyHeader& from = header(rank, sequence);
    const auto* staged = at<const std::byte>(rank, sequence, map_.rows_at);
    if (from.rows_at < 0) return staged + route * row_bytes;
    const int64_t slot = reinterpret_cast<const int64_t*>(staged)[route];
    if (slot < 0) return nullptr;
    const std::byte* own_segment = symm_.heap->segments[geometry_.rank].data();
    return symm_.heap->segments[rank].data() + (symm_.data - own_segment) + from.rows_at + slot * row_bytes;
}

std::shared_ptr<LowLatencyCall> LowLatencyBuffer::send_combine(const LowLatencyCombineArgs& args,
                                                               const LowLatencyPlan& plan) {
    const int64_t rows_at = args.zero_copy ? offset_of_rows(args) : -1;
    const auto call = begin(Operation::kLowLatencyCombine);
    LowLatencyHeader& own = header(geometry_.rank, call->sequence);
    own.dtype = args.dtype;
    own.num_topk = plan.num_topk;
    own.num_tokens = plan.num_tokens;
    own.reduce = args.reduce;
    own.plan_sequence = plan.sequence;
    own.rows_at = rows_at;
    auto* staged = at<std::byte>(geometry_.rank, call->sequence, map_.rows_at);
    if (args.zero_copy) {
        show_slots(plan, reinterpret_cast<int64_t*>(staged));
    } else {
        args.reduce == Reduce::kFast ? stage_sums(args, plan, staged) : stage_routes(args, plan, staged);
    }
    publish(*call);
    return call;
}

// One row per (source rank, token): its experts of this rank, in k order.
void LowLatencyBuffer::stage_sums(const LowLatencyCombineArgs& args, const LowLatencyPlan& plan, std::byte* staged) {
    const int64_t bytes = sizes_.hidden * element_size(args.dtype);
    const auto* rows = pointer<const std::byte>(args.rows);
    threads_.parallel_rows(static_cast<int64_t>(plan.recv_token.size()), bytes, [&](int64_t begin, int64_t end) {
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
    threads_.parallel_rows(static_cast<int64_t>(plan.recv_token.size()), bytes, [&](int64_t begin, int64_t end) {
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
    threads_.parallel_rows(plan.num_tokens, bytes, [&](int64_t begin, int64_t end) {
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
                    const int64_t route = (first_token + t) * num_topk + k;
                    const std::byte* row = route_row(routes[k] / num_local, call.sequence, route, bytes);
                    if (row != nullptr) sum.add_scaled(row, weights[t * num_topk + k]);
                }
            }
            sum.take(pointer<std::byte>(out.x) + t * bytes);
        }
    });
    check_not_left(call, absent, args.zero_copy ? Step::kPulledInPlace : Step::kPulled);
}

}  // namespace ray_deepep
