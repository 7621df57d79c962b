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
  sweep<T>(n, [&](int64_t i, auto used, auto slot) {
    const Lanes<T> weight = load_some(t + i, used, T(0));
    const Lanes<T> term = log_total - (load_some(x + i, used, shift) - shift);
    loss[slot] += weight == T(0) ? Lanes<T>{} : weight * term;
    mass[slot] += weight;
  });
  return {mass.sum(), loss.sum()};
}

// p_c becomes factor (p_c mass - share t_c)
template <class T>
SDFAST_CLONES void small_gradient(T* p, const T* t, int64_t n, T mass, T share, T factor) {
  sweep<T>(n, [&](int64_t i, auto used, auto) {
    const Lanes<T> target = load_some(t + i, used, T(0)) * share;
    store_some(p + i, self_distillation::cross_entropy_gradient(load_some(p + i, used, T(0)), target, mass) * factor,
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

  // Row i's gradient is `share` times its row weight times that of its loss.
  SmallBankRows(const BankProblem<T>& problem, const OutputRows& out, T share)
      : problem_(problem), n_(problem.loss.classes), out_(out), share_(share), old_(n_), fresh_(n_) {}

  // Rows [first, first + rows), rows <= kRows, of those that `taken(i)` names.
  template <class Taken>
  void run(int64_t first, int rows, const Taken& taken, RowResult<T>* results) {
    const Rows& logits = problem_.loss.logits;
    const bool in_place = out_ && out_.template direct<T>(first);
    T* const p = in_place ? out_.template direct<T>(first) : block(p_);
    const T* x = static_cast<const T*>(logits.data) + first * logits.row_stride;
    int64_t stride = logits.row_stride;
    if (!logits.template direct<T>()) {
      T* const copy = block(x_);
      for (int r = 0; r < rows; ++r) logits.template row<T>(first + r, copy + r * n_);
      x = copy, stride = n_;
    }
    T ones[kRows];
    std::fill_n(ones, kRows, T(1));
    Softmax<T> softmax[kRows];
    self_distillation::small_rows(x, stride, rows, n_, ones, p, softmax);
    for (int r = 0; r < rows; ++r) {
      const int64_t i = first + r;
      if (!taken(i)) continue;
      T* const row = p + r * n_;
      if (problem_.loss.kept(i))
        results[i] = {finish(i, x + r * stride, softmax[r], row)};
      else
        std::fill_n(row, n_, T(0));
      if (out_ && !in_place) out_.write(i, row);
    }
  }

 private:
  const BankProblem<T>& problem_;
  const int64_t n_;
  const OutputRows& out_;
  const T share_;
  std::vector<T> old_, fresh_, x_, p_;  // of a row, and of a block of them where they are not in place
  std::vector<int32_t> order_;          // stays empty: the rows are dense

  T* block(std::vector<T>& of) {
    if (of.empty()) of.resize(kRows * n_);
    return of.data();
  }

  // The row's weighted loss; its gradient overwrites p.
  T finish(int64_t i, const T* x, const Softmax<T>& softmax, T* p) {
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

    const T row_weight = problem_.loss.weight_of(i), factor = row_weight * share_;
    if (out_) {
      small_gradient(p, source, n_, mix.label + mix.source, share, factor);
      p[label] -= factor * mix.label;
    }
    if (writes) storage.write(index, fresh_.data(), order_);
    return row_weight * loss;
  }
};

// Of rows [begin, end) those that `taken(i)` names, `step` at a time: 1 where the gradients of others are ready.
template <class T, class Taken>
void run_small_rows(const BankProblem<T>& problem, int64_t begin, int64_t end, int64_t step, T share,
                    const OutputRows& out, const Taken& taken, RowResult<T>* results) {
  SmallBankRows<T> rows(problem, out, share);
  for (int64_t first = begin; first < end; first += step) {
    if (step > 1 || taken(first)) rows.run(first, static_cast<int>(std::min(step, end - first)), taken, results);
  }
}

}  // namespace sdfast::prediction_bank
