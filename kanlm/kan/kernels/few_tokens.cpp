// Sums over the edges of KAN layers for a few tokens, where time goes to reading weights: each is
// read once, as it lies.
//
//   y_no = bias_o + sum_i [ sum_s weights_nis c_{i, first_ni + s, o} + base_ni w_oi ]
//
// Of a local basis only the coefficients of functions that differ from zero are read, `support` an
// input, and of any other all: then support is the number of functions, and first is 0. All
// weights of the base function are read.
//
// Inputs are taken as they are or, with `norm`, after an RMS norm: a norm of its own would take
// about as long as all the rows of a local basis.
//
// Threads share out the inputs, because these are what a token's rows belong to. The rows of
// one input are read for all tokens before those of the next, so that tokens share what the
// caches hold and never read more than a dense product would.
//
// Layers in a row are computed in one call: starting threads and crossing over from Python takes
// as long as many rows.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#include <omp.h>

#include "../bases/formulas.h"

namespace {

// `values` of formulas.h.
using Evaluate = void (*)(
    const Formulas*, const float*, int64_t, float*, int64_t, int64_t, int64_t, int64_t);

// As `CppLayer` in few_tokens.py. Weights are of the type of the inputs. Functions are B-splines on
// equal cells, if there are knots, or evaluated by `evaluate`, if there is one, or given.
struct Layer {
    const void *norm, *coefficients, *base_weight, *bias;
    const float* knots;
    const Formulas* basis;
    Evaluate evaluate;
    int64_t inputs, functions, out, support, base_kind, cells;
    float epsilon;
};

// bfloat16 is the upper half of a float.
struct Bfloat16 { uint16_t bits; };

inline float load(float value) { return value; }
inline float load(Bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
}

inline void store(float* place, float value) { *place = value; }
inline void store(Bfloat16* place, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) { place->bits = 0x7fc0; return; }
    bits += 0x7fff + ((bits >> 16) & 1);  // to the nearest, ties to even
    place->bits = static_cast<uint16_t>(bits >> 16);
}

inline void store_all(float* to, const float* from, int64_t count) { std::copy_n(from, count, to); }
inline void store_all(Bfloat16* to, const float* from, int64_t count) {
    int64_t i = 0;
#ifdef __AVX512BF16__
    for (; i + kLanes <= count; i += kLanes) {
        const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), narrow);
    }
#endif
    for (; i < count; i++) store(to + i, from[i]);
}

constexpr int kMaxSupport = 6;
constexpr int kGroup = 4;          // inputs whose rows are added in one pass over the sums
constexpr int kDots = 8;           // rows of the base's weights that are multiplied in one pass
constexpr size_t kKept = 1 << 22;  // numbers
constexpr int kCacheLine = 64;     // bytes
constexpr int64_t kPanel = 2 * kLanes;  // outputs; sums are kept for whole panels

// Memory from call to call, unless it was for more tokens than decoding has.
template <typename V>
void keep_or_free(std::vector<V>& scratch) {
    if (scratch.size() > kKept) std::vector<V>().swap(scratch);
}

// Fetches `count` rows, which `at` finds, at a place that others are read from, into the second
// cache: by itself the processor begins anew with every row.
template <typename T, typename At>
inline void fetch(int64_t place, int count, const At& at) {
    if (place % (kCacheLine / static_cast<int64_t>(sizeof(T))) == 0)
        for (int r = 0; r < count; r++) __builtin_prefetch(at(r) + place, 0, 2);
}

// As many weights as a register holds floats.
inline Lanes lanes(const float* from) { return load(from, kLanes); }
inline Lanes lanes(const Bfloat16* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    // The compiler makes several instructions of the conversion below.
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (Lanes)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
#else
    typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
    typedef uint32_t Words __attribute__((vector_size(kLanes * sizeof(uint32_t))));
    Halves halves;
    std::memcpy(&halves, from, sizeof(halves));
    return (Lanes)(__builtin_convertvector(halves, Words) << 16);
#endif
}

