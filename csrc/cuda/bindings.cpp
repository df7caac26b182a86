// Python bindings of the CUDA kernels: raw device pointers, sizes, strides, device and stream, checked by
// lalora_kernels/cuda.py. Compiled by the C++ compiler: neither torch's nor CUDA's headers are needed.
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>

#include "params.h"

namespace py = pybind11;
using namespace lalora;

#ifdef LALORA_EMULATE
#define LALORA_MODULE _cuda_emulated
namespace emulate {
void fail_after(int calls);
void set_order(int value);
int current_device();
void set_device(int value);
int last_error();
void leave_error();
}  // namespace emulate
#else
#define LALORA_MODULE _cuda
#endif

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void read_words(const std::string& bytes, uint32_t* words, size_t count) {  // little endian
    if (bytes.size() != 4 * count) throw py::value_error("expected " + std::to_string(4 * count) + " bytes");
    for (size_t i = 0; i < count; ++i) {
        words[i] = 0;
        for (int k = 3; k >= 0; --k) words[i] = words[i] << 8 | (unsigned char)bytes[4 * i + k];
    }
}

ChaChaStream stream_of(const py::bytes& key, uint64_t release) {
    ChaChaStream s = {};
    read_words(key, s.key, 8);
    s.release_low = (uint32_t)release, s.release_high = (uint32_t)(release >> 32);
    return s;
}

// rows, tiles, number of tiles, elements of one, aligned, smooth; weights, their strides, N
using Table = std::tuple<uintptr_t, uintptr_t, int64_t, int32_t, bool, bool>;
using Weights = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

cuda::Release release_of(const Table& table, const Weights& weights) {
    cuda::Release p = {};
    p.rows = pointer<const cuda::SegmentRow>(std::get<0>(table)), p.tiles = pointer<const int32_t>(std::get<1>(table));
    p.tile_count = std::get<2>(table), p.tile = std::get<3>(table);
    p.aligned = std::get<4>(table), p.smooth = std::get<5>(table);
    p.weights = pointer<const float>(std::get<0>(weights));
    p.w_row = std::get<1>(weights), p.w_step = std::get<2>(weights), p.N = std::get<3>(weights);
    p.factor = 1.0f;
    return p;
}

// address, stride of samples, stride of positions
using Rows = std::tuple<uintptr_t, int64_t, int64_t>;

}  // namespace

PYBIND11_MODULE(LALORA_MODULE, module) {
    module.doc() = "CUDA kernels of lalora_kernels; see lalora_kernels/cuda.py";
#ifdef LALORA_EMULATE
    module.def("fail_after", emulate::fail_after);
    module.def("set_order", emulate::set_order);
    module.def("current_device", emulate::current_device);
    module.def("set_device", emulate::set_device);
    module.def("last_error", emulate::last_error);
    module.def("leave_error", emulate::leave_error);
#endif
    module.def("privatize", [](const Table& table, const Weights& weights, float noise_std, const py::bytes& key,
                               uint64_t release, double divisor, bool reflect, int device, uintptr_t stream) {
        cuda::Release p = release_of(table, weights);
        p.noise_std = noise_std, p.factor = (float)(1.0 / divisor), p.padding = reflect ? kReflect : kSymmetric;
        if (noise_std != 0.0f) p.stream = stream_of(key, release);
        py::gil_scoped_release unlocked;
        cuda::privatize(p, device, pointer<void>(stream));
    });
    module.def("clip_reduce", [](const Table& table, const Weights& weights, int device, uintptr_t stream) {
        const cuda::Release p = release_of(table, weights);
        py::gil_scoped_release unlocked;
        cuda::clip_reduce(p, device, pointer<void>(stream));
    });
    module.def("chacha20_normal", [](uintptr_t out, int64_t start, int64_t count, const py::bytes& key, uint64_t release,
                                     uint32_t tensor_index, int device, uintptr_t stream) {
        const cuda::Normals p = {pointer<float>(out), start, count, stream_of(key, release), tensor_index};
        py::gil_scoped_release unlocked;
        cuda::chacha20_normal(p, device, pointer<void>(stream));
    });
    module.def("chacha20_words", [](uintptr_t out, const py::bytes& key, std::tuple<uint32_t, uint32_t, uint32_t> nonce,
                                    int64_t start, int64_t blocks, int device, uintptr_t stream) {
        cuda::Words p = {};
        p.out = pointer<int64_t>(out), p.start = start, p.blocks = blocks;
        read_words(key, p.key, 8);
        std::tie(p.nonce[0], p.nonce[1], p.nonce[2]) = nonce;
        py::gil_scoped_release unlocked;
        cuda::chacha20_words(p, device, pointer<void>(stream));
    });

    py::class_<cuda::LayerGrad>(module, "LayerGrad", py::module_local())
        .def(py::init([](std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> shape, int dtype, float scaling,
                         char factor, const Rows& dy, const Rows& thin_or_x, uintptr_t B, uintptr_t dz, uintptr_t sq) {
            cuda::LayerGrad g = {};
            g.is_A = factor == 'A';
            std::tie(g.N, g.T, g.m, g.n, g.r) = shape;
            g.dtype = dtype, g.scaling = scaling;
            g.dy = pointer<void>(std::get<0>(dy)), g.dy_n = std::get<1>(dy), g.dy_t = std::get<2>(dy);
            (g.is_A ? g.x : g.h) = pointer<void>(std::get<0>(thin_or_x));
            (g.is_A ? g.x_n : g.h_n) = std::get<1>(thin_or_x), (g.is_A ? g.x_t : g.h_t) = std::get<2>(thin_or_x);
            g.B = pointer<void>(B), g.dz = pointer<void>(dz), g.sq = pointer<double>(sq);
            return g;
        }));
    py::class_<cuda::ClusterPlan>(module, "ClusterPlan", py::module_local())
        .def_readonly("cluster", &cuda::ClusterPlan::cluster)
        .def_readonly("positions", &cuda::ClusterPlan::positions)
        .def_readonly("stages", &cuda::ClusterPlan::stages)
        .def_readonly("span", &cuda::ClusterPlan::span)
        .def_readonly("clusters", &cuda::ClusterPlan::clusters)
        .def_readonly("shared", &cuda::ClusterPlan::shared);
    module.def("plan_sample_grad", cuda::plan_sample_grad);
    module.def("sample_grad", [](cuda::LayerGrad& g, const cuda::ClusterPlan& plan, uintptr_t G, int64_t G_n,
                                 bool accumulate, int device, uintptr_t stream) {
        g.G = pointer<float>(G), g.G_n = G_n, g.accumulate = accumulate;
        cuda::sample_grad(g, plan, device, pointer<void>(stream));
    });
    module.def("plan_sample_grad_clip", cuda::plan_sample_grad_clip);
    module.def("sample_grad_clip",
               [](cuda::LayerGrad& g, const cuda::ClusterPlan& plan, double max_norm, double grad_scale, int64_t valid,
                  uintptr_t S, uintptr_t partial, int device, uintptr_t stream) {
                   g.max_norm = max_norm, g.grad_scale = grad_scale, g.valid = valid;
                   g.S = pointer<float>(S), g.partial = pointer<float>(partial);
                   py::gil_scoped_release unlocked;
                   cuda::sample_grad_clip(g, plan, device, pointer<void>(stream));
               });
}
