// Host side of every launcher: argument checks, device selection and error codes for Python.
#pragma once

#include <cuda_runtime.h>

// Element types, numbered as in DTYPES of fastlightgen/ops/tables.py.
enum flg_dtype { FLG_F32 = 0, FLG_F16 = 1, FLG_BF16 = 2 };

// A launcher never throws or prints: it returns a cudaError and Python raises the exception.
#define FLG_REQUIRE(cond)                                        \
  do {                                                           \
    if (!(cond)) return static_cast<int>(cudaErrorInvalidValue); \
  } while (0)

#define FLG_TRY(call)                                       \
  do {                                                      \
    const cudaError_t err_ = (call);                        \
    if (err_ != cudaSuccess) return static_cast<int>(err_); \
  } while (0)

namespace flg {

// Selects a device until the end of the scope. Needed because the extension links its own CUDA runtime, which does not
// know the device that torch has selected.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status = cudaGetDevice(&previous_);
    if (status == cudaSuccess && previous_ != device) {
      status = cudaSetDevice(device);
      restore_ = status == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (restore_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t status;

 private:
  int previous_ = 0;
  bool restore_ = false;
};

}  // namespace flg
