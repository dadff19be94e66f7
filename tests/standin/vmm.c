/* Virtual memory management: memory, addresses and access rights, each made on its own. */

#include "driver.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct {
    int type, id;
} CUmemLocation;

typedef struct {
    int type, handle_types;
    CUmemLocation location;
    void *win32;
    unsigned char flags[8];
} CUmemAllocationProp;

typedef struct {
    CUmemLocation location;
    int flags;
} CUmemAccessDesc;

/* Lives until it is released and nothing maps it. */
static struct memory {
    CUhandle id; /* 0: this entry is free */
    int fd, gpu, references, mappings, imported, exportable;
    size_t size;
} memories[MAX_ENTRIES];

static struct reservation {
    char *at;
    size_t size;
} reservations[MAX_ENTRIES];

static struct mapping {
    char *at;
    size_t size;
    struct memory *memory;
    int access;
} mappings[MAX_ENTRIES];

static CUhandle next_id = 0x1000;

#define FD_HANDLES 1

static struct memory *find(CUhandle id)
{
    for (int i = 0; i < MAX_ENTRIES; i++)
        if (id && memories[i].id == id && memories[i].references)
            return &memories[i];
    return NULL;
}

static struct memory *new_entry(void)
{
    for (int i = 0; i < MAX_ENTRIES; i++)
        if (!memories[i].id)
            return &memories[i];
    abort();
}

static void drop_unused(struct memory *memory)
{
    if (memory->references || memory->mappings)
        return;
    drop_memory(memory->gpu, memory->imported ? 0 : memory->size, memory->fd);
    memory->id = 0;
}

int count_vmm(const char *what)
{
    int handles = 0, addresses = 0, mapped = 0;
    for (int i = 0; i < MAX_ENTRIES; i++) {
        handles += memories[i].id != 0;
        addresses += reservations[i].at != NULL;
        mapped += mappings[i].at != NULL;
    }
    if (!strcmp(what, "handles"))
        return handles;
    if (!strcmp(what, "reservations"))
        return addresses;
    return strcmp(what, "mappings") ? -1 : mapped;
}

int vmm_access(CUdeviceptr at, size_t size, int *gpu)
{
    for (struct mapping *m = mappings; m < mappings + MAX_ENTRIES; m++)
        if (m->at && at >= (CUdeviceptr)m->at && at - (CUdeviceptr)m->at < m->size &&
            size <= m->size - (at - (CUdeviceptr)m->at)) {
            *gpu = m->memory->gpu;
            return m->access;
        }
    return UNKNOWN;
}

static CUresult supported(const CUmemAllocationProp *prop)
{
    if (!attribute(102))
        return NOT_SUPPORTED;
    if (prop->type != 1 || prop->location.type != 1 || (prop->handle_types & ~FD_HANDLES))
        return INVALID_VALUE;
    if (physical(prop->location.id) < 0)
        return INVALID_DEVICE;
    return prop->handle_types && !attribute(103) ? NOT_SUPPORTED : SUCCESS;
}

CUresult cuMemGetAllocationGranularity(size_t *granularity, const CUmemAllocationProp *prop, int option)
{
    ENTER("cuMemGetAllocationGranularity", INITIALISED);
    if (option != 0 && option != 1)
        return INVALID_VALUE;
    *granularity = GRANULE;
    return supported(prop);
}

CUresult cuMemCreate(CUhandle *handle, size_t size, const CUmemAllocationProp *prop, unsigned long long flags)
{
    ENTER("cuMemCreate", INITIALISED);
    CUresult result = supported(prop);
    if (result)
        return result;
    if (!size || size % GRANULE || flags)
        return INVALID_VALUE;
    struct memory *memory = new_entry();
    int gpu = physical(prop->location.id), fd = new_memory(gpu, "vmm", size);
    if (fd < 0)
        return OUT_OF_MEMORY;
    int exportable = prop->handle_types & FD_HANDLES;
    *memory = (struct memory){.id = next_id++, .fd = fd, .gpu = gpu, .references = 1, .exportable = exportable, .size = size};
    *handle = memory->id;
    return SUCCESS;
}

CUresult cuMemRelease(CUhandle handle)
{
    ENTER("cuMemRelease", INITIALISED | RELEASES);
    struct memory *memory = find(handle);
    if (!memory)
        return INVALID_VALUE;
    memory->references--;
    drop_unused(memory);
    RELEASED();
}

CUresult cuMemExportToShareableHandle(void *shareable, CUhandle handle, int type, unsigned long long flags)
{
    ENTER("cuMemExportToShareableHandle", INITIALISED);
    struct memory *memory = find(handle);
    if (!memory || type != FD_HANDLES || !memory->exportable || flags)
        return INVALID_VALUE;
    int fd = fcntl(memory->fd, F_DUPFD, 3); /* inherited by programs that are started: the caller has to see to that */
    if (fd < 0)
        return INVALID_VALUE;
    *(int *)shareable = fd;
    return SUCCESS;
}

