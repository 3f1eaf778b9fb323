/* The chunk form of gated linear attention in float32: see penstock/ops/chunked_gla.py.

   One thread takes a head of a sequence from piece to piece, so that all it works on stays in its cache. With b the sum
   of log gates in the piece, r half of its end, and T = e^r S the entering state as it is read:

       q' = q e^(b - r)    k' = k e^(r - b)    A = lower triangle of q' k'^T
       o = scale (A V + q' T)    S' = e^(b_end - r) (T + k'^T V)

   A piece is a chunk, or, where the gates are so strong that these factors might overflow, the largest half, quarter
   ... of one in which they do not; a single token takes r = b and is safe with any gate. */

#include "blas.h"

typedef struct {
    gemm_t gemm;
    const float *q, *k, *v, *g;    /* (tokens, H, K or V), tokens of all sequences one after the other */
    const int64_t *bounds;         /* where each sequence begins, and the end */
    const int64_t *chunks;         /* the number of its first chunk, and of all */
    int64_t sequences, heads, width, values, chunk, threads;
    float scale, gentle;           /* the nats that half a piece's decay may reach */
} Call;

enum { DONE, NO_MEMORY };
#define MOST_PIECES 1024 /* tokens a chunk has at most */

/* A thread's workplace for one piece; matrices are (tokens, K or V), dense. The entering states of a chunk's pieces are
   for the backward pass. */
typedef struct {
    float *scale, *q, *k, *map, *d_map, *dq, *dk, *db, *state, *leaving, *in, *out, *entering, *memory;
} Place;

static int make(const Call *c, Place *p, int backward) {
    const int64_t cell = c->chunk * c->width, map = c->chunk * c->chunk, state = c->width * c->values;
    float *at = p->memory = room(6 * cell + 2 * map + (2 + (backward ? c->chunk : 0)) * state + 2 * c->width);
    if (!at) return NO_MEMORY;
    float **cells[] = {&p->scale, &p->q, &p->k, &p->dq, &p->dk, &p->db};
    for (int i = 0; i < 6; i++, at += cell) *cells[i] = at;
    p->map = at;
    p->d_map = at += map;
    p->state = at += map;
    p->leaving = at += state;
    p->in = at += state;
    p->out = at += c->width;
    p->entering = at + c->width;
    return DONE;
}

/* Get q', k', e^(b - r), e^r and e^(b_end - r) of the next tokens ready: as many as can be taken at once, at most
   `rows`; returns how many. */
static int load(const Call *c, Place *p, const float *q, const float *k, const float *g, int rows) {
    const int width = (int)c->width;
    const int64_t stride = c->heads * c->width;
    float *b = p->scale, *half = p->in;
    memcpy(b, g, (size_t)width * sizeof(float));
    for (int t = 1; t < rows; t++)
#pragma omp simd
        for (int d = 0; d < width; d++) b[t * width + d] = b[(t - 1) * width + d] + g[t * stride + d];
    for (; rows > 1; rows = (rows + 1) / 2) {
        float lowest = 0;
        for (int d = 0; d < width; d++) {
            half[d] = b[(rows - 1) * width + d] * 0.5f;
            lowest = half[d] < lowest ? half[d] : lowest;
        }
        if (lowest >= -c->gentle) break;
    }
    if (rows == 1) {
        for (int d = 0; d < width; d++) {
            p->in[d] = exp2_held(g[d] * LOG2E);
            p->out[d] = b[d] = 1;
            p->q[d] = q[d];
            p->k[d] = k[d];
        }
        return rows;
    }
    for (int t = 0; t < rows; t++)
#pragma omp simd
        for (int d = 0; d < width; d++) {
            const float e = exp2_held((b[t * width + d] - half[d]) * LOG2E);
            p->q[t * width + d] = q[t * stride + d] * e;
            p->k[t * width + d] = k[t * stride + d] / e;
            b[t * width + d] = e;
        }
    for (int d = 0; d < width; d++) p->out[d] = half[d] = exp2_held(half[d] * LOG2E);
    return rows;
}

static void scale_rows(float *matrix, const float *by, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; i++)
#pragma omp simd
        for (int64_t j = 0; j < columns; j++) matrix[i * columns + j] *= by[i];
}

