// Products of 16-row blocks in shared memory, with the accumulator of mma.m16n8k16: lane 4 g + q of a warp holds rows g
// and g + 8, columns 2 q and 2 q + 1 of every 16x8 block. float32 has the same owners and plain multiply-adds.
#pragma once
#include "device.cuh"

namespace lalora {
namespace cuda {

LALORA_DEVICE int lane_of() { return (int)(threadIdx.x % 32); }
LALORA_DEVICE int warp_of() { return (int)(threadIdx.x / 32); }

// A matrix in shared memory as this lane sees it: where it reads of a 16x16 block of `wide` (as it is, or transposed) or
// of 16 rows of `thin`. What is computed once is not computed at every block.
template <class T>
struct View {
    Place place;
    int stride;  // of rows, in elements

    LALORA_MEMBER static View rows(const T* p, int stride) {
        const int l = lane_of();
        return {place_of(p + (l / 8 % 2 * 8 + l % 8) * stride + l / 16 * 8), stride};
    }
    LALORA_MEMBER static View transposed(const T* p, int stride) {
        const int l = lane_of();
        return {place_of(p + (l / 16 * 8 + l % 8) * stride + l / 8 % 2 * 8), stride};
    }
    LALORA_MEMBER View operator+(int elements) const { return {place + elements * (int)sizeof(T), stride}; }
};
template <>
struct View<float> {
    const float* place;
    int stride;

    LALORA_MEMBER static View rows(const float* p, int stride) { return {p, stride}; }
    LALORA_MEMBER static View transposed(const float* p, int stride) { return {p, stride}; }
    LALORA_MEMBER View operator+(int elements) const { return {place + elements, stride}; }
};

// 16 rows of a thin matrix (16, 8 NT): the right operand. add_transposed: c (16 columns of `wide`) += wide^T thin;
// add_product: c (16 rows of `wide`) += wide thin.
template <class T, int NT>
struct Thin {
    uint32_t b[NT][2];

    LALORA_MEMBER void load(const View<T>& thin) {
#pragma unroll
        for (int k = 0; k < NT; k += 2) {
            uint32_t r[4];
            load_matrices_transposed(r, (thin + 8 * k).place);
            b[k][0] = r[0], b[k][1] = r[1], b[k + 1][0] = r[2], b[k + 1][1] = r[3];
        }
    }
    // kMany blocks of `wide`, `apart` elements from one to the next, of which the first `count` are there. All are loaded
    // before the first product waits for one.
    template <int kMany>
    LALORA_MEMBER void add_transposed(float (&c)[kMany][NT][4], const View<T>& wide, int apart, int count) const {
        uint32_t a[kMany][4];
#pragma unroll
        for (int j = 0; j < kMany; ++j)
            if (j < count) load_matrices_transposed(a[j], (wide + apart * j).place);
#pragma unroll
        for (int j = 0; j < kMany; ++j)
            if (j < count) add(c[j], a[j]);
    }
    LALORA_MEMBER void add_product(float (&c)[NT][4], const View<T>& wide) const {
        uint32_t a[4];
        load_matrices(a, wide.place);
        add(c, a);
    }
    LALORA_MEMBER void add(float (&c)[NT][4], const uint32_t (&a)[4]) const {
#pragma unroll
        for (int k = 0; k < NT; ++k) multiply(T{}, c[k], a, b[k][0], b[k][1]);
    }
};

template <int NT>
struct Thin<float, NT> {
    View<float> thin;

