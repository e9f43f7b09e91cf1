#include "common.h"

struct Routed {
  const Tensor x_, w13_, w2_, idx_, weight_;
  const float *x, *w13, *w2, *weight, limit;
  const int64_t N, K, E, I, P, d;  // P: I, rounded up to whole vectors
  std::vector<std::vector<int64_t>> pairs;  // of each expert: n K + k
  std::vector<int64_t> first;  // of each expert: where its pairs begin, in the order of experts
  Routed(const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& idx, const Tensor& weight, double limit)
      : x_(floats(x)), w13_(floats(w13)), w2_(floats(w2)), idx_(packed(idx, ScalarType::Long)), weight_(floats(weight)), x(data(x_)),
        w13(data(w13_)), w2(data(w2_)), weight(data(weight_)), limit(limit), N(idx.size(0)), K(idx.size(1)), E(w13.size(0)),
        I(w13.size(1) / 2), P((I + 7) / 8 * 8), d(w13.size(2)), pairs(E), first(E + 1) {
    for (int64_t p = 0; p < N * K; p++) {
      const int64_t e = ((const int64_t*)idx_.data_ptr())[p];
      STD_TORCH_CHECK(0 <= e && e <= E, "moe: there is no expert ", e);
      if (e < E) pairs[e].push_back(p);
    }
    for (int64_t e = 0; e < E; e++) first[e + 1] = first[e] + pairs[e].size();
  }
  // Pre-activations [n, 2, P] of the rows of x of those who chose e
  void up(int64_t e, const std::vector<float>& xs, float* h13) const {
    const int64_t n = pairs[e].size();
    for (int k = 0; k < 2; k++) product({xs.data(), d, 1}, {w13 + (2 * e + k) * I * d, 1, d}, h13 + k * P, 2 * P, n, I, d, false);
  }
  void gather(const float* from, int64_t e, std::vector<float>& to) const {
    room(to, pairs[e].size() * d);
    for (size_t i = 0; i < pairs[e].size(); i++) std::memcpy(to.data() + i * d, from + pairs[e][i] / K * d, 4 * d);
  }
  void scatter(const std::vector<float>& from, int64_t e, float* to) const {
    for (size_t i = 0; i < pairs[e].size(); i++) add_scaled(to + pairs[e][i] / K * d, 1, from.data() + i * d, d);
  }
};

static Vec8 least(Vec8 x, Vec8 limit) { return x < limit ? x : limit; }
static Vec8 clamped(Vec8 x, Vec8 limit) { return least(x > -limit ? x : -limit, limit); }
static Vec8 sigmoid(Vec8 x) { return 1 / (1 + exponential(-x)); }

// kept: pre-activations of all pairs, in the order of experts, or null
static Tensor forward(const Routed& r, const Tensor& x, float* kept) {
  const int64_t I = r.I, P = r.P, d = r.d;
  const Vec8 most = Vec8{} + r.limit;
  Tensor y = torch::stable::new_empty(x, {r.N, d});
  Sums of_y(y, parts_of(r.E));
  in_parts(r.E, [&](int64_t part, int64_t begin, int64_t end) {
    static thread_local std::vector<float> xs, h13, h, ys;
    float* sum = of_y.of(part);
    for (int64_t e = begin; e < end; e++) {
      const int64_t n = r.pairs[e].size();
      if (!n) continue;
      float* rows = kept ? kept + r.first[e] * 2 * P : room(h13, n * 2 * P);
      r.gather(r.x, e, xs), r.up(e, xs, rows);
      room(h, n * P), room(ys, n * d);
      for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < P; i += 8) {
          const Vec8 gate = least(vec(rows + t * 2 * P + i), most), up = clamped(vec(rows + t * 2 * P + P + i), most);
          vec(h.data() + t * P + i) = gate * sigmoid(gate) * up * r.weight[r.pairs[e][t]];
        }
      product({h.data(), P, 1}, {r.w2 + e * d * I, 1, I}, ys.data(), d, n, d, I, false);
      r.scatter(ys, e, sum);
    }
  });
  of_y.finish();
  return y;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;
