#define _GNU_SOURCE
#include "pool.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "glibc.h"

SLEB_OLDEST(pthread_create, 2.2.5)
SLEB_OLDEST(pthread_join, 2.2.5)
SLEB_OLDEST(pthread_setaffinity_np, 2.3.4)

typedef struct {
    sleb_pool *pool;
    int32_t index;
} worker;

enum { SPINS_BEFORE_YIELD = 4000 };

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void futex_wait(_Atomic uint32_t *word, uint32_t value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

static int64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static void await_run(sleb_pool *pool, uint32_t seen) {
    int64_t end = 0;
    for (int32_t spins = 0;; spins++) {
        if (atomic_load_explicit(&pool->generation, memory_order_acquire) != seen) return;
        if (spins < SPINS_BEFORE_YIELD) {
            relax();
            continue;
        }
        if (end == 0) end = now_ns() + pool->spin_ns;
        sched_yield(); /* whoever else wants this core has it; if nobody does, this looks again at once */
        if (now_ns() > end) break;
    }
    /* Sequentially consistent on both sides: either the waker sees the sleeper, or the sleeper the new run. */
    atomic_fetch_add(&pool->num_sleeping, 1);
    while (atomic_load(&pool->generation) == seen) futex_wait(&pool->generation, seen);
    atomic_fetch_sub(&pool->num_sleeping, 1);
}

static void *work(void *argument) {
    worker self = *(worker *)argument;
    free(argument);
    sleb_pool *pool = self.pool;
    uint32_t seen = 0;
    for (;;) {
        await_run(pool, seen);
        seen++;
        if (pool->stopping) return NULL;
        pool->task(pool->argument, self.index);
        sleb_barrier(pool);
    }
}

void sleb_barrier(sleb_pool *pool) {
    uint32_t phase = atomic_load_explicit(&pool->phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&pool->num_arrived, 1, memory_order_acq_rel) == pool->num_threads - 1) {
        atomic_store_explicit(&pool->num_arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
        atomic_store_explicit(&pool->phase, phase + 1, memory_order_release);
        return;
    }
    for (int32_t spins = 0; atomic_load_explicit(&pool->phase, memory_order_acquire) == phase; spins++) {
        if (spins < SPINS_BEFORE_YIELD)
            relax();
        else
            sched_yield();
    }
}

static void pin(pthread_t thread, int32_t cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)cpu, &set);
    pthread_setaffinity_np(thread, sizeof set, &set);
}

void sleb_pool_run(sleb_pool *pool, void (*task)(void *, int32_t), void *argument) {
    if (pool->caller_cpu >= 0 && !pthread_equal(pool->caller, pthread_self())) {
        pool->caller = pthread_self();
        pin(pool->caller, pool->caller_cpu);
    }
    pool->task = task;
    pool->argument = argument;
    if (pool->num_threads > 1) {
        atomic_fetch_add(&pool->generation, 1);
        if (atomic_load(&pool->num_sleeping) > 0) futex_wake(&pool->generation);
    }
    task(argument, 0);
    sleb_barrier(pool);
}

sleb_pool *sleb_pool_create(int32_t num_threads, const int32_t *cpus, int64_t spin_ns) {
    sleb_pool *pool = NULL;
    if (posix_memalign((void **)&pool, 64, sizeof *pool)) return NULL;
    memset(pool, 0, sizeof *pool);
    pool->num_threads = 1;
    pool->spin_ns = spin_ns;
    pool->caller_cpu = cpus ? cpus[0] : -1;
    pthread_t *threads = calloc((size_t)num_threads, sizeof *threads);
    pool->threads = threads;
    for (int32_t index = 1; index < num_threads; index++) {
        worker *self = malloc(sizeof *self);
        if (self == NULL) break;
        *self = (worker){pool, index};
        int failed = pthread_create(&threads[index], NULL, work, self);
        if (failed) {
            free(self);
            break;
        }
        if (cpus != NULL) pin(threads[index], cpus[index]);
        pool->num_threads++; /* nothing runs yet: the workers wait for the first generation */
    }
    return pool;
}

int32_t sleb_pool_num_threads(const sleb_pool *pool) { return pool->num_threads; }

void sleb_pool_destroy(sleb_pool *pool) {
    pool->stopping = 1;
    atomic_fetch_add(&pool->generation, 1);
    futex_wake(&pool->generation);
    pthread_t *threads = pool->threads;
    for (int32_t index = 1; index < pool->num_threads; index++) pthread_join(threads[index], NULL);
    free(threads);
    free(pool);
}
