// Masks at one bit an element on the host: pack, unpack, index.

#include "../mask.h"

#include "count.h"

#include <cstring>

#if LORAPAR_X86
#include <immintrin.h>
#endif

namespace {

using namespace lorapar;

// Words a thread is worth starting for: a millisecond of work. Waiting for a second thread whose core is taken costs ten.
constexpr int64_t kGrain = 1 << 19;

// The word of `count` mask bytes, one at a time.
LORAPAR_INLINE uint32_t word_of(const uint8_t *mask, int count) {
    uint32_t word = 0;
    for (int bit = 0; bit < count; ++bit) word |= static_cast<uint32_t>(mask[bit] != 0) << bit;
    return word;
}

void pack_plain(const uint8_t *mask, int64_t words, int32_t *out) {
    for (int64_t w = 0; w < words; ++w) out[w] = static_cast<int32_t>(word_of(mask + 32 * w, 32));
}

#if LORAPAR_X86
LORAPAR_AVX2 void pack_avx2(const uint8_t *mask, int64_t words, int32_t *out) {
    for (int64_t w = 0; w < words; ++w) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(mask + 32 * w));
        out[w] = ~_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256()));
    }
}
#else
bool has_avx2() { return false; }
void pack_avx2(const uint8_t *, int64_t, int32_t *) {}
#endif

LORAPAR_INLINE void unpack_body(const int32_t *words, int64_t count, uint8_t *mask) {
    for (int64_t w = 0; w < count; ++w) {
        const uint32_t word = static_cast<uint32_t>(words[w]);
        for (int bit = 0; bit < 32; ++bit) mask[32 * w + bit] = (word >> bit) & 1;
    }
}
LORAPAR_FOR_EACH_MACHINE(unpack, (const int32_t *words, int64_t count, uint8_t *mask), (words, count, mask))

}  // namespace

int lorapar_pack_mask(const uint8_t *mask, int64_t n, int32_t *words, intptr_t queue) {
    if (int status = check(n, mask, words)) return status;
    const int64_t whole = n / 32;
    parallel_ranges(whole, 1, threads_for(whole, kGrain, queue), [&](int64_t begin, int64_t end) {
        (has_avx2() ? pack_avx2 : pack_plain)(mask + 32 * begin, end - begin, words + begin);
    });
    if (n % 32 != 0) words[whole] = static_cast<int32_t>(word_of(mask + 32 * whole, static_cast<int>(n % 32)));
    return LORAPAR_OK;
}

int lorapar_unpack_mask(const int32_t *words, int64_t n, uint8_t *mask, intptr_t queue) {
    if (int status = check(n, words, mask)) return status;
    const int64_t whole = n / 32;
    parallel_ranges(whole, 1, threads_for(whole, kGrain, queue), [&](int64_t begin, int64_t end) {
        unpack(words + begin, end - begin, mask + 32 * begin);
    });
    for (int bit = 0; bit < n % 32; ++bit) mask[32 * whole + bit] = (static_cast<uint32_t>(words[whole]) >> bit) & 1;
    return LORAPAR_OK;
}

int lorapar_index_mask(const int32_t *words, int64_t n, int64_t *before, intptr_t) {
    if (int status = check_pointer(before, 1)) return status;
    if (int status = check(n, words)) return status;
    before[0] = 0;
    int64_t set = 0;
    const int64_t whole = n / LORAPAR_TILE;
    for (int64_t tile = 0; tile < whole; ++tile) {
        count(words + tile * kTileWords, kTileWords, &set);
        before[tile + 1] = before[tile] + set;
    }
    if (whole < tiles_of(n)) {
        const int64_t first = whole * kTileWords, last = (n - 1) / 32;
        count(words + first, last - first, &set);
        before[whole + 1] = before[whole] + set + bits_set(used_word(words, n, last));
    }
    return LORAPAR_OK;
}
