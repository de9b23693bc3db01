// The CPU kernels: fused AdaBelief update, sum in rank order, reproducible squared norm.
//
// Plain C++ without torch or Python headers: compiled in two seconds, called through ctypes, and
// one binary serves every torch version. Each formula is written once, as a loop that the compiler
// vectorizes, so that vector body and scalar tail are the same arithmetic. Every operation must
// round on its own to equal belief_dist/rule.py and state_formats.py bit for bit: build with
// -ffp-contract=off and without -ffast-math.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <omp.h>

// One binary for old and new processors: the loader picks the widest version that runs here.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define PORTABLE 1
#define PORTABLE_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PORTABLE 0
#define PORTABLE_SIMD
#endif
#define INLINE inline __attribute__((always_inline))

namespace {

// cpp.py: _CODES
enum Type : int { kFloat32, kBFloat16, kFloat16, kFloat64, kUInt8, kInt16, kInt8 };
enum Direction : int { kAdaptive, kMomentum, kNone };  // rule.py: Direction

// What is stored in fewer bits is decoded into, and encoded from, buffers of this many elements:
// a third of an L1 cache of 32 KiB, so that the streams from memory keep their place in it.
constexpr int64_t kBlock = 512;
constexpr int kExponentBlock = 256;  // operands.py: BLOCK
constexpr int kMBinades = 7, kSBinades = 31;  // state_formats.py: _M_BINADES, _S_BINADES
// What is added at most to the bits of a block's largest number: state_formats.py, _M_ROOM and _S_ROOM.
constexpr int kMRoom = (1 << 16) + (0xffff << 3), kSRoom = 0xffff << 4;
// Below this, waking other threads costs more than it gains.
constexpr int64_t kSerial = 1 << 15;

template <class To, class From>
INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// Runs body(begin, end) over [0, n) on torch's own threads (libgomp is shared with it).
template <class Body>
void in_parallel(int64_t n, int threads, Body body) {
  if (threads <= 1 || n < kSerial) return body(int64_t{0}, n);
#pragma omp parallel num_threads(threads)
  {
    const int64_t blocks = (n + kBlock - 1) / kBlock, team = omp_get_num_threads();
    const int64_t begin = blocks * omp_get_thread_num() / team * kBlock;
    const int64_t end = std::min(n, blocks * (omp_get_thread_num() + 1) / team * kBlock);
    if (begin < end) body(begin, end);
  }
}

// ---------------------------------------------------------------- 16-bit types

INLINE float from_bfloat16(uint16_t half) { return bit_cast<float>(uint32_t{half} << 16); }

INLINE uint16_t to_bfloat16(float value) {  // to nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return value != value ? uint16_t{0x7fc0} : static_cast<uint16_t>(rounded);
}

// The two conversions below are those of Fabian Giesen (public domain, "half_to_float_fast" and
// "float_to_half_fast3_rtne"), with selections instead of branches.
INLINE float from_float16(uint16_t half) {
  constexpr uint32_t kExponent = 0x7c00 << 13;
  const uint32_t sign = (uint32_t{half} & 0x8000) << 16;
  const uint32_t shifted = (uint32_t{half} & 0x7fff) << 13;
  const uint32_t exponent = shifted & kExponent;
  const uint32_t normal = shifted + ((127 - 15) << 23);
  const uint32_t special = normal + ((128 - 16) << 23);  // infinity and NaN
  const float magic = bit_cast<float>(uint32_t{113 << 23});
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(normal + (1 << 23)) - magic);
  const uint32_t bits = exponent == kExponent ? special : exponent == 0 ? subnormal : normal;
  return bit_cast<float>(bits | sign);
}

INLINE uint16_t to_float16(float value) {  // to nearest, ties to even
  const uint32_t all = bit_cast<uint32_t>(value), sign = all & 0x80000000u, bits = all ^ sign;
  const uint32_t special = bits > 0x7f800000u ? 0x7e00 : 0x7c00;
  // Adding 0.5 leaves a subnormal's rounded mantissa in the lowest bits.
  const uint32_t half = 126 << 23;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(bits) + bit_cast<float>(half)) - half;
  const uint32_t normal = (bits - ((127 - 15) << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  const uint32_t result =
      bits >= ((127 + 16) << 23) ? special : bits < (113 << 23) ? subnormal : normal;
  return static_cast<uint16_t>(result | (sign >> 16));
}

PORTABLE_SIMD void widen_bfloat16(int64_t n, const uint16_t* from, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = from_bfloat16(from[i]);
}

PORTABLE_SIMD void widen_float16(int64_t n, const uint16_t* from, float* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = from_float16(from[i]);
}

PORTABLE_SIMD void narrow_bfloat16(int64_t n, const float* from, uint16_t* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = to_bfloat16(from[i]);
}

PORTABLE_SIMD void narrow_float16(int64_t n, const float* from, uint16_t* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = to_float16(from[i]);
}

// Memory of a type that is known at run time only.
struct Array {
  void* data;
  int type;

  template <class T>
  T* at(int64_t i) const { return static_cast<T*>(data) + i; }

  // Returns the n values from number i on: in place, or widened into `buffer`.
  template <class T>
  T* read(int64_t i, int64_t n, float* buffer) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (type == kBFloat16) return widen_bfloat16(n, at<uint16_t>(i), buffer), buffer;
      if (type == kFloat16) return widen_float16(n, at<uint16_t>(i), buffer), buffer;
    }
    return at<T>(i);
  }

  // Rounds n values into the place from number i on; other types are updated in place.
  template <class T>
  void write(int64_t i, int64_t n, const T* values) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (type == kBFloat16) narrow_bfloat16(n, values, at<uint16_t>(i));
      if (type == kFloat16) narrow_float16(n, values, at<uint16_t>(i));
    }
  }
};

