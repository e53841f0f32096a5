/* One step of AdamP and of SGDP (SPEC.md 1.0) in C11, for tensors whose rows are their first axis. Needs libm only.

   Include it once per type:

     #define REAL float
     #define NAMED(name) name##_float
     #include "adamp.h"              // gives adamp_float and sgdp_float

   No -ffast-math: the specification has a word to say on NaN and on each rounding. */

#ifndef ADAMP_H
#define ADAMP_H

#include <stdbool.h>
#include <stddef.h>
#include <tgmath.h>

typedef struct {
    double lr, beta1, beta2, momentum, dampening, eps, weight_decay, delta, wd_ratio;
    bool nesterov, project_momentum;
} AdampHyper;

typedef enum { NONE, CHANNEL, LAYER } AdampBranch;

/* 1 - base^exponent without cancellation (PREC-2). */
static inline long double one_minus_power(double base, double exponent) {
    return -expm1((long double)exponent * log((long double)base));
}

#endif

/* The sum of a / divisor * b, in pairs (PREC-4). */
static inline REAL NAMED(dot)(const REAL *a, REAL divisor, const REAL *b, size_t n) {
    if (n > 8) {
        size_t half = n / 2;
        return NAMED(dot)(a, divisor, b, half) + NAMED(dot)(a + half, divisor, b + half, n - half);
    }
    REAL sum = 0;
    for (size_t i = 0; i < n; i++) sum += a[i] / divisor * b[i];
    return sum;
}

static inline REAL NAMED(norm)(const REAL *x, size_t n) { return sqrt(NAMED(dot)(x, 1, x, n)); }

/* Projects the direction q; tells by which view (section 5). */
static inline AdampBranch NAMED(project)(
    const AdampHyper *h, size_t rank, const size_t *shape, size_t n, const REAL *p, const REAL *g, REAL *q) {
    if (rank < 2 || n == 0) return NONE; /* LAYOUT-4, EDGE-3 */
    const REAL eps = (REAL)h->eps;
    for (AdampBranch view = CHANNEL; view <= LAYER; view++) { /* PROJ-4 */
        size_t rows = view == CHANNEL ? shape[0] : 1, d = n / rows;
        const REAL threshold = (REAL)(h->delta / sqrt((double)d));
        bool passes = true;
        for (size_t i = 0; i < n; i += d) {
            REAL norm_g = NAMED(norm)(g + i, d), norm_p = NAMED(norm)(p + i, d);
            REAL cosine = fabs(NAMED(dot)(g + i, 1, p + i, d)) / fmax(norm_g, eps) / fmax(norm_p, eps); /* PROJ-1 */
            passes = passes && cosine < threshold; /* PROJ-2, PROJ-3; false for NaN */
        }
        if (!passes) continue;
        for (size_t i = 0; i < n; i += d) {
            const REAL norm = NAMED(norm)(p + i, d) + eps; /* PROJ-5 */
            const REAL along = NAMED(dot)(p + i, norm, q + i, d);
            for (size_t j = i; j < i + d; j++) q[j] -= p[j] / norm * along; /* PROJ-6 */
        }
        return view;
    }
    return NONE;
}

static inline size_t NAMED(count)(size_t rank, const size_t *shape) {
    size_t n = 1;
    for (size_t axis = 0; axis < rank; axis++) n *= shape[axis];
    return n;
}

/* Step t, counted from 1. Updates p, m and v; q is room for as many elements, and holds the direction afterwards. */
static inline AdampBranch NAMED(adamp)(
    const AdampHyper *h, double t, size_t rank, const size_t *shape, REAL *p, const REAL *g, REAL *m, REAL *v, REAL *q) {
    const size_t n = NAMED(count)(rank, shape);
    const REAL b1 = (REAL)h->beta1, c1 = (REAL)(1 - h->beta1), b2 = (REAL)h->beta2, c2 = (REAL)(1 - h->beta2);
    const REAL root = (REAL)sqrt(one_minus_power(h->beta2, t)), eps = (REAL)h->eps;
    const REAL step = (REAL)(h->lr / one_minus_power(h->beta1, t));
    for (size_t i = 0; i < n; i++) {
        m[i] = b1 * m[i] + c1 * g[i];                         /* ADAMP-1 */
        v[i] = b2 * v[i] + c2 * g[i] * g[i];                  /* ADAMP-2 */
        REAL numerator = h->nesterov ? b1 * m[i] + c1 * g[i] : m[i]; /* ADAMP-3 */
        q[i] = numerator / (sqrt(v[i]) / root + eps);         /* ADAMP-4 */
    }
    AdampBranch branch = NAMED(project)(h, rank, shape, n, p, g, q);
    const REAL ratio = branch == NONE ? 1 : (REAL)h->wd_ratio; /* PROJ-7 */
    const REAL keep = 1 - (REAL)h->lr * (REAL)h->weight_decay * ratio;
    for (size_t i = 0; i < n; i++) p[i] = p[i] * keep - step * q[i]; /* ADAMP-5, ADAMP-6 */
    return branch;
}

/* As above, without v. */
static inline AdampBranch NAMED(sgdp)(
    const AdampHyper *h, size_t rank, const size_t *shape, REAL *p, const REAL *g, REAL *m, REAL *q) {
    const size_t n = NAMED(count)(rank, shape);
    const REAL lr = (REAL)h->lr, mu = (REAL)h->momentum, c = (REAL)(1 - h->dampening);
    for (size_t i = 0; i < n; i++) {
        m[i] = mu * m[i] + c * g[i];                    /* SGDP-1 */
        q[i] = h->nesterov ? g[i] + mu * m[i] : m[i];   /* SGDP-2 */
    }
    AdampBranch branch = NAMED(project)(h, rank, shape, n, p, g, q);
    const REAL ratio = branch == NONE ? 1 : (REAL)h->wd_ratio;
    const REAL keep = 1 - lr * (REAL)(h->weight_decay / (1 - h->momentum)) * ratio;
    for (size_t i = 0; i < n; i++) {
        if (h->project_momentum && !h->nesterov) m[i] = q[i]; /* SGDP-3 */
        p[i] = p[i] * keep - lr * q[i];                       /* SGDP-4, SGDP-5 */
    }
    return branch;
}

#undef REAL
#undef NAMED
