// The two inner loops, for up to kMost candidates at a time with the loop over candidates unrolled.
#pragma once

#include <cstdint>
#include <utility>

#include "simd.h"

namespace qprune {

// The sums stay in registers only where everything around them is one function.
#define ALWAYS_INLINE inline __attribute__((always_inline))

// Vectors that the compiler has to put together itself take several times as long to compile.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
constexpr int kMost = 8;
#else
constexpr int kMost = 4;
#endif

// The candidates of one group that one call of an inner loop handles; a group with more than kMost has several passes.
struct Pass {
  int64_t group = 0;
  bool first = true, last = true;     // of its group
  bool plain = false;                 // adds slots.plain · x forward, slots.plain · g backward
  int count = 0;
  int64_t index[kMost];               // position in the candidate list
  float steps[kMost], zero[kMost], ratio[kMost];  // n, z, z / n
};

// Parameters, one float or (Mode::table) one row of floats each:
//   β_k, 1/r_k, weight_k (k < K), base, plain
// forward:  out = base + plain · x + Σ weight_k (q_k − z_k),   weight = p d, base = Σ p β
// backward: dx  = plain · g + Σ_inside weight_k g,             weight = p, or 0 for a pass-through candidate
constexpr int parameter_slots(int k) { return 3 * k + 2; }

// Sums over elements, one vector or one row of floats each:
//   D_k = Σ g (q − z − inside · n (u − z/n)),  A_k = Σ g (q − z),  O_k = Σ_outside g,  G = Σ g,  X = Σ g x
constexpr int sum_slots(int k) { return 3 * k + 2; }

// What an inner loop is compiled for.
struct Mode {
  bool noise = false;
  bool table = false;   // parameters differ from element to element of a row, and are the same in every row
  bool shared = false;  // one β, r and z / n for all candidates of the pass (neither noise nor table)
  bool offset = false;  // O is wanted
};

// Calls f with the constants 0 … N − 1.
template <int N, typename F>
ALWAYS_INLINE void each(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) { (f(std::integral_constant<int, I>()), ...); }
  (std::make_integer_sequence<int, N>());
}

// N vectors, meant to stay in registers: they are made in one expression and indexed by constants, since GCC keeps an array in memory that
// it has once seen in a loop, be it the loop of a default constructor.
template <int N>
struct Pack {
  Vec at[N];
};

template <int N, typename F>
ALWAYS_INLINE Pack<N> make_pack(const F& f) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) { return Pack<N>{{f(std::integral_constant<int, I>())...}}; }
  (std::make_integer_sequence<int, N>());
}

// `rows` rows of n elements, each `pitch` behind the one before. Without Mode::table there is one row.
struct Tile {
  int64_t n, rows, pitch;
};

// Calls f(i, count) for the vectors of a row.
template <typename F>
ALWAYS_INLINE void each_vector(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, n - i);
}

template <int K>
struct Parameters {
  Pack<parameter_slots(K)> slot;

  Vec offset(int k) const { return slot.at[k]; }
  Vec inverse(int k) const { return slot.at[K + k]; }
  Vec weight(int k) const { return slot.at[2 * K + k]; }
  Vec base() const { return slot.at[3 * K]; }
  Vec plain() const { return slot.at[3 * K + 1]; }
};

// The parameters of column i of a table, or of the whole row.
template <int K, Mode mode>
ALWAYS_INLINE Parameters<K> load_parameters(const float* data, int64_t stride, int64_t i) {
  return {make_pack<parameter_slots(K)>([&](auto s) __attribute__((always_inline)) {
    return mode.table ? Vec::loadu(data + s * stride + i) : Vec(data[s * stride]);
  })};
}

struct Position {
  Vec t, u;  // (x − β)/r and u, clamped
  Mask inside;
};

template <Mode mode>
ALWAYS_INLINE Position locate(Vec x, Vec noise, Vec offset, Vec inverse, float steps, float ratio) {
  const Vec t = (x - offset) * inverse;
  Vec u = t + Vec(ratio);
  if constexpr (mode.noise) u = u + noise / Vec(steps);
  // at::vec's clamp returns a NaN in its first argument
  const Vec clamped = at::vec::clamp(u, Vec(0.0f), Vec(1.0f));
  return {t, clamped, equal(u, clamped)};
}

// q − z
template <Mode mode>
ALWAYS_INLINE Vec level(Vec u, float steps, float zero) {
  const Vec scaled = u * Vec(steps);
  return (mode.noise ? scaled : scaled.round()) - Vec(zero);
}

