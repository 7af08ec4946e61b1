// A way out of long waits.
#pragma once

#include <functional>

namespace ray_deepep {

// Called about ten times a second while waiting; throws to interrupt (Ctrl-C).
using Interrupt = std::function<void()>;

}  // namespace ray_deepep
