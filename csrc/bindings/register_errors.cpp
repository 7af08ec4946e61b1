// C++ errors become Python exceptions whose arguments are their fields; ray_deepep/shm.py turns them into public ones.
#include <exception>

#include "bindings/bindings.h"
#include "common/fault.h"

#include <pybind11/stl.h>

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

}  // namespace

void register_errors(py::module_& module) {
    // Process-wide and immutable once made: the exception types of this module.
    static py::exception<FaultError> fault(module, "CoreFault");
    static py::exception<BootstrapError> bootstrap(module, "CoreBootstrapError");
    static py::exception<MismatchError> mismatch(module, "CoreMismatch");
    static py::exception<ArgumentError> argument(module, "CoreArgumentError");
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const FaultError& error) {
            PyErr_SetObject(fault.ptr(), py::make_tuple(to_dict(error.record())).ptr());
        } catch (const BootstrapError& error) {
            const auto args = py::make_tuple(error.phase(), error.missing(), error.deadline_s(), error.what());
            PyErr_SetObject(bootstrap.ptr(), args.ptr());
        } catch (const MismatchError& error) {
            const auto args = py::make_tuple(to_string(error.operation()), error.peer(), error.field(),
                                             error.expected(), error.seen());
            PyErr_SetObject(mismatch.ptr(), args.ptr());
        } catch (const ArgumentError& error) {
            PyErr_SetObject(argument.ptr(), py::make_tuple(error.argument(), error.value(), error.what()).ptr());
        }
    });
}

}  // namespace ray_deepep
