#include "common.h"

// moe_decode for fp32: the mathematics and shapes of ops/moe.py for few tokens. A matrix is read
// once, row by row, for up to four tokens.

constexpr int TOKENS = 4;

// out[t] = <w, x[t]>
template <int T>
static void dots(const float* w, int64_t n, const float* const* x, float* out) {
  Vec8 sum[T][2] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const Vec8 left = vec(w + i), right = vec(w + i + 8);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      sum[t][0] += left * vec(x[t] + i);
      sum[t][1] += right * vec(x[t] + i + 8);
    }
  }
  for (int t = 0; t < T; t++) {
    out[t] = sum_lanes(sum[t][0] + sum[t][1]);
    for (int64_t j = i; j < n; j++) out[t] += w[j] * x[t][j];
  }
}

// store(row, t, <row of w [rows, n], x[t]>) for every row and token
template <class Store>
static void multiply(const float* w, int64_t rows, int64_t n, const float* const* x, int T,
                     Store store) {
  const auto several = T == 2 ? dots<2> : T == 3 ? dots<3> : dots<4>;
  const int64_t rows_per_thread = (1 << 20) / n + 1;
  torch::stable::parallel_for(0, rows, rows_per_thread, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const float* w_row = w + row * n;
      float out[TOKENS];
      __builtin_prefetch(w_row + 8 * n);  // hardware stops at the end of a page
      if (T == 1) {
        out[0] = dot(w_row, x[0], n);
      } else {
        several(w_row, n, x, out);
      }
      for (int t = 0; t < T; t++) store(row, t, out[t]);
    }
  });
}

static float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
// The bits of the exponent: those of the power of two at or below |f|
static uint32_t exponent_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits & 0x7f800000u;
}

// x [n] through e4m3 and back, in blocks of 128 with scales that are powers of two (act_quant)
static void fake_quant_fp8(float* x, int64_t n) {
  for (int64_t begin = 0; begin < n; begin += 128) {
    const int64_t end = std::min(begin + 128, n);
    float amax = 1e-4f;
    for (int64_t i = begin; i < end; i++) amax = std::max(amax, std::fabs(x[i]));
    amax *= 1 / 448.f;
    float scale = as_float(exponent_bits(amax));
    if (scale < amax) scale *= 2;
    for (int64_t i = begin; i < end; i++) {
      const float v = x[i] / scale;
      // The last bit is worth 2^-3 of the value's power of two, which is at least 2^-6
      const float ulp = as_float(std::max(exponent_bits(v), 121u << 23) - (3u << 23));
      x[i] = std::nearbyint(v / ulp) * ulp * scale;
    }
  }
}

// h [I] = silu(gate) up weight of h13 [2I]
static void swiglu(const float* h13, int64_t I, float limit, float weight, float* h) {
  for (int64_t i = 0; i < I; i++) {
    const float gate = std::min(h13[i], limit);
    const float up = std::min(std::max(h13[I + i], -limit), limit);
    h[i] = gate / (1 + std::exp(-gate)) * up * weight;
  }
}

Tensor moe_decode(const Tensor& x_, const Tensor& w13_, const Tensor& w2_, const Tensor& idx_,
                  const Tensor& weight_, double limit, bool act_quant) {
  const Tensor x = floats(x_), w13 = floats(w13_), w2 = floats(w2_);
  const Tensor idx = indices(idx_), weight = floats(weight_);
  const int64_t N = idx.size(0), K = idx.size(1);
  const int64_t E = w13.size(0), I = w13.size(1) / 2, d = w13.size(2);
  for (int64_t pair = 0; pair < N * K; pair++) {
    const int64_t e = int_data(idx)[pair];
    STD_TORCH_CHECK(0 <= e && e < E, "moe_decode: there is no expert ", e);
  }
  const Tensor y_ = torch::stable::empty_like(x);
  float* y = data(y_);
  std::fill(y, y + N * d, 0.f);
  std::vector<float> xq(data(x), data(x) + N * d), h13(TOKENS * 2 * I), h(TOKENS * I);
  for (int64_t n = 0; act_quant && n < N; n++) fake_quant_fp8(xq.data() + n * d, d);
  std::vector<int64_t> pairs;  // n K + k, of the expert
  for (int64_t e = 0; e < E; e++) {
    pairs.clear();
    for (int64_t pair = 0; pair < N * K; pair++)
      if (int_data(idx)[pair] == e) pairs.push_back(pair);
    for (size_t begin = 0; begin < pairs.size(); begin += TOKENS) {
      const int64_t* pair = pairs.data() + begin;
      const int T = std::min<size_t>(TOKENS, pairs.size() - begin);
      const float *x_rows[TOKENS], *h_rows[TOKENS];
      for (int t = 0; t < T; t++) {
        x_rows[t] = xq.data() + pair[t] / K * d;
        h_rows[t] = h.data() + t * I;
      }
      multiply(data(w13) + e * 2 * I * d, 2 * I, d, x_rows, T,
               [&](int64_t row, int t, float value) { h13[t * 2 * I + row] = value; });
      for (int t = 0; t < T; t++) {
        swiglu(h13.data() + t * 2 * I, I, limit, data(weight)[pair[t]], h.data() + t * I);
        if (act_quant) fake_quant_fp8(h.data() + t * I, I);
      }
      multiply(data(w2) + e * d * I, d, I, h_rows, T,
               [&](int64_t row, int t, float value) { y[pair[t] / K * d + row] += value; });
    }
  }
  return y_;
}
