// One row of the distillation loss on the CPU. The label's cross entropy is the self-distillation kernel's own row at
// alpha 1, so a row with alpha = 1 has that loss's very bits; the divergence adds to it.
#pragma once

#include "../self_distillation/cpu_row.h"
#include "cpu_loops.h"

namespace sdfast::distillation {

using self_distillation::exp_sum_of;
using self_distillation::Peak;
using self_distillation::peak_of;
using self_distillation::Softmax;

// What a call fixes for all rows.
template <class T>
struct Problem {
  self_distillation::Problem<T> hard;  // logits, labels and row weights: cross entropy at alpha 1
  Rows teacher;                        // (N, C), or (N, k)
  const int64_t* indices = nullptr;    // (N, k) contiguous, with top-k
  const T* tail = nullptr;             // (N,), with top-k
  const T* alpha = nullptr;            // (N,) or, with stride 0, one value
  int64_t alpha_stride = 0;
  T shared_alpha = 0, temperature = 1, teacher_temperature = 1;
  int64_t divergence = 0, form = 0;
  bool labelled = false;

  T alpha_of(int64_t i) const { return alpha ? alpha[i * alpha_stride] : shared_alpha; }
};

// Scratch of one thread beside that of the cross entropy: a row a slot, made only when a row needs it.
template <class T>
struct Scratch {
  enum Slot { kTeacher, kListed, kStudentTerms, kTeacherTerms, kMasked, kSlots };
  self_distillation::Scratch<T> hard;
  std::vector<T> slots[kSlots];
  int64_t columns;
  explicit Scratch(int64_t columns) : hard(columns), columns(columns) {}
  T* row(Slot slot) {
    if (slots[slot].empty()) slots[slot].resize(columns);
    return slots[slot].data();
  }
};

// What `run_rows` made beforehand of a small row: softmaxes and probabilities; null where it did not.
template <class T>
struct Given {
  const Softmax<T>*hard = nullptr, *student = nullptr, *teacher = nullptr;
  T *p = nullptr, *q = nullptr;
};

// One row: its loss, and factor times its gradient into `gradient` unless that is null.
template <class T>
struct Row {
  const Problem<T>& problem;
  Scratch<T>& scratch;
  const Columns columns;
  const int64_t i;
  const T alpha, factor;
  T* const gradient;
  const T* x = nullptr;  // logits
  Peak<T> top;           // of the logits
  Given<T> given;
  Softmax<T> alone[2];

  Row(const Problem<T>& problem, Scratch<T>& scratch, bool split_columns, int64_t i, T factor, T* gradient)
      : problem(problem),
        scratch(scratch),
        columns{problem.hard.classes, split_columns},
        i(i),
        alpha(problem.alpha_of(i)),
        factor(factor),
        gradient(gradient) {}

  T run() {
    const bool hard = problem.labelled && alpha != 0;
    T loss = 0;
    if (hard && given.hard) {
      x = scratch.hard.fetch(problem.hard.logits, i, self_distillation::Scratch<T>::kLogits);
      top = given.hard->top;
      loss =
          alpha * self_distillation::finish_small_row<false>(x, problem.hard.label(i), *given.hard, {T(1), T(0), T(0)},
                                                             factor * alpha, gradient, columns.count, T(0));
    } else if (hard) {
      self_distillation::Row<T> row(problem.hard, scratch.hard, columns.parallel, i, nullptr, factor * alpha, gradient);
      loss = alpha * row.run().loss;
      x = row.x;
      top = row.top;
    } else {
      x = scratch.hard.fetch(problem.hard.logits, i, self_distillation::Scratch<T>::kLogits);
      if (alpha != 1 && !given.student) top = peak_of(x, columns);
    }
    if (alpha != 1) return loss + divergence(!hard);
    if (gradient && !hard) std::fill_n(gradient, columns.count, T(0));
    return loss;
  }

  // (1 - alpha) T^2 D; its gradient is added to, or (`fresh`) written to the row's.
  T divergence(bool fresh) {
    const T scale = factor * (T(1) - alpha) * problem.temperature;  // T^2 of the loss over T of the logits
    // By the column count alone, so that a row's bits do not depend on how it lies in memory.
    const bool small = problem.form == kLogits && columns.count <= self_distillation::kSmallRow<T>;
    const T value = small ? small_divergence(scale, fresh) : long_divergence(scale, fresh);
    return (T(1) - alpha) * problem.temperature * problem.temperature * value;
  }

  T small_divergence(T scale, bool fresh) {
    const Rows& rows = problem.teacher;
    const T* t = rows.template row<T>(i, rows.template direct<T>() ? nullptr : scratch.row(Scratch<T>::kTeacher));
    if (!given.student) make_alone(t);
    const Side<T> student = {given.student->top.value, T(1) / problem.temperature, given.student->log_total, T(1)};
    const Side<T> teacher = {given.teacher->top.value, T(1) / problem.teacher_temperature, given.teacher->log_total,
                             T(1)};
    return problem.divergence == kKl ? kl_of(t, given.p, given.q, student, teacher, T(1), scale, fresh)
                                     : scored(t, given.p, given.q, student, teacher, scale, fresh);
  }