// ---------------------------------------------------------------- stored states and masters

// state_formats.py defines every bit. All of it is arithmetic on 32-bit lanes, so that it vectorizes.

INLINE uint32_t bits_of(float x) { return x != x ? 0x7fc00000u : bit_cast<uint32_t>(x); }

INLINE uint32_t lowbias32(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352d;
  x = (x ^ (x >> 15)) * 0x846ca68b;
  return x ^ (x >> 16);
}

// The noise of element `first + i` is lowbias32(noise_start(...) + i), as long as no carry leaves
// the lower 32 bits of its number.
INLINE uint32_t noise_start(uint32_t key, uint32_t step, uint64_t first) {
  return static_cast<uint32_t>(first) + static_cast<uint32_t>(first >> 32) * 0x9e3779b9 +
         lowbias32(key ^ lowbias32(step));
}

// The lower half of the noise rounds m, the upper one s and the largest s.
INLINE uint32_t lower(uint32_t noise) { return noise & 0xffff; }
INLINE uint32_t upper(uint32_t noise) { return noise >> 16; }
// A further round of the hash rounds masters of 24 bits.
INLINE uint32_t master_noise(uint32_t noise) { return (noise ^ (noise >> 15)) * 0x846ca68b >> 24; }

INLINE uint16_t round_to_bfloat16(float x, uint32_t noise16) {
  return static_cast<uint16_t>((bits_of(x) + noise16) >> 16);
}

INLINE float decode_m(uint8_t code, uint32_t exponent) {
  const uint32_t moved = ((code & 127u) + (exponent << 4)) << 19;
  const float magnitude = bit_cast<float>(moved) - bit_cast<float>(exponent << 23);
  return bit_cast<float>(bit_cast<uint32_t>(magnitude) | (code & 128u) << 24);
}

INLINE uint8_t encode_m(uint32_t bits, uint32_t exponent, uint32_t noise16) {
  const float moved = bit_cast<float>(bits & 0x7fffffff) + bit_cast<float>(exponent << 23);
  const uint32_t code = ((bit_cast<uint32_t>(moved) + (noise16 << 3)) >> 19) - (exponent << 4);
  return static_cast<uint8_t>(code | (bits >> 24 & 128));
}

INLINE float decode_s(uint8_t code, uint32_t exponent) {
  return bit_cast<float>((code + (exponent << 3)) << 20);
}

INLINE uint8_t encode_s(uint32_t bits, uint32_t exponent, uint32_t noise16) {
  const uint32_t rounded = (bits + (noise16 << 4)) >> 20;
  const int code = static_cast<int>(rounded) - static_cast<int>(exponent << 3);
  return static_cast<uint8_t>(std::max(code, 0));
}

// Returns the exponent that the largest of n numbers may come to when `room` is added to its bits,
// `below` less but not below `least`. What NaNs there are become one NaN.
INLINE uint32_t block_exponent(int n, float* x, int room, int below, int least) {
  int largest = 0;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < n; ++i) largest = std::max(largest, bit_cast<int>(x[i]) & 0x7fffffff);
  if (largest > 0x7f800000)
    for (int i = 0; i < n; ++i) x[i] = bit_cast<float>(bits_of(x[i]));
  largest = std::min(largest, 0x7fc00000);
  return static_cast<uint32_t>(std::max(((largest + room) >> 23) - below, least));
}

template <bool kSigned>
INLINE void decode(int n, const uint8_t* codes, const uint8_t* exponents, float* to) {
  for (int i = 0; i < n; i += kExponentBlock) {
    const uint32_t exponent = *exponents++;
    const int stop = std::min(n, i + kExponentBlock);
#pragma omp simd
    for (int j = i; j < stop; ++j)
      to[j] = kSigned ? decode_m(codes[j], exponent) : decode_s(codes[j], exponent);
  }
}

// The functions below go over `int`: lanes with an index of 64 bits cost as much as two others.
PORTABLE_SIMD void decode_signed(int n, const uint8_t* codes, const uint8_t* exponents, float* to) {
  decode<true>(n, codes, exponents, to);
}

