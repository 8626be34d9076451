// Host side of every launcher: argument checks, the device, the error that goes back to Python.
#pragma once

#include <cuda_runtime.h>

// Element types as they come from Python.
enum flg_dtype { FLG_F32 = 0, FLG_F16 = 1, FLG_BF16 = 2 };

// A launcher never throws or prints: it returns a cudaError and Python turns it into words.
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

// The extension has its own CUDA runtime: select the tensor's device, and give the old one back on the way out.
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
