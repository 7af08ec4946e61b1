#include "cuda/device_heap.h"

#include <cstring>
#include <string>
#include <utility>

#include "common/fault.h"
#include "cuda/driver.h"

namespace ray_deepep {
namespace {

// What the layout of a segment counts on.
constexpr uintptr_t kSegmentAlignment = 256;

CUmemAllocationProp allocation_properties(int device) {
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
    properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    return properties;
}

// A driver call whose error has nobody to go to: the context may be gone.
template <typename Function, typename... Args>
void call_at_teardown(const char* name, Args... args) noexcept {
    try {
        driver_function<Function>(name)(args...);
    } catch (const CudaError&) {
    }
}

// The three things that a segment of virtual memory management holds; each gives back what it took, whatever the next
// one throws.
class Allocation {
  public:
    explicit Allocation(CUmemGenericAllocationHandle handle) : handle_(handle) {}
    ~Allocation() { call_at_teardown<decltype(cuMemRelease)>("cuMemRelease", handle_); }
    Allocation(const Allocation&) = delete;
    Allocation& operator=(const Allocation&) = delete;
    CUmemGenericAllocationHandle get() const { return handle_; }

  private:
    CUmemGenericAllocationHandle handle_;
};

class AddressRange {
  public:
    explicit AddressRange(size_t bytes) : bytes_(bytes) {
        check_driver(driver_function<decltype(cuMemAddressReserve)>("cuMemAddressReserve")(&begin_, bytes, 0, 0, 0),
                     "cuMemAddressReserve");
    }
    ~AddressRange() { call_at_teardown<decltype(cuMemAddressFree)>("cuMemAddressFree", begin_, bytes_); }
    AddressRange(const AddressRange&) = delete;
    AddressRange& operator=(const AddressRange&) = delete;
    CUdeviceptr begin() const { return begin_; }

  private:
    CUdeviceptr begin_ = 0;
    size_t bytes_;
};

class Mapping {
  public:
    Mapping(CUdeviceptr begin, size_t bytes, CUmemGenericAllocationHandle allocation) : begin_(begin), bytes_(bytes) {
        check_driver(driver_function<decltype(cuMemMap)>("cuMemMap")(begin, bytes, 0, allocation, 0), "cuMemMap");
    }
    ~Mapping() { call_at_teardown<decltype(cuMemUnmap)>("cuMemUnmap", begin_, bytes_); }
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

  private:
    CUdeviceptr begin_;
    size_t bytes_;
};

// An allocation behind a file descriptor, mapped where `device` reads and writes it. Takes the handle over.
class VmmSegment : public DeviceSegment {
  public:
    VmmSegment(CUmemGenericAllocationHandle handle, size_t bytes, int device)
        : allocation_(handle), range_(bytes), mapping_(range_.begin(), bytes, handle) {
        CUmemAccessDesc access{};
        access.location = {CU_MEM_LOCATION_TYPE_DEVICE, {device}};
        access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        check_driver(driver_function<decltype(cuMemSetAccess)>("cuMemSetAccess")(range_.begin(), bytes, &access, 1),
                     "cuMemSetAccess");
    }
    std::byte* data() const override { return reinterpret_cast<std::byte*>(range_.begin()); }
    CUmemGenericAllocationHandle allocation() const { return allocation_.get(); }

