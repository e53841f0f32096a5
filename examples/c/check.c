/* Checks adamp.h by the frozen vectors, without any protocol: `make`.

   Exit status: 0 every vector whose rows are the first axis passes, 1 some fail, 2 there is none. */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REAL float
#define NAMED(name) name##_float
#include "adamp.h"

#define REAL double
#define NAMED(name) name##_double
#include "adamp.h"

#include "vectors.h"

enum { P, M, V, G, Q, TENSORS };

static size_t width_of(const AdampVector *x) {
    return !strcmp(x->dtype, "float64") ? sizeof(double) : !strcmp(x->dtype, "float32") ? sizeof(float) : 0;
}

/* The type is one of ours, and rows are the first axis, or there are none. */
static bool applies(const AdampVector *x) {
    bool first = x->channel.count == 1 && x->channel.at[0] == 0 && x->batch.count == 0;
    bool same = x->view.count == x->shape.count;
    for (size_t i = 0; same && i < x->shape.count; i++) same = x->view.at[i] == x->shape.at[i];
    return width_of(x) != 0 && same && (first || x->shape.count < 2);
}

static AdampBranch take(const AdampVector *x, const AdampHyper *h, double t, void **a) {
    size_t rank = x->shape.count;
    const size_t *shape = x->shape.at;
    bool adamp = !strcmp(x->algorithm, "adamp");
    if (width_of(x) == sizeof(float))
        return adamp ? adamp_float(h, t, rank, shape, a[P], a[G], a[M], a[V], a[Q])
                     : sgdp_float(h, rank, shape, a[P], a[G], a[M], a[Q]);
    return adamp ? adamp_double(h, t, rank, shape, a[P], a[G], a[M], a[V], a[Q])
                 : sgdp_double(h, rank, shape, a[P], a[G], a[M], a[Q]);
}

static double element(const void *tensor, size_t i, size_t width) {
    float narrow;
    double wide;
    if (width == sizeof wide) return memcpy(&wide, (const char *)tensor + i * width, width), wide;
    return memcpy(&narrow, (const char *)tensor + i * width, width), (double)narrow;
}

/* Within [lo, hi]; NaN where NaN is expected and, in p, where an infinity is (EDGE-2). */
static bool conforms(double got, double lo, double hi, int tensor) {
    if (isnan(got)) return isnan(lo) || (tensor == P && (isinf(lo) || isinf(hi)));
    return lo <= got && got <= hi;
}

/* All tensors lie in the intervals of one and the same outcome, the one of the branch that was taken. */
static bool fits(const AdampVector *x, const AdampVectorOutcome *outcome, void **state, AdampBranch branch) {
    static const char *const names[] = {"none", "channel", "layer"};
    size_t width = width_of(x);
    bool all = !strcmp(outcome->branch, names[branch]);
    for (int k = P; k <= V && (k < V || !strcmp(x->algorithm, "adamp")); k++)
        for (size_t i = 0; all && i < x->count; i++)
            all = conforms(element(state[k], i, width), element(outcome->lo[k], i, width),
                           element(outcome->hi[k], i, width), k);
    return all;
}

static bool passes(const AdampVector *x) {
    const AdampHyper hyper = {x->lr,           x->beta1, x->beta2,    x->momentum, x->dampening,       x->eps,
                              x->weight_decay, x->delta, x->wd_ratio, x->nesterov, x->project_momentum};
    size_t bytes = x->count * width_of(x);
    void *arrays[TENSORS];
    for (int k = 0; k < TENSORS; k++) {
        arrays[k] = calloc(1, bytes + 1);
        if (arrays[k] == NULL) exit(3);
        if (k <= V && bytes && x->before[k]) memcpy(arrays[k], x->before[k], bytes);
    }
    bool all = true;
    for (size_t i = 0; i < x->step_count; i++) {
        const AdampVectorStep *step = &x->steps[i];
        if (bytes) memcpy(arrays[G], step->g, bytes);
        AdampBranch branch = take(x, &hyper, (double)(x->step + i + 1), arrays);
        bool one = false;
        for (size_t j = 0; j < step->outcome_count; j++) one = one || fits(x, &step->outcomes[j], arrays, branch);
        all = all && one;
    }
    for (int k = 0; k < TENSORS; k++) free(arrays[k]);
    return all;
}

int main(void) {
    size_t applicable = 0, passed = 0;
    for (size_t i = 0; i < ADAMP_VECTOR_COUNT; i++) {
        const AdampVector *x = &ADAMP_VECTORS[i];
        if (!applies(x)) continue;
        applicable++;
        if (passes(x)) passed++;
        else printf("failed %s in %s\n", x->id, x->dtype);
    }
    printf("%zu of %zu vectors pass; %zu of %zu are of another type or have other rows\n", passed, applicable,
           (size_t)ADAMP_VECTOR_COUNT - applicable, (size_t)ADAMP_VECTOR_COUNT);
    return passed < applicable ? 1 : applicable ? 0 : 2;
}
