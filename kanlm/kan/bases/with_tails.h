// Functions that go on linearly beyond ± limit, by what they are within.

#pragma once

#include "formulas.h"

namespace {

// `values` and `pull_back` of formulas.h, for a `Functions` with a `limit` and with
// walk(inside, use), which calls use(b, value, slope) for every function.
template <typename Functions>
struct WithTails {
    template <typename Put>
    void values(Lanes x, const Put& put) const {
        const Lanes inside = clamped(x), tail = x - inside;
        own().walk(inside, [&](int64_t b, Lanes value, Lanes slope) { put(b, value + slope * tail); });
    }

    template <typename Gradient>
    Lanes pull_back(Lanes x, const Gradient& gradient) const {
        Lanes sum = {};
        own().walk(clamped(x), [&](int64_t b, Lanes, Lanes slope) { sum += slope * gradient(b); });
        return sum;
    }

private:
    const Functions& own() const { return static_cast<const Functions&>(*this); }
    Lanes clamped(Lanes x) const { return clamp(x, -own().limit, own().limit); }
};

}  // namespace
