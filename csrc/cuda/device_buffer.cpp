#include "cuda/device_buffer.h"

#include <algorithm>
#include <utility>

#include "cuda/check.h"

namespace ray_deepep {

DeviceBuffer::DeviceBuffer(std::shared_ptr<Domain> domain, const DeviceSizes& sizes, const HeapSource& source,
                           double bootstrap_deadline_s, double deadline_s, Interrupt interrupt)
    : domain_(std::move(domain)),
      sizes_(sizes),
      layout_(make_segment_layout(sizes)),
      deadline_s_(deadline_s),
      interrupt_(std::move(interrupt)) {
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    const AgreedSizes agreed{
        {"num_experts", "hidden", "num_topk", "max_tokens", "max_rows", "max_element_size", "num_parts"},
        {static_cast<uint64_t>(sizes.num_experts), static_cast<uint64_t>(sizes.hidden),
         static_cast<uint64_t>(sizes.num_topk), static_cast<uint64_t>(sizes.max_tokens),
         static_cast<uint64_t>(sizes.max_rows), static_cast<uint64_t>(sizes.max_element_size),
         static_cast<uint64_t>(sizes.num_parts)}};
    heap_ = allocate_device_heap(*domain_, source, device, layout_.bytes, agreed, bootstrap_deadline_s);

    const int num_local = sizes.num_local_experts();
    control_ = device_memory<DeviceControl>(sizeof(DeviceControl));
    check_cuda(cudaMemset(control_.get(), 0, sizeof(DeviceControl)), "cudaMemset");
    status_ = mapped_host_memory<HostStatus>(sizeof(HostStatus) + (2 * num_local + 1) * sizeof(int32_t));
    *status_ = HostStatus{};

    for (int rank = 0; rank < sizes.num_ranks; ++rank) peers_.segments[rank] = heap_.segments[rank]->data();
    peers_.layout = layout_;
    peers_.control = control_.get();
    peers_.status = status_.get();
    peers_.deadline_ns = static_cast<uint64_t>(deadline_s * 1e9);
    peers_.rank = sizes.rank;
    peers_.num_ranks = sizes.num_ranks;
    peers_.num_experts = sizes.num_experts;
    peers_.num_local_experts = num_local;
    int major = 0;
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    bulk_copy_ = sizes.bulk_copy && major >= 9;
    if (bulk_copy_) allow_pull_bulk();
    allow_combine();
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
    control_.reset();
    // Freed outside the lock: readers hold it for no longer than a read.
    HostMemory<HostStatus> status;
    const std::lock_guard<std::mutex> lock(status_mutex_);
    status.swap(status_);
}

}  // namespace ray_deepep
