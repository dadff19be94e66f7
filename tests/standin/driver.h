/* A stand-in for NVIDIA's libcuda.so.1: what its parts share. Device memory is memfd + mmap, so a device pointer is an
 * address of this process, and what the GPU's MMU would refuse is a SIGSEGV. Semantics follow NVIDIA's documentation
 * of the driver API; where that leaves something open, the stricter reading is taken. */

#ifndef STANDIN_DRIVER_H
#define STANDIN_DRIVER_H

#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>

typedef int CUresult;
typedef int CUdevice;
typedef uint64_t CUdeviceptr;
typedef uint64_t CUhandle; /* CUmemGenericAllocationHandle */
struct context;
typedef struct context *CUcontext;

enum {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    MAP_FAILED_ = 205,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_SUPPORTED = 801,
};

#define MAX_GPUS 6
#define MAX_ENTRIES 4096
#define GRANULE ((size_t)2 << 20)

/* -- record.c: the one lock, what was called, what is to fail -- */

enum { ANYTIME = 0, INITIALISED = 1, IN_CONTEXT = 2, RELEASES = 4 };

/* A failure asked for by standin_fail() comes before the call does anything; of a call that releases something, after:
 * CUDA too reports errors of earlier work there. standin_refuse() fails releases before they do anything. */
CUresult enter(const char *symbol, int needs, int *locked, CUresult *late);
void leave(int *locked);

#define ENTER(symbol, needs)                                                                                            \
    int locked __attribute__((cleanup(leave))) = 0;                                                                    \
    CUresult late = SUCCESS;                                                                                            \
    CUresult refused = enter(symbol, needs, &locked, &late);                                                            \
    (void)late;                                                                                                         \
    if (refused)                                                                                                        \
        return refused
#define RELEASED() return late

/* -- device.c: GPUs, CUDA_VISIBLE_DEVICES, contexts -- */

struct context {
    int gpu; /* physical: its place in the machine, whatever CUDA_VISIBLE_DEVICES says */
    int references;
};

CUresult ready(int needs);
CUcontext current(void);
int physical(CUdevice device); /* -1: no such device here */
CUdevice visible(int gpu);     /* -1: hidden */
int attribute(int id);
size_t memory_size(void);
int count_contexts(void);

/* -- legacy.c and vmm.c: memory -- */

extern size_t used[MAX_GPUS]; /* bytes that this process has made, by physical GPU */

int new_memory(int gpu, const char *kind, size_t size); /* a memfd full of 0xA5, -1: no room */
void drop_memory(int gpu, size_t size, int fd);
void forget_context_memory(int gpu);

/* -- ledger.c: what other processes hold -- */

size_t others_hold(int gpu); /* and stays so until `settle` has told them what this one holds */
void settle(int gpu);

enum { UNKNOWN = -1, NO_ACCESS = 0, MAY_READ = 1, MAY_WRITE = 3 };
int legacy_access(CUdeviceptr at, size_t size, int *gpu); /* of all bytes of a stretch */
int vmm_access(CUdeviceptr at, size_t size, int *gpu);
int count_legacy(const char *what);
int count_vmm(const char *what);

#endif
