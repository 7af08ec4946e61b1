#include "cuda/device_buffer.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "common/deadline.h"
#include "cuda/check.h"

namespace ray_deepep {
namespace {

constexpr double kLookEvery_s = 0.05;
constexpr double kKernelGrace_s = 1.0;

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

uint32_t read_volatile(const uint32_t& word) { return *const_cast<const volatile uint32_t*>(&word); }

}  // namespace

DeviceBuffer::DeviceBuffer(std::shared_ptr<Domain> domain, const DeviceSizes& sizes, HeapProvider provider,
                           double bootstrap_deadline_s, double deadline_s, Interrupt interrupt)
    : domain_(std::move(domain)),
      sizes_(sizes),
      layout_(make_segment_layout(sizes)),
      deadline_s_(deadline_s),
      interrupt_(std::move(interrupt)) {
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    const AgreedSizes agreed{{"num_experts", "hidden", "num_topk", "max_tokens", "max_rows"},
                             {static_cast<uint64_t>(sizes.num_experts), static_cast<uint64_t>(sizes.hidden),
                              static_cast<uint64_t>(sizes.num_topk), static_cast<uint64_t>(sizes.max_tokens),
                              static_cast<uint64_t>(sizes.max_rows)}};
    heap_ = allocate_device_heap(*domain_, provider, device, layout_.bytes, agreed, bootstrap_deadline_s);

    const int num_local = sizes.num_local_experts();
    const int64_t num_chunks = sizes.num_chunks(), num_ranks = sizes.num_ranks;
    const int64_t counts[] = {num_ranks, num_ranks * num_chunks, num_ranks * num_chunks * num_local,
                              num_chunks * num_ranks, num_chunks * sizes.num_experts};
    int64_t total = 0;
    for (const int64_t count : counts) total += count;
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&scratch_memory_), std::max<int64_t>(total, 1) * 4), "cudaMalloc");
    int32_t* next = scratch_memory_;
    int32_t** const fields[] = {&scratch_.num_tokens, &scratch_.recv_row_base, &scratch_.recv_slot_base,
                                &scratch_.send_row_base, &scratch_.send_slot_base};
    for (int i = 0; i < 5; ++i) {
        *fields[i] = next;
        next += counts[i];
    }
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&control_), sizeof(DeviceControl)), "cudaMalloc");
    check_cuda(cudaMemset(control_, 0, sizeof(DeviceControl)), "cudaMemset");
    const size_t status_bytes = sizeof(HostStatus) + (2 * num_local + 1) * sizeof(int32_t);
    check_cuda(cudaHostAlloc(reinterpret_cast<void**>(&status_), status_bytes, cudaHostAllocMapped), "cudaHostAlloc");
    *status_ = HostStatus{};

    for (int rank = 0; rank < sizes.num_ranks; ++rank) peers_.segments[rank] = heap_.segments[rank]->data();
    peers_.layout = layout_;
    peers_.control = control_;
    peers_.status = status_;
    peers_.deadline_ns = static_cast<uint64_t>(deadline_s * 1e9);
    peers_.rank = sizes.rank;
    peers_.num_ranks = sizes.num_ranks;
    peers_.num_experts = sizes.num_experts;
    peers_.num_local_experts = num_local;
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    open_ = true;
}

void DeviceBuffer::close() {
    if (!open_) return;
    open_ = false;
    // Kernels in flight may wait for a peer: tell them to stop, or freeing would wait for their deadline.
    status_->abort = 1;
    cudaDeviceSynchronize();
    heap_.segments.clear();
    free_memory();
}

void DeviceBuffer::free_memory() {
    cudaFree(control_);
    cudaFree(scratch_memory_);
    cudaFreeHost(status_);
    control_ = nullptr;
    scratch_memory_ = nullptr;
    status_ = nullptr;
}

uint32_t DeviceBuffer::Signature::hash() const {
    uint32_t hash = 2166136261u;
    for (const int32_t field : fields) hash = (hash ^ static_cast<uint32_t>(field)) * 16777619u;
    return hash;
}

DeviceBuffer::Signature DeviceBuffer::dispatch_signature(const DeviceDispatchArgs& args, const DevicePlan& plan,
                                                         bool cached) const {
    return Signature{{static_cast<int32_t>(Operation::kDispatch), static_cast<int32_t>(args.dtype), plan.num_topk,
                      static_cast<int32_t>(plan.layout), static_cast<int32_t>(plan.alignment),
                      static_cast<int32_t>(plan.capacity), cached ? 1 : 0, args.scale_by_weights ? 1 : 0}};
}

