// privatize, and clip_reduce as its case without noise and filter. One table of tensors, one pool of tiles: a tile
// is summed over the samples, noised, filtered and divided in L1, then written once. A filter's halo is computed again.
#include "noise.h"
#include "scratch.h"

LALORA_BEGIN

constexpr int64_t kTile = 4096;  // floats

struct Tiling {  // of one segment: `outer` x `along` x `across` tiles
    int64_t lines, positions, columns;  // per tile; lines > 1 only where a line fits a tile whole
    int64_t outer, along, across;
};

inline int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

inline Tiling tiling_of(const Segment& s) {
    Tiling t = {1, s.length, s.inner, 0, 0, 0};
    const int64_t line = s.length * s.inner;
    if (!line || !s.outer) return t;
    if (!s.smooth) {
        if (t.columns > kTile) t.columns = kTile;
    } else if (line <= kTile) {
        t.lines = kTile / line;
    } else {
        if (t.columns > kTile / 16) t.columns = kTile / 16;
        t.positions = kTile / t.columns;
    }
    t.outer = tiles(s.outer, t.lines), t.along = tiles(s.length, t.positions), t.across = tiles(s.inner, t.columns);
    return t;
}

// NumPy's "symmetric" and "reflect", for any length.
inline int64_t pad_index(int64_t i, int64_t length, int32_t padding) {
    if (length == 1) return 0;
    const int64_t period = padding == kSymmetric ? 2 * length : 2 * length - 2;
    i = ((i % period) + period) % period;
    return i < length ? i : (padding == kSymmetric ? 2 * length - 1 : period) - i;
}

// Floats between what is summed and what is fetched meanwhile, in each of N samples: together a quarter of L2.
inline int64_t distance(int64_t N) { return N <= 64 ? 512 : N <= 512 ? 32768 / N : 64; }

LALORA_FN void prefetch_group(const float* g) {
    for (int e = 0; e < kGroup; e += 16) prefetch(g + e);
}

// v[k] += sum_i w_i G_i over the group at `at`: one pass over the samples, the sum in registers.
template <bool Prefetch>
LALORA_FN void add_samples(const Privatize& p, const Segment& s, int64_t at, int64_t ahead, vf* v) {
    const float* g = s.G + at;
    const float* w = s.weights;
    for (int64_t i = 0; i < p.N; ++i, g += s.G_stride, w += s.weights_stride) {
        if (*w == 0.0f) continue;  // what it holds may not be a number
        for (int k = 0; k < 4; ++k) v[k] += *w * load(g + k * W);
        if (Prefetch) prefetch_group(g + ahead);
    }
}

// total[e] = S[e] + sum_i w_i G_i[e] + noise, for `count` < kGroup elements at `at` that end a run or begin one.
inline void sum_edge(const Privatize& p, const Segment& s, int64_t at, int64_t count, const float* noise,
                     float* total) {
    for (int64_t e = 0; e < count; ++e) {
        float sum = (noise ? p.noise_std * noise[e] : 0.0f) + (s.S ? s.S[at + e] : 0.0f);
        for (int64_t i = 0; s.G && i < p.N; ++i) {
            const float w = s.weights[i * s.weights_stride];
            if (w != 0.0f) sum += w * s.G[i * s.G_stride + at + e];
        }
        total[e] = sum;
    }
}

// total[e] = S[e] + sum_i w_i G_i[e] + noise over a run start .. start + count - 1 of the tensor; `total` may lie in S.
template <bool Noise>
inline void sum_run(const Privatize& p, const Segment& s, int64_t start, int64_t count, float* total) {
    const int64_t ahead = distance(p.N);
    NoiseGroups groups(p.stream, s.tensor_index, start / 4, Noise);
    int64_t skip = start % 4;  // of the first group's elements
    for (int64_t e = 0; e < count;) {
        vf v[4] = {};
        if (Noise)
            groups.next(v, [&](int k) {
                for (int64_t i = p.N * k / 8; s.G && i < p.N * (k + 1) / 8; ++i)
                    prefetch_group(s.G + i * s.G_stride + start + e + ahead);
            });
        if (skip == 0 && count - e >= kGroup) {
            for (int k = 0; k < 4; ++k) v[k] *= p.noise_std;
            if (s.S)
                for (int k = 0; k < 4; ++k) v[k] += load(s.S + start + e + k * W);
            if (s.G) add_samples<!Noise>(p, s, start + e, ahead, v);
            for (int k = 0; k < 4; ++k) store(total + e + k * W, v[k]);
            e += kGroup;
            continue;
        }
        float noise[kGroup];
        memcpy(noise, v, sizeof noise);
        const int64_t here = kGroup - skip < count - e ? kGroup - skip : count - e;
        sum_edge(p, s, start + e, here, Noise ? noise + skip : nullptr, total + e);
        e += here, skip = 0;
    }
}

