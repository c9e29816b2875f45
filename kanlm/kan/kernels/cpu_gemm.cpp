// Sums over the edges of a KAN layer and their gradients, the basis evaluated inside the products.
//
//   y = E M,   dM = Eᵀ dy,   dx_ni = sum_f (dy Mᵀ)_n,fi  dφ_f/dx (x_ni)
//
// E (tokens, F inputs) holds the F functions of all inputs, the base's last, and M (F inputs, out)
// their weights. A product of a library's takes E from memory, F times as large as the inputs,
// and copies it before it multiplies. Here a few tokens' functions of a slice of the inputs are
// made where that copy would lie, in the second cache, and never leave it; so do products dy Mᵀ.
//
// The products are those of Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication" (2008): a tile of the result stays in registers while rows of one factor, from
// the first cache, and numbers of the other, from the second, go by.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <omp.h>

#include "../bases/formulas.h"

namespace {

// A tile is kTall by kWide registers: with a row of one factor, and a number of the other, they
// fill the register file.
#ifdef __AVX512F__
constexpr int kTall = 12;
#else
constexpr int kTall = 6;
#endif
constexpr int kWide = 2;
constexpr int64_t kPanel = kWide * kLanes;
constexpr int64_t kTokens = 24 * kTall;  // whose functions are in the cache at a time
constexpr int64_t kSlice = 576;          // about as many numbers have a token's functions then
constexpr int64_t kDepth = 1024;         // numbers that a tile adds up between reading and writing

// Of formulas.h.
using Values = void (*)(
    const Formulas*, const float*, int64_t, float*, int64_t, int64_t, int64_t, int64_t);
using PullBack = void (*)(
    const Formulas*, const float*, int64_t, const float*, int64_t, float*, int64_t, int64_t,
    int64_t, int64_t);

}  // namespace

// As `_Edges` in cpu_gemm.py.
struct Edges {
    const Formulas* basis;
    Values values;
    PullBack pull_back;
    const float *coefficients;  // (inputs, functions, out)
    const float *base_weight;   // (out, inputs)
    int64_t base;               // 0 none, 1 silu, 2 identity
    int64_t functions, inputs, out;
};

namespace {

int64_t up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }
int64_t parts(int64_t count, int64_t of) { return (count + of - 1) / of; }

struct Free { void operator()(float* place) const { std::free(place); } };
using Floats = std::unique_ptr<float[], Free>;

// Lines of the cache, so that no register's worth lies across two.
Floats floats(int64_t count) {
    float* place = static_cast<float*>(std::aligned_alloc(64, up(count * sizeof(float) + 1, 64)));
    if (place == nullptr) throw std::bad_alloc();
    return Floats(place);
}

// Numbers that lie `step` apart.
struct Weights { const float* first; int64_t step; };

// The layer, cut into slices of inputs whose functions fill a row of about kSlice numbers.
struct Cut {
    const Edges& edges;
    int64_t functions;  // with the base
    int64_t groups, slices;  // of kLanes inputs, and of neighbouring groups
    int64_t depth;  // numbers of a row, filled up to whole panels
    int64_t row;    // distance of rows: no power of 2, which would put them all in one place of a cache

    Cut(const Edges& e, int64_t threads) : edges(e), functions(e.functions + (e.base != 0)) {
        groups = parts(e.inputs, kLanes);
        const int64_t fitting = std::max<int64_t>(kSlice / functions / kLanes, 1);
        // Threads share out the slices, alike.
        slices = std::min(up(parts(groups, fitting), threads), groups);
        depth = up(functions * parts(groups, slices) * kLanes, kPanel);
        row = depth + kPanel;
    }

    int64_t begin(int64_t slice) const { return std::min(groups * slice / slices * kLanes, edges.inputs); }
    int64_t count(int64_t slice) const { return begin(slice + 1) - begin(slice); }
    int64_t filled(int64_t slice) const { return functions * count(slice); }
    int64_t panels(int64_t slice) const { return parts(filled(slice), kPanel); }

