// What a rank has counted since its buffer was made: by the thread that calls an operation, for any that asks.
#pragma once

#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace ray_deepep {

// One clock for all processes of a host.
inline int64_t now_ns() {
    timespec now{};
    ::clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * int64_t{1'000'000'000} + now.tv_nsec;
}

class Traffic {
  public:
    explicit Traffic(int num_ranks) : wait_ns_(num_ranks), recv_bytes_(num_ranks) {}

    // `peer` published its part so long after this rank had published its own.
    void add_wait(int peer, int64_t ns) {
        if (ns > 0) wait_ns_[peer].fetch_add(ns, std::memory_order_relaxed);
    }
    // Rows read from `peer`.
    void add_received(int peer, int64_t bytes) { recv_bytes_[peer].fetch_add(bytes, std::memory_order_relaxed); }
    // An operation took so much of an area. By one thread alone.
    void note_used(int64_t bytes) {
        used_bytes_.store(std::max(bytes, used_bytes_.load(std::memory_order_relaxed)), std::memory_order_relaxed);
    }

    std::vector<int64_t> wait_ns() const { return copy(wait_ns_); }
    std::vector<int64_t> recv_bytes() const { return copy(recv_bytes_); }
    // The most that an operation took.
    int64_t used_bytes() const { return used_bytes_.load(std::memory_order_relaxed); }

  private:
    static std::vector<int64_t> copy(const std::vector<std::atomic<int64_t>>& counts) {
        std::vector<int64_t> values;
        for (const auto& count : counts) values.push_back(count.load(std::memory_order_relaxed));
        return values;
    }

    std::vector<std::atomic<int64_t>> wait_ns_, recv_bytes_;
    std::atomic<int64_t> used_bytes_{0};
};

}  // namespace ray_deepep
