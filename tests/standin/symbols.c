/* How cuda-bindings finds the functions: cuGetProcAddress, with names that carry no version. */

#include "driver.h"

#include <dlfcn.h>
#include <stdio.h>

CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status)
{
    (void)version;
    (void)flags;
    char newer[128];
    snprintf(newer, sizeof newer, "%s_v2", symbol);
    void *library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    *function = library ? dlsym(library, newer) : NULL;
    if (library && !*function)
        *function = dlsym(library, symbol);
    if (library)
        dlclose(library);
    if (status)
        *status = *function ? 0 : 1; /* 1: no such symbol */
    return *function ? SUCCESS : NOT_FOUND;
}

static const struct {
    CUresult error;
    const char *name;
} names[] = {
    {SUCCESS, "CUDA_SUCCESS"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
    {MAP_FAILED_, "CUDA_ERROR_MAP_FAILED"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"},
};

CUresult cuGetErrorName(CUresult error, const char **name)
{
    *name = NULL;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].error == error)
            *name = names[i].name;
    return *name ? SUCCESS : INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text)
{
    return cuGetErrorName(error, text);
}