static Gradients backward(const Routed& r, const Tensor& g_, const Tensor& x, const float* kept) {
  const Tensor g = floats(g_);
  const int64_t I = r.I, P = r.P, d = r.d;
  const Vec8 most = Vec8{} + r.limit, zero = {};
  Tensor g_x = torch::stable::new_empty(x, {r.N, d}), g_w13 = torch::stable::new_empty(x, {r.E, 2 * I, d});
  Tensor g_w2 = torch::stable::new_empty(x, {r.E, d, I}), g_weight = torch::stable::new_empty(x, {r.N, r.K});
  std::memset(data(g_weight), 0, 4 * r.N * r.K);  // pairs without an expert
  Sums of_x(g_x, parts_of(r.E));
  in_parts(r.E, [&](int64_t part, int64_t begin, int64_t end) {
    static thread_local std::vector<float> xs, gs, h13, h, g_h, g_xs;
    float* sum = of_x.of(part);
    for (int64_t e = begin; e < end; e++) {
      const int64_t n = r.pairs[e].size();
      float *to13 = data(g_w13) + e * 2 * I * d, *to2 = data(g_w2) + e * d * I;
      const float *w13 = r.w13 + e * 2 * I * d, *w2 = r.w2 + e * d * I;
      r.gather(r.x, e, xs);
      float* g13s = room(h13, n * 2 * P);
      if (!kept) r.up(e, xs, g13s);
      r.gather(data(g), e, gs);
      room(h, n * P), room(g_h, n * P), room(g_xs, n * d);
      product({gs.data(), d, 1}, {w2, I, 1}, g_h.data(), P, n, I, d, false);
      for (int64_t t = 0; t < n; t++) {  // pre-activations to their gradient, maybe in place
        float *row = g13s + t * 2 * P, *to = h.data() + t * P, *from = g_h.data() + t * P;
        const float* pre = kept ? kept + (r.first[e] + t) * 2 * P : row;
        const float w = r.weight[r.pairs[e][t]];
        for (int64_t i = 0; i < P; i += 8) {
          const Vec8 gate = vec(pre + i), up = vec(pre + P + i), v = least(gate, most), u = clamped(up, most);
          const Vec8 sig = sigmoid(v), silu = v * sig, g = vec(from + i) * w;
          vec(to + i) = silu * u;
          vec(row + i) = gate <= most ? g * u * sig * (1 + v - silu) : zero;
          vec(row + P + i) = u == up ? g * silu : zero;
        }
        data(g_weight)[r.pairs[e][t]] = dot(from, to, I);
        each(P, [&](auto at) { at(to) *= w; });
      }
      for (int k = 0; k < 2; k++) {
        const float* g13 = g13s + k * P;
        product({g13, 2 * P, 1}, {w13 + k * I * d, d, 1}, g_xs.data(), d, n, d, I, k);
        product({g13, 1, 2 * P}, {xs.data(), d, 1}, to13 + k * I * d, d, I, d, n, false);
      }
      product({gs.data(), 1, d}, {h.data(), P, 1}, to2, I, d, I, n, false);
      r.scatter(g_xs, e, sum);
    }
  });
  of_x.finish();
  return {g_x, g_w13, g_w2, g_weight};
}

Tensor moe(const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& idx, const Tensor& weight, const std::optional<Tensor>&,
           const std::optional<Tensor>&, double limit, bool) {
  return forward(Routed(x, w13, w2, idx, weight, limit), x, nullptr);
}

Gradients moe_backward(const Tensor& g, const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& idx, const Tensor& weight,
                       const std::optional<Tensor>&, const std::optional<Tensor>&, double limit, bool) {
  return backward(Routed(x, w13, w2, idx, weight, limit), g, x, nullptr);
}

std::tuple<Tensor, Tensor> moe_train(const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& idx, const Tensor& weight, double limit) {
  const Routed r(x, w13, w2, idx, weight, limit);
  Tensor h13 = torch::stable::new_empty(x, {r.N * r.K, 2 * r.P});
  if (r.P > r.I || r.first[r.E] < r.N * r.K) std::memset(data(h13), 0, 4 * h13.numel());  // what no product fills
  return {forward(r, x, data(h13)), h13};
}

Gradients moe_train_backward(const Tensor& g, const Tensor& h13, const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& idx,
                            const Tensor& weight, double limit) {
  const Tensor kept = floats(h13);
  return backward(Routed(x, w13, w2, idx, weight, limit), g, x, data(kept));
}