  void make_alone(const T* t) {
    T ones[vec::kLanes<T>];
    std::fill_n(ones, vec::kLanes<T>, T(1));
    given.p = scratch.row(Scratch<T>::kStudentTerms), given.q = scratch.row(Scratch<T>::kTeacherTerms);
    given.student = alone, given.teacher = alone + 1;
    const int64_t n = columns.count;
    self_distillation::small_rows(x, int64_t{0}, 1, n, ones, given.p, alone, T(1) / problem.temperature);
    self_distillation::small_rows(t, int64_t{0}, 1, n, ones, given.q, alone + 1, T(1) / problem.teacher_temperature);
  }

  T long_divergence(T scale, bool fresh) {
    const bool forward = problem.divergence == kKl;
    T* p = gradient && fresh ? gradient : gradient || !forward ? scratch.row(Scratch<T>::kStudentTerms) : nullptr;
    const T rate = T(1) / problem.temperature;
    const T total = exp_sum_of(x, columns, top.value, rate, p);
    const Side<T> student = {top.value, rate, std::log(total), T(1) / total};
    const T* t = teacher_row(student);
    T* q = problem.divergence == kReverseKl ? nullptr : scratch.row(Scratch<T>::kTeacherTerms);
    T mass = 1;
    const Side<T> teacher = teacher_side(t, q, mass);
    return forward ? kl_of(t, p, q, student, teacher, mass, scale, fresh)
                   : scored(t, p, q, student, teacher, scale, fresh);
  }

  // The exponentials go to `q` unless that is null.
  Side<T> teacher_side(const T* t, T* q, T& mass) const {
    const Peak<T> high = peak_of(t, columns);
    if (problem.form == kLogits) {
      const T rate = T(1) / problem.teacher_temperature;
      const T total = exp_sum_of(t, columns, high.value, rate, q);
      return {high.value, rate, std::log(total), T(1) / total};
    }
    const T shift = high.value == -std::numeric_limits<T>::infinity() ? T(0) : high.value, normalizer = std::exp(shift);
    if (q) mass = normalizer * exp_sum_of(t, columns, shift, T(1), q);
    return {shift, T(1), -shift, normalizer};
  }

  T kl_of(const T* t, const T* p, const T* q, const Side<T>& student, const Side<T>& teacher, T mass, T scale,
          bool fresh) const {
    return columns.fold<T>(
        [&](int64_t b, int64_t e) {
          return kl(x + b, t + b, p ? p + b : nullptr, q + b, e - b, student, teacher, mass, scale, fresh,
                    gradient ? gradient + b : nullptr);
        },
        [](T left, T right) { return left + right; });
  }

  // Reverse KL and Jensen-Shannon: the gradient waits for a sum over the row, the scores lie in scratch meanwhile.
  T scored(const T* t, const T* p, T* q, const Side<T>& student, const Side<T>& teacher, T scale, bool fresh) const {
    T value, inner;
    T* scores = q;
    if (problem.divergence == kReverseKl) {
      scores = gradient ? scratch.row(Scratch<T>::kTeacherTerms) : nullptr;
      value = inner = columns.fold<T>(
          [&](int64_t b, int64_t e) {
            return reverse_kl(x + b, t + b, p + b, e - b, student, teacher, scores ? scores + b : nullptr);
          },
          [](T left, T right) { return left + right; });
    } else {
      const JsSums<T> sums = columns.fold<JsSums<T>>(
          [&](int64_t b, int64_t e) { return js(p + b, q + b, e - b, student.normalizer, teacher.normalizer); },
          [](const JsSums<T>& left, const JsSums<T>& right) {
            return JsSums<T>{left.loss + right.loss, left.inner + right.inner};
          });
      value = sums.loss, inner = sums.inner;
    }
    if (gradient) {
      columns.apply([&](int64_t b, int64_t e) {
        write_score_gradient(p + b, scores + b, e - b, student.normalizer, inner, scale, fresh, gradient + b);
      });
    }
    return value;
  }

  // The teacher's logits or log-probabilities, all C of them.
  const T* teacher_row(const Side<T>& student) {
    const Rows& rows = problem.teacher;
    if (problem.form <= kLogProbabilities)
      return rows.template row<T>(i, rows.template direct<T>() ? nullptr : scratch.row(Scratch<T>::kTeacher));
    const int64_t k = rows.columns;
    const int64_t* listed = problem.indices + i * k;
    const T* values = rows.template row<T>(i, scratch.row(Scratch<T>::kListed));
    T* out = scratch.row(Scratch<T>::kTeacher);
    const T log_tail = std::log(problem.tail[i]);
    if (problem.form == kTopKUniform || log_tail == -std::numeric_limits<T>::infinity()) {
      std::fill_n(out, columns.count, log_tail - std::log(static_cast<T>(std::max<int64_t>(columns.count - k, 1))));
    } else {
      const T more = log_tail - log_unlisted_mass(student, listed, k);
      columns.apply([&](int64_t b, int64_t e) { log_probabilities(x + b, e - b, student, more, out + b); });
    }
    for (int64_t j = 0; j < k; ++j) out[listed[j]] = values[j];
    return out;
  }

