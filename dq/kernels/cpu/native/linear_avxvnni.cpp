#include "common.h"
#ifdef DQ_HAS_AVXVNNI
#define DQ_AVXVNNI
#include "avx2.h"
// the level comes first
#include "linear.h"

extern "C" int dq_linear_avxvnni(const DqLinear* args) { return dq::run_linear(*args); }
#endif
