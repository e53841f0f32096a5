/* Speaks the protocol of PROTOCOL.md for adamp.h.

     make adapter
     adamp-parity run --adapter exec:build/adapter */

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#define REAL float
#define NAMED(name) name##_float
#include "adamp.h"

#define REAL double
#define NAMED(name) name##_double
#include "adamp.h"

#include "json.h"

enum { P, M, V, G, Q, ARRAYS, MOST_AXES = 32 };

static const char *const KEYS[] = {"p", "m", "v", "g"};
static const char *const QUOTED[] = {"\"p\"", "\"m\"", "\"v\""};
static const char *const BRANCHES[] = {"none", "channel", "layer"};
static const char HEX[] = "0123456789abcdef";

typedef struct {
    Json name; /* in quotation marks, as it came and as it goes back */
    size_t rank, shape[MOST_AXES], count;
    void *arrays[ARRAYS];
    AdampBranch branch;
    bool given; /* in the message that is being read */
} Tensor;

typedef struct {
    bool adamp, decided;       /* decided: every tensor has the branch of the last step */
    size_t width, step, count; /* bytes of an element, steps taken, tensors */
    AdampHyper hyper;
    Tensor *tensors;
    char *line; /* of `create`, where the names stand */
} Problem;

/* How a request went; if not well, `why` says why. */
typedef enum { DONE, REFUSED, FAILED } Result;

static char why[400];

static Result because(Result result, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(why, sizeof why, format, arguments);
    va_end(arguments);
    return result;
}

/* For %.*s, shortened. */
#define TEXT(json) (int)((json).end - (json).at > 80 ? 80 : (json).end - (json).at), (json).at ? (json).at : ""

static void *allocate(size_t count, size_t size) {
    void *memory = count < SIZE_MAX / 2 / size ? calloc(count + 1, size) : NULL;
    if (memory == NULL) {
        fprintf(stderr, "out of memory\n");
        exit(1);
    }
    return memory;
}

static void release(Problem *problem) {
    for (size_t i = 0; i < problem->count; i++)
        for (int k = 0; k < ARRAYS; k++) free(problem->tensors[i].arrays[k]);
    free(problem->tensors);
    free(problem->line);
    *problem = (Problem){0};
}

/* Reading. Everything is looked at before anything is taken over, so that a refusal changes nothing (REFUSE-5). */

static bool read_bits(const char *text, size_t digits, uint64_t *bits) {
    *bits = 0;
    for (size_t i = 0; i < digits; i++) {
        const char *digit = memchr(HEX, text[i], 16);
        if (digit == NULL) return false;
        *bits = *bits << 4 | (uint64_t)(digit - HEX);
    }
    return true;
}

/* Whether a tensor is well formed and, where x already has a shape, of the dtype and the shape of x. */
static Result look_at(Json tensor, const char *what, Tensor *x, size_t *width, bool has_shape) {
    Json dtype = json_get(tensor, "\"dtype\""), data = json_get(tensor, "\"data\"");
    Json sizes = json_inside(json_get(tensor, "\"shape\""), '['), size;
    if (dtype.at == NULL || data.at == NULL || sizes.at == NULL)
        return because(FAILED, "%s of %.*s is not a tensor", what, TEXT(x->name));

    size_t own = json_is(dtype, "\"float32\"") ? 4 : json_is(dtype, "\"float64\"") ? 8 : 0;
    if (own == 0 || (*width != 0 && own != *width))
        return because(REFUSED, "%s of %.*s has dtype %.*s; all must be float32, or all float64", what, TEXT(x->name),
                       TEXT(dtype));

    size_t rank = 0, shape[MOST_AXES] = {0}, count = 1;
    for (; json_next(&sizes, NULL, &size); rank++) {
        if (rank == MOST_AXES || !json_size(size, &shape[rank]) || (shape[rank] && count > SIZE_MAX / 64 / shape[rank]))
            return because(FAILED, "%s of %.*s has a shape that is none, or too large", what, TEXT(x->name));
        count *= shape[rank];
    }
    if (has_shape && (rank != x->rank || memcmp(shape, x->shape, sizeof shape) != 0))
        return because(REFUSED, "%s of %.*s must have the shape of the parameter", what, TEXT(x->name));

    uint64_t bits;
    bool well = *data.at == '"' && (size_t)(data.end - data.at) == 2 * own * count + 2;
    for (size_t i = 0; well && i < count; i++) well = read_bits(data.at + 1 + 2 * own * i, 2 * own, &bits);
    if (!well) return because(FAILED, "%s of %.*s: the data do not fit the shape", what, TEXT(x->name));

    *width = own;
    x->rank = rank;
    x->count = count;
    memcpy(x->shape, shape, sizeof shape);
    return DONE;
}

