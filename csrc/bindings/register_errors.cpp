#include "bindings/bindings.h"
#include "bindings/error_translation.h"

namespace py = pybind11;

namespace ray_deepep {
namespace {

void add_exception(py::module_& module, const char* name) {
    const std::string full = std::string("ray_deepep._core.") + name;
    module.attr(name) = py::reinterpret_steal<py::object>(PyErr_NewException(full.c_str(), nullptr, nullptr));
}

}  // namespace

void register_errors(py::module_& module) {
    for (const char* name : {"CoreFault", "CoreBootstrapError", "CoreMismatch", "CoreArgumentError", "CoreMasked"}) {
        add_exception(module, name);
    }
    translate_errors();
}

}  // namespace ray_deepep
