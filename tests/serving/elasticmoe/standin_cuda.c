/* A stand-in for libcuda.so.1 on machines without a GPU: the memory part of the driver's interface over memfd and mmap, stricter than a
 * driver. Handles are memfds, so they cross processes as a driver's do; "device" memory is main memory, and the driver says so of it.
 *
 * Refused: offsets, misaligned sizes, mapping outside of a reservation, over a mapping or a part of an allocation, copies of memory that is
 * not mapped and accessible, host memory that is not pinned, calls before cuInit, without a context, or in a fork of the process that called
 * cuInit. Counted: everything that is held (standin_held). Failing on purpose: standin_fail(name, n) lets the n-th call from now fail once.
 *
 * STANDIN_GPUS (1): how many there are. STANDIN_BYTES (2^40): memory of each.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, INVALID_HANDLE = 400 };
enum { MOST = 4096, MOST_GPUS = 8, STACK = 16 };
#define PAGE ((size_t)2 << 20)

typedef struct { int type, id; } Location;
typedef struct { Location location; int flags; } Access;
typedef struct {
    int type, handle_types;
    Location location;
    void *win32;
    struct { unsigned char compression, rdma; unsigned short usage; unsigned char reserved[4]; } flags;
} Properties;
typedef struct { int is_used, fd, gpu, is_ours, handles, mappings; size_t size; } Memory;
typedef struct { uintptr_t start; size_t size; } Span;
typedef struct { uintptr_t start; size_t size; int memory, is_accessible; } Mapping;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pid_t initialized_by;
static int gpus = 1, retained[MOST_GPUS], streams;
static size_t limit, used[MOST_GPUS];
static Memory memories[MOST];
static Span reservations[MOST], pinned[MOST];
static Mapping mappings[MOST];
static __thread uintptr_t contexts[STACK];
static __thread int depth;
static char fail_name[64];
static int fail_after;

static int enter(const char *name, int needs_context) {
    if (initialized_by != getpid()) return NOT_INITIALIZED;
    if (needs_context && !depth) return INVALID_CONTEXT;
    pthread_mutex_lock(&lock);
    int fails = !strcmp(name, fail_name) && !--fail_after;
    if (fails) fail_name[0] = 0;
    pthread_mutex_unlock(&lock);
    return fails ? OUT_OF_MEMORY : OK;
}

#define ENTER(needs_context) do { int code_ = enter(__func__, needs_context); if (code_) return code_; } while (0)
#define NEED(condition) do { if (!(condition)) return INVALID_VALUE; } while (0)
#define NEED_LOCKED(condition) do { if (!(condition)) { pthread_mutex_unlock(&lock); return INVALID_VALUE; } } while (0)

void standin_fail(const char *name, int after) {
    snprintf(fail_name, sizeof fail_name, "%s", name);
    fail_after = after;
}

/* handles, mappings, reservations, pinned buffers, streams, contexts, bytes of memory that was made here */
void standin_held(long long *held) {
    memset(held, 0, 7 * sizeof *held);
    for (int each = 0; each < MOST; each++) {
        held[0] += memories[each].handles;
        held[1] += mappings[each].size != 0;
        held[2] += reservations[each].size != 0;
        held[3] += pinned[each].size != 0;
    }
    held[4] = streams;
    for (int gpu = 0; gpu < gpus; gpu++) { held[5] += retained[gpu]; held[6] += used[gpu]; }
}

int cuInit(unsigned flags) {
    NEED(!flags);
    const char *count = getenv("STANDIN_GPUS"), *bytes = getenv("STANDIN_BYTES");
    gpus = count ? atoi(count) : 1;
    limit = bytes ? strtoull(bytes, 0, 10) : (size_t)1 << 40;
    initialized_by = getpid();
    return OK;
}

int cuGetErrorString(int code, const char **text) {
    *text = code == INVALID_VALUE ? "invalid argument" : code == OUT_OF_MEMORY ? "out of memory" : code == NOT_INITIALIZED
        ? "initialization error" : code == INVALID_CONTEXT ? "invalid device context" : "another error";
    return OK;
}

int cuDeviceGetCount(int *count) { ENTER(0); *count = gpus; return OK; }

