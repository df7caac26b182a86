// The few instructions that the kernels use by name. csrc/cuda/emulate replaces this half of the language on a machine
// without a GPU, so that the kernels' own code is what its tests run.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../chacha20.h"

namespace lalora {
namespace cuda {

inline void check(cudaError_t status, const char* op, const char* call) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // told here, it must not be told again after this thread's next launch
    throw std::runtime_error(std::string(op) + ": " + call + ": " + cudaGetErrorString(status));
}
#define LALORA_CHECK(op, call) ::lalora::cuda::check(call, op, #call)

inline int device_attribute(const char* op, cudaDeviceAttr attribute, int device) {
    int value = 0;
    LALORA_CHECK(op, cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

// A grid that fills the chip once, or less; clusters where `cluster` > 0.
template <class Kernel, class Params>
void launch(const char* op, Kernel kernel, int64_t blocks, int threads, int shared, int cluster, void* stream,
            const Params& params) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = (unsigned)cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks), config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = (size_t)shared, config.stream = (cudaStream_t)stream;
    config.attrs = &attribute, config.numAttrs = cluster > 0 ? 1 : 0;
    LALORA_CHECK(op, cudaLaunchKernelEx(&config, kernel, params));
}

struct alignas(16) Four {
    float v[4];
};
struct BF16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

#ifndef LALORA_EMULATE

#define LALORA_DEVICE static __device__ __forceinline__
#define LALORA_MEMBER __device__ __forceinline__

LALORA_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char lalora_shared[];
    return lalora_shared;
}
LALORA_DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
LALORA_DEVICE void sync_block() { __syncthreads(); }

// 16 bytes of global memory. Addresses come out of a table, so that the compiler cannot tell where they point; `once`:
// not to be kept in the caches.
LALORA_DEVICE Four load_global(const Four* p, bool once = false) {
    const float4* q = reinterpret_cast<const float4*>(p);
    const float4 f = once ? __ldcs(q) : __ldcg(q);
    return {{f.x, f.y, f.z, f.w}};
}
LALORA_DEVICE void store_global(Four* p, const Four& f) {
    __stcg(reinterpret_cast<float4*>(p), make_float4(f.v[0], f.v[1], f.v[2], f.v[3]));
}

LALORA_DEVICE float to_float(float v) { return v; }
LALORA_DEVICE float to_float(BF16 v) { return __uint_as_float((uint32_t)v.bits << 16); }
LALORA_DEVICE float to_float(F16 v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
}
LALORA_DEVICE void from_float(float f, float& v) { v = f; }
LALORA_DEVICE void from_float(float f, BF16& v) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v.bits) : "f"(f)); }
LALORA_DEVICE void from_float(float f, F16& v) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v.bits) : "f"(f)); }

// 16 bytes from global to shared memory, past the registers; zeros where `valid` is false.
LALORA_DEVICE void copy_async(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
LALORA_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
LALORA_DEVICE void copy_wait() {  // until at most kPending of this thread's groups are under way
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Where in shared memory; a pointer takes twice the registers and a conversion at every use.
using Place = uint32_t;
LALORA_DEVICE Place place_of(const void* p) { return shared_address(p); }

// Four 8x8 matrices of 16-bit values; lane l names row l % 8 of matrix l / 8.
LALORA_DEVICE void load_matrices(uint32_t (&r)[4], Place row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
LALORA_DEVICE void load_matrices_transposed(uint32_t (&r)[4], Place row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
#define LALORA_MMA(type)                                                                            \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                            \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"            \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
LALORA_DEVICE void multiply(BF16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    LALORA_MMA("bf16");
}
LALORA_DEVICE void multiply(F16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { LALORA_MMA("f16"); }

LALORA_DEVICE double warp_sum(double v) {  // in a fixed order
    for (int lane = 16; lane; lane >>= 1) v += __shfl_xor_sync(~0u, v, lane);
    return v;
}
LALORA_DEVICE float warp_max(float v) {
    for (int lane = 16; lane; lane >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, lane));
    return v;
}

#define LALORA_SPECIAL(name, reg)                        \
    LALORA_DEVICE uint32_t name() {                      \
        uint32_t v;                                      \
        asm volatile("mov.u32 %0, " reg ";" : "=r"(v)); \
        return v;                                        \
    }
#if __CUDA_ARCH__ >= 900
LALORA_SPECIAL(cluster_rank, "%%cluster_ctarank")
LALORA_SPECIAL(cluster_size, "%%cluster_nctarank")
LALORA_SPECIAL(cluster_index, "%%clusterid.x")
LALORA_SPECIAL(cluster_count, "%%nclusterid.x")
LALORA_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
LALORA_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
template <class T>
LALORA_DEVICE T* of_rank(T* p, uint32_t rank) {  // the same place in another CTA's shared memory
    T* q;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(q) : "l"(p), "r"(rank));
    return q;
}
#endif

struct DeviceOps : ScalarOps {
    static LALORA_FN F sqrt(F f) {
        F r = 0;
#ifdef __CUDA_ARCH__
        asm("sqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(f));  // 1 unit in the last place
#endif
        return r;
    }
};

#endif  // LALORA_EMULATE

}  // namespace cuda
}  // namespace lalora

#ifdef LALORA_EMULATE
#include "emulate/device.h"
#endif
