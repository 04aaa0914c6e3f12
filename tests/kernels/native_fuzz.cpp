// Drives the C interface with random and with hostile arguments: sizes, masks, pointers, scores, settings. Results are
// held against the definitions written plainly here; after an error, nothing may have been written. Every array is its own
// allocation of exact size, so that the address sanitizer sees a step beyond it.
//
//   native_fuzz SEED ROUNDS      exit status 0, or 1 with the first thing that is wrong
#include "../../csrc/lorapar.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

static std::mt19937_64 random_engine;
static int64_t below(int64_t n) { return static_cast<int64_t>(random_engine() % static_cast<uint64_t>(n)); }
static bool chance(int one_in) { return below(one_in) == 0; }

#define EXPECT(condition)                                                       \
    do {                                                                        \
        if (!(condition)) {                                                     \
            std::fprintf(stderr, "line %d: not so: %s\n", __LINE__, #condition); \
            std::exit(1);                                                       \
        }                                                                       \
    } while (0)

// Sizes at and around every boundary that the code knows.
static int64_t some_size() {
    static const int64_t edges[] = {0, 1, 31, 32, 33, 255, 256, 511, 512, 513, 1023, 1024, 1025, 4096};
    return chance(2) ? edges[below(14)] : below(3000);
}
static intptr_t some_queue() { return QUEUES ? below(4) : 0; }

template <typename T>
struct Array {
    std::unique_ptr<T[]> data;
    int64_t size;
    explicit Array(int64_t n, T value = T()) : data(new T[n > 0 ? n : 0]), size(n) { std::fill_n(data.get(), n, value); }
    T *get() { return data.get(); }
    T &operator[](int64_t i) { return data[i]; }
    std::vector<uint8_t> bytes() const {
        const uint8_t *from = reinterpret_cast<const uint8_t *>(data.get());
        return std::vector<uint8_t>(from, from + size * sizeof(T));
    }
};

template <typename T>
static T *misaligned(T *pointer) {
    return reinterpret_cast<T *>(reinterpret_cast<uintptr_t>(pointer) + 1);
}

static Array<uint8_t> random_mask(int64_t n) {
    Array<uint8_t> mask(n);
    const int64_t in_ten = chance(4) ? 10 * below(2) : below(11);
    for (int64_t i = 0; i < n; ++i) mask[i] = below(10) < in_ten ? static_cast<uint8_t>(1 + below(255)) : 0;
    return mask;
}

static Array<int32_t> words_of(Array<uint8_t> &mask) {
    Array<int32_t> words((mask.size + 31) / 32);
    for (int64_t i = 0; i < mask.size; ++i) {
        words[i / 32] = static_cast<int32_t>(static_cast<uint32_t>(words[i / 32]) | (mask[i] ? 1u << (i % 32) : 0));
    }
    return words;
}

static void masks() {
    const int64_t n = some_size();
    Array<uint8_t> mask = random_mask(n), back(n, 7);
    Array<int32_t> expected = words_of(mask), words(expected.size, 0x5a5a5a5a);
    EXPECT(lorapar_pack_mask(mask.get(), n, words.get(), some_queue()) == LORAPAR_OK);
    EXPECT(words.bytes() == expected.bytes());
    // Spare bits are not looked at but by those that say so.
    if (n % 32 != 0) words[n / 32] = static_cast<int32_t>(static_cast<uint32_t>(words[n / 32]) | ~0u << (n % 32));
    EXPECT(lorapar_unpack_mask(words.get(), n, back.get(), some_queue()) == LORAPAR_OK);
    for (int64_t i = 0; i < n; ++i) EXPECT(back[i] == (mask[i] != 0));
    Array<int64_t> before((n + LORAPAR_TILE - 1) / LORAPAR_TILE + 1, -1);
    EXPECT(lorapar_index_mask(words.get(), n, before.get(), some_queue()) == LORAPAR_OK);
    for (int64_t t = 0, i = 0, sum = 0; t < before.size; ++t) {
        EXPECT(before[t] == sum);
        for (; i < std::min(n, (t + 1) * LORAPAR_TILE); ++i) sum += mask[i] != 0;
    }
    // Wrong arguments, and nothing written.
    const std::vector<uint8_t> kept = words.bytes(), kept_before = before.bytes();
    for (int64_t wrong : {int64_t{-1}, INT64_MIN, LORAPAR_MAX_SIZE + 1, INT64_MAX}) {
        EXPECT(lorapar_pack_mask(mask.get(), wrong, words.get(), 1) == LORAPAR_ERROR_SIZE);
        EXPECT(lorapar_index_mask(words.get(), wrong, before.get(), 1) == LORAPAR_ERROR_SIZE);
    }
    if (n > 0) {
        EXPECT(lorapar_pack_mask(nullptr, n, words.get(), 1) == LORAPAR_ERROR_NULL_POINTER);
        EXPECT(lorapar_pack_mask(mask.get(), n, misaligned(words.get()), 1) == LORAPAR_ERROR_ALIGNMENT);
        EXPECT(lorapar_index_mask(words.get(), n, misaligned(before.get()), 1) == LORAPAR_ERROR_ALIGNMENT);
    }
    EXPECT(words.bytes() == kept && before.bytes() == kept_before);
}

struct Scored {
    std::vector<Array<float>> scores;
    std::vector<Array<uint8_t>> among, keep;
    std::vector<lorapar_scores> table;
    int64_t count() const { return static_cast<int64_t>(table.size()); }
};

// Working memory of exactly the size that is asked for, with anything in it, before a word that nobody may write.
struct Workspace {
    std::vector<Array<uint64_t>> memory;
    void *data;
    int64_t bytes;
    static constexpr uint64_t kBeyond = 0x5a5a5a5a5a5a5a5a;
    explicit Workspace(const Scored &all) : bytes(lorapar_selection_workspace(all.table.data(), all.count())) {
        EXPECT(bytes >= 0 && bytes % 8 == 0 && (QUEUES ? bytes == 0 : bytes > 0));
        memory.emplace_back(bytes / 8 + 1, kBeyond);
        std::generate_n(memory[0].get(), bytes / 8, std::ref(random_engine));
        data = bytes > 0 ? memory[0].get() : nullptr;
    }
    ~Workspace() { EXPECT(memory[0][bytes / 8] == kBeyond); }
};

static Scored some_scores() {
    Scored all;
    const int64_t tensors = 1 + below(5), levels = 1 + below(chance(2) ? 3 : 1000);
    const float unit = std::ldexp(1.0f, static_cast<int>(below(180)) - 149);
    for (int64_t t = 0; t < tensors; ++t) {
        const int64_t n = some_size();
        all.scores.emplace_back(n);
        all.among.push_back(random_mask(n));
        all.keep.emplace_back(n, static_cast<uint8_t>(77));
        for (int64_t i = 0; i < n; ++i) {
            all.scores[t][i] = chance(20) ? -0.0f : unit * static_cast<float>(below(levels));
        }
    }
    for (int64_t t = 0; t < tensors; ++t) {
        const uint8_t *among = chance(2) ? nullptr : all.among[t].get();
        all.table.push_back({all.scores[t].get(), among, all.keep[t].get(), all.scores[t].size});
    }
    return all;
}

// Every element that takes part, in order of score and then of place.
static std::vector<std::pair<int64_t, int64_t>> ranked(const Scored &all) {
    std::vector<std::pair<int64_t, int64_t>> order;
    for (size_t t = 0; t < all.table.size(); ++t) {
        for (int64_t i = 0; i < all.table[t].n; ++i) {
            if (all.table[t].among == nullptr || all.table[t].among[i] != 0) order.emplace_back(t, i);
        }
    }
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) {
        return all.table[a.first].scores[a.second] > all.table[b.first].scores[b.second];
    });
    return order;
}

