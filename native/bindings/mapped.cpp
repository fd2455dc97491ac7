#include "mapped.hpp"

#include <cerrno>
#include <memory>
#include <string>

#include "../src/map.hpp"
#include "../src/report.hpp"

namespace py = pybind11;

namespace {

std::unique_ptr<rmm::Map> map(const py::object& path) {
    PyObject* converted = nullptr;
    if (!PyUnicode_FSConverter(path.ptr(), &converted)) throw py::error_already_set();
    const std::string name = py::reinterpret_steal<py::bytes>(converted);
    try {
        py::gil_scoped_release unlocked;
        return std::make_unique<rmm::Map>(name.c_str());
    } catch (const rmm::Failure& failure) {
#if defined(_WIN32)
        PyErr_SetExcFromWindowsErrWithFilename(PyExc_OSError, failure.os_error, name.c_str());
#else
        errno = failure.os_error;
        PyErr_SetFromErrnoWithFilename(PyExc_OSError, name.c_str());
#endif
        throw py::error_already_set();
    }
}

}  // namespace

void add_mapped(py::module_& module) {
    py::class_<rmm::Map>(module, "Map", py::buffer_protocol(),
                         "The bytes of a file, mapped to be read; it stays mapped as long as a view of it lives.")
        .def(py::init(&map), py::arg("path"))
        .def_property_readonly("size", &rmm::Map::size)
        .def("release", &rmm::Map::release, py::arg("offset"), py::arg("n_bytes"),
             "Take the pages of a range out of this process's memory; they come back when they are read.")
        .def_buffer([](rmm::Map& self) {
            return py::buffer_info(const_cast<uint8_t*>(self.data()), 1, py::format_descriptor<uint8_t>::format(), 1,
                                   {static_cast<py::ssize_t>(self.size())}, {1}, true);
        });
}
