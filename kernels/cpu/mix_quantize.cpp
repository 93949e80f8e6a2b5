// mix_quantize and its backward pass on CPU tensors: plain C functions, called from kernels/cpu/__init__.py.

#include <ATen/Parallel.h>

#include <array>
#include <utility>

#include "philox.h"
#include "plan.h"

namespace qprune {
namespace {

constexpr int64_t kBlock = 1024;   // elements between buffers that stay in the first-level cache
constexpr int64_t kLong = 4096;    // elements that a float32 lane sum may cover (256 terms a lane)

using Forward = decltype(&forward_run<1, Mode{}>);
using Backward = decltype(&backward_run<1, Mode{}>);

template <Mode mode, int... K>
Forward forward_of(int k, std::integer_sequence<int, K...>) {
  static constexpr Forward all[] = {&forward_run<K, mode>...};
  return all[k];
}

template <Mode mode, int... K>
Backward backward_of(int k, std::integer_sequence<int, K...>) {
  static constexpr Backward all[] = {&backward_run<K, mode>...};
  return all[k];
}

constexpr auto kCounts = std::make_integer_sequence<int, kMost + 1>();

Forward find_forward(int k, const Mode& mode) {
  if (mode.noise) return mode.table ? forward_of<Mode{.noise = true, .table = true}>(k, kCounts) : forward_of<Mode{.noise = true}>(k, kCounts);
  if (mode.table) return forward_of<Mode{.table = true}>(k, kCounts);
  return mode.shared ? forward_of<Mode{.shared = true}>(k, kCounts) : forward_of<Mode{}>(k, kCounts);
}

// Only the most frequent mode has a variant without the sum for the offset: each one costs time to compile.
Backward find_backward(int k, const Mode& mode) {
  if (mode.noise && mode.table) return backward_of<Mode{.noise = true, .table = true, .offset = true}>(k, kCounts);
  if (mode.noise) return backward_of<Mode{.noise = true, .offset = true}>(k, kCounts);
  if (mode.table) return backward_of<Mode{.table = true, .offset = true}>(k, kCounts);
  if (mode.shared) return backward_of<Mode{.shared = true, .offset = true}>(k, kCounts);
  return mode.offset ? backward_of<Mode{.offset = true}>(k, kCounts) : backward_of<Mode{}>(k, kCounts);
}

// Everything that one call needs. `grad` set: backward.
struct Call {
  Layout layout;
  Candidates candidates;
  const void* x;
  Type x_type;
  void* out;  // dx in the backward pass
  Type out_type;
  const void* grad;
  Type grad_type;
  const float *offset, *range, *p;
  const int64_t* seed;
  bool need_offset;
  std::vector<Pass> passes;
  std::vector<int64_t> sum_start;  // first sum of each pass, in a row of `sums` doubles
  int64_t sums = 0;
  std::vector<std::array<Forward, 2>> forward;  // of each pass, and the same for rows that share β, r and z / n
  std::vector<std::array<Backward, 2>> backward;

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

// The tile that starts at storage position `first`. Unless call.direct(), it is at most kBlock elements without gaps. `at` is the place of its first
// element in tables of parameters and sums.
void run_block(const Call& call, Buffers& b, int64_t first, const Tile& tile, const PassData* data, int64_t stride, int64_t at) {
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
        call.pieces(pass.group, first, n, [&](int64_t to, int64_t from, int64_t length) { store_block(call.out_type, call.out, to, out + from, length); });
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
      call.pieces(pass.group, first, n, [&](int64_t from, int64_t to, int64_t length) { load_block(call.grad_type, call.grad, from, b.outer + to, length); });
    }
    call.backward[i][data[i].shared](pass, data[i].parameters + at, stride, x, b.noise, grad, dx, data[i].sums + at, tile, i > 0);
  }
  if (dx == b.dx) store_block(call.out_type, call.out, first, dx, n);
}

// Rows of one channel each. partial [parts, C, sums]
void run_rows(const Call& call, const Partition& cut, int64_t unit, double* partial) {
  const Layout& l = call.layout;
  const int64_t r = unit / (cut.channel_parts * cut.inner_parts), c = unit / cut.inner_parts % cut.channel_parts, j = unit % cut.inner_parts;
  const Range repeats = part(cut.repeats, cut.repeat_parts, r), channels = part(l.channels, cut.channel_parts, c), inner = part(l.inner, cut.inner_parts, j);
  // Channels that come back keep their parameters and lane sums; one that does not passes them on to the next.
  const bool come_back = repeats.end - repeats.begin > 1;
  const int64_t places = come_back ? channels.end - channels.begin : 1, k = call.candidates.count;
  const int64_t passes = static_cast<int64_t>(call.passes.size()), slots_per_pass = parameter_slots(kMost);
  std::vector<float> slots(places * passes * slots_per_pass), lanes(call.grad ? places * call.sums * kLanes : 0);
  std::vector<PassData> data(places * passes);
  Buffers buffers;
  const int64_t longest = call.direct() ? kLong : kBlock;
  int64_t terms = 0;

  auto prepare = [&](int64_t place, int64_t channel) {
    for (int64_t i = 0; i < passes; ++i) {
      float* const own = slots.data() + (place * passes + i) * slots_per_pass;
      fill_slots(call.passes[i], call.candidates, call.offset + channel * k, call.range + channel * k, call.p + channel * k, call.grad != nullptr, own, 1);
      float* const sums = call.grad ? lanes.data() + (place * call.sums + call.sum_start[i]) * kLanes : nullptr;
      data[place * passes + i] = {own, sums, shares(call.passes[i], own)};
    }
  };
  auto flush = [&](int64_t place, int64_t channel) {
    double* const totals = partial + ((r * cut.inner_parts + j) * l.channels + channel) * call.sums;
    float* const own = lanes.data() + place * call.sums * kLanes;
    for (int64_t s = 0; s < call.sums; ++s) totals[s] += lane_sum(own + s * kLanes);
    std::fill_n(own, call.sums * kLanes, 0.0f);
  };

  for (int64_t repeat = repeats.begin; repeat < repeats.end; ++repeat) {
    terms += inner.end - inner.begin;
    const bool last = repeat + 1 == repeats.end || terms + inner.end - inner.begin > kLong;
    for (int64_t channel = channels.begin; channel < channels.end; ++channel) {
      const int64_t place = come_back ? channel - channels.begin : 0, row = (repeat * l.channels + channel) * l.inner;
      if (!come_back || repeat == repeats.begin) prepare(place, channel);
      for (int64_t i = inner.begin; i < inner.end; i += longest) {
        const int64_t n = std::min(longest, inner.end - i);
        run_block(call, buffers, row + i, {n, 1, 0}, data.data() + place * passes, 1, 0);
        if (call.grad && (last || i + n < inner.end)) flush(place, channel);
      }
    }
    if (last) terms = 0;
  }
}

// Parameters for Mode::table: for each pass a block of [slots, stride] floats whose columns repeat the channels of the storage.
struct Table {
  int64_t period, length, stride;
  std::vector<float> data;
  std::vector<const float*> parameters;

