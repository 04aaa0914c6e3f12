// What the files of the CUDA library share: launches and their sizes.
#pragma once

#include "../status.h"

#include <cuda_runtime.h>

namespace lorapar {

constexpr int kThreads = 256;
// Enough blocks to fill any device of today several times over; each then strides over the rest.
constexpr int64_t kMaxBlocks = 65536;

inline int status_of(cudaError_t error) {
    return error == cudaSuccess ? LORAPAR_OK : LORAPAR_ERROR_CUDA + static_cast<int>(error);
}

inline cudaStream_t stream_of(intptr_t queue) { return reinterpret_cast<cudaStream_t>(queue); }

// Blocks of kThreads for so many threads' work.
inline int blocks_for(int64_t threads) {
    const int64_t blocks = (threads + kThreads - 1) / kThreads;
    return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

template <typename T>
struct Same {
    using type = T;
};

// Queues kernel(arguments...) on `blocks` of kThreads.
template <typename... Parameters>
int launch(void (*kernel)(Parameters...), int blocks, intptr_t queue, typename Same<Parameters>::type... arguments) {
    void *pointers[] = {&arguments...};
    return status_of(cudaLaunchKernel(kernel, dim3(blocks), dim3(kThreads), pointers, 0, stream_of(queue)));
}

// The last of `count` entries of `firsts`, which rise from 0, that is at most `number`: whose piece of work that is.
__device__ inline int owner_of(const int64_t *firsts, int count, int64_t number) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        firsts[middle] <= number ? low = middle : high = middle - 1;
    }
    return low;
}

// This thread's number in the grid and the grid's size, for loops that stride over any length.
__device__ inline int64_t global_thread() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ inline int64_t global_threads() { return static_cast<int64_t>(gridDim.x) * kThreads; }

}  // namespace lorapar