// sums_o += sum_r weight_r row_r,o, and the rows after these are fetched
template <int ROWS, typename T>
inline void add_rows(
    float* __restrict sums, const T* const* rows, const T* const* after, const float* weights, int64_t out
) {
    const T *row[ROWS], *next[ROWS];
    float weight[ROWS];
    for (int r = 0; r < ROWS; r++) { row[r] = rows[r]; next[r] = after[r]; weight[r] = weights[r]; }
    int64_t o = 0;
    for (; o + kLanes <= out; o += kLanes) {
        fetch<T>(o, ROWS, [&](int r) { return next[r]; });
        Lanes sum = load(sums + o, kLanes);
        for (int r = 0; r < ROWS; r++) sum += weight[r] * lanes(row[r] + o);
        store(sums + o, sum, kLanes);
    }
    for (; o < out; o++)
        for (int r = 0; r < ROWS; r++) sums[o] += weight[r] * load(row[r][o]);
}

template <int SUPPORT, typename T>
void add_inputs(
    float* sums, const int64_t* first, const float* weights, const T* coefficients,
    int64_t tokens, int64_t inputs, int64_t functions, int64_t out, int64_t stride,
    int64_t begin, int64_t end
) {
    const auto find = [=](const T** rows, int64_t n, int64_t i) {
        for (int64_t j = 0; j < kGroup; j++) {
            const T* row = coefficients + ((i + j) * functions + first[n * inputs + i + j]) * out;
            for (int s = 0; s < SUPPORT; s++) rows[j * SUPPORT + s] = row + s * out;
        }
    };
    int64_t i = begin;
    for (; i + kGroup <= end; i += kGroup)
        for (int64_t n = 0; n < tokens; n++) {
            const T *rows[kGroup * SUPPORT], *after[kGroup * SUPPORT];
            find(rows, n, i);
            // Those of the next token, or of the next inputs where there are as many.
            const bool last = n + 1 == tokens;
            const bool more = !last || i + 2 * kGroup <= end;
            find(after, !more ? n : last ? 0 : n + 1, more && last ? i + kGroup : i);
            add_rows<kGroup * SUPPORT>(sums + n * stride, rows, after, weights + (n * inputs + i) * SUPPORT, out);
        }
    for (; i < end; i++)
        for (int64_t n = 0; n < tokens; n++) {
            const T* rows[SUPPORT];
            for (int s = 0; s < SUPPORT; s++)
                rows[s] = coefficients + (i * functions + first[n * inputs + i] + s) * out;
            add_rows<SUPPORT>(sums + n * stride, rows, rows, weights + (n * inputs + i) * SUPPORT, out);
        }
}

// Most tokens that are added to sums in memory, and rows at a time by the number of tokens: their
// weights, of each token, fill the registers.
constexpr int kFewest = 2;
#ifdef __AVX512F__
constexpr int kRows[] = {0, 12, 12};
#else
constexpr int kRows[] = {0, 6, 4};
#endif

// The weights of all functions of some inputs: of function f of input i and token n at n * token +
// f * function + i.
struct Expanded {
    const float* first;
    int64_t token, function;

    // Those of a row of coefficients, of which every input has `functions`: `token` numbers apart.
    const float* of(int64_t row, int64_t functions) const {
        const int64_t i = row / functions;
        return first + (row - i * functions) * function + i;
    }
};

// sums_to += sum_r weight_tr row_r,o of ROWS neighbouring rows and TOKENS tokens
template <int TOKENS, int ROWS, typename T>
inline void add_tile(
    float* __restrict sums, int64_t stride, const T* rows, const float* weights, int64_t out, int64_t columns
) {
    Lanes weight[TOKENS][ROWS];
    for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < ROWS; r++) weight[t][r] = Lanes{} + weights[t * ROWS + r];
    int64_t o = 0;
    for (; o + kLanes <= columns; o += kLanes) {
        Lanes sum[TOKENS];
        for (int t = 0; t < TOKENS; t++) sum[t] = load(sums + t * stride + o, kLanes);
        fetch<T>(o, ROWS, [=](int r) { return rows + (ROWS + r) * out; });
        for (int r = 0; r < ROWS; r++) {
            const Lanes row = lanes(rows + r * out + o);
            for (int t = 0; t < TOKENS; t++) sum[t] += weight[t][r] * row;
        }
        for (int t = 0; t < TOKENS; t++) store(sums + t * stride + o, sum[t], kLanes);
    }
    for (; o < columns; o++)
        for (int t = 0; t < TOKENS; t++)
            for (int r = 0; r < ROWS; r++)
                sums[t * stride + o] += weights[t * ROWS + r] * load(rows[r * out + o]);
}

