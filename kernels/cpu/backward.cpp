// The instances of the backward loop.

#include "call.h"

namespace qprune {
namespace {

template <Mode mode, int... K>
Backward backward_of(int k, std::integer_sequence<int, K...>) {
  static constexpr Backward all[] = {&backward_run<K, mode>...};
  return all[k];
}

}  // namespace

// Only the most frequent mode has a variant without the sum for the offset: each one costs time to compile.
Backward find_backward(int k, const Mode& mode) {
  constexpr auto counts = std::make_integer_sequence<int, kMost + 1>();
  if (mode.noise && mode.table) return backward_of<Mode{.noise = true, .table = true, .offset = true}>(k, counts);
  if (mode.noise) return backward_of<Mode{.noise = true, .offset = true}>(k, counts);
  if (mode.table) return backward_of<Mode{.table = true, .offset = true}>(k, counts);
  if (mode.shared) return backward_of<Mode{.shared = true, .offset = true}>(k, counts);
  return mode.offset ? backward_of<Mode{.offset = true}>(k, counts) : backward_of<Mode{}>(k, counts);
}

}  // namespace qprune
