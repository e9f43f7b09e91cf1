#include "common.h"

constexpr int64_t BLOCK = 32, LANES = 8;  // tokens

static Vec8 sigmoid(Vec8 x) { return 1 / (1 + exponential(-x)); }

constexpr int64_t FEW = 4;  // for fewer tokens fn is not packed

// rows: of fn; padded: those, in whole vectors. by_row: fn^T, for many tokens; by_column: fn, for backward
struct Constants { int64_t n, d, rows, padded, iters; float norm_eps, hc_eps; const float *fn, *base, *scale; Packed by_row, by_column; };

// In place, c [n, n]: softmax of rows plus eps, then columns, rows, columns .. divided by sums plus eps. steps, if given: all
// that backward needs, the softmax, then the matrix and 1 / sums of every division
static void sinkhorn(Vec8* c, const Constants& k, Vec8* steps) {
  const int64_t n = k.n;
  for (int64_t i = 0; i < n; i++) {
    Vec8 *row = c + i * n, top = row[0], sum = {};
    for (int64_t j = 1; j < n; j++) top = row[j] > top ? row[j] : top;
    for (int64_t j = 0; j < n; j++) sum += row[j] = exponential(row[j] - top);
    for (int64_t j = 0; j < n; j++) row[j] /= sum;
  }
  if (steps) std::memcpy(steps, c, n * n * sizeof *c), steps += n * n;
  for (int64_t i = 0; i < n * n; i++) c[i] += k.hc_eps;
  for (int64_t step = 0; step < 2 * k.iters - 1; step++) {
    const int64_t along = step % 2 ? 1 : n, across = step % 2 ? n : 1;
    Vec8 inverse[16];
    for (int64_t i = 0; i < n; i++) {
      Vec8 sum = Vec8{} + k.hc_eps;
      for (int64_t j = 0; j < n; j++) sum += c[i * across + j * along];
      inverse[i] = 1 / sum;
      for (int64_t j = 0; j < n; j++) c[i * across + j * along] *= inverse[i];
    }
    if (steps) std::memcpy(steps, c, n * n * sizeof *c), std::memcpy(steps + n * n, inverse, n * sizeof *c), steps += n * (n + 1);
  }
}

static void sinkhorn_backward(Vec8* g, const Constants& k, const Vec8* steps) {
  const int64_t n = k.n;
  for (int64_t step = 2 * k.iters - 2; step >= 0; step--) {
    const Vec8 *c = steps + n * n + step * n * (n + 1), *inverse = c + n * n;
    const int64_t along = step % 2 ? 1 : n, across = step % 2 ? n : 1;
    for (int64_t i = 0; i < n; i++) {
      Vec8 sum = {};
      for (int64_t j = 0; j < n; j++) sum += g[i * across + j * along] * c[i * across + j * along];
      for (int64_t j = 0; j < n; j++) g[i * across + j * along] = (g[i * across + j * along] - sum) * inverse[i];
    }
  }
  for (int64_t i = 0; i < n; i++) {
    Vec8 sum = {};
    for (int64_t j = 0; j < n; j++) sum += g[i * n + j] * steps[i * n + j];
    for (int64_t j = 0; j < n; j++) g[i * n + j] = steps[i * n + j] * (g[i * n + j] - sum);
  }
}

// The un-normalised mix of up to BLOCK tokens, u [padded, BLOCK], and 1 / rms
static void mix(const Constants& k, const float* x, int64_t count, float* u, float* r) {
  const int64_t width = k.n * k.d;
  std::vector<float> v(BLOCK * k.padded);
  std::fill(r, r + BLOCK, 0.f);
  if (k.by_row.N) product({x, width, 1}, k.by_row, v.data(), k.padded, count, false);
  for (int64_t t = 0; t < count; t++) {
    const float* of_t = x + t * width;
    for (int64_t i = 0; i < k.rows && !k.by_row.N; i++) v[t * k.padded + i] = dot(k.fn + i * width, of_t, width);
    r[t] = 1 / std::sqrt(dot(of_t, of_t, width) / width + k.norm_eps);
  }
  for (int64_t t = 0; t < BLOCK; t += 8)
    for (int64_t i = 0; i < k.padded; i += 8) transpose(v.data() + t * k.padded + i, k.padded, u + i * BLOCK + t, BLOCK);
}
// Row i of it, normalised, as a logit
static Vec8 logit(const Constants& k, float* u, float* r, int64_t i, int64_t lane) {
  const float scale = k.scale[i < k.n ? 0 : i < 2 * k.n ? 1 : 2];
  return vec(u + i * BLOCK + lane) * vec(r + lane) * scale + k.base[i];
}

