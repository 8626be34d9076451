/* A cudaError in words. */
#pragma once

#ifdef __cplusplus
extern "C"
#endif
    const char* flg_error_string(int error);
