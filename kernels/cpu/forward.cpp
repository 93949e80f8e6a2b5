// The instances of the forward loop.

#include "call.h"

namespace qprune {
namespace {

template <Mode mode, int... K>
Forward forward_of(int k, std::integer_sequence<int, K...>) {
  static constexpr Forward all[] = {&forward_run<K, mode>...};
  return all[k];
}

}  // namespace

Forward find_forward(int k, const Mode& mode) {
  constexpr auto counts = std::make_integer_sequence<int, kMost + 1>();
  if (mode.noise && mode.table) return forward_of<Mode{.noise = true, .table = true}>(k, counts);
  if (mode.noise) return forward_of<Mode{.noise = true}>(k, counts);
  if (mode.table) return forward_of<Mode{.table = true}>(k, counts);
  return mode.shared ? forward_of<Mode{.shared = true}>(k, counts) : forward_of<Mode{}>(k, counts);
}

}  // namespace qprune
