// B-splines on one grid of equal or free cells, and sums of their slopes, one pass each.
//
// Beyond the grid functions go on linearly. The triangle of kanlm.kan.bases.bspline gives the
// degree + 1 functions over an input's cell; each of the B functions then takes one of them or 0.
// All of it stays in registers for a few neighbouring inputs.

#include <cstdint>

#include "../lanes.h"

namespace {

struct Spline {
    int64_t degree, cells, equal;
    const float* grid;  // cells + 1 knots; beside free ones lie `degree` more at each end
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

// Places and distances between rows, as the functions below take them.
struct Rows {
    const float* x;
    int64_t x_stride;
    const float* gradients;
    int64_t gradients_stride;
    float* to;
    int64_t to_stride;
    int64_t count, inputs, threads;
};

template <int DEGREE>
void values(const Spline& spline, const Rows& rows) {
    for_each_group(rows.count, rows.inputs, rows.threads, [&](int64_t row, int64_t i, auto count) {
        auto at = local<DEGREE>(spline, load(rows.x + row * rows.x_stride + i, count));
        for (int s = 0; s <= DEGREE; s++) at.values[s] += at.slopes[s] * at.tail;
        float* to = rows.to + row * rows.to_stride + i;
        for (int32_t b = 0; b < spline.cells + DEGREE; b++) {
            Lanes value = {};
            for (int s = 0; s <= DEGREE; s++) value = at.cell == b - s ? at.values[s] : value;
            store(to + b * rows.inputs, value, count);
        }
    });
}

template <int DEGREE>
void pull_back(const Spline& spline, const Rows& rows) {
    for_each_group(rows.count, rows.inputs, rows.threads, [&](int64_t row, int64_t i, auto count) {
        const auto at = local<DEGREE>(spline, load(rows.x + row * rows.x_stride + i, count));
        const float* from = rows.gradients + row * rows.gradients_stride + i;
        Lanes sum = {};
        for (int32_t b = 0; b < spline.cells + DEGREE; b++) {
            Lanes slope = {};
            for (int s = 0; s <= DEGREE; s++) slope = at.cell == b - s ? at.slopes[s] : slope;
            sum += slope * load(from + b * rows.inputs, count);
        }
        store(rows.to + row * rows.to_stride + i, sum, count);
    });
}

using Pass = void (*)(const Spline&, const Rows&);
constexpr Pass kValues[] = {values<0>, values<1>, values<2>, values<3>, values<4>, values<5>};
constexpr Pass kPullBack[] = {
    pull_back<0>, pull_back<1>, pull_back<2>, pull_back<3>, pull_back<4>, pull_back<5>};

}  // namespace

// values (rows, functions, inputs) from x (rows, inputs). Rows of x lie x_stride apart, and so on.
extern "C" void bspline_values(
    const Spline* spline, const float* x, int64_t x_stride, float* values, int64_t values_stride,
    int64_t rows, int64_t inputs, int64_t threads
) {
    const Rows all{x, x_stride, nullptr, 0, values, values_stride, rows, inputs, threads};
    kValues[spline->degree](*spline, all);
}

// dx (rows, inputs) = sum over functions of gradients (rows, functions, inputs) times slopes.
extern "C" void bspline_pull_back(
    const Spline* spline, const float* x, int64_t x_stride, const float* gradients,
    int64_t gradients_stride, float* dx, int64_t dx_stride, int64_t rows, int64_t inputs,
    int64_t threads
) {
    const Rows all{x, x_stride, gradients, gradients_stride, dx, dx_stride, rows, inputs, threads};
    kPullBack[spline->degree](*spline, all);
}
