// The secular solver for NumPy arrays: columns shared among threads, each column held in cache through all its rounds.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <cstring>
#include <exception>
#include <limits>
#include <stdexcept>
#include <thread>
#include <vector>

#include "secular.h"

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define SDFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SDFAST_CLONES __attribute__((target_clones("avx2", "default")))
#endif
#else
#define SDFAST_CLONES
#endif

namespace py = pybind11;

namespace sdfast::secular {
namespace {

// Explicit lanes fix the order of every sum, whatever the instruction set; two of them hide the latency of the adds.
typedef double Lanes __attribute__((vector_size(32)));
typedef long long Mask __attribute__((vector_size(32)));
constexpr long long kWidth = 4;
constexpr long long kStride = 2 * kWidth;  // columns are padded to whole strides with d = w = 0

inline __attribute__((always_inline)) Lanes load(const double* from) {
  Lanes lanes;
  std::memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

inline __attribute__((always_inline)) double add_up(const Lanes& a, const Lanes& b) {
  const Lanes sum = a + b;
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

SDFAST_CLONES void sums_at(const double* d, const double* w, long long padded, double s, Sums& sums) {
  Lanes value[2] = {}, slope[2] = {}, curve[2] = {};
  for (long long k = 0; k < padded; k += kStride) {
    for (int j = 0; j < 2; ++j) {
      const Lanes eigenvalue = load(d + k + j * kWidth);
      const Lanes t = 1 / (1 + s * eigenvalue), pull = t * eigenvalue;
      const Lanes term = load(w + k + j * kWidth) * t * t, pulled = term * pull;
      value[j] += term;
      slope[j] += pulled;
      curve[j] += pulled * pull;
    }
  }
  sums = {add_up(value[0], value[1]), add_up(slope[0], slope[1]), add_up(curve[0], curve[1]), 0};
}

SDFAST_CLONES void advance_all(const double* d, double* w, long long padded, double s, double next, Sums& sums) {
  Lanes value[2] = {}, slope[2] = {}, curve[2] = {}, energy[2] = {};
  for (long long k = 0; k < padded; k += kStride) {
    for (int j = 0; j < 2; ++j) {
      const Lanes eigenvalue = load(d + k + j * kWidth);
      const Lanes here = s * eigenvalue, below = 1 + here, below_next = 1 + next * eigenvalue;
      const Lanes both = 1 / (below * below_next), t = both * below, pull = t * eigenvalue;
      const Lanes filter = here * (both * below_next);  // s d / (1 + s d)
      Lanes kept = load(w + k + j * kWidth) * filter * filter;
      const Mask counts = kept >= kNothing;
      kept = counts ? kept : Lanes{};
      std::memcpy(w + k + j * kWidth, &kept, sizeof kept);
      const Lanes term = kept * t * t, pulled = term * pull;
      value[j] += term;
      slope[j] += pulled;
      curve[j] += pulled * pull;
      energy[j] += kept;
    }
  }
  sums = {add_up(value[0], value[1]), add_up(slope[0], slope[1]), add_up(curve[0], curve[1]),
          add_up(energy[0], energy[1])};
}

// Weights only shrink, those of small eigenvalues fastest: what together is below this beside a value of 1 never counts
// again.
constexpr double kNeverAgain = 1e-19;

struct CpuColumn {
  const double* d;
  double* w;
  long long padded;
  std::vector<double>& multipliers;
  double dropped = 0;  // of the weights left behind

  Sums at(double s) {
    Sums sums;
    sums_at(d, w, padded, s, sums);
    return sums;
  }
  Sums advance(double s, double next) {
    Sums sums;
    advance_all(d, w, padded, s, next, sums);
    leave_behind();
    return sums;
  }
  void found(long long, double c) { multipliers.push_back(c); }

  // Eigenvalues come in ascending order from eigh: in any other this is right too, but finds less.
  void leave_behind() {
    while (padded > kStride) {
      double block = 0;
      for (int j = 0; j < kStride; ++j) block += w[j];
      if (!(dropped + block < kNeverAgain)) return;
      dropped += block;
      d += kStride, w += kStride, padded -= kStride;
    }
  }
};

using Array = py::array_t<double, py::array::c_style>;

// Ctrl-C ends the work at the next column.
void heed_interrupts() {
  const py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

py::tuple solve_path(const Array& d, const Array& w, long long rounds, int threads) {
  if (d.ndim() != 1 || w.ndim() != 2 || w.shape(1) != d.shape(0) || rounds < 1 || threads < 1) {
    throw std::invalid_argument("secular: wanted d (points,), w (columns, points), rounds >= 1 and threads >= 1");
  }
  const long long points = d.shape(0), columns = w.shape(0);
  const long long padded = (points + kStride - 1) / kStride * kStride;
  py::array_t<long long> counts(columns);
  std::vector<double> eigenvalues(padded, 0.0);
  std::memcpy(eigenvalues.data(), d.data(), points * sizeof(double));
  // A column's rounds are not known beforehand: each keeps its own list until the longest is.
  std::vector<std::vector<double>> found(columns);
  long long* const fits = counts.mutable_data();
  const double* const weights = w.data();
  {
    py::gil_scoped_release release;
    std::atomic<long long> next{0};
    std::exception_ptr failure;
    std::atomic<bool> failed{false};
    const auto work = [&](bool calling) {
      try {
        std::vector<double> column(padded, 0.0);
        for (long long q = next++; q < columns && !failed; q = next++) {
          if (calling) heed_interrupts();
          std::memcpy(column.data(), weights + q * points, points * sizeof(double));
          CpuColumn here{eigenvalues.data(), column.data(), padded, found[q]};
          fits[q] = solve_column(here, rounds);
        }
      } catch (...) {
        if (!failed.exchange(true)) failure = std::current_exception();
      }
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work, false);
    work(true);
    for (auto& other : others) other.join();
    if (failure) std::rethrow_exception(failure);
  }
  long long longest = 1;
  for (long long q = 0; q < columns; ++q) longest = fits[q] > longest ? fits[q] : longest;
  Array c({columns, longest});
  for (long long q = 0; q < columns; ++q) {
    double* const row = c.mutable_data(q, 0);
    for (long long t = 0; t < longest; ++t) row[t] = std::numeric_limits<double>::infinity();
    std::memcpy(row, found[q].data(), found[q].size() * sizeof(double));
  }
  return py::make_tuple(c, counts);
}

}  // namespace
}  // namespace sdfast::secular

PYBIND11_MODULE(_secular, module) {
  module.doc() = "The multipliers of self-distillation, native; sdfast.hilbert.secular is the way in.";
  module.def("solve_path", &sdfast::secular::solve_path, py::arg("d").noconvert(), py::arg("w").noconvert(),
             py::arg("rounds"), py::arg("threads"),
             "c (columns, fits) and the count of fits (columns,), for eigenvalues d and weights w (columns, points).");
}