static void pre(const Constants& k, const float* x, int64_t count, float* y, float* post, float* comb) {
  const int64_t n = k.n, d = k.d;
  std::vector<float> u(k.padded * BLOCK), room(LANES * n * n);
  Vec8* c = &vec(room.data());
  float r[BLOCK];
  mix(k, x, count, u.data(), r);
  for (int64_t lane = 0; lane < count; lane += LANES) {
    Vec8 share[16];
    const int64_t some = std::min(LANES, count - lane);
    for (int64_t j = 0; j < n; j++) share[j] = sigmoid(logit(k, u.data(), r, j, lane)) + k.hc_eps;
    for (int64_t j = 0; j < n * n; j++) c[j] = logit(k, u.data(), r, 2 * n + j, lane);
    sinkhorn(c, k, nullptr);
    for (int64_t j = 0; j < n; j++) {
      const Vec8 p = 2 * sigmoid(logit(k, u.data(), r, n + j, lane));
      for (int64_t t = 0; t < some; t++) post[(lane + t) * n + j] = p[t];
    }
    for (int64_t t = lane; t < lane + some; t++) {
      for (int64_t j = 0; j < n * n; j++) comb[t * n * n + j] = c[j][t - lane];
      each(d, [&, first = share[0][t - lane]](auto at) { at(y + t * d) = first * at(x + t * n * d); });
      for (int64_t j = 1; j < n; j++) add_scaled(y + t * d, share[j][t - lane], x + (t * n + j) * d, d);
    }
  }
}

// g_x [count, n, d]: added to, or written. sums: gradients of fn [rows, n d], base [rows], scale [3], added to
static void pre_backward(const Constants& k, const float* x, int64_t count, const float* g_y, const float* g_post, const float* g_comb,
                         const float* g_in, float* g_x, float* g_fn, float* g_base, float* g_scale) {
  const int64_t n = k.n, d = k.d, width = n * d;
  std::vector<float> u(k.padded * BLOCK), g_u(k.rows * BLOCK), room(LANES * (3 * n * n + (2 * k.iters - 1) * n * (n + 1)));
  Vec8 *c = &vec(room.data()), *g = c + n * n, *steps = g + n * n;
  float r[BLOCK], along[BLOCK], share[16][BLOCK];
  mix(k, x, count, u.data(), r);
  for (int64_t lane = 0; lane < count; lane += LANES) {
    const int64_t some = std::min(LANES, count - lane);
    for (int64_t j = 0; j < n * n; j++) {
      c[j] = logit(k, u.data(), r, 2 * n + j, lane), g[j] = Vec8{};
      for (int64_t t = 0; t < some; t++) g[j][t] = g_comb[(lane + t) * n * n + j];
    }
    sinkhorn(c, k, steps);
    sinkhorn_backward(g, k, steps);
    Vec8 sum = {};
    for (int64_t i = 0; i < k.rows; i++) {
      Vec8 g_logit = {};
      if (i < 2 * n) {
        const Vec8 s = sigmoid(logit(k, u.data(), r, i, lane));
        for (int64_t t = lane; t < lane + some; t++)
          g_logit[t - lane] = i < n ? dot(g_y + t * d, x + (t * n + i) * d, d) : 2 * g_post[t * n + i - n];
        g_logit *= s * (1 - s);
        if (i < n) vec(share[i] + lane) = s + k.hc_eps;
      } else g_logit = g[i - 2 * n];
      const int64_t part = i < n ? 0 : i < 2 * n ? 1 : 2;
      const Vec8 m = vec(u.data() + i * BLOCK + lane), g_m = g_logit * k.scale[part] * vec(r + lane);
      g_base[i] += total(g_logit), g_scale[part] += total(g_logit * m * vec(r + lane));
      vec(g_u.data() + i * BLOCK + lane) = g_m, sum += g_m * m;
    }
    vec(along + lane) = sum * vec(r + lane) * vec(r + lane) / (float)width;
  }
  for (int64_t t = 0; t < count; t++) {
    for (int64_t j = 0; j < n; j++) {
      const float *from = x + (t * n + j) * d, *in = g_y + t * d, a = share[j][t], b = along[t];
      float* to = g_x + (t * n + j) * d;
      if (g_in) each(d, [&](auto at) { at(to) = at(g_in + (t * n + j) * d) + a * at(in) - b * at(from); });
      else each(d, [&](auto at) { at(to) = a * at(in) - b * at(from); });
    }
  }
  product({g_u.data(), 1, BLOCK}, k.by_column, g_x, width, count, true);
  product({g_u.data(), BLOCK, 1}, {x, width, 1}, g_fn, width, k.rows, width, count, true);
}

