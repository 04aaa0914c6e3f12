// Selection on the host: each score is read once for all shares, then three times a share at most.

#include "../selection.h"

#include "common.h"

#include <vector>

namespace {

using namespace lorapar;

// Elements of one piece of work: a part of one tensor. A thread is worth starting for a few.
constexpr int64_t kChunk = 1 << 15;
constexpr int64_t kChunksAThread = 4;

struct Chunk {
    const lorapar_scores *tensor;
    int64_t begin, end;
};

// Whether all are finite and at least 0.
LORAPAR_INLINE void valid_body(const float *scores, int64_t n, uint32_t *valid) {
    uint32_t wrong = 0;
    for (int64_t i = 0; i < n; ++i) wrong |= is_wrong(bits_of(scores[i]));
    *valid = wrong == 0;
}
LORAPAR_FOR_EACH_MACHINE(valid, (const float *scores, int64_t n, uint32_t *valid), (scores, n, valid))

void add_weights(const Chunk &chunk, bool by_mass, double *sums) {
    const lorapar_scores &tensor = *chunk.tensor;
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
        if (!takes_part(tensor, i)) continue;
        sums[magnitude(tensor.scores[i]) >> 16] += by_mass ? static_cast<double>(tensor.scores[i]) : 1.0;
    }
}

void add_counts(const Chunk &chunk, uint32_t upper, uint32_t *counts) {
    const lorapar_scores &tensor = *chunk.tensor;
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
        const uint32_t bits = magnitude(tensor.scores[i]);
        if (bits >> 16 == upper && takes_part(tensor, i)) ++counts[bits & 0xffff];
    }
}

int64_t count_equals(const Chunk &chunk, uint32_t bits) {
    const lorapar_scores &tensor = *chunk.tensor;
    int64_t found = 0;
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
        found += magnitude(tensor.scores[i]) == bits && takes_part(tensor, i);
    }
    return found;
}

// Of the chunk's equals, those whose number is below cut.ties; `seen` come before.
void keep_ties(const Chunk &chunk, const lorapar_cut &cut, int64_t seen) {
    const lorapar_scores &tensor = *chunk.tensor;
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
        if (magnitude(tensor.scores[i]) == cut.bits && takes_part(tensor, i)) tensor.keep[i] = seen++ < cut.ties;
    }
}

// 1 where the score is at least `bits`, and takes part.
LORAPAR_INLINE void keep_from_body(const float *scores, const uint8_t *among, int64_t n, uint32_t bits, uint8_t *keep) {
    const int32_t least = static_cast<int32_t>(bits);
    for (int64_t i = 0; i < n; ++i) keep[i] = static_cast<int32_t>(magnitude(scores[i])) >= least;
    if (among == nullptr) return;
    for (int64_t i = 0; i < n; ++i) keep[i] &= among[i] != 0;
}
LORAPAR_FOR_EACH_MACHINE(keep_from,
                         (const float *scores, const uint8_t *among, int64_t n, uint32_t bits, uint8_t *keep),
                         (scores, among, n, bits, keep))

LORAPAR_INLINE void add_row_body(const float *row, int64_t columns, double *sums) {
    for (int64_t c = 0; c < columns; ++c) sums[c] += row[c];
}
LORAPAR_FOR_EACH_MACHINE(add_row, (const float *row, int64_t columns, double *sums), (row, columns, sums))

}  // namespace

namespace lorapar {

// Its bins are on the host's heap: one set a thread.
inline int64_t workspace_of(const lorapar_scores *, int64_t) { return 0; }

class Selection {
public:
    Selection(const lorapar_scores *tensors, int64_t count, void *, intptr_t queue) {
        for (int64_t t = 0; t < count; ++t) {
            for (int64_t begin = 0; begin < tensors[t].n; begin += kChunk) {
                chunks_.push_back({&tensors[t], begin, std::min(begin + kChunk, tensors[t].n)});
            }
        }
        threads_ = threads_for(size(), kChunksAThread, queue);
    }