    // The weights of number k of a slice's row, of all outputs.
    Weights weights(int64_t slice, int64_t k) const {
        const int64_t n = count(slice), f = k / n, i = begin(slice) + k % n;
        if (f < edges.functions) return {edges.coefficients + (i * edges.functions + f) * edges.out, 1};
        return {edges.base_weight + i, edges.inputs};
    }

    // All functions of a slice of a few tokens: to (tokens, functions, channels), then zeros.
    void expand(int64_t slice, const float* x, int64_t tokens, float* to) const {
        const int64_t n = count(slice);
        x += begin(slice);
        edges.values(edges.basis, x, edges.inputs, to, row, tokens, n, 1);
        if (edges.base != 0)
            for_each_group(tokens, n, 1, [&](int64_t token, int64_t i, auto count) {
                Lanes value = load(x + token * edges.inputs + i, count);
                if (edges.base == 1) value *= sigmoid(value);
                store(to + token * row + edges.functions * n + i, value, count);
            });
        for (int64_t token = 0; token < tokens; token++)
            std::fill(to + token * row + filled(slice), to + token * row + panels(slice) * kPanel, 0.0f);
    }

    // dx of a slice of a few tokens, from gradients by its functions.
    void pull_back(int64_t slice, const float* x, const float* gradients, int64_t tokens, float* dx) const {
        const int64_t n = count(slice);
        x += begin(slice), dx += begin(slice);
        edges.pull_back(edges.basis, x, edges.inputs, gradients, row, dx, edges.inputs, tokens, n, 1);
        if (edges.base != 0)
            for_each_group(tokens, n, 1, [&](int64_t token, int64_t i, auto count) {
                Lanes slope = Lanes{} + 1;
                if (edges.base == 1) {
                    const Lanes at = load(x + token * edges.inputs + i, count), s = sigmoid(at);
                    slope = s * (1 + at * (1 - s));
                }
                const Lanes by = load(gradients + token * row + edges.functions * n + i, count);
                float* to = dx + token * edges.inputs + i;
                store(to, load(to, count) + by * slope, count);
            });
    }
};

// c (ROWS, kPanel), plus what it is if ADD, = a (ROWS, steps) b (steps, kPanel). Rows of a lie
// a_row apart, or one number if it is PACKED, its steps then kTall numbers.
template <int ROWS, bool PACKED, bool ADD>
inline void tile(
    float* c, int64_t c_row, const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t steps
) {
    constexpr int kGroup = 3;  // rows that one address register reaches
    constexpr int kGroups = (ROWS + kGroup - 1) / kGroup;
    if (PACKED) a_row = 1;
    const float* from[kGroups];
    for (int g = 0; g < kGroups; g++) from[g] = a + g * kGroup * a_row;
    Lanes sums[ROWS][kWide] = {};
#pragma GCC unroll 2
    for (int64_t step = 0; step < steps; step++, b += b_row) {
        Lanes across[kWide];
        for (int w = 0; w < kWide; w++) across[w] = load(b + w * kLanes, std::integral_constant<int64_t, kLanes>{});
        for (int r = 0; r < ROWS; r++) {
            const float number = from[r / kGroup][r % kGroup * a_row];
            for (int w = 0; w < kWide; w++) sums[r][w] += number * across[w];
        }
        for (int g = 0; g < kGroups; g++) from[g] += PACKED ? kTall : 1;
    }
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < kWide; w++) {
            float* to = c + r * c_row + w * kLanes;
            constexpr std::integral_constant<int64_t, kLanes> all{};
            store(to, ADD ? sums[r][w] + load(to, all) : sums[r][w], all);
        }
}

// The same for any number of rows.
template <bool ADD, int ROWS = kTall>
inline void rows_of_tile(
    int64_t rows, float* c, int64_t c_row, const float* a, int64_t a_row, const float* b, int64_t steps
) {
    if (rows >= ROWS) tile<ROWS, false, ADD>(c, c_row, a, a_row, b, kPanel, steps);
    else if constexpr (ROWS > 1) rows_of_tile<ADD, ROWS - 1>(rows, c, c_row, a, a_row, b, steps);
}

