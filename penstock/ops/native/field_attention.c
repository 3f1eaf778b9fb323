/* Attention between the fields of a row, in float32: see penstock/ops/field_attention.py.

   Rows are few vectors each, and many: a thread takes as many samples at once as stay in its cache and does everything
   on them, products with weights for all together and products between fields for each sample and head. The way back
   computes the weights of attention again. Each thread adds up gradients of the weights for itself. */

#include "blas.h"

typedef struct {
    gemm_t gemm;
    const float *x;     /* (B, M, I) */
    const float *query; /* (I, H w), scaled */
    const float *key;   /* (I, H w); null: the fields themselves are the keys, w = I */
    const float *value; /* (I, D) */
    const float *residual; /* (I, D); null: none, or the fields themselves */
    int64_t samples, fields, input, width, heads, key_width, late, identity, rectify, threads;
} Call;

#define ROWS 256 /* vectors at once, about */

typedef struct {
    float *q, *k, *v, *z, *p, *dq, *dk, *dv, *dz, *dp, *du, *top;
} Room;

static int64_t chunk_of(const Call *c) { return c->fields >= ROWS ? 1 : ROWS / c->fields; }

/* rows of weights times vectors: out (rows, columns) = beta out + x (rows, inner) w (inner, columns) */
static void map(const Call *c, int rows, const float *x, int inner, int x_stride, const float *w, int columns,
                int w_stride, float beta, float *out, int out_stride) {
    product(c->gemm, 0, 0, rows, columns, inner, 1, x, x_stride, w, w_stride, beta, out, out_stride);
}

/* the way back to the input: out (rows, inner) = beta out + g (rows, columns) w^T */
static void unmap(const Call *c, int rows, const float *g, int columns, int g_stride, const float *w, int inner,
                  int w_stride, float beta, float *out, int out_stride) {
    product(c->gemm, 0, 1, rows, inner, columns, 1, g, g_stride, w, w_stride, beta, out, out_stride);
}

/* the way back to the weights: out (inner, columns) += x^T g */
static void gather(const Call *c, int rows, const float *x, int inner, int x_stride, const float *g, int columns,
                   int g_stride, float *out, int out_stride) {
    product(c->gemm, 1, 0, inner, columns, rows, 1, x, x_stride, g, g_stride, 1, out, out_stride);
}

/* softmax of each row of p (fields, fields), in place */
static void softmax(float *p, int fields) {
    for (int i = 0; i < fields; i++) {
        float *row = p + i * fields, top = row[0], sum = 0;
        for (int j = 1; j < fields; j++) top = row[j] > top ? row[j] : top;
        for (int j = 0; j < fields; j++) {
            row[j] = exp2_below((row[j] - top) * LOG2E);
            sum += row[j];
        }
        const float part = 1 / sum;
        for (int j = 0; j < fields; j++) row[j] *= part;
    }
}

/* Queries, keys and values of some samples; keys and values may be the fields themselves. */
static void project(const Call *c, Room *m, const float *x, int rows) {
    const int input = (int)c->input, keys = (int)(c->heads * c->key_width), width = (int)c->width;
    map(c, rows, x, input, input, c->query, keys, keys, 0, m->q, keys);
    if (c->key) map(c, rows, x, input, input, c->key, keys, keys, 0, m->k, keys);
    if (!c->late) map(c, rows, x, input, input, c->value, width, width, 0, m->v, width);
}

typedef struct {
    const float *q, *k, *v;
    int q_stride, k_stride, v_stride, z_stride, width, at_z;
} Head;

/* Where sample s finds its vectors of head h. */
static Head head(const Call *c, const Room *m, const float *x, int64_t s, int64_t h) {
    const int input = (int)c->input, keys = (int)(c->heads * c->key_width), each = (int)(c->width / c->heads);
    const int64_t first = s * c->fields;
    Head o;
    o.width = c->late ? input : each;
    o.z_stride = (int)c->heads * o.width;
    o.at_z = (int)(first * o.z_stride + h * o.width);
    o.q = m->q + first * keys + h * c->key_width, o.q_stride = keys;
    o.k = c->key ? m->k + first * keys + h * c->key_width : x + first * input, o.k_stride = c->key ? keys : input;
    o.v = c->late ? x + first * input : m->v + first * c->width + h * each, o.v_stride = c->late ? input : (int)c->width;
    return o;
}