PORTABLE_SIMD void decode_positive(int n, const uint8_t* codes, const uint8_t* exponents,
                                   float* to) {
  decode<false>(n, codes, exponents, to);
}

// A state as it is stored.
struct State {
  Array numbers;
  uint8_t* exponents;  // of 8-bit numbers

  uint8_t* codes(int64_t i) const { return numbers.at<uint8_t>(i); }
  uint8_t* exponent(int64_t i) const { return exponents + i / kExponentBlock; }

  // As Array::read; 8-bit numbers are decoded by `decode`.
  template <class T, class Decode>
  T* read(int64_t i, int n, Decode decode, float* buffer) const {
    if constexpr (sizeof(T) == sizeof(float))
      if (numbers.type == kUInt8) return decode(n, codes(i), exponent(i), buffer), buffer;
    return numbers.read<T>(i, n, buffer);
  }
};

struct States {
  State m, s, largest;  // largest.numbers.data is null without amsgrad
};

template <bool kAmsgrad>
INLINE void encode_bfloat16(const States& to, int64_t first, int n, const float* m, const float* s,
                            const float* largest, uint32_t noise) {
  uint16_t *to_m = to.m.numbers.at<uint16_t>(first), *to_s = to.s.numbers.at<uint16_t>(first),
           *to_largest = to.largest.numbers.at<uint16_t>(first);
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const uint32_t random = lowbias32(noise + static_cast<uint32_t>(i));
    to_m[i] = round_to_bfloat16(m[i], lower(random));
    to_s[i] = round_to_bfloat16(s[i], upper(random));
    if constexpr (kAmsgrad) to_largest[i] = round_to_bfloat16(largest[i], upper(random));
  }
}

// Encodes one block of 256 numbers, or what is left of it.
template <bool kAmsgrad>
INLINE void encode_uint8(const States& to, int64_t first, int n, float* m, float* s,
                         float* largest, uint32_t noise) {
  uint8_t *to_m = to.m.codes(first), *to_s = to.s.codes(first), *to_largest = nullptr;
  const uint32_t m_exponent = block_exponent(n, m, kMRoom, kMBinades, 1);
  const uint32_t s_exponent = block_exponent(n, s, kSRoom, kSBinades, 0);
  uint32_t largest_exponent = 0;
  *to.m.exponent(first) = static_cast<uint8_t>(m_exponent);
  *to.s.exponent(first) = static_cast<uint8_t>(s_exponent);
  if constexpr (kAmsgrad) {
    to_largest = to.largest.codes(first);
    largest_exponent = block_exponent(n, largest, kSRoom, kSBinades, 0);
    *to.largest.exponent(first) = static_cast<uint8_t>(largest_exponent);
  }
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const uint32_t random = lowbias32(noise + static_cast<uint32_t>(i));
    to_m[i] = encode_m(bit_cast<uint32_t>(m[i]), m_exponent, lower(random));
    to_s[i] = encode_s(bit_cast<uint32_t>(s[i]), s_exponent, upper(random));
    if constexpr (kAmsgrad)
      to_largest[i] = encode_s(bit_cast<uint32_t>(largest[i]), largest_exponent, upper(random));
  }
}

template <bool kAmsgrad>
INLINE void encode_states(const States& to, int64_t first, int n, float* m, float* s,
                          float* largest, uint32_t noise) {
  if (to.m.numbers.type == kBFloat16)
    return encode_bfloat16<kAmsgrad>(to, first, n, m, s, largest, noise);
  for (int i = 0; i < n; i += kExponentBlock)
    encode_uint8<kAmsgrad>(to, first + i, std::min(kExponentBlock, n - i), m + i, s + i,
                           kAmsgrad ? largest + i : nullptr, noise + static_cast<uint32_t>(i));
}

// Stores n numbers of each state from number `first` on, rounded stochastically.
PORTABLE_SIMD void encode(const States& to, int64_t first, int n, float* m, float* s,
                          float* largest, uint32_t noise) {
  if (largest) encode_states<true>(to, first, n, m, s, largest, noise);
  else encode_states<false>(to, first, n, m, s, nullptr, noise);
}

// Remainders of 16 bits are the lower half of a master, those of 8 bits its upper byte.
template <class Remainder>
INLINE void join(int n, const uint16_t* param, const Remainder* remainder, float* to) {
  constexpr int kUnit = sizeof(Remainder) == 1 ? 1 << 8 : 1;
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const uint32_t upper = uint32_t{param[i]} << 16;
    const float joined = bit_cast<float>(upper + static_cast<uint32_t>(remainder[i] * kUnit));
    to[i] = joined != joined ? bit_cast<float>(upper) : joined;  // halves that no master has
  }
}

