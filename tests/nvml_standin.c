/* A stand-in for NVIDIA's libnvidia-ml.so.1, for machines without a GPU. A scenario defines its answers: a text
 * file named by the environment variable NVML_STANDIN_SCENARIO, which is read once, at the first nvmlInit of a process.
 * Without the variable there is one default device. A line that cannot be parsed ends the process.
 *
 *   # a comment, from here to the end of the line
 *   driver 580.65.06                       the driver's version
 *   cuda 13000                             the CUDA version that the driver supports, 1000 * major + 10 * minor
 *   devices N                              number of physical GPUs, 0 to 16 (default 1)
 *   init_fails CODE                        nvmlInit returns this error, such as 9, DRIVER_NOT_LOADED
 *   counter_reset_after_s S                S seconds after nvmlInit the energy counters restart at 0
 *   device I name Some GPU Name            to the end of the line
 *   device I memory_mib TOTAL [USED]
 *   device I power constant W
 *   device I power ramp FROM_W TO_W PERIOD_S         a sawtooth
 *   device I power square LOW_W HIGH_W FREQUENCY_HZ  low in the first half of a period, high in the second
 *   device I average_s S                   nvmlDeviceGetPowerUsage is the mean of the last S seconds (default 0: now)
 *   device I power_update_ms MS            both power values are those at the last multiple of MS (default 0: now)
 *   device I tick_ms MS [PHASE_MS]         the energy counter advances at PHASE_MS + multiples of MS (0: continuously)
 *   device I counter_ms MS                 reading the counter takes MS; the value is that in the middle
 *   counters_in_turn                       only one counter at a time is read, as with a driver that has one lock
 *   device I no_counter                    these three are NOT_SUPPORTED: the energy counter,
 *   device I no_power                      nvmlDeviceGetPowerUsage,
 *   device I no_instant                    the field NVML_FI_DEV_POWER_INSTANT
 *   device I unsupported SYMBOL            repeatable: functions whose names begin so are NOT_SUPPORTED
 *   device I lost_after_s S                S seconds after nvmlInit every call on the device returns GPU_IS_LOST
 *   device I temperature C
 *   device I clocks SM_MHZ MEMORY_MHZ
 *   device I max_clocks SM_MHZ MEMORY_MHZ
 *   device I power_limit W [DEFAULT_W]
 *   device I persistence 0|1
 *   device I throttle MASK [AFTER_S [UNTIL_S]]   clocks-event reasons, from AFTER_S to UNTIL_S seconds after nvmlInit
 *   device I violation FIELD SHARE         the field NVML_FI_DEV_PERF_POLICY_… of that number (74 to 81) counts SHARE
 *                                          seconds a second while throttle holds
 *   device I ecc 0|1|none
 *   device I compute_capability MAJOR MINOR
 *   device I process PID|self MIB|- [NAME] repeatable: a compute process; self is the calling one, - is not available
 *   device I visitor FROM_S UNTIL_S PID|self MIB|- [NAME]   the same, only between these times after nvmlInit
 *   device I mig PROFILE MIB               repeatable: puts the device into MIG mode and adds an instance
 *
 * Power is a function of CLOCK_MONOTONIC in seconds (Python's time.monotonic), phase 0 at clock 0. The counter at
 * time t is the integral of power from 0 to floor(t / tick) * tick, in mJ, rounded down. Device I has the UUID
 * GPU-0000000I; its MIG instance K, counted from 0, has MIG-I-K and the name "<device's name> MIG <profile>".
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15, VERSION_MISMATCH = 25
};
enum { MAX_GPUS = 16, MAX_INSTANCES = 7, MAX_PROCESSES = 8, MAX_UNSUPPORTED = 16, POWER_INSTANT = 186 };
enum { FIRST_POLICY = 74, LAST_POLICY = 81 };
enum { CLOCK_GRAPHICS, CLOCK_SM, CLOCK_MEMORY };
static const unsigned long long MIB = 1ULL << 20, NOT_AVAILABLE = ~0ULL;
static const double NEVER_S = 1e18;

typedef enum { CONSTANT, RAMP, SQUARE } shape_t;
typedef struct { shape_t shape; double low_w, high_w, period_s; } curve_t;
typedef struct { unsigned pid; unsigned long long used; char name[64]; double from_s, until_s; } process_t;
typedef struct device {
    struct device *parent; /* of a MIG instance; NULL for a physical GPU */
    int index, instance_count, process_count, unsupported_count;
    char uuid[32], name[96], unsupported[MAX_UNSUPPORTED][64];
    unsigned long long total, used, throttle;
    curve_t power;
    double average_s, power_update_ms, tick_ms, tick_phase_ms, counter_ms, lost_after_s, limit_w, default_limit_w;
    double throttle_after_s, throttle_until_s, violations[LAST_POLICY - FIRST_POLICY + 1];
    int no_instant, temperature, sm_mhz, memory_mhz, max_sm_mhz, max_memory_mhz, persistence, ecc, major, minor;
    process_t processes[MAX_PROCESSES];
} device_t;

