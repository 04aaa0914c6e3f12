// AdamW on the active elements, on the host. A tile at a time, within the first-level cache: gather the active elements,
// step them in vectors, scatter them. Tiles of 512 and of 256 elements took the same time, of 1,024 a seventh longer, and
// prefetching by hand was slower (bench/LOG.md).

#include "compact.h"
#include "count.h"

#include <atomic>
#include <vector>

namespace {

using namespace lorapar;

// Tiles a thread is worth starting for: some 30 µs of work.
constexpr int64_t kGrain = 64;
// Tiles that a thread takes at a time: some 0.3 ms of work.
constexpr int64_t kChunk = 512;

struct Tile {
    const lorapar_adamw_tensor *tensor;
    int64_t number;  // in the list, of the tensor
    int64_t tile;
    int n;           // its elements,
    int active;      // the active ones,
    int64_t offset;  // and where they are in compact arrays

    int64_t first() const { return tile * LORAPAR_TILE; }
    const int32_t *mask() const { return tensor->mask + tile * kTileWords; }
};

// The list's tiles in one row.
class Tiles {
public:
    Tiles(const lorapar_adamw_tensor *tensors, int64_t count) : tensors_(tensors), starts_(count + 1, 0) {
        for (int64_t t = 0; t < count; ++t) starts_[t + 1] = starts_[t] + tiles_of(tensors[t].n);
    }
    int64_t size() const { return starts_.back(); }

