// As many floats as a register of the processor holds, powers of 2, and loops over rows.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX__
#include <immintrin.h>
#endif

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

// Of these two NaN is left, as it is by comparisons, which are false. The processor's own minimum
// does the same, and compilers do not know.
inline Lanes at_most(Lanes x, Lanes most) {
#if defined(__AVX__) && !defined(__AVX512F__)
    return (Lanes)_mm256_min_ps((__m256)most, (__m256)x);
#else
    return x > most ? most : x;
#endif
}

inline Lanes at_least(Lanes x, Lanes least) {
#if defined(__AVX__) && !defined(__AVX512F__)
    return (Lanes)_mm256_max_ps((__m256)least, (__m256)x);
#else
    return x < least ? least : x;
#endif
}

inline Lanes clamp(Lanes x, float low, float high) {
    return at_least(at_most(x, Lanes{} + high), Lanes{} + low);
}

constexpr float kLog2OfE = 1.44269504f;

// 2^-a for a ≥ 0, to 3e-7 of its value; beyond 126 it stays there.
inline Lanes halved(Lanes a) {
    a = at_most(a, Lanes{} + 126.0f);
    // -a = n + r with |r| ≤ 1/2. So large a number has no places for fractions: its last bits are n.
    const Lanes large = Lanes{} + 12582912.0f;
    const Lanes place = large - a, r = (large - place) - a;
    // 2^r to 8e-8: the polynomial whose largest relative error is least.
    constexpr float kTerms[] = {0.00967554154f, 0.0555071328f, 0.240221197f, 0.693146967f, 1.00000007f};
    Lanes sum = Lanes{} + 0.00132764717f;
    for (const float term : kTerms) sum = sum * r + term;
    Integers bits;
    std::memcpy(&bits, &place, sizeof bits);
    bits = (bits + 127) << 23;
    Lanes power;
    std::memcpy(&power, &bits, sizeof power);
    return sum * power;
}

inline Lanes sigmoid(Lanes x) {
    const Lanes e = halved(at_least(x, -x) * kLog2OfE), below = e / (1 + e);
    return x < 0.0f ? below : 1 - below;
}

// To the nearest whole number.
inline Lanes nearest(Lanes x) {
#ifdef __AVX512F__
    return (Lanes)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX__)
    return (Lanes)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    Lanes whole;
    for (int64_t lane = 0; lane < kLanes; lane++) whole[lane] = __builtin_nearbyintf(x[lane]);
    return whole;
#endif
}

struct Wave { Lanes sine, cosine; };

// Of angles from -pi to pi, to 3e-7: by Taylor's series at half the angle.
inline Wave wave(Lanes angle) {
    const Lanes x = 0.5f * angle, square = x * x;
    constexpr float kSine[] = {2.75573192e-6f, -1.98412698e-4f, 8.33333333e-3f, -1.66666667e-1f, 1.0f};
    constexpr float kCosine[] = {-2.75573192e-7f, 2.48015873e-5f, -1.38888889e-3f, 4.16666667e-2f, -0.5f, 1.0f};
    Lanes sine = Lanes{} - 2.50521084e-8f, cosine = Lanes{} + 2.08767570e-9f;
    for (const float term : kSine) sine = sine * square + term;
    for (const float term : kCosine) cosine = cosine * square + term;
    sine *= x;
    return {2 * sine * cosine, cosine * cosine - sine * sine};
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
