// What the files of the CPU library share: threads, and code for the vector units of the machine it runs on.
#pragma once

#include "../both.h"
#include "../status.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <type_traits>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace lorapar {

// A function written once and compiled twice on x86-64, plain and for AVX2; the call takes what this machine has, so
// that one build runs anywhere. `name##_body` is an always-inlined function of the same parameters. AVX-512 has no third
// copy: the loops are bound by memory.
#if defined(__x86_64__) && defined(__GNUC__)
#define LORAPAR_X86 1
inline bool has_avx2() {
    static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
                            __builtin_cpu_supports("popcnt");
    return has;
}
#define LORAPAR_AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))
#define LORAPAR_FOR_EACH_MACHINE(name, parameters, arguments)                               \
    LORAPAR_AVX2 static void name##_avx2 parameters { name##_body arguments; }              \
    static void name##_plain parameters { name##_body arguments; }                          \
    static void name parameters { has_avx2() ? name##_avx2 arguments : name##_plain arguments; }
#else
#define LORAPAR_X86 0
#define LORAPAR_FOR_EACH_MACHINE(name, parameters, arguments) \
    static void name parameters { name##_body arguments; }
#endif

#if defined(__GNUC__)
#define LORAPAR_LAMBDA __attribute__((always_inline))
#else
#define LORAPAR_LAMBDA
#endif

// How many threads to use of those allowed: one for each `grain` of n, and one alone in a forked child, whose copy of
// the OpenMP runtime has lost its threads and would wait for them for ever (library.cpp).
int threads_for(int64_t n, int64_t grain, intptr_t allowed);

// body(begin, end) or body(begin, end, thread) over [0, n) in contiguous ranges, one a thread, each a multiple of `unit`
// long (the last but for what is left). The body does not throw.
template <typename Body>
void parallel_ranges(int64_t n, int64_t unit, int threads, const Body &body) {
    const int64_t units = (n + unit - 1) / unit;
    auto range = [&](int thread) {
        const int64_t begin = units * thread / threads * unit;
        const int64_t end = std::min(n, units * (thread + 1) / threads * unit);
        if (begin >= end) return;
        if constexpr (std::is_invocable_v<Body, int64_t, int64_t, int>) {
            body(begin, end, thread);
        } else {
            body(begin, end);
        }
    };
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
        for (int thread = 0; thread < threads; ++thread) range(thread);
        return;
    }
#endif
    for (int thread = 0; thread < threads; ++thread) range(thread);
}

// body(begin, end, thread) over [0, n) in ranges of `chunk`, to whichever thread is free: one that another program's work
// holds up does not hold up the others. For work whose result does not depend on who does it.
template <typename Body>
void parallel_chunks(int64_t n, int64_t chunk, int threads, const Body &body) {
    std::atomic<int64_t> next{0};
    parallel_ranges(threads, 1, threads, [&](int64_t, int64_t, int thread) {
        for (int64_t begin; (begin = next.fetch_add(chunk)) < n;) body(begin, std::min(n, begin + chunk), thread);
    });
}

}  // namespace lorapar