void DeviceBuffer::begin_dispatch(const DeviceDispatchArgs& args, const DevicePlan& plan, bool report, int num_sms,
                                  cudaStream_t stream) {
    check();
    const Signature signature = dispatch_signature(args, plan, false);
    StageRowsParams stage{peers_};
    stage.rows = pointer<const std::byte>(args.x);
    stage.scales = pointer<const float>(args.x_scales);
    stage.row_bytes = sizes_.hidden * element_size(args.dtype);
    stage.scale_bytes = sizes_.hidden / 128 * 4;
    stage.num_rows = plan.num_tokens;
    stage.num_sms = num_sms;
    launch_stage_rows(stage, stream);

    PublishParams publish{peers_};
    publish.topk_idx = pointer<const int64_t>(args.topk_idx);
    publish.topk_weights = pointer<const float>(args.topk_weights);
    publish.locations = pointer<const int32_t>(args.locations);
    publish.num_tokens = plan.num_tokens;
    publish.num_topk = plan.num_topk;
    publish.signature = signature.hash();
    std::copy_n(signature.fields, 8, publish.fields);
    launch_publish(publish, stream);

    check_cuda(cudaMemsetAsync(plan.slot_row, 0xff, plan.max_rows * sizeof(int32_t), stream), "cudaMemsetAsync");
    PlanParams params{peers_, plan, scratch_};
    params.num_chunks = static_cast<int>(sizes_.num_chunks());
    params.signature = signature.hash();
    params.ticket = report ? ++ticket_ : 0;
    params.topk_idx = pointer<int64_t>(args.out_topk_idx);
    params.topk_weights = pointer<float>(args.out_topk_weights);
    launch_plan(params, stream);
}

void DeviceBuffer::begin_cached_dispatch(const DeviceDispatchArgs& args, const DevicePlan& plan, int num_sms,
                                         cudaStream_t stream) {
    check();
    const Signature signature = dispatch_signature(args, plan, true);
    StageRowsParams stage{peers_};
    stage.rows = pointer<const std::byte>(args.x);
    stage.scales = pointer<const float>(args.x_scales);
    stage.row_bytes = sizes_.hidden * element_size(args.dtype);
    stage.scale_bytes = sizes_.hidden / 128 * 4;
    stage.num_rows = plan.num_tokens;
    stage.num_sms = num_sms;
    launch_stage_rows(stage, stream);
    PublishParams publish{peers_};
    publish.num_tokens = plan.num_tokens;
    publish.num_topk = plan.num_topk;
    publish.signature = signature.hash();
    std::copy_n(signature.fields, 8, publish.fields);
    launch_publish(publish, stream);
}

PlanCounts DeviceBuffer::wait_counts() {
    // The kernels have the deadline; ours is a little later, for a GPU that does not run them.
    const Deadline deadline(deadline_s_ + kKernelGrace_s);
    double next_look_s = kLookEvery_s;
    while (read_volatile(status_->counts_ready) != ticket_) {
        check();
        if (deadline.elapsed_s() < next_look_s) {
            ::sched_yield();
            continue;
        }
        next_look_s = deadline.elapsed_s() + kLookEvery_s;
        for (int peer = 0; peer < sizes_.num_ranks; ++peer) {
            // End the kernel's wait for a process that is gone; its report then says for whom it waited.
            if (peer != sizes_.rank && domain_->peer_is_gone(peer)) status_->abort = 1;
        }
        if (interrupt_) interrupt_();
        if (deadline.expired()) {
            FaultRecord record;
            record.operation = Operation::kDispatch;
            record.phase = "wait_counts";
            record.cause = Cause::kTimeout;
            record.rank = record.peer = sizes_.rank;
            record.elapsed_s = deadline.elapsed_s();
            record.deadline_s = deadline_s_;
            throw FaultError(record);
        }
    }
    if (status_->bad_expert != 0) {
        const int expert = std::exchange(status_->bad_expert, 0) - 1;
        throw ArgumentError("topk_idx", std::to_string(expert),
                            "must be in [-1, " + std::to_string(sizes_.num_experts) + ")");
    }
    const auto* counts = reinterpret_cast<const int32_t*>(status_ + 1);
    const int num_local = sizes_.num_local_experts();
    PlanCounts result;
    result.num_recv_tokens = status_->num_recv_tokens;
    result.num_rows = status_->num_rows;
    result.overflow = read_volatile(status_->overflow) != 0;
    result.expert_count.assign(counts, counts + num_local);
    result.expert_offset.assign(counts + num_local, counts + 2 * num_local + 1);
    status_->overflow = 0;
    return result;
}

void DeviceBuffer::pull_dispatch(const DeviceDispatchArgs& args, const DevicePlan& plan, bool cached, int num_sms,
                                 cudaStream_t stream) {
    PullParams pull{peers_, plan};
    pull.own_rows = pointer<const std::byte>(args.x);
    pull.own_scales = pointer<const float>(args.x_scales);
    pull.out = pointer<std::byte>(args.out_x);
    pull.out_scales = pointer<float>(args.out_scales);
    pull.row_bytes = sizes_.hidden * element_size(args.dtype);
    pull.scale_bytes = sizes_.hidden / 128 * 4;
    pull.hidden = sizes_.hidden;
    pull.dtype = args.dtype;
    pull.scale_by_weights = args.scale_by_weights;
    pull.wait = cached;
    pull.signature = dispatch_signature(args, plan, cached).hash();
    pull.num_sms = num_sms;
    launch_pull(pull, stream);
}

