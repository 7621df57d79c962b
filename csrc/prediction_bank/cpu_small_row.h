// A bank's row of few columns, for the commonest call: cross entropy against index labels and the bank row as it is.
// Fused: the softmax of up to kLanes rows side by side, then three short loops a row; a row's bits are its own.
// Worth its lines at a hundred classes and fewer, where setting up a `BankRow` costs more than its arithmetic.
#pragma once

#include "cpu_problem.h"

namespace sdfast::prediction_bank {

// With t the source's probabilities: mass = sum_c t_c and loss = sum_c t_c (log_total - (x_c - shift)), a class with
// t_c = 0 adding nothing.
template <class T>
SDFAST_CLONES Sums<T> source_sums(const T* x, const T* t, int64_t n, T shift, T log_total) {
  vec::Total<T> mass, loss;
  sweep<T>(n, [&](int64_t i, auto used, auto slot) SDFAST_INLINE_LAMBDA {
    const Lanes<T> weight = load_some(t + i, used, T(0));
    const Lanes<T> term = log_total - (load_some(x + i, used, shift) - shift);
    loss[slot] += weight == T(0) ? Lanes<T>{} : weight * term;
    mass[slot] += weight;
  });
  return {mass.sum(), loss.sum()};
}

// out_c = factor (p_c mass - share t_c)
template <class T>
SDFAST_CLONES void small_gradient(const T* p, const T* t, int64_t n, T mass, T share, T factor, T* out) {
  sweep<T>(n, [&](int64_t i, auto used, auto) SDFAST_INLINE_LAMBDA {
    const Lanes<T> target = load_some(t + i, used, T(0)) * share;
    store_some(out + i, self_distillation::cross_entropy_gradient(load_some(p + i, used, T(0)), target, mass) * factor,
               used);
  });
}

template <class T>
class SmallBankRows {
 public:
  static constexpr int kRows = vec::kLanes<T>;

  // By the options and the column count alone, so that a row's bits do not depend on how it lies in memory.
  static bool serves(const BankProblem<T>& problem) {
    const Problem<T>& loss = problem.loss;
    return loss.classes <= self_distillation::kSmallRow<T> && loss.labels && loss.loss == kCrossEntropy &&
           loss.label_fn == kSoftmax && loss.label_parameter == 1 && !loss.reshapes_target() && loss.row_power == 0 &&
           loss.label_smoothing == 0 && !loss.class_weight && !loss.want_stats && !problem.storage.classes &&
           problem.bank.strength == 0 && problem.bank.clamp == 0;
  }

  SmallBankRows(const BankProblem<T>& problem, const OutputRows& out)
      : problem_(problem), n_(problem.loss.classes), out_(out), old_(n_), fresh_(n_), gradient_(n_), p_(kRows * n_) {}

  // Rows [first, first + rows), rows <= kRows, of those that `taken(i)` names.
  template <class Taken>
  void run(int64_t first, int rows, const Taken& taken, RowResult<T>* results) {
    const Rows& logits = problem_.loss.logits;
    const T* x = static_cast<const T*>(logits.data) + first * logits.row_stride;
    int64_t stride = logits.row_stride;
    if (!logits.template direct<T>()) {
      x_.resize(kRows * n_);
      for (int r = 0; r < rows; ++r) logits.template row<T>(first + r, x_.data() + r * n_);
      x = x_.data(), stride = n_;
    }
    T ones[kRows];
    std::fill_n(ones, kRows, T(1));
    Softmax<T> softmax[kRows];
    self_distillation::small_rows(x, stride, rows, n_, ones, p_.data(), softmax);
    for (int r = 0; r < rows; ++r) {
      const int64_t i = first + r;
      if (!taken(i)) continue;
      T* const direct = out_ ? out_.template direct<T>(i) : nullptr;
      T* const gradient = out_ && !direct ? gradient_.data() : direct;
      if (problem_.loss.kept(i))
        results[i] = {finish(i, x + r * stride, softmax[r], p_.data() + r * n_, gradient)};
      else if (gradient)
        std::fill_n(gradient, n_, T(0));
      if (gradient && !direct) out_.write(i, gradient);
    }
  }

 private:
  const BankProblem<T>& problem_;
  const int64_t n_;
  const OutputRows& out_;
  std::vector<T> old_, fresh_, gradient_;  // of a row
  std::vector<T> p_, x_;                   // of a block of rows

  // The row's weighted loss, and its gradient unless that is null.
  T finish(int64_t i, const T* x, const Softmax<T>& softmax, const T* p, T* gradient) {
    const Settings<T>& bank = problem_.bank;
    const Storage& storage = problem_.storage;
    const int64_t index = problem_.indices[i], label = problem_.loss.label(i);
    const bool finite = is_finite(softmax.top), writes = finite && problem_.writes(i);
    const T* source = storage.read(index, old_.data());
    if (finite && (writes || bank.write_first))
      blend(source, p, n_, T(1), T(0), T(1), bank.weight(storage.seen[index]), fresh_.data());
    if (finite && bank.write_first) source = fresh_.data();

    const Mixture<T> mix = self_distillation::mixture(problem_.loss.alpha_of(i), T(0), int64_t{1});
    T loss = 0, share = 0;
    if (mix.label != 0) loss = mix.label * (softmax.log_total - (x[label] - softmax.top.value));
    if (mix.source != 0) {
      const Sums<T> sums = source_sums(x, source, n_, softmax.top.value, softmax.log_total);
      share = mix.source / sums.mass;
      loss += share * sums.loss;
    }
    if (softmax.top.nan) loss = std::numeric_limits<T>::quiet_NaN();

    if (gradient) {
      const T mass = mix.label + mix.source, factor = problem_.factor_of(i);
      const T* target = mix.source != 0 ? source : p;  // a row that does not teach is not looked at, whatever it holds
      small_gradient(p, target, n_, mass, share, factor, gradient);
      // As `finish_small_gradient` has it, so that a row with alpha = 1 has the plain loss's bits.
      gradient[label] = (p[label] * mass - target[label] * share - mix.label) * factor;
    }
    if (writes) storage.write_dense(index, fresh_.data());
    return problem_.loss.weight_of(i) * loss;
  }
};

// Of rows [begin, end) those that `taken(i)` names.
template <class T, class Taken>
void run_small_rows(const BankProblem<T>& problem, int64_t begin, int64_t end, const OutputRows& out,
                    const Taken& taken, RowResult<T>* results) {
  SmallBankRows<T> rows(problem, out);
  constexpr int64_t kRows = SmallBankRows<T>::kRows;
  for (int64_t first = begin; first < end; first += kRows)
    rows.run(first, static_cast<int>(std::min(kRows, end - first)), taken, results);
}

}  // namespace sdfast::prediction_bank
