#include "loopfast.h"

#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace {

std::string detect_features() {
  std::string found;
  const auto note = [&found](const char *name, bool present) {
    if (!present) return;
    if (!found.empty()) found += ' ';
    found += name;
  };
#if defined(__x86_64__)
  // Asks the operating system too: a feature whose registers are not saved on a context switch is not reported.
  __builtin_cpu_init();
  note("avx2", __builtin_cpu_supports("avx2"));
  note("fma", __builtin_cpu_supports("fma"));
  note("avx512f", __builtin_cpu_supports("avx512f"));
  note("avx512bw", __builtin_cpu_supports("avx512bw"));
  note("avx512vl", __builtin_cpu_supports("avx512vl"));
  note("avx512bf16", __builtin_cpu_supports("avx512bf16"));
#elif defined(__aarch64__) && defined(__linux__)
  const unsigned long capabilities = getauxval(AT_HWCAP);
  note("neon", (capabilities & HWCAP_ASIMD) != 0);
  note("sve", (capabilities & HWCAP_SVE) != 0);
#else
  static_cast<void>(note);
#endif
  return found;
}

}  // namespace

const char *loopfast_version(void) { return LOOPFAST_VERSION; }

const char *loopfast_cpu_features(void) {
  static const std::string features = detect_features();
  return features.c_str();
}
