// The trellis encoding for Python.
#pragma once

#include <pybind11/pybind11.h>

void add_trellis(pybind11::module_& module);
