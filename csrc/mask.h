// A mask's words and tiles (lorapar.h), for both libraries.
#pragma once

#include "both.h"
#include "lorapar.h"

namespace lorapar {

constexpr int kTileWords = LORAPAR_TILE / 32;

LORAPAR_BOTH int64_t tiles_of(int64_t n) { return (n + LORAPAR_TILE - 1) / LORAPAR_TILE; }

// Word w of a mask of n elements, its spare bits 0.
LORAPAR_BOTH uint32_t used_word(const int32_t *words, int64_t n, int64_t w) {
    const int64_t left = n - 32 * w;
    const uint32_t bits = static_cast<uint32_t>(words[w]);
    return left < 32 ? bits & ((1u << left) - 1) : bits;
}

}  // namespace lorapar
