// Gaussians around equally spaced centres, and sums of their slopes, one pass each.
//
//   functions  exp(-u²),  u = (x - c_b) / reach,  c_b = first + b step
//
// Beyond ± limit they go on linearly. Torch makes passes over memory for every function; here all
// functions of a few neighbouring inputs are made in registers.

#include <cstdint>

#include "../lanes.h"

namespace {

struct Gaussians {
    int64_t functions;
    float first, step, reach, limit;
};

// exp(a) for a ≤ 0, to 3e-7 of its value; below exp(-87) it stays there.
inline Lanes exp_of_negative(Lanes a) {
    a = a < -87.0f ? Lanes{} - 87.0f : a;
    // a = n log 2 + r with |r| ≤ log(2) / 2. Conversion rounds towards zero, upwards here.
    const Integers n = __builtin_convertvector(a * 1.44269504f - 0.5f, Integers);
    const Lanes whole = __builtin_convertvector(n, Lanes);
    // log 2 in two parts, of which the first times n is exact.
    const Lanes r = (a - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Lanes sum = Lanes{} + 1.0f / 5040;  // of Taylor's series, whose next term is below 6e-9
    constexpr float kTerms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    for (const float term : kTerms) sum = sum * r + term;
    const Integers bits = (n + 127) << 23;
    Lanes power;
    std::memcpy(&power, &bits, sizeof power);
    return sum * power;
}

// Calls use(b, value, slope) for every function: at inputs in the range, slope by the input.
template <typename Use>
inline void walk(const Gaussians& g, Lanes inside, const Use& use) {
    const float inverse = 1 / g.reach;
    for (int64_t b = 0; b < g.functions; b++) {
        const Lanes u = (inside - (g.first + b * g.step)) * inverse;
        const Lanes value = exp_of_negative(-u * u);
        use(b, value, -2 * inverse * u * value);
    }
}

}  // namespace

// values (rows, functions, inputs) from x (rows, inputs). Rows of x lie x_stride apart, and so on.
extern "C" void gaussian_values(
    const Gaussians* gaussians, const float* x, int64_t x_stride, float* values,
    int64_t values_stride, int64_t rows, int64_t inputs, int64_t threads
) {
    const Gaussians g = *gaussians;
    for_each_group(rows, inputs, threads, [&](int64_t row, int64_t i, auto count) {
        const Lanes given = load(x + row * x_stride + i, count);
        const Lanes inside = clamp(given, -g.limit, g.limit), tail = given - inside;
        float* to = values + row * values_stride + i;
        walk(g, inside, [&](int64_t b, Lanes value, Lanes slope) {
            store(to + b * inputs, value + slope * tail, count);
        });
    });
}

// dx (rows, inputs) = sum over functions of gradients (rows, functions, inputs) times slopes.
extern "C" void gaussian_pull_back(
    const Gaussians* gaussians, const float* x, int64_t x_stride, const float* gradients,
    int64_t gradients_stride, float* dx, int64_t dx_stride, int64_t rows, int64_t inputs,
    int64_t threads
) {
    const Gaussians g = *gaussians;
    for_each_group(rows, inputs, threads, [&](int64_t row, int64_t i, auto count) {
        const Lanes inside = clamp(load(x + row * x_stride + i, count), -g.limit, g.limit);
        const float* from = gradients + row * gradients_stride + i;
        Lanes sum = {};
        walk(g, inside, [&](int64_t b, Lanes, Lanes slope) {
            sum += slope * load(from + b * inputs, count);
        });
        store(dx + row * dx_stride + i, sum, count);
    });
}