/* A tensor that was looked at. */
static void take_over(Json tensor, size_t count, size_t width, void *array) {
    const char *digits = json_get(tensor, "\"data\"").at + 1;
    for (size_t i = 0; i < count; i++) {
        uint64_t bits;
        read_bits(digits + 2 * width * i, 2 * width, &bits);
        uint32_t narrow = (uint32_t)bits;
        if (width == sizeof narrow) memcpy((char *)array + i * width, &narrow, width);
        else memcpy((char *)array + i * width, &bits, width);
    }
}

static Tensor *find(Problem *problem, Json name) {
    for (size_t i = 0; i < problem->count; i++) {
        Tensor *x = &problem->tensors[i];
        if (x->name.end - x->name.at == name.end - name.at &&
            memcmp(x->name.at, name.at, (size_t)(name.end - name.at)) == 0)
            return x;
    }
    return NULL;
}

#define NUMBER(name, adamp, sgdp, low, high, closed) {"\"" #name "\"", offsetof(AdampHyper, name), adamp, sgdp, low, high, closed}

static const struct {
    const char *quoted;
    size_t offset;
    bool adamp, sgdp;
    double low, high; /* HYPER-1; the upper end belongs to the domain where it is closed */
    bool closed;
} NUMBERS[] = {
    NUMBER(lr, true, true, 0, INFINITY, false),           NUMBER(beta1, true, false, 0, 1, false),
    NUMBER(beta2, true, false, 0, 1, false),              NUMBER(momentum, false, true, 0, 1, false),
    NUMBER(dampening, false, true, 0, 1, true),           NUMBER(eps, true, true, 0x1p-126, INFINITY, false),
    NUMBER(weight_decay, true, true, 0, INFINITY, false), NUMBER(delta, true, true, 0, INFINITY, false),
    NUMBER(wd_ratio, true, true, 0, INFINITY, false),
};

static Result read_number(Json key, Json value, bool adamp, AdampHyper *hyper) {
    for (size_t i = 0; i < sizeof NUMBERS / sizeof *NUMBERS; i++) {
        if (!json_is(key, NUMBERS[i].quoted) || !(adamp ? NUMBERS[i].adamp : NUMBERS[i].sgdp)) continue;
        uint64_t bits;
        double x, low = NUMBERS[i].low, high = NUMBERS[i].high;
        if (value.end - value.at != 18 || !read_bits(value.at + 1, 16, &bits))
            return because(FAILED, "%.*s is not 16 hexadecimal digits", TEXT(key));
        memcpy(&x, &bits, sizeof x);
        if (!((x >= low && x < high) || (NUMBERS[i].closed && x == high)))
            return because(REFUSED, "%.*s = %g must be in [%g, %g%c", TEXT(key), x, low, high,
                           NUMBERS[i].closed ? ']' : ')');
        memcpy((char *)hyper + NUMBERS[i].offset, &x, sizeof x);
        return DONE;
    }
    return because(REFUSED, "%.*s is not a hyperparameter of %s", TEXT(key), adamp ? "adamp" : "sgdp");
}

static Result read_hyper(Json given, bool adamp, AdampHyper *hyper) {
    Json members = json_inside(given, '{'), key, value;
    size_t count = 0;
    for (; json_next(&members, &key, &value); count++) {
        Result result = DONE;
        bool flag = json_is(value, "true");
        if (!flag && !json_is(value, "false")) result = read_number(key, value, adamp, hyper);
        else if (json_is(key, "\"nesterov\"")) hyper->nesterov = flag;
        else if (json_is(key, "\"project_momentum\"") && !adamp) hyper->project_momentum = flag;
        else result = because(REFUSED, "%.*s is not a flag of %s", TEXT(key), adamp ? "adamp" : "sgdp");
        if (result != DONE) return result;
    }
    if (count != (adamp ? 8 : 9)) return because(FAILED, "hyperparameters are missing");
    if (!adamp && hyper->nesterov && hyper->momentum == 0) /* HYPER-3 */
        return because(REFUSED, "nesterov needs a momentum above 0, got 0");
    return DONE;
}

/* The requests. */

