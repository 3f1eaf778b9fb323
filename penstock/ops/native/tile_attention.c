/* Attention of blocks of queries over lists of units of keys, in float32: see penstock/ops/tile_attention.py.

   Each block of queries goes through its list in pieces that fit the cache, with a running maximum and sum (the
   online softmax of Milakov & Gimelshein 2018); matrix products are the BLAS that PyTorch brings, called by one
   thread each. The backward pass computes the weights again from the saved log-sum-exp. Threads share out blocks
   going forward, and key/value heads going back, so that no two write to the same gradient. */

#include "blas.h"

typedef struct {
    gemm_t gemm;
    const float *q, *k, *v;       /* (B, H, L, K); (B, G, U, u, K) twice */
    const int64_t *entries, *ends; /* (E,) units; (R,) where each list ends */
    const int64_t *masked;         /* (R,) how many units at a list's end need a mask */
    const int64_t *last;           /* (U, u) from which query on a token is seen */
    const float *bias;             /* (U,) added to a unit's scores, or null */
    int64_t batch, heads, groups, length, width, units, size, block, causal, threads;
    float scale;
} Call;

#define NOWHERE ((int64_t)1 << 62)
#define PIECE 512 /* tokens taken at once */

/* a (rows x inner) times b (columns x inner) transposed */
static void times_transposed(const Call *c, int rows, int columns, int inner, float alpha, const float *a,
                             const float *b, float *out, int stride) {
    product(c->gemm, 0, 1, rows, columns, inner, alpha, a, inner, b, inner, 0, out, stride);
}

/* out (rows x columns) = beta out + a (rows x inner, row stride given) times b (inner x columns) */
static void times(const Call *c, int rows, int columns, int inner, const float *a, int stride, const float *b,
                  float beta, float *out) {
    product(c->gemm, 0, 0, rows, columns, inner, 1, a, stride, b, columns, beta, out, columns);
}

/* out (rows x columns) += a (inner x rows, row stride given) transposed times b (inner x columns) */
static void add_transposed_times(const Call *c, int rows, int columns, int inner, const float *a, int stride,
                                 const float *b, float *out) {
    product(c->gemm, 1, 0, rows, columns, inner, 1, a, stride, b, columns, 1, out, columns);
}

#define ROWS 64 /* queries at once where tiles are partly hidden: those above the diagonal are left out */

/* how many leading tokens of a unit are seen by some of `count` queries from `first` on */
static int seen(const Call *c, const int64_t *last, int64_t first, int count) {
    const int64_t limit = c->causal ? first + count - 1 : NOWHERE - 1;
    int n = 0, beyond = (int)c->size;
    while (n < beyond) {
        const int middle = (n + beyond) / 2;
        if (last[middle] <= limit)
            n = middle + 1;
        else
            beyond = middle;
    }
    return n;
}

/* how many units from entry `t` on lie one after the other in memory and need no mask: they are taken as one */
static int64_t run_of(const int64_t *at, int64_t t, int64_t count, int64_t unmasked) {
    const int64_t end = unmasked < count ? unmasked : count;
    int64_t n = 1;
    while (t + n < end && at[t + n] == at[t] + n) n++;
    return n;
}

/* Scores of one block against `count` units from `at` on, masked, (rows x count u) with row stride `tokens`. */
static void scores_of(const Call *c, const float *q, const float *keys, const int64_t *at, int64_t count, int rows,
                      int64_t first, int64_t unmasked, float *scores) {
    const int size = (int)c->size, width = (int)c->width, tokens = (int)(count * size);
    for (int64_t t = 0, run; t < count; t += run) {
        const float *unit = keys + at[t] * size * width;
        float *out = scores + t * size;
        run = run_of(at, t, count, unmasked);
        if (t < unmasked)
            times_transposed(c, rows, (int)run * size, width, c->scale, q, unit, out, tokens);
        else {
            const int64_t *last = c->last + at[t] * size;
            for (int a = 0; a < rows; a += ROWS) {
                const int number = rows - a < ROWS ? rows - a : ROWS, columns = seen(c, last, first + a, number);
                if (columns)
                    times_transposed(c, number, columns, width, c->scale, q + a * width, unit, out + (int64_t)a * tokens,
                                     tokens);
                for (int i = a; i < a + number; i++) {
                    const int visible = seen(c, last, first + i, 1);
                    for (int j = visible; j < size; j++) out[(int64_t)i * tokens + j] = -INFINITY;
                }
            }
        }
        if (c->bias)
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < run * size; j++) out[(int64_t)i * tokens + j] += c->bias[at[t + j / size]];
    }
}

