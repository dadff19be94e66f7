/* cuMemAlloc and what belongs to it: copies, page-locked memory, and the older kind of IPC. */

#include "driver.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Allocations under 2 MiB share blocks of 2 MiB; larger ones have a block each. A handle names a whole block. */
static struct block {
    char *at; /* NULL: this entry is free */
    size_t size, next;
    int gpu, fd, allocations, shared;
} blocks[MAX_ENTRIES];

static struct allocation {
    char *at;
    size_t size;
    struct block *block;
} allocations[MAX_ENTRIES];

static struct import {
    char *at;
    size_t size;
    ino_t inode;
    int gpu, references;
} imports[MAX_ENTRIES];

static struct pinned {
    void *at;
    size_t size;
} pinned[MAX_ENTRIES];

typedef union {
    char reserved[64];
    struct {
        char magic[8];
        int pid, fd, gpu;
        size_t size;
        ino_t inode;
    };
} CUipcMemHandle;

size_t used[MAX_GPUS];

#define FREE_ENTRY(table)                                                                                               \
    ({                                                                                                                  \
        __typeof__(&table[0]) entry = table;                                                                            \
        while (entry->at && ++entry < table + MAX_ENTRIES)                                                              \
            ;                                                                                                           \
        if (entry == table + MAX_ENTRIES)                                                                               \
            abort();                                                                                                    \
        entry;                                                                                                          \
    })

#define COUNT(table)                                                                                                    \
    ({                                                                                                                  \
        int count = 0;                                                                                                  \
        for (int i = 0; i < MAX_ENTRIES; i++)                                                                           \
            count += table[i].at != NULL;                                                                               \
        count;                                                                                                          \
    })

int count_legacy(const char *what)
{
    if (!strcmp(what, "allocations"))
        return COUNT(allocations);
    if (!strcmp(what, "imports"))
        return COUNT(imports);
    return strcmp(what, "pinned") ? -1 : COUNT(pinned);
}

static size_t room(int gpu)
{
    size_t taken = used[gpu] + others_hold(gpu);
    return taken < memory_size() ? memory_size() - taken : 0;
}

static int book(int gpu, size_t size)
{
    int fits = size <= room(gpu);
    used[gpu] += fits ? size : 0;
    settle(gpu);
    return fits;
}

int new_memory(int gpu, const char *kind, size_t size)
{
    if (!book(gpu, size))
        return -1;
    char name[64];
    snprintf(name, sizeof name, "standin-gpu%d-%s", gpu, kind);
    int fd = memfd_create(name, MFD_CLOEXEC);
    void *at = fd < 0 || ftruncate(fd, size) ? MAP_FAILED : mmap(NULL, size, PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) {
        drop_memory(gpu, size, fd);
        return -1;
    }
    memset(at, 0xA5, size); /* whatever was there before: a GPU clears nothing either */
    munmap(at, size);
    return fd;
}

void drop_memory(int gpu, size_t size, int fd)
{
    others_hold(gpu);
    used[gpu] -= size;
    settle(gpu);
    if (fd >= 0)
        close(fd);
}

static struct block *new_block(int gpu, size_t size, int shared)
{
    struct block *block = FREE_ENTRY(blocks);
    int fd = new_memory(gpu, "block", size);
    if (fd < 0)
        return NULL;
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) {
        drop_memory(gpu, size, fd);
        return NULL;
    }
    *block = (struct block){.at = at, .size = size, .gpu = gpu, .fd = fd, .shared = shared};
    return block;
}

static struct block *block_with_room(int gpu, size_t size)
{
    for (struct block *block = blocks; block < blocks + MAX_ENTRIES; block++)
        if (block->at && block->shared && block->gpu == gpu && block->size - block->next >= size)
            return block;
    return new_block(gpu, GRANULE, 1);
}

static void drop_allocation(struct allocation *allocation)
{
    struct block *block = allocation->block;
    memset(allocation->at, 0xDD, allocation->size); /* whoever still maps it sees that it is not his any more */
    allocation->at = NULL;
    if (--block->allocations)
        return;
    munmap(block->at, block->size);
    drop_memory(block->gpu, block->size, block->fd);
    block->at = NULL;
}

