#include "common.h"

// moe for fp32: the mathematics and shapes of ops/moe.py, weights not packed, no act_quant. Expert
// by expert, as ops/moe_grouped.py: the tokens that chose one are gathered and go through matrix
// products of its size.

using MaybeTensor = std::optional<Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Experts {
  std::vector<Tensor> held;  // contiguous
  const float *x, *w13, *w2, *weight;
  float limit;
  int64_t N, K, E, I, d;
  int64_t padded;                           // I, rounded up to whole vectors
  std::vector<std::vector<int64_t>> pairs;  // of each expert: n K + k

  Experts(const Tensor& x_, const Tensor& w13_, const Tensor& w2_, const Tensor& idx_,
          const Tensor& weight_, double limit)
      : held{floats(x_), floats(w13_), floats(w2_), floats(weight_)}, limit(limit) {
    x = data(held[0]);
    w13 = data(held[1]);
    w2 = data(held[2]);
    weight = data(held[3]);
    N = idx_.size(0);
    K = idx_.size(1);
    E = w13_.size(0);
    I = w13_.size(1) / 2;
    d = w13_.size(2);
    padded = (I + 7) / 8 * 8;
    pairs.resize(E);
    const Tensor idx = indices(idx_);
    for (int64_t pair = 0; pair < N * K; pair++) {
      const int64_t e = int_data(idx)[pair];
      STD_TORCH_CHECK(0 <= e && e <= E, "moe: there is no expert ", e);
      if (e < E) pairs[e].push_back(pair);
    }
  }

  Matrix w1_or_w3(int64_t e, int k) const { return {w13 + (2 * e + k) * I * d, I, d, d}; }
  Matrix w2_of(int64_t e) const { return {w2 + e * d * I, d, I, I}; }

  // h13 [n, 2, padded]: W1 x and W3 x, of rows [n, d] of x
  void pre_activations(int64_t e, Matrix rows, float* h13) const {
    for (int k = 0; k < 2; k++)
      matmul(rows, w1_or_w3(e, k).T(), h13 + k * padded, 2 * padded);
  }
  // Rows [n, d], one for each pair of the expert, of those of its tokens
  Matrix gather(const float* tokens, int64_t e, std::vector<float>& rows) const {
    const int64_t n = pairs[e].size();
    float* to = ensure_size(rows, n * d);
    for (int64_t i = 0; i < n; i++)
      std::memcpy(to + i * d, tokens + pairs[e][i] / K * d, d * sizeof(float));
    return {to, n, d, d};
  }
  void scatter_add(const float* rows, int64_t e, float* tokens) const {
    for (size_t i = 0; i < pairs[e].size(); i++)
      add_scaled(tokens + pairs[e][i] / K * d, 1, rows + i * d, d);
  }
};

static Vec8 at_most(Vec8 x, Vec8 limit) { return x < limit ? x : limit; }
static Vec8 clamp(Vec8 x, Vec8 limit) { return at_most(x > -limit ? x : -limit, limit); }

static Tensor forward(const Experts& m, const Tensor& x) {
  const int64_t d = m.d, padded = m.padded;
  const Vec8 limit = Vec8{} + m.limit;
  Tensor y = torch::stable::new_empty(x, {m.N, d});
  Partials y_parts(y, count_parts(m.E));
  in_parts(m.E, [&](int64_t part, int64_t begin, int64_t end) {
    static thread_local std::vector<float> x_rows, h13_rows, h_rows, y_rows;
    float* y_part = y_parts.slice(part);
    for (int64_t e = begin; e < end; e++) {
      const int64_t n = m.pairs[e].size();
      if (n == 0) continue;
      float* h13 = ensure_size(h13_rows, n * 2 * padded);
      float* h = ensure_size(h_rows, n * padded);
      float* y_e = ensure_size(y_rows, n * d);
      m.pre_activations(e, m.gather(m.x, e, x_rows), h13);
      // h [n, I] = silu(gate) up weight
      for (int64_t t = 0; t < n; t++) {
        const float* row = h13 + t * 2 * padded;
        const float weight = m.weight[m.pairs[e][t]];
        for (int64_t i = 0; i < padded; i += 8) {
          const Vec8 gate = at_most(vec(row + i), limit);
          const Vec8 up = clamp(vec(row + padded + i), limit);
          vec(h + t * padded + i) = gate * sigmoid8(gate) * up * weight;
        }
      }
      // y += h W2^T
      matmul({h, n, m.I, padded}, m.w2_of(e).T(), y_e, d);
      m.scatter_add(y_e, e, y_part);
    }
  });
  y_parts.reduce();
  return y;
}

