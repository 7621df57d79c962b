// Many eigenvalues as few: the points of an octave [2^e, 2^(e+1)) folded onto 32 nodes in it.
//
// Every sum of a path is sum_k w_k F(d_k), w the weights before the first round and F a product of factors
// s d / (1 + s d) and 1 / (1 + s d), all s > 0. Such an F is analytic with |F| <= 1 where Re d >= 0, whatever the
// rounds: each factor is. That half plane holds the Bernstein ellipse of [1, 2] with rho = 3 + sqrt(8), so F's
// interpolant at n Chebyshev points misses it by at most 4 rho^(1-n) / (rho - 1) (Trefethen, Approximation Theory and
// Approximation Practice, Theorem 8.2), 1.6e-24 for 32. With the Lagrange polynomials l_j,
//   sum_k w_k F(d_k) = sum_j u_j F(x_j),  u_j = sum_k w_k l_j(d_k),  missing at most 1.6e-24 sum_k w_k
// once for all rounds: u replaces w. The mantissas of d are exact, so nothing else is lost but rounding, and that is
// watched: u = w' o signs with w'_j = sum_k w_k |l_j(d_k)|, and sum_j w'_j F(x_j) over the sum itself is how much
// rounding is magnified.
#pragma once

#include <cmath>
#include <vector>

#include "cpu_column.h"

namespace sdfast::secular {
namespace {

constexpr int kNodes = 32;             // of an octave: four strides
constexpr double kMostEnergy = 6e6;    // sum_k w_k up to here is missed by less than 1e-17, beside sums of 1
constexpr double kLoudest = 3;         // rounding magnified by more: the column is solved point by point
constexpr long long kWorthwhile = 16;  // fewer rounds, or columns, cost less than the folding
static_assert(kNodes % kStride == 0, "nodes fill whole strides");

// The Chebyshev points of [1, 2], rounded, and the barycentric weights of just these: the textbook's weights, for
// points that are not, would cost three digits.
struct Nodes {
  double at[kNodes], weight[kNodes];

  Nodes() {
    for (int j = 0; j < kNodes; ++j) at[j] = 1.5 - 0.5 * std::cos((2 * j + 1) * (std::acos(-1.0) / (2 * kNodes)));
    for (int j = 0; j < kNodes; ++j) {
      long double product = 1;
      for (int i = 0; i < kNodes; ++i) product *= i == j ? 1 : 4 * (at[j] - at[i]);  // differences are exact
      weight[j] = static_cast<double>(1 / product);
    }
  }

  // l_j(x), all j.
  void lagrange(double x, double* values) const {
    double sum = 0;
    for (int j = 0; j < kNodes; ++j) {
      if (x == at[j]) {
        for (int i = 0; i < kNodes; ++i) values[i] = i == j;
        return;
      }
      values[j] = weight[j] / (x - at[j]);
      sum += values[j];
    }
    for (int j = 0; j < kNodes; ++j) values[j] /= sum;
  }
};

// w'_j and u_j of one stride of nodes; `table` has their l_j(d_k), point after point. Summed block by block: one long
// sum would carry the rounding of all its terms.
constexpr long long kBlock = 32;

SDFAST_CLONES void fold_stride(const double* w, const double* table, long long points, double* weights, double* signs) {
  Lanes sum[2] = {}, size[2] = {};
  for (long long first = 0; first < points; first += kBlock) {
    const long long end = first + kBlock < points ? first + kBlock : points;
    Lanes block_sum[2] = {}, block_size[2] = {};
    for (long long k = first; k < end; ++k) {
      for (int j = 0; j < 2; ++j) {
        const Lanes l = load(table + k * kStride + j * kWidth);
        block_sum[j] += w[k] * l;
        block_size[j] += w[k] * (Lanes)((Mask)l & 0x7fffffffffffffff);
      }
    }
    for (int j = 0; j < 2; ++j) sum[j] += block_sum[j], size[j] += block_size[j];
  }
  for (int j = 0; j < 2; ++j) {
    const Lanes sign = size[j] > 0 ? sum[j] / size[j] : Lanes{};
    std::memcpy(weights + j * kWidth, &size[j], sizeof size[j]);
    std::memcpy(signs + j * kWidth, &sign, sizeof sign);
  }
}

// How a spectrum folds: octaves of many points onto nodes, other points as they are.
struct Fold {
  struct Run {
    long long first, points, to, table;  // points from `first` go `to`; `table` < 0: as they are
  };
  std::vector<Run> runs;
  std::vector<double> d, tables;  // the folded spectrum, padded; l_j(d_k)

  // Empty where it is not worth it: for few points, columns or rounds, or eigenvalues that do not ascend.
  Fold(const double* all, long long points, long long columns, long long rounds) {
    if (columns < kWorthwhile || rounds < kWorthwhile || points < 4 * kNodes) return;
    for (long long k = 1; k < points; ++k) {
      if (!(all[k - 1] <= all[k])) return;
    }
    for (long long first = 0, end; first < points; first = end) {
      end = first + 1;
      while (end < points && all[end] > 0 && std::ilogb(all[end]) == std::ilogb(all[first])) ++end;
      // Points on one spot stay: they share their l_j, whose rounding would not average out.
      const bool many = all[first] > kNothing && end - first > 2 * kNodes && all[end - 1] > 1.1 * all[first];
      if (many || runs.empty() || runs.back().table >= 0) {
        runs.push_back({first, 0, static_cast<long long>(d.size()), many ? 0 : -1});
      }
      runs.back().points += end - first;
      if (many) {
        add_nodes(all + first, runs.back());
      } else {
        d.insert(d.end(), all + first, all + end);
      }
    }
    if (2 * static_cast<long long>(d.size()) > points) runs.clear();
    d.resize(padded_to_strides(d.size()), 0.0);
  }

  bool worthwhile() const { return !runs.empty(); }

  void add_nodes(const double* eigenvalues, Run& run) {
    static const Nodes nodes;
    const int exponent = std::ilogb(eigenvalues[0]);
    for (double at : nodes.at) d.push_back(std::ldexp(at, exponent));
    run.table = tables.size();
    tables.resize(tables.size() + run.points * kNodes);
    double values[kNodes];
    for (long long k = 0; k < run.points; ++k) {
      nodes.lagrange(std::ldexp(eigenvalues[k], -exponent), values);
      for (int j = 0; j < kNodes; ++j) {
        tables[run.table + (j / kStride * run.points + k) * kStride + j % kStride] = values[j];
      }
    }
  }

  // A column's weights, folded.
  void apply(const double* w, double* weights, double* signs) const {
    for (const Run& run : runs) {
      if (run.table < 0) {
        std::memcpy(weights + run.to, w + run.first, run.points * sizeof(double));
        for (long long k = 0; k < run.points; ++k) signs[run.to + k] = 1;
      } else {
        for (int j = 0; j < kNodes; j += kStride) {
          fold_stride(w + run.first, tables.data() + run.table + j * run.points, run.points, weights + run.to + j,
                      signs + run.to + j);
        }
      }
    }
  }
};

}  // namespace
}  // namespace sdfast::secular
