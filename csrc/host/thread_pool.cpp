#include "host/thread_pool.h"

#include <algorithm>

namespace ray_deepep {
namespace {

constexpr int64_t kWakeBytes = 512 * 1024;   // from about here on a second thread gains what its waking costs
constexpr int64_t kChunkBytes = 128 * 1024;  // what a thread takes at a time, at most
constexpr int64_t kChunks = 8;               // for each thread, where that is less: the last to end waits less

}  // namespace

ThreadPool::ThreadPool(int num_threads) {
    for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this] { work(); });
}

ThreadPool::~ThreadPool() {
    {
        const std::lock_guard lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::parallel_rows(int64_t count, int64_t row_bytes, const std::function<void(int64_t, int64_t)>& body) {
    if (threads_.empty() || count * row_bytes < kWakeBytes) {
        if (count > 0) body(0, count);
        return;
    }
    const int64_t chunks = kChunks * (static_cast<int64_t>(threads_.size()) + 1);
    {
        const std::lock_guard lock(mutex_);
        body_ = &body;
        count_ = count;
        grain_ = std::max<int64_t>(std::min(kChunkBytes / row_bytes, count / chunks), 1);
        next_ = 0;
        running_ = static_cast<int>(threads_.size());
        ++generation_;
    }
    wake_.notify_all();
    run_chunks();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
}

void ThreadPool::run_chunks() {
    while (true) {
        int64_t begin;
        {
            const std::lock_guard lock(mutex_);
            begin = next_;
            next_ += grain_;
        }
        if (begin >= count_) return;
        (*body_)(begin, std::min(begin + grain_, count_));
    }
}

void ThreadPool::work() {
    uint64_t seen = 0;
    while (true) {
        {
            std::unique_lock lock(mutex_);
            wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
            if (stop_) return;
            seen = generation_;
        }
        run_chunks();
        const std::lock_guard lock(mutex_);
        if (--running_ == 0) done_.notify_one();
    }
}

}  // namespace ray_deepep
