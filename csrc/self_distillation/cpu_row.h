// One row of the self-distillation loss on the CPU: which loops it needs, in which order, over which scratch.
#pragma once

#include "cpu_problem.h"

namespace sdfast::self_distillation {

// What a caller that has read the logits already hands to a row: their softmax, and a source of its own.
template <class T>
struct Prepared {
  T total;          // sum_c exp(x_c - top), whose terms lie in the gradient (in kTerms where there is none, or mse)
  const T* source;  // (C,) logits, or with a source_sum probabilities times that sum
  T source_sum;     // 0 for logits
};

// One row: its loss, and factor times its gradient into `gradient` unless that is null. The factor comes last, whatever
// the path: a caller that hands 1 and multiplies afterwards has the same bits.
template <class T>
struct Row {
  const Problem<T>& problem;
  Scratch<T>& scratch;
  const Columns columns;
  const int64_t i, label;  // label -1 with soft labels
  const T* const x;        // logits
  const T* const soft_labels;
  const T* const w;  // class weights or null
  Mixture<T> mix;
  const T row_factor;  // as handed in
  const T factor;      // of the gradient as its loops write it: 1 where `weigh` goes over it once more
  T* const gradient;
  Peak<T> top;  // of the logits, once found
  bool top_found;
  const Softmax<T>* given = nullptr;  // where `run_rows` made it, the gradient up to its two corrections included
  T log_total = 0;                    // of the logits' softmax, once found
  const Prepared<T>* prepared = nullptr;
  RowResult<T> result;

  Row(const Problem<T>& problem, Scratch<T>& scratch, bool split_columns, int64_t i, const Peak<T>* known, T factor,
      T* gradient)
      : problem(problem),
        scratch(scratch),
        columns{problem.classes, split_columns},
        i(i),
        label(problem.label(i)),
        x(scratch.fetch(problem.logits, i, Scratch<T>::kLogits)),
        soft_labels(problem.soft_labels ? scratch.fetch(problem.soft_labels, i, Scratch<T>::kSoftLabels) : nullptr),
        w(problem.class_weight),
        mix(mixture(problem.alpha_of(i), problem.label_smoothing, problem.classes)),
        row_factor(factor),
        factor(problem.row_power != 0 ? T(1) : factor),
        gradient(gradient),
        top_found(known != nullptr) {
    if (known) top = *known;
  }

  RowResult<T> run() {
    const bool own_source = !(problem.source || prepared) || mix.source == 0;
    const T* source = own_source ? x
                      : prepared ? prepared->source
                                 : scratch.fetch(problem.source, i, Scratch<T>::kSource);
    const bool one_hot = (problem.label_fn == kHardmax || mix.source == 0) && !problem.reshapes_target();
    if (problem.labels && one_hot && (problem.loss == kCrossEntropy || problem.loss == kKl)) {
      sparse(mix.source == 0 ? label : own_source ? -1 : hardmax_of(source));
    } else {
      dense(source, own_source);
    }
    if (problem.want_stats) result.correct = is_correct(problem, top, x, soft_labels, label, columns);
    if (problem.row_power != 0) weigh();
    return result;
  }

  // The row times p_label^row_power: known only now, so the gradient is scaled after it is written.
  void weigh() {
    const T own = std::exp(problem.row_power * ((x[label] - top.value) - log_total));
    result.loss = weighted_loss(own, result.loss);
    if (gradient) columns.apply([&](int64_t b, int64_t e) { scale(gradient + b, e - b, own, row_factor); });
  }

  const Peak<T>& find_top() {
    if (!top_found) top = peak_of(x, columns), top_found = true;
    return top;
  }
  T exponentials(T* terms) {
    return prepared ? prepared->total : exp_sum_of(x, columns, find_top().value, T(1), terms);
  }
  const T* weights(int64_t begin) const { return w ? w + begin : nullptr; }
  T weight(int64_t c) const { return w ? w[c] : T(1); }

