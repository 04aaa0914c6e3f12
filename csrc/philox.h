// The dropout mask's generator, for both libraries: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers:
// as easy as 1, 2, 3", SC 2011) with the counter (block low, block high, 0, 0) and the key (seed low, seed high). A block
// gives 128 bits, eight 16-bit draws; the low half of word 0 is draw 0. Element i is draw i % 8 of block i / 8, and is
// kept where the draw is at least the threshold.
#pragma once

#include "both.h"

namespace lorapar {

constexpr int kRounds = 10;
constexpr int kDraws = 8;  // of a block
constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kKeyStep0 = 0x9E3779B9u, kKeyStep1 = 0xBB67AE85u;

// One round in place on the counter.
LORAPAR_BOTH void philox_round(uint32_t &c0, uint32_t &c1, uint32_t &c2, uint32_t &c3, uint32_t k0, uint32_t k1) {
    const uint64_t product0 = static_cast<uint64_t>(kMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(kMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
}

}  // namespace lorapar
