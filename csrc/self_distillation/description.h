// What a call of the loss fixes for all rows, as the operations take it: `packed` in
// sdfast/ops/self_distillation/description.py makes what `unpacked` here takes apart.
#pragma once

#include "../common/stable.h"
#include "kernel.h"

#include <vector>

namespace sdfast::self_distillation {

using OptionalNumbers = std::optional<std::vector<double>>;

struct Description {
  double alpha_value = 1;
  LabelFunction label_fn = kHardmax;
  Loss loss = kCrossEntropy;
  Reduction reduction = kMean;
  Mixing mixing = kArithmetic;
  int64_t ignore_index = -100;
  double label_parameter = 1, label_smoothing = 0, target_power = 1, row_power = 0;
  bool adaptive = false, want_gradient = false, want_stats = false;
};

inline Description unpacked(double alpha_value, int64_t codes, int64_t ignore_index, const OptionalNumbers& numbers) {
  Description d;
  d.alpha_value = alpha_value;
  d.ignore_index = ignore_index;
  d.label_fn = static_cast<LabelFunction>(codes & 3);
  d.loss = static_cast<Loss>(codes >> 2 & 3);
  d.reduction = static_cast<Reduction>(codes >> 4 & 3);
  d.mixing = static_cast<Mixing>(codes >> 6 & 1);
  d.adaptive = codes >> 7 & 1;
  d.want_gradient = codes >> 8 & 1;
  d.want_stats = codes >> 9 & 1;
  if (numbers) {
    d.label_parameter = numbers->at(0);
    d.label_smoothing = numbers->at(1);
    d.target_power = numbers->at(2);
    d.row_power = numbers->at(3);
  }
  return d;
}

}  // namespace sdfast::self_distillation