static device_t gpus[MAX_GPUS], instances[MAX_GPUS][MAX_INSTANCES];
static int gpu_count = 1, highest_described = -1, cuda_version = 13000, init_fails, users, in_turn;
static pthread_mutex_t turn = PTHREAD_MUTEX_INITIALIZER;
static char driver_version[80] = "580.65.06";
static double started_s, counter_reset_after_s = NEVER_S;

/* ---------------------------------------------------------------- time, power, energy */
static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}
static int passed(double after_s) { return after_s < NEVER_S && now_s() - started_s >= after_s; }

/* How long the device has been throttled by now. */
static double throttled_s(const device_t *d) {
    double t = now_s() - started_s, until = t < d->throttle_until_s ? t : d->throttle_until_s;
    return until > d->throttle_after_s ? until - d->throttle_after_s : 0;
}
static unsigned long long throttle_reasons(const device_t *d) {
    double t = now_s() - started_s;
    return t >= d->throttle_after_s && t < d->throttle_until_s ? d->throttle : 0;
}

static double power_w(const curve_t *p, double t) {
    double phase = p->shape == CONSTANT ? 0 : t / p->period_s - (long long)(t / p->period_s);
    if (p->shape == RAMP) return p->low_w + (p->high_w - p->low_w) * phase;
    return p->shape == SQUARE && phase >= 0.5 ? p->high_w : p->low_w;
}
/* The integral of the power from 0 to t. */
static double energy_j(const curve_t *p, double t) {
    if (p->shape == CONSTANT) return p->low_w * t;
    long long periods = (long long)(t / p->period_s);
    double whole = periods * p->period_s * (p->low_w + p->high_w) / 2, rest = t - periods * p->period_s;
    if (p->shape == RAMP) return whole + p->low_w * rest + (p->high_w - p->low_w) * rest * rest / (2 * p->period_s);
    double in_second_half = rest > p->period_s / 2 ? rest - p->period_s / 2 : 0;
    return whole + p->low_w * (rest - in_second_half) + p->high_w * in_second_half;
}
static double at_last(double t, double step_ms) {
    return step_ms > 0 ? (double)(long long)(t * 1e3 / step_ms) * step_ms / 1e3 : t;
}
static void sleep_ms(double ms) {
    struct timespec t = { (time_t)(ms / 1e3), (long)((ms / 1e3 - (time_t)(ms / 1e3)) * 1e9) };
    if (ms > 0) nanosleep(&t, NULL);
}
static unsigned long long counted_mj(const device_t *d) {
    double t = now_s(), phase_s = d->tick_phase_ms / 1e3;
    double at = at_last(t - phase_s, d->tick_ms) + phase_s;
    double since = passed(counter_reset_after_s) ? started_s + counter_reset_after_s : 0;
    return at <= since ? 0 : (unsigned long long)(1e3 * (energy_j(&d->power, at) - energy_j(&d->power, since)));
}
static unsigned long long counter_mj(const device_t *d) {
    if (in_turn) pthread_mutex_lock(&turn);
    sleep_ms(d->counter_ms / 2);
    unsigned long long value = counted_mj(d);
    sleep_ms(d->counter_ms / 2);
    if (in_turn) pthread_mutex_unlock(&turn);
    return value;
}
static unsigned milli(double w) { return (unsigned)(w * 1e3 + 0.5); }
static unsigned mean_power_mw(const device_t *d) {
    double t = at_last(now_s(), d->power_update_ms), a = d->average_s;
    double w = a > 0 ? (energy_j(&d->power, t) - energy_j(&d->power, t - a)) / a : power_w(&d->power, t);
    return milli(w);
}

