// A CUTLASS 3 matrix product for sm_90a: D[M, N] = epilogue(A[M, K] W[N, K]^T), bfloat16 in and out, float32 sums. TMA
// loads both operands, wgmma multiplies them; two warp groups share a tile, blocks are persistent in clusters of two.
#pragma once

#include <cuda_runtime.h>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <stdint.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "flg/check.h"
#include "flg/launch.h"

namespace flg::gemm {

using Element = cutlass::bfloat16_t;
using RowMajor = cutlass::layout::RowMajor;
using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;  // M, N, K of a thread block
using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;    // two blocks along M share the loads of W
constexpr int kAlignment = 8;                                 // TMA reads 16 bytes: 8 elements
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;

// Epilogue operand: a vector [N], broadcast over the rows of the tile.
template <typename T>
using Row = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, T, float, cute::Stride<cute::_0, cute::_1, int64_t>>;

// Tiles along N that the scheduler visits before it goes on along M. It rounds the number of tiles up to multiples of
// this, and the tiles outside cost as much as others, so take the most that adds 1% or less.
inline int columns_abreast(int64_t m, int64_t n) {
  const auto up = [](int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; };
  const auto tiles = [&](int columns) { return up(up(m, 128) / 128, 2 * columns) * up(up(n, 256) / 256, columns); };
  for (const int columns : {8, 4, 2})
    if (100 * tiles(columns) <= 101 * tiles(1)) return columns;
  return 1;
}

// `Source` is the element type of C, or void if the epilogue reads no C.
template <typename Fusion, typename Source>
struct Matmul {
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Source, RowMajor, kAlignment, Element, RowMajor,
      kAlignment, cutlass::epilogue::TmaWarpSpecializedCooperative, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAlignment, Element,
      cutlass::layout::ColumnMajor, kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  // Enqueues the product on `stream`; `fusion` holds the epilogue's arguments. Returns a cudaError, 0 for success.
  static int run(const void* a, const void* w, const Source* c, void* d, int64_t m, int64_t n, int64_t k,
                 typename Epilogue::FusionCallbacks::Arguments fusion, int device, void* stream) {
    int64_t sms = 0;
    FLG_TRY(count_sms(device, sms));
    // Strides of a dense row-major matrix; the third one is for a batch, of which there is one.
    const auto rows = [](int64_t width) { return cute::make_stride(width, cute::_1{}, int64_t{0}); };
    typename Device::Arguments args{cutlass::gemm::GemmUniversalMode::kGemm,
                                    {static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), 1},
                                    {static_cast<const Element*>(a), rows(k), static_cast<const Element*>(w), rows(k)},
                                    {fusion, c, rows(n), static_cast<Element*>(d), rows(n)}};
    // Tiles go down the rows of A, `columns` tiles of W abreast: these stay in the L2 cache, so W is read from memory
    // once.
    args.scheduler.raster_order = decltype(args.scheduler.raster_order)::AlongM;
    args.scheduler.max_swizzle_size = columns_abreast(m, n);
    args.hw_info.device_id = device;
    args.hw_info.sm_count = static_cast<int>(sms);
    // Only split-K needs a workspace, and this scheduler does not split K.
    if (Device::get_workspace_size(args) != 0 || Device::can_implement(args) != cutlass::Status::kSuccess)
      return static_cast<int>(cudaErrorInvalidValue);
    // CUTLASS takes the last error of the CUDA runtime for its own. An older one was returned by the call that met it.
    cudaGetLastError();
    Device matmul;
    if (matmul(args, nullptr, static_cast<cudaStream_t>(stream)) == cutlass::Status::kSuccess) return 0;
    const cudaError_t error = cudaGetLastError();
    return static_cast<int>(error == cudaSuccess ? cudaErrorLaunchFailure : error);
  }
};

// Whether CUTLASS accepts these sizes: 32-bit, and rows of 16-byte multiples for TMA.
inline bool fits(int64_t m, int64_t n, int64_t k) {
  constexpr int64_t most = INT32_MAX;
  return m >= 0 && n > 0 && k > 0 && n % kAlignment == 0 && k % kAlignment == 0 && m <= most && n <= most && k <= most;
}

}  // namespace flg::gemm
