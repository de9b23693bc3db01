// Sequence numbers in memory that processes of one host share: post one, wait for one.
//
// A number lies alone in its cache line. Its owner alone stores to it; everything that the owner
// wrote before `belief_post` is visible to whoever has seen the number by `belief_await`: the store
// releases, the load acquires. Both, and the count of sleepers, are sequentially consistent, so that
// either the owner sees the sleeper and wakes it, or the sleeper sees the number and does not sleep.

#if defined(__linux__)

#include <atomic>
#include <climits>
#include <cstdint>
#include <ctime>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct alignas(64) Number {
  std::atomic<uint32_t> value;
  std::atomic<uint32_t> sleepers;
};
static_assert(std::atomic<uint32_t>::is_always_lock_free, "processes share it");

// Looks before sleeping: about two microseconds. Longer would take a shared core from a peer.
constexpr int kLooks = 64;

bool reached(const Number& number, uint32_t target) {
  return static_cast<int32_t>(number.value.load() - target) >= 0;  // they may wrap around
}

int64_t now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * int64_t{1000000000} + time.tv_nsec;
}

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Not "private": the other processes have the number at other addresses.
long futex(std::atomic<uint32_t>* word, int operation, uint32_t value, const timespec* limit) {
  return syscall(SYS_futex, word, operation, value, limit, nullptr, 0);
}

bool await(Number& number, uint32_t target, int64_t end) {
  for (int look = 0; look < kLooks; ++look) {
    if (reached(number, target)) return true;
    pause();
  }
  while (true) {
    number.sleepers.fetch_add(1);
    const uint32_t seen = number.value.load();
    const bool is_there = static_cast<int32_t>(seen - target) >= 0;
    const int64_t left = end - now();
    if (!is_there && left > 0) {
      const timespec limit{left / 1000000000, left % 1000000000};
      futex(&number.value, FUTEX_WAIT, seen, &limit);  // returns at once if the number has changed
    }
    number.sleepers.fetch_sub(1);
    if (reached(number, target)) return true;
    if (left <= 0) return false;
  }
}

}  // namespace

// Stores a number and wakes those who wait for it.
EXPORT void belief_post(void* number, uint32_t value) {
  auto& own = *static_cast<Number*>(number);
  own.value.store(value);
  if (own.sleepers.load() > 0) futex(&own.value, FUTEX_WAKE, INT_MAX, nullptr);
}

// Returns when all numbers have reached `target`: -1; or after `nanoseconds` the first that has not.
EXPORT int64_t belief_await(int64_t count, void* const* numbers, uint32_t target,
                            int64_t nanoseconds) {
  const int64_t end = nanoseconds > 0 ? now() + nanoseconds : 0;
  for (int64_t i = 0; i < count; ++i) {
    auto& number = *static_cast<Number*>(numbers[i]);
    if (reached(number, target)) continue;
    if (nanoseconds <= 0 || !await(number, target, end)) return i;
  }
  return -1;
}

#endif  // elsewhere ranks send messages
