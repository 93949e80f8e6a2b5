// How the work is cut: candidates into passes, storage into units. Neither depends on the number of threads, so neither do the sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace qprune {

// As in layout.py
struct Layout {
  int64_t numel, channels, inner, groups, block;
};

struct Candidates {
  int64_t count;
  const float *steps, *zero;
  const int64_t *group, *through;
};

constexpr float kIdentity = -1.0f;

inline std::vector<Pass> make_passes(const Candidates& c, int64_t groups, bool backward) {
  std::vector<Pass> passes;
  for (int64_t m = 0; m < groups; ++m) {
    Pass pass;
    pass.group = m;
    for (int64_t k = 0; k < c.count; ++k) {
      if (c.group[k] == m && c.steps[k] != 0) pass.plain = pass.plain || c.steps[k] == kIdentity || (backward && c.through[k]);
    }
    for (int64_t k = 0; k < c.count; ++k) {
      if (c.group[k] != m || c.steps[k] == 0 || c.steps[k] == kIdentity) continue;
      if (pass.count == kMost) {
        pass.last = false;
        passes.push_back(pass);
        pass = Pass{};
        pass.group = m;
        pass.first = false;
      }
      pass.index[pass.count] = k;
      pass.steps[pass.count] = c.steps[k];
      pass.zero[pass.count] = c.zero[k];
      pass.ratio[pass.count] = static_cast<float>(static_cast<double>(c.zero[k]) / c.steps[k]);
      ++pass.count;
    }
    passes.push_back(pass);
  }
  return passes;
}

// The slots of `Parameters` for one pass and one row of offset, range and p.
inline void fill_slots(const Pass& pass, const Candidates& c, const float* offset, const float* range, const float* p, bool backward,
                       float* slots, int64_t stride) {
  const int K = pass.count;
  float base = 0.0f, plain = 0.0f;
  for (int j = 0; j < K; ++j) {
    const int64_t k = pass.index[j];
    slots[j * stride] = offset[k];
    slots[(K + j) * stride] = 1.0f / range[k];
    slots[(2 * K + j) * stride] = backward ? (c.through[k] ? 0.0f : p[k]) : p[k] * (range[k] / pass.steps[j]);
    base += p[k] * offset[k];
  }
  if (pass.plain) {
    for (int64_t k = 0; k < c.count; ++k) {
      const bool counts = c.steps[k] == kIdentity || (backward && c.steps[k] != 0 && c.through[k]);
      if (c.group[k] == pass.group && counts) plain += p[k];
    }
  }
  slots[3 * K * stride] = base;
  slots[(3 * K + 1) * stride] = plain;
}

// Whether all candidates of the pass have the same β, r and z / n in this row.
inline bool shares(const Pass& pass, const float* slots) {
  const int K = pass.count;
  for (int j = 1; j < K; ++j) {
    if (slots[j] != slots[0] || slots[K + j] != slots[K] || pass.ratio[j] != pass.ratio[0]) return false;
  }
  return K > 1;
}

constexpr int64_t kUnit = 16384;  // elements that are worth handing to a thread

// Storage is repeats x channels x inner. A unit is a range of each; `parts` units add to the same channel.
struct Partition {
  bool table;                       // short rows that repeat: see Mode::table
  int64_t repeats, repeat_parts, channel_parts, inner_parts;

  explicit Partition(const Layout& l) {
    repeats = l.numel / (l.channels * l.inner);
    table = l.channels > 1 && l.inner < kLanes && repeats > 1;
    inner_parts = channel_parts = 1;
    const int64_t units = std::max<int64_t>(l.numel / kUnit, 1);
    if (table) {
      repeat_parts = std::min({units, std::max<int64_t>(repeats / 128, 1), int64_t{64}});
      return;
    }
    if (l.inner >= 2 * kUnit) inner_parts = std::min<int64_t>(l.inner / kUnit, 256);
    channel_parts = l.inner >= kUnit ? l.channels : (l.channels * l.inner + kUnit - 1) / kUnit;
    repeat_parts = std::min(repeats, std::max<int64_t>(units / (channel_parts * inner_parts), 1));
    repeat_parts = std::min(repeat_parts, std::max<int64_t>(256 / (channel_parts * inner_parts), 1));
  }
  int64_t units() const { return repeat_parts * channel_parts * inner_parts; }
  int64_t parts() const { return repeat_parts * inner_parts; }
};

struct Range {
  int64_t begin, end;
};

inline Range part(int64_t total, int64_t parts, int64_t i) { return {total * i / parts, total * (i + 1) / parts}; }

}  // namespace qprune
