// What a call of the self-distillation loss fixes for its rows on the CPU, a thread's scratch, and folds over one row.
#pragma once

#include "../common/rows.h"
#include "cpu_loops.h"

namespace sdfast::self_distillation {

// What a call fixes for all rows.
template <class T>
struct Problem {
  Rows logits, source, soft_labels;  // (N, C); source and soft_labels may be absent
  const int64_t* labels = nullptr;   // (N,), absent with soft_labels
  int64_t label_stride = 0;
  const T* alpha = nullptr;  // (N,) or, with stride 0, one value
  int64_t alpha_stride = 0;
  const T* class_weight = nullptr;  // (C,)
  const T* row_weight = nullptr;    // (N,)
  T class_weight_sum = 0;
  int64_t rows = 0, classes = 0;
  int64_t label_fn = 0, loss = 0, ignore_index = 0;
  T label_parameter = 1, label_smoothing = 0;
  T shared_alpha = 1;
  int64_t mixing = kArithmetic;
  T target_power = 1, row_power = 0;
  bool want_stats = false;

  int64_t label(int64_t i) const { return labels ? labels[i * label_stride] : -1; }
  bool kept(int64_t i) const { return !labels || labels[i * label_stride] != ignore_index; }
  T weight_of(int64_t i) const { return row_weight ? row_weight[i] : T(1); }
  T alpha_of(int64_t i) const { return alpha ? alpha[i * alpha_stride] : shared_alpha; }
  bool reshapes_target() const { return mixing != kArithmetic || target_power != 1; }
  bool one_column_signs() const { return classes == 1 && soft_labels; }  // +-1 labels of a one-column regression
};

template <class T>
struct RowResult {
  T loss = 0, entropy = 0;
  bool correct = false, agrees = false;
};

// Scratch of one thread: a row a slot, made only when a row needs it.
template <class T>
struct Scratch {
  enum Slot { kLogits, kSoftLabels, kSource, kTerms, kTarget, kGradient, kSlots };
  std::vector<T> slots[kSlots];
  int64_t columns;
  explicit Scratch(int64_t columns) : columns(columns) {}
  T* row(Slot slot) {
    if (slots[slot].empty()) slots[slot].resize(columns);
    return slots[slot].data();
  }
  const T* fetch(const Rows& rows, int64_t i, Slot slot) {
    return rows.template row<T>(i, rows.template direct<T>() ? nullptr : row(slot));
  }
};

template <class T>
Peak<T> peak_of(const T* x, const Columns& columns) {
  return columns.fold<Peak<T>>(
      [&](int64_t begin, int64_t end) {
        Peak<T> part = peak(x + begin, end - begin);
        part.index += begin;
        return part;
      },
      [](const Peak<T>& left, const Peak<T>& right) {
        const bool later = right.value > left.value;
        return Peak<T>{later ? right.value : left.value, later ? right.index : left.index, left.nan || right.nan};
      });
}

template <class T>
T exp_sum_of(const T* x, const Columns& columns, T shift, T scale, T* terms) {
  return columns.fold<T>(
      [&](int64_t b, int64_t e) { return exp_sum(x + b, e - b, shift, scale, terms ? terms + b : nullptr); },
      [](T left, T right) { return left + right; });
}

template <class T>
bool is_correct(const Problem<T>& problem, const Peak<T>& top, const T* x, const T* soft_labels, int64_t label,
                const Columns& columns) {
  if (top.nan) return false;
  if (problem.one_column_signs()) return (x[0] > 0) == (soft_labels[0] > 0);
  return top.index == (soft_labels ? peak_of(soft_labels, columns).index : label);
}

}  // namespace sdfast::self_distillation
