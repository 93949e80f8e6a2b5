// mix_quantize and its backward pass on CPU tensors: plain C functions, called from kernels/cpu/__init__.py. Threads take units of
// storage; each unit adds to its own partial sums, and those are added in order.

#include <ATen/Parallel.h>

#include "call.h"

namespace qprune {
namespace {

// Rows of one channel each. partial [parts, C, sums]
void run_rows(const Call& call, const Partition& cut, int64_t unit, double* partial) {
  const Layout& l = call.layout;
  const int64_t j = unit % cut.inner_parts, c = unit / cut.inner_parts % cut.channel_parts, r = unit / (cut.channel_parts * cut.inner_parts);
  const Range repeats = part(cut.repeats, cut.repeat_parts, r), channels = part(l.channels, cut.channel_parts, c);
  const Range inner = part(l.inner, cut.inner_parts, j);
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
      call.fill(call.passes[i], channel, own, 1);
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
        call.fill(pass, i / l.inner % l.channels, start + i, stride);
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
    for (int64_t at = 0; at < row; at += width) {
      run_block(call, buffers, first + at, {std::min(width, row - at), rows, length}, data.data(), table.stride, at);
    }
    first += rows * row;
    rows_since_flush += rows;
    if (call.grad && (rows_since_flush + height > kLong / kLanes || first >= end)) {
      flush();
      rows_since_flush = 0;
    }
  }
}

struct Gradients {
  float *offset, *range, *p;
};

// Gradients of the parameters of one channel from its sums over all parts.
void finish_channel(const Call& call, int64_t parts, int64_t channel, const double* partial, const Gradients& d) {
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
      d.range[k] = static_cast<float>(p * s[j] / pass.steps[j]);
      d.p[k] = static_cast<float>(call.offset[k] * s[3 * K] + step * s[K + j]);
      d.offset[k] = call.need_offset ? static_cast<float>(p * s[2 * K + j]) : 0.0f;
    }
    for (int64_t k = 0; k < call.candidates.count; ++k) {
      if (call.candidates.group[k] != pass.group || !pass.first || call.candidates.steps[k] > 0) continue;
      d.range[row + k] = d.offset[row + k] = 0.0f;
      d.p[row + k] = call.candidates.steps[k] == 0 ? 0.0f : static_cast<float>(s[3 * K + 1]);
    }
  }
}

void run(Call& call, const Gradients& gradients) {
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
    for (int64_t channel = begin; channel < end; ++channel) finish_channel(call, cut.parts(), channel, partial.data(), gradients);
  });
}

}  // namespace
}  // namespace qprune

// Both return 0, or 1 if memory ran out. Types: 0 float32, 1 bfloat16, 2 float16. seed may be null.
extern "C" {

int qprune_forward(const qprune::Layout* layout, const qprune::Candidates* candidates, const void* x, int64_t x_type, void* out,
                   int64_t out_type, const float* offset, const float* range, const float* p, const int64_t* seed) {
  try {
    qprune::Call call{.layout = *layout, .candidates = *candidates, .x = x, .x_type = qprune::Type(x_type), .out = out,
                      .out_type = qprune::Type(out_type), .offset = offset, .range = range, .p = p, .seed = seed};
    qprune::run(call, {});
    return 0;
  } catch (...) {
    return 1;
  }
}

int qprune_backward(const qprune::Layout* layout, const qprune::Candidates* candidates, const void* grad, int64_t grad_type, const void* x,
                    int64_t x_type, void* dx, const float* offset, const float* range, const float* p, const int64_t* seed,
                    int64_t need_offset, float* d_offset, float* d_range, float* d_p) {
  try {
    qprune::Call call{.layout = *layout, .candidates = *candidates, .x = x, .x_type = qprune::Type(x_type), .out = dx,
                      .out_type = qprune::Type(x_type), .grad = grad, .grad_type = qprune::Type(grad_type), .offset = offset,
                      .range = range, .p = p, .seed = seed, .need_offset = need_offset != 0};
    qprune::run(call, {d_offset, d_range, d_p});
    return 0;
  } catch (...) {
    return 1;
  }
}
}
