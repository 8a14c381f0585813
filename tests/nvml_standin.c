/* A stand-in for NVIDIA's libnvidia-ml.so.1, for machines without a GPU: it serves a few devices whose energy
 * counters advance with the wall clock at a constant power. The scenario comes from environment variables:
 *   STANDIN_GPUS         number of devices
 *   STANDIN_POWER_W      power of each device, in W
 *   STANDIN_NO_COUNTER   index of a device without an energy counter
 *   STANDIN_LOST_AFTER_S seconds after which every reading fails with GPU_IS_LOST
 * MIG-0 is an instance of device 0.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, GPU_IS_LOST = 15, MAX_GPUS = 16 };
typedef struct { int index; } device_t;
typedef struct { unsigned long long total, free, used; } memory_t;

static device_t devices[MAX_GPUS];
static device_t mig_instance = { -1 };
static double started;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}
static int setting(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}
static int lost(void) {
    int after = setting("STANDIN_LOST_AFTER_S", -1);
    return after >= 0 && now() - started > after;
}

int nvmlInit_v2(void) {
    if (started == 0) started = now();
    for (int i = 0; i < MAX_GPUS; i++) devices[i].index = i;
    return SUCCESS;
}
int nvmlInitWithFlags(unsigned flags) { (void)flags; return nvmlInit_v2(); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) {
    switch (code) {
        case NOT_SUPPORTED: return "Not Supported";
        case NOT_FOUND: return "Not Found";
        case GPU_IS_LOST: return "GPU is lost";
        default: return "Unknown Error";
    }
}
int nvmlDeviceGetCount_v2(unsigned *count) { *count = setting("STANDIN_GPUS", 1); return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, device_t **device) {
    if ((int)i >= setting("STANDIN_GPUS", 1)) return NOT_FOUND;
    *device = &devices[i];
    return SUCCESS;
}
int nvmlDeviceGetUUID(device_t *device, char *text, unsigned size) {
    snprintf(text, size, "GPU-%08d", device->index);
    return SUCCESS;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, device_t **device) {
    if (strcmp(uuid, "MIG-0") == 0) { *device = &mig_instance; return SUCCESS; }
    if (strncmp(uuid, "GPU-", 4) != 0) return NOT_FOUND;
    return nvmlDeviceGetHandleByIndex_v2(atoi(uuid + 4), device);
}
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device_t *instance, device_t **parent) {
    if (instance != &mig_instance) return NOT_FOUND;
    *parent = &devices[0];
    return SUCCESS;
}
int nvmlDeviceGetIndex(device_t *device, unsigned *index) { *index = device->index; return SUCCESS; }
int nvmlDeviceGetName(device_t *device, char *text, unsigned size) {
    snprintf(text, size, "Stand-in GPU");
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo(device_t *device, memory_t *memory) {
    memory->total = 80ULL << 30; memory->used = 1ULL << 30; memory->free = memory->total - memory->used;
    return SUCCESS;
}
int nvmlDeviceGetTotalEnergyConsumption(device_t *device, unsigned long long *millijoules) {
    if (lost()) return GPU_IS_LOST;
    if (device->index == setting("STANDIN_NO_COUNTER", -1)) return NOT_SUPPORTED;
    *millijoules = (unsigned long long)((1000 + now()) * setting("STANDIN_POWER_W", 100) * 1000.0);
    return SUCCESS;
}