void DeviceBuffer::combine(const DeviceCombineArgs& args, const DevicePlan& plan, int num_sms, cudaStream_t stream) {
    check();
    const bool token_major = plan.layout == LayoutKind::kTokenMajor;
    const bool reduce_local = args.has_rows && args.reduce == Reduce::kFast && !token_major;
    const auto operation = args.has_rows ? Operation::kCombine : Operation::kCombineWeights;
    const Signature signature{{static_cast<int32_t>(operation), static_cast<int32_t>(args.dtype), plan.num_topk,
                               static_cast<int32_t>(plan.layout), static_cast<int32_t>(args.reduce),
                               args.weighted ? 1 : 0, args.has_row_weights ? 1 : 0, 0}};
    if (reduce_local) {
        ReduceLocalParams reduce{peers_, plan};
        reduce.rows = pointer<const std::byte>(args.rows);
        reduce.hidden = sizes_.hidden;
        reduce.dtype = args.dtype;
        reduce.weighted = args.weighted;
        reduce.num_sms = num_sms;
        launch_reduce_local(reduce, stream);
    } else if (args.has_rows) {
        StageRowsParams stage{peers_};
        stage.rows = pointer<const std::byte>(args.rows);
        stage.row_bytes = sizes_.hidden * element_size(args.dtype);
        stage.num_rows = args.num_rows;
        stage.slot_row = token_major ? nullptr : plan.slot_row;
        stage.num_sms = num_sms;
        launch_stage_rows(stage, stream);
    }
    PublishParams publish{peers_};
    publish.row_weights = pointer<const float>(args.row_weights);
    publish.num_row_weights = args.num_row_weights;
    publish.num_tokens = plan.num_tokens;
    publish.num_topk = plan.num_topk;
    publish.signature = signature.hash();
    std::copy_n(signature.fields, 8, publish.fields);
    launch_publish(publish, stream);

    CombineParams params{peers_, plan};
    params.own_rows = reduce_local ? nullptr : pointer<const std::byte>(args.rows);
    params.bias = pointer<const std::byte>(args.bias);
    params.out = pointer<std::byte>(args.out_x);
    params.routes = pointer<std::byte>(args.out_routes);
    params.topk_weights = pointer<float>(args.out_topk_weights);
    params.hidden = sizes_.hidden;
    params.dtype = args.dtype;
    params.has_rows = args.has_rows;
    params.weighted = args.weighted;
    params.by_rank = token_major || args.reduce == Reduce::kFast;
    params.by_expert = args.reduce == Reduce::kExpertOrder;
    params.signature = signature.hash();
    params.num_sms = num_sms;
    launch_combine(params, stream);
}

void DeviceBuffer::check() {
    if (!open_) throw ArgumentError("buffer", "closed", "must be open");
    const uint32_t fault = read_volatile(status_->fault);
    if (fault == 3) throw_mismatch();
    if (fault != 0) throw_fault();
}

void DeviceBuffer::throw_fault() {
    FaultRecord record;
    record.operation = static_cast<Operation>(status_->operation);
    record.sequence = status_->sequence;
    record.phase = "wait_published";
    record.rank = sizes_.rank;
    record.peer = status_->peer;
    record.expected = status_->expected;
    record.seen = status_->seen;
    record.elapsed_s = static_cast<double>(status_->elapsed_ns) * 1e-9;
    record.deadline_s = deadline_s_;
    const bool gone = record.peer != sizes_.rank && domain_->peer_is_gone(record.peer);
    record.cause = gone ? Cause::kPeerDied : (status_->fault == 2 ? Cause::kAborted : Cause::kTimeout);
    throw FaultError(record);
}

// All ranks see the difference in the same operation: each names the field, and the buffer can go on.
void DeviceBuffer::throw_mismatch() {
    static const char* const kFields[] = {"operation",
                                          "dtype",
                                          "num_topk",
                                          "layout",
                                          "reduce or alignment",
                                          "weighted or capacity",
                                          "handle or topk_weights",
                                          "scale_by_weights"};
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    AreaHeader headers[2];
    const int ranks[] = {0, status_->peer == 0 ? sizes_.rank : status_->peer};
    const int64_t at = layout_.area_at[status_->sequence & 1] + layout_.area.header_at;
    for (int i = 0; i < 2; ++i) {
        check_cuda(
            cudaMemcpy(&headers[i], heap_.segments[ranks[i]]->data() + at, sizeof(AreaHeader), cudaMemcpyDefault),
            "cudaMemcpy of a header");
    }
    const auto operation = static_cast<Operation>(status_->operation);
    status_->fault = 0;
    check_cuda(cudaMemset(&control_->failed, 0, sizeof(uint32_t)), "cudaMemset");
    for (int i = 0; i < 8; ++i) {
        if (headers[0].fields[i] == headers[1].fields[i]) continue;
        throw MismatchError(operation, ranks[1], kFields[i], std::to_string(headers[0].fields[i]),
                            std::to_string(headers[1].fields[i]));
    }
    throw MismatchError(operation, ranks[1], "arguments", "those of rank 0", "others");
}

}  // namespace ray_deepep
