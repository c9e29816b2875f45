// Gaussians around equally spaced centres, and sums of their slopes, one pass each.
//
//   functions  exp(-u²),  u = (x - c_b) / reach,  c_b = first + b step
//
// with numbers first, step, reach, limit. Beyond ± limit they go on linearly. Torch makes passes
// over memory for every function; here all functions of a few neighbouring inputs are made in
// registers.

#include <cmath>

#include "with_tails.h"

namespace {

struct Gaussians : WithTails<Gaussians> {
    int64_t functions;
    float first, step, limit, inverse, slope;

    explicit Gaussians(const Formulas& f)
        : functions(f.functions), first(f.numbers[0]), step(f.numbers[1]), limit(f.numbers[3]) {
        // exp(-u²) as a power of 2.
        const float root = std::sqrt(kLog2OfE);
        inverse = root / f.numbers[2];
        slope = -2 * inverse / (root * root);
    }

    // Calls use(b, value, slope) for every function.
    template <typename Use>
    void walk(Lanes inside, const Use& use) const {
        for (int64_t b = 0; b < functions; b++) {
            const Lanes u = (inside - (first + b * step)) * inverse;
            const Lanes value = halved(u * u);
            use(b, value, slope * u * value);
        }
    }
};

Pass pass_of_values(const Formulas&) { return all_values<Gaussians>; }
Pass pass_back(const Formulas&) { return all_pulled_back<Gaussians>; }

}  // namespace

DEFINE_FORMULAS(pass_of_values, pass_back)
