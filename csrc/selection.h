// The part of a selection that both libraries do on the host: exact sums, and where the descending order is cut.
//
// A radix selection by weight. Non-negative floats are ordered as their bits, so the scores are summed by their upper 16
// bits (the sign left out), the bin in which the prefix ends is looked up, and its scores are counted by their lower 16.
// Scores of one bin of the first level share an exponent, so a double adds up to 2^29 of them without rounding, in any
// order; those of one bin of the second level are equal. The bins are then added as integers.
#pragma once

#include "both.h"
#include "status.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

namespace lorapar {

constexpr int kUpperBins = 1 << 15;
constexpr int kLowerBins = 1 << 16;
constexpr int64_t kMaxScores = int64_t{1} << 29;

// A sum of doubles that are multiples of 2^-149 (the least float32) and at least 0, without rounding: an integer of 384
// bits in units of 2^-149, enough for 2^48 of the largest float32.
class ExactSum {
public:
    void add(double value) { add_product(value, 1); }

    // value · times, for a value of at most 53 bits and times < 2^48.
    void add_product(double value, int64_t times) {
        if (value == 0.0) return;
        int exponent;
        const double fraction = std::frexp(value, &exponent);
        uint64_t significand = static_cast<uint64_t>(std::ldexp(fraction, 53));
        int shift = exponent - 53 + 149;
        // A multiple of the unit below 2^53 units: the bits shifted out are zeros.
        if (shift < 0) significand >>= -shift, shift = 0;
        // In halves of 32 and of 24 bits, so that no product is over 64.
        for (int half = 0; half < 2; ++half) {
            const uint64_t part = half ? significand >> 32 : significand & 0xffffffffu;
            add_shifted(part * (static_cast<uint64_t>(times) & 0xffffff), shift + 32 * half);
            add_shifted(part * (static_cast<uint64_t>(times) >> 24), shift + 32 * half + 24);
        }
    }

    bool operator>=(const ExactSum &other) const {
        return !std::lexicographical_compare(limbs_.rbegin(), limbs_.rend(), other.limbs_.rbegin(), other.limbs_.rend());
    }

    // The nearest double, ties to even.
    double rounded() const {
        int top = static_cast<int>(limbs_.size()) - 1;
        while (top > 0 && limbs_[top] == 0) --top;
        uint64_t leading = limbs_[top];
        if (leading == 0) return 0.0;
        int zeros = 0;
        while (leading >> 63 == 0) leading <<= 1, ++zeros;
        // The 64 bits from the highest down, the last of them standing for all below: converting them rounds once.
        uint64_t below = top > 0 ? limbs_[top - 1] : 0;
        if (zeros > 0) leading |= below >> (64 - zeros), below <<= zeros;
        for (int limb = 0; limb < top - 1; ++limb) below |= limbs_[limb];
        return std::ldexp(static_cast<double>(leading | (below != 0)), 64 * top - zeros - 149);
    }

private:
    void add_shifted(uint64_t value, int shift) {
        const int limb = shift / 64, bits = shift % 64;
        add_at(limb, value << bits);
        if (bits > 0) add_at(limb + 1, value >> (64 - bits));
    }

    void add_at(int limb, uint64_t value) {
        for (size_t i = limb; value != 0 && i < limbs_.size(); ++i) {
            limbs_[i] += value;
            value = limbs_[i] < value;
        }
    }

    std::array<uint64_t, 6> limbs_{};
};

// How long a prefix has to be, by its exact sum.
struct Target {
    bool by_mass;      // else every element weighs 1
    double threshold;  // the rounded sum that is enough,
    bool whole;        // or the whole total, exactly: theta is 1
    ExactSum total;

