// Selection on the device: histograms there, the exact sums and the cut on the host (selection.h), which waits for them.

#include "../selection.h"

#include "common.cuh"

#include <algorithm>
#include <vector>

namespace {

using namespace lorapar;

// Elements of one piece of work, which a block takes whole.
constexpr int64_t kChunk = 1 << 13;
// Tensors a launch takes: their table travels as the kernel's parameter, of which 4 KB fit every toolkit and driver.
constexpr int kTableSize = 96;

struct Table {
    lorapar_scores tensors[kTableSize];
    int64_t first_chunk[kTableSize + 1];  // the chunks before each tensor, and all
    int count;
};
static_assert(sizeof(Table) <= 4000, "the table is a kernel parameter");

// Whose chunk of a table's tensors that is.
__device__ inline int tensor_of(const Table &table, int64_t chunk) {
    return owner_of(table.first_chunk, table.count, chunk);
}

// Every element of every chunk of the table that this block takes, in whole warps: body(tensor, i, inside).
template <typename Body>
__device__ inline void for_each_element(const Table &table, const Body &body) {
    for (int64_t chunk = blockIdx.x; chunk < table.first_chunk[table.count]; chunk += gridDim.x) {
        const int t = tensor_of(table, chunk);
        const int64_t begin = (chunk - table.first_chunk[t]) * kChunk;
        for (int64_t i = begin + threadIdx.x; i < begin + kChunk; i += kThreads) {
            body(table.tensors[t], i, i < table.tensors[t].n);
        }
    }
}

// Adds to bins[bin]. Where the whole warp has one bin, as in a tensor of equal scores, it adds once.
template <typename T>
__device__ inline void add_to_bin(T *bins, int bin, T weight) {
    int same;
    __match_all_sync(0xffffffffu, bin, &same);
    if (!same) {
        if (bin >= 0) atomicAdd(bins + bin, weight);
        return;
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) weight += __shfl_down_sync(0xffffffffu, weight, lanes);
    if (threadIdx.x % 32 == 0 && bin >= 0) atomicAdd(bins + bin, weight);
}

__global__ void weigh_kernel(const __grid_constant__ Table table, bool by_mass, double *sums, int *wrong) {
    for_each_element(table, [&](const lorapar_scores &tensor, int64_t i, bool inside) {
        int bin = -1;
        double weight = 0.0;
        if (inside) {
            const uint32_t bits = bits_of(tensor.scores[i]);
            if (is_wrong(bits)) {
                *wrong = 1;
            } else if (takes_part(tensor, i)) {
                bin = static_cast<int>((bits & 0x7fffffffu) >> 16);
                weight = by_mass ? static_cast<double>(float_of(bits)) : 1.0;
            }
        }
        add_to_bin(sums, bin, weight);
    });
}

__global__ void count_kernel(const __grid_constant__ Table table, uint32_t upper, uint32_t *counts) {
    for_each_element(table, [&](const lorapar_scores &tensor, int64_t i, bool inside) {
        int bin = -1;
        if (inside) {
            const uint32_t bits = magnitude(tensor.scores[i]);
            if (bits >> 16 == upper && takes_part(tensor, i)) bin = static_cast<int>(bits & 0xffff);
        }
        add_to_bin(counts, bin, bin >= 0 ? 1u : 0u);
    });
}

// How many equals of the cut each chunk has, where only some of them are kept.
__global__ void equals_kernel(const __grid_constant__ Table table, uint32_t bits, unsigned long long *equals) {
    for (int64_t chunk = blockIdx.x; chunk < table.first_chunk[table.count]; chunk += gridDim.x) {
        const lorapar_scores &tensor = table.tensors[tensor_of(table, chunk)];
        const int64_t begin = (chunk - table.first_chunk[tensor_of(table, chunk)]) * kChunk;
        int found = 0;
        for (int64_t i = begin + threadIdx.x; i < begin + kChunk; i += kThreads) {
            found += i < tensor.n && magnitude(tensor.scores[i]) == bits && takes_part(tensor, i);
        }
        for (int lanes = 16; lanes > 0; lanes /= 2) found += __shfl_down_sync(0xffffffffu, found, lanes);
        if (threadIdx.x % 32 == 0 && found > 0) atomicAdd(equals + chunk, static_cast<unsigned long long>(found));
    }
}

// before[chunk]: equals in the chunks before it, or nullptr where all equals are kept. One warp a chunk walks it in order.
__global__ void keep_kernel(const __grid_constant__ Table table, uint32_t bits, int64_t ties, const int64_t *before) {
    const int lane = threadIdx.x % 32;
    for (int64_t chunk = global_thread() / 32; chunk < table.first_chunk[table.count]; chunk += global_threads() / 32) {
        const int t = tensor_of(table, chunk);
        const lorapar_scores &tensor = table.tensors[t];
        const int64_t begin = (chunk - table.first_chunk[t]) * kChunk;
        int64_t seen = before == nullptr ? 0 : before[chunk];
        for (int64_t i = begin + lane; i - lane < min(begin + kChunk, tensor.n); i += 32) {
            const bool inside = i < tensor.n && takes_part(tensor, i);
            const uint32_t mine = inside ? magnitude(tensor.scores[i]) : 0;
            const unsigned equal = __ballot_sync(0xffffffffu, inside && mine == bits);
            const int64_t rank = seen + __popc(equal & ((1u << lane) - 1));
            if (i < tensor.n) tensor.keep[i] = inside && (mine > bits || (mine == bits && (!before || rank < ties)));
            seen += __popc(equal);
        }
    }
}

// A block a tile: its threads sum the columns, then its first adds those up in order.
__global__ void tile_sums_kernel(const float *scores, Tiles tiles, int64_t across, int64_t count, double *sums) {
    __shared__ double down[kThreads];
    for (int64_t tile = blockIdx.x; tile < count; tile += gridDim.x) {
        const int64_t top = tile / across * tiles.height, left = tile % across * tiles.width;
        const int64_t height = min(tiles.height, tiles.rows - top), width = min(tiles.width, tiles.columns - left);
        double total = 0.0;
        for (int64_t first = 0; first < width; first += kThreads) {
            const unsigned here = static_cast<unsigned>(min(width - first, static_cast<int64_t>(kThreads)));
            if (threadIdx.x < here) {
                const float *column = scores + top * tiles.columns + left + first + threadIdx.x;
                double sum = 0.0;
#pragma unroll 8
                for (int64_t r = 0; r < height; ++r) sum += column[r * tiles.columns];
                down[threadIdx.x] = sum;
            }
            __syncthreads();
            if (threadIdx.x == 0) {
                for (unsigned c = 0; c < here; ++c) total += down[c];
            }
            __syncthreads();
        }
        if (threadIdx.x == 0) sums[tile] = total;
    }
}

// A part of the caller's workspace.
template <typename T>
class Scratch {
public:
    Scratch(void *workspace, int64_t offset, int64_t n, intptr_t queue)
        : data_(reinterpret_cast<T *>(static_cast<char *>(workspace) + offset)), bytes_(n * sizeof(T)), queue_(queue) {}
    T *data() const { return data_; }
    int clear() const { return status_of(cudaMemsetAsync(data_, 0, bytes_, stream_of(queue_))); }
    // Waits for the stream.
    int read(T *host) const {
        const cudaError_t error = cudaMemcpyAsync(host, data_, bytes_, cudaMemcpyDeviceToHost, stream_of(queue_));
        return status_of(error == cudaSuccess ? cudaStreamSynchronize(stream_of(queue_)) : error);
    }
    // Waits too, since `host` is the caller's again.
    int write(const T *host) const {
        const cudaError_t error = cudaMemcpyAsync(data_, host, bytes_, cudaMemcpyHostToDevice, stream_of(queue_));
        return status_of(error == cudaSuccess ? cudaStreamSynchronize(stream_of(queue_)) : error);
    }

private:
    T *data_;
    size_t bytes_;
    intptr_t queue_;
};

int64_t chunks_of(const Table &table) { return table.first_chunk[table.count]; }
int chunk_blocks(const Table &table) { return static_cast<int>(std::min(chunks_of(table), kMaxBlocks)); }

}  // namespace

