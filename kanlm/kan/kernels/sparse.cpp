// Sums over the edges of a KAN layer for a few tokens, reading only the coefficients of the
// functions that differ from zero, and all weights of the base function.
//
//   y_no = bias_o + sum_i [ sum_s weights_nis c_{i, first_ni + s, o} + base_ni w_oi ]
//
// for inputs as they are or, with `norm`, after an RMS norm: a norm of its own would take about
// as long as all the rows.
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

#include "../lanes.h"

namespace {

// As `_Layer` in sparse.py. Weights are of the type of the inputs.
struct Layer {
    const void *norm, *coefficients, *base_weight, *bias;
    const float* knots;  // of equal cells; null where `first` and `values` are given
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

constexpr int kMaxSupport = 6;
constexpr int kGroup = 4;          // inputs whose rows are added in one pass over the sums
constexpr int kAhead = 2;          // groups whose rows' beginnings are fetched ahead
constexpr int kDots = 8;           // rows of the base's weights that are multiplied in one pass
constexpr size_t kKept = 1 << 22;  // numbers
constexpr int kCacheLine = 64;     // bytes
constexpr int64_t kLine = kCacheLine / sizeof(float);  // sums of two threads share none

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

// sums_o += sum_r weight_r row_r,o
template <int ROWS, typename T>
inline void add_rows(float* __restrict sums, const T* const* rows, const float* weights, int64_t out) {
    const T* row[ROWS];
    float weight[ROWS];
    for (int r = 0; r < ROWS; r++) { row[r] = rows[r]; weight[r] = weights[r]; }
    int64_t o = 0;
    for (; o + kLanes <= out; o += kLanes) {
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
    for (int64_t i = begin; i < end; i += kGroup) {
        const int64_t count = std::min<int64_t>(kGroup, end - i);
        if (tokens == 1) {
            const int64_t from = i + kAhead * kGroup, to = std::min<int64_t>(from + kGroup, end);
            for (int64_t j = from; j < to; j++) {
                const char* row = reinterpret_cast<const char*>(
                    coefficients + (j * functions + first[j]) * out);
                // The processor goes on by itself; fetching all of a row is slower than nothing.
                __builtin_prefetch(row);
                __builtin_prefetch(row + kCacheLine);
            }
        }
        for (int64_t n = 0; n < tokens; n++) {
            const T* rows[kGroup * SUPPORT];
            const float* weight = weights + (n * inputs + i) * SUPPORT;
            for (int64_t j = 0; j < count; j++) {
                const T* row = coefficients + ((i + j) * functions + first[n * inputs + i + j]) * out;
                for (int s = 0; s < SUPPORT; s++) rows[j * SUPPORT + s] = row + s * out;
            }
            if (count == kGroup) {
                add_rows<kGroup * SUPPORT>(sums + n * stride, rows, weight, out);
            } else {
                for (int64_t j = 0; j < count; j++)
                    add_rows<SUPPORT>(sums + n * stride, rows + j * SUPPORT, weight + j * SUPPORT, out);
            }
        }
    }
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

// Where the numbers between inputs and outputs are: one place for all layers of a call.
struct Scratch {
    int64_t* first;
    float *values, *base, *sums;
};

// By all threads of a team, with a barrier at the end.
template <typename T>
void run(const Layer& layer, const T* x, T* y, const Scratch& scratch, int64_t tokens) {
    const int64_t inputs = layer.inputs, out = layer.out, support = layer.support;
    const int64_t stride = (out + kLine - 1) / kLine * kLine;
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = inputs * thread / team, end = inputs * (thread + 1) / team;
    const T* norm = static_cast<const T*>(layer.norm);
    const T* coefficients = static_cast<const T*>(layer.coefficients);
    const T* base_weight = static_cast<const T*>(layer.base_weight);
    const T* bias = static_cast<const T*>(layer.bias);
    const float low = layer.knots == nullptr ? 0 : layer.knots[support - 1];
    const float high = layer.knots == nullptr ? 0 : layer.knots[support - 1 + layer.cells];
    float* base = scratch.base;
    float* own = scratch.sums + thread * tokens * stride;
    std::memset(own, 0, sizeof(float) * tokens * stride);
    for (int64_t n = 0; n < tokens; n++) {
        const float scale = norm == nullptr ? 1 : inverse_rms(x + n * inputs, inputs, layer.epsilon);
        for (int64_t i = begin; i < end; i++) {
            const int64_t place = n * inputs + i;
            const float value = load(x[place]) * (norm == nullptr ? 1 : scale * load(norm[i]));
            if (layer.knots != nullptr)
                bspline(value, low, high, layer.cells, support - 1, scratch.first + place,
                        scratch.values + place * support);
            if (layer.base_kind == 1) base[place] = value / (1 + std::exp(-value));
            if (layer.base_kind == 2) base[place] = value;
        }
    }
    const auto add = [&](auto add_supported) {
        add_supported(own, scratch.first, scratch.values, coefficients, tokens, inputs,
                      layer.functions, out, stride, begin, end);
    };
    switch (support) {
        case 1: add(add_inputs<1, T>); break;
        case 2: add(add_inputs<2, T>); break;
        case 3: add(add_inputs<3, T>); break;
        case 4: add(add_inputs<4, T>); break;
        case 5: add(add_inputs<5, T>); break;
        case 6: add(add_inputs<6, T>); break;
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t block = 0; block < out; block += kDots) {
        const int64_t count = std::min<int64_t>(kDots, out - block);
        for (int64_t n = 0; n < tokens; n++) {
            float products[kDots] = {0};
            if (layer.base_kind != 0)
                dot_rows(products, base + n * inputs, base_weight + block * inputs, count, inputs);
            for (int64_t o = block; o < block + count; o++) {
                float sum = products[o - block] + (bias == nullptr ? 0 : load(bias[o]));
                for (int64_t k = 0; k < team; k++) sum += scratch.sums[(k * tokens + n) * stride + o];
                store(y + n * out + o, sum);
            }
        }
    }
}

// Memory from call to call, unless it was for more tokens than decoding has.
template <typename V>
void keep_or_free(std::vector<V>& scratch) {
    if (scratch.size() > kKept) std::vector<V>().swap(scratch);
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
        stride = std::max(stride, (layers[l].out + kLine - 1) / kLine * kLine);
        if (l + 1 < count) between = std::max(between, layers[l].out);
    }
    thread_local std::vector<int64_t> indices;
    thread_local std::vector<float> floats;
    thread_local std::vector<T> hidden;
    if (first == nullptr) {
        indices.resize(tokens * inputs);
        first = indices.data();
    }
    floats.resize(tokens * (supported + inputs + threads * stride));
    hidden.resize(2 * tokens * between);
    float* base = floats.data();
    float* sums = base + tokens * inputs;
    if (values == nullptr) values = sums + tokens * threads * stride;
    const Scratch scratch = {first, values, base, sums};
    T* halves[2] = {hidden.data(), hidden.data() + tokens * between};
#pragma omp parallel num_threads(threads)
    for (int64_t l = 0; l < count; l++)
        run<T>(layers[l], l == 0 ? x : halves[(l - 1) % 2], l + 1 == count ? y : halves[l % 2],
               scratch, tokens);
    keep_or_free(indices);
    keep_or_free(floats);
    keep_or_free(hidden);
}

}  // namespace

// Returns whether there was memory for it.
#define DEFINE(NAME, T)                                                                       \
    extern "C" bool NAME(                                                                     \
        const Layer* layers, int64_t count, const T* x, T* y, int64_t* first, float* values,  \
        int64_t tokens, int64_t threads                                                       \
    ) {                                                                                       \
        try {                                                                                 \
            run_all<T>(layers, count, x, y, first, values, tokens, threads);                  \
        } catch (const std::bad_alloc&) {                                                     \
            return false;                                                                     \
        }                                                                                     \
        return true;                                                                          \
    }
DEFINE(sums_float32, float)
DEFINE(sums_bfloat16, Bfloat16)
