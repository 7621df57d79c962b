// What a call fixes of its bank, as the operation takes it: `packed` in sdfast/ops/prediction_bank/description.py makes
// what is taken apart here.
#pragma once

#include "../self_distillation/description.h"
#include "kernel.h"

namespace sdfast::prediction_bank {

using self_distillation::OptionalNumbers;

// Whether the gradient is left in the dtype that sums have, and not divided by the mean's denominator yet.
inline bool comes_late(int64_t codes) { return codes >> 14 & 1; }

template <class T>
Settings<T> unpacked_settings(int64_t codes, double momentum, const OptionalNumbers& regularisation) {
  Settings<T> bank;
  bank.own_share = static_cast<T>(1 - momentum);
  bank.log_momentum = static_cast<T>(std::log(momentum));
  bank.warm_up = codes >> 15;
  bank.strength = static_cast<T>(regularisation ? regularisation->at(0) : 0);
  bank.clamp = static_cast<T>(regularisation ? regularisation->at(1) : 0);
  bank.bias_correction = codes >> 10 & 1;
  bank.write_first = codes >> 11 & 1;
  bank.unique = codes >> 12 & 1;
  bank.update = codes >> 13 & 1;
  return bank;
}

}  // namespace sdfast::prediction_bank
