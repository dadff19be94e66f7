/* The functions of the stand-in driver that the accelerator calls, and a context to call them in. */

#pragma once

#include "accelerator.h"

#include <c10/util/Exception.h>

#include <dlfcn.h>

namespace standin {

struct Driver {
    int (*init)(unsigned);
    int (*count)(int *);
    int (*retain)(void **, int);
    int (*push)(void *);
    int (*pop)(void **);
    int (*alloc)(uint64_t *, size_t);
    int (*free)(uint64_t);
    int (*info)(size_t *, size_t *);
    int (*host_alloc)(void **, size_t, unsigned);
    int (*host_free)(void *);
    int devices = 0;
    void *contexts[MAX_DEVICES] = {};

    Driver() {
        void *library = dlopen("libcuda.so.1", RTLD_NOW);
        TORCH_CHECK(library, "no stand-in driver: start this process with tests.standin.build.environment()");
        TORCH_CHECK(dlsym(library, "standin_live"), "libcuda.so.1 is not the stand-in; its memory is no host memory");
        auto find = [&](auto &function, const char *name) {
            function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
            TORCH_CHECK(function, "the stand-in driver has no ", name);
        };
        find(init, "cuInit"), find(count, "cuDeviceGetCount"), find(retain, "cuDevicePrimaryCtxRetain");
        find(push, "cuCtxPushCurrent_v2"), find(pop, "cuCtxPopCurrent_v2"), find(info, "cuMemGetInfo_v2");
        find(alloc, "cuMemAlloc_v2"), find(free, "cuMemFree_v2");
        find(host_alloc, "cuMemHostAlloc"), find(host_free, "cuMemFreeHost");
        if (init(0) || count(&devices))
            devices = 0;
        for (int i = 0; i < devices; i++)
            TORCH_CHECK(!retain(&contexts[i], i), "the stand-in driver refused a context on device ", i);
    }
};

inline Driver &driver() {
    static Driver *made = new Driver; /* never destroyed: tensors may live longer */
    return *made;
}

struct InContext {
    explicit InContext(int device) { TORCH_CHECK(!driver().push(driver().contexts[device]), "no context"); }
    ~InContext() { void *before; driver().pop(&before); }
};

} // namespace standin
