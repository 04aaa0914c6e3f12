// CUDA's runtime, as far as csrc/cuda uses it, on the host: the .cu files compile with a C++ compiler against this header
// and run, slowly, where no device is. For tests of what the kernels compute; it says nothing of speed, nor of races
// between blocks, which run one after another.
//
// Each thread of a block is a fiber. At a collective (shuffle, ballot, barrier) it waits until the others of its warp or
// block have come; where no fiber can go on, threads have parted ways at a collective, and the process aborts with a line
// that says so, where a device would hang or give anything.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(threads)
// Blocks run one at a time, so a variable of a block is one of the program.
#define __shared__ static
#define __CUDACC_VER_MAJOR__ 0
#define __CUDACC_VER_MINOR__ 0
#define CUDART_VERSION 12010

using std::max;
using std::min;

struct dim3 {
    unsigned x, y = 1, z = 1;
    explicit dim3(unsigned count) : x(count) {}
};
struct Index {
    unsigned x;
};

namespace cuda_on_cpu {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;

struct Barrier {
    int arrived = 0;
    uint64_t generation = 0;
};

struct Fiber {
    ucontext_t context;
    bool finished;
    unsigned thread;
    uint64_t collectives;  // so far: their values go to alternating slots
};

struct Block {
    std::vector<Fiber> fibers;
    std::unique_ptr<char[]> stacks;
    unsigned stack_count = 0;
    std::vector<Barrier> warps;
    std::vector<uint64_t> slots[2];
    Barrier all;
    ucontext_t scheduler;
    Fiber *running = nullptr;
    uint64_t progress = 0;
    void (*body)(void *) = nullptr;
    void *argument = nullptr;
};
inline Block block;
inline Index block_index, grid_size;

inline void wait(Barrier &barrier, int members) {
    const uint64_t generation = barrier.generation;
    ++block.progress;
    if (++barrier.arrived == members) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) swapcontext(&block.running->context, &block.scheduler);
}

// Hands over this lane's value; gives where the warp's values are until its next collective but one.
template <typename T>
const uint64_t *exchange(T value) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    const unsigned thread = block.running->thread, warp = thread / kWarp;
    std::vector<uint64_t> &slots = block.slots[block.running->collectives++ % 2];
    slots[thread] = 0;
    std::memcpy(&slots[thread], &value, sizeof value);
    wait(block.warps[warp], kWarp);
    return &slots[warp * kWarp];
}

template <typename T>
T lane_value(const uint64_t *values, int lane) {
    T value;
    std::memcpy(&value, values + lane, sizeof value);
    return value;
}

inline int this_lane() { return static_cast<int>(block.running->thread % kWarp); }

inline void run_fiber() {
    block.body(block.argument);
    block.running->finished = true;
    ++block.progress;
    swapcontext(&block.running->context, &block.scheduler);
}

inline void run_block(unsigned threads) {
    block.fibers.resize(threads);
    if (block.stack_count < threads) block.stacks.reset(new char[(block.stack_count = threads) * kStack]);
    block.warps.assign(threads / kWarp, {});
    for (auto &slots : block.slots) slots.assign(threads, 0);
    block.all = {};
    for (unsigned t = 0; t < threads; ++t) {
        Fiber &fiber = block.fibers[t];
        fiber.finished = false, fiber.thread = t, fiber.collectives = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = block.stacks.get() + t * kStack;
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    for (unsigned finished = 0; finished < threads;) {
        const uint64_t before = block.progress;
        for (Fiber &fiber : block.fibers) {
            if (fiber.finished) continue;
            block.running = &fiber;
            swapcontext(&block.scheduler, &fiber.context);
            finished += fiber.finished;
        }
        if (block.progress == before && finished < threads) {
            std::fprintf(stderr, "cuda_on_cpu: threads have parted ways at a collective\n");
            std::abort();
        }
    }
}

template <typename... Parameters, size_t... i>
void call(void (*kernel)(Parameters...), void **arguments, std::index_sequence<i...>) {
    kernel(*static_cast<Parameters *>(arguments[i])...);
}

}  // namespace cuda_on_cpu

#define threadIdx (Index{cuda_on_cpu::block.running->thread})
#define blockIdx (cuda_on_cpu::block_index)
#define gridDim (cuda_on_cpu::grid_size)

inline void __syncthreads() {
    cuda_on_cpu::wait(cuda_on_cpu::block.all, static_cast<int>(cuda_on_cpu::block.fibers.size()));
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return cuda_on_cpu::lane_value<T>(cuda_on_cpu::exchange(value), lane & 31);
}
// As on a device, a lane whose source is outside the warp keeps its own value.
template <typename T>
T __shfl_up_sync(unsigned, T value, int by) {
    const uint64_t *values = cuda_on_cpu::exchange(value);
    const int lane = cuda_on_cpu::this_lane();
    return cuda_on_cpu::lane_value<T>(values, lane >= by ? lane - by : lane);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int by) {
    const uint64_t *values = cuda_on_cpu::exchange(value);
    const int lane = cuda_on_cpu::this_lane();
    return cuda_on_cpu::lane_value<T>(values, lane + by < 32 ? lane + by : lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int by) {
    const uint64_t *values = cuda_on_cpu::exchange(value);
    return cuda_on_cpu::lane_value<T>(values, cuda_on_cpu::this_lane() ^ by);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
    const uint64_t *values = cuda_on_cpu::exchange(predicate);
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(cuda_on_cpu::lane_value<bool>(values, lane)) << lane;
    return bits;
}
template <typename T>
unsigned __match_all_sync(unsigned, T value, int *same) {
    const uint64_t *values = cuda_on_cpu::exchange(value);
    *same = std::all_of(values, values + 32, [&](uint64_t other) { return other == values[0]; });
    return *same ? 0xffffffffu : 0;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
template <typename T>
T atomicAdd(T *address, T value) {
    const T old = *address;
    *address = old + value;
    return old;
}

enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
using cudaStream_t = void *;

inline const char *cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "an error of cuda_on_cpu";
}
inline cudaError_t cudaMemsetAsync(void *memory, int value, size_t bytes, cudaStream_t) {
    std::memset(memory, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

template <typename... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 blocks, dim3 threads, void **arguments, size_t,
                             cudaStream_t) {
    auto body = [&] { cuda_on_cpu::call(kernel, arguments, std::index_sequence_for<Parameters...>()); };
    cuda_on_cpu::block.body = [](void *argument) { (*static_cast<decltype(body) *>(argument))(); };
    cuda_on_cpu::block.argument = &body;
    cuda_on_cpu::grid_size.x = blocks.x;
    for (cuda_on_cpu::block_index.x = 0; cuda_on_cpu::block_index.x < blocks.x; ++cuda_on_cpu::block_index.x) {
        cuda_on_cpu::run_block(threads.x);
    }
    return cudaSuccess;
}
