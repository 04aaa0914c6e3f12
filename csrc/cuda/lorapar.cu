// lorapar.h on the device: the same functions, queued on a stream. cudart is linked in, so the library loads, and
// answers with an error code, on a machine that has no driver.

#include "../lorapar.h"

#include <cuda_runtime.h>

#define LORAPAR_TEXT_(x) #x
#define LORAPAR_TEXT(x) LORAPAR_TEXT_(x)
#ifndef LORAPAR_CUDA_ARCHS
#define LORAPAR_CUDA_ARCHS "unknown architectures"
#endif

namespace {

constexpr int kThreads = 256;
// Enough blocks to fill any device of today several times over; each then strides over the rest.
constexpr int64_t kMaxBlocks = 65536;

int check(const void *a, const void *b, int64_t n) {
    if (n < 0) return LORAPAR_ERROR_SIZE;
    if (n > 0 && (a == nullptr || b == nullptr)) return LORAPAR_ERROR_NULL_POINTER;
    return LORAPAR_OK;
}

int status_of(cudaError_t error) {
    return error == cudaSuccess ? LORAPAR_OK : LORAPAR_ERROR_CUDA + static_cast<int>(error);
}

int blocks_for(int64_t threads) {
    const int64_t blocks = (threads + kThreads - 1) / kThreads;
    return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// One thread an element, so that a warp reads 32 neighbouring bytes and its ballot is the word.
__global__ void pack_mask_kernel(const uint8_t *mask, int64_t n, int32_t *words) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    const int64_t end = (n + 31) / 32 * 32;  // whole warps take part in the ballot
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < end; i += stride) {
        const unsigned word = __ballot_sync(0xffffffffu, i < n && mask[i] != 0);
        if (i % 32 == 0) words[i / 32] = static_cast<int32_t>(word);
    }
}

__global__ void unpack_mask_kernel(const int32_t *words, int64_t n, uint8_t *mask) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
        mask[i] = (static_cast<unsigned>(words[i / 32]) >> (i % 32)) & 1;
    }
}

// One thread a word; a warp adds up by shuffles and its first lane adds to the total.
__global__ void count_mask_kernel(const int32_t *words, int64_t n, unsigned long long *count) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
    unsigned long long total = 0;
    for (int64_t w = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; 32 * w < n; w += stride) {
        unsigned bits = static_cast<unsigned>(words[w]);
        const int64_t left = n - 32 * w;
        if (left < 32) bits &= (1u << left) - 1;
        total += __popc(bits);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_down_sync(0xffffffffu, total, lanes);
    if (threadIdx.x % 32 == 0 && total > 0) atomicAdd(count, total);
}

}  // namespace

int lorapar_abi_version(void) { return LORAPAR_ABI_VERSION; }

const char *lorapar_build(void) {
    return "CUDA " LORAPAR_TEXT(__CUDACC_VER_MAJOR__) "." LORAPAR_TEXT(__CUDACC_VER_MINOR__) ", " LORAPAR_CUDA_ARCHS;
}

const char *lorapar_error_string(int status) {
    switch (status) {
        case LORAPAR_OK: return "no error";
        case LORAPAR_ERROR_NULL_POINTER: return "a null pointer where memory was expected";
        case LORAPAR_ERROR_SIZE: return "a negative number of elements";
        default: break;
    }
    if (status > LORAPAR_ERROR_CUDA) return cudaGetErrorString(static_cast<cudaError_t>(status - LORAPAR_ERROR_CUDA));
    return "an unknown status";
}

int lorapar_pack_mask(const uint8_t *mask, int64_t n, int32_t *words, void *stream) {
    if (int status = check(mask, words, n)) return status;
    if (n == 0) return LORAPAR_OK;
    pack_mask_kernel<<<blocks_for(n), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(mask, n, words);
    return status_of(cudaGetLastError());
}

int lorapar_unpack_mask(const int32_t *words, int64_t n, uint8_t *mask, void *stream) {
    if (int status = check(words, mask, n)) return status;
    if (n == 0) return LORAPAR_OK;
    unpack_mask_kernel<<<blocks_for(n), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(words, n, mask);
    return status_of(cudaGetLastError());
}

int lorapar_count_mask(const int32_t *words, int64_t n, int64_t *count, void *stream) {
    if (count == nullptr) return LORAPAR_ERROR_NULL_POINTER;
    if (int status = check(words, count, n)) return status;
    cudaStream_t queue = static_cast<cudaStream_t>(stream);
    if (int status = status_of(cudaMemsetAsync(count, 0, sizeof(int64_t), queue))) return status;
    if (n == 0) return LORAPAR_OK;
    const int64_t words_used = (n + 31) / 32;
    count_mask_kernel<<<blocks_for(words_used), kThreads, 0, queue>>>(
        words, n, reinterpret_cast<unsigned long long *>(count));
    return status_of(cudaGetLastError());
}
