/* A stand-in accelerator for torch: its PrivateUse1 backend, on the memory of the stand-in driver. What its parts share.
 *
 * Device memory is memory of this process, so CPU kernels compute on it in place; what torch sees is another device. */

#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>

namespace at {
struct Generator;
}

namespace standin {

constexpr int MAX_DEVICES = 6;

/* Mirrored by torch_npu/_library.py. All but `reserved` and its peak tell of tensors. */
struct Stats {
    int64_t allocated, allocated_peak; /* bytes of live tensors */
    int64_t reserved, reserved_peak;   /* bytes taken from the driver */
    int64_t live, allocations;         /* how many there are, how many there were */
    int64_t largest;                   /* bytes of the largest allocation since the last reset */
    int64_t ooms;
    int64_t to_device, to_device_bytes, to_device_largest; /* copies from other devices' memory */
    int64_t from_device, from_device_bytes, from_device_largest;
};

/* -- memory.cpp -- */

int device_count();
int current_device();
void set_current_device(int device);
Stats figures(int device);
void begin_figures_anew(int device); /* peaks at what is, counts at 0 */
void copied(int device, bool to_device, int64_t nbytes);
void memory_of(int device, size_t *free, size_t *total); /* as the driver says */
void empty_cache();

/* Memory of a device; `seen_as` is what a tensor over it says. Raises OutOfMemoryError. */
c10::DataPtr allocate(int device, size_t nbytes, c10::Device seen_as);
bool owns(int device, const void *pointer);
c10::Allocator *device_allocator(); /* of the current device */
c10::Allocator *pinned_allocator();
bool is_pinned(const void *pointer);

/* While one lives, what CPU kernels allocate in this thread is memory of that device: results, and their workspace. */
struct AllocateOn {
    explicit AllocateOn(int device);
    ~AllocateOn();
    int before;
};

/* -- backend.cpp -- */

at::Generator cpu_generator(const at::Generator &generator);

} // namespace standin
