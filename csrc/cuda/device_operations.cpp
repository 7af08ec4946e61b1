// The operations of a device buffer: what each publishes, and its launches.
#include <algorithm>
#include <type_traits>

#include "cuda/check.h"
#include "cuda/device_buffer.h"

namespace ray_deepep {

std::vector<uintptr_t> DeviceBuffer::symm_addresses() const {
    std::vector<uintptr_t> addresses;
    for (int rank = 0; rank < sizes_.num_ranks; ++rank) {
        addresses.push_back(reinterpret_cast<uintptr_t>(peers_.segments[rank]) + layout_.symm_at);
    }
    return addresses;
}

int64_t DeviceBuffer::offset_in_heap(uintptr_t address) const {
    const uintptr_t first = symm_address();
    if (address < first || address >= first + static_cast<uintptr_t>(layout_.symm_bytes)) return -1;
    return static_cast<int64_t>(address - first) + layout_.symm_at;
}

namespace {

// Arrays of a plan and their sizes, in the order in which they lie in memory.
template <typename Visit>
void visit_plan(const DeviceSizes& sizes, DevicePlan& plan, Visit visit) {
    const int64_t received = plan.max_recv_tokens, routes = int64_t{plan.num_tokens} * plan.num_topk;
    visit(plan.counts, kNumPlanCounts + 2 * sizes.num_local_experts() + 1);
    visit(plan.source_start, sizes.num_parts * sizes.num_ranks + 1);
    visit(plan.recv_source, received);
    visit(plan.recv_token, received);
    visit(plan.recv_slot, received * plan.num_topk);
    visit(plan.recv_weight, received * plan.num_topk);
    visit(plan.slot_row, plan.max_rows);
    visit(plan.send_expert, routes);
    visit(plan.send_row, routes);
    visit(plan.send_slot, routes);
    visit(plan.send_weight, routes);
}

}  // namespace

int64_t DeviceBuffer::plan_ints(int64_t num_tokens, int num_topk, int64_t max_recv_tokens, int64_t max_rows) const {
    DevicePlan plan;
    plan.num_tokens = static_cast<int>(num_tokens);
    plan.num_topk = num_topk;
    plan.max_recv_tokens = max_recv_tokens;
    plan.max_rows = max_rows;
    int64_t total = 0;
    visit_plan(sizes_, plan, [&](auto*&, int64_t size) { total += size; });
    return total;
}

DevicePlan DeviceBuffer::make_plan(uintptr_t address, const DevicePlan& sizes) const {
    DevicePlan plan = sizes;
    auto next = address;
    visit_plan(sizes_, plan, [&](auto*& array, int64_t size) {
        array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(next);
        next += size * sizeof(int32_t);
    });
    return plan;
}

Publication DeviceBuffer::publication(Operation operation, const Signature& signature, const DevicePlan& plan) const {
    Publication publication;
    publication.operation = static_cast<uint32_t>(operation);
    publication.signature = signature.hash();
    std::copy(signature.fields.begin(), signature.fields.end(), publication.fields);
    publication.num_tokens = plan.num_tokens;
    return publication;
}

// Rows in the heap are read there, others are staged while they are read. With one rank nobody reads them.
Publication DeviceBuffer::dispatch_publication(const DeviceDispatchArgs& args, const DevicePlan& plan, bool cached,
                                               Staging* staging) const {
    const int64_t room = plan.fixed ? plan.max_rows : plan.capacity;
    const Signature signature{{static_cast<int32_t>(Operation::kDispatch), static_cast<int32_t>(args.dtype),
                               plan.num_topk, static_cast<int32_t>(plan.layout), static_cast<int32_t>(plan.alignment),
                               static_cast<int32_t>(room), cached ? 1 : 0, args.scale_by_weights ? 1 : 0}};
    Publication result = publication(Operation::kDispatch, signature, plan);
    const bool cast = args.x_dtype != args.dtype;
    if (!cast) result.rows_at = offset_in_heap(args.x);
    if (result.rows_at >= 0) result.scales_at = offset_in_heap(args.x_scales);
    const bool in_heap = result.rows_at >= 0 && (args.x_scales == 0 || result.scales_at >= 0);
    if (plan.num_tokens == 0 || in_heap || (sizes_.num_ranks == 1 && !cast)) return result;
    result.staged = true;
    // Only scales, where the rows are in the heap.
    staging->rows = result.rows_at >= 0 ? nullptr : pointer<const std::byte>(args.x);
    staging->scales = cast ? nullptr : pointer<const float>(args.x_scales);
    staging->row_bytes = sizes_.hidden * element_size(args.dtype);
    staging->scale_bytes = sizes_.hidden / 128 * 4;
    staging->hidden = sizes_.hidden;
    staging->num_rows = plan.num_tokens;
    staging->from = args.x_dtype;
    staging->cast = cast;
    staging->power_of_two = args.power_of_two;
    return result;
}

void DeviceBuffer::begin_dispatch(const DeviceDispatchArgs& args, const DevicePlan& plan, bool report,
                                  cudaStream_t stream) {
    check();
    stream_ = stream;
    Staging staging;
    PublishParams publish;
    publish.peers = peers_;
    publish.publication = dispatch_publication(args, plan, false, &staging);
    publish.has_routing = true;
    publish.topk_idx = pointer<const int64_t>(args.topk_idx);
    publish.topk_weights = pointer<const float>(args.topk_weights);
    publish.locations = pointer<const int32_t>(args.locations);
    publish.capacity = capacity_ = plan.capacity;
    publish.num_topk = plan.num_topk;
    launch_publish(publish, stream);
    if (plan.layout == LayoutKind::kPadded) {
        const size_t bytes = plan.max_rows * sizeof(int32_t);
        check_cuda(cudaMemsetAsync(plan.slot_row, 0xff, bytes, stream), "cudaMemsetAsync");
        if (args.out_topk_weights != 0) {
            check_cuda(cudaMemsetAsync(pointer<void>(args.out_topk_weights), 0, bytes, stream), "cudaMemsetAsync");
        }
    }
    PlanParams params;
    params.peers = peers_;
    params.plan = plan;
    params.ticket = report ? ++ticket_ : 0;
    params.topk_idx = pointer<int64_t>(args.out_topk_idx);
    params.topk_weights = pointer<float>(args.out_topk_weights);
    launch_plan(params, stream);
}

void DeviceBuffer::pull_dispatch(const DeviceDispatchArgs& args, const DevicePlan& plan, bool cached, int64_t room,
                                 int num_sms, cudaStream_t stream) {
    if (cached) check();
    PullParams pull;
    pull.peers = peers_;
    pull.publication = dispatch_publication(args, plan, cached, &pull.staging);
    pull.publication.by_main = cached;
    pull.plan = plan;
    pull.room = room;
    if (!pull.staging.cast) {
        pull.own_rows = pointer<const std::byte>(args.x);
        pull.own_scales = pointer<const float>(args.x_scales);
    }
    pull.out = pointer<std::byte>(args.out_x);
    pull.out_scales = pointer<float>(args.out_scales);
    pull.row_bytes = sizes_.hidden * element_size(args.dtype);
    pull.scale_bytes = sizes_.hidden / 128 * 4;
    pull.dtype = args.dtype;
    pull.scale_by_weights = args.scale_by_weights;
    pull.num_sms = num_sms;
    launch_pull(pull, bulk_copy_, stream);
}

Publication DeviceBuffer::combine_publication(const DeviceCombineArgs& args, const DevicePlan& plan, bool fast,
                                              Staging* staging) const {
    const auto operation = args.has_rows ? Operation::kCombine : Operation::kCombineWeights;
    const Signature signature{{static_cast<int32_t>(operation), static_cast<int32_t>(args.dtype), plan.num_topk,
                               static_cast<int32_t>(plan.layout), static_cast<int32_t>(args.reduce),
                               args.weighted ? 1 : 0, args.has_row_weights ? 1 : 0, 0}};
    Publication result = publication(operation, signature, plan);
    result.by_main = args.has_rows && !args.has_row_weights;
    if (!args.has_rows) return result;
    if (!fast) result.rows_at = offset_in_heap(args.rows);
    if (args.num_rows == 0 || result.rows_at >= 0 || sizes_.num_ranks == 1) return result;
    result.staged = true;
    staging->rows = pointer<const std::byte>(args.rows);
    staging->row_bytes = sizes_.hidden * element_size(args.dtype);
    // Per-rank sums have token rows, which the host need not know.
    const bool by_rank = fast || plan.layout == LayoutKind::kTokenMajor;
    staging->num_rows = by_rank ? plan.max_recv_tokens : std::min(args.num_rows, sizes_.max_rows);
    return result;
}

void DeviceBuffer::combine(const DeviceCombineArgs& args, const DevicePlan& plan, int num_sms, cudaStream_t stream) {
    check();
    const bool token_major = plan.layout == LayoutKind::kTokenMajor;
    const bool fast = args.has_rows && args.reduce == Reduce::kFast && !token_major;
    CombineParams params;
    params.peers = peers_;
    params.publication = combine_publication(args, plan, fast, &params.staging);
    params.plan = plan;
    if (!params.publication.by_main) {
        PublishParams publish;
        publish.peers = peers_;
        publish.publication = params.publication;
        publish.row_weights = pointer<const float>(args.row_weights);
        // With fixed shapes there may be more than any rank can receive; no peer reads those.
        const int64_t room = token_major ? plan.max_recv_tokens * plan.num_topk : sizes_.max_rows;
        publish.num_row_weights = std::min(args.num_row_weights, room);
        publish.num_topk = plan.num_topk;
        launch_publish(publish, stream);
    }
    params.own_rows = pointer<const std::byte>(args.rows);
    params.bias = pointer<const std::byte>(args.bias);
    params.out = pointer<std::byte>(args.out_x);
    params.routes = pointer<std::byte>(args.out_routes);
    params.topk_weights = pointer<float>(args.out_topk_weights);
    params.hidden = sizes_.hidden;
    params.dtype = args.dtype;
    params.has_rows = args.has_rows;
    params.weighted = args.weighted;
    params.by_rank = token_major || fast;
    params.fast = fast;
    params.by_expert = args.reduce == Reduce::kExpertOrder;
    params.num_sms = num_sms;
    launch_combine(params, stream);
}

}  // namespace ray_deepep
