#include "nvshmem/runtime.h"

#include <cuda_runtime_api.h>
#include <nvshmem_host.h>

#include <cstring>

#include "common/fault.h"
#include "nvshmem/bounded_call.h"

namespace ray_deepep {
namespace {

static_assert(sizeof(nvshmemx_uniqueid_t) == sizeof(NvshmemUniqueId));

struct InitArguments {
    nvshmemx_uniqueid_t unique_id = NVSHMEMX_UNIQUEID_INITIALIZER;
    nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
};

[[noreturn]] void fail(const char* step, int code, const std::string& reason) {
    throw NvshmemError(step, code, nvshmem_status(), reason);
}

void check_cuda(const char* step, cudaError_t status, const std::string& what) {
    if (status != cudaSuccess) fail(step, status, what + ": " + cudaGetErrorString(status));
}

// CUDA's current device belongs to a thread, and calls run on threads of their own.
void use_device(const char* step, int device) {
    if (device < 0) return;
    const std::string name = "GPU " + std::to_string(device);
    check_cuda(step, cudaSetDevice(device), name);
    // The context itself, which NVSHMEM takes from the thread.
    check_cuda(step, cudaFree(nullptr), name);
}

}  // namespace

std::string NvshmemVersion::text() const {
    return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
}

NvshmemVersion built_nvshmem_version() {
    return {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION};
}

NvshmemVersion loaded_nvshmem_version() {
    NvshmemVersion version;
    nvshmemx_vendor_get_version_info(&version.major, &version.minor, &version.patch);
    return version;
}

NvshmemUniqueId make_nvshmem_unique_id() {
    nvshmemx_uniqueid_t made = NVSHMEMX_UNIQUEID_INITIALIZER;
    const int code = nvshmemx_get_uniqueid(&made);
    if (code != 0) fail("unique_id", code, "no unique id was made; is there a network interface that peers can reach?");
    NvshmemUniqueId unique_id;
    std::memcpy(unique_id.data(), &made, sizeof(made));
    return unique_id;
}

int nvshmem_status() { return nvshmemx_init_status(); }

NvshmemRuntime& NvshmemRuntime::instance() {
    // Never destroyed: a thread that is stuck in a call may outlive static objects.
    static auto* runtime = new NvshmemRuntime;
    return *runtime;
}

void NvshmemRuntime::init(const NvshmemUniqueId& unique_id, int rank, int num_ranks, int device, double deadline_s,
                          const Interrupt& interrupt) {
    if (rank < 0 || rank >= num_ranks) {
        throw ArgumentError("rank", std::to_string(rank), "must be in [0, " + std::to_string(num_ranks) + ")");
    }
    check_not_abandoned("init");
    if (nvshmem_status() == kNvshmemBootstrapped) {
        fail("init", 0, "an earlier attempt failed half way; start a new process");
    }
    auto arguments = std::make_shared<InitArguments>();
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (entered_) return;
        device_ = device;
        init_arguments_ = arguments;
    }
    std::memcpy(&arguments->unique_id, unique_id.data(), unique_id.size());
    run("init", deadline_s, interrupt, [arguments, rank, num_ranks] {
        int code = 0;
        if (nvshmem_status() < kNvshmemReady) {
            code = nvshmemx_set_attr_uniqueid_args(rank, num_ranks, &arguments->unique_id, &arguments->attributes);
        }
        if (code != 0) fail("init", code, "the unique id was refused");
        code = nvshmemx_hostlib_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &arguments->attributes);
        if (code != 0) fail("init", code, "NVSHMEM did not come up; NVSHMEM_DEBUG=WARN says more");
        // It returns 0 as well when it found no GPU that it can use.
        if (nvshmem_status() < kNvshmemReady) {
            fail("init", code, "all ranks met, but NVSHMEM found no GPU that it can use; NVSHMEM_DEBUG=WARN says more");
        }
    });
    const std::lock_guard<std::mutex> lock(mutex_);
    entered_ = true;
}

void NvshmemRuntime::init_device(double deadline_s, const Interrupt& interrupt) {
    check_usable("init_device");
    std::shared_ptr<void> kept;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!entered_) fail("init_device", 0, "init() was not called");
        if (device_entered_) return;
        kept = init_arguments_;
    }
    run("init_device", deadline_s, interrupt, [kept] {
        // What nvshmemx_init_attr() calls, which exits the process where this returns an error.
        auto* arguments = static_cast<InitArguments*>(kept.get());
        const nvshmemi_version_t version = {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION,
                                            NVSHMEM_VENDOR_PATCH_VERSION};
        int provided = 0;
        const int code = nvshmemi_init_thread(NVSHMEM_THREAD_SERIALIZED, &provided, NVSHMEMX_INIT_WITH_UNIQUEID,
                                              &arguments->attributes, version);
        if (code != 0) fail("init_device", code, "NVSHMEM's device side did not come up; NVSHMEM_DEBUG=WARN says more");
    });
    const std::lock_guard<std::mutex> lock(mutex_);
    device_entered_ = true;
}

int NvshmemRuntime::pe() const {
    check_usable("pe");
    return nvshmem_my_pe();
}

int NvshmemRuntime::num_pes() const {
    check_usable("num_pes");
    return nvshmem_n_pes();
}

