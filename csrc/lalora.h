// Plain parameter structs and one declaration per operation, shared by the CPU and the CUDA code. Strides count
// elements, shapes are docs/ops.md's, a null pointer means "not asked for".
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define LALORA_FN __host__ __device__ __forceinline__
#else
#define LALORA_FN inline __attribute__((always_inline))
#endif

namespace lalora {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1 };

struct Matrix {  // (rows, columns)
    const void* data;
    int64_t stride0, stride1;
    int32_t dtype;
};

struct Batch {  // (N, T, features)
    const void* data;
    int64_t stride0, stride1, stride2;
    int32_t dtype;
};

struct SampleGrad {
    int64_t N, T, m, n, r;
    float scaling;
    bool accumulate;
    Batch dy, h, x;
    Matrix B;
    void* dz;  // (N, T, r) contiguous, dy's dtype
    float* G_B;
    float* G_A;
    int64_t G_B_stride, G_A_stride;  // from one sample to the next; a sample itself is contiguous
    double* sq_B;  // given: G_B is asked for, and h is there
    double* sq_A;  // given: G_A is asked for, and x is there
    int num_threads;
};

struct SampleGradClip {
    SampleGrad grad;  // G_B and G_A unused
    double max_norm, grad_scale;
    int64_t valid;
    float* S_B;  // (m, r) and (r, n), contiguous, added to
    float* S_A;
};

struct Segment {  // one tensor of a release, seen as (outer, length, inner) with the filter running along length
    const float* G;
    int64_t G_stride;
    const float* S;
    float* out;
    int64_t outer, length, inner;
    const float* weights;
    int64_t weights_stride;
    uint32_t tensor_index;
    int32_t smooth;
};

enum Padding : int32_t { kSymmetric = 0, kReflect = 1 };

struct ChaChaStream {
    uint32_t key[8];
    uint32_t release_low, release_high;
};

struct Privatize {
    const Segment* segments;
    int64_t count, N;
    float noise_std;  // 0: the stream is not read
    ChaChaStream stream;
    float factor;  // 1 / divisor
    int32_t padding;
    int num_threads;
};

struct ChaChaNormal {
    float* out;
    int64_t start, count;
    ChaChaStream stream;
    uint32_t tensor_index;
    int num_threads;
};

struct ChaChaWords {
    int64_t* out;  // (blocks, 16)
    uint32_t key[8], nonce[3];
    int64_t start, blocks;
};

struct Kernels {
    void (*sample_grad)(const SampleGrad&);
    void (*sample_grad_clip)(const SampleGradClip&);
    void (*privatize)(const Privatize&);  // clip_reduce too: S = out, no noise, no filter
    void (*chacha20_normal)(const ChaChaNormal&);
    void (*chacha20_words)(const ChaChaWords&);
};

}  // namespace lalora