// One token: whole vectors of four streams in one pass, all else stream by stream
static void post(int64_t n, int64_t d, const float* y, const float* x, const float* post, const float* comb, float* out) {
  int64_t c = 0;
  for (; n == 4 && c + 8 <= d; c += 8) {
    Vec8 in[4], from = vec(y + c);
    for (int j = 0; j < 4; j++) in[j] = vec(x + j * d + c), __builtin_prefetch(x + (4 + j) * d + c);
    for (int k = 0; k < 4; k++) {
      Vec8 sum = post[k] * from;
      for (int j = 0; j < 4; j++) sum += comb[j * 4 + k] * in[j];
      vec(out + k * d + c) = sum;
    }
  }
  for (int64_t k = 0; k < n; k++) {
    each(d - c, [&](auto at) { at(out + k * d + c) = post[k] * at(y + c); });
    for (int64_t j = 0; j < n; j++) add_scaled(out + k * d + c, comb[j * n + k], x + j * d + c, d - c);
  }
}

static void post_backward(int64_t n, int64_t d, const float* g, const float* y, const float* x, const float* post, const float* comb,
                          float* g_y, float* g_x, float* g_post, float* g_comb) {
  Vec8 sums[20] = {};
  int64_t c = 0;
  for (; n == 4 && c + 8 <= d; c += 8) {
    Vec8 in[4], of_y = {}, from = vec(y + c);
    for (int k = 0; k < 4; k++) in[k] = vec(g + k * d + c), of_y += post[k] * in[k], sums[k] += from * in[k];
    vec(g_y + c) = of_y;
    for (int j = 0; j < 4; j++) {
      Vec8 of_x = {};
      from = vec(x + j * d + c);
      __builtin_prefetch(x + (4 + j) * d + c), __builtin_prefetch(g + (4 + j) * d + c);
      for (int k = 0; k < 4; k++) of_x += comb[j * 4 + k] * in[k], sums[4 + j * 4 + k] += from * in[k];
      vec(g_x + j * d + c) = of_x;
    }
  }
  std::fill(g_y + c, g_y + d, 0.f);
  for (int64_t j = 0; j < n; j++) std::fill(g_x + j * d + c, g_x + (j + 1) * d, 0.f);
  for (int64_t k = 0; k < n; k++) {
    const float* from = g + k * d + c;
    add_scaled(g_y + c, post[k], from, d - c);
    g_post[k] = dot(from, y + c, d - c) + (c ? total(sums[k]) : 0);
    for (int64_t j = 0; j < n; j++) {
      add_scaled(g_x + j * d + c, comb[j * n + k], from, d - c);
      g_comb[j * n + k] = dot(x + j * d + c, from, d - c) + (c ? total(sums[4 + j * 4 + k]) : 0);
    }
  }
}

