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
#define LORAPAR_ABI_VERSION 7

#define LORAPAR_OK 0
#define LORAPAR_ERROR_NULL_POINTER 1 /* a null pointer although n > 0 (or, for a result, at all) */
#define LORAPAR_ERROR_SIZE 2         /* n < 0 or n > LORAPAR_MAX_SIZE */
#define LORAPAR_ERROR_ALIGNMENT 3    /* a pointer that is not aligned to its type */
#define LORAPAR_ERROR_MEMORY 4       /* no memory for working space */
#define LORAPAR_ERROR_SCORE 5        /* a score that is negative, infinite or not a number */
#define LORAPAR_ERROR_ZERO 6         /* no score above zero */
#define LORAPAR_ERROR_THETA 7        /* a share that is not in (0, 1] */
#define LORAPAR_ERROR_COUNT 8        /* a number to keep that is not in 0..candidates */
#define LORAPAR_ERROR_MASK 9         /* a spare bit that is set, or counts that are not the mask's */
#define LORAPAR_ERROR_SETTING 10     /* a setting of the optimizer that is out of its range */
#define LORAPAR_ERROR_ELEMENT 11     /* an element size that is not 2, 4 or 8 bytes */
#define LORAPAR_ERROR_WORKSPACE 12   /* a workspace that is smaller than lorapar_selection_workspace says */
#define LORAPAR_ERROR_CUDA 1000      /* 1000 + cudaError_t */

/* Elements that share a count in a mask's index, and a scale among 8-bit moments. */
#define LORAPAR_TILE 512

/* Types of parameters and gradients. */
#define LORAPAR_FLOAT32 0
#define LORAPAR_BFLOAT16 1
#define LORAPAR_FLOAT16 2

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

/* words -> before [ceil(n / LORAPAR_TILE) + 1]: before[t] is the number of bits set among the first t * LORAPAR_TILE, the
 * last one that of all. An active element's place in a compact array is before[its tile] plus the bits set before it in
 * the tile. Spare bits are not looked at. */
LORAPAR_API int lorapar_index_mask(const int32_t *words, int64_t n, int64_t *before, intptr_t queue);

/* ---- selection (selection.cpp, selection.cu); lorapar_kernels/top_mass.py is the specification ---- */

/* One of the tensors that are ranked together, in this order; the array of them is in host memory for both libraries. */
typedef struct {
    const float *scores;  /* [n], finite and >= 0 */
    const uint8_t *among; /* [n] bytes, the elements that take part; NULL: all do */
    uint8_t *keep;        /* [n] bytes, 0 or 1: what lorapar_keep writes */
    int64_t n;
} lorapar_scores;

/* Where a descending order is cut: kept are the scores above `bits` and the first `ties` of the `equals` that have it. */
typedef struct {
    uint32_t bits; /* a score as its bit pattern: floats >= 0 are ordered as these */
    int64_t ties, equals;
} lorapar_cut;

/* Bytes of working memory that lorapar_top_mass, lorapar_top_count and lorapar_keep need for these tensors, of which only
 * the sizes matter. The CPU library needs none. 0 too where the list is wrong, which those functions then say. The
 * memory is the caller's, where the tensors are and aligned to 8 bytes; it holds nothing between two calls, and must
 * stay until the queue's work has ended. */
LORAPAR_API int64_t lorapar_selection_workspace(const lorapar_scores *tensors, int64_t count);

/* cuts[k]: of the smallest prefix of the descending order that sums to thetas[k] of the total or more. Sums are those of
 * the real numbers, rounded once to double. At most 2^29 elements together. thetas and cuts are in host memory; the CUDA
 * library waits for the result. */
LORAPAR_API int lorapar_top_mass(const lorapar_scores *tensors, int64_t count, const double *thetas, int64_t n_thetas,
                                 lorapar_cut *cuts, void *workspace, int64_t workspace_bytes, intptr_t queue);

/* cut [1]: of the `kept` highest scores, at least one. Otherwise as lorapar_top_mass; all-zero scores are as good as any. */
LORAPAR_API int lorapar_top_count(const lorapar_scores *tensors, int64_t count, int64_t kept, lorapar_cut *cut,
                                  void *workspace, int64_t workspace_bytes, intptr_t queue);

