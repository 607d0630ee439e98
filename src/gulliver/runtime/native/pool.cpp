#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <fstream>
#include <mutex>
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

// Numbers of the cores that the calling thread may use; empty where the system does not say.
std::vector<int> usable_cores() {
  std::vector<int> cores;
#if defined(__linux__)
  cpu_set_t all;
  if (sched_getaffinity(0, sizeof all, &all) != 0) return cores;
  for (int core = 0; core < CPU_SETSIZE; core++)
    if (CPU_ISSET(core, &all)) cores.push_back(core);
#endif
  return cores;
}

// How many threads may run at once on these cores: as many as there are, or as the control group's quota of time lets run.
int room_of(const std::vector<int>& cores) {
  const int count = cores.empty() ? std::max(1, int(std::thread::hardware_concurrency())) : int(cores.size());
  std::ifstream file("/sys/fs/cgroup/cpu.max");     // "max 100000", or microseconds of each period
  double quota = 0, period = 0;
  if (!(file >> quota >> period) || quota <= 0 || period <= 0) return count;
  return int(std::clamp(std::ceil(quota / period), 1.0, double(count)));
}

void bind_to_core([[maybe_unused]] int core) {
#if defined(__linux__)
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  sched_setaffinity(0, sizeof one, &one);
#endif
}

}  // namespace

struct Process {
  const int id = getpid();
  std::mutex lock;                           // guards what follows, and every pool's busy_
  std::condition_variable changed;
  uint64_t next = 0, turn = 0;               // numbers of the run that is asked for next, and of the one that begins next
  int running = 0;                           // threads, of all pools
  std::vector<std::weak_ptr<Pool>> pools;
};

namespace {

// A forked child has one of its own: another thread may have held the parent's lock. None is ever deleted, since the end of
// the process finds threads that still run.
Process& this_process() {
  static std::atomic<Process*> current{nullptr};
  Process* found = current.load();
  if (found && found->id == getpid()) return *found;
  auto* made = new Process;
  if (current.compare_exchange_strong(found, made)) return *made;
  delete made;
  return *found;
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

std::shared_ptr<Pool> Pool::of(int threads) {
  Process& process = this_process();
  std::vector<int> cores = usable_cores();
  const std::lock_guard guard(process.lock);
  std::erase_if(process.pools, [](const auto& pool) { return pool.expired(); });
  std::shared_ptr<Pool> least;               // the one with the fewest programs
  int alike = 0;
  for (const auto& known : process.pools) {
    auto pool = known.lock();
    if (!pool || pool->size_ != threads || pool->cores_ != cores) continue;
    alike++;
    if (!least || pool.use_count() < least.use_count()) least = std::move(pool);
  }
  if (least && (alike + 1) * threads > least->room_) return least;
  std::shared_ptr<Pool> made(new Pool(process, threads, std::move(cores)));
  process.pools.push_back(made);
  return made;
}

Pool::Pool(Process& process, int threads, std::vector<int> cores)
    : process_(process), size_(threads), cores_(std::move(cores)), room_(room_of(cores_)), barrier_(threads) {
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
  if (getpid() != process_.id) {    // a fork has only the thread that forked: none to wait for
    for (auto& thread : threads_) thread.detach();
    return;
  }
  stop_ = true;
  turn_.fetch_add(1);
  turn_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void Pool::loop(int number) {
  if (cores_.size() == size_t(size_)) bind_to_core(cores_[size_t(number)]);   // else the kernel has a choice: leave it
  for (uint32_t seen = 0;; seen++) {
    turn_.wait(seen, std::memory_order_acquire);
    if (stop_) return;
    (*work_)(number);
    if (running_.fetch_sub(1) == 1) running_.notify_one();
  }
}

void Pool::run(const std::function<void(int)>& work) {
  if (getpid() != process_.id) throw std::runtime_error("the process was forked; open the model again in the child");
  enter();
  work_ = &work;
  running_.store(size_, std::memory_order_relaxed);
  turn_.fetch_add(1);
  turn_.notify_all();
  for (int left = running_.load(std::memory_order_acquire); left != 0; left = running_.load(std::memory_order_acquire))
    running_.wait(left, std::memory_order_acquire);
  leave();
}

void Pool::enter() {
  std::unique_lock guard(process_.lock);
  const uint64_t mine = process_.next++;
  process_.changed.wait(guard, [&] {
    return process_.turn == mine && !busy_ && (process_.running == 0 || process_.running + size_ <= room_);
  });
  process_.turn++;
  process_.running += size_;
  busy_ = true;
  if (process_.running < room_) process_.changed.notify_all();   // the next one may fit beside
}

void Pool::leave() {
  const std::lock_guard guard(process_.lock);
  process_.running -= size_;
  busy_ = false;
  process_.changed.notify_all();
}

}  // namespace gulliver