PORTABLE_SIMD void join_master(int n, const uint16_t* param, const int16_t* remainder, float* to) {
  join(n, param, remainder, to);
}

PORTABLE_SIMD void join_master(int n, const uint16_t* param, const int8_t* remainder, float* to) {
  join(n, param, remainder, to);
}

PORTABLE_SIMD void split_master(int n, const float* from, uint16_t* param, int16_t* remainder) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(from[i]);
    param[i] = static_cast<uint16_t>((bits + 0x8000) >> 16);
    remainder[i] = static_cast<int16_t>(bits);
  }
}

// Rounds stochastically: of the lowest byte, only the carry is kept.
PORTABLE_SIMD void split_master(int n, const float* from, uint16_t* param, int8_t* remainder,
                                uint32_t noise) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const uint32_t random = lowbias32(noise + static_cast<uint32_t>(i));
    const uint32_t bits = bits_of(from[i]) + master_noise(random);
    param[i] = static_cast<uint16_t>((bits + 0x8000) >> 16);
    remainder[i] = static_cast<int8_t>(bits >> 8);
  }
}

// A parameter: an array, or the two parts of its float32 master.
struct Param {
  Array numbers, remainder;  // remainder.data is null for an array

  template <class T>
  T* read(int64_t i, int n, float* buffer) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      const uint16_t* upper = numbers.at<uint16_t>(i);
      if (remainder.data && remainder.type == kInt8)
        return join_master(n, upper, remainder.at<int8_t>(i), buffer), buffer;
      if (remainder.data) return join_master(n, upper, remainder.at<int16_t>(i), buffer), buffer;
    }
    return numbers.read<T>(i, n, buffer);
  }

  template <class T>
  void write(int64_t i, int n, const T* values, uint32_t noise) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      uint16_t* upper = numbers.at<uint16_t>(i);
      if (remainder.data && remainder.type == kInt8)
        return split_master(n, values, upper, remainder.at<int8_t>(i), noise);
      if (remainder.data) return split_master(n, values, upper, remainder.at<int16_t>(i));
    }
    numbers.write(i, n, values);
  }
};

// ---------------------------------------------------------------- update

constexpr int kScalars = 12;

template <class T>
struct Scalars {  // cpp.py passes them in this order, as doubles
  T grad_scale, coupled_decay, weight1, beta2, weight2, eps, decay, step_size, denom_scale,
      ema_weight;
  int direction;
  uint32_t step;

  explicit Scalars(const double* from)
      : grad_scale(from[0]), coupled_decay(from[1]), weight1(from[2]), beta2(from[3]),
        weight2(from[4]), eps(from[5]), decay(from[6]), step_size(from[7]), denom_scale(from[8]),
        ema_weight(from[9]), direction(static_cast<int>(from[10])),
        step(static_cast<uint32_t>(static_cast<int64_t>(from[11]))) {}
};

// rule.update_reference_, operation by operation.
template <bool kCoupled, bool kAmsgrad, int kDirection, class T>
INLINE void update_loop(int64_t n, T* p, const T* g, T* m, T* s, T* largest, const Scalars<T> k) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T grad = g[i] * k.grad_scale;
    if constexpr (kCoupled) grad = grad + p[i] * k.coupled_decay;

    const T avg = m[i] + (grad - m[i]) * k.weight1;
    m[i] = avg;

    const T surprise = grad - avg;
    T second = s[i] * k.beta2 + (surprise * k.weight2) * surprise + k.eps;
    s[i] = second;
    if constexpr (kAmsgrad) {  // as torch.maximum: NaN wins on either side
      const T before = largest[i];
      second = before != before || before > second ? before : second;
      largest[i] = second;
    }

    const T param = p[i] * k.decay;
    if constexpr (kDirection == kAdaptive)
      p[i] = param - avg / (std::sqrt(second) * k.denom_scale + k.eps) * k.step_size;
    else if constexpr (kDirection == kMomentum)
      p[i] = param - avg * k.step_size;
    else
      p[i] = param;
  }
}

template <bool kCoupled, bool kAmsgrad, class T, class... Rest>
INLINE void choose_direction(int direction, Rest... rest) {
  switch (direction) {
    case kAdaptive: return update_loop<kCoupled, kAmsgrad, kAdaptive, T>(rest...);
    case kMomentum: return update_loop<kCoupled, kAmsgrad, kMomentum, T>(rest...);
    default: return update_loop<kCoupled, kAmsgrad, kNone, T>(rest...);
  }
}

template <class T>
INLINE void choose_loop(int64_t n, T* p, const T* g, T* m, T* s, T* largest, const Scalars<T>& k,
                        int direction) {
  const bool coupled = k.coupled_decay != 0;
  if (largest && coupled) choose_direction<true, true, T>(direction, n, p, g, m, s, largest, k);
  else if (largest) choose_direction<false, true, T>(direction, n, p, g, m, s, largest, k);
  else if (coupled) choose_direction<true, false, T>(direction, n, p, g, m, s, largest, k);
  else choose_direction<false, false, T>(direction, n, p, g, m, s, largest, k);
}