template <int K, Mode mode>
void forward_run(const Pass& pass, const float* data, int64_t stride, const float* x, const float* noise, float* out, const Tile& tile) {
  const bool plain = pass.plain, accumulate = !pass.first;
  auto element = [&](const Parameters<K>& parameters, int64_t i, int64_t count) __attribute__((always_inline)) {
    const Vec v = Vec::loadu(x + i, count);
    const Vec e = mode.noise ? Vec::loadu(noise + i, count) : Vec(0.0f);
    Vec sum = parameters.base();
    if (plain) sum = at::vec::fmadd(parameters.plain(), v, sum);
    if (accumulate) sum = sum + Vec::loadu(out + i, count);
    Position position;
    each<K>([&](auto k) __attribute__((always_inline)) {
      if (!mode.shared || k == 0) position = locate<mode>(v, e, parameters.offset(k), parameters.inverse(k), pass.steps[k], pass.ratio[k]);
      sum = at::vec::fmadd(parameters.weight(k), level<mode>(position.u, pass.steps[k], pass.zero[k]), sum);
    });
    if constexpr (K == 0) sum = where(differs(v, v), v, sum);
    sum.store(out + i, count);
  };
  if constexpr (mode.table) {
    each_vector(tile.n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      const Parameters<K> parameters = load_parameters<K, mode>(data, stride, i);
      for (int64_t row = 0; row < tile.rows; ++row) element(parameters, i + row * tile.pitch, count);
    });
  } else {
    const Parameters<K> parameters = load_parameters<K, mode>(data, stride, 0);
    each_vector(tile.n, [&](int64_t i, int64_t count) __attribute__((always_inline)) { element(parameters, i, count); });
  }
}

template <int K, Mode mode>
void backward_run(const Pass& pass, const float* data, int64_t stride, const float* x, const float* noise, const float* g, float* dx,
                  float* sums, const Tile& tile, bool accumulate) {
  using Sums = Pack<sum_slots(K)>;
  const int64_t sum_stride = mode.table ? stride : kLanes;
  const bool plain = pass.plain;
  auto load_sums = [&](int64_t i) __attribute__((always_inline)) {
    return make_pack<sum_slots(K)>([&](auto s) __attribute__((always_inline)) { return Vec::loadu(sums + s * sum_stride + i); });
  };
  auto store_sums = [&](const Sums& total, int64_t i) __attribute__((always_inline)) {
    each<sum_slots(K)>([&](auto s) __attribute__((always_inline)) { total.at[s].store(sums + s * sum_stride + i); });
  };
  auto element = [&](const Parameters<K>& parameters, Vec shared_weight, Sums& total, int64_t i, int64_t count)
      __attribute__((always_inline)) {
    const Vec v = Vec::loadu(x + i, count);
    const Vec e = mode.noise ? Vec::loadu(noise + i, count) : Vec(0.0f);
    const Vec poison = where(differs(v, v), v, Vec(0.0f));
    const Vec grad = Vec::loadu(g + i, count) + poison;
    Vec sum = accumulate ? Vec::loadu(dx + i, count) : poison;
    if (plain) sum = at::vec::fmadd(parameters.plain(), grad, sum);
    Position position;
    each<K>([&](auto k) __attribute__((always_inline)) {
      if (!mode.shared || k == 0) {
        position = locate<mode>(v, e, parameters.offset(k), parameters.inverse(k), pass.steps[k], pass.ratio[k]);
        sum = fmadd_where(position.inside, mode.shared ? shared_weight : parameters.weight(k), grad, sum);
      }
      const Vec code = level<mode>(position.u, pass.steps[k], pass.zero[k]);
      total.at[k] = at::vec::fmadd(fnmadd_where(position.inside, Vec(pass.steps[k]), position.t, code), grad, total.at[k]);
      total.at[K + k] = at::vec::fmadd(code, grad, total.at[K + k]);
      if constexpr (mode.offset) total.at[2 * K + k] = total.at[2 * K + k] + where(position.inside, Vec(0.0f), grad);
    });
    total.at[3 * K] = total.at[3 * K] + grad;
    total.at[3 * K + 1] = at::vec::fmadd(grad, v, total.at[3 * K + 1]);
    sum.store(dx + i, count);
  };
  if constexpr (mode.table) {
    each_vector(tile.n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      const Parameters<K> parameters = load_parameters<K, mode>(data, stride, i);
      Sums total = load_sums(i);
      for (int64_t row = 0; row < tile.rows; ++row) element(parameters, Vec(0.0f), total, i + row * tile.pitch, count);
      store_sums(total, i);
    });
  } else {
    const Parameters<K> parameters = load_parameters<K, mode>(data, stride, 0);
    Vec shared_weight(0.0f);
    each<K>([&](auto k) __attribute__((always_inline)) { shared_weight = shared_weight + parameters.weight(k); });
    Sums total = load_sums(0);
    each_vector(tile.n, [&](int64_t i, int64_t count) __attribute__((always_inline)) { element(parameters, shared_weight, total, i, count); });
    store_sums(total, 0);
  }
}

}  // namespace qprune