// Calls use(number) with a number from 1 to MOST that the compiler knows.
template <int MOST, typename Use>
inline void known(int64_t number, const Use& use) {
    if (number == MOST) use(std::integral_constant<int, MOST>{});
    else if constexpr (MOST > 1) known<MOST - 1>(number, use);
}

// All functions of inputs whose rows are neighbours, for up to kFewest tokens.
template <int TOKENS, typename T>
void add_to_memory(
    float* sums, int64_t stride, const Expanded& e, const T* rows, int64_t count, int64_t functions, int64_t out
) {
    const auto add = [&](auto number, int64_t k) {
        constexpr int kCount = decltype(number)::value;
        float weights[TOKENS * kCount];
        for (int r = 0; r < kCount; r++) {
            const float* from = e.of(k + r, functions);
            for (int t = 0; t < TOKENS; t++) weights[t * kCount + r] = from[t * e.token];
        }
        add_tile<TOKENS, kCount>(sums, stride, rows + k * out, weights, out, out);
    };
    int64_t k = 0;
    for (; k + kRows[TOKENS] <= count; k += kRows[TOKENS]) add(std::integral_constant<int, kRows[TOKENS]>{}, k);
    for (; k < count; k++) add(std::integral_constant<int, 1>{}, k);
}

// The same for more, whose sums stay in registers while some rows go by: a tile of kTall tokens and
// kPanel outputs.
#ifdef __AVX512F__
constexpr int kTall = 12;
#else
constexpr int kTall = 6;
#endif
constexpr int64_t kDepth = 64;  // rows, whose weights for kPanel outputs stay in the first cache

// Weights lie step by step; rows b_row apart.
template <int TOKENS, typename T>
inline void add_to_registers(
    float* sums, int64_t stride, const float* weights, const T* b, int64_t b_row, int64_t steps
) {
    constexpr int kWide = kPanel / kLanes;
    Lanes sum[TOKENS][kWide] = {};
    for (int64_t step = 0; step < steps; step++, b += b_row, weights += TOKENS) {
        Lanes across[kWide];
        for (int w = 0; w < kWide; w++) across[w] = lanes(b + w * kLanes);
        // Of the next outputs: rows lie too far apart for the processor to see it coming.
        for (int w = 0; w < kWide; w++) __builtin_prefetch(b + kPanel + w * kLanes, 0, 2);
        for (int t = 0; t < TOKENS; t++)
            for (int w = 0; w < kWide; w++) sum[t][w] += weights[t] * across[w];
    }
    for (int t = 0; t < TOKENS; t++)
        for (int w = 0; w < kWide; w++) {
            float* to = sums + t * stride + w * kLanes;
            store(to, load(to, kLanes) + sum[t][w], kLanes);
        }
}

// kPanel outputs of some rows, side by side as floats, the missing ones 0.
template <typename T>
inline void pack(float* to, const T* rows, int64_t out, int64_t steps, int64_t columns) {
    for (int64_t step = 0; step < steps; step++, rows += out, to += kPanel) {
        if (columns == kPanel) {
            for (int64_t o = 0; o < kPanel; o += kLanes) store(to + o, lanes(rows + o), kLanes);
            __builtin_prefetch(rows + kPanel);
            if (sizeof(T) * kPanel > kCacheLine) __builtin_prefetch(rows + kPanel + kPanel / 2);
        } else {
            for (int64_t o = 0; o < kPanel; o++) to[o] = o < columns ? load(rows[o]) : 0;
        }
    }
}

