"""moe for fp32 on CPU, in C++ (see cpp.py): the mathematics and shapes of moe.py, weights not packed, no act_quant.

Expert by expert, as there: the tokens that chose one are gathered and go through matrix products of its size.
"""
SOURCE = r"""
struct Routed {
  const Tensor x_, w13_, w2_, idx_, weight_;
  const float *x, *w13, *w2, *weight, limit;
  const int64_t N, K, E, I, P, d;  // P: I, rounded up to whole vectors
  std::vector<std::vector<int64_t>> pairs;  // of each expert: n K + k
  Routed(const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& idx, const Tensor& weight, double limit)
      : x_(floats(x)), w13_(floats(w13)), w2_(floats(w2)), idx_(packed(idx, ScalarType::Long)), weight_(floats(weight)), x(data(x_)),
        w13(data(w13_)), w2(data(w2_)), weight(data(weight_)), limit(limit), N(idx.size(0)), K(idx.size(1)), E(w13.size(0)),
        I(w13.size(1) / 2), P((I + 7) / 8 * 8), d(w13.size(2)), pairs(E) {
    for (int64_t p = 0; p < N * K; p++) {
      const int64_t e = ((const int64_t*)idx_.data_ptr())[p];
      STD_TORCH_CHECK(0 <= e && e <= E, "moe: there is no expert ", e);
      if (e < E) pairs[e].push_back(p);
    }
  }
  // The rows of x of those who chose e, and their pre-activations [n, 2, P]
  void expert(int64_t e, std::vector<float>& xs, std::vector<float>& h13) const {
    const int64_t n = pairs[e].size();
    gather(x, e, xs);
    room(h13, n * 2 * P);
    for (int k = 0; k < 2; k++) product({xs.data(), d, 1}, {w13 + (2 * e + k) * I * d, 1, d}, h13.data() + k * P, 2 * P, n, I, d, false);
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

Tensor moe(const Tensor& x, const Tensor& w13, const Tensor& w2, const Tensor& idx, const Tensor& weight, const std::optional<Tensor>&,
           const std::optional<Tensor>&, double limit, bool) {
  const Routed r(x, w13, w2, idx, weight, limit);
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
      r.expert(e, xs, h13);
      room(h, n * P), room(ys, n * d);
      for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < P; i += 8) {
          const Vec8 gate = least(vec(h13.data() + t * 2 * P + i), most), up = clamped(vec(h13.data() + t * 2 * P + P + i), most);
          vec(h.data() + t * P + i) = gate * sigmoid(gate) * up * r.weight[r.pairs[e][t]];
        }
      product({h.data(), P, 1}, {r.w2 + e * d * I, 1, I}, ys.data(), d, n, d, I, false);
      r.scatter(ys, e, sum);
    }
  });
  of_y.finish();
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_backward(const Tensor& g_, const Tensor& x, const Tensor& w13, const Tensor& w2,
    const Tensor& idx, const Tensor& weight, const std::optional<Tensor>&, const std::optional<Tensor>&, double limit, bool) {
  const Routed r(x, w13, w2, idx, weight, limit);
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
      r.expert(e, xs, h13);
      r.gather(data(g), e, gs);
      room(h, n * P), room(g_h, n * P), room(g_xs, n * d);
      product({gs.data(), d, 1}, {w2, I, 1}, g_h.data(), P, n, I, d, false);
      for (int64_t t = 0; t < n; t++) {  // h13 becomes its gradient
        float *row = h13.data() + t * 2 * P, *to = h.data() + t * P, *from = g_h.data() + t * P;
        const float w = r.weight[r.pairs[e][t]];
        for (int64_t i = 0; i < P; i += 8) {
          Vec8 &gate = vec(row + i), &up = vec(row + P + i), v = least(gate, most), u = clamped(up, most);
          const Vec8 sig = sigmoid(v), silu = v * sig, g = vec(from + i) * w;
          vec(to + i) = silu * u;
          gate = gate <= most ? g * u * sig * (1 + v - silu) : zero;
          up = clamped(up, most) == up ? g * silu : zero;
        }
        data(g_weight)[r.pairs[e][t]] = dot(from, to, I);
        for (int64_t i = 0; i < P; i++) to[i] *= w;
      }
      for (int k = 0; k < 2; k++) {
        const float* g13 = h13.data() + k * P;
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
"""
