// Scalar formulas of a prediction bank, shared by the CPU and the CUDA kernels; derived in
// sdfast/ops/prediction_bank/README.md.
#pragma once

#include "../self_distillation/kernel.h"

#include <cmath>

namespace sdfast::prediction_bank {

// What a call fixes beside the loss, as BankDescription has it.
template <class T>
struct Settings {
  T own_share;      // 1 - momentum
  T log_momentum;   // -inf for momentum 0
  int64_t warm_up;  // predictions of a sample that only go in
  T strength, clamp;
  bool bias_correction, write_first, unique, update;

  // What a sample's next prediction weighs against the mean of those seen before.
  SDFAST_HOST_DEVICE T weight(int64_t seen) const {
    if (!bias_correction) return own_share;
    if (seen == 0) return T(1);  // exactly
    return own_share / -expm1(log_momentum * static_cast<T>(seen + 1));
  }

  // Whether a row that has seen so many teaches yet; `finite` is whether this batch's prediction can go in.
  SDFAST_HOST_DEVICE bool usable(int64_t seen, bool finite) const {
    if (write_first) return seen >= warm_up && (finite || seen > 0);
    return seen >= (warm_up > 1 ? warm_up : 1);
  }

 private:
  static SDFAST_HOST_DEVICE float expm1(float x) { return ::expm1f(x); }
  static SDFAST_HOST_DEVICE double expm1(double x) { return ::expm1(x); }
};

}  // namespace sdfast::prediction_bank
