#include "common.h"

// hc_pre, hc_post and hc_post_pre for fp32: the mathematics and shapes of their files in ops/.
// Eight tokens are the lanes of a vector: work that is small per token, Sinkhorn above all, is
// done for eight at a time.

constexpr int64_t BLOCK = 32, LANES = 8;  // tokens
constexpr int64_t MAX_STREAMS = 16;

using Tensors3 = std::tuple<Tensor, Tensor, Tensor>;
using Tensors4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Tensors7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct Params {
  int64_t n, d, iters;
  float norm_eps, hc_eps;
  const float *fn, *base, *scale;  // [rows, n d], [rows], [3]
  int64_t rows() const { return n * (2 + n); }
  int64_t width() const { return n * d; }
  Matrix fn_matrix() const { return {fn, rows(), width(), width()}; }
  // Of the three parts of the logits (pre, post, comb): the one of a row
  int64_t part(int64_t row) const { return row < n ? 0 : row < 2 * n ? 1 : 2; }
};

// ---------------------------------------------------------------------------------------------
// Sinkhorn of eight matrices: c[i n + j] holds their elements (i, j)

// The strides in c of a step's division: along the n elements of a sum, and from sum to sum.
// Even steps divide columns, odd ones rows.
struct Axis {
  int64_t along, across;
  Axis(int64_t step, int64_t n) : along(step % 2 ? 1 : n), across(step % 2 ? n : 1) {}
};

// How many vectors sinkhorn saves: the softmax, then each step's matrix and its 1 / sums
static int64_t saved_vectors(const Params& k) {
  return k.n * k.n + (2 * k.iters - 1) * k.n * (k.n + 1);
}

// In place: softmax of rows plus eps; then columns, rows, columns .. divided by their sums plus
// eps. saved: memory for what backward needs, or null
static void sinkhorn(Vec8* c, const Params& k, Vec8* saved) {
  const int64_t n = k.n, size = n * n;
  for (int64_t i = 0; i < n; i++) {
    Vec8 *row = c + i * n, max = row[0], sum = {};
    for (int64_t j = 1; j < n; j++) max = row[j] > max ? row[j] : max;
    for (int64_t j = 0; j < n; j++) {
      row[j] = exp8(row[j] - max);
      sum += row[j];
    }
    for (int64_t j = 0; j < n; j++) row[j] /= sum;
  }
  if (saved) {
    std::memcpy(saved, c, size * sizeof *c);
    saved += size;
  }
  for (int64_t i = 0; i < size; i++) c[i] += k.hc_eps;
  for (int64_t step = 0; step < 2 * k.iters - 1; step++) {
    const Axis axis(step, n);
    Vec8 inverse[MAX_STREAMS];
    for (int64_t i = 0; i < n; i++) {
      Vec8 *first = c + i * axis.across, sum = Vec8{} + k.hc_eps;
      for (int64_t j = 0; j < n; j++) sum += first[j * axis.along];
      inverse[i] = 1 / sum;
      for (int64_t j = 0; j < n; j++) first[j * axis.along] *= inverse[i];
    }
    if (saved) {
      std::memcpy(saved, c, size * sizeof *c);
      std::memcpy(saved + size, inverse, n * sizeof *c);
      saved += size + n;
    }
  }
}

// g, in place: from the gradient of the result to that of the logits
static void sinkhorn_backward(Vec8* g, const Params& k, const Vec8* saved) {
  const int64_t n = k.n, size = n * n;
  // c = a / sum(a): g_a = (g - sum(g c)) / sum(a)
  for (int64_t step = 2 * k.iters - 2; step >= 0; step--) {
    const Vec8 *c = saved + size + step * (size + n), *inverse = c + size;
    const Axis axis(step, n);
    for (int64_t i = 0; i < n; i++) {
      const Vec8* c_first = c + i * axis.across;
      Vec8 *g_first = g + i * axis.across, sum = {};
      for (int64_t j = 0; j < n; j++) sum += g_first[j * axis.along] * c_first[j * axis.along];
      for (int64_t j = 0; j < n; j++) {
        Vec8& g_j = g_first[j * axis.along];
        g_j = (g_j - sum) * inverse[i];
      }
    }
  }
  // s = softmax(l): g_l = s (g - sum(g s))
  for (int64_t i = 0; i < n; i++) {
    const Vec8* s = saved + i * n;
    Vec8 *row = g + i * n, sum = {};
    for (int64_t j = 0; j < n; j++) sum += row[j] * s[j];
    for (int64_t j = 0; j < n; j++) row[j] = s[j] * (row[j] - sum);
  }
}