// f(part, first token, count) for blocks of tokens
template <class F> static void in_blocks(int64_t tokens, F f) {
  const int64_t blocks = (tokens + BLOCK - 1) / BLOCK;
  in_parts(blocks, [&](int64_t part, int64_t begin, int64_t end) {
    for (int64_t t = begin * BLOCK; t < std::min(end * BLOCK, tokens); t += BLOCK) f(part, t, std::min(BLOCK, tokens - t));
  });
}

struct Inputs {  // contiguous; x [B, T, n, d] is the last of those that are given
  std::vector<Tensor> held;
  int64_t B, T, n, d, N;
  Inputs(const Tensor& x, std::initializer_list<const Tensor*> others) : B(x.size(0)), T(x.size(1)), n(x.size(2)), d(x.size(3)), N(B * T) {
    for (const Tensor* t : others) held.push_back(floats(*t));
  }
  float* operator[](size_t i) const { return data(held[i]); }
  Constants constants(size_t at, double norm_eps, double hc_eps, int64_t iters, bool backward) const {
    STD_TORCH_CHECK(n <= 16, "this CPU kernel takes up to 16 streams");
    const int64_t rows = n * (2 + n), width = n * d;
    const float* fn = (*this)[at];
    return {n, d, rows, (rows + 7) / 8 * 8, iters, (float)norm_eps, (float)hc_eps, fn, (*this)[at + 1], (*this)[at + 2],
            Packed({fn, 1, width}, N < FEW ? 0 : rows, width), Packed({fn, width, 1}, backward ? width : 0, rows)};
  }
};
static Tensor like(const Tensor& t) { return torch::stable::empty_like(floats(t)); }

