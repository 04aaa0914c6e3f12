// The seeded dropout mask on the host (philox.h), and what it drops set to zero.

#include "common.h"
#include "../philox.h"

#include <cstring>

namespace lorapar {
namespace {

// Blocks drawn together: the rounds are then loops over arrays that stay in vector registers.
constexpr int kTogether = 16;
constexpr int kElements = kTogether * kDraws;
// Elements for which a thread is worth waking: about 20 microseconds' work.
constexpr int64_t kGrain = 1 << 15;

// The draws of blocks first .. first + kTogether − 1, in the order of the elements.
LORAPAR_INLINE void draw(uint64_t seed, uint64_t first, uint16_t *draws) {
    uint32_t c0[kTogether], c1[kTogether], c2[kTogether], c3[kTogether];
    for (int i = 0; i < kTogether; ++i) {
        const uint64_t block = first + static_cast<uint64_t>(i);
        c0[i] = static_cast<uint32_t>(block);
        c1[i] = static_cast<uint32_t>(block >> 32);
        c2[i] = c3[i] = 0;
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; ++round, k0 += kKeyStep0, k1 += kKeyStep1) {
        for (int i = 0; i < kTogether; ++i) philox_round(c0[i], c1[i], c2[i], c3[i], k0, k1);
    }
    for (int i = 0; i < kTogether; ++i) {
        uint16_t *row = draws + kDraws * i;
        row[0] = static_cast<uint16_t>(c0[i]);
        row[1] = static_cast<uint16_t>(c0[i] >> 16);
        row[2] = static_cast<uint16_t>(c1[i]);
        row[3] = static_cast<uint16_t>(c1[i] >> 16);
        row[4] = static_cast<uint16_t>(c2[i]);
        row[5] = static_cast<uint16_t>(c2[i] >> 16);
        row[6] = static_cast<uint16_t>(c3[i]);
        row[7] = static_cast<uint16_t>(c3[i] >> 16);
    }
}

// store(first element, draws, count) for every kElements elements of begin .. end, begin a multiple of kElements.
template <typename Store>
LORAPAR_INLINE void for_each_draws(uint64_t seed, int64_t begin, int64_t end, const Store &store) {
    for (int64_t i = begin; i < end; i += kElements) {
        alignas(64) uint16_t draws[kElements];
        draw(seed, static_cast<uint64_t>(i) / kDraws, draws);
        store(i, draws, static_cast<int>(std::min<int64_t>(kElements, end - i)));
    }
}

LORAPAR_INLINE void mask_range_body(uint64_t seed, int64_t begin, int64_t end, int32_t threshold, uint8_t *kept) {
    for_each_draws(seed, begin, end, [=](int64_t first, const uint16_t *draws, int count) {
        for (int i = 0; i < count; ++i) kept[first + i] = draws[i] >= threshold;
    });
}

// T: an unsigned integer of the element's size; a dropped element becomes all zero bits, +0.
template <typename T>
LORAPAR_INLINE void zero_elements(
    uint64_t seed, int64_t begin, int64_t end, int32_t threshold, const void *source, void *target) {
    const T *from = static_cast<const T *>(source);
    T *to = static_cast<T *>(target);
    for_each_draws(seed, begin, end, [=](int64_t first, const uint16_t *draws, int count) {
        for (int i = 0; i < count; ++i) {
            to[first + i] = from[first + i] & (draws[i] >= threshold ? static_cast<T>(~T{0}) : T{0});
        }
    });
}

LORAPAR_INLINE void zero_range_body(
    uint64_t seed, int64_t begin, int64_t end, int32_t threshold, const void *source, int32_t size, void *target) {
    if (size == 2) zero_elements<uint16_t>(seed, begin, end, threshold, source, target);
    if (size == 4) zero_elements<uint32_t>(seed, begin, end, threshold, source, target);
    if (size == 8) zero_elements<uint64_t>(seed, begin, end, threshold, source, target);
}

LORAPAR_FOR_EACH_MACHINE(
    mask_range, (uint64_t seed, int64_t begin, int64_t end, int32_t threshold, uint8_t *kept),
    (seed, begin, end, threshold, kept))
LORAPAR_FOR_EACH_MACHINE(
    zero_range,
    (uint64_t seed, int64_t begin, int64_t end, int32_t threshold, const void *source, int32_t size, void *target),
    (seed, begin, end, threshold, source, size, target))

}  // namespace
}  // namespace lorapar

int lorapar_dropout_mask(const int64_t *seed, int64_t n, int32_t threshold, uint8_t *kept, intptr_t queue) {
    using namespace lorapar;
    if (int status = check(n, seed, kept)) return status;
    if (n == 0) return LORAPAR_OK;
    const uint64_t key = static_cast<uint64_t>(*seed);
    parallel_ranges(n, kElements, threads_for(n, kGrain, queue), [=](int64_t begin, int64_t end) {
        mask_range(key, begin, end, threshold, kept);
    });
    return LORAPAR_OK;
}

int lorapar_zero_dropped(const void *source, int32_t element_size, int64_t n, const int64_t *seed, int32_t threshold,
                         void *target, intptr_t queue) {
    using namespace lorapar;
    if (int status = check_elements(element_size, n, source, target, seed)) return status;
    if (n == 0) return LORAPAR_OK;
    const uint64_t key = static_cast<uint64_t>(*seed);
    parallel_ranges(n, kElements, threads_for(n, kGrain, queue), [=](int64_t begin, int64_t end) {
        zero_range(key, begin, end, threshold, source, element_size, target);
    });
    return LORAPAR_OK;
}