// ---------------------------------------------------------------------------------------------
// hc_pre, of a block of up to BLOCK tokens

// Of a block: u [rows, BLOCK] = fn x^T and 1 / rms(x), zero beyond its tokens
struct Mix {
  const Params& k;
  std::vector<float> u, inv_rms;
  Mix(const Params& k, const float* x, int64_t tokens)
      : k(k), u(k.rows() * BLOCK), inv_rms(BLOCK) {
    const int64_t width = k.width();
    matmul(k.fn_matrix(), Matrix{x, tokens, width, width}.T(), u.data(), BLOCK);
    for (int64_t t = 0; t < tokens; t++) {
      const float* x_t = x + t * width;
      inv_rms[t] = 1 / std::sqrt(dot(x_t, x_t, width) / width + k.norm_eps);
    }
  }
  // Of the tokens lane .. lane + 8
  Vec8 rms_inverse(int64_t lane) const { return vec(inv_rms.data() + lane); }
  Vec8 mixed(int64_t row, int64_t lane) const { return vec(u.data() + row * BLOCK + lane); }
  Vec8 logit(int64_t row, int64_t lane) const {
    return mixed(row, lane) * rms_inverse(lane) * k.scale[k.part(row)] + k.base[row];
  }
};

static void pre(const Params& k, const float* x, int64_t tokens, float* y, float* post,
                float* comb) {
  const int64_t n = k.n, d = k.d;
  const Mix mix(k, x, tokens);
  std::vector<float> c_memory(LANES * n * n);
  Vec8 *c = &vec(c_memory.data()), weights[MAX_STREAMS];
  for (int64_t lane = 0; lane < tokens; lane += LANES) {
    const int64_t count = std::min(LANES, tokens - lane);
    for (int64_t j = 0; j < n; j++) {
      weights[j] = sigmoid8(mix.logit(j, lane)) + k.hc_eps;
      const Vec8 p = 2 * sigmoid8(mix.logit(n + j, lane));
      for (int64_t t = 0; t < count; t++) post[(lane + t) * n + j] = p[t];
    }
    for (int64_t j = 0; j < n * n; j++) c[j] = mix.logit(2 * n + j, lane);
    sinkhorn(c, k, nullptr);
    for (int64_t t = 0; t < count; t++) {
      float* comb_t = comb + (lane + t) * n * n;
      for (int64_t j = 0; j < n * n; j++) comb_t[j] = c[j][t];
      // y = sum_j weight_j x_j
      const float* x_t = x + (lane + t) * n * d;
      float* y_t = y + (lane + t) * d;
      vectorize(d, [&, first = weights[0][t]](auto at) { at(y_t) = first * at(x_t); });
      for (int64_t j = 1; j < n; j++) add_scaled(y_t, weights[j][t], x_t + j * d, d);
    }
  }
}

// Of a block: gradients of the outputs, and of x from elsewhere (or null)
struct PreOutputGrads {
  const float *y, *post, *comb, *x;
};
// Gradients of the inputs. x is written, the others are added to
struct PreInputGrads {
  float *x, *fn, *base, *scale;
};

