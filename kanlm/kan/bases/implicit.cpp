// Functions given by a small network, and sums of their slopes, one pass each.
//
//   functions  sum_h a_bh silu(w_h (x - t_h))
//
// with numbers limit and hidden units H, and learned numbers t_0 …, w_0 …, and a, b by b. Beyond
// ± limit they go on linearly.

#include "with_tails.h"

namespace {

constexpr int64_t kUnits = 64;  // of which values and slopes are kept at a time

struct Network : WithTails<Network> {
    int64_t functions, hidden;
    float limit;
    const float *places, *slants, *mixture;

    explicit Network(const Formulas& f) : functions(f.functions), hidden(f.numbers[1]), limit(f.numbers[0]) {
        places = f.learned, slants = places + hidden, mixture = slants + hidden;
    }

    // Calls use(b, value, slope) for every function.
    template <typename Use>
    void walk(Lanes inside, const Use& use) const {
        Lanes units[kUnits], slopes[kUnits];
        for (int64_t h = 0; h < hidden; h++) {
            const Lanes u = slants[h] * (inside - places[h]), gate = sigmoid(u);
            units[h] = u * gate;
            slopes[h] = slants[h] * gate * (1 + u * (1 - gate));
        }
        for (int64_t b = 0; b < functions; b++) {
            Lanes value = {}, slope = {};
            for (int64_t h = 0; h < hidden; h++) {
                value += mixture[b * hidden + h] * units[h];
                slope += mixture[b * hidden + h] * slopes[h];
            }
            use(b, value, slope);
        }
    }
};

Pass pass_of_values(const Formulas&) { return all_values<Network>; }
Pass pass_back(const Formulas&) { return all_pulled_back<Network>; }

}  // namespace

DEFINE_FORMULAS(pass_of_values, pass_back)