static void expect_kept(Scored &all, const lorapar_cut &cut, const std::vector<std::pair<int64_t, int64_t>> &order,
                        size_t first) {
    Workspace room(all);
    EXPECT(lorapar_keep(all.table.data(), all.count(), &cut, room.data, room.bytes, some_queue()) == LORAPAR_OK);
    std::vector<Array<uint8_t>> expected;
    for (const Array<float> &scores : all.scores) expected.emplace_back(scores.size);
    for (size_t rank = 0; rank < first; ++rank) expected[order[rank].first][order[rank].second] = 1;
    for (size_t t = 0; t < expected.size(); ++t) EXPECT(all.keep[t].bytes() == expected[t].bytes());
}

static void selection() {
    Scored all = some_scores();
    const int64_t count = all.count();
    Workspace room(all);
    auto top_mass = [&](const double *thetas, int64_t n_thetas, lorapar_cut *cuts, intptr_t queue) {
        return lorapar_top_mass(all.table.data(), count, thetas, n_thetas, cuts, room.data, room.bytes, queue);
    };
    auto top_count = [&](int64_t kept, lorapar_cut *cuts, intptr_t queue) {
        return lorapar_top_count(all.table.data(), count, kept, cuts, room.data, room.bytes, queue);
    };
    const auto order = ranked(all);
    // Scores are small integers times a power of two, so these sums are exact.
    double total = 0.0;
    for (auto [t, i] : order) total += all.table[t].scores[i];
    const double thetas[] = {1.0, static_cast<double>(1 + below(1000)) / 1000.0, 1e-12};
    lorapar_cut cuts[3];
    const int status = top_mass(thetas, 3, cuts, some_queue());
    EXPECT(status == (total > 0.0 ? LORAPAR_OK : LORAPAR_ERROR_ZERO));
    for (int k = 0; k < 3 && status == LORAPAR_OK; ++k) {
        double sum = 0.0;
        size_t first = 0;
        while (first < order.size() && sum < thetas[k] * total) {
            sum += all.table[order[first].first].scores[order[first].second];
            ++first;
        }
        expect_kept(all, cuts[k], order, first);
    }
    if (!order.empty()) {
        const int64_t kept = 1 + below(static_cast<int64_t>(order.size()));
        EXPECT(top_count(kept, cuts, some_queue()) == LORAPAR_OK);
        expect_kept(all, cuts[0], order, static_cast<size_t>(kept));
    }
    // Wrong arguments, and nothing written.
    const lorapar_cut untouched = cuts[0];
    const int64_t most = static_cast<int64_t>(order.size());
    for (int64_t kept : {int64_t{0}, int64_t{-1}, most + 1, INT64_MAX}) {
        EXPECT(top_count(kept, cuts, 1) == LORAPAR_ERROR_COUNT);
    }
    for (const double theta : {0.0, -0.5, 1.0000001, std::nan(""), HUGE_VAL}) {
        EXPECT(top_mass(&theta, 1, cuts, 1) == LORAPAR_ERROR_THETA);
    }
    EXPECT(lorapar_top_mass(nullptr, count, thetas, 1, cuts, room.data, room.bytes, 1) == LORAPAR_ERROR_NULL_POINTER);
    EXPECT(lorapar_top_mass(all.table.data(), -1, thetas, 1, cuts, room.data, room.bytes, 1) == LORAPAR_ERROR_SIZE);
    EXPECT(top_mass(thetas, 1, nullptr, 1) == LORAPAR_ERROR_NULL_POINTER);
    EXPECT(lorapar_selection_workspace(nullptr, count) == 0 && lorapar_selection_workspace(all.table.data(), -1) == 0);
    if (room.bytes > 0) {
        const std::vector<uint8_t> kept_keep = all.keep[0].bytes();
        auto refused = [&](void *data, int64_t bytes, int status) {
            EXPECT(lorapar_top_mass(all.table.data(), count, thetas, 1, cuts, data, bytes, 0) == status);
            EXPECT(order.empty() || lorapar_top_count(all.table.data(), count, 1, cuts, data, bytes, 0) == status);
            const lorapar_cut cut{1, 0, 0};
            EXPECT(lorapar_keep(all.table.data(), count, &cut, data, bytes, 0) == status);
        };
        refused(room.data, room.bytes - 1, LORAPAR_ERROR_WORKSPACE);
        refused(room.data, -1, LORAPAR_ERROR_WORKSPACE);
        refused(nullptr, room.bytes, LORAPAR_ERROR_NULL_POINTER);
        refused(misaligned(static_cast<uint8_t *>(room.data)), room.bytes, LORAPAR_ERROR_ALIGNMENT);
        EXPECT(all.keep[0].bytes() == kept_keep);
    }
    const int64_t t = below(count), n = all.table[t].n;
    for (int64_t wrong : {int64_t{-1}, (int64_t{1} << 29) + 1, INT64_MAX}) {
        all.table[t].n = wrong;
        EXPECT(top_mass(thetas, 1, cuts, 1) == LORAPAR_ERROR_SIZE);
    }
    all.table[t].n = n;
    if (n > 0) {
        const float hostile[] = {-1e-45f, -1.0f, INFINITY, -INFINITY, NAN, -NAN};
        all.scores[t][below(n)] = hostile[below(6)];
        EXPECT(top_mass(thetas, 1, cuts, some_queue()) == LORAPAR_ERROR_SCORE);
        const int found = top_count(1, cuts, some_queue());
        EXPECT(found == LORAPAR_ERROR_SCORE);
        all.table[t].scores = misaligned(all.scores[t].get());
        EXPECT(top_mass(thetas, 1, cuts, 1) == LORAPAR_ERROR_ALIGNMENT);
    }
    EXPECT(std::memcmp(&untouched.bits, &cuts[0].bits, 4) == 0 && untouched.ties == cuts[0].ties);
}

