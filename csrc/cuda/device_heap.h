// The symmetric heap in GPU memory: one segment per rank, all mapped by every rank of the domain.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "heap/domain.h"

namespace ray_deepep {

// kGiven: memory of someone else's, such as NVSHMEM, who also frees it.
enum class HeapProvider : int { kVmm = 0, kIpc = 1, kGiven = 2 };

// A rank's own segment or a peer's, mapped here; unmaps itself.
class DeviceSegment {
  public:
    virtual ~DeviceSegment() = default;
    virtual std::byte* data() const = 0;
};

// Where a heap comes from. With kGiven, `segments` are the ranks' segments as this GPU reaches them, each of at least
// the bytes asked for, and outlive the heap.
struct HeapSource {
    HeapProvider provider = HeapProvider::kVmm;
    std::vector<uintptr_t> segments;
};

struct DeviceHeap {
    std::vector<std::unique_ptr<DeviceSegment>> segments;  // by rank
    HeapProvider provider = HeapProvider::kVmm;
};

// Whether this GPU can share memory through file descriptors.
bool vmm_supported(int device);

// `bytes` of zeros per rank on `device`; collective over the domain. Throws as Domain::exchange_offers, ArgumentError
// for segments that are not one per rank, and CudaError naming the peer whose memory this GPU cannot reach.
DeviceHeap allocate_device_heap(Domain& domain, const HeapSource& source, int device, size_t bytes, AgreedSizes sizes,
                                double deadline_s);

}  // namespace ray_deepep