/* ---------------------------------------------------------------- the scenario */
static void defaults(void) {
    for (int i = 0; i < MAX_GPUS; i++) {
        gpus[i] = (device_t){
            .index = i, .name = "Stand-in GPU", .total = 81920 * MIB, .used = 1024 * MIB,
            .power = { CONSTANT, 100, 100, 1 }, .tick_ms = 0, .lost_after_s = NEVER_S, .limit_w = 400,
            .default_limit_w = 400, .temperature = 40, .sm_mhz = 1410, .memory_mhz = 1593, .max_sm_mhz = 1410,
            .max_memory_mhz = 1593, .persistence = 1, .ecc = 1, .major = 9, .minor = 0,
        };
        snprintf(gpus[i].uuid, sizeof gpus[i].uuid, "GPU-%08d", i);
        gpus[i].throttle_until_s = NEVER_S;
        for (int k = 0; k <= LAST_POLICY - FIRST_POLICY; k++) gpus[i].violations[k] = -1; /* not supported */
    }
}
static int set_power(device_t *d, const char *text) {
    double a, b, c;
    if (sscanf(text, "constant %lf", &a) == 1) d->power = (curve_t){ CONSTANT, a, a, 1 };
    else if (sscanf(text, "ramp %lf %lf %lf", &a, &b, &c) == 3) d->power = (curve_t){ RAMP, a, b, c };
    else if (sscanf(text, "square %lf %lf %lf", &a, &b, &c) == 3) d->power = (curve_t){ SQUARE, a, b, 1 / c };
    else return 0;
    return d->power.period_s > 0;
}
static int set_throttle(device_t *d, const char *text) {
    char *rest;
    d->throttle = strtoull(text, &rest, 0); /* decimal or 0x… */
    return rest != text && (*rest == 0 || sscanf(rest, "%lf %lf", &d->throttle_after_s, &d->throttle_until_s) >= 1);
}
static int set_violation(device_t *d, const char *text) {
    int field;
    double share;
    if (sscanf(text, "%d %lf", &field, &share) != 2 || field < FIRST_POLICY || field > LAST_POLICY) return 0;
    d->violations[field - FIRST_POLICY] = share;
    return 1;
}
static int set_ecc(device_t *d, const char *text) {
    if (strcmp(text, "none") != 0) return sscanf(text, "%d", &d->ecc);
    d->ecc = -1;
    return 1;
}
static int set_limit(device_t *d, const char *text) {
    int found = sscanf(text, "%lf %lf", &d->limit_w, &d->default_limit_w);
    if (found == 1) d->default_limit_w = d->limit_w;
    return found >= 1;
}
static int set_memory(device_t *d, const char *text) {
    unsigned long long total = 0, used = 0;
    int found = sscanf(text, "%llu %llu", &total, &used);
    d->total = total * MIB;
    d->used = used * MIB;
    return found >= 1;
}
static int add_unsupported(device_t *d, const char *symbol) {
    if (d->unsupported_count == MAX_UNSUPPORTED) return 0;
    snprintf(d->unsupported[d->unsupported_count++], sizeof d->unsupported[0], "%s", symbol);
    return *symbol != 0;
}
static int add_process(device_t *d, const char *text, double from_s, double until_s) {
    char pid[16], mib[24];
    if (d->process_count == MAX_PROCESSES) return 0;
    process_t *p = &d->processes[d->process_count++];
    if (sscanf(text, "%15s %23s %63[^\n]", pid, mib, p->name) < 2) return 0;
    p->pid = strcmp(pid, "self") == 0 ? (unsigned)getpid() : (unsigned)atoi(pid);
    p->used = strcmp(mib, "-") == 0 ? NOT_AVAILABLE : strtoull(mib, NULL, 10) * MIB;
    p->from_s = from_s;
    p->until_s = until_s;
    return p->pid > 0;
}
static int add_visitor(device_t *d, const char *text) {
    double from_s, until_s;
    int at = 0;
    return sscanf(text, "%lf %lf %n", &from_s, &until_s, &at) == 2 && add_process(d, text + at, from_s, until_s);
}
static int add_instance(device_t *d, const char *text) {
    char profile[32];
    unsigned long long mib;
    if (d->instance_count == MAX_INSTANCES || sscanf(text, "%31s %llu", profile, &mib) != 2) return 0;
    device_t *m = &instances[d->index][d->instance_count];
    *m = (device_t){ .parent = d, .index = d->instance_count++, .total = mib * MIB, .lost_after_s = NEVER_S };
    snprintf(m->uuid, sizeof m->uuid, "MIG-%d-%d", d->index, m->index);
    snprintf(m->name, sizeof m->name, "%s", profile); /* the device's name goes before it once it is known */
    return 1;
}
static int set_device(device_t *d, const char *key, const char *text) {
    if (!strcmp(key, "name")) return snprintf(d->name, sizeof d->name, "%s", text) > 0;
    if (!strcmp(key, "memory_mib")) return set_memory(d, text);
    if (!strcmp(key, "power")) return set_power(d, text);
    if (!strcmp(key, "average_s")) return sscanf(text, "%lf", &d->average_s);
    if (!strcmp(key, "tick_ms")) return sscanf(text, "%lf %lf", &d->tick_ms, &d->tick_phase_ms) >= 1;
    if (!strcmp(key, "power_update_ms")) return sscanf(text, "%lf", &d->power_update_ms);
    if (!strcmp(key, "counter_ms")) return sscanf(text, "%lf", &d->counter_ms);
    if (!strcmp(key, "no_counter")) return add_unsupported(d, "nvmlDeviceGetTotalEnergyConsumption");
    if (!strcmp(key, "no_power")) return add_unsupported(d, "nvmlDeviceGetPowerUsage");
    if (!strcmp(key, "no_instant")) return d->no_instant = 1;
    if (!strcmp(key, "unsupported")) return add_unsupported(d, text);
    if (!strcmp(key, "lost_after_s")) return sscanf(text, "%lf", &d->lost_after_s);
    if (!strcmp(key, "temperature")) return sscanf(text, "%d", &d->temperature);
    if (!strcmp(key, "clocks")) return sscanf(text, "%d %d", &d->sm_mhz, &d->memory_mhz) == 2;
    if (!strcmp(key, "max_clocks")) return sscanf(text, "%d %d", &d->max_sm_mhz, &d->max_memory_mhz) == 2;
    if (!strcmp(key, "power_limit")) return set_limit(d, text);
    if (!strcmp(key, "persistence")) return sscanf(text, "%d", &d->persistence);
    if (!strcmp(key, "throttle")) return set_throttle(d, text);
    if (!strcmp(key, "ecc")) return set_ecc(d, text);
    if (!strcmp(key, "compute_capability")) return sscanf(text, "%d %d", &d->major, &d->minor) == 2;
    if (!strcmp(key, "process")) return add_process(d, text, 0, NEVER_S);
    if (!strcmp(key, "visitor")) return add_visitor(d, text);
    if (!strcmp(key, "violation")) return set_violation(d, text);
    if (!strcmp(key, "mig")) return add_instance(d, text);
    return 0;
}
static int set_line(const char *line) {
    char key[32] = "";
    int i, at = 0;
    if (sscanf(line, "driver %79s", driver_version) == 1) return 1;
    if (sscanf(line, "cuda %d", &cuda_version) == 1) return 1;
    if (sscanf(line, "devices %d", &gpu_count) == 1) return gpu_count >= 0 && gpu_count <= MAX_GPUS;
    if (sscanf(line, "init_fails %d", &init_fails) == 1) return 1;
    if (!strcmp(line, "counters_in_turn")) return in_turn = 1;
    if (sscanf(line, "counter_reset_after_s %lf", &counter_reset_after_s) == 1) return 1;
    if (sscanf(line, "device %d %31s %n", &i, key, &at) < 2 || i < 0 || i >= MAX_GPUS) return 0;
    if (i > highest_described) highest_described = i;
    return set_device(&gpus[i], key, line + at) > 0;
}
static void read_scenario(void) {
    char line[512];
    const char *path = getenv("NVML_STANDIN_SCENARIO");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (path && !file) { perror(path); exit(70); }
    for (int number = 1; file && fgets(line, sizeof line, file); number++) {
        line[strcspn(line, "#\n")] = 0;
        for (size_t end = strlen(line); end > 0 && strchr(" \t\r", line[end - 1]); end--) line[end - 1] = 0;
        const char *text = line + strspn(line, " \t");
        if (*text && !set_line(text)) {
            fprintf(stderr, "%s:%d: the NVML stand-in does not understand: %s\n", path, number, text);
            exit(70);
        }
    }
    if (file) fclose(file);
    if (highest_described >= gpu_count) {
        fprintf(stderr, "%s: describes device %d of %d\n", path, highest_described, gpu_count);
        exit(70);
    }
    for (int i = 0; i < MAX_GPUS; i++)
        for (int k = 0; k < gpus[i].instance_count; k++) {
            char profile[96];
            memcpy(profile, instances[i][k].name, sizeof profile);
            snprintf(instances[i][k].name, sizeof instances[i][k].name, "%.60s MIG %.30s", gpus[i].name, profile);
        }
}