static void weights(const Call *c, const Head *o, float *p) {
    const int fields = (int)c->fields;
    product(c->gemm, 0, 1, fields, fields, (int)c->key_width, 1, o->q, o->q_stride, o->k, o->k_stride, 0, p, fields);
    softmax(p, fields);
}

/* memory for one thread; nonzero if there is none */
static int open_room(const Call *c, Room *m, int back) {
    const int64_t rows = chunk_of(c) * c->fields, keys = rows * c->heads * c->key_width, own = rows * c->width;
    const int64_t mixed = rows * (c->late ? c->heads * c->input : c->width), square = c->fields * c->fields;
    memset(m, 0, sizeof *m);
    int bad = !(m->q = room(keys)) || !(m->z = room(mixed)) || !(m->p = room(square));
    bad = bad || !(m->k = room(c->key ? keys : 1)) || !(m->v = room(c->late ? 1 : own));
    if (back) {
        bad = bad || !(m->dq = room(keys)) || !(m->dk = room(c->key ? keys : 1)) || !(m->dp = room(square));
        bad = bad || !(m->dv = room(c->late ? 1 : own)) || !(m->dz = room(mixed)) || !(m->du = room(own));
    }
    return bad;
}

static void close_room(Room *m) {
    free(m->q), free(m->k), free(m->v), free(m->z), free(m->p), free(m->dq), free(m->dk), free(m->dv), free(m->dz);
    free(m->dp), free(m->du);
}

/* out (B, M, D); returns nonzero if memory ran out */
int field_attention_forward(const Call *c, float *out) {
    const int64_t step = chunk_of(c), chunks = (c->samples + step - 1) / step;
    const int input = (int)c->input, width = (int)c->width, fields = (int)c->fields, each = (int)(width / c->heads);
    int failed = 0;
#pragma omp parallel num_threads(c->threads)
    {
        Room m;
        if (open_room(c, &m, 0)) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
#pragma omp for schedule(dynamic, 4)
            for (int64_t t = 0; t < chunks; t++) {
                const int64_t first = t * step, count = first + step > c->samples ? c->samples - first : step;
                const int rows = (int)(count * fields);
                const float *x = c->x + first * fields * input;
                float *y = out + first * fields * width;
                project(c, &m, x, rows);
                for (int64_t s = 0; s < count; s++)
                    for (int64_t h = 0; h < c->heads; h++) {
                        const Head o = head(c, &m, x, s, h);
                        float *z = (c->late ? m.z : y) + o.at_z;
                        weights(c, &o, m.p);
                        map(c, fields, m.p, fields, fields, o.v, o.width, o.v_stride, 0, z, o.z_stride);
                    }
                for (int64_t h = 0; c->late && h < c->heads; h++)
                    map(c, rows, m.z + h * input, input, (int)c->heads * input, c->value + h * each, each, width, 0,
                        y + h * each, width);
                if (c->residual) map(c, rows, x, input, input, c->residual, width, width, 1, y, width);
                for (int64_t i = 0; i < (int64_t)rows * width; i++) {
                    const float u = c->identity ? y[i] + x[i] : y[i];
                    y[i] = c->rectify && u < 0 ? 0 : u;
                }
            }
        }
        close_room(&m);
    }
    return failed;
}