PORTABLE_SIMD void update(int64_t n, float* p, const float* g, float* m, float* s, float* largest,
                          const Scalars<float>& k, int direction) {
  choose_loop(n, p, g, m, s, largest, k, direction);
}

PORTABLE_SIMD void update(int64_t n, double* p, const double* g, double* m, double* s,
                          double* largest, const Scalars<double>& k, int direction) {
  choose_loop(n, p, g, m, s, largest, k, direction);
}

// What the rule does to an average: of a block whose new parameters are still in cache.
template <class T>
INLINE void average_loop(int n, const T* p, T* average, T weight) {
#pragma omp simd
  for (int i = 0; i < n; ++i) average[i] = average[i] + (p[i] - average[i]) * weight;
}

PORTABLE_SIMD void update_average(int n, const float* p, float* average, float weight) {
  average_loop(n, p, average, weight);
}

PORTABLE_SIMD void update_average(int n, const double* p, double* average, double weight) {
  average_loop(n, p, average, weight);
}

// Likewise, of one that is stored as bfloat16 and rounded stochastically.
PORTABLE_SIMD void update_average(int n, const float* p, uint16_t* average, float weight,
                                  uint32_t noise) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const float before = from_bfloat16(average[i]);
    const uint32_t random = lowbias32(noise + static_cast<uint32_t>(i));
    average[i] = round_to_bfloat16(before + (p[i] - before) * weight, lower(random));
  }
}

// state_formats.word_sums: sums of words, which wrap around.
PORTABLE_SIMD uint32_t word_sum(int64_t n, const uint32_t* words) {
  uint32_t total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += words[i];
  return total;
}

// Of narrow ones: of each 64 bits those of even and of odd places, in fields of twice the width,
// which kBlock of them cannot fill.
template <class Word>
INLINE uint32_t narrow_sum(int64_t n, const Word* words) {
  constexpr int kBits = 8 * sizeof(Word), kPer = 64 / kBits;
  constexpr uint64_t kEven = ~uint64_t{0} / ((uint64_t{1} << kBits) + 1);
  const int64_t whole = n / kPer;
  uint64_t fields = 0;
#pragma omp simd reduction(+ : fields)
  for (int64_t i = 0; i < whole; ++i) {
    uint64_t eight;
    std::memcpy(&eight, words + i * kPer, sizeof(eight));
    fields += (eight & kEven) + (eight >> kBits & kEven);
  }
  uint32_t total = 0;
  for (int shift = 0; shift < 64; shift += 2 * kBits)
    total += static_cast<uint32_t>(fields >> shift & ((uint64_t{1} << 2 * kBits) - 1));
  for (int64_t i = whole * kPer; i < n; ++i) total += words[i];
  return total;
}

PORTABLE_SIMD uint32_t word_sum(int64_t n, const uint16_t* words) { return narrow_sum(n, words); }

PORTABLE_SIMD uint32_t word_sum(int64_t n, const uint8_t* words) { return narrow_sum(n, words); }

uint32_t word_sum(const Array& from, int64_t i, int64_t n) {
  switch (from.type) {
    case kFloat64: return word_sum(2 * n, from.at<uint32_t>(2 * i));
    case kFloat32: return word_sum(n, from.at<uint32_t>(i));
    case kUInt8:
    case kInt8: return word_sum(n, from.at<uint8_t>(i));
    default: return word_sum(n, from.at<uint16_t>(i));
  }
}

constexpr int kWatched = 5;  // operands.py: WATCHED

struct WordSums {  // of what is read, and of what is written
  uint32_t of[2 * kWatched] = {};

  void add(int which, const Param& param, const States& states, const Array& average, int64_t i,
           int64_t n) {
    uint32_t* to = of + which * kWatched;
    to[0] += word_sum(param.remainder.data ? param.remainder : param.numbers, i, n);
    const State* all[] = {&states.m, &states.s, &states.largest};
    if (average.data) to[4] += word_sum(average, i, n);
    for (int j = 0; j < 3; ++j) {
      if (!all[j]->numbers.data) continue;
      to[j + 1] += word_sum(all[j]->numbers, i, n);
      if (all[j]->exponents)
        to[j + 1] += word_sum((n + kExponentBlock - 1) / kExponentBlock, all[j]->exponent(i));
    }
  }

  void add_to(uint32_t* sums) const {
    for (int j = 0; j < 2 * kWatched; ++j) {
#pragma omp atomic
      sums[j] += of[j];
    }
  }
};

// One tensor's part in a call: a row of the table that cpp.py makes, in the order of
// operands.Operands.
struct Segment {
  int64_t numel;
  void *param, *grad, *m, *s, *largest, *out;  // the last two may be null, in all segments
  void *remainder, *average;                   // likewise
  uint8_t *m_exponents, *s_exponents, *largest_exponents;
  int64_t key, first;
  uint32_t* sums;   // null, or two times kWatched
  int64_t scalars;  // which of the call's are its own

