// A peephole for test_vec.py: the vector exp and log over an array whose length is a multiple of the lanes.
#include "../../csrc/common/vec.h"

using namespace sdfast;

extern "C" void probe_exp(const float* x, float* y, long count) {
  for (long i = 0; i < count; i += vec::kLanes<float>) {
    vec::store(y + i, vec::exp_nonpositive(vec::load(x + i)));
  }
}

extern "C" void probe_log(const float* x, float* y, long count) {
  for (long i = 0; i < count; i += vec::kLanes<float>) {
    vec::store(y + i, vec::log_or_zero(vec::load(x + i)));
  }
}

extern "C" float probe_sum(const float* x) { return vec::sum<float>(vec::load(x)); }
extern "C" float probe_max(const float* x) { return vec::max<float>(vec::load(x)); }