/* ---------------------------------------------------------------- common to all calls */
static int refusal(const device_t *d, const char *symbol, int whole) {
    if (users == 0) return UNINITIALIZED;
    if (d == NULL) return INVALID_ARGUMENT;
    const device_t *gpu = d->parent ? d->parent : d;
    if (passed(gpu->lost_after_s)) return GPU_IS_LOST;
    if (whole && d->parent) return NOT_SUPPORTED;
    for (int i = 0; i < gpu->unsupported_count; i++)
        if (strncmp(symbol, gpu->unsupported[i], strlen(gpu->unsupported[i])) == 0) return NOT_SUPPORTED;
    return SUCCESS;
}
/* ANY is for calls that MIG instances answer as well; GPU is for those that only physical GPUs answer. */
#define CHECKED(device, whole) do { int code = refusal(device, __func__, whole); if (code) return code; } while (0)
#define ANY(device) CHECKED(device, 0)
#define GPU(device) CHECKED(device, 1)
/* A call that gives one value of a physical GPU d. */
#define GETTER(symbol, type, value) \
    int symbol(device_t *d, type *out) { GPU(d); *out = (value); return SUCCESS; }
#define INITIALISED() do { if (users == 0) return UNINITIALIZED; } while (0)

static int copied(char *to, unsigned size, const char *text) {
    if (strlen(text) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(to, text);
    return SUCCESS;
}

/* ---------------------------------------------------------------- the library and the machine */
int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    if (started_s == 0) {
        defaults();
        read_scenario();
        started_s = now_s();
    }
    if (init_fails) return init_fails;
    users++;
    return SUCCESS;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlInit(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) {
    INITIALISED();
    users--;
    return SUCCESS;
}
const char *nvmlErrorString(int code) {
    switch (code) {
        case SUCCESS: return "Success";
        case UNINITIALIZED: return "Uninitialized";
        case INVALID_ARGUMENT: return "Invalid Argument";
        case NOT_SUPPORTED: return "Not Supported";
        case NOT_FOUND: return "Not Found";
        case INSUFFICIENT_SIZE: return "Insufficient Size";
        case DRIVER_NOT_LOADED: return "Driver Not Loaded";
        case GPU_IS_LOST: return "GPU is lost";
        case VERSION_MISMATCH: return "Argument Version Mismatch";
        default: return "Unknown Error";
    }
}
int nvmlSystemGetDriverVersion(char *text, unsigned size) { INITIALISED(); return copied(text, size, driver_version); }
int nvmlSystemGetCudaDriverVersion(int *version) { *version = cuda_version; return SUCCESS; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { return nvmlSystemGetCudaDriverVersion(version); }
int nvmlSystemGetProcessName(unsigned pid, char *text, unsigned size) {
    INITIALISED();
    for (int i = 0; i < gpu_count; i++)
        for (int k = 0; k < gpus[i].process_count; k++)
            if (gpus[i].processes[k].pid == pid && gpus[i].processes[k].name[0])
                return copied(text, size, gpus[i].processes[k].name);
    return NOT_FOUND;
}

/* ---------------------------------------------------------------- finding devices */
int nvmlDeviceGetCount_v2(unsigned *count) { INITIALISED(); *count = gpu_count; return SUCCESS; }
int nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, device_t **device) {
    INITIALISED();
    if (i >= (unsigned)gpu_count) return INVALID_ARGUMENT;
    ANY(&gpus[i]);
    *device = &gpus[i];
    return SUCCESS;
}
int nvmlDeviceGetHandleByIndex(unsigned i, device_t **device) { return nvmlDeviceGetHandleByIndex_v2(i, device); }
int nvmlDeviceGetHandleByUUID(const char *uuid, device_t **device) {
    INITIALISED();
    *device = NULL;
    for (int i = 0; i < gpu_count; i++) {
        if (strcmp(gpus[i].uuid, uuid) == 0) *device = &gpus[i];
        for (int k = 0; k < gpus[i].instance_count; k++)
            if (strcmp(instances[i][k].uuid, uuid) == 0) *device = &instances[i][k];
    }
    if (*device == NULL) return NOT_FOUND;
    ANY(*device);
    return SUCCESS;
}
int nvmlDeviceGetMigMode(device_t *device, unsigned *current, unsigned *pending) {
    GPU(device);
    *current = *pending = device->instance_count > 0;
    return SUCCESS;
}
GETTER(nvmlDeviceGetMaxMigDeviceCount, unsigned, MAX_INSTANCES)
int nvmlDeviceGetMigDeviceHandleByIndex(device_t *device, unsigned k, device_t **instance) {
    GPU(device);
    if (k >= (unsigned)device->instance_count) return k >= MAX_INSTANCES ? INVALID_ARGUMENT : NOT_FOUND;
    *instance = &instances[device->index][k];
    return SUCCESS;
}
int nvmlDeviceIsMigDeviceHandle(device_t *device, unsigned *is) { ANY(device); *is = !!device->parent; return SUCCESS; }
int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device_t *instance, device_t **parent) {
    ANY(instance);
    if (!instance->parent) return INVALID_ARGUMENT;
    *parent = instance->parent;
    return SUCCESS;
}

