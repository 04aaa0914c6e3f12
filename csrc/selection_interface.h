// The selection's part of lorapar.h in terms of a `Selection` over a list of tensors, which each library defines before it
// includes this:
//
//   int64_t workspace_of(const lorapar_scores *tensors, int64_t count)        a function; the bytes that it works in
//   Selection(const lorapar_scores *tensors, int64_t count, void *workspace, intptr_t queue)
//                                                                 may throw std::bad_alloc, as all of the following
//   int weigh(bool by_mass, std::vector<double> &sums)            sums [kUpperBins]; LORAPAR_ERROR_SCORE
//   int count(uint32_t upper, std::vector<uint32_t> &counts)      counts [kLowerBins]
//   int keep(const lorapar_cut &cut)
//   int tile_sums(const float *scores, Tiles tiles, double *sums, intptr_t queue)    a function; there is a tile
#pragma once

#include "selection.h"

namespace lorapar {

inline int check_workspace(const lorapar_scores *tensors, int64_t count, const void *workspace, int64_t bytes) {
    const int64_t needed = workspace_of(tensors, count);
    return bytes < needed ? LORAPAR_ERROR_WORKSPACE : check_pointer(static_cast<const double *>(workspace), needed);
}

inline int find_cut(Selection &selection, const std::vector<double> &sums, const Target &target, lorapar_cut &cut) {
    ExactSum before;
    const uint32_t upper = upper_bin(sums.data(), target, before);
    std::vector<uint32_t> counts;
    if (int status = selection.count(upper, counts)) return status;
    cut = cut_of(counts.data(), upper, target, before);
    return LORAPAR_OK;
}

}  // namespace lorapar

int64_t lorapar_selection_workspace(const lorapar_scores *tensors, int64_t count) {
    int64_t total;
    const int status = lorapar::check_scores(tensors, count, false, total);
    return status == LORAPAR_OK ? lorapar::workspace_of(tensors, count) : 0;
}

int lorapar_top_mass(const lorapar_scores *tensors, int64_t count, const double *thetas, int64_t n_thetas,
                     lorapar_cut *cuts, void *workspace, int64_t workspace_bytes, intptr_t queue) {
    using namespace lorapar;
    int64_t total;
    if (int status = check_scores(tensors, count, false, total)) return status;
    if (int status = check_thetas(thetas, n_thetas, cuts)) return status;
    if (int status = check_workspace(tensors, count, workspace, workspace_bytes)) return status;
    return guarded([&]() -> int {
        Selection selection(tensors, count, workspace, queue);
        std::vector<double> sums;
        std::vector<lorapar_cut> found(n_thetas);
        if (int status = selection.weigh(true, sums)) return status;
        for (int64_t k = 0; k < n_thetas; ++k) {
            const Target target = target_of(sums.data(), true, thetas[k]);
            if (target.total.rounded() == 0.0) return LORAPAR_ERROR_ZERO;
            if (int status = find_cut(selection, sums, target, found[k])) return status;
        }
        std::copy(found.begin(), found.end(), cuts);
        return LORAPAR_OK;
    });
}

int lorapar_top_count(const lorapar_scores *tensors, int64_t count, int64_t kept, lorapar_cut *cut, void *workspace,
                      int64_t workspace_bytes, intptr_t queue) {
    using namespace lorapar;
    int64_t total;
    if (int status = check_scores(tensors, count, false, total)) return status;
    if (int status = check_pointer(cut, 1)) return status;
    if (kept < 1 || kept > total) return LORAPAR_ERROR_COUNT;
    if (int status = check_workspace(tensors, count, workspace, workspace_bytes)) return status;
    return guarded([&]() -> int {
        Selection selection(tensors, count, workspace, queue);
        std::vector<double> sums;
        if (int status = selection.weigh(false, sums)) return status;
        const Target target = target_of(sums.data(), false, static_cast<double>(kept));
        if (target.threshold > target.total.rounded()) return LORAPAR_ERROR_COUNT;
        lorapar_cut found;
        if (int status = find_cut(selection, sums, target, found)) return status;
        *cut = found;
        return LORAPAR_OK;
    });
}

int lorapar_keep(const lorapar_scores *tensors, int64_t count, const lorapar_cut *cut, void *workspace,
                 int64_t workspace_bytes, intptr_t queue) {
    using namespace lorapar;
    int64_t total;
    if (int status = check_scores(tensors, count, true, total)) return status;
    if (int status = check_pointer(cut, 1)) return status;
    if (cut->bits >= 0x80000000u) return LORAPAR_ERROR_SCORE;
    if (int status = check_workspace(tensors, count, workspace, workspace_bytes)) return status;
    return guarded([&] { return Selection(tensors, count, workspace, queue).keep(*cut); });
}

int lorapar_tile_sums(const float *scores, int64_t rows, int64_t columns, int64_t tile_rows, int64_t tile_columns,
                      double *sums, intptr_t queue) {
    using namespace lorapar;
    if (tile_rows < 1 || tile_columns < 1 || rows < 0 || columns < 0) return LORAPAR_ERROR_SIZE;
    if (columns > 0 && rows > LORAPAR_MAX_SIZE / columns) return LORAPAR_ERROR_SIZE;
    if (int status = check(rows * columns, scores, sums)) return status;
    if (rows == 0 || columns == 0) return LORAPAR_OK;
    // A tile that is larger than the matrix is the matrix.
    const Tiles tiles{rows, columns, std::min(tile_rows, rows), std::min(tile_columns, columns)};
    return guarded([&] { return tile_sums(scores, tiles, sums, queue); });
}