  // Cross entropy or KL against a target with at most two classes above its uniform floor: O(1) beside the softmax.
  // `source` is h's class; negative where h is the one-hot of these very logits.
  void sparse(int64_t source) {
    const bool bare = !w && mix.uniform == 0;  // then the target's mass is known before the softmax
    const bool small = bare && columns.count <= kSmallRow<T> && !prepared;
    T mass = mix.label + mix.source;
    T total;
    if (small) {
      const Softmax<T> softmax = given ? *given : small_row(mass);
      top = softmax.top;
      total = softmax.total;
      log_total = softmax.log_total;
    } else {
      total = exponentials(gradient);
      log_total = std::log(total);
    }
    if (source < 0) source = top.index;
    const auto negative_log = [&](int64_t c) { return log_total - (x[c] - top.value); };
    const T at_label = mix.label * weight(label), at_source = mix.source * weight(source);
    if (at_label != 0) result.loss += at_label * negative_log(label);
    if (at_source != 0) result.loss += at_source * negative_log(source);
    if (!bare) {
      mass = at_label + at_source + mix.uniform * (w ? problem.class_weight_sum : T(columns.count));
      if (mix.uniform != 0) result.loss += mix.uniform * negative_log_sum_of();
    }
    if (problem.loss == kKl) result.loss += sparse_log_target(source, w != nullptr);
    if (problem.want_stats) {
      result.entropy = -sparse_log_target(source, false);
      result.agrees = !top.nan && keeps_label(mix, label, source);
    }
    if (top.nan) result.loss = std::numeric_limits<T>::quiet_NaN();
    if (!gradient) return;
    if (small)
      finish_small_gradient(gradient, columns.count, label, at_label, source, at_source, T(1), factor);
    else
      finish_gradient(mass / total, source, at_label, at_source);
  }

  // From the exponentials in `gradient`; the two classes of the target are made by themselves.
  void finish_gradient(T scaled, int64_t source, T at_label, T at_source) {
    const auto raw = [&](int64_t c) { return gradient[c] * scaled - mix.uniform * weight(c); };
    T of_label = raw(label) - at_label, of_source = raw(source) - at_source;
    if (source == label) of_label = of_source = of_label - at_source;
    columns.apply([&](int64_t b, int64_t e) {
      if (mix.uniform != 0)
        scale_minus(gradient + b, e - b, scaled, mix.uniform, weights(b), factor);
      else
        scale(gradient + b, e - b, scaled, factor);
    });
    gradient[label] = of_label * factor;
    gradient[source] = of_source * factor;
  }

  Softmax<T> small_row(T scale) const {
    T scales[vec::kLanes<T>] = {scale};
    Softmax<T> softmax;
    small_rows(x, int64_t{0}, 1, columns.count, scales, gradient, &softmax);
    return softmax;
  }

  T negative_log_sum_of() const {
    return columns.fold<T>(
        [&](int64_t b, int64_t e) { return negative_log_sum(x + b, e - b, top.value, log_total, weights(b)); },
        [](T left, T right) { return left + right; });
  }

  // The class of the source's one-hot; a source with a NaN teaches nothing but NaN.
  int64_t hardmax_of(const T* source) {
    const Peak<T> peak = peak_of(source, columns);
    if (peak.nan) mix.source = std::numeric_limits<T>::quiet_NaN();
    return peak.index;
  }

  // sum_c w_c t_c log t_c of a sparse target
  T sparse_log_target(int64_t source, bool weighted) const {
    const auto term = [](T t) { return t == 0 ? T(0) : t * std::log(t); };
    const auto of = [&](int64_t c) { return weighted ? w[c] : T(1); };
    T floor_weight = (weighted ? problem.class_weight_sum : T(columns.count)) - of(label);
    T sum = 0;
    if (label == source) {
      sum = of(label) * term(mix.uniform + mix.label + mix.source);
    } else {
      sum = of(label) * term(mix.uniform + mix.label) + of(source) * term(mix.uniform + mix.source);
      floor_weight -= of(source);
    }
    return mix.uniform == 0 ? sum : sum + floor_weight * term(mix.uniform);
  }

  // Any target: written out for this one row.
  void dense(const T* source, bool own_source) {
    find_top();
    const bool softmax_of_logits = problem.loss != kMse;
    T* terms = gradient && softmax_of_logits ? gradient : nullptr;
    T total = 1;
    if (softmax_of_logits) {
      if (!terms && (problem.loss == kBrier || own_source)) terms = scratch.row(Scratch<T>::kTerms);
      total = exponentials(terms);
      log_total = std::log(total);
    }
    const T* target = mixed_target(source, own_source, softmax_of_logits ? terms : nullptr, total);
    if (problem.loss == kMse) {
      squared(target);
    } else if (problem.loss == kBrier) {
      brier(target, terms, T(1) / total);
    } else {
      cross_entropy(target, total);
    }
    if (problem.want_stats) target_stats(target);
  }

