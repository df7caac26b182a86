// The part of CUDA's runtime that csrc/cuda calls, on the CPU, for tests on machines without a GPU. A launch runs its
// clusters one after another; the threads of a cluster are fibers that give way at barriers, in an order that the test
// chooses. Shared memory starts as NaN, an asynchronous copy arrives as late as it may, and a barrier that not every
// thread reaches is an error, so that a missing barrier or wait shows as a wrong result. Another block's shared memory is
// there once that block has arrived at a barrier of the cluster. The last error stays until it is asked for, and the
// current device until it is set.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
typedef struct Stream* cudaStream_t;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

namespace emulate {

constexpr int kMultiprocessors = 9, kSharedLimit = 227 * 1024;

extern unsigned cluster_size;  // CTAs a cluster of the kernel that runs now

// Every call of the runtime but one goes through here; the test makes one fail. `given`: what the call itself found.
cudaError_t status(cudaError_t given = cudaSuccess);
cudaError_t take_last_error();
void set_device(int device);
void run(const std::function<void()>& kernel, unsigned blocks, unsigned threads, unsigned cluster, size_t shared);

void sync_block();
void cluster_arrive();
void cluster_wait();
unsigned char* shared_memory(unsigned rank);  // of a CTA of this thread's cluster
unsigned char* reach(unsigned rank);          // the same, from another CTA
void copy_async(void* to, const void* from, size_t bytes, bool valid);
void copy_commit();
void copy_wait(int pending);
// What all 32 lanes of a warp brought to one instruction; valid until the warp's next one.
const void* const* warp_exchange(const void* mine, size_t bytes);

}  // namespace emulate

extern dim3 threadIdx, blockIdx, gridDim, blockDim;  // of the thread that runs now

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "unspecified launch failure";
}
inline cudaError_t cudaGetLastError() { return emulate::take_last_error(); }
inline cudaError_t cudaSetDevice(int device) {
    emulate::set_device(device);
    return emulate::status();
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount      ? emulate::kMultiprocessors
             : attribute == cudaDevAttrComputeCapabilityMajor ? 9
                                                              : emulate::kSharedLimit;
    return emulate::status();
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
    return emulate::status();
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
    *blocks = 1;
    return emulate::status();
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
    *clusters = 2;
    return emulate::status();
}
template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(const Params), const Params& params) {
    const cudaError_t error = emulate::status(config->gridDim.x ? cudaSuccess : cudaErrorInvalidConfiguration);
    if (error != cudaSuccess) return error;
    const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
    emulate::run([&] { kernel(params); }, config->gridDim.x, config->blockDim.x, cluster, config->dynamicSmemBytes);
    return cudaSuccess;
}