void NvshmemRuntime::finalize(double deadline_s, const Interrupt& interrupt) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!entered_) fail("finalize", 0, "init() was not called");
    }
    check_usable("finalize");
    bool with_device;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        with_device = device_entered_;
    }
    run("finalize", deadline_s, interrupt, [with_device] {
        check_cuda("finalize", cudaDeviceSynchronize(), "the GPU has failed; end the process instead");
        // Each init has its own.
        if (with_device) nvshmemi_finalize();
        nvshmemx_hostlib_finalize();
    });
    const std::lock_guard<std::mutex> lock(mutex_);
    entered_ = device_entered_ = false;
    blocks_.clear();
    num_allocated_ = 0;
}

void NvshmemRuntime::abandon(const std::string& reason) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (abandoned_.empty()) abandoned_ = reason;
}

std::string NvshmemRuntime::abandoned() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return abandoned_;
}

int64_t NvshmemRuntime::allocate(size_t bytes, double deadline_s, const Interrupt& interrupt) {
    if (bytes == 0) throw ArgumentError("bytes", "0", "must be >= 1");
    check_usable("allocate");
    auto data = std::make_shared<void*>(nullptr);
    run("allocate", deadline_s, interrupt, [data, bytes] { *data = nvshmem_malloc(bytes); });
    if (*data == nullptr) {
        fail("allocate", 0,
             "no room for " + std::to_string(bytes >> 20) +
                 " MiB; NVSHMEM_SYMMETRIC_SIZE is the size of its heap on GPUs where the heap does not grow");
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_[num_allocated_] = {*data, false};
    return num_allocated_++;
}

std::vector<uintptr_t> NvshmemRuntime::addresses(int64_t block, const std::vector<int>& pes) const {
    check_usable("addresses");
    const int num_pes = nvshmem_n_pes();
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = blocks_.find(block);
    if (found == blocks_.end()) throw ArgumentError("block", std::to_string(block), "must be one that is allocated");
    std::vector<uintptr_t> result;
    for (const int pe : pes) {
        if (pe < 0 || pe >= num_pes) {
            throw ArgumentError("pes", std::to_string(pe), "must be in [0, " + std::to_string(num_pes) + ")");
        }
        void* address = nvshmem_ptr(found->second.data, pe);
        if (address == nullptr) {
            fail("addresses", 0,
                 "this GPU does not reach the memory of PE " + std::to_string(pe) +
                     "; the GPUs need peer access over NVLink or PCIe");
        }
        result.push_back(reinterpret_cast<uintptr_t>(address));
    }
    return result;
}

void NvshmemRuntime::release(int64_t block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = blocks_.find(block);
    // Gone already after a finalize.
    if (found != blocks_.end()) found->second.released = true;
}

std::vector<int64_t> NvshmemRuntime::released() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<int64_t> result;
    for (const auto& [number, block] : blocks_) {
        if (block.released) result.push_back(number);
    }
    return result;
}

void NvshmemRuntime::free(const std::vector<int64_t>& blocks, double deadline_s, const Interrupt& interrupt) {
    check_usable("free");
    std::vector<void*> data;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        for (const int64_t block : blocks) {
            const auto found = blocks_.find(block);
            if (found == blocks_.end() || !found->second.released) {
                throw ArgumentError("blocks", std::to_string(block), "must be allocated and released");
            }
            data.push_back(found->second.data);
        }
    }
    run("free", deadline_s, interrupt, [data] {
        for (void* each : data) nvshmem_free(each);
    });
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const int64_t block : blocks) blocks_.erase(block);
}

void NvshmemRuntime::check_not_abandoned(const char* step) const {
    const std::string reason = abandoned();
    if (!reason.empty()) fail(step, 0, "NVSHMEM of this process was given up (" + reason + "); start a new process");
}

void NvshmemRuntime::check_usable(const char* step) const {
    check_not_abandoned(step);
    // Functions that need NVSHMEM call exit() without it.
    if (nvshmem_status() < kNvshmemReady) fail(step, 0, "NVSHMEM is not up in this process");
}

void NvshmemRuntime::run(const char* step, double deadline_s, const Interrupt& interrupt, std::function<void()> call) {
    const std::lock_guard<std::mutex> one_at_a_time(calls_);
    int device;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        device = device_;
    }
    const auto whole = [step, device, call = std::move(call)] {
        use_device(step, device);
        call();
    };
    const auto look = [this, step, &interrupt] {
        check_not_abandoned(step);
        if (interrupt) interrupt();
    };
    bool done = false;
    try {
        done = run_bounded(whole, deadline_s, look);
    } catch (const NvshmemError&) {
        throw;
    } catch (...) {
        abandon(std::string("interrupted during ") + step);
        throw;
    }
    if (done) return;
    // A kernel of NVSHMEM's barriers may spin on the GPU too; then a synchronisation with the whole GPU does not end
    // either.
    abandon(std::string(step) + " did not return");
    throw BootstrapError(std::string("nvshmem_") + step, {}, deadline_s,
                         "a thread is stuck inside NVSHMEM and cannot be ended, so this process cannot use NVSHMEM any "
                         "more: start a new one");
}

}  // namespace ray_deepep
