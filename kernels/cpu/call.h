// One call: its tensors, the inner loops that it needs, and one block of storage put through them.
#pragma once

#include <array>
#include <utility>

#include "philox.h"
#include "plan.h"

namespace qprune {

constexpr int64_t kBlock = 1024;   // elements between buffers that stay in the first-level cache
constexpr int64_t kLong = 4096;    // elements that a float32 lane sum may cover (256 terms a lane)

using Forward = decltype(&forward_run<1, Mode{}>);
using Backward = decltype(&backward_run<1, Mode{}>);

// The inner loop for k candidates; forward.cpp and backward.cpp hold the instances, so that they compile side by side.
Forward find_forward(int k, const Mode& mode);
Backward find_backward(int k, const Mode& mode);

// Everything that one call needs. `grad` set: backward.
struct Call {
  Layout layout;
  Candidates candidates;
  const void* x;
  Type x_type;
  void* out;  // dx in the backward pass
  Type out_type;
  const void* grad = nullptr;
  Type grad_type = Type::kFloat;
  const float *offset, *range, *p;
  const int64_t* seed;
  bool need_offset = false;
  std::vector<Pass> passes = {};
  std::vector<int64_t> sum_start = {};  // first sum of each pass, in a row of `sums` doubles
  int64_t sums = 0;
  std::vector<std::array<Forward, 2>> forward = {};  // of each pass, and the same for rows that share β, r and z / n
  std::vector<std::array<Backward, 2>> backward = {};

  void prepare(bool table) {
    passes = make_passes(candidates, layout.groups, grad != nullptr);
    for (const Pass& pass : passes) {
      sum_start.push_back(sums);
      sums += sum_slots(pass.count);
      const Mode mode{.noise = seed != nullptr, .table = table, .shared = false, .offset = need_offset};
      Mode shared = mode;
      shared.shared = !mode.noise && !table;
      if (grad) {
        backward.push_back({find_backward(pass.count, mode), find_backward(pass.count, shared)});
      } else {
        forward.push_back({find_forward(pass.count, mode), find_forward(pass.count, shared)});
      }
    }
  }

  void fill(const Pass& pass, int64_t channel, float* slots, int64_t stride) const {
    const int64_t row = channel * candidates.count;
    fill_slots(pass, candidates, offset + row, range + row, p + row, grad != nullptr, slots, stride);
  }

  const float* x_floats() const { return x_type == Type::kFloat ? static_cast<const float*>(x) : nullptr; }
  bool whole(Type type) const { return type == Type::kFloat && layout.groups == 1; }
  bool direct() const {
    const bool outer = grad ? whole(grad_type) && out_type == Type::kFloat : whole(out_type);
    return x_type == Type::kFloat && outer && !seed;
  }

  // The pieces of storage [first, first + n) in the tensor of group m: f(position there, position in the block, length).
  template <typename F>
  void pieces(int64_t m, int64_t first, int64_t n, const F& f) const {
    for (int64_t done = 0; done < n;) {
      const int64_t i = first + done, inside = i % layout.block, length = std::min(layout.block - inside, n - done);
      f((i - inside) * layout.groups + m * layout.block + inside, done, length);
      done += length;
    }
  }
};

struct Buffers {
  alignas(64) float x[kBlock], noise[kBlock], outer[kBlock], dx[kBlock];
};

// What one row of parameters (or one table of them) means for the passes.
struct PassData {
  const float* parameters;
  float* sums;
  bool shared;
};

// The tile that starts at storage position `first`. Unless call.direct(), it is at most kBlock elements without gaps. `at` is the place of
// its first element in tables of parameters and sums.
inline void run_block(const Call& call, Buffers& b, int64_t first, const Tile& tile, const PassData* data, int64_t stride, int64_t at) {
  const int64_t n = tile.rows == 1 ? tile.n : tile.rows * tile.pitch;
  const float* x = call.x_floats() ? call.x_floats() + first : b.x;
  if (x == b.x) load_block(call.x_type, call.x, first, b.x, n);
  if (call.seed) philox_noise(static_cast<uint64_t>(*call.seed), static_cast<uint64_t>(first), n, b.noise);

  if (!call.grad) {
    const bool in_place = call.whole(call.out_type);
    float* out = in_place ? static_cast<float*>(call.out) + first : b.outer;
    for (size_t i = 0; i < call.passes.size(); ++i) {
      const Pass& pass = call.passes[i];
      call.forward[i][data[i].shared](pass, data[i].parameters + at, stride, x, b.noise, out, tile);
      if (pass.last && !in_place) {
        call.pieces(pass.group, first, n, [&](int64_t to, int64_t from, int64_t length) {
          store_block(call.out_type, call.out, to, out + from, length);
        });
      }
    }
    return;
  }
  const bool in_place = call.whole(call.grad_type);
  const float* grad = in_place ? static_cast<const float*>(call.grad) + first : b.outer;
  float* dx = call.out_type == Type::kFloat ? static_cast<float*>(call.out) + first : b.dx;
  for (size_t i = 0; i < call.passes.size(); ++i) {
    const Pass& pass = call.passes[i];
    if (pass.first && !in_place) {
      call.pieces(pass.group, first, n, [&](int64_t from, int64_t to, int64_t length) {
        load_block(call.grad_type, call.grad, from, b.outer + to, length);
      });
    }
    call.backward[i][data[i].shared](pass, data[i].parameters + at, stride, x, b.noise, grad, dx, data[i].sums + at, tile, i > 0);
  }
  if (dx == b.dx) store_block(call.out_type, call.out, first, dx, n);
}

}  // namespace qprune