// c (rows, kPanel) from a (rows, steps) and b (steps, kPanel).
template <bool ADD>
void panel(int64_t rows, float* c, int64_t c_row, const float* a, int64_t a_row, const float* b, int64_t steps) {
    for (int64_t r = 0; r < rows; r += kTall)
        rows_of_tile<ADD>(rows - r, c + r * c_row, c_row, a + r * a_row, a_row, b, steps);
}

void panel(bool add, int64_t rows, float* c, int64_t c_row, const float* a, int64_t a_row, const float* b, int64_t steps) {
    (add ? panel<true> : panel<false>)(rows, c, c_row, a, a_row, b, steps);
}

// One of `of` nearly equal shares of so many tokens.
struct Share {
    int64_t begin, end;
    Share(int64_t count, int64_t part, int64_t of) : begin(count * part / of), end(count * (part + 1) / of) {}
};

void sums(const Edges& edges, const float* x, float* y, int64_t tokens, int64_t threads) {
    const Cut cut(edges, 1);
    const int64_t out = edges.out, panels = parts(out, kPanel), whole = out / kPanel;
    const Floats weights = floats(cut.slices * panels * cut.depth * kPanel);
    const int64_t scratch = kTokens * (cut.row + kPanel);
    const Floats all = floats(threads * scratch);
    const auto packed = [&](int64_t slice, int64_t p) {
        return weights.get() + (slice * panels + p) * cut.depth * kPanel;
    };
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t slice = 0; slice < cut.slices; slice++)
            for (int64_t p = 0; p < panels; p++)
                for (int64_t k = 0; k < cut.filled(slice); k++) {
                    const Weights from = cut.weights(slice, k);
                    float* to = packed(slice, p) + k * kPanel;
                    for (int64_t j = 0; j < kPanel; j++)
                        to[j] = p * kPanel + j < out ? from.first[(p * kPanel + j) * from.step] : 0;
                }
        float* expanded = all.get() + omp_get_thread_num() * scratch;
        float* narrow = expanded + kTokens * cut.row;
        const Share own(tokens, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t n = own.begin; n < own.end; n += kTokens) {
            const int64_t rows = std::min(kTokens, own.end - n);
            for (int64_t slice = 0; slice < cut.slices; slice++) {
                const int64_t depth = cut.filled(slice);
                cut.expand(slice, x + n * edges.inputs, rows, expanded);
                for (int64_t p = 0; p < whole; p++)
                    panel(slice > 0, rows, y + n * out + p * kPanel, out, expanded, cut.row,
                          packed(slice, p), depth);
                if (whole < panels)
                    panel(slice > 0, rows, narrow, kPanel, expanded, cut.row, packed(slice, whole), depth);
            }
            if (whole < panels)
                for (int64_t r = 0; r < rows; r++)
                    std::copy_n(narrow + r * kPanel, out - whole * kPanel, y + (n + r) * out + whole * kPanel);
        }
    }
}

