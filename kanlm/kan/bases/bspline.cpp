// B-splines on one grid of equal or free cells, and sums of their slopes, one pass each.
//
// Beyond the grid functions go on linearly. The triangle of kanlm.kan.bases.bspline gives the
// degree + 1 functions over an input's cell; each of the B functions then takes one of them or 0.
// All of it stays in registers for a few neighbouring inputs.
//
// Numbers: degree, whether cells are equal. Of the knots `degree` lie beyond each end of the grid.

#include <cstdint>

#include "formulas.h"

namespace {

struct Spline {
    int64_t degree, cells;
    bool equal;
    const float* grid;  // cells + 1 knots, and `degree` more beside each end

    explicit Spline(const Formulas& f)
        : degree(f.numbers[0]), cells(f.functions - degree), equal(f.numbers[1] != 0), grid(f.knots + degree) {}
};

inline Lanes lookup(const float* table, Integers index) {
    Lanes lanes;
    for (int64_t i = 0; i < kLanes; i++) lanes[i] = table[index[i]];
    return lanes;
}

template <int DEGREE>
struct Local {
    Integers cell;
    Lanes values[DEGREE + 1], slopes[DEGREE + 1], tail;

    // What function b has of those over the cell, or 0.
    Lanes of(const Lanes* over_cell, int32_t b) const {
        Lanes value = {};
        for (int s = 0; s <= DEGREE; s++) value = cell == b - s ? over_cell[s] : value;
        return value;
    }
};

template <int DEGREE>
inline Local<DEGREE> local(const Spline& spline, Lanes x) {
    const float* grid = spline.grid;
    const float low = grid[0], high = grid[spline.cells];
    Local<DEGREE> at;
    const Lanes inside = clamp(x, low, high);
    at.tail = x - inside;
    // The cell right of a knot owns it. A comparison that holds is -1.
    at.cell = Integers{};
    Lanes left = Lanes{} + low;
    for (int64_t k = 1; k < spline.cells; k++) {
        const Integers right = x >= grid[k];
        at.cell -= right;
        left = right ? Lanes{} + grid[k] : left;
    }
    // Distances to the knots below and above, in units of a cell where these are equal.
    Lanes below[DEGREE + 1], above[DEGREE + 1];
    const float per_cell = spline.cells / (high - low);
    const float unit = spline.equal ? per_cell : 1;
    if (spline.equal) {
        const Lanes t = (inside - left) * per_cell;
        for (int m = 0; m < DEGREE; m++) below[m] = t + float(m), above[m] = float(m + 1) - t;
    } else {
        for (int m = 0; m < DEGREE; m++) {
            below[m] = inside - lookup(grid - m, at.cell);
            above[m] = lookup(grid + m + 1, at.cell) - inside;
        }
    }
    at.values[0] = Lanes{} + 1;
    at.slopes[0] = Lanes{};
    for (int j = 1; j <= DEGREE; j++) {
        Lanes carried = {}, carried_slope = {};
        for (int r = 0; r < j; r++) {
            const Lanes ratio = spline.equal ? at.values[r] * (1.0f / j)
                                             : at.values[r] / (above[r] + below[j - 1 - r]);
            at.values[r] = above[r] * ratio + carried;
            at.slopes[r] = (carried_slope - ratio) * (j * unit);
            carried = below[j - 1 - r] * ratio;
            carried_slope = ratio;
        }
        at.values[j] = carried;
        at.slopes[j] = carried_slope * (j * unit);
    }
    return at;
}

template <int DEGREE>
struct Splines : Spline {
    using Spline::Spline;

    template <typename Put>
    void values(Lanes x, const Put& put) const {
        auto at = local<DEGREE>(*this, x);
        for (int s = 0; s <= DEGREE; s++) at.values[s] += at.slopes[s] * at.tail;
        for (int32_t b = 0; b < cells + DEGREE; b++) put(b, at.of(at.values, b));
    }

    template <typename Gradient>
    Lanes pull_back(Lanes x, const Gradient& gradient) const {
        const auto at = local<DEGREE>(*this, x);
        Lanes sum = {};
        for (int32_t b = 0; b < cells + DEGREE; b++) sum += at.of(at.slopes, b) * gradient(b);
        return sum;
    }
};

constexpr Pass kValues[] = {
    all_values<Splines<0>>, all_values<Splines<1>>, all_values<Splines<2>>,
    all_values<Splines<3>>, all_values<Splines<4>>, all_values<Splines<5>>};
constexpr Pass kPulledBack[] = {
    all_pulled_back<Splines<0>>, all_pulled_back<Splines<1>>, all_pulled_back<Splines<2>>,
    all_pulled_back<Splines<3>>, all_pulled_back<Splines<4>>, all_pulled_back<Splines<5>>};

Pass pass_of_values(const Formulas& f) { return kValues[Spline(f).degree]; }
Pass pass_back(const Formulas& f) { return kPulledBack[Spline(f).degree]; }

}  // namespace

DEFINE_FORMULAS(pass_of_values, pass_back)
