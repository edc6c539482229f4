/* A libnvidia-ml with two GPUs, to read through the real C interface where there is no driver. Build: cc -shared. */
#include <stdlib.h>
#include <string.h>

typedef unsigned long long u64;
struct memory { u64 total, free, used; };
struct memory_v2 { unsigned version; u64 total, reserved, free, used; };

static int gpu[2] = {0, 1};
static const u64 GIB = 1ULL << 30;

int nvmlInit_v2(void) { return getenv("DOUBLE_NO_DRIVER") ? 9 : 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) { strncpy(text, "580.65.06", length); return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    if (index > 1) return 2;
    *handle = &gpu[index];
    return 0;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    if (strcmp(uuid, "GPU-second") != 0) return 2;
    *handle = &gpu[1];
    return 0;
}
int nvmlDeviceGetName(void *handle, char *text, unsigned length) {
    strncpy(text, *(int *)handle ? "NVIDIA GeForce RTX 4090" : "NVIDIA H100 80GB HBM3", length);
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    *major = *(int *)handle ? 8 : 9;
    *minor = *(int *)handle ? 9 : 0;
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, struct memory *info) {
    info->total = (*(int *)handle ? 24 : 80) * GIB;
    info->free = info->total - 2 * GIB;
    info->used = 2 * GIB;
    return 0;
}
int nvmlDeviceGetMemoryInfo_v2(void *handle, struct memory_v2 *info) {
    if (getenv("DOUBLE_OLD_DRIVER") || info->version != (sizeof(struct memory_v2) | (2u << 24))) return 2;
    info->total = (*(int *)handle ? 24 : 80) * GIB;
    info->reserved = GIB / 2;
    info->free = info->total - 2 * GIB;
    info->used = 3 * GIB / 2;
    return 0;
}
