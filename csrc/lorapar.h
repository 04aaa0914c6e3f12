/* lorapar's C interface: pointers, sizes and a stream; no torch, no Python.
 *
 * Two shared libraries export these same functions: liblorapar_cpu (csrc/cpu, pointers to host memory, the stream is
 * ignored) and liblorapar_cuda (csrc/cuda, pointers to device memory of the current device; the work is queued on
 * `stream`, a cudaStream_t or NULL for the default stream, and has not ended when the function returns).
 *
 * Every function that does work returns a status: LORAPAR_OK, a LORAPAR_ERROR_* below, or LORAPAR_ERROR_CUDA + the
 * cudaError_t. On an error found in the arguments nothing has been written.
 *
 * A mask is n bytes, one an element, zero or not. Its words are ceil(n / 32) int32: element i is bit i % 32 of word
 * i / 32, and the spare bits of the last word are 0.
 */
#ifndef LORAPAR_H
#define LORAPAR_H

#include <stdint.h>

/* Raised whenever a signature or a meaning below changes; native.py refuses a library of another version. */
#define LORAPAR_ABI_VERSION 1

#define LORAPAR_OK 0
#define LORAPAR_ERROR_NULL_POINTER 1 /* a null pointer although n > 0 (or, for count, at all) */
#define LORAPAR_ERROR_SIZE 2         /* n < 0 */
#define LORAPAR_ERROR_CUDA 1000      /* 1000 + cudaError_t */

#if defined(_WIN32)
#define LORAPAR_API __declspec(dllexport)
#else
#define LORAPAR_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* LORAPAR_ABI_VERSION as it was when the library was built. */
LORAPAR_API int lorapar_abi_version(void);

/* What built it, for people: "C++17, GCC 12.2.0" or "CUDA 13.0, sm_80 sm_90 sm_100". Never NULL, never freed. */
LORAPAR_API const char *lorapar_build(void);

/* One line on a status. Never NULL, never freed, valid for any number. */
LORAPAR_API const char *lorapar_error_string(int status);

/* mask [n] bytes -> words [ceil(n / 32)]; every word is written whole. */
LORAPAR_API int lorapar_pack_mask(const uint8_t *mask, int64_t n, int32_t *words, void *stream);

/* words [ceil(n / 32)] -> mask [n] bytes, each 0 or 1; spare bits are not looked at. */
LORAPAR_API int lorapar_unpack_mask(const int32_t *words, int64_t n, uint8_t *mask, void *stream);

/* The number of bits set among the first n, into count [1]; spare bits are not looked at. */
LORAPAR_API int lorapar_count_mask(const int32_t *words, int64_t n, int64_t *count, void *stream);

#ifdef __cplusplus
}
#endif

#endif
