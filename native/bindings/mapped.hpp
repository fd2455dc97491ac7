// Mapped files for Python.
#pragma once

#include <pybind11/pybind11.h>

void add_mapped(pybind11::module_& module);
