// What the CPU library says of itself, and how many threads a call gets.

#include "common.h"

#if defined(_OPENMP) && defined(__unix__)
#include <pthread.h>

static bool forked = false;
// Runs when the library is loaded. A handler costs a forked child one store.
static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#else
static const bool forked = false;
static const int registered = 0;
#endif

namespace lorapar {

int threads_for(int64_t n, int64_t grain, intptr_t allowed) {
    if (forked || registered != 0 || allowed <= 1) return 1;
    const int64_t useful = std::max<int64_t>(n / grain, 1);
    return static_cast<int>(std::min<int64_t>({useful, static_cast<int64_t>(allowed), 256}));
}

}  // namespace lorapar

int lorapar_abi_version(void) { return LORAPAR_ABI_VERSION; }

#if defined(__clang__)
#define LORAPAR_COMPILER "C++17, Clang " __clang_version__
#elif defined(__GNUC__)
#define LORAPAR_COMPILER "C++17, GCC " __VERSION__
#else
#define LORAPAR_COMPILER "C++17"
#endif
#if defined(_OPENMP)
const char *lorapar_build(void) { return LORAPAR_COMPILER ", OpenMP"; }
#else
const char *lorapar_build(void) { return LORAPAR_COMPILER ", one thread (the compiler has no OpenMP)"; }
#endif

const char *lorapar_error_string(int status) {
    const char *text = lorapar::status_text(status);
    return text != nullptr ? text : "an unknown status";
}
