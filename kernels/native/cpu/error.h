// The message of a thread's last failed call.
#pragma once

#include <cstdarg>
#include <cstdio>

namespace loopfast {

constexpr int kInvalidArgument = 1;
constexpr int kOutOfMemory = 2;

inline char *error_message() {
  thread_local char message[256] = "";
  return message;
}

__attribute__((format(printf, 1, 2))) inline int invalid(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_message(), 256, format, arguments);
  va_end(arguments);
  return kInvalidArgument;
}

}  // namespace loopfast
