// Vectors of floats with masks, and blocks of floats read from and written to any of the three storage types.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>

namespace qprune {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();

// at::vec keeps comparisons in full vectors. AVX-512 has mask registers and masked multiply-adds, which save an instruction per use.
#if defined(CPU_CAPABILITY_AVX512)
using Mask = __mmask16;
inline Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask differs(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ); }
inline Vec where(Mask m, Vec a, Vec b) { return _mm512_mask_blend_ps(m, b, a); }
inline Vec fmadd_where(Mask m, Vec a, Vec b, Vec c) { return _mm512_mask3_fmadd_ps(a, b, c, m); }
inline Vec fnmadd_where(Mask m, Vec a, Vec b, Vec c) { return _mm512_mask3_fnmadd_ps(a, b, c, m); }
#else
using Mask = Vec;
inline Mask equal(Vec a, Vec b) { return a == b; }
inline Mask differs(Vec a, Vec b) { return a != b; }
inline Vec where(Mask m, Vec a, Vec b) { return Vec::blendv(b, a, m); }
// m ? c ± a * b : c, also where a * b is not finite
inline Vec fmadd_where(Mask m, Vec a, Vec b, Vec c) { return Vec::blendv(c, at::vec::fmadd(a, b, c), m); }
inline Vec fnmadd_where(Mask m, Vec a, Vec b, Vec c) { return Vec::blendv(c, c - a * b, m); }
#endif

// Sum of kLanes floats, which are overwritten.
inline float lane_sum(float* lanes) {
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

enum class Type : int64_t { kFloat = 0, kBFloat16 = 1, kHalf = 2 };

inline auto halves(at::vec::Vectorized<c10::BFloat16> v) { return at::vec::convert_bfloat16_float(v); }
inline auto halves(at::vec::Vectorized<c10::Half> v) { return at::vec::convert_half_float(v); }

template <typename T>
inline void widen(const T* source, float* target, int64_t n) {
  using Narrow = at::vec::Vectorized<T>;
  int64_t i = 0;
  for (; i + Narrow::size() <= n; i += Narrow::size()) {
    auto [low, high] = halves(Narrow::loadu(source + i));
    low.store(target + i);
    high.store(target + i + kLanes);
  }
  for (; i < n; ++i) target[i] = static_cast<float>(source[i]);
}

// n floats from position `first` on
inline void load_block(Type type, const void* base, int64_t first, float* target, int64_t n) {
  switch (type) {
    case Type::kFloat: std::memcpy(target, static_cast<const float*>(base) + first, n * sizeof(float)); break;
    case Type::kBFloat16: widen(static_cast<const c10::BFloat16*>(base) + first, target, n); break;
    case Type::kHalf: widen(static_cast<const c10::Half*>(base) + first, target, n); break;
  }
}

inline void store_block(Type type, void* base, int64_t first, const float* source, int64_t n) {
  switch (type) {
    case Type::kFloat: std::memcpy(static_cast<float*>(base) + first, source, n * sizeof(float)); break;
    case Type::kBFloat16: at::vec::convert(source, static_cast<c10::BFloat16*>(base) + first, n); break;
    case Type::kHalf: at::vec::convert(source, static_cast<c10::Half*>(base) + first, n); break;
  }
}

}  // namespace qprune