  // How much of the work this is: whole blocks, and so one at least, since a call costs time, too.
  int64_t extent() const { return (numel + kExponentBlock - 1) / kExponentBlock * kExponentBlock; }
};
static_assert(sizeof(Segment) == 16 * sizeof(int64_t), "cpp.py passes 64 bits each");

struct Types {  // of all segments
  int param, grad, state, out, remainder, average;
};

// Has the memory of n values come into cache while others are computed.
INLINE void prefetch(const Array& from, int64_t i, int64_t n) {
  const int64_t size = from.type == kFloat64 ? 8 : from.type == kFloat32 ? 4 : 2;
  const char* data = static_cast<const char*>(from.data) + i * size;
  for (int64_t j = 0; j < n * size; j += 64) __builtin_prefetch(data + j, 1);
}

// Updates elements [begin, end) of a segment; `begin` is a multiple of kExponentBlock.
template <class T>
void update_part(const Segment& part, const Types& types, int64_t begin, int64_t end,
                 const Scalars<T>& k) {
  const Param param{{part.param, types.param}, {part.remainder, types.remainder}};
  const Array grad{part.grad, types.grad}, out{part.out, types.out},
      average{part.average, types.average};
  const States states{{{part.m, types.state}, part.m_exponents},
                      {{part.s, types.state}, part.s_exponents},
                      {{part.largest, types.state}, part.largest_exponents}};
  float buffers[5][kBlock];
  WordSums words;
  int n;
  for (int64_t i = begin; i < end; i += n) {
    const uint64_t element = static_cast<uint64_t>(part.first + i);
    const int64_t until_carry = (int64_t{1} << 32) - static_cast<uint32_t>(element);
    n = static_cast<int>(std::min({kBlock, end - i, until_carry}));  // see noise_start
    if (part.sums) words.add(0, param, states, average, i, n);
    if (average.data) prefetch(average, i, n);
    T* p = param.read<T>(i, n, buffers[0]);
    T* m = states.m.read<T>(i, n, decode_signed, buffers[1]);
    T* s = states.s.read<T>(i, n, decode_positive, buffers[2]);
    T* largest = part.largest ? states.largest.read<T>(i, n, decode_positive, buffers[3]) : nullptr;
    update(n, p, grad.read<T>(i, n, buffers[4]), m, s, largest, k, k.direction);
    const uint32_t noise = noise_start(static_cast<uint32_t>(part.key), k.step, element);
    param.write(i, n, p, noise);
    out.write(i, n, p);
    if constexpr (sizeof(T) == sizeof(float))
      if (types.state != kFloat32) encode(states, i, n, m, s, largest, noise);
    if (average.data) {
      if (types.average == kBFloat16) {
        if constexpr (sizeof(T) == sizeof(float))
          update_average(n, p, average.at<uint16_t>(i), k.ema_weight, noise);
      } else {
        update_average(n, p, average.at<T>(i), k.ema_weight);
      }
    }
    if (part.sums) words.add(1, param, states, average, i, n);
  }
  if (part.sums) words.add_to(part.sums);
}

// All segments lie one after the other, in whole blocks, and threads share this line evenly.
template <class T>
void update_all(int64_t count, const Segment* segments, const Types& types, const double* scalars,
                int threads) {
  int64_t total = 0;
  for (int64_t j = 0; j < count; ++j) total += segments[j].extent();
  in_parallel(total, threads, [&](int64_t begin, int64_t end) {
    for (int64_t j = 0, start = 0; j < count && start < end; start += segments[j++].extent()) {
      const int64_t from = std::max(begin - start, int64_t{0});
      const int64_t to = std::min(end - start, segments[j].numel);
      const Scalars<T> k(scalars + kScalars * segments[j].scalars);
      if (from < to) update_part(segments[j], types, from, to, k);
    }
  });
}

// ---------------------------------------------------------------- squared norm

// See norm.py, where the bins are explained.
constexpr int kBinBits = 32, kLowBin = -10, kHighBin = 8, kBins = kHighBin + 2 - kLowBin;
constexpr int64_t kMask = (int64_t{1} << kBinBits) - 1;
constexpr int64_t kChunk = 4096;

struct Bins {
  int64_t words[2 * kBins + 1];  // (low, high) of every bin, then the number of non-finite values

  void add(int bin, int64_t count) {
    words[2 * (bin - kLowBin)] += count & kMask;
    words[2 * (bin - kLowBin) + 1] += count >> kBinBits;
  }
};

template <class T> struct Float;
template <> struct Float<float> {
  using Bits = int32_t;
  static constexpr Bits kTooLarge = 0x7f800000;  // infinity
};
template <> struct Float<double> {
  using Bits = int64_t;
  static constexpr Bits kTooLarge = int64_t{1023 + 144} << 52;  // its square is 2^288
};