static int64_t units_a_piece(const Call *c) { return c->size >= PIECE ? 1 : PIECE / c->size; }

/* out (B, H, L, K) and lse (B, H, L); returns nonzero if memory ran out */
int tile_attention_forward(const Call *c, float *out, float *lse) {
    const int64_t per_head = (c->length + c->block - 1) / c->block, number = c->batch * c->heads * per_head;
    const int64_t step = units_a_piece(c), width = c->width;
    int failed = 0;
#pragma omp parallel num_threads(c->threads)
    {
        float *scores = room(c->block * step * c->size), *top = room(2 * c->block), *sum = top ? top + c->block : NULL;
        if (!scores || !top) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < number; r++) {
            if (failed) continue;
            const int64_t head = r / per_head, first = r % per_head * c->block;
            const int64_t shared = head / c->heads * c->groups + head % c->heads / (c->heads / c->groups);
            const int rows = (int)(first + c->block <= c->length ? c->block : c->length - first);
            const float *q = c->q + (head * c->length + first) * width;
            const float *keys = c->k + shared * c->units * c->size * width;
            const float *values = c->v + shared * c->units * c->size * width;
            float *o = out + (head * c->length + first) * width;
            const int64_t begin = r ? c->ends[r - 1] : 0, end = c->ends[r];
            for (int i = 0; i < rows; i++) top[i] = -INFINITY, sum[i] = 0;
            memset(o, 0, (size_t)(rows * width) * sizeof(float));
            for (int64_t a = begin; a < end; a += step) {
                const int64_t count = a + step < end ? step : end - a, unmasked = end - c->masked[r] - a;
                const int tokens = (int)(count * c->size);
                scores_of(c, q, keys, c->entries + a, count, rows, first, unmasked, scores);
                for (int i = 0; i < rows; i++) {
                    float *s = scores + (int64_t)i * tokens, high = top[i], total = 0;
#pragma omp simd reduction(max : high)
                    for (int j = 0; j < tokens; j++) high = s[j] > high ? s[j] : high;
                    if (high == -INFINITY) { /* nothing to see yet */
                        memset(s, 0, (size_t)tokens * sizeof(float));
                        continue;
                    }
                    const float shift = high * LOG2E;
#pragma omp simd reduction(+ : total)
                    for (int j = 0; j < tokens; j++) {
                        s[j] = exp2_below(fmaf(s[j], LOG2E, -shift));
                        total += s[j];
                    }
                    const float fade = exp2_below(fmaf(top[i], LOG2E, -shift));
                    if (top[i] != high)
                        for (int d = 0; d < width; d++) o[i * width + d] *= fade;
                    sum[i] = sum[i] * fade + total;
                    top[i] = high;
                }
                for (int64_t t = 0, run; t < count; t += run) {
                    const int64_t unit = c->entries[a + t];
                    run = run_of(c->entries + a, t, count, unmasked);
                    for (int i = 0; i < rows; i += t < unmasked ? rows : ROWS) {
                        const int number = t < unmasked ? rows : rows - i < ROWS ? rows - i : ROWS;
                        const int inner = t < unmasked ? (int)(run * c->size) : seen(c, c->last + unit * c->size, first + i, number);
                        if (inner)
                            times(c, number, (int)width, inner, scores + (int64_t)i * tokens + t * c->size, tokens,
                                  values + unit * c->size * width, 1, o + i * width);
                    }
                }
            }
            for (int i = 0; i < rows; i++) {
                const float factor = sum[i] > 0 ? 1 / sum[i] : 0;
                for (int d = 0; d < width; d++) o[i * width + d] *= factor;
                lse[head * c->length + first + i] = sum[i] > 0 ? top[i] + logf(sum[i]) : INFINITY;
            }
        }
        free(scores);
        free(top);
    }
    return failed;
}

