// Tensor pointers and the stream arrive as integers (data_ptr(), cuda_stream), so the module needs no torch headers.
// Python has checked shapes, types and devices before it calls.
#pragma once

#include <pybind11/pybind11.h>
#include <stdint.h>

namespace py = pybind11;

// An address from Python that converts to any pointer type; 0 is a null pointer.
struct Ptr {
  uintptr_t value;
  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

namespace pybind11::detail {
template <>
struct type_caster<Ptr> {
  PYBIND11_TYPE_CASTER(Ptr, const_name("int"));
  bool load(handle source, bool convert) {
    make_caster<uintptr_t> integer;
    if (!integer.load(source, convert)) return false;
    value = Ptr{cast_op<uintptr_t>(integer)};
    return true;
  }
};
}  // namespace pybind11::detail
