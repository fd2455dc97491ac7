// The Python module: checks of arguments, the interpreter's lock released, statuses to exceptions.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "mapped.hpp"
#include "principal.hpp"
#include "rmm/rmm.h"
#include "trellis.hpp"

namespace py = pybind11;

namespace {

// --- errors ------------------------------------------------------------------------------------------

const char* exception_name(int32_t status, int32_t rule) {
    switch (status) {
        case RMM_TRUNCATED:
            return "TruncatedError";
        case RMM_CHECKSUM:
            return "ChecksumError";
        case RMM_NOT_RMM:
        case RMM_MALFORMED:
            return rule == 90 || rule == 91 ? "MetadataError" : "LayoutError";
        case RMM_UNSUPPORTED_VERSION:
        case RMM_UNSUPPORTED_SECTION:
        case RMM_UNSUPPORTED_KIND:
        case RMM_UNSUPPORTED_ENCODING:
            return "UnsupportedError";
        case RMM_NO_TASK:
        case RMM_NO_ENTRY:
        case RMM_NO_TARGET:
            return "NotFoundError";
        default:
            return "InternalError";
    }
}

// Text that may have bytes from a broken file in it.
py::str text_of(const std::string& bytes) {
    return py::reinterpret_steal<py::str>(
        PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "replace"));
}

