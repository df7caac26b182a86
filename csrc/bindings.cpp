// Python bindings: raw pointers, sizes and strides come in, checked by lalora_kernels/native.py; no torch header.
#include <pybind11/pybind11.h>

#include <cstring>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace py = pybind11;
using namespace lalora;

namespace {

template <class T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

using BatchTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int>;
using MatrixTuple = std::tuple<uintptr_t, int64_t, int64_t, int>;

Batch batch(const BatchTuple& t) {
    return {pointer<const void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t), std::get<4>(t)};
}

SampleGrad sample_grad_of(const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>& shape, float scaling,
                          const BatchTuple& dy, const MatrixTuple& B, const BatchTuple& h, const BatchTuple& x,
                          uintptr_t dz, uintptr_t sq_B, uintptr_t sq_A, int num_threads) {
    SampleGrad p = {};
    std::tie(p.N, p.T, p.m, p.n, p.r) = shape;
    p.scaling = scaling;
    p.dy = batch(dy), p.h = batch(h), p.x = batch(x);
    p.B = {pointer<const void>(std::get<0>(B)), std::get<1>(B), std::get<2>(B), std::get<3>(B)};
    p.dz = pointer<void>(dz), p.sq_B = pointer<double>(sq_B), p.sq_A = pointer<double>(sq_A);
    p.num_threads = num_threads;
    return p;
}

void read_words(const std::string& bytes, uint32_t* words, size_t count) {  // little endian
    if (bytes.size() != 4 * count) throw py::value_error("expected " + std::to_string(4 * count) + " bytes");
    for (size_t i = 0; i < count; ++i) {
        words[i] = 0;
        for (int k = 3; k >= 0; --k) words[i] = words[i] << 8 | (unsigned char)bytes[4 * i + k];
    }
}

ChaChaStream stream_of(const py::bytes& key, uint64_t release) {
    ChaChaStream s;
    read_words(key, s.key, 8);
    s.release_low = (uint32_t)release, s.release_high = (uint32_t)(release >> 32);
    return s;
}

py::dict cpu_features() {
    py::dict d;
#if defined(__x86_64__)
#define LALORA_FEATURE(name) d[name] = (bool)__builtin_cpu_supports(name)
    LALORA_FEATURE("sse4.2");
    LALORA_FEATURE("avx");
    LALORA_FEATURE("fma");
    LALORA_FEATURE("avx2");
    LALORA_FEATURE("avx512f");
    LALORA_FEATURE("avx512bw");
    LALORA_FEATURE("avx512vl");
    LALORA_FEATURE("avx512dq");
#if __GNUC__ >= 10 || defined(__clang__)
    LALORA_FEATURE("avx512bf16");
#endif
#elif defined(__aarch64__)
    d["neon"] = true;
#endif
    return d;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "CPU kernels of lalora_kernels; see lalora_kernels/native.py";
#ifdef _OPENMP
    module.attr("openmp") = true;
#else
    module.attr("openmp") = false;
#endif
    module.attr("compiler") = LALORA_COMPILER;

    module.def("isas", [] {
        py::list names;
        for (int i = 0; i < kIsaCount; ++i) names.append(py::make_tuple(kIsas[i].name, kIsas[i].supported()));
        return names;
    });
    module.def("isa", [] { return current_isa().name; });
    module.def("set_isa", [](const std::string& name) {
        for (int i = 0; i < kIsaCount; ++i) {
            if (name != kIsas[i].name) continue;
            if (!kIsas[i].supported()) throw py::value_error("this CPU does not support " + name);
            return set_isa(kIsas[i]);
        }
        throw py::value_error("this build holds no kernels for " + name);
    });
    module.def("cpu_features", cpu_features);

    module.def("sample_grad", [](std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> shape, float scaling,
                                 BatchTuple dy, MatrixTuple B, BatchTuple h, BatchTuple x, uintptr_t dz,
                                 uintptr_t sq_B, uintptr_t sq_A, uintptr_t G_B, int64_t G_B_stride, uintptr_t G_A,
                                 int64_t G_A_stride, bool accumulate, int num_threads) {
        SampleGrad p = sample_grad_of(shape, scaling, dy, B, h, x, dz, sq_B, sq_A, num_threads);
        p.G_B = pointer<float>(G_B), p.G_A = pointer<float>(G_A);
        p.G_B_stride = G_B_stride, p.G_A_stride = G_A_stride, p.accumulate = accumulate;
        py::gil_scoped_release release;
        current_isa().kernels.sample_grad(p);
    });
    module.def("sample_grad_clip", [](std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> shape, float scaling,
                                      BatchTuple dy, MatrixTuple B, BatchTuple h, BatchTuple x, uintptr_t dz,
                                      uintptr_t sq_B, uintptr_t sq_A, uintptr_t S_B, uintptr_t S_A, double max_norm,
                                      double grad_scale, int64_t valid, int num_threads) {
        SampleGradClip p = {};
        p.grad = sample_grad_of(shape, scaling, dy, B, h, x, dz, sq_B, sq_A, num_threads);
        p.S_B = pointer<float>(S_B), p.S_A = pointer<float>(S_A);
        p.max_norm = max_norm, p.grad_scale = grad_scale, p.valid = valid;
        py::gil_scoped_release release;
        current_isa().kernels.sample_grad_clip(p);
    });
    // One tuple a tensor: G, G_stride, S, out, outer, length, inner, weights, weights_stride, tensor_index, smooth.
    using Row = std::tuple<uintptr_t, int64_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, uintptr_t, int64_t,
                           uint32_t, bool>;
    module.def("privatize", [](const py::list& rows, int64_t N, float noise_std, const py::bytes& key,
                               uint64_t release_number, double divisor, bool reflect, int num_threads) {
        std::vector<Segment> segments;
        segments.reserve(rows.size());
        for (const py::handle& row : rows) {
            const auto [G, G_stride, S, out, outer, length, inner, weights, weights_stride, index, smooth] =
                row.cast<Row>();
            segments.push_back({pointer<const float>(G), G_stride, pointer<const float>(S), pointer<float>(out), outer,
                                length, inner, pointer<const float>(weights), weights_stride, index, smooth});
        }
        Privatize p = {};
        p.segments = segments.data(), p.count = (int64_t)segments.size(), p.N = N;
        p.noise_std = noise_std, p.factor = (float)(1.0 / divisor);
        p.padding = reflect ? kReflect : kSymmetric, p.num_threads = num_threads;
        if (noise_std != 0.0f) p.stream = stream_of(key, release_number);
        py::gil_scoped_release release;
        current_isa().kernels.privatize(p);
    });
    module.def("chacha20_normal", [](uintptr_t out, int64_t start, int64_t count, const py::bytes& key,
                                     uint64_t release_number, uint32_t tensor_index, int num_threads) {
        const ChaChaNormal p = {pointer<float>(out), start, count, stream_of(key, release_number), tensor_index,
                                num_threads};
        py::gil_scoped_release release;
        current_isa().kernels.chacha20_normal(p);
    });
    module.def("chacha20_words", [](uintptr_t out, const py::bytes& key, std::tuple<uint32_t, uint32_t, uint32_t> nonce,
                                    int64_t start, int64_t blocks) {
        ChaChaWords p = {};
        p.out = pointer<int64_t>(out), p.start = start, p.blocks = blocks;
        read_words(key, p.key, 8);
        std::tie(p.nonce[0], p.nonce[1], p.nonce[2]) = nonce;
        py::gil_scoped_release release;
        current_isa().kernels.chacha20_words(p);
    });
}