static void pre_backward(const Params& k, const float* x, int64_t tokens, PreOutputGrads g_out,
                         PreInputGrads g_in) {
  const int64_t n = k.n, d = k.d, rows = k.rows(), width = k.width();
  const Mix mix(k, x, tokens);
  std::vector<float> g_u(rows * BLOCK), norm_share(BLOCK);
  std::vector<float> memory(LANES * (2 * n * n + saved_vectors(k)));
  Vec8 *c = &vec(memory.data()), *g_c = c + n * n, *saved = g_c + n * n;
  float weights[MAX_STREAMS][BLOCK];
  for (int64_t lane = 0; lane < tokens; lane += LANES) {
    const int64_t count = std::min(LANES, tokens - lane);
    for (int64_t j = 0; j < n * n; j++) {
      c[j] = mix.logit(2 * n + j, lane);
      g_c[j] = Vec8{};
      for (int64_t t = 0; t < count; t++) g_c[j][t] = g_out.comb[(lane + t) * n * n + j];
    }
    sinkhorn(c, k, saved);
    sinkhorn_backward(g_c, k, saved);
    const Vec8 inverse = mix.rms_inverse(lane);
    Vec8 sum = {};
    for (int64_t i = 0; i < rows; i++) {
      // The gradient of logit i: of weight i, of post i - n, or of comb
      Vec8 g_logit = {};
      if (i < 2 * n) {
        const Vec8 s = sigmoid8(mix.logit(i, lane));
        for (int64_t t = 0; t < count; t++) {
          const int64_t token = lane + t;
          g_logit[t] = i < n ? dot(g_out.y + token * d, x + (token * n + i) * d, d)
                             : 2 * g_out.post[token * n + i - n];
        }
        g_logit *= s * (1 - s);
        if (i < n) vec(weights[i] + lane) = s + k.hc_eps;
      } else {
        g_logit = g_c[i - 2 * n];
      }
      // logit = u scale / rms + base
      const Vec8 u = mix.mixed(i, lane);
      const Vec8 g_u_i = g_logit * k.scale[k.part(i)] * inverse;
      g_in.base[i] += sum_lanes(g_logit);
      g_in.scale[k.part(i)] += sum_lanes(g_logit * u * inverse);
      vec(g_u.data() + i * BLOCK + lane) = g_u_i;
      sum += g_u_i * u;
    }
    // 1 / rms depends on x, too: its share of g_x is -norm_share x
    vec(norm_share.data() + lane) = sum * inverse * inverse / (float)width;
  }
  // g_x_j = weight_j g_y - norm_share x_j (+ the gradient from elsewhere)
  for (int64_t t = 0; t < tokens; t++) {
    for (int64_t j = 0; j < n; j++) {
      const int64_t offset = (t * n + j) * d;
      const float *x_j = x + offset, *g_y = g_out.y + t * d;
      const float a = weights[j][t], b = norm_share[t];
      float* g_x = g_in.x + offset;
      if (g_out.x) {
        const float* more = g_out.x + offset;
        vectorize(d, [&](auto at) { at(g_x) = at(more) + a * at(g_y) - b * at(x_j); });
      } else {
        vectorize(d, [&](auto at) { at(g_x) = a * at(g_y) - b * at(x_j); });
      }
    }
  }
  // u = fn x^T: g_x += g_u^T fn, g_fn += g_u x
  const Matrix g_u_matrix{g_u.data(), rows, tokens, BLOCK};
  matmul(g_u_matrix.T(), k.fn_matrix(), g_in.x, width, true);
  matmul(g_u_matrix, {x, tokens, width, width}, g_in.fn, width, true);
}

// ---------------------------------------------------------------------------------------------
// hc_post, of one token. Four streams go a vector at a time, in one pass over the rows; other
// numbers, and the elements left over, stream by stream

