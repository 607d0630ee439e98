#include "pool.h"

#include <unistd.h>

#include <stdexcept>
#include <string>
#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace gulliver {
namespace {

constexpr int kSpins = 2000;  // some tens of microseconds

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Bind the calling thread to the core number `number` of those that the process may use, when it has them all for itself.
void bind_to_core([[maybe_unused]] int number, [[maybe_unused]] int threads) {
#if defined(__linux__)
  cpu_set_t all;
  if (sched_getaffinity(0, sizeof all, &all) != 0 || CPU_COUNT(&all) != threads) return;  // the kernel has a choice: leave it
  for (int core = 0; core < CPU_SETSIZE; core++)
    if (CPU_ISSET(core, &all) && number-- == 0) {
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(core, &one);
      sched_setaffinity(0, sizeof one, &one);
      return;
    }
#endif
}

}  // namespace

void Barrier::wait() {
  if (count_ == 1) return;
  const uint32_t round = round_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
    arrived_.store(0, std::memory_order_relaxed);
    // Not just a release: `notify_all` looks whether anybody sleeps, and must not look before the others can see the round.
    round_.store(round + 1, std::memory_order_seq_cst);
    round_.notify_all();
    return;
  }
  for (int spin = 0; spin < kSpins; spin++) {
    if (round_.load(std::memory_order_acquire) != round) return;
    relax();
  }
  while (round_.load(std::memory_order_acquire) == round) round_.wait(round, std::memory_order_acquire);
}

Pool::Pool(int threads) : size_(threads), process_(getpid()), barrier_(threads) {
  threads_.reserve(size_t(threads));
  try {
    for (int number = 0; number < threads; number++) threads_.emplace_back([this, number] { loop(number); });
  } catch (const std::system_error&) {
    const size_t started = threads_.size();
    stop();
    throw std::runtime_error("the system gives " + std::to_string(started) + " of " + std::to_string(threads) + " threads");
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  if (getpid() != process_) {       // a fork has only the thread that forked: nobody to wait for
    for (auto& thread : threads_) thread.detach();
    return;
  }
  stop_ = true;
  turn_.fetch_add(1);
  turn_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Pool::loop(int number) {
  bind_to_core(number, size_);
  for (uint32_t seen = 0;; seen++) {
    turn_.wait(seen, std::memory_order_acquire);
    if (stop_) return;
    (*work_)(number);
    if (running_.fetch_sub(1) == 1) running_.notify_one();
  }
}

void Pool::run(const std::function<void(int)>& work) {
  if (getpid() != process_) throw std::runtime_error("the process was forked; open the model again in the child");
  work_ = &work;
  running_.store(size_, std::memory_order_relaxed);
  turn_.fetch_add(1);
  turn_.notify_all();
  for (int left = running_.load(std::memory_order_acquire); left != 0; left = running_.load(std::memory_order_acquire))
    running_.wait(left, std::memory_order_acquire);
}

}  // namespace gulliver
