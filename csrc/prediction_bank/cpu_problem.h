// What a call on a prediction bank fixes for its rows on the CPU.
#pragma once

#include "../self_distillation/cpu_batch.h"
#include "cpu_loops.h"
#include "cpu_storage.h"
#include "description.h"

namespace sdfast::prediction_bank {

using namespace self_distillation;

template <class T>
struct BankProblem {
  Problem<T> loss;
  Settings<T> bank;
  Storage storage;
  const int64_t* indices;      // (N,)
  std::vector<uint8_t> roles;  // (N,) of Role
  bool late = false;           // whether the gradient's factor is still to come
  T share = 1;                 // of each row in the reduced loss

  T factor_of(int64_t i) const { return late ? T(1) : loss.weight_of(i) * share; }
  bool writes(int64_t i) const { return bank.update && roles[i] != kSharesOnly; }
};

// A prediction that may go into the bank is finite: its largest logit is, and none is NaN.
template <class T>
bool is_finite(const Peak<T>& top) {
  return !top.nan && std::abs(top.value) <= std::numeric_limits<T>::max();
}

}  // namespace sdfast::prediction_bank