// out_k = post_k y + sum_j comb[j, k] x_j
static void post(int64_t n, int64_t d, const float* y, const float* x, const float* post,
                 const float* comb, float* out) {
  int64_t c = 0;
  for (; n == 4 && c + 8 <= d; c += 8) {
    const Vec8 y_c = vec(y + c);
    Vec8 x_c[4];
    for (int j = 0; j < 4; j++) {
      x_c[j] = vec(x + j * d + c);
      __builtin_prefetch(x + (4 + j) * d + c);
    }
    for (int k = 0; k < 4; k++) {
      Vec8 sum = post[k] * y_c;
      for (int j = 0; j < 4; j++) sum += comb[j * 4 + k] * x_c[j];
      vec(out + k * d + c) = sum;
    }
  }
  for (int64_t k = 0; k < n; k++) {
    float* out_k = out + k * d + c;
    vectorize(d - c, [&](auto at) { at(out_k) = post[k] * at(y + c); });
    for (int64_t j = 0; j < n; j++) add_scaled(out_k, comb[j * n + k], x + j * d + c, d - c);
  }
}

struct PostGrads {
  float *y, *x, *post, *comb;  // of one token
};

// g_y = sum_k post_k g_k;  g_x_j = sum_k comb[j, k] g_k;  g_post_k = <g_k, y>;
// g_comb[j, k] = <x_j, g_k>
static void post_backward(int64_t n, int64_t d, const float* g, const float* y, const float* x,
                          const float* post, const float* comb, PostGrads g_in) {
  Vec8 g_post[4] = {}, g_comb[16] = {};
  int64_t c = 0;
  for (; n == 4 && c + 8 <= d; c += 8) {
    const Vec8 y_c = vec(y + c);
    Vec8 g_c[4], g_y = {};
    for (int k = 0; k < 4; k++) {
      g_c[k] = vec(g + k * d + c);
      g_y += post[k] * g_c[k];
      g_post[k] += y_c * g_c[k];
    }
    vec(g_in.y + c) = g_y;
    for (int j = 0; j < 4; j++) {
      const Vec8 x_c = vec(x + j * d + c);
      Vec8 g_x = {};
      __builtin_prefetch(x + (4 + j) * d + c);
      __builtin_prefetch(g + (4 + j) * d + c);
      for (int k = 0; k < 4; k++) {
        g_x += comb[j * 4 + k] * g_c[k];
        g_comb[j * 4 + k] += x_c * g_c[k];
      }
      vec(g_in.x + j * d + c) = g_x;
    }
  }
  const int64_t rest = d - c;
  std::fill(g_in.y + c, g_in.y + d, 0.f);
  for (int64_t j = 0; j < n; j++) std::fill(g_in.x + j * d + c, g_in.x + (j + 1) * d, 0.f);
  for (int64_t k = 0; k < n; k++) {
    const float* g_k = g + k * d + c;
    add_scaled(g_in.y + c, post[k], g_k, rest);
    g_in.post[k] = dot(g_k, y + c, rest);
    if (c) g_in.post[k] += sum_lanes(g_post[k]);
    for (int64_t j = 0; j < n; j++) {
      add_scaled(g_in.x + j * d + c, comb[j * n + k], g_k, rest);
      g_in.comb[j * n + k] = dot(x + j * d + c, g_k, rest);
      if (c) g_in.comb[j * n + k] += sum_lanes(g_comb[j * 4 + k]);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Ops

static int64_t count_blocks(int64_t tokens) { return (tokens + BLOCK - 1) / BLOCK; }

// f(part, first token, count) for blocks of tokens
template <class F>
static void in_blocks(int64_t tokens, F f) {
  in_parts(count_blocks(tokens), [&](int64_t part, int64_t begin, int64_t end) {
    for (int64_t t = begin * BLOCK; t < std::min(end * BLOCK, tokens); t += BLOCK)
      f(part, t, std::min(BLOCK, tokens - t));
  });
}

// Tensors [B, T, ..], contiguous
struct Inputs {
  std::vector<Tensor> held;
  int64_t B, T, n, d;
  Inputs(const Tensor& x, std::initializer_list<const Tensor*> tensors)
      : B(x.size(0)), T(x.size(1)), n(x.size(2)), d(x.size(3)) {
    for (const Tensor* t : tensors) held.push_back(floats(*t));
  }
  int64_t tokens() const { return B * T; }
  const float* operator[](size_t i) const { return data(held[i]); }
  Tensor like(size_t i) const { return torch::stable::empty_like(held[i]); }
  // Of the tensors fn, base and scale, which begin at i
  Params params(size_t i, double norm_eps, double hc_eps, int64_t iters) const {
    STD_TORCH_CHECK(n <= MAX_STREAMS, "this CPU kernel takes up to 16 streams");
    const float *fn = (*this)[i], *base = (*this)[i + 1], *scale = (*this)[i + 2];
    return {n, d, iters, (float)norm_eps, (float)hc_eps, fn, base, scale};
  }
};

Tensors3 hc_pre(const Tensor& x, const Tensor& fn, const Tensor& base, const Tensor& scale,
                double norm_eps, double hc_eps, int64_t iters) {
  const Inputs in(x, {&x, &fn, &base, &scale});
  const Params k = in.params(1, norm_eps, hc_eps, iters);
  const int64_t n = k.n, d = k.d;
  Tensor y = torch::stable::new_empty(x, {in.B, in.T, d});
  Tensor post = torch::stable::new_empty(x, {in.B, in.T, n});
  Tensor comb = torch::stable::new_empty(x, {in.B, in.T, n, n});
  in_blocks(in.tokens(), [&](int64_t, int64_t t, int64_t count) {
    pre(k, in[0] + t * n * d, count, data(y) + t * d, data(post) + t * n, data(comb) + t * n * n);
  });
  return {y, post, comb};
}

Tensors4 hc_pre_backward(const Tensor& g_y, const Tensor& g_post, const Tensor& g_comb,
                         const Tensor& x, const Tensor& fn, const Tensor& base,
                         const Tensor& scale, double norm_eps, double hc_eps, int64_t iters) {
  const Inputs in(x, {&g_y, &g_post, &g_comb, &x, &fn, &base, &scale});
  const Params k = in.params(4, norm_eps, hc_eps, iters);
  const int64_t n = k.n, d = k.d, parts = count_parts(count_blocks(in.tokens()));
  Tensor g_x = in.like(3), g_fn = in.like(4), g_base = in.like(5), g_scale = in.like(6);
  Partials fn_parts(g_fn, parts), base_parts(g_base, parts), scale_parts(g_scale, parts);
  in_blocks(in.tokens(), [&](int64_t part, int64_t t, int64_t count) {
    const PreOutputGrads g_out{in[0] + t * d, in[1] + t * n, in[2] + t * n * n, nullptr};
    pre_backward(k, in[3] + t * n * d, count, g_out,
                 {data(g_x) + t * n * d, fn_parts.slice(part), base_parts.slice(part),
                  scale_parts.slice(part)});
  });
  fn_parts.reduce();
  base_parts.reduce();
  scale_parts.reduce();
  return {g_x, g_fn, g_base, g_scale};
}

Tensor hc_post(const Tensor& y, const Tensor& x, const Tensor& post_, const Tensor& comb) {
  const Inputs in(x, {&y, &x, &post_, &comb});
  const int64_t n = in.n, d = in.d;
  Tensor out = in.like(1);
  in_blocks(in.tokens(), [&](int64_t, int64_t first, int64_t count) {
    for (int64_t t = first; t < first + count; t++)
      post(n, d, in[0] + t * d, in[1] + t * n * d, in[2] + t * n, in[3] + t * n * n,
           data(out) + t * n * d);
  });
  return out;
}

Tensors4 hc_post_backward(const Tensor& g, const Tensor& y, const Tensor& x, const Tensor& post,
                          const Tensor& comb) {
  const Inputs in(x, {&g, &y, &x, &post, &comb});
  const int64_t n = in.n, d = in.d;
  Tensor g_y = in.like(1), g_x = in.like(2), g_post = in.like(3), g_comb = in.like(4);
  in_blocks(in.tokens(), [&](int64_t, int64_t first, int64_t count) {
    for (int64_t t = first; t < first + count; t++) {
      const PostGrads g_in{data(g_y) + t * d, data(g_x) + t * n * d, data(g_post) + t * n,
                           data(g_comb) + t * n * n};
      post_backward(n, d, in[0] + t * n * d, in[1] + t * d, in[2] + t * n * d, in[3] + t * n,
                    in[4] + t * n * n, g_in);
    }
  });
  return {g_y, g_x, g_post, g_comb};
}

// A block goes through hc_post, then through hc_pre while its streams are in the cache
Tensors4 hc_post_pre(const Tensor& y, const Tensor& x, const Tensor& post_, const Tensor& comb,
                     const Tensor& fn, const Tensor& base, const Tensor& scale, double norm_eps,
                     double hc_eps, int64_t iters) {
  const Inputs in(x, {&y, &x, &post_, &comb, &fn, &base, &scale});
  const Params k = in.params(4, norm_eps, hc_eps, iters);
  const int64_t n = k.n, d = k.d;
  Tensor out = in.like(1), next_y = in.like(0), next_post = in.like(2), next_comb = in.like(3);
  in_blocks(in.tokens(), [&](int64_t, int64_t first, int64_t count) {
    for (int64_t t = first; t < first + count; t++)
      post(n, d, in[0] + t * d, in[1] + t * n * d, in[2] + t * n, in[3] + t * n * n,
           data(out) + t * n * d);
    pre(k, data(out) + first * n * d, count, data(next_y) + first * d,
        data(next_post) + first * n, data(next_comb) + first * n * n);
  });
  return {out, next_y, next_post, next_comb};
}

Tensors7 hc_post_pre_backward(
    // Gradients of the outputs
    const Tensor& g_out, const Tensor& g_next_y, const Tensor& g_next_post,
    const Tensor& g_next_comb,
    // Inputs, and the first output
    const Tensor& y, const Tensor& x, const Tensor& post, const Tensor& comb, const Tensor& out,
    const Tensor& fn, const Tensor& base, const Tensor& scale,
    // Constants
    double norm_eps, double hc_eps, int64_t iters) {
  const Inputs in(x, {&g_out, &g_next_y, &g_next_post, &g_next_comb, &y, &x, &post, &comb, &out,
                      &fn, &base, &scale});
  const Params k = in.params(9, norm_eps, hc_eps, iters);
  const int64_t n = k.n, d = k.d, parts = count_parts(count_blocks(in.tokens()));
  Tensor g_y = in.like(4), g_x = in.like(5), g_post = in.like(6), g_comb = in.like(7);
  Tensor g_fn = in.like(9), g_base = in.like(10), g_scale = in.like(11);
  Partials fn_parts(g_fn, parts), base_parts(g_base, parts), scale_parts(g_scale, parts);
  in_blocks(in.tokens(), [&](int64_t part, int64_t first, int64_t count) {
    std::vector<float> g(count * n * d);  // of the streams that hc_post wrote
    const PreOutputGrads g_pre{in[1] + first * d, in[2] + first * n, in[3] + first * n * n,
                               in[0] + first * n * d};
    pre_backward(k, in[8] + first * n * d, count, g_pre,
                 {g.data(), fn_parts.slice(part), base_parts.slice(part),
                  scale_parts.slice(part)});
    for (int64_t t = first; t < first + count; t++) {
      const PostGrads g_in{data(g_y) + t * d, data(g_x) + t * n * d, data(g_post) + t * n,
                           data(g_comb) + t * n * n};
      post_backward(n, d, g.data() + (t - first) * n * d, in[4] + t * d, in[5] + t * n * d,
                    in[6] + t * n, in[7] + t * n * n, g_in);
    }
  });
  fn_parts.reduce();
  base_parts.reduce();
  scale_parts.reduce();
  return {g_y, g_x, g_post, g_comb, g_fn, g_base, g_scale};
}