static void lower_triangle(float *map, int rows) {
    for (int i = 0; i < rows; i++) memset(map + (int64_t)i * rows + i + 1, 0, (size_t)(rows - 1 - i) * sizeof(float));
}

/* out (tokens, H, V), finals (sequences, H, K, V) from initial or null, and if not null the states that entered the
   chunks, (chunks, H, K, V) */
int gla_forward(const Call *c, const float *initial, float *out, float *finals, float *states) {
    const int width = (int)c->width, values = (int)c->values;
    const int64_t state = c->width * c->values;
    int outcome = DONE;
#pragma omp parallel num_threads(c->threads)
    {
        Place p;
        const int made = make(c, &p, 0);
        if (made != DONE) {
#pragma omp atomic write
            outcome = made;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < c->sequences * c->heads; task++) {
            const int64_t sequence = task / c->heads, head = task % c->heads, end = c->bounds[sequence + 1];
            int64_t number = c->chunks[sequence];
            float *s = p.state;
            if (outcome != DONE) continue;
            if (initial)
                memcpy(s, initial + task * state, (size_t)state * sizeof(float));
            else
                memset(s, 0, (size_t)state * sizeof(float));
            for (int64_t from = c->bounds[sequence], rows, left = 0; from < end; from += rows, left -= rows) {
                if (!left) { /* a chunk begins */
                    if (states) memcpy(states + (number * c->heads + head) * state, s, (size_t)state * sizeof(float));
                    left = end - from < c->chunk ? end - from : c->chunk;
                    number++;
                }
                const int64_t at = (from * c->heads + head) * width, to = (from * c->heads + head) * values;
                const float *v = c->v + to;
                const int stride = (int)c->heads * values;
                rows = load(c, &p, c->q + at, c->k + at, c->g + at, (int)left);
                scale_rows(s, p.in, width, values);
                product(c->gemm, 0, 1, (int)rows, (int)rows, width, c->scale, p.q, width, p.k, width, 0, p.map, (int)rows);
                lower_triangle(p.map, (int)rows);
                product(c->gemm, 0, 0, (int)rows, values, width, c->scale, p.q, width, s, values, 0, out + to, stride);
                product(c->gemm, 0, 0, (int)rows, values, (int)rows, 1, p.map, (int)rows, v, stride, 1, out + to, stride);
                product(c->gemm, 1, 0, width, values, (int)rows, 1, p.k, width, v, stride, 1, s, values);
                scale_rows(s, p.out, width, values);
            }
            memcpy(finals + task * state, s, (size_t)state * sizeof(float));
        }
        free(p.memory);
    }
    return outcome;
}

