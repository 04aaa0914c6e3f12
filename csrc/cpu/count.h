// The bits set in the words of a mask, on the host.
#pragma once

#include "common.h"

namespace lorapar {

// The bits set in a word, by adding neighbours: C++17 has no popcount of its own (Warren, Hacker's Delight, 5-1), and
// the compiler turns this into vector code.
LORAPAR_INLINE uint32_t bits_set(uint32_t bits) {
    bits = bits - ((bits >> 1) & 0x55555555u);
    bits = (bits & 0x33333333u) + ((bits >> 2) & 0x33333333u);
    return (((bits + (bits >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24;
}

LORAPAR_INLINE void count_body(const int32_t *words, int64_t count, int64_t *total) {
    int64_t sum = 0;
    for (int64_t w = 0; w < count; ++w) sum += bits_set(static_cast<uint32_t>(words[w]));
    *total = sum;
}
LORAPAR_FOR_EACH_MACHINE(count, (const int32_t *words, int64_t count, int64_t *total), (words, count, total))

}  // namespace lorapar
