#include "bindings/error_translation.h"

#include <pybind11/stl.h>

#include <exception>

namespace py = pybind11;

namespace ray_deepep {
namespace {

py::dict to_dict(const FaultRecord& record) {
    py::dict out;
    out["operation"] = to_string(record.operation);
    out["sequence"] = record.sequence;
    out["phase"] = record.phase;
    out["cause"] = to_string(record.cause);
    out["rank"] = record.rank;
    out["peer"] = record.peer;
    out["expected"] = record.expected;
    out["seen"] = record.seen;
    out["elapsed_s"] = record.elapsed_s;
    out["deadline_s"] = record.deadline_s;
    return out;
}

// Exceptions whose arguments are the error's fields; ray_deepep/core_errors.py makes public ones of them.
void raise(const char* name, const py::tuple& fields) {
    PyErr_SetObject(py::module_::import("ray_deepep._core").attr(name).ptr(), fields.ptr());
}

}  // namespace

py::object to_python(const std::optional<FaultRecord>& record) {
    if (!record) return py::none();
    return to_dict(*record);
}

void translate_errors() {
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const FaultError& error) {
            raise("CoreFault", py::make_tuple(to_dict(error.record())));
        } catch (const BootstrapError& error) {
            raise("CoreBootstrapError",
                  py::make_tuple(error.phase(), error.missing(), error.deadline_s(), error.what()));
        } catch (const MismatchError& error) {
            raise("CoreMismatch", py::make_tuple(to_string(error.operation()), error.peer(), error.field(),
                                                 error.expected(), error.seen(), error.first()));
        } catch (const MaskedError& error) {
            raise("CoreMasked", py::make_tuple(to_string(error.operation()), error.by()));
        } catch (const ArgumentError& error) {
            raise("CoreArgumentError", py::make_tuple(error.argument(), error.value(), error.what()));
        }
    });
}

}  // namespace ray_deepep
