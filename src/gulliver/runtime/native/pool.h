// A pool of threads that run one function together, with barriers inside it.
//
// A barrier spins for a short while, then parks in the kernel: fast while all threads have a core each, sane when another
// process takes one away. The caller of `run` parks, and takes no part: so each thread of the pool can be bound to a core of
// its own, without binding a thread that is not ours. (Unbound, two threads that spin on one core keep each other from the
// other core for tens of milliseconds.) Work inside is handed out in pieces by an atomic counter: a slow thread takes fewer.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace gulliver {

class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait();

 private:
  const int count_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
};

class Pool {
 public:
  explicit Pool(int threads);       // throws std::runtime_error when the system gives fewer threads
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  int size() const { return size_; }
  Barrier& barrier() { return barrier_; }
  // Run `work(thread number)`, which throws nothing, on all threads; returns when all are done. One caller at a time.
  // Throws std::runtime_error in a child process, where the threads are not.
  void run(const std::function<void(int)>& work);

 private:
  void loop(int number);
  void stop();
  const int size_;
  const int process_;               // that made the threads
  Barrier barrier_;
  const std::function<void(int)>* work_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<uint32_t> turn_{0};      // number of the run that may begin
  alignas(64) std::atomic<int> running_{0};
  std::vector<std::thread> threads_;
};

}  // namespace gulliver
