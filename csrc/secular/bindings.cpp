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

SDFAST_CLONES void sums_at_zero(const double* d, const double* w, long long padded, double* out) {
  Lanes energy[2] = {}, pull[2] = {};
  for (long long k = 0; k < padded; k += kStride) {
    for (int j = 0; j < 2; ++j) {
      const Lanes weight = load(w + k + j * kWidth);
      energy[j] += weight;
      pull[j] += weight * load(d + k + j * kWidth);
    }
  }
  out[0] = add_up(energy[0], energy[1]);
  out[1] = add_up(pull[0], pull[1]);
}

SDFAST_CLONES void sums_at(const double* d, const double* w, long long padded, double s, double* out) {
  Lanes value[2] = {}, slope[2] = {};
  for (long long k = 0; k < padded; k += kStride) {
    for (int j = 0; j < 2; ++j) {
      const Lanes eigenvalue = load(d + k + j * kWidth);
      const Lanes t = 1 / (1 + s * eigenvalue);
      const Lanes term = load(w + k + j * kWidth) * t * t;
      value[j] += term;
      slope[j] += term * t * eigenvalue;
    }
  }
  out[0] = add_up(value[0], value[1]);
  out[1] = add_up(slope[0], slope[1]);
}

SDFAST_CLONES void advance_all(const double* d, double* w, long long padded, double s, double* out) {
  Lanes energy[2] = {}, pull[2] = {}, value[2] = {}, slope[2] = {};
  for (long long k = 0; k < padded; k += kStride) {
    for (int j = 0; j < 2; ++j) {
      const Lanes eigenvalue = load(d + k + j * kWidth);
      const Lanes t = 1 / (1 + s * eigenvalue);
      Lanes kept = filtered(load(w + k + j * kWidth), eigenvalue, t, s);
      const Mask counts = kept >= kNothing;
      kept = counts ? kept : Lanes{};
      std::memcpy(w + k + j * kWidth, &kept, sizeof kept);
      const Lanes term = kept * t * t;
      energy[j] += kept;
      pull[j] += kept * eigenvalue;
      value[j] += term;
      slope[j] += term * t * eigenvalue;
    }
  }
  out[0] = add_up(energy[0], energy[1]);
  out[1] = add_up(pull[0], pull[1]);
  out[2] = add_up(value[0], value[1]);
  out[3] = add_up(slope[0], slope[1]);
}

// Weights only shrink, those of small eigenvalues fastest: what together is below this beside a value of 1 never counts
// again.
constexpr double kNeverAgain = 1e-19;

struct CpuColumn {
  const double* d;
  double* w;
  long long padded;
  double dropped = 0;  // of the weights left behind

  Sums start() {
    double out[2];
    sums_at_zero(d, w, padded, out);
    return {out[0], out[1], out[0], out[1]};
  }
  Sums at(double s) {
    double out[2];
    sums_at(d, w, padded, s, out);
    return {0, 0, out[0], out[1]};
  }
  Sums advance(double s) {
    double out[4];
    advance_all(d, w, padded, s, out);
    leave_behind();
    return {out[0], out[1], out[2], out[3]};
  }

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
    const auto work = [&] {
      try {
        std::vector<double> column(padded, 0.0), multipliers(rounds);
        for (long long q = next++; q < columns; q = next++) {
          std::memcpy(column.data(), weights + q * points, points * sizeof(double));
          CpuColumn here{eigenvalues.data(), column.data(), padded};
          fits[q] = solve_column(here, rounds, multipliers.data());
          found[q].assign(multipliers.begin(), multipliers.begin() + fits[q]);
        }
      } catch (...) {
        if (!failed.exchange(true)) failure = std::current_exception();
      }
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work);
    work();
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
