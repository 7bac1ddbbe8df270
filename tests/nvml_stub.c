/* A small libnvidia-ml.so.1 for the tests: one GPU whose state the environment sets.

   STUB_INIT    result of nvmlInit (9: driver not loaded)
   STUB_ERROR   result of power (4: no permission)
   STUB_HOT     how many times, from the start, the throttle reasons say hw_thermal
   NO_SYMBOLS   (when compiled) a driver of before 535: older names */
#include <stdlib.h>
#include <string.h>

typedef void *Device;
static int reason_calls = 0;

static int number(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text && *text ? atoi(text) : otherwise;
}

int nvmlInitWithFlags(unsigned flags) { return number("STUB_INIT", 0); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 4 ? "Insufficient Permissions" : "Stub"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) {
  strncpy(text, "570.86.15", size);
  return 0;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, Device *device) {
  *device = (Device)0x1;
  return strcmp(uuid, "GPU-a") && strcmp(uuid, "MIG-b") ? 6 : 0;
}
int nvmlDeviceGetMemoryInfo(Device device, unsigned long long *memory) {
  memory[0] = 80ULL << 30;
  memory[1] = memory[2] = 40ULL << 30;
  return 0;
}
int nvmlDeviceGetMigMode(Device device, unsigned *current, unsigned *pending) {
  *current = *pending = (unsigned)number("STUB_MIG", 0);
  return 0;
}
int nvmlDeviceGetClockInfo(Device device, unsigned domain, unsigned *clock) {
  *clock = domain == 1 ? 1755 : 2619;
  return 0;
}
int nvmlDeviceGetTemperature(Device device, unsigned sensor, unsigned *celsius) {
  *celsius = 61;
  return 0;
}
int nvmlDeviceGetPowerUsage(Device device, unsigned *milliwatts) {
  *milliwatts = 412500;
  return number("STUB_ERROR", 0);
}
int nvmlDeviceGetEnforcedPowerLimit(Device device, unsigned *milliwatts) {
  *milliwatts = 700000;
  return 0;
}
static int reasons(unsigned long long *bits) {
  *bits = reason_calls++ < number("STUB_HOT", 0) ? 0x40 : 0x4;
  return 0;
}
#ifdef NO_SYMBOLS
int nvmlDeviceGetCurrentClocksThrottleReasons(Device d, unsigned long long *b) { return reasons(b); }
#else
int nvmlDeviceGetCurrentClocksEventReasons(Device d, unsigned long long *b) { return reasons(b); }
#endif
