// Masks at one bit an element on the device: pack, unpack, count.

#include "common.cuh"

namespace {

using namespace lorapar;

// One thread an element, so that a warp reads 32 neighbouring bytes and its ballot is the word.
__global__ void pack_mask_kernel(const uint8_t *mask, int64_t n, int32_t *words) {
    const int64_t end = (n + 31) / 32 * 32;  // whole warps take part in the ballot
    for (int64_t i = global_thread(); i < end; i += global_threads()) {
        const unsigned word = __ballot_sync(0xffffffffu, i < n && mask[i] != 0);
        if (i % 32 == 0) words[i / 32] = static_cast<int32_t>(word);
    }
}

__global__ void unpack_mask_kernel(const int32_t *words, int64_t n, uint8_t *mask) {
    for (int64_t i = global_thread(); i < n; i += global_threads()) {
        mask[i] = (static_cast<unsigned>(words[i / 32]) >> (i % 32)) & 1;
    }
}

// One thread a word; a warp adds up by shuffles and its first lane adds to the total.
__global__ void count_mask_kernel(const int32_t *words, int64_t n, unsigned long long *count) {
    unsigned long long total = 0;
    for (int64_t w = global_thread(); 32 * w < n; w += global_threads()) {
        unsigned bits = static_cast<unsigned>(words[w]);
        const int64_t left = n - 32 * w;
        if (left < 32) bits &= (1u << left) - 1;
        total += __popc(bits);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_down_sync(0xffffffffu, total, lanes);
    if (threadIdx.x % 32 == 0 && total > 0) atomicAdd(count, total);
}

}  // namespace

int lorapar_pack_mask(const uint8_t *mask, int64_t n, int32_t *words, intptr_t queue) {
    if (int status = check(n, mask, words)) return status;
    return n == 0 ? LORAPAR_OK : launch(pack_mask_kernel, blocks_for(n), queue, mask, n, words);
}

int lorapar_unpack_mask(const int32_t *words, int64_t n, uint8_t *mask, intptr_t queue) {
    if (int status = check(n, words, mask)) return status;
    return n == 0 ? LORAPAR_OK : launch(unpack_mask_kernel, blocks_for(n), queue, words, n, mask);
}

int lorapar_count_mask(const int32_t *words, int64_t n, int64_t *count, intptr_t queue) {
    if (int status = check_pointer(count, 1)) return status;
    if (int status = check(n, words)) return status;
    if (int status = status_of(cudaMemsetAsync(count, 0, sizeof(int64_t), stream_of(queue)))) return status;
    if (n == 0) return LORAPAR_OK;
    return launch(count_mask_kernel, blocks_for((n + 31) / 32), queue, words, n,
                  reinterpret_cast<unsigned long long *>(count));
}
