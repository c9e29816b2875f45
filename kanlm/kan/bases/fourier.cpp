// Sines and cosines, and sums of their slopes, one pass each.
//
//   functions  sqrt(2) sin(k w x), sqrt(2) cos(k w x)  for k = 1 …,  w = pi / half_width
//
// with number half_width. One sine and cosine are evaluated, and turned on from wave to wave.

#include <cmath>

#include "formulas.h"

namespace {

struct Waves {
    int64_t frequencies;
    float period, inverse_period, unit;

    explicit Waves(const Formulas& f)
        : frequencies(f.functions / 2), period(2 * f.numbers[0]), inverse_period(1 / period),
          unit(static_cast<float>(2 * M_PI) / period) {}

    // Calls use(k, sine, cosine) for every frequency, both times the root of 2.
    template <typename Use>
    void walk(Lanes x, const Use& use) const {
        const Wave first = wave((x - period * nearest(x * inverse_period)) * unit);
        const float root = std::sqrt(2.0f);
        Lanes sine = root * first.sine, cosine = root * first.cosine;
        for (int64_t k = 1; k <= frequencies; k++) {
            use(k, sine, cosine);
            const Lanes next = sine * first.cosine + cosine * first.sine;
            cosine = cosine * first.cosine - sine * first.sine;
            sine = next;
        }
    }

    template <typename Put>
    void values(Lanes x, const Put& put) const {
        walk(x, [&](int64_t k, Lanes sine, Lanes cosine) {
            put(2 * k - 2, sine);
            put(2 * k - 1, cosine);
        });
    }

    template <typename Gradient>
    Lanes pull_back(Lanes x, const Gradient& gradient) const {
        Lanes sum = {};
        walk(x, [&](int64_t k, Lanes sine, Lanes cosine) {
            sum += k * unit * (cosine * gradient(2 * k - 2) - sine * gradient(2 * k - 1));
        });
        return sum;
    }
};

Pass pass_of_values(const Formulas&) { return all_values<Waves>; }
Pass pass_back(const Formulas&) { return all_pulled_back<Waves>; }

}  // namespace

DEFINE_FORMULAS(pass_of_values, pass_back)
