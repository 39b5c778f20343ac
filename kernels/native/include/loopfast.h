/* loopfast: the C interface of the native library. Plain C, for any language with a foreign function interface. */
#ifndef LOOPFAST_H
#define LOOPFAST_H

#if defined(__GNUC__)
#define LOOPFAST_API __attribute__((visibility("default")))
#else
#define LOOPFAST_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The library's version, such as "0.1.0". The string is static: do not free it. */
LOOPFAST_API const char *loopfast_version(void);

/* Instruction sets of the processor this runs on that kernels may use, in the form "avx2 fma avx512f";
 * "" where none is known. The string is static: do not free it. */
LOOPFAST_API const char *loopfast_cpu_features(void);

#ifdef __cplusplus
}
#endif

#endif
