// Active elements out of a tile into a compact row and back, on the host.
#pragma once

#include "../adamw.h"
#include "common.h"

#include <array>

#if LORAPAR_X86
#include <immintrin.h>
#endif

namespace lorapar {

// Room for a tile's active elements, and for the 8 that a vector store may write beyond them.
template <typename T>
using Row = std::array<T, LORAPAR_TILE + 8>;

LORAPAR_INLINE int lowest_bit(uint32_t bits) {
#if defined(__GNUC__)
    return __builtin_ctz(bits);
#else
    int at = 0;
    while ((bits >> at & 1) == 0) ++at;
    return at;
#endif
}

// body(element of the tile) for each of the `words` words' set bits in turn.
template <typename Body>
LORAPAR_INLINE void for_each_active(const int32_t *mask, int words, const Body &body) {
    for (int w = 0; w < words; ++w) {
        for (uint32_t bits = static_cast<uint32_t>(mask[w]); bits != 0; bits &= bits - 1) body(32 * w + lowest_bit(bits));
    }
}

#if LORAPAR_X86
// For each byte of a mask: the lanes of its set bits in order (compress), and each lane's number among them (expand).
struct Lanes {
    alignas(8) uint8_t compress[256][8] = {};
    alignas(8) uint8_t expand[256][8] = {};
    Lanes() {
        for (int byte = 0; byte < 256; ++byte) {
            for (int lane = 0, count = 0; lane < 8; ++lane) {
                if ((byte >> lane & 1) == 0) continue;
                compress[byte][count] = static_cast<uint8_t>(lane);
                expand[byte][lane] = static_cast<uint8_t>(count++);
            }
        }
    }
};
inline const Lanes kLanes;

LORAPAR_AVX2 inline __m256i lanes(const uint8_t *table) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(table)));
}

// The active of `groups` times 8 floats of two rows to two compact ones; gives how many. Writes up to 8 floats beyond.
LORAPAR_AVX2 inline int gather_groups(const float *from_1, const float *from_2, const uint8_t *mask, int groups,
                                      float *out_1, float *out_2) {
    int count = 0;
    for (int g = 0; g < groups; ++g) {
        const __m256i order = lanes(kLanes.compress[mask[g]]);
        _mm256_storeu_ps(out_1 + count, _mm256_permutevar8x32_ps(_mm256_loadu_ps(from_1 + 8 * g), order));
        _mm256_storeu_ps(out_2 + count, _mm256_permutevar8x32_ps(_mm256_loadu_ps(from_2 + 8 * g), order));
        count += __builtin_popcount(mask[g]);
    }
    return count;
}

// The reverse. The others of a group are stored back as they were loaded, a group without an active one is not touched.
LORAPAR_AVX2 inline int scatter_groups(const float *from, const uint8_t *mask, int groups, float *to) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    int count = 0;
    for (int g = 0; g < groups; ++g) {
        if (mask[g] == 0) continue;
        const __m256 values = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from + count), lanes(kLanes.expand[mask[g]]));
        const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask[g]), bit), bit);
        float *group = to + 8 * g;
        _mm256_storeu_ps(group, _mm256_blendv_ps(_mm256_loadu_ps(group), values, _mm256_castsi256_ps(set)));
        count += __builtin_popcount(mask[g]);
    }
    return count;
}
#endif

// The active of a tile of n elements of two rows, together: they share what the mask says.
inline void gather(const float *from_1, const float *from_2, const int32_t *mask, int n, float *out_1, float *out_2) {
    int count = 0, first = 0;
#if LORAPAR_X86
    if (has_avx2()) {
        // Whole words only: what follows the last element is not ours to read.
        first = n / 32;
        count = gather_groups(from_1, from_2, reinterpret_cast<const uint8_t *>(mask), 4 * first, out_1, out_2);
    }
#endif
    for_each_active(mask + first, (n + 31) / 32 - first, [&](int i) {
        out_1[count] = from_1[32 * first + i];
        out_2[count++] = from_2[32 * first + i];
    });
}

inline void gather(const void *from, int type, int64_t at, const int32_t *mask, int n, float *out) {
    int count = 0;
    if (type == LORAPAR_FLOAT32) {
        const float *row = static_cast<const float *>(from) + at;
        for_each_active(mask, (n + 31) / 32, [&](int i) { out[count++] = row[i]; });
        return;
    }
    const uint16_t *row = static_cast<const uint16_t *>(from) + at;
    for_each_active(mask, (n + 31) / 32, [&](int i) { out[count++] = from_half(row[i], type); });
}

inline void scatter(const float *from, const int32_t *mask, int n, float *to) {
    int count = 0, first = 0;
#if LORAPAR_X86
    if (has_avx2()) {
        first = n / 32;
        count = scatter_groups(from, reinterpret_cast<const uint8_t *>(mask), 4 * first, to);
    }
#endif
    for_each_active(mask + first, (n + 31) / 32 - first, [&](int i) { to[32 * first + i] = from[count++]; });
}

inline void scatter(const uint16_t *from, const int32_t *mask, int n, uint16_t *to) {
    int count = 0;
    for_each_active(mask, (n + 31) / 32, [&](int i) { to[i] = from[count++]; });
}

}  // namespace lorapar
