// Making low-latency buffers, and their two operations.
#include "cuda/device_low_latency.h"

#include <algorithm>
#include <string>
#include <utility>

namespace ray_deepep {
namespace {

constexpr int kMaxExperts = 8192;  // blocks count them in shared memory

uint32_t hash_of(const int32_t* fields, int count) {
    uint32_t hash = 2166136261u;
    for (int i = 0; i < count; ++i) hash = (hash ^ static_cast<uint32_t>(fields[i])) * 16777619u;
    return hash;
}

}  // namespace

DeviceLowLatency::DeviceLowLatency(std::shared_ptr<Domain> domain, const DeviceLowLatencySizes& sizes,
                                   const HeapSource& source, SymmRoom symm, double bootstrap_deadline_s,
                                   Interrupt interrupt)
    : domain_(std::move(domain)),
      sizes_(sizes),
      layout_(make_low_latency_layout(sizes)),
      symm_(std::move(symm)),
      interrupt_(std::move(interrupt)),
      admitted_(sizes.num_ranks, 0),
      admissions_(sizes.num_ranks, 0) {
    if (sizes.num_experts > kMaxExperts) {
        throw ArgumentError("num_experts", std::to_string(sizes.num_experts),
                            "must be at most " + std::to_string(kMaxExperts) + " for low-latency calls on GPUs");
    }
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    const AgreedSizes agreed{{"num_experts", "hidden", "num_topk", "low_latency_max_tokens", "max_element_size"},
                             {static_cast<uint64_t>(sizes.num_experts), static_cast<uint64_t>(sizes.hidden),
                              static_cast<uint64_t>(sizes.num_topk), static_cast<uint64_t>(sizes.max_tokens),
                              static_cast<uint64_t>(sizes.max_element_size)}};
    heap_ = allocate_device_heap(*domain_, source, device, layout_.bytes, agreed, bootstrap_deadline_s);
    device_ = device_memory<LowLatencyDeviceState>(sizeof(LowLatencyDeviceState));
    check_cuda(cudaMemset(device_.get(), 0, sizeof(LowLatencyDeviceState)), "cudaMemset");
    host_ = mapped_host_memory<LowLatencyHostState>(sizeof(LowLatencyHostState));
    *host_ = LowLatencyHostState{};
    for (int rank = 0; rank < sizes.num_ranks; ++rank) peers_.segments[rank] = heap_.segments[rank]->data();
    peers_.layout = layout_;
    peers_.device = device_.get();
    peers_.host = host_.get();
    peers_.rank = sizes.rank;
    peers_.num_ranks = sizes.num_ranks;
    peers_.num_experts = sizes.num_experts;
    peers_.num_local_experts = sizes.num_local_experts();
    peers_.max_tokens = sizes.max_tokens;
    peers_.hidden = sizes.hidden;
    check_cuda(cudaStreamCreateWithFlags(&mask_stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    open_ = true;
}

void DeviceLowLatency::close() {
    if (!open_) return;
    open_ = false;
    // Kernels in flight may wait for a peer: tell them to stop, or freeing would wait for their deadline.
    host_->abort = 1;
    cudaDeviceSynchronize();
    cudaStreamDestroy(mask_stream_);
    heap_.segments.clear();
    device_.reset();
    const std::lock_guard<std::mutex> lock(host_mutex_);
    host_.reset();
}

int64_t DeviceLowLatency::plan_ints(int num_tokens, int num_topk) const {
    const int64_t received = sizes_.num_ranks * sizes_.max_tokens;
    return 4 + 2 * (received + num_tokens) * num_topk;
}

LowLatencyPlanArrays DeviceLowLatency::plan_at(uintptr_t address, int num_tokens, int num_topk) const {
    LowLatencyPlanArrays plan;
    if (address == 0) return plan;
    const int64_t received = sizes_.num_ranks * sizes_.max_tokens * num_topk, sent = int64_t{num_tokens} * num_topk;
    auto* next = pointer<int32_t>(address);
    const auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    plan.sequence = reinterpret_cast<uint32_t*>(take(4));
    plan.slot = take(received);
    plan.weight = reinterpret_cast<float*>(take(received));
    plan.send_expert = take(sent);
    plan.send_weight = reinterpret_cast<float*>(take(sent));
    return plan;
}

LowLatencyStep DeviceLowLatency::step(Operation operation, const LowLatencyLaunch& launch, int num_tokens, int num_topk,
                                      DType dtype, int reduce) const {
    LowLatencyStep step;
    step.sends = launch.sends;
    step.receives = launch.receives;
    step.operation = static_cast<uint32_t>(operation);
    step.fields[0] = static_cast<int32_t>(operation);
    step.fields[1] = static_cast<int32_t>(dtype);
    step.fields[2] = num_topk;
    step.fields[3] = reduce;
    step.signature = hash_of(step.fields, 4);
    step.num_tokens = num_tokens;
    step.num_topk = num_topk;
    step.timeout_ns = static_cast<uint64_t>(launch.timeout_s * 1e9);
    step.mask_late = launch.mask_late;
    step.wait_ns = pointer<int64_t>(launch.wait_ns);
    step.absent = pointer<bool>(launch.absent);
    step.num_sms = launch.num_sms;
    return step;
}

void DeviceLowLatency::dispatch(const DeviceLowLatencyDispatch& args, const LowLatencyLaunch& launch,
                                cudaStream_t stream) {
    check();
    LowLatencyDispatchParams params;
    params.peers = peers_;
    params.step = step(Operation::kLowLatencyDispatch, launch, args.num_tokens, args.num_topk, args.dtype, 0);
    params.x = pointer<const std::byte>(args.x);
    params.x_scales = pointer<const float>(args.x_scales);
    params.topk_idx = pointer<const void>(args.topk_idx);
    params.topk_weights = pointer<const float>(args.topk_weights);
    params.wide_idx = args.wide_idx;
    params.cast = args.x_dtype != args.dtype;
    params.stage_own = args.stage_own || params.cast;
    params.power_of_two = args.power_of_two;
    params.from = args.x_dtype;
    params.row_bytes = sizes_.hidden * element_size(args.dtype);
    params.plan = plan_at(args.plan, args.num_tokens, args.num_topk);
    params.out = pointer<std::byte>(args.out_x);
    params.out_scales = pointer<float>(args.out_scales);
    params.counts = pointer<int32_t>(args.counts);
    params.range_begin = pointer<int32_t>(args.range_begin);
    params.range_count = pointer<int32_t>(args.range_count);
    params.expert_offsets = pointer<int32_t>(args.expert_offsets);
    params.needed = pointer<int32_t>(args.needed);
    params.num_tokens_per_expert = pointer<int64_t>(args.num_tokens_per_expert);
    params.alignment = args.alignment;
    params.num_rows = args.num_rows;
    deadline_s_ = launch.timeout_s;
    launch_low_latency_dispatch(params, stream);
}

void DeviceLowLatency::read_in_place(uintptr_t rows, LowLatencyCombineParams* params) const {
    constexpr int64_t kUnit = 16, kMost = int64_t{kNoRow} * kUnit;
    const uintptr_t begin = symm_.bytes > 0 ? symm_.addresses[sizes_.rank] : 0;
    if (rows < begin || rows >= begin + symm_.bytes || (rows - begin) % kUnit != 0) {
        throw ArgumentError("rows", "elsewhere", "must lie in the heap, with zero_copy");
    }
    if (symm_.bytes > kMost) {
        throw ArgumentError("symm_bytes", std::to_string(symm_.bytes),
                            "must be at most " + std::to_string(kMost) + " with zero_copy");
    }
    params->step.in_place = true;
    params->rows_at = static_cast<uint32_t>((rows - begin) / kUnit);
    for (int rank = 0; rank < sizes_.num_ranks; ++rank) {
        params->symm[rank] = pointer<std::byte>(symm_.addresses[rank]);
    }
}

void DeviceLowLatency::combine(const DeviceLowLatencyCombine& args, const LowLatencyLaunch& launch,
                               cudaStream_t stream) {
    check();
    const int64_t element = element_size(args.dtype);
    if (element > sizes_.max_element_size) {
        throw ArgumentError("rows", to_string(args.dtype),
                            "must have elements of at most " + std::to_string(sizes_.max_element_size) +
                                " bytes, for which the buffer has room (max_element_size)");
    }
    LowLatencyCombineParams params;
    params.peers = peers_;
    params.step = step(Operation::kLowLatencyCombine, launch, args.num_tokens, args.num_topk, args.dtype,
                       !args.exact ? kReduceFast : (args.zero_copy ? kReduceInPlace : kReduceExact));
    params.plan = plan_at(args.plan, args.num_tokens, args.num_topk);
    params.rows = pointer<const std::byte>(args.rows);
    params.topk_weights = pointer<const float>(args.topk_weights);
    params.out = pointer<std::byte>(args.out_x);
    params.dtype = args.dtype;
    params.exact = args.exact;
    params.max_routes_here = sizes_.max_routes_here();
    if (args.zero_copy) read_in_place(args.rows, &params);
    deadline_s_ = launch.timeout_s;
    launch_low_latency_combine(params, stream);
}

}  // namespace ray_deepep
