/* Lets the k-th call on a file below one directory fail, or kills the process there. Loaded before the C library.

   fault_arm(directory, calls, at, how, argument) counts from 1; fault_count() tells how many there were since.
   Which calls count is a mask. The k-th one
     FAIL   returns -1 with the errno `argument`, and so does every later one where `argument` is negative
     SHORT  moves half of what was asked for (reads and writes)
     KILL   does half of a write, or nothing of another call, and ends the process by SIGKILL
     DELAY  sleeps `argument` milliseconds, at every multiple of k, and then does what it should */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { OPEN = 1, READ = 2, WRITE = 4, FSYNC = 8, RENAME = 16, UNLINK = 32, MKDIR = 64 };
enum { COUNT, FAIL, SHORT, KILL, DELAY };

static char directory[PATH_MAX];
static size_t directory_length;
static int calls, how;
static long at, argument;
static atomic_long count;

void fault_arm(const char *below, int which, long k, int what, long value) {
    calls = 0; /* nothing counts while this changes */
    strncpy(directory, below, PATH_MAX - 1);
    directory_length = strlen(directory);
    at = k, how = what, argument = value;
    atomic_store(&count, 0);
    calls = which;
}

long fault_count(void) { return atomic_load(&count); }

static int below(const char *path) {
    return path && !strncmp(path, directory, directory_length) &&
           (path[directory_length] == '/' || !path[directory_length]);
}

static int descriptor_below(int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

/* What is to become of a call that counts: COUNT where it should work. */
static int decide(int which) {
    long k = atomic_fetch_add(&count, 1) + 1;
    if (how == DELAY && at && k % at == 0) {
        struct timespec time = {argument / 1000, argument % 1000 * 1000000};
        nanosleep(&time, NULL);
        return COUNT;
    }
    if (how == FAIL && argument < 0 && k >= at) return errno = (int)-argument, FAIL;
    if (how == DELAY || how == COUNT || k != at) return COUNT;
    if (how == FAIL) errno = (int)argument;
    if (how == KILL && which != WRITE) raise(SIGKILL);
    return how;
}

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

#define OF_PATH(which, path) ((calls & (which)) && below(path) ? decide(which) : COUNT)
#define OF_DESCRIPTOR(which, descriptor) ((calls & (which)) && descriptor_below(descriptor) ? decide(which) : COUNT)

#define OPENING(name)                                                       \
    int name(const char *path, int flags, ...) {                            \
        va_list more;                                                       \
        va_start(more, flags);                                              \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, int) : 0;   \
        va_end(more);                                                       \
        if (OF_PATH(OPEN, path) == FAIL) return -1;                         \
        return REAL(name)(path, flags, mode);                               \
    }
OPENING(open)
OPENING(open64)

FILE *fopen(const char *path, const char *mode) { return OF_PATH(OPEN, path) == FAIL ? NULL : REAL(fopen)(path, mode); }
FILE *fopen64(const char *path, const char *mode) {
    return OF_PATH(OPEN, path) == FAIL ? NULL : REAL(fopen64)(path, mode);
}

ssize_t read(int descriptor, void *buffer, size_t nbytes) {
    int what = OF_DESCRIPTOR(READ, descriptor);
    if (what == FAIL) return -1;
    return REAL(read)(descriptor, buffer, what == SHORT && nbytes > 1 ? nbytes / 2 : nbytes);
}

#define READING_AT(name, offset_type)                                                              \
    ssize_t name(int descriptor, void *buffer, size_t nbytes, offset_type offset) {                \
        int what = OF_DESCRIPTOR(READ, descriptor);                                                \
        if (what == FAIL) return -1;                                                               \
        return REAL(name)(descriptor, buffer, what == SHORT && nbytes > 1 ? nbytes / 2 : nbytes, offset); \
    }
READING_AT(pread, off_t)
READING_AT(pread64, off64_t)

/* A short vectored read keeps to whole pages, as a direct one has to. */
#define READING_VECTOR(name, offset_type, more, given)                                              \
    ssize_t name(int descriptor, const struct iovec *parts, int number, offset_type offset more) { \
        int what = OF_DESCRIPTOR(READ, descriptor);                                                 \
        if (what == FAIL) return -1;                                                                \
        if (what != SHORT || number != 1 || parts->iov_len < 8192)                                  \
            return REAL(name)(descriptor, parts, number, offset given);                             \
        struct iovec half = {parts->iov_base, parts->iov_len / 2 / 4096 * 4096};                    \
        return REAL(name)(descriptor, &half, 1, offset given);                                      \
    }
#define FLAGS , int flags
#define GIVEN , flags
READING_VECTOR(preadv, off_t, , )
READING_VECTOR(preadv64, off64_t, , )
READING_VECTOR(preadv2, off_t, FLAGS, GIVEN) /* what os.preadv calls */
READING_VECTOR(preadv64v2, off64_t, FLAGS, GIVEN)

ssize_t write(int descriptor, const void *buffer, size_t nbytes) {
    int what = OF_DESCRIPTOR(WRITE, descriptor);
    if (what == FAIL) return -1;
    if (what == COUNT) return REAL(write)(descriptor, buffer, nbytes);
    ssize_t written = REAL(write)(descriptor, buffer, nbytes > 1 ? nbytes / 2 : nbytes);
    if (what == KILL) raise(SIGKILL);
    return written;
}

int fsync(int descriptor) { return OF_DESCRIPTOR(FSYNC, descriptor) == FAIL ? -1 : REAL(fsync)(descriptor); }
int fdatasync(int descriptor) { return OF_DESCRIPTOR(FSYNC, descriptor) == FAIL ? -1 : REAL(fdatasync)(descriptor); }

int rename(const char *from, const char *to) { return OF_PATH(RENAME, to) == FAIL ? -1 : REAL(rename)(from, to); }
int unlink(const char *path) { return OF_PATH(UNLINK, path) == FAIL ? -1 : REAL(unlink)(path); }
int mkdir(const char *path, mode_t mode) { return OF_PATH(MKDIR, path) == FAIL ? -1 : REAL(mkdir)(path, mode); }

/* shutil.rmtree names files by their directory's descriptor. */
int unlinkat(int directory_descriptor, const char *path, int flags) {
    return OF_DESCRIPTOR(UNLINK, directory_descriptor) == FAIL ? -1
                                                               : REAL(unlinkat)(directory_descriptor, path, flags);
}