// Gradients dx (tokens, inputs), dcoefficients and dbase, laid out as what they are of; null
// where nobody asks.
void gradients(
    const Edges& edges, const float* x, const float* dy, float* dx, float* dcoefficients, float* dbase,
    int64_t tokens, int64_t threads
) {
    const Cut cut(edges, threads);
    const int64_t out = edges.out, tall = parts(out, kTall);
    // Where there are more threads than slices, some share a slice's tokens.
    const int64_t sharing = std::min(std::max<int64_t>(threads / cut.slices, 1), parts(tokens, kTokens));
    const int64_t tasks = cut.slices * sharing;
    const bool wanted = dcoefficients != nullptr;
    // dMᵀ (outputs, numbers of a row) of every task.
    const int64_t sum = tall * kTall * cut.row;
    const Floats sums = floats(wanted ? tasks * sum : 0);
    const int64_t scratch = kTokens * (2 * cut.row + tall * kTall) + cut.depth * out;
    const Floats all = floats(threads * scratch);
#pragma omp parallel num_threads(threads)
    {
        float* expanded = all.get() + omp_get_thread_num() * scratch;
        float* products = expanded + kTokens * cut.row;  // dy Mᵀ
        float* packed = products + kTokens * cut.row;    // dy, kTall outputs of all tokens at a time
        float* weights = packed + kTokens * tall * kTall;
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t slice = task / sharing, panels = cut.panels(slice);
            const Share own(tokens, task % sharing, sharing);
            float* dm = sums.get() + (wanted ? task * sum : 0);
            if (dx != nullptr)
                for (int64_t k = 0; k < panels * kPanel; k++) {
                    float* to = weights + k / kPanel * out * kPanel + k % kPanel;
                    const bool filled = k < cut.filled(slice);
                    const Weights from = filled ? cut.weights(slice, k) : Weights{nullptr, 0};
                    for (int64_t o = 0; o < out; o++) to[o * kPanel] = filled ? from.first[o * from.step] : 0;
                }
            for (int64_t n = own.begin; n < own.end; n += kTokens) {
                const int64_t rows = std::min(kTokens, own.end - n);
                const float *block = x + n * edges.inputs, *given = dy + n * out;
                if (wanted) {
                    cut.expand(slice, block, rows, expanded);
                    for (int64_t r = 0; r < rows; r++) {
                        const auto to = [&](int64_t t) { return packed + (t * rows + r) * kTall; };
                        for (int64_t t = 0; t < out / kTall; t++)
                            std::copy_n(given + r * out + t * kTall, kTall, to(t));
                        for (int64_t o = out / kTall * kTall; o < tall * kTall; o++)
                            to(o / kTall)[o % kTall] = o < out ? given[r * out + o] : 0;
                    }
                    const auto add = n > own.begin ? tile<kTall, true, true> : tile<kTall, true, false>;
                    for (int64_t p = 0; p < panels; p++)
                        for (int64_t t = 0; t < tall; t++)
                            add(dm + t * kTall * cut.row + p * kPanel, cut.row, packed + t * rows * kTall, 1,
                                expanded + p * kPanel, cut.row, rows);
                }
                if (dx != nullptr) {
                    for (int64_t o = 0; o < out; o += kDepth)
                        for (int64_t p = 0; p < panels; p++)
                            panel(o > 0, rows, products + p * kPanel, cut.row, given + o, out,
                                  weights + (p * out + o) * kPanel, std::min(kDepth, out - o));
                    cut.pull_back(slice, block, products, rows, dx + n * edges.inputs);
                }
            }
        }
        if (wanted)
#pragma omp for collapse(2) schedule(static)
            for (int64_t slice = 0; slice < cut.slices; slice++)
                for (int64_t f = 0; f < cut.functions; f++)
                    for (int64_t place = 0; place < cut.count(slice); place++) {
                        const int64_t i = cut.begin(slice) + place, k = f * cut.count(slice) + place;
                        const bool of_base = f == edges.functions;
                        float* to = of_base ? dbase + i : dcoefficients + (i * edges.functions + f) * out;
                        for (int64_t o = 0; o < out; o++) {
                            float total = 0;
                            for (int64_t part = 0; part < sharing; part++)
                                total += sums[(slice * sharing + part) * sum + o * cut.row + k];
                            to[of_base ? o * edges.inputs : o] = total;
                        }
                    }
    }
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

// Of x (tokens, inputs), to y (tokens, out). Both return whether there was memory.
extern "C" bool edge_sums(const Edges* edges, const float* x, float* y, int64_t tokens, int64_t threads) {
    return has_memory([&] { sums(*edges, x, y, tokens, threads); });
}

extern "C" bool edge_gradients(
    const Edges* edges, const float* x, const float* dy, float* dx, float* dcoefficients, float* dbase,
    int64_t tokens, int64_t threads
) {
    return has_memory([&] { gradients(*edges, x, dy, dx, dcoefficients, dbase, tokens, threads); });
}
