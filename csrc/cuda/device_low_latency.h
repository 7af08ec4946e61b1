// Low-latency dispatch and combine on GPUs of one NVLink domain: host/low_latency.h with kernels. All calls are
// asynchronous on the caller's stream, but those about masks. Faults of a kernel show at the next call that looks.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "common/fault.h"
#include "common/interrupt.h"
#include "cuda/device_heap.h"
#include "cuda/low_latency_params.h"
#include "cuda/memory.h"
#include "heap/domain.h"

namespace ray_deepep {

// What an operation does in this launch, and how it waits.
struct LowLatencyLaunch {
    bool sends = false, receives = false;
    double timeout_s = 0;
    bool mask_late = false;
    uintptr_t wait_ns = 0, absent = 0;
    int num_sms = 1;
};

// Addresses of torch tensors; 0 where there is none. Shapes as in ray_deepep/low_latency.py.
struct DeviceLowLatencyDispatch {
    uintptr_t x = 0, x_scales = 0, topk_idx = 0, topk_weights = 0;
    int num_tokens = 0, num_topk = 0;
    bool wide_idx = false;
    bool stage_own = false;
    DType x_dtype = DType::kFloat32;  // of x
    DType dtype = DType::kFloat32;    // of the rows sent; another one where they are cast to float8 on the way
    bool power_of_two = false;
    // Outputs of the receive.
    uintptr_t plan = 0;
    uintptr_t out_x = 0, out_scales = 0;
    uintptr_t counts = 0, range_begin = 0, range_count = 0, expert_offsets = 0, needed = 0, num_tokens_per_expert = 0;
    int64_t alignment = 0, num_rows = 0;
};

struct DeviceLowLatencyCombine {
    uintptr_t rows = 0, topk_weights = 0, plan = 0, out_x = 0;
    int num_tokens = 0, num_topk = 0;
    DType dtype = DType::kFloat32;
    bool exact = false;
    bool zero_copy = false;  // exact: peers read `rows` where they are
};

// The ranks' room for tensors of the user's, as this GPU reaches it.
struct SymmRoom {
    std::vector<uintptr_t> addresses;
    int64_t bytes = 0;
};

class DeviceLowLatency {
  public:
    // Collective over `domain`. `symm` outlives it.
    DeviceLowLatency(std::shared_ptr<Domain> domain, const DeviceLowLatencySizes& sizes, const HeapSource& source,
                     SymmRoom symm, double bootstrap_deadline_s, Interrupt interrupt);
    ~DeviceLowLatency() { close(); }

    int64_t segment_bytes() const { return layout_.bytes; }
    // int32 that a plan takes.
    int64_t plan_ints(int num_tokens, int num_topk) const;
    void dispatch(const DeviceLowLatencyDispatch& args, const LowLatencyLaunch& launch, cudaStream_t stream);
    void combine(const DeviceLowLatencyCombine& args, const LowLatencyLaunch& launch, cudaStream_t stream);

    // Throw if a kernel of this buffer has reported a fault.
    void check();
    // Throw if a dispatch saw an expert id that is out of range or twice in a token.
    void check_routing();
    void mask(int rank, bool masked);
    std::vector<int> masked() const;     // no CUDA call
    std::vector<int> returning() const;  // masked ranks that wait in `rejoin`
    // Take part again, from the operation on before which every other rank unmasked this one. Forgets a fault.
    void rejoin(double deadline_s);
    void close();

    // As those of DeviceBuffer: for a thread that looks while another one waits.
    std::optional<FaultRecord> fault_record() const;
    void give_up_on_gone_peers();

  private:
    LowLatencyStep step(Operation operation, const LowLatencyLaunch& launch, int num_tokens, int num_topk, DType dtype,
                        int reduce) const;
    void read_in_place(uintptr_t rows, LowLatencyCombineParams* params) const;
    LowLatencyPlanArrays plan_at(uintptr_t address, int num_tokens, int num_topk) const;
    FaultRecord reported() const;
    [[noreturn]] void throw_mismatch();
    uint64_t masked_bits() const;
    template <typename T>
    std::vector<T> read_own(int64_t offset) const;
    std::vector<int> not_admitted_by(uint32_t* sequence) const;
    LowLatencyDeviceState read_device() const;

    std::shared_ptr<Domain> domain_;
    DeviceLowLatencySizes sizes_;
    LowLatencyLayout layout_;
    SymmRoom symm_;
    Interrupt interrupt_;
    DeviceHeap heap_;
    DeviceMemory<LowLatencyDeviceState> device_;
    HostMemory<LowLatencyHostState> host_;
    LowLatencyPeers peers_;
    mutable std::mutex host_mutex_;       // against freeing host_ under those who look
    double deadline_s_ = 0;               // of the last launch, for records
    cudaStream_t mask_stream_ = nullptr;  // masks change beside kernels that wait
    std::vector<uint32_t> admitted_;      // by rank: how often this one let it in again
    std::vector<uint32_t> admissions_;    // by rank: how many of its admissions this rank has used
    bool open_ = false;
};

}  // namespace ray_deepep