static bool is_first_axis(Json layout) {
    Json channel = json_inside(json_get(layout, "\"channel\""), '['), batch = json_get(layout, "\"batch\""), axis;
    Json slices = json_inside(batch, '[');
    return json_is(layout, "null") ||
           (json_next(&channel, NULL, &axis) && json_is(axis, "0") && !json_next(&channel, NULL, &axis) &&
            !json_next(&slices, NULL, &axis) && json_is(json_get(layout, "\"view\""), "null"));
}

static Result create(Json request, Problem *next) {
    Json algorithm = json_get(request, "\"algorithm\""), name, entry;
    next->adamp = json_is(algorithm, "\"adamp\"");
    if (!next->adamp && !json_is(algorithm, "\"sgdp\"")) return because(FAILED, "unknown algorithm");
    Result result = read_hyper(json_get(request, "\"hyper\""), next->adamp, &next->hyper);

    Json parameters = json_inside(json_get(request, "\"parameters\""), '{');
    size_t most = 0;
    for (Json rest = parameters; json_next(&rest, &name, &entry);) most++;
    next->tensors = allocate(most, sizeof *next->tensors);
    while (result == DONE && json_next(&parameters, &name, &entry)) {
        Tensor *x = &next->tensors[next->count++];
        x->name = name;
        Json p = json_get(entry, "\"p\"");
        if ((result = look_at(p, "p", x, &next->width, false)) != DONE) break;
        if (!is_first_axis(json_get(entry, "\"layout\"")))
            return because(REFUSED, "the layout of %.*s is not Layout(0), the only one here", TEXT(name));
        for (int k = 0; k < ARRAYS; k++) x->arrays[k] = allocate(x->count, next->width);
        take_over(p, x->count, next->width, x->arrays[P]);
    }
    return result;
}

static Result load(Json request, Problem *problem) {
    Json state = json_get(request, "\"state\""), all = json_inside(json_get(state, "\"parameters\""), '{'), name, entry;
    size_t step;
    if (!json_size(json_get(state, "\"step\""), &step)) return because(FAILED, "the step is not a whole number");
    for (size_t i = 0; i < problem->count; i++) problem->tensors[i].given = false;
    for (Json rest = all; json_next(&rest, &name, &entry);) {
        Tensor *x = find(problem, name);
        if (x == NULL) return because(REFUSED, "there is no parameter %.*s", TEXT(name));
        x->given = true;
        for (int k = P; k <= (problem->adamp ? V : M); k++) {
            Result result = look_at(json_get(entry, QUOTED[k]), KEYS[k], x, &problem->width, true);
            if (result != DONE) return result;
        }
    }
    for (size_t i = 0; i < problem->count; i++)
        if (!problem->tensors[i].given)
            return because(REFUSED, "parameter %.*s is missing", TEXT(problem->tensors[i].name));
    while (json_next(&all, &name, &entry)) {
        Tensor *x = find(problem, name);
        for (int k = P; k <= (problem->adamp ? V : M); k++)
            take_over(json_get(entry, QUOTED[k]), x->count, problem->width, x->arrays[k]);
    }
    problem->step = step;
    problem->decided = false;
    return DONE;
}

static AdampBranch take_step(const Problem *problem, const Tensor *x) {
    const AdampHyper *h = &problem->hyper;
    void *const *a = x->arrays;
    double t = (double)(problem->step + 1);
    if (problem->width == sizeof(float))
        return problem->adamp ? adamp_float(h, t, x->rank, x->shape, a[P], a[G], a[M], a[V], a[Q])
                              : sgdp_float(h, x->rank, x->shape, a[P], a[G], a[M], a[Q]);
    return problem->adamp ? adamp_double(h, t, x->rank, x->shape, a[P], a[G], a[M], a[V], a[Q])
                          : sgdp_double(h, x->rank, x->shape, a[P], a[G], a[M], a[Q]);
}

static Result step(Json request, Problem *problem) {
    Json gradients = json_inside(json_get(request, "\"gradients\""), '{'), name, gradient;
    for (size_t i = 0; i < problem->count; i++) problem->tensors[i].given = false;
    while (json_next(&gradients, &name, &gradient)) {
        Tensor *x = find(problem, name);
        if (x == NULL) return because(REFUSED, "there is no parameter %.*s", TEXT(name));
        Result result = look_at(gradient, "the gradient", x, &problem->width, true);
        if (result != DONE) return result;
        take_over(gradient, x->count, problem->width, x->arrays[G]);
        x->given = true;
    }
    problem->decided = true;
    for (size_t i = 0; i < problem->count; i++) {
        Tensor *x = &problem->tensors[i];
        if (x->given) x->branch = take_step(problem, x);
        problem->decided = problem->decided && x->given; /* STATE-4: what has no gradient is left alone */
    }
    problem->step++;
    return DONE;
}

