// Products of 16-row blocks in shared memory, with the accumulator of mma.m16n8k16: lane 4 g + q of a warp holds rows g
// and g + 8, columns 2 q and 2 q + 1 of every 16x8 block. float32 has the same owners and plain multiply-adds.
#pragma once
#include "device.cuh"

namespace lalora {
namespace cuda {

LALORA_DEVICE int lane_of() { return (int)(threadIdx.x % 32); }
LALORA_DEVICE int warp_of() { return (int)(threadIdx.x / 32); }

// 16 rows of a thin matrix (16, 8 NT): the right operand. add_transposed: c (16 columns of `wide`) += wide^T thin;
// add_product: c (16 rows of `wide`) += wide thin; wide is the 16x16 block at that address.
template <class T, int NT>
struct Thin {
    uint32_t b[NT][2];

    LALORA_MEMBER void load(const T* p, int stride) {
        const int l = lane_of();
#pragma unroll
        for (int k = 0; k < NT; k += 2) {
            uint32_t r[4];
            load_matrices_transposed(r, p + (l / 8 % 2 * 8 + l % 8) * stride + 8 * k + l / 16 * 8);
            b[k][0] = r[0], b[k][1] = r[1], b[k + 1][0] = r[2], b[k + 1][1] = r[3];
        }
    }
    LALORA_MEMBER void add_transposed(float (&c)[NT][4], const T* wide, int stride) const {
        const int l = lane_of();
        uint32_t a[4];
        load_matrices_transposed(a, wide + (l / 16 * 8 + l % 8) * stride + l / 8 % 2 * 8);
        add(c, a);
    }
    LALORA_MEMBER void add_product(float (&c)[NT][4], const T* wide, int stride) const {
        const int l = lane_of();
        uint32_t a[4];
        load_matrices(a, wide + (l / 8 % 2 * 8 + l % 8) * stride + l / 16 * 8);
        add(c, a);
    }
    LALORA_MEMBER void add(float (&c)[NT][4], const uint32_t (&a)[4]) const {
#pragma unroll
        for (int k = 0; k < NT; ++k) multiply(T{}, c[k], a, b[k][0], b[k][1]);
    }
};

template <int NT>
struct Thin<float, NT> {
    const float* p;
    int stride;

    LALORA_MEMBER void load(const float* from, int from_stride) { p = from, stride = from_stride; }
    LALORA_MEMBER void add_transposed(float (&c)[NT][4], const float* wide, int wide_stride) const {
        add(c, wide, 1, wide_stride);
    }
    LALORA_MEMBER void add_product(float (&c)[NT][4], const float* wide, int wide_stride) const {
        add(c, wide, wide_stride, 1);
    }
    LALORA_MEMBER void add(float (&c)[NT][4], const float* a, int row, int inner) const {
        const int g = lane_of() / 4, q = lane_of() % 4;
#pragma unroll 4
        for (int k = 0; k < 16; ++k) {
            const float a0 = a[g * row + k * inner], a1 = a[(g + 8) * row + k * inner];
#pragma unroll
            for (int j = 0; j < NT; ++j) {
                const float b0 = p[k * stride + 8 * j + 2 * q], b1 = p[k * stride + 8 * j + 2 * q + 1];
                c[j][0] += a0 * b0, c[j][1] += a0 * b1, c[j][2] += a1 * b0, c[j][3] += a1 * b1;
            }
        }
    }
};

// (rows, columns) of global memory to shared memory, zeros beyond `valid_rows` and `valid_columns`; a warp takes every
// kWarps-th row. 16 bytes at a time where rows lie so.
template <class T, int kWarps>
LALORA_DEVICE void copy_rows(T* to, int to_stride, const T* from, int64_t from_stride, int rows, int columns,
                             int valid_rows, int valid_columns) {
    constexpr int kVector = 16 / (int)sizeof(T);
    const bool wide = (uintptr_t)from % 16 == 0 && from_stride % kVector == 0 && valid_columns % kVector == 0;
#pragma unroll 1
    for (int row = warp_of(); row < rows; row += kWarps) {
        const T* source = from + row * from_stride;
        T* target = to + row * to_stride;
        const int end = row < valid_rows ? valid_columns : 0;
        if (wide) {
#pragma unroll 2
            for (int column = lane_of() * kVector; column < columns; column += 32 * kVector)
                copy_async(target + column, column < end ? source + column : from, column < end);
        } else {
#pragma unroll 1
            for (int column = lane_of(); column < columns; column += 32) {
                T v = {};
                if (column < end) v = source[column];
                target[column] = v;
            }
        }
    }
}

}  // namespace cuda
}  // namespace lalora
