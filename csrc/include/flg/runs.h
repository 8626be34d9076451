// Cuts the rows of a tensor into runs of consecutive rows. All rows of a run share one modulation row, which a block
// loads into registers once; a backward kernel writes one row of partial sums per run.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace flg {

struct Runs {
  int64_t rows_per_mod;  // rows that share a modulation row
  int64_t per_mod;       // runs per modulation row
  int64_t length;        // rows of a run; the last run of a modulation row may be shorter
  int64_t count;         // runs of the tensor

  // The modulation row of a run, its first row, and the row after its last.
  __host__ __device__ int64_t mod(int64_t run) const { return run / per_mod; }
  __host__ __device__ int64_t first(int64_t run) const { return mod(run) * rows_per_mod + run % per_mod * length; }
  __host__ __device__ int64_t last(int64_t run) const {
    const int64_t end = (mod(run) + 1) * rows_per_mod, stop = first(run) + length;
    return stop < end ? stop : end;
  }
};

// The cut with the fewest runs per modulation row among those that keep `workers` blocks equally busy: more runs must
// raise the busy share by over 0.01 to be taken.
inline Runs split_rows(int64_t rows, int64_t rows_per_mod, int64_t workers) {
  const int64_t mods = rows / rows_per_mod, most = (4 * workers + mods - 1) / mods;
  int64_t best = 1;
  double busy = 0;
  for (int64_t n = 1; n <= most && n <= rows_per_mod; ++n) {
    const int64_t waves = (mods * n + workers - 1) / workers;
    const double share = static_cast<double>(mods * n) / static_cast<double>(waves * workers);
    if (share > busy + 0.01) best = n, busy = share;
  }
  const int64_t length = (rows_per_mod + best - 1) / best;
  const int64_t per_mod = (rows_per_mod + length - 1) / length;  // rounding up the length may leave fewer
  return {rows_per_mod, per_mod, length, mods * per_mod};
}

}  // namespace flg
