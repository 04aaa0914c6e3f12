// AdamW on the active elements, on the device: a block a tile at a time, a thread every kThreads-th of its elements. All
// tensors of a table are one launch; nothing waits for the device.

#include "../adamw.h"

#include "common.cuh"

#include <algorithm>

namespace {

using namespace lorapar;

constexpr int kEach = LORAPAR_TILE / kThreads;  // elements a thread has of a tile
static_assert(LORAPAR_TILE % kThreads == 0 && kTileWords <= 32, "a warp holds a tile's words, a lane each");

// Tensors a launch takes: their table is the kernel's parameter, 32 KB of which fit since CUDA 12.1, 4 KB before.
#if CUDART_VERSION >= 12010
constexpr int kTableSize = 360;
constexpr size_t kTableBytes = 32000;
#else
constexpr int kTableSize = 43;
constexpr size_t kTableBytes = 3900;
#endif

struct Table {
    lorapar_adamw_tensor tensors[kTableSize];
    int64_t first_tile[kTableSize + 1];  // the tiles before each tensor, and all
    int64_t first_tensor;                // its number in the whole list
    int count;
};
static_assert(sizeof(Table) <= kTableBytes, "the table is a kernel parameter");

// A step's number and constants. The host makes them, or, where the number or the rate is in memory, each block.
struct Made {
    int64_t number;
    Coefficients coefficients;
};

struct Settings : lorapar_adamw_settings {
    Made made;
};

__device__ inline float load(const void *from, int type, int64_t i) {
    if (type == LORAPAR_FLOAT32) return static_cast<const float *>(from)[i];
    return from_half(static_cast<const uint16_t *>(from)[i], type);
}

// Where a thread's elements of a tile are, and in compact arrays; -1 for those that are not active.
struct Places {
    int tensor;
    int64_t tile;            // of the tensor
    int64_t element[kEach];
    int64_t compact[kEach];
};

// Whole warps call it. Nothing is active where the mask and its index disagree, or the index leads out of the moments.
__device__ inline Places places_of(const Table &table, int64_t number) {
    Places places;
    places.tensor = owner_of(table.first_tile, table.count, number);
    places.tile = number - table.first_tile[places.tensor];
    const lorapar_adamw_tensor &tensor = table.tensors[places.tensor];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t first = places.tile * LORAPAR_TILE, word = places.tile * kTileWords + lane;
    const uint32_t mine = lane < kTileWords && word * 32 < tensor.n ? used_word(tensor.mask, tensor.n, word) : 0;
    // Inclusive sums over the lanes' words.
    int sums = __popc(mine);
    for (int step = 1; step < 32; step *= 2) {
        const int left = __shfl_up_sync(0xffffffffu, sums, step);
        if (lane >= step) sums += left;
    }
    const int total = __shfl_sync(0xffffffffu, sums, 31);
    const int64_t before = tensor.before[places.tile], after = tensor.before[places.tile + 1];
    const bool fits = before >= 0 && after <= tensor.active && after - before == total;
    for (int k = 0; k < kEach; ++k) {
        const int w = warp + k * (kThreads / 32);
        const uint32_t bits = __shfl_sync(0xffffffffu, mine, w);
        const int upto = __shfl_sync(0xffffffffu, sums, w);
        const bool active = fits && (bits >> lane & 1);
        places.element[k] = first + w * 32 + lane;
        places.compact[k] = active ? before + upto - __popc(bits) + __popc(bits & ((1u << lane) - 1)) : -1;
    }
    return places;
}

// The largest of the block's values, for all of its threads; `shared` [kThreads / 32] is free again afterwards.
__device__ inline float block_largest(float value, float *shared) {
    // As bits, which order floats that are not negative; a NaN is the largest of all.
    uint32_t bits = magnitude(value);
    for (int lanes = 16; lanes > 0; lanes /= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, lanes));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = float_of(bits);
    __syncthreads();
    for (int warp = 0; warp < kThreads / 32; ++warp) bits = max(bits, bits_of(shared[warp]));
    __syncthreads();
    return float_of(bits);
}