/* ---------------------------------------------------------------- what a device is */
int nvmlDeviceGetIndex(device_t *device, unsigned *index) { ANY(device); *index = device->index; return SUCCESS; }
int nvmlDeviceGetUUID(device_t *device, char *to, unsigned size) { ANY(device); return copied(to, size, device->uuid); }
int nvmlDeviceGetName(device_t *device, char *to, unsigned size) { ANY(device); return copied(to, size, device->name); }
/* The architecture follows from the compute capability: 5 is Volta, 9 Hopper; enough for "Volta and newer". */
int nvmlDeviceGetArchitecture(device_t *device, unsigned *architecture) {
    ANY(device);
    *architecture = device->major >= 9 ? 9 : device->major >= 8 ? 7 : device->major >= 7 ? 5 : 4;
    return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(device_t *device, int *major, int *minor) {
    ANY(device);
    *major = device->parent ? device->parent->major : device->major;
    *minor = device->parent ? device->parent->minor : device->minor;
    return SUCCESS;
}
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2_t;
int nvmlDeviceGetMemoryInfo(device_t *device, memory_t *memory) {
    ANY(device);
    *memory = (memory_t){ device->total, device->total - device->used, device->used };
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo_v2(device_t *device, memory_v2_t *memory) {
    ANY(device);
    if (memory->version != (sizeof *memory | 2 << 24)) return VERSION_MISMATCH;
    *memory = (memory_v2_t){ memory->version, device->total, 0, device->total - device->used, device->used };
    return SUCCESS;
}
typedef struct {
    char legacy_id[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char id[32];
} pci_t;
int nvmlDeviceGetPciInfo_v3(device_t *device, pci_t *pci) {
    GPU(device);
    *pci = (pci_t){ .bus = device->index + 1 };
    snprintf(pci->legacy_id, sizeof pci->legacy_id, "0000:%02X:00.0", pci->bus & 0xff);
    snprintf(pci->id, sizeof pci->id, "00000000:%02X:00.0", pci->bus & 0xff);
    return SUCCESS;
}

/* ---------------------------------------------------------------- power and energy */
GETTER(nvmlDeviceGetTotalEnergyConsumption, unsigned long long, counter_mj(d))
GETTER(nvmlDeviceGetPowerUsage, unsigned, mean_power_mw(d))
GETTER(nvmlDeviceGetPowerManagementLimit, unsigned, milli(d->limit_w))
GETTER(nvmlDeviceGetEnforcedPowerLimit, unsigned, milli(d->limit_w))
GETTER(nvmlDeviceGetPowerManagementDefaultLimit, unsigned, milli(d->default_limit_w))
typedef struct {
    unsigned id, scope;
    long long timestamp, latency;
    unsigned type;
    int code;
    union { double d; unsigned u; unsigned long long ull; } value;
} field_t;
int nvmlDeviceGetFieldValues(device_t *device, int count, field_t *fields) {
    ANY(device);
    for (field_t *field = fields; field < fields + count; field++) {
        int is_power = field->id == POWER_INSTANT && !device->no_instant;
        int is_policy = field->id >= FIRST_POLICY && field->id <= LAST_POLICY
                        && device->violations[field->id - FIRST_POLICY] >= 0;
        field->code = !device->parent && (is_power || is_policy) ? SUCCESS : NOT_SUPPORTED;
        if (field->code != SUCCESS) continue;
        field->timestamp = time(NULL) * 1000000LL;
        field->type = is_power ? 1 : 3; /* unsigned int, unsigned long long */
        if (is_power) field->value.u = milli(power_w(&device->power, at_last(now_s(), device->power_update_ms)));
        else field->value.ull = (unsigned long long)(device->violations[field->id - FIRST_POLICY] * throttled_s(device) * 1e9);
    }
    return SUCCESS;
}

/* ---------------------------------------------------------------- how a device is doing */
int nvmlDeviceGetTemperature(device_t *device, int sensor, unsigned *celsius) {
    GPU(device);
    if (sensor != 0) return INVALID_ARGUMENT;
    *celsius = device->temperature;
    return SUCCESS;
}
typedef struct { unsigned version, sensor; int celsius; } temperature_t;
int nvmlDeviceGetTemperatureV(device_t *device, temperature_t *temperature) {
    GPU(device);
    if (temperature->version != (sizeof *temperature | 1 << 24)) return VERSION_MISMATCH;
    if (temperature->sensor != 0) return INVALID_ARGUMENT;
    temperature->celsius = device->temperature;
    return SUCCESS;
}
static int clock_mhz(int type, int sm, int memory, unsigned *mhz) {
    if (type > CLOCK_MEMORY) return NOT_SUPPORTED;
    *mhz = type == CLOCK_MEMORY ? memory : sm;
    return SUCCESS;
}
int nvmlDeviceGetClockInfo(device_t *device, int type, unsigned *mhz) {
    GPU(device);
    return clock_mhz(type, device->sm_mhz, device->memory_mhz, mhz);
}
int nvmlDeviceGetMaxClockInfo(device_t *device, int type, unsigned *mhz) {
    GPU(device);
    return clock_mhz(type, device->max_sm_mhz, device->max_memory_mhz, mhz);
}
GETTER(nvmlDeviceGetCurrentClocksEventReasons, unsigned long long, throttle_reasons(d))
GETTER(nvmlDeviceGetCurrentClocksThrottleReasons, unsigned long long, throttle_reasons(d))
GETTER(nvmlDeviceGetPersistenceMode, int, d->persistence)
int nvmlDeviceGetEccMode(device_t *device, int *current, int *pending) {
    GPU(device);
    if (device->ecc < 0) return NOT_SUPPORTED;
    *current = *pending = device->ecc;
    return SUCCESS;
}
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process_info_t;
int nvmlDeviceGetComputeRunningProcesses_v3(device_t *device, unsigned *count, process_info_t *infos) {
    ANY(device);
    unsigned room = *count, needed = 0, at = 0;
    double t = now_s() - started_s;
    const process_t *present[MAX_PROCESSES];
    for (int i = 0; i < device->process_count; i++)
        if (t >= device->processes[i].from_s && t < device->processes[i].until_s)
            present[needed++] = &device->processes[i];
    *count = needed;
    if (needed > room || (needed && !infos)) return INSUFFICIENT_SIZE;
    for (; at < needed; at++) infos[at] = (process_info_t){ present[at]->pid, present[at]->used, ~0u, ~0u };
    return SUCCESS;
}
int nvmlDeviceGetComputeRunningProcesses_v2(device_t *device, unsigned *count, process_info_t *infos) {
    return nvmlDeviceGetComputeRunningProcesses_v3(device, count, infos);
}
