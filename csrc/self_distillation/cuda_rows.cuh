// One row of the self-distillation loss on the GPU, by the team of threads that shares it.
#pragma once

#include "cuda_problem.cuh"

namespace sdfast::self_distillation {

// A source that lies in a tensor, or none: it needs nothing of the row's own softmax and adds nothing to the loss.
struct TensorSource : Operand {
  static constexpr bool kNeedsSoftmax = false;
  __device__ explicit TensorSource(const Operand& rows) : Operand(rows) {}
  __device__ bool present() const { return data != nullptr; }
  __device__ static bool wants_dense() { return false; }
  template <class Peak, class Layout>
  __device__ void begin(const Peak&, const Layout&) {}
  template <class T, int kSize>
  __device__ void add_gradient(int, T, T (&)[kSize]) const {}
  __device__ static float loss() { return 0; }
};

// How much a row's code must know. Sparse is half as large, and enough for index labels with a one-hot h, or with none;
// in a dense target any number of classes may be above zero; a reshaped one is sharpened, or a geometric mean.
enum Targets : int { kSparseTargets, kDenseTargets, kReshapedTargets };

template <class In, bool kAligned, Targets kTargets, class Source = TensorSource>
struct Row {
  using T = Accumulated<In>;
  using Pieces = Piece<In>;
  static constexpr int kSize = Pieces::kSize;
  static constexpr bool kDense = kTargets != kSparseTargets, kReshaped = kTargets == kReshapedTargets;
  static constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

  const Problem<In>& problem;
  const Layout<In, kAligned>& layout;
  const int64_t i;
  const T alpha;
  const T factor;  // of the gradient; it comes last, so that who hands 1 and multiplies afterwards has the same bits
  T own = 1;       // the weight that the row makes itself
  CachedRow<In, kAligned> logits;
  OutputRow<In, kAligned> out;
  Mixture<T> mix;
  int label = -1, hard = -1;  // columns of a one-hot y and h
  bool bad_label = false;     // out of range
  bool poisoned = false;      // the target is not a number: by its label or by a hardmax of NaN
  Online<In> top;             // of the logits
  Source source;
  T source_top = 0, source_scale = 0, inverse_temperature = 1;
  T target_top = 0, target_scale = 1;  // of a reshaped target
  RowResult<T> result;

  __device__ Row(const Problem<In>& problem, const Layout<In, kAligned>& layout, int64_t i, T alpha, T factor,
                 const Source& source)
      : problem(problem),
        layout(layout),
        i(i),
        alpha(alpha),
        factor(factor),
        logits(problem.logits, i, layout, problem.cache_slots),
        out(problem.gradient_row(i, layout)),
        mix(mixture(alpha, problem.label_smoothing, problem.classes)),
        source(source) {}

  __device__ RowResult<T> run() {
    read_label();
    read_logits_and_source();
    if (poisoned) mix.label = mix.uniform = kNaN;
    if constexpr (kDense) {
      if (problem.row_power != 0) own = own_weight();
      if constexpr (kReshaped) scan_target();
      const bool log_loss = problem.loss == kCrossEntropy || problem.loss == kKl;
      const bool one_hot = !kReshaped && (mix.source == 0 || problem.label_fn == kHardmax);
      if (!source.wants_dense() && log_loss && problem.labels && mix.uniform == 0 && one_hot)
        sparse();
      else
        dense();
      result.loss = weighted_loss(own, result.loss);
      if (problem.want_stats) result.correct = is_correct(problem, i, layout, top);
    } else {
      sparse();
      if (problem.want_stats) result.correct = top.top == top.top && top.index == label && !bad_label;
    }
    return result;
  }

