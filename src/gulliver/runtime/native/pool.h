// A pool of threads that run one function together, with barriers inside it.
//
// A barrier spins for a short while, then parks in the kernel: fast while all threads have a core each, sane when another
// process takes one away. The caller of `run` parks, and takes no part: so each thread of the pool can be bound to a core of
// its own, without binding a thread that is not ours. (Unbound, two threads that spin on one core keep each other from the
// other core for tens of milliseconds.) Work inside is handed out in pieces by an atomic counter: a slow thread takes fewer.
//
// Pools belong to the process, not to a program: two that want the same cores at once would wait at their barriers for
// threads that the other one keeps from running. So programs of as many threads share a pool, and the runs of all pools
// begin in the order in which they were asked for, each once the cores have room for its threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
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

struct Process;                     // what the pools of a process share

class Pool {
 public:
  // The pool for one more program: one that other programs use, or a new one as long as the cores have room for both.
  // Throws std::runtime_error when the system gives fewer threads.
  static std::shared_ptr<Pool> of(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  int size() const { return size_; }
  Barrier& barrier() { return barrier_; }
  // Run `work(thread number)`, which throws nothing, on all threads, once it is this caller's turn; returns when all are
  // done. Throws std::runtime_error in a child process, where the threads are not.
  void run(const std::function<void(int)>& work);

 private:
  Pool(Process& process, int threads, std::vector<int> cores);
  void enter();
  void leave();
  void loop(int number);
  void stop();
  Process& process_;                // that made the threads
  const int size_;
  const std::vector<int> cores_;    // where they may run; empty when that is not known
  const int room_;                  // how many threads may run there at once
  bool busy_ = false;               // guarded by the process's lock
  Barrier barrier_;
  const std::function<void(int)>* work_ = nullptr;
  bool stop_ = false;
  alignas(64) std::atomic<uint32_t> turn_{0};      // number of the run that may begin
  alignas(64) std::atomic<int> running_{0};
  std::vector<std::thread> threads_;
};

}  // namespace gulliver