  explicit Table(const Call& call) {
    const Layout& l = call.layout;
    period = l.channels * l.inner;
    length = period * std::max<int64_t>(256 / period, 1);
    stride = (length + kLanes - 1) / kLanes * kLanes;
    int64_t rows = 0;
    for (const Pass& pass : call.passes) rows += parameter_slots(pass.count);
    data.resize(rows * stride);
    rows = 0;
    for (const Pass& pass : call.passes) {
      float* const start = data.data() + rows * stride;
      parameters.push_back(start);
      rows += parameter_slots(pass.count);
      for (int64_t i = 0; i < length; ++i) {
        const int64_t row = i / l.inner % l.channels * call.candidates.count;
        fill_slots(pass, call.candidates, call.offset + row, call.range + row, call.p + row, call.grad != nullptr, start + i, stride);
      }
    }
  }
};

void run_table(const Call& call, const Partition& cut, const Table& table, int64_t unit, double* partial) {
  const Range repeats = part(cut.repeats, cut.repeat_parts, unit);
  const int64_t begin = repeats.begin * table.period, end = repeats.end * table.period, length = table.length;
  std::vector<float> columns(call.grad ? call.sums * table.stride : 0);
  std::vector<PassData> data;
  for (size_t i = 0; i < call.passes.size(); ++i) {
    data.push_back({table.parameters[i], call.grad ? columns.data() + call.sum_start[i] * table.stride : nullptr, false});
  }
  Buffers buffers;
  // Columns are walked down several rows at a time, so that parameters and sums stay in registers; a tile fits the first-level cache.
  const bool direct = call.direct();
  const int64_t width = std::min(length, direct ? 256 : kBlock), height = direct ? 16 : std::max<int64_t>(kBlock / length, 1);
  auto flush = [&] {
    double* const totals = partial + unit * call.layout.channels * call.sums;
    for (int64_t s = 0; s < call.sums; ++s) {
      for (int64_t start = 0, channel = 0; start < length; start += call.layout.inner) {
        for (int64_t i = start; i < start + call.layout.inner; ++i) totals[channel * call.sums + s] += columns[s * table.stride + i];
        if (++channel == call.layout.channels) channel = 0;
      }
    }
    std::fill(columns.begin(), columns.end(), 0.0f);
  };
  int64_t rows_since_flush = 0;
  for (int64_t first = begin; first < end;) {
    // the last row may be incomplete, and is then a tile of its own
    const int64_t rows = std::clamp<int64_t>((end - first) / length, 1, height), row = std::min(length, end - first);
    for (int64_t at = 0; at < row; at += width) run_block(call, buffers, first + at, {std::min(width, row - at), rows, length}, data.data(), table.stride, at);
    first += rows * row;
    rows_since_flush += rows;
    if (call.grad && (rows_since_flush + height > kLong / kLanes || first >= end)) {
      flush();
      rows_since_flush = 0;
    }
  }
}

// Gradients of the parameters of one channel from its sums over all parts.
void finish_channel(const Call& call, int64_t parts, int64_t channel, const double* partial, float* d_offset, float* d_range, float* d_p) {
  const int64_t row = channel * call.candidates.count;
  std::vector<double> sum(call.sums, 0.0);
  for (int64_t part = 0; part < parts; ++part) {
    const double* const from = partial + (part * call.layout.channels + channel) * call.sums;
    for (int64_t s = 0; s < call.sums; ++s) sum[s] += from[s];
  }
  for (size_t i = 0; i < call.passes.size(); ++i) {
    const Pass& pass = call.passes[i];
    const double* const s = sum.data() + call.sum_start[i];
    const int K = pass.count;
    for (int j = 0; j < K; ++j) {
      const int64_t k = row + pass.index[j];
      const double p = call.p[k], step = call.range[k] / pass.steps[j];
      d_range[k] = static_cast<float>(p * s[j] / pass.steps[j]);
      d_p[k] = static_cast<float>(call.offset[k] * s[3 * K] + step * s[K + j]);
      d_offset[k] = call.need_offset ? static_cast<float>(p * s[2 * K + j]) : 0.0f;
    }
    for (int64_t k = 0; k < call.candidates.count; ++k) {
      if (call.candidates.group[k] != pass.group || !pass.first || call.candidates.steps[k] > 0) continue;
      d_range[row + k] = d_offset[row + k] = 0.0f;
      d_p[row + k] = call.candidates.steps[k] == 0 ? 0.0f : static_cast<float>(s[3 * K + 1]);
    }
  }
}

void run(Call& call, float* d_offset, float* d_range, float* d_p) {
  const Partition cut(call.layout);
  call.prepare(cut.table);
  std::vector<double> partial(call.grad ? cut.parts() * call.layout.channels * call.sums : 0, 0.0);
  if (cut.table) {
    const Table table(call);
    at::parallel_for(0, cut.units(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) run_table(call, cut, table, unit, partial.data());
    });
  } else {
    at::parallel_for(0, cut.units(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) run_rows(call, cut, unit, partial.data());
    });
  }
  if (!call.grad) return;
  at::parallel_for(0, call.layout.channels, 256, [&](int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel) finish_channel(call, cut.parts(), channel, partial.data(), d_offset, d_range, d_p);
  });
}

}  // namespace
}  // namespace qprune

