/* lorapar's C interface: pointers, sizes and a queue; no torch, no Python.
 *
 * Two shared libraries export these same functions: liblorapar_cpu (csrc/cpu, pointers to host memory) and
 * liblorapar_cuda (csrc/cuda, pointers to device memory of the current device). `queue` comes last and says where the
 * work runs:
 *   liblorapar_cpu   the most threads to use; 0 and 1 are both one. The work has ended when the function returns.
 *   liblorapar_cuda  a cudaStream_t as an integer, 0 for the default stream. The work is queued there and has not ended
 *                    when the function returns.
 *
 * Every function that does work returns a status: LORAPAR_OK, a LORAPAR_ERROR_* below, or LORAPAR_ERROR_CUDA + the
 * cudaError_t. On an error found in the arguments nothing has been written. Pointers are aligned to their type.
 *
 * A mask is n bytes, one an element, zero or not. Its words are ceil(n / 32) int32: element i, counted row-major, is
 * bit i % 32 of word i / 32, and the spare bits of the last word are 0.
 */
#ifndef LORAPAR_H
#define LORAPAR_H

#include <stdint.h>

/* Raised whenever a signature or a meaning below changes; native.py refuses a library of another version. */
#define LORAPAR_ABI_VERSION 2

#define LORAPAR_OK 0
#define LORAPAR_ERROR_NULL_POINTER 1 /* a null pointer although n > 0 (or, for a result, at all) */
#define LORAPAR_ERROR_SIZE 2         /* n < 0 or n > LORAPAR_MAX_SIZE */
#define LORAPAR_ERROR_ALIGNMENT 3    /* a pointer that is not aligned to its type */
#define LORAPAR_ERROR_MEMORY 4       /* no memory for working space */
#define LORAPAR_ERROR_CUDA 1000      /* 1000 + cudaError_t */

/* Elements a call takes at most: byte offsets into any of its arrays then fit 64 bits with room to spare. */
#define LORAPAR_MAX_SIZE ((int64_t)1 << 48)

#if defined(_WIN32)
#define LORAPAR_API __declspec(dllexport)
#else
#define LORAPAR_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ---- the library itself (library.cpp, library.cu) ---- */

/* LORAPAR_ABI_VERSION as it was when the library was built. */
LORAPAR_API int lorapar_abi_version(void);

/* What built it, for people: "C++17, GCC 12.2.0, OpenMP" or "CUDA 13.0, sm_80 sm_90 sm_100". Never NULL, never freed. */
LORAPAR_API const char *lorapar_build(void);

/* One line on a status. Never NULL, never freed, valid for any number. */
LORAPAR_API const char *lorapar_error_string(int status);

/* ---- masks at one bit an element (bitmask.cpp, bitmask.cu) ---- */

/* mask [n] bytes -> words [ceil(n / 32)]; every word is written whole. */
LORAPAR_API int lorapar_pack_mask(const uint8_t *mask, int64_t n, int32_t *words, intptr_t queue);

/* words [ceil(n / 32)] -> mask [n] bytes, each 0 or 1; spare bits are not looked at. */
LORAPAR_API int lorapar_unpack_mask(const int32_t *words, int64_t n, uint8_t *mask, intptr_t queue);

/* The number of bits set among the first n, into count [1]; spare bits are not looked at. */
LORAPAR_API int lorapar_count_mask(const int32_t *words, int64_t n, int64_t *count, intptr_t queue);

#ifdef __cplusplus
}
#endif

#endif