template <class T>
INLINE typename Float<T>::Bits magnitude(T value) {  // ordered as |value|, NaN above infinity
  using Bits = typename Float<T>::Bits;
  return bit_cast<Bits>(value) & static_cast<Bits>(~(uint64_t{1} << (8 * sizeof(T) - 1)));
}

// Splits n squares over `kParts` bins from `top` down.
template <int kParts, class T>
INLINE void split(int64_t n, const T* x, int top, Bins& bins) {
  double unit[4], rounder[4];
  for (int j = 0; j < 4; ++j) {
    unit[j] = std::ldexp(1.0, kBinBits * std::max(top - j, kLowBin));
    rounder[j] = 1.5 * 4503599627370496.0 * unit[j];  // adding it rounds to a multiple of the unit
  }
  const double r0 = rounder[0], r1 = rounder[1], r2 = rounder[2], r3 = rounder[3];
  double sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;  // exact: at most kChunk multiples of the unit
#pragma omp simd reduction(+ : sum0, sum1, sum2, sum3)
  for (int64_t i = 0; i < n; ++i) {
    double rest = x[i];
    rest *= rest;
    double part = (rest + r0) - r0;
    sum0 += part;
    rest -= part;
    part = (rest + r1) - r1;
    sum1 += part;
    rest -= part;
    part = (rest + r2) - r2;
    sum2 += part;
    if constexpr (kParts > 3) {
      rest -= part;
      sum3 += (rest + r3) - r3;
    }
  }
  const double sums[] = {sum0, sum1, sum2, sum3};
  for (int j = 0; j < kParts; ++j)
    bins.add(std::max(top - j, kLowBin), static_cast<int64_t>(sums[j] / unit[j]));
}

template <class T>
INLINE void bin_chunk(int64_t n, const T* x, Bins& bins) {
  using Bits = typename Float<T>::Bits;
  Bits largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, magnitude(x[i]));
  if (largest == 0) return;

  T finite[kChunk];
  if (largest >= Float<T>::kTooLarge) {
    largest = 0;
    for (int64_t i = 0; i < n; ++i) {
      const bool counted = magnitude(x[i]) < Float<T>::kTooLarge;
      finite[i] = counted ? x[i] : T{0};
      largest = std::max(largest, magnitude(finite[i]));
      bins.words[2 * kBins] += !counted;
    }
    x = finite;
  }

  double square = bit_cast<T>(largest);
  square *= square;
  const int exponent = square == 0 ? -(1 << 20) : std::ilogb(square);
  const int top = std::clamp(exponent >> 5, kLowBin, kHighBin);
  // Only a square in the upper half of its bin's range rounds up into the bin above.
  if (square > std::ldexp(0.5, kBinBits * (top + 1))) split<4>(n, x, top + 1, bins);
  else split<3>(n, x, top, bins);
}

PORTABLE_SIMD void bin(int64_t n, const float* x, Bins& bins) { bin_chunk(n, x, bins); }

PORTABLE_SIMD void bin(int64_t n, const double* x, Bins& bins) { bin_chunk(n, x, bins); }

void merge(const Bins& from, Bins& into) {
#pragma omp critical
  for (int j = 0; j < 2 * kBins + 1; ++j) into.words[j] += from.words[j];
}

template <class T>
void bin_all(int64_t n, Array values, Bins& bins, int threads) {
  in_parallel(n, threads, [&](int64_t begin, int64_t end) {
    Bins own = {};
    float wide[kChunk];
    for (int64_t i = begin; i < end; i += kChunk) {
      const int64_t count = std::min(kChunk, end - i);
      bin(count, values.read<T>(i, count, wide), own);
    }
    merge(own, bins);
  });
}

// Adds the bins to those of the caller, with the low words carried into the high ones.
void store(const Bins& bins, int64_t* words) {
  for (int j = 0; j < 2 * kBins + 1; ++j) words[j] += bins.words[j];
  for (int j = 0; j < 2 * kBins; j += 2) {
    words[j + 1] += words[j] >> kBinBits;
    words[j] &= kMask;
  }
}


// ---------------------------------------------------------------- sum in rank order

template <class T, int kPieces>
INLINE void sum_fixed(int64_t n, T* out, const T* const* pieces) {
  const T *a = pieces[0], *b = pieces[kPieces > 1 ? 1 : 0], *c = pieces[kPieces > 2 ? 2 : 0],
          *d = pieces[kPieces > 3 ? 3 : 0];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T total = a[i];
    if constexpr (kPieces > 1) total = total + b[i];
    if constexpr (kPieces > 2) total = total + c[i];
    if constexpr (kPieces > 3) total = total + d[i];
    out[i] = total;
  }
}

