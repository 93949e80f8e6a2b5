// The two inner loops, for up to kMost candidates at a time with the loop over candidates unrolled.
#pragma once

#include <cstdint>

#include "simd.h"

namespace qprune {

constexpr int kMost = 8;

// The candidates of one group that one call of an inner loop handles; a group with more than kMost has several passes.
struct Pass {
  int64_t group = 0;
  bool first = true, last = true;     // of its group
  bool plain = false;                 // adds slots.plain · x forward, slots.plain · g backward
  int count = 0;
  int64_t index[kMost];               // position in the candidate list
  float steps[kMost], zero[kMost], ratio[kMost];  // n, z, z / n
};

// Parameters, one float or one row of floats (kTable: one per element) each:
//   β_k, 1/r_k, weight_k (k < K), base, plain
// forward:  out = base + plain · x + Σ weight_k (q_k − z_k),   weight = p d, base = Σ p β
// backward: dx  = plain · g + Σ_inside weight_k g,             weight = p, or 0 for a pass-through candidate
constexpr int parameter_slots(int k) { return 3 * k + 2; }

// Sums over elements, one vector or one row of floats each:
//   D_k = Σ g (q − z − inside · n (u − z/n)),  A_k = Σ g (q − z),  O_k = Σ_outside g,  G = Σ g,  X = Σ g x
constexpr int sum_slots(int k) { return 3 * k + 2; }

template <int K, bool kTable>
struct Parameters {
  static constexpr int kSlots = parameter_slots(K);
  const float* data;
  int64_t stride;
  Vec fixed[kTable ? 1 : kSlots];

  Parameters(const float* data, int64_t stride) : data(data), stride(stride) {
    if constexpr (!kTable) {
      for (int s = 0; s < kSlots; ++s) fixed[s] = Vec(data[s * stride]);
    }
  }
  Vec get(int slot, int64_t i) const {
    if constexpr (kTable) return Vec::loadu(data + slot * stride + i);
    return fixed[slot];
  }
};

struct Code {
  Vec q, t;     // the code and (x − β)/r
  Mask inside;
};

template <bool kNoise>
inline Code encode(Vec x, Vec noise, Vec offset, Vec inverse, float steps, float ratio) {
  const Vec t = (x - offset) * inverse;
  Vec u = t + Vec(ratio);
  if constexpr (kNoise) u = u + noise / Vec(steps);
  // min and max with a NaN in the second place return it
  const Vec clamped = at::vec::clamp(u, Vec(0.0f), Vec(1.0f));
  const Vec scaled = clamped * Vec(steps);
  return {kNoise ? scaled : scaled.round(), t, equal(u, clamped)};
}

template <int K, bool kNoise, bool kTable>
void forward_run(const Pass& pass, const float* data, int64_t stride, const float* x, const float* noise, float* out, int64_t n) {
  const Parameters<K, kTable> parameters(data, stride);
  const bool plain = pass.plain, accumulate = !pass.first;
  auto step = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Vec v = Vec::loadu(x + i, count);
    Vec sum = parameters.get(3 * K, i);
    if (plain) sum = at::vec::fmadd(parameters.get(3 * K + 1, i), v, sum);
    if (accumulate) sum = sum + Vec::loadu(out + i, count);
    const Vec e = kNoise ? Vec::loadu(noise + i, count) : Vec(0.0f);
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const Code c = encode<kNoise>(v, e, parameters.get(k, i), parameters.get(K + k, i), pass.steps[k], pass.ratio[k]);
      sum = at::vec::fmadd(parameters.get(2 * K + k, i), c.q - Vec(pass.zero[k]), sum);
    }
    if constexpr (K == 0) sum = where(differs(v, v), v, sum);
    sum.store(out + i, count);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step(i, kLanes);
  if (i < n) step(i, n - i);
}

template <int K, bool kNoise, bool kTable, bool kOffset>
void backward_run(const Pass& pass, const float* data, int64_t stride, const float* x, const float* noise, const float* g, float* dx, float* sums,
                  int64_t n, bool accumulate) {
  const Parameters<K, kTable> parameters(data, stride);
  constexpr int kSums = sum_slots(K);
  const int64_t pitch = kTable ? stride : kLanes;
  const bool plain = pass.plain;
  Vec local[kSums];
  for (int s = 0; s < kSums; ++s) local[s] = kTable ? Vec(0.0f) : Vec::loadu(sums + s * pitch);
  auto step = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    const Vec v = Vec::loadu(x + i, count);
    const Vec e = kNoise ? Vec::loadu(noise + i, count) : Vec(0.0f);
    const Vec poison = where(differs(v, v), v, Vec(0.0f));
    const Vec grad = Vec::loadu(g + i, count) + poison;
    Vec sum = accumulate ? Vec::loadu(dx + i, count) : poison;
    if (plain) sum = at::vec::fmadd(parameters.get(3 * K + 1, i), grad, sum);
    if constexpr (kTable) {
      for (int s = 0; s < kSums; ++s) local[s] = Vec::loadu(sums + s * pitch + i);
    }
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      const Code c = encode<kNoise>(v, e, parameters.get(k, i), parameters.get(K + k, i), pass.steps[k], pass.ratio[k]);
      const Vec level = c.q - Vec(pass.zero[k]);
      sum = fmadd_where(c.inside, parameters.get(2 * K + k, i), grad, sum);
      local[k] = at::vec::fmadd(fmadd_where(c.inside, Vec(-pass.steps[k]), c.t, level), grad, local[k]);
      local[K + k] = at::vec::fmadd(level, grad, local[K + k]);
      if constexpr (kOffset) local[2 * K + k] = local[2 * K + k] + where(c.inside, Vec(0.0f), grad);
    }
    local[3 * K] = local[3 * K] + grad;
    local[3 * K + 1] = at::vec::fmadd(grad, v, local[3 * K + 1]);
    sum.store(dx + i, count);
    if constexpr (kTable) {
      for (int s = 0; s < kSums; ++s) local[s].store(sums + s * pitch + i);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step(i, kLanes);
  if (i < n) step(i, n - i);
  if constexpr (!kTable) {
    for (int s = 0; s < kSums; ++s) local[s].store(sums + s * pitch);
  }
}

}  // namespace qprune
