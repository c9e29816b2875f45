// As many floats as a register of the processor holds, and loops over rows of them.

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

// Calls each(row, i, count) for every `count` inputs of a row that begin with i.
template <typename Each>
void for_each_group(int64_t rows, int64_t inputs, int64_t threads, const Each& each) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < inputs; i += kLanes) {
            // A count known to the compiler copies whole registers.
            if (i + kLanes <= inputs) each(row, i, std::integral_constant<int64_t, kLanes>{});
            else each(row, i, inputs - i);
        }
}

}  // namespace
