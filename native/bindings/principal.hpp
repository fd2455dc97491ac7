#pragma once

#include <pybind11/pybind11.h>

void add_principal(pybind11::module_& module);
