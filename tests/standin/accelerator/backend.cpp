/* What torch asks of a backend besides memory and kernels: its devices and random numbers. Streams do nothing. */

#include "accelerator.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace standin {
namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

Device npu(int index) { return {c10::kPrivateUse1, static_cast<DeviceIndex>(index)}; }

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return c10::kPrivateUse1; }
    Device getDevice() const override { return npu(current_device()); }
    DeviceIndex deviceCount() const noexcept override { return static_cast<DeviceIndex>(device_count()); }
    void setDevice(Device device) const override {
        if (device.has_index())
            set_current_device(device.index());
    }
    void uncheckedSetDevice(Device device) const noexcept override { setDevice(device); }
    Device exchangeDevice(Device device) const override {
        Device before = getDevice();
        setDevice(device);
        return before;
    }
    Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
    Stream getDefaultStream(Device device) const override { return getStream(device); }
    Stream getStreamFromGlobalPool(Device device, bool) const override { return getStream(device); }
    Stream getNewStream(Device device, int) const override { return getStream(device); }
    Stream exchangeStream(Stream stream) const override { return stream; }
    void record(void **, const Stream &, DeviceIndex, c10::EventFlag) const override {}
    void block(void *, const Stream &) const override {}
    bool queryEvent(void *) const override { return true; }
    bool queryStream(const Stream &) const override { return true; }
    void synchronizeStream(const Stream &) const override {}
    void synchronizeEvent(void *) const override {}
    void synchronizeDevice(DeviceIndex) const override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

/* Says that it is on a device, and draws on the CPU. */
struct Generator final : c10::GeneratorImpl {
    explicit Generator(DeviceIndex index, at::Generator drawn_by = at::detail::createCPUGenerator())
        : GeneratorImpl(npu(index < 0 ? current_device() : index), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
          cpu(std::move(drawn_by)) {}
    void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
    void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
    uint64_t get_offset() const override { return cpu.get_offset(); }
    uint64_t current_seed() const override { return cpu.current_seed(); }
    uint64_t seed() override { return cpu.seed(); }
    void set_state(const c10::TensorImpl &state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
    c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
    GeneratorImpl *clone_impl() const override { return new Generator(device().index(), cpu.clone()); }
    at::Generator cpu;
};

struct Hooks final : at::PrivateUse1HooksInterface {
    bool isBuilt() const override { return true; }
    bool isAvailable() const override { return device_count() > 0; }
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
    DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(device_count()); }
    DeviceIndex getCurrentDevice() const override { return static_cast<DeviceIndex>(current_device()); }
    void setCurrentDevice(DeviceIndex device) const override { set_current_device(device); }
    DeviceIndex exchangeDevice(DeviceIndex device) const override {
        DeviceIndex before = getCurrentDevice();
        set_current_device(device);
        return before;
    }
    DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
        return device < 0 ? getCurrentDevice() : exchangeDevice(device);
    }
    bool isPinnedPtr(const void *pointer) const override { return is_pinned(pointer); }
    c10::Allocator *getPinnedMemoryAllocator() const override { return pinned_allocator(); }
    at::Generator getNewGenerator(DeviceIndex index) const override { return at::make_generator<Generator>(index); }
    const at::Generator &getDefaultGenerator(DeviceIndex index) const override {
        static auto *made = new at::Generator[MAX_DEVICES];
        at::Generator &found = made[index < 0 ? current_device() : index];
        if (!found.defined())
            found = getNewGenerator(index);
        return found;
    }
};

const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

} // namespace

at::Generator cpu_generator(const at::Generator &generator) {
    return generator.device().is_privateuseone() ? generator.get<Generator>()->cpu : generator;
}

} // namespace standin

/* -- for torch_npu, by ctypes; it knows which devices there are -- */

extern "C" {
int standin_npu_count() { return standin::device_count(); }
int standin_npu_current() { return standin::current_device(); }
void standin_npu_set_current(int device) { standin::set_current_device(device); }
int standin_npu_owns(int device, const void *pointer) { return standin::owns(device, pointer); }
void standin_npu_stats(int device, standin::Stats *into) { *into = standin::figures(device); }
void standin_npu_reset(int device) { standin::begin_figures_anew(device); }
void standin_npu_empty_cache() { standin::empty_cache(); }
void standin_npu_memory(int device, size_t *free, size_t *total) { standin::memory_of(device, free, total); }
}