inline void fill(const Privatize& p, const Segment& s, int64_t start, int64_t count, float* total) {
    (p.noise_std != 0.0f ? sum_run<true> : sum_run<false>)(p, s, start, count, total);
}

// in[0] is position `first`; out[0] is position `begin`. Rows of `columns` values.
inline void smooth_line(const float* in, int64_t first, int64_t begin, int64_t end, int64_t columns,
                        const Segment& s, float factor, int32_t padding, float* out) {
    const float w2 = factor * 0.0625f, w1 = factor * 0.25f, w0 = factor * 0.375f;
    const int64_t inside0 = begin < 2 ? 2 : begin, inside1 = end > s.length - 2 ? s.length - 2 : end;
    if (inside0 < inside1) {
        const int64_t rows = columns == s.inner ? 1 : inside1 - inside0;  // unbroken rows are one long one
        const int64_t count = columns == s.inner ? (inside1 - inside0) * columns : columns;
        for (int64_t k = 0; k < rows; ++k) {
            const float* c = in + (inside0 + k - first) * columns;
            const float *c1 = c - columns, *c2 = c1 - columns, *c3 = c + columns, *c4 = c3 + columns;
            float* o = out + (inside0 + k - begin) * s.inner;
            for (int64_t e = 0; e < count; ++e) o[e] = w0 * c[e] + w1 * (c1[e] + c3[e]) + w2 * (c2[e] + c4[e]);
        }
    }
    for (int64_t at = begin; at < end; ++at) {
        if (at == inside0 && inside0 < inside1) at = inside1;
        if (at >= end) break;
        const float* tap[5];
        for (int k = 0; k < 5; ++k) tap[k] = in + (pad_index(at + k - 2, s.length, padding) - first) * columns;
        float* o = out + (at - begin) * s.inner;
        for (int64_t e = 0; e < columns; ++e)
            o[e] = w0 * tap[2][e] + w1 * (tap[1][e] + tap[3][e]) + w2 * (tap[0][e] + tap[4][e]);
    }
}

inline void tile(const Privatize& p, const Segment& s, const Tiling& t, int64_t index, float* total) {
    const int64_t o0 = index / (t.along * t.across) * t.lines, along = index / t.across % t.along;
    const int64_t lines = s.outer - o0 < t.lines ? s.outer - o0 : t.lines;
    const int64_t begin = along * t.positions, end = begin + t.positions < s.length ? begin + t.positions : s.length;
    const int64_t q0 = index % t.across * t.columns, columns = s.inner - q0 < t.columns ? s.inner - q0 : t.columns;
    const int64_t line = s.length * s.inner;

    if (!s.smooth) {  // outer 1, length 1: any run will do
        float* out = s.out + q0;
        const bool in_place = s.S == s.out;
        fill(p, s, q0, columns, in_place ? out : total);
        if (!in_place || p.factor != 1.0f)
            for (int64_t e = 0; e < columns; ++e) out[e] = p.factor * (in_place ? out : total)[e];
        return;
    }
    const int64_t first = begin < 2 ? 0 : begin - 2, last = end + 2 < s.length ? end + 2 : s.length;
    if (columns == s.inner)  // whole lines follow one another without a gap
        fill(p, s, o0 * line + first * s.inner, (lines - 1) * line + (last - first) * s.inner, total);
    else
        for (int64_t at = first; at < last; ++at)
            fill(p, s, o0 * line + at * s.inner + q0, columns, total + (at - first) * columns);
    for (int64_t k = 0; k < lines; ++k)
        smooth_line(total + k * line, first, begin, end, columns, s, p.factor, p.padding,
                    s.out + (o0 + k) * line + begin * s.inner + q0);
}

LALORA_END

namespace lalora {
namespace LALORA_ISA {

void privatize(const Privatize& p) {
    int64_t* first = (int64_t*)scratch(kShared, 2 * (p.count + 1));  // of each segment's tiles
    first[0] = 0;
    for (int64_t l = 0; l < p.count; ++l) {
        const Tiling t = tiling_of(p.segments[l]);
        first[l + 1] = first[l] + t.outer * t.along * t.across;
    }
#pragma omp parallel for num_threads(p.num_threads) schedule(dynamic, 4)
    for (int64_t k = 0; k < first[p.count]; ++k) {
        int64_t low = 0, high = p.count - 1;
        while (low < high) {
            const int64_t middle = (low + high + 1) / 2;
            if (first[middle] <= k)
                low = middle;
            else
                high = middle - 1;
        }
        const Segment& s = p.segments[low];
        tile(p, s, tiling_of(s), k - first[low], scratch(kWork, kTile + 4 * kTile / 16) /* with its halo */);
    }
}

}  // namespace LALORA_ISA
}  // namespace lalora