  const T* mixed_target(const T* source, bool own_source, const T* own_terms, T own_total) {
    T* target = scratch.row(Scratch<T>::kTarget);
    if (problem.mixing == kGeometric && mix.source != 0) {
      log_geometric_mean(target, source);
      exponentiate(target);
      return target;
    }
    Mixture<T> scaled = mix;
    const T* h = mix.source != 0 ? source : nullptr;
    const T slope = problem.label_fn == kClip ? clip_slope(problem.label_parameter) : T(0);
    int64_t hard = -1;
    if (h && problem.label_fn == kHardmax) {
      const Peak<T> peak = own_source ? top : peak_of(h, columns);
      hard = peak.index;
      h = nullptr;
      if (peak.nan) scaled.uniform = std::numeric_limits<T>::quiet_NaN();
    } else if (h && prepared && prepared->source_sum > 0 && problem.label_fn == kSoftmax) {
      scaled.source /= prepared->source_sum;
    } else if (h && problem.label_fn == kSoftmax) {
      if (own_source && own_terms && problem.label_parameter == 1) {
        scaled.source /= own_total;
        h = own_terms;
      } else {
        const T shift = own_source ? top.value : peak_of(h, columns).value;
        scaled.source /= exp_sum_of(h, columns, shift, T(1) / problem.label_parameter, target);
        h = target;
      }
    }
    columns.apply([&](int64_t b, int64_t e) {
      mix_target(target + b, e - b, scaled, soft_labels ? soft_labels + b : nullptr, h ? h + b : nullptr, slope);
    });
    if (!soft_labels) target[label] += mix.label;
    if (hard >= 0) target[hard] += mix.source;
    if (problem.target_power != 1) {
      columns.apply([&](int64_t b, int64_t e) { take_logarithms(target + b, e - b); });
      exponentiate(target);
    }
    return target;
  }

  // alpha log y + (1 - alpha) log h but for a constant, h being a softmax
  void log_geometric_mean(T* target, const T* source) {
    const T alpha = problem.alpha_of(i), rate = mix.source / problem.label_parameter;
    const Mixture<T> alone = label_alone(problem.label_smoothing, columns.count);
    const T floor = alpha == 0 || soft_labels ? T(0) : alpha * std::log(alone.uniform);
    const T* y = alpha == 0 ? nullptr : soft_labels;
    const T shift = source == x ? top.value : peak_of(source, columns).value;
    columns.apply([&](int64_t b, int64_t e) {
      mix_logarithms(target + b, e - b, source + b, shift, rate, y ? y + b : nullptr, alone, alpha, floor);
    });
    if (!soft_labels && alpha != 0)
      target[label] = (source[label] - shift) * rate + alpha * std::log(alone.uniform + alone.label);
  }

  // A row of logarithms as probabilities, to the target power
  void exponentiate(T* target) {
    const T total = exp_sum_of(target, columns, peak_of(target, columns).value, problem.target_power, target);
    columns.apply([&](int64_t b, int64_t e) { scale(target + b, e - b, T(1) / total); });
  }

  void cross_entropy(const T* target, T total) {
    const Sums<T> sums = columns.fold<Sums<T>>(
        [&](int64_t b, int64_t e) {
          return cross_entropy_sums(x + b, target + b, e - b, top.value, log_total, weights(b), problem.loss == kKl);
        },
        [](const Sums<T>& left, const Sums<T>& right) {
          return Sums<T>{left.mass + right.mass, left.loss + right.loss};
        });
    result.loss = top.nan ? std::numeric_limits<T>::quiet_NaN() : sums.loss;
    if (!gradient) return;
    columns.apply([&](int64_t b, int64_t e) {
      write_cross_entropy_gradient(gradient + b, target + b, e - b, T(1) / total, sums.mass, factor, weights(b));
    });
  }

  void squared(const T* target) {
    const T classes = static_cast<T>(columns.count);
    result.loss =
        columns.fold<T>(
            [&](int64_t b, int64_t e) {
              return squared_error(x + b, target + b, e - b, classes, factor, gradient ? gradient + b : nullptr);
            },
            [](T left, T right) { return left + right; }) /
        classes;
  }

  void brier(const T* target, const T* terms, T normalizer) {
    const BrierSums<T> sums = columns.fold<BrierSums<T>>(
        [&](int64_t b, int64_t e) { return brier_sums(terms + b, target + b, e - b, normalizer); },
        [](const BrierSums<T>& left, const BrierSums<T>& right) {
          return BrierSums<T>{left.loss + right.loss, left.inner + right.inner};
        });
    result.loss = sums.loss;
    if (!gradient) return;
    columns.apply([&](int64_t b, int64_t e) {
      write_brier_gradient(gradient + b, target + b, e - b, normalizer, sums.inner, factor);
    });
  }