// `path` is as the file system has it; empty for bytes in memory.
[[noreturn]] void raise(const rmm_error& error, const std::string& path) {
    switch (error.status) {
        case RMM_IO: {
#if defined(_WIN32)
            PyErr_SetExcFromWindowsErrWithFilename(PyExc_OSError, error.os_error, path.c_str());
#else
            errno = error.os_error;
            PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
#endif
            throw py::error_already_set();
        }
        case RMM_NO_MEMORY:
            PyErr_SetString(PyExc_MemoryError, error.message);
            throw py::error_already_set();
        case RMM_BAD_ARGUMENT:
        case RMM_BUFFER_TOO_SMALL:
            throw py::value_error(error.message);
        default:
            break;
    }
    py::dict where;
    if (error.rule != 0) {
        char rule[16];
        std::snprintf(rule, sizeof rule, "RMM-%03d", error.rule);
        where["rule"] = rule;
    }
    if (error.offset != RMM_NO_OFFSET) where["offset"] = error.offset;
    if (!path.empty()) {
        where["path"] = py::reinterpret_steal<py::object>(
            PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
    }
    py::object type = py::module_::import("rmmformat.errors").attr(exception_name(error.status, error.rule));
    py::object value = type(text_of(error.message), **where);
    PyErr_SetObject(type.ptr(), value.ptr());
    throw py::error_already_set();
}

// --- bytes of the caller's ----------------------------------------------------------------------------

// A contiguous buffer of any item type. Released under the interpreter's lock.
class Bytes {
  public:
    Bytes(const py::object& object, bool writable) {
        int flags = PyBUF_ANY_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw py::error_already_set();
    }
    ~Bytes() {
        if (Py_IsInitialized()) {
            py::gil_scoped_acquire lock;
            PyBuffer_Release(&view_);
        }
    }
    Bytes(const Bytes&) = delete;
    Bytes& operator=(const Bytes&) = delete;

    uint8_t* data() const { return static_cast<uint8_t*>(view_.buf); }
    uint64_t size() const { return static_cast<uint64_t>(view_.len); }

  private:
    Py_buffer view_;
};

// --- the open file ------------------------------------------------------------------------------------

// The handle and what it reads from; alive as long as a File, a call or a view of the bytes uses it.
struct Handle {
    rmm_file* file = nullptr;
    std::unique_ptr<Bytes> bytes;  // of from_buffer
    std::string path;

    Handle() = default;
    Handle(const Handle&) = delete;
    Handle& operator=(const Handle&) = delete;
    ~Handle() { rmm_close(file); }
};

using Shared = std::shared_ptr<Handle>;

rmm_file_info info_of(const Handle& handle) {
    rmm_file_info info{};
    rmm_get_file_info(handle.file, sizeof info, &info, nullptr);
    return info;
}

// What memoryviews of the file hold on to.
struct Mapping {
    Shared handle;
};

// Types made when the module is loaded, and never given back: at exit the interpreter may be gone.
PyObject *entry_type, *private_type, *violation_type;

template <class... Fields>
py::object make(PyObject* type, Fields&&... fields) {
    return py::reinterpret_borrow<py::object>(type)(std::forward<Fields>(fields)...);
}

py::str text(const char* utf8) { return py::str(utf8); }

class File {
  public:
    explicit File(Shared handle) : handle_(std::move(handle)) {}

    static File open(const py::object& path) {
        PyObject* converted = nullptr;
        if (!PyUnicode_FSConverter(path.ptr(), &converted)) throw py::error_already_set();
        auto handle = std::make_shared<Handle>();
        handle->path = py::reinterpret_steal<py::bytes>(converted);
        rmm_error error;
        rmm_status status;
        {
            py::gil_scoped_release unlocked;
            status = rmm_open(handle->path.c_str(), &handle->file, &error);
        }
        if (status != RMM_OK) raise(error, handle->path);
        return File(std::move(handle));
    }

    static File from_buffer(const py::object& data) {
        auto handle = std::make_shared<Handle>();
        handle->bytes = std::make_unique<Bytes>(data, false);
        rmm_error error;
        rmm_status status;
        {
            py::gil_scoped_release unlocked;
            status = rmm_open_memory(handle->bytes->data(), handle->bytes->size(), &handle->file, &error);
        }
        if (status != RMM_OK) raise(error, "");
        return File(std::move(handle));
    }

    // Loads that run hold on to the handle themselves, and so do views.
    void close() { handle_.reset(); }
    bool closed() const { return handle_ == nullptr; }

    Shared need() const {
        if (!handle_) throw py::value_error("the file is closed");
        return handle_;
    }

    py::object buffer() const {
        py::object mapping = py::cast(Mapping{need()});
        PyObject* view = PyMemoryView_FromObject(mapping.ptr());
        if (!view) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(view);
    }

    uint64_t n_tasks() const { return rmm_n_tasks(need()->file); }
    uint64_t n_targets() const { return rmm_n_targets(need()->file); }
    bool damaged_slot() const { return info_of(*need()).damaged_slot != 0; }
    uint64_t file_length() const { return info_of(*need()).file_length; }

    py::list task_names() const {
        Shared handle = need();
        uint64_t n = rmm_n_tasks(handle->file);
        py::list names(n);
        for (uint64_t i = 0; i < n; ++i) names[i] = text(rmm_task_name(handle->file, i));
        return names;
    }

    uint64_t find_task(const std::string& name) const {
        Shared handle = need();
        uint64_t task;
        rmm_error error;
        // A name with a NUL is nobody's, and must not be cut to somebody's.
        const char* sought = name.find('\0') == std::string::npos ? name.c_str() : "";
        if (rmm_find_task(handle->file, sought, &task, &error) != RMM_OK) raise(error, handle->path);
        return task;
    }

    py::tuple entries(uint64_t task, int dtype) const {
        Shared handle = need();
        std::vector<rmm_entry_info> infos(task_info(*handle, task).n_entries);
        uint64_t arena;
        check(*handle, [&](rmm_error* error) {
            return rmm_get_entries(handle->file, task, dtype, sizeof(rmm_entry_info), infos.data(), infos.size(),
                                   &arena, error);
        });
        py::list list(infos.size());
        for (size_t i = 0; i < infos.size(); ++i) {
            const rmm_entry_info& info = infos[i];
            size_t n_axes = std::find(info.kernel, info.kernel + 3, 0) - info.kernel;
            py::tuple kernel(n_axes);
            for (size_t axis = 0; axis < n_axes; ++axis) kernel[axis] = info.kernel[axis];
            list[i] = make(entry_type, text(info.target), info.n_in, info.n_out, info.kind, info.flags, kernel, info.rank,
                                 info.scale, info.dtype_a, info.dtype_b, info.offset_a, info.offset_b);
        }
        return py::make_tuple(list, arena);
    }

    py::list privates(uint64_t task) const {
        Shared handle = need();
        std::vector<rmm_private_info> infos(task_info(*handle, task).n_privates);
        check(*handle, [&](rmm_error* error) {
            return rmm_get_privates(handle->file, task, sizeof(rmm_private_info), infos.data(), infos.size(), error);
        });
        py::list list(infos.size());
        for (size_t i = 0; i < infos.size(); ++i) {
            const rmm_private_info& info = infos[i];
            py::tuple shape(info.n_dims);
            for (unsigned d = 0; d < info.n_dims; ++d) shape[d] = info.shape[d];
            list[i] = make(private_type, text(info.name), info.dtype, info.role, shape, info.offset, info.n_bytes);
        }
        return list;
    }

    void load_task(uint64_t task, int dtype, const py::object& out, unsigned threads) const {
        Shared handle = need();
        Bytes arena(out, true);
        check(*handle, [&](rmm_error* error) {
            py::gil_scoped_release unlocked;
            return rmm_load_task(handle->file, task, dtype, arena.data(), arena.size(), threads, error);
        });
    }

    void load_factor(uint64_t task, uint64_t entry, int factor, int dtype, const py::object& out) const {
        Shared handle = need();
        Bytes memory(out, true);
        check(*handle, [&](rmm_error* error) {
            py::gil_scoped_release unlocked;
            return rmm_load_factor(handle->file, task, entry, factor, dtype, memory.data(), memory.size(), error);
        });
    }

    void check_task(uint64_t task) const {
        Shared handle = need();
        check(*handle, [&](rmm_error* error) {
            py::gil_scoped_release unlocked;
            return rmm_check_task(handle->file, task, error);
        });
    }

    py::list validate() const;

  private:
    template <class Call>
    static void check(const Handle& handle, Call&& call) {
        rmm_error error;
        if (call(&error) != RMM_OK) raise(error, handle.path);
    }

    static rmm_task_info task_info(const Handle& handle, uint64_t task) {
        rmm_task_info info;
        check(handle, [&](rmm_error* error) {
            return rmm_get_task_info(handle.file, task, sizeof info, &info, error);
        });
        return info;
    }

    Shared handle_;
};

// --- validation ---------------------------------------------------------------------------------------

struct Found {
    int32_t rule;
    uint64_t offset;
    std::string message;
};

// `call` validates, with the callback, what it is given and the error it is to fill.
template <class Call>
py::list list_violations(Call&& call) {
    std::vector<Found> found;
    rmm_error error;
    rmm_status status;
    {
        py::gil_scoped_release unlocked;
        auto keep = [](void* user, const rmm_violation* violation) {
            try {
                static_cast<std::vector<Found>*>(user)->push_back(
                    {violation->rule, violation->offset, violation->message});
            } catch (...) {
                return 1;
            }
            return 0;
        };
        status = call(keep, &found, &error);
    }
    if (status == RMM_STOPPED) throw std::bad_alloc();
    if (status != RMM_OK) raise(error, "");
    py::list list(found.size());
    for (size_t i = 0; i < found.size(); ++i) {
        list[i] = make(violation_type, found[i].rule, found[i].offset, text_of(found[i].message));
    }
    return list;
}

py::list File::validate() const {
    Shared handle = need();
    return list_violations([&](rmm_violation_callback keep, void* found, rmm_error* error) {
        return rmm_validate_file(handle->file, keep, found, nullptr, error);
    });
}

py::list validate_bytes(const py::object& data) {
    Bytes bytes(data, false);
    return list_violations([&](rmm_violation_callback keep, void* found, rmm_error* error) {
        return rmm_validate_memory(bytes.data(), bytes.size(), keep, found, nullptr, error);
    });
}

uint32_t crc32c(const py::object& data, uint32_t crc) {
    Bytes bytes(data, false);
    py::gil_scoped_release unlocked;
    return rmm_crc32c(crc, bytes.data(), bytes.size());
}

PyObject* named_tuple(py::module_& module, const char* name, const std::vector<std::string>& fields, const char* doc) {
    py::object type = py::module_::import("collections")
                          .attr("namedtuple")(name, fields, py::arg("module") = "rmmformat._native");
    type.attr("__doc__") = doc;
    module.attr(name) = type;
    return type.release().ptr();
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The C++ core: mapping, index, checks, reconstruction.";
    module.attr("__version__") = rmm_version();

    entry_type = named_tuple(module, "Entry",
                             {"target", "n_in", "n_out", "kind", "flags", "kernel", "rank", "scale", "dtype_a",
                              "dtype_b", "offset_a", "offset_b"},
                             "What a task stores at one target, and where its factors go in an arena.");
    private_type = named_tuple(module, "Private", {"name", "dtype", "role", "shape", "offset", "n_bytes"},
                               "One private tensor; offset and n_bytes locate its bytes in the file.");
    violation_type = named_tuple(module, "Violation", {"rule", "offset", "message"},
                                 "A rule that the file breaks: number of the rule, offset, message.");

    py::class_<Mapping>(module, "_Mapping", py::buffer_protocol()).def_buffer([](Mapping& mapping) {
        rmm_file_info info = info_of(*mapping.handle);
        return py::buffer_info(const_cast<uint8_t*>(info.data), 1, py::format_descriptor<uint8_t>::format(), 1,
                               {static_cast<py::ssize_t>(info.n_bytes)}, {1}, true);
    });

    py::class_<File>(module, "File", "An open .rmm file: header and index are checked, payload is mapped.")
        .def_static("open", &File::open, py::arg("path"), "Map a file and check its index.")
        .def_static("from_buffer", &File::from_buffer, py::arg("data"),
                    "Read from a buffer, which is kept and must not change.")
        .def("close", &File::close,
             "Let go of the file; running loads and views of the buffer keep what they need.")
        .def_property_readonly("closed", &File::closed)
        .def_property_readonly("buffer", &File::buffer, "Read-only view of the whole file.")
        .def_property_readonly("n_tasks", &File::n_tasks)
        .def_property_readonly("n_targets", &File::n_targets)
        .def_property_readonly("file_length", &File::file_length,
                               "Bytes that the collection takes; what lies behind is scratch.")
        .def_property_readonly("damaged_slot", &File::damaged_slot,
                               "True if the slot that is not in use is damaged (RMM-012).")
        .def("task_names", &File::task_names)
        .def("find_task", &File::find_task, py::arg("name"))
        .def("entries", &File::entries, py::arg("task"), py::arg("dtype"),
             "Entries of a task, and the bytes of an arena for them.")
        .def("privates", &File::privates, py::arg("task"))
        .def("load_task", &File::load_task, py::arg("task"), py::arg("dtype"), py::arg("out"), py::arg("threads") = 0,
             "Reconstruct all factors of a task into a writable buffer.")
        .def("load_factor", &File::load_factor, py::arg("task"), py::arg("entry"), py::arg("factor"),
             py::arg("dtype"), py::arg("out"), "Reconstruct one factor (0: A, 1: B) into a writable buffer.")
        .def("check_task", &File::check_task, py::arg("task"),
             "Compare the checksums of all payload that a task uses.")
        .def("validate", &File::validate, "Check every rule over every byte of the version that was opened.");

    add_mapped(module);
    add_principal(module);
    add_trellis(module);
    module.def("validate_bytes", &validate_bytes, py::arg("data"), "Check every rule over every byte.");
    module.def("crc32c", &crc32c, py::arg("data"), py::arg("crc") = 0,
               "CRC32C of data, continued from crc.");
}
