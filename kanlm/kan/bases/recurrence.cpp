// Orthogonal polynomials by their three-term recurrence, and sums of their slopes, one pass each.
//
//   p_0 = 1,  p_1 = first u,  p_{n+1} = a_n u p_n - c_n p_{n-1},   functions  w_n p_n(u)
//
// for n from 0 or 1 to the degree, where u = scale times the input, which is clamped to
// [-limit, limit] or bent into it; functions of clamped inputs go on linearly. Torch makes a pass
// over memory for every step of the recurrence; here all steps of a few neighbouring inputs stay
// in registers.
//
// Numbers: first, scale, limit, whether there is a function for n = 0, whether inputs are bent;
// limit, numerator and denominator of tanh; a_0 … and c_0 … below the degree; w_0 … w_degree.

#include <algorithm>
#include <cstdint>

#include "formulas.h"

namespace {

constexpr int64_t kTerms = 5;  // of both polynomials of kanlm.kan.bases.tanh

// Where inputs x land in the range, how that moves with x, and what lies beyond it.
struct Place { Lanes inside, slope, tail; };

// Of a degree that the compiler knows, or 0: then it stands in the numbers.
template <int DEGREE, bool SQUASH>
struct Recurrence {
    float first, scale, limit, inverse_limit;
    bool constant, squash;
    // tanh(t) = t P(t²) / Q(t²) for |t| up to tanh_limit, where it is 1.
    float tanh_limit, numerator[kTerms], denominator[kTerms];
    int64_t degree;
    const float *a, *c, *w;

    explicit Recurrence(const Formulas& f) {
        const float* number = f.numbers;
        first = *number++, scale = *number++, limit = *number++;
        inverse_limit = 1 / limit;
        constant = *number++ != 0, squash = *number++ != 0;
        tanh_limit = *number++;
        std::copy_n(number, kTerms, numerator), number += kTerms;
        std::copy_n(number, kTerms, denominator), number += kTerms;
        degree = DEGREE > 0 ? DEGREE : f.functions - constant;
        a = number, c = a + degree, w = c + degree;
    }

    Lanes tanh(Lanes x) const {
        const Lanes t = clamp(x, -tanh_limit, tanh_limit), square = t * t;
        Lanes above = Lanes{} + numerator[kTerms - 1], under = Lanes{} + denominator[kTerms - 1];
        for (int64_t k = kTerms - 2; k >= 0; k--) {
            above = above * square + numerator[k];
            under = under * square + denominator[k];
        }
        return t * above / under;
    }

    Place place(Lanes x) const {
        if (SQUASH) {
            const Lanes t = tanh(x * inverse_limit);
            return {limit * t, 1 - t * t, Lanes{}};
        }
        const Lanes inside = clamp(x, -limit, limit);
        return {inside, Lanes{} + 1, x - inside};
    }

    template <typename Put>
    void values(Lanes x, const Put& put) const {
        const Place at = place(x);
        if (constant) put(0, Lanes{} + w[0]);
        walk(at.inside, [&](int64_t n, Lanes value, Lanes slope) {
            put(n - 1 + constant, w[n] * (SQUASH ? value : value + slope * at.tail));
        });
    }

    template <typename Gradient>
    Lanes pull_back(Lanes x, const Gradient& gradient) const {
        const Place at = place(x);
        Lanes sum = {};
        walk(at.inside, [&](int64_t n, Lanes, Lanes slope) {
            sum += w[n] * slope * gradient(n - 1 + constant);
        });
        return SQUASH ? sum * at.slope : sum;
    }

    // Calls use(n, value, slope) for n = 1 … degree: p_n and its slope by the bent input.
    template <typename Use>
    void walk(Lanes inside, const Use& use) const {
        const Lanes u = inside * scale;
        Lanes before = Lanes{} + 1, now = first * u;
        Lanes slope_before = {}, slope = Lanes{} + first * scale;
        const int64_t last = DEGREE > 0 ? DEGREE : degree;
        for (int64_t n = 1; n <= last; n++) {
            use(n, now, slope);
            if (n == last) return;
            const Lanes next_slope = a[n] * (u * slope + scale * now) - c[n] * slope_before;
            const Lanes next = a[n] * u * now - c[n] * before;
            before = now, slope_before = slope;
            now = next, slope = next_slope;
        }
    }
};

// Of the degrees up to kKnown, the loops unrolled.
constexpr int64_t kKnown = 6;

template <template <typename> class Passing, bool SQUASH, int DEGREE = kKnown>
Pass pass(int64_t degree) {
    if constexpr (DEGREE == 0) return Passing<Recurrence<0, SQUASH>>::pass;
    else return degree == DEGREE ? Passing<Recurrence<DEGREE, SQUASH>>::pass : pass<Passing, SQUASH, DEGREE - 1>(degree);
}

template <template <typename> class Passing>
Pass pass(const Formulas& f) {
    const Recurrence<0, false> r(f);
    return r.squash ? pass<Passing, true>(r.degree) : pass<Passing, false>(r.degree);
}

template <typename Functions> struct Values { static constexpr Pass pass = all_values<Functions>; };
template <typename Functions> struct PulledBack { static constexpr Pass pass = all_pulled_back<Functions>; };

}  // namespace

DEFINE_FORMULAS(pass<Values>, pass<PulledBack>)
