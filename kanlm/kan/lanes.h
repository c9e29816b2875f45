// As many floats as a register of the processor holds, their exponentials, and loops over rows.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

// Wider vectors than the processor's would be kept in memory.
#ifdef __AVX512F__
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Integers __attribute__((vector_size(kLanes * sizeof(int32_t))));

template <typename Count>
inline Lanes load(const float* from, Count count) {
    Lanes lanes = {};
    std::memcpy(&lanes, from, count * sizeof(float));
    return lanes;
}

template <typename Count>
inline void store(float* to, Lanes lanes, Count count) {
    std::memcpy(to, &lanes, count * sizeof(float));
}

// Comparisons with NaN are false, and leave it.
inline Lanes clamp(Lanes x, float low, float high) {
    const Lanes below = x > high ? Lanes{} + high : x;
    return below < low ? Lanes{} + low : below;
}

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

// Calls each(i, count) for every `count` inputs that begin with i.
template <typename Each>
inline void for_each_group_of(int64_t inputs, const Each& each) {
    int64_t i = 0;
    // A count known to the compiler copies whole registers.
    for (; i + kLanes <= inputs; i += kLanes) each(i, std::integral_constant<int64_t, kLanes>{});
    if (i < inputs) each(i, inputs - i);
}

// Calls each(row, i, count) for every `count` inputs of a row that begin with i.
template <typename Each>
void for_each_group(int64_t rows, int64_t inputs, int64_t threads, const Each& each) {
    const auto of_row = [&](int64_t row) {
        // What is one's own stays in registers: no store can change it.
        const Each own = each;
        for_each_group_of(inputs, [&](int64_t i, auto count) { own(row, i, count); });
    };
    if (threads == 1) {  // as a thread of a team calls it
        for (int64_t row = 0; row < rows; row++) of_row(row);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) of_row(row);
}

}  // namespace