/* Gradients of q, k, v, g and the initial states, from those of the output and (or null) of the final states. */
int gla_backward(const Call *c, const float *states, const float *finals, const float *grad, const float *grad_final,
                 float *dq, float *dk, float *dv, float *dg, float *d_initial) {
    const int width = (int)c->width, values = (int)c->values;
    const int64_t state = c->width * c->values, wide = c->heads * c->width;
    int outcome = DONE;
#pragma omp parallel num_threads(c->threads)
    {
        Place p;
        const int made = make(c, &p, 1);
        if (made != DONE) {
#pragma omp atomic write
            outcome = made;
        }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < c->sequences * c->heads; task++) {
            const int64_t sequence = task / c->heads, head = task % c->heads;
            const int64_t begin = c->bounds[sequence], end = c->bounds[sequence + 1];
            float *s = p.state, *l = p.leaving;
            if (outcome != DONE) continue;
            if (grad_final)
                memcpy(l, grad_final + task * state, (size_t)state * sizeof(float));
            else
                memset(l, 0, (size_t)state * sizeof(float));
            const float *left = finals + task * state; /* the state that leaves the chunk */
            for (int64_t number = c->chunks[sequence + 1] - 1; number >= c->chunks[sequence]; number--) {
                const int64_t first = begin + (number - c->chunks[sequence]) * c->chunk;
                const int64_t past = first + c->chunk < end ? first + c->chunk : end;
                const float *entered = states + (number * c->heads + head) * state;
                int pieces = 0;
                int64_t starts[MOST_PIECES];
                /* Forward through the chunk again, to the states that entered its pieces. */
                for (int64_t from = first, rows; from < past; from += rows) {
                    const int64_t at = (from * c->heads + head) * width, to = (from * c->heads + head) * values;
                    float *next = p.entering + pieces * state;
                    if (!pieces) memcpy(next, entered, (size_t)state * sizeof(float));
                    starts[pieces++] = from;
                    rows = load(c, &p, c->q + at, c->k + at, c->g + at, (int)(past - from));
                    if (from + rows == past) break; /* what leaves the last is known */
                    memcpy(next + state, next, (size_t)state * sizeof(float));
                    scale_rows(next + state, p.in, width, values);
                    product(c->gemm, 1, 0, width, values, (int)rows, 1, p.k, width, c->v + to, (int)c->heads * values, 1,
                            next + state, values);
                    scale_rows(next + state, p.out, width, values);
                }
                for (int piece = pieces - 1; piece >= 0; piece--) {
                    const int64_t from = starts[piece], to_end = (piece + 1 < pieces ? starts[piece + 1] : past) - from;
                    const int64_t at = (from * c->heads + head) * width, to = (from * c->heads + head) * values;
                    const float *v = c->v + to, *o = grad + to;
                    const int stride = (int)c->heads * values;
                    const int rows = pieces == 1 ? (int)to_end : load(c, &p, c->q + at, c->k + at, c->g + at, (int)to_end);
                    /* the last token's b, through the state */
                    float *db = p.db, *last = db + (rows - 1) * width;
                    for (int d = 0; d < width; d++) {
                        float total = 0;
    #pragma omp simd reduction(+ : total)
                        for (int j = 0; j < values; j++) total += l[d * values + j] * left[d * values + j];
                        last[d] = total;
                    }
                    const float *before = p.entering + piece * state;
                    memcpy(s, before, (size_t)state * sizeof(float));
                    scale_rows(s, p.in, width, values);
                    scale_rows(l, p.out, width, values);
                    product(c->gemm, 0, 1, rows, rows, width, c->scale, p.q, width, p.k, width, 0, p.map, rows);
                    lower_triangle(p.map, rows);
                    product(c->gemm, 1, 0, rows, values, rows, 1, p.map, rows, o, stride, 0, dv + to, stride);
                    product(c->gemm, 0, 0, rows, values, width, 1, p.k, width, l, values, 1, dv + to, stride);
                    product(c->gemm, 0, 1, rows, rows, values, c->scale, o, stride, v, stride, 0, p.d_map, rows);
                    lower_triangle(p.d_map, rows);
                    product(c->gemm, 0, 1, rows, width, values, c->scale, o, stride, s, values, 0, p.dq, width);
                    product(c->gemm, 0, 0, rows, width, rows, 1, p.d_map, rows, p.k, width, 1, p.dq, width);
                    product(c->gemm, 0, 1, rows, width, values, 1, v, stride, l, values, 0, p.dk, width);
                    product(c->gemm, 1, 0, rows, width, rows, 1, p.d_map, rows, p.q, width, 1, p.dk, width);
                    product(c->gemm, 1, 0, width, values, rows, c->scale, p.q, width, o, stride, 1, l, values);
                    scale_rows(l, p.in, width, values);
                    for (int t = rows - 1; t >= 0; t--) {
                        const float *after = t + 1 < rows ? db + (t + 1) * width : NULL;
                        float *q = dq + at + t * wide, *k = dk + at + t * wide, *g = dg + at + t * wide;
    #pragma omp simd
                        for (int d = 0; d < width; d++) {
                            const int i = t * width + d;
                            const float own = p.q[i] * p.dq[i] - p.k[i] * p.dk[i];
                            const float total = own + (after ? after[d] : last[d]);
                            db[i] = total;
                            g[d] = total;
                            q[d] = p.dq[i] * p.scale[i];
                            k[d] = p.dk[i] / p.scale[i];
                        }
                    }
                    left = piece ? before : entered;
                }
            }
            memcpy(d_initial + task * state, l, (size_t)state * sizeof(float));
        }
        free(p.memory);
    }
    return outcome;
}