/* dq (B, H, L, K); dk, dv (B, G, U, u, K), zero at first */
int tile_attention_backward(const Call *c, const float *out, const float *lse, const float *grad, float *dq, float *dk,
                            float *dv) {
    const int64_t per_head = (c->length + c->block - 1) / c->block, step = units_a_piece(c), width = c->width;
    const int64_t repeat = c->heads / c->groups;
    int failed = 0;
#pragma omp parallel num_threads(c->threads)
    {
        float *weights = room(c->block * step * c->size), *d_scores = room(c->block * step * c->size);
        float *inner = room(c->block);
        if (!weights || !d_scores || !inner) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t shared = 0; shared < c->batch * c->groups; shared++) {
            for (int64_t r = shared * repeat * per_head; r < (shared + 1) * repeat * per_head && !failed; r++) {
                const int64_t head = r / per_head, first = r % per_head * c->block;
                const int rows = (int)(first + c->block <= c->length ? c->block : c->length - first);
                const int64_t at = (head * c->length + first) * width, whole = shared * c->units * c->size * width;
                const float *q = c->q + at, *o = out + at, *g = grad + at, *norm = lse + head * c->length + first;
                const int64_t begin = r ? c->ends[r - 1] : 0, end = c->ends[r];
                for (int i = 0; i < rows; i++) {
                    float total = 0;
#pragma omp simd reduction(+ : total)
                    for (int d = 0; d < width; d++) total += o[i * width + d] * g[i * width + d];
                    inner[i] = total;
                }
                for (int64_t a = begin; a < end; a += step) {
                    const int64_t count = a + step < end ? step : end - a;
                    const int tokens = (int)(count * c->size);
                    scores_of(c, q, c->k + whole, c->entries + a, count, rows, first, end - c->masked[r] - a, weights);
                    for (int64_t t = 0, run; t < count; t += run) {
                        run = run_of(c->entries + a, t, count, count);
                        times_transposed(c, rows, (int)(run * c->size), (int)width, 1, g,
                                         c->v + whole + c->entries[a + t] * c->size * width, d_scores + t * c->size,
                                         tokens);
                    }
                    for (int i = 0; i < rows; i++) {
                        float *w = weights + (int64_t)i * tokens, *s = d_scores + (int64_t)i * tokens;
                        const float shift = norm[i], mean = inner[i];
#pragma omp simd
                        for (int j = 0; j < tokens; j++) {
                            const float x = (w[j] - shift) * LOG2E;
                            w[j] = exp2_below(x < 0 ? x : 0);
                            s[j] = w[j] * (s[j] - mean) * c->scale;
                        }
                        if (shift == INFINITY) { /* the query sees nothing */
                            memset(w, 0, (size_t)tokens * sizeof(float));
                            memset(s, 0, (size_t)tokens * sizeof(float));
                        }
                    }
                    for (int64_t t = 0, run; t < count; t += run) {
                        const int64_t unit = whole + c->entries[a + t] * c->size * width;
                        const float *w = weights + t * c->size, *s = d_scores + t * c->size;
                        run = run_of(c->entries + a, t, count, count);
                        const int inner = (int)(run * c->size);
                        add_transposed_times(c, inner, (int)width, rows, w, tokens, g, dv + unit);
                        add_transposed_times(c, inner, (int)width, rows, s, tokens, q, dk + unit);
                        times(c, rows, (int)width, inner, s, tokens, c->k + unit, a == begin && t == 0 ? 0 : 1, dq + at);
                    }
                }
            }
        }
        free(weights);
        free(d_scores);
        free(inner);
    }
    return failed;
}
