/* Functions that glibc gave new versions (pthread_* in 2.34, logarithms in 2.29), bound to their oldest: a library
 * compiled against a new glibc then loads with one of 2.27 too, which makes its wheel manylinux. Old and new compute
 * alike; the old logarithms set errno besides. ThreadSanitizer knows its own pthread_* by their plain names. */
#ifndef SLEB_GLIBC_H
#define SLEB_GLIBC_H

#include <limits.h> /* says whether this is glibc */

#if defined(__GLIBC__) && defined(__x86_64__) && !defined(__SANITIZE_THREAD__)
#define SLEB_OLDEST(name, version) __asm__(".symver " #name ", " #name "@GLIBC_" #version);
#else
#define SLEB_OLDEST(name, version)
#endif

#endif
