#include <cuda_runtime.h>

#include "flg/error.h"

extern "C" const char* flg_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
