// lorapar.h on the host: C++17, one thread, nothing but the standard library.

#include "../lorapar.h"

#include <algorithm>

namespace {

int check(const void *a, const void *b, int64_t n) {
    if (n < 0) return LORAPAR_ERROR_SIZE;
    if (n > 0 && (a == nullptr || b == nullptr)) return LORAPAR_ERROR_NULL_POINTER;
    return LORAPAR_OK;
}

// The elements of word w: 32, fewer in the last word.
int elements(int64_t n, int64_t w) { return static_cast<int>(std::min<int64_t>(32, n - 32 * w)); }

// The bits of `word` that stand for elements, the spare ones cleared.
uint32_t used_bits(uint32_t word, int elements) { return elements == 32 ? word : word & ((1u << elements) - 1); }

}  // namespace

int lorapar_abi_version(void) { return LORAPAR_ABI_VERSION; }

#if defined(__clang__)
const char *lorapar_build(void) { return "C++17, Clang " __clang_version__; }
#elif defined(__GNUC__)
const char *lorapar_build(void) { return "C++17, GCC " __VERSION__; }
#else
const char *lorapar_build(void) { return "C++17"; }
#endif

const char *lorapar_error_string(int status) {
    switch (status) {
        case LORAPAR_OK: return "no error";
        case LORAPAR_ERROR_NULL_POINTER: return "a null pointer where memory was expected";
        case LORAPAR_ERROR_SIZE: return "a negative number of elements";
        default: return "an unknown status";
    }
}

int lorapar_pack_mask(const uint8_t *mask, int64_t n, int32_t *words, void *) {
    if (int status = check(mask, words, n)) return status;
    // Whole words apart from the last: with a constant trip count the compiler turns the loop into vector code.
    const int64_t whole = n / 32;
    for (int64_t w = 0; w < whole; ++w) {
        uint32_t word = 0;
        for (int bit = 0; bit < 32; ++bit) word |= static_cast<uint32_t>(mask[32 * w + bit] != 0) << bit;
        words[w] = static_cast<int32_t>(word);
    }
    if (n % 32 != 0) {
        uint32_t word = 0;
        for (int bit = 0; bit < n % 32; ++bit) word |= static_cast<uint32_t>(mask[32 * whole + bit] != 0) << bit;
        words[whole] = static_cast<int32_t>(word);
    }
    return LORAPAR_OK;
}

int lorapar_unpack_mask(const int32_t *words, int64_t n, uint8_t *mask, void *) {
    if (int status = check(words, mask, n)) return status;
    const int64_t whole = n / 32;
    for (int64_t w = 0; w < whole; ++w) {
        const uint32_t word = static_cast<uint32_t>(words[w]);
        for (int bit = 0; bit < 32; ++bit) mask[32 * w + bit] = (word >> bit) & 1;
    }
    for (int bit = 0; bit < n % 32; ++bit) mask[32 * whole + bit] = (static_cast<uint32_t>(words[whole]) >> bit) & 1;
    return LORAPAR_OK;
}

int lorapar_count_mask(const int32_t *words, int64_t n, int64_t *count, void *) {
    if (count == nullptr) return LORAPAR_ERROR_NULL_POINTER;
    if (int status = check(words, count, n)) return status;
    int64_t total = 0;
    for (int64_t w = 0; 32 * w < n; ++w) {
        uint32_t bits = used_bits(static_cast<uint32_t>(words[w]), elements(n, w));
        // Bits set, by adding neighbours: C++17 has no popcount of its own (Warren, Hacker's Delight, 5-1).
        bits = bits - ((bits >> 1) & 0x55555555u);
        bits = (bits & 0x33333333u) + ((bits >> 2) & 0x33333333u);
        total += (((bits + (bits >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24;
    }
    *count = total;
    return LORAPAR_OK;
}
