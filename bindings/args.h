// Every launcher takes one dict: the fields of its params struct by their names, and `stream`. (Keyword arguments would
// cost 1 us more per call.) Tensor pointers and the stream arrive as integers (data_ptr(), cuda_stream), so the module
// needs no torch headers. Python has checked shapes, types and devices before it calls.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>
#include <string.h>

#include <string>
#include <vector>

namespace py = pybind11;

namespace flg {

// Convert a Python number to the type of a field; a wrong type sets Python's error.
template <typename T>
void read(PyObject* from, T*& to) {
  to = static_cast<T*>(PyLong_AsVoidPtr(from));  // 0 is a null pointer
}
inline void read(PyObject* from, int64_t& to) { to = PyLong_AsLongLong(from); }
inline void read(PyObject* from, int& to) { to = static_cast<int>(PyLong_AsLong(from)); }  // also a bool
inline void read(PyObject* from, float& to) { to = static_cast<float>(PyFloat_AsDouble(from)); }
template <typename T, size_t kCount>
void read(PyObject* from, T (&to)[kCount]) {
  PyObject* items = PySequence_Fast(from, "wanted a sequence");
  if (items == nullptr) return;
  if (PySequence_Fast_GET_SIZE(items) != static_cast<Py_ssize_t>(kCount))
    PyErr_Format(PyExc_TypeError, "wanted %zu items", kCount);
  for (size_t i = 0; i < kCount && !PyErr_Occurred(); ++i)
    read(PySequence_Fast_GET_ITEM(items, static_cast<Py_ssize_t>(i)), to[i]);
  Py_DECREF(items);
}

// A field of the params struct P: its name in Python, and how to read it.
template <typename P>
struct Field {
  PyObject* name;
  void (*read)(PyObject*, P&);
  Field(const char* member, void (*read)(PyObject*, P&)) : read(read) {
    const char* dot = strrchr(member, '.');                                // "rope.size" is `size`
    name = PyUnicode_InternFromString(dot == nullptr ? member : dot + 1);  // kept for the life of the module
  }
};
#define FLG_FIELD(P, member) flg::Field<P>(#member, [](PyObject* from, P& params) { flg::read(from, params.member); })

// Makes `launch` the function `name` of the module. It releases the GIL and returns the launcher's cudaError.
template <typename P>
void bind(py::module_& m, const char* name, int (*launch)(const P*, void*), std::vector<Field<P>> fields) {
  m.def(name, [name, launch, fields, key = PyUnicode_InternFromString("stream")](const py::dict& given) {
    P params{};
    void* stream = nullptr;
    const auto find = [&](PyObject* field) {
      PyObject* value = PyDict_GetItemWithError(given.ptr(), field);
      if (value == nullptr) throw py::type_error(std::string(name) + ": " + PyUnicode_AsUTF8(field) + " is missing");
      return value;
    };
    read(find(key), stream);
    for (const auto& field : fields) {
      if (!PyErr_Occurred()) field.read(find(field.name), params);
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    if (given.size() != fields.size() + 1) throw py::type_error(std::string(name) + ": got an unknown field");
    const py::gil_scoped_release no_gil;
    return launch(&params, stream);
  });
}

}  // namespace flg
