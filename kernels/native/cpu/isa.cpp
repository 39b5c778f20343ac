#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace loopfast {
namespace {

std::string detect_features() {
  std::string found;
  const auto note = [&found](const char *name, bool present) {
    if (!present) return;
    if (!found.empty()) found += ' ';
    found += name;
  };
#if defined(__x86_64__)
  // This asks the operating system too: a feature whose registers it does not save on a context switch is not reported.
  __builtin_cpu_init();
  note("avx2", __builtin_cpu_supports("avx2"));
  note("fma", __builtin_cpu_supports("fma"));
  note("avx512f", __builtin_cpu_supports("avx512f"));
  note("avx512bw", __builtin_cpu_supports("avx512bw"));
  note("avx512dq", __builtin_cpu_supports("avx512dq"));
  note("avx512vl", __builtin_cpu_supports("avx512vl"));
#elif defined(__aarch64__) && defined(__linux__)
  const unsigned long capabilities = getauxval(AT_HWCAP);
  note("neon", (capabilities & HWCAP_ASIMD) != 0);
  note("sve", (capabilities & HWCAP_SVE) != 0);
#else
  static_cast<void>(note);
#endif
  return found;
}

struct Isa {
  const char *name;
  const Kernels *kernels;
  const NormKernels *norm_kernels;
};

Isa choose() {
#if defined(LOOPFAST_X86_KERNELS)
  const char *asked = std::getenv("LOOPFAST_ISA");
  const auto asks_for = [asked](const char *name) { return asked != nullptr && std::strcmp(asked, name) == 0; };
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && !asks_for("portable");
  const bool avx512 = avx2 && !asks_for("avx2") && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) return {"avx512", &kernels_avx512, &norm_kernels_avx512};
  if (avx2) return {"avx2", &kernels_avx2, &norm_kernels_avx2};
#endif
  return {"portable", &kernels_portable, &norm_kernels_portable};
}

const Isa &chosen() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace

const Kernels &kernels() { return *chosen().kernels; }

const NormKernels &norm_kernels() { return *chosen().norm_kernels; }

}  // namespace loopfast

const char *loopfast_version(void) { return LOOPFAST_VERSION; }

const char *loopfast_cpu_features(void) {
  static const std::string features = loopfast::detect_features();
  return features.c_str();
}

const char *loopfast_isa(void) { return loopfast::chosen().name; }
