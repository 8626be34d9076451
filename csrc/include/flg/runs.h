// Cuts the rows of a tensor into runs of consecutive rows. All rows of a run share one modulation row, which a block
// loads into registers once; a backward kernel writes one row of partial sums per run.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace flg {

struct Runs {
  int64_t rows_per_mod;  // rows that share a modulation row
  int64_t per_mod;       // runs per modulation row
  int64_t length;        // rows of a run; the first `longer` runs of each modulation row have one more
  int64_t longer;
  int64_t count;  // runs of the tensor

  // The modulation row of a run, its first row, and the row after its last.
  __host__ __device__ int64_t mod(int64_t run) const { return run / per_mod; }
  __host__ __device__ int64_t first(int64_t run) const {
    const int64_t at = run % per_mod;
    return mod(run) * rows_per_mod + at * length + (at < longer ? at : longer);
  }
  __host__ __device__ int64_t last(int64_t run) const { return first(run) + length + (run % per_mod < longer); }
};

// Cuts each modulation row's rows into equally many runs, which differ by one row at most. `workers` blocks run at the
// same time, and a last wave that leaves many of them idle wastes time: of the cuts that fill one to four waves as well
// as they can, the first is taken whose share of busy blocks no later one exceeds by more than 0.01.
inline Runs split_rows(int64_t rows, int64_t rows_per_mod, int64_t workers) {
  const int64_t mods = rows / rows_per_mod, first_wave = (mods + workers - 1) / workers;
  int64_t best = 1;
  double busy = 0;
  for (int64_t waves = first_wave; waves < first_wave + 4; ++waves) {
    const int64_t fill = waves * workers / mods, n = fill < rows_per_mod ? fill : rows_per_mod;
    const int64_t taken = (mods * n + workers - 1) / workers;  // fewer than `waves` if rows_per_mod is small
    const double share = static_cast<double>(mods * n) / static_cast<double>(taken * workers);
    if (share > busy + 0.01) best = n, busy = share;
  }
  return {rows_per_mod, best, rows_per_mod / best, rows_per_mod % best, mods * best};
}

}  // namespace flg