template <typename T>
void add_by_tiles(
    float* sums, int64_t stride, const Expanded& e, const T* rows, int64_t count, int64_t functions,
    int64_t tokens, int64_t out
) {
    thread_local std::vector<float> weights;
    weights.resize(tokens * kDepth);
    alignas(kCacheLine) float packed[kDepth * kPanel];
    const int64_t tiles = (tokens + kTall - 1) / kTall, tall = (tokens + tiles - 1) / tiles;
    for (int64_t k = 0; k < count; k += kDepth) {
        const int64_t steps = std::min(kDepth, count - k);
        float* weight = weights.data();
        for (int64_t n = 0; n < tokens; n += tall)
            for (int64_t step = 0; step < steps; step++) {
                const float* from = e.of(k + step, functions);
                for (int64_t t = n; t < std::min(n + tall, tokens); t++) *weight++ = from[t * e.token];
            }
        for (int64_t o = 0; o < out; o += kPanel) {
            const int64_t columns = std::min(kPanel, out - o);
            const T* panel = rows + k * out + o;
            const bool once = tiles == 1 && columns == kPanel;
            if (!once) pack(packed, panel, out, steps, columns);
            for (int64_t n = 0; n < tokens; n += tall)
                known<kTall>(std::min(tall, tokens - n), [&](auto number) {
                    constexpr int TOKENS = decltype(number)::value;
                    float* to = sums + n * stride + o;
                    const float* from = weights.data() + n * steps;
                    if (once) add_to_registers<TOKENS>(to, stride, from, panel, out, steps);
                    else add_to_registers<TOKENS>(to, stride, from, packed, kPanel, steps);
                });
        }
    }
    keep_or_free(weights);
}

#ifdef __AVX512BF16__
constexpr int64_t kPairs = 2 * kDepth;  // of rows, as kDepth
constexpr int64_t kMostRounded = 2;  // tokens whose functions are not rounded: they wait for memory

// As add_to_registers, by the processor's own products of pairs of bfloat16.
template <int TOKENS>
inline void add_pairs_to_registers(
    float* sums, int64_t stride, const uint32_t* weights, const uint32_t* b, int64_t steps
) {
    __m512 low[TOKENS], high[TOKENS];
    for (int t = 0; t < TOKENS; t++) low[t] = high[t] = _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; step++, b += kPanel, weights += TOKENS) {
        const __m512bh first = (__m512bh)_mm512_load_si512(b), second = (__m512bh)_mm512_load_si512(b + kLanes);
        for (int t = 0; t < TOKENS; t++) {
            const __m512bh weight = (__m512bh)_mm512_set1_epi32(weights[t]);
            low[t] = _mm512_dpbf16_ps(low[t], first, weight);
            high[t] = _mm512_dpbf16_ps(high[t], second, weight);
        }
    }
    for (int t = 0; t < TOKENS; t++) {
        float* to = sums + t * stride;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), low[t]));
        _mm512_storeu_ps(to + kLanes, _mm512_add_ps(_mm512_loadu_ps(to + kLanes), high[t]));
    }
}

// kPanel outputs of a row and of one that lies `apart`, pair by pair, the missing ones 0.
inline void pack_pair(uint32_t* to, const Bfloat16* row, int64_t apart, int64_t columns) {
    __m512i one, other;
    if (columns >= kPanel) {
        one = _mm512_loadu_si512(row), other = _mm512_loadu_si512(row + apart);
    } else {
        const __mmask32 there = (1u << columns) - 1;
        one = _mm512_maskz_loadu_epi16(there, row), other = _mm512_maskz_loadu_epi16(there, row + apart);
    }
    __builtin_prefetch(row + kPanel);
    __builtin_prefetch(row + apart + kPanel);
    const __m512i low = _mm512_unpacklo_epi16(one, other), high = _mm512_unpackhi_epi16(one, other);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_store_si512(to, _mm512_permutex2var_epi64(low, first, high));
    _mm512_store_si512(to + kLanes, _mm512_permutex2var_epi64(low, second, high));
}