__global__ void nonfinite_kernel(const __grid_constant__ Table table, const __grid_constant__ Settings settings) {
    const float scale = settings.grad_scale == nullptr ? 1.0f : *settings.grad_scale;
    bool found = false;
    for (int64_t number = blockIdx.x; number < table.first_tile[table.count]; number += gridDim.x) {
        const Places places = places_of(table, number);
        const void *grad = table.tensors[places.tensor].grad;
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
            if (places.compact[k] < 0) continue;
            found |= !is_finite(load(grad, settings.grad_type, places.element[k]) * scale);
        }
    }
    if (found) *settings.skipped = 1;
}

// The stepped parameter of a 16-bit type.
__device__ inline void store_half(const lorapar_adamw_tensor &tensor, const Settings &settings, uint64_t key, int64_t i,
                                  int64_t at, float param) {
    uint16_t *out = static_cast<uint16_t *>(tensor.param) + i;
    if (settings.stochastic) {
        *out = to_bfloat16_at_random(param, random_bits(key, i, 0));
        return;
    }
    const int type = settings.param_type;
    const uint16_t rounded = to_half(param, type);
    *out = rounded;
    if (tensor.compensation != nullptr) {
        static_cast<uint16_t *>(tensor.compensation)[at] = to_half(param - from_half(rounded, type), type);
    }
}

// The step that memory names; number 0 where there is no such step.
__device__ inline Made made_from_memory(const Settings &settings) {
    const Step step = step_of(settings);
    if (!valid(step)) return {0, {}};
    const double power_1 = power_of(settings.beta1, step.number), power_2 = power_of(settings.beta2, step.number);
    return {step.number, coefficients_of(settings, step.lr, power_1, power_2)};
}

template <bool kCodes>
__global__ void __launch_bounds__(kThreads)
    step_kernel(const __grid_constant__ Table table, const __grid_constant__ Settings settings) {
    __shared__ float shared[kThreads / 32];
    if (settings.skipped != nullptr && *settings.skipped != 0) return;
    // Read where it is used: copies in registers would cost a block in six.
    __shared__ Made made;
    if (threadIdx.x == 0) {
        const bool in_memory = settings.step_at != nullptr || settings.lr_at != nullptr;
        made = in_memory ? made_from_memory(settings) : settings.made;
    }
    __syncthreads();
    if (made.number == 0) return;
    const Coefficients &c = made.coefficients;
    const float factor = c.grad_sign * (settings.grad_scale == nullptr ? 1.0f : *settings.grad_scale);
    for (int64_t number = blockIdx.x; number < table.first_tile[table.count]; number += gridDim.x) {
        const Places places = places_of(table, number);
        const lorapar_adamw_tensor &tensor = table.tensors[places.tensor];
        const uint64_t key = key_of(settings.seed, made.number, table.first_tensor + places.tensor);
        float *largest_1 = tensor.scales + places.tile, *largest_2 = largest_1 + tiles_of(tensor.n);
        float param[kEach], gradient[kEach], exp_avg[kEach], exp_avg_sq[kEach];
        // All loads first, so that they are under way together.
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
            const int64_t i = places.element[k], at = places.compact[k];
            param[k] = gradient[k] = exp_avg[k] = exp_avg_sq[k] = 0.0f;
            if (at < 0) continue;
            param[k] = load(tensor.param, settings.param_type, i);
            gradient[k] = load(tensor.grad, settings.grad_type, i);
            if (kCodes) {
                exp_avg[k] = from_code_1(static_cast<const int8_t *>(tensor.exp_avg)[at], *largest_1);
                exp_avg_sq[k] = from_code_2(static_cast<const uint8_t *>(tensor.exp_avg_sq)[at], *largest_2);
            } else {
                exp_avg[k] = static_cast<const float *>(tensor.exp_avg)[at];
                exp_avg_sq[k] = static_cast<const float *>(tensor.exp_avg_sq)[at];
            }
            if (tensor.compensation != nullptr) {
                param[k] += from_half(static_cast<const uint16_t *>(tensor.compensation)[at], settings.param_type);
            }
        }
        float most_1 = 0.0f, most_2 = 0.0f;
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
            const int64_t i = places.element[k], at = places.compact[k];
            if (at < 0) continue;
            adamw(c, gradient[k] * factor, param[k], exp_avg[k], exp_avg_sq[k]);
            if (settings.param_type == LORAPAR_FLOAT32) {
                static_cast<float *>(tensor.param)[i] = param[k];
            } else {
                store_half(tensor, settings, key, i, at, param[k]);
            }
            if (kCodes) {
                most_1 = float_of(max(bits_of(most_1), magnitude(exp_avg[k])));
                most_2 = float_of(max(bits_of(most_2), magnitude(exp_avg_sq[k])));
            } else {
                static_cast<float *>(tensor.exp_avg)[at] = exp_avg[k];
                static_cast<float *>(tensor.exp_avg_sq)[at] = exp_avg_sq[k];
            }
        }
        if (!kCodes) continue;
        // Behind the barriers in here, no thread reads the old scales any more.
        most_1 = block_largest(most_1, shared);
        most_2 = block_largest(most_2, shared);
        bool any = false;
