// Arrays in huge pages: what a step walks through row by row would otherwise need a page of 4 KB for every row.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <new>
#include <vector>

namespace gulliver {

template <class T>
struct HugePages {
  using value_type = T;
  static constexpr size_t kPage = size_t(2) << 20, kLine = 64;

  HugePages() = default;
  template <class U>
  HugePages(const HugePages<U>&) {}

  T* allocate(size_t count) {
    const size_t bytes = count * sizeof(T), unit = bytes < kPage / 2 ? kLine : kPage, size = (bytes + unit - 1) / unit * unit;
    void* memory = std::aligned_alloc(unit, size);
    if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (unit == kPage) madvise(memory, size, MADV_HUGEPAGE);
#endif
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t) { std::free(memory); }
  bool operator==(const HugePages&) const { return true; }
};

template <class T>
using Array = std::vector<T, HugePages<T>>;

}  // namespace gulliver
