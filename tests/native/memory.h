// Memory of an exact size, so that a read or a write past its end is caught: on the heap by the address sanitizer, or right
// before a page that nobody may touch, which also catches masked loads and works without a sanitizer.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

class Guarded {
 public:
  Guarded() {
    void* found = mmap(nullptr, kSize + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED || mprotect(static_cast<char*>(found) + kSize, kPage, PROT_NONE)) std::abort();
    end_ = static_cast<uint8_t*>(found) + kSize;
  }
  uint8_t* take(size_t bytes) {
    if (bytes > kSize) std::abort();
    return end_ - bytes;
  }

 private:
  static constexpr size_t kSize = size_t(1) << 21, kPage = size_t(1) << 16;
  uint8_t* end_;
};

// `bytes` from the heap, or at the end of the guarded region.
class Exact {
 public:
  Exact(Guarded* guarded, size_t bytes) {
    if (guarded) data_ = guarded->take(bytes);
    else data_ = heap_ = static_cast<uint8_t*>(std::malloc(bytes));
    if (!data_) std::abort();
  }
  ~Exact() { std::free(heap_); }
  Exact(const Exact&) = delete;
  Exact& operator=(const Exact&) = delete;
  template <class T = uint8_t>
  T* as() { return reinterpret_cast<T*>(data_); }

 private:
  uint8_t* data_ = nullptr;
  uint8_t* heap_ = nullptr;
};
