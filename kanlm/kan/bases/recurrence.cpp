// Orthogonal polynomials by their three-term recurrence, and sums of their slopes, one pass each.
//
//   p_0 = 1,  p_1 = first u,  p_{n+1} = a_n u p_n - c_n p_{n-1},   functions  w_n p_n(u)
//
// with u = scale times the input, which is clamped to [-limit, limit] or bent into it; functions
// of clamped inputs go on linearly. Torch makes a pass over memory for every step of the
// recurrence; here all steps of a few neighbouring inputs stay in registers.

#include <cstdint>

#include "../lanes.h"

namespace {

constexpr int64_t kTerms = 5;  // of both polynomials of kanlm.kan.bases.tanh

struct Recurrence {
    int64_t degree, constant, squash;
    float first, scale, limit;
    const float *a, *c, *w;
    // tanh(t) = t P(t²) / Q(t²) for |t| up to tanh_limit, where it is 1.
    float tanh_limit, numerator[kTerms], denominator[kTerms];
};

inline Lanes tanh(const Recurrence& r, Lanes x) {
    const Lanes t = clamp(x, -r.tanh_limit, r.tanh_limit), square = t * t;
    Lanes above = Lanes{} + r.numerator[kTerms - 1], under = Lanes{} + r.denominator[kTerms - 1];
    for (int64_t k = kTerms - 2; k >= 0; k--) {
        above = above * square + r.numerator[k];
        under = under * square + r.denominator[k];
    }
    return t * above / under;
}

// Where inputs x land in the range, how that moves with x, and what lies beyond it.
struct Place { Lanes inside, slope, tail; };

inline Place place(const Recurrence& r, Lanes x) {
    if (r.squash) {
        const Lanes t = tanh(r, x * (1 / r.limit));
        return {r.limit * t, 1 - t * t, Lanes{}};
    }
    const Lanes inside = clamp(x, -r.limit, r.limit);
    return {inside, Lanes{} + 1, x - inside};
}

// Calls use(n, value, slope) for n = 1 … degree: p_n and its slope by the bent input.
template <typename Use>
inline void walk(const Recurrence& r, Lanes inside, const Use& use) {
    const Lanes u = inside * r.scale;
    Lanes before = Lanes{} + 1, now = r.first * u;
    Lanes slope_before = {}, slope = Lanes{} + r.first * r.scale;
    for (int64_t n = 1; n <= r.degree; n++) {
        use(n, now, slope);
        if (n == r.degree) return;
        const float a = r.a[n], c = r.c[n];
        const Lanes next_slope = a * (u * slope + r.scale * now) - c * slope_before;
        const Lanes next = a * u * now - c * before;
        before = now, slope_before = slope;
        now = next, slope = next_slope;
    }
}

}  // namespace

// values (rows, functions, inputs) from x (rows, inputs); function 0 is constant if `constant`.
// Rows of x lie x_stride apart, and so on.
extern "C" void polynomial_values(
    const Recurrence* recurrence, const float* x, int64_t x_stride, float* values,
    int64_t values_stride, int64_t rows, int64_t inputs, int64_t threads
) {
    const Recurrence r = *recurrence;
    for_each_group(rows, inputs, threads, [&](int64_t row, int64_t i, auto count) {
        const Place at = place(r, load(x + row * x_stride + i, count));
        float* to = values + row * values_stride + i;
        if (r.constant) store(to, Lanes{} + r.w[0], count);
        walk(r, at.inside, [&](int64_t n, Lanes value, Lanes slope) {
            store(to + (n - 1 + r.constant) * inputs, r.w[n] * (value + slope * at.tail), count);
        });
    });
}

// dx (rows, inputs) = sum over functions of gradients (rows, functions, inputs) times slopes.
extern "C" void polynomial_pull_back(
    const Recurrence* recurrence, const float* x, int64_t x_stride, const float* gradients,
    int64_t gradients_stride, float* dx, int64_t dx_stride, int64_t rows, int64_t inputs,
    int64_t threads
) {
    const Recurrence r = *recurrence;
    for_each_group(rows, inputs, threads, [&](int64_t row, int64_t i, auto count) {
        const Place at = place(r, load(x + row * x_stride + i, count));
        const float* from = gradients + row * gradients_stride + i;
        Lanes sum = {};
        walk(r, at.inside, [&](int64_t n, Lanes, Lanes slope) {
            sum += r.w[n] * slope * load(from + (n - 1 + r.constant) * inputs, count);
        });
        store(dx + row * dx_stride + i, sum * at.slope, count);
    });
}
