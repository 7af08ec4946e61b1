#include "nvshmem/bounded_call.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "common/deadline.h"

namespace ray_deepep {
namespace {

constexpr double kLookEvery_s = 0.1;

struct Outcome {
    std::mutex mutex;
    std::condition_variable changed;
    bool done = false;
    std::exception_ptr error;
};

}  // namespace

bool run_bounded(std::function<void()> call, double deadline_s, const Interrupt& interrupt) {
    const Deadline deadline(deadline_s);
    auto outcome = std::make_shared<Outcome>();
    std::thread([outcome, call = std::move(call)] {
        std::exception_ptr error;
        try {
            call();
        } catch (...) {
            error = std::current_exception();
        }
        const std::lock_guard<std::mutex> lock(outcome->mutex);
        outcome->done = true;
        outcome->error = error;
        outcome->changed.notify_all();
    }).detach();

    std::unique_lock<std::mutex> lock(outcome->mutex);
    while (!outcome->done && !deadline.expired()) {
        const std::chrono::duration<double> pause(std::min(kLookEvery_s, deadline.remaining_s()));
        if (outcome->changed.wait_for(lock, pause, [&] { return outcome->done; })) break;
        lock.unlock();
        if (interrupt) interrupt();
        lock.lock();
    }
    if (!outcome->done) return false;
    if (outcome->error) std::rethrow_exception(outcome->error);
    return true;
}

}  // namespace ray_deepep
