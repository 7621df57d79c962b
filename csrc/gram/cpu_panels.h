// Rows turned into panels: as many rows as a vector has lanes, column after column. A panel serves as vectors or, entry
// by entry, as scalars; so products of rows are sums of scalars times vectors that all lie side by side.
#pragma once

#include "../sample_gradients/cpu_multiply.h"
#include "../sample_gradients/cpu_pack.h"

namespace sdfast::gram {

constexpr int64_t kColumns = 128;  // of a panel: four of them fit the first cache
constexpr int kTogether = 3;       // panels that are vectors at once

// 8 (of narrow vectors 4) rows of a panel times kV panels.
template <class T, int kV>
SDFAST_WIDE void multiply_wide(const T* scalars, const T* vectors, const sample_gradients::Lines& lines, T* out,
                               int64_t pitch, bool add) {
  sample_gradients::multiply<T, 64, 8, kV, kColumns * 64 / sizeof(T)>(scalars, vectors, lines, out, pitch, add);
}

template <class T, int kV>
SDFAST_CLONES void multiply_narrow(const T* scalars, const T* vectors, const sample_gradients::Lines& lines, T* out,
                                   int64_t pitch, bool add) {
  sample_gradients::multiply<T, 32, 4, kV, kColumns * 32 / sizeof(T)>(scalars, vectors, lines, out, pitch, add);
}

// The panels of some rows, of kColumns columns each; what a panel holds beside its rows is zero.
template <class T>
class Panels {
 public:
  explicit Panels(int64_t rows) : rows_(rows), turned_(count() * size()) {}

  static int64_t lanes() { return (sample_gradients::wide_vectors() ? 64 : 32) / static_cast<int64_t>(sizeof(T)); }
  static int64_t size() { return kColumns * lanes(); }
  int64_t count() const { return (rows_ + lanes() - 1) / lanes(); }
  const T* operator[](int64_t panel) const { return turned_.get() + panel * size(); }

  // Turns `columns` columns of one panel's rows, which are `stride` apart.
  void turn(int64_t panel, const T* x, int64_t stride, int64_t columns) {
    sample_gradients::transpose(turned_.get() + panel * size(), lanes(), x, stride, columns,
                                std::min(lanes(), rows_ - panel * lanes()));
  }

 private:
  int64_t rows_;
  sample_gradients::Buffer<T> turned_;
};

// sums[i, j] (+)= Σ_k x[i, k] y[j, k] over one strip of columns. Of a triangle, where y is x, whole vectors beyond the
// diagonal are left out. The sums hold whole panels, rows as well as columns. meanwhile() is called all the time.
template <class T, class Meanwhile>
void multiply_strip(const Panels<T>& x, const Panels<T>& y, bool triangle, int64_t columns, T* sums, int64_t pitch,
                    bool add, const Meanwhile& meanwhile) {
  using Multiply = sample_gradients::Multiply<T>;
  static constexpr Multiply kWide[] = {multiply_wide<T, 1>, multiply_wide<T, 2>, multiply_wide<T, kTogether>};
  static constexpr Multiply kNarrow[] = {multiply_narrow<T, 1>, multiply_narrow<T, 2>, multiply_narrow<T, kTogether>};
  const bool wide = sample_gradients::wide_vectors();
  const int64_t lanes = Panels<T>::lanes(), at_once = wide ? 8 : 4, offset = 0;
  const sample_gradients::Lines lines = {&offset, &offset, 0, 1, columns, lanes, lanes};
  for (int64_t j = 0; j < y.count(); j += kTogether)
    for (int64_t i = triangle ? j : 0; i < x.count(); ++i) {
      const int64_t vectors = std::min<int64_t>({kTogether, y.count() - j, triangle ? i + 1 - j : kTogether});
      const Multiply multiply = (wide ? kWide : kNarrow)[vectors - 1];
      for (int64_t part = 0; part < lanes; part += at_once) {
        meanwhile();
        multiply(x[i] + part, y[j], lines, sums + (i * lanes + part) * pitch + j * lanes, pitch, add);
      }
    }
}

}  // namespace sdfast::gram
