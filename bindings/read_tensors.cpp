// One pass over the bytes of stored tensors: copy them, add them up in blocks of 4 KiB, and look for numbers that are
// not finite. It serves fastlightgen/files/onepass.py, which does the same with torch where this module is missing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace py = pybind11;

namespace {

constexpr int64_t kWords = 512;  // 64-bit words of a block
constexpr int64_t kPiece = 64;   // blocks that a thread takes at a time: 256 KiB
constexpr int64_t kShare = 4;    // pieces that are worth a thread of their own

// What marks numbers that are not finite, from the exponent bits of every number in a word: all of them are set; then
// adding their lowest bit carries into the place of the sign.
struct Marks {
  uint64_t exponent, lowest, sign;
  explicit Marks(uint64_t bits) : exponent(bits), lowest(bits & ~(bits << 1)), sign((bits << 1) & ~bits) {}
};

// Choose instructions when the module is loaded: 256 bits wide where the processor has them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define FLG_WIDEST __attribute__((target_clones("avx2", "default")))
#else
#define FLG_WIDEST
#endif

FLG_WIDEST bool read(const char* from, uint64_t* sums, int64_t blocks, const Marks& marks) {
  uint64_t seen = 0;
  for (int64_t block = 0; block < blocks; ++block, from += 8 * kWords) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < kWords; ++i) {
      uint64_t word;
      memcpy(&word, from + 8 * i, 8);  // a mapped tensor may begin anywhere
      sum += word;
      seen |= (word & marks.exponent) + marks.lowest;
    }
    sums[block] = sum;
  }
  return !(seen & marks.sign);
}

#if defined(__x86_64__) && defined(__GNUC__)
// The same with a copy, in about the time of the copy alone: one loop, which fetches 2 KiB ahead.
__attribute__((target("avx2"))) bool read_and_copy(const char* from, uint64_t* sums, int64_t blocks, const Marks& marks,
                                                   char* to) {
  const __m256i exponent = _mm256_set1_epi64x(static_cast<int64_t>(marks.exponent));
  const __m256i lowest = _mm256_set1_epi64x(static_cast<int64_t>(marks.lowest));
  __m256i seen = _mm256_setzero_si256();
  for (int64_t block = 0; block < blocks; ++block) {
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < kWords; i += 8, from += 64, to += 64) {
      _mm_prefetch(from + 2048, _MM_HINT_T0);
      const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
      sum = _mm256_add_epi64(sum, _mm256_add_epi64(first, second));
      seen = _mm256_or_si256(seen, _mm256_add_epi64(_mm256_and_si256(first, exponent), lowest));
      seen = _mm256_or_si256(seen, _mm256_add_epi64(_mm256_and_si256(second, exponent), lowest));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), first);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), second);
    }
    uint64_t lanes[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sum);
    sums[block] = lanes[0] + lanes[1] + lanes[2] + lanes[3];
  }
  uint64_t lanes[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), seen);
  return !((lanes[0] | lanes[1] | lanes[2] | lanes[3]) & marks.sign);
}

bool has_one_loop() { return __builtin_cpu_supports("avx2"); }
#else
bool read_and_copy(const char*, uint64_t*, int64_t, const Marks&, char*) { return false; }
bool has_one_loop() { return false; }
#endif

// A tensor. Addresses come as integers, so that the module needs no torch headers.
struct Job {
  const char* from;
  uint64_t* sums;
  int64_t blocks;
  Marks marks;
  char* to;  // null, or memory for a copy
  std::atomic<bool> finite{true};
  Job(uintptr_t from, uintptr_t sums, int64_t blocks, uint64_t exponent, uintptr_t to)
      : from(reinterpret_cast<const char*>(from)),
        sums(reinterpret_cast<uint64_t*>(sums)),
        blocks(blocks),
        marks(exponent),
        to(reinterpret_cast<char*>(to)) {}

  void run(int64_t first) {
    const int64_t skip = first * 8 * kWords, count = std::min(kPiece, blocks - first);
    if (to && has_one_loop()) {
      if (!read_and_copy(from + skip, sums + first, count, marks, to + skip)) finite = false;
      return;
    }
    if (!read(from + skip, sums + first, count, marks)) finite = false;
    if (to) memcpy(to + skip, from + skip, 8 * kWords * count);
  }
};

// Reads several tensors, so that threads start once for all of them.
std::vector<bool> read_tensors(
    const std::vector<std::tuple<uintptr_t, uintptr_t, int64_t, uint64_t, uintptr_t>>& tensors, int64_t threads) {
  py::gil_scoped_release others_go_on;
  std::deque<Job> jobs;
  std::vector<std::pair<Job*, int64_t>> pieces;  // and its first block
  for (const auto& [from, sums, blocks, exponent, to] : tensors) {
    Job& job = jobs.emplace_back(from, sums, blocks, exponent, to);
    for (int64_t first = 0; first < blocks; first += kPiece) pieces.emplace_back(&job, first);
  }
  std::atomic<size_t> next{0};
  const auto work = [&] {  // whoever is free takes the next piece, as a new thread may begin late
    for (size_t k; (k = next++) < pieces.size();) pieces[k].first->run(pieces[k].second);
  };
  std::vector<std::thread> crew;
  threads = std::min<int64_t>(threads, pieces.size() / kShare);
  try {
    for (int64_t k = 1; k < threads; ++k) crew.emplace_back(work);
  } catch (const std::system_error&) {  // no thread is left to this process: the others do the work
  }
  work();
  for (auto& one : crew) one.join();
  std::vector<bool> finite;
  for (const Job& job : jobs) finite.push_back(job.finite);
  return finite;
}

}  // namespace

void bind_read_tensors(py::module_& m) { m.def("read_tensors", &read_tensors); }
