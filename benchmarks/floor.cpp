// The least that any update of this kind costs: one pass that reads p, g, m, s and writes p, m, s,
// divided among threads as the library's own kernel divides its work.

#include <algorithm>
#include <cstdint>

#include <omp.h>

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define PORTABLE_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PORTABLE_SIMD
#endif

namespace {

PORTABLE_SIMD void pass(int64_t n, float* p, const float* g, float* m, float* s) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    p[i] = 0.5f * (p[i] + g[i]);
    m[i] = 0.5f * (m[i] + g[i]);
    s[i] = 0.5f * (s[i] + g[i]);
  }
}

}  // namespace

extern "C" void floor_pass(int64_t n, float* p, const float* g, float* m, float* s, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t lines = (n + 1023) / 1024, team = omp_get_num_threads();
    const int64_t begin = lines * omp_get_thread_num() / team * 1024;
    const int64_t end = std::min(n, lines * (omp_get_thread_num() + 1) / team * 1024);
    if (begin < end) pass(end - begin, p + begin, g + begin, m + begin, s + begin);
  }
}