// One token of backward: h13 and g_h [I] to the gradients of h13, in place, and to h. Returns the
// gradient of weight.
static float act_backward(int64_t I, int64_t padded, float max, float weight, float* h13,
                          const float* g_h, float* h) {
  const Vec8 limit = Vec8{} + max, zero = {};
  for (int64_t i = 0; i < padded; i += 8) {
    const Vec8 gate = vec(h13 + i), up = vec(h13 + padded + i);
    const Vec8 gate_c = at_most(gate, limit), up_c = clamp(up, limit);
    const Vec8 sig = sigmoid8(gate_c), silu = gate_c * sig;
    const Vec8 g = vec(g_h + i) * weight;
    vec(h + i) = silu * up_c;
    vec(h13 + i) = gate <= limit ? g * up_c * sig * (1 + gate_c - silu) : zero;
    vec(h13 + padded + i) = up_c == up ? g * silu : zero;
  }
  const float g_weight = dot(g_h, h, I);
  vectorize(padded, [&](auto at) { at(h) *= weight; });
  return g_weight;
}

static Gradients backward(const Experts& m, const Tensor& g_, const Tensor& x) {
  const Tensor g = floats(g_);
  const int64_t I = m.I, d = m.d, padded = m.padded;
  Tensor g_x = torch::stable::new_empty(x, {m.N, d});
  Tensor g_w13 = torch::stable::new_empty(x, {m.E, 2 * I, d});
  Tensor g_w2 = torch::stable::new_empty(x, {m.E, d, I});
  Tensor g_weight = torch::stable::new_empty(x, {m.N, m.K});
  std::memset(data(g_weight), 0, m.N * m.K * sizeof(float));  // of pairs without an expert
  Partials g_x_parts(g_x, count_parts(m.E));
  in_parts(m.E, [&](int64_t part, int64_t begin, int64_t end) {
    static thread_local std::vector<float> x_rows, g_rows, h13_rows, h_rows, g_h_rows, g_x_rows;
    float* g_x_part = g_x_parts.slice(part);
    for (int64_t e = begin; e < end; e++) {
      const int64_t n = m.pairs[e].size();
      float* g_w13_e = data(g_w13) + e * 2 * I * d;
      float* g_w2_e = data(g_w2) + e * d * I;
      if (n == 0) {
        std::memset(g_w13_e, 0, 2 * I * d * sizeof(float));
        std::memset(g_w2_e, 0, d * I * sizeof(float));
        continue;
      }
      const Matrix x_e = m.gather(m.x, e, x_rows), g_e = m.gather(data(g), e, g_rows);
      float* h13 = ensure_size(h13_rows, n * 2 * padded);  // pre-activations, then their gradient
      float* h = ensure_size(h_rows, n * padded);
      float* g_h = ensure_size(g_h_rows, n * padded);
      float* g_x_e = ensure_size(g_x_rows, n * d);
      m.pre_activations(e, x_e, h13);
      // g_h [n, I] = g W2
      matmul(g_e, m.w2_of(e), g_h, padded);
      for (int64_t t = 0; t < n; t++) {
        const int64_t pair = m.pairs[e][t];
        data(g_weight)[pair] =
            act_backward(I, padded, m.limit, m.weight[pair], h13 + t * 2 * padded,
                         g_h + t * padded, h + t * padded);
      }
      // g_x = g_gate W1 + g_up W3; g_W1 = g_gate^T x, g_W3 = g_up^T x; g_W2 = g^T h
      for (int k = 0; k < 2; k++) {
        const Matrix g_k{h13 + k * padded, n, I, 2 * padded};
        matmul(g_k, m.w1_or_w3(e, k), g_x_e, d, k > 0);
        matmul(g_k.T(), x_e, g_w13_e + k * I * d, d);
      }
      matmul(g_e.T(), {h, n, I, padded}, g_w2_e, I);
      m.scatter_add(g_x_e, e, g_x_part);
    }
  });
  g_x_parts.reduce();
  return {g_x, g_w13, g_w2, g_weight};
}

Tensor moe(const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& idx,
           const Tensor& weight, const MaybeTensor&, const MaybeTensor&, double limit, bool) {
  return forward(Experts(x, w13, w2, idx, weight, limit), x);
}

Gradients moe_backward(const Tensor& g, const Tensor& x, const Tensor& w13, const Tensor& w2,
                       const Tensor& idx, const Tensor& weight, const MaybeTensor&,
                       const MaybeTensor&, double limit, bool) {
  return backward(Experts(x, w13, w2, idx, weight, limit), g, x);
}