  void target_stats(const T* target) {
    const auto add = [](T left, T right) { return left + right; };
    result.entropy = columns.fold<T>([&](int64_t b, int64_t e) { return entropy(target + b, e - b); }, add);
    if (problem.one_column_signs()) {
      result.agrees = (target[0] > 0) == (soft_labels[0] > 0);
      return;
    }
    const Peak<T> best = peak_of(target, columns);
    result.agrees = !best.nan && best.index == (soft_labels ? peak_of(soft_labels, columns).index : label);
  }
};

// A row by itself. `known` is its peak where an earlier pass found it, else null.
template <class T>
RowResult<T> run_row(const Problem<T>& problem, Scratch<T>& scratch, bool split_columns, int64_t i,
                     const Peak<T>* known, T factor, const OutputRows& out, const Softmax<T>* given = nullptr) {
  T* const direct = out ? out.template direct<T>(i) : nullptr;
  T* const gradient = out && !direct ? scratch.row(Scratch<T>::kGradient) : direct;
  RowResult<T> result;
  if (problem.kept(i)) {
    Row<T> row(problem, scratch, split_columns, i, known, factor, gradient);
    row.given = given;
    result = row.run();
  } else if (gradient) {
    std::fill_n(gradient, problem.classes, T(0));
  }
  if (gradient && !direct) out.write(i, gradient);
  return result;
}

// Whether every row is bare, small, and read and written in place.
template <class T>
bool rows_are_small(const Problem<T>& problem, const OutputRows& out) {
  const bool one_hot =
      (problem.label_fn == kHardmax && !problem.source) || (!problem.alpha && problem.shared_alpha == 1);
  return problem.classes <= kSmallRow<T> && problem.labels && one_hot && !problem.class_weight &&
         !problem.reshapes_target() && problem.label_smoothing == 0 &&
         (problem.loss == kCrossEntropy || problem.loss == kKl) && problem.logits.template direct<T>() &&
         (!out || out.template direct<T>(0));
}

// What `Row::sparse` does after the softmax, for the commonest call: cross entropy alone, h the one-hot of the logits
// or absent. Worth its lines at ten classes, where setting up a `Row` costs as much as its softmax.
// With kWeighted the row is times p_label^power, as by `Row::weigh`.
template <bool kWeighted, class T>
T finish_small_row(const T* x, int64_t label, const Softmax<T>& softmax, const Mixture<T>& mix, T factor, T* gradient,
                   int64_t classes, T power) {
  T loss = 0;
  if (mix.label != 0) loss += mix.label * (softmax.log_total - (x[label] - softmax.top.value));
  if (mix.source != 0) loss += mix.source * softmax.log_total;
  T own = 1;
  if constexpr (kWeighted) own = std::exp(power * ((x[label] - softmax.top.value) - softmax.log_total));
  if (gradient) finish_small_gradient(gradient, classes, label, mix.label, softmax.top.index, mix.source, own, factor);
  if (softmax.top.nan) return std::numeric_limits<T>::quiet_NaN();
  return kWeighted ? weighted_loss(own, loss) : loss;
}

// Rows [begin, end): factor_of(i) scales row i's gradient, and its result goes to results[i] unless that is null.
template <class T, class Factor>
void run_rows(const Problem<T>& problem, int64_t begin, int64_t end, bool split_columns, const Peak<T>* peaks,
              const Factor& factor_of, const OutputRows& out, RowResult<T>* results) {
  Scratch<T> scratch(problem.classes);
  const bool small = rows_are_small(problem, out);
  const bool bare = small && problem.loss == kCrossEntropy && !problem.want_stats && results;
  const int64_t step = small ? vec::kLanes<T> : 1, stride = problem.logits.row_stride;
  for (int64_t first = begin; first < end; first += step) {
    const int rows = static_cast<int>(std::min(step, end - first));
    T factors[vec::kLanes<T>], scales[vec::kLanes<T>] = {};
    Mixture<T> mixes[vec::kLanes<T>];
    Softmax<T> softmax[vec::kLanes<T>];
    for (int r = 0; r < rows; ++r) {
      factors[r] = factor_of(first + r);
      mixes[r] = mixture(problem.alpha_of(first + r), T(0), int64_t{1});
      scales[r] = mixes[r].label + mixes[r].source;
    }
    const T* x = static_cast<const T*>(problem.logits.data) + first * stride;
    T* gradient = small && out ? out.template direct<T>(first) : nullptr;
    if (small) small_rows(x, stride, rows, problem.classes, scales, gradient, softmax);
    for (int r = 0; r < rows; ++r) {
      const int64_t i = first + r;
      if (bare && problem.kept(i)) {
        T* const to = gradient ? gradient + r * problem.classes : nullptr;
        const auto finish = [&](auto weighted) {
          return finish_small_row<weighted>(x + r * stride, problem.label(i), softmax[r], mixes[r], factors[r], to,
                                            problem.classes, problem.row_power);
        };
        results[i] = {problem.row_power != 0 ? finish(std::true_type()) : finish(std::false_type())};
        continue;
      }
      const RowResult<T> result = run_row(problem, scratch, split_columns, i, peaks ? peaks + i : nullptr, factors[r],
                                          out, small ? softmax + r : nullptr);
      if (results) results[i] = result;
    }
  }
}

}  // namespace sdfast::self_distillation