CUresult cuMemImportFromShareableHandle(CUhandle *handle, void *shareable, int type)
{
    ENTER("cuMemImportFromShareableHandle", INITIALISED);
    int gpu, fd = (int)(intptr_t)shareable;
    char path[64], name[64] = "";
    struct stat file;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (type != FD_HANDLES || readlink(path, name, sizeof name - 1) < 0 || fstat(fd, &file))
        return INVALID_VALUE;
    if (sscanf(name, "/memfd:standin-gpu%d-vmm", &gpu) != 1 || !strstr(name, "-vmm"))
        return INVALID_VALUE;
    if (visible(gpu) < 0)
        return NOT_SUPPORTED;
    fd = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (fd < 0)
        return INVALID_VALUE;
    struct memory *memory = new_entry();
    *memory = (struct memory){
        .id = next_id++, .fd = fd, .gpu = gpu, .references = 1, .imported = 1, .exportable = 1, .size = file.st_size};
    *handle = memory->id;
    return SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr *pointer, size_t size, size_t alignment, CUdeviceptr wish, unsigned long long flags)
{
    ENTER("cuMemAddressReserve", INITIALISED);
    (void)wish;
    if (!size || size % GRANULE || (alignment & (alignment - 1)) || alignment > GRANULE || flags)
        return INVALID_VALUE;
    struct reservation *entry = reservations;
    while (entry->at && ++entry < reservations + MAX_ENTRIES)
        ;
    if (entry == reservations + MAX_ENTRIES)
        return OUT_OF_MEMORY;
    char *at = mmap(NULL, size + GRANULE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        return OUT_OF_MEMORY;
    char *aligned = (char *)(((uintptr_t)at + GRANULE - 1) / GRANULE * GRANULE);
    if (aligned > at)
        munmap(at, aligned - at);
    munmap(aligned + size, at + GRANULE - aligned);
    *entry = (struct reservation){aligned, size};
    *pointer = (CUdeviceptr)aligned;
    return SUCCESS;
}

static int mapped_within(const char *at, size_t size)
{
    for (struct mapping *m = mappings; m < mappings + MAX_ENTRIES; m++)
        if (m->at && m->at < at + size && at < m->at + m->size)
            return 1;
    return 0;
}

CUresult cuMemAddressFree(CUdeviceptr pointer, size_t size)
{
    ENTER("cuMemAddressFree", INITIALISED | RELEASES);
    for (struct reservation *r = reservations; r < reservations + MAX_ENTRIES; r++)
        if (pointer && r->at == (char *)pointer && r->size == size && !mapped_within(r->at, size)) {
            munmap(r->at, size);
            r->at = NULL;
            RELEASED();
        }
    return INVALID_VALUE;
}

CUresult cuMemMap(CUdeviceptr pointer, size_t size, size_t offset, CUhandle handle, unsigned long long flags)
{
    ENTER("cuMemMap", INITIALISED);
    struct memory *memory = find(handle);
    char *at = (char *)pointer;
    int reserved = 0;
    for (struct reservation *r = reservations; r < reservations + MAX_ENTRIES; r++)
        reserved |= r->at && at >= r->at && at + size <= r->at + r->size;
    if (!memory || !reserved || !size || size % GRANULE || offset || size > memory->size || flags || mapped_within(at, size))
        return INVALID_VALUE;
    struct mapping *entry = mappings;
    while (entry->at && ++entry < mappings + MAX_ENTRIES)
        ;
    if (entry == mappings + MAX_ENTRIES)
        return OUT_OF_MEMORY;
    if (mmap(at, size, PROT_NONE, MAP_SHARED | MAP_FIXED, memory->fd, 0) == MAP_FAILED)
        return OUT_OF_MEMORY;
    *entry = (struct mapping){.at = at, .size = size, .memory = memory, .access = NO_ACCESS};
    memory->mappings++;
    return SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr pointer, size_t size)
{
    ENTER("cuMemUnmap", INITIALISED | RELEASES);
    for (struct mapping *m = mappings; m < mappings + MAX_ENTRIES; m++)
        if (pointer && m->at == (char *)pointer && m->size == size) {
            mmap(m->at, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
            m->at = NULL;
            m->memory->mappings--;
            drop_unused(m->memory);
            RELEASED();
        }
    return INVALID_VALUE;
}

CUresult cuMemSetAccess(CUdeviceptr pointer, size_t size, const CUmemAccessDesc *rights, size_t count)
{
    ENTER("cuMemSetAccess", INITIALISED);
    for (struct mapping *m = mappings; m < mappings + MAX_ENTRIES; m++)
        if (pointer && m->at == (char *)pointer && m->size == size) {
            if (count != 1 || rights->location.type != 1 || (rights->flags != MAY_READ && rights->flags != MAY_WRITE))
                return INVALID_VALUE;
            if (physical(rights->location.id) != m->memory->gpu)
                return INVALID_DEVICE; /* no peer access among stand-ins */
            m->access = rights->flags;
            mprotect(m->at, size, rights->flags == MAY_WRITE ? PROT_READ | PROT_WRITE : PROT_READ);
            return SUCCESS;
        }
    return INVALID_VALUE;
}
