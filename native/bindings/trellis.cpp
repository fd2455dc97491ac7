#include "trellis.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <limits>
#include <string>
#include <vector>

#include "../src/threads.hpp"
#include "../src/trellis_wide.hpp"

namespace py = pybind11;
namespace trellis = rmm::trellis;

namespace {

template <class T>
using Input = py::array_t<T, py::array::c_style | py::array::forcecast>;

[[noreturn]] void malformed(const char* message) {
    py::object type = py::module_::import("rmmformat.errors").attr("LayoutError");
    py::object value = type(py::str(message), py::arg("rule") = "RMM-087");
    PyErr_SetObject(type.ptr(), value.ptr());
    throw py::error_already_set();
}

py::tuple encode(const Input<float>& rows, const Input<uint8_t>& row_bytes, uint32_t base, const Input<float>& lambdas,
                 unsigned families) {
    if (rows.ndim() != 2) throw py::value_error("rows must be (k, n)");
    const uint64_t n_rows = static_cast<uint64_t>(rows.shape(0)), n = static_cast<uint64_t>(rows.shape(1));
    if (row_bytes.ndim() != 1 || static_cast<uint64_t>(row_bytes.shape(0)) != n_rows || lambdas.ndim() != 1 ||
        static_cast<uint64_t>(lambdas.shape(0)) != n_rows) {
        throw py::value_error("row_bytes and lambdas must have one value a row");
    }
    if (base > UINT16_MAX) throw py::value_error("base must be 16 bits");
    if (families > 3) throw py::value_error("families must be 0 to 3");
    py::array_t<float> decoded({rows.shape(0), rows.shape(1)});
    std::vector<uint8_t> numbers(row_bytes.data(), row_bytes.data() + n_rows), run;
    float* out = decoded.mutable_data();
    const char* wrong;
    {
        py::gil_scoped_release unlocked;
        rmm::ExactArithmetic exact;
        wrong = trellis::encode(rows.data(), n_rows, n, numbers.data(), static_cast<uint16_t>(base), lambdas.data(),
                                families, run, out);
    }
    if (wrong) throw py::value_error(wrong);
    return py::make_tuple(py::bytes(reinterpret_cast<const char*>(run.data()), run.size()), decoded);
}

// The bytes of a contiguous buffer.
struct Bytes {
    py::buffer_info info;
    const uint8_t* data;
    uint64_t size;

    explicit Bytes(const py::buffer& buffer) : info(buffer.request()) {
        py::ssize_t stride = info.itemsize;
        for (py::ssize_t d = info.ndim; d-- > 0; stride *= info.shape[d]) {
            if (info.shape[d] > 1 && info.strides[d] != stride) throw py::value_error("the buffer is not contiguous");
        }
        data = static_cast<const uint8_t*>(info.ptr);
        size = static_cast<uint64_t>(info.size) * static_cast<uint64_t>(info.itemsize);
    }
};

uint64_t run_bytes(const py::buffer& data) {
    Bytes bytes(data);
    return trellis::run_bytes(bytes.data, bytes.size);
}

trellis::Run parse(const Bytes& bytes, uint64_t n_rows, uint64_t n) {
    if (n_rows == 0 || n == 0) throw py::value_error("a run has rows and values");
    const uint64_t n_bytes = trellis::run_bytes(bytes.data, bytes.size);
    trellis::Run run;
    if (const char* wrong = trellis::parse(bytes.data, n_bytes, n_rows, n, run)) malformed(wrong);
    return run;
}

// The kernels of a name, "" being the quickest that there are and "portable" none.
const trellis::WideKernels* kernels_of(const std::string& name) {
    if (name.empty()) return trellis::widest_kernels();
    if (name == "portable") return nullptr;
    for (const trellis::WideKernels& kernels : trellis::wide_kernels()) {
        if (name == kernels.name) return &kernels;
    }
    throw py::value_error("this processor has no such kernels");
}

std::vector<std::string> kernels() {
    std::vector<std::string> names = {"portable"};
    for (const trellis::WideKernels& wide : trellis::wide_kernels()) names.push_back(wide.name);
    return names;
}

py::tuple decode(const py::buffer& data, uint64_t n_rows, uint64_t n, const std::string& name) {
    Bytes bytes(data);
    const trellis::WideKernels* wide = kernels_of(name);
    trellis::Decoding decoding;
    decoding.run = parse(bytes, n_rows, n);
    const uint64_t limit = static_cast<uint64_t>(std::numeric_limits<py::ssize_t>::max()) / sizeof(float);
    if (n > limit / n_rows) throw std::bad_alloc();
    // Zeros are only asked for, not written: rows without symbols take no memory until they are read.
    py::array_t<float> out = py::module_::import("numpy").attr("zeros")(py::make_tuple(n_rows, n), "float32");
    float* values = out.mutable_data();
    decoding.target = [&](uint64_t row) { return values + row * n; };
    {
        py::gil_scoped_release unlocked;
        rmm::ExactArithmetic exact;
        trellis::decode(&decoding, 1, wide);
    }
    if (decoding.wrong) malformed(decoding.wrong);
    return py::make_tuple(out, static_cast<uint64_t>(decoding.run.end - bytes.data));
}

void check(const py::buffer& data, uint64_t n_rows, uint64_t n) {
    Bytes bytes(data);
    trellis::Decoding decoding;
    decoding.run = parse(bytes, n_rows, n);
    std::vector<float> row(n);  // the run has been seen to be long enough for it
    decoding.target = [&](uint64_t) { return row.data(); };
    {
        py::gil_scoped_release unlocked;
        rmm::ExactArithmetic exact;
        trellis::decode(&decoding, 1);
    }
    if (decoding.wrong) malformed(decoding.wrong);
}

py::tuple table(unsigned number) {
    if (number > UINT8_MAX || !trellis::is_table(static_cast<uint8_t>(number))) {
        throw py::value_error("table numbers are 1 to 112 and 129 to 240");
    }
    const trellis::Table& t = trellis::table(static_cast<uint8_t>(number));
    const py::ssize_t n = static_cast<py::ssize_t>(t.escape) + 1;
    return py::make_tuple(t.raw_bits, py::array_t<uint16_t>(n, t.frequency), py::array_t<float>(n, t.bits));
}

}  // namespace

void add_trellis(py::module_& module) {
    module.def("trellis_encode", &encode, py::arg("rows"), py::arg("row_bytes"), py::arg("base"), py::arg("lambdas"),
               py::arg("families") = 0,
               "One trellis run of rows (k, n), and what a reader decodes from it.");
    module.def("trellis_decode", &decode, py::arg("data"), py::arg("k"), py::arg("n"), py::arg("kernels") = "",
               "The rows (k, n) of the trellis run that data starts with, and its bytes.");
    module.def("trellis_kernels", &kernels, "Ways to decode that this processor has, the quickest last.");
    module.def("trellis_check", &check, py::arg("data"), py::arg("k"), py::arg("n"),
               "Decode a trellis run without keeping its rows (RMM-087).");
    module.def("trellis_run_bytes", &run_bytes, py::arg("data"),
               "Bytes of the trellis run that data starts with; 0 if data cannot hold it.");
    module.def("trellis_table", &table, py::arg("number"),
               "Raw bits, frequencies, and cost of each symbol in bits, the last one the escape's.");
}
