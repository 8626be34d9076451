// The scheduler of the shim: one fiber per thread; it switches fibers only at a shuffle, a barrier or the end.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdio.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {
namespace {

constexpr size_t kStack = 96 << 10;
enum Wait { kReady, kWarp, kBlock, kGrid, kDone };

struct Fiber {
  ucontext_t context{};
  dim3 id;
  Wait wait = kReady;
  float lane[2] = {};  // values of this shuffle and of the previous one
  unsigned shuffles = 0;
  std::unique_ptr<char[]> stack{new char[kStack]};
};

std::vector<std::unique_ptr<Fiber>> pool;  // the next launch reuses the stacks
Fiber* current = nullptr;
ucontext_t scheduler;
const std::function<void()>* body = nullptr;
bool backwards = false;
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
#endif
std::vector<Fiber*> team;  // threads of the running block, in order

void to_scheduler(bool last) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake, scheduler_stack, scheduler_stack_size);
#endif
  swapcontext(&current->context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  (*body)();
  current->wait = kDone;
  to_scheduler(true);
}

void resume(Fiber& f) {
  current = &f;
  threadIdx = f.id;
  f.wait = kReady;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, f.stack.get(), kStack);
#endif
  swapcontext(&scheduler, &f.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void pause(Wait why) {
  current->wait = why;
  to_scheduler(false);
}

// Runs the warp [begin, end) until no lane waits at a shuffle; false if only some of its lanes reach a shuffle.
bool run_warp(size_t begin, size_t end) {
  for (;;) {
    for (size_t i = 0; i < end - begin; ++i) {
      Fiber& f = *team[backwards ? end - 1 - i : begin + i];
      if (f.wait == kReady || f.wait == kWarp) resume(f);
    }
    size_t at_shuffle = 0;
    for (size_t i = begin; i < end; ++i) at_shuffle += team[i]->wait == kWarp;
    if (at_shuffle == 0) return true;
    if (at_shuffle != end - begin) return false;
  }
}

// Runs a block until all its threads wait at a grid barrier or are done. Returns false if only some reach a barrier.
bool run_block() {
  const size_t warps = (team.size() + 31) / 32;
  for (;;) {
    for (size_t w = 0; w < warps; ++w) {
      const size_t begin = 32 * (backwards ? warps - 1 - w : w);
      if (!run_warp(begin, std::min(begin + 32, team.size()))) return false;
    }
    for (Fiber* f : team)
      if (f->wait != team[0]->wait) return false;  // some threads skipped the barrier
    if (team[0]->wait != kBlock) return true;
    for (Fiber* f : team) f->wait = kReady;
  }
}

}  // namespace

void sync_block() { pause(kBlock); }
void sync_grid() { pause(kGrid); }

// All lanes store their values before any lane reads. Two shuffles later, after all have read it, a value is replaced.
float shuffle_xor(unsigned mask, float v, int lane_mask) {
  if (mask != 0xffffffffu) abort();
  const unsigned turn = current->shuffles++ % 2;
  current->lane[turn] = v;
  pause(kWarp);
  return team[threadIdx.x ^ static_cast<unsigned>(lane_mask)]->lane[turn];
}

int run(dim3 grid, dim3 threads, bool cooperative, const std::function<void()>& kernel) {
  const size_t size = threads.x, blocks = static_cast<size_t>(grid.x) * grid.y, together = cooperative ? blocks : 1;
  if (size % 32 || threads.y != 1 || threads.z != 1 || grid.z != 1) return cudaErrorInvalidValue;
  while (pool.size() < size * together) pool.emplace_back(new Fiber);
  body = &kernel;
  gridDim = grid;
  blockDim = threads;
  std::vector<bool> started(blocks, false);
  for (size_t left = blocks; left > 0;) {
    for (size_t b = 0; b < blocks; ++b) {
      const size_t n = backwards ? blocks - 1 - b : b;
      blockIdx = dim3(static_cast<unsigned>(n % grid.x), static_cast<unsigned>(n / grid.x));
      team.clear();
      for (size_t i = 0; i < size; ++i) {
        Fiber& f = *pool[(cooperative ? n * size : 0) + i];
        team.push_back(&f);
        if (!started[n]) {
          f.id = dim3(static_cast<unsigned>(i), 0, 0);
          getcontext(&f.context);
          f.context.uc_stack.ss_sp = f.stack.get();
          f.context.uc_stack.ss_size = kStack;
          f.context.uc_link = nullptr;
          makecontext(&f.context, entry, 0);
          f.shuffles = 0;
          f.wait = kReady;
        } else if (f.wait == kGrid) {
          f.wait = kReady;
        }
      }
      started[n] = true;
      if (!run_block() || (team[0]->wait == kGrid && !cooperative)) {
        fprintf(stderr, "simt: block (%u, %u): its threads do not meet at the same barrier\n", blockIdx.x, blockIdx.y);
        return cudaErrorLaunchFailure;
      }
      if (team[0]->wait == kDone) --left;
    }
  }
  return cudaSuccess;
}

}  // namespace simt

// For the tests: the order in which threads and blocks run, and the conversions.
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void simt_backwards(int on) { simt::backwards = on != 0; }
EXPORT void simt_convert(const float* in, float* half, float* bfloat16, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    half[i] = __half2float(__float2half_rn(in[i]));
    bfloat16[i] = __bfloat162float(__float2bfloat16_rn(in[i]));
  }
}
