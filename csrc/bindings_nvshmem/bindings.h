// Parts of the module ray_deepep._nvshmem.
#pragma once

#include <pybind11/pybind11.h>

namespace ray_deepep {

void register_hop(pybind11::module_& module);

// Throws what a signal handler of Python's raised.
void run_signal_handlers();

}  // namespace ray_deepep
