// The gate table of routing/spec.py for one token and slice; routing/reference.py specifies it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "codes.h"  // of ../../codes.py, written where this is built

using std::int64_t;

// What follows is written for choices up to these: Python serves gates that have a later one.
constexpr int64_t kScores = kScoreAbs + 1, kSelects = kSelectTopP + 1, kWeights = kWeightSqrt + 1;

struct Gate {
  int64_t gated, self, given, score, bias, bias_value, select, key_abs, k, threshold_head;
  int64_t subtract_threshold, weight, masked, num_gates, product;
  float score_temperature, threshold, top_p, temperature, mask_below, constant, head_bias;
  float width, tail_sum, tail_squares, normalise_eps, unused;
  const float *bias_G, *logit_bias_G;
  const float *row_sums_G, *tail_G;  // of a router that reads LayerNorm(x); tail_G may be null
  const int64_t* block_start;  // [G + 1] first rank of each gate
};

namespace {

void softmax(float* v, int64_t n, float temperature) {
  float top = -std::numeric_limits<float>::infinity(), total = 0;
  for (int64_t i = 0; i < n; i++) top = std::max(top, v[i] /= temperature);
  for (int64_t i = 0; i < n; i++) total += v[i] = std::exp(v[i] - top);
  for (int64_t i = 0; i < n; i++) v[i] /= total;
}

struct GateScratch {
  std::vector<float> score, key, value, mixed;
  std::vector<char> kept;
  std::vector<int32_t> order;
};

// As routing/norm.py; stats: the sum of x and of its squares.
void normalise(const Gate& s, const float* stats, std::vector<float>& v) {
  const double mean = (double(stats[0]) + s.tail_sum) / s.width;
  const double squares = (double(stats[1]) + s.tail_squares) / s.width;
  const double scale = 1 / std::sqrt(std::max(squares - mean * mean, 0.0) + s.normalise_eps);
  for (int64_t i = 0; i < s.num_gates; i++) {
    const double tail = s.tail_G ? s.tail_G[i] : 0;
    v[i] = float((v[i] + tail - mean * s.row_sums_G[i]) * scale);
  }
}

void score(const Gate& s, const float* u, const float* stats, std::vector<float>& v) {
  const int64_t n = s.num_gates;
  v.assign(u, u + n);
  if (s.row_sums_G) normalise(s, stats, v);
  if (s.logit_bias_G)
    for (int64_t i = 0; i < n; i++) v[i] += s.logit_bias_G[i];
  if (s.score == kScoreSoftmax) softmax(v.data(), n, s.score_temperature);
  if (s.score == kScoreSigmoid)
    for (float& e : v) e = 1 / (1 + std::exp(-e));
  if (s.score == kScoreAbs)
    for (float& e : v) e = std::fabs(e);
  if (s.score == kScoreL2) {
    double squares = 0;
    for (float e : v) squares += double(e) * e;
    const float norm = std::sqrt(squares);
    for (float& e : v) e = norm > 0 ? e / norm : 0;
  }
}

void select(const Gate& s, float threshold, GateScratch& m) {
  const int64_t n = s.num_gates;
  const std::vector<float>& key = m.key;
  m.kept.assign(n, s.select == kSelectAll);
  if (s.select == kSelectThreshold)
    for (int64_t i = 0; i < n; i++) m.kept[i] = key[i] >= threshold;
  if (s.select != kSelectTopK && s.select != kSelectTopP) return;
  m.order.resize(n);
  for (int64_t i = 0; i < n; i++) m.order[i] = i;
  const int64_t sorted = s.select == kSelectTopK ? s.k : n;
  std::partial_sort(m.order.begin(), m.order.begin() + sorted, m.order.end(), [&](int a, int b) {
    // As torch sorts: NaN before all, ties to the lower index.
    const bool a_nan = key[a] != key[a], b_nan = key[b] != key[b];
    if (a_nan != b_nan) return a_nan;
    if (!a_nan && key[a] != key[b]) return key[a] > key[b];
    return a < b;
  });
  double total = 0;
  for (int64_t i = 0; i < sorted; i++) {
    const float value = key[m.order[i]];
    total += value;
    m.kept[m.order[i]] = s.select == kSelectTopK || float(total) - value < s.top_p;
  }
}

// g [G] into m.value, as routing/reference.py.
void gate(const Gate& s, const float* u, const float* stats, float head, GateScratch& m) {
  const int64_t n = s.num_gates;
  score(s, u, stats, m.score);
  m.key = m.score;
  if (s.bias)
    for (int64_t i = 0; i < n; i++) m.key[i] += s.bias_G[i];
  m.value = s.bias_value ? m.key : m.score;
  if (s.key_abs)
    for (float& e : m.key) e = std::fabs(e);
  float threshold = s.threshold;
  if (s.threshold_head) threshold *= 1 / (1 + std::exp(-(head + s.head_bias)));
  select(s, threshold, m);
  for (int64_t i = 0; i < n; i++) {
    if (s.subtract_threshold) m.value[i] -= threshold;
    if (!m.kept[i]) m.value[i] = s.weight == kWeightSoftmax ? -INFINITY : 0;
    else if (s.weight == kWeightOne) m.value[i] = 1;
    else if (s.weight == kWeightSqrt) m.value[i] = std::sqrt(m.value[i] < 0 ? 0 : m.value[i]);
  }
  if (s.weight == kWeightRenormalise) {
    float total = 0;
    for (float e : m.value) total += e;
    for (float& e : m.value) e /= total == 0 ? 1 : total;
  }
  if (s.weight == kWeightSoftmax) {
    softmax(m.value.data(), n, s.temperature);
    for (float& e : m.value) e = e == e ? e : 0;  // nothing kept
  }
  for (int64_t i = 0; i < n; i++)
    m.value[i] = s.masked && !(m.score[i] >= s.mask_below) ? 0 : s.constant * m.value[i];
}

}  // namespace
