/* Threads that run one function together, with barriers and shared loops inside it.
 *
 * The caller is thread 0. A thread that waits spins for a while, since the next phase is microseconds away, then
 * offers its core to others between looks: a spinning thread must never keep one from the thread that it waits for.
 * Not OpenMP: torch's threads of it would be a second set on the same cores, and its barrier costs more than a phase.
 */
#ifndef SLEB_POOL_H
#define SLEB_POOL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "sleb_cpu.h"

struct sleb_pool {
    int64_t spin_ns; /* how long an idle thread looks for work before it sleeps */
    int32_t num_threads, stopping, caller_cpu; /* caller_cpu: -1 when it is not pinned */
    pthread_t *threads, caller;
    void (*task)(void *, int32_t);
    void *argument;
    _Alignas(64) _Atomic uint32_t generation; /* a futex: grows with each run */
    _Alignas(64) _Atomic int32_t num_sleeping;
    _Alignas(64) _Atomic int32_t num_arrived;
    _Alignas(64) _Atomic uint32_t phase; /* grows with each barrier */
    _Alignas(64) _Atomic int32_t next;   /* of the shared loop under way */
};

void sleb_pool_run(sleb_pool *pool, void (*task)(void *, int32_t), void *argument);

/* Waits until all threads are here. The shared loop starts anew. */
void sleb_barrier(sleb_pool *pool);

/* The next chunk [*begin, *end) of a loop over `count`; 0 when nothing is left. A barrier must follow the loop.
 * Chunks begin large and end with one item, so that a thread that the system holds up delays the others by one item. */
static inline int sleb_take(sleb_pool *pool, int32_t count, int32_t *begin, int32_t *end) {
    if (pool->num_threads == 1) { /* all of it, once */
        int32_t first = atomic_load_explicit(&pool->next, memory_order_relaxed);
        if (first >= count) return 0;
        atomic_store_explicit(&pool->next, count, memory_order_relaxed);
        *begin = first, *end = count;
        return 1;
    }
    int32_t first = atomic_load_explicit(&pool->next, memory_order_relaxed);
    for (;;) {
        if (first >= count) return 0;
        int32_t chunk = (count - first) / (2 * pool->num_threads);
        if (chunk < 1) chunk = 1;
        if (atomic_compare_exchange_weak_explicit(&pool->next, &first, first + chunk, memory_order_relaxed,
                                                  memory_order_relaxed)) {
            *begin = first, *end = first + chunk;
            return 1;
        }
    }
}

#endif