namespace lorapar {

// The bins of `weigh` with its flag, those of `count`, or a number a chunk for `keep`: one after another, in the same place.
inline int64_t workspace_of(const lorapar_scores *tensors, int64_t count) {
    int64_t chunks = 0;
    for (int64_t t = 0; t < count; ++t) chunks += (tensors[t].n + kChunk - 1) / kChunk;
    const int64_t bins = std::max<int64_t>((kUpperBins + 1) * sizeof(double), kLowerBins * sizeof(uint32_t));
    return std::max<int64_t>(bins, chunks * sizeof(unsigned long long));
}

class Selection {
public:
    // The list as tables, tensors without elements left out.
    Selection(const lorapar_scores *tensors, int64_t count, void *workspace, intptr_t queue)
        : workspace_(workspace), queue_(queue) {
        for (int64_t t = 0; t < count; ++t) {
            if (tensors[t].n == 0) continue;
            if (tables_.empty() || tables_.back().count == kTableSize) tables_.push_back({});
            Table &table = tables_.back();
            table.tensors[table.count] = tensors[t];
            table.first_chunk[table.count + 1] = chunks_of(table) + (tensors[t].n + kChunk - 1) / kChunk;
            ++table.count;
        }
    }

    int weigh(bool by_mass, std::vector<double> &sums) {
        sums.resize(kUpperBins);
        const Scratch<double> bins(workspace_, 0, kUpperBins, queue_);
        const Scratch<int> wrong(workspace_, kUpperBins * sizeof(double), 1, queue_);
        int status = bins.clear();
        if (status == LORAPAR_OK) status = wrong.clear();
        for (const Table &table : tables_) {
            if (status != LORAPAR_OK) return status;
            status = launch(weigh_kernel, chunk_blocks(table), queue_, table, by_mass, bins.data(), wrong.data());
        }
        int found = 0;
        if (status == LORAPAR_OK) status = bins.read(sums.data());
        if (status == LORAPAR_OK) status = wrong.read(&found);
        return status == LORAPAR_OK && found != 0 ? LORAPAR_ERROR_SCORE : status;
    }

