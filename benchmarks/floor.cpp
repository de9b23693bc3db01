// The least that any update costs: one pass over the same memory, with hardly any arithmetic.
//
// Streams are worked on block by block, as the library's own kernel does, and divided among threads
// in the same way.

#include <algorithm>
#include <cstdint>

#include <omp.h>

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define PORTABLE_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PORTABLE_SIMD
#endif

namespace {

enum Access : int64_t { kRead, kWrite, kUpdate };  // floor.py

struct Stream {
  char* data;
  int64_t itemsize, access;
};

constexpr int64_t kBlock = 1024;

PORTABLE_SIMD uint64_t read(int64_t words, const uint64_t* x) {
  uint64_t all = 0;
#pragma omp simd reduction(^ : all)
  for (int64_t i = 0; i < words; ++i) all ^= x[i];
  return all;
}

PORTABLE_SIMD void write(int64_t words, uint64_t* x) {
#pragma omp simd
  for (int64_t i = 0; i < words; ++i) x[i] = 0;
}

PORTABLE_SIMD void update(int64_t words, uint64_t* x) {  // flips lowest bits: numbers stay ordinary
#pragma omp simd
  for (int64_t i = 0; i < words; ++i) x[i] ^= 1;
}

}  // namespace

// `n` elements, a multiple of 1024. Returns a sum of what was read, so that nothing is left out.
extern "C" uint64_t floor_pass(int64_t n, const Stream* streams, int64_t count, int threads) {
  uint64_t all = 0;
#pragma omp parallel num_threads(threads) reduction(^ : all)
  {
    const int64_t blocks = n / kBlock, team = omp_get_num_threads();
    const int64_t begin = blocks * omp_get_thread_num() / team;
    const int64_t end = blocks * (omp_get_thread_num() + 1) / team;
    for (int64_t block = begin; block < end; ++block)
      for (const Stream* each = streams; each < streams + count; ++each) {
        const int64_t bytes = kBlock * each->itemsize;
        uint64_t* x = reinterpret_cast<uint64_t*>(each->data + block * bytes);
        if (each->access == kRead) all ^= read(bytes / 8, x);
        else if (each->access == kWrite) write(bytes / 8, x);
        else update(bytes / 8, x);
      }
  }
  return all;
}
