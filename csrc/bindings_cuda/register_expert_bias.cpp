#include "bindings_cuda/bindings.h"
#include "cuda/expert_bias.h"

namespace py = pybind11;

namespace ray_deepep {

void register_expert_bias(py::module_& module) {
    module.def(
        "expert_bias",
        [](uintptr_t rows, uintptr_t biases, uintptr_t ends, int64_t num_rows, int num_experts, int64_t width,
           DType dtype, uintptr_t stream) {
            ExpertBiasParams params;
            params.rows = reinterpret_cast<std::byte*>(rows);
            params.biases = reinterpret_cast<const std::byte*>(biases);
            params.ends = reinterpret_cast<const int32_t*>(ends);
            params.num_rows = num_rows;
            params.num_experts = num_experts;
            params.width = width;
            params.dtype = dtype;
            launch_expert_bias(params, as_stream(stream));
        },
        py::kw_only(), py::arg("rows"), py::arg("biases"), py::arg("ends"), py::arg("num_rows"), py::arg("num_experts"),
        py::arg("width"), py::arg("dtype"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

}  // namespace ray_deepep
