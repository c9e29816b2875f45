// Orthogonal polynomials by their three-term recurrence, and sums of their slopes, one pass each.
//
//   p_0 = 1,  p_1 = first u,  p_{n+1} = a_n u p_n - c_n p_{n-1},   functions  w_n p_n(u)
//
// with u = scale times the input, clamped to [-limit, limit]; beyond, functions go on linearly.
// Torch makes a pass over memory for every step of the recurrence; here a row of inputs stays
// in the first cache.

#include <algorithm>
#include <cstdint>
#include <vector>
#include <omp.h>

namespace {

struct Recurrence {
    int64_t degree;
    float first, scale, limit;
    const float *a, *c, *w;
};

// Calls use(n, values, slopes) for n = 1 … degree: rows of p_n and of its slope by the input.
template <typename Use>
void walk(const Recurrence& r, const float* x, int64_t inputs, float* work, const Use& use) {
    float *u = work, *before = u + inputs, *now = before + inputs;
    float *slope_before = now + inputs, *slope = slope_before + inputs;
    for (int64_t i = 0; i < inputs; i++) {
        u[i] = std::min(std::max(x[i], -r.limit), r.limit) * r.scale;
        before[i] = 1;
        slope_before[i] = 0;
        now[i] = r.first * u[i];
        slope[i] = r.first * r.scale;
    }
    for (int64_t n = 1; n <= r.degree; n++) {
        use(n, now, slope);
        if (n == r.degree) break;
        const float a = r.a[n], c = r.c[n], as = a * r.scale;
        for (int64_t i = 0; i < inputs; i++) {
            const float next_slope = as * now[i] + a * u[i] * slope[i] - c * slope_before[i];
            const float next = a * u[i] * now[i] - c * before[i];
            before[i] = now[i];
            slope_before[i] = slope[i];
            now[i] = next;
            slope[i] = next_slope;
        }
    }
}

}  // namespace

// values (rows, functions, inputs) from x (rows, inputs); function 0 is constant if `constant`.
extern "C" void polynomial_values(
    const float* x, float* values, int64_t rows, int64_t inputs, int64_t degree, int64_t constant,
    float first, float scale, float limit, const float* a, const float* c, const float* w,
    int64_t threads
) {
    const Recurrence recurrence{degree, first, scale, limit, a, c, w};
    const int64_t functions = degree + constant;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> work(5 * inputs);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const float* from = x + row * inputs;
            float* to = values + row * functions * inputs;
            if (constant) std::fill(to, to + inputs, w[0]);
            walk(recurrence, from, inputs, work.data(), [&](int64_t n, const float* p, const float* slope) {
                float* place = to + (n - 1 + constant) * inputs;
                const float weight = w[n];
                for (int64_t i = 0; i < inputs; i++) {
                    const float tail = from[i] - std::min(std::max(from[i], -limit), limit);
                    place[i] = weight * (p[i] + slope[i] * tail);
                }
            });
        }
    }
}

// dx (rows, inputs) = sum over functions of gradients (rows, functions, inputs) times slopes.
extern "C" void polynomial_pull_back(
    const float* x, const float* gradients, float* dx, int64_t rows, int64_t inputs, int64_t degree,
    int64_t constant, float first, float scale, float limit, const float* a, const float* c,
    const float* w, int64_t threads
) {
    const Recurrence recurrence{degree, first, scale, limit, a, c, w};
    const int64_t functions = degree + constant;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> work(5 * inputs);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            const float* from = gradients + row * functions * inputs;
            float* to = dx + row * inputs;
            std::fill(to, to + inputs, 0.0f);
            walk(recurrence, x + row * inputs, inputs, work.data(), [&](int64_t n, const float*, const float* slope) {
                const float* gradient = from + (n - 1 + constant) * inputs;
                const float weight = w[n];
                for (int64_t i = 0; i < inputs; i++) to[i] += weight * slope[i] * gradient[i];
            });
        }
    }
}
