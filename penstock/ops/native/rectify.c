/* Bias, ReLU and dropout in one pass over a layer's products, and back: see penstock/ops/rectified_linear.py.

   A number is kept if a hash of the seed, its row and its column is not below a threshold, so that what is drawn does
   not depend on the number of threads. Nothing but the output is kept for the way back: it is zero wherever the ReLU
   or the dropout let nothing through. */

#include "blas.h"

static inline uint64_t mixed64(uint64_t x) {
    x += 0x9E3779B97F4A7C15u; /* splitmix64 (Steele, Lea & Flood 2014) */
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

/* y (rows, width) in place: (y + bias), rectified, and with dropout kept above the threshold and scaled */
void rectify_forward(float *y, const float *bias, int64_t rows, int64_t width, uint64_t seed, uint32_t threshold,
                     float scale, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < rows; i++) {
        float *row = y + i * width;
        if (threshold) {
            const uint64_t key = mixed64(seed ^ mixed64((uint64_t)i));
            const uint32_t first = (uint32_t)key, second = (uint32_t)(key >> 32);
            for (int64_t j = 0; j < width; j++) {
                uint32_t r = (uint32_t)j * 0x9E3779B9u + first;
                r = (r ^ (r >> 16)) * 0x7FEB352Du ^ second;
                r = (r ^ (r >> 15)) * 0x846CA68Bu;
                r ^= r >> 16;
                const float x = (row[j] + bias[j]) * scale;
                row[j] = r >= threshold && x > 0 ? x : (x != x ? x : 0);
            }
        } else
            for (int64_t j = 0; j < width; j++) {
                const float x = row[j] + bias[j];
                row[j] = x > 0 ? x : (x != x ? x : 0); /* NaN goes through, as in PyTorch */
            }
    }
}

/* out = scale grad where y > 0, else 0; its sum over rows goes to bias_grad; nonzero if memory ran out */
int rectify_backward(const float *grad, const float *y, float *out, float *bias_grad, int64_t rows, int64_t width,
                     float scale, int threads) {
    int failed = 0;
    memset(bias_grad, 0, (size_t)width * sizeof(float));
#pragma omp parallel num_threads(threads)
    {
        float *sum = room(width);
        if (sum) {
            memset(sum, 0, (size_t)width * sizeof(float));
#pragma omp for schedule(static)
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < width; j++) {
                    const float g = y[i * width + j] > 0 ? grad[i * width + j] * scale : 0;
                    out[i * width + j] = g;
                    sum[j] += g;
                }
#pragma omp critical
            for (int64_t j = 0; j < width; j++) bias_grad[j] += sum[j];
            free(sum);
        } else {
#pragma omp atomic write
            failed = 1;
        }
    }
    return failed;
}