    int weigh(bool by_mass, std::vector<double> &sums) {
        sums.assign(static_cast<size_t>(threads_) * kUpperBins, 0.0);
        std::vector<uint32_t> wrong(threads_, 0);
        parallel_ranges(size(), 1, threads_, [&](int64_t begin, int64_t end, int thread) {
            for (int64_t c = begin; c < end && !wrong[thread]; ++c) {
                uint32_t fine;
                valid(chunks_[c].tensor->scores + chunks_[c].begin, chunks_[c].end - chunks_[c].begin, &fine);
                // Checked first, so that no bin is beyond the last; the chunk is then in the cache.
                if (fine) add_weights(chunks_[c], by_mass, sums.data() + static_cast<size_t>(thread) * kUpperBins);
                wrong[thread] = !fine;
            }
        });
        add_up(sums, kUpperBins);
        return std::count(wrong.begin(), wrong.end(), 1u) > 0 ? LORAPAR_ERROR_SCORE : LORAPAR_OK;
    }

    int count(uint32_t upper, std::vector<uint32_t> &counts) {
        counts.assign(static_cast<size_t>(threads_) * kLowerBins, 0);
        parallel_ranges(size(), 1, threads_, [&](int64_t begin, int64_t end, int thread) {
            for (int64_t c = begin; c < end; ++c) {
                add_counts(chunks_[c], upper, counts.data() + static_cast<size_t>(thread) * kLowerBins);
            }
        });
        add_up(counts, kLowerBins);
        return LORAPAR_OK;
    }

    int keep(const lorapar_cut &cut) {
        // Where only some of the equals are kept: how many come before each chunk.
        std::vector<int64_t> before;
        if (cut.ties < cut.equals) {
            before.assign(size() + 1, 0);
            parallel_ranges(size(), 1, threads_, [&](int64_t begin, int64_t end) {
                for (int64_t c = begin; c < end; ++c) before[c + 1] = count_equals(chunks_[c], cut.bits);
            });
            for (int64_t c = 0; c < size(); ++c) before[c + 1] += before[c];
        }
        parallel_ranges(size(), 1, threads_, [&](int64_t begin, int64_t end) {
            for (int64_t c = begin; c < end; ++c) {
                const lorapar_scores &tensor = *chunks_[c].tensor;
                const int64_t first = chunks_[c].begin;
                const uint8_t *among = tensor.among == nullptr ? nullptr : tensor.among + first;
                keep_from(tensor.scores + first, among, chunks_[c].end - first, cut.bits, tensor.keep + first);
                if (!before.empty() && before[c + 1] > cut.ties) keep_ties(chunks_[c], cut, before[c]);
            }
        });
        return LORAPAR_OK;
    }

private:
    int64_t size() const { return static_cast<int64_t>(chunks_.size()); }

    // The threads' bins into the first's.
    template <typename T>
    void add_up(std::vector<T> &bins, int count) {
        for (int thread = 1; thread < threads_; ++thread) {
            for (int bin = 0; bin < count; ++bin) bins[bin] += bins[static_cast<size_t>(thread) * count + bin];
        }
    }

    std::vector<Chunk> chunks_;
    int threads_;
};

static int tile_sums(const float *scores, Tiles tiles, double *sums, intptr_t queue) {
    const int threads = threads_for(std::min(tiles.down(), tiles.rows * tiles.columns / kChunk), 1, queue);
    std::vector<double> sums_down(static_cast<size_t>(threads) * tiles.columns);
    parallel_ranges(tiles.down(), 1, threads, [&](int64_t begin, int64_t end, int thread) {
        double *down = sums_down.data() + static_cast<size_t>(thread) * tiles.columns;
        for (int64_t band = begin; band < end; ++band) {
            std::fill(down, down + tiles.columns, 0.0);
            const int64_t bottom = std::min(tiles.rows, (band + 1) * tiles.height);
            for (int64_t r = band * tiles.height; r < bottom; ++r) {
                add_row(scores + r * tiles.columns, tiles.columns, down);
            }
            for (int64_t tile = 0; tile < tiles.across(); ++tile) {
                double sum = 0.0;
                const int64_t right = std::min(tiles.columns, (tile + 1) * tiles.width);
                for (int64_t c = tile * tiles.width; c < right; ++c) sum += down[c];
                sums[band * tiles.across() + tile] = sum;
            }
        }
    });
    return LORAPAR_OK;
}

}  // namespace lorapar

#include "../selection_interface.h"
