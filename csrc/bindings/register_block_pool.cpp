#include "bindings/bindings.h"
#include "host/block_pool.h"

namespace py = pybind11;

namespace ray_deepep {

void register_block_pool(py::module_& module) {
    py::class_<Block>(module, "Block", py::buffer_protocol()).def_buffer([](Block& block) {
        const auto count = static_cast<py::ssize_t>(block.bytes());
        return py::buffer_info(block.data(), 1, py::format_descriptor<uint8_t>::format(), 1, {count}, {1});
    });
    py::class_<BlockPool, std::shared_ptr<BlockPool>>(module, "BlockPool")
        .def(py::init<size_t>(), py::arg("max_idle_bytes"))
        .def("take", &BlockPool::take, py::arg("bytes"));
}

}  // namespace ray_deepep