  private:
    // In the order in which they are taken; given back the other way round.
    Allocation allocation_;
    AddressRange range_;
    Mapping mapping_;
};

std::unique_ptr<DeviceSegment> create_vmm(int device, size_t bytes, Fd* fd) {
    const CUmemAllocationProp properties = allocation_properties(device);
    CUmemGenericAllocationHandle handle{};
    check_driver(driver_function<decltype(cuMemCreate)>("cuMemCreate")(&handle, bytes, &properties, 0),
                 ("cuMemCreate of " + std::to_string(bytes >> 20) + " MiB").c_str());
    int descriptor = -1;
    auto segment = std::make_unique<VmmSegment>(handle, bytes, device);
    check_driver(driver_function<decltype(cuMemExportToShareableHandle)>("cuMemExportToShareableHandle")(
                     &descriptor, segment->allocation(), CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                 "cuMemExportToShareableHandle");
    *fd = Fd(descriptor);
    return segment;
}

std::unique_ptr<DeviceSegment> import_vmm(int device, size_t bytes, int fd) {
    CUmemGenericAllocationHandle handle{};
    auto* descriptor = reinterpret_cast<void*>(static_cast<uintptr_t>(fd));
    check_driver(driver_function<decltype(cuMemImportFromShareableHandle)>("cuMemImportFromShareableHandle")(
                     &handle, descriptor, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
                 "cuMemImportFromShareableHandle");
    return std::make_unique<VmmSegment>(handle, bytes, device);
}

// CUDA IPC: plain allocations behind opaque handles.
class IpcSegment : public DeviceSegment {
  public:
    explicit IpcSegment(size_t bytes) : owned_(true) {
        check_cuda(cudaMalloc(reinterpret_cast<void**>(&data_), bytes), "cudaMalloc of a heap segment");
    }
    explicit IpcSegment(const cudaIpcMemHandle_t& handle) : owned_(false) {
        check_cuda(cudaIpcOpenMemHandle(reinterpret_cast<void**>(&data_), handle, cudaIpcMemLazyEnablePeerAccess),
                   "cudaIpcOpenMemHandle");
    }
    ~IpcSegment() override {
        if (owned_) {
            cudaFree(data_);
        } else {
            cudaIpcCloseMemHandle(data_);
        }
    }
    std::byte* data() const override { return data_; }

  private:
    bool owned_;
    std::byte* data_ = nullptr;
};

std::unique_ptr<DeviceSegment> create_ipc(size_t bytes, HeapOffer* offer) {
    auto segment = std::make_unique<IpcSegment>(bytes);
    cudaIpcMemHandle_t handle;
    check_cuda(cudaIpcGetMemHandle(&handle, segment->data()), "cudaIpcGetMemHandle");
    static_assert(sizeof(handle) == sizeof(offer->blob));
    std::memcpy(offer->blob.data(), &handle, sizeof(handle));
    return segment;
}

// Memory of someone else's.
class GivenSegment : public DeviceSegment {
  public:
    explicit GivenSegment(uintptr_t address) : data_(reinterpret_cast<std::byte*>(address)) {}
    std::byte* data() const override { return data_; }

  private:
    std::byte* data_;
};

void check_given(const HeapSource& source, int num_ranks) {
    const bool given = source.provider == HeapProvider::kGiven;
    if (static_cast<int>(source.segments.size()) != (given ? num_ranks : 0)) {
        throw ArgumentError("segments", std::to_string(source.segments.size()) + " addresses",
                            given ? "must be one per rank, " + std::to_string(num_ranks) : "go with given memory only");
    }
    for (const uintptr_t address : source.segments) {
        if (address == 0 || address % kSegmentAlignment != 0) {
            throw ArgumentError("segments", std::to_string(address),
                                "must be aligned to " + std::to_string(kSegmentAlignment) + " bytes, and not 0");
        }
    }
}

std::unique_ptr<DeviceSegment> open_peer(HeapProvider provider, int device, size_t bytes, const HeapOffer& offer) {
    if (provider == HeapProvider::kVmm) return import_vmm(device, bytes, offer.fd.get());
    cudaIpcMemHandle_t handle;
    std::memcpy(&handle, offer.blob.data(), sizeof(handle));
    return std::make_unique<IpcSegment>(handle);
}

}  // namespace

bool vmm_supported(int device) {
    int supported = 0;
    check_cuda(cudaFree(nullptr), "CUDA start-up");
    check_driver(driver_function<decltype(cuDeviceGetAttribute)>("cuDeviceGetAttribute")(
                     &supported, CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, device),
                 "cuDeviceGetAttribute");
    return supported != 0;
}

DeviceHeap allocate_device_heap(Domain& domain, const HeapSource& source, int device, size_t bytes, AgreedSizes sizes,
                                double deadline_s) {
    const HeapProvider provider = source.provider;
    check_given(source, domain.num_ranks());
    DeviceHeap heap;
    heap.provider = provider;
    heap.segments.resize(domain.num_ranks());
    HeapOffer own;
    if (provider == HeapProvider::kVmm) {
        const CUmemAllocationProp properties = allocation_properties(device);
        size_t granularity = 0;
        check_driver(driver_function<decltype(cuMemGetAllocationGranularity)>("cuMemGetAllocationGranularity")(
                         &granularity, &properties, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED),
                     "cuMemGetAllocationGranularity");
        bytes = (bytes + granularity - 1) / granularity * granularity;
        heap.segments[domain.rank()] = create_vmm(device, bytes, &own.fd);
    } else if (provider == HeapProvider::kGiven) {
        for (int rank = 0; rank < domain.num_ranks(); ++rank) {
            heap.segments[rank] = std::make_unique<GivenSegment>(source.segments[rank]);
        }
    } else {
        heap.segments[domain.rank()] = create_ipc(bytes, &own);
    }
    // Zero before any peer reaches it, which none does before the exchange: signals start at 0.
    check_cuda(cudaMemset(heap.segments[domain.rank()]->data(), 0, bytes), "cudaMemset of the heap");
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    sizes.names.insert(sizes.names.end(), {"heap_bytes", "heap_provider"});
    sizes.values.insert(sizes.values.end(), {bytes, static_cast<uint64_t>(provider)});
    const std::vector<HeapOffer> offers = domain.exchange_offers(own, sizes, deadline_s);
    for (int peer = 0; peer < domain.num_ranks(); ++peer) {
        if (heap.segments[peer] != nullptr) continue;
        try {
            heap.segments[peer] = open_peer(provider, device, bytes, offers[peer]);
        } catch (const CudaError& error) {
            throw CudaError("GPU memory of rank " + std::to_string(peer) + " cannot be mapped (" + error.what() +
                            "); the GPUs need peer access over NVLink or PCIe");
        }
    }
    return heap;
}

}  // namespace ray_deepep
