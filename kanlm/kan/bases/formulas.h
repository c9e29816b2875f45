// What every file of this folder's C++ is made of, and what it holds for kanlm.kan.bases.cpp_formulas:
//
//   values(formulas, x, x_row, values, values_row, rows, inputs, threads)
//     values (rows, functions, inputs) of x (rows, inputs)
//   pull_back(formulas, x, x_row, gradients, gradients_row, dx, dx_row, rows, inputs, threads)
//     dx (rows, inputs) = sum over functions of gradients (rows, functions, inputs) times slopes
//
// Rows of x lie x_row numbers apart, and so on; each row is contiguous.

#pragma once

#include <cstdint>

#include "../simd.h"

// As `_Structure` in cpp_formulas.py.
struct Formulas {
    int64_t functions;
    const float* numbers;  // options, in an order that each file states
    const float* knots;    // of a basis that has some
    const float* learned;  // rows of parameters of a basis that has some
    int64_t channels;      // numbers of a row: one an input, or 1 for all
};

namespace {

// The arguments of both.
struct Rows {
    const float* x;
    int64_t x_row;
    const float* gradients;
    int64_t gradients_row;
    float* to;
    int64_t to_row;
    int64_t count, inputs, threads;
};

// Functions(formulas).values(x, put) calls put(b, values of function b).
template <typename Functions>
void all_values(const Formulas& formulas, const Rows& rows) {
    const Functions functions(formulas);
    for_each_group(rows.count, rows.inputs, rows.threads, [=](int64_t row, int64_t i, auto count) {
        float* to = rows.to + row * rows.to_row + i;
        functions.values(load(rows.x + row * rows.x_row + i, count), [=](int64_t b, Lanes value) {
            store(to + b * rows.inputs, value, count);
        });
    });
}

// Functions(formulas).pull_back(x, gradient) adds up gradient(b) times slopes.
template <typename Functions>
void all_pulled_back(const Formulas& formulas, const Rows& rows) {
    const Functions functions(formulas);
    for_each_group(rows.count, rows.inputs, rows.threads, [=](int64_t row, int64_t i, auto count) {
        const float* from = rows.gradients + row * rows.gradients_row + i;
        const auto gradient = [=](int64_t b) { return load(from + b * rows.inputs, count); };
        const Lanes x = load(rows.x + row * rows.x_row + i, count);
        store(rows.to + row * rows.to_row + i, functions.pull_back(x, gradient), count);
    });
}

// Functions(formulas).at(i, count) has the parameters of `count` inputs that begin with i, and
// values(x, put) and pull_back(x, gradient) as above.
template <typename Functions>
void all_learned_values(const Formulas& formulas, const Rows& rows) {
    const Functions functions(formulas);
    for_each_group(rows.count, rows.inputs, rows.threads, [=](int64_t row, int64_t i, auto count) {
        float* to = rows.to + row * rows.to_row + i;
        functions.at(i, count).values(load(rows.x + row * rows.x_row + i, count), [=](int64_t b, Lanes value) {
            store(to + b * rows.inputs, value, count);
        });
    });
}

template <typename Functions>
void all_learned_pulled_back(const Formulas& formulas, const Rows& rows) {
    const Functions functions(formulas);
    for_each_group(rows.count, rows.inputs, rows.threads, [=](int64_t row, int64_t i, auto count) {
        const float* from = rows.gradients + row * rows.gradients_row + i;
        const auto gradient = [=](int64_t b) { return load(from + b * rows.inputs, count); };
        const Lanes x = load(rows.x + row * rows.x_row + i, count);
        store(rows.to + row * rows.to_row + i, functions.at(i, count).pull_back(x, gradient), count);
    });
}

// Rows of parameters of `count` inputs that begin with some.
template <typename Count>
struct Learned {
    const float* first;
    int64_t channels;
    Count count;

    Learned(const Formulas& f, int64_t i, Count c) : first(f.learned), channels(f.channels), count(c) {
        if (channels > 1) first += i;
    }
    Lanes row(int64_t k) const {
        return channels > 1 ? load(first + k * channels, count) : Lanes{} + first[k];
    }
};

using Pass = void (*)(const Formulas&, const Rows&);

}  // namespace

// The functions of a file, by passes that it chooses for a `Formulas`.
#define DEFINE_FORMULAS(VALUES, PULL_BACK)                                                        \
    extern "C" void values(                                                                       \
        const Formulas* formulas, const float* x, int64_t x_row, float* values,                   \
        int64_t values_row, int64_t rows, int64_t inputs, int64_t threads                         \
    ) {                                                                                           \
        VALUES(*formulas)(                                                                        \
            *formulas, {x, x_row, nullptr, 0, values, values_row, rows, inputs, threads});        \
    }                                                                                             \
    extern "C" void pull_back(                                                                    \
        const Formulas* formulas, const float* x, int64_t x_row, const float* gradients,          \
        int64_t gradients_row, float* dx, int64_t dx_row, int64_t rows, int64_t inputs,           \
        int64_t threads                                                                           \
    ) {                                                                                           \
        PULL_BACK(*formulas)(                                                                     \
            *formulas,                                                                            \
            {x, x_row, gradients, gradients_row, dx, dx_row, rows, inputs, threads});             \
    }
