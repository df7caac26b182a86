// What libgomp promises, told to ThreadSanitizer, which does not see into it: a region's threads see what was written
// before it, who comes after it sees what they wrote, and a barrier orders what lies before and after. Nothing more is
// promised, so two threads that race within a region are reported. Linked with --wrap: python_tests/sanitize.py.
#pragma once
#if defined(__SANITIZE_THREAD__)
extern "C" {
void __tsan_acquire(void*);
void __tsan_release(void*);
void __real_GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
void __real_GOMP_barrier();
}

namespace lalora {
namespace {

#define LALORA_UNSEEN __attribute__((no_sanitize("thread")))

struct Team {
    void (*body)(void*);
    void* data;
    char fork, join, barrier[2];
};
thread_local Team* team;
thread_local unsigned passed;  // barriers of this region

LALORA_UNSEEN void member(void* given) {
    team = (Team*)given, passed = 0;
    __tsan_acquire(&team->fork);
    team->body(team->data);
    __tsan_release(&team->join);
}

}  // namespace
}  // namespace lalora

extern "C" {
using namespace lalora;

LALORA_UNSEEN void __wrap_GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) {
    Team t = {body, data, 0, 0, {0, 0}};
    __tsan_release(&t.fork);
    __real_GOMP_parallel(member, &t, threads, flags);
    __tsan_acquire(&t.join);
}

// Two marks in turn: a thread that is already at the next barrier must not order itself before one still at this.
LALORA_UNSEEN void __wrap_GOMP_barrier() {
    char* mark = &team->barrier[passed++ % 2];
    __tsan_release(mark);
    __real_GOMP_barrier();
    __tsan_acquire(mark);
}
}
#endif