// All functions of an even number of inputs; a pair is a function of two neighbours.
void add_pairs_by_tiles(
    float* sums, int64_t stride, const Expanded& e, const Bfloat16* rows, int64_t inputs, int64_t functions,
    int64_t tokens, int64_t out
) {
    thread_local std::vector<uint32_t> rounded, weights;
    const int64_t half = inputs / 2, pairs = half * functions;
    rounded.resize(tokens * pairs);
    for (int64_t n = 0; n < tokens; n++)
        for (int64_t f = 0; f < functions; f++) {
            const float* from = e.first + n * e.token + f * e.function;
            Bfloat16* to = reinterpret_cast<Bfloat16*>(rounded.data() + n * pairs + f * half);
            store_all(to, from, inputs);
        }
    weights.resize(tokens * kPairs);
    alignas(kCacheLine) uint32_t packed[kPairs * kPanel];
    const int64_t tiles = (tokens + kTall - 1) / kTall, tall = (tokens + tiles - 1) / tiles;
    for (int64_t k = 0; k < pairs; k += kPairs) {
        const int64_t steps = std::min(kPairs, pairs - k);
        const Bfloat16* row[kPairs];
        const uint32_t* pair[kPairs];
        for (int64_t step = 0; step < steps; step++) {
            const int64_t i = (k + step) / functions, f = k + step - i * functions;
            row[step] = rows + (2 * i * functions + f) * out;
            pair[step] = rounded.data() + f * half + i;
        }
        uint32_t* weight = weights.data();
        for (int64_t n = 0; n < tokens; n += tall)
            for (int64_t step = 0; step < steps; step++)
                for (int64_t t = n; t < std::min(n + tall, tokens); t++) *weight++ = pair[step][t * pairs];
        for (int64_t o = 0; o < out; o += kPanel) {
            for (int64_t step = 0; step < steps; step++)
                pack_pair(packed + step * kPanel, row[step] + o, functions * out, out - o);
            for (int64_t n = 0; n < tokens; n += tall)
                known<kTall>(std::min(tall, tokens - n), [&](auto number) {
                    add_pairs_to_registers<decltype(number)::value>(
                        sums + n * stride + o, stride, weights.data() + n * steps, packed, steps);
                });
        }
    }
    keep_or_free(rounded);
    keep_or_free(weights);
}
#endif

template <typename T>
void add_all(
    float* sums, int64_t stride, const Expanded& e, const T* rows, int64_t inputs, int64_t functions,
    int64_t tokens, int64_t out
) {
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<T, Bfloat16>) {
        if (tokens > kMostRounded) {
            const int64_t even = inputs / 2 * 2;
            add_pairs_by_tiles(sums, stride, e, rows, even, functions, tokens, out);
            if (even < inputs)
                add_by_tiles(sums, stride, {e.first + even, e.token, e.function}, rows + even * functions * out,
                             functions, functions, tokens, out);
            return;
        }
    }
#endif
    if (tokens > kFewest) return add_by_tiles(sums, stride, e, rows, inputs * functions, functions, tokens, out);
    known<kFewest>(tokens, [&](auto number) {
        add_to_memory<decltype(number)::value>(sums, stride, e, rows, inputs * functions, functions, out);
    });
}

// Products of `values` with kDots rows at once: one sum alone would wait for itself.
template <typename T>
inline void dot_rows(float* products, const float* values, const T* rows, int64_t count, int64_t inputs) {
    if (count < kDots) {
        for (int64_t r = 0; r < count; r++) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < inputs; i++) sum += values[i] * load(rows[r * inputs + i]);
            products[r] = sum;
        }
        return;
    }
    Lanes sums[kDots] = {};
    int64_t i = 0;
    for (; i + kLanes <= inputs; i += kLanes) {
        fetch<T>(i, kDots, [=](int r) { return rows + (kDots + r) * inputs; });
        const Lanes value = load(values + i, kLanes);
        for (int r = 0; r < kDots; r++) sums[r] += value * lanes(rows + r * inputs + i);
    }
    for (int r = 0; r < kDots; r++) {
        products[r] = 0;
        for (int64_t lane = 0; lane < kLanes; lane++) products[r] += sums[r][lane];
        for (int64_t rest = i; rest < inputs; rest++)
            products[r] += values[rest] * load(rows[r * inputs + rest]);
    }
}

// Index of the first function and values of the B-splines of `degree` on equal cells, with
// linear tails: the triangle of kanlm.kan.bases.bspline, in units of a cell.
inline void bspline(float x, float low, float high, int64_t cells, int degree, int64_t* first, float* values) {
    const float inside = std::min(std::max(x, low), high);
    const float width = (high - low) / cells;
    const float position = (inside - low) / width;
    // NaN is no integer, and stays in the values.
    const int64_t cell = position > 0 ? std::min<int64_t>(static_cast<int64_t>(position), cells - 1) : 0;
    const float t = position - cell;
    float slopes[kMaxSupport] = {0};
    values[0] = 1;
    for (int j = 1; j <= degree; j++) {
        float ratios[kMaxSupport];
        for (int r = 0; r < j; r++) ratios[r] = values[r] / j;
        float carried = 0, carried_slope = 0;
        for (int r = 0; r < j; r++) {
            values[r] = (r + 1 - t) * ratios[r] + carried;
            slopes[r] = j * (carried_slope - ratios[r]);
            carried = (t + (j - 1 - r)) * ratios[r];
            carried_slope = ratios[r];
        }
        values[j] = carried;
        slopes[j] = j * carried_slope;
    }
    const float tail = (x - inside) / width;
    for (int s = 0; s <= degree; s++) values[s] += slopes[s] * tail;
    *first = cell;
}