/* dx (B, M, I), and dquery, dkey, dvalue, dresidual, which hold zeros; returns nonzero if memory ran out */
int field_attention_backward(const Call *c, const float *out, const float *grad, float *dx, float *dquery, float *dkey,
                             float *dvalue, float *dresidual) {
    const int64_t step = chunk_of(c), chunks = (c->samples + step - 1) / step;
    const int input = (int)c->input, width = (int)c->width, fields = (int)c->fields, each = (int)(width / c->heads);
    const int keys = (int)(c->heads * c->key_width), mixed = (int)c->heads * input;
    const int64_t of_query = (int64_t)input * keys, of_value = (int64_t)input * width;
    int failed = 0;
#pragma omp parallel num_threads(c->threads)
    {
        Room m;
        float *sums = room(2 * of_query + 2 * of_value);
        if (open_room(c, &m, 1) || !sums) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
            float *sq = sums, *sk = sq + of_query, *sv = sk + of_query, *sr = sv + of_value;
            memset(sums, 0, (size_t)(2 * of_query + 2 * of_value) * sizeof(float));
#pragma omp for schedule(dynamic, 4)
            for (int64_t t = 0; t < chunks; t++) {
                const int64_t first = t * step, count = first + step > c->samples ? c->samples - first : step;
                const int rows = (int)(count * fields);
                const float *x = c->x + first * fields * input, *y = out + first * fields * width;
                const float *g = grad + first * fields * width;
                float *d = dx + first * fields * input;
                project(c, &m, x, rows);
                for (int64_t i = 0; i < (int64_t)rows * width; i++) m.du[i] = c->rectify && !(y[i] > 0) ? 0 : g[i];
                if (c->identity)
                    memcpy(d, m.du, (size_t)rows * width * sizeof(float));
                else if (c->residual) {
                    unmap(c, rows, m.du, width, width, c->residual, input, width, 0, d, input);
                    gather(c, rows, x, input, input, m.du, width, width, sr, width);
                } else
                    memset(d, 0, (size_t)rows * input * sizeof(float));
                for (int64_t h = 0; c->late && h < c->heads; h++)
                    unmap(c, rows, m.du + h * each, each, width, c->value + h * each, input, width, 0, m.dz + h * input,
                          mixed);
                const float *dz_all = c->late ? m.dz : m.du;
                for (int64_t s = 0; s < count; s++)
                    for (int64_t h = 0; h < c->heads; h++) {
                        const Head o = head(c, &m, x, s, h);
                        const int64_t at = s * fields;
                        const float *dz = dz_all + o.at_z;
                        float *dv = c->late ? d + at * input : m.dv + at * width + h * each;
                        float *dk = c->key ? m.dk + at * keys + h * c->key_width : d + at * input;
                        weights(c, &o, m.p);
                        if (c->late)
                            map(c, fields, m.p, fields, fields, o.v, o.width, o.v_stride, 0, m.z + o.at_z, o.z_stride);
                        product(c->gemm, 0, 1, fields, fields, o.width, 1, dz, o.z_stride, o.v, o.v_stride, 0, m.dp,
                                fields);
                        product(c->gemm, 1, 0, fields, o.width, fields, 1, m.p, fields, dz, o.z_stride,
                                c->late ? 1 : 0, dv, c->late ? input : width);
                        for (int i = 0; i < fields; i++) {
                            const float *p = m.p + i * fields;
                            float *dp = m.dp + i * fields, sum = 0;
                            for (int j = 0; j < fields; j++) sum += p[j] * dp[j];
                            for (int j = 0; j < fields; j++) dp[j] = p[j] * (dp[j] - sum);
                        }
                        map(c, fields, m.dp, fields, fields, o.k, (int)c->key_width, o.k_stride, 0,
                            m.dq + at * keys + h * c->key_width, keys);
                        product(c->gemm, 1, 0, fields, (int)c->key_width, fields, 1, m.dp, fields, o.q, o.q_stride,
                                c->key ? 0 : 1, dk, c->key ? keys : input);
                    }
                if (c->late)
                    for (int64_t h = 0; h < c->heads; h++)
                        gather(c, rows, m.z + h * input, input, mixed, m.du + h * each, each, width, sv + h * each,
                               width);
                else {
                    unmap(c, rows, m.dv, width, width, c->value, input, width, 1, d, input);
                    gather(c, rows, x, input, input, m.dv, width, width, sv, width);
                }
                unmap(c, rows, m.dq, keys, keys, c->query, input, keys, 1, d, input);
                gather(c, rows, x, input, input, m.dq, keys, keys, sq, keys);
                if (c->key) {
                    unmap(c, rows, m.dk, keys, keys, c->key, input, keys, 1, d, input);
                    gather(c, rows, x, input, input, m.dk, keys, keys, sk, keys);
                }
            }
#pragma omp critical
            {
                for (int64_t i = 0; i < of_query; i++) dquery[i] += sq[i];
                for (int64_t i = 0; c->key && i < of_query; i++) dkey[i] += sk[i];
                for (int64_t i = 0; i < of_value; i++) dvalue[i] += sv[i];
                for (int64_t i = 0; c->residual && i < of_value; i++) dresidual[i] += sr[i];
            }
        }
        close_room(&m);
        free(sums);
    }
    return failed;
}
