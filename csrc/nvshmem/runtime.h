// NVSHMEM in this process: brought up, used and left with a deadline on every call that waits for other ranks.
//
// NVSHMEM has one state per process, joins silently when it is there already (torch's symmetric memory uses it too),
// and has no time-outs: a rank that is missing at bootstrap, or dead at a collective, holds the others for ever. So
// calls that wait run on a thread of their own. One that is stuck cannot be ended: it may still be changing NVSHMEM's
// state, so from then on the process is *abandoned*, all further calls are refused, and only a new process can use
// NVSHMEM again.
//
// Only public host functions are used, and none that calls exit(), but for finalize, which does when it fails, so the
// GPU is looked at first; and for the one that a public inline function calls and exits after.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/interrupt.h"

namespace ray_deepep {

// A call of NVSHMEM or CUDA that failed at `step`; `code` is what it returned, `status` NVSHMEM's state after it.
class NvshmemError : public std::runtime_error {
  public:
    NvshmemError(std::string step, int code, int status, const std::string& reason)
        : std::runtime_error(reason), step_(std::move(step)), code_(code), status_(status) {}
    const std::string& step() const { return step_; }
    int code() const { return code_; }
    int status() const { return status_; }

  private:
    std::string step_;
    int code_, status_;
};

struct NvshmemVersion {
    int major = 0, minor = 0, patch = 0;
    std::string text() const;
};

// Of the headers that this was built with, and of the library that the process has loaded: the same, or nothing works,
// for the state that both sides share grows between releases.
NvshmemVersion built_nvshmem_version();
NvshmemVersion loaded_nvshmem_version();

using NvshmemUniqueId = std::array<unsigned char, 128>;

// Needs no GPU. The process that made it must live until all ranks have connected.
NvshmemUniqueId make_nvshmem_unique_id();

// nvshmemx_init_status(): 0 nothing, 1 bootstrapped only (the GPU side did not come up), 2 ready, 3 ready with several
// ranks on a GPU and few functions, 4 ready with several ranks on a GPU.
int nvshmem_status();
inline constexpr int kNvshmemBootstrapped = 1;
inline constexpr int kNvshmemReady = 2;

class NvshmemRuntime {
  public:
    // The one of this process.
    static NvshmemRuntime& instance();

    // Bring NVSHMEM up, or join it where it is up already (then `unique_id`, `rank` and `num_ranks` go unused: ask pe()
    // and num_pes()). Collective. `device`: this rank's GPU, or -1 to leave the choice to NVSHMEM. Throws NvshmemError,
    // and BootstrapError at the deadline, after which the process is abandoned. Does nothing where it was called
    // before.
    void init(const NvshmemUniqueId& unique_id, int rank, int num_ranks, int device, double deadline_s,
              const Interrupt& interrupt);
    int pe() const;
    int num_pes() const;
    // Let kernels of this extension use NVSHMEM, once init() has returned. Collective as a second init() would be: it
    // joins. Does nothing where it was called before.
    void init_device(double deadline_s, const Interrupt& interrupt);

    // Leave: collective, and only while all ranks live. NVSHMEM stays up where others in this process use it. Blocks
    // are gone. After it init() may be called again.
    void finalize(double deadline_s, const Interrupt& interrupt);
    // Never call NVSHMEM again, since another rank is dead or stuck. Any thread.
    void abandon(const std::string& reason);
    // Why, or empty.
    std::string abandoned() const;

    // Memory of which every PE has a block of `bytes`; collective over all PEs, in the same order. Returns the block's
    // number, counted from 0, the same on every PE.
    int64_t allocate(size_t bytes, double deadline_s, const Interrupt& interrupt);
    // Addresses of a block on the given PEs as this GPU reaches them. Throws where it does not reach one.
    std::vector<uintptr_t> addresses(int64_t block, const std::vector<int>& pes) const;
    // This PE is done with the block. Local: freeing needs all PEs, who agree on what all have released.
    void release(int64_t block);
    std::vector<int64_t> released() const;
    // Free released blocks; collective, the same blocks in the same order on every PE.
    void free(const std::vector<int64_t>& blocks, double deadline_s, const Interrupt& interrupt);

  private:
    struct Block {
        void* data = nullptr;
        bool released = false;
    };
    NvshmemRuntime() = default;
    void check_not_abandoned(const char* step) const;
    void check_usable(const char* step) const;
    void run(const char* step, double deadline_s, const Interrupt& interrupt, std::function<void()> call);

    mutable std::mutex mutex_;  // of everything below; never held during a call
    std::mutex calls_;          // one call at a time
    std::string abandoned_;
    std::shared_ptr<void> init_arguments_;  // NVSHMEM keeps pointers to them
    bool entered_ = false;
    bool device_entered_ = false;
    int device_ = -1;
    int64_t num_allocated_ = 0;
    std::map<int64_t, Block> blocks_;
};

}  // namespace ray_deepep