template <class T>
INLINE void choose_sum(int64_t n, T* out, const T* const* pieces, int count) {
  switch (count) {
    case 1: return sum_fixed<T, 1>(n, out, pieces);
    case 2: return sum_fixed<T, 2>(n, out, pieces);
    case 3: return sum_fixed<T, 3>(n, out, pieces);
    default: return sum_fixed<T, 4>(n, out, pieces);
  }
}

// Sums of up to four pieces.
PORTABLE_SIMD void sum(int64_t n, float* out, const float* const* pieces, int count) {
  choose_sum(n, out, pieces, count);
}

PORTABLE_SIMD void sum(int64_t n, double* out, const double* const* pieces, int count) {
  choose_sum(n, out, pieces, count);
}

// Also bins the squares of the sums, while they are in cache, unless `bins` is null.
template <class T>
void sum_all(int64_t n, T* out, void* const* data, int type, int count, bool accumulate,
             Bins* bins, int threads) {
  in_parallel(n, threads, [=](int64_t begin, int64_t end) {
    Bins own = {};
    // `out` may be any of the pieces, so a block is complete before it is stored.
    T total[kBlock];
    float wide[4][kBlock];
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t size = std::min(kBlock, end - i);
      const T* next[4];
      for (int done = 0; done < count;) {
        int taken = 0;
        if (done > 0) next[taken++] = total;
        else if (accumulate) next[taken++] = out + i;
        for (float* buffer = wide[0]; taken < 4 && done < count; ++done, buffer += kBlock)
          next[taken++] = Array{data[done], type}.read<T>(i, size, buffer);
        sum(size, done == count ? out + i : total, next, taken);
      }
      if (bins) bin(size, out + i, own);
    }
    if (bins) merge(own, *bins);
  });
}

// ---------------------------------------------------------------- checksums

// The sum of (low + k(i)) * (high + k'(i)) over the 64-bit words, each two halves of 32 bits, with
// keys that depend on the position: words in another order, and two changes that would cancel in a
// plain sum, are noticed. It wraps around, so that parts add in any order.
//
// Source: Black et al., "UMAC", CRYPTO 1999, section 4.2 (NH); here the keys are no secret.
PORTABLE_SIMD uint64_t checksum(const uint64_t* words, int64_t begin, int64_t end,
                                uint32_t first) {
  uint64_t total = 0;
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t place = first + static_cast<uint32_t>(i);
    const uint64_t word = words[i];
    const uint32_t low = static_cast<uint32_t>(word) + place * 0x9E3779B1u + 0x7FEB352Du;
    const uint32_t high = static_cast<uint32_t>(word >> 32) + place * 0x85EBCA77u + 0x846CA68Bu;
    total += static_cast<uint64_t>(low) * high;
  }
  return total;
}

}  // namespace

// ---------------------------------------------------------------- what cpp.py calls

#define EXPORT extern "C" __attribute__((visibility("default")))

// Which instructions the loader picked.
EXPORT const char* belief_isa() {
#if PORTABLE
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX-512";
  if (__builtin_cpu_supports("x86-64-v3")) return "AVX2";
#endif
  return "the compiler's default instructions";
}

// Which source this was built from: a stale binary is not used.
EXPORT const char* belief_source_hash() { return BELIEF_SOURCE_HASH; }

EXPORT void belief_update(int64_t count, const void* segments, int param_type, int grad_type,
                          int state_type, int out_type, int remainder_type, int average_type,
                          const double* scalars, int threads) {
  const auto update = param_type == kFloat64 ? update_all<double> : update_all<float>;
  const Types types{param_type, grad_type, state_type, out_type, remainder_type, average_type};
  update(count, static_cast<const Segment*>(segments), types, scalars, threads);
}

EXPORT void belief_sum(int64_t n, void* out, void* const* pieces, int type, int count,
                       int accumulate, int64_t* words, int threads) {
  Bins bins = {};
  Bins* wanted = words ? &bins : nullptr;
  if (type == kFloat64)
    sum_all(n, static_cast<double*>(out), pieces, type, count, accumulate, wanted, threads);
  else
    sum_all(n, static_cast<float*>(out), pieces, type, count, accumulate, wanted, threads);
  if (words) store(bins, words);
}

EXPORT void belief_squares(int64_t n, void* values, int type, int64_t* words, int threads) {
  Bins bins = {};
  if (type == kFloat64) bin_all<double>(n, {values, type}, bins, threads);
  else bin_all<float>(n, {values, type}, bins, threads);
  store(bins, words);
}

EXPORT uint64_t belief_checksum(int64_t n, const uint64_t* words, int64_t first, int threads) {
  const int64_t share = (n + threads - 1) / threads;
  uint64_t total = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : total)
  for (int thread = 0; thread < threads; ++thread)
    total += checksum(words, std::min(thread * share, n), std::min((thread + 1) * share, n),
                      static_cast<uint32_t>(first));
  return total;
}
