// What code for the host and for the device shares: how a function is compiled for both, and the bits of a float.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__GNUC__)
#define LORAPAR_INLINE inline __attribute__((always_inline))
#else
#define LORAPAR_INLINE inline
#endif

#if defined(__CUDACC__)
#define LORAPAR_BOTH __host__ __device__ __forceinline__
#else
#define LORAPAR_BOTH LORAPAR_INLINE
#endif

namespace lorapar {

LORAPAR_BOTH uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

LORAPAR_BOTH float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The bits without the sign, which order magnitudes; -0.0 is 0.0, and a NaN is the largest of all.
LORAPAR_BOTH uint32_t magnitude(float value) { return bits_of(value) & 0x7fffffffu; }

}  // namespace lorapar