  // The student's log mass on the classes that are not listed, by a sum of its own: 1 minus the listed mass would lose
  // every digit where the student is sure of a listed class.
  T log_unlisted_mass(const Side<T>& student, const int64_t* listed, int64_t k) {
    const T lowest = -std::numeric_limits<T>::infinity();
    T* masked = scratch.row(Scratch<T>::kMasked);
    std::copy_n(x, columns.count, masked);
    for (int64_t j = 0; j < k; ++j) masked[listed[j]] = lowest;
    const T high = peak_of(masked, columns).value;
    if (high == lowest) return lowest;
    const T total = exp_sum_of(masked, columns, high, student.rate, static_cast<T*>(nullptr));
    return std::log(total) + ((high - student.shift) * student.rate - student.log_total);
  }
};

// Up to kLanes small rows of plain tensors at a time: their softmaxes share vectors, and each side is read once.
template <class T>
struct SmallRows {
  static constexpr int kRows = vec::kLanes<T>;
  const Problem<T>& problem;
  const bool hard, soft;  // which of the two losses' softmaxes are made here
  std::vector<T> p, q;
  Softmax<T> plain[kRows], student[kRows], teacher[kRows];

  explicit SmallRows(const Problem<T>& problem)
      : problem(problem),
        hard(problem.labelled && problem.hard.labels && problem.hard.label_smoothing == 0),
        soft(problem.alpha || problem.shared_alpha != 1),
        p(soft ? kRows * problem.hard.classes : 0),
        q(p.size()) {}

  static bool serves(const Problem<T>& problem, const OutputRows& out) {
    return problem.hard.classes <= self_distillation::kSmallRow<T> && problem.form == kLogits &&
           problem.hard.logits.template direct<T>() && problem.teacher.template direct<T>() &&
           (!out || out.template direct<T>(0));
  }

  // The p of the cross entropy goes to `gradient` unless that is null.
  void make(int64_t first, int rows, T* gradient) {
    T ones[kRows];
    std::fill_n(ones, kRows, T(1));
    const auto softmaxes = [&](const Rows& from, T* out, Softmax<T>* made, T rate) {
      self_distillation::small_rows(static_cast<const T*>(from.data) + first * from.row_stride, from.row_stride, rows,
                                    problem.hard.classes, ones, out, made, rate);
    };
    if (hard) softmaxes(problem.hard.logits, gradient, plain, T(1));
    if (!soft) return;
    softmaxes(problem.hard.logits, p.data(), student, T(1) / problem.temperature);
    softmaxes(problem.teacher, q.data(), teacher, T(1) / problem.teacher_temperature);
  }

  Given<T> of(int r) {
    Given<T> given;
    if (hard) given.hard = plain + r;
    if (soft) given.student = student + r, given.teacher = teacher + r;
    if (soft) given.p = p.data() + r * problem.hard.classes, given.q = q.data() + r * problem.hard.classes;
    return given;
  }
};

// Rows [begin, end): factor_of(i) scales row i's gradient, and its loss goes to losses[i] unless that is null.
template <class T, class Factor>
void run_rows(const Problem<T>& problem, int64_t begin, int64_t end, bool split_columns, const Factor& factor_of,
              const OutputRows& out, T* losses) {
  Scratch<T> scratch(problem.hard.classes);
  SmallRows<T> small_rows(problem);
  const bool small = SmallRows<T>::serves(problem, out);
  const int64_t step = small ? SmallRows<T>::kRows : 1;
  for (int64_t first = begin; first < end; first += step) {
    const int rows = static_cast<int>(std::min(step, end - first));
    T factors[SmallRows<T>::kRows];
    for (int r = 0; r < rows; ++r) factors[r] = factor_of(first + r);
    if (small) small_rows.make(first, rows, out ? out.template direct<T>(first) : nullptr);
    for (int r = 0; r < rows; ++r) {
      const int64_t i = first + r;
      T* const direct = out ? out.template direct<T>(i) : nullptr;
      T* const gradient = out && !direct ? scratch.hard.row(self_distillation::Scratch<T>::kGradient) : direct;
      T loss = 0;
      if (problem.hard.kept(i)) {
        Row<T> row(problem, scratch, split_columns, i, factors[r], gradient);
        if (small) row.given = small_rows.of(r);
        loss = row.run();
      } else if (gradient) {
        std::fill_n(gradient, problem.hard.classes, T(0));
      }
      if (gradient && !direct) out.write(i, gradient);
      if (losses) losses[i] = loss;
    }
  }
}

}  // namespace sdfast::distillation