int cuDeviceGet(int *device, int gpu) {
    ENTER(0);
    if (gpu < 0 || gpu >= gpus) return INVALID_DEVICE;
    *device = gpu;
    return OK;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER(0);
    if (device < 0 || device >= gpus) return INVALID_DEVICE;
    *value = (attribute == 102 || attribute == 103) && !getenv("STANDIN_IS_OLD");
    return OK;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    ENTER(0);
    if (device < 0 || device >= gpus) return INVALID_DEVICE;
    retained[device]++;
    *context = (void *)(uintptr_t)(device + 1);
    return OK;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    ENTER(0);
    if (device < 0 || device >= gpus || !retained[device]) return INVALID_CONTEXT;
    retained[device]--;
    return OK;
}

int cuCtxPushCurrent_v2(void *context) {
    ENTER(0);
    uintptr_t gpu = (uintptr_t)context;
    if (!gpu || gpu > (uintptr_t)gpus || !retained[gpu - 1] || depth == STACK) return INVALID_CONTEXT;
    contexts[depth++] = gpu;
    return OK;
}

int cuCtxPopCurrent_v2(void **context) {
    ENTER(1);
    *context = (void *)contexts[--depth];
    return OK;
}

int cuCtxSynchronize(void) { ENTER(1); return OK; }

int cuMemGetInfo_v2(size_t *unused, size_t *total) {
    ENTER(1);
    *total = limit;
    *unused = limit - used[contexts[depth - 1] - 1];
    return OK;
}

static int right(const Properties *properties) {
    return properties->type == 1 && properties->handle_types == 1 && properties->location.type == 1 && properties->location.id >= 0
        && properties->location.id < gpus && !properties->win32;
}

int cuMemGetAllocationGranularity(size_t *size, const Properties *properties, int option) {
    ENTER(0);
    NEED(right(properties) && (option == 0 || option == 1));
    *size = PAGE;
    return OK;
}

static int remember(int fd, int gpu, int is_ours, size_t size) {
    for (int each = 0; each < MOST; each++)
        if (!memories[each].is_used) {
            memories[each] = (Memory){1, fd, gpu, is_ours, 1, 0, size};
            return each;
        }
    abort();
}

static void forget_if_unused(int each) {
    Memory *memory = &memories[each];
    if (memory->handles || memory->mappings) return;
    close(memory->fd);
    if (memory->is_ours) used[memory->gpu] -= memory->size;
    memory->is_used = 0;
}