static void tiles() {
    const int64_t rows = below(70), columns = below(600), height = 1 + below(80), width = 1 + below(700);
    Array<float> scores(rows * columns);
    for (int64_t i = 0; i < scores.size; ++i) scores[i] = static_cast<float>(below(100));
    const int64_t down = rows == 0 ? 0 : (rows - 1) / height + 1, across = columns == 0 ? 0 : (columns - 1) / width + 1;
    Array<double> sums(down * across, -1.0), expected(down * across);
    for (int64_t i = 0; i < scores.size; ++i) expected[i / columns / height * across + i % columns / width] += scores[i];
    EXPECT(lorapar_tile_sums(scores.get(), rows, columns, height, width, sums.get(), some_queue()) == LORAPAR_OK);
    EXPECT(sums.bytes() == expected.bytes());
    for (int64_t wrong : {int64_t{0}, int64_t{-1}, INT64_MIN}) {
        EXPECT(lorapar_tile_sums(scores.get(), rows, columns, wrong, 1, sums.get(), 1) == LORAPAR_ERROR_SIZE);
    }
    EXPECT(lorapar_tile_sums(scores.get(), INT64_MAX, INT64_MAX, 1, 1, sums.get(), 1) == LORAPAR_ERROR_SIZE);
}

struct Parameter {
    Array<uint8_t> mask;
    Array<int32_t> words;
    Array<int64_t> before;
    Array<uint32_t> param, grad;  // room for the widest type
    int64_t active;
    Array<uint32_t> exp_avg, exp_avg_sq;
    Array<float> scales;
    Array<uint16_t> compensation;