#pragma unroll
        for (int k = 0; k < kEach; ++k) {
            const int64_t at = places.compact[k];
            if (at < 0) continue;
            any = true;
            const uint32_t random = random_bits(key, places.element[k], 1);
            static_cast<int8_t *>(tensor.exp_avg)[at] =
                encodable(most_1) ? to_code_1(exp_avg[k], most_1, random & 0xffff) : 1;
            static_cast<uint8_t *>(tensor.exp_avg_sq)[at] =
                encodable(most_2) ? to_code_2(exp_avg_sq[k], most_2, random >> 16) : 1;
        }
        // Of a tile without an active element the scales are left alone, as on the host.
        if (any) *largest_1 = most_1, *largest_2 = most_2;
    }
}

int launch_tables(const lorapar_adamw_tensor *tensors, int64_t count, const Settings &settings, intptr_t queue,
                  void (*kernel)(Table, Settings)) {
    Table table;
    table.count = 0;
    table.first_tile[0] = 0;
    for (int64_t t = 0; t < count; ++t) {
        if (table.count == 0) table.first_tensor = t;
        // Tensors without elements stay in, so that the numbers of the others do not depend on them.
        table.tensors[table.count] = tensors[t];
        table.first_tile[table.count + 1] = table.first_tile[table.count] + tiles_of(tensors[t].n);
        ++table.count;
        if (table.count < kTableSize && t + 1 < count) continue;
        const int64_t tiles = table.first_tile[table.count];
        table.count = tiles > 0 ? table.count : 0;
        if (tiles > 0) {
            const int blocks = static_cast<int>(std::min(tiles, kMaxBlocks));
            if (int status = launch(kernel, blocks, queue, table, settings)) return status;
        }
        table.count = 0;
    }
    return LORAPAR_OK;
}

}  // namespace

int lorapar_masked_adamw(const lorapar_adamw_tensor *tensors, int64_t count, const lorapar_adamw_settings *s,
                         intptr_t queue) {
    if (int status = check_adamw(tensors, count, s)) return status;
    const Settings settings{*s, {s->step, coefficients_of(*s, {s->step, s->lr})}};
    if (s->skipped != nullptr) {
        if (int status = status_of(cudaMemsetAsync(s->skipped, 0, sizeof(int32_t), stream_of(queue)))) return status;
        if (int status = launch_tables(tensors, count, settings, queue, nonfinite_kernel)) return status;
    }
    const auto kernel = has_codes(tensors, count) ? step_kernel<true> : step_kernel<false>;
    return launch_tables(tensors, count, settings, queue, kernel);
}
