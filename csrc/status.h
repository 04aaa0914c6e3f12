// What both libraries check before they work, and what they say about it.
#pragma once

#include "lorapar.h"

#include <new>

namespace lorapar {

// What `work` returns. No exception may cross the C interface; memory is all that can be short.
template <typename Work>
int guarded(const Work &work) {
    try {
        return work();
    } catch (const std::bad_alloc &) {
        return LORAPAR_ERROR_MEMORY;
    }
}

// Null, not aligned to T, or fine; memory for no elements may be anything.
template <typename T>
int check_pointer(const T *pointer, int64_t n) {
    if (n == 0) return LORAPAR_OK;
    if (pointer == nullptr) return LORAPAR_ERROR_NULL_POINTER;
    return reinterpret_cast<uintptr_t>(pointer) % alignof(T) == 0 ? LORAPAR_OK : LORAPAR_ERROR_ALIGNMENT;
}

// The size, then each pointer in turn: the first thing that is wrong.
template <typename... T>
int check(int64_t n, const T *...pointers) {
    if (n < 0 || n > LORAPAR_MAX_SIZE) return LORAPAR_ERROR_SIZE;
    int status = LORAPAR_OK;
    ((status = status != LORAPAR_OK ? status : check_pointer(pointers, n)), ...);
    return status;
}

// As `check` for data of unknown type and elements of 2, 4 or 8 bytes, to which both pointers are aligned, and a seed.
inline int check_elements(int32_t size, int64_t n, const void *source, const void *target, const int64_t *seed) {
    if (size != 2 && size != 4 && size != 8) return LORAPAR_ERROR_ELEMENT;
    if (int status = check(n, static_cast<const uint8_t *>(source), static_cast<const uint8_t *>(target), seed)) return status;
    const uintptr_t bits = reinterpret_cast<uintptr_t>(source) | reinterpret_cast<uintptr_t>(target);
    return n > 0 && bits % static_cast<uintptr_t>(size) != 0 ? LORAPAR_ERROR_ALIGNMENT : LORAPAR_OK;
}

// One line on a status that is not CUDA's own, else nullptr.
inline const char *status_text(int status) {
    switch (status) {
        case LORAPAR_OK: return "no error";
        case LORAPAR_ERROR_NULL_POINTER: return "a null pointer where memory was expected";
        case LORAPAR_ERROR_SIZE: return "a number of elements below 0 or above 2^48";
        case LORAPAR_ERROR_ALIGNMENT: return "a pointer that is not aligned to its type";
        case LORAPAR_ERROR_MEMORY: return "no memory for working space";
        case LORAPAR_ERROR_SCORE: return "a score that is negative, infinite or not a number";
        case LORAPAR_ERROR_ZERO: return "no score above zero";
        case LORAPAR_ERROR_THETA: return "a share that is not in (0, 1]";
        case LORAPAR_ERROR_COUNT: return "a number of elements to keep that is not in 0..candidates";
        case LORAPAR_ERROR_MASK: return "a mask with a spare bit set, or counts that are not the mask's";
        case LORAPAR_ERROR_SETTING: return "a setting of the optimizer that is out of its range";
        case LORAPAR_ERROR_ELEMENT: return "an element size that is not 2, 4 or 8 bytes";
        case LORAPAR_ERROR_WORKSPACE: return "a workspace that is too small";
        default: return nullptr;
    }
}

}  // namespace lorapar