    explicit Parameter(int64_t n)
        : mask(random_mask(n)), words(words_of(mask)), before((n + LORAPAR_TILE - 1) / LORAPAR_TILE + 1), param(n), grad(n),
          active(std::count_if(mask.get(), mask.get() + n, [](uint8_t byte) { return byte != 0; })), exp_avg(active),
          exp_avg_sq(active), scales(2 * (before.size - 1)), compensation(active) {
        EXPECT(lorapar_index_mask(words.get(), n, before.get(), 0) == LORAPAR_OK && before[before.size - 1] == active);
    }
    std::vector<uint8_t> bytes() const {
        std::vector<uint8_t> all = param.bytes();
        for (const auto &more : {exp_avg.bytes(), exp_avg_sq.bytes(), scales.bytes(), compensation.bytes()}) {
            all.insert(all.end(), more.begin(), more.end());
        }
        return all;
    }
};

static void optimizer() {
    const int type = static_cast<int>(below(3)), grad_type = static_cast<int>(below(3));
    const bool codes = chance(2), compensated = type != LORAPAR_FLOAT32 && chance(2);
    const bool stochastic = type == LORAPAR_BFLOAT16 && !compensated && chance(2);
    const int64_t count = 1 + below(4), width = type == LORAPAR_FLOAT32 ? 4 : 2, grad_width = grad_type == 0 ? 4 : 2;
    std::vector<Parameter> parameters;
    for (int64_t t = 0; t < count; ++t) parameters.emplace_back(some_size());
    std::vector<lorapar_adamw_tensor> table;
    for (Parameter &p : parameters) {
        // Any bits at all, NaN and infinities among them.
        for (int64_t i = 0; i < p.param.size; ++i) {
            p.param[i] = static_cast<uint32_t>(random_engine());
            p.grad[i] = chance(2) ? static_cast<uint32_t>(random_engine()) : 0x3c003c00u;
        }
        // From the end of the allocations, where the address sanitizer looks.
        uint8_t *param = reinterpret_cast<uint8_t *>(p.param.get()) + p.param.size * (4 - width);
        uint8_t *grad = reinterpret_cast<uint8_t *>(p.grad.get()) + p.grad.size * (4 - grad_width);
        table.push_back({param, grad, p.words.get(), p.before.get(), p.exp_avg.get(), p.exp_avg_sq.get(),
                         codes ? p.scales.get() : nullptr, compensated ? p.compensation.get() : nullptr, p.param.size,
                         p.active});
    }
    float grad_scale = 0.5f;
    int32_t skipped = -1;
    lorapar_adamw_settings settings{1e-2, 0.9, 0.99, 1e-8, 0.1, 1, random_engine(), chance(2), stochastic, type, grad_type,
                                    chance(2) ? &grad_scale : nullptr, chance(2) ? &skipped : nullptr,
                                    nullptr, nullptr, 0};
    // The step's number and the rate in memory, each in an allocation of its own.
    Array<int64_t> whole_step(1);
    Array<float> float_step(1), rate(1, 1e-2f);
    const int in_memory = static_cast<int>(below(3));
    settings.step_type = in_memory == 2;
    if (in_memory != 0) settings.step_at = in_memory == 1 ? static_cast<void *>(whole_step.get()) : float_step.get();
    if (chance(2)) settings.lr_at = rate.get();
    auto step = [&] { return lorapar_masked_adamw(table.data(), count, &settings, some_queue()); };
    auto everything = [&] {
        std::vector<uint8_t> all;
        for (const Parameter &p : parameters) {
            const std::vector<uint8_t> one = p.bytes();
            all.insert(all.end(), one.begin(), one.end());
        }
        return all;
    };
    for (settings.step = 1; settings.step < 4; ++settings.step) {
        whole_step[0] = settings.step, float_step[0] = static_cast<float>(settings.step);
        const std::vector<uint8_t> old = everything();
        std::vector<std::vector<uint8_t>> params;
        for (const Parameter &p : parameters) params.push_back(p.param.bytes());
        EXPECT(step() == LORAPAR_OK);
        if (settings.skipped != nullptr && skipped == 1) EXPECT(everything() == old);
        for (int64_t t = 0; t < count; ++t) {
            const std::vector<uint8_t> now = parameters[t].param.bytes();
            const int64_t offset = parameters[t].param.size * (4 - width);
            for (int64_t i = 0; i < parameters[t].param.size; ++i) {
                if (parameters[t].mask[i] != 0) continue;
                EXPECT(std::memcmp(&now[offset + i * width], &params[t][offset + i * width], width) == 0);
            }
        }
    }
    // Wrong arguments, and nothing written.
    const std::vector<uint8_t> old = everything();
    const int64_t t = below(count), n = table[t].n;
    const lorapar_adamw_tensor good = table[t];
    const lorapar_adamw_settings fine = settings;
    settings.step = 0;
    EXPECT(step() == LORAPAR_ERROR_SETTING);
    settings = fine, settings.beta1 = 1.0;
    EXPECT(step() == LORAPAR_ERROR_SETTING);
    settings = fine, settings.lr = NAN;
    EXPECT(step() == LORAPAR_ERROR_SETTING);
    settings = fine, settings.param_type = 3;
    EXPECT(step() == LORAPAR_ERROR_SETTING);
    settings = fine, settings.step_type = 2;
    EXPECT(step() == LORAPAR_ERROR_SETTING);
    settings = fine, settings.lr_at = misaligned(rate.get());
    EXPECT(step() == LORAPAR_ERROR_ALIGNMENT);
    settings = fine, settings.step_at = misaligned(whole_step.get());
    EXPECT(step() == LORAPAR_ERROR_ALIGNMENT);
    // What memory holds, the device sees too late to say.
    const int bad = QUEUES ? LORAPAR_ERROR_SETTING : LORAPAR_OK;
    settings = fine, settings.skipped = nullptr, settings.step_at = whole_step.get(), settings.step_type = 0;
    for (const int64_t number : {int64_t{0}, int64_t{-3}, INT64_MIN}) {
        whole_step[0] = number;
        EXPECT(step() == bad && everything() == old);
    }
    settings.step_at = float_step.get(), settings.step_type = 1;
    for (const float number : {0.0f, 0.5f, -1.0f, NAN, INFINITY, -INFINITY, 1e30f}) {
        float_step[0] = number;
        EXPECT(step() == bad && everything() == old);
    }
    settings.step_at = nullptr, settings.step_type = 0, settings.lr_at = rate.get();
    for (const float number : {-1.0f, NAN, INFINITY}) {
        rate[0] = number;
        EXPECT(step() == bad && everything() == old);
    }
    settings = fine;
    whole_step[0] = 4, float_step[0] = 4.0f, rate[0] = 1e-2f;
    table[t].active = n + 1;
    EXPECT(step() == LORAPAR_ERROR_SIZE);
    table[t] = good, table[t].n = -1;
    EXPECT(step() == LORAPAR_ERROR_SIZE);
    table[t] = good;
    if (n > 0) {
        table[t].param = nullptr;
        EXPECT(step() == LORAPAR_ERROR_NULL_POINTER);
        table[t] = good, table[t].grad = misaligned(static_cast<const uint8_t *>(good.grad));
        EXPECT(step() == LORAPAR_ERROR_ALIGNMENT);
        table[t] = good;
        // An index that is not the mask's, and spare bits. The device leaves such tiles alone.
        Parameter &p = parameters[t];
        const int64_t entry = below(p.before.size);
        const int64_t shift = chance(2) ? 1 + below(9) : -INT32_MAX;
        p.before[entry] += shift;
        if (QUEUES) {
            EXPECT(step() == LORAPAR_ERROR_MASK);
            EXPECT(everything() == old);
        } else {
            EXPECT(step() == LORAPAR_OK);
        }
        p.before[entry] -= shift;
        if (QUEUES && n % 32 != 0) {
            p.words[n / 32] = static_cast<int32_t>(static_cast<uint32_t>(p.words[n / 32]) | 1u << 31);
            EXPECT(step() == LORAPAR_ERROR_MASK);
        }
    }
    if (QUEUES) EXPECT(everything() == old);
}

int main(int, char **arguments) {
    random_engine.seed(std::strtoull(arguments[1], nullptr, 10));
    const int rounds = std::atoi(arguments[2]);
    for (int round = 0; round < rounds; ++round) masks(), selection(), tiles(), optimizer();
    std::printf("%d rounds of %s\n", rounds, lorapar_build());
}