void forget_context_memory(int gpu)
{
    for (int i = 0; i < MAX_ENTRIES; i++)
        if (allocations[i].at && allocations[i].block->gpu == gpu)
            drop_allocation(&allocations[i]);
}

static int inside(CUdeviceptr at, size_t size, const char *base, size_t length)
{
    CUdeviceptr start = (CUdeviceptr)base;
    return base && at >= start && at - start < length && size <= length - (at - start);
}

int legacy_access(CUdeviceptr at, size_t size, int *gpu)
{
    for (int i = 0; i < MAX_ENTRIES; i++) {
        if (inside(at, size, allocations[i].at, allocations[i].size)) {
            *gpu = allocations[i].block->gpu;
            return MAY_WRITE;
        }
        if (inside(at, size, imports[i].at, imports[i].size)) {
            *gpu = imports[i].gpu;
            return MAY_WRITE; /* nothing in the older kind of IPC can forbid it */
        }
    }
    return UNKNOWN;
}

CUresult cuMemAlloc_v2(CUdeviceptr *pointer, size_t size)
{
    ENTER("cuMemAlloc", IN_CONTEXT);
    if (!size)
        return INVALID_VALUE;
    int gpu = current()->gpu;
    size_t rounded = size < GRANULE ? (size + 511) / 512 * 512 : (size + GRANULE - 1) / GRANULE * GRANULE;
    if (rounded < size)
        return OUT_OF_MEMORY;
    struct block *block = size < GRANULE ? block_with_room(gpu, rounded) : new_block(gpu, rounded, 0);
    if (!block)
        return OUT_OF_MEMORY;
    struct allocation *allocation = FREE_ENTRY(allocations);
    *allocation = (struct allocation){.at = block->at + block->next, .size = size, .block = block};
    block->next += rounded;
    block->allocations++;
    *pointer = (CUdeviceptr)allocation->at;
    return SUCCESS;
}

CUresult cuMemFree_v2(CUdeviceptr pointer)
{
    ENTER("cuMemFree", IN_CONTEXT | RELEASES);
    for (int i = 0; i < MAX_ENTRIES; i++)
        if (pointer && allocations[i].at == (char *)pointer) {
            drop_allocation(&allocations[i]);
            RELEASED();
        }
    return INVALID_VALUE;
}

CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total)
{
    ENTER("cuMemGetInfo", IN_CONTEXT);
    *total = memory_size();
    *free_bytes = room(current()->gpu);
    settle(current()->gpu);
    return SUCCESS;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr pointer)
{
    ENTER("cuMemGetAddressRange", IN_CONTEXT);
    for (int i = 0; i < MAX_ENTRIES; i++) {
        char *at = NULL;
        size_t length = 0;
        if (inside(pointer, 1, allocations[i].at, allocations[i].size))
            at = allocations[i].block->at, length = allocations[i].block->size;
        else if (inside(pointer, 1, imports[i].at, imports[i].size))
            at = imports[i].at, length = imports[i].size;
        if (at) {
            if (base)
                *base = (CUdeviceptr)at;
            if (size)
                *size = length;
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

static CUresult may(CUdeviceptr at, size_t size)
{
    int gpu, access = legacy_access(at, size, &gpu);
    if (access == UNKNOWN)
        access = vmm_access(at, size, &gpu);
    return access == UNKNOWN || access == NO_ACCESS ? INVALID_VALUE : SUCCESS;
}

/* Writing where only reading is allowed is the GPU's page fault: here it is the kernel's, and ends the process. */
CUresult cuMemcpyHtoD_v2(CUdeviceptr target, const void *source, size_t size)
{
    ENTER("cuMemcpyHtoD", IN_CONTEXT);
    CUresult result = may(target, size);
    if (result == SUCCESS)
        memcpy((void *)target, source, size);
    return result;
}

CUresult cuMemcpyDtoH_v2(void *target, CUdeviceptr source, size_t size)
{
    ENTER("cuMemcpyDtoH", IN_CONTEXT);
    CUresult result = may(source, size);
    if (result == SUCCESS)
        memcpy(target, (void *)source, size);
    return result;
}

CUresult cuMemsetD8_v2(CUdeviceptr target, unsigned char value, size_t size)
{
    ENTER("cuMemsetD8", IN_CONTEXT);
    CUresult result = may(target, size);
    if (result == SUCCESS)
        memset((void *)target, value, size);
    return result;
}

CUresult cuMemHostAlloc(void **pointer, size_t size, unsigned flags)
{
    ENTER("cuMemHostAlloc", IN_CONTEXT);
    if (!size || flags > 7)
        return INVALID_VALUE;
    struct pinned *entry = FREE_ENTRY(pinned);
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED)
        return OUT_OF_MEMORY;
    *entry = (struct pinned){at, size};
    *pointer = at;
    return SUCCESS;
}

CUresult cuMemFreeHost(void *pointer)
{
    ENTER("cuMemFreeHost", IN_CONTEXT | RELEASES);
    for (int i = 0; i < MAX_ENTRIES; i++)
        if (pointer && pinned[i].at == pointer) {
            munmap(pointer, pinned[i].size);
            pinned[i].at = NULL;
            RELEASED();
        }
    return INVALID_VALUE;
}

/* -- IPC ------------------------------------------------------------------------------------------------------------ */

CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr pointer)
{
    ENTER("cuIpcGetMemHandle", IN_CONTEXT);
    for (int i = 0; i < MAX_ENTRIES; i++)
        if (pointer && allocations[i].at == (char *)pointer) {
            struct block *block = allocations[i].block;
            struct stat file;
            if (fstat(block->fd, &file))
                return MAP_FAILED_;
            memset(handle, 0, sizeof *handle);
            memcpy(handle->magic, "standin", 8);
            handle->pid = getpid();
            handle->fd = block->fd;
            handle->gpu = block->gpu;
            handle->size = block->size;
            handle->inode = file.st_ino;
            return SUCCESS;
        }
    return INVALID_VALUE;
}

/* The exporter's memory, found by its pid: in another PID namespace that is nobody, or somebody else. */
static char *reach(const CUipcMemHandle *handle)
{
    char path[64];
    struct stat file;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle->pid, handle->fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return NULL;
    void *at = MAP_FAILED;
    if (!fstat(fd, &file) && file.st_ino == handle->inode && (size_t)file.st_size == handle->size)
        at = mmap(NULL, handle->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return at == MAP_FAILED ? NULL : at;
}

CUresult cuIpcOpenMemHandle_v2(CUdeviceptr *pointer, CUipcMemHandle handle, unsigned flags)
{
    ENTER("cuIpcOpenMemHandle", IN_CONTEXT);
    if (flags != 1 || memcmp(handle.magic, "standin", 8))
        return INVALID_VALUE;
    if (handle.pid == getpid())
        return INVALID_CONTEXT;
    if (handle.gpu != current()->gpu)
        return MAP_FAILED_; /* no peer access among stand-ins */
    for (int i = 0; i < MAX_ENTRIES; i++)
        if (imports[i].at && imports[i].inode == handle.inode) {
            imports[i].references++;
            *pointer = (CUdeviceptr)imports[i].at;
            return SUCCESS;
        }
    struct import *import = FREE_ENTRY(imports);
    char *at = reach(&handle);
    if (!at)
        return INVALID_VALUE;
    *import = (struct import){.at = at, .size = handle.size, .inode = handle.inode, .gpu = handle.gpu, .references = 1};
    *pointer = (CUdeviceptr)at;
    return SUCCESS;
}

CUresult cuIpcCloseMemHandle(CUdeviceptr pointer)
{
    ENTER("cuIpcCloseMemHandle", IN_CONTEXT | RELEASES);
    for (int i = 0; i < MAX_ENTRIES; i++)
        if (pointer && imports[i].at == (char *)pointer) {
            if (!--imports[i].references) {
                munmap(imports[i].at, imports[i].size);
                imports[i].at = NULL;
            }
            RELEASED();
        }
    return INVALID_VALUE;
}
