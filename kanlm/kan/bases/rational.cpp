// Rational functions with learned denominators, and sums of their slopes, one pass each.
//
//   functions  u^b / (1 + |d_1 u + … + d_q u^q|),  u = x / limit
//
// with numbers limit and q, and learned rows d_1 … d_q. Beyond ± limit they go on linearly.

#include "with_tails.h"

namespace {

template <typename Count>
struct Here : WithTails<Here<Count>> {
    int64_t functions, degree;
    float limit;
    Learned<Count> learned;

    // Calls use(b, value, slope) for every function.
    template <typename Use>
    void walk(Lanes inside, const Use& use) const {
        const float inverse_limit = 1 / limit;
        const Lanes u = inside * inverse_limit;
        Lanes polynomial = {}, derivative = {};
        for (int64_t power = degree; power > 0; power--) {
            const Lanes d = learned.row(power - 1);
            polynomial = (polynomial + d) * u;
            derivative = derivative * u + float(power) * d;
        }
        const Lanes inverse = 1 / (1 + at_least(polynomial, -polynomial));
        // Where the polynomial is 0, its sign is that on the right.
        const Lanes sign = polynomial == 0 ? derivative : polynomial;
        const Lanes fall = (sign > 0 ? derivative : sign < 0 ? -derivative : sign * 0.0f) * inverse;
        Lanes value = inverse, before = {};
        for (int64_t b = 0; b < functions; b++) {
            use(b, value, (float(b) * before - fall * value) * inverse_limit);
            before = value;
            value *= u;
        }
    }
};

struct Rationals {
    Formulas formulas;

    explicit Rationals(const Formulas& f) : formulas(f) {}

    template <typename Count>
    Here<Count> at(int64_t i, Count count) const {
        const float* numbers = formulas.numbers;
        return {{}, formulas.functions, int64_t(numbers[1]), numbers[0], {formulas, i, count}};
    }
};

Pass pass_of_values(const Formulas&) { return all_learned_values<Rationals>; }
Pass pass_back(const Formulas&) { return all_learned_pulled_back<Rationals>; }

}  // namespace

DEFINE_FORMULAS(pass_of_values, pass_back)