static void write_tensor(const Tensor *x, int k, size_t width) {
    printf("%s\"%s\":{\"dtype\":\"float%d\",\"shape\":[", k ? "," : "", KEYS[k], (int)(8 * width));
    for (size_t i = 0; i < x->rank; i++) printf("%s%zu", i ? "," : "", x->shape[i]);
    printf("],\"data\":\"");
    for (size_t i = 0; i < x->count; i++) {
        uint64_t bits;
        uint32_t narrow;
        if (width == sizeof bits) memcpy(&bits, (const char *)x->arrays[k] + i * width, width);
        else memcpy(&narrow, (const char *)x->arrays[k] + i * width, width), bits = narrow;
        for (size_t shift = 8 * width; shift > 0; shift -= 4) putchar(HEX[bits >> (shift - 4) & 15]);
    }
    printf("\"}");
}

static void dump(const Problem *problem) {
    printf("{\"state\":{\"step\":%zu,\"parameters\":{", problem->step);
    for (size_t i = 0; i < problem->count; i++) {
        const Tensor *x = &problem->tensors[i];
        printf("%s%.*s:{", i ? "," : "", (int)(x->name.end - x->name.at), x->name.at);
        for (int k = P; k <= (problem->adamp ? V : M); k++) write_tensor(x, k, problem->width);
        if (problem->decided) printf(",\"branch\":[\"%s\"]", BRANCHES[x->branch]);
        printf("}");
    }
    printf("}}}\n");
}

/* A line without its end, or NULL after the last one. */
static char *read_line(size_t *length) {
    size_t room = 1 << 12;
    char *line = allocate(room, 1);
    int c;
    for (*length = 0; (c = getchar()) != '\n' && c != EOF; line[(*length)++] = (char)c)
        if (*length == room) {
            char *longer = room < SIZE_MAX / 4 ? realloc(line, (room *= 2) + 1) : NULL;
            if (longer == NULL) exit(1);
            line = longer;
        }
    if (c == '\n') return line;
    free(line);
    return NULL;
}

int main(void) {
    Problem problem = {0};
    size_t length;
    for (char *line; (line = read_line(&length)) != NULL;) {
        Json request;
        bool well = json_object((Json){line, line + length}, &request);
        Json command = well ? json_get(request, "\"command\"") : (Json){NULL, NULL};
        Result result = because(FAILED, "not a request that is known, or not one that can come first");
        bool replied = false;
        if (json_is(command, "\"stop\"")) {
            free(line);
            break;
        } else if (json_is(command, "\"hello\"")) {
            if (!json_is(json_get(request, "\"protocol\""), "1")) {
                result = because(FAILED, "this adapter speaks protocol 1");
            } else {
                printf("{\"protocol\":1,\"name\":\"c\",\"version\":\"1.0, C11\",\"execution\":\"native\","
                       "\"algorithms\":[\"adamp\",\"sgdp\"],\"dtypes\":[\"float64\",\"float32\"],"
                       "\"weights\":\"torch\",\"layouts\":\"first\",\"fixed\":{}}\n");
                replied = true;
            }
        } else if (json_is(command, "\"create\"")) {
            Problem next = {.line = line};
            line = NULL;
            result = create(request, &next);
            release(result == DONE ? &problem : &next);
            if (result == DONE) problem = next;
        } else if (problem.line != NULL && json_is(command, "\"load\"")) {
            result = load(request, &problem);
        } else if (problem.line != NULL && json_is(command, "\"step\"")) {
            result = step(request, &problem);
        } else if (problem.line != NULL && json_is(command, "\"dump\"")) {
            dump(&problem);
            replied = true;
        }
        for (char *c = why; *c; c++)
            if (*c == '"' || *c == '\\' || (unsigned char)*c < ' ' || (unsigned char)*c > '~') *c = '\'';
        if (!replied && result == DONE) printf("{\"ok\":true}\n");
        else if (!replied) printf("{\"%s\":\"%s\"}\n", result == REFUSED ? "refused" : "error", why);
        fflush(stdout);
        free(line);
    }
    release(&problem);
    return 0;
}