// Both return 0, or 1 if memory ran out. Types: 0 float32, 1 bfloat16, 2 float16. seed may be null.
extern "C" {

int qprune_forward(const qprune::Layout* layout, const qprune::Candidates* candidates, const void* x, int64_t x_type, void* out, int64_t out_type,
                   const float* offset, const float* range, const float* p, const int64_t* seed) {
  using qprune::Type;
  try {
    qprune::Call call{*layout, *candidates, x, Type(x_type), out, Type(out_type), nullptr, Type::kFloat, offset, range, p, seed, false, {}, {}, 0, {}, {}};
    qprune::run(call, nullptr, nullptr, nullptr);
    return 0;
  } catch (...) {
    return 1;
  }
}

int qprune_backward(const qprune::Layout* layout, const qprune::Candidates* candidates, const void* grad, int64_t grad_type, const void* x,
                    int64_t x_type, void* dx, const float* offset, const float* range, const float* p, const int64_t* seed, int64_t need_offset,
                    float* d_offset, float* d_range, float* d_p) {
  using qprune::Type;
  try {
    qprune::Call call{*layout, *candidates, x,    Type(x_type), dx, Type(x_type), grad, Type(grad_type), offset, range, p,
                      seed,    need_offset != 0, {},           {}, 0,            {},   {}};
    qprune::run(call, d_offset, d_range, d_p);
    return 0;
  } catch (...) {
    return 1;
  }
}
}
