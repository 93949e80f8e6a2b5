// Philox4x32-10 (Salmon et al., SC 2011): the noise of element i depends on the seed and on i only.
#pragma once

#include <cstdint>

namespace qprune {

// v − 1/2 for the n elements from storage position `first` on, v uniform in [0, 1) with 24 bits
inline void philox_noise(uint64_t seed, uint64_t first, int64_t n, float* target) {
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t index = first + static_cast<uint64_t>(i);
    uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
      c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(b);
      c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(a);
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    target[i] = static_cast<float>(static_cast<int32_t>(c0 >> 8)) * 0x1p-24f - 0.5f;
  }
}

}  // namespace qprune
