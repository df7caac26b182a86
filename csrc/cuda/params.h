// What the CUDA kernels are told, and their entry points: plain structs, no CUDA header, no torch header. Pointers are
// device pointers, `stream` is a cudaStream_t. Every entry throws std::runtime_error naming the operation.
#pragma once
#include <cstdint>

#include "../lalora.h"

namespace lalora {
namespace cuda {

struct SegmentRow {  // one tensor of a release: a row of lalora_kernels/segments.py
    int64_t G, G_stride, S, out, numel, length, inner, halo, first_tile, tensor_index, smooth, unused;
};

struct Release {
    const SegmentRow* rows;
    const int32_t* tiles;  // the row that each tile belongs to
    int64_t tile_count;
    int32_t tile;  // elements a tile reads, its two halos included
    bool aligned, smooth;
    const float* weights;
    int64_t w_row, w_step, N;
    float noise_std, factor;  // factor: 1 / divisor
    int32_t padding;
    uint32_t multiprocessors;
    ChaChaStream stream;
};

struct Normals {
    float* out;
    int64_t start, count;
    ChaChaStream stream;
    uint32_t tensor_index;
};

struct Words {
    int64_t* out;  // (blocks, 16)
    uint32_t key[8], nonce[3];
    int64_t start, blocks;
};

enum Half : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

// One factor of one layer: G[f, r] = sum_t wide[t, f] thin[t, r], (wide, thin) = (dy, h) for B and (x, dz) for A. No
// address tells which: torch's are null where a tensor is empty.
struct LayerGrad {
    bool is_A;
    int64_t N, T, m, n, r;  // n: features of x; 0 for B
    int32_t dtype;
    float scaling;
    const void *dy, *h, *x, *B;  // last axis without gaps; B (m, r) contiguous
    int64_t dy_n, dy_t, h_n, h_t, x_n, x_t;
    void* dz;  // (N, T, r) contiguous, or null
    double* sq;
    // sample_grad: (N, m, r) or (N, r, n), a sample without gaps
    float* G;
    int64_t G_n;
    bool accumulate;
    // sample_grad_clip
    int64_t valid;
    double max_norm, grad_scale;
    float* partial;  // (clusters, m r or r n)
    float* S;        // (m, r) or (r, n) contiguous, added to
};

struct ClusterPlan {
    int32_t cluster, positions, stages, span;  // CTAs a cluster; positions a tile; buffers; positions between barriers
    int32_t clusters, shared;                  // launched; bytes a CTA
};

void privatize(const Release&, int device, void* stream);
void clip_reduce(const Release&, int device, void* stream);
void chacha20_normal(const Normals&, int device, void* stream);
void chacha20_words(const Words&, int device, void* stream);
ClusterPlan plan_sample_grad(const LayerGrad&, int device);
void sample_grad(const LayerGrad&, const ClusterPlan&, int device, void* stream);
ClusterPlan plan_sample_grad_clip(const LayerGrad&, int device);
void sample_grad_clip(const LayerGrad&, const ClusterPlan&, int device, void* stream);

}  // namespace cuda
}  // namespace lalora
