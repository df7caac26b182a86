// The emulated machine of cuda_runtime.h: fibers, barriers and late copies.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace emulate {

unsigned cluster_size = 1;

namespace {

constexpr size_t kStack = 64 << 10;  // bytes
constexpr size_t kGuard = 4096;      // bytes past the end of shared memory that nobody may write
std::vector<std::unique_ptr<unsigned char[]>> stacks;  // kept from launch to launch
int calls_until_failure = -1;
int device = 0;  // the current one
cudaError_t last = cudaSuccess;
int order = 0;  // of the threads between two barriers: 0 ascending, 1 descending, else shuffled with this seed

struct Copy {
    void* to;
    std::vector<unsigned char> bytes;
};

struct Fiber {
    ucontext_t context;  // of its first entry; from then on
    jmp_buf state;       // without ucontext's two system calls a switch
    dim3 thread, block;
    bool started = false, done = false;
    unsigned block_barriers = 0, cluster_arrivals = 0, cluster_waits = 0, exchanges = 0;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
    unsigned char slots[2][32];  // what it brought to the warp's last two exchanges
};

struct Cluster {
    std::vector<Fiber> fibers;
    std::vector<std::vector<unsigned char>> shared;
    const std::function<void()>* kernel;
    jmp_buf scheduler;
    Fiber* current = nullptr;
    std::string error;
};
Cluster* cluster = nullptr;

void yield() {
    if (!_setjmp(cluster->current->state)) _longjmp(cluster->scheduler, 1);
}

__attribute__((noinline)) void resume(Fiber& f) {
    if (_setjmp(cluster->scheduler)) return;
    if (f.started) _longjmp(f.state, 1);
    f.started = true;
    setcontext(&f.context);
}

template <class Member>
bool reached(unsigned first, unsigned count, Member member, unsigned value) {
    for (unsigned i = first; i < first + count; ++i)
        if (cluster->fibers[i].*member < value) return false;
    return true;
}

unsigned own() { return (unsigned)(cluster->current - cluster->fibers.data()); }

template <class Member>
void wait_for(unsigned first, unsigned count, Member member, unsigned value) {
    while (!reached(first, count, member, value)) yield();
}

void body() {
    try {
        (*cluster->kernel)();
    } catch (const std::exception& e) {
        cluster->error = e.what();
    }
    cluster->current->done = true;
    yield();
}

__attribute__((noinline)) void prepare(Fiber& f, size_t index) {
    if (stacks.size() == index) stacks.emplace_back(new unsigned char[kStack]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks[index].get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, body, 0);
}

uint64_t progress(unsigned first, unsigned count) {
    uint64_t sum = 0;
    for (unsigned i = first; i < first + count; ++i) {
        const Fiber& f = cluster->fibers[i];
        sum += f.done + f.block_barriers + f.cluster_arrivals + f.cluster_waits + f.exchanges;
    }
    return sum;
}

std::vector<unsigned> turns(unsigned count) {
    static uint64_t random;
    std::vector<unsigned> turn(count);
    for (unsigned i = 0; i < count; ++i) turn[i] = order == 1 ? count - 1 - i : i;
    for (unsigned i = count; order > 1 && i > 1; --i) {
        random = random * 6364136223846793005u + (unsigned)order * 2 + 1;
        std::swap(turn[i - 1], turn[(random >> 33) % i]);
    }
    return turn;
}

// A block that ended takes its shared memory along.
void retire(unsigned first, unsigned count) {
    for (unsigned i = first; i < first + count; ++i)
        if (!cluster->fibers[i].done) return;
    auto& memory = cluster->shared[first / count];
    std::fill(memory.begin(), memory.end() - kGuard, 0xff);
}

// As unfair as can be: a block runs ahead of its cluster, and a warp of its block, until a barrier holds it.
void run_ahead(unsigned first, unsigned count, unsigned part) {
    for (uint64_t before = ~0ull; before != progress(first, count);) {
        before = progress(first, count);
        for (unsigned i : turns(count / part)) {
            if (part > 32) {
                run_ahead(first + i * part, part, 32);
                retire(first + i * part, part);
            } else if (part == 32) {
                run_ahead(first + i * part, part, 1);
            } else if (!cluster->fibers[first + i].done) {
                Fiber& f = cluster->fibers[first + i];
                cluster->current = &f;
                threadIdx = f.thread, blockIdx = f.block;
                resume(f);
            }
        }
    }
}

void schedule() {
    const unsigned count = (unsigned)cluster->fibers.size();
    run_ahead(0, count, blockDim.x);
    if (!cluster->error.empty()) throw std::runtime_error(cluster->error);
    for (const Fiber& f : cluster->fibers)
        if (!f.done) throw std::runtime_error("emulated kernel: a barrier that not every thread reaches");
}

}  // namespace

