// Masks at one bit an element on the host: pack, unpack, count.

#include "common.h"

#include <cstring>

#if LORAPAR_X86
#include <immintrin.h>
#endif

namespace {

using namespace lorapar;

// Words a thread is worth starting for: a millisecond of work. Waiting for a second thread whose core is taken costs ten.
constexpr int64_t kGrain = 1 << 19;

// The bits set in a word, by adding neighbours: C++17 has no popcount of its own (Warren, Hacker's Delight, 5-1), and
// the compiler turns this into vector code.
LORAPAR_INLINE uint32_t bits_set(uint32_t bits) {
    bits = bits - ((bits >> 1) & 0x55555555u);
    bits = (bits & 0x33333333u) + ((bits >> 2) & 0x33333333u);
    return (((bits + (bits >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24;
}

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

LORAPAR_INLINE void count_body(const int32_t *words, int64_t count, int64_t *total) {
    int64_t sum = 0;
    for (int64_t w = 0; w < count; ++w) sum += bits_set(static_cast<uint32_t>(words[w]));
    *total = sum;
}
LORAPAR_FOR_EACH_MACHINE(count, (const int32_t *words, int64_t count, int64_t *total), (words, count, total))

LORAPAR_INLINE void combine_body(const int32_t *a, const int32_t *b, int64_t count, int operation, int32_t *words) {
    switch (operation) {
        case LORAPAR_AND:
            for (int64_t w = 0; w < count; ++w) words[w] = a[w] & b[w];
            break;
        case LORAPAR_OR:
            for (int64_t w = 0; w < count; ++w) words[w] = a[w] | b[w];
            break;
        default:
            for (int64_t w = 0; w < count; ++w) words[w] = a[w] & ~b[w];
    }
}
LORAPAR_FOR_EACH_MACHINE(combine, (const int32_t *a, const int32_t *b, int64_t count, int operation, int32_t *words),
                         (a, b, count, operation, words))

// The bits that stand for elements of the last word of n elements.
uint32_t used_bits(int64_t n) { return n % 32 == 0 ? ~0u : (1u << (n % 32)) - 1; }

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

int lorapar_count_mask(const int32_t *words, int64_t n, int64_t *result, intptr_t) {
    if (int status = check_pointer(result, 1)) return status;
    if (int status = check(n, words)) return status;
    int64_t total = 0;
    count(words, n / 32, &total);
    if (n % 32 != 0) total += bits_set(static_cast<uint32_t>(words[n / 32]) & used_bits(n));
    *result = total;
    return LORAPAR_OK;
}

int lorapar_combine_masks(const int32_t *a, const int32_t *b, int64_t n, int operation, int32_t *words, intptr_t queue) {
    if (int status = check(n, a, b, words)) return status;
    if (operation < LORAPAR_AND || operation > LORAPAR_AND_NOT) return LORAPAR_ERROR_SETTING;
    const int64_t all = (n + 31) / 32;
    parallel_ranges(all, 1, threads_for(all, kGrain, queue), [&](int64_t begin, int64_t end) {
        combine(a + begin, b + begin, end - begin, operation, words + begin);
    });
    if (n > 0) words[all - 1] = static_cast<int32_t>(static_cast<uint32_t>(words[all - 1]) & used_bits(n));
    return LORAPAR_OK;
}

int lorapar_index_mask(const int32_t *words, int64_t n, int64_t *before, intptr_t) {
    if (int status = check_pointer(before, 1)) return status;
    if (int status = check(n, words)) return status;
    constexpr int64_t kWords = LORAPAR_TILE / 32;
    const int64_t all = (n + 31) / 32;
    before[0] = 0;
    for (int64_t tile = 0; tile * kWords < all; ++tile) {
        int64_t set = 0;
        count(words + tile * kWords, std::min(kWords, all - tile * kWords), &set);
        const bool last = (tile + 1) * kWords >= all;
        if (last) set -= bits_set(static_cast<uint32_t>(words[all - 1]) & ~used_bits(n));
        before[tile + 1] = before[tile] + set;
    }
    return LORAPAR_OK;
}
