// Where the fields of an argument structure are: a test compares them with the ctypes structures of ops.py.
#pragma once
#include <stddef.h>
#include <stdint.h>

struct DqField {
  const char* name;  // null after the last field; offset is then the size of the structure
  int64_t offset, bytes;
};

#define FIELD(name) \
  { #name, offsetof(Arguments, name), sizeof(Arguments::name) }
#define DQ_FIELDS(type, function, ...)                                              \
  extern "C" const DqField* function() {                                            \
    using Arguments = type;                                                         \
    static const DqField fields[] = {__VA_ARGS__, {nullptr, sizeof(Arguments), 0}}; \
    return fields;                                                                  \
  }
