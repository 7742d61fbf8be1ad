/* Memory from the system, and how fast it is read. */
#define _GNU_SOURCE
#include <malloc.h>
#include <sys/mman.h>

#include "pool.h"

enum { HUGE_PAGE = 2 << 20 };

void *sleb_map(size_t bytes, int32_t huge) {
    bytes = (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
    const int access = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    if (!huge) {
        void *memory = mmap(NULL, bytes, access, flags, -1, 0);
        return memory == MAP_FAILED ? NULL : memory;
    }
    char *wide = mmap(NULL, bytes + HUGE_PAGE, access, flags, -1, 0);
    if (wide == MAP_FAILED) return NULL;
    char *start = (char *)(((uintptr_t)wide + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
    if (start > wide) munmap(wide, (size_t)(start - wide));
    if (start < wide + HUGE_PAGE) munmap(start + bytes, (size_t)(wide + HUGE_PAGE - start));
    madvise(start, bytes, MADV_HUGEPAGE);
    return start;
}

void sleb_unmap(void *memory, size_t bytes) {
    munmap(memory, (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
}

void sleb_trim(void) {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}

typedef struct {
    sleb_pool *pool;
    const char *data;
    size_t bytes;
    _Atomic uint64_t sum; /* so that the compiler may not skip the reading */
} reading;

enum { READ_CHUNK = 1 << 20 };

static void read_thread(void *argument, int32_t index) {
    (void)index;
    reading *r = argument;
    int32_t count = (int32_t)(r->bytes / READ_CHUNK), begin, end;
    typedef uint64_t line __attribute__((vector_size(64)));
    line sums[4] = {{0}, {0}, {0}, {0}};
    while (sleb_take(r->pool, count, &begin, &end)) {
        const line *from = (const line *)(r->data + (size_t)begin * READ_CHUNK);
        size_t lines = (size_t)(end - begin) * (READ_CHUNK / sizeof(line));
        for (size_t i = 0; i < lines; i += 4)
            for (size_t j = 0; j < 4; j++) sums[j] ^= from[i + j];
    }
    line all = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    uint64_t folded = 0;
    for (size_t i = 0; i < 8; i++) folded ^= all[i];
    atomic_fetch_add(&r->sum, folded);
}

uint64_t sleb_read(sleb_pool *pool, const void *data, size_t bytes) {
    reading r = {pool, data, bytes, 0};
    sleb_pool_run(pool, read_thread, &r);
    return atomic_load(&r.sum);
}
