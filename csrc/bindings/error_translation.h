// C++ errors as the exceptions of ray_deepep._core; each module that throws them calls translate_errors() once.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>

#include "common/fault.h"

namespace ray_deepep {

void translate_errors();
// A record's fields as a dict, None where there is none.
pybind11::object to_python(const std::optional<FaultRecord>& record);

}  // namespace ray_deepep
