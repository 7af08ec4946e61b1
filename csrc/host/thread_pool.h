// A fixed set of threads that copy rows; the caller is one of them.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace ray_deepep {

class ThreadPool {
  public:
    explicit ThreadPool(int num_threads);
    ~ThreadPool();

    // Call body(begin, end) over [0, count) in chunks, on all threads if there are bytes enough to be worth waking
    // them; returns when all are done. row_bytes: read or written for each. The body must not throw.
    void parallel_rows(int64_t count, int64_t row_bytes, const std::function<void(int64_t, int64_t)>& body);

  private:
    void work();
    void run_chunks();

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(int64_t, int64_t)>* body_ = nullptr;
    int64_t count_ = 0, grain_ = 1, next_ = 0;
    uint64_t generation_ = 0;
    int running_ = 0;
    bool stop_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace ray_deepep