    LALORA_MEMBER void load(const View<float>& from) { thin = from; }
    template <int kMany>
    LALORA_MEMBER void add_transposed(float (&c)[kMany][NT][4], const View<float>& wide, int apart, int count) const {
#pragma unroll
        for (int j = 0; j < kMany; ++j)
            if (j < count) add(c[j], (wide + apart * j).place, 1, wide.stride);
    }
    LALORA_MEMBER void add_product(float (&c)[NT][4], const View<float>& wide) const {
        add(c, wide.place, wide.stride, 1);
    }
    LALORA_MEMBER void add(float (&c)[NT][4], const float* a, int row, int inner) const {
        const int g = lane_of() / 4, q = lane_of() % 4;
        [[maybe_unused]] constexpr int kAhead = NT < 4 ? 4 : 2;  // registers
#pragma unroll kAhead
        for (int k = 0; k < 16; ++k) {
            const float a0 = a[g * row + k * inner], a1 = a[(g + 8) * row + k * inner];
            const float* b = thin.place + k * thin.stride + 2 * q;
#pragma unroll
            for (int j = 0; j < NT; ++j) {
                c[j][0] += a0 * b[8 * j], c[j][1] += a0 * b[8 * j + 1];
                c[j][2] += a1 * b[8 * j], c[j][3] += a1 * b[8 * j + 1];
            }
        }
    }
};

// Whether every row of samples and positions can be read 16 bytes at a time.
template <class T>
LALORA_DEVICE bool lies_in_vectors(const T* p, int64_t sample_stride, int64_t row_stride, int columns) {
    constexpr int kVector = 16 / (int)sizeof(T);
    return (uintptr_t)p % 16 == 0 && (sample_stride | row_stride | columns) % kVector == 0;
}

// (rows, columns) of global memory to shared memory, zeros beyond `valid_rows` and `valid_columns`; a warp takes every
// kWarps-th row.
template <class T, int kWarps>
LALORA_DEVICE void copy_rows(T* to, int to_stride, const T* from, int64_t from_stride, int rows, int columns,
                             int valid_rows, int valid_columns, bool in_vectors) {
    constexpr int kVector = 16 / (int)sizeof(T);
    if (in_vectors) {
        const int first = lane_of() * kVector;
        const T* source = from + warp_of() * from_stride + first;
        T* target = to + warp_of() * to_stride + first;
#pragma unroll 2
        for (int row = warp_of(); row < rows; row += kWarps) {
            const int end = row < valid_rows ? valid_columns : 0;
#pragma unroll 4
            for (int column = 0; column < columns - first; column += 32 * kVector)
                copy_async(target + column, column < end - first ? source + column : from, column < end - first);
            source += kWarps * from_stride, target += kWarps * to_stride;
        }
        return;
    }
#pragma unroll 1
    for (int row = warp_of(); row < rows; row += kWarps) {
        const T* source = from + row * from_stride;
        T* target = to + row * to_stride;
        const int end = row < valid_rows ? valid_columns : 0;
#pragma unroll 1
        for (int column = lane_of(); column < columns; column += 32) {
            T v = {};
            if (column < end) v = source[column];
            target[column] = v;
        }
    }
}

// The same of rows of kColumns, which are few: all threads at once.
template <class T, int kThreads, int kColumns>
LALORA_DEVICE void copy_thin(T* to, int to_stride, const T* from, int64_t from_stride, int rows, int valid_rows,
                             int valid_columns) {
    constexpr int kVector = 16 / (int)sizeof(T), kVectors = kColumns / kVector;
    if ((uintptr_t)from % 16 == 0 && from_stride % kVector == 0 && valid_columns % kVector == 0) {
        for (int e = (int)threadIdx.x; e < rows * kVectors; e += kThreads) {
            const int row = e / kVectors, column = e % kVectors * kVector;
            const bool valid = row < valid_rows && column < valid_columns;
            copy_async(to + row * to_stride + column, valid ? from + row * from_stride + column : from, valid);
        }
    } else {
        for (int e = (int)threadIdx.x; e < rows * kColumns; e += kThreads) {
            const int row = e / kColumns, column = e % kColumns;
            T v = {};
            if (row < valid_rows && column < valid_columns) v = from[row * from_stride + column];
            to[row * to_stride + column] = v;
        }
    }
}

}  // namespace cuda
}  // namespace lalora
