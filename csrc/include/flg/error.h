/* The CUDA runtime's message for a cudaError. */
#pragma once

#ifdef __cplusplus
extern "C"
#endif
    const char* flg_error_string(int error);
