/* What the kernels share: the BLAS that PyTorch brings, called by one thread each, and a vectorisable exponential. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* sgemm_, which thinks in columns */
typedef void (*gemm_t)(const char *, const char *, const int *, const int *, const int *, const float *, const float *,
                       const int *, const float *, const int *, const float *, float *, const int *);

/* out (rows x columns) = beta out + alpha a b, the transposed flags saying how a and b lie; strides are of rows */
static inline void product(gemm_t gemm, int a_transposed, int b_transposed, int rows, int columns, int inner, float alpha,
                           const float *a, int a_stride, const float *b, int b_stride, float beta, float *out,
                           int out_stride) {
    gemm(b_transposed ? "T" : "N", a_transposed ? "T" : "N", &columns, &rows, &inner, &alpha, b, &b_stride, a, &a_stride,
         &beta, out, &out_stride);
}

#define LOG2E 1.44269504088896341f

/* 2^x for x <= 126, held at -126 from below: 2^n times a polynomial in the rest, relative error below 2e-7 */
static inline float exp2_below(float x) {
    x = x > -126.0f ? x : -126.0f;
    const float n = rintf(x), r = x - n;
    float p = 1.54035304e-4f;
    p = fmaf(p, r, 1.33335581e-3f);
    p = fmaf(p, r, 9.61812911e-3f);
    p = fmaf(p, r, 5.55041087e-2f);
    p = fmaf(p, r, 2.40226507e-1f);
    p = fmaf(p, r, 6.93147181e-1f);
    p = fmaf(p, r, 1.0f);
    const int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}

/* 2^x, x held within -126 and 126 */
static inline float exp2_held(float x) { return exp2_below(x < 126.0f ? x : 126.0f); }

/* memory for a thread's own numbers, or null */
static inline float *room(int64_t floats) {
    void *p = NULL;
    return posix_memalign(&p, 64, (size_t)floats * sizeof(float)) ? NULL : p;
}