template <typename T>
inline float inverse_rms(const T* x, int64_t inputs, float epsilon) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < inputs; i++) squares += load(x[i]) * load(x[i]);
    return 1 / std::sqrt(squares / inputs + epsilon);
}

// Inputs from begin to end as floats, after the norm if there is one.
template <typename T>
void widen(const Layer& layer, const T* x, float* to, int64_t begin, int64_t end) {
    if (layer.norm == nullptr) {
        for (int64_t i = begin; i < end; i++) to[i] = load(x[i]);
        return;
    }
    const T* gain = static_cast<const T*>(layer.norm);
    const float scale = inverse_rms(x, layer.inputs, layer.epsilon);
    for (int64_t i = begin; i < end; i++) to[i] = load(x[i]) * scale * load(gain[i]);
}

void base_of(const Layer& layer, const float* x, float* to, int64_t begin, int64_t end) {
    if (layer.base_kind == 2) {
        std::copy(x + begin, x + end, to + begin);
        return;
    }
    for_each_group_of(end - begin, [=](int64_t i, auto count) {
        const Lanes value = load(x + begin + i, count);
        store(to + begin + i, value * sigmoid(value), count);
    });
}

// Where the numbers between inputs and outputs are: one place for all layers of a call.
struct Scratch {
    int64_t* first;
    float *values, *inputs, *base, *sums;
};

template <typename T>
void add_sparse(
    const Layer& layer, const Scratch& scratch, float* own, int64_t stride, int64_t tokens,
    int64_t begin, int64_t end
) {
    const auto add = [&](auto add_supported) {
        add_supported(own, scratch.first, scratch.values, static_cast<const T*>(layer.coefficients),
                      tokens, layer.inputs, layer.functions, layer.out, stride, begin, end);
    };
    switch (layer.support) {
        case 1: add(add_inputs<1, T>); break;
        case 2: add(add_inputs<2, T>); break;
        case 3: add(add_inputs<3, T>); break;
        case 4: add(add_inputs<4, T>); break;
        case 5: add(add_inputs<5, T>); break;
        case 6: add(add_inputs<6, T>); break;
    }
}

// All functions of inputs from begin to end, at places of a thread's own where they are not given.
Expanded expanded(
    const Layer& layer, const Scratch& scratch, int64_t tokens, int64_t begin, int64_t end
) {
    if (layer.evaluate == nullptr)
        return {scratch.values + begin, layer.inputs * layer.functions, layer.inputs};
    const int64_t inputs = end - begin;
    const Expanded e = {scratch.values + begin * layer.functions * tokens, inputs * layer.functions, inputs};
    Formulas basis = *layer.basis;
    if (basis.channels > 1) basis.learned += begin;
    layer.evaluate(&basis, scratch.inputs + begin, layer.inputs,
                   const_cast<float*>(e.first), e.token, tokens, inputs, 1);
    return e;
}

