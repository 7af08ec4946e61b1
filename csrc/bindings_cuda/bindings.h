// One function per concept; module.cpp calls them.
#pragma once

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

namespace ray_deepep {

inline cudaStream_t as_stream(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

// Throws what a Python signal handler raised.
void run_signal_handlers();

void register_device_low_latency(pybind11::module_& module);
void register_expert_bias(pybind11::module_& module);
void register_row_dots(pybind11::module_& module);

}  // namespace ray_deepep
