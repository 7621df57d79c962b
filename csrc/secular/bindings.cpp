// The secular solver for NumPy arrays: columns shared among threads, each column held in cache through all its rounds.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <limits>
#include <stdexcept>
#include <thread>
#include <vector>

#include "fold.h"

namespace py = pybind11;

namespace sdfast::secular {
namespace {

using Array = py::array_t<double, py::array::c_style>;

// Ctrl-C ends the work at the next column.
void heed_interrupts() {
  const py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// One thread's columns, one after another.
class ColumnSolver {
 public:
  ColumnSolver(const std::vector<double>& d, const Fold& fold, long long points)
      : d_(d), fold_(fold), points_(points), column_(d.size()), weights_(fold.d.size()), signs_(fold.d.size()) {}

  long long folded = 0;  // columns that were

  // The count of fits, their multipliers in `found`; `w` are the weights of the points.
  long long solve(const double* w, long long rounds, std::vector<double>& found) {
    if (fold_.worthwhile() && folds_well(w, rounds)) {
      fold_.apply(w, weights_.data(), signs_.data());
      const Points points{fold_.d.data(), weights_.data(), signs_.data(), static_cast<long long>(weights_.size())};
      CpuColumn<true> here{points, found};
      const long long fits = solve_column(here, rounds);
      if (here.loudest <= kLoudest) {
        ++folded;
        return fits;
      }
      found.clear();
    }
    std::memcpy(column_.data(), w, points_ * sizeof(double));
    std::fill(column_.begin() + points_, column_.end(), 0.0);
    CpuColumn<false> here{{d_.data(), column_.data(), nullptr, static_cast<long long>(d_.size())}, found};
    return solve_column(here, rounds);
  }

 private:
  // Whether the nodes are accurate for these weights, and rounds enough are sure: r = sqrt(sum w) falls by at most 1 in
  // each.
  bool folds_well(const double* w, long long rounds) const {
    double energy = 0;
    for (long long k = 0; k < points_; ++k) energy += w[k];
    const double surely = kWorthwhile + 1;
    return energy <= kMostEnergy && energy >= surely * surely && rounds >= kWorthwhile;
  }

  const std::vector<double>& d_;
  const Fold& fold_;
  const long long points_;
  std::vector<double> column_, weights_, signs_;
};

py::tuple solve_path(const Array& d, const Array& w, long long rounds, int threads) {
  if (d.ndim() != 1 || w.ndim() != 2 || w.shape(1) != d.shape(0) || rounds < 1 || threads < 1) {
    throw std::invalid_argument("secular: wanted d (points,), w (columns, points), rounds >= 1 and threads >= 1");
  }
  const long long points = d.shape(0), columns = w.shape(0);
  py::array_t<long long> counts(columns);
  std::vector<double> eigenvalues(padded_to_strides(points), 0.0);
  std::memcpy(eigenvalues.data(), d.data(), points * sizeof(double));
  // A column's rounds are not known beforehand: each keeps its own list until the longest is.
  std::vector<std::vector<double>> found(columns);
  std::atomic<long long> folded{0};
  long long* const fits = counts.mutable_data();
  const double* const weights = w.data();
  {
    py::gil_scoped_release release;
    const Fold fold(eigenvalues.data(), points, columns, rounds);
    std::atomic<long long> next{0};
    std::exception_ptr failure;
    std::atomic<bool> failed{false};
    const auto work = [&](bool calling) {
      try {
        ColumnSolver solver(eigenvalues, fold, points);
        for (long long q = next++; q < columns && !failed; q = next++) {
          if (calling) heed_interrupts();
          fits[q] = solver.solve(weights + q * points, rounds, found[q]);
        }
        folded += solver.folded;
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
  return py::make_tuple(c, counts, folded.load());
}

}  // namespace
}  // namespace sdfast::secular

PYBIND11_MODULE(_secular, module) {
  module.doc() = "The multipliers of self-distillation, native; sdfast.hilbert.secular is the way in.";
  module.def(
      "solve_path", &sdfast::secular::solve_path, py::arg("d").noconvert(), py::arg("w").noconvert(), py::arg("rounds"),
      py::arg("threads"),
      "c (columns, fits), the count of fits (columns,) and that of columns solved on folded points, for eigenvalues "
      "d and weights w (columns, points).");
}
