// Monotonic deadlines: every wait in the core has one.
#pragma once

#include <algorithm>
#include <chrono>

namespace ray_deepep {

class Deadline {
  public:
    explicit Deadline(double seconds) : limit_s_(seconds), start_(Clock::now()) {}
    double limit_s() const { return limit_s_; }
    double elapsed_s() const { return std::chrono::duration<double>(Clock::now() - start_).count(); }
    double remaining_s() const { return std::max(0.0, limit_s_ - elapsed_s()); }
    bool expired() const { return elapsed_s() >= limit_s_; }

  private:
    using Clock = std::chrono::steady_clock;
    double limit_s_;
    Clock::time_point start_;
};

}  // namespace ray_deepep