    bool reached(const ExactSum &sum) const { return whole ? sum >= total : sum.rounded() >= threshold; }
};

// sums [kUpperBins], whatever they weigh -> the target for theta, or the kept number; total.rounded() is what there is.
inline Target target_of(const double *sums, bool by_mass, double theta_or_kept) {
    Target target{by_mass, 0.0, false, {}};
    for (int bin = 0; bin < kUpperBins; ++bin) target.total.add(sums[bin]);
    target.whole = by_mass && theta_or_kept == 1.0;
    target.threshold = by_mass ? theta_or_kept * target.total.rounded() : theta_or_kept;
    return target;
}

// The upper bin in which the prefix ends; `before` becomes the sum of those above it.
inline uint32_t upper_bin(const double *sums, const Target &target, ExactSum &before) {
    for (int bin = kUpperBins - 1; bin > 0; --bin) {
        ExactSum with = before;
        with.add(sums[bin]);
        if (sums[bin] != 0.0 && target.reached(with)) return static_cast<uint32_t>(bin);
        before = with;
    }
    return 0;
}

// counts [kLowerBins] of the upper bin -> the cut.
inline lorapar_cut cut_of(const uint32_t *counts, uint32_t upper, const Target &target, ExactSum before) {
    for (int bin = kLowerBins - 1; bin >= 0; --bin) {
        if (counts[bin] == 0) continue;
        const uint32_t bits = upper << 16 | static_cast<uint32_t>(bin);
        // A float32 from its bits, by its definition: significand times 2^(exponent - 150), the hidden bit added.
        const uint32_t exponent = bits >> 23, significand = (bits & 0x7fffff) | (exponent > 0 ? 0x800000 : 0);
        const double value = std::ldexp(significand, static_cast<int>(std::max(exponent, 1u)) - 150);
        const double weight = target.by_mass ? value : 1.0;
        ExactSum with = before;
        with.add_product(weight, counts[bin]);
        if (!target.reached(with)) {
            before = with;
            continue;
        }
        // The fewest of these equals that are enough.
        int64_t low = 1, high = counts[bin];
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            ExactSum some = before;
            some.add_product(weight, middle);
            target.reached(some) ? high = middle : low = middle + 1;
        }
        return {bits, low, counts[bin]};
    }
    // Not come to: the prefix that ends with this upper bin is enough, or it would not have been chosen.
    return {upper << 16, 0, 0};
}

LORAPAR_BOTH bool takes_part(const lorapar_scores &tensor, int64_t i) {
    return tensor.among == nullptr || tensor.among[i] != 0;
}

// Whether a score's bits are those of a negative number, an infinity or a NaN; -0.0 is none of them.
LORAPAR_BOTH uint32_t is_wrong(uint32_t bits) { return (bits >= 0x7f800000u) & (bits != 0x80000000u); }

// What can be wrong with a list of scores, and how many they are together.
inline int check_scores(const lorapar_scores *tensors, int64_t count, bool keeps, int64_t &total) {
    if (int status = check(count, tensors)) return status;
    total = 0;
    for (int64_t t = 0; t < count; ++t) {
        const lorapar_scores &tensor = tensors[t];
        if (int status = check(tensor.n, tensor.scores)) return status;
        if (keeps && tensor.n > 0 && tensor.keep == nullptr) return LORAPAR_ERROR_NULL_POINTER;
        total += tensor.n;
        if (total > kMaxScores) return LORAPAR_ERROR_SIZE;
    }
    return LORAPAR_OK;
}

inline int check_thetas(const double *thetas, int64_t n_thetas, const lorapar_cut *cuts) {
    if (int status = check(n_thetas, thetas, cuts)) return status;
    for (int64_t k = 0; k < n_thetas; ++k) {
        if (!(thetas[k] > 0.0 && thetas[k] <= 1.0)) return LORAPAR_ERROR_THETA;
    }
    return LORAPAR_OK;
}

// A matrix [rows, columns] cut into tiles, those at the edges smaller.
struct Tiles {
    int64_t rows, columns, height, width;
    int64_t down() const { return (rows + height - 1) / height; }
    int64_t across() const { return (columns + width - 1) / width; }
};

}  // namespace lorapar