    int count(uint32_t upper, std::vector<uint32_t> &counts) {
        counts.resize(kLowerBins);
        const Scratch<uint32_t> bins(workspace_, 0, kLowerBins, queue_);
        int status = bins.clear();
        for (const Table &table : tables_) {
            if (status != LORAPAR_OK) return status;
            status = launch(count_kernel, chunk_blocks(table), queue_, table, upper, bins.data());
        }
        return status == LORAPAR_OK ? bins.read(counts.data()) : status;
    }

    int keep(const lorapar_cut &cut) {
        int status = LORAPAR_OK;
        int64_t seen = 0;
        for (const Table &table : tables_) {
            if (status != LORAPAR_OK) return status;
            status = cut.ties < cut.equals ? keep_some(table, cut, seen) : launch_keep(table, cut, nullptr);
        }
        return status;
    }

private:
    int launch_keep(const Table &table, const lorapar_cut &cut, const int64_t *before) {
        return launch(keep_kernel, blocks_for(32 * chunks_of(table)), queue_, table, cut.bits, cut.ties, before);
    }

    // Where only some of the equals are kept; `seen` of them come before this table.
    int keep_some(const Table &table, const lorapar_cut &cut, int64_t &seen) {
        std::vector<unsigned long long> equals(chunks_of(table));
        const Scratch<unsigned long long> device(workspace_, 0, chunks_of(table), queue_);
        if (int status = device.clear()) return status;
        const int blocks = chunk_blocks(table);
        if (int status = launch(equals_kernel, blocks, queue_, table, cut.bits, device.data())) return status;
        if (int status = device.read(equals.data())) return status;
        for (unsigned long long &here : equals) {
            const int64_t counted = static_cast<int64_t>(here);
            here = static_cast<unsigned long long>(seen);
            seen += counted;
        }
        if (int status = device.write(equals.data())) return status;
        return launch_keep(table, cut, reinterpret_cast<const int64_t *>(device.data()));
    }

    std::vector<Table> tables_;
    void *workspace_;
    intptr_t queue_;
};

static int tile_sums(const float *scores, Tiles tiles, double *sums, intptr_t queue) {
    const int64_t across = tiles.across(), count = tiles.down() * across;
    const int blocks = static_cast<int>(std::min(count, kMaxBlocks));
    return launch(tile_sums_kernel, blocks, queue, scores, tiles, across, count, sums);
}

}  // namespace lorapar

#include "../selection_interface.h"