 private:
  static __device__ void widen(const Pieces& piece, T (&x)[kSize]) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) x[j] = static_cast<T>(piece.at[j]);
  }

  __device__ T weight(int column) const { return problem.class_weight ? problem.class_weight[column] : T(1); }

  __device__ void read_label() {
    if (!problem.labels) return;
    const int64_t given = problem.labels[i * problem.label_stride];
    bad_label = poisoned = given < 0 || given >= problem.classes;  // no address is made of it
    label = bad_label ? 0 : static_cast<int>(given);
  }

  // p_label^row_power
  __device__ T own_weight() const {
    return exp(problem.row_power * ((static_cast<T>(logits[label]) - top.top) - log(top.total)));
  }

  __device__ void read_logits_and_source() {
    const bool own_source = !source.present();
    const bool hardmax = mix.source != 0 && problem.label_fn == kHardmax;
    const bool softmax = kDense && mix.source != 0 && problem.label_fn == kSoftmax;
    if (softmax) inverse_temperature = T(1) / problem.label_parameter;

    const bool sums = !kDense || problem.loss != kMse || (own_source && softmax) || Source::kNeedsSoftmax;
    const bool want_index = problem.want_stats || (own_source && hardmax);
    if (sums || want_index) {
      const T own_temperature = own_source ? inverse_temperature : T(1);
      logits.template each<4>([&](int step, const Pieces& piece) {
        T x[kSize];
        widen(piece, x);
        top.add(step, x, sums, own_temperature);
      });
      top.finish(layout, sums, want_index, own_temperature,
                 [&](int step, T(&x)[kSize]) { widen(logits.fetch(step), x); });
    }
    source.begin(top, layout);
    if (!hardmax && !softmax) return;
    const Online<In> peak = own_source ? top : scan(source, i, layout, softmax, hardmax, inverse_temperature);
    if (hardmax) {
      hard = peak.index;
      poisoned = poisoned || peak.top != peak.top;
    } else {
      source_top = peak.top;
      source_scale = mix.source / peak.tempered;
    }
  }

  // Cross entropy or KL against a target of at most two classes: O(1) beside the softmax.
  __device__ void sparse() {
    const int source = mix.source == 0 ? label : hard;
    const T log_total = log(top.total);
    const T at_label = mix.label * weight(label), at_source = mix.source * weight(source);
    const T mass = at_label + at_source;
    const auto negative_log = [&](int column) { return log_total - (static_cast<T>(logits[column]) - top.top); };
    if (at_label != 0) result.loss += at_label * negative_log(label);
    if (at_source != 0) result.loss += at_source * negative_log(source);
    if (problem.loss == kKl) result.loss += sparse_log_target(source, weight(label), weight(source));
    if (problem.want_stats) {
      result.entropy = -sparse_log_target(source, T(1), T(1));
      result.agrees = top.top == top.top && mix.label == mix.label && keeps_label(mix, label, source);
    }
    if (!(top.total > 0)) result.loss = kNaN;  // a NaN or nothing but -inf, whatever the target weighs
    if (!problem.wants_gradient()) return;

    const T scale = mass / top.total;
    logits.template each<1>([&](int step, const Pieces& piece) {
      T g[kSize];
      widen(piece, g);
#pragma unroll
      for (int j = 0; j < kSize; ++j) g[j] = exponential<In>(g[j] - top.top) * scale * own * factor;
      out.store(step, g);
    });
    // The target's classes once more, each by the thread that has just written it.
    const auto write = [&](int column, T weighted_target) {
      if (!layout.owns(column)) return;
      const T p = exponential<In>(static_cast<T>(logits[column]) - top.top) / top.total;
      out.store_one(column, cross_entropy_gradient(p, weighted_target, mass) * own * factor);
    };
    if (source == label) {
      write(label, mass);
    } else {
      write(label, at_label);
      write(source, at_source);
    }
  }

  // sum_c w_c t_c log t_c of a target of at most two classes
  __device__ T sparse_log_target(int source, T label_weight, T source_weight) const {
    if (label == source) return label_weight * t_log_t(mix.label + mix.source);
    return label_weight * t_log_t(mix.label) + source_weight * t_log_t(mix.source);
  }

  static __device__ T t_log_t(T t) { return t == 0 ? T(0) : t * log(t); }

  // Any target: made anew, piece by piece, wherever it is needed.
  __device__ void dense() {
    T sums[3] = {0, 0, 0};  // loss, mass or inner product, entropy
    T best = -std::numeric_limits<T>::infinity();
    int best_column = Online<In>::kNowhere;
    const T log_total = log(top.total), normalizer = T(1) / top.total;
    logits.template each<1>([&](int step, const Pieces& piece) {
      T x[kSize], t[kSize];
      widen(piece, x);
      target(step, x, t);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (!layout.holds(step, j)) continue;
        if (problem.loss == kMse) {
          sums[0] += (x[j] - t[j]) * (x[j] - t[j]);
        } else if (problem.loss == kBrier) {
          const T p = exponential<In>(x[j] - top.top) * normalizer;
          sums[0] += (p - t[j]) * (p - t[j]);
          sums[1] += p * (p - t[j]);
        } else {
          const T weighted = t[j] * weight(layout.column(step, j));
          sums[1] += weighted;
          // A class with no target mass adds nothing, though its logit be -inf.
          if (weighted != 0)
            sums[0] += weighted * (log_total - (x[j] - top.top) + (problem.loss == kKl ? log(t[j]) : T(0)));
        }
        if (!problem.want_stats) continue;
        sums[2] -= t_log_t(t[j]);
        if (!(t[j] <= best)) best = max_or_nan(best, t[j]), best_column = layout.column(step, j);
      }
    });
    team_sum(layout.team, sums);
    result.loss = problem.loss == kMse ? sums[0] / problem.classes : sums[0];
    if (problem.loss != kMse && !(top.total > 0)) result.loss = kNaN;
    result.loss += source.loss();
    if (problem.want_stats) dense_stats(sums[2], best, best_column);
    if (problem.wants_gradient()) write_dense_gradient(sums[1], normalizer);
  }

  __device__ void write_dense_gradient(T mass_or_inner, T normalizer) {
    logits.template each<1>([&](int step, const Pieces& piece) {
      T x[kSize], t[kSize];
      widen(piece, x);
      target(step, x, t);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        if (problem.loss == kMse) {
          x[j] = mse_gradient(x[j] - t[j], static_cast<T>(problem.classes)) * own * factor;
          continue;
        }
        const T p = exponential<In>(x[j] - top.top) * normalizer;
        if (problem.loss == kBrier)
          x[j] = brier_gradient(p, p - t[j], mass_or_inner) * own * factor;
        else if (layout.holds(step, j))
          x[j] = cross_entropy_gradient(p, t[j] * weight(layout.column(step, j)), mass_or_inner) * own * factor;
      }
      source.add_gradient(step, factor, x);
      out.store(step, x);
    });
  }

  // A geometric mean is renormalised whatever its power; a row with alpha = 1 is its label, to the target power.
  __device__ bool geometric() const { return problem.mixing == kGeometric && mix.source != 0; }
  __device__ bool reshaped() const { return kReshaped && (geometric() || problem.target_power != T(1)); }

  // The logarithms of one piece of a target to be reshaped, but for a constant.
  __device__ void log_target(int step, const T (&x)[kSize], T (&v)[kSize]) const {
    if (geometric()) {
      log_geometric_mean(step, x, v);
    } else {
      arithmetic_mean(step, x, v);
#pragma unroll
      for (int j = 0; j < kSize; ++j) v[j] = log(v[j]);
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      if (!layout.holds(step, j)) v[j] = -std::numeric_limits<T>::infinity();
  }

  // alpha log y + (1 - alpha) log h, h being a softmax
  __device__ void log_geometric_mean(int step, const T (&x)[kSize], T (&v)[kSize]) const {
    const Mixture<T> alone = label_alone(problem.label_smoothing, problem.classes);
    T y[kSize];
    if (problem.labels) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) y[j] = layout.column(step, j) == label ? T(1) : T(0);
    } else {
      problem.soft_labels.load(i, layout, step, T(0), y);
    }
    if (source.present()) {
      source.load(i, layout, step, T(0), v);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) v[j] = x[j];
    }
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      v[j] = (v[j] - source_top) * inverse_temperature * mix.source;
      if (alpha != 0) v[j] += alpha * log(alone.uniform + alone.label * y[j]);
      if (poisoned) v[j] = kNaN;
    }
  }

  __device__ void scan_target() {
    if (!reshaped()) return;
    Online<In> online;
    logits.template each<1>([&](int step, const Pieces& piece) {
      T x[kSize], v[kSize];
      widen(piece, x);
      log_target(step, x, v);
      online.add(step, v, true, problem.target_power);
    });
    online.finish(layout, true, false, problem.target_power, [](int, T(&)[kSize]) {});
    target_top = online.top;
    target_scale = T(1) / online.tempered;
  }

  // The columns of one piece of the target, x being the logits there.
  __device__ void target(int step, const T (&x)[kSize], T (&t)[kSize]) const {
    if (!reshaped()) return arithmetic_mean(step, x, t);
    log_target(step, x, t);
#pragma unroll
    for (int j = 0; j < kSize; ++j) t[j] = exponential<In>((t[j] - target_top) * problem.target_power) * target_scale;
  }

  __device__ void arithmetic_mean(int step, const T (&x)[kSize], T (&t)[kSize]) const {
#pragma unroll
    for (int j = 0; j < kSize; ++j) t[j] = mix.uniform;
    if (problem.labels) {
      add_one_hot(step, label, mix.label, t);
    } else {
      T y[kSize];
      problem.soft_labels.load(i, layout, step, T(0), y);
#pragma unroll
      for (int j = 0; j < kSize; ++j) t[j] += mix.label * y[j];
    }
    if (mix.source == 0) return;
    if (problem.label_fn == kHardmax) return add_one_hot(step, hard, mix.source, t);
    T h[kSize];
    if (source.present()) {
      source.load(i, layout, step, T(0), h);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) h[j] = x[j];
    }
    const T slope = problem.label_fn == kClip ? clip_slope(problem.label_parameter) : T(1);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      if (problem.label_fn == kSoftmax) {
        t[j] += source_scale * exponential<In>((h[j] - source_top) * inverse_temperature);
        continue;
      }
      h[j] *= slope;
      if (problem.label_fn == kClip) h[j] = h[j] < T(-1) ? T(-1) : h[j] > T(1) ? T(1) : h[j];
      t[j] += mix.source * h[j];
    }
  }

  __device__ void add_one_hot(int step, int column, T value, T (&t)[kSize]) const {
#pragma unroll
    for (int j = 0; j < kSize; ++j)
      if (layout.column(step, j) == column) t[j] += value;
  }

  __device__ void dense_stats(T entropy, T best, int best_column) {
    result.entropy = entropy;
    const T peak = team_max_or_nan(layout.team, best);
    const int index = team_min(layout.team, best == peak ? best_column : Online<In>::kNowhere);
    if (problem.one_column_signs()) {
      result.agrees = (peak > 0) == (problem.soft_labels.template element<T>(i, 0) > 0);
    } else if (peak == peak) {
      result.agrees = index == (problem.labels ? label : scan(problem.soft_labels, i, layout, false, true, T(1)).index);
    }
  }
};

// The gradient of an ignored row.
template <class In, bool kAligned>
__device__ void zero_row(const Problem<In>& problem, int64_t i, const Layout<In, kAligned>& layout) {
  const OutputRow<In, kAligned> out = problem.gradient_row(i, layout);
  const Accumulated<In> zeros[Piece<In>::kSize] = {};
  for (int step = 0; step < layout.steps(); ++step) out.store(step, zeros);
}

}  // namespace sdfast::self_distillation
