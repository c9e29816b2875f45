// Wavelets at learned places, and sums of their slopes, one pass each.
//
//   functions  psi((x - t_b) / s_b),  psi(u) = c (1 - u²) exp(-u²/2)  or  cos(a u) exp(-u²/2)
//
// with numbers limit, c and a, of which one is 0, and learned rows t_0 … and then 1 / s_0 ….
// Beyond ± limit functions go on linearly.

#include <cmath>

#include "with_tails.h"

namespace {

template <bool HAT, typename Count>
struct Here : WithTails<Here<HAT, Count>> {
    int64_t functions;
    float limit, height, frequency;
    Learned<Count> learned;

    // Calls use(b, value, slope) for every function.
    template <typename Use>
    void walk(Lanes inside, const Use& use) const {
        for (int64_t b = 0; b < functions; b++) {
            const Lanes per_scale = learned.row(functions + b);
            const Lanes u = (inside - learned.row(b)) * per_scale, square = u * u;
            const Lanes envelope = halved(square * (0.5f * kLog2OfE));
            if (HAT) {
                use(b, height * (1 - square) * envelope, height * (square - 3) * u * envelope * per_scale);
            } else {
                // 2 pi in two parts, of which the first has few digits.
                const Lanes angle = frequency * u, turns = nearest(angle * 0.159154943f);
                const Wave at = wave((angle - turns * 6.28125f) - turns * 0.00193530718f);
                use(b, at.cosine * envelope, -(frequency * at.sine + u * at.cosine) * envelope * per_scale);
            }
        }
    }
};

template <bool HAT>
struct Wavelets {
    Formulas formulas;

    explicit Wavelets(const Formulas& f) : formulas(f) {}

    template <typename Count>
    Here<HAT, Count> at(int64_t i, Count count) const {
        const float* numbers = formulas.numbers;
        return {{}, formulas.functions, numbers[0], numbers[1], numbers[2], {formulas, i, count}};
    }
};

bool is_hat(const Formulas& f) { return f.numbers[1] != 0; }
Pass pass_of_values(const Formulas& f) {
    return is_hat(f) ? all_learned_values<Wavelets<true>> : all_learned_values<Wavelets<false>>;
}
Pass pass_back(const Formulas& f) {
    return is_hat(f) ? all_learned_pulled_back<Wavelets<true>> : all_learned_pulled_back<Wavelets<false>>;
}

}  // namespace

DEFINE_FORMULAS(pass_of_values, pass_back)
