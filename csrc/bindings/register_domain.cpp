#include "bindings/bindings.h"
#include "heap/domain.h"

#include <pybind11/stl.h>

namespace py = pybind11;

namespace ray_deepep {

void register_domain(py::module_& module) {
    py::class_<Domain, std::shared_ptr<Domain>>(module, "Domain")
        .def(py::init<int, int>(), py::arg("rank"), py::arg("num_ranks"))
        .def_property_readonly("address", &Domain::address)
        .def_property_readonly("secret", &Domain::secret)
        .def("connect", &Domain::connect, py::arg("addresses"), py::arg("secrets"), py::arg("deadline_s"),
             py::call_guard<py::gil_scoped_release>())
        .def("peer_is_gone", &Domain::peer_is_gone, py::arg("peer"))
        .def("close", &Domain::close);
}

}  // namespace ray_deepep
