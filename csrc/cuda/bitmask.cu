// Masks at one bit an element on the device: pack, unpack, index.

#include "../mask.h"

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

// A warp a tile, a lane a word: how many are set, to before[tile + 1].
__global__ void count_tiles_kernel(const int32_t *words, int64_t n, int64_t *before) {
    static_assert(kTileWords <= 32, "a warp holds a tile's words");
    const int lane = threadIdx.x % 32;
    for (int64_t tile = global_thread() / 32; tile * LORAPAR_TILE < n; tile += global_threads() / 32) {
        const int64_t w = tile * kTileWords + lane;
        int set = lane < kTileWords && 32 * w < n ? __popc(used_word(words, n, w)) : 0;
        for (int lanes = 16; lanes > 0; lanes /= 2) set += __shfl_down_sync(0xffffffffu, set, lanes);
        if (lane == 0) before[tile + 1] = set;
    }
}

// Running sums of before[1..tiles] in place, by one block, a stretch of kThreads at a time. A mask is indexed once.
__global__ void running_sum_kernel(int64_t *before, int64_t tiles) {
    __shared__ int64_t of_warp[kThreads / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int64_t carried = 0;
    if (threadIdx.x == 0) before[0] = 0;
    for (int64_t first = 1; first <= tiles; first += kThreads) {
        const int64_t i = first + threadIdx.x;
        int64_t sum = i <= tiles ? before[i] : 0;
        for (int step = 1; step < 32; step *= 2) {
            const int64_t left = __shfl_up_sync(0xffffffffu, sum, step);
            if (lane >= step) sum += left;
        }
        if (lane == 31) of_warp[warp] = sum;
        __syncthreads();
        int64_t all = 0;
        for (int other = 0; other < kThreads / 32; ++other) {
            if (other < warp) sum += of_warp[other];
            all += of_warp[other];
        }
        if (i <= tiles) before[i] = carried + sum;
        carried += all;
        __syncthreads();
    }
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

int lorapar_index_mask(const int32_t *words, int64_t n, int64_t *before, intptr_t queue) {
    if (int status = check_pointer(before, 1)) return status;
    if (int status = check(n, words)) return status;
    const int64_t tiles = tiles_of(n);
    if (tiles > 0) {
        if (int status = launch(count_tiles_kernel, blocks_for(32 * tiles), queue, words, n, before)) return status;
    }
    return launch(running_sum_kernel, 1, queue, before, tiles);
}