/* Every tensor's `keep` by a cut; ties go by index, then by tensor. */
LORAPAR_API int lorapar_keep(const lorapar_scores *tensors, int64_t count, const lorapar_cut *cut, void *workspace,
                             int64_t workspace_bytes, intptr_t queue);

/* scores [rows, columns] -> sums [ceil(rows / tile_rows), ceil(columns / tile_columns)], the tiles at the edges smaller.
 * In double: down each column of the tile, then across the columns. A rank slice is a tile of one row of A, or of one
 * column of B. */
LORAPAR_API int lorapar_tile_sums(const float *scores, int64_t rows, int64_t columns, int64_t tile_rows,
                                  int64_t tile_columns, double *sums, intptr_t queue);

/* ---- AdamW on the active elements (masked_adamw.cpp, .cu); lorapar_kernels/masked_adamw.py is the specification ---- */

/* One parameter; the array of them is in host memory for both libraries. Compact arrays hold one entry an active element,
 * row-major. The moments are float, or, where there are scales, int8 and uint8 codes: all of a list's, or none's. */
typedef struct {
    void *param;            /* [n] */
    const void *grad;       /* [n] */
    const int32_t *mask;    /* [ceil(n / 32)] words, spare bits 0 */
    const int64_t *before;  /* its index, of lorapar_index_mask */
    void *exp_avg;          /* [active] float or int8 */
    void *exp_avg_sq;       /* [active] float or uint8 */
    float *scales;          /* [2, ceil(n / LORAPAR_TILE)]: the largest |exp_avg|, exp_avg_sq of each tile; or NULL */
    void *compensation;     /* [active] of the parameter's type: what rounding has left out so far; or NULL */
    int64_t n, active;
} lorapar_adamw_tensor;

typedef struct {
    double lr, beta1, beta2, eps, weight_decay;
    int64_t step; /* from 1 on */
    uint64_t seed; /* of the random bits, with the step and the tensor's place in the list */
    int32_t maximize;
    int32_t stochastic; /* bfloat16 parameters are rounded up or down at random, without bias; not with compensation */
    int32_t param_type, grad_type;
    const float *grad_scale; /* one float where the tensors are, which multiplies gradients; NULL: 1 */
    int32_t *skipped; /* one, where the tensors are: set to 1, and nothing else written, where the scaled gradient of an
                         active element is not finite, else to 0; NULL: not looked at */
    /* In the place of `step` and `lr`, where the tensors are: read when the work runs, so that a graph that is captured
     * once takes other steps when it is replayed. NULL: not. */
    const void *step_at; /* one int64_t or float, a whole number */
    const float *lr_at;
    int32_t step_type; /* of step_at: 0, int64_t, or 1, float */
} lorapar_adamw_settings;

/* One step, in place. The CPU library answers LORAPAR_ERROR_MASK, before it writes, where a mask and its index disagree;
 * the CUDA library cannot know without waiting, and leaves such a tile as it was. Where step_at holds less than 1, or
 * lr_at what `lr` may not be, the one answers LORAPAR_ERROR_SETTING and the other leaves everything as it was. */
LORAPAR_API int lorapar_masked_adamw(const lorapar_adamw_tensor *tensors, int64_t count,
                                     const lorapar_adamw_settings *settings, intptr_t queue);

/* ---- the seeded dropout mask (philox.h, dropout.cpp, dropout.cu) ---- */

/* kept [n] bytes <- 1 where element i's 16-bit draw is at least `threshold`, else 0. seed [1]. */
LORAPAR_API int lorapar_dropout_mask(const int64_t *seed, int64_t n, int32_t threshold, uint8_t *kept, intptr_t queue);

/* target [n] <- source [n] where the mask keeps, else zero bits. Elements of 2, 4 or 8 bytes; target may be source. */
LORAPAR_API int lorapar_zero_dropped(const void *source, int32_t element_size, int64_t n, const int64_t *seed,
                                     int32_t threshold, void *target, intptr_t queue);

#ifdef __cplusplus
}
#endif

#endif