// By all threads of a team, with a barrier at the end.
template <typename T>
void run(const Layer& layer, const T* x, T* y, const Scratch& scratch, int64_t tokens) {
    const int64_t inputs = layer.inputs, out = layer.out, support = layer.support;
    const int64_t stride = (out + kPanel - 1) / kPanel * kPanel;
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = inputs * thread / team, end = inputs * (thread + 1) / team;
    const T* coefficients = static_cast<const T*>(layer.coefficients);
    const T* base_weight = static_cast<const T*>(layer.base_weight);
    const T* bias = static_cast<const T*>(layer.bias);
    const float low = layer.knots == nullptr ? 0 : layer.knots[support - 1];
    const float high = layer.knots == nullptr ? 0 : layer.knots[support - 1 + layer.cells];
    float* own = scratch.sums + thread * tokens * stride;
    std::memset(own, 0, sizeof(float) * tokens * stride);
    for (int64_t n = 0; n < tokens; n++) {
        const int64_t row = n * inputs;
        widen(layer, x + row, scratch.inputs + row, begin, end);
        if (layer.base_kind != 0) base_of(layer, scratch.inputs + row, scratch.base + row, begin, end);
        if (layer.knots != nullptr)
            for (int64_t i = begin; i < end; i++)
                bspline(scratch.inputs[row + i], low, high, layer.cells, support - 1, scratch.first + row + i,
                        scratch.values + (row + i) * support);
    }
    if (support < layer.functions) {
        add_sparse<T>(layer, scratch, own, stride, tokens, begin, end);
    } else {
        const Expanded e = expanded(layer, scratch, tokens, begin, end);
        add_all(own, stride, e, coefficients + begin * layer.functions * out, end - begin, layer.functions,
                tokens, out);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t block = 0; block < out; block += kPanel) {
        const int64_t count = std::min(kPanel, out - block);
        for (int64_t n = 0; n < tokens; n++) {
            float sums[kPanel] = {};
            if (layer.base_kind != 0)
                for (int64_t o = 0; o < count; o += kDots)
                    dot_rows(sums + o, scratch.base + n * inputs, base_weight + (block + o) * inputs,
                             std::min<int64_t>(kDots, count - o), inputs);
            if (bias != nullptr)
                for (int64_t o = 0; o < count; o++) sums[o] += load(bias[block + o]);
            for (int64_t k = 0; k < team; k++) {
                const float* of_thread = scratch.sums + (k * tokens + n) * stride + block;
                for (int64_t o = 0; o < kPanel; o++) sums[o] += of_thread[o];
            }
            store_all(y + n * out + block, sums, count);
        }
    }
}

template <typename T>
void run_all(
    const Layer* layers, int64_t count, const T* x, T* y, int64_t* first, float* values,
    int64_t tokens, int64_t threads
) {
    int64_t inputs = 0, supported = 0, stride = 0, between = 0;
    for (int64_t l = 0; l < count; l++) {
        inputs = std::max(inputs, layers[l].inputs);
        supported = std::max(supported, layers[l].inputs * layers[l].support);
        stride = std::max(stride, (layers[l].out + kPanel - 1) / kPanel * kPanel);
        if (l + 1 < count) between = std::max(between, layers[l].out);
    }
    thread_local std::vector<int64_t> indices;
    thread_local std::vector<float> floats;
    thread_local std::vector<T> hidden;
    if (first == nullptr) {
        indices.resize(tokens * inputs);
        first = indices.data();
    }
    floats.resize(tokens * (supported + 2 * inputs + threads * stride));
    hidden.resize(2 * tokens * between);
    float* base = floats.data();
    float* wide = base + tokens * inputs;
    float* sums = wide + tokens * inputs;
    if (values == nullptr) values = sums + tokens * threads * stride;
    const Scratch scratch = {first, values, wide, base, sums};
    T* halves[2] = {hidden.data(), hidden.data() + tokens * between};
#pragma omp parallel num_threads(threads)
    for (int64_t l = 0; l < count; l++)
        run<T>(layers[l], l == 0 ? x : halves[(l - 1) % 2], l + 1 == count ? y : halves[l % 2],
               scratch, tokens);
    keep_or_free(indices);
    keep_or_free(floats);
    keep_or_free(hidden);
}

template <typename Function>
bool has_memory(const Function& function) {
    try {
        function();
    } catch (const std::bad_alloc&) {
        return false;
    }
    return true;
}

}  // namespace

// Returns whether there was memory for it.
#define DEFINE(NAME, T)                                                                       \
    extern "C" bool NAME(                                                                     \
        const Layer* layers, int64_t count, const T* x, T* y, int64_t* first, float* values,  \
        int64_t tokens, int64_t threads                                                       \
    ) {                                                                                       \
        return has_memory(                                                                    \
            [&] { run_all<T>(layers, count, x, y, first, values, tokens, threads); });        \
    }
DEFINE(sums_float32, float)
DEFINE(sums_bfloat16, Bfloat16)
