#include "common.h"

constexpr int TOKENS = 4;

// out[t] = <w, x[t]>
template <int T> void dots(const float* w, int64_t n, const float* const* x, float* out) {
  Vec8 sum[T][2] = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const Vec8 left = vec(w + i), right = vec(w + i + 8);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sum[t][0] += left * vec(x[t] + i), sum[t][1] += right * vec(x[t] + i + 8);
  }
  for (int t = 0; t < T; t++) {
    out[t] = total(sum[t][0] + sum[t][1]);
    for (int64_t j = i; j < n; j++) out[t] += w[j] * x[t][j];
  }
}

// store(row, t, <row of w [rows, n], x[t]>) for every row and token
template <class Store> void product(const float* w, int64_t rows, int64_t n, const float* const* x, int T, Store store) {
  const auto some = T == 2 ? dots<2> : T == 3 ? dots<3> : dots<4>;
  torch::stable::parallel_for(0, rows, (1 << 20) / n + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      float out[TOKENS];
      __builtin_prefetch(w + (row + 8) * n);  // hardware stops at the end of a page
      if (T == 1) out[0] = dot(w + row * n, x[0], n);
      else some(w + row * n, n, x, out);
      for (int t = 0; t < T; t++) store(row, t, out[t]);
    }
  });
}

float with_exponent(uint32_t bits) { float f; std::memcpy(&f, &bits, 4); return f; }
uint32_t exponent(float f) { uint32_t bits; std::memcpy(&bits, &f, 4); return bits & 0x7f800000u; }

// x [n] through e4m3 and back, in blocks of 128 (act_quant)
void fp8(float* x, int64_t n) {
  for (int64_t at = 0; at < n; at += 128) {
    const int64_t end = std::min(at + 128, n);
    float amax = 1e-4f;
    for (int64_t i = at; i < end; i++) amax = std::max(amax, std::fabs(x[i]));
    amax *= 1 / 448.f;
    float scale = with_exponent(exponent(amax));
    if (scale < amax) scale *= 2;
    for (int64_t i = at; i < end; i++) {
      const float v = x[i] / scale;  // its last bit is worth 2^-3 of its power of two, at least 2^-9
      const float bit = with_exponent(std::max(exponent(v), 121u << 23) - (3u << 23));
      x[i] = std::nearbyint(v / bit) * bit * scale;
    }
  }
}

static void run(const float* x, const float* w13, const float* w2, const int64_t* idx, const float* weight, float* y, int64_t N,
                int64_t K, int64_t E, int64_t I, int64_t d, float limit, bool act_quant) {
  std::vector<float> xs(x, x + N * d), h13(TOKENS * 2 * I), h(TOKENS * I);
  std::vector<int64_t> pairs;  // of token and expert
  if (act_quant) for (int64_t n = 0; n < N; n++) fp8(xs.data() + n * d, d);
  std::fill(y, y + N * d, 0.f);
  for (int64_t e = 0; e < E; e++) {
    pairs.clear();
    for (int64_t p = 0; p < N * K; p++) if (idx[p] == e) pairs.push_back(p);
    for (size_t at = 0; at < pairs.size(); at += TOKENS) {
      const int64_t* pair = pairs.data() + at;
      const int T = std::min<size_t>(TOKENS, pairs.size() - at);
      const float *in[TOKENS], *hs[TOKENS];
      for (int t = 0; t < T; t++) in[t] = xs.data() + pair[t] / K * d, hs[t] = h.data() + t * I;
      product(w13 + e * 2 * I * d, 2 * I, d, in, T, [&](int64_t row, int t, float value) { h13[t * 2 * I + row] = value; });
      for (int t = 0; t < T; t++) {
        for (int64_t i = 0; i < I; i++) {
          const float gate = std::min(h13[t * 2 * I + i], limit), up = std::min(std::max(h13[t * 2 * I + I + i], -limit), limit);
          h[t * I + i] = gate / (1 + std::exp(-gate)) * up * weight[pair[t]];
        }
        if (act_quant) fp8(h.data() + t * I, I);
      }
      product(w2 + e * d * I, d, I, hs, T, [&](int64_t row, int t, float value) { y[pair[t] / K * d + row] += value; });
    }
  }
}

Tensor moe_decode(const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& idx, const Tensor& weight, double limit, bool act_quant) {
  const Tensor in[] = {floats(x), floats(w13), floats(w2), packed(idx, ScalarType::Long), floats(weight)};
  const Tensor y = torch::stable::empty_like(in[0]);
  for (int64_t p = 0; p < idx.numel(); p++) {
    const int64_t e = ((const int64_t*)in[3].data_ptr())[p];
    STD_TORCH_CHECK(0 <= e && e < w13.size(0), "moe_decode: there is no expert ", e);
  }
  run((const float*)in[0].data_ptr(), (const float*)in[1].data_ptr(), (const float*)in[2].data_ptr(), (const int64_t*)in[3].data_ptr(),
      (const float*)in[4].data_ptr(), (float*)y.data_ptr(), idx.size(0), idx.size(1), w13.size(0), w13.size(1) / 2, w13.size(2), limit,
      act_quant);
  return y;
}
