// The seeded dropout mask on the device (philox.h), and what it drops set to zero: a thread a block of eight draws.

#include "common.cuh"
#include "../philox.h"

namespace lorapar {
namespace {

// The eight draws of one block.
__device__ inline void draw(uint64_t seed, uint64_t block, uint32_t words[4]) {
    words[0] = static_cast<uint32_t>(block);
    words[1] = static_cast<uint32_t>(block >> 32);
    words[2] = words[3] = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < kRounds; ++round, k0 += kKeyStep0, k1 += kKeyStep1) {
        philox_round(words[0], words[1], words[2], words[3], k0, k1);
    }
}

__device__ inline bool is_kept(const uint32_t words[4], int lane, int32_t threshold) {
    return static_cast<int32_t>((words[lane / 2] >> (16 * (lane % 2))) & 0xffffu) >= threshold;
}

// body(element, whether it is kept) for every element that falls to this thread.
template <typename Body>
__device__ inline void for_each_element(const int64_t *seed, int64_t n, int32_t threshold, const Body &body) {
    for (int64_t block = global_thread(); kDraws * block < n; block += global_threads()) {
        uint32_t words[4];
        draw(static_cast<uint64_t>(*seed), static_cast<uint64_t>(block), words);
#pragma unroll
        for (int lane = 0; lane < kDraws; ++lane) {
            const int64_t i = kDraws * block + lane;
            if (i < n) body(i, is_kept(words, lane, threshold));
        }
    }
}

__global__ void mask_kernel(const int64_t *seed, int64_t n, int32_t threshold, uint8_t *kept) {
    for_each_element(seed, n, threshold, [=](int64_t i, bool keep) { kept[i] = keep; });
}

// T: an unsigned integer of the element's size; a dropped element becomes all zero bits, +0.
template <typename T>
__global__ void zero_kernel(const T *source, int64_t n, const int64_t *seed, int32_t threshold, T *target) {
    for_each_element(seed, n, threshold, [=](int64_t i, bool keep) { target[i] = keep ? source[i] : T{0}; });
}

template <typename T>
int zero(const void *source, int64_t n, const int64_t *seed, int32_t threshold, void *target, intptr_t queue) {
    return launch(zero_kernel<T>, blocks_for((n + kDraws - 1) / kDraws), queue, static_cast<const T *>(source), n, seed,
                  threshold, static_cast<T *>(target));
}

}  // namespace
}  // namespace lorapar

int lorapar_dropout_mask(const int64_t *seed, int64_t n, int32_t threshold, uint8_t *kept, intptr_t queue) {
    using namespace lorapar;
    if (int status = check(n, seed, kept)) return status;
    if (n == 0) return LORAPAR_OK;
    return launch(mask_kernel, blocks_for((n + kDraws - 1) / kDraws), queue, seed, n, threshold, kept);
}

int lorapar_zero_dropped(const void *source, int32_t element_size, int64_t n, const int64_t *seed, int32_t threshold,
                         void *target, intptr_t queue) {
    using namespace lorapar;
    if (int status = check_elements(element_size, n, source, target, seed)) return status;
    if (n == 0) return LORAPAR_OK;
    if (element_size == 2) return zero<uint16_t>(source, n, seed, threshold, target, queue);
    if (element_size == 4) return zero<uint32_t>(source, n, seed, threshold, target, queue);
    return zero<uint64_t>(source, n, seed, threshold, target, queue);
}
