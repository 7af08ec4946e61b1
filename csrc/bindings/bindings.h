// One register function per concept. Only this folder includes pybind11.
#pragma once

#include <pybind11/pybind11.h>

namespace ray_deepep {

// Lets Ctrl-C and signal handlers run while C++ waits.
void run_signal_handlers();

void register_errors(pybind11::module_& module);
void register_domain(pybind11::module_& module);
void register_block_pool(pybind11::module_& module);
void register_host_buffer(pybind11::module_& module);
void register_low_latency(pybind11::module_& module);
void register_plan(pybind11::module_& module);

}  // namespace ray_deepep
