#include "bindings_cuda/bindings.h"
#include "cuda/row_dots.h"

namespace py = pybind11;

namespace ray_deepep {

void register_row_dots(py::module_& module) {
    module.def(
        "row_dots",
        [](uintptr_t a, uintptr_t b, uintptr_t weights, uintptr_t out, int64_t num_rows, int64_t num_groups,
           int64_t hidden, DType dtype, uintptr_t stream) {
            RowDotsParams params;
            params.a = reinterpret_cast<std::byte*>(a);
            params.b = reinterpret_cast<const std::byte*>(b);
            params.weights = reinterpret_cast<const float*>(weights);
            params.out = reinterpret_cast<float*>(out);
            params.num_rows = num_rows;
            params.num_groups = num_groups;
            params.hidden = hidden;
            params.dtype = dtype;
            launch_row_dots(params, as_stream(stream));
        },
        py::kw_only(), py::arg("a"), py::arg("b"), py::arg("weights"), py::arg("out"), py::arg("num_rows"),
        py::arg("num_groups"), py::arg("hidden"), py::arg("dtype"), py::arg("stream"),
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace ray_deepep
