/* Gradients of the rows of a table that a batch looked up, and Adam on just these: see penstock/ops/rows.py. */

#include "blas.h"

#define BITS 11
#define DIGITS (1 << BITS)

/* Sorts ids (count), all below `limit`, stably: sorted (count) and order (count), where each came from. Returns how
   many differ, or -1 if memory ran out. */
int64_t rows_sort(const int64_t *ids, int64_t count, int64_t limit, int32_t *sorted, int32_t *order) {
    int32_t *memory = malloc((size_t)count * 2 * sizeof(int32_t) + 1);
    if (!memory) return -1;
    int passes = 1;
    while (passes < 3 && limit > ((int64_t)1 << (BITS * passes))) passes++;
    int32_t *to_id = passes % 2 ? sorted : memory, *to_order = passes % 2 ? order : memory + count;
    int32_t *from_id = passes % 2 ? memory : sorted, *from_order = passes % 2 ? memory + count : order;
    for (int64_t i = 0; i < count; i++) from_id[i] = (int32_t)ids[i], from_order[i] = (int32_t)i;
    for (int pass = 0; pass < passes; pass++) {
        const int shift = BITS * pass, mask = pass == 2 ? -1 : DIGITS - 1;
        int64_t at[DIGITS] = {0}, sum = 0;
        for (int64_t i = 0; i < count; i++) at[(from_id[i] >> shift) & mask]++;
        for (int d = 0; d < DIGITS; d++) {
            const int64_t own = at[d];
            at[d] = sum;
            sum += own;
        }
        for (int64_t i = 0; i < count; i++) {
            const int64_t place = at[(from_id[i] >> shift) & mask]++;
            to_id[place] = from_id[i];
            to_order[place] = from_order[i];
        }
        int32_t *swap = to_id;
        to_id = from_id, from_id = swap;
        swap = to_order;
        to_order = from_order, from_order = swap;
    }
    free(memory);
    int64_t different = count > 0;
    for (int64_t i = 1; i < count; i++) different += sorted[i] != sorted[i - 1];
    return different;
}

/* the first place at or after `from` where a new id begins */
static int64_t boundary(const int32_t *sorted, int64_t count, int64_t from) {
    while (from > 0 && from < count && sorted[from] == sorted[from - 1]) from++;
    return from;
}

/* unique (U) and sums (U, width): the rows of grads (count, width), added up by id, in the order of `rows_sort` */
void rows_sum(const int32_t *sorted, const int32_t *order, const float *grads, int64_t count, int64_t width,
              int64_t *unique, float *sums, int threads) {
    enum { MOST = 64 };
    int64_t from[MOST + 1], first[MOST + 1];
    if (threads > MOST) threads = MOST;
    for (int t = 0; t <= threads; t++) from[t] = boundary(sorted, count, count * t / threads);
    first[0] = 0;
    for (int t = 0; t < threads; t++) {
        int64_t different = 0;
        for (int64_t i = from[t]; i < from[t + 1]; i++) different += i == from[t] || sorted[i] != sorted[i - 1];
        first[t + 1] = first[t] + different;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++) {
        int64_t u = first[t] - 1;
        for (int64_t i = from[t]; i < from[t + 1]; i++) {
            const float *grad = grads + order[i] * width;
            if (i + 8 < count) __builtin_prefetch(grads + order[i + 8] * width);
            if (i == from[t] || sorted[i] != sorted[i - 1]) {
                unique[++u] = sorted[i];
                memcpy(sums + u * width, grad, (size_t)width * sizeof(float));
            } else
                for (int64_t j = 0; j < width; j++) sums[u * width + j] += grad[j];
        }
    }
}

/* Adam (Kingma & Ba 2015) on rows (count) of a table and its moments, all of `width` columns. `rate` and `root` hold the
   corrections of the moments; `decay` is added to the gradient as decay p, `shrink` multiplies p beforehand. */
void rows_adam(const int64_t *rows, const float *grads, int64_t count, int64_t width, float *table, float *mean,
               float *square, float rate, float root, float beta1, float beta2, float epsilon, float decay, float shrink,
               int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t u = 0; u < count; u++) {
        if (u + 8 < count) {
            __builtin_prefetch(table + rows[u + 8] * width, 1);
            __builtin_prefetch(mean + rows[u + 8] * width, 1);
            __builtin_prefetch(square + rows[u + 8] * width, 1);
        }
        float *p = table + rows[u] * width, *m = mean + rows[u] * width, *s = square + rows[u] * width;
        const float *grad = grads + u * width;
        for (int64_t j = 0; j < width; j++) {
            const float g = grad[j] + decay * p[j];
            m[j] += (1 - beta1) * (g - m[j]);
            s[j] = beta2 * s[j] + (1 - beta2) * g * g;
            p[j] = shrink * p[j] - rate * m[j] / (sqrtf(s[j]) * root + epsilon);
        }
    }
}