void fail_after(int calls) { calls_until_failure = calls; }
void set_order(int value) { order = value; }

int current_device() { return device; }
void set_device(int value) { device = value; }
int last_error() { return last; }
void leave_error() { last = cudaErrorLaunchFailure; }

cudaError_t take_last_error() {
    const cudaError_t error = last;
    last = cudaSuccess;
    return error;
}

cudaError_t status(cudaError_t given) {
    if (calls_until_failure >= 0 && !calls_until_failure--) given = cudaErrorLaunchFailure;
    if (given != cudaSuccess) last = given;
    return given;
}

void run(const std::function<void()>& kernel, unsigned blocks, unsigned threads, unsigned size, size_t shared) {
    if (blocks % size || threads % 32 || shared > kSharedLimit) throw std::runtime_error("emulated launch: bad shape");
    gridDim = dim3(blocks), blockDim = dim3(threads), cluster_size = size;
    for (unsigned first = 0; first < blocks; first += size) {
        Cluster c;
        cluster = &c;
        c.kernel = &kernel;
        c.fibers.resize((size_t)size * threads);
        c.shared.assign(size, std::vector<unsigned char>(shared + kGuard, 0xff));  // NaN in every format
        for (unsigned i = 0; i < c.fibers.size(); ++i) {
            Fiber& f = c.fibers[i];
            f.thread = dim3(i % threads), f.block = dim3(first + i / threads);
            prepare(f, i);
        }
        schedule();
        for (const Fiber& f : c.fibers)  // a copy that nothing waits for would land in another block's memory
            if (!f.open.empty() || std::any_of(f.groups.begin(), f.groups.end(), [](auto& g) { return !g.empty(); }))
                throw std::runtime_error("emulated kernel: a copy is under way when its block ends");
        for (const auto& memory : c.shared)
            if (std::any_of(memory.begin() + (long)shared, memory.end(), [](unsigned char b) { return b != 0xff; }))
                throw std::runtime_error("emulated kernel: a write past the end of shared memory");
    }
    cluster = nullptr;
}

void sync_block() {
    Fiber& f = *cluster->current;
    const unsigned threads = blockDim.x, first = own() / threads * threads;
    ++f.block_barriers;
    wait_for(first, threads, &Fiber::block_barriers, f.block_barriers);
}

void cluster_arrive() { ++cluster->current->cluster_arrivals; }

void cluster_wait() {
    Fiber& f = *cluster->current;
    ++f.cluster_waits;
    wait_for(0, (unsigned)cluster->fibers.size(), &Fiber::cluster_arrivals, f.cluster_waits);
}

unsigned char* shared_memory(unsigned rank) { return cluster->shared[rank].data(); }

unsigned char* reach(unsigned rank) {
    if (rank != own() / blockDim.x && !cluster->fibers[rank * blockDim.x].cluster_arrivals)
        throw std::runtime_error("emulated kernel: a reach into a block that may not have started");
    return shared_memory(rank);
}

void copy_async(void* to, const void* from, size_t bytes, bool valid) {
    if ((uintptr_t)to % bytes || (valid && (uintptr_t)from % bytes))
        throw std::runtime_error("emulated kernel: an unaligned asynchronous copy");
    Copy copy = {to, std::vector<unsigned char>(bytes, 0)};
    if (valid) memcpy(copy.bytes.data(), from, bytes);
    cluster->current->open.push_back(std::move(copy));
}

void copy_commit() {
    Fiber& f = *cluster->current;
    f.groups.push_back(std::move(f.open));
    f.open.clear();
}

void copy_wait(int pending) {
    Fiber& f = *cluster->current;
    const size_t ready = f.groups.size() > (size_t)pending ? f.groups.size() - pending : 0;
    for (size_t i = 0; i < ready; ++i)
        for (const Copy& copy : f.groups[i]) memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
    f.groups.erase(f.groups.begin(), f.groups.begin() + (long)ready);
}

const void* const* warp_exchange(const void* mine, size_t bytes) {
    static thread_local const void* lanes[32];
    Fiber& f = *cluster->current;
    const unsigned first = own() / 32 * 32, parity = f.exchanges % 2;
    memcpy(f.slots[parity], mine, bytes);
    ++f.exchanges;
    wait_for(first, 32, &Fiber::exchanges, f.exchanges);
    for (unsigned i = 0; i < 32; ++i) lanes[i] = cluster->fibers[first + i].slots[parity];
    return lanes;
}

}  // namespace emulate