std::tuple<Tensor, Tensor, Tensor> hc_pre(const Tensor& x, const Tensor& fn, const Tensor& base, const Tensor& scale, double norm_eps,
                                          double hc_eps, int64_t iters) {
  const Inputs in(x, {&x, &fn, &base, &scale});
  const Constants k = in.constants(1, norm_eps, hc_eps, iters, false);
  Tensor y = torch::stable::new_empty(x, {in.B, in.T, in.d}), to_post = torch::stable::new_empty(x, {in.B, in.T, in.n});
  Tensor to_comb = torch::stable::new_empty(x, {in.B, in.T, in.n, in.n});
  in_blocks(in.N, [&](int64_t, int64_t t, int64_t count) {
    pre(k, in[0] + t * k.n * k.d, count, data(y) + t * k.d, data(to_post) + t * k.n, data(to_comb) + t * k.n * k.n);
  });
  return {y, to_post, to_comb};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hc_pre_backward(const Tensor& g_y, const Tensor& g_post, const Tensor& g_comb, const Tensor& x,
    const Tensor& fn, const Tensor& base, const Tensor& scale, double norm_eps, double hc_eps, int64_t iters) {
  const Inputs in(x, {&g_y, &g_post, &g_comb, &x, &fn, &base, &scale});
  const Constants k = in.constants(4, norm_eps, hc_eps, iters, true);
  Tensor g_x = like(x), g_fn = like(fn), g_base = like(base), g_scale = like(scale);
  const int64_t parts = parts_of((in.N + BLOCK - 1) / BLOCK), n = k.n, d = k.d;
  Sums of_fn(g_fn, parts), of_base(g_base, parts), of_scale(g_scale, parts);
  in_blocks(in.N, [&](int64_t part, int64_t t, int64_t count) {
    pre_backward(k, in[3] + t * n * d, count, in[0] + t * d, in[1] + t * n, in[2] + t * n * n, nullptr, data(g_x) + t * n * d,
                 of_fn.of(part), of_base.of(part), of_scale.of(part));
  });
  of_fn.finish(), of_base.finish(), of_scale.finish();
  return {g_x, g_fn, g_base, g_scale};
}

Tensor hc_post(const Tensor& y, const Tensor& x, const Tensor& from_post, const Tensor& from_comb) {
  const Inputs in(x, {&y, &x, &from_post, &from_comb});
  const int64_t n = in.n, d = in.d;
  Tensor out = like(x);
  in_blocks(in.N, [&](int64_t, int64_t first, int64_t count) {
    for (int64_t t = first; t < first + count; t++) post(n, d, in[0] + t * d, in[1] + t * n * d, in[2] + t * n, in[3] + t * n * n, data(out) + t * n * d);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hc_post_backward(const Tensor& g, const Tensor& y, const Tensor& x, const Tensor& from_post,
                                                            const Tensor& from_comb) {
  const Inputs in(x, {&g, &y, &x, &from_post, &from_comb});
  const int64_t n = in.n, d = in.d;
  Tensor g_y = like(y), g_x = like(x), g_post = like(from_post), g_comb = like(from_comb);
  in_blocks(in.N, [&](int64_t, int64_t first, int64_t count) {
    for (int64_t t = first; t < first + count; t++)
      post_backward(n, d, in[0] + t * n * d, in[1] + t * d, in[2] + t * n * d, in[3] + t * n, in[4] + t * n * n, data(g_y) + t * d,
                    data(g_x) + t * n * d, data(g_post) + t * n, data(g_comb) + t * n * n);
  });
  return {g_y, g_x, g_post, g_comb};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> hc_post_pre(const Tensor& y, const Tensor& x, const Tensor& from_post, const Tensor& from_comb,
    const Tensor& fn, const Tensor& base, const Tensor& scale, double norm_eps, double hc_eps, int64_t iters) {
  const Inputs in(x, {&y, &x, &from_post, &from_comb, &fn, &base, &scale});
  const Constants k = in.constants(4, norm_eps, hc_eps, iters, false);
  const int64_t n = k.n, d = k.d;
  Tensor out = like(x), to_y = like(y), to_post = like(from_post), to_comb = like(from_comb);
  in_blocks(in.N, [&](int64_t, int64_t first, int64_t count) {
    float* streams = data(out) + first * n * d;
    for (int64_t t = first; t < first + count; t++)
      post(n, d, in[0] + t * d, in[1] + t * n * d, in[2] + t * n, in[3] + t * n * n, data(out) + t * n * d);
    pre(k, streams, count, data(to_y) + first * d, data(to_post) + first * n, data(to_comb) + first * n * n);
  });
  return {out, to_y, to_post, to_comb};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> hc_post_pre_backward(const Tensor& g_out, const Tensor& g_y,
    const Tensor& g_post, const Tensor& g_comb, const Tensor& y, const Tensor& x, const Tensor& from_post, const Tensor& from_comb,
    const Tensor& out, const Tensor& fn, const Tensor& base, const Tensor& scale, double norm_eps, double hc_eps, int64_t iters) {
  const Inputs in(x, {&g_out, &g_y, &g_post, &g_comb, &y, &x, &from_post, &from_comb, &out, &fn, &base, &scale});
  const Constants k = in.constants(9, norm_eps, hc_eps, iters, true);
  const int64_t parts = parts_of((in.N + BLOCK - 1) / BLOCK), n = k.n, d = k.d;
  Tensor to_y = like(y), to_x = like(x), to_post = like(from_post), to_comb = like(from_comb), g_fn = like(fn), g_base = like(base), g_scale = like(scale);
  Sums of_fn(g_fn, parts), of_base(g_base, parts), of_scale(g_scale, parts);
  in_blocks(in.N, [&](int64_t part, int64_t first, int64_t count) {
    std::vector<float> g(count * n * d);
    pre_backward(k, in[8] + first * n * d, count, in[1] + first * d, in[2] + first * n, in[3] + first * n * n, in[0] + first * n * d, g.data(),
                 of_fn.of(part), of_base.of(part), of_scale.of(part));
    for (int64_t t = first; t < first + count; t++)
      post_backward(n, d, g.data() + (t - first) * n * d, in[4] + t * d, in[5] + t * n * d, in[6] + t * n, in[7] + t * n * n, data(to_y) + t * d,
                    data(to_x) + t * n * d, data(to_post) + t * n, data(to_comb) + t * n * n);
  });
  of_fn.finish(), of_base.finish(), of_scale.finish();
  return {to_y, to_x, to_post, to_comb, g_fn, g_base, g_scale};
}
