// Calls that may never return, made on a thread of their own so that the caller can stop waiting.
#pragma once

#include <functional>

#include "common/interrupt.h"

namespace ray_deepep {

// Runs `call` on a new thread and waits. True: it returned; what it threw is thrown here. False: the deadline passed.
// After that, or when `interrupt` throws, the thread stays inside the call for as long as the process lives: `call`
// owns all it touches, and nothing may use what it was in the middle of changing.
bool run_bounded(std::function<void()> call, double deadline_s, const Interrupt& interrupt);

}  // namespace ray_deepep
