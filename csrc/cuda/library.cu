// What the CUDA library says of itself. cudart is linked in, so it loads, and answers with an error code, on a machine
// that has no driver.

#include "common.cuh"

#define LORAPAR_TEXT_(x) #x
#define LORAPAR_TEXT(x) LORAPAR_TEXT_(x)
#ifndef LORAPAR_CUDA_ARCHS
#define LORAPAR_CUDA_ARCHS "unknown architectures"
#endif

int lorapar_abi_version(void) { return LORAPAR_ABI_VERSION; }

const char *lorapar_build(void) {
    return "CUDA " LORAPAR_TEXT(__CUDACC_VER_MAJOR__) "." LORAPAR_TEXT(__CUDACC_VER_MINOR__) ", " LORAPAR_CUDA_ARCHS;
}

const char *lorapar_error_string(int status) {
    if (const char *text = lorapar::status_text(status)) return text;
    if (status > LORAPAR_ERROR_CUDA) return cudaGetErrorString(static_cast<cudaError_t>(status - LORAPAR_ERROR_CUDA));
    return "an unknown status";
}
