// One pass over the bytes of a stored tensor: add them up in blocks of 4 KiB, and look for numbers that are not finite.
// It serves fastlightgen/files/onepass.py, which does the same with torch where this module is missing.
#include <pybind11/pybind11.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace py = pybind11;

namespace {

constexpr int64_t kWords = 512;   // 64-bit words of a block
constexpr int64_t kShare = 1024;  // blocks that are worth a thread of their own: 4 MiB

// Choose instructions when the module is loaded: 256 bits wide where the processor has them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define FLG_WIDEST __attribute__((target_clones("avx2", "default")))
#else
#define FLG_WIDEST
#endif

// `exponent`: the exponent bits of every number in a word. A number is not finite if all of them are set; then adding
// their lowest bit carries into the place of the sign.
FLG_WIDEST bool read(const char* from, uint64_t* sums, int64_t blocks, uint64_t exponent) {
  const uint64_t lowest = exponent & ~(exponent << 1), sign = (exponent << 1) & ~exponent;
  uint64_t seen = 0;
  for (int64_t block = 0; block < blocks; ++block, from += 8 * kWords) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < kWords; ++i) {
      uint64_t word;
      memcpy(&word, from + 8 * i, 8);  // a mapped tensor may begin anywhere
      sum += word;
      seen |= (word & exponent) + lowest;
    }
    sums[block] = sum;
  }
  return !(seen & sign);
}

// Addresses come as integers, so that the module needs no torch headers.
bool read_blocks(uintptr_t from, uintptr_t sums, int64_t blocks, uint64_t exponent, int64_t threads) {
  py::gil_scoped_release others_go_on;
  threads = std::max<int64_t>(1, std::min(threads, blocks / kShare));
  std::atomic<bool> finite{true};
  const auto part = [&](int64_t k) {
    const int64_t first = blocks * k / threads, count = blocks * (k + 1) / threads - first, skip = first * 8 * kWords;
    const auto* source = reinterpret_cast<const char*>(from) + skip;
    auto* own = reinterpret_cast<uint64_t*>(sums) + first;
    if (!read(source, own, count, exponent)) finite = false;
  };
  std::vector<std::thread> crew;
  for (int64_t k = 1; k < threads; ++k) crew.emplace_back(part, k);
  part(0);
  for (auto& one : crew) one.join();
  return finite;
}

}  // namespace

void bind_read_blocks(py::module_& m) { m.def("read_blocks", &read_blocks); }