    // body(tile) for those in [begin, end); the index of a mask is taken at its word.
    template <typename Body>
    void each(int64_t begin, int64_t end, const Body &body) const {
        int64_t t = std::upper_bound(starts_.begin(), starts_.end(), begin) - starts_.begin() - 1;
        for (int64_t i = begin; i < end; ++i) {
            while (i >= starts_[t + 1]) ++t;
            const lorapar_adamw_tensor &tensor = tensors_[t];
            const int64_t tile = i - starts_[t], offset = tensor.before[tile];
            const int64_t n = std::min<int64_t>(tensor.n - tile * LORAPAR_TILE, LORAPAR_TILE);
            const int active = static_cast<int>(tensor.before[tile + 1] - offset);
            body(Tile{&tensor, t, tile, static_cast<int>(n), active, offset});
        }
    }

private:
    const lorapar_adamw_tensor *tensors_;
    std::vector<int64_t> starts_;
};

// Whether a tile's mask has what its index says, in place and number.
bool consistent(const Tile &tile) {
    const int64_t before = tile.offset, after = tile.tensor->before[tile.tile + 1];
    int64_t set;
    count(tile.mask(), (tile.n + 31) / 32, &set);
    const bool spare = tile.n % 32 != 0 && static_cast<uint32_t>(tile.mask()[tile.n / 32]) >> (tile.n % 32) != 0;
    return !spare && before >= 0 && after <= tile.tensor->active && after >= before && after - before == set;
}

// A tile's working space: 14 KB, of which a plain step touches a third.
struct Rows {
    Row<float> param, gradient, exp_avg, exp_avg_sq;
    Row<uint16_t> element, half;
    Row<uint32_t> random;
};

LORAPAR_INLINE void step_row_body(const Coefficients &c, float grad_scale, int n, float *__restrict param,
                              const float *__restrict gradient, float *__restrict exp_avg,
                              float *__restrict exp_avg_sq) {
    const float factor = c.grad_sign * grad_scale;
    for (int j = 0; j < n; ++j) adamw(c, gradient[j] * factor, param[j], exp_avg[j], exp_avg_sq[j]);
}
LORAPAR_FOR_EACH_MACHINE(step_row,
                         (const Coefficients &c, float grad_scale, int n, float *__restrict param,
                          const float *__restrict gradient, float *__restrict exp_avg, float *__restrict exp_avg_sq),
                         (c, grad_scale, n, param, gradient, exp_avg, exp_avg_sq))

LORAPAR_INLINE void random_row_body(uint64_t key, int64_t first, const uint16_t *element, int n, uint32_t stream,
                                uint32_t *random) {
    for (int j = 0; j < n; ++j) random[j] = random_bits(key, first + element[j], stream);
}
LORAPAR_FOR_EACH_MACHINE(random_row,
                         (uint64_t key, int64_t first, const uint16_t *element, int n, uint32_t stream,
                          uint32_t *random),
                         (key, first, element, n, stream, random))

LORAPAR_INLINE void decode_body(const int8_t *code_1, const uint8_t *code_2, float largest_1, float largest_2, int n,
                                float *exp_avg, float *exp_avg_sq) {
    for (int j = 0; j < n; ++j) exp_avg[j] = from_code_1(code_1[j], largest_1);
    for (int j = 0; j < n; ++j) exp_avg_sq[j] = from_code_2(code_2[j], largest_2);
}
LORAPAR_FOR_EACH_MACHINE(decode,
                         (const int8_t *code_1, const uint8_t *code_2, float largest_1, float largest_2, int n,
                          float *exp_avg, float *exp_avg_sq),
                         (code_1, code_2, largest_1, largest_2, n, exp_avg, exp_avg_sq))

// The largest magnitude as bits, which order floats; a NaN is the largest of all.
LORAPAR_INLINE uint32_t largest(const float *values, int n) {
    int32_t most = 0;
    for (int j = 0; j < n; ++j) most = std::max(most, static_cast<int32_t>(magnitude(values[j])));
    return static_cast<uint32_t>(most);
}

// Codes of one moment, and its largest; `shift` says which 16 of the random bits. Codes are bytes, which may be
// anything's: `largest` is written last, so that vectors need not fear for it.
template <typename Code, typename ToCode>
LORAPAR_INLINE void encode_one(const float *values, const uint32_t *random, int shift, int n, Code *codes,
                               float *largest_out, const ToCode &to_code) {
    const float most = float_of(largest(values, n));
    if (encodable(most)) {
        for (int j = 0; j < n; ++j) codes[j] = to_code(values[j], most, random[j] >> shift & 0xffff);
    } else {
        for (int j = 0; j < n; ++j) codes[j] = 1;
    }
    *largest_out = most;
}

LORAPAR_INLINE void encode_body(const float *exp_avg, const float *exp_avg_sq, const uint32_t *random, int n,
                                int8_t *code_1, uint8_t *code_2, float *largest_1, float *largest_2) {
    auto one = [](float value, float most, uint32_t bits) LORAPAR_LAMBDA { return to_code_1(value, most, bits); };
    auto two = [](float value, float most, uint32_t bits) LORAPAR_LAMBDA { return to_code_2(value, most, bits); };
    encode_one(exp_avg, random, 0, n, code_1, largest_1, one);
    encode_one(exp_avg_sq, random, 16, n, code_2, largest_2, two);
}
LORAPAR_FOR_EACH_MACHINE(encode,
                         (const float *exp_avg, const float *exp_avg_sq, const uint32_t *random, int n, int8_t *code_1,
                          uint8_t *code_2, float *largest_1, float *largest_2),
                         (exp_avg, exp_avg_sq, random, n, code_1, code_2, largest_1, largest_2))

// The stepped parameters of a 16-bit type back into the tile.
void write_half(const Tile &tile, const lorapar_adamw_settings &settings, uint64_t key, Rows &rows) {
    const int type = settings.param_type;
    if (tile.tensor->compensation != nullptr) {
        uint16_t *left_out = static_cast<uint16_t *>(tile.tensor->compensation) + tile.offset;
        for (int j = 0; j < tile.active; ++j) {
            rows.half[j] = to_half(rows.param[j], type);
            left_out[j] = to_half(rows.param[j] - from_half(rows.half[j], type), type);
        }
    } else if (settings.stochastic) {
        random_row(key, tile.first(), rows.element.data(), tile.active, 0, rows.random.data());
        for (int j = 0; j < tile.active; ++j) rows.half[j] = to_bfloat16_at_random(rows.param[j], rows.random[j]);
    } else {
        for (int j = 0; j < tile.active; ++j) rows.half[j] = to_half(rows.param[j], type);
    }
    scatter(rows.half.data(), tile.mask(), tile.n, static_cast<uint16_t *>(tile.tensor->param) + tile.first());
}

void step_tile(const Tile &tile, const lorapar_adamw_settings &settings, int64_t step, const Coefficients &c,
               float grad_scale, Rows &rows) {
    if (tile.active == 0) return;
    const lorapar_adamw_tensor &tensor = *tile.tensor;
    const int n = tile.active;
    if (settings.param_type == LORAPAR_FLOAT32 && settings.grad_type == LORAPAR_FLOAT32) {
        const float *param = static_cast<const float *>(tensor.param), *grad = static_cast<const float *>(tensor.grad);
        gather(param + tile.first(), grad + tile.first(), tile.mask(), tile.n, rows.param.data(), rows.gradient.data());
    } else {
        gather(tensor.param, settings.param_type, tile.first(), tile.mask(), tile.n, rows.param.data());
        gather(tensor.grad, settings.grad_type, tile.first(), tile.mask(), tile.n, rows.gradient.data());
    }
    if (tensor.compensation != nullptr) {
        const uint16_t *left_out = static_cast<const uint16_t *>(tensor.compensation) + tile.offset;
        for (int j = 0; j < n; ++j) rows.param[j] += from_half(left_out[j], settings.param_type);
    }
    const uint64_t key = key_of(settings.seed, step, tile.number);
    if (tensor.scales != nullptr || settings.stochastic) {
        int count = 0;
        for_each_active(tile.mask(), (tile.n + 31) / 32,
                        [&](int i) { rows.element[count++] = static_cast<uint16_t>(i); });
    }
    if (tensor.scales == nullptr) {
        float *exp_avg = static_cast<float *>(tensor.exp_avg) + tile.offset;
        float *exp_avg_sq = static_cast<float *>(tensor.exp_avg_sq) + tile.offset;
        step_row(c, grad_scale, n, rows.param.data(), rows.gradient.data(), exp_avg, exp_avg_sq);
    } else {
        int8_t *code_1 = static_cast<int8_t *>(tensor.exp_avg) + tile.offset;
        uint8_t *code_2 = static_cast<uint8_t *>(tensor.exp_avg_sq) + tile.offset;
        float *largest_1 = tensor.scales + tile.tile, *largest_2 = largest_1 + tiles_of(tensor.n);
        float *exp_avg = rows.exp_avg.data(), *exp_avg_sq = rows.exp_avg_sq.data();
        decode(code_1, code_2, *largest_1, *largest_2, n, exp_avg, exp_avg_sq);
        step_row(c, grad_scale, n, rows.param.data(), rows.gradient.data(), exp_avg, exp_avg_sq);
        random_row(key, tile.first(), rows.element.data(), n, 1, rows.random.data());
        encode(exp_avg, exp_avg_sq, rows.random.data(), n, code_1, code_2, largest_1, largest_2);
    }
    if (settings.param_type == LORAPAR_FLOAT32) {
        scatter(rows.param.data(), tile.mask(), tile.n, static_cast<float *>(tensor.param) + tile.first());
    } else {
        write_half(tile, settings, key, rows);
    }
}

int masked_adamw(const lorapar_adamw_tensor *tensors, int64_t count, const lorapar_adamw_settings &settings,
                 intptr_t queue) {
    const Step step = step_of(settings);
    if (!valid(step)) return LORAPAR_ERROR_SETTING;
    const Tiles tiles(tensors, count);
    const int threads = threads_for(tiles.size(), kGrain, queue);
    const float grad_scale = settings.grad_scale == nullptr ? 1.0f : *settings.grad_scale;
    std::vector<Rows> rows(threads);
    std::atomic<bool> wrong{false}, skipped{false};
    parallel_chunks(tiles.size(), kChunk, threads, [&](int64_t begin, int64_t end, int thread) {
        tiles.each(begin, end, [&](const Tile &tile) {
            if (!consistent(tile)) {
                wrong = true;
                return;
            }
            if (settings.skipped == nullptr || wrong || skipped) return;
            float *gradient = rows[thread].gradient.data();
            gather(tile.tensor->grad, settings.grad_type, tile.first(), tile.mask(), tile.n, gradient);
            for (int j = 0; j < tile.active; ++j) gradient[j] *= grad_scale;
            // The largest is finite when all are.
            if (!is_finite(float_of(largest(gradient, tile.active)))) skipped = true;
        });
    });
    for (int64_t t = 0; t < count; ++t) {
        if (tensors[t].n > 0 && tensors[t].before[tiles_of(tensors[t].n)] != tensors[t].active) wrong = true;
        if (tensors[t].n > 0 && tensors[t].before[0] != 0) wrong = true;
    }
    if (wrong) return LORAPAR_ERROR_MASK;
    if (settings.skipped != nullptr) *settings.skipped = skipped;
    if (skipped) return LORAPAR_OK;
    const Coefficients c = coefficients_of(settings, step);
    parallel_chunks(tiles.size(), kChunk, threads, [&](int64_t begin, int64_t end, int thread) {
        tiles.each(begin, end, [&](const Tile &tile) {
            step_tile(tile, settings, step.number, c, grad_scale, rows[thread]);
        });
    });
    return LORAPAR_OK;
}

}  // namespace

int lorapar_masked_adamw(const lorapar_adamw_tensor *tensors, int64_t count, const lorapar_adamw_settings *settings,
                         intptr_t queue) {
    if (int status = check_adamw(tensors, count, settings)) return status;
    return guarded([&] { return masked_adamw(tensors, count, *settings, queue); });
}
