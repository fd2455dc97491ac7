#include "principal.hpp"

#include <pybind11/numpy.h>

#include <algorithm>

#include "../src/bytes.hpp"
#include "../src/principal.hpp"

namespace py = pybind11;

namespace {

using Stack = py::array_t<double, py::array::c_style | py::array::forcecast>;

bool possible(uint64_t n, uint64_t n_values) {
    uint64_t all = 0;
    return rmm::multiply(n, n_values, all) && all <= rmm::MOST_POINT_VALUES &&
           std::min(n, n_values) <= rmm::MOST_SMALLER_SIDE;
}

py::object find(const Stack& stack, uint64_t group, uint64_t p, bool centred, uint32_t threads) {
    if (stack.ndim() != 3 || stack.size() == 0) throw py::value_error("the stack must be (n, rank, length) and not empty");
    const uint64_t n = static_cast<uint64_t>(stack.shape(0)), rank = static_cast<uint64_t>(stack.shape(1)),
                   length = static_cast<uint64_t>(stack.shape(2));
    if (group == 0 || group > length || !possible(n, rank * group)) throw py::value_error("groups of that size are not for this");
    py::array_t<float> mean({rank, length}), basis({p, rank, length}), coefficients({n, p, (length + group - 1) / group});
    const rmm::SharedPart shared = {mean.mutable_data(), p ? basis.mutable_data() : nullptr,
                                    p ? coefficients.mutable_data() : nullptr};
    bool good;
    {
        py::gil_scoped_release unlocked;
        good = rmm::find_principal({stack.data(), n, rank, length}, group, p, centred, threads, shared);
    }
    if (!good) return py::none();
    return py::make_tuple(mean, basis, coefficients);
}

}  // namespace

void add_principal(py::module_& module) {
    module.def("principal_possible", &possible, py::arg("n"), py::arg("n_values"),
               "Whether find_principal takes n points of so many values.");
    module.def("find_principal", &find, py::arg("stack"), py::arg("group"), py::arg("p"), py::arg("centred"),
               py::arg("threads") = 0,
               "Mean (rank, length), basis (p, rank, length) and coefficients (n, p, n_groups) of groups of positions; None "
               "if values are not finite or beyond f32.");
}