int cuMemCreate(unsigned long long *handle, size_t size, const Properties *properties, unsigned long long flags) {
    ENTER(0);
    NEED(size && size % PAGE == 0 && right(properties) && !flags);
    pthread_mutex_lock(&lock);
    int gpu = properties->location.id, code = OUT_OF_MEMORY;
    if (used[gpu] + size <= limit) {
        int fd = memfd_create("standin", MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, size)) abort();
        used[gpu] += size;
        *handle = 1 + remember(fd, gpu, 1, size);
        code = OK;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

static Memory *of_handle(unsigned long long handle) {
    return handle && handle <= MOST && memories[handle - 1].is_used && memories[handle - 1].handles ? &memories[handle - 1] : 0;
}

int cuMemRelease(unsigned long long handle) {
    ENTER(0);
    pthread_mutex_lock(&lock);
    Memory *memory = of_handle(handle);
    NEED_LOCKED(memory);
    memory->handles--;
    forget_if_unused(handle - 1);
    pthread_mutex_unlock(&lock);
    return OK;
}

int cuMemExportToShareableHandle(void *result, unsigned long long handle, int type, unsigned long long flags) {
    ENTER(0);
    pthread_mutex_lock(&lock);
    Memory *memory = of_handle(handle);
    NEED_LOCKED(memory && type == 1 && !flags);
    *(int *)result = dup(memory->fd);
    pthread_mutex_unlock(&lock);
    return OK;
}

int cuMemImportFromShareableHandle(unsigned long long *handle, void *file, int type) {
    ENTER(0);
    struct stat found;
    NEED(type == 1 && !fstat((int)(intptr_t)file, &found) && found.st_size);
    pthread_mutex_lock(&lock);
    *handle = 1 + remember(dup((int)(intptr_t)file), 0, 0, found.st_size);
    pthread_mutex_unlock(&lock);
    return OK;
}

int cuMemAddressReserve(uintptr_t *address, size_t size, size_t alignment, uintptr_t wanted, unsigned long long flags) {
    ENTER(0);
    NEED(size && size % PAGE == 0 && !alignment && !wanted && !flags);
    char *found = mmap(0, size + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) return OUT_OF_MEMORY;
    uintptr_t start = ((uintptr_t)found + PAGE - 1) / PAGE * PAGE;
    if (start > (uintptr_t)found) munmap(found, start - (uintptr_t)found);
    munmap((void *)(start + size), (uintptr_t)found + PAGE - start);
    pthread_mutex_lock(&lock);
    for (int each = 0; each < MOST; each++)
        if (!reservations[each].size) { reservations[each] = (Span){start, size}; break; }
    pthread_mutex_unlock(&lock);
    *address = start;
    return OK;
}

static int meets(uintptr_t start, size_t size, uintptr_t other, size_t other_size) {
    return start < other + other_size && other < start + size;
}

int cuMemAddressFree(uintptr_t start, size_t size) {
    ENTER(0);
    pthread_mutex_lock(&lock);
    int found = -1;
    for (int each = 0; each < MOST; each++) {
        if (reservations[each].start == start && reservations[each].size == size) found = each;
        NEED_LOCKED(!mappings[each].size || !meets(start, size, mappings[each].start, mappings[each].size));
    }
    NEED_LOCKED(size && found >= 0);
    reservations[found].size = 0;
    munmap((void *)start, size);
    pthread_mutex_unlock(&lock);
    return OK;
}

int cuMemMap(uintptr_t start, size_t size, size_t offset, unsigned long long handle, unsigned long long flags) {
    ENTER(0);
    pthread_mutex_lock(&lock);
    Memory *memory = of_handle(handle);
    NEED_LOCKED(memory && !offset && !flags && start % PAGE == 0 && size == memory->size);
    int is_inside = 0, place = -1;
    for (int each = MOST - 1; each >= 0; each--) {
        Span *span = &reservations[each];
        is_inside |= span->size && start >= span->start && start + size <= span->start + span->size;
        if (!mappings[each].size) place = each;
        else NEED_LOCKED(!meets(start, size, mappings[each].start, mappings[each].size));
    }
    NEED_LOCKED(is_inside && place >= 0);
    if (mmap((void *)start, size, PROT_NONE, MAP_SHARED | MAP_FIXED, memory->fd, 0) == MAP_FAILED) abort();
    mappings[place] = (Mapping){start, size, handle - 1, 0};
    memory->mappings++;
    pthread_mutex_unlock(&lock);
    return OK;
}

int cuMemUnmap(uintptr_t start, size_t size) {
    ENTER(0);
    pthread_mutex_lock(&lock);
    int found = -1;
    for (int each = 0; each < MOST; each++)
        if (mappings[each].size && mappings[each].start == start && mappings[each].size == size) found = each;
    NEED_LOCKED(found >= 0);
    mmap((void *)start, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    memories[mappings[found].memory].mappings--;
    forget_if_unused(mappings[found].memory);
    mappings[found].size = 0;
    pthread_mutex_unlock(&lock);
    return OK;
}

/* How many bytes of the range are mapped, and accessible where that is asked for. */
static size_t covered(uintptr_t start, size_t size, int is_accessible) {
    size_t sum = 0;
    for (int each = 0; each < MOST; each++) {
        Mapping *one = &mappings[each];
        if (!one->size || !meets(start, size, one->start, one->size) || (is_accessible && !one->is_accessible)) continue;
        uintptr_t from = start > one->start ? start : one->start, to = one->start + one->size;
        sum += (start + size < to ? start + size : to) - from;
    }
    return sum;
}

int cuMemSetAccess(uintptr_t start, size_t size, const Access *access, size_t count) {
    ENTER(0);
    NEED(count == 1 && access->location.type == 1 && access->location.id >= 0 && access->location.id < gpus && access->flags == 3);
    pthread_mutex_lock(&lock);
    NEED_LOCKED(size && covered(start, size, 0) == size);
    for (int each = 0; each < MOST; each++)  /* whole mappings only */
        NEED_LOCKED(!mappings[each].size || !meets(start, size, mappings[each].start, mappings[each].size)
                    || (mappings[each].start >= start && mappings[each].start + mappings[each].size <= start + size));
    for (int each = 0; each < MOST; each++)
        if (mappings[each].size && meets(start, size, mappings[each].start, mappings[each].size)) mappings[each].is_accessible = 1;
    mprotect((void *)start, size, PROT_READ | PROT_WRITE);
    pthread_mutex_unlock(&lock);
    return OK;
}

static int is_device(uintptr_t start, size_t size) {
    pthread_mutex_lock(&lock);
    int result = covered(start, size, 1) == size;
    pthread_mutex_unlock(&lock);
    return result;
}

int cuPointerGetAttribute(void *value, int attribute, uintptr_t address) {
    ENTER(0);
    NEED(attribute == 2 && is_device(address, 1));
    *(unsigned *)value = 1;  /* CU_MEMORYTYPE_HOST: so it is */
    return OK;
}

int cuMemHostAlloc(void **address, size_t size, unsigned flags) {
    ENTER(1);
    NEED(size && !flags);
    *address = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    pthread_mutex_lock(&lock);
    for (int each = 0; each < MOST; each++)
        if (!pinned[each].size) { pinned[each] = (Span){(uintptr_t)*address, size}; break; }
    pthread_mutex_unlock(&lock);
    return OK;
}

int cuMemFreeHost(void *address) {
    ENTER(1);
    for (int each = 0; each < MOST; each++)
        if (pinned[each].size && pinned[each].start == (uintptr_t)address) {
            pinned[each].size = 0;
            free(address);
            return OK;
        }
    return INVALID_VALUE;
}

static int is_pinned(const void *address, size_t size) {
    uintptr_t start = (uintptr_t)address;
    for (int each = 0; each < MOST; each++)
        if (pinned[each].size && start >= pinned[each].start && start + size <= pinned[each].start + pinned[each].size) return 1;
    return 0;
}

/* What a stream was told, oldest first. Handles of streams are used by one thread at a time. */
typedef struct Work { struct Work *next; uintptr_t target, source; unsigned char value; size_t size; } Work;
typedef struct { Work *first, **last; } Stream;

int cuStreamCreate(void **result, unsigned flags) {
    ENTER(1);
    NEED(flags <= 1);
    Stream *stream = calloc(1, sizeof *stream);
    stream->last = &stream->first;
    __sync_fetch_and_add(&streams, 1);
    *result = stream;
    return OK;
}

int cuStreamSynchronize(void *which) {
    ENTER(1);
    NEED(which);
    Stream *stream = which;
    while (stream->first) {
        Work *work = stream->first;
        if (work->source) memcpy((void *)work->target, (void *)work->source, work->size);
        else memset((void *)work->target, work->value, work->size);
        stream->first = work->next;
        free(work);
    }
    stream->last = &stream->first;
    return OK;
}

int cuStreamDestroy_v2(void *which) {
    ENTER(1);
    NEED(which && !((Stream *)which)->first);
    __sync_fetch_and_sub(&streams, 1);
    free(which);
    return OK;
}

static int later(void *which, uintptr_t target, uintptr_t source, unsigned char value, size_t size) {
    Stream *stream = which;
    Work *work = malloc(sizeof *work);
    *work = (Work){0, target, source, value, size};
    *stream->last = work;
    stream->last = &work->next;
    return OK;
}

int cuMemcpyHtoDAsync_v2(uintptr_t target, const void *host, size_t size, void *stream) {
    ENTER(1);
    NEED(stream && is_pinned(host, size) && is_device(target, size));
    return later(stream, target, (uintptr_t)host, 0, size);
}

int cuMemcpyDtoDAsync_v2(uintptr_t target, uintptr_t source, size_t size, void *stream) {
    ENTER(1);
    NEED(stream && is_device(target, size) && is_device(source, size));
    return later(stream, target, source, 0, size);
}

int cuMemcpyPeerAsync(uintptr_t target, void *here, uintptr_t source, void *there, size_t size, void *stream) {
    NEED(here && there && here != there);
    return cuMemcpyDtoDAsync_v2(target, source, size, stream);
}

int cuMemsetD8Async(uintptr_t target, unsigned char value, size_t size, void *stream) {
    ENTER(1);
    NEED(stream && is_device(target, size));
    return later(stream, target, 0, value, size);
}
